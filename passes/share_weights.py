"""Store each weight once, and as a few values with a small index an element."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from pydantic import Field, field_validator

from onnxslim.graph.purity import is_standard
from onnxslim.graph.walk import drop_value_info, hoist_constants, nested_graphs
from onnxslim.passes._bias import add_to_bias, bias_of
from onnxslim.passes._codebook import Coded, Feedback, fit, nearest, refit_values
from onnxslim.passes._identical import share_identical
from onnxslim.passes._packed import CodebookWriter
from onnxslim.passes._refit import (
    HELD_BYTES,
    Split,
    by_input,
    channel_weights,
    loss,
    moments_between,
    output_errors,
    refits,
    residuals,
)
from onnxslim.passes._statistics import LinearLayer, Moments, linear_layer
from onnxslim.passes._trunk import Trunk
from onnxslim.passes._weight_only import MOVING
from onnxslim.passes.base import Context, Outcome, Pass

if TYPE_CHECKING:
    from onnxslim.model import Model

__all__ = ["ShareWeights"]

Array = NDArray[Any]
FloatArray = NDArray[np.float64]

_ROUNDS = 3  # in which indices and values of a codebook are fitted in turn

# Inputs of an op that hold weights, and the axis of the weight that makes its output channels.
WEIGHTS: dict[str, dict[int, int]] = {
    "Conv": {1: 0},
    "ConvTranspose": {1: 1},
    "Gemm": {0: -2, 1: -1},
    "MatMul": {0: -2, 1: -1},
    "Gather": {0: 0},
    "LSTM": {1: 1, 2: 1},
    "GRU": {1: 1, 2: 1},
    "RNN": {1: 1, 2: 1},
}


class ShareWeights(Pass):
    """Store identical weights once, and large ones as a codebook with packed indices.

    Two steps. Initializers that are equal bit for bit are stored once, also across If, Loop and Scan bodies (lossless).
    Then each large float weight is clustered into ``2 ** bits`` values; the file keeps those values and an index of
    ``bits`` bits an element, and a few standard nodes (Cast, Gather, Reshape) that look the weight up. Their inputs are
    constant, so ONNX Runtime and TVM compute them once, when the model is loaded or compiled: a smaller file, not a
    faster or, in memory, smaller model. With its optimisations switched off a runtime would look up at every inference.

    With calibration data the layers are treated in order: each is first refitted to give the original's output from
    the inputs that it now gets (asymmetric least squares; He et al. 2017), its indices are then chosen so that
    later columns make up for earlier ones (GPTQ, Frantar et al. 2023, with a codebook for a grid), in turns with
    the values of the codebook, and the mean of what is left goes into the bias. A layer keeps that only where it
    lowers its own error, the model only where it lowers that of its outputs.
    Without data the weights are clustered as they are (Deep Compression, Han et al. 2016).

    A tensor is left alone where its encoding would not be smaller. Two planes of bits make up 3, 5, 6 and 7 bit indices
    exactly. At opset 21 and later 4 bit indices are UINT4 tensors; below, and for the other widths, they are packed
    into bytes, unpacked through a table of 256 rows that the whole model shares: legal at every opset. The opset stays.
    """

    name: ClassVar[str] = "share-weights"
    lossless: ClassVar[bool] = False

    bits: int = Field(4, ge=0, le=8, description="bits an index (2 to 8); 0 only stores identical tensors once")
    scale: Literal["auto", "channel", "tensor"] = Field(
        "auto", description="one factor for each output channel: always, never, or where its bytes pay for themselves"
    )
    recovery: Literal["sequential", "none"] = Field(
        "sequential", description="use calibration data to fit each layer to the original, or only cluster its values"
    )
    min_elements: int = Field(256, ge=16, description="leave weights with fewer elements alone")
    exclude: tuple[str, ...] = Field((), description="patterns (as in a shell) of weight or node names to leave alone")
    packing: Literal["auto", "bytes"] = Field(
        "auto", description="'bytes' never writes UINT4 tensors, which some importers do not read"
    )

    @field_validator("bits")
    @classmethod
    def _not_one(cls, value: int) -> int:
        if value == 1:
            raise ValueError("a codebook of 1 bit is not supported; use 2 to 8, or 0 for identical tensors only")
        return value

    def weaker(self, outcome: Outcome) -> Pass | None:
        """One bit more an index, up to 8."""
        return self.model_copy(update={"bits": self.bits + 1}) if 2 <= self.bits < 8 else None

    def run(self, model: Model, context: Context) -> Outcome:
        """Share identical initializers, then encode the large ones."""
        outcome = Outcome()
        hoist_constants(model)
        saved = share_identical(model, outcome)
        outcome.numbers["bytes saved by identical tensors"] = float(saved)
        if self.bits:
            self._encode_weights(model, context, outcome)
        if not outcome.changes and not outcome.refusals:
            outcome.refuse(
                self.name, model.graph.name, "no two initializers are identical and none is a large float weight"
            )
        return outcome

    # ---------------------------------------------------------------------------------------------------- codebooks

    def _encode_weights(self, model: Model, context: Context, outcome: Outcome) -> None:
        targets = {id(target.weight): target for target in self._targets(model, outcome)}
        plain = {key: self._cluster(target) for key, target in targets.items()}
        chosen = _Plan(plain, [])
        if self.recovery == "sequential" and targets:
            if context.calibration is None:
                outcome.refuse("recovery", model.graph.name, "no calibration data: weights are clustered as they are")
            else:
                chosen = self._recover(model, context, outcome, targets, plain)
        writer = CodebookWriter(model, uint4=self.packing == "auto")
        sizes = [
            target.weight.values.nbytes + 16 + len(target.weight.name) + 3 * target.weight.values.ndim
            for target in targets.values()
        ]
        forms = writer.smallest([chosen.coded[key] for key in targets], sizes)
        before = after = 0
        for (key, target), old, form in zip(targets.items(), sizes, forms, strict=True):
            name, values, coded = target.weight.name, target.weight.values, chosen.coded[key]
            if form.nbytes >= old:
                outcome.refuse("codebook", name, f"the encoding ({form.nbytes:,} bytes) would not be smaller ({old:,})")
                chosen.shifts = [shift for shift in chosen.shifts if shift[0] != key]
                continue
            decoded = coded.decode().astype(np.float64)
            power = float((values.astype(np.float64) ** 2).sum())
            error = math.sqrt(float(((decoded - values) ** 2).sum()) / power) if power else 0.0
            scaled = "" if coded.scale is None else f", {coded.scale.size} scales"
            writer.write(target.weight, coded, form)
            before, after = before + old, after + form.nbytes
            outcome.change(
                "codebook",
                name,
                f"{len(coded.codebook)} values{scaled}, {form.bits} bits an index: {old:,} -> {form.nbytes:,} bytes "
                f"({old / form.nbytes:.1f}x), relative error {error:.4f}",
            )
            outcome.numbers["weights encoded"] = outcome.numbers.get("weights encoded", 0) + 1
            outcome.numbers["largest relative error"] = max(outcome.numbers.get("largest relative error", 0), error)
            total = outcome.numbers.get("mean relative error", 0.0)
            outcome.numbers["mean relative error"] = total + error
        encoded = outcome.numbers.get("weights encoded", 0)
        if encoded:
            outcome.numbers["mean relative error"] /= encoded
            after += writer.table_bytes
            outcome.numbers |= {"bytes before": before, "bytes after": after, "ratio": before / after}
        writer.finish()
        for _, node, delta in chosen.shifts:
            if add_to_bias(model, model.graph, node, delta):
                outcome.numbers["biases corrected"] = outcome.numbers.get("biases corrected", 0) + 1
        drop_value_info(model)

    def _targets(self, model: Model, outcome: Outcome) -> Iterator[_Target]:
        """Every initializer to encode, once, in order of first use; the others with reasons."""
        exported = {id(tensor) for graph in model.graphs() for tensor in graph.outputs}
        seen: set[int] = set()
        moved = _moved(model.graph)
        for graph in nested_graphs(model.graph):
            for node in graph.nodes:
                for index, axis in _weight_inputs(node, moved, exported).items():
                    weight = node.inputs[index] if index < len(node.inputs) else None
                    if not isinstance(weight, gs.Constant):
                        if weight is not None and weight.inputs and weight.inputs[0].op == "DequantizeLinear":
                            outcome.refuse(
                                "codebook", node.name, "its weight comes from DequantizeLinear: 8 bits or fewer"
                            )
                        continue
                    if id(weight) in seen:
                        continue
                    seen.add(id(weight))
                    reason = self._unfit(weight, node, id(weight) in exported)
                    if reason:
                        outcome.refuse("codebook", weight.name, reason)
                        continue
                    if node.op == "Gemm" and node.attrs.get("transA" if index == 0 else "transB", 0):
                        axis = -3 - axis
                    if node.op == "ConvTranspose" and node.attrs.get("group", 1) != 1:
                        axis = 0
                    yield _Target(weight, axis)
        for function in model.graph.functions:
            if any(node.op == "Constant" for node in function.nodes):
                outcome.refuse("codebook", function.name, "weights inside a function: a function holds no initializers")

    def _unfit(self, weight: gs.Constant, node: gs.Node, exported: bool) -> str | None:
        size = math.prod(weight.shape)
        if np.dtype(weight.dtype) not in (np.float32, np.float16, np.float64):
            return f"dtype {np.dtype(weight.dtype).name}: only float16, float32 and float64 are clustered"
        if exported:
            return "it is an output of a graph"
        if any(fnmatch.fnmatchcase(name, p) for name in (weight.name, node.name) for p in self.exclude):
            return "excluded by name"
        if len(weight.shape) < 2 or size < self.min_elements:
            return f"{size} elements in {len(weight.shape)} dimensions: too small (min_elements = {self.min_elements})"
        if not np.isfinite(weight.values).all():
            return "it holds values that are not finite"
        return None

    def _cluster(self, target: _Target, weight: Array | None = None, importance: FloatArray | None = None) -> Coded:
        values = target.weight.values if weight is None else weight
        axis = None if self.scale == "tensor" else target.axis
        return fit(values, self.bits, axis, importance, always_scale=self.scale == "channel")

    # ----------------------------------------------------------------------------------------------------- recovery

    def _recover(
        self, model: Model, context: Context, outcome: Outcome, targets: dict[int, _Target], plain: dict[int, Coded]
    ) -> _Plan:
        """Fit the layers of the main graph one after another on a copy; the plain plan where that does not help."""
        assert context.calibration is not None
        teacher, working, bare = model.copy(), model.copy(), model.copy()
        twins = {id(copy): node for copy, node in zip(working.graph.nodes, model.graph.nodes, strict=True)}
        for copied in (working, bare):
            for key, twin in _twins(model, copied, targets).items():
                twin.values = plain[key].decode()
        original = {id(twin): targets[key].weight for key, twin in _twins(model, working, targets).items()}
        layers = []
        for node in working.graph.nodes:
            layer = linear_layer(node)
            if layer is None or id(layer.weight) not in original or len(layer.weight.outputs) != 1:
                continue
            if bias_of(node, layer.shape[0] * layer.shape[1]) is not None:
                layers.append(layer)
        plan = _Plan(dict(plain), [])
        # A layer is fitted on what its predecessors now give; its own weight is dense until its turn.
        groups = list(by_input(layers))
        for layer in (layer for group in groups for layer in group):
            layer.weight.values = original[id(layer.weight)].values
        data, beside = Split(context.calibration), residuals(working.graph, groups)
        student, asked = (Trunk(each, data.feeds, HELD_BYTES) for each in (working, teacher))
        done = 0
        for group in groups:
            found = moments_between(student, asked, group, data, context.seed, beside)
            for layer, (moments, held) in zip(group, found, strict=True):
                weight = original[id(layer.weight)]
                key = id(weight)
                fitted = self._fit_layer(targets[key], layer, moments, held, plain[key])
                coded = plan.coded[key] = fitted
                layer.weight.values = coded.decode()
                outputs = layer.shape[0] * layer.shape[1]
                present = bias_of(layer.node, outputs)
                assert present is not None
                now = np.einsum("gok,gk->go", layer.matrices(), moments.mean).reshape(-1) + present
                delta = moments.mean_y.reshape(-1) - now
                if moments.count and np.isfinite(delta).all():
                    add_to_bias(working, working.graph, layer.node, delta)
                    plan.shifts.append((key, twins[id(layer.node)], delta))
                done += 1
                context.progress(done, len(layers))
        if not layers:
            outcome.refuse("recovery", model.graph.name, "no encoded weight belongs to a layer of the main graph")
            return plan
        before, after = output_errors(teacher, [bare, working], data)
        outcome.numbers |= {"output error without recovery": before, "output error with recovery": after}
        if not after < before:
            outcome.refuse(
                "recovery",
                model.graph.name,
                f"it did not help: error of the outputs {after:.3g} with it, {before:.3g} without",
            )
            return _Plan(plain, [])
        return plan

    def _fit_layer(self, target: _Target, layer: LinearLayer, moments: Moments, held: Moments, plain: Coded) -> Coded:
        """The best encoding of one layer for these inputs: refitted with feedback, with feedback only, or plain."""
        covariance = moments.covariance
        dense = layer.matrices()
        energy = np.diagonal(covariance, axis1=1, axis2=2)
        if moments.count < 2 or not np.isfinite(energy).all() or not energy.max() > 0:
            return plain
        best, least = plain, loss(layer.matrices(plain.decode()), held)
        counts = channel_weights(moments)
        spread = counts[:, :, None] * (energy[:, None, :] + 1e-3 * energy.mean())
        importance = layer.stored(np.ascontiguousarray(spread)).astype(np.float64)
        feedback = Feedback(covariance)
        for matrices in (dense, *refits(dense, moments)):
            stored = layer.stored(matrices)
            first = self._cluster(target, stored, importance)
            ones = np.ones(stored.shape) if first.scale is None else np.broadcast_to(first.scale, stored.shape)
            scales, book = layer.matrices(ones.astype(np.float64)), first.codebook.astype(np.float64)
            options = [first]
            for _ in range(_ROUNDS):
                indices = feedback.assign(layer.matrices(stored), book, scales)
                fitted = refit_values(book, indices, scales, covariance, moments.cross_covariance, counts)
                options += [_recoded(first, layer.stored_as(values[indices]), values) for values in (book, fitted)]
                book = options[-1].codebook.astype(np.float64)
            for option in options:
                error = loss(layer.matrices(option.decode()), held)
                if error < least:
                    best, least = option, error
        return best


def _moved(graph: gs.Graph) -> set[int]:
    """The nodes, by id, of a graph and its bodies that only cut, join or turn constants."""
    found: set[int] = set()
    for nested in nested_graphs(graph):
        for node in nested.nodes:
            made = (t.inputs[0] if t.inputs else None for t in node.inputs if isinstance(t, gs.Variable) and t.name)
            if is_standard(node) and node.op in MOVING and all(id(maker) in found for maker in made):
                found.add(id(node))
    return found


def _weight_inputs(node: gs.Node, moved: set[int], exported: set[int]) -> dict[int, int]:
    """The inputs of a node that hold weights, and the axis that makes output channels, as in ``WEIGHTS``.

    What ``moved`` nodes read counts where nothing but weights comes of it; its rows then get a scale each.
    """
    if not is_standard(node):
        return {}
    if id(node) in moved and _becomes_weight(node, moved, exported):
        fixed = {index: t for index, t in enumerate(node.inputs) if isinstance(t, gs.Constant)}
        return {index: 0 for index, t in fixed.items() if np.issubdtype(t.dtype, np.floating)}
    return WEIGHTS.get(node.op, {})


def _becomes_weight(node: gs.Node, moved: set[int], exported: set[int]) -> bool:
    """Whether the results of a node that moves elements are read, moved on or not, as weights only."""
    stack, found = [node], False
    while stack:
        for tensor in stack.pop().outputs:
            if id(tensor) in exported:
                return False
            for reader in tensor.outputs:
                if id(reader) in moved:
                    stack.append(reader)
                elif any(reader.inputs[i] is tensor for i in WEIGHTS.get(reader.op, {}) if i < len(reader.inputs)):
                    found = True
                else:
                    return False
    return found


def _recoded(coded: Coded, chosen: FloatArray, values: FloatArray) -> Coded:
    """The same scales with other ``values``, of which each element has the one that is ``chosen`` for it."""
    book = np.unique(values.astype(coded.codebook.dtype))
    return dataclasses.replace(coded, codebook=book, indices=nearest(chosen, book.astype(np.float64)))


@dataclass
class _Target:
    """One initializer to encode, and the axis of its output channels."""

    weight: gs.Constant
    axis: int


@dataclass
class _Plan:
    """What to store for each weight (by id) and what to add to which bias: (weight, node of the model, ``[O]``)."""

    coded: dict[int, Coded]
    shifts: list[tuple[int, gs.Node, FloatArray]]


def _twins(model: Model, copied: Model, targets: dict[int, _Target]) -> dict[int, gs.Constant]:
    """The constants of a fresh copy that stand for the targets, by id of the target."""
    found = {}
    for graph, other in zip(nested_graphs(model.graph), nested_graphs(copied.graph), strict=True):
        for node, twin in zip(graph.nodes, other.nodes, strict=True):
            for tensor, match in zip(node.inputs, twin.inputs, strict=True):
                if id(tensor) in targets:
                    found[id(tensor)] = match
    return found
