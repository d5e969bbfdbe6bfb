"""Windows that reach over the edge of an image: loops that stop at the edge, instead of a padded copy of the image.

TVM pools a copy of the image, ``padded[p] = image[p - pad] if p lies in the image else identity``. What is outside adds
nothing, so a window's loops need only run over its part inside: ``for r in range(first, last)``, where both follow from
the condition, which is linear in ``r``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeAlias

from tvm import sym, tirx
from tvm.ir import Call, TensorLoad
from tvm.tirx import GE, GT, LE, LT, And, FloatImm

from onnxslim.targets.emit import Expr, index, known
from onnxslim.targets.fused import FusedKernel, Step

__all__ = ["Limits", "without_padding"]

Limits: TypeAlias = dict[Any, tuple[Expr, Expr]]
"""Where the loop over a reduced axis starts, and where it stops, by the axis's variable; others run over all of it."""


def without_padding(kernel: FusedKernel) -> tuple[FusedKernel, Limits]:
    """The kernel whose windows read the image itself, and the limits of their loops; where that fails, as it was."""
    limits: Limits = {}
    for reduction in kernel.steps:
        padding = _padding(kernel, reduction)
        if padding is None:
            continue
        place = list(reduction.value.b.indices)
        condition, inside, _ = padding.value_at(place).args
        found = _limits(reduction, condition)
        if found is None:
            continue
        limits |= found
        value = type(reduction.value)(reduction.value.a, inside)
        steps = [
            replace(step, value=value) if step is reduction else step for step in kernel.steps if step is not padding
        ]
        kernel = replace(kernel, steps=tuple(steps))
    return kernel, limits


def _padding(kernel: FusedKernel, reduction: Step) -> Step | None:
    """The step that fills the padded copy which only ``reduction`` reads, with what leaves its results as they are."""
    operand = getattr(reduction.value, "b", None)
    if reduction.start is None or not isinstance(operand, TensorLoad):
        return None
    padding = kernel.maker(operand.source)
    if padding is None or kernel.is_parameter(padding.output) or not padding.is_pointwise:
        return None
    value = padding.value
    if not isinstance(value, Call) or getattr(value.op, "name", "") != "prim.if_then_else":
        return None
    outside = value.args[2]
    is_identity = (
        isinstance(outside, FloatImm)
        and isinstance(reduction.start, FloatImm)
        and float(outside.value) == float(reduction.start.value)
    )
    return padding if is_identity and len(kernel.readers(padding.output)) == 1 else None


def _limits(reduction: Step, condition: Expr) -> Limits | None:
    """For which places of a window a condition holds; None where that is not a range of each axis.

    The range may depend on where the window is, but not along the last axis: that one is of vectors.
    """
    extents = {axis.variable: axis.extent for axis in reduction.reduced}
    limits: Limits = {}
    for comparison in _conjuncts(condition):
        slack = _slack(comparison)
        variables = [] if slack is None else [name for name in extents if _depends(slack, name)]
        if len(variables) != 1 or _depends(slack, reduction.spatial[-1].variable):
            return None
        (name,) = variables
        linear = sym.detect_linear_equation(slack, [name])
        step = known(linear[0]) if linear else None
        if not step:
            return None
        first, last = limits.get(name, (index(0), index(extents[name])))
        if step > 0:
            first = tirx.max(first, tirx.floordiv(index(step - 1) - linear[1], index(step)))
        else:
            last = tirx.min(last, tirx.floordiv(linear[1], index(-step)) + 1)
        limits[name] = (first, last)
    return limits


def _conjuncts(condition: Expr) -> list[Expr]:
    return [*_conjuncts(condition.a), *_conjuncts(condition.b)] if isinstance(condition, And) else [condition]


def _slack(comparison: Expr) -> Expr | None:
    """What is not negative where a comparison holds."""
    if isinstance(comparison, LE | LT):
        return comparison.b - comparison.a - int(isinstance(comparison, LT))
    if isinstance(comparison, GE | GT):
        return comparison.a - comparison.b - int(isinstance(comparison, GT))
    return None


def _depends(value: Expr, variable: Any) -> bool:
    return any(each.same_as(variable) for each in tirx.analysis.undefined_vars(value))
