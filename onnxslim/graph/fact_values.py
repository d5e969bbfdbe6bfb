"""What the rules of operators share: reading small integer tensors and shapes, and making facts of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.graph.facts import LONGEST_VALUE, Fact, Facts, Shape
from onnxslim.graph.symbols import (
    Element,
    fresh,
    lower_bound,
)
from onnxslim.graph.walk import constant_value

__all__ = [
    "RULES",
    "Results",
    "any_shape",
    "bounds",
    "broadcast",
    "computed",
    "elements_of",
    "fixed_integers",
    "has_input",
    "int_shape",
    "known_sizes",
    "object_array",
    "on",
    "or_unknown",
    "target_shape",
    "valued",
]

Results: TypeAlias = Sequence[Fact] | None
RULES: dict[str, Callable[[Facts, gs.Node], Results]] = {}


def on(*ops: str) -> Callable[[Callable[[Facts, gs.Node], Results]], Callable[[Facts, gs.Node], Results]]:
    """Put a rule into the table under the names of operators of the default domain."""

    def register(rule: Callable[[Facts, gs.Node], Results]) -> Callable[[Facts, gs.Node], Results]:
        RULES.update(dict.fromkeys(ops, rule))
        return rule

    return register


def has_input(node: gs.Node, index: int) -> bool:
    """Whether an optional input is there."""
    return len(node.inputs) > index and not node.inputs[index].is_empty()


def fixed_integers(facts: Facts, node: gs.Node, index: int, attribute: str | None = None) -> list[int] | None:
    """A list of integers from an attribute or from an input that is known, wherever the node's version has it."""
    if attribute is not None and attribute in node.attrs:
        value = node.attrs[attribute]
        return [int(item) for item in value] if isinstance(value, list) else None
    if not has_input(node, index):
        return None
    fact = facts.of(node.inputs[index])
    known = fact.known if fact.value is not None else None
    if known is None:
        known = constant_value(node.inputs[index]) if fact.shape is not None and len(fact.shape) <= 1 else None
    return None if known is None or known.dtype.kind not in "iu" else [int(item) for item in known.reshape(-1)]


def elements_of(facts: Facts, node: gs.Node, index: int) -> list[Element] | None:
    """The elements of a small integer input, symbolic ones included."""
    if not has_input(node, index):
        return None
    value = facts.of(node.inputs[index]).value
    return None if value is None or value.ndim > 1 else list(value.reshape(-1))


def valued(dtype: np.dtype | None, value: np.ndarray) -> Fact:
    """A fact with a value, elements that do not fit the dtype made unknown: how they wrap is the runtime's business."""
    shape = tuple(int(size) for size in value.shape)
    if dtype is None or value.size > LONGEST_VALUE:
        return Fact(dtype, shape)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        flat = value.reshape(-1)
        for index, element in enumerate(flat):
            if isinstance(element, int) and not limits.min <= element <= limits.max:
                value = value.copy()
                value.reshape(-1)[index] = fresh(None)
    return Fact(dtype, shape, value)


def computed(dtype: np.dtype, value: np.ndarray) -> Fact:
    """As :func:`valued` for results of arithmetic: in all but int64, what is not known may have wrapped around."""
    if dtype != np.int64:
        flat = [element if isinstance(element, int) else fresh(None) for element in value.reshape(-1)]
        value = object_array(flat, value.shape)
    return valued(dtype, value)


def object_array(items: Sequence[Element], shape: Sequence[int] | None = None) -> np.ndarray:
    """Elements as an array of the given shape; a vector without one."""
    array = np.empty(len(items), object)
    array[:] = items
    return array if shape is None else array.reshape(tuple(shape))


def broadcast(shapes: Sequence[Shape | None]) -> Shape | None:
    """The shape of tensors broadcast against each other; None when a rank is unknown."""
    known = [shape for shape in shapes if shape is not None]
    if len(known) != len(shapes):
        return None
    return reduce(_broadcast_pair, known)


def _broadcast_pair(first: Shape, second: Shape) -> Shape:
    rank = max(len(first), len(second))
    pairs = zip((1,) * (rank - len(first)) + first, (1,) * (rank - len(second)) + second, strict=True)
    return tuple(_broadcast_size(a, b) for a, b in pairs)


def _broadcast_size(a: Element, b: Element) -> Element:
    if a == b or b == 1:
        return a
    if a == 1:
        return b
    # A number other than 1 wins: the other side must be that or 1.
    if isinstance(a, int):
        return a
    if isinstance(b, int):
        return b
    for size, other in ((a, b), (b, a)):  # what is never 1 must be what the other is, or the other is 1
        bound = lower_bound(size)
        if bound is not None and bound > 1 and (lower_bound(other) or 0) <= 1:
            return size
    return fresh()


def known_sizes(shape: Shape) -> tuple[int, ...]:
    """The sizes that are known integers."""
    return tuple(size for size in shape if isinstance(size, int))


def any_shape(rank: int | None) -> Shape | None:
    """A shape of which only the rank is known."""
    return None if rank is None else tuple(fresh() for _ in range(rank))


def int_shape(array: np.ndarray) -> Shape:
    """The shape of an array, in Python integers."""
    return tuple(int(size) for size in array.shape)


def target_shape(facts: Facts, node: gs.Node, index: int) -> Shape | None:
    """The sizes in an input that holds a shape; unknown ones where only their number is known."""
    elements = elements_of(facts, node, index)
    if elements is not None:
        return tuple(element if (lower_bound(element) or 0) >= 0 else fresh() for element in elements)
    shape = facts.of(node.inputs[index]).shape
    if shape is not None and len(shape) == 1 and isinstance(shape[0], int) and shape[0] <= LONGEST_VALUE:
        return tuple(fresh() for _ in range(shape[0]))
    return None


def bounds(facts: Facts, node: gs.Node, index: int, attribute: str) -> list[Element] | None:
    """Integers from an attribute or an input, symbolic ones included."""
    if attribute in node.attrs:
        return [int(item) for item in node.attrs[attribute]]
    found = elements_of(facts, node, index)
    if found is not None:
        return found
    fixed = fixed_integers(facts, node, index)
    return None if fixed is None else list(fixed)


def or_unknown(element: Element | None) -> Element:
    """An element, or one of which nothing is known."""
    return fresh(None) if element is None else element
