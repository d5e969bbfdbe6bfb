"""Scales and shifts go into the weights of layers, or say why they stay."""

import numpy as np
import pytest
from fusing import c, fuse
from rewriting import ops, parse, plain

CONV = {"k": plain(6, 4, 3, 3), "c": plain(6, seed=2), "v": plain(6, 1, 1, seed=3) + 4}
INTO_CONV = {
    "mul": "a = Conv(x, k, c) y = Mul(a, v)",
    "mul without bias": "a = Conv<pads = [1, 1, 1, 1]>(x, k) y = Mul(v, a)",
    "div": "a = Conv(x, k, c) y = Div(a, v)",
    "add": "a = Conv(x, k) y = Add(v, a)",
    "add to a bias": "a = Conv(x, k, c) y = Add(a, v)",
    "sub": "a = Conv(x, k, c) y = Sub(a, v)",
    "from": "a = Conv(x, k, c) y = Sub(v, a)",
    "affine": "a = Conv(x, k, c) b = Mul(a, v) d = Add(b, v) y = Div(d, two)",
    "number": "a = Conv(x, k, c) b = Mul(two, a) y = Add(b, row)",
    "row": "a = Conv(x, k, c) y = Mul(a, whole)",
    "transposed": "a = ConvTranspose<group = 2, strides = [2, 2]>(x, t, c) b = Mul(a, v) y = Sub(b, v)",
}


@pytest.mark.parametrize("opset", [7, 13, 21])
@pytest.mark.parametrize("form", INTO_CONV)
def test_channels_are_scaled_and_shifted_in_the_weights_of_a_convolution(form, opset):
    source = parse(
        f"g (float[n, 4, h, w] x) => (float[n, 6, p, q] y) {{ {INTO_CONV[form]} }}",
        opset=opset,
        two=c(2),
        row=np.full((1, 1), 3, np.float32),
        whole=plain(1, 6, 1, 1),
        t=plain(4, 3, 2, 2),
        **CONV,
    )
    feeds = [{"x": plain(n, 4, h, 5)} for n, h in ((1, 5), (2, 7), (0, 4))]
    found, _ = fuse(source, feeds)
    assert sum(found.values()) == 1


NOT_INTO_CONV = {
    "a vector of columns": ("a = Conv(x, k) y = Mul(a, last)", "not one number a channel"),
    "a higher rank": ("a = Conv(x, k) b = Mul(a, five) y = Squeeze(b, axis)", "not one number a channel"),
    "a result read elsewhere": ("a = Conv(x, k) b = Mul(a, v) y = Add(b, a)", None),
    "an unknown factor": ("w = ReduceMax<keepdims = 0>(x) a = Conv(x, k) y = Mul(a, w)", None),
    "an infinite factor": ("a = Conv(x, k) y = Mul(a, inf)", "not finite"),
    "an overflow": ("a = Conv(x, big) y = Mul(a, huge)", "overflow"),
    "an underflow": ("a = Conv(x, small) y = Mul(a, tiny)", "lose precision"),
    "a divisor of zero": ("a = Conv(x, k) y = Div(a, zeros)", None),
    "a constant divided": ("a = Conv(x, k) y = Div(v, a)", None),
    "a shift that rounds": ("a = Conv(x, k, magic) y = Sub(a, magic3)", "rounds what lies between"),
}


@pytest.mark.parametrize("form", NOT_INTO_CONV)
def test_what_a_convolution_cannot_take_stays_and_says_why(form):
    body, why = NOT_INTO_CONV[form]
    magic = np.full(6, 12582912, np.float32)
    source = parse(
        f"g (float[n, 4, h, 8] x) => (float[n, 6, p, 6] y) {{ {body} }}",
        last=plain(6),
        five=np.full((1, 1, 1, 1, 1), 2, np.float32),
        axis=np.array([0]),
        inf=c(np.inf),
        big=plain(6, 4, 3, 3) * c(1e30),
        huge=c(1e30),
        small=plain(6, 4, 3, 3) * c(1e-30),
        tiny=c(1e-12),
        zeros=np.zeros((6, 1, 1), np.float32),
        magic=magic,
        magic3=magic.reshape(6, 1, 1),
        **CONV,
    )
    before = ops(source)
    found, outcome = fuse(source, [{"x": plain(2, 4, 5, 8)}])
    assert found == before
    assert why is None or any(why in refusal.why for refusal in outcome.refusals), outcome.refusals


def test_half_precision_weights_are_not_rounded_anew():
    source = parse(
        "g (float16[n, 4, 3, 3] x) => (float16[n, 6, 3, 3] y) { a = Conv(x, k) y = Mul(a, v) }",
        k=plain(6, 4, 1, 1).astype(np.float16),
        v=plain(6, 1, 1).astype(np.float16),
    )
    found, _ = fuse(source, [])
    assert found == {"Conv": 1, "Mul": 1}


INTO_MATRIX = {
    "matmul": ("a = MatMul(x, k) y = Mul(a, v)", {"MatMul": 1}),
    "matmul and bias": ("a = MatMul(x, k) b = Add(c, a) d = Mul(b, v) y = Sub(d, row)", {"Gemm": 1}),
    "gemm": ("a = Gemm<alpha = 0.5, beta = 2.0, transB = 1>(x, kt, c) b = Div(a, v) y = Add(b, row)", {"Gemm": 1}),
    "gemm without bias": ("a = Gemm(x, k) y = Add(a, c)", {"Gemm": 1}),
    "gemm and a vector that is not constant": ("a = Gemm(x, k) y = Add(r, a)", {"Gemm": 1}),
    "matmul and a vector": ("a = MatMul(x, k) y = Add(a, c)", {"Gemm": 1}),
    "matmul and a row": ("a = MatMul(x, k) y = Add(row, a)", {"Gemm": 1}),
    "transposed": ("t = Transpose(x) u = Gemm<transA = 1>(t, k, c) v9 = Transpose<perm = [1, 0]>(kt) w = MatMul(x, v9) "
                   "y = Add(u, w)", {"Gemm": 1, "Transpose": 1, "MatMul": 1, "Add": 1}),
    "before": ("a = Mul(x, i) y = MatMul(a, k)", {"MatMul": 1}),
    "before a gemm": ("a = Mul(i, x) b = Sub(a, i) y = Gemm<transB = 1, alpha = 0.5>(b, kt, c)", {"Gemm": 1}),
}  # fmt: skip


@pytest.mark.parametrize("form", INTO_MATRIX)
def test_columns_are_scaled_and_shifted_in_matrices(form):
    body, wanted = INTO_MATRIX[form]
    k = plain(5, 6)
    source = parse(
        f"g (float[n, 5] x, float[6] r) => (float[n, 6] y) {{ {body} }}",
        k=k,
        kt=np.ascontiguousarray(k.T),
        c=plain(6, seed=2),
        v=plain(6, seed=3) + 4,
        i=plain(5, seed=4) + 4,
        row=plain(1, 6, seed=5),
    )
    found, _ = fuse(source, [{"x": plain(n, 5), "r": plain(6, seed=9)} for n in (1, 4, 0)], atol=1e-5)
    assert found == wanted


NOT_GEMM = {
    "higher rank": "h = Unsqueeze(x, axes) a = MatMul(h, k) b = Add(a, c) y = Squeeze(b, axes)",
    "a matrix": "a = MatMul(x, k) y = Add(a, matrix)",
    "a column": "a = MatMul(x, k) y = Add(a, column)",
    "a matrix behind a gemm": "a = Gemm(x, k) y = Add(a, matrix)",
    "a widening row": "a = MatMul(x, k1) y = Add(a, c)",
}


@pytest.mark.parametrize("form", NOT_GEMM)
def test_what_a_gemm_would_not_broadcast_stays(form):
    source = parse(
        f"g (float[n, 5] x) => (float[n, 6] y) {{ {NOT_GEMM[form]} }}",
        k=plain(5, 6),
        k1=plain(5, 1),
        c=plain(6),
        matrix=plain(4, 6),
        column=plain(4, 1),
        axes=np.array([0]),
    )
    before = ops(source)
    found, _ = fuse(source, [{"x": plain(4, 5)}])
    assert found == before


def test_reshapes_around_a_gemm_go():
    source = parse(
        "g (float[n, 7, 5] x) => (float[n, 7, 6] y) "
        "{ a = Reshape(x, flat) b = Gemm<transB = 1>(a, k, c) y = Reshape(b, shape) }",
        flat=np.array([-1, 5]),
        shape=np.array([0, 7, 6]) * 0 + np.array([-1, 7, 6]),
        k=plain(6, 5),
        c=plain(6),
    )
    found, _ = fuse(source, [{"x": plain(n, 7, 5)} for n in (1, 3, 0)])
    assert found == {"MatMul": 1, "Add": 1}


def test_reshapes_that_also_regroup_the_rows_stay():
    source = parse(
        "g (float[6, 4, 5] x) => (float[4, 6, 6] y) { a = Reshape(x, flat) b = Gemm(a, k, c) y = Reshape(b, shape) }",
        flat=np.array([-1, 5]),
        shape=np.array([4, 6, 6]),
        k=plain(5, 6),
        c=plain(6),
    )
    found, _ = fuse(source, [{"x": plain(6, 4, 5)}])
    assert found == {"Reshape": 2, "Gemm": 1}


FORWARD = {
    "factor": ("b = Mul(x, i) y = Conv(b, k, c)", 1),
    "factor and padding": ("b = Div(x, i) y = Conv<pads = [1, 1, 1, 1]>(b, k)", 1),
    "groups": ("b = Mul(x, i) y = Conv<group = 2>(b, kg, c)", 1),
    "shift": ("b = Add(x, i) y = Conv(b, k, c)", 1),
    "shift and groups": ("b = Sub(x, i) y = Conv<group = 2>(b, kg)", 1),
    "shift and auto_pad": ("b = Sub(x, i) y = Conv<auto_pad = \"VALID\">(b, k)", 1),
    "affine": ("a = Mul(x, i) b = Add(a, i) y = Conv(b, k, c)", 1),
    "affine and padding": ("a = Mul(x, i) b = Add(a, i) y = Conv<pads = [0, 1, 0, 1]>(b, k, c)", 2),
    "transposed": ("b = Mul(x, i) y = ConvTranspose<strides = [2, 2]>(b, t)", 1),
    "batchnorm": ("b = BatchNormalization(x, s4, t4, m4, v4) y = Conv(b, k, c)", 1),
    "batchnorm and padding": ("b = BatchNormalization(x, s4, t4, m4, v4) y = Conv<pads = [1, 1, 1, 1]>(b, k, c)", 2),
}  # fmt: skip


@pytest.mark.parametrize("form", FORWARD)
def test_scales_and_shifts_go_into_the_layer_behind(form):
    body, nodes = FORWARD[form]
    source = parse(
        f"g (float[n, 4, h, w] x) => (float[n, 6, p, q] y) {{ {body} }}",
        k=plain(6, 4, 3, 3),
        kg=plain(6, 2, 3, 3),
        t=plain(4, 6, 2, 2),
        c=plain(6, seed=2),
        i=plain(4, 1, 1, seed=3) + 4,
        s4=plain(4, seed=4),
        t4=plain(4, seed=5),
        m4=plain(4, seed=6),
        v4=plain(4, seed=7) ** 2,
    )
    found, outcome = fuse(source, [{"x": plain(n, 4, h, 5)} for n, h in ((1, 5), (2, 7))], atol=1e-4)
    assert sum(found.values()) == nodes
    assert nodes == 1 or any("pads with zeros" in refusal.why for refusal in outcome.refusals)


def test_a_factor_that_widens_what_a_convolution_reads_stays():
    source = parse(
        "g (float[n, 1, h, w] x) => (float[n, 6, p, q] y) { b = Mul(x, i) y = Conv(b, k) }",
        i=plain(4, 1, 1),
        k=plain(6, 4, 3, 3),
    )
    found, outcome = fuse(source, [{"x": plain(2, 1, 5, 5)}])
    assert found == {"Mul": 1, "Conv": 1}
    assert any("one number a channel" in refusal.why for refusal in outcome.refusals)


def test_a_large_weight_that_two_read_keeps_its_factor():
    text = "g (float[n, 80] x) => (float[n, 80] y) { a = MatMul(x, k) b = Mul(a, two) y = MatMul(b, k) }"
    found, outcome = fuse(parse(text, k=plain(80, 80), two=c(2)), [{"x": plain(2, 80)}], atol=1e-3)
    assert found == {"MatMul": 2, "Mul": 1}
    assert any("read elsewhere" in refusal.why for refusal in outcome.refusals)
    found, _ = fuse(parse(text.replace("80", "8"), k=plain(8, 8), two=c(2)), [{"x": plain(2, 8)}], atol=1e-4)
    assert found == {"MatMul": 2}


def test_a_number_moves_through_views_and_products():
    source = parse(
        """g (float[n, 6, 8] x) => (float[n, 2, 6, 6] y) {
            a = MatMul(x, k) b = Add(a, c) d = Reshape(b, heads) q = Transpose<perm = [0, 2, 1, 3]>(d)
            e = MatMul(x, l) f = Reshape(e, heads) t = Transpose<perm = [0, 2, 3, 1]>(f)
            s = MatMul(q, t) y = Div(s, root)
        }""",
        k=plain(8, 8),
        l=plain(8, 8, seed=1),
        c=plain(8, seed=2),
        heads=np.array([0, 0, 2, 4]),
        root=c(2),
    )
    found, _ = fuse(source, [{"x": plain(n, 6, 8)} for n in (1, 3)], atol=1e-4)
    assert found == {"MatMul": 3, "Add": 1, "Reshape": 2, "Transpose": 2}


def test_two_numbers_in_front_of_a_product_become_one():
    source = parse(
        "g (float[n, 6, 8] x, float[n, 8, 6] z) => (float[n, 6, 6] y) { a = Mul(x, p) b = Mul(z, p) y = MatMul(a, b) }",
        p=c(0.4),
    )
    found, _ = fuse(source, [{"x": plain(2, 6, 8), "z": plain(2, 8, 6)}])
    assert found == {"Mul": 1, "MatMul": 1}


def test_names_of_outputs_are_kept_and_outputs_inside_of_a_pattern_stay():
    source = parse(
        "g (float[n, 4, 5, 5] x) => (float[n, 6, p, q] a, float[n, 6, p, q] y) { a = Conv(x, k) y = Mul(a, v) }", **CONV
    )
    found, _ = fuse(source, [{"x": plain(2, 4, 5, 5)}])
    assert found == {"Conv": 1, "Mul": 1}


def test_bodies_and_functions_are_fused_like_the_main_graph():
    source = parse(
        """g (bool t, float[n, 3] x) => (float[n, 6] y) {
            y = If(t) <
                then_branch = q () => (float[n, 6] p) { a = my.f(x) p = Mul(a, two) },
                else_branch = e () => (float[n, 6] r) { b = MatMul(x, k) r = Div(b, two) }
            >
        }""",
        functions="""<domain: "my", opset_import: ["" : 17]> f(x) => (y) {
            three = Constant<value = float {3.0}>() six = Constant<value = float {6.0}>()
            h = Mul(x, three) i = Mul(h, six) y = Concat<axis = 1>(i, i)
        }""",
        domains=', "my" : 1',
        k=plain(3, 6),
        two=c(2),
    )
    feeds = [{"t": np.array(flag), "x": plain(2, 3)} for flag in (False, True)]
    found, _ = fuse(source, feeds)
    assert found == {"If": 1, "f": 1, "Mul": 2, "Concat": 1, "Constant": 1, "MatMul": 1}


def test_an_overridable_constant_is_not_folded():
    source = parse(
        "g (float[n, 5] x, float[6] v) => (float[n, 6] y) { a = MatMul(x, k) y = Mul(a, v) }", k=plain(5, 6), v=plain(6)
    )
    found, _ = fuse(source, [{"x": plain(2, 5), "v": plain(6, seed=8)}])
    assert found == {"MatMul": 1, "Mul": 1}


@pytest.mark.parametrize("opset", [13, 20])
def test_the_factors_around_an_erf_go_into_the_layers_around_it(opset):
    source = parse(
        """g (float[n, 7, 5] x) => (float[n, 7, 4] y) {
            a = MatMul(x, k) b = Add(c, a) u = Div(b, root2) e = Erf(u) s = Add(e, one) p = Mul(b, s) h = Mul(p, half)
            y = MatMul(h, l)
        }""",
        opset=opset,
        k=plain(5, 6),
        c=plain(6, seed=1),
        l=plain(6, 4, seed=2),
        root2=c(np.sqrt(2)),
        one=c(1),
        half=c(0.5),
    )
    found, _ = fuse(source, [{"x": plain(n, 7, 5)} for n in (1, 3, 0)], atol=1e-5)
    activation = {"Erf": 1, "Add": 2, "Mul": 1} if opset < 20 else {"Gelu": 1, "Add": 1}
    assert found == {"MatMul": 2, **activation}


def test_the_factors_around_an_erf_stay_where_another_node_reads_what_it_gates():
    source = parse(
        """g (float[n, 5] x) => (float[n, 4] y, float[n, 6] z) {
            a = MatMul(x, k) u = Div(a, two) e = Erf(u) s = Add(e, one) p = Mul(a, s) y = MatMul(p, l) z = Relu(a)
        }""",
        k=plain(5, 6),
        l=plain(6, 4, seed=2),
        two=c(2),
        one=c(1),
    )
    before = ops(source)
    found, _ = fuse(source, [{"x": plain(3, 5)}])
    assert found == before
