"""Kernels in which every element is computed on its own: arithmetic, copies in another order, padding, gathering.

All steps of a kernel are written out into one expression of its inputs, whose loops
:mod:`~onnxslim.targets.index_space` arranges; the innermost loop is one of vectors. The last vector of a loop that does
not come out even overlaps the one before it: computing a few elements twice is cheaper than computing them one by one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.ir import Call
from tvm.tirx import BufferStore, Let, PrimFunc, Var

from onnxslim.targets.emit import (
    Expr,
    Size,
    Stmt,
    function,
    index,
    loop,
    parallel,
    seq,
    substitute,
    vector,
    with_unique_names,
)
from onnxslim.targets.fused import FusedKernel, Step, loads
from onnxslim.targets.index_space import Nest, nests
from onnxslim.targets.machine import PARALLEL_WORK, Machine
from onnxslim.targets.turned_tiles import turned_tiles

__all__ = ["write_pointwise"]

# Written out, an expression that is longer than this would take longer to compile than it is worth.
_LONGEST = 3000
# An exponential and its like, in additions.
_CALL = 10


def write_pointwise(kernel: FusedKernel, machine: Machine) -> PrimFunc | None:
    """Write the kernel; None where it adds up, or writes other than element by element."""
    if not all(step.is_pointwise for step in kernel.steps):
        return None
    statements = []
    for step in kernel.steps:
        is_empty = any(isinstance(axis.extent, int) and axis.extent == 0 for axis in step.axes)
        if kernel.is_parameter(step.output) and not is_empty:
            axes = [(Var(f"i{position}", "int64"), axis.extent) for position, axis in enumerate(step.axes)]
            place = [variable if size != 1 else index(0) for variable, size in axes]
            value = _Written(kernel).value(step, place)
            if value is None:
                return None
            statements += [_write(nest, step.output, machine) for nest in nests(axes, step.output, place, value)]
    return with_unique_names(function(kernel.parameters, seq(*statements)))


class _Written:
    """All steps of a kernel as one expression, in which what is needed twice is computed once."""

    def __init__(self, kernel: FusedKernel) -> None:
        self.kernel = kernel
        self.size = 0
        self.shared: list[tuple[Step, list[Expr], Var, Expr]] = []
        # What a condition guards must not be computed ahead of it.
        self.can_share = not any(_has_condition(step.value) for step in kernel.steps)

    def value(self, step: Step, place: list[Expr]) -> Expr | None:
        """What ``step`` writes at ``place``; None where that is too long."""
        written = self._inlined(step.value_at(place))
        for _, _, name, value in reversed(self.shared):
            written = Let(name, value, written)
        return None if self.size > _LONGEST else written

    def _inlined(self, value: Expr) -> Expr:
        self.size += _operations(value) + 1
        return value if self.size > _LONGEST else substitute(value, {}, self._load)

    def _load(self, buffer: Any, indices: list[Expr]) -> Expr | None:
        step = self.kernel.maker(buffer)
        if step is None:
            return None
        if not self.can_share or self._uses(buffer) < 2:
            return self._inlined(step.value_at(indices))
        for made, place, name, _ in self.shared:
            if made is step and tvm_ffi.structural_equal(place, indices):
                return name
        value = self._inlined(step.value_at(indices))
        name = Var("x", str(buffer.dtype))
        self.shared.append((step, indices, name, value))
        return name

    def _uses(self, buffer: Any) -> int:
        return sum(len(loads(step.value, buffer.same_as)) for step in self.kernel.steps)


def _has_condition(value: Expr) -> bool:
    found = []

    def note(call: Call) -> None:
        if getattr(call.op, "name", "") == "prim.if_then_else":
            found.append(call)

    tvm_ffi.structural_walk(value, [(Call, note)])
    return bool(found)


def _operations(value: Expr) -> int:
    """How long it takes to compute one element, in additions."""
    total = 0

    def count(cost: int) -> Callable[[Any], None]:
        def note(_: Any) -> None:
            nonlocal total
            total += cost

        return note

    arithmetic = (tirx.Add, tirx.Sub, tirx.Mul, tirx.Div, tirx.Max, tirx.Min, tirx.Select, tirx.Cast)
    tvm_ffi.structural_walk(value, [(Call, count(_CALL)), *((kind, count(1)) for kind in arithmetic)])
    return total


# ---------------------------------------------------------------------------------------------------------------- loops


def _write(nest: Nest, output: Any, machine: Machine) -> Stmt:
    def stored(value: Expr, names: Mapping[Any, Expr]) -> Stmt:
        rank = len(output.shape)
        place = [index(0)] * (rank - 1) + [substitute(nest.place, names)] if rank else []
        return BufferStore(output, substitute(value, names), place)

    def element(names: Mapping[Any, Expr]) -> Stmt:
        return stored(nest.value, names)

    if not nest.axes:
        return element({})
    *outer, (inner, size) = nest.axes
    sizes = [each for _, each in nest.axes]
    elements = math.prod(each if isinstance(each, int) else 64 for each in sizes)
    is_small = elements * (1 + _operations(nest.value)) < PARALLEL_WORK or machine.cores == 1
    lanes = machine.lanes("int8" if str(output.dtype) == "bool" else str(output.dtype))

    def run(names: dict[Any, Expr]) -> Callable[[Expr, int], Stmt]:
        def body(start: Expr, width: int) -> Stmt:
            return vector(width, lambda lane: element({**names, inner: start + lane}))

        return body

    is_in_order = _is_in_order(nest, inner)
    if not outer and isinstance(size, int) and not is_small and is_in_order:
        return _shared_out(size, lanes, machine, run({}))

    def row(names: dict[Any, Expr]) -> Stmt:
        if not is_in_order:
            return loop("i", size, lambda at: element({**names, inner: at}))
        return _row(size, lanes, run(names))

    plain = functools.partial(_outer, outer, {}, row, machine, is_small=is_small)
    tiles = None if is_in_order or _has_condition(nest.value) else turned_tiles(nest, output, machine)
    if tiles is None:
        return plain()
    return tiles.or_else(
        _outer(tiles.axes, {}, lambda names: tiles.tile(names, stored), machine, is_small=is_small), plain
    )


def _outer(
    axes: list[tuple[Any, Size]],
    names: dict[Any, Expr],
    row: Callable[[dict[Any, Expr]], Stmt],
    machine: Machine,
    *,
    is_small: bool,
) -> Stmt:
    """Outer loops: as many as give every core enough to do are handed out, the others run inside."""
    count, spread = 1, 0
    while not is_small and spread < len(axes) and count < 8 * machine.cores:
        size = axes[spread][1]
        count *= size if isinstance(size, int) else 8 * machine.cores
        spread += 1

    def inside(rest: list[tuple[Any, Size]], names: dict[Any, Expr]) -> Stmt:
        if not rest:
            return row(names)
        (variable, size), *others = rest
        return loop(str(variable.name), size, lambda at: inside(others, {**names, variable: at}))

    if not spread:
        return inside(axes, names)
    chosen = axes[:spread]

    def task(*place: Expr) -> Stmt:
        here = {variable: at for (variable, _), at in zip(chosen, place, strict=True)}
        return inside(axes[spread:], {**names, **here})

    return parallel([size for _, size in chosen], task)


def _row(size: Size, lanes: int, body: Callable[[Expr, int], Stmt]) -> Stmt:
    """The innermost loop."""
    if not isinstance(size, int):
        whole = tirx.floordiv(index(size), index(lanes))
        behind = whole * lanes
        return seq(
            loop("i", whole, lambda at: body(at * lanes, lanes)),
            loop("rest", index(size) - behind, lambda at: body(behind + at, 1)),
        )
    if size < lanes:
        return body(index(0), size)
    return seq(
        loop("i", size // lanes, lambda at: body(at * lanes, lanes)),
        body(index(size - lanes), lanes) if size % lanes else None,
    )


def _shared_out(size: int, lanes: int, machine: Machine, body: Callable[[Expr, int], Stmt]) -> Stmt:
    """One long loop, handed out to all cores in runs."""
    vectors = size // lanes
    runs = min(4 * machine.cores, max(vectors, 1))
    each = vectors // runs
    done = runs * each * lanes
    return seq(
        parallel([runs], lambda run: loop("i", each, lambda at: body((run * each + at) * lanes, lanes))),
        _row(size - done, lanes, lambda start, width: body(start + done, width)) if done < size else None,
    )


def _is_in_order(nest: Nest, inner: Any) -> bool:
    """Whether all operands are read one after the other, or stay the same, along the innermost loop."""
    return all(nest.stride(address, inner) in (0, 1) for address in nest.addresses())
