"""Channels last throughout: where a network convolves, every tensor of its neighbourhood is kept NHWC.

A pixel's channels then lie beside each other, which is what convolutions, pools and everything element by element read
and write as vectors, with any number of channels and no blocks to fill up. One walk over the function: each tensor may
be had in ONNX's order, channels last, or both, and is transposed only when somebody needs the order that is not there.
A transposition that the model itself holds is often just the other order, and then costs nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax
from tvm.ir import Call, GenericConst

from onnxslim.targets.emit import known

__all__ = ["channels_last"]

# Element by element on the first argument; further arguments are numbers or dtypes.
_UNARY = frozenset(
    [
        "abs",
        "acos",
        "asin",
        "atan",
        "astype",
        "ceil",
        "clip",
        "cos",
        "erf",
        "exp",
        "floor",
        "isfinite",
        "isinf",
        "isnan",
        "log",
        "logical_not",
        "negative",
        "nn.gelu",
        "nn.gelu_tanh",
        "nn.leakyrelu",
        "nn.relu",
        "nn.selu",
        "nn.silu",
        "nn.softplus",
        "rsqrt",
        "round",
        "sigmoid",
        "sign",
        "sin",
        "sqrt",
        "square",
        "tan",
        "tanh",
        "trunc",
    ]
)
# Element by element on all arguments, which are broadcast.
_BROADCAST = frozenset(
    [
        "add",
        "subtract",
        "multiply",
        "divide",
        "maximum",
        "minimum",
        "power",
        "where",
        "equal",
        "not_equal",
        "less",
        "less_equal",
        "greater",
        "greater_equal",
        "logical_and",
        "logical_or",
        "logical_xor",
        "floor_divide",
        "mod",
        "floor_mod",
    ]
)
_REDUCTIONS = frozenset(["mean", "sum", "max", "min", "prod"])
_POOLS = frozenset(
    [
        "nn.max_pool1d",
        "nn.avg_pool1d",
        "nn.max_pool2d",
        "nn.avg_pool2d",
        "nn.adaptive_avg_pool1d",
        "nn.adaptive_avg_pool2d",
    ]
)
_CONVOLUTIONS = {"nn.conv1d": "NCW", "nn.conv2d": "NCHW"}
_TRANSPOSED = {"nn.conv1d_transpose": "NCW", "nn.conv2d_transpose": "NCHW"}
_RESHAPES = frozenset(["reshape", "squeeze", "expand_dims", "flatten"])


def channels_last() -> Any:
    """The module pass."""

    @tvm.transform.module_pass(opt_level=0, name="onnxslim_channels_last")  # type: ignore[untyped-decorator]
    def apply(module: Any, _context: Any) -> Any:
        for name, function in module.functions_items():
            if isinstance(function, relax.Function) and any(
                _convolves(binding) for block in function.body.blocks for binding in block.bindings
            ):
                module.update_func(name, _Walk(relax.BlockBuilder(), function).rewritten())
        return module

    return apply


def _convolves(binding: Any) -> bool:
    return _op_name(getattr(binding, "value", None)) in {**_CONVOLUTIONS, **_TRANSPOSED}


def _op_name(expression: Any) -> str:
    """``nn.conv2d`` of a call of an operator; empty of anything else."""
    if not isinstance(expression, Call) or not isinstance(expression.op, tvm.ir.Op):
        return ""
    return str(expression.op.name).removeprefix("relax.")


def _shape(expression: Any) -> list[Any] | None:
    """The sizes of a tensor, ints where they are known; None where not even their number is."""
    shape = getattr(expression.ty, "shape", None)
    if shape is None or not hasattr(shape, "values"):
        return None
    return [size if known(size) is None else known(size) for size in shape.values]


def _rank(expression: Any) -> int:
    return int(getattr(expression.ty, "ndim", -1))


def _order(rank: int) -> list[int]:
    """Axes of channels last, in terms of ONNX's."""
    return [0, *range(2, rank), 1]


def _moved(axis: int, rank: int) -> int:
    """Where an axis of ONNX's order lies when channels are last."""
    return _order(rank).index(axis % rank)


class _Walk:
    """One walk over the bindings of a function."""

    def __init__(self, builder: Any, function: Any) -> None:
        self.builder, self.function = builder, function
        self.plain: dict[Any, Any] = {}
        self.last: dict[Any, Any] = {}
        self.last_parts: dict[Any, Any] = {}
        self.rules: dict[str, Callable[[Any, Any], bool]] = {
            **dict.fromkeys(_UNARY, self._unary),
            **dict.fromkeys(_BROADCAST, self._broadcast),
            **dict.fromkeys(_REDUCTIONS, self._reduce),
            **dict.fromkeys(_POOLS, self._pool),
            **dict.fromkeys(_CONVOLUTIONS, self._convolution),
            **dict.fromkeys(_TRANSPOSED, self._transposed_convolution),
            **dict.fromkeys(_RESHAPES, self._reshape),
            "concat": self._concat,
            "split": self._split,
            "permute_dims": self._permute,
            "nn.pad": self._pad,
            "nn.prelu": self._prelu,
            "nn.softmax": self._softmax,
            "nn.log_softmax": self._softmax,
            "nn.group_norm": self._norm,
            "nn.instance_norm": self._norm,
            "image.resize2d": self._resize,
            "strided_slice": self._slice,
        }

    def rewritten(self) -> Any:
        """The function, channels last."""
        function = self.function
        with self.builder.function("main", list(function.params), attrs=dict(function.attrs.items())):
            for block in function.body.blocks:
                if isinstance(block, relax.DataflowBlock):
                    with self.builder.dataflow():
                        self._block(block)
                        outputs = [each.var for each in block.bindings if not isinstance(each.var, relax.DataflowVar)]
                        for variable in outputs:
                            self.plain[variable] = self.builder.emit_output(self.get(variable))
                    # What was made in the block can only be read in it.
                    self.last.clear()
                    self.last_parts.clear()
                else:
                    self._block(block)
            self.builder.emit_func_output(self._plain_expression(function.body.body))
        return self.builder.get()["main"]

    def _block(self, block: Any) -> None:
        for binding in block.bindings:
            if isinstance(binding, relax.MatchCast):
                self.plain[binding.var] = self.builder.match_cast(self.get(binding.value), binding.ty)
                continue
            value = binding.value
            if isinstance(value, relax.TupleGetItem) and value.tuple_value in self.last_parts:
                self.last[binding.var] = self.last_parts[value.tuple_value][int(value.index)]
                continue
            rule = self.rules.get(_op_name(value))
            if rule is None or not rule(binding.var, value):
                self.plain[binding.var] = self.builder.emit(self._plain_expression(value))

    # ----------------------------------------------------------------------------------------------------- both orders

    def get(self, expression: Any) -> Any:
        """An argument in ONNX's order."""
        if not isinstance(expression, relax.Var):
            return self._plain_expression(expression)
        if expression not in self.plain:
            if expression in self.last:
                inverse = [int(axis) for axis in np.argsort(_order(_rank(expression)))]
                self.plain[expression] = self._transposed(self.last[expression], inverse)
            elif expression in self.last_parts:
                parts = self.last_parts[expression]
                inverse = [int(axis) for axis in np.argsort(_order(_rank(parts[0])))]
                self.plain[expression] = self.builder.emit(
                    relax.Tuple([self._transposed(part, inverse) for part in parts])
                )
            else:
                return expression
        return self.plain[expression]

    def get_last(self, expression: Any) -> Any:
        """An argument with channels last."""
        rank = _rank(expression)
        if isinstance(expression, GenericConst):
            return relax.const(np.ascontiguousarray(expression.value.numpy().transpose(_order(rank))))
        if expression not in self.last:
            made = self._transposed(self.get(expression), _order(rank))
            if not isinstance(expression, relax.Var):
                return made
            self.last[expression] = made
        return self.last[expression]

    def has_last(self, expression: Any) -> bool:
        """Whether an argument is there with channels last."""
        return isinstance(expression, relax.Var) and expression in self.last

    def _transposed(self, expression: Any, axes: Sequence[int]) -> Any:
        """A transposition; one that only moves axes of one element is a reshape, and a reshape copies nothing."""
        shape = _shape(expression)
        if shape is not None:
            moved = [axis for axis in axes if shape[axis] != 1]
            if moved == sorted(moved):
                return self.builder.emit(relax.op.reshape(expression, [shape[axis] for axis in axes]))
        return self.builder.emit(relax.op.permute_dims(expression, list(axes)))

    def _plain_expression(self, value: Any) -> Any:
        """An expression over arguments in ONNX's order."""
        walk = self

        @relax.expr_functor.mutator
        class Mutator(relax.PyExprMutator):  # type: ignore[misc]
            def visit_var_(self, variable: Any) -> Any:
                return walk.get(variable)

            def visit_dataflow_var_(self, variable: Any) -> Any:
                return walk.get(variable)

        return Mutator().visit_expr(value)

    def _set(self, variable: Any, value: Any) -> bool:
        self.last[variable] = self.builder.emit(value)
        return True

    def _again(self, call: Any, arguments: Sequence[Any]) -> Any:
        return Call(call.op, list(arguments), call.attrs, call.ty_args)

    # ----------------------------------------------------------------------------------------------------------- rules

    def _unary(self, variable: Any, call: Any) -> bool:
        if not self.has_last(call.args[0]):
            return False
        return self._set(variable, self._again(call, [self.last[call.args[0]], *call.args[1:]]))

    def _broadcast(self, variable: Any, call: Any) -> bool:
        rank = _rank(call)
        if rank < 3 or not any(self.has_last(each) and _rank(each) == rank for each in call.args):
            return False
        shapes = [_shape(each) for each in call.args]
        if any(shape is None for shape in shapes):
            return False
        arguments = []
        for each, shape in zip(call.args, shapes, strict=True):
            if all(size == 1 for size in shape or ()) and len(shape or ()) < 2:
                arguments.append(self.get(each))
            elif _rank(each) == rank:
                arguments.append(self.get_last(each))
            elif isinstance(each, GenericConst):
                values = each.value.numpy()
                arguments.append(
                    self.get_last(relax.const(values.reshape([1] * (rank - values.ndim) + list(values.shape))))
                )
            else:
                full = self.builder.emit(
                    relax.op.reshape(self.get(each), [1] * (rank - _rank(each)) + list(shape or ()))
                )
                arguments.append(self._transposed(full, _order(rank)))
        return self._set(variable, self._again(call, arguments))

    def _convolution(self, variable: Any, call: Any) -> bool:
        name, attributes = _op_name(call), call.attrs
        data, weight = call.args[:2]
        plain = _CONVOLUTIONS[name]
        if (
            str(attributes.data_layout) != plain
            or not isinstance(weight, GenericConst)
            or str(data.ty.dtype) != "float32"
        ):
            return False
        spatial = plain[2:]
        make = relax.op.nn.conv1d if name == "nn.conv1d" else relax.op.nn.conv2d
        return self._set(
            variable,
            make(
                self.get_last(data),
                weight,
                strides=list(attributes.strides),
                padding=list(attributes.padding),
                dilation=list(attributes.dilation),
                groups=int(attributes.groups),
                data_layout=f"N{spatial}C",
                kernel_layout=str(attributes.kernel_layout),
            ),
        )

    def _transposed_convolution(self, variable: Any, call: Any) -> bool:
        """Every output between two inputs belongs to a phase; each phase is a convolution, and all have one in common.

        Its output channels are those of all phases, which are then laid out between each other.
        """
        attributes = call.attrs
        data, weight = call.args[:2]
        shape, out = _shape(data), _shape(call)
        plain = _TRANSPOSED[_op_name(call)]
        rank = len(plain) - 2
        fits = (
            str(attributes.data_layout) == plain
            and isinstance(weight, GenericConst)
            and str(data.ty.dtype) == "float32"
            and int(attributes.groups) == 1
            and all(int(value) == 1 for value in attributes.dilation)
            and shape is not None
            and out is not None
            and all(isinstance(size, int) for size in (*shape[1:], *out[1:]))
        )
        if not fits or shape is None or out is None:
            return False
        strides, pads = ([int(value) for value in values] for values in (attributes.strides, attributes.padding))
        values = weight.value.numpy().transpose(
            [str(attributes.kernel_layout).index(axis) for axis in f"IO{plain[2:]}"]
        )
        phases = [_phases(*axis) for axis in zip(values.shape[2:], strides, pads, strict=False)]
        counts = [-(-size // stride) for size, stride in zip(out[2:], strides, strict=True)]
        before = [-low for low, _, _ in phases]
        # What the convolution would make beyond the last output needs no padding and is cut off with it.
        behind = [
            max(0, count - size - pad + taps - 1)
            for count, size, pad, (_, taps, _) in zip(counts, shape[2:], before, phases, strict=True)
        ]
        if min(before) < 0:
            return False
        made = [
            size + pad + after - taps + 1
            for size, pad, after, (_, taps, _) in zip(shape[2:], before, behind, phases, strict=True)
        ]
        make = relax.op.nn.conv1d if rank == 1 else relax.op.nn.conv2d
        value = self.builder.emit(
            make(
                self.get_last(data),
                relax.const(_phase_weights(values, phases, strides)),
                padding=[*before, *behind],
                data_layout=f"N{plain[2:]}C",
                kernel_layout=f"OI{plain[2:]}",
            )
        )
        # [N, q..., phase..., C] -> [N, q, phase, ..., C]
        value = self.builder.emit(relax.op.reshape(value, [out[0], *made, *strides, out[1]]))
        if any(stride > 1 for stride in strides):
            order = [0, *(axis for place in range(rank) for axis in (1 + place, 1 + rank + place)), 1 + 2 * rank]
            value = self.builder.emit(relax.op.permute_dims(value, order))
        whole = [count * stride for count, stride in zip(made, strides, strict=True)]
        value = self.builder.emit(relax.op.reshape(value, [out[0], *whole, out[1]]))
        if whole != out[2:]:
            axes = list(range(1, 1 + rank))
            value = relax.op.strided_slice(value, axes, [0] * rank, list(out[2:]))
        return self._set(variable, value)

    def _pool(self, variable: Any, call: Any) -> bool:
        name, attributes, data = _op_name(call), call.attrs, call.args[0]
        if not self.has_last(data):
            return False
        layout = "NWC" if name.endswith("1d") else "NHWC"
        make = getattr(relax.op.nn, name.removeprefix("nn."))
        if "adaptive" in name:
            output_size = None if attributes.output_size is None else list(attributes.output_size)
            return self._set(variable, make(self.last[data], output_size, layout=layout))
        return self._set(
            variable,
            make(
                self.last[data],
                pool_size=list(attributes.pool_size),
                strides=list(attributes.strides),
                padding=list(attributes.padding),
                dilation=list(attributes.dilation),
                ceil_mode=bool(attributes.ceil_mode),
                count_include_pad=bool(attributes.count_include_pad),
                layout=layout,
            ),
        )

    def _reduce(self, variable: Any, call: Any) -> bool:
        data, attributes = call.args[0], call.attrs
        if not self.has_last(data):
            return False
        rank = _rank(data)
        axes = list(range(rank)) if attributes.axis is None else [int(axis) % rank for axis in attributes.axis]
        kept = [axis for axis in _order(rank) if axis not in axes]
        if not attributes.keepdims and kept != sorted(kept):
            return False
        make = getattr(relax.op, _op_name(call))
        value = make(self.last[data], [_moved(axis, rank) for axis in axes], bool(attributes.keepdims))
        if attributes.keepdims:
            return self._set(variable, value)
        self.plain[variable] = self.builder.emit(value)
        return True

    def _concat(self, variable: Any, call: Any) -> bool:
        parts, axis = call.args[0], call.attrs.axis
        fields = list(parts.fields) if isinstance(parts, relax.Tuple) else []
        rank = _rank(call)
        if axis is None or rank < 3 or not any(self.has_last(each) for each in fields):
            return False
        return self._set(variable, relax.op.concat([self.get_last(each) for each in fields], _moved(int(axis), rank)))

    def _split(self, variable: Any, call: Any) -> bool:
        data, attributes = call.args[0], call.attrs
        if not self.has_last(data):
            return False
        sections = attributes.indices_or_sections
        sections = int(sections) if known(sections) is not None else [int(place) for place in sections]
        made = self.builder.emit(relax.op.split(self.last[data], sections, _moved(int(attributes.axis), _rank(data))))
        count = len(variable.ty.fields)
        self.last_parts[variable] = [self.builder.emit(relax.TupleGetItem(made, part)) for part in range(count)]
        return True

    def _permute(self, variable: Any, call: Any) -> bool:
        data = call.args[0]
        if not isinstance(data, relax.Var):
            return False
        rank = _rank(data)
        axes = (
            [rank - 1 - axis for axis in range(rank)]
            if call.attrs.axes is None
            else [int(a) % rank for a in call.attrs.axes]
        )
        order = _order(rank)
        if self.has_last(data):
            from_last = [order.index(axis) for axis in axes]
            if from_last == list(range(rank)):
                self.plain[variable] = self.last[data]
            else:
                self.plain[variable] = self._transposed(self.last[data], from_last)
            return True
        if rank >= 3 and [axes[axis] for axis in order] == list(range(rank)):
            # What this makes is, channels last, what it was made from.
            self.last[variable] = self.get(data)
            return True
        return False

    def _reshape(self, variable: Any, call: Any) -> bool:
        data = call.args[0]
        if not self.has_last(data):
            return False
        before, after = _shape(data), _shape(call)
        if before is None or after is None or len(after) < 2:
            return False
        if all(size == 1 for size in before[2:]) or before[1] == 1:
            # Both orders are the same sequence of numbers.
            self.plain[variable] = self.builder.emit(relax.op.reshape(self.last[data], after))
            return True
        same = all(_equal(left, right) for left, right in zip(before[:2], after[:2], strict=True))
        if not same or len(after) < 3:
            return False
        return self._set(variable, relax.op.reshape(self.last[data], [after[0], *after[2:], after[1]]))

    def _pad(self, variable: Any, call: Any) -> bool:
        data, attributes = call.args[0], call.attrs
        if not self.has_last(data):
            return False
        rank = _rank(data)
        widths = [int(width) for width in attributes.pad_width]
        moved = [width for axis in _order(rank) for width in widths[2 * axis : 2 * axis + 2]]
        value = float(attributes.pad_value)
        return self._set(variable, relax.op.nn.pad(self.last[data], moved, str(attributes.pad_mode), value))

    def _prelu(self, variable: Any, call: Any) -> bool:
        data, slope = call.args
        if not self.has_last(data):
            return False
        axis = _moved(int(call.attrs.axis), _rank(data))
        return self._set(variable, relax.op.nn.prelu(self.last[data], self.get(slope), axis))

    def _softmax(self, variable: Any, call: Any) -> bool:
        data = call.args[0]
        if not self.has_last(data):
            return False
        make = getattr(relax.op.nn, _op_name(call).removeprefix("nn."))
        return self._set(variable, make(self.last[data], _moved(int(call.attrs.axis), _rank(data))))

    def _norm(self, variable: Any, call: Any) -> bool:
        data, attributes = call.args[0], call.attrs
        if not self.has_last(data):
            return False
        rank = _rank(data)
        axes = [_moved(int(axis), rank) for axis in attributes.axes]
        channel = _moved(int(attributes.channel_axis), rank)
        scale, shift = (self.get(each) for each in call.args[1:])
        more = {
            "epsilon": float(attributes.epsilon),
            "center": bool(attributes.center),
            "scale": bool(attributes.scale),
        }
        if _op_name(call) == "nn.instance_norm":
            return self._set(variable, relax.op.nn.instance_norm(self.last[data], scale, shift, channel, axes, **more))
        groups = int(attributes.num_groups)
        return self._set(variable, relax.op.nn.group_norm(self.last[data], scale, shift, groups, channel, axes, **more))

    def _resize(self, variable: Any, call: Any) -> bool:
        data, attributes = call.args[0], call.attrs
        if not self.has_last(data) or str(attributes.layout) != "NCHW":
            return False
        return self._set(
            variable,
            relax.op.image.resize2d(
                self.last[data],
                self.get(call.args[1]),
                roi=None if attributes.roi is None else [float(value) for value in attributes.roi],
                layout="NHWC",
                method=str(attributes.method),
                coordinate_transformation_mode=str(attributes.coordinate_transformation_mode),
                rounding_method=str(attributes.rounding_method),
                cubic_alpha=float(attributes.cubic_alpha),
                cubic_exclude=int(attributes.cubic_exclude),
                extrapolation_value=float(attributes.extrapolation_value),
            ),
        )

    def _slice(self, variable: Any, call: Any) -> bool:
        data, axes = call.args[:2]
        if not self.has_last(data) or not isinstance(axes, relax.Tuple):
            return False
        rank = _rank(data)
        numbers = [known(axis) for axis in axes.fields]
        if any(number is None for number in numbers):
            return False
        moved = [_moved(number, rank) for number in numbers if number is not None]
        return self._set(
            variable,
            relax.op.strided_slice(
                self.last[data], moved, *call.args[2:], assume_inbound=bool(call.attrs.assume_inbound)
            ),
        )


def _phases(taps: int, stride: int, pad: int) -> tuple[int, int, list[list[tuple[int, int]]]]:
    """One axis of a transposed convolution as convolutions.

    Output ``stride * q + phase`` gets input ``q + (phase + pad) // stride - t`` times the filter's tap
    ``(phase + pad) % stride + stride * t``.

    Returns:
        The first input of a window relative to q, how many inputs it spans, and for each phase the pairs of (input in
        the window, tap of the filter).
    """
    pairs = [
        [((phase + pad) // stride - t, tap) for t, tap in enumerate(range((phase + pad) % stride, taps, stride))]
        for phase in range(stride)
    ]
    reached = [place for phase in pairs for place, _ in phase] or [0]
    low = min(reached)
    return low, max(reached) - low + 1, [[(place - low, tap) for place, tap in phase] for phase in pairs]


def _phase_weights(
    values: np.ndarray, phases: list[tuple[int, int, list[list[tuple[int, int]]]]], strides: list[int]
) -> np.ndarray:
    """[inputs, outputs, taps...] -> [phases × outputs, inputs, window...]."""
    inputs, outputs = values.shape[:2]
    packed = np.zeros((*strides, outputs, inputs, *(taps for _, taps, _ in phases)), values.dtype)
    for phase in np.ndindex(*strides):
        pairs = [phases[axis][2][number] for axis, number in enumerate(phase)]
        for chosen in itertools.product(*pairs):
            window, taps = zip(*chosen, strict=True)
            packed[(*phase, slice(None), slice(None), *window)] = values[(slice(None), slice(None), *taps)].T
    return packed.reshape(-1, inputs, *packed.shape[len(strides) + 2 :])


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, int) or isinstance(right, int):
        return bool(isinstance(left, int) and isinstance(right, int) and left == right)
    return bool(tvm_ffi.structural_equal(left, right))
