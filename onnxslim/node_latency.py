"""How long each node takes in ONNX Runtime, which fuses, renames and reorders them before it runs any.

Its profile names a kernel after a node or after what that node makes, so every node and tensor of a copy is named by
number. A kernel of several nodes carries the number of any of them: its time goes to the one whose operator it has,
which lies in front of the activation or the Add that was fused.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.runtime import Session

if TYPE_CHECKING:
    from onnxslim.model import Model

__all__ = ["node_latencies"]

_SECONDS, _LEAST_RUNS, _MOST_RUNS = 0.5, 3, 50
_FUSED = 8  # nodes in a row that one kernel may stand for
_LABEL = re.compile(r"node(\d+)\.")
_EVENT = "_kernel_time"


class _Profiled(Session):
    """A session that writes down when each kernel ran."""

    def __init__(self, model: Model, folder: Path) -> None:
        self._prefix = str(folder / "profile")
        super().__init__(model, threads=1)

    def _options(self, *, optimize: bool) -> Any:
        options = super()._options(optimize=optimize)
        options.enable_profiling = True
        options.profile_file_prefix = self._prefix
        return options

    def kernels(self) -> Iterator[tuple[str, str, float]]:
        """Name, operator and microseconds of each kernel that ran, in order; ends it.

        One at a time: a loop of hundreds of iterations writes hundreds of thousands, each on a line of its own.
        """
        with Path(self._session.end_profiling()).open(encoding="utf-8") as lines:
            for line in lines:
                if _EVENT in line:
                    event = json.loads(line.strip().rstrip(","))
                    name = str(event["name"])
                    if event.get("cat") == "Node" and name.endswith(_EVENT):
                        yield name.removesuffix(_EVENT), str(event["args"].get("op_name", "")), float(event["dur"])


def node_latencies(model: Model, feed: Mapping[str, np.ndarray]) -> dict[int, float]:
    """Median time of each node of the main graph in one inference on one thread, in microseconds, by ``id``.

    Nodes that take no time of their own, because they were folded or fused into others, are left out.

    Args:
        model: not changed.
        feed: what to run.

    Raises:
        ModelError: the model does not run on the feed.
    """
    labelled = model.copy()
    outputs = {id(tensor) for tensor in labelled.graph.outputs}
    number: dict[str, int] = {}
    for index, node in enumerate(labelled.graph.nodes):
        node.name = f"node{index}."
        for slot, tensor in enumerate(node.outputs):
            if id(tensor) in outputs:
                number[tensor.name] = index
            elif tensor.name:
                tensor.name = f"node{index}.{slot}"
    with tempfile.TemporaryDirectory(prefix="onnxslim-", ignore_cleanup_errors=True) as folder:
        session = _Profiled(labelled, Path(folder))
        started, runs = time.perf_counter(), 0
        while runs <= _LEAST_RUNS or (runs <= _MOST_RUNS and time.perf_counter() - started < _SECONDS):
            session.run(feed)
            runs += 1
        times: dict[tuple[str, str], list[float]] = {}
        for name, op, microseconds in session.kernels():
            times.setdefault((name, op), []).append(microseconds)
    places = {id(node): place for place, node in enumerate(labelled.graph.nodes)}
    found: dict[int, float] = {}
    for (name, op), durations in times.items():
        label = _labelled(name, number)
        if label is not None:
            node = model.graph.nodes[places[id(_computing(labelled.graph.nodes[label], op, places))]]
            found[id(node)] = found.get(id(node), 0.0) + _typical(durations, runs)
    return found


def _typical(durations: list[float], runs: int) -> float:
    """The time of a kernel in one run of several: the median, which other work on the machine hardly moves.

    The first run lays out weights. In a loop a kernel runs several times; where that differs by the run, the mean.
    """
    if len(durations) % runs == 0 and runs > 1:
        return float(np.median(np.reshape(durations, (runs, -1))[1:].sum(axis=1)))
    return sum(durations[len(durations) // runs :]) / max(runs - 1, 1)


def _labelled(name: str, number: Mapping[str, int]) -> int | None:
    """The number in the name of a kernel; that of the graph output whose name it starts with, which none is longer."""
    label = _LABEL.search(name)
    if label is not None:
        return int(label[1])
    outputs = [output for output in number if name.startswith(output)]
    return number[max(outputs, key=len)] if outputs else None


def _computing(node: gs.Node, op: str, places: Mapping[int, int]) -> gs.Node:
    """The node, from this one backwards among those of ``places``, whose operator a kernel has."""
    at = node
    for _ in range(_FUSED):
        if at.op in op:
            return at
        producers = [tensor.inputs[0] for tensor in at.inputs if tensor.inputs and id(tensor.inputs[0]) in places]
        if not producers:
            break
        at = next((each for each in producers if each.op in op), producers[0])
    return node
