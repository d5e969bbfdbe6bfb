"""Before and after at a glance: one tile for each thing that was measured, with the change and whether it is real."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from onnxslim.record import Latency, Record, Score, TargetEntry
from onnxslim.reports import units

__all__ = ["Tile", "headline", "runtime_name", "thread_count", "tiles"]

Trend = Literal["better", "worse", "same"]
_MOST_TARGETS = 8
_RUNTIMES = {"onnxruntime": "ONNX Runtime", "tvm": "TVM"}


@dataclass(frozen=True)
class Tile:
    """One measured thing.

    Attributes:
        label: what it is.
        after: its value now; empty where it was not measured.
        before: what it is compared with, in words and numbers.
        change: absolute and relative change.
        trend: whether the change is for the better; "same" where it is neutral or lost in the noise.
        share: after / before for the bar, from 0; None draws no bar.
        note: how sure the number is, or why it is missing.
        estimated: worked out, not measured.
    """

    label: str
    after: str
    before: str = ""
    change: str = ""
    trend: Trend = "same"
    share: float | None = None
    note: str = ""
    estimated: bool = False


def tiles(record: Record) -> list[Tile]:
    """Make the tiles in reading order: size, accuracy, latencies, memory, then what follows from the graph."""
    old, new = record.before, record.after
    return [
        _number("Size on disk", old.size_bytes, new.size_bytes, units.as_bytes, units.signed_bytes),
        _accuracy(old.score, new.score),
        _latency(old.latency, new.latency),
        *[_target(target) for target in record.targets[:_MOST_TARGETS]],
        _number("Peak memory", old.peak_memory_bytes, new.peak_memory_bytes, units.as_bytes, units.signed_bytes),
        _number("Parameters", old.parameters, new.parameters, units.estimate, lambda change: _signed(change)),
        _number("MACs", old.macs, new.macs, units.estimate, lambda change: _signed(change), estimated=True),
        # More nodes are no loss: quantization adds some on purpose.
        _number("Nodes", old.nodes, new.nodes, units.count, units.signed_count, neutral=True),
    ]


def headline(record: Record) -> str:
    """Sum the run up in one sentence, where the record brings none."""
    old, new = record.before, record.after
    parts = [
        f"size {units.as_bytes(old.size_bytes)} → {units.as_bytes(new.size_bytes)} "
        f"({units.percent_change(old.size_bytes, new.size_bytes)})"
    ]
    if old.score and new.score:
        parts.append(f"{new.score.metric} {units.points(old.score, new.score)}")
    if old.latency and new.latency:
        parts.append(f"latency {units.percent_change(old.latency.median_ms, new.latency.median_ms)}")
    kept = sum(entry.status == "kept" for entry in record.passes)
    passes = f"{kept} of {len(record.passes)} passes kept" if record.passes else "No pass was run"
    return f"{passes}: {', '.join(parts)}."


def runtime_name(latency: Latency) -> str:
    """Write the runtime's own name and its threads."""
    return f"{_RUNTIMES.get(latency.runtime, latency.runtime)}, {thread_count(latency)}"


def thread_count(latency: Latency) -> str:
    """Write how many threads ran; 0 stands for as many as the runtime likes."""
    if latency.threads <= 0:
        return "all threads"
    return f"{latency.threads} thread{'' if latency.threads == 1 else 's'}"


def _number(
    label: str,
    before: float | None,
    after: float | None,
    write: Callable[[float | None], str],
    write_change: Callable[[float | None], str],
    *,
    estimated: bool = False,
    neutral: bool = False,
) -> Tile:
    if after is None:
        was = f"{write(before)} before" if before is not None else ""
        return Tile(label, "", was, estimated=estimated)
    if before is None:
        return Tile(label, write(after), note="the original was not measured", estimated=estimated)
    change = after - before
    text = (
        "unchanged"
        if change == 0
        else f"{units.percent_change(before, after)} ({write_change(change)})".removeprefix("– ")
    )
    trend: Trend = "same" if neutral or change == 0 else "better" if change < 0 else "worse"
    share = after / before if before > 0 else None
    return Tile(label, write(after), f"{write(before)} before", text, trend, share, estimated=estimated)


def _accuracy(before: Score | None, after: Score | None) -> Tile:
    if after is None:
        was = f"{units.score(before)} before" if before else ""
        return Tile("Accuracy", "", was)
    # Agreement with the original is no accuracy: nobody said that the original is right.
    label = f"Accuracy: {after.metric}" if after.labelled else f"Against the original: {after.metric}"
    samples = f"n = {after.samples:,}"
    sure = ", ".join(filter(None, (units.interval(after.interval, after.metric), samples)))
    if not after.interval:
        sure = f"no confidence interval, {samples}"
    if before is None or before.metric != after.metric or before.labelled != after.labelled:
        return Tile(label, units.score(after), note=f"{sure}; nothing to compare with")
    change = after.value - before.value
    text = units.points(before, after)
    trend: Trend = "better" if change > 0 else "worse"
    if change == 0 or not math.isfinite(change):
        text, trend = "unchanged" if change == 0 else text, "same"
    elif _within(before, after):
        assert after.interval is not None
        text, trend = f"{text}, within the {after.interval.level * 100:g}\u00a0% confidence interval", "same"
    return Tile(label, units.score(after), f"{units.score(before)} before", text, trend, note=sure)


def _within(before: Score, after: Score) -> bool:
    """Whether each value lies in the other's interval: a change that this many samples cannot tell from chance."""
    return (
        before.interval is not None
        and after.interval is not None
        and before.interval.low <= after.value <= before.interval.high
        and after.interval.low <= before.value <= after.interval.high
    )


def _latency(before: Latency | None, after: Latency | None) -> Tile:
    label = "Latency"
    if after is None:
        was = f"{units.milliseconds(before.median_ms)} before" if before else ""
        return Tile(label, "", was)
    label = f"Latency: {runtime_name(after)}"
    if before is None or (before.runtime, before.threads) != (after.runtime, after.threads):
        return _timed(label, after, None, "")
    return _timed(label, after, before, "before")


def _target(target: TargetEntry) -> Tile:
    if target.latency is None:
        where = f" on {target.where}" if target.where else ""
        return Tile(f"Latency on {target.name}", "", note=f"{target.status}{where}")
    label = f"Latency on {target.name}: {runtime_name(target.latency)}"
    return _timed(label, target.latency, target.reference_latency, "in ONNX Runtime")


def _timed(label: str, after: Latency, before: Latency | None, what: str) -> Tile:
    value = units.milliseconds(after.median_ms)
    spread = f"median; p10 to p90 {units.milliseconds(after.p10_ms)} to {units.milliseconds(after.p90_ms)}"
    if before is None:
        if after.ratio is None:
            return Tile(label, value, note=f"{spread}; nothing to compare with")
        text = f"{units.ratio(after.ratio)} the time of {after.baseline or 'the baseline'}"
        return Tile(label, value, "", text, "better" if after.ratio < 1 else "worse", after.ratio, note=spread)
    change = after.median_ms - before.median_ms
    times = units.ratio(after.ratio if after.ratio is not None else _quotient(before, after))
    relative = units.percent_change(before.median_ms, after.median_ms)
    text = f"{relative} ({'+' if change > 0 else ''}{units.milliseconds(change)}; {times})"
    trend: Trend = "better" if change < 0 else "worse"
    if abs(change) < max(before.p90_ms - before.p10_ms, after.p90_ms - after.p10_ms):
        text, trend = f"{text}, within the noise of the runs", "same"
    elif change == 0:
        text, trend = "unchanged", "same"
    was = f"{units.milliseconds(before.median_ms)} {what}"
    return Tile(label, value, was, text, trend, _quotient(before, after), note=spread)


def _quotient(before: Latency, after: Latency) -> float | None:
    return after.median_ms / before.median_ms if before.median_ms > 0 else None


def _signed(change: float | None) -> str:
    return ("+" if change and change > 0 else "") + units.estimate(change)
