"""BatchNormalization folded into the weights before it, or behind it.

In inference, per channel c:  y = s_c * x + t_c  with  s = scale / sqrt(var + epsilon),  t = bias - mean * s.
What layers do with that is in :mod:`onnxslim.passes._reweight`.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.graph.purity import batchnorm_is_inference
from onnxslim.passes._linear import Affine, Layer, layer_before, layer_of
from onnxslim.passes._match import inner
from onnxslim.passes._reweight import input_edit, output_edit
from onnxslim.passes._rewriter import Rewriter
from onnxslim.passes._rules import Refused, Rule, rule

__all__ = ["BATCHNORM_RULES", "batchnorm_as_conv"]

_PARAMETERS = ("scale", "bias", "mean", "variance")


@rule("fold-batchnorm", "BatchNormalization", since=7)
def _into_layer_before(g: Rewriter, node: gs.Node) -> str | Refused | None:
    """Conv, ConvTranspose, Gemm or MatMul (+ Add) before a BatchNormalization take it into their weights."""
    affine = _affine(g, node)
    if isinstance(affine, Refused):
        return affine
    source = node.inputs[0]
    layer = layer_before(g, source, node)
    if isinstance(layer, Refused):
        return layer
    assert affine.scale is not None
    if layer.rank is None or (layer.axis == -1 and layer.rank != 2) or layer.channels != affine.scale.size:
        return Refused(f"its channels are not those of the {layer.node.op} before it")
    if layer.node.op == "MatMul" and layer.adder is layer.node:
        return _into_matmul(g, node, layer, affine)
    if not g.can_replace(node.outputs[0], source):
        return Refused("its output cannot take the place of its input")
    edit = output_edit(g, layer, affine, freed=4 * affine.scale.size * 4)
    if isinstance(edit, Refused):
        return edit
    edit.apply(g)
    g.bypass(node, source)
    return f"folded into the {layer.node.op} {layer.node.name}"


def _into_matmul(g: Rewriter, node: gs.Node, layer: Layer, affine: Affine) -> str | Refused:
    """MatMul + BatchNormalization -> MatMul + Add: the normalization itself becomes the Add."""
    dtype = g.dtype(layer.node.inputs[1])
    assert affine.shift is not None
    with np.errstate(over="ignore"):
        shift = affine.shift.astype(dtype)
    if not np.isfinite(shift).all():
        return Refused("the folded weights would overflow")
    edit = output_edit(g, layer, Affine(affine.scale, None))
    if isinstance(edit, Refused):
        return edit
    edit.apply(g)
    added = g.make_constant(g.scope(node), f"{node.inputs[2].name}_folded", shift)
    g.rewrite(node, "Add", {}, [node.inputs[0], added])
    return f"folded into the MatMul {layer.node.name}, leaving an Add"


@rule("fold-batchnorm-forward", "Conv", "Gemm", since=7)
def _into_layer_behind(g: Rewriter, node: gs.Node) -> str | Refused | None:
    """A Conv without padding, or a Gemm, takes the BatchNormalization that only it reads into its weights."""
    before = inner(g, node.inputs[0], node, "BatchNormalization")
    if before is None:
        return None
    affine = _affine(g, before)
    if isinstance(affine, Refused):
        return affine
    layer = layer_of(g, node)
    if layer is None or node.attrs.get("transA", 0):
        return Refused(f"the {node.op} does not have its channels along the columns of a constant weight")
    edit = input_edit(g, layer, affine, before.inputs[0])
    if isinstance(edit, Refused):
        return edit
    edit.apply(g)
    return f"took the BatchNormalization {before.name} before it into its weight"


@rule("batchnorm-as-conv", "BatchNormalization", since=7)
def batchnorm_as_conv(g: Rewriter, node: gs.Node) -> str | Refused | None:
    """A BatchNormalization of a map that layers make becomes a depthwise Conv of one tap: for that there is a kernel.

    Only quantization needs this: in float a BatchNormalization is as fast.
    """
    source = node.inputs[0]
    rank = g.rank(source)
    before = g.producer(source, "Conv", "Relu", "Clip", "LeakyRelu", "MaxPool", "AveragePool", "Add", "Concat")
    if rank is None or rank < 3 or before is None or g.dtype(source) != np.float32:
        return None
    affine = _affine(g, node)
    if isinstance(affine, Refused):
        return affine
    assert affine.scale is not None and affine.shift is not None
    spatial = rank - 2
    channels = affine.scale.size
    with np.errstate(over="ignore"):
        weight = affine.scale.astype(np.float32).reshape(channels, 1, *[1] * spatial)
        shift = affine.shift.astype(np.float32)
    if not (np.isfinite(weight).all() and np.isfinite(shift).all()):
        return Refused("its numbers would overflow")
    hint = node.inputs[1].name
    scope = g.scope(node)
    inputs = [source, g.make_constant(scope, f"{hint}_gain", weight), g.make_constant(scope, f"{hint}_shift", shift)]
    g.rewrite(node, "Conv", {"group": channels, "kernel_shape": [1] * spatial}, inputs)
    return f"a depthwise Conv of {channels} channels"


def _affine(g: Rewriter, node: gs.Node) -> Affine | Refused:
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
    return Affine(factor, shift)


BATCHNORM_RULES: tuple[Rule, ...] = (_into_layer_before, _into_layer_behind)
