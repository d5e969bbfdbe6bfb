"""Reading and tidying graphs: constants, liveness across bodies, shapes, costs."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

import onnxslim
from onnxslim import RecipeError, load
from onnxslim.graph.cost import layer_costs, node_count, op_histogram, parameter_count, total_macs
from onnxslim.graph.shapes import infer_shapes
from onnxslim.graph.walk import constant_value, drop_value_info, hoist_constants, is_graph_output, remove_dead_nodes

CONTROL_FLOW = """
<ir_version: 8, opset_import: ["" : 17]>
agraph (float[n, 4] x, bool c) => (float[n, 4] y)
{
    w = Constant <value = float[4] {1, 2, 3, 4}> ()
    outer = Mul (x, w)
    dead = Neg (outer)
    deader = Neg (dead)
    passed = Abs (x)
    y = If (c) <
        then_branch = then () => (float[n, 4] t) {
            k = Constant <value_float = 2.0> ()
            t = Mul (outer, k)
            unused = Neg (outer)
        },
        else_branch = other () => (float[n, 4] e) { e = Identity (passed) }
    >
}
"""


def _control_flow():
    return load(parser.parse_model(CONTROL_FLOW))


def test_constants_are_read_in_both_forms():
    model = _control_flow()
    weight = model.graph.nodes[1].inputs[1]
    np.testing.assert_array_equal(constant_value(weight), np.array([1, 2, 3, 4], np.float32))
    assert constant_value(model.graph.inputs[0]) is None
    assert hoist_constants(model) == 2
    np.testing.assert_array_equal(constant_value(model.graph.nodes[0].inputs[1]), np.array([1, 2, 3, 4], np.float32))
    proto = model.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    assert [tensor.name for tensor in proto.graph.initializer] == ["w"]
    assert "Constant" not in op_histogram(model)


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        ({"value_float": 2.5}, np.float32(2.5)),
        ({"value_floats": [1.0, 2.0]}, np.array([1, 2], np.float32)),
        ({"value_int": 3}, np.int64(3)),
        ({"value_ints": [1, 2]}, np.array([1, 2], np.int64)),
    ],
)
def test_constant_node_attributes(attribute, expected):
    graph = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], **attribute), helper.make_node("Identity", ["c"], ["y"])],
        "g",
        [],
        [helper.make_tensor_value_info("y", helper.np_dtype_to_tensor_dtype(expected.dtype), expected.shape)],
    )
    model = load(helper.make_model(graph))
    value = constant_value(model.graph.nodes[1].inputs[0])
    np.testing.assert_array_equal(value, expected)
    assert value.dtype == expected.dtype


def test_a_constant_that_is_an_output_stays_a_node():
    graph = helper.make_graph(
        [helper.make_node("Constant", [], ["y"], value_float=1.0)],
        "g",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])],
    )
    model = load(helper.make_model(graph))
    assert hoist_constants(model) == 0
    assert is_graph_output(model.graph, model.graph.nodes[0].outputs[0])


def test_dead_nodes_go_and_what_a_body_uses_stays():
    model = _control_flow()
    assert remove_dead_nodes(model) == 3  # two in the main graph, one in a branch
    assert [node.op for node in model.graph.nodes] == ["Constant", "Mul", "Abs", "If"]
    onnx.checker.check_model(model.to_proto(), full_check=True)
    assert remove_dead_nodes(model) == 0


def test_what_only_a_dead_body_used_goes_too():
    text = CONTROL_FLOW.replace("=> (float[n, 4] y)", "=> (float[n, 4] z)", 1).replace(
        "y = If", "z = Neg (x)\n    y = If"
    )
    model = load(parser.parse_model(text))
    remove_dead_nodes(model)
    assert [node.op for node in model.graph.nodes] == ["Neg"]


CONV = """
<ir_version: 8, opset_import: ["" : 17]>
agraph (float[n, 3, h, 32] x) => (float[n, 8, h, 32] y) <float[n, 8, h, 32] wrong>
{
    wrong = Conv <pads = [1, 1, 1, 1]> (x, w)
    y = Relu (wrong)
}
"""


def _conv():
    proto = parser.parse_model(CONV)
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((8, 3, 3, 3), np.float32), "w"))
    return load(proto)


def test_shapes_keep_symbols_and_take_given_sizes():
    model = _conv()
    output = model.graph.nodes[0].outputs[0]
    assert infer_shapes(model).shape(output) == ["n", 8, "h", 32]
    assert infer_shapes(model).static(output) is None
    fixed = infer_shapes(model, {"x": [2, 3, 16, 32]})
    assert fixed.static(output) == [2, 8, 16, 32]
    assert fixed.dtype(output) == np.float32
    assert model.graph.inputs[0].shape == ["n", 3, "h", 32]


@pytest.mark.parametrize("shapes", [{"x": [2, 4, 16, 32]}, {"x": [2, 3, 16]}, {"z": [1]}, {"x": [-1, 3, 16, 32]}])
def test_sizes_that_do_not_fit_are_refused(shapes):
    with pytest.raises(RecipeError, match=r"\[shapes\]"):
        infer_shapes(_conv(), shapes)


def test_shapes_reach_into_bodies():
    model = _control_flow()
    body = model.graph.nodes[-1].attrs["then_branch"]
    assert infer_shapes(model).shape(body.nodes[1].outputs[0]) == ["n", 4]


def test_costs_are_counted_once_and_macs_follow_the_shape():
    model = _conv()
    assert parameter_count(model) == 8 * 27
    assert node_count(model) == 2
    layers = layer_costs(model, {"x": [1, 3, 16, 32]})
    assert [(layer.op, layer.parameters, layer.bytes, layer.macs) for layer in layers] == [
        ("Conv", 216, 864, 16 * 32 * 8 * 27)
    ]
    assert total_macs(layers) == 16 * 32 * 8 * 27
    assert layer_costs(model)[0].macs == 32 * 8 * 27  # a symbolic size counts as one
    observed = layer_costs(model, None, {"wrong": [1, 8, 4, 32]})
    assert observed[0].macs == 4 * 32 * 8 * 27


def test_declared_shapes_can_be_forgotten():
    model = _conv()
    drop_value_info(model)
    proto = model.to_proto()
    assert not proto.graph.value_info
    assert [dim.dim_param or dim.dim_value for dim in proto.graph.output[0].type.tensor_type.shape.dim] == [
        "n",
        8,
        "h",
        32,
    ]


def test_weights_count_where_they_are_used_however_they_are_packed():
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 4] x) => (float[n, 8] y)
    {
        w = DequantizeLinear (q, scale, zero)
        y = MatMul (x, w)
    }
    """
    proto = parser.parse_model(text)
    for name, value in {"q": np.ones((4, 8), np.int8), "scale": np.float32(0.5), "zero": np.int8(0)}.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    layers = layer_costs(load(proto))
    assert [(layer.op, layer.parameters, layer.bytes, layer.macs) for layer in layers] == [("MatMul", 34, 37, 32)]


@pytest.mark.parametrize("nothing", ["None", "?", "-1", ""])
def test_a_name_that_means_nothing_ties_no_axes(nothing):
    """Two axes that an exporter calls "None" need not be equal, so swapping them is no no-op."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[a, b] x) => (float[c, d] y)
    {
        shape = Shape (x)
        first = Constant <value_ints = [0]> ()
        second = Constant <value_ints = [1]> ()
        height = Gather (shape, first)
        width = Gather (shape, second)
        swapped = Concat <axis = 0> (width, height)
        y = Reshape (x, swapped)
    }
    """
    proto = parser.parse_model(text)
    for dim in proto.graph.input[0].type.tensor_type.shape.dim:
        dim.dim_param = nothing
    model = load(proto)
    assert infer_shapes(model).shape(model.graph.inputs[0]) == [None, None]
    slimmed = onnxslim.slim(proto, model_check=False)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    session = onnxruntime.InferenceSession(slimmed.SerializeToString())
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], x.reshape(3, 2))
    assert load(proto).to_proto().graph.input == proto.graph.input
