"""Initializers that are equal bit for bit, stored once: across bodies only towards an enclosing graph."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.graph.walk import nested_graphs, subgraphs
from onnxslim.passes.base import Outcome

if TYPE_CHECKING:
    from onnxslim.model import Model

__all__ = ["share_identical"]

CROSS_GRAPH_BYTES = 1024  # smaller tensors stay in their body: some rewrites of runtimes look for them there


def share_identical(model: Model, outcome: Outcome) -> int:
    """Store initializers that are equal bit for bit once; return the bytes saved.

    One that an enclosing graph has is used from there. Large ones that sibling bodies hold move to the main graph.
    Overridable initializers are graph inputs and not looked at; outputs of graphs stay as they are.
    """
    exported = {id(tensor) for graph in model.graphs() for tensor in graph.outputs}
    owner: dict[int, gs.Graph] = {}
    parents: dict[int, gs.Graph] = {}
    found: dict[tuple[str, tuple[int, ...]], list[gs.Constant]] = {}
    holders: dict[str, set[int]] = {}
    for graph in nested_graphs(model.graph):
        parents |= {id(body): graph for node in graph.nodes for body in subgraphs(node)}
        for tensor in (*graph.__dict__.get("initializers", ()), *(t for node in graph.nodes for t in node.inputs)):
            holders.setdefault(tensor.name, set()).add(id(tensor))
            if not isinstance(tensor, gs.Constant) or id(tensor) in owner:
                continue
            owner[id(tensor)] = graph
            source = tensor._values
            if (
                id(tensor) in exported
                or tensor.dtype == object
                or getattr(source, "sparse", False)
                or not tensor.outputs
            ):
                continue
            found.setdefault((np.dtype(tensor.dtype).name, tuple(tensor.shape)), []).append(tensor)
        for node in graph.nodes:
            for tensor in node.outputs:
                holders.setdefault(tensor.name, set()).add(id(tensor))

    def encloses(outer: gs.Graph, inner: gs.Graph) -> bool:
        while inner is not outer:
            if id(inner) not in parents:
                return False
            inner = parents[id(inner)]
        return True

    saved = 0
    for alike in found.values():
        same: dict[bytes, list[gs.Constant]] = {}
        for tensor in alike if len(alike) > 1 else ():
            digest = hashlib.sha256(np.ascontiguousarray(tensor.values).tobytes()).digest()
            same.setdefault(digest, []).append(tensor)
        for group in same.values():
            saved += _merge(model, outcome, group, owner, holders, encloses)
    return saved


def _merge(
    model: Model,
    outcome: Outcome,
    group: list[gs.Constant],
    owner: dict[int, gs.Graph],
    holders: dict[str, set[int]],
    encloses: Callable[[gs.Graph, gs.Graph], bool],
) -> int:
    """Merge equal constants, those of outer graphs first; return the bytes saved."""
    nbytes = group[0].values.nbytes
    large = nbytes >= CROSS_GRAPH_BYTES
    if large and len(group) > 1 and not any(all(encloses(owner[id(k)], owner[id(t)]) for t in group) for k in group):
        moved = gs.Constant(model.fresh_name(group[0].name), group[0].values)
        model.graph.__dict__.setdefault("initializers", []).append(moved)
        owner[id(moved)] = model.graph
        group = [moved, *group]
    kept: list[gs.Constant] = []
    saved = 0
    for tensor in group:
        home = owner[id(tensor)]
        for other in kept:
            here = owner[id(other)] is home
            if here or (large and encloses(owner[id(other)], home) and len(holders.get(other.name, ())) <= 1):
                for user in list(tensor.outputs):
                    for position, used in enumerate(user.inputs):
                        if used is tensor:
                            user.inputs[position] = other
                outcome.change("identical", tensor.name, f"the same {nbytes:,} bytes as {other.name}: stored once")
                saved += nbytes
                break
        else:
            kept.append(tensor)
    return saved
