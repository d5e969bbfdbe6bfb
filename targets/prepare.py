"""ONNX as TVM's importer can take it: functions inlined, sizes pinned, and what is constant worked out.

The importer knows the ops of the default domain and their everyday types. It has no local functions, no 4-bit types, no
blockwise scales and a weak hand with shape arithmetic. All of that is gone, or known to be a problem, after
:func:`prepare`: nothing here depends on TVM.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from onnxslim.errors import TargetError
from onnxslim.model import Model, load
from onnxslim.targets.operator_format import dequantized_nodes
from onnxslim.tensors import NO_SYMBOLS, TensorSource

__all__ = ["Prepared", "Tensor", "as_proto", "nested_graphs", "node_label", "opset_of", "prepare"]

Dim = int | str


@dataclass(frozen=True)
class Tensor:
    """One input or output: its name in the ONNX file, NumPy dtype name, and sizes; a string is an axis left open."""

    name: str
    dtype: str
    shape: tuple[Dim, ...] | None


@dataclass
class Prepared:
    """A model ready to be imported.

    Attributes:
        proto: the rewritten model; every node has a name of its own.
        inputs: the inputs that a caller must feed, in order.
        outputs: the outputs in order, as far as their types are known.
        labels: what to call a node of ``proto`` in a message, by its name there.
        notes: what a user should know about the rewriting.
    """

    proto: ModelProto
    inputs: list[Tensor]
    outputs: list[Tensor]
    labels: dict[str, str]
    notes: list[str] = field(default_factory=list)


def as_proto(model: Model | ModelProto | str | Path) -> ModelProto:
    """Return a ModelProto of its own with all weights inside.

    Raises:
        ModelError: the file cannot be read.
    """
    return load(model).to_proto() if not isinstance(model, Model) else model.to_proto()


def prepare(proto: ModelProto, shapes: dict[str, list[int]] | None = None) -> Prepared:
    """Rewrite ``proto``, in place, for TVM.

    Args:
        proto: the model; weights inside.
        shapes: sizes of dynamic inputs, by input name. Axes that share a symbol are pinned together.

    Raises:
        TargetError: ``shapes`` names no input, or contradicts the model or itself.
    """
    notes: list[str] = []
    proto = _inline_functions(proto)
    notes += _fix_overridable(proto.graph)
    labels = _name_nodes(proto.graph)
    _constants_to_initializers(proto.graph)
    _drop_empty_attributes(proto.graph)
    _pin_shapes(proto.graph, shapes or {})
    proto = _inline_definitions(proto, labels)
    _keep_nodes(proto.graph, dequantized_nodes(proto.graph))
    _fold(proto)
    _modern_resize(proto)
    _remove_dead(proto.graph)
    inferred = _infer(proto)
    types = {value.name: value for value in inferred.graph.output} if inferred else {}
    for value in proto.graph.output:
        value.CopyFrom(types.get(value.name, value))
    inputs, outputs = ([_describe(value) for value in values] for values in (proto.graph.input, proto.graph.output))
    return Prepared(proto, inputs, outputs, labels, notes)


def opset_of(proto: ModelProto) -> int:
    """The version of the default operator set."""
    return next((int(entry.version) for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 1)


def node_label(node: NodeProto) -> str:
    """What to call a node in a message: its name, or its first output where it has none."""
    if node.name:
        return str(node.name)
    return f"(unnamed, makes {next((name for name in node.output if name), '?')!r})"


def nested_graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """Yield the graph and every If, Loop and Scan body in it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for body in [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs:
                yield from nested_graphs(body)


# ---------------------------------------------------------------------------------------------------------- clean-up


def _inline_functions(proto: ModelProto) -> ModelProto:
    if not proto.functions:
        return proto
    from onnx import inliner

    try:
        return inliner.inline_local_functions(proto)
    except (RuntimeError, ValueError) as error:
        names = ", ".join(sorted(function.name for function in proto.functions)[:3])
        first = next(iter(str(error).splitlines()), "")
        raise TargetError(f"local functions ({names}) cannot be inlined: {first}") from None


# Ops that TVM's importer lacks, and that the specification defines by others that it has.
_DEFINED = frozenset({
    "Celu", "CenterCropPad", "NegativeLogLikelihoodLoss", "RotaryEmbedding", "SoftmaxCrossEntropyLoss", "SwiGLU",
    "Swish",
})  # fmt: skip


def _inline_definitions(proto: ModelProto, labels: dict[str, str]) -> ModelProto:
    """Put the definitions of ops that TVM lacks in their place; ``labels`` gets what to call the new nodes."""
    ops = {node.op_type for body in nested_graphs(proto.graph) for node in body.node if node.domain in ("", "ai.onnx")}
    inferred = _infer(proto) if ops & _DEFINED else None
    if inferred is None:
        return proto
    from onnx import inliner

    # Some definitions depend on the types and ranks of what they are given.
    for body, known in zip(nested_graphs(proto.graph), nested_graphs(inferred.graph), strict=True):
        del body.value_info[:]
        body.value_info.extend(known.value_info)
        body.value_info.extend(
            helper.make_tensor_value_info(each.name, each.data_type, each.dims) for each in body.initializer
        )
    try:
        inlined = inliner.inline_selected_functions(
            proto, [("", name) for name in sorted(_DEFINED)], inline_schema_functions=True
        )
    except (RuntimeError, ValueError):
        return proto
    for name, label in _name_nodes(inlined.graph).items():
        labels.setdefault(name, label)
    _constants_to_initializers(inlined.graph)
    return inlined


def _fix_overridable(graph: GraphProto) -> list[str]:
    """Make inputs that have a default value constants: a library holds its weights."""
    known = {tensor.name for tensor in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
    kept = [value for value in graph.input if value.name not in known]
    count = len(graph.input) - len(kept)
    if not count:
        return []
    del graph.input[:]
    graph.input.extend(kept)
    return [f"{count} inputs with a default value are fixed to it"]


def _name_nodes(graph: GraphProto) -> dict[str, str]:
    """Give every node a name that no other has; return what to call each in a message."""
    labels: dict[str, str] = {}
    for body in nested_graphs(graph):
        for node in body.node:
            label = node_label(node)
            name = node.name or f"{node.op_type}_unnamed"
            while name in labels:
                name = f"{name}_{len(labels)}"
            node.name = name
            labels[name] = label
    return labels


def _constants_to_initializers(graph: GraphProto) -> None:
    """Turn Constant nodes and sparse initializers into dense initializers, in every body."""
    for body in nested_graphs(graph):
        outputs = {value.name for value in body.output}
        for sparse in body.sparse_initializer:
            body.initializer.append(numpy_helper.from_array(TensorSource(sparse).load(), sparse.values.name))
        del body.sparse_initializer[:]
        dropped = set()
        for node in body.node:
            tensor = _constant_tensor(node) if node.op_type == "Constant" and not node.domain else None
            if tensor is None:
                continue
            if node.output[0] in outputs:
                # An output must be made by a node.
                node.attribute[0].CopyFrom(helper.make_attribute("value", tensor))
            else:
                body.initializer.append(tensor)
                dropped.add(node.name)
        _keep_nodes(body, [node for node in body.node if node.name not in dropped])


def _keep_nodes(graph: GraphProto, kept: list[NodeProto]) -> None:
    """Replace the nodes by others, of which there are more or fewer unless they are the same."""
    if len(kept) != len(graph.node):
        # Protobuf forgets an element that is taken out of its list.
        copies = [NodeProto.FromString(node.SerializeToString()) for node in kept]
        del graph.node[:]
        graph.node.extend(copies)


def _modern_resize(proto: ModelProto) -> None:
    """Write Upsample and the Resize of opset 10 as the importer's one form of Resize: X, roi, scales, sizes."""
    opset = opset_of(proto)
    for body in nested_graphs(proto.graph):
        sizes = {tensor.name: int(np.prod(tensor.dims, dtype=np.int64)) for tensor in body.initializer}
        for node in body.node:
            if node.domain not in ("", "ai.onnx"):
                continue
            if (node.op_type == "Upsample" and opset >= 9) or (node.op_type == "Resize" and opset == 10):
                data, scales = node.input[0], node.input[1]
                del node.input[:]
                node.input.extend([data, "", scales])
                node.op_type = "Resize"
                node.attribute.append(helper.make_attribute("coordinate_transformation_mode", "asymmetric"))
                node.attribute.append(helper.make_attribute("nearest_mode", "floor"))
            elif node.op_type == "Resize":
                # An empty tensor says the same as no tensor, but not to the importer.
                names = [name if sizes.get(name) != 0 else "" for name in node.input]
                del node.input[:]
                node.input.extend(names)


def _constant_tensor(node: NodeProto) -> TensorProto | None:
    name, attribute = node.output[0], node.attribute[0]
    if attribute.name == "value":
        tensor = TensorProto()
        tensor.CopyFrom(attribute.t)
        tensor.name = name
        return tensor
    if attribute.name == "sparse_value":
        return numpy_helper.from_array(TensorSource(attribute.sparse_tensor).load(), name)
    if attribute.name in ("value_float", "value_floats"):
        value = attribute.f if attribute.name == "value_float" else list(attribute.floats)
        return numpy_helper.from_array(np.asarray(value, dtype=np.float32), name)
    if attribute.name in ("value_int", "value_ints"):
        value = attribute.i if attribute.name == "value_int" else list(attribute.ints)
        return numpy_helper.from_array(np.asarray(value, dtype=np.int64), name)
    return None


def _drop_empty_attributes(graph: GraphProto) -> None:
    """An empty list means the default, and the importer cannot read it."""
    lists = {AttributeProto.INTS: "ints", AttributeProto.FLOATS: "floats", AttributeProto.STRINGS: "strings"}
    for body in nested_graphs(graph):
        for node in body.node:
            kept = [a for a in node.attribute if a.type not in lists or getattr(a, lists[a.type])]
            if len(kept) != len(node.attribute):
                copies = [AttributeProto.FromString(attribute.SerializeToString()) for attribute in kept]
                del node.attribute[:]
                node.attribute.extend(copies)


# ------------------------------------------------------------------------------------------------------------ shapes


def _pin_shapes(graph: GraphProto, shapes: dict[str, list[int]]) -> None:
    inputs = {value.name: value for value in graph.input}
    for name in shapes:
        if name not in inputs:
            raise TargetError(f"[shapes] names {name!r}, no input; there are: {', '.join(inputs) or 'none'}.")
    symbols = _bind_symbols(inputs, shapes)
    variables: dict[str, str] = {}
    for value in graph.input:
        _set_shape(value, shapes.get(value.name), symbols, variables)
    # Sizes that the file declared of inner tensors and outputs may be those of another batch.
    del graph.value_info[:]
    for value in graph.output:
        if value.type.WhichOneof("value") == "tensor_type":
            value.type.tensor_type.ClearField("shape")


def _bind_symbols(inputs: dict[str, ValueInfoProto], shapes: dict[str, list[int]]) -> dict[str, int]:
    symbols: dict[str, int] = {}
    for name, wanted in shapes.items():
        if inputs[name].type.WhichOneof("value") != "tensor_type":
            raise TargetError(f"[shapes] gives sizes for {name!r}, which is not a tensor.")
        if any(size < 0 for size in wanted):
            raise TargetError(f"[shapes] {name} = {wanted}: sizes are 0 or more.")
        tensor = inputs[name].type.tensor_type
        if not tensor.HasField("shape"):
            continue
        dims = tensor.shape.dim
        if len(dims) != len(wanted):
            raise TargetError(f"[shapes] {name} = {wanted}: the input has {len(dims)} axes, not {len(wanted)}.")
        for axis, (dim, size) in enumerate(zip(dims, wanted, strict=True)):
            if dim.HasField("dim_value") and dim.dim_value >= 0 and dim.dim_value != size:
                raise TargetError(
                    f"[shapes] {name} = {wanted}: axis {axis} is {dim.dim_value} in the model, not {size}."
                )
            if dim.dim_param not in NO_SYMBOLS and symbols.setdefault(dim.dim_param, size) != size:
                raise TargetError(
                    f"[shapes] {name} = {wanted}: axis {axis} is {dim.dim_param!r}, "
                    f"which is {symbols[dim.dim_param]} elsewhere."
                )
    return symbols


def _set_shape(
    value: ValueInfoProto, wanted: list[int] | None, symbols: dict[str, int], variables: dict[str, str]
) -> None:
    if value.type.WhichOneof("value") != "tensor_type":
        return
    tensor = value.type.tensor_type
    if wanted is not None:
        tensor.shape.ClearField("dim")
        for size in wanted:
            tensor.shape.dim.add(dim_value=size)
        return
    for axis, dim in enumerate(tensor.shape.dim):
        if dim.dim_param in symbols:
            dim.dim_value = symbols[dim.dim_param]
        elif dim.WhichOneof("value") != "dim_value" or dim.dim_value < 0:
            symbol = f"{value.name}_{axis}" if dim.dim_param in NO_SYMBOLS else dim.dim_param
            if symbol not in variables:
                # "2*n" is a name in ONNX; in TVM it would be arithmetic.
                plain = re.sub(r"\W", "_", symbol, flags=re.ASCII)
                variables[symbol] = plain if plain not in variables.values() else f"{plain}_{len(variables)}"
            dim.dim_param = variables[symbol]


def _describe(value: ValueInfoProto) -> Tensor:
    kind = value.type.WhichOneof("value") or "untyped"
    if kind != "tensor_type":
        return Tensor(value.name, kind.removesuffix("_type"), None)
    tensor = value.type.tensor_type
    dtype = "string" if tensor.elem_type == TensorProto.STRING else _dtype_name(tensor.elem_type)
    if not tensor.HasField("shape"):
        return Tensor(value.name, dtype, None)
    dims = [int(dim.dim_value) if dim.HasField("dim_value") else str(dim.dim_param) for dim in tensor.shape.dim]
    return Tensor(value.name, dtype, tuple(dims))


def _dtype_name(elem_type: int) -> str:
    try:
        return str(helper.tensor_dtype_to_np_dtype(elem_type))
    except KeyError:
        return "untyped"


def _infer(proto: ModelProto) -> ModelProto | None:
    """Shapes of everything, inferred on a copy without its large weights; None where ONNX cannot."""
    skeleton = ModelProto()
    skeleton.CopyFrom(proto)
    for body in nested_graphs(skeleton.graph):
        for tensor in body.initializer:
            if tensor.ByteSize() > 1024:
                bare = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
                bare.data_location = TensorProto.EXTERNAL
                bare.external_data.add(key="location", value="skeleton")
                tensor.CopyFrom(bare)
    try:
        return onnx.shape_inference.infer_shapes(skeleton, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return None


# ----------------------------------------------------------------------------------------------------------- folding

# Cheap, deterministic, and the same in the reference evaluator as in a runtime.
# fmt: off
_FOLDABLE = frozenset({
    "Abs", "Add", "And", "BlackmanWindow", "Cast", "CastLike", "Ceil", "Clip", "Concat", "ConstantOfShape",
    "DequantizeLinear", "Div", "Equal", "Expand", "Flatten", "Floor", "Gather", "GatherElements", "GatherND",
    "Greater", "GreaterOrEqual", "HammingWindow", "HannWindow", "Identity", "Less", "LessOrEqual", "Max",
    "MelWeightMatrix", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Pad", "Pow", "QuantizeLinear", "Range",
    "Reciprocal", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum", "Reshape", "ScatterElements", "ScatterND",
    "Shape", "Size", "Slice", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tile", "Transpose", "Unsqueeze", "Where",
})
# fmt: on
_MAX_FOLDED_BYTES = 1 << 30
_ROUNDS = 8


def _fold(proto: ModelProto) -> None:
    """Replace what does not depend on the inputs by its value, in the main graph, until nothing changes."""
    graph = proto.graph
    opset = opset_of(proto)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    arrays: dict[str, np.ndarray] = {}
    for _ in range(_ROUNDS):
        inferred = _infer(proto)
        shapes = _static_shapes(inferred) if inferred else {}
        if not _fold_once(graph, opset, constants, arrays, shapes):
            return


def _static_shapes(inferred: ModelProto) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        described = _describe(value)
        if described.shape is not None and all(isinstance(size, int) for size in described.shape):
            shapes[described.name] = tuple(int(size) for size in described.shape)
    return shapes


def _fold_once(
    graph: GraphProto,
    opset: int,
    constants: dict[str, TensorProto],
    arrays: dict[str, np.ndarray],
    shapes: dict[str, tuple[int, ...]],
) -> bool:
    outputs = {value.name for value in graph.output}
    kept, changed = [], False
    for node in graph.node:
        values = None
        if node.op_type in _FOLDABLE and node.domain in ("", "ai.onnx") and not outputs & set(node.output):
            values = _evaluate(node, opset, constants, arrays, shapes)
        if values is None:
            kept.append(node)
            continue
        changed = True
        for name, value in values.items():
            arrays[name] = value
            constants[name] = numpy_helper.from_array(value, name)
            graph.initializer.append(constants[name])
    _keep_nodes(graph, kept)
    return changed


def _evaluate(
    node: NodeProto,
    opset: int,
    constants: dict[str, TensorProto],
    arrays: dict[str, np.ndarray],
    shapes: dict[str, tuple[int, ...]],
) -> dict[str, np.ndarray] | None:
    """The outputs of a node, by name; None where they depend on the inputs, or cannot be worked out."""
    if node.op_type in ("Shape", "Size"):
        shape = tuple(constants[node.input[0]].dims) if node.input[0] in constants else shapes.get(node.input[0])
        return None if shape is None else {node.output[0]: _shape_value(node, shape)}
    names = [name for name in node.input if name]
    if any(name not in constants for name in names):
        return None
    sizes = [np.prod(shapes.get(name, (0,)), dtype=np.int64) * 8 for name in node.output]
    if any(size > _MAX_FOLDED_BYTES for size in sizes):
        return None
    if node.op_type in ("Expand", "Tile", "ConstantOfShape", "Range", "Pad") and node.output[0] not in shapes:
        return None
    feeds = {}
    for name in names:
        if name not in arrays:
            arrays[name] = numpy_helper.to_array(constants[name])
        feeds[name] = arrays[name]
    from onnx.reference import ReferenceEvaluator

    untyped = onnx.TypeProto()
    single = helper.make_model(
        helper.make_graph(
            [node],
            "node",
            [helper.make_value_info(name, untyped) for name in feeds],
            [helper.make_value_info(name, untyped) for name in node.output if name],
        ),
        # The evaluator has these from version 19 on; what a file of an older version can hold, means the same there.
        opset_imports=[helper.make_opsetid("", max(opset, 19) if "Linear" in node.op_type else opset)],
    )
    # The reference evaluator raises whatever NumPy or its own code does; then the node stays as it is.
    with contextlib.suppress(Exception), np.errstate(all="ignore"):
        results = ReferenceEvaluator(single).run(None, feeds)
        if all(isinstance(result, np.ndarray | np.generic) for result in results):
            names = [name for name in node.output if name]
            return {name: np.asarray(result) for name, result in zip(names, results, strict=True)}
    return None


def _shape_value(node: NodeProto, shape: tuple[int, ...]) -> np.ndarray:
    if node.op_type == "Size":
        return np.asarray(np.prod(shape, dtype=np.int64))
    bounds = {attribute.name: attribute.i for attribute in node.attribute}
    return np.asarray(shape[bounds.get("start", 0) : bounds.get("end", len(shape))], dtype=np.int64)


def _remove_dead(graph: GraphProto) -> None:
    """Remove nodes whose results nobody reads, and initializers that nobody reads."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if not needed.intersection(name for name in node.output if name):
            continue
        kept.append(node)
        needed.update(node.input)
        for attribute in node.attribute:
            for body in [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs:
                for inner in nested_graphs(body):
                    needed.update(name for user in inner.node for name in user.input)
                    needed.update(value.name for value in inner.output)
    _keep_nodes(graph, kept[::-1])
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in needed]:
        graph.initializer.remove(tensor)
