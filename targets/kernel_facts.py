"""What is known of each kernel when it is compiled: its steps and how much it computes, for whoever times it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import tvm
import tvm_ffi
from tvm.ir import Call, Op
from tvm.s_tir import SBlockRealize
from tvm.tirx import Add, BufferStore, Div, For, IfThenElse, Max, Min, Mul, PrimFunc, SeqStmt, Sub

from onnxslim.targets.bundle import KernelEntry
from onnxslim.targets.emit import known

__all__ = ["describe_kernels", "describing"]

_ARITHMETIC = (Add, Sub, Mul, Div, Max, Min)
# Calls that compute nothing.
_MOVES = {"if_then_else", "likely", "reinterpret"}


def describing(kernels: dict[str, KernelEntry], rewrite: Sequence[Any]) -> Any:
    """The module pass that describes all kernels into ``kernels``, applies ``rewrite`` and notes what that wrote."""

    @tvm.transform.module_pass(opt_level=0, name="onnxslim_describe")  # type: ignore[untyped-decorator]
    def apply(module: Any, _context: Any) -> Any:
        before = dict(module.functions_items())
        found = describe_kernels(module)
        module = tvm.transform.Sequential(list(rewrite))(module)
        for variable, function in module.functions_items():
            entry = found.get(variable.name_hint)
            if entry is not None and variable in before and not function.same_as(before[variable]):
                found[variable.name_hint] = entry.model_copy(update={"writer": "onnxslim"})
        kernels.update(found)
        return module

    return apply


def describe_kernels(module: Any) -> dict[str, KernelEntry]:
    """Describe every kernel of a fused module whose loops nobody has rewritten yet, by its name.

    Padding and copies count no operations; an exponential, a square root and the like count one.
    """
    return {
        variable.name_hint: _describe(variable.name_hint, function)
        for variable, function in module.functions_items()
        if isinstance(function, PrimFunc)
    }


def _describe(name: str, function: PrimFunc) -> KernelEntry:
    buffers = [each for each in function.params if hasattr(each, "shape")]
    result = buffers[-1].shape if buffers else ()
    return KernelEntry(
        op=_steps(name),
        shape=tuple(str(size) if known(size) is None else int(size) for size in result),
        flops=_operations(function.body),
        bytes=_bytes(buffers),
        writer="tvm",
    )


def _bytes(buffers: Sequence[Any]) -> int | None:
    total = 0
    for buffer in buffers:
        sizes = [known(size) for size in buffer.shape]
        if None in sizes:
            return None
        total += math.prod(size for size in sizes if size is not None) * int(buffer.dtype.itemsize)
    return total


def _steps(name: str) -> str:
    """The steps of a kernel, out of the name that TVM's fusion gives it: ``fused_convolution3_add1_tir_clip``."""
    plain = re.sub(r"\d+(?=_|$)", "", name.removeprefix("fused_"))
    return plain.replace("tir_", "").replace("_", " ").strip() or name


def _operations(statement: Any) -> int | None:
    """Floating-point operations of a statement; None where they depend on sizes that are open."""
    if isinstance(statement, For):
        inside = _operations(statement.body)
        count = known(statement.extent)
        return 0 if inside == 0 else None if inside is None or count is None else inside * count
    if isinstance(statement, SBlockRealize):
        return _operations(statement.block.body)
    if isinstance(statement, BufferStore):
        return _arithmetic(statement.value)
    if isinstance(statement, SeqStmt | IfThenElse):
        parts = statement.seq if isinstance(statement, SeqStmt) else (statement.then_case, statement.else_case)
        found = [_operations(part) for part in parts if part is not None]
        known_ones = [count for count in found if count is not None]
        return sum(known_ones) if len(known_ones) == len(found) else None
    body = getattr(statement, "body", None)
    return 0 if body is None else _operations(body)


def _arithmetic(value: Any) -> int:
    count = 0

    def note(expression: Any) -> None:
        nonlocal count
        # Indices are integers, and so is what decides between elements and padding.
        if not str(expression.ty.dtype).startswith(("float", "bfloat")):
            return
        moves = isinstance(expression, Call) and isinstance(expression.op, Op) and _last(expression.op.name) in _MOVES
        count += not moves

    tvm_ffi.structural_walk(value, [((*_ARITHMETIC, Call), note)])
    return count


def _last(name: str) -> str:
    return str(name).rpartition(".")[2]
