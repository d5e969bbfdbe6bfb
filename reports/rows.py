"""The record arranged for reading: what is compared, grouped, sorted and cut to a length that a page bears."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from onnxslim.record import LayerError, LayerSize, NodeChanges, Record, Rewritten, TargetEntry
from onnxslim.reports import units

__all__ = [
    "Group",
    "LayerRow",
    "OpRow",
    "difference_groups",
    "group_limit",
    "groups",
    "layer_rows",
    "missing_values",
    "op_rows",
    "target_ratio",
    "worst_errors",
]

EXAMPLES = 3
_MOST_PER_GROUP = 200
_MOST_GROUPS = 20
_LINES = 800


@dataclass(frozen=True)
class Group:
    """Changes of one rule, or refusals for one reason.

    Attributes:
        title: the rule or the reason.
        total: how many there are in the record.
        examples: the first few, as (name, what was done) pairs.
        rest: those after the examples, up to the report's limit.
    """

    title: str
    total: int
    examples: list[tuple[str, str]]
    rest: list[tuple[str, str]]

    @property
    def hidden(self) -> int:
        """How many are in record.json only."""
        return self.total - len(self.examples) - len(self.rest)


@dataclass(frozen=True)
class LayerRow:
    """One layer before and after; the sizes are None on the side where it does not exist."""

    name: str
    op: str
    bytes_before: int | None
    bytes_after: int | None
    parameters_before: int | None
    parameters_after: int | None
    macs_before: int | None
    macs_after: int | None

    @property
    def change(self) -> str:
        """The relative change in bytes, or in words where one side is missing."""
        if self.bytes_before is None:
            return "new"
        if self.bytes_after is None:
            return "gone"
        return units.percent_change(self.bytes_before, self.bytes_after)


@dataclass(frozen=True)
class OpRow:
    """How many nodes of one op there are before and after."""

    op: str
    before: int
    after: int


def group_limit(record: Record) -> int:
    """How many lines each group of changes or refusals may show, so that the whole report stays readable and small."""
    heads = 0
    for entry in record.passes:
        heads += min(_MOST_GROUPS, len({item.get("rule", "") for item in entry.changes}))
        heads += min(_MOST_GROUPS, len({item.get("why", "") for item in entry.refusals}))
    if record.difference is not None:
        heads += min(_MOST_GROUPS, len(record.difference.rewritten)) + min(_MOST_GROUPS, len(record.difference.changed))
    return max(EXAMPLES, min(_MOST_PER_GROUP, _LINES // max(heads, 1)))


def groups(items: Iterable[dict[str, str]], key: str, columns: tuple[str, str], limit: int) -> tuple[list[Group], int]:
    """Group changes by rule, or refusals by reason; the most frequent first, then in order of appearance.

    Returns:
        The groups, and how many more there are in record.json only.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for item in items:
        found.setdefault(item.get(key, ""), []).append((item.get(columns[0], ""), item.get(columns[1], "")))
    ranked = sorted(found.items(), key=lambda pair: -len(pair[1]))
    shown = [
        Group(title, len(lines), lines[:EXAMPLES], lines[EXAMPLES:limit]) for title, lines in ranked[:_MOST_GROUPS]
    ]
    return shown, len(ranked) - len(shown)


def difference_groups(found: Sequence[Rewritten] | Sequence[NodeChanges], limit: int) -> tuple[list[Group], int]:
    """Pieces of two graphs that differ alike, each with the first places.

    Returns:
        The groups, and how many more there are in record.json only.
    """
    shown = []
    for entry in found[:_MOST_GROUPS]:
        title = entry.sentence if isinstance(entry, Rewritten) else f"{entry.op}: {entry.what}"
        lines = [(_names(place.before), _names(place.after)) for place in entry.places[:limit]]
        shown.append(Group(title, len(entry.places), lines[:EXAMPLES], lines[EXAMPLES:]))
    return shown, len(found) - len(shown)


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - EXAMPLES} more" if len(names) > EXAMPLES else ""
    return ", ".join(units.shorten(name, 60) for name in names[:EXAMPLES]) + more or "nothing"


def layer_rows(before: Sequence[LayerSize], after: Sequence[LayerSize]) -> list[LayerRow]:
    """Pair the layers of two models by name (and by order where names repeat); the largest first."""
    old, new = _keyed(before), _keyed(after)
    rows = []
    for key in dict.fromkeys([*old, *new]):
        one, two = old.get(key), new.get(key)
        either = two or one
        assert either is not None
        op = f"{one.op} → {two.op}" if one and two and one.op != two.op else either.op
        rows.append(
            LayerRow(
                name=either.name or "(unnamed)",
                op=op,
                bytes_before=one.bytes if one else None,
                bytes_after=two.bytes if two else None,
                parameters_before=one.parameters if one else None,
                parameters_after=two.parameters if two else None,
                macs_before=one.macs if one else None,
                macs_after=two.macs if two else None,
            )
        )
    return sorted(rows, key=lambda row: -max(row.bytes_before or 0, row.bytes_after or 0))


def op_rows(before: dict[str, int], after: dict[str, int]) -> list[OpRow]:
    """Pair the op counts of two models; the most frequent first."""
    rows = [OpRow(op, before.get(op, 0), after.get(op, 0)) for op in {**before, **after}]
    return sorted(rows, key=lambda row: (-max(row.before, row.after), row.op))


def worst_errors(errors: Sequence[LayerError], most: int = 5) -> list[LayerError]:
    """Pick the tensors furthest from the original; those equal to it are never among them."""
    measured = [entry for entry in errors if entry.sqnr_db is not None and not math.isnan(entry.sqnr_db)]
    return sorted(measured, key=lambda entry: entry.sqnr_db or 0.0)[:most]


def missing_values(record: Record) -> list[str]:
    """Name what the record has a place for and no value in, beside what ``record.not_measured`` explains."""
    missing = []
    pairs = (
        ("accuracy", record.before.score, record.after.score),
        ("latency in ONNX Runtime", record.before.latency, record.after.latency),
        ("peak memory", record.before.peak_memory_bytes, record.after.peak_memory_bytes),
        ("MACs", record.before.macs, record.after.macs),
    )
    for name, old, new in pairs:
        if old is None or new is None:
            sides = "" if old is None and new is None else " of the original" if old is None else " of the result"
            missing.append(name + sides)
    missing.extend(f"latency on {target.name} ({target.status})" for target in record.targets if not target.latency)
    if not record.layer_errors:
        missing.append("error of each layer")
    missing.extend(f"goal {goal.name}" for goal in record.goals if goal.met is None)
    explained = "\n".join(record.not_measured).casefold()
    return [name for name in missing if name.partition(" (")[0].casefold() not in explained]


def target_ratio(target: TargetEntry) -> float | None:
    """The target's median time over the baseline's, as recorded or from the two medians; below 1 is faster."""
    if target.latency is None:
        return None
    if target.latency.ratio is not None:
        return target.latency.ratio
    reference = target.reference_latency
    return target.latency.median_ms / reference.median_ms if reference and reference.median_ms > 0 else None


def _keyed(layers: Sequence[LayerSize]) -> dict[tuple[str, str, int], LayerSize]:
    seen: Counter[tuple[str, str]] = Counter()
    keyed = {}
    for layer in layers:
        # Unnamed layers pair up with those of the same op only.
        base = (layer.name, "" if layer.name else layer.op)
        keyed[(*base, seen[base])] = layer
        seen[base] += 1
    return keyed
