"""The nodes of a model with numbers that are equal where two models do the same, whatever their names are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.function import Function

from onnxslim.model import Model
from onnxslim.tensors import TensorSource, array_to_tensor, tensor_nbytes

__all__ = ["Constant", "Flat", "Interner", "Source", "View", "flatten"]


class Interner:
    """Numbers for keys: the same number for equal keys, shared by the two models that are compared."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}

    def __call__(self, *key: Any) -> int:
        """The number of a key."""
        return self._numbers.setdefault(key, len(self._numbers) + 1)


@dataclass(frozen=True)
class Source:
    """Where a node's input comes from.

    Attributes:
        kind: ``node``, ``constant``, ``input`` (of the graph that ``scope`` names), ``empty`` or ``unknown``.
        index: of the node; the number of the constant's content; the position of the input.
        slot: which output of the node.
        scope: the graph that the input belongs to.
    """

    kind: str
    index: int = 0
    slot: int = 0
    scope: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Constant:
    """A stored tensor: what it is called, what it holds."""

    name: str
    content: int
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def form(self) -> str:
        """Its dtype and shape, in words."""
        return f"{self.dtype} {list(self.shape)}"


@dataclass
class View:
    """One node, Constant nodes left out.

    Attributes:
        node: the node.
        scope: the graph that it stands in: ``("main",)``, ``(index of the node with the body, attribute)``, or a
            function's domain and name.
        op: with its domain.
        attributes: those that differ from their defaults, bodies left out.
        inputs: where each comes from.
        readers: for each output, the nodes that read it, with the place.
        ends: for each output, the graphs that return it, with the position.
        local: number of the op, attributes and constants.
        upstream: number of all that its outputs are computed from.
        downstream: number of all that is computed from its outputs.
        loose: upstream and downstream without attributes and contents of constants.
    """

    node: gs.Node
    scope: tuple[Any, ...]
    op: str
    attributes: tuple[tuple[str, Any], ...]
    inputs: list[Source] = field(default_factory=list)
    readers: list[list[tuple[int, int]]] = field(default_factory=list)
    ends: list[list[tuple[tuple[Any, ...], int]]] = field(default_factory=list)
    local: int = 0
    upstream: int = 0
    downstream: int = 0
    loose: tuple[int, int] = (0, 0)

    @property
    def label(self) -> str:
        """What to call it: its name, or the tensor that it makes."""
        if self.node.name:
            return str(self.node.name)
        return f"{self.op} → {self.node.outputs[0].name}" if self.node.outputs else self.op


@dataclass
class Flat:
    """A model as a list of nodes, those of a body behind the node that holds it.

    Attributes:
        model: the model.
        views: the nodes.
        order: their indices, each after what it reads, bodies before their node.
        outputs: for each graph, where its outputs come from.
        constants: what is stored, by the number of its content; several may hold the same.
    """

    model: Model
    views: list[View] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    outputs: dict[tuple[Any, ...], list[Source]] = field(default_factory=dict)
    constants: dict[int, list[Constant]] = field(default_factory=dict)

    def bodies(self, index: int) -> Iterator[tuple[Any, ...]]:
        """The scopes of the bodies of a node."""
        for name, value in sorted(self.views[index].node.attrs.items()):
            if isinstance(value, gs.Graph):
                yield (index, name)


def flatten(model: Model, intern: Interner) -> Flat:
    """List the nodes of a model and number what they do; weights are read once."""
    return _Flattener(model, intern).run()


class _Flattener:
    def __init__(self, model: Model, intern: Interner) -> None:
        self.flat = Flat(model)
        self.intern = intern
        self.sources: dict[int, Source] = {}
        self.opsets = {entry.domain or "": entry.version for entry in model.header.opset_import}
        self.ends: list[tuple[tuple[Any, ...], list[gs.Tensor]]] = []

    def run(self) -> Flat:
        model = self.flat.model
        self._enter(model.graph, ("main",))
        for function in model.graph.functions:
            self._enter(function, ("function", function.domain or "", function.name))
        for view in self.flat.views:
            view.inputs = [self._source(tensor) for tensor in view.node.inputs]
            view.readers = [[] for _ in view.node.outputs]
            view.ends = [[] for _ in view.node.outputs]
        for index, view in enumerate(self.flat.views):
            for place, source in enumerate(view.inputs):
                if source.kind == "node":
                    self.flat.views[source.index].readers[source.slot].append((index, place))
        for scope, tensors in self.ends:
            self.flat.outputs[scope] = [self._source(tensor) for tensor in tensors]
            for position, source in enumerate(self.flat.outputs[scope]):
                if source.kind == "node":
                    self.flat.views[source.index].ends[source.slot].append((scope, position))
        self._number()
        return self.flat

    def _enter(self, graph: gs.Graph, scope: tuple[Any, ...]) -> None:
        for position, tensor in enumerate(graph.inputs):
            self.sources[id(tensor)] = Source("input", position, scope=scope)
        for node in graph.nodes:
            constant = _constant_of(node)
            if constant is not None:
                self.sources[id(node.outputs[0])] = self._constant(constant, node.outputs[0].name)
                continue
            index = len(self.flat.views)
            domain = "" if node.domain in (None, "ai.onnx") else node.domain
            op = f"{domain}.{node.op}" if domain else node.op
            version = graph.opset if isinstance(graph, Function) else self.opsets.get(domain, self.flat.model.opset)
            attributes = tuple(self._attributes(node, _defaults(node.op, domain, version)))
            self.flat.views.append(View(node, scope, op, attributes))
            for slot, tensor in enumerate(node.outputs):
                if not tensor.is_empty():
                    self.sources[id(tensor)] = Source("node", index, slot)
            for name, value in sorted(node.attrs.items()):
                if isinstance(value, gs.Graph):
                    self._enter(value, (index, name))
            self.flat.order.append(index)
        self.ends.append((scope, graph.outputs))

    def _source(self, tensor: gs.Tensor) -> Source:
        if tensor.is_empty():
            return Source("empty")
        known = self.sources.get(id(tensor))
        if known is None:
            known = self._constant(tensor, tensor.name) if isinstance(tensor, gs.Constant) else Source("unknown")
            self.sources[id(tensor)] = known
        return known

    def _constant(self, tensor: gs.Constant, name: str) -> Source:
        content = self.intern("content", *_content(tensor))
        shape = tuple(int(size) for size in tensor.shape)
        stored = Constant(name, content, str(np.dtype(tensor.dtype)), shape, tensor_nbytes(tensor))
        self.flat.constants.setdefault(content, []).append(stored)
        return Source("constant", content)

    def _attributes(self, node: gs.Node, defaults: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, value in sorted(node.attrs.items()):
            if isinstance(value, gs.Graph):
                continue
            plain = _plain(value)
            if name not in defaults or defaults[name] != plain:
                yield name, plain

    # ----------------------------------------------------------------------------------------------------- numbers

    def _number(self) -> None:
        views, intern = self.flat.views, self.intern
        loose_up: dict[int, int] = {}
        loose_down: dict[int, int] = {}
        for view in views:
            constants = tuple((i, s.index) for i, s in enumerate(view.inputs) if s.kind == "constant")
            view.local = intern("local", view.op, view.attributes, constants)
        for index in self.flat.order:
            view = views[index]
            returned = [(scope[1], self.flat.outputs[scope]) for scope in self.flat.bodies(index)]
            for strict in (True, False):
                numbers = {} if strict else loose_up
                below = tuple((name, self._numbers(sources, numbers, strict=strict)) for name, sources in returned)
                above = self._numbers(view.inputs, numbers, strict=strict)
                number = intern("up", strict, view.local if strict else view.op, above, below)
                if strict:
                    view.upstream = number
                else:
                    loose_up[index] = number
        for index in reversed(self.flat.order):
            view = views[index]
            view.downstream = intern("down", view.local, self._uses(view, None))
            loose_down[index] = intern("loosely down", view.op, self._uses(view, loose_down))
            view.loose = (loose_up[index], loose_down[index])

    def _numbers(self, sources: Iterable[Source], loose: dict[int, int], *, strict: bool) -> tuple[int, ...]:
        return tuple(self._number_of(source, loose, strict=strict) for source in sources)

    def _number_of(self, source: Source, loose: dict[int, int], *, strict: bool) -> int:
        if source.kind == "node":
            number = self.flat.views[source.index].upstream if strict else loose.get(source.index, 0)
            return self.intern("out", number, source.slot)
        if source.kind == "input":
            owner = source.scope[0]
            scope = (self.flat.views[owner].op, *source.scope[1:]) if isinstance(owner, int) else source.scope
            return self.intern("input", scope, source.index)
        return self.intern(source.kind, source.index if strict else 0)

    def _uses(self, view: View, loose: dict[int, int] | None) -> tuple[tuple[int, ...], ...]:
        def number(index: int) -> int:
            return self.flat.views[index].downstream if loose is None else loose.get(index, 0)

        found = []
        for readers, ends in zip(view.readers, view.ends, strict=True):
            uses = [self.intern("read", number(index), place) for index, place in readers]
            for scope, position in ends:
                owner = number(scope[0]) if isinstance(scope[0], int) else scope[0]
                uses.append(self.intern("end", owner, scope[1:], position))
            found.append(tuple(sorted(uses)))
        return tuple(found)


def _constant_of(node: gs.Node) -> gs.Constant | None:
    """The tensor that a Constant node holds."""
    if node.op != "Constant" or node.domain or not node.outputs or len(node.attrs) != 1:
        return None
    (name, value), *_ = node.attrs.items()
    if isinstance(value, gs.Constant):
        return value
    dtype = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    if name not in dtype or isinstance(value, gs.Node.AttributeRef):
        return None
    return gs.Constant(node.outputs[0].name, np.array(value, dtype[name]))


def _content(tensor: gs.Constant) -> tuple[Any, ...]:
    """A key that two tensors share when they hold the same. What is still in the file is not kept in memory for it."""
    values = tensor._values
    array = np.asarray(values.load() if isinstance(values, TensorSource) else values)
    if array.dtype == object or array.dtype.kind in "US":
        data = array_to_tensor("", array).SerializeToString()
    else:
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return str(array.dtype), array.shape, hashlib.sha256(data).digest()


def _plain(value: Any) -> Any:
    """An attribute's value as something that can be compared, hashed and shown."""
    if isinstance(value, gs.Constant):
        dtype, shape, digest = _content(value)
        if value.values.size <= 8:
            return f"{dtype} {np.asarray(value.values).tolist()}"
        return f"{dtype} {list(shape)} {digest.hex()[:8]}"
    if isinstance(value, gs.Node.AttributeRef):
        return f"attribute {value.name} of the function"
    if isinstance(value, onnx.AttributeProto):
        return value.SerializeToString().hex()
    if isinstance(value, (list, tuple, np.ndarray)):
        return tuple(_plain(item) for item in value)
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.item() if isinstance(value, np.generic) else value


@cache
def _defaults(op: str, domain: str, version: int) -> dict[str, Any]:
    """What the operator takes an attribute for when it is left out; two exporters need not agree on writing it."""
    try:
        attributes = onnx.defs.get_schema(op, version, domain).attributes
    except onnx.defs.SchemaError:
        return {}
    found = {}
    for name, attribute in attributes.items():
        if attribute.default_value.type:
            found[name] = _plain(onnx.helper.get_attribute_value(attribute.default_value))
    return found
