"""Weight-only quantization: what is stored means what ONNX Runtime computes, and it stays close to the float model."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxslim.data import open_dataset
from onnxslim.model import load
from onnxslim.passes.base import Context, Outcome
from onnxslim.passes.quantize_weights import QuantizeWeights
from onnxslim.runtime import Session

IR = {9: 4, 13: 7, 17: 8, 21: 10, 23: 11}


def make_model(nodes, inputs, outputs, weights, *, opset=17):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=IR[opset])
    onnx.checker.check_model(proto)
    return proto


def products(opset=17, depth=100):
    """MatMul on a sequence, Gemm with factors, a transposed weight and a bias, and the first weight once more."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "first"),
        helper.make_node("Tanh", ["a"], ["t"], "tanh"),
        helper.make_node("Reshape", ["t", "flat"], ["f"], "reshape"),
        helper.make_node("Gemm", ["f", "v", "c"], ["g"], "gemm", transB=1, alpha=0.5, beta=2.0),
        helper.make_node("MatMul", ["g", "w"], ["y"], "again"),
    ]
    weights = {
        "w": rng.normal(size=(depth, 72)).astype(np.float32) / 10,
        "v": rng.normal(size=(depth, 72)).astype(np.float32) / 8,
        "c": rng.normal(size=depth).astype(np.float32),
        "flat": np.array([-1, 72]),
    }
    return make_model(nodes, [("x", TensorProto.FLOAT, ["n", 5, depth])], [("y", ["m", 72])], weights, opset=opset)


def feeds(depth=100, count=24, seed=1):
    mixing = np.random.default_rng(0).normal(size=(depth, depth)) * np.geomspace(2, 0.02, depth)
    rng = np.random.default_rng(seed)
    return [{"x": (rng.normal(size=(2, 5, depth)) @ mixing).astype(np.float32)} for _ in range(count)]


def quantize(proto, data=None, **options):
    model = load(proto)
    calibration = open_dataset(data, Session(model).specs) if data else None
    outcome = QuantizeWeights(**options).run(model, Context(calibration=calibration))
    onnx.checker.check_model(model.to_proto())
    return model, outcome


def whys(outcome):
    return " | ".join(f"{refusal.node}: {refusal.why}" for refusal in outcome.refusals)


def error(proto, model, data):
    noise = signal = 0.0
    one, two = Session(proto), Session(model)
    for feed in data:
        wanted, got = one.run(feed)["y"], two.run(feed)["y"]
        assert wanted.shape == got.shape
        noise, signal = noise + float(np.square(wanted - got).sum()), signal + float(np.square(wanted).sum())
    return noise / signal


def unpacked(node):
    """The weight ``[K, N]`` that the inputs of a MatMulNBits stand for, by the text of the op's definition."""
    depth, outputs, bits, size = (node.attrs[name] for name in ("K", "N", "bits", "block_size"))
    packed, scales = node.inputs[1].values, node.inputs[2].values
    count = -(-depth // size)
    assert packed.shape == (outputs, count, size * bits // 8)
    scales = scales.reshape(outputs, count)
    codes = (packed if bits == 8 else np.stack([packed & 15, packed >> 4], -1)).reshape(outputs, -1)
    zeros = np.full((outputs, count), 1 << (bits - 1))
    if len(node.inputs) > 3:
        points = node.inputs[3].values
        if bits == 4:
            points = np.stack([points & 15, points >> 4], -1)
        zeros = points.reshape(outputs, -1)[:, :count]
    wide = [np.repeat(each, size, 1)[:, :depth].astype(np.float64) for each in (scales, zeros)]
    return (wide[0] * (codes[:, :depth] - wide[1])).T


@pytest.mark.parametrize("opset", [9, 17, 23])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_stored_is_what_is_computed(bits, symmetric, opset):
    proto = products(opset)
    model, outcome = quantize(proto, bits=bits, symmetric=symmetric, block_size=32)
    first, gemm, again = (node for node in model.graph.nodes if node.op == "MatMulNBits")
    assert [node.name for node in (first, gemm, again)] == ["first", "gemm", "again"]
    assert first.inputs[1] is again.inputs[1]  # stored once
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    scale = np.abs(weights["w"]).max() / (1 << (bits - 1))
    assert np.abs(unpacked(first) - weights["w"]).max() < 1.5 * scale
    x = feeds()[0]["x"]
    hidden = np.tanh(x @ unpacked(first)).reshape(-1, 72) @ unpacked(gemm) + 2 * weights["c"]
    found = Session(model).run({"x": x})["y"]
    wanted = hidden @ unpacked(again)
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
    assert outcome.numbers["weights quantized"] == 3
    assert error(proto, model, feeds(seed=2)) < (2e-2 if bits == 4 else 1e-4)


@pytest.mark.parametrize("size", [16, 32, 64])
def test_standard_form_means_the_same_as_the_op(size):
    proto = products(21)
    one, _ = quantize(proto, block_size=size)
    two, _ = quantize(proto, block_size=size, format="dequantize")
    assert not any(node.domain for node in two.graph.nodes)
    assert [node.op for node in two.graph.nodes].count("DequantizeLinear") == 2
    for feed in feeds()[:3]:
        wanted, found = (Session(model).run(feed)["y"] for model in (one, two))
        np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def test_files_shrink():
    proto = products(depth=512)
    whole = len(proto.SerializeToString())
    for options, share in (({}, 0.2), ({"bits": 8}, 0.36)):
        model, _ = quantize(proto, **options)
        assert len(model.to_proto().SerializeToString()) < share * whole


def test_calibration_lowers_the_error_on_other_data():
    proto = products()
    plain, _ = quantize(proto)
    fitted, _ = quantize(proto, feeds())
    assert error(proto, fitted, feeds(seed=3)) < 0.8 * error(proto, plain, feeds(seed=3))


def test_weights_in_constant_nodes_and_bodies():
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.normal(size=(64, 64)).astype(np.float32), "v")
    branches = {}
    for name, source in (("then_branch", "w"), ("else_branch", "v")):
        made = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 64])
        nodes = [helper.make_node("MatMul", ["x", source], [name], f"{name}/product")]
        if source == "v":
            nodes.insert(0, helper.make_node("Constant", [], ["v"], value=weight))
        branches[name] = helper.make_graph(nodes, name, [], [made])
    nodes = [helper.make_node("If", ["c"], ["y"], "if", **branches)]
    proto = make_model(
        nodes,
        [("c", TensorProto.BOOL, []), ("x", TensorProto.FLOAT, ["n", 64])],
        [("y", ["n", 64])],
        {"w": rng.normal(size=(64, 64)).astype(np.float32)},
    )
    model, outcome = quantize(proto)
    assert outcome.numbers["weights quantized"] == 2
    for flag in (True, False):
        data = [{"c": np.array(flag), "x": rng.normal(size=(7, 64)).astype(np.float32)}]
        assert 0 < error(proto, model, data) < 2e-2


def test_embedding_tables_are_stored_in_int8():
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Gather", ["table", "x"], ["e"], "embed"),
        helper.make_node("MatMul", ["e", "w"], ["y"], "product"),
    ]
    sizes = {"table": (80, 64), "w": (64, 64)}
    weights = {name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    proto = make_model(nodes, [("x", TensorProto.INT64, ["n"])], [("y", ["n", 64])], weights)
    data = [{"x": np.arange(80)}]
    model, _ = quantize(proto, bits=8)
    stored = [tensor for node in model.graph.nodes for tensor in node.inputs if isinstance(tensor, gs.Constant)]
    assert any(tensor.dtype == np.int8 and tensor.shape == (80, 64) for tensor in stored)
    assert len(model.to_proto().SerializeToString()) < 0.35 * len(proto.SerializeToString())
    assert error(proto, model, data) < 1e-3
    kept, _ = quantize(proto, bits=8, tables=False)
    assert any(node.op == "Gather" and node.inputs[0].values.shape == (80, 64) for node in kept.graph.nodes)


def test_what_stays_float_has_a_reason():
    model, outcome = quantize(products(), exclude=("gemm",))
    assert "gemm: Gemm: it is excluded" in whys(outcome)
    assert [node.op for node in model.graph.nodes].count("Gemm") == 1
    _, outcome = quantize(products(), min_elements=10**6)
    assert not outcome.modified
    assert "too small" in whys(outcome)
    _, outcome = quantize(products(17), format="dequantize")
    assert not outcome.modified
    assert "blocks need opset 21" in whys(outcome)


def test_weaker_is_eight_bits():
    weaker = QuantizeWeights(block_size=64).weaker(Outcome())
    assert weaker is not None
    assert (weaker.bits, weaker.block_size, weaker.weaker(Outcome())) == (8, 64, None)


def test_nodes_without_names():
    proto = products(opset=21)
    for node in proto.graph.node:
        node.ClearField("name")
    for kind in ("matmul-nbits", "dequantize"):
        model, outcome = quantize(proto, feeds(), bits=8, format=kind)
        assert {change.node for change in outcome.changes} == {"a", "g", "y"}
        assert error(proto, model, feeds(seed=2)) < 1e-3
