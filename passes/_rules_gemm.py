"""Matrix products, the vectors added to them and the transposes in front of them as one Gemm, and the way back.

A Gemm adds its third input by broadcasting in one direction only: what it makes is always [rows, columns].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim.passes._match import FLOATS, inner, readable
from onnxslim.passes._rewriter import Rewriter
from onnxslim.passes._rules import Refused, Rule, rule

__all__ = ["GEMM_RULES", "product_as_gemm"]

# A matrix is stored transposed anew only where nobody else reads it, or it is at most this large.
_COPY_LIMIT = 16 * 1024


@rule("fuse-gemm", "Add", since=7)
def _matmul_add(g: Rewriter, node: gs.Node) -> str | Refused | None:
    """MatMul(a, b) + c -> Gemm(a, b, c) for matrices a, b and a vector c of the columns."""
    for side in (0, 1):
        product = inner(g, node.inputs[side], node, "MatMul")
        if product is None or len(node.inputs) != 2:
            continue
        left, right = product.inputs
        weight = g.constant(right)
        if g.rank(left) != 2 or weight is None or weight.ndim != 2 or weight.dtype not in FLOATS:
            return None
        bias = node.inputs[1 - side]
        shape = g.shape(bias)
        if shape is None or not _is_row(shape, weight.shape[1]):
            return Refused("what it adds is not a vector of the columns of the MatMul")
        if not readable(g, node, left, right, bias):
            return None
        g.rewrite(node, "Gemm", {}, [left, right, bias])
        return f"fused with the MatMul {product.name} into a Gemm"
    return None


def _is_row(shape: Sequence[object] | None, columns: int) -> bool:
    return shape in ([], [1], [columns], [1, 1], [1, columns])


@rule("fuse-gemm-add", "Add", since=7)
def _gemm_add(g: Rewriter, node: gs.Node) -> str | Refused | None:
    """Gemm(a, b) + d -> Gemm(a, b, d) for a vector d of the columns; a constant d is added to a constant c.

    A constant d behind a Gemm that has a bias is folded by ``fold-affine``.
    """
    for side in (0, 1):
        gemm = inner(g, node.inputs[side], node, "Gemm")
        if gemm is None or len(node.inputs) != 2:
            continue
        if len(gemm.inputs) > 2 and not gemm.inputs[2].is_empty():
            return None
        added = node.inputs[1 - side]
        shape, columns = g.shape(added), g.shape(node.inputs[side])
        if shape is None or columns is None or g.dtype(added) not in FLOATS or not isinstance(columns[-1], int):
            return None
        if not _is_row(shape, columns[-1]):
            return Refused("what it adds is not a vector of the columns of the Gemm")
        attrs = {name: value for name, value in gemm.attrs.items() if name != "beta"}
        g.rewrite(node, "Gemm", attrs, [*gemm.inputs[:2], added])
        return f"fused with the Gemm {gemm.name}, which had no bias"
    return None


@rule("fold-transpose-gemm", "Gemm", since=7)
def _transposed(g: Rewriter, node: gs.Node) -> str | None:
    """Gemm(Transpose(a), b) -> Gemm(a, b) with transA turned over, and the same for b."""
    for side, name in ((0, "transA"), (1, "transB")):
        before = inner(g, node.inputs[side], node, "Transpose")
        if before is None or list(before.attrs.get("perm") or [1, 0]) != [1, 0]:
            continue
        g.set_input(node, side, before.inputs[0])
        g.set_attributes(node, **{name: 1 - int(node.attrs.get(name, 0))})
        return f"reads what the Transpose {before.name} before it reads"
    return None


@rule("lift-gemm", "Reshape", since=13)
def _reshaped(g: Rewriter, node: gs.Node) -> str | Refused | None:
    """Reshape(Gemm(Reshape(x, [-1, k]), b, c), [..., n]) -> MatMul(x, b) + c where the axes in front are x's own.

    Three nodes become two. A MatMul between two Reshapes, three nodes, becomes one.
    """
    product = inner(g, node.inputs[0], node, "Gemm", "MatMul")
    flat = None if product is None else inner(g, product.inputs[0], product, "Reshape", "Flatten")
    if product is None or flat is None:
        return None
    weight, source = g.constant(product.inputs[1]), flat.inputs[0]
    if weight is None or weight.ndim != 2 or weight.dtype not in FLOATS:
        return None
    transposed = bool(product.attrs.get("transB", 0))
    if product.attrs.get("transA", 0) or any(float(product.attrs.get(k, 1.0)) != 1.0 for k in ("alpha", "beta")):
        return Refused("the Gemm between the Reshapes scales or transposes")
    rows, columns = weight.shape[::-1] if transposed else weight.shape
    if not _same_leading(g, source, node.outputs[0], rows, columns) or g.rank(product.inputs[0]) != 2:
        return Refused(f"the axes in front of the {product.op} may not be those that it started from")
    if transposed and len(product.inputs[1].outputs) > 1 and weight.nbytes > _COPY_LIMIT:
        return Refused(f"the weight {product.inputs[1].name!r} is read elsewhere too and is too large to copy")
    bias = product.inputs[2] if len(product.inputs) > 2 and not product.inputs[2].is_empty() else None
    if bias is not None and not _is_row(g.shape(bias), columns):
        return Refused("the Gemm between the Reshapes adds a matrix")
    matrix = product.inputs[1]
    if transposed:
        matrix = g.make_constant(g.scope(node), matrix.name, np.ascontiguousarray(weight.T))
    if bias is None:
        g.rewrite(node, "MatMul", {}, [source, matrix])
        return f"the {product.op} {product.name} works on what was reshaped for it"
    made = g.insert_before(node, "MatMul", {}, [source, matrix])
    g.rewrite(node, "Add", {}, [made, bias])
    return f"the Gemm {product.name} became a MatMul and an Add, which work on what was reshaped for it"


def _same_leading(g: Rewriter, source: gs.Tensor, result: gs.Tensor, rows: int, columns: int) -> bool:
    before, after = g.shape(source), g.shape(result)
    if before is None or after is None or len(before) != len(after) or len(before) < 2:
        return False
    if before[-1] != rows or after[-1] != columns:
        return False
    return all(size is not None and size == other for size, other in zip(before[:-1], after[:-1], strict=True))


def product_as_gemm(excluded: Callable[[gs.Node], bool], *, any_rank: bool) -> Rule:
    """MatMul(a, b) -> Gemm(a, b) for a matrix a and a constant one b, with a bias where a constant is added to it.

    ONNX Runtime makes one Gemm of a MatMul and whatever is added to it, and has none in int8 that adds a float tensor.
    Where all sizes are known it does so with a tensor of more axes too, once a vector is added, between two Reshapes;
    this rule where ``any_rank`` says so.
    """

    @rule("product-as-gemm", "MatMul", since=7)
    def apply(g: Rewriter, node: gs.Node) -> str | None:
        left, right = node.inputs
        weight, rank = g.constant(right), g.rank(left)
        if excluded(node) or rank is None or weight is None or weight.ndim != 2 or weight.dtype != np.float32:
            return None
        user = g.sole_user(node.outputs[0])
        biased = user is not None and user.op == "Add" and any(g.constant(added) is not None for added in user.inputs)
        if rank > 2 and any_rank:
            return _as_rows(g, node, user) if user is not None and biased else None
        if rank != 2:
            return None
        bias = [g.make_constant(g.scope(node), "bias", np.zeros(weight.shape[1], np.float32))] if biased else []
        g.rewrite(node, "Gemm", {}, [left, right, *bias])
        return "a product of two matrices"

    return apply


def _as_rows(g: Rewriter, node: gs.Node, user: gs.Node) -> str | None:
    """MatMul(a, b) + c -> Reshape(Gemm(Reshape(a), b, c)) for a constant row c, where all sizes of a are known."""
    left, right = node.inputs
    (product,) = node.outputs
    (added,) = (tensor for tensor in user.inputs if tensor is not product)
    sizes, made, bias = g.static_shape(left), g.static_shape(product), g.constant(added)
    if sizes is None or made is None or 0 in made or bias is None or bias.size != made[-1] or bias.shape[-1:] == (1,):
        return None
    if bias.ndim != 1:
        if g.static_shape(user.outputs[0]) != made:
            return None
        added = g.make_constant(g.scope(node), added.name, bias.reshape(-1))
    rows = g.insert_before(node, "Reshape", {}, [left, g.make_constant(g.scope(node), "rows", _ints(-1, sizes[-1]))])
    g.rewrite(node, "Gemm", {}, [rows, right, added])
    g.set_outputs(node, [None])
    node.outputs[0].name = g.model.fresh_name(f"{product.name}_rows")
    g.rewrite(user, "Reshape", {}, [node.outputs[0], g.make_constant(g.scope(user), "shape", _ints(*made))])
    return "a product of as many rows as its input has in all"


def _ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


GEMM_RULES: tuple[Rule, ...] = (_matmul_add, _gemm_add, _transposed, _reshaped)
