"""Rounding weights for what a layer gives, not each weight by itself.

The error of a layer's output is the sum of ``e H e^T`` over the rows ``e`` of the error of its weight, with ``H`` the
second moment of its inputs. Codes are fixed one column after another, and what each loses is put on those after it
(GPTQ, Frantar et al. 2023); then single codes are moved as long as that lowers the error (coordinate descent). Where a
bias takes the mean error back, ``H`` is the covariance. What layers that take differences of large inputs give, as
depthwise ones near the input do, hangs on this more than on the number of bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim.passes._codebook import Feedback
from onnxslim.passes._placement import Anchor, weight_axis
from onnxslim.passes._qdq import CODE_LIMIT, CORRECTED, MIDDLE, Emitter, WeightCodes, quantize_weight
from onnxslim.passes._statistics import LinearLayer, Moments, input_moments, linear_layer
from onnxslim.passes._trunk import Trunk

if TYPE_CHECKING:
    from onnxslim.model import Model

__all__ = ["reconstruct", "round_rows", "round_stored"]

FloatArray = NDArray[np.float64]
Columns = NDArray[np.float32]

_MOST_INPUTS = 2048  # of a layer: its moments take 34 MB, and what is made of them as much again a few times
_PART_BYTES = 12 << 20  # of moments, and of the activations that they are taken of, that are held at a time
_HELD_BYTES = 8 << 20  # of what is held from one part of the model to the next in memory, and not on disk
_DAMPING = 1e-3  # of the mean energy of the inputs
_SWEEPS = 2  # more lower the error by a thousandth
_BLOCK = 32  # columns whose steps reach the others by one matrix product
_PART_ELEMENTS = 1 << 18  # of a weight whose codes are chosen at a time


def reconstruct(
    emitter: Emitter,
    feeds: Callable[[], Iterable[dict[str, np.ndarray]]],
    sizes: Mapping[str, int],
    *,
    centred: bool,
    seed: int = 0,
) -> dict[str, WeightCodes]:
    """Return codes for the weights of all anchors of a placement, by name, with the scales that they would have anyway.

    Args:
        emitter: not used up: its model is run in float.
        feeds: gives what to run, streamed; several times where moments or activations take much memory.
        sizes: bytes that a feed takes of each tensor.
        centred: whether biases take back the mean error of what has them.
        seed: of the rows that are drawn from feature maps.
    """
    layers = {}
    for name, anchor in emitter.placement.anchors.items():
        layer = linear_layer(anchor.node)
        if layer is not None and layer.shape[2] <= _MOST_INPUTS:
            layers[name] = layer
    found: dict[str, WeightCodes] = {}
    for names, seen in _in_parts(emitter.model, layers, feeds, sizes, seed):
        if seen.count > 1:  # a weight is stored once, whoever reads it
            codes = _rounded(emitter, emitter.placement.anchors[names[0]], layers[names[0]], seen, centred=centred)
            found |= dict.fromkeys(names, codes)
    return found


def _in_parts(
    model: Model,
    layers: Mapping[str, LinearLayer],
    feeds: Callable[[], Iterable[dict[str, np.ndarray]]],
    sizes: Mapping[str, int],
    seed: int,
) -> Iterator[tuple[list[str], Moments]]:
    """The layers that share a weight, and the moments of all that they read; as many at a time as memory holds."""
    readers = Counter(id(layer.weight) for layer in layers.values())
    parts: list[list[str]] = [[]]
    held = 0
    for name, layer in layers.items():
        blocks, _, inputs = layer.shape
        size = 8 * blocks * inputs**2 + sizes.get(layer.data.name, 0)
        if held + size > _PART_BYTES and parts[-1]:
            parts.append([])
            held = 0
        held += size
        parts[-1].append(name)
    trunk = Trunk(model, feeds, _HELD_BYTES)
    found: dict[int, tuple[list[str], Moments]] = {}
    for part in parts:
        moments = input_moments(trunk, [layers[name].node for name in part], further=part is not parts[-1], seed=seed)
        for name in part:
            key, seen = id(layers[name].weight), moments.pop(id(layers[name].node))
            names, before = found.pop(key, ([], None))
            found[key] = [*names, name], seen if before is None else before.merged(seen)
            if len(names) + 1 == readers[key]:
                yield found.pop(key)


def _rounded(emitter: Emitter, anchor: Anchor, layer: LinearLayer, seen: Moments, *, centred: bool) -> WeightCodes:
    plain = emitter.weight_codes(anchor)
    metric = _metric(seen, centred=centred and layer.node.op in CORRECTED)
    # The input is rounded as well: noise of a variance of step ** 2 / 12 in each of its elements.
    step = emitter.codes[layer.data.name].read.scale
    np.einsum("gkk->gk", metric)[...] += step**2 / 12
    if not np.isfinite(metric).all():
        return plain
    return _codes(layer, plain, metric, pairs=emitter.adds_in_pairs(anchor))


def _metric(seen: Moments, *, centred: bool) -> FloatArray:
    """The covariance of what a layer reads, or its second moment, ``[G, K, K]``, in the memory of ``seen``."""
    metric = seen.gram
    metric /= max(seen.count, 1)
    if centred:
        metric -= seen.mean[:, :, None] * seen.mean[:, None, :]
    return metric


def round_stored(
    model: Model,
    nodes: Iterable[gs.Node],
    feeds: Callable[[], Iterable[dict[str, np.ndarray]]],
    sizes: Mapping[str, int],
    *,
    seed: int = 0,
) -> dict[str, WeightCodes]:
    """Return codes for the weights of layers that compute in float, by name of their output; as for `reconstruct`.

    The largest weight of each channel keeps the largest code, so that the scale can be told from the rounded weight.
    """
    linear = (layer for node in nodes if (layer := linear_layer(node)) is not None)
    layers = {layer.output.name: layer for layer in linear if layer.shape[2] <= _MOST_INPUTS}
    found: dict[str, WeightCodes] = {}
    for names, seen in _in_parts(model, layers, feeds, sizes, seed):
        layer, metric = layers[names[0]], _metric(seen, centred=False)
        if seen.count < 2 or not np.isfinite(metric).all():
            continue
        weight = np.asarray(layer.weight.values, np.float32)
        plain = quantize_weight(weight, weight_axis(layer.node))
        rows, largest = layer.rows_of(_codes(layer, plain, metric, pairs=False).codes), layer.rows_of(plain.codes)
        place = np.abs(layer.rows_of(weight)).argmax(axis=2, keepdims=True)
        np.put_along_axis(rows, place, np.take_along_axis(largest, place, axis=2), axis=2)
        found |= dict.fromkeys(names, WeightCodes(layer.stored_as(rows), plain.scale))
    return found


def _codes(layer: LinearLayer, plain: WeightCodes, metric: FloatArray, *, pairs: bool) -> WeightCodes:
    """Codes with the scales of ``plain``, chosen by :func:`round_rows`."""
    groups, outputs, _ = layer.shape
    scale = np.broadcast_to(plain.scale.astype(np.float64), groups * outputs).reshape(groups, outputs, 1)
    weight = layer.rows_of(np.asarray(layer.weight.values, np.float64))
    codes = round_rows(weight, layer.rows_of(plain.codes), scale, metric, pairs=pairs)
    return WeightCodes(layer.stored_as(codes), plain.scale)


def round_rows(
    rows: FloatArray, codes: NDArray[np.int8], scale: FloatArray, metric: FloatArray, *, pairs: bool
) -> NDArray[np.int8]:
    """Choose codes that lower the sum of ``e metric e^T`` over all rows ``e`` of ``scale * codes - rows``.

    Args:
        rows: the weight, ``[G, O, K]``.
        codes: ``rows`` rounded one by one.
        scale: positive, ``[G, O, 1]``.
        metric: what an error in the inputs' directions costs, ``[G, K, K]``; it is scaled, its diagonal raised.
        pairs: keep the sum of any two codes of one row and sign at 128 at most, as ``codes`` do.
    """
    diagonal = np.einsum("gkk->gk", metric)
    unit = diagonal.mean(axis=1)
    metric /= np.where(unit > 0, unit, 1.0)[:, None, None]
    diagonal += _DAMPING
    feedback = Feedback(metric, 0.0)
    single = metric.astype(np.float32)  # what is compared from here on differs by more than that rounds
    found = np.empty_like(codes)
    width = max(1, _PART_ELEMENTS // (len(codes) * codes.shape[2]))
    for begin in range(0, codes.shape[1], width):
        part = slice(begin, begin + width)
        plain = codes[:, part].astype(np.int16)
        limits = -_limit(-plain, pairs=pairs), _limit(plain, pairs=pairs)
        # In steps of the scale, [G, K, O]: a row's error grows with its scale whatever codes it has.
        wanted, start, low, high = (
            np.ascontiguousarray(each.swapaxes(1, 2), np.float32)
            for each in (rows[:, part] / scale[:, part], plain, *limits)
        )
        found[:, part] = _chosen(wanted, start, low, high, single, feedback).swapaxes(1, 2)
    return found


def _chosen(
    wanted: Columns, plain: Columns, low: Columns, high: Columns, metric: Columns, feedback: Feedback
) -> Columns:
    """Codes ``[G, K, O]`` between ``low`` and ``high`` that stand for ``wanted``, none worse than ``plain``."""
    tried = _fed_back(wanted, low, high, feedback)
    errors = tried - wanted, plain - wanted
    slopes = [metric @ error for error in errors]
    first, second = (np.einsum("gko,gko->go", *pair)[:, None] for pair in zip(errors, slopes, strict=True))
    codes, slope = np.where(first < second, tried, plain), np.where(first < second, *slopes)
    _descend(codes, slope, low, high, metric)
    return codes


def _limit(codes: NDArray[np.int16], *, pairs: bool) -> NDArray[np.int16]:
    """The largest code that each weight may get, ``[G, O, K]``."""
    if not pairs or codes.shape[2] == 1:
        return np.full(codes.shape, CODE_LIMIT, np.int16)
    # The largest code of a row stays the only one above a half: others get what it leaves of the sum.
    place = codes.argmax(axis=2, keepdims=True)
    largest = np.maximum(np.take_along_axis(codes, place, axis=2), MIDDLE // 2)
    limit = np.broadcast_to(MIDDLE - largest, codes.shape).copy()
    np.put_along_axis(limit, place, largest, axis=2)
    return limit


def _fed_back(wanted: Columns, low: Columns, high: Columns, feedback: Feedback) -> Columns:
    """Codes ``[G, K, O]`` with what each column loses put on the next ones."""
    codes = np.empty_like(wanted)
    lows, highs = low[feedback.columns], high[feedback.columns]

    def rounded(column: Columns, k: int) -> Columns:
        return np.minimum(np.maximum(np.rint(column), lows[:, k]), highs[:, k], out=codes[:, k])

    feedback.fix(wanted[feedback.columns], rounded)
    restored = np.empty_like(codes)
    restored[feedback.columns] = codes
    return restored


def _descend(codes: Columns, slope: Columns, low: Columns, high: Columns, metric: Columns) -> None:
    """Move one code ``[G, K, O]`` after another to where the error is least, given all others.

    Args:
        codes: changed.
        slope: ``metric`` times their errors; used up.
    """
    curve = np.einsum("gkk->kg", metric)[:, :, None]
    for _ in range(_SWEEPS):
        moved = False
        for begin in range(0, codes.shape[1], _BLOCK):
            end = min(begin + _BLOCK, codes.shape[1])
            near, steps = slope[:, begin:end].copy(), np.zeros((len(codes), end - begin, codes.shape[2]), codes.dtype)
            for k in range(begin, end):
                here = k - begin
                best = codes[:, k] - np.rint(near[:, here] / curve[k])
                steps[:, here] = step = np.minimum(np.maximum(best, low[:, k]), high[:, k]) - codes[:, k]
                if step.any():
                    codes[:, k] += step
                    near[:, here + 1 :] += metric[:, k, k + 1 : end, None] * step[:, None]
            rows = steps.any(axis=(0, 1))
            if rows.any():
                moved = True
                slope[:, :, rows] += metric[:, :, begin:end] @ steps[:, :, rows]
        if not moved:
            break
