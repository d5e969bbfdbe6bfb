"""What a model takes and gives: fix the shapes of its inputs, or cut out the part between named tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from onnx import helper

from onnxslim.errors import RecipeError
from onnxslim.graph.shapes import Shapes, infer_shapes
from onnxslim.graph.walk import drop_value_info, remove_dead_nodes
from onnxslim.model import Model
from onnxslim.suggest import unknown_name

# Below this, Cast names the type that it makes instead of giving its number.
_OLDEST_OPSET = 6

Shape = list[int | str | None]

__all__ = ["ELEMENT_TYPES", "cut", "fix_input_shapes", "parse_shapes"]

ELEMENT_TYPES = {"fp32": np.float32, "fp16": np.float16, "int32": np.int32, "int64": np.int64, "bool": np.bool_}
"""How the type of an input or output is spelt in ``name:type``."""


def parse_shapes(shapes: Mapping[str, Sequence[int]] | Iterable[str], separator: str = ":") -> dict[str, list[int]]:
    """Read shapes of inputs from a mapping, or from texts such as ``x:1,3,224,224``.

    Raises:
        RecipeError: a text is not of that form, or a size is negative.
    """
    if isinstance(shapes, str):
        shapes = [shapes]
    found: dict[str, list[int]] = {}
    if isinstance(shapes, Mapping):
        found = {name: [int(size) for size in sizes] for name, sizes in shapes.items()}
    else:
        for text in shapes:
            name, mark, sizes = text.rpartition(separator)
            try:
                found[name] = [int(size) for size in sizes.split(",") if size.strip()]
            except ValueError:
                mark = ""
            if not mark:
                raise RecipeError(f"{text}: write the shape of an input as NAME{separator}1,3,224,224.")
    for name, shape in found.items():
        if any(size < 0 for size in shape):
            raise RecipeError(
                f"{name} = {shape}: a size is negative; leave out the input whose sizes are to stay open."
            )
    return found


def fix_input_shapes(model: Model, shapes: Mapping[str, Sequence[int]]) -> None:
    """Declare other shapes for inputs, in place; the outputs' sizes follow where they can be inferred.

    What the file declares of inner tensors is dropped, as it may hold for the old shapes only.

    Raises:
        RecipeError: a name is no input, an input is no tensor, or has another number of dimensions.
    """
    inputs = {tensor.name: tensor for tensor in model.graph.inputs}
    for name, sizes in shapes.items():
        if name not in inputs:
            raise RecipeError(unknown_name("input", name, inputs))
        tensor = inputs[name]
        if tensor.dtype is None:
            raise RecipeError(f"input {name!r} is declared as no tensor, so it has no shape to fix.")
        if tensor.shape is not None and len(tensor.shape) != len(sizes):
            raise RecipeError(
                f"input {name!r} has {len(tensor.shape)} dimensions, {list(tensor.shape)}, not {len(sizes)}."
            )
        tensor.shape = list(sizes)
    drop_value_info(model)
    declared = [(tensor, tensor.shape) for tensor in _free_outputs(model)]
    for tensor, _ in declared:
        tensor.shape = None
    inferred = infer_shapes(model)
    for tensor, was in declared:
        tensor.shape = _merge(was, inferred.shape(tensor))


def _free_outputs(model: Model) -> list[gs.Variable]:
    """The outputs whose declaration is their own: tensors that a node makes."""
    return [
        tensor
        for tensor in model.graph.outputs
        if isinstance(tensor, gs.Variable) and tensor.inputs and tensor.dtype is not None
    ]


def _merge(declared: Shape | None, inferred: Shape | None) -> Shape | None:
    """Inferred sizes; the declared name where none is known. A declared number may be that of the old shape."""
    if inferred is None or declared is None or len(inferred) != len(declared):
        return inferred
    return [
        new if isinstance(new, int) else old if isinstance(old, str) else None
        for old, new in zip(declared, inferred, strict=True)
    ]


# --------------------------------------------------------------------------------------------------------- cutting


@dataclass(frozen=True)
class _End:
    """A tensor to cut at, the type that it has if that is known, and the one that it is to have outside."""

    tensor: gs.Tensor
    dtype: np.dtype | None
    wanted: np.dtype | None


def cut(model: Model, inputs: Sequence[str] | None = None, outputs: Sequence[str] | None = None) -> None:
    """Keep, in place, the part of the main graph that computes ``outputs`` from ``inputs``.

    Args:
        model: is changed.
        inputs: tensors that become the inputs, each as ``name`` or ``name:type``; None for the inputs that the outputs
            depend on. A type other than that of the tensor is converted by a Cast behind the input.
        outputs: tensors that become the outputs, spelt the same; None for the present ones. A type other than that of
            the tensor is converted by a Cast in front of the output.

    Raises:
        RecipeError: a name is no tensor of the main graph, a type is unknown, an output depends on an input that is
            left out, or no output depends on an input that is named.
    """
    graph = model.graph
    types = infer_shapes(model)
    tensors = _tensors(graph)
    ends = _ends(outputs, tensors, types), _ends(inputs, tensors, types)
    if ends[0]:
        graph.outputs = [_make_output(model, end, types) for end in ends[0]]
    if ends[1]:
        given = {id(end.tensor) for end in ends[1]}
        left_out = [tensor for tensor in graph.inputs if id(tensor) not in given]
        graph.inputs = [_make_input(model, end, types) for end in ends[1]]
        remove_dead_nodes(model)
        used = _read(model)
        needed = next((tensor.name for tensor in left_out if id(tensor) in used), None)
        if needed is not None:
            raise RecipeError(f"what is left still depends on input {needed!r}; add it to the inputs.")
        unread = next((tensor.name for tensor in graph.inputs if id(tensor) not in used), None)
        if unread is not None:
            raise RecipeError(f"no output depends on {unread!r}; leave it out of the inputs.")
    elif ends[0]:
        remove_dead_nodes(model)
        used = _read(model)
        graph.inputs = [tensor for tensor in graph.inputs if id(tensor) in used]


def _tensors(graph: gs.Graph) -> dict[str, gs.Tensor]:
    """The tensors of a main graph by name: inputs, initializers and what nodes make."""
    found = {tensor.name: tensor for tensor in (*graph.inputs, *graph.__dict__.get("initializers", ()))}
    for node in graph.nodes:
        found |= {tensor.name: tensor for tensor in node.outputs if not tensor.is_empty()}
    return found


def _ends(texts: Sequence[str] | None, tensors: Mapping[str, gs.Tensor], types: Shapes) -> list[_End]:
    if isinstance(texts, str):
        texts = [texts]
    found: list[_End] = []
    for text in texts or ():
        name, mark, kind = (text, "", "") if text in tensors else text.rpartition(":")  # "x:0" may be a whole name
        name = name if mark else text
        if name not in tensors:
            raise RecipeError(unknown_name("tensor of the main graph", name, tensors))
        if mark and kind not in ELEMENT_TYPES:
            raise RecipeError(f"{text}: {unknown_name('type', kind, ELEMENT_TYPES)}")
        tensor = tensors[name]
        if any(tensor is end.tensor for end in found):
            raise RecipeError(f"{name!r} is named twice.")
        dtype = types.dtype(tensor)
        wanted = np.dtype(ELEMENT_TYPES[kind]) if mark else dtype
        if wanted is None and "info" not in tensor.__dict__:
            raise RecipeError(f"the type of {name!r} is not known; write it as {name}:fp32.")
        found.append(_End(tensor, dtype, wanted))
    return found


def _read(model: Model) -> set[int]:
    """The ids of the tensors that any node reads or any graph returns."""
    return {
        id(tensor)
        for graph in model.graphs()
        for tensor in (*graph.outputs, *(tensor for node in graph.nodes for tensor in node.inputs))
    }


def _make_output(model: Model, end: _End, types: Shapes) -> gs.Tensor:
    tensor, name = end.tensor, end.tensor.name
    if isinstance(tensor, gs.Variable) and tensor.dtype is None and end.wanted is not None:
        tensor.dtype, tensor.shape = end.dtype or end.wanted, types.shape(tensor)
    if end.dtype is None or end.dtype == end.wanted:
        return tensor
    if any(tensor is known for known in model.graph.inputs):
        raise RecipeError(f"output {name!r} is an input too, so it cannot be given another type.")
    tensor.name = model.fresh_name(f"{name}_{end.dtype}")
    output = gs.Variable(name, end.wanted, types.shape(tensor))
    model.graph.nodes.append(_cast(model, tensor, output))
    return output


def _make_input(model: Model, end: _End, types: Shapes) -> gs.Variable:
    tensor, graph = end.tensor, model.graph
    shape = types.shape(tensor)
    if isinstance(tensor, gs.Constant):
        graph.initializers = [constant for constant in graph.initializers if constant is not tensor]
        tensor.to_variable(end.dtype, shape)
    tensor.__dict__.pop("default", None)
    for node in list(tensor.inputs):  # what made it goes on making something, that nobody reads
        node.outputs[[output is tensor for output in node.outputs].index(True)] = gs.Variable(
            model.fresh_name(f"{tensor.name}_before_the_cut")
        )
    if tensor.dtype is None and end.wanted is not None:
        tensor.dtype, tensor.shape = end.dtype or end.wanted, shape
    if end.dtype is None or end.dtype == end.wanted:
        return tensor
    outside = gs.Variable(tensor.name, end.wanted, shape)
    tensor.name = model.fresh_name(f"{tensor.name}_{end.dtype}")
    graph.nodes.insert(0, _cast(model, outside, tensor))
    return outside


def _cast(model: Model, source: gs.Tensor, target: gs.Tensor) -> gs.Node:
    if model.opset < _OLDEST_OPSET:
        raise RecipeError(
            f"{target.name!r}: the model's opset is {model.opset}, and types can be converted from {_OLDEST_OPSET} on."
        )
    code = helper.np_dtype_to_tensor_dtype(np.dtype(target.dtype))
    return gs.Node("Cast", model.fresh_name(f"{target.name}_cast"), {"to": code}, [source], [target])
