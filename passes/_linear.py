"""Layers whose weights can take up a scale and a shift of what they make or of what they read.

With y = W x + b (a convolution, a matrix product) and per channel c of the result

    s_c y_c + t_c = (s_c W_c) x + (s_c b_c + t_c),

and per channel k of what is read

    W (s x + t) + b = (W_k s_k) x + (b + sum over k of W_k t_k),

the latter with t only where no padding adds zeros that t would have shifted. Jacob et al., arXiv:1712.05877, 3.2.

Numbers are computed in float64 and rounded once, so that results differ from the original by the rounding of the
weights and of one multiply-add, as they would between two runtimes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.passes._match import FLOATS, inner, readable
from onnxslim.passes._rewriter import Rewriter
from onnxslim.passes._rules import Refused

__all__ = [
    "LAYERS",
    "Affine",
    "Layer",
    "cancels",
    "has_padding",
    "input_channels",
    "layer_before",
    "layer_of",
    "per_channel",
    "scale_input",
    "transform_output",
    "vanishes",
]

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")

# A weight that others read too is copied when it is at most this large; the parameters that die pay for some of it.
_COPY_LIMIT = 16 * 1024
# A bias made where there was none may be this much larger than the constant that it replaces: less than a node takes.
_NEW_BIAS_LIMIT = 2 * 1024


@dataclass(frozen=True)
class Affine:
    """y = scale * x + shift: float64 vectors of one number a channel, or of one for all; None where it is 1 or 0."""

    scale: np.ndarray | None
    shift: np.ndarray | None


@dataclass(frozen=True)
class Layer:
    """A Conv, ConvTranspose, Gemm or MatMul, and who adds its bias.

    Attributes:
        node: the node with the weight.
        adder: the node with the bias: the same, or the Add of a vector behind a MatMul.
        bias_at: which input of ``adder`` is the bias, there or not.
        channels: how many channels its result has.
        axis: which axis of its result they are.
        rank: rank of its result; None where that is unknown.
    """

    node: gs.Node
    adder: gs.Node
    bias_at: int
    channels: int
    axis: int
    rank: int | None

    @property
    def result(self) -> gs.Tensor:
        """What the layer makes, bias included."""
        return self.adder.outputs[0]

    @property
    def bias(self) -> gs.Tensor | None:
        """Its bias, where it has one."""
        if len(self.adder.inputs) <= self.bias_at or self.adder.inputs[self.bias_at].is_empty():
            return None
        return self.adder.inputs[self.bias_at]


# -------------------------------------------------------------------------------------------------------------- layers


def layer_before(g: Rewriter, tensor: gs.Tensor, user: gs.Node) -> Layer | Refused:
    """The layer that makes a tensor which ``user`` alone reads, or why there is none."""
    before = g.producer(tensor)
    if before is None:
        return Refused("no node with weights stands before it")
    if inner(g, tensor, user) is None:
        return Refused(f"what the {before.op} before it makes is read elsewhere too")
    if before.op == "Add":
        for side in (0, 1):
            product = inner(g, before.inputs[side], before, "MatMul")
            if product is not None and g.constant(before.inputs[1 - side]) is not None:
                return _matmul_with_bias(g, product, before, 1 - side)
    layer = layer_of(g, before)
    return Refused(f"{before.op} before it has no weights to take it") if layer is None else layer


def layer_of(g: Rewriter, node: gs.Node) -> Layer | None:
    """A node as a layer, a MatMul without bias; None for any other node, and where its channels are unknown."""
    if node.op not in LAYERS:
        return None
    weight = g.constant(node.inputs[1])
    shape = g.shape(node.inputs[1]) if weight is None else list(weight.shape)
    if shape is None or len(shape) < 2:
        return None
    axis, rank, size = -1, 2, shape[-1]
    if node.op in ("Conv", "ConvTranspose"):
        axis, rank = 1, len(shape)
        size = shape[0] if node.op == "Conv" else shape[1]
    elif node.op == "Gemm":
        size = shape[0] if node.attrs.get("transB", 0) else shape[1]
    elif len(shape) != 2:
        return None
    if not isinstance(size, int):
        return None
    groups = int(node.attrs.get("group", 1)) if node.op == "ConvTranspose" else 1
    known = g.rank(node.outputs[0]) if node.op == "MatMul" else rank
    return Layer(node, node, 2, size * groups, axis, known)


def _matmul_with_bias(g: Rewriter, node: gs.Node, add: gs.Node, bias_at: int) -> Layer | Refused:
    layer = layer_of(g, node)
    if layer is None:
        return Refused("the MatMul before it has no weight matrix")
    bias = g.constant(add.inputs[bias_at])
    assert bias is not None
    if per_channel(bias, layer) is None:
        return Refused("the Add before it adds no vector of its channels")
    return Layer(node, add, bias_at, layer.channels, layer.axis, layer.rank)


def per_channel(value: np.ndarray, layer: Layer) -> np.ndarray | None:
    """A constant that is broadcast with the result of a layer, as a vector of one number or of one a channel.

    None where it varies along other axes, or where it would make the result larger.
    """
    if value.ndim > 1 and (layer.rank is None or value.ndim > layer.rank):
        return None
    if value.ndim == 0 or all(size == 1 for size in value.shape):
        return value.reshape(-1)
    place = value.ndim - 1 if layer.axis == -1 else value.ndim - ((layer.rank or 0) - layer.axis)
    if place < 0 or value.shape[place] != layer.channels or value.size != layer.channels:
        return None
    return value.reshape(-1)


def has_padding(node: gs.Node) -> bool:
    """Whether a layer reads zeros around its input; for ConvTranspose, whether its borders differ from the inside."""
    if node.op == "ConvTranspose":
        return True
    return node.op == "Conv" and (node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or _pads(node))


def _pads(node: gs.Node) -> bool:
    return any(int(amount) for amount in node.attrs.get("pads") or ())


# ------------------------------------------------------------------------------------------------------------- numbers


def cancels(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two constants that are added one after the other are there to round what they are added to.

    (x + 12582912) - 12582912 is a way to write Round(x).
    """
    largest = np.maximum(np.abs(first), np.abs(second))
    return bool(((largest >= 1024) & (np.abs(first + second) * 1024 < largest)).any())


def vanishes(wide: np.ndarray, dtype: np.dtype) -> bool:
    """Whether the largest of some numbers is so small that a type rounds all of them more than it does others."""
    largest = np.abs(wide).max(initial=0)
    limits = np.finfo(dtype)
    return bool(0 < largest < limits.tiny / limits.eps)


def input_channels(g: Rewriter, node: gs.Node, value: np.ndarray, x: gs.Tensor) -> np.ndarray | Refused:
    """A constant that is broadcast with ``x``, which a layer then reads, as a vector along its input channels."""
    shape, axis = g.shape(x), -1 if node.op in ("Gemm", "MatMul") else 1
    if node.attrs.get("transA", 0):
        return Refused("the Gemm behind it transposes it")
    if value.ndim == 0:
        return value.reshape(-1)
    if shape is None or len(shape) < value.ndim:
        return Refused("it may change the rank of its operand")
    if all(size == 1 for size in value.shape):
        return value.reshape(-1)
    place = value.ndim - 1 if axis == -1 else value.ndim - (len(shape) - axis)
    if place < 0 or value.shape[place] != value.size or shape[axis] != value.size:
        return Refused("its constant does not hold one number a channel")
    return value.reshape(-1)


def _scale_rows(node: gs.Node, weight: np.ndarray, scale: np.ndarray) -> np.ndarray | Refused:
    """The weight of a layer with the channels of its result scaled, float64."""
    wide = weight.astype(np.float64)
    if scale.size == 1:
        return np.asarray(wide * scale.reshape(()))
    if node.op == "Conv":
        return np.asarray(wide * scale.reshape(-1, *[1] * (weight.ndim - 1)))
    if node.op == "ConvTranspose":
        groups = int(node.attrs.get("group", 1))
        # Weight [inputs, outputs per group, ...]: rows of group i make the channels of group i.
        grouped = wide.reshape(groups, -1, *weight.shape[1:])
        factor = scale.reshape(groups, 1, weight.shape[1], *[1] * (weight.ndim - 2))
        return np.asarray((grouped * factor).reshape(weight.shape))
    return np.asarray(wide * (scale[:, None] if node.attrs.get("transB", 0) else scale))


def _scale_columns(node: gs.Node, weight: np.ndarray, scale: np.ndarray) -> np.ndarray | Refused:
    """The weight of a layer with the channels of its input scaled, float64."""
    wide = weight.astype(np.float64)
    if scale.size == 1:
        return np.asarray(wide * scale.reshape(()))
    if node.op == "Conv":
        groups = int(node.attrs.get("group", 1))
        if weight.shape[1] * groups != scale.size or weight.shape[0] % groups:
            return Refused("its channels are not those of the Conv behind it")
        factor = scale.reshape(groups, 1, weight.shape[1], *[1] * (weight.ndim - 2))
        return np.asarray((wide.reshape(groups, -1, *weight.shape[1:]) * factor).reshape(weight.shape))
    axis = 1 if node.attrs.get("transB", 0) else 0
    if weight.shape[axis] != scale.size:
        return Refused(f"its channels are not those of the {node.op} behind it")
    return np.asarray(wide * scale.reshape([-1 if each == axis else 1 for each in range(weight.ndim)]))


def _shift_of_output(node: gs.Node, weight: np.ndarray, shift: np.ndarray) -> np.ndarray | Refused:
    """What a shift of the input channels adds to each channel of the result of a layer without padding."""
    inputs = weight.shape[1] * int(node.attrs.get("group", 1)) if node.op == "Conv" else weight.shape[0]
    if node.attrs.get("transB", 0):
        inputs = weight.shape[1]
    full = np.broadcast_to(shift, (inputs,)) if shift.size in (1, inputs) else shift
    moved = _scale_columns(node, weight, full)
    if isinstance(moved, Refused):
        return moved
    if node.op == "Conv" or node.attrs.get("transB", 0):
        return np.asarray(moved.reshape(weight.shape[0], -1).sum(axis=1))
    return np.asarray(moved.sum(axis=0))


# --------------------------------------------------------------------------------------------------------------- edits


def transform_output(g: Rewriter, layer: Layer, affine: Affine, freed: int = 0) -> Refused | None:
    """Make a layer compute ``scale * y + shift`` of what it computes; edits nothing where it refuses.

    A MatMul without bias takes no shift. ``freed`` is how many bytes of constants the caller drops.
    """
    node = layer.node
    dtype = g.dtype(node.inputs[1])
    if dtype not in FLOATS or dtype is None:
        return Refused(f"weights of type {dtype} would be rounded noticeably")
    if affine.shift is not None and layer.adder is node and node.op == "MatMul":
        return Refused("a MatMul has no bias")
    weight: np.ndarray | None = None
    if affine.scale is not None:
        found = _constant_weight(g, node)
        if isinstance(found, Refused):
            return found
        scaled = _scale_rows(node, found, affine.scale)
        if isinstance(scaled, Refused):
            return scaled
        narrow = _narrowed(scaled, dtype, strict=affine.shift is None)
        if isinstance(narrow, Refused):
            return narrow
        weight = narrow
    bias = _new_bias(g, layer, affine, dtype, freed)
    if isinstance(bias, Refused):
        return bias
    _write(g, layer, weight, bias)
    return None


def scale_input(g: Rewriter, layer: Layer, affine: Affine, source: gs.Tensor) -> Refused | None:
    """Make a layer read ``source`` in place of ``scale * source + shift``; edits nothing where it refuses."""
    node = layer.node
    dtype = g.dtype(node.inputs[1])
    if dtype not in FLOATS or dtype is None:
        return Refused(f"weights of type {dtype} would be rounded noticeably")
    if not readable(g, node, source):
        return Refused("another tensor of the same name hides its operand")
    old = _constant_weight(g, node)
    if isinstance(old, Refused):
        return old
    weight: np.ndarray | None = None
    if affine.scale is not None:
        scaled = _scale_columns(node, old, affine.scale)
        narrow = scaled if isinstance(scaled, Refused) else _narrowed(scaled, dtype, strict=True)
        if isinstance(narrow, Refused):
            return narrow
        weight = narrow
    bias = None if affine.shift is None else _shifted_bias(g, layer, old, affine.shift, dtype)
    if isinstance(bias, Refused):
        return bias
    g.set_input(node, 0, source)
    _write(g, layer, weight, bias)
    return None


def _shifted_bias(
    g: Rewriter, layer: Layer, weight: np.ndarray, shift: np.ndarray, dtype: np.dtype
) -> np.ndarray | Refused | None:
    """The bias of a layer that reads its input without the shift."""
    node = layer.node
    if has_padding(node):
        return Refused(f"the {node.op} behind it pads with zeros, which it would have shifted")
    if node.op == "MatMul":
        return Refused("a MatMul has no bias")
    moved = _shift_of_output(node, weight, shift)
    if isinstance(moved, Refused):
        return moved
    alpha = float(node.attrs.get("alpha", 1.0)) if node.op == "Gemm" else 1.0
    return _new_bias(g, layer, Affine(None, moved * alpha), dtype, shift.nbytes)


def _constant_weight(g: Rewriter, node: gs.Node) -> np.ndarray | Refused:
    tensor = node.inputs[1]
    weight = g.constant(tensor)
    if weight is None:
        return Refused(f"the weight {tensor.name!r} of the {node.op} is not constant")
    if len(tensor.outputs) != 1 and weight.nbytes > _COPY_LIMIT:
        return Refused(f"the weight {tensor.name!r} is read elsewhere too and is too large to copy")
    return weight


def _new_bias(g: Rewriter, layer: Layer, affine: Affine, dtype: np.dtype, freed: int) -> np.ndarray | Refused | None:
    """The bias of the transformed layer; None where it stays as it is."""
    tensor = layer.bias
    if tensor is None and affine.shift is None:
        return None
    old = np.zeros(1)
    if tensor is not None:
        value = g.constant(tensor)
        if value is None:
            return Refused(f"the bias {tensor.name!r} of the {layer.node.op} is not constant")
        if value.size not in (1, layer.channels) or (value.ndim > 1 and value.size != value.shape[-1]):
            return Refused(f"the {layer.node.op} adds a matrix, not a vector")
        old = value.astype(np.float64).reshape(-1) * _beta(layer.node)
    scaled = old if affine.scale is None else old * affine.scale
    if affine.shift is not None and affine.scale is None and cancels(scaled, affine.shift):
        return Refused("it takes away what the bias adds, which rounds what lies between")
    total = scaled if affine.shift is None else scaled + affine.shift
    if tensor is None and layer.channels * dtype.itemsize > max(_NEW_BIAS_LIMIT, freed):
        return Refused("the bias that it would make is larger than what it removes")
    # Conv and ConvTranspose take a vector of all channels; a number broadcasts everywhere else.
    whole = np.broadcast_to(total, (layer.channels,)) if layer.node.op != "MatMul" else total
    return _narrowed(np.ascontiguousarray(whole), dtype, strict=False)


def _beta(node: gs.Node) -> float:
    return float(node.attrs.get("beta", 1.0)) if node.op == "Gemm" else 1.0


def _narrowed(wide: np.ndarray, dtype: np.dtype, *, strict: bool) -> np.ndarray | Refused:
    """Round once; with ``strict``, only where no number comes out less precise than others."""
    with np.errstate(over="ignore", under="ignore"):
        narrow = wide.astype(dtype)
    if not np.isfinite(narrow).all():
        return Refused("the folded weights would overflow")
    if strict and vanishes(wide, dtype):
        return Refused("the folded weights would lose precision, they are so small")
    return narrow


def _write(g: Rewriter, layer: Layer, weight: np.ndarray | None, bias: np.ndarray | None) -> None:
    node, adder, scope = layer.node, layer.adder, g.scope(layer.node)
    name = node.inputs[1].name
    bias_name = f"{name}_bias" if layer.bias is None else layer.bias.name
    if weight is not None:
        g.set_input(node, 1, g.make_constant(scope, name, weight))
    if bias is None:
        return
    tensor = g.make_constant(scope, bias_name, bias)
    if len(adder.inputs) > layer.bias_at:
        g.set_input(adder, layer.bias_at, tensor)
    else:
        g.add_input(adder, tensor)
    if node.op == "Gemm":
        g.set_attributes(node, beta=1.0)
