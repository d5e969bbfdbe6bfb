"""Which nodes compute the same outputs from the same inputs, and do nothing else: the one table that passes go by.

A node may be folded, merged with an equal one or reordered only if it is *pure*. What makes a node impure: it draws
random numbers, it updates state as a side effect (BatchNormalization in training mode before version 14), it runs in a
training mode that draws (Dropout), it holds an impure node in a body, it calls a local function that does, or nobody
here knows what it does (any other domain).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

__all__ = [
    "Functions",
    "batchnorm_is_inference",
    "dropout_is_inference",
    "functions_of",
    "impurity",
    "is_removable",
    "is_standard",
]

Functions = Mapping[tuple[str, str], Sequence[gs.Graph]]
"""The local functions of a model by (domain, name); several where the file overloads one."""

_STANDARD_DOMAINS = frozenset({"", "ai.onnx"})
# Domains whose operators are documented as functions of their inputs; ONNX Runtime's own ones are not all
# deterministic, so they are in no list that allows folding or merging, only in the one that allows dropping.
_PURE_DOMAINS = _STANDARD_DOMAINS | {"ai.onnx.ml"}
_REMOVABLE_DOMAINS = _PURE_DOMAINS | {"com.microsoft", "ai.onnx.preview.training"}

_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)


def is_standard(node: gs.Node) -> bool:
    """Whether the node is an operator of the default ONNX domain."""
    return (node.domain or "") in _STANDARD_DOMAINS


def functions_of(graph: gs.Graph) -> Functions:
    """Index the local functions that a main graph carries."""
    found: dict[tuple[str, str], list[gs.Graph]] = {}
    for function in graph.functions:
        found.setdefault((function.domain or "", function.name), []).append(function)
    return found


def impurity(node: gs.Node, opset: int, functions: Functions) -> str | None:
    """Say why a node must be neither folded nor merged with an equal one; None when it is pure.

    Args:
        node: the node; its bodies, and the local functions it calls, are looked into.
        opset: version of the default domain that holds where the node stands.
        functions: from :func:`functions_of`.
    """
    return _impurity(node, opset, functions, frozenset())


def is_removable(node: gs.Node, functions: Functions) -> bool:
    """Whether a node may go when nothing reads its outputs.

    True for everything but operators of unknown domains and nodes without outputs, which can only have been put there
    for what they do.
    """
    if not any(not tensor.is_empty() for tensor in node.outputs):
        return False
    return all(
        (inner.domain or "") in _REMOVABLE_DOMAINS or (inner.domain or "", inner.op) in functions
        for inner in _with_bodies(node)
    )


def _with_bodies(node: gs.Node) -> Iterator[gs.Node]:
    """Yield a node and every node in its bodies."""
    stack = [node]
    while stack:
        current = stack.pop()
        yield current
        for value in current.attrs.values():
            if isinstance(value, gs.Graph):
                stack.extend(value.nodes)


def _impurity(node: gs.Node, opset: int, functions: Functions, calling: frozenset[tuple[str, str]]) -> str | None:
    for inner in _with_bodies(node):
        key = (inner.domain or "", inner.op)
        if key in functions:
            if key in calling:
                return f"local function {inner.op} calls itself"
            for function in functions[key]:
                for called in function.nodes:
                    reason = _impurity(called, function.opset or opset, functions, calling | {key})
                    if reason:
                        return f"local function {inner.op}: {reason}"
        elif key[0] not in _PURE_DOMAINS:
            return f"{inner.op} of domain {key[0]!r} may do anything"
        elif key[0] in _STANDARD_DOMAINS:
            reason = _standard_impurity(inner, opset)
            if reason:
                return reason
    return None


def _standard_impurity(node: gs.Node, opset: int) -> str | None:
    if node.op in _RANDOM:
        return f"{node.op} draws random numbers"
    if node.op == "Dropout" and not dropout_is_inference(node, opset):
        return "Dropout may be in training mode and draw random numbers"
    if node.op == "BatchNormalization" and not batchnorm_is_inference(node, opset):
        return "BatchNormalization is in training mode"
    return None


def dropout_is_inference(node: gs.Node, opset: int) -> bool:
    """Whether a Dropout provably passes its input through.

    Before version 7 the attribute ``is_test`` says so; versions 7 to 11 always do; from 12 on the third input may
    switch training on, and must be absent or a constant false.
    """
    if opset < 7:
        return bool(node.attrs.get("is_test", 0) == 1)
    if opset < 12 or len(node.inputs) < 3 or node.inputs[2].is_empty():
        return True
    mode = node.inputs[2]
    if isinstance(mode, gs.Constant):
        return not bool(np.any(mode.values))
    if len(mode.inputs) == 1 and mode.inputs[0].op == "Constant":
        value = mode.inputs[0].attrs.get("value")
        return isinstance(value, gs.Constant) and not bool(np.any(value.values))
    return False


def batchnorm_is_inference(node: gs.Node, opset: int) -> bool:
    """Whether a BatchNormalization uses its stored statistics.

    Before version 7 the attribute ``is_test`` says so, up to 13 the presence of more than one output says that it does
    not, and from 14 on the attribute ``training_mode``.
    """
    if opset < 7:
        return bool(node.attrs.get("is_test", 0) == 1)
    if opset >= 14:
        return bool(node.attrs.get("training_mode", 0) == 0)
    return not any(not tensor.is_empty() for tensor in node.outputs[1:])
