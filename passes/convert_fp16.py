"""float16: half the bytes of every float32 weight, and half the width of what is computed where that is safe."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from pydantic import Field

from onnxslim.errors import ModelError
from onnxslim.float_type import OLDEST_OPSET, inline_functions, narrow_inside
from onnxslim.graph.shapes import Shapes, infer_shapes
from onnxslim.graph.walk import hoist_constants, nested_graphs
from onnxslim.passes._calibration import Observed, observe
from onnxslim.passes._float16 import LARGE, fits_float16, float32_nodes, whole_obstacle
from onnxslim.passes._placement import matches
from onnxslim.passes.base import Context, Outcome, Pass

if TYPE_CHECKING:
    from onnxslim.model import Model

__all__ = ["ConvertFp16"]

RULE = "float16"
_OBSERVED_OPSET = 10
_BATCH = 8
# Sums of many numbers, powers and quotients: what loses most in float16 and costs least in float32.
_SENSITIVE = (
    "Softmax", "LogSoftmax", "LayerNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization",
    "Reduce*", "Global*Pool", "Exp", "Log", "Pow", "Sqrt", "Reciprocal", "Div",
)  # fmt: skip
# Ops whose weights are stored in float16 where they compute in float32: a Cast in front of those is folded at load.
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Gather", "LSTM", "GRU", "RNN")


class ConvertFp16(Pass):
    """Store weights in float16, and compute in float16 where its range suffices.

    Inputs and outputs of the model stay float32. Every op that float16 suits computes in it, in bodies as well, and one
    Cast stands where the types meet. What stays in float32: ops that count or sort (Range, CumSum, TopK, Resize, …) or
    have no float16 in their definition; sizes computed from shapes; constants beyond +-65,504 or that would lose
    digits, and what follows from them (attention masks, variances with a small epsilon); what QuantizeLinear and
    DequantizeLinear surround; nodes named in ``keep_float``; and, with calibration data, ops whose tensors came close
    to the ends of float16's range. Large weights of all but ``keep_float`` are stored in float16 all the same, and
    become float32 at load.

    Right for GPUs and NPUs, and everywhere for half the size; x86 processors compute in float32 and pay for Casts, so
    there ``compute = "float32"`` is the faster. Costs one run over the calibration data, which may be left out.
    """

    name: ClassVar[str] = "convert-fp16"
    lossless: ClassVar[bool] = False

    compute: Literal["float16", "float32"] = Field(
        "float16", description="float32: only weights are stored in float16, and become float32 at load"
    )
    keep_float: tuple[str, ...] = Field((), description="nodes kept in float32: shell patterns of names or ops")
    max_samples: int = Field(32, ge=1, description="calibration samples used, at most")

    def run(self, model: Model, context: Context) -> Outcome:
        """Convert ``model`` in place; it is left as it was when the result would not be smaller."""
        outcome = Outcome()
        if model.opset < OLDEST_OPSET:
            why = f"types can be converted from opset {OLDEST_OPSET} on, the model is at {model.opset}"
            outcome.refuse(RULE, model.graph.name, why)
            return outcome
        before = model.copy()
        inlined = inline_functions(model)
        model.graph, model.header = inlined.graph, inlined.header
        hoist_constants(model)
        whole = _weight_bytes(model)
        computing = self._compute(model, context, outcome) if self.compute == "float16" else 0
        self._store(model)
        half = _weight_bytes(model)
        if half < whole:
            what = f"{computing} nodes compute in float16; weights: {whole:,} -> {half:,} bytes"
            outcome.change(RULE, model.graph.name, what)
            outcome.numbers |= {"nodes in float16": float(computing), "ratio of weights": whole / half}
        else:
            model.graph, model.header = before.graph, before.header
            outcome.refuse(RULE, model.graph.name, "it has no float32 weights that float16 can hold")
        return outcome

    def weaker(self, outcome: Outcome) -> ConvertFp16 | None:
        """The same with sums, powers and quotients in float32; then with all that is computed."""
        if self.compute == "float32":
            return None
        missing = tuple(pattern for pattern in _SENSITIVE if pattern not in self.keep_float)
        if missing:
            return self.model_copy(update={"keep_float": (*self.keep_float, *missing)})
        return self.model_copy(update={"compute": "float32"})

    def _compute(self, model: Model, context: Context, outcome: Outcome) -> int:
        """Compute in float16 where that is safe; return in how many nodes."""
        types = infer_shapes(model, context.shapes)
        observed = self._observe(model, types, context, outcome)
        kept = float32_nodes(model, types, self.keep_float, observed)
        nodes = [node for node, _ in kept.values()]
        obstacle = whole_obstacle(model, types, nodes)
        if obstacle is not None:
            outcome.refuse(RULE, model.graph.name, f"all of it computes in float32: {obstacle}")
            return 0
        for node, reason in kept.values():
            outcome.refuse(RULE, node.name or node.outputs[0].name, f"{node.op}: {reason}")
        return narrow_inside(model, nodes)

    def _observe(self, model: Model, types: Shapes, context: Context, outcome: Outcome) -> dict[str, Observed]:
        """What the float32 tensors of the main graph hold on calibration data."""
        if context.calibration is None or model.opset < _OBSERVED_OPSET:
            return {}
        made = (tensor for node in model.graph.nodes for tensor in node.outputs)
        names = [tensor.name for tensor in (*model.graph.inputs, *made) if types.dtype(tensor) == np.float32]
        feeds = context.calibration.take(self.max_samples).batches(_BATCH)
        try:
            return observe(model, names, feeds)
        except ModelError as error:
            outcome.refuse(RULE, model.graph.name, f"its activations cannot be observed: {error}")
            return {}

    def _store(self, model: Model) -> None:
        """Store the large weights that are still float32 in float16, behind a Cast in the main graph: bodies see it."""
        exported = {id(tensor) for graph in model.graphs() for tensor in graph.outputs}
        casts = []
        for uses in _uses(model):
            node, index = uses[0]
            weight = node.inputs[index]
            if math.prod(weight.shape) < LARGE or id(weight) in exported or not all(map(self._narrows, uses)):
                continue
            values = np.asarray(weight.values)
            if not fits_float16(values):
                continue
            stored = gs.Constant(model.fresh_name(f"{weight.name}_float16"), values.astype(np.float16))
            wide = gs.Variable(model.fresh_name(f"{weight.name}_float32"), np.float32, list(values.shape))
            casts.append(gs.Node("Cast", wide.name, {"to": 1}, inputs=[stored], outputs=[wide]))
            for node, index in uses:
                node.inputs[index] = wide
        model.graph.nodes = [*casts, *model.graph.nodes]

    def _narrows(self, use: tuple[gs.Node, int]) -> bool:
        node, _ = use
        return node.op in _WEIGHTED and not node.domain and not matches(node, self.keep_float)


def _uses(model: Model) -> Iterable[list[tuple[gs.Node, int]]]:
    """The places in which each float32 constant is read, grouped by constant."""
    found: dict[int, list[tuple[gs.Node, int]]] = {}
    for graph in nested_graphs(model.graph):
        for node in graph.nodes:
            for index, tensor in enumerate(node.inputs):
                if isinstance(tensor, gs.Constant) and tensor.dtype == np.float32:
                    found.setdefault(id(tensor), []).append((node, index))
    return found.values()


def _weight_bytes(model: Model) -> int:
    """Bytes of all float16 and float32 constants that something reads."""
    read = {
        id(tensor): tensor
        for graph in nested_graphs(model.graph)
        for node in graph.nodes
        for tensor in node.inputs
        if isinstance(tensor, gs.Constant) and tensor.dtype in (np.float16, np.float32)
    }
    return sum(math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize for tensor in read.values())
