"""Rules about the small integer tensors that tell operators their shapes.

Exporters compute them from the shapes of other tensors, with a dozen nodes for each Reshape. Most elements are numbers,
and those that are not are *the size of* some axis of a tensor at hand, which is what these rules say instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxslim.graph.symbols import Element, SymbolicSize, lower_bound
from onnxslim.passes._rewriter import Rewriter
from onnxslim.passes._rules import Rule, rule

__all__ = ["SHAPE_RULES", "SIZE_RULES", "merge_equal_sizes", "reshape_target", "set_reshape_target"]

_TO_THE_END = 2**63 - 1


def reshape_target(before: Sequence[Element] | None, after: Sequence[Element] | None) -> list[int] | None:
    """The constant that makes a Reshape give the shape ``after`` to what has the shape ``before``, for every input.

    One size that is not known may be -1 where all others are positive numbers: the element count gives it, also when it
    is zero. Sizes of the input that stay where they are may be 0 where no other is unknown. None where there is no such
    constant.
    """
    if after is None:
        return None
    if all(isinstance(size, int) and size > 0 for size in after):
        return [size for size in after if isinstance(size, int)]
    numbers = [size for size in after if isinstance(size, int)]
    if any(number <= 0 for number in numbers):
        return None
    if len(after) - len(numbers) == 1:
        return [size if isinstance(size, int) else -1 for size in after]
    if before is None:
        return None
    copied = all(
        isinstance(size, int) or (axis < len(before) and size == before[axis]) for axis, size in enumerate(after)
    )
    return [size if isinstance(size, int) else 0 for size in after] if copied else None


@rule("cast-like", "CastLike")
def _cast_like(g: Rewriter, node: gs.Node) -> str | None:
    """CastLike(x, like) -> Cast(x): it reads the type of its second input only."""
    wanted = g.dtype(node.inputs[1])
    if wanted is None:
        return None
    attrs = {**node.attrs, "to": int(onnx.helper.np_dtype_to_tensor_dtype(wanted))}
    g.rewrite(node, "Cast", attrs, [node.inputs[0]])
    return f"CastLike made Cast to {wanted}"


@rule("static-reshape", "Reshape", since=5)
def _static_reshape(g: Rewriter, node: gs.Node) -> str | None:
    """Reshape(x, s) with a computed s -> Reshape(x, constant); see :func:`reshape_target`."""
    if len(node.inputs) < 2 or g.constant(node.inputs[1]) is not None:
        return None
    target = reshape_target(g.shape(node.inputs[0]), g.shape(node.outputs[0]))
    if target is None:
        return None
    set_reshape_target(g, node, target)
    return f"its target is {target} for every input"


def set_reshape_target(g: Rewriter, node: gs.Node, target: list[int]) -> None:
    """Give a Reshape a constant target from :func:`reshape_target`, in which 0 means "as in the input"."""
    constant = g.make_constant(g.scope(node), f"{node.outputs[0].name}_shape", np.array(target, np.int64))
    if node.attrs.get("allowzero"):
        g.set_attributes(node, allowzero=None)
    g.set_input(node, 1, constant)


@rule("static-expand", "Expand")
def _static_expand(g: Rewriter, node: gs.Node) -> str | None:
    """Expand(x, s) with a computed s -> Expand(x, constant), with 1 for the sizes that x has already."""
    value = g.facts.of(node.inputs[1]).value
    shape = g.shape(node.inputs[0])
    if g.constant(node.inputs[1]) is not None or value is None or value.ndim != 1 or shape is None:
        return None
    elements = value.tolist()
    if len(elements) < len(shape):
        return None
    own = [1] * (len(elements) - len(shape)) + shape
    wanted = [1 if size == mine else size for size, mine in zip(elements, own, strict=True)]
    if not all(isinstance(size, int) and size >= 0 for size in wanted):
        return None
    g.set_input(node, 1, g.make_constant(g.scope(node), f"{node.inputs[1].name}_static", np.array(wanted, np.int64)))
    return f"its target is {wanted} for every input"


@rule("static-slice", "Slice", since=10)
def _static_slice(g: Rewriter, node: gs.Node) -> str | None:
    """Slice(x, starts, ends) with a computed end that is the size of its axis -> an end of "as far as it goes"."""
    if len(node.inputs) < 3 or g.constant(node.inputs[2]) is not None:
        return None
    value = g.facts.of(node.inputs[2]).value
    shape = g.shape(node.inputs[0])
    dtype = g.dtype(node.inputs[2])
    given = len(node.inputs) > 3 and not node.inputs[3].is_empty()
    if value is None or value.ndim != 1 or shape is None or dtype is None:
        return None
    axes = g.integers(node, 3) if given else list(range(value.size))
    steps = g.integers(node, 4) if len(node.inputs) > 4 and not node.inputs[4].is_empty() else [1] * value.size
    if axes is None or steps is None or len(axes) != value.size or len(steps) != value.size:
        return None
    ends = []
    for axis, end, step in zip(axes, value.tolist(), steps, strict=True):
        if isinstance(end, int):
            ends.append(end)
        elif -len(shape) <= axis < len(shape) and step > 0 and _reaches(end, shape[axis]):
            ends.append(min(_TO_THE_END, int(np.iinfo(dtype).max)))
        else:
            return None
    g.set_input(node, 2, g.make_constant(g.scope(node), f"{node.inputs[2].name}_static", np.array(ends, dtype)))
    return "its ends are those of the axes for every input"


def _reaches(end: Element, size: Element) -> bool:
    bound = lower_bound(end - size)
    return bound is not None and bound >= 0


SHAPE_RULES: tuple[Rule, ...] = (_cast_like, _static_reshape, _static_expand, _static_slice)


# ------------------------------------------------------------------------------------------- fewer nodes for a size


def _is_symbolic(value: np.ndarray | None) -> bool:
    return value is not None and any(isinstance(element, SymbolicSize) for element in value.reshape(-1).tolist())


_SIZE_OPS = (
    *("Shape", "Size", "Gather", "Slice", "Squeeze", "Unsqueeze", "Concat", "Reshape", "Cast", "Flatten", "Split"),
    *("Add", "Sub", "Mul", "Div", "Mod", "Min", "Max", "Where", "Identity", "ReduceProd", "Expand", "Equal"),
)


def merge_equal_sizes() -> Rule:
    """A rule that computes each size once: of two tensors that hold the same sizes for every input, the first serves.

    It remembers the tensors that it has seen.
    """
    seen: dict[tuple[object, ...], gs.Tensor] = {}

    def apply(g: Rewriter, node: gs.Node) -> str | None:
        for tensor in node.outputs:
            fact = g.facts.of(tensor)
            if fact.value is None or not _is_symbolic(fact.value) or g.is_unused(tensor):
                continue
            key = (str(fact.dtype), fact.value.shape, tuple(fact.value.reshape(-1).tolist()))
            other = seen.setdefault(key, tensor)
            if other is tensor:
                continue
            if len(other.inputs) != 1 or not g.is_alive(other.inputs[0]):
                seen[key] = tensor
                continue
            earlier = g.order(other.inputs[0]) < g.order(node)
            old, new = (tensor, other) if earlier else (other, tensor)
            if not g.can_replace(old, new):
                continue
            seen[key] = new
            maker = old.inputs[0]
            g.detach(maker, old)
            g.replace(old, new)
            return f"{new.name} holds these sizes already" if old is tensor else f"{old.name} held the same sizes"
        return None

    return Rule("merge-equal-sizes", frozenset(_SIZE_OPS), 1, apply)


@rule("fuse-shape", "Gather", "Slice", "Unsqueeze", "Squeeze", "Concat", "Reshape", "Cast", "Identity", since=15)
def _part_of_shape(g: Rewriter, node: gs.Node) -> str | None:
    """Unsqueeze(Gather(Shape(x), i), 0), Slice(Shape(x), i, j), … -> Shape(x, start=i, end=j)."""
    fact = g.facts.of(node.outputs[0])
    if fact.value is None or fact.value.ndim != 1 or fact.dtype != np.int64 or not _is_symbolic(fact.value):
        return None
    shape = _shape_behind(g, node)
    if shape is None:
        return None
    source = shape.inputs[0]
    sizes, wanted = g.shape(source), fact.value.tolist()
    if sizes is None or not g.is_visible(g.scope(node), source):
        return None
    count = len(wanted)
    start = next((at for at in range(len(sizes) - count + 1) if sizes[at : at + count] == wanted), None)
    if start is None:
        return None
    attrs = {"start": start, "end": start + count} if count < len(sizes) else {}
    g.rewrite(node, "Shape", attrs, [source])
    return f"reads sizes {start} to {start + count} of {source.name} directly"


@rule("fuse-shape", "Shape", "Size")
def _shape_of_source(g: Rewriter, node: gs.Node) -> str | None:
    """Shape(f(x)) -> Shape(x) where they have one shape for every input and nothing else reads f(x)."""
    maker = g.producer(node.inputs[0])
    if maker is None or not g.is_sole_user(node, node.inputs[0]):
        return None
    shape = g.shape(node.inputs[0])
    for tensor in maker.inputs if shape is not None else ():
        if not tensor.is_empty() and g.shape(tensor) == shape and g.is_visible(g.scope(node), tensor):
            g.set_input(node, 0, tensor)
            return f"reads {tensor.name}, which has the same shape"
    return None


def _shape_behind(g: Rewriter, node: gs.Node, depth: int = 4) -> gs.Node | None:
    """The Shape that a chain of nodes picks sizes from."""
    for tensor in node.inputs:
        maker = g.producer(tensor)
        if maker is None or depth == 0:
            continue
        if maker.op == "Shape":
            return maker
        if maker.op in ("Gather", "Slice", "Unsqueeze", "Squeeze", "Concat", "Reshape", "Cast", "Identity"):
            found = _shape_behind(g, maker, depth - 1)
            if found is not None:
                return found
    return None


SIZE_RULES: tuple[Rule, ...] = (_shape_of_source, _part_of_shape)
"""For simplify, together with :func:`merge_equal_sizes`."""
