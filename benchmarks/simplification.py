"""Simplify models with onnxslim and with its peers, in one run, and print what each made of them and what it cost.

Every tool runs as its users run it, as a process of its own: nodes (without Constant; subgraphs and functions counted),
bytes on disk, CPU seconds (user and system, children included), peak memory, and whether ONNX Runtime still gives the
original's outputs. Times are medians of several rounds in which the tools take turns. Where onnxsim, onnxslim and
onnxscript are there, they also run one after the other, in all six orders; the shortest result is the row ``chain``.

Run as ``python benchmarks/simplification.py MODEL_OR_FOLDER … --install ENVIRONMENTS``, which makes a virtual
environment for each peer, or name those that you have: ``--peer onnxsim=/path/to/python --peer onnxslim=…``. In the
columns, ``ours`` is this package and ``onnxslim`` the one of that name on PyPI.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from processes import run_measured
from rich.console import Console
from rich.table import Table

from onnxslim.data import random_feeds
from onnxslim.errors import ModelError
from onnxslim.model_files import size_on_disk
from onnxslim.runtime import Feed, Session

_ONNXSCRIPT = (
    "import sys, onnx, onnxscript.optimizer\n"
    "onnx.save(onnxscript.optimizer.optimize(onnx.load(sys.argv[1])), sys.argv[2])"
)
_ONNXRUNTIME = (
    "import sys, onnxruntime as ort\n"
    "options = ort.SessionOptions()\n"
    "options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC\n"
    "options.optimized_model_filepath = sys.argv[2]\n"
    "ort.InferenceSession(sys.argv[1], options, providers=['CPUExecutionProvider'])"
)


@dataclass(frozen=True)
class Peer:
    """How users call a peer; ``{bin}``, ``{source}`` and ``{target}`` are filled in, its Python comes first."""

    command: tuple[str, ...]
    packages: tuple[str, ...]


_PEERS = {
    "onnxsim": Peer(("{bin}/onnxsim", "{source}", "{target}"), ("onnxsim==0.8.1",)),
    "onnxslim": Peer(("{bin}/onnxslim", "{source}", "{target}"), ("onnxslim==0.1.98",)),
    "onnxscript": Peer(("-c", _ONNXSCRIPT, "{source}", "{target}"), ("onnxscript==0.7.2",)),
    "onnxoptimizer": Peer(("-m", "onnxoptimizer", "{source}", "{target}"), ("onnxoptimizer==0.4.2",)),
    "onnxruntime": Peer(("-c", _ONNXRUNTIME, "{source}", "{target}"), ()),
    "polygraphy": Peer(
        ("{bin}/polygraphy", "surgeon", "sanitize", "--fold-constants", "{source}", "-o", "{target}"),
        ("polygraphy==0.53.6", "onnx-graphsurgeon==0.6.1"),
    ),
}
_OURS = Peer(("{bin}/onnxslim", "slim", "{source}", "{target}", "--quiet"), ())
_CHAINED = ("onnxsim", "onnxslim", "onnxscript")
# Of float outputs, relative to the value and to the largest of the tensor: what another order of additions may do.
_RTOL, _ATOL = 1e-3, 1e-4
_SMALLEST = 1e-2  # outputs that are all below it were larger on the way, as before a Sigmoid
_FEEDS, _ATTEMPTS = 4, 60


@dataclass
class Result:
    """What one tool made of one model; ``failure`` says why there is nothing."""

    model: str
    tool: str
    nodes: int = 0
    size_bytes: int = 0
    cpu_seconds: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)
    outputs: str = ""
    failure: str = ""
    histogram: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """Where the tools are and how they are run."""

    tools: dict[str, tuple[Path, Peer]]
    folder: Path
    timeout: float

    def run(self, tool: str, source: Path, target: Path) -> tuple[str, float, int]:
        """Run a tool once; return why it failed (or nothing), its CPU seconds and its peak memory in bytes."""
        python, peer = self.tools[tool]
        words = [
            word.format(bin=python.parent, source=source, target=target) if word.startswith("{") else word
            for word in peer.command
        ]
        if not peer.command[0].startswith("{bin}"):
            words.insert(0, str(python))
        target.unlink(missing_ok=True)
        finished = run_measured(words, self.folder, self.timeout)
        missing = "" if target.exists() else "it wrote nothing"
        return finished.failure or missing, finished.cpu_seconds, finished.peak_bytes


# ------------------------------------------------------------------------------------------------------- what came out


def histogram(path: Path) -> dict[str, int]:
    """How many nodes of each operator a file has, subgraphs and functions included, without Constant; most first."""
    model = onnx.load(path, load_external_data=False)
    counts: collections.Counter[str] = collections.Counter()
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        counts.update(node.op_type for node in _nested(nodes))
    del counts["Constant"]
    return dict(counts.most_common())


def _nested(nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _nested(graph.node)


def equality(original: str, result: str) -> str:
    """Say whether two files compute the same, on made-up inputs of several sizes of the dynamic axes."""
    try:
        before = Session(Path(original))
    except ModelError as error:
        return f"the original does not load: {error}"
    try:
        after = Session(Path(result))
    except ModelError as error:
        return f"does not load: {error}"
    ran = 0
    for feed in random_feeds(list(before.inputs.values()), count=_ATTEMPTS, seed=3):
        try:
            expected = before.run(feed)
        except ModelError:
            continue  # nobody declares which sizes and values a model can take
        try:
            fault = _fault(expected, after.run(feed))
        except ModelError as error:
            fault = f"does not run: {error}"
        if fault:
            return fault
        ran += 1
        if ran == _FEEDS:
            break
    return "equal" if ran else "not compared: no made-up input runs in the original"


def _fault(expected: Feed, got: Feed) -> str:
    for name, wanted in expected.items():
        if name not in got:
            return f"output {name} is missing"
        value = got[name]
        if not isinstance(wanted, np.ndarray):
            continue  # no benchmark model returns sequences
        if wanted.dtype != value.dtype or wanted.shape != value.shape:
            return f"output {name}: {wanted.dtype}{list(wanted.shape)} became {value.dtype}{list(value.shape)}"
        if wanted.dtype.kind != "f":
            if not np.array_equal(wanted, value):
                return f"output {name} differs"
            continue
        finite = wanted[np.isfinite(wanted)]
        scale = max(float(np.abs(finite).max(initial=0.0)), _SMALLEST)
        if not np.allclose(value, wanted, rtol=_RTOL, atol=_ATOL * scale, equal_nan=True):
            return f"output {name} differs by {np.nanmax(np.abs(value - wanted)):.2g}, the scale is {scale:.2g}"
    return ""


def _in_child(function: Callable[[str, str], str], *arguments: str) -> str:
    """Call a function in a process of its own: a broken model may take ONNX Runtime down with it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            return "crashes ONNX Runtime"


# --------------------------------------------------------------------------------------------------------------- runs


def measure(bench: Bench, label: str, source: Path, rounds: int) -> list[Result]:
    """Run every tool on one model, in turns; the first result is the model as it is."""
    results = [Result(label, "before"), *(Result(label, tool) for tool in bench.tools)]
    for number in range(rounds):
        for result in results[1:]:
            target = bench.folder / f"{label}.{result.tool}.onnx"
            if result.failure:
                continue
            result.failure, cpu, peak = bench.run(result.tool, source, target)
            print(f"{label}: {result.tool}, round {number + 1}: {result.failure or f'{cpu:.1f} s'}", file=sys.stderr)
            result.cpu_seconds.append(cpu)
            result.peak_bytes.append(peak)
    for result in results:
        _describe(result, source, source if result.tool == "before" else bench.folder / f"{label}.{result.tool}.onnx")
    if all(tool in bench.tools for tool in _CHAINED):
        results.append(_best_chain(bench, label, source))
    return results


def _describe(result: Result, source: Path, made: Path) -> None:
    if result.failure:
        return
    try:
        result.histogram = histogram(made)
    except Exception as error:  # protobuf raises several unrelated types on a file that is none
        result.failure = f"wrote what onnx cannot read: {error}"
        return
    result.nodes = sum(result.histogram.values())
    result.size_bytes = size_on_disk(made)
    result.outputs = "equal" if made == source else _in_child(equality, str(source), str(made))


def _best_chain(bench: Bench, label: str, source: Path) -> Result:
    """Run three peers one after the other, in all orders; what two orders begin with runs once."""
    with tempfile.TemporaryDirectory(prefix="onnxslim-") as scratch:
        made: dict[tuple[str, ...], Path] = {(): source}
        failures: dict[tuple[str, ...], str] = {}
        for order in itertools.permutations(_CHAINED):
            for length in range(1, len(order) + 1):
                prefix = order[:length]
                if prefix in made or prefix in failures or prefix[:-1] not in made:
                    continue
                target = Path(scratch) / f"{'+'.join(prefix)}.onnx"
                failure = bench.run(prefix[-1], made[prefix[:-1]], target)[0]
                if failure:
                    failures[prefix] = f"{', then '.join(prefix)}: {failure}"
                else:
                    made[prefix] = target
        nodes = {order: sum(histogram(made[order]).values()) for order in made if len(order) == len(_CHAINED)}
        if not nodes:
            return Result(label, "chain", failure="; ".join(failures.values()))
        best = min(nodes, key=lambda order: nodes[order])
        result = Result(label, f"chain {', '.join(best)}")
        kept = bench.folder / f"{label}.chain.onnx"
        shutil.copy(made[best], kept)
    _describe(result, source, kept)
    return result


def install(folder: Path) -> dict[str, Path]:
    """Make a virtual environment for each peer, unless it is there; return their Pythons."""
    pythons: dict[str, Path] = {}
    for name, peer in _PEERS.items():
        pythons[name] = folder.resolve() / name / "bin" / "python"
        if not pythons[name].exists():
            venv.create(folder / name, with_pip=True)
            wanted = ["onnx<1.23", "onnxruntime", *peer.packages]  # onnx 1.23 writes files that several peers refuse
            subprocess.run([str(pythons[name]), "-m", "pip", "install", "-q", *wanted], check=True)
    return pythons


def _models(paths: Sequence[Path]) -> dict[str, Path]:
    """Label the models by their file names, with the folder's where these repeat or say nothing."""
    files = [file for path in paths for file in (sorted(path.rglob("*.onnx")) if path.is_dir() else [path])]
    labels: dict[str, Path] = {}
    for file in dict.fromkeys(each.resolve() for each in files):
        label = file.stem if file.stem != "model" and file.stem not in labels else f"{file.parent.name}-{file.stem}"
        labels[label] = file
    return labels


# ------------------------------------------------------------------------------------------------------------- tables


def print_tables(results: Sequence[Result], console: Console) -> None:
    """Print the nodes of every model beside each other, then all figures, one row for each model and tool."""
    tools = list(dict.fromkeys(result.tool.split()[0] for result in results))
    by_model: dict[str, dict[str, Result]] = {}
    for result in results:
        by_model.setdefault(result.model, {})[result.tool.split()[0]] = result
    nodes = Table("model", *tools, title="nodes (! the outputs are not the original's)", box=None)
    for model, row in by_model.items():
        nodes.add_row(model, *(_cell(row[tool]) if tool in row else "" for tool in tools))
    timed = [row for row in by_model.values() if all(result.cpu_seconds for result in row.values() if _timed(result))]
    totals = {tool: sum(_cpu(row[tool]) for row in timed) for tool in tools if tool not in ("before", "chain")}
    nodes.add_row("CPU s, sum", *(f"{totals[tool]:.1f}" if tool in totals else "" for tool in tools))
    ratios = (f"{totals[tool] / totals['ours']:.2f}" if tool in totals and totals["ours"] else "" for tool in tools)
    nodes.add_row("over ours", *ratios)
    console.print(nodes)
    every = Table("model", "tool", "nodes", "kB", "CPU s", "peak MB", "outputs", title="all figures", box=None)
    for result in results:
        timed = _timed(result) and bool(result.cpu_seconds)
        every.add_row(
            result.model,
            result.tool,
            "–" if result.failure else str(result.nodes),
            "–" if result.failure else f"{result.size_bytes / 1e3:.1f}",
            f"{_cpu(result):.2f}" if timed else "",
            f"{statistics.median(result.peak_bytes) / 1e6:.0f}" if timed else "",
            result.failure or result.outputs,
        )
    console.print(every)


def _timed(result: Result) -> bool:
    return result.tool.split()[0] not in ("before", "chain")


def _cpu(result: Result) -> float:
    return statistics.median(result.cpu_seconds)


def _cell(result: Result) -> str:
    if result.failure:
        return "failed"
    return f"{result.nodes}{'' if result.outputs == 'equal' else '?' if 'not compared' in result.outputs else '!'}"


def main() -> None:
    """Parse, run every tool on every model, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="ONNX files, or folders of them")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help=", ".join(_PEERS))
    parser.add_argument("--install", type=Path, metavar="FOLDER", help="make an environment for every peer here")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=600, help="seconds that one tool may take on one model")
    parser.add_argument("-o", "--output", type=Path, help="keep what the tools write in this folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here too")
    arguments = parser.parse_intermixed_args()
    pythons = {"onnxruntime": Path(sys.executable)}
    if arguments.install:
        pythons.update(install(arguments.install))
    for text in arguments.peer:
        name, _, python = text.partition("=")
        if name not in _PEERS or not Path(python).exists():
            parser.error(
                f"--peer {text}: say NAME=PYTHON; the Python must be there, the name one of {', '.join(_PEERS)}"
            )
        pythons[name] = Path(python).absolute()
    tools = {"ours": (Path(sys.executable), _OURS), **{n: (pythons[n], p) for n, p in _PEERS.items() if n in pythons}}
    with contextlib.ExitStack() as stack:
        folder = arguments.output or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="onnxslim-")))
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(tools, folder.resolve(), arguments.timeout)
        results: list[Result] = []
        for label, source in _models(arguments.models).items():
            results += measure(bench, label, source, arguments.rounds)
            if arguments.json:
                record = {"onnxruntime": onnxruntime.__version__, "results": [asdict(result) for result in results]}
                arguments.json.write_text(json.dumps(record, indent=1))
    print_tables(results, Console(width=None if sys.stdout.isatty() else 200))


if __name__ == "__main__":
    main()
