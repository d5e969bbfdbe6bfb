"""The bodies of If, Loop and Scan as models of their own, so that a pass can work on them as on any other graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.data import Dataset
from onnxslim.errors import ModelError
from onnxslim.graph.cost import MAC_OPS
from onnxslim.graph.shapes import Shapes, infer_shapes
from onnxslim.graph.walk import nested_graphs
from onnxslim.model import Model
from onnxslim.runtime import Feed, Session, TensorSpec, detached

__all__ = ["Body", "bodies"]

_MEMORY = 256 << 20  # bytes of feeds to keep; above it the model around a body runs anew for each pass over them
_MOST_ITERATIONS = 32  # of a loop, of each feed: later ones hold hardly anything new
_BODIES = {"If": ("then_branch", "else_branch"), "Loop": ("body",), "Scan": ("body",)}
_SCAN_OPSET = 9  # before it, a Scan runs over batches of sequences


@dataclass(frozen=True)
class Body:
    """One body of a control-flow node.

    Attributes:
        model: the body; what it reads of outer graphs are inputs of it too, behind its own.
        calibration: these inputs, each time that the body runs on the calibration data; None where there is none.
        carried: names of the outputs that the next iteration gets.
    """

    model: Model
    calibration: Dataset | None
    carried: tuple[str, ...] = ()


def bodies(
    model: Model, calibration: Dataset | None, refuse: Callable[[str, str], None] = lambda node, why: None
) -> Iterator[Body]:
    """Yield each body of the main graph's control-flow nodes that multiplies matrices, to be rewritten in place.

    A body is back in its place when the next one is asked for. Weights that other graphs use as well are inputs of
    it, not constants.

    Args:
        model: the model around them; not to be changed in between, but by what happens to the body.
        calibration: feeds of ``model``.
        refuse: called with the name of a node and a reason for a body that cannot be taken out, or that the data never
            enters: nothing is known about what it gets.

    Raises:
        ModelError: the model does not run on a feed.
    """
    shapes: Shapes | None = None
    for node in [node for node in model.graph.nodes if node.op in _BODIES and not node.domain]:
        for label in _BODIES[node.op]:
            body = node.attrs.get(label)
            if not isinstance(body, gs.Graph) or not any(each.op in MAC_OPS for each in _nodes(body)):
                continue
            shapes = shapes or infer_shapes(model)
            title = f"{node.name or node.outputs[0].name} ({label})"
            border = _Border(model, body)
            for outer, inner in border.inputs:
                inner.dtype, inner.shape = shapes.dtype(outer), shapes.shape(outer)
            entering = (*body.inputs, *(inner for _, inner in border.inputs))
            if unknown := [tensor.name for tensor in entering if tensor.dtype is None]:
                refuse(title, f"stays as it is: the type of {unknown[0]!r}, which it reads, is unknown")
                continue
            if node.op == "Scan" and model.opset < _SCAN_OPSET:
                refuse(title, f"stays as it is: a Scan of opset {model.opset} runs over batches of sequences")
                continue
            if node.op == "Loop":
                _forget_wrong_ranks(node, body, shapes)
            around = model.copy() if calibration is not None else None
            carried = [tensor.name for tensor in _carried(node, body)]
            border.close()
            try:
                feeds = None
                if around is not None and calibration is not None:
                    try:
                        runs = _RUNS[node.op](node, label, model.around(body), len(border.own), carried)
                        feeds = _feeds(_BodyFeeds(around, node, border.inputs, calibration, runs))
                    except ModelError as error:
                        if node.op == "If":
                            raise
                        refuse(title, f"stays as it is: it does not run by itself ({error})")
                        continue
                    if feeds is None:
                        refuse(title, "stays as it is: the calibration data never enters it")
                        continue
                yield Body(model.around(body), feeds, tuple(carried))
            finally:
                border.open()


def _carried(node: gs.Node, body: gs.Graph) -> list[gs.Tensor]:
    """The outputs of a body that are its inputs at the next iteration, without the condition of a Loop."""
    if node.op == "Loop":
        return list(body.outputs[1 : len(body.inputs) - 1])
    if node.op == "Scan":
        return list(body.outputs[: len(body.inputs) - int(node.attrs["num_scan_inputs"])])
    return []


def _forget_wrong_ranks(node: gs.Node, body: gs.Graph, shapes: Shapes) -> None:
    """Declare no shape of what a Loop starts with another rank, as a placeholder that the body replaces (PaddlePaddle).

    Inside of the Loop nobody checks that, of a graph of its own ONNX Runtime does.
    """
    for outer, inner in zip(node.inputs[2:], body.inputs[2:], strict=False):
        known = shapes.shape(outer)
        if known is not None and inner.shape is not None and len(known) != len(inner.shape):
            inner.shape = None


def _nodes(body: gs.Graph) -> Iterator[gs.Node]:
    for graph in nested_graphs(body):
        yield from graph.nodes


class _Border:
    """What a body reads of the graphs around it, and what stands for it while the body is a graph of its own.

    Attributes:
        own: the inputs that the node around it gives the body.
        inputs: the tensor of the outer graph, and the variable that stands for it.
    """

    def __init__(self, model: Model, body: gs.Graph) -> None:
        self._model = model
        self._body = body
        self.own = list(body.inputs)
        self.inputs: list[tuple[gs.Tensor, gs.Variable]] = []
        self._constants: list[tuple[gs.Constant, gs.Constant]] = []
        within = {id(node) for node in _nodes(body)}
        own = {id(tensor) for node in _nodes(body) for tensor in node.outputs}
        for graph in nested_graphs(body):
            own.update(id(tensor) for tensor in (*graph.inputs, *graph.__dict__.get("initializers", ())))
        read = [tensor for node in _nodes(body) for tensor in node.inputs]
        read += [tensor for graph in nested_graphs(body) for tensor in graph.outputs]
        for tensor in {id(tensor): tensor for tensor in read}.values():
            if id(tensor) in own or tensor.is_empty():
                continue
            if isinstance(tensor, gs.Constant):
                if all(id(user) in within for user in tensor.outputs):
                    continue
                if len(tensor.shape) < 2:  # a bias, a size: cheap enough to become two when the body changes
                    self._constants.append((tensor, gs.Constant(tensor.name, tensor.values)))
                    continue
            self.inputs.append((tensor, gs.Variable(tensor.name)))

    def close(self) -> None:
        """Make the body a graph of its own."""
        self._swap({id(outer): inner for outer, inner in (*self.inputs, *self._constants)})
        self._body.inputs = [*self.own, *(inner for _, inner in self.inputs)]

    def open(self) -> None:
        """Let the body read the graphs around it again."""
        self._body.inputs = self.own
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
        for graph in nested_graphs(self._body):
            graph.outputs = [other.get(id(tensor), tensor) for tensor in graph.outputs]


Values = dict[str, Any]
Runs = Callable[[Values], Iterator[Feed]]


def _if_runs(node: gs.Node, label: str, body: Model, own: int, carried: list[str]) -> Runs:
    """A branch gets nothing but what it reads, where the condition is its own."""

    def runs(values: Values) -> Iterator[Feed]:
        if bool(np.all(values[node.inputs[0].name])) is (label == "then_branch"):
            yield {}

    return runs


def _loop_runs(node: gs.Node, label: str, body: Model, own: int, carried: list[str]) -> Runs:
    """The body of a Loop gets the number of the iteration, the condition, and what the one before has made."""
    session = Session(body.copy())
    inputs = list(body.graph.inputs[:own])
    names = [tensor.name for tensor in inputs]
    condition = body.graph.outputs[0].name

    def runs(values: Values) -> Iterator[Feed]:
        given = [None if tensor.is_empty() else values[tensor.name] for tensor in node.inputs[:2]]
        limit, go_on = (*given, None, None)[:2]
        state = [values[tensor.name] for tensor in node.inputs[2:]]
        going = go_on is None or bool(np.all(go_on))
        for iteration in range(_MOST_ITERATIONS if limit is None else min(_MOST_ITERATIONS, int(np.max(limit)))):
            if not going:
                break
            first = [np.asarray(iteration, np.int64), np.asarray(going)]
            shaped = [value.reshape([1] * _rank(tensor)) for value, tensor in zip(first, inputs, strict=False)]
            feed = dict(zip(names, [*shaped, *state], strict=True))
            yield feed
            found = _run(session, feed, values)
            going, state = bool(np.all(found[condition])), [found[name] for name in carried]

    return runs


def _scan_runs(node: gs.Node, label: str, body: Model, own: int, carried: list[str]) -> Runs:
    """The body of a Scan gets what the iteration before has made, and a slice of each of the last inputs."""
    session = Session(body.copy())
    count = int(node.attrs["num_scan_inputs"])
    names = [tensor.name for tensor in body.graph.inputs[:own]]
    states = own - count
    axes = list(node.attrs.get("scan_input_axes", [0] * count))
    backwards = list(node.attrs.get("scan_input_directions", [0] * count))

    def runs(values: Values) -> Iterator[Feed]:
        state = [values[tensor.name] for tensor in node.inputs[:states]]
        rows = [
            np.moveaxis(values[tensor.name], axis, 0)[:: -1 if back else 1]
            for tensor, axis, back in zip(node.inputs[states:], axes, backwards, strict=True)
        ]
        for iteration in range(min(_MOST_ITERATIONS, len(rows[0]))):
            slices = [np.ascontiguousarray(row[iteration]) for row in rows]
            feed = dict(zip(names, [*state, *slices], strict=True))
            yield feed
            if states:
                found = _run(session, feed, values)
                state = [found[name] for name in carried]

    return runs


def _run(session: Session, own: Feed, values: Values) -> Feed:
    """Run a body on its own inputs and on what it reads of the graphs around it."""
    return session.run({**{name: values[name] for name in session.inputs if name not in own}, **own})


_RUNS = {"If": _if_runs, "Loop": _loop_runs, "Scan": _scan_runs}


def _rank(tensor: gs.Tensor) -> int:
    return len(tensor.shape or ())


class _BodyFeeds:
    """What enters a body, by running the model around it."""

    path = "<what enters a body>"

    def __init__(
        self,
        around: Model,
        node: gs.Node,
        reads: list[tuple[gs.Tensor, gs.Variable]],
        calibration: Dataset,
        runs: Runs,
    ) -> None:
        self._reads = [(outer.name, inner.name) for outer, inner in reads]
        self._calibration = calibration
        self._runs = runs
        entering = [tensor for tensor in node.inputs if not tensor.is_empty()] + [outer for outer, _ in reads]
        self._known = {t.name: t.default.values for t in around.graph.inputs if "default" in t.__dict__}
        self._known |= {t.name: t.values for t in entering if isinstance(t, gs.Constant)}
        there = {*self._known, *(tensor.name for tensor in around.graph.inputs)}
        made = [name for name in dict.fromkeys(tensor.name for tensor in entering) if name not in there]
        self._session = Session(around, outputs=made) if made else None

    def feeds(self) -> Iterator[tuple[str, Feed]]:
        """Yield what enters the body, for each time that it runs on a feed."""
        for index, feed in enumerate(self._calibration):
            values = {**self._known, **feed, **(detached(self._session.run(feed)) if self._session else {})}
            read = {inner: values[outer] for outer, inner in self._reads}
            for run in self._runs({**values, **read}):
                yield f"feed {index}", {**run, **read}


def _feeds(source: _BodyFeeds) -> Dataset | None:
    """What enters a body; None where nothing ever does."""
    count = 0
    specs: list[TensorSpec] = []
    for _, feed in source.feeds():
        count += 1
        # Nothing is said of the shapes: feeds that happen to be alike are no batch of samples.
        specs = specs or [TensorSpec(name, np.asarray(value).dtype, None) for name, value in feed.items()]
    return Dataset(specs, source, role="calibration", feeds=count).in_memory(_MEMORY) if count else None
