"""Measuring one model file: what it holds, how fast it runs, how much memory it takes, beside the original."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from onnxslim.errors import ModelError
from onnxslim.graph.cost import layer_costs, node_count, op_histogram, parameter_count, total_macs
from onnxslim.model import Model, load
from onnxslim.model_files import file_sha256, size_on_disk
from onnxslim.record import Latency, LayerSize, Snapshot
from onnxslim.runtime import Feed, Session, Timing, interleaved_latency

__all__ = ["shapes_of", "snapshot", "time_pair"]

_MAC_OPS = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm", "LSTM", "GRU", "RNN"})


def snapshot(path: Path, feed: Feed | None, model: Model | None = None) -> Snapshot:
    """Describe a model file; with a feed its multiply-accumulates are those of one inference on it.

    Raises:
        ModelError: the file cannot be read.
    """
    model = model or load(path)
    layers = _layers(model, path, feed)
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


def _layers(model: Model, path: Path, feed: Feed | None) -> list[LayerSize]:
    """Costs with the sizes that tensors really have on a feed: shape inference stops at many dynamic graphs."""
    observed: dict[str, list[int]] = {}
    names = [
        tensor.name
        for node in model.graph.nodes
        if node.op in _MAC_OPS and not node.domain
        for tensor in (node.inputs[0], node.outputs[0])
        if tensor.inputs and tensor.name
    ]
    if feed is not None and names:
        try:
            results = Session(model, outputs=list(dict.fromkeys(names))).run(feed)
        except ModelError:
            results = {}  # an estimate is not worth a failure; what shape inference knows stands
        observed = {name: list(value.shape) for name, value in results.items() if isinstance(value, np.ndarray)}
    fixed = shapes_of(feed) if feed is not None else None
    return layer_costs(model, fixed, observed)


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
