"""What calibration data says about the input of a layer: streamed means and second moments in float64.

A convolution, Gemm or MatMul with constant weights is a linear map of *rows*: ``y = W x + b`` where ``x`` is a patch
of the input (im2col, padding inside, strides and dilations respected; of a transposed convolution, zeros between the
inputs) or the last axis of a matrix. Everything that is fitted in closed form (least-squares recovery, whitened SVD,
bias correction, activation-weighted norms) needs only the mean of those rows and their second moment, so memory is
``K * K`` a layer and never grows with the data:

    layer = linear_layer(node)                        # None when the node is no such layer
    trunk = Trunk(model, feeds)                       # goes on where it stopped, for the next nodes
    moments = input_moments(trunk, [node])[id(node)]  # one forward pass for any number of nodes
    moments.mean, moments.covariance, moments.count   # [G, K], [G, K, K], rows

Shapes: ``G`` groups (1 unless a grouped or depthwise convolution), ``O`` outputs a group, ``K`` inputs a group:
``channels / G * kernel``, channel by channel, each with its kernel positions in the order of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim.graph.walk import constant_value

if TYPE_CHECKING:
    from onnxslim.passes._trunk import Trunk

__all__ = ["LinearLayer", "Moments", "input_moments", "linear_layer"]

Array = NDArray[Any]
FloatArray = NDArray[np.float64]

ROWS_PER_SAMPLE = 40  # positions of a feature map that are drawn from each sample: more add cost, hardly information
_ROUNDING = 1e-12  # variance over power: float32 numbers that differ by a few units in the last place
_ROWS_PER_INPUT, _MOST_ROWS = 10, 1024  # but where samples are few: so many rows for each input, so many of a sample


@dataclass(frozen=True)
class Rows:
    """Which rows of a layer were drawn from one batch: sample indices and flat spatial positions, both ``[R]``."""

    sample: NDArray[np.intp]
    position: NDArray[np.intp]


@dataclass(eq=False)
class LinearLayer:
    """A (transposed) convolution, Gemm or MatMul with a constant weight: on rows, ``y = matrices[g] @ x + bias[g]``.

    Attributes:
        node: the node itself.
        weight: its stored weight: Conv ``[G * O, K...]``, ConvTranspose ``[C, O, kernel]``, Gemm and MatMul ``[K, O]``
            (or ``[O, K]`` with transB).
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
        return bool(self.node.op in ("Conv", "ConvTranspose"))

    @property
    def upsampling(self) -> bool:
        """Whether this is a transposed convolution: a tap reaches one output position in ``prod(strides)``."""
        return bool(self.node.op == "ConvTranspose")

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
        if self.upsampling:
            return self.groups, dims[1], dims[0] // self.groups * math.prod(dims[2:])
        if self.spatial:
            return self.groups, dims[0] // self.groups, math.prod(dims[1:])
        outputs, inputs = dims if self._transposed else reversed(dims)
        return 1, outputs, inputs

    @property
    def _kernel(self) -> list[int]:
        return [int(d) for d in self.weight.shape[2:]]

    @property
    def _transposed(self) -> bool:
        return self.node.op == "Gemm" and bool(self.node.attrs.get("transB", 0))

    @property
    def _alpha(self) -> float:
        return float(self.node.attrs.get("alpha", 1.0)) if self.node.op == "Gemm" else 1.0

    def rows_of(self, stored: Array) -> Array:
        """A tensor in the layout of the stored weight as ``[G, O, K]``."""
        groups, outputs, inputs = self.shape
        if self.upsampling:
            return stored.reshape(groups, -1, outputs, math.prod(self._kernel)).swapaxes(1, 2).reshape(self.shape)
        if self.spatial:
            return stored.reshape(self.shape)
        return (stored if self._transposed else stored.T).reshape(1, outputs, inputs)

    def stored_as(self, rows: Array) -> Array:
        """``rows`` ``[G, O, K]`` in the layout of the stored weight: the inverse of `rows_of`."""
        groups, outputs, _ = self.shape
        if self.upsampling:
            rows = rows.reshape(groups, outputs, -1, math.prod(self._kernel)).swapaxes(1, 2)
        elif not self.spatial:
            rows = rows[0] if self._transposed else rows[0].T
        return np.ascontiguousarray(rows).reshape([int(d) for d in self.weight.shape])

    def matrices(self, stored: Array | None = None) -> FloatArray:
        """The weight, or one ``stored`` in its place, as float64 ``[G, O, K]`` (a Gemm's alpha multiplied in)."""
        values = np.asarray(self.weight.values if stored is None else stored, np.float64)
        return np.asarray(self.rows_of(values) * self._alpha)

    def stored(self, matrices: Array) -> Array:
        """``matrices`` ``[G, O, K]`` in the layout and dtype of the node's weight: the inverse of `matrices`."""
        return self.stored_as(matrices / self._alpha).astype(self.weight.dtype)

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the output for an input of this shape."""
        groups, outputs, _ = self.shape
        if not self.spatial:
            return (*shape[:-1], outputs)
        begins, ends = self._padding(shape[2:])
        reach = [(k - 1) * d + 1 for k, d in zip(self._kernel, self.dilations, strict=True)]
        axes = zip(shape[2:], begins, ends, reach, self.strides, strict=True)
        if self.upsampling:
            more = self.node.attrs.get("output_padding", [0] * len(reach))
            sizes = [(n - 1) * s + r - a - b + m for (n, a, b, r, s), m in zip(axes, more, strict=True)]
        else:
            sizes = [(n + a + b - r) // s + 1 for n, a, b, r, s in axes]
        return (shape[0], groups * outputs, *(max(0, size) for size in sizes))

    def rows_each(self, samples: int, at_least: int = ROWS_PER_SAMPLE) -> int:
        """How many rows to draw from each of so many samples: more where these are few for the width of the layer."""
        return max(at_least, min(math.ceil(_ROWS_PER_INPUT * self.shape[2] / max(samples, 1)), _MOST_ROWS))

    def draw(self, output_shape: Sequence[int], rng: np.random.Generator, per_sample: int = ROWS_PER_SAMPLE) -> Rows:
        """Choose rows of one batch by the shape of the layer's output: ``per_sample`` positions of every sample.

        A matrix input ``[B, T, K]`` counts as ``B`` samples of ``T`` positions, ``[B, K]`` as one position each. Of a
        transposed convolution more are drawn, so that each of its taps is seen as often as another layer's.
        """
        if self.spatial:
            samples, positions = int(output_shape[0]), math.prod(output_shape[2:])
        else:
            samples = int(output_shape[0]) if len(output_shape) > 1 else 1
            positions = math.prod(output_shape[1:-1])
        if self.upsampling:
            per_sample *= math.prod(self.strides)
        if positions <= per_sample:
            picks = np.broadcast_to(np.arange(positions), (samples, positions))
        else:
            picks = rng.random((samples, positions)).argpartition(per_sample, axis=1)[:, :per_sample]
        return Rows(np.repeat(np.arange(samples), picks.shape[1]), np.ascontiguousarray(picks).reshape(-1))

    def input_rows(self, x: Array, rows: Rows) -> Array:
        """The drawn rows of an input batch, ``[G, R, K]`` in the dtype of ``x``."""
        if not self.spatial:
            return _by_sample(x)[rows.sample, rows.position][None]
        source, inside = self._sources(x.shape, rows.position)
        if inside.any():
            flat = x.reshape(*x.shape[:2], math.prod(x.shape[2:]))
            patches = flat[rows.sample[:, None], :, source]  # [R, taps, C]
            patches[~inside] = 0
        else:  # nothing but padding: there may be no element to read
            patches = np.zeros((*source.shape, x.shape[1]), x.dtype)
        return patches.swapaxes(1, 2).reshape(len(patches), self.groups, self.shape[2]).swapaxes(0, 1)

    def _sources(self, shape: Sequence[int], positions: NDArray[np.intp]) -> tuple[Array, Array]:
        """Which flat input position each tap reads for these output positions, and whether there is one: ``[R, taps]``.

        A transposed convolution writes input ``i`` by tap ``t`` to ``i * stride - pad + t * dilation``; read backwards,
        its tap has an input where that can be solved for ``i``.
        """
        begins, _ = self._padding(shape[2:])
        source, inside = np.zeros((len(positions), 1), np.intp), np.ones((len(positions), 1), bool)
        axes = zip(
            np.unravel_index(positions, self.output_shape(shape)[2:]),
            shape[2:], begins, self._kernel, self.strides, self.dilations, strict=True,
        )  # fmt: skip
        for place, size, begin, kernel, stride, dilation in axes:
            taps = np.arange(kernel) * dilation
            if self.upsampling:
                at, rest = np.divmod(place[:, None] + begin - taps, stride)
            else:
                at, rest = place[:, None] * stride - begin + taps, np.zeros(1, np.intp)
            there = (rest == 0) & (at >= 0) & (at < size)
            taken = len(positions), source.shape[1] * kernel
            source = (source[:, :, None] * size + np.where(there, at, 0)[:, None, :]).reshape(taken)
            inside = (inside[:, :, None] & there[:, None, :]).reshape(taken)
        return source, inside

    def output_rows(self, y: Array, rows: Rows, channels: NDArray[np.integer] | None = None) -> Array:
        """The same rows of an output batch, ``[G, R, O]`` in the dtype of ``y``.

        ``channels`` picks from a wider tensor the ``G * O`` channels that the layer makes (a teacher that was not cut).
        """
        if self.spatial:
            picked = y.reshape(*y.shape[:2], math.prod(y.shape[2:]))[rows.sample, :, rows.position]
        else:
            picked = _by_sample(y)[rows.sample, rows.position]
        if channels is not None:
            picked = picked[:, channels]
        return picked.reshape(len(picked), self.groups, picked.shape[1] // self.groups).transpose(1, 0, 2)

    def _padding(self, size: Sequence[int]) -> tuple[list[int], list[int]]:
        """Zeros before and after every spatial axis of an input of this size."""
        rank = len(size)
        if not isinstance(self.pads, str):
            return list(self.pads[:rank]), list(self.pads[rank:])
        begins, ends = [], []
        for n, k, s, d in zip(size, self._kernel, self.strides, self.dilations, strict=True):
            total = max(0, (-(-n // s) - 1) * s + (k - 1) * d + 1 - n)
            small, large = total // 2, total - total // 2
            begins.append(small if self.pads == "SAME_UPPER" else large)
            ends.append(large if self.pads == "SAME_UPPER" else small)
        return begins, ends


def _by_sample(values: Array) -> Array:
    """``[..., K]`` as ``[B, T, K]``, of which any may be 0."""
    samples = values.shape[0] if values.ndim > 1 else 1
    return values.reshape(samples, math.prod(values.shape[1:-1]), values.shape[-1])


def linear_layer(node: gs.Node) -> LinearLayer | None:
    """``node`` as a `LinearLayer`, or None: another op, a weight that is no initializer, or a layout without rows.

    A MatMul counts when its second input is a constant matrix, a Gemm when its first input is not transposed, a
    ConvTranspose when its padding does not depend on sizes. Weights in Constant nodes must have been hoisted
    (``onnxslim.graph.walk.hoist_constants``).
    """
    if node.op not in ("Conv", "ConvTranspose", "Gemm", "MatMul") or node.domain not in (None, "", "ai.onnx"):
        return None
    if len(node.inputs) < 2:
        return None
    weight = node.inputs[1]
    if not isinstance(weight, gs.Constant) or not np.issubdtype(np.dtype(weight.dtype), np.floating):
        return None
    if isinstance(node.inputs[0], gs.Constant) or constant_value(node.inputs[0]) is not None:
        return None
    rank = len(weight.shape)
    if node.op in ("Conv", "ConvTranspose"):
        spatial = rank - 2
        auto = node.attrs.get("auto_pad", "NOTSET")
        auto = auto.decode() if isinstance(auto, bytes) else str(auto)
        pads = auto if auto.startswith("SAME") else tuple(node.attrs.get("pads", [0] * 2 * spatial))
        if node.op == "ConvTranspose" and (isinstance(pads, str) or "output_shape" in node.attrs):
            return None
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
        self.gram += across @ x
        self.gram += np.stack([x_rest, x_centre], axis=2) @ np.stack([x_centre, total], axis=1)
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
        """Covariance of the rows, ``[G, K, K]``; 0 for inputs that vary by no more than float32 rounds them."""
        constant, found = self._constant, self.second
        found -= self.mean[:, :, None] * self.mean[:, None, :]
        found[constant] = 0.0
        found.transpose(0, 2, 1)[constant] = 0.0
        return found

    @property
    def cross_covariance(self) -> FloatArray:
        """Covariance between rows and targets, ``[G, K, O]``."""
        assert self.cross is not None, "moments were taken without a target"
        found = self.cross / max(self.count, 1) - self.mean[:, :, None] * self.mean_y[:, None, :]
        found[self._constant] = 0.0
        return found

    @property
    def _constant(self) -> NDArray[np.bool_]:
        """Which inputs do not vary, ``[G, K]``."""
        power = np.einsum("gkk->gk", self.gram) / max(self.count, 1)
        return np.asarray(power - np.square(self.mean) <= _ROUNDING * power)


def _centred(rows: Array) -> tuple[Array, FloatArray, FloatArray]:
    """Rows ``[G, R, K]`` less about their mean, that mean ``[G, K]``, and the sum of what is left, ``[G, K]``.

    A product in float32 is good to seven digits of the rows' squares. Where the mean is large beside the spread, that
    would be all of the covariance, and leave it with negative eigenvalues.
    """
    centre = rows.mean(axis=1, dtype=np.float64).astype(rows.dtype)
    rest = rows - centre[:, None, :]
    return rest, centre.astype(np.float64), rest.sum(axis=1, dtype=np.float64)


def input_moments(
    trunk: Trunk,
    nodes: Iterable[gs.Node],
    *,
    further: bool = False,
    per_sample: int = ROWS_PER_SAMPLE,
    samples: int | None = None,
    seed: int = 0,
) -> dict[int, Moments]:
    """Moments of the inputs of ``nodes`` (of the main graph) over all batches, by ``id(node)``; one step of a trunk.

    Args:
        trunk: runs the model, of which ``nodes`` are.
        nodes: any nodes; those that `linear_layer` does not take are left out of the answer.
        further: whether the trunk is to take another step, for nodes that come later in the graph.
        per_sample: rows drawn at random from each sample of a feature map or sequence (all when it has fewer).
        samples: how many there are, for wide layers to draw more where that is few; None draws no more.
        seed: of the draw.

    Raises:
        SlimError: when the model does not run on the feeds.
    """
    layers = {id(node): layer for node in nodes if (layer := linear_layer(node)) is not None}
    if not layers:
        return {}
    moments: dict[int, Moments] = {}
    for key, layer in layers.items():
        groups, _, inputs = layer.shape
        moments[key] = Moments.empty(groups, inputs)
    rng = np.random.default_rng(seed)
    for seen in trunk.step(sorted({layer.data.name for layer in layers.values()}), further=further):
        for key, layer in layers.items():
            data = seen[layer.data.name]
            each = per_sample if samples is None else layer.rows_each(samples, per_sample)
            rows = layer.draw(layer.output_shape(data.shape), rng, each)
            moments[key].gather(layer.input_rows(data, rows))
    for found in moments.values():
        found.settle()
    return moments
