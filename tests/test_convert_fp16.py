"""float16: what is converted computes the same but for rounding, in ONNX Runtime and in true half precision."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from onnxslim.data import open_dataset
from onnxslim.model import load
from onnxslim.passes.base import Context, Outcome
from onnxslim.passes.convert_fp16 import ConvertFp16
from onnxslim.runtime import Session

IR = {9: 4, 13: 7, 17: 8, 21: 10, 23: 11}
SIZE = 64


def make_model(text, weights=None, *, inputs="float[N, 64] x", outputs="float[N, 64] y", opset=17):
    """A model from its text, with more initializers; ``w`` ``[64, 64]`` is always there."""
    proto = parser.parse_model(
        f'<ir_version: {IR[opset]}, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) {{ {text} }}'
    )
    values = {"w": np.random.default_rng(0).normal(size=(SIZE, SIZE)).astype(np.float32) / 8} | (weights or {})
    proto.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    onnx.checker.check_model(proto, full_check=True)
    return proto


def convert(proto, data=None, **options):
    model = load(proto)
    calibration = open_dataset(data, Session(model).specs) if data else None
    outcome = ConvertFp16(**options).run(model, Context(calibration=calibration))
    made = model.to_proto()
    onnx.checker.check_model(made, full_check=True)
    assert [(v.name, v.type) for v in made.graph.input] == [(v.name, v.type) for v in proto.graph.input]
    assert [v.name for v in made.graph.output] == [v.name for v in proto.graph.output]
    kinds = [v.type.tensor_type.elem_type for v in made.graph.output]
    assert kinds == [v.type.tensor_type.elem_type for v in proto.graph.output]
    return made, outcome


def same(proto, made, feed, tolerance=5e-3):
    """Outputs agree in ONNX Runtime, and in the reference, which rounds after every op as a GPU does."""
    wanted = Session(load(proto)).run(feed)
    answers = [Session(load(made)).run(feed)]
    if not any(node.op_type == "Loop" for node in nested(proto.graph)):  # the reference runs no Loop in a branch right
        answers.append(dict(zip(wanted, ReferenceEvaluator(made).run(list(wanted), feed), strict=True)))
    for results in answers:
        for name, value in wanted.items():
            assert results[name].dtype == value.dtype
            scale = np.abs(value).max(initial=1e-3)
            np.testing.assert_allclose(results[name], value, rtol=tolerance, atol=tolerance * scale)


def nested(graph):
    """The nodes of a graph and of all bodies in it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nested(attribute.g)


def x(rows=3, scale=1.0, seed=1):
    return (np.random.default_rng(seed).normal(size=(rows, SIZE)) * scale).astype(np.float32)


def half_nodes(proto):
    """The names of what computes in float16."""
    types = {v.name: v.type.tensor_type.elem_type for v in onnx.shape_inference.infer_shapes(proto).graph.value_info}
    return {n.name for n in proto.graph.node if n.op_type != "Cast" and types.get(n.output[0]) == TensorProto.FLOAT16}


def stored(proto):
    return {tensor.name: tensor.data_type for tensor in proto.graph.initializer}


def whys(outcome):
    return " | ".join(f"{refusal.node}: {refusal.why}" for refusal in outcome.refusals)


def transformer(opset=17):
    """One attention head with a mask and a norm of primitive ops, and a lookup, as exporters write them."""
    text = """
        [embed] e = Gather (table, ids)
        [query] q = MatMul (e, w) [key] k = MatMul (e, v) [turn] t = Transpose <perm = [0, 2, 1]> (k)
        [scores] s = MatMul (q, t) [scale] d = Div (s, eight)
        [real] f = Cast <to = 1> (keep) [not] i = Sub (one, f) [mask] m = Mul (i, low)
        [masked] a = Add (d, m) [softmax] p = Softmax <axis = 2> (a)
        [mix] c = MatMul (p, e) [residual] r = Add (c, e)
        [mean] mu = ReduceMean <axes = [2]> (r) [centre] z = Sub (r, mu) [square] zz = Mul (z, z)
        [variance] var = ReduceMean <axes = [2]> (zz) [epsilon] ve = Add (var, eps) [root] sd = Sqrt (ve)
        [norm] y = Div (z, sd)
    """
    rng = np.random.default_rng(3)
    weights = {
        "table": rng.normal(size=(50, SIZE)).astype(np.float32),
        "v": rng.normal(size=(SIZE, SIZE)).astype(np.float32) / 8,
        "eight": np.float32(8),
        "one": np.float32(1),
        "low": np.finfo(np.float32).min,
        "eps": np.float32(1e-12),
    }
    if opset >= 18:
        text, weights["axes"] = text.replace("<axes = [2]> (r)", "(r, axes)"), np.array([2])
        text = text.replace("<axes = [2]> (zz)", "(zz, axes)")
    inputs = "int64[B, T] ids, int64[B, 1, T] keep"
    return make_model(text, weights, inputs=inputs, outputs="float[B, T, 64] y", opset=opset)


def tokens():
    keep = np.ones((2, 1, 7), np.int64)
    keep[0, 0, 4:] = 0
    keep[1] = 0  # nothing to look at
    return {"ids": np.arange(14).reshape(2, 7) * 3 % 50, "keep": keep}


@pytest.mark.parametrize("opset", [9, 13, 17, 21, 23])
def test_a_transformer_keeps_its_mask_and_its_epsilon(opset):
    proto = transformer(opset)
    made, outcome = convert(proto)
    same(proto, made, tokens(), 2e-2)
    half = half_nodes(made)
    assert {"query", "key", "scores", "mix"} <= half
    assert not {"mask", "masked", "epsilon", "root"} & half
    assert "mask: Mul: " in whys(outcome)
    assert {kind for name, kind in stored(made).items() if name in ("w", "v", "table")} == {TensorProto.FLOAT16}
    assert len(made.SerializeToString()) < 0.6 * len(proto.SerializeToString())


def test_rows_without_variance_stay_finite():
    proto = transformer()
    table = next(tensor for tensor in proto.graph.initializer if tensor.name == "table")
    table.CopyFrom(numpy_helper.from_array(np.zeros((50, SIZE), np.float32), "table"))
    made, _ = convert(proto)
    same(proto, made, tokens())


def test_one_cast_where_types_meet():
    text = "[a] a = MatMul (x, w) [b] b = Exp (a) [c] c = Exp (a) [d] d = Add (b, c) [e] y = MatMul (d, w)"
    proto = make_model(text)
    made, _ = convert(proto, keep_float=("Exp", "d"))
    assert [node.op_type for node in made.graph.node].count("Cast") == 4  # in, to float32, back, out
    same(proto, made, {"x": x()}, 2e-2)


def test_inputs_and_outputs_that_float32_nodes_touch_have_no_cast():
    proto = make_model("[a] a = Exp (x) [b] b = MatMul (a, w) [c] y = Exp (b)")
    made, _ = convert(proto, keep_float=("Exp",))
    assert [node.op_type for node in made.graph.node] == ["Exp", "Cast", "MatMul", "Cast", "Exp"]
    same(proto, made, {"x": x(scale=0.3)}, 2e-2)


def test_an_output_that_is_also_read_and_one_that_is_an_input():
    proto = make_model(
        "[a] a = MatMul (x, w) [b] b = Exp (a) [c] y = MatMul (a, w)",
        outputs="float[N, 64] y, float[N, 64] a, float[N, 64] b",
    )
    for options in ({}, {"keep_float": ("Exp",)}, {"keep_float": ("a",)}, {"compute": "float32"}):
        made, _ = convert(proto, **options)
        same(proto, made, {"x": x()}, 1e-2)


@pytest.mark.parametrize("value", [1e5, 1e-7, 4097.0])
def test_constants_that_do_not_fit_keep_their_op(value):
    proto = make_model("[a] a = MatMul (x, w) [b] b = Mul (a, c) [d] y = Div (b, c)", {"c": np.float32(value)})
    made, outcome = convert(proto)
    assert stored(made)["c"] == TensorProto.FLOAT
    assert "a" in half_nodes(made)
    assert not {"b", "d"} & half_nodes(made)
    assert "c" in whys(outcome)
    same(proto, made, {"x": x()})


def test_weights_that_do_not_fit_stay():
    big = np.full((SIZE, SIZE), 7e4, np.float32)
    tiny = np.full((SIZE, SIZE), 1e-9, np.float32)
    proto = make_model(
        "[a] a = MatMul (x, w) [b] b = MatMul (a, big) [c] y = MatMul (b, tiny)", {"big": big, "tiny": tiny}
    )
    made, _ = convert(proto)
    assert stored(made)["big"] == stored(made)["tiny"] == TensorProto.FLOAT
    same(proto, made, {"x": x()}, 2e-2)


def test_bounds_of_clip_do_not_hold_it_back():
    text = "[a] a = MatMul (x, w) [b] b = Clip (a, low, high) [c] y = MatMul (b, w)"
    proto = make_model(text, {"low": np.float32(0), "high": np.float32(np.finfo(np.float32).max)})
    made, _ = convert(proto)
    assert "b" in half_nodes(made)
    same(proto, made, {"x": x()}, 1e-2)


def test_calibration_shows_what_overflows():
    proto = make_model("[a] a = MatMul (x, w) [b] b = Mul (a, a) [c] c = Sqrt (b) [d] y = MatMul (c, w)")
    data = [{"x": x(scale=800, seed=seed)} for seed in range(4)]
    blind, _ = convert(proto)
    assert not np.isfinite(ReferenceEvaluator(blind).run(None, data[0])[0]).all()  # the trap is one
    made, outcome = convert(proto, data)
    assert not {"b", "c"} & half_nodes(made)
    assert "on calibration data" in whys(outcome)
    same(proto, made, data[0], 1e-2)


def test_sizes_are_computed_in_float32():
    text = """
        [shape] s = Shape (x) [first] n = Gather (s, zero) [real] f = Cast <to = 1> (n) [half] h = Mul (f, share)
        [floor] g = Floor (h) [count] k = Cast <to = 7> (g) [row] l = Unsqueeze (k, zeros)
        [cut] c = Slice (x, zeros, l, zeros) [product] y = MatMul (c, w)
    """
    weights = {"zero": np.array(0), "zeros": np.array([0]), "share": np.float32(0.5)}
    proto = make_model(text, weights, outputs="float[M, 64] y")
    made, outcome = convert(proto)
    assert "half: Mul: it computes with sizes" in whys(outcome)
    same(proto, made, {"x": x(4099 * 2)})  # half of it is no float16


def branches(extra=""):
    """An If with a weight of the main graph, one of its own and, in a branch, a Loop that adds up."""
    own = numpy_helper.from_array(np.random.default_rng(5).normal(size=(SIZE, SIZE)).astype(np.float32) / 8, "own")
    state = [("i", TensorProto.INT64, []), ("go", TensorProto.BOOL, []), ("s", TensorProto.FLOAT, ["n", SIZE])]
    loop = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["on"]),
            helper.make_node("MatMul", ["s", "w"], ["p"], "step"),
            helper.make_node("Tanh", ["p"], ["t"], "tanh"),
            helper.make_node("Add", ["t", "h"], ["next"], "add"),
        ],
        "loop",
        [helper.make_tensor_value_info(*each) for each in state],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, ["n", SIZE]),
        ],
    )
    bodies = {
        "then_branch": [helper.make_node("Loop", ["times", "", "h"], ["then_branch"], "loop", body=loop)],
        "else_branch": [
            helper.make_node("MatMul", ["x", "own"], ["m"], "own product"),
            helper.make_node("Exp", ["m"], ["else_branch"], "exp"),
        ],
    }
    graphs = {
        name: helper.make_graph(
            nodes,
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", SIZE])],
            [own] if name == "else_branch" else [],
        )
        for name, nodes in bodies.items()
    }
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"], "first"), helper.make_node("If", ["c"], ["y"], "if", **graphs)],
        "g",
        [
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", SIZE]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", SIZE])],
        [
            numpy_helper.from_array(np.random.default_rng(0).normal(size=(SIZE, SIZE)).astype(np.float32) / 8, "w"),
            numpy_helper.from_array(np.array(3), "times"),
        ],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(proto, full_check=True)
    return proto


@pytest.mark.parametrize(
    "options", [{}, {"keep_float": ("Exp", "tanh")}, {"keep_float": ("if",)}, {"compute": "float32"}]
)
def test_bodies(options):
    proto = branches()
    made, outcome = convert(proto, **options)
    assert outcome.modified
    if "if" not in options.get("keep_float", ()):
        assert len(made.SerializeToString()) < 0.65 * len(proto.SerializeToString())
    for flag in (True, False):
        same(proto, made, {"c": np.array(flag), "x": x()}, 2e-2)


def test_numbers_beyond_float16_do_not_cross_the_border_of_a_body():
    proto = branches()
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(1e6), "c6"))
    proto.graph.node[0].output[0] = "h0"
    proto.graph.node.insert(1, helper.make_node("Mul", ["h0", "c6"], ["h6"], "big"))
    proto.graph.node.insert(2, helper.make_node("Add", ["h6", "h0"], ["h"], "more"))
    made, outcome = convert(proto)
    assert outcome.modified
    for flag in (True, False):
        same(proto, made, {"c": np.array(flag), "x": x()})


def carrying(then, before="h = Identity (x)", after="y = MatMul (r, w)", other="z = Identity (h)"):
    """An If whose branches hand numbers on; ``big`` is 1e6."""
    text = f"""
        {before} r = If (c) <then_branch = t () => (float[N, 64] u) {{ {then} }},
        else_branch = e () => (float[N, 64] z) {{ {other} }}> {after}
    """
    return make_model(text, {"big": np.float32(1e6)}, inputs="bool c, float[N, 64] x")


@pytest.mark.parametrize("calibrate", [True, False])
@pytest.mark.parametrize(
    "proto",
    [
        carrying("u = Mul (h, big)", after="k = Div (r, big) y = MatMul (k, w)"),
        carrying("u = Mul (h, big)"),
        carrying("v = Mul (h, big) u = Tanh (v)"),
        carrying("u = Div (h, big)", before="h = Mul (x, big)"),
        carrying("u = Identity (h)", before="h = Mul (x, big)", after="k = Div (r, big) y = MatMul (k, w)"),
    ],
)
def test_numbers_beyond_float16_are_followed_into_branches_and_out(proto, calibrate):
    feeds = [{"c": np.array(flag), "x": x()} for flag in (True, False)]
    made, outcome = convert(proto, feeds if calibrate else None)
    assert outcome.modified
    for feed in feeds:
        same(proto, made, feed, 1e-2)


def test_numbers_that_grow_in_a_loop_are_followed():
    text = """
        r, s = Loop (times, , x, x) <body = b (int64 i, bool go, float[N, 64] p, float[N, 64] q)
            => (bool on, float[N, 64] next, float[N, 64] held) {
                on = Identity (go) held = Mul (p, big) d = Div (q, big) next = Tanh (d) }>
        k = Div (s, big) l = Add (k, r) y = MatMul (l, w)
    """
    proto = make_model(text, {"big": np.float32(1e6), "times": np.array(4)})
    made, outcome = convert(proto)
    assert outcome.modified
    same(proto, made, {"x": x()}, 1e-2)


def test_convolutions_and_shared_weights():
    text = """
        a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, k, b) r = Relu (a) p = GlobalAveragePool (r)
        f = Flatten (p) m = MatMul (f, w) y = Gemm <transB = 1> (m, w)
    """
    rng = np.random.default_rng(4)
    weights = {"k": rng.normal(size=(64, 3, 3, 3)).astype(np.float32), "b": rng.normal(size=64).astype(np.float32)}
    proto = make_model(text, weights, inputs="float[N, 3, 9, 9] x")
    made, outcome = convert(proto)
    assert outcome.numbers["ratio of weights"] == 2
    same(proto, made, {"x": rng.normal(size=(2, 3, 9, 9)).astype(np.float32)}, 1e-2)


def test_only_storage():
    proto = transformer()
    made, outcome = convert(proto, compute="float32")
    assert not half_nodes(made) - {"embed"}
    assert outcome.numbers["nodes in float16"] == 0
    assert len(made.SerializeToString()) < 0.6 * len(proto.SerializeToString())
    same(proto, made, tokens())


def test_what_is_kept_by_name_keeps_its_weight():
    proto = make_model("[a] a = MatMul (x, w) [b] y = MatMul (a, v)", {"v": np.eye(SIZE, dtype=np.float32) / 3})
    made, outcome = convert(proto, keep_float=("b",))
    assert stored(made) == {"w": TensorProto.FLOAT16, "v": TensorProto.FLOAT}
    assert "b: MatMul: it is excluded" in whys(outcome)


def test_quantized_layers_stay_as_runtimes_fuse_them():
    text = """
        [xq] q = QuantizeLinear (x, s, z) [xd] d = DequantizeLinear (q, s, z) [wd] e = DequantizeLinear (w8, s, zw)
        [a] a = MatMul (d, e) [yq] aq = QuantizeLinear (a, s, z) [yd] ad = DequantizeLinear (aq, s, z)
        [b] b = MatMul (ad, w) [c] y = MatMul (b, w)
    """
    rng = np.random.default_rng(0)
    weights = {
        "s": np.float32(0.04),
        "z": np.uint8(128),
        "zw": np.int8(0),
        "w8": rng.integers(-50, 50, (SIZE, SIZE)).astype(np.int8),
    }
    proto = make_model(text, weights, opset=21)
    made, _ = convert(proto)
    assert half_nodes(made) <= {"c"}
    same(proto, made, {"x": x()})


def test_nothing_to_convert_leaves_the_model_alone():
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N] x) => (float[N] y) { y = Relu (x) }'
    )
    made, outcome = convert(proto)
    assert not outcome.modified
    assert "no float32 weights" in whys(outcome)
    assert [node.op_type for node in made.graph.node] == ["Relu"]


def test_weaker_ends_with_storage_only():
    step = ConvertFp16(keep_float=("mine",))
    steps = [step]
    while (step := step.weaker(Outcome())) is not None:
        steps.append(step)
    assert ["mine" in each.keep_float for each in steps] == [True] * 3
    assert "Softmax" in steps[1].keep_float
    assert [each.compute for each in steps] == ["float16", "float16", "float32"]
