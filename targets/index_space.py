"""The loops of a kernel without sums, arranged: cut where conditions change, split where indices divide, then merged.

A kernel writes every element of its output once, so its loops may take any form that covers the output. Wanted are few
and long ones, in whose innermost every operand is read in order. Each step here replaces axes by others in the whole
expression and lets TVM simplify indices within the bounds of the axes, so what cannot be improved only stays slow.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import tvm_ffi
from tvm import sym, tirx
from tvm.ir import Call, Range, TensorLoad
from tvm.tirx import EQ, GE, GT, LE, LT, NE, FloorDiv, FloorMod, Select, Var

from onnxslim.targets.emit import Expr, Size, index, known, substitute

__all__ = ["Nest", "flattened", "merged", "nests"]

# Pieces of code that one output is cut into at most.
_PIECES = 12


@dataclass(frozen=True)
class Nest:
    """``output[place] = value`` for all of ``axes``; places and loads are flat, that is one number each.

    Attributes:
        axes: variables and how often they run, from the outermost to the innermost.
        place: where in the output's memory an element lies.
        value: what is written there.
    """

    axes: tuple[tuple[Any, Size], ...]
    place: Expr
    value: Expr

    def stride(self, address: Expr, variable: Any) -> int | None:
        """By how much an address grows with a variable; None where that differs, or is not known."""
        found = sym.detect_linear_equation(address, [variable])
        return known(found[0]) if found else None

    def addresses(self) -> list[Expr]:
        """Of all elements that are read, and of the one that is written."""
        return [self.place, *self.loads()]

    def loads(self) -> list[Expr]:
        """Of all elements that are read."""
        found: list[Expr] = []

        def note(load: TensorLoad) -> None:
            if len(load.indices):
                found.append(load.indices[-1])

        tvm_ffi.structural_walk(self.value, [(TensorLoad, note)])
        return found


def nests(axes: list[tuple[Any, Size]], output: Any, indices: list[Expr], value: Expr) -> list[Nest]:
    """The loops that write ``value`` to ``output[indices]`` for all of ``axes``, arranged."""
    pieces = []
    for starts, piece_axes in _pieces(axes, _simplified(value, axes)):
        moved = {
            variable: new if start == 0 else new + start
            for (variable, _), (new, _), start in zip(axes, piece_axes, starts, strict=True)
        }
        place, inner = [substitute(each, moved) for each in indices], substitute(value, moved)
        nest = Nest(tuple(piece_axes), _flat(output.shape, place), _simplified(inner, piece_axes))
        nest = flattened(_split(nest))
        pieces.append(merged(nest))
    return pieces


def _analyzer(axes: Any) -> Any:
    analyzer = sym.Analyzer()
    for variable, size in axes:
        analyzer.bind(variable, Range.from_min_extent(index(0), index(size)))
    return analyzer


def _simplified(value: Expr, axes: Any) -> Expr:
    """Indices and conditions simplified, and conditions that are settled gone. Numbers are left as they are."""
    analyzer = _analyzer(axes)

    def load(each: TensorLoad) -> Expr:
        return tirx.BufferLoad(each.source, [analyzer.simplify(place) for place in each.indices])

    def call(each: Call) -> Expr:
        if getattr(each.op, "name", "") != "prim.if_then_else":
            return each
        condition = analyzer.simplify(each.args[0])
        if known(condition) is not None:
            return each.args[1] if known(condition) else each.args[2]
        return tirx.if_then_else(condition, each.args[1], each.args[2])

    def select(each: Select) -> Expr:
        condition = analyzer.simplify(each.condition)
        if known(condition) is not None:
            return each.true_value if known(condition) else each.false_value
        return Select(condition, each.true_value, each.false_value)

    return tvm_ffi.structural_map(value, [(TensorLoad, load), (Call, call), (Select, select)])


# ------------------------------------------------------------------------------------------------------------- cutting


def _pieces(axes: list[tuple[Any, Size]], value: Expr) -> list[tuple[list[int], list[tuple[Any, Size]]]]:
    """Where pieces start on each axis, and axes of their own."""
    points = _cuts(value, axes)
    runs: list[list[tuple[int, Size]]] = []
    count = 1
    for (variable, size), points_of in zip(reversed(axes), reversed(points), strict=True):
        del variable
        inside = sorted(point for point in points_of if isinstance(size, int) and 0 < point < size)
        if count * (len(inside) + 1) > _PIECES:
            inside = []
        count *= len(inside) + 1
        bounds = [0, *inside, size]
        runs.insert(0, [(start, stop - start if start else stop) for start, stop in itertools.pairwise(bounds)])
    pieces = []
    for chosen in itertools.product(*runs):
        names = [Var(str(variable.name), "int64") for variable, _ in axes]
        sizes = [size for _, size in chosen]
        pieces.append(([start for start, _ in chosen], list(zip(names, sizes, strict=True))))
    return pieces


def _cuts(value: Expr, axes: list[tuple[Any, Size]]) -> list[set[int]]:
    """The places on each axis where a condition on it alone begins or ends to hold."""
    found: list[set[int]] = [set() for _ in axes]
    names = [variable for variable, _ in axes]

    def compare(each: Any) -> None:
        if not str(each.a.ty.dtype).startswith("int"):
            return
        linear = [known(number) for number in sym.detect_linear_equation(each.a - each.b, names)]
        if None in linear or not linear:
            return
        *steps, base = linear
        used = [position for position, step in enumerate(steps) if step]
        if len(used) == 1:
            found[used[0]].update(_changes(type(each), steps[used[0]], base))

    def call(each: Call) -> None:
        if getattr(each.op, "name", "") == "prim.if_then_else":
            tvm_ffi.structural_walk(each.args[0], [(kind, compare) for kind in (LT, LE, GT, GE, EQ, NE)])

    tvm_ffi.structural_walk(value, [(Call, call)])
    return found


def _changes(comparison: type, step: Any, base: Any) -> set[int]:
    """The whole numbers v from which on ``step * v + base`` compares with zero in another way than before."""
    if comparison in (EQ, NE):
        return {-base // step, -base // step + 1} if base % step == 0 else set()
    if comparison in (GT, GE):
        # a > b is -a < -b.
        step, base = -step, -base
    is_strict = comparison in (LT, GT)
    if step > 0:
        return {-(base // step) if is_strict else -base // step + 1}
    return {base // -step + 1 if is_strict else -(-base // -step)}


# ----------------------------------------------------------------------------------------------------------- splitting


def _split(nest: Nest) -> Nest:
    """An axis that indices divide becomes two, if that comes out even."""
    for _ in range(8):
        found = _divided(nest)
        if found is None:
            return nest
        position, divisor = found
        variable, size = nest.axes[position]
        outer, inner = Var(str(variable.name), "int64"), Var(str(variable.name), "int64")
        axes = (*nest.axes[:position], (outer, size // divisor), (inner, divisor), *nest.axes[position + 1 :])
        moved = {variable: outer * divisor + inner}
        place = _analyzer(axes).simplify(substitute(nest.place, moved))
        nest = Nest(axes, place, _simplified(substitute(nest.value, moved), axes))
    return nest


def _divided(nest: Nest) -> tuple[int, int] | None:
    found: list[tuple[int, int]] = []

    def note(each: Any) -> None:
        divisor = known(each.b)
        for position, (variable, size) in enumerate(nest.axes):
            if divisor is None or not isinstance(size, int) or not each.a.same_as(variable):
                continue
            if 1 < divisor < size and size % divisor == 0:
                found.append((position, divisor))

    tvm_ffi.structural_walk(nest.value, [(FloorDiv, note), (FloorMod, note)])
    return found[0] if found else None


# ------------------------------------------------------------------------------------------------------------- merging


def flattened(nest: Nest) -> Nest:
    """Every element by its place in memory."""
    analyzer = _analyzer(nest.axes)

    def load(each: TensorLoad) -> Expr:
        return _load(each.source, analyzer.simplify(_flat(each.source.shape, list(each.indices))))

    return replace(
        nest, place=analyzer.simplify(nest.place), value=tvm_ffi.structural_map(nest.value, [(TensorLoad, load)])
    )


def _flat(shape: Any, indices: list[Expr]) -> Expr:
    total: Expr = index(0)
    for size, place in zip(shape, indices, strict=True):
        total = total * index(size) + index(place)
    return total


def _load(buffer: Any, place: Expr) -> Expr:
    """Of the element at a flat place: TVM adds up indices by their strides, and the last one's is 1."""
    rank = len(buffer.shape)
    return tirx.BufferLoad(buffer, [index(0)] * (rank - 1) + [place] if rank else [])


def merged(nest: Nest) -> Nest:
    """Neighbouring axes that all operands go through as through one are one."""
    axes = [(variable, size) for variable, size in nest.axes if size != 1]
    gone = {variable: index(0) for variable, size in nest.axes if size == 1}
    nest = Nest(tuple(axes), substitute(nest.place, gone), _simplified(substitute(nest.value, gone), axes))
    position = len(nest.axes) - 2
    while position >= 0:
        nest = _joined(nest, position) or nest
        position = min(position - 1, len(nest.axes) - 2)
    return nest


def _joined(nest: Nest, position: int) -> Nest | None:
    (outer, many), (inner, few) = nest.axes[position : position + 2]
    if any(variable.same_as(each) for each in (outer, inner) for variable in _named(nest.value)):
        return None
    analyzer = _analyzer(nest.axes)
    for address in nest.addresses():
        found = sym.detect_linear_equation(address, [outer, inner])
        if not found or not analyzer.can_prove_equal(found[0], found[1] * index(few)):
            return None
    both = Var(str(inner.name), "int64")
    size = many * few if isinstance(many, int) and isinstance(few, int) else index(many) * index(few)
    # The strides agree, so the outer axis adds nothing of its own.
    moved: Mapping[Any, Expr] = {outer: index(0), inner: both}
    axes = (*nest.axes[:position], (both, size), *nest.axes[position + 2 :])
    return Nest(axes, substitute(nest.place, moved), substitute(nest.value, moved))


def _named(value: Expr) -> list[Any]:
    """The variables that a value depends on other than by the places of what it reads."""

    def load(each: TensorLoad) -> Expr:
        return Var("x", str(each.source.dtype))

    return list(tirx.analysis.undefined_vars(tvm_ffi.structural_map(value, [(TensorLoad, load)])))
