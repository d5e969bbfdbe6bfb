"""Fixing the shapes of inputs and cutting a part out of a model."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, parser

import onnxslim
from onnxslim.boundary import cut, fix_input_shapes, parse_shapes

NET = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 4] x, float[N, 4] other) => (float[N, 4] y, float[N, 4] z)
{
    a = Relu (x)
    left, right = Split <axis = 1> (a)
    b = Concat <axis = 1> (right, left)
    y = Add (b, other)
    z = Neg (b)
}
"""

LOOP = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[N] x, bool flag) => (float[N] y)
{
    a = Abs (x)
    b = Exp (a)
    y = If (flag) <
        then_branch = t () => (float[N] u) { u = Neg (b) },
        else_branch = e () => (float[N] v) { v = Add (a, b) }
    >
}
"""


def _run(model, **feed):
    proto = model.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, feed), strict=True))


def _types(values):
    return [(value.name, value.type.tensor_type.elem_type) for value in values]


def _dims(value):
    return [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]


X = np.arange(-4, 4, dtype=np.float32).reshape(2, 4)


def test_shapes_are_read_in_both_spellings():
    assert parse_shapes(["x:1,3", "tf:0:2", "s:"]) == {"x": [1, 3], "tf:0": [2], "s": []}
    assert parse_shapes({"x": (1, 3)}) == parse_shapes("x:1,3") == {"x": [1, 3]}
    for wrong in (["x"], ["x:a,b"], {"x": [-1, 3]}):
        with pytest.raises(onnxslim.RecipeError):
            parse_shapes(wrong)


def test_fixed_inputs_fix_the_outputs():
    model = onnxslim.load(parser.parse_model(NET))
    fix_input_shapes(model, {"x": [2, 4]})
    proto = model.to_proto()
    assert _dims(proto.graph.input[0]) == [2, 4]
    assert _dims(proto.graph.input[1]) == ["N", 4]
    assert _dims(proto.graph.output[1]) == [2, 4]
    np.testing.assert_array_equal(_run(model, x=X, other=X)["y"], np.roll(np.maximum(X, 0), 2, 1) + X)


def test_a_fixed_size_may_be_replaced():
    text = NET.replace("float[N, 4] x", "float[3, 4] x").replace("float[N, 4] z", "float[3, 4] z")
    model = onnxslim.load(parser.parse_model(text))
    fix_input_shapes(model, {"x": [2, 4], "other": [2, 4]})
    assert [_dims(value) for value in model.to_proto().graph.output] == [[2, 4], [2, 4]]
    assert _run(model, x=X, other=X)["z"].shape == (2, 4)


def test_shapes_that_cannot_be_fixed_are_refused():
    for wrong, message in (({"nix": [1]}, "nix"), ({"x": [2, 4, 1]}, "2 dimensions")):
        with pytest.raises(onnxslim.RecipeError, match=message):
            fix_input_shapes(onnxslim.load(parser.parse_model(NET)), wrong)


def test_outputs_alone_drop_the_inputs_that_they_do_not_need():
    model = onnxslim.load(parser.parse_model(NET))
    cut(model, outputs=["z", "left"])
    assert [tensor.name for tensor in model.graph.inputs] == ["x"]
    found = _run(model, x=X)
    assert list(found) == ["z", "left"]
    np.testing.assert_array_equal(found["left"], np.maximum(X, 0)[:, :2])
    assert "Add" not in [node.op for node in model.graph.nodes]


def test_a_cut_through_one_of_two_outputs_of_a_node():
    model = onnxslim.load(parser.parse_model(NET))
    cut(model, inputs=["x", "right"], outputs=["z"])
    right = np.full((2, 2), 7, np.float32)
    np.testing.assert_array_equal(
        _run(model, x=X, right=right)["z"], -np.concatenate([right, np.maximum(X, 0)[:, :2]], 1)
    )


def test_ends_of_another_type_are_cast():
    model = onnxslim.load(parser.parse_model(NET))
    cut(model, inputs=["b:fp16"], outputs=["z:int32"])
    proto = model.to_proto()
    assert _types(proto.graph.input) == [("b", TensorProto.FLOAT16)]
    assert _types(proto.graph.output) == [("z", TensorProto.INT32)]
    np.testing.assert_array_equal(_run(model, b=X.astype(np.float16))["z"], -X.astype(np.int32))


def test_what_bodies_read_is_cut_too():
    model = onnxslim.load(parser.parse_model(LOOP))
    cut(model, inputs=["a", "b", "flag"])
    a, b = X[0], X[1]
    np.testing.assert_array_equal(_run(model, a=a, b=b, flag=np.array(False))["y"], a + b)
    with pytest.raises(onnxslim.RecipeError, match="'x'; add it"):
        cut(onnxslim.load(parser.parse_model(LOOP)), inputs=["b", "flag"])


def test_an_initializer_may_become_an_input(small):
    model = onnxslim.load(small / "model.onnx")
    cut(model, inputs=["flat", "w3"], outputs=["logits"])
    flat, weight = np.ones((2, 32), np.float32), np.ones((32, 4), np.float32)
    before = onnxslim.load(small / "model.onnx").to_proto()
    bias = next(onnx.numpy_helper.to_array(tensor) for tensor in before.graph.initializer if tensor.name == "b3")
    np.testing.assert_allclose(_run(model, flat=flat, w3=weight)["logits"], 32 + np.stack([bias, bias]), rtol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        (None, ["nix"], "unknown tensor"),
        (None, ["y:fp8"], "unknown type"),
        (["a"], ["y"], "'other'; add it"),
        (["x", "other"], ["z"], "no output depends on 'other'"),
        (None, ["y", "y"], "twice"),
        (None, ["x:fp16"], "is an input too"),
    ],
)
def test_cuts_that_make_no_sense_are_refused(inputs, outputs, message):
    with pytest.raises(onnxslim.RecipeError, match=message):
        cut(onnxslim.load(parser.parse_model(NET)), inputs, outputs)
