"""Converting a model from float32 to float16, or back: weights, inputs and outputs, and everything between them.

Every tensor of the one type becomes one of the other, in bodies as in the main graph, so nothing has to agree across a
body's border. Where an operator does not take the new type in one of its places, that place keeps the old one behind a
Cast. What an operator takes is read from its definition at the model's opset (the scales of Resize are float32 always,
QuantizeLinear takes float16 from opset 19 on); an operator that nobody here knows keeps all of its float32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper
from onnx.inliner import inline_local_functions

from onnxslim.errors import RecipeError
from onnxslim.graph.shapes import infer_shapes
from onnxslim.model import Model, load
from onnxslim.suggest import unknown_name

__all__ = ["FLOAT_TYPES", "OLDEST_OPSET", "convert_floats", "inline_functions", "narrow_inside", "rounded"]

FLOAT_TYPES = {"fp16": np.float16, "float16": np.float16, "fp32": np.float32, "float32": np.float32}
"""The float types that a model can be converted to, by name."""

# Below this, Cast names the type that it makes instead of giving its number.
OLDEST_OPSET = 6
# Ops that take float16 and compute too coarsely in it: counts and positions above 2,048, orders of close numbers.
_COARSE = frozenset(
    {
        "BitCast",
        "CumSum",
        "Max",
        "Min",
        "NonMaxSuppression",
        "RandomUniformLike",
        "Range",
        "Resize",
        "RoiAlign",
        "TopK",
        "Upsample",
    }
)
_TYPE_ATTRIBUTES = ("dtype", "output_datatype", "output_dtype", "to")


def convert_floats(model: Model, name: str) -> Model:
    """Return the model with its float32 replaced by float16, or its float16 by float32.

    To float16: numbers beyond its range become its largest ones, and no number but zero becomes zero. Range, CumSum,
    TopK, Resize and a few others go on computing in float32. To float32: Casts between the two types become ones
    that do nothing. Local functions are inlined first, as they have no types of their own.

    Args:
        model: may be changed or not; go on with what is returned.
        name: one of :data:`FLOAT_TYPES`.

    Raises:
        RecipeError: the name is another one, or the model's opset is below 6.
    """
    if name not in FLOAT_TYPES:
        hint = " For int8, use the pass quantize-static of `onnxslim optimize`." if "int8" in name else ""
        raise RecipeError(unknown_name("dtype", name, FLOAT_TYPES) + hint)
    if model.opset < OLDEST_OPSET:
        raise RecipeError(
            f"dtype: the model's opset is {model.opset}, and types can be converted from opset {OLDEST_OPSET} on."
        )
    model = inline_functions(model)
    target = np.dtype(FLOAT_TYPES[name])
    source = np.dtype(np.float32 if target == np.float16 else np.float16)
    _Conversion(model, source, target).run()
    return model


def inline_functions(model: Model) -> Model:
    """Return the model with its local functions inlined; the same model where it has none."""
    return load(inline_local_functions(model.to_proto())) if model.graph.functions else model


def narrow_inside(model: Model, keep: Collection[gs.Node]) -> int:
    """Compute in float16 behind inputs and before outputs that stay float32; return in how many nodes.

    One Cast stands wherever the two types meet, and is shared by all that read it.

    Args:
        model: rewritten in place. It has no functions and no sequences, and the type of each tensor can be inferred.
        keep: the nodes that go on computing in float32; none of them holds a body.
    """
    conversion = _Conversion(model, np.dtype(np.float32), np.dtype(np.float16), keep)
    computing = conversion.computing()
    conversion.keep_borders()
    conversion.run()
    return computing


class _Conversion:
    """One conversion of every tensor of type ``source`` to ``target``, but for what nodes of ``keep`` read and make."""

    def __init__(self, model: Model, source: np.dtype, target: np.dtype, keep: Collection[gs.Node] = ()) -> None:
        self.model = model
        self.keep = {id(node) for node in keep}
        self.source = source
        self.target = target
        self.codes = {helper.np_dtype_to_tensor_dtype(source): helper.np_dtype_to_tensor_dtype(target)}
        self.types = infer_shapes(model)
        self.opsets = {entry.domain or "": entry.version for entry in model.header.opset_import}
        # Read before anything is changed: who reads a tensor, in which place.
        self.readers = self._readers()
        self.unchanged = {
            id(tensor)
            for graph in model.graphs()
            for node in graph.nodes
            for index, tensor in enumerate(node.outputs)
            if self._is_source(tensor)
            and (self._keeps(node, index, inputs=False) or node.op == "Cast")
            and self.readers.get(id(tensor))
            and all(reader is not None and self._keeps(*reader, inputs=True) for reader in self.readers[id(tensor)])
        }

    def computing(self) -> int:
        """The number of nodes that will compute in the new type."""
        nodes = (node for graph in self.model.graphs() for node in graph.nodes if node.op != "Cast")
        return sum(
            any(
                self._is_source(tensor) and not self._keeps(node, index, inputs=False)
                for index, tensor in enumerate(node.outputs)
            )
            for node in nodes
        )

    def keep_borders(self) -> None:
        """Let the model's inputs and outputs keep their type, with a Cast for those who make or read the new one."""
        graph = self.model.graph
        borders = {id(tensor): tensor for tensor in (*graph.inputs, *graph.outputs) if self._is_source(tensor)}
        for tensor in borders.values():
            self._keep_border(tensor)
        self.unchanged |= borders.keys()

    def _keep_border(self, tensor: gs.Tensor) -> None:
        graph = self.model.graph
        maker = next(iter(tensor.inputs), None)
        place = 0 if maker is None else next(i for i, output in enumerate(maker.outputs) if output is tensor)
        converts = maker is not None and not self._keeps(maker, place, inputs=False)
        readers = [reader for reader in self.readers.get(id(tensor), ()) if reader is not None]
        narrow = [reader for reader in readers if not self._keeps(*reader, inputs=True)]
        bodies = [
            body for body in self.model.graphs() if body is not graph and _place(body.outputs, tensor) is not None
        ]
        if not (converts or narrow or bodies):
            return
        inner = gs.Variable(self.model.fresh_name(f"{tensor.name}_{self.target}"), self.target, tensor.shape)
        for node, index in narrow:
            node.inputs[index] = inner
        for body in bodies:
            body.outputs = [inner if output is tensor else output for output in body.outputs]
        if maker is not None and converts:
            maker.outputs[place] = inner
            cast = self._cast(inner, tensor, self.source)
        else:
            cast = self._cast(tensor, inner, self.target)
        position = 0 if maker is None else (_place(graph.nodes, maker) or 0) + 1
        graph.nodes = [*graph.nodes[:position], cast, *graph.nodes[position:]]

    def run(self) -> None:
        graphs = list(self.model.graphs())
        constants = self._constants(graphs)
        for graph in graphs:
            nodes: list[gs.Node] = []
            kept: dict[int, gs.Tensor] = {}  # converted tensor -> the same in the old type
            for node in graph.nodes:
                nodes += self._cast_inputs(node, kept)
                nodes.append(node)
                self._convert_attributes(node)
                nodes += self._cast_outputs(node, kept)
            graph.nodes = nodes
        for graph in graphs:
            self._declare(graph)
        for constant in constants:
            constant.values = rounded(np.asarray(constant.values), self.target)

    def _is_source(self, tensor: gs.Tensor) -> bool:
        return not tensor.is_empty() and self.types.dtype(tensor) == self.source

    def _readers(self) -> dict[int, list[tuple[gs.Node, int] | None]]:
        """The places in which each tensor is read; None for an output of a graph."""
        readers: dict[int, list[tuple[gs.Node, int] | None]] = {}
        for graph in self.model.graphs():
            for node in graph.nodes:
                for index, tensor in enumerate(node.inputs):
                    readers.setdefault(id(tensor), []).append((node, index))
            for tensor in graph.outputs:
                readers.setdefault(id(tensor), []).append(None)
        return readers

    def _keeps(self, node: gs.Node, index: int, *, inputs: bool) -> bool:
        """Whether a place of a node has to keep the old type."""
        if id(node) in self.keep:
            return True
        domain = "" if node.domain in (None, "ai.onnx") else node.domain
        narrows = self.target == np.float16
        if narrows and (domain or node.op in _COARSE):
            return True
        try:
            schema = onnx.defs.get_schema(node.op, self.opsets.get(domain, self.model.opset), domain)
        except onnx.defs.SchemaError:
            return True
        formal = list(schema.inputs if inputs else schema.outputs)
        if not formal:
            return True
        place = formal[min(index, len(formal) - 1)]  # the last one may be variadic
        allowed = next(
            (c.allowed_type_strs for c in schema.type_constraints if c.type_param_str == place.type_str), None
        )
        wanted = "tensor(float16)" if narrows else "tensor(float)"  # also within a sequence
        return not any(wanted in kind for kind in (allowed if allowed is not None else [place.type_str]))

    # --------------------------------------------------------------------------------------------------- constants

    def _constants(self, graphs: list[gs.Graph]) -> list[gs.Constant]:
        """The constants to convert; a place that keeps the old type gets one of its own where others read it too."""
        found: dict[int, gs.Constant] = {}
        for graph in graphs:
            found |= {
                id(tensor.default): tensor.default
                for tensor in graph.inputs
                if "default" in tensor.__dict__ and id(tensor) not in self.unchanged
            }
            for tensor in (*graph.outputs, *(tensor for node in graph.nodes for tensor in node.inputs)):
                if isinstance(tensor, gs.Constant):
                    found[id(tensor)] = tensor
        converted = []
        for constant in found.values():
            if np.dtype(constant.dtype) != self.source or id(constant) in self.unchanged:
                continue
            keeping = [
                reader for reader in self.readers.get(id(constant), ()) if reader and self._keeps(*reader, inputs=True)
            ]
            if keeping and len(keeping) == len(self.readers[id(constant)]):
                continue
            if keeping:
                name = self.model.fresh_name(f"{constant.name}_{self.source}")
                copy = gs.Constant(name, np.asarray(constant.values))
                for node, index in keeping:
                    node.inputs[index] = copy
            converted.append(constant)
        return converted

    # ------------------------------------------------------------------------------------------------------- nodes

    def _cast_inputs(self, node: gs.Node, kept: dict[int, gs.Tensor]) -> list[gs.Node]:
        casts = []
        for index, tensor in enumerate(node.inputs):
            if isinstance(tensor, gs.Constant) or not self._is_source(tensor) or id(tensor) in self.unchanged:
                continue
            if not self._keeps(node, index, inputs=True):
                continue
            if id(tensor) not in kept:
                kept[id(tensor)] = self._beside(tensor)
                casts.append(self._cast(tensor, kept[id(tensor)], self.source))
            node.inputs[index] = kept[id(tensor)]
        return casts

    def _cast_outputs(self, node: gs.Node, kept: dict[int, gs.Tensor]) -> list[gs.Node]:
        casts = []
        for index, tensor in enumerate(node.outputs):
            if not self._is_source(tensor) or id(tensor) in self.unchanged:
                continue
            if self._keeps(node, index, inputs=False):
                kept[id(tensor)] = self._beside(tensor)
                node.outputs[index] = kept[id(tensor)]
                casts.append(self._cast(kept[id(tensor)], tensor, self.target))
        return casts

    def _beside(self, tensor: gs.Tensor) -> gs.Variable:
        return gs.Variable(self.model.fresh_name(f"{tensor.name}_{self.source}"), self.source, tensor.shape)

    def _cast(self, source: gs.Tensor, target: gs.Tensor, dtype: np.dtype) -> gs.Node:
        attrs = {"to": helper.np_dtype_to_tensor_dtype(dtype)}
        return gs.Node("Cast", self.model.fresh_name(f"{target.name}_cast"), attrs, [source], [target])

    def _convert_attributes(self, node: gs.Node) -> None:
        """Make what a node says of its output's type say the new one."""
        outputs = [tensor for tensor in node.outputs if not tensor.is_empty()]
        if (
            id(node) in self.keep
            or not outputs
            or id(outputs[0]) in self.unchanged
            or node.domain not in (None, "", "ai.onnx")
        ):
            return
        if node.op == "Optional" and isinstance(node.attrs.get("type"), onnx.AttributeProto):
            attribute = onnx.AttributeProto()
            attribute.CopyFrom(node.attrs["type"])
            self._convert_type(attribute.tp)
            node.attrs["type"] = attribute
        if node.op in ("Constant", "ConstantOfShape"):
            self._convert_value(node)
            return
        if self._keeps(node, 0, inputs=False):
            return
        for name in _TYPE_ATTRIBUTES:
            code = node.attrs.get(name, self._default(node, name))
            if code in self.codes:
                node.attrs[name] = self.codes[code]

    def _default(self, node: gs.Node, name: str) -> Any:
        try:
            attribute = onnx.defs.get_schema(node.op, self.model.opset, "").attributes[name]
        except (onnx.defs.SchemaError, KeyError):
            return None
        return attribute.default_value.i if attribute.default_value.HasField("i") else None

    def _convert_value(self, node: gs.Node) -> None:
        if node.op == "ConstantOfShape" and "value" not in node.attrs:
            node.attrs["value"] = gs.Constant("value", np.zeros(1, np.float32))  # what leaving it out means
        for name in ("value_float", "value_floats"):
            if name in node.attrs:
                node.attrs["value"] = gs.Constant("value", np.array(node.attrs.pop(name), np.float32))
        value = node.attrs.get("value")
        if isinstance(value, gs.Constant) and np.dtype(value.dtype) == self.source:
            # Constants may be shared with another copy of the model: a new one, not new values.
            node.attrs["value"] = gs.Constant(value.name, rounded(np.asarray(value.values), self.target))

    # ------------------------------------------------------------------------------------------------ declarations

    def _declare(self, graph: gs.Graph) -> None:
        for tensor in self._variables(graph):
            if id(tensor) in self.unchanged:
                continue
            if self._is_source(tensor) and tensor.dtype is not None:
                tensor.dtype = self.target
            elif "info" in tensor.__dict__ and tensor.dtype is None:
                tensor.info = self._converted(tensor.info)
        graph.output_infos = [self._converted(info) for info in graph.__dict__.get("output_infos", ())]
        graph.stray_value_infos = []

    def _variables(self, graph: gs.Graph) -> Iterator[gs.Variable]:
        tensors = [*graph.inputs, *graph.outputs, *(tensor for node in graph.nodes for tensor in node.outputs)]
        unique = {id(tensor): tensor for tensor in tensors}
        return (tensor for tensor in unique.values() if isinstance(tensor, gs.Variable) and not tensor.is_empty())

    def _converted(self, info: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
        """The declaration of a sequence, an optional or a tensor with the new element type."""
        copy = onnx.ValueInfoProto()
        copy.CopyFrom(info)
        self._convert_type(copy.type)
        return copy

    def _convert_type(self, kind: onnx.TypeProto) -> None:
        """Replace the element type, in place."""
        while kind.WhichOneof("value") in ("sequence_type", "optional_type"):
            kind = getattr(kind, kind.WhichOneof("value")).elem_type
        if kind.WhichOneof("value") == "tensor_type" and kind.tensor_type.elem_type in self.codes:
            kind.tensor_type.elem_type = self.codes[kind.tensor_type.elem_type]


def _place(items: list[Any], item: Any) -> int | None:
    """The index of what is the same object."""
    return next((index for index, other in enumerate(items) if other is item), None)


def rounded(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Convert numbers; in a narrower type none becomes infinite, and none but zero becomes zero."""
    if dtype != np.float16:
        return values.astype(dtype)
    largest, smallest = np.finfo(dtype).max, np.finfo(dtype).smallest_subnormal
    finite = np.where(np.isinf(values), values, np.clip(values, -largest, largest))
    result = finite.astype(dtype)
    lost = (result == 0) & (values != 0)
    return np.where(lost, np.copysign(smallest, values).astype(dtype), result)
