"""Symbolic sizes, and what is inferred of every tensor, against what ONNX Runtime makes of it."""

from __future__ import annotations

import os

import numpy as np
import onnx.parser
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_graphs import graphs
from rewriting import parse

from onnxslim import load
from onnxslim.graph.facts import Fact, Facts
from onnxslim.graph.shapes import infer_shapes
from onnxslim.graph.symbols import (
    Element,
    Symbol,
    SymbolicSize,
    ceil_divide,
    divide,
    equal,
    floor_divide,
    lower_bound,
    maximum,
    minimum,
    product,
    remainder,
    symbol,
)
from onnxslim.runtime import Session

N, M = symbol("n"), symbol("m", 1)


def value_of(element: Element, sizes: dict[str, int]) -> int:
    """A polynomial at given sizes."""
    if isinstance(element, int):
        return element
    total = 0
    for monomial, factor in element.terms.items():
        for each in monomial:
            factor *= sizes[each.name]
        total += factor
    return total


def test_what_cancels_is_gone():
    assert divide(N * 2, 2) == N
    assert divide(N * M, M) == N
    assert N * 2 + N - N * 3 == 0
    assert (N + 1) * (N - 1) == N * N - 1
    assert divide(N * 6 + 4, 2) == N * 3 + 2
    assert remainder(N * 4 + 3, 4) == 3
    assert floor_divide(N - 1, 2) == floor_divide(N - 1, 2)
    assert product([2, N, M]) == M * N * 2


def test_what_may_be_zero_or_negative_is_not_divided():
    assert divide(M, N) is None
    assert divide(N - 1, 2) is None
    assert remainder(N - 1, 2) is None


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [(N, -1, False), (N, 0, None), (M, 0, False), (N, N, True), (N, N + 1, False), (N, M, None), (N * M, M * N, True)],
)
def test_equality_is_known_unknown_or_refuted(first, second, wanted):
    assert equal(first, second) is wanted


def test_bounds_choose_the_larger_and_the_smaller():
    assert maximum(N, 0) == N
    assert minimum(M, 1) == 1
    assert maximum(N + 2, N) == N + 2
    assert lower_bound(M * 3 + 1) == 4
    assert lower_bound(N - 1) is None or lower_bound(N - 1) == -1


@settings(max_examples=300, derandomize=True, database=None, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("+-*"), st.sampled_from(["n", "m", 1, 2, 3, 7])), min_size=1, max_size=6),
    st.integers(1, 5),
    st.integers(0, 9),
    st.integers(1, 9),
)
def test_algebra_agrees_with_integers(steps, divisor, n, m):
    sizes = {"n": n, "m": m}
    symbols = {"n": N, "m": M}
    formula: Element = N
    number = n
    for op, operand in steps:
        right = symbols.get(operand, operand)
        plain = sizes.get(operand, operand)
        formula = formula + right if op == "+" else formula - right if op == "-" else formula * right
        number = number + plain if op == "+" else number - plain if op == "-" else number * plain
    assert value_of(formula, sizes) == number
    bound = lower_bound(formula)
    assert bound is None or bound <= number
    for found, wanted in (
        (floor_divide(formula, divisor), number // divisor),
        (ceil_divide(formula, divisor), -(-number // divisor)),
        (remainder(formula, divisor), number % divisor),
    ):
        if found is not None and not _derived(found):
            assert value_of(found, sizes) == wanted


def _derived(element: Element) -> bool:
    return isinstance(element, SymbolicSize) and any(
        each.name not in ("n", "m") for monomial in element.terms for each in monomial
    )


def fact_of(text: str, name: str, **options) -> Fact:
    model = load(parse(text, **options))
    facts = Facts(model)
    return next(facts.of(t) for node in model.graph.nodes for t in node.outputs if t.name == name)


def test_a_computed_reshape_target_is_seen_through():
    text = """g (float[n, h, 6] x) => (float[a, b, c] y) {
        s = Shape(x) zero = Constant<value = int64 {0}>() one = Constant<value = int64 {1}>()
        i = Gather(s, zero) j = Gather(s, one) two = Constant<value = int64 {2}>()
        k = Mul(j, two) l = Div(k, two) axes = Constant<value = int64[1] {0}>()
        iu = Unsqueeze(i, axes) lu = Unsqueeze(l, axes) rest = Constant<value = int64[1] {-1}>()
        t = Concat<axis = 0>(iu, lu, rest) y = Reshape(x, t)
    }"""
    assert fact_of(text, "y").shape == (symbol("n"), symbol("h"), 6)


def test_an_expand_by_minus_one_as_torch_writes_it_is_seen_through():
    text = """g (float[n, 1] x) => (float[a, b] y) {
        s = Shape(x) zero = Constant<value = int64[1] {0}>() n = Gather(s, zero)
        four = Constant<value = int64[1] {4}>() t = Concat<axis = 0>(n, four)
        minus = Constant<value = int64[2] {-1, -1}>() ones = Constant<value = int64[2] {1, 1}>()
        e = Equal(t, minus) w = Where(e, ones, t) y = Expand(x, w)
    }"""
    assert fact_of(text, "y").shape == (symbol("n"), 4)


def test_a_size_is_learned_from_the_layer_that_takes_no_other():
    text = """g (float[n, m] x, float[k, 6] w, float[3, 5, 1, 1] v) => (float[a, b] y, float[c, d, e, f] z) {
        where = NonZero(x) s = Shape(where) t = Cast<to = 1>(where) a = Transpose(t) y = MatMul(a, w)
        four = Constant<value = int64[4] {1, -1, 2, 2}>() r = Reshape(x, four) z = Conv<group = 1>(r, v)
    }"""
    model = load(parse(text))
    facts = Facts(model)
    nodes = list(model.graph.nodes)
    made = {tensor.name: tensor for node in nodes for tensor in node.outputs}
    assert not isinstance(facts.of(made["r"]).shape[1], int)
    assert made["r"] in facts.require_shapes(nodes)
    assert facts.of(made["r"]).shape == (1, 5, 2, 2)
    assert facts.require_shapes(nodes) == []  # nothing is learned twice
    assert infer_shapes(model).shape(made["r"]) == [1, 5, 2, 2]


def test_nothing_is_learned_from_what_a_function_is_told():
    source = onnx.parser.parse_model("""
    <ir_version: 8, opset_import: ["" : 17, "d": 1]>
    g (float[1, 2, 5, 5] x) => (float[a, b, c, e] y) { y = d.f<groups = 2>(x) }
    <domain: "d", opset_import: ["" : 17]>
    f <groups> (x) => (y) {
        h = Relu(x) w = Constant<value = float[2, 1, 1, 1] {1.0, 2.0}>() y = Conv<group: int = @groups>(h, w)
    }
    """)
    model = load(source)
    (function,) = model.graph.functions
    assert Facts(model).require_shapes(list(function.nodes)) == []


def test_declared_sizes_of_inner_tensors_are_not_believed():
    source = parse("g (float[n] x) => (float[k] y) { a = Relu(x) y = Exp(a) }")
    stale = source.graph.value_info.add()
    stale.name = "a"
    stale.type.tensor_type.elem_type = 1
    stale.type.tensor_type.shape.dim.add().dim_value = 7
    model = load(source)
    assert Facts(model).of(model.graph.nodes[0].outputs[0]).shape == (symbol("n"),)


@settings(
    max_examples=int(os.environ.get("ONNXSLIM_EXAMPLES", "200")),
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)
@given(graphs())
def test_what_is_inferred_is_what_onnxruntime_makes(graph):
    model = load(graph.model)
    facts = Facts(model)
    known = {t.name: facts.of(t) for node in model.graph.nodes for t in node.outputs if not t.is_empty()}
    known = {name: fact for name, fact in known.items() if not fact.sequence}
    if not known:
        return
    session = Session(model, outputs=list(known), optimize=False)
    for feed in graph.feeds:
        bound: dict[Symbol, int] = {}
        for tensor in model.graph.inputs:
            if tensor.name in feed:
                _check_shape(tensor.name, facts.of(tensor), feed[tensor.name], bound)
        results = session.run(feed)
        for name, fact in known.items():
            if isinstance(results[name], np.ndarray):
                _check_shape(name, fact, results[name], bound)
                _check_value(name, fact, results[name], bound)


def _check_shape(name: str, fact: Fact, array: np.ndarray, bound: dict[Symbol, int]) -> None:
    if fact.dtype is not None and fact.dtype.kind in "fiub":
        assert array.dtype == fact.dtype, name
    if fact.shape is None:
        return
    assert len(fact.shape) == array.ndim, (name, fact.shape, array.shape)
    for size, real in zip(fact.shape, array.shape, strict=True):
        _check_element(name, size, int(real), bound)


def _check_value(name: str, fact: Fact, array: np.ndarray, bound: dict[Symbol, int]) -> None:
    if fact.value is not None:
        for element, real in zip(fact.value.reshape(-1).tolist(), array.reshape(-1).tolist(), strict=True):
            _check_element(name, element, int(real), bound)


def _check_element(name: str, element: Element, real: int, bound: dict[Symbol, int]) -> None:
    """Equal unknowns must be equal numbers: the first tensor that shows one says which."""
    if isinstance(element, int):
        assert element == real, name
        return
    unknown = {each for monomial in element.terms for each in monomial if each not in bound}
    if not unknown:
        assert value_of(element, {each.name: number for each, number in bound.items()}) == real, (name, element)
    elif len(unknown) == 1 and element == SymbolicSize({(next(iter(unknown)),): 1}):
        (only,) = unknown
        assert only.least is None or real >= only.least, (name, element)
        bound[only] = real
