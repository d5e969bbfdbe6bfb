"""Groups of nodes for random graphs, as networks have them, which rewrites of several nodes look for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import helper
from random_builder import Builder, RejectedError, Value
from random_ops import indexed, operand

_FLOAT32 = np.dtype(np.float32)


def _rows(b: Builder, rank: int | None = None) -> Value:
    """Float32 rows of a known length."""
    return b.pick(
        "f",
        lambda value: (
            bool(value.rank and value.size(-1))
            and value.dtype == _FLOAT32
            and (value.rank == rank or (rank is None and value.rank > 1))
        ),
    )


def _vector(b: Builder, x: Value) -> Value:
    """A constant for each column, in a shape that may also say something else."""
    size = x.size(-1) or 1
    return b.constant(b.random(b.choose([(size,), (size,), (1, size), (1,), ()])))


def _linear(b: Builder, x: Value, columns: int, *, bias: bool = True) -> Value:
    y = b.add("MatMul", [x, b.constant(b.random((x.size(-1) or 1, columns)))], exact=False)[0]
    return b.add("Add", [y, _vector(b, y)], exact=False)[0] if bias else y


def _scalar(b: Builder, value: float) -> Value:
    return b.constant(np.full(b.choose([(), (1,), (1, 1)]), value, np.float32))


def linear(b: Builder) -> None:
    """Two matrices and a vector, or two; as a Gemm with another addend."""
    x = _rows(b, 2)
    y = _linear(b, x, 3)
    if b.chance():
        inputs = [x, b.constant(b.random((x.size(-1) or 1, 3)))]
        if b.opset < 11 or b.chance():
            inputs.append(b.constant(b.random((3,))))
        z = b.add("Gemm", inputs, exact=False)[0]
        b.add("Add", [z, b.choose([y, _vector(b, z)])], exact=False)


def perceptron(b: Builder) -> None:
    """Linear, a gate of erf, linear; whose factors may move into the weights."""
    x = _linear(b, _rows(b), 4, bias=b.chance())
    factor, one = b.choose([0.70710677, 0.70710677, 0.5]), b.choose([1.0, 1.0, 2.0])
    inner = b.add("Mul", [x, _scalar(b, factor)], exact=False)[0]
    gate = b.add("Add", [b.add("Erf", [inner], exact=False)[0], _scalar(b, one)], exact=False)[0]
    y = b.add("Mul", [x, gate] if b.chance() else [gate, x], exact=False)[0]
    if b.chance():
        y = b.add("Mul", [y, _scalar(b, 0.5)], exact=False)[0]
    _linear(b, y, 2)


def attention(b: Builder) -> None:
    """Heads by Reshape and Transpose, scaled products, softmax, and back."""
    x = _rows(b, 3)
    shape = b.constant([0, 0, 2, -1] if b.chance() else [0, -1, 2, 2], np.int64)
    heads = []
    for order in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]):
        y = b.add("Reshape", [_linear(b, x, 4, bias=b.chance()), shape])[0]
        y = b.add("Transpose", [y], perm=order)[0]
        heads.append(b.add("Mul", [y, _scalar(b, 0.25)], exact=False)[0] if b.chance(3) else y)
    scores = b.add("MatMul", heads[:2], exact=False)[0]
    scores = b.add(b.choose(["Mul", "Div"]), [scores, _scalar(b, 2.0)], exact=False)[0]
    weights = b.add("Softmax", [scores], axis=-1 if b.opset >= 11 else 3, exact=False)[0]
    y = b.add("Transpose", b.add("MatMul", [weights, heads[2]], exact=False), perm=[0, 2, 1, 3])[0]
    _linear(b, b.add("Reshape", [y, b.constant([0, 0, -1], np.int64)])[0], 3)


def viewed(b: Builder) -> None:
    """Something along the last axis, or a product, between two Reshapes."""
    x = _rows(b, 3)
    size = x.size(-1) or 1
    flat = b.add("Reshape", [x, b.constant([-1, size], np.int64)])[0]
    kind = b.choose(["norm", "softmax", "gemm", "matmul"])
    if kind == "norm" and b.opset >= 17:
        y = b.add("LayerNormalization", [flat, b.constant(b.random((size,)))], epsilon=0.1, exact=False)[0]
    elif kind == "softmax":
        y = b.add("Softmax", [flat], axis=1, exact=False)[0]
    elif kind == "gemm":
        arrays = [b.constant(b.random((size, 3))), b.constant(b.random((3,)))]
        y = b.add("Gemm", [flat, *arrays], exact=False)[0]
    else:
        y = b.add("MatMul", [flat, b.constant(b.random((size, 3)))], exact=False)[0]
    middle = x.size(1)
    target = [-1, middle or 1, y.size(-1) or 1] if b.chance() else [1, -1, y.size(-1) or 1]
    b.add("Reshape", [y, b.constant(target, np.int64)])


def unstacked(b: Builder) -> None:
    """A Split into single slices, each squeezed."""
    x = b.pick("fi", lambda value: value.rank > 1 and value.size(0) in (2, 3))
    parts = x.size(0) or 1
    if b.opset < 13:
        made = b.add("Split", [x], parts, axis=0)
    else:
        made = b.add("Split", [x, b.constant([1] * parts, np.int64)], parts, axis=0)
    slices = [indexed(b, "Squeeze", part, [0], 13) for part in made]
    b.add("Add", slices[:2] if b.chance() else slices[:1] * 2, exact=False)


def bounded(b: Builder) -> None:
    """Min of Max, Max of Min, or of Relu, with bounds that may cross."""
    x = b.pick("fi")
    for op in b.choose([("Max", "Min"), ("Min", "Max"), ("Relu", "Min"), ("Min", "Relu"), ("Max", "Max")]):
        bound = b.constant(np.full(b.choose([(), (1,)]), b.choose([0.0, 6.0, -1.0])), x.dtype)
        x = b.add(op, [x] if op == "Relu" else [x, bound])[0]


def mish(b: Builder) -> None:
    x = b.pick("f", lambda value: value.dtype == _FLOAT32)
    gate = b.add("Tanh", b.add("Softplus", [x], exact=False), exact=False)[0]
    b.add("Mul", [x, gate] if b.chance() else [gate, x], exact=False)


def transposed_pair(b: Builder) -> None:
    """Two tensors under one permutation, or two, joined by an element-wise operator."""
    x = b.pick("f", lambda value: value.rank > 1)
    y = b.add("Tanh", [x], exact=False)[0]
    order = b.shuffled(x.rank)
    other = order if b.chance(3) is False else b.shuffled(x.rank)
    sides = [b.add("Transpose", [value], perm=perm)[0] for value, perm in ((x, order), (y, other))]
    z = b.add(b.choose(["Add", "Mul", "Sub"]), sides, exact=False)[0]
    if b.chance():
        b.add("Transpose", [z], perm=[int(axis) for axis in np.argsort(order)])


def scaled_norm(b: Builder) -> None:
    """A LayerNormalization with a factor and an addend behind it."""
    if b.opset < 17:
        raise RejectedError
    x = _rows(b)
    weights = [b.constant(b.random((x.size(-1) or 1,))) for _ in range(b.number(1, 2))]
    y = b.add("LayerNormalization", [x, *weights], epsilon=0.1, exact=False)[0]
    for op in b.choose([("Mul",), ("Mul", "Add"), ("Add",), ("Div",)]):
        y = b.add(op, [y, operand(b, y, (2.0,) if op == "Div" else ())], exact=False)[0]
    if b.chance():
        _linear(b, y, 2)


def recurrent(b: Builder) -> None:
    """An LSTM or GRU, with or without an initial state of zeros."""
    x = b.pick("f", lambda value: value.rank == 3 and bool(value.size(1) and value.size(2)) and value.dtype == _FLOAT32)
    op, gates = b.choose([("LSTM", 4), ("GRU", 3), ("RNN", 1)])
    inputs: list[Value | None] = [
        x,
        b.constant(b.random((1, gates * 2, x.size(2) or 1))),
        b.constant(b.random((1, gates * 2, 2))),
        b.constant(b.random((1, gates * 4))) if b.chance() else None,
        None,
    ]
    for _ in range(2 if op == "LSTM" else 1):
        state = b.random((1, x.size(1) or 1, 2)) * b.choose([0.0, 0.0, 1.0])
        inputs.append(b.constant(state, np.float32))
    y = b.add(op, inputs, 1, hidden_size=2, exact=False)[0]
    indexed(b, "Squeeze", y, [1], 13)


def sequence(b: Builder) -> None:
    """A tensor put into a sequence and taken out again."""
    if b.opset < 11:
        raise RejectedError
    x = b.pick("fi", lambda value: value.rank > 0)
    y = b.pick(x.kind, lambda value: value.dtype == x.dtype and value.rank == x.rank)
    held, made = b.name("s"), b.name()
    position = b.constant(b.choose([0, 1, -1]), np.int64)
    if b.chance():
        first = helper.make_node("SequenceConstruct", [x.name, y.name], [held])
    else:
        first = helper.make_node("SplitToSequence", [x.name], [held], axis=0, keepdims=b.number(0, 1))
    if b.chance():
        second = helper.make_node("SequenceAt", [held, position.name], [made])
    else:
        second = helper.make_node("ConcatFromSequence", [held], [made], axis=0)
    b.add_together([first, second], [made])


PATTERNS: tuple[Callable[[Builder], None], ...] = (
    linear, perceptron, attention, viewed, unstacked, bounded, mish, transposed_pair, scaled_norm, recurrent, sequence,
)  # fmt: skip
