"""A kernel as TVM leaves it after fusion: steps that each fill one buffer, in a form to write kernels from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import tvm_ffi
from tvm.ir import TensorLoad
from tvm.s_tir import SBlock, SBlockRealize
from tvm.tirx import BufferStore, For, IterVar, PrimFunc, SeqStmt

from onnxslim.targets.emit import Expr, known, substitute

__all__ = ["Axis", "FusedKernel", "Step", "load_nodes", "loads", "read_kernel", "reads", "sources"]


@dataclass(frozen=True)
class Axis:
    """One loop of a step: its variable, how often it runs (int where that is known), and whether it is summed over."""

    variable: Any
    extent: Any
    reduced: bool


@dataclass(frozen=True)
class Step:
    """``output[indices] = value`` for all axes; where axes are reduced, ``value`` reads what ``start`` fills.

    Attributes:
        name: TVM's name of the block.
        axes: loops from the outermost to the innermost.
        notes: what the legalization wrote down for the kernel writer.
    """

    name: str
    axes: tuple[Axis, ...]
    output: Any
    indices: tuple[Expr, ...]
    value: Expr
    start: Expr | None
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def spatial(self) -> list[Axis]:
        """The axes of the output."""
        return [axis for axis in self.axes if not axis.reduced]

    @property
    def reduced(self) -> list[Axis]:
        """The axes that are summed over."""
        return [axis for axis in self.axes if axis.reduced]

    @property
    def is_pointwise(self) -> bool:
        """Whether each element is written once, at the place that the axes name in their order."""
        return (
            self.start is None
            and len(self.indices) == len(self.axes)
            and all(index.same_as(axis.variable) for index, axis in zip(self.indices, self.axes, strict=True))
        )

    def value_at(self, place: list[Expr]) -> Expr:
        """What a pointwise step writes at ``place``."""
        return substitute(self.value, {axis.variable: index for axis, index in zip(self.axes, place, strict=True)})


@dataclass(frozen=True)
class FusedKernel:
    """A function's parameters and its steps, in order; buffers that are no parameter live only in the function."""

    function: PrimFunc
    parameters: tuple[Any, ...]
    steps: tuple[Step, ...]

    def is_parameter(self, buffer: Any) -> bool:
        """Whether a buffer comes from, or goes to, outside."""
        return any(buffer.same_as(each) for each in self.parameters)

    def maker(self, buffer: Any) -> Step | None:
        """The step that fills a buffer; None where it is an input."""
        return next((step for step in self.steps if step.output.same_as(buffer)), None)

    def readers(self, buffer: Any) -> list[Step]:
        """The steps that read a buffer which another step fills."""
        return [step for step in self.steps if not step.output.same_as(buffer) and reads(step.value, buffer)]

    def inlined(self, value: Expr, held: Callable[[Any, list[Expr]], Expr | None]) -> Expr:
        """``value`` in terms of inputs only, every pointwise step that it leads to written out.

        Args:
            value: an expression that reads parameters and buffers of steps.
            held: what stands for a load from a buffer and indices, such as the sums in registers; None to go on.
        """

        def load(buffer: Any, indices: list[Expr]) -> Expr | None:
            there = held(buffer, indices)
            if there is not None:
                return there
            step = self.maker(buffer)
            if step is None or not step.is_pointwise:
                return None
            return self.inlined(step.value_at(indices), held)

        return substitute(value, {}, load)


def reads(value: Expr, buffer: Any) -> bool:
    """Whether an expression loads from a buffer."""
    found = []

    def note(load: TensorLoad) -> None:
        if load.source.same_as(buffer):
            found.append(load)

    tvm_ffi.structural_walk(value, [(TensorLoad, note)])
    return bool(found)


def read_kernel(function: PrimFunc) -> FusedKernel | None:
    """Read a function; None where it is of another form (predicates, several stores, opaque statements)."""
    root = function.body
    if not isinstance(root, SBlockRealize) or root.block.iter_vars:
        return None
    body = root.block.body
    steps = []
    for statement in body.seq if isinstance(body, SeqStmt) else [body]:
        step = _step(statement)
        if step is None:
            return None
        steps.append(step)
    return FusedKernel(function, tuple(function.params), tuple(steps))


def _step(statement: Any) -> Step | None:
    loops = []
    while isinstance(statement, For):
        loops.append(statement)
        statement = statement.body
    if not isinstance(statement, SBlockRealize) or known(statement.predicate) not in (1, None):
        return None
    block: SBlock = statement.block
    if block.alloc_buffers or block.match_buffers or not isinstance(block.body, BufferStore):
        return None
    # The loops must run over the axes as they are, each once.
    if len(loops) != len(block.iter_vars) and not all(known(axis.dom.extent) == 1 for axis in block.iter_vars):
        return None
    for value, each in zip(statement.iter_values, block.iter_vars, strict=True):
        if known(each.dom.min) != 0 or each.iter_type not in (IterVar.DataPar, IterVar.CommReduce):
            return None
        if known(each.dom.extent) != 1 and not any(value.same_as(loop.loop_var) for loop in loops):
            return None
    extents = [known(axis.dom.extent) for axis in block.iter_vars]
    axes = tuple(
        Axis(axis.var, axis.dom.extent if extent is None else extent, axis.iter_type == IterVar.CommReduce)
        for axis, extent in zip(block.iter_vars, extents, strict=True)
    )
    if not len(block.body.buffer.shape):
        # TVM gives a block without axes one of length 1, which nothing names.
        axes = tuple(axis for axis in axes if axis.reduced)
    if block.init is not None and not isinstance(block.init, BufferStore):
        return None
    return Step(
        name=str(block.name_hint),
        axes=axes,
        output=block.body.buffer,
        indices=tuple(block.body.indices),
        value=block.body.value,
        start=None if block.init is None else block.init.value,
        notes=dict(block.annotations),
    )


def sources(step: Step) -> list[Any]:
    """The buffers that a step reads, in the order of its expression; not the one that it fills."""
    found: list[Any] = []

    def note(load: TensorLoad) -> None:
        if not load.source.same_as(step.output) and not any(load.source.same_as(each) for each in found):
            found.append(load.source)

    tvm_ffi.structural_walk(step.value, [(TensorLoad, note)])
    return found


def load_nodes(value: Expr) -> list[TensorLoad]:
    """Every load in an expression."""
    found: list[TensorLoad] = []
    tvm_ffi.structural_walk(value, [(TensorLoad, lambda load: found.append(load))])
    return found


def loads(value: Expr, of: Callable[[Any], bool]) -> list[list[Expr]]:
    """The indices of every load from a buffer of which ``of`` is true."""
    return [list(load.indices) for load in load_nodes(value) if of(load.source)]
