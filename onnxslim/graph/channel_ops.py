"""The channel rules of single operators; see ``channel_rules`` for what a rule may say."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.graph.channel_rules import GATES, Op, Rule, Unknown
from onnxslim.graph.channel_shapes import flatten, name_lengths, normal, note, reshape, shape, squeeze, unsqueeze
from onnxslim.graph.coupling import Cut, Indices
from onnxslim.graph.walk import constant_value

__all__ = ["RULES"]

_UNARY = (
    "Abs Acos Acosh Asin Asinh Atan Atanh Cast Ceil Celu Clip Cos Cosh Dropout Elu Erf Exp Floor Gelu HardSigmoid "
    "HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh "
    "Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu"
)
_BROADCAST = (
    "Add And BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul Or "
    "PRelu Pow Sub Sum Where Xor"
)
_POOLS = "AveragePool GlobalAveragePool GlobalLpPool GlobalMaxPool LpPool MaxPool"
_REDUCTIONS = (
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare"
)


# ------------------------------------------------------------------------------------------------------ element-wise


def _unary(op: Op) -> None:
    if op.node.op in ("Cast", "Identity") and (known := op.tracer.values_of(op.x)) is not None:
        note(op, known)
    for axis in range(len(op.dims(op.x))):
        for output in op.outputs:
            if len(op.dims(output)) == len(op.dims(op.x)):
                op.join(op.x, axis, output, axis)


def _broadcast(op: Op) -> None:
    rank = len(op.dims(op.y))
    for tensor in op.inputs:
        dims = op.dims(tensor)
        for axis, size in enumerate(dims):
            if size != 1:
                op.join(tensor, axis, op.y, axis + rank - len(dims))


def _expand(op: Op) -> None:
    _broadcast_shape(op, op.inputs[1])
    dims, rank = op.dims(op.x), len(op.dims(op.y))
    for axis, size in enumerate(dims):
        if size != 1:
            op.join(op.x, axis, op.y, axis + rank - len(dims))


def _broadcast_shape(op: Op, target: gs.Tensor) -> None:
    """An Expand names lengths counted from the end; a 1 leaves an axis as it is."""
    known = op.tracer.values_of(target)
    if known is None:
        raise Unknown(f"{op.label} computes its shape")
    rank = len(op.dims(op.y))
    name_lengths(op, 1, known, {j: j + rank - len(known) for j in range(len(known)) if known[j] != 1})


# ----------------------------------------------------------------------------------------------- layers with weights


def _conv(op: Op) -> None:
    x, weight, y = op.x, op.weight(1), op.y
    op.uses(weight, 0, True)
    inside, shape = op.dims(x)[1], op.dims(weight)
    groups = int(op.attr("group", 1))
    outputs, per_group = shape[0], shape[1]
    if not (isinstance(inside, int) and isinstance(outputs, int) and isinstance(per_group, int)):
        unknown = weight if isinstance(inside, int) else x
        raise Unknown(f"the channels of {unknown.name!r} are not counted in the file")
    op.join(x, 0, y, 0)
    op.join(weight, 0, y, 1)
    if op.has(2):
        op.join(op.inputs[2], 0, y, 1)
    channels = np.arange(outputs)
    if groups > 1 and per_group == 1:
        op.join(weight, 0, x, 1, channels, channels // (outputs // groups))
        op.tell(weight, 1)
        op.follow(x, 1, lambda _, kept: op.node.attrs.update(group=len(kept)))
        return
    op.join(weight, 1, x, 1, np.arange(inside) % per_group, np.arange(inside))
    op.uses(weight, 1, False)
    if groups > 1:  # all groups stay equally wide: the same position goes in each
        op.join(weight, 0, weight, 0, channels, channels % (outputs // groups))


def _conv_transpose(op: Op) -> None:
    x, weight, y = op.x, op.weight(1), op.y
    inside, made = op.dims(weight)[:2]
    groups = int(op.attr("group", 1))
    if not (isinstance(inside, int) and isinstance(made, int)):
        raise Unknown(f"the channels of {weight.name!r} are not counted in the file")
    op.uses(weight, 1, True)
    op.join(x, 0, y, 0)
    op.join(x, 1, weight, 0)
    if op.has(2):
        op.join(op.inputs[2], 0, y, 1)
    channels = np.arange(made * groups)
    if groups > 1 and groups == inside:
        op.uses(weight, 0, True)
        op.join(x, 1, y, 1, channels // made, channels)
        op.follow(x, 1, lambda _, kept: op.node.attrs.update(group=len(kept)))
        op.stop(weight, 1, f"{op.label} makes several channels of each of its groups")
        return
    op.uses(weight, 0, False)
    op.join(weight, 1, y, 1, channels % made, channels)
    if groups > 1:
        op.join(weight, 0, weight, 0, np.arange(inside), np.arange(inside) % (inside // groups))


def _gemm(op: Op) -> None:
    a, b, y = op.x, op.weight(1), op.y
    row, column = (1, 0) if op.attr("transA", 0) else (0, 1)
    inner, outer = (1, 0) if op.attr("transB", 0) else (0, 1)
    op.uses(b, inner, False)
    op.uses(b, outer, True)
    op.join(a, row, y, 0)
    op.join(a, column, b, inner)
    op.join(b, outer, y, 1)
    if op.has(2):
        dims = op.dims(op.inputs[2])
        for axis, size in enumerate(dims):
            if size != 1:
                op.join(op.inputs[2], axis, y, axis + 2 - len(dims))


def _matmul(op: Op) -> None:
    left = op.weight(0) if isinstance(op.x, gs.Constant) else op.x
    right, y = op.weight(1), op.y
    if _from_constants(right) and len(op.dims(right)) > 1:
        op.uses(right, len(op.dims(right)) - 2, False)
        op.uses(right, len(op.dims(right)) - 1, True)
    if _from_constants(left) and len(op.dims(left)) > 1:
        op.uses(left, len(op.dims(left)) - 1, False)
        op.uses(left, len(op.dims(left)) - 2, True)
    ranks = [len(op.dims(left)), len(op.dims(right)), len(op.dims(y))]
    inner = ranks[1] - 2 if ranks[1] > 1 else 0
    op.join(left, ranks[0] - 1, right, inner)
    tail = ranks[2]
    if ranks[1] > 1:
        tail -= 1
        op.join(right, ranks[1] - 1, y, tail)
    if ranks[0] > 1:
        tail -= 1
        op.join(left, ranks[0] - 2, y, tail)
    for tensor, rank in ((left, ranks[0]), (right, ranks[1])):
        for axis in range(rank - 2):
            if op.dims(tensor)[axis] != 1:
                op.join(tensor, axis, y, axis + tail - (rank - 2))


def _recurrent(op: Op) -> None:
    """``W [D, gates * H, I]``, ``R [D, gates * H, H]`` and all states share hidden units: of each gate one row a unit.

    Both directions lose the same units. A unit without weights stays 0 where it starts there, unless the node has
    activations that are not 0 at 0.
    """
    gates = GATES[op.node.op]
    weight, again = op.weight(1), op.weight(2)
    hidden = op.dims(again)[2]
    if not isinstance(hidden, int) or op.dims(weight)[1] != gates * hidden:
        raise Unknown(f"the hidden units of {op.label} are not counted in the file")
    batch_first = bool(op.attr("layout", 0))
    for tensor in (weight, again):
        op.uses(tensor, 1, True)
        op.uses(tensor, 2, False)
    op.join(op.x, 2, weight, 2)
    for tensor, rows in ((weight, gates), (again, gates), (op.inputs[3] if op.has(3) else None, 2 * gates)):
        if tensor is not None:
            place = np.arange(rows * hidden)
            op.join(tensor, 1, again, 2, place, place % hidden)
    if op.has(7):  # peepholes
        op.join(op.inputs[7], 1, again, 2, np.arange(3 * hidden), np.arange(3 * hidden) % hidden)
    outputs = [tensor for tensor in op.node.outputs if not tensor.is_empty()]
    states = [op.inputs[slot] for slot in (5, 6) if op.has(slot)]
    for tensor in (*outputs, *states):
        op.join(tensor, len(op.dims(tensor)) - 1, again, 2)
    sequence = op.node.outputs[0]
    if not sequence.is_empty():
        for axis in (0, 1):
            op.join(op.x, axis, sequence, axis if batch_first or axis == 0 else 2)
    for tensor in (*states, *(each for each in outputs if each is not sequence)):
        op.join(op.x, 0 if batch_first else 1, tensor, 0 if batch_first else 1)
    op.follow(again, 2, lambda _, kept: op.node.attrs.update(hidden_size=len(kept)))


def _from_constants(tensor: gs.Tensor, depth: int = 4) -> bool:
    """Whether a tensor is a weight, perhaps behind a DequantizeLinear, Transpose or Cast."""
    if isinstance(tensor, gs.Constant):
        return True
    maker = tensor.inputs[0] if tensor.inputs else None
    if maker is None or depth == 0 or maker.op not in ("DequantizeLinear", "Transpose", "Cast", "Identity", "Constant"):
        return False
    return all(_from_constants(t, depth - 1) for t in maker.inputs)


def _batch_norm(op: Op) -> None:
    if op.attr("training_mode", 0) or len(op.outputs) > 1:
        raise Unknown(f"{op.label} is in training mode")
    for axis in range(len(op.dims(op.x))):
        op.join(op.x, axis, op.y, axis)
    for parameter in op.inputs[1:]:
        op.join(op.x, 1, parameter, 0)


def _instance_norm(op: Op) -> None:
    for axis in (0, 1):
        op.join(op.x, axis, op.y, axis)
    for parameter in op.inputs[1:]:
        op.join(op.x, 1, parameter, 0)


# ------------------------------------------------------------------------------------------------------- pool, reduce


def _pool(op: Op) -> None:
    for axis in (0, 1):
        op.join(op.x, axis, op.y, axis)


def _reduce(op: Op) -> None:
    rank = len(op.dims(op.x))
    axes = op.ints("axes", 1)
    if axes is None:
        axes = [] if op.attr("noop_with_empty_axes", 0) else list(range(rank))
    reduced = {normal(a, rank) for a in axes}
    _keep_all_but(op, reduced, bool(op.attr("keepdims", 1)))
    if op.node.op == "ReduceMean" and len(reduced) == 1:
        op.spans(op.x, *reduced)


def _arg(op: Op) -> None:
    axis = normal(int(op.attr("axis", 0)), len(op.dims(op.x)))
    _keep_all_but(op, {axis}, bool(op.attr("keepdims", 1)))


def _keep_all_but(op: Op, reduced: set[int], keepdims: bool) -> None:
    place = 0
    for axis in range(len(op.dims(op.x))):
        if axis in reduced:
            op.because(op.x, axis, f"{op.label} reduces over it")
            place += keepdims
        else:
            op.join(op.x, axis, op.y, place)
            place += 1


def _join_all_but(op: Op, apart: Collection[int], why: str) -> None:
    """Join the axes of input and output one to one, but those that the node takes as a whole."""
    for axis in range(len(op.dims(op.x))):
        if axis in apart:
            op.because(op.x, axis, why)
        else:
            op.join(op.x, axis, op.y, axis)


def _softmax(op: Op) -> None:
    rank = len(op.dims(op.x))
    newer = op.tracer.model.opset >= 13
    first = normal(int(op.attr("axis", -1 if newer else 1)), rank)
    _join_all_but(op, range(first, first + 1 if newer else rank), f"{op.label} normalises over it")


def _layer_norm(op: Op) -> None:
    rank = len(op.dims(op.x))
    first = normal(int(op.attr("axis", -1)), rank)
    for axis in range(first):
        op.join(op.x, axis, op.y, axis)
    parameters = [tensor for tensor in op.inputs[1:] if not tensor.is_empty()]
    if first == rank - 1 and len(op.outputs) == 1 and all(len(op.dims(tensor)) == 1 for tensor in parameters):
        op.spans(op.x, first)
        for tensor, place in ((op.y, first), *((tensor, 0) for tensor in parameters)):
            if op.dims(tensor)[place] != 1:
                op.join(op.x, first, tensor, place)
        return
    for axis in range(first, rank):
        for tensor, place in ((op.x, axis), (op.y, axis), *((tensor, axis - first) for tensor in parameters)):
            op.because(tensor, place, f"{op.label} normalises over it")


def _group_norm(op: Op) -> None:
    """Groups go whole, as an axis of groups would: those that stay are what they were."""
    op.join(op.x, 0, op.y, 0)
    channels, groups = _counted(op, op.x, 1), int(op.attr("num_groups", 1))
    places, each = np.arange(channels), channels // groups
    op.join(op.x, 1, op.y, 1)
    op.join(op.x, 1, op.x, 1, places, places // each * each)
    for parameter in op.inputs[1:]:  # one of each group up to opset 20, one of each channel from then on
        size = _counted(op, parameter, 0)
        op.join(parameter, 0, op.x, 1, np.arange(size), np.arange(size) * (channels // size))
    op.follow(op.x, 1, _recount(op, "num_groups", each))


# --------------------------------------------------------------------------------------------------- moving channels


def _transpose(op: Op) -> None:
    rank = len(op.dims(op.x))
    order = op.attr("perm", None) or list(reversed(range(rank)))
    for j, i in enumerate(order):
        op.join(op.x, int(i), op.y, j)


def _concat(op: Op) -> None:
    rank = len(op.dims(op.y))
    along = normal(int(op.attr("axis", 0)), rank)
    parts = [op.tracer.values_of(t) for t in op.inputs]
    if rank == 1 and all(part is not None for part in parts):
        note(op, [element for part in parts for element in part or []])
    start: int | None = 0
    for tensor in op.inputs:
        dims = op.dims(tensor)
        for axis in range(rank):
            if axis != along:
                op.join(tensor, axis, op.y, axis)
        size = dims[along]
        if start is None or not isinstance(size, int) or not isinstance(op.dims(op.y)[along], int):
            op.because(tensor, along, f"{op.label} appends parts of unknown length")
            start = None
            continue
        if size == 1:
            op.stop(op.y, along, f"{op.label} appends a single channel to it")
        elif size > 1:
            here = np.arange(size)
            op.join(tensor, along, op.y, along, here, here + start)
        start += size


def _split(op: Op) -> None:
    dims = op.dims(op.x)
    along = normal(int(op.attr("axis", 0)), len(dims))
    outputs = list(op.node.outputs)
    start = 0
    for tensor in outputs:
        if tensor.is_empty():
            raise Unknown(f"{op.label} drops one of its parts")
        for axis in range(len(dims)):
            if axis != along:
                op.join(op.x, axis, tensor, axis)
        size = op.dims(tensor)[along]
        if not isinstance(size, int):
            raise Unknown(f"{op.label} makes parts of unknown length")
        if size > 1:
            here = np.arange(size)
            op.join(op.x, along, tensor, along, here + start, here)
        start += size
    if op.has(1) and constant_value(op.inputs[1]) is None:
        raise Unknown(f"{op.label} computes its split")
    sizes = [int(op.dims(t)[along] or 0) for t in outputs]
    bounds = np.cumsum([0, *sizes])

    def resize(_: Cut, kept: Indices) -> None:
        lengths = np.histogram(kept, bounds)[0].astype(np.int64)
        op.node.attrs.pop("num_outputs", None)
        if op.tracer.model.opset >= 13:
            if len(op.node.inputs) < 2:
                op.node.inputs.append(gs.Constant(op.tracer.model.fresh_name(f"{op.x.name}_split"), lengths))
            else:
                op.replace_ints(1, lengths)
        else:
            op.node.attrs["split"] = [int(n) for n in lengths]

    op.follow(op.x, along, resize)


def _slice(op: Op) -> None:
    dims = op.dims(op.x)
    rank = len(dims)
    starts, ends = op.ints("starts", 1), op.ints("ends", 2)
    if starts is None or ends is None:
        raise Unknown(f"{op.label} has no starts or ends")
    axes = [normal(a, rank) for a in op.ints("axes", 3) or range(len(starts))]
    steps = op.ints("steps", 4) or [1] * len(starts)
    known = op.tracer.values_of(op.x)
    if known is not None and rank == 1:
        note(op, known[slice(starts[0], ends[0], steps[0])])
    for axis in range(rank):
        if axis not in axes:
            op.join(op.x, axis, op.y, axis)
            continue
        at, size = axes.index(axis), dims[axis]
        if not isinstance(size, int) or not isinstance(op.dims(op.y)[axis], int):
            continue
        taken = np.arange(size)[starts[at] : ends[at] : steps[at]]
        if steps[at] != 1 or len(taken) < 2 or len(taken) != op.dims(op.y)[axis]:
            op.because(op.x, axis, f"{op.label} takes single positions of it")
            continue
        op.join(op.x, axis, op.y, axis, taken, np.arange(len(taken)))
        _follow_slice(op, axis, at, taken)


def _follow_slice(op: Op, axis: int, at: int, taken: Indices) -> None:
    def shift(_: Cut, kept: Indices) -> None:
        first = int((kept < taken[0]).sum())
        last = first + int(((kept >= taken[0]) & (kept <= taken[-1])).sum())
        for slot, name, value in ((1, "starts", first), (2, "ends", last)):
            if op.has(slot):
                numbers = np.array(constant_value(op.node.inputs[slot]))
                numbers[at] = value
                op.replace_ints(slot, numbers)
            else:
                op.node.attrs[name] = [value if i == at else n for i, n in enumerate(op.node.attrs[name])]

    op.follow(op.x, axis, shift)


def _gather(op: Op) -> None:
    dims = op.dims(op.x)
    along = normal(int(op.attr("axis", 0)), len(dims))
    index = constant_value(op.inputs[1])
    known = op.tracer.values_of(op.x)
    if known is not None and index is not None and len(dims) == 1:
        op.tracer.understood.add((id(op.node), id(op.x)))
        picked = [known[int(i)] for i in index.reshape(-1)]
        op.tracer.elements[id(op.y)] = picked
    spread = len(op.dims(op.inputs[1])) - 1
    for axis in range(len(dims)):
        if axis != along:
            op.join(op.x, axis, op.y, axis + (spread if axis > along else 0))
    size = dims[along]
    if index is not None and index.ndim == 1 and index.size > 1 and isinstance(size, int) and size > 1:
        _follow_gather(op, along, np.where(index < 0, index + size, index))
        return
    op.because(op.x, along, f"{op.label} takes single positions of it")
    for axis in range(spread + 1):
        op.join(op.inputs[1], axis, op.y, along + axis)


def _follow_gather(op: Op, along: int, index: Indices) -> None:
    """Channels that a constant index picks, reorders or repeats: each is the one it was, at its new place."""
    op.join(op.x, along, op.y, along, index, np.arange(len(index)))
    op.tell(op.inputs[1], 0)
    after = op.tracer.axis(op.y, along, op.node)

    def renumber(plan: Cut, kept: Indices) -> None:
        left = plan.kept(after) if after is not None else None
        op.replace_ints(1, np.searchsorted(kept, index if left is None else index[left]).astype(index.dtype))

    op.follow(op.x, along, renumber)


def _pad(op: Op) -> None:
    rank = len(op.dims(op.x))
    pads = op.ints("pads", 1)
    if pads is None:
        raise Unknown(f"{op.label} has no pads")
    axes = [normal(a, rank) for a in op.ints("axes", 3) or range(rank)]
    padded = {axis for k, axis in enumerate(axes) if pads[k] or pads[k + len(axes)]}
    _join_all_but(op, padded, f"{op.label} pads it")


def _resize(op: Op) -> None:
    before, after = op.dims(op.x), op.dims(op.y)
    sizes = op.tracer.values_of(op.inputs[3]) if op.has(3) else None
    if op.has(3) and sizes is None:
        raise Unknown(f"{op.label} computes its sizes")
    if op.attr("axes", None) is not None:
        touched = {normal(int(a), len(before)) for a in op.attr("axes", [])}
        if touched & {0, 1}:
            raise Unknown(f"{op.label} resizes the channels")
        sizes = None
    for axis in (0, 1):
        if isinstance(before[axis], int) and before[axis] != after[axis]:
            op.because(op.x, axis, f"{op.label} resizes it")
        else:
            op.join(op.x, axis, op.y, axis)
    if sizes is not None:
        name_lengths(op, 3, sizes, {j: j for j in range(len(sizes))})
    if op.has(1) and op.node.op == "Resize" and op.tracer.model.opset >= 11:
        op.because(op.inputs[1], 0, "it is a region of interest")


def _depth_to_space(op: Op) -> None:
    """One channel becomes the pixels of a block; in which order they lie, ``mode`` says."""
    before, after = _counted(op, op.x, 1), _counted(op, op.y, 1)
    places = np.arange(before)
    op.join(op.x, 0, op.y, 0)
    channels = places // (before // after) if op.attr("mode", "DCR") == "CRD" else places % after
    op.join(op.x, 1, op.y, 1, places, channels)


def _space_to_depth(op: Op) -> None:
    before, after = _counted(op, op.x, 1), _counted(op, op.y, 1)
    op.join(op.x, 0, op.y, 0)
    op.join(op.x, 1, op.y, 1, np.arange(after) % before, np.arange(after))


def _grid_sample(op: Op) -> None:
    _pool(op)
    op.join(op.x, 0, op.inputs[1], 0)


def _roi_align(op: Op) -> None:
    op.join(op.x, 1, op.y, 1)
    for tensor in op.inputs[1:]:
        op.join(tensor, 0, op.y, 0)


def _tile(op: Op) -> None:
    repeats = constant_value(op.inputs[1])
    if repeats is None:
        raise Unknown(f"{op.label} computes its repeats")
    _join_all_but(op, np.flatnonzero(repeats != 1).tolist(), f"{op.label} repeats it")


def _cumsum(op: Op) -> None:
    along = constant_value(op.inputs[1])
    if along is None:
        raise Unknown(f"{op.label} computes its axis")
    _join_all_but(op, [normal(int(along), len(op.dims(op.x)))], f"{op.label} sums along it")


def _attention(op: Op) -> None:
    """Heads of query, key and value, as an axis of their own or merged with their elements, go together.

    Several heads of the query may share one of the key and value, and all go with it.
    """
    if any(op.has(slot) for slot in (4, 5)) or len(op.outputs) > 1:
        raise Unknown(f"{op.label} keeps keys and values of earlier steps")
    query, key, value = op.inputs[:3]
    merged = len(op.dims(query)) == 3
    axis = 2 if merged else 1
    widths = [_counted(op, tensor, axis) for tensor in (query, key, value, op.y)]
    many, few = (int(op.attr(name, n)) for name, n in zip(("q_num_heads", "kv_num_heads"), widths, strict=False))
    for tensor in (key, value, op.y):
        op.join(query, 0, tensor, 0)
    for tensor, width in zip((query, key, value, op.y), widths, strict=True):
        places = np.arange(width)
        op.join(tensor, axis, key, axis, places, places // (width // few) * (widths[1] // few))
    if merged:
        for tensor, name, each in (
            (query, "q_num_heads", widths[0] // many),
            (key, "kv_num_heads", widths[1] // few),
        ):
            op.follow(tensor, axis, _recount(op, name, each))
    if op.has(3) and len(op.dims(op.inputs[3])) == 4 and op.dims(op.inputs[3])[1] != 1:
        places = np.arange(many)
        op.join(op.inputs[3], 1, query, axis, places, places * (widths[0] // many))


def _counted(op: Op, tensor: gs.Tensor, axis: int) -> int:
    size = op.dims(tensor)[axis]
    if not isinstance(size, int):
        raise Unknown(f"the channels of {op.label} are not counted in the file")
    return size


def _recount(op: Op, name: str, each: int) -> Callable[[Cut, Indices], None]:
    """Follow a cut in an attribute that counts heads or groups of ``each`` positions."""
    return lambda _, kept: op.node.attrs.update({name: len(kept) // each})


def _rotary(op: Op) -> None:
    """Turns pairs of elements of a head; the heads are an axis of their own, or merged with their elements."""
    op.join(op.x, 0, op.y, 0)
    op.join(op.x, 1, op.y, 1)
    if len(op.dims(op.x)) == 4:
        op.join(op.x, 2, op.y, 2)
        return
    width, heads = _counted(op, op.x, 2), int(op.attr("num_heads", 0))
    if not heads:
        raise Unknown(f"the heads of {op.label} are not counted in the file")
    places, each = np.arange(width), width // heads
    op.join(op.x, 2, op.y, 2)
    op.join(op.x, 2, op.x, 2, places, places // each * each)
    op.follow(op.x, 2, _recount(op, "num_heads", each))


def _quantized(op: Op) -> None:
    raise Unknown(f"{op.label} holds it quantized: prune before quantizing")


RULES: dict[str, Rule] = {
    **dict.fromkeys(_UNARY.split(), _unary),
    **dict.fromkeys(_BROADCAST.split(), _broadcast),
    **dict.fromkeys(_POOLS.split(), _pool),
    **dict.fromkeys(_REDUCTIONS.split(), _reduce),
    **dict.fromkeys(GATES, _recurrent),
    "ArgMax": _arg,
    "ArgMin": _arg,
    "Attention": _attention,
    "BatchNormalization": _batch_norm,
    "Concat": _concat,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "ConvInteger": _quantized,
    "CumSum": _cumsum,
    "DepthToSpace": _depth_to_space,
    "DequantizeLinear": _quantized,
    "DynamicQuantizeLinear": _quantized,
    "Expand": _expand,
    "Flatten": flatten,
    "Gather": _gather,
    "Gemm": _gemm,
    "GridSample": _grid_sample,
    "GroupNormalization": _group_norm,
    "Hardmax": _softmax,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "LogSoftmax": _softmax,
    "MatMul": _matmul,
    "MatMulInteger": _quantized,
    "Pad": _pad,
    "QLinearConv": _quantized,
    "QLinearMatMul": _quantized,
    "QuantizeLinear": _quantized,
    "RMSNormalization": _layer_norm,
    "Reshape": reshape,
    "Resize": _resize,
    "RoiAlign": _roi_align,
    "RotaryEmbedding": _rotary,
    "Shape": shape,
    "Slice": _slice,
    "Softmax": _softmax,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": unsqueeze,
    "Upsample": _resize,
}
