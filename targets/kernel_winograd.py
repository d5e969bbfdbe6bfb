"""3x3 convolutions of stride 1 by Winograd's minimal filtering: F(4x4, 3x3).

A tile of 4x4 outputs takes 36 products of each pair of channels instead of 144. Windows of 6x6 pixels and the filters
are transformed, multiplied element by element, that is, as 36 products of matrices [tiles, inputs] x [inputs, outputs],
and what comes out is transformed back, with all that follows done on the way to memory. Filters are transformed when
compiling, which makes them four times as large: only layers of few channels, whose time lies in their many pixels, are
worth that (Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2015).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx import AllocBuffer, FloatImm, IfThenElse, PrimFunc, decl_buffer

from onnxslim.targets.emit import Expr, Stmt, function, index, load_of, local, loop, parallel, seq, store, vector
from onnxslim.targets.fused import FusedKernel, sources
from onnxslim.targets.kernel_product import NOTE, Epilogue
from onnxslim.targets.machine import Machine

__all__ = ["TILE", "WINDOW", "pays", "transform_filters", "untransformed", "write_winograd"]

TILE = 4
WINDOW = TILE + 2

# For the points 0, 1, -1, 2, -2 and infinity.
_PIXELS = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    np.float64,
)
_FILTERS = np.array(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
    np.float64,
)
_OUTPUTS = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], np.float64)

# Transformed filters of one layer may take this many bytes: 256 inputs by 256 outputs.
_MOST_BYTES = 10 << 20
# Cycles that the transforms cost for each tile and channel, before and behind the products.
_BEFORE, _BEHIND = 16, 14


def pays(images: int, height: int, width: int, inputs: int, outputs: int) -> bool:
    """Whether a convolution is faster so, and its transformed filters not too large.

    Args:
        images: the batch.
        height, width: of the output.
        inputs, outputs: channels.
    """
    if 4 * WINDOW * WINDOW * inputs * outputs > _MOST_BYTES or min(inputs, outputs) < TILE * TILE:
        return False
    tiles = images * math.ceil(height / TILE) * math.ceil(width / TILE)
    per_cycle = 16
    direct = images * height * width * 9 * inputs * outputs / per_cycle
    here = tiles * (WINDOW * WINDOW * inputs * outputs / per_cycle + _BEFORE * inputs + _BEHIND * outputs)
    return tiles >= 12 and here < 0.75 * direct


def transform_filters(weights: np.ndarray, panel: int) -> np.ndarray:
    """[outputs, 3, 3, inputs] -> [panels, 36, inputs, panel], zeros behind the last output."""
    outputs, inputs = weights.shape[0], weights.shape[-1]
    panels = math.ceil(outputs / panel)
    made = np.einsum("ay,bx,oyxi->abio", _FILTERS, _FILTERS, weights.astype(np.float64))
    packed = np.zeros((WINDOW * WINDOW, inputs, panels * panel), np.float32)
    packed[:, :, :outputs] = made.reshape(WINDOW * WINDOW, inputs, outputs)
    return np.ascontiguousarray(packed.reshape(WINDOW * WINDOW, inputs, panels, panel).transpose(2, 0, 1, 3))


def untransformed(load: Callable[[int], Expr], row: Expr, column: Expr) -> Expr:
    """The tap of a filter from its transform: what the convolution is, for whoever does not multiply transforms.

    Args:
        load: the expression of one of the 36 transformed numbers.
        row, column: which tap.
    """
    # The first tap is 4 times the first number, the second 3 times (third - second), the third the last.
    back = np.array([[4, 0, 0, 0, 0, 0], [0, -3, 3, 0, 0, 0], [0, 0, 0, 0, 0, 1]], np.float64)
    value: Expr = FloatImm("float32", 0.0)
    for y in range(3):
        for x in range(3):
            terms = [
                (float(back[y, a] * back[x, b]), load(a * WINDOW + b))
                for a in range(WINDOW)
                for b in range(WINDOW)
                if back[y, a] * back[x, b]
            ]
            tap = _combine(terms)
            value = tirx.Select(tirx.all(row == y, column == x), tap, value)
    return value


def _combine(terms: Sequence[tuple[float, Expr]]) -> Expr:
    """The sum of numbers by constant factors."""
    total = None
    for factor, value in terms:
        term = value if abs(factor) == 1 else value * FloatImm("float32", abs(factor))
        if total is None:
            total = term if factor > 0 else FloatImm("float32", 0.0) - term
        else:
            total = total + term if factor > 0 else total - term
    return FloatImm("float32", 0.0) if total is None else total


def write_winograd(kernel: FusedKernel, machine: Machine) -> PrimFunc | None:
    """Write the kernel; None where it is no such convolution."""
    step = kernel.steps[0]
    note = json.loads(step.notes.get(NOTE, "{}"))
    if note.get("kind") != "winograd":
        return None
    epilogue = Epilogue(kernel, step)
    found = sources(step)
    if not epilogue.can_be_written or len(found) != 2 or not all(kernel.is_parameter(each) for each in found):
        return None
    return function(kernel.parameters, _Winograd(epilogue, found[0], found[1], note, machine).body())


class _Winograd:
    """One kernel on its way to be written."""

    def __init__(self, epilogue: Epilogue, data: Any, weight: Any, note: dict[str, Any], machine: Machine) -> None:
        self.epilogue, self.data, self.weight, self.machine = epilogue, data, weight, machine
        self.images, self.height, self.width, self.outputs = (int(size) for size in epilogue.product.output.shape)
        self.source_height, self.source_width, self.inputs = (int(size) for size in list(data.shape)[1:])
        self.top, self.left = (int(pad) for pad in note["pads"][:2])
        self.panel, self.rows = int(note["panel"]), int(note["rows"])
        self.panels = math.ceil(self.outputs / self.panel)
        self.lanes = machine.lanes()
        self.down, self.across = math.ceil(self.height / TILE), math.ceil(self.width / TILE)
        self.tiles = self.images * self.down * self.across
        self.blocks, self.block = self._cut()

    def _cut(self) -> tuple[int, int]:
        """How many blocks of how many tiles: a block's transformed pixels stay in the second cache."""
        fits = self.machine.l2_bytes * 5 // 8 // (4 * WINDOW * WINDOW * self.inputs)
        most = max(self.rows, fits // self.rows * self.rows)
        blocks = math.ceil(self.tiles / most)
        cores = self.machine.cores
        if blocks % cores and self.tiles >= 2 * cores * self.rows:
            blocks += cores - blocks % cores
        block = math.ceil(math.ceil(self.tiles / blocks) / self.rows) * self.rows
        return math.ceil(self.tiles / block), block

    def body(self) -> Stmt:
        """Blocks of tiles on all cores: transform the pixels; for each panel multiply and transform back."""

        def task(number: Expr) -> Stmt:
            pixels = decl_buffer(
                tuple(map(index, (WINDOW * WINDOW, self.block, self.inputs))), "float32", name="pixels"
            )
            sums = decl_buffer(tuple(map(index, (WINDOW * WINDOW, self.block, self.panel))), "float32", name="products")

            def panel(place: Expr) -> Stmt:
                multiply = loop(
                    "point",
                    WINDOW * WINDOW,
                    lambda point: loop(
                        "rows",
                        self.block // self.rows,
                        lambda part: self._multiply(pixels, sums, place, point, part * self.rows),
                    ),
                )
                back = loop("tile", self.block, lambda tile: self._write(sums, place, number, tile))
                return seq(multiply, back)

            return seq(
                AllocBuffer(pixels),
                AllocBuffer(sums),
                loop("tile", self.block, lambda tile: self._read(pixels, number, tile)),
                loop("panel", self.panels, panel),
            )

        return parallel([self.blocks], task)

    def _tile(self, number: Expr, tile: Expr) -> tuple[Expr, Expr, Expr]:
        """Image, row and column of a tile; those behind the last are the last once more."""
        flat = number * self.block + tile
        if self.blocks * self.block != self.tiles:
            flat = tirx.min(flat, index(self.tiles - 1))
        column, rest = tirx.floormod(flat, index(self.across)), tirx.floordiv(flat, index(self.across))
        return tirx.floordiv(rest, index(self.down)), tirx.floormod(rest, index(self.down)), column

    def _read(self, pixels: Any, number: Expr, tile: Expr) -> Stmt:
        """Transform the pixels of a tile's window."""
        image, down, across = self._tile(number, tile)
        y, x = down * TILE - self.top, across * TILE - self.left
        inside = tirx.all(y >= 0, y + WINDOW <= self.source_height, x >= 0, x + WINDOW <= self.source_width)
        whole = self.inputs // self.lanes

        def channels(guarded: bool) -> Stmt:
            def at(channel: Expr, lanes: int) -> Stmt:
                return self._read_vector(pixels, tile, image, y, x, channel, lanes, guarded=guarded)

            rest = self.inputs - whole * self.lanes
            return seq(
                loop("block", whole, lambda block: at(block * self.lanes, self.lanes)) if whole else None,
                at(index(whole * self.lanes), rest) if rest else None,
            )

        return IfThenElse(inside, channels(False), channels(True))

    def _read_vector(
        self,
        pixels: Any,
        tile: Expr,
        image: Expr,
        y: Expr,
        x: Expr,
        channel: Expr,
        lanes: int,
        *,
        guarded: bool,
    ) -> Stmt:
        half, half_declared = local(WINDOW * WINDOW * lanes, name="half")
        window, window_declared = local(WINDOW * lanes, name="column")
        statements: list[Stmt] = [half_declared, window_declared]
        for column in range(WINDOW):
            for row in range(WINDOW):
                at = row * lanes
                load = vector(
                    lanes,
                    lambda lane, at=at, row=row, column=column: store(  # type: ignore[misc]
                        window, load_of(self.data, image, y + row, x + column, channel + lane), lane + at
                    ),
                )
                if guarded:
                    there = tirx.all(
                        y + row >= 0, y + row < self.source_height, x + column >= 0, x + column < self.source_width
                    )
                    empty = vector(lanes, lambda lane, at=at: store(window, FloatImm("float32", 0.0), lane + at))  # type: ignore[misc]
                    load = IfThenElse(there, load, empty)
                statements.append(load)
            for row in range(WINDOW):
                statements.append(_apply(_PIXELS[row], lanes, window, 0, lanes, half, (row * WINDOW + column) * lanes))
        for row in range(WINDOW):
            for column in range(WINDOW):

                def finish(lane: Expr, row: int = row, column: int = column) -> Stmt:
                    terms = [
                        (float(factor), load_of(half, lane + (row * WINDOW + place) * lanes))
                        for place, factor in enumerate(_PIXELS[column])
                        if factor
                    ]
                    return store(pixels, _combine(terms), row * WINDOW + column, tile, channel + lane)

                statements.append(vector(lanes, finish))
        return seq(*statements)

    def _multiply(self, pixels: Any, products: Any, panel: Expr, point: Expr, first: Expr) -> Stmt:
        """One of the 36 matrix products, for a few tiles and a panel of outputs."""
        vectors = self.panel // self.lanes
        sums, declared = local(self.rows * self.panel)

        def each(make: Callable[[int, int], Stmt]) -> list[Stmt]:
            return [make(row, part) for row in range(self.rows) for part in range(vectors)]

        def slot(row: int, part: int) -> int:
            return row * self.panel + part * self.lanes

        def clear(row: int, part: int) -> Stmt:
            return vector(self.lanes, lambda lane: store(sums, FloatImm("float32", 0.0), lane + slot(row, part)))

        def write(row: int, part: int) -> Stmt:
            return vector(
                self.lanes,
                lambda lane: store(
                    products, load_of(sums, lane + slot(row, part)), point, first + row, lane + part * self.lanes
                ),
            )

        def add(depth: Expr) -> Stmt:
            def one(row: int, part: int) -> Stmt:
                factor = load_of(pixels, point, first + row, depth)
                return vector(
                    self.lanes,
                    lambda lane: store(
                        sums,
                        load_of(sums, lane + slot(row, part))
                        + factor * load_of(self.weight, panel, point, depth, lane + part * self.lanes),
                        lane + slot(row, part),
                    ),
                )

            return seq(*each(one))

        return seq(declared, *each(clear), loop("depth", self.inputs, add), *each(write))

    def _write(self, products: Any, panel: Expr, number: Expr, tile: Expr) -> Stmt:
        """Transform a tile of a panel back and store it."""
        tail = self.outputs - (self.panels - 1) * self.panel
        if tail == self.panel:
            return self._write_columns(products, panel, number, tile, self.panel)
        last = self._write_columns(products, index(self.panels - 1), number, tile, tail)
        if self.panels == 1:
            return last
        whole = self._write_columns(products, panel, number, tile, self.panel)
        return IfThenElse(panel < self.panels - 1, whole, last)

    def _write_columns(self, products: Any, panel: Expr, number: Expr, tile: Expr, width: int) -> Stmt:
        image, down, across = self._tile(number, tile)
        statements = []
        for start in range(0, width, self.lanes):
            lanes = min(self.lanes, width - start)
            half, declared = local(TILE * WINDOW * lanes, name="half")
            statements.append(declared)
            for column in range(WINDOW):
                for row in range(TILE):

                    def transform(lane: Expr, row: int = row, column: int = column, start: int = start) -> Stmt:
                        terms = [
                            (float(factor), load_of(products, place * WINDOW + column, tile, lane + start))
                            for place, factor in enumerate(_OUTPUTS[row])
                            if factor
                        ]
                        return store(half, _combine(terms), lane + (row * WINDOW + column) * lanes)  # noqa: B023

                    statements.append(vector(lanes, transform))
            channel = panel * self.panel + start
            for row in range(TILE):
                for column in range(TILE):
                    statements.append(self._finish(half, lanes, image, down, across, row, column, channel))
        return seq(*statements)

    def _finish(
        self, half: Any, lanes: int, image: Expr, down: Expr, across: Expr, row: int, column: int, channel: Expr
    ) -> Stmt:
        y, x = down * TILE + row, across * TILE + column

        def write(lane: Expr) -> Stmt:
            terms = [
                (float(factor), load_of(half, lane + (row * WINDOW + place) * lanes))
                for place, factor in enumerate(_OUTPUTS[column])
                if factor
            ]
            return self.epilogue.store([image, y, x, channel + lane], _combine(terms))

        stored = vector(lanes, write)
        guards = []
        if self.height % TILE and row >= self.height % TILE:
            guards.append(y < self.height)
        if self.width % TILE and column >= self.width % TILE:
            guards.append(x < self.width)
        return IfThenElse(tirx.all(*guards), stored, None) if guards else stored


def _apply(factors: np.ndarray, step: int, source: Any, first: int, lanes: int, target: Any, at: int) -> Stmt:
    """``target[at]`` = the vectors of ``source`` by constant factors."""

    def write(lane: Expr) -> Stmt:
        terms = [
            (float(factor), load_of(source, lane + (first + place * step)))
            for place, factor in enumerate(factors)
            if factor
        ]
        return store(target, _combine(terms), lane + at)

    return vector(lanes, write)
