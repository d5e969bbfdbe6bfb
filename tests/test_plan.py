"""A plan that a record keeps: applied again it gives the same file, for another runtime what that takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_bodies import dataset
from test_bodies import model as branching_model
from test_equalize import norm, rows, uneven
from test_quantize_static import Builder, images, mobile_block, quantize

import onnxslim
from onnxslim import Model, load
from onnxslim.errors import RecipeError
from onnxslim.passes import make_pass
from onnxslim.passes._correction import Judge
from onnxslim.passes.base import Context, Outcome
from onnxslim.passes.quantize_static import QuantizeStatic


def transformer() -> Any:
    """Outliers behind a normalization that a residual reads too, so channels are scaled by a Mul."""
    b = Builder(seed=3)
    norm(b, "x", "n", 64)
    used = b.random.normal(size=(64, 64)) / uneven(64)[:, None] / 8
    b.node("MatMul", ["n", b.constant("w1", used.astype(np.float32))], "m1")
    b.node("Add", ["m1", b.weight("b1", 64)], "a1")
    b.node("Relu", ["a1"], "r1")
    b.node("Gemm", ["r1", b.weight("w2", 64, 64)], "y", alpha=0.5)
    return b.model({"x": ["n", 64]}, {"y": ["n", 64], "n": ["n", 64]})


def flat(count: int = 32) -> list[dict[str, np.ndarray]]:
    """Rows of a few directions, so that codes can make up for one another."""
    mixing = np.random.default_rng(5).normal(size=(32, 64)).astype(np.float32) / 4
    return [{"x": feed["x"][0, :, :32] @ mixing} for feed in rows(count, 64)]


def kept(path: Path, outcome: Outcome) -> str:
    """A record with the plan, as far as that is read."""
    path.write_text(json.dumps({"passes": [{"name": "quantize-static", "plan": outcome.plan}]}))
    return str(path)


def again(proto: Any, plan: str, **options: Any) -> tuple[Model, Outcome]:
    model = load(proto)
    options = {"only_if_faster": False} | options
    return model, QuantizeStatic(plan=plan, **options).run(model, Context())


@pytest.mark.parametrize(("make", "feeds"), [(mobile_block, images()), (transformer, flat())])
@pytest.mark.parametrize("options", [{}, {"per_channel": False}, {"reduce_range": True}, {"keep_float": 1}])
def test_the_same_runtime_gets_the_same_file(make: Any, feeds: Any, options: dict[str, Any], tmp_path: Path) -> None:
    first, outcome = quantize(make(), feeds, **options)
    assert {change.rule for change in outcome.changes} >= {"qdq"}
    assert outcome.plan is not None
    second, repeated = again(make(), kept(tmp_path / "record.json", outcome), **options)
    assert second.to_bytes() == first.to_bytes()
    assert repeated.plan == outcome.plan
    assert bool(outcome.plan["graphs"][0]["on_grid"]) == ("keep_float" in options)
    assert repeated.numbers["nodes quantized"] == outcome.numbers["nodes quantized"]


def test_it_holds_scales_of_channels_corrections_and_rounding(tmp_path: Path) -> None:
    first, outcome = quantize(transformer(), flat())
    graph = outcome.plan["graphs"][0] if outcome.plan else {}
    assert "n" in [each["name"] for each in graph["equalized"]]
    assert graph["rounded"]
    assert graph["tensors"]["n"]["low"] < 0 < graph["tensors"]["n"]["high"]
    # Without the rounding it is another file: the test above would not see that otherwise.
    graph["rounded"] = {}
    assert again(transformer(), kept(tmp_path / "record.json", outcome))[0].to_bytes() != first.to_bytes()


@pytest.mark.parametrize("runtime", ["onnxruntime-arm", "openvino", "tensorrt"])
@pytest.mark.parametrize(("make", "feeds"), [(mobile_block, images()), (transformer, flat())])
def test_another_runtime_gets_what_it_takes(make: Any, feeds: Any, runtime: str, tmp_path: Path) -> None:
    _, outcome = quantize(make(), feeds)
    moved, _ = again(make(), kept(tmp_path / "record.json", outcome), runtime=runtime)
    calibrated, _ = quantize(make(), feeds, runtime=runtime)
    kinds = [[node.op for node in model.graph.nodes] for model in (moved, calibrated)]
    assert sorted(kinds[0]) == sorted(kinds[1])
    judge = Judge.of(load(make()), feeds, fused=False)
    assert judge.error(moved) < 2 * judge.error(calibrated) + 1e-4


def test_branches_have_plans_of_their_own(tmp_path: Path) -> None:
    model = branching_model()
    data = dataset(model, [1.0, -1.0] * 8)
    first = model.copy()
    options: dict[str, Any] = {"only_if_faster": False}
    outcome = QuantizeStatic(**options).run(first, Context(calibration=data))
    assert outcome.plan is not None
    assert len([plan for plan in outcome.plan["graphs"] if plan["tensors"]]) == 3
    second = model.copy()
    QuantizeStatic(plan=kept(tmp_path / "record.json", outcome), **options).run(second, Context())
    assert second.to_bytes() == first.to_bytes()


def test_another_model_stays_as_it_is_and_the_reason_is_given(tmp_path: Path) -> None:
    _, outcome = quantize(mobile_block(), images())
    other, refused = again(transformer(), kept(tmp_path / "record.json", outcome), weight_only=False)
    assert not refused.modified
    assert "that of another model" in refused.refusals[0].why
    assert other.to_bytes() == load(transformer()).to_bytes()


def test_what_is_no_plan_is_refused_before_anything_runs(tmp_path: Path) -> None:
    for content, said in ((None, "cannot be read"), (b"\xff{", "is no record"), (b'{"passes": [1]}', "is no record")):
        file = tmp_path / "record.json"
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(RecipeError, match=said):
            make_pass("quantize-static", {"plan": str(file)})
    (tmp_path / "record.json").write_text('{"passes": [{"name": "simplify"}]}')
    with pytest.raises(RecipeError, match="holds no plan of quantize-static"):
        make_pass("quantize-static", {"plan": str(tmp_path)})


def test_a_damaged_plan_costs_a_message_not_the_memory(tmp_path: Path) -> None:
    _, outcome = quantize(transformer(), flat())
    assert outcome.plan is not None
    name, codes = next(iter(outcome.plan["graphs"][0]["rounded"].items()))
    for damaged in ("AAAA", "eJzt", codes["scale"]["data"]):
        codes["above"] = damaged
        with pytest.raises(onnxslim.SlimError, match=name):
            again(transformer(), kept(tmp_path / "record.json", outcome))


def test_a_recipe_names_the_record_and_a_changed_record_counts(small: Path, tmp_path: Path) -> None:
    made = onnxslim.optimize(
        small / "model.onnx",
        output=tmp_path / "first",
        passes=["fold-constants", "simplify", {"name": "quantize-static", "only_if_faster": False}],
        calibration=small / "calib.npz",
        goals={"max_accuracy_drop": 0.2},
    )
    recipe = tmp_path / "again.toml"
    model = json.dumps(str(small / "model.onnx"))
    data = json.dumps(str(small / "eval.npz"))
    recipe.write_text(
        f"model = {model}\n[data]\nevaluation = {data}\n[goals]\nmax_accuracy_drop = 0.2\n"
        '[[pass]]\nname = "fold-constants"\n[[pass]]\nname = "simplify"\n'
        '[[pass]]\nname = "quantize-static"\nplan = "first"\nonly_if_faster = false\n'
    )

    def run() -> Any:
        return onnxslim.optimize(small / "model.onnx", onnxslim.read_recipe(recipe), output=tmp_path / "second")

    second = run()
    assert (tmp_path / "second/model.onnx").read_bytes() == (tmp_path / "first/model.onnx").read_bytes()
    assert second.record.passes[-1].plan == made.record.passes[-1].plan
    lock = (tmp_path / "second/recipe.lock.toml").read_text()
    assert 'plan = "../first"' in lock
    assert onnxslim.read_recipe(tmp_path / "second/recipe.lock.toml").passes[-1]["plan"].endswith("second/../first")
    assert run().record.passes[-1].cached
    record = tmp_path / "first/record.json"
    record.write_text(record.read_text() + "\n")
    assert not run().record.passes[-1].cached
