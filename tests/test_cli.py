"""The commands: what they print for people and for machines."""

import json
import subprocess
import sys

import onnx
import pytest

import onnxslim
from onnxslim.passes import PASSES
from onnxslim.targets import TARGETS


def test_importing_loads_neither_tvm_nor_onnx_runtime():
    heavy = ("tvm", "onnxruntime", "matplotlib")
    code = f"import sys, onnxslim, onnxslim.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_first_word_may_be_left_out_for_slim(command, small, tmp_path):
    code, out, err = command(small / "model.onnx", tmp_path / "slim.onnx")
    assert (code, err) == (0, "")
    assert "BatchNormalization" in out
    ops = {node.op_type for node in onnx.load(tmp_path / "slim.onnx").graph.node}
    assert not ops & {"BatchNormalization", "Identity"}


def test_slim_says_the_same_to_machines(command, small, tmp_path):
    code, out, _ = command("slim", small / "model.onnx", tmp_path / "slim.onnx", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["before"]["nodes"] == 9
    assert found["after"]["nodes"] == 7
    assert found["after"]["size_bytes"] == (tmp_path / "slim.onnx").stat().st_size
    assert found["before"]["macs"] == found["after"]["macs"] > 0
    assert {"rule", "node", "what"} == set(found["changes"][0])
    assert {check["name"]: check["ok"] for check in found["checks"]}["outputs"]
    assert found["kept"] and not found["undone"]


def test_slim_in_python_returns_or_writes(small, tmp_path):
    returned = onnxslim.slim(onnx.load(small / "model.onnx"))
    assert len(returned.graph.node) == 7
    assert onnxslim.slim(str(small / "model.onnx"), tmp_path / "slim.onnx") is None
    assert onnx.load(tmp_path / "slim.onnx") == returned
    with pytest.raises(TypeError):
        onnxslim.slim(returned, fast=True)


def test_passes_and_targets_are_listed_with_what_they_take(command):
    _, out, _ = command("passes")
    for kind in PASSES.values():
        assert kind.name in out
        for name, field in kind.model_fields.items():
            assert name in out
            assert field.description, f"{kind.name}: {name} says nothing of itself"
    _, out, _ = command("passes", "prune-channels", "--json")
    assert json.loads(out)["prune-channels"]["properties"]["ratio"]["default"] == 0.3
    code, _, err = command("passes", "prune")
    assert code == 2
    assert "prune-channels" in err
    _, out, _ = command("targets", "--json")
    assert list(json.loads(out)) == list(TARGETS)
    assert {"native", "x86-64-v3", "x86-64-v4", "cortex-a72", "raspberry-pi-4"} <= set(TARGETS)


def test_inspect_shows_what_each_pass_would_do(command, small):
    code, out, _ = command("inspect", small / "model.onnx", "--data", small / "calib.npz", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["inputs"] == {"image": "float32 [N, 3, 8, 8]"}
    prospects = {entry["name"]: entry for entry in found["passes"]}
    assert list(prospects) == list(PASSES)
    assert sum(prospects["prune-channels"]["changes"].values()) >= 2
    assert prospects["quantize-static"]["changes"]
    assert found["targets"] == [{"name": "native", "compiles": True, "unsupported_ops": {}, "note": ""}]
    code, out, _ = command("inspect", small / "model.onnx")
    assert "needs --data" in out


def test_compare_tells_equal_from_different(command, small, tmp_path):
    model = small / "model.onnx"
    code, out, _ = command("compare", model, model, "--json")
    assert code == 0
    assert all(entry["max_abs_error"] == 0 for entry in json.loads(out)["outputs"])
    proto = onnx.load(model)
    weight = next(tensor for tensor in proto.graph.initializer if tensor.name == "w2")
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 1.5, "w2"))
    onnx.save(proto, tmp_path / "changed.onnx")
    _, out, _ = command("compare", model, tmp_path / "changed.onnx", "--data", small / "eval.npz", "--json")
    found = json.loads(out)
    layers = {entry["tensor"]: entry for entry in found["layers"]}
    assert layers["r1"]["max_abs_error"] == 0
    assert layers["r2"]["max_abs_error"] > 0.1
    assert found["outputs"][0]["sqnr_db"] < 30
    _, out, _ = command("compare", model, tmp_path / "changed.onnx")
    assert "different" in out
    extra = onnx.load(model)
    extra.graph.output.append(onnx.helper.make_tensor_value_info("flat", onnx.TensorProto.FLOAT, ["N", 32]))
    onnx.save(extra, tmp_path / "extra.onnx")
    _, out, _ = command("compare", model, tmp_path / "extra.onnx")
    assert "different" in out and "flat" in out
    code, _, err = command("compare", model, model, "--shape", "bogus=1")
    assert code == 2 and "bogus" in err


def test_bench_gives_ratios_to_the_first(command, small):
    model = small / "model.onnx"
    code, out, _ = command("bench", model, model, "--seconds", "1", "--json")
    entries = json.loads(out)
    assert code == 0
    assert entries[0]["latency"]["ratio"] == 1
    assert all(entry["latency"]["median_ms"] > 0 for entry in entries)


def test_report_is_rendered_again_from_the_record(command, small, tmp_path):
    onnxslim.optimize(small / "model.onnx", output=tmp_path / "out", passes=["simplify"])
    page = tmp_path / "out" / "report.html"
    content = page.read_bytes()
    page.unlink()
    code, _, _ = command("report", tmp_path / "out")
    assert code == 0
    assert page.read_bytes() == content


def test_version(command):
    code, out, _ = command("--version")
    assert (code, out.strip()) == (0, onnxslim.__version__)
