"""Layers for random graphs: what holds weights, what exporters spell out in many nodes, and arithmetic on shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from random_builder import Builder, RejectedError, Value
from random_ops import operand, padded, reduced, signed, sliced

_FLOAT32 = np.dtype(np.float32)


def _image(b: Builder) -> Value:
    return b.pick("f", lambda value: value.rank in (3, 4) and bool(value.size(1)) and value.dtype == _FLOAT32)


def _weight(b: Builder, shape: tuple[int, ...]) -> Value:
    return b.constant(b.random(shape))


def _window(b: Builder, rank: int) -> dict[str, Any]:
    """Kernel and padding of a convolution or a pool; all attributes but the kernel may be missing."""
    kernel = [b.choose([1, 1, 2, 3]) for _ in range(rank)]
    attributes: dict[str, Any] = {"kernel_shape": kernel}
    if b.chance():
        attributes["pads"] = [min(b.number(0, 1), size - 1) for size in kernel * 2]
    elif b.chance(3):
        attributes["auto_pad"] = b.choose(["SAME_UPPER", "SAME_LOWER", "VALID"])
    if b.chance(3):
        attributes["strides"] = [b.number(1, 2) for _ in range(rank)]
    return attributes


def convolution(b: Builder) -> None:
    x = _image(b)
    if b.chance(3):
        x = _spatial_pad(b, x, b.choose([None, 0.0, 0.0, 1.0]))
    channels = x.size(1) or 1
    attributes = _window(b, x.rank - 2)
    if b.chance():
        group = b.choose([1, channels])
        made = group * b.number(1, 2)
        weight = (made, channels // group, *attributes["kernel_shape"])
        op = "Conv"
    else:
        group, made = 1, b.number(1, 3)
        weight = (channels, made, *attributes["kernel_shape"])
        op = "ConvTranspose"
    bias = [_weight(b, (made,))] if b.chance() else []
    y = b.add(op, [x, _weight(b, weight), *bias], group=group, exact=False, **attributes)[0]
    _epilogue(b, y)


def _spatial_pad(b: Builder, x: Value, value: float | None) -> Value:
    ends = [0, 0, *(b.choose([0, 1, 2, -1]) for _ in range(x.rank - 2))]
    return padded(b, x, [*ends, *(min(end, 1) for end in ends)], "constant", value)


def _epilogue(b: Builder, y: Value) -> None:
    """What may be folded into the weights before it, or may not."""
    for _ in range(b.number(0, 2)):
        step = b.choose(["BatchNormalization", "Mul", "Add", "Div", "Sub", "Relu", "Transpose"])
        if step == "BatchNormalization":
            y = _normalised(b, y)
        elif step == "Relu":
            y = b.add("Relu", [y])[0]
        elif step == "Transpose":
            y = b.add("Transpose", [y], perm=list(range(y.rank))[::-1] or None)[0]
        else:
            constant = operand(b, y, (2.0, -0.5) if step == "Div" else ())
            reverse = step in ("Mul", "Add", "Sub") and b.chance(3)
            y = b.add(step, [constant, y] if reverse else [y, constant], exact=False)[0]


def _normalised(b: Builder, x: Value) -> Value:
    channels = x.size(1)
    if not channels or x.dtype != _FLOAT32:
        raise RejectedError
    parts = [b.constant(b.random((channels,))) for _ in range(3)]
    variance = b.constant(np.abs(b.random((channels,))) + np.float32(0.5))
    attributes = {"epsilon": b.choose([1e-5, 0.01])} if b.chance() else {}
    return b.add("BatchNormalization", [x, *parts, variance], exact=False, **attributes)[0]


def batch_norm(b: Builder) -> None:
    x = b.pick("f", lambda value: value.rank > 1 and bool(value.size(1)))
    y = _normalised(b, x)
    if b.chance():
        _epilogue(b, y)


def matrix_product(b: Builder) -> None:
    x = b.pick("f", lambda value: value.rank > 0 and bool(value.size(-1)) and value.dtype == _FLOAT32)
    inner = x.size(-1) or 1
    if b.chance(4):
        y = b.add("MatMul", [x, b.pick("f", lambda value: value.rank > 1)], exact=False)[0]
    else:
        shape = b.choose([(inner, 2), (inner, inner), (inner, 3), (inner,), (2, inner, 1)])
        y = b.add("MatMul", [x, _weight(b, shape)], exact=False)[0]
    if b.chance() and y.rank:
        y = b.add("Add", [y, operand(b, y)], exact=False)[0]
        if b.chance() and y.rank and y.size(-1):
            y = b.add("MatMul", [y, _weight(b, (y.size(-1) or 1, 2))], exact=False)[0]
    _epilogue(b, y)


def gemm(b: Builder) -> None:
    x = b.pick("f", lambda value: value.rank == 2 and value.dtype == _FLOAT32)
    transposed = b.chance(3)
    inner = x.size(0 if transposed else 1)
    if not inner:
        raise RejectedError
    attributes: dict[str, Any] = {"transA": 1} if transposed else {}
    shape = (inner, 3)
    if b.chance():
        attributes["transB"] = 1
        shape = (3, inner)
    if b.chance(3):
        attributes |= {"alpha": 0.5, "beta": b.choose([0.0, 2.0])}
    inputs = [x, _weight(b, shape)]
    if b.opset < 11 or b.chance():
        inputs.append(_weight(b, b.choose([(3,), (1,), (), (1, 3), (1, 1)])))
    _epilogue(b, b.add("Gemm", inputs, exact=False, **attributes)[0])


def pool(b: Builder) -> None:
    x = _image(b)
    if b.chance(3):
        x = _spatial_pad(b, x, b.choose([None, 0.0, -1e4]))
    op = b.choose(["MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"])
    if op.startswith("Global"):
        y = b.add(op, [x], exact=False)[0]
        if b.chance():
            b.add("Flatten", [y])
        return
    attributes = _window(b, x.rank - 2)
    if b.opset >= 10 and b.chance(4):
        attributes["ceil_mode"] = 1
    if op == "AveragePool" and b.chance():
        attributes["count_include_pad"] = 1
    b.add(op, [x], exact=op == "MaxPool", **attributes)


def softmax(b: Builder) -> None:
    x = b.pick("f", lambda value: value.rank > 0)
    axis = b.number(0, x.rank - 1)
    if b.chance():
        b.add(b.choose(["Softmax", "LogSoftmax"]), [x], axis=signed(b, axis, x.rank), exact=False)
        return
    largest = reduced(b, "ReduceMax", x, [axis], 1)
    powers = b.add("Exp", b.add("Sub", [x, largest], exact=False), exact=False)[0]
    b.add("Div", [powers, reduced(b, "ReduceSum", powers, [axis], 1)], exact=False)


def normalisation(b: Builder) -> None:
    """LayerNormalization, spelled out or not, and InstanceNormalization; epsilon is large, or errors would be."""
    x = b.pick("f", lambda value: value.rank > 1 and bool(value.size(-1)) and value.dtype == _FLOAT32)
    kind = b.choose(["layer" if b.opset >= 17 else "spelled", "spelled", "instance"])
    if kind == "layer":
        scale = [_weight(b, (x.size(-1) or 1,)) for _ in range(b.number(1, 2))]
        b.add("LayerNormalization", [x, *scale], axis=-1, epsilon=0.1, exact=False)
    elif kind == "instance":
        if not x.size(1):
            raise RejectedError
        b.add(
            "InstanceNormalization", [x, *(_weight(b, (x.size(1) or 1,)) for _ in range(2))], epsilon=0.1, exact=False
        )
    else:
        _spelled_layer_norm(b, x)


def _spelled_layer_norm(b: Builder, x: Value) -> None:
    axes = [x.rank - 1] if b.chance() else [-1]
    centred = b.add("Sub", [x, reduced(b, "ReduceMean", x, axes, 1)], exact=False)[0]
    if b.chance():
        squares = b.add("Pow", [centred, b.constant(2.0, x.dtype)], exact=False)[0]
    else:
        squares = b.add("Mul", [centred, centred], exact=False)[0]
    variance = reduced(b, "ReduceMean", squares, axes, 1)
    root = b.add("Sqrt", b.add("Add", [variance, b.constant(0.1, x.dtype)], exact=False), exact=False)[0]
    y = b.add("Div", [centred, root], exact=False)[0]
    for op in ("Mul", "Add")[: b.number(0, 2)]:
        y = b.add(op, [y, _weight(b, b.choose([(x.size(-1) or 1,), (1,), ()]))], exact=False)[0]


def activation(b: Builder) -> None:
    """Gelu, HardSigmoid and HardSwish as exporters spell them."""
    x = b.pick("f", lambda value: value.dtype != np.float64)

    def number(value: float) -> Value:
        return b.constant(value, x.dtype)

    kind = b.choose(["gelu", "tanh-gelu", "hard-sigmoid", "hard-swish", "swish"])
    if kind == "gelu":
        erf = b.add("Erf", b.add("Div", [x, number(np.sqrt(2))], exact=False), exact=False)[0]
        y = b.add("Mul", [x, b.add("Add", [erf, number(b.choose([1.0, 1.0, 2.0]))], exact=False)[0]], exact=False)[0]
        b.add("Mul", [y, number(0.5)], exact=False)
    elif kind == "tanh-gelu":
        cube = b.add("Mul", [number(0.044715), b.add("Pow", [x, number(3.0)], exact=False)[0]], exact=False)[0]
        inner = b.add("Mul", [b.add("Add", [x, cube], exact=False)[0], number(np.sqrt(2 / np.pi))], exact=False)[0]
        gate = b.add("Add", [b.add("Tanh", [inner], exact=False)[0], number(1.0)], exact=False)[0]
        b.add("Mul", [b.add("Mul", [x, number(0.5)], exact=False)[0], gate], exact=False)
    elif kind == "swish":
        b.add("Mul", [x, b.add("Sigmoid", [x], exact=False)[0]], exact=False)
    else:
        shifted = b.add("Add", [x, number(3.0)], exact=False)[0]
        if b.opset < 11:
            gate = b.add("Clip", [shifted], min=0.0, max=6.0)[0]
        else:
            gate = b.add("Clip", [shifted, number(0.0), number(b.choose([6.0, 6.0, 5.0]))])[0]
        if kind == "hard-swish":
            gate = b.add("Mul", [x, gate], exact=False)[0]
        b.add("Div", [gate, number(6.0)], exact=False)


# ---------------------------------------------------------------------------------------------------- shape arithmetic


def _axis_size(b: Builder, x: Value, axis: int) -> Value:
    """The size of one axis as a vector of one element, in one of the ways in which exporters take it."""
    shape = b.add("Shape", [x])[0]
    if b.chance():
        return sliced(b, shape, [axis], [axis + 1], [0], [1])
    if b.chance():
        return b.add("Gather", [shape, b.constant([axis], np.int64)], axis=0)[0]
    scalar = b.add("Gather", [shape, b.constant(axis, np.int64)], axis=0)[0]
    if b.chance(4):
        scalar = b.add("Cast", b.add("Cast", [scalar], to=6), to=7)[0]
    return b.add("Reshape", [scalar, b.constant([-1], np.int64)])[0]


def shape_chain(b: Builder) -> None:
    x = b.pick("fi", lambda value: value.rank > 0)
    axis = b.number(0, x.rank - 1)
    kind = b.choose(["rebuild", "double", "expand", "fill", "range", "size", "part", "like"])
    size = _axis_size(b, x, axis)
    if kind == "rebuild":
        parts = [_axis_size(b, x, other) if b.chance() else b.constant([0], np.int64) for other in range(x.rank)]
        parts[axis] = b.choose([size, b.constant([-1], np.int64)])
        b.add("Reshape", [x, b.add("Concat", parts, axis=0)[0]])
    elif kind == "double":
        two = b.constant([2], np.int64)
        same = b.add("Div", [b.add("Mul", [size, two])[0], two])[0]
        b.add("Reshape", [x, b.add("Concat", [same, b.constant([-1], np.int64)], axis=0)[0]])
    elif kind == "expand":
        row = b.constant(b.random((1,), x.dtype))
        b.add("Expand", [row, size if b.chance() else b.add("Shape", [x])[0]])
    elif kind == "fill":
        b.add(
            "Add",
            [x, b.add("Cast", b.add("ConstantOfShape", b.add("Shape", [x])), to=1 if x.dtype == _FLOAT32 else 7)[0]],
        )
    elif kind == "range":
        scalar = b.add("Gather", [b.add("Shape", [x])[0], b.constant(axis, np.int64)], axis=0)[0]
        b.add("Range", [b.constant(0, np.int64), scalar, b.constant(1, np.int64)])
    elif kind == "size":
        b.add("Sub", [b.add("Size", [x])[0], b.add("ReduceProd", b.add("Shape", [x]), keepdims=0)[0]])
    elif kind == "part" and b.opset >= 15:
        b.add("Shape", [x], start=axis)
    else:
        b.add("Equal", [size, b.choose([b.constant([2], np.int64), _axis_size(b, x, axis)])])


LAYERS: tuple[Callable[[Builder], None], ...] = (
    convolution, convolution, convolution, batch_norm, matrix_product, matrix_product, gemm, pool, softmax,
    normalisation, normalisation, activation, activation, activation, shape_chain, shape_chain, shape_chain,
)  # fmt: skip
