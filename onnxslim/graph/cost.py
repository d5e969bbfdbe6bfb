"""What a model costs: parameters and bytes, which are counted, and multiply-accumulates, which are estimated."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import onnx_graphsurgeon as gs

from onnxslim.graph.shapes import Shapes, infer_shapes
from onnxslim.model import Model
from onnxslim.record import LayerSize
from onnxslim.tensors import tensor_nbytes

__all__ = ["MAC_OPS", "layer_costs", "node_count", "node_macs", "op_histogram", "parameter_count", "total_macs"]


def op_histogram(model: Model) -> dict[str, int]:
    """How many nodes of each op the model has, subgraphs and functions included; most frequent first.

    Constant nodes are left out: an initializer is another way to write one.
    """
    ops = Counter(f"{node.domain}.{node.op}" if node.domain else node.op for node in _counted(model))
    return dict(sorted(ops.items(), key=lambda item: (-item[1], item[0])))


def node_count(model: Model) -> int:
    """How many nodes the model has, subgraphs and functions included, Constant nodes not."""
    return sum(1 for _ in _counted(model))


def _counted(model: Model) -> Iterator[gs.Node]:
    return (node for graph in model.graphs() for node in graph.nodes if node.op != "Constant" or node.domain)


def parameter_count(model: Model) -> int:
    """How many elements the initializers and Constant nodes of the model hold, each tensor counted once."""
    seen: dict[int, int] = {}
    for graph in model.graphs():
        for node in graph.nodes:
            for tensor in _constants(node):
                seen[id(tensor)] = math.prod(tensor.shape)
    return sum(seen.values())


def total_macs(layers: Sequence[LayerSize]) -> int | None:
    """The sum of what is known; None where no layer's multiply-accumulates are."""
    known = [layer.macs for layer in layers if layer.macs is not None]
    return sum(known) if known else None


def layer_costs(
    model: Model,
    fixed: Mapping[str, Sequence[int]] | None = None,
    observed: Mapping[str, Sequence[int]] | None = None,
) -> list[LayerSize]:
    """Parameters, bytes and MACs of every node that holds weights or multiplies matrices, in graph order.

    A weight counts once, at the first node that computes with it, also where it is unpacked on the way there
    (DequantizeLinear, a codebook). A symbolic dimension counts as 1, so the MACs of a model with a dynamic batch are
    those of one sample; ``fixed`` gives sizes for inputs, and ``observed`` the shapes that tensors had in a run, by
    name, which inference may not know.
    """
    shapes = infer_shapes(model, fixed)
    if observed:
        for graph in model.graphs():
            shapes.observe(graph, observed)
    layers: list[LayerSize] = []
    counted: set[int] = set()
    carried: dict[int, list[gs.Constant]] = {}
    for graph in model.graphs():
        for node in graph.nodes:
            constants = _constants(node)
            for tensor in node.inputs:
                constants += carried.get(id(tensor), [])
            inputs = [tensor for tensor in node.inputs if not tensor.is_empty()]
            if all(isinstance(tensor, gs.Constant) or id(tensor) in carried for tensor in inputs) and node.outputs:
                # It only unpacks weights (DequantizeLinear, a codebook, Constant): they belong to who uses them.
                carried[id(node.outputs[0])] = constants
                continue
            constants = [tensor for tensor in _unique(constants) if id(tensor) not in counted]
            counted.update(id(tensor) for tensor in constants)
            parameters = sum(math.prod(tensor.shape) for tensor in constants)
            macs = node_macs(node, shapes)
            if macs is None and (parameters < 2 or node.op in _CONVERSIONS):
                continue
            name = node.name or (node.outputs[0].name if node.outputs else "")
            size = sum(tensor_nbytes(tensor) for tensor in constants)
            layers.append(LayerSize(name=name, op=node.op, parameters=parameters, bytes=size, macs=macs))
    return layers


def _unique(constants: list[gs.Constant]) -> list[gs.Constant]:
    return list({id(tensor): tensor for tensor in constants}.values())


def _constants(node: gs.Node) -> list[gs.Constant]:
    found = [tensor for tensor in node.inputs if isinstance(tensor, gs.Constant)]
    return found + [value for value in node.attrs.values() if isinstance(value, gs.Constant)]


def node_macs(node: gs.Node, shapes: Shapes) -> int | None:
    """Multiply-accumulates of one run of a node, for the ops that are made of them; None for others or if unknown.

    An estimate: symbolic dimensions count as 1, and the body of a loop is counted once.
    """
    if node.domain:
        return None
    estimate = _MACS.get(node.op)
    try:
        return estimate(node, shapes) if estimate else None
    except IndexError:  # the model is not legal: the node lacks an input or output that it must have
        return None


def _sizes(tensor: gs.Tensor, shapes: Shapes) -> list[int] | None:
    shape = shapes.shape(tensor)
    return None if shape is None else [size if isinstance(size, int) else 1 for size in shape]


def _convolution(node: gs.Node, shapes: Shapes) -> int | None:
    output, weight = _sizes(node.outputs[0], shapes), _sizes(node.inputs[_WEIGHT.get(node.op, 1)], shapes)
    if output is None or weight is None:
        return None
    return math.prod(output) * math.prod(weight[1:])


def _transposed_convolution(node: gs.Node, shapes: Shapes) -> int | None:
    data, weight = _sizes(node.inputs[0], shapes), _sizes(node.inputs[1], shapes)
    if data is None or weight is None:
        return None
    return math.prod(data) * math.prod(weight[1:])


def _matmul(node: gs.Node, shapes: Shapes) -> int | None:
    output, left = _sizes(node.outputs[0], shapes), _sizes(node.inputs[0], shapes)
    if output is None or not left:
        return None
    return math.prod(output) * left[-1]


def _gemm(node: gs.Node, shapes: Shapes) -> int | None:
    output, left = _sizes(node.outputs[0], shapes), _sizes(node.inputs[0], shapes)
    if output is None or left is None or len(left) != 2:
        return None
    return math.prod(output) * left[0 if node.attrs.get("transA", 0) else 1]


def _recurrent(node: gs.Node, shapes: Shapes) -> int | None:
    data = _sizes(node.inputs[0], shapes)
    weight, recurrence = _sizes(node.inputs[1], shapes), _sizes(node.inputs[2], shapes)
    if data is None or len(data) != 3 or weight is None or recurrence is None:
        return None
    return data[0] * data[1] * (math.prod(weight) + math.prod(recurrence))


_CONVERSIONS = frozenset({"QuantizeLinear", "DequantizeLinear"})
_WEIGHT = {"QLinearConv": 3}
_MACS = {
    "Conv": _convolution,
    "ConvInteger": _convolution,
    "QLinearConv": _convolution,
    "ConvTranspose": _transposed_convolution,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "QLinearMatMul": _matmul,
    "Gemm": _gemm,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
}
MAC_OPS = frozenset(_MACS)
