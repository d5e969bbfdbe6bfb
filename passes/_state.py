"""Recurrent state that a graph takes in and hands on, so that a caller feeds it back at the next run."""

from __future__ import annotations

import onnx_graphsurgeon as gs

__all__ = ["handed_on"]

_RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
_MOVING = frozenset(
    {"Concat", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze", "Cast"}
)


def handed_on(graph: gs.Graph) -> gs.Node | None:
    """The first recurrent layer that starts from what enters the graph, and whose last state leaves it; None if none.

    What happens to the state on the way may only move it.
    """
    inputs, outputs = ({id(tensor) for tensor in tensors} for tensors in (graph.inputs, graph.outputs))
    given, returned = set(inputs), set(outputs)
    for node in graph.nodes:
        if _moves(node) and any(id(tensor) in given for tensor in node.inputs):
            given.update(id(tensor) for tensor in node.outputs)
    for node in reversed(graph.nodes):
        if _moves(node) and any(id(tensor) in returned for tensor in node.outputs):
            returned.update(id(tensor) for tensor in node.inputs)
    for node in graph.nodes:
        starts = any(id(tensor) in given for tensor in node.inputs[5:7])
        ends = any(id(tensor) in returned for tensor in node.outputs[1:3])
        if node.op in _RECURRENT and not node.domain and starts and ends:
            return node
    return None


def _moves(node: gs.Node) -> bool:
    return node.op in _MOVING and not node.domain
