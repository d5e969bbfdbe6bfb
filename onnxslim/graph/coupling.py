"""Which channels of a model must be cut together, and the surgery that cuts them.

Every axis of every tensor is an ordered row of atoms (one a position), and every node says which atoms of its inputs
and outputs are one and the same channel: element-wise nodes join them one to one, a Concat appends them, a Flatten maps
one channel to many positions, a convolution joins its input's channels to its weight's second axis and starts new ones
at the first. The axes are the nodes of a networkx graph, what the operators say its edges; within each connected
component the atoms fall into classes, and classes that touch the same axes equally often are one `Group`: channels that
can be exchanged for each other, any number of which may go.

An axis that must stay as it is (graph inputs and outputs, a Softmax over it, an operator without a rule, a size that is
computed) freezes every class it takes part in, with a reason. A mean over an axis, such as that of a layer norm, is
taken of those that are left: such a group is not the same as one whose channels went silent. What each operator does
stands in ``channel_rules``.

The view of a network as masks that propagate through operators follows SPA (arXiv 2403.18955) and DepGraph
(arXiv 2301.12900); positions instead of whole axes make concatenations, slices and flattened axes exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim.graph.shapes import Shapes, infer_shapes
from onnxslim.graph.walk import drop_value_info
from onnxslim.model import Model

if TYPE_CHECKING:
    import networkx as nx

__all__ = ["Axis", "Coupling", "Cut", "Group", "Member", "Use", "couple", "cut"]

Indices = NDArray[np.int64]

# id of the tensor; id of the node when it is this node's own view of a small constant, else 0; the axis.
Axis = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Place:
    """Where an `Axis` lies: the tensor, which of its axes, how long it is, and whose own view it is, if any."""

    tensor: gs.Tensor
    axis: int
    size: int
    user: gs.Node | None


@dataclass(frozen=True, eq=False)
class Use:
    """A layer with weights that makes the channels of an axis (``makes``) or sums over them."""

    node: gs.Node
    axis: Axis
    makes: bool


@dataclass(frozen=True, eq=False)
class Member:
    """One axis that a group takes part in: ``positions[c]`` are those of channel ``c``, ``[channels, each]``."""

    axis: Axis
    place: Place
    positions: Indices


@dataclass(eq=False)
class Group:
    """Channels that are alike: each takes part in the same axes, and all its positions go when it goes.

    Attributes:
        channels: how many there are.
        members: the axes they take part in.
        uses: the layers that make them or sum over them.
        frozen: why none of them can go; None when they can.
        spanned: what takes a mean over them, so that those that stay are not what they were; None when nothing does.
    """

    channels: int
    members: list[Member]
    uses: list[Use]
    frozen: str | None = None
    spanned: str | None = None

    @property
    def makers(self) -> list[gs.Node]:
        """The layers that compute these channels, in graph order."""
        return list({id(use.node): use.node for use in self.uses if use.makes}.values())

    @property
    def weights(self) -> list[Member]:
        """The constant weights (of two axes or more) out of which slices go with every channel, each once."""
        used = {use.axis for use in self.uses}
        return [m for m in self.members if m.axis in used and isinstance(m.place.tensor, gs.Constant)]


@dataclass(eq=False)
class Cut:
    """Which positions of every axis go; axes that are not named keep all.

    Attributes:
        gone: a mask of the positions that go, by axis.
    """

    gone: dict[Axis, NDArray[np.bool_]]

    def kept(self, axis: Axis) -> Indices | None:
        """Positions of ``axis`` that stay, in order; None when all do."""
        mask = self.gone.get(axis)
        return None if mask is None or not mask.any() else np.flatnonzero(~mask)


Adjustment = Callable[[Cut], None]


def _empty_graph() -> nx.Graph:
    import networkx  # takes a quarter of a second, which every command would pay that never prunes

    return networkx.Graph()


@dataclass(eq=False)
class Coupling:
    """All that is known about the axes of one model; it holds until the model changes.

    Attributes:
        network: axes as nodes, an edge where an operator joins two of them.
        places: where each axis lies.
        links: what each edge joins: position ``left[k]`` of the one is position ``right[k]`` of the other.
        frozen: why an axis cannot be cut.
        spanned: which node takes a mean over an axis, of as many positions as there are.
        uses: layers with weights that make or consume an axis.
        adjustments: attributes and size constants that name a length and follow a cut.
        groups: the channels, filled by `couple`.
    """

    network: nx.Graph = field(default_factory=_empty_graph)
    places: dict[Axis, Place] = field(default_factory=dict)
    links: list[tuple[Axis, Axis, Indices, Indices]] = field(default_factory=list)
    frozen: dict[Axis, str] = field(default_factory=dict)
    spanned: dict[Axis, str] = field(default_factory=dict)
    uses: list[Use] = field(default_factory=list)
    adjustments: list[Adjustment] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)

    def link(self, left: Axis, right: Axis, at_left: Indices, at_right: Indices) -> None:
        """Say that positions of two axes (or of one) are the same channels."""
        self.links.append((left, right, at_left, at_right))
        self.network.add_edge(left, right)

    def plan(self, removed: Mapping[int, NDArray[Any]]) -> Cut:
        """The cut that takes channels ``removed[g]`` (indices or a mask) out of ``groups[g]``.

        Raises:
            ValueError: a group is frozen, or all its channels would go.
        """
        gone: dict[Axis, NDArray[np.bool_]] = {}
        for index, channels in removed.items():
            group = self.groups[index]
            chosen = np.zeros(group.channels, bool)
            chosen[channels] = True
            if not chosen.any():
                continue
            if group.frozen or chosen.all():
                raise ValueError(f"group {index} cannot be cut: {group.frozen or 'no channel would be left'}")
            for member in group.members:
                mask = gone.setdefault(member.axis, np.zeros(member.place.size, bool))
                mask[member.positions[chosen].reshape(-1)] = True
        return Cut(gone)


def couple(model: Model, shapes: Shapes | None = None) -> Coupling:
    """Find the channel groups of a model's main graph; the model is not changed.

    Weights in Constant nodes are not seen as weights: call ``hoist_constants`` first. Bodies of If, Loop and Scan and
    local functions are not looked into; what they read is frozen.
    """
    import networkx

    from onnxslim.graph.channel_rules import trace

    coupling = Coupling()
    trace(model, shapes if shapes is not None else infer_shapes(model), coupling)
    made: dict[Axis, int] = {}
    for use in coupling.uses:
        if use.makes:
            made.setdefault(use.axis, len(made))
    parts = [part for part in networkx.connected_components(coupling.network) if any(axis in made for axis in part)]
    part_of = {axis: number for number, part in enumerate(parts) for axis in part}
    links: list[list[tuple[Axis, Axis, Indices, Indices]]] = [[] for _ in parts]
    for link in coupling.links:
        if link[0] in part_of:
            links[part_of[link[0]]].append(link)
    order = sorted(range(len(parts)), key=lambda number: min(made.get(axis, len(made)) for axis in parts[number]))
    for number in order:
        coupling.groups.extend(_groups(coupling, parts[number], links[number]))
    return coupling


def _groups(coupling: Coupling, part: set[Axis], links: list[tuple[Axis, Axis, Indices, Indices]]) -> list[Group]:
    """The groups within one connected component."""
    axes = [axis for axis in coupling.places if axis in part]  # in the order in which they were met
    sizes = np.array([coupling.places[axis].size for axis in axes])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    start = dict(zip(axes, starts[:-1].tolist(), strict=True))
    left = np.concatenate([start[a] + at for a, _, at, _ in links]) if links else np.zeros(0, np.int64)
    right = np.concatenate([start[b] + at for _, b, _, at in links]) if links else np.zeros(0, np.int64)
    label = _components(int(starts[-1]), left, right)
    owner = np.repeat(np.arange(len(axes)), sizes)
    order = np.argsort(label, kind="stable")
    bounds = np.flatnonzero(np.diff(label[order], prepend=-1))
    classes = np.split(order, bounds[1:])
    alike: dict[bytes, list[Indices]] = {}
    for atoms in classes:
        alike.setdefault(owner[atoms].tobytes(), []).append(atoms)
    uses: dict[Axis, list[Use]] = {}
    for use in coupling.uses:
        uses.setdefault(use.axis, []).append(use)
    groups = []
    for same in alike.values():
        owners = owner[same[0]]
        atoms = np.stack(same)
        members, reasons, spans, known = [], [], [], []
        for number in np.unique(owners):
            axis = axes[number]
            columns = np.flatnonzero(owners == number)
            members.append(Member(axis, coupling.places[axis], atoms[:, columns] - starts[number]))
            known += uses.get(axis, [])
            if axis in coupling.frozen:
                reasons.append(coupling.frozen[axis])
            if axis in coupling.spanned:
                spans.append(coupling.spanned[axis])
        if any(use.makes for use in known):
            groups.append(Group(len(same), members, known, next(iter(reasons), None), next(iter(spans), None)))
    return groups


def _components(count: int, left: Indices, right: Indices) -> Indices:
    """Smallest atom that each atom is joined to, by hooking and pointer jumping (FastSV) in a few passes."""
    label = np.arange(count)
    while True:
        before = label
        label = label.copy()
        a, b = before[left], before[right]
        low = np.minimum(a, b)
        for where in (a, b, left, right):
            np.minimum.at(label, where, low)
        label = np.minimum(label, label[label])
        if np.array_equal(label, before):
            return label


def cut(model: Model, coupling: Coupling, removed: Mapping[int, NDArray[Any]]) -> Cut:
    """Take channels out of a model in place: weights, parameters of norms, attributes and size constants.

    Args:
        model: the model that ``coupling`` was made from, unchanged since.
        coupling: its groups.
        removed: channels to take out (indices or a mask), by the group's number in ``coupling.groups``.

    Raises:
        ValueError: a group is frozen, or all its channels would go.
    """
    plan = coupling.plan(removed)
    if not plan.gone:
        return plan
    for adjust in coupling.adjustments:
        adjust(plan)
    _cut_constants(model, coupling, plan)
    drop_value_info(model)
    return plan


def _cut_constants(model: Model, coupling: Coupling, plan: Cut) -> None:
    """Slice every constant. Users of one constant that lose different positions each get their own."""
    views: dict[int, dict[int, list[tuple[int, Indices]]]] = {}
    constants: dict[int, gs.Constant] = {}
    for axis in plan.gone:
        place, kept = coupling.places[axis], plan.kept(axis)
        if isinstance(place.tensor, gs.Constant) and kept is not None:
            constants[axis[0]] = place.tensor
            views.setdefault(axis[0], {}).setdefault(axis[1], []).append((place.axis, kept))
    viewers: dict[int, set[int]] = {}  # the users that have a view of their own, cut or not
    for axis in coupling.places:
        viewers.setdefault(axis[0], set()).add(axis[1])
    outputs = {id(tensor) for tensor in model.graph.outputs}
    for tensor, by_user in views.items():
        constant = constants[tensor]
        values = constant.values
        users = {id(node): node for node in constant.outputs}
        for viewer, cuts in by_user.items():
            sliced = values
            for position, kept in cuts:
                sliced = np.take(sliced, kept, axis=position)
            mine = {viewer} if viewer else set(users) - viewers[tensor]
            if mine >= set(users) and tensor not in outputs:
                constant.values = np.ascontiguousarray(sliced)
                continue
            own = gs.Constant(model.fresh_name(constant.name), np.ascontiguousarray(sliced))
            for user in mine & set(users):
                for slot, tensor_in in enumerate(users[user].inputs):
                    if tensor_in is constant:
                        users[user].inputs[slot] = own
