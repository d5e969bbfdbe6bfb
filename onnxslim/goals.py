"""Goals against what was measured: the verdict."""

from __future__ import annotations

from typing import Literal

from onnxslim.metrics import drop
from onnxslim.recipe import Goals, TargetOptions
from onnxslim.record import GoalEntry, Latency, Score, Snapshot, TargetEntry
from onnxslim.units import human_bytes

__all__ = ["EXIT_CODES", "judge", "summarize", "verdict"]

Verdict = Literal["met", "not met", "no goals"]

EXIT_CODES: dict[Verdict, int] = {"met": 0, "no goals": 0, "not met": 1}
"""The exit code of ``onnxslim optimize`` for each verdict; 2 is bad input."""


def judge(
    goals: Goals, wanted_targets: list[TargetOptions], before: Snapshot, after: Snapshot, targets: list[TargetEntry]
) -> list[GoalEntry]:
    """Compare every goal with what was measured. What could not be measured is not met."""
    entries: list[GoalEntry] = []
    if goals.max_accuracy_drop is not None:
        entries.append(_accuracy_drop(goals.max_accuracy_drop, before.score, after.score))
    if goals.min_accuracy is not None:
        score = after.score
        entries.append(
            GoalEntry(
                name="accuracy",
                wanted=f"at least {goals.min_accuracy:g}",
                achieved="not measured" if score is None else f"{score.value:.4g}",
                met=None if score is None else score.value >= goals.min_accuracy,
                detail="there is no evaluation data"
                if score is None
                else f"{_margin(score.value - goals.min_accuracy, '.4g', short='short')}; {score.metric}",
            )
        )
    if goals.max_size is not None:
        entries.append(
            GoalEntry(
                name="size",
                wanted=f"at most {human_bytes(goals.max_size)}",
                achieved=f"{after.size_bytes:,} bytes",
                met=after.size_bytes <= goals.max_size,
                detail=f"{_margin(goals.max_size - after.size_bytes, ',d', ' bytes')}; external data included",
            )
        )
    if goals.min_compression is not None:
        ratio = before.size_bytes / after.size_bytes
        entries.append(
            GoalEntry(
                name="compression",
                wanted=f"at least {goals.min_compression:g} times smaller",
                achieved=f"{ratio:.2f} times smaller",
                met=ratio >= goals.min_compression,
                detail=f"{_margin(ratio - goals.min_compression, '.2f', short='short')}; model file before over after",
            )
        )
    if goals.max_latency is not None:
        entries.append(_latency("latency", goals.max_latency, after.latency, "in ONNX Runtime on this machine"))
    by_name = {entry.name: entry for entry in targets}
    for target in wanted_targets:
        if target.max_latency is not None:
            entry = by_name.get(target.name)
            why = "it was not compiled" if entry is None else entry.reason or entry.status
            entries.append(
                _latency(f"latency on {target.name}", target.max_latency, entry.latency if entry else None, why)
            )
    return entries


def _accuracy_drop(wanted: float, before: Score | None, after: Score | None) -> GoalEntry:
    lost = None if before is None or after is None else drop(before, after)
    return GoalEntry(
        name="accuracy drop",
        wanted=f"at most {wanted:g}",
        achieved="not measured" if lost is None else f"{lost:.4g}",
        # A score is a count over samples: 0.95 - 0.94 must not miss 0.01 by the last bit of a float.
        met=None if lost is None else lost <= wanted + 1e-9,
        detail="there is no data to measure it on"
        if after is None or lost is None
        else f"{_margin(wanted - lost, '.4g')}; {after.metric} over {after.samples} samples, "
        + ("labelled" if after.labelled else "against the original"),
    )


def _latency(name: str, wanted: float, latency: Latency | None, detail: str) -> GoalEntry:
    return GoalEntry(
        name=name,
        wanted=f"at most {wanted:g} ms",
        achieved="not measured" if latency is None else f"{latency.median_ms:.3g} ms",
        met=None if latency is None else latency.median_ms <= wanted,
        detail=detail
        if latency is None
        else f"{_margin(wanted - latency.median_ms, '.3g', ' ms')}; median, {latency.runtime}, "
        f"{latency.threads} thread(s)",
    )


def _margin(spare: float, form: str, unit: str = "", short: str = "too much") -> str:
    """How far inside or outside of a goal the result is."""
    return f"{spare:{form}}{unit} to spare" if spare >= 0 else f"{-spare:{form}}{unit} {short}"


def verdict(goals: list[GoalEntry]) -> Verdict:
    """Met when every goal is; a goal that could not be measured is not met."""
    if not goals:
        return "no goals"
    return "met" if all(goal.met for goal in goals) else "not met"


def summarize(before: Snapshot, after: Snapshot, goals: list[GoalEntry], targets: list[TargetEntry]) -> str:
    """One sentence for the top of the report and the end of the command."""
    ratio = before.size_bytes / after.size_bytes
    sizes = f"{human_bytes(before.size_bytes)} to {human_bytes(after.size_bytes)}"
    parts = [f"{ratio:.2f} times smaller ({sizes})"]
    if before.score is not None and after.score is not None:
        parts.append(f"{after.score.metric} {before.score.value:.4g} to {after.score.value:.4g}")
    if after.latency is not None and after.latency.ratio is not None:
        parts.append(f"{after.latency.ratio:.2f} of the original's time in ONNX Runtime")
    failed = [entry.name for entry in targets if entry.status in ("failed", "unsupported")]
    if failed:
        parts.append(f"not compiled for {', '.join(failed)}")
    missed = [goal.name for goal in goals if not goal.met]
    lead = f"Missed: {', '.join(missed)}. " if missed else ""
    return lead + "; ".join(parts) + "."
