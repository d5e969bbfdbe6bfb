"""How wide each channel group stays: one budget for the whole network, spent where it costs the output least.

A uniform cut of every group says how much of the network is to go; the same cost is then saved by taking step after
step from that group which loses least of what its readers give, for what the step saves. Costs are products over the
axes of each weight, so what a step saves depends on what went before, and is counted anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from onnxslim.graph.coupling import Coupling, Group

__all__ = [
    "Choice",
    "WeightCost",
    "allocate",
    "least_width",
    "narrowest",
    "uniform_widths",
    "weight_costs",
    "width_step",
]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """What widths a group may have: ``channels`` less any number of ``step``, and not below ``floor``."""

    channels: int
    step: int
    floor: int

    def narrower(self, width: int) -> int | None:
        """The next width below; None at the floor. The first step takes what is above a multiple."""
        lower = width - (width % self.step or self.step)
        return lower if lower >= self.floor else None

    def wider(self, width: int) -> int | None:
        """The next width above; None where nothing was cut."""
        return min(width + self.step, self.channels) if width < self.channels else None


@dataclass
class WeightCost:
    """What one weight costs: ``each`` for every element, of an array that groups make shorter.

    Attributes:
        each: cost of an element: 1 for parameters, how often it is multiplied for MACs.
        sizes: of the whole weight.
        positions: for each axis, how many positions go with one channel of a group, by group.
    """

    each: float
    sizes: tuple[int, ...]
    positions: list[dict[int, int]] = field(default_factory=list)

    def cost(self, removed: Mapping[int, int]) -> float:
        """The cost with so many channels of each group gone."""
        total = self.each
        for size, groups in zip(self.sizes, self.positions, strict=True):
            total *= size - sum(count * removed.get(group, 0) for group, count in groups.items())
        return total


def weight_costs(coupling: Coupling, costs: Mapping[int, float] | None = None) -> list[WeightCost]:
    """The weights that groups cut, at ``costs`` by id of the tensor; None: each costs as many as it has elements."""
    found: dict[int, WeightCost] = {}
    for index, group in enumerate(coupling.groups):
        for member in group.weights:
            tensor, axis = member.place.tensor, member.place.axis
            if id(tensor) not in found:
                sizes = tuple(int(size) for size in tensor.shape)
                each = 1.0 if costs is None else costs.get(id(tensor), 0.0) / max(math.prod(sizes), 1)
                found[id(tensor)] = WeightCost(each, sizes, [{} for _ in sizes])
            found[id(tensor)].positions[axis][index] = member.positions.shape[1]
    return list(found.values())


def width_step(group: Group, multiple_of: int) -> int:
    """By how many channels a group may shrink, so that all axes of its weights stay multiples of ``multiple_of``."""
    step = 1
    for member in group.weights:
        step = math.lcm(step, multiple_of // math.gcd(multiple_of, member.positions.shape[1]))
    return step


def narrowest(group: Group) -> int:
    """How many positions a channel takes where it takes fewest: one, or those of a head of attention."""
    return min((member.positions.shape[1] for member in group.weights), default=1)


def least_width(group: Group, channels: int) -> int:
    """How many channels a group must keep, so that no axis of its weights that is longer gets below ``channels``."""
    return min(-(-channels // narrowest(group)), group.channels)


def uniform_widths(choices: Sequence[Choice], ratio: float) -> list[int]:
    """Channels to keep: multiples of the steps, in all as near to cutting the ratio of each as they come.

    What rounding gives one group too much, the next gets less (error diffusion), within its own limits: at least the
    floor, at most all channels, which need not be a multiple.
    """
    kept = []
    carry = 0.0
    for choice in choices:
        channels, step = choice.channels, choice.step
        wish = (1 - ratio) * channels + carry
        width = max(math.floor(wish / step + 0.5) * step, choice.floor)
        if width >= channels or (channels % step and abs(channels - wish) < abs(width - wish)):
            width = channels
        kept.append(width)
        # One group that had no choice must not drag the next ones to an extreme.
        carry = min(max(wish - width, -step), step)
    return kept


def allocate(
    choices: Mapping[int, Choice],
    losses: Mapping[int, FloatArray],
    weights: Sequence[WeightCost],
    budget: float,
) -> list[dict[int, int]]:
    """Channels to keep of each group, so that the cost is within the budget and the summed loss small: two proposals.

    Args:
        choices: the widths that groups may have, by group.
        losses: ``losses[group][n]`` is what goes with ``n`` of its channels, ``[channels]`` at least, from 0 upwards.
        weights: what all costs.
        budget: the total to come down to; where even the floors are above it, those are taken.

    The step with the least loss for its saving is taken, until the budget is kept; what it then leaves is given back
    to those groups that lost most for it. Once with all that a step saves as its merit, and once with no more than is
    still to be saved, which spares a group whose one step is as large as the budget.
    """
    touched = {group: [w for w in weights if any(group in axis for axis in w.positions)] for group in choices}
    plans = [_Plan(dict(choices), losses, touched, sum(weight.cost({}) for weight in weights)) for _ in range(2)]
    for plan, capped in zip(plans, (False, True), strict=True):
        plan.shrink(budget, capped=capped)
        plan.give_back(budget)
    return [{group: choice.channels - plan.removed[group] for group, choice in choices.items()} for plan in plans]


@dataclass
class _Plan:
    """What has been taken from each group so far."""

    choices: dict[int, Choice]
    losses: Mapping[int, FloatArray]
    touched: Mapping[int, list[WeightCost]]
    total: float
    removed: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.removed = dict.fromkeys(self.choices, 0)

    def _turn(self, group: int, width: int) -> tuple[float, float]:
        """Change of the cost and of the loss when a group gets another width."""
        before, after = self.removed[group], self.choices[group].channels - width
        cost = -sum(weight.cost(self.removed) for weight in self.touched[group])
        self.removed[group] = after
        cost += sum(weight.cost(self.removed) for weight in self.touched[group])
        self.removed[group] = before
        return cost, float(self.losses[group][after] - self.losses[group][before])

    def _turns(self, *, wider: bool) -> list[tuple[int, int, float, float]]:
        """Group, width, and the changes of cost and loss, of each step that can be taken."""
        found = []
        for group, choice in self.choices.items():
            now = choice.channels - self.removed[group]
            width = choice.wider(now) if wider else choice.narrower(now)
            if width is not None:
                found.append((group, width, *self._turn(group, width)))
        return found

    def _take(self, group: int, width: int, cost: float) -> None:
        self.removed[group] = self.choices[group].channels - width
        self.total += cost

    def shrink(self, budget: float, *, capped: bool) -> None:
        """Take steps until the budget is kept."""
        while self.total > budget and (turns := self._turns(wider=False)):
            missing = self.total - budget if capped else np.inf
            group, width, cost, _ = min(turns, key=lambda turn: max(turn[3], 0.0) / max(min(-turn[2], missing), 1e-30))
            self._take(group, width, cost)

    def give_back(self, budget: float) -> None:
        """Take steps back while the budget allows it."""
        while turns := [turn for turn in self._turns(wider=True) if self.total + turn[2] <= budget]:
            group, width, cost, _ = max(turns, key=lambda turn: -turn[3] / max(turn[2], 1e-30))
            self._take(group, width, cost)
