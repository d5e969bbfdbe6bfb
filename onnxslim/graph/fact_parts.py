"""Facts about tensors that are taken apart and put together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.graph.fact_values import (
    Results,
    any_shape,
    bounds,
    fixed_integers,
    has_input,
    int_shape,
    object_array,
    on,
    valued,
)
from onnxslim.graph.facts import LONGEST_VALUE, Fact, Facts
from onnxslim.graph.symbols import (
    Element,
    divide,
    floor_divide,
    fresh,
    lower_bound,
    maximum,
    minimum,
)

# ------------------------------------------------------------------------------------------------- parts and their sum

# What "to the end" is written as: the largest 32- or 64-bit integer; no dimension is that long.
_TO_THE_END = 2**31 - 1


@on("Concat")
def _concat(facts: Facts, node: gs.Node) -> Results:
    sources = [facts.of(tensor) for tensor in node.inputs]
    dtype = next((source.dtype for source in sources if source.dtype is not None), None)
    shapes = [source.shape for source in sources]
    known = next((shape for shape in shapes if shape is not None), None)
    if dtype is None or not known:
        return [Fact(dtype)] if dtype is not None else None
    axis = int(node.attrs.get("axis", 1))
    axis = axis + len(known) if axis < 0 else axis
    if not 0 <= axis < len(known) or any(shape is not None and len(shape) != len(known) for shape in shapes):
        return None
    shape = []
    for index in range(len(known)):
        sizes = [each[index] for each in shapes if each is not None]
        if index == axis:
            shape.append(sum(sizes) if len(sizes) == len(shapes) else fresh())
        else:
            numbers = {size for size in sizes if isinstance(size, int)}
            if len(numbers) > 1:
                return [Fact(dtype)]  # not legal, but ONNX Runtime passes over parts without elements
            shape.append(numbers.pop() if numbers else sizes[0])
    if len(known) == 1:
        value = _joined(sources)
        if value is not None:
            return [valued(dtype, value)]
    return [Fact(dtype, tuple(shape))]


def _joined(sources: Sequence[Fact]) -> np.ndarray | None:
    """Vectors end to end; one of known length whose elements are not known contributes unknown ones."""
    parts: list[Element] = []
    for source in sources:
        if source.dtype is None or source.dtype.kind not in "iub":
            return None
        if source.value is not None:
            parts += source.value.reshape(-1).tolist()
        elif source.shape is not None and isinstance(source.shape[0], int) and source.shape[0] <= LONGEST_VALUE:
            parts += [fresh(None) for _ in range(source.shape[0])]
        else:
            return None
    return object_array(parts) if len(parts) <= LONGEST_VALUE else None


@on("Split")
def _split(facts: Facts, node: gs.Node) -> Results:
    source = facts.of(node.inputs[0])
    if source.dtype is None or source.shape is None:
        return None
    axis = int(node.attrs.get("axis", 0))
    axis = axis + len(source.shape) if axis < 0 else axis
    count = len(node.outputs)
    if not 0 <= axis < len(source.shape):
        return None
    sizes: Sequence[Element] | None = fixed_integers(facts, node, 1, "split")
    if sizes is None:
        sizes = [fresh() for _ in range(count)] if has_input(node, 1) else _even_parts(source.shape[axis], count)
    if len(sizes) != count:
        return None
    facts_out = []
    start: Element = 0
    for size in sizes:
        shape = (*source.shape[:axis], size, *source.shape[axis + 1 :])
        if source.value is not None and isinstance(start, int) and isinstance(size, int):
            index = (slice(None),) * axis + (slice(start, start + size),)
            facts_out.append(Fact(source.dtype, int_shape(source.value[index]), source.value[index]))
        else:
            facts_out.append(Fact(source.dtype, shape))
        start = start + size
    return facts_out


def _even_parts(size: Element, count: int) -> list[Element]:
    """Equal parts, the last one smaller where the axis does not divide."""
    if not isinstance(size, int):
        part = divide(size, count)
        whole = part is not None and part * count == size
        return [part if whole and part is not None else fresh() for _ in range(count)]
    part = -(-size // count)
    return [max(min(part, size - part * index), 0) for index in range(count)]


@on("Slice")
def _slice(facts: Facts, node: gs.Node) -> Results:
    source = facts.of(node.inputs[0])
    if source.dtype is None or source.shape is None:
        return None
    rank = len(source.shape)
    starts, ends = bounds(facts, node, 1, "starts"), bounds(facts, node, 2, "ends")
    axes = fixed_integers(facts, node, 3, "axes")
    if axes is None:
        if has_input(node, 3):
            return [Fact(source.dtype, any_shape(rank))]
        axes = list(range(rank))[: len(starts) if starts is not None else rank]
    steps = fixed_integers(facts, node, 4) if has_input(node, 4) else [1] * len(axes)
    if starts is None or ends is None or steps is None or not len(starts) == len(ends) == len(axes) == len(steps):
        gone = {axis % rank for axis in axes} if rank else set()
        return [Fact(source.dtype, tuple(fresh() if axis in gone else size for axis, size in enumerate(source.shape)))]
    shape = list(source.shape)
    value = source.value
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        axis = axis + rank if axis < 0 else axis
        if not 0 <= axis < rank or step == 0:
            return None
        size = shape[axis]
        fixed = isinstance(start, int) and isinstance(end, int)
        if step < 0 and not _is_plain_backwards(size, start, end):
            shape[axis], value = fresh(), None
            continue
        shape[axis] = _slice_size(size, start, end, step)
        if value is not None:
            value = value[(slice(None),) * axis + (_python_slice(start, end, step, size),)] if fixed else None
    return [Fact(source.dtype, tuple(shape)) if value is None else Fact(source.dtype, int_shape(value), value)]


def _is_plain_backwards(size: Element, start: Element, end: Element) -> bool:
    """Whether a Slice backwards takes what Python would take.

    An end beyond the axis makes it empty by the specification and whole in ONNX Runtime; a start before the axis counts
    as its first place.
    """
    if not (isinstance(size, int) and isinstance(start, int) and isinstance(end, int)):
        return False
    return size > 0 and start >= -size and end < _TO_THE_END


def _python_slice(start: Element, end: Element, step: int, size: Element) -> slice:
    assert isinstance(start, int) and isinstance(end, int) and isinstance(size, int)
    if step < 0 and end < -size:
        return slice(start, None, step)
    return slice(start, end, step)


def _slice_size(size: Element, start: Element, end: Element, step: int) -> Element:
    if all(isinstance(item, int) for item in (size, start, end)):
        return len(range(*_python_slice(start, end, step, size).indices(size)))  # type: ignore[arg-type]
    if step != 1:
        whole = isinstance(start, int) and isinstance(end, int) and start == 0 and end >= _TO_THE_END and step > 0
        return floor_divide(size + (step - 1), step) if whole else fresh()
    first, last = _clamped(start, size), _clamped(end, size)
    if first is None or last is None:
        return fresh()
    return maximum(last - first, 0)


def _clamped(position: Element, size: Element) -> Element | None:
    """Where a start or an end lies on an axis, from 0 to its size; None where its sign is not known."""
    least = lower_bound(position)
    if isinstance(position, int) and position >= _TO_THE_END:
        return size
    if least is not None and least >= 0:
        return minimum(position, size)
    most = lower_bound(-position)
    if most is not None and most > 0:
        return maximum(size + position, 0)
    return None


@on("Gather")
def _gather(facts: Facts, node: gs.Node) -> Results:
    data, indices = facts.of(node.inputs[0]), facts.of(node.inputs[1])
    if data.dtype is None:
        return None
    if data.shape is None or indices.shape is None or not data.shape:
        return [Fact(data.dtype)]
    axis = int(node.attrs.get("axis", 0))
    axis = axis + len(data.shape) if axis < 0 else axis
    if not 0 <= axis < len(data.shape):
        return None
    shape = (*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :])
    positions = indices.known if indices.value is not None else None
    if data.value is None or positions is None:
        return [Fact(data.dtype, shape)]
    size = data.value.shape[axis]
    if positions.size and not (-size <= positions.min() and positions.max() < size):
        return [Fact(data.dtype, shape)]
    taken = np.take(data.value, positions, axis=axis)
    value = taken if isinstance(taken, np.ndarray) else object_array([taken], ())
    return [valued(data.dtype, value)]


@on("Pad")
def _pad(facts: Facts, node: gs.Node) -> Results:
    source = facts.of(node.inputs[0])
    if source.dtype is None or source.shape is None:
        return None
    pads = bounds(facts, node, 1, "pads") if "pads" in node.attrs or len(node.inputs) > 1 else None
    rank = len(source.shape)
    axes = list(range(rank))
    if has_input(node, 3):
        chosen = fixed_integers(facts, node, 3)
        if chosen is None:
            return [Fact(source.dtype, any_shape(rank))]
        axes = [axis + rank if axis < 0 else axis for axis in chosen]
    if pads is None or len(pads) != 2 * len(axes):
        return [Fact(source.dtype, any_shape(rank))]
    shape = list(source.shape)
    for index, axis in enumerate(axes):
        size = shape[axis] + pads[index] + pads[index + len(axes)]
        least = lower_bound(size)
        shape[axis] = size if least is not None and least >= 0 else fresh()
    return [Fact(source.dtype, tuple(shape))]


# ---------------------------------------------------------------------------------------------------------- sequences


@on("SplitToSequence")
def _split_to_sequence(facts: Facts, node: gs.Node) -> Results:
    return [Fact(facts.of(node.inputs[0]).dtype, None, None, sequence=True)]


@on("SequenceConstruct", "SequenceInsert", "SequenceErase")
def _sequence(facts: Facts, node: gs.Node) -> Results:
    return [Fact(facts.of(node.inputs[0]).dtype, None, None, sequence=True)]


@on("SequenceAt")
def _sequence_at(facts: Facts, node: gs.Node) -> Results:
    """The part that is taken, where the sequence is made by one node and the position is known."""
    sequence = node.inputs[0]
    dtype = facts.of(sequence).dtype
    maker = sequence.inputs[0] if len(sequence.inputs) == 1 else None
    position = fixed_integers(facts, node, 1)
    if maker is None or position is None:
        return [Fact(dtype)]
    if maker.op == "SequenceConstruct" and -len(maker.inputs) <= position[0] < len(maker.inputs):
        return [facts.of(maker.inputs[position[0]])]
    if maker.op == "SplitToSequence":
        return [_part(facts, maker, position[0])]
    return [Fact(dtype)]


def _part(facts: Facts, split: gs.Node, position: int) -> Fact:
    source = facts.of(split.inputs[0])
    if source.shape is None:
        return Fact(source.dtype)
    axis = int(split.attrs.get("axis", 0)) % len(source.shape) if source.shape else 0
    if not has_input(split, 1):
        part: Element = 1
        keep = bool(split.attrs.get("keepdims", 1))
    elif not split.attrs.get("keepdims", 1):
        # By the specification it is ignored here; not by ONNX Runtime, where the sizes are one number.
        return Fact(source.dtype)
    else:
        keep = True
        sizes = fixed_integers(facts, split, 1)
        scalar = facts.of(split.inputs[1]).shape == ()
        whole = source.shape[axis]
        if sizes is None:
            part = fresh()
        elif not scalar:
            part = sizes[position] if -len(sizes) <= position < len(sizes) else fresh()
        elif isinstance(whole, int) and sizes[0] > 0:
            count = -(-whole // sizes[0])
            at = position + count if position < 0 else position
            part = max(min(sizes[0], whole - at * sizes[0]), 0)
        else:
            part = fresh()
    middle = (part,) if keep else ()
    return Fact(source.dtype, (*source.shape[:axis], *middle, *source.shape[axis + 1 :]))
