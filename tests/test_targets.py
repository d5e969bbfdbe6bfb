"""Targets without compiling: the catalogue, version pins, what is done to a model before TVM sees it, bundle files."""

import hashlib
import importlib.metadata
import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from onnxslim.errors import DataError, OutputError, TargetError
from onnxslim.targets import TARGETS, Bundle, Target, find_target, runs_here
from onnxslim.targets import _tvm as tvm_door
from onnxslim.targets.bundle import new_folder
from onnxslim.targets.prepare import prepare
from onnxslim.targets.verify import _is_rounding

SUM = """<ir_version: 8, opset_import: ["" : 13]>
g (float[N, 4] a, float[N, 4] b) => (float[N, 4] y) { y = Add (a, b) }"""


def model(text):
    return parser.parse_model(text)


def graph_model(nodes, inputs, outputs, initializers, opset=17):
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def tensor(name, *shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


# ---------------------------------------------------------------------------------------------------------- catalogue


def test_importing_and_listing_targets_loads_no_heavy_library():
    code = """
import sys, onnxslim.targets as t
list(t.TARGETS.values()); t.find_target("native")
print([name for name in ("tvm", "tvm_ffi", "onnxruntime", "matplotlib") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_catalogue_holds_the_promised_targets():
    promised = {"native", "x86-64-v2", "x86-64-v3", "x86-64-v4", "cortex-a53", "cortex-a72", "cortex-a76"}
    assert promised | {"raspberry-pi-4", "raspberry-pi-5", "neoverse-n1"} <= set(TARGETS)
    assert all(name == target.name for name, target in TARGETS.items())
    assert runs_here(TARGETS["native"])


def test_target_is_frozen_and_round_trips_through_json():
    target = find_target("raspberry-pi-5")
    assert Target.model_validate_json(target.model_dump_json()) == target
    with pytest.raises(ValueError, match="frozen"):
        target.cores = 8


def test_unknown_target_names_near_matches_and_all_names():
    with pytest.raises(TargetError, match=r"'raspberry_pi4' is unknown. Did you mean raspberry-pi-4.*neoverse-n1"):
        find_target("raspberry_pi4")


def test_target_with_a_cpu_feature_that_no_machine_has_does_not_run_here():
    odd = find_target("native").model_copy(update={"cpu_flags": frozenset({"flux_capacitor"})})
    assert not runs_here(odd)


@pytest.mark.parametrize("found", ["0.1.15.post2", None])
def test_wrong_tvm_versions_are_refused_with_the_pip_line(monkeypatch, found):
    real = importlib.metadata.version

    def version(package):
        if package != "apache-tvm-ffi":
            return real(package)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(TargetError) as caught:
        tvm_door.check_versions()
    assert found is None or found in str(caught.value)
    assert 'pip install "apache-tvm==0.27.0.post1" "apache-tvm-ffi==0.1.14.post1"' in str(caught.value)


# -------------------------------------------------------------------------------------------------------- preparation


def test_prepare_inlines_functions_and_unpacks_a_uint4_codebook():
    indices = np.arange(8, dtype=np.int64).reshape(4, 2) % 16
    proto = graph_model(
        [
            helper.make_node("Cast", ["packed"], ["wide"], to=TensorProto.INT32),
            helper.make_node("Gather", ["codebook", "wide"], ["weight"]),
            helper.make_node("MatMul", ["x", "weight"], ["h"]),
            helper.make_node("twice", ["h"], ["y"], domain="mine"),
        ],
        [tensor("x", "N", 4)],
        [tensor("y", "N", 2)],
        [
            helper.make_tensor("packed", TensorProto.UINT4, (4, 2), indices.ravel().tolist()),
            numpy_helper.from_array(np.linspace(-1, 1, 16, dtype=np.float32), "codebook"),
        ],
        opset=21,
    )
    body = [helper.make_node("Add", ["a", "a"], ["b"])]
    proto.functions.append(helper.make_function("mine", "twice", ["a"], ["b"], body, [helper.make_opsetid("", 21)]))
    proto.opset_import.append(helper.make_opsetid("mine", 1))
    prepared = prepare(proto)
    assert [node.op_type for node in prepared.proto.graph.node] == ["MatMul", "Add"]
    weights = {t.name: numpy_helper.to_array(t) for t in prepared.proto.graph.initializer}
    assert set(weights) == {"weight"}
    np.testing.assert_array_equal(weights["weight"], np.linspace(-1, 1, 16, dtype=np.float32)[indices])


def test_prepare_folds_shape_arithmetic_once_sizes_are_pinned():
    text = """<ir_version: 8, opset_import: ["" : 13]> g (float[N, C, 6] x) => (float[M, K] y) {
        s = Shape (x)
        zero = Constant <value = int64[1] {0}> ()
        n = Gather (s, zero)
        rest = Constant <value_ints = [-1]> ()
        to = Concat <axis = 0> (n, rest)
        y = Reshape (x, to)
    }"""
    assert [node.op_type for node in prepare(model(text), {"x": [2, 3, 6]}).proto.graph.node] == ["Reshape"]
    still_open = [node.op_type for node in prepare(model(text)).proto.graph.node]
    assert still_open == ["Shape", "Gather", "Concat", "Reshape"]


def test_a_quantized_constant_operand_is_folded_at_any_opset():
    text = """<ir_version: 8, opset_import: ["" : 13]> g (float[1, 4] x) => (float[1, 6] y) {
        q = Constant <value = uint8 {3}> ()
        s = Constant <value_float = 0.5> ()
        z = Constant <value = uint8 {3}> ()
        fill = DequantizeLinear (q, s, z)
        pads = Constant <value_ints = [0, 1, 0, 1]> ()
        y = Pad (x, pads, fill)
    }"""
    assert [node.op_type for node in prepare(model(text)).proto.graph.node] == ["Pad"]


def test_axes_that_share_a_symbol_are_pinned_together_but_unknown_ones_are_not():
    text = SUM
    prepared = prepare(model(text), {"a": [3, 4]})
    assert [entry.shape for entry in prepared.inputs] == [(3, 4), (3, 4)]
    assert prepared.outputs[0].shape == (3, 4)
    proto = graph_model([helper.make_node("Relu", ["x"], ["y"])], [tensor("x", "?", "?")], [tensor("y", "?", "?")], [])
    assert prepare(proto, {"x": [2, 5]}).inputs[0].shape == (2, 5)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"z": [1]}, "names 'z', no input; there are: a, b"),
        ({"a": [1, 5]}, "axis 1 is 4 in the model, not 5"),
        ({"a": [1]}, "has 2 axes, not 1"),
        ({"a": [1, 4], "b": [2, 4]}, "axis 0 is 'N', which is 1 elsewhere"),
        ({"a": [-1, 4]}, "sizes are 0 or more"),
    ],
)
def test_wrong_shapes_are_named(shapes, message):
    text = SUM
    with pytest.raises(TargetError, match=message):
        prepare(model(text), shapes)


def test_initializers_that_are_inputs_become_constants_and_are_noted():
    weight = numpy_helper.from_array(np.ones((4, 2), np.float32), "w")
    proto = graph_model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [tensor("x", 1, 4), tensor("w", 4, 2)],
        [tensor("y", 1, 2)],
        [weight],
    )
    prepared = prepare(proto)
    assert [entry.name for entry in prepared.inputs] == ["x"]
    assert prepared.notes == ["1 inputs with a default value are fixed to it"]


def test_upsample_and_empty_resize_operands_are_written_as_the_one_resize_that_tvm_reads():
    scales = numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales")
    old = graph_model(
        [helper.make_node("Upsample", ["x", "scales"], ["y"], mode="nearest")],
        [tensor("x", 1, 3, 4, 4)],
        [tensor("y", 1, 3, 8, 8)],
        [scales],
        opset=9,
    )
    node = prepare(old).proto.graph.node[0]
    assert (node.op_type, list(node.input)) == ("Resize", ["x", "", "scales"])
    sizes = numpy_helper.from_array(np.array([1, 3, 8, 8]), "sizes")
    empty = numpy_helper.from_array(np.zeros(0, np.float32), "none")
    new = graph_model(
        [helper.make_node("Resize", ["x", "none", "none", "sizes"], ["y"])],
        [tensor("x", 1, 3, 4, 4)],
        [tensor("y", 1, 3, 8, 8)],
        [empty, sizes],
        opset=13,
    )
    assert list(prepare(new).proto.graph.node[0].input) == ["x", "", "", "sizes"]


# ------------------------------------------------------------------------------------------------------------ bundles


@pytest.fixture
def folder(tmp_path):
    """A bundle in all but its library and its weights."""
    place = tmp_path / "bundle"
    place.mkdir()
    (place / "model.so").write_bytes(b"not really")
    (place / "weights.npy").write_bytes(b"")
    manifest = {
        "model_sha256": "0" * 64,
        "target": find_target("cortex-a53").model_dump(mode="json"),
        "inputs": [
            {"name": "x/1", "dtype": "float32", "shape": ["N", 3]},
            {"name": "k", "dtype": "int64", "shape": ["N"]},
        ],
        "outputs": [{"name": "y", "dtype": "float32", "shape": []}],
        "requires": {},
        "compile_seconds": 1.0,
        "files": {
            "model.so": {"sha256": hashlib.sha256(b"not really").hexdigest(), "bytes": 10},
            "weights.npy": {"sha256": hashlib.sha256(b"").hexdigest(), "bytes": 0},
        },
    }
    (place / "manifest.json").write_text(json.dumps(manifest))
    return place


def edit(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_bundle_loads_and_tells_its_size(folder):
    bundle = Bundle.load(folder)
    assert bundle.library_bytes == 10
    assert bundle.size_bytes == 10 + (folder / "manifest.json").stat().st_size
    assert [entry.name for entry in bundle.inputs] == ["x/1", "k"]


def test_changed_library_is_refused(folder):
    (folder / "model.so").write_bytes(b"not reallY")
    with pytest.raises(TargetError, match="hash differs"):
        Bundle.load(folder)


@pytest.mark.parametrize("name", ["../model.so", "/etc/passwd", "sub/model.so", "..", "model.so\n", ""])
def test_file_names_that_leave_the_folder_are_refused(folder, name):
    edit(folder, lambda manifest: manifest["files"].update({name: manifest["files"]["model.so"]}))
    with pytest.raises(TargetError, match="no manifest of this version"):
        Bundle.load(folder)


def test_library_that_is_a_link_is_refused(folder, tmp_path):
    (folder / "model.so").rename(tmp_path / "elsewhere.so")
    (folder / "model.so").symlink_to(tmp_path / "elsewhere.so")
    with pytest.raises(TargetError, match="not a plain file"):
        Bundle.load(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(format=2),
        lambda manifest: manifest.update(surprise=1),
        lambda manifest: manifest.pop("inputs"),
        lambda manifest: manifest["files"].clear(),
        lambda manifest: manifest["inputs"][0].update(shape=[-1]),
    ],
)
def test_odd_manifests_are_refused(folder, change):
    edit(folder, change)
    with pytest.raises(TargetError, match=r"manifest\.json"):
        Bundle.load(folder)


def test_folder_that_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(TargetError, match="is no bundle"):
        Bundle.load(tmp_path)


def test_bundle_for_another_processor_is_not_run(folder, monkeypatch):
    monkeypatch.setattr("onnxslim.targets.bundle.runs_here", lambda target: False)
    with pytest.raises(TargetError, match=r"compiled for cortex-a53.*Copy it to the device"):
        Bundle.load(folder).run({"x/1": np.zeros((2, 3), np.float32), "k": np.zeros(2, np.int64)})


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        ({"k": np.zeros(2, np.int64)}, "lacks 'x/1'; the inputs are: x/1, k"),
        ({"x/1": np.zeros((2, 3), "f"), "k": np.zeros(2, "i8"), "z": np.zeros(1)}, "holds 'z', which is no input"),
        ({"x/1": np.zeros((2, 3)), "k": np.zeros(2, "i8")}, "dtype float64, but the model takes float32"),
        ({"x/1": np.zeros((2, 4), "f"), "k": np.zeros(2, "i8")}, r"shape \[2, 4\], but the model takes \['N', 3\]"),
        ({"x/1": np.zeros(3, "f"), "k": np.zeros(2, "i8")}, "shape"),
        ({"x/1": np.zeros((2, 3), "f"), "k": np.zeros(5, "i8")}, r"input 'k': shape \[5\], but the model takes \[2\]"),
    ],
)
def test_feed_that_does_not_fit_is_named(folder, feed, message):
    with pytest.raises(DataError, match=message):
        Bundle.load(folder).check(feed)


def test_feed_is_made_contiguous_and_little_endian_checked(folder):
    wide = np.zeros((2, 6), np.float32)
    arrays = Bundle.load(folder).check({"x/1": wide[:, ::2], "k": np.zeros(2, np.int64)})
    assert arrays[0].flags["C_CONTIGUOUS"]


def test_new_folder_replaces_bundles_only_and_leaves_nothing_behind(folder, tmp_path):
    with pytest.raises(RuntimeError, match="boom"), new_folder(folder):
        raise RuntimeError("boom")
    Bundle.load(folder)
    with new_folder(folder) as stage:
        (stage / "manifest.json").write_text("{}")
    assert [file.name for file in folder.iterdir()] == ["manifest.json"]
    mine = tmp_path / "photos"
    mine.mkdir()
    (mine / "cat.jpg").write_bytes(b"")
    for other in (mine, folder):  # a manifest.json that is none of ours makes no bundle
        with pytest.raises(OutputError, match="is not a bundle"), new_folder(other):
            pass
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bundle", "photos"]


def test_prepared_models_stay_legal():
    text = """<ir_version: 8, opset_import: ["" : 13]> g (bool c, float[2, 3] x) => (float[2, 3] y) {
        y = If (c) <
            then_branch = t () => (float[2, 3] p) { k = Constant <value_floats = [2.0]> () p = Add (k, x) },
            else_branch = e () => (float[2, 3] q) { q = Neg (x) }>
    }"""
    prepared = prepare(model(text))
    onnx.checker.check_model(prepared.proto)
    names = [node.name for node in prepared.proto.graph.node]
    assert all(names)


def test_only_what_runtimes_themselves_disagree_on_is_rounding():
    """A sigmoid far below zero is all rounding; a wrong number is not, however small."""
    expected = {"y": np.array([1.0e-7, 3.0e-7], np.float32)}
    plain = {"y": np.array([1.1e-7, 3.0e-7], np.float32)}
    near = {"y": np.array([1.0e-7, 3.3e-7], np.float32)}
    wrong = {"y": np.array([3.0e-7, 1.0e-7], np.float32)}
    assert _is_rounding(expected, near, plain)
    assert not _is_rounding(expected, wrong, plain)
    assert not _is_rounding(expected, near, expected)
    assert not _is_rounding({"n": np.array([1])}, {"n": np.array([2])}, {"n": np.array([2])})
    assert not _is_rounding(expected, {"y": np.array([np.nan, 3.0e-7], np.float32)}, plain)
