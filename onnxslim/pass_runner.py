"""Applying one pass: on a copy, guarded, scored as the file that it wrote, tried weaker, undone if it does not hold."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

from onnxslim.culprit import Checked, run_checked
from onnxslim.data import Dataset
from onnxslim.errors import OutputError, reason_of
from onnxslim.graph.cost import node_count, parameter_count
from onnxslim.guard import check_lossless, check_runs
from onnxslim.metrics import Metric, drop, evaluate
from onnxslim.model import Model, load
from onnxslim.model_files import file_sha256, size_on_disk
from onnxslim.passes import Context, Outcome, Pass
from onnxslim.record import Check, PassEntry, Score, UndoneEntry
from onnxslim.runtime import Session
from onnxslim.stages import StageCache, content_key

__all__ = ["DEFAULT_BUDGET", "PassRunner", "Stage"]

DEFAULT_BUDGET = 0.01
"""Loss against the original, in the metric's unit, above which a lossy pass is undone when the goals name none."""

_ATTEMPTS = 5


@dataclass(frozen=True)
class Stage:
    """A model between two passes: in memory, on disk, and scored; ``key`` hashes all that it came from.

    ``foreign``: it has int8 for kernels that this processor lacks, and is scored as it is written, in float.
    """

    model: Model
    path: Path
    score: Score | None
    key: str
    foreign: bool = False


@dataclass(frozen=True)
class _Finding:
    """What the guard and the score say of one attempt."""

    status: Literal["kept", "rolled back", "no change", "failed"]
    reason: str
    checks: list[Check] = field(default_factory=list)
    score: Score | None = None


class PassRunner:
    """Applies passes to stages, and keeps what came of each by content hash.

    Attributes:
        cache: where stages are kept.
        original: the model before any pass: the teacher of lossy passes, the reference of scores.
        session: that model in ONNX Runtime.
        calibration: unlabelled data for passes.
        scored: data for the score; None where there is none.
        metric: what the score is; None where there is no data.
        budget: loss against the original above which a lossy pass is undone; None for :data:`DEFAULT_BUDGET`.
        shapes: sizes that the user gave for dynamic inputs.
        seed: of whatever is random.
        progress: called as ``progress(what, done, total)``.
        warnings: what went wrong without costing the run.
    """

    def __init__(
        self,
        cache: StageCache,
        original: Model,
        session: Session,
        *,
        calibration: Dataset | None,
        scored: Dataset | None,
        metric: Metric | None,
        budget: float | None,
        shapes: dict[str, list[int]],
        seed: int,
        progress: Callable[[str, int, int], None],
    ) -> None:
        self.cache = cache
        self.original = original
        self.session = session
        self.calibration = calibration
        self.scored = scored
        self.metric = metric
        self.budget = DEFAULT_BUDGET if budget is None else budget
        self.shapes = shapes
        self.seed = seed
        self.progress = progress
        self.warnings: list[str] = []
        self.original_score: Score | None = None

    def first(self, path: Path, key: str) -> Stage:
        """Score the original, which lies in ``path``, and return the stage before any pass."""
        self.progress("scoring the original", 0, 0)
        self.original_score = self._score(path, key)
        return Stage(self.original, path, self.original_score, key)

    def apply(self, stage: Stage, pass_: Pass) -> tuple[Stage, PassEntry]:
        """Apply one pass and return the stage after it: the new model, or the old one where the new does not hold."""
        files = [hashlib.sha256(path.read_bytes()).hexdigest() for path in pass_.files]
        key = content_key(stage=stage.key, **{"pass": pass_.name, "options": pass_.options(), "files": files})
        unchanged = replace(stage, key=key)
        foreign = stage.foreign or pass_.foreign
        cached = self.cache.get(key, PassEntry)
        if cached is not None:
            entry, folder = cached
            entry = entry.model_copy(update={"cached": True})
            path = folder / "model.onnx"
            if entry.status != "kept":
                return unchanged, entry
            if path.is_file():
                return Stage(load(path), path, entry.score_after, key, foreign), entry
        with self.cache.workspace() as workspace:
            entry = self._try(stage, pass_, workspace / "model.onnx")
            if entry.status == "failed":  # perhaps for a reason outside of the run: try again next time
                return unchanged, entry
            if entry.status != "kept":
                for left in workspace.glob("model.onnx*"):
                    left.unlink()
            folder = self.cache.put(key, entry, workspace)
        self.cache.forget(self._drafts(stage, pass_))
        if entry.status != "kept":
            return unchanged, entry
        path = folder / "model.onnx"
        return Stage(load(path), path, entry.score_after, key, foreign), entry

    def _drafts(self, stage: Stage, pass_: Pass) -> Path:
        return self.cache.drafts(content_key(stage=stage.key, **{"pass": pass_.name}))

    def _try(self, stage: Stage, pass_: Pass, path: Path) -> PassEntry:
        """Try a pass, weaker and weaker while it is out of budget."""
        attempt = pass_
        failed: list[str] = []
        made: set[str] = set()
        for attempts in range(1, _ATTEMPTS + 1):
            entry, outcome = self._attempt(stage, attempt, path)
            entry = entry.model_copy(update={"attempts": attempts})
            weaker = attempt.weaker(outcome)
            if entry.status != "rolled back" or attempt.lossless or weaker is None:
                break
            digest = file_sha256(path) if path.is_file() else ""
            if digest in made:  # what is weaker makes the same file: there is nothing left to weaken
                break
            made.add(digest)
            changed = [
                f"{name} = {value}" for name, value in attempt.options().items() if value != weaker.options()[name]
            ]
            failed.append(f"{', '.join(changed)}: {entry.reason}")
            attempt = weaker
        if failed:
            entry = entry.model_copy(update={"reason": f"{entry.reason}. Tried before: {'; '.join(failed)}"})
        return entry

    def _attempt(self, stage: Stage, pass_: Pass, path: Path) -> tuple[PassEntry, Outcome]:
        """Run a pass at one strength on a copy, write the result to ``path`` and judge that file."""
        started = time.perf_counter()

        def tick(done: int, total: int) -> None:
            self.progress(pass_.name, done, total)

        context = Context(
            calibration=self.calibration,
            teacher=self.original,
            shapes=self.shapes,
            seed=self.seed,
            progress=tick,
            drafts=self._drafts(stage, pass_),
        )
        outcome, result, finding, undone = self._make(stage, pass_, context, path)
        made = result is not None and finding.status in ("kept", "rolled back") and path.is_file()
        size = size_on_disk(stage.path)
        after = result if made and result is not None else stage.model
        entry = PassEntry(
            name=pass_.name,
            options=pass_.options(),
            lossless=pass_.lossless,
            status=finding.status,
            reason=finding.reason,
            seconds=time.perf_counter() - started,
            changes=[vars(change) for change in outcome.changes],
            refusals=[vars(refusal) for refusal in outcome.refusals],
            undone=undone,
            numbers={name: value for name, value in outcome.numbers.items() if math.isfinite(value)},
            plan=outcome.plan,
            checks=finding.checks,
            size_before=size,
            size_after=size_on_disk(path) if made else size,
            nodes_before=node_count(stage.model),
            nodes_after=node_count(after),
            parameters_before=parameter_count(stage.model),
            parameters_after=parameter_count(after),
            score_before=stage.score,
            score_after=finding.score,
        )
        return entry, outcome

    def _make(
        self, stage: Stage, pass_: Pass, context: Context, path: Path
    ) -> tuple[Outcome, Model | None, _Finding, list[UndoneEntry]]:
        """Run a pass on a copy, check or bisect it where it promises to be lossless, and save and judge the result."""
        found = run_checked(pass_, stage.model, context, partial(self._check, stage, pass_))
        if not found.outcome.modified:
            reason = found.outcome.refusals[0].why if found.outcome.refusals else "found nothing to do"
            return found.outcome, None, _Finding("no change", reason, score=stage.score), []
        if found.model is None:
            reason = found.broken.detail if found.broken else "nothing came of it"
            self.warnings.append(f"pass {pass_.name} failed and was left out: {reason}")
            return Outcome(), None, _Finding("failed", reason, score=stage.score), []
        self.warnings += [
            f"pass {pass_.name}: undone: {entry.rule} at {entry.node}, because {entry.why}" for entry in found.undone
        ]
        return found.outcome, found.model, self._save_and_judge(stage, pass_, found, path), found.undone

    def _check(self, stage: Stage, pass_: Pass, result: Model) -> list[Check]:
        """Guard what a pass made against the stage before it."""
        data = self.calibration or self.scored
        if pass_.lossless:
            return check_lossless(stage.model, result, dataset=data, shapes=self.shapes, seed=self.seed)
        return check_runs(result, data, before=stage.model, shapes=self.shapes, seed=self.seed)

    def _save_and_judge(self, stage: Stage, pass_: Pass, found: Checked, path: Path) -> _Finding:
        """Write what a pass made and judge the file; a result that cannot be written or scored does not hold."""
        assert found.model is not None
        try:
            found.model.save(path)
            return self._judge(stage, pass_, found, path)
        except OutputError:
            raise  # the disk is full, or the folder is gone: nothing that the pass did
        except Exception as error:
            return _Finding("rolled back", f"its result fails: {reason_of(error)}")

    def _judge(self, stage: Stage, pass_: Pass, found: Checked, path: Path) -> _Finding:
        """Go by the checks, and score the file against the original."""
        if found.broken is not None:
            return _Finding("rolled back", f"{found.broken.name}: {found.broken.detail}", found.checks)
        foreign = stage.foreign or pass_.foreign
        score = self._score(path, file_sha256(path) + stage.key, foreign=foreign)
        if pass_.lossless or score is None or self.original_score is None:
            wrong = f"; {len(found.undone)} rewrites undone that did change them" if found.undone else ""
            return _Finding("kept", f"the outputs are as they were{wrong}", found.checks, score)
        lost = drop(self.original_score, score)
        side = "below" if lost >= 0 else "above"
        reason = f"{score.metric} {score.value:.4g}, {abs(lost):.4g} {side} the original's; budget {self.budget:g}"
        if foreign:
            reason += "; computed in float as the file says, since the int8 kernels of this processor saturate"
        # A score is a count over samples: 0.95 - 0.94 must not miss 0.01 by the last bit of a float.
        return _Finding("kept" if lost <= self.budget + 1e-9 else "rolled back", reason, found.checks, score)

    def _score(self, path: Path, key: str, *, foreign: bool = False) -> Score | None:
        """Score a model file, or take the score that an earlier run gave the same file on the same data."""
        if self.scored is None or self.metric is None:
            return None
        score_key = content_key(score=key, foreign=foreign)
        cached = self.cache.get(score_key, Score)
        if cached is not None:
            return cached[0]

        def tick(done: int, total: int) -> None:
            self.progress("scoring", done, total)

        runner = Session(path, optimize=False) if foreign else path
        score = evaluate(runner, self.scored, self.metric, reference=self.session, progress=tick)
        with self.cache.workspace() as workspace:
            self.cache.put(score_key, score, workspace)
        return score
