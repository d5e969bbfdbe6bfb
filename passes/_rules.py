"""What a rewrite rule is, and the loop that applies rules until none fires."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnxslim.graph.purity import is_standard
from onnxslim.passes._rewriter import Rewriter, has_plain_attributes
from onnxslim.passes.base import Outcome

__all__ = ["Refused", "Rule", "apply_rules", "label", "rule"]

# A report that names more places than this for one reason is not read.
_MOST_REFUSALS = 20


@dataclass(frozen=True)
class Refused:
    """A rule matched but may not fire; why, in one sentence."""

    why: str


@dataclass(frozen=True)
class Rule:
    """One rewrite: matches a node, checks, and only then edits.

    Attributes:
        name: how the report calls it.
        ops: operators of the default domain at which it matches; empty for a rule that looks at every node, those of
            other domains and those with attributes that depend on arguments of a function included.
        since: first opset for which it is right.
        apply: returns what it did, a :class:`Refused`, or None where it does not match. It edits nothing unless it
            returns what it did.
        until: last opset for which it is right; None where it holds for every later one.
    """

    name: str
    ops: frozenset[str]
    since: int
    apply: Callable[[Rewriter, gs.Node], str | Refused | None]
    until: int | None = None


def rule(
    name: str, *ops: str, since: int = 1, until: int | None = None
) -> Callable[[Callable[[Rewriter, gs.Node], str | Refused | None]], Rule]:
    """Make a rule of a function; see :class:`Rule`."""
    return lambda apply: Rule(name, frozenset(ops), since, apply, until)


def label(node: gs.Node) -> str:
    """What to call a node in a report: its name, or the tensor that it makes."""
    if node.name:
        return str(node.name)
    return f"{node.op} -> {node.outputs[0].name}" if node.outputs else str(node.op)


def apply_rules(rewriter: Rewriter, rules: Iterable[Rule], outcome: Outcome) -> None:
    """Apply rules from the worklist until none fires; whatever a rewrite touches is looked at again.

    Each node is also dropped as soon as nothing reads it.
    """
    by_op: dict[str, list[Rule]] = {}
    general: list[Rule] = []
    for each in rules:
        if not each.ops:
            general.append(each)
        for op in each.ops:
            by_op.setdefault(op, []).append(each)
    refused: dict[tuple[str, int], tuple[gs.Node, str]] = {}
    for node in rewriter.nodes():
        rewriter.wake(node)
    for node in rewriter.awake():
        name = label(node)
        if rewriter.remove_if_dead(node):
            outcome.change("dead-node", name, f"removed {node.op}, which nothing reads")
            continue
        specific = is_standard(node) and has_plain_attributes(node)
        opset = rewriter.opset(node)
        for each in [*by_op.get(node.op, ()), *general] if specific else general:
            if opset < each.since or (each.until is not None and opset > each.until):
                continue
            result = each.apply(rewriter, node)
            if isinstance(result, Refused):
                refused[each.name, id(node)] = (node, result.why)
            elif result is not None:
                refused.pop((each.name, id(node)), None)
                outcome.change(each.name, name, result)
                rewriter.wake(node)
                break
    _report(refused, rewriter, outcome)


def _report(refused: dict[tuple[str, int], tuple[gs.Node, str]], rewriter: Rewriter, outcome: Outcome) -> None:
    counts: dict[str, int] = {}
    for (name, _), (node, why) in refused.items():
        if not rewriter.is_alive(node):
            continue
        counts[name] = counts.get(name, 0) + 1
        if counts[name] <= _MOST_REFUSALS:
            outcome.refuse(name, label(node), why)
    for name, count in counts.items():
        if count > _MOST_REFUSALS:
            outcome.refuse(name, f"{count - _MOST_REFUSALS} more nodes", "as above")
