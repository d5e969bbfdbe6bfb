"""Outputs of If, Loop and Scan that nobody reads go, with what the bodies compute for them alone."""

from __future__ import annotations

import numpy as np
import pytest
from rewriting import ops, parse, plain, rewrite

from onnxslim.passes.simplify import Simplify


def test_a_branch_computes_only_what_is_read():
    source = parse(
        """g (bool c, float[n] x) => (float[n] y) {
            a, y = If(c) <
                then_branch = t () => (float[n] p, float[n] q) { e = Exp(x) p = Tanh(e) q = Relu(x) },
                else_branch = f () => (float[n] r, float[n] s) { r = Sin(x) s = Neg(x) }
            >
        }"""
    )
    feeds = [{"c": np.array(flag), "x": plain(3)} for flag in (True, False)]
    model, _ = rewrite(source, Simplify(), feeds=feeds)
    assert ops(model) == {"If": 1, "Relu": 1, "Neg": 1}


LOOP = """g (int64 m, float[2] x, float[2] z) => (float[2] y) {{
    c = Constant<value = bool {{1}}>()
    {results} = Loop(m, c, x, z) <body = b (int64 i, bool k, float[2] p, float[2] q) =>
        (bool o, float[2] r, float[2] s, float[2] t) {{ o = Identity(k) r = Sin(p) {body} }}>
    {after}
}}"""


def _loop(results: str, body: str, after: str = ""):
    source = parse(LOOP.format(results=results, body=body, after=after))
    feeds = [{"m": np.array(m), "x": plain(2), "z": plain(2, seed=1)} for m in (0, 1, 3)]
    model, _ = rewrite(source, Simplify(), feeds=feeds)
    loop = next(node for node in model.graph.nodes if node.op == "Loop")
    return ops(model), loop


def test_what_a_loop_collects_for_nobody_goes():
    counts, loop = _loop("y, u, v", "s = Cos(q) t = Exp(p)", after="")
    assert counts["Exp"] == 0
    assert len(loop.outputs) < 3


def test_what_a_loop_carries_for_nobody_goes():
    counts, loop = _loop("y, u, v", "s = Identity(q) t = Exp(p)")
    assert len(loop.inputs) == 3 and len(loop.outputs) == 1
    assert counts == {"Loop": 1, "Sin": 1, "Identity": 1}  # the condition


def test_what_the_next_iteration_reads_stays():
    counts, loop = _loop("h, y, v", "s = Add(p, q) t = Exp(p)")
    assert len(loop.inputs) == 4
    assert counts["Sin"] == 1


def test_a_scan_collects_only_what_is_read():
    source = parse(
        """g (float[2] x, float[n, 2] z) => (float[n, 2] y) {
            h, u, y = Scan<num_scan_inputs = 1, body = b (float[2] p, float[2] q) =>
                (float[2] r, float[2] s, float[2] t) { r = Add(p, q) s = Exp(q) t = Neg(r) }>(x, z)
        }"""
    )
    model, _ = rewrite(source, Simplify(), feeds=[{"x": plain(2), "z": plain(n, 2)} for n in (1, 4)])
    assert ops(model) == {"Scan": 1, "Add": 1, "Neg": 1}


CARRIED = """g (int64 m, float[2] x, float[2] z) => ({outputs}) {{
    c = Constant<value = bool {{1}}>()
    y, u, v = Loop(m, c, x, z) <body = b (int64 i, bool k, float[2] p, float[2] q) =>
        (bool o, float[2] r, float[2] s, float[2] t) {{ o = Identity(k) {body} }}>
    {after}
}}"""


@pytest.mark.parametrize(
    ("outputs", "body", "after", "inputs", "outside"),
    [
        # Read in the body, behind the loop, and from a body within the body; through two copies too.
        ("float[2] w, float[k, 2] v", "r = Mul(p, q) s = Identity(q) t = Exp(r)", "w = Add(u, y)", "mcx", True),
        ("float[2] y, float[k, 2] v", "a = Identity(q) s = Identity(a) r = Mul(p, a) t = Exp(r)", "", "mcx", True),
        (
            "float[2] y, float[k, 2] v",
            """s = Identity(q) t = Exp(p) d = Constant<value = int64 {2}>()
               r = Loop(d, k, p) <body = e (int64 j, bool l, float[2] a) => (bool f, float[2] h)
                   { f = Identity(l) h = Mul(a, q) }>""",
            "",
            "mcx",
            True,
        ),
        # Handed on as it is, without a copy (Keras).
        ("float[2] w, float[k, 2] v", "r = Mul(p, q) t = Exp(r)", "w = Add(u, y)", "mcx", True),
        # What is an output of the model stays one; the body reads from outside all the same.
        ("float[2] y, float[2] u, float[k, 2] v", "r = Mul(p, q) s = Identity(q) t = Exp(r)", "", "mcxz", True),
        # Changed once, or exchanged with another value: it is not the same in every iteration.
        ("float[2] y, float[k, 2] v", "r = Mul(p, q) s = Neg(q) t = Exp(r)", "", "mcxz", False),
        ("float[2] y, float[k, 2] v", "r = Identity(q) s = Identity(p) t = Add(p, q)", "", "mcxz", False),
    ],
)
def test_what_a_loop_carries_unchanged_is_read_from_outside(outputs, body, after, inputs, outside):
    text = CARRIED.format(outputs=outputs, body=body, after=after)
    source = parse(text if " s = " in body or body.startswith("s = ") else text.replace("float[2] s", "float[2] q"))
    feeds = [{"m": np.array(m), "x": plain(2), "z": plain(2, seed=1)} for m in (0, 1, 3)]
    model, _ = rewrite(source, Simplify(), feeds=feeds)
    loop = next(node for node in model.graph.nodes if node.op == "Loop")
    assert "".join(tensor.name for tensor in loop.inputs) == inputs
    assert ("z" in read_by_bodies(loop)) == outside


def test_what_a_loop_carries_under_its_own_name_is_read_from_outside():
    """As PaddlePaddle exports it: what the body calls it hides what it is outside."""
    text = CARRIED.format(outputs="float[2] y, float[k, 2] v", body="r = Mul(p, z) t = Exp(r)", after="")
    source = parse(text.replace("float[2] q)", "float[2] z)").replace("float[2] s", "float[2] z"))
    feeds = [{"m": np.array(m), "x": plain(2), "z": plain(2, seed=1)} for m in (0, 1, 3)]
    model, _ = rewrite(source, Simplify(), feeds=feeds)
    loop = next(node for node in model.graph.nodes if node.op == "Loop")
    assert "".join(tensor.name for tensor in loop.inputs) == "mcx" and "z" in read_by_bodies(loop)


def read_by_bodies(node):
    names = set()
    for body in (value for value in node.attrs.values() if hasattr(value, "nodes")):
        for each in body.nodes:
            names |= {tensor.name for tensor in each.inputs} | read_by_bodies(each)
    return names


def test_what_a_scan_carries_unchanged_is_read_from_outside():
    source = parse(
        """g (float[2] x, float[2] w, float[n, 2] z) => (float[2] r, float[n, 2] y) {
            r, u, y = Scan<num_scan_inputs = 1, body = b (float[2] p, float[2] v, float[2] q) =>
                (float[2] s, float[2] o, float[2] t) { h = Mul(p, v) s = Add(h, q) o = Identity(v) t = Neg(s)
                }>(x, w, z)
        }"""
    )
    model, _ = rewrite(
        source, Simplify(), feeds=[{"x": plain(2), "w": plain(2, seed=3), "z": plain(n, 2)} for n in (1, 4)]
    )
    (scan,) = model.graph.nodes
    assert [tensor.name for tensor in scan.inputs] == ["x", "w", "z"] and "w" in read_by_bodies(scan)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_a_resize_to_the_same_size_goes_where_it_takes_single_elements(mode):
    source = parse(
        f"""g (float[n, 2, h, w] x) => (float[n, 2, i, j] y) {{
            a = Resize<mode = "{mode}">(x, , s) b = Resize<mode = "nearest">(a, , t) y = Relu(b)
        }}""",
        opset=17,
        s=np.ones(4, np.float32),
        t=np.array([1, 1, 2, 2], np.float32),
    )
    model, _ = rewrite(source, Simplify(), feeds=[{"x": plain(n, 2, 3, 4)} for n in (1, 2)])
    assert ops(model)["Resize"] == (1 if mode == "nearest" else 2)
