"""Facts about the results of operators that work element by element."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxslim.graph.fact_values import (
    Results,
    broadcast,
    computed,
    known_sizes,
    object_array,
    on,
    or_unknown,
    valued,
)
from onnxslim.graph.facts import LONGEST_VALUE, Fact, Facts, to_elements
from onnxslim.graph.symbols import (
    Element,
    divide,
    equal,
    fresh,
    has_bounds,
    lower_bound,
    maximum,
    minimum,
    remainder,
)
from onnxslim.graph.walk import constant_value

__all__ = ["ARITHMETIC"]

_BOOL = np.dtype(bool)

# ------------------------------------------------------------------------------------------------- same as the input


@on(
    *("Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Ceil", "Celu", "Clip", "Cos", "Cosh"),
    *("Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Hardmax", "InstanceNormalization"),
    *("LRN", "LeakyRelu", "Log", "LogSoftmax", "LpNormalization", "MeanVarianceNormalization", "Mish", "Neg", "PRelu"),
    *("Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Softmax", "Softplus"),
    *("Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu", "GroupNormalization", "Trilu"),
    *("RMSNormalization", "CumSum", "ReverseSequence"),
)
def _same(facts: Facts, node: gs.Node) -> Results:
    source = facts.of(node.inputs[0])
    if source.dtype is None:
        return None
    value = None
    if node.op == "Neg" and source.value is not None:
        value = object_array([-element for element in source.value.reshape(-1)], source.value.shape)
        return [computed(source.dtype, value)]
    return [Fact(source.dtype, source.shape)]


@on("Dropout", "BatchNormalization", "LayerNormalization")
def _same_first(facts: Facts, node: gs.Node) -> Results:
    """Further outputs are left to ONNX."""
    if sum(not tensor.is_empty() for tensor in node.outputs) != 1:
        return None
    source = facts.of(node.inputs[0])
    return None if source.dtype is None else [Fact(source.dtype, source.shape)]


@on("Identity")
def _identity(facts: Facts, node: gs.Node) -> Results:
    return [facts.of(node.inputs[0])]


@on("Not", "IsNaN", "IsInf")
def _test(facts: Facts, node: gs.Node) -> Results:
    source = facts.of(node.inputs[0])
    if node.op == "Not" and source.value is not None:
        flips = [1 - element if isinstance(element, int) else fresh(None) for element in source.value.reshape(-1)]
        return [Fact(_BOOL, source.shape, object_array(flips, source.value.shape))]
    return [Fact(_BOOL, source.shape)]


# -------------------------------------------------------------------------------------------------------- conversions


@on("Cast")
def _cast(facts: Facts, node: gs.Node) -> Results:
    source = facts.of(node.inputs[0])
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(node.attrs["to"]))
    except KeyError:
        return None
    return [_converted(source, dtype, node.inputs[0])]


@on("CastLike")
def _cast_like(facts: Facts, node: gs.Node) -> Results:
    dtype = facts.of(node.inputs[1]).dtype
    source = facts.of(node.inputs[0])
    return [Fact(None, source.shape)] if dtype is None else [_converted(source, dtype, node.inputs[0])]


def _converted(source: Fact, dtype: np.dtype, tensor: gs.Tensor) -> Fact:
    if dtype.kind not in "iub":
        return Fact(dtype, source.shape)
    if source.value is None:
        return Fact(dtype, source.shape, _rounded(source, dtype, tensor))
    if dtype.kind == "b":
        elements = [_truth(element) for element in source.value.reshape(-1)]
        return Fact(dtype, source.shape, object_array(elements, source.value.shape))
    value = source.value
    if dtype != np.int64:  # a size may be as large as an int64 holds, a difference of sizes negative
        flat = [element if isinstance(element, int) else fresh(None) for element in value.reshape(-1)]
        value = object_array(flat, value.shape)
    return valued(dtype, value)


def _rounded(source: Fact, dtype: np.dtype, tensor: gs.Tensor) -> np.ndarray | None:
    """The integers that a small float constant is made into, where that is the same everywhere."""
    if source.dtype is None or source.dtype.kind != "f" or source.shape is None or dtype.kind == "b":
        return None
    if not all(isinstance(size, int) for size in source.shape) or math.prod(known_sizes(source.shape)) > LONGEST_VALUE:
        return None
    value = constant_value(tensor)
    if value is None or not np.all(np.isfinite(value)) or np.any(np.abs(value.astype(np.float64)) >= 2**31):
        return None
    limits = np.iinfo(dtype)
    whole = np.trunc(value).astype(np.int64)
    return to_elements(whole) if np.all((whole >= limits.min) & (whole <= limits.max)) else None


def _truth(element: Element) -> Element:
    zero = equal(element, 0)
    return fresh(None) if zero is None else int(not zero)


@on("Constant")
def _constant(facts: Facts, node: gs.Node) -> Results:
    attribute = node.attrs.get("value")
    if isinstance(attribute, gs.Constant) and int(np.prod(attribute.shape)) > LONGEST_VALUE:
        return [Fact(np.dtype(attribute.dtype), tuple(int(size) for size in attribute.shape))]
    value = constant_value(node.outputs[0])
    if value is None:
        return None
    shape = tuple(int(size) for size in value.shape)
    small = value.dtype.kind in "iub" and value.size <= LONGEST_VALUE
    return [Fact(value.dtype, shape, to_elements(value) if small else None)]


# -------------------------------------------------------------------------------------------------------- arithmetic


@on("Add", "Sub", "Mul", "Div", "Mod", "Min", "Max", "Pow", "Sum", "Mean", "BitShift")
def _arithmetic(facts: Facts, node: gs.Node) -> Results:
    sources = [facts.of(tensor) for tensor in node.inputs]
    if not sources or sources[0].dtype is None:
        return None
    if facts.opset(node) < 7 and "axis" in node.attrs:
        return [Fact(sources[0].dtype, sources[0].shape)]
    dtype, shape = sources[0].dtype, broadcast([source.shape for source in sources])
    value = None
    operation = ARITHMETIC.get(node.op)
    if operation is not None and dtype.kind in "iu" and not (node.op == "Mod" and node.attrs.get("fmod", 0)):
        value = _combined(operation, sources)
    return [Fact(dtype, shape)] if value is None else [computed(dtype, value)]


def _combined(operation: Callable[[Element, Element], Element | None], sources: Sequence[Fact]) -> np.ndarray | None:
    values = [source.value for source in sources if source.value is not None]
    if len(values) != len(sources):
        return None
    try:
        arrays = np.broadcast_arrays(*values)
    except ValueError:
        return None
    total = arrays[0].reshape(-1).tolist()
    for array in arrays[1:]:
        pairs = zip(total, array.reshape(-1).tolist(), strict=True)
        total = [or_unknown(operation(first, second)) for first, second in pairs]
    return object_array(total, arrays[0].shape)


def _mod(first: Element, second: Element) -> Element | None:
    if isinstance(first, int) and isinstance(second, int):
        return None if second == 0 else first % second  # the sign of the divisor, as in Python
    return remainder(first, second)


ARITHMETIC: dict[str, Callable[[Element, Element], Element | None]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": divide,
    "Mod": _mod,
    "Min": minimum,
    "Max": maximum,
    "Sum": lambda a, b: a + b,
}


@on("Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "And", "Or", "Xor")
def _comparison(facts: Facts, node: gs.Node) -> Results:
    sources = [facts.of(tensor) for tensor in node.inputs]
    shape = broadcast([source.shape for source in sources])
    if facts.opset(node) < 7 and "axis" in node.attrs:
        shape = sources[0].shape
    operation = _COMPARISONS[node.op]
    integers = all(source.dtype is not None and source.dtype.kind in "iub" for source in sources)
    value = _combined(lambda a, b: None if (r := operation(a, b)) is None else int(r), sources) if integers else None
    return [Fact(_BOOL, shape)] if value is None else [Fact(_BOOL, tuple(value.shape), value)]


def _less(first: Element, second: Element) -> bool | None:
    if not (has_bounds(first) and has_bounds(second)):
        return None
    above, below = lower_bound(second - first), lower_bound(first - second)
    if above is not None and above > 0:
        return True
    return False if below is not None and below >= 0 else None


def _not(value: bool | None) -> bool | None:
    return None if value is None else not value


def _logic(first: Element, second: Element, decisive: int) -> bool | None:
    """And, Or of two truth values; ``decisive`` is the one that decides alone."""
    if decisive in (first, second):
        return bool(decisive)
    return bool(1 - decisive) if isinstance(first, int) and isinstance(second, int) else None


_COMPARISONS: dict[str, Callable[[Element, Element], bool | None]] = {
    "Equal": equal,
    "Less": _less,
    "Greater": lambda a, b: _less(b, a),
    "LessOrEqual": lambda a, b: _not(_less(b, a)),
    "GreaterOrEqual": lambda a, b: _not(_less(a, b)),
    "And": lambda a, b: _logic(a, b, 0),
    "Or": lambda a, b: _logic(a, b, 1),
    "Xor": lambda a, b: a != b if isinstance(a, int) and isinstance(b, int) else None,
}


@on("Where")
def _where(facts: Facts, node: gs.Node) -> Results:
    truth, yes, no = (facts.of(tensor) for tensor in node.inputs)
    if yes.dtype is None:
        return None
    shape = broadcast([truth.shape, yes.shape, no.shape])
    if truth.value is None or yes.value is None or no.value is None:
        return [Fact(yes.dtype, shape)]
    try:
        arrays = np.broadcast_arrays(truth.value, yes.value, no.value)
    except ValueError:
        return [Fact(yes.dtype, shape)]
    rows = zip(*(array.reshape(-1).tolist() for array in arrays), strict=True)
    chosen = [(a if t else b) if isinstance(t, int) else a if a == b else fresh(None) for t, a, b in rows]
    return [valued(yes.dtype, object_array(chosen, arrays[0].shape))]
