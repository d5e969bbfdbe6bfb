"""The bundled demo files are what the README beside them and the main job rely on."""

import re
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest

from onnxslim.demo import CALIBRATION, EVALUATION, MODEL

SIZE_LIMIT = 2_000_000  # bytes, all three files


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return onnx.load(MODEL)


@pytest.fixture(scope="module")
def session() -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(MODEL, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def evaluation() -> dict[str, np.ndarray]:
    with np.load(EVALUATION) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def calibration() -> dict[str, np.ndarray]:
    with np.load(CALIBRATION) as arrays:
        return dict(arrays)


def dimensions(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def stored_accuracy() -> float:
    table = MODEL.with_name("README.md").read_text(encoding="utf-8")
    match = re.search(r"\| the 1,000 of `evaluation\.npz` \| (0\.\d+) \|", table)
    assert match is not None
    return float(match[1])


def test_model_is_valid_and_readable_by_older_runtimes(model):
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version <= 10
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 17)]


def test_model_keeps_its_batch_normalizations(model):
    operators = Counter(node.op_type for node in model.graph.node)
    assert operators["BatchNormalization"] == 7
    assert operators["Conv"] == 8
    assert operators["Add"] == 3


def test_model_takes_bytes_and_gives_logits_for_any_batch(model, session):
    (image,), (logits,) = model.graph.input, model.graph.output
    assert (image.name, dimensions(image)) == ("image", ["N", 1, 28, 28])
    assert image.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert (logits.name, dimensions(logits)) == ("logits", ["N", 10])
    for batch in (1, 3):
        (result,) = session.run(None, {"image": np.zeros((batch, 1, 28, 28), np.uint8)})
        assert result.shape == (batch, 10)
        assert result.dtype == np.float32


def test_model_has_about_a_quarter_million_parameters(model):
    assert 200_000 < sum(onnx.numpy_helper.to_array(weight).size for weight in model.graph.initializer) < 320_000


def test_model_widths_stay_multiples_of_eight_when_pruned_by_a_third(model):
    weights = [onnx.numpy_helper.to_array(weight) for weight in model.graph.initializer]
    assert {weight.shape[0] for weight in weights if weight.ndim == 4} == {48, 80}


def test_every_learned_tensor_is_named_after_its_layer(model):
    names = {weight.name for weight in model.graph.initializer}
    assert {"stem.conv.weight", "stage1.conv1.weight", "stage3.bn2.running_var", "head.bias"} <= names
    assert not [node.name for node in model.graph.node if node.doc_string or not node.name.startswith("/")]


def test_evaluation_images_are_balanced(evaluation):
    assert evaluation.keys() == {"image", "labels"}
    assert evaluation["image"].dtype == np.uint8
    assert evaluation["image"].shape == (1000, 1, 28, 28)
    assert np.bincount(evaluation["labels"]).tolist() == [100] * 10


def test_calibration_images_have_no_labels(calibration):
    assert calibration.keys() == {"image"}
    assert calibration["image"].dtype == np.uint8
    assert calibration["image"].shape == (400, 1, 28, 28)


def test_no_image_occurs_twice_in_or_between_the_sets(calibration, evaluation):
    images = [image.tobytes() for arrays in (calibration, evaluation) for image in arrays["image"]]
    assert len(set(images)) == len(images) == 1400


def test_accuracy_is_the_one_in_the_readme(session, evaluation):
    (logits,) = session.run(None, {"image": evaluation["image"]})
    accuracy = np.mean(logits.argmax(axis=1) == evaluation["labels"])
    assert accuracy == pytest.approx(stored_accuracy(), abs=1e-9)
    assert accuracy >= 0.915


def test_network_has_channels_to_spare(model):
    weights = {weight.name: onnx.numpy_helper.to_array(weight) for weight in model.graph.initializer}
    silent = [int((weights[f"stage{stage}.bn1.weight"] == 0).sum()) for stage in (1, 2, 3)]
    assert all(count >= 8 for count in silent), silent


def test_no_weight_is_so_small_that_its_quantization_scale_vanishes(model):
    for weight in model.graph.initializer:
        values = np.abs(onnx.numpy_helper.to_array(weight))
        assert not np.any((values > 0) & (values < 1e-12)), weight.name


def test_files_are_small():
    assert sum(path.stat().st_size for path in (MODEL, CALIBRATION, EVALUATION)) < SIZE_LIMIT
