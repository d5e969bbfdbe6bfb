"""A quantization plan: what calibration found of a graph, with no runtime in it.

It says which range of each tensor codes cover, which layers stay float, how channels are scaled, what is added to
biases and how weights are rounded. :mod:`onnxslim.passes._qdq` writes it for one runtime or another, so a plan that a
record keeps can be applied again, without data, for the same runtime (which gives the same file) or another one.

Arrays are little-endian bytes, deflated, as base64. Of the codes of a weight the difference to plain rounding is kept:
few of them differ, and by little.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onnxslim.passes._equalize import Equalization
from onnxslim.passes._placement import ANCHORS
from onnxslim.passes._qdq import FloatArray, WeightCodes, plain_codes

__all__ = [
    "EqualizedTensor",
    "GraphPlan",
    "QuantizationPlan",
    "StoredArray",
    "StoredCodes",
    "TensorPlan",
    "read_plan",
    "record_of",
    "weights_digest",
]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StoredArray(_Entry):
    """A vector of float32."""

    size: int = Field(ge=0)
    data: str

    @classmethod
    def of(cls, values: NDArray[np.floating]) -> StoredArray:
        """Store a vector."""
        flat = np.asarray(values, "<f4").reshape(-1)
        return cls(size=flat.size, data=_deflated(flat.tobytes()))

    def values(self) -> FloatArray:
        """What was stored, as float64.

        Raises:
            ValueError: it is damaged.
        """
        return np.frombuffer(_inflated(self.data, 4 * self.size), "<f4").astype(np.float64)


class StoredCodes(_Entry):
    """Codes of a weight: what each lies above plain rounding, and the scales."""

    scale: StoredArray
    per_channel: bool
    above: str

    @classmethod
    def of(cls, codes: WeightCodes, weight: NDArray[np.float32], axis: int | None) -> StoredCodes:
        """Store the codes of a weight."""
        above = codes.codes - plain_codes(weight, codes.scale, axis)
        scale = StoredArray.of(codes.scale)
        return cls(scale=scale, per_channel=bool(codes.scale.ndim), above=_deflated(above.tobytes()))

    def codes(self, weight: NDArray[np.float32], axis: int | None) -> WeightCodes:
        """The codes that were stored for this weight.

        Raises:
            ValueError: they are damaged, or those of a weight of another shape.
        """
        scale = self.scale.values().astype(np.float32)
        scale = scale if self.per_channel else scale.reshape(())
        above = np.frombuffer(_inflated(self.above, weight.size), np.int8).reshape(weight.shape)
        if (axis is not None) != self.per_channel or (axis is not None and scale.size != weight.shape[axis]):
            raise ValueError("scales of another weight")
        return WeightCodes((plain_codes(weight, scale, axis) + above).astype(np.int8), scale)


class TensorPlan(_Entry):
    """One tensor: what was seen of it, and the range that its codes cover."""

    low: float
    high: float
    elements: int = Field(description="of one feed, at most")
    covers: tuple[float, float]


class EqualizedTensor(_Entry):
    """One tensor whose channels are moved and scaled."""

    name: str
    shift: StoredArray
    scale: StoredArray
    noise: float

    @classmethod
    def of(cls, each: Equalization) -> EqualizedTensor:
        """Store one."""
        shift, scale = StoredArray.of(each.shift), StoredArray.of(each.scale)
        return cls(name=each.name, shift=shift, scale=scale, noise=each.noise)

    def equalization(self) -> Equalization:
        """What was stored."""
        return Equalization(self.name, self.shift.values(), self.scale.values(), self.noise)


class GraphPlan(_Entry):
    """The plan of one graph: the main one, or a body.

    Layers and tensors are named by outputs, as nodes need not have names.
    """

    digest: str = Field(description="of the weights that the plan was made for")
    tensors: dict[str, TensorPlan] = Field(default_factory=dict)
    kept: list[str] = Field(default_factory=list, description="layers that stay float")
    precise: list[str] = Field(default_factory=list, description="those of them whose weights have to be float as well")
    slow: list[str] = Field(default_factory=list, description="layers that ran faster in float")
    equalized: list[EqualizedTensor] = Field(default_factory=list)
    corrections: dict[str, StoredArray] = Field(default_factory=dict, description="added to biases, by layer")
    rounded: dict[str, StoredCodes] = Field(default_factory=dict, description="codes of weights, by layer")
    on_grid: dict[str, StoredCodes] = Field(default_factory=dict, description="of layers that stay float, as stored")
    error: float | None = Field(default=None, description="noise over signal of the outputs on held-back samples")


class QuantizationPlan(_Entry):
    """The plans of a model's graphs: the main one, and bodies."""

    version: Literal[1] = 1
    graphs: list[GraphPlan] = Field(default_factory=list)

    def of(self, graph: gs.Graph) -> GraphPlan | None:
        """The plan for these very weights."""
        digest = weights_digest(graph)
        return next((plan for plan in self.graphs if plan.digest == digest), None)


def read_plan(path: str | Path, pass_name: str) -> QuantizationPlan:
    """The plan that the last such pass left in a record.

    Args:
        path: of ``record.json``, or of its folder.
        pass_name: of the pass that makes plans.

    Raises:
        ValueError: there is no such file or plan, or it cannot be read.
    """
    file = record_of(path)
    try:
        entries = json.loads(file.read_bytes())["passes"]
        plans = [entry["plan"] for entry in entries if entry["name"] == pass_name and entry.get("plan")]
        plan = QuantizationPlan.model_validate(plans[-1]) if plans else None
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror})") from None
    except (ValidationError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file} is no record of this version of onnxslim") from None
    if plan is None:
        raise ValueError(f"{file} holds no plan of {pass_name}")
    return plan


def record_of(path: str | Path) -> Path:
    """The record that lies at a path, or in the folder there."""
    file = Path(path)
    return file / "record.json" if file.is_dir() else file


def weights_digest(graph: gs.Graph) -> str:
    """A hash of the layers that may be quantized, with their names and weights."""
    digest = hashlib.sha256()
    for node in graph.nodes:
        weight = node.inputs[1] if node.op in ANCHORS and len(node.inputs) > 1 else None
        if isinstance(weight, gs.Constant) and node.outputs:
            values = np.asarray(weight.values)
            digest.update(json.dumps([node.outputs[0].name, node.op, list(values.shape)]).encode())
            digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:32]


def _deflated(content: bytes) -> str:
    # Noise about zero holds no longer repetitions than runs: to look for them takes ten times as long.
    deflater = zlib.compressobj(strategy=zlib.Z_RLE)
    return base64.b64encode(deflater.compress(content) + deflater.flush()).decode("ascii")


def _inflated(text: str, size: int) -> bytes:
    """Exactly ``size`` bytes: a record from elsewhere must not fill the memory."""
    inflater = zlib.decompressobj()
    try:
        content = inflater.decompress(base64.b64decode(text, validate=True), max(size, 1))
    except (zlib.error, binascii.Error) as error:
        raise ValueError(f"damaged: {error}") from None
    if len(content) != size or inflater.unconsumed_tail:
        raise ValueError(f"holds {len(content)} bytes or more, not {size}")
    return content
