"""Raise the default operator set of a model, for passes that write ops which an older set does not have.

``onnx.version_converter`` loses metadata, stops at ops of other domains and reads every weight; here only the nodes
whose meaning or signature changed are rewritten, in the main graph and in every body, and the rest is left as it is.
All that changed between sets 9 and 13 is one of: more types or attributes with a default (nothing to do), an attribute
that became an input, Softmax without its flattening, Upsample and Scatter renamed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxslim.graph.shapes import Shapes, infer_shapes

if TYPE_CHECKING:
    from onnxslim.model import Model

__all__ = ["LOWEST", "raise_opset"]

LOWEST = 9  # before it, BatchNormalization, Scan, broadcasting and the element types of many ops differed

# The attributes that became inputs by set 13, by op: (attribute, position of the input, element type).
_MOVED: dict[str, tuple[tuple[str, int, type], ...]] = {
    "Clip": (("min", 1, np.float32), ("max", 2, np.float32)),
    "Pad": (("pads", 1, np.int64), ("value", 2, np.float32)),
    "ReduceSum": (("axes", 1, np.int64),),
    "Slice": (("starts", 1, np.int64), ("ends", 2, np.int64), ("axes", 3, np.int64)),
    "Split": (("split", 1, np.int64),),
    "Squeeze": (("axes", 1, np.int64),),
    "TopK": (("k", 1, np.int64),),
    "Unsqueeze": (("axes", 1, np.int64),),
}
_RENAMED = {"Scatter": "ScatterElements", "Upsample": "Resize"}
_DEFAULT_MOVED = {"Clip": {"min": float(np.finfo(np.float32).min), "max": float(np.finfo(np.float32).max)}}
_FLATTENING = ("Softmax", "LogSoftmax", "Hardmax")


def raise_opset(model: Model, opset: int = 13) -> str | None:
    """Rewrite ``model`` in place so that its default domain is at ``opset`` (at most 13); None when that was done.

    Returns the reason, and leaves the model as it was, when a node cannot be carried over.
    """
    before = model.opset
    if before >= opset:
        return None
    if before < LOWEST:
        return f"the model is at opset {before}; only {LOWEST} and newer can be raised to {opset}"
    if model.graph.functions:
        return f"the model has local functions, which are bound to opset {before}"
    nodes = [(graph, node) for graph in model.graphs() for node in graph.nodes if not node.domain]
    shapes = infer_shapes(model) if any(node.op == "Clip" for _, node in nodes) else None
    for _, node in nodes:
        reason = _obstacle(node, shapes)
        if reason:
            return f"node {node.name or node.op!r} ({node.op}) cannot be raised from opset {before}: {reason}"
    for graph, node in nodes:
        _raise_node(model, graph, node, before)
    for entry in model.header.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = opset
    return None


def _obstacle(node: gs.Node, shapes: Shapes | None) -> str | None:
    if node.op == "Dropout" and node.attrs.get("ratio") is not None and len(node.outputs) > 1:
        return "it returns its mask"
    if node.op == "Clip" and shapes is not None and shapes.dtype(node.inputs[0]) not in (None, np.dtype(np.float32)):
        return "its bounds are not float32"
    if node.op == "Upsample" and node.attrs.get("mode", "nearest") not in ("nearest", "linear"):
        return "unknown interpolation mode"
    for name, *_ in _MOVED.get(node.op, ()):
        if isinstance(node.attrs.get(name), gs.Node.AttributeRef):
            return f"its attribute {name} refers to a function"
    if node.op in _RENAMED or node.op in _MOVED:
        return None
    try:
        onnx.defs.get_schema(node.op, 13)
    except onnx.defs.SchemaError:
        return "ONNX does not define this op any more"
    return None


def _raise_node(model: Model, graph: gs.Graph, node: gs.Node, before: int) -> None:
    if node.op in _FLATTENING:
        _raise_softmax(model, graph, node)
    elif node.op in ("Resize", "Upsample"):
        _raise_resize(model, node, before)
    elif node.op == "Dropout":
        ratio = node.attrs.pop("ratio", None)
        if ratio is not None:
            node.inputs.append(_constant(model, node, "ratio", np.float32(ratio)))
    else:
        _move_attributes(model, node)
    node.op = _RENAMED.get(node.op, node.op)


def _constant(model: Model, node: gs.Node, hint: str, value: np.ndarray | np.generic) -> gs.Constant:
    return gs.Constant(model.fresh_name(f"{node.outputs[0].name}_{hint}"), np.asarray(value))


def _move_attributes(model: Model, node: gs.Node) -> None:
    for name, position, dtype in _MOVED.get(node.op, ()):
        value = node.attrs.pop(name, None)
        default = _DEFAULT_MOVED.get(node.op, {}).get(name)
        if value is None or value == default:
            continue
        while len(node.inputs) < position:
            node.inputs.append(gs.Variable.empty())
        values: np.ndarray = np.asarray(value, dtype)
        tensor = _constant(model, node, name, values.reshape(-1) if node.op == "TopK" else values)
        if len(node.inputs) > position:
            node.inputs[position] = tensor
        else:
            node.inputs.append(tensor)


def _raise_softmax(model: Model, graph: gs.Graph, node: gs.Node) -> None:
    """Before set 13, Softmax flattened its input to a matrix at ``axis`` (default 1) and normalised the rows."""
    axis = int(node.attrs.get("axis", 1))
    source, result = node.inputs[0], node.outputs[0]
    rank = len(source.shape) if source.shape is not None else None
    if axis == -1 or (rank is not None and axis == rank - 1):
        node.attrs["axis"] = axis
        return
    shape = gs.Variable(model.fresh_name(f"{result.name}_shape"), np.int64)
    matrix = gs.Variable(model.fresh_name(f"{result.name}_matrix"), source.dtype)
    rows = gs.Variable(model.fresh_name(f"{result.name}_rows"), source.dtype)
    node.attrs["axis"] = -1
    node.inputs[0] = matrix
    node.outputs[0] = rows
    before = [
        gs.Node("Shape", model.fresh_name(shape.name), inputs=[source], outputs=[shape]),
        gs.Node("Flatten", model.fresh_name(matrix.name), {"axis": axis}, inputs=[source], outputs=[matrix]),
    ]
    after = [gs.Node("Reshape", model.fresh_name(rows.name), inputs=[rows, shape], outputs=[result])]
    position = next(index for index, other in enumerate(graph.nodes) if other is node)
    graph.nodes = [*graph.nodes[:position], *before, node, *after, *graph.nodes[position + 1 :]]


def _raise_resize(model: Model, node: gs.Node, before: int) -> None:
    """Upsample (to 9) and Resize (10) took scales as the second input and sampled asymmetrically, flooring."""
    if before >= 11:
        return
    node.attrs["coordinate_transformation_mode"] = "asymmetric"
    if node.attrs.get("mode", "nearest") == "nearest":
        node.attrs["nearest_mode"] = "floor"
    scales = node.inputs[1]
    node.inputs[1] = gs.Variable.empty()
    node.inputs.append(scales)
