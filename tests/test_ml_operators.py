"""Operators of ai.onnx.ml that are arithmetic become operators that every rule and target knows."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper
from rewriting import ops, parse, plain, rewrite

from onnxslim.passes.simplify import Simplify

ML = ', "ai.onnx.ml" : 3'


@pytest.mark.parametrize(
    ("shape", "offset", "scale"),
    [("n, 3", "1.5, -2.0, 0.1", "0.3, 2.0, 7.0"), ("n, 3", "0.5", "3.0"), ("3", "1.5, -2.0, 0.1", "0.3, 2.0, 7.0")],
)
def test_scaler_subtracts_and_multiplies(shape, offset, scale):
    source = parse(
        f"g (float[{shape}] x) => (float[{shape}] y) {{"
        f" y = ai.onnx.ml.Scaler<offset = [{offset}], scale = [{scale}]>(x) }}",
        domains=ML,
    )
    feeds = [{"x": plain(3)}] if shape == "3" else [{"x": plain(n, 3)} for n in (1, 4)]
    model, _ = rewrite(source, Simplify(), feeds=feeds)
    assert ops(model) == {"Sub": 1, "Mul": 1}
    assert [each.domain for each in model.to_proto().opset_import] == [""]


def test_scaler_goes_into_the_layer_behind_it_unless_features_differ_too_much():
    text = """g (float[n, 3] x) => (float[n, 4] y) {{
        s = ai.onnx.ml.Scaler<offset = [1.0, -2.0, 0.5], scale = [{scale}]>(x) y = Gemm(s, w, b)
    }}"""
    arrays = {"w": plain(3, 4), "b": plain(4)}
    feeds = [{"x": plain(n, 3, seed=n)} for n in (1, 4)]
    even = parse(text.format(scale="0.5, 2.0, 4.0"), domains=ML, **arrays)
    model, _ = rewrite(even, Simplify(), feeds=feeds, rtol=1e-5)
    assert ops(model) == {"Gemm": 1}
    uneven = parse(text.format(scale="0.5, 2.0, 64.0"), domains=ML, **arrays)
    model, outcomes = rewrite(uneven, Simplify(), feeds=feeds)
    assert ops(model) == {"Sub": 1, "Mul": 1, "Gemm": 1}
    assert any("64 times" in refusal.why for refusal in outcomes[-1].refusals)


def test_scaler_that_converts_stays():
    source = parse(
        "g (int64[n, 2] x) => (float[n, 2] y) { y = ai.onnx.ml.Scaler<offset = [1.0], scale = [0.5]>(x) }", domains=ML
    )
    model, _ = rewrite(source, Simplify(), feeds=[{"x": np.array([[1, 2], [3, 2**40]])}])
    assert ops(model) == {"Scaler": 1}


@pytest.mark.parametrize("columns", ["int64[2] {2, 0}", "int64[1, 2] {2, 2}"])
def test_constant_columns_are_gathered(columns):
    source = parse(
        f"""g (float[n, 3] x) => (float[n, 2] y) {{
            i = Constant<value = {columns}>() y = ai.onnx.ml.ArrayFeatureExtractor(x, i)
        }}""",
        domains=ML,
    )
    model, _ = rewrite(source, Simplify(), feeds=[{"x": plain(n, 3)} for n in (1, 4)])
    assert ops(model) == {"Gather": 1}


@pytest.mark.parametrize("keepdims", [0, 1])
def test_the_name_of_the_likeliest_class_is_gathered(keepdims):
    source = parse(
        f"""g (float[n, 3] x) => (string[1, n] y) {{
            i = ArgMax<axis = 1, keepdims = {keepdims}>(x) y = ai.onnx.ml.ArrayFeatureExtractor(names, i)
        }}""",
        domains=ML,
    )
    source.graph.initializer.append(helper.make_tensor("names", TensorProto.STRING, [3], [b"ant", b"bee", b"cat"]))
    model, _ = rewrite(source, Simplify(), feeds=[{"x": plain(n, 3)} for n in (1, 5)])
    assert ops(model)["Gather"] == 1 and ops(model)["ArrayFeatureExtractor"] == 0


def test_columns_that_may_be_negative_stay_extracted():
    source = parse(
        "g (float[n, 3] x, int64[k] i) => (float[n, k] y) { y = ai.onnx.ml.ArrayFeatureExtractor(x, i) }", domains=ML
    )
    model, _ = rewrite(source, Simplify(), feeds=[{"x": plain(2, 3), "i": np.array([1, 1, 2])}])
    assert ops(model) == {"ArrayFeatureExtractor": 1}
