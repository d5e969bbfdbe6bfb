import gc
import subprocess
import sys
import time

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from onnxslim.errors import ModelError
from onnxslim.model import load
from onnxslim.runtime import Session, Timing, detached, environment, interleaved_latency, max_ir_version, peak_memory

ADD = """
<ir_version: 8, opset_import: ["" : 17]>
graph (float[N, 3] x, float[3] bias) => (float[N, 3] y)
<float[3] bias = {1, 2, 3}>
{
    hidden = Relu(x)
    y = Add(hidden, bias)
}
"""


def model(text=ADD, **changes):
    proto = parser.parse_model(text)
    for name, value in changes.items():
        setattr(proto, name, value)
    return proto


def x(*rows):
    return np.array(rows, np.float32)


def test_import_of_the_package_loads_no_runtime():
    code = "import sys, onnxslim, onnxslim.runtime; print([m for m in ('onnxruntime', 'tvm') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_session_runs_and_describes_inputs():
    session = Session(model())
    assert list(session.inputs) == ["x"]
    assert session.inputs["x"].shape == ["N", 3] and session.inputs["x"].dtype == np.float32
    assert list(session.optional_inputs) == ["bias"] and session.optional_inputs["bias"].optional
    np.testing.assert_array_equal(session.run({"x": x([-1, 0, 5])})["y"], x([1, 2, 8]))
    np.testing.assert_array_equal(session.run({"x": x([1, 1, 1]), "bias": x(0, 0, 9)})["y"], x([1, 1, 10]))


def test_scalar_unknown_rank_and_meaningless_symbols_are_told_apart():
    text = """<ir_version: 8, opset_import: ["" : 17]>
    graph (int64 rate, float any, float[?, N] image) => (float y) { y = Identity(any) }"""
    proto = model(text)
    proto.graph.input[1].type.tensor_type.ClearField("shape")
    proto.graph.input[2].type.tensor_type.shape.dim[0].dim_param = "?"
    inputs = Session(proto).inputs
    assert inputs["rate"].shape == []
    assert inputs["any"].shape is None
    assert inputs["image"].shape == [None, "N"]
    assert str(inputs["rate"]) == "int64 []" and "any rank" in str(inputs["any"])


def test_inner_tensors_can_be_fetched_in_any_order_and_twice(tmp_path):
    proto = model()
    path = tmp_path / "m.onnx"
    onnx.save(proto, path)
    for source in (proto, path, load(path), proto.SerializeToString()):
        outputs = Session(source, outputs=["y", "hidden", "x", "y"]).run({"x": x([-1, 0, 5])})
        assert list(outputs) == ["y", "hidden", "x"]
        np.testing.assert_array_equal(outputs["hidden"], x([0, 0, 5]))
    assert [value.name for value in proto.graph.output] == ["y"]


def test_what_operators_of_the_runtime_make_is_known_before_they_run():
    text = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]> g (float[n, 4] x) => (int64[m] y) {
      a = com.microsoft.Gelu(x)
      b = Relu(a)
      y = Shape(b)
    }"""
    outputs = Session(parser.parse_model(text), outputs=["b", "y"], optimize=False).outputs
    assert outputs["b"].dtype == np.float32 and outputs["b"].shape == ["n", 4]
    assert outputs["y"].dtype == np.int64


def test_fetching_an_unknown_tensor_names_it():
    with pytest.raises(ModelError, match="no tensor 'nothing'"):
        Session(model(), outputs=["nothing"])


def test_a_file_format_too_new_for_the_runtime_is_capped_in_memory_only(tmp_path):
    proto = model(ir_version=max_ir_version() + 1)
    path = tmp_path / "new.onnx"
    onnx.save(proto, path)
    content = path.read_bytes()
    for source in (proto, path, load(path)):
        assert Session(source).run({"x": x([1, 1, 1])})["y"].tolist() == [[2, 3, 4]]
    assert proto.ir_version == max_ir_version() + 1
    assert path.read_bytes() == content
    assert peak_memory(path, {"x": x([1, 1, 1])}) is not None


def test_external_data_is_found_when_outputs_are_added(tmp_path):
    proto = model(ir_version=max_ir_version() + 1)
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(x(1, 2, 3), "bias"))  # raw, so it can move out
    path = tmp_path / "m.onnx"
    onnx.save_model(proto, path, save_as_external_data=True, location="w.data", size_threshold=0)
    assert (tmp_path / "w.data").exists()
    assert Session(path, outputs=["y"]).run({"x": x([0, 0, 0])})["y"].tolist() == [[1, 2, 3]]
    assert Session(load(path)).run({"x": x([0, 0, 0])})["y"].tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("optimize", [True, False])
def test_failure_while_running_names_the_innermost_node(optimize):
    text = """<ir_version: 8, opset_import: ["" : 17]>
    graph (bool c, float[N, M] a, float[K, L] b) => (float[P, Q] y) {
        y = If (c) <
            then_branch = yes () => (float[P, Q] t) { t = MatMul(a, b) },
            else_branch = no () => (float[P, Q] e) { e = Identity(a) }
        >
    }"""
    proto = model(text)
    proto.graph.node[0].attribute[0].g.node[0].name = "product"
    session = Session(proto, optimize=optimize)
    session.run({"c": np.array(False), "a": np.ones((2, 3), np.float32), "b": np.ones((2, 3), np.float32)})
    with pytest.raises(ModelError, match="MatMul node 'product' fails") as caught:
        session.run({"c": np.array(True), "a": np.ones((2, 3), np.float32), "b": np.ones((2, 3), np.float32)})
    assert "\n" not in str(caught.value)


def test_unknown_operator_is_named_with_what_it_makes():
    text = '<ir_version: 8, opset_import: ["" : 17]> graph (float[N] x) => (float[N] z) { z = Nonsense(x) }'
    with pytest.raises(ModelError, match="Nonsense node that makes 'z'"):
        Session(model(text))


def test_missing_broken_and_empty_files_are_one_line_errors(tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(model().SerializeToString()[:-20])
    empty = tmp_path / "empty.onnx"
    empty.touch()
    for path in (broken, empty, tmp_path / "missing.onnx", tmp_path):
        for outputs in (None, ["y"]):
            with pytest.raises(ModelError) as caught:
                Session(path, outputs=outputs)
            assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_feed_that_does_not_fit_is_a_model_error():
    session = Session(model())
    for feed in ({}, {"x": np.ones((1, 3))}, {"x": np.ones((1, 4), np.float32)}, {"x": x([1, 1, 1]), "z": x(1)}):
        with pytest.raises(ModelError, match="the model"):
            session.run(feed)


def test_detached_results_do_not_hold_the_memory_of_a_session():
    given = Session(model()).run({"x": x([1, 2, 3])})
    kept = detached({**given, "words": ["a"]})
    assert not given["y"].flags.owndata and kept["y"].flags.owndata
    assert np.array_equal(kept["y"], given["y"]) and kept["words"] == ["a"]
    assert detached(kept)["y"] is kept["y"]


def test_sequences_strings_and_bfloat16_go_in_and_out():
    import ml_dtypes

    text = """<ir_version: 8, opset_import: ["" : 17]>
    graph (float[N] x, string[N] s, bfloat16[N] b) => (seq(float[N]) q, string[N] t, float[N] f)
    { q = SequenceConstruct(x, x)  t = Identity(s)  f = Cast<to = 1>(b) }"""
    feed = {"x": x(1, 2), "s": np.array(["ä", ""]), "b": np.array([1.5, -2], ml_dtypes.bfloat16)}
    outputs = Session(model(text)).run(feed)
    assert isinstance(outputs["q"], list) and outputs["q"][1].tolist() == [1, 2]
    assert outputs["t"].tolist() == ["ä", ""]
    assert outputs["f"].tolist() == [1.5, -2]


def test_timing_is_interleaved_and_bounded():
    order = []
    timings = interleaved_latency(
        {name: (lambda name=name: order.append(name)) for name in "abc"},
        repeats=4,
        warmup=1,
        min_seconds=0,
        max_seconds=5,
    )
    assert order[:3] == ["a", "b", "c"]  # warm-up
    rounds = [order[i : i + 3] for i in range(3, len(order), 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert [turn[0] for turn in rounds] == ["a", "b", "c", "a"]
    assert {name: len(timing.samples_ms) for name, timing in timings.items()} == {"a": 4, "b": 4, "c": 4}
    assert timings["a"].warmup_runs == 1

    start = time.perf_counter()
    slow = interleaved_latency({"s": lambda: time.sleep(0.05)}, repeats=1000, max_seconds=0.3)
    assert time.perf_counter() - start < 1
    assert 1 <= len(slow["s"].samples_ms) < 10
    assert slow["s"].median_ms >= 50


def test_latency_holds_the_ratio_of_medians():
    base, fast = Timing([10.0, 20.0, 30.0], 2), Timing([5.0, 4.0, 6.0], 2)
    entry = fast.latency(runtime="tvm", threads=3, baseline=base, baseline_name="original")
    assert (entry.median_ms, entry.ratio, entry.baseline, entry.threads, entry.warmup_runs) == (
        5,
        0.25,
        "original",
        3,
        2,
    )
    assert entry.p10_ms == pytest.approx(4.2) and entry.p90_ms == pytest.approx(5.8)
    alone = base.latency(runtime="onnxruntime", threads=1)
    assert alone.ratio is None and alone.baseline is None


def test_peak_memory_grows_with_the_weights_and_not_with_the_parent(tmp_path):
    def made(megabytes):
        weight = np.ones((megabytes * 2**18 // 1024, 1024), np.float32)
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)],
            "g",
            [onnx.helper.make_tensor_value_info("x", 1, [1, 1024])],
            [onnx.helper.make_tensor_value_info("y", 1, None)],
            [onnx.numpy_helper.from_array(weight, "w")],
        )
        path = tmp_path / f"{megabytes}.onnx"
        onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]), path)
        return path

    feed = {"x": np.ones((1, 1024), np.float32)}
    ballast = np.ones(2**26)  # 512 MB in this process
    small, large = peak_memory(made(1), feed), peak_memory(made(100), feed)
    del ballast
    assert small is not None and large is not None
    assert small < 100e6
    assert 80e6 < large - small < 500e6


def test_peak_memory_is_none_where_the_model_does_not_run(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(model(), path)
    assert peak_memory(path, {"x": np.ones((1, 4), np.float32)}) is None
    assert peak_memory(tmp_path / "missing.onnx", {"x": x([1, 1, 1])}) is None
    assert peak_memory(path, {"x": x([1, 1, 1])}, timeout=0.01) is None


def test_environment_is_text_and_loads_no_tvm():
    code = "import sys, json; from onnxslim.runtime import environment; e = environment(); print(json.dumps(e)); "
    code += "assert 'tvm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    found = environment()
    assert all(isinstance(value, str) and value for value in found.values())
    assert found["numpy"] == np.__version__
    assert {"cpu", "cpu features", "cores", "load", "memory", "apache-tvm", "onnxruntime", "system"} <= set(found)


# ------------------------------------------------------------------------------------------------------ shared weights


def _weighted(dtype=TensorProto.FLOAT, size=40, ir_version=9):
    """y = x @ w, z = x @ v in one branch of an If and x @ u in the other; the bodies have weights of their own."""
    array = np.random.default_rng(0).standard_normal((size, size)).astype(helper.tensor_dtype_to_np_dtype(dtype))

    def branch(name, scale, weight):
        values = numpy_helper.from_array((array * scale).astype(array.dtype), weight)
        out = helper.make_tensor_value_info(name, dtype, None)
        return helper.make_graph([helper.make_node("MatMul", ["x", weight], [name])], name, [], [out], [values])

    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("If", ["c"], ["z"], then_branch=branch("a", 2, "v"), else_branch=branch("b", 3, "v")),
    ]
    inputs = [helper.make_tensor_value_info("x", dtype, ["N", size]), helper.make_tensor_value_info("c", 9, [])]
    if ir_version < 4:
        inputs.append(helper.make_tensor_value_info("w", dtype, [size, size]))
    outputs = [helper.make_tensor_value_info(name, dtype, None) for name in "yz"]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(array, "w")])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=ir_version)
    return proto, array


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.INT32])
@pytest.mark.parametrize("source", ["proto", "bytes", "file", "external"])
def test_a_plain_session_of_a_model_gives_what_onnx_runtime_gives(tmp_path, kind, source):
    """Weights shared from a file, an external file, bytes that are not aligned, or a proto; also where names repeat."""
    proto, array = _weighted(kind)
    path = tmp_path / "m.onnx"
    onnx.save(proto, path, save_as_external_data=source == "external", size_threshold=0)
    loaded = load({"proto": proto, "bytes": path.read_bytes()}.get(source, path))
    session = Session(loaded, optimize=False)
    for flag in (True, False):
        feed = {"x": np.ones((2, 40), array.dtype), "c": np.array(flag)}
        expected = onnxruntime.InferenceSession(path).run(None, feed)
        for one, other in zip(expected, session.run(feed).values(), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-2 if kind == TensorProto.FLOAT16 else 1e-5, atol=1e-2)


def test_a_plain_session_uses_the_weights_where_they_are():
    proto, _ = _weighted()
    loaded = load(proto)
    weights = np.ones((40, 40), np.float32)
    loaded.graph.nodes[0].inputs[1] = gs.Constant("w", weights)
    session = Session(loaded, optimize=False)
    feed = {"x": np.ones((1, 40), np.float32), "c": np.array(True)}
    assert session.run(feed)["y"][0, 0] == 40
    weights[:] = 2  # nobody may do this, but it shows that there is no copy
    assert session.run(feed)["y"][0, 0] == 80


def test_old_files_and_odd_weights_load_plainly():
    old, array = _weighted(ir_version=3)
    feed = {"x": np.ones((1, 40), np.float32), "c": np.array(True)}
    np.testing.assert_allclose(Session(load(old), optimize=False).run(feed)["y"], feed["x"] @ array, atol=1e-4)
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[N, 4096] x) => (float[N, 4096] y, string[600] s)
    { d = DequantizeLinear<axis = 0>(q, scale) y = Add(x, d) s = Identity(t) }"""
    proto = model(text)
    proto.graph.initializer.extend(
        (
            TensorProto(name="q", data_type=TensorProto.INT4, dims=[4096], raw_data=b"\xc3" * 2048),
            numpy_helper.from_array(np.array(["a"] * 600, object), "t"),
            numpy_helper.from_array(np.full(4096, 0.5, np.float32), "scale"),
        )
    )
    odd = Session(load(proto), optimize=False).run({"x": np.zeros((1, 4096), np.float32)})
    assert odd["y"][0, :2].tolist() == [1.5, -2] and odd["s"].tolist() == ["a"] * 600


def test_an_initializer_that_does_not_fit_its_shape_is_named():
    proto, _ = _weighted()
    proto.graph.initializer[0].dims[0] = 41
    with pytest.raises(ModelError, match="initializer 'w': its data does not fit its shape"):
        Session(load(proto.SerializeToString()), optimize=False)


def test_a_model_of_many_weights_is_mapped_from_a_file_that_goes_with_the_session(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    weight = np.random.default_rng(0).normal(size=(1024, 9000)).astype(np.float32)  # 37 MB
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Relu", ["m"], ["y"])]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1024])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 9000])]
    graph = helper.make_graph(nodes, "heavy", inputs, outputs, [numpy_helper.from_array(weight, "w")])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = np.ones((2, 1024), np.float32)
    for source in (proto, load(proto)):
        session = Session(source, outputs=["m", "y"])
        (folder,) = tmp_path.iterdir()
        assert (folder / "session.onnx").stat().st_size < 10_000
        found = session.run({"x": x})
        np.testing.assert_allclose(found["m"], x @ weight, rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal(found["y"], np.maximum(found["m"], 0))
        del session
        gc.collect()
        assert not list(tmp_path.iterdir())
