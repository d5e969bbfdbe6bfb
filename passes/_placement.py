"""Where int8 goes: which nodes and tensors carry codes, such that ONNX Runtime's CPU kernels fuse all of them.

Rules (u8 activations, s8 weights):

1. Anchors are Conv, Gemm and MatMul with a constant float32 weight. Their input is quantized. A Conv always has its
   output quantized (there is no kernel otherwise); Gemm and MatMul only where an int8 node reads it, or where a Relu
   or Clip that gives no output of the model is all that does: ONNX Runtime takes that for a part of them.
2. A chain ``y = clip(a * x + b, lo, hi)`` with ``a > 0`` (Relu, Clip, HardSigmoid, Add, Sub, Mul and Div with a scalar)
   costs nothing: quantizing saturates, and the codes that ``x`` is written with are read with another scale and zero.
   Where something else reads ``x`` as well, its codes are clipped.
3. Data movement (Reshape, Transpose, MaxPool, Pad, nearest Resize, …) hands the codes of its input on.
4. Add, Mul, Concat, pooling, Sigmoid, LeakyRelu run on codes when all of their inputs have them and an int8 node reads
   the result; what would be an island between float nodes stays float. The gate of a squeeze-and-excite block, small
   beside what it scales, is quantized for it.

Everything else (Softmax, LayerNorm, Gelu, Erf, masks, integers) stays float.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim.graph.shapes import Shapes
from onnxslim.graph.walk import constant_value, nested_graphs

__all__ = [
    "CLAMPS",
    "Anchor",
    "Chain",
    "Placement",
    "Propagator",
    "anchor_obstacle",
    "matches",
    "scalar",
    "weight_axis",
]

ANCHORS = ("Conv", "Gemm", "MatMul")
CLAMPS = ("Relu", "Clip")
_SAME = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Expand", "Split", "MaxPool", "Resize")
_HANDED_ON = (*_SAME, "Identity", "Gather", "GatherElements", "Tile", "ReduceMax", "ReduceMin")
_MOVED = ("Pad", "DepthToSpace", "SpaceToDepth")  # not among those that ONNX Runtime turns: written on codes directly
_ARITHMETIC = ("Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid")
_REDUCING = ("AveragePool", "GlobalAveragePool", "MaxPool")
_SIDE_SHARE = 8  # an operand at most this many times smaller than the result may be quantized for it

Kind = Literal["same", "moved", "arithmetic"]
Mapped = Callable[[NDArray[np.float64]], NDArray[np.float64]]


@dataclass
class Anchor:
    """A Conv, Gemm or MatMul whose weight becomes int8.

    Attributes:
        name: of its output before anything was rewritten; identifies the node.
        axis: of the output channels in the weight; None: one scale for all of it.
        rank: of the weight, and for a Conv of the output.
    """

    name: str
    node: gs.Node
    axis: int | None
    rank: int


@dataclass
class Chain:
    """Nodes in a row that compute ``clip(a * source + b, low, high)``."""

    nodes: list[gs.Node]
    source: gs.Tensor
    output: gs.Tensor
    a: float = 1.0
    b: float = 0.0
    low: float = -math.inf
    high: float = math.inf

    def then(self, node: gs.Node, output: gs.Tensor, a: float, b: float, low: float, high: float) -> Chain:
        """This chain with one more node, which computes ``clip(a * y + b, low, high)``."""
        ends = [min(max(a * end + b, low), high) for end in (self.low, self.high)]
        return Chain([*self.nodes, node], self.source, output, a * self.a, a * self.b + b, ends[0], ends[1])

    def of(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """What the nodes make of elements of the source."""
        return np.clip(self.a * values + self.b, self.low, self.high)

    @property
    def representable(self) -> bool:
        """Whether one code range can hold 0, the image of 0, and clip: zero points are integers of the code."""
        return self.low <= min(0.0, self.b) and self.high >= max(0.0, self.b) and self.low < self.high


@dataclass
class Propagator:
    """A node without weights that may run on codes."""

    node: gs.Node
    kind: Kind


@dataclass
class Placement:
    """The solved placement; tensors are named, as the plan outlives the graph.

    Attributes:
        anchors: by output name.
        carries: whether codes are carried from layer to layer, or only made for what layers read.
        chains: by output name, those that run on codes.
        propagators: by name of the first output, those that run on codes.
        carried: tensors whose producer writes codes: every reader gets the dequantized value.
        fed: tensors of float producers that are quantized for their int8 readers only.
        absorbed: raw outputs that only a chain reads: the chain's codes are written in their place.
        unfusable: products, by output name, that stay float for what clips their result.
    """

    graph: gs.Graph
    shapes: Shapes
    elements: dict[str, int]
    banned: set[str]
    anchors: dict[str, Anchor]
    exclude: tuple[str, ...] = ()
    carries: bool = True
    chains: dict[str, Chain] = field(default_factory=dict)
    propagators: dict[str, Propagator] = field(default_factory=dict)
    carried: set[str] = field(default_factory=set)
    fed: set[str] = field(default_factory=set)
    absorbed: set[str] = field(default_factory=set)
    unfusable: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._outputs = {id(tensor) for tensor in self.graph.outputs}
        self._dropped: set[str] = set()
        self._solve()

    @property
    def reached(self) -> set[str]:
        """All tensors whose values decide about codes: those that have one, and those inside chains."""
        inside = {node.outputs[0].name for chain in self.chains.values() for node in chain.nodes}
        return self.carried | self.fed | self.absorbed | inside

    def made_from(self) -> Iterator[tuple[str, str, Mapped]]:
        """Carried tensors that hold no more than what others do, element by element, in the order of the graph.

        Yields the tensor, the other one, and what makes the one of the other: a function that never falls.
        """
        for node in self.graph.nodes:
            name = node.outputs[0].name if node.outputs else ""
            chain = self.chains.get(name)
            if chain is not None and chain.source.name not in self.absorbed:
                yield name, chain.source.name, chain.of
            elif name in self.propagators:
                function = _rising(node) if self.propagators[name].kind == "arithmetic" else np.asarray
                if function is not None:
                    yield from ((tensor.name, node.inputs[0].name, function) for tensor in node.outputs if tensor.name)

    # ---------------------------------------------------------------------------------------------------- candidates

    def _solve(self) -> None:
        self._inside = self._read_in_bodies()
        self.banned = self.banned | self._stuck()
        chains = self._find_chains()
        in_chain = {id(node) for chain in chains.values() for node in chain.nodes}
        self.anchors = {name: anchor for name, anchor in self.anchors.items() if not self._hopeless(anchor)}
        self.unfusable = {name for name, anchor in self.anchors.items() if self._unfusable(anchor.node, in_chain)}
        self.anchors = {name: anchor for name, anchor in self.anchors.items() if name not in self.unfusable}
        propagators = {}
        for node in self.graph.nodes:
            kind = None if id(node) in in_chain else self._kind(node)
            if kind:
                propagators[node.outputs[0].name] = Propagator(node, kind)
        while True:
            self._forward(chains, propagators)
            unwanted = self._unwanted()
            if not unwanted:
                break
            self._dropped |= unwanted
        self.absorbed = {chain.source.name for chain in self.chains.values() if self._absorbable(chain) is not None}
        self.carried -= self.absorbed

    def _read_in_bodies(self) -> dict[str, gs.Tensor]:
        """The tensors of this graph that bodies of its nodes read."""
        own = {id(tensor) for node in self.graph.nodes for tensor in node.outputs if tensor.name}
        inside: dict[str, gs.Tensor] = {}
        for body in nested_graphs(self.graph):
            if body is not self.graph:
                read = (*body.outputs, *(tensor for node in body.nodes for tensor in node.inputs))
                inside |= {tensor.name: tensor for tensor in read if id(tensor) in own}
        return inside

    def _stuck(self) -> set[str]:
        """The tensors that must not be dequantized, as a body reads them moved by what cannot move codes.

        ONNX Runtime hands a DequantizeLinear on through such nodes to whatever reads them, and aborts the process where
        that is a body. Behind one that moves codes a DequantizeLinear stands already.
        """
        stuck: set[str] = set()
        for tensor in self._inside.values():
            blocked = False
            while tensor.inputs and (node := tensor.inputs[0]).op in _HANDED_ON and node.inputs:
                blocked = blocked or self._kind(node) is None
                tensor = node.inputs[0]
            if blocked:
                stuck.add(tensor.name)
        return stuck

    def _hopeless(self, anchor: Anchor) -> bool:
        data, raw = anchor.node.inputs[0], anchor.node.outputs[0]
        return data.name in self.banned or (self.carries and self._needs_codes(anchor.node) and raw.name in self.banned)

    def _unfusable(self, node: gs.Node, in_chain: set[int]) -> bool:
        """Whether what clips a product cannot be written as codes, given the nodes, by id, that may become so."""
        if not self.carries or node.op == "Conv" or not self._needs_codes(node):
            return False
        (raw,) = node.outputs
        return id(raw) in self._outputs or id(raw.outputs[0]) not in in_chain

    def _needs_codes(self, node: gs.Node) -> bool:
        """Whether a layer is computed in int8 only if its result, or what follows it, is quantized."""
        if node.op == "Conv":
            return True
        users = node.outputs[0].outputs
        clamp = node.op in ANCHORS and len(users) == 1 and users[0].op in CLAMPS
        return clamp and id(users[0].outputs[0]) not in self._outputs

    def _is_float(self, tensor: gs.Tensor) -> bool:
        return self.shapes.dtype(tensor) == np.float32

    def _kind(self, node: gs.Node) -> Kind | None:
        if node.domain or not node.outputs or not node.inputs or matches(node, self.exclude):
            return None
        if not self._is_float(node.inputs[0]):
            return None
        operands = node.inputs if node.op in _ARITHMETIC else node.inputs[:1]
        if any(tensor.name in self.banned for tensor in (*operands, *node.outputs) if tensor.name):
            return None
        if node.op in _SAME:
            if node.op == "MaxPool" and len(node.outputs) > 1:
                return None
            if node.op == "Resize" and node.attrs.get("mode", "nearest") != "nearest":
                return None  # on codes, interpolation rounds down
            return "same"
        if node.op in _MOVED:
            return "moved" if node.op != "Pad" or _pads_with_zero(node) else None
        if node.op in _ARITHMETIC:
            if any(isinstance(tensor, gs.Constant) or constant_value(tensor) is not None for tensor in node.inputs):
                return None
            if node.op == "AveragePool" and (node.attrs.get("ceil_mode") or node.attrs.get("dilations")):
                return None
            return "arithmetic"
        return None

    def _find_chains(self) -> dict[str, Chain]:
        chains: dict[str, Chain] = {}
        for node in self.graph.nodes:
            step = None if matches(node, self.exclude) else _affine(node)
            if step is None:
                continue
            source_index, coefficients = step
            source, output = node.inputs[source_index], node.outputs[0]
            if not self._is_float(source) or output.name in self.banned:
                continue
            shape = self.shapes.shape(source)
            if len(node.inputs) == 2 and (shape is None or len(node.inputs[1 - source_index].shape or ()) > len(shape)):
                continue  # a scalar of more axes than its partner adds axes
            before = chains.get(source.name)
            if before is not None and self._read_once(source):
                longer = before.then(node, output, *coefficients)
                if longer.representable:
                    del chains[source.name]
                    chains[output.name] = longer
                    continue
            chain = Chain([], source, source).then(node, output, *coefficients)
            if chain.representable:
                chains[output.name] = chain
        return chains

    def _read_once(self, tensor: gs.Tensor) -> bool:
        return len(tensor.outputs) == 1 and id(tensor) not in self._outputs

    # ------------------------------------------------------------------------------------------------------- solving

    def _forward(self, chains: dict[str, Chain], propagators: dict[str, Propagator]) -> None:
        """Carry codes from the anchors on, as far as the candidates go that were not dropped."""
        self.chains, self.propagators = {}, {}
        self.carried = set()
        self.fed = {anchor.node.inputs[0].name for anchor in self.anchors.values()}
        for node in self.graph.nodes:
            if not node.outputs:
                continue
            name = node.outputs[0].name
            if name in self._dropped or not self.carries:
                continue
            if name in self.anchors:
                if name not in self.banned:
                    self.carried.add(name)
            elif name in chains:
                if chains[name].source.name in self.carried and chains[name].nodes[-1] is node:
                    self.chains[name] = chains[name]
                    self.carried.add(name)
            elif name in propagators:
                kind = propagators[name].kind
                sides = self._operands(node, kind)
                if sides is not None:
                    self.propagators[name] = propagators[name]
                    self.carried.update(tensor.name for tensor in node.outputs if tensor.name)
                    self.fed.update(sides)
        self.fed -= self.carried

    def _operands(self, node: gs.Node, kind: Kind) -> list[str] | None:
        """The operands that would have to be quantized for this node; None when it should not run on codes."""
        if kind != "arithmetic":
            return [] if node.inputs[0].name in self.carried else None
        names = [tensor.name for tensor in node.inputs]
        missing = [name for name in names if name not in self.carried and name not in self.fed]
        if len(missing) == len(names) or not any(name in self.carried for name in names):
            return None
        size = self.elements.get(node.outputs[0].name, 0)
        small = all(0 < self.elements.get(name, 0) * _SIDE_SHARE <= size for name in missing)
        return missing if small else None

    def _unwanted(self) -> set[str]:
        """The first outputs of kept nodes that no int8 node reads."""
        wanted = {anchor.node.inputs[0].name for anchor in self.anchors.values()}
        wanted |= {chain.source.name for chain in self.chains.values()} | self._inside.keys()
        for propagator in self.propagators.values():
            readers = propagator.node.inputs if propagator.kind == "arithmetic" else propagator.node.inputs[:1]
            wanted |= {tensor.name for tensor in readers}
        unwanted = set()
        for name, chain in self.chains.items():
            free = self._absorbable(chain)
            if name not in wanted and not (free is not None and self._needs_codes(free)):
                unwanted.add(name)
        for name, propagator in self.propagators.items():
            outputs = {tensor.name for tensor in propagator.node.outputs}
            if not outputs & wanted and not self._reduces(propagator.node):
                unwanted.add(name)
        for name, anchor in self.anchors.items():
            if anchor.node.op != "Conv" and name in self.carried and name not in wanted:
                unwanted.add(name)
        return unwanted

    def _absorbable(self, chain: Chain) -> gs.Node | None:
        """The producer that can write the codes of a chain itself, if there is one."""
        source = chain.source
        if len(source.outputs) != 1 or id(source) in self._outputs or len(source.inputs) != 1:
            return None
        producer = source.inputs[0]
        if source.name in self.anchors:
            return producer
        propagator = self.propagators.get(source.name)
        return producer if propagator is not None and propagator.kind == "arithmetic" else None

    def only_gated(self, chain: Chain) -> bool:
        """Whether the source of a chain is read by that and multiplied by its result, and by nothing else."""
        source, output = chain.source, chain.output
        if len(source.outputs) != 2 or id(source) in self._outputs or source.name in self._inside:
            return False
        (product,) = (node for node in source.outputs if node is not chain.nodes[0])
        return product.op == "Mul" and {id(tensor) for tensor in product.inputs} == {id(source), id(output)}

    def _reduces(self, node: gs.Node) -> bool:
        before = self.elements.get(node.inputs[0].name, 0)
        return node.op in _REDUCING and self.elements.get(node.outputs[0].name, 0) * 2 <= before


def _rising(node: gs.Node) -> Mapped | None:
    """What a node makes of each element, where that rises with it; None where it is not of one element."""
    if node.op == "Sigmoid":
        return lambda values: 1.0 / (1.0 + np.exp(-values))
    if node.op == "LeakyRelu" and 0.0 <= (slope := float(node.attrs.get("alpha", 0.01))) <= 1.0:
        return lambda values: np.maximum(values, slope * values)
    return None


def matches(node: gs.Node, patterns: Iterable[str]) -> bool:
    """Whether the node's name, op or first output fits one of the shell patterns."""
    names = (node.name, node.op, node.outputs[0].name if node.outputs else "")
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns for name in names)


def anchor_obstacle(node: gs.Node, shapes: Shapes) -> str | None:
    """Why the weight of a Conv, Gemm or MatMul cannot be quantized together with its input; None when it can."""
    data, weight = node.inputs[0], node.inputs[1]
    if any(tensor.inputs and tensor.inputs[0].op == "DequantizeLinear" for tensor in node.inputs):
        return "it is quantized already"
    if not isinstance(weight, gs.Constant):
        return "both of its operands are computed" if node.op == "MatMul" else "its weight is not constant"
    if np.dtype(weight.dtype) != np.float32 or shapes.dtype(data) not in (None, np.dtype(np.float32)):
        return "it is not float32"
    if isinstance(data, gs.Constant):
        return "its input is constant"
    if node.op == "MatMul" and len(weight.shape) != 2:
        return "its weight is not a matrix"
    if node.op == "Gemm" and (node.attrs.get("transA", 0) or len(weight.shape) != 2):
        return "its input is transposed"
    if 0 in weight.shape:
        return "its weight is empty"
    if len(node.inputs) > 2 and not node.inputs[2].is_empty():
        bias = node.inputs[2]
        outputs = weight.shape[weight_axis(node)]
        if not isinstance(bias, gs.Constant):
            return "its bias is not constant"
        if int(np.prod(bias.shape)) not in (1, outputs) or (len(bias.shape) > 1 and bias.shape[-1] == 1 != outputs):
            return "its bias is not one number an output channel"
    return None


def weight_axis(node: gs.Node) -> int:
    """The axis of the output channels in the weight of a Conv, Gemm or MatMul."""
    return 0 if node.op == "Conv" or node.attrs.get("transB", 0) else 1


def scalar(tensor: gs.Tensor) -> float | None:
    """The value of a constant float of one element."""
    value = constant_value(tensor)
    if value is None or value.size != 1 or value.dtype != np.float32:
        return None
    return float(value.reshape(-1)[0])


def _affine(node: gs.Node) -> tuple[int, tuple[float, float, float, float]] | None:
    """Which input a node maps by ``clip(a * x + b, low, high)``, and the four numbers; None when it does not."""
    free = (-math.inf, math.inf)
    if node.domain or not node.outputs:
        return None
    if node.op == "Relu":
        return 0, (1.0, 0.0, 0.0, math.inf)
    if node.op == "HardSigmoid":
        return 0, (float(node.attrs.get("alpha", 0.2)), float(node.attrs.get("beta", 0.5)), 0.0, 1.0)
    if node.op == "Clip":
        bounds = [
            free[index] if len(node.inputs) <= index + 1 or node.inputs[index + 1].is_empty() else scalar(tensor)
            for index, tensor in enumerate([*node.inputs[1:], None, None][:2])
        ]
        if "min" in node.attrs or "max" in node.attrs or any(bound is None for bound in bounds):
            return None
        low, high = (float(bound) for bound in bounds if bound is not None)
        return (0, (1.0, 0.0, low, high)) if low < high else None
    if node.op not in ("Add", "Sub", "Mul", "Div") or len(node.inputs) != 2:
        return None
    values = [scalar(tensor) for tensor in node.inputs]
    index = 1 if values[0] is not None else 0
    value = values[1 - index]
    if value is None or values[index] is not None or (node.op in ("Sub", "Div") and index == 1):
        return None
    if not math.isfinite(value) or (node.op in ("Mul", "Div") and value <= 0):
        return None
    step = {"Add": (1.0, value), "Sub": (1.0, -value), "Mul": (value, 0.0), "Div": (1.0 / value if value else 0, 0.0)}
    return index, (*step[node.op], *free)


def _pads_with_zero(node: gs.Node) -> bool:
    if len(node.inputs) > 3 and not node.inputs[3].is_empty():
        return False  # axes: the fourth input comes after the padding value, which is rewritten
    if node.attrs.get("mode", "constant") != "constant" or len(node.inputs) < 3 or node.inputs[2].is_empty():
        return True
    return scalar(node.inputs[2]) == 0.0
