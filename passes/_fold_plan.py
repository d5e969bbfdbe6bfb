"""Which constant nodes to fold, so that the file does not grow beyond a limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnxslim.passes._rewriter import Rewriter

__all__ = ["Plan", "plan"]

# What a tensor costs in a file beside its bytes and its name: tags, lengths, dims, type.
_TENSOR_OVERHEAD = 24
_NODE_OVERHEAD = 16


@dataclass(frozen=True)
class Plan:
    """What to fold.

    Attributes:
        nodes: nodes to evaluate and remove, in the order given.
        results: the tensors that must become constants: those that others read.
        refused: results that were given up, with the bytes by which the file would have grown.
        growth: bytes by which the groups that make the file grow do so, together.
    """

    nodes: list[gs.Node]
    results: list[gs.Tensor]
    refused: list[tuple[gs.Tensor, int]]
    growth: int


def plan(g: Rewriter, nodes: list[gs.Node], size: Callable[[gs.Tensor], int], max_growth: int) -> Plan:
    """Choose among nodes of which every result can be computed, by bytes made against bytes freed.

    Nodes that share a tensor stand or fall together. Where a group would grow the file by more than ``max_growth``, the
    node that makes its largest result is given up, what it reads becomes a result instead, and the rest is weighed
    again. The groups that grow the file at all must stay below ``max_growth`` together too: otherwise none of them is
    folded, so that a second run decides the same.

    Args:
        g: the model.
        nodes: candidates, producers first.
        size: bytes of a tensor in the file.
        max_growth: bytes.
    """
    accepted: list[_Group] = []
    refused: list[tuple[gs.Tensor, int]] = []
    pending = _groups(g, nodes, size)
    while pending:
        group = pending.pop()
        if group.growth <= max_growth:
            accepted.append(group)
            continue
        largest = max(size(tensor) for tensor in group.results)
        # Giving up all results of that order at once keeps this from being quadratic.
        heavy = [tensor for tensor in group.results if size(tensor) * 2 >= largest]
        refused += [(tensor, size(tensor)) for tensor in heavy]
        gone = {id(tensor.inputs[0]) for tensor in heavy}
        pending += _groups(g, [node for node in group.nodes if id(node) not in gone], size)
    growing = [group for group in accepted if group.growth > 0]
    growth = sum(group.growth for group in growing)
    if growth > max_growth:
        growth = 0
        refused += [(tensor, size(tensor)) for group in growing for tensor in group.results]
        accepted = [group for group in accepted if group.growth <= 0]
    chosen = {id(node) for group in accepted for node in group.nodes}
    results = [tensor for group in accepted for tensor in group.results]
    return Plan([node for node in nodes if id(node) in chosen], results, refused, growth)


@dataclass
class _Group:
    nodes: list[gs.Node]
    results: list[gs.Tensor]
    growth: int


def _groups(g: Rewriter, nodes: list[gs.Node], size: Callable[[gs.Tensor], int]) -> list[_Group]:
    """Split nodes into connected groups (through tensors that they make or read) and weigh each."""
    parent: dict[int, int] = {}

    def root(key: int) -> int:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    for node in nodes:
        for tensor in (*node.inputs, *node.outputs):
            if not tensor.is_empty() and (tensor.inputs or isinstance(tensor, gs.Constant)):
                parent[root(id(tensor))] = root(id(node))
    members: dict[int, list[gs.Node]] = {}
    for node in nodes:
        members.setdefault(root(id(node)), []).append(node)
    inside = {id(node) for node in nodes}
    return [_weigh(g, group, inside, size) for group in members.values()]


def _weigh(g: Rewriter, nodes: list[gs.Node], inside: set[int], size: Callable[[gs.Tensor], int]) -> _Group:
    results = []
    read: dict[int, gs.Tensor] = {}
    growth = 0
    for node in nodes:
        growth -= _NODE_OVERHEAD + len(node.op) + len(node.name) + _names((*node.inputs, *node.outputs))
        read |= {id(tensor): tensor for tensor in node.inputs}
        for tensor in node.outputs:
            if not tensor.is_empty() and (g.is_output(tensor) or _read_outside(tensor, inside)):
                results.append(tensor)
                growth += size(tensor) + _TENSOR_OVERHEAD + len(tensor.name)
    for tensor in read.values():
        constant = isinstance(tensor, gs.Constant) or (len(tensor.inputs) == 1 and tensor.inputs[0].op == "Constant")
        if constant and not g.is_output(tensor) and not _read_outside(tensor, inside):
            growth -= size(tensor) + _TENSOR_OVERHEAD + len(tensor.name)
    return _Group(nodes, results, growth)


def _read_outside(tensor: gs.Tensor, inside: set[int]) -> bool:
    return any(id(user) not in inside for user in tensor.outputs)


def _names(tensors: Iterable[gs.Tensor]) -> int:
    return sum(len(tensor.name) + 2 for tensor in tensors)
