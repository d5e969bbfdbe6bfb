"""Nodes for random graphs that hold or call other graphs: If, Loop, Scan and local functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from onnx import helper
from random_builder import Builder, RejectedError, Value
from random_layers import LAYERS
from random_ops import OPERATORS

_FLOAT32 = np.dtype(np.float32)
_TRIES = 4


def grow(b: Builder, operators: Sequence[Callable[[Builder], None]], steps: int) -> None:
    """Add nodes, or groups of them; where none of a few that are tried fits, a step adds nothing."""
    for _ in range(steps):
        for _ in range(_TRIES):
            try:
                b.choose(operators)(b)
            except RejectedError:
                continue
            break


def _body(b: Builder) -> Builder:
    if b.depth >= 2:
        raise RejectedError
    return Builder(b.rng, b.opset, b.ir_version, b.strange, parent=b)


def _input(body: Builder, arrays: Sequence[np.ndarray], dtype: np.dtype, *, exact: bool) -> Value:
    value = Value(body.name("x"), tuple(arrays), exact)
    body.values.append(value)
    body.inputs.append(
        helper.make_tensor_value_info(value.name, helper.np_dtype_to_tensor_dtype(dtype), [None] * value.rank)
    )
    return value


def _own(body: Builder, value: Value) -> Value:
    """The value itself, or a copy where it comes from outside: a body must make what it returns."""
    made = {name for node in body.nodes for name in node.output}
    return value if value.name in made else body.add("Identity", [value])[0]


def conditional(b: Builder) -> None:
    x = b.pick("fi")
    condition = _condition(b)
    bodies, results = [], []
    for name in ("then_branch", "else_branch"):
        body = _body(b)
        grow(body, (*OPERATORS, *LAYERS, conditional), b.number(0, 3))
        found = [value for value in reversed(body.values) if value.dtype == x.dtype and not value.constant]
        results.append(_own(body, found[0] if found and b.chance(4) is False else x))
        bodies.append((name, body.to_graph([results[-1]], name)))
    b.add("If", [condition], exact=all(result.exact for result in results), **dict(bodies))


def _condition(b: Builder) -> Value:
    kind = b.choose(["constant", "size", "fed"])
    if kind == "constant":
        return b.constant(b.chance(), bool)
    if kind == "size":
        size = b.add("Size", [b.pick("fiub")])[0]
        return b.add("Equal", [size, b.constant(b.choose([0, 1, 2, 6]), np.int64)])[0]
    return b.pick("b", lambda value: value.rank == 0)


def loop(b: Builder) -> None:
    x = b.pick("f", lambda value: value.dtype == _FLOAT32)
    body = _body(b)
    feeds = len(b.strange)
    _input(body, [np.array(0)] * feeds, np.dtype(np.int64), exact=True)
    go = _input(body, [np.array(True)] * feeds, np.dtype(bool), exact=True)
    _input(body, x.arrays, x.dtype, exact=False)
    grow(body, OPERATORS, b.number(0, 3))
    shapes = [array.shape for array in x.arrays]
    found = [value for value in body.values if value.dtype == x.dtype and [a.shape for a in value.arrays] == shapes]
    state = body.add("Tanh", [found[-1]], exact=False)[0]
    outputs = [_own(body, go), state]
    count = b.number(0, 1)
    if count:
        outputs.append(_own(body, found[-1]))
    trips = b.constant(b.number(0, 3), np.int64) if b.chance() else b.add("Size", [b.constant(b.random((2,)))])[0]
    start = b.constant(b.chance(4) is False, bool) if b.chance() else None
    b.add("Loop", [trips, start, x], 1 + count, body=body.to_graph(outputs, "loop"), exact=False)


def scan(b: Builder) -> None:
    x = b.pick("f", lambda value: value.rank > 0)
    if b.opset < 9:
        raise RejectedError
    body = _body(b)
    rows = [array[0] if len(array) else np.zeros(array.shape[1:], array.dtype) for array in x.arrays]
    row = _input(body, [np.asarray(each) for each in rows], x.dtype, exact=False)
    grow(body, OPERATORS, b.number(0, 3))
    found = [value for value in body.values if value.kind == "f" and not value.constant]
    result = _own(body, (found or [row])[-1])
    b.add("Scan", [x], body=body.to_graph([result], "scan"), num_scan_inputs=1, exact=False)


def call(b: Builder) -> None:
    """Call a local function, new or there already; some have an attribute that a node of theirs refers to."""
    if b.ir_version < 8:
        raise RejectedError
    functions = b.root.functions
    if not functions or b.chance():
        functions.append(_function(b, f"f{len(functions)}"))
    function = b.choose(functions)
    x = b.pick("f", lambda value: value.dtype == _FLOAT32)
    attributes = {name: b.choose([0.0, 0.5]) for name in function.attribute}
    b.add(function.name, [x], domain="local", exact=False, **attributes)


def _function(b: Builder, name: str) -> object:
    nodes = []
    last = "x"
    for index in range(b.number(1, 4)):
        made = f"t{index}"
        op = b.choose(["Relu", "Identity", "Neg", "Mul", "Shape", "Transpose", "Relu", "Cast"])
        if op == "Mul":
            one = helper.make_tensor("one", 1, [], [b.choose([1.0, 2.0])])
            nodes.append(helper.make_node("Constant", [], [f"k{index}"], value=one))
            nodes.append(helper.make_node("Mul", [last, f"k{index}"], [made]))
        elif op == "Shape":
            nodes.append(helper.make_node("Shape", [last], [f"s{index}"]))
            nodes.append(helper.make_node("Reshape", [last, f"s{index}"], [made]))
        elif op == "Cast":
            nodes.append(helper.make_node("Cast", [last], [made], to=1))
        else:
            nodes.append(helper.make_node(op, [last], [made]))
        last = made
    referring = helper.make_node("LeakyRelu", [last], ["y"])
    attributes = []
    if b.chance():
        attributes = ["slope"]
        attribute = helper.make_attribute("alpha", 0.0)
        attribute.ClearField("f")
        attribute.ref_attr_name = "slope"
        referring.attribute.append(attribute)
    imports = [helper.make_opsetid("", b.opset)]
    return helper.make_function("local", name, ["x"], ["y"], [*nodes, referring], imports, attributes)


BODIES: tuple[Callable[[Builder], None], ...] = (conditional, conditional, loop, scan, call)
