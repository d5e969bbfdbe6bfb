"""Quantized operators (QLinearConv, QLinearMatMul) as float ones between DequantizeLinear and QuantizeLinear.

Those are what TVM's importer has. A result may differ from the integer one by a quantum, where it lies between two.
"""

from __future__ import annotations

import numpy as np
from onnx import GraphProto, NodeProto, helper, numpy_helper

__all__ = ["dequantized_nodes"]


def dequantized_nodes(graph: GraphProto) -> list[NodeProto]:
    """The nodes of a graph, its quantized operators of constant weights and scales written as several float ones.

    The float weights become initializers of ``graph``; its nodes are not changed.
    """
    rewriter = _Rewriter(graph)
    return [part for node in graph.node for part in rewriter.rewrite(node) or [node]]


class _Rewriter:
    def __init__(self, graph: GraphProto) -> None:
        self.graph = graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        taken = {name for node in graph.node for name in (*node.input, *node.output)}
        self.prefix = "dequantized"
        while any(name.startswith(self.prefix) for name in taken):
            self.prefix += "_"

    def rewrite(self, node: NodeProto) -> list[NodeProto] | None:
        """What stands for a node; None where it stays."""
        if node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type == "QLinearConv":
            return self._convolution(node)
        return self._product(node) if node.op_type == "QLinearMatMul" else None

    def _convolution(self, node: NodeProto) -> list[NodeProto] | None:
        data, data_scale, data_zero, weight, scale, zero, *_ = node.input
        bias = node.input[8] if len(node.input) > 8 else ""
        names = [data_scale, weight, scale, zero, *([bias] if bias else [])]
        if any(name not in self.constants for name in names):
            return None
        values = [numpy_helper.to_array(self.constants[name]) for name in names]
        weights = _dequantized(values[1], values[2], values[3], axis=0)
        more = [self._add(node, "weight", weights)]
        if bias:
            # The bias has the scale of the products that it is added to.
            more.append(self._add(node, "bias", (values[4] * (values[0] * values[2]).reshape(-1)).astype(np.float32)))
        core = helper.make_node("Conv", [self._inner(node, "data"), *more], [self._inner(node, "result")])
        core.attribute.extend(node.attribute)
        return self._between(node, [(data, data_scale, data_zero, "data")], core)

    def _product(self, node: NodeProto) -> list[NodeProto] | None:
        sources, operands = [], []
        for place, part in enumerate(("left", "right")):
            names = node.input[3 * place : 3 * place + 3]
            if any(name not in self.constants for name in names[1:]):
                return None
            scale = numpy_helper.to_array(self.constants[names[1]])
            if scale.size == 1:
                sources.append((*names, part))
                operands.append(self._inner(node, part))
            elif part == "right" and names[0] in self.constants and scale.ndim == 1:
                values = [numpy_helper.to_array(self.constants[name]) for name in names]
                operands.append(self._add(node, part, _dequantized(values[0], values[1], values[2], axis=-1)))
            else:
                return None
        return self._between(node, sources, helper.make_node("MatMul", operands, [self._inner(node, "result")]))

    def _between(self, node: NodeProto, sources: list[tuple[str, str, str, str]], core: NodeProto) -> list[NodeProto]:
        """DequantizeLinear for each source, the float operator, QuantizeLinear."""
        core.name = node.name
        before = [
            helper.make_node(
                "DequantizeLinear", names, [self._inner(node, part)], self._inner(node, f"{part}_dequantize")
            )
            for *names, part in sources
        ]
        scale, zero = node.input[6:8]
        name = self._inner(node, "quantize")
        return [*before, core, helper.make_node("QuantizeLinear", [core.output[0], scale, zero], node.output, name)]

    def _add(self, node: NodeProto, part: str, values: np.ndarray) -> str:
        name = self._inner(node, part)
        self.graph.initializer.append(numpy_helper.from_array(values, name))
        return name

    def _inner(self, node: NodeProto, part: str) -> str:
        """A name that no other tensor has: those of nodes are unique."""
        return f"{self.prefix}/{node.name}/{part}"


def _dequantized(values: np.ndarray, scale: np.ndarray, zero: np.ndarray, axis: int) -> np.ndarray:
    sizes = [1] * values.ndim
    if scale.size > 1:
        sizes[axis] = -1
    zeros = zero.astype(np.int32).reshape(sizes if zero.size > 1 else [1] * values.ndim)
    return np.asarray((values.astype(np.int32) - zeros) * scale.reshape(sizes), np.float32)
