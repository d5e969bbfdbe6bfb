"""Mul, Div, Add and Sub of constants folded into the weights of the layers around them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.passes._linear import (
    LAYERS,
    Affine,
    Layer,
    input_channels,
    layer_before,
    layer_of,
    per_channel,
)
from onnxslim.passes._match import FLOATS, addends, inner, scalar, with_constant
from onnxslim.passes._reweight import input_edit, output_edit
from onnxslim.passes._rewriter import Rewriter
from onnxslim.passes._rules import Refused, Rule, rule
from onnxslim.passes._rules_constants import narrow_constant, scale_and_shift

__all__ = ["AFFINE_RULES", "fold_affine"]

# What only moves numbers about: a factor may be applied before or behind it.
_VIEWS = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "DepthToSpace", "SpaceToDepth")
_MOST_SPREAD = (
    64  # between factors of channels that a weight takes: what quantizes it later has one step for all of them
)
_COPY_LIMIT = 1024


@rule("fold-affine", "Mul", "Div", "Add", "Sub", since=7)
def fold_affine(g: Rewriter, node: gs.Node) -> str | Refused | None:
    """A constant that scales or shifts the channels of a Conv, ConvTranspose, Gemm or MatMul goes into its weights."""
    binary = with_constant(g, node)
    if binary is None or binary.value.dtype not in FLOATS or inner(g, binary.x, node, *LAYERS, "Add") is None:
        return None
    layer = layer_before(g, binary.x, node)
    if isinstance(layer, Refused):
        return None  # an Add of other things, or a product of two activations
    parts = scale_and_shift(node, binary)
    if parts is None:
        return None
    if parts[1] is not None and layer.node.op == "MatMul" and layer.adder is layer.node:
        return None  # that Add is the bias
    if per_channel(binary.value, layer) is None:
        return Refused(f"its constant {list(binary.value.shape)} is not one number a channel of the {layer.node.op}")
    scale, shift = (None if part is None else part.reshape(-1) for part in parts)
    if not all(part is None or np.isfinite(part).all() for part in (scale, shift)):
        return Refused("its constant is not finite")
    if not g.can_replace(node.outputs[0], binary.x):
        return Refused("its output cannot take the place of its input")
    edit = output_edit(g, layer, Affine(scale, shift), freed=binary.value.nbytes)
    if isinstance(edit, Refused):
        return edit
    edit.apply(g)
    g.bypass(node, binary.x)
    return f"folded into the {layer.node.op} {layer.node.name}"


@rule("fold-affine-forward", *LAYERS, since=7)
def _into_layer_behind(g: Rewriter, node: gs.Node) -> str | Refused | None:
    """A constant that scales or shifts what only one layer reads goes into the weights of that layer."""
    before = inner(g, node.inputs[0], node, "Mul", "Div", "Add", "Sub")
    binary = None if before is None else with_constant(g, before)
    layer = layer_of(g, node)
    if before is None or binary is None or layer is None or binary.value.dtype not in FLOATS:
        return None
    if g.constant(node.inputs[1]) is None:
        return None
    parts = scale_and_shift(before, binary)
    if parts is None:
        return None
    channels = input_channels(g, node, binary.value, binary.x)
    if isinstance(channels, Refused):
        return channels
    scale, shift = (None if part is None else part.reshape(-1) for part in parts)
    if not all(part is None or np.isfinite(part).all() for part in (scale, shift)):
        return Refused("its constant is not finite")
    if scale is not None and _spread(scale) > _MOST_SPREAD:
        return Refused(f"its factors differ by more than {_MOST_SPREAD} times: 8 or 16 bits would not hold the weight")
    edit = input_edit(g, layer, Affine(scale, shift), binary.x)
    if not isinstance(edit, Refused):
        edit.apply(g)
        return f"took the {before.op} {before.name} before it into its weight"
    moved = None if shift is None or scale is not None else _scale_past_shift(g, node, layer, before)
    return edit if moved is None else moved


def _spread(factors: np.ndarray) -> float:
    """How many times the largest factor is the smallest, zeros aside."""
    sizes = np.abs(factors[factors != 0])
    return float(sizes.max() / sizes.min()) if sizes.size else 1.0


def _scale_past_shift(g: Rewriter, node: gs.Node, layer: Layer, add: gs.Node) -> str | None:
    """W (s x + t) -> (W s) (x + t / s), where W cannot take t: padding stays zero under a factor."""
    shift = with_constant(g, add)
    before = None if shift is None else inner(g, shift.x, add, "Mul", "Div")
    factor = None if before is None else with_constant(g, before)
    if shift is None or before is None or factor is None or add.op != "Add":
        return None
    parts = scale_and_shift(before, factor)
    if parts is None or parts[0] is None or not parts[0].all() or factor.value.dtype != shift.value.dtype:
        return None
    channels = input_channels(g, node, factor.value, factor.x)
    quotient = shift.value.astype(np.float64) / parts[0]
    value = narrow_constant(quotient, shift.value.dtype, strict=False)
    if isinstance(channels, Refused) or isinstance(value, Refused) or value.size > shift.value.size:
        return None
    if len(shift.constant.outputs) > 1 and value.nbytes > _COPY_LIMIT:
        return None
    edit = input_edit(g, layer, Affine(parts[0].reshape(-1), None), node.inputs[0])
    if isinstance(edit, Refused):
        return None
    edit.apply(g)
    g.set_input(add, shift.at, g.make_constant(g.scope(add), shift.constant.name, value))
    g.set_input(add, 1 - shift.at, factor.x)
    return f"took the {before.op} {before.name} into its weight, past the Add {add.name}"


@rule("fold-erf-scale", *LAYERS, since=9)
def _through_erf_gate(g: Rewriter, node: gs.Node) -> str | None:
    """L(x (1 + erf(c x))), x made by a layer K:  with K' = c K it is  L'(x' (1 + erf(x')))  with  L' = L / c.

    This is Gelu where opset 20 is not there to say so, its factor 1 / 2 already in L.
    """
    gated = inner(g, node.inputs[0], node, "Mul")
    behind = None if gated is None or g.constant(node.inputs[1]) is None else layer_of(g, node)
    if gated is None or behind is None:
        return None
    for x, gate in (gated.inputs, gated.inputs[::-1]):
        plus = inner(g, gate, gated, "Add")
        parts = None if plus is None else addends(g, plus)
        erf = None if plus is None or parts is None or parts[1] != 1.0 else inner(g, parts[0], plus, "Erf")
        scaled = None if erf is None else inner(g, erf.inputs[0], erf, "Mul", "Div")
        found = None if scaled is None else _factor(g, scaled)
        if erf is None or scaled is None or found is None or found[0] is not x:
            continue
        before = layer_before(g, x, gated, scaled)
        if isinstance(before, Refused) or g.constant(before.node.inputs[1]) is None:
            continue
        taken = output_edit(g, before, Affine(np.full(1, found[1]), None))
        given = input_edit(g, behind, Affine(np.full(1, 1 / found[1]), None), gated.outputs[0])
        if isinstance(taken, Refused) or isinstance(given, Refused):
            continue
        taken.apply(g)
        given.apply(g)
        g.set_input(erf, 0, before.result)
        return f"the factor of {scaled.name} went into the {before.node.op} {before.node.name} and out of this one"
    return None


# ------------------------------------------------------------------------------------------------------------- factors


@dataclass(frozen=True)
class _Taker:
    """Who can take a factor: a layer, or the constant of a Mul or Div."""

    layer: Layer | None
    node: gs.Node


@rule("move-scale", "Mul", "Div", since=7)
def _behind_views(g: Rewriter, node: gs.Node) -> str | Refused | None:
    """c * view(layer(x)) -> view(layer'(x)): a single factor moves through views and products to who can take it."""
    found = _factor(g, node)
    if found is None:
        return None
    x, factor = found
    # Where the taker is right in front, `fold-affine` and `combine-constants` see to it.
    taker = _taker(g, x, node) if inner(g, x, node, "MatMul", *_VIEWS) is not None else None
    if taker is None or not g.can_replace(node.outputs[0], x):
        return None
    why = _apply(g, taker, factor)
    if why is not None:
        return why
    g.bypass(node, x)
    return f"taken up by the {taker.node.op} {taker.node.name}"


@rule("move-scale", "MatMul", since=7)
def _across_product(g: Rewriter, node: gs.Node) -> str | Refused | None:
    """(a * c) @ (b * d) -> (a * (c d)) @ b: the factor of one side goes to who can take it on the other."""
    for side in (0, 1):
        before = inner(g, node.inputs[side], node, "Mul", "Div")
        found = None if before is None else _factor(g, before)
        taker = _taker(g, node.inputs[1 - side], node)
        if before is None or found is None or taker is None or not g.is_visible(g.scope(node), found[0]):
            continue
        why = _apply(g, taker, found[1])
        if why is not None:
            return why
        g.set_input(node, side, found[0])
        return f"the factor of {before.name} was taken up by the {taker.node.op} {taker.node.name}"
    return None


def _factor(g: Rewriter, node: gs.Node) -> tuple[gs.Tensor, float] | None:
    """The operand and the one finite factor of a Mul or Div of floats."""
    binary = with_constant(g, node)
    if binary is None or binary.value.dtype not in FLOATS or (node.op == "Div" and binary.at == 0):
        return None
    number = scalar(g, binary.constant, binary.x)
    if not number or not np.isfinite(number):
        return None
    return binary.x, number if node.op == "Mul" else 1 / number


def _taker(g: Rewriter, tensor: gs.Tensor, user: gs.Node) -> _Taker | None:
    """Who can take a factor of a tensor which ``user`` alone reads, through views and products of two activations."""
    before = inner(g, tensor, user)
    if before is None:
        return None
    if before.op in _VIEWS:
        return _taker(g, before.inputs[0], before)
    if before.op in ("Mul", "Div"):
        binary = with_constant(g, before)
        return None if binary is None or binary.value.dtype not in FLOATS else _Taker(None, before)
    layer = layer_before(g, tensor, user)
    if isinstance(layer, Layer) and g.constant(layer.node.inputs[1]) is not None:
        return _Taker(layer, layer.node)
    if before.op == "MatMul":
        return _taker(g, before.inputs[0], before) or _taker(g, before.inputs[1], before)
    return None


def _apply(g: Rewriter, taker: _Taker, factor: float) -> Refused | None:
    if taker.layer is not None:
        edit = output_edit(g, taker.layer, Affine(np.full(1, factor), None))
        if isinstance(edit, Refused):
            return edit
        edit.apply(g)
        return None
    node = taker.node
    binary = with_constant(g, node)
    assert binary is not None
    divides = node.op == "Div" and binary.at == 1
    wide = binary.value.astype(np.float64)
    value = narrow_constant(wide / factor if divides else wide * factor, binary.value.dtype)
    if isinstance(value, Refused):
        return value
    if len(binary.constant.outputs) > 1 and value.nbytes > _COPY_LIMIT:
        return Refused(f"the constant {binary.constant.name!r} is read elsewhere too and is too large to copy")
    g.set_input(node, binary.at, g.make_constant(g.scope(node), binary.constant.name, value))
    return None


AFFINE_RULES: tuple[Rule, ...] = (
    fold_affine,
    _into_layer_behind,
    _through_erf_gate,
    _behind_views,
    _across_product,
)
