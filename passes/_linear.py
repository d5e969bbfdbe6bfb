"""Layers whose weights can take up a scale and a shift: what they are, where their channels and their bias are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.passes._match import inner, only_read_by
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
]

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


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


def layer_before(g: Rewriter, tensor: gs.Tensor, *users: gs.Node) -> Layer | Refused:
    """The layer that makes a tensor which ``users`` alone read, or why there is none."""
    before = g.producer(tensor)
    if before is None:
        return Refused("no node with weights stands before it")
    if not only_read_by(g, tensor, users) or g.scope(before) is not g.scope(users[0]):
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
