"""How the loops of each kernel run: nothing clever yet."""

from __future__ import annotations

from typing import Any

from onnxslim.targets._tvm import load_tvm

__all__ = ["schedule_kernels"]


def schedule_kernels(target: Any) -> Any:
    """A module pass."""
    tvm = load_tvm()

    @tvm.transform.module_pass(opt_level=0, name="onnxslim_schedule")
    def apply(module: Any, _context: Any) -> Any:
        return module

    return apply
