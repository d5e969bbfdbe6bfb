"""One layer as two: what is known of a layer that could be split, and the surgery that splits it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim.passes._bias import add_to_bias
from onnxslim.passes._ranks import Spectrum
from onnxslim.passes._statistics import LinearLayer

if TYPE_CHECKING:
    from onnxslim.model import Model

__all__ = ["Candidate", "Factors", "factor_nodes", "plain_matrix", "replace_by_factors", "set_product"]

FloatArray = NDArray[np.float64]


@dataclass
class Candidate:
    """A layer that could be split.

    Attributes:
        node: of the main graph.
        weight: its initializer.
        matrix: ``[O, K]``, a Gemm's alpha multiplied in.
        layer: None where there are no statistics for its layout (constant left side, transposed input).
        rows: how many rows it is applied to in one inference.
        each: what one element of its weight costs.
        times: microseconds that factors of some ranks take, and under None the whole layer; empty where not measured.
        spectrum: of its output.
        mean: of its inputs, ``[K]``; None without data.
    """

    node: gs.Node
    weight: gs.Constant
    matrix: FloatArray
    layer: LinearLayer | None
    rows: int = 1
    each: float = 1.0
    times: dict[int | None, float] = field(default_factory=dict)
    spectrum: Spectrum | None = None
    mean: FloatArray | None = None

    def cost(self, rank: int | None) -> float:
        """What factors of a rank cost, between measured ones in proportion; None: what the whole layer costs."""
        outputs, inputs = self.matrix.shape
        if self.times and rank is None:
            return self.times[None]
        if self.times:
            measured = sorted(rank for rank in self.times if rank is not None)
            return float(np.interp(rank or 0, measured, [self.times[rank] for rank in measured]))
        return float(self.each * (outputs * inputs if rank is None else rank * (outputs + inputs)))


@dataclass
class Factors:
    """The two factors of a layer ``[r, K]``, ``[O, r]``, and what its bias moves by ``[O]``; None: not known."""

    first: FloatArray
    second: FloatArray
    shift: FloatArray | None


def plain_matrix(node: gs.Node, weight: gs.Constant) -> FloatArray:
    """``[O, K]`` of a MatMul whose left side is constant, or of a Gemm with transA."""
    values: FloatArray = np.asarray(weight.values, np.float64)
    if node.op == "MatMul":
        return values
    alpha = float(node.attrs.get("alpha", 1.0))
    return alpha * (values if node.attrs.get("transB", 0) else values.T)


def set_product(model: Model, layer: LinearLayer, fit: Factors) -> None:
    """Give a layer of a copy the product of its factors, which computes the same."""
    layer.weight.values = layer.stored((fit.second @ fit.first)[None])
    if fit.shift is not None:
        add_to_bias(model, model.graph, layer.node, fit.shift)


def replace_by_factors(model: Model, candidate: Candidate, fit: Factors) -> None:
    """Put two nodes in the place of one; the second makes the tensor of the old name and has the bias."""
    node, graph = candidate.node, model.graph
    if fit.shift is not None:
        add_to_bias(model, graph, node, fit.shift)
    outputs = list(node.outputs)
    node.outputs.clear()
    pair = factor_nodes(model, candidate, fit, outputs)
    position = next(i for i, other in enumerate(graph.nodes) if other is node)
    node.inputs.clear()
    if "header" in node.__dict__:
        pair[1].header = node.header
    graph.nodes[position : position + 1] = pair


def factor_nodes(model: Model, candidate: Candidate, fit: Factors, outputs: list[gs.Tensor]) -> tuple[gs.Node, gs.Node]:
    """The two nodes that read what a layer reads and make ``outputs``, which nothing makes yet."""
    node = candidate.node
    dtype = np.dtype(candidate.weight.dtype)
    name = node.name or outputs[0].name
    stem = candidate.weight.name
    left = node.op == "MatMul" and node.inputs[0] is candidate.weight
    data = node.inputs[1 if left else 0]
    bias = node.inputs[2] if len(node.inputs) > 2 and not node.inputs[2].is_empty() else None
    middle = gs.Variable(model.fresh_name(f"{outputs[0].name}_reduced"))

    def constant(values: FloatArray, suffix: str) -> gs.Constant:
        return gs.Constant(model.fresh_name(f"{stem}_{suffix}"), np.ascontiguousarray(values).astype(dtype))

    first_attrs: dict[str, Any] = {}
    second_attrs: dict[str, Any] = {}
    if node.op == "Conv":
        kernel = [int(size) for size in candidate.weight.shape[2:]]
        rank, channels = len(fit.first), int(candidate.weight.shape[1])
        first_attrs = {**node.attrs, "kernel_shape": kernel}  # strides, padding and dilations belong to the first
        second_attrs = {"kernel_shape": [1] * len(kernel)}
        first_inputs = [data, constant(fit.first.reshape(rank, channels, *kernel), "reduce")]
        second_inputs = [middle, constant(fit.second.reshape(-1, rank, *[1] * len(kernel)), "expand")]
    elif node.op == "Gemm":
        first_attrs = {"transB": 1} | ({"transA": 1} if node.attrs.get("transA", 0) else {})
        second_attrs = {"transB": 1} | {k: v for k, v in node.attrs.items() if k == "beta"}
        first_inputs = [data, constant(fit.first, "reduce")]
        second_inputs = [middle, constant(fit.second, "expand")]
        if model.opset < 11:  # C became optional with Gemm-11
            first_inputs.append(constant(np.zeros(len(fit.first)), "zero"))
    elif left:
        first_inputs = [constant(fit.first, "reduce"), data]
        second_inputs = [constant(fit.second, "expand"), middle]
    else:
        first_inputs = [data, constant(fit.first.T, "reduce")]
        second_inputs = [middle, constant(fit.second.T, "expand")]
    if bias is not None:
        second_inputs.append(bias)
    elif node.op == "Gemm" and model.opset < 11:
        second_inputs.append(constant(np.zeros(len(fit.second)), "zero"))
    first = gs.Node(node.op, model.fresh_name(f"{name}_reduce"), first_attrs, first_inputs, [middle])
    second = gs.Node(node.op, name, second_attrs, second_inputs, outputs)
    return first, second
