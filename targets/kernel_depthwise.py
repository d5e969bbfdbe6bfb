"""Depthwise convolutions: every channel by a filter of its own.

Channels are the vector, and there is nothing to sum over them. A tile is a run of neighbouring outputs of one or two
vectors of channels: the pixels that neighbouring windows share are loaded once, the filters once for the whole run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.tirx import FloatImm, PrimFunc

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
    vector,
)
from onnxslim.targets.fused import FusedKernel, sources
from onnxslim.targets.kernel_product import NOTE, Epilogue, Window, tiles_of
from onnxslim.targets.machine import PARALLEL_WORK, Machine
from onnxslim.targets.tiling import spread

__all__ = ["write_depthwise"]


def write_depthwise(kernel: FusedKernel, machine: Machine) -> PrimFunc | None:
    """Write the kernel; None where it is no depthwise convolution."""
    step = kernel.steps[0]
    note = json.loads(step.notes.get(NOTE, "{}"))
    if note.get("kind") != "depthwise":
        return None
    epilogue = Epilogue(kernel, step)
    found = sources(step)
    if not epilogue.can_be_written or len(found) != 2 or not all(kernel.is_parameter(each) for each in found):
        return None
    return function(kernel.parameters, _Depthwise(epilogue, found[0], found[1], note, machine).body())


class _Depthwise:
    """One kernel on its way to be written."""

    def __init__(self, epilogue: Epilogue, data: Any, weight: Any, note: dict[str, Any], machine: Machine) -> None:
        self.epilogue, self.data, self.weight, self.machine = epilogue, data, weight, machine
        shape: list[Any] = [size if known(size) is None else known(size) for size in epilogue.product.output.shape]
        source: list[Any] = [size if known(size) is None else known(size) for size in data.shape]
        axes = zip(
            source[1:-1], shape[1:-1], note["kernel"], note["strides"], note["dilations"], note["pads"], strict=False
        )
        self.windows = [Window(*axis) for axis in axes]
        self.one_dimensional = len(self.windows) == 1
        if self.one_dimensional:
            self.windows.insert(0, Window(1, 1, 1, 1, 1, 0))
        self.images: Size = shape[0]
        self.channels = int(shape[-1])
        self.lanes = machine.lanes()
        # Two vectors of 32 bytes are a cache line; a run of outputs takes the registers that filters and pixels leave.
        self.vectors = 2 if self.channels >= 2 * self.lanes and machine.vector_bits < 512 else 1
        self.rows = max(1, min((machine.registers - 2 - self.vectors) // self.vectors, 8))

    def place(self, image: Expr, y: Expr, x: Expr) -> list[Expr]:
        """The indices of a pixel."""
        return [image, x] if self.one_dimensional else [image, y, x]

    def body(self) -> Stmt:
        """Rows of images on all cores; in a row, runs of outputs and blocks of channels."""
        vertical, horizontal = self.windows
        wide = self.vectors * self.lanes
        blocks = self.channels // wide
        taps = vertical.kernel * horizontal.kernel
        stays = 4 * self.channels * taps <= self.machine.l1_bytes // 2

        def channels(body: Callable[[Expr, int], Stmt]) -> Stmt:
            statements = [loop("block", blocks, lambda block: body(block * wide, wide))] if blocks else []
            start = blocks * wide
            while start < self.channels:
                width = min(self.lanes, self.channels - start)
                statements.append(body(index(start), width))
                start += width
            return seq(*statements)

        def line(image: Expr, y: Expr) -> Stmt:
            if stays:
                # Filters stay in the cache, so pixels may be read in the order in which they lie in memory.
                return self._line(
                    lambda *tile, **edge: channels(lambda c, w: self._tile(image, y, tile[0], tile[1], c, w, **edge))
                )
            return channels(
                lambda c, w: self._line(lambda *tile, **edge: self._tile(image, y, tile[0], tile[1], c, w, **edge))
            )

        return parallel([self.images, vertical.outputs], line, serial=self._is_small())

    def _is_small(self) -> bool:
        outputs = math.prod(known(size) or 64 for size in self.epilogue.product.output.shape)
        return outputs * math.prod(window.kernel for window in self.windows) < PARALLEL_WORK

    def _line(self, tile: Callable[..., Stmt]) -> Stmt:
        """A row of outputs, cut into tiles: where each starts, how long it is, and how its edges are handled."""
        window = self.windows[1]
        outputs = known(window.outputs)
        start, stop = window.inside()
        if outputs is None or known(window.size) is None or known(stop) is None:
            tiles = tirx.floordiv(index(stop) - start, index(self.rows))
            behind = index(start) + tiles * self.rows
            right = tirx.max(index(window.outputs) - behind, index(0))
            left = tirx.min(index(start), index(window.outputs))
            return seq(
                loop("left", left, lambda x: tile(x, 1, bounded=True)) if start else None,
                loop("tile", tiles, lambda number: tile(number * self.rows + start, self.rows)),
                loop("right", right, lambda x: tile(behind + x, 1, bounded=True)),
            )
        statements, place = [], 0
        for size, inside, count in tiles_of(spread(outputs, self.rows), start, stop, alike=window.is_long):
            if inside or window.is_long:
                run = place, size, not inside
                statements.append(loop("tile", count, lambda n, r=run: tile(n * r[1] + r[0], r[1], bounded=r[2])))  # type: ignore[misc]
            else:
                statements.append(tile(index(place), size, edge=place))
            place += size * count
        return seq(*statements)

    def _tile(
        self,
        image: Expr,
        y: Expr,
        x: Expr,
        rows: int,
        channel: Expr,
        width: int,
        *,
        edge: int | None = None,
        bounded: bool = False,
    ) -> Stmt:
        """A run of ``rows`` outputs from ``x`` on, of ``width`` channels from ``channel`` on; see kernel_product."""
        vertical, horizontal = self.windows
        parts = [(at, min(self.lanes, width - at)) for at in range(0, width, self.lanes)]
        sums, declared = local(rows * len(parts) * self.lanes)

        def slot(row: int, part: int) -> int:
            return (row * len(parts) + part) * self.lanes

        def add(tap_y: Expr, tap_x: Size, row: int, part: int) -> Stmt:
            at, lanes = parts[part]
            source_y = y * vertical.stride + tap_y * vertical.dilation - vertical.before
            source_x = (x + row) * horizontal.stride + index(tap_x) * horizontal.dilation - horizontal.before

            def multiply(lane: Expr) -> Stmt:
                pixel = load_of(self.data, *self.place(image, source_y, source_x), channel + at + lane)
                weight = load_of(self.weight, tap_y * horizontal.kernel + index(tap_x), channel + at + lane)
                return store(sums, load_of(sums, lane + slot(row, part)) + pixel * weight, lane + slot(row, part))

            return vector(lanes, multiply)

        def loop_of_taps(tap_y: Expr, first: Expr, count: Size, present: Sequence[int]) -> Stmt:
            def all_of(tap: Expr) -> Stmt:
                return seq(*(add(tap_y, first + tap, row, part) for part in range(len(parts)) for row in present))

            return loop("tap_x", count, all_of)

        def taps(tap_y: Expr) -> Stmt:
            if bounded:
                return seq(*(loop_of_taps(tap_y, *part) for part in horizontal.bounds(x, rows)))
            if horizontal.is_long:
                return loop_of_taps(tap_y, index(0), horizontal.kernel, range(rows))
            return seq(
                *(
                    add(tap_y, tap, row, part)
                    for tap in range(horizontal.kernel)
                    for part in range(len(parts))
                    for row in range(rows)
                    if edge is None or horizontal.contains(edge + row, tap)
                )
            )

        def clear(row: int, part: int) -> Stmt:
            at, lanes = slot(row, part), parts[part][1]
            return vector(lanes, lambda lane: store(sums, FloatImm("float32", 0.0), lane + at))

        def finish(row: int, part: int) -> Stmt:
            start, lanes = parts[part]
            at = slot(row, part)
            return vector(
                lanes,
                lambda lane: self.epilogue.store(
                    [*self.place(image, y, x + row), channel + start + lane], load_of(sums, lane + at)
                ),
            )

        every = [(row, part) for row in range(rows) for part in range(len(parts))]
        if vertical.overhangs:
            first = vertical.first(y)
            main = loop("tap_y", tirx.max(vertical.last(y) - first, index(0)), lambda tap: taps(first + tap))
        else:
            main = loop("tap_y", vertical.kernel, taps)
        return seq(declared, *(clear(*each) for each in every), main, *(finish(*each) for each in every))
