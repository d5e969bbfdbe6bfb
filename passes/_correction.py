"""Bias correction without labels (Nagel et al. 2019, Data-Free Quantization), strictly in order, in one pass.

Rounding shifts the mean of a layer's output; the bias takes the shift back. Layers behind it see the corrected input,
so corrections must be found in order: taken all from one run they count each shift several times. Here the quantized
graph itself subtracts the difference to the teacher's means behind every layer while it runs, so that every later layer
sees corrected inputs, and one forward pass gives the corrections of all layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim.passes._qdq import channel_mean
from onnxslim.runtime import Session

if TYPE_CHECKING:
    from onnxslim.model import Model
    from onnxslim.passes._placement import Placement

__all__ = ["Judge", "corrections"]

FloatArray = NDArray[np.float64]
Feed = dict[str, np.ndarray]

_ANSWER_BYTES = 64 << 20  # of feeds and outputs kept to judge by


def corrections(
    teacher: Model, placement: Placement, probed: Model, probes: dict[str, tuple[str, str]], feeds: Iterable[Feed]
) -> dict[str, FloatArray]:
    """What to add to the bias of each probed layer, ``[channels]``, by name of its output.

    Args:
        teacher: the float model, changed: mean outputs are added to it.
        placement: of the teacher's graph.
        probed: the quantized model with probes.
        probes: layer -> its input for the teacher's mean, and its output of the difference.
        feeds: a few large ones rather than many small ones: means are matched within each.
    """
    means: dict[str, str] = {}
    for name in probes:
        anchor = placement.anchors[name]
        result = gs.Variable(teacher.fresh_name(f"{name}_mean"), np.float32)
        teacher.graph.nodes.append(channel_mean(teacher, anchor, anchor.node.outputs[0], result))
        means[name] = result.name
    float_session = Session(teacher, outputs=list(means.values()))
    int8_session = Session(probed, outputs=[delta for _, delta in probes.values()])
    sums: dict[str, FloatArray] = {}
    batches = 0
    for feed in feeds:
        target = float_session.run(feed)
        found = int8_session.run({**feed, **{probes[name][0]: target[means[name]] for name in probes}})
        for name, (_, delta) in probes.items():
            sums[name] = sums.get(name, 0.0) + np.asarray(found[delta], np.float64).reshape(-1)
        batches += 1
    return {name: total / batches for name, total in sums.items() if np.isfinite(total).all()}


@dataclass
class Judge:
    """What the float model makes of some feeds, by which quantized versions of it are judged.

    Attributes:
        answers: each feed with the float outputs; elements that are not finite are no measure.
        fused: whether int8 kernels run, or what they stand for in float: on this processor they may saturate.
    """

    answers: list[tuple[Feed, Feed]]
    fused: bool = True

    @classmethod
    def of(cls, teacher: Model, feeds: Iterable[Feed], *, fused: bool = True) -> Judge:
        """Run ``teacher`` over ``feeds``: over the first ones where all answers would take much memory."""
        session = Session(teacher)
        answers: list[tuple[Feed, Feed]] = []
        left = _ANSWER_BYTES
        for feed in feeds:
            outputs = session.run(feed)
            answers.append((feed, {name: value for name, value in outputs.items() if _is_float(value)}))
            left -= sum(value.nbytes for one in answers[-1] for value in one.values())
            if left <= 0:
                break
        return cls(answers, fused)

    def error(self, student: Model) -> float:
        """Noise over signal of the float outputs, summed over feeds and averaged over outputs."""
        session = Session(student, optimize=self.fused)
        noise: dict[str, float] = {}
        signal: dict[str, float] = {}
        for feed, answer in self.answers:
            got = session.run(feed)
            for name, value in answer.items():
                if got[name].shape == value.shape:
                    finite = np.isfinite(value)
                    true = np.asarray(value[finite], np.float64)
                    noise[name] = noise.get(name, 0.0) + float(np.square(got[name][finite] - true).sum())
                    signal[name] = signal.get(name, 0.0) + float(np.square(true).sum())
        ratios = [noise[name] / max(signal[name], 1e-30) for name in noise]
        return float(np.mean(ratios)) if ratios else float("inf")


def _is_float(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"
