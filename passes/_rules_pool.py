"""Means over all of a feature map, written as the pooling that they are."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.passes._rewriter import Rewriter
from onnxslim.passes._rules import Refused, rule

__all__ = ["mean_as_pool"]


@rule("mean-as-pool", "ReduceMean")
def mean_as_pool(g: Rewriter, node: gs.Node) -> str | Refused | None:
    """ReduceMean over all spatial axes becomes a GlobalAveragePool, for which there is a kernel on codes.

    Only quantization needs this: in float a ReduceMean is as fast. And only of what layers make: where there may be no
    channel at all, pooling fails.
    """
    source = node.inputs[0]
    rank = g.rank(source)
    axes = g.integers(node, 1, "axes")
    made = g.producer(source, "Conv", "Relu", "Clip", "LeakyRelu", "MaxPool", "AveragePool", "Add", "Mul", "Concat")
    if rank is None or rank < 3 or axes is None or made is None or g.dtype(source) != np.float32:
        return None
    if sorted(axis % rank for axis in axes) != list(range(2, rank)):
        return None
    if node.attrs.get("keepdims", 1):
        g.rewrite(node, "GlobalAveragePool", {}, [source])
    else:
        g.rewrite(node, "Flatten", {"axis": 1}, [g.insert_before(node, "GlobalAveragePool", {}, [source])])
    return "a GlobalAveragePool"
