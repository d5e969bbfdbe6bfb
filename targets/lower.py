"""ONNX -> Relax -> machine code: the import, our pipeline, and what to say when TVM fails in them."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnxslim.errors import TargetError
from onnxslim.targets._tvm import load_tvm, tvm_target
from onnxslim.targets.bundle import KernelEntry
from onnxslim.targets.catalogue import Target
from onnxslim.targets.link import link_library
from onnxslim.targets.machine import Machine
from onnxslim.targets.prepare import Prepared, opset_of
from onnxslim.targets.tiling import Tiles, Tiling

__all__ = ["Lowered", "Signature", "build_library", "fuse", "import_model", "lower", "output_signature"]

Signature = list[tuple[str, tuple[int | str, ...]]]
"""dtype and sizes of each output, in order."""


@dataclass(frozen=True)
class Lowered:
    """A compiled model.

    Attributes:
        executable: TVM's, in memory; its entry takes the weights after the inputs.
        weights: the larger constants.
        kernels: what its kernels are, by name.
        notes: what the user should know.
    """

    executable: Any
    weights: list[np.ndarray]
    kernels: dict[str, KernelEntry]
    notes: list[str] = field(default_factory=list)


class _NodeError(Exception):
    """The importer failed on a node."""

    def __init__(self, op: str, node: str, cause: Exception) -> None:
        super().__init__(str(cause))
        self.op, self.node, self.cause = op, node, cause


def import_model(prepared: Prepared, target: Target) -> Any:
    """Import into Relax for a resolved target; returns the IRModule.

    Raises:
        TargetError: an op cannot be imported; the message names it and its node.
    """
    load_tvm()
    frontend = importlib.import_module("tvm.relax.frontend.onnx.onnx_frontend")
    from tvm import relax

    from onnxslim.targets.import_ops import converters

    ours = converters(Machine.of(target))

    class Importer(frontend.ONNXGraphImporter):  # type: ignore[misc, name-defined]
        """Says at which node it failed, which the stock one prints."""

        def _check_for_unsupported_ops(self, graph: Any) -> None:
            """Nothing: the stock check does not know our converters; coverage.py has made this one."""

        def _convert_subgraph(self, builder: Any, graph: Any) -> Any:
            """A sequence of its own; the stock one puts both branches in front of the If, which computes both."""
            builder._begin_binding_block()
            result = super()._convert_subgraph(builder, graph)
            return relax.SeqExpr([builder._end_block()], result)

        def _convert_operator(self, op_name: str, inputs: Any, attrs: dict[str, Any], opset: int) -> Any:
            try:
                converter = ours.get(op_name)
                made = None if converter is None else converter(self.bb, list(inputs), attrs, opset)
                if made is None:
                    made = super()._convert_operator(op_name, inputs, attrs, opset)
                return self._bound(made)
            except Exception as error:
                raise _NodeError(op_name, str(attrs.get("tvm_custom", {}).get("name", "")), error) from error

        def _bound(self, made: Any) -> Any:
            """A result as a variable of the block that made it: bound when first read, it may be so in one branch."""
            if isinstance(made, relax.Tuple):
                return relax.Tuple([self._bound(each) for each in made.fields])
            return self.bb.emit(made) if isinstance(made, relax.Call | relax.TupleGetItem) else made

    importer = Importer({}, "float32")
    try:
        with contextlib.redirect_stdout(io.StringIO()), _quiet_warnings():
            return importer.from_onnx(prepared.proto.graph, opset_of(prepared.proto))
    except _NodeError as error:
        where = prepared.labels.get(error.node, error.node)
        raise TargetError(f"TVM cannot import {error.op} (node {where}): {_sentence(error.cause)}") from None
    except Exception as error:
        raise TargetError(f"TVM cannot import the model: {_sentence(error)}") from None
    finally:
        # A block that a failure left open would be complained about on the terminal.
        with contextlib.suppress(Exception):
            while importer.bb._end_block() is not None:
                pass


def output_signature(module: Any) -> Signature:
    """What the imported model returns."""
    returned = module["main"].ret_ty
    fields = returned.fields if hasattr(returned, "fields") else [returned]
    return [_describe(entry) for entry in fields]


def _describe(entry: Any) -> tuple[str, tuple[int | str, ...]]:
    if type(entry).__name__ == "ShapeType":
        return "int64", (int(entry.ndim),)
    if getattr(entry, "shape", None) is not None and hasattr(entry.shape, "values"):
        return str(entry.dtype), tuple(_size(size) for size in entry.shape.values)
    return str(entry.dtype), tuple(f"?{axis}" for axis in range(max(int(entry.ndim), 0)))


def _size(size: Any) -> int | str:
    try:
        return int(size)
    except (TypeError, ValueError):
        return str(size)


def fuse(module: Any, target: Target, tiling: Tiling) -> Any:
    """Take Relax as far as :func:`lower` goes before kernels are written: one function for each, its loops TVM's.

    Raises:
        TargetError: TVM fails; one sentence.
    """
    tvm = load_tvm()
    made = tvm_target(target)
    try:
        with _quiet_warnings(), tvm.transform.PassContext(opt_level=3), made:
            return tvm.transform.Sequential(_fusing(tiling))(module)
    except Exception as error:  # TVM raises errors of every type
        raise TargetError(f"TVM cannot compile the model: {_sentence(error)}") from None


def lower(module: Any, target: Target, tiles: Tiles | None = None) -> Lowered:
    """Compile Relax to an executable.

    Args:
        module: Relax.
        target: what for.
        tiles: what tuning found.

    Raises:
        TargetError: TVM fails; one sentence.
    """
    tvm = load_tvm()
    made = tvm_target(target)
    failure = ""
    notes: list[str] = []
    for tiling in (Tiling(Machine.of(target), tiles or {}), None):
        try:
            kernels: dict[str, KernelEntry] = {}
            weights: list[np.ndarray] = []
            with _quiet_warnings(), tvm.transform.PassContext(opt_level=3):
                executable = tvm.compile(module, made, relax_pipeline=_pipeline(made, tiling, kernels, weights))
            return Lowered(executable, weights, kernels, notes)
        except Exception as error:
            # Our loops are legal, but a later step of TVM may still trip over them; its own loops come next.
            failure = _sentence(error)
            notes = [f"compiled with TVM's own loops, many times slower, since ours failed: {failure}"]
    raise TargetError(f"TVM cannot compile the model: {failure}")


def build_library(executable: Any, output: Path, triple: str) -> None:
    """Write the executable as a shared library.

    Raises:
        TargetError: linking fails.
    """

    def link(file_name: str, objects: list[str], *_: Any, **__: Any) -> None:
        link_library(objects, Path(file_name), triple)

    link.output_format = "so"  # type: ignore[attr-defined]
    executable.export_library(str(output), fcompile=link)


def _pipeline(target: Any, tiling: Tiling | None, kernels: dict[str, KernelEntry], weights: list[np.ndarray]) -> Any:
    """What turns operators into loops and calls; spelled out, because TVM's "default" fuses nothing on a CPU.

    Args:
        target: TVM's.
        tiling: tiles for kernels of ours; None for TVM's own.
        kernels: filled with what each kernel is.
        weights: filled with the larger constants.
    """
    tvm = load_tvm()
    from tvm import relax

    from onnxslim.targets.kernel_facts import describing
    from onnxslim.targets.lift_weights import lift_weights

    step = relax.transform
    schedule, math = [], []
    if tiling is not None:
        from onnxslim.targets.schedule import schedule_kernels, write_out_math

        schedule = [schedule_kernels(tiling.machine)]
        math = [write_out_math()]

    @tvm.transform.module_pass(opt_level=0, name="onnxslim")  # type: ignore[untyped-decorator]
    def pipeline(module: Any, _context: Any) -> Any:
        steps = [
            *_fusing(tiling),
            describing(kernels, schedule),
            *math,
            step.ToNonDataflow(),
            step.RemovePurityChecking(),
            step.CallTIRRewrite(),
            step.StaticPlanBlockMemory(),
            step.LowerAllocTensor(),
            step.KillAfterLastUse(),
            step.LowerRuntimeBuiltin(),
            step.ComputePrimValue(),
            step.VMShapeLower(),
            # After it, so that no check of weights comes before each inference.
            lift_weights(weights),
            step.AttachGlobalSymbol(),
        ]
        with target:
            return tvm.transform.Sequential(steps)(module)

    return pipeline


def _fusing(tiling: Tiling | None) -> list[Any]:
    """The part of the pipeline that ends with fused kernels."""
    from tvm import relax

    from onnxslim.targets.outline import outline_branches

    step = relax.transform
    ours: dict[str, Any] = {}
    layout = []
    if tiling is not None:
        from onnxslim.targets.layout import channels_last
        from onnxslim.targets.legalize import legalizations

        ours = legalizations(tiling)
        layout = [channels_last(), step.CanonicalizeBindings(), step.FoldConstant()]
    return [
        relax.backend.DispatchSampling(),
        relax.backend.DispatchSortScan(),
        outline_branches(),
        # An If leaves the importer without dataflow blocks, in which alone fusion works.
        step.ConvertToDataflow(),
        step.CanonicalizeBindings(),
        step.EliminateCommonSubexpr(),
        step.FoldBatchnormToConv2D(),
        step.DecomposeOpsForInference(),
        step.FoldConstant(),
        *layout,
        step.LegalizeOps(ours),
        step.AnnotateTIROpPattern(),
        step.FoldConstant(),
        step.FuseOps(),
        step.FuseTIR(),
        step.DeadCodeElimination(),
        # Reads the loops that TVM made, so it comes before ours.
        step.RewriteDataflowReshape(),
    ]


@contextlib.contextmanager
def _quiet_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _sentence(error: BaseException) -> str:
    """The one line of an error of TVM that says what is wrong."""
    text = str(error).strip()
    unlowered = re.search(r"Op\(relax\.([\w.]+)\)", text)
    if unlowered and "intrinsic" in text:
        return f"relax.{unlowered.group(1)} has no implementation for this target."
    noise = re.compile(r"^\s*(File |\d+: |\[bt\]|Stack trace|Traceback|at |-{3,}|={3,})")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not noise.match(line)]
    if not lines:
        return type(error).__name__
    line = next((line for line in reversed(lines) if "Error" in line or "Check failed" in line), lines[0])
    return line if len(line) <= 300 else line[:297] + "…"
