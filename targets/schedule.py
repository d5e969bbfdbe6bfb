"""How the loops of each kernel run on a CPU: in tiles that stay in registers, in vectors, on several cores.

TVM's own loops add into memory one number at a time. For each kernel with one reduction (a convolution, a matrix
product, a pooling) the axis along which memory is contiguous moves innermost and becomes vectors, a second axis makes
several of them independent, and the sums stay in registers until the elementwise operations that follow have been
applied. Per element of the output the additions keep their order, so results do not change.

TVM checks every one of these steps; a kernel for which one is illegal keeps the loops that it came with.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

from onnxslim.targets._tvm import load_tvm

__all__ = ["schedule_kernels"]

# Below this many multiply-adds, waking other threads costs more than they save.
_PARALLEL_WORK = 1 << 15
_MAX_UNROLL = 8


def schedule_kernels(vector_bits: int, registers: int) -> Any:
    """The module pass.

    Args:
        vector_bits: width of a vector register.
        registers: how many there are.
    """
    tvm = load_tvm()

    @tvm.transform.module_pass(opt_level=0, name="onnxslim_schedule")  # type: ignore[untyped-decorator]
    def apply(module: Any, _context: Any) -> Any:
        changed = {}
        for name, function in module.functions_items():
            if isinstance(function, tvm.tirx.PrimFunc):
                scheduled = _schedule(function, vector_bits, registers)
                if scheduled is not None:
                    changed[name] = scheduled
        for name, function in changed.items():
            module[name] = function
        return module

    return apply


def _schedule(function: Any, vector_bits: int, registers: int) -> Any | None:
    """The function with better loops; None where TVM refuses a step."""
    tvm = load_tvm()
    schedule_module = importlib.import_module("tvm.s_tir.schedule")
    try:
        schedule = schedule_module.Schedule(tvm.IRModule({"main": function}))
        _Kernel(schedule, vector_bits, registers).apply()
    except (RuntimeError, ValueError):
        # TVM finds a step illegal. The function is untouched: the schedule works on a copy.
        return None
    return schedule.mod["main"].with_attrs(dict(function.attrs.items()) if function.attrs else {})


class _Kernel:
    """One function and the steps on it."""

    def __init__(self, schedule: Any, vector_bits: int, registers: int) -> None:
        self.schedule = schedule
        self.vector_bits = vector_bits
        self.registers = registers
        analysis = importlib.import_module("tvm.s_tir.dlight.analysis.common_analysis")
        self.blocks = analysis.normalize_prim_func(schedule) or []
        self.reductions = [block for block in self.blocks if "R" in block.dom_kind()]

    def apply(self) -> None:
        if not self.blocks or any(not isinstance(size, int) for block in self.blocks for size in block.dom()):
            return
        if any("O" in block.dom_kind() for block in self.blocks):
            return
        inlined = self._inline()
        blocks = [block for block in self.blocks if block.name not in inlined]
        moved: set[str] = set()
        if len(self.reductions) == 1:
            moved = self._tile(self.reductions[0])
        for block in blocks:
            if block.name not in moved and "R" not in block.dom_kind():
                self._spread(block)

    def _inline(self) -> set[str]:
        """Merge elementwise steps into the step that uses them, where that repeats no work."""
        inlined = set()
        reductions = {block.name for block in self.reductions}
        for block in self.blocks:
            if "R" in block.dom_kind():
                continue
            users = self.schedule.get_consumers(block.block_rv)
            names = {self.schedule.get(user).name_hint for user in users}
            if len(users) != 1 or (names & reductions and not self._copies(block)):
                continue
            self.schedule.compute_inline(block.block_rv)
            inlined.add(block.name)
        return inlined

    def _copies(self, block: Any) -> bool:
        """Whether a step only copies, as a padding of nothing does."""
        tvm = load_tvm()
        body = self.schedule.get(block.block_rv).body
        return isinstance(body, tvm.tirx.BufferStore) and type(body.value).__name__ == "TensorLoad"

    def _spread(self, block: Any) -> None:
        """Run an elementwise step on all cores."""
        loops = self.schedule.get_loops(block.block_rv)
        if math.prod(block.dom()) >= _PARALLEL_WORK and len(loops) > 1:
            self.schedule.parallel(self.schedule.fuse(*loops[:-1]))

    def _tile(self, block: Any) -> set[str]:
        """Tile the reduction; returns the names of the steps that moved into its tiles."""
        schedule = self.schedule
        vector = self._vector_axis(block)
        if vector is None:
            return set()
        lanes = max(1, self.vector_bits // self._bits(block))
        width = _tile_width(vector.dom, lanes)
        other = [axis for axis in block.iters if axis.kind == "S" and axis is not vector]
        second = max(other, key=lambda axis: axis.dom, default=None)
        rows = 1
        if second is not None:
            limit = min(_MAX_UNROLL, max(1, (self.registers - 4) // math.ceil(width / lanes) - 1))
            rows = max(d for d in range(1, limit + 1) if second.dom % d == 0)
        vector_outer, vector_inner = schedule.split(vector.loop_rv, [None, width])
        outer = [axis.loop_rv for axis in other if axis is not second]
        inner = []
        if second is not None:
            second_outer, second_inner = schedule.split(second.loop_rv, [None, rows])
            outer.append(second_outer)
            inner.append(second_inner)
        reduced = [axis.loop_rv for axis in block.iters if axis.kind == "R"]
        schedule.reorder(*outer, vector_outer, *reduced, *inner, vector_inner)
        moved = self._epilogue(block, vector_outer)
        if math.prod(block.dom()) >= _PARALLEL_WORK and outer:
            schedule.parallel(schedule.fuse(*outer) if len(outer) > 1 else outer[0])
        schedule.vectorize(vector_inner)
        for loop in inner:
            schedule.unroll(loop)
        start = schedule.decompose_reduction(block.block_rv, reduced[0])
        loops = schedule.get_loops(start)
        schedule.vectorize(loops[-1])
        for loop in loops[len(loops) - 1 - len(inner) : -1]:
            schedule.unroll(loop)
        return moved

    def _epilogue(self, block: Any, tile: Any) -> set[str]:
        """Let what follows the reduction run on each tile while it is in registers, or write the tile out."""
        schedule = self.schedule
        users = schedule.get_consumers(block.block_rv)
        moved: set[str] = set()
        if len(users) == 1 and self._same_indices(block, users[0]):
            schedule.reverse_compute_at(users[0], tile)
            schedule.set_scope(block.block_rv, 0, "local")
            writer = users[0]
            moved.add(schedule.get(writer).name_hint)
        else:
            writer = schedule.cache_write(block.block_rv, 0, "local")
            schedule.reverse_compute_at(writer, tile)
        schedule.vectorize(schedule.get_loops(writer)[-1])
        return moved

    def _same_indices(self, block: Any, user: Any) -> bool:
        """Whether a step reads the reduction's output exactly where it writes its own.

        TVM would move a padding too, and then leave out the border, which lies in no tile.
        """
        equal = importlib.import_module("tvm_ffi").structural_equal
        made = self.schedule.get(block.block_rv).writes[0].source
        written = self.schedule.get(user).writes[0]
        read = [region for region in self.schedule.get(user).reads if region.source.same_as(made)]
        return (
            len(read) == 1
            and equal(written.source.shape, made.shape)
            and len(read[0].region) == len(written.region)
            and all(
                equal(left.min, right.min) and equal(left.extent, right.extent)
                for left, right in zip(read[0].region, written.region, strict=True)
            )
        )

    def _bits(self, block: Any) -> int:
        return int(self.schedule.get(block.block_rv).writes[0].source.dtype.bits)

    def _vector_axis(self, block: Any) -> Any | None:
        """The innermost axis of the output, if some operand is contiguous along it."""
        tvm = load_tvm()
        axes = [axis for axis in block.iters if axis.kind == "S" and axis.dom > 1]
        if not axes:
            return None
        last = axes[-1]
        for read in self.schedule.get(block.block_rv).reads:
            wide = [region for region, size in zip(read.region, read.source.shape, strict=True) if int(size) != 1]
            if wide and last.var in tvm.tirx.analysis.undefined_vars(wide[-1].min):
                return last
        return None


def _tile_width(size: int, lanes: int) -> int:
    """How many numbers of an axis make one tile: all, or the best divisor up to two registers."""
    if size <= 2 * lanes:
        return size
    divisors = [width for width in range(1, 2 * lanes + 1) if size % width == 0]
    whole = [width for width in divisors if width % lanes == 0]
    return max(whole or divisors)
