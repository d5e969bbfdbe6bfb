"""float16: half the bytes, the same interface, and numbers as close as eleven bits allow."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper, parser

from onnxslim.data import open_dataset
from onnxslim.model import load
from onnxslim.passes.base import Context
from onnxslim.passes.convert_fp16 import ConvertFp16
from onnxslim.runtime import Session


def network(opset=17, gain=1.0):
    """Conv, Relu, pooling, branches that read an outer weight, Gemm and Softmax."""
    model = parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}]>'
        """
        g (bool c, float[n, 3, 16, 16] x) => (float[n, 40] y, float[n, 32] h) {
            a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w, b)
            r = Relu (a)
            p = GlobalAveragePool (r)
            f = Flatten (p)
            h = If (c) <
                then_branch = t () => (float[n, 32] u) { u = MatMul (f, v) },
                else_branch = e () => (float[n, 32] z) { z0 = MatMul (f, v) z = Tanh (z0) }>
            m = Gemm <transB = 1> (h, k, d)
            y = Softmax <axis = 1> (m)
        }"""
    )
    rng = np.random.default_rng(0)
    sizes = {"w": (64, 3, 3, 3), "b": (64,), "v": (64, 32), "k": (40, 32), "d": (40,)}
    weights = {name: rng.normal(size=size).astype(np.float32) / 4 for name, size in sizes.items()}
    weights["v"] *= gain
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    onnx.checker.check_model(model)
    return model


def feeds(count=6):
    rng = np.random.default_rng(1)
    return [
        {"c": np.array(bool(index % 2)), "x": rng.normal(size=(2, 3, 16, 16)).astype(np.float32)}
        for index in range(count)
    ]


def convert(proto, *, calibrate=False, **options):
    model = load(proto)
    data = open_dataset(feeds(), Session(model).specs) if calibrate else None
    outcome = ConvertFp16(**options).run(model, Context(calibration=data))
    onnx.checker.check_model(model.to_proto(), full_check=True)
    return model, outcome


def check_close(proto, model, limit=5e-3):
    one, two = Session(proto), Session(model)
    for feed in feeds():
        wanted, found = one.run(feed), two.run(feed)
        for name, value in wanted.items():
            assert found[name].dtype == value.dtype
            assert np.abs(found[name] - value).max() <= limit * np.abs(value).max()


def weights_of(model):
    return {tensor.name: tensor.data_type for tensor in model.to_proto().graph.initializer}


@pytest.mark.parametrize("opset", [13, 17, 21])
@pytest.mark.parametrize("compute", ["float16", "float32"])
@pytest.mark.parametrize("calibrate", [True, False])
def test_weights_are_halved_and_the_interface_stays(opset, compute, calibrate):
    proto = network(opset)
    model, outcome = convert(proto, calibrate=calibrate, compute=compute)
    check_close(proto, model)
    assert outcome.modified
    assert outcome.numbers["ratio of weights"] > 1.9
    assert (outcome.numbers["nodes in float16"] > 4) == (compute == "float16")
    assert [(value.name, value.type) for value in model.to_proto().graph.input] == [
        (value.name, value.type) for value in proto.graph.input
    ]
    assert sum(kind == TensorProto.FLOAT16 for kind in weights_of(model).values()) >= 3


def test_named_nodes_stay_in_float32():
    proto = network()
    model, outcome = convert(proto, keep_float=("Gemm", "Softmax"))
    check_close(proto, model)
    assert any("Gemm" in refusal.why for refusal in outcome.refusals)
    kinds = weights_of(model)
    assert kinds["k"] == TensorProto.FLOAT
    assert sum(kind == TensorProto.FLOAT16 for kind in kinds.values()) >= 2


def test_numbers_beyond_the_range_of_float16_stay_in_float32():
    proto = network(gain=1e6)
    model, _ = convert(proto, calibrate=True)
    assert weights_of(model)["v"] == TensorProto.FLOAT
    check_close(proto, model, limit=2e-2)


def test_activations_that_overflow_are_seen_on_calibration_data():
    proto = network(gain=6e4)
    model, _ = convert(proto, calibrate=True)
    found = Session(model).run(feeds()[0])
    assert all(np.isfinite(value).all() for value in found.values())
    check_close(proto, model, limit=2e-2)


def test_weaker_ends_in_float32():
    steps, step = [], ConvertFp16()
    while step is not None:
        steps.append(step)
        step = step.weaker()
    assert [each.compute for each in steps] == ["float16", "float16", "float32"]
    assert "Softmax" in steps[1].keep_float


def test_models_without_float_weights_are_left_alone():
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (int64[n] x) => (int64[n] y) { y = Add (x, x) }'
    )
    model = load(proto)
    outcome = ConvertFp16().run(model, Context())
    assert not outcome.modified
    assert outcome.refusals
