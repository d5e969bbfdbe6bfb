"""Which node of one model is which of another: by what they compute, by name, and by their neighbours.

From the surest evidence to the weakest, each step pairing only what is left:

1. the same computation above and below, then above only, then below only, constants included;
2. the same operator with the same large weights, once in each;
3. the same output or node name and operator, unless names mostly stand for other operators (two exporters);
4. the same operators above and below, whatever attributes and constants are;
5. neighbours of what is paired, through the same place, first with equal attributes and constants;
6. the nearest of the same operator beyond neighbours that are in one model only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from onnxslim.graph.fingerprint import Flat, Source, View

__all__ = ["Matching", "match"]

# A weight of fewer elements may stand in several places by chance.
_TELLING = 16
# How many nodes that only one model has may lie between two neighbours.
_REACH = 3


class Matching:
    """Pairs of nodes, by index, in both directions."""

    def __init__(self, a: Flat, b: Flat) -> None:
        self.flats = (a, b)
        self.to_b: dict[int, int] = {}
        self.to_a: dict[int, int] = {}

    def pair(self, one: int, other: int) -> None:
        """Note that two nodes are the same one."""
        self.to_b[one] = other
        self.to_a[other] = one

    def left(self) -> tuple[list[int], list[int]]:
        """The nodes of each model that are not paired."""
        a, b = self.flats
        return (
            [index for index in range(len(a.views)) if index not in self.to_b],
            [index for index in range(len(b.views)) if index not in self.to_a],
        )


def match(a: Flat, b: Flat) -> Matching:
    """Pair the nodes of two models, which must have been numbered by the same interner."""
    found = Matching(a, b)
    _pair_groups(found, lambda flat, view: (view.upstream, view.downstream))
    _pair_groups(found, lambda flat, view: view.upstream)
    _pair_groups(found, lambda flat, view: view.downstream)
    _pair_groups(found, _weights, only_one=True)
    if _names_hold(a, b):
        _pair_groups(found, lambda flat, view: (view.op, view.node.outputs[0].name) if view.node.outputs else None)
        _pair_groups(found, lambda flat, view: (view.op, view.node.name) if view.node.name else None, only_one=True)
    _propagate(found, strict=True)
    _pair_groups(found, lambda flat, view: view.loose, same_count=True)
    _propagate(found, strict=True)
    _propagate(found, strict=False)
    _propagate(found, strict=False, reach=_REACH)
    return found


def _pair_groups(
    found: Matching,
    key: Callable[[Flat, View], Hashable],
    *,
    only_one: bool = False,
    same_count: bool = False,
) -> None:
    """Pair, in order, the nodes that share a key; where one model has more of them, its last ones are left over."""
    groups: list[dict[Hashable, list[int]]] = []
    for flat, left in zip(found.flats, found.left(), strict=True):
        group: dict[Hashable, list[int]] = {}
        for index in left:
            value = key(flat, flat.views[index])
            if value is not None:
                group.setdefault(value, []).append(index)
        groups.append(group)
    for value, ones in groups[0].items():
        others = groups[1].get(value, [])
        if (only_one and len(ones) + len(others) != 2) or (same_count and len(ones) != len(others)):
            continue
        for one, other in zip(ones, others, strict=False):
            found.pair(one, other)


def _weights(flat: Flat, view: View) -> Hashable:
    """The operator with its large constants; None without any."""
    large = tuple(
        (place, source.index)
        for place, source in enumerate(view.inputs)
        if source.kind == "constant" and _elements(flat, source.index) >= _TELLING
    )
    return (view.op, large) if large else None


def _elements(flat: Flat, content: int) -> int:
    count = 1
    for size in flat.constants[content][0].shape:
        count *= size
    return count


def _names_hold(a: Flat, b: Flat) -> bool:
    """Whether the names that both models have mostly stand for the same operator in both."""
    ops = [{view.node.outputs[0].name: view.op for view in flat.views if view.node.outputs} for flat in (a, b)]
    common = [name for name in ops[0] if name in ops[1]]
    return bool(common) and sum(ops[0][name] == ops[1][name] for name in common) >= 0.6 * len(common)


# ------------------------------------------------------------------------------------------------------ neighbours


def _propagate(found: Matching, *, strict: bool, reach: int = 0) -> None:
    """Pair the neighbours of pairs until none is left to pair; ``reach`` nodes that are not paired may lie between."""
    queue = deque(found.to_b.items())
    _pair_places(found, queue, _ends_of_graphs(found), strict=strict)
    while queue:
        one, other = queue.popleft()
        views = found.flats[0].views[one], found.flats[1].views[other]
        places: list[tuple[list[int], list[int]]] = []
        for source, counterpart in zip(views[0].inputs, views[1].inputs, strict=False):
            if source.kind == counterpart.kind == "node" and source.slot == counterpart.slot:
                places.append(([source.index], [counterpart.index]))
        for reader, twin in zip(views[0].readers, views[1].readers, strict=False):
            for place in dict.fromkeys(place for _, place in reader):
                places.append(([i for i, p in reader if p == place], [i for i, p in twin if p == place]))
        if reach:
            places += _places_beyond(found, views, reach)
        for scope, sources in _bodies(found, one, other):
            places += _sources_in_pairs(scope, sources)
        _pair_places(found, queue, places, strict=strict)


def _places_beyond(found: Matching, views: tuple[View, View], reach: int) -> list[tuple[list[int], list[int]]]:
    """Nodes above and below a pair, behind others that are not paired, by the place through which they are reached."""
    places = []
    for step in (_above, _below):
        sides: list[dict[int, list[int]]] = []
        for flat, view, known in zip(found.flats, views, (found.to_b, found.to_a), strict=True):
            reached: dict[int, list[int]] = {}
            level = step(view)
            for _ in range(reach + 1):
                level = [(index, place) for index, place in level if index not in known]
                for index, place in level:
                    reached.setdefault(place, []).append(index)
                level = [each for index, _ in level for each in step(flat.views[index])]
            sides.append({place: list(dict.fromkeys(indices)) for place, indices in reached.items()})
        places += [(indices, sides[1].get(place, [])) for place, indices in sides[0].items()]
    return places


def _above(view: View) -> list[tuple[int, int]]:
    return [(source.index, source.slot) for source in view.inputs if source.kind == "node"]


def _below(view: View) -> list[tuple[int, int]]:
    return [each for readers in view.readers for each in readers]


def _bodies(found: Matching, one: int, other: int) -> Iterable[tuple[list[Source], list[Source]]]:
    a, b = found.flats
    for scope in a.bodies(one):
        twin = (other, scope[1])
        if twin in b.outputs:
            yield a.outputs[scope], b.outputs[twin]


def _sources_in_pairs(a: list[Source], b: list[Source]) -> list[tuple[list[int], list[int]]]:
    return [
        ([source.index], [twin.index])
        for source, twin in zip(a, b, strict=False)
        if source.kind == twin.kind == "node" and source.slot == twin.slot
    ]


def _ends_of_graphs(found: Matching) -> list[tuple[list[int], list[int]]]:
    """What makes the outputs of the main graphs and of functions, and what reads the inputs of the main graphs."""
    a, b = found.flats
    places: list[tuple[list[int], list[int]]] = []
    for scope, sources in a.outputs.items():
        if isinstance(scope[0], str) and scope in b.outputs:
            places += _sources_in_pairs(sources, b.outputs[scope])
    readers = [_input_readers(flat) for flat in (a, b)]
    places += [(indices, readers[1].get(key, [])) for key, indices in readers[0].items()]
    return places


def _input_readers(flat: Flat) -> dict[Any, list[int]]:
    found: dict[Any, list[int]] = {}
    for index, view in enumerate(flat.views):
        for place, source in enumerate(view.inputs):
            if source.kind == "input" and source.scope == ("main",):
                found.setdefault((source.index, place), []).append(index)
    return found


def _pair_places(
    found: Matching,
    queue: deque[tuple[int, int]],
    places: Iterable[tuple[list[int], list[int]]],
    *,
    strict: bool,
) -> None:
    """Pair the nodes at corresponding places that alone are of their kind there."""
    a, b = found.flats
    for ones, others in places:
        groups: dict[Hashable, tuple[list[int], list[int]]] = {}
        for side, (flat, indices, known) in enumerate(((a, ones, found.to_b), (b, others, found.to_a))):
            for index in indices:
                if index not in known:
                    view = flat.views[index]
                    key = view.local if strict else view.op
                    groups.setdefault(key, ([], []))[side].append(index)
        for left, right in groups.values():
            if len(left) == len(right):
                for one, other in zip(left, right, strict=True):
                    if one not in found.to_b and other not in found.to_a:
                        found.pair(one, other)
                        queue.append((one, other))
