"""Everything that a user can get wrong about a run, checked before anything is written."""

from __future__ import annotations

import hashlib
import os
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxslim.data import Dataset, open_dataset, random_feeds
from onnxslim.errors import DataError, ModelError, OutputError, RecipeError
from onnxslim.graph.shapes import input_shape
from onnxslim.metrics import Metric, find_metric
from onnxslim.model import Model, load
from onnxslim.model_files import check_not_input, file_sha256
from onnxslim.passes import Pass, make_pass
from onnxslim.recipe import Lock, Recipe
from onnxslim.runtime import Feed, Session
from onnxslim.stages import tool_fingerprint
from onnxslim.targets import Target, find_target, runs_here

__all__ = ["Inputs", "open_inputs"]

_MAX_AGREEMENT_SAMPLES = 256
# These have a unit of the model's own, so no loss of theirs is small by itself.
_NO_DEFAULT_BUDGET = frozenset({"negative-mae", "negative-mse", "sqnr"})
_MADE_UP_FEEDS = 16


@dataclass
class Inputs:
    """What a run works on, all of it known to fit together.

    Attributes:
        recipe: what was asked.
        original: the model before any pass.
        session: that model in ONNX Runtime.
        passes: to apply, in order.
        targets: to compile for.
        calibration: unlabelled data for passes.
        evaluation: data for the score, as the user gave it.
        scored: what the score is over: the evaluation data, else some of the calibration data, else nothing.
        metric: what the score is; None where there is no data.
        feed: what latency and memory are measured on; None where the model does not run on made-up inputs.
        warnings: what the user should know.
        not_measured: what cannot be measured, and why.
    """

    recipe: Recipe
    original: Model
    session: Session
    passes: list[Pass]
    targets: list[Target]
    calibration: Dataset | None = None
    evaluation: Dataset | None = None
    scored: Dataset | None = None
    metric: Metric | None = None
    feed: Feed | None = None
    warnings: list[str] = field(default_factory=list)
    not_measured: list[str] = field(default_factory=list)

    @property
    def metric_key(self) -> str | None:
        """What the scores of an earlier run must have been made with to be taken: for a function, the very code."""
        if self.metric is None or self.metric.function is None:
            return self.metric.name if self.metric else None
        name = self.metric.name
        source = getattr(sys.modules.get(name.partition(":")[0]), "__file__", None)
        if self.recipe.data.metric == name and source is not None:
            return name + hashlib.sha256(Path(source).read_bytes()).hexdigest()
        # A lambda or a closure: nothing tells whether it still computes the same.
        return f"{name} {uuid.uuid4()}"

    @property
    def data_hashes(self) -> list[str | None]:
        """Content hashes of calibration and evaluation data."""
        return [data.sha256 if data is not None else None for data in (self.calibration, self.evaluation)]


def open_inputs(
    source: str | Path | bytes | onnx.ModelProto | Model,
    recipe: Recipe,
    folder: Path,
    *,
    calibration: Any = None,
    evaluation: Any = None,
    labels: np.ndarray | None = None,
    score: Callable[..., Any] | None = None,
) -> Inputs:
    """Load and check the model, the data, the passes, the targets and the goals of a run.

    Args:
        source: the model.
        recipe: what is asked.
        folder: where the run will write; nothing is written here.
        calibration: feeds, in place of what the recipe names.
        evaluation: feeds, in place of what the recipe names.
        labels: labels of ``evaluation``.
        score: a function in place of the metric that the recipe names.

    Raises:
        SlimError: something cannot be used; the message names it and says what to do.
    """
    passes = [make_pass(table["name"], {k: v for k, v in table.items() if k != "name"}) for table in recipe.passes]
    targets = [find_target(options.name) for options in recipe.targets]
    original = load(source)
    _check_output(folder)
    check_not_input(original, folder / "model.onnx")
    session = Session(original if original.path is None else original.path)
    inputs = Inputs(recipe, original, session, passes, targets)
    _check_shapes(inputs)
    chosen = recipe.data.calibration if calibration is None else calibration
    inputs.calibration = _open_data(inputs, chosen, "calibration")
    if inputs.calibration is not None:
        inputs.calibration.labels = None  # lossy passes never see any
    chosen = recipe.data.evaluation if evaluation is None else evaluation
    inputs.evaluation = _open_data(inputs, chosen, "evaluation", labels)
    if recipe.lock is not None:
        _check_lock(inputs, recipe.lock)
    inputs.scored = inputs.evaluation
    if inputs.scored is None and inputs.calibration is not None:
        inputs.scored = inputs.calibration.take(_MAX_AGREEMENT_SAMPLES)
    if inputs.scored is not None:
        _choose_metric(inputs, score)
    _check_needs(inputs)
    inputs.feed = _one_feed(inputs)
    return inputs


def _choose_metric(inputs: Inputs, score: Callable[..., Any] | None) -> None:
    """Find the metric; where none fits and nobody asked for a score, there is none."""
    assert inputs.scored is not None
    goals = inputs.recipe.goals
    asked = score or inputs.recipe.data.metric
    needed = asked or goals.max_accuracy_drop is not None or goals.min_accuracy is not None
    try:
        inputs.metric = find_metric(asked, inputs.scored, inputs.session)
    except (DataError, RecipeError) as error:
        if needed or not all(pass_.lossless for pass_ in inputs.passes):
            raise
        inputs.scored = None
        inputs.not_measured.append(f"accuracy: {error}")


def _check_output(folder: Path) -> None:
    """Refuse an output folder that cannot be one."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file; the output of optimize is a folder.")
    existing = folder.resolve()
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK):
        raise OutputError(f"{folder}: cannot be written (no permission in {existing}).")


def _check_shapes(inputs: Inputs) -> None:
    known = inputs.session.inputs
    for name, sizes in inputs.recipe.shapes.items():
        if name not in known:
            raise RecipeError(f"[shapes] {name}: the model has no such input; it has {', '.join(known)}.")
        input_shape(known[name].shape or sizes, sizes, name)


def _open_data(inputs: Inputs, source: Any, role: str, labels: np.ndarray | None = None) -> Dataset | None:
    if source is None:
        return None
    dataset = open_dataset(source, inputs.session.specs, role=role, labels=labels)
    inputs.warnings += dataset.warnings
    return dataset


def _check_lock(inputs: Inputs, lock: Lock) -> None:
    path = inputs.original.path
    hashes = [file_sha256(path) if path else None, *inputs.data_hashes]
    locked = [lock.model_sha256, lock.calibration_sha256, lock.evaluation_sha256]
    for what, wanted, actual in zip(("model", "calibration data", "evaluation data"), locked, hashes, strict=True):
        if wanted is not None and wanted != actual:
            raise RecipeError(
                f"the {what} is not what the recipe was locked with (SHA-256 {actual}, locked {wanted}); "
                "remove [lock] from the recipe to run on it all the same."
            )
    for package, version in lock.versions.items():
        running = tool_fingerprint().get(package)
        if running != version:
            inputs.warnings.append(f"locked with {package} {version}, running with {running}: results may differ.")


def _check_needs(inputs: Inputs) -> None:
    """Refuse wishes that no data is there for."""
    recipe = inputs.recipe
    if inputs.scored is None and recipe.data.metric is not None:
        raise RecipeError(f"metric {recipe.data.metric!r}: there is no evaluation data to score with it.")
    for pass_ in inputs.passes:
        if pass_.wants_calibration and inputs.calibration is None:
            raise RecipeError(f"pass {pass_.name} needs calibration data: give --data, or calibration under [data].")
        if not pass_.lossless and inputs.scored is None:
            raise RecipeError(
                f"pass {pass_.name} may lose accuracy, and without data nobody could tell how much: "
                "give calibration or evaluation data."
            )
    if recipe.goals.max_accuracy_drop is None and inputs.metric is not None:
        lossy = [pass_.name for pass_ in inputs.passes if not pass_.lossless]
        if lossy and inputs.metric.name.partition("@")[0] in _NO_DEFAULT_BUDGET:
            raise RecipeError(
                f"pass {lossy[0]} may lose accuracy, and only you know how much {inputs.metric.name} is too much: "
                "give the goal max_accuracy_drop."
            )
    for target, options in zip(inputs.targets, recipe.targets, strict=True):
        if options.max_latency is not None and not runs_here(target):
            raise RecipeError(
                f"goal max_latency of target {target.name} cannot be met on this machine, which cannot run its code at "
                "its speed: run on such a device, or leave the goal out."
            )
        if options.tune is not None and not runs_here(target):
            raise RecipeError(
                f"target {target.name} cannot be tuned for on this machine, which cannot run its code: "
                "run on such a device, or leave tune out."
            )
    for goal in ("max_accuracy_drop", "min_accuracy"):
        if getattr(recipe.goals, goal) is not None and inputs.scored is None:
            raise RecipeError(f"goal {goal} cannot be measured without data: give evaluation or calibration data.")


def _one_feed(inputs: Inputs) -> Feed | None:
    """The first sample of the data, or made-up inputs of the sizes that were asked for."""
    for dataset in (inputs.evaluation, inputs.calibration):
        if dataset is not None:
            return next(iter(dataset))
    specs = list(inputs.session.inputs.values())
    why = "no inputs can be made up"
    try:
        for feed in random_feeds(specs, fixed=inputs.recipe.shapes, seed=inputs.recipe.seed, count=_MADE_UP_FEEDS):
            try:
                inputs.session.run(feed)
            except ModelError as error:
                why = f"the model does not run on made-up inputs ({error})"
                continue
            return feed
    except DataError as error:  # a sequence, say
        why = str(error)
    inputs.not_measured.append(f"latency and memory: {why}")
    return None
