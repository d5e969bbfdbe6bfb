"""Quantize trained models to int8 with onnxslim and with its peers, and print what each made of them and what it cost.

A pair is a Python module in a folder of your own, as for ``pairs.py``. Every tool runs as a process of its own on the
same calibration samples (without labels) and the original model; a row of the table holds

* the score of the original and of the result on the labelled test set;
* how often both have the same largest element along the last axis of the first float output, and its SQNR;
* the bytes of the file, and of all that is stored in its tensors, over the original's;
* the median latency of the original over the result's in ONNX Runtime (higher is faster), one thread, interleaved;
* CPU seconds (children included) and peak memory of the process that quantized.

The row ``fp32`` runs the original over the calibration samples. A number behind a tool is the width of its weights in
bits, where it is not the tool's default: ONNX Runtime's kernels for x86 processors without VNNI saturate with 8 bits,
and give other numbers there than elsewhere.

Run as ``python benchmarks/int8.py FOLDER [NAME …]``, with ``--peer nncf=/path/to/python`` for each peer that you have,
or ``--install ENVIRONMENTS`` to make their environments. A tool that fails on a model leaves its reason in the row.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
from processes import run_measured

from onnxslim.model_files import size_on_disk
from onnxslim.runtime import Feed, Session, interleaved_latency

_PEERS = {"nncf": ("nncf==3.4.0",), "onnxsim": ("onnxsim==0.8.1",)}
_TOOLS = ("fp32", "ours", "ours-8", "ort", "ort-7")
_HEAD = (
    "| pair | tool | fp32 | score | agree | SQNR, dB | file | weights | speed | CPU s | peak MB |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)
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


def _in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own: a broken model may take ONNX Runtime down with it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def rows(pair: ModuleType, name: str, tools: dict[str, Path], arguments: argparse.Namespace) -> Iterator[str]:
    """Run every tool on one pair; yield its row of the table."""
    output = (arguments.output / pair.NAME).resolve()
    data = output / "calibration"
    data.mkdir(parents=True, exist_ok=True)
    feeds = samples(pair, arguments.samples)
    for old in data.glob("*.npz"):
        old.unlink()
    for index, feed in enumerate(feeds):
        arrays: dict[str, Any] = dict(feed)
        np.savez(data / f"{index:05d}.npz", **arrays)
    original = Path(pair.load("calib")[0])
    for tool, python in tools.items():
        target = output / f"{tool}.onnx"
        target.unlink(missing_ok=True)
        kind, *bits = tool.split("-")
        script = str(Path(__file__).with_name("quantizers.py"))
        words = [str(python), script, kind, str(original), str(target), str(data), *bits]
        finished = run_measured(words, output, arguments.timeout)
        cost = f"{finished.cpu_seconds:.1f} | {finished.peak_bytes / 1e6:.0f}"
        try:
            if finished.failure:
                raise RuntimeError(finished.failure)
            found = _in_child(compare, str(arguments.folder.resolve()), name, str(original), str(target))
            ratio = 1.0 if tool == "fp32" else _in_child(speed, str(original), str(target), feeds[len(feeds) // 2])
            sizes = size_on_disk(target) / size_on_disk(original), weight_bytes(target) / weight_bytes(original)
            figures = f"{found[0]:.4f} | {found[1]:.4f} | {found[2]:.4f} | {found[3]:.1f} | "
            yield figures.replace("nan", "–") + f"{sizes[0]:.3f} | {sizes[1]:.3f} | {ratio:.2f} | {cost}"
        except BrokenProcessPool:
            yield f"crashes ONNX Runtime ||||||| {cost}"
        except Exception as error:  # whatever a peer's file makes of ONNX Runtime: the other rows still stand
            yield f"failed: {str(error).splitlines()[0][:160].replace('|', '/')} ||||||| {cost}"


def install(folder: Path) -> dict[str, Path]:
    """Make a virtual environment for each peer, unless it is there; return the Pythons of those that install."""
    pythons: dict[str, Path] = {}
    for name, packages in _PEERS.items():
        python = folder.resolve() / name / "bin" / "python"
        if not python.exists():
            venv.create(folder / name, with_pip=True)
        command = [str(python), "-m", "pip", "install", "-q", "onnx<1.23", "onnxruntime", *packages]
        if subprocess.run(command, check=False).returncode == 0:
            pythons[name] = python
        else:
            print(f"{name} does not install here", file=sys.stderr)
    return pythons


def main() -> None:
    """Parse, run every tool on every pair, print each row as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of pair modules")
    parser.add_argument("names", nargs="*", help="only these modules")
    parser.add_argument("--tool", action="append", choices=_TOOLS, help="only these of our own environment; repeatable")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help=", ".join(_PEERS))
    parser.add_argument("--install", type=Path, metavar="FOLDER", help="make an environment for every peer here")
    parser.add_argument("--samples", type=int, default=128, help="calibration samples")
    parser.add_argument("--timeout", type=float, default=900, help="seconds that one tool may take on one model")
    parser.add_argument("-o", "--output", type=Path, help="keep what the tools write in this folder")
    arguments = parser.parse_intermixed_args()
    tools = {tool: Path(sys.executable) for tool in arguments.tool or _TOOLS}
    if arguments.install:
        tools.update(install(arguments.install))
    for text in arguments.peer:
        name, _, python = text.partition("=")
        if name not in _PEERS or not Path(python).exists():
            parser.error(
                f"--peer {text}: say NAME=PYTHON; the Python must be there, the name one of {', '.join(_PEERS)}"
            )
        tools[name] = Path(python).absolute()
    sys.path.insert(0, str(arguments.folder))
    print(_HEAD, flush=True)
    with tempfile.TemporaryDirectory(prefix="onnxslim-") as scratch:
        arguments.output = arguments.output or Path(scratch)
        for name in arguments.names or sorted(path.stem for path in arguments.folder.glob("p[0-9]*.py")):
            try:
                pair = importlib.import_module(name)
                for tool, row in zip(tools, rows(pair, name, tools, arguments), strict=True):
                    print(f"| {pair.NAME} | {tool} | {row} |", flush=True)
            except FileNotFoundError as error:
                print(f"| {name} | | not here: {error.filename} ||||||||| ", flush=True)


if __name__ == "__main__":
    main()
