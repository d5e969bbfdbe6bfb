"""Write a placement into the graph as QuantizeLinear and DequantizeLinear of the standard domain (opset 13 on).

    real = scale * (code - zero)

Activations are 8-bit codes with any zero; weights int8 per channel with zero 0; biases int32 with scale ``s_x * s_w``,
so that they add to the accumulator as they are. How that is written depends on the :class:`Runtime`: codes are thought
of as uint8 everywhere, and are 128 less where a runtime takes int8.

A tensor that is carried keeps its name on the DequantizeLinear, so graph outputs, bodies and float readers need no
change. New tensors have short names: a file of small weights would otherwise grow by them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim.passes._placement import CLAMPS, Anchor, Chain, Placement, weight_axis
from onnxslim.passes._runtimes import RUNTIMES, Runtime

if TYPE_CHECKING:
    from onnxslim.model import Model

__all__ = [
    "CORRECTED",
    "LEVELS",
    "Code",
    "Emitter",
    "TensorCode",
    "WeightCodes",
    "absorb_gemm_factors",
    "chain_code",
    "clipped_code",
    "code_of_range",
    "gated_code",
    "plain_codes",
    "quantize_weight",
]

FloatArray = NDArray[np.float64]
CORRECTED = frozenset({"Conv", "Gemm"})  # whose bias can take a correction
LEVELS = 255
_ROUNDED_BETWEEN = ("Conv", "ConvTranspose", "Gemm")  # by ONNX Runtime, whose float weights it makes int8 there
_PASSED_BACK = ("Reshape", "Transpose", "Squeeze", "Unsqueeze")  # by ONNX Runtime, to a MaxPool
MIDDLE = 128  # the code that is 0 in int8
CODE_LIMIT = 127
_EXACT_STEPS = 8
_WHOLE = 1e-3  # of a step
_WIDER = 1.5  # times its own step: more is not worth it to spare a tensor a second code
_BIAS_LIMIT = 2**30  # half of what an int32 bias may hold: the accumulator needs the rest


@dataclass(frozen=True)
class Code:
    """An affine uint8 code: ``real = scale * (code - zero)``."""

    scale: float
    zero: int


@dataclass(frozen=True)
class TensorCode:
    """With which code a tensor is written (QuantizeLinear) and read (DequantizeLinear); they differ behind a chain.

    Attributes:
        bounds: between which the codes of another tensor are clipped to be those of this one, which is not written.
    """

    write: Code
    read: Code
    bounds: tuple[int, int] | None = None


@dataclass(frozen=True)
class WeightCodes:
    """A weight as int8 codes in its own layout, and their scales: ``[channels]``, or a scalar."""

    codes: NDArray[np.int8]
    scale: NDArray[np.float32]


def code_of_range(low: float, high: float, *, symmetric: bool = False) -> TensorCode:
    """The code of the range ``low <= 0 <= high``; zero is exact, and in the middle where ``symmetric``."""
    scale = float(np.float32(max(-low, high) / CODE_LIMIT if symmetric else (high - low) / LEVELS))
    if not scale > np.finfo(np.float32).tiny:
        scale = 1.0
    code = Code(scale, MIDDLE if symmetric else int(np.clip(round(-low / scale), 0, LEVELS)))
    return TensorCode(code, code)


def chain_code(chain: Chain, low: float, high: float) -> TensorCode:
    """The code of ``y = clip(a * x + b)``: ``x`` is written such that reading gives ``y``; the clipping is saturation.

    ``y = s * (q - z)`` and ``q = round((a * x + b) / s) + z = round(x / (s / a)) + (z + b / s)``, so ``b / s`` is
    rounded, unless a slightly larger ``s`` makes it whole (not where a bound must stay exact).
    """
    low, high = min(low, chain.b), max(high, chain.b)
    read = code_of_range(low, high).read
    scale = read.scale
    steps = abs(chain.b) / scale
    if steps >= _EXACT_STEPS and np.isinf(chain.low) and np.isinf(chain.high):
        scale = float(np.float32(abs(chain.b) / np.floor(steps)))
        read = Code(scale, int(np.clip(round(-low / scale), 0, LEVELS)))
    zero = int(np.clip(read.zero + round(chain.b / scale), 0, LEVELS))
    return TensorCode(Code(float(np.float32(scale / chain.a)), zero), read)


def clipped_code(chain: Chain, source: Code) -> TensorCode | None:
    """The code of ``y = clip(a * x + b)`` among the codes of ``x``, which are read in another way and clipped.

    None where that would move ``y`` by a part of a step, or where 0 would have no code.
    """
    scale = float(np.float32(chain.a * source.scale))
    steps = chain.b / scale
    zero = source.zero - round(steps)
    if abs(steps - round(steps)) > _WHOLE or not 0 <= zero <= LEVELS:
        return None
    low, high = (float(np.clip(end / scale + zero, 0, LEVELS)) for end in (chain.low, chain.high))
    read = Code(scale, zero)
    return TensorCode(source, read, (round(low), round(high)))


def gated_code(chain: Chain, low: float, high: float, *, alone: bool) -> TensorCode:
    """The code of ``x`` in which ``y = clip(a * x + b)`` with ``b > 0`` has codes that are those of ``x``, clipped.

    So ``b`` has to be a whole number of steps, and ``-b / a`` has to have a code; where that costs too much, ``x`` has
    the code of its range.

    Args:
        chain: what makes ``y``.
        low, high: what the codes of ``x`` should cover.
        alone: ``x`` is only read by the chain and multiplied by its result: where that is 0, any ``x`` will do.
    """
    plain = code_of_range(low, high)
    zero_at = -chain.b / chain.a
    low = zero_at if alone and chain.low == 0.0 else min(low, zero_at)
    scale = code_of_range(low, high).read.scale
    steps = np.floor(-zero_at / scale)
    if steps < _EXACT_STEPS or scale > _WIDER * plain.read.scale:
        return plain
    scale = float(np.float32(-zero_at / steps))
    code = Code(scale, int(np.clip(np.ceil(-low / scale - _WHOLE), 0, LEVELS)))
    return TensorCode(code, code)


# Weights below this, all but subnormal, would have a scale that vanishes in the scale of the int32 bias.
_DEAD = 1e-30


def quantize_weight(
    weight: NDArray[np.float32], axis: int | None, *, pairs: bool = False, floor: FloatArray | float = 0.0
) -> WeightCodes:
    """Symmetric int8 codes of a weight, with a scale for each channel along ``axis``, or one when it is None.

    ``pairs`` keeps the sum of any two codes of one channel and sign at 128 at most, so that kernels which add two
    products in 16 bits are exact in whatever order they take them. ``floor`` bounds the scales from below: an all but
    dead channel with a bias would otherwise overflow its int32 bias.
    """
    rows = weight.reshape(1, -1) if axis is None else np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    largest = np.abs(rows).max(axis=1)
    if pairs and rows.shape[1] > 1:
        # 255 * 128 just fits into 16 bits: 127 before rounding, which may add one.
        largest = np.maximum(largest, _two_largest(rows))
    scale = np.where(largest > _DEAD, largest / CODE_LIMIT, 1.0)
    scale = np.maximum(scale, floor if axis is not None else np.max(floor)).astype(np.float32)
    if axis is None:
        scale = scale.reshape(())
    return WeightCodes(plain_codes(weight, scale, axis), scale)


def _two_largest(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """The largest sum of two elements of one sign in each row, without its sign."""
    rest, row = rows.copy(), np.arange(len(rows))
    sums = []
    for outermost, sign in ((np.argmax, 1), (np.argmin, -1)):
        total = np.zeros(len(rows), np.float32)
        for _ in range(2):
            place = outermost(rest, axis=1)
            found = sign * np.maximum(sign * rest[row, place], 0)
            total += found
            rest[row, place] -= found
        sums.append(np.abs(total))
    return np.maximum(*sums)


def plain_codes(weight: NDArray[np.float32], scale: NDArray[np.float32], axis: int | None) -> NDArray[np.int8]:
    """Each weight rounded by itself."""
    shaped = _along(scale, axis, weight.ndim)
    return np.asarray(np.clip(np.rint(weight / shaped), -CODE_LIMIT, CODE_LIMIT), np.int8)


def dequantize_weight(weight: WeightCodes, axis: int | None) -> NDArray[np.float32]:
    """The weight that codes from :func:`quantize_weight` stand for."""
    return np.asarray(weight.codes * _along(weight.scale, axis, weight.codes.ndim), np.float32)


def _along(values: np.ndarray, axis: int | None, rank: int) -> np.ndarray:
    """One value for each channel, shaped to broadcast to a weight; a scalar as it is."""
    return values if axis is None else values.reshape([-1 if index == axis else 1 for index in range(rank)])


@dataclass
class Emitter:
    """Writes one placement into one model.

    Attributes:
        codes: by tensor name, for all that the placement carries or feeds.
        corrections: what to add to the bias of an anchor, by its name.
        rounded: codes for the weight of an anchor, by its name, where they are not each weight rounded by itself.
        reduce_range: whether weight codes must be such that products can be added in 16 bits.
        runtime: for which it is written.
        probes: when not None, mean corrections are measured inside the graph: see :mod:`onnxslim.passes._correction`.
    """

    model: Model
    placement: Placement
    codes: dict[str, TensorCode]
    corrections: dict[str, FloatArray] = field(default_factory=dict)
    rounded: dict[str, WeightCodes] = field(default_factory=dict)
    reduce_range: bool = False
    runtime: Runtime = RUNTIMES["onnxruntime"]
    probes: dict[str, tuple[str, str]] | None = None

    def __post_init__(self) -> None:
        self._nodes: list[gs.Node] = []
        self._quantized: dict[str, gs.Variable] = {}
        self._fed: dict[str, gs.Variable] = {}
        self._doubles: dict[str, gs.Variable] = {}
        self._scalars: dict[tuple[str, float], gs.Constant] = {}
        self._zeros: dict[tuple[int, ...], gs.Constant] = {}
        self._weights: dict[tuple[int, int | None, bytes, int], tuple[gs.Tensor, gs.Constant]] = {}
        # What a QuantizeLinear reads, but for the results of layers in int8.
        self._written = {chain.source.name for chain in self.placement.chains.values()} | self.placement.fed
        # A node reads something else once it is rewritten.
        self._inputs = {name: anchor.node.inputs[0].name for name, anchor in self.placement.anchors.items()}

    def emit(self) -> None:
        """Rewrite the main graph of the model."""
        placement = self.placement
        chain_ends = {id(chain.nodes[-1]): chain for chain in placement.chains.values()}
        inside = {id(node) for chain in placement.chains.values() for node in chain.nodes}
        for node in list(placement.graph.nodes):
            name = node.outputs[0].name if node.outputs else ""
            if id(node) in chain_ends:
                self._emit_chain(chain_ends[id(node)])
            elif id(node) in inside:
                continue
            elif name in placement.anchors:
                self._emit_anchor(placement.anchors[name])
            elif name in placement.propagators:
                self._emit_propagator(node, placement.propagators[name].kind)
            else:
                if self.runtime.moves_codes and self._is_between(node):
                    node.inputs[0] = self._doubled(node.inputs[0])
                self._nodes.append(node)
        placement.graph.nodes = self._nodes

    # -------------------------------------------------------------------------------------------------------- nodes

    def _emit_chain(self, chain: Chain) -> None:
        output = chain.output
        for node in chain.nodes:
            node.inputs.clear()
            node.outputs.clear()
        bounds = self.codes[output.name].bounds
        if bounds is None:
            self._write_codes(chain.source, output)
        else:
            self._clip_codes(chain.source.name, output, bounds)

    def _clip_codes(self, source: str, result: gs.Tensor, bounds: tuple[int, int]) -> None:
        """Append ``codes of source -> Clip -> DequantizeLinear -> result``."""
        codes = self._quantized[source]
        if bounds != (0, LEVELS):
            inputs = [codes, *map(self._zero, bounds)]
            codes = self._variable("q", self.runtime.dtype)
            self._nodes.append(gs.Node("Clip", codes.name, inputs=inputs, outputs=[codes]))
        self._quantized[result.name] = codes
        node = self._dequantize(codes, self.codes[result.name].read, result)
        node.name = f"{result.name}d"  # more nodes may read these codes
        self._nodes.append(node)

    def _emit_anchor(self, anchor: Anchor) -> None:
        node = anchor.node
        node.inputs[0] = self._read(node.inputs[0])
        bias = self._bias_value(anchor)
        coded = self.weight_codes(anchor)
        node.inputs[1] = self._weight(node.inputs[1], anchor, coded)
        if bias is not None:
            step = self.codes[self._inputs[anchor.name]].read.scale
            variable = self._bias(bias, np.asarray(coded.scale * step, np.float64))
            if len(node.inputs) > 2:
                node.inputs[2] = variable
            else:
                node.inputs.append(variable)
        self._nodes.append(node)
        self._carry_outputs(node, anchor)

    def _emit_propagator(self, node: gs.Node, kind: str) -> None:
        if kind == "moved":
            self._emit_moved(node)
            return
        if kind == "arithmetic":
            for index, tensor in enumerate(node.inputs):
                node.inputs[index] = self._read(tensor)
        self._nodes.append(node)
        self._carry_outputs(node, None)

    def _emit_moved(self, node: gs.Node) -> None:
        source, output = node.inputs[0].name, node.outputs[0]
        node.inputs[0] = self._quantized[source]
        codes = self._variable("q", self.runtime.dtype)
        node.outputs[0] = codes
        if node.op == "Pad" and node.attrs.get("mode", "constant") == "constant":
            zero = self._zero(self.codes[source].read.zero)
            if len(node.inputs) > 2:
                node.inputs[2] = zero
            else:
                node.inputs.append(zero)
        self._nodes.append(node)
        self._quantized[output.name] = codes
        self._nodes.append(self._dequantize(codes, self.codes[output.name].read, output))

    def _carry_outputs(self, node: gs.Node, anchor: Anchor | None) -> None:
        for index, tensor in enumerate(list(node.outputs)):
            probed = anchor is not None and self.probes is not None and node.op in CORRECTED
            if tensor.name in self.placement.carried:
                raw = self._variable("r", np.float32)
                node.outputs[index] = raw
                self._write_codes(self._probe(anchor, raw) if anchor and probed else raw, tensor)
            elif anchor and probed:
                raw = self._variable("r", np.float32)
                node.outputs[index] = raw
                self._probe(anchor, raw, tensor)

    def _probe(self, anchor: Anchor, raw: gs.Variable, result: gs.Tensor | None = None) -> gs.Tensor:
        """Add what the channel means of ``raw`` lack against the teacher's, which are fed; the lack is fetched."""
        assert self.probes is not None
        mean, delta = self._variable("m", np.float32), self._variable("d", np.float32)
        target = gs.Variable(self.model.fresh_name("t"), np.float32, None)
        result = result if result is not None else self._variable("c", np.float32)
        self._nodes.append(channel_mean(self.model, anchor, raw, mean))
        self._nodes.append(gs.Node("Sub", inputs=[target, mean], outputs=[delta]))
        self._nodes.append(gs.Node("Add", inputs=[raw, delta], outputs=[result]))
        self.placement.graph.inputs.append(target)
        self.probes[anchor.name] = (target.name, delta.name)
        return result

    def _is_between(self, node: gs.Node) -> bool:
        """Whether a layer that stays float reads codes, and its result becomes codes, perhaps behind an activation."""
        if node.op not in _ROUNDED_BETWEEN or node.domain or node.inputs[0].name not in self.placement.carried:
            return False
        results = list(node.outputs)
        results += [tensor for user in node.outputs[0].outputs if user.op in CLAMPS for tensor in user.outputs]
        return any(tensor.name in self._written for tensor in results)

    def _doubled(self, tensor: gs.Tensor) -> gs.Tensor:
        """The tensor read with half of its scale, and doubled: the same, and not what a DequantizeLinear gives."""
        if tensor.name not in self._doubles:
            half = self._variable("h", np.float32)
            code = self.codes[tensor.name].read
            again = self._dequantize(self._quantized[tensor.name], Code(code.scale / 2, code.zero), half)
            again.name = half.name
            self._nodes.append(again)
            self._doubles[tensor.name] = self._twice(half)
        return self._doubles[tensor.name]

    def _twice(self, tensor: gs.Tensor) -> gs.Tensor:
        """A tensor times two, which is exact."""
        result = self._variable("g", np.float32)
        self._nodes.append(gs.Node("Mul", result.name, inputs=[tensor, self._scale(2.0)], outputs=[result]))
        return result

    # ------------------------------------------------------------------------------------------------------ tensors

    def _variable(self, hint: str, dtype: type) -> gs.Variable:
        return gs.Variable(self.model.fresh_name(f"{hint}{len(self._nodes)}"), dtype)

    def _read(self, tensor: gs.Tensor) -> gs.Tensor:
        """The tensor as int8 readers see it: quantized and dequantized."""
        if tensor.name in self.placement.carried:
            return tensor
        if tensor.name not in self._fed:
            result, code = self._variable("f", np.float32), self.codes[tensor.name]
            raw = tensor
            if self.runtime.moves_codes and _is_pooled(tensor):
                # Behind a float layer, pooling of codes takes more than ten times as long as in float.
                raw = self._twice(tensor)
                code = TensorCode(Code(2 * code.write.scale, code.write.zero), code.read)
            self._write_codes(raw, result, code)
            self._fed[tensor.name] = result
        return self._fed[tensor.name]

    def _write_codes(self, raw: gs.Tensor, result: gs.Tensor, code: TensorCode | None = None) -> None:
        """Append ``raw -> QuantizeLinear -> DequantizeLinear -> result``."""
        code = code or self.codes[result.name]
        codes = self._variable("q", self.runtime.dtype)
        inputs = [raw, self._scale(code.write.scale), self._zero(code.write.zero)]
        self._nodes.append(gs.Node("QuantizeLinear", codes.name, inputs=inputs, outputs=[codes]))
        self._quantized[result.name] = codes
        self._nodes.append(self._dequantize(codes, code.read, result))

    def _dequantize(self, codes: gs.Tensor, code: Code, result: gs.Tensor) -> gs.Node:
        inputs = [codes, self._scale(code.scale), self._zero(code.zero)]
        return gs.Node("DequantizeLinear", f"{codes.name}d", inputs=inputs, outputs=[result])

    def _scale(self, value: float) -> gs.Constant:
        return self._scalar("s", np.float32(value))

    def _zero(self, value: int) -> gs.Constant:
        return self._scalar("z", self.runtime.dtype(value - MIDDLE if self.runtime.signed else value))

    def _scalar(self, kind: str, value: np.generic) -> gs.Constant:
        key = (kind, float(value))
        if key not in self._scalars:
            self._scalars[key] = gs.Constant(self.model.fresh_name(f"{kind}{len(self._scalars)}"), np.asarray(value))
        return self._scalars[key]

    def adds_in_pairs(self, anchor: Anchor) -> bool:
        """Whether kernels may add two products of the anchor in 16 bits."""
        return self.reduce_range and not _depthwise(anchor.node)

    def weight_codes(self, anchor: Anchor) -> WeightCodes:
        """The codes of an anchor's weight: as they were chosen, and rounded where a channel has another scale now."""
        weight, bias = anchor.node.inputs[1], self._bias_value(anchor)
        step = self.codes[self._inputs[anchor.name]].read.scale
        floor = 0.0 if bias is None else np.abs(bias) / (step * _BIAS_LIMIT)
        values = np.asarray(weight.values, np.float32)
        plain = quantize_weight(values, anchor.axis, pairs=self.adds_in_pairs(anchor), floor=floor)
        chosen = self.rounded.get(anchor.name)
        if chosen is None:
            return plain
        same = _along(np.asarray(chosen.scale == plain.scale), anchor.axis, values.ndim)
        return WeightCodes(np.where(same, chosen.codes, plain.codes), plain.scale)

    def _bias_value(self, anchor: Anchor) -> FloatArray | None:
        """What an anchor adds to its channels, corrected; None for nothing."""
        node = anchor.node
        correction = self.corrections.get(anchor.name)
        if len(node.inputs) < 3 or node.inputs[2].is_empty():
            return correction
        bias = np.asarray(node.inputs[2].values, np.float64).reshape(-1)
        bias = np.broadcast_to(bias, (int(node.inputs[1].shape[weight_axis(node)]),))
        return bias if correction is None else bias + correction

    def _weight(self, weight: gs.Constant, anchor: Anchor, coded: WeightCodes) -> gs.Tensor:
        """The dequantized weight, stored once for all nodes that share it and its codes."""
        axis, codes, scale = anchor.axis, coded.codes, coded.scale
        key = (id(weight), axis, scale.tobytes(), hash(codes.tobytes()))
        if self.probes is not None and key not in self._weights:
            # What is constant is laid out for ONNX Runtime's float kernels when the probed model loads.
            rounded = dequantize_weight(coded, axis)
            self._weights[key] = (gs.Constant(self.model.fresh_name(f"{weight.name}_r"), rounded), weight)
        elif key not in self._weights:
            result = self._variable("w", np.float32)
            inputs = [
                gs.Constant(self.model.fresh_name(f"{weight.name}_q"), codes),
                gs.Constant(self.model.fresh_name(f"{weight.name}_s"), scale),
                self._weight_zero(scale.shape),  # optional, but ONNX Runtime's QGemm wants it
            ]
            attributes = {} if axis is None else {"axis": axis}
            self._nodes.append(gs.Node("DequantizeLinear", result.name, attributes, inputs=inputs, outputs=[result]))
            self._weights[key] = (result, weight)
        return self._weights[key][0]

    def _weight_zero(self, shape: tuple[int, ...]) -> gs.Constant:
        if shape not in self._zeros:
            self._zeros[shape] = gs.Constant(self.model.fresh_name(f"z{len(self._nodes)}"), np.zeros(shape, np.int8))
        return self._zeros[shape]

    def _bias(self, bias: FloatArray, scale: FloatArray) -> gs.Tensor:
        """The bias; as dequantized int32, ``scale`` ``[channels]`` or a scalar is that of the accumulator."""
        if not self.runtime.integer_bias:
            return gs.Constant(self.model.fresh_name(f"b{len(self._nodes)}"), np.asarray(bias, np.float32))
        codes = np.clip(np.rint(bias / scale), -(2**31) + 1, 2**31 - 1).astype(np.int32)
        if self.probes is not None:  # as in _weight: a convolution is laid out only where its bias is constant, too
            return gs.Constant(self.model.fresh_name(f"b{len(self._nodes)}"), np.asarray(codes * scale, np.float32))
        result = self._variable("b", np.float32)
        inputs = [
            gs.Constant(self.model.fresh_name(f"{result.name}_q"), codes),
            gs.Constant(self.model.fresh_name(f"{result.name}_s"), np.asarray(scale, np.float32)),
        ]
        attributes = {"axis": 0} if scale.ndim else {}
        self._nodes.append(gs.Node("DequantizeLinear", result.name, attributes, inputs=inputs, outputs=[result]))
        return result


def channel_mean(model: Model, anchor: Anchor, source: gs.Tensor, result: gs.Variable) -> gs.Node:
    """A node that takes the mean of the output of a Conv or Gemm over all axes but that of the channels."""
    rank = anchor.rank if anchor.node.op == "Conv" else 2
    axes = [index for index in range(rank) if index != 1]
    if model.opset < 18:
        return gs.Node("ReduceMean", result.name, {"axes": axes, "keepdims": 1}, inputs=[source], outputs=[result])
    constant = gs.Constant(model.fresh_name(f"{result.name}_axes"), np.asarray(axes, np.int64))
    return gs.Node("ReduceMean", result.name, {"keepdims": 1}, inputs=[source, constant], outputs=[result])


def _is_pooled(tensor: gs.Tensor) -> bool:
    """Whether a MaxPool makes a tensor, or what is only laid out in another way."""
    while tensor.inputs and tensor.inputs[0].op in _PASSED_BACK:
        tensor = tensor.inputs[0].inputs[0]
    return bool(tensor.inputs) and tensor.inputs[0].op == "MaxPool"


def _depthwise(node: gs.Node) -> bool:
    """Whether a Conv sees one channel at a time: the kernel for these adds in 32 bits everywhere."""
    channels, inside = node.inputs[1].shape[:2]
    return bool(node.op == "Conv" and inside == 1 and node.attrs.get("group", 1) == channels)


def absorb_gemm_factors(model: Model, node: gs.Node) -> None:
    """Multiply ``alpha`` and ``beta`` of a Gemm into its weight and bias, which QGemm adds as they are."""
    for index, name in ((1, "alpha"), (2, "beta")):
        factor = float(node.attrs.pop(name, 1.0))
        if factor != 1.0 and len(node.inputs) > index:
            old = node.inputs[index]
            node.inputs[index] = gs.Constant(model.fresh_name(old.name), np.asarray(old.values * factor, np.float32))
