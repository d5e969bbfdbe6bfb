"""The main job: a recipe becomes passes, guards, targets, measurements, a record and a report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from pydantic import BaseModel

import onnxslim
from onnxslim.data import Dataset
from onnxslim.errors import OutputError, RecipeError, SlimError, TargetError, reason_of
from onnxslim.goals import judge, summarize, verdict
from onnxslim.graph.difference import graph_difference
from onnxslim.guard import layer_errors
from onnxslim.inputs import Inputs, open_inputs
from onnxslim.measure import shapes_of, snapshot, time_pair
from onnxslim.metrics import evaluate
from onnxslim.model import Model, atomic_write, load
from onnxslim.model_files import external_files, file_sha256
from onnxslim.pass_runner import PassRunner, Stage
from onnxslim.passes import Pass
from onnxslim.recipe import Goals, Lock, Recipe, make_recipe, write_lock
from onnxslim.record import DataEntry, LayerError, PassEntry, Record, Score, Snapshot, TargetEntry
from onnxslim.runtime import Feed, environment, peak_memory, usable_cores
from onnxslim.stages import StageCache, content_key, tool_fingerprint
from onnxslim.targets import Bundle, Target, find_target

__all__ = ["Progress", "Run", "optimize"]

_LATENCY_SECONDS = 10.0
_LAYER_ERROR_FEEDS = 8
_VERIFY_FEEDS = 8
_SCORE_SECONDS = 60
_SLOWER = 1.05  # below this a ratio of medians is noise

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, total)``; ``total`` is 0 where it is not known."""


def _silent(what: str, done: int, total: int) -> None:
    """Report progress to nobody."""


@dataclass
class Run:
    """What a run made.

    Attributes:
        folder: the output folder.
        record: everything that was measured and decided.
        model: the resulting model, as it lies in ``folder/model.onnx``.
    """

    folder: Path
    record: Record
    _model: Model | None = field(default=None, repr=False)

    @property
    def model(self) -> Model:
        """The resulting model."""
        if self._model is None:
            self._model = load(self.folder / "model.onnx")
        return self._model

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.folder / "report.html"


def optimize(
    model: str | Path | bytes | onnx.ModelProto | Model,
    recipe: Recipe | None = None,
    *,
    output: str | Path,
    passes: Iterable[Pass | str | dict[str, Any]] | None = None,
    targets: Iterable[str | dict[str, Any]] | None = None,
    calibration: str | Path | Iterable[Feed] | None = None,
    evaluation: str | Path | Iterable[Feed] | None = None,
    labels: np.ndarray | None = None,
    metric: str | Callable[..., Any] | None = None,
    goals: Goals | dict[str, Any] | None = None,
    shapes: dict[str, list[int]] | None = None,
    threads: int | None = None,
    seed: int | None = None,
    command: str = "onnxslim optimize recipe.lock.toml",
    progress: Progress = _silent,
) -> Run:
    """Run the main job: apply passes one by one, guard each, compile, measure, judge and report.

    Either a recipe says what to do, or the arguments do; an argument given beside a recipe replaces what that
    says. The folder ``output`` then holds ``model.onnx``, ``report.html``, ``record.json``,
    ``recipe.lock.toml`` and ``targets/<name>/``. An interrupted run resumes when it is started again.

    Args:
        model: a file, its bytes, a ModelProto or a loaded Model. Never modified.
        recipe: what to do.
        output: the folder to write to; created.
        passes: Pass objects, names, or tables as in a recipe. Default: fold-constants, simplify and, with calibration
            data, quantize-static.
        targets: names of targets, or tables as in a recipe.
        calibration: inputs without labels: a path, or feeds.
        evaluation: inputs for the score: a path, or feeds.
        labels: labels for ``evaluation`` where it is an iterable of feeds.
        metric: a metric by name, ``"module:function"``, or a function ``score(outputs, labels)``.
        goals: what the result has to reach.
        shapes: sizes for dynamic inputs.
        threads: threads for measuring latency; 0: one for each core.
        seed: seeds whatever is random.
        command: the command that reproduces the run, for the report.
        progress: called as ``progress(what, done, total)``.

    Raises:
        SlimError: the model, the data, the recipe or the output folder is unusable; nothing was written then.
    """
    asked = {
        "data": {
            "calibration": _source_name(calibration),
            "evaluation": _source_name(evaluation),
            "metric": metric if isinstance(metric, str) or metric is None else getattr(metric, "__name__", "function"),
        },
        "goals": goals.model_dump(exclude_none=True) if isinstance(goals, Goals) else goals or {},
        "pass": None if passes is None else [_pass_table(item) for item in passes],
        "target": None if targets is None else [_named(item) for item in targets],
        "shapes": shapes or {},
        "threads": threads,
        "seed": seed,
    }
    tables = recipe.tables() if recipe is not None else {"model": _source_name(model)}
    merged = make_recipe(_merge(tables, asked), "the arguments" if recipe is None else "the recipe with the arguments")
    if not merged.passes and passes is None:
        merged = merged.model_copy(update={"passes": _default_passes(merged)})
    inputs = open_inputs(
        model,
        merged,
        Path(output),
        calibration=calibration,
        evaluation=evaluation,
        labels=labels,
        score=metric if callable(metric) else None,
    )
    return _Job(inputs, Path(output), progress).run(command)


def _source_name(source: Any) -> str | None:
    if source is None:
        return None
    return str(source) if isinstance(source, (str, Path)) else "<memory>"


def _named(item: str | dict[str, Any]) -> dict[str, Any]:
    return {"name": item} if isinstance(item, str) else dict(item)


def _pass_table(item: Pass | str | dict[str, Any]) -> dict[str, Any]:
    return {"name": item.name, **item.options()} if isinstance(item, Pass) else _named(item)


def _merge(tables: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """Put what was asked for over what a recipe says: tables key by key, everything else whole."""
    merged = dict(tables)
    for key, value in asked.items():
        if isinstance(value, dict):
            given = {name: item for name, item in value.items() if item is not None}
            if given:
                merged[key] = {**merged.get(key, {}), **given}
        elif value is not None:
            merged[key] = value
    return merged


def _default_passes(recipe: Recipe) -> list[dict[str, Any]]:
    names = ["fold-constants", "simplify", *(["quantize-static"] if recipe.data.calibration else [])]
    return [{"name": name} for name in names]


class _Pair(BaseModel):
    """The original and the result, measured side by side."""

    before: Snapshot
    after: Snapshot


class _Job:
    """One run over checked inputs."""

    def __init__(self, inputs: Inputs, folder: Path, progress: Progress) -> None:
        self.started = time.perf_counter()
        self.inputs = inputs
        self.recipe = inputs.recipe
        self.folder = folder
        self.result = folder / "model.onnx"
        self.progress = progress
        self.threads = self.recipe.threads or usable_cores()
        self.cache = StageCache(folder / ".cache")
        self.runner = PassRunner(
            self.cache,
            inputs.original,
            inputs.session,
            calibration=inputs.calibration,
            scored=inputs.scored,
            metric=inputs.metric,
            budget=self.recipe.goals.max_accuracy_drop,
            shapes=self.recipe.shapes,
            seed=self.recipe.seed,
            progress=progress,
        )

    def run(self, command: str) -> Run:
        """Do everything, and write the record last."""
        original = stage = self._first_stage()
        entries: list[PassEntry] = []
        for number, pass_ in enumerate(self.inputs.passes, start=1):
            self.progress(f"{number}/{len(self.inputs.passes)} {pass_.name}", 0, 0)
            stage, entry = self.runner.apply(stage, pass_)
            entries.append(entry)
        self._write_model(stage)
        before, after = self._snapshots(original, stage)
        self._remove_old_bundles()
        targets = [self._compile(target, stage, after.sha256) for target in self.inputs.targets]
        self.progress("comparing layer by layer", 0, 0)
        errors = self._layer_errors(stage.model)
        goals = judge(self.recipe.goals, self.recipe.targets, before, after, targets)
        resolved = self._resolved_recipe(original.path, before.sha256)
        record = Record(
            tool_version=onnxslim.__version__,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            seconds=time.perf_counter() - self.started,
            command=command,
            recipe=resolved.tables(),
            verdict=verdict(goals),
            summary=summarize(before, after, goals, targets),
            goals=goals,
            before=before,
            after=after,
            passes=entries,
            targets=targets,
            layer_errors=errors,
            difference=graph_difference(self.inputs.original, stage.model),
            data=self._data_entries(),
            warnings=[*self.inputs.warnings, *self.runner.warnings, *_slower(after)],
            not_measured=self._not_measured(after, targets, errors),
            environment=environment(),
        )
        self._write(record, resolved)
        return Run(self.folder, record, stage.model)

    def _first_stage(self) -> Stage:
        """Make the output folder and score the original; a folder made for nothing is removed again."""
        created = not self.folder.exists()
        try:
            self.cache.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.folder}: cannot be written ({error.strerror}).") from None
        try:
            path = self.inputs.original.path
            if path is None:
                path = self.cache.folder / "original.onnx"
                self.inputs.original.save(path)
            key = content_key(
                model=file_sha256(path),
                data=self.inputs.data_hashes,
                metric=self.inputs.metric_key,
                seed=self.recipe.seed,
                shapes=self.recipe.shapes,
                budget=self.runner.budget,
            )
            stage = self.runner.first(path, key)
            self._check_reachable(stage)
        except SlimError:
            if created:
                shutil.rmtree(self.folder, ignore_errors=True)
            raise
        return stage

    def _check_reachable(self, original: Stage) -> None:
        wanted, score = self.recipe.goals.min_accuracy, original.score
        if wanted is not None and score is not None and score.value < wanted:
            raise RecipeError(
                f"goal min_accuracy = {wanted:g} is out of reach: the original itself scores {score.value:.4g} "
                f"({score.metric} over {score.samples} samples)."
            )

    # ------------------------------------------------------------------------------------------------- measuring

    def _snapshots(self, original: Stage, final: Stage) -> tuple[Snapshot, Snapshot]:
        """Measure the original and the written result side by side, or take that from an earlier run."""
        files = (original.path, self.result)
        hashes = [file_sha256(path) for path in files]
        key = content_key(pair=hashes, stage=final.key, threads=self.threads, machine=_this_machine())
        cached = self.cache.get(key, _Pair)
        if cached is not None:
            return cached[0].before, cached[0].after
        feed = self.inputs.feed
        before = snapshot(original.path, feed, original.model)
        after = snapshot(self.result, feed, final.model)
        updates: list[dict[str, Any]] = [{"score": original.score}, {"score": final.score}]
        if feed is not None:
            self.progress("measuring latency", 0, 0)
            latencies = time_pair(*files, feed, self.threads, max_seconds=_LATENCY_SECONDS)
            self.progress("measuring memory", 0, 0)
            for update, latency, path in zip(updates, latencies, files, strict=True):
                update |= {"latency": latency, "peak_memory_bytes": peak_memory(path, feed)}
        pair = _Pair(before=before.model_copy(update=updates[0]), after=after.model_copy(update=updates[1]))
        with self.cache.workspace() as workspace:
            self.cache.put(key, pair, workspace)
        return pair.before, pair.after

    def _compile(self, target: Target, stage: Stage, sha256: str) -> TargetEntry:
        """Compile the result for one target, run it where it can run, time it beside ONNX Runtime."""
        from onnxslim.deploy import deploy

        self.progress(f"compiling for {target.name}", 0, 0)
        shapes, notes = self._target_shapes()
        folder = self.folder / "targets" / target.name
        tune = next(options.tune for options in self.recipe.targets if options.name == target.name)
        key = content_key(
            target=target.model_dump(mode="json"),
            tune=tune,
            model=sha256,
            shapes=shapes,
            stage=stage.key,
            threads=self.threads,
            machine=_this_machine(),
        )
        cached = self.cache.get(key, TargetEntry)
        if cached is not None and _holds(folder, sha256, shapes):
            return cached[0]
        shutil.rmtree(folder, ignore_errors=True)  # what an earlier run compiled is not of this model
        feeds: list[Feed] = [] if self.inputs.feed is None else [self.inputs.feed]
        if self.inputs.scored is not None:
            feeds = list(self.inputs.scored.take(_VERIFY_FEEDS))
        try:
            entry = deploy(
                self.result,
                target,
                shapes=shapes,
                output=folder,
                feeds=feeds,
                threads=self.threads,
                scorer=self._score_bundle,
                tune=tune,
                progress=self.progress,
            )
        except Exception as error:  # one target must not cost the run; the record names what happened
            shutil.rmtree(folder, ignore_errors=True)
            reason = reason_of(error)
            entry = TargetEntry(name=target.name, description=target.description, status="failed", reason=reason)
        bundle = f"targets/{target.name}" if entry.bundle is not None else None
        entry = entry.model_copy(update={"notes": [*notes, *entry.notes], "bundle": bundle})
        if entry.status == "verified":  # whatever else may turn out otherwise once something has been installed
            with self.cache.workspace() as workspace:
                self.cache.put(key, entry, workspace)
        return entry

    def _score_bundle(self, bundle: Bundle, milliseconds: float) -> tuple[Score | None, list[str]]:
        """Score what was compiled as the model file was scored, where that takes no more than a minute or so."""
        scored, metric = self.inputs.scored, self.inputs.metric
        if scored is None or metric is None:
            return None, []
        if milliseconds * len(scored) > _SCORE_SECONDS * 1000:
            return None, [f"not scored: {len(scored)} inferences would take more than {_SCORE_SECONDS} s"]

        def tick(done: int, total: int) -> None:
            self.progress("scoring what was compiled", done, total)

        try:
            return evaluate(bundle, scored, metric, reference=self.inputs.session, progress=tick), []
        except SlimError as error:  # samples of other sizes than it was compiled for
            return None, [f"not scored: {error}"]

    def _target_shapes(self) -> tuple[dict[str, list[int]], list[str]]:
        """The sizes to compile dynamic inputs for: those asked for, else those of the first sample of the data."""
        dynamic = [
            name
            for name, spec in self.inputs.session.inputs.items()
            if spec.shape is not None and not all(isinstance(size, int) for size in spec.shape)
        ]
        shapes = {name: sizes for name, sizes in self.recipe.shapes.items() if name in dynamic}
        missing = [name for name in dynamic if name not in shapes]
        if not missing or self.inputs.feed is None:
            return shapes, []
        shapes |= {name: size for name, size in shapes_of(self.inputs.feed).items() if name in missing}
        sizes = ", ".join(f"{name} = {shapes[name]}" for name in missing)
        return shapes, [f"compiled for {sizes}, the size of the first sample; [shapes] gives another"]

    def _layer_errors(self, result: Model) -> list[LayerError]:
        if self.inputs.scored is None or all(pass_.lossless for pass_ in self.inputs.passes):
            return []
        try:
            return layer_errors(self.inputs.original, result, self.inputs.scored.take(_LAYER_ERROR_FEEDS))
        except SlimError as error:
            self.inputs.not_measured.append(f"error by layer: {error}")
            return []

    def _data_entries(self) -> list[DataEntry]:
        roles: list[tuple[Literal["calibration", "evaluation"], Dataset | None]] = [
            ("calibration", self.inputs.calibration),
            ("evaluation", self.inputs.evaluation),
        ]
        return [
            DataEntry(role=role, path=data.path, sha256=data.sha256, samples=data.samples, inputs=data.describe())
            for role, data in roles
            if data is not None
        ]

    def _not_measured(self, after: Snapshot, targets: list[TargetEntry], errors: list[LayerError]) -> list[str]:
        missing = list(self.inputs.not_measured)
        if after.score is None and not any(line.startswith("accuracy") for line in missing):
            missing.append("accuracy: there is no evaluation data")
        elif (
            after.score is not None
            and not after.score.labelled
            and self.inputs.metric is not None
            and self.inputs.metric.needs_labels is False
        ):
            where = "" if self.inputs.evaluation is not None else ", over the very samples that passes calibrate on"
            missing.append(f"accuracy against labels: the score is likeness to the original model{where}")
        if not errors:
            lossless = all(pass_.lossless for pass_ in self.inputs.passes)
            missing.append(f"error by layer: {'no pass may lose anything' if lossless else 'no tensor is comparable'}")
        for entry in targets:
            if entry.latency is None:
                emulated = entry.status == "verified"
                why = f"it ran under {entry.where}, whose times say nothing" if emulated else entry.status
                missing.append(f"latency on {entry.name}: {why}")
        return missing

    # --------------------------------------------------------------------------------------------------- writing

    def _write_model(self, stage: Stage) -> None:
        """Put the last stage into the output folder: the file that was scored, byte for byte where it is one file."""
        for stale in ("record.json", "report.html"):  # of an earlier run; until this one ends there is none
            (self.folder / stale).unlink(missing_ok=True)
        if external_files(stage.path):
            stage.model.save(self.result)
            return
        with atomic_write(self.result) as temporary:
            shutil.copyfile(stage.path, temporary)
        self.result.with_name(self.result.name + ".data").unlink(missing_ok=True)

    def _remove_old_bundles(self) -> None:
        """Remove bundles for targets that this run does not have."""
        names = {target.name for target in self.inputs.targets}
        for manifest in (self.folder / "targets").glob("*/manifest.json"):
            if manifest.parent.name not in names:
                shutil.rmtree(manifest.parent, ignore_errors=True)

    def _resolved_recipe(self, original: Path, sha256: str) -> Recipe:
        """The recipe with every default written out and everything pinned that decides the result."""
        calibration, evaluation = self.inputs.data_hashes
        metric = self.inputs.metric.name if self.inputs.metric else None
        return self.recipe.model_copy(
            update={
                "model": str(original),
                "passes": [{"name": pass_.name, **pass_.options()} for pass_ in self.inputs.passes],
                "threads": self.threads,
                "data": self.recipe.data.model_copy(update={"metric": metric}),
                "lock": Lock(
                    model_sha256=sha256,
                    calibration_sha256=calibration,
                    evaluation_sha256=evaluation,
                    versions={name: v for name, v in tool_fingerprint().items() if name != "source"},
                ),
            }
        )

    def _write(self, record: Record, resolved: Recipe) -> None:
        from onnxslim.reports import write

        write_lock(resolved, self.folder / "recipe.lock.toml")
        write(record, self.folder / "report.html")
        with atomic_write(self.folder / "record.json") as temporary:
            temporary.write_text(record.model_dump_json(indent=1), encoding="utf-8")


def _holds(folder: Path, model_sha256: str, shapes: dict[str, list[int]]) -> bool:
    """Whether a folder holds the bundle of this very model at these sizes, unharmed."""
    try:
        manifest = Bundle.load(folder).manifest
    except TargetError:
        return False
    return manifest.model_sha256 == model_sha256 and manifest.shapes == shapes


def _slower(after: Snapshot) -> list[str]:
    if after.latency is None or after.latency.ratio is None or after.latency.ratio <= _SLOWER:
        return []
    return [
        f"the result takes {after.latency.ratio:.2f} of the original's time in ONNX Runtime on this machine: "
        "smaller, but not faster."
    ]


def _this_machine() -> dict[str, Any]:
    """What a latency holds for: measured elsewhere, it is not taken."""
    return find_target("native").model_dump(mode="json")
