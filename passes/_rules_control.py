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


@rule("inline-if", "If")
def _impossible_branch(g: Rewriter, node: gs.Node) -> str | Refused | None:
    """If whose one branch makes a result of a rank that the nodes behind it cannot run on -> the other branch."""
    for taken, other in (("then_branch", "else_branch"), ("else_branch", "then_branch")):
        if not (isinstance(node.attrs.get(taken), gs.Graph) and isinstance(node.attrs.get(other), gs.Graph)):
            return None
        for index, result in enumerate(node.outputs):
            rank, ranks = g.rank(result), _possible_ranks(g, node.attrs[other].outputs[index])
            if rank is None or ranks is None or rank in ranks:
                continue
            if not g.inline_body(node, node.attrs[taken]):
                return Refused(f"only its {taken} can run, but it holds what cannot be moved out of it")
            return f"replaced by its {taken}: the nodes behind it do not run on the rank of the other one's result"
    return None


def _possible_ranks(g: Rewriter, tensor: gs.Tensor, depth: int = 16) -> set[int] | None:
    """The ranks that a tensor may have, seen through the branches of If; None where it may be any."""
    rank = g.rank(tensor)
    if rank is not None:
        return {rank}
    maker = g.producer(tensor)
    if maker is None or depth == 0:
        return None
    if maker.op == "If":
        index = next(index for index, each in enumerate(maker.outputs) if each is tensor)
        branches = [body.outputs[index] for body in maker.attrs.values() if isinstance(body, gs.Graph)]
        found = [_possible_ranks(g, each, depth - 1) for each in branches]
        return None if None in found else set().union(*(each for each in found if each is not None))
    ranks = _possible_ranks(g, maker.inputs[0], depth - 1) if maker.op in _RANK_BY_FIRST else None
    axes = g.integers(maker, 1, "axes") if maker.op in ("Squeeze", "Unsqueeze") else []
    if ranks is None or axes is None:
        return None
    shift = -len(axes) if maker.op == "Squeeze" else len(axes)
    return {each + shift for each in ranks}


@rule("drop-dead-result", "If", "Loop", "Scan", since=9)
def _dead_result(g: Rewriter, node: gs.Node) -> str | None:
    """An output of an If, Loop or Scan that nobody reads -> none, with what the bodies compute for it alone."""
    bodies = [value for value in node.attrs.values() if isinstance(value, gs.Graph)]
    extra = 1 if node.op == "Loop" else 0
    if not bodies or any(len(body.outputs) != len(node.outputs) + extra for body in bodies) or len(node.outputs) < 2:
        return None
    for index in reversed(range(len(node.outputs))):
        if not g.is_unused(node.outputs[index]) or not _may_go(g, node, bodies[0], index):
            continue
        carried = node.op == "Loop" and index < len(node.inputs) - 2
        g.drop_result(node, index)
        if carried:
            g.drop_carried(node, index + 2)
        return f"dropped output {index}, which nobody reads"
    return None


def _may_go(g: Rewriter, node: gs.Node, body: gs.Graph, index: int) -> bool:
    """Whether nothing else depends on what a body makes for an output: no later iteration, no list of axes."""
    if node.op == "If":
        return True
    if node.op == "Scan":
        states = len(node.inputs) - int(node.attrs.get("num_scan_inputs", 0))
        return index >= states and not {"scan_output_axes", "scan_output_directions"} & set(node.attrs)
    if index >= len(node.inputs) - 2:
        return True
    entry, result = body.inputs[index + 2], body.outputs[index + 1]
    if entry is result:
        return not entry.outputs and g.output_count(entry) == 1
    if g.is_output(entry):
        return False
    copies = all(user.op == "Identity" and user.outputs[0] is result for user in entry.outputs)
    return not entry.outputs or (copies and not result.outputs and g.output_count(result) == 1)


@rule("hoist-invariant", "Loop", "Scan", since=9)
def _invariant_state(g: Rewriter, node: gs.Node) -> str | None:
    """A value that a Loop or Scan hands from iteration to iteration unchanged -> read from outside it, and behind it.

    Weights carried so (JAX) are constants only then, to every rule and pass.
    """
    body, (ahead, skipped) = node.attrs.get("body"), (2, 1) if node.op == "Loop" else (0, 0)
    states = len(node.inputs) - ahead - int(node.attrs.get("num_scan_inputs", 0))
    if not isinstance(body, gs.Graph) or len(body.outputs) != len(node.outputs) + skipped:
        return None
    for index in range(states):
        value, entry, behind = node.inputs[index + ahead], body.inputs[index + ahead], node.outputs[index]
        handed_on = body.outputs[index + skipped]
        while (
            handed_on is not entry
            and handed_on is not value
            and (copy := g.producer(handed_on, "Identity")) is not None
        ):
            handed_on = copy.inputs[0]
        if handed_on is not entry and handed_on is not value:
            continue
        if entry.name == value.name:
            g.rename(entry)
        inside = bool(entry.outputs) and all(g.is_visible(g.scope(user), value) for user in entry.outputs)
        outside = bool(behind.outputs) and not g.is_output(behind) and g.can_replace(behind, value)
        if inside:
            g.read_instead(entry, value)
        if outside:
            g.detach(node, behind)
            g.replace(behind, value)
        if inside or outside:
            return f"{entry.name!r} is {value.name!r} in every iteration"
    return None


_RANK_BY_FIRST = frozenset({"Identity", "Squeeze", "Unsqueeze", "Relu", "Sigmoid", "Tanh", "Cast"})


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


CONTROL_RULES: tuple[Rule, ...] = (
    _constant_condition,
    _impossible_branch,
    _invariant_state,
    _dead_result,
    _constant_node,
)
