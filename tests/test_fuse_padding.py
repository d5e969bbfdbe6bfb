"""Padding is taken up by what reads it."""

import numpy as np
import pytest
from fusing import c, fuse
from rewriting import ops, parse, plain

PADDED = {
    "old": (7, "p = Pad<pads = [0, 0, 1, 2, 0, 0, 3, 0]>(x) y = Conv<pads = [1, 0, 1, 0]>(p, k)"),
    "inputs": (13, "p = Pad(x, amounts) y = Conv(p, k)"),
    "zero given": (13, 'p = Pad(x, amounts, zero) y = Conv<auto_pad = "VALID">(p, k)'),
    "axes": (18, "p = Pad(x, two, , axes) y = Conv(p, k)"),
    "negative axes": (18, "p = Pad(x, two, , naxes) y = Conv(p, k)"),
    "average": (13, "p = Pad(x, amounts) y = AveragePool<kernel_shape = [4, 3]>(p)"),
    "counted average": (
        13,
        "p = Pad(x, amounts) y = AveragePool<kernel_shape = [5, 4], pads = [1, 1, 1, 1], "
        "count_include_pad = 1, strides = [2, 2]>(p)",
    ),
    "maximum": (13, "p = Pad(x, amounts, least) y = MaxPool<kernel_shape = [4, 4]>(p)"),
    "two readers": (13, "p = Pad(x, amounts) a = Conv(p, k) b = Conv(p, l) y = Add(a, b)"),
}
PAD_CONSTANTS = {
    "k": plain(6, 4, 3, 3),
    "l": plain(6, 4, 3, 3, seed=1),
    "amounts": np.array([0, 0, 1, 2, 0, 0, 3, 1]),
    "two": np.array([1, 2, 0, 3]),
    "axes": np.array([3, 2]),
    "naxes": np.array([-1, -2]),
    "zero": c(0),
    "least": c(-np.inf),
}


@pytest.mark.parametrize("form", PADDED)
def test_padding_is_taken_up(form):
    opset, body = PADDED[form]
    source = parse(
        f"g (float[n, 4, 5, 6] x) => (float[n, o, p, q] y) {{ {body} }}".replace("p = Pad", "p9 = Pad").replace(
            "(p", "(p9"
        ),
        opset=opset,
        **PAD_CONSTANTS,
    )
    feeds = [{"x": plain(n, 4, 5, 6) - 5} for n in (1, 3)]
    found, _ = fuse(source, feeds)
    assert found["Pad"] == 0


UNPADDED = {
    "reflecting": ('p = Pad<mode = "reflect">(x, amounts) y = Conv(p, k)', "reflect"),
    "ones": ("p = Pad(x, amounts, one) y = Conv(p, k)", "not zeros"),
    "channels": ("p = Pad(x, channels) y = Conv(p, wide)", "more than spatial axes"),
    "cropping": ("p = Pad(x, crop) y = Conv(p, k)", "crops"),
    "same": ('p = Pad(x, amounts) y = Conv<auto_pad = "SAME_UPPER">(p, k)', "depends on the size"),
    "another reader": ("p = Pad(x, amounts) a = Conv(p, k) b = ReduceMax<keepdims = 0>(p) y = Add(a, b)", "ReduceMax"),
    "an infinite weight": ("p = Pad(x, amounts) y = Conv(p, inf)", "finite"),
    "uncounted": (
        "p = Pad(x, amounts) y = AveragePool<kernel_shape = [5, 5], pads = [1, 1, 1, 1]>(p)",
        "does not count",
    ),
    "wider than a window": ("p = Pad(x, amounts) y = AveragePool<kernel_shape = [2, 2]>(p)", "padding alone"),
    "ceil": (
        "p = Pad(x, amounts) y = AveragePool<kernel_shape = [4, 4], strides = [3, 3], ceil_mode = 1>(p)",
        "ceil_mode",
    ),
    "maximum of zeros": ("p = Pad(x, amounts) y = MaxPool<kernel_shape = [4, 4]>(p)", "largest of a window"),
    "indices": (
        "p = Pad(x, amounts, least) a, b = MaxPool<kernel_shape = [4, 4]>(p) d = Cast<to = 1>(b) y = Add(a, d)",
        "indices",
    ),
}


@pytest.mark.parametrize("form", UNPADDED)
def test_padding_that_would_differ_stays_and_says_why(form):
    body, why = UNPADDED[form]
    infinite = plain(6, 4, 3, 3)
    infinite[0, 0, 0, 0] = np.inf
    source = parse(
        f"g (float[n, 4, 5, 6] x) => (float[n, o, r, q] y) {{ {body} }}",
        one=c(1),
        channels=np.array([0, 1, 1, 1, 0, 0, 0, 0]),
        crop=np.array([0, 0, -1, 1, 0, 0, 0, 0]),
        wide=plain(6, 5, 3, 3),
        inf=infinite,
        **PAD_CONSTANTS,
    )
    before = ops(source)
    found, outcome = fuse(source, [{"x": plain(2, 4, 5, 6) - 5}])
    assert found == before
    assert any(why in refusal.why for refusal in outcome.refusals), outcome.refusals


def test_integer_convolutions_take_zeros_only_where_zero_means_zero():
    text = "g (uint8[n, 4, 5, 6] x) => (int32[n, 6, r, q] y) {{ p = Pad(x, amounts) y = ConvInteger(p, k{}) }}"
    arrays = {
        "amounts": PAD_CONSTANTS["amounts"],
        "k": np.arange(216, dtype=np.uint8).reshape(6, 4, 3, 3),
        "point": np.array(3, np.uint8),
        "origin": np.array(0, np.uint8),
    }
    feed = {"x": np.arange(120, dtype=np.uint8).reshape(1, 4, 5, 6)}
    for argument, pads in (("", 0), (", origin", 0), (", point", 1)):
        found, _ = fuse(parse(text.format(argument), **arrays), [feed])
        assert found["Pad"] == pads
