"""Where and how far two models differ: in their outputs, layer by layer, and in what they are made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import BaseModel

from onnxslim.data import Dataset, open_dataset, random_feeds
from onnxslim.errors import DataError, ModelError
from onnxslim.graph.cost import node_count, op_histogram, parameter_count
from onnxslim.graph.shapes import infer_shapes
from onnxslim.guard import layer_errors, output_errors
from onnxslim.model import load, size_on_disk
from onnxslim.record import LayerError
from onnxslim.runtime import Feed, Session

__all__ = ["Comparison", "Side", "compare"]


class Side(BaseModel):
    """One of the two models."""

    path: str
    size_bytes: int
    nodes: int
    parameters: int
    ops: dict[str, int]


class Comparison(BaseModel):
    """What tells two models apart.

    Attributes:
        outputs: error of each output that both have as numbers of one shape, the first model being the reference.
        not_compared: outputs that only one has, or that differ in shape or type, or hold no numbers.
        layers: error of each inner tensor that both have by name, in graph order.
        only_a: names of nodes that only the first model has.
        only_b: names of nodes that only the second model has.
        feeds: how many inputs the errors are over, and where those came from.
    """

    a: Side
    b: Side
    outputs: list[LayerError]
    not_compared: list[str]
    layers: list[LayerError]
    only_a: list[str]
    only_b: list[str]
    feeds: str

    @property
    def equal(self) -> bool:
        """Whether every output of either was compared and the same to the last bit."""
        return not self.not_compared and all(entry.max_abs_error == 0 for entry in self.outputs)


def compare(
    a: Path, b: Path, *, data: Path | None = None, shapes: dict[str, list[int]] | None = None, samples: int = 16
) -> Comparison:
    """Compare two model files on data, or on made-up inputs without any.

    Args:
        a: the reference.
        b: what is compared with it.
        data: as for ``optimize``; labels are not needed.
        shapes: sizes for dynamic inputs of made-up feeds.
        samples: how many samples at the most.

    Raises:
        ModelError: a file cannot be read or run, or the two have no output in common.
        DataError: the data does not fit.
    """
    models = (load(a), load(b))
    session = Session(a)
    feeds: list[Feed]
    if data is not None:
        dataset: Dataset = open_dataset(data, session.specs, role="comparison")
        feeds = list(dataset.take(samples))
        source = f"{len(feeds)} of {dataset.samples} samples of {data}"
    else:
        feeds = [
            feed for feed in random_feeds(session.specs, fixed=shapes or {}, seed=0, count=4) if _runs(session, feed)
        ]
        source = f"{len(feeds)} made-up inputs"
    if not feeds:
        raise DataError(f"{a}: does not run on made-up inputs; give --data.")
    names = [{node.name for graph in model.graphs() for node in graph.nodes if node.name} for model in models]
    infer_shapes(models[0], shapes)  # refuses sizes for inputs that are not there
    other = Session(b)
    outputs = output_errors(session, other, feeds)
    if not outputs:
        raise ModelError(
            f"{a} and {b} gave no numbers of the same output name and shape, so their results cannot be compared."
        )
    sides = [
        Side(
            path=str(path),
            size_bytes=size_on_disk(path),
            nodes=node_count(model),
            parameters=parameter_count(model),
            ops=op_histogram(model),
        )
        for path, model in zip((a, b), models, strict=True)
    ]
    compared = {entry.tensor for entry in outputs}
    return Comparison(
        a=sides[0],
        b=sides[1],
        outputs=outputs,
        not_compared=[
            name for name in dict.fromkeys([*session.output_names, *other.output_names]) if name not in compared
        ],
        layers=layer_errors(*models, feeds),
        only_a=sorted(names[0] - names[1]),
        only_b=sorted(names[1] - names[0]),
        feeds=source,
    )


def _runs(session: Session, feed: Feed) -> bool:
    try:
        results = session.run(feed)
    except ModelError:
        return False
    return any(isinstance(value, np.ndarray) for value in results.values())
