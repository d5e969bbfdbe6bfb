"""The pass ``simplify``: the same function with fewer nodes and fewer bytes."""

from __future__ import annotations

from typing import ClassVar

import onnx
import onnx_graphsurgeon as gs

from onnxslim.graph.cost import node_count
from onnxslim.graph.walk import hoist_constants
from onnxslim.model import Model
from onnxslim.passes._engine import run_rules
from onnxslim.passes._rules import Ledger, Rule
from onnxslim.passes._rules_chain import CHAIN_RULES
from onnxslim.passes._rules_control import CONTROL_RULES
from onnxslim.passes._rules_fusion import FUSION_RULES
from onnxslim.passes._rules_layout import LAYOUT_RULES, has_standing_convolutions
from onnxslim.passes._rules_merge import merge_nodes
from onnxslim.passes._rules_ml import ML_RULES
from onnxslim.passes._rules_noop import NOOP_RULES
from onnxslim.passes._rules_parts import PART_RULES
from onnxslim.passes._rules_recurrent import RECURRENT_RULES
from onnxslim.passes._rules_shape import SHAPE_RULES, SIZE_RULES, merge_equal_sizes
from onnxslim.passes._rules_transpose import TRANSPOSE_RULES
from onnxslim.passes._rules_view import VIEW_RULES
from onnxslim.passes.base import Context, Outcome, Pass

__all__ = ["Simplify"]

_TRACES = ("pkg.torch.", "pkg.onnxscript.")  # first parts of keys


class Simplify(Pass):
    """Remove what changes nothing: dead code, no-ops, duplicates, dead branches; fold BatchNormalization into weights.

    Small rules (``match``, check, rewrite) are applied from a worklist until none fires, in the main graph, in the
    bodies of If, Loop and Scan and in local functions alike. Each drops or merges nodes only where the result is
    provably the same, bit for bit; only folding a BatchNormalization, and laying down a convolution along one axis,
    round differently, as two runtimes would.

    What the exporter of PyTorch notes of where nodes come from (stack traces, module names) is dropped as well.

    Never: a graph input or output, its name, order or declared dimensions; random and unknown operators (dead unknown
    ones neither); initializers that a caller may override.
    """

    name: ClassVar[str] = "simplify"
    lossless: ClassVar[bool] = True

    def run(self, model: Model, context: Context) -> Outcome:
        """Rewrite ``model`` in place; see :class:`onnxslim.passes.base.Pass`."""
        outcome = Outcome()
        before = node_count(model)
        original = model.copy() if any(node.op == "If" for graph in model.graphs() for node in graph.nodes) else None
        _rewrite(model, _RULES, context, outcome)
        inlined = any(change.rule == "inline-if" for change in outcome.changes)
        if original is not None and inlined and not _passes_inference(model) and _passes_inference(original):
            model.graph, model.header, outcome = original.graph, original.header, Outcome()
            _rewrite(model, tuple(rule for rule in _RULES if rule not in CONTROL_RULES), context, outcome)
            outcome.refuse("inline-if", "all graphs", "with a branch inlined, the model would not pass shape inference")
        merged = sum(change.rule == "merge-initializers" for change in outcome.changes)
        outcome.numbers = {"nodes removed": before - node_count(model), "initializers merged": merged}
        if not outcome.modified and not outcome.refusals:
            outcome.refuse("simplify", "the model", "no rule matches any node; nothing is dead or there twice")
        return outcome

    def rules(self) -> tuple[str, ...]:
        """The names of the rules."""
        names = {rule.name for rule in (*_RULES, *LAYOUT_RULES, merge_equal_sizes(), merge_nodes())}
        return tuple(
            sorted(names | {"fold-constants", "dead-node", "merge-initializers", "drop-unused", "drop-traces"})
        )


_RULES: tuple[Rule, ...] = (
    *SHAPE_RULES,
    *NOOP_RULES,
    *SIZE_RULES,
    *CHAIN_RULES,
    *TRANSPOSE_RULES,
    *VIEW_RULES,
    *PART_RULES,
    *RECURRENT_RULES,
    *ML_RULES,
    *FUSION_RULES,
    *CONTROL_RULES,
)


def _rewrite(model: Model, rules: tuple[Rule, ...], context: Context, outcome: Outcome) -> None:
    """Apply rules, then drop what the model no longer needs."""
    ledger = Ledger(outcome, context)
    if ledger.allows("hoist-constants", "all graphs"):
        hoisted = hoist_constants(model)
        if hoisted:
            ledger.change("hoist-constants", "all graphs", f"made {hoisted} Constant nodes initializers")
    run_rules(model, (merge_equal_sizes(), *rules), ledger, merge=True)
    if has_standing_convolutions(model):  # once all else is done: a Pad that is not folded yet would stand between
        run_rules(model, (*LAYOUT_RULES, merge_equal_sizes(), *rules), ledger, merge=True)
    _drop_unused_initializers(model, ledger)
    _drop_unused_functions(model, ledger)
    _drop_unused_imports(model, ledger)
    _drop_traces(model, ledger)


def _passes_inference(model: Model) -> bool:
    """Whether strict shape inference accepts a model.

    The result of an If often has no known rank. Once inlined it has one, and runtimes then refuse what they would have
    let pass when it ran, such as a Range that starts at a vector of one number.
    """
    try:
        onnx.shape_inference.infer_shapes(model.to_skeleton(), strict_mode=True, data_prop=True)
    except Exception:  # onnx raises several unrelated types; each means that a runtime may refuse the model too
        return False
    return True


def _drop_unused_initializers(model: Model, ledger: Ledger) -> None:
    for graph in model.graphs():
        unused = graph.__dict__.get("unused_initializers")
        if not unused or not ledger.allows("drop-unused", unused[0].name):
            continue
        for constant in unused:
            ledger.change("drop-unused", constant.name, "removed an initializer that nothing reads")
        ids = {id(constant) for constant in unused}
        graph.initializers = [constant for constant in graph.initializers if id(constant) not in ids]
        graph.unused_initializers = []


def _drop_unused_functions(model: Model, ledger: Ledger) -> None:
    """Keep the functions that the main graph calls, directly or through others."""
    by_key: dict[tuple[str, str], list[gs.Graph]] = {}
    for function in model.graph.functions:
        by_key.setdefault((function.domain or "", function.name), []).append(function)
    if not by_key:
        return
    called: set[tuple[str, str]] = set()
    pending: list[gs.Graph] = [model.graph]
    while pending:
        for node in pending.pop().nodes:
            pending += [value for value in node.attrs.values() if isinstance(value, gs.Graph)]
            key = (node.domain or "", node.op)
            if key in by_key and key not in called:
                called.add(key)
                pending += by_key[key]
    kept = []
    for function in model.graph.functions:
        if (function.domain or "", function.name) in called or not ledger.allows("drop-unused", function.name):
            kept.append(function)
        else:
            ledger.change("drop-unused", function.name, "removed a local function that nothing calls")
    if len(kept) < len(model.graph.functions):
        model.graph.functions = kept


def _drop_unused_imports(model: Model, ledger: Ledger) -> None:
    """Drop imports of operator sets of which no node is left; the default one stays."""
    used = {"", "ai.onnx"}
    for graph in model.graphs():
        used.update(node.domain or "" for node in graph.nodes)
    used.update(function.domain or "" for function in model.graph.functions)
    for entry in [entry for entry in model.header.opset_import if entry.domain not in used]:
        if not ledger.allows("drop-unused", entry.domain):
            continue
        model.header.opset_import.remove(entry)
        ledger.change("drop-unused", entry.domain, "removed the import of an operator set that no node uses")


def _drop_traces(model: Model, ledger: Ledger) -> None:
    """Drop what PyTorch's exporter notes of where nodes come from: in a small model as many bytes as the weights."""
    holders = [holder for graph in model.graphs() for holder in (graph, *graph.nodes) if "header" in holder.__dict__]
    traced = [holder for holder in holders if any(_is_trace(entry) for entry in holder.header.metadata_props)]
    if not traced or not ledger.allows("drop-traces", "all graphs"):
        return
    dropped = 0
    for holder in traced:
        kept = type(holder.header)()
        kept.CopyFrom(holder.header)  # others may hold the same one
        del kept.metadata_props[:]
        kept.metadata_props.extend(entry for entry in holder.header.metadata_props if not _is_trace(entry))
        dropped += holder.header.ByteSize() - kept.ByteSize()
        holder.header = kept
    ledger.change(
        "drop-traces", "all graphs", f"removed {dropped} bytes of stack traces and module names of the exporter"
    )


def _is_trace(entry: onnx.StringStringEntryProto) -> bool:
    return entry.key == "namespace" or bool(entry.key.startswith(_TRACES))
