import numpy as np
import onnx
import pytest
from rewriting import normal, ops, parse, plain, rewrite

from onnxslim.graph.purity import functions_of, impurity
from onnxslim.model import load
from onnxslim.passes.base import Context
from onnxslim.passes.simplify import Simplify

# ------------------------------------------------------------------------------------------------------------- no-ops

VANISHING = {
    "identity": ("y = Identity(x)", 17),
    "dropout": ("y = Dropout(x)", 17),
    "dropout-old": ("y = Dropout<ratio = 0.9>(x)", 7),
    "dropout-explicit": ("no = Constant<value = bool {0}>() y = Dropout(x, , no)", 13),
    "cast": ("y = Cast<to = 1>(x)", 9),
    "cast-like": ("y = CastLike(x, x)", 19),
    "transpose": ("y = Transpose<perm = [0, 1, 2]>(x)", 11),
    "reshape-known": ("s = Constant<value = int64[3] {-1, 4, 6}>() y = Reshape(x, s)", 17),
    "reshape-copies": ("s = Constant<value = int64[3] {0, 0, 0}>() y = Reshape(x, s)", 17),
    "squeeze": ("a = Constant<value = int64[1] {1}>() u = Unsqueeze(x, a) y = Squeeze(u, a)", 17),
    "squeeze-old": ("u = Unsqueeze<axes = [-1]>(x) y = Squeeze<axes = [-1]>(u)", 11),
    "expand": ("s = Constant<value = int64[2] {4, 1}>() y = Expand(x, s)", 17),
    "tile": ("r = Constant<value = int64[3] {1, 1, 1}>() y = Tile(x, r)", 17),
    "pad": ("p = Constant<value = int64[6] {0, 0, 0, 0, 0, 0}>() y = Pad(x, p)", 17),
    "pad-old": ("y = Pad<pads = [0, 0, 0, 0, 0, 0]>(x)", 7),
    "slice-known": (
        "b = Constant<value = int64[1] {0}>() e = Constant<value = int64[1] {4}>() "
        "a = Constant<value = int64[1] {1}>() y = Slice(x, b, e, a)",
        17,
    ),
    "slice-to-the-end": (
        "b = Constant<value = int64[1] {0}>() e = Constant<value = int64[1] {9223372036854775807}>() "
        "y = Slice(x, b, e)",
        17,
    ),
    "slice-old": ("y = Slice<starts = [0], ends = [2147483647]>(x)", 7),
    "concat": ("y = Concat<axis = 1>(x)", 17),
    "split": ("y = Split<axis = 1, num_outputs = 1>(x)", 18),
    "max": ("y = Max(x)", 17),
    "sum": ("y = Sum(x)", 8),
    "neg-neg": ("n = Neg(x) y = Neg(n)", 17),
    "mul-one": ("c = Constant<value = float {1}>() y = Mul(c, x)", 17),
    "div-one": ("c = Constant<value = float[1, 1] {1}>() y = Div(x, c)", 7),
    "pow-one": ("c = Constant<value = int64 {1}>() y = Pow(x, c)", 17),
    "sub-zero": ("c = Constant<value = float[6] {0, 0, 0, 0, 0, 0}>() y = Sub(x, c)", 17),
    "add-negative-zero": ("c = Constant<value = float {-0.0}>() y = Add(x, c)", 17),
    "transposes": ("t = Transpose<perm = [1, 2, 0]>(x) y = Transpose<perm = [2, 0, 1]>(t)", 17),
    "exact-casts": ("d = Cast<to = 11>(x) y = Cast<to = 1>(d)", 17),
}


@pytest.mark.parametrize("name", VANISHING)
def test_what_changes_nothing_vanishes(name):
    body, opset = VANISHING[name]
    source = parse(
        f"g (float[n, 4, 6] start) => (float[n, 4, 6] z) {{ x = Abs(start) {body} z = Relu(y) }}", opset=opset
    )
    feeds = [{"start": normal(n, 4, 6)} for n in (1, 3, 0)]
    model, _ = rewrite(source, Simplify(), feeds=feeds if name != "reshape-known" else feeds[:2])
    assert ops(model) == {"Abs": 1, "Relu": 1}


STAYING = {
    "add-zero": "c = Constant<value = float {0}>() y = Add(x, c)",
    "sub-negative-zero": "c = Constant<value = float {-0.0}>() y = Sub(x, c)",
    "sub-from-zero": "c = Constant<value = float {0}>() y = Sub(c, x)",
    "one-over": "c = Constant<value = float {1}>() y = Div(c, x)",
    "widening-mul": "c = Constant<value = float[1, 1, 1, 1] {1}>() w = Mul(x, c) a = Constant<value = int64[1] {0}>() "
    "y = Squeeze(w, a)",
    "narrowing-cast": "h = Cast<to = 10>(x) y = Cast<to = 1>(h)",
    "integer-cast": "i = Cast<to = 6>(x) y = Cast<to = 1>(i)",
    "reshape-swapped": "s = Constant<value = int64[3] {0, 6, 4}>() r = Reshape(x, s) q = Exp(r) "
    "p = Constant<value = int64[3] {0, 4, 6}>() y = Reshape(q, p)",
    "slice": "b = Constant<value = int64[1] {0}>() e = Constant<value = int64[1] {2}>() "
    "a = Constant<value = int64[1] {0}>() s = Slice(x, b, e, a) y = Abs(s)",
    "clip": "y = Clip(x)",
}


@pytest.mark.parametrize("name", STAYING)
def test_what_changes_something_stays(name):
    source = parse(f"g (float[n, 4, 6] x) => (float[m, 4, 6] z) {{ {STAYING[name]} z = Exp(y) }}")
    before = ops(source)
    model, _ = rewrite(source, Simplify(), feeds=[{"x": normal(n, 4, 6)} for n in (1, 3)])
    before.pop("Constant", None)
    assert ops(model) == before


def test_a_neutral_constant_that_may_widen_the_other_side_stays():
    source = parse("g (float[n] x) => (float[m] y) { h = Mul(x, c) y = Exp(h) }", c=np.ones(3, np.float32))
    model, _ = rewrite(source, Simplify(), feeds=[{"x": plain(1)}, {"x": plain(3)}])
    assert ops(model)["Mul"] == 1


def test_a_reshape_that_may_swap_two_dynamic_dimensions_stays():
    source = parse(
        "g (float[n, m] x, int64[2] s) => (float[p, q] y) { r = Reshape(x, s) y = Exp(r) }",
    )
    feeds = [{"x": plain(2, 3), "s": np.array([3, 2])}, {"x": plain(2, 3), "s": np.array([2, 3])}]
    model, _ = rewrite(source, Simplify(), feeds=feeds)
    assert ops(model)["Reshape"] == 1


def test_integers_may_add_zero():
    source = parse("g (int64[n] x) => (int64[n] y) { h = Add(c, x) y = Abs(h) }", c=np.zeros(1, np.int64))
    model, _ = rewrite(source, Simplify(), feeds=[{"x": np.array([-3, 0, 2])}])
    assert ops(model) == {"Abs": 1}


def test_a_dropout_in_training_mode_stays_and_says_why():
    source = parse("g (float[n] x, bool t) => (float[n] z) { y = Dropout(x, , t) z = Relu(y) }")
    model, (outcome,) = rewrite(source, Simplify())
    assert ops(model)["Dropout"] == 1
    assert any("training" in refusal.why for refusal in outcome.refusals)


def test_a_dropout_whose_mask_is_read_stays():
    source = parse("g (float[n] x) => (float[n] z, bool[n] m) { y, m = Dropout(x) z = Relu(y) }")
    model, _ = rewrite(source, Simplify(), feeds=[{"x": plain(4)}])
    assert ops(model)["Dropout"] == 1


# --------------------------------------------------------------------------------------------------- graph boundaries


def test_an_output_keeps_its_name_when_its_node_goes():
    source = parse("g (float[n] x) => (float[n] y) { h = Relu(x) y = Identity(h) }")
    model, _ = rewrite(source, Simplify(), feeds=[{"x": normal(7)}])
    assert ops(model) == {"Relu": 1}
    assert model.graph.outputs[0].name == "y"


def test_an_output_that_is_an_input_keeps_its_identity():
    source = parse("g (float[n] x) => (float[n] y, float[n] z) { y = Identity(x) z = Identity(y) }")
    model, _ = rewrite(source, Simplify(), feeds=[{"x": normal(7)}])
    assert ops(model) == {"Identity": 2}


def test_two_outputs_of_one_value_stay_two():
    source = parse("g (float[n] x) => (float[n] y, float[n] z) { y = Exp(x) z = Exp(x) }")
    model, _ = rewrite(source, Simplify(), feeds=[{"x": plain(3)}])
    assert [tensor.name for tensor in model.graph.outputs] == ["y", "z"]


def test_unused_inputs_and_dead_code():
    source = parse(
        "g (float[n] x, float[1] unused) => (float[n] y) { d = Exp(x) e = Add(d, unused) y = Relu(x) }",
        spare=np.zeros(1000, np.float32),
    )
    model, _ = rewrite(source, Simplify(), feeds=[{"x": plain(3), "unused": plain(1)}])
    assert ops(model) == {"Relu": 1}
    assert not model.to_proto().graph.initializer


def test_dead_random_nodes_go_and_dead_unknown_nodes_stay():
    source = parse(
        "g (float[n] x) => (float[n] y) { d = RandomNormalLike(x) e = my.domain.Print(x) y = Relu(x) }",
        domains=', "my.domain" : 1',
    )
    model = load(source)
    Simplify().run(model, Context())
    assert ops(model) == {"Print": 1, "Relu": 1}


# ------------------------------------------------------------------------------------------------------------- merging


def test_equal_initializers_are_one():
    w = plain(8, 8)
    source = parse(
        "g (float[n, 8] x) => (float[n, 8] y) { a = MatMul(x, w) b = Exp(a) y = MatMul(b, v) }", w=w, v=w.copy()
    )
    model, _ = rewrite(source, Simplify(), feeds=[{"x": plain(2, 8)}])
    assert len(model.to_proto().graph.initializer) == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (np.zeros(4, np.float32), -np.zeros(4, np.float32)),
        (np.zeros(4, np.float32), np.zeros((2, 2), np.float32)),
        (np.ones(4, np.float32), np.ones(4, np.float16)),
    ],
)
def test_initializers_that_differ_in_a_bit_shape_or_type_stay_two(first, second):
    types = {np.dtype(np.float32): "float", np.dtype(np.float16): "float16"}
    source = parse(
        f"g (float[4] x, {types[second.dtype]}{list(second.shape)} v) => "
        f"(float[4] y, {types[second.dtype]}{list(second.shape)} z) {{ y = Max(x, a) z = Max(v, b) }}",
        a=first,
        b=second,
    )
    model, _ = rewrite(source, Simplify(), feeds=[{"x": plain(4), "v": plain(*second.shape).astype(second.dtype)}])
    assert len(model.to_proto().graph.initializer) == 2


def test_an_overridable_initializer_is_not_constant():
    c = np.ones(1, np.float32)
    source = parse("g (float[n] x, float[1] c, float[1] d) => (float[n] y) { h = Mul(x, c) y = Div(h, d) }", c=c, d=c)
    override = {"x": plain(3), "c": np.full(1, 2, np.float32), "d": np.full(1, 3, np.float32)}
    model, _ = rewrite(source, Simplify(), feeds=[{"x": plain(3)}, override])
    assert ops(model) == {"Mul": 1, "Div": 1}


def test_equal_nodes_are_one_and_swapped_sums_too():
    source = parse("g (float[n] x, float[n] w) => (float[n] y) { a = Add(x, w) b = Add(w, x) y = Mul(a, b) }")
    model, _ = rewrite(source, Simplify(), feeds=[{"x": normal(9), "w": normal(9, seed=1)}])
    assert ops(model) == {"Add": 1, "Mul": 1}


@pytest.mark.parametrize(
    "body",
    [
        "a = Sub(x, w) b = Sub(w, x)",
        "a = LeakyRelu<alpha = 0.1>(x) b = LeakyRelu<alpha = 0.2>(x)",
        "a = RandomNormalLike(x) b = RandomNormalLike(x)",
        "a = RandomNormalLike<seed = 1.0>(x) b = RandomNormalLike<seed = 1.0>(x)",
        "t = Constant<value = bool {1}>() r = Constant<value = float {0.5}>() "
        "a = Dropout(x, r, t) b = Dropout(x, r, t)",
    ],
)
def test_nodes_that_differ_or_draw_stay_two(body):
    source = parse(f"g (float[n] x, float[n] w) => (float[n] y, float[n] z) {{ {body} y = Exp(a) z = Neg(b) }}")
    before = ops(source)
    model, _ = rewrite(source, Simplify())
    before.pop("Constant", None)
    assert ops(model) == before


def test_a_merged_node_gives_its_name_to_the_output():
    source = parse("g (float[n] x) => (float[n] y, float[n] z) { a = Exp(x) y = Neg(a) z = Exp(x) }")
    model, _ = rewrite(source, Simplify(), feeds=[{"x": plain(5)}])
    assert ops(model) == {"Exp": 1, "Neg": 1}


# ------------------------------------------------------------------------------------------------- bodies and functions


def test_bodies_are_simplified_and_see_what_they_read():
    source = parse(
        """g (bool c, float[n] x) => (float[n] y) {
            i = Identity(x)
            y = If(c) <
                then_branch = t () => (float[n] p) { j = Identity(i) p = Mul(j, i) },
                else_branch = e () => (float[n] q) { q = Identity(i) }
            >
        }"""
    )
    feeds = [{"c": np.array(flag), "x": normal(6)} for flag in (True, False)]
    model, _ = rewrite(source, Simplify(), feeds=feeds)
    assert ops(model) == {"If": 1, "Mul": 1, "Identity": 1}


def test_sibling_bodies_with_the_same_names_stay_apart():
    source = parse(
        """g (bool c, float[n] x) => (float[n] y) {
            h = Exp(x)
            k = Exp(x)
            y = If(c) <
                then_branch = t () => (float[n] p) { a = Neg(h) b = Identity(a) p = Add(b, k) },
                else_branch = e () => (float[n] p) { a = Abs(k) b = Identity(a) p = Add(b, h) }
            >
        }"""
    )
    feeds = [{"c": np.array(flag), "x": plain(6)} for flag in (True, False)]
    model, _ = rewrite(source, Simplify(), feeds=feeds)
    assert ops(model) == {"Exp": 1, "If": 1, "Neg": 1, "Abs": 1, "Add": 2}


def test_a_name_that_a_body_defines_itself_is_not_captured():
    source = parse(
        """g (bool c, float[n] x) => (float[n] y) {
            a = Abs(x)
            o = Identity(a)
            y = If(c) <
                then_branch = t () => (float[n] p) { p = Neg(o) },
                else_branch = e () => (float[n] q) { q = Exp(o) }
            >
        }"""
    )
    # Not legal by the letter, but converters write it: the body hides an outer name that it does not read.
    body = source.graph.node[2].attribute[0].g
    body.node.insert(0, onnx.helper.make_node("Exp", ["o"], ["a"]))
    body.node[1].input[0] = "a"
    body.node.append(onnx.helper.make_node("Add", ["o", "p"], ["r"]))
    body.output[0].name = "r"
    model = load(source)
    Simplify().run(model, Context())
    bodies = [graph for graph in model.graphs() if graph.name == "t"]
    assert "o" in {tensor.name for node in bodies[0].nodes for tensor in node.inputs}


@pytest.mark.parametrize("flag", [0, 1])
def test_an_if_that_always_goes_one_way_is_inlined(flag):
    source = parse(
        f"""g (bool d, float[n] x) => (float[n] y, float[n] z) {{
            c = Constant<value = bool {{{flag}}}>()
            a = Exp(x)
            y, q = If(c) <
                then_branch = t () => (float[n] p, float[n] k) {{
                    a1 = Add(x, w) p = If(d) <
                        then_branch = t2 () => (float[n] b) {{ b = Mul(a1, a) }},
                        else_branch = e2 () => (float[n] b) {{ b = Sub(a1, a) }}
                    >
                    k = Identity(a)
                }},
                else_branch = e () => (float[n] p, float[n] k) {{ a1 = Neg(a) p = Abs(a1) k = Identity(x) }}
            >
            a1 = Relu(q)
            r = If(d) <
                then_branch = t3 () => (float[n] p) {{ p = Neg(a1) }},
                else_branch = e3 () => (float[n] p) {{ p = Abs(a1) }}
            >
            z = Add(r, y)
        }}""",
        w=plain(1),
    )
    feeds = [{"d": np.array(which), "x": plain(5)} for which in (True, False)]
    model, _ = rewrite(source, Simplify(), feeds=feeds)
    assert ops(model)["If"] == (2 if flag else 1)


def test_an_if_is_not_inlined_where_that_would_stop_the_model_from_loading():
    source = parse(
        """g (int64 n) => (int64[m] z) {
            c = Constant<value = bool {1}>()
            y = If(c) <
                then_branch = t () => (int64[1] p) { p = Constant<value = int64[1] {99999}>() },
                else_branch = e () => (int64 p) { p = Constant<value = int64 {5}>() }
            >
            zero = Constant<value = int64 {0}>()
            one = Constant<value = int64 {1}>()
            r = Range(zero, y, one)
            z = Add(r, n)
        }"""
    )
    model, (outcome,) = rewrite(source, Simplify(), feeds=[{"n": np.array(3)}])
    assert ops(model)["If"] == 1
    assert any(refusal.rule == "inline-if" for refusal in outcome.refusals)


def test_a_loop_keeps_its_passed_through_condition():
    source = parse(
        """g (int64 m, float[n] x) => (float[n] y) {
            go = Constant<value = bool {1}>()
            y = Loop(m, go, x) <
                body = b (int64 i, bool c, float[n] v) => (bool d, float[n] w) {
                    d = Identity(c) one = Constant<value = float {1}>() h = Mul(v, one) k = Identity(h) w = Add(k, k)
                }
            >
        }"""
    )
    model, _ = rewrite(source, Simplify(), feeds=[{"m": np.array(n), "x": plain(4)} for n in (0, 1, 3)])
    assert ops(model) == {"Loop": 1, "Identity": 1, "Add": 1}


def test_an_initializer_of_two_bodies_is_stored_once():
    w = "{" + ", ".join(str(i) for i in range(300)) + "}"
    branch = f"() => (float[300] p) {{ w = Constant<value = float[300] {w}>() p = %s(x, w) }}"
    source = parse(
        f"""g (bool c, float[300] x) => (float[300] y) {{
            v = Constant<value = float[300] {w}>()
            h = If(c) <then_branch = t {branch % "Add"}, else_branch = e {branch % "Mul"}>
            y = Add(h, v)
        }}"""
    )
    feeds = [{"c": np.array(flag), "x": plain(300)} for flag in (True, False)]
    model, _ = rewrite(source, Simplify(), feeds=feeds)
    assert len(model.to_proto().SerializeToString()) < 1800


def test_functions_are_simplified_and_unused_ones_dropped():
    source = parse(
        "g (float[n] x) => (float[n] y) { y = my.f<alpha = 0.5>(x) }",
        functions="""
        <domain: "my", opset_import: ["" : 17]> f<alpha>(x) => (y) {
            i = Identity(x) a = LeakyRelu<alpha: float = @alpha>(i) b = LeakyRelu<alpha: float = @alpha>(i)
            d = Exp(x) y = Add(a, b)
        }
        <domain: "my", opset_import: ["" : 17]> unused(x) => (y) { y = Neg(x) }
        """,
        domains=', "my" : 1, "gone" : 3',
    )
    model, _ = rewrite(source, Simplify(), feeds=[{"x": plain(4)}])
    assert [function.name for function in model.graph.functions] == ["f"]
    assert ops(model) == {"f": 1, "LeakyRelu": 1, "Add": 1}
    assert [entry.domain for entry in model.header.opset_import] == ["", "my"]


def test_impurity_looks_through_functions_and_bodies():
    source = parse(
        """g (bool c, float[n] x) => (float[n] y, float[n] z) {
            y = my.f(x)
            z = If(c) <
                then_branch = t () => (float[n] p) { p = RandomNormalLike(x) },
                else_branch = e () => (float[n] q) { q = Neg(x) }
            >
        }""",
        functions='<domain: "my", opset_import: ["" : 17]> f(x) => (y) { y = RandomUniformLike(x) }',
        domains=', "my" : 1',
    )
    model = load(source)
    reasons = [impurity(node, 17, functions_of(model.graph)) for node in model.graph.nodes]
    assert all(reason is not None and "random" in reason for reason in reasons)


# ---------------------------------------------------------------------------------------------------------- BatchNorm


def _statistics(channels: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {
        "s": rng.uniform(0.5, 1.5, channels).astype(np.float32),
        "t": rng.standard_normal(channels).astype(np.float32),
        "m": rng.standard_normal(channels).astype(np.float32),
        "v": rng.uniform(0.5, 1.5, channels).astype(np.float32),
    }


@pytest.mark.parametrize("opset", [7, 8, 9, 11, 14, 15, 17, 21])
@pytest.mark.parametrize(
    ("before", "weight"),
    [
        ("Conv<pads = [1, 1, 1, 1]>(x, k)", (6, 4, 3, 3)),
        ("Conv<group = 2>(x, k, c)", (6, 2, 3, 3)),
        ("Conv(x, k, c)", (6, 4, 1, 1)),
        ("ConvTranspose(x, k)", (4, 6, 2, 2)),
        ("ConvTranspose<group = 2, strides = [2, 2]>(x, k, c)", (4, 3, 2, 2)),
    ],
)
def test_batchnorm_goes_into_convolutions(before, weight, opset):
    batchnorm = "BatchNormalization<epsilon = 0.01>(a, s, t, m, v)"
    source = parse(
        f"g (float[n, 4, h, w] x) => (float[n, 6, p, q] y) {{ a = {before} y = {batchnorm} }}",
        opset=opset,
        k=plain(*weight),
        c=plain(6, seed=2),
        **_statistics(6),
    )
    feeds = [{"x": plain(n, 4, h, 5)} for n, h in ((1, 5), (2, 7))]
    model, _ = rewrite(source, Simplify(), feeds=feeds, rtol=1e-5)
    assert sum(ops(model).values()) == 1


@pytest.mark.parametrize(
    "body",
    [
        "a = Gemm(x, k)",
        "a = Gemm<transB = 1, alpha = 0.5>(x, kt, c)",
        "a = Gemm<beta = 2.0>(x, k, c)",
        "a = Gemm<beta = 0.5>(x, k, row)",
        "a = Gemm<beta = 0.5>(x, k, one)",
        "b = MatMul(x, k) a = Add(b, c)",
        "b = MatMul(x, k) a = Add(row, b)",
        "a = MatMul(x, k)",
    ],
)
def test_batchnorm_goes_into_matrices(body):
    k = plain(5, 6)
    source = parse(
        f"g (float[n, 5] x) => (float[n, 6] y) {{ {body} b9 = BatchNormalization(a, s, t, m, v) y = Relu(b9) }}",
        opset=13,
        k=k,
        kt=np.ascontiguousarray(k.T),
        c=plain(6, seed=2),
        row=plain(1, 6, seed=3),
        one=plain(1, seed=4),
        **_statistics(6),
    )
    model, _ = rewrite(source, Simplify(), feeds=[{"x": plain(n, 5)} for n in (1, 4)], rtol=1e-5)
    assert "BatchNormalization" not in ops(model)


REFUSALS = {
    "read elsewhere": "a = Conv(x, k) z = Relu(a) y = BatchNormalization(a, s, t, m, v)",
    "training": "a = Conv(x, k) z = Relu(x) y, o, p = BatchNormalization<training_mode = 1>(a, s, t, m, v)",
    "no weights": "a = Relu(x) z = Exp(x) y = BatchNormalization(a, s4, t4, m4, v4)",
    "no node": "z = Relu(x) y = BatchNormalization(x, s4, t4, m4, v4)",
    "not constant": "e = ReduceMax<keepdims = 0>(x) sv = Mul(e, s) a = Conv(x, k) z = Relu(x) "
    "y = BatchNormalization(a, sv, t, m, v)",
    "infinite": "a = Conv(x, k) z = Relu(x) y = BatchNormalization<epsilon = 0.0>(a, s, t, m, zeros)",
}


@pytest.mark.parametrize("why", REFUSALS)
def test_a_batchnorm_that_must_stay_says_why(why):
    four = {f"{name}4": value for name, value in _statistics(4).items()}
    source = parse(
        f"g (float[n, 4, 3, 3] x) => (float[n, c, p, q] y, float[n, d, f, e] z) {{ {REFUSALS[why]} }}",
        opset=14,
        k=plain(6, 4, 1, 1),
        zeros=np.zeros(6, np.float32),
        **_statistics(6),
        **four,
    )
    model, (outcome,) = rewrite(source, Simplify(), feeds=[{"x": plain(2, 4, 3, 3)}])
    assert ops(model)["BatchNormalization"] == 1
    assert any(why in refusal.why for refusal in outcome.refusals if refusal.rule == "fold-batchnorm")


def test_a_weight_that_two_convolutions_read_is_only_copied_when_small():
    text = """g (float[n, 32, 3, 3] x) => (float[n, 32, 3, 3] y) {
        a = Conv<pads = [1, 1, 1, 1]>(x, k) b = BatchNormalization(a, s, t, m, v) y = Conv<pads = [1, 1, 1, 1]>(b, k)
    }"""
    large = parse(text, k=plain(32, 32, 3, 3), **_statistics(32))
    model, (outcome,) = rewrite(large, Simplify(), feeds=[{"x": plain(1, 32, 3, 3)}])
    assert ops(model)["BatchNormalization"] == 1
    assert any("read elsewhere" in refusal.why for refusal in outcome.refusals)
    small = parse(text.replace("32", "4"), k=plain(4, 4, 3, 3), **_statistics(4))
    model, _ = rewrite(small, Simplify(), feeds=[{"x": plain(1, 4, 3, 3)}], rtol=1e-5)
    assert ops(model) == {"Conv": 2}


def test_an_overridable_weight_keeps_its_batchnorm():
    source = parse(
        "g (float[n, 4, 3, 3] x, float[6, 4, 1, 1] k) => (float[n, 6, 3, 3] y) "
        "{ a = Conv(x, k) y = BatchNormalization(a, s, t, m, v) }",
        k=plain(6, 4, 1, 1),
        **_statistics(6),
    )
    override = {"x": plain(1, 4, 3, 3), "k": plain(6, 4, 1, 1, seed=9)}
    model, _ = rewrite(source, Simplify(), feeds=[override])
    assert ops(model)["BatchNormalization"] == 1


def test_a_convolution_that_a_body_reads_keeps_its_batchnorm():
    source = parse(
        """g (bool c, float[n, 4, 3, 3] x) => (float[n, 6, 3, 3] y, float[n, 6, 3, 3] z) {
            a = Conv(x, k)
            y = BatchNormalization(a, s, t, m, v)
            z = If(c) <
                then_branch = q () => (float[n, 6, 3, 3] p) { p = Neg(a) },
                else_branch = e () => (float[n, 6, 3, 3] r) { r = Abs(a) }
            >
        }""",
        k=plain(6, 4, 1, 1),
        **_statistics(6),
    )
    feeds = [{"c": np.array(flag), "x": plain(1, 4, 3, 3)} for flag in (True, False)]
    model, _ = rewrite(source, Simplify(), feeds=feeds)
    assert ops(model)["BatchNormalization"] == 1


# ------------------------------------------------------------------------------------------------------------- traces


TRACE_KEYS = ("pkg.torch.onnx.stack_trace", "pkg.onnxscript.rewriter.rule_name", "namespace")


def traced():
    proto = parse(
        "g (float[2, 3] x, bool c) => (float[2, 3] y) { z = Relu(x) y = If(c) <"
        "then_branch = t() => (float[2, 3] a) {a = Neg(z)}, else_branch = e() => (float[2, 3] b) {b = Abs(z)}> }"
    )
    branch = next(node for node in proto.graph.node if node.op_type == "If").attribute[0].g
    for holder in (proto.graph, proto.graph.node[0], branch.node[0]):
        for key in (*TRACE_KEYS, "namespaces", "pkg.mine"):
            holder.metadata_props.add(key=key, value="model.py, line 3")
    return proto


def test_stack_traces_of_the_exporter_are_dropped_and_other_notes_kept():
    proto = traced()
    model = load(proto)
    other = model.copy()
    outcome = Simplify().run(model, Context())
    assert [change.rule for change in outcome.changes] == ["drop-traces"]
    result = model.to_proto()
    branch = next(node for node in result.graph.node if node.op_type == "If").attribute[0].g
    for holder in (result.graph, result.graph.node[0], branch.node[0]):
        assert [entry.key for entry in holder.metadata_props] == ["namespaces", "pkg.mine"]
    assert other.to_proto() == load(proto).to_proto()
    model = load(proto)
    assert not Simplify().run(model, Context(skip_rules=frozenset({"drop-traces"}))).changes
    assert len(model.to_proto().graph.node[0].metadata_props) == 5


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_an_initial_state_of_zeros_that_both_directions_join_goes(start: float):
    """As tf2onnx writes a bidirectional layer of Keras: zeros of the size of the batch, for each direction."""
    rng = np.random.default_rng(0)
    source = parse(
        """g (float[T, N, 3] x) => (float[T, 2, N, 4] y) {
            s = Shape (x)
            n = Slice (s, one, two, zero)
            size = Concat <axis = 0> (n, units)
            state = Expand (start, size)
            part = Unsqueeze (state, zero)
            both = Concat <axis = 0> (part, part)
            y = LSTM <hidden_size = 4, direction = "bidirectional"> (x, w, r, , , both, both)
        }""",
        zero=np.array([0]),
        one=np.array([1]),
        two=np.array([2]),
        units=np.array([4]),
        start=np.float32(start),
        w=rng.normal(size=(2, 16, 3)).astype(np.float32),
        r=rng.normal(size=(2, 16, 4)).astype(np.float32),
    )
    feeds = [{"x": rng.normal(size=(5, batch, 3)).astype(np.float32)} for batch in (1, 3)]
    model, _ = rewrite(source, Simplify(), feeds=feeds)
    assert (ops(model).keys() == {"LSTM"}) == (start == 0)
