"""The main job: what it writes, what it keeps, what it undoes, how it resumes, what it says."""

import json
import os
from typing import ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest

import onnxslim
from onnxslim import passes as registry
from onnxslim import read_recipe
from onnxslim.goals import EXIT_CODES
from onnxslim.model_files import file_sha256
from onnxslim.passes import Context, Outcome, Pass
from onnxslim.record import Record, Score
from onnxslim.runtime import Session
from onnxslim.stages import Draft

LOSSLESS = ["fold-constants", "simplify"]


SCORE = Score(metric="top1", value=1.0, interval=None, samples=8, labelled=True)


def _optimize(small, output, **changes):
    arguments = {
        "output": output,
        "passes": [*LOSSLESS, {"name": "quantize-static", "only_if_faster": False}],
        "calibration": small / "calib.npz",
        "evaluation": small / "eval.npz",
        "goals": {"max_accuracy_drop": 0.2},
    }
    return onnxslim.optimize(small / "model.onnx", **(arguments | changes))


def _register(monkeypatch, kind):
    monkeypatch.setitem(registry.PASSES, kind.name, kind)


class _Break(Pass):
    """Change a weight by much and claim that nothing is lost."""

    name: ClassVar[str] = "break"
    lossless: ClassVar[bool] = True

    def run(self, model, context: Context) -> Outcome:
        node = next(node for node in model.graph.nodes if node.op == "Gemm")
        node.inputs[1].values = node.inputs[1].values * -1
        outcome = Outcome()
        outcome.change("break", node.name, "turned the classifier upside down")
        return outcome


class _BreakLossily(_Break):
    name: ClassVar[str] = "break-lossily"
    lossless: ClassVar[bool] = False


class _Crash(Pass):
    """Fail half-way, after the model was changed."""

    name: ClassVar[str] = "crash"
    lossless: ClassVar[bool] = True

    def run(self, model, context: Context) -> Outcome:
        model.graph.nodes.clear()
        raise ZeroDivisionError("by zero")


class _Scale(Pass):
    """Lose accuracy by strength; half as strong when asked to be weaker."""

    name: ClassVar[str] = "scale"
    lossless: ClassVar[bool] = False
    strength: float = 8.0

    def run(self, model, context: Context) -> Outcome:
        node = next(node for node in model.graph.nodes if node.op == "Gemm")
        noise = context.rng.standard_normal(node.inputs[1].shape).astype(np.float32)
        node.inputs[1].values = node.inputs[1].values + self.strength * noise
        outcome = Outcome(numbers={"strength": self.strength})
        outcome.change("scale", node.name, "added noise")
        return outcome

    def weaker(self, outcome):
        return _Scale(strength=self.strength / 1000)


def test_a_run_writes_a_smaller_model_that_it_measured(small, tmp_path):
    before = {path.name: path.read_bytes() for path in small.iterdir()}
    run = _optimize(small, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in small.iterdir()} == before
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.onnx", "report.html", "record.json", "recipe.lock.toml", ".cache"}
    record = run.record
    assert record.verdict == "met"
    assert [entry.status for entry in record.passes] == ["no change", "kept", "kept"]
    result = tmp_path / "out" / "model.onnx"
    assert record.after.sha256 == file_sha256(result)
    assert record.after.size_bytes == result.stat().st_size < record.before.size_bytes
    assert record.after.ops["QuantizeLinear"] >= 3
    # The score in the record is that of the file on disk.
    with np.load(small / "eval.npz") as data:
        logits = onnxruntime.InferenceSession(result).run(None, {"image": data["image"]})[0]
        assert record.after.score.value == pytest.approx(np.mean(logits.argmax(1) == data["labels"]))
    assert record.before.score.value == 1.0
    assert record.before.score.interval.low < 1.0
    assert record.after.latency.ratio > 0
    assert record.after.peak_memory_bytes > 0
    assert record.before.macs == 8 * 8 * (16 * 27 + 32 * 144) + 32 * 4
    assert record.layer_errors
    assert Record.read(tmp_path / "out" / "record.json") == record


def test_the_second_run_is_free_and_the_same(small, tmp_path):
    first = _optimize(small, tmp_path / "out")
    again = _optimize(small, tmp_path / "out")
    assert all(entry.cached for entry in again.record.passes)
    assert again.record.after == first.record.after
    assert again.record.before == first.record.before


def test_an_interrupted_run_resumes(small, tmp_path, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("onnxslim.passes.quantize_static.QuantizeStatic.run", stop)
    with pytest.raises(KeyboardInterrupt):
        _optimize(small, tmp_path / "out")
    assert not (tmp_path / "out" / "model.onnx").exists()
    assert not list((tmp_path / "out" / ".cache").glob("tmp-*"))
    monkeypatch.undo()
    run = _optimize(small, tmp_path / "out")
    assert [entry.cached for entry in run.record.passes] == [True, True, False]


def test_a_pass_interrupted_after_calibration_does_not_calibrate_again(small, tmp_path, monkeypatch):
    whole = _optimize(small, tmp_path / "whole")

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("onnxslim.passes._quantizer.Quantizer._plan", stop)
    with pytest.raises(KeyboardInterrupt):
        _optimize(small, tmp_path / "out")
    drafts = tmp_path / "out" / ".cache"
    assert len(list(drafts.glob("drafts-*/*.npz"))) == 1
    fewer = [*LOSSLESS, {"name": "quantize-static", "only_if_faster": False, "max_samples": 8}]
    with pytest.raises(KeyboardInterrupt):
        _optimize(small, tmp_path / "out", passes=fewer)
    assert len(list(drafts.glob("drafts-*/*.npz"))) == 2
    monkeypatch.undo()
    read = _reads_of_drafts(monkeypatch)
    run = _optimize(small, tmp_path / "out")
    assert len(read) == 1 and int(read[0]["done"]) > 0
    assert run.record.after.sha256 == whole.record.after.sha256
    assert not list(drafts.glob("drafts-*"))


def test_a_weaker_attempt_takes_the_calibration_of_the_stronger_one(small, tmp_path, monkeypatch):
    read = _reads_of_drafts(monkeypatch)
    monkeypatch.setattr("onnxslim.pass_runner.drop", lambda before, after: 1.0)
    entry = _optimize(small, tmp_path / "out").record.passes[-1]
    assert (entry.status, entry.attempts > 1) == ("rolled back", True)
    assert [bool(arrays) for arrays in read] == [False, *[True] * (entry.attempts - 1)]


@pytest.mark.parametrize(
    ("runtime", "saturates", "foreign"),
    [
        ("tensorrt", True, True),
        ("onnxruntime-arm", True, True),
        ("tensorrt", False, False),
        ("onnxruntime", True, False),
    ],
)
def test_int8_for_other_processors_is_not_scored_by_kernels_that_saturate(
    small, tmp_path, monkeypatch, runtime, saturates, foreign
):
    monkeypatch.setattr("onnxslim.passes.quantize_static.kernels_saturate", lambda: saturates)
    scored = []
    monkeypatch.setattr("onnxslim.pass_runner.evaluate", lambda model, *rest, **named: scored.append(model) or SCORE)
    quantize = {"name": "quantize-static", "only_if_faster": False, "runtime": runtime}
    run = _optimize(small, tmp_path / "out", passes=[*LOSSLESS, quantize])
    entry = run.record.passes[-1]
    assert ("kernels of this processor saturate" in entry.reason) == foreign
    plain = [isinstance(model, Session) and not model.optimize for model in scored]
    # The original and the lossless passes as they run here.
    assert len(plain) > 1 and not any(plain[:-1]) and plain[-1] == foreign


def _reads_of_drafts(monkeypatch):
    read, load = [], Draft.load
    monkeypatch.setattr(Draft, "load", lambda self: read.append(load(self)) or read[-1])
    return read


def test_another_seed_or_option_is_another_stage(small, tmp_path):
    _optimize(small, tmp_path / "out")
    passes = [*LOSSLESS, {"name": "quantize-static", "calibration": "minmax"}]
    run = _optimize(small, tmp_path / "out", passes=passes)
    assert [entry.cached for entry in run.record.passes] == [True, True, False]


def test_the_lock_reproduces_the_run(small, tmp_path):
    first = _optimize(small, tmp_path / "out")
    recipe = read_recipe(tmp_path / "out" / "recipe.lock.toml")
    again = onnxslim.optimize(recipe.model, recipe, output=tmp_path / "again")
    assert again.record.after.sha256 == first.record.after.sha256
    assert again.record.recipe["pass"] == first.record.recipe["pass"]


def test_a_lossless_pass_that_lies_is_undone(small, tmp_path, monkeypatch):
    _register(monkeypatch, _Break)
    run = _optimize(small, tmp_path / "out", passes=["break", "simplify"])
    broken, simplified = run.record.passes
    assert (broken.status, simplified.status) == ("rolled back", "kept")
    assert any(not check.ok for check in broken.checks)
    assert run.record.after.score.value == 1.0


def test_a_lossy_pass_out_of_budget_is_undone(small, tmp_path, monkeypatch):
    _register(monkeypatch, _BreakLossily)
    run = _optimize(small, tmp_path / "out", passes=["break-lossily"])
    entry = run.record.passes[0]
    assert entry.status == "rolled back"
    assert "budget 0.2" in entry.reason
    assert entry.score_after.value < 0.5
    assert run.record.after.sha256 == run.record.before.sha256
    assert run.record.after.score.value == 1.0


def test_a_lossy_pass_is_tried_weaker(small, tmp_path, monkeypatch):
    _register(monkeypatch, _Scale)
    run = _optimize(small, tmp_path / "out", passes=["scale"])
    entry = run.record.passes[0]
    assert (entry.status, entry.attempts) == ("kept", 2)
    assert entry.options == {"strength": 0.008}


def test_a_pass_that_crashes_is_left_out_and_named(small, tmp_path, monkeypatch):
    _register(monkeypatch, _Crash)
    run = _optimize(small, tmp_path / "out", passes=["crash", "simplify"])
    assert [entry.status for entry in run.record.passes] == ["failed", "kept"]
    assert "ZeroDivisionError: by zero" in run.record.passes[0].reason
    assert any("crash" in warning for warning in run.record.warnings)
    assert run.record.after.score.value == 1.0


def test_without_labels_agreement_with_the_original_is_scored(small, tmp_path):
    run = _optimize(small, tmp_path / "out", evaluation=None)
    assert run.record.after.score.metric == "agreement"
    assert not run.record.after.score.labelled
    assert run.record.before.score.value == 1.0
    assert any("labels" in line for line in run.record.not_measured)


def test_without_data_nothing_is_scored_and_that_is_said(small, tmp_path):
    run = onnxslim.optimize(small / "model.onnx", output=tmp_path / "out")
    assert [entry.name for entry in run.record.passes] == LOSSLESS
    assert run.record.verdict == "no goals"
    assert run.record.after.score is None
    assert any(line.startswith("accuracy") for line in run.record.not_measured)
    assert run.record.after.latency is not None


def test_models_in_memory_and_feeds_work_as_files_do(small, tmp_path):
    with np.load(small / "eval.npz") as data:
        images, labels = data["image"], data["labels"]
    run = onnxslim.optimize(
        onnx.load(small / "model.onnx"),
        output=tmp_path / "out",
        passes=["simplify", registry.QuantizeStatic(calibration="minmax", only_if_faster=False)],
        calibration=[{"image": images[i : i + 1]} for i in range(8)],
        evaluation=[{"image": images[i : i + 1]} for i in range(48)],
        labels=labels,
        metric=lambda outputs, labels: float(
            np.mean([out[0].argmax() == label for out, label in zip(outputs, labels, strict=True)])
        ),
    )
    assert run.record.before.score.value == 1.0
    assert [entry.status for entry in run.record.passes] == ["kept", "kept"]


def test_a_missed_goal_is_the_verdict_and_the_exit_code(small, tmp_path, command):
    arguments = ["optimize", small / "model.onnx", "-o", tmp_path / "out", "--max-size", "1 kB", "--pass", "simplify"]
    code, out, _ = command(*arguments)
    assert code == EXIT_CODES["not met"] == 1
    assert "not met" in out
    record = Record.read(tmp_path / "out" / "record.json")
    assert record.verdict == "not met"
    assert [goal.met for goal in record.goals] == [False]
    code, out, _ = command(*arguments, "--json")
    assert code == 1
    assert json.loads(out)["verdict"] == "not met"
    code, out, err = command(*arguments, "--quiet")
    assert (code, out, err) == (1, "", "")


def test_targets_are_compiled_verified_and_timed(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = _optimize(small, "out", targets=[{"name": "native", "max_latency": "10 s"}], shapes=None)
    entry = run.record.targets[0]
    assert entry.status == "verified", entry.reason
    assert entry.where == "this machine"
    assert entry.latency.median_ms > 0
    assert entry.latency.ratio == pytest.approx(entry.latency.median_ms / entry.reference_latency.median_ms)
    assert any("convolution" in kernel.op for kernel in entry.profile.kernels)
    assert any("image = [1, 3, 8, 8]" in note for note in entry.notes)
    assert entry.score.metric == "top1"
    assert abs(entry.score.value - run.record.after.score.value) <= 1 / 48
    assert [goal.met for goal in run.record.goals] == [True, True]
    bundle = onnxslim.Bundle.load(tmp_path / "out" / entry.bundle)
    with np.load(small / "eval.npz") as data:
        image = data["image"][:1]
    expected = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx").run(None, {"image": image})[0]
    np.testing.assert_allclose(bundle.run({"image": image})["logits"], expected, atol=0.1 * np.abs(expected).max())


def test_a_target_that_lacks_an_op_does_not_cost_the_run(tmp_path):
    floats = onnx.TensorProto.FLOAT
    weights = {"W": (1, 32, 4), "R": (1, 32, 8), "B": (1, 64)}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("LSTM", ["x", "W", "R", "B"], ["y"], name="encoder", hidden_size=8, clip=1.0)],
        "g",
        [onnx.helper.make_tensor_value_info("x", floats, [5, 1, 4])],
        [onnx.helper.make_tensor_value_info("y", floats, [5, 1, 1, 8])],
        [onnx.numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in weights.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    run = onnxslim.optimize(model, output=tmp_path / "out", targets=["native"])
    entry = run.record.targets[0]
    assert entry.status == "unsupported"
    assert entry.unsupported_ops["LSTM (clip)"] == ["encoder"]
    assert entry.latency is None
    assert not (tmp_path / "out" / "targets" / "native").exists()


def test_bundles_of_an_earlier_run_do_not_stay(small, tmp_path):
    """The folder holds what this run made: not another model's bundle under the same name, nor another target's."""
    first = onnxslim.optimize(small / "model.onnx", output=tmp_path, passes=LOSSLESS, targets=["native", "x86-64-v2"])
    assert (tmp_path / "targets" / "x86-64-v2" / "manifest.json").is_file()
    other = onnxslim.optimize(small / "model.onnx", output=tmp_path, passes=[], targets=["native"])
    assert not (tmp_path / "targets" / "x86-64-v2").exists()
    manifest = tmp_path / "targets" / "native" / "manifest.json"
    assert json.loads(manifest.read_text())["model_sha256"] == other.record.after.sha256
    again = onnxslim.optimize(small / "model.onnx", output=tmp_path, passes=LOSSLESS, targets=["native"])
    assert json.loads(manifest.read_text())["model_sha256"] == again.record.after.sha256 == first.record.after.sha256


def test_illegal_arguments_are_recipe_errors(small, tmp_path):
    for wrong in (
        {"goals": {"max_sise": 3}},
        {"goals": {"max_size": "big"}},
        {"threads": -1},
        {"shapes": {"image": [-1]}},
    ):
        with pytest.raises(onnxslim.RecipeError):
            onnxslim.optimize(small / "model.onnx", output=tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


class _Explode(Pass):
    """Make a model that loads and fails on some feeds only."""

    name: ClassVar[str] = "explode"
    lossless: ClassVar[bool] = False

    def run(self, model, context: Context) -> Outcome:
        table = next(node for node in model.graph.nodes if node.op == "Gather").inputs[0]
        table.values = table.values[:4]
        outcome = Outcome(numbers={"share": float("inf")})
        outcome.change("explode", table.name, "cut the table")
        return outcome


def test_a_result_that_fails_on_a_late_feed_is_undone(tmp_path, monkeypatch):
    _register(monkeypatch, _Explode)
    text = '<ir_version: 8, opset_import: ["" : 17]> g (int64[N] i) => (float[N, 3] y) { y = Gather (table, i) }'
    proto = onnx.parser.parse_model(text)
    table = np.random.default_rng(0).standard_normal((10, 3)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(table, "table"))
    indices = np.array([0, 1, 2, 3] * 10 + [9])
    run = onnxslim.optimize(
        proto, output=tmp_path / "out", passes=["explode"], evaluation={"i": indices}, goals={"max_accuracy_drop": 0.5}
    )
    entry = run.record.passes[0]
    assert entry.status == "rolled back"
    assert "Gather" in entry.reason
    assert run.record.after.sha256 == run.record.before.sha256
    assert Record.read(tmp_path / "out" / "record.json").passes[0].numbers == {}


def test_scores_of_another_function_of_the_same_name_are_not_taken(small, tmp_path):
    for value in (1.0, 0.25):
        run = _optimize(small, tmp_path / "out", metric=lambda outputs, labels, value=value: value)
        assert run.record.after.score.value == value


def test_metrics_without_a_natural_budget_ask_for_one(small, tmp_path):
    with pytest.raises(onnxslim.RecipeError, match="max_accuracy_drop"):
        _optimize(small, tmp_path / "out", evaluation=None, metric="sqnr", goals=None)
    run = _optimize(small, tmp_path / "out", evaluation=None, metric="sqnr", goals={"max_accuracy_drop": 90})
    assert run.record.passes[-1].status == "kept"


def test_lossless_passes_need_no_metric(tmp_path):
    head = '<ir_version: 8, opset_import: ["" : 17]>'
    text = head + " g (int64[N] i) => (int64[N] a, int64[N] b) { a = Neg (i) b = Abs (i) }"
    proto = onnx.parser.parse_model(text)
    run = onnxslim.optimize(proto, output=tmp_path / "out", passes=LOSSLESS, evaluation={"i": np.arange(4)})
    assert run.record.after.score is None
    assert any(line.startswith("accuracy") for line in run.record.not_measured)


def test_a_finished_target_costs_nothing_in_another_process(small, tmp_path):
    import subprocess
    import sys

    script = (
        "import onnxslim, sys\n"
        f"run = onnxslim.optimize({str(small / 'model.onnx')!r}, output={str(tmp_path / 'out')!r},"
        " passes=['simplify'], targets=['x86-64-v2'])\n"
        "print(run.record.targets[0].compile_seconds)\n"
    )
    seconds = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seconds) == 1


def test_weights_beside_the_input_are_never_written_over(small, tmp_path):
    onnx.save(
        onnx.load(small / "model.onnx"),
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="w.bin",
        size_threshold=0,
    )
    weights = (tmp_path / "w.bin").read_bytes()
    with pytest.raises(onnxslim.OutputError, match="holds its weights"):
        onnxslim.slim(tmp_path / "m.onnx", tmp_path / "w.bin")
    assert (tmp_path / "w.bin").read_bytes() == weights
