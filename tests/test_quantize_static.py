"""Static int8: placement, arithmetic, calibration, refusals, against ONNX Runtime and the float model."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxslim import Model, load
from onnxslim.data import open_dataset
from onnxslim.passes._correction import Judge
from onnxslim.passes._opset import raise_opset
from onnxslim.passes._qdq import code_of_range, quantize_weight
from onnxslim.passes.base import Context, Outcome
from onnxslim.passes.quantize_static import QuantizeStatic
from onnxslim.passes.quantize_static import _speed as speed_of
from onnxslim.runtime import Session

FLOAT = TensorProto.FLOAT


class Builder:
    """Collects nodes and random weights into a small model."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.in_nodes = False

    def constant(self, name: str, value: np.ndarray) -> str:
        tensor = numpy_helper.from_array(np.asarray(value), name)
        if self.in_nodes:
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        else:
            self.initializers.append(tensor)
        return name

    def weight(self, name: str, *shape: int, gain: float = 1.0) -> str:
        fan = int(np.prod(shape[1:])) or 1
        return self.constant(name, (gain * self.random.normal(size=shape) / np.sqrt(fan)).astype(np.float32))

    def node(self, op: str, inputs: list[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], output, **attributes))
        return output

    def conv(self, source: str, output: str, cin: int, cout: int, *, kernel: int = 3, groups: int = 1) -> str:
        weight = self.weight(f"{output}_w", cout, cin // groups, kernel, kernel)
        bias = self.constant(f"{output}_b", self.random.normal(size=cout).astype(np.float32) * 0.1)
        pads = [kernel // 2] * 4
        return self.node("Conv", [source, weight, bias], output, kernel_shape=[kernel] * 2, pads=pads, group=groups)

    def model(self, inputs: dict[str, list], outputs: dict[str, list], *, opset: int = 17, kinds: dict | None = None):
        kinds = kinds or {}
        graph = helper.make_graph(
            self.nodes,
            "test",
            [helper.make_tensor_value_info(name, kinds.get(name, FLOAT), shape) for name, shape in inputs.items()],
            [helper.make_tensor_value_info(name, kinds.get(name, FLOAT), shape) for name, shape in outputs.items()],
            self.initializers,
        )
        versions = {"": opset} | {node.domain: 1 for node in self.nodes if node.domain}
        imports = [helper.make_opsetid(domain, version) for domain, version in versions.items()]
        model = helper.make_model(graph, opset_imports=imports, ir_version=8)
        onnx.checker.check_model(model)
        return model


def images(count: int = 16, channels: int = 3, size: int = 12, seed: int = 1) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    return [{"x": random.normal(size=(1, channels, size, size)).astype(np.float32)} for _ in range(count)]


def quantize(proto: onnx.ModelProto, feeds: list[dict[str, np.ndarray]], **options: object) -> tuple[Model, Outcome]:
    model = load(proto)
    data = open_dataset(feeds, Session(model).specs)
    # Small models are no faster in int8, and timing them would make tests depend on the machine.
    options = {"only_if_faster": False} | options
    outcome = QuantizeStatic(**options).run(model, Context(calibration=data))  # type: ignore[arg-type]
    result = model.to_proto()
    onnx.checker.check_model(result)
    assert len(result.SerializeToString()) <= len(proto.SerializeToString())
    return model, outcome


def decibels(before: onnx.ModelProto, after: Model, feeds: list[dict[str, np.ndarray]]) -> float:
    # As the operators are specified: the fused kernels saturate on processors without an int8 dot product.
    one, two = Session(before), Session(after, optimize=False)
    noise = signal = 0.0
    for feed in feeds:
        got = two.run(feed)
        for name, value in one.run(feed).items():
            assert got[name].shape == value.shape
            noise += float(np.square(got[name] - value).sum())
            signal += float(np.square(value).sum())
    return 10 * np.log10(signal / max(noise, 1e-30))


def fused(model: Model, tmp_path: Path) -> Counter[str]:
    """The ops that ONNX Runtime runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(model.to_proto().SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def ops(model: Model) -> Counter[str]:
    return Counter(node.op for graph in model.graphs() for node in graph.nodes)


def whys(outcome: Outcome) -> str:
    return " | ".join(f"{refusal.node}: {refusal.why}" for refusal in outcome.refusals)


def mobile_block(*, in_nodes: bool = False, opset: int = 17, batch: object = "N", size: object = 12):
    """Conv, Relu, depthwise, Clip, Conv, residual Add, pooling, Gemm."""
    b = Builder()
    b.in_nodes = in_nodes
    b.node("Relu", [b.conv("x", "c1", 3, 32)], "r1")
    b.conv("r1", "c2", 32, 32, groups=32)
    if opset >= 11:
        b.node("Clip", ["c2", b.constant("zero", np.float32(0)), b.constant("six", np.float32(6))], "r2")
    else:
        b.node("Clip", ["c2"], "r2", min=0.0, max=6.0)
    b.conv("r2", "c3", 32, 32, kernel=1)
    b.node("Add", ["r1", "c3"], "sum")
    b.node("GlobalAveragePool", ["sum"], "pool")
    b.node("Flatten", ["pool"], "flat", axis=1)
    fc = b.weight("fc_w", 64, 32)
    b.node("Gemm", ["flat", fc, b.constant("fc_b", np.ones(64, np.float32))], "y", transB=1)
    return b.model({"x": [batch, 3, size, size]}, {"y": [batch, 64]}, opset=opset)


# ------------------------------------------------------------------------------------------------------- placement


def test_mobile_block_fuses_completely_and_stays_close(tmp_path):
    proto = mobile_block()
    model, outcome = quantize(proto, images())
    assert outcome.modified
    assert decibels(proto, model, images(seed=5)) > 28
    kernels = fused(model, tmp_path)
    assert kernels["QLinearConv"] == 3
    assert kernels["QLinearAdd"] == kernels["QLinearGlobalAveragePool"] == kernels["QGemm"] == 1
    assert not {"Conv", "Relu", "Clip", "Add", "Gemm", "DequantizeLinear"} & set(kernels)
    assert outcome.numbers["nodes quantized"] == 4
    assert outcome.numbers["share of MACs quantized (estimate)"] == pytest.approx(1.0)
    assert outcome.numbers["share of weights in int8"] == 1.0


@pytest.mark.parametrize("block", ["mobile_block", "hard_swish_block"])
def test_fused_kernels_give_what_the_standard_ops_say(block):
    model, _ = quantize(globals()[block](), images())
    plain, fast = Session(model, optimize=False), Session(model)
    for feed in images(seed=5):
        one, two = plain.run(feed)["y"], fast.run(feed)["y"]
        assert np.abs(one - two).max() < 0.03 * np.abs(one).max()


def test_inputs_and_outputs_keep_names_types_and_shapes():
    proto = mobile_block()
    proto.metadata_props.add(key="classes", value="a b")
    model, _ = quantize(proto, images())
    after = model.to_proto()
    assert list(after.graph.input) == list(proto.graph.input)
    assert list(after.graph.output) == list(proto.graph.output)
    assert after.metadata_props == proto.metadata_props


def test_weights_are_int8_per_channel_and_biases_int32():
    model, _ = quantize(mobile_block(), images(), reduce_range=False)
    proto = model.to_proto()
    kinds = {t.name: t for t in proto.graph.initializer}
    weight = numpy_helper.to_array(kinds["c1_w_q"])
    assert weight.dtype == np.int8
    assert (np.abs(weight).max(axis=(1, 2, 3)) == 127).all()
    assert numpy_helper.to_array(kinds["c1_w_s"]).shape == (32,)
    assert not any(t.data_type == FLOAT and np.prod(t.dims) > 64 for t in proto.graph.initializer)


def test_matmul_before_float_ops_has_no_quantized_output(tmp_path):
    b = Builder()
    b.node("MatMul", ["x", b.weight("w", 64, 64)], "m")
    b.node("Add", ["m", b.constant("bias", np.ones(64, np.float32))], "a")
    b.node("Softmax", ["a"], "y", axis=-1)
    proto = b.model({"x": ["N", 5, 64]}, {"y": ["N", 5, 64]})
    random = np.random.default_rng(0)
    feeds = [{"x": random.normal(size=(1, 5, 64)).astype(np.float32)} for _ in range(8)]
    model, _ = quantize(proto, feeds)
    assert ops(model)["QuantizeLinear"] == 1
    assert fused(model, tmp_path)["MatMulIntegerToFloat"] == 1
    assert decibels(proto, model, feeds) > 30


def test_attention_mask_stays_float():
    b = Builder()
    b.node("MatMul", ["x", b.weight("wq", 64, 64)], "q")
    b.node("MatMul", ["x", b.weight("wk", 64, 64)], "k")
    b.node("Transpose", ["k"], "kt", perm=[0, 2, 1])
    b.node("MatMul", ["q", "kt"], "scores")
    b.node("Add", ["scores", "mask"], "masked")
    b.node("Softmax", ["masked"], "probabilities", axis=-1)
    b.node("MatMul", ["probabilities", "q"], "y")
    proto = b.model({"x": ["N", 5, 64], "mask": ["N", 1, 5]}, {"y": ["N", 5, 64]})
    random = np.random.default_rng(0)
    feeds = []
    for _ in range(8):
        mask = np.where(random.random((1, 1, 5)) < 0.3, np.finfo(np.float32).min, 0).astype(np.float32)
        feeds.append({"x": random.normal(size=(1, 5, 64)).astype(np.float32), "mask": mask})
    model, outcome = quantize(proto, feeds)
    assert outcome.numbers["nodes quantized"] == 2
    assert "both of its operands are computed" in whys(outcome)
    assert decibels(proto, model, feeds) > 25


def test_layer_that_reads_a_mask_value_is_refused():
    b = Builder()
    b.node("Where", ["c", "x", b.constant("low", np.float32(-3.4e38))], "masked")
    b.node("MatMul", ["masked", b.weight("w", 64, 64)], "m")
    b.node("MatMul", ["x", b.weight("v", 64, 64)], "y")
    proto = b.model({"x": ["N", 64], "c": ["N", 64]}, {"m": ["N", 64], "y": ["N", 64]}, kinds={"c": TensorProto.BOOL})
    random = np.random.default_rng(0)
    feeds = [{"x": random.normal(size=(1, 64)).astype(np.float32), "c": random.random((1, 64)) < 0.5} for _ in range(4)]
    _, outcome = quantize(proto, feeds, weight_only=False)
    assert outcome.numbers["nodes quantized"] == 1
    assert "m: Gemm: its input or output is not finite or reaches beyond 1e+06" in whys(outcome)


def test_concat_pool_pad_resize_transpose_run_on_codes(tmp_path):
    b = Builder()
    b.node("Relu", [b.conv("x", "c1", 3, 32)], "r1")
    b.conv("r1", "c2", 32, 32)
    b.node("Concat", ["r1", "c2"], "cat", axis=1)
    b.node("MaxPool", ["cat"], "pool", kernel_shape=[2, 2], strides=[2, 2])
    scales = b.constant("scales", np.array([1, 1, 2, 2], np.float32))
    b.node("Resize", ["pool", "", scales], "up", mode="nearest")
    b.node("Transpose", ["up"], "turned", perm=[0, 1, 3, 2])
    pads = b.constant("pads", np.array([0, 1, 1, 1, 0, 1, 1, 1], np.int64))  # of channels too: no convolution takes it
    b.node("Pad", ["turned", pads], "padded")
    b.conv("padded", "y", 66, 8)
    proto = b.model({"x": ["N", 3, 12, 12]}, {"y": ["N", 8, 14, 14]})
    model, _ = quantize(proto, images())
    assert decibels(proto, model, images(seed=5)) > 28
    kernels = fused(model, tmp_path)
    assert kernels["QuantizeLinear"] == kernels["DequantizeLinear"] == 1
    assert kernels["QLinearConcat"] == 1 and kernels["Pad"] == 1 and kernels["Resize"] == 1


@pytest.mark.parametrize("half", [False, True])
def test_what_a_relu_behind_a_concat_lets_through_is_all_that_is_written(tmp_path: Path, half: bool):
    b = Builder()
    b.conv("x", "c1", 3, 32)
    b.conv("c1", "c2", 32, 32)
    b.conv("c2", "c3", 32, 32)
    b.node("Concat", ["c2", "c3"], "cat", axis=1)
    if half:  # what is written is then in another scale than what is read
        b.node("Mul", ["cat", b.constant("half", np.array(0.5, np.float32))], "halved")
    b.node("Relu", ["halved" if half else "cat"], "r")
    b.conv("r", "y", 64, 8)
    proto = b.model({"x": ["N", 3, 12, 12]}, {"y": ["N", 8, 12, 12]})
    model, _ = quantize(proto, images())
    assert decibels(proto, model, images(seed=5)) > 28
    concat = next(node for node in model.graph.nodes if node.op == "Concat")
    read, written = (concat.inputs[1].inputs[0], concat.outputs[0].outputs[0])
    assert (read.op, written.op) == ("DequantizeLinear", "QuantizeLinear")
    assert [float(each.values) for each in read.inputs[1:]] == [float(each.values) for each in written.inputs[1:]]
    assert int(written.inputs[2].values) == 0
    kernels = fused(model, tmp_path)
    assert kernels["QuantizeLinear"] == kernels["DequantizeLinear"] == 1
    assert kernels["QLinearConcat"] == 1 and kernels["Relu"] == kernels["Mul"] == 0


def test_zero_pads_become_those_of_the_convolution():
    b = Builder()
    pads = b.constant("pads", np.array([0, 0, 0, 0, 0, 0, 1, 1], np.int64))
    b.node("Pad", ["x", pads], "padded")
    b.conv("padded", "c", 3, 64)
    b.conv("c", "y", 64, 16)
    proto = b.model({"x": ["N", 3, 12, 12]}, {"y": ["N", 16, 13, 13]})
    model, _ = quantize(proto, images())
    assert not ops(model)["Pad"]
    assert decibels(proto, model, images(seed=5)) > 28


def test_vector_added_to_the_channels_becomes_the_bias(tmp_path):
    b = Builder()
    b.node("Conv", ["x", b.weight("w", 64, 3, 3, 3)], "c", kernel_shape=[3, 3])
    b.node("Add", ["c", b.constant("v", b.random.normal(size=(1, 64, 1, 1)).astype(np.float32))], "a")
    b.conv("a", "d", 64, 16)
    b.node("Add", [b.constant("u", b.random.normal(size=(16, 1, 1)).astype(np.float32)), "d"], "y")
    proto = b.model({"x": ["N", 3, 12, 12]}, {"y": ["N", 16, 10, 10]})
    model, _ = quantize(proto, images())
    assert not ops(model)["Add"]
    assert decibels(proto, model, images(seed=5)) > 28
    assert fused(model, tmp_path)["QLinearConv"] == 2


def hard_swish_block() -> onnx.ModelProto:
    b = Builder()
    b.conv("x", "c1", 3, 64)
    b.node("Add", ["c1", b.constant("three", np.float32(3))], "a")
    b.node("Clip", ["a", b.constant("zero", np.float32(0)), b.constant("six", np.float32(6))], "gate")
    b.node("Mul", ["c1", "gate"], "m")
    b.node("Div", ["m", "six"], "swish")
    b.node("Mul", ["swish", b.constant("gain", np.float32(1.7))], "g")
    b.node("Add", ["g", b.constant("shift", np.float32(0.4))], "affine")
    b.conv("affine", "y", 64, 16, kernel=1)
    return b.model({"x": ["N", 3, 12, 12]}, {"y": ["N", 16, 12, 12]})


def test_hard_swish_chain_runs_on_codes(tmp_path):
    proto = hard_swish_block()
    model, _ = quantize(proto, images())
    assert decibels(proto, model, images(seed=5)) > 25
    kernels = fused(model, tmp_path)
    assert kernels["QLinearConv"] == 2 and kernels["QLinearMul"] == 1 and kernels["Clip"] <= 1
    assert kernels["QuantizeLinear"] == 1 and not {"Add", "Mul", "Div"} & set(kernels)


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnxruntime-arm"])
@pytest.mark.parametrize("gain", [1.0, 6.0])
def test_hard_swish_clips_the_codes_that_the_convolution_writes(tmp_path: Path, runtime: str, gain: float):
    b = Builder()
    b.node("Conv", ["x", b.weight("c1_w", 32, 3, 3, 3, gain=gain)], "c1", pads=[1] * 4)
    b.node("HardSwish", ["c1"], "s1")
    b.conv("s1", "y", 32, 16)
    proto = b.model({"x": ["N", 3, 12, 12]}, {"y": ["N", 16, 12, 12]})
    model, _ = quantize(proto, images(32), runtime=runtime, calibration="minmax", equalize=False)
    found = ops(model)
    assert found["HardSwish"] == found["HardSigmoid"] == 0 and found["QuantizeLinear"] == 4  # x, c1, s1 and y
    assert found["Clip"] == 1  # nothing but what lies above 3 has to be clipped: all below -3 has the lowest code
    clip = next(node for node in model.graph.nodes if node.op == "Clip")
    low, high = (int(tensor.values) for tensor in clip.inputs[1:])
    scale, zero = (float(tensor.values) for tensor in clip.inputs[0].inputs[0].inputs[1:])
    assert scale * (low - zero) == pytest.approx(-3, abs=1e-4) and scale * (high - zero) == pytest.approx(3, abs=1e-4)
    assert low == (-128 if runtime == "onnxruntime-arm" else 0)
    assert decibels(proto, model, images(seed=5)) > 30
    if runtime == "onnxruntime":
        kernels = fused(model, tmp_path)
        assert kernels["QuantizeLinear"] == 1 and kernels["QLinearMul"] == 1 and kernels["QLinearConv"] == 2


def test_gate_of_small_numbers_has_a_code_of_its_own():
    b = Builder()
    b.node("Conv", ["x", b.weight("c1_w", 32, 3, 3, 3, gain=0.1)], "c1", pads=[1] * 4)
    b.node("HardSwish", ["c1"], "s1")
    b.conv("s1", "y", 32, 16)
    proto = b.model({"x": ["N", 3, 12, 12]}, {"y": ["N", 16, 12, 12]})
    model, _ = quantize(proto, images(32))
    assert ops(model)["Clip"] == 0 and ops(model)["QuantizeLinear"] == 5
    assert decibels(proto, model, images(seed=5)) > 33


def test_hard_swish_that_is_excluded_stays_one_node():
    b = Builder()
    b.node("HardSwish", [b.conv("x", "c1", 3, 32)], "s1")
    b.conv("s1", "y", 32, 16)
    proto = b.model({"x": ["N", 3, 12, 12]}, {"y": ["N", 16, 12, 12]})
    for exclude in (("HardSwish",), ("s1",)):
        model, _ = quantize(proto, images(), exclude=exclude)
        assert ops(model)["HardSwish"] == 1 and ops(model)["Mul"] == 0


def test_relu_of_a_sum_that_is_read_elsewhere_clips_its_codes(tmp_path: Path):
    """As before the activation in a ResNetV2: rounding the sum again, with another scale, would only add noise."""
    b = Builder()
    b.conv("x", "c1", 3, 32)
    b.conv("x", "c2", 3, 32)
    b.node("Add", ["c1", "c2"], "sum")
    b.node("Relu", ["sum"], "r")
    b.conv("r", "c3", 32, 32)
    b.node("Add", ["sum", "c3"], "last")
    b.conv("last", "y", 32, 16)
    outputs = {name: ["N", channels, 12, 12] for name, channels in (("y", 16), ("sum", 32), ("r", 32))}
    proto = b.model({"x": ["N", 3, 12, 12]}, outputs)
    model, _ = quantize(proto, images())
    for feed in images(seed=5):
        got = Session(model, optimize=False).run(feed)
        assert np.array_equal(got["r"], np.maximum(got["sum"], 0)) and got["r"].max() > 0
    assert fused(model, tmp_path)["QuantizeLinear"] == 1
    assert decibels(proto, model, images(seed=5)) > 30


def test_gate_of_what_is_seen_from_outside_keeps_all_of_it():
    b = Builder()
    b.node("Conv", ["x", b.weight("c1_w", 32, 3, 3, 3, gain=6.0)], "c1", pads=[1] * 4)
    b.node("HardSigmoid", ["c1"], "gate", alpha=1 / 6, beta=0.5)
    b.node("Mul", ["c1", "gate"], "swish")
    b.conv("swish", "y", 32, 16)
    proto = b.model({"x": ["N", 3, 12, 12]}, {"y": ["N", 16, 12, 12], "c1": ["N", 32, 12, 12]})
    model, _ = quantize(proto, images())
    feed = images(seed=5)[0]
    true, got = (session.run(feed)["c1"] for session in (Session(proto), Session(model, optimize=False)))
    assert true.min() < -6 and np.abs(got - true).max() < 0.1 * np.abs(true).max()


def test_squeeze_and_excite_gate_is_quantized_for_its_product(tmp_path):
    b = Builder()
    b.conv("x", "c1", 3, 64)
    b.node("GlobalAveragePool", ["c1"], "s")
    b.conv("s", "e1", 64, 16, kernel=1)
    b.node("Relu", ["e1"], "e2")
    b.conv("e2", "e3", 16, 64, kernel=1)
    b.node("HardSigmoid", ["e3"], "gate", alpha=0.2, beta=0.5)
    b.node("Mul", ["c1", "gate"], "scaled")
    b.conv("scaled", "y", 64, 16, kernel=1)
    proto = b.model({"x": ["N", 3, 12, 12]}, {"y": ["N", 16, 12, 12]})
    model, _ = quantize(proto, images())
    assert decibels(proto, model, images(seed=5)) > 25
    kernels = fused(model, tmp_path)
    assert kernels["QLinearMul"] == 1
    assert not {"HardSigmoid", "Mul", "Relu"} & set(kernels)


def test_island_between_float_ops_stays_float():
    b = Builder()
    b.conv("x", "c1", 3, 64)
    b.node("Relu", ["c1"], "r")
    b.node("Add", ["r", "r"], "twice")
    b.node("Softmax", ["twice"], "y", axis=1)
    proto = b.model({"x": ["N", 3, 12, 12]}, {"y": ["N", 64, 12, 12]})
    model, _ = quantize(proto, images())
    assert ops(model)["Add"] == 1
    assert ops(model)["QuantizeLinear"] == 2  # of the input, and of the Relu that the convolution writes


def test_output_in_the_middle_keeps_its_name_and_value():
    b = Builder()
    b.node("Relu", [b.conv("x", "c1", 3, 64)], "inner")
    b.conv("inner", "y", 64, 16)
    proto = b.model(
        {"x": ["N", 3, 12, 12]}, {"inner": ["N", 64, 12, 12], "c1": ["N", 64, 12, 12], "y": ["N", 16, 12, 12]}
    )
    model, _ = quantize(proto, images())
    assert decibels(proto, model, images(seed=5)) > 28


# --------------------------------------------------------------------------------------------------------- weights


def test_weights_in_constant_nodes_are_quantized():
    proto = mobile_block(in_nodes=True)
    model, outcome = quantize(proto, images())
    assert outcome.numbers["nodes quantized"] == 4
    assert len(model.to_proto().SerializeToString()) < 0.6 * len(proto.SerializeToString())
    assert decibels(proto, model, images(seed=5)) > 28


def test_shared_weight_is_stored_once():
    b = Builder()
    weight = b.weight("w", 32, 32, 3, 3)
    b.conv("x", "c0", 3, 32)
    for index in range(2):
        b.node("Conv", [f"c{index}", weight], f"c{index + 1}", kernel_shape=[3, 3], pads=[1] * 4)
    proto = b.model({"x": ["N", 3, 12, 12]}, {"c2": ["N", 32, 12, 12]})
    model, _ = quantize(proto, images(), bias_correction=False)
    stored = [t for t in model.to_proto().graph.initializer if np.prod(t.dims) == 32 * 32 * 9]
    assert len(stored) == 1 and stored[0].data_type == TensorProto.INT8
    assert decibels(proto, model, images(seed=5)) > 28


def test_transposed_convolution_and_recurrent_weights_are_stored_in_int8(tmp_path):
    b = Builder()
    b.node("ConvTranspose", ["x", b.weight("up_w", 3, 64, 4, 4)], "y", kernel_shape=[4, 4], strides=[2, 2])
    b.node("LSTM", ["s", b.weight("w", 1, 128, 16), b.weight("r", 1, 128, 32)], "h", hidden_size=32)
    proto = b.model({"x": ["N", 3, 12, 12], "s": [7, 1, 16]}, {"y": ["N", 64, 26, 26], "h": [7, 1, 1, 32]})
    random = np.random.default_rng(0)
    feeds = [{**feed, "s": random.normal(size=(7, 1, 16)).astype(np.float32)} for feed in images(4)]
    model, outcome = quantize(proto, feeds)
    assert outcome.numbers["weights stored in int8 only"] == 3 * 64 * 16 + 128 * 16 + 128 * 32
    assert decibels(proto, model, feeds) > 35
    kernels = fused(model, tmp_path)
    assert not {"Cast", "Mul", "DequantizeLinear"} & set(kernels)  # folded when the model is loaded: as fast as float


@pytest.mark.parametrize(
    ("channels", "factor", "shared", "halved"),
    [
        (96, 0.1, False, True),
        (24, 0.1, False, False),
        (96, 1e-7, False, False),
        (96, 1e5, False, False),
        (96, 0.1, True, False),
    ],
)
def test_many_biases_of_float_layers_are_stored_in_float16(tmp_path: Path, channels, factor, shared, halved):
    b = Builder()
    bias = b.constant("b", b.random.normal(size=channels).astype(np.float32) * np.float32(factor))
    b.node("ConvTranspose", ["x", b.weight("w", 8, channels, 3, 3), bias], "y", kernel_shape=[3, 3])
    if shared:
        b.node("Add", ["y", b.node("Reshape", [bias, b.constant("s", np.array([1, -1, 1, 1]))], "turned")], "z")
    proto = b.model({"x": ["N", 8, 12, 12]}, {"z" if shared else "y": ["N", channels, 14, 14]})
    feeds = images(8, channels=8)
    model, outcome = quantize(proto, feeds)
    assert outcome.numbers["weights stored in int8 only"] == channels * 8 * 9
    stored = [tensor for node in model.graph.nodes for tensor in node.inputs if tensor.dtype == np.float16]
    assert sum(tensor.shape == (channels,) for tensor in stored) == halved
    assert decibels(proto, model, feeds) > 35
    kernels = fused(model, tmp_path)
    assert not {"Cast", "Mul", "DequantizeLinear"} & set(kernels)


@pytest.mark.parametrize("outliers", ["rows", "columns"])
@pytest.mark.parametrize("rows", [500, 5000])
def test_embeddings_are_stored_in_int8_and_large_ones_are_looked_up_in_it(tmp_path: Path, rows, outliers):
    b = Builder()
    table = b.random.normal(size=(rows, 64)).astype(np.float32)
    scale = np.exp(b.random.normal(size=(rows, 1) if outliers == "rows" else (1, 64))).astype(np.float32)
    b.node("Gather", [b.constant("table", table * scale), "ids"], "rows")
    b.node("ReduceMean", ["rows"], "y", axes=[1], keepdims=0)
    proto = b.model({"ids": ["N", "T"]}, {"y": ["N", 64]}, kinds={"ids": TensorProto.INT64})
    feeds = [{"ids": b.random.integers(0, rows, (1, length))} for length in (3, 5, 9)]
    model, outcome = quantize(proto, feeds)
    assert decibels(proto, model, feeds) > 38
    assert len(model.to_proto().SerializeToString()) < 0.3 * len(proto.SerializeToString())
    kernels = fused(model, tmp_path)
    if rows == 5000:
        assert f"one scale a {outliers[:-1]}" in outcome.changes[0].what
        assert kernels["Cast"] == kernels["Mul"] == 1
    else:
        assert kernels == {"Gather": 1, "ReduceMean": 1}


def test_all_but_dead_channel_with_a_large_bias_does_not_overflow():
    b = Builder()
    weight = b.random.normal(size=(64, 3, 3, 3)).astype(np.float32)
    weight[5] = 1e-30
    bias = np.full(64, 2.0, np.float32)
    b.node("Conv", ["x", b.constant("w", weight), b.constant("b", bias)], "c", kernel_shape=[3, 3])
    b.conv("c", "y", 64, 16)
    proto = b.model({"x": ["N", 3, 12, 12]}, {"y": ["N", 16, 10, 10]})
    model, _ = quantize(proto, images())
    assert decibels(proto, model, images(seed=5)) > 28


@pytest.mark.parametrize(
    ("product", "before"),
    [
        ("Gemm", ["N"]),
        ("MatMul", ["N"]),
        ("MatMul and Add", ["N"]),
        ("MatMul", [4, 3]),
        ("MatMul and Add", [4, 3]),
        ("MatMul and Add", ["N", 3]),
    ],
)
@pytest.mark.parametrize("low", [0.0, 0.5])
@pytest.mark.parametrize("outputs", ["y", "h", "m y"])
@pytest.mark.parametrize("activation", ["Relu", "Clip", "Tanh", "LeakyRelu"])
def test_products_in_front_of_float_nodes_run_in_int8_or_in_float(tmp_path, activation, outputs, low, product, before):
    """What is not fused would dequantize its weight at each inference."""
    b = Builder()
    weight = b.weight("w", 64, 96)
    if product == "Gemm":
        b.node("Gemm", ["x", weight, b.weight("c", 96)], "m")
    elif product == "MatMul":
        b.node("MatMul", ["x", weight], "m")
    else:
        b.node("Add", [b.node("MatMul", ["x", weight], "p"), b.weight("c", 96)], "m")
    bounds = [b.constant("low", np.float32(low)), b.constant("high", np.float32(6))] if activation == "Clip" else []
    b.node(activation, ["m", *bounds], "h")
    if outputs != "h":
        b.node("Softmax", ["h"], "y")
    proto = b.model({"x": [*before, 64]}, {name: [*before, 96] for name in outputs.split()})
    random = np.random.default_rng(0)
    size = (*[4 if axis == "N" else axis for axis in before], 64)
    feeds = [{"x": random.normal(size=size).astype(np.float32)} for _ in range(8)]
    model, outcome = quantize(proto, feeds)
    kernels = fused(model, tmp_path)
    if outcome.numbers.get("nodes quantized"):
        assert any(kernels[kind] for kind in ("QGemm", "MatMulIntegerToFloat", "QLinearMatMul"))
    else:
        assert activation in ("Relu", "Clip") and (outputs == "m y" or low > 0)
        assert "DequantizeLinear" not in kernels
        assert "what clips its result keeps kernels from being fused" in whys(outcome)
    assert not kernels["FusedGemm"]
    assert decibels(proto, model, feeds) > 30


@pytest.mark.parametrize("bias", [(96,), (1, 96), (1, 1, 96), (1,), (3, 1), (3, 96)])
@pytest.mark.parametrize("exclude", [(), ("p",)])
def test_what_is_added_to_a_product_of_known_sizes_keeps_it_no_float_kernel(tmp_path, exclude, bias):
    """As vision transformers of one size are exported; a residual is added behind."""
    b = Builder()
    b.node("Add", [b.constant("c", np.random.default_rng(1).normal(size=bias).astype(np.float32)), "p"], "sum")
    b.nodes.insert(0, helper.make_node("MatMul", ["x", b.weight("w", 64, 96)], ["p"], "p"))
    b.nodes[1].name = "sum"
    b.node("Add", ["sum", "z"], "y")
    proto = b.model({"x": [2, 3, 64], "z": [2, 3, 96]}, {"y": [2, 3, 96]})
    random = np.random.default_rng(0)
    feeds = [
        {name: random.normal(size=(2, 3, size)).astype(np.float32) for name, size in (("x", 64), ("z", 96))}
        for _ in range(8)
    ]
    model, outcome = quantize(proto, feeds, exclude=exclude)
    kernels = fused(model, tmp_path)
    assert ops(model)["MatMul"] == (not kernels["QGemm"])
    if not exclude:
        assert kernels["QGemm"] + kernels["MatMulIntegerToFloat"] == outcome.numbers["nodes quantized"] == 1
        assert not kernels["DequantizeLinear"]
    assert decibels(proto, model, feeds) > 30


def test_copies_between_layers_keep_no_kernel_from_being_fused(tmp_path):
    b = Builder()
    b.node("Relu", [b.node("Gemm", ["x", b.weight("w1", 64, 96), b.weight("c1", 96)], "m1")], "h")
    b.node("Relu", [b.node("Dropout", [b.node("Identity", ["m1"], "i1")], "d1")], "r1")
    b.node("Gemm", ["r1", b.weight("w2", 96, 64), b.weight("c2", 64)], "y")
    proto = b.model({"x": ["N", 64]}, {"y": ["N", 64], "h": ["N", 96]})
    random = np.random.default_rng(0)
    feeds = [{"x": random.normal(size=(4, 64)).astype(np.float32)} for _ in range(8)]
    model, _ = quantize(proto, feeds)
    kernels = fused(model, tmp_path)
    assert kernels["QGemm"] == 2 and not kernels["Gemm"] and not kernels["FusedGemm"]
    assert decibels(proto, model, feeds) > 30


@pytest.mark.parametrize(("exclude", "quantized"), [((), 2), (("second",), 1), (("MatMul",), 0)])
def test_products_that_are_added_up_run_in_int8(tmp_path, exclude, quantized):
    """A recurrent cell as Keras and JAX unroll it. What is excluded keeps its name and operator."""
    b = Builder()
    b.node("MatMul", ["x", b.weight("w", 64, 96)], "first")
    b.node("MatMul", ["h", b.weight("u", 96, 96)], "second")
    b.node("Add", [b.node("Add", ["first", "second"], "sum"), b.weight("c", 96)], "biased")
    b.node("Tanh", ["biased"], "y")
    proto = b.model({"x": ["N", 64], "h": ["N", 96]}, {"y": ["N", 96]})
    random = np.random.default_rng(0)
    feeds = [
        {name: random.normal(size=(4, size)).astype(np.float32) for name, size in (("x", 64), ("h", 96))}
        for _ in range(8)
    ]
    model, outcome = quantize(proto, feeds, exclude=exclude, weight_only=False)
    assert outcome.numbers.get("nodes quantized", 0) == quantized
    kernels = fused(model, tmp_path)
    assert kernels["QGemm"] == quantized and not kernels["DequantizeLinear"]
    assert ops(model)["MatMul"] == 2 - quantized
    assert decibels(proto, model, feeds) > 30


def test_gemm_factors_are_multiplied_into_weight_and_bias(tmp_path):
    b = Builder()
    inputs = ["x", b.weight("w", 64, 48), b.constant("c", np.float32(0.7))]
    b.node("Gemm", inputs, "y", alpha=0.5, beta=2.0)
    proto = b.model({"x": ["N", 64]}, {"y": ["N", 48]})
    random = np.random.default_rng(0)
    feeds = [{"x": random.normal(size=(1, 64)).astype(np.float32)} for _ in range(8)]
    model, _ = quantize(proto, feeds)
    assert decibels(proto, model, feeds) > 32
    assert fused(model, tmp_path)["QGemm"] == 1


def test_per_tensor_weights_have_one_scale():
    model, _ = quantize(mobile_block(), images(), per_channel=False)
    kinds = {t.name: numpy_helper.to_array(t) for t in model.to_proto().graph.initializer}
    assert kinds["c1_w_s"].shape == ()


@pytest.mark.parametrize("options", [{}, {"reduce_range": True}])
def test_fused_kernels_do_not_saturate(options):
    # Weights of one sign and inputs near the top of their range: the largest sums that there can be.
    b = Builder()
    b.node("Relu", [b.node("Conv", ["x", b.constant("w1", np.ones((32, 32, 1, 1), np.float32))], "c1")], "r1")
    b.node("Conv", ["r1", b.constant("w2", np.ones((32, 1, 3, 3), np.float32))], "c2", group=32)
    b.node("Conv", ["c2", b.constant("w3", -np.ones((16, 32, 1, 1), np.float32))], "c3")
    proto = b.model({"x": [1, 32, 8, 8]}, {"c3": [1, 16, 6, 6]})
    random = np.random.default_rng(0)
    feeds = [{"x": random.uniform(0.9, 1, (1, 32, 8, 8)).astype(np.float32)} for _ in range(4)]
    model, _ = quantize(proto, feeds, **options)
    fused, exact = Session(model).run(feeds[0])["c3"], Session(model, optimize=False).run(feeds[0])["c3"]
    np.testing.assert_allclose(fused, exact, rtol=0.01)


BOUNDS = {"Relu": (), "Clip": (("low", 0.0), ("high", 6.0))}


@pytest.mark.parametrize("behind", ["", "Relu", "Clip"])
@pytest.mark.parametrize("weight_only", [False, True])
def test_an_excluded_convolution_between_codes_is_computed_in_float(tmp_path: Path, behind: str, weight_only: bool):
    b = Builder()
    b.node("Relu", [b.conv("x", "c", 8, 16)], "r")
    kept = b.conv("r", "kept", 16, 16)
    if behind:
        kept = b.node(behind, [kept, *(b.constant(e, np.float32(v)) for e, v in BOUNDS[behind])], "k")
    b.conv(kept, "c2", 16, 16)
    b.node("Add", ["c2", "r"], "sum")
    b.conv("sum", "y", 16, 8)
    proto = b.model({"x": ["n", 8, 12, 12]}, {"y": ["n", 8, 12, 12]})
    model, outcome = quantize(proto, images(channels=8), exclude=("kept",), weight_only=weight_only)
    assert "kept" in {refusal.node for refusal in outcome.refusals}
    found = fused(model, tmp_path)
    assert found["QLinearConv"] == 3 and found["Conv"] + found["FusedConv"] == 1
    feed = images(channels=8, seed=5)[0]
    got, exact = Session(model).run(feed)["y"], Session(model, optimize=False).run(feed)["y"]
    np.testing.assert_allclose(got, exact, atol=0.05 * float(np.abs(exact).max()))


def test_transposed_convolutions_and_excluded_gemms_between_codes_are_computed_in_float(tmp_path: Path):
    b = Builder()
    b.conv("x", "c", 8, 16)
    b.node("ConvTranspose", ["c", b.weight("up_w", 16, 16, 2, 2)], "up", strides=[2, 2])
    b.conv("up", "c2", 16, 16)
    b.node("GlobalAveragePool", ["c2"], "pool")
    b.node("Flatten", ["pool"], "flat")
    b.node("Gemm", ["flat", b.weight("w1", 64, 16), b.weight("b1", 64)], "kept", transB=1)
    b.node("Gemm", ["kept", b.weight("w2", 32, 64)], "y", transB=1)
    proto = b.model({"x": ["n", 8, 12, 12]}, {"y": ["n", 32]})
    model, _ = quantize(proto, images(channels=8), exclude=("kept",))
    found = fused(model, tmp_path)
    # A weight that was made int8 would be dequantized whenever the model runs.
    assert found["ConvTranspose"] == 1 and found["Gemm"] == 1 and found["QGemm"] == 1
    assert found["DequantizeLinear"] == 2
    assert decibels(proto, model, images(channels=8, seed=7)) > 25


def test_weights_of_a_model_that_stays_float_are_rounded_for_what_layers_give(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("onnxslim.passes.quantize_static._speed", lambda *_: 0.5)
    b = Builder()
    b.node("Relu", [b.conv("x", "c1", 8, 32)], "r1")
    b.node("Relu", [b.conv("r1", "c2", 32, 32)], "r2")
    b.conv("r2", "y", 32, 16)
    proto = b.model({"x": ["n", 8, 12, 12]}, {"y": ["n", 16, 12, 12]})
    found = {}
    # Channels that go together, as those of natural images and of wide layers do.
    alike, others = (
        [{"x": feed["x"][:, :1] + 0.1 * feed["x"]} for feed in images(channels=8, seed=seed)] for seed in (0, 7)
    )
    for rounds in (False, True):
        model, outcome = quantize(proto, alike, only_if_faster=True, reconstruct=rounds)
        assert "int8 ran at 0.50 times" in whys(outcome) and outcome.numbers["share of weights in int8"] > 0.99
        assert not {"QuantizeLinear", "DequantizeLinear"} & ops(model).keys()
        found[rounds] = decibels(proto, model, others)
    assert found[True] > found[False] + 3


@pytest.mark.parametrize("flat", [False, True])
def test_pooling_behind_a_float_stem_is_done_in_float(tmp_path: Path, flat: bool):
    b = Builder()
    b.node("Relu", [b.conv("x", "stem", 3, 16)], "r")
    last = b.node("MaxPool", ["r"], "pool", kernel_shape=[3, 3], strides=[2, 2])
    if flat:
        last = b.node("Reshape", [last, b.constant("rows", np.array([-1, 16 * 12 * 12]))], "row")
        b.node("Gemm", [last, b.weight("fc", 10, 16 * 12 * 12)], "y", transB=1)
    else:
        b.conv(last, "y", 16, 32)
    proto = b.model({"x": ["n", 3, 25, 25]}, {"y": ["n", 10] if flat else ["n", 32, 12, 12]})
    model, _ = quantize(proto, images(size=25), exclude=("stem",))
    found = fused(model, tmp_path)
    assert found["QLinearConv"] + found["QGemm"] == 1
    graph = onnx.load(tmp_path / "optimised.onnx").graph
    pool = next(node for node in graph.node if node.op_type == "MaxPool")
    producer = next(node for node in graph.node if pool.input[0] in node.output)
    assert producer.op_type != "QuantizeLinear"
    assert decibels(proto, model, images(size=25, seed=7)) > 25


@pytest.mark.parametrize(("axes", "keepdims", "opset"), [([2, 3], 0, 17), ([-1, 2], 1, 13), ([2, 3], 0, 18)])
def test_a_mean_over_the_map_is_pooled_on_codes(tmp_path: Path, axes: list[int], keepdims: int, opset: int):
    b = Builder()
    b.node("Relu", [b.conv("x", "c", 8, 32)], "r")
    inputs, attributes = ["r"], {"keepdims": keepdims, "axes": axes}
    if opset >= 18:
        inputs.append(b.constant("axes", np.array(attributes.pop("axes"))))
    b.node("ReduceMean", inputs, "mean", **attributes)
    b.node("Flatten", ["mean"], "flat")
    b.node("Gemm", ["flat", b.weight("fc", 64, 32)], "y", transB=1)
    proto = b.model({"x": ["n", 8, "h", "w"]}, {"y": ["n", 64]}, opset=opset)
    model, _ = quantize(proto, images(channels=8))
    assert fused(model, tmp_path)["QLinearGlobalAveragePool"] == 1
    assert decibels(proto, model, images(channels=8, seed=7)) > 30


def test_depthwise_weights_use_all_bits_in_a_reduced_range():
    model, _ = quantize(mobile_block(), images(), reduce_range=True)
    codes = {t.name: numpy_helper.to_array(t).astype(int) for t in model.to_proto().graph.initializer}
    assert (np.abs(codes["c2_w_q"]).max(axis=(1, 2, 3)) == 127).all()
    assert np.abs(codes["c1_w_q"]).max() < 127


def test_batch_normalization_behind_an_activation_runs_on_codes(tmp_path):
    b = Builder()
    b.node("Relu", [b.conv("x", "c1", 3, 32)], "r1")
    numbers = [b.random.normal(size=32).astype(np.float32) for _ in range(3)]
    numbers.append(b.random.uniform(0.5, 2, size=32).astype(np.float32))
    names = [b.constant(f"bn{index}", value) for index, value in enumerate(numbers)]
    b.node("BatchNormalization", ["r1", *names], "n1")
    b.node("MaxPool", ["n1"], "p1", kernel_shape=[2, 2], strides=[2, 2])
    b.conv("p1", "y", 32, 32)
    proto = b.model({"x": ["N", 3, 24, 24]}, {"y": ["N", 32, 12, 12]})
    model, outcome = quantize(proto, images(size=24))
    assert decibels(proto, model, images(seed=5, size=24)) > 28
    assert outcome.numbers["nodes quantized"] == 3
    kernels = fused(model, tmp_path)
    assert kernels["QLinearConv"] == 3
    assert not {"BatchNormalization", "Conv", "Relu"} & set(kernels)


# -------------------------------------------------------------------------------------------------------- runtimes


def zero_points(model: Model) -> list[np.ndarray]:
    return [node.inputs[2].values for node in model.graph.nodes if node.op == "QuantizeLinear"]


def test_signed_activations_are_written_alike_and_mean_the_same():
    proto = mobile_block()
    plain = {"calibration": "minmax", "bias_correction": False, "reduce_range": False}
    unsigned, _ = quantize(proto, images(), **plain)
    signed, _ = quantize(proto, images(), runtime="onnxruntime-arm", **plain)
    assert all(zero.dtype == np.int8 for zero in zero_points(signed))
    feed = images(seed=5)[0]
    one, two = (Session(model, optimize=False).run(feed)["y"] for model in (unsigned, signed))
    np.testing.assert_allclose(one, two, atol=1e-5)
    assert ops(signed) == ops(unsigned)


@pytest.mark.parametrize("runtime", ["openvino", "tensorrt"])
def test_runtimes_that_place_codes_themselves_get_inputs_and_weights_only(runtime):
    proto = mobile_block()
    model, outcome = quantize(proto, images(), runtime=runtime)
    assert decibels(proto, model, images(seed=5)) > 25
    assert outcome.numbers["nodes quantized"] == 4
    before, after = ops(load(proto)), ops(model)
    # x, r1, r2 and flat; weights are stored in int8 and only dequantized.
    assert after - before == Counter(QuantizeLinear=4, DequantizeLinear=8)
    assert not before - after
    for node in model.graph.nodes:
        if node.op in ("Conv", "Gemm"):
            data, weight, bias = node.inputs
            assert data.inputs[0].op == weight.inputs[0].op == "DequantizeLinear"
            assert bias.values.dtype == np.float32
    kind = np.uint8 if runtime == "openvino" else np.int8
    assert {zero.dtype for zero in zero_points(model)} == {np.dtype(kind)}
    assert all(zero == 0 for zero in zero_points(model)) == (runtime == "tensorrt")


# ----------------------------------------------------------------------------------------------------- calibration


def test_ragged_feeds_and_dynamic_sizes():
    proto = mobile_block(size="S")
    feeds = [image for size in (8, 12, 20) for image in images(3, size=size)]
    model, outcome = quantize(proto, feeds)
    assert outcome.numbers["calibration samples"] == 9
    batch = [{"x": np.concatenate([feed["x"] for feed in images(4, size=16)])}]
    assert decibels(proto, model, batch) > 25


def test_batches_are_bounded_by_all_activations_of_the_model(monkeypatch):
    b = Builder()
    source = b.conv("x", "c0", 1, 64, kernel=1)
    for index in range(1, 6):
        source = b.conv(source, f"c{index}", 64, 64, groups=64)
    b.node("GlobalAveragePool", [source], "y")
    proto = b.model({"x": ["N", 1, 96, 96]}, {"y": ["N", 64, 1, 1]})  # 14 MB of activations a sample
    sizes = []
    plain = Session.run
    monkeypatch.setattr(
        Session, "run", lambda self, feed: sizes.append(max(map(len, feed.values()))) or plain(self, feed)
    )
    quantize(proto, images(12, channels=1, size=96))
    assert max(sizes) == 4


@pytest.mark.parametrize("method", ["mse", "minmax", "percentile", "entropy"])
def test_every_method_of_calibration_gives_a_model_that_holds(method: str):
    proto = mobile_block()
    model, _ = quantize(proto, images(), calibration=method)
    assert decibels(proto, model, images(seed=7)) > 25


def test_code_of_range_holds_zero_and_both_ends():
    code = code_of_range(-1.3, 4.2).read
    codes = np.array([0, 255])
    assert code.scale * (codes - code.zero) == pytest.approx([-1.3, 4.2], abs=code.scale)
    assert code_of_range(0.0, 0.0).read.scale == 1.0


def test_weight_codes_are_within_half_a_quantum():
    weight = np.random.default_rng(0).normal(size=(8, 4, 3, 3)).astype(np.float32)
    coded = quantize_weight(weight, 0)
    codes, scale = coded.codes, coded.scale
    assert np.abs(codes * scale.reshape(-1, 1, 1, 1) - weight).max() <= 0.5001 * scale.max()


def test_rows_of_two_codes_of_one_sign_do_not_exceed_16_bits():
    weight = np.array([[-3.0, -3.0], [3.0, 3.0], [3.0, -3.0], [-3.0, 0.0], [0.0, 0.0]], np.float32)
    codes = quantize_weight(weight, 0, pairs=True).codes
    assert codes.tolist() == [[-64, -64], [64, 64], [127, -127], [-127, 0], [0, 0]]


@pytest.mark.parametrize("axis", [0, None])
def test_no_two_codes_of_one_sign_exceed_16_bits(axis):
    weight = np.random.default_rng(0).normal(size=(32, 4, 3, 3)).astype(np.float32)
    coded = quantize_weight(weight, axis, pairs=True)
    codes, scale = coded.codes, coded.scale
    rows = np.sort(codes.astype(int).reshape(32, -1))
    assert rows[:, -2:].sum(axis=1).max() <= 128 and rows[:, :2].sum(axis=1).min() >= -128
    assert np.abs(codes * scale.reshape(-1, 1, 1, 1) - weight).max() <= 0.5001 * scale.max()
    assert (scale < np.abs(weight).max(axis=None if axis is None else (1, 2, 3)) / 63).all()


@pytest.mark.parametrize("outlier", [1.0, 1e4])
def test_weights_that_int8_cannot_hold_stay_float_where_all_is_computed_in_float(
    monkeypatch: pytest.MonkeyPatch, outlier: float
):
    monkeypatch.setattr("onnxslim.passes.quantize_static._speed", lambda *_: 0.5)
    b = Builder()
    weight = b.random.normal(size=(32, 32, 3, 3)).astype(np.float32) / 17
    weight[:, 0] *= outlier  # of a channel that is hardly there: the others have to do with what is left of the scale
    b.node("Relu", [b.conv("x", "c1", 8, 32)], "r1")
    faint = np.where(np.arange(32) < 1, 1e-4, 1.0).astype(np.float32).reshape(32, 1, 1)
    b.node("Mul", ["r1", b.constant("faint", faint)], "g")
    b.node("Conv", ["g", b.constant("w", weight)], "c2", pads=[1] * 4)
    b.conv("c2", "y", 32, 16)
    proto = b.model({"x": ["n", 8, 12, 12]}, {"y": ["n", 16, 12, 12]})
    model, outcome = quantize(proto, images(channels=8), only_if_faster=True, equalize=False, keep_float=1)
    assert outcome.plan is not None
    (kept,) = outcome.plan["graphs"][0]["kept"]
    node = next(node for node in model.graph.nodes if node.outputs[0].name == kept)
    assert isinstance(node.inputs[1], gs.Constant) == (outlier > 1)
    assert outcome.numbers["share of weights in int8"] > (0.3 if outlier > 1 else 0.99)
    assert decibels(proto, model, images(channels=8, seed=7)) > 35


def test_bias_correction_restores_means_and_lowers_the_error():
    b = Builder(3)
    source = "x"
    for index in range(5):
        cin = 3 if index == 0 else 32
        source = b.node("Relu", [b.conv(source, f"c{index}", cin, 32)], f"r{index}")
    proto = b.model({"x": ["N", 3, 12, 12]}, {"r4": ["N", 32, 12, 12]})
    options = {"calibration": "percentile", "percentile": 97.0}  # clips, so that means shift
    feeds, test = images(32), images(seed=9)
    plain, _ = quantize(proto, feeds, bias_correction=False, **options)
    corrected, outcome = quantize(proto, feeds, **options)
    assert "bias correction" not in {refusal.rule for refusal in outcome.refusals}
    assert decibels(proto, corrected, test) > decibels(proto, plain, test) + 0.5


def test_two_runs_give_the_same_model():
    one, two = (quantize(mobile_block(), images())[0].to_proto().SerializeToString() for _ in range(2))
    assert one == two


def test_sensitive_layers_can_be_kept_in_float():
    def left(*layers: int) -> Outcome:
        outcome = Outcome()
        outcome.plan = {"graphs": [{"kept": [f"c{index}" for index in range(count)]} for count in layers]}
        return outcome

    for keep_float, outcome, more in (
        ("auto", Outcome(), 2), ("auto", left(0), 2), ("auto", left(1, 4), 8), ("auto", left(8), 32),
        (2, left(2), 8), (2, left(1), 8), (3, left(3), 8), (8, left(8), 32),
    ):  # fmt: skip
        assert QuantizeStatic(keep_float=keep_float).weaker(outcome) == QuantizeStatic(keep_float=more)
    assert QuantizeStatic(keep_float=32).weaker(left(32)) is None
    proto = mobile_block()
    whole, _ = quantize(proto, images())
    model, outcome = quantize(proto, images(), keep_float=2)
    assert outcome.numbers["nodes quantized"] == 2
    assert "among the layers that add most error" in whys(outcome)
    assert decibels(proto, model, images(seed=5)) > decibels(proto, whole, images(seed=5))


def test_layers_that_make_most_of_a_large_error_stay_float_by_themselves():
    """A convolution that takes the differences of all but equal pixels drowns in the step of its input's codes."""
    rng = np.random.default_rng(2)
    b = Builder(2)
    kernel = rng.normal(size=(16, 3, 3, 3)).astype(np.float32)
    kernel -= kernel.mean(axis=(2, 3), keepdims=True)
    b.constant("edges", 40 * kernel)
    b.node("Conv", ["x", "edges"], "first", kernel_shape=[3, 3])
    source = "first"
    for index in range(2):
        source = b.node("Relu", [b.conv(source, f"c{index}", 16, 16)], f"r{index}")
    proto = b.model({"x": ["N", 3, 12, 12]}, {source: ["N", 16, 10, 10]})

    def feeds(seed: int) -> list[dict[str, np.ndarray]]:
        shifts = np.random.default_rng(seed).normal(size=(16, 1, 3, 1, 1)).astype(np.float32)
        return [{"x": 0.01 * feed["x"] + shift} for feed, shift in zip(images(seed=seed), shifts, strict=True)]

    worse, _ = quantize(proto, feeds(1), keep_float=0)
    model, outcome = quantize(proto, feeds(1))
    (change,) = (change for change in outcome.changes if change.rule == "sensitivity")
    assert change.what.endswith('exclude = ["first"]')
    assert "first: Conv: it is among the layers that add most error" in whys(outcome)
    assert decibels(proto, model, feeds(5)) > decibels(proto, worse, feeds(5)) + 20
    assert not outcome.numbers["weights stored in int8 only"]  # its weights need float as well
    named, again = quantize(proto, feeds(1), exclude=("first",), keep_float=0)
    assert again.numbers["nodes quantized"] == outcome.numbers["nodes quantized"]
    assert decibels(proto, named, feeds(5)) > decibels(proto, worse, feeds(5)) + 20


@pytest.mark.parametrize("widest", [True, False])
def test_ranges_are_chosen_by_the_error_that_they_lead_to(monkeypatch: pytest.MonkeyPatch, widest: bool):
    b = Builder()
    b.conv("x", "y", 3, 16)
    proto = b.model({"x": ["N", 3, 24, 24]}, {"y": ["N", 16, 22, 22]})
    feeds = [{"x": b.random.uniform(0, 1, (1, 3, 24, 24)).astype(np.float32)} for _ in range(64)]
    feeds[0]["x"][0, 0, 0, 0] = 1.5  # the only value above one: all but minmax cut it off

    def error(judge: Judge, student: Model) -> float:
        scale = float(next(node for node in student.graph.nodes if node.op == "QuantizeLinear").inputs[1].values)
        return abs(255 * scale - (1.5 if widest else 1.0))

    monkeypatch.setattr(Judge, "error", error)
    _, outcome = quantize(proto, feeds, keep_float=0)
    (change,) = (change for change in outcome.changes if change.rule == "calibration")
    assert ("by minmax" in change.what) == widest


@pytest.mark.parametrize("wanted", [1, 4])
def test_the_layers_that_add_most_error_are_found_in_a_few_tries(monkeypatch: pytest.MonkeyPatch, wanted: int):
    b = Builder()
    source = "x"
    for index in range(40):
        source = b.node("Relu", [b.conv(source, f"c{index}", 8, 8)], f"r{index}")
    proto = b.model({"x": ["N", 8, 6, 6]}, {source: ["N", 8, 6, 6]})
    adds = dict.fromkeys((f"c{index}" for index in range(40)), 1e-4) | {"c30": 0.4, "c7": 0.3, "c8": 0.2, "c21": 0.1}
    tries = []

    def error(judge: Judge, student: Model) -> float:
        convolutions = (node for node in student.graph.nodes if node.op == "Conv")
        int8 = [node.name for node in convolutions if node.inputs[1].inputs]
        tries.append(len(int8))
        return sum(adds[name] for name in int8)

    monkeypatch.setattr(Judge, "error", error)
    monkeypatch.setattr(Judge, "strictest", lambda judge, *_: judge)
    options = {"equalize": False, "reconstruct": False, "bias_correction": False, "calibration": "mse"}
    _, outcome = quantize(proto, images(4, channels=8, size=6), keep_float=wanted, **options)
    (change,) = (change for change in outcome.changes if change.rule == "sensitivity")
    expected = sorted(adds, key=lambda name: -adds[name])[:wanted]
    assert change.what.endswith(f"exclude = [{', '.join(repr(name) for name in expected)}]".replace("'", '"'))
    assert sum(count < 40 for count in tries) <= (20 if wanted == 1 else 34)


@pytest.mark.parametrize(
    ("errors", "kept"),
    [
        # What is lost altogether is not lost less with one layer more, and found again with enough of them.
        ({0: 1.5, 1: 1.0, 2: 1.1, 4: 0.9, 8: 0.01}, 8),
        # Where a little is lost, a layer that does not help is none of those that add most.
        ({0: 0.1, 1: 0.06, 2: 0.07, 4: 0.02, 8: 0.01}, 1),
    ],
)
def test_more_layers_are_tried_in_float_while_all_is_lost(monkeypatch: pytest.MonkeyPatch, errors, kept):
    b = Builder()
    source = "x"
    for index in range(20):
        source = b.node("Relu", [b.conv(source, f"c{index}", 8, 8)], f"r{index}")
    proto = b.model({"x": ["N", 8, 6, 6]}, {source: ["N", 8, 6, 6]})

    def error(judge: Judge, student: Model) -> float:
        convolutions = [node for node in student.graph.nodes if node.op == "Conv"]
        int8 = [int(node.name[1:]) for node in convolutions if node.inputs[1].inputs]
        return errors.get(20 - len(int8), sum(0.5**index for index in int8))

    monkeypatch.setattr(Judge, "error", error)
    monkeypatch.setattr(Judge, "strictest", lambda judge, *_: judge)
    options = {"equalize": False, "reconstruct": False, "bias_correction": False, "calibration": "mse"}
    _, outcome = quantize(proto, images(4, channels=8, size=6), **options)
    (change,) = (change for change in outcome.changes if change.rule == "sensitivity")
    assert change.what.endswith(f"exclude = {json.dumps([f'c{index}' for index in range(kept)])}")


def test_biases_need_no_correction_where_all_layers_that_have_one_stay_float(monkeypatch: pytest.MonkeyPatch):
    b = Builder()
    b.node("Relu", [b.conv("x", "conv", 3, 32)], "r")
    b.node("ReduceMean", ["r"], "pooled", axes=[2, 3], keepdims=0)
    b.node("MatMul", ["pooled", b.weight("w", 32, 64)], "y")
    proto = b.model({"x": ["N", 3, 12, 12]}, {"y": ["N", 64]})

    def error(judge: Judge, student: Model) -> float:
        int8 = {node.name for node in student.graph.nodes if node.op in ("Conv", "MatMul") and node.inputs[1].inputs}
        return 0.4 * ("conv" in int8) + 0.01 * ("y" in int8)

    monkeypatch.setattr(Judge, "error", error)
    monkeypatch.setattr(Judge, "strictest", lambda judge, *_: judge)
    model, outcome = quantize(proto, images(8), equalize=False)
    (change,) = (change for change in outcome.changes if change.rule == "sensitivity")
    assert change.what.endswith('exclude = ["conv"]')
    assert [change.node for change in outcome.changes if "in int8: input step" in change.what] == ["y"]
    assert decibels(proto, model, images(seed=5)) > 30


def fused_by_onnxruntime() -> onnx.ModelProto:
    """Layers between operators of ONNX Runtime's own, of which ONNX's shape inference knows nothing."""
    b = Builder()
    b.node("MatMul", ["x", b.weight("w1", 64, 128)], "m1")
    b.node("Gelu", ["m1"], "g1", domain="com.microsoft")
    b.node("MatMul", ["g1", b.weight("w2", 128, 128)], "m2")
    b.node("Relu", ["m2"], "r2")
    b.node("MatMul", ["r2", b.weight("w3", 128, 128)], "m3")
    gamma = b.constant("gamma", np.ones(128, np.float32))
    b.node("SkipLayerNormalization", ["m3", "m2", gamma], "n3", domain="com.microsoft")
    b.node("MatMul", ["n3", b.weight("w4", 128, 64)], "y")
    return b.model({"x": ["n", 7, 64]}, {"y": ["n", 7, 64]})


def test_layers_behind_operators_that_onnx_does_not_define_are_quantized(tmp_path: Path):
    proto = fused_by_onnxruntime()
    rng = np.random.default_rng(1)
    feeds, unseen = ([{"x": rng.normal(size=(1, 7, 64)).astype(np.float32)} for _ in range(count)] for count in (12, 4))
    model, outcome = quantize(proto, feeds)
    assert outcome.numbers["nodes quantized"] == 4
    assert decibels(proto, model, unseen) > 25
    (tmp_path / "record.json").write_text(json.dumps({"passes": [{"name": "quantize-static", "plan": outcome.plan}]}))
    again = load(proto)
    QuantizeStatic(plan=str(tmp_path), only_if_faster=False).run(again, Context())
    assert decibels(proto, again, unseen) > 25


def test_a_model_that_gives_decisions_only_is_judged_by_them():
    b = Builder()
    b.node("Relu", [b.conv("x", "c", 3, 32)], "r")
    b.node("ReduceMean", ["r"], "m", axes=[2, 3], keepdims=0)
    b.node("Gemm", ["m", b.weight("w", 50, 32)], "logits", transB=1)
    b.node("ArgMax", ["logits"], "y", axis=1)
    proto = b.model({"x": ["N", 3, 12, 12]}, {"y": ["N", 1]}, kinds={"y": TensorProto.INT64})
    _, outcome = quantize(proto, images(64))
    error = outcome.numbers["output error on held-back samples"]
    assert 0 <= error < 0.2 and outcome.numbers["nodes quantized"] == 2
    judge = Judge.of(load(proto), images(8))
    flipped = load(proto)
    flipped.graph.nodes[-2].inputs[1].values = -flipped.graph.nodes[-2].inputs[1].values
    assert judge.error(load(proto)) == 0 and judge.error(flipped) == 1


def test_noise_is_measured_against_what_varies_of_an_output():
    def judged(mean: float, feeds: list[dict[str, np.ndarray]]) -> float:
        protos = []
        for scale in (1.0, 1.1):
            b = Builder()
            b.node("Add", [b.node("Mul", ["x", b.constant("s", np.float32(scale))], "p"), b.weight("m", 1)], "y")
            protos.append(b.model({"x": ["N", 10]}, {"y": ["N", 10]}))
            protos[-1].graph.initializer[1].CopyFrom(numpy_helper.from_array(np.float32([mean]), "m"))
        return Judge.of(load(protos[0]), feeds).error(load(protos[1]))

    rng = np.random.default_rng(0)
    feeds = [{"x": rng.normal(size=(16, 10)).astype(np.float32)} for _ in range(4)]
    # A tenth of the deviation is off: one percent of its square, wherever the mean is.
    for mean in (0.0, 30.0):
        assert judged(mean, feeds) == pytest.approx(0.01, rel=0.1)
    # Where nothing varies, the whole output is what there is.
    assert judged(0.0, [{"x": np.full((1, 10), 3, np.float32)}]) == pytest.approx(0.01, rel=0.01)


def test_probabilities_are_judged_by_their_logarithms():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(64, 10)).astype(np.float32) * 8
    b = Builder()
    b.node("Softmax", [b.node("Add", ["x", b.constant("c", np.float32(0))], "sum")], "p", axis=1)
    proto = b.model({"x": ["N", 10]}, {"p": ["N", 10]})
    judge = Judge.of(load(proto), [{"x": logits}])
    assert judge.axes == {"p": 1}
    # Off by the same factor throughout: nothing changes in probability; off in one class: its logarithm does.
    for shift, least, most in ((np.float32(3), 0.0, 1e-6), (np.eye(1, 10, 3, np.float32)[0], 1e-3, 1.0)):
        c = Builder()
        c.node("Softmax", [c.node("Add", ["x", c.constant("c", shift)], "sum")], "p", axis=1)
        assert least <= judge.error(load(c.model({"x": ["N", 10]}, {"p": ["N", 10]}))) <= most
    b = Builder()
    b.node("Abs", ["x"], "y")
    proto = b.model({"x": ["N", "C", "T"]}, {"y": ["N", "C", "T"]})
    for shape, axes in (((2, 4, 3), {"y": 1}), ((2, 3, 4), {"y": 2}), ((4, 2, 3), {})):
        assert Judge.of(load(proto), [{"x": np.full(shape, 0.25, np.float32)}]).axes == axes


# ------------------------------------------------------------------------------------------------------------ speed


@pytest.mark.parametrize(("speed", "int8"), [(0.5, False), (0.97, False), (0.99, True), (2.0, True)])
def test_arithmetic_stays_float_where_int8_is_slower(monkeypatch, speed, int8):
    monkeypatch.setattr("onnxslim.passes.quantize_static._speed", lambda before, after, data: speed)
    proto = mobile_block()
    model, outcome = quantize(proto, images(), only_if_faster=True)
    assert bool(ops(model)["QuantizeLinear"]) is int8
    assert ("times the speed of float" in whys(outcome)) is not int8
    assert outcome.numbers["share of weights in int8"] > 0.75  # all but the stem
    assert decibels(proto, model, images(seed=5)) > (28 if int8 else 38)


def test_speed_is_that_of_the_float_model_against_the_other():
    small, large = Builder(), Builder()
    small.conv("x", "y", 3, 8)
    for index in range(12):
        large.conv("x" if index == 0 else f"c{index - 1}", f"c{index}", 3 if index == 0 else 64, 64)
    shape = {"x": [1, 3, 24, 24]}
    slow, fast = large.model(shape, {"c11": [1, 64, 24, 24]}), small.model(shape, {"y": [1, 8, 24, 24]})
    data = open_dataset(images(2, size=24), Session(slow).specs)
    assert speed_of(load(slow), load(fast), data) > 2
    assert speed_of(load(fast), load(slow), data) < 0.5


# ----------------------------------------------------------------------------------------------------------- opset


def test_opset_11_model_is_raised_and_quantized():
    proto = mobile_block(opset=11)
    model, outcome = quantize(proto, images())
    assert model.opset == 13
    assert outcome.numbers["nodes quantized"] == 4
    assert decibels(proto, model, images(seed=5)) > 28


def test_opset_9_model_is_raised_and_quantized():
    proto = mobile_block(opset=9)
    model, _ = quantize(proto, images())
    assert model.opset == 13
    assert decibels(proto, model, images(seed=5)) > 28


def test_raising_keeps_the_numbers_of_every_op_that_changed():
    b = Builder()
    b.node("Softmax", ["x"], "flattened", axis=1)
    b.node("LogSoftmax", ["x"], "last", axis=3)
    b.node("ReduceSum", ["x"], "reduced", axes=[2], keepdims=1)
    b.node("Unsqueeze", ["x"], "more", axes=[0])
    b.node("Squeeze", ["more"], "fewer", axes=[0])
    b.nodes.append(helper.make_node("Split", ["x"], ["left", "right"], "split", axis=3, split=[1, 5]))
    b.node("Slice", ["x"], "slice", starts=[1], ends=[3], axes=[2])
    b.node("Pad", ["x"], "pad", pads=[0, 0, 1, 1, 0, 0, 0, 2], value=1.5)
    b.node("Clip", ["x"], "clip", max=0.5)
    b.nodes.append(helper.make_node("Slice", ["clip"], ["cut"], "cut", starts=[-2], ends=[100], axes=[3]))
    b.node("Upsample", ["x", b.constant("scales", np.array([1, 1, 2, 2], np.float32))], "up", mode="nearest")
    b.node("Dropout", ["x"], "drop", ratio=0.3)
    names = ["flattened", "last", "reduced", "fewer", "left", "right", "slice", "pad", "clip", "cut", "up", "drop"]
    proto = b.model({"x": [2, 3, 4, 6]}, {name: [f"{name}{axis}" for axis in range(4)] for name in names}, opset=9)
    model = load(proto)
    assert raise_opset(model) is None
    feed = {"x": np.random.default_rng(0).normal(size=(2, 3, 4, 6)).astype(np.float32)}
    before, after = Session(proto).run(feed), Session(model).run(feed)
    for name in names:
        np.testing.assert_allclose(after[name], before[name], rtol=1e-6, atol=1e-6, err_msg=name)


def test_bounds_that_are_no_float32_keep_a_model_at_its_opset():
    b = Builder()
    b.node("Cast", ["x"], "half", to=TensorProto.FLOAT16)
    b.node("Clip", ["half"], "clip", min=0.0, max=6.0)
    b.node("Cast", ["clip"], "y", to=TensorProto.FLOAT)
    model = load(b.model({"x": [2, 3]}, {"y": [2, 3]}, opset=10))
    assert "its bounds are not float32" in (raise_opset(model) or "")
    assert model.opset == 10


def test_scalar_inputs_and_empty_feeds_are_calibrated_with():
    b = Builder()
    b.node("MatMul", ["x", b.weight("w", 64, 64)], "m")
    b.node("Mul", ["m", "gain"], "y")
    proto = b.model({"x": ["n", "t", 64], "gain": []}, {"y": ["n", "t", 64]})
    rng = np.random.default_rng(0)
    feeds = [
        {"x": rng.normal(size=(rows, 3, 64)).astype(np.float32), "gain": np.array(2, np.float32)}
        for rows in (4, 0, 2, 4, 0, 3, 2, 4)
    ]
    model, outcome = quantize(proto, feeds)
    assert outcome.numbers["nodes quantized"] == 1
    assert decibels(proto, model, feeds) > 30


def test_too_old_model_is_refused_but_its_weights_are_stored_in_int8():
    proto = mobile_block(opset=9)
    proto.opset_import[0].version = 8
    model, outcome = quantize(proto, images(4))
    assert model.opset == 8
    assert "the model is at opset 8" in whys(outcome)
    assert not ops(model)["QuantizeLinear"]
    assert outcome.numbers["weights stored in int8 only"] > 0


def test_opset_6_model_is_left_as_it_was():
    b = Builder()
    b.conv("x", "y", 3, 64)
    proto = b.model({"x": [1, 3, 12, 12]}, {"y": [1, 64, 12, 12]}, opset=6)
    model, outcome = quantize(proto, images(2))
    assert not outcome.modified
    assert "the model is at opset 6" in whys(outcome)
    assert model.to_proto() == proto


# -------------------------------------------------------------------------------------------------------- refusals


def test_quantized_model_is_left_alone():
    model, _ = quantize(mobile_block(), images())
    before = model.to_proto()
    again, outcome = quantize(before, images())
    assert not outcome.modified
    assert "quantized already" in whys(outcome)
    assert again.to_proto() == before


def test_tiny_model_never_grows():
    b = Builder()
    b.node("Gemm", ["x", b.weight("w", 4, 4)], "y")
    proto = b.model({"x": ["N", 4]}, {"y": ["N", 4]})
    feeds = [{"x": np.ones((1, 4), np.float32)}] * 4
    model, outcome = quantize(proto, feeds)
    assert not outcome.modified and outcome.refusals
    assert model.to_proto() == proto


def test_result_that_is_no_smaller_is_given_back():
    b = Builder()
    for index in range(2):  # little weight, much arithmetic: int8 would be worth it, but not smaller
        b.conv("x" if index == 0 else "c0", f"c{index}", 3 if index == 0 else 4, 4)
    proto = b.model({"x": ["N", 3, 64, 64]}, {"c1": ["N", 4, 64, 64]})
    model, outcome = quantize(proto, images(4, size=64))
    assert not outcome.modified
    assert "no smaller" in whys(outcome)
    assert model.to_proto() == proto


@pytest.mark.parametrize("taken", [True, False])
def test_a_branch_is_calibrated_where_it_runs_and_stores_its_weights_in_int8_where_it_does_not(taken):
    b = Builder()
    inner = Builder(1)
    inner.node("MatMul", ["x", inner.weight("w", 64, 64)], "then_y")
    then = helper.make_graph(
        inner.nodes, "then", [], [helper.make_tensor_value_info("then_y", FLOAT, None)], inner.initializers
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["else_y"])],
        "else",
        [],
        [helper.make_tensor_value_info("else_y", FLOAT, None)],
    )
    b.nodes.append(helper.make_node("If", ["c"], ["y"], "if", then_branch=then, else_branch=other))
    proto = b.model({"x": ["N", 64], "c": []}, {"y": ["N", 64]}, kinds={"c": TensorProto.BOOL})
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.normal(size=(1, 64)).astype(np.float32), "c": np.array(taken)} for _ in range(12)]
    model, outcome = quantize(proto, feeds)
    ops = [node.op for graph in model.graphs() for node in graph.nodes]
    if taken:
        assert outcome.numbers["nodes quantized"] == 1
        assert outcome.numbers["share of MACs quantized (estimate)"] == 1
        assert "QuantizeLinear" in ops
    else:
        assert "if (then_branch): stays as it is: the calibration data never enters it" in whys(outcome)
        assert outcome.numbers["weights stored in int8 only"] == 64 * 64
        assert "QuantizeLinear" not in ops
    both = [{**feed, "c": np.array(c)} for feed in feeds for c in (True, False)]
    assert decibels(proto, model, both) > 33


def streaming_gru(start: str, end: str) -> onnx.ModelProto:
    """A Gemm and a GRU over all rows that it gives: where its first state comes from, and what leaves the graph."""
    b = Builder()
    b.node("Gemm", ["x", b.weight("w", 64, 64)], "a")
    b.node("Unsqueeze", ["a", b.constant("second", np.array([1]))], "s")
    b.node("Unsqueeze", ["state", b.constant("first", np.array([0]))], "given")
    b.node("Tanh", ["given"], "squashed")
    initial = {"input": "given", "computed": "squashed", "zero": ""}[start]
    inputs = ["s", b.weight("gw", 1, 96, 64), b.weight("gr", 1, 96, 32), "", "", initial]
    b.nodes.append(helper.make_node("GRU", inputs, ["all", "last"], "gru", hidden_size=32))
    b.node("Squeeze", ["last", "first"], "next")
    b.node("Squeeze", ["all", b.constant("two", np.array([1, 2]))], "y")
    return b.model({"x": ["N", 64], "state": [1, 32]}, {name: ["N", 32] for name in end.split()})


@pytest.mark.parametrize(
    ("start", "end", "steps", "stays"),
    [
        ("input", "y next", 1, True),
        ("input", "y next", 15, True),
        ("input", "y next", 16, False),
        ("computed", "y next", 1, False),
        ("zero", "y next", 1, False),
        ("input", "y", 1, False),
    ],
)
def test_layers_before_state_that_is_handed_on_stay_float_unless_samples_are_long(start, end, steps, stays):
    rng = np.random.default_rng(0)
    sizes = {"x": (steps, 64), "state": (1, 32)}
    feeds = [{name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()} for _ in range(8)]
    proto = streaming_gru(start, end)
    model, outcome = quantize(proto, feeds)
    ops = {node.op for node in model.graph.nodes}
    assert ("QuantizeLinear" in ops) is not stays
    why = "a: Gemm: the state of GRU 'gru' goes from run to run, where small errors add up; samples of fewer"
    assert (why in whys(outcome)) is stays
    assert outcome.numbers["share of weights in int8"] > 0.9
    assert decibels(proto, model, feeds) > 30


def test_excluded_nodes_stay_as_they_are():
    model, outcome = quantize(mobile_block(), images(), exclude=("c2", "Gemm"))
    assert outcome.numbers["nodes quantized"] == 2
    assert "c2: Conv: it is excluded" in whys(outcome)
    assert not any(t.name.startswith("fc_w_") for t in model.to_proto().graph.initializer)


def test_weight_that_a_caller_may_override_is_refused():
    proto = mobile_block()
    weight = next(t for t in proto.graph.initializer if t.name == "c3_w")
    proto.graph.input.append(helper.make_tensor_value_info("c3_w", FLOAT, list(weight.dims)))
    model, outcome = quantize(proto, images())
    assert "c3: Conv: its weight is not constant" in whys(outcome)
    assert decibels(proto, model, images(seed=5)) > 28


def test_model_without_weights_says_so():
    b = Builder()
    b.node("Relu", ["x"], "y")
    proto = b.model({"x": ["N", 4]}, {"y": ["N", 4]})
    model, outcome = quantize(proto, [{"x": np.ones((1, 4), np.float32)}])
    assert "no Conv, Gemm or MatMul" in whys(outcome)
    assert model.to_proto() == proto
    assert not QuantizeStatic().run(load(proto), Context()).modified


@pytest.mark.filterwarnings("error")
def test_subnormal_weights_are_dead_and_keep_a_usable_scale():
    weight = np.ones((2, 8), np.float32)
    weight[0] = 4e-43
    coded = quantize_weight(weight, 0, floor=1e-51)
    codes, scale = coded.codes, coded.scale
    assert (codes[0] == 0).all() and (codes[1] == 127).all()
    assert (scale * np.float32(1e-3) > 0).all()


def test_layers_that_take_differences_of_large_inputs_are_rounded_for_what_they_give():
    rng = np.random.default_rng(5)
    b = Builder()
    b.conv("x", "a", 3, 16)
    b.node("Relu", ["a"], "r")
    kernel = rng.normal(size=(16, 1, 3, 3)).astype(np.float32)
    kernel -= kernel.mean(axis=(2, 3), keepdims=True)
    b.constant("edges", kernel)
    b.node("Conv", ["r", "edges"], "e", kernel_shape=[3, 3], group=16)
    b.conv("e", "y", 16, 8)
    proto = b.model({"x": ["N", 3, 12, 12]}, {"y": ["N", 8, 10, 10]})
    feeds = [{"x": feed["x"] * 0.05 + rng.normal(size=(1, 3, 1, 1)).astype(np.float32)} for feed in images()]
    _, nearest = quantize(proto, feeds, reconstruct=False)
    _, found = quantize(proto, feeds)
    key = "output error on held-back samples"
    assert found.numbers[key] < 0.9 * nearest.numbers[key]


@pytest.mark.parametrize(
    ("width", "gain", "kind"), [(64, 1.0, np.float16), (16, 1.0, np.float32), (64, 1e-6, np.float32)]
)
def test_scales_of_stored_weights_are_float16_where_that_holds_them(
    tmp_path: Path, width: int, gain: float, kind: type
):
    b = Builder()
    b.node("Conv", ["x", b.weight("w", width, 32, 3, 3, gain=gain)], "y", pads=[1, 1, 1, 1])
    proto = b.model({"x": ["n", 32, 8, 8]}, {"y": ["n", width, 8, 8]})
    model, outcome = quantize(
        proto, images(channels=32, size=8), exclude=("none",), only_if_faster=False, max_range=1e-30
    )
    assert [change.rule for change in outcome.changes] == ["weight-only int8"]
    scales = [c for c in model.constants() if c.dtype in (np.float16, np.float32) and c.values.size == width]
    assert [c.dtype for c in scales] == [kind]
    assert set(fused(model, tmp_path)) <= {"Conv", "ReorderInput", "ReorderOutput"}  # folded when it is loaded
    assert decibels(proto, model, images(channels=32, size=8, seed=7)) > 35
