"""Rules that drop nodes which pass their input through, bit for bit."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxslim.graph.purity import dropout_is_inference
from onnxslim.graph.symbols import Element
from onnxslim.passes._rewriter import Rewriter
from onnxslim.passes._rules import Refused, Rule, rule

__all__ = ["COPY_RULES", "NOOP_RULES"]

# Slice ends are written as the largest 32- or 64-bit integer where "to the end" is meant; no dimension is that long.
_TO_THE_END = 2**31 - 1
_SUMS_OF_PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
# A neutral element is looked for in constants up to this many elements; larger ones are weights.
_NEUTRAL_LIMIT = 1 << 16


def _drop(g: Rewriter, node: gs.Node, why: str) -> str | None:
    op = node.op
    return f"dropped {op}: {why}" if g.bypass(node, node.inputs[0]) else None


@rule("drop-identity", "Identity")
def _identity(g: Rewriter, node: gs.Node) -> str | None:
    """Identity(x) -> x, unless x is an input and the result an output of the graph."""
    return _drop(g, node, "it copies its input")


@rule("drop-dropout", "Dropout")
def _dropout(g: Rewriter, node: gs.Node) -> str | Refused | None:
    """Dropout(x) -> x in inference, when nobody reads the mask."""
    if not dropout_is_inference(node, g.opset(node)):
        return Refused("it may be in training mode")
    if len(node.outputs) > 1 and not g.is_unused(node.outputs[1]):
        return Refused("its mask is read")
    return _drop(g, node, "it is in inference mode")


@rule("drop-cast", "Cast", since=6)
def _cast(g: Rewriter, node: gs.Node) -> str | None:
    """Cast(x) -> x when x has that dtype already."""
    source = g.dtype(node.inputs[0])
    if source is None or node.attrs.get("to") != onnx.helper.np_dtype_to_tensor_dtype(source):
        return None
    return _drop(g, node, f"its input is {source} already")


@rule("drop-transpose", "Transpose")
def _transpose(g: Rewriter, node: gs.Node) -> str | None:
    """Transpose(x, 0, 1, 2, ...) -> x."""
    perm = node.attrs.get("perm")
    rank = g.rank(node.inputs[0])
    if perm is None:
        return _drop(g, node, f"it reverses {rank} axes") if rank is not None and rank <= 1 else None
    return _drop(g, node, "it leaves the axes in order") if list(perm) == list(range(len(perm))) else None


@rule("drop-reshape", "Reshape", "Flatten", "Expand", "Tile", "Pad", "Squeeze", "Unsqueeze")
def _same_shape(g: Rewriter, node: gs.Node) -> str | None:
    """Reshape, Flatten, Expand, Tile, Pad -> x where the result has the shape of x for every input.

    A Pad that pads one end by what it cuts off the other is no such case.
    """
    before, after = g.shape(node.inputs[0]), g.shape(node.outputs[0])
    if before is None or before != after:
        return None
    if node.op == "Pad":
        pads = g.integers(node, 1, "pads")
        if pads is None or any(pads):
            return None
    return _drop(g, node, "its input has that shape already")


@rule("drop-squeeze", "Squeeze", "Unsqueeze")
def _squeeze_pair(g: Rewriter, node: gs.Node) -> str | None:
    """Squeeze(Unsqueeze(x, a), a) -> x and the other way round, for explicit axes.

    Both count the axes on the tensor that has them, so equal lists mean equal axes, negative ones too.
    """
    inner = g.producer(node.inputs[0], "Unsqueeze" if node.op == "Squeeze" else "Squeeze")
    if inner is None:
        return None
    axes, inner_axes = g.integers(node, 1, "axes"), g.integers(inner, 1, "axes")
    if not axes or not inner_axes or sorted(axes) != sorted(inner_axes):
        return None
    name = node.op
    if not g.bypass(node, inner.inputs[0]):
        return None
    return f"dropped {name}: it undoes the {inner.op} before it"


@rule("drop-tile", "Tile", since=6)
def _tile(g: Rewriter, node: gs.Node) -> str | None:
    """Tile(x, 1, 1, ...) -> x."""
    repeats = g.integers(node, 1)
    return _drop(g, node, "it repeats once") if repeats is not None and set(repeats) <= {1} else None


@rule("drop-pad", "Pad", since=2)
def _pad(g: Rewriter, node: gs.Node) -> str | None:
    """Pad(x, 0, 0, ...) -> x."""
    pads = g.integers(node, 1, "pads")
    return _drop(g, node, "it pads by nothing") if pads is not None and not any(pads) else None


@rule("drop-slice", "Slice")
def _slice(g: Rewriter, node: gs.Node) -> str | None:
    """Slice(x) -> x when it takes every axis from its start to its end in steps of 1."""
    if len(node.inputs) > 4 and not node.inputs[4].is_empty() and set(g.integers(node, 4) or [0]) != {1}:
        return None
    before, after = g.shape(node.inputs[0]), g.shape(node.outputs[0])
    if before is not None and before == after:
        return _drop(g, node, "it takes everything")
    starts, ends = g.integers(node, 1, "starts"), g.integers(node, 2, "ends")
    if not starts or ends is None or any(starts) or min(ends, default=0) < _TO_THE_END:
        return None
    return _drop(g, node, "it takes everything")


@rule("drop-reduce", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceMean")
def _reduce(g: Rewriter, node: gs.Node) -> str | None:
    """ReduceMax, ReduceMin, ReduceProd over axes of size 1 that stay -> x; the sum and the mean of integers too.

    Not the sum of floats: 0.0 + -0.0 is 0.0.
    """
    before, after, dtype = g.shape(node.inputs[0]), g.shape(node.outputs[0]), g.dtype(node.inputs[0])
    if before is None or before != after or dtype is None or dtype.kind not in "fiu":
        return None
    axes = g.integers(node, 1, "axes")
    if not axes and (node.attrs.get("noop_with_empty_axes", 0) or (len(node.inputs) > 1 and axes is None)):
        return None
    reduced = axes or range(len(before))
    if any(not -len(before) <= axis < len(before) or before[axis] != 1 for axis in reduced):
        return None
    if node.op in ("ReduceSum", "ReduceMean") and dtype.kind == "f":
        return None
    return _drop(g, node, "it reduces axes of size 1")


@rule("drop-resize", "Resize", "Upsample")
def _resize(g: Rewriter, node: gs.Node) -> str | Refused | None:
    """Resize(x) -> x where the size stays, taking nearest elements; other modes multiply neighbours by 0, also inf."""
    before, after = g.shape(node.inputs[0]), g.shape(node.outputs[0])
    if before is None or before != after or node.attrs.get("mode", "nearest") != "nearest":
        return None
    if node.attrs.get("coordinate_transformation_mode", "half_pixel") in ("tf_crop_and_resize", "align_corners"):
        return None
    if not _keeps_scale(g, node):
        return Refused("its scales are not exactly 1, so that it may leave elements out and repeat others")
    return _drop(g, node, "the size stays")


def _keeps_scale(g: Rewriter, node: gs.Node) -> bool:
    """Whether the scales are 1: those that are given, or those that follow from sizes."""
    if len(node.inputs) > 3 and not node.inputs[3].is_empty():
        return True
    place = 2 if node.op == "Resize" and g.opset(node) >= 11 else 1
    scales = g.constant(node.inputs[place]) if len(node.inputs) > place else node.attrs.get("scales")
    return scales is not None and all(scale == 1 for scale in np.asarray(scales).reshape(-1))


@rule("drop-single", "Concat", "Sum", "Max", "Min", "Mean", "Split")
def _single(g: Rewriter, node: gs.Node) -> str | None:
    """Concat, Sum, Max, Min, Mean of one tensor, Split into one -> that tensor."""
    if len(node.outputs) != 1 or (node.op != "Split" and len(node.inputs) != 1):
        return None
    return _drop(g, node, "there is but one part")


@rule("drop-idempotent", "Relu", "Abs", "Ceil", "Floor", "Round", "Sign")
def _idempotent(g: Rewriter, node: gs.Node) -> str | None:
    """f(f(x)) -> f(x)."""
    return _drop(g, node, "done twice is done once") if g.producer(node.inputs[0], node.op) else None


@rule("drop-involution", "Not", "Neg")
def _involution(g: Rewriter, node: gs.Node) -> str | None:
    """Not(Not(x)) -> x, Neg(Neg(x)) -> x."""
    inner = g.producer(node.inputs[0], node.op)
    name = node.op
    if inner is None or not g.bypass(node, inner.inputs[0]):
        return None
    return f"dropped {name}: it undoes the one before it"


@rule("drop-neutral", "Add", "Sub", "Mul", "Div", "Pow", since=7)
def _neutral(g: Rewriter, node: gs.Node) -> str | Refused | None:
    """x * 1, 1 * x, x / 1, x ** 1, x - 0, x + (-0.0), and for integers x + 0 -> x.

    Not x + 0.0 and not x - (-0.0), which turn -0.0 into 0.0, unless x is a sum of products: that starts from 0.0 and so
    is no -0.0. And only when the constant does not widen x.
    """
    sides = [(0, 1), (1, 0)] if node.op in ("Add", "Mul") else [(0, 1)]
    for source, other in sides:
        constant = g.constant(node.inputs[other], limit=_NEUTRAL_LIMIT)
        if constant is None or not constant.size or constant.dtype.kind not in "fiu":
            continue
        if not _is_neutral(node.op, constant):
            zero = node.op in ("Add", "Sub") and constant.dtype.kind == "f" and not constant.any()
            if not zero:
                continue
            maker = g.producer(node.inputs[source], *_SUMS_OF_PRODUCTS)
            if maker is None or float(maker.attrs.get("alpha", 1.0)) < 0:
                return Refused("adding 0.0 turns -0.0 into 0.0")
        if not _fits(g.shape(node.inputs[source]), constant.shape):
            continue
        op = node.op
        if g.bypass(node, node.inputs[source]):
            return f"dropped {op}: its constant is neutral"
    return None


@rule("drop-neutral", "And", "Or", "Xor", since=7)
def _neutral_truth(g: Rewriter, node: gs.Node) -> str | None:
    """x and true, x or false, x xor false -> x, when the constant does not widen x."""
    for source, other in ((0, 1), (1, 0)):
        constant = g.constant(node.inputs[other], limit=_NEUTRAL_LIMIT)
        if constant is None or not constant.size or constant.dtype.kind != "b":
            continue
        neutral = constant.all() if node.op == "And" else not constant.any()
        if neutral and _fits(g.shape(node.inputs[source]), constant.shape):
            op = node.op
            if g.bypass(node, node.inputs[source]):
                return f"dropped {op}: its constant is neutral"
    return None


@rule("drop-where", "Where", since=9)
def _decided(g: Rewriter, node: gs.Node) -> str | None:
    """Where(true, a, b) -> a, Where(false, a, b) -> b, Where(c, a, a) -> a, when nothing is widened.

    Not of floats: ONNX Runtime adds what is chosen to 0.0, which turns -0.0 into 0.0.
    """
    dtype = g.dtype(node.outputs[0])
    if dtype is None or dtype.kind not in "iub":
        return None
    condition = g.constant(node.inputs[0], limit=_NEUTRAL_LIMIT)
    if node.inputs[1] is node.inputs[2]:
        chosen = node.inputs[1]
    elif condition is not None and condition.size and (condition.all() or not condition.any()):
        chosen = node.inputs[1 if condition.all() else 2]
    else:
        return None
    shape = g.shape(chosen)
    if shape is None or shape != g.shape(node.outputs[0]):
        return None
    return "dropped Where: it always takes the same" if g.bypass(node, chosen) else None


def _is_neutral(op: str, constant: np.ndarray) -> bool:
    if op in ("Mul", "Div", "Pow"):
        return bool((constant == constant.dtype.type(1)).all())
    if constant.any():
        return False
    if constant.dtype.kind in "iu":
        return True
    negative = np.signbit(constant)
    return bool(negative.all() if op == "Add" else not negative.any())


def _fits(shape: list[Element] | None, constant: tuple[int, ...]) -> bool:
    """Whether broadcasting a constant against a tensor of that shape provably gives that shape."""
    if not constant:
        return True
    if shape is None or len(constant) > len(shape):
        return False
    met = shape[len(shape) - len(constant) :]
    return all(size in (1, old) for size, old in zip(constant, met, strict=True))


COPY_RULES: tuple[Rule, ...] = (_identity, _dropout)
NOOP_RULES: tuple[Rule, ...] = (
    *COPY_RULES,
    _cast,
    _transpose,
    _same_shape,
    _squeeze_pair,
    _tile,
    _pad,
    _slice,
    _reduce,
    _resize,
    _single,
    _idempotent,
    _involution,
    _neutral,
    _neutral_truth,
    _decided,
)
