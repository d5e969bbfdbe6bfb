"""Writing loops in TVM's tensor IR: a few words for counted loops, vectors, and numbers kept in registers.

Schedules move loops that TVM made; the kernels here are written out instead, so that what is in registers, what is a
vector and where the edges of a tensor lie is decided by us and not found out by an analysis. Every function takes and
returns plain TIR nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import tvm_ffi
from tvm import tirx
from tvm.ir import IRModule, TensorLoad
from tvm.tirx import AllocBuffer, BufferStore, For, ForKind, IntImm, PrimFunc, SeqStmt, Var, decl_buffer

__all__ = [
    "Expr",
    "Stmt",
    "cut",
    "function",
    "index",
    "known",
    "load_of",
    "local",
    "loop",
    "parallel",
    "seq",
    "store",
    "substitute",
    "vector",
    "with_unique_names",
]

Expr: TypeAlias = Any
Stmt: TypeAlias = Any
Size: TypeAlias = Any
"""A size or an index: a Python int where it is known, else an expression."""


def known(size: Size) -> int | None:
    """The value of a size that does not depend on the input."""
    if isinstance(size, int):
        return size
    return int(size.value) if isinstance(size, IntImm) else None


def index(value: Size) -> Expr:
    """A Python int as a constant of the index type; an expression as it is, if need be cast."""
    if isinstance(value, int):
        return IntImm("int64", value)
    return value if str(value.ty.dtype) == "int64" else value.astype("int64")


def loop(name: str, count: Size, body: Callable[[Expr], Stmt], kind: int = ForKind.SERIAL) -> Stmt:
    """``for name in range(count): body(name)``; a loop that runs once leaves only its body."""
    if known(count) == 1 and kind != ForKind.PARALLEL:
        return body(index(0))
    variable = Var(name, "int64")
    return For(variable, index(0), index(count), kind, body(variable))


def vector(lanes: int, body: Callable[[Expr], Stmt]) -> Stmt:
    """``body(lane)`` for all lanes at once."""
    return loop("lane", lanes, body, ForKind.VECTORIZED)


def parallel(sizes: Sequence[Size], body: Callable[..., Stmt], *, serial: bool = False) -> Stmt:
    """All of a grid, its points handed out to the threads; ``serial`` where that costs more than it saves."""
    total: Size = 1
    for size in sizes:
        total = size if known(total) == 1 else total if known(size) == 1 else index(total) * index(size)
    if known(total) is not None:
        total = known(total)

    def point(flat: Expr) -> Stmt:
        places: list[Expr] = []
        rest = flat
        for position, size in reversed(list(enumerate(sizes))):
            if known(size) == 1:
                places.append(index(0))
            elif all(known(outer) == 1 for outer in sizes[:position]):
                places.append(rest)
            else:
                places.append(tirx.floormod(rest, index(size)))
                rest = tirx.floordiv(rest, index(size))
        return body(*places[::-1])

    return loop("task", total, point, ForKind.SERIAL if serial or known(total) == 1 else ForKind.PARALLEL)


def seq(*statements: Stmt | None) -> Stmt:
    """One after the other; None is nothing."""
    kept = [statement for statement in statements if statement is not None]
    return kept[0] if len(kept) == 1 else SeqStmt(kept) if kept else tirx.Evaluate(IntImm("int32", 0))


def local(count: Size, dtype: str = "float32", name: str = "sums") -> tuple[Any, Stmt]:
    """A few numbers that are meant to live in registers, and the statement that declares them."""
    # Any other scope, "local" too, TVM takes from the heap, with a call for each tile.
    buffer = decl_buffer((index(count),), dtype, name=name, scope="global")
    return buffer, AllocBuffer(buffer)


def store(buffer: Any, value: Expr, *place: Size) -> Stmt:
    """``buffer[place] = value``."""
    return BufferStore(buffer, value, [index(each) for each in place])


def load_of(buffer: Any, *place: Size) -> Expr:
    """``buffer[place]``."""
    return tirx.BufferLoad(buffer, [index(each) for each in place])


def function(parameters: Sequence[Any], body: Stmt) -> PrimFunc:
    """A function over buffers that do not overlap."""
    return PrimFunc(list(parameters), body).with_attr("tirx.noalias", True)


def with_unique_names(function: PrimFunc) -> PrimFunc:
    """The same function; a variable that several places declare, since they share an expression, is one for each."""
    return tirx.transform.ConvertSSA()(IRModule({"main": function}))["main"]


def substitute(
    expression: Expr, variables: Mapping[Any, Expr], loads: Callable[[Any, list[Expr]], Expr | None] | None = None
) -> Expr:
    """``expression`` with variables replaced, and loads from buffers where ``loads(buffer, indices)`` gives something.

    Indices are replaced first; what ``loads`` returns is taken as it is.
    """

    def variable(each: Var) -> Expr:
        return variables.get(each, each)

    def load(each: TensorLoad) -> Expr:
        replaced = loads(each.source, list(each.indices)) if loads is not None else None
        return each if replaced is None else replaced

    return tvm_ffi.structural_map(expression, [(TensorLoad, load), (Var, variable)])


def cut(size: int, widths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Cut ``size`` into runs of equal tiles: (start, width, how many), taking the widest of ``widths`` first."""
    runs, start = [], 0
    for width in widths:
        count = (size - start) // width
        if count:
            runs.append((start, width, count))
            start += count * width
    assert start == size, "the widths must end with 1"
    return runs
