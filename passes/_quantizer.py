"""One graph quantized: calibrated, corrected on part of the data and judged by the rest, then written in int8."""

from __future__ import annotations

import heapq
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxslim.errors import ModelError
from onnxslim.graph.shapes import Shapes, infer_shapes
from onnxslim.graph.walk import drop_value_info
from onnxslim.passes._calibration import Method, Observed, choose_range, draw_steps, observe
from onnxslim.passes._correction import BiasCorrector, Judge
from onnxslim.passes._equalize import Equalization, apply_equalizations, find_equalizations, single
from onnxslim.passes._faster_float import faster_in_float
from onnxslim.passes._placement import ANCHORS, Anchor, Placement, anchor_obstacle, matches, weight_axis
from onnxslim.passes._plan import EqualizedTensor, GraphPlan, StoredArray, StoredCodes, TensorPlan, weights_digest
from onnxslim.passes._qdq import (
    CORRECTED,
    LEVELS,
    Emitter,
    FloatArray,
    TensorCode,
    WeightCodes,
    absorb_gemm_factors,
    chain_code,
    clipped_code,
    code_of_range,
    dequantize_weight,
    gated_code,
)
from onnxslim.passes._rounding import reconstruct, round_stored
from onnxslim.passes._runtimes import RUNTIMES
from onnxslim.passes._saturation import kernels_saturate
from onnxslim.passes._state import handed_on
from onnxslim.passes._weight_only import quantize_stored_weights
from onnxslim.passes.base import Context, Outcome
from onnxslim.runtime import Session

if TYPE_CHECKING:
    from onnxslim.data import Dataset
    from onnxslim.model import Model
    from onnxslim.passes.quantize_static import QuantizeStatic

__all__ = ["Quantizer", "is_one_of"]

_BATCH_BYTES = 64 << 20  # of all activations of one batch: a few sessions hold some of them at a time
_BATCH = 32
_FIT_SHARE = 0.75  # of the calibration data corrects biases; the rest decides whether that is kept
_NEAR = 1.3  # times the least output error: ranges that are worse are not tried with corrected biases
_MOST_FIT, _MOST_HELD = 24, 16  # batches
_TINY_WEIGHT, _TINY_MACS = 512, 6_000
_FEW_WEIGHTS = 0.002  # of all: not worth an error that all that follows sees
_SMALL_ERROR, _LARGE_ERROR = 1e-3, 0.05  # noise over signal of the outputs: no matter; layers are to stay float
_BROKEN_ERROR, _MOST_LEFT = 0.2, 0.25  # up to which error at most this share of the MACs is left in float for accuracy
_CLEARLY = 0.7  # times the error before: what leaving more layers in float has to bring it to
_PAYS_OFF = 0.8  # times the error before: what other scales of channels have to bring it to
_GLANCE, _MAY_PAY_OFF = 4, 0.9  # batches that are observed first, and what they have to bring it to
_METHODS: tuple[Method, ...] = ("mse", "percentile", "minmax")  # of ranges, tried all the way through the model
_COUNTS = (1, 2, 4, 8, 16)  # of layers that stay float
_SENSITIVITY_SECONDS = 60
_SENSITIVITY_FEEDS = 2
_SEEN_STEPS = 16  # of a recurrent layer in one run: what errors add up to by then is most of it, as gates forget


class _Ranges(dict[str, tuple[float, float]]):
    """What codes should cover of each tensor, chosen when it is asked for."""

    def __init__(self, observed: dict[str, Observed], method: Method, percentile: float) -> None:
        super().__init__()
        self._observed, self._method, self._percentile = observed, method, percentile

    def __missing__(self, name: str) -> tuple[float, float]:
        seen = self._observed[name]
        self[name] = choose_range(seen.low, seen.high, seen.histogram, self._method, self._percentile)
        return self[name]


@dataclass
class _Plan:
    """What is written: ranges by tensor, codes of weights and corrections of biases by anchor, and the error of it all.

    Attributes:
        error: noise over signal of the model's output on held-back samples; not known before it was measured.
    """

    ranges: dict[str, tuple[float, float]]
    rounded: dict[str, WeightCodes] = field(default_factory=dict)
    corrections: dict[str, FloatArray] = field(default_factory=dict)
    error: float = math.inf


@dataclass
class Quantizer:
    """One run of the pass over one graph, from observation to emission.

    Attributes:
        data: None where a plan is applied again.
        carried: outputs that the next iteration gets, where the graph is the body of a loop.
        stored: that plan, of an earlier run; afterwards, what this run found.
        types: dtype and rank of the tensors that shape inference knows nothing of.
        kept, precise: the layers that stay float, and those of them whose weights have to.
        stateful: why no layer of the graph is quantized, where recurrent state goes from run to run.
        slow: the layers that run faster in float, and why that is thought.
        few: those of them with so few weights that int8 would not make the file much smaller.
        on_grid: codes of the weights of layers that stay float, where int8 stores them.
        equalized: what was done to channels.
        nodes, tensors, clipped: how many layers and tensors are in int8, and how many of these have values outside.
        macs, quantized: multiply-accumulates of all layers that could be in int8, and of those that are.
        error: of the outputs, on held-back samples.
        split: of the data, where that was looked at.
        spare: whether the tensors of one sample are so large that few should be held at a time.
    """

    options: QuantizeStatic
    model: Model
    data: Dataset | None
    context: Context
    outcome: Outcome
    stored: GraphPlan | None = None
    carried: tuple[str, ...] = ()
    types: dict[str, tuple[np.dtype, int | None]] = field(default_factory=dict)
    observed: dict[str, Observed] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    precise: tuple[str, ...] = ()
    stateful: str | None = None
    slow: dict[str, str] = field(default_factory=dict)
    few: tuple[str, ...] = ()
    on_grid: dict[str, StoredCodes] = field(default_factory=dict)
    equalized: list[Equalization] = field(default_factory=list)
    nodes: int = 0
    tensors: int = 0
    clipped: int = 0
    macs: float = 0.0
    quantized: float = 0.0
    error: float | None = None
    split: _Split | None = None
    spare: bool = False

    def run(self) -> None:
        """Calibrate, correct, and rewrite the model."""
        reasons: dict[str, str] = {}
        if self.data is not None:
            self.stateful = self._unseen_state(next(iter(self.data)))
        self.types = self._unknown_types()
        anchors, shapes = self._anchors(self.model, reasons)
        if not anchors:
            self._refuse(self.model, reasons)
            return
        digest = weights_digest(self.model.graph)
        for anchor in anchors.values():
            if anchor.node.op == "Gemm":
                absorb_gemm_factors(self.model, anchor.node)
        if self.data is None:
            plan = self._restored()
        else:
            try:
                batch = self._observe(self.data, anchors, shapes)
                self.split = split = self._split(self.data, batch)
                if self.options.timed:
                    self.slow = self._faster_in_float(next(iter(self.data)))
                    self.few = self._of_few_weights()
                plan = self._plan(split) if self._place(self.model).anchors else _Plan({})
            except ModelError as error:  # perhaps in int8 only: there may be no kernel for its operator set
                self.outcome.refuse("qdq", "model", f"it does not run where it is to be calibrated: {error}")
                return
            self.stored = self._stored(plan, digest)
        placement = self._place(self.model, reasons)
        self._refuse(self.model, reasons)
        if not placement.anchors:
            return
        self.macs, self.quantized = self._macs(anchors), self._macs(placement.anchors)
        self.nodes, self.tensors = len(placement.anchors), len(placement.carried | placement.fed)
        emitter = self._emitter(self.model, placement, plan)
        self.clipped = self._clipped(placement, emitter.codes)
        self._note(placement, emitter.codes)
        emitter.emit()

    def _restored(self) -> _Plan:
        """The plan that was stored, with channels scaled as it says."""
        stored = self.stored
        assert stored is not None
        for name, tensor in stored.tensors.items():
            self.observed[name] = Observed(tensor.low, tensor.high, tensor.elements)
        self.equalized = [each.equalization() for each in stored.equalized]
        apply_equalizations(self.model, self._place(self.model), self.equalized)
        self.kept, self.precise, self.error = tuple(stored.kept), tuple(stored.precise), stored.error
        self.on_grid = dict(stored.on_grid)
        if self.options.timed:
            self.slow = dict.fromkeys(stored.slow, "it ran faster in float where the plan was made")
            self.few = self._of_few_weights()
        plan = _Plan({name: tensor.covers for name, tensor in stored.tensors.items()})
        anchors = self._place(self.model).anchors
        on_grid: dict[str, WeightCodes] = {}
        for node in self.model.graph.nodes:
            name = node.outputs[0].name if node.outputs else ""
            try:
                if name in stored.on_grid:
                    on_grid[name] = stored.on_grid[name].codes(_weight(node), weight_axis(node))
                if name in anchors and name in stored.corrections:
                    plan.corrections[name] = stored.corrections[name].values()
                if name in anchors and name in stored.rounded:
                    codes, axis = stored.rounded[name], anchors[name].axis
                    if codes.per_channel == (axis is not None):
                        plan.rounded[name] = codes.codes(_weight(node), axis)
            except ValueError as error:
                raise ModelError(f"the plan of layer {name!r} cannot be applied: {error}") from None
        _put(self.model, on_grid)
        return plan

    def _stored(self, plan: _Plan, digest: str) -> GraphPlan:
        """The plan as a record keeps it: all ranges that any runtime may need."""
        anchors = self._place(self.model).anchors
        return GraphPlan(
            digest=digest,
            tensors={
                name: TensorPlan(low=seen.low, high=seen.high, elements=seen.elements, covers=plan.ranges[name])
                for name, seen in (self.observed.items() if plan.ranges or anchors else ())
                if seen.finite
            },
            kept=list(self.kept),
            precise=list(self.precise),
            slow=list(self.slow),
            equalized=[EqualizedTensor.of(each) for each in self.equalized],
            corrections={name: StoredArray.of(values) for name, values in plan.corrections.items()},
            rounded={
                name: StoredCodes.of(codes, _weight(anchors[name].node), anchors[name].axis)
                for name, codes in plan.rounded.items()
            },
            on_grid=self.on_grid,
            error=self.error,
        )

    def _observe(self, data: Dataset, anchors: dict[str, Anchor], shapes: Shapes) -> int:
        """See what the tensors that int8 may reach hold, one feed first for their sizes; return the batch to run.

        Tensors that were observed are left out. So are, but for that feed, those that never have a code, and those of
        which it follows from others what they hold: what is not fetched may be fused.
        """
        seen = self.observed
        unseen = [name for name in _floats(self.model.graph, shapes) if name not in seen]
        self.observed = first = seen | observe(self.model, unseen, itertools.islice(data, 1))
        sizes = {name: entry.elements for name, entry in first.items()}
        together = 4 * sum(sizes.values())
        batch = max(1, min(_BATCH, _BATCH_BYTES // max(together, 1)))
        placement = self._place(self.model)
        layers = anchors.keys() | {anchor.node.inputs[0].name for anchor in anchors.values()}  # the float ones, too
        layers &= first.keys()
        reached = placement.reached | layers
        made = {name: (source, mapped) for name, source, mapped in placement.made_from() if name not in seen}
        watched = sorted((placement.carried | placement.fed | layers) - placement.absorbed - made.keys() - seen.keys())
        steps = draw_steps({name: first[name] for name in watched}, len(data))
        draft = self.context.draft(
            weights=weights_digest(self.model.graph), steps=steps, batch=batch, samples=data.samples
        )
        self.spare, progress = together > _BATCH_BYTES, self._progress(data, 0, 60, batch)
        found = observe(self.model, watched, data.batches(batch), steps, progress, draft, spare=self.spare)
        for name, entry in found.items():
            entry.elements = sizes[name]
        self.observed = {name: first[name] for name in reached} | seen | found
        for name, (source, mapped) in made.items():
            self.observed[name] = self.observed[source].mapped(mapped, sizes[name])
        return batch

    @property
    def _reduced(self) -> bool:
        reduce_range = self.options.reduce_range
        if reduce_range == "auto":
            return RUNTIMES[self.options.runtime].saturates and kernels_saturate()
        return reduce_range

    # ---------------------------------------------------------------------------------------------------- placement

    def _anchors(self, model: Model, reasons: dict[str, str] | None) -> tuple[dict[str, Anchor], Shapes]:
        """The Conv, Gemm and MatMul nodes of the main graph whose weight can be quantized with its input."""
        shapes = infer_shapes(model, self.context.shapes, self.types)
        carried = self._carried(model, shapes)
        anchors: dict[str, Anchor] = {}
        for node in model.graph.nodes:
            if node.op not in ANCHORS or node.domain or not node.outputs or len(node.inputs) < 2:
                continue
            name = node.outputs[0].name
            reason = "it is excluded" if matches(node, self.options.exclude) else anchor_obstacle(node, shapes)
            if name in self.kept:
                reason = "it is among the layers that add most error"
            if id(node) in carried:
                reason = "its result goes on to the next iteration, where small errors add up"
            reason = self.stateful or reason
            if reason is None:
                axis = weight_axis(node) if self.options.per_channel else None
                anchors[name] = Anchor(name, node, axis, len(node.inputs[1].shape))
            elif reasons is not None:
                reasons[name] = reason
        return anchors, shapes

    def _unseen_state(self, feed: dict[str, np.ndarray]) -> str | None:
        """Why the graph stays float where state goes from run to run; None where a run is long enough to judge by."""
        node = handed_on(self.model.graph)
        if node is None:
            return None
        name = node.inputs[0].name
        try:
            sequence = feed[name] if name in feed else Session(self.model, outputs=[name]).run(feed)[name]
        except ModelError as error:
            return f"it does not run where it is to be calibrated: {error}"
        if sequence.shape[node.attrs.get("layout", 0)] >= _SEEN_STEPS:
            return None
        state = node.name or node.outputs[1].name
        why = f"the state of {node.op} {state!r} goes from run to run, where small errors add up"
        return f"{why}; samples of fewer than {_SEEN_STEPS} steps do not show it"

    def _unknown_types(self) -> dict[str, tuple[np.dtype, int | None]]:
        """Dtype and rank of what shape inference does not know, as behind operators that ONNX does not define."""
        shapes = infer_shapes(self.model, self.context.shapes)
        made = (tensor for node in self.model.graph.nodes for tensor in node.outputs if not tensor.is_empty())
        unknown = [tensor.name for tensor in made if shapes.dtype(tensor) is None]
        if not unknown:
            return {}
        try:
            specs = Session(self.model, outputs=unknown, optimize=False).outputs
        except ModelError:  # there may be no kernel for an operator: what it makes stays unknown
            return {}
        tensors = [specs[name] for name in unknown if specs[name].kind == "tensor" and specs[name].dtype != np.void]
        return {spec.name: (spec.dtype, None if spec.shape is None else len(spec.shape)) for spec in tensors}

    def _carried(self, model: Model, shapes: Shapes) -> set[int]:
        """The nodes, by id, that numbers come from which the next iteration of a loop starts with."""
        found: set[int] = set()
        stack = [t for t in model.graph.outputs if t.name in self.carried and shapes.dtype(t) == np.float32]
        while stack:
            for node in stack.pop().inputs:
                if id(node) not in found:
                    found.add(id(node))
                    stack += node.inputs
        return found

    def _place(self, model: Model, reasons: dict[str, str] | None = None) -> Placement:
        """Solve the placement on ``model``, which has the tensors of the observed one."""
        anchors, shapes = self._anchors(model, reasons)
        banned = {
            name
            for name, entry in self.observed.items()
            if entry.elements and not (entry.finite and max(-entry.low, entry.high) <= self.options.max_range)
        }
        made = (tensor for node in model.graph.nodes for tensor in node.outputs)
        unseen = {tensor.name for tensor in (*model.graph.inputs, *made)} - set(self.observed)
        small = {name for name, anchor in anchors.items() if self._tiny(anchor)}
        usable = {name: anchor for name, anchor in anchors.items() if name not in small | self.slow.keys()}
        elements = {name: entry.elements for name, entry in self.observed.items()}
        carries = RUNTIMES[self.options.runtime].carries
        placement = Placement(model.graph, shapes, elements, banned | unseen, usable, self.options.exclude, carries)
        if reasons is not None:
            for name in anchors.keys() - placement.anchors.keys():
                reasons[name] = (
                    "it is too small to gain"
                    if name in small
                    else self.slow.get(name)
                    or ("what clips its result keeps kernels from being fused" if name in placement.unfusable else "")
                    or f"its input or output is not finite or reaches beyond {self.options.max_range:g}"
                )
        return placement

    def _refuse(self, model: Model, reasons: dict[str, str]) -> None:
        """Say of every node that stays float why it does."""
        nodes = {node.outputs[0].name: node for node in model.graph.nodes if node.outputs}
        for name, reason in reasons.items():
            self.outcome.refuse("qdq", nodes[name].name or name, f"{nodes[name].op}: {reason}")
        for function in model.graph.functions:
            for node in function.nodes:
                if node.op in ANCHORS and not node.domain:
                    label = node.name or node.outputs[0].name
                    why = f"{node.op}: it is in a function, where activations are not observed"
                    self.outcome.refuse("qdq", label, why)

    def _tiny(self, anchor: Anchor) -> bool:
        weight = anchor.node.inputs[1]
        return int(np.prod(weight.shape)) < _TINY_WEIGHT and self._macs({anchor.name: anchor}) < _TINY_MACS

    def _faster_in_float(self, feed: dict[str, np.ndarray]) -> dict[str, str]:
        """The layers without which int8 runs faster on this machine, and why; none where it does not."""
        plan = _Plan(self._ranges("minmax"))  # times do not depend on ranges

        def written(slow: tuple[str, ...]) -> tuple[Model, Placement]:
            return replace(self, slow=dict.fromkeys(slow, ""))._written(plan)

        return faster_in_float(self.model, self._place(self.model), written, feed, spare=self.spare)

    def _of_few_weights(self) -> tuple[str, ...]:
        """The slow layers, those with the fewest weights first, that make a small share of all weights together."""
        sizes = {
            node.outputs[0].name: int(np.prod(node.inputs[1].shape))
            for node in self.model.graph.nodes
            if node.op in ANCHORS and node.outputs and isinstance(node.inputs[1], gs.Constant)
        }
        slow = sorted(self.slow.keys() & sizes.keys(), key=lambda name: (sizes[name], name))
        together = itertools.accumulate(sizes[name] for name in slow)
        most = _FEW_WEIGHTS * sum(sizes.values())
        return tuple(name for name, size in zip(slow, together, strict=True) if size <= most)

    def _macs(self, anchors: dict[str, Anchor]) -> float:
        total = 0.0
        for name, anchor in anchors.items():
            weight = anchor.node.inputs[1]
            channels = weight.shape[weight_axis(anchor.node)]
            entry = self.observed.get(name)
            total += (entry.elements if entry else 0) * int(np.prod(weight.shape)) / max(channels, 1)
        return total

    # -------------------------------------------------------------------------------------------------- calibration

    def _plan(self, split: _Split) -> _Plan:
        """The plan with the least output error on held-back samples, and the layers that it leaves in float."""
        options = self.options
        methods: tuple[Method, ...] = _METHODS if options.calibration == "auto" else (options.calibration,)
        judged = (options.equalize, options.bias_correction, options.reconstruct, options.keep_float)
        if len(methods) == 1 and not any(judged):
            return _Plan(self._ranges(methods[0]))
        judge = self._judge(split.held())
        plans = self._judged(judge, {method: self._ranges(method) for method in methods})
        plans = self._equalized(judge, split, plans)
        wanted = options.keep_float
        if isinstance(wanted, int) and wanted:
            self.kept = tuple(itertools.islice(self._ranked(judge, plans), wanted))
            plans = self._judged(judge, {method: plan.ranges for method, plan in plans.items()})
        self.context.progress(75, 100)
        corrector = self._corrector(split)
        method, best = self._corrected_best(judge, split, plans, corrector)
        if wanted == "auto" and best.error >= _LARGE_ERROR:
            method, best = self._relieved(judge, split, plans, corrector, (method, best))
        if (self.kept or self.slow) and options.weight_only:
            self._store_float(judge, split, best)
        self.error = best.error
        if len(methods) > 1:
            self.outcome.change("calibration", "model", f"ranges by {method}, which has the least output error")
        why = "it does not lower the output error on held-back samples" if split.honest else "there is one feed only"
        for wanted, found, rule in (
            (options.bias_correction, best.corrections, "bias correction"),
            (options.reconstruct, best.rounded, "reconstruction of weights"),
        ):
            if wanted and not found:
                self.outcome.refuse(rule, "model", why)
        return best

    def _corrected_best(
        self, judge: Judge, split: _Split, plans: dict[Method, _Plan], corrector: BiasCorrector | None
    ) -> tuple[Method, _Plan]:
        """The best of the plans with corrected biases and rounded weights, and how its ranges were chosen."""
        # Corrections may turn the order of two methods round, but not where one is far worse. Few feeds tell that, and
        # whether more are worth it.
        near = _near(plans)
        first = {method: self._corrected(judge, corrector, plan, split.few) for method, plan in near.items()}
        method = min(first, key=lambda method: first[method].error)
        rounded = self._rounded(split, plans[method])
        found = [plans[method]]
        if rounded is not None:
            rounded.error = judge.error(self._emitted(rounded))
            found.append(self._corrected(judge, corrector, rounded))
        if first[method].corrections and (rounded is None or found[-1].error >= first[method].error):
            found.append(self._corrected(judge, corrector, plans[method]))
        return method, min(found, key=lambda plan: plan.error)

    def _judged(self, judge: Judge, ranges: Mapping[Method, dict[str, tuple[float, float]]]) -> dict[Method, _Plan]:
        """A plan for each method, and its error."""
        plans = {method: _Plan(chosen) for method, chosen in ranges.items()}
        for plan in plans.values():
            plan.error = judge.error(self._emitted(plan))
        return plans

    def _equalized(self, judge: Judge, split: _Split, plans: dict[Method, _Plan]) -> dict[Method, _Plan]:
        """The plans after channels were moved and scaled, where that lowers the output error."""
        before = _least(plans)
        if not self.options.equalize or before < _SMALL_ERROR:
            return plans
        symmetric = RUNTIMES[self.options.runtime].symmetric
        placement = self._place(self.model)
        found = find_equalizations(self.model, placement, split.fit(), symmetric=symmetric, spare=self.spare)
        if not found:
            self.outcome.refuse("equalization", "model", "the channels of no tensor would gain from other scales")
            return plans
        trial = replace(self, model=self.model.copy())
        changed = apply_equalizations(trial.model, trial._place(trial.model), found)
        best = min(plans, key=lambda method: plans[method].error)
        glance = split.data.take(_GLANCE * split.batch)
        for data, methods, enough in ((glance, [best], _MAY_PAY_OFF), (split.data, list(plans), _PAYS_OFF)):
            trial.observed = {name: seen for name, seen in self.observed.items() if name not in changed}
            trial._observe(data, *trial._anchors(trial.model, None))
            tried = trial._judged(judge, {method: trial._ranges(method) for method in methods})
            if _least(tried) > enough * before:
                why = f"the output error on held-back samples would be {_least(tried):.3g}, not {before:.3g}"
                self.outcome.refuse("equalization", "model", why)
                return plans
        apply_equalizations(self.model, self._place(self.model), found)
        self.observed = trial.observed
        self.equalized = found
        return tried

    def _relieved(
        self,
        judge: Judge,
        split: _Split,
        plans: dict[Method, _Plan],
        corrector: BiasCorrector | None,
        found: tuple[Method, _Plan],
    ) -> tuple[Method, _Plan]:
        """What was found, or the same with those layers in float that add most error, where few of them are enough."""
        error = found[1].error
        corrected = error / _least(plans)
        anchors, _ = self._anchors(self.model, None)
        ranked = self._ranked(judge, plans)
        most = _MOST_LEFT * self._macs(anchors) if error < _BROKEN_ERROR else math.inf
        ranges = {method: plan.ranges for method, plan in _near(plans).items()}
        chosen: tuple[str, ...] = ()
        last = _least(plans)
        for count in _COUNTS:
            more = tuple(itertools.islice(ranked, count - len(self.kept)))
            self.kept += more
            if not more or self._macs({name: anchors[name] for name in self.kept}) > most:
                break
            tried = self._judged(judge, ranges)
            if last <= _least(tried) < _BROKEN_ERROR:
                break  # what the few samples say that layers are tried on does not hold for others
            last = _least(tried)
            if last <= _CLEARLY * _least(plans):
                plans, chosen = tried, self.kept
                if corrected * last < _LARGE_ERROR:
                    break
        self.kept = chosen
        if chosen:
            again = self._corrected_best(judge, split, plans, corrector)
            if again[1].error <= _CLEARLY * error:
                return again
        self.kept = ()
        return found

    def _store_float(self, judge: Judge, split: _Split, plan: _Plan) -> None:
        """Round the weights of layers that stay float to what int8 can store, but for those where it costs too much.

        Those are sought among the layers that add most error first.
        """
        enough = max(_NEAR * plan.error, _SMALL_ERROR)
        layers = (*self.kept, *(name for name in self.slow if name not in (*self.kept, *self.few)))
        nodes = {node.outputs[0].name: node for node in self.model.graph.nodes if is_one_of(layers, node)}
        rounded = round_stored(self.model, nodes.values(), split.fit, self._sizes(split), seed=self.context.seed)

        def codes_behind(count: int) -> dict[str, WeightCodes]:
            return {name: rounded[name] for name in layers[count:] if name in rounded}

        def tried(count: int) -> float:
            return judge.error(self._emitted_storing(plan, layers[count:], codes_behind(count)))

        count = _fewest_float(len(layers), tried, enough)
        self.precise, codes = layers[:count], codes_behind(count)
        for name, chosen in codes.items():
            self.on_grid[name] = StoredCodes.of(chosen, _weight(nodes[name]), weight_axis(nodes[name]))
        _put(self.model, codes)

    def _emitted_storing(self, plan: _Plan, layers: Collection[str], codes: dict[str, WeightCodes]) -> Model:
        """What is emitted, with the weights of some float layers stored in int8."""
        trial = replace(self, model=self.model.copy())
        _put(trial.model, codes)
        result = trial._emitted(plan)
        quantize_stored_weights(result, lambda node: not is_one_of(layers, node), Outcome())
        return result

    def round_float(self, model: Model, skip: Callable[[gs.Node], bool]) -> tuple[str, ...]:
        """Round weights of the float model to what int8 stores, for what layers give, where that lowers its error.

        Args:
            model: the graph before it was quantized; changed.
            skip: whether a node is to keep its weights.

        Returns:
            The layers whose weights have to stay float: the fewest of ``kept`` with which the error is near its least,
            or no more than that of the int8 model.
        """
        if not (self.split and self.split.honest and (self.kept or self.options.reconstruct)):
            return self.kept
        judge = Judge.of(model, self.split.held())
        layers = [node for node in model.graph.nodes if not skip(node)]
        choices: list[dict[str, WeightCodes]] = [{}]
        if self.options.reconstruct:
            sizes = self._sizes(self.split)
            choices.append(round_stored(model, layers, self.split.fit, sizes, seed=self.context.seed))

        def tried(count: int, codes: dict[str, WeightCodes]) -> float:
            trial = model.copy()
            precise = self.kept[:count]
            _put(trial, {name: chosen for name, chosen in codes.items() if name not in precise})
            quantize_stored_weights(trial, lambda node: skip(node) or is_one_of(precise, node), Outcome())
            return judge.error(trial)

        most = len(self.kept)
        least, best = min(((tried(most, codes), index) for index, codes in enumerate(choices)))
        enough = max(_NEAR * least, _SMALL_ERROR, self.error or 0.0)
        count = _fewest_float(most, lambda count: tried(count, choices[best]), enough)
        _put(model, {name: codes for name, codes in choices[best].items() if name not in self.kept[:count]})
        return self.kept[:count]

    def _rounded(self, split: _Split, plan: _Plan) -> _Plan | None:
        """The plan with weights rounded for what layers give; None where that is not wanted, or cannot be judged."""
        if not (self.options.reconstruct and split.honest):
            return None
        emitter = self._emitter(self.model, self._place(self.model), plan)
        centred = self.options.bias_correction
        rounded = reconstruct(emitter, split.fit, self._sizes(split), centred=centred, seed=self.context.seed)
        return _Plan(plan.ranges, rounded)

    def _sizes(self, split: _Split) -> dict[str, int]:
        """Bytes that a batch takes of each tensor."""
        return {name: 4 * entry.elements * split.batch for name, entry in self.observed.items()}

    def _ranges(self, method: Method) -> _Ranges:
        return _Ranges(self.observed, method, self.options.percentile)

    def _codes(self, placement: Placement, ranges: dict[str, tuple[float, float]]) -> dict[str, TensorCode]:
        """The code of every tensor that carries one."""
        codes: dict[str, TensorCode] = {}
        symmetric = RUNTIMES[self.options.runtime].symmetric
        for name in _own(placement):
            low, high = ranges[name]
            chain = placement.chains.get(name)
            codes[name] = chain_code(chain, low, high) if chain else code_of_range(low, high, symmetric=symmetric)
        turned = {n: chain for n, chain in placement.chains.items() if chain.source.name not in placement.absorbed}
        for chain in turned.values():
            source = chain.source.name
            if chain.b > 0 and source in codes and source not in placement.chains:
                codes[source] = gated_code(chain, *ranges[source], alone=placement.only_gated(chain))
        _share_concat(placement, codes)
        for node in placement.graph.nodes:
            name = node.outputs[0].name if node.outputs else ""
            if name in turned:
                codes[name] = clipped_code(turned[name], codes[turned[name].source.name].read) or codes[name]
            elif name in placement.propagators and placement.propagators[name].kind != "arithmetic":
                read = codes[node.inputs[0].name].read
                for tensor in node.outputs:
                    codes[tensor.name] = TensorCode(read, read)
        return codes

    def _progress(self, data: Dataset, start: int, end: int, batch: int) -> _Progress:
        return _Progress(self.context, start, end, max(1, -(-data.samples // batch)))

    # --------------------------------------------------------------------------------------------------- correction

    def _emitter(self, model: Model, placement: Placement, plan: _Plan) -> Emitter:
        runtime = RUNTIMES[self.options.runtime]
        codes = self._codes(placement, plan.ranges)
        return Emitter(model, placement, codes, plan.corrections, plan.rounded, self._reduced, runtime)

    def _emitted(self, plan: _Plan) -> Model:
        return self._written(plan)[0]

    def _written(self, plan: _Plan, probes: dict[str, tuple[str, str]] | None = None) -> tuple[Model, Placement]:
        """A copy of the model with the plan written into it, and the placement, whose nodes are those of the copy."""
        result = self.model.copy()
        placement = self._place(result)
        emitter = self._emitter(result, placement, plan)
        emitter.probes = probes
        emitter.emit()
        drop_value_info(result)
        return result, placement

    def _judge(self, feeds: Iterable[dict[str, np.ndarray]]) -> Judge:
        # What is not written for this processor's kernels must not be judged by their saturation.
        return Judge.of(self.model, feeds, fused=self._reduced or not kernels_saturate())

    def _split(self, data: Dataset, batch: int) -> _Split:
        """Which batches correct, and which judge; at least one of each where there are two feeds."""
        feeds = sum(1 for _ in data.batches(batch))
        if feeds < 2:
            batch = max(1, data.samples // 4)
            feeds = sum(1 for _ in data.batches(batch))
        fit = max(1, int(feeds * _FIT_SHARE))
        return _Split(data, batch, fit, feeds)

    def _corrector(self, split: _Split) -> BiasCorrector | None:
        """What finds corrections of biases; None where there are none, or it is not wanted, or cannot be judged."""
        ops = {anchor.node.op for anchor in self._place(self.model).anchors.values()}
        if not (self.options.bias_correction and split.honest and ops & CORRECTED):
            return None
        watched = self.model.copy()
        return BiasCorrector(watched, self._place(watched), split.fit, spare=self.spare)

    def _corrected(self, judge: Judge, corrector: BiasCorrector | None, plan: _Plan, most: int | None = None) -> _Plan:
        """The plan with biases corrected on so many feeds; as it is where they do not lower its error."""
        if corrector is None:
            return plan
        probes: dict[str, tuple[str, str]] = {}
        probed, _ = self._written(plan, probes)
        if not probes:
            return plan
        found = corrector.corrections(probed, probes, most)
        trial = replace(plan, corrections={name: single(values) for name, values in found.items()})
        trial.error = judge.error(self._emitted(trial))
        return min(plan, trial, key=lambda plan: plan.error)

    def _ranked(self, judge: Judge, plans: dict[Method, _Plan]) -> Iterator[str]:
        """The layers one by one, those first that raise the output error most when they alone are quantized.

        Noise adds up: no layer of a part of the network adds more than all of it. So the worst part is halved until it
        is a layer, and what was asked for takes a few tries, not one for each layer.
        """
        judge = judge.strictest(_SENSITIVITY_FEEDS, self._emitted(min(plans.values(), key=lambda plan: plan.error)))
        names = tuple(self._place(self.model).anchors)
        plan = _Plan(self._ranges("percentile"))
        spent = 0.0

        def error(part: tuple[str, ...]) -> float:
            alone = replace(self, kept=tuple(name for name in names if name not in part))
            return judge.error(alone._emitted(plan))

        parts = [(-math.inf, names)]
        while parts and spent < _SENSITIVITY_SECONDS:
            started = time.monotonic()
            _, part = heapq.heappop(parts)
            if len(part) == 1:
                yield part[0]
                continue
            for half in (part[: len(part) // 2], part[len(part) // 2 :]):
                heapq.heappush(parts, (-error(half), half))
            spent += time.monotonic() - started
        if parts:
            left = sum(len(part) for _, part in parts)
            why = f"{_SENSITIVITY_SECONDS} s did not do to find more of the layers that add most error: {left} are left"
            self.outcome.refuse("sensitivity", "model", why)

    def _clipped(self, placement: Placement, codes: dict[str, TensorCode]) -> int:
        """How many tensors have values outside of their code."""
        count = 0
        for name in _own(placement):
            code, entry = codes[name].read, self.observed[name]
            low, high = code.scale * (-0.5 - code.zero), code.scale * (LEVELS + 0.5 - code.zero)
            count += entry.low < low or entry.high > high
        return count

    def _note(self, placement: Placement, codes: dict[str, TensorCode]) -> None:
        for each in self.equalized:
            what = f"its channels are scaled one by one: {each.noise:.2g} times the noise at what reads it"
            self.outcome.change("equalization", each.name, what)
        if self.kept:
            nodes = {node.outputs[0].name: node.name for node in self.model.graph.nodes if node.outputs}
            names = ", ".join(json.dumps(nodes[name] or name) for name in self.kept)
            what = f"the layers that add most error stay float: exclude = [{names}]"
            self.outcome.change("sensitivity", "model", what)
        for name, anchor in placement.anchors.items():
            node = anchor.node
            code = codes[node.inputs[0].name].read
            channels = node.inputs[1].shape[weight_axis(node)]
            scales = f"{channels} weight scales" if anchor.axis is not None else "one weight scale"
            what = f"{node.op} in int8: input step {code.scale:.4g}, zero {code.zero}, {scales}"
            self.outcome.change("qdq", node.name or name, what)
        ops = Counter(propagator.node.op for propagator in placement.propagators.values())
        ops.update(node.op for chain in placement.chains.values() for node in chain.nodes)
        for op, count in sorted(ops.items()):
            self.outcome.change("qdq", op, f"{count} {op} between them run on int8 codes")


@dataclass(frozen=True)
class _Split:
    """The calibration data in two parts: the first ``count`` batches to fit on, the others to judge by."""

    data: Dataset
    batch: int
    count: int
    feeds: int

    @property
    def honest(self) -> bool:
        """Whether the parts are disjoint; a single feed has to serve as both."""
        return self.feeds > self.count

    @property
    def few(self) -> int:
        """How many batches of those to fit on tell two plans apart."""
        return -(-min(self.count, _MOST_FIT) // 3)

    def fit(self) -> Iterator[dict[str, np.ndarray]]:
        """The batches to fit on."""
        return itertools.islice(self.data.batches(self.batch), min(self.count, _MOST_FIT))

    def held(self) -> Iterator[dict[str, np.ndarray]]:
        """The batches to judge by."""
        start = self.count if self.honest else 0
        return itertools.islice(self.data.batches(self.batch), start, start + _MOST_HELD)


@dataclass
class _Progress:
    """Moves the bar from ``start`` to ``end`` percent as batches go by."""

    context: Context
    start: int
    end: int
    batches: int
    done: int = 0

    def __call__(self) -> None:
        self.done += 1
        share = min(1.0, self.done / self.batches)
        self.context.progress(round(self.start + share * (self.end - self.start)), 100)


def _put(model: Model, rounded: Mapping[str, WeightCodes]) -> None:
    """Give layers the weights that codes stand for, but for those that others share."""
    for node in model.graph.nodes:
        name = node.outputs[0].name if node.outputs else ""
        if name in rounded and len(node.inputs[1].outputs) == 1:
            values = dequantize_weight(rounded[name], weight_axis(node))
            node.inputs[1] = gs.Constant(model.fresh_name(node.inputs[1].name), values)


def _fewest_float(most: int, error: Callable[[int], float], enough: float) -> int:
    """How many layers of ``most`` need float weights for an error that is small enough; all where fewer do not do."""
    return next((count for count in (0, *_COUNTS) if count < most and error(count) <= enough), most)


def _weight(node: gs.Node) -> NDArray[np.float32]:
    return np.asarray(node.inputs[1].values, np.float32)


def _least(plans: dict[Method, _Plan]) -> float:
    return min(plan.error for plan in plans.values())


def _near(plans: dict[Method, _Plan]) -> dict[Method, _Plan]:
    """Those plans that what follows may make the best one."""
    least = _least(plans)
    return {method: plan for method, plan in plans.items() if plan.error <= _NEAR * least}


def is_one_of(layers: Collection[str], node: gs.Node) -> bool:
    return bool(node.outputs) and node.outputs[0].name in layers


def _own(placement: Placement) -> list[str]:
    """The tensors with a code of their own, sorted."""
    return [name for name in sorted(placement.carried | placement.fed) if not _inherits(placement, name)]


def _share_concat(placement: Placement, codes: dict[str, TensorCode]) -> None:
    """Give what only a Concat reads the code of its result: the copy is then one of bytes, and rounds once.

    That is the code that a chain behind it wants written where only the chain reads the result.
    """
    wanted = {
        chain.source.name: codes[name].write
        for name, chain in placement.chains.items()
        if chain.source.name in placement.absorbed
    }
    for name, propagator in placement.propagators.items():
        if propagator.node.op != "Concat":
            continue
        for tensor in propagator.node.inputs:
            inherits = _inherits(placement, tensor.name)
            if len(tensor.outputs) == 1 and not inherits and tensor.name not in placement.chains:
                code = wanted.get(name)
                codes[tensor.name] = codes[name] if code is None else TensorCode(code, code)


def _inherits(placement: Placement, name: str) -> bool:
    """Whether a tensor has the code of another: it was moved, not computed."""
    return any(
        propagator.kind != "arithmetic" and any(tensor.name == name for tensor in propagator.node.outputs)
        for propagator in placement.propagators.values()
    )


def _floats(graph: gs.Graph, shapes: Shapes) -> list[str]:
    """The float32 tensors of the main graph that codes may be needed for: all but the constants."""
    names: dict[str, None] = {}
    for tensor in (*graph.inputs, *(tensor for node in graph.nodes for tensor in node.outputs)):
        if tensor.name and shapes.dtype(tensor) == np.float32:
            names[tensor.name] = None
    return list(names)
