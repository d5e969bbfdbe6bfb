"""Rules about If, Loop and Scan, and about what comes out of them."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxslim.passes._rewriter import Rewriter
from onnxslim.passes._rules import Refused, Rule, rule

__all__ = ["CONTROL_RULES"]


@rule("inline-if", "If")
def _constant_condition(g: Rewriter, node: gs.Node) -> str | Refused | None:
    """If(c) with a constant c -> the nodes of the branch that runs."""
    condition = g.constant(node.inputs[0], limit=1)
    if condition is None or condition.size != 1:
        return None
    taken = "then_branch" if bool(condition.reshape(-1)[0]) else "else_branch"
    if not g.inline_body(node, node.attrs[taken]):
        return Refused(f"its {taken} always runs, but holds what cannot be moved out of it")
    return f"replaced by its {taken}, which always runs"


@rule("hoist-constants", "Constant")
def _constant_node(g: Rewriter, node: gs.Node) -> str | None:
    """A Constant node that came out of a branch -> an initializer; in functions and for outputs it stays."""
    tensor = node.outputs[0]
    if g.scope(node).in_function or g.is_output(tensor):
        return None
    value = g.constant(tensor)
    if value is None:
        return None
    g.make_initializer(tensor, value)
    return "made an initializer"


CONTROL_RULES: tuple[Rule, ...] = (_constant_condition, _constant_node)
