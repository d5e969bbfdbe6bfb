"""What float16 cannot hold or compute: the nodes of a model that have to stay in float32, and why.

float16 reaches from 6.1e-5 (6.0e-8 with fewer bits) to 65,504 and holds integers up to 2,048. A node stays in float32
where it reads a constant outside of that, where it makes or reads what follows from such a constant (an attention mask
of -3.4e38, a variance and its epsilon of 1e-12), where calibration data showed its tensors to come close to the ends,
and where it computes sizes and positions from shapes. Nodes beside QuantizeLinear and DequantizeLinear stay, as
runtimes fuse them in float32 only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.graph.shapes import Shapes
from onnxslim.graph.walk import nested_graphs, subgraphs
from onnxslim.passes._calibration import Observed
from onnxslim.passes._placement import matches

if TYPE_CHECKING:
    from onnxslim.model import Model

__all__ = ["LARGE", "fits_float16", "float32_nodes", "whole_obstacle"]

LARGE = 1024  # elements: smaller constants are parameters of an op, larger ones weights
_HIGHEST, _LOWEST = float(np.finfo(np.float16).max), float(np.finfo(np.float16).smallest_normal)
_HEADROOM = 2.0  # other data may reach this much further than what was seen
_ERROR = 2.0**-9  # relative, of all elements; rounding alone makes 2 ** -11 at most
_SATURATING = ("Clip", "Max", "Min")  # a bound beyond float16 is one at its end
_MOVING = (
    "Concat", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Tile",
    "Transpose", "Unsqueeze",
)  # fmt: skip
# What hands numbers near the ends of float32 on, instead of bringing them back into the range of float16.
_SPREADS_LARGE = (*_MOVING, "Abs", "Add", "Cast", "Clip", "Max", "Min", "Mul", "Neg", "Relu", "Sub", "Where")
_SPREADS_SMALL = (*_MOVING, "Abs", "Add", "Cast", "Clip", "Max", "Pow", "Reciprocal", "Sqrt", "Sub")
_FLAGS = {"Loop": 1}  # results of a body that come before those of the node
_CONTAINERS = ("Sequence", "Optional", "SplitToSequence", "ConcatFromSequence")


def fits_float16(values: np.ndarray) -> bool:
    """Whether float16 holds the numbers: all in range, integers exactly, others but for rounding, infinities aside."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return True
    if np.abs(finite).max() > _HIGHEST:
        return False
    error = finite.astype(np.float16).astype(np.float64) - finite
    if not error.any() or np.array_equal(finite, np.rint(finite)):
        return not error.any()
    return bool(np.square(error).sum() <= _ERROR**2 * np.square(finite, dtype=np.float64).sum())


def float32_nodes(
    model: Model, types: Shapes, exclude: tuple[str, ...], observed: Mapping[str, Observed]
) -> dict[int, tuple[gs.Node, str]]:
    """Return the nodes that have to compute in float32, with reasons, by id.

    Args:
        model: without local functions, and with its constants hoisted.
        types: of its tensors.
        exclude: shell patterns of names or ops that are to stay; what is in a body of such a node stays too.
        observed: what tensors of the main graph held on calibration data; may be empty.
    """
    return _Search(types, exclude, observed).search(model)


def whole_obstacle(model: Model, types: Shapes, kept: Iterable[gs.Node]) -> str | None:
    """Return why nothing can compute in float16; None where something can.

    Tensors that stay in float32 cannot cross the border of a body, nor be elements of sequences, and types that are
    unknown cannot be converted.
    """
    for node in kept:
        if next(subgraphs(node), None) is not None:
            return f"{node.op} {node.name!r} hands numbers on that float16 cannot hold"
    for graph in nested_graphs(model.graph):
        for node in graph.nodes:
            if node.op.startswith(_CONTAINERS):
                return f"{node.op} {node.name!r} holds tensors in a sequence or an optional"
            for tensor in node.outputs:
                if not tensor.is_empty() and types.dtype(tensor) is None:
                    return f"the type of {tensor.name!r}, which {node.op} makes, is unknown"
    return None


class _Search:
    def __init__(self, types: Shapes, exclude: tuple[str, ...], observed: Mapping[str, Observed]) -> None:
        self.types, self.exclude = types, exclude
        self.found: dict[int, tuple[gs.Node, str]] = {}
        self.counts: set[int] = set()  # tensors that hang on shapes only
        self.large: set[int] = set()  # tensors that may reach beyond float16, and below
        self.small: set[int] = set()
        self.observed = {name: reason for name, entry in observed.items() if (reason := _extreme(entry))}
        self.fitting: dict[int, bool] = {}

    def search(self, model: Model) -> dict[int, tuple[gs.Node, str]]:
        self._walk(model.graph, self.observed, excluded=False)
        return self.found

    def _walk(self, graph: gs.Graph, observed: Mapping[str, str], *, excluded: bool) -> None:
        """Visit the nodes of a graph in order, and of each its bodies before itself."""
        for node in graph.nodes:
            kept = excluded or matches(node, self.exclude)
            bodies = list(subgraphs(node))
            if kept and not bodies:
                self._keep(node, "it is excluded")
            for body in bodies:
                self._hand_on(node.inputs, body.inputs)
                self._walk(body, {}, excluded=kept)
                if self._hand_on(*_carried(node, body)):
                    self._walk(body, {}, excluded=kept)  # what a first iteration left behind reaches the next ones
                self._hand_on(body.outputs[_FLAGS.get(node.op, 0) :], node.outputs)
            self._visit(node, observed)

    def _hand_on(self, sources: Iterable[gs.Tensor], targets: Iterable[gs.Tensor]) -> bool:
        """Mark what holds the same numbers as marked tensors; return whether that marked anything new."""
        pairs = [(id(source), id(target)) for source, target in zip(sources, targets, strict=False)]
        new = False
        for marked in (self.large, self.small):
            reached = {target for source, target in pairs if source in marked} - marked
            marked |= reached
            new = new or bool(reached)
        return new

    def _keep(self, node: gs.Node, reason: str) -> None:
        self.found.setdefault(id(node), (node, reason))

    def _is_float(self, tensor: gs.Tensor) -> bool:
        return not tensor.is_empty() and self.types.dtype(tensor) == np.float32

    def _visit(self, node: gs.Node, observed: Mapping[str, str]) -> None:
        floats = [tensor for tensor in (*node.inputs, *node.outputs) if self._is_float(tensor)]
        results = [tensor for tensor in node.outputs if self._is_float(tensor)]
        self._spread_counts(node)
        self._spread(node, self.large, _SPREADS_LARGE, self._reads(node, large=True))
        self._spread(node, self.small, _SPREADS_SMALL, self._reads(node, large=False))
        reason: str | None = None
        if any(id(tensor) in self.counts for tensor in results or floats):
            reason = "it computes with sizes"
        for tensor in floats:
            if id(tensor) in self.large or id(tensor) in self.small:
                reason = f"{tensor.name} may hold numbers {'above' if id(tensor) in self.large else 'below'} float16's"
            elif tensor.name in observed and not isinstance(tensor, gs.Constant):
                reason = f"{tensor.name} {observed[tensor.name]} on calibration data"
            elif isinstance(tensor, gs.Constant) and node.op not in _SATURATING and not self._fits(tensor):
                reason = f"its constant {tensor.name} does not fit"
        if _beside_codes(node):
            reason = "it is fused with QuantizeLinear and DequantizeLinear"
        if reason is not None and floats:
            self._keep(node, reason)

    def _fits(self, constant: gs.Constant) -> bool:
        if id(constant) not in self.fitting:
            self.fitting[id(constant)] = fits_float16(np.asarray(constant.values))
        return self.fitting[id(constant)]

    def _spread_counts(self, node: gs.Node) -> None:
        """Note what is computed from shapes and small constants."""
        variables = [tensor for tensor in node.inputs if not isinstance(tensor, gs.Constant) and not tensor.is_empty()]
        weights = (
            tensor for tensor in node.inputs if isinstance(tensor, gs.Constant) and np.prod(tensor.shape) >= LARGE
        )
        follows = variables and all(id(tensor) in self.counts for tensor in variables) and not any(weights)
        if node.op in ("Shape", "Size") or (follows and not next(subgraphs(node), None) is not None):
            self.counts |= {id(tensor) for tensor in node.outputs}

    def _reads(self, node: gs.Node, *, large: bool) -> bool:
        """Whether a node has a constant, or makes one, above or below what float16 holds."""
        values = [tensor for tensor in node.inputs if isinstance(tensor, gs.Constant) and self._is_float(tensor)]
        value = node.attrs.get("value")
        if node.op in ("Constant", "ConstantOfShape") and isinstance(value, gs.Constant) and value.dtype == np.float32:
            values.append(value)
        if node.op in _SATURATING or all(self._fits(constant) for constant in values):
            return False
        sizes = np.concatenate([np.abs(np.ravel(constant.values)) for constant in values])
        sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
        largest = float(sizes.max(initial=0))
        return largest > _HIGHEST if large else 0 < largest < _LOWEST

    def _spread(self, node: gs.Node, marked: set[int], ops: tuple[str, ...], source: bool) -> None:
        if (source or any(id(tensor) in marked for tensor in node.inputs)) and (
            node.op in ops or node.op in ("Constant", "ConstantOfShape")
        ):
            marked |= {id(tensor) for tensor in node.outputs if self._is_float(tensor)}


def _carried(node: gs.Node, body: gs.Graph) -> tuple[list[gs.Tensor], list[gs.Tensor]]:
    """The results of a Loop's or Scan's body that are inputs of its next iteration, and those inputs."""
    if node.op == "Loop":
        return body.outputs[1:], body.inputs[2:]
    count = len(body.inputs) - int(node.attrs["num_scan_inputs"]) if node.op == "Scan" else 0
    return body.outputs[:count], body.inputs[:count]


def _extreme(entry: Observed) -> str | None:
    """What makes float16 too narrow for a tensor that was seen; None where it is wide enough."""
    if not entry.elements:
        return None
    if not entry.finite:
        return "is not finite"
    size = max(-entry.low, entry.high)
    if size * _HEADROOM > _HIGHEST:
        return f"reaches {size:.3g}"
    return f"reaches {size:.3g} only" if 0 < size < _LOWEST else None


def _beside_codes(node: gs.Node) -> bool:
    """Whether a node reads dequantized values, or what it makes is quantized."""
    if node.op in ("QuantizeLinear", "DequantizeLinear"):
        return True
    makers = (maker for tensor in node.inputs for maker in tensor.inputs)
    readers = (reader for tensor in node.outputs for reader in tensor.outputs)
    return any(maker.op == "DequantizeLinear" for maker in makers) or any(
        reader.op == "QuantizeLinear" for reader in readers
    )
