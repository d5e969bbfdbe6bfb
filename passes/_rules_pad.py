"""Pad nodes taken up by the padding of the convolution or pooling behind them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.passes._match import readable
from onnxslim.passes._rewriter import Rewriter
from onnxslim.passes._rules import Refused, Rule, rule

__all__ = ["PAD_RULES"]


@dataclass(frozen=True)
class _Padding:
    """How much a Pad adds before and behind each spatial axis, and which number."""

    amounts: list[int]
    value: float


@rule("fold-pad", "Conv", "ConvInteger", "MaxPool", "AveragePool", since=2)
def _pad(g: Rewriter, node: gs.Node) -> str | Refused | None:
    """Conv(Pad(x)) -> Conv(x) with more padding, where all that read the Pad take it up.

    Convolutions pad with zeros, as does AveragePool where it counts them; MaxPool pads with what is never the largest.
    """
    pad = g.producer(node.inputs[0], "Pad")
    if pad is None:
        return None
    padded, source = pad.outputs[0], pad.inputs[0]
    padding = _padding(g, pad)
    if isinstance(padding, Refused):
        return padding
    if g.is_output(padded):
        return Refused("what the Pad before it makes is an output")
    for reader in padded.outputs:
        why = _obstacle(g, reader, padded, padding)
        if why is not None:
            return Refused(why)
    if not readable(g, node, source):
        return None
    own = node.attrs.get("pads") or [0] * len(padding.amounts)
    pads = [int(mine) + added for mine, added in zip(own, padding.amounts, strict=True)]
    counted = 1 if node.op == "AveragePool" else None
    g.set_input(node, 0, source)
    g.set_attributes(node, pads=pads, auto_pad=None, count_include_pad=counted)
    return f"took up the Pad {pad.name}"


def _padding(g: Rewriter, pad: gs.Node) -> _Padding | Refused:
    if pad.attrs.get("mode", "constant") != "constant":
        return Refused(f"the Pad before it is of mode {pad.attrs['mode']!r}")
    amounts, value = g.integers(pad, 1, "pads"), 0.0
    if amounts is None:
        return Refused("the amounts of the Pad before it are not constant")
    if "pads" in pad.attrs:
        value = float(pad.attrs.get("value", 0.0))
    elif len(pad.inputs) > 2 and not pad.inputs[2].is_empty():
        constant = g.constant(pad.inputs[2], 1)
        if constant is None or constant.dtype.kind not in "fiu":
            return Refused("the value of the Pad before it is not a constant number")
        value = float(constant.reshape(()))
    rank = g.rank(pad.inputs[0])
    if len(pad.inputs) > 3 and not pad.inputs[3].is_empty():
        axes = g.integers(pad, 3)
        if axes is None or rank is None:
            return Refused("the axes of the Pad before it are not known")
        full = [0] * (2 * rank)
        for index, axis in enumerate(axes):
            full[axis % rank] = amounts[index]
            full[axis % rank + rank] = amounts[index + len(axes)]
        amounts = full
    half = len(amounts) // 2
    # The first two axes are those of the batch and of the channels.
    if half < 3 or any(amounts[axis] for axis in (0, 1, half, half + 1)):
        return Refused("the Pad before it pads more than spatial axes")
    inner = amounts[2:half] + amounts[half + 2 :]
    return Refused("the Pad before it crops") if min(inner) < 0 else _Padding(inner, value)


def _obstacle(g: Rewriter, node: gs.Node, padded: gs.Tensor, padding: _Padding) -> str | None:
    """Why a reader of the padded tensor cannot pad by itself; None where it can."""
    amounts = padding.amounts
    # Asked for the producer of its output, the graph says whether a node is of the default domain as well.
    if not node.outputs or g.producer(node.outputs[0], "Conv", "ConvInteger", "MaxPool", "AveragePool") is None:
        return f"the Pad is read by {node.op} too"
    if node.inputs[0] is not padded or any(other is padded for other in node.inputs[1:]):
        return "the Pad is not what it convolves"
    if node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return f"its own padding is {node.attrs['auto_pad']}, which depends on the size"
    if len(node.attrs.get("pads") or amounts) != len(amounts):
        return "its own padding is of another rank"
    if node.op in ("MaxPool", "AveragePool"):
        return _obstacle_of_pool(g, node, padding)
    if padding.value != 0:
        return f"the Pad adds {padding.value:g}, not zeros"
    if node.op == "Conv":
        weight = g.constant(node.inputs[1])
        # A padded zero times an infinite weight is undefined; padding of a convolution may be left out of the sum.
        return None if weight is not None and np.isfinite(weight).all() else "its weight is not constant and finite"
    if len(node.inputs) > 2 and not node.inputs[2].is_empty():
        zero_point = g.constant(node.inputs[2], 1)
        return None if zero_point is not None and not zero_point.any() else "its zero point may not be 0"
    return None


def _obstacle_of_pool(g: Rewriter, node: gs.Node, padding: _Padding) -> str | None:
    own = [int(amount) for amount in node.attrs.get("pads") or [0] * len(padding.amounts)]
    kernel = [int(size) for size in node.attrs["kernel_shape"]]
    if node.attrs.get("ceil_mode", 0):
        return "its last window may lie outside of what is padded (ceil_mode)"
    if any(int(step) != 1 for step in node.attrs.get("dilations") or ()):
        return "its windows may lie in the padding alone (dilations)"
    if any(mine + added >= size for mine, added, size in zip(own, padding.amounts, kernel * 2, strict=True)):
        return "its windows may lie in the padding alone"
    if node.op == "AveragePool":
        if g.opset(node) < 7:
            return "before opset 7 an AveragePool never counts padding"
        if any(own) and not node.attrs.get("count_include_pad", 0):
            return "it does not count its own padding"
        return None if padding.value == 0 else f"the Pad adds {padding.value:g}, not zeros"
    if len(node.outputs) > 1 and not g.is_unused(node.outputs[1]):
        return "its indices are read"
    if padding.value != -np.inf or g.dtype(node.inputs[0]) not in (np.float32, np.float64):
        return f"the Pad adds {padding.value:g}, which may be the largest of a window"
    shape = g.shape(node.inputs[0])
    sizes = [] if shape is None else shape[2:]
    roomy = len(sizes) == len(kernel) and all(
        isinstance(size, int) and size >= window for size, window in zip(sizes, kernel, strict=True)
    )
    return None if roomy else "its input may be smaller than a window"


PAD_RULES: tuple[Rule, ...] = (_pad,)
