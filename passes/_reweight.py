"""Scales and shifts taken up by the weight and the bias of a layer.

With y = W x + b (a convolution, a matrix product) and per channel c of the result

    s_c y_c + t_c = (s_c W_c) x + (s_c b_c + t_c),

and per channel k of what is read

    W (s x + t) + b = (W_k s_k) x + (b + sum over k of W_k t_k),

the latter with t only where no padding adds zeros that t would have shifted. Jacob et al., arXiv:1712.05877, 3.2.

Numbers are computed in float64 and rounded once, so that results differ from the original by the rounding of the
weights and of one multiply-add, as they would between two runtimes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.passes._bias import beta_of
from onnxslim.passes._linear import Affine, Layer, cancels, has_padding
from onnxslim.passes._match import FLOATS, readable
from onnxslim.passes._rewriter import Rewriter
from onnxslim.passes._rules import Refused

__all__ = ["Edit", "input_edit", "output_edit"]

# A weight that others read too is copied when it is at most this large; the parameters that die pay for some of it.
_COPY_LIMIT = 16 * 1024
# A bias made where there was none may be this much larger than the constant that it replaces: less than a node takes.
_NEW_BIAS_LIMIT = 2 * 1024


@dataclass(frozen=True)
class Edit:
    """New parameters of a layer, computed and found right.

    Attributes:
        layer: whose they are.
        weight: its new weight; None where that stays.
        bias: its new bias; None where that stays.
        source: what it reads from now on; None where that stays.
    """

    layer: Layer
    weight: np.ndarray | None
    bias: np.ndarray | None
    source: gs.Tensor | None = None

    def apply(self, g: Rewriter) -> None:
        """Write the parameters into the graph."""
        node, adder, scope = self.layer.node, self.layer.adder, g.scope(self.layer.node)
        name, old = node.inputs[1].name, self.layer.bias
        if self.source is not None:
            g.set_input(node, 0, self.source)
        if self.weight is not None:
            g.set_input(node, 1, g.make_constant(scope, name, self.weight))
        if self.bias is None:
            return
        tensor = g.make_constant(scope, f"{name}_bias" if old is None else old.name, self.bias)
        if len(adder.inputs) > self.layer.bias_at:
            g.set_input(adder, self.layer.bias_at, tensor)
        else:
            g.add_input(adder, tensor)
        if node.op == "Gemm":
            g.set_attributes(node, beta=1.0)


def output_edit(g: Rewriter, layer: Layer, affine: Affine, freed: int = 0) -> Edit | Refused:
    """How to make a layer compute ``scale * y + shift`` of what it computes, or why that cannot be.

    A MatMul without bias takes no shift. ``freed`` is how many bytes of constants the caller drops.
    """
    node = layer.node
    dtype = g.dtype(node.inputs[1])
    if dtype not in FLOATS or dtype is None:
        return Refused(f"weights of type {dtype} would be rounded noticeably")
    if affine.shift is not None and layer.adder is node and node.op == "MatMul":
        return Refused("a MatMul has no bias")
    weight: np.ndarray | None = None
    if affine.scale is not None:
        found = _constant_weight(g, node)
        if isinstance(found, Refused):
            return found
        scaled = _scaled(found, _row_factor(node, found, affine.scale), strict=affine.shift is None)
        if isinstance(scaled, Refused):
            return scaled
        weight = scaled
    bias = _new_bias(g, layer, affine, dtype, freed)
    if isinstance(bias, Refused):
        return bias
    return Edit(layer, weight, bias)


def input_edit(g: Rewriter, layer: Layer, affine: Affine, source: gs.Tensor) -> Edit | Refused:
    """How to make a layer read ``source`` in place of ``scale * source + shift``, or why that cannot be."""
    node = layer.node
    dtype = g.dtype(node.inputs[1])
    if dtype not in FLOATS or dtype is None:
        return Refused(f"weights of type {dtype} would be rounded noticeably")
    if not readable(g, node, source):
        return Refused("another tensor of the same name hides its operand")
    old = _constant_weight(g, node)
    if isinstance(old, Refused):
        return old
    weight: np.ndarray | None = None
    if affine.scale is not None:
        scaled = _scaled(old, _column_factor(node, old, affine.scale), strict=True)
        if isinstance(scaled, Refused):
            return scaled
        weight = scaled
    bias = None if affine.shift is None else _shifted_bias(g, layer, old, affine.shift, dtype)
    if isinstance(bias, Refused):
        return bias
    return Edit(layer, weight, bias, source)


def _shifted_bias(
    g: Rewriter, layer: Layer, weight: np.ndarray, shift: np.ndarray, dtype: np.dtype
) -> np.ndarray | Refused | None:
    """The bias of a layer that reads its input without the shift."""
    node = layer.node
    if has_padding(node):
        return Refused(f"the {node.op} behind it pads with zeros, which it would have shifted")
    if node.op == "MatMul":
        return Refused("a MatMul has no bias")
    moved = _shift_of_output(node, weight, shift)
    if isinstance(moved, Refused):
        return moved
    alpha = float(node.attrs.get("alpha", 1.0)) if node.op == "Gemm" else 1.0
    return _new_bias(g, layer, Affine(None, moved * alpha), dtype, shift.nbytes)


def _constant_weight(g: Rewriter, node: gs.Node) -> np.ndarray | Refused:
    tensor = node.inputs[1]
    weight = g.constant(tensor)
    if weight is None:
        return Refused(f"the weight {tensor.name!r} of the {node.op} is not constant")
    if len(tensor.outputs) != 1 and weight.nbytes > _COPY_LIMIT:
        return Refused(f"the weight {tensor.name!r} is read elsewhere too and is too large to copy")
    return weight


def _new_bias(g: Rewriter, layer: Layer, affine: Affine, dtype: np.dtype, freed: int) -> np.ndarray | Refused | None:
    """The bias of the transformed layer; None where it stays as it is."""
    tensor = layer.bias
    if tensor is None and affine.shift is None:
        return None
    old, value = np.zeros(1), None if tensor is None else g.constant(tensor)
    if tensor is not None:
        if value is None:
            return Refused(f"the bias {tensor.name!r} of the {layer.node.op} is not constant")
        if value.size not in (1, layer.channels) or (value.ndim > 1 and value.size != value.shape[-1]):
            return Refused(f"the {layer.node.op} adds a matrix, not a vector")
        old = value.astype(np.float64).reshape(-1) * beta_of(layer.node)
    scaled = old if affine.scale is None else old * affine.scale
    if affine.shift is not None and affine.scale is None and cancels(scaled, affine.shift):
        return Refused("it takes away what the bias adds, which rounds what lies between")
    total = scaled if affine.shift is None else scaled + affine.shift
    if tensor is None and layer.channels * dtype.itemsize > max(_NEW_BIAS_LIMIT, freed):
        return Refused("the bias that it would make is larger than what it removes")
    # Conv and ConvTranspose take a vector of all channels; a number broadcasts everywhere else.
    whole = np.broadcast_to(total, (layer.channels,)) if layer.node.op != "MatMul" else total
    narrow = _narrowed(np.ascontiguousarray(whole), dtype)
    # A bias of zeros stays itself when it is scaled, and shared with others.
    same = value is not None and not isinstance(narrow, Refused) and np.array_equal(narrow, value)
    return None if same and beta_of(layer.node) == 1.0 else narrow


def _narrowed(wide: np.ndarray, dtype: np.dtype) -> np.ndarray | Refused:
    """Round once."""
    with np.errstate(over="ignore", under="ignore"):
        narrow = wide.astype(dtype)
    return narrow if np.isfinite(narrow).all() else Refused("the folded weights would overflow")


@dataclass(frozen=True)
class _Factor:
    """What a weight is multiplied with: ``weight.reshape(view) * values``."""

    view: tuple[int, ...]
    values: np.ndarray


def _scaled(weight: np.ndarray, factor: _Factor | Refused, *, strict: bool) -> np.ndarray | Refused:
    """Multiply in float64 and round once; with ``strict``, only where that leaves the numbers their precision."""
    if isinstance(factor, Refused):
        return factor
    result = np.empty(factor.view, weight.dtype)
    with np.errstate(over="ignore", under="ignore"):
        # NumPy casts block by block: a large weight is never there in float64 as a whole.
        np.multiply(weight.reshape(factor.view), factor.values, out=result, dtype=np.float64, casting="same_kind")
    low, high = float(result.min(initial=0)), float(result.max(initial=0))
    if not np.isfinite([low, high]).all():
        return Refused("the folded weights would overflow")
    limits = np.finfo(weight.dtype)
    if strict and max(-low, high) < limits.tiny / limits.eps and weight.any() and factor.values.any():
        return Refused("the folded weights would lose precision, they are so small")
    return result.reshape(weight.shape)


def _row_factor(node: gs.Node, weight: np.ndarray, scale: np.ndarray) -> _Factor:
    """How to scale the channels of the result of a layer."""
    if scale.size == 1:
        return _Factor(weight.shape, scale.reshape(()))
    if node.op == "Conv":
        return _Factor(weight.shape, scale.reshape(-1, *[1] * (weight.ndim - 1)))
    if node.op == "ConvTranspose":
        # Weight [inputs, outputs per group, ...]: rows of group i make the channels of group i.
        groups = int(node.attrs.get("group", 1))
        view = (groups, weight.shape[0] // groups, *weight.shape[1:])
        return _Factor(view, scale.reshape(groups, 1, weight.shape[1], *[1] * (weight.ndim - 2)))
    return _Factor(weight.shape, scale[:, None] if node.attrs.get("transB", 0) else scale)


def _column_factor(node: gs.Node, weight: np.ndarray, scale: np.ndarray) -> _Factor | Refused:
    """How to scale the channels of the input of a layer."""
    if scale.size == 1:
        return _Factor(weight.shape, scale.reshape(()))
    if node.op == "Conv":
        groups = int(node.attrs.get("group", 1))
        if weight.shape[1] * groups != scale.size or weight.shape[0] % groups:
            return Refused("its channels are not those of the Conv behind it")
        view = (groups, weight.shape[0] // groups, *weight.shape[1:])
        return _Factor(view, scale.reshape(groups, 1, weight.shape[1], *[1] * (weight.ndim - 2)))
    axis = 1 if node.attrs.get("transB", 0) else 0
    if weight.shape[axis] != scale.size:
        return Refused(f"its channels are not those of the {node.op} behind it")
    return _Factor(weight.shape, scale.reshape([-1 if each == axis else 1 for each in range(weight.ndim)]))


def _shift_of_output(node: gs.Node, weight: np.ndarray, shift: np.ndarray) -> np.ndarray | Refused:
    """What a shift of the input channels adds to each channel of the result of a layer without padding."""
    inputs = weight.shape[1] * int(node.attrs.get("group", 1)) if node.op == "Conv" else weight.shape[0]
    if node.attrs.get("transB", 0):
        inputs = weight.shape[1]
    full = np.broadcast_to(shift, (inputs,)) if shift.size in (1, inputs) else shift
    factor = _column_factor(node, weight, full)
    if isinstance(factor, Refused):
        return factor
    moved = (weight.reshape(factor.view).astype(np.float64) * factor.values).reshape(weight.shape)
    if node.op == "Conv" or node.attrs.get("transB", 0):
        return np.asarray(moved.reshape(weight.shape[0], -1).sum(axis=1))
    return np.asarray(moved.sum(axis=0))
