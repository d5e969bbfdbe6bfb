"""Weight-only quantization of matrix products: codes of 4 or 8 bits in blocks, multiplied by float activations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from pydantic import Field

from onnxslim.graph.walk import drop_value_info, hoist_constants, nested_graphs
from onnxslim.passes._codebook import Feedback
from onnxslim.passes._placement import matches
from onnxslim.passes._refit import HELD_BYTES
from onnxslim.passes._statistics import LinearLayer, Moments, input_moments, linear_layer
from onnxslim.passes._trunk import Trunk
from onnxslim.passes._weight_only import quantize_stored_weights
from onnxslim.passes.base import Context, Outcome, Pass

if TYPE_CHECKING:
    from onnxslim.data import Dataset
    from onnxslim.model import Model

__all__ = ["QuantizeWeights"]

FloatArray = NDArray[np.float64]
RULE = "weight-only"
_DOMAIN = "com.microsoft"
_DEQUANTIZE_OPSET, _DEQUANTIZE_IR = 21, 10  # the first with blocks and with 4-bit tensors
_SAMPLES = 128
_ROWS = 64  # drawn from a sequence
_BATCH = 8
_MOMENT_BYTES = 512 << 20  # of second moments that are held at a time
_SHRINK = np.linspace(1.0, 0.7, 13)


class QuantizeWeights(Pass):
    """Store the weights of matrix products in blocks of 4- or 8-bit codes, and compute with float activations.

    A constant weight ``W`` ``[K, N]`` of a MatMul or Gemm is cut along ``K`` into blocks of ``block_size``; each block
    of each column has a scale and a zero point: ``W = scale * (code - zero)``. Ranges of blocks are shrunk where that
    lowers the squared error. With calibration data, codes are chosen one row after another such that later rows make up
    for what earlier ones lost, given the second moments of the layer's input (GPTQ, Frantar et al. 2023); a layer keeps
    that only where it lowers the error of its output. Embedding tables are stored in int8.

    Right for transformers, whose matrix products wait for weights to come from memory; convolutions are left alone.
    ``matmul-nbits`` writes ONNX Runtime's MatMulNBits, which never unpacks a whole weight; ``dequantize`` writes
    blocked DequantizeLinear of the standard (opset 21 on). Weights in bodies are quantized without calibration.
    """

    name: ClassVar[str] = "quantize-weights"
    lossless: ClassVar[bool] = False

    bits: Literal[4, 8] = Field(4, description="bits of a code")
    block_size: Literal[16, 32, 64, 128, 256] = Field(32, description="rows of a weight that share a scale")
    symmetric: bool = Field(False, description="no zero points: the middle code is 0")
    format: Literal["matmul-nbits", "dequantize"] = Field(
        "matmul-nbits", description="matmul-nbits: ONNX Runtime's own op; dequantize: the standard's, from opset 21 on"
    )
    accuracy_level: Literal[0, 1, 4] = Field(
        0, description="of MatMulNBits: 0 or 1 multiply in float32, 4 with activations in int8, faster"
    )
    min_elements: int = Field(4096, ge=1, description="smaller weights stay float")
    tables: bool = Field(True, description="store embedding tables in int8 as well")
    exclude: tuple[str, ...] = Field((), description="nodes kept in float: shell patterns of names or ops")

    def run(self, model: Model, context: Context) -> Outcome:
        """Quantize ``model`` in place."""
        outcome = Outcome()
        if self.format == "dequantize" and (model.opset < _DEQUANTIZE_OPSET or model.ir_version < _DEQUANTIZE_IR):
            why = (
                f"blocks need opset {_DEQUANTIZE_OPSET} and IR version {_DEQUANTIZE_IR}, the model has {model.opset} "
                f"and {model.ir_version}; format = matmul-nbits does not"
            )
            outcome.refuse(RULE, model.graph.name, why)
            return outcome
        hoist_constants(model)
        targets = self._targets(model, outcome)
        found = self._moments(model, targets, context)
        writer = _Writer(self, model)
        blocks: dict[_Key, _Blocks] = {}
        before = after = 0
        for done, target in enumerate(targets, 1):
            if target.key not in blocks:
                blocks[target.key] = self._quantized(target.layer, found.get(target.key))
            op, label = target.layer.node.op, target.layer.node.name or target.layer.output.name
            stored = writer.write(target, blocks[target.key])
            old = math.prod(target.layer.weight.shape) * np.dtype(target.layer.weight.dtype).itemsize
            before, after = before + old, after + stored
            outcome.change(RULE, label, f"{op}: {old:,} -> {stored:,} bytes of weight")
            context.progress(done, len(targets))
        if self.tables:
            quantize_stored_weights(model, lambda node: node.op != "Gather" or matches(node, self.exclude), outcome)
        if targets:
            outcome.numbers |= {"weights quantized": float(len(targets)), "ratio": before / after}
        if not outcome.changes:
            outcome.refuse(RULE, model.graph.name, "no MatMul, Gemm or embedding has a large constant float weight")
        drop_value_info(model)
        return outcome

    def weaker(self, outcome: Outcome) -> QuantizeWeights | None:
        """The same with 8 bits."""
        return self.model_copy(update={"bits": 8}) if self.bits == 4 else None

    def _targets(self, model: Model, outcome: Outcome) -> list[_Target]:
        targets = []
        for graph in nested_graphs(model.graph):
            for node in graph.nodes:
                layer = linear_layer(node) if node.op in ("MatMul", "Gemm") else None
                if layer is None:
                    continue
                reason = self._unfit(layer)
                if reason:
                    outcome.refuse(RULE, node.name or node.outputs[0].name, f"{node.op}: {reason}")
                else:
                    targets.append(_Target(graph, layer))
        return targets

    def _unfit(self, layer: LinearLayer) -> str | None:
        weight = layer.weight
        if matches(layer.node, self.exclude):
            return "it is excluded"
        if np.dtype(weight.dtype) not in (np.float32, np.float16):
            return f"its weight is {np.dtype(weight.dtype).name}"
        if math.prod(weight.shape) < self.min_elements or layer.shape[2] < self.block_size:
            return f"its weight {list(weight.shape)} is too small"
        if not np.isfinite(weight.values).all():
            return "its weight holds values that are not finite"
        return None

    def _moments(self, model: Model, targets: list[_Target], context: Context) -> dict[_Key, Moments]:
        """What reads each weight in the main graph, as many at a time as memory holds.

        A weight that is also read in a body has none: what it is multiplied with there is not seen.
        """
        if context.calibration is None:
            return {}
        data: Dataset = context.calibration.take(_SAMPLES)
        found: dict[int, Moments] = {}
        chunk: list[gs.Node] = []
        size = 0
        nodes = [target.layer.node for target in targets if target.graph is model.graph]
        trunk = Trunk(model, partial(data.batches, _BATCH), HELD_BYTES)
        for index, node in enumerate(nodes):
            chunk.append(node)
            size += 8 * _width(node) ** 2
            further = index + 1 < len(nodes)
            if size >= _MOMENT_BYTES or not further:
                found |= input_moments(trunk, chunk, further=further, per_sample=_ROWS, seed=context.seed)
                chunk, size = [], 0
        merged: dict[_Key, Moments] = {}
        for target in targets:
            moments = found.get(id(target.layer.node))
            if moments is not None:
                merged[target.key] = merged[target.key].merged(moments) if target.key in merged else moments
        unseen = {target.key for target in targets if target.graph is not model.graph}
        return {key: moments for key, moments in merged.items() if key not in unseen}

    def _quantized(self, layer: LinearLayer, moments: Moments | None) -> _Blocks:
        """The codes of one layer: rounded, or chosen with feedback where that lowers the error of its output."""
        weight = layer.matrices()[0]
        energy = np.ones(weight.shape[1])
        if moments is not None and moments.count and np.isfinite(moments.gram).all():
            energy = np.diagonal(moments.second[0]) + 1e-3 * np.diagonal(moments.second[0]).mean() + 1e-30
        scale, zero = self._ranges(weight, energy)
        wide_scale, wide_zero = (
            np.repeat(each, self.block_size, axis=1)[:, : weight.shape[1]] for each in (scale, zero)
        )
        levels = np.arange(1 << self.bits, dtype=np.float64)
        codes = np.clip(np.rint(weight / wide_scale + wide_zero), 0, levels[-1])
        if moments is not None and moments.count > 1 and np.isfinite(moments.gram).all():
            second = moments.second
            offset = weight + wide_scale * wide_zero
            chosen = Feedback(second).assign(offset[None], levels, wide_scale[None])[0].astype(np.float64)

            def loss(candidate: FloatArray) -> float:
                error = wide_scale * (candidate - wide_zero) - weight
                return float(np.einsum("ok,kl,ol->", error, second[0], error, optimize=True))

            codes = min((codes, chosen), key=loss)
        return _Blocks(codes.astype(np.uint8), scale, zero.astype(np.uint8))

    def _ranges(self, weight: FloatArray, energy: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Scale and zero point of every block, ``[N, blocks]``: those of the shrunk range with the least error."""
        size, top = self.block_size, (1 << self.bits) - 1
        padding = -weight.shape[1] % size
        blocks = np.pad(weight, ((0, 0), (0, padding))).reshape(len(weight), -1, size)
        share = np.pad(energy, (0, padding)).reshape(-1, size)
        low, high = np.minimum(blocks.min(axis=2), 0), np.maximum(blocks.max(axis=2), 0)
        best = np.full(low.shape, np.inf)
        scale, zero = np.ones(low.shape), np.zeros(low.shape)
        middle = (top + 1) / 2
        for shrink in _SHRINK:
            if self.symmetric:
                tried = np.maximum(-low / middle, high / (middle - 1)) * shrink
                place = np.full(low.shape, middle)
            else:
                tried = (high - low) * shrink / top
                place = np.clip(np.rint(-low * shrink / np.where(tried > 0, tried, 1)), 0, top)
            # The file holds scales in the type of the weight, most often float32.
            tried = np.where(tried > np.finfo(np.float32).tiny, tried, 1.0).astype(np.float32).astype(np.float64)
            codes = np.clip(np.rint(blocks / tried[:, :, None] + place[:, :, None]), 0, top)
            error = np.einsum("obk,bk->ob", np.square(tried[:, :, None] * (codes - place[:, :, None]) - blocks), share)
            better = error < best
            best, scale, zero = (
                np.where(better, new, old) for new, old in ((error, best), (tried, scale), (place, zero))
            )
        return scale, zero


_Key: TypeAlias = tuple[int, bool, float]


@dataclass
class _Target:
    """A product to quantize, and the graph that it is in."""

    graph: gs.Graph
    layer: LinearLayer

    @property
    def key(self) -> _Key:
        """The same for products that can share what is stored."""
        attributes = self.layer.node.attrs
        return id(self.layer.weight), bool(attributes.get("transB", 0)), float(attributes.get("alpha", 1.0))


@dataclass
class _Blocks:
    """A weight as codes ``[N, K]``, with scales and zero points ``[N, blocks]``."""

    codes: NDArray[np.uint8]
    scale: FloatArray
    zero: NDArray[np.uint8]


def _width(node: gs.Node) -> int:
    """``K`` of a MatMul or Gemm."""
    return int(node.inputs[1].shape[1 if node.op == "Gemm" and node.attrs.get("transB", 0) else 0])


class _Writer:
    """Writes quantized products; a weight that several nodes share is stored once."""

    def __init__(self, options: QuantizeWeights, model: Model) -> None:
        self.options, self.model = options, model
        self._stored: dict[_Key, list[gs.Tensor]] = {}

    def write(self, target: _Target, blocks: _Blocks) -> int:
        """Rewrite the node of a target; return the bytes of what is stored for it."""
        node, weight = target.layer.node, target.layer.weight
        key = target.key
        as_op = self.options.format == "matmul-nbits"
        if key not in self._stored:
            make = self._packed if as_op else self._dequantized
            self._stored[key] = make(weight, blocks)
        inputs = self._stored[key]
        if as_op:
            self._write_op(target.graph, node, blocks, inputs)
        else:
            node.inputs[1] = inputs[0]
            node.attrs = {name: value for name, value in node.attrs.items() if name not in ("transB", "alpha")}
        bits = blocks.codes.size * self.options.bits
        points = 0 if self.options.symmetric else blocks.zero.size * self.options.bits
        return int(-(-(bits + points) // 8) + blocks.scale.size * np.dtype(weight.dtype).itemsize)

    def _constant(self, hint: str, values: np.ndarray) -> gs.Constant:
        return gs.Constant(self.model.fresh_name(hint), values)

    def _packed(self, weight: gs.Constant, blocks: _Blocks) -> list[gs.Tensor]:
        """The inputs of MatMulNBits behind the activation: codes ``[N, blocks, bytes]``, scales, zero points."""
        outputs, depth = blocks.codes.shape
        count, size, bits = blocks.scale.shape[1], self.options.block_size, self.options.bits
        padded = np.repeat(blocks.zero, size, axis=1)  # where the last block is longer than the weight: zeros
        padded[:, :depth] = blocks.codes
        packed = _halves(padded) if bits == 4 else padded
        dtype = np.dtype(weight.dtype)
        tensors: list[gs.Tensor] = [
            self._constant(f"{weight.name}_q", packed.reshape(outputs, count, size * bits // 8)),
            self._constant(f"{weight.name}_s", blocks.scale.astype(dtype).reshape(-1)),
        ]
        if not self.options.symmetric:
            points = _halves(np.pad(blocks.zero, ((0, 0), (0, count % 2)))) if bits == 4 else blocks.zero
            tensors.append(self._constant(f"{weight.name}_z", points.reshape(-1)))
        return tensors

    def _write_op(self, graph: gs.Graph, node: gs.Node, blocks: _Blocks, inputs: list[gs.Tensor]) -> None:
        self._import_domain()
        outputs, depth = blocks.codes.shape
        attributes = {"K": depth, "N": outputs, "bits": self.options.bits, "block_size": self.options.block_size}
        if self.options.accuracy_level:
            attributes["accuracy_level"] = self.options.accuracy_level
        bias = node.inputs[2] if len(node.inputs) > 2 and not node.inputs[2].is_empty() else None
        beta = float(node.attrs.get("beta", 1.0))
        result, data = node.outputs[0], node.inputs[0]
        product = (
            gs.Variable(self.model.fresh_name(f"{result.name}_product"), result.dtype) if bias is not None else result
        )
        name = node.name or self.model.fresh_name(f"{result.name}_nbits")
        made = [gs.Node("MatMulNBits", name, attributes, [data, *inputs], [product], domain=_DOMAIN)]
        node.inputs.clear()
        node.outputs.clear()
        if bias is not None:
            if beta != 1.0:
                factor = self._constant(f"{result.name}_beta", np.asarray(beta, bias.dtype or np.float32))
                scaled = gs.Variable(self.model.fresh_name(f"{result.name}_bias"), bias.dtype)
                made.append(gs.Node("Mul", scaled.name, inputs=[bias, factor], outputs=[scaled]))
                bias = scaled
            added = self.model.fresh_name(f"{result.name}_add")
            made.append(gs.Node("Add", added, inputs=[product, bias], outputs=[result]))
        position = next(index for index, other in enumerate(graph.nodes) if other is node)
        graph.nodes = [*graph.nodes[:position], *made, *graph.nodes[position + 1 :]]

    def _dequantized(self, weight: gs.Constant, blocks: _Blocks) -> list[gs.Tensor]:
        """The weight ``[K, N]`` as the standard's DequantizeLinear gives it, in the main graph, where bodies see it."""
        kind = ml_dtypes.uint4 if self.options.bits == 4 else np.uint8
        dtype = np.dtype(weight.dtype)
        zero = np.ascontiguousarray(blocks.zero.T).astype(kind)
        inputs = [
            self._constant(f"{weight.name}_q", np.ascontiguousarray(blocks.codes.T).astype(kind)),
            self._constant(f"{weight.name}_s", np.ascontiguousarray(blocks.scale.T).astype(dtype)),
            self._constant(f"{weight.name}_z", zero),
        ]
        result = gs.Variable(self.model.fresh_name(f"{weight.name}_w"), dtype, list(blocks.codes.shape[::-1]))
        attributes = {"axis": 0, "block_size": self.options.block_size}
        made = gs.Node("DequantizeLinear", result.name, attributes, inputs=inputs, outputs=[result])
        self.model.graph.nodes = [made, *self.model.graph.nodes]
        return [result]

    def _import_domain(self) -> None:
        imports = self.model.header.opset_import
        if not any(entry.domain == _DOMAIN for entry in imports):
            imports.add(domain=_DOMAIN, version=1)


def _halves(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two 4-bit codes of a row to a byte, the first one low."""
    return (codes[:, ::2] | (codes[:, 1::2] << 4)).astype(np.uint8)
