"""Normalizations that are spelled out become operators; factors and terms behind them go into their weights."""

import numpy as np
import pytest
from fusing import c, fuse
from rewriting import parse, plain

NORMS = {
    "square": "v = Pow(d, two) w = ReduceMean(v, last) e = Add(w, eps) r = Sqrt(e) n = Div(d, r)",
    "product": "v = Mul(d, d) w = ReduceMean(v, last) e = Add(eps, w) r = Sqrt(e) n = Div(d, r)",
    "reciprocal": "v = Mul(d, d) w = ReduceMean(v, last) e = Add(w, eps) r = Sqrt(e) i = Reciprocal(r) n = Mul(d, i)",
    "one over": "v = Mul(d, d) w = ReduceMean(v, last) e = Add(w, eps) r = Sqrt(e) i = Div(one, r) n = Mul(i, d)",
    "power": "v = Pow(d, two) w = ReduceMean(v, last) e = Add(w, eps) i = Pow(e, mhalf) n = Mul(d, i)",
    "root as power": "v = Pow(d, two) w = ReduceMean(v, last) e = Add(w, eps) r = Pow(e, half) n = Div(d, r)",
}
NORM_CONSTANTS = {
    "last": np.array([-1]),
    "eps": c(1e-5),
    "two": c(2),
    "one": c(1),
    "half": c(0.5),
    "mhalf": c(-0.5),
    "s": plain(24) + 1,
    "b": plain(24, seed=1),
}
NORM_FEEDS = [{"x": plain(2, 5, 24) * 3 + 2}, {"x": np.zeros((1, 2, 24), np.float32)}, {"x": plain(0, 2, 24)}]


@pytest.mark.parametrize("form", NORMS)
@pytest.mark.parametrize("behind", ["y = Identity(n)", "y = Mul(n, s)", "p = Mul(s, n) y = Add(p, b)", "y = Add(b, n)"])
def test_layer_normalization_in_all_its_forms(form, behind):
    source = parse(
        f"g (float[n, m, 24] x) => (float[n, m, 24] y) "
        f"{{ a = ReduceMean(x, last) d = Sub(x, a) {NORMS[form]} {behind} }}",
        opset=18,
        **NORM_CONSTANTS,
    )
    found, _ = fuse(source, NORM_FEEDS)
    found.pop("Identity", None)
    assert found == {"LayerNormalization": 1}


@pytest.mark.parametrize("form", NORMS)
@pytest.mark.parametrize(("opset", "wanted"), [(23, "RMSNormalization"), (22, "ReduceMean")])
def test_root_mean_square_normalization(form, opset, wanted):
    body = f"d = Relu(x) {NORMS[form]} y = Mul(n, s)"
    source = parse(f"g (float[n, m, 24] x) => (float[n, m, 24] y) {{ {body} }}", opset=opset, **NORM_CONSTANTS)
    source.ir_version = 10
    found, _ = fuse(source, NORM_FEEDS)
    assert found[wanted] == 1
    assert (found["ReduceMean"] == 0) == (opset == 23)


def test_a_normalization_over_two_axes_of_opset_17():
    body = (
        "a = ReduceMean<axes = [2, 1]>(x) d = Sub(x, a) v = Pow(d, two) w = ReduceMean<axes = [-2, -1]>(v) "
        "e = Add(w, eps) r = Sqrt(e) n = Div(d, r) p = Mul(n, s) y = Add(p, b)"
    )
    source = parse(
        f"g (float[n, 4, 6] x) => (float[n, 4, 6] y) {{ {body} }}",
        two=c(2),
        eps=c(1e-5),
        s=plain(4, 6),
        b=plain(6, seed=1),
    )
    found, _ = fuse(source, [{"x": plain(3, 4, 6)}])
    assert found == {"LayerNormalization": 1}


NOT_NORMS = {
    "other axes": (18, "a = ReduceMean(x, first) d = Sub(x, a) " + NORMS["square"]),
    "not the last axes": (18, ("a = ReduceMean(x, first) d = Sub(x, a) " + NORMS["square"]).replace("last", "first")),
    "no axis kept": (
        17,
        "a = ReduceMean<keepdims = 0, axes = [0]>(x) d = Sub(x, a) v = Pow(d, two) "
        "w = ReduceMean<axes = [0], keepdims = 0>(v) e = Add(w, eps) r = Sqrt(e) n = Div(d, r)",
    ),
    "the difference is read elsewhere": (
        18,
        "a = ReduceMean(x, last) d = Sub(x, a) " + NORMS["square"].replace("n = ", "h = ") + " n = Add(h, d)",
    ),
    "of another tensor": (18, "z = Relu(x) a = ReduceMean(z, last) d = Sub(x, a) " + NORMS["square"]),
    "opset 16": (
        16,
        "a = ReduceMean<axes = [-1]>(x) d = Sub(x, a) v = Pow(d, two) w = ReduceMean<axes = [-1]>(v) "
        "e = Add(w, eps) r = Sqrt(e) n = Div(d, r)",
    ),
}


@pytest.mark.parametrize("form", NOT_NORMS)
def test_what_is_no_layer_normalization_stays(form):
    opset, body = NOT_NORMS[form]
    source = parse(
        f"g (float[k, m, 24] x) => (float[k, m, 24] n) {{ {body} }}",
        opset=opset,
        first=np.array([0]),
        **NORM_CONSTANTS,
    )
    found, _ = fuse(source, [{"x": plain(3, 5, 24)}])
    assert found["LayerNormalization"] == 0
    assert found["ReduceMean"] == 2


def test_a_normalization_of_doubles_stays_because_the_operator_rounds_to_floats():
    source = parse(
        f"g (double[n, m, 24] x) => (double[n, m, 24] n9) {{ a = ReduceMean(x, last) d = Sub(x, a) "
        f"{NORMS['square'].replace('n = ', 'n9 = ')} }}",
        opset=18,
        last=np.array([-1]),
        eps=np.array(1e-5),
        two=np.array(2.0),
    )
    found, outcome = fuse(source, [{"x": plain(2, 3, 24).astype(np.float64)}])
    assert found["ReduceMean"] == 2
    assert any("float64" in refusal.why for refusal in outcome.refusals)


def test_a_factor_that_widens_a_normalization_stays():
    source = parse(
        "g (float[n, 1, 24] x) => (float[n, m, 24] y) { l = LayerNormalization<axis = -1>(x, s) y = Mul(l, w) }",
        s=plain(24),
        w=plain(3, 24),
    )
    found, outcome = fuse(source, [{"x": plain(2, 1, 24)}])
    assert found["Mul"] == 1
    assert any("normalized axes" in refusal.why for refusal in outcome.refusals)


def test_a_normalization_whose_mean_is_read_stays():
    source = parse(
        "g (float[n, 24] x) => (float[n, 24] y, float[n, 1] a) "
        "{ l, a = LayerNormalization<axis = -1>(x, s) y = Mul(l, s) }",
        s=plain(24),
    )
    found, _ = fuse(source, [{"x": plain(2, 24)}])
    assert found == {"LayerNormalization": 1, "Mul": 1}
