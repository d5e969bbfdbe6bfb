"""Hand-made traps at which simplifiers go wrong silently: each says why, and what must still be simplified.

Every model goes through the pass behind ``slim`` with no guard behind it. Outputs must keep their bits, signs of zeros
included, but where ``rounding`` says that the rewrite adds in another order.
"""

from dataclasses import dataclass, field

import numpy as np
import onnx
import pytest
from equivalence import Runtime, difference, same_bits, simplified
from rewriting import normal, ops, parse, plain

_INT = np.int64


@dataclass(frozen=True)
class Trap:
    """A model with feeds, how often operators must be left, and which must be gone."""

    text: str
    feeds: list[dict[str, np.ndarray]]
    opset: int = 17
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    keeps: dict[str, int] = field(default_factory=dict)
    drops: tuple[str, ...] = ()
    rounding: bool = False


def _check(trap: Trap) -> onnx.ModelProto:
    source = parse(trap.text, trap.opset, **trap.constants)
    onnx.checker.check_model(source, full_check=True)
    result, _ = simplified(source)
    onnx.checker.check_model(result, full_check=True)
    before, after = Runtime(source), Runtime(result)
    for feed in trap.feeds:
        for wanted, got in zip(before.run(feed), after.run(feed), strict=True):
            fault = difference(wanted, got)
            if not fault and not trap.rounding and not same_bits(wanted, got):
                fault = "the bits differ"
            assert not fault, f"{fault}\n{onnx.printer.to_text(result)}"
    left = ops(result)
    assert {op: left[op] for op in trap.keeps} == trap.keeps, left
    assert not [op for op in trap.drops if left[op]], left
    return result


def _ints(*values: int) -> np.ndarray:
    return np.array(values, _INT)


_SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -2.5, 3.0], np.float32)

NUMBERS = {
    # -0.0 + 0.0 is 0.0: only adding -0.0, or subtracting 0.0, changes nothing.
    "add-zero": Trap("g (float[n] x) => (float[n] y) { h = Add(x, c) y = Identity(h) }", [{"x": _SPECIAL}],
                     constants={"c": np.float32(0)}, keeps={"Add": 1}),
    "zero-minus": Trap("g (float[n] x) => (float[n] y) { h = Sub(c, x) y = Identity(h) }", [{"x": _SPECIAL}],
                       constants={"c": np.float32(0)}),
    "add-negative-zero": Trap("g (float[n] x) => (float[n] y) { h = Add(x, c) y = Exp(h) }", [{"x": _SPECIAL}],
                              constants={"c": np.float32(-0.0)}, drops=("Add",)),
    # A Gemm of zeros is 0.0, but -1 times that is -0.0.
    "negated-product-plus-zero": Trap("g (float[2, 3] x) => (float[2, 2] y) "
                                      "{ h = Gemm<alpha = -1.0>(x, w) y = Add(h, c) }",
                                      [{"x": np.ones((2, 3), np.float32)}],
                                      constants={"w": np.zeros((3, 2), np.float32), "c": np.zeros(2, np.float32)}),
    # NaN * 0 is NaN and inf * 0 is NaN: the product is no constant.
    "times-zero": Trap("g (float[n] x) => (float[n] y) { y = Mul(x, c) }", [{"x": _SPECIAL}],
                       constants={"c": np.float32(0)}, keeps={"Mul": 1}),
    "minus-itself": Trap("g (float[n] x) => (float[n] y) { y = Sub(x, x) }", [{"x": _SPECIAL}], keeps={"Sub": 1}),
    "over-itself": Trap("g (float[n] x) => (float[n] y) { y = Div(x, x) }", [{"x": _SPECIAL}], keeps={"Div": 1}),
    # NaN is unequal to itself.
    "equals-itself": Trap("g (float[n] x) => (bool[n] y) { y = Equal(x, x) }", [{"x": _SPECIAL}]),
    # A one of a higher rank widens what it multiplies; a longer one repeats it.
    "times-one-that-widens": Trap("g (float[n] x) => (float[a, b] y) { y = Mul(x, c) }", [{"x": plain(3)}],
                                  constants={"c": np.ones((1, 1), np.float32)}, keeps={"Mul": 1}),
    "times-one-that-repeats": Trap("g (float[n] x) => (float[m] y) { y = Mul(x, c) }",
                                   [{"x": plain(1)}, {"x": plain(3)}], constants={"c": np.ones(3, np.float32)},
                                   keeps={"Mul": 1}),
    # Integers cut off: 7 / 2 * 2 is 6, 7 * 2 / 2 overflows for large numbers.
    "integer-div-mul": Trap("g (int64[n] x) => (int64[n] y) { h = Div(x, c) y = Mul(h, c) }",
                            [{"x": _ints(7, -7, 0, 6, 2**62)}], constants={"c": _INT(2)}),
    "integer-mul-div": Trap("g (int32[n] x) => (int32[n] y) { h = Mul(x, c) y = Div(h, c) }",
                            [{"x": np.array([7, -7, 2**30, -(2**31), 2**31 - 1], np.int32)}],
                            constants={"c": np.int32(2)}),
    # Mod takes the sign of the divisor, with fmod = 1 that of the dividend.
    "mod": Trap("g (int64[n] x) => (int64[n] y, int64[n] z) { y = Mod(x, c) z = Mod<fmod = 1>(x, c) }",
                [{"x": _ints(7, -7, 0, 6, -1)}], constants={"c": _INT(3)}),
    "mod-of-constants": Trap("g (int64[n] x) => (int64[n] y) { h = Mod(a, c) y = Add(x, h) }", [{"x": _ints(1, 2, 3)}],
                             constants={"a": _ints(-7, 7, 0), "c": _INT(3)}, drops=("Mod",)),
    # Sums of folded constants wrap as in the runtime.
    "integer-overflow": Trap("g (int32[n] x) => (int32[n] y) { h = Add(x, a) y = Add(h, a) }",
                             [{"x": np.array([1, -1, 2**31 - 1], np.int32)}], constants={"a": np.int32(2**31 - 1)}),
    "unsigned-wraparound": Trap("g (uint8[n] x) => (uint8[n] y) { c = Cast<to = 2>(big) y = Max(x, c) }",
                                [{"x": np.array([0, 3, 255], np.uint8)}], constants={"big": _ints(257)},
                                drops=("Cast",)),
    # With min above max every element is max, whatever a merged pair of Clips would say.
    "clip-crossed": Trap("g (float[n] x) => (float[n] y) { y = Clip(x, lo, hi) }", [{"x": _SPECIAL}],
                         constants={"lo": np.float32(2), "hi": np.float32(-1)}),
    "clips-apart": Trap("g (float[n] x) => (float[n] y) { h = Clip(x, a, b) y = Clip(h, c, d) }", [{"x": _SPECIAL}],
                        constants={"a": np.float32(0), "b": np.float32(1), "c": np.float32(2), "d": np.float32(3)}),
    "clip-under-relu": Trap("g (float[n] x) => (float[n] y) { h = Clip(x, a, b) y = Relu(h) }", [{"x": _SPECIAL}],
                            constants={"a": np.float32(-3), "b": np.float32(-1)}),
    # Relu of 1.0 and 6.0 in float16 and of integers is legal from opset 14 on, Clip with inputs from 11.
    "relu-of-integers": Trap("g (int32[n] x) => (int32[n] y) { h = Relu(x) y = Relu(h) }",
                             [{"x": np.array([-3, 0, 5], np.int32)}], keeps={"Relu": 1}),
    "min-max-of-nan": Trap("g (float[n] x) => (float[n] y) { h = Max(x, a) k = Min(h, b) y = Max(k, a) }",
                           [{"x": _SPECIAL}], constants={"a": np.float32(0), "b": np.float32(6)}),
    # Three casts that look like none lose digits or wrap on the way.
    "cast-through-integer": Trap("g (float[n] x) => (float[n] y) { i = Cast<to = 7>(x) y = Cast<to = 1>(i) }",
                                 [{"x": np.array([1.5, -1.5, 0.2, 7], np.float32)}], keeps={"Cast": 2}),
    "cast-through-float": Trap("g (int64[n] x) => (int64[n] y) { f = Cast<to = 1>(x) y = Cast<to = 7>(f) }",
                               [{"x": _ints(1, 2**24 + 1, -(2**24) - 1)}], keeps={"Cast": 2}),
    "cast-through-bool": Trap("g (int64[n] x) => (int64[n] y) { b = Cast<to = 9>(x) y = Cast<to = 7>(b) }",
                              [{"x": _ints(0, 5, -1)}], keeps={"Cast": 2}),
    "cast-through-narrow": Trap("g (int64[n] x) => (int64[n] y) { b = Cast<to = 3>(x) y = Cast<to = 7>(b) }",
                                [{"x": _ints(0, 300, -129)}], keeps={"Cast": 2}),
    "cast-through-wide": Trap("g (int32[n] x) => (int32[n] y) { b = Cast<to = 11>(x) y = Cast<to = 6>(b) }",
                              [{"x": np.array([0, 2**31 - 1, -(2**31)], np.int32)}]),
    # Rounding is no identity on what another Cast makes of it.
    "cast-chain-of-halves": Trap("g (double[n] x) => (float16[n] y) { f = Cast<to = 1>(x) y = Cast<to = 10>(f) }",
                                 [{"x": np.array([1 + 2**-11 + 2**-30, 0.1], np.float64)}]),
}  # fmt: skip

SHAPES = {
    # 0 copies a dimension, -1 takes the rest, and with allowzero 0 means an empty one.
    "reshape-zero": Trap("g (float[n, 3, 4] x) => (float[a, b] y) { h = Reshape(x, s) y = Reshape(h, t) }",
                         [{"x": plain(2, 3, 4)}, {"x": plain(0, 3, 4)}],
                         constants={"s": _ints(0, 4, 3), "t": _ints(-1, 12)}),
    "reshape-allowzero": Trap(
        "g (float[n, 0, 4] x) => (float[a, b, c] y) { h = Reshape<allowzero = 1>(x, s) "
        "y = Reshape<allowzero = 1>(h, t) }",
        [{"x": plain(2, 0, 4)}], constants={"s": _ints(0, 7), "t": _ints(3, 0, 2)}),
    "reshape-of-reshape-with-zero": Trap(
        "g (float[n, 3, 4] x) => (float[a, b, c] y) { h = Reshape(x, s) y = Reshape(h, t) }",
        [{"x": plain(2, 3, 4)}], constants={"s": _ints(4, 3, -1), "t": _ints(0, 0, 2)}),
    # Nothing can stand for the size of an axis but the axis: two of one name are equal, others are not.
    "expand-that-may-do-nothing": Trap("g (float[n] x) => (float[m] y) { h = Expand(x, s) y = Exp(h) }",
                                       [{"x": plain(1)}, {"x": plain(3)}], constants={"s": _ints(3)},
                                       keeps={"Expand": 1}),
    "expand-by-ones": Trap("g (float[n, 4] x) => (float[n, 4] y) { h = Expand(x, s) y = Exp(h) }",
                           [{"x": plain(1, 4)}, {"x": plain(0, 4)}], constants={"s": _ints(1, 1)}, drops=("Expand",)),
    # Without axes, what is squeezed depends on the sizes.
    "squeeze-without-axes": Trap("g (float[n, 1, 3] x) => (float y) { h = Squeeze(x) k = Unsqueeze(h, a) s = Size(k) "
                                 "f = Cast<to = 1>(s) r = ReduceSum<keepdims = 0>(k) y = Add(f, r) }",
                                 [{"x": plain(1, 1, 3)}, {"x": plain(2, 1, 3)}], constants={"a": _ints(0)},
                                 rounding=True),
    # An empty list of axes is every axis of size 1 to ONNX Runtime.
    "squeeze-by-no-axes": Trap("g (float[1, 2] x) => (float[p, q] y) { h = Squeeze(x, a) y = Exp(h) }",
                               [{"x": plain(1, 2)}], opset=13, constants={"a": _ints()}, keeps={"Squeeze": 1}),
    # Scales of nearly 1 keep the size and take other elements all the same.
    "resize-to-the-same-size": Trap("g (float[1, 1, 19] x) => (float[a, b, c] y) { h = Exp(x) "
                                    "k = Resize<mode = \"nearest\">(h, r, s) y = Neg(k) }", [{"x": plain(1, 1, 19)}],
                                    constants={"r": np.zeros(0, np.float32), "s": np.float32([1, 1, 1.05])},
                                    keeps={"Resize": 1}),
    # Ends beyond the tensor are cut; with a negative step the end before the first element is a large negative number.
    "slice-backwards": Trap("g (float[n] x) => (float[m] y) { y = Slice(x, b, e, a, s) }",
                            [{"x": plain(5)}, {"x": plain(1)}, {"x": plain(0)}],
                            constants={"b": _ints(-1), "e": _ints(-(2**63)), "a": _ints(0), "s": _ints(-1)},
                            keeps={"Slice": 1}),
    "slice-of-slice": Trap("g (float[n] x) => (float[m] y) { h = Slice(x, b, e, a) y = Slice(h, c, d, a) }",
                           [{"x": plain(9)}, {"x": plain(3)}, {"x": plain(0)}],
                           constants={"b": _ints(2), "e": _ints(-1), "a": _ints(0), "c": _ints(-3), "d": _ints(100)}),
    "slice-of-slice-with-steps": Trap("g (float[n] x) => (float[m] y) { h = Slice(x, b, e, a, s) "
                                      "y = Slice(h, b, e, a, s) }", [{"x": plain(9)}, {"x": plain(4)}],
                                      constants={"b": _ints(1), "e": _ints(100), "a": _ints(0), "s": _ints(2)}),
    "slice-up-to-int32": Trap("g (float[n] x) => (float[n] y) { h = Slice(x, b, e) y = Exp(h) }", [{"x": plain(4)}],
                              constants={"b": np.array([0], np.int32), "e": np.array([2**31 - 1], np.int32)},
                              drops=("Slice",)),
    # Parts of different sizes, joined in another order or on another axis, are not the whole.
    "split-uneven": Trap("g (float[n, 5] x) => (float[n, 5] y) { a, b = Split<axis = 1>(x, s) "
                         "y = Concat<axis = 1>(b, a) }", [{"x": plain(2, 5)}],
                         constants={"s": _ints(2, 3)}, keeps={"Concat": 1}),
    "split-joined": Trap("g (float[n, 5] x) => (float[n, 5] y) { a, b = Split<axis = 1>(x, s) "
                         "c = Concat<axis = 1>(a, b) y = Exp(c) }", [{"x": plain(2, 5)}, {"x": plain(0, 5)}],
                         constants={"s": _ints(2, 3)}),
    "split-with-a-remainder": Trap("g (float[5] x) => (float[m] y) { a, b = Split<axis = 0, num_outputs = 2>(x) "
                                   "y = Exp(b) }", [{"x": plain(5)}], opset=18),
    # An empty part adds nothing but its dtype.
    "concat-of-empty": Trap("g (float[n, 4] x) => (float[m, 4] y) { h = Concat<axis = 0>(e, x, e) y = Exp(h) }",
                            [{"x": plain(2, 4)}, {"x": plain(0, 4)}], constants={"e": np.zeros((0, 4), np.float32)}),
    # A rank-1 operand of a transposed tensor is no row any more.
    "transpose-through-lower-rank": Trap(
        "g (float[n, 3, 3] x) => (float[a, b, c] y) { t = Transpose<perm = [0, 2, 1]>(x) h = Add(t, c) "
        "y = Transpose<perm = [0, 2, 1]>(h) }", [{"x": plain(2, 3, 3)}], constants={"c": plain(3)}),
    "transpose-through-axes": Trap(
        "g (float[2, 3, 4] x) => (float[a, b, c] y, float[d, e, f] z) { t = Transpose<perm = [1, 2, 0]>(x) "
        "s = Softmax<axis = 1>(t) r = ReduceMax<axes = [0], keepdims = 1>(t) y = Transpose<perm = [2, 0, 1]>(s) "
        "z = Transpose<perm = [2, 0, 1]>(r) }", [{"x": plain(2, 3, 4)}], rounding=True),
    "transpose-through-dropped-axes": Trap(
        "g (float[2, 3, 4] x) => (float[a, b] y) { t = Transpose<perm = [1, 2, 0]>(x) "
        "r = ReduceMax<axes = [0], keepdims = 0>(t) y = Transpose<perm = [1, 0]>(r) }", [{"x": plain(2, 3, 4)}]),
    "transpose-through-flatten": Trap("g (float[2, 3, 4] x) => (float[a, b] y) { t = Transpose<perm = [1, 0, 2]>(x) "
                                      "y = Flatten<axis = 1>(t) }", [{"x": plain(2, 3, 4)}]),
    "transpose-of-ones-is-a-reshape": Trap("g (float[n, 1, 4] x) => (float[a, b, c] y) { "
                                           "y = Transpose<perm = [1, 0, 2]>(x) }", [{"x": plain(3, 1, 4)}]),
    # The mean over nothing is NaN, the sum 0: an empty axis is no reason to drop a reduction.
    "reduce-nothing": Trap("g (float[n, 4] x) => (float[4] y, float[4] z) { y = ReduceSum<keepdims = 0>(x, a) "
                           "z = ReduceProd<axes = [0], keepdims = 0>(x) }", [{"x": plain(0, 4)}, {"x": plain(2, 4)}],
                           constants={"a": _ints(0)}),
    # With noop_with_empty_axes the reduction does nothing, without it reduces all.
    "reduce-without-axes": Trap("g (float[n, 4] x) => (float[a, b] y, float[c, d] z) { "
                                "y = ReduceSum<noop_with_empty_axes = 1>(x) z = ReduceSum(x) }", [{"x": plain(2, 4)}]),
    # n * 2 / 2 is n, n / 2 * 2 is not.
    "odd-halves": Trap("g (float[n, 2] x) => (float[a, b] y) { s = Shape(x) n = Gather<axis = 0>(s, i) h = Div(n, t) "
                       "d = Mul(h, t) k = Concat<axis = 0>(d) y = Slice(x, z, k) }",
                       [{"x": plain(5, 2)}, {"x": plain(4, 2)}, {"x": plain(0, 2)}],
                       constants={"i": _ints(0), "t": _ints(2), "z": _ints(0)}),
    # Gather takes negative indices; a Shape that is cut by start and end counts them from the end.
    "shape-from-the-end": Trap("g (float[n, 3, m] x) => (int64[2] y) { s = Shape<start = -2>(x) t = Shape(x) "
                               "k = Gather<axis = 0>(t, i) y = Add(s, k) }",
                               [{"x": plain(2, 3, 5)}, {"x": plain(0, 3, 1)}], constants={"i": _ints(-1, -3)}),
    # Where there are no elements, the last size may be anything; where there are, only what is left of them.
    "reshape-of-nothing": Trap("g (float[n, 4] x, int64[1] s) => (float[a, b] y) { h = Shape(x) k = Slice(h, z, o) "
                               "t = Concat<axis = 0>(k, s) y = Reshape(x, t) }",
                               [{"x": plain(0, 4), "s": _ints(7)}, {"x": plain(3, 4), "s": _ints(-1)}],
                               constants={"z": _ints(0), "o": _ints(1)}),
    # With ceil_mode, a last window that starts behind the tensor counts for ONNX before version 22, not for runtimes.
    "pool-windows-behind-the-end": Trap(
        "g (float[1, 1, 6] x) => (int64[3] y, int64[3] z, int64[3] w) { p = MaxPool<kernel_shape = [2], strides = [3], "
        "ceil_mode = 1>(x) y = Shape(p) q, i = MaxPool<kernel_shape = [3], strides = [2], ceil_mode = 1, "
        "pads = [2, 2]>(x) z = Shape(q) r = AveragePool<kernel_shape = [3], strides = [3], ceil_mode = 1, "
        "pads = [0, 1]>(x) w = Shape(r) }", [{"x": plain(1, 1, 6)}]),
    "pool-of-the-same-size-with-dilations": Trap(
        'g (float[1, 1, 7] x) => (int64[3] y) { p = MaxPool<kernel_shape = [3], strides = [2], dilations = [2], '
        'auto_pad = "SAME_UPPER">(x) y = Shape(p) }', [{"x": plain(1, 1, 7)}]),
    # 10 * 2.3 rounds to 23 in float32 and stays below it in float64.
    "resize-rounded": Trap(
        'g (float[1, 1, 10, 5] x) => (int64[4] y) { h = Resize<mode = "linear">(x, , s) y = Shape(h) }',
        [{"x": plain(1, 1, 10, 5)}], constants={"s": np.float32([1, 1, 2.3, 1.7])}),
    "one-sided-by-default": Trap(
        "g (float[1, 32, 1] x) => (int64[4] y) { h = STFT(x, t, w) y = Shape(h) }", [{"x": plain(1, 32, 1)}],
        constants={"t": np.int64(4), "w": np.ones(8, np.float32)}),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name):
    _check(NUMBERS[name])


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name):
    _check(SHAPES[name])


def test_unequal_sizes_of_one_operator_stay_apart():
    """Equal names of dimensions mean equal sizes; two unnamed ones may differ, so the Add may broadcast."""
    trap = Trap(
        "g (float[n, 1] x, float[1, m] z) => (float[a, b] y) { h = Add(x, z) s = Shape(x) k = Expand(h, s) "
        "y = Exp(k) }",
        [{"x": normal(2, 1), "z": normal(1, 3)}, {"x": normal(1, 1), "z": normal(1, 1)}],
    )
    _check(trap)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_a_difference_may_wrap_around(dtype):
    """x - 5 < x is no tautology."""
    name = np.dtype(dtype).name
    text = (
        f"g ({name}[1] x, {name}[1] y) => (bool[2] l, {name}[2] m, bool[2] e) "
        "{ c = Concat<axis = 0>(x, y) d = Sub(c, k) l = Less(d, c) m = Min(d, c) f = Add(c, h) g = Add(f, h) "
        "e = Equal(g, c) }"
    )
    low = np.iinfo(dtype).min
    half = np.array([1 << (8 * np.dtype(dtype).itemsize - 1)] * 2, np.uint64).astype(dtype)
    feeds = [{"x": np.array([low + at], dtype), "y": np.array([9], dtype)} for at in (0, 3, 7)]
    _check(Trap(text, feeds, constants={"k": np.array([5, 5], dtype), "h": half}))


def test_a_negated_integer_may_wrap_around():
    text = (
        "g (int8[1] x, int8[1] y) => (bool[2] l) { c = Concat<axis = 0>(x, y) d = Neg(c) e = Sub(d, k) l = Less(e, d) }"
    )
    feed = {"x": np.array([-128], np.int8), "y": np.array([127], np.int8)}
    _check(Trap(text, [feed], constants={"k": np.array([5, 5], np.int8)}))


def test_sizes_without_signs_wrap_around():
    text = "g (float[n] x) => (bool[1] l) { s = Shape(x) u = Cast<to = 13>(s) d = Sub(u, k) l = Less(d, u) }"
    _check(Trap(text, [{"x": plain(3)}, {"x": plain(9)}], constants={"k": np.array([5], np.uint64)}))
