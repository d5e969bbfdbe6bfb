"""How each operator's outputs follow from what is known of its inputs; see :class:`onnxslim.graph.facts.Facts`.

A rule returns one fact an output, or None to leave the node to ONNX's shape inference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxslim.graph.facts import LONGEST_VALUE, Fact, Facts, Shape, to_elements
from onnxslim.graph.symbols import (
    Element,
    SymbolicSize,
    divide,
    equal,
    floor_divide,
    fresh,
    lower_bound,
    maximum,
    minimum,
    product,
    remainder,
)
from onnxslim.graph.walk import constant_value

__all__ = ["RULES", "broadcast", "fixed_integers"]

Results: TypeAlias = Sequence[Fact] | None
RULES: dict[str, Callable[[Facts, gs.Node], Results]] = {}
_BOOL = np.dtype(bool)
_INT64 = np.dtype(np.int64)


def _on(*ops: str) -> Callable[[Callable[[Facts, gs.Node], Results]], Callable[[Facts, gs.Node], Results]]:
    def register(rule: Callable[[Facts, gs.Node], Results]) -> Callable[[Facts, gs.Node], Results]:
        RULES.update(dict.fromkeys(ops, rule))
        return rule

    return register


def _has(node: gs.Node, index: int) -> bool:
    return len(node.inputs) > index and not node.inputs[index].is_empty()


def fixed_integers(facts: Facts, node: gs.Node, index: int, attribute: str | None = None) -> list[int] | None:
    """A list of integers from an attribute or from an input that is known, wherever the node's version has it."""
    if attribute is not None and attribute in node.attrs:
        value = node.attrs[attribute]
        return [int(item) for item in value] if isinstance(value, list) else None
    if not _has(node, index):
        return None
    fact = facts.of(node.inputs[index])
    known = fact.known if fact.value is not None else None
    if known is None:
        known = constant_value(node.inputs[index]) if fact.shape is not None and len(fact.shape) <= 1 else None
    return None if known is None or known.dtype.kind not in "iu" else [int(item) for item in known.reshape(-1)]


def _elements(facts: Facts, node: gs.Node, index: int) -> list[Element] | None:
    """The elements of a small integer input, symbolic ones included."""
    if not _has(node, index):
        return None
    value = facts.of(node.inputs[index]).value
    return None if value is None or value.ndim > 1 else list(value.reshape(-1))


def _valued(dtype: np.dtype | None, value: np.ndarray) -> Fact:
    """A fact with a value, elements that do not fit the dtype made unknown: how they wrap is the runtime's business."""
    shape = tuple(int(size) for size in value.shape)
    if dtype is None or value.size > LONGEST_VALUE:
        return Fact(dtype, shape)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        flat = value.reshape(-1)
        for index, element in enumerate(flat):
            if isinstance(element, int) and not limits.min <= element <= limits.max:
                value = value.copy()
                value.reshape(-1)[index] = fresh(None)
    return Fact(dtype, shape, value)


def _object(items: Sequence[Element], shape: Sequence[int] | None = None) -> np.ndarray:
    array = np.empty(len(items), object)
    array[:] = items
    return array if shape is None else array.reshape(tuple(shape))


def broadcast(shapes: Sequence[Shape | None]) -> Shape | None:
    """The shape of tensors broadcast against each other; None when a rank is unknown."""
    known = [shape for shape in shapes if shape is not None]
    if len(known) != len(shapes):
        return None
    return reduce(_broadcast_pair, known)


def _broadcast_pair(first: Shape, second: Shape) -> Shape:
    rank = max(len(first), len(second))
    pairs = zip((1,) * (rank - len(first)) + first, (1,) * (rank - len(second)) + second, strict=True)
    return tuple(_broadcast_size(a, b) for a, b in pairs)


def _broadcast_size(a: Element, b: Element) -> Element:
    if a == b or b == 1:
        return a
    if a == 1:
        return b
    # A number other than 1 wins: the other side must be that or 1.
    if isinstance(a, int):
        return a
    if isinstance(b, int):
        return b
    for size, other in ((a, b), (b, a)):  # what is never 1 must be what the other is, or the other is 1
        bound = lower_bound(size)
        if bound is not None and bound > 1 and (lower_bound(other) or 0) <= 1:
            return size
    return fresh()


# ------------------------------------------------------------------------------------------------- same as the input


@_on(
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
        value = _object([-element for element in source.value.reshape(-1)], source.value.shape)
        return [_valued(source.dtype, value)]
    return [Fact(source.dtype, source.shape)]


@_on("Dropout", "BatchNormalization", "LayerNormalization")
def _same_first(facts: Facts, node: gs.Node) -> Results:
    """Further outputs are left to ONNX."""
    if sum(not tensor.is_empty() for tensor in node.outputs) != 1:
        return None
    source = facts.of(node.inputs[0])
    return None if source.dtype is None else [Fact(source.dtype, source.shape)]


@_on("Identity")
def _identity(facts: Facts, node: gs.Node) -> Results:
    return [facts.of(node.inputs[0])]


@_on("Not", "IsNaN", "IsInf")
def _test(facts: Facts, node: gs.Node) -> Results:
    source = facts.of(node.inputs[0])
    if node.op == "Not" and source.value is not None:
        flips = [1 - element if isinstance(element, int) else fresh(None) for element in source.value.reshape(-1)]
        return [Fact(_BOOL, source.shape, _object(flips, source.value.shape))]
    return [Fact(_BOOL, source.shape)]


# -------------------------------------------------------------------------------------------------------- conversions


@_on("Cast")
def _cast(facts: Facts, node: gs.Node) -> Results:
    source = facts.of(node.inputs[0])
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(node.attrs["to"]))
    except KeyError:
        return None
    return [_converted(source, dtype, node.inputs[0])]


@_on("CastLike")
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
        return Fact(dtype, source.shape, _object(elements, source.value.shape))
    value = source.value
    if dtype.itemsize < 8:  # a size may be as large as an int64 holds
        flat = [element if isinstance(element, int) else fresh(None) for element in value.reshape(-1)]
        value = _object(flat, value.shape)
    return _valued(dtype, value)


def _rounded(source: Fact, dtype: np.dtype, tensor: gs.Tensor) -> np.ndarray | None:
    """The integers that a small float constant is made into, where that is the same everywhere."""
    if source.dtype is None or source.dtype.kind != "f" or source.shape is None or dtype.kind == "b":
        return None
    if not all(isinstance(size, int) for size in source.shape) or math.prod(_ints(source.shape)) > LONGEST_VALUE:
        return None
    value = constant_value(tensor)
    if value is None or not np.all(np.isfinite(value)) or np.any(np.abs(value) >= 2**31):
        return None
    limits = np.iinfo(dtype)
    whole = np.trunc(value).astype(np.int64)
    return to_elements(whole) if np.all((whole >= limits.min) & (whole <= limits.max)) else None


def _truth(element: Element) -> Element:
    zero = equal(element, 0)
    return fresh(None) if zero is None else int(not zero)


@_on("Constant")
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


@_on("Add", "Sub", "Mul", "Div", "Mod", "Min", "Max", "Pow", "Sum", "Mean", "BitShift")
def _arithmetic(facts: Facts, node: gs.Node) -> Results:
    sources = [facts.of(tensor) for tensor in node.inputs]
    if not sources or sources[0].dtype is None:
        return None
    if facts.opset(node) < 7 and "axis" in node.attrs:
        return [Fact(sources[0].dtype, sources[0].shape)]
    dtype, shape = sources[0].dtype, broadcast([source.shape for source in sources])
    value = None
    operation = _ARITHMETIC.get(node.op)
    if operation is not None and dtype.kind in "iu" and not (node.op == "Mod" and node.attrs.get("fmod", 0)):
        value = _combined(operation, sources)
    return [Fact(dtype, shape)] if value is None else [_valued(dtype, value)]


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
        total = [_or_unknown(operation(first, second)) for first, second in pairs]
    return _object(total, arrays[0].shape)


def _or_unknown(element: Element | None) -> Element:
    return fresh(None) if element is None else element


def _mod(first: Element, second: Element) -> Element | None:
    if isinstance(first, int) and isinstance(second, int):
        return None if second == 0 else first % second  # the sign of the divisor, as in Python
    return remainder(first, second)


_ARITHMETIC: dict[str, Callable[[Element, Element], Element | None]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": divide,
    "Mod": _mod,
    "Min": minimum,
    "Max": maximum,
    "Sum": lambda a, b: a + b,
}


@_on("Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "And", "Or", "Xor")
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


@_on("Where")
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
    return [_valued(yes.dtype, _object(chosen, arrays[0].shape))]


@_on("MatMul")
def _matmul(facts: Facts, node: gs.Node) -> Results:
    left, right = (facts.of(tensor) for tensor in node.inputs[:2])
    if left.dtype is None or left.shape is None or right.shape is None or not left.shape or not right.shape:
        return [Fact(left.dtype)] if left.dtype is not None else None
    a, b = left.shape, right.shape
    batch = broadcast([a[:-2], b[:-2]]) or ()
    rows = a[-2:-1] if len(a) > 1 else ()
    columns = b[-1:] if len(b) > 1 else ()
    return [Fact(left.dtype, (*batch, *rows, *columns))]


@_on("Gemm")
def _gemm(facts: Facts, node: gs.Node) -> Results:
    left, right = (facts.of(tensor) for tensor in node.inputs[:2])
    if left.dtype is None or left.shape is None or right.shape is None or len(left.shape) != 2 or len(right.shape) != 2:
        return None
    rows = left.shape[1 if node.attrs.get("transA", 0) else 0]
    columns = right.shape[0 if node.attrs.get("transB", 0) else 1]
    return [Fact(left.dtype, (rows, columns))]


@_on("Conv", "MaxPool", "AveragePool", "LpPool")
def _windows(facts: Facts, node: gs.Node) -> Results:
    """The spatial sizes that ONNX does not tell for symbolic inputs."""
    source = facts.of(node.inputs[0])
    if source.shape is None or source.dtype is None or len(source.shape) < 3 or len(node.outputs) != 1:
        return None
    sizes = _window_sizes(facts, node, source.shape)
    if sizes is None:
        return None
    channels = source.shape[1]
    if node.op == "Conv":
        weight = facts.of(node.inputs[1])
        if weight.shape is None or len(weight.shape) != len(source.shape):
            return None
        channels = weight.shape[0]
    return [Fact(source.dtype, (source.shape[0], channels, *sizes))]


def _window_sizes(facts: Facts, node: gs.Node, shape: Shape) -> list[Element] | None:
    rank = len(shape) - 2
    kernel = node.attrs.get("kernel_shape")
    if kernel is None and node.op == "Conv":
        weight = facts.of(node.inputs[1]).shape
        kernel = None if weight is None else list(weight[2:])
    padding = node.attrs.get("auto_pad", "NOTSET")
    if kernel is None or not all(isinstance(size, int) for size in kernel) or padding not in ("NOTSET", "VALID"):
        return None
    if node.attrs.get("ceil_mode", 0) or len(kernel) != rank:
        return None
    strides, dilations = node.attrs.get("strides", [1] * rank), node.attrs.get("dilations", [1] * rank)
    pads = node.attrs.get("pads", [0] * 2 * rank) if padding == "NOTSET" else [0] * 2 * rank
    if len(pads) != 2 * rank or len(strides) != rank or len(dilations) != rank or min(strides) < 1:
        return None
    sizes: list[Element] = []
    for axis in range(rank):
        room = shape[2 + axis] + (pads[axis] + pads[axis + rank] - dilations[axis] * (kernel[axis] - 1) - 1)
        size = floor_divide(room, strides[axis]) + 1
        if isinstance(size, int) and size < 0:
            return None
        sizes.append(size)
    return sizes


@_on("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def _global_pool(facts: Facts, node: gs.Node) -> Results:
    source = facts.of(node.inputs[0])
    if source.shape is None or source.dtype is None or len(source.shape) < 2:
        return None
    return [Fact(source.dtype, (*source.shape[:2], *(1,) * (len(source.shape) - 2)))]


@_on(
    *("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2"),
    *("ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare", "ArgMax", "ArgMin"),
)
def _reduce(facts: Facts, node: gs.Node) -> Results:
    source = facts.of(node.inputs[0])
    index = node.op.startswith("Arg")
    dtype = _INT64 if index else source.dtype
    if dtype is None:
        return None
    rank = None if source.shape is None else len(source.shape)
    axes = [int(node.attrs.get("axis", 0))] if index else fixed_integers(facts, node, 1, "axes")
    if not index and axes is None and _has(node, 1):
        return [Fact(dtype, _any_shape(rank) if node.attrs.get("keepdims", 1) else None)]
    if not axes:
        if node.attrs.get("noop_with_empty_axes", 0):
            return [source] if node.op in _SAME_WITHOUT_AXES else [Fact(dtype, source.shape)]
        axes = None
    if source.shape is None or rank is None:
        return [Fact(dtype)]
    gone = set(range(rank)) if axes is None else {axis % rank if rank else 0 for axis in axes}
    keep = bool(node.attrs.get("keepdims", 1))
    shape = tuple(1 if axis in gone else size for axis, size in enumerate(source.shape) if keep or axis not in gone)
    value = _reduced(node.op, source, gone)
    return [Fact(dtype, shape) if value is None else _valued(dtype, value.reshape(_ints(shape)))]


_SAME_WITHOUT_AXES = frozenset({"ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd"})


def _ints(shape: Shape) -> tuple[int, ...]:
    return tuple(size for size in shape if isinstance(size, int))


def _any_shape(rank: int | None) -> Shape | None:
    return None if rank is None else tuple(fresh() for _ in range(rank))


def _reduced(op: str, source: Fact, gone: set[int]) -> np.ndarray | None:
    """The result of reducing a small vector of integers to one number."""
    operation = {"ReduceProd": "Mul", "ReduceSum": "Add", "ReduceMax": "Max", "ReduceMin": "Min"}.get(op)
    if source.value is None or operation is None or source.value.size == 0 or len(gone) != source.value.ndim:
        return None
    combine = _ARITHMETIC[operation]
    result = reduce(lambda a, b: _or_unknown(combine(a, b)), source.value.reshape(-1).tolist())
    return _object([result])


# ---------------------------------------------------------------------------------------------------- shapes as values


@_on("Shape")
def _shape(facts: Facts, node: gs.Node) -> Results:
    shape = facts.of(node.inputs[0]).shape
    if shape is None:
        return None
    sizes = shape[slice(node.attrs.get("start", 0), node.attrs.get("end", len(shape)))]
    return [_valued(_INT64, _object(sizes))]


@_on("Size")
def _size(facts: Facts, node: gs.Node) -> Results:
    shape = facts.of(node.inputs[0]).shape
    if shape is None:
        return None
    return [_valued(_INT64, _object([product(shape)], ()))]


@_on("ConstantOfShape")
def _constant_of_shape(facts: Facts, node: gs.Node) -> Results:
    fill = node.attrs.get("value")
    array = np.zeros(1, np.float32) if fill is None else np.asarray(fill.values)
    shape = _target_shape(facts, node, 0)
    if shape is None or array.size != 1:
        return [Fact(array.dtype, shape)]
    if all(isinstance(size, int) for size in shape) and array.dtype.kind in "iub":
        count = math.prod(_ints(shape))
        if count <= LONGEST_VALUE:
            return [Fact(array.dtype, shape, _object([int(array.reshape(-1)[0])] * count, _ints(shape)))]
    return [Fact(array.dtype, shape)]


def _target_shape(facts: Facts, node: gs.Node, index: int) -> Shape | None:
    """The sizes in an input that holds a shape; unknown ones where only their number is known."""
    elements = _elements(facts, node, index)
    if elements is not None:
        return tuple(element if (lower_bound(element) or 0) >= 0 else fresh() for element in elements)
    shape = facts.of(node.inputs[index]).shape
    if shape is not None and len(shape) == 1 and isinstance(shape[0], int) and shape[0] <= LONGEST_VALUE:
        return tuple(fresh() for _ in range(shape[0]))
    return None


@_on("Range")
def _range(facts: Facts, node: gs.Node) -> Results:
    sources = [facts.of(tensor) for tensor in node.inputs]
    dtype = sources[0].dtype
    if dtype is None:
        return None
    bounds = [None if source.value is None or source.value.size != 1 else source.value.item() for source in sources]
    start, limit, delta = bounds
    if start is None or limit is None or not isinstance(delta, int) or delta == 0:
        return [Fact(dtype, (fresh(),))]
    step = abs(delta)
    count = floor_divide((limit - start if delta > 0 else start - limit) + (step - 1), step)
    if isinstance(count, int):
        count = max(count, 0)
        if count <= LONGEST_VALUE:
            return [_valued(dtype, _object([start + delta * index for index in range(count)]))]
    else:
        count = maximum(count, 0)
    return [Fact(dtype, (count,))]


# ------------------------------------------------------------------------------------------------------------- layout


@_on("Reshape")
def _reshape(facts: Facts, node: gs.Node) -> Results:
    source = facts.of(node.inputs[0])
    if source.dtype is None:
        return None
    if len(node.inputs) < 2 and "shape" in node.attrs:
        target: list[Element] = list(node.attrs["shape"])
    else:
        elements = _elements(facts, node, 1)
        if elements is None:
            return [Fact(source.dtype, _target_shape(facts, node, 1))]
        target = elements
    shape = _reshaped(source.shape, target, zero_copies=not node.attrs.get("allowzero", 0))
    static = source.value is not None and all(isinstance(size, int) for size in shape)
    if static and source.value is not None and math.prod(_ints(shape)) == source.value.size:
        return [Fact(source.dtype, shape, source.value.reshape(_ints(shape)))]
    return [Fact(source.dtype, shape)]


def _reshaped(before: Shape | None, target: Sequence[Element], *, zero_copies: bool) -> Shape:
    sizes: list[Element | None] = []
    for axis, size in enumerate(target):
        if size == 0 and zero_copies:
            sizes.append(before[axis] if before is not None and axis < len(before) else fresh())
        elif isinstance(size, SymbolicSize):
            # Where a size may be 0 or -1, what stands there may be another size.
            least = lower_bound(size)
            plain = least is not None and least >= (1 if zero_copies else 0)
            same = before is not None and axis < len(before) and before[axis] == size
            sizes.append(size if plain or (same and least == 0) else None if least is None or least < 0 else fresh())
        else:
            sizes.append(None if size < 0 else size)
    missing = [axis for axis, size in enumerate(sizes) if size is None]
    if len(missing) == 1 and before is not None:
        sizes[missing[0]] = _remaining(before, [size for size in sizes if size is not None])
    return tuple(fresh() if size is None else size for size in sizes)


def _remaining(before: Shape, others: Sequence[Element]) -> Element:
    """The size that a -1 stands for: what is left of the elements once equal sizes on both sides have cancelled."""
    left, right = list(before), list(others)
    for size in others:
        if size in left and size != 0:
            left.remove(size)
            right.remove(size)
    total: Element = product(left)
    by: Element = product(right)
    if by == 1:
        return total
    quotient = divide(total, by) if isinstance(by, int) and by > 0 else None
    return fresh() if quotient is None else quotient


@_on("Flatten")
def _flatten(facts: Facts, node: gs.Node) -> Results:
    source = facts.of(node.inputs[0])
    if source.shape is None or source.dtype is None:
        return [Fact(source.dtype, (fresh(), fresh()))] if source.dtype is not None else None
    axis = int(node.attrs.get("axis", 1))
    axis = axis + len(source.shape) if axis < 0 else axis
    rows: Element = product(source.shape[:axis])
    columns: Element = product(source.shape[axis:])
    return [Fact(source.dtype, (rows, columns))]


def _laid_out(source: Fact, shape: Shape) -> Fact:
    """The same elements in the same order in another shape."""
    if source.value is not None and all(isinstance(size, int) for size in shape):
        return Fact(source.dtype, shape, source.value.reshape(_ints(shape)))
    return Fact(source.dtype, shape)


@_on("Squeeze")
def _squeeze(facts: Facts, node: gs.Node) -> Results:
    source = facts.of(node.inputs[0])
    if source.dtype is None:
        return None
    axes = fixed_integers(facts, node, 1, "axes")
    if source.shape is None or (axes is None and _has(node, 1)):
        return [Fact(source.dtype)]
    rank = len(source.shape)
    if axes is None:
        if not all(isinstance(size, int) for size in source.shape):
            return [Fact(source.dtype)]
        gone = {axis for axis, size in enumerate(source.shape) if size == 1}
    else:
        gone = {axis + rank if axis < 0 else axis for axis in axes}
        if any(
            not 0 <= axis < rank or (isinstance(source.shape[axis], int) and source.shape[axis] != 1) for axis in gone
        ):
            return None
    return [_laid_out(source, tuple(size for axis, size in enumerate(source.shape) if axis not in gone))]


@_on("Unsqueeze")
def _unsqueeze(facts: Facts, node: gs.Node) -> Results:
    source = facts.of(node.inputs[0])
    if source.dtype is None:
        return None
    axes = fixed_integers(facts, node, 1, "axes")
    if source.shape is None or axes is None:
        return [Fact(source.dtype)]
    rank = len(source.shape) + len(axes)
    new = {axis + rank if axis < 0 else axis for axis in axes}
    if len(new) != len(axes) or any(not 0 <= axis < rank for axis in new):
        return None
    sizes = iter(source.shape)
    return [_laid_out(source, tuple(1 if axis in new else next(sizes) for axis in range(rank)))]


@_on("Transpose")
def _transpose(facts: Facts, node: gs.Node) -> Results:
    source = facts.of(node.inputs[0])
    if source.dtype is None:
        return None
    if source.shape is None:
        perm = node.attrs.get("perm")
        return [Fact(source.dtype, None if perm is None else tuple(fresh() for _ in perm))]
    perm = list(node.attrs.get("perm") or range(len(source.shape))[::-1])
    if sorted(perm) != list(range(len(source.shape))):
        return None
    value = None if source.value is None else source.value.transpose(perm)
    return [Fact(source.dtype, tuple(source.shape[axis] for axis in perm), value)]


@_on("Expand")
def _expand(facts: Facts, node: gs.Node) -> Results:
    source = facts.of(node.inputs[0])
    if source.dtype is None:
        return None
    target = _elements(facts, node, 1)
    if target is None or source.shape is None:
        known = _target_shape(facts, node, 1)
        rank = None if known is None or source.shape is None else max(len(known), len(source.shape))
        return [Fact(source.dtype, _any_shape(rank))]
    shape = broadcast([source.shape, tuple(target)]) or ()
    if any((lower_bound(size) or 0) < 0 or lower_bound(size) is None for size in shape):
        shape = tuple(size if (lower_bound(size) or -1) >= 0 or size == 0 else fresh() for size in shape)
    small = all(isinstance(size, int) for size in shape) and math.prod(_ints(shape)) <= LONGEST_VALUE
    if source.value is not None and small:
        return [Fact(source.dtype, shape, np.broadcast_to(source.value, _ints(shape)).copy())]
    return [Fact(source.dtype, shape)]


@_on("Tile")
def _tile(facts: Facts, node: gs.Node) -> Results:
    source = facts.of(node.inputs[0])
    repeats = _elements(facts, node, 1)
    if source.dtype is None or source.shape is None or repeats is None or len(repeats) != len(source.shape):
        return None
    shape = tuple(size * count for size, count in zip(source.shape, repeats, strict=True))
    if any((lower_bound(size) or 0) < 0 for size in shape):
        return None
    counts = [count for count in repeats if isinstance(count, int)]
    if source.value is not None and len(counts) == len(repeats):
        value = np.tile(source.value, counts)
        return [_valued(source.dtype, value)]
    return [Fact(source.dtype, shape)]


# ------------------------------------------------------------------------------------------------- parts and their sum


@_on("Concat")
def _concat(facts: Facts, node: gs.Node) -> Results:
    sources = [facts.of(tensor) for tensor in node.inputs]
    dtype = next((source.dtype for source in sources if source.dtype is not None), None)
    shapes = [source.shape for source in sources]
    known = next((shape for shape in shapes if shape is not None), None)
    if dtype is None or not known:
        return [Fact(dtype)] if dtype is not None else None
    axis = int(node.attrs.get("axis", 1))
    axis = axis + len(known) if axis < 0 else axis
    if not 0 <= axis < len(known) or any(shape is not None and len(shape) != len(known) for shape in shapes):
        return None
    shape = []
    for index in range(len(known)):
        sizes = [each[index] for each in shapes if each is not None]
        if index == axis:
            shape.append(sum(sizes) if len(sizes) == len(shapes) else fresh())
        else:
            shape.append(next((size for size in sizes if isinstance(size, int)), sizes[0]))
    if len(known) == 1:
        value = _joined(sources)
        if value is not None:
            return [_valued(dtype, value)]
    return [Fact(dtype, tuple(shape))]


def _joined(sources: Sequence[Fact]) -> np.ndarray | None:
    """Vectors end to end; one of known length whose elements are not known contributes unknown ones."""
    parts: list[Element] = []
    for source in sources:
        if source.dtype is None or source.dtype.kind not in "iub":
            return None
        if source.value is not None:
            parts += source.value.reshape(-1).tolist()
        elif source.shape is not None and isinstance(source.shape[0], int) and source.shape[0] <= LONGEST_VALUE:
            parts += [fresh(None) for _ in range(source.shape[0])]
        else:
            return None
    return _object(parts) if len(parts) <= LONGEST_VALUE else None


@_on("Split")
def _split(facts: Facts, node: gs.Node) -> Results:
    source = facts.of(node.inputs[0])
    if source.dtype is None or source.shape is None:
        return None
    axis = int(node.attrs.get("axis", 0))
    axis = axis + len(source.shape) if axis < 0 else axis
    count = len(node.outputs)
    if not 0 <= axis < len(source.shape):
        return None
    sizes: Sequence[Element] | None = fixed_integers(facts, node, 1, "split")
    if sizes is None:
        sizes = [fresh() for _ in range(count)] if _has(node, 1) else _even_parts(source.shape[axis], count)
    if len(sizes) != count:
        return None
    facts_out = []
    start: Element = 0
    for size in sizes:
        shape = (*source.shape[:axis], size, *source.shape[axis + 1 :])
        if source.value is not None and isinstance(start, int) and isinstance(size, int):
            index = (slice(None),) * axis + (slice(start, start + size),)
            facts_out.append(Fact(source.dtype, _int_shape(source.value[index]), source.value[index]))
        else:
            facts_out.append(Fact(source.dtype, shape))
        start = start + size
    return facts_out


def _int_shape(array: np.ndarray) -> Shape:
    return tuple(int(size) for size in array.shape)


def _even_parts(size: Element, count: int) -> list[Element]:
    """Equal parts, the last one smaller where the axis does not divide."""
    if not isinstance(size, int):
        part = divide(size, count)
        whole = part is not None and part * count == size
        return [part if whole and part is not None else fresh() for _ in range(count)]
    part = -(-size // count)
    return [max(min(part, size - part * index), 0) for index in range(count)]


@_on("Slice")
def _slice(facts: Facts, node: gs.Node) -> Results:
    source = facts.of(node.inputs[0])
    if source.dtype is None or source.shape is None:
        return None
    rank = len(source.shape)
    starts, ends = _bounds(facts, node, 1, "starts"), _bounds(facts, node, 2, "ends")
    axes = fixed_integers(facts, node, 3, "axes")
    if axes is None:
        if _has(node, 3):
            return [Fact(source.dtype, _any_shape(rank))]
        axes = list(range(rank))[: len(starts) if starts is not None else rank]
    steps = fixed_integers(facts, node, 4) if _has(node, 4) else [1] * len(axes)
    if starts is None or ends is None or steps is None or not len(starts) == len(ends) == len(axes) == len(steps):
        gone = {axis % rank for axis in axes} if rank else set()
        return [Fact(source.dtype, tuple(fresh() if axis in gone else size for axis, size in enumerate(source.shape)))]
    shape = list(source.shape)
    value = source.value
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        axis = axis + rank if axis < 0 else axis
        if not 0 <= axis < rank or step == 0:
            return None
        size = shape[axis]
        shape[axis] = _slice_size(size, start, end, step)
        fixed = isinstance(start, int) and isinstance(end, int)
        if value is not None:
            value = value[(slice(None),) * axis + (_python_slice(start, end, step, size),)] if fixed else None
    return [Fact(source.dtype, tuple(shape)) if value is None else Fact(source.dtype, _int_shape(value), value)]


def _python_slice(start: Element, end: Element, step: int, size: Element) -> slice:
    assert isinstance(start, int) and isinstance(end, int) and isinstance(size, int)
    if step < 0 and end < -size:
        return slice(start, None, step)
    return slice(start, end, step)


def _bounds(facts: Facts, node: gs.Node, index: int, attribute: str) -> list[Element] | None:
    if attribute in node.attrs:
        return [int(item) for item in node.attrs[attribute]]
    found = _elements(facts, node, index)
    if found is not None:
        return found
    fixed = fixed_integers(facts, node, index)
    return None if fixed is None else list(fixed)


def _slice_size(size: Element, start: Element, end: Element, step: int) -> Element:
    if all(isinstance(item, int) for item in (size, start, end)):
        return len(range(*_python_slice(start, end, step, size).indices(size)))  # type: ignore[arg-type]
    if step != 1:
        whole = isinstance(start, int) and isinstance(end, int) and start == 0 and end >= 2**31 - 1 and step > 0
        return floor_divide(size + (step - 1), step) if whole else fresh()
    first, last = _clamped(start, size), _clamped(end, size)
    if first is None or last is None:
        return fresh()
    return maximum(last - first, 0)


def _clamped(position: Element, size: Element) -> Element | None:
    """Where a start or an end lies on an axis, from 0 to its size; None where its sign is not known."""
    least = lower_bound(position)
    if isinstance(position, int) and position >= 2**31 - 1:
        return size
    if least is not None and least >= 0:
        return minimum(position, size)
    most = lower_bound(-position)
    if most is not None and most > 0:
        return maximum(size + position, 0)
    return None


@_on("Gather")
def _gather(facts: Facts, node: gs.Node) -> Results:
    data, indices = facts.of(node.inputs[0]), facts.of(node.inputs[1])
    if data.dtype is None:
        return None
    if data.shape is None or indices.shape is None or not data.shape:
        return [Fact(data.dtype)]
    axis = int(node.attrs.get("axis", 0))
    axis = axis + len(data.shape) if axis < 0 else axis
    if not 0 <= axis < len(data.shape):
        return None
    shape = (*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :])
    positions = indices.known if indices.value is not None else None
    if data.value is None or positions is None:
        return [Fact(data.dtype, shape)]
    size = data.value.shape[axis]
    if positions.size and not (-size <= positions.min() and positions.max() < size):
        return [Fact(data.dtype, shape)]
    taken = np.take(data.value, positions, axis=axis)
    value = taken if isinstance(taken, np.ndarray) else _object([taken], ())
    return [_valued(data.dtype, value)]


@_on("Pad")
def _pad(facts: Facts, node: gs.Node) -> Results:
    source = facts.of(node.inputs[0])
    if source.dtype is None or source.shape is None:
        return None
    pads = _bounds(facts, node, 1, "pads") if "pads" in node.attrs or len(node.inputs) > 1 else None
    rank = len(source.shape)
    axes = list(range(rank))
    if _has(node, 3):
        chosen = fixed_integers(facts, node, 3)
        if chosen is None:
            return [Fact(source.dtype, _any_shape(rank))]
        axes = [axis + rank if axis < 0 else axis for axis in chosen]
    if pads is None or len(pads) != 2 * len(axes):
        return [Fact(source.dtype, _any_shape(rank))]
    shape = list(source.shape)
    for index, axis in enumerate(axes):
        size = shape[axis] + pads[index] + pads[index + len(axes)]
        least = lower_bound(size)
        shape[axis] = size if least is not None and least >= 0 else fresh()
    return [Fact(source.dtype, tuple(shape))]


# ---------------------------------------------------------------------------------------------------------- sequences


@_on("SplitToSequence")
def _split_to_sequence(facts: Facts, node: gs.Node) -> Results:
    return [Fact(facts.of(node.inputs[0]).dtype, None, None, sequence=True)]


@_on("SequenceConstruct", "SequenceInsert", "SequenceErase")
def _sequence(facts: Facts, node: gs.Node) -> Results:
    return [Fact(facts.of(node.inputs[0]).dtype, None, None, sequence=True)]


@_on("SequenceAt")
def _sequence_at(facts: Facts, node: gs.Node) -> Results:
    """The part that is taken, where the sequence is made by one node and the position is known."""
    sequence = node.inputs[0]
    dtype = facts.of(sequence).dtype
    maker = sequence.inputs[0] if len(sequence.inputs) == 1 else None
    position = fixed_integers(facts, node, 1)
    if maker is None or position is None:
        return [Fact(dtype)]
    if maker.op == "SequenceConstruct" and -len(maker.inputs) <= position[0] < len(maker.inputs):
        return [facts.of(maker.inputs[position[0]])]
    if maker.op == "SplitToSequence":
        return [_part(facts, maker, position[0])]
    return [Fact(dtype)]


def _part(facts: Facts, split: gs.Node, position: int) -> Fact:
    source = facts.of(split.inputs[0])
    if source.shape is None:
        return Fact(source.dtype)
    axis = int(split.attrs.get("axis", 0)) % len(source.shape) if source.shape else 0
    if not _has(split, 1):
        part: Element = 1
        keep = bool(split.attrs.get("keepdims", 1))
    else:
        keep = True
        sizes = fixed_integers(facts, split, 1)
        scalar = facts.of(split.inputs[1]).shape == ()
        whole = source.shape[axis]
        if sizes is None:
            part = fresh()
        elif not scalar:
            part = sizes[position] if -len(sizes) <= position < len(sizes) else fresh()
        elif isinstance(whole, int) and sizes[0] > 0:
            count = -(-whole // sizes[0])
            at = position + count if position < 0 else position
            part = max(min(sizes[0], whole - at * sizes[0]), 0)
        else:
            part = fresh()
    middle = (part,) if keep else ()
    return Fact(source.dtype, (*source.shape[:axis], *middle, *source.shape[axis + 1 :]))
