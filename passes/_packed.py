"""How a `Coded` weight is written into a graph: packed indices and the standard nodes that look the weight up.

Every node has constant inputs, so runtimes fold the look-up when they load the model. All forms are legal at the
opset that the model has (7 and later): unpacking bits needs no bit operations, only a Gather from a table of 256 rows
that the whole model shares.

``uint4``: ``Cast(UINT4 -> int32), Gather(codebook)`` · planes: for each plane of 1, 2, 4 or 8 bits ``Cast(uint8 ->
int32), Gather(table), Reshape``, their sum, ``Gather(codebook)`` · then ``Mul`` where there are scales.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim.passes._codebook import Coded

if TYPE_CHECKING:
    from onnxslim.model import Model

__all__ = ["CodebookWriter", "Form", "pack", "unpack_table"]

TO_INT32 = {"to": int(onnx.TensorProto.INT32)}
NODE_BYTES, TENSOR_BYTES = 40, 32  # of one entry with our short names, measured
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


@dataclass(frozen=True)
class Form:
    """One way to store a coded weight.

    Attributes:
        planes: widths of the bit planes, lowest bits first; empty for a UINT4 tensor.
        nbytes: what the file grows by: indices, codebook, scales and nodes; tables, which weights share, aside.
    """

    planes: tuple[int, ...]
    nbytes: int

    @property
    def bits(self) -> int:
        """Bits an index in the file."""
        return sum(self.planes) or 4

    @property
    def tables(self) -> set[tuple[int, int]]:
        """Width and shift of each table that unpacks it."""
        shifts = itertools.accumulate(self.planes, initial=0)
        return {(width, shift) for width, shift in zip(self.planes, shifts, strict=False) if width < 8}


def pack(indices: NDArray[np.uint8], width: int, shift: int) -> NDArray[np.uint8]:
    """Bits ``shift .. shift + width`` of each index, ``8 // width`` to a byte from the low bits on; zero-padded."""
    per = 8 // width
    flat = (indices.reshape(-1) >> shift) & ((1 << width) - 1)
    flat = np.pad(flat, (0, -len(flat) % per)).reshape(-1, per)
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(flat << (width * np.arange(per, dtype=np.uint8)), axis=1)
    return packed


def unpack_table(width: int, shift: int) -> NDArray[np.uint8]:
    """``[256, 8 // width]``: row ``b`` holds what byte ``b`` of ``pack`` stands for, shifted back."""
    steps = width * np.arange(8 // width)
    return (((np.arange(256)[:, None] >> steps) & ((1 << width) - 1)) << shift).astype(np.uint8)


def _table_bytes(table: tuple[int, int]) -> int:
    width, _ = table
    return 256 * (8 // width) + TENSOR_BYTES + NODE_BYTES


class CodebookWriter:
    """Replaces initializers of one model by coded ones. Call `finish` once after the last `write`."""

    def __init__(self, model: Model, *, uint4: bool) -> None:
        self.model = model
        self.uint4 = uint4 and model.opset >= 21 and model.ir_version >= 10
        self._nodes: list[gs.Node] = []
        self._tables: dict[tuple[int, int], gs.Variable] = {}
        self._shapes: dict[tuple[int, ...], gs.Constant] = {}
        self._count = 0

    def smallest(self, weights: Sequence[Coded], limits: Sequence[int]) -> list[Form]:
        """The forms that take the fewest bytes together; tables that do not pay for all their users are not used.

        Args:
            weights: all that may be written.
            limits: bytes above which a weight stays what it is, of each.
        """
        choices = []
        for widths in ((), ("whole",), ("exact",), ("whole", "exact")):
            found = [min(self._forms(coded, widths), key=lambda form: form.nbytes) for coded in weights]
            written = [form for form, limit in zip(found, limits, strict=True) if form.nbytes < limit]
            total = sum(min(form.nbytes, limit) for form, limit in zip(found, limits, strict=True))
            tables = {table for form in written for table in form.tables}
            choices.append((total + sum(map(_table_bytes, tables)), found))
        return min(choices, key=lambda choice: choice[0])[1]

    @property
    def table_bytes(self) -> int:
        """What the file grew by for tables."""
        return sum(map(_table_bytes, self._tables))

    def _forms(self, coded: Coded, widths: Sequence[str]) -> Iterator[Form]:
        """Ways to store a weight, those with fewer nodes first: UINT4, bytes, and planes of the widths named."""
        size = coded.indices.size
        common = coded.codebook.nbytes + TENSOR_BYTES + 2 * NODE_BYTES
        if coded.scale is not None:
            common += coded.scale.nbytes + TENSOR_BYTES + NODE_BYTES
        if self.uint4 and 2 < coded.bits <= 4:
            yield Form((), common + math.ceil(size / 2) + TENSOR_BYTES)
        exact = {"whole": 4 if coded.bits <= 4 else 8, "exact": coded.bits}
        for planes in ((8,), *(PLANES[exact[width]] for width in widths)):
            total = common
            for width in planes:
                padded = size % (8 // width) != 0
                total += math.ceil(size * width / 8) + TENSOR_BYTES + NODE_BYTES * (3 if width < 8 else 1) + 64 * padded
            yield Form(planes, total)

    def write(self, weight: gs.Constant, coded: Coded, form: Form) -> None:
        """Let all users of ``weight`` read the decoded tensor instead; it is computed in the main graph."""
        self._count += 1
        hint = f"cb{self._count}"
        main = any(weight is known for known in self.model.graph.__dict__.get("initializers", ()))
        name = weight.name if main else self.model.fresh_name(weight.name)
        decoded = gs.Variable(name, coded.codebook.dtype, list(coded.indices.shape))
        if form.planes:
            indices = self._unpacked(coded, form.planes, hint)
        else:
            stored = self._constant(f"{hint}_u4", coded.indices.astype(ml_dtypes.uint4))
            indices = self._node("Cast", [stored], f"{hint}_i", TO_INT32)
        book = self._constant(f"{hint}_v", coded.codebook)
        if coded.scale is None:
            self._node("Gather", [book, indices], decoded)
        else:
            values = self._node("Gather", [book, indices], f"{hint}_g")
            self._node("Mul", [values, self._constant(f"{hint}_s", coded.scale)], decoded)
        for user in list(weight.outputs):
            for position, tensor in enumerate(user.inputs):
                if tensor is weight:
                    user.inputs[position] = decoded

    def finish(self) -> None:
        """Put the nodes that decode at the head of the main graph, where bodies see their results too."""
        graph = self.model.graph
        graph.nodes = [*self._nodes, *graph.nodes]
        self._nodes = []

    def _unpacked(self, coded: Coded, planes: tuple[int, ...], hint: str) -> gs.Variable:
        shape = coded.indices.shape
        if planes == (8,):
            stored = self._constant(f"{hint}_u8", coded.indices)
            return self._node("Cast", [stored], f"{hint}_i", TO_INT32)
        parts, shift = [], 0
        for plane, width in enumerate(planes):
            stored = self._constant(f"{hint}_p{plane}", pack(coded.indices, width, shift))
            rows = self._node("Cast", [stored], f"{hint}_b{plane}", TO_INT32)
            part = self._node("Gather", [self._table(width, shift), rows], f"{hint}_t{plane}")
            if coded.indices.size % (8 // width):
                part = self._node("Reshape", [part, self._shape((-1,))], f"{hint}_f{plane}")
                part = self._head(part, coded.indices.size, f"{hint}_h{plane}")
            parts.append(self._node("Reshape", [part, self._shape(shape)], f"{hint}_r{plane}"))
            shift += width
        total = parts[0]
        for plane, part in enumerate(parts[1:], 1):
            total = self._node("Add", [total, part], f"{hint}_a{plane}")
        return total

    def _head(self, flat: gs.Variable, count: int, hint: str) -> gs.Variable:
        """The first ``count`` elements: the padding of the last byte cut off."""
        if self.model.opset < 10:
            return self._node("Slice", [flat], hint, {"axes": [0], "starts": [0], "ends": [count]})
        return self._node("Slice", [flat, self._shape((0,)), self._shape((count,))], hint)

    def _table(self, width: int, shift: int) -> gs.Variable:
        if (width, shift) not in self._tables:
            stored = self._constant(f"unpack{width}_{shift}_u8", unpack_table(width, shift))
            self._tables[width, shift] = self._node("Cast", [stored], f"unpack{width}_{shift}", TO_INT32)
        return self._tables[width, shift]

    def _shape(self, dims: tuple[int, ...]) -> gs.Constant:
        if dims not in self._shapes:
            self._shapes[dims] = self._constant(f"cb_shape{len(self._shapes)}", np.array(dims, np.int64))
        return self._shapes[dims]

    def _constant(self, hint: str, values: NDArray[Any]) -> gs.Constant:
        return gs.Constant(self.model.fresh_name(hint), values)

    def _node(
        self, op: str, inputs: list[gs.Tensor], output: str | gs.Variable, attrs: dict[str, Any] | None = None
    ) -> gs.Variable:
        if isinstance(output, str):
            output = gs.Variable(self.model.fresh_name(output))
        # Without a name: of a small model, names of these nodes would be a thirtieth of the file.
        self._nodes.append(gs.Node(op, attrs=dict(attrs or {}), inputs=inputs, outputs=[output]))
        return output
