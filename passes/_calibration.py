"""Ranges of activations, measured in a stream: memory is bounded by the model, never by the number of samples.

The model runs once over the data, with ReduceMin, ReduceMax and a strided Slice behind every watched tensor, so that
nothing large leaves ONNX Runtime; a histogram that grows takes in what was drawn. A tensor that was ever not finite is
marked so. Feeds may differ in shape. What was seen so far is saved now and then, to go on from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim.graph.walk import insert_early
from onnxslim.runtime import Session

if TYPE_CHECKING:
    from onnxslim.model import Model
    from onnxslim.stages import Draft

__all__ = ["Histogram", "Method", "Observed", "choose_range", "draw_steps", "observe"]

Method = Literal["mse", "minmax", "percentile", "entropy"]
FloatArray = NDArray[np.float64]

BINS = 4096
_SAVE_SECONDS = 20
_DRAWN = 1 << 20  # elements drawn of one tensor, over all feeds: enough for the tails of its histogram
_NO_SPAN = 1e-30  # all but subnormal: no bins are made of it
_LEAST_SHARE = 1e-9  # of what a code that holds nothing stands for
_GRID = np.linspace(1.0, 0.1, 37)


@dataclass
class Histogram:
    """Counts over equal bins, zero among their edges, whose width doubles as the values spread: one pass fills it.

    Attributes:
        width: of a bin, a power of two; 0 before there was anything but zeros.
        first: bin ``index`` holds the values from ``(first + index) * width`` on.
        counts: of each bin; half of ``BINS`` to all of them.
    """

    width: float = 0.0
    first: int = 0
    counts: FloatArray = field(default_factory=lambda: np.zeros(0))

    def add(self, values: NDArray[np.float32], times: FloatArray | None = None) -> None:
        """Count more values, so many times each; those that are not finite are left out."""
        if not values.size:
            return
        low, high = float(values.min()), float(values.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            finite = np.isfinite(values)
            values, times = values[finite], None if times is None else times[finite]
            low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
        low = min(low, self.first * self.width)
        high = max(high, (self.first + self.counts.size - 1) * self.width)
        if high - low < _NO_SPAN:
            return
        width = max(self.width, float(2.0 ** np.ceil(np.log2((high - low) / BINS))))
        first = int(np.floor(low / width))
        size = int(np.floor(high / width)) + 1 - first
        doubled = min(62, int(np.log2(width / (self.width or width))))
        old = (np.arange(self.first, self.first + self.counts.size) >> doubled) - first
        # The quotients are exact, a power of two being divided by.
        new = np.floor(values / width).astype(np.intp) - first
        counts = np.bincount(old, self.counts, minlength=size) + np.bincount(new, times, minlength=size)
        self.counts = np.asarray(counts, np.float64)
        self.width, self.first = width, first

    def mapped(self, function: Callable[[FloatArray], FloatArray]) -> Histogram:
        """About the histogram of what ``function`` makes of the elements one by one."""
        found = Histogram()
        found.add(function(self.centres).astype(np.float32), self.counts)
        return found

    @property
    def centres(self) -> FloatArray:
        """The middle of each bin."""
        return np.asarray((self.first + np.arange(self.counts.size) + 0.5) * self.width, np.float64)


@dataclass
class Observed:
    """What was seen of one tensor.

    Attributes:
        low, high: its extremes; not finite when an element was not.
        elements: of one feed, at most.
        histogram: of the elements that were drawn.
    """

    low: float = np.inf
    high: float = -np.inf
    elements: int = 0
    histogram: Histogram = field(default_factory=Histogram)

    def mapped(self, function: Callable[[FloatArray], FloatArray], elements: int) -> Observed:
        """What would be seen of ``elements`` that a rising ``function`` makes of these."""
        with np.errstate(over="ignore"):
            low, high = function(np.array([self.low, self.high])).tolist()
            return Observed(low, high, elements, self.histogram.mapped(function))

    @property
    def finite(self) -> bool:
        """Whether every element was a number."""
        return bool(np.isfinite(self.low) and np.isfinite(self.high))


def draw_steps(observed: dict[str, Observed], feeds: int) -> dict[str, int]:
    """Every how manieth element to draw of tensors that were seen in one of so many feeds."""
    # An odd step meets every residue of the (mostly even) channel and row sizes.
    return {name: max(1, entry.elements * feeds // _DRAWN) | 1 for name, entry in observed.items()}


def observe(
    model: Model,
    names: Sequence[str],
    feeds: Iterable[dict[str, np.ndarray]],
    steps: Mapping[str, int] | None = None,
    progress: Callable[[], None] = lambda: None,
    draft: Draft | None = None,
    *,
    spare: bool = True,
) -> dict[str, Observed]:
    """Return the extremes and sizes of float32 tensors of the main graph over all feeds.

    Args:
        model: opset 10 or later.
        names: of the tensors.
        feeds: what to run.
        steps: of the tensors whose histogram is wanted too, every how manieth element is counted.
        progress: called after each feed.
        draft: goes on from there, behind the feeds that were seen for it, and keeps what is seen there.
        spare: hold few tensors of a feed at a time, which takes longer; or all of them.

    Raises:
        ModelError: ONNX Runtime cannot run the model, or a feed does not fit it.
    """
    if not names:
        return {}
    steps = steps or {}
    watched = model.copy()
    watching = {name: _fetch(watched, tensor, steps.get(name)) for name, tensor in _by_name(watched.graph, names)}
    insert_early(watched.graph, [node for nodes in watching.values() for node in nodes])
    fetched = {
        name: [node.outputs[0].name for node in nodes if node.op != "Reshape"] for name, nodes in watching.items()
    }
    session = Session(watched, outputs=[result for results in fetched.values() for result in results], spare=spare)
    done, seen = (0, {}) if draft is None else _read_draft(draft.load())
    if list(seen) != list(names):
        done, seen = 0, {name: Observed() for name in names}
    count, saved = done, time.monotonic()
    for count, feed in enumerate(feeds, 1):
        if count <= done:
            progress()
            continue
        found = session.run(feed)
        for name, (size, low, high, *drawn) in fetched.items():
            entry, elements = seen[name], int(found[size])
            if elements:
                # np.minimum hands NaN on, so that a tensor that held one is never quantized.
                entry.low = float(np.minimum(entry.low, found[low]))
                entry.high = float(np.maximum(entry.high, found[high]))
            entry.elements = max(entry.elements, elements)
            if drawn:
                entry.histogram.add(found[drawn[0]])
        progress()
        if draft is not None and time.monotonic() - saved > _SAVE_SECONDS:
            draft.save(_draft(count, seen))
            saved = time.monotonic()
    if draft is not None and count > done:
        draft.save(_draft(count, seen))
    return seen


def _draft(done: int, seen: Mapping[str, Observed]) -> dict[str, np.ndarray]:
    """What was seen in so many feeds, as arrays; the counts of all histograms are one behind the other."""
    entries = list(seen.values())
    histograms = [entry.histogram for entry in entries]
    return {
        "done": np.array(done),
        "names": np.array(list(seen), str),
        "ends": np.array([(entry.low, entry.high) for entry in entries]),
        "elements": np.array([entry.elements for entry in entries]),
        "widths": np.array([histogram.width for histogram in histograms]),
        "bins": np.array([(histogram.first, histogram.counts.size) for histogram in histograms]),
        "counts": np.concatenate([histogram.counts for histogram in histograms]),
    }


def _read_draft(arrays: Mapping[str, np.ndarray]) -> tuple[int, dict[str, Observed]]:
    """The number of feeds, and what was seen in them; nothing of an empty draft."""
    if not arrays:
        return 0, {}
    parts = np.split(arrays["counts"], np.cumsum(arrays["bins"][:, 1])[:-1])
    columns = (arrays[name].tolist() for name in ("names", "ends", "elements", "widths", "bins"))
    return int(arrays["done"]), {
        name: Observed(low, high, elements, Histogram(width, first, counts))
        for name, (low, high), elements, width, (first, _), counts in zip(*columns, parts, strict=True)
    }


def _by_name(graph: gs.Graph, names: Sequence[str]) -> list[tuple[str, gs.Tensor]]:
    tensors = {tensor.name: tensor for tensor in graph.inputs}
    tensors |= {tensor.name: tensor for node in graph.nodes for tensor in node.outputs}
    return [(name, tensors[name]) for name in names]


def _fetch(model: Model, tensor: gs.Tensor, step: int | None) -> list[gs.Node]:
    """What is fetched of a tensor: its size, its extremes, and every ``step``-th element if that is given."""
    nodes: list[gs.Node] = []

    def add(op: str, inputs: list[gs.Tensor], dtype: type, **attributes: object) -> gs.Variable:
        result = gs.Variable(model.fresh_name(f"{tensor.name}_{op}"), dtype)
        nodes.append(gs.Node(op, result.name, attributes, inputs=inputs, outputs=[result]))
        return result

    def constant(value: int) -> gs.Constant:
        return gs.Constant(model.fresh_name(f"{tensor.name}_{value}"), np.array([value], np.int64))

    add("Size", [tensor], np.int64)
    for op in ("ReduceMin", "ReduceMax"):
        add(op, [tensor], np.float32, keepdims=0)
    if step is not None:
        flat = add("Reshape", [tensor, constant(-1)], np.float32)
        add("Slice", [flat, *map(constant, (0, np.iinfo(np.int64).max, 0, step))], np.float32)
    return nodes


def with_zero(low: float, high: float) -> tuple[float, float]:
    """Widen a range to hold zero, which padding and ReLU need to be exact."""
    return min(low, 0.0), max(high, 0.0)


def choose_range(
    low: float, high: float, histogram: Histogram, method: Method, percentile: float, levels: int = 255
) -> tuple[float, float]:
    """Choose what an unsigned code of ``levels`` steps should cover of a tensor seen between ``low`` and ``high``.

    ``mse`` minimises the expected squared error, rounding ``(step ** 2) / 12`` inside and clipping outside, by turns
    in the two ends; ``entropy`` in the same way the divergence of what codes can tell apart from what was seen (Migacz
    2017, 8-bit Inference with TensorRT); ``percentile`` cuts ``100 - percentile`` percent off, half of it at each end.
    An empty histogram leaves the extremes.
    """
    low, high = with_zero(low, high)
    if method == "minmax" or high <= low or not histogram.counts.any():
        return low, high
    if method == "percentile":
        centres = histogram.centres
        share = np.cumsum(histogram.counts) / histogram.counts.sum()
        tail = (1 - percentile / 100) / 2
        first, last = np.searchsorted(share, [tail, 1 - tail])
        cut = float(centres[first]), float(centres[min(last, centres.size - 1)])
        return with_zero(max(low, cut[0]), min(high, cut[1]))
    loss = _Loss(histogram, levels) if method == "mse" else _Divergence(histogram, levels)
    lows, highs = low * _GRID, high * _GRID
    for _ in range(2):
        if high > 0:
            high = float(highs[np.argmin(loss.of(np.full_like(highs, low), highs))])
        if low < 0:
            low = float(lows[np.argmin(loss.of(lows, np.full_like(lows, high)))])
    return low, high


class _Loss:
    """The squared error of a code over a histogram, for many ranges at once: sums over bins are looked up."""

    def __init__(self, histogram: Histogram, levels: int) -> None:
        self._levels = levels
        self._centres = histogram.centres
        powers = [histogram.counts * self._centres**power for power in range(3)]
        self._sums = np.array([np.concatenate([[0.0], np.cumsum(values)]) for values in powers])

    def of(self, low: FloatArray, high: FloatArray) -> FloatArray:
        """The error of each range ``low <= 0 <= high``, of which none is empty."""
        step = (high - low) / self._levels
        ends = [low, np.maximum(low, -step / 2), np.minimum(high, step / 2), high]
        below, small, large, above = (self._sums[:, np.searchsorted(self._centres, end)] for end in ends)
        total = self._sums[:, -1:]
        # What rounds to zero is off by its own size; what lies further out by a uniform error of one step.
        inside = (above - below - (large - small))[0] * step**2 / 12 + (large - small)[2]
        return np.asarray(inside + _clipping(below, low) + _clipping(total - above, high))


def _clipping(sums: FloatArray, end: FloatArray) -> FloatArray:
    """The squared distance to ``end`` of what has the sums ``[3, ranges]`` of powers 0, 1 and 2."""
    return np.asarray(sums[2] - 2 * end * sums[1] + end**2 * sums[0])


class _Divergence:
    """The Kullback-Leibler divergence of coded values from a histogram.

    What lies outside of a range counts at its ends, and each code spreads what falls to it evenly over its bins that
    are not empty. The bin of zero, which every code holds exactly, is left out: behind a ReLU it is most of all.
    """

    def __init__(self, histogram: Histogram, levels: int) -> None:
        self._levels = levels
        self._counts = histogram.counts.copy()
        self._counts[-histogram.first] = 0
        self._centres = histogram.centres

    def of(self, low: FloatArray, high: FloatArray) -> FloatArray:
        """The divergence of each range ``low <= 0 <= high``, of which none is empty."""
        return np.array([self._one(*ends) for ends in zip(low, high, strict=True)])

    def _one(self, low: float, high: float) -> float:
        first, last = np.searchsorted(self._centres, [low, high])
        inside = self._counts[first:last]
        if not inside.any():
            return np.inf
        wanted = inside.copy()
        wanted[0] += self._counts[:first].sum()
        wanted[-1] += self._counts[last:].sum()
        codes = np.rint((self._centres[first:last] - low) * (self._levels / (high - low))).astype(np.intp)
        filled = np.bincount(codes, inside > 0)
        even = np.bincount(codes, inside) / np.maximum(filled, 1)
        coded = np.where(inside > 0, even[codes], 0.0) / inside.sum()
        wanted /= wanted.sum()
        there = wanted > 0
        return float((wanted[there] * np.log(wanted[there] / np.maximum(coded[there], _LEAST_SHARE))).sum())
