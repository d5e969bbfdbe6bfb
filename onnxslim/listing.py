"""Looking at models without changing them, for ``slim(..., inspect=True)``: a table, and every node as a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from onnxslim.console_slim import print_figures
from onnxslim.graph.shapes import infer_shapes
from onnxslim.ledger import figures
from onnxslim.model import Model, atomic_write, load
from onnxslim.model_files import size_on_disk
from onnxslim.runtime import ModelSource

__all__ = ["look_at"]


def look_at(models: Sequence[ModelSource], *, dump: bool) -> None:
    """Print what models are made of, side by side; with ``dump`` also write the nodes of each to a CSV file.

    Raises:
        ModelError: a model cannot be read.
        OutputError: the working folder cannot be written.
    """
    loaded = [load(model) for model in models]
    names = [model.path.name if model.path else "OnnxModel" for model in loaded]
    counted = [figures(model, size_on_disk(model.path) if model.path else None) for model in loaded]
    print_figures(Console(), names, counted)
    for name, model in zip(names, loaded, strict=True):
        if dump:
            _dump(model, Path(f"{name}_model_info.csv"))


def _dump(model: Model, path: Path) -> None:
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("NodeName", "OpType", "OutputDtype", "OutputShape"))
        writer.writerows(_rows(model))


def _rows(model: Model) -> Iterator[tuple[str, str, str, str]]:
    """One row an output; the name and the op of a node stand in its first row only."""
    shapes = infer_shapes(model)
    for graph in model.graphs():
        for node in graph.nodes:
            name, op = node.name, node.op
            for tensor in node.outputs:
                dtype, shape = shapes.dtype(tensor), shapes.shape(tensor)
                yield name, op, "" if dtype is None else str(dtype), "" if shape is None else str(tuple(shape))
                name = op = ""
