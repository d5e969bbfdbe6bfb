"""Traps around weights: what folds into a convolution, a product or a pool, and what only looks as if it could."""

import numpy as np
import onnx
import pytest
from equivalence import Runtime, difference, simplified
from rewriting import ops, parse, plain

_IMAGE = {"x": plain(2, 3, 5, 5)}
_SCALE = {name: plain(4, seed=seed) for seed, name in enumerate(("s", "b", "m"))} | {"v": np.abs(plain(4)) + 0.5}
_SHARED = (
    "g (float[n, 3, 5, 5] x) => (float[n, 4, 5, 5] y, float[n, 4, 5, 5] z) "
    "{ h = Conv(x, w) y = BatchNormalization(h, s, b, m, v) z = Conv(x, w) }"
)


def _check(source: onnx.ModelProto, *feeds: dict[str, np.ndarray]) -> onnx.ModelProto:
    """Simplify without a guard; compare on feeds; return the result."""
    onnx.checker.check_model(source, full_check=True)
    result, _ = simplified(source)
    onnx.checker.check_model(result, full_check=True)
    before, after = Runtime(source), Runtime(result)
    for feed in feeds:
        for wanted, got in zip(before.run(feed), after.run(feed), strict=True):
            fault = difference(wanted, got, scale=10.0)
            assert not fault, f"{fault}\n{onnx.printer.to_text(result)}"
    return result


def _conv(**more: np.ndarray) -> dict[str, np.ndarray]:
    return {"w": plain(4, 3, 1, 1), **more}


# ------------------------------------------------------------------------------------------ into a convolution's weight


def test_batch_norm_folds_into_a_convolution_of_its_own():
    text = "g (float[n, 3, 5, 5] x) => (float[n, 4, 5, 5] y) { h = Conv(x, w) y = BatchNormalization(h, s, b, m, v) }"
    result = _check(parse(text, **_conv(**_SCALE)), _IMAGE, {"x": plain(0, 3, 5, 5)})
    assert ops(result) == {"Conv": 1}


def test_batch_norm_leaves_a_shared_weight_as_it_is():
    """The other convolution must go on reading the weight from before."""
    _check(parse(_SHARED, **_conv(**_SCALE)), _IMAGE)


def test_batch_norm_leaves_a_convolution_whose_output_is_read_elsewhere():
    text = (
        "g (float[n, 3, 5, 5] x) => (float[n, 4, 5, 5] y, float[n, 4, 5, 5] h) "
        "{ h = Conv(x, w) y = BatchNormalization(h, s, b, m, v) }"
    )
    assert ops(_check(parse(text, **_conv(**_SCALE)), _IMAGE))["Conv"] >= 1


@pytest.mark.parametrize("name", ["w", "s", "v"])
def test_batch_norm_leaves_what_a_caller_may_override(name):
    text = "g (float[n, 3, 5, 5] x) => (float[n, 4, 5, 5] y) { h = Conv(x, w) y = BatchNormalization(h, s, b, m, v) }"
    source = parse(text, **_conv(**_SCALE))
    array = {**_conv(), **_SCALE}[name]
    source.graph.input.append(onnx.helper.make_tensor_value_info(name, 1, array.shape))
    result = _check(source, _IMAGE, {**_IMAGE, name: array * 2 + 1})
    assert ops(result) == {"Conv": 1, "BatchNormalization": 1}


def test_batch_norm_in_training_mode_stays():
    """It normalises by the batch, and its outputs are the statistics."""
    text = (
        "g (float[n, 3, 5, 5] x) => (float[n, 4, 5, 5] y, float[4] a) "
        "{ h = Conv(x, w) y, a, c = BatchNormalization<training_mode = 1>(h, s, b, m, v) }"
    )
    assert ops(_check(parse(text, **_conv(**_SCALE)), _IMAGE)) == {"Conv": 1, "BatchNormalization": 1}


def test_batch_norm_with_a_variance_below_zero_gives_nan_still():
    text = "g (float[n, 3, 5, 5] x) => (float[n, 4, 5, 5] y) { h = Conv(x, w) y = BatchNormalization(h, s, b, m, v) }"
    _check(parse(text, **_conv(**{**_SCALE, "v": np.float32([1, -1, 0, 2])})), _IMAGE)


AFTER_A_CONVOLUTION = {
    "a-channel": (plain(4, 1, 1), True),
    "a-batch-of-channels": (plain(1, 4, 1, 1), True),
    "a-scalar": (plain(1)[0], True),
    "along-the-width": (plain(5), False),  # as many numbers as a row, and none a channel
    "a-pixel": (plain(5, 5), False),
    "more-images": (plain(2, 4, 1, 1), False),
    "a-fifth-axis": (plain(1, 1, 1, 1, 1), False),  # right but for the rank of the result
    "a-fifth-axis-of-channels": (plain(1, 1, 4, 1, 1), False),
}


@pytest.mark.parametrize("op", ["Mul", "Add", "Sub", "Div"])
@pytest.mark.parametrize("name", AFTER_A_CONVOLUTION)
def test_a_constant_folds_into_a_convolution_only_by_channel(name, op):
    constant, folds = AFTER_A_CONVOLUTION[name]
    text = f"g (float[n, 3, 5, 5] x) => (float y) {{ h = Conv(x, w, b) k = {op}(h, c) y = ReduceSum<keepdims = 0>(k) }}"
    one_image = {"x": plain(1, 3, 5, 5)}
    source = parse(text.replace("=> (float y)", "=> (float z, int64[r] y)").replace(
        "y = ReduceSum<keepdims = 0>(k)", "z = ReduceSum<keepdims = 0>(k) y = Shape(k)"
    ), **_conv(b=plain(4), c=constant))  # fmt: skip
    result = _check(source, one_image, *([] if name == "more-images" else [_IMAGE]))
    assert (ops(result)[op] == 0) == folds or op == "Sub", ops(result)


def test_a_channel_of_four_rows_is_no_row_of_four_channels():
    """Where width and channels are equal, a wrong axis keeps every shape."""
    text = "g (float[n, 3, 4, 4] x) => (float[n, 4, 4, 4] y) { h = Conv(x, w) y = Mul(h, c) }"
    _check(parse(text, **_conv(c=plain(4))), {"x": plain(2, 3, 4, 4)})


def test_padding_with_something_else_than_zero_stays_before_a_convolution():
    text = "g (float[n, 3, 5, 5] x) => (float[n, 4, p, q] y) { h = Pad(x, p, v) y = Conv(h, w) }"
    pads = np.array([0, 0, 1, 1, 0, 0, 1, 1])
    kernel = plain(4, 3, 3, 3)
    assert ops(_check(parse(text, w=kernel, p=pads, v=np.float32(1)), _IMAGE))["Pad"] == 1
    assert ops(_check(parse(text, w=kernel, p=pads, v=np.float32(0)), _IMAGE)) == {"Conv": 1}


@pytest.mark.parametrize("pads", [[0, 0, -1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]])
def test_padding_that_crops_or_is_not_spatial_stays_before_a_convolution(pads):
    text = "g (float[n, 2, 5, 5] x) => (float[a, 4, p, q] y) { h = Pad(x, p) y = Conv(h, w) }"
    _check(parse(text, w=plain(4, 2 + pads[1], 3, 3), p=np.array(pads)), {"x": plain(2, 2, 5, 5)})


def test_padding_of_named_axes_goes_where_they_say():
    text = "g (float[n, 3, 5, 5] x) => (float[n, 4, p, q] y) { h = Pad(x, p, , a) y = Conv(h, w) }"
    source = parse(text, 18, w=plain(4, 3, 3, 3), p=np.array([2, 1, 0, 1]), a=np.array([-1, 2]))
    _check(source, _IMAGE)


@pytest.mark.parametrize("mode", ["edge", "reflect"])
def test_padding_by_copies_stays(mode):
    text = f'g (float[n, 3, 5, 5] x) => (float[n, 4, p, q] y) {{ h = Pad<mode = "{mode}">(x, p) y = Conv(h, w) }}'
    result = _check(parse(text, w=plain(4, 3, 3, 3), p=np.array([0, 0, 1, 1, 0, 0, 1, 1])), _IMAGE)
    assert ops(result)["Pad"] == 1


POOLS = {
    # A pool pads with minus infinity, or leaves the padding out of the mean.
    "max-of-zeros": ("MaxPool<kernel_shape = [2, 2]>(h)", 0.0),
    "max-of-the-lowest": ("MaxPool<kernel_shape = [2, 2]>(h)", float(np.finfo(np.float32).min)),
    "mean": ("AveragePool<kernel_shape = [2, 2]>(h)", 0.0),
    "mean-with-padding": ("AveragePool<kernel_shape = [2, 2], count_include_pad = 1>(h)", 0.0),
    "mean-with-padding-rounded-up": (
        "AveragePool<kernel_shape = [2, 2], strides = [2, 2], ceil_mode = 1, count_include_pad = 1>(h)",
        0.0,
    ),
    "mean-with-own-padding": ("AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(h)", 0.0),
}


@pytest.mark.parametrize("name", POOLS)
def test_padding_before_a_pool(name):
    pool, value = POOLS[name]
    text = f"g (float[n, 3, 5, 5] x) => (float[n, 3, p, q] y) {{ h = Pad(x, p, v) y = {pool} }}"
    source = parse(text, p=np.array([0, 0, 1, 0, 0, 0, 1, 1]), v=np.float32(value))
    _check(source, {"x": -np.abs(plain(2, 3, 5, 5))}, {"x": np.full((1, 3, 5, 5), -np.inf, np.float32)})


# --------------------------------------------------------------------------------------------------- into a product


@pytest.mark.parametrize("op", ["Mul", "Add"])
@pytest.mark.parametrize("shape", [(4,), (1,), (), (1, 4), (3, 1), (3, 4), (1, 1, 4), (2, 1, 1), (1, 1, 1, 1)])
def test_a_constant_after_a_product(shape, op):
    """Along the rows it folds into the weight; elsewhere, or where it raises the rank, it must not."""
    text = f"g (float[a, 3, 5] x) => (float z, int64[r] y) {{ h = MatMul(x, w) k = {op}(h, c) z = ReduceSum<keepdims = 0>(k) y = Shape(k) }}"  # noqa: E501
    _check(
        parse(text, w=plain(5, 4), c=plain(*shape)),
        {"x": plain(1, 3, 5)},
        {"x": plain(2, 3, 5)} if shape != (2, 1, 1) else {"x": plain(1, 3, 5)},
    )


@pytest.mark.parametrize(
    "attributes", ["", "<transB = 1>", "<alpha = 0.5>", "<beta = 0.0>", "<transA = 1, beta = 2.0>"]
)
@pytest.mark.parametrize("op", ["Mul", "Add"])
def test_a_constant_after_a_gemm(op, attributes):
    text = f"g (float[a, b] x) => (float[c, d] y) {{ h = Gemm{attributes}(x, w, k) y = {op}(h, c) }}"
    weight = plain(4, 5) if "transB" in attributes else plain(5, 4)
    x = plain(5, 3) if "transA" in attributes else plain(3, 5)
    for constant in (plain(4), plain(1), plain(3, 1), plain(1, 4)):
        _check(parse(text, w=weight, k=plain(4, seed=2), c=constant), {"x": x})


def test_a_product_and_a_bias_of_higher_rank_are_no_gemm():
    for shape in ((4,), (1, 4), (3, 1), (1, 1, 4), ()):
        text = "g (float[a, 5] x) => (float z, int64[r] y) { h = MatMul(x, w) k = Add(c, h) y = Shape(k) z = ReduceSum<keepdims = 0>(k) }"  # noqa: E501
        _check(parse(text, w=plain(5, 4), c=plain(*shape)), {"x": plain(3, 5)})


def test_a_product_of_vectors_is_no_gemm():
    _check(
        parse("g (float[5] x) => (float[4] y) { h = MatMul(x, w) y = Add(h, c) }", w=plain(5, 4), c=plain(4)),
        {"x": plain(5)},
    )


def test_integer_products_keep_their_bits():
    text = "g (int32[a, 5] x) => (int32[a, 4] y) { h = MatMul(x, w) k = Mul(h, c) y = Add(k, c) }"
    weight = np.arange(20, dtype=np.int32).reshape(5, 4) * 10**8
    _check(parse(text, w=weight, c=np.int32(7)), {"x": np.arange(10, dtype=np.int32).reshape(2, 5)})


def test_norms_that_only_look_like_one():
    """The mean of one axis and the variance of another, or a power that is no square, are no LayerNormalization."""
    for first, second, power in ((-1, -2, 2.0), (-1, -1, 3.0), (-1, -1, 2.0)):
        text = (
            f"g (float[a, 4, 4] x) => (float[a, 4, 4] y) {{ m = ReduceMean<axes = [{first}]>(x) d = Sub(x, m) "
            f"q = Pow(d, p) v = ReduceMean<axes = [{second}]>(q) e = Add(v, t) r = Sqrt(e) y = Div(d, r) }}"
        )
        _check(parse(text, p=np.float32(power), t=np.float32(20.0)), {"x": plain(2, 4, 4)})


def test_gelus_that_only_look_like_one():
    for root, one, half in ((2**0.5, 1.0, 0.5), (2.0, 1.0, 0.5), (2**0.5, 2.0, 0.5), (2**0.5, 1.0, 0.25)):
        text = "g (float[a] x) => (float[a] y) { d = Div(x, r) e = Erf(d) s = Add(e, o) m = Mul(x, s) y = Mul(m, h) }"
        source = parse(text, 20, r=np.float32(root), o=np.float32(one), h=np.float32(half))
        _check(source, {"x": plain(16) * 3})


def test_hard_swishes_that_only_look_like_one():
    for three, six, sixth in ((3.0, 6.0, 6.0), (2.0, 6.0, 6.0), (3.0, 5.0, 6.0), (3.0, 6.0, 3.0)):
        text = "g (float[a] x) => (float[a] y) { s = Add(x, t) c = Clip(s, z, u) m = Mul(x, c) y = Div(m, d) }"
        arrays = {"t": three, "z": 0.0, "u": six, "d": sixth}
        source = parse(text, **{name: np.float32(value) for name, value in arrays.items()})
        _check(source, {"x": np.linspace(-8, 8, 33, dtype=np.float32)})
