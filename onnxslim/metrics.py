"""Scores: how well a model does on labelled data, or how far it follows the original where there are no labels.

Higher is better, always. Built-in metrics stream: they keep one number a sample. Choose an output of a model that has
several with ``name@output``, such as ``top1@logits``.

======================  =========  ==================================================================================
name                    needs      value of one sample
======================  =========  ==================================================================================
``top1``, ``top5``      labels     1 where the labelled class has the highest (one of the five highest) scores; for
                                   a label a position, the share of positions. ``top1`` of a model that gives no
                                   scores of a fitting shape but classes (integers or strings): 1 where it gives the
                                   label
``negative-mae``        labels     minus the mean absolute error
``negative-mse``        labels     minus the mean squared error
``agreement``           original   1 where the most likely class is the original's; for many positions, their share
``cosine``              original   cosine of the angle to the original's outputs, mean over the float outputs
``r2``                  original   1 - squared error / variance of the original's outputs over all samples, -10 a
                                   sample at least, mean over the float outputs (coefficient of determination):
                                   for single numbers, between which there is no angle
``sqnr``                original   10 log10(power of the original / power of the difference), in dB, within ±100,
                                   mean over the float outputs
``module:function``     see below  ``score(outputs, labels)``
======================  =========  ==================================================================================

NaN and infinity where the original (or a label) has none give a sample the worst value there is.

A function of one's own gets a list with one :class:`Outputs` a feed (arrays by position and by name) and the labels as
the data has them (None without), and returns one number, or one number a sample, higher is better. It comes from an
installed package or from ``PYTHONPATH``: a recipe is not trusted to bring code of its own.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx

from onnxslim.data import Dataset
from onnxslim.errors import DataError, RecipeError
from onnxslim.model import Model
from onnxslim.record import Interval, Score
from onnxslim.runtime import Feed, ModelSource, Runner, Session

__all__ = ["METRICS", "Metric", "Outputs", "drop", "evaluate", "find_metric", "varying", "wilson"]

logger = logging.getLogger(__name__)

ScoreFunction: TypeAlias = Callable[[list["Outputs"], Any], Any]

_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution: two-sided 95 %
_WORST_ERROR = -float(np.finfo(np.float32).max)
_MAX_DB = 100.0
_WORST_R2 = -10.0
_ONE_NUMBER = 1e-12  # of the squares: what is left around the mean is rounding
_NORMAL_FROM = 30


class Outputs(tuple[Any, ...]):
    """The outputs of one feed: ``outputs[0]`` in the model's order, ``outputs["logits"]`` by name."""

    names: tuple[str, ...]

    def __new__(cls, values: Feed) -> Outputs:
        """Take the outputs that a runner returned."""
        made = super().__new__(cls, values.values())
        made.names = tuple(values)
        return made

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(self.names.index(key) if isinstance(key, str) else key)


@dataclass(frozen=True)
class _Case:
    """What one feed gave.

    Attributes:
        outputs: of the model that is scored.
        original: of the original; empty for metrics that go by labels.
        labels: shape (rows, ...); None for metrics that go by the original.
        rows: how many samples the feed holds.
        output: the output that the user chose, if any.
        metric: the metric's name, for messages.
    """

    outputs: Feed
    original: Feed
    labels: np.ndarray
    rows: int
    output: str | None
    metric: str


@dataclass(frozen=True)
class Metric:
    """A metric that is known to exist; made by :func:`find_metric`.

    Attributes:
        name: as a recipe names it.
        needs_labels: whether it goes by labels; otherwise by the original. None for a function of the user's.
        values: one value a sample, for the built-in ones.
        finish: makes them of what ``values`` gave for all samples, where one feed alone cannot tell.
        function: the user's function, for the others.
        output: the output that the user chose.
    """

    name: str
    needs_labels: bool | None
    values: Callable[[_Case], np.ndarray] | None = None
    finish: Callable[[np.ndarray], np.ndarray] | None = None
    function: ScoreFunction | None = None
    output: str | None = None


# -------------------------------------------------------------------------------------------------------- evaluation


def evaluate(
    model: Runner | ModelSource,
    dataset: Dataset,
    metric: str | ScoreFunction | Metric,
    *,
    reference: Runner | ModelSource | None = None,
    progress: Callable[[int, int], None] | None = None,
    threads: int = 0,
) -> Score:
    """Score a model feed by feed, with a 95 % confidence interval where one can be had.

    The interval is Wilson's where every sample is right or wrong, normal (bootstrap below 30 samples) for other means,
    and a bootstrap over the feeds for a function that returns one number for all of them, where it is fast enough to
    be called a hundred times. Where there is none, the log says why.

    Args:
        model: what to score; anything with ``run(feed)``, or a model for a session of its own.
        dataset: the feeds, and the labels where the metric needs them.
        metric: a name of this module, ``module:function``, or a function.
        reference: the original, for metrics that compare with it.
        progress: called as ``progress(done, total)`` after each feed.
        threads: of the sessions that are made here.

    Raises:
        RecipeError: no such metric, it does not fit the model's outputs, or the user's function fails.
        DataError: it needs labels that are not there or do not fit.
        ModelError: the model does not run.
    """
    found = _resolve(metric)
    runner = _runner(model, threads)
    done = _Progress(progress, len(dataset))
    if found.function is not None:
        return _evaluate_function(found.function, found.name, runner, dataset, done)
    assert found.values is not None
    _require_labels(found, dataset)
    if not found.needs_labels and reference is None:
        raise RecipeError(f"the metric {found.name!r} compares with the original model, and none was given.")
    original = None if reference is None or found.needs_labels else _runner(reference, threads)
    values: list[np.ndarray] = []
    for feed, labels, rows in _cases(dataset):
        outputs = runner.run(feed)
        expected = original.run(feed) if original is not None else {}
        values.append(found.values(_Case(outputs, expected, labels, rows, found.output, found.name)))
        done.step()
    scores = np.concatenate(values)
    if found.finish is not None:
        scores = found.finish(scores)
    return Score(
        metric=found.name,
        value=float(scores.mean()),
        interval=_interval_of_mean(scores),
        samples=len(scores),
        labelled=bool(found.needs_labels),
    )


def drop(before: Score, after: Score) -> float:
    """How much was lost: ``before - after`` in the metric's own unit; negative where the result is better.

    Raises:
        RecipeError: the two are of different metrics.
    """
    if before.metric != after.metric:
        raise RecipeError(f"scores of different metrics cannot be compared: {before.metric!r} and {after.metric!r}.")
    return before.value - after.value


def find_metric(metric: str | ScoreFunction | None, dataset: Dataset, model: Runner | ModelSource) -> Metric:
    """Find a metric and try it on the first feed, so that a wrong one is known before anything else is run.

    Without a name: with labels ``top1``, or ``negative-mae`` for numbers; without labels ``agreement`` where the
    outputs look like classes, ``cosine`` where not, ``r2`` where a sample of some output is one number.

    Raises:
        RecipeError: there is no such metric, module or function, or none fits these outputs and labels.
        DataError: the metric needs labels that are not there or do not fit.
    """
    found = None if metric is None else _resolve(metric)
    if found is not None and found.function is not None:
        return found
    feed, labels, rows = next(_cases(dataset))
    outputs = _runner(model, 0).run(feed)
    if found is not None:
        _require_labels(found, dataset)
        assert found.values is not None
        found.values(_Case(outputs, outputs, labels, rows, found.output, found.name))
        return found
    if dataset.labels is not None:
        names = ["top1", "negative-mae"]
    else:
        names = ["agreement", "r2" if _has_single_numbers(outputs, rows) else "cosine"]
    discrete = [
        name for name, value in outputs.items() if isinstance(value, np.ndarray) and value.dtype.kind in _DISCRETE
    ]
    if dataset.labels is None and len(discrete) == 1:
        names.insert(1, f"agreement@{discrete[0]}")
    for name in names:
        found = _resolve(name)
        assert found.values is not None
        try:
            found.values(_Case(outputs, outputs, labels, rows, found.output, name))
        except (DataError, RecipeError):
            continue
        return found
    what = f"these outputs ({', '.join(outputs)})" if dataset.labels is None else "these labels and outputs"
    example = f"agreement@{discrete[0]}" if dataset.labels is None and discrete else "module:function"
    raise RecipeError(f"{dataset.path}: no built-in metric fits {what}; name one, such as metric = {example!r}.")


def _require_labels(metric: Metric, dataset: Dataset) -> None:
    if metric.needs_labels and dataset.labels is None:
        raise DataError(
            f"{dataset.path}: has no labels, which the metric {metric.name!r} needs; use agreement, cosine or r2."
        )


class _Progress:
    def __init__(self, report: Callable[[int, int], None] | None, total: int) -> None:
        self._report = report
        self._total = total
        self._done = 0

    def step(self) -> None:
        self._done += 1
        if self._report is not None:
            self._report(self._done, self._total)


def _runner(model: Runner | ModelSource, threads: int) -> Runner:
    if isinstance(model, (Model, Path, str, bytes, onnx.ModelProto)):
        return Session(model, threads=threads)
    runner: Runner = model
    return runner


def _cases(dataset: Dataset) -> Any:
    for (feed, labels), rows in zip(dataset.labelled(), dataset.rows, strict=True):
        yield feed, labels, rows


# ------------------------------------------------------------------------------------------------ functions of a user


def _resolve(metric: str | ScoreFunction | Metric) -> Metric:
    if isinstance(metric, Metric):
        return metric
    if not isinstance(metric, str):
        if not callable(metric):
            raise RecipeError(f"the metric is a {type(metric).__name__}; give a name, 'module:function' or a function.")
        name = f"{getattr(metric, '__module__', '')}:{getattr(metric, '__qualname__', type(metric).__name__)}"
        return Metric(name, None, function=metric)
    name, _, output = metric.partition("@")
    if name in METRICS:
        values, needs_labels = METRICS[name]
        return Metric(metric, needs_labels, values=values, finish=_FINISH.get(name), output=output or None)
    if ":" in metric:
        return Metric(metric, None, function=_import_function(metric))
    close = difflib.get_close_matches(name, METRICS, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise RecipeError(f"no metric {metric!r}; there are {', '.join(METRICS)} and module:function.{hint}")


def _import_function(metric: str) -> ScoreFunction:
    module_name, _, function_name = metric.partition(":")
    if not all(part.isidentifier() for part in module_name.split(".")) or not function_name.isidentifier():
        raise RecipeError(f"metric {metric!r}: write module:function, both plain Python names.")
    # `python -m` and `python -c` put the current folder first, where a stranger's recipe may lie beside its code.
    kept = list(sys.path)
    named = {Path(entry).resolve() for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry}
    here = Path.cwd()
    if kept and (not kept[0] or Path(kept[0]).resolve() == here) and here not in named:
        sys.path = kept[1:]
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise RecipeError(
                f"metric {metric!r}: there is no module {error.name!r}. Install it, or put its folder on PYTHONPATH; "
                "code beside a recipe is never imported."
            ) from None
        raise RecipeError(f"metric {metric!r}: its module needs {error.name!r}, which is not installed.") from None
    except Exception as error:  # whatever the user's module does when imported
        raise RecipeError(f"metric {metric!r}: importing its module fails: {type(error).__name__}: {error}.") from error
    finally:
        sys.path = kept
    function = getattr(module, function_name, None)
    if not callable(function):
        raise RecipeError(f"metric {metric!r}: module {module_name!r} has no function {function_name!r}.")
    scored: ScoreFunction = function
    return scored


def _evaluate_function(function: ScoreFunction, name: str, runner: Runner, dataset: Dataset, done: _Progress) -> Score:
    outputs = []
    for feed in dataset:
        outputs.append(Outputs(runner.run(feed)))
        done.step()
    start = time.perf_counter()
    values = _call(function, name, outputs, dataset.labels)
    seconds = time.perf_counter() - start
    if values.size > 1:
        interval, samples = _interval_of_mean(values), values.size
    else:
        interval, samples = (
            _bootstrap_feeds(function, name, outputs, dataset, float(values[0]), seconds),
            dataset.samples,
        )
    return Score(
        metric=name,
        value=float(values.mean()),
        interval=interval,
        samples=samples,
        labelled=True,  # by what the user's function knows, not by the original
    )


def _call(function: ScoreFunction, name: str, outputs: list[Outputs], labels: Any) -> np.ndarray:
    """Call the user's function; shape (1,) or (samples,)."""
    try:
        returned = function(outputs, labels)
    except Exception as error:  # whatever the user's function raises
        raise RecipeError(f"metric {name!r} fails: {type(error).__name__}: {error}") from error
    try:
        values = np.atleast_1d(np.asarray(returned, np.float64))
    except (TypeError, ValueError):
        raise RecipeError(f"metric {name!r} returns a {type(returned).__name__}; return numbers.") from None
    if values.ndim != 1 or not values.size:
        raise RecipeError(f"metric {name!r} returns an array of shape {values.shape}; return one number a sample.")
    if not np.isfinite(values).all():
        raise RecipeError(f"metric {name!r} returns NaN or infinity, which is no score.")
    return values


# ---------------------------------------------------------------------------------------------------------- intervals


def wilson(right: float, samples: int) -> Interval:
    """Wilson's score interval (1927) for a share of right answers, 95 %.

    Args:
        right: how many of the samples are right.
        samples: how many there are, at least 1.
    """
    share = right / samples
    denominator = 1 + _Z**2 / samples
    centre = (share + _Z**2 / (2 * samples)) / denominator
    half = _Z / denominator * math.sqrt(share * (1 - share) / samples + _Z**2 / (4 * samples**2))
    return Interval(low=max(0.0, centre - half), high=min(1.0, centre + half), method="Wilson")


def _interval_of_mean(values: np.ndarray) -> Interval | None:
    """The interval of the mean of one value a sample."""
    count = len(values)
    if np.isin(values, (0.0, 1.0)).all():
        return wilson(float(values.sum()), count)
    if count < 2:
        logger.info("no confidence interval: one sample says nothing about the spread")
        return None
    if count >= _NORMAL_FROM:
        half = _Z * float(values.std(ddof=1)) / math.sqrt(count)
        mean = float(values.mean())
        return Interval(low=mean - half, high=mean + half, method="normal")
    resamples = 2000
    chosen = np.random.default_rng(0).integers(0, count, (resamples, count))
    low, high = np.percentile(values[chosen].mean(axis=1), (2.5, 97.5))
    return Interval(low=float(low), high=float(high), method=f"bootstrap, {resamples} resamples")


_RESAMPLES = 200
_RESAMPLING_SECONDS = 20.0


def _bootstrap_feeds(
    function: ScoreFunction, name: str, outputs: list[Outputs], dataset: Dataset, value: float, seconds: float
) -> Interval | None:
    """Resample whole feeds with their labels, unless that would take too long: always as often, so the same twice."""
    feeds = len(outputs)
    if feeds < 10 or seconds * _RESAMPLES > _RESAMPLING_SECONDS:
        why = f"{feeds} feeds are too few to resample" if feeds < 10 else f"{name} takes {seconds:.1f} s a call"
        logger.info("no confidence interval: %s", why)
        return None
    parts = None
    if dataset.labels is not None:
        ends = np.cumsum(dataset.rows)
        parts = [dataset.labels[end - rows : end] for end, rows in zip(ends, dataset.rows, strict=True)]
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(_RESAMPLES):
        chosen = rng.integers(0, feeds, feeds)
        labels = None if parts is None else np.concatenate([parts[index] for index in chosen])
        try:
            scores.append(float(_call(function, name, [outputs[index] for index in chosen], labels).mean()))
        except RecipeError as error:
            logger.info("no confidence interval: on a resample, %s", error)
            return None
    low, high = (float(edge) for edge in np.percentile(scores, (2.5, 97.5)))
    if not low <= value <= high:
        logger.info("no confidence interval: the score depends on the order of the feeds")
        return None
    return Interval(low=low, high=high, method=f"bootstrap over feeds, {_RESAMPLES} resamples")


# ------------------------------------------------------------------------------------------------- the built-in ones


def _top(k: int) -> Callable[[_Case], np.ndarray]:
    def values(case: _Case) -> np.ndarray:
        labels = case.labels
        given = _given_classes(case) if k == 1 else None
        if given is not None:
            return np.asarray((given == labels).reshape(len(labels), -1).mean(axis=1))
        if labels.dtype.kind not in "iub":
            mend = ".astype('int64')" if labels.dtype.kind == "f" else "the index of each label's class in the output"
            raise DataError(f"labels are {labels.dtype}; {case.metric!r} needs class numbers: {mend}.")
        scores = _class_scores(case)
        classes = scores.shape[-1]
        if classes <= k:
            raise RecipeError(f"{case.metric!r} cannot fail with {classes} classes; use top1.")
        wanted = labels.reshape(-1).astype(np.int64)
        outside = (wanted < 0) | (wanted >= classes)
        if outside.any():
            raise DataError(f"label {wanted[outside][0]}: the model has {classes} classes, 0 to {classes - 1}.")
        flat = scores.reshape(-1, classes)
        own = flat[np.arange(len(flat)), wanted][:, None]
        # As argmax does, the first of equals is the higher; NaN anywhere makes the position wrong.
        above = (flat > own) | ((flat == own) & (np.arange(classes) < wanted[:, None]))
        right = (above.sum(axis=1) < k) & ~np.isnan(flat).any(axis=1)
        return np.asarray(right.reshape(len(labels), -1).mean(axis=1))

    return values


def _given_classes(case: _Case) -> np.ndarray | None:
    """The one output that names a class for each label, in the shape of the labels; None where scores fit them."""
    labels = case.labels
    strings = labels.dtype.kind in "OU"
    if labels.dtype.kind == "f" or (not strings and _fitting_scores(case)):
        return None
    wanted = [size for size in labels.shape if size != 1]
    fitting = [
        value
        for value in _choose(case, case.outputs, "OU" if strings else "iub").values()
        if [size for size in value.shape if size != 1] == wanted
    ]
    if len(fitting) != 1:
        return None
    return fitting[0].reshape(labels.shape).astype(labels.dtype.kind if strings else np.int64)


def _fitting_scores(case: _Case) -> Feed:
    """The outputs that have the shape of class scores for the labels, class axis last."""
    fitting = {}
    for name, value in _choose(case, case.outputs, "fiu").items():
        axis = _label_axis(value.shape, case.labels.shape)
        if axis is not None:
            fitting[name] = np.moveaxis(value, axis, -1)
    return fitting


def _class_scores(case: _Case) -> np.ndarray:
    """The output that holds class scores for the labels, class axis last."""
    fitting = _fitting_scores(case)
    if len(fitting) == 1:
        return next(iter(fitting.values())).astype(np.float64)
    if fitting:
        raise RecipeError(
            f"outputs {', '.join(fitting)} all fit the labels; choose one, such as "
            f"'{case.metric}@{next(iter(fitting))}'."
        )
    listed = ", ".join(f"{name} {list(np.shape(value))}" for name, value in case.outputs.items())
    raise DataError(
        f"labels of shape {list(case.labels.shape)} fit no output as class numbers, one for each position ({listed})."
    )


def _label_axis(shape: tuple[int, ...], labels: tuple[int, ...]) -> int | None:
    """The class axis: more than one long, and without it the output has the shape of the labels, ones aside."""
    wanted = [size for size in labels if size != 1]
    last = len(shape) - 1
    order = [1, *range(last, -1, -1)] if len(shape) > 3 else range(last, -1, -1)
    for axis in order:
        rest = [size for position, size in enumerate(shape) if position != axis and size != 1]
        if shape[axis] > 1 and rest == wanted:
            return axis
    return None


def _negative_error(error: Callable[[np.ndarray], np.ndarray]) -> Callable[[_Case], np.ndarray]:
    def values(case: _Case) -> np.ndarray:
        labels = case.labels
        if labels.dtype.kind not in "fiub":
            raise DataError(f"labels are {labels.dtype}; {case.metric!r} needs numbers.")
        fitting = {name: value for name, value in _choose(case, case.outputs, "f").items() if value.size == labels.size}
        if len(fitting) > 1:
            raise RecipeError(
                f"outputs {', '.join(fitting)} all fit the labels; choose one, such as "
                f"'{case.metric}@{next(iter(fitting))}'."
            )
        if not fitting:
            listed = ", ".join(f"{name} {list(np.shape(value))}" for name, value in case.outputs.items())
            raise DataError(f"labels of shape {list(labels.shape)} fit no float output ({listed}).")
        output = next(iter(fitting.values())).astype(np.float64).reshape(len(labels), -1)
        with np.errstate(invalid="ignore", over="ignore"):
            losses = error(output - labels.astype(np.float64).reshape(len(labels), -1)).mean(axis=1)
        return np.asarray(np.maximum(-np.nan_to_num(losses, nan=np.inf), _WORST_ERROR))

    return values


def _agreement(case: _Case) -> np.ndarray:
    """Share of positions whose class (or integer, or string) is the original's."""
    fitting = [
        name
        for name, value in _choose(case, case.original, _DISCRETE + "f").items()
        if value.dtype.kind != "f" or _class_axis(value) is not None
    ]
    if len(fitting) > 1:
        raise RecipeError(
            f"outputs {', '.join(fitting)} may all be classes; choose one, such as '{case.metric}@{fitting[0]}'."
        )
    if not fitting:
        raise RecipeError(f"no output looks like class scores, which {case.metric!r} needs; use cosine, r2 or sqnr.")
    expected, got = _classes(case.original[fitting[0]]), _classes(case.outputs[fitting[0]])
    if expected.shape == got.shape:
        same = (expected == got) & (expected != _NO_CLASS)
        rows = case.rows if same.ndim and same.shape[0] == case.rows else 1
        return np.asarray(same.reshape(rows, -1).mean(axis=1)) if same.size else np.ones(1)
    if expected.ndim != got.ndim:
        return np.zeros(1)
    common = tuple(slice(0, min(pair)) for pair in zip(expected.shape, got.shape, strict=True))
    same = (expected[common] == got[common]) & (expected[common] != _NO_CLASS)
    return np.array([same.sum() / max(expected.size, got.size)])


_NO_CLASS = -(2**62)
_DISCRETE = "iubOUS"  # dtype kinds; ONNX Runtime gives strings as objects


def _class_axis(value: np.ndarray) -> int | None:
    """Where class scores lie when there are no labels to tell: axis 1 of matrices and images, else the last."""
    axis = value.ndim - 1 if value.ndim in (1, 3) else 1
    return axis if value.ndim and value.shape[axis] > 1 else None


def _classes(value: np.ndarray) -> np.ndarray:
    """The most likely class of each position; no class where a score is NaN. Integers and strings are classes."""
    if value.dtype.kind in "iub":
        return value.astype(np.int64)
    if value.dtype.kind in _DISCRETE:
        return value
    axis = _class_axis(value)
    if axis is None:
        return np.full(value.shape, _NO_CLASS)
    return np.where(np.isnan(value).any(axis=axis), _NO_CLASS, value.argmax(axis=axis))


def _cosine_of(expected: np.ndarray, got: np.ndarray) -> float:
    norms = math.sqrt(float(expected @ expected) * float(got @ got))
    if norms == 0.0:
        return 1.0 if not expected.any() and not got.any() else 0.0
    return float(np.clip(expected @ got / norms, -1.0, 1.0))


def _sqnr_of(expected: np.ndarray, got: np.ndarray) -> float:
    noise = float(((expected - got) ** 2).sum())
    signal = float((expected**2).sum())
    if noise == 0.0:
        return _MAX_DB
    return float(np.clip(10 * math.log10(signal / noise), -_MAX_DB, _MAX_DB)) if signal else -_MAX_DB


def _closeness(measure: Callable[[np.ndarray, np.ndarray], float], worst: float) -> Callable[[_Case], np.ndarray]:
    """One value a sample: the measure of each float output against the original's, mean over the outputs."""

    def values(case: _Case) -> np.ndarray:
        chosen, rows = _floats(case)
        per_output = [_rows(case.outputs.get(name), value, rows, measure, worst) for name, value in chosen.items()]
        return np.asarray(np.mean(per_output, axis=0))

    return values


def _rows(
    got: np.ndarray | None,
    expected: np.ndarray,
    rows: int,
    measure: Callable[[np.ndarray, np.ndarray], float],
    worst: float,
) -> list[float]:
    if not isinstance(got, np.ndarray) or got.shape != expected.shape:
        return [worst] * rows
    pairs = zip(expected.reshape(rows, -1), got.reshape(rows, -1), strict=True)
    return [_row(row.astype(np.float64), other.astype(np.float64), measure, worst) for row, other in pairs]


def _row(
    expected: np.ndarray, got: np.ndarray, measure: Callable[[np.ndarray, np.ndarray], float], worst: float
) -> float:
    """The measure over the positions where the original is finite; the worst where the others differ or are all."""
    finite = np.isfinite(expected)
    if not np.array_equal(expected[~finite], got[~finite], equal_nan=True) or not np.isfinite(got[finite]).all():
        return worst
    if expected.size and not finite.any():
        return worst
    return measure(expected[finite], got[finite])


def _floats(case: _Case) -> tuple[Feed, int]:
    """The float outputs of the original, and into how many samples all of them can be cut."""
    chosen = _choose(case, case.original, "f")
    if not chosen:
        raise RecipeError(f"the model has no float output, which {case.metric!r} needs; use agreement.")
    whole = any(not value.ndim or value.shape[0] != case.rows for value in chosen.values())
    return chosen, 1 if whole else case.rows


def _has_single_numbers(outputs: Feed, rows: int) -> bool:
    floats = (value for value in outputs.values() if isinstance(value, np.ndarray) and value.dtype.kind == "f")
    return any(value.size == (rows if value.ndim and value.shape[0] == rows else 1) for value in floats)


def _moments(case: _Case) -> np.ndarray:
    """For each sample and float output: squared error, sum and sum of squares of the original, and its elements.

    Shape (rows, outputs, 4). The error is infinite where the outputs cannot be compared, or only one is finite.
    """
    chosen, rows = _floats(case)
    found = np.zeros((rows, len(chosen), 4))
    for index, (name, value) in enumerate(chosen.items()):
        expected = value.astype(np.float64).reshape(rows, -1)
        other = case.outputs.get(name)
        found[:, index, 0] = _rows(other, value, rows, lambda one, two: float(np.square(one - two).sum()), math.inf)
        known = np.where(np.isfinite(expected), expected, 0.0)
        found[:, index, 1:3] = np.stack([known.sum(axis=1), np.square(known).sum(axis=1)], axis=1)
        found[:, index, 3] = np.isfinite(expected).sum(axis=1)
    return found


def varying(squares: np.ndarray, total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """What numbers tell: the sum of their squares around the mean; of all of it where they are one number throughout.

    Args:
        squares: sums of squares.
        total: sums, of the same numbers.
        count: how many numbers.
    """
    around = squares - np.square(total) / np.maximum(count, 1.0)
    return np.where(around > _ONE_NUMBER * squares, around, squares)


def _explained(moments: np.ndarray) -> np.ndarray:
    """The coefficient of determination sample by sample, mean over the outputs, of what :func:`_moments` gave."""
    noise, total, squares, count = np.moveaxis(moments, 2, 0)
    elements = count.sum(axis=0)
    signal = varying(squares.sum(axis=0), total.sum(axis=0), elements) / np.maximum(elements, 1.0)
    error = noise / np.maximum(count, 1.0) / np.where(signal > 0, signal, 1.0)
    return np.asarray(np.maximum(np.where(noise == 0.0, 1.0, 1.0 - error), _WORST_R2).mean(axis=1))


def _choose(case: _Case, outputs: Feed, kinds: str) -> Feed:
    """The outputs of the wanted NumPy kinds, or the one that the user chose."""
    if case.output is not None:
        if case.output not in outputs:
            raise RecipeError(f"{case.metric!r}: the model has no output {case.output!r} ({', '.join(outputs)}).")
        outputs = {case.output: outputs[case.output]}
    return {
        name: value for name, value in outputs.items() if isinstance(value, np.ndarray) and value.dtype.kind in kinds
    }


METRICS: dict[str, tuple[Callable[[_Case], np.ndarray], bool]] = {
    "top1": (_top(1), True),
    "top5": (_top(5), True),
    "negative-mae": (_negative_error(np.abs), True),
    "negative-mse": (_negative_error(np.square), True),
    "agreement": (_agreement, False),
    "cosine": (_closeness(_cosine_of, -1.0), False),
    "r2": (_moments, False),
    "sqnr": (_closeness(_sqnr_of, -_MAX_DB), False),
}
"""The built-in metrics: name -> values of the samples of one feed, and whether they go by labels."""
_FINISH = {"r2": _explained}
