"""The two products in a recurrent node, ``W x`` and ``R h``, as linear layers: what their inputs are, and their refit.

An LSTM, GRU or RNN computes its gates from ``W x[t] + R h[t - 1] + b``. Where inputs or hidden units were cut, both
products lack what these added to the gates. The inputs that are left make up for it by least squares over the sequences
of the original model, whose states are taken as they are: no errors of earlier steps are fed back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim.graph.channel_rules import GATES
from onnxslim.graph.coupling import Coupling, Cut
from onnxslim.model import Model
from onnxslim.passes._least_squares import Refit
from onnxslim.passes._statistics import LinearLayer, Moments, linear_layer
from onnxslim.runtime import Feed, Session

__all__ = ["product_of", "refit_gates"]

FloatArray = NDArray[np.float64]
_W, _R, _B = 1, 2, 3
_DAMPING = 1e-2  # of the mean variance of an input, as optimal brain surgeon is damped


def product_of(node: gs.Node, weight: int) -> LinearLayer | None:
    """The product of a recurrent node with its weight of that ``id``, as a layer that is no part of the graph.

    ``R`` is taken over the states that the node gives, those of both directions as one; None where it gives only the
    last ones.
    """
    slot = next((slot for slot in (_W, _R) if len(node.inputs) > slot and id(node.inputs[slot]) == weight), None)
    if node.op not in GATES or slot is None or not isinstance(node.inputs[slot], gs.Constant):
        return None
    source = node.inputs[0] if slot == _W else node.outputs[0]
    if source.is_empty() or isinstance(source, gs.Constant):
        return None
    values = np.asarray(node.inputs[slot].values)
    matrix = gs.Constant(f"{node.inputs[slot].name}_rows", np.ascontiguousarray(values.reshape(-1, values.shape[-1]).T))
    # A variable of its own: the graph must not see one more reader of the tensor.
    return linear_layer(gs.Node("MatMul", inputs=[gs.Variable(source.name), matrix], outputs=[gs.Variable("")]))


@dataclass
class _Task:
    """One product that lost inputs: ``kept`` of them stay. ``rows`` are those of the teacher's gates that stay."""

    node: gs.Node
    teacher: gs.Node
    slot: int
    kept: NDArray[np.int64]
    rows: NDArray[np.int64]

    @property
    def source(self) -> gs.Tensor:
        return self.teacher.inputs[0] if self.slot == _W else self.teacher.outputs[0]

    def seen(self, value: np.ndarray, direction: int) -> np.ndarray:
        """The inputs of the product, ``[1, rows, K]``."""
        if self.slot == _R:
            value = np.take(value, direction, axis=2 if self.teacher.attrs.get("layout", 0) else 1)
        return value.reshape(1, -1, value.shape[-1])


def refit_gates(
    model: Model, teacher: Model, coupling: Coupling, plan: Cut, feeds: Callable[[], Iterable[Feed]]
) -> list[Refit]:
    """Let the weights that a cut left to recurrent nodes make up for those that went; biases take the means.

    Args:
        model: the cut model, of the main graph of which nodes are changed.
        teacher: the model before, with the same nodes.
        coupling, plan: what was cut.
        feeds: batches, streamed once.

    Raises:
        SlimError: the teacher does not run on the feeds.
    """
    tasks, refits = _tasks(model, teacher, coupling, plan)
    if not tasks:
        return refits
    found: dict[tuple[int, int], Moments] = {}
    session = Session(teacher, outputs=sorted({task.source.name for task in tasks}))
    for feed in feeds():
        values = session.run(feed)
        for number, task in enumerate(tasks):
            for direction in range(task.teacher.inputs[task.slot].shape[0]):
                rows = task.seen(values[task.source.name], direction)
                found.setdefault((number, direction), Moments.empty(1, rows.shape[2])).gather(rows)
    for moments in found.values():
        moments.settle()
    for number, task in enumerate(tasks):
        directions = task.teacher.inputs[task.slot].shape[0]
        refits.append(_refit(model, task, [found[number, direction] for direction in range(directions)]))
    return refits


def _tasks(model: Model, teacher: Model, coupling: Coupling, plan: Cut) -> tuple[list[_Task], list[Refit]]:
    """The products that lost inputs, and why some of them cannot be refitted."""
    before = {tensor.name: node for node in teacher.graph.nodes for tensor in node.outputs if tensor.name}
    kept = {id(coupling.places[use.axis].tensor): plan.kept(use.axis) for use in coupling.uses if not use.makes}
    tasks: list[_Task] = []
    refused: list[Refit] = []
    for node in model.graph.nodes:
        if node.op not in GATES:
            continue
        old = before[next(tensor.name for tensor in node.outputs if tensor.name)]
        for slot in (_W, _R):
            stay = kept.get(id(node.inputs[slot]))
            if stay is None:
                continue
            why = _unfit(old, slot)
            if why is not None:
                refused.append(Refit(node, why=why))
                continue
            hidden, units = int(old.inputs[_R].shape[2]), kept.get(id(node.inputs[_R]))
            units = np.arange(hidden) if units is None else units
            rows = (np.arange(GATES[node.op])[:, None] * hidden + units).reshape(-1)
            tasks.append(_Task(node, old, slot, stay, rows))
    return tasks, refused


def _unfit(node: gs.Node, slot: int) -> str | None:
    """Why a product of a recurrent node cannot be refitted; None when it can."""
    weights = node.inputs[_W], node.inputs[_R]
    if any(not isinstance(weight, gs.Constant) or len(weight.outputs) > 1 for weight in weights):
        return "its weights are computed, or serve other layers too"
    if len(node.inputs) > _B and not node.inputs[_B].is_empty() and not isinstance(node.inputs[_B], gs.Constant):
        return "its bias is computed"
    if slot == _R and node.outputs[0].is_empty():
        return "it gives its last states only, from which those that went cannot be made up for"
    return None


def _refit(model: Model, task: _Task, moments: list[Moments]) -> Refit:
    """Write the new weights of one product, and what its gates lose on average into their bias."""
    old = np.asarray(task.teacher.inputs[task.slot].values, np.float64)[:, task.rows]
    gone = np.setdiff1d(np.arange(old.shape[2]), task.kept)
    new, shift = old[:, :, task.kept], np.zeros(old.shape[:2])
    before = after = power = 0.0
    for direction, seen in enumerate(moments):
        covariance, mean, lost = seen.covariance[0], seen.mean[0], old[direction][:, gone]
        own, across = covariance[np.ix_(task.kept, task.kept)], covariance[np.ix_(task.kept, gone)]
        damping = _DAMPING * float(np.diagonal(covariance).mean()) + 1e-30
        makes = np.linalg.solve(own + damping * np.eye(len(own)), across)  # [kept, gone]
        new[direction] += lost @ makes.T
        shift[direction] = lost @ (mean[gone] - mean[task.kept] @ makes)
        rest = covariance[np.ix_(gone, gone)] - 2 * across.T @ makes + makes.T @ own @ makes
        before += float(np.einsum("ok,kl,ol->", lost, covariance[np.ix_(gone, gone)], lost))
        after += float(np.einsum("ok,kl,ol->", lost, rest, lost))
        power += float(np.einsum("ok,kl,ol->", old[direction], covariance, old[direction]))
    if not (np.isfinite(new).all() and np.isfinite(shift).all()):
        return Refit(task.node, why="its least squares did not come out finite")
    weight = task.node.inputs[task.slot]
    weight.values = new.astype(weight.dtype)
    if task.slot == _R and task.node.op == "GRU" and not task.node.attrs.get("linear_before_reset", 0):
        third = len(task.rows) // 3
        shift[:, -third:] = 0.0  # of a product with states that were reset, of which the mean is not known
    _add_to_bias(model, task, shift)
    return Refit(task.node, before / max(power, 1e-30), max(after, 0.0) / max(power, 1e-30))


def _add_to_bias(model: Model, task: _Task, shift: FloatArray) -> None:
    """Add ``[D, gates * H]`` to the half of the bias that goes with the product."""
    node, width = task.node, shift.shape[1]
    given = len(node.inputs) > _B and isinstance(node.inputs[_B], gs.Constant)
    bias = np.array(node.inputs[_B].values, np.float64) if given else np.zeros((len(shift), 2 * width))
    bias[:, (task.slot - 1) * width : task.slot * width] += shift
    name = node.inputs[_B].name if given else f"{node.inputs[_W].name}_bias"
    fresh = gs.Constant(model.fresh_name(name), bias.astype(node.inputs[_W].dtype))
    if len(node.inputs) > _B:
        node.inputs[_B] = fresh
    else:
        node.inputs.append(fresh)
