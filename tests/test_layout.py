"""Convolutions along one axis that are laid down, with what is around them."""

from __future__ import annotations

import numpy as np
import pytest
from rewriting import ops, parse, plain, rewrite

from onnxslim.graph.walk import subgraphs
from onnxslim.model import Model
from onnxslim.passes.simplify import Simplify

WEIGHTS = {
    "w": plain(8, 3, 5, 1),
    "b": plain(8, seed=1),
    "v": plain(4, 8, 3, 1, seed=2),
    "deep": plain(8, 1, 3, 1, seed=3),
    "up": plain(8, 3, 4, 1, seed=4),
    "one": plain(3, 8, 1, 1, seed=5),
    "scale": plain(8, seed=6),
    "shift": plain(8, seed=7),
    "mean": plain(8, seed=8),
    "var": np.abs(plain(8, seed=9)) + 0.5,
    "gain": plain(1, 8, 1, 1, seed=10),
    "low": np.array(-0.5, np.float32),
    "two": np.array(2),
    "high": np.array(0.5, np.float32),
}
FIRST = "h = Conv<kernel_shape = [5, 1], pads = [2, 0, 2, 0]>(x, w, b)"


def kernels(model: Model) -> list[list[int]]:
    return [
        list(node.inputs[1].shape[2:])
        for graph in model.graphs()
        for node in graph.nodes
        if node.op in ("Conv", "ConvTranspose")
    ]


def check(body: str, transposes: int, *, outputs: str = "float[p, q, r, s] y", opset: int = 17) -> Model:
    source = parse(f"g (float[n, 3, l, 1] x) => ({outputs}) {{ {body} }}", opset=opset, **WEIGHTS)
    feeds = [{"x": plain(n, 3, length, 1)} for n, length in ((1, 24), (2, 37))]
    model, _ = rewrite(source, Simplify(), feeds=feeds, rtol=1e-5)
    assert ops(model)["Transpose"] == transposes
    return model


@pytest.mark.parametrize(
    "rest",
    [
        "y = Relu(h)",
        "a = Relu(h) y = MaxPool<kernel_shape = [2, 1], strides = [2, 1]>(a)",
        "y = AveragePool<kernel_shape = [3, 1], strides = [2, 1], pads = [1, 0, 0, 0], count_include_pad = 1>(h)",
        "y = MaxPool<kernel_shape = [3, 1], dilations = [2, 1], ceil_mode = 1, strides = [3, 1]>(h)",
        "a = Relu(h) y = BatchNormalization(a, scale, shift, mean, var)",
        "y = InstanceNormalization(h, scale, shift)",
        "y = Conv<strides = [2, 1], dilations = [2, 1], pads = [3, 0, 1, 0]>(h, v)",
        'a = Conv<auto_pad = "SAME_UPPER", strides = [2, 1]>(h, v) y = Clip(a, low, high)',
        "y = Conv<group = 8, pads = [1, 0, 1, 0]>(h, deep)",
        "y = ConvTranspose<strides = [2, 1], output_padding = [1, 0], pads = [1, 0, 0, 0]>(h, up)",
        "a = Conv(h, one) y = Sigmoid(a)",
        "a = Sigmoid(h) m = Mul(h, a) y = Mul(m, gain)",
        "a = Tanh(h) y = Concat<axis = 1>(h, a)",
        "a = Tanh(h) y = Concat<axis = -2>(h, a)",
        "a = Softmax<axis = 2>(h) y = Softmax<axis = 1>(a)",
        "q = GlobalAveragePool(h) a = Sigmoid(q) y = Mul(h, a)",
    ],
)
def test_what_is_around_lies_down_as_well(rest):
    model = check(f"{FIRST} {rest}", 2)
    assert all(height == 1 for height, _ in kernels(model))


def test_a_network_that_ends_in_a_point_is_not_turned_back():
    body = f"{FIRST} a = Relu(h) m = MaxPool<kernel_shape = [2, 1]>(a) c = Conv(m, v) q = GlobalAveragePool(c)"
    model = check(f"{body} y = Flatten(q)", 1, outputs="float[p, q] y")
    assert kernels(model) == [[1, 5], [1, 3]]


def test_what_cannot_lie_reads_standing_maps():
    outputs = "float[p, q, r, s] y, float[t, u, v, w] z"
    model = check(f"{FIRST} a = Relu(h) y = Conv(a, v) z = CumSum(a, two)", 3, outputs=outputs)
    assert kernels(model) == [[1, 5], [1, 3]]


def test_outputs_in_the_middle_keep_their_layout():
    check(f"{FIRST} y = Relu(h) z = Conv(y, v)", 3, outputs="float[p, q, r, s] y, float[t, u, v, w] z")


@pytest.mark.parametrize(
    "body",
    [
        "a = Concat<axis = 3>(x, x) y = Conv<pads = [2, 0, 2, 0]>(a, w, b)",  # two wide
        "y = Conv<pads = [0, 1, 0, 1]>(x, w, b)",  # three wide behind it
        "y = Conv(x, one_t)",  # nothing along the axis
        "y = Conv(x, w_in, b)",  # a weight that is no constant
        "p = Conv(x, w, b) q = Relu(x) r = Conv(q, w) y = Concat<axis = 1>(p, r)",  # one weight for two
    ],
)
def test_others_stand(body):
    source = parse(
        f"g (float[n, 3, l, 1] x, float[8, 3, 5, 1] w_in) => (float[p, q, r, s] y) {{ {body} }}",
        **WEIGHTS,
        one_t=plain(8, 3, 1, 1),
    )
    model, _ = rewrite(source, Simplify(), feeds=[{"x": plain(2, 3, 24, 1), "w_in": plain(8, 3, 5, 1)}], rtol=1e-5)
    assert ops(model)["Transpose"] == 0
    assert all(width == 1 for _, width in kernels(model))


def test_unknown_widths_stand():
    source = parse("g (float[n, 3, l, k] x) => (float[p, q, r, s] y) { y = Conv(x, w, b) }", **WEIGHTS)
    model, _ = rewrite(source, Simplify(), feeds=[{"x": plain(1, 3, 24, 1)}, {"x": plain(1, 3, 24, 4)}], rtol=1e-5)
    assert kernels(model) == [[5, 1]]


def test_branches_and_the_graph_around_them_lie_down_by_themselves():
    source = parse(
        f"""g (float[n, 3, l, 1] x, bool k) => (float[p, q, r, s] y) {{
            {FIRST}
            y = If (k) <
                then_branch = t () => (float[p, q, r, s] i) {{ a = Relu(h) i = Conv(a, v) }},
                else_branch = e () => (float[p, q, r, s] j) {{ j = Neg(h) }}
            >
        }}""",
        **WEIGHTS,
    )
    feeds = [{"x": plain(2, 3, 24, 1), "k": np.array(k)} for k in (True, False)]
    model, _ = rewrite(source, Simplify(), feeds=feeds, rtol=1e-5)
    assert kernels(model) == [[1, 5], [1, 3]]
    (choice,) = (node for node in model.graph.nodes if node.op == "If")
    assert [sum(n.op == "Transpose" for n in body.nodes) for body in subgraphs(choice)] == [
        1,
        0,
    ]  # what enters comes lying from outside
