"""Every backend test that the onnx package ships, as it is and with all inputs but the first made constant.

Each model goes through the pass behind ``slim`` with no guard behind it; the outputs must then be those of the
original, in ONNX Runtime, or in the reference evaluator where ONNX Runtime lacks the operator. A test holds many
models, because each takes milliseconds; its message names those that fail.
"""

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from equivalence import differences, first_that_runs, simplified
from onnx.backend.test.loader import load_model_tests

from onnxslim.errors import ModelError
from onnxslim.model import load
from onnxslim.slim import simplify_model

_KINDS = ("node", "simple", "pytorch-operator", "pytorch-converted")
_BATCHES = 24


@dataclass(frozen=True)
class Case:
    """A model with inputs for it; some inputs may be of other types than tensors."""

    name: str
    model: onnx.ModelProto
    inputs: tuple[Any, ...]


@functools.cache
def _cases() -> tuple[Case, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, on the overflows that some of the tests are about
        return tuple(case for kind in _KINDS for case in _load(kind))


def _load(kind: str) -> Iterator[Case]:
    for test in sorted(load_model_tests(kind=kind), key=lambda test: test.name):
        if test.model is not None:
            yield Case(test.name, test.model, tuple(_value(value) for value in test.data_sets[0][0]))
            continue
        folder = Path(test.model_dir)
        model = onnx.load(folder / "model.onnx")
        files = sorted((folder / "test_data_set_0").glob("input_*.pb"), key=lambda path: int(path.stem.split("_")[1]))
        yield Case(test.name, model, tuple(map(_read, files, model.graph.input)))


def _value(value: Any) -> Any:
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    return np.asarray(value) if isinstance(value, np.generic) else value


def _read(file: Path, declared: onnx.ValueInfoProto) -> Any:
    if declared.type.HasField("tensor_type"):
        return onnx.numpy_helper.to_array(onnx.TensorProto.FromString(file.read_bytes()))
    return onnx.numpy_helper.to_list(onnx.SequenceProto.FromString(file.read_bytes()))


def _with_constants(case: Case) -> Case | None:
    """Make every tensor input but the first an initializer; None where there is none."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    model.ir_version = max(model.ir_version, 4)  # before, initializers had to be graph inputs too
    kept: list[Any] = []
    for position, (declared, value) in enumerate(zip(case.model.graph.input, case.inputs, strict=False)):
        if position and isinstance(value, np.ndarray) and declared.type.HasField("tensor_type"):
            model.graph.initializer.append(onnx.numpy_helper.from_array(value, declared.name))
            model.graph.input.remove(declared)
        else:
            kept.append(value)
    return None if len(kept) == len(case.inputs) else Case(f"{case.name} with constants", model, tuple(kept))


def _batch(number: int, *, constants: bool) -> Iterator[Case]:
    for case in _cases()[number::_BATCHES]:
        chosen = _with_constants(case) if constants else case
        if chosen is not None:
            yield chosen


def _is_legal(model: onnx.ModelProto) -> bool:
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return False
    return True


def _fault(case: Case) -> str:
    """What the pass did wrong to a model, or nothing."""
    try:
        result, _ = simplified(case.model)
    except Exception as error:  # the test is that nothing is raised
        return f"crashed: {type(error).__name__}: {error}"
    if _is_legal(case.model) and not _is_legal(result):
        return "is no longer legal ONNX"
    names = [tensor.name for tensor in case.model.graph.input]
    feed = {name: value for name, value in zip(names, case.inputs, strict=False) if value is not None}
    ran = first_that_runs(case.model, feed)
    if ran is None:
        return ""
    engine, expected = ran
    try:
        got = engine(result).run(feed)
    except Exception as error:  # both engines raise several unrelated types
        return f"no longer runs in {engine.__name__}: {error}"
    outputs = [tensor.name for tensor in case.model.graph.output]
    fault = differences(expected, got, outputs)
    # Two draws of ten coins may be alike by chance.
    if fault and any(differences(expected, engine(case.model).run(feed), outputs) for _ in range(8)):
        return differences([_form(value) for value in expected], [_form(value) for value in got], outputs)
    return fault


def _form(value: Any) -> np.ndarray:
    """The shape alone, of what an operator draws at random."""
    return np.array(np.shape(value))


@pytest.mark.parametrize("constants", [False, True], ids=["as-shipped", "with-constants"])
@pytest.mark.parametrize("batch", range(_BATCHES))
def test_outputs_stay_those_of_the_original(batch, constants):
    cases = list(_batch(batch, constants=constants))
    assert len(cases) > 20
    faults = {case.name: fault for case in cases if (fault := _fault(case))}
    assert not faults, "\n".join(f"{name}: {fault}" for name, fault in faults.items())


@pytest.mark.parametrize("batch", range(_BATCHES))
def test_the_guard_finds_nothing(batch):
    faults: dict[str, str] = {}
    for case in _batch(batch, constants=True):
        try:
            run = simplify_model(load(case.model))
        except ModelError:
            continue  # ONNX Runtime does not load the original, so there is nothing to compare with
        # Made-up inputs do not run where an operator wants indices or labels in a narrow range.
        failed = [f"{check.name}: {check.detail}" for check in run.checks if not check.ok and check.name != "feeds"]
        failed += [f"undone: {entry}" for entry in run.undone]
        if failed:
            faults[case.name] = failed[0]
    assert not faults, "\n".join(f"{name}: {fault}" for name, fault in faults.items())
