"""Linking with Zig, which needs no compiler, headers or libraries of the system: for this machine and for others."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from onnxslim.errors import TargetError

__all__ = ["build_executable", "link_library"]

# Zig would build its own compiler runtime (20 s the first time); TVM's code needs none of it.
_LEAN = ["-fno-compiler-rt", "-fno-ubsan-rt", "-fstrip"]
_LIMIT_SECONDS = 600


def link_library(objects: Sequence[str | Path], output: Path, triple: str) -> None:
    """Link object files into a shared library that names libc and libm as what it needs.

    Args:
        objects: relocatable ELF files for the processor of ``triple``.
        output: file to write.
        triple: what to link for, as Zig names it.

    Raises:
        TargetError: Zig is missing or fails.
    """
    # The symbols of TVM's runtime are found when the library is loaded.
    arguments = [
        "build-lib",
        "-dynamic",
        "-fallow-shlib-undefined",
        "-lc",
        "-lm",
        *(str(Path(file).resolve()) for file in objects),
    ]
    _zig([*arguments, f"-femit-bin={output.resolve()}"], triple)  # Zig runs in a folder of its own


def build_executable(source: Path, include: Sequence[Path], output: Path, triple: str) -> None:
    """Compile one C file into an executable.

    Raises:
        TargetError: Zig is missing or fails.
    """
    folders = [argument for folder in include for argument in ("-I", str(folder.resolve()))]
    arguments = ["build-exe", str(source.resolve()), "-O", "ReleaseSmall", "-lc", *folders]
    _zig([*arguments, f"-femit-bin={output.resolve()}"], triple)


def _zig(arguments: list[str], triple: str) -> None:
    if importlib.util.find_spec("ziglang") is None:
        raise TargetError("linking needs Zig. Run: pip install ziglang")
    with tempfile.TemporaryDirectory(prefix="onnxslim-zig-") as scratch:
        command = [sys.executable, "-m", "ziglang", *arguments, *_LEAN, "-target", triple, "--cache-dir", scratch]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_SECONDS, cwd=scratch)
        except subprocess.TimeoutExpired:
            raise TargetError(f"linking for {triple} took longer than {_LIMIT_SECONDS} s and was stopped.") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise TargetError(f"linking for {triple} failed: {lines[0] if lines else f'Zig exits with {done.returncode}'}")
