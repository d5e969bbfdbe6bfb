"""Rules about taking tensors apart and putting them together: Slice, Split, Concat, also by way of sequences."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.passes._rewriter import Rewriter
from onnxslim.passes._rules import Rule, rule

__all__ = ["PART_RULES"]


@rule("fuse-slices", "Slice", since=10)
def _slice_of_slice(g: Rewriter, node: gs.Node) -> str | None:
    """Slice(Slice(x, on some axes), on others) -> Slice(x, on all of them), by constant bounds."""
    inner = g.producer(node.inputs[0], "Slice")
    if inner is None or not g.is_visible(g.scope(node), inner.inputs[0]):
        return None
    if not g.is_sole_user(node, node.inputs[0]):
        return None
    bounds, inner_bounds = _bounds(g, node), _bounds(g, inner)
    if bounds is None or inner_bounds is None or set(bounds[2]) & set(inner_bounds[2]):
        return None
    names = ("starts", "ends", "axes", "steps")
    both = [inner_bounds[index] + bounds[index] for index in range(4)]
    scope, stem = g.scope(node), node.outputs[0].name
    constants = [g.make_constant(scope, f"{stem}_{n}", np.array(v, np.int64)) for n, v in zip(names, both, strict=True)]
    g.rewrite(node, "Slice", {}, [inner.inputs[0], *constants])
    return f"fused with the Slice before it, on axes {both[2]}"


def _bounds(g: Rewriter, node: gs.Node) -> tuple[list[int], list[int], list[int], list[int]] | None:
    """Starts, ends, axes and steps of a Slice, axes counted from the front; None where they are not constant."""
    starts, ends = g.integers(node, 1), g.integers(node, 2)
    rank = g.rank(node.inputs[0])
    if starts is None or ends is None or rank is None:
        return None
    axes, steps = list(range(len(starts))), [1] * len(starts)
    if len(node.inputs) > 3 and not node.inputs[3].is_empty():
        given = g.integers(node, 3)
        if given is None:
            return None
        axes = [axis + rank if axis < 0 else axis for axis in given]
    if len(node.inputs) > 4 and not node.inputs[4].is_empty():
        given = g.integers(node, 4)
        if given is None:
            return None
        steps = given
    if not len(starts) == len(ends) == len(axes) == len(steps):
        return None
    return starts, ends, axes, steps


@rule("split-to-gather", "Split")
def _split_squeeze(g: Rewriter, node: gs.Node) -> str | None:
    """Split(x) into parts of size 1, each squeezed -> Gather(x, i) for each: one node less."""
    rank = g.rank(node.inputs[0])
    if rank is None or any(tensor.is_empty() for tensor in node.outputs):
        return None
    axis = int(node.attrs.get("axis", 0)) % rank
    squeezes = []
    for tensor in node.outputs:
        shape, user = g.shape(tensor), g.sole_user(tensor)
        if shape is None or shape[axis] != 1 or user is None or user.op != "Squeeze" or user.domain:
            return None
        axes = g.integers(user, 1, "axes")
        if axes is None or [each % rank for each in axes] != [axis] or g.scope(user) is not g.scope(node):
            return None
        squeezes.append(user)
    source = node.inputs[0]
    for position, squeeze in enumerate(squeezes):
        index = g.make_constant(g.scope(node), f"{squeeze.outputs[0].name}_index", np.array(position, np.int64))
        g.rewrite(squeeze, "Gather", {"axis": axis}, [source, index])
    return f"its {len(squeezes)} squeezed parts are gathered directly"


@rule("sequence-to-split", "SplitToSequence", since=13)
def _sequence_split(g: Rewriter, node: gs.Node) -> str | None:
    """SequenceAt(SplitToSequence(x), i) for constant positions i -> the outputs of Split(x)."""
    shape, sequence = g.shape(node.inputs[0]), node.outputs[0]
    if shape is None or g.is_output(sequence) or not sequence.outputs:
        return None
    axis = int(node.attrs.get("axis", 0)) % len(shape) if shape else 0
    size = shape[axis] if shape else None
    given = len(node.inputs) > 1 and not node.inputs[1].is_empty()
    # Where sizes are given, some runtimes heed keepdims against the specification.
    if not isinstance(size, int) or not node.attrs.get("keepdims", 1):
        return None
    sizes = _sizes(g, node, size) if given else [1] * size
    if sizes is None or sum(sizes) != size:
        return None
    takers: dict[int, gs.Node] = {}
    for user in sequence.outputs:
        position = g.integers(user, 1) if user.op == "SequenceAt" and not user.domain else None
        if position is None or len(position) != 1 or not -len(sizes) <= position[0] < len(sizes):
            return None
        if position[0] % len(sizes) in takers or g.scope(user) is not g.scope(node):
            return None
        takers[position[0] % len(sizes)] = user
    outputs = [takers[index].outputs[0] if index in takers else None for index in range(len(sizes))]
    if g.opset(node) >= 18 and len(set(sizes)) == 1:
        inputs, attrs = [node.inputs[0]], {"axis": axis, "num_outputs": len(sizes)}
    else:
        parts = g.make_constant(g.scope(node), f"{sequence.name}_sizes", np.array(sizes, np.int64))
        inputs, attrs = [node.inputs[0], parts], {"axis": axis}
    for taker in takers.values():
        g.remove(taker)
    g.rewrite(node, "Split", attrs, inputs)
    g.set_outputs(node, outputs)
    return f"split into {len(sizes)} tensors without a sequence"


def _sizes(g: Rewriter, node: gs.Node, size: int) -> list[int] | None:
    sizes = g.integers(node, 1)
    if sizes is None or g.rank(node.inputs[1]) != 0:
        return sizes
    part = sizes[0]
    return None if part < 1 else [min(part, size - start) for start in range(0, size, part)]


@rule("sequence-to-tensor", "SequenceAt", since=11)
def _sequence_of_tensors(g: Rewriter, node: gs.Node) -> str | None:
    """SequenceAt(SequenceConstruct(a, b, ...), i) -> the one at i."""
    maker = g.producer(node.inputs[0], "SequenceConstruct")
    position = g.integers(node, 1)
    if maker is None or not position or not -len(maker.inputs) <= position[0] < len(maker.inputs):
        return None
    source = maker.inputs[position[0]]
    return f"takes {source.name} out of the sequence" if g.bypass(node, source) else None


@rule("sequence-to-concat", "ConcatFromSequence", since=11)
def _concat_sequence(g: Rewriter, node: gs.Node) -> str | None:
    """ConcatFromSequence(SequenceConstruct(a, b, ...)) -> Concat(a, b, ...)."""
    maker = g.producer(node.inputs[0], "SequenceConstruct")
    if maker is None or node.attrs.get("new_axis", 0):
        return None
    inputs = list(maker.inputs)
    if not all(g.is_visible(g.scope(node), tensor) for tensor in inputs):
        return None
    g.rewrite(node, "Concat", {"axis": node.attrs["axis"]}, inputs)
    return "concatenates without a sequence"


@rule("fuse-concats", "Concat", since=4)
def _concat_of_concat(g: Rewriter, node: gs.Node) -> str | None:
    """Concat(..., Concat(a, b), ...) -> Concat(..., a, b, ...) on one axis; parts of size 0 are left out."""
    rank = g.rank(node.outputs[0])
    if not rank:
        return None
    axis = int(node.attrs["axis"]) % rank
    inputs: list[gs.Tensor] = []
    for tensor in node.inputs:
        inner = g.producer(tensor, "Concat")
        nested = inner is not None and int(inner.attrs["axis"]) % rank == axis and g.is_sole_user(node, tensor)
        if nested and inner is not None and all(g.is_visible(g.scope(node), each) for each in inner.inputs):
            inputs += inner.inputs
        else:
            inputs.append(tensor)
    kept = [tensor for tensor in inputs if (shape := g.shape(tensor)) is None or shape[axis] != 0] or inputs[:1]
    if len(kept) == len(node.inputs):
        return None
    g.rewrite(node, "Concat", node.attrs, kept)
    return f"concatenates {len(kept)} tensors at once"


PART_RULES: tuple[Rule, ...] = (
    _slice_of_slice,
    _split_squeeze,
    _sequence_split,
    _sequence_of_tensors,
    _concat_sequence,
    _concat_of_concat,
)
