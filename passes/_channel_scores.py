"""How much each channel of a coupled group matters, over all layers that make it or read it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim.graph.coupling import Group, Member
from onnxslim.passes._statistics import LinearLayer, Moments, linear_layer

__all__ = ["Removal", "norm_removal", "obs_removal", "readers", "weight_norms"]

FloatArray = NDArray[np.float64]

_WIDEST = 4608  # inputs of a layer: 512 channels under a 3x3 kernel, 160 MiB of covariance
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


def readers(group: Group) -> list[tuple[LinearLayer, NDArray[np.int64]]]:
    """Layers that sum over the group's channels, with the columns ``[channels, each]`` of their matrix.

    Grouped convolutions are left out: their columns belong to different outputs. So are very wide layers, whose
    covariance would cost more than it tells.
    """
    positions = {member.axis: member.positions for member in group.members}
    found = []
    for use in group.uses:
        layer = None if use.makes else linear_layer(use.node)
        if layer is None or layer.groups != 1 or id(layer.weight) != use.axis[0] or layer.shape[2] > _WIDEST:
            continue
        taps = math.prod(int(n) for n in layer.weight.shape[2:]) if layer.spatial else 1
        columns = positions[use.axis][:, :, None] * taps + np.arange(taps)
        found.append((layer, columns.reshape(group.channels, -1)))
    return found


@dataclass(frozen=True)
class Removal:
    """In which order the channels of a group go, and what has gone with them.

    Attributes:
        order: channels, the one that goes first at the front, ``[channels]``.
        losses: ``losses[n]``: relative error that the layers that read the group are left with when ``n`` are gone,
            summed over these layers, ``[channels + 1]``.
    """

    order: NDArray[np.int64]
    losses: FloatArray


def norm_removal(group: Group) -> Removal:
    """The channels with the smallest weights first; what is lost is their share of all that the weights hold."""
    norms = weight_norms(group)
    order = np.argsort(norms, kind="stable")
    return Removal(order, np.concatenate([[0.0], np.cumsum(norms[order]) / max(float(norms.sum()), 1e-30)]))


@dataclass
class _Reader:
    """A layer that reads the group: its inputs that are left, ``inv(H)`` over them, and its weight as it makes up.

    Attributes:
        columns: for each channel of the group, where its inputs stand now, ``[channels, each]``.
        scale: variance of its output.
        gone: which inputs have been taken out, ``[K]``.
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


def obs_removal(group: Group, moments: Mapping[int, Moments], damping: float = 1e-2) -> Removal | None:
    """In which order the channels of a group are best removed; None without statistics of any reader.

    Optimal brain surgeon on the input of every layer that reads the group: removing the columns ``c`` of a layer with
    input covariance ``H`` and letting all others make up for it costs ``tr(W_c (inv(H)_cc)^-1 W_c^T)``, relative to
    ``tr(W H W^T)``; costs of all readers are added. The cheapest channel goes, ``W`` and ``inv(H)`` follow (Hassibi and
    Stork 1993; block form as in arXiv 2203.07259), and so on.

    Args:
        group: the channels.
        moments: of the inputs of its readers in the original model, by ``id(node)``.
        damping: added to the diagonal of ``H``, in units of its mean.
    """
    found = []
    for layer, columns in readers(group):
        seen = moments.get(id(layer.node))
        if seen is None or seen.count == 0:
            continue
        hessian = seen.covariance[0]
        mean = float(np.diagonal(hessian).mean())
        if not np.isfinite(mean) or mean <= 0:
            continue
        inverse = np.linalg.inv(hessian + damping * mean * np.eye(len(hessian)))
        weight = layer.matrices()[0]
        scale = float(np.einsum("ok,ok->", weight @ hessian, weight))
        found.append(_Reader(inverse, weight, columns, max(scale, 1e-30), np.zeros(len(inverse), bool)))
    if not found:
        return None
    left = np.arange(group.channels)
    order: list[NDArray[np.int64]] = []
    costs: list[FloatArray] = [np.zeros(1)]
    widest = max(len(reader.inverse) for reader in found)
    at_once = -(-group.channels // (_ROUNDS if widest <= _NARROW else _FEW_ROUNDS))
    while len(left):
        cost = np.sum([reader.costs(left) for reader in found], axis=0)
        chosen = np.argsort(cost, kind="stable")[:at_once]
        order.append(left[chosen])
        costs.append(np.maximum(cost[chosen], 0.0))
        left = np.delete(left, chosen)
        for reader in found:
            reader.remove(order[-1])
    return Removal(np.concatenate(order), np.cumsum(np.concatenate(costs)))
