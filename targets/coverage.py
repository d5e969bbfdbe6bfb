"""Which ops of a model TVM cannot take, found before compiling, with the nodes that they are in."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from onnxslim.model import Model
from onnxslim.targets._tvm import load_tvm
from onnxslim.targets.prepare import Prepared, as_proto, nested_graphs, prepare

__all__ = ["scan", "unsupported_ops"]

# The importer handles these itself, outside of its table of ops.
_HANDLED = frozenset({"Constant", "If"})
# Converters of ours (see import_ops.py) for what TVM's lacks, and the activations that they know.
_CONVERTED = frozenset({"LpNormalization", "ReverseSequence"})
_RECURRENT = {"GRU": ("sigmoid", "tanh"), "LSTM": ("sigmoid", "tanh", "tanh"), "RNN": ("tanh",)}
# The importer crashes on them, or has no such type.
_NARROW = {
    int(getattr(TensorProto, name)): name.lower()
    for name in ("INT4", "UINT4", "INT2", "UINT2", "FLOAT4E2M1", "FLOAT8E8M0", "STRING", "COMPLEX64", "COMPLEX128")
    if hasattr(TensorProto, name)
}
_QUANTIZATION = frozenset({"DequantizeLinear", "QuantizeLinear"})


def unsupported_ops(
    model: Model | ModelProto | str | Path, shapes: dict[str, list[int]] | None = None
) -> dict[str, list[str]]:
    """What TVM cannot take of ``model``: op -> names of the nodes; empty when it can take all.

    Local functions are inlined and constants folded first, as compiling does, so 4-bit weights that are unpacked by
    constant nodes are no obstacle. If, Loop and Scan bodies count. An op of a custom domain is named with its domain; a
    form of an op that TVM lacks is named with it, such as ``DequantizeLinear (block_size)``.

    Args:
        model: an ONNX file, or a model in memory; it is not changed.
        shapes: sizes of dynamic inputs, by input name.

    Raises:
        ModelError: the model cannot be read.
        TargetError: TVM is not there, or ``shapes`` does not fit the model.
    """
    return scan(prepare(as_proto(model), shapes))


def scan(prepared: Prepared) -> dict[str, list[str]]:
    """As :func:`unsupported_ops`, of a model that is prepared already."""
    known = _HANDLED | _CONVERTED | set(_RECURRENT) | set(_convert_map())
    found: dict[str, list[str]] = {}
    for tensor in (*prepared.inputs, *prepared.outputs):
        if tensor.dtype in ("sequence", "optional", "map", "sparse_tensor", "string", "complex64", "complex128"):
            found.setdefault(f"input or output of type {tensor.dtype}", []).append(tensor.name)
    for graph in nested_graphs(prepared.proto.graph):
        narrow = _narrow_tensors(graph)
        for node in graph.node:
            problem = _problem(node, known, narrow)
            if problem:
                found.setdefault(problem, []).append(prepared.labels.get(node.name, node.name))
    return found


def _convert_map() -> dict[str, Any]:
    load_tvm()
    frontend = importlib.import_module("tvm.relax.frontend.onnx.onnx_frontend")
    return dict(frontend._get_convert_map())


def _narrow_tensors(graph: GraphProto) -> dict[str, str]:
    values = [(tensor.name, tensor.data_type) for tensor in graph.initializer]
    values += [(value.name, value.type.tensor_type.elem_type) for value in graph.input]
    return {name: _NARROW[kind] for name, kind in values if kind in _NARROW}


def _problem(node: NodeProto, known: frozenset[str] | set[str], narrow: dict[str, str]) -> str | None:
    """What of a node TVM cannot take, or None."""
    if node.domain not in ("", "ai.onnx"):
        # The importer looks at the op's name only: it would take this one for an op that means something else.
        return f"{node.domain}.{node.op_type}"
    if node.op_type not in known:
        return str(node.op_type)
    for name in node.input:
        if name in narrow:
            return f"{node.op_type} ({narrow[name]} input)"
    attributes = {attribute.name: attribute for attribute in node.attribute}
    if node.op_type in _QUANTIZATION:
        if "block_size" in attributes and attributes["block_size"].i:
            return f"{node.op_type} (block_size)"
        if "output_dtype" in attributes and attributes["output_dtype"].i in _NARROW:
            return f"{node.op_type} ({_NARROW[attributes['output_dtype'].i]} output)"
    if node.op_type == "Cast" and attributes["to"].i in _NARROW:
        return f"Cast (to {_NARROW[attributes['to'].i]})"
    if node.op_type in _RECURRENT:
        return _recurrent_problem(node, attributes)
    if node.op_type == "Resize":
        # The importer takes no notice of these, so the result would be wrong.
        ignored = [name for name in ("antialias", "axes", "keep_aspect_ratio_policy") if name in attributes]
        if ignored and any(_is_set(attributes[name]) for name in ignored):
            return f"Resize ({', '.join(ignored)})"
    if node.op_type == "Constant":
        return "Constant (string)" if "value_string" in attributes or "value_strings" in attributes else None
    return None


def _recurrent_problem(node: NodeProto, attributes: dict[str, AttributeProto]) -> str | None:
    """What of a recurrent node has no kernel."""
    given = [*node.input, *[""] * 8]
    usual = _RECURRENT[node.op_type]
    activations = (
        [name.decode().lower() for name in attributes["activations"].strings] if "activations" in attributes else []
    )
    parts = [tuple(activations[at : at + len(usual)]) for at in range(0, len(activations), len(usual))]
    allowed = {("tanh",), ("sigmoid",), ("relu",)} if node.op_type == "RNN" else {usual}
    unusual = {
        "sequence_lens": bool(given[4]),
        "peepholes": bool(given[7]),
        "clip": "clip" in attributes,
        "input_forget": "input_forget" in attributes and attributes["input_forget"].i != 0,
        f"activations {', '.join(activations)}": not set(parts) <= allowed,
    }
    found = [name for name, is_so in unusual.items() if is_so]
    return f"{node.op_type} ({', '.join(found)})" if found else None


def _is_set(attribute: AttributeProto) -> bool:
    """Whether an attribute of Resize differs from its default."""
    return bool(attribute.ints) or attribute.i != 0 or attribute.s not in (b"", b"stretch")
