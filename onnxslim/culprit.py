"""Keeping what is right of a lossless pass: the wrong rewrites among many are found by bisection and undone.

A pass that honours ``Context.limit`` and ``Context.skip`` makes its first n rewrites the same way every time. Where its
result fails the check, the number of rewrites at which the check begins to fail is searched in halves; the last one of
those is the culprit. It goes on the list of what must not be made, and the pass is tried again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from onnxslim.errors import reason_of
from onnxslim.model import Model
from onnxslim.passes import Change, Context, Outcome, Pass
from onnxslim.record import Check, UndoneEntry

__all__ = ["Checked", "run_checked"]

_MOST_CULPRITS = 8
# A pass may tidy up behind its last rewrite, so one more may come with others; many mean that it makes no fixed order.
_AT_ONCE = 3
# Where these fail, it is not for what one rewrite did to the outputs: the pass crashed, or nothing can be compared.
_NOBODYS_FAULT = frozenset({"runs", "feeds"})

Checker = Callable[[Model], list[Check]]


@dataclass(frozen=True)
class Checked:
    """What is left of a pass after its check.

    Attributes:
        model: the rewritten model, also where it does not hold; None where nothing was changed or the pass crashed.
        outcome: what the pass did.
        checks: of ``model``.
        undone: the rewrites that were found to be wrong and left out of ``model``, and what they broke.
    """

    model: Model | None
    outcome: Outcome
    checks: list[Check] = field(default_factory=list)
    undone: list[UndoneEntry] = field(default_factory=list)

    @property
    def broken(self) -> Check | None:
        """The first check that did not hold."""
        return next((check for check in self.checks if not check.ok), None)

    @property
    def kept(self) -> bool:
        """Whether ``model`` is the result to go on with."""
        return self.model is not None and self.broken is None


def run_checked(pass_: Pass, model: Model, context: Context, check: Checker) -> Checked:
    """Run a pass on a copy of a model and check the result; undo single rewrites where it fails.

    Args:
        pass_: bisected where it promises to be lossless; what is wrong with a lossy pass is not one rewrite.
        model: left as it is.
        context: its ``limit`` is not to be set.
        check: whether a rewritten model holds; called once if it does, some ten times for each culprit if not.

    Returns:
        The pass's result without its wrong rewrites. The whole result with the check that does not hold, where the
        pass does not honour ``limit`` and ``skip``, more than eight rewrites are wrong, or no rewrite is to blame.
    """
    whole = _attempt(pass_, model, context, check)
    found = whole
    undone: list[UndoneEntry] = []
    while pass_.lossless and found.broken is not None and len(undone) < _MOST_CULPRITS:
        culprits = _find(pass_, model, context, check, found)
        if not culprits:
            break
        undone += culprits
        context = replace(context, skip=context.skip | {(culprit.rule, culprit.node) for culprit in culprits})
        found = _attempt(pass_, model, context, check)
        if any((change.rule, change.node) in context.skip for change in found.outcome.changes):
            break  # the pass does not honour ``skip``
    return whole if found.broken is not None else replace(found, undone=undone)


def _attempt(pass_: Pass, model: Model, context: Context, check: Checker) -> Checked:
    """Run and check a pass under one context. A pass that fails half-way fails its check."""
    candidate = model.copy()
    try:
        outcome = pass_.run(candidate, context)
    except Exception as error:  # whatever a bug in a pass raises costs that pass only; the check names it
        outcome = Outcome([Change(pass_.name, "the model", "failed half-way")])
        return Checked(None, outcome, [Check(name="runs", ok=False, detail=reason_of(error))])
    if not outcome.modified:
        return Checked(None, outcome)
    try:
        checks = check(candidate)
    except Exception as error:  # a result on which the guard itself fails cannot be vouched for
        checks = [Check(name="runs", ok=False, detail=f"its result fails: {reason_of(error)}")]
    return Checked(candidate, outcome, checks)


def _find(pass_: Pass, model: Model, context: Context, check: Checker, failing: Checked) -> list[UndoneEntry]:
    """The rewrite with which the check begins to fail; nothing where the pass cannot be stopped before it."""
    if failing.broken is None or failing.broken.name in _NOBODYS_FAULT:
        return []
    whole = len(failing.outcome.changes)
    holds, fails = 0, whole
    last, before = failing, _attempt(pass_, model, replace(context, limit=0), check)
    if len(before.outcome.changes) >= whole:
        return []  # it does not honour ``limit``
    if before.broken is not None:  # what it does whatever the limit is, such as to clean up
        last, before, fails = before, Checked(None, Outcome()), 0
    while fails - holds > 1:
        middle = (holds + fails) // 2
        tried = _attempt(pass_, model, replace(context, limit=middle), check)
        if tried.broken is None:
            holds, before = middle, tried
        else:
            fails, last = middle, tried
    broken = last.broken
    assert broken is not None
    known = {(change.rule, change.node) for change in before.outcome.changes}
    new = dict.fromkeys((change.rule, change.node) for change in last.outcome.changes)
    culprits = [place for place in new if place not in known]
    if broken.name in _NOBODYS_FAULT or len(culprits) > _AT_ONCE:
        return []
    return [UndoneEntry(rule=rule, node=node, why=broken.detail) for rule, node in culprits]
