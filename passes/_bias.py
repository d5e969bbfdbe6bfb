"""The bias of a linear layer, wherever the graph keeps it: read it, and move it by a vector.

A convolution has it as an input, a Gemm as ``beta * C``, a MatMul in an Add behind it or nowhere. Passes that change
weights lossily put the mean of what they lost there (bias correction: Nagel et al. 2019).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim.graph.purity import is_standard
from onnxslim.graph.walk import constant_value, is_graph_output

if TYPE_CHECKING:
    from onnxslim.model import Model

__all__ = ["add_behind", "add_to_bias", "beta_of", "bias_of", "put_bias"]

FloatArray = NDArray[np.float64]


def bias_of(node: gs.Node, outputs: int) -> FloatArray | None:
    """What ``node`` (Conv, Gemm, MatMul) itself adds to each output channel; None when that is no constant vector.

    What an Add behind a MatMul adds is not counted: it is not in the MatMul's own output.
    """
    if node.op == "MatMul" or len(node.inputs) < 3 or node.inputs[2].is_empty():
        return np.zeros(outputs)
    value = constant_value(node.inputs[2])
    if value is None or (value.ndim > 1 and value.shape[0] != 1):
        return None
    return beta_of(node) * np.broadcast_to(np.asarray(value, np.float64).reshape(-1), (outputs,))


def beta_of(node: gs.Node) -> float:
    """What a layer multiplies its bias by."""
    return float(node.attrs.get("beta", 1.0)) if node.op == "Gemm" else 1.0


def add_to_bias(model: Model, graph: gs.Graph, node: gs.Node, delta: FloatArray) -> bool:
    """Add ``delta`` ``[O]`` to the output channels of ``node`` of ``graph``; False when there is no place for it.

    A bias that others share stays what it is for them. A MatMul whose only use is an Add of a constant vector
    gets it there, another MatMul an Add of its own, which then makes the tensor of the old name.
    """
    dtype = np.dtype(node.inputs[1].dtype)
    if node.op == "MatMul":
        return _add_behind(model, graph, node, delta, dtype)
    present = bias_of(node, len(delta))
    if present is None:
        return False
    put_bias(model, graph, node, (present + delta).astype(dtype))
    return True


def put_bias(model: Model, graph: gs.Graph, node: gs.Node, values: np.ndarray) -> None:
    """Let a Conv or Gemm of ``graph`` add ``values`` ``[O]`` and nothing else."""
    old = node.inputs[2] if len(node.inputs) > 2 and not node.inputs[2].is_empty() else None
    if node.op == "Gemm":
        node.attrs.pop("beta", None)
    if isinstance(old, gs.Constant) and len(old.outputs) == 1 and not is_graph_output(graph, old):
        old.values = values
        return
    bias = gs.Constant(model.fresh_name(old.name if old is not None else f"{node.name}.bias"), values)
    if len(node.inputs) > 2:
        node.inputs[2] = bias
    else:
        node.inputs.append(bias)


def add_behind(graph: gs.Graph, node: gs.Node, outputs: int) -> tuple[gs.Node, int] | None:
    """The Add of a constant vector that alone reads what ``node`` gives, and the input that is it; None without one."""
    out = node.outputs[0]
    user = out.outputs[0] if len(out.outputs) == 1 and not is_graph_output(graph, out) else None
    if user is None or user.op != "Add" or not is_standard(user) or not any(user is other for other in graph.nodes):
        return None
    side = 1 if user.inputs[0] is out else 0
    value = constant_value(user.inputs[side])
    return (user, side) if value is not None and value.ndim and value.size == value.shape[-1] == outputs else None


def _add_behind(model: Model, graph: gs.Graph, node: gs.Node, delta: FloatArray, dtype: np.dtype) -> bool:
    out = node.outputs[0]
    if (added := add_behind(graph, node, len(delta))) is not None:
        user, side = added
        value = np.asarray(constant_value(user.inputs[side]))
        moved = (value.astype(np.float64) + delta).astype(value.dtype)
        user.inputs[side] = gs.Constant(model.fresh_name(user.inputs[side].name), moved)
        return True
    inner = gs.Variable(model.fresh_name(f"{out.name}_linear"))
    bias = gs.Constant(model.fresh_name(f"{node.name or out.name}.bias"), delta.astype(dtype))
    node.outputs[0] = inner
    added = gs.Node("Add", model.fresh_name(f"{node.name or out.name}_bias"), inputs=[inner, bias], outputs=[out])
    position = next(i for i, other in enumerate(graph.nodes) if other is node)
    graph.nodes.insert(position + 1, added)
    return True
