"""Weights that are stored in int8 and computed with in float, where no integer kernel fuses.

A weight becomes ``Mul(Cast(codes), scales)``: ONNX Runtime folds that when it loads the model, so speed is that of
float32, where it would run a DequantizeLinear again at every inference. It is legal in every operator set and body. A
large embedding table is looked up in int8, and only the rows that were looked up become float; with a small one, the
kernels for that would take longer than it is worth in memory. Where there are many scales or biases, they are stored in
float16, which loses far less than int8.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim.graph.walk import nested_graphs

if TYPE_CHECKING:
    from onnxslim.model import Model
    from onnxslim.passes.base import Outcome

__all__ = ["MOVING", "quantize_stored_weights"]

FloatArray = NDArray[np.float32]
RULE = "weight-only int8"
_OVERHEAD = 400  # bytes of names and nodes
_LIMIT = 127
_LARGE_TABLE = 1 << 18  # elements
_CAST = 100  # bytes of the node that makes float32 of scales in float16
_HALF_RANGE = 2.0**-14, 2.0**15  # in which float16 is good to 11 bits
_LEAST_LARGEST = 2.0**-8
# The axes over which one scale is shared, by op and position of the weight; for a weight of ``rank`` axes.
_SHARED: dict[tuple[str, int], Callable[[gs.Node, int], tuple[int, ...]]] = {
    ("Conv", 1): lambda node, rank: tuple(range(1, rank)),
    ("ConvTranspose", 1): lambda node, rank: (0, *range(2, rank)),
    ("Gemm", 1): lambda node, rank: (1,) if node.attrs.get("transB", 0) else (0,),
    ("Gemm", 0): lambda node, rank: (0,) if node.attrs.get("transA", 0) else (1,),
    ("MatMul", 1): lambda node, rank: (rank - 2,),
    ("MatMul", 0): lambda node, rank: (rank - 1,),
    **{(op, position): lambda node, rank: (rank - 1,) for op in ("LSTM", "GRU", "RNN") for position in (1, 2)},
}


# Where a weight is cut, joined or turned before it is used: one scale a row of the last axis fits what follows.
MOVING = ("Slice", "Concat", "Unsqueeze", "Squeeze", "Transpose", "Reshape", "Split", "Identity")


@dataclass
class _Use:
    graph: gs.Graph
    node: gs.Node
    position: int


def quantize_stored_weights(model: Model, skip: Callable[[gs.Node], bool], outcome: Outcome) -> int:
    """Store the large float32 weights that are still float in int8; return how many elements.

    Args:
        model: rewritten in place, bodies included; functions cannot hold weights.
        skip: whether a node is to keep its float weights.
        outcome: gets a change for each weight.
    """
    done = 0
    by_weight: dict[int, list[_Use]] = {}
    weights: dict[int, gs.Constant] = {}
    for graph in nested_graphs(model.graph):
        for node in graph.nodes:
            for position, tensor in enumerate(node.inputs):
                if isinstance(tensor, gs.Constant) and tensor.dtype == np.float32:
                    by_weight.setdefault(id(tensor), []).append(_Use(graph, node, position))
                    weights[id(tensor)] = tensor
    owner = {id(c): graph for graph in nested_graphs(model.graph) for c in graph.__dict__.get("initializers", ())}
    for key, uses in by_weight.items():
        weight = weights[key]
        if len(weight.shape) < 2 or any(skip(use.node) for use in uses):
            continue
        lookup = all(_is_lookup(use) for use in uses)
        if lookup and math.prod(weight.shape) >= _LARGE_TABLE:
            done += _quantize_table(model, weight, uses, outcome)
        elif lookup or all(_shared_axes(use, len(weight.shape)) is not None for use in uses):
            home = owner.get(key, uses[0].graph)
            if key not in owner and any(use.graph is not home for use in uses):
                continue
            done += _quantize_weight(model, home, weight, uses, outcome)
    return done


def _shared_axes(use: _Use, rank: int) -> tuple[int, ...] | None:
    """The axes over which one scale is shared for this use; None when the weight must stay float."""
    if use.node.domain:
        return None
    if use.node.op in MOVING:
        return (rank - 1,)
    rule = _SHARED.get((use.node.op, use.position))
    return rule(use.node, rank) if rule else None


def _is_lookup(use: _Use) -> bool:
    node = use.node
    return (
        node.op == "Gather"
        and not node.domain
        and use.position == 0
        and int(node.attrs.get("axis", 0)) == 0
        and not isinstance(node.inputs[1], gs.Constant)
        and len(node.inputs[0].shape) == 2
    )


def _fits_half(scale: FloatArray) -> bool:
    """Whether scales are many enough, and of a size, to be stored in float16."""
    return bool(2 * scale.size > _CAST and scale.min() >= _HALF_RANGE[0] and scale.max() <= _HALF_RANGE[1])


def _codes(values: FloatArray, shared: tuple[int, ...], *, halved: bool = False) -> tuple[NDArray[np.int8], FloatArray]:
    largest = np.abs(values).max(axis=shared, keepdims=True)
    scale = np.where(largest > 0, largest / _LIMIT, 1.0).astype(np.float32)
    if halved and _fits_half(scale):
        scale = scale.astype(np.float16).astype(np.float32)
    return np.clip(np.rint(values / scale), -_LIMIT, _LIMIT).astype(np.int8), scale


def _table_codes(values: FloatArray) -> tuple[NDArray[np.int8], FloatArray]:
    """The codes of a table with one scale a row or one a column, whichever is closer."""
    trials = [_codes(values, shared) for shared in ((1,), (0,))]
    return min(trials, key=lambda trial: float(np.square(trial[0] * trial[1] - values).sum()))


def _stored_scale(model: Model, weight: gs.Constant, scale: FloatArray) -> tuple[gs.Tensor, list[gs.Node]]:
    """The scales of a weight as float32, and the node that makes them so of those that were halved."""
    if not _fits_half(scale):
        return gs.Constant(model.fresh_name(f"{weight.name}_s"), scale), []
    real, cast = _halved(model, weight.name, scale)
    return real, [cast]


def _halved(model: Model, name: str, values: FloatArray) -> tuple[gs.Tensor, gs.Node]:
    """Values stored in float16 as float32, and the node that makes them so."""
    stored = gs.Constant(model.fresh_name(f"{name}_h"), values.astype(np.float16))
    real = gs.Variable(model.fresh_name(f"{name}_s"), np.float32, list(values.shape))
    return real, gs.Node("Cast", real.name, {"to": 1}, inputs=[stored], outputs=[real])


def _halve_bias(model: Model, use: _Use) -> None:
    """Store the bias of a layer in float16, if it is its own and there are enough to gain from."""
    node = use.node
    bias = node.inputs[2] if node.op in ("Conv", "ConvTranspose", "Gemm") and len(node.inputs) > 2 else None
    if not isinstance(bias, gs.Constant) or bias.dtype != np.float32 or len(bias.outputs) != 1:
        return
    values = np.asarray(bias.values)
    largest = float(np.abs(values).max(initial=0.0))
    # What float16 holds to fewer bits than 11 is far below the largest then.
    if 2 * values.size > _CAST and _LEAST_LARGEST <= largest <= _HALF_RANGE[1]:
        node.inputs[2], cast = _halved(model, bias.name, values)
        use.graph.nodes.insert(0, cast)


def _finite(weight: gs.Constant, outcome: Outcome) -> FloatArray | None:
    """The values of a weight, if all are numbers and there are enough to gain from."""
    if 3 * int(np.prod(weight.shape)) <= _OVERHEAD:
        return None
    values = np.asarray(weight.values)
    if np.isfinite(values).all():
        return values
    outcome.refuse(RULE, weight.name, "it holds values that are not finite")
    return None


def _saves(codes: NDArray[np.int8], scale: FloatArray) -> bool:
    return 3 * codes.size > scale.nbytes + _OVERHEAD


def _quantize_weight(model: Model, home: gs.Graph, weight: gs.Constant, uses: list[_Use], outcome: Outcome) -> int:
    """Return how many elements are in int8 now."""
    values = _finite(weight, outcome)
    if values is None:
        return 0
    first = uses[0]
    shared = _shared_axes(first, values.ndim)
    codes, scale = _table_codes(values) if shared is None else _codes(values, shared, halved=True)
    if not _saves(codes, scale):
        return 0
    stored = gs.Constant(model.fresh_name(f"{weight.name}_q"), codes)
    scales, made = _stored_scale(model, weight, scale)
    real = gs.Variable(model.fresh_name(f"{weight.name}_c"), np.float32, list(values.shape))
    result = gs.Variable(model.fresh_name(f"{weight.name}_w"), np.float32, list(values.shape))
    nodes = [
        *made,
        gs.Node("Cast", real.name, {"to": 1}, inputs=[stored], outputs=[real]),
        gs.Node("Mul", result.name, inputs=[real, scales], outputs=[result]),
    ]
    home.nodes = [*nodes, *home.nodes]
    for use in uses:
        use.node.inputs[use.position] = result
        _halve_bias(model, use)
    ops = ", ".join(sorted({use.node.op for use in uses}))
    outcome.change(RULE, first.node.name or first.node.outputs[0].name, f"{weight.name} ({ops}) is stored in int8")
    return values.size


def _quantize_table(model: Model, weight: gs.Constant, uses: list[_Use], outcome: Outcome) -> int:
    """Look codes up instead of rows."""
    values = _finite(weight, outcome)
    if values is None:
        return 0
    codes, scale = _table_codes(values)
    by_row = scale.shape[1] == 1
    if not _saves(codes, scale):
        return 0
    stored = gs.Constant(model.fresh_name(f"{weight.name}_q"), codes)
    scales = gs.Constant(model.fresh_name(f"{weight.name}_s"), scale if by_row else scale.reshape(-1))
    for use in uses:
        node, result = use.node, use.node.outputs[0]
        rows, real = (
            gs.Variable(model.fresh_name(f"{result.name}_{end}"), kind)
            for end, kind in (("q", np.int8), ("c", np.float32))
        )
        indices = node.inputs[1]
        node.inputs[0] = stored
        node.outputs[0] = rows
        added = [gs.Node("Cast", real.name, {"to": 1}, inputs=[rows], outputs=[real])]
        factor: gs.Tensor = scales
        if by_row:
            factor = gs.Variable(model.fresh_name(f"{result.name}_s"), np.float32)
            added.append(gs.Node("Gather", factor.name, {"axis": 0}, inputs=[scales, indices], outputs=[factor]))
        added.append(gs.Node("Mul", model.fresh_name(f"{result.name}_m"), inputs=[real, factor], outputs=[result]))
        position = next(index for index, other in enumerate(use.graph.nodes) if other is node)
        use.graph.nodes = [*use.graph.nodes[: position + 1], *added, *use.graph.nodes[position + 1 :]]
    kind = "row" if by_row else "column"
    outcome.change(RULE, uses[0].node.name or weight.name, f"{weight.name} is looked up in int8, one scale a {kind}")
    return values.size
