from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from pydantic import ValidationError

from onnxslim.data import open_dataset
from onnxslim.model import Model, load
from onnxslim.passes._ranks import choose_ranks, spectrum
from onnxslim.passes.base import Context, Outcome
from onnxslim.passes.factorize_low_rank import FactorizeLowRank
from onnxslim.runtime import Session


def make_model(nodes, inputs, outputs, weights, *, opset=17) -> Model:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in weights.items()],
    )
    return load(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=max(4, min(8, opset)))
    )


def normal(rng, *shape) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def low(rng, outputs, inputs, rank) -> np.ndarray:
    return (rng.normal(size=(outputs, rank)) @ rng.normal(size=(rank, inputs)) / np.sqrt(inputs)).astype(np.float32)


def run(model: Model, feed: dict) -> np.ndarray:
    return next(iter(Session(model).run(feed).values()))


def dataset(model: Model, arrays: list[np.ndarray], name: str = "x"):
    return open_dataset([{name: a} for a in arrays], Session(model).specs, role="calibration")


def checked(model: Model) -> None:
    onnx.checker.check_model(model.to_proto(), full_check=True)


def relative(want: np.ndarray, have: np.ndarray) -> float:
    return float(np.linalg.norm(want - have) / np.linalg.norm(want))


# -------------------------------------------------------------------------------------------------------- mathematics


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (90, 12)])
def test_error_is_exactly_what_the_discarded_directions_hold(shape):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=shape)
    root = rng.normal(size=(shape[1], shape[1])) * np.geomspace(3, 0.01, shape[1])
    covariance = root @ root.T
    found = spectrum(matrix, covariance, damping=0.0)
    total = float(np.einsum("ok,kl,ol->", matrix, covariance, matrix))
    sigma = np.linalg.svd(matrix @ np.linalg.cholesky(covariance), compute_uv=False)
    np.testing.assert_allclose(found.values, sigma**2, rtol=1e-6, atol=1e-9 * total)
    for rank in (1, 5, min(shape)):
        first, second = found.factors(matrix, rank)
        assert first.shape == (rank, shape[1]) and second.shape == (shape[0], rank)
        gap = matrix - second @ first
        lost = float(np.einsum("ok,kl,ol->", gap, covariance, gap))
        assert lost == pytest.approx(found.values[rank:].sum(), rel=1e-5, abs=1e-9 * total)
        assert lost / total == pytest.approx(found.error(rank), rel=1e-5, abs=1e-9)


def test_plain_spectrum_is_the_svd_and_degenerate_inputs_are_sound():
    matrix = np.random.default_rng(0).normal(size=(10, 30))
    np.testing.assert_allclose(spectrum(matrix, None).values, np.linalg.svd(matrix, compute_uv=False) ** 2)
    for covariance in (np.zeros((30, 30)), np.full((30, 30), np.nan)):
        np.testing.assert_allclose(spectrum(matrix, covariance).values, spectrum(matrix, None).values)
    line = np.ones((30, 1)) @ np.ones((1, 30))  # all inputs on one line: one direction is all
    assert spectrum(matrix, line, damping=0.0).error(1) < 1e-9
    assert np.isfinite(spectrum(np.zeros((4, 6)), np.eye(6)).factors(np.zeros((4, 6)), 2)[0]).all()


def test_ranks_are_shared_out_near_the_optimum():
    rng = np.random.default_rng(0)
    errors, costs = [], []
    for size in (4, 5, 6, 5):
        tail = np.sort(rng.random(size))[::-1]
        errors.append([*tail.tolist(), 0.0])
        costs.append([*(10.0 * (1 + np.arange(size))).tolist(), 10.0 * (size + 1)])
    grid = np.stack(np.meshgrid(*[np.arange(len(e)) for e in errors], indexing="ij"), -1).reshape(-1, 4)
    loss = sum(np.asarray(e)[grid[:, i]] for i, e in enumerate(errors))
    price = sum(np.asarray(c)[grid[:, i]] for i, c in enumerate(costs))
    for budget in (60.0, 120.0, 180.0):
        choice = choose_ranks(errors, costs, budget)
        assert sum(c[i] for c, i in zip(costs, choice, strict=True)) <= budget
        best = loss[price <= budget].min()
        assert sum(e[i] for e, i in zip(errors, choice, strict=True)) <= best + 0.35
    assert choose_ranks(errors, costs, 1e9) == [len(e) - 1 for e in errors]
    assert choose_ranks(errors, costs, 1.0) == [0, 0, 0, 0]  # out of reach: the cheapest


# ------------------------------------------------------------------------------------------------------------ surgery


def layer_models(rng, opset):
    """One model for each layout; each weight has rank 8, so that factors of rank 8 are exact."""
    w = low(rng, 48, 60, 8)
    b = normal(rng, 48)
    gemm = {"alpha": 0.7, "beta": 1.3}
    x, y = {"x": [5, 60]}, {"y": [5, 48]}
    node = helper.make_node
    yield (
        "gemm",
        make_model([node("Gemm", ["x", "w", "b"], ["y"], "fc", **gemm)], x, y, {"w": w.T, "b": b}, opset=opset),
    )
    yield (
        "gemm_b",
        make_model([node("Gemm", ["x", "w", "b"], ["y"], "fc", transB=1, **gemm)], x, y, {"w": w, "b": b}, opset=opset),
    )
    yield (
        "gemm_row",
        make_model(
            [node("Gemm", ["x", "w", "b"], ["y"], "fc", **gemm)], x, y, {"w": w.T, "b": normal(rng, 5, 48)}, opset=opset
        ),
    )
    yield (
        "gemm_a",
        make_model(
            [node("Gemm", ["x", "w", "b"], ["y"], "fc", transA=1, **gemm)],
            {"x": [60, 5]},
            y,
            {"w": w.T, "b": b},
            opset=opset,
        ),
    )
    if opset >= 11:
        yield "gemm_no_c", make_model([node("Gemm", ["x", "w"], ["y"], "fc")], x, y, {"w": w.T}, opset=opset)
    yield (
        "matmul",
        make_model(
            [node("MatMul", ["x", "w"], ["y"], "fc")], {"x": [2, 5, 60]}, {"y": [2, 5, 48]}, {"w": w.T}, opset=opset
        ),
    )
    yield (
        "left",
        make_model(
            [node("MatMul", ["w", "x"], ["y"], "fc")], {"x": [2, 60, 5]}, {"y": [2, 48, 5]}, {"w": w}, opset=opset
        ),
    )
    bias = [node("MatMul", ["x", "w"], ["m"], "fc"), node("Add", ["b", "m"], ["y"], "add")]
    yield "matmul_bias", make_model(bias, x, y, {"w": w.T, "b": b}, opset=opset)
    conv = low(rng, 48, 12 * 9, 8).reshape(48, 12, 3, 3)
    attrs = {"strides": [2, 1], "dilations": [1, 2], "pads": [1, 0, 2, 1]}
    image, out = {"x": [2, 12, 11, 10]}, {"y": [2, 48, 6, 7]}
    yield (
        "conv",
        make_model([node("Conv", ["x", "w", "b"], ["y"], "cv", **attrs)], image, out, {"w": conv, "b": b}, opset=opset),
    )
    yield (
        "conv_no_b",
        make_model(
            [node("Conv", ["x", "w"], ["y"], "cv", auto_pad="SAME_UPPER", strides=[2, 2])],
            image,
            {"y": [2, 48, 6, 5]},
            {"w": conv},
            opset=opset,
        ),
    )
    one = low(rng, 48, 64, 8).reshape(48, 64, 1)
    yield (
        "conv1d",
        make_model(
            [node("Conv", ["x", "w", "b"], ["y"], "cv", strides=[2])],
            {"x": [2, 64, 9]},
            {"y": [2, 48, 5]},
            {"w": one, "b": b},
            opset=opset,
        ),
    )


NAMES = [
    "gemm",
    "gemm_b",
    "gemm_row",
    "gemm_a",
    "gemm_no_c",
    "matmul",
    "left",
    "matmul_bias",
    "conv",
    "conv_no_b",
    "conv1d",
]


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 18, 21])
@pytest.mark.parametrize("name", NAMES)
def test_factors_of_full_rank_give_the_same_output(name, opset):
    rng = np.random.default_rng(0)
    model = dict(layer_models(rng, opset)).get(name)
    if model is None:
        return  # Gemm without C is no legal node there
    spec = next(iter(Session(model).inputs.values()))
    feed = {"x": normal(rng, *spec.shape)}
    want = run(model, feed)
    op, old = model.graph.nodes[0].op, model.graph.nodes[0].name
    before = len(model.to_proto().SerializeToString())
    outcome = FactorizeLowRank(energy=0.9999).run(model, Context())
    assert [c.rule for c in outcome.changes] == ["low-rank"], outcome
    assert "rank 8 of" in outcome.changes[0].what
    checked(model)
    assert relative(want, run(model, feed)) < 1e-5
    assert [n.op for n in model.graph.nodes][:2] == [op, op]
    assert model.graph.nodes[1].name == old
    assert [t.name for t in model.graph.outputs] == ["y"]
    assert len(model.to_proto().SerializeToString()) < before
    assert model.opset == opset


@pytest.mark.parametrize("name", NAMES)
def test_data_is_used_wherever_the_layout_has_statistics(name):
    rng = np.random.default_rng(0)
    model = dict(layer_models(rng, 17))[name]
    spec = next(iter(Session(model).inputs.values()))
    arrays = [normal(rng, *spec.shape) + 1 for _ in range(40)]
    context = Context(calibration=dataset(model, arrays))
    want = run(model, {"x": arrays[0]})
    outcome = FactorizeLowRank(energy=0.99).run(model, context)
    checked(model)
    assert outcome.modified
    assert relative(want, run(model, {"x": arrays[0]})) < 0.3
    plain = any("no statistics" in r.why for r in outcome.refusals)
    assert plain == (name in ("gemm_a", "left"))


def test_data_aware_factors_beat_plain_ones_where_inputs_are_correlated():
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(96, 96)) * np.geomspace(3, 0.01, 96)[None]
    arrays = [(rng.normal(size=(1, 96)) @ mixing.T + 2).astype(np.float32) for _ in range(600)]
    weights = {"w": normal(rng, 96, 96), "b": normal(rng, 96)}
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], "fc", transB=1)]
    model = make_model(nodes, {"x": ["n", 96]}, {"y": ["n", 96]}, weights)
    unseen = {"x": np.concatenate([(rng.normal(size=(1, 96)) @ mixing.T + 2).astype(np.float32) for _ in range(200)])}
    want = run(model, unseen)
    errors = {}
    for how in ("plain", "none", "sequential"):
        changed = model.copy()
        context = Context() if how == "plain" else Context(calibration=dataset(model, arrays))
        recovery = "sequential" if how == "plain" else how
        outcome = FactorizeLowRank(keep=0.4, recovery=recovery).run(changed, context)
        errors[how] = relative(want, run(changed, unseen))
        assert outcome.numbers["parameters after"] <= 0.4 * outcome.numbers["parameters before"]
    assert errors["none"] < 0.5 * errors["plain"]
    assert errors["sequential"] < 0.5 * errors["plain"]


def small_cnn(rng, opset=17) -> Model:
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "c1", pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"], "r1"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], "depthwise", pads=[1] * 4, group=32),
        helper.make_node("Conv", ["c2", "w3", "b3"], ["c3"], "c3", pads=[1] * 4, strides=[2, 2]),
        helper.make_node("Relu", ["c3"], ["r3"], "r3"),
        helper.make_node("GlobalAveragePool", ["r3"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("MatMul", ["f", "w4"], ["y"], "head"),
    ]
    weights = {
        "w1": normal(rng, 32, 3, 3, 3) / 4,
        "b1": normal(rng, 32),
        "w2": normal(rng, 32, 1, 3, 3) / 3,
        "w3": normal(rng, 64, 32, 3, 3) / 10,
        "b3": normal(rng, 64),
        "w4": normal(rng, 64, 40) / 8,
    }
    return make_model(nodes, {"x": ["n", 3, 12, 12]}, {"y": ["n", 40]}, weights, opset=opset)


def images(rng, count):
    base = rng.normal(size=(count, 3, 3, 3)).repeat(4, 2).repeat(4, 3) + 0.1 * rng.normal(size=(count, 3, 12, 12))
    return [base[i : i + 1].astype(np.float32) for i in range(count)]


def test_refitting_in_order_lowers_the_error_of_a_network():
    rng = np.random.default_rng(0)
    model = small_cnn(rng)
    context = Context(calibration=dataset(model, images(rng, 500)))
    unseen = {"x": np.concatenate(images(rng, 100))}
    want = run(model, unseen)
    errors = {}
    for recovery in ("none", "sequential"):
        changed = model.copy()
        outcome = FactorizeLowRank(keep=0.2, recovery=recovery).run(changed, context)
        errors[recovery] = relative(want, run(changed, unseen))
        checked(changed)
        reasons = {r.node: r.why for r in outcome.refusals}
        assert "grouped" in reasons["depthwise"]
    assert outcome.numbers["macs of candidates after"] <= 0.2 * outcome.numbers["macs of candidates before"]
    assert errors["sequential"] < 0.8 * errors["none"]
    assert outcome.numbers["output error with recovery"] < outcome.numbers["output error without recovery"]
    assert any(c.rule == "refit" and c.node == "head" for c in outcome.changes)


def test_macs_and_parameters_are_different_budgets():
    rng = np.random.default_rng(0)
    w = {"w1": normal(rng, 64, 64, 1, 1) / 8, "w2": normal(rng, 256, 256) / 16, "shape": np.array([-1, 256], np.int64)}
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c"], "conv"),
        helper.make_node("MaxPool", ["c"], ["p"], "pool", kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Reshape", ["p", "shape"], ["f"], "flat"),
        helper.make_node("MatMul", ["f", "w2"], ["y"], "fc"),
    ]
    model = make_model(nodes, {"x": [1, 64, 16, 16]}, {"y": [1, 256]}, w)
    split = {}
    for cost in ("macs", "parameters"):
        outcome = FactorizeLowRank(keep=0.6, cost=cost, min_gain=0.0).run(model.copy(), Context())
        split[cost] = {c.node for c in outcome.changes}
    assert "conv" in split["macs"]
    assert "fc" in split["parameters"]
    assert split["macs"] != split["parameters"]


def test_ranks_are_multiples_and_never_larger():
    rng = np.random.default_rng(0)
    model = small_cnn(rng)
    for keep in (0.05, 0.3, 0.9):
        changed = model.copy()
        before = sum(t.values.size for n in changed.graph.nodes for t in n.inputs[1:2] if hasattr(t, "values"))
        outcome = FactorizeLowRank(keep=keep, recovery="none").run(changed, Context())
        after = sum(t.values.size for n in changed.graph.nodes for t in n.inputs[1:2] if hasattr(t, "values"))
        assert after <= before
        for change in outcome.changes:
            rank = int(change.what.split()[1])
            assert rank % 8 == 0 or (rank % 4 == 0 and change.node == "head") or change.node == "c1"
    assert any("cannot be reached" in r.why for r in FactorizeLowRank(keep=0.01).run(model.copy(), Context()).refusals)


def test_float16_keeps_its_type():
    rng = np.random.default_rng(0)
    w = low(rng, 64, 64, 8).astype(np.float16)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "fc")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [4, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [4, 64])],
        [numpy_helper.from_array(w, "w")],
    )
    model = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    feed = {"x": rng.normal(size=(4, 64)).astype(np.float16)}
    want = run(model, feed)
    assert FactorizeLowRank(energy=0.999).run(model, Context()).modified
    checked(model)
    assert run(model, feed).dtype == np.float16
    assert relative(want.astype(float), run(model, feed).astype(float)) < 0.02


# ----------------------------------------------------------------------------------------------------------- refusals


def test_shared_nested_excluded_and_small_layers_are_refused_with_reasons():
    rng = np.random.default_rng(0)
    w = normal(rng, 64, 64)
    body = helper.make_graph(
        [helper.make_node("MatMul", ["d", "v"], ["e"], "nested")],
        "then",
        [],
        [helper.make_tensor_value_info("e", TensorProto.FLOAT, ["n", 64])],
        [numpy_helper.from_array(normal(rng, 64, 64), "v")],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["d"], ["i"], "same")],
        "else",
        [],
        [helper.make_tensor_value_info("i", TensorProto.FLOAT, ["n", 64])],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "first"),
        helper.make_node("MatMul", ["a", "w"], ["b"], "second"),
        helper.make_node("MatMul", ["b", "u"], ["c"], "head"),
        helper.make_node("MatMul", ["c", "t"], ["d"], "tiny"),
        helper.make_node("If", ["k"], ["y"], "if", then_branch=body, else_branch=other),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64]),
            helper.make_tensor_value_info("k", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 64])],
        [numpy_helper.from_array(v, n) for n, v in {"w": w, "u": normal(rng, 64, 4), "t": normal(rng, 4, 64)}.items()],
    )
    model = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    outcome = FactorizeLowRank(exclude=("he*",)).run(model, Context())
    assert [change.node for change in outcome.changes] == ["nested"]
    reasons = {r.node: r.why for r in outcome.refusals}
    assert "other users" in reasons["first"] and "other users" in reasons["second"]
    assert reasons["head"] == "excluded by name"
    assert "no rank" in reasons["tiny"]


def test_a_model_without_layers_is_refused():
    empty = make_model([helper.make_node("Relu", ["x"], ["y"], "r")], {"x": ["n"]}, {"y": ["n"]}, {})
    outcome = FactorizeLowRank().run(empty, Context())
    assert not outcome.modified and outcome.refusals


def test_the_same_seed_gives_the_same_bytes():
    rng = np.random.default_rng(0)
    model = small_cnn(rng)
    arrays = images(rng, 60)
    results = []
    for _ in range(2):
        changed = model.copy()
        FactorizeLowRank().run(changed, Context(calibration=dataset(model, arrays), seed=3))
        results.append(changed.to_proto().SerializeToString())
    assert results[0] == results[1]


def test_options():
    assert FactorizeLowRank(keep=0.5).weaker(Outcome()) == FactorizeLowRank(keep=0.75)
    assert FactorizeLowRank(keep=0.95).weaker(Outcome()) is None
    assert FactorizeLowRank(energy=0.9).weaker(Outcome()) == FactorizeLowRank(energy=0.95)
    for wrong in ({"keep": 0.0}, {"keep": 1.0}, {"cost": "bytes"}, {"energy": 2}, {"rank_multiple": 0}):
        with pytest.raises(ValidationError):
            FactorizeLowRank(**wrong)
