"""Where and how far two models differ: in their outputs, layer by layer, and in what they are made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
from pydantic import BaseModel

from onnxslim.data import Dataset, open_dataset, random_feeds
from onnxslim.errors import DataError, ModelError
from onnxslim.graph.cost import node_count, op_histogram, parameter_count
from onnxslim.graph.difference import graph_difference
from onnxslim.graph.shapes import infer_shapes
from onnxslim.guard import layer_errors, output_errors
from onnxslim.model import Model, load
from onnxslim.model_files import size_on_disk
from onnxslim.record import GraphDifference, LayerError
from onnxslim.runtime import Feed, Session

__all__ = ["Comparison", "Side", "compare"]

_MADE_UP = 4


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
        feeds: how many inputs the errors are over, and where those came from.
        not_run: why there are no errors: a model that does not load or run, inputs that do not fit.
        difference: which nodes of the first became which of the second.
    """

    a: Side
    b: Side
    outputs: list[LayerError] = []
    not_compared: list[str] = []
    layers: list[LayerError] = []
    feeds: str = ""
    not_run: str = ""
    difference: GraphDifference

    @property
    def equal(self) -> bool:
        """Whether every output of either was compared and the same to the last bit."""
        compared = not self.not_run and not self.not_compared
        return compared and all(entry.max_abs_error == 0 for entry in self.outputs)


def compare(
    a: Path, b: Path, *, data: Path | None = None, shapes: dict[str, list[int]] | None = None, samples: int = 16
) -> Comparison:
    """Compare two model files: what they are made of, and what they compute on data or on made-up inputs.

    Inputs and outputs of other names, as another exporter gives them, are taken in order.

    Args:
        a: the reference.
        b: what is compared with it.
        data: as for ``optimize``; labels are not needed.
        shapes: sizes for dynamic inputs of made-up feeds.
        samples: how many samples at the most.

    Raises:
        ModelError: a file cannot be read.
        DataError: the data does not fit, or the model does not run on it.
        RecipeError: ``shapes`` does not fit.
    """
    models = (load(a), load(b))
    infer_shapes(models[0], shapes)  # refuses sizes for inputs that are not there
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
    found = Comparison(a=sides[0], b=sides[1], difference=graph_difference(*models))
    try:
        return _compare_results(found, models, _feeds(models[0], data, shapes or {}, samples))
    except ModelError as error:
        return found.model_copy(update={"not_run": str(error)})


def _feeds(model: Model, data: Path | None, shapes: dict[str, list[int]], samples: int) -> tuple[list[Feed], str]:
    """Inputs that the reference runs on, and what to call them."""
    session = Session(model)
    if data is not None:
        dataset: Dataset = open_dataset(data, session.specs, role="comparison")
        feeds = list(dataset.take(samples))
        return feeds, f"{len(feeds)} of {dataset.samples} samples of {data}"
    try:
        made_up = list(random_feeds(session.specs, fixed=shapes, seed=0, count=_MADE_UP))
    except DataError as error:  # a sequence, say: the graphs can be compared all the same
        raise ModelError(str(error)) from None
    feeds = [feed for feed in made_up if _runs(session, feed)]
    if not feeds:
        raise ModelError(f"{model.path}: does not run on made-up inputs; give --data.")
    return feeds, f"{len(feeds)} made-up inputs"


def _compare_results(found: Comparison, models: tuple[Model, Model], given: tuple[list[Feed], str]) -> Comparison:
    feeds, source = given
    other_model = _with_names_of(models[0], models[1])
    session, other = Session(models[0]), Session(other_model)
    outputs = output_errors(session, other, feeds)
    if not outputs:
        raise ModelError("the two gave no numbers of the same output name and shape.")
    compared = {entry.tensor for entry in outputs}
    names = dict.fromkeys([*session.output_names, *other.output_names])
    return found.model_copy(
        update={
            "outputs": outputs,
            "not_compared": [name for name in names if name not in compared],
            "layers": layer_errors(models[0], other_model, feeds),
            "feeds": source,
        }
    )


def _with_names_of(reference: Model, model: Model) -> Model:
    """The model, or a copy of it whose inputs and outputs are called as those of the reference, in order."""
    sides = [[*each.graph.inputs, *each.graph.outputs] for each in (reference, model)]
    counts = [(len(each.graph.inputs), len(each.graph.outputs)) for each in (reference, model)]
    names = [{tensor.name for tensor in side} for side in sides]
    if names[0] == names[1] or names[0] & names[1] or counts[0] != counts[1]:
        return model
    copy = model.copy()
    wanted = [tensor.name for tensor in sides[0]]
    for tensor in _inner(copy):
        if tensor.name in names[0]:
            tensor.name = copy.fresh_name(f"inner_{tensor.name}")
    for tensor, name in zip([*copy.graph.inputs, *copy.graph.outputs], wanted, strict=True):
        tensor.name = name
    return copy


def _inner(model: Model) -> list[gs.Tensor]:
    """The tensors of all graphs that are neither inputs nor outputs of the main graph."""
    ends = {id(tensor) for tensor in (*model.graph.inputs, *model.graph.outputs)}
    tensors = [tensor for graph in model.graphs() for node in graph.nodes for tensor in (*node.inputs, *node.outputs)]
    return [tensor for tensor in {id(t): t for t in tensors}.values() if id(tensor) not in ends and tensor.name]


def _runs(session: Session, feed: Feed) -> bool:
    try:
        results = session.run(feed)
    except ModelError:
        return False
    return any(isinstance(value, np.ndarray) for value in results.values())
