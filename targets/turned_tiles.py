"""Reading a tensor across the order in which another is written, as a transposition does: square tiles.

A tile is as many rows as a vector has lanes. It is read in vectors along its own order and turned by exchanging halves,
quarters and so on between pairs of vectors, so that no number is moved alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.ir import TensorLoad
from tvm.tirx import BufferStore, IfThenElse, Ramp, Shuffle, Var

from onnxslim.targets.emit import Expr, Size, Stmt, index, known, load_of, local, seq, substitute, vector
from onnxslim.targets.index_space import Nest
from onnxslim.targets.machine import Machine

__all__ = ["TurnedTiles", "turned_tiles"]

# More vectors than registers would be written to memory on the way.
_WIDEST = 8
# Tiles side by side, so that lines of the cache are read whole.
_TOGETHER = 2
_WORDS = ("float32", "int32")


def turned_tiles(nest: Nest, output: Any, machine: Machine) -> TurnedTiles | None:
    """Tiles for a nest some of whose operands are read along an axis that is not the innermost; None for any other."""
    lanes = min(machine.lanes(), _WIDEST)
    if len(nest.axes) < 2 or lanes < 2:
        return None
    inner, _ = nest.axes[-1]
    loads: list[TensorLoad] = []
    tvm_ffi.structural_walk(nest.value, [(TensorLoad, lambda load: loads.append(load) if len(load.indices) else None)])
    across = [load for load in loads if nest.stride(load.indices[-1], inner) not in (0, 1)]
    if not across or any(str(each.dtype) not in _WORDS for each in (output, *(load.source for load in across))):
        return None
    for position, (variable, size) in enumerate(nest.axes[:-1]):
        if all(nest.stride(load.indices[-1], variable) == 1 for load in across):
            sizes = (size, nest.axes[-1][1])
            if all(known(each) is None or each >= lanes for each in sizes):
                return TurnedTiles(nest, position, across, lanes)
    return None


class TurnedTiles:
    """How a nest is covered by tiles; the last ones overlap those before them.

    Attributes:
        axes: of the tiles, in place of those of the nest.
    """

    def __init__(self, nest: Nest, position: int, across: list[TensorLoad], lanes: int) -> None:
        self.nest, self.across, self.lanes = nest, across, lanes
        (self.outer, rows), (self.inner, columns) = nest.axes[position], nest.axes[-1]
        self.together = _TOGETHER if known(rows) is not None and rows >= _TOGETHER * lanes else 1
        self.sizes = {self.outer: (rows, self.together * lanes), self.inner: (columns, lanes)}
        others = [axis for axis in nest.axes[:-1] if not axis[0].same_as(self.outer)]
        tiles = [(variable, _tiles(*self.sizes[variable])) for variable in (self.outer, self.inner)]
        self.axes: list[tuple[Any, Size]] = [*others, *tiles]

    def or_else(self, tiled: Stmt, plain: Callable[[], Stmt]) -> Stmt:
        """``tiled`` where there is room for a tile."""
        open_sizes = [size >= width for size, width in self.sizes.values() if known(size) is None]
        return IfThenElse(tirx.all(*open_sizes), tiled, plain()) if open_sizes else tiled

    def tile(self, names: Mapping[Any, Expr], element: Callable[[Expr, Mapping[Any, Expr]], Stmt]) -> Stmt:
        """The tile whose number on each axis is given; ``element(value, names)`` stores a number."""
        row, column = (self._start(variable, names[variable]) for variable in (self.outer, self.inner))
        squares = (row + square * self.lanes for square in range(self.together))
        return seq(*(self._square({**names, self.outer: each, self.inner: column}, element) for each in squares))

    def _start(self, variable: Any, number: Expr) -> Expr:
        size, width = self.sizes[variable]
        fits = isinstance(size, int) and size % width == 0
        return number * width if fits else tirx.min(number * width, index(size) - width)

    def _square(self, first: Mapping[Any, Expr], element: Callable[[Expr, Mapping[Any, Expr]], Stmt]) -> Stmt:
        """A tile of as many columns as rows."""
        turned = [(load, *self._turned(load, first)) for load in self.across]
        slot = Var("slot", "int64")

        def load(buffer: Any, indices: list[Expr]) -> Expr | None:
            for each, rows, _ in turned:
                if buffer.same_as(each.source) and tvm_ffi.structural_equal(list(each.indices), indices):
                    return load_of(rows, slot)
            return None

        value = substitute(self.nest.value, {}, load)

        def number(row: int, lane: Expr) -> Stmt:
            place = {self.outer: first[self.outer] + row, self.inner: first[self.inner] + lane}
            return element(value, {**first, **place, slot: row * self.lanes + lane})

        rows = (vector(self.lanes, lambda lane, row=row: number(row, lane)) for row in range(self.lanes))  # type: ignore[misc]
        return seq(*(statement for _, _, statement in turned), *rows)

    def _turned(self, load: TensorLoad, first: Mapping[Any, Expr]) -> tuple[Any, Stmt]:
        """A buffer with a square's numbers, its columns first in memory, and what fills it."""
        dtype, lanes = str(load.source.dtype), self.lanes

        def read(column: int) -> Expr:
            place = substitute(load.indices[-1], {**first, self.inner: first[self.inner] + column})
            return tirx.BufferLoad(load.source, [*list(load.indices)[:-1], Ramp(place, index(1), lanes)])

        vectors, statements = [read(column) for column in range(lanes)], []
        distance = lanes
        while True:
            buffer, declared = local(lanes * lanes, dtype, name="square")
            statements.append(declared)
            for row, each in enumerate(vectors):
                statements.append(BufferStore(buffer, each, [Ramp(index(row * lanes), index(1), lanes)]))
            if distance == 1:
                return buffer, seq(*statements)
            distance //= 2
            rows = [tirx.BufferLoad(buffer, [Ramp(index(row * lanes), index(1), lanes)]) for row in range(lanes)]
            vectors = [_exchanged(rows, row, distance) for row in range(lanes)]


def _exchanged(rows: list[Expr], row: int, distance: int) -> Expr:
    """A row after the blocks of ``distance`` numbers off the diagonal have changed places with their opposites."""
    lanes = len(rows)
    upper = row & ~distance
    is_lower = row & distance
    places = [
        (place | distance if is_lower else place & ~distance) + (lanes if place & distance else 0)
        for place in range(lanes)
    ]
    return Shuffle([rows[upper], rows[upper | distance]], [tirx.const(place, "int32") for place in places])


def _tiles(size: Size, width: int) -> Size:
    return -(-size // width) if isinstance(size, int) else tirx.floordiv(index(size) + width - 1, index(width))
