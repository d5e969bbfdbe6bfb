"""Quantize one model with one tool: what ``int8.py`` runs, in the tool's own environment, and measures.

``python quantizers.py TOOL SOURCE TARGET FEEDS [BITS]``: FEEDS is a folder of ``.npz`` files, one feed each. Nothing is
imported but what the tool needs. ``fp32`` quantizes nothing: it runs the model once over the feeds, the yardstick of
what calibration may cost.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_PER_CHANNEL_OPSET = 13  # below it, a DequantizeLinear has no axis


def _feeds(folder: str) -> Iterator[dict[str, np.ndarray]]:
    for path in sorted(Path(folder).glob("*.npz")):
        with np.load(path) as arrays:
            yield dict(arrays)


def fp32(source: str, target: str, folder: str, weight_bits: int | None) -> None:
    """Run the model over the feeds."""
    import onnxruntime

    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    for feed in _feeds(folder):
        session.run(None, feed)
    Path(target).write_bytes(Path(source).read_bytes())


def ours(source: str, target: str, folder: str, weight_bits: int | None) -> None:
    """What ``onnxslim optimize`` does by default, without its measuring."""
    import onnxslim
    from onnxslim.data import open_dataset
    from onnxslim.passes import Context, FoldConstants, QuantizeStatic, Simplify
    from onnxslim.runtime import Session

    model = onnxslim.load(source)
    data = open_dataset(folder, Session(source).specs)
    for step in (
        FoldConstants(),
        Simplify(),
        QuantizeStatic(reduce_range="auto" if weight_bits is None else weight_bits < 8),
    ):
        outcome = step.run(model, Context(calibration=data))
    model.save(target)
    for refusal in outcome.refusals:
        print(refusal.node, refusal.why)
    print(outcome.numbers)


def ort(source: str, target: str, folder: str, weight_bits: int | None) -> None:
    """ONNX Runtime's quantize_static with the types that it advises for x86, and scales a channel where it can."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._rest = _feeds(folder)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._rest, None)

    opsets = {entry.domain: entry.version for entry in onnx.load(source, load_external_data=False).opset_import}
    quantize_static(
        source,
        target,
        Reader(),
        per_channel=opsets.get("", 1) >= _PER_CHANNEL_OPSET,
        reduce_range=weight_bits == 7,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def nncf(source: str, target: str, folder: str, weight_bits: int | None) -> None:
    """NNCF's post-training quantization with its defaults."""
    import nncf
    import onnx

    samples = list(_feeds(folder))
    onnx.save(nncf.quantize(onnx.load(source), nncf.Dataset(samples), subset_size=len(samples)), target)


def onnxsim(source: str, target: str, folder: str, weight_bits: int | None) -> None:
    """Quantize with the defaults of onnxsim."""
    import onnx
    import onnxsim

    onnx.save(onnxsim.quantize_static(onnx.load(source), calibration_data=list(_feeds(folder))), target)


if __name__ == "__main__":
    tool, model, result, data, *bits = sys.argv[1:]
    {"fp32": fp32, "ours": ours, "ort": ort, "nncf": nncf, "onnxsim": onnxsim}[tool](
        model, result, data, int(bits[0]) if bits else None
    )
