"""``slim`` takes what the PyPI package's takes, does what is asked, and says what it did."""

import csv
import inspect
import json
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, parser

import onnxslim
from onnxslim.passes import Change, Outcome, Simplify
from onnxslim.skipping import rules_to_skip

NET = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 4] x) => (float[N, 4] y)
{
    a = Relu (x)
    same = Identity (a)
    b = Exp (same)
    c = Neg (b)
    y = Neg (c)
}
"""

X = np.arange(-4, 4, dtype=np.float32).reshape(2, 4)


def _ops(proto):
    return [node.op_type for node in proto.graph.node]


def _run(proto, **feed):
    return onnxruntime.InferenceSession(proto.SerializeToString()).run(None, feed)[0]


def _dims(value):
    return [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]


@pytest.fixture
def net():
    return parser.parse_model(NET)


def test_every_argument_of_the_pypi_package_is_taken():
    theirs = """model output_model model_check input_shapes inputs outputs no_shape_infer skip_optimizations dtype
        skip_fusion_patterns size_threshold inspect dump_to_disk save_as_external_data model_check_inputs verbose"""
    assert list(inspect.signature(onnxslim.slim).parameters) == theirs.split()
    with pytest.raises(TypeError):
        onnxslim.slim(NET, fast=True)


def test_a_model_in_memory_comes_back_as_one_that_can_be_saved(net, tmp_path):
    before = net.SerializeToString()
    made = onnxslim.slim(net)
    onnx.save(made, tmp_path / "made.onnx")
    assert net.SerializeToString() == before
    assert _ops(made) == ["Relu", "Exp"]
    np.testing.assert_allclose(_run(made, x=X), np.exp(np.maximum(X, 0)), rtol=1e-6)
    assert onnxslim.slim(net.SerializeToString()) == made
    assert onnxslim.slim(net, tmp_path / "written.onnx") is None
    assert onnx.load(tmp_path / "written.onnx") == made


@pytest.mark.parametrize("shapes", [{"x": [2, 4]}, ["x:2,4"]])
def test_input_shapes_are_fixed_in_the_result(net, shapes):
    made = onnxslim.slim(net, input_shapes=shapes)
    assert _dims(made.graph.input[0]) == _dims(made.graph.output[0]) == [2, 4]


def test_a_part_is_cut_out_and_simplified(net):
    made = onnxslim.slim(net, inputs=["a:fp16"], outputs=["c"])
    assert [value.name for value in (*made.graph.input, *made.graph.output)] == ["a", "c"]
    assert made.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT16
    np.testing.assert_allclose(_run(made, a=X.astype(np.float16)), -np.exp(X), rtol=1e-6)


def test_the_type_is_converted(small):
    half = onnxslim.slim(small / "model.onnx", dtype="fp16")
    assert {tensor.data_type for tensor in half.graph.initializer} == {TensorProto.FLOAT16}
    assert "BatchNormalization" not in _ops(half)
    single = onnxslim.slim(half, dtype="fp32")
    assert {tensor.data_type for tensor in single.graph.initializer} == {TensorProto.FLOAT}


def test_casts_between_the_two_types_do_not_stay(net):
    made = onnxslim.slim(net, inputs=["a:fp16"], dtype="fp16")
    assert _ops(made) == ["Exp"]
    assert made.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT16


def test_weights_go_into_a_file_of_their_own(small, tmp_path):
    onnxslim.slim(small / "model.onnx", tmp_path / "slim.onnx", save_as_external_data=True)
    assert {path.name for path in tmp_path.iterdir()} == {"slim.onnx", "slim.onnx.data"}
    onnx.checker.check_model(str(tmp_path / "slim.onnx"), full_check=True)
    assert onnxslim.slim(small / "model.onnx") == onnx.load(tmp_path / "slim.onnx") or (
        _run(onnx.load(tmp_path / "slim.onnx"), image=np.zeros((1, 3, 8, 8), np.float32)) is not None
    )


def test_the_check_runs_on_what_it_is_given(net, tmp_path):
    np.save(tmp_path / "x.npy", X)
    for given in (["x:3,4"], {"x": [3, 4]}, [f"x:{tmp_path / 'x.npy'}"]):
        assert _ops(onnxslim.slim(net, model_check_inputs=given)) == ["Relu", "Exp"]
    with pytest.raises(onnxslim.DataError, match="nix"):
        onnxslim.slim(net, model_check_inputs=["nix:3,4"])
    with pytest.raises(onnxslim.DataError, match="npy"):
        onnxslim.slim(net, model_check_inputs=["x:nix.npy"])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"size_threshold": 1024}, "size_threshold"),
        ({"dtype": "int8"}, "quantize-static"),
        ({"dump_to_disk": True}, "inspect"),
        ({"save_as_external_data": True}, "output_model"),
        ({"model_check": False, "model_check_inputs": ["x:1,4"]}, "model_check"),
        ({"inspect": True, "output_model": "out.onnx"}, "only inspected"),
        ({"skip_fusion_patterns": ["FusionNix"]}, "unknown rule 'FusionNix'"),
        ({"input_shapes": ["x"]}, "x: write"),
    ],
)
def test_what_makes_no_sense_is_refused(net, arguments, error):
    with pytest.raises(onnxslim.RecipeError, match=error):
        onnxslim.slim(net, **arguments)


def test_models_are_looked_at_side_by_side(net, small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert onnxslim.slim([net, str(small / "model.onnx")], dump_to_disk=True) is None
    out = capsys.readouterr().out
    assert "OnnxModel" in out and "BatchNormalization" in out
    rows = list(csv.reader((tmp_path / "model.onnx_model_info.csv").open()))
    assert rows[0] == ["NodeName", "OpType", "OutputDtype", "OutputShape"]
    assert rows[1][1:] == ["Conv", "float32", "('N', 16, 8, 8)"]
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx_model_info.csv", "OnnxModel_model_info.csv"}


def test_rules_are_left_out_by_either_name(net):
    assert "Identity" in _ops(onnxslim.slim(net, skip_optimizations=["drop-identity"]))
    assert "Identity" in _ops(onnxslim.slim(net, skip_optimizations=["dead_node_elimination"]))
    everything = ["constant_folding", "graph_fusion", "dead_node_elimination", "subexpression_elimination"]
    assert _ops(onnxslim.slim(net, skip_optimizations=[*everything, "weight_tying"])) == _ops(net)


def test_every_name_of_the_pypi_package_stands_for_rules_that_there_are():
    """Of its package, as of version 0.1.98."""
    optimizations = [
        "constant_folding",
        "graph_fusion",
        "dead_node_elimination",
        "subexpression_elimination",
        "weight_tying",
    ]
    eliminations = [
        "Concat",
        "Reshape",
        "ReshapeAs",
        "Slice",
        "Transpose",
        "TransposeViewTranspose",
        "Unsqueeze",
        "TransposeAsReshape",
    ]
    fusions = [
        "ConcatReshape",
        "ConvAdd",
        "ConvTransposeAdd",
        "ConvBN",
        "ConvTransposeBN",
        "ConvMul",
        "ConvTransposeMul",
        "Gemm",
        "GemmMul",
        "GemmAdd",
        "PadConv",
        "Reduce",
    ]
    rules = set(Simplify().rules())
    for name in [*optimizations, *(f"Elimination{x}" for x in eliminations), *(f"Fusion{x}" for x in fusions)]:
        found = rules_to_skip([name])
        assert found <= rules, name
        assert found or name == "FusionReduce", name
    assert rules - rules_to_skip(optimizations) == {"drop-unused", "hoist-constants"}


class _Wrong(Simplify):
    """Simplify, and also replace Exp by Abs."""

    def run(self, model, context):
        outcome = super().run(model, context)
        if len(outcome.changes) == context.limit or not context.allows("wrong", "exp"):
            return outcome
        next(node for node in model.graph.nodes if node.op == "Exp").op = "Abs"
        outcome.change("wrong", "exp", "made Exp an Abs")
        return outcome


def test_a_wrong_rewrite_is_undone_and_reported(net, tmp_path, command, monkeypatch):
    monkeypatch.setattr(sys.modules["onnxslim.slim"], "Simplify", _Wrong)
    onnx.save(net, tmp_path / "in.onnx")
    code, out, _ = command("slim", tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert code == 0
    assert "undone: wrong at exp, because output 'y'" in " ".join(out.split())
    assert _ops(onnx.load(tmp_path / "out.onnx")) == ["Relu", "Exp"]
    _, out, _ = command("slim", tmp_path / "in.onnx", tmp_path / "out.onnx", "--json")
    found = json.loads(out)
    assert [(entry["rule"], entry["node"]) for entry in found["undone"]] == [("wrong", "exp")]


class _Hopeless(Simplify):
    """Wrong, and deaf to limits."""

    def run(self, model, context):
        next(node for node in model.graph.nodes if node.op == "Exp").op = "Abs"
        return Outcome([Change("wrong", "exp", "made Exp an Abs"), Change("wrong", "other", "nothing")])


def test_what_cannot_be_kept_leaves_the_model_as_it_was(net, tmp_path, command, monkeypatch):
    monkeypatch.setattr(sys.modules["onnxslim.slim"], "Simplify", _Hopeless)
    assert _ops(onnxslim.slim(net)) == _ops(net)
    onnx.save(net, tmp_path / "in.onnx")
    code, out, _ = command("slim", tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert code == 0 and "Nothing was kept" in out
    assert _ops(onnx.load(tmp_path / "out.onnx")) == _ops(net)


def test_a_model_that_does_not_load_is_named(tmp_path):
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[N] x) => (float[N] y) { a = Identity (x) y = Nix (a) }'
    with pytest.raises(onnxslim.ModelError, match="Nix"):
        onnxslim.slim(parser.parse_model(text))


def test_the_command_line_says_what_it_did(small, tmp_path, command):
    arguments = ("slim", small / "model.onnx", tmp_path / "out.onnx")
    _, out, _ = command(*arguments)
    assert "nodes without Constant" in out and "MACs" in out and "size on disk" in out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    table = {row[0]: row[1:] for row in rows}
    assert table["nodes without Constant"] == ["9", "7"]
    assert table["BatchNormalization"] == ["1", "0"]
    assert table["5 ops, unchanged"] == ["7", "7"]
    assert "Checked: same outputs on" in out
    _, out, _ = command(*arguments, "--explain")
    assert "Applied: drop-identity 1" in out
    assert "folded" in out


def test_long_ledgers_are_cut_on_the_terminal_only(tmp_path, command):
    body = " ".join(f"i{k} = Identity (x) r{k} = Relu (i{k}) y{k} = Exp (r{k})" for k in range(30))
    outputs = ", ".join(f"float[N] y{k}" for k in range(30))
    text = f'<ir_version: 8, opset_import: ["" : 17]> g (float[N] x) => ({outputs}) {{ {body} }}'
    onnx.save(parser.parse_model(text), tmp_path / "in.onnx")
    arguments = ("slim", tmp_path / "in.onnx", tmp_path / "out.onnx")
    _, out, _ = command(*arguments, "--explain")
    lines = out[out.index("Applied: drop-identity 30") :].splitlines()
    assert lines[9] == "  … 22 more"
    _, out, _ = command(*arguments, "--json")
    assert sum(change["rule"] == "drop-identity" for change in json.loads(out)["changes"]) == 30


def test_the_command_line_takes_the_same_options(net, tmp_path, command):
    source, made = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(net, source)
    code, *_ = command(
        "slim",
        source,
        made,
        "--shape",
        "x=2,4",
        "--output-name",
        "b:fp16",
        "--skip",
        "drop-identity",
        "--external-data",
    )
    proto = onnx.load(made)
    assert code == 0
    assert _dims(proto.graph.input[0]) == [2, 4]
    assert proto.graph.output[0].name == "b"
    assert "Identity" in _ops(proto)
    for wrong, message in (
        (("--output-name", "nix"), "nix"),
        (("--dtype", "int3"), "fp16"),
        (("--skip", "nix"), "drop-identity"),
        (("--check-input", "x=1,2,3"), "x"),
        (("--no-check", "--check-input", "x=1,4"), "--no-check"),
        (("--shape", "x=a"), "x=a"),
    ):
        made.unlink(missing_ok=True)
        code, out, err = command("slim", source, made, *wrong)
        assert (code, out) == (2, ""), wrong
        assert message in err and err.count("error:") == 1
        assert not made.exists()
