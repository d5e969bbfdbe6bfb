"""What each ONNX operator does with the channels of its inputs and outputs: the rules behind ``coupling``.

A rule says which axes of a node's tensors are one and the same, position by position. Whatever a rule does not mention
is frozen after it, so an operator without a rule, and an axis that a rule forgot, can never be cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.graph.coupling import Axis, Coupling, Cut, Indices, Place, Use
from onnxslim.graph.shapes import Shapes
from onnxslim.graph.walk import constant_value, subgraphs
from onnxslim.model import Model

__all__ = ["GATES", "Op", "Rule", "Tracer", "Unknown", "match_axes", "trace"]

Dims = list[int | str | None]
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}  # rows of W and R for each hidden unit
_WEIGHT_SLOTS = {
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm", "MatMul"), (0, 1)),
    **dict.fromkeys(GATES, (1, 2)),
}
# One number of a shape tensor: itself, the length of an axis of a tensor, or unknown.
Element = int | tuple[gs.Tensor, int] | None


class Tracer:
    """Walks a graph in order and collects what its nodes say into a `Coupling`.

    Attributes:
        elements: the numbers of the shape tensors met so far, by id of the tensor.
        understood: uses ``(node, tensor)`` of a shape tensor that stay right when the lengths in it change.
    """

    def __init__(self, model: Model, shapes: Shapes, coupling: Coupling) -> None:
        self.model = model
        self.shapes = shapes
        self.coupling = coupling
        self.alive: set[Axis] = set()
        self.shared: set[int] = set()
        self.elements: dict[int, list[Element]] = {}
        self.understood: set[tuple[int, int]] = set()

    def dims(self, tensor: gs.Tensor) -> Dims | None:
        """Shape of a tensor; None when not even the rank is known."""
        return self.shapes.shape(tensor)

    def axis(self, tensor: gs.Tensor, axis: int, node: gs.Node) -> Axis | None:
        """The key of an axis, registered; None when it is of length 1 or unknown, so no channel axis."""
        dims = self.dims(tensor)
        size = dims[axis] if dims is not None and axis < len(dims) else None
        if not isinstance(size, int) or size < 2:
            return None
        user = node if isinstance(tensor, gs.Constant) and id(tensor) not in self.shared else None
        key = (id(tensor), id(user) if user is not None else 0, axis)
        if key not in self.coupling.places:
            self.coupling.places[key] = Place(tensor, axis, size, user)
            self.coupling.network.add_node(key)
        return key

    def freeze(self, tensor: gs.Tensor, axis: int, node: gs.Node, why: str) -> None:
        """Note why an axis cannot be cut; the first reason stays."""
        key = self.axis(tensor, axis, node)
        if key is not None:
            self.coupling.frozen.setdefault(key, why)

    def values_of(self, tensor: gs.Tensor) -> list[Element] | None:
        """The numbers of a shape tensor: a constant one, or one computed from lengths of axes."""
        if id(tensor) in self.elements:
            return self.elements[id(tensor)]
        value = constant_value(tensor)
        if value is None:
            computed = self.shapes.elements(tensor)
            return None if computed is None else list(computed)
        if value.dtype.kind not in "iu" or value.ndim > 1 or value.size > 64:
            return None
        return [int(v) for v in value.reshape(-1)]


class Op:
    """One node while its rule runs: its tensors, its attributes, and what the rule says about it."""

    def __init__(self, tracer: Tracer, node: gs.Node) -> None:
        self.tracer = tracer
        self.node = node
        self.inputs = list(node.inputs)
        self.outputs = [t for t in node.outputs if not t.is_empty()]
        self.told: set[tuple[int, int]] = set()
        self.why: dict[tuple[int, int], str] = {}

    @property
    def label(self) -> str:
        """Op type and name, for messages."""
        return f"{self.node.op} {self.node.name!r}" if self.node.name else f"{self.node.op} at {self.outputs[0].name!r}"

    @property
    def x(self) -> gs.Tensor:
        """First input."""
        return self.inputs[0]

    @property
    def y(self) -> gs.Tensor:
        """First output."""
        return self.outputs[0]

    def has(self, slot: int) -> bool:
        """Whether an optional input is given."""
        return len(self.inputs) > slot and not self.inputs[slot].is_empty()

    def dims(self, tensor: gs.Tensor) -> Dims:
        """Shape of a tensor; without a known rank the rule stops and the node freezes all it touches."""
        dims = self.tracer.dims(tensor)
        if dims is None:
            raise Unknown(f"the shape of {tensor.name!r} is unknown")
        return dims

    def ints(self, attribute: str, slot: int) -> list[int] | None:
        """A list of ints that newer opsets take as a constant input and older ones as an attribute; None if absent.

        Raises:
            Unknown: it is an input that is computed.
        """
        if self.has(slot):
            value = constant_value(self.inputs[slot])
            if value is None:
                raise Unknown(f"{self.label} computes its {attribute}")
            return [int(v) for v in value.reshape(-1)]
        value = self.node.attrs.get(attribute)
        return [int(v) for v in value] if value is not None else None

    def attr(self, name: str, default: Any) -> Any:
        """An attribute or its default."""
        return self.node.attrs.get(name, default)

    def tell(self, tensor: gs.Tensor, axis: int) -> None:
        """Say that this node is content whatever happens to an axis."""
        self.told.add((id(tensor), axis))

    def join(
        self, left: gs.Tensor, i: int, right: gs.Tensor, j: int, at: Indices | None = None, to: Indices | None = None
    ) -> None:
        """Say that axis ``i`` of ``left`` and axis ``j`` of ``right`` are the same channels.

        Without ``at`` and ``to``, position by position; else position ``at[k]`` of the one is ``to[k]`` of the other.
        An axis of known length joined to one of unknown length is frozen.
        """
        a, b = self.tracer.axis(left, i, self.node), self.tracer.axis(right, j, self.node)
        self.tell(left, i)
        self.tell(right, j)
        sizes = [self.dims(left)[i], self.dims(right)[j]]
        if a is None or b is None:
            for tensor, axis, other in ((left, i, sizes[1]), (right, j, sizes[0])):
                if not isinstance(other, int):
                    self.stop(tensor, axis, f"{self.label} joins it to an axis of unknown length")
            return
        places = self.tracer.coupling.places
        if at is None and places[a].size != places[b].size:
            raise Unknown(f"{self.label} joins axes of {places[a].size} and {places[b].size}")
        here = np.arange(places[a].size) if at is None else at
        there = np.arange(places[b].size) if to is None else to
        self.tracer.coupling.link(a, b, here, there)
        if a in self.tracer.alive or b in self.tracer.alive:
            self.tracer.alive.update((a, b))

    def stop(self, tensor: gs.Tensor, axis: int, why: str) -> None:
        """Freeze an axis for a reason."""
        self.tell(tensor, axis)
        self.tracer.freeze(tensor, axis, self.node, why)

    def spans(self, tensor: gs.Tensor, axis: int) -> None:
        """Say that this node takes a mean over an axis, whatever its length."""
        self.tell(tensor, axis)
        key = self.tracer.axis(tensor, axis, self.node)
        if key is not None:
            self.tracer.coupling.spanned.setdefault(key, self.label)

    def because(self, tensor: gs.Tensor, axis: int, why: str) -> None:
        """Give the reason to use should nothing be said about an axis."""
        self.why[(id(tensor), axis)] = why

    def weight(self, slot: int) -> gs.Tensor:
        """An input that is a layer's weight: one constant used by several layers is cut for all of them alike."""
        tensor = self.inputs[slot]
        if isinstance(tensor, gs.Constant):
            self.tracer.shared.add(id(tensor))
        return tensor

    def uses(self, tensor: gs.Tensor, axis: int, makes: bool) -> None:
        """Note that this layer's weight makes the channels of an axis, or sums over them."""
        key = self.tracer.axis(tensor, axis, self.node)
        if key is not None:
            self.tracer.alive.add(key)
            self.tracer.coupling.uses.append(Use(self.node, key, makes))

    def lives(self, tensor: gs.Tensor, axis: int) -> bool:
        """Whether an axis is known to hold channels of some layer's weight."""
        key = self.tracer.axis(tensor, axis, self.node)
        return key is not None and key in self.tracer.alive

    def follow(self, tensor: gs.Tensor, axis: int, act: Callable[[Cut, Indices], None]) -> None:
        """Have ``act(cut, kept positions)`` called when positions of an axis are cut."""
        key = self.tracer.axis(tensor, axis, self.node)
        if key is None:
            return

        def adjust(plan: Cut) -> None:
            kept = plan.kept(key)
            if kept is not None:
                act(plan, kept)

        self.tracer.coupling.adjustments.append(adjust)

    def replace_ints(self, slot: int, values: np.ndarray) -> None:
        """Give an input slot a constant of its own."""
        name = self.tracer.model.fresh_name(f"{self.inputs[slot].name}_cut")
        self.node.inputs[slot] = gs.Constant(name, values)


class Unknown(Exception):  # noqa: N818 - no error: it ends a rule early
    """The rule cannot tell; what it has not told is frozen for this reason."""


Rule = Callable[[Op], None]


def trace(model: Model, shapes: Shapes, coupling: Coupling) -> None:
    """Fill ``coupling`` with all axes, links, reasons and adjustments of a model's main graph."""
    from onnxslim.graph.channel_ops import RULES

    tracer = Tracer(model, shapes, coupling)
    graph = model.graph
    # A weight that two layers share must be known as such before the first of them is looked at.
    for node in graph.nodes:
        slots = _WEIGHT_SLOTS.get(node.op, ())
        read = (node.inputs[slot] for slot in slots if slot < len(node.inputs))
        tracer.shared.update(id(tensor) for tensor in read if isinstance(tensor, gs.Constant))
    nowhere = gs.Node("", "")
    for tensor in graph.inputs:
        for axis in range(len(tracer.dims(tensor) or [])):
            tracer.freeze(tensor, axis, nowhere, f"it is an axis of graph input {tensor.name!r}")
    for node in graph.nodes:
        op = Op(tracer, node)
        if not op.outputs:
            continue
        rule = RULES.get(node.op) if node.domain in (None, "", "ai.onnx") else None
        why = f"{op.label} is an operator without a channel rule"
        try:
            if rule is not None:
                why = f"{op.label} needs all of it"
                rule(op)
        except Unknown as unknown:
            why = str(unknown)
            op.told.clear()
        for tensor in (*op.inputs, *op.outputs):
            for axis in range(len(tracer.dims(tensor) or [])):
                if not tensor.is_empty() and (id(tensor), axis) not in op.told:
                    tracer.freeze(tensor, axis, node, op.why.get((id(tensor), axis), why))
    for tensor in graph.outputs:
        for axis in range(len(tracer.dims(tensor) or [])):
            tracer.freeze(tensor, axis, nowhere, f"it is an axis of graph output {tensor.name!r}")
    _freeze_captures(tracer)
    _freeze_computed_sizes(tracer)


def _freeze_captures(tracer: Tracer) -> None:
    """Freeze what nested bodies read of the main graph."""
    own = {id(node) for node in tracer.model.graph.nodes}
    for place in list(tracer.coupling.places.values()):
        if place.user is None and any(id(node) not in own for node in place.tensor.outputs):
            tracer.freeze(place.tensor, place.axis, place.tensor.outputs[0], "it is read inside a subgraph")
    returned = [t for node in tracer.model.graph.nodes for body in subgraphs(node) for t in body.outputs]
    known = {key[0]: place for key, place in tracer.coupling.places.items()}
    for tensor in returned:
        if id(tensor) in known:
            for axis in range(len(tracer.dims(tensor) or [])):
                tracer.freeze(tensor, axis, gs.Node("", ""), "it is read inside a subgraph")


def _freeze_computed_sizes(tracer: Tracer) -> None:
    """Freeze an axis whose length is read for anything but to be the length of an axis that follows it."""
    outputs = {id(tensor) for tensor in tracer.model.graph.outputs}
    tensors = {id(t): t for node in tracer.model.graph.nodes for t in node.outputs if id(t) in tracer.elements}
    for key, tensor in tensors.items():
        strangers = [node for node in tensor.outputs if (id(node), key) not in tracer.understood]
        if not strangers and key not in outputs:
            continue
        by = f"{strangers[0].op} {strangers[0].name!r}" if strangers else "a graph output"
        for element in tracer.elements[key]:
            if isinstance(element, tuple):
                tracer.freeze(element[0], element[1], gs.Node("", ""), f"its length is used by {by}")


def match_axes(before: Dims, after: Dims, same: Callable[[int, int], bool]) -> list[tuple[list[int], list[int]]] | None:
    """Split a reshape into the smallest blocks of axes that hold the same elements, axes of length 1 left out.

    ``same(i, j)`` says that axis ``j`` has the length of axis ``i`` although it is no known number. None when the rest
    cannot be told.
    """
    left = [i for i, d in enumerate(before) if d != 1]
    right = [j for j, d in enumerate(after) if d != 1]

    def equal(i: int, j: int) -> bool:
        a, b = before[i], after[j]
        return a == b if isinstance(a, int) and isinstance(b, int) else same(i, j)

    def peel(end: int) -> list[tuple[list[int], list[int]]] | None:
        blocks = []
        while left and right:
            if equal(left[end], right[end]):
                blocks.append(([left.pop(end)], [right.pop(end)]))
                continue
            ins, outs = [left[end]], [right[end]]
            a, b = before[ins[0]], after[outs[0]]
            while isinstance(a, int) and isinstance(b, int) and a != b:
                source, size, taken = (left, before, ins) if a < b else (right, after, outs)
                if len(taken) == len(source):
                    return blocks
                taken.append(source[len(taken)] if end == 0 else source[-1 - len(taken)])
                more = size[taken[-1]]
                if not isinstance(more, int):
                    return blocks
                a, b = (a * more, b) if source is left else (a, b * more)
            if not (isinstance(a, int) and isinstance(b, int)):
                return blocks
            for i in ins:
                left.remove(i)
            for j in outs:
                right.remove(j)
            blocks.append((sorted(ins), sorted(outs)))
        return blocks

    blocks = [*(peel(0) or []), *(peel(-1) or [])]
    if left or right:
        if len(left) == len(right) == 1:
            return [*blocks, (left, right)]  # all else is accounted for, so these two hold the same number of elements
        lengths = [before[i] for i in left] + [after[j] for j in right]
        return [*blocks, (left, right)] if not all(isinstance(d, int) for d in lengths) else None
    return blocks
