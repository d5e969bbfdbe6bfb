"""Facts about the results of matrix products, convolutions, pools and reductions."""

from __future__ import annotations

from functools import reduce

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.graph.fact_elementwise import ARITHMETIC
from onnxslim.graph.fact_values import (
    Results,
    any_shape,
    broadcast,
    computed,
    fixed_integers,
    has_input,
    known_sizes,
    object_array,
    on,
    or_unknown,
)
from onnxslim.graph.facts import Fact, Facts, Shape
from onnxslim.graph.symbols import (
    Element,
    floor_divide,
    fresh,
)
from onnxslim.graph.walk import constant_value

_INT64 = np.dtype(np.int64)


@on("MatMul")
def _matmul(facts: Facts, node: gs.Node) -> Results:
    left, right = (facts.of(tensor) for tensor in node.inputs[:2])
    if left.dtype is None or left.shape is None or right.shape is None or not left.shape or not right.shape:
        return [Fact(left.dtype)] if left.dtype is not None else None
    a, b = left.shape, right.shape
    batch = broadcast([a[:-2], b[:-2]]) or ()
    rows = a[-2:-1] if len(a) > 1 else ()
    columns = b[-1:] if len(b) > 1 else ()
    return [Fact(left.dtype, (*batch, *rows, *columns))]


@on("Gemm")
def _gemm(facts: Facts, node: gs.Node) -> Results:
    left, right = (facts.of(tensor) for tensor in node.inputs[:2])
    if left.dtype is None or left.shape is None or right.shape is None or len(left.shape) != 2 or len(right.shape) != 2:
        return None
    rows = left.shape[1 if node.attrs.get("transA", 0) else 0]
    columns = right.shape[0 if node.attrs.get("transB", 0) else 1]
    return [Fact(left.dtype, (rows, columns))]


@on("Conv", "MaxPool", "AveragePool", "LpPool")
def _windows(facts: Facts, node: gs.Node) -> Results:
    """The spatial sizes that ONNX does not tell for symbolic inputs, or tells otherwise than runtimes."""
    source = facts.of(node.inputs[0])
    if source.shape is None or source.dtype is None or len(source.shape) < 3:
        return None
    sizes = _window_sizes(facts, node, source.shape)
    if sizes is None:
        return None
    channels = source.shape[1]
    if node.op == "Conv":
        weight = facts.of(node.inputs[1])
        if weight.shape is None or len(weight.shape) != len(source.shape):
            return None
        channels = weight.shape[0]
    shape = (source.shape[0], channels, *sizes)
    # The second output of a MaxPool says where each maximum lay.
    return [Fact(source.dtype, shape), Fact(_INT64, shape)][: len(node.outputs)]


def _window_sizes(facts: Facts, node: gs.Node, shape: Shape) -> list[Element] | None:
    rank = len(shape) - 2
    kernel = node.attrs.get("kernel_shape")
    if kernel is None and node.op == "Conv":
        weight = facts.of(node.inputs[1]).shape
        kernel = None if weight is None else list(weight[2:])
    padding = node.attrs.get("auto_pad", "NOTSET")
    if kernel is None or not all(isinstance(size, int) for size in kernel) or len(kernel) != rank:
        return None
    strides, dilations = node.attrs.get("strides", [1] * rank), node.attrs.get("dilations", [1] * rank)
    pads = node.attrs.get("pads", [0] * 2 * rank) if padding == "NOTSET" else [0] * 2 * rank
    if len(pads) != 2 * rank or len(strides) != rank or len(dilations) != rank or min(strides) < 1:
        return None
    if padding not in ("NOTSET", "VALID"):
        # A pool's dilations count for ONNX and not for every runtime.
        certain = node.op == "Conv" or all(dilation == 1 for dilation in dilations)
        return [
            floor_divide(shape[2 + axis] + (strides[axis] - 1), strides[axis]) if certain else fresh()
            for axis in range(rank)
        ]
    sizes: list[Element] = []
    for axis in range(rank):
        room = shape[2 + axis] + (pads[axis] + pads[axis + rank] - dilations[axis] * (kernel[axis] - 1) - 1)
        size = floor_divide(room, strides[axis]) + 1
        if isinstance(size, int) and size < 0:
            return None
        if node.attrs.get("ceil_mode", 0) and not _fills(room, strides[axis], shape[2 + axis] + pads[axis]):
            size = fresh()
        sizes.append(size)
    return sizes


def _fills(room: Element, stride: int, end: Element) -> bool:
    """Whether a pool whose last window may be cut off has as many windows as one whose may not.

    A window that starts behind the tensor counts for ONNX before version 22, not for runtimes.
    """
    return stride == 1 or (isinstance(room, int) and isinstance(end, int) and room % stride == 0 and room < end)


@on("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def _global_pool(facts: Facts, node: gs.Node) -> Results:
    source = facts.of(node.inputs[0])
    if source.shape is None or source.dtype is None or len(source.shape) < 2:
        return None
    return [Fact(source.dtype, (*source.shape[:2], *(1,) * (len(source.shape) - 2)))]


@on(
    *("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2"),
    *("ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare", "ArgMax", "ArgMin"),
)
def _reduce(facts: Facts, node: gs.Node) -> Results:
    source = facts.of(node.inputs[0])
    index = node.op.startswith("Arg")
    dtype = _INT64 if index else source.dtype
    if dtype is None:
        return None
    rank = None if source.shape is None else len(source.shape)
    axes = [int(node.attrs.get("axis", 0))] if index else fixed_integers(facts, node, 1, "axes")
    if not index and axes is None and has_input(node, 1):
        return [Fact(dtype, any_shape(rank) if node.attrs.get("keepdims", 1) else None)]
    if not axes:
        if node.attrs.get("noop_with_empty_axes", 0):
            return [source] if node.op in _SAME_WITHOUT_AXES else [Fact(dtype, source.shape)]
        axes = None
    if source.shape is None or rank is None:
        return [Fact(dtype)]
    gone = set(range(rank)) if axes is None else {axis % rank if rank else 0 for axis in axes}
    keep = bool(node.attrs.get("keepdims", 1))
    shape = tuple(1 if axis in gone else size for axis, size in enumerate(source.shape) if keep or axis not in gone)
    value = _reduced(node.op, source, gone)
    return [Fact(dtype, shape) if value is None else computed(dtype, value.reshape(known_sizes(shape)))]


_SAME_WITHOUT_AXES = frozenset({"ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd"})


def _reduced(op: str, source: Fact, gone: set[int]) -> np.ndarray | None:
    """The result of reducing a small vector of integers to one number."""
    operation = {"ReduceProd": "Mul", "ReduceSum": "Add", "ReduceMax": "Max", "ReduceMin": "Min"}.get(op)
    if source.value is None or operation is None or source.value.size == 0 or len(gone) != source.value.ndim:
        return None
    combine = ARITHMETIC[operation]
    result = reduce(lambda a, b: or_unknown(combine(a, b)), source.value.reshape(-1).tolist())
    return object_array([result])


@on("Resize", "Upsample")
def _resize(facts: Facts, node: gs.Node) -> Results:
    """By factors; sizes that are no whole number are rounded down, in float32 by some and in float64 by others."""
    source, version = facts.of(node.inputs[0]), facts.opset(node)
    place = 2 if node.op == "Resize" and version >= 11 else 1
    scales = node.attrs.get("scales")
    if scales is None and has_input(node, place):
        constant = constant_value(node.inputs[place])
        scales = None if constant is None else constant.reshape(-1).tolist()
    if source.shape is None or source.dtype is None or not isinstance(scales, list) or has_input(node, 3):
        return None
    if "axes" in node.attrs:
        axes = [axis % len(source.shape) for axis in node.attrs["axes"]]
        by_axis = dict(zip(axes, scales, strict=False))
        scales = [by_axis.get(axis, 1.0) for axis in range(len(source.shape))]
    if len(scales) != len(source.shape):
        return None
    if node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        return [Fact(source.dtype, any_shape(len(scales)))]
    return [Fact(source.dtype, tuple(_scaled(*each) for each in zip(source.shape, scales, strict=True)))]


def _scaled(size: Element, scale: float) -> Element:
    if scale == int(scale):
        return size * int(scale)
    if not isinstance(size, int):
        return fresh()
    single, double = int(np.float32(size) * np.float32(scale)), int(size * scale)
    return single if single == double else fresh()


@on("STFT")
def _stft(facts: Facts, node: gs.Node) -> Results:
    """ONNX's own inference takes the transform for two-sided where the attribute is left out."""
    source = facts.of(node.inputs[0])
    if source.shape is None or source.dtype is None or not source.shape:
        return None
    return [Fact(source.dtype, (source.shape[0], fresh(), fresh(), 2))]
