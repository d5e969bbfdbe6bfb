"""The main job: a recipe becomes passes, guards, targets, measurements, a record and a report."""

from __future__ import annotations

import os
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
from onnxslim.data import Dataset, open_dataset, random_feeds
from onnxslim.errors import OutputError, RecipeError, SlimError, TargetError
from onnxslim.goals import judge, summarize, verdict
from onnxslim.graph.shapes import input_shape
from onnxslim.guard import layer_errors
from onnxslim.measure import shapes_of, snapshot, time_pair
from onnxslim.metrics import Metric, find_metric
from onnxslim.model import Model, atomic_write, external_files, file_sha256, load
from onnxslim.pass_runner import PassRunner, Stage
from onnxslim.passes import Pass, make_pass
from onnxslim.recipe import Goals, Lock, Recipe, TargetOptions, write_lock
from onnxslim.record import DataEntry, PassEntry, Record, Snapshot, TargetEntry
from onnxslim.runtime import Feed, Session, environment, peak_memory
from onnxslim.stages import StageCache, content_key, tool_fingerprint
from onnxslim.targets import find_target

__all__ = ["Progress", "Run", "optimize"]

_LATENCY_SECONDS = 10.0
_LAYER_ERROR_FEEDS = 8
_MAX_AGREEMENT_SAMPLES = 256
_VERIFY_FEEDS = 8
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
    targets: Iterable[str | dict[str, Any]] = (),
    calibration: str | Path | Iterable[Feed] | None = None,
    evaluation: str | Path | Iterable[Feed] | None = None,
    labels: np.ndarray | None = None,
    metric: str | Callable[..., Any] | None = None,
    goals: Goals | dict[str, Any] | None = None,
    shapes: dict[str, list[int]] | None = None,
    command: str = "onnxslim optimize {lock}",
    progress: Progress = _silent,
) -> Run:
    """Run the main job: apply passes one by one, guard each, compile, measure, judge and report.

    Either a recipe says what to do, or the keyword arguments do; an argument given beside a recipe replaces what the
    recipe says. The folder ``output`` then holds ``model.onnx``, ``report.html``, ``record.json``,
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
        command: the command that reproduces the run, for the report.
        progress: called as ``progress(what, done, total)``.

    Raises:
        SlimError: the model, the data, the recipe or the output folder is unusable; nothing was written then.
    """
    recipe = _resolve(model, recipe, passes, targets, calibration, evaluation, metric, goals, shapes)
    job = _Job(
        model, recipe, Path(output), calibration, evaluation, labels, metric if callable(metric) else None, progress
    )
    return job.run(command)


def _resolve(
    model: Any,
    recipe: Recipe | None,
    passes: Iterable[Pass | str | dict[str, Any]] | None,
    targets: Iterable[str | dict[str, Any]],
    calibration: Any,
    evaluation: Any,
    metric: Any,
    goals: Goals | dict[str, Any] | None,
    shapes: dict[str, list[int]] | None,
) -> Recipe:
    """One recipe out of a recipe and the arguments beside it."""
    base = recipe or Recipe(model=str(model) if isinstance(model, (str, Path)) else "<memory>")
    data = {
        "calibration": _source_name(calibration) or base.data.calibration,
        "evaluation": _source_name(evaluation) or base.data.evaluation,
        "metric": (metric if isinstance(metric, str) else getattr(metric, "__name__", None)) or base.data.metric,
    }
    if passes is None:
        tables = list(base.passes) if recipe is not None and base.passes else _default_passes(data["calibration"])
    else:
        tables = [_pass_table(item) for item in passes]
    changes: dict[str, Any] = {"data": base.data.model_copy(update=data), "passes": tables}
    wanted = [TargetOptions(name=item) if isinstance(item, str) else TargetOptions(**item) for item in targets]
    if wanted:
        changes["targets"] = wanted
    if goals is not None:
        changes["goals"] = goals if isinstance(goals, Goals) else Goals(**goals)
    if shapes is not None:
        changes["shapes"] = shapes
    return base.model_copy(update=changes)


def _source_name(source: Any) -> str | None:
    if source is None:
        return None
    return str(source) if isinstance(source, (str, Path)) else "<memory>"


def _default_passes(calibration: str | None) -> list[dict[str, Any]]:
    names = ["fold-constants", "simplify", *(["quantize-static"] if calibration else [])]
    return [{"name": name} for name in names]


def _pass_table(item: Pass | str | dict[str, Any]) -> dict[str, Any]:
    if isinstance(item, Pass):
        return {"name": item.name, **item.options()}
    return {"name": item} if isinstance(item, str) else dict(item)


class _Job:
    """One run. Everything that a user can get wrong is checked in the constructor, before anything is written."""

    def __init__(
        self,
        source: str | Path | bytes | onnx.ModelProto | Model,
        recipe: Recipe,
        folder: Path,
        calibration: Any,
        evaluation: Any,
        labels: np.ndarray | None,
        score: Callable[..., Any] | None,
        progress: Progress,
    ) -> None:
        self.started = time.perf_counter()
        self.recipe = recipe
        self.folder = folder
        self.progress = progress
        self.warnings: list[str] = []
        self.not_measured: list[str] = []
        self.passes = [make_pass(table["name"], _without_name(table)) for table in recipe.passes]
        self.targets = [find_target(options.name).name for options in recipe.targets]
        self.original = load(source)
        self.original_path = self.original.path
        _check_output(folder, self.original_path)
        self.session = Session(self.original if self.original_path is None else self.original_path)
        specs = list(self.session.inputs.values())
        for name, sizes in recipe.shapes.items():
            if name not in self.session.inputs:
                raise RecipeError(
                    f"[shapes] {name}: the model has no such input; it has {', '.join(self.session.inputs)}."
                )
            input_shape(self.session.inputs[name].shape or sizes, sizes, name)
        all_specs = self.session.specs
        self.calibration = self._open(calibration or recipe.data.calibration, all_specs, "calibration")
        self.evaluation = self._open(evaluation or recipe.data.evaluation, all_specs, "evaluation", labels)
        self._check_lock()
        scored = self.evaluation
        if scored is None and self.calibration is not None:
            scored = self.calibration.take(_MAX_AGREEMENT_SAMPLES)
        self.scored: Dataset | None = scored
        self.metric: Metric | None = None
        if scored is not None:
            self.metric = find_metric(score or recipe.data.metric, scored, self.session)
        elif recipe.data.metric is not None:
            raise RecipeError(f"metric {recipe.data.metric!r}: there is no evaluation data to score with it.")
        for pass_ in self.passes:
            if pass_.needs_calibration and self.calibration is None:
                raise RecipeError(
                    f"pass {pass_.name} needs calibration data: give --data, or calibration under [data]."
                )
            if not pass_.lossless and scored is None:
                raise RecipeError(
                    f"pass {pass_.name} may lose accuracy, and without data nobody could tell how much: "
                    "give calibration or evaluation data."
                )
        self._check_goals()
        self.feed = self._one_feed(specs)
        self.threads = recipe.threads or _cores()
        self.cache = StageCache(folder / ".cache")
        self.runner = PassRunner(
            self.cache,
            self.original,
            self.session,
            calibration=self.calibration,
            scored=self.scored,
            metric=self.metric,
            budget=recipe.goals.max_accuracy_drop,
            shapes=recipe.shapes,
            seed=recipe.seed,
            progress=progress,
        )

    # --------------------------------------------------------------------------------------------------- preparing

    def _open(self, source: Any, specs: list[Any], role: str, labels: np.ndarray | None = None) -> Dataset | None:
        if source is None:
            return None
        dataset = open_dataset(source, specs, role=role, labels=labels)
        if role == "calibration":
            dataset.labels = None  # lossy passes never see any
        self.warnings += dataset.warnings
        return dataset

    def _check_goals(self) -> None:
        goals = self.recipe.goals
        for name in ("max_accuracy_drop", "min_accuracy"):
            if getattr(goals, name) is not None and self.scored is None:
                raise RecipeError(f"goal {name} cannot be measured without data: give evaluation or calibration data.")

    def _check_lock(self) -> None:
        lock = self.recipe.lock
        if lock is None:
            return
        found = {
            "model": (lock.model_sha256, file_sha256(self.original_path) if self.original_path else None),
            "calibration": (lock.calibration_sha256, self.calibration.sha256 if self.calibration else None),
            "evaluation": (lock.evaluation_sha256, self.evaluation.sha256 if self.evaluation else None),
        }
        for what, (locked, actual) in found.items():
            if locked is not None and locked != actual:
                raise RecipeError(
                    f"the {what} is not the one that the recipe was locked with (SHA-256 {actual}, locked {locked}); "
                    "remove [lock] from the recipe to run on it all the same."
                )
        for package, version in lock.versions.items():
            actual = tool_fingerprint().get(package)
            if actual != version:
                self.warnings.append(f"locked with {package} {version}, running with {actual}: results may differ.")

    def _one_feed(self, specs: list[Any]) -> Feed | None:
        """The feed that latency and memory are measured on: the first sample, or a made-up one of the asked shape."""
        for dataset in (self.evaluation, self.calibration):
            if dataset is not None:
                return next(iter(dataset))
        for feed in random_feeds(specs, fixed=self.recipe.shapes, seed=self.recipe.seed, count=1):
            try:
                self.session.run(feed)
            except SlimError as error:
                self.not_measured.append(f"latency and memory: the model does not run on made-up inputs ({error})")
                return None
            return feed
        return None

    # ----------------------------------------------------------------------------------------------------- running

    def run(self, command: str) -> Run:
        created = not self.folder.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.folder}: cannot be written ({error.strerror}).") from None
        try:
            original = stage = self._first_stage()
        except SlimError:
            if created:
                shutil.rmtree(self.folder, ignore_errors=True)
            raise
        entries: list[PassEntry] = []
        for number, pass_ in enumerate(self.passes, start=1):
            self.progress(f"{number}/{len(self.passes)} {pass_.name}", 0, 0)
            stage, entry = self.runner.apply(stage, pass_)
            entries.append(entry)
        self._write_model(stage)
        result = self.folder / "model.onnx"

        before, after = self._snapshots(original, stage, result)
        targets = [self._compile(target, stage, result) for target in self.targets]
        self.progress("comparing layer by layer", 0, 0)
        errors = self._layer_errors(original.model, stage.model)
        if after.latency is not None and (after.latency.ratio or 0) > _SLOWER:
            self.warnings.append(
                f"the result takes {after.latency.ratio:.2f} of the original's time in ONNX Runtime on this machine: "
                "smaller, but not faster."
            )
        goals = judge(self.recipe.goals, self.recipe.targets, before, after, targets)
        record = Record(
            tool_version=onnxslim.__version__,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            seconds=time.perf_counter() - self.started,
            command=command.format(lock="recipe.lock.toml"),
            recipe=self._resolved_recipe().tables(),
            verdict=verdict(goals),
            summary=summarize(before, after, goals, targets),
            goals=goals,
            before=before,
            after=after,
            passes=entries,
            targets=targets,
            layer_errors=errors,
            data=self._data_entries(),
            warnings=[*self.warnings, *self.runner.warnings],
            not_measured=self._all_not_measured(after, targets),
            environment=environment(),
        )
        self._write(record)
        return Run(self.folder, record, stage.model)

    def _first_stage(self) -> Stage:
        path = self.original_path
        if path is None:
            self.cache.folder.mkdir(parents=True, exist_ok=True)
            path = self.cache.folder / "original.onnx"
            self.original.save(path)
        sha = file_sha256(path)
        data = [self.calibration, self.evaluation]
        key = content_key(
            model=sha,
            data=[dataset.sha256 if dataset else None for dataset in data],
            metric=self.metric.name if self.metric else None,
            seed=self.recipe.seed,
            shapes=self.recipe.shapes,
            goals=self.recipe.goals.max_accuracy_drop,
        )
        stage = self.runner.first(path, key)
        score = stage.score
        wanted = self.recipe.goals.min_accuracy
        if wanted is not None and score is not None and score.value < wanted:
            raise RecipeError(
                f"goal min_accuracy = {wanted:g} is out of reach: the original itself scores {score.value:.4g} "
                f"({score.metric} over {score.samples} samples)."
            )
        return stage

    # ------------------------------------------------------------------------------------------------- measuring

    def _snapshots(self, original: Stage, final: Stage, result: Path) -> tuple[Snapshot, Snapshot]:
        """Measure the original and the written result side by side, or take that from an earlier run."""
        key = content_key(pair=[file_sha256(original.path), file_sha256(result)], stage=final.key, threads=self.threads)
        cached = self.cache.get(key, _Pair)
        if cached is not None:
            return cached[0].before, cached[0].after
        self.progress("measuring", 0, 3)
        before = snapshot(original.path, self.feed, original.model)
        after = snapshot(result, self.feed, final.model)
        updates: list[dict[str, Any]] = [{"score": original.score}, {"score": final.score}]
        if self.feed is not None:
            self.progress("measuring latency", 1, 3)
            latencies = time_pair(original.path, result, self.feed, self.threads, max_seconds=_LATENCY_SECONDS)
            self.progress("measuring memory", 2, 3)
            for update, latency, path in zip(updates, latencies, (original.path, result), strict=True):
                update |= {"latency": latency, "peak_memory_bytes": peak_memory(path, self.feed)}
        pair = _Pair(before=before.model_copy(update=updates[0]), after=after.model_copy(update=updates[1]))
        with self.cache.workspace() as workspace:
            self.cache.put(key, pair, workspace)
        return pair.before, pair.after

    def _compile(self, name: str, stage: Stage, result: Path) -> TargetEntry:
        """Compile the result for one target, run it where it can run, time it beside ONNX Runtime."""
        from onnxslim.deploy import deploy

        target = find_target(name)
        self.progress(f"compiling for {name}", 0, 0)
        shapes, notes = self._target_shapes()
        folder = self.folder / "targets" / name
        key = content_key(
            target=target.model_dump(mode="json"), model=file_sha256(result), shapes=shapes, stage=stage.key
        )
        cached = self.cache.get(key, TargetEntry)
        if cached is not None and (cached[0].bundle is None or folder.is_dir()):
            return cached[0]
        feeds = list(self.scored.take(_VERIFY_FEEDS)) if self.scored is not None else [self.feed] if self.feed else []
        try:
            entry = deploy(result, target, shapes=shapes, output=folder, feeds=feeds, threads=self.threads)
        except TargetError as error:
            entry = TargetEntry(name=name, description=target.description, status="failed", reason=str(error))
        entry = entry.model_copy(update={"notes": [*notes, *entry.notes]})
        if entry.bundle is not None:
            entry = entry.model_copy(update={"bundle": f"targets/{name}"})
        if entry.status != "failed":
            with self.cache.workspace() as workspace:
                self.cache.put(key, entry, workspace)
        return entry

    def _target_shapes(self) -> tuple[dict[str, list[int]], list[str]]:
        """The sizes to compile dynamic inputs for: those asked for, else those of the first sample of the data."""
        dynamic = {
            name: spec
            for name, spec in self.session.inputs.items()
            if spec.shape is not None and not all(isinstance(size, int) for size in spec.shape)
        }
        shapes = {name: sizes for name, sizes in self.recipe.shapes.items() if name in dynamic}
        missing = [name for name in dynamic if name not in shapes]
        if not missing or self.feed is None:
            return shapes, []
        shapes |= {name: size for name, size in shapes_of(self.feed).items() if name in missing}
        sizes = ", ".join(f"{name} = {shapes[name]}" for name in missing)
        return shapes, [f"compiled for {sizes}, the size of the first sample; [shapes] gives another"]

    def _layer_errors(self, original: Model, result: Model) -> list[Any]:
        data = self.scored
        if data is None or not any(not pass_.lossless for pass_ in self.passes):
            self.not_measured.append("error by layer: " + ("there is no data" if data is None else "no lossy pass ran"))
            return []
        return layer_errors(original, result, data.take(_LAYER_ERROR_FEEDS))

    def _data_entries(self) -> list[DataEntry]:
        roles: list[tuple[Literal["calibration", "evaluation"], Dataset | None]] = [
            ("calibration", self.calibration),
            ("evaluation", self.evaluation),
        ]
        return [
            DataEntry(role=role, path=data.path, sha256=data.sha256, samples=data.samples, inputs=data.describe())
            for role, data in roles
            if data is not None
        ]

    def _all_not_measured(self, after: Snapshot, targets: list[TargetEntry]) -> list[str]:
        missing = list(self.not_measured)
        if after.score is None:
            missing.append("accuracy: there is no evaluation data")
        elif not after.score.labelled:
            missing.append("accuracy against labels: there are none; the score is agreement with the original model")
        for entry in targets:
            if entry.latency is None:
                emulated = entry.status == "verified"
                why = f"it ran under {entry.where}, whose times say nothing" if emulated else entry.status
                missing.append(f"latency on {entry.name}: {why}")
        return missing

    # --------------------------------------------------------------------------------------------------- writing

    def _write_model(self, stage: Stage) -> None:
        """Put the last stage into the output folder: the file that was scored, byte for byte where it is one file."""
        result = self.folder / "model.onnx"
        if external_files(stage.path):
            stage.model.save(result)
            return
        with atomic_write(result) as temporary:
            shutil.copyfile(stage.path, temporary)

    def _resolved_recipe(self) -> Recipe:
        """The recipe with every default written out and everything pinned that decides the result."""
        return self.recipe.model_copy(
            update={
                "passes": [{"name": pass_.name, **pass_.options()} for pass_ in self.passes],
                "threads": self.threads,
                "data": self.recipe.data.model_copy(update={"metric": self.metric.name if self.metric else None}),
                "lock": Lock(
                    model_sha256=file_sha256(self.original_path or self.cache.folder / "original.onnx"),
                    calibration_sha256=self.calibration.sha256 if self.calibration else None,
                    evaluation_sha256=self.evaluation.sha256 if self.evaluation else None,
                    versions={name: v for name, v in tool_fingerprint().items() if name != "source"},
                ),
            }
        )

    def _write(self, record: Record) -> None:
        from onnxslim.reports import write

        with atomic_write(self.folder / "record.json") as temporary:
            temporary.write_text(record.model_dump_json(indent=1), encoding="utf-8")
        write_lock(self._resolved_recipe(), self.folder / "recipe.lock.toml")
        write(record, self.folder / "report.html")


class _Pair(BaseModel):
    before: Snapshot
    after: Snapshot


def _without_name(table: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key != "name"}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_output(folder: Path, source: Path | None) -> None:
    """Refuse an output folder that cannot be one, or in which writing would touch the input."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file; the output of optimize is a folder.")
    if source is not None and (folder / "model.onnx").resolve() == source.resolve():
        raise OutputError(f"{folder}: the result would replace the input {source}; choose another folder.")
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK):
        raise OutputError(f"{folder}: cannot be written (no permission in {existing}).")
