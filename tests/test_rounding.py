"""Weights rounded for what a layer gives: never worse than one by one, near the best codes there are, and legal."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_quantize_static import Builder, images, mobile_block, quantize

from onnxslim import load
from onnxslim.passes import _quantizer, _rounding, _statistics
from onnxslim.passes._qdq import dequantize_weight, quantize_weight
from onnxslim.passes._rounding import round_rows
from onnxslim.passes._trunk import Trunk


def layer(groups, outputs, inputs, seed):
    """Rows of a weight, the scales and codes of each rounded by itself, and a metric of inputs that go together."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(groups, outputs, inputs))
    seen = rng.normal(size=(groups, inputs, inputs)) + 4 * rng.normal(size=(groups, inputs, 1))
    return rows, seen @ seen.transpose(0, 2, 1) / inputs


def loss(error, metric):
    return np.einsum("gok,gkl,gol->go", error, metric, error)


def codes_of(rows, *, pairs):
    groups, outputs, inputs = rows.shape
    plain = quantize_weight(rows.reshape(-1, inputs).astype(np.float32), 0, pairs=pairs)
    return plain.codes.reshape(rows.shape), plain.scale.astype(np.float64).reshape(groups, outputs, 1)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("shape", [(1, 12, 40), (8, 1, 9), (2, 5, 300), (3, 2, 1)])
def test_the_error_falls_and_codes_stay_legal(shape, pairs):
    rows, metric = layer(*shape, seed=1)
    codes, scale = codes_of(rows, pairs=pairs)
    found = round_rows(rows, codes, scale, metric.copy(), pairs=pairs)
    before, after = (loss(scale * each - rows, metric).sum() for each in (codes, found))
    assert after <= before * (1.0 if shape[2] == 1 else 0.5)
    assert found.dtype == np.int8 and np.abs(found.astype(int)).max() <= 127
    if pairs and shape[2] > 1:
        for signed in (found.astype(int), -found.astype(int)):
            assert np.sort(np.maximum(signed, 0), axis=2)[:, :, -2:].sum(axis=2).max() <= 128


@pytest.mark.parametrize("size", [1e-60, 1e-9, 1e60])
def test_codes_do_not_depend_on_the_size_of_the_inputs(size):
    rows, metric = layer(2, 6, 50, seed=4)
    codes, scale = codes_of(rows, pairs=False)
    found = round_rows(rows, codes, scale, size * metric, pairs=False)
    assert (found == round_rows(rows, codes, scale, metric.copy(), pairs=False)).mean() > 0.99


def test_inputs_that_are_zero_leave_the_codes_of_plain_rounding():
    rows, _ = layer(1, 4, 20, seed=5)
    codes, scale = codes_of(rows, pairs=False)
    assert np.array_equal(round_rows(rows, codes, scale, np.zeros((1, 20, 20)), pairs=False), codes)


@pytest.mark.parametrize("pairs", [False, True])
def test_rows_taken_in_parts_get_the_same_codes(pairs, monkeypatch):
    rows, metric = layer(2, 11, 70, seed=3)
    codes, scale = codes_of(rows, pairs=pairs)
    whole = round_rows(rows, codes, scale, metric.copy(), pairs=pairs)
    monkeypatch.setattr(_rounding, "_PART_ELEMENTS", 2 * 70 * 3)
    assert np.array_equal(round_rows(rows, codes, scale, metric.copy(), pairs=pairs), whole)


def test_no_row_is_worse_than_rounded_one_by_one():
    rows, metric = layer(3, 20, 50, seed=4)
    rows[:, ::2] *= 1e-3  # beside large ones, what such a row loses is not seen in a sum
    codes, scale = codes_of(rows, pairs=False)
    found = round_rows(rows, codes, scale, metric.copy(), pairs=False)
    mine, plain = (np.einsum("gok,gkl,gol->go", e, metric, e) for e in (scale * found - rows, scale * codes - rows))
    assert (mine <= plain * 1.001).all() and np.median(mine / plain) < 0.5


def test_small_rows_are_near_the_best_codes():
    rows, metric = layer(20, 1, 4, seed=2)
    codes, scale = codes_of(rows, pairs=False)
    found = round_rows(rows, codes, scale, metric.copy(), pairs=False)
    near = np.array(list(itertools.product(range(-2, 3), repeat=4)))
    best = np.array(
        [
            loss((scale[g] * np.clip(codes[g] + near, -127, 127) - rows[g])[None], metric[g : g + 1]).min()
            for g in range(20)
        ]
    )
    mine, plain = (loss(scale * each - rows, metric)[:, 0] for each in (found, codes))
    assert np.median(mine / best) < 1.5
    assert mine.sum() < 0.3 * plain.sum()


def test_parts_that_fit_into_less_memory_give_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    found, passes = [], []
    rounded, taken = _rounding.reconstruct, _rounding.input_moments
    monkeypatch.setattr(_quantizer, "reconstruct", lambda *a, **k: found.append(rounded(*a, **k)) or found[-1])
    monkeypatch.setattr(_rounding, "input_moments", lambda *a, **k: passes.append(len(a[1])) or taken(*a, **k))
    for part_bytes in (1 << 30, 1):
        monkeypatch.setattr(_rounding, "_PART_BYTES", part_bytes)
        quantize(mobile_block(size=6), images(size=6))  # all of so small a map is drawn
    assert passes == [4, 1, 1, 1, 1]
    assert len(found[0]) == 4
    for name, one in found[0].items():
        assert np.array_equal(one.codes, found[1][name].codes)


_OBSERVING = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from test_quantize_static import Builder
from onnxslim import load
from onnxslim.passes._calibration import observe
from onnxslim.runtime import Session
b = Builder()
x = "x"
for index in range(40):
    # The second in ONNX Runtime's own layout, if it may choose.
    x = b.node("Sigmoid", [x], f"s{index}") if sys.argv[2] == "Sigmoid" else b.conv(x, f"s{index}", 16, 16)
b.node("ReduceMax", [x], "y", keepdims=0)
model = load(b.model({"x": [1, 16, 256, "n"]}, {"y": []}))
feed = {"x": np.ones((1, 16, 256, 512), np.float32)}
Session(model).run(feed)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
observe(model, [f"s{index}" for index in range(40)], [feed], {f"s{index}": 1001 for index in range(40)})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("op", ["Sigmoid", "Conv"])
def test_observing_many_tensors_holds_few_of_them_at_a_time(op: str) -> None:
    here = str(Path(__file__).parent)
    words = [sys.executable, "-c", _OBSERVING, here, op]
    grown = int(subprocess.run(words, check=True, capture_output=True, text=True).stdout) * 1024
    assert grown < 15 * (8 << 20)  # 40 tensors of 8 MiB


def test_weights_of_float_layers_are_stored_as_what_their_layers_give_best() -> None:
    rng = np.random.default_rng(0)
    b = Builder()
    b.node("Relu", [b.conv("x", "c", 3, 16)], "r")
    b.node("ReduceMean", ["r"], "m", axes=[2, 3], keepdims=0)
    b.node("Gemm", ["m", b.weight("w", 12, 16)], "y", transB=1)
    model = load(b.model({"x": ["N", 3, 12, 12]}, {"y": ["N", 12]}))
    feeds = [{"x": feed["x"] + rng.normal(size=(1, 3, 1, 1)).astype(np.float32)} for feed in images(64)]
    nodes = {node.name: node for node in model.graph.nodes}
    found = _rounding.round_stored(model, nodes.values(), lambda: feeds, {})
    assert set(found) == {"c", "y"}
    moments = _statistics.input_moments(Trunk(model, lambda: feeds), nodes.values(), per_sample=144)
    for name, codes in found.items():
        node = nodes[name]
        values = dequantize_weight(codes, 0)
        again = quantize_weight(values, 0)
        assert np.array_equal(again.codes, codes.codes)  # the scale can be told from what was rounded
        np.testing.assert_allclose(again.scale, codes.scale, rtol=1e-6)
        plain = dequantize_weight(quantize_weight(node.inputs[1].values, 0), 0)
        second = moments[id(node)].second[0]
        errors = [(each - node.inputs[1].values).reshape(len(each), -1) for each in (values, plain)]
        better, worse = (np.einsum("ok,kl,ol->", error, second, error) for error in errors)
        assert better < 0.8 * worse
