"""A loaded ONNX model: a graphsurgeon graph that passes rewrite, and everything else that was in the file."""

from __future__ import annotations

import contextlib
import functools
import itertools
import mmap
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError
from onnx import TensorProto

from onnxslim.copying import copy_graphs, uncollected
from onnxslim.errors import ModelError, OutputError
from onnxslim.proto import export_function, export_graph, import_function, import_graph
from onnxslim.tensors import (
    ExternalFile,
    Payload,
    TensorSource,
    TensorWriter,
    copy_fields,
    inline_tensor,
    outlined_tensor,
    payload_of,
    source_of,
    tensor_nbytes,
)
from onnxslim.wire import Buffer, cut_index, mark, outline, splice

__all__ = [
    "SMALL_TENSOR",
    "Model",
    "atomic_write",
    "external_finder",
    "is_cut",
    "load",
    "read_skeleton",
]

# protobuf refuses to serialise or parse a message of 2 GiB or more; the rest of the file must fit as well.
_SINGLE_FILE_LIMIT = 2**31 - 2**24
# Below this an external tensor would cost more in its entry than it saves, and shape inference wants small ones inline.
SMALL_TENSOR = 1024
# A second file is a burden to whoever moves models about: smaller weights are better off in the first.
_WORTH_A_FILE = 2**20
_ALIGNMENT = 4096


class Model:
    """An ONNX model in memory.

    Attributes:
        graph: the main graph; ``graph.functions`` are the local functions.
        header: the ModelProto without graph and functions: IR version, opset imports, producer, metadata, ….
        path: the file it was read from, if any. That file is never written to.
    """

    def __init__(self, graph: gs.Graph, header: onnx.ModelProto, path: Path | None = None) -> None:
        self.graph = graph
        self.header = header
        self.path = path
        self._names: set[str] | None = None

    @property
    def opset(self) -> int:
        """The version of the default operator set; 1 where the file imports none."""
        return next((entry.version for entry in self.header.opset_import if entry.domain in ("", "ai.onnx")), 1)

    @property
    def ir_version(self) -> int:
        """The version of the ONNX file format."""
        return int(self.header.ir_version)

    def graphs(self) -> Iterator[gs.Graph]:
        """Yield the main graph, every nested If, Loop and Scan body, and every local function with its bodies."""
        stack: list[gs.Graph] = [*reversed(self.graph.functions), self.graph]
        while stack:
            graph = stack.pop()
            yield graph
            bodies = [value for node in graph.nodes for value in node.attrs.values() if isinstance(value, gs.Graph)]
            stack.extend(reversed(bodies))

    def constants(self) -> Iterator[gs.Constant]:
        """Yield every constant once: initializers, tensors in attributes, defaults of inputs."""
        seen: set[int] = set()
        for graph in self.graphs():
            for constant in _constants_of(graph):
                if id(constant) not in seen:
                    seen.add(id(constant))
                    yield constant

    def fresh_name(self, hint: str) -> str:
        """Return ``hint``, or ``hint`` with a number, such that no tensor or node of the model has that name."""
        taken = self._taken_names()
        name = hint
        for number in itertools.count(1):
            if name not in taken:
                break
            name = f"{hint}_{number}"
        taken.add(name)
        return name

    def _taken_names(self) -> set[str]:
        if self._names is None:
            self._names = {""}
            for graph in self.graphs():
                for constant in graph.__dict__.get("initializers", ()):
                    self._names.add(constant.name)
                for tensor in (*graph.inputs, *graph.outputs):
                    self._names.add(tensor.name)
                for node in graph.nodes:
                    self._names.add(node.name)
                    self._names.update(tensor.name for tensor in (*node.inputs, *node.outputs))
        return self._names

    def around(self, body: gs.Graph) -> Model:
        """A model of which one of this model's bodies is the main graph; a name that is fresh in it is so in both."""
        part = Model(body, self.header, self.path)
        part._names = self._taken_names()
        return part

    # ------------------------------------------------------------------------------------------------- conversions

    @uncollected()
    def export(self, write: TensorWriter) -> onnx.ModelProto:
        """Return the model as a ModelProto in which ``write`` says how each tensor is written."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.header)
        export_graph(self.graph, ir_version=self.ir_version, opset=self.opset, write=write, into=proto.graph)
        for function in self.graph.functions:
            export_function(
                function, ir_version=self.ir_version, opset=self.opset, write=write, into=proto.functions.add()
            )
        return proto

    def to_proto(self) -> onnx.ModelProto:
        """Return the model as a ModelProto with all weights inside, external ones included."""
        return self.export(inline_tensor)

    def to_skeleton(self) -> onnx.ModelProto:
        """Return the model without its large weights: shapes, types and every tensor below 1 KiB, for analysis.

        The large ones claim to lie in an external file that does not exist.
        """

        def write(constant: gs.Constant) -> TensorProto:
            if tensor_nbytes(constant) < SMALL_TENSOR or constant.dtype.kind in "OUS":
                return inline_tensor(constant)
            return outlined_tensor(constant, location="skeleton")

        return self.export(write)

    def copy(self, nodes: Sequence[gs.Node] | None = None) -> Model:
        """Return an independent copy of the structure. Weights are shared: values are replaced, never mutated.

        Args:
            nodes: those of the main graph to copy, in order; all of them when absent. What makes the tensors that they
                read, and the graph outputs, may be missing then.
        """
        header = onnx.ModelProto()
        header.CopyFrom(self.header)
        return Model(copy_graphs(self.graph, nodes), header, self.path)

    # ------------------------------------------------------------------------------------------------------ saving

    def save(self, path: str | Path, *, external_data: bool = False) -> None:
        """Write the model, whole or not at all.

        Weights go into the file itself; into ``<name>.data`` beside it where ``external_data`` asks for it, where one
        file cannot hold them (2 GB), or where 1 MB or more of them still are what was read from external data: who has
        kept them apart wants them apart.

        Raises:
            OutputError: the folder does not exist or cannot be written, or the write would replace a file that this
                model is still read from.
            ModelError: a file with external weights has become shorter since the model was loaded.
        """
        path = Path(path)
        total = sum(tensor_nbytes(constant) for constant in self.constants())
        external = sum(source.external.length for source in self._sources() if source.external)
        if external_data or total >= _SINGLE_FILE_LIMIT or external >= _WORTH_A_FILE:
            self._save_beside(path)
            return
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            for piece in self._pieces():
                if isinstance(piece, bytes):
                    file.write(piece)
                else:
                    piece.write(file)

    def to_bytes(self) -> bytes:
        """Return the model serialised, with all weights inside: :meth:`to_proto` without protobuf's own copies."""
        return b"".join(piece if isinstance(piece, bytes) else piece.read() for piece in self._pieces())

    def _pieces(self) -> Iterator[bytes | Payload]:
        """Yield what a file with all weights inside consists of."""
        payloads: list[Payload] = []

        def write(constant: gs.Constant) -> TensorProto:
            payload = payload_of(constant) if tensor_nbytes(constant) >= SMALL_TENSOR else None
            if payload is None:
                return inline_tensor(constant)
            payloads.append(payload)
            tensor = outlined_tensor(constant)
            tensor.raw_data = mark(len(payloads) - 1)
            return tensor

        skeleton = self.export(write).SerializeToString()
        for piece in splice(skeleton, [payload.size for payload in payloads]):
            yield piece if isinstance(piece, bytes) else payloads[piece]

    def _save_beside(self, path: Path) -> None:
        """Write the model with its large weights in a file beside it."""
        data_path = path.with_name(path.name + ".data")
        if data_path.resolve() in {source.external.path.resolve() for source in self._sources() if source.external}:
            raise OutputError(f"{data_path}: holds the weights of the model being saved; choose another output name.")
        with (
            atomic_write(path) as temporary,
            atomic_write(data_path) as temporary_data,
            temporary_data.open("wb") as file,
        ):
            temporary.write_bytes(self.export(_external_writer(file, data_path.name)).SerializeToString())

    def _sources(self) -> Iterator[TensorSource]:
        for constant in self.constants():
            source = source_of(constant)
            if source is not None:
                yield source


def _constants_of(graph: gs.Graph) -> Iterator[gs.Constant]:
    """Yield the constants that one graph defines or uses, some more than once."""
    candidates: list[Any] = list(graph.__dict__.get("initializers", ()))
    candidates += [tensor.default for tensor in graph.inputs if "default" in tensor.__dict__]
    for node in graph.nodes:
        candidates += [*node.inputs, *node.attrs.values()]
    candidates += graph.outputs
    yield from (tensor for tensor in candidates if isinstance(tensor, gs.Constant))


def _external_writer(file: BinaryIO, location: str) -> TensorWriter:
    def write(constant: gs.Constant) -> TensorProto:
        payload = payload_of(constant) if tensor_nbytes(constant) >= SMALL_TENSOR else None
        if payload is None:
            return inline_tensor(constant)
        file.seek(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT)
        offset = file.tell()
        payload.write(file)
        return outlined_tensor(constant, location=location, offset=offset, length=payload.size)

    return write


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside ``path`` that takes its place when the block ends well, and is removed if not."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}).") from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}).") from None
    finally:
        temporary.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------------- loading


def load(source: str | Path | bytes | onnx.ModelProto | Model) -> Model:
    """Load a model from a file, from bytes or from a ModelProto; a Model is copied.

    The weights of a file are held once; external ones are mapped, so a model larger than memory can be opened. A
    ModelProto is not changed, and its weights are copied when they are first used.

    Raises:
        ModelError: the file is missing, not ONNX, truncated, or its external data is missing, too short or outside of
            its folder.
    """
    if isinstance(source, Model):
        return source.copy()
    if isinstance(source, onnx.ModelProto):
        return _from_proto(source, None, _no_external("<ModelProto>"))
    if isinstance(source, bytes):
        return _load(source, lambda offset, size: np.frombuffer(source, np.uint8, size, offset), "<bytes>", None)
    path = Path(source)
    with _opened(path) as (content, part):
        return _load(content, part, str(path), path)


def read_skeleton(path: Path) -> onnx.ModelProto:
    """A model file as a proto without its large weights, which :func:`is_cut` tells from those in other files.

    Raises:
        ModelError: the file is missing, not ONNX or truncated.
    """
    with _opened(path) as (content, _):
        return _parse(outline(content, SMALL_TENSOR)[0], str(path))


def is_cut(tensor: TensorProto) -> bool:
    """Whether a tensor of a skeleton lies in the model file itself."""
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    return cut_index(location) is not None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Buffer, Callable[[int, int], np.ndarray]]]:
    """The content of a file, mapped where it can be, and what gives the bytes of a weight by offset and size."""
    try:
        with path.open("rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode) or not os.fstat(file.fileno()).st_size:
                content = file.read()
                yield content, lambda at, size: np.frombuffer(content, np.uint8, size, at)
                return
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                yield mapped, functools.partial(_read_part, file)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}).") from None


def _read_part(file: BinaryIO, offset: int, size: int) -> np.ndarray:
    """A part of a file in memory of its own, so that it may go while others stay, shape (size,)."""
    part = np.empty(size, np.uint8)
    file.seek(offset)
    if file.readinto(part.data) < size:  # type: ignore[attr-defined]
        raise ModelError(f"{file.name}: became shorter while it was read.")
    return part


def _load(content: Buffer, part: Callable[[int, int], np.ndarray], name: str, path: Path | None) -> Model:
    """Load a serialised model; ``part`` gives the bytes of a weight by offset and size."""
    elsewhere = _no_external(name) if path is None else external_finder(path)
    skeleton, spans = outline(content, SMALL_TENSOR)
    found: set[int] = set()

    def find(tensor: TensorProto) -> TensorSource:
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        index = cut_index(location)
        if index is None:
            return elsewhere(tensor)
        found.add(index)
        del tensor.external_data[:]
        tensor.ClearField("data_location")
        return TensorSource(tensor, raw=part(*spans[index]))

    model = _from_proto(_parse(skeleton, name), path, find)
    if len(found) < len(spans):  # some lie where nobody makes a constant of them
        model = _from_proto(_parse(content[:], name), path, elsewhere)
    return model


def _parse(content: bytes, name: str) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(content)
    except DecodeError:
        raise ModelError(f"{name}: not an ONNX model, or truncated: it does not parse.") from None
    if not proto.HasField("graph") or proto.ir_version <= 0:
        raise ModelError(f"{name}: not an ONNX model: it has no {'graph' if proto.ir_version > 0 else 'IR version'}.")
    return proto


@uncollected()
def _from_proto(proto: onnx.ModelProto, path: Path | None, external: Callable[[TensorProto], TensorSource]) -> Model:
    header = onnx.ModelProto()
    copy_fields(proto, header, frozenset({"graph", "functions"}))
    model = Model(gs.Graph(), header, path)
    try:
        model.graph = import_graph(
            proto.graph,
            opset=model.opset,
            ir_version=model.ir_version,
            imports=header.opset_import,
            external=external,
        )
        model.graph.functions = [
            import_function(function, opset=model.opset, ir_version=model.ir_version, external=external)
            for function in proto.functions
        ]
    except ModelError as error:
        raise ModelError(f"{path}: {error}" if path and str(path) not in str(error) else str(error)) from None
    return model


def _no_external(name: str) -> Callable[[TensorProto], TensorSource]:
    def find(tensor: TensorProto) -> TensorSource:
        raise ModelError(
            f"{name}: tensor {tensor.name!r} lies in an external file; pass the path of the model instead."
        )

    return find


def external_finder(model_path: Path) -> Callable[[TensorProto], TensorSource]:
    """What finds the bytes of a tensor outside of a model file.

    It raises ModelError where the file is missing, too short or outside of the model's folder.
    """
    folder = model_path.parent.resolve()
    # Download caches keep models as links into one folder of blobs; weights may lie where their model really does.
    roots = (folder, model_path.resolve().parent)
    sizes: dict[Path, int] = {}

    def find(tensor: TensorProto) -> TensorSource:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        where = f"{model_path}: tensor {tensor.name!r}"
        path = (folder / location).resolve()
        # Neither "../" nor, as resolve() follows it, a link can lead out of the folder.
        inside = Path(os.path.normpath(folder / location)).is_relative_to(folder)
        if not location or not inside or not any(path.is_relative_to(root) for root in roots):
            raise ModelError(f"{where}: its external data {location!r} is outside the model's folder; refused.")
        if path not in sizes:
            if not path.is_file():
                raise ModelError(f"{where}: its external data file {location!r} is missing beside the model.")
            sizes[path] = path.stat().st_size
        try:
            offset = int(entries.get("offset", 0))
            length = int(entries.get("length", sizes[path] - offset))
        except ValueError:
            raise ModelError(f"{where}: its external data has a broken offset or length.") from None
        source = TensorSource(tensor, ExternalFile(path, offset, length))
        if offset < 0 or length < 0 or offset + length > sizes[path]:
            raise ModelError(f"{where}: its external data file {location!r} is too short; is it truncated?")
        if length != source.nbytes:
            if "length" in entries:
                raise ModelError(f"{where}: needs {source.nbytes} bytes of external data, the file says {length}.")
            if length < source.nbytes:
                raise ModelError(f"{where}: its external data file {location!r} is too short; is it truncated?")
            source.external = ExternalFile(path, offset, source.nbytes)
        return source

    return find
