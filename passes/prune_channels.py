"""Structured pruning: whole channels leave the model, with everything that is coupled to them."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from pydantic import Field

from onnxslim.graph.coupling import Coupling, Cut, Group, couple, cut
from onnxslim.graph.walk import hoist_constants
from onnxslim.model import Model
from onnxslim.passes._channel_scores import obs_removal, readers, weight_norms
from onnxslim.passes._statistics import LinearLayer, Moments, input_moments
from onnxslim.passes.base import Context, Outcome, Pass

__all__ = ["PruneChannels", "choose_widths", "width_step"]

Feed = dict[str, np.ndarray]
Criterion = Literal["norm", "obs"]

_BATCH = 32
_WEAKEST = 0.05


class PruneChannels(Pass):
    """Remove the least important channels, and refit what is left to the original's activations.

    Channels that are added, concatenated, flattened or normalised together go together; how, is found on the graph
    (``onnxslim.graph.coupling``). Graph inputs and outputs keep their sizes, and each axis that cannot be cut is
    reported with its reason. Kept widths are multiples of 8 by default, because a convolution with 95 channels runs
    slower than one with 128.

    With calibration data (no labels) every layer behind a cut is refitted by least squares, in topological order, with
    the model as it was before as the teacher (He et al. 2017, arXiv 1707.06168). Without data the cut stays as it is,
    which costs most of the accuracy of a real network at any ratio worth having.

    Cost: two forward passes over the calibration samples for the refit, one more for the criterion, and memory for one
    input covariance per layer at a time.
    """

    name: ClassVar[str] = "prune-channels"
    lossless: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = False

    ratio: float = Field(0.3, gt=0, lt=1, description="share of the channels of the prunable groups to remove")
    multiple_of: int = Field(8, ge=1, description="kept widths are multiples of this")
    min_channels: int = Field(8, ge=1, description="a group is never cut below this width")
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
    rows_per_sample: int = Field(40, ge=1, description="positions of a feature map to draw from each sample")

    def run(self, model: Model, context: Context) -> Outcome:
        """Prune ``model`` in place.

        Raises:
            ModelError: the model does not run on the calibration feeds.
        """
        outcome = Outcome()
        hoist_constants(model)
        coupling = couple(model)
        self._exclude(coupling)
        chosen = self._widths(coupling, outcome)
        if nested := _nested_layers(model):
            outcome.refuse(self.name, _name(model), f"{nested} layers inside subgraphs or functions are not pruned")
        if not chosen:
            if not outcome.refusals:
                outcome.refuse(self.name, _name(model), "it has no layer with constant weights to prune")
            return outcome
        batches = self._batches(context)
        moments = self._criterion_moments(model, coupling, chosen, batches, context.seed)
        removed = {
            index: self._least_important(coupling.groups[index], coupling.groups[index].channels - width, moments)
            for index, width in chosen.items()
        }
        teacher = model.copy() if self.recover and batches is not None else None
        before = _parameters(model)
        plan = cut(model, coupling, removed)
        for index, width in chosen.items():
            outcome.change(self.name, _title(coupling.groups[index]), _told(coupling.groups[index], width))
        if teacher is not None and batches is not None:
            self._recover(model, teacher, coupling, plan, batches, context, outcome)
        else:
            why = "recover is off" if not self.recover else "there is no calibration data"
            outcome.refuse("least-squares", _name(model), f"nothing was refitted: {why}")
        gone = sum(len(channels) for channels in removed.values())
        after = _parameters(model)
        outcome.numbers |= {
            "channels removed": float(gone),
            "share of prunable channels removed": gone / sum(g.channels for g in coupling.groups if not g.frozen),
            "parameters removed": float(before - after),
            "share of parameters removed": (before - after) / max(before, 1),
        }
        return outcome

    def weaker(self) -> PruneChannels | None:
        """The same with three quarters of the ratio, down to 5 %."""
        ratio = round(self.ratio * 0.75, 4)
        return self.model_copy(update={"ratio": ratio}) if ratio >= _WEAKEST else None

    # ---------------------------------------------------------------------------------------------------- choosing

    def _exclude(self, coupling: Coupling) -> None:
        for group in coupling.groups:
            for node in group.makers:
                pattern = next((p for p in self.exclude if fnmatch.fnmatchcase(node.name, p)), None)
                if pattern is not None and group.frozen is None:
                    group.frozen = f"{node.name!r} is excluded by {pattern!r}"

    def _widths(self, coupling: Coupling, outcome: Outcome) -> dict[int, int]:
        """Channels to keep, by group; refusals for all groups that stay."""
        free: list[tuple[int, int, int]] = []
        for index, group in enumerate(coupling.groups):
            step = width_step(group, self.multiple_of)
            if group.frozen:
                outcome.refuse(self.name, _title(group), f"{_width(group)} stay: {group.frozen}")
            elif group.channels <= max(self._floor(group, step), step):
                outcome.refuse(
                    self.name,
                    _title(group),
                    f"{_width(group)} stay: kept widths are multiples of {self.multiple_of}, not below "
                    f"{self._floor(group, step)}",
                )
            else:
                free.append((index, group.channels, step))
        kept = choose_widths([(n, step) for _, n, step in free], self.ratio, self.min_channels)
        chosen = {}
        for (index, channels, _), width in zip(free, kept, strict=True):
            if width < channels:
                chosen[index] = width
            else:
                group = coupling.groups[index]
                outcome.refuse(
                    self.name,
                    _title(group),
                    f"{_width(group)} stay: the nearest width that is a multiple of {self.multiple_of} is its own",
                )
        return chosen

    def _floor(self, group: Group, step: int) -> int:
        return -(-min(self.min_channels, group.channels) // step) * step

    def _least_important(self, group: Group, count: int, moments: dict[int, Moments]) -> NDArray[np.int64]:
        gone = obs_removal(group, count, moments) if moments else None
        return np.argsort(weight_norms(group), kind="stable")[:count] if gone is None else gone

    def _criterion_moments(
        self,
        model: Model,
        coupling: Coupling,
        chosen: dict[int, int],
        batches: Callable[[], Iterable[Feed]] | None,
        seed: int,
    ) -> dict[int, Moments]:
        if self.criterion != "obs" or batches is None:
            return {}
        nodes = [layer.node for index in chosen for layer, _ in readers(coupling.groups[index])]
        unique = list({id(node): node for node in nodes}.values())
        return input_moments(model, unique, batches(), per_sample=self.rows_per_sample, seed=seed)

    # -------------------------------------------------------------------------------------------------- recovering

    def _batches(self, context: Context) -> Callable[[], Iterable[Feed]] | None:
        data = context.calibration
        if data is None:
            return None
        part = data.take(self.max_samples)

        def batches() -> Iterator[Feed]:
            yield from islice(part.batches(_BATCH), self.max_samples)

        return batches

    def _recover(
        self,
        model: Model,
        teacher: Model,
        coupling: Coupling,
        plan: Cut,
        batches: Callable[[], Iterable[Feed]],
        context: Context,
        outcome: Outcome,
    ) -> None:
        from onnxslim.passes._least_squares import recover

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
            seed=context.seed,
            progress=context.progress,
        )
        done = [refit for refit in refits if refit.why is None]
        for refit in refits:
            if refit.why is not None:
                outcome.refuse("least-squares", refit.node.name, f"was not refitted: {refit.why}")
        for refit in done:
            outcome.change(
                "least-squares",
                refit.node.name,
                f"relative error of its output {refit.before:.3g} -> {refit.after:.3g}",
            )
        outcome.numbers["layers refitted"] = float(len(done))


def width_step(group: Group, multiple_of: int) -> int:
    """By how many channels a group may shrink, so that all axes of its weights stay multiples of ``multiple_of``."""
    step = 1
    for member in group.weights:
        step = math.lcm(step, multiple_of // math.gcd(multiple_of, member.positions.shape[1]))
    return step


def choose_widths(groups: list[tuple[int, int]], ratio: float, min_channels: int = 1) -> list[int]:
    """Channels to keep of each ``(channels, step)``: multiples of the step, in all as near to the ratio as they come.

    What rounding gives one group too much, the next gets less (error diffusion), within its own limits: at least one
    step and ``min_channels``, at most all channels, which need not be a multiple.
    """
    kept = []
    carry = 0.0
    for channels, step in groups:
        wish = (1 - ratio) * channels + carry
        floor = -(-min(min_channels, channels) // step) * step
        width = max(math.floor(wish / step + 0.5) * step, floor, step)
        if width >= channels or (channels % step and abs(channels - wish) < abs(width - wish)):
            width = channels
        kept.append(width)
        carry = wish - width
        # One group that had no choice must not drag the next ones to an extreme.
        carry = min(max(carry, -step), step)
    return kept


def _parameters(model: Model) -> int:
    seen = {id(t): t for node in model.graph.nodes for t in node.inputs if isinstance(t, gs.Constant)}
    return sum(math.prod(int(n) for n in t.shape) for t in seen.values())


def _nested_layers(model: Model) -> int:
    inner = [graph for graph in model.graphs() if graph is not model.graph]
    return sum(node.op in ("Conv", "ConvTranspose", "Gemm", "MatMul") for graph in inner for node in graph.nodes)


def _name(model: Model) -> str:
    return str(model.graph.name or "graph")


def _title(group: Group) -> str:
    return str(group.makers[0].name or group.makers[0].outputs[0].name)


def _width(group: Group) -> str:
    return f"{group.channels} channels"


def _told(group: Group, width: int) -> str:
    names = [node.name or node.outputs[0].name for node in {id(u.node): u.node for u in group.uses}.values()]
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return f"{group.channels} -> {width} channels: {', '.join(names[:6])}{more}"
