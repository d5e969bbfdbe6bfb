"""The pass ``fold-constants``: compute now what does not depend on the inputs."""

from __future__ import annotations

from typing import ClassVar

from onnxslim.graph.cost import node_count
from onnxslim.model import Model
from onnxslim.passes._engine import run_rules
from onnxslim.passes._rules import Ledger
from onnxslim.passes._rules_shape import SHAPE_RULES
from onnxslim.passes.base import Context, Outcome, Pass

__all__ = ["FoldConstants"]


class FoldConstants(Pass):
    """Compute now what does not depend on the inputs.

    A node is folded when all that it reads is constant and it is pure. Dimensions that are the same for every legal
    input count as constant: those that the file declares as numbers, and what follows from them, also by way of
    symbolic ones (``n * 2 / n`` is no number, ``n * 2 / 2 - n`` is 0). The target of a Reshape becomes constant also
    where one of its elements is not known (it is -1 then) or is the dimension that stands there already (0). Nodes run
    in ONNX Runtime, all together; what it cannot run and the ONNX reference evaluator neither, stays.

    Never: random operators, unknown domains, operators with bodies, whatever depends on an argument of a function,
    quantized weights and codebooks (they would be stored at full size again), sequences, initializers that a caller may
    override.

    What a result adds to the file is weighed against the constants and nodes that it makes superfluous, so an Expand, a
    Tile, a Cast to a wider type or the product of two factors stays where it saves space: in all, the file grows by at
    most 4 KiB or 2 % of its weights, and mostly shrinks.
    """

    name: ClassVar[str] = "fold-constants"
    lossless: ClassVar[bool] = True

    def run(self, model: Model, context: Context) -> Outcome:
        """Rewrite ``model`` in place; see :class:`onnxslim.passes.base.Pass`."""
        outcome = Outcome()
        before = node_count(model)
        run_rules(model, SHAPE_RULES, Ledger(outcome, context))
        outcome.numbers = {"nodes folded": before - node_count(model)}
        if not outcome.modified and not outcome.refusals:
            outcome.refuse("fold-constants", "the model", "no node reads constants only")
        return outcome

    def rules(self) -> tuple[str, ...]:
        """The names of the rules."""
        return ("fold-constants", "dead-node", *sorted({rule.name for rule in SHAPE_RULES}))
