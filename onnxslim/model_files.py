"""The files that a model lies in: which they are, their size, their hash."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import TensorProto

from onnxslim.errors import OutputError
from onnxslim.model import Model, external_finder, is_cut, read_skeleton

__all__ = ["check_not_input", "external_files", "file_sha256", "size_on_disk"]


def check_not_input(model: Model, output: Path) -> None:
    """Refuse to write a result, or the weights beside it, over a file that the model was read from.

    Raises:
        OutputError: it would.
    """
    if model.path is None:
        return
    read = {file.resolve() for file in (model.path, *external_files(model.path))}
    for file in (output, output.with_name(output.name + ".data")):
        if file.resolve() in read:
            raise OutputError(f"{output}: is the input, or holds its weights; choose another name for the result.")


def external_files(path: Path) -> list[Path]:
    """The files beside a model in which its external weights lie, each once, sorted.

    Raises:
        ModelError: as :func:`load`.
    """
    state = path.stat() if path.is_file() else None
    return list(_external_files(path, state and (state.st_mtime_ns, state.st_size, state.st_ino)))


@functools.lru_cache(maxsize=64)
def _external_files(path: Path, _state: tuple[int, ...] | None) -> tuple[Path, ...]:
    """Parse a file for this once, however often its size and hash are asked for, until it is another file."""
    find = external_finder(path)
    external = (tensor for tensor in _tensors(read_skeleton(path)) if tensor.data_location == TensorProto.EXTERNAL)
    sources = (find(tensor) for tensor in external if not is_cut(tensor))
    return tuple(sorted({source.external.path for source in sources if source.external}))


def _tensors(proto: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every tensor of a model: initializers and attributes, of bodies and functions too."""
    graphs, nodes = [proto.graph], [node for function in proto.functions for node in function.node]
    while graphs or nodes:
        while graphs:
            graph = graphs.pop()
            yield from graph.initializer
            nodes += graph.node
        for attribute in nodes.pop().attribute if nodes else ():
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            graphs += [attribute.g] if attribute.HasField("g") else attribute.graphs


def size_on_disk(path: Path) -> int:
    """Bytes of a model file and of its external data files."""
    return path.stat().st_size + sum(file.stat().st_size for file in external_files(path))


def file_sha256(path: Path) -> str:
    """SHA-256 of a model, as hex: of its file and then of the files with its external data."""
    digest = hashlib.sha256()
    for part in (path, *external_files(path)):
        with part.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
