"""How large the tile is whose sums stay in registers: a small model of what a processor can do in a cycle."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from onnxslim.targets.machine import Machine

__all__ = ["Demand", "Tile", "Tiles", "Tiling", "best_tile", "spread", "tiles_to_try", "workload"]

# Cores of today start two vector multiply-adds and two loads per cycle; a sum can be added to after four.
_PER_CYCLE = 2
_LATENCY = 4
_WIDEST = 8
# How far the model may be mistaken: what it takes for this much slower than the best is not worth a measurement.
_DOUBTFUL = 1.15


@dataclass(frozen=True)
class Tile:
    """``rows`` pixels (or rows of a matrix) by ``vectors`` vectors of channels (or columns)."""

    rows: int
    vectors: int


Tiles: TypeAlias = Mapping[str, Tile]
"""Tiles that a measurement prefers to those of :func:`best_tile`, by :func:`workload`."""


@dataclass(frozen=True)
class Demand:
    """A product for which a tile was asked: the arguments of :func:`best_tile`, and the tile that it got."""

    rows: int | None
    columns: int
    tile: Tile


@dataclass
class Tiling:
    """Chooses the tiles of one model.

    Attributes:
        machine: the processor.
        measured: what is taken in place of the choice of :func:`best_tile`.
        demands: what was asked so far, by workload.
    """

    machine: Machine
    measured: Tiles = field(default_factory=dict)
    demands: dict[str, Demand] = field(default_factory=dict)

    def tile(self, key: str, rows: int | None, columns: int) -> Tile:
        """The tile for a workload; the other arguments are those of :func:`best_tile`."""
        chosen = self.measured.get(key) or best_tile(rows, columns, self.machine.lanes(), self.machine)
        self.demands[key] = Demand(rows, columns, chosen)
        return chosen


def workload(source: Sequence[Any], result: Sequence[Any], **what: Any) -> str:
    """What the speed of a product's tile depends on, but for the processor.

    Args:
        source: sizes of the tensor that is read; those that are open are written as their symbols.
        result: sizes of the tensor that is written.
        what: kind, window, strides and so on.
    """
    return json.dumps({**what, "source": source, "result": result}, sort_keys=True, default=str)


def best_tile(rows: int | None, columns: int, lanes: int, machine: Machine) -> Tile:
    """The tile for a product of ``rows`` by ``columns``.

    Args:
        rows: how many rows lie side by side, such as the width of an image; None where that is not known.
        columns: how many columns there are.
        lanes: numbers in a vector.
        machine: the processor.
    """
    count = math.ceil(columns / lanes)
    costs = (
        _cost(rows, count, vectors, most)
        for vectors in range(1, min(count, _WIDEST) + 1)
        if (most := _rows_that_fit(vectors, machine.registers))
    )
    return min(costs, key=lambda found: found[:2])[2]


def tiles_to_try(rows: int | None, columns: int, lanes: int, machine: Machine) -> list[Tile]:
    """The tiles that fit the registers and may be fastest, the likely ones first; arguments as of :func:`best_tile`."""
    count = math.ceil(columns / lanes)
    costs = [
        _cost(rows, count, vectors, most)
        for vectors in range(1, min(count, _WIDEST) + 1)
        for most in range(_rows_that_fit(vectors, machine.registers), 0, -1)
    ]
    limit = _DOUBTFUL * min(cost for cost, _, _ in costs)
    ranked = sorted(costs, key=lambda found: found[:2])
    return list(dict.fromkeys(tile for cost, _, tile in ranked if cost <= limit))


def _cost(rows: int | None, count: int, vectors: int, most: int) -> tuple[float, int, Tile]:
    """Cycles for a row, a number that prefers wide tiles, and the tile of at most ``most`` rows."""
    panels, rest = divmod(count, vectors)
    widths = spread(rows, most) if rows is not None else [most]
    cycles = sum(panels * _cycles(width, vectors) + (_cycles(width, rest) if rest else 0) for width in widths)
    return round(cycles / sum(widths), 6), -vectors, Tile(max(widths), vectors)


def spread(size: int, most: int) -> list[int]:
    """``size`` as parts of at most ``most`` that differ by one at most: a tile of one row costs as much as four."""
    parts = math.ceil(size / most)
    return [size // parts + (part < size % parts) for part in range(parts)]


def _rows_that_fit(vectors: int, registers: int) -> int:
    # One register for the factor of a row; those of the columns are shared by all rows, and one row needs none.
    rows = (registers - 1 - vectors) // vectors
    return rows if rows > 1 else int(vectors + 2 <= registers)


def _cycles(rows: int, vectors: int) -> float:
    """Of one multiply-add of every element of a tile."""
    products = rows * vectors
    return max(products / _PER_CYCLE, (rows + vectors) / _PER_CYCLE, _LATENCY)
