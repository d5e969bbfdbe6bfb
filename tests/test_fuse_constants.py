"""Constants of a chain are computed together where that rounds no worse."""

import numpy as np
import pytest
from fusing import EDGES, c, fuse
from rewriting import ops, parse, plain

COMBINED = {
    "mul mul": ("a = Mul(x, p) y = Mul(a, q)", {"Mul": 1}),
    "mul div": ("a = Mul(p, x) y = Div(a, q)", {"Mul": 1}),
    "div mul": ("a = Div(x, p) y = Mul(q, a)", {"Mul": 1}),
    "div div": ("a = Div(x, p) y = Div(a, q)", {"Div": 1}),
    "over mul": ("a = Mul(x, p) y = Div(q, a)", {"Div": 1}),
    "over div": ("a = Div(x, p) y = Div(q, a)", {"Div": 1}),
    "over over": ("a = Div(p, x) y = Div(q, a)", {"Mul": 1}),
    "over and mul": ("a = Div(p, x) y = Mul(a, q)", {"Div": 1}),
    "over and div": ("a = Div(p, x) y = Div(a, q)", {"Div": 1}),
    "add add": ("a = Add(x, p) y = Add(q, a)", {"Add": 1}),
    "add sub": ("a = Add(p, x) y = Sub(a, q)", {"Add": 1}),
    "sub from": ("a = Sub(x, p) y = Sub(q, a)", {"Sub": 1}),
    "from sub": ("a = Sub(p, x) y = Sub(a, q)", {"Sub": 1}),
    "from from": ("a = Sub(p, x) y = Sub(q, a)", {"Add": 1}),
    "four": ("a = Mul(x, p) b = Add(a, q) d = Mul(b, row) y = Add(d, row)", {"Mul": 1, "Add": 1}),
    "add mul add": ("a = Add(x, p) b = Mul(a, row) y = Sub(b, q)", {"Mul": 1, "Add": 1}),
    "div behind a sum": ("a = Mul(x, p) b = Sub(a, row) y = Div(b, q)", {"Mul": 1, "Add": 1}),
}


@pytest.mark.parametrize("form", COMBINED)
def test_constants_of_a_chain_are_combined(form):
    body, wanted = COMBINED[form]
    source = parse(f"g (float[n, 21] x) => (float[n, 21] y) {{ {body} }}", p=c(1.7), q=c(-0.3), row=plain(21) + 3)
    found, _ = fuse(source, [{"x": EDGES[None] / 7}, {"x": plain(4, 21)}, {"x": plain(0, 21)}])
    assert found == wanted


UNCOMBINED = {
    "rounding": ("a = Add(x, magic) y = Sub(a, magic)", "rounds what lies between"),
    "a larger constant": ("a = Mul(x, row) y = Mul(a, column)", "more room"),
    "overflow": ("a = Mul(x, huge) y = Mul(a, huge)", "overflow"),
    "underflow": ("a = Div(x, huge) y = Div(a, huge)", "overflow"),
    "zero": ("a = Mul(x, zero) y = Mul(a, p)", "zero"),
    "read elsewhere": ("a = Mul(x, p) b = Mul(a, p) y = Sub(b, a)", None),
}


@pytest.mark.parametrize("form", UNCOMBINED)
def test_constants_that_would_differ_together_stay(form):
    body, why = UNCOMBINED[form]
    source = parse(
        f"g (float[n, 21] x) => (float[n, 21] y) {{ {body} }}",
        p=c(1.7),
        zero=c(0),
        huge=c(1e30),
        magic=c(12582912),
        row=plain(21) + 3,
        column=plain(3, 1) + 3,
    )
    before = ops(source)
    found, outcome = fuse(source, [{"x": np.tile(EDGES, (3, 1))}])
    assert found == before
    assert why is None or any(why in refusal.why for refusal in outcome.refusals), outcome.refusals


def test_integers_wrap_around_and_are_not_divided():
    large = np.array(2**62 + 5)
    for body, wanted in (
        ("a = Mul(x, p) y = Mul(a, p)", {"Mul": 1}),
        ("a = Add(x, p) b = Add(a, p) y = Sub(p, b)", {"Sub": 1}),
        ("a = Div(x, three) y = Div(a, three)", {"Div": 2}),
        ("a = Div(x, three) y = Mul(a, three)", {"Div": 1, "Mul": 1}),
    ):
        source = parse(f"g (int64[n] x) => (int64[n] y) {{ {body} }}", p=large, three=np.array(3))
        found, _ = fuse(source, [{"x": np.array([-7, 0, 4, 2**62, -(2**63)])}])
        assert found == wanted
