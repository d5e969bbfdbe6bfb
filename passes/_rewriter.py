"""One model while rules rewrite it: scopes, edges by identity, who is alive, and what waits to be looked at.

graphsurgeon keeps the two ends of an edge in step, but it compares nodes and tensors by name, and names repeat between
sibling subgraphs. Everything here goes by identity instead and leaves graphsurgeon's lists consistent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.graph.fact_rules import fixed_integers
from onnxslim.graph.facts import Facts, has_plain_attributes
from onnxslim.graph.purity import functions_of, impurity, is_removable, is_standard
from onnxslim.graph.symbols import Element
from onnxslim.graph.walk import constant_value, subgraphs
from onnxslim.model import Model
from onnxslim.tensors import source_of

__all__ = ["Rewriter", "Scope", "has_plain_attributes"]


# How far behind what changed the last node of a pattern may stand, and how many readers of one tensor are looked at:
# what more nodes read is nobody's alone.
_PATTERN_LENGTH = 2
_MOST_READERS = 8


_NOTHING = np.zeros(0, np.float32)


@dataclass(eq=False)
class Scope:
    """One graph, body or function: where names are defined and looked up.

    Attributes:
        graph: what it is the scope of.
        parent: the scope around a body; None for the main graph and for functions.
        in_function: whether this is a function or lies in one; then constants must be Constant nodes.
        opset: version of the default domain.
        names: names defined here, with the id of the tensor.
        prologue: Constant nodes to put before all others.
    """

    graph: gs.Graph
    parent: Scope | None
    in_function: bool
    opset: int
    names: dict[str, int] = field(default_factory=dict)
    prologue: list[gs.Node] = field(default_factory=list)


class Rewriter:
    """Edits one model in place, by identity; :meth:`finish` must be called at the end.

    Attributes:
        model: the model.
        facts: dtypes, shapes and small integer values, kept right while nodes change.
        new_constants: large constants that rules have made and that nobody has looked at yet.
        scopes: every scope, outer before inner.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.facts = Facts(model)
        self.functions = functions_of(model.graph)
        self.new_constants: list[gs.Constant] = []
        self.scopes: list[Scope] = []
        self._scope: dict[int, Scope] = {}
        self._home: dict[int, Scope] = {}
        self._order: dict[int, float] = {}
        self._bodies: dict[int, list[Scope]] = {}
        self._outputs: dict[int, list[Scope]] = {}
        self._removed: dict[int, gs.Node] = {}
        self._keep: list[gs.Tensor] = []  # ids stay unique only while their objects live
        self._queue: deque[gs.Node] = deque()
        self._queued: set[int] = set()
        self._stale: set[int] = set()
        self._constants: dict[tuple[int, str, bytes, tuple[int, ...]], gs.Tensor] = {}
        self._enter(model.graph, None, in_function=False, opset=model.opset)
        for function in model.graph.functions:
            self._enter(function, None, in_function=True, opset=function.opset or model.opset)

    def _enter(self, graph: gs.Graph, parent: Scope | None, *, in_function: bool, opset: int) -> Scope:
        scope = Scope(graph, parent, in_function, opset)
        self.scopes.append(scope)
        defined = [*graph.inputs, *graph.__dict__.get("initializers", ())]
        for node in graph.nodes:
            defined += node.outputs
        # Constants that came out of Constant nodes are in no list; they are written where a node reads them.
        defined += [
            tensor
            for node in graph.nodes
            for tensor in node.inputs
            if isinstance(tensor, gs.Constant) and id(tensor) not in self._home
        ]
        for tensor in defined:
            if not tensor.is_empty():
                scope.names[tensor.name] = id(tensor)
                self._home[id(tensor)] = scope
        self._keep += defined
        for tensor in graph.outputs:
            self._outputs.setdefault(id(tensor), []).append(scope)
        for node in graph.nodes:
            self._order[id(node)] = len(self._order)
            self._scope[id(node)] = scope
            bodies = [self._enter(body, scope, in_function=in_function, opset=opset) for body in subgraphs(node)]
            if bodies:
                self._bodies[id(node)] = bodies
        return scope

    # ------------------------------------------------------------------------------------------------- what is true

    def nodes(self) -> Iterator[gs.Node]:
        """Yield every node that is left, outer graphs first, each graph in its order."""
        for scope in self.scopes:
            for node in scope.graph.nodes:
                if id(node) not in self._removed:
                    yield node

    def constants(self) -> Iterator[gs.Constant]:
        """Yield every constant that nodes read or hold, once."""
        seen: set[int] = set()
        for node in self.nodes():
            for tensor in (*node.inputs, *node.attrs.values()):
                if isinstance(tensor, gs.Constant) and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield tensor

    def is_alive(self, node: gs.Node) -> bool:
        """Whether the node has not been removed."""
        return id(node) not in self._removed

    def scope(self, node: gs.Node) -> Scope:
        """The scope in which a node stands."""
        return self._scope[id(node)]

    def opset(self, node: gs.Node) -> int:
        """The version of the default domain that holds for a node."""
        return self._scope[id(node)].opset

    def order(self, node: gs.Node) -> float:
        """The place of a node: within one graph, producers have lower numbers."""
        return self._order[id(node)]

    def home(self, tensor: gs.Tensor) -> Scope | None:
        """The scope in which a tensor is defined; None for one that was just made, or that nobody defines."""
        return self._home.get(id(tensor))

    def is_output(self, tensor: gs.Tensor) -> bool:
        """Whether a tensor is an output of any graph, body or function."""
        return bool(self._outputs.get(id(tensor)))

    def output_count(self, tensor: gs.Tensor) -> int:
        """How many outputs of graphs, bodies and functions a tensor is."""
        return len(self._outputs.get(id(tensor), ()))

    def is_unused(self, tensor: gs.Tensor) -> bool:
        """Whether nobody reads a tensor."""
        return tensor.is_empty() or (not tensor.outputs and not self.is_output(tensor))

    def sole_user(self, tensor: gs.Tensor) -> gs.Node | None:
        """The one node that reads a tensor, once; None when there are more or it is an output of a graph."""
        return tensor.outputs[0] if len(tensor.outputs) == 1 and not self.is_output(tensor) else None

    def is_sole_user(self, node: gs.Node, tensor: gs.Tensor) -> bool:
        """Whether a node alone reads a tensor, once."""
        return self.sole_user(tensor) is node

    def producer(self, tensor: gs.Tensor, *ops: str) -> gs.Node | None:
        """The node of the default domain that makes a tensor, when it is one of ``ops`` (any, when none is given).

        None too for nodes whose attributes depend on the arguments of a function.
        """
        if len(tensor.inputs) != 1:
            return None
        node = tensor.inputs[0]
        if not is_standard(node) or (ops and node.op not in ops) or not has_plain_attributes(node):
            return None
        return node

    def impurity(self, node: gs.Node) -> str | None:
        """Why a node must not be folded or merged; None when it is pure."""
        return impurity(node, self.opset(node), self.functions)

    def dtype(self, tensor: gs.Tensor) -> np.dtype | None:
        """The dtype of a tensor; None when unknown, and for sequences."""
        fact = self.facts.of(tensor)
        return None if fact.sequence else fact.dtype

    def shape(self, tensor: gs.Tensor) -> list[Element] | None:
        """The shape of a tensor, None when not even the rank is known.

        Sizes are integers or symbolic; equal ones are equal for every input.
        """
        shape = self.facts.of(tensor).shape
        return None if shape is None else list(shape)

    def static_shape(self, tensor: gs.Tensor) -> list[int] | None:
        """The shape of a tensor when every size is a known integer."""
        shape = self.facts.of(tensor).shape
        if shape is None:
            return None
        sizes = [size for size in shape if isinstance(size, int)]
        return sizes if len(sizes) == len(shape) else None

    def rank(self, tensor: gs.Tensor) -> int | None:
        """The rank of a tensor, None when unknown."""
        shape = self.facts.of(tensor).shape
        return None if shape is None else len(shape)

    def constant(self, tensor: gs.Tensor, limit: int | None = None) -> np.ndarray | None:
        """The value of a constant; None for anything else, for sparse ones, and beyond ``limit`` elements."""
        source = source_of(tensor) if isinstance(tensor, gs.Constant) else None
        if source is not None and source.sparse:
            return None
        if isinstance(tensor, gs.Constant) and limit is not None and int(np.prod(tensor.shape)) > limit:
            return None
        value = constant_value(tensor)
        return None if value is None or (limit is not None and value.size > limit) else value

    def integers(self, node: gs.Node, index: int, attribute: str | None = None) -> list[int] | None:
        """A list of integers from an attribute or from a known input, wherever the node's version has it."""
        return fixed_integers(self.facts, node, index, attribute)

    # ------------------------------------------------------------------------------------------------------- edits

    def is_visible(self, scope: Scope, tensor: gs.Tensor) -> bool:
        """Whether a node in ``scope`` would get this very tensor by its name."""
        home = self._home.get(id(tensor))
        current: Scope | None = scope
        while current is not None:
            if current is home:
                return True
            if current.names.get(tensor.name, id(tensor)) != id(tensor):
                return False
            current = current.parent
        return isinstance(tensor, gs.Constant) and not scope.in_function

    def rename(self, tensor: gs.Tensor) -> None:
        """Give what a body calls its own a name that hides none of the graphs around it."""
        home = self._home[id(tensor)]
        home.names.pop(tensor.name, None)
        tensor.name = self.model.fresh_name(tensor.name)
        home.names[tensor.name] = id(tensor)

    def set_input(self, node: gs.Node, index: int, tensor: gs.Tensor) -> None:
        """Make a node read another tensor."""
        old = node.inputs[index]
        _remove_one(old.outputs, node)
        list.__setitem__(node.inputs, index, tensor)
        list.append(tensor.outputs, node)
        self._lost_reader(old)
        self._touch(node)
        self._wake_producers(tensor)

    def read_instead(self, old: gs.Tensor, new: gs.Tensor) -> None:
        """Make the nodes that read ``old`` read ``new``; outputs of graphs and bodies stay what they are."""
        for node in list(old.outputs):
            for index, tensor in enumerate(node.inputs):
                if tensor is old:
                    self.set_input(node, index, new)

    def cut_inputs(self, node: gs.Node, count: int) -> None:
        """Keep the first ``count`` inputs of a node."""
        while len(node.inputs) > count:
            tensor = list.pop(node.inputs)
            _remove_one(tensor.outputs, node)
            self._lost_reader(tensor)

    def add_input(self, node: gs.Node, tensor: gs.Tensor) -> None:
        """Append an input to a node."""
        list.append(node.inputs, tensor)
        list.append(tensor.outputs, node)
        self._touch(node)

    def rewrite(self, node: gs.Node, op: str, attrs: dict[str, Any], inputs: Sequence[gs.Tensor]) -> None:
        """Turn a node into another one, of the default domain, with the same outputs."""
        node.op = op
        node.domain = None
        node.attrs = attrs
        node.attribute_types = {}
        wanted = list(inputs)
        self.cut_inputs(node, 0)
        for tensor in wanted:
            self.add_input(node, tensor)
        for tensor in node.outputs:
            self._wake_users(tensor)

    def set_outputs(self, node: gs.Node, outputs: Sequence[gs.Tensor | None]) -> None:
        """Let a node make other tensors, which have no producer; a new one that nothing reads where there is None."""
        for tensor in node.outputs:
            _remove_one(tensor.inputs, node)
        list.clear(node.outputs)
        for index, tensor in enumerate(outputs):
            if tensor is None:
                tensor = gs.Variable(self.model.fresh_name(f"{node.name or node.op}_unread_{index}"))
                self._home[id(tensor)] = self._scope[id(node)]
                self._keep.append(tensor)
            list.append(node.outputs, tensor)
            list.append(tensor.inputs, node)
        self._touch(node)

    def set_attributes(self, node: gs.Node, **attrs: Any) -> None:
        """Change attributes of a node; None removes one."""
        merged = {**node.attrs, **attrs}
        node.attrs = {name: value for name, value in merged.items() if value is not None}
        self._touch(node)
        for tensor in node.outputs:
            self._wake_users(tensor)

    def insert_before(
        self, node: gs.Node, op: str, attrs: dict[str, Any], inputs: Sequence[gs.Tensor], hint: str = ""
    ) -> gs.Tensor:
        """Put a new node of one output right before another one and return what it makes."""
        scope = self._scope[id(node)]
        hint = hint or node.outputs[0].name
        result = gs.Variable(self.model.fresh_name(f"{hint}_{op.lower()}"))
        new = gs.Node(op, self.model.fresh_name(f"{node.name or hint}_{op.lower()}"), dict(attrs), [], [result])
        nodes = scope.graph.nodes
        place = next(index for index, each in enumerate(nodes) if each is node)
        list.insert(nodes, place, new)
        below = self._order[id(nodes[place - 1])] if place else self._order[id(node)] - 1
        self._order[id(new)] = (below + self._order[id(node)]) / 2
        self._scope[id(new)] = scope
        self._home[id(result)] = scope
        scope.names[result.name] = id(result)
        self._keep.append(result)
        for tensor in inputs:
            list.append(new.inputs, tensor)
            list.append(tensor.outputs, new)
            self._wake_producers(tensor)
        self.facts.adopt(new, scope.opset)
        self.wake(new)
        return result

    def can_replace(self, old: gs.Tensor, new: gs.Tensor) -> bool:
        """Whether :meth:`replace` can make everyone read ``new`` instead of ``old``."""
        scopes = self._outputs.get(id(old))
        if not scopes:
            return all(self.is_visible(self._scope[id(user)], new) for user in old.outputs)
        home = self._home.get(id(old))
        if len(scopes) != 1 or scopes[0] is not home or self._home.get(id(new)) is not home:
            return False
        if isinstance(new, gs.Constant) or len(new.inputs) != 1 or self.is_output(new):
            return False
        users = [*old.outputs, *new.outputs]
        return all(self.is_visible(self._scope[id(user)], old) for user in users)

    def replace(self, old: gs.Tensor, new: gs.Tensor) -> None:
        """Make everyone read ``new`` instead of ``old``, whose producer must be gone already.

        A graph output keeps its name: then the producer of ``new`` makes ``old`` from here on.
        """
        if self._outputs.get(id(old)):
            producer = new.inputs[0]
            index = next(i for i, tensor in enumerate(producer.outputs) if tensor is new)
            list.__setitem__(producer.outputs, index, old)
            list.append(old.inputs, producer)
            list.clear(new.inputs)
            home = self._home[id(old)]
            home.names.pop(new.name, None)
            self.wake(producer)
            old, new = new, old
        self.facts.learn(new, self.facts.of(old))
        for user in list(old.outputs):
            for index, tensor in enumerate(user.inputs):
                if tensor is old:
                    list.__setitem__(user.inputs, index, new)
                    list.append(new.outputs, user)
            self._touch(user)
        list.clear(old.outputs)
        self._wake_producers(old)
        self._wake_producers(new)

    def bypass(self, node: gs.Node, source: gs.Tensor) -> bool:
        """Remove a node that passes ``source`` through; False, and nothing changed, where that is impossible.

        It is impossible when another output of the node is read, when the output is a graph output and ``source`` is
        an input, a constant or an output itself, and where another tensor of that name hides ``source``.
        """
        result = node.outputs[0]
        if any(not self.is_unused(tensor) for tensor in node.outputs[1:]) or not self.can_replace(result, source):
            return False
        self.remove(node)
        self.replace(result, source)
        return True

    def remove(self, node: gs.Node) -> None:
        """Take a node out, with its bodies; its outputs are left without a producer."""
        self._removed[id(node)] = node
        for scope in self._bodies.get(id(node), ()):
            for tensor in scope.graph.outputs:
                scopes = self._outputs.get(id(tensor), [])
                if scope in scopes:
                    scopes.remove(scope)
                    self._wake_producers(tensor)
            for inner in scope.graph.nodes:
                if id(inner) not in self._removed:
                    self.remove(inner)
        self.cut_inputs(node, 0)
        for tensor in node.outputs:
            _remove_one(tensor.inputs, node)
        list.clear(node.outputs)

    def drop_result(self, node: gs.Node, index: int) -> None:
        """Take an output that nobody reads from a node with bodies, and what makes it from the bodies' outputs.

        The first output of a Loop's body is its condition, not the first output of the Loop.
        """
        _remove_one(node.outputs[index].inputs, node)
        list.__delitem__(node.outputs, index)
        for scope in self._bodies[id(node)]:
            place = index + (node.op == "Loop")
            tensor = scope.graph.outputs[place]
            list.__delitem__(scope.graph.outputs, place)
            self._outputs[id(tensor)].remove(scope)
            self._wake_producers(tensor)
        self.wake(node)

    def drop_carried(self, node: gs.Node, index: int) -> None:
        """Take an input from a Loop, and the input of its body that carries it from one iteration to the next."""
        (scope,) = self._bodies[id(node)]
        tensor = node.inputs[index]
        _remove_one(tensor.outputs, node)
        list.__delitem__(node.inputs, index)
        scope.names.pop(scope.graph.inputs[index].name, None)
        list.__delitem__(scope.graph.inputs, index)
        self._lost_reader(tensor)

    def detach(self, node: gs.Node, tensor: gs.Tensor) -> None:
        """Leave a tensor without its producer; the node makes a new, unread tensor in its place."""
        index = next(i for i, output in enumerate(node.outputs) if output is tensor)
        unread = gs.Variable(self.model.fresh_name(f"{tensor.name}_unread"))
        list.__setitem__(node.outputs, index, unread)
        list.append(unread.inputs, node)
        list.clear(tensor.inputs)
        self._keep.append(unread)
        self.facts.learn(unread, self.facts.of(tensor))
        self._home[id(unread)] = self._scope[id(node)]
        self.wake(node)
        for user in tensor.outputs:
            self._touch(user)

    def make_initializer(self, tensor: gs.Tensor, values: Any) -> None:
        """Give a tensor a value of its own under its name; its producer is left without it."""
        self.detach(tensor.inputs[0], tensor)
        tensor.to_constant(values)
        tensor._export_dtype = None

    def remove_if_dead(self, node: gs.Node) -> bool:
        """Remove a node of which nothing is read, unless it may act by side effect."""
        if not all(self.is_unused(tensor) for tensor in node.outputs) or not is_removable(node, self.functions):
            return False
        self.remove(node)
        return True

    def make_constant(self, scope: Scope, hint: str, values: np.ndarray) -> gs.Tensor:
        """Return a constant for use in ``scope``: an initializer, or in functions the output of a Constant node.

        Small ones of equal value are made once per scope.
        """
        values = np.ascontiguousarray(values).reshape(values.shape)
        small = values.nbytes <= 1024 and values.dtype != object
        key = (id(scope), values.dtype.name, values.tobytes() if small else b"", values.shape)
        if small and key in self._constants:
            return self._constants[key]
        constant = gs.Constant(self.model.fresh_name(hint), values)
        tensor: gs.Tensor = constant
        if scope.in_function:
            tensor = gs.Variable(self.model.fresh_name(hint), dtype=values.dtype, shape=list(values.shape))
            node = gs.Node("Constant", self.model.fresh_name(hint), {"value": constant}, [], [tensor])
            self.insert_first(scope, node)
        scope.names[tensor.name] = id(tensor)
        self._home[id(tensor)] = scope
        self._keep.append(tensor)
        if small:
            self._constants[key] = tensor
        elif isinstance(tensor, gs.Constant):
            self.new_constants.append(tensor)
        return tensor

    def insert_first(self, scope: Scope, node: gs.Node) -> None:
        """Put a new node without inputs before all others of a scope."""
        scope.prologue.append(node)
        self._scope[id(node)] = scope
        self.facts.adopt(node, scope.opset)
        self._order[id(node)] = -1
        for tensor in node.outputs:
            scope.names[tensor.name] = id(tensor)
            self._home[id(tensor)] = scope
            self._keep.append(tensor)

    def inline_body(self, node: gs.Node, body: gs.Graph) -> bool:
        """Put the nodes of a body without inputs in the place of its If; every name that it defines becomes a new one.

        False, and nothing changed, where the body has initializers and lies in a function, which cannot hold them, or
        quantization annotations.
        """
        scope = self.scope(node)
        inner = next(each for each in self._bodies[id(node)] if each.graph is body)
        members = [*inner.prologue, *body.nodes]
        members = [each for each in members if id(each) not in self._removed]
        used = [*body.__dict__.get("initializers", ()), *(tensor for each in members for tensor in each.inputs)]
        used += body.outputs
        constants = {id(t): t for t in used if isinstance(t, gs.Constant) and self.home(t) is inner}
        header = body.__dict__.get("header")
        if (constants and scope.in_function) or (header is not None and header.quantization_annotation):
            return False
        if constants:
            scope.graph.initializers = [*scope.graph.__dict__.get("initializers", ()), *constants.values()]
        self._bodies[id(node)].remove(inner)
        for tensor in body.outputs:
            self._outputs[id(tensor)].remove(inner)
        for tensor in (*constants.values(), *(tensor for each in members for tensor in each.outputs)):
            if not tensor.is_empty() and self.home(tensor) is inner:
                tensor.name = self.model.fresh_name(tensor.name)
                scope.names[tensor.name] = id(tensor)
                self._home[id(tensor)] = scope
        results = list(node.outputs)
        self.remove(node)
        for result, tensor in zip(results, body.outputs, strict=True):
            copy = gs.Node("Identity", self.model.fresh_name(f"{result.name}_copy"), {}, [tensor], [result])
            self._order[id(copy)] = max((self._order[id(each)] for each in members), default=self._order[id(node)])
            self._scope[id(copy)] = scope
            self.facts.adopt(copy, scope.opset)
            self._touch(copy)
            for user in result.outputs:
                self._touch(user)
            members.append(copy)
        for each in members:
            self._scope[id(each)] = scope
            each.name = self.model.fresh_name(each.name) if each.name else each.name
            for nested in self._bodies.get(id(each), ()):
                nested.parent = scope
            self.wake(each)
        place = next(index for index, each in enumerate(scope.graph.nodes) if each is node)
        scope.graph.nodes[place : place + 1] = members
        self.scopes.remove(inner)
        return True

    def finish(self) -> None:
        """Write the lists of nodes back to the graphs, and let go of weights that nothing reads any more.

        graphsurgeon's tensors lie in reference cycles, so a weight that was replaced would stay in memory for long.
        """
        kept: set[int] = set()
        for scope in self.scopes:
            nodes = [*scope.prologue, *scope.graph.nodes]
            scope.graph.nodes = [node for node in nodes if id(node) not in self._removed]
            scope.prologue = []
            unused = {id(tensor) for tensor in scope.graph.__dict__.get("unused_initializers", ())}
            held = scope.graph.__dict__.get("initializers", [])
            scope.graph.initializers = [t for t in held if id(t) in unused or not self.is_unused(t)]
            kept.update(map(id, scope.graph.initializers))
            self._keep += held
        for tensor in self._keep:
            if isinstance(tensor, gs.Constant) and id(tensor) not in kept and self.is_unused(tensor):
                tensor._values = _NOTHING

    # ---------------------------------------------------------------------------------------------------- worklist

    def wake(self, node: gs.Node) -> None:
        """Put a node on the worklist."""
        if id(node) not in self._queued and id(node) not in self._removed and id(node) in self._scope:
            self._queued.add(id(node))
            self._queue.append(node)

    def refine(self) -> bool:
        """Learn shapes again from the nodes that are left; whether anything was learned, and nodes were woken."""
        learned = []
        for scope in self.scopes:
            alive = [node for node in scope.graph.nodes if self.is_alive(node)]
            read = [node for node in alive if not all(self.is_unused(tensor) for tensor in node.outputs)]
            learned += self.facts.require_shapes(read)
        for tensor in learned:
            for node in (*tensor.inputs, *tensor.outputs):
                self._touch(node)
        return bool(learned)

    def _touch(self, node: gs.Node) -> None:
        """Have a node that reads or does something else looked at again, and what is true of its results.

        Patterns are matched at their last node, so the next few nodes are looked at too.
        """
        self._stale.add(id(node))
        self._wake_onward(node, _PATTERN_LENGTH)

    def _wake_onward(self, node: gs.Node, steps: int) -> None:
        self.wake(node)
        for tensor in node.outputs if steps else ():
            for user in tensor.outputs[:_MOST_READERS]:
                self._wake_onward(user, steps - 1)

    def _lost_reader(self, tensor: gs.Tensor) -> None:
        """Have those looked at again that may fire now that fewer read a tensor: rules want to be the only reader."""
        self._wake_producers(tensor)
        if len(tensor.outputs) == 1:
            self._wake_onward(tensor.outputs[0], _PATTERN_LENGTH)

    def _wake_producers(self, tensor: gs.Tensor) -> None:
        for node in tensor.inputs:
            self.wake(node)

    def _wake_users(self, tensor: gs.Tensor) -> None:
        for node in tensor.outputs:
            self.wake(node)

    def awake(self) -> Iterator[gs.Node]:
        """Yield the nodes on the worklist until it is empty, those that are woken meanwhile included."""
        while self._queue:
            node = self._queue.popleft()
            self._queued.discard(id(node))
            if id(node) in self._removed:
                continue
            if id(node) in self._stale:
                self._stale.discard(id(node))
                if self.facts.infer(node):
                    for tensor in node.outputs:
                        for user in tensor.outputs:
                            self._touch(user)
            yield node


def _remove_one(items: list[Any], wanted: Any) -> None:
    """Remove one occurrence of an object from a list by identity, without graphsurgeon's bookkeeping."""
    for index, item in enumerate(items):
        if item is wanted:
            list.__delitem__(items, index)
            return
