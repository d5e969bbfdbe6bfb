"""Rules about operators of ai.onnx.ml (scikit-learn exports) that are plain arithmetic on tensors.

As operators of the default domain, other rules fold them into the layers behind them, and every target has them.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.passes._rewriter import Rewriter, has_plain_attributes
from onnxslim.passes._rules import Refused, Rule, rule

__all__ = ["ML_RULES"]

_DOMAIN = "ai.onnx.ml"


@rule("scaler-to-affine", since=7)
def _scaler(g: Rewriter, node: gs.Node) -> str | Refused | None:
    """Scaler(x) of float32 -> (x - offset) * scale, which is what it computes, in that order."""
    if node.op != "Scaler" or node.domain != _DOMAIN or not has_plain_attributes(node):
        return None
    data, shape = node.inputs[0], g.shape(node.inputs[0])
    offset, scale = (np.asarray(node.attrs.get(name, ()), np.float32) for name in ("offset", "scale"))
    if g.dtype(data) != np.float32:
        return Refused("it converts its input to float32 as well")
    if shape is None or len(shape) not in (1, 2) or offset.size != scale.size or offset.size not in (1, shape[-1]):
        return None
    scope, stem = g.scope(node), node.outputs[0].name
    shifted = g.insert_before(node, "Sub", {}, [data, g.make_constant(scope, f"{stem}_offset", offset)])
    g.rewrite(node, "Mul", {}, [shifted, g.make_constant(scope, f"{stem}_scale", scale)])
    return "made a Sub and a Mul"


@rule("extractor-to-gather", since=5)
def _extractor(g: Rewriter, node: gs.Node) -> str | None:
    """ArrayFeatureExtractor(x, y) -> Gather(x, y) on the last axis, for y that is not negative; a vector is one row."""
    if node.op != "ArrayFeatureExtractor" or node.domain != _DOMAIN:
        return None
    (data, indices), scope, stem = node.inputs, g.scope(node), node.outputs[0].name
    rank, known = g.rank(data), g.constant(indices)
    never_negative = g.producer(indices, "ArgMax") is not None if known is None else bool((known >= 0).all())
    if not rank or not never_negative:
        return None
    if known is not None:
        indices = g.make_constant(scope, f"{stem}_indices", known.reshape(-1))
    elif g.rank(indices) != 1:
        flat = g.make_constant(scope, f"{stem}_flat", np.array([-1], np.int64))
        indices = g.insert_before(node, "Reshape", {}, [indices, flat])
    if rank == 1:
        row = g.make_constant(scope, f"{stem}_row", np.array([1, -1], np.int64))
        data = g.insert_before(node, "Reshape", {}, [data, row])
    g.rewrite(node, "Gather", {"axis": max(rank - 1, 1)}, [data, indices])
    return "made a Gather"


ML_RULES: tuple[Rule, ...] = (_scaler, _extractor)
