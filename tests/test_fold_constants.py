import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper
from rewriting import assert_same, normal, ops, parse, plain, rewrite, run

from onnxslim.model import load
from onnxslim.passes.base import Context
from onnxslim.passes.fold_constants import FoldConstants
from onnxslim.passes.simplify import Simplify


def size(model) -> int:
    return len((model if isinstance(model, onnx.ModelProto) else model.to_proto()).SerializeToString())


# -------------------------------------------------------------------------------------------------------------- folding


def test_constant_nodes_and_initializers_fold():
    source = parse(
        "g (float[n, 4] x) => (float[n, 4] y) { c = Constant<value = float {2}>() a = Mul(w, c) b = Transpose(a) "
        "d = MatMul(x, b) y = Relu(d) }",
        w=plain(4, 4),
    )
    model, (outcome,) = rewrite(source, FoldConstants(), feeds=[{"x": plain(3, 4)}])
    assert ops(model) == {"MatMul": 1, "Relu": 1}
    assert outcome.numbers["nodes folded"] == 2


@pytest.mark.parametrize(
    ("values", "body", "kind"),
    [
        (np.array(3, np.int64), "y = Neg(w)", "int64"),
        (np.zeros((0, 3), np.float32), "y = Neg(w)", "float[0, 3]"),
        (np.array([True, False]), "y = Not(w)", "bool[2]"),
        (np.array([1.5, -0.0], np.float16), "y = Abs(w)", "float16[2]"),
        (np.array([200, 7], np.uint8), "y = BitwiseNot(w)", "uint8[2]"),
        (np.array(["a", "b"], object), "i = Constant<value = int64[1] {1}>() y = Gather(w, i)", "string[1]"),
        (np.array([0.0, 3.0, 0.0], np.float32), "y = NonZero(w)", "int64[1, k]"),
        (normal(6), "h = Cast<to = 11>(w) y = Relu(h)", "double[6]"),
    ],
)
def test_every_common_type_folds_and_an_output_stays_a_node(values, body, kind):
    source = parse(f"g () => ({kind} y) {{ {body} }}", opset=18, w=values)
    model, _ = rewrite(source, FoldConstants(), feeds=[{}])
    assert ops(model) == {"Constant": 1}
    assert [tensor.name for tensor in model.graph.outputs] == ["y"]


def test_types_that_numpy_lacks_are_left_alone():
    source = parse("g () => (bfloat16[2] y) { h = Cast<to = 16>(w) y = Neg(h) }", opset=18, w=np.ones(2, np.float32))
    model, (outcome,) = rewrite(source, FoldConstants())
    assert ops(model) == {"Cast": 1, "Neg": 1}
    assert any("bfloat16" in refusal.why for refusal in outcome.refusals)


@pytest.mark.parametrize(
    "body",
    [
        "r = RandomNormalLike(w) y = Add(x, r)",
        "r = RandomNormalLike<seed = 3.0>(w) y = Add(x, r)",
        "r = Bernoulli(w) y = Add(x, r)",
        "t = Constant<value = bool {1}>() h = Constant<value = float {0.5}>() r = Dropout(w, h, t) y = Add(x, r)",
        "r = my.domain.Do(w) y = Add(x, r)",
    ],
)
def test_random_and_unknown_operators_are_left_alone(body):
    source = parse(
        f"g (float[4] x) => (float[4] y) {{ {body} }}", domains=', "my.domain" : 1', w=np.ones(4, np.float32)
    )
    before = ops(source)
    model = load(source)
    outcome = FoldConstants().run(model, Context())
    assert ops(model) == before
    assert not outcome.modified
    assert outcome.refusals


def test_an_overridable_initializer_does_not_fold():
    source = parse("g (float[n] x, float[1] w) => (float[n] y) { h = Exp(w) y = Add(x, h) }", w=np.ones(1, np.float32))
    model, _ = rewrite(source, FoldConstants(), feeds=[{"x": plain(3)}, {"x": plain(3), "w": plain(1)}])
    assert ops(model) == {"Exp": 1, "Add": 1}


def test_a_range_of_many_numbers_is_refused_before_anybody_counts_them():
    source = parse(
        "g (int64 x) => (int64 y) { a = Constant<value = int64 {0}>() one = Constant<value = int64 {1}>() "
        "n = Neg(a) r = Range(n, b, one) m = ReduceMax<keepdims = 0>(r) y = Add(x, m) }",
        opset=13,
        b=np.array(20_000_000),
    )
    model, (outcome,) = rewrite(source, FoldConstants())
    assert ops(model)["Range"] == 1
    assert any("too large" in refusal.why for refusal in outcome.refusals)


@pytest.mark.parametrize("op", ["Div", "Mod"])
@pytest.mark.parametrize("divisor", [0, -1])
def test_division_by_zero_does_not_end_the_process(op, divisor):
    source = parse(
        f"g (int64[100] x) => (int64[100] y) {{ z = Constant<value = int64 {{{divisor}}}>() b = Neg(z) c = Neg(b) "
        f"k = {op}(w, c) y = Add(x, k) }}",
        w=np.full(100, np.iinfo(np.int64).min),
    )
    model = load(source)
    outcome = FoldConstants().run(model, Context())
    assert ops(model)[op] == 1
    assert any("divisor" in refusal.why for refusal in outcome.refusals)


def test_what_fails_to_evaluate_is_refused_and_the_rest_folds():
    source = parse(
        "g (float[n] x) => (float[n] y, float[k] z) { i = Constant<value = int64[1] {9}>() z = Gather(w, i) "
        "e = Exp(w) s = ReduceSum(e) y = Add(x, s) }",
        w=plain(4),
    )
    model = load(source)
    outcome = FoldConstants().run(model, Context())
    assert ops(model)["Gather"] == 1
    assert "Exp" not in ops(model)
    assert any("evaluated" in refusal.why for refusal in outcome.refusals)


def test_sequences_are_left_alone():
    source = parse(
        "g () => (float[k] y) { s = SequenceConstruct(w, w) i = Constant<value = int64 {1}>() y = SequenceAt(s, i) }",
        w=plain(4),
    )
    model, _ = rewrite(source, FoldConstants(), feeds=[{}])
    assert ops(model)["SequenceConstruct"] == 1


# --------------------------------------------------------------------------------------------------------------- growth

GROWING = {
    "ConstantOfShape": "c = ConstantOfShape(big) y = Add(x, c)",
    "Expand": "c = Expand(one, big) y = Add(x, c)",
    "Tile": "c = Tile(matrix, many) y = Add(x, c)",
    "Range": "a = Constant<value = int64 {0}>() b = Constant<value = int64 {500000}>() "
    "d = Constant<value = int64 {1}>() r = Range(a, b, d) f = Cast<to = 1>(r) y = Add(x, f)",
    "Mul": "t = Transpose(column) c = Mul(column, t) y = Add(x, c)",
    "Cast": "c = Cast<to = 1>(half) y = Add(x, c)",
}


@pytest.mark.parametrize("op", GROWING)
def test_what_would_blow_the_file_up_stays(op):
    source = parse(
        f"g (float[n, m] x) => (float[p, q] y) {{ {GROWING[op]} }}",
        opset=13,
        big=np.array([4000, 4000]),
        one=np.ones((1, 1), np.float32),
        matrix=plain(2, 2),
        many=np.array([500, 500]),
        column=plain(300, 1),
        half=np.ones((300, 300), np.float16),
    )
    for initializer in list(source.graph.initializer):
        if not any(initializer.name in node.input for node in source.graph.node):
            source.graph.initializer.remove(initializer)
    model, (outcome,) = rewrite(source, FoldConstants())
    assert ops(model)[op] >= 1
    assert size(model) <= size(source) + 2000
    assert any("make the file grow" in refusal.why or "too large" in refusal.why for refusal in outcome.refusals)


def test_what_is_made_of_a_large_intermediate_but_small_itself_folds():
    source = parse(
        "g (float[n] x) => (float[n] y) { c = ConstantOfShape(shape) h = ReduceSum<keepdims = 0>(c) y = Add(x, h) }",
        opset=13,
        shape=np.array([500, 500]),
    )
    model, _ = rewrite(source, FoldConstants(), feeds=[{"x": plain(3)}])
    assert ops(model) == {"Add": 1}


@pytest.mark.parametrize("weights", [16, 1000])
def test_the_limit_follows_the_weights_and_holds_in_total(weights):
    masks = " ".join(f"c{i} = Expand(w{i}, s) h{i} = Add({'x' if i == 0 else f'h{i - 1}'}, c{i})" for i in range(5))
    source = parse(
        f"g (float[n, m] x) => (float[p, q] y) {{ {masks} y = MatMul(h4, big) }}",
        opset=13,
        s=np.array([20, 20]),
        big=np.ones((20, weights * 20), np.float32),
        **{f"w{i}": np.full((1, 1), i, np.float32) for i in range(5)},
    )
    model, _ = rewrite(source, FoldConstants(), feeds=[{"x": plain(20, 20)}], rtol=1e-6)
    assert ops(model)["Expand"] == (5 if weights == 16 else 0)


def test_a_weight_that_others_read_too_is_not_stored_twice():
    source = parse(
        "g (int64[n] i, float[m, 128] x) => (float[n, 128] y, float[m, 500] z) "
        "{ y = Gather(w, i) t = Transpose(w) z = MatMul(x, t) }",
        w=plain(500, 128),
    )
    model, _ = rewrite(source, FoldConstants(), feeds=[{"i": np.array([3, 4]), "x": plain(2, 128)}])
    assert ops(model)["Transpose"] == 1


def test_quantized_weights_stay_quantized():
    source = parse(
        "g (float[n, 4] x) => (float[n, 4] y) { w = DequantizeLinear(q, s, z) t = Transpose(w) y = MatMul(x, t) }",
        q=np.arange(16, dtype=np.int8).reshape(4, 4),
        s=np.array(0.5, np.float32),
        z=np.array(1, np.int8),
    )
    model, _ = rewrite(source, FoldConstants(), Simplify(), feeds=[{"x": plain(2, 4)}])
    assert ops(model) == {"DequantizeLinear": 1, "Transpose": 1, "MatMul": 1}


def test_codebooks_stay():
    source = parse(
        "g (float[n, 64] x) => (float[n, 64] y) { i = Cast<to = 6>(packed) w = Gather(book, i) y = MatMul(x, w) }",
        packed=np.random.default_rng(0).integers(0, 16, (64, 64)).astype(np.uint8),
        book=plain(16),
    )
    model, _ = rewrite(source, FoldConstants(), Simplify(), feeds=[{"x": plain(2, 64)}])
    assert ops(model) == {"Cast": 1, "Gather": 1, "MatMul": 1}


# --------------------------------------------------------------------------------------------------------------- shapes


def test_static_dimensions_are_constants_and_symbolic_ones_are_not():
    source = parse(
        """g (float[n, 4, 6] x) => (int64[1] y, int64[3] z, int64[2] w, int64 s) {
            z = Shape(x) one = Constant<value = int64[1] {1}>() y = Gather(z, one) w = Shape<start = -2>(x)
            t = Transpose<perm = [1, 2, 0]>(x) d = Shape<start = 0, end = 2>(t) s = ReduceProd<keepdims = 0>(d)
        }""",
        opset=15,
    )
    model, _ = rewrite(source, FoldConstants(), feeds=[{"x": plain(n, 4, 6)} for n in (1, 5, 0)])
    assert ops(model) == {"Shape": 1, "Constant": 3}


@pytest.mark.parametrize("size_op", ["Shape", "Size"])
def test_dimensions_of_dynamic_tensors_stay(size_op):
    rank = "int64[2]" if size_op == "Shape" else "int64"
    source = parse(f"g (float[n, 4] x) => ({rank} y) {{ y = {size_op}(x) }}")
    model, _ = rewrite(source, FoldConstants(), feeds=[{"x": plain(n, 4)} for n in (1, 3)])
    assert ops(model) == {size_op: 1}


def test_a_reshape_target_with_one_dynamic_element_is_constant():
    source = parse(
        """g (float[n, 4, 6] x) => (float[a, b] y) {
            s = Shape(x) zero = Constant<value = int64 {0}>() n = Gather(s, zero) ax = Constant<value = int64[1] {0}>()
            u = Unsqueeze(n, ax) r = Constant<value = int64[1] {24}>() t = Concat<axis = 0>(u, r) y = Reshape(x, t)
        }"""
    )
    model, _ = rewrite(source, FoldConstants(), Simplify(), feeds=[{"x": plain(n, 4, 6)} for n in (1, 5, 0)])
    assert ops(model) == {"Reshape": 1}


def test_a_reshape_target_that_copies_dimensions_is_constant():
    source = parse(
        """g (float[n, m, 6] x) => (float[a, b, c, d] y) {
            s = Shape<start = 0, end = 2>(x) r = Constant<value = int64[2] {2, 3}>() t = Concat<axis = 0>(s, r)
            y = Reshape(x, t)
        }"""
    )
    feeds = [{"x": plain(n, m, 6)} for n, m in ((1, 1), (5, 2), (0, 2), (3, 0))]
    model, _ = rewrite(source, FoldConstants(), feeds=feeds)
    assert ops(model)["Shape"] == 0


@pytest.mark.parametrize("target", ["Concat<axis = 0>(m, n)", "Concat<axis = 0>(n, rest, m)"])
def test_a_reshape_target_that_moves_dimensions_stays(target):
    source = parse(
        f"""g (float[n, m] x) => (float[a, b] y) {{
            s = Shape(x) i = Constant<value = int64[1] {{0}}>() j = Constant<value = int64[1] {{1}}>()
            n = Gather(s, i) m = Gather(s, j) zero = Constant<value = int64[1] {{0}}>()
            rest = Constant<value = int64[1] {{1}}>() t = {target} r = Reshape(x, t) f = Flatten(r) y = Relu(f)
        }}"""
    )
    model, _ = rewrite(source, FoldConstants(), feeds=[{"x": plain(n, m)} for n, m in ((2, 3), (4, 1))])
    assert ops(model)["Shape"] == 1


# ------------------------------------------------------------------------------------------------- bodies and functions


def test_bodies_fold_also_what_comes_from_outside():
    source = parse(
        """g (bool c, float[n] x) => (float[n] y) {
            y = If(c) <
                then_branch = t () => (float[n] p) { h = Exp(w) p = Add(x, h) },
                else_branch = e () => (float[1] q) { h = Neg(w) k = Mul(w, h) q = Mul(k, h) }
            >
        }""",
        w=np.full(1, 2, np.float32),
    )
    feeds = [{"c": np.array(flag), "x": plain(1)} for flag in (True, False)]
    model, _ = rewrite(source, FoldConstants(), feeds=feeds)
    assert ops(model) == {"If": 1, "Add": 1, "Constant": 1}


def test_a_loop_body_keeps_what_depends_on_the_iteration():
    source = parse(
        """g (int64 m, float[n] x) => (float[n] y) {
            go = Constant<value = bool {1}>()
            y = Loop(m, go, x) <
                body = b (int64 i, bool c, float[n] v) => (bool d, float[n] w) {
                    d = Identity(c) two = Constant<value = float {2}>() four = Mul(two, two)
                    f = Cast<to = 1>(i) g2 = Add(f, four) w = Mul(v, g2)
                }
            >
        }"""
    )
    model, _ = rewrite(source, FoldConstants(), feeds=[{"m": np.array(n), "x": plain(4)} for n in (0, 1, 3)])
    assert ops(model) == {"Constant": 1, "Loop": 1, "Identity": 1, "Cast": 1, "Add": 1, "Mul": 1}


def test_functions_hold_constant_nodes_and_arguments_are_unknown():
    source = parse(
        "g (float[n] x) => (float[n] y, float[n] z) { y = my.f<alpha = 0.5>(x) z = my.f<alpha = 0.25>(x) }",
        functions="""
        <domain: "my", opset_import: ["" : 17]> f<alpha>(x) => (y) {
            a = Constant<value_float: float = @alpha>() e = Exp(a) two = Constant<value = float {2}>()
            four = Mul(two, two) b = Mul(x, e) y = Mul(b, four)
        }
        """,
        domains=', "my" : 1',
    )
    model, _ = rewrite(source, FoldConstants(), feeds=[{"x": plain(4)}])
    assert ops(model) == {"f": 2, "Constant": 2, "Exp": 1, "Mul": 2}


def test_sibling_bodies_with_the_same_names_fold_apart():
    source = parse(
        """g (bool c, float[1] x) => (float[1] y) {
            y = If(c) <
                then_branch = t () => (float[1] p) { k = Constant<value = float[1] {2}>() h = Exp(k) p = Add(x, h) },
                else_branch = e () => (float[1] p) { k = Constant<value = float[1] {3}>() h = Exp(k) p = Add(x, h) }
            >
        }"""
    )
    feeds = [{"c": np.array(flag), "x": plain(1)} for flag in (True, False)]
    model, _ = rewrite(source, FoldConstants(), feeds=feeds)
    assert "Exp" not in ops(model)


# -------------------------------------------------------------------------------------------------------- random graphs

UNARY = ["Identity", "Relu", "Neg", "Abs", "Dropout", "Cast", "Exp", "Transpose", "Squeeze", "Sign", "Shape"]
BINARY = ["Add", "Sub", "Mul", "Max", "Concat", "Reshape", "Pow"]


@st.composite
def graphs(draw) -> onnx.ModelProto:
    """A graph of 3 x 3 tensors, inputs and constants mixed, with many no-ops, duplicates and dead nodes."""
    opset = draw(st.sampled_from([13, 15, 17, 18, 21]))
    special = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0])
    nodes, names = [], ["x", "y"]
    inits = []
    for index in range(draw(st.integers(1, 4))):
        shape = draw(st.sampled_from([(3, 3), (1,), (), (1, 3), (3, 1)]))
        values = np.full(shape, draw(special), np.float32)
        inits.append(onnx.numpy_helper.from_array(values, f"c{index}"))
        names.append(f"c{index}")
    inits.append(onnx.numpy_helper.from_array(np.array([3, 3]), "square"))
    inits.append(onnx.numpy_helper.from_array(np.array([0]), "axis"))
    inits.append(onnx.numpy_helper.from_array(np.array([0, 3]), "rows"))
    inits.append(onnx.numpy_helper.from_array(np.array([3]), "three"))
    full = ["x", "y"]  # known to be 3 x 3
    for index in range(draw(st.integers(1, 12))):
        out = f"t{index}"
        op = draw(st.sampled_from(UNARY + BINARY))
        source = draw(st.sampled_from(full))
        other = draw(st.sampled_from(names))
        if op in ("Add", "Sub", "Mul", "Max", "Pow"):
            pair = [source, other] if draw(st.booleans()) else [other, source]
            nodes.append(helper.make_node(op, pair, [out]))
        elif op == "Cast":
            nodes.append(helper.make_node("Cast", [source], [f"{out}d"], to=draw(st.sampled_from([1, 10, 11]))))
            nodes.append(helper.make_node("Cast", [f"{out}d"], [out], to=1))
        elif op == "Transpose":
            nodes.append(helper.make_node(op, [source], [out], perm=draw(st.permutations([0, 1]))))
        elif op == "Squeeze":
            nodes.append(helper.make_node("Unsqueeze", [source, "axis"], [f"{out}u"]))
            nodes.append(helper.make_node("Squeeze", [f"{out}u", "axis"], [out]))
        elif op == "Shape":
            nodes.append(helper.make_node("Shape", [other], [f"{out}s"]))
            nodes.append(helper.make_node("Cast", [f"{out}s"], [f"{out}f"], to=1))
            nodes.append(helper.make_node("ReduceMax", [f"{out}f"], [f"{out}m"], keepdims=0))
            nodes.append(helper.make_node("Add", [source, f"{out}m"], [out]))
            if other not in full:
                nodes[-2:] = [
                    helper.make_node("Size", [other], [f"{out}m0"]),
                    helper.make_node("Cast", [f"{out}m0"], [f"{out}m"], to=1),
                    helper.make_node("Add", [source, f"{out}m"], [out]),
                ]
        elif op == "Concat":
            nodes.append(helper.make_node("Concat", [source, draw(st.sampled_from(full))], [f"{out}c"], axis=0))
            nodes.append(helper.make_node("Slice", [f"{out}c", "axis", "three", "axis"], [out]))
        elif op == "Reshape":
            nodes.append(helper.make_node("Flatten", [source], [f"{out}r"], axis=0))
            nodes.append(helper.make_node("Reshape", [f"{out}r", "square"], [out]))
        else:
            nodes.append(helper.make_node(op, [source], [out]))
        names.append(out)
        full.append(out)
        if draw(st.integers(0, 5)) == 0:
            constant = draw(st.sampled_from([name for name in names if name.startswith("c")]))
            nodes.append(helper.make_node(draw(st.sampled_from(["Exp", "Neg", "Abs"])), [constant], [f"c_{index}"]))
            names.append(f"c_{index}")
    count = draw(st.integers(1, 3))
    outputs = list(dict.fromkeys([full[-1], *draw(st.lists(st.sampled_from(full[2:]), max_size=count))]))
    info = helper.make_tensor_value_info
    symbolic = draw(st.booleans())
    graph = helper.make_graph(
        nodes,
        "random",
        [info(name, 1, ["a", "b"] if symbolic else [3, 3]) for name in "xy"],
        [info(name, 1, [None, None]) for name in outputs],
        inits,
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", opset)])


@settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(graphs(), st.booleans(), st.integers(0, 9))
def test_random_graphs_compute_the_same(source, fold_first, seed):
    feed = {"x": normal(3, 3, seed=seed), "y": normal(3, 3, seed=seed + 1)}
    wanted = run(source, feed)
    model = load(source)
    order = [FoldConstants(), Simplify()]
    for each in order if fold_first else order[::-1]:
        each.run(model, Context())
        assert not each.run(model, Context()).changes
    after = model.to_proto()
    onnx.checker.check_model(after, full_check=True)
    for first, second in zip(wanted, run(after, feed), strict=True):
        assert_same(first, second, 0)


def test_an_output_is_no_constant_of_a_type_that_constant_nodes_lack():
    source = parse("g (float[n, 3] x) => (int64[k] y) { s = Shape(x) y = Shape(s) }", opset=8)
    model, (outcome,) = rewrite(source, FoldConstants(), feeds=[{"x": plain(2, 3)}])
    assert ops(model)["Shape"] == 2
    assert any("opset 8" in refusal.why for refusal in outcome.refusals)
