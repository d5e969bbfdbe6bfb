"""Graphs that grow at random, node by node, and run.

Each new node is run alone in ONNX Runtime, on the values that it gets under every feed of the graph, so that only what
runs at every size of the dynamic axes is kept. The values also say how large the numbers on the way are, which is what
rounding errors go by.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

Array = np.ndarray

# Larger numbers lose so many digits to rounding that a wrong result would pass for a right one.
_LARGEST = {"float16": 1e2, "float32": 1e4, "float64": 1e4}
_EDGES = (0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 3.0, -3.0, 6.0, 1e-3, 50.0, -50.0)
_INTEGER_EDGES = (0, 1, -1, 2, 127, -128, 255, 2**31 - 1, -(2**31))
_NOT_NUMBERS = (np.nan, np.inf, -np.inf, -0.0, 1.0, -2.0)


class RejectedError(Exception):
    """A node that was drawn does not fit what is there, or does not run."""


@dataclass(frozen=True)
class Value:
    """A tensor of the graph.

    Attributes:
        name: of the tensor.
        arrays: what it holds under each feed.
        exact: no legal rewrite changes its bits; rounding may differ otherwise, and nothing that jumps may read it.
        constant: it is the same whatever is fed.
    """

    name: str
    arrays: tuple[Array, ...]
    exact: bool = True
    constant: bool = False

    @property
    def dtype(self) -> np.dtype:
        return self.arrays[0].dtype

    @property
    def kind(self) -> str:
        return self.dtype.kind

    @property
    def rank(self) -> int:
        return self.arrays[0].ndim

    def size(self, axis: int) -> int | None:
        """The size of an axis; None where it depends on the feed, or there is no such axis."""
        if not -self.rank <= axis < self.rank:
            return None
        sizes = {array.shape[axis] for array in self.arrays}
        return sizes.pop() if len(sizes) == 1 else None


@dataclass
class Graph:
    """A model with feeds for it.

    Attributes:
        model: runs on every feed.
        feeds: input name -> array, for each feed.
        largest: the largest number on the way to the outputs, for each feed.
        exact: for each output, whether it must come out with the same bits.
        strange: which feeds hold NaN and infinities; only exact outputs can be compared on those.
    """

    model: onnx.ModelProto
    feeds: list[dict[str, Array]]
    largest: list[float]
    exact: list[bool]
    strange: list[bool]


@dataclass
class Builder:
    """A graph under construction, or a body in one (which has a ``parent`` whose values it may read)."""

    rng: random.Random
    opset: int
    ir_version: int
    strange: list[bool]
    parent: Builder | None = None
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    functions: list[onnx.FunctionProto] = field(default_factory=list)
    feeds: list[dict[str, Array]] = field(default_factory=list)
    named: int = 0

    # ------------------------------------------------------------------------------------------------------- draws

    def number(self, low: int, high: int) -> int:
        return self.root.rng.randint(low, high)

    def choose(self, options: Sequence[Any]) -> Any:
        return options[self.number(0, len(options) - 1)]

    def shuffled(self, count: int) -> list[int]:
        """The numbers below ``count`` in some order."""
        return self.root.rng.sample(range(count), count)

    def chance(self, one_in: int = 2) -> bool:
        return self.number(0, one_in - 1) == one_in - 1

    def random(self, shape: Sequence[int], dtype: Any = np.float32) -> Array:
        """Random numbers of moderate size; sometimes those that a rewrite may take for neutral."""
        dtype = np.dtype(dtype)
        rng = np.random.default_rng(self.number(0, 30))
        if dtype.kind == "b":
            return rng.integers(0, 2, shape).astype(bool)
        if dtype.kind in "iu":
            return rng.integers(0 if dtype.kind == "u" else -4, 5, shape).astype(dtype)
        return np.asarray(rng.standard_normal(shape)).astype(dtype)

    # ------------------------------------------------------------------------------------------------------ values

    def visible(self) -> list[Value]:
        return [*(self.parent.visible() if self.parent else []), *self.values]

    def pick(self, kinds: str = "f", where: Callable[[Value], bool] = lambda value: True) -> Value:
        """Choose a tensor, rather a recent one, of some kinds of dtype (as numpy's ``dtype.kind``)."""
        found = [value for value in reversed(self.visible()) if value.kind in kinds and where(value)]
        if not found:
            raise RejectedError
        return found[self.number(0, min(len(found), 6) - 1)]

    def name(self, hint: str = "v") -> str:
        self.named += 1
        prefix = f"b{self.depth}_" if self.depth else ""
        return f"{prefix}{hint}{self.named}"  # siblings repeat names, which is legal

    @property
    def depth(self) -> int:
        return 0 if self.parent is None else self.parent.depth + 1

    @property
    def root(self) -> Builder:
        return self if self.parent is None else self.parent.root

    def constant(self, array: Any, dtype: Any = None) -> Value:
        """Put a constant into the file: shared, an initializer, a Constant node, a computed one or a default."""
        array = np.array(array, dtype)
        same = [value for value in self.visible() if value.constant and _same(value.arrays[0], array)]
        if same and self.chance():
            return same[0]
        form = self.number(0, 7)
        if form == 7 and array.dtype.kind == "f" and array.dtype != np.float16:
            other = np.float64 if array.dtype == np.float32 else np.float32
            if np.array_equal(array.astype(other).astype(array.dtype), array):
                source = self.constant(array.astype(other))
                return self.add("Cast", [source], to=helper.np_dtype_to_tensor_dtype(array.dtype))[0]
        if form == 6 and self.parent is None and self.ir_version >= 4 and array.dtype.kind == "f":
            return self._default(array)
        value = Value(self.name("c"), (array,) * len(self.strange), constant=True)
        writable = array.dtype.kind == "f" or self.opset >= 9  # what a Constant node may hold
        if (form < 3 or not writable) and (self.parent is None or self.ir_version >= 4):
            self.initializers.append(numpy_helper.from_array(array, value.name))
        elif not writable:
            raise RejectedError
        else:
            tensor = numpy_helper.from_array(array, value.name)
            self.nodes.append(helper.make_node("Constant", [], [value.name], value=tensor))
        self.values.append(value)
        return value

    def _default(self, array: Array) -> Value:
        """An initializer that is a graph input too: some feeds hold another value for it."""
        name = self.name("d")
        self.initializers.append(numpy_helper.from_array(array, name))
        self.inputs.append(
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        )
        arrays = [np.asarray(array * (1 + index % 2)) for index in range(len(self.strange))]
        for index in range(1, len(self.strange), 2):
            self.feeds[index][name] = arrays[index]
        self.values.append(Value(name, tuple(arrays)))
        return self.values[-1]

    # ------------------------------------------------------------------------------------------------------- nodes

    def add(
        self,
        op: str,
        inputs: Sequence[Value | None],
        outputs: int = 1,
        *,
        exact: bool = True,
        domain: str = "",
        **attributes: Any,
    ) -> list[Value]:
        """Add a node, whose results are exact if all that it reads is.

        Raises:
            RejectedError: it does not run under some feed, or gives numbers that are too large to compare.
        """
        names = ["" if value is None else value.name for value in inputs]
        made = [self.name() for _ in range(outputs)]
        label = self.choose(["", made[0]])
        node = helper.make_node(op, names, made, label, domain=domain, **attributes)
        return self.add_together([node], made, exact=exact)

    def add_together(self, nodes: Sequence[onnx.NodeProto], made: Sequence[str], *, exact: bool = True) -> list[Value]:
        """Add nodes that only make sense together, as when one passes a sequence on; ``made`` are their tensors.

        Raises:
            RejectedError: as for :meth:`add`.
        """
        names = {name for node in nodes for name in (*node.input, *_captured(node))}
        reads = [value for value in self.visible() if value.name in names]
        arrays = _run_alone(nodes, reads, self, made)
        for results in arrays:
            self._check(results)
        sound = exact and all(value.exact for value in reads)
        constant = all(value.constant for value in reads)
        results = [
            Value(name, tuple(each), sound or each[0].dtype.kind != "f", constant)
            for name, each in zip(made, arrays, strict=True)
        ]
        self.nodes += nodes
        self.values += results
        return results

    def _check(self, arrays: Sequence[Array]) -> None:
        for array, strange in zip(arrays, self.strange, strict=True):
            if array.size > 4000 or array.ndim != arrays[0].ndim:
                raise RejectedError
            if not strange and array.dtype.kind == "f":
                largest = float(np.abs(array).max(initial=0.0))
                if not largest < _LARGEST[array.dtype.name]:
                    raise RejectedError

    # ------------------------------------------------------------------------------------------------------ inputs

    def input(self, dtype: Any, dims: Sequence[int | str], sizes: Sequence[dict[str, int]]) -> Value:
        """Add a graph input with values for every feed."""
        name = self.name("x")
        code = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self.inputs.append(helper.make_tensor_value_info(name, code, list(dims)))
        rng = np.random.default_rng(self.number(0, 9))
        arrays = []
        for index, chosen in enumerate(sizes):
            shape = [chosen[dim] if isinstance(dim, str) else dim for dim in dims]
            arrays.append(_fed(shape, np.dtype(dtype), index, self.strange[index], rng))
            self.feeds[index][name] = arrays[-1]
        self.values.append(Value(name, tuple(arrays)))
        return self.values[-1]

    def to_graph(self, outputs: Sequence[Value], name: str = "g") -> onnx.GraphProto:
        """Close the graph with some of its values as outputs, declared with their ranks alone."""
        declared = [
            helper.make_tensor_value_info(value.name, helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.rank)
            for value in outputs
        ]
        return helper.make_graph(self.nodes, name, self.inputs, declared, self.initializers)


def _same(first: Array, second: Array) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes()


def _fed(shape: Sequence[int], dtype: np.dtype, index: int, strange: bool, rng: np.random.Generator) -> Array:
    if dtype.kind == "b":
        return np.asarray(rng.integers(0, 2, shape)).astype(bool)
    if dtype.kind in "iu":
        if index != 1:
            return np.asarray(rng.integers(0 if dtype.kind == "u" else -5, 6, shape)).astype(dtype)
        return np.asarray(rng.choice(np.array(_INTEGER_EDGES), shape)).astype(dtype)
    if strange:
        return np.asarray(rng.choice(np.array(_NOT_NUMBERS), shape)).astype(dtype)
    if index == 1:
        return np.asarray(rng.choice(np.array(_EDGES), shape)).astype(dtype)
    return np.asarray(rng.standard_normal(shape) * (30.0 if index == 2 else 1.0)).astype(dtype)


# ------------------------------------------------------------------------------------------------------------- running


def _captured(node: onnx.NodeProto) -> set[str]:
    """Names that the bodies of a node read and do not define."""
    names: set[str] = set()
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            body = attribute.g
            inner = {tensor.name for tensor in (*body.input, *body.initializer)}
            inner |= {name for each in body.node for name in each.output}
            read = {name for each in body.node for name in (*each.input, *_captured(each))}
            names |= (read | {tensor.name for tensor in body.output}) - inner
    return names


def _run_alone(
    nodes: Sequence[onnx.NodeProto], reads: Sequence[Value], builder: Builder, made: Sequence[str]
) -> list[list[Array]]:
    """What nodes give under each feed: for each of its outputs, one array a feed."""
    inputs = [
        helper.make_tensor_value_info(value.name, helper.np_dtype_to_tensor_dtype(value.dtype), None) for value in reads
    ]
    graph = helper.make_graph(list(nodes), "one", inputs, [onnx.ValueInfoProto(name=name) for name in made])
    model = to_model(graph, builder.opset, max(builder.ir_version, 4), builder.root.functions)
    try:
        session = session_of(model)
        results = [
            session.run(None, {value.name: value.arrays[index] for value in reads})
            for index in range(len(builder.strange))
        ]
    except Exception as error:  # ONNX Runtime's exceptions share no base of their own
        raise RejectedError(str(error)) from None
    if not all(isinstance(value, np.ndarray) for row in results for value in row):
        raise RejectedError
    return [list(column) for column in zip(*results, strict=True)]


def to_model(
    graph: onnx.GraphProto, opset: int, ir_version: int, functions: Sequence[onnx.FunctionProto] = ()
) -> onnx.ModelProto:
    imports = [helper.make_opsetid("", opset)]
    if functions:
        imports.append(helper.make_opsetid("local", 1))
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version, functions=list(functions))


def session_of(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@functools.cache
def opsets() -> tuple[int, ...]:
    """Version 7 and all later ones that the installed ONNX Runtime supports officially."""
    return tuple(_loadable())


def _loadable() -> Iterator[int]:
    for version in range(7, onnx.defs.onnx_opset_version() + 1):
        tensor = helper.make_tensor_value_info("x", 1, [2])
        end = helper.make_tensor_value_info("y", 1, [2])
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [tensor], [end])
        try:
            session_of(to_model(graph, version, 8))
        except Exception:  # ONNX Runtime's exceptions share no base of their own
            return
        yield version
