"""Moving and scaling the channels of what layers read, such that one step fits all of them.

Activations have one scale and zero a tensor, so a channel of small values has few codes beside one of large values.
``t`` becomes ``(t - c) / d``, a number each a channel, where whatever makes ``t`` can divide by ``d`` and whatever
reads it can multiply its weight by ``d`` and add ``W c`` to its bias: the float model stays the same. That is
cross-layer equalization and the absorption of high biases (Nagel et al. 2019, Data-Free Quantization) between
convolutions, SmoothQuant (Xiao et al. 2023) and its shifts (Wei et al. 2023, Outlier Suppression+) behind
normalization. Where other nodes read ``t`` too, a Mul in front of the layers divides. A Clip between (ReLU6) does not
scale with its channel: moving its bound with the largest value seen made networks worse, so there nothing is done.

Scales are ``a ** alpha / w ** (1 - alpha)`` of the largest activation ``a`` and weight ``w`` of each channel. ``alpha``
is found for each tensor by the noise that it predicts at the output of its readers: that of rounding ``t`` through the
weight, and that of rounding the weight, whose scale is per output channel, through the energy of ``t``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim.graph.walk import insert_early, is_graph_output
from onnxslim.passes._bias import add_behind, add_to_bias, bias_of
from onnxslim.passes._placement import Placement
from onnxslim.passes._qdq import CODE_LIMIT, LEVELS
from onnxslim.passes._statistics import LinearLayer, linear_layer
from onnxslim.runtime import Session

if TYPE_CHECKING:
    from onnxslim.model import Model

__all__ = ["Equalization", "apply_equalizations", "find_equalizations", "single"]

FloatArray = NDArray[np.float64]
Feed = dict[str, np.ndarray]

_ALPHAS = np.linspace(0.0, 1.0, 11)
_MOST_STRETCH = 64.0  # of a channel beside the largest one: what calibration saw of a dead channel may not be all
_ENOUGH = 0.8  # times the noise before: a tensor that gains less is left alone
_ENOUGH_FOR_MUL = 0.5
_ONE_BY_ONE = ("Relu", "LeakyRelu", "Identity")
_WINDOWS = ("MaxPool", "AveragePool", "GlobalAveragePool")


@dataclass(frozen=True)
class Equalization:
    """What is done to the channels of one tensor: it becomes ``(t - shift) / scale``.

    Attributes:
        name: of the tensor.
        shift, scale: ``[channels]``; numbers that float32 holds.
        noise: predicted at its readers, as a share of that before.
    """

    name: str
    shift: FloatArray
    scale: FloatArray
    noise: float


@dataclass
class _Site:
    """A tensor that only layers with weights read, and the parameters that its channels come from.

    Attributes:
        readers: layers that read the tensor, with weights of their own.
        factors: nodes and the input of each that holds parameters to be divided.
        offset: of these the last one that is added; None: the tensor cannot be shifted.
        floor: a shift may not reach above the least value, as a Relu stands behind the offset.
        averaged: a window of several elements stands between, of which a single one is not known.
        inserted: nothing divides but a Mul that is put in front of the readers.
        changed: names of the tensors that hold other numbers once it is scaled: from what divides to the readers, and
            what a MatMul gives whose bias is added behind it.
    """

    tensor: gs.Tensor
    readers: list[LinearLayer]
    channels: int
    rank: int | None
    factors: list[tuple[gs.Node, int]] = field(default_factory=list)
    offset: tuple[gs.Node, int] | None = None
    floor: bool = False
    averaged: bool = False
    inserted: bool = False
    changed: list[str] = field(default_factory=list)

    def columns(self, layer: LinearLayer) -> FloatArray:
        """The weight of a reader, ``[G, O, C / G, taps]``."""
        groups, outputs, _ = layer.shape
        values = np.asarray(layer.weight.values, np.float64)
        return np.asarray(layer.rows_of(values).reshape(groups, outputs, self.channels // groups, -1))


def single(values: FloatArray) -> FloatArray:
    """Numbers that float32 holds: what is stored in a plan is the same afterwards."""
    return np.asarray(values.astype(np.float32), np.float64)


def find_equalizations(
    model: Model, placement: Placement, feeds: Iterable[Feed], *, symmetric: bool, spare: bool = False
) -> list[Equalization]:
    """Find the tensors that gain from another scale for each channel, by what the feeds hold.

    Args:
        model: opset 13 or later, not changed.
        placement: of the graph of ``model``.
        feeds: what to run, streamed once.
        symmetric: whether activations have a zero point of 0.
        spare: hold few tensors of a feed at a time, which takes longer.
    """
    sites = list(_sites(model, placement))
    seen = _statistics(model.copy(), sites, feeds, spare=spare)
    found = [_best(site, *seen[site.tensor.name], symmetric=symmetric) for site in sites]
    return [each for each in found if each is not None]


def apply_equalizations(model: Model, placement: Placement, wanted: Iterable[Equalization]) -> set[str]:
    """Rewrite the parameters around each tensor; the arrays that others may hold stay as they are.

    Returns:
        The names of the tensors that hold other numbers now, new ones included.
    """
    by_name = {each.name: each for each in wanted}
    changed: set[str] = set()
    for site in _sites(model, placement):  # one after another: a weight may be changed from both of its sides
        if site.tensor.name in by_name:
            _apply(model, site, by_name[site.tensor.name])
            changed.update(site.changed)
    return changed


# ---------------------------------------------------------------------------------------------------------------- sites


def _sites(model: Model, placement: Placement) -> Iterator[_Site]:
    """The tensors whose channels can be scaled, in the order of the graph."""
    anchors = {id(anchor.node): anchor for anchor in placement.anchors.values()}
    read = {id(anchor.node.inputs[0]): anchor.node.inputs[0] for anchor in anchors.values()}
    for tensor in read.values():
        nodes = [node for node in tensor.outputs if id(node) in anchors and node.inputs[0] is tensor]
        layers = [layer for node in nodes if (layer := linear_layer(node)) is not None and _own(node, 1)]
        kinds = {layer.spatial for layer in layers}
        if len(layers) < len(nodes) or len(kinds) != 1:
            continue
        first = layers[0]
        channels = int(first.weight.shape[1]) * first.groups if first.spatial else first.shape[2]
        site = _Site(tensor, layers, channels, anchors[id(nodes[0])].rank if first.spatial else None)
        shared = len(nodes) < len(tensor.outputs) or is_graph_output(model.graph, tensor)
        if not shared and _trace(site, model.graph):
            if not all(_takes_shift(layer, model.graph) for layer in layers):
                site.offset = None
            yield site
        elif not first.spatial and tensor.name in placement.fed:
            yield _Site(tensor, layers, channels, None, inserted=True)


def _own(node: gs.Node, slot: int) -> bool:
    """Whether an input is a float32 constant that nothing else reads."""
    if len(node.inputs) <= slot:
        return False
    tensor = node.inputs[slot]
    return isinstance(tensor, gs.Constant) and tensor.dtype == np.float32 and len(tensor.outputs) == 1


def _trace(site: _Site, graph: gs.Graph) -> bool:
    """Walk back to the parameters that give a tensor its channels; False where there is no such way."""
    tensor = site.tensor
    while len(tensor.inputs) == 1:
        node = tensor.inputs[0]
        site.changed.append(tensor.name)
        if tensor is not site.tensor and (len(tensor.outputs) != 1 or is_graph_output(graph, tensor)):
            return False
        if node.domain or len([output for output in node.outputs if output.name]) != 1:
            return False
        if node.op in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            return _layer_factors(site, node)
        if node.op == "LayerNormalization":
            return _norm_factors(site, node)
        if node.op in ("Add", "Mul"):
            slot = next((slot for slot in (0, 1) if _own(node, slot) and _is_vector(site, node.inputs[slot])), None)
            if slot is None:
                return False
            site.factors.append((node, slot))
            if node.op == "Mul":
                return True
            site.offset = site.offset or (node, slot)
            tensor = node.inputs[1 - slot]
            continue
        if node.op not in _ONE_BY_ONE and not (site.rank is not None and node.op in _WINDOWS):
            return False
        site.floor = site.floor or node.op != "Identity"
        site.averaged = site.averaged or node.op in _WINDOWS
        tensor = node.inputs[0]
    return False


def _layer_factors(site: _Site, node: gs.Node) -> bool:
    layer = linear_layer(node)
    if layer is None or layer.spatial != (site.rank is not None) or not _own(node, 1):
        return False
    if layer.shape[0] * layer.shape[1] != site.channels:
        return False
    return _parameters(site, node)


def _norm_factors(site: _Site, node: gs.Node) -> bool:
    """Of a LayerNormalization over the last axis alone."""
    if site.rank is not None or int(node.attrs.get("axis", -1)) != -1 or not _own(node, 1):
        return False
    if list(node.inputs[1].shape) != [site.channels]:
        return False
    return _parameters(site, node)


def _parameters(site: _Site, node: gs.Node) -> bool:
    """Take the weight of a node, and its bias, which may be missing; False where something else reads that."""
    site.factors.append((node, 1))
    if node.op != "MatMul":
        if len(node.inputs) > 2 and not node.inputs[2].is_empty():
            if not _own(node, 2):
                return False
            site.factors.append((node, 2))
        site.offset = site.offset or (node, 2)
    return True


def _is_vector(site: _Site, tensor: gs.Constant) -> bool:
    """Whether a constant has one number for each channel, along their axis."""
    trailing = 0 if site.rank is None else site.rank - 2
    shape = tuple(tensor.shape)
    return shape[-(trailing + 1) :] == (site.channels, *[1] * trailing) and int(np.prod(shape)) == site.channels


def _takes_shift(layer: LinearLayer, graph: gs.Graph) -> bool:
    """Whether a constant can be added to what a reader gives for a shifted input, without a node of its own."""
    node, outputs = layer.node, layer.shape[0] * layer.shape[1]
    if layer.spatial and (isinstance(layer.pads, str) or any(layer.pads)):
        return False  # padding is zero, not the shift
    if node.op == "MatMul":
        return add_behind(graph, node, outputs) is not None
    return bias_of(node, outputs) is not None


# ----------------------------------------------------------------------------------------------------------- statistics


def _statistics(
    model: Model, sites: list[_Site], feeds: Iterable[Feed], *, spare: bool
) -> dict[str, tuple[FloatArray, FloatArray, FloatArray, FloatArray]]:
    """The least and largest value, the mean and the mean square of each channel, by name of the tensor."""
    tensors = {tensor.name: tensor for tensor in model.graph.inputs}
    tensors |= {tensor.name: tensor for node in model.graph.nodes for tensor in node.outputs}
    watching = {site.tensor.name: _fetch(model, site, tensors[site.tensor.name]) for site in sites}
    if not watching:
        return {}
    insert_early(model.graph, [node for nodes in watching.values() for node in nodes])
    fetched = {name: [node.outputs[0].name for node in nodes[-4:]] for name, nodes in watching.items()}
    session = Session(model, outputs=[name for names in fetched.values() for name in names], spare=spare)
    parts: dict[str, list[FloatArray]] = {name: [] for name in fetched}
    for feed in feeds:
        found = session.run(feed)
        for name, names in fetched.items():
            parts[name].append(np.array([found[each].reshape(-1) for each in names], np.float64))
    seen = {name: np.array(rows) for name, rows in parts.items()}  # [feeds, 4, channels]
    return {
        name: (rows[:, 0].min(axis=0), rows[:, 1].max(axis=0), rows[:, 2].mean(axis=0), rows[:, 3].mean(axis=0))
        for name, rows in seen.items()
    }


def _fetch(model: Model, site: _Site, tensor: gs.Tensor) -> list[gs.Node]:
    """What is fetched of a tensor: the results of the last four nodes."""
    nodes: list[gs.Node] = []
    if site.rank is None:
        shape = gs.Constant(model.fresh_name("rows"), np.array([-1, site.channels], np.int64))
        rows = gs.Variable(model.fresh_name(f"{tensor.name}_rows"), np.float32)
        nodes.append(gs.Node("Reshape", rows.name, inputs=[tensor, shape], outputs=[rows]))
        tensor, axes = rows, [0]
    else:
        axes = [axis for axis in range(site.rank) if axis != 1]
    square = gs.Variable(model.fresh_name(f"{tensor.name}_square"), np.float32)
    nodes.append(gs.Node("Mul", square.name, inputs=[tensor, tensor], outputs=[square]))
    for op, source in (("ReduceMin", tensor), ("ReduceMax", tensor), ("ReduceMean", tensor), ("ReduceMean", square)):
        result = gs.Variable(model.fresh_name(f"{tensor.name}_{op}"), np.float32)
        node = gs.Node(op, result.name, {"keepdims": 0}, inputs=[source], outputs=[result])
        if model.opset < 18:
            node.attrs["axes"] = axes
        else:
            node.inputs.append(gs.Constant(model.fresh_name(f"{result.name}_axes"), np.array(axes, np.int64)))
        nodes.append(node)
    return nodes


# --------------------------------------------------------------------------------------------------------------- choice


def _best(
    site: _Site, low: FloatArray, high: FloatArray, mean: FloatArray, square: FloatArray, *, symmetric: bool
) -> Equalization | None:
    """The shift and scale with the least predicted noise; None where they do not gain enough."""
    if not all(np.isfinite(values).all() for values in (low, high, mean, square)):
        return None
    weights = [site.columns(layer) for layer in site.readers]
    nothing = np.zeros(site.channels), np.ones(site.channels)
    before = _noise(weights, low, high, square, nothing[1], symmetric=symmetric)
    if not before > 0:
        return None
    best = Equalization(site.tensor.name, *nothing, 1.0)
    shifts = [nothing[0]]
    if (middle := _shift(site, low, high)) is not None:
        shifts.append(middle)
    for shift in shifts:
        lower, upper = low - shift, high - shift
        energy = np.maximum(square - 2 * shift * mean + shift**2, 0.0)
        for scale in _scales(weights, np.maximum(np.abs(lower), np.abs(upper))):
            noise = _noise(weights, lower, upper, energy, scale, symmetric=symmetric) / before
            if noise < best.noise:
                best = Equalization(site.tensor.name, shift, scale, noise)
    return best if best.noise <= (_ENOUGH_FOR_MUL if site.inserted else _ENOUGH) else None


def _shift(site: _Site, low: FloatArray, high: FloatArray) -> FloatArray | None:
    """What can be taken off each channel; None where nothing can."""
    if site.offset is None or site.averaged:
        return None
    # What lies below the shift is lost in a Relu: what other data may hold is left out.
    shift = np.maximum(low - (high - low) / 2, 0.0) if site.floor else (low + high) / 2
    return single(shift)


def _scales(weights: list[FloatArray], largest: FloatArray) -> Iterator[FloatArray]:
    """Candidates, which leave the largest value of the tensor as it is."""
    most = float(largest.max())
    if not most > 0:
        return
    reach = np.maximum(largest, most / _MOST_STRETCH)
    heaviest = np.max([np.abs(weight).max(axis=(1, 3)).reshape(-1) for weight in weights], axis=0)
    heaviest = np.maximum(heaviest, max(float(heaviest.max()) / _MOST_STRETCH, 1e-30))
    for alpha in _ALPHAS:
        scale = reach**alpha / heaviest ** (1 - alpha)
        scale *= float((reach / scale).max()) / most
        yield single(scale)


def _noise(
    weights: list[FloatArray],
    low: FloatArray,
    high: FloatArray,
    square: FloatArray,
    scale: FloatArray,
    *,
    symmetric: bool,
) -> float:
    """The predicted squared error at all outputs of the readers, for a tensor divided by ``scale``."""
    ends = min(float((low / scale).min()), 0.0), max(float((high / scale).max()), 0.0)
    step = max(-ends[0], ends[1]) / CODE_LIMIT if symmetric else (ends[1] - ends[0]) / LEVELS
    total = 0.0
    for weight in weights:
        groups, _, channels, taps = weight.shape
        scaled = np.abs(weight) * scale.reshape(groups, 1, channels, 1)
        total += step**2 * float(np.square(scaled).sum())
        steps = scaled.max(axis=(2, 3)) / CODE_LIMIT
        energy = taps * (square / scale**2).reshape(groups, channels).sum(axis=1)
        total += float((np.square(steps) * energy[:, None]).sum())
    return total / 12


# -------------------------------------------------------------------------------------------------------------- rewrite


def _apply(model: Model, site: _Site, chosen: Equalization) -> None:
    if site.inserted:
        _insert(model, site, chosen.scale)
    for node, slot in site.factors:
        layer = linear_layer(node) if node.op in ("Conv", "ConvTranspose", "Gemm", "MatMul") else None
        old = np.asarray(node.inputs[slot].values, np.float64)
        if layer is not None and slot == 1:
            rows = layer.rows_of(old) / chosen.scale.reshape(layer.shape[0], layer.shape[1], 1)
            _replace(model, node, slot, layer.stored_as(rows))
        elif layer is not None:
            _replace(model, node, slot, np.broadcast_to(old.reshape(-1), (site.channels,)) / chosen.scale)
        else:
            _replace(model, node, slot, old / chosen.scale.reshape(old.shape))
    if chosen.shift.any():
        assert site.offset is not None
        _add(model, *site.offset, -chosen.shift / chosen.scale)
    for layer in site.readers:
        weight = site.columns(layer)
        if chosen.shift.any():
            moved = weight.sum(axis=3) @ chosen.shift.reshape(weight.shape[0], -1, 1)
            add_to_bias(model, model.graph, layer.node, moved.reshape(-1))
            if layer.node.op == "MatMul":
                site.changed.append(layer.node.outputs[0].name)
        weight = weight * chosen.scale.reshape(weight.shape[0], 1, -1, 1)
        _replace(model, layer.node, 1, layer.stored_as(weight.reshape(layer.shape)))


def _insert(model: Model, site: _Site, scale: FloatArray) -> None:
    """Divide in front of the readers."""
    factor = gs.Constant(model.fresh_name(f"{site.tensor.name}_e"), (1 / scale).astype(np.float32))
    result = gs.Variable(model.fresh_name(f"{site.tensor.name}_equalized"), np.float32, site.tensor.shape)
    for layer in site.readers:
        layer.node.inputs[0] = result
    site.changed.append(result.name)
    insert_early(model.graph, [gs.Node("Mul", result.name, inputs=[site.tensor, factor], outputs=[result])])


def _add(model: Model, node: gs.Node, slot: int, values: FloatArray) -> None:
    """Add to a vector that is added, which may be missing."""
    if len(node.inputs) > slot and not node.inputs[slot].is_empty():
        old = np.asarray(node.inputs[slot].values, np.float64)
        _replace(model, node, slot, old + values.reshape(old.shape))
        return
    constant = gs.Constant(model.fresh_name(f"{node.outputs[0].name}_b"), values.astype(np.float32))
    if len(node.inputs) > slot:
        node.inputs[slot] = constant
    else:
        node.inputs.append(constant)


def _replace(model: Model, node: gs.Node, slot: int, values: FloatArray) -> None:
    old = node.inputs[slot]
    node.inputs[slot] = gs.Constant(model.fresh_name(old.name), np.asarray(values, np.float32))
