"""Calibration and evaluation data: read as a stream, checked against the model before anything else is done with it.

What may be given (:func:`open_dataset`):

* an ``.npz`` file, or a mapping from name to array, with one array an input. An array of as many axes as the input is
  cut along its first axis, which stays: into feeds of one sample, or of N samples where the model fixes its first axis
  to N (a remainder that does not fill a last feed is dropped, with a warning). An array of one axis more holds one
  whole feed an element, so a scalar input takes an array of shape (feeds,). A scalar input may also be given as a
  scalar, which then is the same in every feed. Labels are under ``labels``, one a sample or one a feed, unless the
  model has an input of that name;
* a folder of ``.npz`` files, one whole feed each, in natural order of their names (``2.npz`` before ``10.npz``), each
  with its labels under ``labels``, or all of them in a ``labels.npy`` with one entry a feed;
* a folder of ONNX ``test_data_set_*`` folders (or one of these), as the ONNX backend tests are kept: ``input_0.pb``, …;
  recorded outputs are ignored;
* a Python iterable of feeds, input name -> array. A one-shot iterator is kept in memory; a re-iterable object is not.

Arrays are never cast: an input of the wrong type is refused, with the cast to make.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from onnxslim.errors import DataError
from onnxslim.runtime import Feed, TensorSpec

__all__ = [
    "SIZES",
    "DataSource",
    "Dataset",
    "dynamic_axes",
    "edge_feed",
    "open_dataset",
    "random_feeds",
    "resized_feed",
    "resized_feeds",
]

DataSource: TypeAlias = "str | Path | Mapping[str, np.ndarray] | Iterable[Mapping[str, np.ndarray]] | Dataset"

_LABELS = "labels"
_LIKE_LABELS = frozenset(
    {"label", "y", "ys", "target", "targets", "class", "classes", "y_true", "y_test", "ground_truth"}
)


class _Feeds(Protocol):
    """Where feeds come from; :meth:`feeds` may be called again and again."""

    path: str

    def feeds(self) -> Iterator[tuple[str, Feed]]:
        """Yield each feed, and what to call it in a message."""
        ...


# --------------------------------------------------------------------------------------------------------- dataset


class Dataset:
    """Feeds for one model, checked when opened by :func:`open_dataset`; re-iterable and never all in memory.

    Attributes:
        inputs: what the model declares.
        path: where the data came from; ``<feeds>`` for Python objects.
        rows: how many samples each feed holds.
        samples: how many samples: feeds times the batch that the model fixes, or labels where there is one a row.
        labels: as given, cut to ``samples``; an object array where the labels of the feeds differ in shape.
        warnings: what the user should know, such as samples that were dropped.
    """

    def __init__(
        self,
        inputs: Sequence[TensorSpec],
        source: _Feeds,
        *,
        role: str,
        feeds: int,
        rows: Sequence[int] | int = 1,
        labels: np.ndarray | None = None,
        warnings: Sequence[str] = (),
    ) -> None:
        """Make a dataset of the first ``feeds`` feeds of a source; :func:`open_dataset` is the way to one.

        Args:
            inputs: what the model declares.
            source: where feeds come from.
            role: what the data is for, such as calibration; used in messages.
            feeds: how many feeds there are.
            rows: how many samples each feed holds.
            labels: along the first axis one a sample, where ``rows`` counts those.
            warnings: what the user should know.
        """
        self.inputs = tuple(inputs)
        self.path = source.path
        self.role = role
        self.warnings = list(warnings)
        self._source = source
        self._feeds = feeds
        self.rows = [rows] * feeds if isinstance(rows, int) else list(rows[:feeds])
        self.samples = sum(self.rows)
        self.labels = None if labels is None else labels[: self.samples]
        self._sha256: str | None = None
        self._sizes: dict[str, tuple[np.dtype, list[int], list[int]]] | None = None

    def __len__(self) -> int:
        """How many feeds there are."""
        return self._feeds

    def __iter__(self) -> Iterator[Feed]:
        """Yield one feed after the other; the arrays are the caller's own, except those of an iterable of feeds."""
        for index, (_, feed) in enumerate(self._source.feeds()):
            if index >= self._feeds:
                return
            yield feed

    def labelled(self) -> Iterator[tuple[Feed, np.ndarray | None]]:
        """Yield each feed with its labels, shape (rows of the feed, ...); None where there are no labels."""
        start = 0
        for feed, rows in zip(self, self.rows, strict=True):
            yield feed, None if self.labels is None else self.labels[start : start + rows]
            start += rows

    def batches(self, size: int) -> Iterator[Feed]:
        """Yield feeds of up to ``size`` samples where the model takes any batch, single feeds otherwise.

        Consecutive feeds are stacked along axis 0 when that axis is dynamic in every input and not known to mean
        different things in different inputs, when it is 1 in each feed, and when the other axes agree. So data of
        varying size yields batches of varying size, and a model whose first axis is a length gets single feeds.
        """
        if size <= 1 or not self._stackable():
            yield from self
            return
        pending: list[Feed] = []
        for feed in self:
            single = all(value.shape[:1] == (1,) for value in feed.values())
            if pending and (not single or _shapes(feed) != _shapes(pending[0]) or len(pending) >= size):
                yield _stack(pending)
                pending = []
            if single:
                pending.append(feed)
            else:
                yield feed
        if pending:
            yield _stack(pending)

    def take(self, n: int) -> Dataset:
        """The fewest first feeds that hold ``n`` samples; all where there are not that many, one where n < 1."""
        held = np.cumsum(self.rows)
        feeds = min(self._feeds, int(np.searchsorted(held, max(n, 1))) + 1)
        if feeds == self._feeds:
            return self
        return Dataset(
            self.inputs,
            self._source,
            role=self.role,
            feeds=feeds,
            rows=self.rows,
            labels=self.labels,
            warnings=self.warnings,
        )

    def in_memory(self, most_bytes: int) -> Dataset:
        """The same feeds read into memory once, where they are no more than ``most_bytes``; itself otherwise."""
        feeds: list[Feed] = []
        left = most_bytes
        for feed in self:
            left -= sum(value.nbytes for value in feed.values())
            if left < 0:
                return self
            feeds.append(feed)
        return Dataset(
            self.inputs,
            _ObjectFeeds(feeds),
            role=self.role,
            feeds=self._feeds,
            rows=self.rows,
            labels=self.labels,
            warnings=self.warnings,
        )

    @property
    def sha256(self) -> str:
        """Hash of what the feeds and labels hold: names, types, shapes, values; the same in whatever file they are."""
        if self._sha256 is None:
            self._scan()
        assert self._sha256 is not None
        return self._sha256

    def describe(self) -> dict[str, str]:
        """Input -> dtype and shape of one feed, such as ``float32 [1, 3, 48, 16..640]``."""
        if self._sizes is None:
            self._scan()
        assert self._sizes is not None
        described = {}
        for name, (dtype, low, high) in self._sizes.items():
            dims = [str(a) if a == b else f"{a}..{b}" for a, b in zip(low, high, strict=True)]
            kind = "string" if dtype.kind in "OUS" else str(dtype)
            described[name] = f"{kind} [{', '.join(dims)}]"
        return described

    def _stackable(self) -> bool:
        axes = [spec.shape[0] for spec in self.inputs if not spec.optional and spec.shape]
        tensors = [spec for spec in self.inputs if not spec.optional]
        symbols = {axis for axis in axes if isinstance(axis, str)}
        return len(axes) == len(tensors) and not any(isinstance(axis, int) for axis in axes) and len(symbols) <= 1

    def _scan(self) -> None:
        """Hash every feed and note its shapes."""
        digest = hashlib.sha256()
        sizes: dict[str, tuple[np.dtype, list[int], list[int]]] = {}
        for feed in self:
            for name in sorted(feed):
                value = feed[name]
                _hash_array(digest, name, value)
                dtype, low, high = sizes.get(name, (value.dtype, list(value.shape), list(value.shape)))
                if len(low) == value.ndim:
                    low = [min(pair) for pair in zip(low, value.shape, strict=True)]
                    high = [max(pair) for pair in zip(high, value.shape, strict=True)]
                sizes[name] = dtype, low, high
        if self.labels is not None:
            _hash_array(digest, _LABELS, self.labels)
        self._sha256, self._sizes = digest.hexdigest(), sizes


def _shapes(feed: Feed) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in feed.items()}


def _stack(feeds: list[Feed]) -> Feed:
    if len(feeds) == 1:
        return feeds[0]
    return {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}


def _hash_array(digest: Any, name: str, value: np.ndarray) -> None:
    text = value.dtype.kind in "OUS"
    digest.update(repr((name, "text" if text else value.dtype.str, value.shape)).encode())
    if text:
        for item in value.reshape(-1):
            if isinstance(item, np.ndarray):
                _hash_array(digest, "", item)
            else:
                digest.update(repr(item if isinstance(item, (str, bytes)) else repr(item)).encode())
    else:
        digest.update(np.ascontiguousarray(value).view(np.uint8).data if value.size else b"")


# --------------------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True)
class _Array:
    """An array with one or more samples along its first axis, in memory or in a zip file.

    Attributes:
        dtype: of the elements.
        shape: of the whole array.
        values: the array, where it is in memory or mapped from an uncompressed file.
        path: the zip file otherwise, read as a stream.
        member: the name in that zip file.
        header_bytes: how many bytes to skip there.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    values: np.ndarray | None = None
    path: Path | None = None
    member: str = ""
    header_bytes: int = 0

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        """Yield copies of ``rows`` rows after ``rows`` rows; a remainder is left out."""
        count = self.shape[0] // rows
        if self.values is not None:
            for index in range(count):
                yield np.array(self.values[index * rows : (index + 1) * rows])
            return
        assert self.path is not None
        shape = (rows, *self.shape[1:])
        size = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as stream:
                stream.read(self.header_bytes)
                for _ in range(count):
                    content = stream.read(size)
                    if len(content) < size:
                        raise DataError(f"{self.path}: array {self.member[:-4]!r} is truncated.")
                    yield np.frombuffer(bytearray(content), self.dtype).reshape(shape)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise DataError(f"{self.path}: array {self.member[:-4]!r} cannot be read: {error}.") from None

    def all(self) -> np.ndarray:
        """The whole array, in memory."""
        if self.values is not None or not self.shape:
            return np.array(self.values)
        return next(self.blocks(self.shape[0])) if self.shape[0] else np.empty(self.shape, self.dtype)


@dataclass(frozen=True)
class _Cut:
    """How one array becomes feeds: ``rows`` rows each, with the axis kept or not; rows = 0: the same in every feed."""

    array: _Array
    rows: int
    keep_axis: bool

    def feeds(self) -> int | None:
        return self.array.shape[0] // self.rows if self.rows else None

    def values(self) -> Iterator[np.ndarray]:
        if not self.rows:
            while True:
                yield self.array.all()
        for block in self.array.blocks(self.rows):
            yield block if self.keep_axis else block.reshape(block.shape[1:])


class _ArrayFeeds:
    """Feeds cut out of one array an input."""

    def __init__(self, path: str, cuts: dict[str, _Cut], feeds: int) -> None:
        self.path = path
        self._cuts = cuts
        self._count = feeds

    def feeds(self) -> Iterator[tuple[str, Feed]]:
        streams = {name: cut.values() for name, cut in self._cuts.items()}
        for index in range(self._count):
            yield f"{self.path}: sample {index}", {name: next(stream) for name, stream in streams.items()}


class _FileFeeds:
    """One whole feed a file or folder."""

    def __init__(self, path: Path, parts: Sequence[Path], inputs: Sequence[TensorSpec]) -> None:
        self.path = str(path)
        self._parts = list(parts)
        self._inputs = inputs

    def feeds(self) -> Iterator[tuple[str, Feed]]:
        for part in self._parts:
            feed = _read_test_data_set(part, self._inputs) if part.is_dir() else self._read(part)
            yield str(part), feed

    def _read(self, part: Path) -> Feed:
        known = {spec.name for spec in self._inputs}
        return {name: array.all() for name, array in _open_npz(part).items() if name != _LABELS or name in known}

    def labels(self) -> list[np.ndarray] | None:
        """The labels kept in the feeds' own files: all of them or none."""
        if _LABELS in {spec.name for spec in self._inputs}:
            return None
        found = [None if part.is_dir() else _open_npz(part).get(_LABELS) for part in self._parts]
        if all(array is None for array in found):
            return None
        if None in found:
            raise DataError(f"{self._parts[found.index(None)]}: has no {_LABELS!r}, but other feeds of the folder do.")
        return [array.all() for array in found if array is not None]


class _ObjectFeeds:
    """Feeds that are Python objects."""

    path = "<feeds>"

    def __init__(self, feeds: Iterable[Mapping[str, np.ndarray]]) -> None:
        # A one-shot iterator returns itself.
        self._feeds = list(feeds) if iter(feeds) is feeds else feeds

    def feeds(self) -> Iterator[tuple[str, Feed]]:
        for index, feed in enumerate(self._feeds):
            if not isinstance(feed, Mapping):
                raise DataError(
                    f"feed {index}: is a {type(feed).__name__}; give a dict from input name to array for each feed."
                )
            yield f"feed {index}", {str(name): _as_array(index, name, value) for name, value in feed.items()}


def _as_array(index: int, name: str, value: object) -> np.ndarray:
    if not isinstance(value, (np.ndarray, np.generic)):
        raise DataError(f"feed {index}: {name!r} is a {type(value).__name__}; give a NumPy array.")
    return np.asarray(value)


def _open_npz(path: Path) -> dict[str, _Array]:
    """The arrays of an ``.npz`` by name: mapped where they are stored as they are, streamed where compressed."""
    if not path.is_file():
        raise DataError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}.")
    arrays: dict[str, _Array] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.filename.endswith(".npy"):
                    raise DataError(f"{path}: holds {info.filename!r}, which is no array; write it with numpy.savez.")
                name = info.filename[:-4]
                with archive.open(info) as stream:
                    arrays[name] = _open_member(path, info, stream)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: not an .npz file, or truncated ({error}); write it with numpy.savez.") from None
    except (OSError, RuntimeError, NotImplementedError) as error:
        raise DataError(f"{path}: cannot be read ({error}).") from None
    return arrays


def _open_member(path: Path, info: zipfile.ZipInfo, stream: Any) -> _Array:
    where = f"{path}: array {info.filename[:-4]!r}"
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except ValueError as error:
        raise DataError(f"{where} cannot be read ({str(error).splitlines()[0]}).") from None
    if dtype.hasobject:
        raise DataError(
            f"{where} holds Python objects, which are never unpickled; save a plain array, or one file a feed."
        )
    if min(shape, default=0) < 0:
        raise DataError(f"{where} cannot be read (its shape is {shape}).")
    start = stream.tell()
    size = int(np.prod(shape, dtype=np.float64)) * dtype.itemsize
    if info.file_size != start + size:
        raise DataError(f"{where} is truncated: {info.file_size - start} bytes, its shape {shape} needs {size}.")
    if info.compress_type == zipfile.ZIP_STORED and size:
        # The local header repeats name and extra field, the latter with a length of its own.
        with path.open("rb") as file:
            file.seek(info.header_offset + 26)
            name_length, extra_length = np.frombuffer(file.read(4), "<u2").tolist()
        offset = info.header_offset + 30 + name_length + extra_length + start
        if path.stat().st_size < offset + size:
            raise DataError(f"{where} is truncated.")
        order: Literal["C", "F"] = "F" if fortran else "C"
        return _Array(dtype, shape, np.memmap(path, dtype, "r", offset, shape or (1,), order).reshape(shape))
    if fortran or not shape or not size:
        values = np.frombuffer(stream.read(), dtype).reshape(shape[::-1] if fortran else shape)
        return _Array(dtype, shape, values.T if fortran else values)
    return _Array(dtype, shape, path=path, member=info.filename, header_bytes=start)


def _read_test_data_set(folder: Path, inputs: Sequence[TensorSpec]) -> Feed:
    """Read ``input_<i>.pb`` of one ONNX test case: by the tensor's name where the model has it, else by position."""
    known = {spec.name for spec in inputs}
    feed: Feed = {}
    for file in sorted(folder.glob("input_*.pb"), key=_natural):
        tensor = onnx.TensorProto()
        try:
            tensor.ParseFromString(file.read_bytes())
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                raise DataError(f"{file}: points at an external file; write the values into it.")
            value = onnx.numpy_helper.to_array(tensor)
        except (DecodeError, OSError, TypeError, ValueError, KeyError) as error:
            raise DataError(f"{file}: not an ONNX tensor, or truncated ({error}).") from None
        index = re.fullmatch(r"input_(\d+)\.pb", file.name)
        position = int(index[1]) if index else len(inputs)
        if tensor.name not in known and position >= len(inputs):
            raise DataError(f"{file}: the model has {len(inputs)} inputs, none of them named {tensor.name!r}.")
        feed[tensor.name if tensor.name in known else inputs[position].name] = value
    return feed


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts ``2.npz`` before ``10.npz``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


# --------------------------------------------------------------------------------------------------------- opening


def open_dataset(
    source: DataSource,
    inputs: Sequence[TensorSpec],
    *,
    role: str = "calibration",
    labels: Sequence[Any] | np.ndarray | None = None,
) -> Dataset:
    """Open data for a model and check all of it.

    Args:
        source: see the top of this module. A Dataset is checked again against ``inputs``.
        inputs: what the model declares: ``Session.specs``.
        role: what the data is for, such as evaluation; used in messages.
        labels: one a feed or one a row, for a source that has none of its own.

    Raises:
        DataError: with file, array, what is there and what is expected: missing, unknown or unreadable arrays, Python
            objects, wrong types, ranks or fixed sizes, NaN or infinity, no samples, unequal counts.
    """
    unfit = next((spec for spec in inputs if spec.kind != "tensor" and not spec.optional), None)
    if unfit is not None:
        raise DataError(f"input {unfit.name!r} is a {unfit.kind}: data can hold tensors only.")
    if isinstance(source, Dataset):
        labels = source.labels if labels is None else labels
        source = list(source)
    if isinstance(source, (str, Path)):
        path = Path(source)
        dataset = _open_folder(path, inputs, role, labels) if path.is_dir() else None
        if dataset is None:
            dataset = _open_arrays(str(path), _open_npz(path), inputs, role, labels)
    elif isinstance(source, Mapping):
        arrays = {name: _Array(value.dtype, value.shape, value) for name, value in _arrays(source).items()}
        dataset = _open_arrays("<arrays>", arrays, inputs, role, labels)
    elif isinstance(source, Iterable):
        dataset = _open_feeds(_ObjectFeeds(source), inputs, role, labels)
    else:
        raise DataError(f"{role} data is a {type(source).__name__}; give a path, or an iterable of feeds.")
    _check_values(dataset)
    return dataset


def _arrays(source: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {str(name): np.asarray(value) for name, value in source.items()}


def _open_arrays(path: str, arrays: dict[str, _Array], inputs: Sequence[TensorSpec], role: str, labels: Any) -> Dataset:
    known = {spec.name: spec for spec in inputs}
    own = arrays.pop(_LABELS) if _LABELS in arrays and _LABELS not in known else None
    if own is not None and labels is None:
        labels = own.all()
    _check_names(path, set(arrays), inputs)
    cuts = {name: _cut(f"{path}: array {name!r}", array, known[name]) for name, array in arrays.items()}
    counts = {name: cut.feeds() for name, cut in cuts.items()}
    known_counts = {name: count for name, count in counts.items() if count is not None}
    if len(set(known_counts.values())) > 1:
        listed = ", ".join(f"{name!r} {count}" for name, count in known_counts.items())
        raise DataError(f"{path}: the arrays hold different numbers of feeds: {listed}.")
    feeds = next(iter(known_counts.values()), 1 if cuts else 0)
    group = max((cut.rows for cut in cuts.values() if cut.keep_axis), default=1)
    warnings = []
    for name, cut in cuts.items():
        left = cut.array.shape[0] % cut.rows if cut.rows else 0
        if left:
            warnings.append(
                f"{path}: the last {left} of {cut.array.shape[0]} samples of {name!r} are not used, because the model "
                f"takes {cut.rows} at a time."
            )
    if not feeds:
        raise DataError(f"{path}: holds no samples{f' (the model takes {group} at a time)' if group > 1 else ''}.")
    rows: int = group
    given = None
    if labels is not None:
        given = _label_array(labels)
        total = max((cut.array.shape[0] for cut in cuts.values() if cut.keep_axis), default=feeds)
        if len(given) == feeds and len(given) != total:
            rows = 1
        elif len(given) != total:
            raise DataError(f"{path}: {len(given)} labels for {total} samples.")
    return Dataset(
        inputs, _ArrayFeeds(path, cuts, feeds), role=role, feeds=feeds, rows=rows, labels=given, warnings=warnings
    )


def _cut(where: str, array: _Array, spec: TensorSpec) -> _Cut:
    """Decide how an array holds the feeds of one input, and check its type and fixed sizes."""
    _check_dtype(where, array.dtype, spec)
    rank = len(array.shape) if spec.shape is None else len(spec.shape)
    if spec.shape is None and rank == 0:
        rank = -1  # a scalar for an input of any rank: the same in every feed
    if (rank == 0 and not array.shape) or rank == -1:
        return _Cut(array, 0, keep_axis=False)
    declared = spec.shape if spec.shape is not None else [None] * rank
    if len(array.shape) == rank:
        fixed = declared[0] if isinstance(declared[0], int) else 1
        _check_dims(where, (fixed, *array.shape[1:]), spec, array.shape)
        return _Cut(array, max(fixed, 1), keep_axis=True)
    if len(array.shape) == rank + 1:
        _check_dims(where, array.shape[1:], spec, array.shape)
        return _Cut(array, 1, keep_axis=False)
    raise DataError(
        f"{where} has shape {list(array.shape)}; the input is {spec}, so give {rank} axes (samples along the first) or "
        f"{rank + 1} (one whole feed an element)."
    )


def _open_folder(path: Path, inputs: Sequence[TensorSpec], role: str, labels: Any) -> Dataset:
    entries = sorted(path.iterdir(), key=_natural)
    broken = next((entry for entry in entries if entry.is_symlink() and not entry.exists()), None)
    if broken is not None:
        raise DataError(f"{broken}: a link to something that is not there.")
    if any(entry.name == "input_0.pb" for entry in entries):
        parts = [path]
    else:
        parts = [entry for entry in entries if entry.is_dir() and (entry / "input_0.pb").is_file()]
    files = [entry for entry in entries if entry.suffix == ".npz" and not entry.is_dir()]
    if parts and files:
        raise DataError(f"{path}: holds both .npz files and ONNX test data; keep the feeds of one kind only.")
    if not parts and not files:
        raise DataError(f"{path}: holds no .npz files and no test_data_set_* folders with input_0.pb.")
    source = _FileFeeds(path, parts or files, inputs)
    beside = path / "labels.npy"
    if labels is None and beside.is_file():
        try:
            labels = np.load(beside, allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise DataError(f"{beside}: cannot be read ({error}).") from None
        if len(np.atleast_1d(labels)) != len(parts or files):
            raise DataError(f"{beside}: {len(np.atleast_1d(labels))} labels for {len(parts or files)} feeds.")
    elif labels is None:
        labels = source.labels()
    return _open_feeds(source, inputs, role, labels)


def _open_feeds(source: _Feeds, inputs: Sequence[TensorSpec], role: str, labels: Any) -> Dataset:
    """Feeds as they are: one sample each, unless there is one label for each row of their first axes."""
    known = {spec.name: spec for spec in inputs}
    batch: list[int] = []
    for where, feed in source.feeds():
        _check_names(where, set(feed), inputs)
        for name, value in feed.items():
            _check_dtype(f"{where}: {name!r}", value.dtype, known[name])
            _check_dims(f"{where}: {name!r}", value.shape, known[name], value.shape)
        batch.append(max((value.shape[0] for value in feed.values() if value.ndim), default=1))
    if not batch:
        raise DataError(f"{source.path}: {role} data holds no feeds.")
    if labels is None:
        return Dataset(inputs, source, role=role, feeds=len(batch))
    given = _label_array(labels)
    if len(given) == len(batch):
        return Dataset(inputs, source, role=role, feeds=len(batch), labels=given)
    if len(given) == sum(batch):
        return Dataset(inputs, source, role=role, feeds=len(batch), rows=batch, labels=given)
    raise DataError(f"{source.path}: {len(given)} labels for {len(batch)} feeds with {sum(batch)} rows in all.")


def _label_array(labels: Any) -> np.ndarray:
    """Labels as one array, as an object array of the labels where they differ in shape."""
    if isinstance(labels, np.ndarray):
        return np.atleast_1d(labels)
    items = list(labels)
    shapes = {np.shape(item) if isinstance(item, (np.ndarray, np.generic, int, float, str)) else None for item in items}
    if len(shapes) == 1 and None not in shapes:
        return np.atleast_1d(np.array(items))
    ragged = np.empty(len(items), object)
    ragged[:] = items
    return ragged


# -------------------------------------------------------------------------------------------------------- checking


def _check_names(where: str, names: set[str], inputs: Sequence[TensorSpec]) -> None:
    known = [spec.name for spec in inputs]
    listed = ", ".join(repr(name) for name in known) or "none"
    for name in sorted(names - set(known)):
        folded = {other.lower(): other for other in known}
        close = difflib.get_close_matches(name.lower(), folded, n=1)
        elsewhere = f"; labels go under {_LABELS!r}." if name.lower() in _LIKE_LABELS else "."
        hint = f"; did you mean {folded[close[0]]!r}?" if close else elsewhere
        raise DataError(f"{where}: {name!r} is not an input of the model (inputs: {listed}){hint}")
    missing = [spec.name for spec in inputs if not spec.optional and spec.name not in names]
    if missing:
        raise DataError(f"{where}: input {missing[0]!r} is missing (inputs: {listed}).")


def _check_dtype(where: str, dtype: np.dtype, spec: TensorSpec) -> None:
    text = spec.dtype == object and dtype.kind in "OU"
    if dtype != spec.dtype and not text:
        cast = "str" if spec.dtype == object else str(spec.dtype)
        raise DataError(f"{where} is {dtype}, the model wants {cast}; convert it with .astype({cast!r}).")


def _check_dims(where: str, shape: Sequence[int], spec: TensorSpec, whole: Sequence[int]) -> None:
    """Check the shape of one feed; ``whole`` is the shape to show."""
    if spec.shape is None:
        return
    if len(shape) != len(spec.shape):
        raise DataError(f"{where} has shape {list(whole)} ({len(shape)} axes); the input is {spec}.")
    for axis, (got, wanted) in enumerate(zip(shape, spec.shape, strict=True)):
        if isinstance(wanted, int) and got != wanted:
            raise DataError(f"{where} has shape {list(whole)}; the input is {spec}: axis {axis} must be {wanted}.")


def _check_values(dataset: Dataset) -> None:
    """Refuse NaN and infinity, and feeds without a single value. Reads everything once.

    One empty input beside others is data: what a decoder remembers before its first step.
    """
    for index, (where, feed) in enumerate(dataset._source.feeds()):
        if index >= len(dataset):
            return
        if feed and not any(value.size for value in feed.values()):
            shapes = ", ".join(f"{name!r} {list(value.shape)}" for name, value in feed.items())
            raise DataError(f"{where} holds no values: {shapes}.")
        for name, value in feed.items():
            if value.dtype.kind == "O" and not all(isinstance(item, (str, bytes)) for item in value.reshape(-1)):
                raise DataError(f"{where}: {name!r} holds Python objects that are not strings.")
            if value.dtype.kind in "fcV" and not _finite(value):
                raise DataError(f"{where}: {name!r} holds NaN or infinity.")


def _finite(value: np.ndarray) -> bool:
    """Whether all values are finite; types of ``ml_dtypes`` are widened, since not all know isfinite."""
    return bool(np.isfinite(value if value.dtype.kind in "fc" else value.astype(np.float32)).all())


# ---------------------------------------------------------------------------------------------------- made-up feeds

_BATCHES = (1, 2, 3, 1, 5)
SIZES = (64, 32, 16, 96, 7, 128, 1, 224, 48, 320, 3, 256, 512, 288, 576, 10)
_MAX_ELEMENTS = 2**22
_KINDS = ("normal", "edge", "normal", "zeros", "normal", "large")
# Integers may be indices, lengths or masks, whose legal range nobody declares: mostly small, sometimes not.
_HIGHS = (2, 10, 2, 1, 100, 2)
_EDGES = (0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 1e-6, -1e-6, 3.0, 6.0, 100.0, -100.0)
_TEXTS = ("", "a", "Zoe", "naïve", "東京", "two words", "0", "-1.5")


def random_feeds(
    inputs: Sequence[TensorSpec],
    *,
    fixed: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    count: int = 8,
    sizes: Sequence[int] = SIZES,
    hints: Mapping[str, Sequence[int]] | None = None,
) -> Iterator[Feed]:
    """Make up feeds for the required inputs of a model, with several sizes for each dynamic axis.

    Dimensions of one name get one size; unnamed first axes count as one batch. Nobody declares which sizes and values
    a model can take, so some of these feeds may not run: ask for more than are needed. Floats are normal, from a list
    of edge values, all zero, or ten times normal; (u)int8 spans its range; other integers are small and not negative.

    Args:
        inputs: what the model declares.
        fixed: shapes of inputs that are not to vary.
        seed: the same seed gives the same feeds.
        count: how many feeds.
        sizes: candidates for dynamic axes other than the first.
        hints: input -> values that a single-valued integer input is likely to be compared with.

    Raises:
        DataError: an input is no tensor, or ``fixed`` does not fit.
    """
    specs = [spec for spec in inputs if not spec.optional]
    unfit = next((spec for spec in specs if spec.kind != "tensor"), None)
    if unfit is not None:
        raise DataError(f"input {unfit.name!r} is a {unfit.kind}: feeds for it cannot be made up.")
    given = _fixed_sizes(specs, fixed or {})
    rng = np.random.default_rng(seed)
    for index in range(count):
        chosen = _choose_sizes(specs, given, index, rng, sizes)
        feed: Feed = {}
        for spec in specs:
            shape = _shape_of(spec, chosen, fixed or {}, index)
            values = (hints or {}).get(spec.name, ())
            if values and int(np.prod(shape)) == 1 and spec.dtype.kind in "iu" and index % 4 != 3:
                feed[spec.name] = np.full(shape, values[int(rng.integers(len(values)))], spec.dtype)
            else:
                feed[spec.name] = _random_values(shape, spec.dtype, index, rng)
        yield feed


def edge_feed(feed: Feed, seed: int = 0) -> Feed | None:
    """A feed of the same shapes with floats from a list of edge values; None where there are no floats in it."""
    rng = np.random.default_rng(seed)
    floats = {
        name: _random_values(value.shape, value.dtype, _KINDS.index("edge"), rng)
        for name, value in feed.items()
        if value.dtype.kind in "fV"
    }
    return feed | floats if floats else None


def dynamic_axes(feed: Feed, inputs: Sequence[TensorSpec]) -> dict[str, list[tuple[str, int]]]:
    """Where the dynamic axes of a feed are: name of the axis -> input and position of each.

    Args:
        feed: an inference that runs.
        inputs: what the model declares.
    """
    axes: dict[str, list[tuple[str, int]]] = {}
    for spec in inputs:
        for axis, dim in enumerate(spec.shape or ()):
            if not isinstance(dim, int) and spec.name in feed:
                axes.setdefault(_axis_key(spec, axis), []).append((spec.name, axis))
    return axes


def resized_feed(feed: Feed, places: Sequence[tuple[str, int]], size: int) -> Feed | None:
    """A feed with one dynamic axis at another size; None where that is no other size, or too much.

    Values repeat where an axis grows; zeros fill one that was empty.

    Args:
        feed: an inference that runs.
        places: inputs and positions of the axis, which change together.
        size: the new size.
    """
    name, axis = places[0]
    old = feed[name].shape[axis]
    if size == old or any(feed[other].shape[position] != old for other, position in places):
        return None
    resized = dict(feed)
    for other, position in places:
        resized[other] = _repeated(resized[other], size, position)
    return resized if sum(value.size for value in resized.values()) <= _MAX_ELEMENTS else None


def resized_feeds(feed: Feed, inputs: Sequence[TensorSpec], sizes: Sequence[int] = ()) -> Iterator[Feed]:
    """Make feeds of other sizes out of one that is known to run: each dynamic axis longer by one, doubled and halved.

    Args:
        feed: an inference that runs.
        inputs: what the model declares.
        sizes: further sizes for each axis but the first.
    """
    for places in dynamic_axes(feed, inputs).values():
        name, axis = places[0]
        old = feed[name].shape[axis]
        for new in dict.fromkeys((old + 1, old * 2, max(old // 2, 1), *(sizes if axis else ()))):
            resized = resized_feed(feed, places, new)
            if resized is not None:
                yield resized


def _repeated(value: np.ndarray, size: int, axis: int) -> np.ndarray:
    """A tensor with ``size`` along an axis: its own slices over and over, or zeros where it has none."""
    old = value.shape[axis]
    if old:
        return np.asarray(np.take(value, np.arange(size) % old, axis=axis))
    shape = (*value.shape[:axis], size, *value.shape[axis + 1 :])
    return np.full(shape, "", object) if value.dtype.kind == "O" else np.zeros(shape, value.dtype)


def _axis_key(spec: TensorSpec, axis: int) -> str:
    """What a dynamic axis is: its name in the model, the common batch, or one of its own."""
    dim = (spec.shape or ())[axis]
    return dim if isinstance(dim, str) else "axis 0" if axis == 0 else f"{spec.name}[{axis}]"


def _fixed_sizes(specs: Sequence[TensorSpec], shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """The sizes of dynamic axes that given shapes imply."""
    fixed: dict[str, int] = {}
    for spec in specs:
        if spec.name not in shapes or spec.shape is None:
            continue
        _check_dims(f"fixed shape of {spec.name!r}", list(shapes[spec.name]), spec, list(shapes[spec.name]))
        for axis, dim in enumerate(spec.shape):
            if not isinstance(dim, int):
                fixed[_axis_key(spec, axis)] = int(shapes[spec.name][axis])
    return fixed


def _choose_sizes(
    specs: Sequence[TensorSpec], fixed: dict[str, int], index: int, rng: np.random.Generator, sizes: Sequence[int]
) -> dict[str, int]:
    """Give every dynamic axis a size: the first feeds all alike, the later ones mixed, none too large."""
    batch = _BATCHES[index % len(_BATCHES)]
    common = sizes[index % len(sizes)]
    chosen = dict(fixed)
    unnamed = 0
    for spec in specs:
        for axis, dim in enumerate(spec.shape or ()):
            key = _axis_key(spec, axis)
            if isinstance(dim, int) or key in chosen:
                continue
            chosen[key] = batch if axis == 0 else common if index < 2 else int(rng.choice((common, *sizes)))
            if axis and dim is None:
                # It may be the batch as well, as in a recurrent state: every other feed takes it for that.
                if index >> unnamed & 1:
                    chosen[key] = batch
                unnamed += 1
    free = [key for key in chosen if key not in fixed]
    while free and sum(_elements(spec, chosen) for spec in specs) > _MAX_ELEMENTS:
        largest = max(free, key=lambda key: chosen[key])
        if chosen[largest] == 1:
            break
        chosen[largest] //= 2
    return chosen


def _elements(spec: TensorSpec, chosen: Mapping[str, int]) -> int:
    dims = [dim if isinstance(dim, int) else chosen[_axis_key(spec, axis)] for axis, dim in enumerate(spec.shape or ())]
    return int(np.prod(dims, dtype=np.float64)) if dims else 1


def _shape_of(
    spec: TensorSpec, chosen: Mapping[str, int], shapes: Mapping[str, Sequence[int]], index: int
) -> tuple[int, ...]:
    if spec.name in shapes:
        return tuple(shapes[spec.name])
    if spec.shape is None:
        return (2, 3, 4, 5)[: index % 5]
    return tuple(dim if isinstance(dim, int) else chosen[_axis_key(spec, axis)] for axis, dim in enumerate(spec.shape))


def _random_values(shape: tuple[int, ...], dtype: np.dtype, index: int, rng: np.random.Generator) -> np.ndarray:
    kind = _KINDS[index % len(_KINDS)]
    if dtype.kind == "O":
        return np.array(rng.choice(np.array(_TEXTS), shape), object)
    if kind == "zeros":
        return np.zeros(shape, dtype)
    if dtype.kind == "b":
        return np.asarray(rng.random(shape) < 0.5)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        low, high = (limits.min, limits.max + 1) if dtype.itemsize == 1 else (0, _HIGHS[index % len(_HIGHS)])
        return np.asarray(rng.integers(low, high, shape), dtype).reshape(shape)
    if kind == "edge":
        values = rng.choice(_EDGES, shape)
    else:
        values = rng.standard_normal(shape) * (10.0 if kind == "large" else 1.0)
    return np.asarray(values, np.float32).astype(dtype).reshape(shape)
