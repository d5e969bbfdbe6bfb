"""Exponentials and the like as plain arithmetic, which LLVM turns into vectors; its own calls are one per number.

Every function is a polynomial, or a quotient of two, fitted in float64 to the smallest largest relative error where the
arguments have been brought to; coefficients are stored lowest degree first. Largest relative errors in float32, over
the whole range: exp and log 1.2e-7, sigmoid 1.7e-7, tanh and erf 3.2e-7. Infinities and NaN give what they must;
results of exp below 1.2e-38, the least normal number, are zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import tvm_ffi
from tvm import tirx
from tvm.ir import Call
from tvm.tirx import FloatImm, IntImm, Let, PrimFunc, Select, Var

from onnxslim.targets.emit import Expr, with_unique_names

__all__ = ["vectorisable_math"]

# (e^r - 1 - r) / r² on [-0.35, 0.7]: the upper part is for arguments of which the power of two would be 128.
_EXP = (0.500002178, 0.166670312, 0.0416214156, 0.00832421814, 0.00162586084)
# (log(1 + f) - f + f²/2) / f³ on [√½ - 1, √2 - 1].
_LOG = (
    0.333333125, -0.250000095, 0.200021235, -0.166680051, 0.142194523, -0.124053415, 0.118887035, -0.1167751,
    0.0674770941,
)  # fmt: skip
# tanh(x) / x and erf(x) / x as quotients of polynomials of x², up to where they are 1 in float32.
_TANH_LIMIT = 9.01
_TANH = (
    (0.999999993, 0.130836001, 0.00310349708, 1.11494644e-05, -2.02052762e-08, 5.26815531e-11, -8.46302868e-14),
    (1.0, 0.464169272, 0.0244933534, 0.000254547432),
)
_ERF_LIMIT = 3.92
_ERF = (
    (1.12837911, 0.199914282, 0.0505719314, 0.00370112502, 0.000141835081, -1.95770178e-06, 1.99232045e-08),
    (1.0, 0.510501079, 0.114994134, 0.0143522813, 0.000955908662),
)
# log 2 in two parts, the first with so few bits that its products with whole numbers up to 128 are exact.
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_LEAST_NORMAL = 2.0**-126
_SQRT_HALF_BITS = 0x3F3504F3
_MANTISSA_BITS = 23


def vectorisable_math(function: PrimFunc) -> PrimFunc:
    """The same function with float32 calls of exp, log, sigmoid, tanh, erf and pow written out.

    Other types, other calls, and powers whose exponent is no small whole number, stay as they are.
    """

    def call(each: Call) -> Expr:
        write = _WRITERS.get(str(getattr(each.op, "name", "")))
        if write is None or str(each.ty.dtype) != "float32":
            return each
        written = write(*each.args)
        return each if written is None else written

    body = tvm_ffi.structural_map(function.body, [(Call, call)])
    if body.same_as(function.body):
        return function
    # An expression that stands in two places has been written out once.
    return with_unique_names(function.with_body(body))


def _float(value: float) -> Expr:
    return FloatImm("float32", value)


def _int(value: int) -> Expr:
    return IntImm("int32", value)


def _let(value: Expr, body: Callable[[Expr], Expr]) -> Expr:
    """``body`` of a value that is computed once."""
    name = Var("x", str(value.ty.dtype))
    return Let(name, value, body(name))


def _polynomial(coefficients: Sequence[float], x: Expr) -> Expr:
    total = _float(coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total * x + _float(coefficient)
    return total


def _clamp(x: Expr, low: float, high: float) -> Expr:
    """NaN stays NaN: a comparison with it is false, and then the second operand is taken."""
    return tirx.max(_float(low), tirx.min(_float(high), x))


def _power_of_two(biased: Expr) -> Expr:
    return tirx.reinterpret("float32", tirx.shift_left(biased, _int(_MANTISSA_BITS)))


def _exp(x: Expr) -> Expr:
    # e^x = 2^n · e^r with n whole and |r| <= ½ log 2. Above the upper limit all is infinite, below the lower all zero.
    def reduced(x: Expr) -> Expr:
        return _let((x * _float(1 / math.log(2)) + _float(127.5)).astype("int32"), lambda biased: result(x, biased))

    def result(x: Expr, biased: Expr) -> Expr:
        biased = tirx.min(biased, _int(254))
        return _let(biased, lambda biased: _let((biased - _int(127)).astype("float32"), lambda n: scaled(x, biased, n)))

    def scaled(x: Expr, biased: Expr, n: Expr) -> Expr:
        return _let(
            x - n * _float(_LN2_HIGH) - n * _float(_LN2_LOW),
            lambda r: (_polynomial(_EXP, r) * (r * r) + r + _float(1.0)) * _power_of_two(biased),
        )

    return _let(_clamp(x, -88.0, 89.0), reduced)


def _log(x: Expr) -> Expr:
    # x = 2^n · (1 + f) with √½ <= 1 + f < √2; numbers below the least normal one are first scaled up by 2^23.
    def checked(x: Expr) -> Expr:
        tiny = x < _float(_LEAST_NORMAL)
        scaled = Select(tiny, x * _float(2.0**_MANTISSA_BITS), x)
        scale = Select(tiny, _int(_MANTISSA_BITS), _int(0))
        finite = _let(tirx.reinterpret("int32", scaled), lambda bits: exponent(bits, scale))
        undefined = Select(x == _float(0.0), _float(-math.inf), _float(math.nan))
        return Select(x > _float(0.0), Select(x == _float(math.inf), x, finite), undefined)

    def exponent(bits: Expr, scale: Expr) -> Expr:
        shifted = tirx.shift_right(bits - _int(_SQRT_HALF_BITS), _int(_MANTISSA_BITS))
        return _let(shifted, lambda whole: parts(bits, whole, scale))

    def parts(bits: Expr, whole: Expr, scale: Expr) -> Expr:
        mantissa = tirx.reinterpret("float32", bits - tirx.shift_left(whole, _int(_MANTISSA_BITS)))
        n = (whole - scale).astype("float32")
        return _let(mantissa - _float(1.0), lambda f: _let(n, lambda n: total(f, n)))

    def total(f: Expr, n: Expr) -> Expr:
        small = _polynomial(_LOG, f) * (f * f * f) + n * _float(_LN2_LOW) - f * f * _float(0.5)
        return small + f + n * _float(_LN2_HIGH)

    return _let(x, checked)


def _sigmoid(x: Expr) -> Expr:
    return _float(1.0) / (_float(1.0) + _exp(_float(0.0) - x))


def _quotient(parts: tuple[Sequence[float], Sequence[float]], limit: float) -> Callable[[Expr], Expr]:
    """An odd function that goes to 1; rounding must not take it beyond."""
    above, below = parts

    def result(x: Expr) -> Expr:
        return _let(x * x, lambda square: x * _polynomial(above, square) / _polynomial(below, square))

    return lambda x: _clamp(_let(_clamp(x, -limit, limit), result), -1.0, 1.0)


def _power(x: Expr, exponent: Expr) -> Expr | None:
    if not isinstance(exponent, FloatImm):
        return None
    value = float(exponent.value)
    if value == -1.0:
        return _float(1.0) / x
    if value not in (1.0, 2.0, 3.0, 4.0):
        return None
    return _let(x, lambda x: _product(x, int(value)))


def _product(x: Expr, count: int) -> Expr:
    return x if count == 1 else _let(x * x, lambda square: {2: square, 3: square * x, 4: square * square}[count])


_WRITERS: dict[str, Callable[..., Expr | None]] = {
    "tirx.exp": _exp,
    "tirx.log": _log,
    "tirx.sigmoid": _sigmoid,
    "tirx.tanh": _quotient(_TANH, _TANH_LIMIT),
    "tirx.erf": _quotient(_ERF, _ERF_LIMIT),
    "tirx.pow": _power,
}
