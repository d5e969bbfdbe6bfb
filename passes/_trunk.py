"""Running a model in steps, so that a pass may change weights between them and no node runs twice.

A layer-by-layer method needs what enters layer ``i`` once layers ``0 .. i-1`` have their new weights. Running the
network from the start for each layer costs as many forward passes as it has layers; here every step starts from the
tensors at which the last one stopped (the cut through the graph behind which nothing is needed any more).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.graph.walk import drop_value_info, remove_dead_nodes, subgraphs
from onnxslim.model import Model
from onnxslim.runtime import Session

__all__ = ["Trunk"]

Feed = dict[str, np.ndarray]


class Trunk:
    """A model run piece by piece over the same batches.

    Args:
        model: whose nodes before the last `step` must not change any more; later ones may.
        batches: yields the feeds anew at each call.
        budget: bytes of tensors to hold between steps; above it a step starts further back, at the inputs if need be.
    """

    def __init__(self, model: Model, batches: Callable[[], Iterable[Feed]], budget: int = 1 << 29) -> None:
        self._model = model
        self._batches = batches
        self._budget = budget
        self._held: list[Feed] | None = None  # None: the feeds themselves
        self._done: set[int] = set()

    def step(self, wanted: Sequence[str]) -> Iterator[Feed]:
        """Yield the tensors ``wanted`` (of the main graph) for each batch in turn; exhaust it before the next step.

        Raises:
            ModelError: the model does not run on a batch.
        """
        nodes = self._model.graph.nodes
        maker = {tensor.name: index for index, node in enumerate(nodes) for tensor in node.outputs}
        held = set(self._held[0]) if self._held else set()
        needed = self._ancestors(wanted, maker, held)
        ahead = self._done | needed
        frontier = self._frontier(ahead, held)
        made = {name for index in needed for name in _made(nodes[index])}
        session = self._segment(needed, sorted({*wanted, *frontier} & made))
        kept: list[Feed] | None = []
        size = 0
        for batch in self._held if self._held is not None else self._batches():
            values = dict(batch)
            if session is not None:
                values |= session.run({name: batch[name] for name in session.inputs if name in batch})
            yield {name: values[name] for name in wanted}
            if kept is not None:
                kept.append({name: values[name] for name in frontier if name in values})
                size += sum(value.nbytes for value in kept[-1].values())
                if size > self._budget:
                    kept = None
        if kept:
            self._held, self._done = kept, ahead

    def _ancestors(self, wanted: Iterable[str], maker: dict[str, int], held: set[str]) -> set[int]:
        """Nodes that must run to get from the held tensors to the wanted ones."""
        nodes = self._model.graph.nodes
        needed: set[int] = set()
        stack = [maker[name] for name in wanted if name not in held and name in maker]
        while stack:
            index = stack.pop()
            if index in needed:
                continue
            needed.add(index)
            stack.extend(maker[name] for name in _read(nodes[index]) if name not in held and name in maker)
        return needed

    def _frontier(self, done: set[int], held: set[str]) -> set[str]:
        """Tensors that nodes still to run will read of those that are there by then, graph inputs included."""
        nodes = self._model.graph.nodes
        there = {name for index in done for name in _made(nodes[index])} | held
        there |= {tensor.name for tensor in self._model.graph.inputs}
        later = {name for index, node in enumerate(nodes) if index not in done for name in _read(node)}
        return there & later

    def _segment(self, needed: set[int], fetch: list[str]) -> Session | None:
        """A session over the needed nodes alone."""
        if not needed:
            return None
        part = self._model.copy()
        nodes = part.graph.nodes
        tensors: dict[str, Any] = {}
        for index in sorted(needed):
            for tensor in _tensors_read(nodes[index]):
                tensors.setdefault(tensor.name, tensor)
        made = {name for index in needed for name in _made(nodes[index])}
        known = {tensor.name for tensor in part.graph.inputs}
        for index, node in enumerate(nodes):
            if index not in needed:
                node.outputs.clear()
                node.inputs.clear()
        part.graph.nodes = [node for index, node in enumerate(nodes) if index in needed]
        drop_value_info(part)
        entering = [t for t in part.graph.inputs if t.name in tensors]
        for name, tensor in tensors.items():
            if name not in made and name not in known and isinstance(tensor, gs.Variable) and not tensor.is_empty():
                tensor.__dict__.pop("info", None)
                tensor.dtype = self._held[0][name].dtype if self._held else None
                tensor.shape = None
                entering.append(tensor)
        part.graph.inputs = entering
        part.graph.outputs = []
        for node in part.graph.nodes:
            part.graph.outputs.extend(t for t in node.outputs if t.name in fetch)
        remove_dead_nodes(part)
        return Session(part, outputs=fetch)


def _made(node: gs.Node) -> list[str]:
    return [tensor.name for tensor in node.outputs if not tensor.is_empty()]


def _tensors_read(node: gs.Node) -> Iterator[gs.Tensor]:
    """Tensors that a node reads, those that its bodies read or return of outer graphs included."""
    yield from node.inputs
    for body in subgraphs(node):
        for inner in body.nodes:
            yield from _tensors_read(inner)
        yield from body.outputs


def _read(node: gs.Node) -> list[str]:
    return [t.name for t in _tensors_read(node) if isinstance(t, gs.Variable) and not t.is_empty()]
