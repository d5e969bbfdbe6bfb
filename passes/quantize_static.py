"""Static int8: calibrated activations and per-channel weights, written as QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from pydantic import Field, NonNegativeInt, field_validator

from onnxslim.bodies import bodies
from onnxslim.graph.walk import drop_value_info, hoist_constants, remove_dead_nodes
from onnxslim.passes._absorb import absorb
from onnxslim.passes._calibration import Method
from onnxslim.passes._faster_float import median_latencies
from onnxslim.passes._opset import raise_opset
from onnxslim.passes._placement import matches
from onnxslim.passes._plan import QuantizationPlan, read_plan, record_of
from onnxslim.passes._quantizer import Quantizer, is_one_of
from onnxslim.passes._runtimes import RUNTIMES, RuntimeName
from onnxslim.passes._saturation import kernels_saturate
from onnxslim.passes._threads import one_blas_thread
from onnxslim.passes._weight_only import quantize_stored_weights
from onnxslim.passes.base import Context, Outcome, Pass

if TYPE_CHECKING:
    from onnxslim.data import Dataset
    from onnxslim.model import Model

__all__ = ["QuantizeStatic"]

_OPSET = 13  # the first with per-channel DequantizeLinear
_BROADCAST_OPSET = 7  # the first in which Mul broadcasts as stored weights need it
_KEPT_BYTES = 16 << 20  # of calibration data: read once up to here
_KEPT = (2, 8, 32)  # layers in float, where the budget is broken
_AS_FAST = 0.98  # times float's speed: less than this is more than noise


class QuantizeStatic(Pass):
    """Quantize weights and activations to int8, calibrated on unlabelled data, without float islands.

    Each Conv, Gemm and MatMul with a constant weight becomes ``s_x s_w (q_x - z_x) q_w + b``: activations are uint8
    with one scale and zero a tensor, chosen on the calibration data; weights are int8 with a scale an output channel;
    biases int32. Elementwise and moving ops between them stay in int8 where ONNX Runtime has a kernel that fuses.
    Channels of what layers read are scaled to one size first (cross-layer equalization, SmoothQuant), and biases take
    back the mean shift of rounding (Nagel et al. 2019), where that lowers the output error on calibration data that was
    held back. Layers that make most of a large output error stay float, and a change names them; so do all where
    recurrent state is handed on from run to run, unless calibration samples are sequences long enough to see errors
    add up. Other large weights (recurrent, transposed convolutions, embeddings, in bodies) are stored in int8 and
    computed with in float; so are those of layers that ONNX Runtime, on one thread of this machine, runs faster in
    float (found by a minimum cut over the times of kernels, as codes have to be converted around such layers), and
    all of them where int8 as a whole is no faster.

    Right for convolutional and linear networks; a score that hangs on the small differences between large activations
    may fall, and the guard then asks for :meth:`weaker`. Costs a few runs of the model over the calibration data;
    memory is that of the model and a few batches, however many samples there are.
    """

    name: ClassVar[str] = "quantize-static"
    lossless: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = True

    runtime: RuntimeName = Field("onnxruntime", description="what is to run the file, on which int8 is written to fuse")
    calibration: Literal["auto"] | Method = Field(
        "auto",
        description="how ranges are chosen: mse, minmax, percentile, entropy, or auto: by output error",
    )
    percentile: float = Field(99.99, gt=50, le=100, description="share of values inside the range, for percentile")
    max_samples: int = Field(128, ge=1, description="calibration samples used, at most")
    per_channel: bool = Field(True, description="one weight scale an output channel instead of one a tensor")
    reduce_range: Literal["auto"] | bool = Field(
        "auto",
        description="weights that x86 processors without VNNI multiply exactly, some 7 bits wide; auto: on those",
    )
    reconstruct: bool = Field(True, description="round weights for what each layer gives, not each by itself")
    bias_correction: bool = Field(True, description="let biases take back the mean shift of rounding")
    weight_only: bool = Field(True, description="store the weights that have no integer kernel in int8 as well")
    only_if_faster: bool = Field(
        True,
        description="compute in float what ONNX Runtime is measured here to compute faster so, some layers or all; "
        "weights are stored in int8 all the same",
    )
    equalize: bool = Field(True, description="scale channels between layers such that one step fits all of them")
    exclude: tuple[str, ...] = Field((), description="nodes kept in float: shell patterns of names or ops")
    keep_float: Literal["auto"] | NonNegativeInt = Field(
        "auto", description="how many of the layers that add most error stay float; auto: where the error is large"
    )
    max_range: float = Field(
        1e6, gt=0, description="tensors that reach beyond this, such as masks, are never quantized"
    )
    plan: str | None = Field(
        None, description="a record.json, or its folder: apply the plan that a run kept there again, without data"
    )

    @field_validator("plan")
    @classmethod
    def _readable(cls, path: str | None) -> str | None:
        if path is not None:
            read_plan(path, cls.name)
        return path

    def run(self, model: Model, context: Context) -> Outcome:
        """Quantize ``model`` in place; it is left as it was when the result would not be smaller."""
        outcome = Outcome()
        if context.calibration is None and self.plan is None:
            outcome.refuse(self.name, "model", "there is no calibration data")
            return outcome
        before = model.copy()
        plan, data = None, None
        if self.plan is not None:
            plan = read_plan(self.plan, self.name)
        elif context.calibration is not None:
            data = context.calibration.take(self.max_samples)
        with one_blas_thread():
            runs = self._quantize(model, data, plan, context, outcome)
        outcome.numbers |= _numbers(runs, data)
        found = QuantizationPlan(graphs=[run.stored for run in runs if run.stored is not None])
        precise = {name for run in runs for name in (*run.precise, *run.few)}

        def precisely(node: gs.Node) -> bool:
            return self._excludes(node) or is_one_of(precise, node)

        if outcome.changes and self.timed and context.calibration is not None:
            speed = _speed(before, model, context.calibration)
            if speed < _AS_FAST:
                why = f"int8 ran at {speed:.2f} times the speed of float here; only_if_faster = false writes it anyway"
                outcome = Outcome()
                outcome.refuse("qdq", "model", why)
                _restore(model, before.copy())
                hoist_constants(model)
                # What let int8 hold their weights, rounding them for what they give, is undone as well.
                precise = {name for run in runs for name in run.few} | {name for run in runs[1:] for name in run.kept}
                if self.weight_only and runs:
                    with one_blas_thread():
                        precise |= set(runs[0].round_float(model, precisely))
        if self.weight_only and model.opset >= _BROADCAST_OPSET:
            stored = quantize_stored_weights(model, precisely, outcome)
            outcome.numbers["weights stored in int8 only"] = float(stored)
        size_before, size_after = (_file_size(version) for version in (before, model))
        if outcome.changes and size_after >= size_before:
            why = f"the int8 file would be no smaller ({size_after} bytes, {size_before} before)"
            outcome.changes.clear()
            outcome.numbers.clear()
            outcome.refuse(self.name, "model", why)
        if not outcome.changes:
            _restore(model, before)
            if not outcome.refusals:
                outcome.refuse(self.name, "model", "it has no Conv, Gemm or MatMul with constant float32 weights")
        else:
            remove_dead_nodes(model)
            drop_value_info(model)
            outcome.numbers["share of weights in int8"] = _int8_share(model)
        outcome.plan = found.model_dump(mode="json") if found.graphs else None
        return outcome

    def _quantize(
        self,
        model: Model,
        data: Dataset | None,
        plan: QuantizationPlan | None,
        context: Context,
        outcome: Outcome,
        carried: tuple[str, ...] = (),
    ) -> list[Quantizer]:
        """Write activations and weights in int8 where both can be, in the bodies of If, Loop and Scan too."""
        hoist_constants(model)
        unraised = raise_opset(model, _OPSET)
        if unraised:
            outcome.refuse("qdq", "model", f"{unraised}, and per-channel quantization needs {_OPSET}")
            return []
        absorb(model, self._excludes, carries=RUNTIMES[self.runtime].carries)
        runs: list[Quantizer] = []
        stored = plan.of(model.graph) if plan is not None else None
        if plan is None or stored is not None:
            data = None if data is None else data.in_memory(_KEPT_BYTES)
            runs.append(Quantizer(self, model, data, context, outcome, stored, carried))
            runs[0].run()
        else:
            outcome.refuse("qdq", "model", f"{self.plan} holds no plan for its weights: it is that of another model")
        for index, body in enumerate(bodies(model, data, partial(outcome.refuse, "qdq"))):
            drafts = None if context.drafts is None else context.drafts / str(index)
            inside = replace(context, calibration=body.calibration, shapes={}, drafts=drafts)
            runs += self._quantize(body.model, body.calibration, plan, inside, outcome, body.carried)
        return runs

    def _excludes(self, node: gs.Node) -> bool:
        return matches(node, self.exclude)

    @property
    def timed(self) -> bool:
        """Whether it is measured here what is faster in int8."""
        return self.only_if_faster and self.runtime == "onnxruntime"

    @property
    def foreign(self) -> bool:
        """Int8 for runtimes that do not saturate, where this processor does."""
        return not RUNTIMES[self.runtime].saturates and self.reduce_range is not True and kernels_saturate()

    @property
    def wants_calibration(self) -> bool:
        """A plan is applied without data."""
        return self.plan is None

    @property
    def files(self) -> tuple[Path, ...]:
        """The record of the plan."""
        return () if self.plan is None else (record_of(self.plan),)

    def weaker(self, outcome: Outcome) -> QuantizeStatic | None:
        """The same with more of the layers that add most error in float: 2, 8 or 32; a plan stays what it is."""
        if self.plan is not None:
            return None
        graphs = outcome.plan["graphs"] if outcome.plan else []
        asked = 0 if self.keep_float == "auto" else self.keep_float
        left = max((asked, *(len(graph["kept"]) for graph in graphs)))
        more = next((count for count in _KEPT if count > left), None)
        return None if more is None else self.model_copy(update={"keep_float": more})


def _numbers(runs: list[Quantizer], data: Dataset | None) -> dict[str, float]:
    """Figures for the report, over all graphs."""
    numbers: dict[str, float] = {}
    if errors := [run.error for run in runs if run.error is not None]:
        numbers["output error on held-back samples"] = max(errors)
    if any(run.nodes for run in runs):
        macs = sum(run.macs for run in runs)
        numbers |= {
            "nodes quantized": float(sum(run.nodes for run in runs)),
            "share of MACs quantized (estimate)": sum(run.quantized for run in runs) / macs if macs else 0.0,
            "tensors in int8": float(sum(run.tensors for run in runs)),
            "ranges clipped": float(sum(run.clipped for run in runs)),
            "layers faster in float": float(sum(len(run.slow) for run in runs)),
            "calibration samples": 0.0 if data is None else float(data.samples),
        }
    return numbers


def _restore(model: Model, before: Model) -> None:
    model.graph, model.header = before.graph, before.header


def _speed(before: Model, after: Model, data: Dataset) -> float:
    """How many times faster ``after`` runs on the first feed, one thread, interleaved."""
    float_ms, int8_ms = median_latencies((before, after), next(iter(data)))
    return float_ms / int8_ms


def _int8_share(model: Model) -> float:
    """The share of the elements of all weights, bodies included, that are stored in int8; small tensors aside."""
    sizes: dict[int, tuple[int, bool]] = {}
    for graph in model.graphs():
        for tensor in (tensor for node in graph.nodes for tensor in node.inputs):
            if isinstance(tensor, gs.Constant) and tensor.dtype in (np.int8, np.float32) and len(tensor.shape) > 1:
                sizes[id(tensor)] = int(np.prod(tensor.shape)), tensor.dtype == np.int8
    total = sum(size for size, _ in sizes.values())
    return sum(size for size, int8 in sizes.values() if int8) / total if total else 0.0


def _file_size(model: Model) -> int:
    """Bytes of the model as a file, without writing it."""
    skeleton = model.to_skeleton()
    outside = 0
    for tensor in _tensors(skeleton.graph):
        if tensor.external_data:
            itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            outside += int(np.prod(tensor.dims)) * itemsize
    return int(skeleton.ByteSize()) + outside


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            for body in (attribute.g, *attribute.graphs):
                yield from _tensors(body)
