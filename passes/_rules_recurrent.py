"""Rules about LSTM, GRU and RNN."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxslim.passes._rewriter import Rewriter
from onnxslim.passes._rules import Rule, rule

__all__ = ["RECURRENT_RULES"]

_VIEWS = ("Slice", "Expand", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Identity", "Cast", "Gather", "Tile")


@rule("drop-zero-state", "LSTM", "GRU", "RNN", since=7)
def _zero_state(g: Rewriter, node: gs.Node) -> str | None:
    """An initial state of zeros -> none: it is zero where there is none."""
    states = [index for index in (5, 6) if index < len(node.inputs) and not node.inputs[index].is_empty()]
    zeros = [index for index in states if _is_zero(g, node.inputs[index])]
    if not zeros:
        return None
    inputs = [gs.Variable.empty() if index in zeros else tensor for index, tensor in enumerate(node.inputs)]
    while inputs[-1].is_empty():
        inputs.pop()
    g.rewrite(node, node.op, node.attrs, inputs)
    return "its initial state is zero, as it would be without"


def _is_zero(g: Rewriter, tensor: gs.Tensor, depth: int = 8) -> bool:
    """Whether every element of a tensor is 0, whatever its shape."""
    value = g.constant(tensor, limit=1 << 16)
    if value is not None:
        return value.dtype.kind in "fiu" and not value.any()
    maker = g.producer(tensor, "ConstantOfShape", "Concat", *_VIEWS)
    if maker is None or depth == 0:
        return False
    if maker.op == "Concat":
        return all(_is_zero(g, part, depth - 1) for part in maker.inputs)
    if maker.op != "ConstantOfShape":
        return _is_zero(g, maker.inputs[0], depth - 1)
    fill = maker.attrs.get("value")
    return fill is None or not fill.values.any()


RECURRENT_RULES: tuple[Rule, ...] = (_zero_state,)
