"""Low-rank approximation of one layer in the metric of its inputs, and ranks for many layers under one budget.

numpy only. The approximation error is measured where it matters, in the layer's output: with inputs of covariance
``C = L L^T``, ``E |(W - W') (x - mean)|^2`` is the squared Frobenius norm of ``(W - W') L``, so the best ``W'`` of rank
``r`` is the truncated SVD of ``W L`` times ``L^-1``, which is ``U_r U_r^T W``, and its error exactly the discarded
``sigma^2`` (data-aware SVD: DRONE, Chen et al. 2021; SVD-LLM, Wang et al. 2024; a budget shared by a Lagrange
multiplier: BALF, 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Spectrum", "choose_ranks", "spectrum"]

FloatArray = NDArray[np.float64]


@dataclass
class Spectrum:
    """What a layer's output is made of, strongest directions first.

    Attributes:
        values: ``sigma^2``, ``[min(O, K)]``, descending: the variance of the output along each direction.
        directions: orthonormal columns ``[O, min(O, K)]`` in the space of outputs.
    """

    values: FloatArray
    directions: FloatArray

    def error(self, rank: int) -> float:
        """Share of the output's variance that rank ``rank`` discards, 0 to 1."""
        total = float(self.values.sum())
        return float(self.values[rank:].sum()) / total if total > 0 else 0.0

    def factors(self, matrix: FloatArray, rank: int) -> tuple[FloatArray, FloatArray]:
        """``(first [r, K], second [O, r])`` whose product is the best approximation of ``matrix`` of this rank.

        The projection of the outputs on the leading directions; the scale of each is split evenly between the two.
        """
        leading = self.directions[:, :rank]
        first = leading.T @ matrix
        size = np.sqrt(np.sqrt(np.maximum(self.values[:rank], 1e-24)))
        return first / size[:, None], leading * size


def spectrum(matrix: FloatArray, covariance: FloatArray | None, damping: float = 1e-6) -> Spectrum:
    """The spectrum of ``matrix`` ``[O, K]`` for inputs of ``covariance`` ``[K, K]``; None: white inputs (plain SVD).

    ``damping`` (a share of the mean input energy, added to every direction) keeps what the data did not show.
    """
    outputs, inputs = matrix.shape
    metric = np.eye(inputs)
    if covariance is not None:
        mean = float(np.trace(covariance)) / inputs
        if np.isfinite(mean) and mean > 0:
            metric = covariance + damping * mean * metric
    if outputs <= 2 * inputs:
        # The left singular vectors of W L are the eigenvectors of W C W^T: no inverse or root of C is needed.
        values, directions = np.linalg.eigh(_symmetric(matrix @ metric @ matrix.T))
        values, directions = values[::-1], directions[:, ::-1]
    else:
        powers, basis = np.linalg.eigh(_symmetric(metric))
        root = basis * np.sqrt(np.maximum(powers, 0.0))
        seen = matrix @ root
        values, right = np.linalg.eigh(_symmetric(seen.T @ seen))
        values, right = values[::-1], right[:, ::-1]
        directions = seen @ right / np.sqrt(np.maximum(values, 1e-300))
        directions[:, values <= 1e-14 * max(float(values[0]), 0.0)] = 0.0
    count = min(outputs, inputs)
    return Spectrum(np.maximum(values[:count], 0.0), np.ascontiguousarray(directions[:, :count]))


def _symmetric(matrix: FloatArray) -> FloatArray:
    return (matrix + matrix.T) / 2


def choose_ranks(
    errors: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float, steps: int = 60
) -> list[int]:
    """One option for each layer with the least total error whose total cost is within ``budget``.

    Args:
        errors: of each option of each layer; the last option is the layer as it is, with error 0.
        costs: likewise.
        budget: the total to keep to; where even the cheapest options are above it, those are taken.
        steps: bisections of the Lagrange multiplier.

    Returns:
        The index of the option chosen for each layer. What the multiplier leaves of the budget is spent greedily.
    """
    error = [np.asarray(e, np.float64) for e in errors]
    cost = [np.asarray(c, np.float64) for c in costs]
    scale = sum(float(c.max()) for c in cost) or 1.0

    def best(price: float) -> list[int]:
        return [int(np.argmin(e + price * c / scale)) for e, c in zip(error, cost, strict=True)]

    def total(choice: list[int]) -> float:
        return sum(float(c[i]) for c, i in zip(cost, choice, strict=True))

    low, high = -30.0, 30.0
    choice = [int(np.argmin(c)) for c in cost]
    if total(choice) <= budget:
        for _ in range(steps):
            middle = (low + high) / 2
            trial = best(float(np.exp(middle)))
            if total(trial) <= budget:
                choice, high = trial, middle
            else:
                low = middle
        unpriced = best(0.0)
        if total(unpriced) <= budget:
            choice = unpriced
    spent = total(choice)
    while True:
        gains = [
            ((error[k][i] - error[k][j]) / max(cost[k][j] - cost[k][i], 1e-30), k, j)
            for k, i in enumerate(choice)
            for j in range(len(cost[k]))
            if cost[k][j] > cost[k][i] and error[k][j] < error[k][i] and spent + cost[k][j] - cost[k][i] <= budget
        ]
        if not gains:
            return choice
        _, k, j = max(gains)
        spent += float(cost[k][j] - cost[k][choice[k]])
        choice[k] = j
