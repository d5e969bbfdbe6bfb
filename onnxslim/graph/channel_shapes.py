"""Channel rules of operators that reshape, and of the shape tensors that tell them how; see ``channel_rules``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.graph.channel_rules import Element, Op, Unknown, match_axes
from onnxslim.graph.coupling import Cut, Indices
from onnxslim.graph.walk import constant_value

__all__ = ["flatten", "name_lengths", "normal", "note", "reshape", "shape", "squeeze", "unsqueeze"]


def normal(axis: int, rank: int) -> int:
    """An axis counted from the front."""
    return axis + rank if axis < 0 else axis


def reshape(op: Op) -> None:
    """Reshape."""
    known = op.tracer.values_of(op.inputs[1])
    if known is None:
        raise Unknown(f"{op.label} computes its shape")
    zero_copies = not op.attr("allowzero", 0)
    copied = {j for j, n in enumerate(known) if n == 0 and zero_copies}

    def same(i: int, j: int) -> bool:
        element = known[j] if j < len(known) else None
        if (j in copied and i == j) or (isinstance(element, tuple) and element[0] is op.x and element[1] == i):
            return True
        before, after = op.dims(op.x)[i], op.dims(op.y)[j]
        return before is not None and before == after

    _blocks(op, same)
    lengths = {j: j for j in range(len(known)) if known[j] not in (0, -1)}
    name_lengths(op, 1, known, lengths)
    for j in copied:
        if op.dims(op.x)[j] == op.dims(op.y)[j]:
            op.join(op.x, j, op.y, j)


def _blocks(op: Op, same: Callable[[int, int], bool]) -> None:
    """Join the axes of a reshape block by block; a merged or split axis follows that of its parts that has channels."""
    before, after = op.dims(op.x), op.dims(op.y)
    blocks = match_axes(before, after, same)
    if blocks is None:
        raise Unknown(f"{op.label} reshapes it in a way that cannot be told")
    for ins, outs in blocks:
        if len(ins) == len(outs) == 1:
            op.join(op.x, ins[0], op.y, outs[0])
        elif len(outs) == 1 and ins:
            _factor(op, op.x, ins, op.y, outs[0])
        elif len(ins) == 1 and outs:
            _factor(op, op.y, outs, op.x, ins[0])
        elif ins and outs:
            _regroup(op, ins[0], outs[0])
        for tensor, axes in ((op.x, ins), (op.y, outs)):
            for axis in axes:
                op.because(tensor, axis, f"{op.label} mixes it with other axes")


def _factor(op: Op, many: gs.Tensor, axes: list[int], one: gs.Tensor, merged: int) -> None:
    """Join one of several axes with the axis that they are merged into: its channels cover many positions of that."""
    dims = op.dims(many)
    lengths = [dims[a] for a in axes]
    if not all(isinstance(n, int) for n in lengths) or not isinstance(op.dims(one)[merged], int):
        return
    sizes = [int(n) for n in lengths if isinstance(n, int)]
    alive = (k for k, a in enumerate(axes) if op.lives(many, a))
    whole = (k for k, a in enumerate(axes) if sizes[k] > 1 and not _taken_apart(op, many, a))
    chosen = next(itertools.chain(alive, whole), 0)
    positions = np.arange(math.prod(sizes))
    inner = math.prod(sizes[chosen + 1 :])
    op.join(many, axes[chosen], one, merged, positions // inner % sizes[chosen], positions)
    for k, axis in enumerate(axes):
        if k != chosen:
            op.stop(many, axis, f"{op.label} merges it with the axis of the channels")


def _regroup(op: Op, leading: int, regrouped: int) -> None:
    """Join the first of several axes with the first of those they become, one of which holds the other many times."""
    before, after = op.dims(op.x)[leading], op.dims(op.y)[regrouped]
    if not isinstance(before, int) or not isinstance(after, int) or max(before, after) % min(before, after):
        return
    positions = np.arange(max(before, after))
    at, to = (positions // (len(positions) // size) for size in (before, after))
    op.join(op.x, leading, op.y, regrouped, at, to)


def _taken_apart(op: Op, tensor: gs.Tensor, axis: int) -> bool:
    """Whether what reads a tensor, perhaps transposed, wants an axis whole or position by position.

    So it is with the axis of query, key and value behind one product for all three, and with the branches of a
    selective kernel: the channels of the weight are those of another axis.
    """
    for user in tensor.outputs:
        rank = len(op.tracer.dims(tensor) or [])
        if user.op == "Transpose":
            order = user.attrs.get("perm") or list(reversed(range(rank)))
            if _taken_apart(op, user.outputs[0], order.index(axis)):
                return True
        elif user.op.startswith("Reduce"):
            known = constant_value(user.inputs[1]) if len(user.inputs) > 1 else user.attrs.get("axes")
            if known is not None and axis in [normal(int(a), rank) for a in known]:
                return True
        elif user.op in ("Gather", "Slice", "Split", "Softmax"):
            along = normal(int(user.attrs.get("axis", -1 if user.op == "Softmax" else 0)), rank)
            after = op.tracer.dims(user.outputs[0])
            shrunk = after is not None and (len(after) < rank or after[axis] == 1)
            if (user.op == "Slice" or along == axis) and (user.op == "Softmax" or shrunk):
                return True
    return False


def flatten(op: Op) -> None:
    """Flatten."""
    before, after = op.dims(op.x), op.dims(op.y)
    _blocks(op, lambda i, j: before[i] is not None and before[i] == after[j])


def squeeze(op: Op) -> None:
    """Squeeze."""
    rank = len(op.dims(op.x))
    known = op.tracer.values_of(op.x)
    if known is not None:
        note(op, known)
    axes = op.ints("axes", 1)
    dims = op.dims(op.x)
    if axes is None and not all(isinstance(d, int) for d in dims):
        raise Unknown(f"{op.label} does not say which axes it drops")
    gone = {normal(a, rank) for a in axes} if axes is not None else {i for i, d in enumerate(dims) if d == 1}
    for j, i in enumerate(i for i in range(rank) if i not in gone):
        op.join(op.x, i, op.y, j)


def unsqueeze(op: Op) -> None:
    """Unsqueeze."""
    known = op.tracer.values_of(op.x)
    if known is not None:
        note(op, known)
    rank = len(op.dims(op.y))
    axes = op.ints("axes", 1)
    if axes is None:
        raise Unknown(f"{op.label} has no axes")
    new = {normal(a, rank) for a in axes}
    for i, j in enumerate(j for j in range(rank) if j not in new):
        op.join(op.x, i, op.y, j)


def shape(op: Op) -> None:
    """Shape."""
    rank = len(op.dims(op.x))
    start, end = normal(int(op.attr("start", 0)), rank), normal(int(op.attr("end", rank)), rank)
    op.tracer.elements[id(op.y)] = [(op.x, axis) for axis in range(max(start, 0), min(end, rank))]
    for axis in range(rank):
        op.tell(op.x, axis)


def note(op: Op, elements: list[Element]) -> None:
    """Remember the numbers of a shape tensor that this node passes on."""
    op.tracer.elements[id(op.y)] = elements
    op.tracer.understood.update((id(op.node), id(tensor)) for tensor in op.inputs)


def name_lengths(op: Op, slot: int, known: list[Element], axis_of: dict[int, int]) -> None:
    """A shape input names lengths of output axes: a constant one follows a cut, a computed one must be coupled."""
    target = op.inputs[slot]
    op.tracer.understood.add((id(op.node), id(target)))
    constant = constant_value(target) is not None
    for entry, axis in axis_of.items():
        element = known[entry]
        if isinstance(element, tuple):
            if (element[0], element[1]) != (op.y, axis):
                op.join(element[0], element[1], op.y, axis)
        elif element is None:
            op.stop(op.y, axis, f"{op.label} computes its length")
        elif constant:
            op.follow(op.y, axis, _rewriter(op, slot, entry))
        elif not _write_piece(op, slot, entry, axis):
            op.stop(op.y, axis, f"{op.label} has its length in a shape that is partly computed")


def _rewriter(op: Op, slot: int, entry: int) -> Callable[[Cut, Indices], None]:
    def write(_: Cut, kept: Indices) -> None:
        numbers = np.array(constant_value(op.node.inputs[slot]))
        numbers.reshape(-1)[entry] = len(kept)
        op.replace_ints(slot, numbers)

    return write


def _write_piece(op: Op, slot: int, entry: int, axis: int) -> bool:
    """Follow a cut in a shape that a Concat puts together of constants and computed lengths, if it serves no other."""
    target = op.inputs[slot]
    maker = target.inputs[0] if len(target.inputs) == 1 else None
    if maker is None or maker.op != "Concat":
        return False
    parts = [op.tracer.values_of(tensor) or [] for tensor in maker.inputs]
    ends = np.cumsum([len(part) for part in parts])
    piece = int(np.searchsorted(ends, entry, side="right"))
    start = int(ends[piece]) - len(parts[piece])
    if not isinstance(maker.inputs[piece], gs.Constant):
        return False

    def write(_: Cut, kept: Indices) -> None:
        source = op.node.inputs[slot].inputs[0]
        if len(source.outputs[0].outputs) > 1:  # others reshape by it too: this node gets its own
            source = _private_copy(op, source, slot)
        numbers = np.array(source.inputs[piece].values)
        numbers.reshape(-1)[entry - start] = len(kept)
        name = op.tracer.model.fresh_name(f"{source.inputs[piece].name}_cut")
        source.inputs[piece] = gs.Constant(name, numbers)

    op.follow(op.y, axis, write)
    return True


def _private_copy(op: Op, source: gs.Node, slot: int) -> gs.Node:
    """A copy of the Concat that makes this node's shape, for this node alone, right before it."""
    model = op.tracer.model
    output = gs.Variable(model.fresh_name(f"{source.outputs[0].name}_cut"))
    name = model.fresh_name(source.name or "Concat")
    twin = gs.Node("Concat", name, dict(source.attrs), list(source.inputs), [output])
    at = next(k for k, node in enumerate(model.graph.nodes) if node is op.node)
    model.graph.nodes.insert(at, twin)
    op.node.inputs[slot] = output
    return twin
