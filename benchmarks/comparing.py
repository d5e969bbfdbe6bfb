"""What the benchmarks against other tools share: samples and scores of pairs, latencies, environments of the peers."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime

from onnxslim.runtime import Feed, Session, interleaved_latency

_MOST_AXES = 3  # the last axis of outputs with more of them is rarely one of classes
_LATENCY_SECONDS = 15.0


# --------------------------------------------------------------------------------------------------------------- data


def samples(pair: ModuleType, count: int) -> list[Feed]:
    """``count`` evenly spaced calibration samples; feeds that are batches are cut into their rows."""
    path, feeds, _ = pair.load("calib")
    if hasattr(pair, "flat_feeds"):
        feeds = pair.flat_feeds("calib")
    if _batched(path, feeds):
        feeds = [{name: value[row : row + 1] for name, value in feed.items()} for feed in feeds for row in _rows(feed)]
    chosen = np.unique(np.linspace(0, len(feeds) - 1, min(count, len(feeds))).astype(int))
    return [feeds[index] for index in chosen]


def write_feeds(folder: Path, feeds: Sequence[Feed]) -> None:
    """Make ``folder`` hold these feeds, an ``.npz`` file each, and no others."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.npz"):
        old.unlink()
    for index, feed in enumerate(feeds):
        arrays: dict[str, Any] = dict(feed)
        np.savez(folder / f"{index:05d}.npz", **arrays)


def _batched(path: str, feeds: Sequence[Feed]) -> bool:
    """Whether the first axis of every input is free, and is one of rows: of one length, the last feed aside."""
    inputs = onnx.load(path, load_external_data=False).graph.input
    free = all(tensor.type.tensor_type.shape.dim[:1] and not _fixed(tensor) for tensor in inputs)
    return free and len({len(value) for feed in feeds[:-1] for value in feed.values()}) == 1


def _fixed(tensor: onnx.ValueInfoProto) -> int:
    return max(0, tensor.type.tensor_type.shape.dim[0].dim_value)


def _rows(feed: Feed) -> range:
    return range(len(next(iter(feed.values()))))


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            for body in (attribute.g, *attribute.graphs):
                yield from _tensors(body)


def weight_bytes(path: Path) -> int:
    """Bytes of all that a file stores in tensors, bodies included."""
    stored = _tensors(onnx.load(path, load_external_data=False).graph)
    return sum(onnx.helper.tensor_dtype_to_np_dtype(one.data_type).itemsize * int(np.prod(one.dims)) for one in stored)


# ----------------------------------------------------------------------------------------------------------- measuring


def compare(folder: str, name: str, original: str, result: str) -> tuple[float, float, float, float]:
    """Score of the original and of the result, share of equal decisions (NaN: no classes), SQNR."""
    sys.path.insert(0, folder)
    pair = importlib.import_module(name)
    _, feeds, labels = pair.load("test")
    run = getattr(pair, "run", lambda session, feeds: [session.run(None, feed) for feed in feeds])
    wanted, got = (run(_session(path), feeds) for path in (original, result))
    equal, total, noise, signal = 0, 0, 0.0, 0.0
    for before, after in zip(wanted, got, strict=True):
        index = next(index for index, output in enumerate(before) if output.dtype.kind == "f")
        true, value = np.asarray(before[index], np.float64), np.asarray(after[index], np.float64)
        if true.shape != value.shape:  # a loop that ended elsewhere: what both have is compared, the rest is noise
            both = tuple(slice(min(pair)) for pair in zip(true.shape, value.shape, strict=True))
            padded = np.zeros_like(true)
            padded[both] = value[both]
            value = padded
        noise += float(np.square(value - true).sum())
        signal += float(np.square(true).sum())
        if 1 < true.ndim <= _MOST_AXES and true.shape[-1] > 1:
            equal += int((true.argmax(-1) == value.argmax(-1)).sum())
            total += true.size // true.shape[-1]
    sqnr = 10 * np.log10(signal / noise) if noise and signal else np.inf
    agreement = equal / total if total else np.nan
    return float(pair.score(wanted, labels)), float(pair.score(got, labels)), agreement, float(sqnr)


def _session(path: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def speed(original: str, result: str, feed: Feed) -> float:
    """How many times faster the result is, one thread, interleaved."""
    sessions = {path: Session(Path(path), threads=1) for path in (original, result)}
    runs = {path: partial(session.run, feed) for path, session in sessions.items()}
    timings = interleaved_latency(runs, max_seconds=_LATENCY_SECONDS)
    return timings[original].median_ms / timings[result].median_ms


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own: a broken model may take ONNX Runtime down with it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def install(folder: Path, peers: dict[str, tuple[str, ...]]) -> dict[str, Path]:
    """Make a virtual environment for each peer, unless it is there; return the Pythons of those that install.

    Args:
        folder: of the environments.
        peers: the packages of each, beside onnx and onnxruntime.
    """
    pythons: dict[str, Path] = {}
    for name, packages in peers.items():
        python = folder.resolve() / name / "bin" / "python"
        if not python.exists():
            venv.create(folder / name, with_pip=True)
        command = [str(python), "-m", "pip", "install", "-q", "onnx<1.23", "onnxruntime", *packages]
        if subprocess.run(command, check=False).returncode == 0:
            pythons[name] = python
        else:
            print(f"{name} does not install here", file=sys.stderr)
    return pythons


def peer_pythons(texts: Sequence[str], names: Sequence[str], parser: argparse.ArgumentParser) -> dict[str, Path]:
    """Read options ``NAME=PYTHON``; exits with a message where one is wrong."""
    found = {}
    for text in texts:
        name, _, python = text.partition("=")
        if name not in names or not Path(python).exists():
            parser.error(
                f"--peer {text}: say NAME=PYTHON; the Python must be there, the name one of {', '.join(names)}"
            )
        found[name] = Path(python).absolute()
    return found
