"""What is true of every tensor of a model for every legal input: dtype, shape, and the integers that shapes come from.

One pass over the graph in its order; bodies and functions are gone through where they stand. Shapes hold integers and
symbolic sizes (``onnxslim.graph.symbols``), so two tensors can be known to have the same size without its being known.
Small integer tensors that are computed from shapes have their elements known in the same way. Operators without a rule
of their own (``onnxslim.graph.fact_rules``) are left to ONNX's shape inference, one node at a time.

Only what the inputs of the main graph declare is believed. What a file says of inner tensors is used for operators of
other domains alone: exporters leave stale declarations behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxslim.graph.purity import is_standard
from onnxslim.graph.symbols import Element, SymbolicSize, fresh, symbol
from onnxslim.graph.walk import constant_value, subgraphs
from onnxslim.model import Model
from onnxslim.proto import export_graph
from onnxslim.tensors import NO_SYMBOLS, array_to_tensor

__all__ = ["LONGEST_VALUE", "UNKNOWN", "Fact", "Facts", "Shape", "has_plain_attributes"]

# Tensors of more elements are no shapes.
LONGEST_VALUE = 64

Shape = tuple[Element, ...]


@dataclass(frozen=True, slots=True)
class Fact:
    """What is known of one tensor.

    Attributes:
        dtype: of the tensor, or of the elements of a sequence; None when unknown.
        shape: a size for each axis; None when not even the rank is known, and for sequences.
        value: the elements, an object array of integers and symbolic sizes in the tensor's shape; only for small
            integer and bool tensors (bools are 0 and 1).
        sequence: whether it is a sequence of tensors.
    """

    dtype: np.dtype | None = None
    shape: Shape | None = None
    value: np.ndarray | None = None
    sequence: bool = False

    @property
    def known(self) -> np.ndarray | None:
        """The value as an array of the tensor's own dtype, when every element is a known integer."""
        if self.value is None or self.dtype is None:
            return None
        flat = self.value.reshape(-1).tolist()
        if any(isinstance(element, SymbolicSize) for element in flat):
            return None
        return np.array(flat, self.dtype).reshape(self.value.shape)


UNKNOWN = Fact()


class Facts:
    """Facts about the tensors of one model, by identity; kept right by :meth:`infer` after each edit.

    A tensor never changes what it holds, so facts only get better: what was known of a tensor before an edit still is.
    """

    def __init__(self, model: Model) -> None:
        self._known: dict[int, Fact] = {}
        self._keep: list[gs.Tensor] = []  # ids stay unique only while their objects live
        self._opset: dict[int, int] = {}
        for tensor in model.graph.inputs:
            self._set(tensor, _declared(tensor, named=True))
        self._enter(model.graph, model.opset)
        for function in model.graph.functions:
            self._enter(function, function.opset or model.opset)

    def require_shapes(self, nodes: Sequence[gs.Node]) -> list[gs.Tensor]:
        """Learn ranks and sizes from the nodes of one graph: where they ran, their inputs were of a shape they take.

        When one node of a graph runs, all of them do, so this holds wherever the tensor is read.

        Args:
            nodes: the nodes of the graph of which something is read, in its order; a runtime leaves out the others.

        Returns:
            The tensors of which something was learned.
        """
        own = {id(tensor) for node in nodes for tensor in node.outputs}
        learned = []
        for node in reversed(nodes):
            if not is_standard(node) or not has_plain_attributes(node):
                continue
            for tensor, shape in self._shapes_wanted(node):
                fact = self.of(tensor)
                if id(tensor) in own and not fact.sequence and self.learn(tensor, replace(fact, shape=shape)):
                    learned.append(tensor)
        return learned

    def _shapes_wanted(self, node: gs.Node) -> Iterator[tuple[gs.Tensor, Shape]]:
        result = self.of(node.outputs[0]).shape if node.outputs else None
        if node.op in ("LSTM", "GRU", "RNN"):
            yield from ((node.inputs[index], _of_rank(3)) for index in (0, 5, 6) if index < len(node.inputs))
        elif node.op in ("Conv", "ConvTranspose") and len(node.inputs) > 1:
            weight = self.of(node.inputs[1]).shape
            if weight is not None and len(weight) > 1:
                channels = weight[1] * int(node.attrs.get("group", 1)) if node.op == "Conv" else weight[0]
                yield node.inputs[0], (fresh(), channels, *_of_rank(len(weight) - 2))
        elif node.op == "Gemm":
            yield from ((tensor, _of_rank(2)) for tensor in node.inputs[:2])
        elif node.op == "MatMul" and len(node.inputs) > 1:
            left, right = (self.of(tensor).shape for tensor in node.inputs[:2])
            if left and right:
                yield node.inputs[0], (*left[:-1], right[-2] if len(right) > 1 else right[0])
        elif node.op == "Transpose" and isinstance(node.attrs.get("perm"), list):
            yield node.inputs[0], _of_rank(len(node.attrs["perm"]))
        elif node.op in ("Squeeze", "Unsqueeze") and result is not None:
            from onnxslim.graph.fact_rules import fixed_integers

            axes = fixed_integers(self, node, 1, "axes")
            rank = len(result) + (len(axes or ()) if node.op == "Squeeze" else -len(axes or ()))
            if axes and rank >= 0:
                yield node.inputs[0], _of_rank(rank)
        elif node.op in ("Relu", "Sigmoid", "Tanh", "Identity", "Cast", "Softmax") and result is not None:
            yield node.inputs[0], _of_rank(len(result))

    def _enter(self, graph: gs.Graph, opset: int) -> None:
        for node in graph.nodes:
            self._opset[id(node)] = opset
            self._enter_bodies(node, opset)
            self.infer(node)

    def _enter_bodies(self, node: gs.Node, opset: int) -> None:
        for body in subgraphs(node):
            for tensor, fact in zip(body.inputs, self._body_inputs(node, body), strict=False):
                self._set(tensor, fact)
            self._enter(body, opset)

    def _body_inputs(self, node: gs.Node, body: gs.Graph) -> Iterator[Fact]:
        """What holds in every iteration: the iteration number, and the types of what is carried or scanned."""
        if not is_standard(node):
            return
        if node.op == "Loop":
            # Runtimes take vectors of one here as well, where the body says so.
            plain = bool(body.inputs) and body.inputs[0].shape is not None and len(body.inputs[0].shape) == 0
            yield Fact(np.dtype(np.int64), () if plain else None)
            yield Fact(np.dtype(bool))
            for tensor in node.inputs[2:]:
                fact = self.of(tensor)
                yield Fact(fact.dtype, None, None, fact.sequence)
        elif node.op == "Scan":
            states = len(node.inputs) - int(node.attrs.get("num_scan_inputs", 0))
            for tensor in node.inputs[: max(states, 0)]:
                yield Fact(self.of(tensor).dtype)
            for tensor in node.inputs[max(states, 0) :]:
                yield Fact(self.of(tensor).dtype)

    def of(self, tensor: gs.Tensor) -> Fact:
        """What is known of a tensor."""
        fact = self._known.get(id(tensor))
        if fact is None and isinstance(tensor, gs.Constant):
            fact = constant_fact(tensor)
            self._set(tensor, fact)
        return fact or UNKNOWN

    def opset(self, node: gs.Node) -> int:
        """The version of the default domain that holds for a node."""
        return self._opset[id(node)]

    def adopt(self, node: gs.Node, opset: int) -> None:
        """Take in a new node, whose inputs are known, under the version of the default domain that holds for it."""
        self._opset[id(node)] = opset
        self.infer(node)

    def infer(self, node: gs.Node) -> bool:
        """Find what is true of the outputs of a node; whether that is more than was known before."""
        better = False
        for tensor, fact in zip(node.outputs, self._outputs(node), strict=False):
            if not tensor.is_empty():
                better |= self.learn(tensor, fact)
        return better

    def learn(self, tensor: gs.Tensor, fact: Fact) -> bool:
        """Add what else is known of a tensor; whether that is more than was known before."""
        old = self._known.get(id(tensor))
        if old is None or old is UNKNOWN:
            self._set(tensor, fact)
            return old is not fact
        merged = _merge(old, fact)
        if merged is old:
            return False
        self._set(tensor, merged)
        return True

    def _set(self, tensor: gs.Tensor, fact: Fact) -> None:
        if id(tensor) not in self._known:
            self._keep.append(tensor)
        self._known[id(tensor)] = fact

    def _outputs(self, node: gs.Node) -> Sequence[Fact]:
        from onnxslim.graph.fact_rules import RULES

        if not is_standard(node):
            return [_declared(tensor, named=False) for tensor in node.outputs]
        if node.op == "If":
            return self._if(node)
        if node.op in ("Loop", "Scan"):
            return self._loop(node)
        if not has_plain_attributes(node):
            return []
        rule: Callable[[Facts, gs.Node], Sequence[Fact] | None] | None = RULES.get(node.op)
        found = rule(self, node) if rule is not None else None
        return self._ask_onnx(node) if found is None else found

    def _if(self, node: gs.Node) -> list[Fact]:
        """What both branches agree on."""
        branches = [node.attrs.get("then_branch"), node.attrs.get("else_branch")]
        if not all(isinstance(branch, gs.Graph) for branch in branches):
            return []
        return [
            _common(self.of(first), self.of(second))
            for first, second in zip(branches[0].outputs, branches[1].outputs, strict=False)
        ]

    def _loop(self, node: gs.Node) -> list[Fact]:
        """The dtypes of what is carried out of a loop and of what it collects."""
        body = node.attrs.get("body")
        if not isinstance(body, gs.Graph):
            return []
        outputs = body.outputs[1:] if node.op == "Loop" else body.outputs
        return [Fact(fact.dtype, None, None, fact.sequence) for fact in map(self.of, outputs)]

    def _ask_onnx(self, node: gs.Node) -> list[Fact]:
        """ONNX's own shape inference of one node, symbols passed through by name."""
        opset = self._opset[id(node)]
        try:
            schema = onnx.defs.get_schema(node.op, opset, "")
        except onnx.defs.SchemaError:
            return []
        names: dict[str, Element] = {}
        types: dict[str, onnx.TypeProto] = {}
        data: dict[str, onnx.TensorProto] = {}
        for tensor in node.inputs:
            fact = self.of(tensor)
            if tensor.is_empty() or fact.dtype is None:
                continue
            types[tensor.name] = _type_proto(fact, names)
            known = fact.known if fact.value is not None else _small_constant(tensor)
            if known is not None:
                data[tensor.name] = array_to_tensor(tensor.name, known)
        proto = export_graph(gs.Graph(nodes=[node]), ir_version=8, opset=opset, write=_without_values).node[0]
        for index, tensor in enumerate(node.inputs):
            if not tensor.is_empty() and tensor.name not in types:
                return [Fact(self._dtype_of_schema(schema, node, types))]
            proto.input[index] = tensor.name
        imports = [onnx.helper.make_opsetid("", opset)]
        try:
            inferred = onnx.shape_inference.infer_node_outputs(schema, proto, types, data, opset_imports=imports)
        except Exception:  # onnx raises several unrelated types; then nothing is known
            return []
        return [_from_type(inferred.get(tensor.name), names) for tensor in node.outputs]

    def _dtype_of_schema(
        self, schema: onnx.defs.OpSchema, node: gs.Node, types: dict[str, onnx.TypeProto]
    ) -> np.dtype | None:
        """The dtype of the first output, where the schema ties it to an input of known type."""
        if not schema.outputs or not node.inputs:
            return None
        wanted = schema.outputs[0].type_str
        for formal, tensor in zip(schema.inputs, node.inputs, strict=False):
            if formal.type_str == wanted and tensor.name in types and not self.of(tensor).sequence:
                return self.of(tensor).dtype
        return None


def has_plain_attributes(node: gs.Node) -> bool:
    """Whether no attribute of a node refers to an argument of the function around it."""
    return not any(
        isinstance(value, gs.Node.AttributeRef)
        or (isinstance(value, onnx.AttributeProto) and bool(value.ref_attr_name))
        for value in node.attrs.values()
    )


def constant_fact(tensor: gs.Constant) -> Fact:
    """What is known of an initializer, without reading its values when it is large."""
    shape = tuple(int(size) for size in tensor.shape)
    dtype = np.dtype(tensor.dtype)
    small = (
        dtype.kind in "iub" and int(np.prod(shape)) <= LONGEST_VALUE and not getattr(tensor._values, "sparse", False)
    )
    return Fact(dtype, shape, to_elements(np.asarray(tensor.values)) if small else None)


def to_elements(array: np.ndarray) -> np.ndarray:
    """An integer or bool array as an object array of Python integers."""
    elements = np.empty(array.shape, object)
    if array.dtype.kind == "b":
        array = array.astype(np.int64)
    elements[...] = np.array(array.tolist(), object).reshape(array.shape)
    return elements


def _small_constant(tensor: gs.Tensor) -> np.ndarray | None:
    if isinstance(tensor, gs.Constant) and int(np.prod(tensor.shape)) > LONGEST_VALUE:
        return None
    value = constant_value(tensor)
    return value if value is not None and value.size <= LONGEST_VALUE and value.dtype.kind in "fiub" else None


def _without_values(constant: gs.Constant) -> onnx.TensorProto:
    elem_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(constant.dtype))
    return onnx.TensorProto(name=constant.name, data_type=elem_type, dims=constant.shape)


def _declared(tensor: gs.Tensor, *, named: bool) -> Fact:
    """What the file declares of a tensor; equal names are equal sizes where ``named`` says so."""
    if tensor.dtype is None or isinstance(tensor.dtype, int):
        return UNKNOWN
    if getattr(tensor, "type", "tensor_type") != "tensor_type":
        return UNKNOWN
    if tensor.shape is None:
        return Fact(np.dtype(tensor.dtype))
    return Fact(np.dtype(tensor.dtype), tuple(_declared_size(size, named=named) for size in tensor.shape))


def _declared_size(size: int | str | None, *, named: bool) -> Element:
    if isinstance(size, int):
        return size
    if size is None or size in NO_SYMBOLS or not named:
        return fresh()
    return symbol(size if size.isidentifier() else repr(size))  # quoted, it is no expression of ours


def _type_proto(fact: Fact, names: dict[str, Element]) -> onnx.TypeProto:
    elem_type = onnx.helper.np_dtype_to_tensor_dtype(fact.dtype)
    if fact.sequence:
        return onnx.helper.make_sequence_type_proto(onnx.helper.make_tensor_type_proto(elem_type, None))
    if fact.shape is None:
        return onnx.helper.make_tensor_type_proto(elem_type, None)
    dims: list[int | str] = []
    for size in fact.shape:
        if isinstance(size, int):
            dims.append(size)
        else:
            names[str(size)] = size
            dims.append(str(size))
    return onnx.helper.make_tensor_type_proto(elem_type, dims)


def _from_type(kind: onnx.TypeProto | None, names: dict[str, Element]) -> Fact:
    if kind is None:
        return UNKNOWN
    which = kind.WhichOneof("value")
    sequence = which == "sequence_type"
    tensor = kind.sequence_type.elem_type.tensor_type if sequence else kind.tensor_type
    if which not in ("tensor_type", "sequence_type") or not tensor.elem_type:
        return UNKNOWN
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    if sequence or not tensor.HasField("shape"):
        return Fact(dtype, None, None, sequence)
    shape = []
    for dim in tensor.shape.dim:
        if dim.HasField("dim_value"):
            shape.append(dim.dim_value)
        else:
            shape.append(names.get(dim.dim_param) if dim.dim_param else None)
    return Fact(dtype, tuple(fresh() if size is None else size for size in shape))


def _of_rank(rank: int) -> Shape:
    return tuple(fresh() for _ in range(rank))


def _better(old: Element, new: Element) -> bool:
    """Whether a size is worth replacing by another that it equals."""
    return isinstance(new, int) and not isinstance(old, int)


def _merge(old: Fact, new: Fact) -> Fact:
    """What two facts about one tensor say together; ``old`` itself when ``new`` adds nothing."""
    shape, value = old.shape, old.value
    if shape is None:
        shape = new.shape
    elif new.shape is not None and len(new.shape) == len(shape):
        sizes = tuple(b if _better(a, b) else a for a, b in zip(shape, new.shape, strict=True))
        shape = sizes if sizes != shape else shape
    if value is None:
        value = new.value
    elif new.value is not None and new.value.shape == value.shape:
        pairs = zip(value.reshape(-1), new.value.reshape(-1), strict=True)
        if any(_better(a, b) for a, b in pairs):
            value = new.value
    dtype = old.dtype if old.dtype is not None else new.dtype
    if shape is old.shape and value is old.value and dtype is old.dtype:
        return old
    return replace(old, dtype=dtype, shape=shape, value=value, sequence=old.sequence or new.sequence)


def _common(first: Fact, second: Fact) -> Fact:
    """What holds of a tensor that is one of two."""
    if first.dtype != second.dtype or first.sequence != second.sequence:
        return UNKNOWN
    if first.shape is None or second.shape is None or len(first.shape) != len(second.shape):
        return Fact(first.dtype, None, None, first.sequence)
    shape = tuple(a if a == b else fresh() for a, b in zip(first.shape, second.shape, strict=True))
    same = first.value is not None and second.value is not None and np.array_equal(first.value, second.value)
    return Fact(first.dtype, shape, first.value if same else None)
