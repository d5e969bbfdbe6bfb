"""Reading and tidying a graphsurgeon graph: constants in either form, liveness, surgery that leaves nothing stale."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.function import Function

from onnxslim.model import Model

__all__ = [
    "constant_value",
    "drop_value_info",
    "hoist_constants",
    "insert_early",
    "is_graph_output",
    "nested_graphs",
    "remove_dead_nodes",
    "remove_node",
    "subgraphs",
]

_CONSTANT_ATTRIBUTES = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
    "value_string": object,
    "value_strings": object,
}


def subgraphs(node: gs.Node) -> Iterator[gs.Graph]:
    """Yield the bodies that a node holds in its attributes (If, Loop, Scan, …), not what is nested in them."""
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            yield value


def nested_graphs(graph: gs.Graph) -> Iterator[gs.Graph]:
    """Yield a graph and all bodies nested in it, outer before inner; no functions."""
    stack = [graph]
    while stack:
        graph = stack.pop()
        yield graph
        stack.extend(reversed([body for node in graph.nodes for body in subgraphs(node)]))


def constant_value(tensor: gs.Tensor) -> np.ndarray | None:
    """Return the value of an initializer or of the output of a Constant node; None for anything else.

    The array is not to be written to. Overridable initializers (those that are graph inputs too) are not constant.
    """
    if isinstance(tensor, gs.Constant):
        return np.asarray(tensor.values)
    if len(tensor.inputs) == 1 and tensor.inputs[0].op == "Constant" and not tensor.inputs[0].domain:
        return _constant_node_value(tensor.inputs[0])
    return None


def _constant_node_value(node: gs.Node) -> np.ndarray | None:
    for name, value in node.attrs.items():
        if isinstance(value, gs.Node.AttributeRef):
            return None
        if name == "value" and isinstance(value, gs.Constant):
            return np.asarray(value.values)
        if name in _CONSTANT_ATTRIBUTES:
            return np.array(value, _CONSTANT_ATTRIBUTES[name])
    return None


def hoist_constants(model: Model) -> int:
    """Turn Constant nodes of graphs into initializers of the same name; return how many.

    Functions cannot hold initializers, and a Constant node that makes a graph output stays: some runtimes refuse an
    initializer as an output.
    """
    hoisted = 0
    in_function: set[int] = set()
    for graph in model.graphs():
        if isinstance(graph, Function) or id(graph) in in_function:
            in_function.update(id(body) for node in graph.nodes for body in subgraphs(node))
            continue
        outputs = {id(tensor) for tensor in graph.outputs}
        kept: list[gs.Node] = []
        for node in graph.nodes:
            tensor = node.outputs[0] if node.op == "Constant" and not node.domain and node.outputs else None
            if tensor is None or id(tensor) in outputs:
                kept.append(node)
                continue
            attribute = node.attrs.get("value")
            values = attribute._values if isinstance(attribute, gs.Constant) else _constant_node_value(node)
            if values is None:
                kept.append(node)
                continue
            node.outputs.clear()
            tensor.to_constant(values)
            if isinstance(attribute, gs.Constant):
                tensor.source = attribute.__dict__.get("source")
            tensor._export_dtype = None
            graph.initializers.append(tensor)  # this graph defines it, also where only bodies read it
            hoisted += 1
        graph.nodes = kept
    return hoisted


def is_graph_output(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    """Whether ``tensor`` is an output of ``graph`` (by identity: names may repeat between sibling subgraphs)."""
    return any(tensor is output for output in graph.outputs)


def insert_early(graph: gs.Graph, nodes: Sequence[gs.Node]) -> None:
    """Put new nodes, given in order, each right behind what makes the last of its inputs.

    A tensor that only they read can then be let go of before the next ones are made, where nodes run in their order.
    """
    place = {id(node): index for index, node in enumerate(graph.nodes)}
    behind: dict[int, list[gs.Node]] = {}
    for node in nodes:
        makers = [place.get(id(tensor.inputs[0]), -1) for tensor in node.inputs if tensor.inputs]
        place[id(node)] = max(makers, default=-1)
        behind.setdefault(place[id(node)], []).append(node)
    placed = behind.get(-1, [])
    for index, node in enumerate(graph.nodes):
        placed += [node, *behind.get(index, [])]
    graph.nodes = placed


def remove_node(graph: gs.Graph, node: gs.Node) -> None:
    """Disconnect a node from its tensors and take it out of its graph."""
    _disconnect(node)
    graph.nodes = [other for other in graph.nodes if other is not node]


def _disconnect(node: gs.Node) -> None:
    node.inputs.clear()
    node.outputs.clear()
    # What the bodies of the node used of outer graphs is used no longer.
    for body in subgraphs(node):
        for inner in body.nodes:
            _disconnect(inner)


def remove_dead_nodes(model: Model) -> int:
    """Remove the nodes of which no output is used, in every graph and function; return how many.

    A node is used when one of its outputs is a graph output or an input of a used node, nested bodies included. Nodes
    without outputs, which act by side effect in custom domains, are kept.
    """
    return sum(_remove_dead(graph) for graph in [model.graph, *model.graph.functions])


def _remove_dead(graph: gs.Graph) -> int:
    """Sweep one graph backwards (its nodes are in topological order), then the bodies of what is left."""
    outputs = {id(tensor) for tensor in graph.outputs}
    body_outputs: dict[int, int] = {}
    _count_body_outputs(graph, body_outputs)
    alive: list[gs.Node] = []
    removed = 0
    for node in reversed(graph.nodes):
        used = not node.outputs or any(
            tensor.outputs or id(tensor) in outputs or body_outputs.get(id(tensor)) for tensor in node.outputs
        )
        if used:
            alive.append(node)
            for body in subgraphs(node):
                removed += _remove_dead(body)
        else:
            for body in subgraphs(node):
                for tensor in body.outputs:
                    if id(tensor) in body_outputs:
                        body_outputs[id(tensor)] -= 1
            _disconnect(node)
            removed += 1
    alive.reverse()
    graph.nodes = alive
    return removed


def _count_body_outputs(graph: gs.Graph, counts: dict[int, int]) -> None:
    """Count how often each tensor is an output of a nested body: a body may return an outer tensor as it is."""
    for node in graph.nodes:
        for body in subgraphs(node):
            for tensor in body.outputs:
                counts[id(tensor)] = counts.get(id(tensor), 0) + 1
            _count_body_outputs(body, counts)


def drop_value_info(model: Model) -> None:
    """Forget the declared dtypes and shapes of inner tensors, after surgery that may have made them wrong.

    Graph inputs and outputs keep theirs, and so do the inputs and outputs of bodies, where types may be required.
    """
    for graph in model.graphs():
        graph.stray_value_infos = []
        keep = {id(tensor) for tensor in (*graph.inputs, *graph.outputs)}
        for node in graph.nodes:
            for tensor in node.outputs:
                if id(tensor) not in keep and isinstance(tensor, gs.Variable):
                    tensor.__dict__.pop("info", None)
                    tensor.dtype = None
                    tensor.shape = None
            for tensor in node.inputs:
                if isinstance(tensor, gs.Constant):  # says all by itself
                    tensor.__dict__.pop("info", None)
