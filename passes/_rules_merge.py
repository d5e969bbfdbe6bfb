"""Equal things made one: initializers of equal bytes, and pure nodes of equal operator, attributes and inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import AttributeProto

from onnxslim.passes._rewriter import Rewriter
from onnxslim.passes._rules import Ledger, Rule

__all__ = ["InitializerMerger", "merge_nodes"]

# Elements looked at before two tensors of one shape and dtype are compared in full.
_SAMPLE = 64
# Swapping the two inputs gives the same bits.
_COMMUTATIVE = frozenset({"Add", "Mul", "And", "Or", "Xor", "Equal", "BitwiseAnd", "BitwiseOr", "BitwiseXor"})


class InitializerMerger:
    """Lets initializers of equal dtype, shape and bytes be one.

    One in a body gives way to one of a graph around it, never the other way round. Overridable initializers are graph
    inputs, and so are not looked at.
    """

    def __init__(self, g: Rewriter, ledger: Ledger) -> None:
        self._g = g
        self._ledger = ledger
        self._groups: dict[tuple[str, tuple[int, ...]], list[gs.Constant]] = {}
        self._sampled: dict[tuple[str, tuple[int, ...]], dict[Hashable, list[gs.Constant]]] = {}

    def merge_all(self) -> None:
        """Merge what the model holds."""
        seen: set[int] = set()
        for node in self._g.nodes():
            for tensor in list(node.inputs):
                if isinstance(tensor, gs.Constant) and id(tensor) not in seen:
                    seen.add(id(tensor))
                    self.add(tensor)

    def add(self, tensor: gs.Constant) -> None:
        """Let an equal initializer that is known already take the place of this one, if there is any.

        The bytes of a tensor are only looked at when another one of its dtype and shape has come.
        """
        if getattr(tensor._values, "sparse", False):
            return
        key = (np.dtype(tensor.dtype).name, tuple(tensor.shape))
        group = self._groups.setdefault(key, [])
        if not group:
            group.append(tensor)
            return
        sampled = self._sampled.setdefault(key, {})
        if not sampled:
            sampled[_sample(_values(group[0]))] = [group[0]]
        alike = sampled.setdefault(_sample(_values(tensor)), [])
        for other in alike:
            rule = "merge-initializers"
            if not self._g.can_replace(tensor, other) or not self._ledger.allows(rule, tensor.name):
                continue
            if _same_bits(_values(tensor), _values(other)):
                self._g.replace(tensor, other)
                self._ledger.change(rule, tensor.name, f"the same {tensor.dtype} values as {other.name}")
                return
        alike.append(tensor)
        group.append(tensor)


def _values(constant: gs.Constant) -> np.ndarray:
    """The values, without making the constant keep them in memory."""
    values = constant._values
    return values if isinstance(values, np.ndarray) else values.load()


def _sample(values: np.ndarray) -> Hashable:
    flat = values.reshape(-1)
    if values.dtype == object:
        return tuple(flat[:_SAMPLE].tolist())
    middle = flat.size // 2
    return flat[:_SAMPLE].tobytes() + flat[middle : middle + _SAMPLE].tobytes() + flat[-_SAMPLE:].tobytes()


def _same_bits(first: np.ndarray, second: np.ndarray) -> bool:
    if first.dtype == object:
        return bool(first.tolist() == second.tolist())
    if first.size == 0:
        return True
    return bool(np.array_equal(_bytes(first), _bytes(second)))


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def merge_nodes() -> Rule:
    """A rule that merges each node into an equal, earlier one of the same graph; it remembers what it has seen."""
    table: dict[Hashable, gs.Node] = {}

    def apply(g: Rewriter, node: gs.Node) -> str | None:
        key = _signature(g, node)
        if key is None:
            return None
        other = table.setdefault(key, node)
        if other is node:
            return None
        if not g.is_alive(other) or _signature(g, other) != key:
            table[key] = node
            return None
        if g.impurity(node):
            return None
        first, second = (other, node) if g.order(other) <= g.order(node) else (node, other)
        pairs = [(old, new) for new, old in zip(first.outputs, second.outputs, strict=True) if not old.is_empty()]
        if not all(g.can_replace(old, new) for old, new in pairs):
            return None
        table[key] = first
        name = second.outputs[0].name
        g.remove(second)
        for old, new in pairs:
            g.replace(old, new)
        return f"{second.op} for {name} computed what {first.name or first.outputs[0].name} computes"

    return Rule("merge-nodes", frozenset(), 1, apply)


def _signature(g: Rewriter, node: gs.Node) -> Hashable:
    """What two nodes must have in common to compute the same; None for nodes that are never merged."""
    attributes = []
    for name, value in node.attrs.items():
        encoded = _encode(value)
        if encoded is None:
            return None
        attributes.append((name, encoded))
    inputs = [0 if tensor.is_empty() else id(tensor) for tensor in node.inputs]
    if node.op in _COMMUTATIVE and not node.domain:
        inputs.sort()
    return (
        id(g.scope(node)),
        node.domain or "",
        node.op,
        getattr(node.__dict__.get("header"), "overload", ""),
        tuple(sorted(attributes)),
        tuple(inputs),
        tuple(tensor.is_empty() for tensor in node.outputs),
    )


def _encode(value: Any) -> tuple[str, str] | None:
    """An attribute as something comparable that tells 1 from 1.0 and 0.0 from -0.0; None for bodies."""
    if isinstance(value, gs.Graph):
        return None
    if isinstance(value, gs.Constant):
        array = _values(value)
        content = repr(array.tolist()) if array.dtype == object else hashlib.sha256(array.tobytes()).hexdigest()
        return f"{array.dtype.name}{array.shape}", content
    if isinstance(value, AttributeProto):
        return "proto", value.SerializeToString(deterministic=True).hex()
    return type(value).__name__, repr(value)
