"""A strategy for hypothesis: random graphs that are legal and run, over the operators that rewrites touch."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st
from onnx import checker
from random_bodies import BODIES, grow
from random_builder import Builder, Graph, Value, opsets, session_of, to_model
from random_layers import LAYERS
from random_ops import OPERATORS
from random_patterns import PATTERNS

_DTYPES = ("float32", "float32", "float32", "float32", "float16", "float64", "int64", "int32", "bool", "uint8", "int8")
_SHAPES = (
    ("N", 3, 4),
    ("N", 4, 3, 5),
    ("N", 2, 5, 4),
    (2, 3, 4, 4),
    ("N", "M"),
    ("N", "M", 4),
    (3, 4),
    (4,),
    ("M", 4),
    ("N", 1, "M"),
    (1, 1, 4),
    ("N",),
    (),
)
_SIZES = ({"N": 2, "M": 3}, {"N": 1, "M": 1}, {"N": 3, "M": 2})

_STEPS = (*OPERATORS, *OPERATORS, *LAYERS, *LAYERS, *PATTERNS, *BODIES)
_SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def graphs(draw: Callable[[st.SearchStrategy[Any]], Any], more: tuple[Callable[[Builder], None], ...] = ()) -> Graph:
    """Draw a graph of up to some twenty nodes, or more in bodies, with three to five feeds.

    The feeds take different sizes for the dynamic axes, one of them perhaps empty; they hold normal numbers, edge
    values, large ones, and perhaps NaN and infinities. What hypothesis draws is one seed for the frame and one for each
    step, so that it finds the fewest steps that fail, and all choices within a step are equally likely. ``more`` steps
    are drawn from as well as the usual ones.
    """
    b, sizes = _frame(random.Random(draw(_SEEDS)))
    for _ in range(b.number(1, 3)):
        b.input(b.choose(_DTYPES), b.choose(_SHAPES), sizes)
    for seed in draw(st.lists(_SEEDS, min_size=4, max_size=20)):
        b.rng.seed(seed)
        grow(b, (*_STEPS, *more), 1)
    outputs = _outputs(b)
    graph = b.to_graph(outputs)
    if b.ir_version < 4:
        known = {tensor.name for tensor in graph.input}
        for tensor in graph.initializer:
            if tensor.name not in known:
                graph.input.add(name=tensor.name).type.tensor_type.elem_type = tensor.data_type
                graph.input[-1].type.tensor_type.shape.SetInParent()
                for size in tensor.dims:
                    graph.input[-1].type.tensor_type.shape.dim.add(dim_value=size)
    model = to_model(graph, b.opset, b.ir_version, b.functions)
    try:
        checker.check_model(model, full_check=True)
        session = session_of(model)
        for feed in b.feeds:
            session.run(None, feed)
    except Exception:  # neither onnx nor ONNX Runtime has one type for what is not legal
        assume(False)
    return Graph(model, b.feeds, _largest(b), [value.exact for value in outputs], b.strange)


def _frame(rng: random.Random) -> tuple[Builder, list[dict[str, int]]]:
    """An empty graph of some opset, and the sizes of the dynamic axes in each feed."""
    sizes, strange = list(_SIZES), [False] * len(_SIZES)
    if rng.random() < 0.3:
        sizes.append(rng.choice([{"N": 0, "M": 2}, {"N": 2, "M": 0}]))
        strange.append(False)
    if rng.random() < 0.25:
        sizes.append({"N": 2, "M": 2})
        strange.append(True)
    opset = rng.choice(opsets()) if rng.random() < 0.5 else rng.choice(opsets()[10:])  # fusions want new operators
    versions = [3, 4, 7] if opset < 9 else [7, 8, 10] if opset < 21 else [10]
    return Builder(rng, opset, rng.choice(versions), strange, feeds=[{} for _ in sizes]), sizes


def _outputs(b: Builder) -> list[Value]:
    """The last result, and perhaps others: on the way, inputs, constants."""
    made = {name for node in b.nodes for name in node.output}
    results = [value for value in b.values if value.name in made]
    found = results[-1:] or b.values[-1:]
    for _ in range(b.number(0, 3)):
        other = b.choose(results if results and b.chance(6) is False else b.values)
        if all(other is not value for value in found):
            found.append(other)
    return found


def _largest(b: Builder) -> list[float]:
    """For each feed the largest finite number among all tensors of floats."""
    return [
        max(
            (
                float(np.abs(array[np.isfinite(array)]).max(initial=0.0))
                for array in (value.arrays[index] for value in b.values if value.kind == "f")
            ),
            default=0.0,
        )
        for index in range(len(b.strange))
    ]
