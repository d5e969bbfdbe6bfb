"""The recurrence of LSTM, GRU and RNN: everything of a step that depends on the step before, all steps in one kernel.

What a step takes from the input was multiplied for all steps at once before. Each step multiplies the state by the
recurrent weights, with sums kept in registers, and applies the gates, as in the equations of ONNX's operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx import PrimFunc, Var, decl_buffer

from onnxslim.targets.emit import Expr, Stmt, cut, function, index, load_of, local, loop, parallel, seq, store, vector
from onnxslim.targets.machine import Machine

__all__ = ["Recurrence", "recurrence_kernel"]

# Registers for the sums of one tile; the state and the weights need some as well.
_WIDEST = 8


@dataclass(frozen=True)
class Recurrence:
    """One direction of a recurrent operator.

    Attributes:
        op: LSTM, GRU or RNN.
        hidden: size of the state.
        backwards: whether the last step comes first.
        late_reset: GRU with ``linear_before_reset``.
        activation: of RNN: ``tanh``, ``sigmoid`` or ``relu``.
    """

    op: str
    hidden: int
    backwards: bool = False
    late_reset: bool = False
    activation: str = "tanh"

    @property
    def gates(self) -> int:
        """How many vectors of the size of the state a step computes."""
        return {"LSTM": 4, "GRU": 3, "RNN": 1}[self.op]

    def padded(self, machine: Machine) -> int:
        """Size of one gate in whole vectors."""
        return math.ceil(self.hidden / machine.lanes()) * machine.lanes()

    def pack(self, recurrent: np.ndarray, bias: np.ndarray, machine: Machine) -> tuple[np.ndarray, np.ndarray]:
        """Recurrent weights [gates × hidden, hidden] and bias [gates × hidden] with the gates last, each padded."""
        behind = self.padded(machine) - self.hidden
        weights = recurrent.reshape(self.gates, self.hidden, self.hidden).transpose(2, 0, 1)
        rows = np.pad(weights, ((0, 0), (0, 0), (0, behind))).reshape(self.hidden, -1)
        padded = np.pad(bias.reshape(self.gates, self.hidden), ((0, 0), (0, behind))).reshape(-1)
        return np.ascontiguousarray(rows), padded


def recurrence_kernel(what: Recurrence, machine: Machine) -> PrimFunc:
    """The kernel, for any number of steps and any batch.

    Its parameters: what the input gives [steps, batch, gates × hidden], packed weights and bias, the state before the
    first step [batch, hidden], for LSTM the cell's too; then the results: the state after each step
    [steps, batch, hidden] and after the last one, for LSTM the cell's too. All float32.
    """
    return _Writer(what, machine).kernel()


class _Writer:
    def __init__(self, what: Recurrence, machine: Machine) -> None:
        self.what, self.lanes = what, machine.lanes()
        self.padded = what.padded(machine)
        self.steps, self.batch = Var("steps", "int64"), Var("batch", "int64")
        hidden, gates = what.hidden, what.gates
        state = (self.batch, hidden)
        cells = 2 if what.op == "LSTM" else 1

        def buffer(name: str, *sizes: Any) -> Any:
            return decl_buffer(tuple(map(index, sizes)), "float32", name=name)

        self.given = buffer("given", self.steps, self.batch, gates * hidden)
        self.weights = buffer("weights", hidden, gates * self.padded)
        self.bias = buffer("bias", gates * self.padded)
        self.first = [buffer(f"first{place}", *state) for place in range(cells)]
        self.every = buffer("every", self.steps, *state)
        self.states = [buffer(f"state{place}", *state) for place in range(cells)]

    def kernel(self) -> PrimFunc:
        parameters = [self.given, self.weights, self.bias, *self.first, self.every, *self.states]
        return function(parameters, parallel([self.batch], self._sample)).with_attr("op_pattern", 8)

    def _sample(self, sample: Expr) -> Stmt:
        sums, declared = local(self.what.gates * self.padded, name="gates")
        scaled, declared_scaled = local(self.what.hidden, name="scaled")
        reset_first = self.what.op == "GRU" and not self.what.late_reset

        def begin(unit: Expr) -> Stmt:
            pairs = zip(self.first, self.states, strict=True)
            return seq(*(store(state, load_of(first, sample, unit), sample, unit) for first, state in pairs))

        def step(count: Expr) -> Stmt:
            time = self.steps - 1 - count if self.what.backwards else count
            return {"LSTM": self._lstm, "GRU": self._gru, "RNN": self._rnn}[self.what.op](sums, scaled, time, sample)

        return seq(
            declared, declared_scaled if reset_first else None, self._units(begin), loop("step", self.steps, step)
        )

    # ------------------------------------------------------------------------------------------------- the equations

    def _lstm(self, sums: Any, _: Any, time: Expr, sample: Expr) -> Stmt:
        state, cell = self.states

        def unit(place: Expr) -> Stmt:
            enter, leave, forget, new = (self._gate(sums, gate, time, sample, place) for gate in range(4))
            kept = tirx.sigmoid(forget) * load_of(cell, sample, place) + tirx.sigmoid(enter) * tirx.tanh(new)
            given = tirx.sigmoid(leave) * tirx.tanh(load_of(cell, sample, place))
            return seq(
                store(cell, kept, sample, place),
                store(self.every, given, time, sample, place),
                store(state, load_of(self.every, time, sample, place), sample, place),
            )

        return seq(self._product(sums, self._state_of(sample), 0, 4), self._units(unit))

    def _gru(self, sums: Any, scaled: Any, time: Expr, sample: Expr) -> Stmt:
        (state,) = self.states

        def reset(place: Expr) -> Expr:
            return tirx.sigmoid(self._gate(sums, 1, time, sample, place))

        def blend(new: Expr, place: Expr) -> Stmt:
            update = tirx.sigmoid(self._gate(sums, 0, time, sample, place))
            value = new + update * (load_of(state, sample, place) - new)
            return seq(
                store(self.every, value, time, sample, place),
                store(state, load_of(self.every, time, sample, place), sample, place),
            )

        def late(place: Expr) -> Stmt:
            given = load_of(self.given, time, sample, 2 * self.what.hidden + place)
            mine = load_of(sums, 2 * self.padded + place)
            return blend(tirx.tanh(given + reset(place) * mine), place)

        if self.what.late_reset:
            return seq(self._product(sums, self._state_of(sample), 0, 3), self._units(late))
        return seq(
            self._product(sums, self._state_of(sample), 0, 2),
            self._units(lambda place: store(scaled, reset(place) * load_of(state, sample, place), place)),
            self._product(sums, lambda place: load_of(scaled, place), 2, 3),
            self._units(lambda place: blend(tirx.tanh(self._gate(sums, 2, time, sample, place)), place)),
        )

    def _rnn(self, sums: Any, _: Any, time: Expr, sample: Expr) -> Stmt:
        (state,) = self.states

        def unit(place: Expr) -> Stmt:
            value = _ACTIVATIONS[self.what.activation](self._gate(sums, 0, time, sample, place))
            return seq(
                store(self.every, value, time, sample, place),
                store(state, load_of(self.every, time, sample, place), sample, place),
            )

        return seq(self._product(sums, self._state_of(sample), 0, 1), self._units(unit))

    # ------------------------------------------------------------------------------------------------------ the loops

    def _state_of(self, sample: Expr) -> Callable[[Expr], Expr]:
        return lambda place: load_of(self.states[0], sample, place)

    def _gate(self, sums: Any, gate: int, time: Expr, sample: Expr, place: Expr) -> Expr:
        given = load_of(self.given, time, sample, gate * self.what.hidden + place)
        return given + load_of(sums, gate * self.padded + place)

    def _units(self, body: Callable[[Expr], Stmt]) -> Stmt:
        """``body`` for all of the state, in vectors."""
        vectors, rest = divmod(self.what.hidden, self.lanes)
        whole = loop("unit", vectors, lambda each: vector(self.lanes, lambda lane: body(each * self.lanes + lane)))
        left = loop("unit", rest, lambda each: body(vectors * self.lanes + each))
        return seq(whole if vectors else None, left if rest else None)

    def _product(self, sums: Any, factor: Callable[[Expr], Expr], start: int, stop: int) -> Stmt:
        """``sums = bias + factor @ weights`` for some of the gates."""
        first = start * self.padded
        vectors = (stop - start) * self.padded // self.lanes
        widths: Sequence[int] = range(_WIDEST, 0, -1)
        tiles = [self._tiles(sums, factor, first + begin * self.lanes, *run) for begin, *run in cut(vectors, widths)]
        return seq(*tiles)

    def _tiles(self, sums: Any, factor: Callable[[Expr], Expr], begin: int, width: int, count: int) -> Stmt:
        step = width * self.lanes
        return loop("tile", count, lambda tile: self._tile(sums, factor, begin + tile * step, width))

    def _tile(self, sums: Any, factor: Callable[[Expr], Expr], begin: Expr, width: int) -> Stmt:
        tile, declared = local(width * self.lanes)

        def each(body: Callable[[Expr], Stmt]) -> Stmt:
            return seq(*(self._part(part, body) for part in range(width)))

        def add(unit: Expr) -> Stmt:
            return each(
                lambda at: store(tile, load_of(tile, at) + factor(unit) * load_of(self.weights, unit, begin + at), at)
            )

        return seq(
            declared,
            each(lambda at: store(tile, load_of(self.bias, begin + at), at)),
            loop("depth", self.what.hidden, add),
            each(lambda at: store(sums, load_of(tile, at), begin + at)),
        )

    def _part(self, part: int, body: Callable[[Expr], Stmt]) -> Stmt:
        return vector(self.lanes, lambda lane: body(part * self.lanes + lane))


_ACTIVATIONS: dict[str, Callable[[Expr], Expr]] = {
    "tanh": tirx.tanh,
    "sigmoid": tirx.sigmoid,
    "relu": lambda value: tirx.max(value, tirx.const(0.0, "float32")),
}
