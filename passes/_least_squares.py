"""Least-squares recovery: give every layer behind a cut the weights that best reproduce the original's output.

Layers are visited in topological order. A layer's input comes from the cut model with all earlier layers already
refitted, its target from the original model at the same node, reduced to the channels that are left (asymmetric
reconstruction, He et al. 2017, arXiv 1707.06168). With centred moments ``S`` of the input and ``C`` across input and
target,

    (S + lambda I) W^T = C + lambda W0^T,        b = mean(y) - W mean(x),        lambda = ridge * mean(diag S)

where ``W0`` is the cut weight: the penalty pulls towards it, not towards zero, so directions that the data does not
cover keep what training gave them. Where a ReLU follows, what it cuts off is no error (``_one_sided``). No labels, no
gradients, ``K * K`` floats a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim.graph.purity import is_standard
from onnxslim.graph.walk import is_graph_output
from onnxslim.model import Model
from onnxslim.passes._bias import add_behind, put_bias
from onnxslim.passes._one_sided import Kept, seen_range
from onnxslim.passes._statistics import LinearLayer, Moments, linear_layer
from onnxslim.passes._trunk import Trunk

__all__ = ["Refit", "recover", "relative_error", "solve"]

FloatArray = NDArray[np.float64]
Feed = dict[str, np.ndarray]

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # tried on held-out samples where none is given, and then around the best
_HALF_DECADE = 10**0.5
_WIDEST_TRIAL = 1152  # inputs of a layer up to which that is affordable: some ten solves and a second set of moments


@dataclass
class Refit:
    """What became of one layer.

    Attributes:
        node: the layer.
        before, after: mean squared error of its output over the target's variance, with the cut and the fitted weights
            and the best bias; only of what the activation behind it lets through.
        why: why it was left as it was; None when it was refitted.
    """

    node: gs.Node
    before: float = 0.0
    after: float = 0.0
    why: str | None = None


@dataclass(eq=False)
class _Task:
    """One layer to refit.

    Its moments are kept for two halves of the samples, so that a ridge can be tried on the other half; those of wide
    layers in one set.

    Attributes:
        shift: the Add of a constant vector that alone reads a MatMul, and the slot of that vector: the layer's bias.
        sum, beside: what an Add makes of the layer's output (and shift) and of something else, and that, when the layer
            is to make up for its error too.
        unlike: whether the target was seen to have other positions than the output: an Add behind the layer repeats
            what it adds, or what was cut lay along the positions.
        seen: rows to refine the fit on, where an activation cuts off part of the output.
        halves: into how many sets the samples are dealt.
    """

    layer: LinearLayer
    shift: tuple[gs.Node, int] | None
    sum: gs.Tensor | None = None
    beside: gs.Tensor | None = None
    seen: Kept | None = None
    kept: NDArray[np.int64] | None = None
    halves: int = 2
    parts: list[Moments] = field(default_factory=list)
    samples: int = 0
    unlike: bool = False

    @property
    def target(self) -> gs.Tensor:
        """The tensor of the teacher that the layer's output, plus what is beside it, is to match."""
        return self.layer.output if self.sum is None else self.sum

    @property
    def end(self) -> gs.Tensor:
        """The tensor of the cut model that holds the layer's output with its bias, wherever that is added."""
        return self.layer.output if self.shift is None else self.shift[0].outputs[0]

    @property
    def shifted(self) -> FloatArray:
        """What an Add behind the layer adds as its bias, ``[O]``, or 0."""
        if self.shift is None:
            return np.zeros(1)
        add, slot = self.shift
        return np.asarray(add.inputs[slot].values, np.float64).reshape(-1)

    @property
    def reads(self) -> list[str]:
        """Tensors of the cut model that the fit needs."""
        return [self.layer.data.name, *([self.beside.name] if self.beside is not None else [])]

    def observe(self, x: Feed, target: np.ndarray, rng: np.random.Generator, per_sample: int) -> None:
        """Add one batch."""
        layer = self.layer
        shapes = [layer.output_shape(x[layer.data.name].shape), target.shape]
        if self.beside is not None:
            shapes.append(x[self.beside.name].shape)
        if self.unlike or len({_without_channels(layer, shape) for shape in shapes}) > 1:
            self.unlike = True
            return
        if not self.parts:
            groups, outputs, inputs = layer.shape
            count = self.halves if inputs <= _WIDEST_TRIAL else 1
            self.parts = [Moments.empty(groups, inputs, outputs) for _ in range(count)]
        rows = layer.draw(target.shape, rng, per_sample)
        inputs_ = layer.input_rows(x[layer.data.name], rows)
        targets = layer.output_rows(target, rows, self.kept)
        beside = None if self.beside is None else layer.output_rows(x[self.beside.name], rows)
        if beside is not None:
            targets = targets - beside - self.shifted.astype(targets.dtype)
        if self.seen is not None:
            self.seen.add(inputs_, targets, beside)
        turn = (rows.sample + self.samples) % len(self.parts)
        for number, part in enumerate(self.parts):
            part.gather(inputs_[:, turn == number], targets[:, turn == number])
        self.samples += int(rows.sample.max(initial=-1)) + 1


def _without_channels(layer: LinearLayer, shape: Sequence[int]) -> tuple[int, ...]:
    """A shape of an output of the layer without the axis of its channels."""
    axis = 1 if layer.spatial else len(shape) - 1
    return (*shape[:axis], *shape[axis + 1 :])


def recover(
    model: Model,
    teacher: Model,
    kept: Callable[[LinearLayer], NDArray[np.int64] | None],
    changed: set[int],
    batches: Callable[[], Iterable[Feed]],
    *,
    ridge: float | None,
    per_sample: int,
    samples: int | None = None,
    seed: int,
    quick: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Refit]:
    """Refit all layers of ``model`` whose input is no longer what it was in ``teacher``, in place.

    Args:
        model: the cut model.
        teacher: the original; tensors are matched by name.
        kept: which of the teacher's channels a layer still makes; None for all.
        changed: ids of the nodes whose weights were cut.
        batches: yields the calibration feeds anew at each call.
        ridge: strength of the pull to the cut weights, in units of the inputs' mean variance; None chooses it for each
            layer on samples held out.
        per_sample: rows drawn from each sample.
        samples: how many there are, for wide layers to draw more where that is few; None draws no more.
        seed: of the draw.
        quick: guess ridges instead of trying them, which takes most of the time.
        progress: called with layers done and layers to do.

    Raises:
        ModelError: a model does not run on the feeds.
    """
    levels, refits = _levels(model, changed)
    student, original = Trunk(model, batches), Trunk(teacher, batches)
    done, total = 0, sum(len(level) for level in levels)
    for number, tasks in enumerate(levels):
        for task in tasks:
            task.kept = kept(task.layer)
            task.seen = _seen(model, task)
            task.halves = 1 if quick else 2
        rng = np.random.default_rng([seed, number])
        inputs = student.step(sorted({name for task in tasks for name in task.reads}))
        targets = original.step(sorted({task.target.name for task in tasks}))
        for x, y in zip(inputs, targets, strict=True):
            for task in tasks:
                each = per_sample if samples is None else task.layer.rows_each(samples, per_sample)
                task.observe(x, y[task.target.name], rng, each)
        for task in tasks:
            for part in task.parts:
                part.settle()
            if task.unlike:
                refits.append(
                    Refit(task.layer.node, why="what was cut, or added to it, is not along its channels alone")
                )
            else:
                refits.append(_refit(model, task, ridge))
            task.parts, task.seen = [], None
        done += len(tasks)
        progress(done, total)
    return refits


def _levels(model: Model, changed: set[int]) -> tuple[list[list[_Task]], list[Refit]]:
    """Layers behind a changed one, those that do not wait for each other together, in order."""
    nodes = model.graph.nodes
    users: dict[int, int] = {}
    for node in nodes:
        if linear_layer(node) is not None:
            users[id(node.inputs[1])] = users.get(id(node.inputs[1]), 0) + 1
    altered: set[int] = set()  # tensors that are no longer what they were
    tasks: dict[int, _Task] = {}
    refits: list[Refit] = []
    for node in nodes:
        layer = linear_layer(node)
        if layer is not None and id(layer.data) in altered:
            why = _unfit(layer, users[id(layer.weight)])
            if why is None:
                tasks[id(node)] = _Task(
                    layer, add_behind(model.graph, node, layer.shape[1]) if node.op == "MatMul" else None
                )
            else:
                refits.append(Refit(node, why=why))
        if id(node) in changed or any(id(tensor) in altered for tensor in node.inputs):
            altered.update(id(tensor) for tensor in node.outputs)
    ends = {id(task.end): task for task in tasks.values()}
    for node in nodes:
        _share_errors(model, node, ends, altered)
    # What is beside a layer may come later in the graph than the layer, so one sweep may not be enough.
    depth: dict[int, int] = {}
    level: dict[int, int] = {}
    moved = True
    while moved:
        moved = False
        for node in nodes:
            waits = max((depth.get(id(tensor), 0) for tensor in node.inputs), default=0)
            task = tasks.get(id(node))
            if task is not None:
                beside = depth.get(id(task.beside), 0) if task.beside is not None else 0
                level[id(node)] = max(waits, beside)
                waits = level[id(node)] + 1
            for tensor in node.outputs:
                moved |= depth.get(id(tensor), 0) != waits
                depth[id(tensor)] = waits
    levels: list[list[_Task]] = [[] for _ in range(max(level.values(), default=-1) + 1)]
    for key, task in tasks.items():
        levels[level[key]].append(task)
    return levels, refits


def _share_errors(model: Model, node: gs.Node, ends: dict[int, _Task], altered: set[int]) -> None:
    """At an Add, let one of the layers that feed it fit the sum: it makes up for the error of the other branch.

    That is the one with the most inputs, if nothing else reads its output (section 3.4.1 of He et al. 2017).
    """
    if node.op != "Add" or not is_standard(node):
        return
    able = []
    for tensor, other in (node.inputs, node.inputs[::-1]):
        task = ends.get(id(tensor))
        alone = len(tensor.outputs) == 1 and not is_graph_output(model.graph, tensor)
        if task is not None and alone and id(other) in altered and other is not tensor:
            able.append((task.layer.shape[2], task, other))
    if able:
        _, task, other = max(able, key=lambda entry: entry[0])
        task.sum, task.beside = node.outputs[0], other


def _unfit(layer: LinearLayer, users: int) -> str | None:
    """Why a layer cannot be refitted; None when it can."""
    node = layer.node
    if users > 1:
        return "its weight serves other layers too"
    if node.op == "Gemm" and len(node.inputs) > 2 and not node.inputs[2].is_empty():
        bias = node.inputs[2]
        if not isinstance(bias, gs.Constant) or int(np.prod(bias.shape)) not in (1, layer.shape[1]):
            return "its bias is computed"
    return None


def _seen(model: Model, task: _Task) -> Kept | None:
    """Where to keep rows of a layer with an activation behind it; None where all of its output matters."""
    layer = task.layer
    limits = seen_range(model, task.end if task.sum is None else task.sum)
    return None if limits is None else Kept(*limits, np.broadcast_to(task.shifted, layer.shape[0] * layer.shape[1]))


def _refit(model: Model, task: _Task, ridge: float | None) -> Refit:
    layer = task.layer
    if sum(part.count for part in task.parts) == 0:
        return Refit(layer.node, why="the calibration data gave it no finite input")
    shift = task.shift
    centred = layer.node.op != "MatMul" or shift is not None
    start = layer.matrices()
    strength = _best_ridge(task.parts, start, centred=centred) if ridge is None else ridge
    moments = task.parts[0] if len(task.parts) == 1 else task.parts[0].merged(task.parts[1])
    if task.seen is None:
        matrices = solve(moments, start, strength, centred=centred)
        bias = _best_bias(moments, matrices)
        before, after = (relative_error(moments, w, centred=centred) for w in (start, matrices))
    else:
        equations = _normal_equations(moments, start, strength, centred=centred)
        matrices, bias = task.seen.solve(*equations, (moments.mean, moments.mean_y) if centred else None)
        plain = _best_bias(moments, start) if centred else np.zeros_like(bias)
        before, after = task.seen.error(start, plain), task.seen.error(matrices, bias)
    if not np.isfinite(matrices).all():
        return Refit(layer.node, why="its least squares did not come out finite")
    bias = bias.reshape(-1)
    _replace(model, layer.node, 1, layer.stored(matrices))
    if shift is not None:
        add, slot = shift
        constant = add.inputs[slot]
        shape = (1,) * (max(len(constant.shape), 1) - 1) + (-1,)
        _replace(model, add, slot, constant.values + bias.reshape(shape).astype(constant.dtype))
    elif centred:
        put_bias(model, model.graph, layer.node, bias.astype(layer.weight.dtype))
    return Refit(layer.node, before, after)


def _best_bias(moments: Moments, matrices: FloatArray) -> FloatArray:
    return np.asarray(moments.mean_y - np.einsum("gok,gk->go", matrices, moments.mean))


def _best_ridge(parts: list[Moments], start: FloatArray, *, centred: bool) -> float:
    """The ridge that does best on the half of the samples that it was not fitted on.

    Where there are no two halves, the number of inputs over that of rows: near what the trials choose.
    """
    if len(parts) == 1 or min(part.count for part in parts) == 0:
        rows = sum(part.count for part in parts)
        return float(np.clip(start.shape[2] / rows, RIDGES[0], 1.0))

    @cache
    def error(ridge: float) -> float:
        return sum(
            relative_error(other, solve(half, start, ridge, centred=centred), centred=centred)
            for half, other in (parts, parts[::-1])
        )

    decade = RIDGES[len(RIDGES) // 2]
    while (better := min(_near(decade), key=error)) != decade:
        decade = better
    return min((decade, decade / _HALF_DECADE, decade * _HALF_DECADE), key=error)


def _near(ridge: float) -> tuple[float, ...]:
    """A ridge that is tried, and those beside it."""
    at = RIDGES.index(ridge)
    return RIDGES[max(at - 1, 0) : at + 2]


def solve(moments: Moments, start: FloatArray, ridge: float, *, centred: bool = True) -> FloatArray:
    """The weights ``[G, O, K]`` that minimise the squared error over ``moments`` with a pull to ``start``.

    Inputs that never vary keep their weight. ``centred`` says that a bias is fitted beside the weights.
    """
    left, right = _normal_equations(moments, start, ridge, centred=centred)
    return np.asarray(np.linalg.solve(left, right).transpose(0, 2, 1), np.float64)


def _normal_equations(
    moments: Moments, start: FloatArray, ridge: float, *, centred: bool
) -> tuple[FloatArray, FloatArray]:
    if centred:
        gram, cross = moments.covariance, moments.cross_covariance
    else:
        assert moments.cross is not None
        gram, cross = moments.second, moments.cross / max(moments.count, 1)
    diagonal = np.einsum("gkk->gk", gram)
    strength = ridge * diagonal.mean(axis=1)
    strength = np.maximum(strength, 1e-6 * max(float(diagonal.mean()), 1e-30))[:, None, None]
    left = gram + strength * np.eye(gram.shape[1])
    return left, cross + strength * start.transpose(0, 2, 1)


def relative_error(moments: Moments, matrices: FloatArray, *, centred: bool = True) -> float:
    """Mean squared error over the variance of the target, with the best bias."""
    assert moments.sum_yy is not None and moments.cross is not None
    count = max(moments.count, 1)
    if centred:
        gram, cross = moments.covariance, moments.cross_covariance
        power = moments.sum_yy / count - moments.mean_y**2
    else:
        gram, cross, power = moments.second, moments.cross / count, moments.sum_yy / count
    fit = np.einsum("gok,gko->", matrices, cross)
    own = np.einsum("gok,gok->", matrices @ gram, matrices)
    return float(max(power.sum() - 2 * fit + own, 0.0) / max(power.sum(), 1e-30))


def _replace(model: Model, node: gs.Node, slot: int, values: np.ndarray) -> None:
    """Give one input slot new values; other users of the constant keep theirs."""
    old = node.inputs[slot]
    if len(old.outputs) == 1 and not is_graph_output(model.graph, old):
        old.values = values
    else:
        node.inputs[slot] = gs.Constant(model.fresh_name(old.name), values)
