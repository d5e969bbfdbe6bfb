"""Tuning: measure other tiles for the products of a model on this machine, and keep those that are faster.

A tile is chosen by a small model of the processor, which is right most of the time. Where time may be spent, whole
fused kernels are compiled with every other tile that fits the registers and timed beside the best so far, call by call.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnxslim.errors import TargetError
from onnxslim.targets._tvm import config_threads
from onnxslim.targets.catalogue import Target, runs_here
from onnxslim.targets.lower import fuse
from onnxslim.targets.machine import Machine
from onnxslim.targets.tiling import Tile, Tiling, tiles_to_try
from onnxslim.targets.tuning_database import Database, Verdict

__all__ = ["Tuning", "check_tunable", "tune"]

Progress = Callable[[str, int, int], None]

# What is not faster by this is as likely noise.
_MARGIN = 0.97
# A tile that looks this slow after the fewest rounds is not worth more of them.
_HOPELESS = 1.1
_FEWEST, _MOST = 5, 40
_SECONDS = 0.4
# Tiles of one product that are tried before the next product has its turn.
_TURN = 4


@dataclass(frozen=True)
class Tuning:
    """What tuning knows when its time is over.

    Attributes:
        tiles: those that are faster than the ones taken without tuning, by workload.
        notes: one sentence on what was tried, and what the user should know.
    """

    tiles: dict[str, Tile] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def check_tunable(target: Target) -> None:
    """Check that code for a target can be timed here.

    Raises:
        TargetError: it cannot.
    """
    if not runs_here(target):
        raise TargetError(
            f"target {target.name}: tuning measures on this machine, which cannot run code for it. "
            "Leave --tune out, or tune on such a device."
        )


def tune(
    module: Any, target: Target, seconds: float, *, progress: Progress | None = None, database: Path | None = None
) -> Tuning:
    """Spend ``seconds`` on the products of a model, those that compute most first.

    Args:
        module: Relax, as imported.
        target: a resolved target.
        seconds: when to stop; 0: take what earlier tuning found. The measurement at hand is given up then, so it takes
            longer only by what compiling one kernel takes.
        progress: called as ``progress(what, seconds so far, seconds)``.
        database: the file of what was measured; default: in the user's cache folder.

    Raises:
        TargetError: this machine cannot run code for the target, or TVM cannot compile the model.
    """
    check_tunable(target)
    end = time.monotonic() + seconds
    tiling = Tiling(Machine.of(target))
    found = Database(target, database)
    jobs = _jobs(fuse(module, target, tiling), tiling)
    waiting = jobs
    while waiting and time.monotonic() < end:
        clock = _Clock(progress, len(jobs), seconds, end)
        waiting = [job for job in waiting if _Search(job, target, tiling, found).run(end, clock)]
    tiles = {
        job.key: tile for job in jobs if (verdict := found.verdicts.get(job.key)) and (tile := verdict.tile) is not None
    }
    finished = sum(not _open_tiles(job, tiling, found) for job in jobs)
    told = f"tuning: of {len(jobs)} products, {len(tiles)} have a faster tile; {finished} are tuned in full"
    if not jobs:
        told = "tuning: no product by constants has all of its sizes known (--shape, or [shapes] in a recipe)"
    elif finished < len(jobs):
        told += ", the next --tune goes on with the others"
    return Tuning(tiles, [told, *found.notes])


@dataclass(frozen=True)
class _Clock:
    """Tells how far tuning has come."""

    progress: Progress | None
    jobs: int
    seconds: float
    end: float

    def tick(self, kind: str) -> None:
        if self.progress is not None:
            spent = self.seconds - max(self.end - time.monotonic(), 0)
            self.progress(f"tuning {self.jobs} products: {kind}", int(spent), max(int(self.seconds), 1))


@dataclass(frozen=True)
class _Job:
    """One product: its workload, a kernel that has it, how much that computes in an inference."""

    key: str
    kernel: Any
    work: int


def _jobs(fused: Any, tiling: Tiling) -> list[_Job]:
    """The products of a fused model whose sizes are known, by how much they compute."""
    from tvm.tirx import PrimFunc

    from onnxslim.targets.fused import read_kernel
    from onnxslim.targets.retile import calls_of, multiplications, workload_of

    calls = calls_of(fused)
    found: dict[str, _Job] = {}
    for variable, function in fused.functions_items():
        kernel = read_kernel(function) if isinstance(function, PrimFunc) else None
        key = None if kernel is None else workload_of(kernel)
        if kernel is None or key is None or key not in tiling.demands:
            continue
        work = multiplications(kernel) * calls[variable.name_hint]
        # The same product with something else behind it takes the same tile.
        known = found.get(key)
        found[key] = _Job(key, known.kernel if known else kernel, work + (known.work if known else 0))
    return sorted(found.values(), key=lambda job: -job.work)


def _open_tiles(job: _Job, tiling: Tiling, database: Database) -> list[Tile]:
    """The tiles that were not measured yet, the likely ones first."""
    demand, machine = tiling.demands[job.key], tiling.machine
    verdict = database.verdicts.get(job.key, Verdict())
    every = tiles_to_try(demand.rows, demand.columns, machine.lanes(), machine)
    return [tile for tile in every if tile != demand.tile and (tile.rows, tile.vectors) not in verdict.tried]


class _Search:
    """The best tile of one product."""

    def __init__(self, job: _Job, target: Target, tiling: Tiling, database: Database) -> None:
        self.job, self.target, self.machine, self.database = job, target, tiling.machine, database
        self.open = _open_tiles(job, tiling, database)
        self.default = tiling.demands[job.key].tile
        # Larger than what a core keeps to itself: weights come from further away in a whole model, too.
        self.evicted = np.zeros(self.machine.l2_bytes, np.float32)

    def run(self, end: float, clock: _Clock) -> bool:
        """Measure some of what is open, until the time is over; verdicts go into the database one by one.

        Returns:
            Whether there is more to measure.
        """
        if not self.open or time.monotonic() >= end:
            return bool(self.open)
        from onnxslim.targets.retile import Sample

        clock.tick(self.job.kernel.steps[0].name)
        sample = Sample(self.job.kernel, self.machine, self.target)
        verdict = self.database.verdicts.get(self.job.key, Verdict()).model_copy(deep=True)
        best = sample.call(verdict.tile or self.default)
        if best is None:
            return False
        for tile in self.open[:_TURN]:
            clock.tick(self.job.kernel.steps[0].name)
            if time.monotonic() >= end:
                return True
            call = sample.call(tile)
            faster = call is not None and self._is_faster(call, best, end)
            if faster is None:
                return True
            verdict.tried.append((tile.rows, tile.vectors))
            if call is not None and faster:
                best, verdict.best = call, (tile.rows, tile.vectors)
            self.database.keep(self.job.key, verdict)
        return len(self.open) > _TURN

    def _is_faster(self, call: Callable[[], None], best: Callable[[], None], end: float) -> bool | None:
        """Whether one is faster than the other, twice in a row; None where the time did not suffice to tell."""
        for _ in range(2):
            ratio = self._ratio(call, best, end)
            if ratio is None or ratio >= _MARGIN:
                return None if ratio is None else False
        return True

    def _ratio(self, call: Callable[[], None], best: Callable[[], None], end: float) -> float | None:
        config_threads(self.machine.cores)
        ratios: list[float] = []
        stop = time.monotonic() + _SECONDS
        call()
        while len(ratios) < _FEWEST or (len(ratios) < _MOST and time.monotonic() < stop):
            if time.monotonic() >= end:
                return None
            # Who comes second may find the arguments in the cache.
            pair = (best, call) if len(ratios) % 2 else (call, best)
            times = {each: self._time(each) for each in pair}
            ratios.append(times[call] / times[best])
            if len(ratios) == _FEWEST and statistics.median(ratios) > _HOPELESS:
                break
        return statistics.median(ratios)

    def _time(self, call: Callable[[], None]) -> float:
        self.evicted += 1
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
