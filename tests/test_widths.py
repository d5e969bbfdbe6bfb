"""Widths under one budget: legal, within it, and better than a uniform cut."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim.passes._widths import Choice, WeightCost, allocate, uniform_widths


def choices(*pairs: tuple[int, int], least: int = 1) -> list[Choice]:
    return [Choice(channels, step, max(-(-min(least, channels) // step) * step, step)) for channels, step in pairs]


def test_uniform_widths_spread_the_rounding():
    assert uniform_widths(choices(*[(32, 8)] * 5), 0.3) == [24, 24, 16, 24, 24]  # 112 = 0.7 * 160
    assert uniform_widths(choices((64, 8)), 0.3) == [48]
    assert uniform_widths(choices((8, 8), (16, 8)), 0.9) == [8, 8]


GROUPS = st.lists(st.tuples(st.integers(2, 300), st.sampled_from([1, 2, 4, 8, 16])), min_size=1, max_size=8)


@settings(max_examples=200, deadline=None)
@given(GROUPS, st.floats(0.02, 0.98))
def test_uniform_widths_are_multiples_and_never_nothing(groups, ratio):
    kept = uniform_widths(choices(*groups, least=4), ratio)
    for (channels, step), width in zip(groups, kept, strict=True):
        assert 0 < width <= channels
        assert width == channels or width % step == 0
        assert width == channels or width >= 4


def chain(groups: list[Choice], each: list[float]) -> list[WeightCost]:
    """Layers one behind another, from 3 channels to 10: each weight is cut by the group before and the one behind."""
    sizes = [3, *(choice.channels for choice in groups), 10]
    weights = []
    for index, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        first = {index: 1} if index < len(groups) else {}
        second = {index - 1: 1} if index else {}
        weights.append(WeightCost(each[index % len(each)], (outputs, inputs), [first, second]))
    return weights


def total(weights: list[WeightCost], groups: list[Choice], widths: list[int]) -> float:
    gone = {index: choice.channels - width for index, (choice, width) in enumerate(zip(groups, widths, strict=True))}
    return sum(weight.cost(gone) for weight in weights)


@settings(max_examples=100, deadline=None)
@given(GROUPS, st.floats(0.1, 0.9), st.integers(0, 99))
def test_allocated_widths_are_legal_and_within_the_budget(groups, ratio, seed):
    rng = np.random.default_rng(seed)
    some = choices(*groups, least=4)
    weights = chain(some, rng.uniform(1, 50, 3).tolist())
    losses = {i: np.concatenate([[0], np.cumsum(np.sort(rng.random(c.channels)))]) for i, c in enumerate(some)}
    uniform = uniform_widths(some, ratio)
    budget = total(weights, some, uniform)
    for found in allocate(dict(enumerate(some)), losses, weights, budget):
        widths = [found[index] for index in range(len(some))]
        assert total(weights, some, widths) <= budget * (1 + 1e-9) or widths == [choice.floor for choice in some]
        for choice, width in zip(some, widths, strict=True):
            assert width == choice.channels or (width % choice.step == 0 and choice.floor <= width < choice.channels)


def test_what_can_be_spared_goes_and_what_cannot_stays():
    some = choices((64, 8), (64, 8), (64, 8))
    weights = chain(some, [1.0])
    shape = np.linspace(0, 1, 65)
    losses = {0: 9 * shape, 1: 1e-3 * shape, 2: shape}
    uniform = uniform_widths(some, 0.5)
    for found in allocate(dict(enumerate(some)), losses, weights, total(weights, some, uniform)):
        assert found[0] == 64
        assert found[1] == 8
        loss = sum(losses[index][64 - width] for index, width in found.items())
        assert loss < 0.1 * sum(losses[index][64 - width] for index, width in enumerate(uniform))


def test_a_step_as_large_as_the_budget_is_taken_only_by_the_proposal_that_counts_all_it_saves():
    some = choices((256, 128), (64, 8))
    weights = [WeightCost(1.0, (256, 100), [{0: 1}, {}]), WeightCost(1.0, (64, 100), [{1: 1}, {}])]
    losses = {0: np.linspace(0, 2, 257), 1: np.linspace(0, 1, 65)}  # 1.0 for 12,800, or 0.125 for 800
    whole, capped = allocate(dict(enumerate(some)), losses, weights, total(weights, some, [256, 56]))
    assert whole == {0: 128, 1: 64}
    assert capped == {0: 256, 1: 56}


def test_savings_are_counted_with_what_is_left_of_the_other_axis():
    cost = WeightCost(2.0, (16, 8, 3, 3), [{0: 1}, {1: 1}, {}, {}])
    assert cost.cost({}) == 2 * 16 * 8 * 9
    assert cost.cost({0: 8, 1: 4}) == 2 * 8 * 4 * 9
    both = WeightCost(1.0, (16, 16), [{0: 2}, {0: 1}])  # a group may cut both axes, and several positions a channel
    assert both.cost({0: 4}) == 8 * 12
