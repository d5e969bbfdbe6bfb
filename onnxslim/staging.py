"""A model on disk without its weights: for the checker, and for sessions that use the weights where they are."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxslim.model import SMALL_TENSOR, Model
from onnxslim.tensors import TensorSource, inline_tensor, outlined_tensor, tensor_nbytes

__all__ = ["EXOTIC_TYPES", "Staged"]

EXOTIC_TYPES = {
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "float8_e4m3fn": onnx.TensorProto.FLOAT8E4M3FN,
    "float8_e4m3fnuz": onnx.TensorProto.FLOAT8E4M3FNUZ,
    "float8_e5m2": onnx.TensorProto.FLOAT8E5M2,
    "float8_e5m2fnuz": onnx.TensorProto.FLOAT8E5M2FNUZ,
}
"""Types that NumPy only has through ml_dtypes, with their ONNX numbers: ONNX Runtime takes them as raw bits."""

# What shape inference reads (targets of Reshape, repeats, …) is integers, and fewer than this.
_SMALL_INTEGERS = 2**16
_HOLES = "weights"


class Staged:
    """A model written to a temporary folder, its larger initializers left out and a file of holes in their place.

    Attributes:
        model: what was written.
        path: the ONNX file; gone with this object.
        weights: initializer -> the array that the model holds for it, read-only. Reading ``path`` alone gives zeros.
    """

    def __init__(self, model: Model) -> None:
        """Write a model; it must not change while this is in use.

        Raises:
            ModelError: the data of an initializer does not fit its shape.
        """
        self.model = model
        self.weights: dict[str, np.ndarray] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="onnxslim-", ignore_cleanup_errors=True)
        self.path = Path(self._folder.name) / "model.onnx"
        names: Counter[str] = Counter()
        inline = _not_initializers(model)

        def write(constant: gs.Constant) -> onnx.TensorProto:
            shared = id(constant) not in inline
            names[constant.name] += shared
            # A name that two graphs use stands for two tensors, where ONNX Runtime would take one.
            if not shared or clashing[constant.name] > 1 or not _can_be_shared(constant):
                return inline_tensor(constant)
            values = constant._values
            self.weights[constant.name] = values.load() if isinstance(values, TensorSource) else values
            return outlined_tensor(constant, location=_HOLES, offset=0, length=tensor_nbytes(constant))

        clashing: Counter[str] = Counter()
        proto = model.export(write)
        if max(names.values(), default=0) > 1:
            clashing = names.copy()
            self.weights.clear()
            proto = model.export(write)
        self.path.write_bytes(proto.SerializeToString())
        with self.path.with_name(_HOLES).open("wb") as file:
            file.truncate(max((values.nbytes for values in self.weights.values()), default=0))


def _not_initializers(model: Model) -> set[int]:
    """Ids of the constants that are attributes or defaults of inputs: ONNX Runtime has no names for these."""
    found = {id(tensor.default) for graph in model.graphs() for tensor in graph.inputs if "default" in tensor.__dict__}
    for graph in model.graphs():
        for node in graph.nodes:
            found.update(id(value) for value in node.attrs.values() if isinstance(value, gs.Constant))
    return found


def _can_be_shared(constant: gs.Constant) -> bool:
    """Whether ONNX Runtime can take the values from memory, and it is worth it."""
    dtype = constant.dtype
    plain = dtype.kind in "fiub" and dtype.isnative and sys.byteorder == "little"
    sparse = isinstance(constant._values, TensorSource) and constant._values.sparse
    least = _SMALL_INTEGERS if dtype.kind in "iu" else SMALL_TENSOR
    return (plain or dtype.name in EXOTIC_TYPES) and not sparse and tensor_nbytes(constant) >= least
