from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxslim.inspection import inspect_model
from onnxslim.passes import PASSES

MODEL = '<ir_version: 8, opset_import: ["" : 17]> g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }'


@pytest.fixture
def files(tmp_path):
    np.savez(tmp_path / "data.npz", x=np.ones((4, 4), np.float32))

    def write(text: str):
        onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
        return tmp_path / "m.onnx", tmp_path / "data.npz"

    return write


def test_a_fault_in_one_pass_does_not_hide_the_others(files, monkeypatch):
    def fail(self, model, context):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(PASSES["share-weights"], "run", fail)
    model, _ = files(MODEL)
    notes = {entry.name: entry.note for entry in inspect_model(model, targets=[]).passes}
    assert notes["share-weights"] == "failed: ZeroDivisionError: by zero"
    assert notes["simplify"] == "" and len(notes) == len(PASSES)


def test_it_says_why_a_pass_that_needs_data_was_not_tried(files):
    model, data = files(MODEL)
    notes = {entry.name: entry.note for entry in inspect_model(model, targets=[]).passes}
    assert notes["quantize-static"] == "not tried: needs --data"
    model, data = files(MODEL.replace("Relu", "acme.Foo").replace("17]", '17, "acme" : 1]'))
    found = inspect_model(model, data=data, targets=[])
    notes = {entry.name: entry.note for entry in found.passes}
    assert "does not run" in found.warnings[0]
    assert notes["quantize-static"] == "not tried: the model does not run"
