"""Normalizations that are spelled out, as the standard operators that mean them.

    LayerNormalization   d / sqrt(mean(d^2) + e) * s + b  with  d = x - mean(x)           since opset 17
    RMSNormalization     x / sqrt(mean(x^2) + e) * s                                      since opset 23
    Softmax              exp(x - max(x)) / sum(exp(x - max(x)))                           since opset 13

The means are over the last axes. A normalization is made with a scale of ones first; a Mul and an Add behind it then
become its scale and its bias, one by one. Without the maximum, exp overflows where Softmax does not: that form stays,
and so does Log(Softmax(x)), which is -inf where LogSoftmax is not.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.passes._linear import cancels
from onnxslim.passes._match import FLOATS, inner, only_read_by, readable, scalar, with_constant
from onnxslim.passes._rewriter import Rewriter
from onnxslim.passes._rules import Refused, Rule, rule
from onnxslim.passes._rules_constants import narrow_constant

__all__ = ["NORM_RULES"]

# A scale of ones is made where none was; a larger one may outweigh the nodes that it replaces.
_MOST_ONES = 16 * 1024


@rule("fuse-layer-norm", "Div", "Mul", since=17)
def _layer_norm(g: Rewriter, node: gs.Node) -> str | Refused | None:
    """(x - mean(x)) / sqrt(mean((x - mean(x))^2) + e) -> LayerNormalization(x, ones)."""
    matched = _over_deviation(g, node)
    if matched is None:
        return None
    centered, axes, epsilon = matched
    subtraction = _made_here(g, centered, node, "Sub")
    mean = None if subtraction is None else inner(g, subtraction.inputs[1], subtraction, "ReduceMean")
    op, source = "RMSNormalization", centered
    if (
        subtraction is not None
        and mean is not None
        and mean.inputs[0] is subtraction.inputs[0]
        and _axes(g, mean) == axes
    ):
        op, source = "LayerNormalization", subtraction.inputs[0]
    if op == "RMSNormalization" and g.opset(node) < 23:
        return None
    shape = g.shape(source)
    if shape is None or axes != list(range(-len(axes), 0)):
        return Refused("it is not over the last axes")
    sizes = [size for size in shape[-len(axes) :] if isinstance(size, int)]
    if g.dtype(source) != np.float32:
        return Refused(f"it is of type {g.dtype(source)}, and the standard operator computes in float32")
    if len(sizes) != len(axes) or not 0 < int(np.prod(sizes)) * 4 <= _MOST_ONES:
        return Refused("the size of the axes that it is over is not known, or too large")
    if not readable(g, node, source):
        return None
    ones = g.make_constant(g.scope(node), f"{node.outputs[0].name}_scale", np.ones(sizes, np.float32))
    g.rewrite(node, op, {"axis": -len(axes), "epsilon": epsilon}, [source, ones])
    return f"the {node.op} ends what is now a {op}"


def _made_here(g: Rewriter, tensor: gs.Tensor, user: gs.Node, *ops: str) -> gs.Node | None:
    """The node that makes a tensor which several nodes read, in the graph of ``user``."""
    node = g.producer(tensor, *ops)
    return node if node is not None and g.scope(node) is g.scope(user) else None


def _over_deviation(g: Rewriter, node: gs.Node) -> tuple[gs.Tensor, list[int], float] | None:
    """The tensor, the axes and the epsilon where a node is x / sqrt(mean(x^2) + epsilon)."""
    if len(node.inputs) != 2:
        return None
    for numerator, other in ((0, 1), (1, 0)) if node.op == "Mul" else ((0, 1),):
        x = node.inputs[numerator]
        shifted = _under_root(g, node.inputs[other], node)
        variance = None if shifted is None else with_constant(g, shifted)
        if shifted is None or variance is None:
            continue
        epsilon = scalar(g, variance.constant, variance.x)
        mean = inner(g, variance.x, shifted, "ReduceMean")
        square = None if mean is None else inner(g, mean.inputs[0], mean, "Pow", "Mul")
        axes = None if mean is None else _axes(g, mean)
        if epsilon is None or epsilon <= 0 or square is None or not axes:
            continue
        is_square = square.inputs[1] is x if square.op == "Mul" else scalar(g, square.inputs[1], x) == 2.0
        if square.inputs[0] is not x or not is_square or not only_read_by(g, x, _readers(g, x, node, square)):
            continue
        return x, axes, epsilon
    return None


def _readers(g: Rewriter, x: gs.Tensor, node: gs.Node, square: gs.Node) -> list[gs.Node]:
    """Who may read the numerator: anyone, unless it is a difference that is to go."""
    return [node, square] if g.producer(x, "Sub") is not None else list(x.outputs)


def _under_root(g: Rewriter, tensor: gs.Tensor, user: gs.Node) -> gs.Node | None:
    """The Add under the root that ``user`` divides by, or multiplies with the inverse of."""
    if user.op == "Mul":
        inverse = inner(g, tensor, user, "Reciprocal", "Div", "Pow")
        if inverse is None:
            return None
        if inverse.op == "Pow":
            return inner(g, inverse.inputs[0], inverse, "Add") if _exponent(g, inverse) == -0.5 else None
        if inverse.op == "Div" and scalar(g, inverse.inputs[0], inverse.inputs[1]) != 1.0:
            return None
        tensor, user = inverse.inputs[-1], inverse
    root = inner(g, tensor, user, "Sqrt", "Pow")
    if root is None or (root.op == "Pow" and _exponent(g, root) != 0.5):
        return None
    return inner(g, root.inputs[0], root, "Add")


def _exponent(g: Rewriter, node: gs.Node) -> float | None:
    return scalar(g, node.inputs[1], node.inputs[0])


def _axes(g: Rewriter, node: gs.Node) -> list[int] | None:
    """The axes of a reduction that keeps them as ones, negative and in order; None where they are not known."""
    rank, axes = g.rank(node.inputs[0]), g.integers(node, 1, "axes")
    if not axes or not node.attrs.get("keepdims", 1):
        return None
    if any(axis >= 0 for axis in axes):
        if rank is None:
            return None
        axes = [axis % rank - rank for axis in axes]
    return sorted(axes)


@rule("fuse-norm-scale", "Mul", "Add", since=17)
def _scale_or_bias(g: Rewriter, node: gs.Node) -> str | Refused | None:
    """LayerNormalization(x, s, b) * c + d -> LayerNormalization(x, s c, b c + d), a product or a sum at a time."""
    binary = with_constant(g, node)
    norm = None if binary is None else inner(g, binary.x, node, "LayerNormalization", "RMSNormalization")
    if binary is None or norm is None or (node.op == "Add" and norm.op != "LayerNormalization"):
        return None
    scale = g.constant(norm.inputs[1])
    has_bias = len(norm.inputs) > 2 and not norm.inputs[2].is_empty()
    bias = g.constant(norm.inputs[2]) if has_bias else None
    if scale is None or (has_bias and bias is None) or scale.dtype not in FLOATS or binary.value.dtype != scale.dtype:
        return Refused(f"the scale or the bias of the {norm.op} is not a constant of its type")
    if binary.value.ndim > scale.ndim or np.broadcast_shapes(binary.value.shape, scale.shape) != scale.shape:
        return Refused(f"its constant {list(binary.value.shape)} is not one of the normalized axes")
    if any(not g.is_unused(tensor) for tensor in norm.outputs[1:]):
        return Refused(f"the mean or the deviation of the {norm.op} is read")
    if not g.can_replace(node.outputs[0], binary.x):
        return Refused("its output cannot take the place of its input")
    return _put_in_norm(g, node, norm, binary.value.astype(np.float64), scale, bias)


def _put_in_norm(
    g: Rewriter, node: gs.Node, norm: gs.Node, value: np.ndarray, scale: np.ndarray, bias: np.ndarray | None
) -> str | Refused | None:
    scope, new = g.scope(norm), {}
    if node.op == "Mul":
        new[1] = scale.astype(np.float64) * value
        if bias is not None:
            new[2] = bias.astype(np.float64) * value
    elif bias is None:
        new[2] = np.broadcast_to(value, scale.shape)
    else:
        if cancels(bias.astype(np.float64), value):
            return Refused("it takes away what the bias adds, which rounds what lies between")
        new[2] = bias + value
    narrow: dict[int, np.ndarray] = {}
    for index, wide in new.items():
        rounded = narrow_constant(np.asarray(wide), scale.dtype, strict=False)
        if isinstance(rounded, Refused):
            return rounded
        old = (scale, bias)[index - 1]
        if old is None or not np.array_equal(old, rounded):
            narrow[index] = rounded
    shared = sum(narrow[index].nbytes for index in narrow if index < len(norm.inputs) and _is_shared(norm, index))
    if shared > max(_MOST_ONES, value.size * scale.itemsize):
        return Refused(f"the constants of the {norm.op} are read elsewhere too and are too large to copy")
    for index, array in narrow.items():
        has_one = index < len(norm.inputs)
        constant = g.make_constant(scope, norm.inputs[index].name if has_one else f"{norm.inputs[1].name}_bias", array)
        if has_one:
            g.set_input(norm, index, constant)
        else:
            g.add_input(norm, constant)
    op = node.op
    g.bypass(node, node.inputs[0] if norm.outputs[0] is node.inputs[0] else node.inputs[1])
    return f"the {op} became part of the {norm.op} {norm.name}"


def _is_shared(node: gs.Node, index: int) -> bool:
    return len(node.inputs[index].outputs) > 1


@rule("fuse-softmax", "Div", since=13)
def _softmax(g: Rewriter, node: gs.Node) -> str | None:
    """exp(x - max(x)) / sum(exp(x - max(x))) -> Softmax(x), maximum and sum over one axis."""
    total = inner(g, node.inputs[1], node, "ReduceSum")
    exp = _made_here(g, node.inputs[0], node, "Exp")
    if total is None or exp is None or total.inputs[0] is not node.inputs[0]:
        return None
    shifted = inner(g, exp.inputs[0], exp, "Sub")
    largest = None if shifted is None else inner(g, shifted.inputs[1], shifted, "ReduceMax")
    if shifted is None or largest is None or largest.inputs[0] is not shifted.inputs[0]:
        return None
    source, axes = shifted.inputs[0], _axes(g, total)
    if axes is None or len(axes) != 1 or axes != _axes(g, largest) or not readable(g, node, source):
        return None
    if not only_read_by(g, node.inputs[0], [node, total]) or g.dtype(source) not in FLOATS:
        return None
    g.rewrite(node, "Softmax", {"axis": axes[0]}, [source])
    return "the quotient of exponentials is a Softmax"


NORM_RULES: tuple[Rule, ...] = (_layer_norm, _scale_or_bias, _softmax)
