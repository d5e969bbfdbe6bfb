"""Relax operators as computations with packed constants, for which :mod:`~onnxslim.targets.schedule` has kernels.

Each is a tensor expression that says what is computed, in full, so that TVM can fuse what follows and fall back to its
own loops; a note in its block says which kernel is meant and how its tiles are cut, since that decides how the weights
are packed. Weights are packed here, once, and stored only packed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax, te, tirx, topi
from tvm.ir import Call, GenericConst, GlobalVar
from tvm_ffi import structural_equal as equal

from onnxslim.targets import kernel_winograd as winograd
from onnxslim.targets.emit import index, known
from onnxslim.targets.kernel_product import NOTE
from onnxslim.targets.machine import Machine
from onnxslim.targets.tiling import Tile, Tiling, workload

__all__ = ["legalizations", "pack"]

_BROADCAST = ("add", "subtract", "multiply", "divide", "maximum", "minimum", "power", "where")

# Fused with everything element by element that follows (kOutEWiseFusable).
_OUT_ELEMENTWISE_FUSABLE = 4
_FUSABLE = {"op_pattern": _OUT_ELEMENTWISE_FUSABLE}
# Fused with its like, but not with a product.
_INJECTIVE = 2
Legalization = Callable[[Any, Any], Any]


def legalizations(tiling: Tiling) -> dict[str, Legalization]:
    """What ``LegalizeOps`` is to take instead of TVM's own."""
    return {
        "relax.nn.conv1d": lambda builder, call: _convolution(builder, call, tiling),
        "relax.nn.conv2d": lambda builder, call: _convolution(builder, call, tiling),
        "relax.mean": _mean,
        "relax.argmax": lambda builder, call: _place_of_extreme(builder, call, largest=True),
        "relax.argmin": lambda builder, call: _place_of_extreme(builder, call, largest=False),
        "relax.matmul": lambda builder, call: _matmul(builder, call, tiling),
        **dict.fromkeys((f"relax.{name}" for name in _BROADCAST), _broadcast),
    }


def _stock(builder: Any, call: Any) -> Any:
    """TVM's own legalization."""
    return call.op.get_attr("FLegalize")(builder, call)


def _broadcast(builder: Any, call: Any) -> Any:
    """Keep what spreads a product over more elements, as a gate of channels does, out of the product's kernel."""
    legal = _stock(builder, call)
    if any(_spreads(builder, each, call) for each in call.args) and isinstance(legal.args[0], GlobalVar):
        name = legal.args[0]
        builder.update_func(name, builder.get()[name].with_attr("op_pattern", _INJECTIVE))
    return legal


def _spreads(builder: Any, argument: Any, call: Any) -> bool:
    smaller = _has_shape(argument) and _has_shape(call) and not equal(argument.ty.shape, call.ty.shape)
    return smaller and _is_product(builder, argument)


def _is_product(builder: Any, expression: Any, depth: int = 8) -> bool:
    """Whether a tensor comes from a product by nothing but steps that go element by element."""
    made = builder.lookup_binding(expression) if isinstance(expression, relax.Var) else None
    if depth == 0 or not isinstance(made, Call) or not made.args or not isinstance(made.args[0], GlobalVar):
        return False
    pattern = dict(builder.get()[made.args[0]].attrs.items()).get("op_pattern")
    if pattern is not None:
        return int(pattern) == _OUT_ELEMENTWISE_FUSABLE
    return any(_is_product(builder, each, depth - 1) for each in made.args[1].fields)


def _sizes(expression: Any) -> list[Any]:
    return [size if known(size) is None else known(size) for size in expression.ty.shape.values]


def _has_shape(expression: Any) -> bool:
    return getattr(expression.ty, "shape", None) is not None and hasattr(expression.ty.shape, "values")


def _is_float(*expressions: Any) -> bool:
    return all(str(expression.ty.dtype) == "float32" for expression in expressions)


def _mean(builder: Any, call: Any) -> Any:
    """The mean of nothing is 0, as it is to ONNX Runtime; whole numbers must not be divided by 0 at all."""
    data, axes, keepdims = call.args[0], call.attrs.axis, call.attrs.keepdims
    if not _has_shape(data):
        return _stock(builder, call)

    def compute(x: Any) -> Any:
        sizes = [x.shape[int(axis)] for axis in (range(len(x.shape)) if axes is None else axes)]
        count = tirx.max(math.prod(sizes, start=index(1)), index(1))
        return topi.divide(topi.sum(x, axes, keepdims), count)

    return builder.call_te(compute, data, primfunc_name_hint="mean")


def _place_of_extreme(builder: Any, call: Any, *, largest: bool) -> Any:
    """ArgMax as two reductions, both of vectors: the largest number, and the first place of one that is equal.

    A place is always one of the axis, even where a number that is none makes nothing equal.
    """
    data, axis, keepdims = call.args[0], call.attrs.axis, call.attrs.keepdims
    if axis is None or not _has_shape(data):
        return _stock(builder, call)
    at = int(axis) % len(_sizes(data))
    choose = tirx.max if largest else tirx.min

    def compute(x: Any) -> Any:
        size = x.shape[at]
        better = te.comm_reducer(lambda a, b: choose(a, b), lambda dtype: _worst(dtype, largest), name="extreme")
        shape = [*x.shape[:at], 1, *x.shape[at + 1 :]]
        k, place = te.reduce_axis((0, size), "k"), te.reduce_axis((0, size), "place")

        def number(where: Any, along: Any) -> Any:
            return x(*where[:at], along.var, *where[at + 1 :])

        extreme = te.compute(shape, lambda *where: better(number(where, k), axis=k), name="extreme")
        nowhere = tirx.max_value("int32")

        def first(*where: Any) -> Any:
            here = tirx.Select(number(where, place).equal(extreme(*where)), place.var.astype("int32"), nowhere)
            return te.min(here, axis=place)

        found = te.compute(shape, first, name="first")
        last = index(size) - 1
        result = te.compute(shape, lambda *where: tirx.min(found(*where).astype("int64"), last), name="bounded")
        return result if keepdims else topi.squeeze(result, at)

    return builder.call_te(compute, data, primfunc_name_hint="argmax" if largest else "argmin")


def _worst(dtype: Any, largest: bool) -> Any:
    """What every number is at least as large (or small) as."""
    if str(dtype).startswith("float"):
        return tirx.const(-math.inf if largest else math.inf, dtype)
    return tirx.min_value(dtype) if largest else tirx.max_value(dtype)


# --------------------------------------------------------------------------------------------------------- convolution


def _convolution(builder: Any, call: Any, tiling: Tiling) -> Any:
    data, weight = call.args[:2]
    attributes = call.attrs
    layout = str(attributes.data_layout)
    if layout not in ("NHWC", "NWC") or not isinstance(weight, GenericConst) or not _is_float(data, weight, call):
        return _stock(builder, call)
    kernel_layout = str(attributes.kernel_layout)
    spatial = layout[1:-1]
    # [output channels, window, input channels]
    values = weight.value.numpy().transpose([kernel_layout.index(axis) for axis in f"O{spatial}I"])
    shape, groups = _sizes(call), int(attributes.groups)
    source = _sizes(data)
    if values.shape[-1] == 1 and groups == values.shape[0] == source[-1]:
        return _depthwise(builder, call, values, spatial)
    window = list(values.shape[1:-1])
    strides, dilations, pads = (
        _per_axis(value, len(spatial)) for value in (attributes.strides, attributes.dilation, attributes.padding)
    )
    if (
        window == [3, 3]
        and all(value == 1 for value in (*strides, *dilations, groups))
        and all(isinstance(size, int) for size in (*source, *shape))
        and winograd.pays(shape[0], shape[1], shape[2], source[-1], shape[-1])
    ):
        return _winograd(builder, call, values, pads, tiling)
    columns = values.shape[0] // groups
    flat = groups == 1 and all(value == 1 for value in (*window, *strides)) and not any(pads)
    rows = _flat_size(shape[:-1]) if flat else shape[-2] if shape[-2] != 1 else shape[1]
    what = {
        "kind": "convolution",
        "kernel": window,
        "strides": strides,
        "dilations": dilations,
        "pads": pads,
        "groups": groups,
    }
    tile = tiling.tile(workload(source, shape, **what), rows if isinstance(rows, int) else None, columns)
    panel = tile.vectors * tiling.machine.lanes()
    packed = pack(values.reshape(groups, columns, -1, values.shape[-1]), panel)
    note = _note(tile, tiling.machine, what)

    def compute(x: Any, w: Any) -> Any:
        return _window_sum(x, w, shape, window, strides, dilations, pads, groups, panel, note)

    return builder.call_te(
        compute, data, relax.const(packed), primfunc_name_hint="convolution", primfunc_attrs=_FUSABLE
    )


def _window_sum(
    x: Any,
    w: Any,
    shape: list[Any],
    window: list[int],
    strides: list[int],
    dilations: list[int],
    pads: list[int],
    groups: int,
    panel: int,
    note: dict[str, str],
) -> Any:
    taps = [te.reduce_axis((0, size), f"tap{axis}") for axis, size in enumerate(window)]
    inputs, columns = int(x.shape[-1]) // groups, int(shape[-1]) // groups
    panels = math.ceil(columns / panel)
    depth = te.reduce_axis((0, inputs), "depth")

    def element(image: Any, *place: Any) -> Any:
        *pixel, channel = place
        at = [
            position * stride + tap.var * dilation - pad
            for position, stride, tap, dilation, pad in zip(pixel, strides, taps, dilations, pads, strict=False)
        ]
        inside = [
            condition for where, size in zip(at, x.shape[1:-1], strict=True) for condition in (where >= 0, where < size)
        ]
        group, column = tirx.floordiv(channel, columns), tirx.floormod(channel, columns)
        value = x(image, *at, group * inputs + depth.var)
        if any(pads):
            value = tirx.if_then_else(tirx.all(*inside), value, tirx.const(0.0, "float32"))
        tap: Any = 0
        for each, size in zip(taps, window, strict=True):
            tap = tap * size + each.var
        weight = w(group * panels + tirx.floordiv(column, panel), tap, depth.var, tirx.floormod(column, panel))
        return te.sum(value * weight, axis=[*taps, depth])

    return te.compute(tuple(shape), element, name="convolution", attrs=note)


def _winograd(builder: Any, call: Any, values: np.ndarray, pads: list[int], tiling: Tiling) -> Any:
    source, shape = _sizes(call.args[0]), _sizes(call)
    tiles = shape[0] * math.ceil(shape[1] / winograd.TILE) * math.ceil(shape[2] / winograd.TILE)
    what = {"kind": "winograd", "pads": pads}
    tile = tiling.tile(workload(source, shape, **what), tiles, shape[-1])
    panel = tile.vectors * tiling.machine.lanes()
    note = _note(tile, tiling.machine, what)

    def compute(x: Any, w: Any) -> Any:
        row, column, depth = (
            te.reduce_axis((0, size), name) for size, name in ((3, "row"), (3, "column"), (int(x.shape[-1]), "depth"))
        )

        def element(image: Any, y: Any, z: Any, channel: Any) -> Any:
            at = (y + row.var - pads[0], z + column.var - pads[1])
            inside = [c for where, size in zip(at, x.shape[1:3], strict=True) for c in (where >= 0, where < size)]
            value = tirx.if_then_else(tirx.all(*inside), x(image, *at, depth.var), tirx.const(0.0, "float32"))
            tap = winograd.untransformed(
                lambda point: w(tirx.floordiv(channel, panel), point, depth.var, tirx.floormod(channel, panel)),
                row.var,
                column.var,
            )
            return te.sum(value * tap, axis=[row, column, depth])

        return te.compute(tuple(shape), element, name="winograd", attrs=note)

    packed = winograd.transform_filters(values, panel)
    return builder.call_te(
        compute, call.args[0], relax.const(packed), primfunc_name_hint="winograd", primfunc_attrs=_FUSABLE
    )


def _depthwise(builder: Any, call: Any, values: np.ndarray, spatial: str) -> Any:
    data, attributes = call.args[0], call.attrs
    shape = _sizes(call)
    window = list(values.shape[1:-1])
    strides, dilations, pads = (
        _per_axis(value, len(spatial)) for value in (attributes.strides, attributes.dilation, attributes.padding)
    )
    packed = np.ascontiguousarray(values.reshape(values.shape[0], -1).T)
    note = {
        NOTE: json.dumps(
            {"kind": "depthwise", "kernel": window, "strides": strides, "dilations": dilations, "pads": pads}
        )
    }

    def compute(x: Any, w: Any) -> Any:
        taps = [te.reduce_axis((0, size), f"tap{axis}") for axis, size in enumerate(window)]

        def element(image: Any, *place: Any) -> Any:
            *pixel, channel = place
            at = [
                position * stride + tap.var * dilation - pad
                for position, stride, tap, dilation, pad in zip(pixel, strides, taps, dilations, pads, strict=False)
            ]
            inside = [c for where, size in zip(at, x.shape[1:-1], strict=True) for c in (where >= 0, where < size)]
            value = x(image, *at, channel)
            if any(pads):
                value = tirx.if_then_else(tirx.all(*inside), value, tirx.const(0.0, "float32"))
            tap: Any = 0
            for each, size in zip(taps, window, strict=True):
                tap = tap * size + each.var
            return te.sum(value * w(tap, channel), axis=taps)

        return te.compute(tuple(shape), element, name="depthwise", attrs=note)

    return builder.call_te(compute, data, relax.const(packed), primfunc_name_hint="depthwise", primfunc_attrs=_FUSABLE)


def _per_axis(values: Any, rank: int) -> list[int]:
    listed = [int(value) for value in values]
    return listed * rank if len(listed) == 1 else listed


# -------------------------------------------------------------------------------------------------------------- matmul


def _matmul(builder: Any, call: Any, tiling: Tiling) -> Any:
    left, right = call.args
    if not _has_shape(left) or not _has_shape(right) or not _is_float(left, right, call):
        return _stock(builder, call)
    a, b = _sizes(left), _sizes(right)
    if len(a) < 2 or len(b) < 2:
        return _stock(builder, call)
    if isinstance(right, GenericConst) and len(b) == 2:
        return _matmul_by_constant(builder, call, tiling)
    return _stock(builder, call)


def _matmul_by_constant(builder: Any, call: Any, tiling: Tiling) -> Any:
    left, right = call.args
    shape = _sizes(call)
    depth, columns = right.value.shape
    what = {"kind": "matmul"}
    tile = tiling.tile(workload(_sizes(left), shape, **what), _flat_size(shape[:-1]), int(columns))
    panel = tile.vectors * tiling.machine.lanes()
    packed = pack(right.value.numpy().T.reshape(1, columns, 1, depth), panel)
    note = _note(tile, tiling.machine, what)

    def compute(x: Any, w: Any) -> Any:
        k = te.reduce_axis((0, int(depth)), "depth")

        def element(*place: Any) -> Any:
            *row, column = place
            weight = w(tirx.floordiv(column, panel), 0, k.var, tirx.floormod(column, panel))
            return te.sum(x(*row, k.var) * weight, axis=k)

        return te.compute(tuple(shape), element, name="matmul", attrs=note)

    return builder.call_te(compute, left, relax.const(packed), primfunc_name_hint="matmul", primfunc_attrs=_FUSABLE)


def _flat_size(sizes: list[Any]) -> int | None:
    """How many rows a tensor has whose last axis is the depth; None where that is not known."""
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None


def _note(tile: Tile, machine: Machine, what: dict[str, Any]) -> dict[str, str]:
    return {NOTE: json.dumps({**what, "rows": tile.rows, "panel": tile.vectors * machine.lanes()})}


def pack(weights: np.ndarray, panel: int) -> np.ndarray:
    """[groups, columns, taps, depth] -> [groups × panels, taps, depth, panel], zeros behind the last column."""
    groups, columns, taps, depth = weights.shape
    panels = math.ceil(columns / panel)
    packed = np.zeros((groups, panels * panel, taps, depth), weights.dtype)
    packed[:, :columns] = weights
    packed = packed.reshape(groups * panels, panel, taps, depth)
    return np.ascontiguousarray(packed.transpose(0, 2, 3, 1))
