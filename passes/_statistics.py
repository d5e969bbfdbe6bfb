"""What calibration data says about the input of a layer: streamed means and second moments in float64.

A convolution, Gemm or MatMul with constant weights is a linear map of *rows*: ``y = W x + b`` where ``x`` is a patch
of the input (im2col, padding inside, strides and dilations respected) or the last axis of a matrix. Everything that is
fitted in closed form (least-squares recovery, whitened SVD, bias correction, activation-weighted norms) needs only the
mean of those rows and their second moment, so memory is ``K * K`` a layer and never grows with the data:

    layer = linear_layer(node)                               # None when the node is no such layer
    moments = input_moments(model, [node], feeds)[id(node)]  # one forward pass for any number of nodes
    moments.mean, moments.covariance, moments.count          # [G, K], [G, K, K], rows

Shapes: ``G`` groups (1 unless a grouped or depthwise convolution), ``O`` outputs a group, ``K`` inputs a group:
``channels / G * kernel``, in the order of the weight's own axes (channel, then kernel positions).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from onnxslim.graph.walk import constant_value

if TYPE_CHECKING:
    from onnxslim.model import Model

__all__ = ["LinearLayer", "Moments", "input_moments", "linear_layer"]

Array = NDArray[Any]
FloatArray = NDArray[np.float64]

ROWS_PER_SAMPLE = 40  # positions of a feature map that are drawn from each sample: more add cost, hardly information


@dataclass(frozen=True)
class Rows:
    """Which rows of a layer were drawn from one batch: sample indices and flat spatial positions, both ``[R]``."""

    sample: NDArray[np.intp]
    position: NDArray[np.intp]


@dataclass(eq=False)
class LinearLayer:
    """A Conv, Gemm or MatMul node with a constant weight, seen as ``y[g] = matrices[g] @ x[g] + bias[g]`` on rows.

    Attributes:
        node: the node itself.
        weight: its stored weight: Conv ``[G * O, K...]``, Gemm and MatMul ``[K, O]`` (or ``[O, K]`` with transB).
        groups: number of independent blocks.
    """

    node: gs.Node
    weight: gs.Constant
    groups: int = 1
    pads: tuple[int, ...] | str = field(default=())
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()

    @property
    def spatial(self) -> bool:
        """Whether this is a convolution, with rows drawn from the positions of a feature map."""
        return bool(self.node.op == "Conv")

    @property
    def data(self) -> gs.Tensor:
        """The input tensor: ``[N, C, ...]`` for a convolution, ``[..., K]`` otherwise."""
        return self.node.inputs[0]

    @property
    def output(self) -> gs.Tensor:
        """The output tensor: ``[N, G * O, ...]`` for a convolution, ``[..., O]`` otherwise."""
        return self.node.outputs[0]

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """``(G, O, K)``."""
        dims = [int(d) for d in self.weight.shape]
        if self.spatial:
            return self.groups, dims[0] // self.groups, math.prod(dims[1:])
        outputs, inputs = dims if self._transposed else reversed(dims)
        return 1, outputs, inputs

    @property
    def _transposed(self) -> bool:
        return self.node.op == "Gemm" and bool(self.node.attrs.get("transB", 0))

    @property
    def _alpha(self) -> float:
        return float(self.node.attrs.get("alpha", 1.0)) if self.node.op == "Gemm" else 1.0

    def matrices(self) -> FloatArray:
        """The weight as float64 ``[G, O, K]`` (a Gemm's alpha multiplied in)."""
        values = np.asarray(self.weight.values, dtype=np.float64)
        if self.spatial:
            return values.reshape(self.shape)
        return (values if self._transposed else values.T)[None] * self._alpha

    def stored(self, matrices: Array) -> Array:
        """``matrices`` ``[G, O, K]`` in the layout and dtype of the node's weight: the inverse of `matrices`."""
        dtype = self.weight.dtype
        if self.spatial:
            return matrices.reshape([int(d) for d in self.weight.shape]).astype(dtype)
        plain = matrices[0] / self._alpha
        return np.ascontiguousarray(plain if self._transposed else plain.T).astype(dtype)

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the output for an input of this shape."""
        groups, outputs, _ = self.shape
        if not self.spatial:
            return (*shape[:-1], outputs)
        begins, ends = self._padding(shape[2:])
        kernel = [int(d) for d in self.weight.shape[2:]]
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, self.dilations, strict=True)]
        axes = zip(shape[2:], begins, ends, reach, self.strides, strict=True)
        return (shape[0], groups * outputs, *(max(0, (n + a + b - r) // s + 1) for n, a, b, r, s in axes))

    def draw(self, output_shape: Sequence[int], rng: np.random.Generator, per_sample: int = ROWS_PER_SAMPLE) -> Rows:
        """Choose rows of one batch by the shape of the layer's output: ``per_sample`` positions of every sample.

        A matrix input ``[B, T, K]`` counts as ``B`` samples of ``T`` positions, ``[B, K]`` as one position each.
        """
        if self.spatial:
            samples, positions = int(output_shape[0]), math.prod(output_shape[2:])
        else:
            samples = int(output_shape[0]) if len(output_shape) > 1 else 1
            positions = math.prod(output_shape[1:-1])
        if positions <= per_sample:
            picks = np.broadcast_to(np.arange(positions), (samples, positions))
        else:
            picks = rng.random((samples, positions)).argpartition(per_sample, axis=1)[:, :per_sample]
        return Rows(np.repeat(np.arange(samples), picks.shape[1]), np.ascontiguousarray(picks).reshape(-1))

    def input_rows(self, x: Array, rows: Rows) -> Array:
        """The drawn rows of an input batch, ``[G, R, K]`` in the dtype of ``x``."""
        if not self.spatial:
            samples = x.shape[0] if x.ndim > 1 else 1
            return x.reshape(samples, -1, x.shape[-1])[rows.sample, rows.position][None]
        kernel = [int(d) for d in self.weight.shape[2:]]
        begins, ends = self._padding(x.shape[2:])
        padded = np.pad(x, [(0, 0), (0, 0), *zip(begins, ends, strict=True)])
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, self.dilations, strict=True)]
        windows = sliding_window_view(padded, reach, axis=tuple(range(2, x.ndim)))  # [N, C, *out, *reach], a view
        steps = tuple(slice(None, None, s) for s in self.strides)
        taps = tuple(slice(None, None, d) for d in self.dilations)
        windows = windows[(slice(None), slice(None), *steps, *taps)]
        where = np.unravel_index(rows.position, windows.shape[2 : x.ndim])
        index: tuple[Any, ...] = (rows.sample, slice(None), *where)
        patches = windows[index]  # [R, C, *kernel]
        rows_of: Array = patches.reshape(len(patches), self.groups, -1)
        return rows_of.transpose(1, 0, 2)

    def output_rows(self, y: Array, rows: Rows, channels: NDArray[np.integer] | None = None) -> Array:
        """The same rows of an output batch, ``[G, R, O]`` in the dtype of ``y``.

        ``channels`` picks from a wider tensor the ``G * O`` channels that the layer makes (a teacher that was not cut).
        """
        if self.spatial:
            picked = y.reshape(y.shape[0], y.shape[1], -1)[rows.sample, :, rows.position]
        else:
            samples = y.shape[0] if y.ndim > 1 else 1
            picked = y.reshape(samples, -1, y.shape[-1])[rows.sample, rows.position]
        if channels is not None:
            picked = picked[:, channels]
        return picked.reshape(len(picked), self.groups, -1).transpose(1, 0, 2)

    def _padding(self, size: Sequence[int]) -> tuple[list[int], list[int]]:
        """Zeros before and after every spatial axis of an input of this size."""
        rank = len(size)
        if not isinstance(self.pads, str):
            return list(self.pads[:rank]), list(self.pads[rank:])
        begins, ends = [], []
        kernel = [int(d) for d in self.weight.shape[2:]]
        for n, k, s, d in zip(size, kernel, self.strides, self.dilations, strict=True):
            total = max(0, (-(-n // s) - 1) * s + (k - 1) * d + 1 - n)
            small, large = total // 2, total - total // 2
            begins.append(small if self.pads == "SAME_UPPER" else large)
            ends.append(large if self.pads == "SAME_UPPER" else small)
        return begins, ends


def linear_layer(node: gs.Node) -> LinearLayer | None:
    """``node`` as a `LinearLayer`, or None: another op, a weight that is no initializer, or a layout without rows.

    A MatMul counts when its second input is a constant matrix, a Gemm when its first input is not transposed. Weights
    in Constant nodes must have been hoisted (``onnxslim.graph.walk.hoist_constants``).
    """
    if node.op not in ("Conv", "Gemm", "MatMul") or node.domain not in (None, "", "ai.onnx") or len(node.inputs) < 2:
        return None
    weight = node.inputs[1]
    if not isinstance(weight, gs.Constant) or not np.issubdtype(np.dtype(weight.dtype), np.floating):
        return None
    if isinstance(node.inputs[0], gs.Constant) or constant_value(node.inputs[0]) is not None:
        return None
    rank = len(weight.shape)
    if node.op == "Conv":
        spatial = rank - 2
        auto = node.attrs.get("auto_pad", "NOTSET")
        auto = auto.decode() if isinstance(auto, bytes) else str(auto)
        pads = auto if auto.startswith("SAME") else tuple(node.attrs.get("pads", [0] * 2 * spatial))
        if auto == "VALID":
            pads = (0,) * (2 * spatial)
        strides = tuple(node.attrs.get("strides", [1] * spatial))
        dilations = tuple(node.attrs.get("dilations", [1] * spatial))
        return LinearLayer(node, weight, int(node.attrs.get("group", 1)), pads, strides, dilations)
    if rank != 2 or (node.op == "Gemm" and node.attrs.get("transA", 0)):
        return None
    return LinearLayer(node, weight)


@dataclass(eq=False)
class Moments:
    """Streamed first and second moments of rows ``x`` ``[G, R, K]``, and with a target ``y`` ``[G, R, O]`` across both.

    All sums are float64; products within one batch are taken in the dtype of the rows, about the batch's mean.

    Attributes:
        count: rows seen.
        sum_x, gram: sum of ``x`` ``[G, K]`` and of ``x x^T`` ``[G, K, K]``, both raw (not centred).
        sum_y, cross, sum_yy: sum of ``y`` ``[G, O]``, of ``x y^T`` ``[G, K, O]`` and of ``y * y`` ``[G, O]``; None
            without a target.
    """

    count: int
    sum_x: FloatArray
    gram: FloatArray
    sum_y: FloatArray | None = None
    cross: FloatArray | None = None
    sum_yy: FloatArray | None = None
    _waiting: list[tuple[Array, Array | None]] = field(default_factory=list, repr=False)

    @classmethod
    def empty(cls, groups: int, inputs: int, outputs: int = 0) -> Moments:
        """No rows yet; ``outputs`` above zero also makes room for a target."""
        moments = cls(0, np.zeros((groups, inputs)), np.zeros((groups, inputs, inputs)))
        if outputs:
            moments.sum_y, moments.sum_yy = np.zeros((groups, outputs)), np.zeros((groups, outputs))
            moments.cross = np.zeros((groups, inputs, outputs))
        return moments

    def gather(self, x: Array, y: Array | None = None) -> None:
        """Add rows as `add` does, once there are many: for wide layers that is faster. End with `settle`."""
        self._waiting.append((x, y))
        if 2 * sum(rows.shape[1] for rows, _ in self._waiting) >= x.shape[2]:
            self.settle()

    def settle(self) -> None:
        """Add the rows that were gathered."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            x, y = ([rows for rows in part if rows is not None] for part in zip(*waiting, strict=True))
            self.add(np.concatenate(x, axis=1), np.concatenate(y, axis=1) if y else None)

    def add(self, x: Array, y: Array | None = None) -> None:
        """Add rows ``x`` ``[G, R, K]`` (and their targets ``[G, R, O]``). Rows that are not finite are left out."""
        if np.issubdtype(x.dtype, np.floating) and x.dtype.itemsize < 4:
            x = x.astype(np.float32)
        sound = np.isfinite(x).all(axis=(0, 2))
        if y is not None:
            sound &= np.isfinite(y).all(axis=(0, 2))
        if not sound.all():
            x, y = x[:, sound], None if y is None else y[:, sound]
        if not x.shape[1]:
            return
        self.count += x.shape[1]
        x, x_centre, x_rest = _centred(x)
        total = x_rest + x.shape[1] * x_centre
        across = x.transpose(0, 2, 1)
        self.sum_x += total
        self.gram += across @ x + x_rest[:, :, None] * x_centre[:, None, :] + x_centre[:, :, None] * total[:, None, :]
        if y is not None and self.sum_y is not None and self.cross is not None and self.sum_yy is not None:
            y, y_centre, y_rest = _centred(y.astype(x.dtype, copy=False))
            y_total = y_rest + y.shape[1] * y_centre
            self.sum_y += y_total
            self.sum_yy += np.square(y, dtype=np.float64).sum(axis=1) + y_centre * (y_rest + y_total)
            self.cross += (
                across @ y + x_rest[:, :, None] * y_centre[:, None, :] + x_centre[:, :, None] * y_total[:, None, :]
            )

    def merged(self, other: Moments) -> Moments:
        """The moments of the rows of both."""
        added = Moments(self.count + other.count, self.sum_x + other.sum_x, self.gram + other.gram)
        if self.sum_y is not None and self.cross is not None and self.sum_yy is not None:
            assert other.sum_y is not None and other.cross is not None and other.sum_yy is not None
            added.sum_y, added.sum_yy = self.sum_y + other.sum_y, self.sum_yy + other.sum_yy
            added.cross = self.cross + other.cross
        return added

    @property
    def mean(self) -> FloatArray:
        """Mean row, ``[G, K]``."""
        return self.sum_x / max(self.count, 1)

    @property
    def mean_y(self) -> FloatArray:
        """Mean target, ``[G, O]``."""
        assert self.sum_y is not None, "moments were taken without a target"
        return self.sum_y / max(self.count, 1)

    @property
    def second(self) -> FloatArray:
        """Mean of ``x x^T``, not centred, ``[G, K, K]``."""
        return self.gram / max(self.count, 1)

    @property
    def covariance(self) -> FloatArray:
        """Covariance of the rows, ``[G, K, K]``."""
        mean = self.mean
        return self.second - mean[:, :, None] * mean[:, None, :]

    @property
    def cross_covariance(self) -> FloatArray:
        """Covariance between rows and targets, ``[G, K, O]``."""
        assert self.cross is not None, "moments were taken without a target"
        return self.cross / max(self.count, 1) - self.mean[:, :, None] * self.mean_y[:, None, :]


def _centred(rows: Array) -> tuple[Array, FloatArray, FloatArray]:
    """Rows ``[G, R, K]`` less about their mean, that mean ``[G, K]``, and the sum of what is left, ``[G, K]``.

    A product in float32 is good to seven digits of the rows' squares. Where the mean is large beside the spread, that
    would be all of the covariance, and leave it with negative eigenvalues.
    """
    centre = rows.mean(axis=1, dtype=np.float64).astype(rows.dtype)
    rest = rows - centre[:, None, :]
    return rest, centre.astype(np.float64), rest.sum(axis=1, dtype=np.float64)


def input_moments(
    model: Model,
    nodes: Iterable[gs.Node],
    feeds: Iterable[dict[str, Array]],
    *,
    per_sample: int = ROWS_PER_SAMPLE,
    seed: int = 0,
) -> dict[int, Moments]:
    """Moments of the inputs of ``nodes`` (of the main graph) over ``feeds``, by ``id(node)``; one forward pass in all.

    Args:
        model: the model that is run; ``nodes`` are its own.
        nodes: any nodes; those that `linear_layer` does not take are left out of the answer.
        feeds: batches, streamed once.
        per_sample: rows drawn at random from each sample of a feature map or sequence (all when it has fewer).
        seed: of the draw.

    Raises:
        SlimError: when the model does not run on the feeds.
    """
    from onnxslim.runtime import Session

    layers = {id(node): layer for node in nodes if (layer := linear_layer(node)) is not None}
    if not layers:
        return {}
    moments: dict[int, Moments] = {}
    for key, layer in layers.items():
        groups, _, inputs = layer.shape
        moments[key] = Moments.empty(groups, inputs)
    session = Session(model, outputs=sorted({layer.data.name for layer in layers.values()}))
    rng = np.random.default_rng(seed)
    for feed in feeds:
        seen = session.run(feed)
        for key, layer in layers.items():
            data = seen[layer.data.name]
            rows = layer.draw(layer.output_shape(data.shape), rng, per_sample)
            moments[key].gather(layer.input_rows(data, rows))
    for found in moments.values():
        found.settle()
    return moments
