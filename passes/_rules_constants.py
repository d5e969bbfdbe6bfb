"""Constants that one tensor meets one after the other, computed together.

Floats are computed in float64 and rounded once, so results differ by the rounding of the operations that are left out.
Integers wrap around in both forms alike; integer division does not combine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.passes._linear import cancels
from onnxslim.passes._match import FLOATS, Binary, inner, keeps_shape, readable, with_constant
from onnxslim.passes._rewriter import Rewriter
from onnxslim.passes._rules import Refused, Rule, rule

__all__ = ["CONSTANT_RULES", "narrow_constant", "scale_and_shift"]

# A constant that others read too is computed anew when it is at most this large.
_COPY_LIMIT = 1024


@dataclass(frozen=True)
class _Step:
    """A node of two operands, one constant, as part of a chain: value o x, x o value."""

    op: str
    binary: Binary

    @property
    def value(self) -> np.ndarray:
        return self.binary.value

    @property
    def is_reversed(self) -> bool:
        """Whether it is c / x or c - x."""
        return self.binary.at == 0 and self.op in ("Div", "Sub")


@rule("combine-constants", "Mul", "Div", since=7)
def _factors(g: Rewriter, node: gs.Node) -> str | Refused | None:
    """(x * a) * b -> x * (a b), and so on for quotients: x / a * b, a / x / b, a / (x * b)."""
    steps = _two_steps(g, node, "Mul", "Div")
    if steps is None or isinstance(steps, Refused):
        return steps
    first, second = steps
    if first.value.dtype not in FLOATS:
        if {first.op, second.op} != {"Mul"} or first.value.dtype.kind not in "iu":
            return Refused(f"quotients of type {first.value.dtype} are rounded one by one")
        with np.errstate(over="ignore"):
            return _commit(g, node, "Mul", first, np.asarray(first.value * second.value), constant_first=False)
    a, b = first.value.astype(np.float64), second.value.astype(np.float64)
    if not (a.all() and b.all()):
        return Refused("one of its constants is zero")
    # first: a x^e ; second turns y into b y, y / b or b / y.
    factor, exponent = (1 / a if first.op == "Div" and not first.is_reversed else a), -1 if first.is_reversed else 1
    if second.is_reversed:
        factor, exponent = b / factor, -exponent
    else:
        factor = factor * b if second.op == "Mul" else factor / b
    divides = first.op == second.op == "Div" and not first.is_reversed and not second.is_reversed
    value = narrow_constant(1 / factor if divides else factor, first.value.dtype)
    if isinstance(value, Refused):
        return value
    op = "Div" if divides or exponent == -1 else "Mul"
    return _commit(g, node, op, first, value, constant_first=exponent == -1)


@rule("combine-constants", "Add", "Sub", since=7)
def _terms(g: Rewriter, node: gs.Node) -> str | Refused | None:
    """(x + a) + b -> x + (a + b), and so on for differences.  Not where b takes a away again, which rounds x."""
    steps = _two_steps(g, node, "Add", "Sub")
    if steps is None or isinstance(steps, Refused):
        return steps
    first, second = steps
    dtype = first.value.dtype
    if dtype not in FLOATS and dtype.kind not in "iu":
        return Refused(f"sums of type {dtype} are rounded one by one")
    wide = np.dtype(np.float64) if dtype in FLOATS else dtype
    a, b = np.atleast_1d(first.value).astype(wide), np.atleast_1d(second.value).astype(wide)
    with np.errstate(over="ignore"):
        inner_term = -a if first.op == "Sub" and not first.is_reversed else a
        negated = first.is_reversed != second.is_reversed
        outer_term = -b if second.op == "Sub" and not second.is_reversed else b
        carried = -inner_term if second.is_reversed else inner_term
        if dtype in FLOATS and cancels(carried, outer_term):
            return Refused("it takes away what was added before, which rounds what lies between")
        total = carried + outer_term
    total = total.reshape(np.broadcast_shapes(first.value.shape, second.value.shape))
    value = narrow_constant(total, dtype, strict=False)
    if isinstance(value, Refused):
        return value
    return _commit(g, node, "Sub" if negated else "Add", first, value, constant_first=negated)


@rule("combine-constants", "Mul", "Div", "Add", "Sub", since=7)
def _three(g: Rewriter, node: gs.Node) -> str | Refused | None:
    """(x * a + b) * c -> x * (a c) + b c  and  (x + a) * b + c -> x * b + (a b + c)."""
    chain: list[gs.Node] = [node]
    steps: list[Binary] = []
    while True:
        binary = with_constant(g, chain[-1])
        if binary is None or binary.value.dtype not in FLOATS or (binary.at == 0 and chain[-1].op in ("Div", "Sub")):
            return None
        steps.append(binary)
        if len(steps) == 3:
            break
        ops = ("Add", "Sub") if chain[-1].op in ("Mul", "Div") else ("Mul", "Div")
        before = inner(g, binary.x, chain[-1], *ops)
        if before is None:
            return None
        chain.append(before)
    scale, shift = np.ones(()), np.zeros(())
    for each, binary in zip(reversed(chain), reversed(steps), strict=True):
        value = binary.value.astype(np.float64)
        if each.op in ("Mul", "Div"):
            if not value.all():
                return Refused("one of its constants is zero")
            factor = value if each.op == "Mul" else 1 / value
            scale, shift = scale * factor, shift * factor
        else:
            moved = value if each.op == "Add" else -value
            if shift.any() and cancels(shift, moved):
                return Refused("it takes away what was added before, which rounds what lies between")
            shift = shift + moved
    return _commit_affine(g, node, chain, steps, scale, shift)


def _commit_affine(
    g: Rewriter, node: gs.Node, chain: list[gs.Node], steps: list[Binary], scale: np.ndarray, shift: np.ndarray
) -> str | Refused | None:
    dtype, source = steps[0].value.dtype, steps[-1].x
    values = narrow_constant(scale, dtype), narrow_constant(shift, dtype, strict=False)
    for value in values:
        if isinstance(value, Refused):
            return value
    largest = max(step.value.size for step in steps)
    copied = sum(step.value.nbytes for step in steps if len(step.constant.outputs) > 1)
    if scale.size > largest or shift.size > largest or copied > _COPY_LIMIT or not readable(g, node, source):
        return Refused("the constants of the chain would take more room than they do")
    # What the middle of the chain holds must keep its shape: the first constant may not have widened it, nor the last.
    outer, held = (steps[2], steps[1]) if node.op in ("Add", "Sub") else (steps[0], steps[2])
    wide = np.broadcast_shapes(outer.value.shape, held.value.shape) != held.value.shape
    if wide and not keeps_shape(g, source, outer.value):
        return Refused("its constant may widen what the chain starts from")
    first, second = np.asarray(values[0]), np.asarray(values[1])
    scope, names = g.scope(node), [step.constant.name for step in steps]
    if node.op in ("Add", "Sub"):
        # (x + a) * b + c: the Add is dropped, the product stays as it is.
        g.set_input(chain[1], 1 - steps[1].at, source)
        g.rewrite(node, "Add", {}, [chain[1].outputs[0], g.make_constant(scope, names[0], second)])
        return f"combined with the {chain[2].op} {chain[2].name} before the {chain[1].op}"
    product = chain[2]
    g.rewrite(product, "Mul", {}, [source, g.make_constant(scope, names[2], first)])
    g.rewrite(node, "Add", {}, [product.outputs[0], g.make_constant(scope, names[1], second)])
    return f"combined with the {product.op} {product.name} before the {chain[1].op}"


def narrow_constant(wide: np.ndarray, dtype: np.dtype, *, strict: bool = True) -> np.ndarray | Refused:
    """Round a constant once; refuse infinite ones and, with ``strict``, those below the type's full precision."""
    if wide.dtype == dtype and dtype.kind in "iu":
        return wide
    with np.errstate(over="ignore", under="ignore"):
        value = np.asarray(wide.astype(dtype))
    if not np.isfinite(value).all():
        return Refused("the constants together would overflow")
    if strict and (np.abs(wide) < np.finfo(dtype).tiny).any():
        return Refused("the constants together would lose precision, they are so small")
    return value


def scale_and_shift(node: gs.Node, binary: Binary) -> tuple[np.ndarray | None, np.ndarray | None] | None:
    """A node with a constant as ``scale * x + shift``, float64; None for c / x and where a divisor is zero."""
    value = binary.value.astype(np.float64)
    if node.op == "Mul":
        return value, None
    if node.op == "Div":
        return (1 / value, None) if binary.at == 1 and value.all() else None
    if node.op == "Add":
        return None, value
    return (None, -value) if binary.at == 1 else (np.full((), -1.0), value)


def _two_steps(g: Rewriter, node: gs.Node, *ops: str) -> tuple[_Step, _Step] | Refused | None:
    second = with_constant(g, node)
    before = None if second is None else inner(g, second.x, node, *ops)
    first = None if before is None else with_constant(g, before)
    if second is None or first is None or before is None:
        return None
    if first.value.dtype != second.value.dtype:
        return None
    size = int(np.prod(np.broadcast_shapes(first.value.shape, second.value.shape)))
    copied = sum(each.value.nbytes for each in (first, second) if len(each.constant.outputs) > 1)
    if size > max(first.value.size, second.value.size) or copied > _COPY_LIMIT:
        return Refused("its constant and the one before it would take more room together than they do")
    return _Step(before.op, first), _Step(node.op, second)


def _commit(
    g: Rewriter, node: gs.Node, op: str, first: _Step, value: np.ndarray, *, constant_first: bool
) -> str | Refused | None:
    source = first.binary.x
    if not readable(g, node, source):
        return None
    constant = g.make_constant(g.scope(node), first.binary.constant.name, value)
    g.rewrite(node, op, {}, [constant, source] if constant_first else [source, constant])
    return f"combined with the {first.op} before it into one {op}"


CONSTANT_RULES: tuple[Rule, ...] = (_factors, _terms, _three)
