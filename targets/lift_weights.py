"""Weights of a compiled model: kept out of its library, in a file that is mapped into memory and never copied.

TVM stores constants inside the library, from where they are copied twice while it loads: three times their bytes.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import tvm
from tvm import relax

__all__ = ["lift_weights"]

_LEAST_BYTES = 1024


def lift_weights(weights: list[np.ndarray], entry: str = "main") -> Any:
    """The module pass that makes parameters of the larger constants of a function, after its own; equal ones are one.

    Args:
        weights: filled with the values of the new parameters, in their order.
        entry: name of the function.
    """

    @tvm.transform.module_pass(opt_level=0, name="onnxslim_lift_weights")  # type: ignore[untyped-decorator]
    def apply(module: Any, _context: Any) -> Any:
        function = module[entry]
        lifter = _Lifter(module, weights)
        body = lifter.visit_expr(function.body)
        lifted = relax.Function(
            [*function.params, *lifter.params], body, function.ret_ty, function.is_pure, function.attrs
        )
        module = tvm.IRModule(dict(module.functions_items()), attrs=module.attrs)
        module[entry] = lifted
        return module

    return apply


@relax.expr_functor.mutator
class _Lifter(relax.PyExprMutator):  # type: ignore[misc]
    """Replaces constants by variables."""

    def __init__(self, module: Any, weights: list[np.ndarray]) -> None:
        super().__init__(module)
        self.params: list[Any] = []
        self._weights = weights
        self._found: dict[tuple[str, tuple[int, ...], bytes], Any] = {}

    def visit_generic_const_(self, constant: Any) -> Any:
        if not isinstance(constant.value, tvm.runtime.Tensor):  # a data type, a string
            return constant
        value = constant.value.numpy()
        if value.nbytes < _LEAST_BYTES or value.dtype.kind not in "biuf":  # what NumPy itself can write
            return constant
        key = str(value.dtype), value.shape, hashlib.blake2b(value.data).digest()
        if key not in self._found:
            self._found[key] = relax.Var(f"weight{len(self.params)}", constant.ty)
            self.params.append(self._found[key])
            self._weights.append(value)
        return self._found[key]
