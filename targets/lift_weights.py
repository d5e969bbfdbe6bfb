"""Weights of a compiled model: kept out of its library, in a file that is mapped into memory and never copied.

TVM stores constants inside the library, from where they are copied twice while it loads: three times their bytes.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, GlobalVar

__all__ = ["lift_weights"]

_LEAST_BYTES = 1024


def lift_weights(weights: list[np.ndarray], entry: str = "main") -> Any:
    """The module pass that makes parameters of the larger constants of a function, after its own; equal ones are one.

    Functions that it calls get theirs from it.

    Args:
        weights: filled with the values of the new parameters, in their order.
        entry: name of the function.
    """

    @tvm.transform.module_pass(opt_level=0, name="onnxslim_lift_weights")  # type: ignore[untyped-decorator]
    def apply(module: Any, _context: Any) -> Any:
        functions = dict(module.functions_items())
        weights.extend(_lift(module, module.get_global_var(entry), functions)[1])
        return tvm.IRModule(functions, attrs=module.attrs)

    return apply


def _lift(module: Any, name: Any, functions: dict[Any, Any]) -> tuple[Any, list[np.ndarray]]:
    """Lift from one of ``functions`` and all that it calls; return its new name and what it is to be given."""
    function = functions.pop(name)
    lifter = _Lifter(module, functions)
    body = lifter.visit_expr(function.body)
    parameters = [*function.params, *lifter.parameters.values()]
    lifted = relax.Function(parameters, body, function.ret_ty, function.is_pure, function.attrs)
    name = GlobalVar(name.name_hint)  # the old one has the type of the old function
    relax.expr._update_type(name, lifted.ty)
    functions[name] = lifted
    return name, list(lifter.values.values())


@relax.expr_functor.mutator
class _Lifter(relax.PyExprMutator):  # type: ignore[misc]
    """Replaces constants by variables."""

    def __init__(self, module: Any, functions: dict[Any, Any]) -> None:
        super().__init__(module)
        self._module, self._functions = module, functions
        self._lifted: dict[Any, tuple[Any, list[np.ndarray]]] = {}
        self.parameters: dict[Any, Any] = {}
        self.values: dict[Any, np.ndarray] = {}

    def visit_generic_const_(self, constant: Any) -> Any:
        if not isinstance(constant.value, tvm.runtime.Tensor):  # a data type, a string
            return constant
        value = constant.value.numpy()
        if value.nbytes < _LEAST_BYTES or value.dtype.kind not in "biuf":  # what NumPy itself can write
            return constant
        return self._parameter(value)

    def visit_call_(self, call: Any) -> Any:
        call = self.visit_expr_post_order(call)
        if not isinstance(call.op, GlobalVar) or not isinstance(self._module[call.op], relax.Function):
            return call
        if call.op not in self._lifted:
            self._lifted[call.op] = _lift(self._module, call.op, self._functions)
        name, values = self._lifted[call.op]
        return Call(name, [*call.args, *map(self._parameter, values)], call.attrs, call.ty_args)

    def _parameter(self, value: np.ndarray) -> Any:
        key = str(value.dtype), value.shape, hashlib.blake2b(value.data).digest()
        if key not in self.parameters:
            name = f"weight{len(self.parameters)}"
            self.parameters[key] = relax.Var(name, relax.TensorType(value.shape, str(value.dtype)))
            self.values[key] = value
        return self.parameters[key]
