"""Nodes for random graphs that move, select, reshape or combine tensors, each as the opset of the graph writes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import helper
from random_builder import Builder, RejectedError, Value

_ANY = "fiub"
_FAR = (0, 1, 2, 3, -1, -2, 5, -5, 100, -100, 2**31 - 1, -(2**31))


def indexed(b: Builder, op: str, x: Value, axes: Sequence[int], since: int, **attributes: Any) -> Value:
    """Add an op whose axes are an attribute before version ``since``, and an input from then on."""
    if b.opset < since:
        return b.add(op, [x], axes=list(axes), **attributes)[0]
    return b.add(op, [x, b.constant(list(axes), np.int64)], **attributes)[0]


def signed(b: Builder, axis: int, rank: int) -> int:
    """An axis, or the same counted from the end where the opset lets one."""
    return axis - rank if b.opset >= 11 and b.chance() else axis


def operand(b: Builder, x: Value, values: Sequence[float] = ()) -> Value:
    """A constant that broadcasts with ``x``, in one of the shapes that exporters write."""
    last = x.size(-1) if x.rank else None
    shapes: list[tuple[int, ...]] = [(), (1,), (1,) * x.rank, (1,) * (x.rank + 1)]
    if last is not None:
        shapes += [(last,), (1, last)]
    for axis in range(x.rank):
        size = x.size(axis)
        if size is not None:
            shapes.append((size, *(1,) * (x.rank - axis - 1)))
            shapes.append((*(1,) * axis, size, *(1,) * (x.rank - axis - 1)))
    shape = b.choose(shapes)
    if values:
        return b.constant(np.full(shape, b.choose(list(values)), x.dtype))
    return b.constant(b.random(shape, x.dtype))


# -------------------------------------------------------------------------------------------------------- element-wise


def exact_unary(b: Builder) -> None:
    op = b.choose(["Relu", "Neg", "Abs", "Identity", "Not", "Floor", "Ceil", "Sign"])
    x = b.pick("b") if op == "Not" else b.pick("fi", lambda value: op in ("Relu", "Neg", "Abs") or value.exact)
    b.add(op, [x])


def twice(b: Builder) -> None:
    """Ops that undo themselves or that say the same twice."""
    op = b.choose(["Neg", "Abs", "Relu", "Identity", "Not"])
    first = b.add(op, [b.pick("b" if op == "Not" else "fi")])[0]
    b.add(op, [first])


def rounding_unary(b: Builder) -> None:
    x = b.pick("f")
    op = b.choose(["Tanh", "Sigmoid", "Erf", "Softplus", "LeakyRelu", "Elu", "HardSigmoid", "HardSwish", "Gelu", "Exp"])
    if op == "Exp":
        x = b.add("Tanh", [x], exact=False)[0]
    attributes = {"alpha": 0.25} if op in ("LeakyRelu", "Elu", "HardSigmoid") and b.chance() else {}
    b.add(op, [x], exact=False, **attributes)


def arithmetic(b: Builder) -> None:
    x = b.pick("fiu")
    op = b.choose(["Add", "Sub", "Mul", "Min", "Max", "Div", "Mod"])
    if op in ("Div", "Mod"):
        y = operand(b, x, (2.0, 4.0, 3.0, 7.0) if x.kind != "f" else (0.5, -2.0, 3.0))
        attributes = {"fmod": 1} if op == "Mod" and x.kind == "f" and x.exact else {}
        b.add(op, [x, y], exact=False, **attributes)
        return
    y = b.pick(x.kind, lambda value: value.dtype == x.dtype) if b.chance(3) else operand(b, x)
    b.add(op, [x, y] if b.chance() else [y, x], exact=op in ("Min", "Max"))


def chained_arithmetic(b: Builder) -> None:
    """Two constants in a row, which rewrites combine."""
    x = b.pick("fi")
    first, second = b.choose(
        [("Add", "Add"), ("Mul", "Mul"), ("Add", "Sub"), ("Sub", "Add"), ("Mul", "Div"), ("Min", "Max")]
    )
    for op in (first, second):
        constant = operand(b, x, (2.0, 3.0, 5.0) if op == "Div" else ())
        x = b.add(op, [x, constant] if op == "Div" or b.chance(3) else [constant, x], exact=op in ("Min", "Max"))[0]


def neutral(b: Builder) -> None:
    x = b.pick("fi")
    op, value = b.choose([("Add", 0.0), ("Sub", 0.0), ("Mul", 1.0), ("Div", 1.0), ("Add", -0.0), ("Sub", -0.0)])
    constant = operand(b, x, (value,))
    b.add(op, [constant, x] if op in ("Add", "Mul") and b.chance() else [x, constant])


def absorbing(b: Builder) -> None:
    x = b.pick("fi")
    b.add("Mul", [x, operand(b, x, (0.0,))])
    if b.chance():
        b.add("Pow", [x, b.constant(b.choose([1.0, 2.0]), x.dtype)], exact=False)


def comparison(b: Builder) -> None:
    x = b.pick("fi", lambda value: value.exact)
    y = operand(b, x) if b.chance() else b.pick(x.kind, lambda value: value.exact and value.dtype == x.dtype)
    b.add(b.choose(["Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual"]), [x, y])


def logic(b: Builder) -> None:
    x = b.pick("b")
    y = b.pick("b") if b.chance() else b.constant(np.full(b.choose([(), (1,)]), b.chance()), bool)
    b.add(b.choose(["And", "Or", "Xor"]), [x, y])


def where(b: Builder) -> None:
    x = b.pick("fi")
    y = operand(b, x) if b.chance() else b.pick(x.kind, lambda value: value.dtype == x.dtype)
    condition = b.pick("b") if b.chance() else b.constant(np.full(b.choose([(), (1,)]), b.chance()), bool)
    b.add("Where", [condition, x, y])


def clip(b: Builder) -> None:
    x = b.pick("fi")
    for _ in range(b.number(1, 3)):
        low, high = b.choose([(-1, 1), (0, 6), (1, 3), (0, None), (None, 2), (2, -1), (None, None), (-3, 3)])
        if b.opset < 11:
            limits = {key: float(value) for key, value in (("min", low), ("max", high)) if value is not None}
            x = b.add("Clip", [x], **limits)[0]
        else:
            ends = [None if value is None else b.constant(value, x.dtype) for value in (low, high)]
            x = b.add("Clip", [x, *ends])[0]
        if b.chance():
            x = b.add("Relu", [x])[0]


def cast(b: Builder) -> None:
    """One or two casts of what is exact; integers are only made of numbers that fit them."""
    x = b.pick(_ANY, lambda value: value.exact)
    for _ in range(b.number(1, 3)):
        to = np.dtype(b.choose(["float32", "float64", "float16", "int64", "int32", "bool", "uint8", "int8"]))
        if to.kind in "iu" and x.kind == "f" and not all(_fits(array, to) for array in x.arrays):
            continue
        if b.opset >= 15 and b.chance(3):
            like = b.pick(_ANY, lambda value, to=to: value.dtype == to)
            x = b.add("CastLike", [x, like])[0]
        else:
            x = b.add("Cast", [x], to=helper.np_dtype_to_tensor_dtype(to))[0]


def _fits(array: np.ndarray, dtype: np.dtype) -> bool:
    limits, wide = np.iinfo(dtype), array.astype(np.float64)
    low = 0 if dtype.kind == "u" else limits.min / 2
    return bool(np.all(np.isfinite(wide) & (wide >= low) & (wide < limits.max / 2)))


# ------------------------------------------------------------------------------------------------------------- movement


def transpose(b: Builder) -> None:
    x = b.pick(_ANY, lambda value: value.rank > 1)
    for _ in range(b.number(1, 2)):
        order = b.shuffled(x.rank)
        x = b.add("Transpose", [x], perm=order)[0] if b.chance(8) is False else b.add("Transpose", [x])[0]


def transpose_around(b: Builder) -> None:
    """A transpose, something that it can be pushed through, and its inverse."""
    x = b.pick("f", lambda value: value.rank > 1)
    order = b.shuffled(x.rank)
    y = b.add("Transpose", [x], perm=order)[0]
    for _ in range(b.number(1, 2)):
        step = b.choose(["Relu", "Add", "Mul", "Softmax", "Concat", "Reduce", "Pad", "Tanh", "Split"])
        if step in ("Add", "Mul"):
            y = b.add(step, [y, operand(b, y)], exact=False)[0]
        elif step == "Softmax":
            y = b.add("Softmax", [y], axis=b.number(0, y.rank - 1), exact=False)[0]
        elif step == "Concat":
            y = b.add("Concat", [y, y], axis=b.number(0, y.rank - 1))[0]
        elif step == "Reduce":
            y = reduced(b, "ReduceMax", y, [b.number(0, y.rank - 1)], 1)
        elif step == "Pad":
            y = padded(b, y, [b.number(0, 1) for _ in range(2 * y.rank)], "constant", None)
        elif step == "Split":
            y = b.add("Split", [y], 2, axis=b.number(0, y.rank - 1))[0]
        else:
            y = b.add(step, [y], exact=step == "Relu")[0]
    b.add("Transpose", [y], perm=[int(axis) for axis in np.argsort(order)])


def reshape(b: Builder) -> None:
    x = b.pick(_ANY)
    for _ in range(b.number(1, 2)):
        x = b.add("Reshape", [x, b.constant(_target(b, x), np.int64)], **_allowzero(b))[0]


def _allowzero(b: Builder) -> dict[str, int]:
    return {"allowzero": 1} if b.opset >= 14 and b.chance(6) else {}


def _target(b: Builder, x: Value) -> list[int]:
    """Copy, merge, split or fold together the dimensions of ``x``."""
    kind = b.choose(["copy", "flat", "merge", "split", "fixed", "ones"])
    sizes = [x.size(axis) for axis in range(x.rank)]
    if kind == "copy":
        target = [0] * x.rank
        if target and b.chance():
            target[b.number(0, x.rank - 1)] = -1
        return target
    if kind == "merge" and x.rank > 1:
        axis = b.number(0, x.rank - 2)
        return [0] * axis + [-1] + [1 if size is None else size for size in sizes[axis + 2 :]]
    if kind == "split":
        for axis in range(x.rank):
            size = sizes[axis]
            if size is not None and size % 2 == 0 and size:
                return [0] * axis + [2, size // 2] + ([-1] if x.rank > axis + 1 else [])
    if kind == "fixed":
        return [-1 if size is None else size for size in sizes]
    if kind == "ones":
        return [0] * min(1, x.rank) + [-1, 1]
    return [-1]


def squeezing(b: Builder) -> None:
    x = b.pick(_ANY)
    axis = b.number(0, x.rank)
    y = indexed(b, "Unsqueeze", x, [axis if b.chance() or b.opset < 11 else axis - x.rank - 1], 13)
    what = b.choose(["stay", "squeeze", "relu", "other", "all"])
    if what == "relu":
        y = b.add("Relu", [y])[0]
    if what in ("squeeze", "relu"):
        indexed(b, "Squeeze", y, [axis], 13)
    elif what == "other":
        indexed(b, "Unsqueeze", y, [b.number(0, y.rank)], 13)
    elif what == "all":
        b.add("Squeeze", [y])


def flatten(b: Builder) -> None:
    x = b.pick(_ANY)
    b.add("Flatten", [x], axis=b.number(0, x.rank))


def sliced(
    b: Builder, x: Value, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int], steps: Sequence[int]
) -> Value:
    if b.opset < 10:
        if any(step != 1 for step in steps):
            raise RejectedError
        return b.add("Slice", [x], starts=list(starts), ends=list(ends), axes=list(axes))[0]
    kind = b.choose([np.int64, np.int32])
    given = [list(starts), list(ends), list(axes)]
    if b.chance() or any(step != 1 for step in steps):
        given.append(list(steps))
    return b.add("Slice", [x, *(b.constant(each, kind) for each in given)])[0]


def slices(b: Builder) -> None:
    x = b.pick(_ANY, lambda value: value.rank > 0)
    for _ in range(b.number(1, 3)):
        axes = sorted({b.number(0, x.rank - 1) for _ in range(b.number(1, 2))})
        starts, ends = ([b.choose(_FAR) for _ in axes] for _ in range(2))
        if b.chance():
            starts, ends = [b.choose([0, 0, 1]) for _ in axes], [b.choose([1, 2, -1, 2**31 - 1]) for _ in axes]
        x = sliced(b, x, starts, ends, axes, [b.choose([1, 1, 1, 2, -1]) for _ in axes])


def concat(b: Builder) -> None:
    x = b.pick(_ANY, lambda value: value.rank > 0)
    axis = b.number(0, x.rank - 1)
    parts = [x]
    for _ in range(b.number(0, 2)):
        fits = [axis] if b.chance() else []
        if fits and all(x.size(other) is not None for other in range(x.rank)):
            shape = [b.number(0, 2) if other == axis else x.size(other) or 0 for other in range(x.rank)]
            parts.append(b.constant(b.random(shape, x.dtype)))
        else:
            parts.append(b.pick(x.kind, lambda value: value.dtype == x.dtype and value.rank == x.rank))
    y = b.add("Concat", parts, axis=signed(b, axis, x.rank))[0]
    if b.chance():
        size = x.size(axis)
        if size is not None:
            sliced(b, y, [0], [size], [axis], [1])


def split(b: Builder) -> None:
    x = b.pick(_ANY, lambda value: value.rank > 0 and any(value.size(axis) for axis in range(value.rank)))
    axis = b.choose([axis for axis in range(x.rank) if x.size(axis)])
    size = x.size(axis) or 0
    first = b.number(0, size)
    if b.opset >= 18 and b.chance():
        parts = b.add("Split", [x], b.number(1, 2), axis=axis, num_outputs=b.number(1, 2))
    elif b.opset < 13:
        parts = b.add("Split", [x], 2, axis=axis, split=[first, size - first])
    else:
        parts = b.add("Split", [x, b.constant([first, size - first], np.int64)], 2, axis=signed(b, axis, x.rank))
    if b.chance():
        b.add("Concat", parts if b.chance(3) is False else parts[::-1], axis=axis)


def padded(b: Builder, x: Value, pads: Sequence[int], mode: str, value: float | None) -> Value:
    if b.opset < 11:
        extra = {} if value is None else {"value": float(value)}
        return b.add("Pad", [x], pads=list(pads), mode=mode, **extra)[0]
    inputs: list[Value | None] = [x, b.constant(list(pads), np.int64)]
    if value is not None:
        inputs.append(b.constant(value, x.dtype))
    return b.add("Pad", inputs, mode=mode)[0]


def pad(b: Builder) -> None:
    x = b.pick("fi", lambda value: value.rank > 0)
    mode = b.choose(["constant", "constant", "constant", "edge", "reflect"])
    value = b.choose([None, 0.0, 1.5, 2.0]) if mode == "constant" else None
    for _ in range(b.number(1, 2)):
        if b.opset >= 18 and b.chance():
            axis = b.number(0, x.rank - 1)
            given = [
                x,
                b.constant([b.number(0, 2), b.number(-1, 2)], np.int64),
                None if value is None else b.constant(value, x.dtype),
            ]
            x = b.add("Pad", [*given, b.constant([signed(b, axis, x.rank)], np.int64)], mode=mode)[0]
        else:
            x = padded(b, x, [b.choose([0, 0, 1, 2, -1][: b.choose([1, 5])]) for _ in range(2 * x.rank)], mode, value)


def expand(b: Builder) -> None:
    x = b.pick(_ANY)
    shape = [b.choose([1, x.size(axis) or 1, 2 if x.size(axis) == 1 else 1]) for axis in range(x.rank)]
    b.add("Expand", [x, b.constant([*([b.number(1, 2)] if b.chance(3) else []), *shape], np.int64)])


def tile(b: Builder) -> None:
    x = b.pick(_ANY, lambda value: value.rank > 0)
    times = b.chance()
    b.add("Tile", [x, b.constant([b.choose([1, 1, 2]) if times else 1 for _ in range(x.rank)], np.int64)])


def gather(b: Builder) -> None:
    x = b.pick(_ANY, lambda value: value.rank > 0)
    index = b.choose([0, -1, 1, [0], [0, 0], [[0, -1]], [1, 0]])
    b.add(
        "Gather",
        [x, b.constant(index, b.choose([np.int64, np.int32]))],
        axis=signed(b, b.number(0, x.rank - 1), x.rank),
    )


def dropout(b: Builder) -> None:
    x = b.pick("f")
    if b.opset < 12:
        b.add("Dropout", [x], b.number(1, 2), ratio=0.5)
    else:
        b.add("Dropout", [x, *([b.constant(0.5, np.float32)] if b.chance() else [])], b.number(1, 2))


def again(b: Builder) -> None:
    """The same node once more, perhaps with its operands in the other order."""
    found = {value.name: value for value in b.visible()}
    tensors = {"", *found}
    nodes = [node for node in b.nodes if node.input and not any(a.HasField("g") for a in node.attribute)]
    nodes = [node for node in nodes if tensors.issuperset((*node.input, *node.output))]
    if not nodes:
        raise RejectedError
    node = nodes[-b.number(1, min(len(nodes), 6))]
    inputs = [found[name] if name else None for name in node.input]
    if node.op_type in ("Add", "Mul") and b.chance():
        inputs.reverse()
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    exact = all(found[name].exact for name in node.output)
    b.add(node.op_type, inputs, len(node.output), exact=exact, domain=node.domain, **attributes)


def reduced(b: Builder, op: str, x: Value, axes: Sequence[int] | None, keepdims: int) -> Value:
    exact = op in ("ReduceMax", "ReduceMin") or x.kind != "f"
    if axes is None:
        return b.add(op, [x], keepdims=keepdims, exact=exact)[0]
    return indexed(b, op, x, axes, 13 if op == "ReduceSum" else 18, keepdims=keepdims, exact=exact)


def reduction(b: Builder) -> None:
    x = b.pick("fi", lambda value: value.rank > 0)
    op = b.choose(["ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL2", "ReduceSumSquare"])
    axes = sorted({b.number(0, x.rank - 1) for _ in range(b.number(1, 2))})
    y = reduced(b, op, x, None if b.chance(5) else axes, b.number(0, 1))
    if y.rank and b.chance(3):
        reduced(b, op, y, [b.number(0, y.rank - 1)], 1)


OPERATORS: tuple[Callable[[Builder], None], ...] = (
    exact_unary, twice, rounding_unary, arithmetic, arithmetic, chained_arithmetic, neutral, neutral, absorbing,
    comparison, logic, where, clip, cast, cast, transpose, transpose, transpose_around, transpose_around, reshape,
    reshape, squeezing, flatten, slices, slices, concat, split, pad, pad, expand, tile, gather, dropout, again, again,
    reduction,
)  # fmt: skip
