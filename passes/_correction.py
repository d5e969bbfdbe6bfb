"""Bias correction without labels (Nagel et al. 2019, Data-Free Quantization), strictly in order, in one pass.

Rounding shifts the mean of a layer's output; the bias takes the shift back. Layers behind it see the corrected input,
so corrections must be found in order: taken all from one run they count each shift several times. Here the quantized
graph itself subtracts the difference to the teacher's means behind every layer while it runs, so that every later layer
sees corrected inputs, and one forward pass gives the corrections of all layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim.passes._qdq import channel_mean
from onnxslim.runtime import Session

if TYPE_CHECKING:
    from onnxslim.model import Model
    from onnxslim.passes._placement import Placement

__all__ = ["corrections", "output_errors"]

FloatArray = NDArray[np.float64]
Feed = dict[str, np.ndarray]


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


def output_errors(teacher: Session, students: Sequence[Session], feeds: Iterable[Feed]) -> list[float]:
    """Of each student, noise over signal of the float outputs, summed over feeds and averaged over outputs."""
    noise: list[dict[str, float]] = [{} for _ in students]
    signal: dict[str, float] = {}
    for feed in feeds:
        wanted = teacher.run(feed)
        found = [student.run(feed) for student in students]
        for name, value in wanted.items():
            if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
                continue
            if any(got[name].shape != value.shape for got in found):
                continue
            finite = np.isfinite(value)  # what the float model itself cannot hold is no measure
            true = np.asarray(value[finite], np.float64)
            signal[name] = signal.get(name, 0.0) + float(np.square(true).sum())
            for total, got in zip(noise, found, strict=True):
                total[name] = total.get(name, 0.0) + float(np.square(got[name][finite] - true).sum())
    ratios = [[total[name] / max(signal[name], 1e-30) for name in total] for total in noise]
    return [float(np.mean(each)) if each else float("inf") for each in ratios]
