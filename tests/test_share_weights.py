from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from pydantic import ValidationError

from onnxslim.data import open_dataset
from onnxslim.model import Model, load
from onnxslim.passes import _codebook
from onnxslim.passes._codebook import Coded, Feedback, fit, kmeans, nearest
from onnxslim.passes._packed import PLANES, CodebookWriter, Form, pack, unpack_table
from onnxslim.passes._statistics import Moments
from onnxslim.passes.base import Context, Outcome
from onnxslim.passes.share_weights import ShareWeights
from onnxslim.runtime import Session

IR = {7: 3, 11: 6, 13: 7, 17: 8, 18: 8, 21: 10, 23: 11}


def make_model(nodes, inputs, outputs, weights, *, opset=17, ir=None) -> Model:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
        [numpy_helper.from_array(v, n) for n, v in weights.items()],
    )
    proto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir or max(IR.get(opset, 8), 4)
    )
    return load(proto)


def mlp(rng, *, opset=17, width=96, bias=True, seed_weights=None) -> Model:
    w1 = rng.normal(size=(width, 64)).astype(np.float32)
    w2 = rng.normal(size=(width, 32)).astype(np.float32) / 8
    weights = {"w1": w1, "b1": rng.normal(size=width).astype(np.float32), "w2": w2}
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], "fc1", transB=1),
        helper.make_node("Relu", ["h"], ["a"], "relu"),
        helper.make_node("MatMul", ["a", "w2"], ["y"], "fc2"),
    ]
    return make_model(nodes, {"x": ["n", 64]}, {"y": ["n", 32]}, weights, opset=opset)


def data(model: Model, count=200, seed=5, size=64):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(size, size)) * np.geomspace(2, 0.02, size)
    feeds = [{"x": (rng.normal(size=(1, size)) @ mixing + 0.3).astype(np.float32)} for _ in range(count)]
    return open_dataset(feeds, Session(model).specs, role="calibration")


def run(model: Model, feed: dict) -> list[np.ndarray]:
    return list(Session(model).run(feed).values())


def folded_ops(model: Model, path) -> list[str]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    ort.InferenceSession(model.to_proto().SerializeToString(), options)
    ops: list[str] = []

    def visit(graph):
        for node in graph.node:
            ops.append(node.op_type)
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    visit(attribute.g)

    visit(onnx.load(path).graph)
    return ops


# ------------------------------------------------------------------------------------------------------- numerics


def test_kmeans_reaches_the_known_optimum_of_a_normal_distribution():
    # Lloyd-Max quantiser of a unit normal: 0.1175 at 2 bits, 0.03454 at 3, 0.009497 at 4.
    values = np.random.default_rng(0).normal(size=400_000)
    for bits, best in ((2, 0.1175), (3, 0.03454), (4, 0.009497)):
        centres = kmeans(values, 1 << bits)
        error = np.mean((values - centres[nearest(values, centres)]) ** 2)
        assert error == pytest.approx(best, rel=0.02)


def test_few_different_values_are_kept_exactly():
    weight = np.random.default_rng(0).choice(np.array([-1.5, 0.25, 3.0], np.float32), size=(40, 30))
    coded = fit(weight, 4, None)
    np.testing.assert_array_equal(coded.decode(), weight)
    np.testing.assert_array_equal(fit(np.zeros((9, 9), np.float32), 4, 0).decode(), 0)


def test_importance_moves_the_values_to_where_it_counts():
    rng = np.random.default_rng(0)
    weight = (rng.normal(size=(64, 64)) * np.where(np.arange(64) < 8, 0.3, 1.0)).astype(np.float32)
    importance = np.where(np.arange(64) < 8, 100.0, 0.01)[None]

    def loss(coded):
        return float((importance * (coded.decode() - weight) ** 2).sum())

    assert loss(fit(weight, 3, None, importance)) < 0.8 * loss(fit(weight, 3, None))


def test_scales_are_kept_only_where_they_pay():
    rng = np.random.default_rng(0)
    even = rng.normal(size=(32, 512)).astype(np.float32)
    uneven = even * np.geomspace(0.01, 10, 32, dtype=np.float32)[:, None]
    assert fit(even, 4, 0).scale is None
    assert fit(uneven, 4, 0).scale is not None
    assert fit(even, 4, 0, always_scale=True).scale is not None


def test_feedback_lowers_the_error_of_the_output():
    rng = np.random.default_rng(0)
    matrices = rng.normal(size=(2, 12, 40))
    rows = rng.normal(size=(2, 300, 8)) @ rng.normal(size=(2, 8, 40)) + 0.1 * rng.normal(size=(2, 300, 40))
    covariance = rows.transpose(0, 2, 1) @ rows / 300
    book = kmeans(matrices, 8)

    def loss(indices):
        gap = matrices - book[indices]
        return float(np.einsum("gok,gkl,gol->", gap, covariance, gap))

    chosen = Feedback(covariance).assign(matrices, book, np.ones((1, 1, 1)))
    assert loss(chosen) < 0.4 * loss(nearest(matrices, book))


def test_feedback_factors_the_inverse_of_the_covariance():
    rows = np.random.default_rng(1).normal(size=(400, 150))
    covariance = (rows.T @ rows / 400)[None]
    feedback = Feedback(covariance, damping=0.0)
    upper, order = feedback.upper[0], feedback.order[0]
    assert np.array_equal(upper, np.triu(upper))
    np.testing.assert_allclose(upper.T @ upper, np.linalg.inv(covariance[0][np.ix_(order, order)]), atol=1e-9)


def test_inputs_that_hardly_vary_around_a_large_mean():
    rng = np.random.default_rng(5)
    near = (6 + 1e-4 * rng.normal(size=(2, 400, 12))).astype(np.float32)
    near[1] = 6
    moments = Moments.empty(2, 12, 3)
    for part in np.split(near, 4, axis=1):
        moments.add(part, part[:, :, :3] * 2)
    exact = np.stack([np.cov(rows.T.astype(np.float64), bias=True) for rows in near])
    assert np.abs(moments.covariance - exact).max() < 1e-5 * exact.max()
    assert np.abs(moments.cross_covariance - 2 * exact[:, :, :3]).max() < 1e-5 * exact.max()
    book, ones = np.linspace(-1, 1, 16), np.ones((2, 5, 12))
    Feedback(moments.covariance).assign(rng.normal(size=(2, 5, 12)), book, ones)
    indefinite = np.stack([-np.eye(12), np.diag([1.0] * 11 + [-1.0])])
    indices = Feedback(indefinite).assign(rng.normal(size=(2, 5, 12)), book, ones)
    assert indices.shape == (2, 5, 12)


@pytest.mark.parametrize("products", [1 << 35, 2000])
@pytest.mark.parametrize(("groups", "outputs", "inputs"), [(1, 6, 9), (5, 1, 9), (2, 3, 4)])
def test_values_of_a_codebook_are_those_of_least_squares(groups, outputs, inputs, products, monkeypatch):
    """Against a solver that sees the rows themselves; of a layer that is too large, every other output is enough."""
    monkeypatch.setattr(_codebook, "_MOST_PRODUCTS", products)
    rng = np.random.default_rng(groups)
    x, y = rng.normal(size=(groups, 50, inputs)), rng.normal(size=(groups, 50, outputs))
    indices = rng.integers(0, 4, (groups, outputs, inputs)).astype(np.uint8)
    scale = np.broadcast_to(rng.uniform(0.5, 2, (groups, outputs, 1)), indices.shape)
    importance = rng.uniform(0.5, 2, (groups, outputs))
    start = np.linspace(-1, 1, 4)
    moments = np.einsum("gnk,gnl->gkl", x, x), np.einsum("gnk,gno->gko", x, y)
    found = _codebook.refit_values(start, indices, scale, *moments, importance)
    stride = -(-groups * outputs * 4 * inputs**2 // products)
    rows, targets = [], []
    for g in range(groups):
        for o in range(0, outputs, stride):
            hot = (indices[g, o][:, None] == np.arange(4)) * scale[g, o][:, None]
            rows.append(np.sqrt(importance[g, o]) * x[g] @ hot)
            targets.append(np.sqrt(importance[g, o]) * y[g, :, o])
    best = np.linalg.lstsq(np.concatenate(rows), np.concatenate(targets), rcond=None)[0]
    np.testing.assert_allclose(found, best, atol=2e-3)
    unused = _codebook.refit_values(start, np.zeros_like(indices), scale, *moments, importance)
    np.testing.assert_allclose(unused[1:], start[1:])


@pytest.mark.parametrize("bits", range(2, 9))
def test_planes_hold_every_bit(bits):
    indices = np.random.default_rng(bits).integers(0, 1 << bits, 101).astype(np.uint8)
    back, shift = np.zeros(101, np.uint8), 0
    for width in PLANES[bits]:
        packed = pack(indices, width, shift)
        assert packed.nbytes == -(-101 * width // 8)
        back += unpack_table(width, shift)[packed].reshape(-1)[:101]
        shift += width
    assert shift == bits
    np.testing.assert_array_equal(back, indices)


# ---------------------------------------------------------------------------------------------------- in a runtime


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 17, 18, 21, 23])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_form_decodes_exactly_and_is_folded_at_load(opset, bits, tmp_path):
    rng = np.random.default_rng(bits)
    weight = rng.normal(size=(31, 33)).astype(np.float32)  # 1023 elements: the last byte is not full
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "fc")]
    model = make_model(nodes, {"x": [31, 31]}, {"y": [31, 33]}, {"w": weight}, opset=opset)
    coded = fit(weight, bits, 0 if bits % 2 else None, always_scale=True)
    forms = [Form(PLANES[bits], 0), Form((8,), 0)] + ([Form((), 0)] if opset >= 21 and bits <= 4 else [])
    for form in forms:
        changed = model.copy()
        writer = CodebookWriter(changed, uint4=True)
        writer.write(changed.graph.nodes[0].inputs[1], coded, form)
        writer.finish()
        onnx.checker.check_model(changed.to_proto(), full_check=True)
        (decoded,) = run(changed, {"x": np.eye(31, dtype=np.float32)})
        np.testing.assert_array_equal(decoded, coded.decode())
        assert folded_ops(changed, tmp_path / "o.onnx") == ["MatMul"]


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_float_types_decode_exactly(dtype):
    weight = np.random.default_rng(0).normal(size=(40, 50)).astype(dtype)
    code = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "fc")
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", code, [40, 40])],
        [helper.make_tensor_value_info("y", code, [40, 50])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    outcome = ShareWeights(scale="channel").run(model, Context())
    assert [c.rule for c in outcome.changes] == ["codebook"]
    (decoded,) = run(model, {"x": np.eye(40, dtype=dtype)})
    assert decoded.dtype == dtype
    assert np.linalg.norm(decoded.astype(float) - weight) < 0.15 * np.linalg.norm(weight.astype(float))


@pytest.mark.parametrize(
    ("opset", "bits", "ratio"), [(13, 4, 7.7), (21, 4, 7.7), (13, 3, 10.0), (13, 2, 15.0), (13, 6, 5.2)]
)
def test_a_large_weight_shrinks_by_the_bits(opset, bits, ratio, tmp_path):
    weight = np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "fc")]
    model = make_model(nodes, {"x": ["n", 512]}, {"y": ["n", 512]}, {"w": weight}, opset=opset)
    model.save(tmp_path / "a.onnx")
    outcome = ShareWeights(bits=bits).run(model, Context())
    model.save(tmp_path / "b.onnx")
    before, after = (tmp_path / "a.onnx").stat().st_size, (tmp_path / "b.onnx").stat().st_size
    assert before / after > ratio
    claimed = outcome.numbers["bytes before"] - outcome.numbers["bytes after"]
    assert claimed == pytest.approx(before - after, rel=0.01)
    assert model.opset == opset
    assert [t.name for t in (*model.graph.inputs, *model.graph.outputs)] == ["x", "y"]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(4, 4), (2, 8), (16, 5), (24, 24), (40, 1)])
def test_never_grows(bits, shape, tmp_path):
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "fc")]
    model = make_model(nodes, {"x": ["n", shape[0]]}, {"y": ["n", shape[1]]}, {"w": weight})
    before = len(model.to_proto().SerializeToString())
    outcome = ShareWeights(bits=bits, min_elements=16, scale="channel").run(model, Context())
    assert len(model.to_proto().SerializeToString()) <= before
    assert outcome.changes or outcome.refusals


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_small_weights_pay_for_tables_together(bits):
    """A table of 256 rows is more than any of them saves; it is still used where all of them save more."""
    rng = np.random.default_rng(0)

    def bytes_after(count):
        weights = {f"w{i}": rng.normal(size=(24, 24)).astype(np.float32) for i in range(count)}
        nodes = [helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"], f"fc{i}") for i in range(count)]
        model = make_model(nodes, {"x0": ["n", 24]}, {f"x{count}": ["n", 24]}, weights)
        before = len(model.to_proto().SerializeToString())
        numbers = ShareWeights(bits=bits).run(model, Context()).numbers
        after = len(model.to_proto().SerializeToString())
        assert numbers["bytes before"] - numbers["bytes after"] == pytest.approx(before - after, rel=0.1)
        return after

    alone, together = bytes_after(1), bytes_after(16)
    assert alone > 576  # a byte an index: no table
    assert together < 16 * (576 * bits / 8 + 420)


def test_every_weight_kind_is_found_and_stays_close():
    rng = np.random.default_rng(0)

    def w(*shape):
        return (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)

    weights = {
        "conv": w(16, 3, 3, 3),
        "deconv": w(16, 8, 3, 3),
        "gemm": w(392, 64) / 500,
        "left": w(40, 32),
        "rw": w(1, 96, 64),
        "rr": w(1, 96, 24),
        "table": w(50, 32),
        "flat": np.array([2, -1], np.int64),
        "ids": np.array([3, 4, 49, 0], np.int64),
        "seq": np.array([1, 2, 64], np.int64),
    }
    nodes = [
        helper.make_node("Conv", ["x", "conv"], ["c"], "conv", strides=[2, 2]),
        helper.make_node("ConvTranspose", ["c", "deconv"], ["d"], "deconv"),
        helper.make_node("Reshape", ["d", "flat"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "gemm"], ["g"], "gemm", alpha=0.5),
        helper.make_node("Reshape", ["g", "seq"], ["s"], "seq"),
        helper.make_node("LSTM", ["s2", "rw", "rr"], ["", "h"], "lstm", hidden_size=24),
        helper.make_node("Gather", ["table", "ids"], ["e"], "embed"),
        helper.make_node("MatMul", ["left", "e2"], ["y"], "left"),
    ]
    nodes.insert(5, helper.make_node("Transpose", ["s"], ["s2"], "tr", perm=[0, 1, 2]))
    nodes.insert(8, helper.make_node("Transpose", ["e"], ["e2"], "tr2", perm=[1, 0]))
    model = make_model(nodes, {"x": [2, 3, 11, 11]}, {"y": [40, 4], "h": [1, 2, 24]}, weights)
    feed = {"x": rng.normal(size=(2, 3, 11, 11)).astype(np.float32)}
    reference = run(model, feed)
    outcome = ShareWeights(bits=8, min_elements=256).run(model, Context())
    assert {c.node for c in outcome.changes} == {"conv", "deconv", "gemm", "left", "rw", "rr", "table"}
    for want, have in zip(reference, run(model, feed), strict=True):
        assert np.linalg.norm(want - have) < 0.03 * np.linalg.norm(want)


# -------------------------------------------------------------------------------------------------- identical tensors


def test_identical_initializers_are_stored_once():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(64, 64)).astype(np.float32)
    other = w.copy()
    other[3, 3] = np.nextafter(other[3, 3], 1)
    nodes = [helper.make_node("MatMul", [f"t{i}", n], [f"t{i + 1}"], f"fc{i}") for i, n in enumerate("abc")]
    weights = {"a": w, "b": w.copy(), "c": other}
    model = make_model(nodes, {"t0": ["n", 64]}, {"t3": ["n", 64]}, weights)
    feed = {"t0": rng.normal(size=(2, 64)).astype(np.float32)}
    before, size = run(model, feed), len(model.to_proto().SerializeToString())
    outcome = ShareWeights(bits=0).run(model, Context())
    np.testing.assert_array_equal(run(model, feed)[0], before[0])
    assert [(c.rule, c.node) for c in outcome.changes] == [("identical", "b")]
    assert size - len(model.to_proto().SerializeToString()) > w.nbytes
    assert outcome.numbers["bytes saved by identical tensors"] == w.nbytes


def test_a_weight_that_two_nodes_share_gets_one_codebook():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(64, 64)).astype(np.float32)
    nodes = [helper.make_node("MatMul", [f"t{i}", n], [f"t{i + 1}"], f"fc{i}") for i, n in enumerate("aab")]
    model = make_model(nodes, {"t0": ["n", 64]}, {"t3": ["n", 64]}, {"a": w, "b": w.copy()})
    outcome = ShareWeights().run(model, Context())
    assert [c.rule for c in outcome.changes] == ["identical", "codebook"]
    assert sum(node.op == "MatMul" for node in model.graph.nodes) == 3
    assert len(model.to_proto().SerializeToString()) < w.nbytes / 5


@pytest.mark.parametrize("seen", ["", "a sum", "an output", "tokens"])
def test_recurrent_weights_that_are_cut_and_joined_are_weights(seen):
    """As PyTorch exports an LSTM without folding: gates put into another order, and an axis added."""
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=(64, 16)).astype(np.float32) / 4 for name in ("ih", "hh")}
    cuts = {"zero": np.array([0]), "some": np.array([32]), "all": np.array([64])}
    nodes = []
    for name in weights:
        nodes += [
            helper.make_node("Slice", [name, "zero", "some", "zero"], [f"{name}_i"]),
            helper.make_node("Slice", [name, "some", "all", "zero"], [f"{name}_o"]),
            helper.make_node("Concat", [f"{name}_o", f"{name}_i"], [f"{name}_c"], axis=0),
            helper.make_node("Unsqueeze", [f"{name}_c", "zero"], [f"{name}_w"]),
        ]
    nodes.append(helper.make_node("LSTM", ["x", "ih_w", "hh_w"], ["y"], hidden_size=16))
    inputs, outputs = {"x": ["t", 1, 16]}, {"y": ["t", 1, 1, 16]}
    if seen == "a sum":
        inputs["z"], outputs["sum"] = [64, 16], [64, 16]
        nodes.append(helper.make_node("Add", ["z", "hh_c"], ["sum"]))
    elif seen == "an output":
        outputs["hh_c"] = [64, 16]
    elif seen:  # a prefix of what is read
        inputs["z"], outputs["product"] = [64, 16], [128, 8]
        weights["w"] = rng.normal(size=(16, 8)).astype(np.float32) / 4
        nodes.append(helper.make_node("Concat", ["hh_c", "z"], ["tokens"], axis=0))
        nodes.append(helper.make_node("MatMul", ["tokens", "w"], ["product"]))
    model = make_model(nodes, inputs, outputs, weights | cuts)
    feed = {"x": rng.normal(size=(5, 1, 16)).astype(np.float32), "z": np.zeros((64, 16), np.float32)}
    feed = {name: feed[name] for name in inputs}
    before = run(model, feed)
    outcome = ShareWeights(bits=8).run(model, Context())
    # What is added to an input, or handed out, may be no weight.
    assert [c.node for c in outcome.changes if c.node != "w"] == (["ih"] if seen else ["ih", "hh"])
    assert not any(r.node in cuts for r in outcome.refusals)
    for was, now in zip(before, run(model, feed), strict=True):
        np.testing.assert_allclose(now, was, atol=0.05)


def test_overridable_initializers_and_graph_outputs_are_left_alone():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(64, 64)).astype(np.float32)
    nodes = [helper.make_node("MatMul", [f"t{i}", n], [f"t{i + 1}"], f"fc{i}") for i, n in enumerate("abc")]
    model = make_model(
        nodes,
        {"t0": ["n", 64], "b": [64, 64]},
        {"t3": ["n", 64], "c": [64, 64]},
        {"a": w, "b": w.copy(), "c": w.copy()},
    )
    outcome = ShareWeights().run(model, Context())
    assert [(c.rule, c.node) for c in outcome.changes] == [("codebook", "a")]
    assert any(r.node == "c" and "output" in r.why for r in outcome.refusals)
    proto = model.to_proto()
    kept = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer if i.name in ("b", "c")}
    np.testing.assert_array_equal(kept["b"], w)
    np.testing.assert_array_equal(kept["c"], w)
    # The default of the input can still be overridden.
    feed = {"t0": np.ones((1, 64), np.float32)}
    assert not np.array_equal(run(model, feed)[0], run(model, feed | {"b": np.zeros((64, 64), np.float32)})[0])


def branch(name: str, weight: np.ndarray, output: str) -> onnx.GraphProto:
    return helper.make_graph(
        [helper.make_node("MatMul", ["x", name], [output], f"fc_{output}")],
        output,
        [],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["n", 64])],
        [numpy_helper.from_array(weight, name)],
    )


@pytest.mark.parametrize("bits", [0, 4])
def test_weights_in_branches_move_outwards_and_are_folded(bits, tmp_path):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(64, 64)).astype(np.float32)
    v = rng.normal(size=(64, 64)).astype(np.float32)
    then, other = branch("w", w, "a"), branch("w", w.copy(), "b")  # siblings may use one name
    for body in (then, other):
        body.node.add().CopyFrom(
            helper.make_node("MatMul", [body.output[0].name + "1", "v"], [body.output[0].name], "v")
        )
        body.node[0].output[0] += "1"
    then.initializer.append(numpy_helper.from_array(v, "v"))
    other.initializer.append(numpy_helper.from_array(v * 2, "v"))
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], "if", then_branch=then, else_branch=other)],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64]),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 64])],
    )
    model = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8))
    feeds = [{"x": rng.normal(size=(2, 64)).astype(np.float32), "c": np.array(c)} for c in (True, False)]
    before, size = [run(model, feed)[0] for feed in feeds], len(model.to_proto().SerializeToString())
    outcome = ShareWeights(bits=bits).run(model, Context())
    assert sum(c.rule == "identical" for c in outcome.changes) == 2
    after = [run(model, feed)[0] for feed in feeds]
    onnx.checker.check_model(model.to_proto(), full_check=True)
    for want, have in zip(before, after, strict=True):
        assert np.linalg.norm(want - have) <= (0.2 if bits else 0) * np.linalg.norm(want)
    smaller = len(model.to_proto().SerializeToString())
    if bits:
        assert smaller < size / 7
        assert set(folded_ops(model, tmp_path / "o.onnx")) <= {"If", "MatMul", "Identity"}
    else:
        assert size - smaller > 0.9 * w.nbytes


def test_old_models_list_their_initializers_as_inputs():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(64, 64)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "fc")]
    model = make_model(nodes, {"x": [2, 64], "w": [64, 64]}, {"y": [2, 64]}, {"w": w}, opset=7, ir=3)
    outcome = ShareWeights().run(model, Context())
    assert outcome.modified
    feed = {"x": rng.normal(size=(2, 64)).astype(np.float32)}
    assert np.linalg.norm(run(model, feed)[0] - feed["x"] @ w) < 0.2 * np.linalg.norm(feed["x"] @ w)
    onnx.checker.check_model(model.to_proto())


# ---------------------------------------------------------------------------------------------------------- recovery


@pytest.mark.parametrize("opset", [13, 21])
def test_recovery_lowers_the_error_on_inputs_it_has_not_seen(opset):
    rng = np.random.default_rng(0)
    model = mlp(rng, opset=opset)
    fresh = {"x": np.concatenate([feed["x"] for feed in data(model, 100, seed=5).take(100)])}
    rng = np.random.default_rng(77)
    unseen = {"x": (fresh["x"] + 0.05 * rng.normal(size=fresh["x"].shape)).astype(np.float32)}
    want = run(model, unseen)[0]
    errors = {}
    for recovery in ("none", "sequential"):
        changed = model.copy()
        outcome = ShareWeights(bits=3, recovery=recovery).run(changed, Context(calibration=data(model, 400)))
        errors[recovery] = np.linalg.norm(run(changed, unseen)[0] - want) / np.linalg.norm(want)
        onnx.checker.check_model(changed.to_proto(), full_check=True)
    assert errors["sequential"] < 0.6 * errors["none"]
    assert outcome.numbers["biases corrected"] == 2
    assert outcome.numbers["output error with recovery"] < outcome.numbers["output error without recovery"]


def test_the_same_seed_gives_the_same_bytes():
    model = mlp(np.random.default_rng(0))
    results = []
    for _ in range(2):
        changed = model.copy()
        ShareWeights(bits=2).run(changed, Context(calibration=data(model), seed=3))
        results.append(changed.to_proto().SerializeToString())
    assert results[0] == results[1]


def test_without_data_it_says_so():
    model = mlp(np.random.default_rng(0))
    outcome = ShareWeights().run(model, Context())
    assert any("no calibration data" in r.why for r in outcome.refusals)


# ---------------------------------------------------------------------------------------------------------- refusals


def test_quantized_weights_and_excluded_ones_are_refused_with_reasons():
    rng = np.random.default_rng(0)
    weights = {
        "q": rng.integers(-127, 127, (64, 64)).astype(np.int8),
        "s": np.array(0.01, np.float32),
        "w": rng.normal(size=(64, 64)).astype(np.float32),
        "small": rng.normal(size=(64, 3)).astype(np.float32),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["dq"], "dq"),
        helper.make_node("MatMul", ["x", "dq"], ["a"], "quantized"),
        helper.make_node("MatMul", ["a", "w"], ["b"], "head"),
        helper.make_node("MatMul", ["b", "small"], ["y"], "tail"),
    ]
    model = make_model(nodes, {"x": ["n", 64]}, {"y": ["n", 3]}, weights)
    outcome = ShareWeights(exclude=("he*",)).run(model, Context())
    assert not outcome.changes
    reasons = {r.node: r.why for r in outcome.refusals}
    assert "8 bits or fewer" in reasons["quantized"]
    assert reasons["w"] == "excluded by name"
    assert "too small" in reasons["small"]


def test_constant_nodes_are_weights_too_and_an_empty_model_is_refused():
    w = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    nodes = [
        helper.make_node("Constant", [], ["w"], "k", value=numpy_helper.from_array(w)),
        helper.make_node("MatMul", ["x", "w"], ["y"], "fc"),
    ]
    model = make_model(nodes, {"x": ["n", 64]}, {"y": ["n", 64]}, {})
    assert ShareWeights().run(model, Context()).modified
    empty = make_model([helper.make_node("Relu", ["x"], ["y"], "r")], {"x": ["n"]}, {"y": ["n"]}, {})
    outcome = ShareWeights().run(empty, Context())
    assert not outcome.modified and outcome.refusals


def test_options():
    assert ShareWeights(bits=3).weaker(Outcome()) == ShareWeights(bits=4)
    assert ShareWeights(bits=8).weaker(Outcome()) is None and ShareWeights(bits=0).weaker(Outcome()) is None
    for wrong in ({"bits": 1}, {"bits": 9}, {"scale": "row"}, {"min_elements": 0}):
        with pytest.raises(ValidationError):
            ShareWeights(**wrong)
    assert Coded(np.zeros(3, np.uint8), np.zeros(9)).bits == 4
