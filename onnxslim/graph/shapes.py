"""Types and shapes of every tensor, by ONNX shape inference on a weightless copy and by our facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.function import Function

from onnxslim.errors import RecipeError
from onnxslim.graph.facts import Facts
from onnxslim.graph.symbols import Element
from onnxslim.model import Model
from onnxslim.tensors import declared_type

__all__ = ["Shapes", "infer_shapes", "input_shape"]

Shape = list[int | str | None]


class Shapes:
    """Dtype and shape of each tensor of a model, as they were when :func:`infer_shapes` ran.

    A dimension is an int where it is the same for every legal input, a str where the file or inference gave it a
    symbol, None where nothing is known.
    """

    def __init__(
        self, known: dict[int, tuple[np.dtype | None, Shape | None]], keep: list[gs.Tensor], facts: Facts
    ) -> None:
        self._known = known
        self._keep = keep  # ids stay unique only while their objects live
        self._facts = facts

    def shape(self, tensor: gs.Tensor) -> Shape | None:
        """The shape of a tensor; None where not even the rank is known."""
        if isinstance(tensor, gs.Constant):
            return [int(size) for size in tensor.shape]
        return self._known.get(id(tensor), (None, None))[1]

    def dtype(self, tensor: gs.Tensor) -> np.dtype | None:
        """The dtype of a tensor; None where it is unknown or the value is not a dense tensor."""
        if isinstance(tensor, gs.Constant):
            dtype: np.dtype = np.dtype(tensor.dtype)
            return dtype
        return self._known.get(id(tensor), (None, None))[0]

    def elements(self, tensor: gs.Tensor) -> list[int | None] | None:
        """The numbers of a small vector of integers, None for those that depend on the inputs; None for another."""
        value = self._facts.of(tensor).value
        if value is None or value.ndim != 1:
            return None
        return [each if isinstance(each, int) else None for each in value.tolist()]

    def observe(self, graph: gs.Graph, shapes: Mapping[str, Sequence[int]]) -> None:
        """Take the shapes that tensors of one graph had in a run, by name, in place of what was inferred."""
        for node in graph.nodes:
            for tensor in node.outputs:
                if tensor.name in shapes:
                    self._known[id(tensor)] = (self.dtype(tensor), list(shapes[tensor.name]))
                    self._keep.append(tensor)

    def static(self, tensor: gs.Tensor) -> list[int] | None:
        """The shape of a tensor when every dimension is known, else None."""
        shape = self.shape(tensor)
        if shape is None or not all(isinstance(size, int) for size in shape):
            return None
        return [int(size) for size in shape if isinstance(size, int)]


def infer_shapes(
    model: Model,
    fixed: Mapping[str, Sequence[int]] | None = None,
    seen: Mapping[str, tuple[np.dtype, int | None]] | None = None,
) -> Shapes:
    """Infer the type and shape of every tensor of the main graph and of its subgraphs.

    Function bodies have no shapes of their own; their tensors are unknown here.

    Args:
        model: left as it is.
        fixed: sizes for graph inputs, by name, taken as if the file declared them.
        seen: dtype and rank of tensors of the main graph, by name, such as inference may know nothing of: results of
            operators that ONNX does not define.

    Raises:
        RecipeError: ``fixed`` names no input of the model, or disagrees with what the input declares.
    """
    skeleton = model.to_skeleton()
    if fixed:
        _fix_inputs(skeleton.graph, fixed)
    declared = {info.name for info in (*skeleton.graph.value_info, *skeleton.graph.output)}
    for name, (dtype, rank) in (seen or {}).items():
        if name not in declared:
            kind = onnx.helper.np_dtype_to_tensor_dtype(dtype)
            shape = None if rank is None else [None] * rank
            skeleton.graph.value_info.append(onnx.helper.make_tensor_value_info(name, kind, shape))
    try:
        inferred = onnx.shape_inference.infer_shapes(skeleton, strict_mode=False, data_prop=True)
    except Exception:  # onnx raises RuntimeError subclasses and ValueError; what the file declares is still known
        inferred = skeleton
    known: dict[int, tuple[np.dtype | None, Shape | None]] = {}
    keep: list[gs.Tensor] = []
    facts = Facts(model)
    if facts.require_shapes(_read(model.graph)):
        for node in model.graph.nodes:
            facts.infer(node)
    _match(model.graph, inferred.graph, facts, known, keep)
    return Shapes(known, keep, facts)


def _read(graph: gs.Graph) -> list[gs.Node]:
    """The nodes of a graph that a runtime runs for its outputs or its bodies, in order."""
    outputs, own, read = {id(tensor) for tensor in graph.outputs}, {id(node) for node in graph.nodes}, set()
    for node in reversed(graph.nodes):
        users = [id(user) for tensor in node.outputs for user in tensor.outputs]
        if any(id(tensor) in outputs for tensor in node.outputs) or any(u in read or u not in own for u in users):
            read.add(id(node))
    return [node for node in graph.nodes if id(node) in read]


def _better_known(shape: Shape | None, fact: Sequence[Element] | None) -> Shape | None:
    """What inference and facts say of a shape: facts follow sizes through arithmetic, where inference gives up."""
    if fact is None or (shape is not None and len(shape) != len(fact)):
        return shape
    inferred = shape if shape is not None else [None] * len(fact)
    return [known if isinstance(known, int) else size for size, known in zip(inferred, fact, strict=True)]


def input_shape(declared: Sequence[int | str | None], wanted: Sequence[int], name: str) -> list[int]:
    """Check the sizes that a user gave for an input against what the file declares.

    Raises:
        RecipeError: the ranks differ, a size is negative, or a declared size is another one.
    """
    if len(declared) != len(wanted) or any(
        size < 0 or (isinstance(known, int) and known != size) for known, size in zip(declared, wanted, strict=False)
    ):
        raise RecipeError(f"[shapes] {name} = {list(wanted)} does not fit the model, which declares {list(declared)}.")
    return list(wanted)


def _fix_inputs(graph: onnx.GraphProto, fixed: Mapping[str, Sequence[int]]) -> None:
    inputs = {info.name: info for info in graph.input}
    for name, sizes in fixed.items():
        if name not in inputs:
            raise RecipeError(f"[shapes] {name}: the model has no such input; it has {', '.join(inputs)}.")
        tensor = inputs[name].type.tensor_type
        if tensor.HasField("shape"):
            input_shape(declared_type(inputs[name])[1] or [], sizes, name)
        tensor.ClearField("shape")
        tensor.shape.SetInParent()
        for size in sizes:
            tensor.shape.dim.add().dim_value = size
    # What the file declares of inner tensors may name the symbols that were just given sizes; infer it anew.
    stale = [info for info in graph.value_info if any(dim.dim_param for dim in info.type.tensor_type.shape.dim)]
    for info in stale:
        graph.value_info.remove(info)


def _match(
    graph: gs.Graph,
    proto: onnx.GraphProto,
    facts: Facts,
    known: dict[int, tuple[np.dtype | None, Shape | None]],
    keep: list[gs.Tensor],
) -> None:
    """Pair the tensors of a graph with the inferred types of the same names; bodies by node order."""
    infos = {info.name: info for field in (proto.value_info, proto.output, proto.input) for info in field}

    def note(tensor: gs.Tensor) -> None:
        if isinstance(tensor, gs.Variable) and not tensor.is_empty():
            dtype, shape = declared_type(infos[tensor.name]) if tensor.name in infos else (None, None)
            fact = facts.of(tensor)
            if dtype is None and not fact.sequence:
                dtype = fact.dtype
            known[id(tensor)] = dtype, _better_known(shape, fact.shape)
            keep.append(tensor)

    for tensor in graph.inputs:
        note(tensor)
    for node, node_proto in zip(graph.nodes, proto.node, strict=True):
        for tensor in node.outputs:
            note(tensor)
            if node.op == "Constant" and not node.domain and isinstance(node.attrs.get("value"), gs.Constant):
                value = node.attrs["value"]
                known[id(tensor)] = (np.dtype(value.dtype), [int(size) for size in value.shape])
        if any(isinstance(value, gs.Graph) for value in node.attrs.values()):
            bodies = {attribute.name: attribute.g for attribute in node_proto.attribute}
            for name, value in node.attrs.items():
                if isinstance(value, gs.Graph) and not isinstance(value, Function):
                    _match(value, bodies[name], facts, known, keep)
