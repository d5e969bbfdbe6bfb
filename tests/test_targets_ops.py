"""Ops that TVM's importer lacks, compiled: the tests of the ONNX specification, against their own expected values."""

from __future__ import annotations

import functools
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
from compiled_nets import RNG, Net, array, check
from onnx import TensorProto, helper, numpy_helper
from onnx.backend.test.loader import load_model_tests

from onnxslim.errors import TargetError
from onnxslim.targets import compile as compile_model


@functools.cache
def node_tests():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, on the overflows that some of the tests are about
        return {test.name: test for test in load_model_tests(kind="node")}


def read(value):
    return numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)


def check_node_test(name, constants=None):
    """Compile a test of the specification and compare every output with what it wants.

    Whole numbers are constants, since sizes and indices are so in models, and all inputs from number ``constants`` on.
    """
    test = node_tests()[name]
    inputs, wanted = (list(map(read, values)) for values in test.data_sets[0])
    model = onnx.ModelProto()
    model.CopyFrom(test.model)
    for place, (value, given) in enumerate(list(zip(model.graph.input, inputs, strict=True))):
        if given.dtype.kind in "iu" or (constants is not None and place >= constants):
            model.graph.initializer.append(numpy_helper.from_array(given, value.name))
            model.graph.input.remove(value)
    feed = {
        value.name: given
        for value, given in zip(test.model.graph.input, inputs, strict=True)
        if value in model.graph.input
    }
    found = compile_model(model).run(feed)
    for value, expected in zip(model.graph.output, wanted, strict=True):
        assert found[value.name].shape == expected.shape
        assert found[value.name].dtype == expected.dtype
        np.testing.assert_allclose(found[value.name], expected, rtol=1e-4, atol=1e-5)


DEFINED_BY_OTHERS = (
    "test_celu",
    "test_center_crop_pad_crop_axes_chw",
    "test_center_crop_pad_pad",
    "test_nllloss_NCd1d2_with_weight_reduction_mean",
    "test_rotary_embedding",
    "test_rotary_embedding_3d_input",
    "test_rotary_embedding_interleaved",
    "test_rotary_embedding_no_position_ids_rotary_dim",
    "test_sce_mean_weight_ii_3d",
    "test_swiglu_alpha",
    "test_swish",
)
CONVERTED = (
    "test_l1normalization_axis_1",
    "test_l2normalization_axis_0",
    "test_lpnormalization_default",
    "test_reversesequence_batch",
    "test_reversesequence_time",
)


@pytest.mark.parametrize("name", DEFINED_BY_OTHERS)
def test_ops_that_are_defined_by_others(name):
    check_node_test(name)


@pytest.mark.parametrize("name", CONVERTED)
def test_ops_with_a_converter_of_ours(name):
    check_node_test(name)


def quantized(shape, scale, zero, kind=np.uint8):
    return np.clip(np.rint(array(*shape) / scale) + zero, np.iinfo(kind).min, np.iinfo(kind).max).astype(kind)


def assert_off_by_a_quantum_at_most(model, feed):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (wanted,) = session.run(None, feed)
    (found,) = compile_model(model).run(feed).values()
    assert found.dtype == wanted.dtype
    difference = np.abs(found.astype(int) - wanted)
    assert difference.max() <= 1
    # Only what lies between two quanta may fall to either side.
    assert (difference > 0).mean() < 0.01
    assert len(np.unique(wanted)) > 50


@pytest.mark.parametrize("opset", [10, 17])
def test_quantized_convolutions(opset):
    net = Net(opset)
    x = net.input(1, 6, 11, 13, kind=TensorProto.UINT8)
    scales, zeros = (np.linspace(0.01, 0.03, 10, dtype=np.float32), np.zeros(10, np.int8))
    # Larger ones overflow ONNX Runtime's sums of 16 bits on processors without VNNI.
    weight = np.clip(quantized((10, 6, 3, 3), 0.05, 0, np.int8), -64, 63)
    constants = [np.float32(0.02), np.uint8(120), weight, scales, zeros, np.float32(0.1), np.uint8(131)]
    bias = RNG.integers(-5000, 5000, 10).astype(np.int32)
    names = [net.constant(value) for value in (*constants, bias)]
    model = net.model(net.add("QLinearConv", x, *names, pads=[1, 0, 1, 2], strides=[1, 2]))
    assert_off_by_a_quantum_at_most(model, {x: quantized((1, 6, 11, 13), 0.02, 120)})


def test_quantized_products():
    net = Net()
    x = net.input(2, 7, 16, kind=TensorProto.UINT8)
    weight = np.clip(quantized((16, 9), 0.05, 0, np.int8), -64, 63)
    constants = [np.float32(0.02), np.uint8(120), weight, np.float32(0.02), np.int8(3), np.float32(0.07), np.uint8(128)]
    model = net.model(net.add("QLinearMatMul", x, *(net.constant(value) for value in constants)))
    assert_off_by_a_quantum_at_most(model, {x: quantized((2, 7, 16), 0.02, 120)})


def test_windows_of_known_size_are_constants():
    net = Net()
    x, size = net.input(2, 10), net.constant(np.int64(10))
    windows = [net.add(f"{name}Window", size, periodic=0) for name in ("Hann", "Hamming", "Blackman")]
    check(net.model(*(net.add("Mul", x, window) for window in windows)), [array(2, 10)])


def test_an_op_inside_a_branch_is_defined_by_others_too():
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 5])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])
    flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
    branches = {
        key: helper.make_graph(
            [helper.make_node(op, ["x"], [key])], key, [], [helper.make_empty_tensor_value_info(key)]
        )
        for key, op in (("then_branch", "Celu"), ("else_branch", "Relu"))
    }
    graph = helper.make_graph([helper.make_node("If", ["flag"], ["y"], **branches)], "net", [flag, x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    check(model, [np.array(True), array(3, 5)], [np.array(False), array(4, 5)])


# ------------------------------------------------------------------------------------------------------- recurrent ops

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def recurrent(op, hidden, sizes=(7, 1, 5), *, bias=True, states=False, open_sizes=False, layout=0, **attributes):
    """A recurrent op with all of its outputs, [steps, batch, inputs] unless ``layout`` is 1."""
    net = Net(opset=14)
    steps, batch, inputs = sizes
    count, rows = 1 + (attributes.get("direction") == "bidirectional"), _GATES[op] * hidden
    shape = ("steps", "batch") if open_sizes else (steps, batch)
    names = [net.input(*(shape[::-1] if layout else shape), inputs)]
    scale = np.float32(1 / np.sqrt(hidden))
    names += [net.constant(array(count, rows, size) * scale) for size in (inputs, hidden)]
    names += [net.constant(array(count, 2 * rows)) if bias else "", ""]
    feeds = [array(batch, steps, inputs) if layout else array(steps, batch, inputs)]
    if states:
        for _ in range(2 if op == "LSTM" else 1):
            state = (batch, count, hidden) if layout else (count, batch, hidden)
            names.append(net.input(*state))
            feeds.append(array(*state))
    outputs = ["every", "last", "cell"][: 3 if op == "LSTM" else 2]
    if layout:
        attributes["layout"] = layout
    net.nodes.append(helper.make_node(op, names, outputs, hidden_size=hidden, **attributes))
    return net.model(*outputs), feeds


@pytest.mark.parametrize("op", _GATES)
@pytest.mark.parametrize(
    "case",
    [
        {"hidden": 16},
        {"hidden": 19, "sizes": (5, 3, 17), "bias": False, "direction": "reverse"},
        {"hidden": 33, "sizes": (1, 2, 4), "states": True, "direction": "bidirectional"},
        {"hidden": 3, "sizes": (9, 2, 1), "states": True},
    ],
)
def test_recurrent_ops(op, case):
    model, feeds = recurrent(op, **case)
    check(model, feeds)


@pytest.mark.parametrize("hidden", [8, 13])
def test_gru_that_resets_late(hidden):
    check(*recurrent("GRU", hidden, (6, 2, 5), linear_before_reset=1, direction="bidirectional"))


@pytest.mark.parametrize("activation", ["Relu", "Sigmoid"])
def test_rnn_with_another_activation(activation):
    check(*recurrent("RNN", 9, activations=[activation]))


@pytest.mark.parametrize("op", _GATES)
def test_recurrent_ops_of_open_length(op):
    model, _ = recurrent(op, 11, open_sizes=True, direction="bidirectional")
    check(model, [array(7, 1, 5)], [array(1, 4, 5)], [array(20, 3, 5)])


def test_recurrent_node_tests_with_the_batch_first():
    """ONNX Runtime has no such layout."""
    for name in ("test_lstm_batchwise", "test_gru_batchwise", "test_simple_rnn_batchwise"):
        check_node_test(name, constants=1)


@pytest.mark.parametrize(
    ("op", "attributes", "named"),
    [
        ("LSTM", {"clip": 1.0}, r"LSTM \(clip\)"),
        ("GRU", {"activations": ["Sigmoid", "Relu"]}, r"GRU \(activations sigmoid, relu\)"),
        ("LSTM", {"input_forget": 1}, r"LSTM \(input_forget\)"),
    ],
)
def test_recurrent_forms_without_a_kernel_are_named(op, attributes, named):
    model, _ = recurrent(op, 4, **attributes)
    with pytest.raises(TargetError, match=named):
        compile_model(model)


def test_gathering_by_an_index_out_of_bounds_takes_the_nearest(capfd):
    net = Net()
    table = array(50, 17)
    rows = net.add("Gather", net.constant(table), net.input("n", 3, kind=TensorProto.INT64))
    columns = net.add("Gather", net.input(4, 9), net.input(2, kind=TensorProto.INT32), axis=1)
    data = array(4, 9)
    bundle = check(net.model(rows, columns), [np.array([[0, 49, -50], [3, -1, 2]]), data, np.array([8, -9], np.int32)])
    assert "Warning" not in capfd.readouterr().err
    far = [np.array([[0, 10**12, -(10**12)]]), data, np.array([2**31 - 1, -(2**31)], np.int32)]
    found = bundle.run(dict(zip([entry.name for entry in bundle.inputs], far, strict=True)))
    np.testing.assert_array_equal(found[rows], table[[[0, 49, 0]]])
    np.testing.assert_array_equal(found[columns], data[:, [8, 0]])
