"""Bounds that one tensor meets one after the other, as one Clip.

Bounds are finite on both sides: ONNX Runtime takes a missing one for the largest number, which infinity is not. NaN
passes through Clip, Relu, Min and Max alike. Max(-0, 0) is 0 where Clip(-0, 0, ...) is -0, so that Max with zero stays.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.passes._match import FLOATS, inner, readable, scalar, with_constant
from onnxslim.passes._rewriter import Rewriter
from onnxslim.passes._rules import Refused, Rule, rule
from onnxslim.passes._rules_activation import bounds

__all__ = ["CLIP_RULES"]


@rule("fuse-clips", "Clip", "Relu", since=6)
def _clip_clip(g: Rewriter, node: gs.Node) -> str | None:
    """Clip(Clip(x, a, b), c, d) -> Clip(x, e, f), either of which may be a Relu, but not both."""
    before = inner(g, node.inputs[0], node, "Clip", "Relu")
    if before is None or not readable(g, node, before.inputs[0]):
        return None
    inside, outside = _interval(g, before), _interval(g, node)
    if inside is None or outside is None:
        return None
    low, high = (_clamp(bound, outside) for bound in inside)
    if low == high == 0:
        return None  # always 0, where Clip(-0, 0, 0) is -0
    if not np.isfinite([low, high]).all() or not _write_clip(g, node, before.inputs[0], low, high):
        return None
    return f"merged with the {before.op} before it into one Clip"


def _interval(g: Rewriter, node: gs.Node) -> tuple[float, float] | None:
    """Between which numbers a Relu or Clip keeps what it reads."""
    found = (0.0, np.inf) if node.op == "Relu" else bounds(g, node)
    return None if found is None or found[0] > found[1] else found


def _clamp(value: float, interval: tuple[float, float]) -> float:
    low, high = interval
    return low if value < low else high if value > high else value


@rule("fuse-min-max", "Min", "Max", since=11)
def _min_max(g: Rewriter, node: gs.Node) -> str | Refused | None:
    """Min(Max(x, a), b), Max(Min(x, b), a) and Min(Relu(x), b) -> Clip(x, a, b) for finite a <= b."""
    outer = with_constant(g, node)
    ops = ("Max", "Relu") if node.op == "Min" else ("Min",)
    before = None if outer is None else inner(g, outer.x, node, *ops)
    if outer is None or before is None or outer.value.dtype not in FLOATS:
        return None
    source, first = before.inputs[0], 0.0
    if before.op != "Relu":
        binary = with_constant(g, before)
        number = None if binary is None else scalar(g, binary.constant, binary.x)
        if binary is None or number is None:
            return None
        source, first = binary.x, number
        if first == 0:
            return Refused(f"{before.op} may turn -0 into 0, which Clip keeps")
    second = scalar(g, outer.constant, outer.x)
    if second is None:
        return None
    low, high = (first, second) if node.op == "Min" else (second, first)
    if not np.isfinite([low, high]).all() or low > high or not readable(g, node, source):
        return Refused("its bounds are not finite or not in order")
    if second == 0:
        return Refused(f"{node.op} may turn -0 into 0, which Clip keeps")
    if not _write_clip(g, node, source, low, high):
        return None
    return f"fused with the {before.op} before it into a Clip"


def _write_clip(g: Rewriter, node: gs.Node, source: gs.Tensor, low: float, high: float) -> bool:
    dtype = g.dtype(node.inputs[0])
    if dtype is None or dtype.kind != "f":
        return False
    if g.opset(node) < 11:
        g.rewrite(node, "Clip", {"min": low, "max": high}, [source])
        return True
    limits = [g.make_constant(g.scope(node), f"{node.outputs[0].name}_bound", np.array(x, dtype)) for x in (low, high)]
    g.rewrite(node, "Clip", {}, [source, *limits])
    return True


CLIP_RULES: tuple[Rule, ...] = (_clip_clip, _min_max)
