"""Weights rounded for what a layer gives: never worse than one by one, near the best codes there are, and legal."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from onnxslim.passes._qdq import quantize_weight
from onnxslim.passes._rounding import round_rows


def layer(groups, outputs, inputs, seed):
    """Rows of a weight, the scales and codes of each rounded by itself, and a metric of inputs that go together."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(groups, outputs, inputs))
    seen = rng.normal(size=(groups, inputs, inputs)) + 4 * rng.normal(size=(groups, inputs, 1))
    return rows, seen @ seen.transpose(0, 2, 1) / inputs


def loss(error, metric):
    return np.einsum("gok,gkl,gol->go", error, metric, error)


def codes_of(rows, *, pairs):
    groups, outputs, inputs = rows.shape
    plain = quantize_weight(rows.reshape(-1, inputs).astype(np.float32), 0, pairs=pairs)
    return plain.codes.reshape(rows.shape), plain.scale.astype(np.float64).reshape(groups, outputs, 1)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("shape", [(1, 12, 40), (8, 1, 9), (2, 5, 300), (3, 2, 1)])
def test_the_error_falls_and_codes_stay_legal(shape, pairs):
    rows, metric = layer(*shape, seed=1)
    codes, scale = codes_of(rows, pairs=pairs)
    found = round_rows(rows, codes, scale, metric, pairs=pairs)
    before, after = (loss(scale * each - rows, metric).sum() for each in (codes, found))
    assert after <= before * (1.0 if shape[2] == 1 else 0.5)
    assert found.dtype == np.int8 and np.abs(found.astype(int)).max() <= 127
    if pairs and shape[2] > 1:
        for signed in (found.astype(int), -found.astype(int)):
            assert np.sort(np.maximum(signed, 0), axis=2)[:, :, -2:].sum(axis=2).max() <= 128


def test_small_rows_are_near_the_best_codes():
    rows, metric = layer(20, 1, 4, seed=2)
    codes, scale = codes_of(rows, pairs=False)
    found = round_rows(rows, codes, scale, metric, pairs=False)
    near = np.array(list(itertools.product(range(-2, 3), repeat=4)))
    best = np.array(
        [
            loss((scale[g] * np.clip(codes[g] + near, -127, 127) - rows[g])[None], metric[g : g + 1]).min()
            for g in range(20)
        ]
    )
    mine, plain = (loss(scale * each - rows, metric)[:, 0] for each in (found, codes))
    assert np.median(mine / best) < 1.5
    assert mine.sum() < 0.3 * plain.sum()
