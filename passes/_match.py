"""What rules that look at several nodes ask: constant operands, products, and who reads what lies between."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.passes._rewriter import Rewriter

__all__ = [
    "FLOATS",
    "Binary",
    "Product",
    "addends",
    "inner",
    "is_near",
    "keeps_shape",
    "only_read_by",
    "product",
    "readable",
    "scalar",
    "with_constant",
]

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
"""Types in which a constant may be rounded anew: what it adds is what two runtimes would differ by."""

_MOST_ELEMENTS = 1 << 16
# sqrt(2), sqrt(2 / pi) and 0.044715 are written with seven digits or more where a formula is meant.
_TOLERANCE = 1e-6
_MOST_FACTORS = 4


@dataclass(frozen=True)
class Binary:
    """A node of two operands, one of them constant.

    Attributes:
        x: the other operand.
        constant: the constant operand.
        value: its value.
        at: which input the constant is.
    """

    x: gs.Tensor
    constant: gs.Tensor
    value: np.ndarray
    at: int


@dataclass(frozen=True)
class Product:
    """A tensor as a constant times other tensors.

    Attributes:
        factor: product of the constants.
        terms: the factors that are not constant.
        nodes: the Mul and Div nodes that multiply them, which nobody else reads.
    """

    factor: float
    terms: tuple[gs.Tensor, ...]
    nodes: tuple[gs.Node, ...]


def is_near(value: float | None, wanted: float) -> bool:
    """Whether a constant is the one that a formula has."""
    return value is not None and abs(value - wanted) <= _TOLERANCE * abs(wanted)


def inner(g: Rewriter, tensor: gs.Tensor, user: gs.Node, *ops: str) -> gs.Node | None:
    """The node that makes a tensor, where it is one of ``ops`` in the graph of ``user``, which alone reads it."""
    node = g.producer(tensor, *ops)
    if node is None or g.sole_user(tensor) is not user or g.scope(node) is not g.scope(user):
        return None
    return node


def only_read_by(g: Rewriter, tensor: gs.Tensor, users: Iterable[gs.Node]) -> bool:
    """Whether nobody but ``users`` reads a tensor."""
    known = {id(user) for user in users}
    return not g.is_output(tensor) and all(id(user) in known for user in tensor.outputs)


def readable(g: Rewriter, node: gs.Node, *tensors: gs.Tensor) -> bool:
    """Whether a node could read all of these tensors by their names."""
    return all(g.is_visible(g.scope(node), tensor) for tensor in tensors)


def with_constant(g: Rewriter, node: gs.Node) -> Binary | None:
    """The operands of a node of two inputs, exactly one of which is a small enough constant."""
    if len(node.inputs) != 2:
        return None
    values = [g.constant(tensor, _MOST_ELEMENTS) for tensor in node.inputs]
    if (values[0] is None) == (values[1] is None):
        return None
    at = 1 if values[0] is None else 0
    value = values[at]
    assert value is not None
    return Binary(node.inputs[1 - at], node.inputs[at], value, at)


def keeps_shape(g: Rewriter, x: gs.Tensor, value: np.ndarray) -> bool:
    """Whether ``x`` keeps its shape when it is broadcast with a constant."""
    if value.ndim == 0:
        return True
    shape = g.shape(x)
    if shape is None or len(shape) < value.ndim:
        return False
    return all(size in (1, known) for size, known in zip(value.shape, shape[-value.ndim :], strict=True))


def scalar(g: Rewriter, tensor: gs.Tensor, beside: gs.Tensor | None = None) -> float | None:
    """The number that a constant of one element holds; with ``beside``, only where it leaves the shape of that."""
    value = g.constant(tensor, 1)
    if value is None or value.size != 1 or value.dtype.kind not in "fiu":
        return None
    if beside is not None and not keeps_shape(g, beside, value):
        return None
    return float(value.reshape(-1)[0])


def product(g: Rewriter, node: gs.Node) -> Product:
    """Take the output of a Mul or Div apart into a constant and at most four other factors.

    Inner nodes are taken apart where nobody else reads them; divisors must be constants of one element.
    """
    factor, terms, nodes, pending = 1.0, [], [], [node]
    while pending:
        current = pending.pop()
        nodes.append(current)
        binary = with_constant(g, current)
        number = None if binary is None else scalar(g, binary.constant, binary.x)
        if binary is not None and number and (current.op == "Mul" or binary.at == 1):
            factor = factor * number if current.op == "Mul" else factor / number
            parts = [binary.x]
        elif current.op == "Div":
            terms.append(current.outputs[0])
            nodes.pop()
            continue
        else:
            parts = list(current.inputs)
        for part in parts:
            deeper = inner(g, part, current, "Mul", "Div")
            if deeper is None or len(terms) + len(pending) >= _MOST_FACTORS:
                terms.append(part)
            else:
                pending.append(deeper)
    return Product(factor, tuple(terms), tuple(nodes))


def addends(g: Rewriter, node: gs.Node) -> tuple[gs.Tensor, float] | None:
    """Tensor and number that an Add (or a Sub, with the number negated) adds; None where it is another sum."""
    binary = with_constant(g, node)
    number = None if binary is None else scalar(g, binary.constant, binary.x)
    if binary is None or number is None or (node.op == "Sub" and binary.at == 0):
        return None
    return binary.x, -number if node.op == "Sub" else number
