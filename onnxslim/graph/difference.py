"""Which nodes of one model became which of another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxslim.graph.fingerprint import Constant, Interner, Source, View, flatten
from onnxslim.graph.matching import Matching, match
from onnxslim.model import Model
from onnxslim.record import GraphDifference, GraphPlace, NodeChanges, Rewritten, TensorChange

__all__ = ["graph_difference"]

_SMALLEST_LISTED = 1024
_COMMUTATIVE = frozenset({"Add", "Mul", "Max", "Min", "Sum", "And", "Or", "Xor", "Equal"})


def graph_difference(a: Model, b: Model) -> GraphDifference:
    """Say which nodes of ``a`` became which of ``b``, subgraphs and functions included.

    Nodes are paired by what they do, so the names and the exporter of the two may differ. What could not be paired is
    gathered in connected pieces, each with what stands in its place in the other model.
    """
    intern = Interner()
    flats = flatten(a, intern), flatten(b, intern)
    matching = match(*flats)
    changes = {one: list(_changes(matching, one, other)) for one, other in matching.to_b.items()}
    changes = {one: found for one, found in changes.items() if found}
    regions = _Regions(matching, changes)
    alone = {one: found for one, found in changes.items() if one not in regions.absorbed}
    tensors = _Tensors(matching)
    interface = _interface(a, b)
    renamed = sum(_renamed(flats[0].views[one], flats[1].views[other]) for one, other in matching.to_b.items())
    rewritten = regions.rewritten()
    rewired = _rewired(matching, regions)
    changed = _grouped(matching, alone, rewired)
    return GraphDifference(
        same=not (rewritten or changed or tensors.added or tensors.removed or any(not mild for _, mild in interface)),
        nodes_before=len(flats[0].views),
        nodes_after=len(flats[1].views),
        matched=len(matching.to_b),
        renamed=renamed,
        rewritten=rewritten,
        changed=changed,
        tensors=tensors.listed(),
        constants_added=len(tensors.added),
        constants_removed=len(tensors.removed),
        bytes_added=sum(constant.nbytes for constant in tensors.added),
        bytes_removed=sum(constant.nbytes for constant in tensors.removed),
        interface=[sentence for sentence, _ in interface],
    )


def _renamed(a: View, b: View) -> bool:
    names = [[tensor.name for tensor in view.node.outputs] for view in (a, b)]
    return names[0] != names[1] or a.node.name != b.node.name


# --------------------------------------------------------------------------------------------- changes within nodes


def _changes(matching: Matching, one: int, other: int) -> Iterator[str]:
    """How two nodes that are the same one differ in attributes and constants."""
    a, b = matching.flats
    left, right = a.views[one], b.views[other]
    attributes = dict(left.attributes), dict(right.attributes)
    for name in sorted({*attributes[0], *attributes[1]}):
        values = [_shown(each.get(name)) for each in attributes]
        if attributes[0].get(name) != attributes[1].get(name):
            yield f"attribute {name}: {values[0]} → {values[1]}"
    if left.op in _COMMUTATIVE and len(left.inputs) == len(right.inputs) == 2 and left.local != right.local:
        right_inputs = list(right.inputs)
        if left.inputs[0].kind == right.inputs[1].kind and left.inputs[0].kind != right.inputs[0].kind:
            right_inputs.reverse()
    else:
        right_inputs = right.inputs
    for place, (source, twin) in enumerate(zip(left.inputs, right_inputs, strict=False)):
        if source.kind == twin.kind == "constant" and source.index != twin.index:
            yield f"input {place}: {_content_change(a.constants[source.index][0], b.constants[twin.index][0])}"
    counts = [sum(source.kind != "empty" for source in view.inputs) for view in (left, right)]
    if counts[0] != counts[1]:
        yield f"{counts[0]} inputs → {counts[1]}"


def _shown(value: Any) -> str:
    text = "default" if value is None else str(list(value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 80 else text[:79] + "…"


def _content_change(a: Constant, b: Constant) -> str:
    if a.dtype != b.dtype and a.shape == b.shape:
        return f"{a.dtype} → {b.dtype}"
    return "other values" if a.form == b.form else f"{a.form} → {b.form}"


def _grouped(matching: Matching, *found: dict[int, list[str]]) -> list[NodeChanges]:
    a, b = matching.flats
    groups: dict[tuple[str, str], list[GraphPlace]] = {}
    for changes in found:
        for one, sentences in changes.items():
            place = GraphPlace(before=[a.views[one].label], after=[b.views[matching.to_b[one]].label])
            for sentence in sentences:
                groups.setdefault((a.views[one].op, sentence), []).append(place)
    ranked = sorted(groups.items(), key=lambda item: -len(item[1]))
    return [NodeChanges(op=op, what=what, places=places) for (op, what), places in ranked]


# ---------------------------------------------------------------------------------------------------------- regions


class _Regions:
    """Nodes that are in one model only, in connected pieces with what took their place.

    A piece of one model and one of the other belong together where what reads the one reads the other now. A paired
    node whose constants or attributes changed belongs to a piece that it took in (the convolution that a
    BatchNormalization was folded into); ``absorbed`` holds those, by their index in the first model.
    """

    def __init__(self, matching: Matching, changes: dict[int, list[str]]) -> None:
        self.matching = matching
        self.changes = changes
        self.absorbed: set[int] = set()
        self.alone = tuple(set(left) for left in matching.left())
        self.parents: dict[tuple[int, int], tuple[int, int]] = {}
        self.constants: dict[tuple[int, int], set[int]] = {}
        for side in (0, 1):
            for index in sorted(self.alone[side]):
                self._join_neighbours(side, index)
                self._join_counterparts(side, index)

    def _root(self, token: tuple[int, int]) -> tuple[int, int]:
        self.parents.setdefault(token, token)
        while self.parents[token] != token:
            self.parents[token] = self.parents[self.parents[token]]
            token = self.parents[token]
        return token

    def _join(self, one: tuple[int, int], other: tuple[int, int]) -> None:
        roots = sorted((self._root(one), self._root(other)))
        self.parents[roots[1]] = roots[0]

    def _twin(self, side: int, index: int) -> int | None:
        return (self.matching.to_b if side == 0 else self.matching.to_a).get(index)

    def _absorb(self, token: tuple[int, int], side: int, index: int) -> bool:
        """Take a changed pair into a piece."""
        twin = self._twin(side, index)
        one, other = (index, twin) if side == 0 else (twin, index)
        if one is None or other is None or one not in self.changes:
            return False
        self.absorbed.add(one)
        self._join((0, one), (1, other))
        self._join((0, one), token)
        return True

    def _join_neighbours(self, side: int, index: int) -> None:
        self._root((side, index))
        for readers in self.matching.flats[side].views[index].readers:
            for reader, _ in readers:
                if reader in self.alone[side]:
                    self._join((side, index), (side, reader))

    def _join_counterparts(self, side: int, index: int) -> None:
        """Find what stands, in the other model, where the readers of this node now read."""
        flat, other = self.matching.flats[side], self.matching.flats[1 - side]
        token = (side, index)
        view = flat.views[index]
        for readers, ends in zip(view.readers, view.ends, strict=True):
            for reader, place in readers:
                twin = self._twin(side, reader)
                if twin is None:
                    continue
                inputs = other.views[twin].inputs
                if place < len(inputs) and self._meet(token, 1 - side, inputs[place]):
                    continue
                self._absorb(token, side, reader)
            for scope, position in ends:
                owner = self._twin(side, scope[0]) if isinstance(scope[0], int) else None
                there = other.outputs.get(scope if owner is None else (owner, *scope[1:]), [])
                if position < len(there):
                    self._meet(token, 1 - side, there[position])

    def _meet(self, token: tuple[int, int], side: int, source: Source) -> bool:
        """Join a piece with what is read in its place, if that is new or changed."""
        if source.kind == "constant" and side == 1:
            self.constants.setdefault(token, set()).add(source.index)
            return True
        if source.kind != "node":
            return False
        if source.index in self.alone[side]:
            self._join(token, (side, source.index))
            return True
        return self._absorb(token, side, source.index)

    def rewritten(self) -> list[Rewritten]:
        """The pieces, those that are alike together; the most frequent first, then in graph order."""
        pieces: dict[tuple[int, int], tuple[list[int], list[int], set[int]]] = {}
        for token in sorted(self.parents):
            piece = pieces.setdefault(self._root(token), ([], [], set()))
            (piece[0] if token[0] == 0 else piece[1]).append(token[1])
            piece[2].update(self.constants.get(token, ()))
        groups: dict[Any, list[GraphPlace]] = {}
        ops: dict[Any, tuple[dict[str, int], dict[str, int]]] = {}
        for before, after, constants in pieces.values():
            counts = [
                dict(Counter(flat.views[index].op for index in indices))
                for flat, indices in zip(self.matching.flats, (before, after), strict=True)
            ]
            stored = [self.matching.flats[1].constants[content][0].name for content in sorted(constants)]
            if stored:
                counts[1]["constant"] = len(stored)
            key = tuple(tuple(sorted(count.items())) for count in counts)
            ops.setdefault(key, (counts[0], counts[1]))
            places = [
                [flat.views[index].label for index in indices]
                for flat, indices in zip(self.matching.flats, (before, after), strict=True)
            ]
            groups.setdefault(key, []).append(GraphPlace(before=places[0], after=[*places[1], *stored]))
        ranked = sorted(groups.items(), key=lambda item: -len(item[1]))
        return [Rewritten(before=ops[key][0], after=ops[key][1], places=places) for key, places in ranked]

    def touches(self, side: int, source: Source) -> bool:
        """Whether a source is part of a piece."""
        return source.kind == "node" and (side, source.index) in self.parents


def _rewired(matching: Matching, regions: _Regions) -> dict[int, list[str]]:
    """Paired nodes that read something else now, where nothing in between was rewritten."""
    found: dict[int, list[str]] = {}
    for one, other in matching.to_b.items():
        left, right = matching.flats[0].views[one], matching.flats[1].views[other]
        wanted = [_counterpart(matching, source) for source in left.inputs]
        got = [(source.kind, source.index, source.slot, source.scope) for source in right.inputs]
        if left.op in _COMMUTATIVE and sorted(map(str, wanted)) == sorted(map(str, got)):
            continue
        for place, (source, twin) in enumerate(zip(left.inputs, right.inputs, strict=False)):
            if regions.touches(0, source) or regions.touches(1, twin) or wanted[place] == got[place]:
                continue
            if source.kind == twin.kind == "constant":  # told as a change of content
                continue
            found.setdefault(one, []).append(f"input {place} reads something else")
    return found


def _counterpart(matching: Matching, source: Source) -> tuple[Any, ...]:
    scope = source.scope
    if scope and isinstance(scope[0], int):
        scope = (matching.to_b.get(scope[0]), *scope[1:])
    index = matching.to_b.get(source.index, -1) if source.kind == "node" else source.index
    return (source.kind, index, source.slot, scope)


# ---------------------------------------------------------------------------------------------- tensors, interface


class _Tensors:
    """The constants that only one model has."""

    def __init__(self, matching: Matching) -> None:
        a, b = matching.flats
        self.removed = [stored[0] for content, stored in a.constants.items() if content not in b.constants]
        self.added = [stored[0] for content, stored in b.constants.items() if content not in a.constants]
        self.pairs = self._pairs(matching)

    def _pairs(self, matching: Matching) -> list[tuple[Constant, Constant]]:
        """Constants that took the place of others: of the same name, or read in the same place by the same node."""
        a, b = matching.flats
        by_name = {constant.name: constant for constant in self.added}
        new = {constant.content: constant for constant in self.added}
        places: dict[int, Constant] = {}
        for one, other in matching.to_b.items():
            for source, twin in zip(a.views[one].inputs, b.views[other].inputs, strict=False):
                if source.kind == twin.kind == "constant" and twin.index in new:
                    places.setdefault(source.index, new[twin.index])
        found: list[tuple[Constant, Constant]] = []
        taken: set[int] = set()
        for constant in self.removed:
            twin_constant = by_name.get(constant.name) or places.get(constant.content)
            if twin_constant is not None and twin_constant.content not in taken:
                taken.add(twin_constant.content)
                found.append((constant, twin_constant))
        return found

    def listed(self) -> list[TensorChange]:
        """Those of some size, the largest first."""
        paired = {constant.content for pair in self.pairs for constant in pair}
        rows: list[tuple[str, Constant | None, Constant | None]]
        rows = [("changed", one, other) for one, other in self.pairs]
        rows += [("removed", constant, None) for constant in self.removed if constant.content not in paired]
        rows += [("added", None, constant) for constant in self.added if constant.content not in paired]
        entries = [_tensor_change(status, one, other) for status, one, other in rows]
        large = [entry for entry in entries if max(entry.bytes_before, entry.bytes_after) >= _SMALLEST_LISTED]
        return sorted(large, key=lambda entry: -max(entry.bytes_before, entry.bytes_after))


def _tensor_change(status: Any, one: Constant | None, other: Constant | None) -> TensorChange:
    either = one or other
    assert either is not None
    return TensorChange(
        status=status,
        name=either.name,
        before=one.form if one else None,
        after=other.form if other else None,
        bytes_before=one.nbytes if one else 0,
        bytes_after=other.nbytes if other else 0,
    )


def _interface(a: Model, b: Model) -> list[tuple[str, bool]]:
    """How inputs and outputs differ, in order; whether it is but a name."""
    found: list[tuple[str, bool]] = []
    for what in ("input", "output"):
        sides = [list(getattr(model.graph, what + "s")) for model in (a, b)]
        if len(sides[0]) != len(sides[1]):
            counts = [f"{len(side)} ({', '.join(tensor.name for tensor in side)})" for side in sides]
            found.append((f"{what}s: {counts[0]} → {counts[1]}", False))
            continue
        for position, (one, other) in enumerate(zip(*sides, strict=True)):
            if one.name != other.name:
                found.append((f"{what} {position}: {one.name!r} is called {other.name!r}", True))
            forms = _form(one), _form(other)
            if forms[0] != forms[1]:
                found.append((f"{what} {one.name!r}: {forms[0]} → {forms[1]}", False))
    return found


def _form(tensor: gs.Tensor) -> str:
    if tensor.dtype is None:
        return "of no declared type"
    shape = "of any shape" if tensor.shape is None else "[" + ", ".join(str(size) for size in tensor.shape) + "]"
    return f"{np.dtype(tensor.dtype)} {shape}"
