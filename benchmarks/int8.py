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
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import ModuleType

from comparing import compare, in_child, install, peer_pythons, samples, speed, weight_bytes, write_feeds
from processes import run_measured

from onnxslim.model_files import size_on_disk

_PEERS = {"nncf": ("nncf==3.4.0",), "onnxsim": ("onnxsim==0.8.1",)}
_TOOLS = ("fp32", "ours", "ours-8", "ort", "ort-7")
_HEAD = (
    "| pair | tool | fp32 | score | agree | SQNR, dB | file | weights | speed | CPU s | peak MB |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def rows(pair: ModuleType, name: str, tools: dict[str, Path], arguments: argparse.Namespace) -> Iterator[str]:
    """Run every tool on one pair; yield its row of the table."""
    output = (arguments.output / pair.NAME).resolve()
    data = output / "calibration"
    feeds = samples(pair, arguments.samples)
    write_feeds(data, feeds)
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
            found = in_child(compare, str(arguments.folder.resolve()), name, str(original), str(target))
            ratio = 1.0 if tool == "fp32" else in_child(speed, str(original), str(target), feeds[len(feeds) // 2])
            sizes = size_on_disk(target) / size_on_disk(original), weight_bytes(target) / weight_bytes(original)
            figures = f"{found[0]:.4f} | {found[1]:.4f} | {found[2]:.4f} | {found[3]:.1f} | "
            yield figures.replace("nan", "–") + f"{sizes[0]:.3f} | {sizes[1]:.3f} | {ratio:.2f} | {cost}"
        except BrokenProcessPool:
            yield f"crashes ONNX Runtime ||||||| {cost}"
        except Exception as error:  # whatever a peer's file makes of ONNX Runtime: the other rows still stand
            yield f"failed: {str(error).splitlines()[0][:160].replace('|', '/')} ||||||| {cost}"


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
        tools.update(install(arguments.install, _PEERS))
    tools.update(peer_pythons(arguments.peer, list(_PEERS), parser))
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
