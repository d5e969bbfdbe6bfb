"""Products of two computed tensors, such as attention's: batches of matrices of which neither is known when compiling.

Any step that adds up products of two operands is taken, whatever its indices are: the last axis of the output gives the
vectors, another one that the second operand does not depend on gives the rows of a tile, all others are batches. Where
the second operand does not lie in memory in the order in which a tile reads it, or its rows lie far apart, the columns
of a tile are first copied into a panel of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.ir import TensorLoad
from tvm.tirx import Add, AllocBuffer, FloatImm, Mul, PrimFunc, decl_buffer

from onnxslim.targets.emit import (
    Expr,
    Size,
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
from onnxslim.targets.fused import Axis, FusedKernel, Step
from onnxslim.targets.kernel_product import Epilogue
from onnxslim.targets.machine import PARALLEL_WORK, Machine
from onnxslim.targets.tiling import best_tile, spread

__all__ = ["write_contraction"]

# Rows of the second operand that lie further apart than this are copied: the prefetcher does not follow them.
_FAR = 2048


def write_contraction(kernel: FusedKernel, machine: Machine) -> PrimFunc | None:
    """Write the kernel; None where it is no sum of products of two inputs."""
    operands = _operands(kernel)
    if operands is None:
        return None
    epilogue = Epilogue(kernel, kernel.steps[0])
    if not epilogue.can_be_written:
        return None
    contraction = _Contraction.of(epilogue, *operands, machine)
    return None if contraction is None else function(kernel.parameters, contraction.body())


def _operands(kernel: FusedKernel) -> tuple[TensorLoad, TensorLoad] | None:
    """The two loads that are multiplied."""
    step = kernel.steps[0]
    value = step.value
    if step.start is None or not isinstance(value, Add) or not isinstance(value.b, Mul) or not step.reduced:
        return None
    loads = (value.b.a, value.b.b)
    if not all(isinstance(load, TensorLoad) and kernel.is_parameter(load.source) for load in loads):
        return None
    names = [axis.variable for axis in step.spatial]
    same_order = len(names) == len(step.indices) and all(
        place.same_as(name) for place, name in zip(step.indices, names, strict=True)
    )
    is_sum = isinstance(step.start, FloatImm) and float(step.start.value) == 0.0
    floats = str(step.output.dtype) == "float32" and all(str(load.source.dtype) == "float32" for load in loads)
    return loads if same_order and is_sum and floats else None


def _depends(expressions: Any, variable: Any) -> bool:
    return any(
        any(each.same_as(variable) for each in tirx.analysis.undefined_vars(expression)) for expression in expressions
    )


class _Contraction:
    """One kernel on its way to be written."""

    def __init__(
        self,
        epilogue: Epilogue,
        left: TensorLoad,
        right: TensorLoad,
        row: Axis | None,
        machine: Machine,
    ) -> None:
        self.epilogue, self.left, self.right, self.machine = epilogue, left, right, machine
        step = epilogue.product
        self.column: Axis = step.spatial[-1]
        self.row = row
        self.batch = [axis for axis in step.spatial[:-1] if row is None or not axis.variable.same_as(row.variable)]
        self.lanes = machine.lanes()
        self.columns = int(self.column.extent)
        rows = 1 if row is None else row.extent
        self.row_count: Size = rows
        tile = best_tile(rows if isinstance(rows, int) else None, self.columns, self.lanes, machine)
        self.rows = tile.rows
        self.panel = min(tile.vectors * self.lanes, self.columns)
        self.panels = math.ceil(self.columns / self.panel)
        self.packs = False

    @classmethod
    def of(cls, epilogue: Epilogue, left: TensorLoad, right: TensorLoad, machine: Machine) -> _Contraction | None:
        step = epilogue.product
        if not step.spatial or not isinstance(step.spatial[-1].extent, int):
            return None
        column = step.spatial[-1].variable
        if _depends(left.indices, column):
            left, right = right, left
        if _depends(left.indices, column) or not _depends(right.indices, column):
            return None
        rows = [
            axis
            for axis in step.spatial[:-1]
            if axis.extent != 1 and _depends(left.indices, axis.variable) and not _depends(right.indices, axis.variable)
        ]
        made = cls(epilogue, left, right, rows[-1] if rows else None, machine)
        last = right.indices[-1]
        contiguous = last.same_as(column) and not _depends(list(right.indices)[:-1], column)
        many = not isinstance(made.row_count, int) or made.row_count >= 2 * made.rows
        can_pack = len(step.reduced) == 1 and isinstance(step.reduced[0].extent, int)
        if contiguous:
            width = known(right.source.shape[-1])
            made.packs = many and can_pack and (width is None or 4 * width >= _FAR)
            return made
        made.packs = can_pack and (not isinstance(made.row_count, int) or made.row_count >= 4)
        return made if made.packs else None

    def body(self) -> Stmt:
        """Batches and panels on all cores; in each, runs of rows."""
        sizes = [axis.extent for axis in self.batch]
        blocks = self._row_blocks()

        def task(*place: Expr) -> Stmt:
            names = {axis.variable: at for axis, at in zip(self.batch, place[:-2], strict=True)}
            return self._panel(names, place[-2], place[-1], blocks)

        work = math.prod(axis.extent if isinstance(axis.extent, int) else 64 for axis in self.epilogue.product.axes)
        return parallel([*sizes, self.panels, blocks], task, serial=work < PARALLEL_WORK)

    def _row_blocks(self) -> int:
        """Into how many parts rows are cut so that every core has some, where batches and panels are too few."""
        tasks = self.panels * math.prod(axis.extent if isinstance(axis.extent, int) else 4 for axis in self.batch)
        if self.packs or not isinstance(self.row_count, int) or tasks % self.machine.cores == 0:
            return 1
        tiles = len(spread(self.row_count, self.rows))
        return math.gcd(tiles, self.machine.cores) if tasks < 4 * self.machine.cores else 1

    def _panel(self, names: dict[Any, Expr], panel: Expr, block: Expr, blocks: int) -> Stmt:
        tail = self.columns - (self.panels - 1) * self.panel
        if tail == self.panel:
            return self._columns(names, panel, self.panel, block, blocks)
        last = self._columns(names, index(self.panels - 1), tail, block, blocks)
        if self.panels == 1:
            return last
        return tirx.IfThenElse(panel < self.panels - 1, self._columns(names, panel, self.panel, block, blocks), last)

    def _columns(self, names: dict[Any, Expr], panel: Expr, width: int, block: Expr, blocks: int) -> Stmt:
        start = panel * self.panel
        copied = None
        statements: list[Stmt] = []
        if self.packs:
            depth = self.epilogue.product.reduced[0]
            copied = decl_buffer((index(depth.extent * width),), "float32", name="panel")
            statements = [AllocBuffer(copied), self._copy(copied, names, start, width)]
        statements.append(self._rows(names, start, width, copied, block, blocks))
        return seq(*statements)

    def _copy(self, copied: Any, names: dict[Any, Expr], start: Expr, width: int) -> Stmt:
        depth = self.epilogue.product.reduced[0]

        def row(at: Expr) -> Stmt:
            def number(lane: Expr) -> Stmt:
                value = substitute(self.right, {**names, self.column.variable: start + lane, depth.variable: at})
                return store(copied, value, at * width + lane)

            whole = width // self.lanes * self.lanes
            parts = [vector(self.lanes, lambda lane, at=at: number(lane + at)) for at in range(0, whole, self.lanes)]  # type: ignore[misc]
            if whole < width:
                parts.append(vector(width - whole, lambda lane: number(lane + whole)))
            return seq(*parts)

        return loop("depth", depth.extent, row)

    def _rows(
        self, names: dict[Any, Expr], start: Expr, width: int, copied: Any | None, block: Expr, blocks: int
    ) -> Stmt:
        def tile(first: Expr, rows: int) -> Stmt:
            return self._tile(names, start, width, first, rows, copied)

        if not isinstance(self.row_count, int):
            tiles = tirx.floordiv(index(self.row_count), index(self.rows))
            behind = tiles * self.rows
            return seq(
                loop("tile", tiles, lambda number: tile(number * self.rows, self.rows)),
                loop("rest", index(self.row_count) - behind, lambda number: tile(behind + number, 1)),
            )
        if blocks > 1:
            # A tile that overlaps the one before it computes some rows twice, and all tiles stay equal.
            count = len(spread(self.row_count, self.rows)) // blocks
            rows = max(spread(self.row_count, self.rows))
            limit = self.row_count - rows
            return loop(
                "tile", count, lambda number: tile(tirx.min((block * count + number) * rows, index(limit)), rows)
            )
        statements, first = [], 0
        widths = spread(self.row_count, self.rows)
        for rows in sorted(set(widths), reverse=True):
            count = widths.count(rows)
            statements.append(loop("tile", count, lambda number, f=first, r=rows: tile(number * r + f, r)))  # type: ignore[misc]
            first += rows * count
        return seq(*statements)

    def _tile(
        self, names: dict[Any, Expr], start: Expr, width: int, first: Expr, rows: int, copied: Any | None
    ) -> Stmt:
        step: Step = self.epilogue.product
        parts = [(at, min(self.lanes, width - at)) for at in range(0, width, self.lanes)]
        wide = len(parts) * self.lanes
        sums, declared = local(rows * wide)

        def row_name(row: int) -> dict[Any, Expr]:
            return {} if self.row is None else {self.row.variable: first + row}

        def each(make: Callable[[int, int, int], Stmt]) -> list[Stmt]:
            return [make(row, at, lanes) for row in range(rows) for at, lanes in parts]

        def clear(row: int, at: int, lanes: int) -> Stmt:
            return vector(lanes, lambda lane: store(sums, FloatImm("float32", 0.0), lane + (row * wide + at)))

        def finish(row: int, at: int, lanes: int) -> Stmt:
            def write(lane: Expr) -> Stmt:
                known_names = {**names, **row_name(row), self.column.variable: start + at + lane}
                place = [known_names[axis.variable] for axis in step.spatial]
                return self.epilogue.store(place, load_of(sums, lane + (row * wide + at)))

            return vector(lanes, write)

        def add(depth: dict[Any, Expr]) -> Stmt:
            statements = []
            for row in range(rows):
                factor = substitute(self.left, {**names, **row_name(row), **depth})
                for at, lanes in parts:

                    def multiply(lane: Expr, row: int = row, at: int = at, factor: Expr = factor) -> Stmt:
                        if copied is None:
                            column = {self.column.variable: start + at + lane}
                            other = substitute(self.right, {**names, **depth, **column})
                        else:
                            (deep,) = depth.values()
                            other = load_of(copied, deep * width + at + lane)
                        slot = lane + (row * wide + at)
                        return store(sums, load_of(sums, slot) + factor * other, slot)

                    statements.append(vector(lanes, multiply))
            return seq(*statements)

        def depths(axes: list[Axis], chosen: dict[Any, Expr]) -> Stmt:
            if not axes:
                return add(chosen)
            axis, *others = axes
            return loop("depth", axis.extent, lambda at: depths(others, {**chosen, axis.variable: at}))

        return seq(declared, *each(clear), depths(step.reduced, {}), *each(finish))
