"""Tuning: other tiles compute the same, a choice is kept, and what cannot be tuned is refused."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxslim.errors import RecipeError, TargetError
from onnxslim.recipe import make_recipe
from onnxslim.targets import compile, find_target
from onnxslim.targets import tune as tuning
from onnxslim.targets._tvm import resolve_target
from onnxslim.targets.lower import fuse, import_model
from onnxslim.targets.machine import Machine
from onnxslim.targets.prepare import prepare
from onnxslim.targets.tiling import Tile, Tiling, tiles_to_try
from onnxslim.targets.tuning_database import Database, Verdict

RNG = np.random.default_rng(0)


@pytest.fixture
def database(tmp_path, monkeypatch):
    """The file that tuning keeps, in a cache folder of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "onnxslim" / "tuning.json"


@pytest.fixture(scope="module")
def native():
    return resolve_target(find_target("native"))


def array(*shape):
    return (RNG.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def model(nodes, shape, weights):
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return onnx.shape_inference.infer_shapes(made)


def product(rows=24, depth=16, columns=12):
    """A matrix product so narrow that only a few tiles are worth a try."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["a"]),
        helper.make_node("Relu", ["a"], ["y"]),
    ]
    return model(nodes, [rows, depth], {"w": array(depth, columns), "b": array(columns)})


def convolution(inputs, outputs, size, kernel=3, **attributes):
    """A convolution with a bias, an activation and a residual behind it."""
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], **attributes),
        helper.make_node("Sigmoid", ["c"], ["s"]),
        helper.make_node("Mul", ["c", "s"], ["y"]),
    ]
    groups = attributes.get("group", 1)
    weights = {"w": array(outputs, inputs // groups, kernel, kernel), "b": array(outputs)}
    return model(nodes, [1, inputs, *size], weights)


def assert_runs_like_onnxruntime(bundle, proto):
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {"x": RNG.standard_normal(session.get_inputs()[0].shape).astype(np.float32)}
    (wanted,) = session.run(None, feed)
    np.testing.assert_allclose(bundle.run(feed)["y"], wanted, rtol=1e-4, atol=1e-5)


def imported(proto):
    return import_model(prepare(proto, {}), resolve_target(find_target("native")))


def workloads(proto, native):
    """The workloads of a model, with the tile that each gets without tuning."""
    tiling = Tiling(Machine.of(native))
    fuse(imported(proto), native, tiling)
    return {key: demand.tile for key, demand in tiling.demands.items()}


def tried(path):
    """How many tiles were measured for each workload."""
    (verdicts,) = json.loads(path.read_text())["processors"].values()
    return {key: len(verdict["tried"]) for key, verdict in verdicts.items()}


def told(bundle):
    return [note for note in bundle.notes if note.startswith("tuning")]


MODELS = {
    "product": product(columns=70),
    "edges": convolution(5, 19, (9, 13), pads=[1, 1, 1, 1], strides=[2, 1]),
    "groups": convolution(6, 34, (7, 7), pads=[1, 1, 1, 1], group=2),
    "one by one": convolution(7, 33, (5, 5), kernel=1),
    "winograd": convolution(16, 36, (20, 20), pads=[1, 1, 1, 1]),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_tile_computes_the_same(name, native, database):
    proto = MODELS[name]
    (key,) = workloads(proto, native)
    assert json.loads(key)["kind"] == {"product": "matmul", "winograd": "winograd"}.get(name, "convolution")
    for tile in ((1, 1), (3, 2), (7, 1)):
        Database(native).keep(key, Verdict(best=tile))
        assert tuning.tune(imported(proto), native, 0).tiles == {key: Tile(*tile)}
        bundle = compile(proto, tune=0)
        assert "1 have a faster tile" in told(bundle)[0]
        assert_runs_like_onnxruntime(bundle, proto)


def test_tuning_resumes_until_nothing_is_left(native, database):
    proto = product()
    seen = []
    # Each turn has time for a tile or two, on a busy machine later; the file grows until nothing is left to measure.
    for turn in range(60):
        found = tuning.tune(imported(proto), native, 0.4 + turn / 20)
        seen.append(sum(tried(database).values()) if database.exists() else 0)
        if "go" not in found.notes[0]:
            break
    assert found.notes[0].endswith("1 are tuned in full")
    assert seen == sorted(seen)
    assert seen[-1] > 0
    kept = database.read_bytes()
    again = tuning.tune(imported(proto), native, 3600)
    assert again == found
    assert database.read_bytes() == kept
    bundle = compile(proto, tune=3600)
    assert told(bundle) == found.notes
    assert_runs_like_onnxruntime(bundle, proto)


@pytest.mark.parametrize(("ratio", "is_kept"), [(0.9, True), (0.99, False)])
def test_only_what_is_clearly_faster_is_kept(ratio, is_kept, native, database, monkeypatch):
    first = {}

    def measured(search, call):
        # The first call that a search times is that of a challenger.
        first.setdefault(id(search), call)
        return ratio if call is first[id(search)] else 1.0

    monkeypatch.setattr(tuning._Search, "_time", measured)
    proto = product()
    ((key, default),) = workloads(proto, native).items()
    monkeypatch.setattr(tuning, "_TURN", 1)
    found = tuning.tune(imported(proto), native, 60)
    if is_kept:
        assert found.tiles[key] != default
    else:
        assert found.tiles == {}
    verdict = Database(native).verdicts[key]
    assert verdict.tile == found.tiles.get(key)
    assert (default.rows, default.vectors) not in verdict.tried


def test_without_tuning_nothing_is_measured_or_taken(native, database):
    proto = product()
    ((key, default),) = workloads(proto, native).items()
    Database(native).keep(key, Verdict(best=(1, 1)))
    assert told(compile(proto)) == []
    assert default != Tile(1, 1)
    assert workloads(proto, native) == {key: default}


def test_a_damaged_database_is_noted_and_replaced(native, database):
    database.parent.mkdir(parents=True)
    for content in ('{"format": 1, "processors": {', '{"format": 2}', '{"processors": {"a": {"b": {"best": [0, 1]}}}}'):
        database.write_text(content)
        found = tuning.tune(imported(product()), native, 60)
        assert any(str(database) in note and "damaged" in note for note in found.notes)
        assert tried(database)
        assert Database(native).notes == []


def test_a_cache_folder_that_cannot_be_written_costs_only_the_memory(native, database):
    database.parent.parent.mkdir(parents=True)
    database.parent.write_text("a file where a folder is wanted")
    found = tuning.tune(imported(product()), native, 60)
    assert any("cannot be written" in note for note in found.notes)


def test_open_sizes_are_said_to_stand_in_the_way(database):
    proto = product(rows="n")
    assert "no product by constants has all of its sizes known" in told(compile(proto, tune=1))[0]


def test_a_target_that_does_not_run_here_is_refused(database, tmp_path, command):
    other = "raspberry-pi-4" if resolve_target(find_target("native")).machine == "x86_64" else "x86-64-v2"
    with pytest.raises(TargetError, match=f"{other}.*this machine"):
        compile(product(), other, tune=1, output=tmp_path / "bundle")
    onnx.save(product(), tmp_path / "model.onnx")
    code, _, err = command("compile", tmp_path / "model.onnx", "--target", other, "-o", tmp_path / "b", "--tune", "1s")
    assert code == 2
    assert "this machine" in err
    code, _, err = command("optimize", tmp_path / "model.onnx", "--target", other, "-o", tmp_path / "o", "--tune", "1s")
    assert code == 2
    assert "tune" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx"]


def test_command_line_and_recipe_take_a_time(database, tmp_path, command):
    onnx.save(product(), tmp_path / "model.onnx")
    arguments = ("compile", tmp_path / "model.onnx", "-o", tmp_path / "bundle", "--json")
    code, out, err = command(*arguments, "--tune", "60s")
    assert code == 0, err
    entry = json.loads(out)
    assert entry["status"] == "verified"
    assert any(note.startswith("tuning: of 1 products") for note in entry["notes"])
    assert tried(database)
    code, _, err = command(*arguments, "--tune", "soon")
    assert code == 2
    assert "--tune soon: write a time with its unit" in err
    code, _, err = command("optimize", tmp_path / "model.onnx", "-o", tmp_path / "out", "--tune", "2s")
    assert code == 2
    assert "--target" in err
    recipe = make_recipe({"model": "m.onnx", "target": [{"name": "native", "tune": "10 min"}]}, "recipe.toml")
    assert recipe.targets[0].tune == 600
    with pytest.raises(RecipeError, match="with its unit"):
        make_recipe({"model": "m.onnx", "target": [{"name": "native", "tune": "10 ms"}]}, "recipe.toml")


@pytest.mark.parametrize("rows", [None, 1, 5, 196])
@pytest.mark.parametrize("columns", [3, 17, 95, 512])
def test_tiles_to_try_fit_and_are_tried_once(rows, columns, native):
    machine = Machine.of(native)
    found = tiles_to_try(rows, columns, machine.lanes(), machine)
    assert len(found) == len(set(found)) > 0
    for tile in found:
        assert tile.rows <= (rows or machine.registers)
        # Sums, the factor of a row, and the columns, which one row multiplies straight from memory.
        shared = tile.vectors if tile.rows > 1 else 0
        assert tile.rows * tile.vectors + shared + 1 <= machine.registers
