"""Activations that are spelled out, as the standard operators that mean them.

    Gelu                x / 2 * (1 + erf(x / sqrt(2)))                              since opset 20
    Gelu (tanh)         x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))
    HardSigmoid         clip(a x + b, 0, 1), and clip(x + 3, 0, 6) / 6              since opset 6
    HardSwish           x * HardSigmoid(x) with a = 1 / 6, b = 1 / 2                since opset 14
    Mish                x * tanh(softplus(x))                                       since opset 18

Each treats NaN, infinities and zeros as the spelled-out form does. Swish (opset 24) is left spelled out: compilers lack
it. log(1 + exp(x)) is not made Softplus: it overflows where Softplus does not.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.passes._match import FLOATS, Product, addends, inner, is_near, only_read_by, product, readable, scalar
from onnxslim.passes._rewriter import Rewriter
from onnxslim.passes._rules import Rule, rule

__all__ = ["ACTIVATION_RULES", "bounds", "hard_swish_as_product"]


@rule("fuse-gelu", "Mul", "Div", since=20)
def _gelu(g: Rewriter, node: gs.Node) -> str | None:
    """x * (1 + erf(x / sqrt(2))) / 2 -> Gelu(x), factors in any order; the form with tanh too."""
    whole = product(g, node)
    if len(whole.terms) != 2 or not is_near(whole.factor, 0.5) or g.dtype(node.outputs[0]) not in FLOATS:
        return None
    for x, gate in (whole.terms, whole.terms[::-1]):
        plus_one = _inner_of(g, gate, whole, "Add")
        parts = None if plus_one is None else addends(g, plus_one)
        if plus_one is None or parts is None or parts[1] != 1.0:
            continue
        curve = inner(g, parts[0], plus_one, "Erf", "Tanh")
        if curve is None:
            continue
        if curve.op == "Erf" and _is_multiple(g, curve.inputs[0], curve, x, math.sqrt(0.5)):
            attrs = {}
        elif curve.op == "Tanh" and _is_cubic(g, curve, x):
            attrs = {"approximate": "tanh"}
        else:
            continue
        if not readable(g, node, x):
            return None
        g.rewrite(node, "Gelu", attrs, [x])
        return f"{curve.op} and what is around it are a Gelu"
    return None


def _inner_of(g: Rewriter, tensor: gs.Tensor, whole: Product, *ops: str) -> gs.Node | None:
    """The node that makes a factor which only the product reads."""
    node = g.producer(tensor, *ops)
    if node is None or len(tensor.outputs) != 1 or not only_read_by(g, tensor, whole.nodes):
        return None
    return node if g.scope(node) is g.scope(whole.nodes[0]) else None


def _is_multiple(g: Rewriter, tensor: gs.Tensor, user: gs.Node, x: gs.Tensor, factor: float) -> bool:
    """Whether a tensor which ``user`` alone reads is ``factor * x``."""
    node = inner(g, tensor, user, "Mul", "Div")
    if node is None:
        return False
    parts = product(g, node)
    return len(parts.terms) == 1 and parts.terms[0] is x and is_near(parts.factor, factor)


def _is_cubic(g: Rewriter, tanh: gs.Node, x: gs.Tensor) -> bool:
    """Whether Tanh is of sqrt(2 / pi) * (x + 0.044715 x^3), or of sqrt(2 / pi) * x * (1 + 0.044715 x^2)."""
    node = inner(g, tanh.inputs[0], tanh, "Mul", "Div")
    if node is None:
        return False
    parts = product(g, node)
    if not is_near(parts.factor, math.sqrt(2 / math.pi)):
        return False
    if len(parts.terms) == 1:
        total = _inner_of(g, parts.terms[0], parts, "Add")
        if total is None or len(total.inputs) != 2:
            return False
        other = next((t for t, u in (total.inputs, total.inputs[::-1]) if u is x and t is not x), None)
        return other is not None and _is_power(g, other, total, x, 3)
    if len(parts.terms) != 2 or not any(term is x for term in parts.terms):
        return False
    gate = next((term for term in parts.terms if term is not x), x)
    total = _inner_of(g, gate, parts, "Add")
    one_plus = None if total is None else addends(g, total)
    return total is not None and one_plus is not None and one_plus[1] == 1.0 and _is_power(g, one_plus[0], total, x, 2)


def _is_power(g: Rewriter, tensor: gs.Tensor, user: gs.Node, x: gs.Tensor, exponent: int) -> bool:
    """Whether a tensor which ``user`` alone reads is 0.044715 x^exponent."""
    node = inner(g, tensor, user, "Mul", "Div")
    if node is None:
        return False
    parts = product(g, node)
    left = exponent
    for term in parts.terms:
        if term is x:
            left -= 1
            continue
        power = g.producer(term, "Pow", "Mul")
        if power is None or not only_read_by(g, term, parts.nodes) or power.inputs[0] is not x:
            return False
        squared = power.op == "Mul" and power.inputs[1] is x
        taken = 2.0 if squared else scalar(g, power.inputs[1], x)
        if taken not in (2.0, 3.0) or (power.op == "Mul" and not squared):
            return False
        left -= int(taken)
    return left == 0 and is_near(parts.factor, 0.044715)


# ----------------------------------------------------------------------------------------------------- piecewise linear


def bounds(g: Rewriter, node: gs.Node) -> tuple[float, float] | None:
    """The two finite constants that a Clip keeps its input between, in either of its forms."""
    if node.op != "Clip":
        return None
    low: float | None
    high: float | None
    if g.opset(node) < 11:
        low, high = node.attrs.get("min"), node.attrs.get("max")
    else:
        given = [*node.inputs[1:3], None, None][:2]
        low, high = (None if each is None or each.is_empty() else scalar(g, each) for each in given)
    if low is None or high is None or not np.isfinite([low, high]).all():
        return None
    return float(low), float(high)


def _line(g: Rewriter, tensor: gs.Tensor, user: gs.Node) -> tuple[gs.Tensor, float, float] | None:
    """A tensor which ``user`` alone reads as a * x + b."""
    node = inner(g, tensor, user, "Add", "Sub")
    parts = None if node is None else addends(g, node)
    if node is None or parts is None:
        return None
    scaled = inner(g, parts[0], node, "Mul", "Div")
    if scaled is not None:
        factors = product(g, scaled)
        if len(factors.terms) == 1 and len(factors.nodes) == 1:
            return factors.terms[0], factors.factor, parts[1]
    return parts[0], 1.0, parts[1]


@rule("fuse-hard-sigmoid", "Clip", "Mul", "Div", since=6)
def _hard_sigmoid(g: Rewriter, node: gs.Node) -> str | None:
    """clip(a x + b, 0, c) / c -> HardSigmoid(x, a / c, b / c), the quotient left out where c is 1."""
    clip, scale = node, 1.0
    if node.op != "Clip":
        whole = product(g, node)
        found = None if len(whole.terms) != 1 else _inner_of(g, whole.terms[0], whole, "Clip")
        if found is None:
            return None
        clip, scale = found, whole.factor
    limits = bounds(g, clip)
    line = _line(g, clip.inputs[0], clip)
    if limits is None or line is None or g.dtype(clip.inputs[0]) != np.float32:
        return None
    x, slope, offset = line
    if limits[0] != 0.0 or not is_near(limits[1] * scale, 1.0) or not slope or not readable(g, node, x):
        return None
    g.rewrite(node, "HardSigmoid", {"alpha": slope * scale, "beta": offset * scale}, [x])
    return f"the {clip.op} and what is around it are a HardSigmoid"


@rule("fuse-hard-swish", "Mul", "Div", since=6)
def _hard_swish(g: Rewriter, node: gs.Node) -> str | None:
    """x * clip(x + 3, 0, 6) / 6 and x * HardSigmoid(x, 1 / 6, 1 / 2) -> HardSwish(x); before opset 14 the latter."""
    whole = product(g, node)
    if len(whole.terms) != 2 or g.dtype(node.outputs[0]) != np.float32:
        return None
    for x, gate in (whole.terms, whole.terms[::-1]):
        inside = _inner_of(g, gate, whole, "Clip", "HardSigmoid")
        if inside is None or not readable(g, node, x):
            continue
        if inside.op == "HardSigmoid":
            alpha, beta = (float(inside.attrs.get(k, default)) for k, default in (("alpha", 0.2), ("beta", 0.5)))
            source = inside.inputs[0]
            matched = is_near(alpha, 1 / 6) and is_near(beta, 0.5) and is_near(whole.factor, 1.0)
        else:
            line = _line(g, inside.inputs[0], inside)
            matched = bounds(g, inside) == (0.0, 6.0) and line is not None and line[1:] == (1.0, 3.0)
            matched = matched and is_near(whole.factor, 1 / 6)
            source = inside.inputs[0] if line is None else line[0]
        if not matched or source is not x:
            continue
        if g.opset(node) >= 14:
            g.rewrite(node, "HardSwish", {}, [x])
            return f"the {inside.op} and what is around it are a HardSwish"
        if inside.op == "Clip":
            gated = g.insert_before(node, "HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}, [x])
            g.rewrite(node, "Mul", {}, [x, gated])
            return "the Clip and what is around it are a HardSigmoid"
    return None


@rule("hard-swish-as-product", "HardSwish")
def hard_swish_as_product(g: Rewriter, node: gs.Node) -> str | None:
    """HardSwish(x) -> x * HardSigmoid(x, 1 / 6, 1 / 2), which is how ONNX Runtime runs it, and which runs on codes."""
    (x,) = node.inputs
    if g.dtype(x) != np.float32:
        return None
    g.rewrite(node, "Mul", {}, [x, g.insert_before(node, "HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}, [x])])
    return "a product with a HardSigmoid"


@rule("fuse-mish", "Mul", since=18)
def _mish(g: Rewriter, node: gs.Node) -> str | None:
    """x * tanh(softplus(x)) -> Mish(x)."""
    if len(node.inputs) != 2 or g.dtype(node.outputs[0]) not in FLOATS:
        return None
    for x, gate in (node.inputs, node.inputs[::-1]):
        tanh = inner(g, gate, node, "Tanh")
        softplus = None if tanh is None else inner(g, tanh.inputs[0], tanh, "Softplus")
        if softplus is not None and softplus.inputs[0] is x:
            g.rewrite(node, "Mish", {}, [x])
            return "Softplus, Tanh and the product are a Mish"
    return None


ACTIVATION_RULES: tuple[Rule, ...] = (_gelu, _hard_swish, _hard_sigmoid, _mish)
