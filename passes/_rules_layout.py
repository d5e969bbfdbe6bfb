"""Convolutions along one axis, laid out so that this axis is the last one.

Frameworks without one-dimensional layers spell them as k x 1 kernels over maps of width 1. Kernels for convolutions
make several elements of a row at a time, and in rows of one element there is nothing to do at a time: a network of
such layers takes ONNX Runtime 1.6 times as long in float, and twice as long in int8, as the same one lying down.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import onnx_graphsurgeon as gs

from onnxslim.graph.purity import is_standard
from onnxslim.model import Model
from onnxslim.passes._rewriter import Rewriter, has_plain_attributes
from onnxslim.passes._rules import Rule, rule
from onnxslim.passes._rules_transpose import UNARY, may_move, twin

__all__ = ["LAYOUT_RULES", "has_standing_convolutions"]

_SWAP = [0, 1, 3, 2]
_WEIGHTED = frozenset({"Conv", "ConvTranspose"})
_POOLS = frozenset({"MaxPool", "AveragePool"})
_BY_CHANNEL = frozenset({"BatchNormalization", "InstanceNormalization", "GlobalAveragePool", "GlobalMaxPool"})
_PER_AXIS = ("kernel_shape", "strides", "dilations", "pads", "output_padding", "output_shape")


@dataclass
class _Region:
    """Connected nodes that can run lying down.

    Attributes:
        nodes: by id.
        standing: convolutions that gain by it.
        entering, leaving: tensors that must be turned at the border, by id.
    """

    nodes: dict[int, gs.Node] = field(default_factory=dict)
    standing: int = 0
    entering: dict[int, gs.Tensor] = field(default_factory=dict)
    leaving: dict[int, gs.Tensor] = field(default_factory=dict)


def has_standing_convolutions(model: Model) -> bool:
    """Whether any convolution of a model has a k x 1 kernel."""
    return any(
        node.op == "Conv" and len(node.inputs) > 1 and _stands(list(node.inputs[1].shape or ()))
        for graph in model.graphs()
        for node in graph.nodes
    )


def _stands(weight: list[Any]) -> bool:
    return len(weight) == 4 and weight[3] == 1 and isinstance(weight[2], int) and weight[2] > 1


@rule("lay-down", "Conv")
def _lay_down(g: Rewriter, node: gs.Node) -> str | None:
    """Conv with a k x 1 kernel over (n, c, l, 1) -> Conv with a 1 x k kernel over (n, c, 1, l).

    So with all nodes around it that can do the same; what enters and leaves them is transposed, which moves nothing.
    """
    if not _gains(g, node):
        return None
    region = _region(g, node)
    if len(region.entering) + len(region.leaving) > 2 * region.standing:
        return None
    made: dict[int, gs.Tensor] = {}
    ordered = sorted(region.nodes.values(), key=g.order)
    for each in ordered:
        for tensor in each.inputs:
            if id(tensor) in region.entering and id(tensor) not in made:
                made[id(tensor)] = g.insert_before(each, "Transpose", {"perm": _SWAP}, [tensor])
        made[id(each.outputs[0])] = _lying(g, each, made)
    for each in ordered:
        tensor = each.outputs[0]
        lying = made[id(tensor)]
        if id(tensor) in region.leaving:
            g.bypass(each, g.insert_before(each, "Transpose", {"perm": _SWAP}, [lying]))
        elif any(id(user) not in region.nodes for user in tensor.outputs) or g.is_output(tensor):
            g.bypass(each, lying)
    return f"laid down with {len(ordered) - 1} nodes around it"


def _gains(g: Rewriter, node: gs.Node) -> bool:
    weight = g.static_shape(node.inputs[1]) if len(node.inputs) > 1 else None
    return weight is not None and _stands(weight) and _may_lie(g, node)


def _region(g: Rewriter, seed: gs.Node) -> _Region:
    """All nodes that are connected to a convolution through maps of width 1 and can run lying down."""
    region = _Region()
    stack = [seed]
    while stack:
        node = stack.pop()
        if id(node) in region.nodes or g.scope(node) is not g.scope(seed) or not _may_lie(g, node):
            continue
        region.nodes[id(node)] = node
        region.standing += node.op == "Conv" and _gains(g, node)
        stack += [maker for tensor in _data(g, node) if (maker := g.producer(tensor)) is not None]
        stack += [user for user in node.outputs[0].outputs if is_standard(user) and has_plain_attributes(user)]
    for node in region.nodes.values():
        for tensor in _data(g, node):
            if not any(id(maker) in region.nodes for maker in tensor.inputs) and not _is_point(g, tensor):
                region.entering[id(tensor)] = tensor
        tensor = node.outputs[0]
        read_outside = g.is_output(tensor) or any(id(user) not in region.nodes for user in tensor.outputs)
        if read_outside and not _is_point(g, tensor):
            region.leaving[id(tensor)] = tensor
    return region


def _data(g: Rewriter, node: gs.Node) -> list[gs.Tensor]:
    """The inputs of a node that are maps, and computed."""
    inputs = node.inputs[:1] if node.op in _WEIGHTED | _POOLS | _BY_CHANNEL | UNARY else node.inputs
    return [tensor for tensor in inputs if g.constant(tensor) is None]


def _may_lie(g: Rewriter, node: gs.Node) -> bool:
    """Whether a node does the same to maps that lie, and gets and gives none that are not of width 1."""
    if len(node.outputs) != 1 or g.output_count(node.outputs[0]) > 1:
        return False
    if node.op in _WEIGHTED:
        shape = g.static_shape(node.inputs[1]) if g.constant(node.inputs[1]) is not None else None
        if shape is None or (len(node.inputs[1].outputs) > 1 and shape[2:] != [1, 1]):
            return False
    elif node.op == "BatchNormalization":
        if node.attrs.get("training_mode", 0):
            return False
    elif node.op not in _POOLS | _BY_CHANNEL and not may_move(g, node):
        return False
    data = _data(g, node)
    return bool(data) and all(_is_narrow(g, tensor) for tensor in (*data, node.outputs[0]))


def _is_narrow(g: Rewriter, tensor: gs.Tensor) -> bool:
    shape = g.shape(tensor)
    return shape is not None and len(shape) == 4 and isinstance(shape[3], int) and shape[3] == 1


def _is_point(g: Rewriter, tensor: gs.Tensor) -> bool:
    """Whether a narrow map is of height 1 too, so that it looks the same lying down."""
    shape = g.shape(tensor)
    return shape is not None and isinstance(shape[2], int) and shape[2] == 1


def _lying(g: Rewriter, node: gs.Node, made: dict[int, gs.Tensor]) -> gs.Tensor:
    """The same node lying down."""
    if node.op not in _WEIGHTED | _POOLS | _BY_CHANNEL:
        return twin(g, node, _SWAP, made)
    attrs = dict(node.attrs)
    for name in _PER_AXIS:
        if name in attrs:
            attrs[name] = [attrs[name][index ^ 1] for index in range(len(attrs[name]))]
    inputs = [made.get(id(node.inputs[0]), node.inputs[0]), *node.inputs[1:]]
    if node.op in _WEIGHTED:
        weight = g.constant(node.inputs[1])
        assert weight is not None
        if weight.shape[2:] != (1, 1):
            inputs[1] = g.make_constant(g.scope(node), node.inputs[1].name, weight.swapaxes(2, 3))
    return g.insert_before(node, node.op, attrs, inputs)


LAYOUT_RULES: tuple[Rule, ...] = (_lay_down,)
