"""Recipes: what they say is taken, what they cannot say is refused with one clear message."""

from pathlib import Path

import pytest

from onnxslim import RecipeError
from onnxslim.demo import RECIPE
from onnxslim.recipe import Recipe, make_recipe, read_recipe, write_lock

FULL = """
model = "models/model.onnx"
seed = 3
[shapes]
x = [1, 3, 48, 320]
[data]
calibration = "calib.npz"
evaluation = "/data/eval.npz"
metric = "top1"
[goals]
max_accuracy_drop = 0.01
max_size = "2 MB"
max_latency = "800 us"
[[pass]]
name = "prune-channels"
ratio = 0.3
[[pass]]
name = "quantize-static"
[[target]]
name = "native"
max_latency = "1.5 s"
"""


def test_a_recipe_is_read_with_units_and_relative_paths(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(FULL)
    recipe = read_recipe(path)
    assert recipe.model == str(tmp_path / "models/model.onnx")
    assert recipe.data.calibration == str(tmp_path / "calib.npz")
    assert recipe.data.evaluation == "/data/eval.npz"
    assert recipe.goals.max_size == 2_000_000
    assert recipe.goals.max_latency == 0.8
    assert recipe.targets[0].max_latency == 1500
    assert recipe.passes == [{"name": "prune-channels", "ratio": 0.3}, {"name": "quantize-static"}]


def test_a_lock_reads_back_as_the_same_recipe(tmp_path):
    (tmp_path / "out").mkdir()
    path = tmp_path / "recipe.toml"
    path.write_text(FULL)
    recipe = read_recipe(path)
    write_lock(recipe, tmp_path / "out" / "recipe.lock.toml")
    again = read_recipe(tmp_path / "out" / "recipe.lock.toml")
    assert Path(again.model).resolve() == Path(recipe.model).resolve()
    assert again.model_copy(update={"model": "", "data": None}) == recipe.model_copy(update={"model": "", "data": None})
    assert 'model = "../models/model.onnx"' in (tmp_path / "out" / "recipe.lock.toml").read_text()


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({}, "model is missing"),
        ({"model": "m", "modle": 1}, "Did you mean 'model'"),
        ({"model": "m", "goals": {"max_sise": "1 MB"}}, "Did you mean 'goals.max_size'"),
        ({"model": "m", "goals": {"max_size": "big"}}, "goals.max_size"),
        ({"model": "m", "goals": {"max_latency": "5 parsecs"}}, "'5 ms'"),
        ({"model": "m", "goals": {"max_accuracy_drop": -1}}, "greater than or equal to 0"),
        ({"model": "m", "shapes": {"x": [1, -3]}}, "greater than or equal to 0"),
        ({"model": "m", "pass": [{"ratio": 0.3}]}, "needs a name"),
        ({"model": "m", "target": [{"name": "native"}, {"name": "native"}]}, "there twice"),
        ({"model": "m", "target": [{"name": "native", "max_size": 1}]}, "max_size"),
    ],
)
def test_what_a_recipe_cannot_say_is_refused(tables, message):
    with pytest.raises(RecipeError, match=message) as raised:
        make_recipe(tables, "r.toml")
    assert str(raised.value).startswith("r.toml: ")
    assert "\n" not in str(raised.value)


def test_broken_and_missing_files_are_named(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(tmp_path / "missing.toml")
    path = tmp_path / "broken.toml"
    path.write_text("model = ")
    with pytest.raises(RecipeError, match="not TOML"):
        read_recipe(path)


def test_the_bundled_recipe_is_legal():
    recipe = read_recipe(RECIPE)
    assert isinstance(recipe, Recipe)
    assert Path(recipe.model).is_file()
    assert [table["name"] for table in recipe.passes][-2:] == ["prune-channels", "quantize-static"]
