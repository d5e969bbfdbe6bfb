"""Transposes that undo each other across what lies between them."""

from __future__ import annotations

import numpy as np
import pytest
from rewriting import ops, parse, plain, rewrite

from onnxslim.passes.simplify import Simplify

NHWC = {"x": plain(2, 3, 4, 5)}


@pytest.mark.parametrize(
    "between",
    [
        "b = Relu(a)",
        "h = Sigmoid(a) b = Mul(a, h)",
        "b = Add(a, c)",
        "b = Sub(c, a)",
        "b = Mul(a, lower)",
        "b = Concat<axis = 3>(a, a)",
        "b = Softmax<axis = -1>(a)",
        "h = Softmax<axis = 1>(a) b = Concat<axis = -2>(h, a)",
        "low = Constant<value = float {0.2}>() b = Clip(a, low)",
        "t = Transpose<perm = [0, 2, 3, 1]>(z) h = Tanh(t) b = Add(a, h)",
        "k = Less(a, c) b = Where(k, a, lower)",
        "b = QuantizeLinear(a, scale)",
    ],
)
def test_what_lies_between_runs_in_the_other_layout(between):
    dtype = "uint8" if "Quantize" in between else "float"
    source = parse(
        f"""g (float[n, 3, h, w] x, float[n, 3, h, w] z) => ({dtype}[p, q, r, s] y) {{
            a = Transpose<perm = [0, 2, 3, 1]>(x) {between} y = Transpose<perm = [0, 3, 1, 2]>(b)
        }}""",
        opset=17,
        c=plain(1, 4, 1, 3, seed=5),
        lower=plain(3, seed=6),
        scale=np.array(0.1, np.float32),
    )
    feeds = [{"x": plain(n, 3, 4, 5), "z": plain(n, 3, 4, 5, seed=2)} for n in (1, 2, 0)]
    model, _ = rewrite(source, Simplify(), feeds=feeds)
    assert ops(model)["Transpose"] == 0


@pytest.mark.parametrize(
    "body",
    [
        # read elsewhere in the first layout
        "a = Transpose<perm = [0, 2, 3, 1]>(x) b = Relu(a) y = Transpose<perm = [0, 3, 1, 2]>(b) e = Exp(b)",
        # not the inverse
        "a = Transpose<perm = [0, 2, 3, 1]>(x) e = Relu(a) y = Transpose<perm = [0, 2, 3, 1]>(e)",
        # the axes that are flattened mean something else
        "a = Transpose<perm = [0, 2, 3, 1]>(x) e = Softmax<axis = 1>(a) y = Transpose<perm = [0, 3, 1, 2]>(e)",
        # of lower rank, broadcast from the right
        "a = Transpose<perm = [0, 2, 3, 1]>(x) e = Add(a, v) y = Transpose<perm = [0, 3, 1, 2]>(e)",
    ],
)
def test_transposes_that_mean_something_stay(body):
    source = parse(
        f"g (float[n, 3, h, w] x, float[3] v) => (float[p, q, r, s] y, float[i, j, k, l] e) {{ {body} }}", opset=12
    )
    feeds = [{"x": plain(2, 3, 4, 5), "v": plain(3)}]
    model, _ = rewrite(source, Simplify(), feeds=feeds)
    assert ops(model)["Transpose"] == 2


def test_equal_transposes_merge_behind_what_reads_them():
    source = parse(
        """g (float[n, m] x, float[n, m] z) => (float[p, q] y) {
            a = Transpose<perm = [1, 0]>(x) b = Transpose<perm = [1, 0]>(z) y = Add(a, b)
        }"""
    )
    model, _ = rewrite(source, Simplify(), feeds=[{"x": plain(3, 4), "z": plain(3, 4, seed=1)}])
    assert ops(model) == {"Add": 1, "Transpose": 1}
