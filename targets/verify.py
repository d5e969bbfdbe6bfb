"""Whether a compiled model computes what ONNX Runtime computes on the same file."""

from __future__ import annotations

import math
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from onnx import ModelProto

from onnxslim.errors import DataError, TargetError
from onnxslim.model import Model, load
from onnxslim.targets.bundle import LIBRARY, WEIGHTS, Bundle
from onnxslim.targets.catalogue import Target, runs_here
from onnxslim.targets.runtime_libs import runtime_libraries

__all__ = ["Verification", "emulator", "verify"]

# Another order of additions costs a float network about 20 dB of its 140; half precision has 60 to lose from.
_FLOAT_SQNR_DB = {"float64": 80.0, "float32": 80.0, "float16": 35.0, "bfloat16": 25.0}
# In a quantized network a sum that differs in its last bit now and then rounds to the next quantum, and the network
# goes on with that. Two right implementations differ by less than the quantization itself does: some 30 to 45 dB.
_QUANTIZED_SQNR_DB = 22.0
# TVM adds in another order than ONNX Runtime in either of its ways.
_ROUNDING = 4
_EMULATED_FEEDS = 2
_EMULATION_SECONDS = 900


@dataclass(frozen=True)
class Verification:
    """How a bundle compares with ONNX Runtime.

    Attributes:
        status: "verified", "failed", or "compiled, not run".
        ok: whether it was run and agrees; False where it could not be run.
        max_abs_error: the largest difference of any output; None where nothing was run.
        sqnr_db: power of the reference over that of the difference, of the worst output; None where they are equal,
            or nothing was run.
        where: what ran it: "this machine", "qemu-aarch64"; empty where nothing did.
        detail: one sentence on the outcome.
        feeds: how many feeds were compared.
    """

    status: Literal["verified", "failed", "compiled, not run"]
    ok: bool
    max_abs_error: float | None
    sqnr_db: float | None
    where: str
    detail: str
    feeds: int = 0


def verify(
    bundle: Bundle, model: Model | ModelProto | str | Path, feeds: Iterable[Mapping[str, np.ndarray]]
) -> Verification:
    """Run the bundle and ONNX Runtime on every feed and compare all outputs.

    A bundle for a processor that this machine does not have is run under QEMU where that and TVM's runtime for the
    processor are there (a few feeds only: it is slow), and is "compiled, not run" otherwise.

    Quantized models are compared with ONNX Runtime without its graph optimisations, which computes what the file says,
    in float, as the bundle does; and by their signal-to-noise ratio, as single roundings differ.

    Args:
        bundle: what was compiled.
        model: what it was compiled from.
        feeds: inputs that fit the bundle; at least one.

    Raises:
        DataError: there is no feed, or one does not fit.
        ModelError: ONNX Runtime cannot run the model.
    """
    from onnxslim.runtime import Session

    model = load(model)
    quantized = any(node.op == "QuantizeLinear" for graph in model.graphs() for node in graph.nodes)
    where, why_not = _where(bundle.target)
    if not where:
        return Verification("compiled, not run", False, None, None, "", why_not)
    session = Session(model, optimize=not quantized)
    comparison = _Comparison(quantized)
    problem = ""
    count = 0
    for feed in feeds:
        if where != "this machine" and count == _EMULATED_FEEDS:
            break
        try:
            found = bundle.run(feed) if where == "this machine" else _emulate(bundle, feed)
        except TargetError as error:
            return Verification("failed", False, None, None, where, str(error), count)
        expected = session.run(dict(feed))
        differs = comparison.add(expected, found)
        if differs and not problem and not quantized:
            # Numbers near nothing, or sums that cancel, are all rounding: ONNX Runtime shows how much, without its own
            # graph optimisations.
            plain = Session(model, optimize=False).run(dict(feed))
            differs = "" if _is_rounding(expected, found, plain) else differs
        problem = problem or differs
        count += 1
    if not count:
        raise DataError("verifying a bundle takes at least one feed.")
    detail = problem or f"agrees with ONNX Runtime on {count} {'feed' if count == 1 else 'feeds'}: {comparison.summary}"
    return Verification(
        status="failed" if problem else "verified",
        ok=not problem,
        max_abs_error=comparison.max_abs_error,
        sqnr_db=comparison.sqnr_db,
        where=where,
        detail=detail,
        feeds=count,
    )


class _Comparison:
    """Differences, gathered over feeds and outputs."""

    def __init__(self, quantized: bool) -> None:
        self.quantized = quantized
        self.max_abs_error = 0.0
        self._signal: dict[str, float] = {}
        self._noise: dict[str, float] = {}

    @property
    def sqnr_db(self) -> float | None:
        ratios = [_decibel(self._signal[name], noise) for name, noise in self._noise.items() if noise]
        return min(ratios) if ratios else None

    @property
    def summary(self) -> str:
        sqnr = self.sqnr_db
        if sqnr is None:
            return "equal"
        return f"largest difference {self.max_abs_error:.3g}, signal to noise {sqnr:.0f} dB"

    def add(self, expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> str:
        """Take in the outputs of one feed; return what is wrong with them, or an empty string."""
        problems = [self._add_output(name, reference, found[name]) for name, reference in expected.items()]
        return next(filter(None, problems), "")

    def _add_output(self, name: str, reference: np.ndarray, result: np.ndarray) -> str:
        said = f"output {name!r}"
        if reference.dtype != result.dtype or reference.shape != result.shape:
            kinds = [f"{array.dtype} {list(array.shape)}" for array in (result, reference)]
            return f"{said} is {kinds[0]}, ONNX Runtime's is {kinds[1]}"
        if not reference.size:
            return ""
        exact = reference.dtype.kind in "biu"
        wide, narrow = reference.astype(np.float64), result.astype(np.float64)
        finite = np.isfinite(wide)
        if not np.array_equal(wide[~finite], narrow[~finite], equal_nan=True) or not np.isfinite(narrow[finite]).all():
            return f"{said} has NaN or infinity where ONNX Runtime's has not, or the reverse"
        difference = np.where(finite, wide, 0) - np.where(finite, narrow, 0)
        largest = float(np.abs(difference).max())
        self.max_abs_error = max(self.max_abs_error, largest)
        signal, noise = float(np.square(wide[finite]).sum()), float(np.square(difference).sum())
        self._signal[name] = self._signal.get(name, 0.0) + signal
        self._noise[name] = self._noise.get(name, 0.0) + noise
        if exact and not self.quantized:
            return f"{said} differs by up to {largest:g} and should be equal" if noise else ""
        limit = _QUANTIZED_SQNR_DB if self.quantized else _FLOAT_SQNR_DB.get(str(reference.dtype), 80.0)
        ratio = _decibel(signal, noise)
        # Numbers next to nothing are all rounding.
        if ratio < limit and largest > 1e-7:
            return f"{said} differs by up to {largest:.3g}: {ratio:.0f} dB signal to noise, {limit:.0f} are right"
        return ""


def _is_rounding(
    expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], plain: Mapping[str, np.ndarray]
) -> bool:
    """Whether all outputs differ by no more than a few times what two ways of ONNX Runtime differ by."""
    for name, reference in expected.items():
        result = found[name]
        if reference.dtype.kind != "f" or reference.shape != result.shape or not np.isfinite(result).all():
            return False
        wide = reference.astype(np.float64)
        own = np.abs(wide - plain[name]).max(initial=0.0)
        if np.abs(wide - result).max(initial=0.0) > _ROUNDING * own:
            return False
    return True


def _decibel(signal: float, noise: float) -> float:
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


# -------------------------------------------------------------------------------------------------------- elsewhere


def _where(target: Target) -> tuple[str, str]:
    """What can run a target's code here, or an empty string and why nothing can."""
    if runs_here(target):
        return "this machine", ""
    if target.runner != "qemu-aarch64" or platform.machine() == target.machine:
        return "", f"this machine lacks CPU features of {target.name}"
    if emulator(target) is None:
        return "", "code for it runs here with: apt-get install qemu-user libstdc++6-arm64-cross"
    if not runtime_libraries(target.machine):
        return "", f"TVM's runtime for {target.machine} is not here: run `onnxslim targets --fetch {target.name}`"
    return "qemu-aarch64", ""


def emulator(target: Target) -> list[str] | None:
    """The command that runs a program of the target's architecture here; None where there is none."""
    qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    root = Path("/usr/aarch64-linux-gnu")
    if qemu is None or not any((root / "lib").glob("libstdc++.so.*")):
        return None
    listed = subprocess.run([qemu, "-cpu", "help"], capture_output=True, text=True).stdout.split()
    # The very processor, so that an instruction that it lacks is an error.
    return [qemu, "-L", str(root), "-cpu", target.mcpu if target.mcpu in listed else "max"]


def _emulate(bundle: Bundle, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    command = emulator(bundle.target)
    if command is None:
        raise TargetError("QEMU is gone.")
    arrays = bundle.check(feed)
    with tempfile.TemporaryDirectory(prefix="onnxslim-qemu-") as folder:
        place = Path(folder)
        own = (bundle.path / name for name in ("run", LIBRARY, WEIGHTS))
        for file in (*own, *runtime_libraries(bundle.target.machine)):
            (place / file.name).symlink_to(file.resolve())
        names = []
        for index, array in enumerate(arrays):
            names.append(str(place / f"in{index}.npy"))
            np.save(names[-1], array)
        line = [*command, str(bundle.path.resolve() / "run"), folder, folder, "--threads", "1", *names]
        try:
            done = subprocess.run(line, capture_output=True, text=True, timeout=_EMULATION_SECONDS)
        except subprocess.TimeoutExpired:
            raise TargetError(f"under QEMU it takes longer than {_EMULATION_SECONDS} s and was stopped.") from None
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise TargetError(f"under QEMU it fails: {lines[-1] if lines else f'exit status {done.returncode}'}")
        return {entry.name: np.load(place / f"{index}.npy") for index, entry in enumerate(bundle.outputs)}
