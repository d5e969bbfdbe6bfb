"""Running sums along an axis: columns that lie next to each other are added up together, in vectors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from tvm import te, tirx
from tvm.tirx import PrimFunc

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
    vector,
)
from onnxslim.targets.fused import FusedKernel, Step, sources
from onnxslim.targets.kernel_product import NOTE
from onnxslim.targets.machine import PARALLEL_WORK, Machine

__all__ = ["running_sum", "write_running_sum"]

# Vectors of sums that a core can keep in registers.
_IN_REGISTERS = 8
# Vectors that are added up together: the longer what is read of each row, the fewer pages are open at a time.
_WIDEST = 32


def running_sum(x: Any, axis: int, *, exclusive: bool, backwards: bool) -> Any:
    """The tensor expression, whose kernel must have no other step.

    Args:
        x: a tensor.
        axis: along which axis to add up, counted from the first.
        exclusive: whether a sum leaves out the element at its own place.
        backwards: whether the last element comes first.
    """
    note = {"kind": "running sum", "axis": axis, "exclusive": exclusive, "backwards": backwards}
    other = te.reduce_axis((0, x.shape[axis]), "other")

    def element(*place: Any) -> Any:
        ahead = place[axis] - other.var if not backwards else other.var - place[axis]
        value = x(*place[:axis], other.var, *place[axis + 1 :])
        return te.sum(tirx.if_then_else(ahead >= int(exclusive), value, tirx.const(0, x.dtype)), axis=other)

    return te.compute(x.shape, element, name="running_sum", attrs={NOTE: json.dumps(note)})


def write_running_sum(kernel: FusedKernel, machine: Machine) -> PrimFunc | None:
    """Write the kernel; None where it is no running sum."""
    step = kernel.steps[0]
    note = json.loads(step.notes.get(NOTE, "{}"))
    if note.get("kind") != "running sum":
        return None
    return function(kernel.parameters, _Writer(step, note, machine).body())


class _Writer:
    def __init__(self, step: Step, note: dict[str, Any], machine: Machine) -> None:
        (self.source,) = sources(step)
        self.result = step.output
        self.exclusive, self.backwards = bool(note["exclusive"]), bool(note["backwards"])
        self.dtype = str(self.source.dtype)
        self.lanes, self.cores = machine.lanes(self.dtype), machine.cores
        axis = int(note["axis"])
        whole = [known(size) for size in self.source.shape]
        shape: list[Size] = [
            size if each is None else each for each, size in zip(whole, self.source.shape, strict=True)
        ]
        self.steps = shape[axis]
        self.outer, self.inner = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
        self.is_small = None not in whole and math.prod(shape) < PARALLEL_WORK

    def body(self) -> Stmt:
        """All columns: each has a place before the axis, and one behind it."""
        if isinstance(self.inner, int):
            vectors, rest = divmod(self.inner, self.lanes)
            widest = min(_WIDEST, max(_IN_REGISTERS, vectors // (2 * self.cores)))
            widths = [widest * self.lanes, _IN_REGISTERS * self.lanes, self.lanes, rest or 1]
            return seq(*(self._run(*run) for run in cut(self.inner, widths)))
        wide = _WIDEST * self.lanes
        blocks = tirx.floordiv(self.inner, index(wide))
        vectors = tirx.floordiv(self.inner - blocks * wide, index(self.lanes))
        done = blocks * wide + vectors * self.lanes
        runs = [(0, wide, blocks), (blocks * wide, self.lanes, vectors), (done, 1, self.inner - done)]
        return seq(*(self._run(*run) for run in runs))

    def _run(self, start: Size, width: int, count: Size) -> Stmt:
        def task(row: Expr, number: Expr) -> Stmt:
            return self._columns(row, number * width + start, width)

        return parallel([self.outer, count], task, serial=self.is_small)

    def _columns(self, row: Expr, first: Expr, width: int) -> Stmt:
        """``width`` columns, from the ``first`` on, of a row."""
        sums, declared = local(width, self.dtype)

        def step(count: Expr) -> Stmt:
            at = self.steps - 1 - count if self.backwards else count
            base = (row * self.steps + at) * self.inner + first

            def column(lane: Expr) -> Stmt:
                add = store(sums, load_of(sums, lane) + load_of(self.source, *self._place(base + lane)), lane)
                write = store(self.result, load_of(sums, lane), *self._place(base + lane))
                return seq(write, add) if self.exclusive else seq(add, write)

            return self._each(width, column)

        cleared = self._each(width, lambda lane: store(sums, tirx.const(0, self.dtype), lane))
        return seq(declared, cleared, loop("step", self.steps, step))

    def _each(self, width: int, body: Callable[[Expr], Stmt]) -> Stmt:
        """``body`` for some columns, all at once where their sums fit the registers."""
        if width <= _IN_REGISTERS * self.lanes:
            return vector(width, body)
        return loop(
            "part", width // self.lanes, lambda part: vector(self.lanes, lambda lane: body(part * self.lanes + lane))
        )

    def _place(self, flat: Expr) -> list[Any]:
        """A place in memory: TVM adds up indices by their strides, and the last one's is 1."""
        return [*[0] * (len(self.source.shape) - 1), flat]
