"""Bias correction without labels (Nagel et al. 2019, Data-Free Quantization), strictly in order, in one pass.

Rounding shifts the mean of a layer's output; the bias takes the shift back. Layers behind it see the corrected input,
so corrections must be found in order: taken all from one run they count each shift several times. Here the quantized
graph itself subtracts the difference to the teacher's means behind every layer while it runs, so that every later layer
sees corrected inputs, and one forward pass gives the corrections of all layers. The teacher runs once for any number
of quantized versions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim.graph.walk import insert_early
from onnxslim.metrics import varying
from onnxslim.passes._qdq import CORRECTED, channel_mean
from onnxslim.runtime import Session, detached

if TYPE_CHECKING:
    from onnxslim.model import Model
    from onnxslim.passes._placement import Placement

__all__ = ["BiasCorrector", "Judge"]

FloatArray = NDArray[np.float64]
Feed = dict[str, np.ndarray]

_ANSWER_BYTES = 64 << 20  # of feeds and outputs kept to judge by
_LEAST_PROBABILITY = 1e-6  # below this no decision hangs on it


class BiasCorrector:
    """What a float model gives on some feeds, on average: each quantized version of it is corrected towards that."""

    def __init__(
        self, teacher: Model, placement: Placement, feeds: Callable[[], Iterable[Feed]], *, spare: bool = False
    ) -> None:
        """Run the teacher.

        Args:
            teacher: the float model, changed: mean outputs are added to it.
            placement: of the teacher's graph.
            feeds: gives what to run, each time the same: a few large ones, as means are matched within each.
            spare: hold few tensors of a feed at a time, which takes longer.
        """
        self._feeds = feeds
        sources: dict[str, str] = {}
        measuring: list[gs.Node] = []
        for name, anchor in placement.anchors.items():
            if anchor.node.op in CORRECTED:
                result = gs.Variable(teacher.fresh_name(f"{name}_mean"), np.float32)
                measuring.append(channel_mean(teacher, anchor, anchor.node.outputs[0], result))
                sources[name] = result.name
        insert_early(teacher.graph, measuring)
        session = Session(teacher, outputs=list(sources.values()), spare=spare)
        runs = (session.run(feed) for feed in feeds())
        self._means = [detached({name: seen[source] for name, source in sources.items()}) for seen in runs]

    def corrections(
        self, probed: Model, probes: dict[str, tuple[str, str]], most: int | None = None
    ) -> dict[str, FloatArray]:
        """What to add to the bias of each probed layer, ``[channels]``, by name of its output.

        Args:
            probed: the quantized model with probes.
            probes: layer -> its input for the teacher's mean, and its output of the difference.
            most: use so many feeds only.
        """
        session = Session(probed, outputs=[delta for _, delta in probes.values()])
        sums: dict[str, FloatArray] = {}
        means = self._means[:most]
        for wanted, feed in zip(means, self._feeds(), strict=False):
            found = session.run({**feed, **{probes[name][0]: wanted[name] for name in probes}})
            for name, (_, delta) in probes.items():
                sums[name] = sums.get(name, 0.0) + np.asarray(found[delta], np.float64).reshape(-1)
        return {name: total / len(means) for name, total in sums.items() if np.isfinite(total).all()}


@dataclass
class Judge:
    """What the float model makes of some feeds, by which quantized versions of it are judged.

    Attributes:
        answers: each feed with the float outputs; elements that are not finite are no measure. Where there are none,
            with all outputs: then the share that is not the same counts as noise.
        axes: the outputs that are probabilities, and the axis along which they sum to one. They are compared as
            logits: between probabilities, a few rows in which the order of two classes changes are all the error.
        fused: whether int8 kernels run, or what they stand for in float: on this processor they may saturate.
    """

    answers: list[tuple[Feed, Feed]]
    axes: dict[str, int]
    fused: bool = True

    @classmethod
    def of(cls, teacher: Model, feeds: Iterable[Feed], *, fused: bool = True) -> Judge:
        """Run ``teacher`` over ``feeds``: over the first ones where all answers would take much memory."""
        session = Session(teacher)
        answers: list[tuple[Feed, Feed]] = []
        left = _ANSWER_BYTES
        for feed in feeds:
            outputs = detached(session.run(feed))
            floats = {name: value for name, value in outputs.items() if _is_float(value)}
            answers.append((feed, floats or {name: v for name, v in outputs.items() if isinstance(v, np.ndarray)}))
            left -= sum(value.nbytes for one in answers[-1] for value in one.values())
            if left <= 0:
                break
        axes = {name: axis for name in answers[0][1] if (axis := _probability_axis([one[name] for _, one in answers]))}
        return cls(answers, axes, fused)

    def strictest(self, count: int, student: Model) -> Judge:
        """A judge by those ``count`` feeds only on which ``student`` is worst."""
        session = Session(student, optimize=self.fused)
        alone = [Judge([answer], self.axes, self.fused) for answer in self.answers]
        order = sorted(alone, key=lambda judge: -judge._error(session))
        return Judge([judge.answers[0] for judge in order[:count]], self.axes, self.fused)

    def error(self, student: Model) -> float:
        """Noise over signal of the float outputs, summed over feeds and averaged over outputs.

        The signal is what varies: around a large mean, noise may drown all that an output tells and be small beside it.
        """
        return self._error(Session(student, optimize=self.fused))

    def _error(self, session: Session) -> float:
        sums: dict[str, FloatArray] = {}
        for feed, answer in self.answers:
            got = session.run(feed)
            for name, value in answer.items():
                if got[name].shape == value.shape:
                    sums[name] = sums.get(name, 0.0) + self._compared(name, value, got[name])
        ratios = [noise / max(float(varying(*signal)), 1e-30) for noise, *signal in sums.values()]
        return float(np.mean(ratios)) if ratios else float("inf")

    def _compared(self, name: str, value: np.ndarray, got: np.ndarray) -> FloatArray:
        """Noise and signal of one output, as squares or counts of decisions; the sum of the signal and its size.

        Decisions have no mean: their sum is none, so that all of them are signal.
        """
        if not _is_float(value):
            return np.array([(got != value).sum(), value.size, 0, value.size], np.float64)
        true, found = (self._seen(name, one) for one in (value, got))
        finite = np.isfinite(true)
        true, noise = true[finite], found[finite] - true[finite]
        return np.array([np.square(noise).sum(), np.square(true).sum(), true.sum(), true.size])

    def _seen(self, name: str, value: np.ndarray) -> FloatArray:
        """What is compared of an output."""
        value = np.asarray(value, np.float64)
        if name not in self.axes:
            return value
        logits = np.log(np.maximum(value, _LEAST_PROBABILITY))
        return np.asarray(logits - logits.mean(axis=self.axes[name], keepdims=True), np.float64)


def _probability_axis(values: list[np.ndarray]) -> int | None:
    """The axis along which all of an output sums to one, and no element is negative."""
    if any(value.ndim != max(values[0].ndim, 2) or value.min(initial=0.0) < 0 for value in values):
        return None
    for axis in (values[0].ndim - 1, 1):
        if all(value.shape[axis] > 1 and np.allclose(value.sum(axis=axis), 1.0, atol=1e-3) for value in values):
            return axis
    return None


def _is_float(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"
