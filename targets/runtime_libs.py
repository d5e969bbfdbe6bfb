"""TVM's small runtime libraries for another architecture than this machine's, out of TVM's own wheels."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from onnxslim.errors import TargetError
from onnxslim.targets._tvm import PINS, installed_runtime

__all__ = ["fetch_runtime", "runtime_libraries", "user_cache"]

_PATHS = {"apache-tvm": "tvm/lib/libtvm_runtime.so", "apache-tvm-ffi": "tvm_ffi/lib/libtvm_ffi.so"}


def user_cache() -> Path:
    """The folder of what is kept from one command to the next; it may not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onnxslim"


def _cache_folder(machine: str) -> Path:
    return user_cache() / f"tvm-runtime-{PINS['apache-tvm']}-{PINS['apache-tvm-ffi']}-{machine}"


def runtime_libraries(machine: str) -> list[Path]:
    """``libtvm_ffi.so`` and ``libtvm_runtime.so`` for an architecture; empty where they were never fetched.

    Nothing is downloaded here: see :func:`fetch_runtime`.
    """
    if machine == platform.machine() and sys.platform.startswith("linux"):
        return installed_runtime()
    files = [_cache_folder(machine) / Path(path).name for path in _PATHS.values()]
    return files if all(file.is_file() for file in files) else []


def fetch_runtime(machine: str) -> list[Path]:
    """Download the wheels of TVM for an architecture (98 MB for aarch64), keep the two libraries (5 MB), return them.

    Raises:
        TargetError: pip cannot get them.
    """
    found = runtime_libraries(machine)
    if found:
        return found
    with tempfile.TemporaryDirectory(prefix="onnxslim-wheels-") as folder:
        _download(machine, Path(folder))
        target = _cache_folder(machine)
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        for package, inside in _PATHS.items():
            wheel = next(Path(folder).glob(f"{package.replace('-', '_')}-[0-9]*.whl"))
            with zipfile.ZipFile(wheel) as archive:
                (stage / Path(inside).name).write_bytes(archive.read(inside))
        shutil.rmtree(target, ignore_errors=True)
        stage.rename(target)
    return runtime_libraries(machine)


def _download(machine: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--platform", f"manylinux_2_28_{machine}", "--dest", str(folder)]
    command += [f"{package}=={version}" for package, version in PINS.items()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise TargetError(f"TVM's runtime for {machine} cannot be fetched: {lines[0] if lines else 'pip failed'}")
