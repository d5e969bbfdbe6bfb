"""Bad input: one clear message, exit code 2, no traceback, nothing half-written."""

import platform

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper


def _refused(result, *words):
    code, out, err = result
    assert code == 2, (out, err)
    assert err.startswith("error: "), err
    assert err.count("error:") == 1
    assert "Traceback" not in err + out
    for word in words:
        assert word in err, f"{word!r} is not in {err!r}"


@pytest.fixture
def out(tmp_path):
    """An output folder that must not exist afterwards."""
    yield tmp_path / "out"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "word"), [(b"", "not an ONNX model"), (b"hello", "not an ONNX model"), (None, "truncated")]
)
@pytest.mark.parametrize("verb", ["slim", "optimize", "compile", "inspect"])
def test_files_that_are_no_model(command, small, tmp_path, out, verb, content, word):
    path = tmp_path / "bad.onnx"
    path.write_bytes((small / "model.onnx").read_bytes()[:-50] if content is None else content)
    extra = {"slim": [out], "optimize": ["-o", out], "compile": ["-o", out], "inspect": []}[verb]
    _refused(command(verb, path, *extra), "bad.onnx", word)


def test_missing_model(command, tmp_path, out):
    _refused(command("optimize", tmp_path / "none.onnx", "-o", out), "none.onnx", "No such file")


def test_missing_and_outside_external_data(command, small, tmp_path, out):
    proto = onnx.load(small / "model.onnx")
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    weights = tmp_path / "w.bin"
    weights.rename(tmp_path / "moved.bin")
    _refused(command("optimize", tmp_path / "m.onnx", "-o", out), "w.bin", "missing", "w1")
    proto = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../w.bin" if entry.key == "location" else entry.value
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    _refused(command("optimize", tmp_path / "m.onnx", "-o", out), "../w.bin", "outside")


def _images(**changes):
    arrays = {"image": np.zeros((4, 3, 8, 8), np.float32)}
    arrays.update(changes)
    return {name: value for name, value in arrays.items() if value is not None}


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (_images(image=None, picture=np.zeros((4, 3, 8, 8), np.float32)), ["image"]),
        (_images(image=np.zeros((4, 3, 9, 8), np.float32)), ["image", "9"]),
        (_images(image=np.zeros((4, 8, 8), np.float32)), ["image"]),
        (_images(image=np.zeros((4, 3, 8, 8), np.float64)), ["image", "float64", "float32"]),
        (_images(image=np.full((4, 3, 8, 8), np.nan, np.float32)), ["image", "NaN"]),
        (_images(image=np.zeros((0, 3, 8, 8), np.float32)), ["no samples"]),
        (_images(extra=np.zeros((4, 1), np.float32)), ["extra"]),
        (_images(image=np.array([{}], dtype=object)), ["image"]),
    ],
)
def test_calibration_that_does_not_fit(command, small, tmp_path, out, arrays, words):
    path = tmp_path / "calib.npz"
    np.savez(path, **arrays)
    _refused(command("optimize", small / "model.onnx", "-o", out, "--data", path), "calib.npz", *words)


def test_data_that_is_no_npz(command, small, tmp_path, out):
    path = tmp_path / "calib.npz"
    path.write_bytes(b"nothing")
    _refused(command("optimize", small / "model.onnx", "-o", out, "--data", path), "calib.npz")
    _refused(command("optimize", small / "model.onnx", "-o", out, "--data", tmp_path / "none.npz"), "none.npz")


def test_labels_that_do_not_fit(command, small, tmp_path, out):
    path = tmp_path / "eval.npz"
    np.savez(path, **_images(labels=np.zeros(3, np.int64)))
    _refused(command("optimize", small / "model.onnx", "-o", out, "--eval", path), "labels", "3", "4")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pass", "fold-constant"], ["fold-constant", "Did you mean 'fold-constants'"]),
        (["--pass", "prune-channels:ration=0.3"], ["ration", "Did you mean 'ratio'"]),
        (["--pass", "prune-channels:ratio=1.5"], ["ratio", "1.5", "less than 1"]),
        (["--pass", "prune-channels:ratio=lots"], ["ratio", "lots"]),
        (["--pass", "share-weights:bits=9"], ["bits", "9"]),
        (["--pass", "prune-channels:ratio"], ["NAME:option=value"]),
        (["--target", "raspbery-pi-4"], ["raspbery-pi-4", "raspberry-pi-4"]),
        (["--metric", "top2"], ["top2", "top1"]),
        (["--metric", "no.such.module:score"], ["no.such.module"]),
        (["--shape", "picture=1,3,8,8"], ["picture", "image"]),
        (["--shape", "image=1,4,8,8"], ["image"]),
        (["--shape", "image=a"], ["--shape"]),
        (["--max-size", "huge"], ["max_size"]),
        (["--max-latency", "5 lightyears"], ["max_latency", "5 ms"]),
        (["--max-accuracy-drop", "-0.1"], ["max_accuracy_drop"]),
        (["--min-accuracy", "1.5"], ["min_accuracy", "out of reach"]),
    ],
)
def test_unknown_and_impossible_wishes(command, small, out, arguments, words):
    result = command("optimize", small / "model.onnx", "-o", out, "--eval", small / "eval.npz", *arguments)
    _refused(result, *words)


def test_lossy_passes_need_data(command, small, out):
    _refused(
        command("optimize", small / "model.onnx", "-o", out, "--pass", "quantize-static"), "needs calibration data"
    )
    _refused(command("optimize", small / "model.onnx", "-o", out, "--pass", "prune-channels"), "data", "prune-channels")
    _refused(command("optimize", small / "model.onnx", "-o", out, "--max-accuracy-drop", "0.1"), "max_accuracy_drop")


def test_outputs_that_cannot_be(command, small, tmp_path):
    model = tmp_path / "model.onnx"
    content = (small / "model.onnx").read_bytes()
    model.write_bytes(content)
    _refused(command("slim", model, model), "is the input")
    (tmp_path / "link.onnx").symlink_to(model)
    _refused(command("slim", model, tmp_path / "link.onnx"), "is the input")
    _refused(command("optimize", model, "-o", tmp_path), "is the input")
    _refused(command("optimize", model, "-o", model), "is a file")
    _refused(command("slim", model, tmp_path / "none" / "slim.onnx"), "does not exist")
    _refused(command("slim", model, tmp_path), "is a folder")
    _refused(command("optimize", model, "-o", "/proc/none/out"), "/proc/none/out", "cannot be written")
    assert model.read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.onnx", "model.onnx"]


def test_a_lock_refuses_other_data(command, small, tmp_path, out):
    recipe = tmp_path / "recipe.lock.toml"
    recipe.write_text(f'model = "{small / "model.onnx"}"\n[lock]\nmodel_sha256 = "{"0" * 64}"\n')
    _refused(command("optimize", recipe, "-o", out), "locked", "remove [lock]")


def test_goals_that_nothing_here_can_reach(command, small, tmp_path, out):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'model = "{small / "model.onnx"}"\n[[target]]\nname = "raspberry-pi-4"\nmax_latency = "5 ms"\n')
    if platform.machine() == "x86_64":
        _refused(command("optimize", recipe, "-o", out), "max_latency", "raspberry-pi-4")


def test_recipes_that_are_none(command, tmp_path, out):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('modle = "x.onnx"\n')
    _refused(command("optimize", recipe, "-o", out), "modle", "Did you mean 'model'")
    _refused(command("report", tmp_path), "record.json")


def test_ops_that_tvm_lacks_are_named_with_their_nodes(command, tmp_path, out):
    weights = {"W": (1, 32, 4), "R": (1, 32, 8), "B": (1, 64)}
    graph = helper.make_graph(
        [helper.make_node("LSTM", ["x", "W", "R", "B"], ["y"], name="encoder/lstm", hidden_size=8, clip=1.0)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, 1, 1, 8])],
        [numpy_helper.from_array(np.zeros(shape, np.float32), name) for name, shape in weights.items()],
    )
    model = tmp_path / "lstm.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), model)
    _refused(command("compile", model, "-o", out), "LSTM (clip)", "encoder/lstm")


def test_bench_and_compare_name_what_does_not_fit(command, small, tmp_path):
    _refused(command("bench", small / "model.onnx", tmp_path / "none.onnx"), "none.onnx")
    _refused(command("compare", small / "model.onnx", small / "model.onnx", "--data", tmp_path / "no.npz"), "no.npz")
