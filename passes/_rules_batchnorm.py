"""BatchNormalization folded into the weights before it.

In inference, per channel c:  y = s_c * x + t_c  with  s = scale / sqrt(var + epsilon),  t = bias - mean * s.
With x = W * a + b that is  y = (s W) * a + (s b + t): a scaled weight and a bias. Jacob et al., arXiv:1712.05877, 3.2.

The numbers are computed in float64 and rounded once, so the result differs from the original by the rounding of the
weights and of one multiply-add, as it would between two runtimes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.graph.purity import batchnorm_is_inference
from onnxslim.passes._rewriter import Rewriter
from onnxslim.passes._rules import Refused, Rule, rule

__all__ = ["BATCHNORM_RULES"]

# A weight that others read too is copied when it is at most this large; the parameters that die pay for some of it.
_COPY_LIMIT = 16 * 1024
_PARAMETERS = ("scale", "bias", "mean", "variance")
_Result: TypeAlias = tuple[np.ndarray, np.ndarray] | Refused


@dataclass(frozen=True)
class _Affine:
    """y = scale * x + shift for each channel, float64."""

    scale: np.ndarray
    shift: np.ndarray


@rule("fold-batchnorm", "BatchNormalization", since=7)
def _batchnorm(g: Rewriter, node: gs.Node) -> str | Refused | None:
    """Conv, ConvTranspose, Gemm or MatMul (+ Add) before a BatchNormalization take it into their weights."""
    affine = _affine(g, node)
    if isinstance(affine, Refused):
        return affine
    source = node.inputs[0]
    before = g.producer(source)
    if before is None:
        return Refused("no node with weights stands before it")
    if g.sole_user(source) is not node or g.scope(before) is not g.scope(node):
        return Refused(f"what the {before.op} before it makes is read elsewhere too")
    if before.op in ("Conv", "ConvTranspose", "Gemm"):
        return _fold_weighted(g, node, before, affine)
    if before.op == "MatMul":
        return _fold_matmul(g, node, before, affine)
    if before.op == "Add":
        return _fold_matmul_add(g, node, before, affine)
    return Refused(f"{before.op} before it has no weights to take it")


def _affine(g: Rewriter, node: gs.Node) -> _Affine | Refused:
    if not batchnorm_is_inference(node, g.opset(node)):
        return Refused("it is in training mode")
    if any(not g.is_unused(tensor) for tensor in node.outputs[1:]):
        return Refused("its statistics are read")
    if node.attrs.get("spatial", 1) != 1:
        return Refused("it normalizes each activation by itself (spatial = 0)")
    values = []
    for what, tensor in zip(_PARAMETERS, node.inputs[1:5], strict=True):
        value = g.constant(tensor)
        if value is None:
            return Refused(f"its {what} {tensor.name!r} is not constant")
        values.append(value)
    if any(value.dtype not in (np.float32, np.float64) for value in values):
        return Refused(f"weights of type {values[0].dtype} would be rounded noticeably")
    scale, bias, mean, variance = (value.astype(np.float64) for value in values)
    with np.errstate(all="ignore"):
        factor = scale / np.sqrt(variance + np.float64(np.float32(node.attrs.get("epsilon", 1e-5))))
        shift = bias - mean * factor
    if not (np.isfinite(factor).all() and np.isfinite(shift).all()):
        return Refused("its parameters give infinite or undefined numbers")
    return _Affine(factor, shift)


def _fold_weighted(g: Rewriter, node: gs.Node, before: gs.Node, affine: _Affine) -> str | Refused | None:
    weight = g.constant(before.inputs[1])
    if weight is None:
        return Refused(f"the weight {before.inputs[1].name!r} of the {before.op} before it is not constant")
    bias: np.ndarray | None = None
    if len(before.inputs) > 2 and not before.inputs[2].is_empty():
        bias = g.constant(before.inputs[2])
        if bias is None:
            return Refused(f"the bias {before.inputs[2].name!r} of the {before.op} before it is not constant")
    result = _scaled(before, weight, bias, affine)
    if isinstance(result, Refused):
        return result
    return _commit(g, node, before, before, result)


def _scaled(before: gs.Node, weight: np.ndarray, bias: np.ndarray | None, affine: _Affine) -> _Result:
    """The weight and bias of ``before`` with the normalization in them, float64."""
    channels = affine.scale.size
    wide = weight.astype(np.float64)
    old = np.zeros(channels) if bias is None else bias.astype(np.float64)
    if before.op == "Conv":
        if weight.ndim < 3 or weight.shape[0] != channels:
            return Refused("its channels are not those of the Conv before it")
        scaled = wide * affine.scale.reshape(-1, *[1] * (weight.ndim - 1))
    elif before.op == "ConvTranspose":
        groups = int(before.attrs.get("group", 1))
        if weight.ndim < 3 or weight.shape[1] * groups != channels:
            return Refused("its channels are not those of the ConvTranspose before it")
        # Weight [inputs, outputs per group, ...]: rows of group i make the channels of group i.
        grouped = wide.reshape(groups, -1, *weight.shape[1:])
        factor = affine.scale.reshape(groups, 1, weight.shape[1], *[1] * (weight.ndim - 2))
        scaled = (grouped * factor).reshape(weight.shape)
    else:
        transposed = bool(before.attrs.get("transB", 0))
        if weight.ndim != 2 or weight.shape[0 if transposed else 1] != channels:
            return Refused("its channels are not those of the Gemm before it")
        scaled = wide * (affine.scale[:, None] if transposed else affine.scale)
        old = old * float(before.attrs.get("beta", 1.0))
        if old.ndim > 1 and int(np.prod(old.shape[:-1])) != 1:
            return Refused("the Gemm before it adds a matrix, not a vector")
        old = old.reshape(-1)
    if old.size not in (1, channels):
        return Refused(f"the bias of the {before.op} before it has another size")
    return scaled, old * affine.scale + affine.shift


def _fold_matmul(g: Rewriter, node: gs.Node, before: gs.Node, affine: _Affine) -> str | Refused | None:
    """MatMul + BatchNormalization -> MatMul + Add: the normalization itself becomes the Add."""
    result = _matmul_weight(g, node, before, affine)
    if isinstance(result, Refused):
        return result
    if not _may_replace(before.inputs[1]):
        return _shared(before)
    weight = g.constant(before.inputs[1])
    assert weight is not None
    rounded = _rounded(result, affine.shift, weight.dtype)
    if isinstance(rounded, Refused):
        return rounded
    scope = g.scope(node)
    g.set_input(before, 1, g.make_constant(scope, before.inputs[1].name, rounded[0]))
    g.rewrite(node, "Add", {}, [node.inputs[0], g.make_constant(scope, f"{node.inputs[2].name}_folded", rounded[1])])
    return f"folded into the MatMul {before.name}, leaving an Add"


def _fold_matmul_add(g: Rewriter, node: gs.Node, add: gs.Node, affine: _Affine) -> str | Refused | None:
    for side in (0, 1):
        before = g.producer(add.inputs[side], "MatMul")
        bias = g.constant(add.inputs[1 - side])
        if before is None or bias is None:
            continue
        if g.sole_user(add.inputs[side]) is not add or g.scope(before) is not g.scope(add):
            return Refused("what the MatMul before it makes is read elsewhere too")
        result = _matmul_weight(g, node, before, affine)
        if isinstance(result, Refused):
            return result
        if bias.ndim > 2 or (bias.ndim == 2 and bias.shape[0] != 1) or bias.size not in (1, affine.scale.size):
            return Refused("the Add before it adds no vector of its channels")
        shift = bias.astype(np.float64).reshape(-1) * affine.scale + affine.shift
        return _commit(g, node, before, add, (result, shift), bias_at=1 - side)
    return Refused("Add before it has no weights to take it")


def _matmul_weight(g: Rewriter, node: gs.Node, before: gs.Node, affine: _Affine) -> np.ndarray | Refused:
    if g.rank(node.inputs[0]) != 2:
        return Refused("its channels are not the last axis of the MatMul before it")
    weight = g.constant(before.inputs[1])
    if weight is None or weight.ndim != 2 or weight.shape[1] != affine.scale.size:
        return Refused("the MatMul before it has no constant matrix of its channels")
    scaled: np.ndarray = weight.astype(np.float64) * affine.scale
    return scaled


def _commit(
    g: Rewriter,
    node: gs.Node,
    before: gs.Node,
    adder: gs.Node,
    result: tuple[np.ndarray, np.ndarray],
    bias_at: int = 2,
) -> str | Refused | None:
    """Give ``before`` the weight and ``adder`` (itself, or the Add behind it) the bias, and drop the node."""
    dtype = g.dtype(before.inputs[1])
    if dtype is None or dtype not in (np.float32, np.float64):
        return Refused(f"weights of type {dtype} would be rounded noticeably")
    rounded = _rounded(*result, dtype)
    if isinstance(rounded, Refused):
        return rounded
    if not _may_replace(before.inputs[1]):
        return _shared(before)
    if not g.can_replace(node.outputs[0], node.inputs[0]):
        return Refused("its output cannot take the place of its input")
    weight_name, scope = before.inputs[1].name, g.scope(before)
    has_bias = len(adder.inputs) > bias_at and not adder.inputs[bias_at].is_empty()
    bias_name = adder.inputs[bias_at].name if has_bias else f"{weight_name}_bias"
    g.set_input(before, 1, g.make_constant(scope, weight_name, rounded[0]))
    bias = g.make_constant(scope, bias_name, rounded[1])
    if len(adder.inputs) > bias_at:
        g.set_input(adder, bias_at, bias)
    else:
        g.add_input(adder, bias)
    if before.op == "Gemm":
        before.attrs = {**before.attrs, "beta": 1.0}
    g.bypass(node, node.inputs[0])
    return f"folded into the {before.op} {before.name}"


def _rounded(weight: np.ndarray, bias: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray] | Refused:
    with np.errstate(over="ignore"):
        narrow = weight.astype(dtype), bias.astype(dtype)
    if not all(np.isfinite(array).all() for array in narrow):
        return Refused("the folded weights would overflow")
    return narrow


def _may_replace(weight: gs.Tensor) -> bool:
    """Whether a new weight costs little: nobody else reads the old one, or it is small."""
    if len(weight.outputs) == 1:
        return True
    size = int(np.prod(weight.shape)) if weight.shape is not None else _COPY_LIMIT
    return bool(size * np.dtype(weight.dtype).itemsize <= _COPY_LIMIT)


def _shared(before: gs.Node) -> Refused:
    return Refused(f"the weight {before.inputs[1].name!r} is read elsewhere too and is too large to copy")


BATCHNORM_RULES: tuple[Rule, ...] = (_batchnorm,)
