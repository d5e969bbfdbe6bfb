"""Prune, factorise and share the weights of trained models with onnxslim and with its peers: accuracy against cost.

A pair is a Python module in a folder of your own, as for ``pairs.py``. Every tool runs as a process of its own on the
same calibration samples (without labels) and the original model; a row of the table holds

* the score of the original and of the result on the labelled test set, and how often both decide alike;
* multiply-accumulates, parameters and bytes on disk over the original's;
* the median latency of the original over the result's in ONNX Runtime (higher is faster), one thread, interleaved;
* CPU seconds (children included), seconds and peak memory of the process that compressed.

Run as ``python benchmarks/compression.py FOLDER [NAME …]``. ``--steps prune=0.3,codebook=4`` (repeatable) says what is
done, as `compressors.py` reads it; without it, a curve of pruning from 5 to 60 % of the channels. ``--install
ENVIRONMENTS`` makes the environments of the peers, ``--peer onnxsim=/path/to/python`` names one that is there. A tool
that fails on a model leaves its reason in the row.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import ModuleType

from comparing import compare, in_child, install, peer_pythons, samples, speed, write_feeds
from processes import run_measured

from onnxslim.measure import snapshot

_PEERS = {
    "onnxsim": ("onnxsim==0.8.1",),
    "torch-pruning": ("torch-pruning==1.6.1", "onnx2torch==1.5.15", "torch", "torchvision"),
}
_CURVE = tuple(f"prune={percent / 100}" for percent in (5, 10, 20, 30, 40, 50, 60))
_HEAD = (
    "| pair | steps | tool | fp32 | score | agree | MACs | parameters | file | speed | CPU s | s | peak MB |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def rows(pair: ModuleType, name: str, tools: dict[str, Path], arguments: argparse.Namespace) -> Iterator[str]:
    """Run every tool with all steps on one pair; yield rows of the table."""
    output = (arguments.output / pair.NAME).resolve()
    feeds = samples(pair, arguments.samples)
    write_feeds(output / "calibration", feeds)
    original = str(Path(pair.load("calib")[0]))
    script = str(Path(__file__).with_name("compressors.py"))
    for steps in arguments.steps or _CURVE:
        for tool, python in tools.items():
            target = str(output / f"{steps}-{tool}.onnx")
            Path(target).unlink(missing_ok=True)
            started = time.monotonic()
            words = [str(python), script, tool, original, target, str(output / "calibration"), steps]
            finished = run_measured(words, output, arguments.timeout)
            spent = time.monotonic() - started
            cost = f"{finished.cpu_seconds:.1f} | {spent:.1f} | {finished.peak_bytes / 1e6:.0f}"
            head = f"| {pair.NAME} | {steps} | {tool} "
            try:
                if finished.failure:
                    raise RuntimeError(finished.failure)
                found = in_child(compare, str(arguments.folder.resolve()), name, original, target)
                ratio = in_child(speed, original, target, feeds[len(feeds) // 2])
                before, after = (snapshot(Path(path), feeds[0]) for path in (original, target))
                macs = f"{(after.macs or 0) / before.macs:.3f}" if before.macs else "–"
                held = after.parameters / max(before.parameters, 1)
                size = after.size_bytes / before.size_bytes
                figures = f"{found[0]:.4f} | {found[1]:.4f} | {found[2]:.4f} | ".replace("nan", "–")
                yield f"{head}| {figures}{macs} | {held:.3f} | {size:.3f} | {ratio:.2f} | {cost} |"
            except BrokenProcessPool:
                yield f"{head}| crashes ONNX Runtime ||||||| {cost} |"
            except Exception as error:  # whatever a peer's file makes of ONNX Runtime: the other rows still stand
                yield f"{head}| failed: {str(error).splitlines()[0][:160].replace('|', '/')} ||||||| {cost} |"


def main() -> None:
    """Parse, run every tool on every pair, print each row as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of pair modules")
    parser.add_argument("names", nargs="*", help="only these modules")
    parser.add_argument("--steps", action="append", help="what to do, such as prune=0.3,codebook=4; repeatable")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help=", ".join(_PEERS))
    parser.add_argument("--install", type=Path, metavar="FOLDER", help="make an environment for every peer here")
    parser.add_argument("--samples", type=int, default=400, help="calibration samples")
    parser.add_argument("--timeout", type=float, default=900, help="seconds that one tool may take on one model")
    parser.add_argument("-o", "--output", type=Path, help="keep what the tools write in this folder")
    arguments = parser.parse_intermixed_args()
    tools = {"ours": Path(sys.executable)}
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
                for row in rows(pair, name, tools, arguments):
                    print(row, flush=True)
            except FileNotFoundError as error:
                print(f"| {name} | | not here: {error.filename} ||||||||||| ", flush=True)


if __name__ == "__main__":
    main()
