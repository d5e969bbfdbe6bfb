"""What a rewrite rule is, and the loop that applies rules from a worklist until none fires."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import onnx_graphsurgeon as gs

from onnxslim.graph.purity import is_standard
from onnxslim.passes._rewriter import Rewriter, has_plain_attributes
from onnxslim.passes.base import Context, Outcome

__all__ = ["Background", "Ledger", "Refused", "Rule", "apply_rules", "label", "rule"]


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


class Ledger:
    """Notes what is rewritten and what is declined, and stops at the limit that the context sets.

    Attributes:
        outcome: where it is noted.
        made: how many rewrites were made.
    """

    def __init__(self, outcome: Outcome, context: Context) -> None:
        self.outcome = outcome
        self._context = context
        self._left = context.limit
        self.made = 0
        self._refused: dict[tuple[str, int], tuple[gs.Node, str]] = {}

    @property
    def spent(self) -> bool:
        """Whether as many rewrites were made as the context allows."""
        return self._left is not None and self._left <= 0

    def allows(self, rule: str, node: str) -> bool:
        """Whether a rewrite may be made."""
        return not self.spent and self._context.allows(rule, node)

    def change(self, rule: str, node: str, what: str) -> None:
        """Note a rewrite."""
        self.outcome.change(rule, node, what)
        self.made += 1
        if self._left is not None:
            self._left -= 1

    def refuse(self, rule: str, node: gs.Node, why: str) -> None:
        """Note that a rule left a node alone."""
        self._refused[rule, id(node)] = (node, why)

    def retract(self, rule: str, node: gs.Node) -> None:
        """Forget that a rule left a node alone."""
        self._refused.pop((rule, id(node)), None)

    def close(self, rewriter: Rewriter) -> None:
        """Write down what was declined at nodes that are still there."""
        for (rule, _), (node, why) in self._refused.items():
            if rewriter.is_alive(node):
                self.outcome.refuse(rule, label(node), why)


class Background(Protocol):
    """Work that is done for many nodes at a time, whenever the worklist is empty."""

    def consider(self, node: gs.Node) -> bool:
        """Look at a node at which no rule fired; whether something was changed."""
        ...

    def flush(self) -> bool:
        """Do the work; whether something was changed."""
        ...


def apply_rules(rewriter: Rewriter, rules: Iterable[Rule], ledger: Ledger, folding: Background | None = None) -> None:
    """Apply rules from the worklist until none fires; whatever a rewrite touches is looked at again.

    Each node is also dropped as soon as nothing reads it, and constants are folded together once nothing else is left
    to do.
    """
    by_op: dict[str, list[Rule]] = {}
    general: list[Rule] = []
    for each in rules:
        if not each.ops:
            general.append(each)
        for op in each.ops:
            by_op.setdefault(op, []).append(each)
    swept = -1
    while swept != ledger.made:  # what was changed since all nodes were looked at may matter far away
        swept = ledger.made
        for node in rewriter.nodes():
            rewriter.wake(node)
        _drain(rewriter, by_op, general, ledger, folding)


def _drain(
    rewriter: Rewriter,
    by_op: dict[str, list[Rule]],
    general: list[Rule],
    ledger: Ledger,
    folding: Background | None,
) -> None:
    """Work the worklist off, and what comes up when it is empty."""
    while True:
        for node in rewriter.awake():
            if ledger.spent:
                return
            name, op = label(node), node.op
            if ledger.allows("dead-node", name) and rewriter.remove_if_dead(node):
                ledger.change("dead-node", name, f"removed {op}, which nothing reads")
                continue
            specific = is_standard(node) and has_plain_attributes(node)
            candidates = [*by_op.get(op, ()), *general] if specific else general
            if not _rewrite(rewriter, node, name, candidates, ledger) and folding is not None:
                folding.consider(node)
        if (folding is None or not folding.flush()) and not rewriter.refine():
            return


def _rewrite(rewriter: Rewriter, node: gs.Node, name: str, rules: Iterable[Rule], ledger: Ledger) -> bool:
    """Apply the first rule that fires at a node."""
    opset = rewriter.opset(node)
    for each in rules:
        if opset < each.since or (each.until is not None and opset > each.until) or not ledger.allows(each.name, name):
            continue
        result = each.apply(rewriter, node)
        if isinstance(result, Refused):
            ledger.refuse(each.name, node, result.why)
        elif result is not None:
            ledger.retract(each.name, node)
            ledger.change(each.name, name, result)
            rewriter.wake(node)
            return True
    return False
