"""Transposes that undo each other across the nodes between them.

Exporters of channels-last frameworks put a Transpose before and behind every convolution. What stands between two of
them is mostly element-wise, and so can run in the other layout just as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.passes._rewriter import Rewriter
from onnxslim.passes._rules import Rule, rule

__all__ = ["TRANSPOSE_RULES", "UNARY", "may_move", "twin"]

# Input 0 is what they work on, element by element; the others hold one number each.
UNARY = frozenset(
    {
        *("Abs", "Cast", "Ceil", "Celu", "Clip", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid"),
        *("HardSwish", "Identity", "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu"),
        *("Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Tanh", "ThresholdedRelu"),
        *("QuantizeLinear", "DequantizeLinear"),
    }
)
_BROADCASTING = frozenset(
    {
        *("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Sum", "Mean", "PRelu", "Where", "And", "Or", "Xor"),
        *("Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual"),
    }
)
# From these versions on, the axis is one axis, and no flattening of all behind it.
_ALONG_AXIS = {"Softmax": 13, "LogSoftmax": 13, "Concat": 4}
_MOST_NODES = 64
_LARGEST_CONSTANT = 1 << 20


@dataclass
class _Region:
    """What lies between a Transpose and those that it undoes.

    Attributes:
        perm: of the Transpose behind it.
        nodes: what must run in the other layout, producers first.
        leaves: id of a tensor that a Transpose before it makes -> what that Transpose reads.
    """

    perm: list[int]
    nodes: list[gs.Node] = field(default_factory=list)
    leaves: dict[int, gs.Tensor] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)


@rule("cancel-transposes", "Transpose", since=7)
def _cancel(g: Rewriter, node: gs.Node) -> str | None:
    """Transpose(f(Transpose(x, p), c), q) -> f(x, Transpose(c, q)) where q undoes p and f goes element by element.

    Several nodes may lie between, and several Transposes before them, as long as nobody else reads what is between.
    """
    perm = node.attrs.get("perm")
    if perm is None or g.producer(node.inputs[0], "Transpose") is not None:
        return None
    region = _Region([int(axis) for axis in perm])
    if not _collect(g, node.inputs[0], node, region) or not region.leaves or not _is_closed(g, region, node):
        return None
    made: dict[int, gs.Tensor] = dict(region.leaves)
    for each in region.nodes:
        made[id(each.outputs[0])] = twin(g, each, region.perm, made)
    moved = made[id(node.inputs[0])]
    return f"undone across {len(region.nodes)} nodes" if g.bypass(node, moved) else None


def _collect(g: Rewriter, tensor: gs.Tensor, user: gs.Node, region: _Region) -> bool:
    """Walk from a tensor to the Transposes before it; whether all of them are undone by the one behind."""
    if id(tensor) in region.seen:
        return True
    if _constant_shape(g, tensor) is not None:
        return True
    region.seen.add(id(tensor))
    node = g.producer(tensor)
    if node is None or g.rank(tensor) != len(region.perm) or len(region.nodes) >= _MOST_NODES:
        return False
    if node.op == "Transpose":
        first = node.attrs.get("perm")
        undone = first is not None and [first[axis] for axis in region.perm] == list(range(len(region.perm)))
        if undone and g.is_visible(g.scope(user), node.inputs[0]):
            region.leaves[id(tensor)] = node.inputs[0]
        return undone and id(tensor) in region.leaves
    if g.scope(node) is not g.scope(user) or len(node.outputs) != 1 or not may_move(g, node):
        return False
    data = node.inputs[:1] if node.op in UNARY else node.inputs
    if not all(_collect(g, each, node, region) for each in data):
        return False
    region.nodes.append(node)
    return True


def may_move(g: Rewriter, node: gs.Node) -> bool:
    """Whether a node does the same in any layout, but for its axis and the constants that it reads."""
    if node.op in UNARY:
        return all(_is_single(g, tensor) for tensor in node.inputs[1:])
    return node.op in _BROADCASTING or g.opset(node) >= _ALONG_AXIS.get(node.op, 1 << 30)


def _is_single(g: Rewriter, tensor: gs.Tensor) -> bool:
    return tensor.is_empty() or g.static_shape(tensor) in ([], [1])


def _constant_shape(g: Rewriter, tensor: gs.Tensor) -> list[int] | None:
    """The shape of a constant that may be stored anew in the other layout."""
    if not isinstance(tensor, gs.Constant) and g.producer(tensor, "Constant") is None:
        return None
    shape, dtype = g.static_shape(tensor), g.dtype(tensor)
    if shape is None or dtype is None or int(np.prod(shape)) * dtype.itemsize > _LARGEST_CONSTANT:
        return None
    grows = int(np.prod(shape)) > 64 and len(tensor.outputs) > 1
    return None if grows else shape


def _is_closed(g: Rewriter, region: _Region, last: gs.Node) -> bool:
    """Whether nobody else reads what lies between, so that it need not be there in both layouts."""
    inside = {id(node) for node in region.nodes} | {id(last)}
    return all(
        not g.is_output(node.outputs[0]) and all(id(user) in inside for user in node.outputs[0].outputs)
        for node in region.nodes
    )


def twin(g: Rewriter, node: gs.Node, perm: list[int], made: dict[int, gs.Tensor]) -> gs.Tensor:
    """The same node in the layout that ``perm`` makes; its inputs in that layout are in ``made``, by id."""
    attrs = dict(node.attrs)
    if node.op in _ALONG_AXIS:
        axis = int(attrs.get("axis", -1))
        attrs["axis"] = perm.index(axis % len(perm))
    inputs = list(node.inputs)
    for index, tensor in enumerate(inputs[:1] if node.op in UNARY else inputs):
        inputs[index] = made[id(tensor)] if id(tensor) in made else _laid_out(g, node, tensor, perm)
    result = g.insert_before(node, node.op, attrs, inputs)
    twin = result.inputs[0]
    for carried in ("header", "attribute_docs", "attribute_types"):
        if carried in node.__dict__:
            setattr(twin, carried, getattr(node, carried))
    return result


def _laid_out(g: Rewriter, node: gs.Node, tensor: gs.Tensor, perm: list[int]) -> gs.Tensor:
    """A constant as it is broadcast in the other layout."""
    value = g.constant(tensor)
    assert value is not None
    if value.size == 1 and value.ndim <= 1:
        return tensor
    wide = value.reshape((1,) * (len(perm) - value.ndim) + value.shape)
    return g.make_constant(g.scope(node), tensor.name, np.ascontiguousarray(wide.transpose(perm)))


@rule("merge-transposes", *_BROADCASTING, since=7)
def _merge(g: Rewriter, node: gs.Node) -> str | None:
    """f(Transpose(x, p), Transpose(y, p)) -> Transpose(f(x, y), p), where nobody else reads either."""
    perms = []
    for tensor in node.inputs:
        inner = g.producer(tensor, "Transpose")
        if inner is None or not g.is_sole_user(node, tensor) or not g.is_visible(g.scope(node), inner.inputs[0]):
            return None
        perms.append(inner.attrs.get("perm"))
    if len(perms) < 2 or perms[0] is None or any(perm != perms[0] for perm in perms):
        return None
    sources = [tensor.inputs[0].inputs[0] for tensor in node.inputs]
    op = node.op
    result = g.insert_before(node, op, dict(node.attrs), sources)
    g.rewrite(node, "Transpose", {"perm": list(perms[0])}, [result])
    return f"transposed behind the {op} instead of before it"


TRANSPOSE_RULES: tuple[Rule, ...] = (_cancel, _merge)
