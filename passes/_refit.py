"""Fitting layers one after another to what the original gave: the statistics for it, and whether it helped.

A layer of the working model, whose predecessors have changed already, sees inputs ``x``; the teacher's tensor of the
same name says what it should give, ``y``. Their moments are all that closed-form fits need (He et al. 2017, asymmetric
reconstruction). What an Add joins to the layer may be off already, and the layer makes up for that too. Inputs of
layers that are still to come must not be mixed with the teacher's outputs: each error would be made up for twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim.graph.purity import is_standard
from onnxslim.graph.walk import is_graph_output
from onnxslim.passes._bias import add_behind
from onnxslim.passes._statistics import LinearLayer, Moments

if TYPE_CHECKING:
    from onnxslim.data import Dataset
    from onnxslim.model import Model
    from onnxslim.passes._trunk import Trunk

__all__ = [
    "HELD_BYTES",
    "Split",
    "by_input",
    "channel_weights",
    "loss",
    "moments_between",
    "output_errors",
    "refits",
    "residuals",
]

Array = NDArray[Any]
FloatArray = NDArray[np.float64]

HELD_BYTES = 1 << 27  # of what is held from one layer to the next in memory, and not on disk
MOMENTS_BYTES = 1 << 30  # held at a time for the layers of one group
BATCH = 32
SAMPLES = 512  # more hardly change the fit (400 and 1,000 images gave the same) and each layer runs over all of them
FOLD = 5
WIDEST = 4608  # inputs (512 channels of 3 x 3): moments and their inverse grow with the square and the cube
RIDGES = (1e-2, 3e-1)  # shares of the mean input energy


@dataclass(frozen=True)
class Split:
    """Calibration data in two parts: four fifths of the batches to fit on, one fifth to judge the fit by.

    With fewer than ten samples both parts are all of them.
    """

    data: Dataset

    @property
    def samples(self) -> int:
        """Samples to fit on."""
        seen = min(self.data.samples, SAMPLES)
        return max(1, seen - seen // FOLD) if seen >= 2 * FOLD else max(seen, 1)

    def fitting(self) -> Iterator[dict[str, NDArray[Any]]]:
        """Batches to fit on."""
        return (feed for feed, judge in self.batches() if not judge or self._whole)

    def judging(self) -> Iterator[dict[str, NDArray[Any]]]:
        """Batches to judge by."""
        return (feed for feed, judge in self.batches() if judge or self._whole)

    @property
    def _whole(self) -> bool:
        return self.data.samples < 2 * FOLD

    def feeds(self) -> Iterator[dict[str, NDArray[Any]]]:
        """All batches."""
        return (feed for feed, _ in self.batches())

    def batches(self) -> Iterator[tuple[dict[str, NDArray[Any]], bool]]:
        """All batches, each with whether it is one to judge by."""
        used = self.data.take(SAMPLES)
        size = max(1, min(BATCH, used.samples // (2 * FOLD)))
        for index, feed in enumerate(used.batches(size)):
            yield feed, index % FOLD == FOLD - 1


def by_input(layers: Sequence[LinearLayer]) -> Iterator[list[LinearLayer]]:
    """Layers in their order; those that read one tensor do not depend on each other and share a forward pass.

    Layers of more than ``WIDEST`` inputs are left out.
    """
    groups: dict[str, list[LinearLayer]] = {}
    for layer in (layer for layer in layers if layer.shape[2] <= WIDEST):
        groups.setdefault(layer.data.name, []).append(layer)
    for group in groups.values():
        part: list[LinearLayer] = []
        held = 0
        for layer in group:
            blocks, outputs, inputs = layer.shape
            need = 16 * blocks * inputs * (inputs + outputs)
            if part and held + need > MOMENTS_BYTES:
                yield part
                part, held = [], 0
            part.append(layer)
            held += need
        yield part


def residuals(graph: gs.Graph, groups: Sequence[Sequence[LinearLayer]]) -> dict[int, gs.Tensor]:
    """What an Add joins to the output of layers that can make up for its error, by id of their nodes.

    A layer whose output only that Add reads, an Add of a bias between them aside, when no layer of its group or of a
    later one has a part in what is beside it (section 3.4.1 of He et al. 2017).
    """
    waits: dict[int, int] = {}  # tensor -> the last turn that it depends on
    turns = {id(layer.node): turn for turn, group in enumerate(groups) for layer in group}
    for node in graph.nodes:
        turn = max((waits.get(id(tensor), -1) for tensor in node.inputs), default=-1)
        waits |= {id(tensor): max(turn, turns.get(id(node), -1)) for tensor in node.outputs}
    found: dict[int, gs.Tensor] = {}
    for layer in (layer for group in groups for layer in group):
        bias = add_behind(graph, layer.node, layer.shape[0] * layer.shape[1])
        end = layer.output if bias is None else bias[0].outputs[0]
        user = end.outputs[0] if len(end.outputs) == 1 and not is_graph_output(graph, end) else None
        if user is not None and user.op == "Add" and is_standard(user):
            beside = user.inputs[1 if user.inputs[0] is end else 0]
            if -1 < waits.get(id(beside), -1) < turns[id(layer.node)]:
                found[id(layer.node)] = beside
    return found


def moments_between(
    working: Trunk,
    teacher: Trunk,
    layers: Sequence[LinearLayer],
    data: Split,
    seed: int,
    beside: Mapping[int, gs.Tensor],
) -> list[tuple[Moments, Moments]]:
    """Moments of each layer's input in ``working`` against the teacher's tensor of the layer's output name.

    Both go on over all of ``data`` from the layers before.

    Where `residuals` are ``beside`` a layer, against what makes up for their error too. Two of each: over the batches
    to fit on, and over those to judge by.

    Rows drawn from each sample grow where there are few samples for the width of a layer.

    Raises:
        SlimError: when a model does not run on the feeds.
    """
    found = [Moments.empty(layer.shape[0], layer.shape[2], layer.shape[1]) for layer in layers for _ in range(2)]
    joined = {id(layer.node): beside[id(layer.node)].name for layer in layers if id(layer.node) in beside}
    given = working.step(sorted({layer.data.name for layer in layers} | set(joined.values())))
    wanted = teacher.step(sorted({layer.output.name for layer in layers} | set(joined.values())))
    pending: list[list[tuple[Array, Array]]] = [[] for _ in found]
    rng = np.random.default_rng(seed)

    def flush(index: int) -> None:
        if pending[index]:
            x, y = (np.concatenate(part, axis=1) for part in zip(*pending[index], strict=True))
            found[index].add(x, y)
            pending[index] = []

    for seen, asked, (_, held) in zip(given, wanted, data.batches(), strict=True):
        for index, layer in enumerate(layers):
            y = asked[layer.output.name]
            if (name := joined.get(id(layer.node))) is not None and asked[name].shape == seen[name].shape == y.shape:
                y = y + (asked[name] - seen[name])
            drawn = layer.draw(y.shape, rng, layer.rows_each(data.samples))
            slot = 2 * index + held
            pending[slot].append((layer.input_rows(seen[layer.data.name], drawn), layer.output_rows(y, drawn)))
            # One large product costs far less than many small ones, of which each adds a whole matrix in float64.
            if sum(x.shape[1] for x, _ in pending[slot]) >= layer.shape[2]:
                flush(slot)
    for slot in range(len(found)):
        flush(slot)
    fitting, judging = found[::2], found[1::2]
    return [(fit, test if test.count else fit) for fit, test in zip(fitting, judging, strict=True)]


def refits(matrices: FloatArray, moments: Moments) -> Iterator[FloatArray]:
    """Solutions ``[G, O, K]`` that map the inputs to the targets, drawn weakly and strongly towards ``matrices``.

    None where there are too few rows. Which of them is best, if any is, the judging batches tell: see `loss`.
    """
    inputs = matrices.shape[2]
    if moments.count < 5 * inputs:
        return
    covariance, cross = moments.covariance, moments.cross_covariance
    energy = np.diagonal(covariance, axis1=1, axis2=2)
    for ridge in RIDGES:
        strength = ridge * energy.mean(axis=1) + 1e-10 * energy.max() + 1e-30
        penalty = strength[:, None, None] * np.eye(inputs)
        solved = np.linalg.solve(covariance + penalty, cross + penalty @ matrices.transpose(0, 2, 1))
        if np.isfinite(solved).all():
            yield solved.transpose(0, 2, 1)


def channel_weights(moments: Moments) -> FloatArray:
    """What an error of each output counts, ``[G, O]``: one over its variance, with a floor.

    The scale of a channel says nothing of its worth: a BatchNorm behind it may bring all to one scale.
    """
    assert moments.sum_yy is not None
    variance = np.maximum(moments.sum_yy / max(moments.count, 1) - moments.mean_y**2, 0.0)
    weights: FloatArray = 1.0 / (variance + 1e-2 * variance.mean() + 1e-30)
    normalised: FloatArray = weights / weights.mean()
    return normalised


def loss(matrices: FloatArray, moments: Moments) -> float:
    """Variance of what ``matrices`` ``[G, O, K]`` get wrong about the targets, by channel weight, less a constant."""
    within = np.einsum("gok,gok->go", matrices @ moments.covariance, matrices)
    across = np.einsum("gok,gko->go", matrices, moments.cross_covariance)
    return float((channel_weights(moments) * (within - 2 * across)).sum())


def output_errors(teacher: Model, models: Sequence[Model], data: Split) -> list[float]:
    """Squared error of the outputs relative to the teacher's energy, mean over outputs, for each of ``models``."""
    from onnxslim.runtime import Session

    judge, sessions = Session(teacher), [Session(model) for model in models]
    power: dict[str, float] = {}
    errors: list[dict[str, float]] = [{} for _ in models]
    for feed in data.judging():
        wanted = {n: v for n, v in judge.run(feed).items() if isinstance(v, np.ndarray) and v.dtype.kind in "fiub"}
        for name, value in wanted.items():
            power[name] = power.get(name, 0.0) + float((value.astype(np.float64) ** 2).sum())
        for session, error in zip(sessions, errors, strict=True):
            given = session.run(feed)
            for name, value in wanted.items():
                if given[name].shape == value.shape:
                    gap = given[name].astype(np.float64) - value.astype(np.float64)
                    error[name] = error.get(name, 0.0) + float((gap**2).sum())
    return [float(np.mean([e[n] / max(power[n], 1e-30) for n in e])) if e else 0.0 for e in errors]
