"""Converting a model's float type: what comes out runs, computes the same but for rounding, and is of that type."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, parser

import onnxslim
from onnxslim.float_type import convert_floats


def _convert(text, name="fp16"):
    proto = text if isinstance(text, onnx.ModelProto) else parser.parse_model(text)
    before = proto.SerializeToString()
    made = convert_floats(onnxslim.load(proto), name).to_proto()
    assert proto.SerializeToString() == before
    onnx.checker.check_model(made, full_check=True)
    return proto, made


def _run(proto, feed):
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    half = {value.name for value in proto.graph.input if value.type.tensor_type.elem_type == TensorProto.FLOAT16}
    feed = {name: value.astype(np.float16) if name in half else value for name, value in feed.items()}
    return session.run(None, feed)


def _same(text, feed, tolerance=5e-3):
    before, after = _convert(text)
    for expected, got in zip(_run(before, feed), _run(after, feed), strict=True):
        if expected.dtype == np.float32:
            assert got.dtype == np.float16
        np.testing.assert_allclose(got.astype(np.float64), expected.astype(np.float64), rtol=tolerance, atol=tolerance)
    return after


def _model(body, inputs="float[N, 4] x", outputs="float[N, 4] y", opset=17):
    return f'<ir_version: 8, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}'


X = np.linspace(-2, 3, 8).astype(np.float32).reshape(2, 4)


def test_a_trained_network_in_half(small):
    before = onnx.load(small / "model.onnx")
    with np.load(small / "eval.npz") as data:
        after = _same(before, {"image": data["image"][:4]}, 2e-2)
    assert all(tensor.data_type == TensorProto.FLOAT16 for tensor in after.graph.initializer)
    assert len(after.SerializeToString()) < 0.6 * len(before.SerializeToString())
    assert "Cast" not in {node.op_type for node in after.graph.node}


@pytest.mark.parametrize(
    "body",
    [
        "c = Constant <value_float = 1e-9> () y = Add (x, c)",
        "c = Constant <value_floats = [1.0, 2.0, 3.0, 4.0]> () y = Mul (x, c)",
        "s = Shape (x) z = ConstantOfShape (s) y = Add (x, z)",
        "i = Cast <to = 7> (x) f = Cast <to = 1> (i) y = Add (x, f)",
        "one = Constant <value_float = 1.0> () low = Constant <value_float = -1.0> () y = Clip (x, low, one)",
        "z = EyeLike <dtype = 1> (x) y = Add (x, z)",
        "m = Max (x, x) n = Min (m, x) y = Relu (n)",
        "k = Constant <value_ints = [2]> () v, i = TopK (x, k) r = ReduceSum (v) y = Add (x, r)",
    ],
)
def test_ops_that_make_or_keep_floats(body):
    _same(_model(body), {"x": X})


def test_places_that_are_float32_always_keep_it():
    scales = "roi = Constant <value_floats = [0.0]> () scales = Constant <value_floats = [1.0, 1.0, 2.0, 2.0]> ()"
    text = _model(
        f"{scales} y = Resize <mode = 'nearest'> (x, , scales)".replace("'", '"'),
        "float[1, 1, 2, 2] x",
        "float[1, 1, A, B] y",
        13,
    )
    _same(text, {"x": X.reshape(2, 1, 2, 2)[:1]})


@pytest.mark.parametrize("opset", [13, 19])
def test_quantization_takes_half_only_where_its_opset_does(opset):
    body = """s = Constant <value_float = 0.05> () z = Constant <value = uint8 {128}> ()
        q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) y = Add (d, x)"""
    after = _same(_model(body, opset=opset), {"x": X}, 0.06)
    assert (sum(node.op_type == "Cast" for node in after.graph.node) == 0) == (opset == 19)


def test_bodies_and_what_they_read_from_outside():
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[4] x, bool flag, int64 n) => (float[4] y, float[N, 4] scanned)
    {
        one = Constant <value_float = 1.0> ()
        a = Add (x, one)
        b = If (flag) <
            then_branch = t () => (float[4] u) { u = Mul (a, x) },
            else_branch = e () => (float[4] v) { h = Constant <value_float = 0.5> () r = Max (a, h) v = Identity (r) }
        >
        y, scanned = Loop (n, , b) <
            body = l (int64 i, bool c, float[4] s) => (bool d, float[4] o, float[4] p)
            { d = Identity (c) f = Cast <to = 1> (i) m = Add (s, f) o = Add (m, a) p = Identity (o) }
        >
    }"""
    for flag in (True, False):
        feed = {"x": X[0], "flag": np.array(flag), "n": np.array(3)}
        _same(text, feed, 2e-2)


def test_a_weight_read_as_both_types_is_kept_in_both():
    body = "w = Constant <value_floats = [1.0, 2.0, 3.0, 4.0]> () m = Max (x, w) a = Add (m, w) y = Relu (a)"
    slim = onnxslim.slim(parser.parse_model(_model(body)))
    _same(slim, {"x": X})


def test_recurrent_layers():
    rng = np.random.default_rng(0)
    proto = parser.parse_model(
        _model("y = LSTM <hidden_size = 8> (x, w, r)", "float[T, 1, 4] x", "float[T, 1, 1, 8] y")
    )
    for name, shape in (("w", (1, 32, 4)), ("r", (1, 32, 8))):
        value = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    after = _same(proto, {"x": rng.standard_normal((3, 1, 4)).astype(np.float32)}, 1e-2)
    assert {tensor.data_type for tensor in after.graph.initializer} == {TensorProto.FLOAT16}


def test_functions_and_unknown_operators():
    text = """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
    g (float[N] x) => (float[N] y) { y = local.twice (x) }
    <domain: "local", opset_import: ["" : 17]> twice (a) => (b)
    { h = Constant <value_float = 2.0> () t = Mul (a, h) b = Cast <to = 1> (t) }"""
    _same(text, {"x": X[0]})
    text = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
    g (float[N] x) => (float[N] y) { a = Relu (x) b = com.microsoft.QuickGelu (a) y = Neg (b) }"""
    proto = parser.parse_model(text)
    made = proto.graph.value_info.add()
    made.CopyFrom(proto.graph.output[0])
    made.name = "b"
    _same(proto, {"x": X[0]})


def test_numbers_outside_of_half_stay_finite_and_not_zero():
    body = "c = Constant <value_floats = [1e-12, -1e-12, 1e9, -1e9]> () y = Add (x, c)"
    _, after = _convert(_model(body))
    value = onnx.numpy_helper.to_array(after.graph.node[0].attribute[0].t)
    assert np.isfinite(value).all()
    np.testing.assert_array_equal(np.sign(value), [1, -1, 1, -1])


def test_back_to_single(small):
    _, half = _convert(onnx.load(small / "model.onnx"))
    _, single = _convert(half, "fp32")
    assert {value.type.tensor_type.elem_type for value in (*single.graph.input, *single.graph.output)} == {1}
    assert {tensor.data_type for tensor in single.graph.initializer} == {1}
    image = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    expected = _run(onnx.load(small / "model.onnx"), {"image": image})[0]
    np.testing.assert_allclose(_run(single, {"image": image})[0], expected, rtol=1e-2, atol=1e-2)
    text = _model(
        "h = Cast <to = 10> (x) r = Relu (h) s = Shape (x) z = ConstantOfShape <value = float16[1] {16384}> (s) "
        "a = Add (r, z) y = Cast <to = 1> (a)"
    )
    _, single = _convert(text, "float32")
    np.testing.assert_allclose(_run(single, {"x": X})[0], np.maximum(X, 0) + 2)


def test_sequences_are_of_the_new_type():
    body = "e = SequenceEmpty <dtype = 1> () s = SequenceInsert (e, x) z = Constant <value_ints = [0]> () "
    _same(_model(body + "i = Squeeze (z) y = SequenceAt (s, i)"), {"x": X})


def test_opsets_without_a_cast_by_number_are_refused():
    with pytest.raises(onnxslim.RecipeError, match="opset is 5"):
        convert_floats(onnxslim.load(parser.parse_model(_model("y = Relu (x)", opset=5))), "fp16")


def test_other_types_are_refused(small):
    with pytest.raises(onnxslim.RecipeError, match="quantize-static"):
        convert_floats(onnxslim.load(small / "model.onnx"), "int8")
