"""Running a model in steps, so that a pass may change weights between them and no node runs twice.

A layer-by-layer method needs what enters layer ``i`` once layers ``0 .. i-1`` have their new weights. Running the
network from the start for each layer costs as many forward passes as it has layers; here every step starts from the
tensors at which the last one stopped (the cut through the graph behind which nothing is needed any more). Those of the
first batches are held in memory, those of the others in a temporary file.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.graph.walk import drop_value_info, remove_dead_nodes, subgraphs
from onnxslim.model import Model
from onnxslim.runtime import Session

__all__ = ["Trunk"]

Feed = dict[str, np.ndarray]

_MOST_DISK = 8 << 30  # bytes of one temporary file


class _Held:
    """Feeds to come back to, in order; once the budget is spent, on disk while there is room."""

    def __init__(self, budget: int) -> None:
        self._memory: list[Feed] = []
        self._left = budget
        self._file: IO[bytes] | None = None
        self._disk: list[list[tuple[str, np.dtype[Any], tuple[int, ...]]]] = []
        self._room = 0

    def append(self, feed: Feed) -> bool:
        """Hold one more; False where there is no room for it."""
        size = sum(value.nbytes for value in feed.values())
        if self._file is None and size <= self._left:
            self._memory.append(feed)
            self._left -= size
            return True
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it goes with this object
            # Two of these files are there at a time for each of two models, and others may want to write as well.
            self._room = min(_MOST_DISK, shutil.disk_usage(tempfile.gettempdir()).free // 8)
        self._room -= size
        if self._room < 0 or any(value.dtype.hasobject for value in feed.values()):
            return False
        for value in feed.values():
            np.ascontiguousarray(value).tofile(self._file)
        self._disk.append([(name, value.dtype, value.shape) for name, value in feed.items()])
        return True

    def __iter__(self) -> Iterator[Feed]:
        yield from self._memory
        if self._file is None:
            return
        self._file.seek(0)
        for entries in self._disk:
            yield {
                name: np.fromfile(self._file, dtype, int(np.prod(shape))).reshape(shape)
                for name, dtype, shape in entries
            }


class Trunk:
    """A model run piece by piece over the same batches.

    Args:
        model: whose nodes before the last `step` must not change any more; later ones may.
        batches: yields the feeds anew at each call.
        budget: bytes of tensors to hold in memory between steps. Above it, and above what there is room for on the disk
            of temporary files, a step starts further back, at the inputs if need be.
    """

    def __init__(self, model: Model, batches: Callable[[], Iterable[Feed]], budget: int = 1 << 29) -> None:
        self._model = model
        self._batches = batches
        self._budget = budget
        self._held: _Held | None = None  # None: the feeds themselves
        self._types: dict[str, np.dtype[Any]] = {}  # of what is held
        self._done: set[str] = set()  # what was made up to there: nodes may be put in behind it

    def step(self, wanted: Sequence[str], *, further: bool = True) -> Iterator[Feed]:
        """Yield the tensors ``wanted`` (of the main graph) for each batch in turn; exhaust it before the next step.

        Args:
            wanted: those of a later step are best no ancestors of these: what is not held is computed from the inputs.
            further: whether there is another step, for which to hold tensors.

        Raises:
            ModelError: the model does not run on a batch.
        """
        nodes = self._model.graph.nodes
        maker = {tensor.name: index for index, node in enumerate(nodes) for tensor in node.outputs}
        held = set(self._types)
        needed = self._ancestors(wanted, maker, held)
        if self._held is not None and not self._entering(needed, wanted) <= held:
            self._held, self._types, self._done, held = None, {}, set(), set()
            needed = self._ancestors(wanted, maker, held)
        made = {name for index in needed for name in _made(nodes[index])}
        done = self._done | made
        frontier = self._frontier(done, held)
        session = self._segment(needed, sorted({*wanted, *frontier} & made))
        fixed = self._fixed(set(wanted))
        kept = _Held(self._budget) if further else None
        types: dict[str, np.dtype[Any]] = {}
        for batch in self._held if self._held is not None else self._batches():
            values = fixed | batch
            if session is not None:
                given = (*session.inputs, *session.optional_inputs)
                values |= session.run({name: batch[name] for name in given if name in batch})
            yield {name: values[name] for name in wanted}
            if kept is not None:
                behind = {name: values[name] for name in frontier if name in values}
                if all(isinstance(value, np.ndarray) for value in behind.values()) and kept.append(behind):
                    types = {name: value.dtype for name, value in behind.items()}
                else:  # sequences, or no room
                    kept = None
        if kept is not None and types:
            self._held, self._types, self._done = kept, types, done

    def _fixed(self, wanted: set[str]) -> Feed:
        """Those of the wanted tensors that are constants, or inputs that a feed need not hold."""
        constants = [tensor for node in self._model.graph.nodes for tensor in node.inputs if tensor.name in wanted]
        found = {tensor.name: tensor.values for tensor in constants if isinstance(tensor, gs.Constant)}
        optional = [tensor for tensor in self._model.graph.inputs if "default" in tensor.__dict__]
        return found | {tensor.name: tensor.default.values for tensor in optional}

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

    def _entering(self, needed: set[int], wanted: Iterable[str]) -> set[str]:
        """The tensors that must be there for nodes to run, and those that are wanted and made by none of them."""
        nodes = self._model.graph.nodes
        known = {tensor.name for tensor in self._model.graph.inputs} | set(self._types)
        read = {name for index in needed for name in _read(nodes[index])} | set(wanted)
        return read & known

    def _frontier(self, done: set[str], held: set[str]) -> set[str]:
        """Tensors that nodes still to run will read of those that are there by then, graph inputs included."""
        there = done | held | {tensor.name for tensor in self._model.graph.inputs}
        waiting = (node for node in self._model.graph.nodes if done.isdisjoint(_made(node)))
        return there & {name for node in waiting for name in _read(node)}

    def _segment(self, needed: set[int], fetch: list[str]) -> Session | None:
        """A session over the needed nodes alone."""
        if not needed:
            return None
        whole = self._model.graph.nodes
        part = self._model.copy([whole[index] for index in sorted(needed)])
        nodes = part.graph.nodes
        tensors: dict[str, Any] = {}
        for node in nodes:
            for tensor in _tensors_read(node):
                tensors.setdefault(tensor.name, tensor)
        made = {name for node in nodes for name in _made(node)}
        known = {tensor.name for tensor in part.graph.inputs}
        drop_value_info(part)
        entering = [t for t in part.graph.inputs if t.name in tensors]
        for name, tensor in tensors.items():
            if name not in made and name not in known and isinstance(tensor, gs.Variable) and not tensor.is_empty():
                tensor.__dict__.pop("info", None)
                tensor.dtype = self._types.get(name)
                tensor.shape = None
                entering.append(tensor)
        part.graph.inputs = entering
        part.graph.outputs = []
        for node in nodes:
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
