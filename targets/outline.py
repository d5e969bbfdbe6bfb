"""Branches of an If as functions of their own.

TVM fuses, lays out and plans memory function by function; what is inside a branch it passes over, or takes for done
whichever branch is taken.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

__all__ = ["outline_branches"]


def outline_branches() -> Any:
    """The module pass that makes of each branch a call of a private function of all that the branch reads."""

    @tvm.transform.module_pass(opt_level=0, name="onnxslim_outline_branches")  # type: ignore[untyped-decorator]
    def apply(module: Any, _context: Any) -> Any:
        outliner = _Outliner(module)
        main = module.get_global_var("main")
        outliner.builder_.update_func(main, outliner.visit_expr(module[main]))
        return outliner.builder_.get()

    return apply


@relax.expr_functor.mutator
class _Outliner(relax.PyExprMutator):  # type: ignore[misc]
    """Visits inner branches before those around them."""

    def visit_if_(self, branch: Any) -> Any:
        taken, left = (self._outlined(self.visit_expr(each)) for each in (branch.true_branch, branch.false_branch))
        return relax.If(self.visit_expr(branch.cond), taken, left)

    def _outlined(self, body: Any) -> Any:
        read = list(relax.analysis.free_vars(body))
        parameters, arguments = list(read), list(read)
        sizes = relax.analysis.free_symbolic_vars(relax.Function(read, body, body.ty))
        if sizes:
            parameters.append(relax.Var("sizes", relax.ShapeType(list(sizes))))
            arguments.append(relax.ShapeExpr(list(sizes)))
        function = relax.utils.copy_with_new_vars(relax.Function(parameters, body, body.ty))
        name = self.builder_.add_func(function, "branch")
        return relax.SeqExpr([], tvm.ir.Call(name, arguments))
