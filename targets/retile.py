"""A fused product with another tile: the same kernel over weights in panels of another width, ready to be timed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax
from tvm.ir import Call, GlobalVar, IRModule
from tvm.tirx import PrimFunc, decl_buffer

from onnxslim.targets._tvm import tvm_target
from onnxslim.targets.catalogue import Target
from onnxslim.targets.emit import index, known, load_of, substitute
from onnxslim.targets.fused import FusedKernel, sources
from onnxslim.targets.kernel_product import NOTE, write_product
from onnxslim.targets.kernel_winograd import write_winograd
from onnxslim.targets.legalize import pack
from onnxslim.targets.machine import Machine
from onnxslim.targets.schedule import write_out_math
from onnxslim.targets.tiling import Tile, workload

__all__ = ["Sample", "calls_of", "multiplications", "retiled", "workload_of"]

# Tiles add in the same order up to the compiler's freedom with fused multiply-adds.
_TOLERANCE = 1e-4


def workload_of(kernel: FusedKernel) -> str | None:
    """The workload that the legalization asked a tile for; None where this is no product, or a size is open."""
    if not kernel.steps or NOTE not in kernel.steps[0].notes:
        return None
    product = kernel.steps[0]
    note = json.loads(product.notes[NOTE])
    if "panel" not in note or any(known(size) is None for each in kernel.parameters for size in each.shape):
        return None
    what = {name: value for name, value in note.items() if name not in ("rows", "panel")}
    data = sources(product)[0]
    return workload([int(size) for size in data.shape], [int(size) for size in product.output.shape], **what)


def multiplications(kernel: FusedKernel) -> int:
    """How many a call makes, were it computed by definition; all sizes must be known."""
    return math.prod(int(axis.extent) for axis in kernel.steps[0].axes)


def calls_of(module: Any) -> Counter[str]:
    """How often each function of a Relax module is called, as written; a branch counts like the rest."""
    counts: Counter[str] = Counter()

    def note(call: Call) -> None:
        if call.args and isinstance(call.args[0], GlobalVar):
            counts[str(call.args[0].name_hint)] += 1

    for _, function in module.functions_items():
        if isinstance(function, relax.Function):
            tvm_ffi.structural_walk(function, [(Call, note)])
    return counts


def retiled(kernel: FusedKernel, tile: Tile, machine: Machine) -> FusedKernel:
    """The kernel with another tile, and with weights that are packed for it."""
    product = kernel.steps[0]
    note = json.loads(product.notes[NOTE])
    panel = tile.vectors * machine.lanes()
    weight = sources(product)[1]
    groups = int(note.get("groups", 1))
    panels = groups * math.ceil(int(product.output.shape[-1]) // groups / panel)
    middle = [int(size) for size in weight.shape][1:-1]
    packed = decl_buffer(tuple(map(index, (panels, *middle, panel))), str(weight.dtype), name="weight")
    value = substitute(
        product.value, {}, lambda buffer, place: load_of(packed, *place) if buffer.same_as(weight) else None
    )
    notes = {**product.notes, NOTE: json.dumps({**note, "rows": tile.rows, "panel": panel})}
    return FusedKernel(
        kernel.function,
        tuple(packed if each.same_as(weight) else each for each in kernel.parameters),
        (dataclasses.replace(product, value=value, notes=notes), *kernel.steps[1:]),
    )


class Sample:
    """Made-up arguments for a kernel, on which it runs with any tile."""

    def __init__(self, kernel: FusedKernel, machine: Machine, target: Target) -> None:
        self.kernel, self.machine, self.target = kernel, machine, target
        random = np.random.default_rng(0)
        product = kernel.steps[0]
        self.groups = int(json.loads(product.notes[NOTE]).get("groups", 1))
        self.weight = sources(product)[1]
        middle = [int(size) for size in self.weight.shape][1:-1]
        columns = int(product.output.shape[-1]) // self.groups
        self.weights = random.standard_normal((self.groups, columns, *middle), np.float32) / math.prod(middle) ** 0.5
        self.arguments: list[Any] = [
            None if each.same_as(self.weight) else tvm.runtime.tensor(_made_up(each, random))
            for each in kernel.parameters
        ]
        self.results = [place for place, each in enumerate(kernel.parameters) if kernel.maker(each) is not None]
        self.expected: list[np.ndarray] | None = None

    def call(self, tile: Tile) -> Callable[[], None] | None:
        """The kernel with a tile on the arguments, run once; None where it cannot be compiled or computes otherwise."""
        compiled = self._compile(tile)
        if compiled is None:
            return None
        packed = tvm.runtime.tensor(pack(self.weights, tile.vectors * self.machine.lanes()))
        arguments = [packed if each is None else each for each in self.arguments]

        def run() -> None:
            compiled(*arguments)

        run()
        found = [arguments[place].numpy().copy() for place in self.results]
        if self.expected is None:
            self.expected = found
        same = all(
            np.allclose(each, wanted, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True)
            for each, wanted in zip(found, self.expected, strict=True)
        )
        return run if same else None

    def _compile(self, tile: Tile) -> Any:
        kernel = retiled(self.kernel, tile, self.machine)
        written: PrimFunc | None = write_product(kernel, self.machine) or write_winograd(kernel, self.machine)
        if written is None:
            return None
        try:
            with tvm.transform.PassContext(opt_level=3):
                module = write_out_math()(IRModule({"kernel": written.with_attr("global_symbol", "kernel")}))
                return tvm.compile(module, target=tvm_target(self.target))["kernel"]
        except Exception:  # TVM raises errors of every type, and a tile that it cannot compile is one to leave out
            return None


def _made_up(buffer: Any, random: np.random.Generator) -> np.ndarray:
    shape = [int(size) for size in buffer.shape]
    dtype = np.dtype(str(buffer.dtype))
    values = random.standard_normal(shape) if dtype.kind == "f" else np.zeros(shape)
    return np.asarray(values, dtype)
