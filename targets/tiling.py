"""How large the tile is whose sums stay in registers: a small model of what a processor can do in a cycle."""

from __future__ import annotations

import math
from dataclasses import dataclass

from onnxslim.targets.machine import Machine

__all__ = ["Tile", "best_tile", "spread"]

# Cores of today start two vector multiply-adds and two loads per cycle; a sum can be added to after four.
_PER_CYCLE = 2
_LATENCY = 4
_WIDEST = 8


@dataclass(frozen=True)
class Tile:
    """``rows`` pixels (or rows of a matrix) by ``vectors`` vectors of channels (or columns)."""

    rows: int
    vectors: int


def best_tile(rows: int | None, columns: int, lanes: int, machine: Machine) -> Tile:
    """The tile for a product of ``rows`` by ``columns``.

    Args:
        rows: how many rows lie side by side, such as the width of an image; None where that is not known.
        columns: how many columns there are.
        lanes: numbers in a vector.
        machine: the processor.
    """
    count = math.ceil(columns / lanes)
    best: tuple[float, int, Tile] | None = None
    for vectors in range(1, min(count, _WIDEST) + 1):
        most = _rows_that_fit(vectors, machine.registers)
        if not most:
            break
        panels, rest = divmod(count, vectors)
        widths = spread(rows, most) if rows is not None else [most]
        cycles = sum(panels * _cycles(width, vectors) + (_cycles(width, rest) if rest else 0) for width in widths)
        cost = (round(cycles / sum(widths), 6), -vectors)
        if best is None or cost < best[:2]:
            best = (*cost, Tile(max(widths), vectors))
    assert best is not None
    return best[2]


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
