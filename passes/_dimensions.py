"""What is known of the small integer tensors that models compute from shapes, element by element.

Exporters write ``Reshape(x, Concat(Gather(Shape(x), 0), 64, -1))``: the whole vector is not constant when the batch is
dynamic, but most of its elements are, and those that are not are *the same dimension as* that of another tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxslim.graph.purity import is_standard
from onnxslim.passes._rewriter import Rewriter, has_plain_attributes

__all__ = ["Dimension", "Dimensions", "Vector"]

# Longer vectors are no shapes.
_LONGEST = 64


@dataclass(frozen=True)
class Dimension:
    """A size that is known only when the model runs; equal keys mean equal sizes."""

    key: str | tuple[int, int]


Element: TypeAlias = int | Dimension | None


@dataclass(frozen=True)
class Vector:
    """A scalar or a vector of integers (or truth values), as far as it is known; None where an element is not."""

    elements: tuple[Element, ...]
    dtype: np.dtype
    scalar: bool = False

    def value(self) -> np.ndarray | None:
        """The array, when every element is known."""
        if not all(isinstance(element, int) for element in self.elements):
            return None
        array = np.array(self.elements, self.dtype)
        return array.reshape(()) if self.scalar else array


class Dimensions:
    """Known elements of every tensor of a model that is computed from shapes; computed once, in graph order."""

    def __init__(self, g: Rewriter) -> None:
        self._g = g
        self._main = g.scopes[0]
        self._known: dict[int, Vector] = {}
        for node in g.nodes():
            rule = _RULES.get(node.op)
            if rule is None or not is_standard(node) or not has_plain_attributes(node) or len(node.outputs) < 1:
                continue
            results = rule(self, node)
            for tensor, vector in zip(node.outputs, results, strict=False):
                if vector is not None and len(vector.elements) <= _LONGEST:
                    self._known[id(tensor)] = vector

    def vector(self, tensor: gs.Tensor) -> Vector | None:
        """What is known of a tensor; None when it is no small integer vector or nothing is known of it."""
        known = self._known.get(id(tensor))
        if known is not None:
            return known
        if isinstance(tensor, gs.Constant) and len(tensor.shape) > 1:
            return None
        array = self._g.constant(tensor, limit=_LONGEST)
        if array is None or array.ndim > 1 or array.dtype.kind not in "ib":
            return None
        return Vector(tuple(int(item) for item in array.reshape(-1)), array.dtype, array.ndim == 0)

    def of_shape(self, tensor: gs.Tensor) -> tuple[Element, ...] | None:
        """The dimensions of a tensor; None when its rank is unknown."""
        shape = self._g.shape(tensor)
        if shape is None:
            return None
        named = self._g.home(tensor) is self._main  # symbols of bodies may mean another size in each iteration
        return tuple(
            size if isinstance(size, int) else Dimension(size if size and named else (id(tensor), axis))
            for axis, size in enumerate(shape)
        )

    def inputs(self, node: gs.Node) -> list[Vector] | None:
        """The vectors of all inputs of a node; None when one is not known to be a vector."""
        vectors = [self.vector(tensor) for tensor in node.inputs]
        return [vector for vector in vectors if vector is not None] if None not in vectors else None

    def integers(self, node: gs.Node, index: int, attribute: str | None = None) -> list[int] | None:
        """A list of integers from an attribute or a known input."""
        if (attribute is not None and attribute in node.attrs) or len(node.inputs) <= index:
            return self._g.integers(node, index, attribute)
        vector = self.vector(node.inputs[index])
        value = None if vector is None else vector.value()
        return None if value is None else [int(item) for item in value.reshape(-1)]


_Results: TypeAlias = Sequence[Vector | None]
_RULES: dict[str, Callable[[Dimensions, gs.Node], _Results]] = {}


def _on(*ops: str) -> Callable[[Callable[[Dimensions, gs.Node], _Results]], Callable[[Dimensions, gs.Node], _Results]]:
    def register(rule: Callable[[Dimensions, gs.Node], _Results]) -> Callable[[Dimensions, gs.Node], _Results]:
        _RULES.update(dict.fromkeys(ops, rule))
        return rule

    return register


@_on("Shape")
def _shape(d: Dimensions, node: gs.Node) -> _Results:
    dims = d.of_shape(node.inputs[0])
    if dims is None:
        return []
    start, end = node.attrs.get("start", 0), node.attrs.get("end", len(dims))
    return [Vector(dims[slice(start, end)], np.dtype(np.int64))]


@_on("Size")
def _size(d: Dimensions, node: gs.Node) -> _Results:
    dims = d.of_shape(node.inputs[0])
    known = [size for size in dims or () if isinstance(size, int)]
    if dims is None or (len(known) < len(dims) and 0 not in known):
        return []
    return [Vector((math.prod(known),), np.dtype(np.int64), scalar=True)]


@_on("Identity")
def _identity(d: Dimensions, node: gs.Node) -> _Results:
    return [d.vector(node.inputs[0])]


@_on("Cast")
def _cast(d: Dimensions, node: gs.Node) -> _Results:
    """Between integer types that hold the value; a size is at most 2^63 - 1, so it is only kept as int64."""
    vector = d.vector(node.inputs[0])
    to = node.attrs.get("to")
    if vector is None or to not in (onnx.TensorProto.INT64, onnx.TensorProto.INT32):
        return []
    dtype = np.dtype(np.int64 if to == onnx.TensorProto.INT64 else np.int32)
    limits = np.iinfo(np.int64 if to == onnx.TensorProto.INT64 else np.int32)
    elements = tuple(
        element
        if (isinstance(element, int) and limits.min <= element <= limits.max)
        or (isinstance(element, Dimension) and dtype == np.int64)
        else None
        for element in vector.elements
    )
    return [Vector(elements, dtype, vector.scalar)]


@_on("Gather")
def _gather(d: Dimensions, node: gs.Node) -> _Results:
    data, indices = d.vector(node.inputs[0]), d.vector(node.inputs[1])
    if data is None or indices is None or data.scalar or node.attrs.get("axis", 0) not in (0, -1):
        return []
    count = len(data.elements)
    taken = [data.elements[i] if isinstance(i, int) and -count <= i < count else None for i in indices.elements]
    return [Vector(tuple(taken), data.dtype, indices.scalar)]


@_on("Slice")
def _slice(d: Dimensions, node: gs.Node) -> _Results:
    data = d.vector(node.inputs[0])
    starts, ends = d.integers(node, 1, "starts"), d.integers(node, 2, "ends")
    steps = d.integers(node, 4) if len(node.inputs) > 4 and not node.inputs[4].is_empty() else [1]
    if data is None or data.scalar or starts is None or ends is None or steps is None:
        return []
    if len(starts) != 1 or len(ends) != 1 or len(steps) != 1 or steps[0] == 0:
        return []
    start, end, step, count = starts[0], ends[0], steps[0], len(data.elements)
    if step < 0 and end < -count:
        return [Vector(data.elements[start::step], data.dtype)]
    return [Vector(data.elements[start:end:step], data.dtype)]


@_on("Concat")
def _concat(d: Dimensions, node: gs.Node) -> _Results:
    """Unknown parts count when their length is known."""
    elements: list[Element] = []
    dtype: np.dtype | None = None
    for tensor in node.inputs:
        vector = d.vector(tensor)
        if vector is not None and not vector.scalar:
            elements += vector.elements
            dtype = vector.dtype
            continue
        shape = d._g.shape(tensor)
        if shape is None or len(shape) != 1 or not isinstance(shape[0], int) or shape[0] > _LONGEST:
            return []
        elements += [None] * shape[0]
    return [] if dtype is None or dtype.kind != "i" else [Vector(tuple(elements), dtype)]


@_on("Unsqueeze")
def _unsqueeze(d: Dimensions, node: gs.Node) -> _Results:
    vector = d.vector(node.inputs[0])
    if vector is None or not vector.scalar or d.integers(node, 1, "axes") not in ([0], [-1]):
        return []
    return [Vector(vector.elements, vector.dtype)]


@_on("Squeeze")
def _squeeze(d: Dimensions, node: gs.Node) -> _Results:
    vector = d.vector(node.inputs[0])
    if vector is None or vector.scalar or len(vector.elements) != 1:
        return []
    has_axes = "axes" in node.attrs or len(node.inputs) > 1
    if has_axes and d.integers(node, 1, "axes") not in ([0], [-1]):
        return []
    return [Vector(vector.elements, vector.dtype, scalar=True)]


@_on("Reshape")
def _reshape(d: Dimensions, node: gs.Node) -> _Results:
    vector = d.vector(node.inputs[0])
    target = d.integers(node, 1) if len(node.inputs) > 1 else None
    if vector is None or target is None or not vector.elements:
        return []
    if target in ([-1], [len(vector.elements)]):
        return [Vector(vector.elements, vector.dtype)]
    return [Vector(vector.elements, vector.dtype, scalar=True)] if target == [] else []


@_on("Split")
def _split(d: Dimensions, node: gs.Node) -> _Results:
    vector = d.vector(node.inputs[0])
    if vector is None or vector.scalar or node.attrs.get("axis", 0) not in (0, -1):
        return []
    count, parts = len(vector.elements), len(node.outputs)
    sizes = d.integers(node, 1, "split")
    if sizes is None:
        if "split" in node.attrs or (len(node.inputs) > 1 and not node.inputs[1].is_empty()) or count % parts:
            return []
        sizes = [count // parts] * parts
    if sum(sizes) != count or len(sizes) != parts:
        return []
    ends = np.cumsum(sizes).tolist()
    return [Vector(vector.elements[end - size : end], vector.dtype) for size, end in zip(sizes, ends, strict=True)]


@_on("Add", "Sub", "Mul", "Div", "Equal")
def _arithmetic(d: Dimensions, node: gs.Node) -> _Results:
    vectors = d.inputs(node)
    if vectors is None or any(vector.dtype.kind != "i" for vector in vectors):
        return []
    rows = _broadcast([*vectors])
    if rows is None:
        return []
    elements = tuple(_combine(node.op, first, second) for first, second in rows)
    dtype = np.dtype(bool) if node.op == "Equal" else vectors[0].dtype
    return [Vector(_within(elements, dtype), dtype, all(vector.scalar for vector in vectors))]


def _broadcast(vectors: list[Vector]) -> list[tuple[Element, ...]] | None:
    length = max(len(vector.elements) for vector in vectors)
    if any(len(vector.elements) not in (1, length) or not vector.elements for vector in vectors):
        return None
    columns = [v.elements if len(v.elements) == length else v.elements * length for v in vectors]
    return list(zip(*columns, strict=True))


def _combine(op: str, first: Element, second: Element) -> Element:
    """One element of the result; what holds for sizes too: x * 1, x / 1, x + 0, x - 0, and no size is negative."""
    if isinstance(first, int) and isinstance(second, int):
        if op == "Equal":
            return int(first == second)
        if op == "Div":
            return first // second if first >= 0 and second > 0 else None
        return first + second if op == "Add" else first - second if op == "Sub" else first * second
    if op == "Equal":
        if isinstance(first, Dimension) and first == second:
            return 1
        sizes = {type(first), type(second)}
        negative = any(isinstance(element, int) and element < 0 for element in (first, second))
        return 0 if sizes == {Dimension, int} and negative else None
    neutral = 0 if op in ("Add", "Sub") else 1
    if second == neutral:
        return first
    return second if first == neutral and op in ("Add", "Mul") else None


def _within(elements: tuple[Element, ...], dtype: np.dtype) -> tuple[Element, ...]:
    """Forget what would overflow: how it wraps is the runtime's business."""
    if dtype.kind == "b":
        return elements
    limits = np.iinfo(dtype.str)
    return tuple(
        element if not isinstance(element, int) or limits.min <= element <= limits.max else None for element in elements
    )


@_on("Where")
def _where(d: Dimensions, node: gs.Node) -> _Results:
    vectors = d.inputs(node)
    if vectors is None or vectors[0].dtype.kind != "b" or any(vector.dtype.kind != "i" for vector in vectors[1:]):
        return []
    rows = _broadcast([*vectors])
    if rows is None:
        return []
    elements = tuple((yes if truth else no) if isinstance(truth, int) else None for truth, yes, no in rows)
    return [Vector(elements, vectors[1].dtype, all(vector.scalar for vector in vectors))]


@_on("ConstantOfShape")
def _constant_of_shape(d: Dimensions, node: gs.Node) -> _Results:
    target = d.integers(node, 0)
    fill = node.attrs.get("value")
    if target is None or len(target) != 1 or not 0 < target[0] <= _LONGEST or not isinstance(fill, gs.Constant):
        return []
    array = fill.values
    if array.size != 1 or array.dtype.kind != "i":
        return []
    return [Vector((int(array.reshape(-1)[0]),) * target[0], array.dtype)]


@_on("ReduceProd")
def _reduce_prod(d: Dimensions, node: gs.Node) -> _Results:
    vector = d.vector(node.inputs[0])
    value = None if vector is None or vector.scalar or vector.dtype.kind != "i" else vector.value()
    axes = "axes" in node.attrs or (len(node.inputs) > 1 and not node.inputs[1].is_empty())
    if vector is None or value is None or (axes and d.integers(node, 1, "axes") not in ([0], [-1])):
        return []
    if not axes and node.attrs.get("noop_with_empty_axes", 0):
        return []
    product = math.prod(int(item) for item in value)
    elements = _within((product,), vector.dtype)
    return [Vector(elements, vector.dtype, scalar=not node.attrs.get("keepdims", 1))]
