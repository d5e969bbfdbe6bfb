"""Kernels without sums: vector mathematics against float64, and moves of numbers against NumPy."""

import math

import numpy as np
import pytest
import tvm
from tvm import tirx

from onnxslim.targets import find_target
from onnxslim.targets._tvm import resolve_target, tvm_target
from onnxslim.targets.emit import function, index, load_of, loop, store, vector
from onnxslim.targets.vector_math import vectorisable_math

LEAST_NORMAL = np.float32(2.0**-126)


@pytest.fixture(scope="module")
def native():
    return tvm_target(resolve_target(find_target("native")))


def numbers():
    """Every kind of float32: dense where functions bend, all exponents, and what is no number."""
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3.4e38, -3.4e38, 88.72, 88.73, -87.33, -103.0, 128.0]
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, dtype=np.uint64).astype(np.uint32)
    lines = [np.linspace(-12, 12, 1 << 16), np.linspace(-105, 90, 1 << 16), np.exp(np.linspace(-87, 88, 1 << 15))]
    values = np.concatenate([special, *lines]).astype(np.float32)
    values = np.concatenate([values, bits.view(np.float32)])
    return np.resize(values, len(values) // 8 * 8)


def computed(native, operation, values):
    """``operation`` by a kernel of vectors, as every kernel is compiled."""
    source, target = (tirx.decl_buffer((index(len(values)),), "float32", name) for name in ("source", "target"))
    body = loop(
        "i",
        len(values) // 8,
        lambda i: vector(8, lambda lane: store(target, operation(load_of(source, i * 8 + lane)), i * 8 + lane)),
    )
    written = vectorisable_math(function([source, target], body))
    kernel = tvm.compile(tvm.IRModule({"k": written.with_attr("global_symbol", "k")}), target=native)["k"]
    out = tvm.runtime.tensor(np.empty_like(values))
    kernel(tvm.runtime.tensor(values), out)
    return out.numpy()


def power(exponent):
    return lambda x: tirx.power(x, tirx.const(exponent, "float32"))


@pytest.mark.parametrize(
    ("operation", "expected", "tolerance"),
    [
        (tirx.exp, np.exp, 1.5e-7),
        (tirx.log, np.log, 1.5e-7),
        (tirx.sigmoid, lambda x: 1 / (1 + np.exp(-x)), 2e-7),
        (tirx.tanh, np.tanh, 4e-7),
        (tirx.erf, np.vectorize(math.erf), 4e-7),
        (power(2.0), lambda x: x**2, 2e-7),
        (power(3.0), lambda x: x**3, 2e-7),
        (power(4.0), lambda x: x**4, 3e-7),
        (power(-1.0), lambda x: 1 / x, 1e-7),
    ],
    ids=["exp", "log", "sigmoid", "tanh", "erf", "power 2", "power 3", "power 4", "power -1"],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_vector_math_is_accurate_for_every_kind_of_number(native, operation, expected, tolerance):
    values = numbers()
    found, wanted = computed(native, operation, values), expected(values.astype(np.float64))
    rounded = wanted.astype(np.float32)
    normal = np.isfinite(rounded) & (np.abs(rounded) >= LEAST_NORMAL)
    np.testing.assert_allclose(found[normal], wanted[normal], rtol=tolerance)
    small = np.abs(rounded) < LEAST_NORMAL
    assert (np.abs(found[small]) <= LEAST_NORMAL).all()
    np.testing.assert_array_equal(found[~normal & ~small], rounded[~normal & ~small])


def test_functions_bounded_by_one_never_round_beyond(native):
    for operation in (tirx.tanh, tirx.erf):
        found = computed(native, operation, numbers())
        assert np.nanmax(np.abs(found)) == 1.0


def test_math_that_is_not_of_float32_stays():
    x = tirx.decl_buffer((index(1),), "float64", "x")
    kernel = function([x], store(x, tirx.exp(load_of(x, 0)) + tirx.power(load_of(x, 0), load_of(x, 0)), 0))
    assert vectorisable_math(kernel).same_as(kernel)
