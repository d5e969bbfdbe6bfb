"""Rules about operators that only say how the same elements in the same order are shaped."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.passes._rewriter import Rewriter
from onnxslim.passes._rules import Rule, rule
from onnxslim.passes._rules_shape import reshape_target

__all__ = ["VIEW_RULES"]

_VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


@rule("fuse-views", *_VIEWS, "Transpose", since=5)
def _view_of_view(g: Rewriter, node: gs.Node) -> str | None:
    """view(view(x)) -> Reshape(x, constant), where one constant gives that shape for every input.

    A Transpose that moves only axes of size 1 is such a view too.
    """
    if not _is_view(g, node):
        return None
    inner = g.producer(node.inputs[0], *_VIEWS, "Transpose")
    if inner is None or not _is_view(g, inner) or not g.is_visible(g.scope(node), inner.inputs[0]):
        return None
    source, name, op = inner.inputs[0], node.outputs[0].name, inner.op
    target = reshape_target(g.shape(source), g.shape(node.outputs[0]))
    if target is None:
        return None
    shape = g.make_constant(g.scope(node), f"{name}_shape", np.array(target, np.int64))
    g.rewrite(node, "Reshape", {}, [source, shape])
    return f"fused with the {op} before it into a Reshape to {target}"


def _is_view(g: Rewriter, node: gs.Node) -> bool:
    if node.op != "Transpose":
        return True
    shape = g.shape(node.inputs[0])
    if shape is None:
        return False
    perm = node.attrs.get("perm") or list(range(len(shape)))[::-1]
    moved = [axis for axis in perm if shape[axis] != 1]
    return moved == sorted(moved)


@rule("fuse-reshapes", "Reshape", since=5)
def _reshape_view(g: Rewriter, node: gs.Node) -> str | None:
    """Reshape(view(x), s) -> Reshape(x, s), unless s holds a 0 that means "as in the view"."""
    inner = g.producer(node.inputs[0], *_VIEWS)
    if inner is None or not g.is_visible(g.scope(node), inner.inputs[0]):
        return None
    target = g.integers(node, 1)
    if not target or (0 in target and not node.attrs.get("allowzero", 0)):
        return None
    g.set_input(node, 0, inner.inputs[0])
    return f"reads what the {inner.op} before it reads"


@rule("fuse-axes", "Squeeze", "Unsqueeze")
def _same_twice(g: Rewriter, node: gs.Node) -> str | None:
    """Unsqueeze(Unsqueeze(x, a), b) -> Unsqueeze(x, both), and so for Squeeze, by explicit axes.

    An axis of the one before it is counted on as the one behind it leaves it.
    """
    inner = g.producer(node.inputs[0], node.op)
    if inner is None or not g.is_visible(g.scope(node), inner.inputs[0]):
        return None
    outer_axes, inner_axes = g.integers(node, 1, "axes"), g.integers(inner, 1, "axes")
    rank = g.rank(inner.inputs[0])
    if not outer_axes or not inner_axes or rank is None:
        return None
    combine = _inserted if node.op == "Unsqueeze" else _removed
    axes = combine(rank, inner_axes, outer_axes)
    if "axes" in node.attrs:
        g.set_attributes(node, axes=axes)
    else:
        g.set_input(node, 1, g.make_constant(g.scope(node), f"{node.outputs[0].name}_axes", np.array(axes, np.int64)))
    g.set_input(node, 0, inner.inputs[0])
    return f"fused with the {node.op} before it into axes {axes}"


def _inserted(rank: int, first: list[int], second: list[int]) -> list[int]:
    """The axes of the final shape that neither of two Unsqueezes found there."""
    middle = rank + len(first)
    new = {axis % middle for axis in first}
    axes = [axis in new for axis in range(middle)]
    final = middle + len(second)
    places = {axis % final for axis in second}
    rest = iter(axes)
    return [axis for axis in range(final) if axis in places or next(rest)]


def _removed(rank: int, first: list[int], second: list[int]) -> list[int]:
    """The axes of the first shape that either of two Squeezes drops."""
    gone = {axis % rank for axis in first}
    left = [axis for axis in range(rank) if axis not in gone]
    return sorted(gone | {left[axis % len(left)] for axis in second})


@rule("move-view", *_VIEWS, since=5)
def _view_before_norm(g: Rewriter, node: gs.Node) -> str | None:
    """view(f(view(x))) -> f(view(view(x))) for an f along the last axis, which neither view touches: the views fuse."""
    inner = g.producer(node.inputs[0], "LayerNormalization", "Softmax", "LogSoftmax")
    before, after = g.shape(node.inputs[0]), g.shape(node.outputs[0])
    if inner is None or not g.is_sole_user(node, node.inputs[0]) or not before or not after or before[-1] != after[-1]:
        return None
    version, axis = g.opset(inner), inner.attrs.get("axis", -1)
    if axis not in (-1, len(before) - 1) or (inner.op != "LayerNormalization" and version < 13):
        return None
    if any(not g.is_unused(tensor) for tensor in inner.outputs[1:]):
        return None
    if any((g.rank(tensor) or 0) > 1 for tensor in inner.inputs[1:]):
        return None  # a scale that is broadcast along other axes as well
    first = g.producer(inner.inputs[0], *_VIEWS, "Transpose")
    if first is None or not _is_view(g, first) or not g.is_sole_user(inner, inner.inputs[0]):
        return None
    target = reshape_target(g.shape(first.inputs[0]), after)
    if target is None or g.scope(inner) is not g.scope(node) or g.scope(first) is not g.scope(node):
        return None
    shape = g.make_constant(g.scope(node), f"{node.outputs[0].name}_shape", np.array(target, np.int64))
    moved = g.insert_before(inner, "Reshape", {}, [first.inputs[0], shape])
    g.rewrite(node, inner.op, {**inner.attrs, "axis": -1}, [moved, *inner.inputs[1:]])
    return f"moved before the {node.op}"


VIEW_RULES: tuple[Rule, ...] = (_same_twice, _view_of_view, _reshape_view, _view_before_norm)
