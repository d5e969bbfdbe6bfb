"""Kernels that add up, or take the largest: reductions, softmax, norms, global pools, with all that is fused to them.

The outer axes that all steps share are handed out to the cores. What is left, a row of a softmax or a norm, or the
channels of an image, is done step by step while it is in the cache: intermediate results live in a small buffer of the
row's size. Along an axis that is contiguous in memory a reduction keeps several vectors of partial results; along any
other, every lane of a vector is a result of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.tirx import Add, Max, Min, Mul, PrimFunc

from onnxslim.targets.emit import (
    Expr,
    Stmt,
    function,
    index,
    known,
    load_of,
    local,
    loop,
    parallel,
    seq,
    store,
    substitute,
    vector,
)
from onnxslim.targets.fused import Axis, FusedKernel, Step, load_nodes
from onnxslim.targets.machine import PARALLEL_WORK, Machine

__all__ = ["write_reduction"]

# Vectors of partial results that hide the time until a sum can be added to again.
_PARTIAL = 4
# Rows of fewer vectors than this are left alone.
_SHORT = 8
_COMBINE: dict[Any, Callable[[Expr, Expr], Expr]] = {
    Add: lambda a, b: a + b,
    Mul: lambda a, b: a * b,
    Max: tirx.max,
    Min: tirx.min,
}


def write_reduction(kernel: FusedKernel, machine: Machine) -> PrimFunc | None:
    """Write the kernel; None where nothing is reduced, or in a way that is not known here."""
    reductions = [step for step in kernel.steps if step.start is not None]
    if not reductions or not all(step.is_pointwise or _is_reduction(step) for step in kernel.steps):
        return None
    for step in kernel.steps:
        if any(known(axis.extent) in (None, 0) for axis in step.axes[1:]):
            return None
    rows = _Rows(kernel, machine, reductions)
    if rows.along and any(int(step.reduced[-1].extent) < _SHORT * machine.lanes() for step in reductions):
        # So few numbers are folded in no time, and TVM's plain loops are as good.
        return None
    return function(kernel.parameters, rows.body()) if rows.fits() else None


def _is_reduction(step: Step) -> bool:
    """Whether a step combines its output with something, at the place that its spatial axes name."""
    spatial = step.spatial
    if step.start is None or type(step.value) not in _COMBINE or len(spatial) != len(step.indices):
        return False
    named = all(
        place.same_as(axis.variable) or (axis.extent == 1 and known(place) == 0)
        for place, axis in zip(step.indices, spatial, strict=True)
    )
    first = step.value.a
    return named and getattr(first, "source", None) is not None and first.source.same_as(step.output)


class _Rows:
    """One kernel on its way to be written."""

    def __init__(self, kernel: FusedKernel, machine: Machine, reductions: Sequence[Step]) -> None:
        self.kernel, self.machine = kernel, machine
        self.lanes = machine.lanes()
        self.along = all(self._reads_along(step) for step in reductions)
        self.shared = self._shared_axes()
        if not self.along and self.shared and all(len(step.spatial) == self.shared for step in reductions):
            # The last axis of the results is the one that lies in memory, so it has to stay inside.
            self.shared -= 1
        self.held: list[tuple[Any, Any, Step]] = []

    def _reads_along(self, step: Step) -> bool:
        """Whether some operand is contiguous along the innermost axis that is reduced."""
        innermost = step.reduced[-1].variable
        nodes = load_nodes(self.kernel.inlined(step.value.b, lambda _buffer, _place: None))
        return any(len(node.indices) and node.indices[-1].same_as(innermost) for node in nodes)

    def _shared_axes(self) -> int:
        """How many outer axes mean the same in all steps."""
        least = min(len(step.spatial) for step in self.kernel.steps)
        for position in range(least):
            extents = [step.spatial[position].extent for step in self.kernel.steps]
            same = all(extent is extents[0] or (isinstance(extent, int) and extent == extents[0]) for extent in extents)
            if not same or not all(self._is_aligned(step, position) for step in self.kernel.steps):
                return position
        return least

    def _is_aligned(self, step: Step, position: int) -> bool:
        """Whether a step reads other steps' results at its own place along an axis."""
        variable = step.spatial[position].variable
        return all(
            node.indices[position].same_as(variable) or known(node.source.shape[position]) == 1
            for node in load_nodes(step.value)
            if not self.kernel.is_parameter(node.source)
        )

    def fits(self) -> bool:
        """Whether the rows' intermediate results fit the cache."""
        if any(str(step.output.dtype) not in ("float32", "int32", "int64") for step in self.kernel.steps):
            return False
        size = sum(self._size(step) for step in self.kernel.steps if not self.kernel.is_parameter(step.output))
        return 4 * size <= self.machine.l2_bytes

    def _inner(self, step: Step) -> list[Axis]:
        return step.spatial[self.shared :]

    def _size(self, step: Step) -> int:
        return math.prod(int(axis.extent) for axis in self._inner(step))

    def body(self) -> Stmt:
        """All rows."""
        outer = self.kernel.steps[-1].spatial[: self.shared]
        work = max(math.prod(known(axis.extent) or 64 for axis in step.axes) for step in self.kernel.steps)

        def row(*place: Expr) -> Stmt:
            self.held = []
            statements = [self._step(step, list(place)) for step in self.kernel.steps]
            return seq(*statements)

        if not outer:
            return row()
        return parallel([axis.extent for axis in outer], row, serial=4 * work < PARALLEL_WORK)

    def _step(self, step: Step, place: list[Expr]) -> Stmt | None:
        is_output = self.kernel.is_parameter(step.output)
        if step.start is None and not is_output and not self._is_kept(step):
            return None
        declared = None
        if not is_output:
            size = self._size(step)
            buffer, declared = local(size, str(step.output.dtype), name="row")
            self.held.append((step.output, buffer, step))
        written = self._pointwise(step, place) if step.start is None else self._reduce(step, place)
        return seq(declared, written)

    def _is_kept(self, step: Step) -> bool:
        """Whether a result is needed more than once, and not only copied."""
        readers = self.kernel.readers(step.output)
        return (
            len(readers) > 1 or any(reader.start is not None for reader in readers) or len(step.spatial) == self.shared
        )

    # ------------------------------------------------------------------------------------------------------ expressions

    def _value(self, value: Expr, names: dict[Any, Expr]) -> Expr:
        """An expression of a step in terms of inputs and of what the row holds."""

        def load(buffer: Any, indices: list[Expr]) -> Expr | None:
            for output, row, step in self.held:
                if buffer.same_as(output):
                    return load_of(row, self._flat(step, indices[self.shared :]))
            return None

        return self.kernel.inlined(substitute(value, names), load)

    def _flat(self, step: Step, place: Sequence[Expr]) -> Expr:
        flat = index(0)
        for axis, at in zip(self._inner(step), place, strict=True):
            flat = flat * int(axis.extent) + at
        return flat

    def _store(self, step: Step, value: Expr, place: list[Expr]) -> Stmt:
        for output, row, _ in self.held:
            if step.output.same_as(output):
                return store(row, value, self._flat(step, place[self.shared :]))
        return store(step.output, value, *place)

    # ------------------------------------------------------------------------------------------------------------ loops

    def _over(self, axes: Sequence[Axis], place: list[Expr], body: Callable[[list[Expr], int], Stmt]) -> Stmt:
        """``body(place, lanes)`` over axes, the last of which is cut into vectors."""
        if not axes:
            return body(place, 0)
        axis, *others = axes
        extent = int(axis.extent)
        if others:
            return loop("place", extent, lambda at: self._over(others, [*place, at], body))
        whole = extent // self.lanes
        rest = extent - whole * self.lanes
        return seq(
            loop("block", whole, lambda block: body([*place, block * self.lanes], self.lanes)) if whole else None,
            body([*place, index(whole * self.lanes)], rest) if rest else None,
        )

    def _pointwise(self, step: Step, place: list[Expr]) -> Stmt:
        def write(at: list[Expr], lanes: int) -> Stmt:
            def number(lane: Expr) -> Stmt:
                here = [*at[:-1], at[-1] + lane] if lanes else at
                names = {axis.variable: each for axis, each in zip(step.axes, here, strict=True)}
                return self._store(step, self._value(step.value, names), here)

            return vector(lanes, number) if lanes else number(index(0))

        return self._over(self._inner(step), place, write)

    def _reduce(self, step: Step, place: list[Expr]) -> Stmt:
        if self._reads_along(step):
            return self._over_places(self._inner(step), place, lambda at: self._along(step, at))
        return self._over(self._inner(step), place, lambda at, lanes: self._across(step, at, lanes))

    def _over_places(self, axes: Sequence[Axis], place: list[Expr], body: Callable[[list[Expr]], Stmt]) -> Stmt:
        if not axes:
            return body(place)
        axis, *others = axes
        return loop("place", axis.extent, lambda at: self._over_places(others, [*place, at], body))

    def _names(self, step: Step, place: list[Expr]) -> dict[Any, Expr]:
        return {axis.variable: each for axis, each in zip(step.spatial, place, strict=True)}

    def _along(self, step: Step, place: list[Expr]) -> Stmt:
        """One result, from vectors of partial results."""
        combine, dtype = _COMBINE[type(step.value)], str(step.output.dtype)
        *outer, inner = step.reduced
        extent = int(inner.extent)
        vectors, rest = divmod(extent, self.lanes)
        parts = max((count for count in range(1, _PARTIAL + 1) if vectors and vectors % count == 0), default=0)
        sums, declared = local(max(parts, 1) * self.lanes, dtype)
        # What is left over has results of its own, so that the others stay whole vectors.
        left, left_declared = local(max(rest, 1), dtype, name="left")
        names = self._names(step, place)

        def add(chosen: dict[Any, Expr], at: Expr, lanes: int, target: Any, first: int) -> Stmt:
            def number(lane: Expr) -> Stmt:
                value = self._value(step.value.b, {**names, **chosen, inner.variable: at + lane})
                return store(target, combine(load_of(target, lane + first), value), lane + first)

            return vector(lanes, number)

        def row(chosen: dict[Any, Expr]) -> Stmt:
            def block(number: Expr) -> Stmt:
                starts = [part * self.lanes for part in range(parts)]
                width = parts * self.lanes
                return seq(*(add(chosen, number * width + at, self.lanes, sums, at) for at in starts))

            return seq(
                loop("block", vectors // parts, block) if parts else None,
                add(chosen, index(vectors * self.lanes), rest, left, 0) if rest else None,
            )

        def rows(axes: Sequence[Axis], chosen: dict[Any, Expr]) -> Stmt:
            if not axes:
                return row(chosen)
            axis, *others = axes
            return loop("row", axis.extent, lambda at: rows(others, {**chosen, axis.variable: at}))

        def clear(target: Any, count: int) -> Stmt:
            return vector(count, lambda lane: store(target, step.start, lane))

        def fold() -> tuple[list[Stmt], Expr]:
            statements = [
                vector(
                    self.lanes,
                    lambda lane, at=part * self.lanes: store(  # type: ignore[misc]
                        sums, combine(load_of(sums, lane), load_of(sums, lane + at)), lane
                    ),
                )
                for part in range(1, parts)
            ]
            numbers = [load_of(sums, lane) for lane in range(self.lanes if parts else 0)]
            numbers += [load_of(left, lane) for lane in range(rest)]
            while len(numbers) > 1:
                pairs = [combine(a, b) for a, b in zip(numbers[::2], numbers[1::2], strict=False)]
                numbers = pairs + numbers[len(pairs) * 2 :]
            return statements, numbers[0]

        folded, result = fold()
        return seq(
            declared if parts else None,
            left_declared if rest else None,
            *(clear(sums, self.lanes * parts),) * bool(parts),
            *(clear(left, rest),) * bool(rest),
            rows(outer, {}),
            *folded,
            self._store(step, result, place),
        )

    def _across(self, step: Step, place: list[Expr], lanes: int) -> Stmt:
        """A vector of results, each of them reduced on its own."""
        combine, dtype = _COMBINE[type(step.value)], str(step.output.dtype)
        sums, declared = local(max(lanes, 1), dtype)

        def each(body: Callable[[Expr], Stmt]) -> Stmt:
            return vector(lanes, body) if lanes > 1 else body(index(0))

        def here(lane: Expr) -> list[Expr]:
            return [*place[:-1], place[-1] + lane] if lanes else place

        def rows(axes: Sequence[Axis], chosen: dict[Any, Expr]) -> Stmt:
            if axes:
                axis, *others = axes
                return loop("row", axis.extent, lambda at: rows(others, {**chosen, axis.variable: at}))

            def add(lane: Expr) -> Stmt:
                value = self._value(step.value.b, {**self._names(step, here(lane)), **chosen})
                return store(sums, combine(load_of(sums, lane), value), lane)

            return each(add)

        return seq(
            declared,
            each(lambda lane: store(sums, step.start, lane)),
            rows(step.reduced, {}),
            each(lambda lane: self._store(step, load_of(sums, lane), here(lane))),
        )
