"""Structured pruning: whole channels leave the model, with everything that is coupled to them."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from pydantic import Field

from onnxslim.bodies import bodies
from onnxslim.graph.channel_rules import GATES
from onnxslim.graph.cost import node_macs, parameter_count
from onnxslim.graph.coupling import Coupling, Cut, Group, couple, cut
from onnxslim.graph.shapes import infer_shapes
from onnxslim.graph.walk import hoist_constants
from onnxslim.model import Model
from onnxslim.node_latency import node_latencies
from onnxslim.passes._channel_scores import Removal, norm_removal, obs_removal, reader_moments, readers
from onnxslim.passes._correction import Judge
from onnxslim.passes._least_squares import recover
from onnxslim.passes._recurrent import refit_gates
from onnxslim.passes._statistics import LinearLayer
from onnxslim.passes._widths import (
    Choice,
    WeightCost,
    allocate,
    least_width,
    narrowest,
    uniform_widths,
    weight_costs,
    width_step,
)
from onnxslim.passes.base import Context, Outcome, Pass
from onnxslim.runtime import Session

if TYPE_CHECKING:
    from onnxslim.data import Dataset

__all__ = ["PruneChannels"]

Feed = dict[str, np.ndarray]
Criterion = Literal["norm", "obs"]

_BATCH = 32  # samples at most
_BATCH_BYTES = 256 << 20  # of what all layers give for a batch
_TRIED, _JUDGED = 2, 1  # batches: proposals of widths are refitted on these, and judged by those
_REFIT = "least-squares"  # the rule of the changes and refusals of the refit
_CLEARLY_BETTER = 0.9  # of the first proposal's error: what so few samples tell apart
_WEAKEST = 0.05
_UNITS = {"macs": "many MACs", "parameters": "many parameters", "latency": "much time"}


@dataclass
class _Tally:
    """What went, of how much, over all graphs of a model."""

    removed: int = 0
    prunable: int = 0
    macs_removed: float = 0.0
    macs: float = 0.0

    def __iadd__(self, other: _Tally) -> _Tally:
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))
        return self


class PruneChannels(Pass):
    """Remove the least important channels, and refit what is left to the original's activations.

    Channels that are added, concatenated, flattened or normalised together go together; how, is found on the graph
    (``onnxslim.graph.coupling``). Graph inputs and outputs keep their sizes, and each axis that cannot be cut is
    reported with its reason. Kept widths are multiples of 8 by default, because a convolution with 95 channels runs
    slower than one with 128.

    How much goes from which group is one budget for the whole network: with calibration data, groups whose readers can
    make up for it lose more, and others less (a few ways to share are tried on a part of the data); without, all lose
    the same share.

    With calibration data (no labels) every layer behind a cut is refitted by least squares, in topological order, with
    the model as it was before as the teacher (He et al. 2017, arXiv 1707.06168); so are the gates of LSTM, GRU and RNN
    whose hidden units or inputs were cut. Without data the cut stays as it is, which costs most of the accuracy of a
    real network at any ratio worth having.

    Cost: two forward passes over the calibration samples for the refit, one more for the criterion, and memory for one
    input covariance per layer at a time.
    """

    name: ClassVar[str] = "prune-channels"
    lossless: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = False

    ratio: float = Field(
        0.3,
        gt=0,
        lt=1,
        description="as much goes as if every prunable group that no norm spans lost this share of its channels",
    )
    cost: Literal["macs", "parameters", "latency"] = Field(
        "macs",
        description="what is counted for it: multiply-accumulates, parameters (size), or the time that each layer takes"
        " in ONNX Runtime on one thread of this machine",
    )
    multiple_of: int = Field(8, ge=1, description="kept widths are multiples of this")
    min_channels: int = Field(
        8, ge=1, description="a layer is never cut below this width; a head of attention counts with all its elements"
    )
    criterion: Criterion = Field(
        "obs",
        description="what decides which channels go: 'obs', the error that is left in the layers that read them once "
        "those have been refitted (needs calibration data; 'norm' without it); 'norm', the size of their weights",
    )
    recover: bool = Field(True, description="refit the remaining weights by least squares on calibration data")
    ridge: float | None = Field(
        None,
        gt=0,
        description="pull of the refit to the cut weights, in units of the input variance; chosen for each layer on "
        "held-out samples when absent",
    )
    exclude: tuple[str, ...] = Field((), description="patterns of node names whose channels are kept, such as 'head.*'")
    max_samples: int = Field(512, ge=1, description="calibration samples to use at most")
    rows_per_sample: int = Field(
        40,
        ge=1,
        description="positions of a feature map to draw from each sample; more for wide layers where samples are few",
    )

    def run(self, model: Model, context: Context) -> Outcome:
        """Prune ``model`` in place, the bodies of If, Loop and Scan included, each within a budget of its own.

        Raises:
            ModelError: the model does not run on the calibration feeds.
        """
        outcome = Outcome()
        hoist_constants(model)
        before = parameter_count(model)
        tally = self._prune(model, context, outcome)
        if inside := sum(_layers(function) for function in model.graph.functions):
            outcome.refuse(self.name, _name(model), f"{inside} layer(s) inside functions are not pruned")
        if not outcome.changes:
            if not outcome.refusals:
                outcome.refuse(self.name, _name(model), "it has no layer with constant weights to prune")
            return outcome
        gone = before - parameter_count(model)
        outcome.numbers = {
            "channels removed": float(tally.removed),
            "share of prunable channels removed": tally.removed / tally.prunable,
            "parameters removed": float(gone),
            "share of parameters removed": gone / before,
            "share of MACs removed (estimate)": tally.macs_removed / max(tally.macs, 1.0),
            "layers refitted": float(sum(change.rule == _REFIT for change in outcome.changes)),
        }
        return outcome

    def _prune(self, model: Model, context: Context, outcome: Outcome) -> _Tally:
        """Prune the main graph of a model, and then the bodies of its nodes."""
        tally = self._prune_graph(model, context, outcome)
        for body in bodies(model, context.calibration, partial(outcome.refuse, self.name)):
            inside = Context(calibration=body.calibration, seed=context.seed, progress=context.progress)
            tally += self._prune(body.model, inside, outcome)
        return tally

    def _prune_graph(self, model: Model, context: Context, outcome: Outcome) -> _Tally:
        coupling = couple(model)
        self._exclude(coupling)
        data = None if context.calibration is None else context.calibration.take(self.max_samples)
        choices = self._choices(coupling, outcome, refitted=data is not None and self.recover)
        if not choices:
            return _Tally()
        macs, size = _costs(model, coupling, context, data)
        times = self._times(model, coupling, data, outcome) if self.cost == "latency" else {}
        batches = None if data is None else partial(data.batches, max(1, min(_BATCH, _BATCH_BYTES // max(size, 1))))
        last = _last(model, coupling)
        samples = None if data is None else data.samples
        removals, unseen = self._removals(model, coupling, choices, last, batches, samples or 0, context.seed)
        for index, why in unseen.items():
            outcome.refuse(self.name, _title(coupling.groups[index]), f"{_width(coupling.groups[index])} stay: {why}")
            del choices[index]
        if not choices:
            return _Tally()
        weights = weight_costs(coupling, macs)
        counted = {} if self.cost == "parameters" else times or macs
        budgeted = weight_costs(coupling, counted if any(counted.values()) else None)
        measured = self.criterion == "obs" and batches is not None
        spanned = {index for index in choices if coupling.groups[index].spanned}
        proposals = self._proposals(choices, spanned, removals, budgeted, measured=measured)
        widths = proposals[0]
        if batches is not None and self.recover and len(proposals) > 1:
            widths = self._best(model, proposals, removals, batches, context.seed)
        self._refuse_whole(coupling, choices, widths, outcome, measured=measured)
        removed = _removed(coupling, removals, widths)
        counts = {index: len(channels) for index, channels in removed.items()}
        tally = _Tally(
            removed=sum(counts.values()),
            prunable=sum(group.channels for group in coupling.groups if not group.frozen),
            macs_removed=sum(weight.cost({}) - weight.cost(counts) for weight in weights),
            macs=sum(macs.values()),
        )
        if not removed:
            return tally
        teacher = model.copy() if self.recover and batches is not None else None
        plan = cut(model, coupling, removed)
        for index in removed:
            outcome.change(self.name, _title(coupling.groups[index]), _told(coupling.groups[index], widths[index]))
        if teacher is not None and batches is not None:
            self._recover(model, teacher, coupling, plan, batches, context, outcome, samples)
        else:
            why = "recover is off" if not self.recover else "there is no calibration data"
            outcome.refuse(_REFIT, _name(model), f"nothing was refitted: {why}")
        return tally

    def weaker(self, outcome: Outcome) -> PruneChannels | None:
        """The same with three quarters of the ratio, down to 5 %."""
        ratio = round(self.ratio * 0.75, 4)
        return self.model_copy(update={"ratio": ratio}) if ratio >= _WEAKEST else None

    # ---------------------------------------------------------------------------------------------------- choosing

    def _times(self, model: Model, coupling: Coupling, data: Dataset | None, outcome: Outcome) -> dict[int, float]:
        """Microseconds with each weight, by id of the tensor; nothing without data."""
        if data is None:
            outcome.refuse(
                self.name, _name(model), "no time can be measured without calibration data: MACs are counted"
            )
            return {}
        spent = node_latencies(model, next(iter(data)))
        return _shared_out(coupling, lambda node: spent.get(id(node), 0.0))

    def _exclude(self, coupling: Coupling) -> None:
        for group in coupling.groups:
            for node in group.makers:
                pattern = next((p for p in self.exclude if fnmatch.fnmatchcase(node.name, p)), None)
                if pattern is not None and group.frozen is None:
                    group.frozen = f"{node.name!r} is excluded by {pattern!r}"

    def _choices(self, coupling: Coupling, outcome: Outcome, *, refitted: bool) -> dict[int, Choice]:
        """What widths each group may have; refusals for those that have no choice."""
        choices: dict[int, Choice] = {}
        for index, group in enumerate(coupling.groups):
            step = width_step(group, self.multiple_of)
            least = least_width(group, self.min_channels)
            floor = max(-(-least // step) * step, step)
            if group.frozen:
                outcome.refuse(self.name, _title(group), f"{_width(group)} stay: {group.frozen}")
            elif group.spanned and not (refitted and any(not use.makes for use in group.uses)):
                why = f"{group.spanned} takes a mean over them, and nothing behind it is refitted"
                outcome.refuse(self.name, _title(group), f"{_width(group)} stay: {why}")
            elif group.channels <= floor:
                why = f"kept widths are multiples of {self.multiple_of}, not below {floor}"
                outcome.refuse(self.name, _title(group), f"{_width(group)} stay: {why}")
            else:
                choices[index] = Choice(group.channels, step, floor)
        return choices

    def _proposals(
        self,
        choices: dict[int, Choice],
        spanned: set[int],
        removals: dict[int, Removal],
        weights: list[WeightCost],
        *,
        measured: bool,
    ) -> list[dict[int, int]]:
        """Channels to keep of each group: ways that cost no more than a uniform cut, the likeliest first.

        Groups that a norm spans change what is left of them when they are cut. Where there are others, those say how
        much is to go, and the spanned ones are one more way to save it.
        """
        plain = {index: choice for index, choice in choices.items() if index not in spanned} or choices
        whole = {index: choice.channels for index, choice in choices.items()}
        uniform = whole | dict(zip(plain, uniform_widths(list(plain.values()), self.ratio), strict=True))
        if not measured:
            return [uniform]

        def cost(widths: dict[int, int]) -> float:
            removed = {index: choice.channels - widths[index] for index, choice in choices.items()}
            return sum(weight.cost(removed) for weight in weights)

        losses = {index: removal.losses for index, removal in removals.items()}
        budget = cost(uniform)
        ways = [*allocate(plain, losses, weights, budget), uniform]
        if len(plain) < len(choices):
            ways += allocate(choices, losses, weights, budget)[:1]
        found: list[dict[int, int]] = []
        for widths in (whole | way for way in ways):
            if widths not in found and (not found or cost(widths) <= budget):
                found.append(widths)
        return found

    def _best(
        self,
        model: Model,
        proposals: list[dict[int, int]],
        removals: dict[int, Removal],
        batches: Callable[[], Iterable[Feed]],
        seed: int,
    ) -> dict[int, int]:
        """The proposal that leaves least error when tried on a part of the data; the first unless clearly beaten."""
        part = list(islice(batches(), _TRIED + _JUDGED))
        fit, held = part[: len(part) * _TRIED // (_TRIED + _JUDGED)], part[len(part) * _TRIED // (_TRIED + _JUDGED) :]
        if not fit:
            return proposals[0]
        judge = Judge.of(model, held)
        errors = []
        for widths in proposals:
            trial = model.copy()
            coupling = couple(trial)
            plan = cut(trial, coupling, _removed(coupling, removals, widths))
            self._recover(trial, model, coupling, plan, lambda: fit, Context(seed=seed), Outcome(), quick=True)
            errors.append(judge.error(trial))
        least = int(np.argmin(errors))
        return proposals[least if errors[least] < _CLEARLY_BETTER * errors[0] else 0]

    def _refuse_whole(
        self,
        coupling: Coupling,
        choices: dict[int, Choice],
        widths: dict[int, int],
        outcome: Outcome,
        *,
        measured: bool,
    ) -> None:
        """Say of each group that could have been cut and is not, why."""
        why = f"the nearest width that is a multiple of {self.multiple_of} is its own"
        if measured:
            why = f"other groups lose less for as {_UNITS[self.cost]}"
        for index, choice in choices.items():
            if widths[index] == choice.channels:
                group = coupling.groups[index]
                outcome.refuse(self.name, _title(group), f"{_width(group)} stay: {why}")

    def _removals(
        self,
        model: Model,
        coupling: Coupling,
        choices: dict[int, Choice],
        last: set[int],
        batches: Callable[[], Iterable[Feed]] | None,
        samples: int,
        seed: int,
    ) -> tuple[dict[int, Removal], dict[int, str]]:
        """In which order the channels of each group would go, and for which groups the data cannot tell, and why.

        What a layer of more outputs than rows were seen needs for each of them does not show: most characters of a
        recogniser, and many classes, never occurred. Nothing makes up for it behind the last layers.
        """
        found = {index: norm_removal(coupling.groups[index]) for index in choices}
        if self.criterion != "obs" or batches is None:
            return found, {}
        reading = {index: readers(coupling.groups[index]) for index in choices}
        every = [reader for some in reading.values() for reader in some]
        rows = self.rows_per_sample
        moments = reader_moments(model, every, batches, per_sample=rows, samples=samples, seed=seed)
        unseen = {
            index: f"{name!r} tells {outputs} outputs from them, and calibration shows it {count} rows"
            for index in last & set(choices)
            for reader in reading[index]
            for name, outputs, count in [(reader.layer.node.name, reader.layer.shape[1], moments[reader].count)]
            if outputs > count
        }
        return found | {
            index: removal
            for index, some in reading.items()
            if index not in unseen and (removal := obs_removal(coupling.groups[index], some, moments)) is not None
        }, unseen

    # -------------------------------------------------------------------------------------------------- recovering

    def _recover(
        self,
        model: Model,
        teacher: Model,
        coupling: Coupling,
        plan: Cut,
        batches: Callable[[], Iterable[Feed]],
        context: Context,
        outcome: Outcome,
        samples: int | None = None,
        *,
        quick: bool = False,
    ) -> None:
        """Refit; wide layers see more rows of each sample where it is known how many ``samples`` there are."""
        gates = refit_gates(model, teacher, coupling, plan, batches)
        made = {id(use.node): use.axis for use in coupling.uses if use.makes}

        def kept(layer: LinearLayer) -> NDArray[np.int64] | None:
            axis = made.get(id(layer.node))
            return None if axis is None else plan.kept(axis)

        touched = {key[0] for key in plan.gone if isinstance(coupling.places[key].tensor, gs.Constant)}
        changed = {id(node) for node in model.graph.nodes if any(id(t) in touched for t in node.inputs)}
        refits = recover(
            model,
            teacher,
            kept,
            changed,
            batches,
            ridge=self.ridge,
            per_sample=self.rows_per_sample,
            samples=samples,
            seed=context.seed,
            quick=quick,
            progress=context.progress,
        )
        for refit in (*gates, *refits):
            name = refit.node.name or next(tensor.name for tensor in refit.node.outputs if tensor.name)
            what = "gates" if refit.node.op in GATES else "output"
            if refit.why is None:
                outcome.change(_REFIT, name, f"relative error of its {what} {refit.before:.3g} -> {refit.after:.3g}")
            else:
                outcome.refuse(_REFIT, name, f"was not refitted: {refit.why}")


def _removed(coupling: Coupling, removals: dict[int, Removal], widths: dict[int, int]) -> dict[int, NDArray[np.int64]]:
    """Channels that go, of each group that gets narrower."""
    counts = {index: coupling.groups[index].channels - width for index, width in widths.items()}
    return {index: removals[index].order[:count] for index, count in counts.items() if count}


def _last(model: Model, coupling: Coupling) -> set[int]:
    """The groups that are read by a layer with weights behind which there is no other."""
    layers = {id(use.node) for use in coupling.uses}
    waiting, seen, last = list(model.graph.outputs), set(), set()
    while waiting:
        tensor = waiting.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        for node in tensor.inputs:
            if id(node) in layers:
                last.add(id(node))
            else:
                waiting.extend(node.inputs)
    return {
        index
        for index, group in enumerate(coupling.groups)
        if any(id(use.node) in last and not use.makes for use in group.uses)
    }


def _elements(tensor: gs.Tensor) -> int:
    return math.prod(int(size) for size in tensor.shape)


def _costs(model: Model, coupling: Coupling, context: Context, data: Dataset | None) -> tuple[dict[int, float], int]:
    """Multiply-accumulates with each weight, by id of the tensor, and bytes that all layers give for a feed.

    Of the first feed where there is data, else of a sample and 0.
    """
    shapes = infer_shapes(model, context.shapes)
    size = 0
    if data is not None:
        outputs = [tensor for use in coupling.uses for tensor in use.node.outputs]
        names = sorted({tensor.name for tensor in outputs if not tensor.is_empty()})
        seen = Session(model, outputs=names).run(next(iter(data)))
        shapes.observe(model.graph, {name: value.shape for name, value in seen.items()})
        size = sum(value.nbytes for value in seen.values())
    return _shared_out(coupling, lambda node: node_macs(node, shapes) or 0), size


def _shared_out(coupling: Coupling, cost: Callable[[gs.Node], float]) -> dict[int, float]:
    """What each weight costs, by id of the tensor: that of its nodes, by its share of their weights."""
    found: dict[int, float] = {}
    for node in {id(use.node): use.node for use in coupling.uses}.values():
        weights = [tensor for tensor in node.inputs if _is_weight(tensor)]
        elements = sum(_elements(tensor) for tensor in weights)
        for tensor in weights:
            found[id(tensor)] = found.get(id(tensor), 0.0) + cost(node) * _elements(tensor) / max(elements, 1)
    return found


def _is_weight(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and len(tensor.shape) > 1


def _layers(graph: gs.Graph) -> int:
    return sum(node.op in ("Conv", "ConvTranspose", "Gemm", "MatMul") for node in graph.nodes)


def _name(model: Model) -> str:
    return str(model.graph.name or "graph")


def _title(group: Group) -> str:
    return str(group.makers[0].name or group.makers[0].outputs[0].name)


def _width(group: Group) -> str:
    return f"{group.channels} {_unit(group)}"


def _unit(group: Group) -> str:
    """What goes at once: a channel, or such as a head of attention, of several in all its layers."""
    each = narrowest(group)
    return "channels" if each == 1 else f"blocks of {each} channels"


def _told(group: Group, width: int) -> str:
    names = [node.name or node.outputs[0].name for node in {id(u.node): u.node for u in group.uses}.values()]
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return f"{group.channels} -> {width} {_unit(group)}: {', '.join(names[:6])}{more}"
