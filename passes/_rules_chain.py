"""Rules that make one node of two that follow each other."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxslim.passes._rewriter import Rewriter
from onnxslim.passes._rules import Rule, rule

__all__ = ["CHAIN_RULES", "is_exact_cast"]


@rule("fuse-transposes", "Transpose")
def _transpose_transpose(g: Rewriter, node: gs.Node) -> str | None:
    """Transpose(Transpose(x, p), q) -> Transpose(x, p[q]), or x when p[q] leaves the axes in order."""
    inner = g.producer(node.inputs[0], "Transpose")
    if inner is None or not g.is_visible(g.scope(node), inner.inputs[0]):
        return None
    perm, inner_perm = _perm(g, node), _perm(g, inner)
    if perm is None or inner_perm is None or len(perm) != len(inner_perm):
        return None
    both = [inner_perm[axis] for axis in perm]
    if both == list(range(len(both))) and g.bypass(node, inner.inputs[0]):
        return "dropped Transpose: it undoes the one before it"
    g.set_input(node, 0, inner.inputs[0])
    node.attrs = {**node.attrs, "perm": both}
    return f"fused with the Transpose before it into {both}"


def _perm(g: Rewriter, node: gs.Node) -> list[int] | None:
    perm = node.attrs.get("perm")
    if perm is not None:
        return [int(axis) for axis in perm]
    rank = g.rank(node.inputs[0])
    return None if rank is None else list(range(rank))[::-1]


@rule("fuse-casts", "Cast", since=9)
def _cast_cast(g: Rewriter, node: gs.Node) -> str | None:
    """Cast(Cast(x: A, B), C) -> Cast(x, C) where B holds every value of A, so that only the second one can round.

    Where C is an integer type and A is not, values that do not fit C come out differently from A and from B in some
    runtimes; then not.
    """
    inner = g.producer(node.inputs[0], "Cast")
    if inner is None or not g.is_visible(g.scope(node), inner.inputs[0]):
        return None
    first = g.dtype(inner.inputs[0])
    if first is None:
        return None
    try:
        second = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(inner.attrs["to"]))
        third = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(node.attrs["to"]))
    except KeyError:
        return None
    if not is_exact_cast(first, second) or third.kind not in "fiub":
        return None
    if third.kind in "iu" and not (first.kind == "b" or (first.kind in "iu" and second.kind in "iu")):
        return None
    g.set_input(node, 0, inner.inputs[0])
    return f"reads the {first} before its Cast to {second}"


def is_exact_cast(source: np.dtype, target: np.dtype) -> bool:
    """Whether ``target`` holds every value of ``source``; only for the common types, bool taken as 0 and 1."""
    if source.kind not in "fiub" or target.kind not in "fiub":
        return False
    if target.kind == "b":
        return source.kind == "b"
    if source.kind in "iu" and source.itemsize == 8 and target.kind == "f":
        return False  # NumPy calls it safe, and a double holds 53 bits
    return bool(np.can_cast(source, target, casting="safe"))


CHAIN_RULES: tuple[Rule, ...] = (_transpose_transpose, _cast_cast)
