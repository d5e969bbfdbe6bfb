"""The contract of a pass: what it is given, what it may change, what it must say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict

from onnxslim.stages import Draft, content_key

if TYPE_CHECKING:
    from onnxslim.data import Dataset
    from onnxslim.model import Model

__all__ = ["Change", "Context", "Outcome", "Pass", "Refusal"]


@dataclass(frozen=True)
class Change:
    """One rewrite that was made: the rule, the node (or tensor) it was made at, and one sentence on what it did."""

    rule: str
    node: str
    what: str


@dataclass(frozen=True)
class Refusal:
    """One place that a pass looked at and left alone: the rule, the node (or tensor), and one sentence on why."""

    rule: str
    node: str
    why: str


@dataclass
class Outcome:
    """What a pass did to a model.

    Attributes:
        changes: every rewrite made. An empty list means that the model is as it was.
        refusals: what it declined, with reasons. A pass that changes nothing must give at least one.
        numbers: figures for the report, such as ``{"channels removed": 312}``.
        plan: what was decided, as JSON holds it, for passes that can do it again from that alone.
    """

    changes: list[Change] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    numbers: dict[str, float] = field(default_factory=dict)
    plan: dict[str, Any] | None = None

    @property
    def modified(self) -> bool:
        """Whether the model differs from what the pass was given."""
        return bool(self.changes)

    def change(self, rule: str, node: str, what: str) -> None:
        """Note a rewrite that was made."""
        self.changes.append(Change(rule, node, what))

    def refuse(self, rule: str, node: str, why: str) -> None:
        """Note a place that was left alone, and why."""
        self.refusals.append(Refusal(rule, node, why))


def _silent(done: int, total: int) -> None:
    """Report progress to nobody."""


@dataclass
class Context:
    """What a pass may use beside the model.

    Attributes:
        calibration: unlabelled feeds; re-iterable, streamed. None when the user gave no data.
        teacher: the original model, before any pass. Lossy passes recover towards its activations.
        shapes: sizes that the user gave for dynamic inputs, by input name.
        skip: rewrites that must not be made, as (rule, node) of the :class:`Change` that each would be.
        skip_rules: rules that must not be applied at all; of those that the pass names in :meth:`Pass.rules`.
        limit: make at most this many rewrites, in the order of ``Outcome.changes``; None for all. With ``skip``, this
            is how a wrong rewrite among many is found: a pass that honours both makes its first ``limit`` rewrites the
            same way every time.
        seed: seeds ``rng``; the same recipe gives the same model.
        progress: called as ``progress(done, total)`` during long work.
        drafts: the folder of what this pass found in the same model with the same data before it was interrupted, or
            tried stronger; None where nothing is kept.
    """

    calibration: Dataset | None = None
    teacher: Model | None = None
    shapes: dict[str, list[int]] = field(default_factory=dict)
    skip: frozenset[tuple[str, str]] = frozenset()
    skip_rules: frozenset[str] = frozenset()
    limit: int | None = None
    seed: int = 0
    progress: Callable[[int, int], None] = _silent
    drafts: Path | None = None

    def draft(self, **parts: object) -> Draft | None:
        """The draft of what depends on the model, the data and these parts; None where nothing is kept."""
        return None if self.drafts is None else Draft(self.drafts / f"{content_key(**parts)}.npz")

    def allows(self, rule: str, node: str) -> bool:
        """Whether a rule may be applied at a node, going by ``skip`` and ``skip_rules``."""
        return rule not in self.skip_rules and (rule, node) not in self.skip

    @property
    def rng(self) -> np.random.Generator:
        """A fresh generator in the state that ``seed`` gives."""
        return np.random.default_rng(self.seed)


class Pass(BaseModel):
    """One rewrite of a model; subclasses are frozen records of their options.

    The typed fields are at once the recipe keys, the command-line help and the documentation, so each carries a
    ``Field(description=...)`` and its legal range. The class docstring says what the pass does, when it is right, what
    it costs and where its mathematics comes from; its first line is what ``onnxslim passes`` shows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    lossless: ClassVar[bool]
    needs_calibration: ClassVar[bool] = False

    def run(self, model: Model, context: Context) -> Outcome:
        """Rewrite ``model`` in place and say what was done.

        A pass never prints, never writes files but drafts, and never sees labels. When it raises, or its result does
        not pass the guard, the runner throws the model away and goes on with the one from before.
        """
        raise NotImplementedError

    def rules(self) -> tuple[str, ...]:
        """The names that ``Context.skip_rules`` may hold for this pass; none where it can leave no rule out."""
        return ()

    def weaker(self, outcome: Outcome) -> Pass | None:
        """The same pass with less effect, tried when this one breaks its accuracy budget; None when there is none.

        Args:
            outcome: what this one did.
        """
        return None

    @property
    def foreign(self) -> bool:
        """Whether what this pass writes is for other kernels than this processor's, whose results say little of it."""
        return False

    @property
    def wants_calibration(self) -> bool:
        """Whether this pass, with these options, cannot do without calibration data."""
        return self.needs_calibration

    @property
    def files(self) -> tuple[Path, ...]:
        """What is read beside the model, as options say: the result depends on it."""
        return ()

    def options(self) -> dict[str, Any]:
        """Every option with its value, defaults included, as a recipe would hold it."""
        return self.model_dump(mode="json")
