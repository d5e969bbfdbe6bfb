"""Activations that are spelled out become operators where those treat every number alike."""

import numpy as np
import pytest
from fusing import EDGES, Fusions, c, fuse
from rewriting import ops, parse, plain, run

from onnxslim.model import load
from onnxslim.passes.base import Context

GELU = {
    "division": "u = Div(x, root2) e = Erf(u) s = Add(e, one) p = Mul(x, s) y = Mul(p, half)",
    "product": "u = Mul(x, iroot2) e = Erf(u) s = Add(one, e) p = Mul(s, x) y = Mul(half, p)",
    "half first": "h = Mul(x, half) u = Mul(iroot2, x) e = Erf(u) s = Add(e, one) y = Mul(h, s)",
    "half of the gate": "u = Div(x, root2) e = Erf(u) s = Add(e, one) h = Mul(s, half) y = Mul(h, x)",
    "division by two": "u = Div(x, root2) e = Erf(u) s = Add(e, one) p = Mul(x, s) y = Div(p, two)",
    "tanh": "p = Pow(x, three) q = Mul(p, k) r = Add(x, q) v = Mul(r, root2pi) t = Tanh(v) s = Add(t, one) "
    "h = Mul(x, half) y = Mul(h, s)",
    "tanh of products": "p = Mul(x, x) o = Mul(p, x) q = Mul(k, o) r = Add(q, x) v = Mul(root2pi, r) t = Tanh(v) "
    "s = Add(one, t) h = Mul(s, half) y = Mul(x, h)",
    "tanh of a square": "p = Mul(x, x) q = Mul(p, k) r = Add(q, one) o = Mul(x, root2pi) v = Mul(o, r) t = Tanh(v) "
    "s = Add(t, one) h = Mul(x, s) y = Mul(h, half)",
}
GELU_CONSTANTS = {
    "root2": c(np.sqrt(2)),
    "iroot2": c(np.sqrt(0.5)),
    "root2pi": c(np.sqrt(2 / np.pi)),
    "k": c(0.044715),
    "one": c(1),
    "half": c(0.5),
    "two": c(2),
    "three": c(3),
}


@pytest.mark.parametrize("form", GELU)
def test_gelu_in_all_its_forms(form):
    source = parse(f"g (float[n, m] x) => (float[n, m] y) {{ {GELU[form]} }}", opset=20, **GELU_CONSTANTS)
    feeds = [{"x": EDGES[None]}, {"x": plain(3, 50) * 3}, {"x": plain(0, 4)}]
    found, _ = fuse(source, feeds)
    assert found == {"Gelu": 1}


NOT_GELU = {
    "another root": (20, "u = Div(x, two) e = Erf(u) s = Add(e, one) p = Mul(x, s) y = Mul(p, half)"),
    "another factor": (20, "u = Div(x, root2) e = Erf(u) s = Add(e, one) p = Mul(x, s) y = Mul(p, two)"),
    "another operand": (
        20,
        "z = Relu(x) u = Div(x, root2) e = Erf(u) s = Add(e, one) p = Mul(z, s) y = Mul(p, half)",
    ),
    "gate read elsewhere": (
        20,
        "u = Div(x, root2) e = Erf(u) s = Add(e, one) p = Mul(x, s) q = Mul(p, half) y = Sub(q, s)",
    ),
    "opset 19": (19, GELU["division"]),
}


@pytest.mark.parametrize("why", NOT_GELU)
def test_what_is_no_gelu_stays(why):
    opset, body = NOT_GELU[why]
    source = parse(f"g (float[n, m] x) => (float[n, m] y) {{ {body} }}", opset=opset, **GELU_CONSTANTS)
    found, _ = fuse(source, [{"x": EDGES[None]}])
    assert found["Gelu"] == 0
    assert found["Erf"] == 1


def test_a_constant_that_changes_the_rank_keeps_a_gelu_apart():
    source = parse(
        f"g (float[n] x) => (float[m, n] y) {{ {GELU['division']} }}",
        opset=20,
        **{**GELU_CONSTANTS, "half": np.full((1, 1), 0.5, np.float32)},
    )
    found, _ = fuse(source, [{"x": EDGES}])
    assert found["Gelu"] == 0


HARD = {
    "swish": (14, "a = Add(x, three) b = Clip(a, zero, six) p = Mul(x, b) y = Div(p, six)", {"HardSwish": 1}),
    "swish, other order": (
        14,
        "a = Add(three, x) b = Clip(a, zero, six) p = Mul(b, sixth) y = Mul(p, x)",
        {"HardSwish": 1},
    ),
    "swish of the operator": (
        14,
        "b = HardSigmoid<alpha = 0.16666667, beta = 0.5>(x) y = Mul(x, b)",
        {"HardSwish": 1},
    ),
    "swish before opset 14": (
        11,
        "a = Add(x, three) b = Clip(a, zero, six) p = Mul(x, b) y = Div(p, six)",
        {"HardSigmoid": 1, "Mul": 1},
    ),
    "swish of opset 7": (
        7,
        "a = Add(x, three) b = Clip<min = 0.0, max = 6.0>(a) p = Mul(x, b) y = Div(p, six)",
        {"HardSigmoid": 1, "Mul": 1},
    ),
    "sigmoid": (13, "a = Add(x, three) b = Clip(a, zero, six) y = Div(b, six)", {"HardSigmoid": 1}),
    "sigmoid of a line": (13, "s = Mul(x, fifth) a = Add(s, half) y = Clip(a, zero, one)", {"HardSigmoid": 1}),
    "mish": (18, "a = Softplus(x) t = Tanh(a) y = Mul(t, x)", {"Mish": 1}),
    "relu6": (13, "r = Relu(x) y = Min(r, six)", {"Clip": 1}),
    "min of max": (13, "r = Max(x, minus) y = Min(r, six)", {"Clip": 1}),
    "max of min": (13, "r = Min(six, x) y = Max(minus, r)", {"Clip": 1}),
    "clip of clip": (13, "r = Clip(x, minus, three) y = Clip(r, zero, six)", {"Clip": 1}),
    "clip outside of clip": (13, "r = Clip(x, minus, zero) y = Clip(r, one, six)", {"Clip": 1}),
    "relu of clip": (13, "r = Clip(x, minus, six) y = Relu(r)", {"Clip": 1}),
    "clip of relu": (13, "r = Relu(x) y = Clip(r, minus, six)", {"Clip": 1}),
    "clip of opset 7": (7, "r = Clip<min = -1.0, max = 3.0>(x) y = Relu(r)", {"Clip": 1}),
    "softmax": (
        13,
        "m = ReduceMax<axes = [-1]>(x) d = Sub(x, m) e = Exp(d) t = ReduceSum(e, last) y = Div(e, t)",
        {"Softmax": 1},
    ),
    "softmax of opset 18": (
        18,
        "m = ReduceMax(x, last) d = Sub(x, m) e = Exp(d) t = ReduceSum(e, last) y = Div(e, t)",
        {"Softmax": 1},
    ),
}
HARD_CONSTANTS = {
    "zero": c(0),
    "one": c(1),
    "half": c(0.5),
    "fifth": c(0.2),
    "sixth": c(1 / 6),
    "three": c(3),
    "six": c(6),
    "minus": c(-1),
    "last": np.array([-1]),
}


@pytest.mark.parametrize("form", HARD)
def test_activations_become_operators_on_edge_values_too(form):
    opset, body, wanted = HARD[form]
    source = parse(f"g (float[n, m] x) => (float[n, m] y) {{ {body} }}", opset=opset, **HARD_CONSTANTS)
    feeds = [{"x": EDGES[None]}, {"x": EDGES[:, None]}, {"x": plain(3, 50) * 5}, {"x": plain(0, 4)}]
    found, _ = fuse(source, feeds)
    assert found == wanted


def test_signs_of_zeros_survive_the_merging_of_bounds():
    for body in (HARD["relu6"][1], HARD["clip of clip"][1], HARD["relu of clip"][1], HARD["clip of relu"][1]):
        source = parse(
            f"g (float[n, m] x) => (float[n, m] y) {{ r9 = Identity(x) {body.replace('(x', '(r9')} }}", **HARD_CONSTANTS
        )
        model = load(source)
        Fusions().run(model, Context())
        feed = {"x": EDGES[None]}
        assert np.array_equal(np.signbit(run(source, feed)[0]), np.signbit(run(model.to_proto(), feed)[0]))


HARD_STAYS = {
    "max with zero": (13, "r = Max(x, zero) y = Min(r, six)", "-0 into 0"),
    "bounds out of order": (13, "r = Max(x, six) y = Min(r, minus)", "in order"),
    "an infinite bound": (13, "r = Max(x, minus) y = Min(r, inf)", "not finite"),
    "a clip without maximum": (13, "r = Clip(x, minus) y = Relu(r)", None),
    "softmax without maximum": (13, "e = Exp(x) t = ReduceSum(e, last) y = Div(e, t)", None),
    "softmax over two axes": (
        13,
        "m = ReduceMax<axes = [-1]>(x) d = Sub(x, m) e = Exp(d) t = ReduceSum(e) y = Div(e, t)",
        None,
    ),
    "log of softmax": (13, "s = Softmax(x) y = Log(s)", None),
    "softplus spelled out": (13, "e = Exp(x) a = Add(e, one) y = Log(a)", None),
    "swish of another slope": (14, "b = HardSigmoid<alpha = 0.2, beta = 0.5>(x) y = Mul(x, b)", None),
    "swish of opset 24": (24, "s = Sigmoid(x) y = Mul(x, s)", None),
}


@pytest.mark.parametrize("form", HARD_STAYS)
def test_activations_that_would_differ_stay(form):
    opset, body, why = HARD_STAYS[form]
    source = parse(f"g (float[n, m] x) => (float[n, m] y) {{ {body} }}", opset=opset, inf=c(np.inf), **HARD_CONSTANTS)
    before = ops(source)
    found, outcome = fuse(source, [{"x": EDGES[None]}])
    assert found == before
    assert why is None or any(why in refusal.why for refusal in outcome.refusals)
