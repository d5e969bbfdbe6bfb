"""Ops that TVM's importer lacks, compiled: the tests of the ONNX specification, against their own expected values."""

from __future__ import annotations

import functools
import warnings

import numpy as np
import onnx
import pytest
from compiled_nets import Net, array, check
from onnx import TensorProto, helper, numpy_helper
from onnx.backend.test.loader import load_model_tests

from onnxslim.targets import compile as compile_model


@functools.cache
def node_tests():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, on the overflows that some of the tests are about
        return {test.name: test for test in load_model_tests(kind="node")}


def read(value):
    return numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)


def check_node_test(name):
    """Compile a test of the specification and compare every output with what it wants."""
    test = node_tests()[name]
    inputs, wanted = (list(map(read, values)) for values in test.data_sets[0])
    model = onnx.ModelProto()
    model.CopyFrom(test.model)
    # Sizes and indices are constants in models; only numbers that are computed are fed.
    for value, given in list(zip(model.graph.input, inputs, strict=True)):
        if given.dtype.kind in "iu":
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


@pytest.mark.parametrize("name", DEFINED_BY_OTHERS)
def test_ops_that_are_defined_by_others(name):
    check_node_test(name)


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
