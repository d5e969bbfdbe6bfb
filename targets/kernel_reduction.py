"""Kernels that add up, or take the largest: reductions, softmax, norms, global pools, with all that is fused to them.

The outer axes that all steps share are handed out to the cores. What is left, a row of a softmax or a norm, or the
channels of an image, is done step by step while it is in the cache: intermediate results live in a small buffer of the
row's size. Along an axis that is contiguous in memory a reduction keeps several vectors of partial results; along any
other, every lane of a vector is a result of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.tirx import Add, Max, Min, Mul, PrimFunc, Var

from onnxslim.targets.emit import (
    Expr,
    Size,
    Stmt,
    cut,
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
from onnxslim.targets.index_space import Nest, flattened, merged
from onnxslim.targets.machine import PARALLEL_WORK, Machine
from onnxslim.targets.windows import Limits, without_padding

__all__ = ["write_reduction"]

# Vectors of partial results that hide the time until a sum can be added to again.
_PARTIAL = 4
# Vectors of results that are reduced at the same time, so that what is read is longer than a line of the cache.
_TOGETHER = 8
# Numbers that are added to one sum; its rounding errors would grow with more of them.
_SUMMED = 64
# What a size that is not known is taken for where work is estimated.
_TYPICAL = 64
_COMBINE: dict[Any, Callable[[Expr, Expr], Expr]] = {
    Add: lambda a, b: a + b,
    Mul: lambda a, b: a * b,
    Max: tirx.max,
    Min: tirx.min,
}


def write_reduction(kernel: FusedKernel, machine: Machine) -> PrimFunc | None:
    """Write the kernel; None where nothing is reduced, or in a way that is not known here."""
    kernel, limits = without_padding(kernel)
    reductions = [step for step in kernel.steps if step.start is not None]
    if not reductions or not all(step.is_pointwise or _is_reduction(step) for step in kernel.steps):
        return None
    return function(kernel.parameters, _Rows(kernel, machine, reductions, limits).body())


def _typical(extent: Size) -> int:
    return extent if isinstance(extent, int) else _TYPICAL


def _product(sizes: Iterable[Size]) -> Size:
    total: Size = 1
    for size in sizes:
        total = total * size if isinstance(total, int) and isinstance(size, int) else index(total) * index(size)
    return total


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


def _start(step: Step) -> Expr:
    """What combining starts from; TVM's largest of nothing is the least finite number."""
    dtype = str(step.output.dtype)
    if type(step.value) in (Max, Min) and dtype.startswith("float"):
        return tirx.const(-math.inf if isinstance(step.value, Max) else math.inf, dtype)
    return step.start


class _Partial:
    """Partial results of a reduction, in registers: ``count`` in vectors of ``lanes``, and ``left`` more.

    What is left over has results of its own, so that the others stay whole vectors.
    """

    def __init__(self, step: Step, count: int, lanes: int, left: int = 0) -> None:
        self.step, self.count, self.lanes, self.left = step, count, lanes, left
        self.combine = _COMBINE[type(step.value)]
        self.buffer, self.declared = local(count + left, str(step.output.dtype))

    def another(self) -> _Partial:
        """As many again."""
        return _Partial(self.step, self.count, self.lanes, self.left)

    def cleared(self) -> Stmt:
        """Declared, and set to what the reduction starts from."""
        start = _start(self.step)
        return seq(
            self.declared,
            self._all(lambda first, width: vector(width, lambda lane: store(self.buffer, start, lane + first))),
        )

    def add(self, value: Callable[[Expr], Expr], first: int, lanes: int) -> Stmt:
        """``value(lane)`` combined with the results from ``first`` on."""

        def number(lane: Expr) -> Stmt:
            return store(self.buffer, self.combine(load_of(self.buffer, lane + first), value(lane)), lane + first)

        return vector(lanes, number)

    def join(self, other: _Partial) -> Stmt:
        """Each combined with another's at the same place."""
        return self._all(lambda first, width: self.add(lambda lane: load_of(other.buffer, lane + first), first, width))

    def folded(self) -> Stmt:
        """All of them combined into the first."""

        def fold(first: int, width: int) -> Stmt:
            return self.add(lambda lane: load_of(self.buffer, lane + first), 0, width)

        halves = [self.lanes >> level for level in range(1, self.lanes.bit_length())]
        vectors = self._all(lambda first, width: fold(first, width) if first else None)
        return seq(vectors, *(fold(half, half) for half in halves))

    def _all(self, body: Callable[[int, int], Stmt | None]) -> Stmt:
        """``body(first, how many)`` for each vector, and for what is left."""
        rest = [body(self.count, self.left)] if self.left else []
        return seq(*(body(first, self.lanes) for first in range(0, self.count, self.lanes)), *rest)


class _Rows:
    """One kernel on its way to be written."""

    def __init__(self, kernel: FusedKernel, machine: Machine, reductions: Sequence[Step], limits: Limits) -> None:
        self.kernel, self.machine, self.limits = kernel, machine, limits
        self.lanes = machine.lanes()
        self.along = all(self._reads_along(step) for step in reductions)
        self.shared = self._shared_axes()
        if not self.along and self.shared and all(len(step.spatial) == self.shared for step in reductions):
            # The last axis of the results is the one that lies in memory, so it has to stay inside.
            self.shared -= 1
        self.held: list[tuple[Any, Any, Step]] = []

    def _reads_along(self, step: Step) -> bool:
        """Whether some operand is contiguous along the innermost axis that is reduced."""
        operand = self._operand(step, self.kernel.inlined(step.value.b, lambda _buffer, _place: None))
        if not operand.axes:
            return True
        innermost, _ = operand.axes[-1]
        return innermost not in self.limits and any(operand.stride(each, innermost) == 1 for each in operand.loads())

    def _shared_axes(self) -> int:
        """How many outer axes mean the same in all steps."""
        least = min(len(step.spatial) for step in self.kernel.steps)
        for position in range(least):
            first, *others = (step.spatial[position].extent for step in self.kernel.steps)
            same = all(tvm_ffi.structural_equal(index(first), index(each)) for each in others)
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

    def _inner(self, step: Step) -> list[Axis]:
        return step.spatial[self.shared :]

    def _size(self, step: Step) -> Size:
        return _product(axis.extent for axis in self._inner(step))

    def body(self) -> Stmt:
        """All rows."""
        outer = self.kernel.steps[-1].spatial[: self.shared]
        work = max(math.prod(_typical(axis.extent) for axis in step.axes) for step in self.kernel.steps)

        def row(*place: Expr) -> Stmt:
            self.held = []
            statements = [self._step(step, list(place)) for step in self.kernel.steps]
            return seq(*statements)

        if not outer:
            return row()
        sizes = [axis.extent for axis in outer]
        is_small = 4 * work < PARALLEL_WORK
        if len(sizes) < 2 or _typical(_product(sizes[:-1])) < 4 * self.machine.cores:
            return parallel(sizes, row, serial=is_small)
        # A loop of its own, where there are tasks enough without it, needs no division to find its place.
        return parallel(sizes[:-1], lambda *place: loop("row", sizes[-1], lambda at: row(*place, at)), serial=is_small)

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
            flat = flat * index(axis.extent) + at
        return flat

    def _store(self, step: Step, value: Expr, place: list[Expr]) -> Stmt:
        for output, row, _ in self.held:
            if step.output.same_as(output):
                return store(row, value, self._flat(step, place[self.shared :]))
        return store(step.output, value, *place)

    # ------------------------------------------------------------------------------------------------------------ loops

    def _over(
        self, axes: Sequence[Axis], place: list[Expr], body: Callable[[list[Expr], int], Stmt], together: int = 1
    ) -> Stmt:
        """``body(place, lanes)`` over axes, the last of which is cut into vectors; 0 lanes are one number alone."""
        if not axes:
            return body(place, 0)
        axis, *others = axes
        if others:
            return loop("place", axis.extent, lambda at: self._over(others, [*place, at], body, together))
        if not isinstance(axis.extent, int):
            whole = tirx.floordiv(axis.extent, index(self.lanes))
            behind = whole * self.lanes
            return seq(
                loop("block", whole, lambda block: body([*place, block * self.lanes], self.lanes)),
                loop("rest", axis.extent - behind, lambda at: body([*place, behind + at], 0)),
            )
        vectors, rest = divmod(axis.extent, self.lanes)
        statements = []
        for start, count, times in cut(vectors, sorted({together, 1}, reverse=True)):
            lanes, first = count * self.lanes, start * self.lanes
            statements.append(
                loop("block", times, lambda block, n=lanes, f=first: body([*place, block * n + f], n))  # type: ignore[misc]
            )
        if rest:
            statements.append(body([*place, index(vectors * self.lanes)], rest))
        return seq(*statements)

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
        return self._over(self._inner(step), place, lambda at, lanes: self._across(step, at, lanes), _TOGETHER)

    def _over_places(self, axes: Sequence[Axis], place: list[Expr], body: Callable[[list[Expr]], Stmt]) -> Stmt:
        if not axes:
            return body(place)
        axis, *others = axes
        return loop("place", axis.extent, lambda at: self._over_places(others, [*place, at], body))

    def _operand(self, step: Step, value: Expr) -> Nest:
        """What a reduction combines, over as few axes as it can be read along."""
        axes = tuple((axis.variable, axis.extent) for axis in step.reduced)
        nest = flattened(Nest(axes, index(0), value))
        return nest if any(variable in self.limits for variable, _ in axes) else merged(nest)

    def _span(self, step: Step, place: list[Expr], variable: Any, extent: Size) -> tuple[Expr, Size]:
        """Where a reduced axis starts, and how far it goes, as far as it is inside of what it reads."""
        if variable not in self.limits:
            return index(0), extent
        first, last = (substitute(limit, self._names(step, place)) for limit in self.limits[variable])
        return first, last - first

    def _names(self, step: Step, place: list[Expr]) -> dict[Any, Expr]:
        return {axis.variable: each for axis, each in zip(step.spatial, place, strict=True)}

    def _along(self, step: Step, place: list[Expr]) -> Stmt:
        """One result, from vectors of partial results."""
        operand = self._operand(step, self._value(step.value.b, {}))
        *outer, (inner, extent) = operand.axes or ((Var("one", "int64"), 1),)
        # Less than a vector is combined number by number.
        lanes = self.lanes if _typical(extent) >= self.lanes else 1
        runs, whole, rest = _runs(extent, lanes)
        count = max((width for _, width, _ in runs), default=1) * lanes
        sums = _Partial(step, count, lanes, rest if isinstance(rest, int) else 1)
        names = self._names(step, place)
        *blocks, most = _blocks(step, [*(size for _, size in outer), runs[0][2] if runs else 1])

        def add(chosen: dict[Any, Expr], sums: _Partial) -> Stmt:
            def value(at: Expr) -> Expr:
                return substitute(operand.value, {**names, **chosen, inner: at})

            def run(start: Size, width: int, times: Size, most: int | None) -> Stmt:
                def part(at: Expr, first: int, sums: _Partial) -> Stmt:
                    return sums.add(lambda lane: value(at * lanes + first + lane), first, lanes)

                def block(number: Expr, sums: _Partial) -> Stmt:
                    at = number * width + start
                    return seq(*(part(at, vectors * lanes, sums) for vectors in range(width)))

                return _combined("block", times, sums, most, block)

            if isinstance(rest, int):
                tail = sums.add(lambda lane: value(lane + whole), count, rest) if rest else None
            else:
                tail = loop("rest", rest, lambda at: sums.add(lambda _: value(at + whole), count, 1))
            long, *short = runs or [(0, 1, 0)]
            return seq(run(*long, most), *(run(*each, None) for each in short), tail)

        return seq(
            sums.cleared(),
            self._rows(step, place, outer, blocks, sums, add),
            sums.folded(),
            self._store(step, load_of(sums.buffer, 0), place),
        )

    def _across(self, step: Step, place: list[Expr], lanes: int) -> Stmt:
        """A vector of results, each of them reduced on its own."""
        operand = self._operand(step, self._value(step.value.b, {}))
        sums = _Partial(step, max(lanes, 1), max(lanes, 1))

        def here(lane: Expr) -> list[Expr]:
            return [*place[:-1], place[-1] + lane] if lanes else place

        def add(chosen: dict[Any, Expr], sums: _Partial) -> Stmt:
            def value(lane: Expr) -> Expr:
                return substitute(operand.value, {**self._names(step, here(lane)), **chosen})

            return sums.add(value, 0, sums.count)

        axes = list(operand.axes)
        blocks = _blocks(step, [size for _, size in axes])
        return seq(
            sums.cleared(),
            self._rows(step, place, axes, blocks, sums, add),
            vector(sums.count, lambda lane: self._store(step, load_of(sums.buffer, lane), here(lane))),
        )

    def _rows(
        self,
        step: Step,
        place: list[Expr],
        axes: Sequence[tuple[Any, Size]],
        blocks: Sequence[int | None],
        sums: _Partial,
        add: Callable[[dict[Any, Expr], _Partial], Stmt],
    ) -> Stmt:
        """``add(places on the axes, sums)`` for all places on reduced axes."""
        if not axes:
            return add({}, sums)
        (variable, extent), *others = axes
        most, *fewer = blocks
        first, count = self._span(step, place, variable, extent)

        def row(at: Expr, sums: _Partial) -> Stmt:
            def further(chosen: dict[Any, Expr], sums: _Partial) -> Stmt:
                return add({variable: first + at, **chosen}, sums)

            return self._rows(step, place, others, fewer, sums, further)

        return _combined("row", count, sums, most, row)


def _runs(extent: Size, lanes: int) -> tuple[list[tuple[Size, int, Size]], Size, Size]:
    """A length as blocks of vectors (the first vector, vectors a block, blocks), how far they go, what is left."""
    if isinstance(extent, int):
        vectors, rest = divmod(extent, lanes)
        return [(*run,) for run in cut(vectors, (_PARTIAL, 1))], vectors * lanes, rest
    vectors = tirx.floordiv(extent, index(lanes))
    blocks = tirx.floordiv(vectors, index(_PARTIAL))
    whole = vectors * lanes
    return [(0, _PARTIAL, blocks), (blocks * _PARTIAL, 1, vectors - blocks * _PARTIAL)], whole, extent - whole


def _blocks(step: Step, counts: Sequence[Size]) -> list[int | None]:
    """For nested loops, the outermost first: how many rounds of one get sums of their own; None for all of them."""
    blocks: list[int | None] = [None] * len(counts)
    if type(step.value) is Add and str(step.output.dtype).startswith("float"):
        inside = 1
        for position, count in reversed(list(enumerate(counts))):
            if not isinstance(count, int) or inside * count > _SUMMED:
                blocks[position] = max(_SUMMED // inside, 1)
                break
            inside *= max(count, 1)
    return blocks


def _combined(name: str, count: Size, sums: _Partial, most: int | None, body: Callable[[Expr, _Partial], Stmt]) -> Stmt:
    """``body(round, sums)``, ``count`` times; ``most`` rounds at a time have sums of their own, added up in the end."""
    if most is None:
        return loop(name, count, lambda at: body(at, sums))
    few = most

    def block(number: Expr, sums: _Partial) -> Stmt:
        own = sums.another()
        start = number * few
        rounds = tirx.min(index(few), count - start)
        return seq(own.cleared(), loop(name, rounds, lambda at: body(start + at, own)), sums.join(own))

    if not isinstance(count, int):
        return loop("part", tirx.floordiv(count + few - 1, index(few)), lambda number: block(number, sums))
    parts = math.ceil(count / few)
    return _combined("part", parts, sums, _SUMMED if parts > _SUMMED else None, block)
