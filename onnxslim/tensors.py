"""Tensors of a model file as graphsurgeon constants and variables: where their values lie, what is declared of them."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxslim.errors import ModelError

__all__ = [
    "NO_SYMBOLS",
    "ExternalFile",
    "Payload",
    "TensorSource",
    "TensorWriter",
    "array_to_tensor",
    "copy_fields",
    "declare",
    "declared_type",
    "inline_tensor",
    "make_constant",
    "outlined_tensor",
    "payload_of",
    "source_of",
    "tensor_nbytes",
    "value_info",
]

NO_SYMBOLS = frozenset({"", "?", "-1", "None"})
"""What exporters write for a size that they do not know; two axes with such a name need not be equal."""

TensorWriter = Callable[[gs.Constant], TensorProto]
"""Turns a constant into the TensorProto to write: with its bytes, as a placeholder, or pointing at a data file."""


def copy_fields(source: Any, target: Any, skip: frozenset[str]) -> None:
    """Copy every field of a protobuf that is set, those of newer ONNX versions too, but the ones in ``skip``."""
    for field, value in source.ListFields():
        if field.name in skip:
            continue
        if isinstance(value, (int, float, str, bytes)):
            setattr(target, field.name, value)
        else:
            getattr(target, field.name).MergeFrom(value)


@dataclass(frozen=True)
class ExternalFile:
    """Where the bytes of one tensor lie outside the model file; checked to be inside the model's folder."""

    path: Path
    offset: int
    length: int


class TensorSource(LazyValues):  # type: ignore[misc]
    """The values of a constant that are still where the file has them, loaded when first read.

    Attributes:
        tensor: the TensorProto or SparseTensorProto.
        shape: dimensions, a tuple.
        dtype: NumPy dtype (``ml_dtypes`` for bfloat16, float8 and 4-bit types; object for strings).
        external: where the bytes are, when they lie in a file of their own.
        raw: the bytes, shape (bytes,), when they were cut out of the model file; ``tensor`` then holds none.
    """

    def __init__(
        self,
        tensor: TensorProto | onnx.SparseTensorProto,
        external: ExternalFile | None = None,
        raw: np.ndarray | None = None,
    ) -> None:
        self.tensor = tensor
        self.external = external
        self.raw = raw
        self.shape = tuple(tensor.dims)
        self.sparse = isinstance(tensor, onnx.SparseTensorProto)
        data_type = tensor.values.data_type if self.sparse else tensor.data_type
        try:
            self.dtype = helper.tensor_dtype_to_np_dtype(data_type)
        except KeyError:
            name = tensor.values.name if self.sparse else tensor.name
            raise ModelError(
                f"tensor {name!r}: unknown data type {data_type}; the file is corrupt or too new."
            ) from None
        self._loaded: weakref.ref[np.ndarray] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the dense values as ONNX stores them (4-bit types packed in pairs)."""
        count: int = math.prod(self.shape)
        return (count * _bits(self.dtype) + 7) // 8

    def load(self) -> np.ndarray:
        """Return the values as a read-only array; a read-only view of the file where they lie outside the model."""
        array = self._loaded() if self._loaded is not None else None
        if array is None:
            array = self._read()
            array.flags.writeable = False
            self._loaded = weakref.ref(array)
        return array

    def is_source_of(self, values: object) -> bool:
        """Whether ``values`` is what :meth:`load` returned, so that writing the proto again writes the same."""
        return values is self or (self._loaded is not None and self._loaded() is values)

    def _read(self) -> np.ndarray:
        if self.sparse:
            return _dense(self.tensor)
        if self.dtype == object:
            return _strings(self.tensor)
        raw = self._mapped() if self.external is not None else self.raw
        try:
            if raw is not None and _bits(self.dtype) >= 8:
                dtype = self.dtype.newbyteorder("<") if self.dtype.kind in "iufc" else self.dtype
                array: np.ndarray = raw.view(dtype).reshape(self.shape)
                return array
            tensor = self.tensor if raw is None else self.inline()
            return np.asarray(onnx.numpy_helper.to_array(tensor)).reshape(self.shape).view()
        except (ValueError, TypeError) as error:
            raise ModelError(f"initializer {self.tensor.name!r}: its data does not fit its shape ({error}).") from None

    def _mapped(self) -> np.ndarray:
        """The bytes of external data, shape (bytes,), read from the file page by page when they are used."""
        assert self.external is not None
        path, offset, length = self.external.path, self.external.offset, self.external.length
        if length == 0:
            return np.empty(0, np.uint8)
        return np.asarray(np.memmap(path, mode="r", offset=offset, dtype=np.uint8, shape=(length,)))

    def inline(self) -> TensorProto:
        """The tensor with its bytes inside the proto, dense."""
        if self.sparse:
            return array_to_tensor(self.tensor.values.name, self.load())
        tensor = TensorProto()
        tensor.CopyFrom(self.tensor)
        if self.external is not None:
            tensor.raw_data = Payload(self.external.length, self.external).read()
            del tensor.external_data[:]
            tensor.ClearField("data_location")
        elif self.raw is not None:
            tensor.raw_data = self.raw.tobytes()
        return tensor


# ------------------------------------------------------------------------------------------------- bytes of weights


@dataclass(frozen=True)
class Payload:
    """The raw data of one tensor as a model file holds it, wherever it lies now.

    Attributes:
        size: in bytes.
        place: a file, an array of shape (bytes,), or a TensorProto with raw data.
    """

    size: int
    place: ExternalFile | np.ndarray | TensorProto

    def read(self) -> bytes:
        """The bytes, in memory.

        Raises:
            ModelError: the file is shorter than it was when the model was loaded.
        """
        if isinstance(self.place, ExternalFile):
            with self.place.path.open("rb") as file:
                file.seek(self.place.offset)
                content = file.read(self.size)
            if len(content) < self.size:
                raise ModelError(f"{self.place.path}: became shorter while the model was in use; load it again.")
            return content
        return bytes(self.place.raw_data) if isinstance(self.place, TensorProto) else self.place.tobytes()

    def write(self, file: BinaryIO) -> None:
        """Append the bytes to a file; from another file they go there without passing through this process.

        Raises:
            ModelError: the file that they are in is shorter than it was when the model was loaded.
        """
        if isinstance(self.place, np.ndarray):
            file.write(self.place.data)
        elif not isinstance(self.place, ExternalFile) or not _copied(self.place, file):
            file.write(self.read())


def _copied(source: ExternalFile, file: BinaryIO) -> bool:
    """Let the system copy a part of one file to the end of another; False where it cannot, and nothing is written."""
    if not hasattr(os, "copy_file_range"):
        return False
    file.flush()
    start = file.tell()
    with source.path.open("rb") as origin:
        done = 0
        while done < source.length:
            try:
                count = os.copy_file_range(
                    origin.fileno(), file.fileno(), source.length - done, source.offset + done, start + done
                )
            except OSError:
                count = 0
            if not count:
                file.seek(start)
                return False
            done += count
    file.seek(start + done)
    return True


def outlined_tensor(constant: gs.Constant, **external: str | int) -> TensorProto:
    """The TensorProto of a constant without its values, and what it says of external data, such as the location."""
    source = source_of(constant)
    if source is not None and (source.external is not None or source.raw is not None):
        tensor = TensorProto()
        tensor.CopyFrom(source.tensor)
        del tensor.external_data[:]
        tensor.ClearField("data_location")
    else:
        data_type = helper.np_dtype_to_tensor_dtype(constant.dtype) if source is None else source.tensor.data_type
        tensor = TensorProto(data_type=data_type, dims=constant.shape)
        if source is not None:  # field by field, since whatever lists or copies them copies the weights as well
            if source.tensor.HasField("name"):
                tensor.name = source.tensor.name
            if source.tensor.HasField("doc_string"):
                tensor.doc_string = source.tensor.doc_string
            tensor.metadata_props.extend(source.tensor.metadata_props)
    if tensor.name != constant.name:
        tensor.name = constant.name
    if external:
        tensor.data_location = TensorProto.EXTERNAL
    for key, value in external.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def payload_of(constant: gs.Constant) -> Payload | None:
    """The raw data of a constant; None where a file holds it in another way: strings, typed fields, sparse tensors."""
    source = source_of(constant)
    if source is None:
        values = constant.values
        if values.dtype == object or values.dtype.kind in "US":
            return None
        plain = _bits(values.dtype) >= 8 and values.dtype.isnative and sys.byteorder == "little"
        if not plain:
            tensor = array_to_tensor("", values)
            return Payload(len(tensor.raw_data), tensor)
        return Payload(values.nbytes, np.ascontiguousarray(values).reshape(-1).view(np.uint8))
    if source.external is not None:
        return Payload(source.external.length, source.external)
    if source.raw is not None:
        return Payload(source.raw.size, source.raw)
    if source.sparse or source.tensor.data_type == TensorProto.STRING or not source.tensor.HasField("raw_data"):
        return None
    return Payload(len(source.tensor.raw_data), source.tensor)


@functools.cache
def _bits(dtype: np.dtype) -> int:
    four = {np.dtype(ml_dtypes.int4), np.dtype(ml_dtypes.uint4)}
    four |= {np.dtype(getattr(ml_dtypes, name)) for name in ("float4_e2m1fn",) if hasattr(ml_dtypes, name)}
    two = {np.dtype(getattr(ml_dtypes, name)) for name in ("int2", "uint2") if hasattr(ml_dtypes, name)}
    return 4 if dtype in four else 2 if dtype in two else 8 * dtype.itemsize


def _strings(tensor: TensorProto) -> np.ndarray:
    """Strings as an object array: of str, or of bytes where one of them is no UTF-8."""
    strings: list[str] | list[bytes] = list(tensor.string_data)
    with contextlib.suppress(UnicodeDecodeError):
        strings = [item.decode() for item in tensor.string_data]
    shape = tuple(tensor.dims)
    if len(strings) != math.prod(shape):
        raise ModelError(f"initializer {tensor.name!r}: holds {len(strings)} strings, but its shape is {list(shape)}.")
    values = np.empty(len(strings), object)
    values[:] = strings
    return values.reshape(shape)


def _dense(sparse: onnx.SparseTensorProto) -> np.ndarray:
    values = onnx.numpy_helper.to_array(sparse.values)
    indices = onnx.numpy_helper.to_array(sparse.indices)
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    if indices.ndim == 1:
        dense.reshape(-1)[indices] = values
    else:
        dense[tuple(indices.T)] = values
    return dense


def array_to_tensor(name: str, values: np.ndarray) -> TensorProto:
    """The TensorProto of an array: little-endian raw bytes, 4-bit types packed, strings as strings."""
    if values.dtype == object or values.dtype.kind in "US":
        strings = [item if isinstance(item, bytes) else str(item).encode() for item in values.reshape(-1)]
        return TensorProto(name=name, data_type=TensorProto.STRING, dims=values.shape, string_data=strings)
    tensor: TensorProto = onnx.numpy_helper.from_array(np.ascontiguousarray(values).reshape(values.shape), name)
    return tensor


def inline_tensor(constant: gs.Constant) -> TensorProto:
    """The TensorProto of a constant with its bytes inside: the default :data:`TensorWriter`."""
    source = source_of(constant)
    if source is None:
        return array_to_tensor(constant.name, constant.values)
    tensor = source.inline()
    if tensor.name != constant.name:
        tensor.name = constant.name
    return tensor


def tensor_nbytes(constant: gs.Constant) -> int:
    """Bytes of a constant as ONNX stores it: 4-bit types packed in pairs."""
    values = constant._values
    if isinstance(values, TensorSource):
        return values.nbytes
    return (int(values.size) * _bits(values.dtype) + 7) // 8


def source_of(constant: gs.Constant) -> TensorSource | None:
    """Where the constant's values came from, when they are still those."""
    source = constant.__dict__.get("source")
    if isinstance(constant._values, TensorSource):
        return constant._values
    return source if source is not None and source.is_source_of(constant._values) else None


def make_constant(name: str, source: TensorSource) -> gs.Constant:
    """A constant that remembers where its values came from."""
    constant = gs.Constant(name, source)
    constant.source = source
    return constant


# ------------------------------------------------------------------------------------------------ what is declared


def declared_type(info: onnx.ValueInfoProto) -> tuple[np.dtype | None, list[int | str | None] | None]:
    """The dtype and shape that a ValueInfoProto declares, for dense tensors; None where it says nothing."""
    kind = info.type.WhichOneof("value")
    if kind != "tensor_type":
        return None, None
    tensor = info.type.tensor_type
    try:
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type) if tensor.elem_type else None
    except KeyError:
        dtype = None
    if not tensor.HasField("shape"):
        return dtype, None
    shape: list[int | str | None] = []
    for dim in tensor.shape.dim:
        which = dim.WhichOneof("value")
        if which == "dim_value":
            shape.append(dim.dim_value if dim.dim_value >= 0 else None)  # Paddle writes -1 for "any size"
        else:
            shape.append(None if dim.dim_param in NO_SYMBOLS else dim.dim_param)
    return dtype, shape


def declare(tensor: gs.Tensor, info: onnx.ValueInfoProto) -> None:
    """Note on a tensor what the file declares of it."""
    tensor.info = info
    if isinstance(tensor, gs.Variable):
        tensor.dtype, tensor.shape = declared_type(info)
        tensor.type = info.type.WhichOneof("value") or "tensor_type"


def value_info(tensor: gs.Tensor) -> onnx.ValueInfoProto | None:
    """What to declare of a tensor: as the file had it while that still holds, else from dtype and shape."""
    carried: onnx.ValueInfoProto | None = tensor.__dict__.get("info")
    dtype, shape = tensor.dtype, tensor.shape
    if carried is not None:
        kind = carried.type.WhichOneof("value")
        known = declared_type(carried)
        same = known[0] == dtype and known[1] == (None if shape is None else list(shape))
        if same or (kind not in (None, "tensor_type") and dtype is None):
            info = onnx.ValueInfoProto()
            info.CopyFrom(carried)
            info.name = tensor.name
            return info
    if dtype is None:
        return None
    elem_type = dtype if isinstance(dtype, int) else helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    info = helper.make_tensor_value_info(tensor.name, elem_type, None if shape is None else list(shape))
    if carried is not None:
        copy_fields(carried, info, frozenset({"name", "type"}))
    return info
