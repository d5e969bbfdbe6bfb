"""Least squares that spends nothing on what the activation behind a layer cuts off.

Behind a ReLU any negative output is as good as any other: where the target is negative, only a positive output is an
error. Each round moves such targets to where the output is now, as far as it is cut off as well, and solves again; both
steps lower the error of what is seen, and the Gram matrix stays (Zhang et al. 2016, arXiv 1505.06798, solve the same
problem with an auxiliary variable). Rows of the layer's input are kept for it, in bounded memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim.graph.walk import constant_value, is_graph_output
from onnxslim.model import Model

__all__ = ["Kept", "seen_range"]

FloatArray = NDArray[np.float64]
Array = NDArray[np.float32]

ROUNDS = 5  # the error of what is seen hardly falls after these
_BYTES = 64 << 20  # of rows kept for one layer
_CLIPS = {"Relu": (0.0, np.inf), "Clip": (-np.inf, np.inf)}


def seen_range(model: Model, tensor: gs.Tensor) -> tuple[float, float] | None:
    """Between which values a tensor matters to all that read it; None where every value does."""
    if is_graph_output(model.graph, tensor) or not tensor.outputs:
        return None
    ranges = [_range(node) for node in tensor.outputs]
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    return (low, high) if low > -np.inf or high < np.inf else None


def _range(node: gs.Node) -> tuple[float, float]:
    if node.op not in _CLIPS or node.domain not in (None, "", "ai.onnx"):
        return -np.inf, np.inf
    low, high = _CLIPS[node.op]
    if node.op == "Clip":
        limits = [node.attrs.get("min"), node.attrs.get("max")]
        for slot, tensor in enumerate(node.inputs[1:3]):
            value = None if tensor.is_empty() else constant_value(tensor)
            limits[slot] = None if value is None else float(value)
        low, high = (limits[0] if limits[0] is not None else low, limits[1] if limits[1] is not None else high)
    return low, high


@dataclass
class Kept:
    """Some rows of what enters a layer, and of what it is to give.

    Attributes:
        low, high: between which values the output matters, once all that is added to it is added.
        added: constant that is added to the output, ``[O]``.
        stride: one of so many rows is kept.
        inputs, targets, beside: ``[G, R, K]``, ``[G, R, O]`` and, what else is added, likewise or of one element; by
            batch.
    """

    low: float
    high: float
    added: FloatArray
    stride: int = 1
    inputs: list[Array] = field(default_factory=list)
    targets: list[Array] = field(default_factory=list)
    beside: list[Array] = field(default_factory=list)

    def add(self, inputs: np.ndarray, targets: np.ndarray, beside: np.ndarray | None) -> None:
        """Keep rows of one batch; every other of all rows goes where they take too much memory."""
        finite = np.isfinite(inputs).all(axis=(0, 2)) & np.isfinite(targets).all(axis=(0, 2))
        rows = np.flatnonzero(finite)[:: self.stride]
        self.inputs.append(inputs[:, rows].astype(np.float32))
        self.targets.append(targets[:, rows].astype(np.float32))
        self.beside.append(np.zeros((1, 1, 1), np.float32) if beside is None else beside[:, rows].astype(np.float32))
        while sum(part.nbytes for part in (*self.inputs, *self.targets, *self.beside)) > _BYTES:
            self.stride *= 2
            for parts in (self.inputs, self.targets, self.beside):
                parts[:] = [np.ascontiguousarray(part[:, ::2]) for part in parts]

    def solve(
        self, left: FloatArray, right: FloatArray, means: tuple[FloatArray, FloatArray] | None
    ) -> tuple[FloatArray, FloatArray]:
        """The weights ``[G, O, K]`` and the bias ``[G, O]`` with a small error of what is seen of the output.

        Args:
            left, right: ``[G, K, K]`` and ``[G, K, O]``: the normal equations for the targets as they are.
            means: of all inputs and targets, ``[G, K]`` and ``[G, O]``; None where there is no bias.
        """
        inverse = np.linalg.inv(left)
        groups, _, outputs = right.shape
        mean_x = np.zeros(left.shape[:2]) if means is None else means[0]
        shift = mean_y = np.zeros((groups, outputs)) if means is None else means[1]
        x = [part - mean_x[:, None].astype(np.float32) for part in self.inputs]
        total = max(sum(part.shape[1] for part in x), 1)
        added = self.added.reshape(groups, 1, outputs).astype(np.float32)
        weights = inverse @ right  # [G, K, O]
        best, least = (weights, shift), np.inf
        for round_ in range(ROUNDS + 1):
            gram, mean, noise = np.zeros_like(right), np.zeros_like(mean_y), 0.0
            narrow, offset = weights.astype(np.float32), shift[:, None].astype(np.float32)
            for inputs, targets, beside in zip(x, self.targets, self.beside, strict=True):
                rest = added + beside
                now, wanted = inputs @ narrow + offset + rest, targets + rest
                noise += float(np.square(self._seen(now) - self._seen(wanted)).sum(dtype=np.float64))
                moved = np.where(wanted <= self.low, np.minimum(now, self.low) - wanted, 0.0)
                moved += np.where(wanted >= self.high, np.maximum(now, self.high) - wanted, 0.0)
                gram += inputs.transpose(0, 2, 1) @ moved
                mean += moved.sum(axis=1)
            # Where fewer rows are kept than there are inputs, these tell too little of all others: it may diverge.
            if not noise < least:
                break
            best, least = (weights, shift), noise
            if round_ == ROUNDS:
                break
            mean /= total
            if means is not None:
                inner = sum(part.sum(axis=1, dtype=np.float64) for part in x) / total
                gram -= total * inner[:, :, None] * mean[:, None]
                shift = mean_y + mean
            weights = inverse @ (right + gram / total)
        weights, shift = best
        matrices = weights.transpose(0, 2, 1)
        return matrices, shift - np.einsum("gok,gk->go", matrices, mean_x)

    def _seen(self, output: np.ndarray) -> np.ndarray:
        return np.asarray(np.clip(output, self.low, self.high))

    def error(self, matrices: FloatArray, bias: FloatArray) -> float:
        """Mean squared error of what is seen of the output, over its variance; arguments as `solve` returns them."""
        added = self.added.reshape(len(bias), 1, -1)
        noise, seen = 0.0, []
        for inputs, targets, beside in zip(self.inputs, self.targets, self.beside, strict=True):
            now = inputs @ matrices.transpose(0, 2, 1) + bias[:, None]
            wanted, given = (self._seen(value + added + beside) for value in (targets, now))
            noise += float(np.square(given - wanted).sum())
            seen.append(wanted)
        rows = np.concatenate(seen, axis=1)
        return noise / max(float(np.square(rows - rows.mean(axis=1, keepdims=True)).sum()), 1e-30)
