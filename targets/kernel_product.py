"""Convolutions and matrix products by a constant: sums of products of pixels and packed weights.

Both are the same loop. Every element of a tile of ``rows`` pixels by ``vectors`` vectors of output channels has its sum
in a register; a step along the inputs loads the vectors of weights, and each pixel's number once, as a broadcast.
Weights lie packed in the order in which they are read: panels of as many output channels as a tile is wide, in a panel
the taps of the window, in a tap the input channels. Tensors are channels-last, so the inputs of neighbouring taps of a
row are neighbours too. Padding is no copy and no condition in the inner loop: taps beyond the left and right edge are
left out of the tiles there when these are written, and taps beyond the top and bottom by the bounds of their loop. So
are all of them where windows are long, since a tile of its own for every place at the edge would be much code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tvm_ffi
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
    substitute,
    vector,
)
from onnxslim.targets.fused import FusedKernel, Step, loads, sources
from onnxslim.targets.machine import PARALLEL_WORK, Machine
from onnxslim.targets.tiling import spread

__all__ = ["NOTE", "Epilogue", "Window", "tiles_of", "write_product"]

NOTE = "onnxslim.kernel"
"""The annotation under which the legalization says what a step computes."""

# An inner loop this short is written out.
_SHORT = 4
# Windows of more taps are cut by the bounds of loops at the edges too.
_LONG = 16


@dataclass(frozen=True)
class Window:
    """One spatial axis of a convolution."""

    size: Size
    outputs: Size
    kernel: int
    stride: int
    dilation: int
    before: int

    def first(self, place: Expr) -> Expr:
        """The first tap of an output's window that lies inside."""
        if not self.before:
            return index(0)
        return tirx.max(index(0), _ceil(index(self.before) - place * self.stride, self.dilation))

    def last(self, place: Expr) -> Expr:
        """One behind the last tap that lies inside."""
        reach = index(self.size) + self.before - place * self.stride
        return tirx.min(index(self.kernel), _ceil(reach, self.dilation))

    @property
    def overhangs(self) -> bool:
        """Whether some window reaches beyond the tensor, or may."""
        size, outputs = known(self.size), known(self.outputs)
        if self.before or size is None or outputs is None:
            return bool(self.before) or self.kernel > 1
        return bool((outputs - 1) * self.stride + (self.kernel - 1) * self.dilation >= size)

    def inside(self) -> tuple[int, Size]:
        """The outputs whose windows lie inside: first, and one behind the last."""
        start = -(-self.before // self.stride)
        reach = self.size + self.before - self.dilation * (self.kernel - 1) - 1
        if isinstance(reach, int) and isinstance(self.outputs, int):
            return min(start, self.outputs), max(min(reach // self.stride + 1, self.outputs), start)
        stop = tirx.min(tirx.floordiv(index(reach), index(self.stride)) + 1, index(self.outputs))
        return start, tirx.max(stop, index(start))

    @property
    def is_long(self) -> bool:
        """Whether its taps are too many to be written out."""
        return self.kernel > _LONG

    def bounds(self, place: Expr, outputs: int) -> list[tuple[Expr, Expr, Sequence[int]]]:
        """The taps inside of neighbouring outputs as (first, how many, for which outputs)."""
        # Windows start and end earlier from output to output: the first one starts last, and the last one ends first.
        first, last = self.first(place), self.last(place + (outputs - 1))
        behind = tirx.max(first, last)
        parts: list[tuple[Expr, Expr, Sequence[int]]] = [(first, last, range(outputs))]
        for output in range(outputs if outputs > 1 else 0):
            own = self.first(place + output), self.last(place + output)
            parts += [(own[0], tirx.min(first, own[1]), [output]), (behind, own[1], [output])]
        return [(start, tirx.max(stop - start, index(0)), which) for start, stop, which in parts]

    def contains(self, output: int, tap: int) -> bool:
        """Whether a tap of an output lies inside; sizes must be known."""
        return bool(0 <= output * self.stride + tap * self.dilation - self.before < self.size)


def _ceil(value: Expr, by: int) -> Expr:
    return value if by == 1 else tirx.floordiv(value + (by - 1), index(by))


class Epilogue:
    """What is done with the sums while they are in registers: every output that the kernel has."""

    def __init__(self, kernel: FusedKernel, product: Step) -> None:
        self.kernel = kernel
        self.product = product
        self.outputs = [step for step in kernel.steps if kernel.is_parameter(step.output)]

    @property
    def can_be_written(self) -> bool:
        """Whether all that follows is element by element; TVM also fuses what spreads a product over more."""
        equal = tvm_ffi.structural_equal
        axes = [axis.variable for axis in self.product.spatial]

        def is_same_place(step: Step) -> bool:
            names = dict(zip((axis.variable for axis in step.axes), axes, strict=True))
            return all(
                equal(substitute(index, names), axis)
                for indices in loads(step.value, lambda buffer: not self.kernel.is_parameter(buffer))
                for index, axis in zip(indices, axes, strict=True)
            )

        return all(
            step is self.product
            or (step.is_pointwise and equal(step.output.shape, self.product.output.shape) and is_same_place(step))
            for step in self.kernel.steps
        )

    def store(self, place: list[Expr], held: Expr) -> Stmt:
        """The statements that write all outputs at ``place`` from the sum ``held``."""

        def load(buffer: Any, _: list[Expr]) -> Expr | None:
            return held if buffer.same_as(self.product.output) else None

        statements = []
        for step in self.outputs:
            value = held if step is self.product else self.kernel.inlined(step.value_at(place), load)
            statements.append(store(step.output, value, *place))
        return seq(*statements)


def write_product(kernel: FusedKernel, machine: Machine) -> PrimFunc | None:
    """Write the kernel; None where it is no product with a note of the legalization."""
    product = kernel.steps[0]
    note = json.loads(product.notes.get(NOTE, "{}"))
    if note.get("kind") not in ("convolution", "matmul"):
        return None
    epilogue = Epilogue(kernel, product)
    found = sources(product)
    if not epilogue.can_be_written or len(found) != 2 or not all(kernel.is_parameter(each) for each in found):
        return None
    return function(kernel.parameters, _Product(epilogue, found[0], found[1], note, machine).body())


class _Product:
    """One kernel on its way to be written."""

    def __init__(self, epilogue: Epilogue, data: Any, weight: Any, note: dict[str, Any], machine: Machine) -> None:
        self.epilogue = epilogue
        self.data, self.weight = data, weight
        self.machine = machine
        self.lanes = machine.lanes()
        self.panel = int(note["panel"])
        self.rows = int(note["rows"])
        self.groups = int(note.get("groups", 1))
        shape: list[Any] = [known(size) if known(size) is not None else size for size in epilogue.product.output.shape]
        source: list[Any] = [known(size) if known(size) is not None else size for size in data.shape]
        self.columns = int(shape[-1]) // self.groups
        self.depth = int(source[-1]) // self.groups
        self.panels = math.ceil(self.columns / self.panel)
        if note["kind"] == "matmul" or self._is_flat(note):
            # All pixels of all images are one row of pixels.
            self.leading = shape[:-1]
            total: Size = 1
            for size in self.leading:
                total = total * size if isinstance(total, int) and isinstance(size, int) else index(total) * index(size)
            self.images: Size = 1
            self.windows = [Window(1, 1, 1, 1, 1, 0), Window(total, total, 1, 1, 1, 0)]
        else:
            self.leading = []
            self.images = shape[0]
            axes = list(
                zip(
                    source[1:-1],
                    shape[1:-1],
                    note["kernel"],
                    note["strides"],
                    note["dilations"],
                    note["pads"],
                    strict=False,
                )
            )
            self.windows = [Window(*axis) for axis in axes]
            if len(self.windows) == 1:
                self.windows.insert(0, Window(1, 1, 1, 1, 1, 0))
        self.one_dimensional = not self.leading and len(shape) == 3
        # An image of one column is a row.
        self.is_column = not self.leading and not self.one_dimensional and self.windows[1] == Window(1, 1, 1, 1, 1, 0)
        if self.is_column:
            self.windows.reverse()

    def _is_flat(self, note: dict[str, Any]) -> bool:
        once = all(value == 1 for name in ("kernel", "strides") for value in note[name])
        return once and not any(note["pads"])

    # ------------------------------------------------------------------------------------------------------- places

    def place(self, image: Expr, y: Expr, x: Expr) -> list[Expr]:
        """The indices of a pixel, in a tensor of the shape of the output or the input."""
        if not self.leading:
            return [image, x] if self.one_dimensional else [image, x, y] if self.is_column else [image, y, x]
        places: list[Expr] = []
        rest = x
        for size in reversed(self.leading[1:]):
            places.append(tirx.floormod(rest, index(size)) if known(size) != 1 else index(0))
            rest = tirx.floordiv(rest, index(size)) if known(size) != 1 else rest
        return [rest, *places[::-1]]

    # -------------------------------------------------------------------------------------------------------- loops

    def body(self) -> Stmt:
        """The whole nest: blocks of rows of images, panels, rows, tiles."""
        vertical, horizontal = self.windows
        if self.leading:
            return self._flat_body()
        if known(vertical.outputs) == 1 and all(known(s) for s in (horizontal.size, horizontal.outputs)):
            return self._single_row_body()
        block = self._rows_in_block()
        count = known(vertical.outputs)
        blocks: Size = (
            math.ceil(count / block) if count is not None else tirx.floordiv(index(vertical.outputs) + block - 1, block)
        )

        def task(image: Expr, part: Expr, group: Expr, panel: Expr) -> Stmt:
            exact = count is not None and count % block == 0
            rows = block if exact else tirx.min(index(block), index(vertical.outputs) - part * block)
            return loop("row", rows, lambda row: self._line(image, part * block + row, group, panel, horizontal))

        sizes = [self.images, blocks, self.groups, self.panels]
        return parallel(sizes, task, serial=self._is_small())

    def _flat_body(self) -> Stmt:
        """Runs of tiles, each of which goes through all panels while its pixels are in the cache."""
        horizontal = self.windows[1]
        total = known(horizontal.outputs)
        if total is None:
            # The number of rows is not known: whole tiles, and the rest one by one.
            tiles = tirx.floordiv(index(horizontal.outputs), index(self.rows))
            whole = parallel(
                [tiles, self.panels],
                lambda tile, panel: self._tile(index(0), index(0), tile * self.rows, self.rows, index(0), panel),
            )
            rest = parallel(
                [index(horizontal.outputs) - tiles * self.rows, self.panels],
                lambda row, panel: self._tile(index(0), index(0), tiles * self.rows + row, 1, index(0), panel),
                serial=True,
            )
            return seq(whole, rest)
        statements, start = [], 0
        for width, _, tiles in tiles_of(spread(total, self.rows), 0, total):
            block = max(1, self._pixels_in_cache() // width)
            block = _balanced(tiles, block, self.panels, self.machine.cores)
            first, size = start, width

            def task(part: Expr, panel: Expr, first: int = first, size: int = size, block: int = block) -> Stmt:
                return loop(
                    "tile",
                    block,
                    lambda tile: self._tile(
                        index(0), index(0), index(first) + (part * block + tile) * size, size, index(0), panel
                    ),
                )

            statements.append(parallel([tiles // block, self.panels], task, serial=self._is_small()))
            start += width * tiles
        return seq(*statements)

    def _single_row_body(self) -> Stmt:
        """Images of one row, which may be long: runs of tiles that share their pixels, as in flat products."""
        horizontal = self.windows[1]
        start, stop = horizontal.inside()
        statements, place = [], 0
        for width, inside, count in tiles_of(
            spread(horizontal.outputs, self.rows), start, stop, alike=horizontal.is_long
        ):
            block = max(1, self._pixels_in_cache() // (width * horizontal.stride))
            block = _balanced(count, block, self.panels * self.groups, self.machine.cores)

            def task(
                image: Expr,
                part: Expr,
                group: Expr,
                panel: Expr,
                run: tuple[int, int, bool, int] = (place, width, inside, block),
            ) -> Stmt:
                first, size, inside, tiles = run

                def tile(number: Expr) -> Stmt:
                    x = (part * tiles + number) * size + first
                    return self._placed_tile(image, index(0), x, size, group, panel, first, inside=inside)

                return loop("tile", tiles, tile)

            sizes = [self.images, count // block, self.groups, self.panels]
            statements.append(parallel(sizes, task, serial=self._is_small() or (count == 1 and not inside)))
            place += width * count
        return seq(*statements)

    def _pixels_in_cache(self) -> int:
        # Half of the second cache for pixels, the other half for the panel of weights that streams by.
        return max(self.rows, self.machine.l2_bytes // 2 // (4 * self.depth))

    def _rows_in_block(self) -> int:
        vertical, horizontal = self.windows
        width, height = known(horizontal.size), known(vertical.outputs)
        if width is None or height is None:
            return 4
        row = 4 * width * self.depth * self.groups * vertical.stride
        block = max(1, min(height, self.machine.l2_bytes // 2 // max(row, 1)))
        return _balanced(height, block, self.panels * self.groups, self.machine.cores, exact=False)

    def _is_small(self) -> bool:
        outputs = math.prod(known(size) or 64 for size in self.epilogue.product.output.shape)
        taps = math.prod(window.kernel for window in self.windows)
        return outputs * taps * self.depth < PARALLEL_WORK

    def _line(self, image: Expr, y: Expr, group: Expr, panel: Expr, window: Window) -> Stmt:
        """One row of outputs, cut into tiles."""
        outputs = known(window.outputs)
        start, stop = window.inside()
        if outputs is None or known(window.size) is None or known(stop) is None:
            return self._open_line(image, y, group, panel, start, stop, window)
        statements, place = [], 0
        for width, inside, count in tiles_of(spread(outputs, self.rows), start, stop, alike=window.is_long):

            def tile(number: Expr, run: tuple[int, int, bool] = (place, width, inside)) -> Stmt:
                first, size, inside = run
                x = number * size + first
                return self._placed_tile(image, y, x, size, group, panel, first, inside=inside)

            statements.append(loop("tile", count, tile))
            place += width * count
        return seq(*statements)

    def _placed_tile(
        self, image: Expr, y: Expr, x: Expr, rows: int, group: Expr, panel: Expr, first: int, *, inside: bool
    ) -> Stmt:
        """A tile with all taps inside, or without those beyond the edges; ``first`` is ``x`` if that is one place."""
        if inside or self.windows[1].is_long:
            return self._tile(image, y, x, rows, group, panel, bounded=not inside)
        return self._tile(image, y, index(first), rows, group, panel, edge=first)

    def _open_line(
        self, image: Expr, y: Expr, group: Expr, panel: Expr, start: int, stop: Expr, window: Window
    ) -> Stmt:
        """A row of which the width is not known: tiles where all taps lie inside, and the rest pixel by pixel."""
        tiles = tirx.floordiv(index(stop) - start, index(self.rows))
        behind = index(start) + tiles * self.rows
        return seq(
            loop(
                "left",
                tirx.min(index(start), index(window.outputs)),
                lambda x: self._tile(image, y, x, 1, group, panel, bounded=True),
            )
            if start
            else None,
            loop("tile", tiles, lambda t: self._tile(image, y, t * self.rows + start, self.rows, group, panel)),
            loop(
                "right",
                tirx.max(index(window.outputs) - behind, index(0)),
                lambda x: self._tile(image, y, behind + x, 1, group, panel, bounded=True),
            ),
        )

    # --------------------------------------------------------------------------------------------------------- tile

    def _tile(
        self,
        image: Expr,
        y: Expr,
        x: Expr,
        rows: int,
        group: Expr,
        panel: Expr,
        *,
        edge: int | None = None,
        bounded: bool = False,
    ) -> Stmt:
        """The sums of a tile and what is done with them.

        Args:
            image, y, x: where its first pixel lies.
            rows: how many pixels it has.
            group, panel: which output channels.
            edge: the value of ``x`` where taps beyond the left or right edge are to be left out.
            bounded: whether the loops over the taps of a row need bounds.
        """
        tail = self.columns - (self.panels - 1) * self.panel
        if tail == self.panel:
            return self._columns(image, y, x, rows, group, panel, self.panel, edge=edge, bounded=bounded)
        last = self._columns(image, y, x, rows, group, index(self.panels - 1), tail, edge=edge, bounded=bounded)
        if self.panels == 1:
            return last
        whole = self._columns(image, y, x, rows, group, panel, self.panel, edge=edge, bounded=bounded)
        return tirx.IfThenElse(panel < self.panels - 1, whole, last)

    def _columns(
        self,
        image: Expr,
        y: Expr,
        x: Expr,
        rows: int,
        group: Expr,
        panel: Expr,
        width: int,
        *,
        edge: int | None,
        bounded: bool,
    ) -> Stmt:
        vectors = math.ceil(width / self.lanes)
        wide = vectors * self.lanes
        sums, declared = local(rows * wide)
        zero = FloatImm("float32", 0.0)

        def each(make: Callable[[int, int], Stmt | None]) -> list[Stmt | None]:
            return [make(row, number) for row in range(rows) for number in range(vectors)]

        def clear(row: int, number: int) -> Stmt:
            at = row * wide + number * self.lanes
            return vector(self.lanes, lambda lane: store(sums, zero, lane + at))

        def finish(row: int, number: int) -> Stmt:
            at = row * wide + number * self.lanes
            lanes = min(self.lanes, width - number * self.lanes)
            channel = group * self.columns + panel * self.panel + number * self.lanes

            def write(lane: Expr) -> Stmt:
                place = [*self.place(image, y, x + row), channel + lane]
                return self.epilogue.store(place, load_of(sums, lane + at))

            return vector(lanes, write)

        def add(tap_y: Expr, tap_x: Size, depth: Expr, present: Sequence[int]) -> Stmt:
            statements = []
            for row in present:
                factor = self._pixel(image, y, x + row, tap_y, tap_x, group, depth)
                for number in range(vectors):
                    at = row * wide + number * self.lanes

                    def multiply(lane: Expr, at: int = at, number: int = number, factor: Expr = factor) -> Stmt:
                        weight = self._weight(group, panel, tap_y, tap_x, depth, lane + number * self.lanes)
                        return store(sums, load_of(sums, lane + at) + factor * weight, lane + at)

                    statements.append(vector(self.lanes, multiply))
            return seq(*statements)

        main = self._taps(y, x, rows, add, edge=edge, bounded=bounded)
        return seq(declared, *each(clear), main, *each(finish))

    def _taps(
        self,
        y: Expr,
        x: Expr,
        rows: int,
        add: Callable[[Expr, Size, Expr, Sequence[int]], Stmt],
        *,
        edge: int | None,
        bounded: bool,
    ) -> Stmt:
        """Every tap of the window and every input channel of it."""
        vertical, horizontal = self.windows
        everyone = range(rows)

        def depths(body: Callable[[Expr], Stmt], depth: int = self.depth) -> Stmt:
            if depth <= _SHORT:
                return seq(*(body(index(number)) for number in range(depth)))
            return loop("depth", depth, body)

        def loop_of_taps(tap_y: Expr, start: Expr, count: Size, present: Sequence[int]) -> Stmt:
            return loop("tap_x", count, lambda tap: depths(lambda d: add(tap_y, start + tap, d, present)))

        def row_of_taps(tap_y: Expr) -> Stmt:
            if bounded:
                return seq(*(loop_of_taps(tap_y, *part) for part in horizontal.bounds(x, rows)))
            if edge is None and horizontal.dilation == 1 and self.groups == 1 and horizontal.kernel > 1:
                if horizontal.kernel * self.depth <= 4 * _SHORT:
                    taps = [(tap, depth) for tap in range(horizontal.kernel) for depth in range(self.depth)]
                    return seq(*(add(tap_y, tap, index(depth), everyone) for tap, depth in taps))
                # The taps of a row lie behind each other, in the image as in the weights: one long loop.
                return loop(
                    "step",
                    horizontal.kernel * self.depth,
                    lambda s: add(
                        tap_y,
                        tirx.floordiv(s, index(self.depth)),
                        tirx.floormod(s, index(self.depth)),
                        everyone,
                    ),
                )
            if edge is None and horizontal.is_long:
                return loop_of_taps(tap_y, index(0), horizontal.kernel, everyone)
            statements = []
            for tap in range(horizontal.kernel):
                present = [row for row in everyone if edge is None or horizontal.contains(edge + row, tap)]
                if present:
                    statements.append(
                        depths(lambda d, tap=tap, present=present: add(tap_y, tap, d, present))  # type: ignore[misc]
                    )
            return seq(*statements)

        if not vertical.overhangs:
            return loop("tap_y", vertical.kernel, row_of_taps)
        first = vertical.first(y)
        count = tirx.max(vertical.last(y) - first, index(0))
        return loop("tap_y", count, lambda tap: row_of_taps(first + tap))

    def _pixel(self, image: Expr, y: Expr, x: Expr, tap_y: Expr, tap_x: Size, group: Expr, depth: Expr) -> Expr:
        vertical, horizontal = self.windows
        if not self.leading:
            y = y * vertical.stride + tap_y * vertical.dilation - vertical.before
            x = x * horizontal.stride + index(tap_x) * horizontal.dilation - horizontal.before
        return load_of(self.data, *self.place(image, y, x), group * self.depth + depth)

    def _weight(self, group: Expr, panel: Expr, tap_y: Expr, tap_x: Size, depth: Expr, lane: Expr) -> Expr:
        tap = index(tap_y) * self.windows[1].kernel + index(tap_x)
        return load_of(self.weight, group * self.panels + panel, tap, depth, lane)


def tiles_of(widths: Sequence[int], start: int, stop: int, *, alike: bool = False) -> list[tuple[int, bool, int]]:
    """Runs of equal tiles as (width, whether between start and stop, how many); those that are not, one by one.

    Args:
        widths: of the tiles, in their order.
        start, stop: between what.
        alike: whether those that are not between are alike too.
    """
    runs: list[tuple[int, bool, int]] = []
    place = 0
    for width in widths:
        inside = start <= place and place + width <= stop
        if (inside or alike) and runs and runs[-1][:2] == (width, inside):
            runs[-1] = (width, inside, runs[-1][2] + 1)
        else:
            runs.append((width, inside, 1))
        place += width
    return runs


def _balanced(count: int, most: int, others: int, cores: int, *, exact: bool = True) -> int:
    """Into blocks of how many of ``count`` to cut, at most ``most``, so that every core gets its share."""
    wanted = math.ceil(count / most)
    if others % cores and wanted * others < 4 * cores:
        wanted = min(count, max(wanted, cores))
    block = math.ceil(count / wanted)
    while exact and count % block:
        block -= 1
    return block
