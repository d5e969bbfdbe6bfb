"""Moving and scaling channels: the float model stays the same, and int8 comes nearer to it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from test_quantize_static import Builder, images, quantize

from onnxslim import Model, load
from onnxslim.graph.shapes import infer_shapes
from onnxslim.passes import _quantizer
from onnxslim.passes._calibration import observe
from onnxslim.passes._equalize import apply_equalizations, find_equalizations
from onnxslim.passes._placement import ANCHORS, Anchor, Placement, anchor_obstacle, weight_axis
from onnxslim.runtime import Session

Feeds = list[dict[str, np.ndarray]]


def uneven(count: int, seed: int = 5, decades: float = 1.5) -> np.ndarray:
    """Factors that lie decades apart."""
    random = np.random.default_rng(seed)
    return (10 ** random.uniform(-decades, decades, count)).astype(np.float32)


def placed(model: Model) -> Placement:
    shapes = infer_shapes(model)
    anchors = {
        node.outputs[0].name: Anchor(node.outputs[0].name, node, weight_axis(node), len(node.inputs[1].shape))
        for node in model.graph.nodes
        if node.op in ANCHORS and anchor_obstacle(node, shapes) is None
    }
    return Placement(model.graph, shapes, {}, set(), anchors)


def equalized(proto: onnx.ModelProto, feeds: Feeds) -> dict[str, bool]:
    """Equalize, compare all tensors with the original's, and return which ones were scaled and whether shifted."""
    model, before = load(proto), load(proto)
    found = find_equalizations(model, placed(model), feeds, symmetric=False)
    changed = apply_equalizations(model, placed(model), found)
    made = [tensor.name for node in before.graph.nodes for tensor in node.outputs]
    sessions = [Session(each, outputs=made) for each in (before, model)]
    outputs = {tensor.name for tensor in model.graph.outputs}
    assert not changed & outputs
    differing: set[str] = set()
    for feed in feeds:
        wanted, got = (session.run(feed) for session in sessions)
        for name, value in wanted.items():
            close = {"rtol": 1e-4, "atol": 1e-5 * float(np.abs(value).max())}
            if name in outputs:
                np.testing.assert_allclose(got[name], value, **close)
            elif not np.allclose(got[name], value, **close):
                differing.add(name)
    new = {tensor.name for node in model.graph.nodes for tensor in node.outputs} - set(made)
    assert changed - new == differing
    for constant, other in zip(load(proto).constants(), before.constants(), strict=True):
        np.testing.assert_array_equal(constant.values, other.values)
    return {each.name: bool(each.shift.any()) for each in found}


def scaled_conv(b: Builder, source: str, output: str, cin: int, cout: int, **options: int) -> str:
    """A convolution whose channels lie decades apart."""
    b.conv(source, output, cin, cout, **options)
    for tensor in b.initializers[-2:]:
        values = onnx.numpy_helper.to_array(tensor)
        factors = uneven(cout, seed=len(b.nodes)).reshape(-1, *[1] * (values.ndim - 1))
        tensor.CopyFrom(onnx.numpy_helper.from_array(values * factors, tensor.name))
    return output


def test_convolutions_depthwise_and_grouped_ones_stay_the_same() -> None:
    b = Builder()
    x = b.node("Relu", [scaled_conv(b, "x", "a", 3, 8)], "ra")
    x = b.node("Relu", [scaled_conv(b, x, "dw", 8, 8, groups=8)], "rdw")
    x = b.node("LeakyRelu", [scaled_conv(b, x, "g", 8, 8, groups=2)], "rg", alpha=0.1)
    x = b.node("MaxPool", [x], "pool", kernel_shape=[2, 2], strides=[2, 2])
    x = scaled_conv(b, x, "p", 8, 6, kernel=1)
    b.conv(x, "y", 6, 4)
    proto = b.model({"x": [1, 3, 12, 12]}, {"y": [1, 4, 6, 6]})
    assert equalized(proto, images()) == {"ra": False, "rdw": False, "pool": False, "p": False}


def test_a_transposed_convolution_divides_too() -> None:
    b = Builder()
    weight = b.constant("w", (b.random.normal(size=(3, 4, 2, 2)) * uneven(4).reshape(4, 1, 1)).astype(np.float32))
    b.node("ConvTranspose", ["x", weight], "up", strides=[2, 2])
    b.conv("up", "y", 4, 4, kernel=1)
    proto = b.model({"x": [1, 3, 12, 12]}, {"y": [1, 4, 24, 24]})
    assert "up" in equalized(proto, images())


def rows(count: int = 16, width: int = 16, seed: int = 2) -> Feeds:
    random = np.random.default_rng(seed)
    return [{"x": random.normal(size=(1, 5 + index % 3, width)).astype(np.float32)} for index in range(count)]


def norm(b: Builder, source: str, output: str, width: int, *, parts: bool = False) -> str:
    """A normalization with outliers in its scale and bias, as one node or behind it as two."""
    scale = b.constant(f"{output}_s", uneven(width))
    shift = b.constant(f"{output}_c", (b.random.normal(size=width) * uneven(width, seed=6)).astype(np.float32))
    if not parts:
        return b.node("LayerNormalization", [source, scale, shift], output)
    one = b.constant(f"{output}_1", np.ones(width, np.float32))
    b.node("LayerNormalization", [source, one], f"{output}_n")
    b.node("Mul", [scale, f"{output}_n"], f"{output}_m")
    return b.node("Add", [f"{output}_m", shift], output)


@pytest.mark.parametrize("parts", [False, True])
def test_normalization_in_front_of_several_layers_takes_scale_and_shift(parts: bool) -> None:
    b = Builder()
    norm(b, "x", "n", 16, parts=parts)
    for name in ("q", "k"):
        b.node("MatMul", ["n", b.weight(f"{name}_w", 16, 12)], f"{name}_m")
        b.node("Add", [b.weight(f"{name}_b", 12), f"{name}_m"], name)
    proto = b.model({"x": [1, "n", 16]}, {"q": [1, "n", 12], "k": [1, "n", 12]})
    assert equalized(proto, rows()) == {"n": True}


def test_there_is_no_shift_where_a_reader_has_no_bias() -> None:
    b = Builder()
    norm(b, "x", "n", 16)
    b.node("MatMul", ["n", b.weight("w", 16, 12)], "y")
    proto = b.model({"x": [1, "n", 16]}, {"y": [1, "n", 12]})
    assert equalized(proto, rows()) == {"n": False}


def test_a_mul_divides_where_a_residual_reads_the_tensor_as_well() -> None:
    b = Builder()
    norm(b, "x", "n", 16)
    b.node("MatMul", ["n", b.weight("w", 16, 16)], "m")
    b.node("Add", ["m", "n"], "y")
    proto = b.model({"x": [1, "n", 16]}, {"y": [1, "n", 16]})
    assert equalized(proto, rows()) == {"n": False}
    model = load(proto)
    apply_equalizations(model, placed(model), find_equalizations(model, placed(model), rows(), symmetric=False))
    assert [node.op for node in model.graph.nodes] == ["LayerNormalization", "Mul", "MatMul", "Add"]


def test_gemms_and_high_biases_behind_a_relu() -> None:
    b = Builder()
    first = b.constant("w1", (b.random.normal(size=(12, 16)) * 0.1).astype(np.float32))
    b.node("Gemm", ["x", first, b.constant("b1", (5 * uneven(12)).astype(np.float32))], "g", transB=1)
    b.node("Relu", ["g"], "r")
    b.node("Gemm", ["r", b.weight("w2", 8, 12)], "y", transB=1)
    proto = b.model({"x": ["n", 16]}, {"y": ["n", 8]})
    feeds = [{"x": feed["x"][0]} for feed in rows()]
    assert equalized(proto, feeds) == {"r": True}


def test_nothing_moves_through_what_does_not_scale_or_is_seen_from_outside() -> None:
    b = Builder()
    b.node("Sigmoid", [scaled_conv(b, "x", "a", 3, 8)], "s")
    b.constant("zero", np.float32(0))
    b.constant("six", np.float32(6))
    b.node("Clip", [scaled_conv(b, "s", "c", 8, 8), "zero", "six"], "clip")
    b.node("Relu", [scaled_conv(b, "clip", "d", 8, 8)], "seen")
    b.conv("seen", "e", 8, 8)
    b.node("Conv", ["e", "e_w"], "y", pads=[1, 1, 1, 1])  # a weight that two layers read
    proto = b.model({"x": [1, 3, 12, 12]}, {"y": [1, 8, 12, 12], "seen": [1, 8, 12, 12]})
    assert equalized(proto, images()) == {}


@pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt"])
def test_int8_comes_nearer_to_float(runtime: str) -> None:
    """A block of a transformer with outliers, as in published ones: SmoothQuant's case."""
    b = Builder(seed=3)
    norm(b, "x", "n", 64)
    used = b.random.normal(size=(64, 128)) / uneven(64)[:, None] / 8  # small channels matter as much as large ones
    b.node("MatMul", ["n", b.constant("w1", used.astype(np.float32))], "m1")
    b.node("Add", ["m1", b.weight("b1", 128)], "a1")
    b.node("Relu", ["a1"], "r1")
    b.node("MatMul", ["r1", b.weight("w2", 128, 64)], "y")
    proto = b.model({"x": [1, "n", 64]}, {"y": [1, "n", 64]})
    feeds, unseen = rows(32, 64), rows(8, 64, seed=9)
    errors = {}
    for equalize in (True, False):
        options = {"runtime": runtime, "only_if_faster": False, "keep_float": 0}
        model, outcome = quantize(proto, feeds, equalize=equalize, **options)
        assert equalize == any(change.rule == "equalization" for change in outcome.changes)
        # As the operators are specified: what is written for TensorRT saturates in the kernels of some processors.
        sessions = Session(load(proto)), Session(model, optimize=False)
        pairs = [[session.run(feed)["y"] for session in sessions] for feed in unseen]
        errors[equalize] = sum(np.square(got - true).sum() for true, got in pairs)
    assert errors[True] < 0.5 * errors[False]


@pytest.mark.parametrize("enough", [0.0, 1e9])
def test_a_few_samples_tell_that_other_scales_do_not_pay_off(monkeypatch: pytest.MonkeyPatch, enough: float) -> None:
    b = Builder()
    b.node("Relu", [scaled_conv(b, "x", "c1", 3, 32)], "r1")
    scaled_conv(b, "r1", "y", 32, 8)
    proto = b.model({"x": [1, 3, 12, 12]}, {"y": [1, 8, 12, 12]})
    seen: list[int] = []

    def counted(model, names, feeds, steps=None, *rest, **options):
        kept = list(feeds)
        if steps is not None and "r1" in names:
            seen.append(len(kept))
        return observe(model, names, kept, steps, *rest, **options)

    monkeypatch.setattr(_quantizer, "observe", counted)
    monkeypatch.setattr(_quantizer, "_MAY_PAY_OFF", enough)
    monkeypatch.setattr(_quantizer, "_PAYS_OFF", enough)
    monkeypatch.setattr(_quantizer, "_BATCH", 1)
    monkeypatch.setattr(_quantizer, "_SMALL_ERROR", 0.0)
    _, outcome = quantize(proto, images(20), only_if_faster=False)
    assert seen == ([20, 4, 20] if enough else [20, 4])
    assert bool(enough) == any(change.rule == "equalization" for change in outcome.changes)
    assert bool(enough) != any("output error on held-back samples would" in each.why for each in outcome.refusals)
