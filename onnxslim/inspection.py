"""What is in a model, and what each pass and each target could do with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel

from onnxslim.data import open_dataset
from onnxslim.errors import ModelError, SlimError
from onnxslim.measure import snapshot
from onnxslim.model import load
from onnxslim.passes import PASSES, Context
from onnxslim.record import Snapshot
from onnxslim.runtime import Session

__all__ = ["Inspection", "PassProspect", "TargetProspect", "inspect_model"]


class PassProspect(BaseModel):
    """What a pass with its default options would do; nothing is kept."""

    name: str
    changes: dict[str, int]
    refusals: dict[str, int]
    note: str = ""


class TargetProspect(BaseModel):
    """Whether TVM can take the model for a target, and what stands against it."""

    name: str
    compiles: bool
    unsupported_ops: dict[str, list[str]]
    note: str = ""


class Inspection(BaseModel):
    """Everything that ``onnxslim inspect`` shows."""

    model: Snapshot
    producer: str
    inputs: dict[str, str]
    outputs: list[str]
    metadata: dict[str, str]
    warnings: list[str]
    passes: list[PassProspect]
    targets: list[TargetProspect]


def inspect_model(
    path: Path,
    *,
    data: Path | None = None,
    shapes: dict[str, list[int]] | None = None,
    targets: list[str] | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Inspection:
    """Describe a model file and try every pass on a copy of it.

    Args:
        path: the model.
        data: calibration data; without it, passes that need some are not tried.
        shapes: sizes for dynamic inputs, for targets.
        targets: which targets to look at; default: ``native``.
        progress: called as ``progress(what, done, total)``.

    Raises:
        ModelError: the file cannot be read.
    """
    model = load(path)
    warnings: list[str] = []
    inputs: dict[str, str] = {}
    outputs = [tensor.name for tensor in model.graph.outputs]
    dataset = None
    try:
        session = Session(path)
        inputs = {name: str(spec) for name, spec in session.inputs.items()}
        dataset = open_dataset(data, session.specs, role="calibration") if data is not None else None
    except ModelError as error:
        warnings.append(f"does not run in ONNX Runtime: {error}")
    prospects = []
    for number, kind in enumerate(PASSES.values()):
        progress(kind.name, number, len(PASSES))
        if kind.needs_calibration and dataset is None:
            note = "not tried: needs --data" if data is None else "not tried: the model does not run"
            prospects.append(PassProspect(name=kind.name, changes={}, refusals={}, note=note))
            continue
        candidate = model.copy()
        try:
            outcome = kind().run(candidate, Context(calibration=dataset, teacher=model, shapes=shapes or {}))
        except SlimError as error:
            prospects.append(PassProspect(name=kind.name, changes={}, refusals={}, note=str(error)))
            continue
        except Exception as error:  # as in optimize: a fault of one pass must not hide what the others can do
            note = f"failed: {type(error).__name__}: {error}"
            prospects.append(PassProspect(name=kind.name, changes={}, refusals={}, note=note))
            continue
        prospects.append(
            PassProspect(
                name=kind.name,
                changes=dict(Counter(change.rule for change in outcome.changes)),
                refusals=dict(Counter(refusal.why for refusal in outcome.refusals).most_common()),
            )
        )
    return Inspection(
        model=snapshot(path, None, model),
        producer=f"{model.header.producer_name} {model.header.producer_version}".strip(),
        inputs=inputs,
        outputs=outputs,
        metadata={entry.key: entry.value for entry in model.header.metadata_props},
        warnings=warnings,
        passes=prospects,
        targets=[_target(path, name, shapes) for name in targets or ["native"]],
    )


def _target(path: Path, name: str, shapes: dict[str, list[int]] | None) -> TargetProspect:
    from onnxslim.targets import find_target, unsupported_ops

    find_target(name)
    try:
        lacking = unsupported_ops(path, shapes)
    except SlimError as error:
        return TargetProspect(name=name, compiles=False, unsupported_ops={}, note=str(error))
    return TargetProspect(name=name, compiles=not lacking, unsupported_ops=lacking)
