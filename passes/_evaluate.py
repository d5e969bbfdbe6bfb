"""Running a set of constant nodes: their sizes by shape inference, their values by ONNX Runtime.

All nodes of a set go into one session, so the cost is that of one session, not of one for each node. Where ONNX Runtime
refuses the set, its nodes are tried one by one, small ones with the ONNX reference evaluator as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxslim.errors import SlimError
from onnxslim.graph.walk import constant_value
from onnxslim.proto import export_graph
from onnxslim.tensors import array_to_tensor, inline_tensor

__all__ = ["ConstantSet", "Failure", "stored_bytes"]

# The reference evaluator is written in Python; above this many bytes of inputs it is not tried.
_REFERENCE_LIMIT = 1 << 20
# What goes into the model of a size inference: longer vectors are no shapes.
_INLINE_LIMIT = 1 << 12
_PLAIN_KINDS = frozenset("biufO")


@dataclass(frozen=True)
class Failure:
    """A node that could not be evaluated, and why."""

    node: gs.Node
    why: str


@dataclass
class ConstantSet:
    """Nodes of one opset without bodies, in an order in which producers come first, that read constants only.

    Attributes:
        nodes: the nodes.
        opset: version of the default domain.
        values: arrays known already, by id of the tensor; constants and Constant nodes are found without it.
    """

    nodes: Sequence[gs.Node]
    opset: int
    values: Mapping[int, np.ndarray]
    failures: list[Failure] = field(default_factory=list)

    def sizes(self) -> dict[int, tuple[np.dtype, tuple[int, ...]]]:
        """Dtype and shape of each result that shape inference can tell before anything runs, by id of the tensor."""
        proto, names = self._model(self.nodes, values=False)
        try:
            inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
        except Exception:  # onnx raises several unrelated types; without sizes the caller evaluates less
            return {}
        found = {}
        for info in (*inferred.graph.value_info, *inferred.graph.output):
            tensor = info.type.tensor_type
            if info.name not in names or not tensor.elem_type or not tensor.HasField("shape"):
                continue
            dims = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim)
            if all(size >= 0 for size in dims):
                found[names[info.name]] = (onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type), dims)
        return found

    def run(self, wanted: Sequence[gs.Tensor]) -> dict[int, np.ndarray]:
        """Evaluate and return the wanted results, by id of the tensor; what fails is in ``failures`` and left out."""
        if not wanted:
            return {}
        try:
            return self._run_together(self.nodes, wanted)
        except SlimError as error:
            if len(self.nodes) == 1:
                return self._run_alone(self.nodes[0], {}, str(error))
        found: dict[int, np.ndarray] = {}
        for node in self.nodes:
            found |= self._run_alone(node, found, None)
        ids = {id(tensor) for tensor in wanted}
        return {key: value for key, value in found.items() if key in ids}

    def _run_together(
        self, nodes: Sequence[gs.Node], wanted: Sequence[gs.Tensor], found: Mapping[int, np.ndarray] | None = None
    ) -> dict[int, np.ndarray]:
        from onnxslim.runtime import Session, detached

        proto, names = self._model(nodes, values=True, found=found)
        by_id = {key: name for name, key in names.items()}
        outputs = [by_id[id(tensor)] for tensor in wanted]
        results = Session(proto, threads=1, outputs=outputs, optimize=False).run({})
        return {names[name]: np.asarray(value) for name, value in detached(results).items() if name in outputs}

    def _run_alone(self, node: gs.Node, found: Mapping[int, np.ndarray], why: str | None) -> dict[int, np.ndarray]:
        wanted = [tensor for tensor in node.outputs if not tensor.is_empty()]
        if why is None:
            try:
                return self._run_together([node], wanted, found)
            except SlimError as error:
                why = str(error)
            except KeyError:
                why = "what it reads could not be evaluated"
        try:
            return self._run_reference(node, wanted, found)
        except Exception as error:  # the reference evaluator raises whatever NumPy does; any of it means no
            self.failures.append(Failure(node, f"{why}; {error}" if str(error) else why))
            return {}

    def _run_reference(
        self, node: gs.Node, wanted: Sequence[gs.Tensor], found: Mapping[int, np.ndarray]
    ) -> dict[int, np.ndarray]:
        proto, names = self._model([node], values=True, found=found)
        if sum(tensor.ByteSize() for tensor in proto.graph.initializer) > _REFERENCE_LIMIT:
            raise ValueError("too large for the reference evaluator")
        from onnx.reference import ReferenceEvaluator

        by_id = {key: name for name, key in names.items()}
        outputs = [by_id[id(tensor)] for tensor in wanted]
        expected = self.sizes()
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
        results = ReferenceEvaluator(proto).run(outputs, {})
        arrays = {id(tensor): np.asarray(result) for tensor, result in zip(wanted, results, strict=True)}
        for key, array in arrays.items():
            if key in expected and (array.dtype, array.shape) != expected[key]:
                raise ValueError("the reference evaluator gives another type or shape than inference")
        return arrays

    def _model(
        self, nodes: Sequence[gs.Node], *, values: bool, found: Mapping[int, np.ndarray] | None = None
    ) -> tuple[onnx.ModelProto, dict[str, int]]:
        """A model of the nodes under names of its own (names repeat between sibling bodies), and name -> id."""
        inputs = {id(tensor) for node in nodes for tensor in node.inputs}

        def write(constant: gs.Constant) -> TensorProto:
            return TensorProto(name=constant.name) if id(constant) in inputs else inline_tensor(constant)

        exported = export_graph(gs.Graph(nodes=list(nodes)), ir_version=8, opset=self.opset, write=write)
        graph = onnx.GraphProto(name="constants", node=exported.node)
        names: dict[int, str] = {}
        made = {id(tensor) for node in nodes for tensor in node.outputs}
        for node, proto in zip(nodes, graph.node, strict=True):
            for index, tensor in enumerate(node.inputs):
                if tensor.is_empty():
                    continue
                if id(tensor) not in names:
                    names[id(tensor)] = f"t{len(names)}"
                    if id(tensor) not in made:
                        graph.initializer.append(self._leaf(tensor, names[id(tensor)], found or {}, values=values))
                proto.input[index] = names[id(tensor)]
            for index, tensor in enumerate(node.outputs):
                if not tensor.is_empty():
                    proto.output[index] = names.setdefault(id(tensor), f"t{len(names)}")
        model = onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", self.opset)])
        return model, {name: key for key, name in names.items() if key in made}

    def _leaf(self, tensor: gs.Tensor, name: str, found: Mapping[int, np.ndarray], *, values: bool) -> TensorProto:
        array = found.get(id(tensor), self.values.get(id(tensor)))
        if array is None and isinstance(tensor, gs.Constant):
            if values or stored_bytes(np.dtype(tensor.dtype), tensor.shape) <= _INLINE_LIMIT:
                proto = inline_tensor(tensor)
                proto.name = name
                return proto
            return _outline(name, np.dtype(tensor.dtype), tensor.shape)
        if array is None:
            array = constant_value(tensor)
        if array is None:
            raise KeyError(name)
        if values or array.nbytes <= _INLINE_LIMIT or array.dtype.kind == "O":
            return array_to_tensor(name, array)
        return _outline(name, array.dtype, array.shape)


def _outline(name: str, dtype: np.dtype, shape: Sequence[int]) -> TensorProto:
    tensor = TensorProto(name=name, data_type=onnx.helper.np_dtype_to_tensor_dtype(dtype), dims=shape)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="left out")
    return tensor


def stored_bytes(dtype: np.dtype, shape: Sequence[int]) -> int:
    """Bytes of a tensor in a file; types of 4 bits are packed in pairs, strings are counted as 16 bytes."""
    count = math.prod(int(size) for size in shape)
    if dtype.kind == "O":
        return 16 * count
    bits = 4 if "int4" in dtype.name or "float4" in dtype.name else 8 * dtype.itemsize
    return (count * bits + 7) // 8


def is_plain(dtype: np.dtype) -> bool:
    """Whether arrays of this dtype pass between NumPy and ONNX Runtime as they are."""
    return dtype.kind in _PLAIN_KINDS
