"""How many instructions one inference of a bundle takes, counted under QEMU: emulated time says nothing, this does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

_PLUGIN = Path(__file__).with_name("count_instructions.c")


def per_inference(bundle: Any, arrays: list[Any], timeout: float) -> int | None:
    """Instructions of a run with two inferences more less those of one with one more; the difference is one inference.

    None where QEMU's emulator for the architecture or a C compiler is missing, or where the plugin does not load
    (QEMU 7 and 8 take it).
    """
    command = _emulator(bundle.target)
    if command is None or shutil.which("cc") is None:
        return None
    with tempfile.TemporaryDirectory(prefix="onnxslim-") as folder:
        place = Path(folder)
        subprocess.run(["cc", "-shared", "-fPIC", "-O2", str(_PLUGIN), "-o", str(place / "count.so")], check=True)
        line = [*command, "-plugin", str(place / "count.so"), "-d", "plugin", *_program(bundle, arrays, place)]
        counts = []
        for repeat in (1, 2):
            line[line.index("--repeat") + 1] = str(repeat)
            try:
                said = subprocess.run(line, capture_output=True, text=True, timeout=timeout)
            except subprocess.TimeoutExpired:
                return None
            found = re.search(r"^instructions (\d+)$", said.stderr + said.stdout, re.MULTILINE)
            if said.returncode or found is None:
                return None
            counts.append(int(found[1]))
    return counts[1] - counts[0]


def _emulator(target: Any) -> list[str] | None:
    from onnxslim.targets.verify import emulator

    if target.machine == "aarch64":
        return emulator(target)
    qemu = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
    return None if qemu is None or target.vector_bits > 256 else [qemu, "-cpu", "max"]  # QEMU knows no AVX-512


def _program(bundle: Any, arrays: list[Any], place: Path) -> list[str]:
    """The bundle's own runner, on one thread, with the runtime for its architecture beside it."""
    import numpy as np

    from onnxslim.targets.runtime_libs import runtime_libraries

    files = [*bundle.path.iterdir(), *runtime_libraries(bundle.target.machine)]
    for file in {file.name: file for file in files}.values():
        (place / file.name).symlink_to(os.path.realpath(file))
    names = []
    for number, array in enumerate(arrays):
        names.append(str(place / f"in{number}.npy"))
        np.save(names[-1], array)
    return [str(bundle.path.resolve() / "run"), str(place), str(place), "--threads", "1", "--repeat", "1", *names]
