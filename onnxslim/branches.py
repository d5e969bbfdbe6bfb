"""The branches of If nodes as models of their own, so that a pass can work on them as on any other graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.data import Dataset
from onnxslim.graph.cost import MAC_OPS
from onnxslim.graph.shapes import Shapes, infer_shapes
from onnxslim.graph.walk import subgraphs
from onnxslim.model import Model
from onnxslim.runtime import Feed, Session, TensorSpec

__all__ = ["Branch", "branches", "closed_bodies"]

_MEMORY = 256 << 20  # bytes of feeds to keep; above it the model around a branch runs anew for each pass over them


@dataclass(frozen=True)
class Branch:
    """One branch of an If.

    Attributes:
        model: the branch; what it reads of outer graphs are its inputs.
        calibration: these inputs, each time that the branch runs on the calibration data; None where there is none.
    """

    model: Model
    calibration: Dataset | None


def branches(
    model: Model, calibration: Dataset | None, refuse: Callable[[str, str], None] = lambda node, why: None
) -> Iterator[Branch]:
    """Yield each branch of the If nodes of the main graph that multiplies matrices, to be rewritten in place.

    A branch is back in its place when the next one is asked for. Weights that other graphs use as well are inputs of
    it, not constants.

    Args:
        model: the model around them; not to be changed in between, but by what happens to the branch.
        calibration: feeds of ``model``.
        refuse: called with the name of a node and a reason for a branch that cannot be taken out, or that the data
            never takes: nothing is known about what enters it.

    Raises:
        ModelError: the model does not run on a feed.
    """
    shapes: Shapes | None = None
    for node in [node for node in model.graph.nodes if node.op == "If" and not node.domain]:
        for label, taken in (("then_branch", True), ("else_branch", False)):
            body = node.attrs.get(label)
            if not isinstance(body, gs.Graph) or not any(each.op in MAC_OPS for each in _nodes(body)):
                continue
            shapes = shapes or infer_shapes(model)
            title = f"{node.name or node.outputs[0].name} ({label})"
            border = _Border(model, body)
            for outer, inner in border.inputs:
                inner.dtype, inner.shape = shapes.dtype(outer), shapes.shape(outer)
            if unknown := [inner.name for _, inner in border.inputs if inner.dtype is None]:
                refuse(title, f"stays as it is: the type of {unknown[0]!r}, which it reads, is unknown")
                continue
            feeds = None
            if calibration is not None:
                entering = [outer for outer, _ in border.inputs]
                feeds = _feeds(_BranchFeeds(model.copy(), node.inputs[0], entering, calibration, taken=taken))
                if feeds is None:
                    refuse(title, "stays as it is: the calibration data never takes this branch")
                    continue
            border.close()
            try:
                yield Branch(model.around(body), feeds)
            finally:
                border.open()


def closed_bodies(model: Model) -> Iterator[gs.Graph]:
    """Yield the bodies that `branches` does not come to: those of loops, with all that is nested in them."""
    for node in model.graph.nodes:
        if node.op != "If" or node.domain:
            for body in subgraphs(node):
                yield from _graphs(body)


def _graphs(body: gs.Graph) -> Iterator[gs.Graph]:
    """A body and all that is nested in it."""
    yield body
    for node in body.nodes:
        for inner in subgraphs(node):
            yield from _graphs(inner)


def _nodes(body: gs.Graph) -> Iterator[gs.Node]:
    for graph in _graphs(body):
        yield from graph.nodes


class _Border:
    """What a body reads of the graphs around it, and what stands for it while the body is a graph of its own.

    Attributes:
        inputs: the tensor of the outer graph, and the variable that stands for it.
    """

    def __init__(self, model: Model, body: gs.Graph) -> None:
        self._model = model
        self._body = body
        self.inputs: list[tuple[gs.Tensor, gs.Variable]] = []
        self._constants: list[tuple[gs.Constant, gs.Constant]] = []
        within = {id(node) for node in _nodes(body)}
        own = {id(tensor) for node in _nodes(body) for tensor in node.outputs}
        for graph in _graphs(body):
            own.update(id(tensor) for tensor in (*graph.inputs, *graph.__dict__.get("initializers", ())))
        read = [tensor for node in _nodes(body) for tensor in node.inputs]
        read += [tensor for graph in _graphs(body) for tensor in graph.outputs]
        for tensor in {id(tensor): tensor for tensor in read}.values():
            if id(tensor) in own or tensor.is_empty():
                continue
            if isinstance(tensor, gs.Constant):
                if all(id(user) in within for user in tensor.outputs):
                    continue
                if len(tensor.shape) < 2:  # a bias, a size: cheap enough to become two when the branch changes
                    self._constants.append((tensor, gs.Constant(tensor.name, tensor.values)))
                    continue
            self.inputs.append((tensor, gs.Variable(tensor.name)))

    def close(self) -> None:
        """Make the body a graph of its own."""
        self._swap({id(outer): inner for outer, inner in (*self.inputs, *self._constants)})
        self._body.inputs = [inner for _, inner in self.inputs]

    def open(self) -> None:
        """Let the body read the graphs around it again."""
        self._body.inputs = []
        same = []
        for outer, inner in self._constants:
            if inner.values is outer.values:
                same.append((outer, inner))
            else:
                inner.name = self._model.fresh_name(outer.name)
        self._swap({id(inner): outer for outer, inner in (*self.inputs, *same)})

    def _swap(self, other: dict[int, gs.Tensor]) -> None:
        for node in _nodes(self._body):
            for slot, tensor in enumerate(node.inputs):
                if id(tensor) in other:
                    node.inputs[slot] = other[id(tensor)]
        for graph in _graphs(self._body):
            graph.outputs = [other.get(id(tensor), tensor) for tensor in graph.outputs]


class _BranchFeeds:
    """What enters a branch, by running the model around it."""

    path = "<what enters a branch>"

    def __init__(
        self, model: Model, condition: gs.Tensor, inputs: list[gs.Tensor], calibration: Dataset, *, taken: bool
    ) -> None:
        self._condition = condition.name
        self._names = [tensor.name for tensor in inputs]
        self._calibration = calibration
        self._taken = taken
        self._known = {t.name: t.default.values for t in model.graph.inputs if "default" in t.__dict__}
        self._known |= {t.name: t.values for t in (condition, *inputs) if isinstance(t, gs.Constant)}
        there = {*self._known, *(tensor.name for tensor in model.graph.inputs)}
        made = [name for name in dict.fromkeys([condition.name, *self._names]) if name not in there]
        self._session = Session(model, outputs=made) if made else None

    def feeds(self) -> Iterator[tuple[str, Feed]]:
        """Yield what enters the branch, for each feed on which it runs."""
        for index, feed in enumerate(self._calibration):
            values = {**self._known, **feed, **(self._session.run(feed) if self._session else {})}
            if bool(np.all(values[self._condition])) is self._taken:
                yield f"feed {index}", {name: values[name] for name in self._names}


def _feeds(source: _BranchFeeds) -> Dataset | None:
    """What enters a branch; None where nothing ever does."""
    count = 0
    specs: list[TensorSpec] = []
    for _, feed in source.feeds():
        count += 1
        # Nothing is said of the shapes: feeds that happen to be alike are no batch of samples.
        specs = specs or [TensorSpec(name, np.asarray(value).dtype, None) for name, value in feed.items()]
    return Dataset(specs, source, role="calibration", feeds=count).in_memory(_MEMORY) if count else None
