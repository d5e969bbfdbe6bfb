"""Replace a large linear layer by two smaller ones, where its output needs few directions."""

from __future__ import annotations

import fnmatch
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from pydantic import Field

from onnxslim.bodies import bodies
from onnxslim.graph.shapes import infer_shapes
from onnxslim.graph.walk import drop_value_info, hoist_constants
from onnxslim.node_latency import node_latencies
from onnxslim.passes._bias import add_to_bias, bias_of
from onnxslim.passes._factors import Candidate, Factors, factor_nodes, plain_matrix, replace_by_factors, set_product
from onnxslim.passes._ranks import choose_ranks, spectrum
from onnxslim.passes._refit import (
    HELD_BYTES,
    WIDEST,
    Split,
    by_input,
    loss,
    moments_between,
    output_errors,
    refits,
    residuals,
)
from onnxslim.passes._statistics import Moments, input_moments, linear_layer
from onnxslim.passes._trunk import Trunk
from onnxslim.passes.base import Context, Outcome, Pass

if TYPE_CHECKING:
    from onnxslim.model import Model
    from onnxslim.runtime import Feed

__all__ = ["FactorizeLowRank"]

FloatArray = NDArray[np.float64]

NODE_BYTES = 256  # a second node, its weight's entry and its names
_Option = tuple[FloatArray, tuple[FloatArray, FloatArray] | None]  # a weight [G, O, K], its factors where it has them

SMALL = 1024  # weights: a second node costs more time than such a layer can save
GROUP_BYTES = 1 << 30
_TIMED = 4  # ranks of a layer whose factors are run to see what they cost
_CHOICES = 4  # ranks that a layer should have to choose from


class FactorizeLowRank(Pass):
    """Split Conv, Gemm and MatMul layers into two of low rank, under one budget for the whole model.

    A Gemm or MatMul of ``O x K`` becomes ``r x K`` and ``O x r``; a ``k x k`` convolution one with ``r`` outputs and
    then a 1 x 1 convolution. The factors that lose least are found in the metric of the layer's own inputs (calibration
    data), so that the error is exactly the discarded share of its output's variance; ranks are shared out over all
    layers by one Lagrange multiplier so that the summed noise over signal is least for the cost that remains. A layer
    whose factors would not be smaller and quicker stays whole.

    With calibration data every linear layer, whole ones too, is then fitted in order to what the original gave
    (asymmetric least squares, He et al. 2017; for factors: reduced-rank regression), and biases take up the mean.
    Without data it is the plain SVD of the weights, which is much worse: weights say little about which inputs occur.
    """

    name: ClassVar[str] = "factorize-low-rank"
    lossless: ClassVar[bool] = False

    keep: float = Field(
        0.5, gt=0.0, lt=1.0, description="share of the cost of all layers that could be factorised which may remain"
    )
    cost: Literal["macs", "parameters", "latency"] = Field(
        "macs",
        description="what the budget counts: multiply-accumulates, parameters (size), or the time that each layer takes"
        " in ONNX Runtime on one thread of this machine",
    )
    energy: float | None = Field(
        None, gt=0.0, lt=1.0, description="instead of a budget: keep this share of the output variance of every layer"
    )
    min_gain: float = Field(
        0.1, ge=0.0, lt=1.0, description="leave a layer whole unless its factors save this share of its own cost"
    )
    rank_multiple: int = Field(
        8,
        ge=1,
        le=128,
        description="ranks are multiples of this (of half or a quarter of it in layers too narrow for four of them)",
    )
    recovery: Literal["sequential", "none"] = Field(
        "sequential", description="fit layers one after another to the original on calibration data, or not"
    )
    exclude: tuple[str, ...] = Field((), description="patterns (as in a shell) of node or weight names to leave alone")

    def weaker(self, outcome: Outcome) -> Pass | None:
        """Half way from the present budget (or energy) to the whole model."""
        if self.energy is not None:
            return self.model_copy(update={"energy": (1 + self.energy) / 2}) if self.energy < 0.999 else None
        return self.model_copy(update={"keep": (1 + self.keep) / 2}) if self.keep < 0.9 else None

    def run(self, model: Model, context: Context) -> Outcome:
        """Choose ranks, fit, and put two nodes in the place of each chosen one; each body has its own budget.

        Raises:
            ModelError: the model does not run on the calibration feeds.
        """
        outcome = Outcome()
        hoist_constants(model)
        candidates = list(self._candidates(model, outcome))
        feeds = context.calibration
        if candidates and feeds is None:
            outcome.refuse(
                "calibration", model.graph.name, "no calibration data: plain SVD of the weights, nothing is refitted"
            )
        self._measure(model, context, candidates, outcome)
        chosen = self._choose(candidates, outcome)
        if chosen:
            self._fit_and_replace(model, context, candidates, chosen, outcome)
            drop_value_info(model)
        for body in bodies(model, context.calibration, partial(outcome.refuse, self.name)):
            inside = Context(calibration=body.calibration, seed=context.seed, progress=context.progress)
            _include(outcome, self.run(body.model, inside))
        if not outcome.changes and not outcome.refusals:
            outcome.refuse(self.name, model.graph.name, "no Conv, Gemm or MatMul with a constant weight")
        return outcome

    # ---------------------------------------------------------------------------------------------------- candidates

    def _candidates(self, model: Model, outcome: Outcome) -> Iterator[Candidate]:
        """The layers that can be split, in graph order; the others with reasons."""
        exported = {id(tensor) for graph in model.graphs() for tensor in graph.outputs}
        for node in model.graph.nodes:
            if not _may_be_split(node):
                continue
            weights = [t for t in node.inputs[:2] if isinstance(t, gs.Constant)]
            if len(weights) != 1 or np.dtype(weights[0].dtype) not in (np.float32, np.float16, np.float64):
                if node.op != "MatMul" or weights:
                    outcome.refuse("low-rank", node.name, "its weight is no floating-point initializer")
                continue
            weight = weights[0]
            if reason := self._unfit(node, weight, id(weight) in exported):
                outcome.refuse("low-rank", node.name, reason)
                continue
            layer = linear_layer(node)
            if layer is not None:
                yield Candidate(node, weight, layer.matrices()[0], layer)
            else:
                yield Candidate(node, weight, plain_matrix(node, weight), None)
        for function in model.graph.functions:
            if any(map(_may_be_split, function.nodes)):
                outcome.refuse("low-rank", function.name, "layers inside a function: every call would change")

    def _unfit(self, node: gs.Node, weight: gs.Constant, exported: bool) -> str | None:
        if any(fnmatch.fnmatchcase(name, p) for name in (node.name, weight.name) for p in self.exclude):
            return "excluded by name"
        if node.op == "Conv" and (node.attrs.get("group", 1) != 1 or weight is node.inputs[0]):
            return "grouped convolution: its blocks are small already"
        if node.op == "Gemm" and weight is node.inputs[0]:
            return "its first input is the constant one"
        if node.op != "Conv" and len(weight.shape) != 2:
            return f"its weight has {len(weight.shape)} dimensions"
        if exported or len(weight.outputs) != 1:
            return "its weight has other users: two factors for each would cost more than the one weight they share"
        if not np.isfinite(weight.values).all():
            return "its weight holds values that are not finite"
        return None

    def _measure(self, model: Model, context: Context, candidates: list[Candidate], outcome: Outcome) -> None:
        """Fill in how often each layer is applied to a row, and the spectrum of its output."""
        if not candidates:
            return
        shapes = infer_shapes(model, context.shapes)
        feeds = context.calibration
        if feeds is not None:
            from onnxslim.runtime import Session

            names = sorted({c.node.outputs[0].name for c in candidates})
            seen = Session(model, outputs=names).run(next(iter(feeds)))
            shapes.observe(model.graph, {name: value.shape for name, value in seen.items()})
        for candidate in candidates:
            dims = shapes.shape(candidate.node.outputs[0])
            if dims is not None:
                known = [size if isinstance(size, int) else 1 for size in dims]
                candidate.rows = max(1, math.prod(known) // candidate.matrix.shape[0])
            elif self.cost != "parameters":
                outcome.refuse("macs", candidate.node.name, "the shape of its output is unknown: counted as one row")
            candidate.each = 1.0 if self.cost == "parameters" else float(candidate.rows)
        if self.cost == "latency" and feeds is not None:
            for part in _parts(candidates, lambda candidate: _TIMED * candidate.matrix.nbytes):
                self._time(model, next(iter(feeds)), part)
        elif self.cost == "latency":
            outcome.refuse("latency", model.graph.name, "no time can be measured without calibration data: MACs count")
        if feeds is not None:
            observed = [c for c in candidates if c.layer is not None and c.matrix.shape[1] <= WIDEST]
            trunk = Trunk(model, Split(feeds).fitting, HELD_BYTES)
            for part in _parts(observed, lambda candidate: 8 * candidate.matrix.shape[1] ** 2):
                further = part[-1] is not observed[-1]
                moments = input_moments(trunk, [c.node for c in part], further=further, seed=context.seed)
                for candidate in part:
                    _take_moments(candidate, moments[id(candidate.node)])
        for candidate in candidates:
            if candidate.spectrum is None:
                candidate.spectrum = spectrum(candidate.matrix, None)
                if feeds is not None:
                    outcome.refuse(
                        "calibration", candidate.node.name, "no statistics for this layout or width: plain SVD"
                    )

    def _time(self, model: Model, feed: Feed, candidates: list[Candidate]) -> None:
        """Run layers and factors of some of their ranks side by side, where they are in the model."""
        trial = model.copy()
        twins = {id(node): twin for node, twin in zip(model.graph.nodes, trial.graph.nodes, strict=True)}
        rng = np.random.default_rng(0)
        added: dict[int, dict[int | None, list[gs.Node]]] = {}
        for candidate in candidates:
            ranks = self._ranks(candidate)
            if ranks:
                picked = {ranks[round(place)] for place in np.linspace(0, len(ranks) - 1, _TIMED)}
                twin = twins[id(candidate.node)]
                added[id(candidate)] = {
                    rank: _beside(trial, candidate, twin, rank, rng) for rank in (None, *sorted(picked))
                }
        spent = node_latencies(trial, feed)
        for candidate in candidates:
            for rank, nodes in added.get(id(candidate), {}).items():
                candidate.times[rank] = sum(spent.get(id(node), 0.0) for node in nodes)

    # --------------------------------------------------------------------------------------------------------- ranks

    def _ranks(self, candidate: Candidate) -> list[int]:
        """The ranks at which factors would save enough; ascending."""
        outputs, inputs = candidate.matrix.shape
        dense = outputs * inputs
        if dense < SMALL:
            return []
        itemsize = np.dtype(candidate.weight.dtype).itemsize
        limit = min(
            int((1 - self.min_gain) * dense / (outputs + inputs)),
            (dense - NODE_BYTES // itemsize) // (outputs + inputs),
            min(outputs, inputs),
        )
        step = self.rank_multiple
        while step > 1 and limit < _CHOICES * step and step > self.rank_multiple // 4:
            step = max(1, step // 2)
        return list(range(step, limit + 1, step))

    def _choose(self, candidates: list[Candidate], outcome: Outcome) -> dict[int, int]:
        """The rank of each layer that is to be split, by id of its node."""
        open_to: list[tuple[Candidate, list[int]]] = []
        for candidate in candidates:
            outputs, inputs = candidate.matrix.shape
            ranks = self._ranks(candidate)
            most = (1 - self.min_gain) * candidate.cost(None)
            if cheaper := [rank for rank in ranks if candidate.cost(rank) <= most]:
                open_to.append((candidate, cheaper))
            else:
                gain = "faster" if ranks else "smaller"
                outcome.refuse("low-rank", candidate.node.name, f"no rank makes {outputs} x {inputs} {gain} by enough")
        if not open_to:
            return {}
        errors, costs = [], []
        for candidate, ranks in open_to:
            assert candidate.spectrum is not None
            errors.append([*(_noise(candidate.spectrum.error(rank)) for rank in ranks), 0.0])
            costs.append([candidate.cost(rank) for rank in (*ranks, None)])
        whole = sum(cost[-1] for cost in costs)
        if self.energy is not None:
            enough = _noise(1 - self.energy)
            choice = [next(i for i, e in enumerate(error) if e <= enough) for error in errors]
        else:
            choice = choose_ranks(errors, costs, self.keep * whole)
        remaining = sum(cost[i] for cost, i in zip(costs, choice, strict=True))
        outcome.numbers[f"{self.cost} of candidates before"] = whole
        outcome.numbers[f"{self.cost} of candidates after"] = remaining
        if self.energy is None and remaining > self.keep * whole:
            outcome.refuse(
                "budget", "", f"{self.keep:.0%} of the {self.cost} cannot be reached: {remaining / whole:.0%} remain"
            )
        chosen: dict[int, int] = {}
        for (candidate, ranks), index in zip(open_to, choice, strict=True):
            if index < len(ranks):
                chosen[id(candidate.node)] = ranks[index]
            else:
                outcome.refuse("low-rank", candidate.node.name, "kept whole: other layers lose less for the same cost")
        return chosen

    # --------------------------------------------------------------------------------------------------- replacement

    def _fit_and_replace(
        self, model: Model, context: Context, candidates: list[Candidate], chosen: dict[int, int], outcome: Outcome
    ) -> None:
        split = [candidate for candidate in candidates if id(candidate.node) in chosen]
        fits: dict[int, Factors] = {}
        for candidate in split:
            assert candidate.spectrum is not None
            first, second = candidate.spectrum.factors(candidate.matrix, chosen[id(candidate.node)])
            shift = None if candidate.mean is None else (candidate.matrix - second @ first) @ candidate.mean
            fits[id(candidate.node)] = Factors(first, second, shift)
        whole: dict[int, _Whole] = {}
        if context.calibration is not None and self.recovery == "sequential":
            fits, whole = self._recover(model, context, chosen, fits, outcome)
        layers = {id(node): layer for node in model.graph.nodes if (layer := linear_layer(node)) is not None}
        for key, change in whole.items():
            layer = layers[key]
            name = model.fresh_name(layer.weight.name)
            layer.node.inputs[1] = gs.Constant(name, layer.stored(change.matrices))
            add_to_bias(model, model.graph, layer.node, change.shift)
            outcome.change("refit", layer.node.name, "fitted to the original's output from the inputs that it now gets")
        before = after = macs_before = macs_after = 0
        for candidate in split:
            node, rank = candidate.node, chosen[id(candidate.node)]
            outputs, inputs = candidate.matrix.shape
            assert candidate.spectrum is not None
            lost = candidate.spectrum.error(rank)
            replace_by_factors(model, candidate, fits[id(node)])
            old, new = outputs * inputs, rank * (outputs + inputs)
            before, after = before + old, after + new
            macs_before, macs_after = macs_before + old * candidate.rows, macs_after + new * candidate.rows
            outcome.change(
                "low-rank",
                node.name,
                f"rank {rank} of {min(outputs, inputs)}: {outputs} x {inputs} = {old:,} -> {new:,} parameters "
                f"({new / old:.0%}), {lost:.2%} of its output's variance discarded",
            )
            outcome.numbers["largest variance discarded"] = max(
                outcome.numbers.get("largest variance discarded", 0), lost
            )
        outcome.numbers |= {
            "layers factorised": len(split),
            "parameters before": before,
            "parameters after": after,
            "MACs before": macs_before,
            "MACs after": macs_after,
            "bytes saved": sum(
                (c.matrix.size - chosen[id(c.node)] * sum(c.matrix.shape)) * np.dtype(c.weight.dtype).itemsize
                for c in split
            ),
        }

    def _recover(
        self, model: Model, context: Context, chosen: dict[int, int], fits: dict[int, Factors], outcome: Outcome
    ) -> tuple[dict[int, Factors], dict[int, _Whole]]:
        """Fit all linear layers in order on a copy; what was given where that does not help."""
        assert context.calibration is not None
        teacher, working, bare = model.copy(), model.copy(), model.copy()
        data = Split(context.calibration)
        twins = {id(twin): node for twin, node in zip(working.graph.nodes, model.graph.nodes, strict=True)}
        for twin, node in list(zip(bare.graph.nodes, model.graph.nodes, strict=True)):
            if id(node) in fits and (layer := linear_layer(twin)) is not None:
                set_product(bare, layer, fits[id(node)])
        layers = [
            layer
            for node in working.graph.nodes
            if (layer := linear_layer(node)) is not None
            and len(layer.weight.outputs) == 1
            and bias_of(node, layer.shape[0] * layer.shape[1]) is not None
        ]
        first = next((i for i, layer in enumerate(layers) if id(twins[id(layer.node)]) in chosen), len(layers))
        layers = layers[first:]
        better, whole = dict(fits), {}
        done = 0
        groups = list(by_input(layers))
        beside = residuals(working.graph, groups)
        student, original = (Trunk(each, data.feeds, HELD_BYTES) for each in (working, teacher))
        for group in groups:
            moments = moments_between(student, original, group, data, context.seed, beside)
            for layer, (seen, held) in zip(group, moments, strict=True):
                key = id(twins[id(layer.node)])
                dense = layer.matrices()
                blocks, outputs, _ = layer.shape
                present = bias_of(layer.node, blocks * outputs)
                assert present is not None
                options: list[_Option] = [(matrices, None) for matrices in (dense, *refits(dense, seen))]
                if key in chosen:
                    options = [_split(matrices[0], seen, chosen[key]) for matrices, _ in options]
                matrices, pair = min(options, key=lambda option: loss(option[0], held))
                shift = seen.mean_y.reshape(-1) - np.einsum("gok,gk->go", matrices, seen.mean).reshape(-1) - present
                if not (seen.count and np.isfinite(shift).all()):
                    continue
                if pair is not None:
                    better[key] = Factors(*pair, shift)
                    set_product(working, layer, better[key])
                elif matrices is not dense:
                    whole[key] = _Whole(matrices, shift)
                    layer.weight.values = layer.stored(matrices)
                    add_to_bias(working, working.graph, layer.node, shift)
                done += 1
                context.progress(done, len(layers))
        before, after = output_errors(teacher, [bare, working], data)
        outcome.numbers |= {"output error without recovery": before, "output error with recovery": after}
        if after < before:
            return better, whole
        why = f"it did not help: error of the outputs {after:.3g} with it, {before:.3g} without"
        outcome.refuse("recovery", model.graph.name, why)
        return fits, {}


def _noise(share: float) -> float:
    """Noise over the signal that is left, where a share of a layer's variance is lost: nothing makes up for all."""
    return share / max(1 - share, 1e-6)


def _may_be_split(node: gs.Node) -> bool:
    return node.op in ("Conv", "Gemm", "MatMul") and node.domain in (None, "", "ai.onnx")


def _include(outcome: Outcome, inside: Outcome) -> None:
    """Add what was done in a body: shares and errors are those of the worst graph, all else is summed."""
    outcome.changes += inside.changes
    outcome.refusals += [refusal for refusal in inside.refusals if refusal not in outcome.refusals]
    for key, value in inside.numbers.items():
        join = max if key.startswith(("largest", "output error")) else operator.add
        outcome.numbers[key] = join(outcome.numbers.get(key, 0), value)


@dataclass
class _Whole:
    """A refitted weight ``[G, O, K]`` of a layer that stays whole, and what its bias moves by ``[G * O]``."""

    matrices: FloatArray
    shift: FloatArray


def _damping(moments: Moments) -> float:
    """More for few rows: directions that the data did not show may still occur."""
    return float(1e-4 + 1e-2 * min(1.0, moments.gram.shape[1] / max(moments.count, 1)))


def _take_moments(candidate: Candidate, moments: Moments) -> None:
    """The spectrum of a layer's output; about its mean only where the bias can take up what the mean loses."""
    centred = bias_of(candidate.node, len(candidate.matrix)) is not None
    metric = moments.covariance if centred else moments.second
    candidate.spectrum = spectrum(candidate.matrix, metric[0], _damping(moments))
    candidate.mean = moments.mean[0] if centred else None


def _beside(
    model: Model, candidate: Candidate, twin: gs.Node, rank: int | None, rng: np.random.Generator
) -> list[gs.Node]:
    """Add a layer again, or factors of a rank, made up, which read what its twin in ``model`` reads."""
    result = gs.Variable(model.fresh_name("timed"), candidate.weight.dtype)
    slot = next(slot for slot, tensor in enumerate(candidate.node.inputs) if tensor is candidate.weight)
    if rank is None:
        weight = twin.inputs[slot]
        values = rng.normal(size=weight.shape).astype(weight.dtype)
        inputs = [*twin.inputs]
        inputs[slot] = gs.Constant(model.fresh_name(weight.name), values)
        nodes = [gs.Node(twin.op, model.fresh_name(twin.name), dict(twin.attrs), inputs, [result])]
    else:
        outputs, width = candidate.matrix.shape
        fit = Factors(rng.normal(size=(rank, width)), rng.normal(size=(outputs, rank)), None)
        again = replace(candidate, node=twin, weight=twin.inputs[slot])
        nodes = list(factor_nodes(model, again, fit, [result]))
    model.graph.nodes.extend(nodes)
    model.graph.outputs.append(result)
    return nodes


def _parts(candidates: list[Candidate], size: Callable[[Candidate], int]) -> Iterator[list[Candidate]]:
    """Candidates in parts that fit in memory together, by the bytes that each takes."""
    part: list[Candidate] = []
    held = 0
    for candidate in candidates:
        need = size(candidate)
        if part and held + need > GROUP_BYTES:
            yield part
            part, held = [], 0
        part.append(candidate)
        held += need
    if part:
        yield part


def _split(matrix: FloatArray, moments: Moments, rank: int) -> _Option:
    """The product ``[1, O, K]`` of the best factors of this rank, and the factors."""
    first, second = spectrum(matrix, moments.covariance[0], _damping(moments)).factors(matrix, rank)
    return (second @ first)[None], (first, second)
