"""Means over all of a feature map, written as the pooling that they are."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.passes._rewriter import Rewriter
from onnxslim.passes._rules import Refused, rule

__all__ = ["mean_as_pool"]

_ELEMENTWISE = ("Relu", "Clip", "LeakyRelu", "HardSwish", "HardSigmoid", "Sigmoid", "Add", "Mul", "BatchNormalization")
_FAR = 16  # nodes


@rule("mean-as-pool", "ReduceMean")
def mean_as_pool(g: Rewriter, node: gs.Node) -> str | Refused | None:
    """ReduceMean over all spatial axes becomes a GlobalAveragePool, for which there is a kernel on codes.

    Only quantization needs this: in float a ReduceMean is as fast. And only of what convolutions make: where a map may
    be empty, pooling fails.
    """
    source = node.inputs[0]
    rank = g.rank(source)
    axes = g.integers(node, 1, "axes")
    if rank is None or rank < 3 or axes is None or g.dtype(source) != np.float32 or not _convolved(g, source):
        return None
    if sorted(axis % rank for axis in axes) != list(range(2, rank)):
        return None
    if node.attrs.get("keepdims", 1):
        g.rewrite(node, "GlobalAveragePool", {}, [source])
    else:
        g.rewrite(node, "Flatten", {"axis": 1}, [g.insert_before(node, "GlobalAveragePool", {}, [source])])
    return "a GlobalAveragePool"


def _convolved(g: Rewriter, tensor: gs.Tensor) -> bool:
    """Whether a convolution made a map, but for what works on each element."""
    for _ in range(_FAR):
        node = g.producer(tensor, "Conv", *_ELEMENTWISE)
        if node is None or node.op == "Conv":
            return node is not None
        tensor = next((each for each in node.inputs if g.constant(each) is None), node.inputs[0])
    return False
