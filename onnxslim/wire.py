"""Large weights taken out of a serialised model and put back, without protobuf holding or copying them.

A serialised message is a row of fields: a key (field number and wire type, a varint), then the value; a nested message
is its length and its bytes. protobuf can only parse and serialise the whole, with every weight copied on the way.
:func:`outline` cuts the bytes of large tensors out before parsing, :func:`splice` puts them in after serialising.
Only the messages on the way to a tensor are looked into, and only where they are long enough to hold one.
"""

from __future__ import annotations

import secrets
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from mmap import mmap
from typing import TypeAlias

from onnx import TensorProto

__all__ = ["Buffer", "cut_index", "mark", "outline", "splice"]

Buffer: TypeAlias = "bytes | mmap"

_LENGTH_DELIMITED = 2
_FIXED = {1: 8, 5: 4}
# Message -> field number -> the message in it, from onnx.proto. Only what the importer makes constants of: lists of
# tensors and sparse tensors stay as they are in the file.
_PATHS = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph"},
}
_RAW_DATA = 9
_OTHERWISE_STORED = frozenset({13, 14})  # external_data, data_location
# No file can hold this by chance, nor on purpose: it is drawn anew in each process.
_TAG = b"onnxslim:" + secrets.token_hex(8).encode() + b":"


class _MalformedError(Exception):
    """The bytes are no message; protobuf says so better."""


def _varint(data: Buffer, at: int) -> tuple[int, int]:
    """The number at an offset, and the offset after it."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _to_varint(value: int) -> bytes:
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)


def _fields(data: Buffer, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield the offset, number, and value offsets of each field of a message; the value is empty if not bytes."""
    at = start
    while at < end:
        key, value_at = _varint(data, at)
        wire_type = key & 7
        if wire_type == _LENGTH_DELIMITED:
            length, value_at = _varint(data, value_at)
            after = value_at + length
        elif wire_type == 0:
            _, after = _varint(data, value_at)
            value_at = after
        elif wire_type in _FIXED:
            after = value_at = value_at + _FIXED[wire_type]
        else:
            raise _MalformedError
        if after > end:
            raise _MalformedError
        yield at, key >> 3, value_at, after
        at = after


# ----------------------------------------------------------------------------------------------------------- reading


def outline(data: Buffer, smallest: int) -> tuple[bytes, list[tuple[int, int]]]:
    """Take the raw data of tensors of at least ``smallest`` bytes out of a serialised ModelProto.

    Returns:
        The serialised model in which each such tensor claims to be external, at a location that :func:`cut_index`
        knows; and where in ``data`` the bytes of each are: offset and length. What does not parse comes back whole.
    """
    spans: list[tuple[int, int]] = []
    try:
        pieces = _outlined(data, 0, len(data), "model", smallest, spans)
    except (_MalformedError, IndexError):
        return data[:], []
    return (data[:] if pieces is None else b"".join(pieces)), spans


def _outlined(
    data: Buffer, start: int, end: int, message: str, smallest: int, spans: list[tuple[int, int]]
) -> list[bytes] | None:
    """The pieces of a message without its large tensors; None where it has none."""
    if message == "tensor":
        return _outlined_tensor(data, start, end, smallest, spans)
    paths = _PATHS[message]
    pieces: list[bytes] = []
    copied = start
    for at, number, value_at, after in _fields(data, start, end):
        if after - value_at < smallest or number not in paths:
            continue
        inner = _outlined(data, value_at, after, paths[number], smallest, spans)
        if inner is not None:
            _, length_at = _varint(data, at)
            pieces += [data[copied:length_at], _to_varint(sum(map(len, inner))), *inner]
            copied = after
    return [*pieces, data[copied:end]] if pieces else None


def _outlined_tensor(
    data: Buffer, start: int, end: int, smallest: int, spans: list[tuple[int, int]]
) -> list[bytes] | None:
    found: tuple[int, int, int] | None = None
    for at, number, value_at, after in _fields(data, start, end):
        if number in _OTHERWISE_STORED or (number == _RAW_DATA and found):
            return None
        if number == _RAW_DATA:
            found = at, value_at, after
    if found is None or found[2] - found[1] < smallest:
        return None
    at, value_at, after = found
    note = TensorProto(data_location=TensorProto.EXTERNAL)
    note.external_data.add(key="location", value=mark(len(spans)).decode())
    spans.append((value_at, after - value_at))
    return [data[start:at], data[after:end], note.SerializeToString()]


# ----------------------------------------------------------------------------------------------------------- writing


def mark(index: int) -> bytes:
    """What stands for the bytes of tensor ``index``: the location that outline gives it, the raw data for splice."""
    return _TAG + str(index).encode()


def cut_index(marked: bytes | str) -> int | None:
    """The index that a mark of this process stands for; None for anything else."""
    text = marked.encode() if isinstance(marked, str) else marked
    return int(text[len(_TAG) :]) if text.startswith(_TAG) else None


def splice(skeleton: bytes, sizes: Sequence[int]) -> Iterator[bytes | int]:
    """Yield the pieces of a serialised ModelProto with the bytes of tensors in the place of marks.

    Args:
        skeleton: the model, in which ``raw_data`` of a tensor may be :func:`mark`.
        sizes: index -> how many bytes come in its place.

    Yields:
        Bytes of the file, and in between the index of each tensor where its bytes have to be written.
    """
    places: list[int] = []
    at = skeleton.find(_TAG)
    while at >= 0:
        places.append(at)
        at = skeleton.find(_TAG, at + 1)
    yield from _spliced(skeleton, 0, len(skeleton), "model", places, sizes)[0]


def _spliced(
    data: bytes, start: int, end: int, message: str, places: list[int], sizes: Sequence[int]
) -> tuple[list[bytes | int], int]:
    """The pieces of a message and their length."""
    pieces: list[bytes | int] = []
    length, copied = 0, start
    paths = _PATHS.get(message, {})
    for at, number, value_at, after in _fields(data, start, end):
        place = bisect_left(places, value_at)
        if place == len(places) or places[place] >= after:
            continue
        inner: list[bytes | int] = []
        index = cut_index(data[value_at:after]) if message == "tensor" and number == _RAW_DATA else None
        if index is not None:
            inner, size = [index], sizes[index]
        elif number in paths:
            inner, size = _spliced(data, value_at, after, paths[number], places, sizes)
        else:
            continue
        _, length_at = _varint(data, at)
        head = data[copied:length_at] + _to_varint(size)
        pieces += [head, *inner]
        length += len(head) + size
        copied = after
    if copied < end:
        pieces.append(data[copied:end])
    return pieces, length + end - copied
