"""A loaded ONNX model: a graphsurgeon graph that passes rewrite, and everything else that was in the file."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper

from onnxslim.errors import ModelError, OutputError
from onnxslim.proto import export_function, export_graph, import_function, import_graph
from onnxslim.tensors import (
    ExternalFile,
    TensorSource,
    TensorWriter,
    array_to_tensor,
    copy_fields,
    inline_tensor,
    tensor_nbytes,
)

__all__ = ["Model", "atomic_write", "check_not_input", "external_files", "file_sha256", "load", "size_on_disk"]

# protobuf refuses to serialise or parse a message of 2 GiB or more; the rest of the file must fit as well.
_SINGLE_FILE_LIMIT = 2**31 - 2**24
# Below this an external tensor would cost more in its entry than it saves, and shape inference wants small ones inline.
_SMALL_TENSOR = 1024
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

    def fresh_name(self, hint: str) -> str:
        """Return ``hint``, or ``hint`` with a number, such that no tensor or node of the model has that name."""
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
        name = hint
        for number in itertools.count(1):
            if name not in self._names:
                break
            name = f"{hint}_{number}"
        self._names.add(name)
        return name

    # ------------------------------------------------------------------------------------------------- conversions

    def _export(self, write: TensorWriter) -> onnx.ModelProto:
        proto = onnx.ModelProto()
        proto.CopyFrom(self.header)
        proto.graph.CopyFrom(export_graph(self.graph, ir_version=self.ir_version, opset=self.opset, write=write))
        for function in self.graph.functions:
            proto.functions.append(export_function(function, ir_version=self.ir_version, opset=self.opset, write=write))
        return proto

    def to_proto(self) -> onnx.ModelProto:
        """Return the model as a ModelProto with all weights inside, external ones included."""
        return self._export(inline_tensor)

    def to_skeleton(self) -> onnx.ModelProto:
        """Return the model without its large weights: shapes, types and every tensor below 1 KiB, for analysis.

        The large ones claim to lie in an external file that does not exist.
        """

        def write(constant: gs.Constant) -> TensorProto:
            if tensor_nbytes(constant) < _SMALL_TENSOR or constant.dtype == object:
                return inline_tensor(constant)
            tensor = _outline(constant)
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="skeleton")
            return tensor

        return self._export(write)

    def copy(self) -> Model:
        """Return an independent copy of the structure. Weights are shared: values are replaced, never mutated."""
        shared: list[Any] = []

        def write(constant: gs.Constant) -> TensorProto:
            tensor = _outline(constant)
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value=str(len(shared)))
            shared.append((constant._values, constant.__dict__.get("source")))
            return tensor

        proto = self._export(write)
        copied = _from_proto(proto, self.path, lambda tensor: TensorSource(tensor))
        for graph in copied.graphs():
            for constant in _every_constant(graph):
                source = constant._values
                if not isinstance(source, TensorSource) or source.sparse:
                    continue
                for entry in source.tensor.external_data:
                    constant._values, constant.source = shared[int(entry.value)]
        return copied

    # ------------------------------------------------------------------------------------------------------ saving

    def save(self, path: str | Path) -> None:
        """Write the model, whole or not at all; from 2 GB on with its weights in ``<name>.data`` beside it.

        Raises:
            OutputError: the folder does not exist or cannot be written, or the write would replace a file that this
                model is still read from.
        """
        path = Path(path)
        data_path = path.with_name(path.name + ".data")
        total = sum(tensor_nbytes(constant) for graph in self.graphs() for constant in _every_constant(graph))
        with atomic_write(path) as temporary:
            if total < _SINGLE_FILE_LIMIT:
                temporary.write_bytes(self.to_proto().SerializeToString())
                return
            read_from = {source.external.path.resolve() for source in self._sources() if source.external}
            if data_path.resolve() in read_from:
                raise OutputError(
                    f"{data_path}: holds the weights of the model being saved; choose another output name."
                )
            with atomic_write(data_path) as temporary_data, temporary_data.open("wb") as file:
                proto = self._export(_external_writer(file, data_path.name))
                temporary.write_bytes(proto.SerializeToString())

    def _sources(self) -> Iterator[TensorSource]:
        for graph in self.graphs():
            for constant in _every_constant(graph):
                if isinstance(constant._values, TensorSource):
                    yield constant._values


def _every_constant(graph: gs.Graph) -> Iterator[gs.Constant]:
    """Yield every constant of one graph once: initializers, tensors in attributes, defaults of inputs."""
    seen: set[int] = set()
    candidates: list[Any] = list(graph.__dict__.get("initializers", ()))
    candidates += [tensor.default for tensor in graph.inputs if "default" in tensor.__dict__]
    for node in graph.nodes:
        candidates += [*node.inputs, *(value for value in node.attrs.values() if isinstance(value, gs.Constant))]
    candidates += graph.outputs
    for tensor in candidates:
        if isinstance(tensor, gs.Constant) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor


def _outline(constant: gs.Constant) -> TensorProto:
    """The TensorProto of a constant without its values."""
    values = constant._values
    if isinstance(values, TensorSource):
        if values.sparse:
            raise AssertionError("sparse initializers are written whole")
        data_type = values.tensor.data_type
    elif values.dtype == object or values.dtype.kind in "US":
        data_type = TensorProto.STRING
    else:
        data_type = helper.np_dtype_to_tensor_dtype(values.dtype)
    return TensorProto(name=constant.name, data_type=data_type, dims=values.shape)


def _external_writer(file: Any, location: str) -> TensorWriter:
    def write(constant: gs.Constant) -> TensorProto:
        if tensor_nbytes(constant) < _SMALL_TENSOR or constant.dtype == object:
            return inline_tensor(constant)
        source = constant._values
        if isinstance(source, TensorSource):
            raw: Any = source.inline().raw_data or array_to_tensor("", source.load()).raw_data
        else:
            raw = array_to_tensor("", source).raw_data
        file.seek(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT)
        offset = file.tell()
        file.write(raw)
        tensor = _outline(constant)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", offset), ("length", len(raw))):
            tensor.external_data.add(key=key, value=str(value))
        return tensor

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

    Weights are read when first used; external ones are mapped, so a model larger than memory can be opened.

    Raises:
        ModelError: the file is missing, not ONNX, truncated, or its external data is missing, too short or outside of
            its folder.
    """
    if isinstance(source, Model):
        return source.copy()
    if isinstance(source, onnx.ModelProto):
        return _from_proto(source, None, _no_external("<ModelProto>"))
    if isinstance(source, bytes):
        return _from_proto(_parse(source, "<bytes>"), None, _no_external("<bytes>"))
    path = Path(source)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}).") from None
    return _from_proto(_parse(content, str(path)), path, _external_finder(path))


def _parse(content: bytes, name: str) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(content)
    except DecodeError:
        raise ModelError(f"{name}: not an ONNX model, or truncated: it does not parse.") from None
    if not proto.HasField("graph") or proto.ir_version <= 0:
        raise ModelError(f"{name}: not an ONNX model: it has no {'graph' if proto.ir_version > 0 else 'IR version'}.")
    return proto


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


def _external_finder(model_path: Path) -> Callable[[TensorProto], TensorSource]:
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


# ------------------------------------------------------------------------------------------------- files on the disk


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
    return tuple(sorted({source.external.path for source in load(path)._sources() if source.external}))


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
