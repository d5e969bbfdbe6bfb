"""One run of rules over a model: facts once, rules from a worklist, constants folded, everything noted."""

from __future__ import annotations

from collections.abc import Iterable

from onnxslim.copying import uncollected
from onnxslim.model import Model
from onnxslim.passes._folding import Folding, growth_limit
from onnxslim.passes._rewriter import Rewriter
from onnxslim.passes._rules import Ledger, Rule, apply_rules
from onnxslim.passes._rules_merge import InitializerMerger, merge_nodes
from onnxslim.tensors import tensor_nbytes

__all__ = ["run_rules"]


@uncollected()
def run_rules(model: Model, rules: Iterable[Rule], ledger: Ledger, *, merge: bool = False) -> None:
    """Apply rules and fold constants until nothing is left to do.

    Args:
        model: rewritten in place.
        rules: tried in this order at each node.
        ledger: says what may be rewritten, and notes it.
        merge: also merge equal initializers and equal nodes.
    """
    g = Rewriter(model)
    merger = InitializerMerger(g, ledger)
    if merge:
        merger.merge_all()
        rules = (*rules, merge_nodes())
    weights = sum(tensor_nbytes(constant) for constant in g.constants())
    folding = Folding(g, ledger, growth_limit(weights), merger.add if merge else lambda constant: None)
    apply_rules(g, rules, ledger, folding)
    ledger.close(g)
    g.finish()
