"""Measuring one model file: what it holds, how fast it runs, how much memory it takes, beside the original."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from onnxslim.bodies import bodies
from onnxslim.data import open_dataset
from onnxslim.errors import ModelError
from onnxslim.graph.cost import MAC_OPS, layer_costs, node_count, op_histogram, parameter_count, total_macs
from onnxslim.model import Model, load
from onnxslim.model_files import file_sha256, size_on_disk
from onnxslim.record import Latency, LayerSize, Snapshot
from onnxslim.runtime import Feed, Session, TensorSpec, Timing, interleaved_latency

__all__ = ["shapes_of", "snapshot", "time_pair"]

_RECURRENT = frozenset({"LSTM", "GRU", "RNN"})  # exporters compute their weights in the graph


def snapshot(path: Path, feed: Feed | None, model: Model | None = None) -> Snapshot:
    """Describe a model file; with a feed its multiply-accumulates are those of one inference on it.

    Raises:
        ModelError: the file cannot be read.
    """
    model = model or load(path)
    layers = _layers(model, feed)
    return Snapshot(
        path=path.name,
        sha256=file_sha256(path),
        size_bytes=size_on_disk(path),
        nodes=node_count(model),
        parameters=parameter_count(model),
        macs=total_macs(layers),
        opset=model.opset,
        ir_version=model.ir_version,
        ops=op_histogram(model),
        layers=layers,
    )


def _layers(model: Model, feed: Feed | None) -> list[LayerSize]:
    """Costs with the sizes that tensors really have on a feed: shape inference stops at many dynamic graphs."""
    if feed is None:
        return layer_costs(model)
    try:
        observed = _observed(model, feed)
    except ModelError:
        observed = {}  # an estimate is not worth a failure; what shape inference knows stands
    return layer_costs(model, shapes_of(feed), observed)


def _observed(model: Model, feed: Feed) -> dict[str, list[int]]:
    """The shapes that multiplications read and give on a feed, in the bodies that it enters as well."""
    names = [
        tensor.name
        for node in model.graph.nodes
        if node.op in MAC_OPS and not node.domain
        for tensor in (*node.inputs[: 3 if node.op in _RECURRENT else 1], node.outputs[0])
        if tensor.inputs and tensor.name
    ]
    seen = Session(model, outputs=list(dict.fromkeys(names))).run(feed) if names else {}
    shapes = {name: list(value.shape) for name, value in seen.items() if isinstance(value, np.ndarray)}
    specs = [TensorSpec(name, value.dtype, None) for name, value in feed.items()]
    for body in bodies(model, open_dataset([feed], specs)):
        assert body.calibration is not None
        shapes |= _observed(body.model, next(iter(body.calibration)))
    return shapes


def shapes_of(feed: Mapping[str, np.ndarray]) -> dict[str, list[int]]:
    """The shape of each input of a feed."""
    return {name: list(np.shape(value)) for name, value in feed.items()}


def time_pair(original: Path, result: Path, feed: Feed, threads: int, *, max_seconds: float) -> tuple[Latency, Latency]:
    """Time two model files in ONNX Runtime, interleaved in this process, on the same feed and threads."""
    sessions = {"original": Session(original, threads=threads), "result": Session(result, threads=threads)}
    timings = interleaved_latency(
        {name: partial(session.run, feed) for name, session in sessions.items()}, max_seconds=max_seconds
    )
    entry = partial(Timing.latency, runtime="onnxruntime", threads=threads, input_shapes=shapes_of(feed))
    before = entry(timings["original"])
    after = entry(timings["result"], baseline=timings["original"], baseline_name="original in ONNX Runtime")
    return before, after
