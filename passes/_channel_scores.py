"""How much each channel of a coupled group matters, over all layers that make it or read it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim.graph.coupling import Group, Member
from onnxslim.model import Model
from onnxslim.passes._recurrent import product_of
from onnxslim.passes._statistics import LinearLayer, Moments, input_moments, linear_layer
from onnxslim.passes._trunk import Trunk
from onnxslim.runtime import Feed, Session

__all__ = ["Reader", "Removal", "norm_removal", "obs_removal", "reader_moments", "readers", "weight_norms"]

FloatArray = NDArray[np.float64]

_WIDEST = 4608  # inputs of a layer: 512 channels under a 3x3 kernel, 160 MiB of covariance
_SLOTS = 8  # positions of the kernel that a wide layer is looked at
_LEAST_LEFT = 1e-3
_NARROW = 1152  # inputs of a layer up to which it costs little to remove one channel at a time
_ROUNDS, _FEW_ROUNDS = 256, 64  # groups with more channels lose several at once; fewer rounds where a layer is wide


def weight_norms(group: Group) -> FloatArray:
    """Sum over all weights of the squared norm of each channel's slices, ``[channels]``.

    Every weight is scaled to mean 1 first, so that a layer with large weights does not outvote the others.
    """
    total = np.zeros(group.channels)
    for member in group.weights:
        norms = _slice_norms(member)
        total += norms / max(float(norms.mean()), 1e-30)
    return total


def _slice_norms(member: Member) -> FloatArray:
    assert isinstance(member.place.tensor, gs.Constant)
    values: FloatArray = np.asarray(member.place.tensor.values, dtype=np.float64)
    other = tuple(axis for axis in range(values.ndim) if axis != member.place.axis)
    norms: FloatArray = np.square(values).sum(axis=other)
    scores: FloatArray = norms[member.positions].sum(axis=1)
    return scores


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that sums over a group's channels.

    Attributes:
        layer: the layer.
        columns: of its matrix, those that read a channel, ``[channels, each]``.
    """

    layer: LinearLayer
    columns: NDArray[np.int64]

    @property
    def wide(self) -> bool:
        """Whether the covariance of all its inputs would cost more than it tells.

        Its channels are then seen together at one position of the kernel (one element of a flattened map) at a time,
        as if each were a layer of its own: they make up for each other, but not one position for another.
        """
        return self.layer.shape[2] > _WIDEST

    def matrix(self) -> FloatArray:
        """The weight over what covariances are of: ``[O, K]``, or ``[O * each, channels]`` of a wide layer."""
        matrix: FloatArray = self.layer.matrices()[0]
        if not self.wide:
            return matrix
        return np.ascontiguousarray(matrix[:, self.columns].transpose(0, 2, 1)).reshape(-1, len(self.columns))

    @property
    def own(self) -> NDArray[np.int64]:
        """The columns of `matrix` that read a channel, ``[channels, each]``."""
        return np.arange(len(self.columns))[:, None] if self.wide else self.columns


def readers(group: Group) -> list[Reader]:
    """Layers that sum over the group's channels; grouped convolutions aside, whose columns are of different outputs."""
    positions = {member.axis: member.positions for member in group.members}
    found = []
    for use in group.uses:
        if use.makes:
            continue
        layer = linear_layer(use.node)
        if layer is None:
            layer = product_of(use.node, use.axis[0])
        elif id(layer.weight) != use.axis[0]:
            continue
        if layer is None or layer.groups != 1:
            continue
        taps = math.prod(int(n) for n in layer.weight.shape[2:]) if layer.spatial else 1
        columns = positions[use.axis][:, :, None] * taps + np.arange(taps)
        found.append(Reader(layer, columns.reshape(group.channels, -1)))
    return found


def reader_moments(
    model: Model,
    found: Sequence[Reader],
    feeds: Callable[[], Iterable[Feed]],
    *,
    per_sample: int,
    samples: int | None = None,
    seed: int,
) -> dict[Reader, Moments]:
    """What readers get, over the columns of their `matrix`; a pass over the data, and one more for wide readers.

    Raises:
        SlimError: the model does not run on the feeds.
    """
    narrow = {id(reader.layer.node): reader.layer.node for reader in found if not reader.wide}
    nodes = list(narrow.values())
    trunk = Trunk(model, feeds)
    seen = input_moments(trunk, nodes, per_sample=per_sample, samples=samples, seed=seed) if narrow else {}
    moments = {reader: seen[id(reader.layer.node)] for reader in found if not reader.wide}
    wide = [reader for reader in found if reader.wide]
    if not wide:
        return moments
    slots = {reader: _slots(reader) for reader in wide}
    moments |= {reader: Moments.empty(1, len(reader.columns)) for reader in wide}
    session = Session(model, outputs=sorted({reader.layer.data.name for reader in wide}))
    rng = np.random.default_rng(seed)
    for feed in feeds():
        values = session.run(feed)
        for reader in wide:
            data = values[reader.layer.data.name]
            rows = reader.layer.draw(reader.layer.output_shape(data.shape), rng, per_sample)
            inputs = reader.layer.input_rows(data, rows)[0][:, slots[reader]]  # [rows, channels, slots]
            moments[reader].gather(inputs.transpose(0, 2, 1).reshape(1, -1, len(reader.columns)))
    for reader in wide:
        moments[reader].settle()
    return moments


def _slots(reader: Reader) -> NDArray[np.int64]:
    """The columns of some positions of the kernel, spread over all of it, ``[channels, slots]``."""
    each = reader.columns.shape[1]
    spread: NDArray[np.int64] = reader.columns[:, np.unique(np.linspace(0, each - 1, _SLOTS).astype(int))]
    return spread


@dataclass(frozen=True)
class Removal:
    """In which order the channels of a group go, and what has gone with them.

    Attributes:
        order: channels, the one that goes first at the front, ``[channels]``.
        losses: ``losses[n]``: what is lost when ``n`` are gone, ``[channels + 1]``: ``-log(1 - error)`` of each layer
            that reads the group, summed over these layers; from the weights alone, the share of them that went.
    """

    order: NDArray[np.int64]
    losses: FloatArray


def norm_removal(group: Group) -> Removal:
    """The channels with the smallest weights first; what is lost is their share of all that the weights hold."""
    norms = weight_norms(group)
    order = np.argsort(norms, kind="stable")
    return Removal(order, np.concatenate([[0.0], np.cumsum(norms[order]) / max(float(norms.sum()), 1e-30)]))


@dataclass
class _State:
    """What has become of a reader, as far as it reads the group: ``inv(H)`` and its weight, as it makes up, there.

    Its other inputs make up as well, but what comes of them changes no cost: they are left out.

    Attributes:
        columns: for each channel of the group, where its inputs stand now, ``[channels, each]``.
        scale: variance of its output.
        gone: which inputs have been taken out.
    """

    inverse: FloatArray
    weight: FloatArray
    columns: NDArray[np.int64]
    scale: float
    gone: NDArray[np.bool_]

    def costs(self, channels: NDArray[np.int64]) -> FloatArray:
        """What each channel would cost alone."""
        blocks = self.columns[channels]
        own = self.inverse[blocks[:, :, None], blocks[:, None, :]]
        mine = self.weight[:, blocks].transpose(1, 2, 0)  # [channels, each, O]
        costs: FloatArray = np.einsum("cko,cko->c", mine, np.linalg.solve(own, mine)) / self.scale
        return costs

    def remove(self, channels: NDArray[np.int64]) -> None:
        """Take channels out, and let the others make up for them."""
        block = self.columns[channels].reshape(-1)
        across = self.inverse[:, block].copy()
        update = np.linalg.solve(across[block], across.T)
        self.weight -= self.weight[:, block] @ update
        self.inverse -= across @ update
        self.gone[block] = True
        if 4 * int(self.gone.sum()) > len(self.gone):  # what is gone is 0 by now, and costs time
            stay = np.flatnonzero(~self.gone)
            self.columns = (np.cumsum(~self.gone) - 1)[self.columns]
            self.weight, self.inverse = self.weight[:, stay], self.inverse[stay][:, stay]
            self.gone = self.gone[stay]


def obs_removal(
    group: Group, found: Sequence[Reader], moments: Mapping[Reader, Moments], damping: float = 1e-2
) -> Removal | None:
    """In which order the channels of a group are best removed; None without statistics of any reader.

    Optimal brain surgeon on the input of every layer that reads the group: removing the columns ``c`` of a layer with
    input covariance ``H`` and letting all others make up for it costs ``tr(W_c (inv(H)_cc)^-1 W_c^T)``, relative to
    ``tr(W H W^T)``; costs of all readers are added. The cheapest channel goes, ``W`` and ``inv(H)`` follow (Hassibi and
    Stork 1993; block form as in arXiv 2203.07259), and so on.

    Args:
        group: the channels.
        found: its readers.
        moments: of their inputs in the original model.
        damping: added to the diagonal of ``H``, in units of its mean.
    """
    states = []
    for reader in found:
        seen = moments[reader]
        hessian = seen.covariance[0]
        mean = float(np.diagonal(hessian).mean())
        if seen.count == 0 or not np.isfinite(mean) or mean <= 0:
            continue
        own = reader.own.reshape(-1)
        unit = np.eye(len(hessian))
        inverse = np.linalg.solve(hessian + damping * mean * unit, unit[:, own])[own]
        weight = reader.matrix()
        scale = float(np.einsum("ok,ok->", weight @ hessian, weight))
        columns = np.arange(len(own)).reshape(reader.own.shape)
        states.append(_State(inverse, weight[:, own], columns, max(scale, 1e-30), np.zeros(len(own), bool)))
    if not states:
        return None
    left = np.arange(group.channels)
    order: list[NDArray[np.int64]] = []
    costs: list[FloatArray] = [np.zeros((len(states), 1))]
    widest = max(len(state.inverse) for state in states)
    at_once = -(-group.channels // (_ROUNDS if widest <= _NARROW else _FEW_ROUNDS))
    while len(left):
        cost = np.stack([state.costs(left) for state in states])
        chosen = np.argsort(cost.sum(axis=0), kind="stable")[:at_once]
        order.append(left[chosen])
        costs.append(np.maximum(cost[:, chosen], 0.0))
        left = np.delete(left, chosen)
        for state in states:
            state.remove(order[-1])
    errors = np.cumsum(np.concatenate(costs, axis=1), axis=1)
    return Removal(np.concatenate(order), -np.log(np.maximum(1 - errors, _LEAST_LEFT)).sum(axis=0))
