"""A copy of a model's graphs: new nodes and tensors over the same weights, made object by object."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from typing import Any

import onnx_graphsurgeon as gs
from onnx_graphsurgeon.util.misc import SynchronizedList

__all__ = ["copy_graphs", "uncollected"]


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Keep the garbage collector away while a graph is built: it would look through all of it again and again."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@uncollected()
def copy_graphs(graph: gs.Graph, nodes: Sequence[gs.Node] | None = None) -> gs.Graph:
    """Copy a main graph, or some of its nodes, its bodies and its local functions.

    Lists, nodes and tensors are new. Values of constants and protobuf messages (attributes, headers, what the file
    declares of a tensor) are shared: they are replaced in a model, never changed.
    """
    copier = _Copier()
    if nodes is not None:
        part = _blank(graph)
        part.__dict__.update(graph.__dict__, nodes=list(nodes))
        graph = part
    copied = copier.graph(graph)
    for old, new in copier.function_lists:
        new.extend(copier.graph(function) for function in old)
    return copied


class _Copier:
    def __init__(self) -> None:
        self.known: dict[int, Any] = {}
        self.function_lists: list[tuple[list[gs.Graph], list[gs.Graph]]] = []

    def graph(self, graph: gs.Graph) -> gs.Graph:
        if id(graph) in self.known:
            return self.known[id(graph)]
        copied = _blank(graph)
        self.known[id(graph)] = copied
        fields = copied.__dict__
        for name, value in graph.__dict__.items():
            fields[name] = [self.element(item) for item in value] if type(value) is list else value
        # One list of functions is shared by all graphs of a model.
        fields["_functions"] = self.functions(graph._functions)
        return copied

    def functions(self, shared: list[gs.Graph]) -> list[gs.Graph]:
        for old, new in self.function_lists:
            if old is shared:
                return new
        self.function_lists.append((shared, []))
        return self.function_lists[-1][1]

    def element(self, value: Any) -> Any:
        if isinstance(value, gs.Tensor):
            return self.tensor(value)
        if isinstance(value, gs.Node):
            return self.node(value)
        if isinstance(value, gs.Graph):
            return self.graph(value)
        return list(value) if type(value) is list else value

    def tensor(self, tensor: gs.Tensor) -> gs.Tensor:
        copied = self.known.get(id(tensor))
        if copied is None:
            copied = self.known[id(tensor)] = _blank(tensor)
            fields = copied.__dict__
            fields.update(tensor.__dict__)
            fields["inputs"] = SynchronizedList(copied, field_name="outputs", initial=())
            fields["outputs"] = SynchronizedList(copied, field_name="inputs", initial=())
            for name in ("shape", "default"):
                if name in fields:
                    fields[name] = self.element(fields[name])
        return copied

    def node(self, node: gs.Node) -> gs.Node:
        copied = _blank(node)
        fields = copied.__dict__
        fields.update(node.__dict__)
        for name, value in fields.items():
            if isinstance(value, dict):  # the attributes, and what is noted of them
                fields[name] = {key: self.element(item) for key, item in value.items()}
        inputs, outputs = ([self.tensor(tensor) for tensor in tensors] for tensors in (node.inputs, node.outputs))
        fields["inputs"] = SynchronizedList(copied, field_name="outputs", initial=inputs)
        fields["outputs"] = SynchronizedList(copied, field_name="inputs", initial=outputs)
        return copied


def _blank(of: Any) -> Any:
    """An object of the same class without a field: the constructors would fill in, and check, what is copied anyway."""
    return object.__new__(type(of))
