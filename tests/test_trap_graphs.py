"""Traps around the graph itself: bodies, names, boundaries, what is random, and files that would grow."""

import numpy as np
import onnx
import pytest
from equivalence import Runtime, same_bits, simplified
from onnx import TensorProto, helper, numpy_helper
from rewriting import ops, parse, plain

from onnxslim.graph.cost import node_macs
from onnxslim.graph.shapes import infer_shapes
from onnxslim.model import load


def _check(source: onnx.ModelProto, *feeds: dict[str, np.ndarray]) -> onnx.ModelProto:
    """Simplify without a guard; the interface and the bits must stay; return the result."""
    onnx.checker.check_model(source, full_check=True)
    result, _ = simplified(source)
    onnx.checker.check_model(result, full_check=True)
    assert list(result.graph.output) == list(source.graph.output)
    assert _inputs(result) == _inputs(source)
    before, after = Runtime(source), Runtime(result)
    for feed in feeds:
        for wanted, got in zip(before.run(feed), after.run(feed), strict=True):
            assert wanted.dtype == got.dtype
            assert wanted.shape == got.shape
            assert same_bits(wanted, got), onnx.printer.to_text(result)
    return result


def _inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs; before IR version 4 without the initializers, each of which had to be one too."""
    constants = {tensor.name for tensor in model.graph.initializer} if model.ir_version < 4 else set()
    return [tensor for tensor in model.graph.input if tensor.name not in constants]


# ---------------------------------------------------------------------------------------- what must not be merged or go

RANDOM = {
    "normal": "RandomNormal<shape = [64], seed = 1.0>()",
    "uniform": "RandomUniform<shape = [64]>()",
    "normal-like": "RandomNormalLike(x)",
    "uniform-like": "RandomUniformLike(x)",
    "bernoulli": "Bernoulli(p)",
}


@pytest.mark.parametrize("name", RANDOM)
def test_equal_random_operators_draw_apart(name):
    """They read the same and say the same, and still give different numbers, also when what they read is constant."""
    text = f"g (float[64] x) => (float[64] y, float[64] z) {{ p = Sigmoid(c) y = {RANDOM[name]} z = {RANDOM[name]} }}"
    result, _ = simplified(parse(text, c=plain(64)))
    op = RANDOM[name].split("<")[0].split("(")[0]
    assert ops(result)[op] == 2


def test_dropout_in_training_mode_stays():
    text = "g (float[n] x) => (float[n] y, float[n] z) { y = Dropout(x, r, t) z = Dropout(x, r, t) }"
    result, _ = simplified(parse(text, r=np.float32(0.5), t=np.array(True)))
    assert ops(result)["Dropout"] == 2


def test_dropout_out_of_training_mode_goes():
    text = "g (float[n] x) => (float[n] y, bool[n] m) { h, m = Dropout(x, r, t) y = Exp(h) }"
    result = _check(parse(text, r=np.float32(0.5), t=np.array(False)), {"x": plain(4)}, {"x": plain(0)})
    assert ops(result)["Exp"] == 1


def test_unknown_operators_are_neither_folded_merged_nor_dropped():
    text = (
        "g (float[n] x) => (float[n] y) { a = custom.Draw(c) b = custom.Draw(c) s = Add(a, b) "
        "dead = custom.Log(x) y = Add(x, s) }"
    )
    source = parse(text, domains=', "custom" : 1', c=plain(4))
    result, _ = simplified(source)
    assert ops(result)["Draw"] == 2
    assert ops(result)["Log"] == 1
    assert {entry.domain for entry in result.opset_import} == {"", "custom"}


def test_a_draw_inside_a_body_or_a_function_counts():
    text = (
        "g (float[64] x, bool c) => (float[64] y, float[64] z) "
        "{ y = If(c) <then_branch = t () => (float[64] r) { r = RandomNormalLike(x) }, "
        "else_branch = e () => (float[64] s) { s = Neg(x) }> z = If(c) <then_branch = t () => (float[64] r) "
        "{ r = RandomNormalLike(x) }, else_branch = e () => (float[64] s) { s = Neg(x) }> }"
    )
    result, _ = simplified(parse(text))
    assert ops(result)["If"] == 2
    functions = '<domain: "local", opset_import: ["" : 17]> draw (x) => (y) { y = RandomNormalLike(x) }'
    text = "g (float[64] x) => (float[64] y, float[64] z) { y = local.draw(x) z = local.draw(x) }"
    result, _ = simplified(parse(text, functions=functions, domains=', "local" : 1'))
    assert ops(result)["draw"] == 2 or ops(result)["RandomNormalLike"] == 2


# ------------------------------------------------------------------------------------------------------------- bodies


def test_an_inlined_branch_keeps_to_its_own_names():
    """Both branches, and the graph outside, use the names that the inlined one brings along."""
    text = (
        "g (float[n] x) => (float[n] y, float[n] h) { c = Constant<value = bool {1}>() "
        "w = If(c) <then_branch = t () => (float[n] b) { a = Neg(x) b = Exp(a) }, "
        "else_branch = e () => (float[n] b) { a = Abs(x) b = Relu(a) }> "
        "v = If(c) <then_branch = t () => (float[n] b) { a = Abs(w) b = Sqrt(a) }, "
        "else_branch = e () => (float[n] b) { b = Identity(x) }> y = Identity(v) h = Identity(w) }"
    )
    result = _check(parse(text), {"x": plain(4)}, {"x": plain(0)})
    assert ops(result)["If"] == 0


def test_siblings_may_hold_initializers_of_one_name():
    def branch(name: str, value: float) -> onnx.GraphProto:
        node = helper.make_node("Add", ["x", "k"], ["r"])
        output = helper.make_tensor_value_info("r", TensorProto.FLOAT, None)
        return helper.make_graph([node], name, [], [output], [numpy_helper.from_array(np.float32([value]), "k")])

    node = helper.make_node("If", ["c"], ["y"], then_branch=branch("t", 1.0), else_branch=branch("e", 2.0))
    inputs = [helper.make_tensor_value_info("x", 1, ["n"]), helper.make_tensor_value_info("c", 9, [])]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", 1, ["n"])])
    source = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    result = _check(source, *({"x": plain(3), "c": np.array(c)} for c in (True, False)))
    assert ops(result)["If"] == 1


def test_equal_nodes_of_two_branches_run_only_where_they_did():
    text = (
        "g (float[n] x, bool c) => (float[n] y) "
        "{ y = If(c) <then_branch = t () => (float[n] r) { a = Exp(x) r = Neg(a) }, "
        "else_branch = e () => (float[n] s) { a = Exp(x) s = Abs(a) }> }"
    )
    _check(parse(text), *({"x": plain(4), "c": np.array(c)} for c in (True, False)))


LOOP = (
    "g (float[n] x, int64 m) => (float[n] y, float[k, n] s) { one = Constant<value = float {1}>() "
    "unused = Neg(x) y, s = Loop(m, , x) "
    "<body = b (int64 i, bool go, float[n] v) => (bool next, float[n] w, float[n] o) "
    "{ next = Identity(go) e = Exp(x) f = Cast<to = 1>(i) d = Mul(e, f) w = Add(v, d) o = Mul(v, one) }> }"
)


def test_a_loop_reads_what_is_outside_every_time():
    """What depends on the counter or the state is not constant, though nothing outside changes."""
    feeds = [{"x": plain(3), "m": np.array(trips)} for trips in (0, 1, 3)]
    _check(parse(LOOP), *feeds, {"x": plain(0), "m": np.array(2)})


def test_a_dead_loop_goes_with_all_that_only_it_reads():
    text = (
        "g (float[n] x) => (float[n] y) { t = Constant<value = int64 {3}>() a = Exp(x) "
        "dead = Loop(t, , a) <body = b (int64 i, bool go, float[n] v) => (bool next, float[n] w) "
        "{ next = Identity(go) w = Add(v, a) }> y = Neg(x) }"
    )
    assert ops(_check(parse(text), {"x": plain(3)})) == {"Neg": 1}


def test_a_loop_that_stops_by_its_condition_keeps_it():
    text = (
        "g (float x, float limit) => (float y) { t = Constant<value = int64 {9}>() "
        "y = Loop(t, , x) <body = b (int64 i, bool go, float v) => (bool next, float w) "
        "{ w = Add(v, v) next = Less(w, limit) }> }"
    )
    _check(
        parse(text), *({"x": np.array(1, np.float32), "limit": np.array(limit, np.float32)} for limit in (0, 3, 1e9))
    )


def test_a_function_is_simplified_for_all_its_callers():
    """Its argument is constant in one call only, and its attribute differs between the calls."""
    functions = (
        '<domain: "local", opset_import: ["" : 17]> leak <slope> (x) => (y) '
        "{ h = Identity(x) k = Cast<to = 1>(h) y = LeakyRelu<alpha: float = @slope>(k) }"
    )
    text = (
        "g (float[n] x) => (float[n] y) "
        "{ a = local.leak<slope = 0.5>(x) b = local.leak<slope = 0.25>(c) y = Add(a, b) }"
    )
    source = parse(text, functions=functions, domains=', "local" : 1', c=-plain(1))
    _check(source, {"x": plain(4)}, {"x": plain(0)})


def test_functions_and_operator_sets_that_nothing_uses_go():
    functions = '<domain: "local", opset_import: ["" : 17]> f (x) => (y) { y = Relu(x) }'
    source = parse("g (float[n] x) => (float[n] y) { y = Neg(x) }", functions=functions, domains=', "local" : 1')
    result = _check(source, {"x": plain(3)})
    assert not result.functions
    assert [entry.domain for entry in result.opset_import] == [""]


@pytest.mark.parametrize(
    "body",
    {
        "carried": "(bool keep, float[2] v, float[2] v) { keep = Identity(go) }",
        "copied": "(bool keep, float[2] w, float[2] w) { keep = Identity(go) w = Identity(v) }",
        "nested": "(bool keep, float[2] v, float[2] w) { keep = Identity(go) w = If(go) <then_branch = t () => "
        "(float[2] r) { r = Neg(v) }, else_branch = e () => (float[2] s) { s = Abs(v) }> }",
    }.values(),
)
def test_what_a_loop_carries_stays_where_another_output_of_its_body_needs_it(body):
    text = (
        "g (int64 m, float[2] x) => (float[k, 2] s) { c = Constant<value = bool {1}>() "
        f"last, s = Loop(m, c, x) <body = b (int64 i, bool go, float[2] v) => {body}> }}"
    )
    _check(parse(text), *({"m": np.array(count), "x": plain(2)} for count in (0, 1, 3)))


def test_a_loop_may_carry_what_ends_it():
    text = (
        "g (int64 m, bool c, float[2] x) => (float[2] y) { last, y = Loop(m, c, c, x) "
        "<body = b (int64 i, bool go, bool v, float[2] w) => (bool v, bool v, float[2] z) { z = Neg(w) }> }"
    )
    feeds = [{"m": np.array(3), "c": np.array(c), "x": plain(2)} for c in (True, False)]
    _check(parse(text), *feeds)


@pytest.mark.parametrize("number", ["int64[1] i, bool", "int64 i, bool[1]"])
def test_a_loop_may_count_in_vectors_of_one(number):
    condition = "bool[1]" if number.endswith("[1]") else "bool"
    text = (
        f"g (int64 m, float[2] x) => (int64[k, r] s, int64[l, q] t) {{ c = Constant<value = {condition} {{1}}>() "
        f"y, s, t = Loop(m, c, x) <body = b ({number} go, float[2] v) => "
        f"({condition} keep, float[2] w, int64[a] si, int64[d] sg) "
        "{ keep = Identity(go) w = Neg(v) si = Shape(i) sg = Shape(go) }> }"
    )
    source = parse(text)
    result, _ = simplified(source)
    feed = {"m": np.array(2), "x": plain(2)}
    for wanted, got in zip(Runtime(source).run(feed), Runtime(result).run(feed), strict=True):
        assert np.array_equal(wanted, got)


def test_a_sequence_split_by_one_may_lose_its_axis():
    text = (
        "g (float[n, 3] x) => (int64[a] y) { s = SplitToSequence<axis = 1, keepdims = 0>(x, one) "
        "p = SequenceAt(s, one) y = Shape(p) }"
    )
    source = parse(text, one=np.array(1))
    result, _ = simplified(source)
    feed = {"x": plain(2, 3)}
    assert np.array_equal(Runtime(source).run(feed)[0], Runtime(result).run(feed)[0])


@pytest.mark.parametrize("linear", [True, False])
def test_sparse_initializers_stay_sparse(linear):
    places = [0, 4] if linear else [0, 0, 1, 1]
    source = parse(
        "g (float[3, 3] x) => (float[3, 3] y, float[3, 3] z) { h = Add(x, s) y = Mul(h, two) m = MatMul(x, s) "
        "z = Mul(m, two) }",
        two=np.float32(2),
    )
    values = helper.make_tensor("s", TensorProto.FLOAT, [2], [1.0, 2.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [2] if linear else [2, 2], places)
    source.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [3, 3]))
    result, _ = simplified(source)
    assert [tensor.values.name for tensor in result.graph.sparse_initializer] == ["s"]
    for wanted, got in zip(
        Runtime(source).run({"x": plain(3, 3)}), Runtime(result).run({"x": plain(3, 3)}), strict=True
    ):
        assert same_bits(wanted, got)


# ---------------------------------------------------------------------------------------------------------- boundaries


def test_an_input_that_is_an_output_and_two_outputs_of_one_tensor():
    text = "g (float[n] x) => (float[n] x, float[n] y, float[n] z, float[n] u) { h = Neg(x) y = Identity(h) z = Identity(h) u = Exp(y) }"  # noqa: E501
    source = parse(text)
    result = _check(source, {"x": plain(3)}, {"x": plain(0)})
    assert [output.name for output in result.graph.output] == ["x", "y", "z", "u"]


def test_a_constant_that_is_an_output_stays_one():
    text = "g (float[n] x) => (float[2] c, float[2] k, float[n] y) { k = Neg(c) y = Neg(x) }"
    _check(parse(text, c=plain(2)), {"x": plain(3)})


def test_a_tensor_on_the_way_that_is_an_output_keeps_its_value():
    text = "g (float[n, 2] x) => (float[2, n] t, float[n, 2] y) { t = Transpose(x) h = Relu(t) y = Transpose(h) }"
    _check(parse(text), {"x": plain(3, 2)}, {"x": plain(0, 2)})


def test_empty_optional_inputs_stay_empty():
    """An empty name is no tensor: two nodes do not share it, and nothing folds because of it."""
    text = "g (float[n] x) => (float[n] y, float[n] z) { y = Clip(x, , c) z = Clip(x, c, ) }"
    _check(parse(text, c=np.float32(0.5)), {"x": plain(5)})


@pytest.mark.parametrize("version", [3, 8])
def test_initializers_that_are_inputs(version):
    """From IR version 4 on a caller may override them; before, every initializer had to be one."""
    source = parse(
        "g (float[n] x) => (float[n] y) { h = Mul(x, one) k = Neg(h) y = Neg(k) }", 9, one=np.ones(1, np.float32)
    )
    source.ir_version = version
    source.graph.input.append(helper.make_tensor_value_info("one", 1, [1]))
    feeds = [{"x": plain(3)}, {"x": plain(3), "one": np.float32([3])}]
    result = _check(source, *feeds[: 1 if version == 3 else 2])
    assert ops(result)["Mul"] == (0 if version == 3 else 1)


def test_names_with_odd_characters():
    source = parse("g (float[n] x) => (float[n] y) { a = Exp(x) b = Identity(a) c = Exp(x) d = Add(b, c) y = Neg(d) }")
    renames = {"a": "a/b:0", "b": "ü \n", "c": "'; --", "d": "{d}", "x": "x y", "y": "y[0]"}
    for node in source.graph.node:
        for names in (node.input, node.output):
            names[:] = [renames[name] for name in names]
    source.graph.input[0].name, source.graph.output[0].name = renames["x"], renames["y"]
    result = _check(source, {"x y": plain(3)})
    assert ops(result)["Exp"] == 1


def test_what_is_written_beside_the_graph_stays():
    """Metadata, doc strings and symbolic dimensions are what other tools and people go by."""
    source = parse("g (float[batch, 3] x) => (float[batch, rest] y) { i = Identity(x) h = Neg(i) y = Abs(h) }")
    source.doc_string, source.producer_name, source.graph.doc_string = "model", "me", "graph"
    source.metadata_props.add(key="labels", value="cat,dog")
    source.graph.metadata_props.add(key="part", value="head")
    source.graph.node[1].metadata_props.add(key="from", value="layer 1")
    source.graph.node[1].doc_string = "why"
    result = _check(source, {"x": plain(2, 3)})
    assert (result.doc_string, result.producer_name, result.graph.doc_string) == ("model", "me", "graph")
    assert list(result.metadata_props) == list(source.metadata_props)
    assert list(result.graph.metadata_props) == list(source.graph.metadata_props)
    (node,) = [node for node in result.graph.node if node.op_type == "Neg"]
    assert node.doc_string == "why"
    assert list(node.metadata_props) == list(source.graph.node[1].metadata_props)


def test_macs_of_nodes_that_lack_inputs_are_not_known():
    nodes = [helper.make_node("Conv", ["x"], ["a"]), helper.make_node("LSTM", ["x", "w"], ["b"])]
    model = load(helper.make_model(helper.make_graph(nodes, "g", [], []), ir_version=8))
    shapes = infer_shapes(model)
    assert [node_macs(node, shapes) for node in model.graph.nodes] == [None, None]


# ------------------------------------------------------------------------------------------------------ files that grow

GROWING = {
    "constant-of-shape": ("s = Constant<value = int64[2] {4096, 4096}>() k = ConstantOfShape(s)", {}),
    "expand": ("s = Constant<value = int64[2] {4096, 4096}>() k = Expand(c, s)", {"c": plain(1)}),
    "tile": ("s = Constant<value = int64[2] {4096, 4096}>() k = Tile(c, s)", {"c": plain(1, 1)}),
    "range": (
        "b = Constant<value = float {0}>() e = Constant<value = float {4194304}>() d = Constant<value = float {1}>() "
        "k = Range(b, e, d)",
        {},
    ),
    "outer-product": ("k = Mul(a, b)", {"a": plain(2048, 1), "b": plain(1, 2048)}),
    "factor-pair": ("k = MatMul(a, b)", {"a": plain(1024, 4), "b": plain(4, 1024)}),
    "one-hot": ("i = Constant<value = int64[1] {3}>() d = Constant<value = int64 {1048576}>() k = OneHot(i, d, v)",
                {"v": np.float32([0, 1])}),
    "cast-to-wider": ("k = Cast<to = 1>(w)", {"w": plain(256, 256).astype(np.float16)}),
    "dequantized": ("k = DequantizeLinear(q, s)", {"q": np.arange(65536).reshape(256, 256).astype(np.int8),
                                                    "s": np.float32(0.1)}),
    "codebook": ("k = Gather(t, i)", {"t": plain(16), "i": np.arange(65536).reshape(256, 256).astype(np.int32) % 16}),
    "eye": ("e = EyeLike<dtype = 1>(z) k = Add(e, e)", {"z": np.zeros((1, 1), np.float32)}),
}  # fmt: skip


@pytest.mark.parametrize("name", GROWING)
def test_no_file_grows(name):
    """What a short recipe makes stays a recipe where the result would be larger."""
    body, arrays = GROWING[name]
    source = parse(f"g (float x) => (float y) {{ {body} l = ReduceMax<keepdims = 0>(k) y = Add(l, x) }}", **arrays)
    result, _ = simplified(source)
    onnx.checker.check_model(result, full_check=True)
    assert result.ByteSize() <= source.ByteSize() + 200
    feed = {"x": np.array(2, np.float32)}
    assert same_bits(Runtime(source).run(feed)[0], Runtime(result).run(feed)[0])


def test_tied_weights_are_stored_once():
    """An embedding and the transposed output layer of a language model read one table."""
    text = "g (int64[n] i, float[n, 64] h) => (float[n, 64] e, float[n, 512] y) { e = Gather(w, i) t = Transpose(w) y = MatMul(h, t) }"  # noqa: E501
    source = parse(text, w=plain(512, 64))
    result = _check(source, {"i": np.array([0, 511, 3]), "h": plain(3, 64)})
    assert result.ByteSize() <= source.ByteSize() + 200


def test_quantized_weights_stay_quantized():
    text = (
        "g (float[n, 8] x) => (float[n, 4] y) { q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) "
        "k = DequantizeLinear(w, t, u) m = MatMul(d, k) y = Relu(m) }"
    )
    weight = np.arange(32).reshape(8, 4).astype(np.int8)
    arrays = {"s": np.float32(0.02), "z": np.uint8(128), "w": weight, "t": np.float32(0.05), "u": np.int8(0)}
    result = _check(parse(text, **arrays), {"x": plain(3, 8)})
    assert ops(result)["QuantizeLinear"] == 1
    assert ops(result)["DequantizeLinear"] == 2
    assert any(
        tensor.data_type == TensorProto.INT8 and list(tensor.dims) == [8, 4] for tensor in result.graph.initializer
    )
