"""Every fused kernel gets loops that we write; one that no writer takes keeps TVM's own."""

from __future__ import annotations

from typing import Any

import tvm
from tvm.tirx import PrimFunc

from onnxslim.targets.fused import read_kernel
from onnxslim.targets.kernel_contraction import write_contraction
from onnxslim.targets.kernel_cumulative import write_running_sum
from onnxslim.targets.kernel_depthwise import write_depthwise
from onnxslim.targets.kernel_pointwise import write_pointwise
from onnxslim.targets.kernel_product import write_product
from onnxslim.targets.kernel_reduction import write_reduction
from onnxslim.targets.kernel_winograd import write_winograd
from onnxslim.targets.machine import Machine
from onnxslim.targets.vector_math import vectorisable_math

__all__ = ["schedule_kernels", "write_out_math"]

_WRITERS = (
    write_product,
    write_running_sum,
    write_winograd,
    write_depthwise,
    write_contraction,
    write_reduction,
    write_pointwise,
)


def schedule_kernels(machine: Machine) -> Any:
    """The module pass."""

    @tvm.transform.module_pass(opt_level=0, name="onnxslim_schedule")  # type: ignore[untyped-decorator]
    def apply(module: Any, _context: Any) -> Any:
        for name, function in module.functions_items():
            if isinstance(function, PrimFunc):
                written = _write(function, machine)
                if written is not None:
                    module[name] = written
        return module

    return apply


def write_out_math() -> Any:
    """The module pass that makes exponentials and the like vectors, in loops of ours and of TVM."""

    @tvm.transform.module_pass(opt_level=0, name="onnxslim_math")  # type: ignore[untyped-decorator]
    def apply(module: Any, _context: Any) -> Any:
        for name, function in module.functions_items():
            if isinstance(function, PrimFunc):
                written = vectorisable_math(function)
                if not written.same_as(function):
                    module[name] = written
        return module

    return apply


def _write(function: PrimFunc, machine: Machine) -> PrimFunc | None:
    kernel = read_kernel(function)
    if kernel is None or not kernel.steps:
        return None
    for write in _WRITERS:
        written = write(kernel, machine)
        if written is not None:
            return written
    return None
