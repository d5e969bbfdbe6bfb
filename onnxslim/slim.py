"""Lossless simplification of one model: the passes that cannot change a result, each checked against the original."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx

from onnxslim.errors import OutputError
from onnxslim.graph.cost import node_count, parameter_count
from onnxslim.graph.shapes import infer_shapes
from onnxslim.guard import check_lossless
from onnxslim.model import Model, check_not_input, load
from onnxslim.passes import PASSES, Change, Context, Outcome
from onnxslim.record import Check
from onnxslim.runtime import Session

# What one pass finds, another may use: an inlined branch holds constants to fold. A third round never found anything.
_ROUNDS = 2

__all__ = ["SlimRun", "SlimStep", "simplify_model", "slim"]


@dataclass(frozen=True)
class SlimStep:
    """One lossless pass: what it did, whether the guard let it stand, and the model's size in nodes and parameters."""

    name: str
    outcome: Outcome
    checks: list[Check]
    kept: bool
    nodes: int
    parameters: int


@dataclass(frozen=True)
class SlimRun:
    """A simplified model and how it came about."""

    model: Model
    steps: list[SlimStep]


def simplify_model(
    model: Model,
    *,
    model_check: bool = True,
    input_shapes: dict[str, list[int]] | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> SlimRun:
    """Apply every lossless pass to a copy of a model; undo a pass whose result differs from what it was given.

    Args:
        model: left as it is.
        model_check: compare the outputs with ONNX Runtime after each pass, on several inputs and sizes.
        input_shapes: sizes for dynamic inputs, for that comparison only; the graph stays dynamic.
        progress: called as ``progress(what, done, total)``.

    Raises:
        ModelError: the model does not load in ONNX Runtime, and ``model_check`` is on.
    """
    infer_shapes(model, input_shapes)  # refuses sizes for inputs that are not there
    if model_check:
        Session(model)  # what does not load cannot be compared
    steps: list[SlimStep] = []
    current = model.copy()
    kinds = [kind for kind in PASSES.values() if kind.lossless]
    for number in range(_ROUNDS * len(kinds)):
        kind = kinds[number % len(kinds)]
        progress(kind.name, number, _ROUNDS * len(kinds))
        candidate = current.copy()
        checks: list[Check] = []
        try:
            outcome = kind().run(candidate, Context(shapes=input_shapes or {}))
        except Exception as error:  # a bug in one pass costs that pass, not the other one's work
            outcome = Outcome([Change(kind.name, "", "failed half-way")])
            checks = [Check(name="runs", ok=False, detail=f"{type(error).__name__}: {error}")]
        if outcome.modified and model_check and not checks:
            checks = check_lossless(current, candidate, shapes=input_shapes)
        kept = outcome.modified and all(check.ok for check in checks)
        if kept:
            current = candidate
        steps.append(SlimStep(kind.name, outcome, checks, kept, node_count(current), parameter_count(current)))
        if len(steps) >= len(kinds) and not any(step.kept for step in steps[-len(kinds) :]):
            break
    return SlimRun(current, steps)


def slim(
    model: str | Path | bytes | onnx.ModelProto | Model,
    output_model: str | Path | None = None,
    *,
    model_check: bool = True,
    input_shapes: dict[str, list[int]] | None = None,
) -> onnx.ModelProto | None:
    """Simplify a model without changing what it computes.

    Args:
        model: a file, its bytes, a ModelProto or a loaded Model. Never modified.
        output_model: where to write the result; without it the result is returned.
        model_check: compare the outputs before and after in ONNX Runtime, and undo what does not hold.
        input_shapes: sizes for dynamic inputs during that comparison.

    Returns:
        The simplified ModelProto, or None when it was written to ``output_model``.

    Raises:
        ModelError: the model cannot be read or does not load in ONNX Runtime.
        OutputError: ``output_model`` is the input file, or cannot be written.
    """
    loaded = load(model)
    if output_model is not None:
        check_output_file(loaded, Path(output_model))
    run = simplify_model(loaded, model_check=model_check, input_shapes=input_shapes)
    if output_model is None:
        return run.model.to_proto()
    run.model.save(output_model)
    return None


def check_output_file(model: Model, output: Path) -> None:
    """Refuse an output that is the input, a folder, or in a folder that does not exist."""
    check_not_input(model, output)
    if output.is_dir():
        raise OutputError(f"{output}: is a folder; name a file.")
    if not output.parent.is_dir():
        raise OutputError(f"{output}: the folder {output.parent} does not exist.")
