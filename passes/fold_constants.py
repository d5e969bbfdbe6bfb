"""The pass ``fold-constants``: compute now what does not depend on the inputs."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from pydantic import ByteSize, Field

from onnxslim.graph.purity import is_standard
from onnxslim.graph.walk import subgraphs
from onnxslim.model import Model
from onnxslim.passes._dimensions import Dimension, Dimensions
from onnxslim.passes._evaluate import ConstantSet, is_plain, stored_bytes
from onnxslim.passes._fold_plan import plan
from onnxslim.passes._rewriter import Rewriter, Scope, has_plain_attributes
from onnxslim.passes._rules import label
from onnxslim.passes.base import Context, Outcome, Pass

__all__ = ["FoldConstants"]

# Up to this size a result is computed before it is known whether it will be used.
_EAGER_LIMIT = 1 << 20
# Beyond this size a result is only computed where constants of that size go in.
_EVALUATION_LIMIT = 1 << 24
_MOST_REFUSALS = 20
# Weights are stored quantized on purpose.
_QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
# Up to this many numbers of 8 bits are no packed weight.
_MOST_UNPACKED = 256
_NOT_TENSORS = frozenset(
    {
        "SequenceEmpty",
        "SequenceConstruct",
        "SequenceInsert",
        "SequenceErase",
        "SequenceAt",
        "SequenceLength",
        "SplitToSequence",
        "ConcatFromSequence",
        "Optional",
        "OptionalGetElement",
        "OptionalHasElement",
    }
)
# The size of what these make depends on values, but is bounded by the size of what they read.
_BOUNDED = frozenset({"NonZero", "Compress", "Unique", "NonMaxSuppression", "StringNormalizer", "Slice", "Squeeze"})


class FoldConstants(Pass):
    """Compute now what does not depend on the inputs.

    A node is folded when all that it reads is constant and it is pure. Dimensions that are the same for every legal
    input count as constant: those that the file declares as numbers, never symbolic ones. The target of a Reshape
    becomes constant also where one of its elements is not known (it is -1 then) or is the dimension that stands there
    already (0). Nodes run in ONNX Runtime, all together; what it cannot run and the ONNX reference evaluator neither,
    stays.

    Never: random operators, unknown domains, operators with bodies, whatever depends on an argument of a function,
    quantized weights and codebooks (they would be stored at full size again), sequences, initializers that a caller may
    override.

    The file grows by at most ``max_growth``: what a result adds is weighed against the constants and nodes that it
    makes superfluous, so an Expand, a Tile or a Cast to a wider type stays where it saves space.
    """

    name: ClassVar[str] = "fold-constants"
    lossless: ClassVar[bool] = True

    max_growth: ByteSize = Field(
        default=ByteSize(64 * 1024),
        ge=0,
        description="most bytes by which folding may grow the file, for each folded group of nodes and in total",
    )

    def run(self, model: Model, context: Context) -> Outcome:
        """Rewrite ``model`` in place; see :class:`onnxslim.passes.base.Pass`."""
        outcome = Outcome(numbers={"nodes folded": 0})
        while True:
            # Constants let shape inference see further, and dimensions that it finds are constants again.
            before = len(outcome.changes)
            outcome.refusals.clear()
            _Folding(model, int(self.max_growth), outcome).run()
            if len(outcome.changes) == before:
                return outcome


class _Folding:
    """One sweep over a model."""

    def __init__(self, model: Model, max_growth: int, outcome: Outcome) -> None:
        self.g = Rewriter(model)
        self.max_growth = max_growth
        self.outcome = outcome
        self.values: dict[int, np.ndarray] = {}
        self.sizes: dict[int, int] = {}
        self.refused: dict[int, tuple[gs.Node, str, str]] = {}

    def run(self) -> None:
        """Fold what can be folded with the shapes that are known now."""
        self.fix_casts()
        dimensions = Dimensions(self.g)
        self.fix_reshape_targets(dimensions)
        known = self.take_dimensions(dimensions)
        self.evaluate_small()
        candidates = [node for node in self.g.nodes() if id(node) in known or self.is_computed(node)]
        chosen = plan(self.g, candidates, self.size, self.max_growth)
        for tensor, size in chosen.refused:
            node = tensor.inputs[0]
            self.refuse(node, "growth", f"its result of {size} bytes would grow the file beyond max_growth")
        self.commit(*self.finished(chosen.nodes, chosen.results))
        for node in self.g.awake():
            name, op = label(node), node.op
            if self.g.remove_if_dead(node):
                self.outcome.change("dead-node", name, f"removed {op}, which nothing reads any more")
        self.g.finish()
        self.report()

    # -------------------------------------------------------------------------------------------------- what is known

    def fix_casts(self) -> None:
        """Make CastLike Cast: it reads the type of its second input only, which need not be constant."""
        for node in list(self.g.nodes()):
            if node.op != "CastLike" or not is_standard(node) or not has_plain_attributes(node):
                continue
            wanted = self.g.dtype(node.inputs[1])
            if wanted is not None:
                attrs = {**node.attrs, "to": int(onnx.helper.np_dtype_to_tensor_dtype(wanted))}
                self.g.rewrite(node, "Cast", attrs, [node.inputs[0]])
                self.outcome.change("cast-like", label(node), f"CastLike made Cast to {wanted}")

    def fix_reshape_targets(self, dimensions: Dimensions) -> None:
        """Make the target of a Reshape constant where it is known but for one element, or copies dimensions."""
        for node in list(self.g.nodes()):
            if node.op != "Reshape" or not is_standard(node) or self.g.opset(node) < 5 or len(node.inputs) < 2:
                continue
            if self.g.constant(node.inputs[1]) is not None:
                continue
            target = _static_target(node, dimensions)
            if target is None:
                continue
            constant = self.g.make_constant(self.g.scope(node), f"{node.inputs[1].name}_static", target)
            self.g.set_input(node, 1, constant)
            self.outcome.change("static-reshape", label(node), f"its target is {target.tolist()} for every input")

    def take_dimensions(self, dimensions: Dimensions) -> set[int]:
        """Note the values that follow from shapes alone; return the ids of the nodes that make them."""
        known: set[int] = set()
        for node in self.g.nodes():
            if node.op == "Constant":
                continue
            vectors = [None if tensor.is_empty() else dimensions.vector(tensor) for tensor in node.outputs]
            arrays = [None if vector is None else vector.value() for vector in vectors]
            if arrays and all(array is not None for array in arrays):
                known.add(id(node))
                self.values |= {id(t): a for t, a in zip(node.outputs, arrays, strict=True) if a is not None}
        return known

    def is_constant(self, tensor: gs.Tensor) -> bool:
        """Whether the value of a tensor is in the file or was computed."""
        if tensor.is_empty() or id(tensor) in self.values:
            return True
        if isinstance(tensor, gs.Constant):
            return is_plain(np.dtype(tensor.dtype)) and not getattr(tensor._values, "sparse", False)
        if len(tensor.inputs) == 1 and tensor.inputs[0].op == "Constant" and is_standard(tensor.inputs[0]):
            value = self.g.constant(tensor)
            return value is not None and is_plain(value.dtype)
        return False

    def is_computed(self, node: gs.Node) -> bool:
        """Whether all results of a node are known, or at least their sizes."""
        used = [tensor for tensor in node.outputs if not tensor.is_empty()]
        return bool(used) and all(id(tensor) in self.values or id(tensor) in self.sizes for tensor in used)

    def size(self, tensor: gs.Tensor) -> int:
        """Bytes of a constant tensor in the file."""
        if id(tensor) in self.values:
            array = self.values[id(tensor)]
            return stored_bytes(array.dtype, array.shape)
        if id(tensor) in self.sizes:
            return self.sizes[id(tensor)]
        if isinstance(tensor, gs.Constant):
            return stored_bytes(np.dtype(tensor.dtype), tensor.shape)
        value = self.g.constant(tensor)
        return 0 if value is None else stored_bytes(value.dtype, value.shape)

    # ------------------------------------------------------------------------------------------------------ evaluation

    def candidates(self) -> list[gs.Node]:
        """The nodes that read constants only, or what such nodes make, and are neither computed nor refused."""
        marked: set[int] = set()
        found = []
        for node in self.g.nodes():
            if id(node) in self.refused or node.op == "Constant" or self.is_computed(node):
                continue
            constant = all(
                self.is_constant(tensor) or id(tensor) in self.sizes or id(tensor) in marked for tensor in node.inputs
            )
            if not constant or not any(not tensor.is_empty() for tensor in node.inputs):
                continue
            why = self.objection(node)
            if why:
                self.refuse(node, *why)
                continue
            found.append(node)
            marked.update(id(tensor) for tensor in node.outputs)
        return found

    def objection(self, node: gs.Node) -> tuple[str, str] | None:
        """Why a node of constants is not folded: a kind, and a sentence."""
        impure = self.g.impurity(node)
        if impure:
            return "impure", impure
        if not is_standard(node):
            return "domain", f"{node.op} of domain {node.domain!r} cannot be computed here"
        if any(True for _ in subgraphs(node)):
            return "body", f"{node.op} holds graphs"
        if not has_plain_attributes(node):
            return "argument", "it depends on an argument of its function"
        if node.op in _QUANTIZERS:
            return "quantized", "quantized weights stay quantized"
        if node.op in _NOT_TENSORS:
            return "sequence", "it makes or reads a sequence or an optional"
        if node.op == "Range" and self.is_long_range(node):
            return "growth", "its result is too large to store"
        if node.op == "Cast" and self.is_packed(node.inputs[0]):
            return "packed", "it unpacks indices that are stored in few bits on purpose"
        return None

    def is_packed(self, tensor: gs.Tensor) -> bool:
        """Whether a constant holds many numbers of 8 bits, which somebody stored so to save space."""
        return (
            isinstance(tensor, gs.Constant)
            and np.dtype(tensor.dtype) in (np.uint8, np.int8)
            and int(np.prod(tensor.shape)) > _MOST_UNPACKED
        )

    def is_long_range(self, node: gs.Node) -> bool:
        """Whether a Range makes too many numbers: shape inference would write them all down to count them."""
        bounds = [self.known_value(tensor) for tensor in node.inputs]
        if any(bound is None or bound.size != 1 for bound in bounds):
            return False
        start, limit, delta = (float(bound.reshape(-1)[0]) for bound in bounds if bound is not None)
        return delta != 0 and (limit - start) / delta > _EVALUATION_LIMIT / 8

    def known_value(self, tensor: gs.Tensor) -> np.ndarray | None:
        """The value of a constant, or one that was computed."""
        value = self.values.get(id(tensor))
        return self.g.constant(tensor) if value is None else value

    def evaluate_small(self) -> None:
        """Evaluate in waves what is small; note the sizes of what is large. Each wave is one session an opset."""
        while nodes := self.candidates():
            progress = False
            for opset in {self.g.opset(node) for node in nodes}:
                group = [node for node in nodes if self.g.opset(node) == opset]
                progress |= self.wave(group, opset)
            if not progress:
                for node in nodes:
                    self.refuse(node, "size", "the size of its result is not known before it runs")
                return

    def wave(self, nodes: list[gs.Node], opset: int) -> bool:
        """Evaluate, plan or refuse what can be of these nodes; whether there was any."""
        sizes = ConstantSet([*self.lazy_nodes(opset), *nodes], opset, self.values).sizes()
        blocked: set[int] = set()
        eager: list[gs.Node] = []
        progress = False
        for node in nodes:
            state = "later" if any(id(tensor) in blocked for tensor in node.inputs) else self.judge(node, sizes)
            if state == "now":
                eager.append(node)
            elif state == "lazy":
                progress = True
                for tensor in node.outputs:
                    if not tensor.is_empty():
                        self.sizes[id(tensor)] = stored_bytes(*sizes[id(tensor)])
            else:
                progress |= id(node) in self.refused
                blocked.update(id(tensor) for tensor in node.outputs)
        if not eager:
            return progress
        work = ConstantSet(eager, opset, self.values)
        self.take(work, [tensor for node in eager for tensor in node.outputs if not tensor.is_empty()])
        return True

    def judge(self, node: gs.Node, sizes: dict[int, tuple[np.dtype, tuple[int, ...]]]) -> str:
        """Whether to evaluate a node "now", to note its size and evaluate it if it is chosen ("lazy"), or "later"."""
        outputs = [tensor for tensor in node.outputs if not tensor.is_empty()]
        known = all(self.is_constant(tensor) for tensor in node.inputs)
        if self.may_trap(node) or (node.op == "Range" and not known):
            return "later"
        read = sum(self.size(tensor) for tensor in node.inputs if not tensor.is_empty() and self.is_constant(tensor))
        if all(id(tensor) in sizes for tensor in outputs):
            if not all(is_plain(sizes[id(tensor)][0]) for tensor in outputs):
                self.refuse(node, "type", f"its result is of type {sizes[id(outputs[0])][0]}")
                return "later"
            made = sum(stored_bytes(*sizes[id(tensor)]) for tensor in outputs)
            lazy = any(id(tensor) in self.sizes for tensor in node.inputs)
            if max(made, read) <= _EAGER_LIMIT and not lazy:
                return "now"
            if made <= max(_EVALUATION_LIMIT, 4 * read) or lazy:
                return "lazy"
            self.refuse(node, "growth", f"its result of {made} bytes is too large to store")
            return "later"
        if known and node.op in _BOUNDED and read <= _EAGER_LIMIT:
            return "now"
        if known:
            self.refuse(node, "size", "the size of its result is not known before it runs")
        return "later"

    def may_trap(self, node: gs.Node) -> bool:
        """Whether an integer division could end the process: the divisor must be known and be neither 0 nor -1."""
        if node.op not in ("Div", "Mod"):
            return False
        divisor = self.known_value(node.inputs[1])
        if divisor is None:
            dtype = self.g.dtype(node.inputs[1])
            return dtype is None or dtype.kind in "iu"
        if divisor.dtype.kind not in "iu" or not np.isin(divisor, (0, -1)).any():
            return False
        self.refuse(node, "division", "its divisor is 0 or -1 somewhere")
        return True

    def lazy_nodes(self, opset: int) -> list[gs.Node]:
        """The nodes of which only the sizes are known yet."""
        return [
            node
            for node in self.g.nodes()
            if self.g.opset(node) == opset and any(id(tensor) in self.sizes for tensor in node.outputs)
        ]

    def take(self, work: ConstantSet, wanted: list[gs.Tensor]) -> None:
        """Evaluate and keep the results; nodes that fail are refused."""
        found = work.run(wanted)
        for failure in work.failures:
            self.refuse(failure.node, "evaluation", f"it cannot be evaluated: {failure.why}")
        for tensor in wanted:
            if id(tensor) not in found:
                self.refuse(tensor.inputs[0], "evaluation", "it cannot be evaluated")
        self.values |= found

    # ---------------------------------------------------------------------------------------------------------- edits

    def finished(self, nodes: list[gs.Node], results: list[gs.Tensor]) -> tuple[list[gs.Node], list[gs.Tensor]]:
        """Evaluate the chosen results that are not values yet; drop the ones that fail, and what only they need."""
        by_opset: dict[int, list[gs.Tensor]] = {}
        for tensor in results:
            if id(tensor) not in self.values:
                by_opset.setdefault(self.g.opset(tensor.inputs[0]), []).append(tensor)
        for opset, wanted in by_opset.items():
            self.take(ConstantSet(self.lazy_ancestors(wanted), opset, self.values), wanted)
        kept = [tensor for tensor in results if id(tensor) in self.values]
        if len(kept) == len(results):
            return nodes, results
        failed = {id(tensor) for tensor in results if id(tensor) not in self.values}
        return [node for node in nodes if not any(id(tensor) in failed for tensor in node.outputs)], kept

    def lazy_ancestors(self, tensors: list[gs.Tensor]) -> list[gs.Node]:
        """The nodes that must run for some results, those without values yet, producers first."""
        found: dict[int, gs.Node] = {}
        stack = list(tensors)
        while stack:
            tensor = stack.pop()
            if id(tensor) in self.values or id(tensor) not in self.sizes or id(tensor.inputs[0]) in found:
                continue
            found[id(tensor.inputs[0])] = tensor.inputs[0]
            stack += tensor.inputs[0].inputs
        return sorted(found.values(), key=self.g.order)

    def commit(self, nodes: list[gs.Node], results: list[gs.Tensor]) -> None:
        """Replace the results by constants and remove the nodes that nothing reads any more."""
        for tensor in results:
            producer = tensor.inputs[0]
            name, op, scope = label(producer), producer.op, self.g.scope(producer)
            self.g.detach(producer, tensor)
            if scope.in_function or self.g.is_output(tensor):
                self.make_node(scope, tensor)
            else:
                tensor.to_constant(self.values[id(tensor)])
                tensor._export_dtype = None
            array = self.values[id(tensor)]
            self.outcome.change("fold", name, f"{op} became a constant {array.dtype} {list(array.shape)}")
        for node in reversed(nodes):
            if self.g.is_alive(node):
                self.g.remove_if_dead(node)
        self.outcome.numbers["nodes folded"] += sum(not self.g.is_alive(node) for node in nodes)

    def make_node(self, scope: Scope, tensor: gs.Tensor) -> None:
        """Let a Constant node make a tensor: functions hold no initializers, some runtimes refuse one as an output."""
        value = gs.Constant(tensor.name, self.values[id(tensor)])
        name = self.g.model.fresh_name(f"{tensor.name}_constant")
        self.g.insert_first(scope, gs.Node("Constant", name, {"value": value}, [], [tensor]))

    # --------------------------------------------------------------------------------------------------------- report

    def refuse(self, node: gs.Node, kind: str, why: str) -> None:
        """Note why a node stays."""
        self.refused.setdefault(id(node), (node, kind, why))

    def report(self) -> None:
        """Write the refusals, a limited number of each kind."""
        counts: dict[str, int] = {}
        for node, kind, why in self.refused.values():
            if not self.g.is_alive(node):
                continue
            counts[kind] = counts.get(kind, 0) + 1
            if counts[kind] <= _MOST_REFUSALS:
                self.outcome.refuse(f"fold ({kind})", label(node), f"{node.op}: {why}")
        for kind, count in counts.items():
            if count > _MOST_REFUSALS:
                self.outcome.refuse(f"fold ({kind})", f"{count - _MOST_REFUSALS} more nodes", "as above")
        if not self.outcome.modified and not self.outcome.refusals:
            self.outcome.refuse("fold", "the model", "no node reads constants only")


def _static_target(node: gs.Node, dimensions: Dimensions) -> np.ndarray | None:
    """The target of a Reshape, as a constant that means the same for every input; None where there is none.

    One unknown element may be -1 where all others are positive numbers: the element count gives it, also when it is
    zero. Dimensions of the input that stay where they are may be 0 where no other element is unknown.
    """
    vector = dimensions.vector(node.inputs[1])
    if vector is None or vector.scalar:
        return None
    elements = vector.elements
    unknown = [index for index, element in enumerate(elements) if not isinstance(element, int)]
    numbers = [element for element in elements if isinstance(element, int)]
    if len(unknown) == 1 and all(number > 0 for number in numbers):
        return np.array([element if isinstance(element, int) else -1 for element in elements], np.int64)
    before = dimensions.of_shape(node.inputs[0])
    if before is None or node.attrs.get("allowzero", 0) or any(number <= 0 for number in numbers):
        return None
    copied = all(
        index < len(before) and isinstance(elements[index], Dimension) and elements[index] == before[index]
        for index in unknown
    )
    return np.array([e if isinstance(e, int) else 0 for e in elements], np.int64) if copied else None
