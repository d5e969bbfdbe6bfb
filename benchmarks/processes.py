"""Run a command as a process of its own, with a time limit, and read what it cost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Linux counts the memory of the process that starts another as the other's: so a small one starts it.
_LAUNCHER = (
    "import os, sys\n"
    "pid = os.spawnv(os.P_NOWAIT, sys.argv[1], sys.argv[1:])\n"
    "_, status, usage = os.wait4(pid, 0)\n"
    "print('\\n', os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss)"
)


@dataclass(frozen=True)
class Finished:
    """A command that ended: why it failed (or nothing), its CPU seconds (children included), its peak memory."""

    failure: str
    cpu_seconds: float
    peak_bytes: int


def run_measured(words: Sequence[str], folder: Path, timeout: float) -> Finished:
    """Run a command in ``folder``; what it prints last is its reason where it fails."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _LAUNCHER, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        cwd=folder,
        start_new_session=True,
        text=True,
        errors="replace",
    )
    try:
        said = process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return Finished(f"ran longer than {timeout:.0f} s", 0.0, 0)
    *lines, figures = said.rstrip("\n").split("\n")
    status, cpu, peak = figures.split()
    last = next((line.strip()[:200] for line in reversed(lines) if line.strip()), "nothing was printed")
    return Finished("" if status == "0" else f"exit status {status}, {last}", float(cpu), int(peak) * 1024)
