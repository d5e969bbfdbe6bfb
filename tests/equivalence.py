"""What the tests on many models share: the pass behind ``slim`` with no guard behind it, and outputs compared."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from onnxslim.errors import ModelError
from onnxslim.model import load
from onnxslim.passes import Change, Context, Simplify
from onnxslim.runtime import Session

Feed = Mapping[str, Any]

# Relative to the largest value at hand: what another order of additions does to a number of each width.
_ROUNDING = {"float64": 1e-10, "float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}


def simplified(source: onnx.ModelProto) -> tuple[onnx.ModelProto, list[Change]]:
    """Do to a copy what ``slim`` does, with no guard that would hide what it does wrong."""
    model = load(source)
    changes = Simplify().run(model, Context()).changes
    return model.to_proto(), changes


class Runtime:
    """ONNX Runtime without its own optimisations, one thread."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.session = Session(model, threads=1, optimize=False)

    def run(self, feed: Feed) -> list[Any]:
        outputs = self.session.run(feed)
        return [outputs[name] for name in self.session.output_names]


class Evaluator:
    """The reference evaluator of onnx."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.evaluator = ReferenceEvaluator(model)

    def run(self, feed: Feed) -> list[Any]:
        return list(self.evaluator.run(None, dict(feed)))


def first_that_runs(model: onnx.ModelProto, feed: Feed) -> tuple[type[Runtime] | type[Evaluator], list[Any]] | None:
    """Run a model in ONNX Runtime, else in the reference evaluator; None where neither runs it."""
    try:
        return Runtime, Runtime(model).run(feed)
    except ModelError:
        pass
    try:
        return Evaluator, Evaluator(model).run(feed)
    except Exception:  # it raises whatever numpy does
        return None


def difference(expected: Any, got: Any, scale: float = 0.0) -> str:
    """Say how an output differs, or nothing: dtypes, shapes and all but floats exactly, floats within rounding.

    Args:
        expected: an array, a sequence of arrays, or None for an empty optional.
        got: the same of the other model.
        scale: the largest number that went into the output, where rounding errors may come from.
    """
    if isinstance(expected, (list, tuple)) or isinstance(got, (list, tuple)):
        if not isinstance(expected, (list, tuple)) or not isinstance(got, (list, tuple)):
            return f"{type(expected).__name__} became {type(got).__name__}"
        if len(expected) != len(got):
            return f"{len(expected)} elements became {len(got)}"
        return "; ".join(filter(None, (difference(*pair, scale) for pair in zip(expected, got, strict=True))))
    if expected is None or got is None:
        return "" if expected is got else "an optional became filled or empty"
    expected, got = np.asarray(expected), np.asarray(got)
    if expected.dtype != got.dtype or expected.shape != got.shape:
        return f"{expected.dtype}{list(expected.shape)} became {got.dtype}{list(got.shape)}"
    if expected.dtype.name not in _ROUNDING:
        if expected.dtype.kind in "OUS" or expected.dtype.kind == "c":
            return "" if expected.tolist() == got.tolist() else "the values differ"
        return (
            ""
            if np.array_equal(expected.astype(np.float64), got.astype(np.float64), equal_nan=True)
            else _first(expected, got)
        )
    return _float_difference(expected.astype(np.float64), got.astype(np.float64), _ROUNDING[expected.dtype.name], scale)


def _float_difference(expected: np.ndarray, got: np.ndarray, rounding: float, scale: float) -> str:
    finite = expected[np.isfinite(expected)]
    margin = rounding * max(float(np.abs(finite).max(initial=0.0)), scale)
    return (
        "" if np.allclose(got, expected, rtol=rounding, atol=margin, equal_nan=True) else _first(expected, got, margin)
    )


def _first(expected: np.ndarray, got: np.ndarray, margin: float = 0.0) -> str:
    apart = ~np.isclose(got.astype(float), expected.astype(float), rtol=0, atol=margin, equal_nan=True)
    index = tuple(int(axis[0]) for axis in np.nonzero(apart))
    return f"{int(apart.sum())} of {apart.size} values differ, at {list(index)} {expected[index]} became {got[index]}"


def differences(expected: Sequence[Any], got: Sequence[Any], names: Sequence[str], scale: float = 0.0) -> str:
    """Say which outputs differ and how, or nothing."""
    found = (
        f"{name}: {fault}"
        for name, wanted, value in zip(names, expected, got, strict=True)
        if (fault := difference(wanted, value, scale))
    )
    return "; ".join(found)


def same_bits(expected: np.ndarray, got: np.ndarray) -> bool:
    """Whether two arrays of one dtype and shape are the same, signs of zeros included; any NaN is like any other."""
    if not np.array_equal(expected, got, equal_nan=expected.dtype.kind == "f"):
        return False
    if expected.dtype.kind != "f":
        return True
    numbers = ~np.isnan(expected)
    return bool(np.array_equal(np.signbit(expected[numbers]), np.signbit(got[numbers])))
