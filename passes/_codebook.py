"""Codebooks: a weight as a few values and one small number an element, chosen for what the layer gives.

All of it is numpy on one tensor at a time; nothing here knows a graph. ``fit`` clusters (1-D k-means: Deep Compression,
Han et al. 2016), ``Coded.decode`` gives back exactly the values that a runtime computes from what is stored.
``Feedback`` chooses indices so that the error of one column is made up for by the columns after it (GPTQ, Frantar et
al. 2023, here with a codebook in place of a linear grid).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["Coded", "Feedback", "fit", "kmeans", "nearest", "refit_values"]

Array = NDArray[Any]
FloatArray = NDArray[np.float64]
_Float = TypeVar("_Float", np.float32, np.float64)

BINS = 1 << 14  # more points than this are clustered as a histogram: the error it adds is far below a codebook's own
ROUNDS = 100
_SMALL = 64  # matrices that are factored as a whole
_MOST_PRODUCTS = 1 << 32  # that the values of one codebook are worth
_PART_ELEMENTS = 1 << 20  # of a weight, once for each value, that are taken at a time
_PAIRED = ((0, 2), (0, 2))  # outputs and inputs
_PULL = 1e-4  # to what k-means found, in units of the mean energy
_BLOCK = 32  # columns whose losses reach the others by one matrix product


@dataclass
class Coded:
    """One weight as ``codebook[indices] * scale``.

    Attributes:
        indices: uint8, in the shape of the weight.
        codebook: at most 256 values in the dtype of the weight, ascending.
        scale: one factor a channel in the dtype of the weight, shaped to broadcast; None when there is none.
    """

    indices: NDArray[np.uint8]
    codebook: Array
    scale: Array | None = None

    @property
    def bits(self) -> int:
        """Bits that an index needs."""
        return max(1, (len(self.codebook) - 1).bit_length())

    def decode(self) -> Array:
        """The weight as a runtime computes it: one look-up and one product in the weight's own dtype."""
        values = self.codebook[self.indices]
        return values if self.scale is None else values * self.scale


def nearest(values: Array, centres: FloatArray) -> NDArray[np.uint8]:
    """Index of the nearest of the ascending ``centres`` for each value, in the shape of ``values``."""
    middles = (centres[1:] + centres[:-1]) / 2
    return np.searchsorted(middles, values).astype(np.uint8)


def kmeans(values: FloatArray, count: int, weights: FloatArray | None = None) -> FloatArray:
    """At most ``count`` ascending centres of 1-D ``values`` under weighted squared error (Lloyd; deterministic).

    Starts once from quantiles of the values and once from quantiles of the cube root of their density (the optimum for
    many centres, Panter and Dite 1951) and keeps the better. A tensor of ``count`` or fewer different values is exact.
    """
    values = values.reshape(-1)
    mass: FloatArray = np.ones_like(values) if weights is None else weights.reshape(-1)
    low, high = float(values.min()), float(values.max())
    points: FloatArray
    few = np.unique(values[: 4 * BINS])
    if len(few) <= count:
        few = np.unique(values)
        if len(few) <= count:
            return few
    if len(values) > BINS and high > low:
        slots = np.minimum(((values - low) * (BINS / (high - low))).astype(np.int64), BINS - 1)
        total = np.asarray(np.bincount(slots, mass, BINS), np.float64)
        points = np.asarray(np.bincount(slots, mass * values, BINS), np.float64)[total > 0] / total[total > 0]
        mass = total[total > 0]
    else:
        order = np.argsort(values, kind="stable")
        points = np.asarray(values[order], np.float64)
        mass = mass[order]
    if not mass.sum() > 0:
        mass = np.ones_like(points)
    summed = np.concatenate([[0.0], np.cumsum(mass)])
    moment = np.concatenate([[0.0], np.cumsum(mass * points)])
    square = float((mass * points * points).sum())

    def lloyd(centres: FloatArray) -> tuple[float, FloatArray]:
        for _ in range(ROUNDS):
            edges = np.searchsorted(points, (centres[1:] + centres[:-1]) / 2)
            cuts = np.concatenate([[0], edges, [len(points)]])
            inside, first = np.diff(summed[cuts]), np.diff(moment[cuts])
            moved = np.where(inside > 0, first / np.where(inside > 0, inside, 1), centres)
            done = np.abs(moved - centres).max() <= 1e-7 * (high - low)
            centres = np.sort(moved)
            if done:
                break
        error = square - float((first**2 / np.where(inside > 0, inside, 1)).sum())
        return error, centres

    density, grid = np.histogram(points, bins=1024, weights=mass)
    wanted = (np.arange(count) + 0.5) / count
    starts = []
    for power in (1.0, 1 / 3):
        share = np.concatenate([[0.0], np.cumsum(density**power)])
        starts.append(np.interp(wanted * share[-1], share, grid))
    centres = min((lloyd(start) for start in starts), key=lambda result: result[0])[1]
    return np.unique(centres)


def fit(
    weight: Array,
    bits: int,
    axis: int | None,
    importance: FloatArray | None = None,
    *,
    always_scale: bool = False,
) -> Coded:
    """Cluster ``weight`` into ``2 ** bits`` values, with one scale a channel along ``axis`` where that pays.

    Args:
        weight: floating-point tensor of any shape.
        bits: 2 to 8.
        axis: of the channels; None for no scale.
        importance: weight of each element's squared error, broadcastable to ``weight``; None counts all alike.
        always_scale: keep the scales even where their bytes would be better spent on more bits.

    Scales are kept when they lower the error by more than as many bytes of longer indices would (a bit an element
    divides the squared error by four).
    """
    values = weight.astype(np.float64)
    mass = np.ones_like(values) if importance is None else np.broadcast_to(importance, values.shape).astype(np.float64)
    mass = mass / max(float(mass.mean()), 1e-300)
    plain = _round(kmeans(values, 1 << bits, mass.reshape(-1)), weight.dtype)
    indices = nearest(values, plain.astype(np.float64))
    coded = Coded(indices, plain)
    if axis is None or weight.shape[axis] in (1, weight.size):
        return coded
    others = tuple(a for a in range(weight.ndim) if a != axis % weight.ndim)
    scale = np.sqrt((values**2).mean(axis=others, keepdims=True))
    scale[scale == 0] = 1.0
    for _ in range(3):
        centres = kmeans(values / scale, 1 << bits, (mass * scale**2).reshape(-1))
        unit = centres[nearest(values / scale, centres)]
        power = (mass * unit * unit).sum(axis=others, keepdims=True)
        matched = (mass * values * unit).sum(axis=others, keepdims=True)
        scale = np.where((power > 0) & (matched > 0), matched / np.where(power > 0, power, 1), scale)
    rounded, book = scale.astype(weight.dtype), _round(centres, weight.dtype)
    if not (np.isfinite(rounded).all() and (rounded > 0).all()):
        return coded
    scaled = Coded(nearest(values / rounded.astype(np.float64), book.astype(np.float64)), book, rounded)
    overhead = 8 * (rounded.nbytes + 80) / weight.size
    before, after = (float((mass * (c.decode().astype(np.float64) - values) ** 2).sum()) for c in (coded, scaled))
    return scaled if after * (1.0 if always_scale else 4.0**overhead) < before else coded


def _round(centres: FloatArray, dtype: np.dtype[Any]) -> Array:
    """Centres in the dtype that is stored, ascending and without repeats."""
    return np.unique(centres.astype(dtype))


class Feedback:
    """How what one column of a layer loses is put on those that are still free, for inputs of one covariance.

    Columns are fixed one after another, those with the most input energy first; what each loses is put on those
    that are still free, through the inverse of the inputs' covariance (GPTQ; Frantar et al. 2023).
    """

    def __init__(self, covariance: FloatArray, damping: float = 1e-2) -> None:
        """Factor the inverse of ``covariance`` ``[G, K, K]``; ``damping`` is a share of the mean input energy."""
        energy = np.diagonal(covariance, axis1=1, axis2=2)
        self.order = np.argsort(-energy, axis=1, kind="stable")
        ridge = damping * np.maximum(energy.mean(axis=1), 0.0) + 1e-12 * float(energy.max(initial=0.0)) + 1e-30
        self.upper = _inverse_factor(covariance, self.order, ridge)

    def assign(self, matrices: FloatArray, codebook: FloatArray, scale: FloatArray) -> NDArray[np.uint8]:
        """Indices ``[G, O, K]`` for ``matrices`` that keep the layer's output, not only each weight, close.

        Args:
            matrices: ``[G, O, K]``.
            codebook: ascending centres.
            scale: broadcastable to ``matrices``; positive.
        """
        columns, scales = (
            np.ascontiguousarray(each.swapaxes(1, 2))[self.columns]
            for each in (matrices, np.broadcast_to(scale, matrices.shape))
        )
        indices = np.empty(columns.shape, np.uint8)

        def rounded(column: FloatArray, k: int) -> FloatArray:
            chosen = nearest(column / scales[:, k], codebook)
            indices[self.columns[0][:, 0], self.order[:, k]] = chosen
            return codebook[chosen] * scales[:, k]

        self.fix(columns, rounded)
        return indices.swapaxes(1, 2)

    @property
    def columns(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """What indexes ``[G, K, O]`` to give the columns in the order in which they are fixed."""
        return np.arange(len(self.order))[:, None], self.order

    def fix(self, columns: NDArray[_Float], rounded: Callable[[NDArray[_Float], int], NDArray[_Float]]) -> None:
        """Fix columns one after another.

        Args:
            columns: what is to be rounded, ``[G, K, O]`` in the order in which they are fixed; used up. Of their dtype
                is all that is computed.
            rounded: gives the values that are to stand for the ``k``-th column ``[G, O]``.
        """
        upper = self.upper.astype(columns.dtype, copy=False)
        pivots = np.einsum("gkk->kg", upper)[:, :, None]
        for begin in range(0, columns.shape[1], _BLOCK):
            end = min(begin + _BLOCK, columns.shape[1])
            losses = np.empty((len(columns), end - begin, columns.shape[2]), columns.dtype)
            for k in range(begin, end):
                losses[:, k - begin] = loss = (columns[:, k] - rounded(columns[:, k], k)) / pivots[k]
                columns[:, k + 1 : end] -= upper[:, k, k + 1 : end, None] * loss[:, None]
            columns[:, end:] -= upper[:, begin:end, end:].swapaxes(1, 2) @ losses


def refit_values(
    codebook: FloatArray,
    indices: NDArray[np.uint8],
    scale: FloatArray,
    covariance: FloatArray,
    cross: FloatArray,
    importance: FloatArray,
) -> FloatArray:
    """The values of a codebook with which a layer gives its targets best, the indices being what they are.

    The output is linear in the few values, so this is least squares: the step of k-means that moves centres, with the
    inputs' covariance for a metric. Of layers that are very large, some of the outputs decide.

    Args:
        codebook: what the result is drawn to where the data says little.
        indices: ``[G, O, K]``.
        scale: ``[G, O, K]``.
        covariance: of the inputs, ``[G, K, K]``.
        cross: covariance of inputs and targets, ``[G, K, O]``.
        importance: of the outputs, ``[G, O]``.
    """
    count, (groups, outputs, inputs) = len(codebook), indices.shape
    normal, right = np.zeros((count, count)), np.zeros(count)
    stride = -(-groups * outputs * count * inputs**2 // _MOST_PRODUCTS)
    width = max(1, _PART_ELEMENTS // (count * inputs)) * stride
    for g in range(groups):
        for begin in range(0, outputs, width):
            part = slice(begin, begin + width, stride)
            chosen = (indices[g, part, None] == np.arange(count)[:, None]) * scale[g, part, None]  # [O, values, K]
            weighted = importance[g, part, None, None] * chosen
            seen = (weighted.reshape(-1, inputs) @ covariance[g]).reshape(chosen.shape)
            normal += np.tensordot(seen, chosen, _PAIRED)
            right += np.einsum("onk,ko->n", weighted, cross[g][:, part])
    ridge = (_PULL * normal.trace() / count + 1e-300) * np.eye(count)
    return np.asarray(np.linalg.solve(normal + ridge, right + ridge @ codebook), np.float64)


def _inverse_factor(metric: FloatArray, order: NDArray[np.intp], ridge: FloatArray) -> FloatArray:
    """Upper triangular ``U`` ``[G, K, K]`` with ``U^T U`` the inverse of ``metric``, reordered, plus ``ridge`` ``[G]``.

    A covariance is positive but for rounding: where that shows, the ridge grows until it is covered.
    """
    groups = np.arange(len(metric))[:, None, None]
    for _ in range(30):
        result = metric[groups, order[:, :, None], order[:, None, :]]
        np.einsum("gkk->gk", result)[...] += ridge[:, None]
        try:
            _invert_factor(result)
            return result
        except np.linalg.LinAlgError:
            if len(metric) > 1:
                parts = (slice(g, g + 1) for g in range(len(metric)))
                return np.concatenate([_inverse_factor(metric[g], order[g], ridge[g]) for g in parts])
            ridge = 10 * ridge
    return np.eye(metric.shape[1])[None]


def _invert_factor(matrices: FloatArray) -> None:
    """Turn positive definite ``M`` ``[G, K, K]`` into the upper triangular ``U`` with ``U^T U`` their inverse.

    In place, as such matrices are the largest that there are, and by halves: all but small blocks are matrix products.
    """
    size = matrices.shape[1]
    if size <= _SMALL:
        factor = np.linalg.cholesky(matrices[:, ::-1, ::-1])  # reversed twice, a lower factor is an upper one
        matrices[...] = np.triu(np.linalg.inv(factor)[:, ::-1, ::-1])
        return
    half = size // 2
    first, corner, last = matrices[:, :half, :half], matrices[:, :half, half:], matrices[:, half:, half:]
    _invert_factor(last)
    factor = corner @ last.swapaxes(1, 2)
    first -= factor @ factor.swapaxes(1, 2)
    _invert_factor(first)
    corner[...] = -(first @ factor @ last)
    matrices[:, half:, :half] = 0
