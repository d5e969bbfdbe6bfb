"""ONNX protobuf <-> onnx-graphsurgeon objects, losing nothing.

graphsurgeon's own importer and exporter drop metadata properties, node doc strings and overloads, quantization
annotations, TypeProto and sparse attributes, denotations, optional and nested sequence types, unused initializers,
initializers that are also graph inputs and raise on an empty list attribute or a string that is not UTF-8. The
conversion here keeps graphsurgeon's objects, which the passes work on, and carries what they have no place for:

* a ``header`` on graphs, functions and nodes: a protobuf of their own type with every field that graphsurgeon lacks;
* ``info`` on tensors: the ``ValueInfoProto`` as it stood in the file, written again while dtype and shape still agree;
* ``default`` on a graph input: its initializer, which a caller may override (IR version 4 and later), so that the
  tensor stays a variable and no pass can fold it;
* ``source`` on constants: the ``TensorProto``, written again unless the values were replaced;
* attributes that graphsurgeon has no type for stay ``AttributeProto``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto, TensorProto, helper
from onnx_graphsurgeon.ir.function import Function

from onnxslim.errors import ModelError
from onnxslim.tensors import (
    TensorSource,
    TensorWriter,
    copy_fields,
    declare,
    inline_tensor,
    make_constant,
    source_of,
    value_info,
)

__all__ = ["export_function", "export_graph", "import_function", "import_graph"]

_GRAPH_FIELDS = frozenset({"node", "input", "output", "initializer", "sparse_initializer", "value_info", "name"})
_NODE_FIELDS = frozenset({"input", "output", "attribute", "op_type", "name", "domain"})
_FUNCTION_FIELDS = frozenset(
    {"node", "input", "output", "name", "domain", "attribute", "attribute_proto", "value_info"}
)


# -------------------------------------------------------------------------------------------------------- importing


class _Importer:
    """Imports the graphs of one model; ``external`` finds the bytes of tensors outside the model file."""

    def __init__(
        self,
        opset: int,
        ir_version: int,
        imports: Iterable[onnx.OperatorSetIdProto],
        external: Callable[[TensorProto], TensorSource],
    ) -> None:
        self.opset = opset
        self.ir_version = ir_version
        self.imports = list(imports)
        self.external = external

    def tensor(self, proto: TensorProto) -> TensorSource:
        if proto.data_location == TensorProto.EXTERNAL:
            return self.external(proto)
        return TensorSource(proto)

    def graph(self, proto: onnx.GraphProto, outer: dict[str, gs.Tensor]) -> gs.Graph:
        scope: dict[str, gs.Tensor] = {}
        input_names = {info.name for info in proto.input}
        # Before IR version 4 every initializer had to be listed as an input and none could be overridden.
        overridable = input_names if self.ir_version >= 4 else frozenset()
        defaults: dict[str, gs.Constant] = {}
        initializers: list[gs.Constant] = []
        for tensor in proto.initializer:
            constant = make_constant(tensor.name, self.tensor(tensor))
            if tensor.name in overridable:
                defaults[tensor.name] = constant
            else:
                scope[tensor.name] = constant
                initializers.append(constant)
        for sparse in proto.sparse_initializer:
            if TensorProto.EXTERNAL in (sparse.values.data_location, sparse.indices.data_location):
                raise ModelError(f"sparse initializer {sparse.values.name!r}: external data is not supported for it.")
            constant = make_constant(sparse.values.name, TensorSource(sparse))
            if constant.name in overridable:
                defaults[constant.name] = constant
            else:
                scope[constant.name] = constant
                initializers.append(constant)

        inputs: list[gs.Tensor] = []
        for info in proto.input:
            if info.name in scope:  # an initializer of an old IR version, listed as an input
                scope[info.name].info = info
                continue
            variable = gs.Variable(info.name)
            declare(variable, info)
            if info.name in defaults:
                variable.default = defaults[info.name]
            scope[info.name] = variable
            inputs.append(variable)
        for node in proto.node:
            for name in node.output:
                if name and name not in scope:
                    scope[name] = gs.Variable(name)
        stray: list[onnx.ValueInfoProto] = []
        for info in proto.value_info:
            if info.name in scope:
                declare(scope[info.name], info)
            else:
                stray.append(info)

        def find(name: str) -> gs.Tensor:
            if not name:
                return gs.Variable.empty()
            tensor = scope.get(name)
            if tensor is None:
                tensor = outer.get(name)
            if tensor is None:  # defined nowhere: the checker and ONNX Runtime name it better than we could here
                tensor = scope[name] = gs.Variable(name)
            return tensor

        outputs: list[gs.Tensor] = []
        for info in proto.output:
            tensor = find(info.name)
            if isinstance(tensor, gs.Variable) and not any(tensor is known for known in inputs):
                declare(tensor, info)
            outputs.append(tensor)

        visible = {**outer, **scope}
        nodes = [self.node(node, find, visible) for node in proto.node]
        graph = gs.Graph(
            nodes=nodes,
            inputs=inputs,
            outputs=outputs,
            name=proto.name,
            doc_string=proto.doc_string,
            opset=self.opset,
            import_domains=self.imports,
            ir_version=self.ir_version,
        )
        header = onnx.GraphProto()
        copy_fields(proto, header, _GRAPH_FIELDS)
        graph.header = header
        graph.initializers = initializers
        graph.output_infos = list(proto.output)
        graph.input_order = [info.name for info in proto.input]
        graph.stray_value_infos = stray
        output_ids = {id(tensor) for tensor in outputs}
        graph.unused_initializers = [c for c in initializers if not c.outputs and id(c) not in output_ids]
        return graph

    def node(self, proto: onnx.NodeProto, find: Callable[[str], gs.Tensor], visible: dict[str, gs.Tensor]) -> gs.Node:
        attrs: dict[str, Any] = {}
        types: dict[str, int] = {}
        docs: dict[str, str] = {}
        for attribute in proto.attribute:
            attrs[attribute.name] = self.attribute(attribute, visible)
            types[attribute.name] = attribute.type
            if attribute.doc_string:
                docs[attribute.name] = attribute.doc_string
        node = gs.Node(
            op=proto.op_type,
            name=proto.name,
            attrs=attrs,
            inputs=[find(name) for name in proto.input],
            outputs=[find(name) for name in proto.output],
            domain=proto.domain or None,
        )
        node.attribute_types = types
        if docs:
            node.attribute_docs = docs
        header = onnx.NodeProto()
        copy_fields(proto, header, _NODE_FIELDS)
        if header.ByteSize():
            node.header = header
        return node

    def attribute(self, proto: AttributeProto, visible: dict[str, gs.Tensor]) -> Any:
        if proto.ref_attr_name:
            return gs.Node.AttributeRef(proto.ref_attr_name, proto.type)
        kind = proto.type
        if kind == AttributeProto.TENSOR:
            return make_constant(proto.t.name, self.tensor(proto.t))
        if kind == AttributeProto.GRAPH:
            return self.graph(proto.g, visible)
        try:
            if kind == AttributeProto.STRING:
                return proto.s.decode()
            if kind == AttributeProto.STRINGS:
                return [item.decode() for item in proto.strings]
        except UnicodeDecodeError:
            return proto
        if kind in _PLAIN:
            return getattr(proto, _PLAIN[kind])
        if kind in _LISTS:
            return list(getattr(proto, _LISTS[kind]))
        return proto

    def function(self, proto: onnx.FunctionProto) -> Function:
        scope: dict[str, gs.Tensor] = {}

        def find(name: str) -> gs.Tensor:
            if not name:
                return gs.Variable.empty()
            if name not in scope:
                scope[name] = gs.Variable(name)
            return scope[name]

        inputs = [find(name) for name in proto.input]
        for node in proto.node:
            for name in node.output:
                find(name)
        stray = []
        for info in proto.value_info:
            if info.name in scope:
                declare(scope[info.name], info)
            else:
                stray.append(info)
        outputs = [find(name) for name in proto.output]
        nodes = [self.node(node, find, scope) for node in proto.node]
        attrs: dict[str, Any] = dict.fromkeys(proto.attribute)
        attrs |= {attribute.name: attribute for attribute in proto.attribute_proto}
        function = Function(
            proto.name,
            domain=proto.domain,
            nodes=nodes,
            inputs=inputs,
            outputs=outputs,
            doc_string=proto.doc_string,
            opset=next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), self.opset),
            import_domains=list(proto.opset_import),
            attrs=attrs,
        )
        header = onnx.FunctionProto()
        copy_fields(proto, header, _FUNCTION_FIELDS)
        function.header = header
        function.initializers = []  # a function cannot hold any; its constants are Constant nodes
        function.unused_initializers = []
        function.stray_value_infos = stray
        return function


_PLAIN = {AttributeProto.FLOAT: "f", AttributeProto.INT: "i"}
_LISTS = {AttributeProto.FLOATS: "floats", AttributeProto.INTS: "ints"}


def import_graph(
    proto: onnx.GraphProto,
    *,
    opset: int,
    ir_version: int,
    imports: Iterable[onnx.OperatorSetIdProto],
    external: Callable[[TensorProto], TensorSource],
) -> gs.Graph:
    """Import the main graph of a model, subgraphs included."""
    return _Importer(opset, ir_version, imports, external).graph(proto, {})


def import_function(
    proto: onnx.FunctionProto, *, opset: int, ir_version: int, external: Callable[[TensorProto], TensorSource]
) -> Function:
    """Import one local function of a model."""
    return _Importer(opset, ir_version, proto.opset_import, external).function(proto)


# -------------------------------------------------------------------------------------------------------- exporting


class _Exporter:
    def __init__(self, ir_version: int, opset: int, write: TensorWriter) -> None:
        self.ir_version = ir_version
        self.opset = opset
        self.write = write

    def graph(self, graph: gs.Graph, visible: frozenset[int], proto: onnx.GraphProto) -> None:
        if "header" in graph.__dict__:
            proto.CopyFrom(graph.header)
        proto.name = graph.name
        constants = _constants(graph, visible)
        visible = visible | {id(constant) for constant in constants}
        for node in graph.nodes:
            self.node(node, visible, proto.node.add())

        infos = {tensor.name: self.input_info(tensor) for tensor in graph.inputs}
        dense = constants + [tensor.default for tensor in graph.inputs if "default" in tensor.__dict__]
        if self.ir_version < 4:
            infos |= {constant.name: self.input_info(constant) for constant in constants}
        order = {name: index for index, name in enumerate(graph.__dict__.get("input_order", ()))}
        declared = [tensor.name for tensor in graph.inputs]
        if self.ir_version < 4:
            declared = sorted(infos, key=lambda name: order.get(name, len(order)))
        proto.input.extend(infos[name] for name in declared)
        for constant in dense:
            source = source_of(constant)
            if source is not None and source.sparse:
                sparse = proto.sparse_initializer.add()
                sparse.CopyFrom(source.tensor)
                sparse.values.name = constant.name
            else:
                proto.initializer.append(self.write(constant))
        proto.output.extend(self.output_infos(graph))

        done = {info.name for info in (*proto.input, *proto.output)}
        for info in self.value_infos(graph, constants):
            if info.name not in done:
                done.add(info.name)
                proto.value_info.append(info)
        names = (
            done | {n for node in proto.node for n in (*node.input, *node.output)} | {t.name for t in proto.initializer}
        )
        kept = [note for note in proto.quantization_annotation if note.tensor_name in names]
        if len(kept) < len(proto.quantization_annotation):
            del proto.quantization_annotation[:]
            proto.quantization_annotation.extend(kept)

    def input_info(self, tensor: gs.Tensor) -> onnx.ValueInfoProto:
        return value_info(tensor) or onnx.ValueInfoProto(name=tensor.name)

    def output_infos(self, graph: gs.Graph) -> Iterator[onnx.ValueInfoProto]:
        # An output that is an input or an initializer may declare other dims than that tensor does.
        carried = {info.name: info for info in graph.__dict__.get("output_infos", ())}
        inputs = {id(tensor) for tensor in graph.inputs}
        for tensor in graph.outputs:
            if (isinstance(tensor, gs.Constant) or id(tensor) in inputs) and tensor.name in carried:
                yield carried[tensor.name]
            else:
                yield self.input_info(tensor)

    def value_infos(self, graph: gs.Graph, constants: list[gs.Constant]) -> Iterator[onnx.ValueInfoProto]:
        for tensor in constants:
            if "info" in tensor.__dict__ and self.ir_version >= 4:
                info = value_info(tensor)
                if info is not None:
                    yield info
        for node in graph.nodes:
            for tensor in node.outputs:
                if not tensor.is_empty():
                    info = value_info(tensor)
                    if info is not None:
                        yield info
        yield from graph.__dict__.get("stray_value_infos", ())

    def node(self, node: gs.Node, visible: frozenset[int], proto: onnx.NodeProto) -> None:
        if "header" in node.__dict__:
            proto.CopyFrom(node.header)
        proto.op_type = node.op
        proto.name = node.name
        if node.domain:
            proto.domain = node.domain
        proto.input.extend(tensor.name for tensor in node.inputs)
        proto.output.extend(tensor.name for tensor in node.outputs)
        docs = node.__dict__.get("attribute_docs", {})
        for name, value in node.attrs.items():
            attribute = proto.attribute.add()
            self.attribute(node, name, value, visible, attribute)
            if name in docs:
                attribute.doc_string = docs[name]

    def attribute(
        self, node: gs.Node, name: str, value: Any, visible: frozenset[int], attribute: AttributeProto
    ) -> None:
        if isinstance(value, AttributeProto):
            attribute.CopyFrom(value)
            return
        attribute.name = name
        if isinstance(value, gs.Node.AttributeRef):
            attribute.ref_attr_name = value.name
            attribute.type = value.type
        elif isinstance(value, gs.Constant):
            attribute.type = AttributeProto.TENSOR
            attribute.t.CopyFrom(self.write(value))
        elif isinstance(value, gs.Graph):
            attribute.type = AttributeProto.GRAPH
            attribute.g.SetInParent()
            self.graph(value, visible, attribute.g)
        else:
            attribute.CopyFrom(helper.make_attribute(name, value, attr_type=self.attribute_type(node, name, value)))

    def attribute_type(self, node: gs.Node, name: str, value: Any) -> int | None:
        """The type to write where the Python value does not tell: an empty list, or 1 where a float is meant."""
        if isinstance(value, (str, bytes)):
            return None
        known: int | None = node.__dict__.get("attribute_types", {}).get(name)
        if known is None:
            try:
                schema = onnx.defs.get_schema(node.op, self.opset, node.domain or "")
                known = schema.attributes[name].type.value
            except (onnx.defs.SchemaError, KeyError):
                return None
        return known

    def function(self, function: Function, proto: onnx.FunctionProto) -> None:
        if "header" in function.__dict__:
            proto.CopyFrom(function.header)
        proto.name = function.name
        proto.domain = function.domain
        proto.input.extend(tensor.name for tensor in function.inputs)
        proto.output.extend(tensor.name for tensor in function.outputs)
        for name, default in function.attrs.items():
            if default is None:
                proto.attribute.append(name)
            else:
                proto.attribute_proto.append(default)
        for node in function.nodes:
            self.node(node, frozenset(), proto.node.add())
        infos = []
        for tensor in function.tensors().values():
            if isinstance(tensor, gs.Variable) and not tensor.is_empty():
                info = value_info(tensor)
                if info is not None:
                    infos.append(info)
        proto.value_info.extend([*infos, *function.__dict__.get("stray_value_infos", ())])


def _constants(graph: gs.Graph, visible: frozenset[int]) -> list[gs.Constant]:
    """The initializers of a graph: those of the file that are still used or were never used, then new ones."""
    seen = set(visible)
    found: list[gs.Constant] = []
    outputs = {id(tensor) for tensor in graph.outputs}
    unused = {id(tensor) for tensor in graph.__dict__.get("unused_initializers", ())}

    def add(tensor: gs.Tensor) -> None:
        if isinstance(tensor, gs.Constant) and id(tensor) not in seen:
            seen.add(id(tensor))
            found.append(tensor)

    for constant in graph.__dict__.get("initializers", ()):
        if constant.outputs or id(constant) in outputs or id(constant) in unused:
            add(constant)
    for node in graph.nodes:
        for tensor in node.inputs:
            add(tensor)
    for tensor in graph.outputs:
        add(tensor)
    return found


def export_graph(
    graph: gs.Graph,
    *,
    ir_version: int,
    opset: int,
    write: TensorWriter = inline_tensor,
    into: onnx.GraphProto | None = None,
) -> onnx.GraphProto:
    """Export a main graph, subgraphs included, into an empty message or a new one.

    ``write`` says how the weights are written.
    """
    proto = onnx.GraphProto() if into is None else into
    proto.SetInParent()
    _Exporter(ir_version, opset, write).graph(graph, frozenset(), proto)
    return proto


def export_function(
    function: Function,
    *,
    ir_version: int,
    opset: int,
    write: TensorWriter = inline_tensor,
    into: onnx.FunctionProto | None = None,
) -> onnx.FunctionProto:
    """Export a local function into an empty message or a new one."""
    proto = onnx.FunctionProto() if into is None else into
    _Exporter(ir_version, function.opset or opset, write).function(function, proto)
    return proto
