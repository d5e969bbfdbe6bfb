"""Converters for LSTM, GRU and RNN, which TVM's importer lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax
from tvm.ir import GenericConst

from onnxslim.targets.kernel_recurrent import Recurrence, recurrence_kernel
from onnxslim.targets.machine import Machine

__all__ = ["recurrent"]


def recurrent(op: str, machine: Machine) -> Callable[[Any, list[Any], dict[str, Any], int], Any]:
    """The converter for ``op``; what of its attributes is not covered, is refused before (see coverage.py)."""

    def convert(builder: Any, inputs: list[Any], attributes: dict[str, Any], opset: int) -> Any:
        data, *weights = inputs[:4]
        first = [*inputs[5:7], None, None][: 2 if op == "LSTM" else 1]
        if not all(each is None or isinstance(each, GenericConst) for each in weights):
            raise ValueError("its weights are computed; only constant ones can be compiled.")
        if str(data.ty.dtype) != "float32":
            raise ValueError(f"its type is {data.ty.dtype}; only float32 can be compiled.")
        input_weights, recurrent_weights = (each.value.numpy() for each in weights[:2])
        count, rows, hidden = recurrent_weights.shape
        biases = np.zeros((count, 2 * rows), np.float32)
        if len(weights) > 2 and weights[2] is not None:
            biases = weights[2].value.numpy()
        batch_first = bool(attributes.get("layout", 0))
        if batch_first:
            data = _swapped(builder, data, [1, 0, 2])
            first = [each if each is None else _swapped(builder, each, [1, 0, 2]) for each in first]
        steps, batch, _ = data.ty.shape
        results = []
        for place in range(count):
            what = _direction(op, place, hidden, attributes)
            packed, bias = what.pack(recurrent_weights[place], biases[place, rows:], machine)
            given = builder.emit(relax.op.matmul(data, relax.const(np.ascontiguousarray(input_weights[place].T))))
            given = builder.emit(relax.op.add(given, relax.const(biases[place, :rows])))
            states = [_state(builder, each, place, batch, hidden) for each in first]
            kernel = builder.add_func(recurrence_kernel(what, machine), op.lower())
            types = [
                relax.TensorType([steps, batch, hidden], "float32"),
                *(relax.TensorType([batch, hidden], "float32") for _ in states),
            ]
            arguments = [given, relax.const(packed), relax.const(bias), *states]
            made = builder.emit(relax.call_tir(kernel, arguments, types))
            results.append([builder.emit(relax.TupleGetItem(made, each)) for each in range(len(types))])
        # [steps, batch, hidden] of each direction -> [steps, directions, batch, hidden]; the last states likewise.
        joined = [_joined(builder, parts, int(each == 0)) for each, parts in enumerate(zip(*results, strict=True))]
        if batch_first:
            joined = [
                _swapped(builder, each, [2, 0, 1, 3] if place == 0 else [1, 0, 2]) for place, each in enumerate(joined)
            ]
        return relax.Tuple(joined)

    return convert


def _direction(op: str, place: int, hidden: int, attributes: dict[str, Any]) -> Recurrence:
    backwards = place == 1 or attributes.get("direction", b"forward") == b"reverse"
    activations = [each.decode().lower() for each in attributes.get("activations", [])]
    return Recurrence(
        op,
        hidden,
        backwards,
        late_reset=bool(attributes.get("linear_before_reset", 0)),
        activation=activations[place] if op == "RNN" and activations else "tanh",
    )


def _state(builder: Any, first: Any, place: int, batch: Any, hidden: int) -> Any:
    """The state before the first step, [batch, hidden]."""
    if first is None:
        return builder.emit(relax.op.zeros(relax.ShapeExpr([batch, hidden]), "float32"))
    part = relax.op.strided_slice(first, [0], [place], [place + 1])
    return builder.emit(relax.op.squeeze(builder.emit(part), [0]))


def _joined(builder: Any, parts: Any, axis: int) -> Any:
    wider = [builder.emit(relax.op.expand_dims(part, axis)) for part in parts]
    return wider[0] if len(wider) == 1 else builder.emit(relax.op.concat(wider, axis))


def _swapped(builder: Any, tensor: Any, axes: list[int]) -> Any:
    return builder.emit(relax.op.permute_dims(tensor, axes))
