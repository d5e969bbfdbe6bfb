"""How two outputs of one name differ: in form, in their values by more than rounding, in being finite."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["finite_fault", "form_fault", "value_fault", "within_noise"]

# Of float outputs: relative to the value, and to the largest value of the tensor, where rounding errors add up.
_TOLERANCES = {
    "float64": (1e-4, 1e-5),  # computed in float32 as often as not
    "float32": (1e-4, 1e-5),
    "float16": (1e-2, 2e-3),
    "bfloat16": (5e-2, 1e-2),
}
# A rewrite may move a result by some times what ONNX Runtime's own rewrites of the original do: each is one sample of
# how rounding errors add up, and in a deep network single samples lie far apart.
_NOISE_FACTOR = 8.0
_BLOCK = 2**18


def form_fault(expected: Any, got: Any, free: frozenset[int] = frozenset()) -> str | None:
    """How two outputs differ in kind, type or shape; axes in ``free`` may differ in size."""
    if isinstance(expected, list):
        if not isinstance(got, list) or len(expected) != len(got):
            return f"is a sequence of {len(expected)}, now {len(got) if isinstance(got, list) else _kind(got)}"
        return next(filter(None, map(form_fault, expected, got)), None)
    if not isinstance(expected, np.ndarray):
        return None if type(expected) is type(got) else f"is {_kind(expected)}, now {_kind(got)}"
    if not isinstance(got, np.ndarray):
        return f"is {_kind(expected)}, now {_kind(got)}"
    if expected.dtype != got.dtype:
        return f"is {expected.dtype}, now {got.dtype}"
    sizes = zip(expected.shape, got.shape, strict=False)
    same = expected.ndim == got.ndim and all(a == b or axis in free for axis, (a, b) in enumerate(sizes))
    return None if same else f"has shape {list(expected.shape)}, now {list(got.shape)}"


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"a {value.dtype} tensor"
    return "empty" if value is None else f"a {type(value).__name__}"


def value_fault(expected: Any, got: Any) -> str | None:
    """How the values of two outputs of the same form differ by more than rounding; None where they do not."""
    if isinstance(expected, list):
        return next(filter(None, map(value_fault, expected, got)), None)
    if not isinstance(expected, np.ndarray):
        return None if expected == got else "has other values"
    if expected.dtype.name not in _TOLERANCES:
        wrong = expected != got
        if expected.dtype.kind in "cV":  # complex and 8-bit floats, where NaN is not itself
            wrong &= ~((expected != expected) & (got != got))
        count = int(np.count_nonzero(wrong))
        return f"differs in {count} of {expected.size} values" if count else None
    if np.array_equal(expected, got):
        return None
    return _float_fault(expected.reshape(-1), got.reshape(-1), *_TOLERANCES[expected.dtype.name])


def _float_fault(expected: np.ndarray, got: np.ndarray, relative: float, scaled: float) -> str | None:
    """As :func:`value_fault` for flat arrays of floats, a block at a time, since float64 is much for a large output."""
    largest = 0.0
    blocks = [slice(start, start + _BLOCK) for start in range(0, expected.size, _BLOCK)]
    for block in blocks:
        a, b = expected[block].astype(np.float64), got[block].astype(np.float64)
        finite = np.isfinite(a)
        if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(b[finite]).all():
            return "has NaN or infinity in other places"
        largest = max(largest, float(np.abs(a[finite]).max(initial=0.0)))
    worst, fault = 0.0, None
    for block in blocks:
        a, b = expected[block].astype(np.float64), got[block].astype(np.float64)
        finite = np.isfinite(a)
        a, b = a[finite], b[finite]
        error, allowed = np.abs(a - b), scaled * largest + relative * np.abs(a)
        at = int((error - allowed).argmax()) if error.size else -1
        if at >= 0 and error[at] - allowed[at] > worst:
            worst = float(error[at] - allowed[at])
            fault = f"is off by {error[at]:.3g} (allowed {allowed[at]:.3g}, value {a[at]:.6g})"
    return fault


def within_noise(expected: Any, other_way: Any, got: Any) -> bool:
    """Whether ``got`` departs from the original's output no further than rounding may take it.

    Args:
        expected: the original's output.
        other_way: the same from the original with ONNX Runtime's optimisations switched the other way.
        got: the result's output.
    """
    if isinstance(expected, list):
        return (
            isinstance(other_way, list)
            and len(other_way) == len(expected)
            and all(map(within_noise, expected, other_way, got))
        )
    if not isinstance(expected, np.ndarray) or form_fault(expected, other_way):
        return False
    if expected.dtype.name not in _TOLERANCES:
        return value_fault(other_way, got) is None
    a, b, c = (value.astype(np.float64) for value in (expected, other_way, got))
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)) or not np.array_equal(finite, np.isfinite(c)):
        return False
    noise = np.abs(a - b)[finite].max(initial=0.0)
    return bool(np.abs(a - c)[finite].max(initial=0.0) <= _NOISE_FACTOR * noise)


def finite_fault(expected: Any, got: Any) -> str | None:
    """Where the result is NaN or infinite and the original is not."""
    if isinstance(expected, list):
        return next(filter(None, map(finite_fault, expected, got)), None)
    if not isinstance(expected, np.ndarray) or expected.dtype.name not in _TOLERANCES:
        return None
    a, b = np.isfinite(expected.astype(np.float64)), np.isfinite(got.astype(np.float64))
    wrong = int((a & ~b).sum()) if a.shape == b.shape else int((~b).sum()) if a.all() else 0
    return f"has {wrong} NaN or infinite values where the original has none" if wrong else None
