"""Converters in place of TVM's: those of the importer that write loops where Relax has an operator.

What is an operator can be fused, and laid out channels last; loops cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax
from tvm.ir import GenericConst

__all__ = ["CONVERTERS"]

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


CONVERTERS: dict[str, Converter] = {"Clip": _clip, "Pad": _pad}
"""By op; a converter that returns None leaves the node to TVM's."""
