"""Where the time of a compiled model goes: every kernel, timed inside of whole inferences."""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from onnxslim.record import KernelTime, Profile
from onnxslim.targets.bundle import Bundle, KernelEntry

__all__ = ["profile"]

_WARMUP = 2
_FEWEST, _MOST = 3, 50
RUNTIME_ROW = "memory, shapes, checks"
"""What calls of the runtime are summed up as."""


def profile(
    bundle: Bundle, feed: Mapping[str, np.ndarray], *, threads: int | None = None, max_seconds: float = 2.0
) -> Profile:
    """Time every kernel of a bundle over several inferences.

    The clock itself takes a microsecond or two of a call; what the fastest call of all takes is subtracted from each.

    Args:
        bundle: what to run; its own state is not touched.
        feed: as of :meth:`Bundle.run`.
        threads: as of :meth:`Bundle.prepare`.
        max_seconds: stop after about this long; a few inferences are timed in any case.

    Raises:
        DataError: the feed does not fit.
        TargetError: this machine cannot run it, or it fails.
    """
    from onnxslim.runtime import usable_cores
    from onnxslim.targets.peak import peak_flops

    watched = Bundle(bundle.path, bundle.manifest, threads=bundle.threads if threads is None else threads)
    clock = _Clock()
    run = watched.prepare(feed)
    for _ in range(_WARMUP):
        run()
    watched.watch(clock.observe)
    run()
    clock.clear()
    end = time.perf_counter() + max_seconds
    while clock.inferences < _FEWEST or (clock.inferences < _MOST and time.perf_counter() < end):
        run()
        clock.finish()
    used = watched.threads or usable_cores()
    peak = peak_flops(used)
    return Profile(
        threads=used,
        inferences=clock.inferences,
        peak_flops_per_second=peak,
        kernels=_rows(clock, bundle.manifest.kernels, peak),
    )


class _Clock:
    """Sums up the time of calls by name, one inference after the other."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = defaultdict(int)
        self.milliseconds: dict[str, list[float]] = {}
        self.inferences = 0
        self.fastest_ms = math.inf
        self._sums: dict[str, float] = defaultdict(float)
        self._open: list[tuple[float, float]] = []
        self._inner = 0.0

    def observe(self, name: str, before: bool) -> None:
        """What the virtual machine calls; calls nest where a branch is a function of its own that calls kernels."""
        now = time.perf_counter()
        if before:
            self._open.append((time.perf_counter(), self._inner))
            self._inner = 0.0
            return
        start, outer = self._open.pop()
        seconds = now - start
        self._sums[name] += seconds - self._inner
        self._inner = outer + seconds
        self.calls[name] += 1
        self.fastest_ms = min(self.fastest_ms, seconds * 1e3)

    def finish(self) -> None:
        """An inference is over."""
        for name, seconds in self._sums.items():
            self.milliseconds.setdefault(name, [0.0] * self.inferences).append(seconds * 1e3)
        self.inferences += 1
        for name, times in self.milliseconds.items():
            if name not in self._sums:
                times.append(0.0)
        self._sums.clear()

    def clear(self) -> None:
        """Forget what was seen so far."""
        self.calls.clear()
        self._sums.clear()


def _rows(clock: _Clock, kernels: Mapping[str, KernelEntry], peak: float) -> list[KernelTime]:
    groups: dict[str, list[str]] = {}
    for name in clock.milliseconds:
        groups.setdefault(name if name in kernels else RUNTIME_ROW, []).append(name)
    calls, medians = {}, {}
    for group, names in groups.items():
        calls[group] = round(sum(clock.calls[name] for name in names) / clock.inferences)
        each = map(sum, zip(*(clock.milliseconds[name] for name in names), strict=True))
        medians[group] = max(statistics.median(each) - calls[group] * clock.fastest_ms, 0.0)
    total = sum(medians.values()) or 1.0
    ranked = sorted(medians, key=lambda name: -medians[name])
    return [_row(name, kernels.get(name), calls[name], medians[name], medians[name] / total, peak) for name in ranked]


def _row(name: str, entry: KernelEntry | None, calls: int, ms: float, share: float, peak: float) -> KernelTime:
    def rate(amount: int | None) -> float | None:
        return amount * calls / ms * 1e3 if amount and ms else None

    if entry is None:
        return KernelTime(name=name, op=name, calls=calls, ms=ms, share=share)
    speed = rate(entry.flops)
    return KernelTime(
        name=name,
        op=entry.op,
        shape=list(entry.shape),
        calls=calls,
        ms=ms,
        share=share,
        flops_per_second=speed,
        peak_share=None if speed is None else speed / peak,
        bytes_per_second=rate(entry.bytes),
        writer=entry.writer,
    )
