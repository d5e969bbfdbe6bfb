"""Ranges of activations, measured in a stream: memory is bounded by the model, never by the number of samples.

Pass one runs the model with ReduceMin, ReduceMax and Shape behind every watched tensor, so that nothing large leaves
ONNX Runtime. Pass two fetches the tensors themselves, a chunk of them at a time, and keeps a histogram of each. A
tensor that was ever not finite is marked so. Feeds may differ in shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim.runtime import Session

if TYPE_CHECKING:
    from onnxslim.data import Dataset
    from onnxslim.model import Model

__all__ = ["Method", "Observed", "choose_range", "histograms", "observe"]

Method = Literal["mse", "minmax", "percentile"]
Histogram = NDArray[np.float64]

BINS = 2048
_CHUNK_BYTES = 32 << 20  # of activations fetched at once in pass two
_DRAWN = 1 << 16  # elements drawn from one tensor of one sample: enough for a histogram of 2048 bins
_GRID = np.linspace(1.0, 0.1, 37)


@dataclass
class Observed:
    """What was seen of one tensor.

    Attributes:
        low, high: its extremes; not finite when an element was not.
        shape: its largest shape, elementwise over all feeds; as long as its rank.
        elements: of one feed, at most.
    """

    low: float = np.inf
    high: float = -np.inf
    shape: tuple[int, ...] = ()
    elements: int = 0

    @property
    def finite(self) -> bool:
        """Whether every element was a number."""
        return bool(np.isfinite(self.low) and np.isfinite(self.high))


def observe(
    model: Model, names: Sequence[str], feeds: Iterable[dict[str, np.ndarray]], progress: Callable[[], None]
) -> dict[str, Observed]:
    """Return the extremes and shapes of float32 tensors of the main graph over all feeds.

    Raises:
        ModelError: ONNX Runtime cannot run the model, or a feed does not fit it.
    """
    watched = model.copy()
    tensors = _tensors_by_name(watched.graph)
    fetches: list[str] = []
    for name in names:
        for op in ("ReduceMin", "ReduceMax", "Shape"):
            result = gs.Variable(watched.fresh_name(f"{name}_{op}"), np.int64 if op == "Shape" else np.float32)
            attributes = {} if op == "Shape" else {"keepdims": 0}
            node = gs.Node(op, watched.fresh_name(result.name), attributes, inputs=[tensors[name]], outputs=[result])
            watched.graph.nodes.append(node)
            fetches.append(result.name)
    session = Session(watched, outputs=fetches)
    seen = {name: Observed() for name in names}
    for feed in feeds:
        results = session.run(feed)
        for name, low, high, shape in zip(names, fetches[::3], fetches[1::3], fetches[2::3], strict=True):
            entry, size = seen[name], tuple(int(dim) for dim in results[shape])
            if 0 not in size:
                # np.minimum hands NaN on, so that a tensor that held one is never quantized.
                entry.low = float(np.minimum(entry.low, results[low]))
                entry.high = float(np.maximum(entry.high, results[high]))
            same_rank = len(size) == len(entry.shape)
            entry.shape = tuple(map(max, size, entry.shape)) if same_rank else size
            entry.elements = max(entry.elements, int(np.prod(size)))
        progress()
    return seen


def _tensors_by_name(graph: gs.Graph) -> dict[str, gs.Tensor]:
    tensors = {tensor.name: tensor for tensor in graph.inputs}
    tensors |= {tensor.name: tensor for node in graph.nodes for tensor in node.outputs}
    return tensors


def histograms(
    model: Model, observed: dict[str, Observed], data: Dataset, batch: int, progress: Callable[[], None]
) -> dict[str, Histogram]:
    """Return counts over ``BINS`` equal bins between the extremes of each tensor in ``observed``, zero included.

    Of a large tensor an evenly spaced part is counted.
    """
    counts = {name: np.zeros(BINS) for name in observed}
    for chunk in _chunks(observed):
        session = Session(model, outputs=chunk)
        for feed in data.batches(batch):
            for name, value in session.run(feed).items():
                low, high = with_zero(observed[name].low, observed[name].high)
                if high > low:
                    drawn = _draw(value, _DRAWN * batch)
                    index = ((drawn - low) * (BINS / (high - low))).astype(np.int32)
                    counts[name] += np.bincount(np.clip(index, 0, BINS - 1), minlength=BINS)
            progress()
    return counts


def _chunks(observed: dict[str, Observed]) -> list[list[str]]:
    chunks: list[list[str]] = [[]]
    used = 0
    for name, entry in observed.items():
        if chunks[-1] and used + 4 * entry.elements > _CHUNK_BYTES:
            chunks.append([])
            used = 0
        chunks[-1].append(name)
        used += 4 * entry.elements
    return chunks if chunks[0] else []


def _draw(value: np.ndarray, count: int) -> np.ndarray:
    flat = value.reshape(-1)
    if flat.size > count:
        # An odd step meets every residue of the (mostly even) channel and row sizes.
        flat = flat[:: (flat.size // count) | 1]
    return np.asarray(flat[np.isfinite(flat)])


def with_zero(low: float, high: float) -> tuple[float, float]:
    """Widen a range to hold zero, which padding and ReLU need to be exact."""
    return min(low, 0.0), max(high, 0.0)


def choose_range(
    low: float, high: float, counts: Histogram | None, method: Method, percentile: float, levels: int = 255
) -> tuple[float, float]:
    """Choose what an unsigned code of ``levels`` steps should cover of a tensor seen between ``low`` and ``high``.

    ``mse`` minimises the expected squared error, rounding ``(step ** 2) / 12`` inside and clipping outside, by turns
    in the two ends; ``percentile`` cuts ``100 - percentile`` percent off, half of it at each end.
    """
    low, high = with_zero(low, high)
    if method == "minmax" or counts is None or high <= low or not counts.any():
        return low, high
    centres = low + (np.arange(BINS) + 0.5) * (high - low) / BINS
    if method == "percentile":
        share = np.cumsum(counts) / counts.sum()
        tail = (1 - percentile / 100) / 2
        first, last = np.searchsorted(share, [tail, 1 - tail])
        return with_zero(float(centres[first]), float(centres[min(last, BINS - 1)]))
    best = (low, high)
    for _ in range(2):
        if high > 0:
            best = min(
                ((best[0], high * a) for a in _GRID), key=lambda ends: _squared_error(centres, counts, ends, levels)
            )
        if low < 0:
            best = min(
                ((low * a, best[1]) for a in _GRID), key=lambda ends: _squared_error(centres, counts, ends, levels)
            )
    return best


def _squared_error(centres: Histogram, counts: Histogram, ends: tuple[float, float], levels: int) -> float:
    low, high = ends
    step = (high - low) / levels
    if step <= 0:
        return np.inf
    clipped = np.clip(centres, low, high) - centres
    inside = (clipped == 0) & (np.abs(centres) > step / 2)
    small = (clipped == 0) & ~inside
    # What rounds to zero is off by its own size; what lies further out by a uniform error of one step.
    return float((counts * (clipped**2 + inside * step**2 / 12 + small * centres**2)).sum())
