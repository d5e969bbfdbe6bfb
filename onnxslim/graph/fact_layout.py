"""Facts about shapes as values, and about elements that are laid out anew."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.graph.fact_values import (
    Results,
    any_shape,
    broadcast,
    elements_of,
    fixed_integers,
    has_input,
    known_sizes,
    object_array,
    on,
    target_shape,
    valued,
)
from onnxslim.graph.facts import LONGEST_VALUE, Fact, Facts, Shape
from onnxslim.graph.symbols import (
    Element,
    SymbolicSize,
    divide,
    floor_divide,
    fresh,
    lower_bound,
    maximum,
    product,
)

_INT64 = np.dtype(np.int64)

# ---------------------------------------------------------------------------------------------------- shapes as values


@on("Shape")
def _shape(facts: Facts, node: gs.Node) -> Results:
    shape = facts.of(node.inputs[0]).shape
    if shape is None:
        return None
    sizes = shape[slice(node.attrs.get("start", 0), node.attrs.get("end", len(shape)))]
    return [valued(_INT64, object_array(sizes))]


@on("Size")
def _size(facts: Facts, node: gs.Node) -> Results:
    shape = facts.of(node.inputs[0]).shape
    if shape is None:
        return None
    return [valued(_INT64, object_array([product(shape)], ()))]


@on("ConstantOfShape")
def _constant_of_shape(facts: Facts, node: gs.Node) -> Results:
    fill = node.attrs.get("value")
    array = np.zeros(1, np.float32) if fill is None else np.asarray(fill.values)
    shape = target_shape(facts, node, 0)
    if shape is None or array.size != 1:
        return [Fact(array.dtype, shape)]
    if all(isinstance(size, int) for size in shape) and array.dtype.kind in "iub":
        count = math.prod(known_sizes(shape))
        if count <= LONGEST_VALUE:
            return [Fact(array.dtype, shape, object_array([int(array.reshape(-1)[0])] * count, known_sizes(shape)))]
    return [Fact(array.dtype, shape)]


@on("Range")
def _range(facts: Facts, node: gs.Node) -> Results:
    sources = [facts.of(tensor) for tensor in node.inputs]
    dtype = sources[0].dtype
    if dtype is None:
        return None
    bounds = [None if source.value is None or source.value.size != 1 else source.value.item() for source in sources]
    start, limit, delta = bounds
    if start is None or limit is None or not isinstance(delta, int) or delta == 0:
        return [Fact(dtype, (fresh(),))]
    step = abs(delta)
    count = floor_divide((limit - start if delta > 0 else start - limit) + (step - 1), step)
    if isinstance(count, int):
        count = max(count, 0)
        if count <= LONGEST_VALUE:
            return [valued(dtype, object_array([start + delta * index for index in range(count)]))]
    else:
        count = maximum(count, 0)
    return [Fact(dtype, (count,))]


# ------------------------------------------------------------------------------------------------------------- layout


@on("Reshape")
def _reshape(facts: Facts, node: gs.Node) -> Results:
    source = facts.of(node.inputs[0])
    if source.dtype is None:
        return None
    if len(node.inputs) < 2 and "shape" in node.attrs:
        target: list[Element] = list(node.attrs["shape"])
    else:
        elements = elements_of(facts, node, 1)
        if elements is None:
            return [Fact(source.dtype, target_shape(facts, node, 1))]
        target = elements
    shape = _reshaped(source.shape, target, zero_copies=not node.attrs.get("allowzero", 0))
    static = source.value is not None and all(isinstance(size, int) for size in shape)
    if static and source.value is not None and math.prod(known_sizes(shape)) == source.value.size:
        return [Fact(source.dtype, shape, source.value.reshape(known_sizes(shape)))]
    return [Fact(source.dtype, shape)]


def _reshaped(before: Shape | None, target: Sequence[Element], *, zero_copies: bool) -> Shape:
    sizes: list[Element | None] = []
    for axis, size in enumerate(target):
        if size == 0 and zero_copies:
            sizes.append(before[axis] if before is not None and axis < len(before) else fresh())
        elif isinstance(size, SymbolicSize):
            # Where a size may be 0 or -1, what stands there may be another size.
            least = lower_bound(size)
            plain = least is not None and least >= (1 if zero_copies else 0)
            same = before is not None and axis < len(before) and before[axis] == size
            sizes.append(size if plain or (same and least == 0) else None if least is None or least < 0 else fresh())
        else:
            sizes.append(None if size < 0 else size)
    missing = [axis for axis, size in enumerate(sizes) if size is None]
    if len(missing) == 1 and before is not None:
        others = [size for size in sizes if size is not None]
        # A size that need not be -1 may be anything where the others leave no elements.
        if target[missing[0]] == -1 or all((lower_bound(size) or 0) > 0 for size in others):
            sizes[missing[0]] = _remaining(before, others)
    return tuple(fresh() if size is None else size for size in sizes)


def _remaining(before: Shape, others: Sequence[Element]) -> Element:
    """The size that a -1 stands for: what is left of the elements once equal sizes on both sides have cancelled."""
    left, right = list(before), list(others)
    for size in others:
        if size in left and size != 0:
            left.remove(size)
            right.remove(size)
    total: Element = product(left)
    by: Element = product(right)
    if by == 1:
        return total
    quotient = divide(total, by) if isinstance(by, int) and by > 0 else None
    return fresh() if quotient is None else quotient


@on("Flatten")
def _flatten(facts: Facts, node: gs.Node) -> Results:
    source = facts.of(node.inputs[0])
    if source.shape is None or source.dtype is None:
        return [Fact(source.dtype, (fresh(), fresh()))] if source.dtype is not None else None
    axis = int(node.attrs.get("axis", 1))
    axis = axis + len(source.shape) if axis < 0 else axis
    rows: Element = product(source.shape[:axis])
    columns: Element = product(source.shape[axis:])
    return [Fact(source.dtype, (rows, columns))]


def _laid_out(source: Fact, shape: Shape) -> Fact:
    """The same elements in the same order in another shape."""
    if source.value is not None and all(isinstance(size, int) for size in shape):
        return Fact(source.dtype, shape, source.value.reshape(known_sizes(shape)))
    return Fact(source.dtype, shape)


@on("Squeeze")
def _squeeze(facts: Facts, node: gs.Node) -> Results:
    source = facts.of(node.inputs[0])
    if source.dtype is None:
        return None
    axes = fixed_integers(facts, node, 1, "axes")
    # An empty list of axes is none of them to some runtimes, and every axis of size 1 to others.
    if source.shape is None or axes == [] or (axes is None and has_input(node, 1)):
        return [Fact(source.dtype)]
    rank = len(source.shape)
    if axes is None:
        if not all(isinstance(size, int) for size in source.shape):
            return [Fact(source.dtype)]
        gone = {axis for axis, size in enumerate(source.shape) if size == 1}
    else:
        gone = {axis + rank if axis < 0 else axis for axis in axes}
        if any(
            not 0 <= axis < rank or (isinstance(source.shape[axis], int) and source.shape[axis] != 1) for axis in gone
        ):
            return None
    return [_laid_out(source, tuple(size for axis, size in enumerate(source.shape) if axis not in gone))]


@on("Unsqueeze")
def _unsqueeze(facts: Facts, node: gs.Node) -> Results:
    source = facts.of(node.inputs[0])
    if source.dtype is None:
        return None
    axes = fixed_integers(facts, node, 1, "axes")
    if source.shape is None or axes is None:
        return [Fact(source.dtype)]
    rank = len(source.shape) + len(axes)
    new = {axis + rank if axis < 0 else axis for axis in axes}
    if len(new) != len(axes) or any(not 0 <= axis < rank for axis in new):
        return None
    sizes = iter(source.shape)
    return [_laid_out(source, tuple(1 if axis in new else next(sizes) for axis in range(rank)))]


@on("Transpose")
def _transpose(facts: Facts, node: gs.Node) -> Results:
    source = facts.of(node.inputs[0])
    if source.dtype is None:
        return None
    if source.shape is None:
        perm = node.attrs.get("perm")
        return [Fact(source.dtype, None if perm is None else tuple(fresh() for _ in perm))]
    perm = list(node.attrs.get("perm") or range(len(source.shape))[::-1])
    if sorted(perm) != list(range(len(source.shape))):
        return None
    value = None if source.value is None else source.value.transpose(perm)
    return [Fact(source.dtype, tuple(source.shape[axis] for axis in perm), value)]


@on("Expand")
def _expand(facts: Facts, node: gs.Node) -> Results:
    source = facts.of(node.inputs[0])
    if source.dtype is None:
        return None
    target = elements_of(facts, node, 1)
    if target is None or source.shape is None:
        known = target_shape(facts, node, 1)
        rank = None if known is None or source.shape is None else max(len(known), len(source.shape))
        return [Fact(source.dtype, any_shape(rank))]
    shape = broadcast([source.shape, tuple(target)]) or ()
    if any((lower_bound(size) or 0) < 0 or lower_bound(size) is None for size in shape):
        shape = tuple(size if (lower_bound(size) or -1) >= 0 or size == 0 else fresh() for size in shape)
    small = all(isinstance(size, int) for size in shape) and math.prod(known_sizes(shape)) <= LONGEST_VALUE
    if source.value is not None and small:
        return [Fact(source.dtype, shape, np.broadcast_to(source.value, known_sizes(shape)).copy())]
    return [Fact(source.dtype, shape)]


@on("Tile")
def _tile(facts: Facts, node: gs.Node) -> Results:
    source = facts.of(node.inputs[0])
    repeats = elements_of(facts, node, 1)
    if source.dtype is None or source.shape is None or repeats is None or len(repeats) != len(source.shape):
        return None
    shape = tuple(size * count for size, count in zip(source.shape, repeats, strict=True))
    if any((lower_bound(size) or 0) < 0 for size in shape):
        return None
    counts = [count for count in repeats if isinstance(count, int)]
    if source.value is not None and len(counts) == len(repeats):
        value = np.tile(source.value, counts)
        return [valued(source.dtype, value)]
    return [Fact(source.dtype, shape)]
