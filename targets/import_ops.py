"""Converters in place of TVM's: those of the importer that write loops where Relax has an operator.

What is an operator can be fused, and laid out channels last; loops cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax, topi
from tvm.ir import Call, GenericConst
from tvm.relax.frontend.onnx.onnx_frontend import Gather

from onnxslim.targets.emit import known
from onnxslim.targets.import_recurrent import recurrent
from onnxslim.targets.kernel_cumulative import running_sum
from onnxslim.targets.machine import Machine

__all__ = ["converters"]

# Fused with nothing (kOpaque).
_OPAQUE = 8

Converter = Callable[[Any, list[Any], dict[str, Any], int], Any]


def _clip(builder: Any, inputs: list[Any], attributes: dict[str, Any], opset: int) -> Any | None:
    """The upper bound wins where it is the lower one; a bound that is NaN is none."""
    data = inputs[0]
    if opset < 11:
        bounds = [attributes.get("min"), attributes.get("max")]
    else:
        present = [*inputs[1:3], None, None][:2]
        if any(bound is not None and not isinstance(bound, GenericConst) for bound in present):
            return None
        bounds = [None if bound is None else bound.value.numpy().reshape(()) for bound in present]
    dtype = str(data.ty.dtype)
    for bound, apply in zip(bounds, (relax.op.maximum, relax.op.minimum), strict=True):
        if bound is not None and not np.isnan(bound):
            data = builder.emit(apply(data, relax.const(np.asarray(bound, dtype), dtype)))
    return data


def _pad(builder: Any, inputs: list[Any], attributes: dict[str, Any], opset: int) -> Any | None:
    """Padding with one number that is known."""
    mode = attributes.get("mode", b"constant")
    data, pads = inputs[0], inputs[1] if len(inputs) > 1 else None
    value, axes = [*inputs[2:4], None, None][:2]
    if opset < 11 or mode not in (b"constant", "constant") or axes is not None or not isinstance(pads, GenericConst):
        return None
    if value is not None and not isinstance(value, GenericConst):
        return None
    number = 0.0 if value is None else float(value.value.numpy().reshape(()))
    widths = pads.value.numpy().reshape(2, -1)
    if str(data.ty.dtype) != "float32" or (widths < 0).any() or widths.shape[1] != int(data.ty.ndim):
        return None
    return builder.emit(relax.op.nn.pad(data, [int(width) for width in widths.T.reshape(-1)], "constant", number))


def _same_pool(average: bool) -> Converter:
    """Pools that pad as much as keeps the size; TVM's converter rounds it down for SAME_LOWER and needs it known."""

    def convert(builder: Any, inputs: list[Any], attributes: dict[str, Any], opset: int) -> Any | None:
        mode = attributes.get("auto_pad", b"NOTSET").decode()
        kernel, rank = attributes["kernel_shape"], len(attributes["kernel_shape"])
        strides, ones = attributes.get("strides", [1] * rank), [1] * rank
        # Runtimes disagree on what dilations mean here.
        if mode not in ("SAME_UPPER", "SAME_LOWER") or rank > 3 or list(attributes.get("dilations", ones)) != ones:
            return None
        before, after = [], []
        for size, window, stride in zip(list(inputs[0].ty.shape)[2:], kernel, strides, strict=True):
            padding = _same_padding(known(size), window, stride)
            if padding is None:
                return None
            less = padding // 2
            before.append(padding - less if mode == "SAME_LOWER" else less)
            after.append(less if mode == "SAME_LOWER" else padding - less)
        pool = getattr(relax.op.nn, f"{'avg' if average else 'max'}_pool{rank}d")
        counted = bool(attributes.get("count_include_pad", 0))
        return builder.emit(pool(inputs[0], kernel, strides, [*before, *after], ones, False, counted))

    return convert


def _same_padding(size: int | None, window: int, stride: int) -> int | None:
    """All padding of an axis; None where it depends on a size that is open."""
    if stride == 1:
        return window - 1
    return None if size is None else max((-(-size // stride) - 1) * stride + window - size, 0)


def _lp_normalization(builder: Any, inputs: list[Any], attributes: dict[str, Any], opset: int) -> Any:
    """A vector of zeros stays one."""
    data = inputs[0]
    axis = attributes.get("axis", -1)
    if attributes.get("p", 2) == 1:
        norm = builder.emit(relax.op.sum(builder.emit(relax.op.abs(data)), axis, keepdims=True))
    else:
        squares = builder.emit(relax.op.multiply(data, data))
        norm = builder.emit(relax.op.sqrt(builder.emit(relax.op.sum(squares, axis, keepdims=True))))
    zero, one = (relax.const(number, str(data.ty.dtype)) for number in (0, 1))
    divisor = builder.emit(relax.op.where(builder.emit(relax.op.equal(norm, zero)), one, norm))
    return builder.emit(relax.op.divide(data, divisor))


def _reverse_sequence(builder: Any, inputs: list[Any], attributes: dict[str, Any], opset: int) -> Any:
    axes = attributes.get("time_axis", 0), attributes.get("batch_axis", 1)
    lengths = builder.emit(relax.op.astype(inputs[1], "int32"))
    return builder.emit_te(topi.reverse_sequence, inputs[0], lengths, *axes)


def _running_sum(builder: Any, inputs: list[Any], attributes: dict[str, Any], opset: int) -> Any:
    """CumSum; TVM's is slow, and writes where it must not when there is nothing to add up."""
    data, axis = inputs
    if not isinstance(axis, GenericConst):
        raise ValueError("its axis is computed; only a constant one can be compiled.")
    place = int(axis.value.numpy().reshape(-1)[0]) % int(data.ty.ndim)
    exclusive, backwards = bool(attributes.get("exclusive", 0)), bool(attributes.get("reverse", 0))

    def compute(x: Any) -> Any:
        return running_sum(x, place, exclusive=exclusive, backwards=backwards)

    return builder.emit(
        builder.call_te(compute, data, primfunc_name_hint="running_sum", primfunc_attrs={"op_pattern": _OPAQUE})
    )


def _gather(builder: Any, inputs: list[Any], attributes: dict[str, Any], opset: int) -> Any:
    """TVM's, but an index that is out of bounds takes the nearest element, not memory of somebody else."""
    made = Gather._impl_v13(builder, inputs, attributes, None)
    if not isinstance(made, Call):
        return made
    return relax.op.take(*made.args, axis=made.attrs.axis, mode="clip")


def converters(machine: Machine) -> dict[str, Converter]:
    """By op; a converter that returns None leaves the node to TVM's."""
    return {
        "AveragePool": _same_pool(average=True),
        "Clip": _clip,
        "CumSum": _running_sum,
        "Gather": _gather,
        "LpNormalization": _lp_normalization,
        "MaxPool": _same_pool(average=False),
        "Pad": _pad,
        "ReverseSequence": _reverse_sequence,
        **{op: recurrent(op, machine) for op in ("GRU", "LSTM", "RNN")},
    }
