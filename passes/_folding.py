"""Constant folding: what depends on no input is computed now, where that does not make the file grow.

Two kinds of nodes are folded. Those whose results are known from shapes alone (``onnxslim.graph.facts``) become
constants at once; they are small. Those that read constants are gathered until nothing else is left to do, weighed
together, and run in ONNX Runtime in one session an opset.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.graph.facts import Fact
from onnxslim.graph.purity import is_standard
from onnxslim.graph.walk import subgraphs
from onnxslim.passes._evaluate import ConstantSet, is_plain, stored_bytes
from onnxslim.passes._fold_plan import plan
from onnxslim.passes._rewriter import Rewriter, Scope, has_plain_attributes
from onnxslim.passes._rules import Ledger, label

__all__ = ["Folding", "growth_limit"]

RULE = "fold-constants"

# By how much folding may make a file grow in all: this, or this share of its weights.
_GROWTH_BYTES = 4096
_GROWTH_SHARE = 0.02
# Up to this many bytes are read to find out how large a result is.
_PROBE_LIMIT = 1 << 20
# A larger result is only computed where constants of about that size go in.
_RESULT_LIMIT = 1 << 24
# Weights are stored quantized on purpose.
_QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
# Up to this many numbers of 8 bits are no packed weight.
_MOST_UNPACKED = 256
# The same elements in the same order.
_VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")
# The size of what these make depends on values, but is bounded by the size of what they read.
_BOUNDED = frozenset({"NonZero", "Compress", "Unique", "NonMaxSuppression", "StringNormalizer", "Slice", "Squeeze"})


def growth_limit(weights: int) -> int:
    """By how many bytes folding may make a model grow that holds ``weights`` bytes of constants."""
    return max(_GROWTH_BYTES, int(weights * _GROWTH_SHARE))


class Folding:
    """Folds the constant nodes of one model; see :class:`onnxslim.passes._rules.Background`.

    Args:
        g: the model.
        ledger: where to note what was folded, and what was not.
        limit: bytes by which the file may grow in all.
        merge: called with each new constant, so that one of equal value is stored once.
    """

    def __init__(self, g: Rewriter, ledger: Ledger, limit: int, merge: Callable[[gs.Constant], object]) -> None:
        self.g = g
        self.ledger = ledger
        self.limit = limit
        self.merge = merge
        self.values: dict[int, np.ndarray] = {}
        self._candidates: dict[int, gs.Node] = {}
        self._computed: set[int] = set()
        self._keep: list[gs.Tensor] = []  # ids stay unique only while their objects live

    # ---------------------------------------------------------------------------------------------- one node at a time

    def consider(self, node: gs.Node) -> bool:
        """Fold a node whose results are known from shapes; note one that reads constants for :meth:`flush`."""
        if node.op == "Constant" or not node.outputs or id(node) in self._candidates or not is_standard(node):
            return False
        if self._is_known(node):
            return self._fold_known(node)
        if not any(not tensor.is_empty() for tensor in node.inputs):
            return False
        if not all(self._is_constant(tensor) for tensor in node.inputs):
            return False
        why = self._objection(node)
        if why:
            self.ledger.refuse(RULE, node, why)
            return False
        self._candidates[id(node)] = node
        for tensor in node.outputs:
            self._computed.add(id(tensor))
            self._keep.append(tensor)
            for user in tensor.outputs:
                self.g.wake(user)
        return False

    def _is_known(self, node: gs.Node) -> bool:
        facts = [self.g.facts.of(tensor) for tensor in node.outputs if not tensor.is_empty()]
        return bool(facts) and all(fact.value is not None and fact.known is not None for fact in facts)

    def _fold_known(self, node: gs.Node) -> bool:
        """Fold where a node that is not known itself reads the result; all others will be dead then."""
        name, op, changed = label(node), node.op, False
        for tensor in list(node.outputs):
            needed = self.g.is_output(tensor) or any(not self._is_known(user) for user in tensor.outputs)
            array = self.g.facts.of(tensor).known
            if array is None or not needed or not self._may_be_written(tensor, array.dtype):
                continue
            if self.ledger.allows(RULE, name):
                self._replace(tensor, array)
                self.ledger.change(RULE, name, f"{op} became the constant {_describe(array)}")
                changed = True
        return changed

    def _may_be_written(self, tensor: gs.Tensor, dtype: np.dtype) -> bool:
        """Whether a constant can stand for a tensor: Constant nodes hold floats only before version 9."""
        node = tensor.inputs[0]
        if not (self.g.scope(node).in_function or self.g.is_output(tensor)):
            return True
        if self.g.opset(node) >= 9 or dtype.kind == "f":
            return True
        self.ledger.refuse(RULE, node, f"Constant nodes of opset {self.g.opset(node)} hold no {dtype}")
        return False

    def _is_constant(self, tensor: gs.Tensor) -> bool:
        """Whether the value of a tensor is in the file or will be computed."""
        if tensor.is_empty() or id(tensor) in self._computed:
            return True
        if isinstance(tensor, gs.Constant):
            return is_plain(np.dtype(tensor.dtype)) and not getattr(tensor._values, "sparse", False)
        if len(tensor.inputs) == 1 and tensor.inputs[0].op == "Constant" and is_standard(tensor.inputs[0]):
            value = self.g.constant(tensor)
            return value is not None and is_plain(value.dtype)
        return False

    def _objection(self, node: gs.Node) -> str | None:
        """Why a node of constants is not folded."""
        impure = self.g.impurity(node)
        if impure:
            return impure
        if any(True for _ in subgraphs(node)):
            return f"{node.op} holds graphs"
        if not has_plain_attributes(node):
            return "it depends on an argument of its function"
        if node.op in _QUANTIZERS:
            return "quantized weights stay quantized"
        if "Sequence" in node.op or node.op.startswith("Optional"):
            return "it makes or reads a sequence or an optional"
        if node.op == "Cast" and self._is_packed(node.inputs[0]):
            return "it unpacks numbers that are stored in 8 bits on purpose"
        return None

    def _is_packed(self, tensor: gs.Tensor) -> bool:
        packed = isinstance(tensor, gs.Constant) and np.dtype(tensor.dtype) in (np.uint8, np.int8)
        return packed and math.prod(tensor.shape) > _MOST_UNPACKED

    # ---------------------------------------------------------------------------------------------------- all together

    def flush(self) -> bool:
        """Fold what was gathered, as far as the file does not grow; whether there was anything."""
        nodes = sorted(
            (node for node in self._candidates.values() if self.g.is_alive(node)), key=self.g.order
        )  # bodies have higher numbers than what they capture
        self._candidates.clear()
        self._merge_new()
        if not nodes:
            return False
        usable = self._measure(nodes)
        chosen = plan(self.g, usable, self._size, self.limit)
        self.limit -= chosen.growth
        for tensor, size in chosen.refused:
            self.ledger.refuse(RULE, tensor.inputs[0], f"its result of {size:,} bytes would make the file grow")
        changed = self._commit(self._evaluated(usable, chosen.results))
        self._computed.clear()
        return changed

    def _merge_new(self) -> None:
        """Store what rules have made once, as what the file held."""
        while self.g.new_constants:
            constant = self.g.new_constants.pop()
            if constant.outputs:
                self.merge(constant)

    def _measure(self, nodes: list[gs.Node]) -> list[gs.Node]:
        """The nodes whose results have a known size, after running those whose size only shows when they run."""
        usable: dict[int, gs.Node] = {}
        waiting = nodes
        while waiting:
            probes: list[gs.Node] = []
            later: list[gs.Node] = []
            blocked: set[int] = set()
            for node in waiting:
                state = "later" if any(id(t) in blocked for t in node.inputs) else self._judge(node, usable)
                if state == "sized":
                    usable[id(node)] = node
                    continue
                if state == "probe":
                    probes.append(node)
                if state != "no":
                    later.append(node)
                blocked.update(id(tensor) for tensor in node.outputs)
            self._probe(probes, list(usable.values()))
            # A probe that failed is refused; what waits for it is left where it is.
            waiting = [node for node in later if node not in probes or self._has_values(node)] if probes else []
        return list(usable.values())

    def _has_values(self, node: gs.Node) -> bool:
        return all(id(tensor) in self.values for tensor in node.outputs if not tensor.is_empty())

    def _judge(self, node: gs.Node, usable: dict[int, gs.Node]) -> str:
        """ "sized": ready; "probe": must be run to tell its size; "later": when its inputs are; "no": refused."""
        if not all(self._is_ready(tensor, usable) for tensor in node.inputs):
            return "no"  # what makes it was refused, or rewritten since
        trap = self._trap(node)
        if trap is not None:
            return trap
        read = sum(self._size(tensor) for tensor in node.inputs if not tensor.is_empty())
        facts = [self._fact(tensor) for tensor in node.outputs if not tensor.is_empty()]
        if all(_bytes(fact) is not None for fact in facts):
            if not all(is_plain(fact.dtype) for fact in facts if fact.dtype is not None):
                self.ledger.refuse(RULE, node, f"its result is of type {facts[0].dtype}")
                return "no"
            made_bytes = sum(_bytes(fact) or 0 for fact in facts)
            if made_bytes > max(_RESULT_LIMIT, 4 * read):
                self.ledger.refuse(RULE, node, f"its result of {made_bytes:,} bytes is too large to store")
                return "no"
            return "sized"
        if node.op in _BOUNDED and read <= _PROBE_LIMIT:
            return "probe"
        self.ledger.refuse(RULE, node, "the size of its result is not known before it runs")
        return "no"

    def _is_ready(self, tensor: gs.Tensor, usable: dict[int, gs.Node]) -> bool:
        """Whether a tensor is in the file, was computed, or can be with what is usable."""
        if tensor.is_empty() or isinstance(tensor, gs.Constant) or id(tensor) in self.values:
            return True
        return len(tensor.inputs) == 1 and (tensor.inputs[0].op == "Constant" or id(tensor.inputs[0]) in usable)

    def _trap(self, node: gs.Node) -> str | None:
        """Integer division by 0, or of the least number by -1, ends the process: the divisor must be looked at."""
        if node.op not in ("Div", "Mod"):
            return None
        dtype = self._fact(node.inputs[1]).dtype
        if dtype is not None and dtype.kind == "f":
            return None
        divisor = self.values.get(id(node.inputs[1]))
        if divisor is None:
            divisor = self.g.constant(node.inputs[1])
        if divisor is None:
            fact = self.g.facts.of(node.inputs[1])
            divisor = None if fact.value is None else fact.known
        if divisor is not None and not np.isin(divisor, (0, -1)).any():
            return None
        self.ledger.refuse(RULE, node, "its divisor is 0 or -1 somewhere, or only known once it runs")
        return "no"

    def _fact(self, tensor: gs.Tensor) -> Fact:
        array = self.values.get(id(tensor))
        return self.g.facts.of(tensor) if array is None else Fact(array.dtype, tuple(array.shape))

    def _size(self, tensor: gs.Tensor) -> int:
        """Bytes of a constant tensor in the file."""
        return _bytes(self._fact(tensor)) or 0

    def _probe(self, probes: list[gs.Node], usable: list[gs.Node]) -> None:
        for opset in sorted({self.g.opset(node) for node in probes}):
            group = [node for node in probes if self.g.opset(node) == opset]
            wanted = [tensor for node in group for tensor in node.outputs if not tensor.is_empty()]
            self._run(self._ancestors(group, usable), opset, wanted)
        for node in probes:
            for tensor in node.outputs:
                array = self.values.get(id(tensor))
                if array is not None:
                    self.g.facts.learn(tensor, Fact(array.dtype, tuple(array.shape)))
                    for user in tensor.outputs:
                        self.g.facts.infer(user)

    def _ancestors(self, nodes: list[gs.Node], usable: list[gs.Node]) -> list[gs.Node]:
        """What must run for these nodes, themselves included: the usable ones without values yet, in their order."""
        makers = {id(tensor): node for node in usable for tensor in node.outputs}
        found = {id(node): node for node in nodes}
        stack = [tensor for node in nodes for tensor in node.inputs]
        while stack:
            tensor = stack.pop()
            maker = makers.get(id(tensor))
            if maker is not None and id(maker) not in found and id(tensor) not in self.values:
                found[id(maker)] = maker
                stack += maker.inputs
        return sorted(found.values(), key=self.g.order)

    def _run(self, nodes: list[gs.Node], opset: int, wanted: list[gs.Tensor]) -> None:
        work = ConstantSet(nodes, opset, self.values)
        self.values |= work.run(wanted)
        for failure in work.failures:
            self.ledger.refuse(RULE, failure.node, f"it cannot be evaluated: {failure.why}")
        for tensor in wanted:
            if id(tensor) not in self.values and not work.failures:
                self.ledger.refuse(RULE, tensor.inputs[0], "it cannot be evaluated")

    def _evaluated(self, usable: list[gs.Node], results: list[gs.Tensor]) -> list[gs.Tensor]:
        """The results that could be computed."""
        for tensor in results:
            if id(tensor) not in self.values:
                self._lay_out(tensor)
        missing = [tensor for tensor in results if id(tensor) not in self.values]
        for opset in sorted({self.g.opset(tensor.inputs[0]) for tensor in missing}):
            wanted = [tensor for tensor in missing if self.g.opset(tensor.inputs[0]) == opset]
            makers = list({id(tensor.inputs[0]): tensor.inputs[0] for tensor in wanted}.values())
            self._run(self._ancestors(makers, usable), opset, wanted)
        return [tensor for tensor in results if id(tensor) in self.values]

    def _lay_out(self, tensor: gs.Tensor) -> None:
        """Lay a weight out anew without a session, which would hold it several times over."""
        node, fact = tensor.inputs[0], self.g.facts.of(tensor)
        if node.op not in ("Transpose", *_VIEWS) or node.inputs[0].is_empty() or fact.shape is None:
            return
        source = self.values.get(id(node.inputs[0]))
        if source is None:
            source = self.g.constant(node.inputs[0])
        if source is None:
            return
        if node.op == "Transpose":
            self.values[id(tensor)] = np.array(source.transpose(node.attrs.get("perm")), order="C")
        else:
            self.values[id(tensor)] = source.reshape([int(size) for size in fact.shape if isinstance(size, int)])

    # ---------------------------------------------------------------------------------------------------------- edits

    def _commit(self, results: list[gs.Tensor]) -> bool:
        changed = False
        for tensor in results:
            node = tensor.inputs[0]
            name, op, array = label(node), node.op, self.values.pop(id(tensor))
            if self._may_be_written(tensor, array.dtype) and self.ledger.allows(RULE, name):
                self._replace(tensor, array)
                self.ledger.change(RULE, name, f"{op} became the constant {_describe(array)}")
                changed = True
        self.values.clear()
        return changed

    def _replace(self, tensor: gs.Tensor, array: np.ndarray) -> None:
        """Make a tensor constant; what made it is left without it."""
        node = tensor.inputs[0]
        scope = self.g.scope(node)
        self.g.facts.learn(tensor, Fact(array.dtype, tuple(array.shape)))
        if scope.in_function or self.g.is_output(tensor):
            self.g.detach(node, tensor)
            self._make_node(scope, tensor, array)
        else:
            self.g.make_initializer(tensor, array)
            self.merge(tensor)

    def _make_node(self, scope: Scope, tensor: gs.Tensor, array: np.ndarray) -> None:
        """Let a Constant node make a tensor: functions hold no initializers, some runtimes refuse one as an output."""
        value = gs.Constant(tensor.name, array)
        name = self.g.model.fresh_name(f"{tensor.name}_constant")
        self.g.insert_first(scope, gs.Node("Constant", name, {"value": value}, [], [tensor]))


def _bytes(fact: Fact) -> int | None:
    if fact.dtype is None or fact.shape is None or fact.sequence:
        return None
    sizes = [size for size in fact.shape if isinstance(size, int)]
    return stored_bytes(fact.dtype, sizes) if len(sizes) == len(fact.shape) else None


def _describe(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}" if array.size > 4 else f"{array.tolist()}"
