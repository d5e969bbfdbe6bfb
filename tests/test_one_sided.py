"""Refits that leave alone what an activation cuts off: against the plain least squares on what is seen."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxslim
from onnxslim.data import open_dataset
from onnxslim.passes._least_squares import recover
from onnxslim.passes._one_sided import Kept, seen_range
from onnxslim.runtime import Session

RNG = np.random.default_rng(0)


def model_of(nodes: list[onnx.NodeProto], shape: list, **weights: np.ndarray) -> onnxslim.Model:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in weights.items()],
    )
    return onnxslim.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


@pytest.mark.parametrize(
    ("readers", "wanted"),
    [
        ([("Relu", [])], (0.0, np.inf)),
        ([("Clip", ["zero", "six"])], (0.0, 6.0)),
        ([("Clip", ["", "six"])], (-np.inf, 6.0)),
        ([("Relu", []), ("Clip", ["", "six"])], None),  # one sees what the other does not
        ([("Clip", ["zero", "six"]), ("Relu", [])], (0.0, np.inf)),
        ([("Relu", []), ("Sigmoid", [])], None),
        ([("Clip", ["computed", ""])], None),
    ],
)
def test_range_that_all_readers_see(readers, wanted):
    nodes = [helper.make_node("Neg", ["x"], ["h"]), helper.make_node("ReduceMax", ["x"], ["computed"], keepdims=0)]
    nodes += [helper.make_node(op, ["h", *rest], [f"r{index}"]) for index, (op, rest) in enumerate(readers)]
    nodes.append(helper.make_node("Sum", [f"r{index}" for index in range(len(readers))], ["y"]))
    model = model_of(nodes, ["N", 4], zero=np.float32(0), six=np.float32(6))
    hidden = model.graph.nodes[0].outputs[0]
    assert seen_range(model, hidden) == wanted
    assert seen_range(model, model.graph.outputs[0]) is None


def data(rows: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Inputs, and outputs that no linear map of them gives: large where they are negative."""
    x = RNG.normal(size=(1, rows, 6))
    y = x @ RNG.normal(size=(6, 4)) + 0.3 * RNG.normal(size=(1, rows, 4))
    return x, np.where(y < 0, 5 * y - 3 * np.abs(x[..., :1]), y)


@pytest.mark.parametrize("centred", [True, False])
def test_rounds_lower_the_error_of_what_is_seen(centred):
    x, y = data()
    mean_x, mean_y = (x.mean(axis=1), y.mean(axis=1)) if centred else (np.zeros((1, 6)), np.zeros((1, 4)))
    left = np.einsum("grk,grl->gkl", x - mean_x[:, None], x - mean_x[:, None]) / x.shape[1]
    right = np.einsum("grk,gro->gko", x - mean_x[:, None], y - mean_y[:, None]) / x.shape[1]
    plain = np.linalg.solve(left, right).transpose(0, 2, 1)
    kept = Kept(0.0, np.inf, np.zeros(4))
    for part in range(4):
        rows = slice(part * 1000, (part + 1) * 1000)
        kept.add(x[:, rows], y[:, rows], None)
    fitted, bias = kept.solve(left, right, (mean_x, mean_y) if centred else None)
    before = kept.error(plain, mean_y - np.einsum("gok,gk->go", plain, mean_x))
    assert kept.error(fitted, bias) < 0.6 * before
    assert centred or not bias.any()


def test_linear_targets_stay_as_they_are():
    x = RNG.normal(size=(1, 2000, 6))
    truth = RNG.normal(size=(1, 4, 6))
    y = x @ truth.transpose(0, 2, 1) + 2
    mean_x, mean_y = x.mean(axis=1), y.mean(axis=1)
    left = np.einsum("grk,grl->gkl", x - mean_x[:, None], x - mean_x[:, None]) / 2000
    right = np.einsum("grk,gro->gko", x - mean_x[:, None], y - mean_y[:, None]) / 2000
    kept = Kept(0.0, np.inf, np.zeros(4))
    kept.add(x, y, None)
    fitted, bias = kept.solve(left, right, (mean_x, mean_y))
    np.testing.assert_allclose(fitted, truth, atol=1e-4)
    np.testing.assert_allclose(bias, 2, atol=1e-4)


def test_memory_is_bounded_and_rows_that_are_not_finite_are_left_out(monkeypatch):
    monkeypatch.setattr("onnxslim.passes._one_sided._BYTES", 40_000)
    kept = Kept(0.0, np.inf, np.zeros(4))
    for _ in range(50):
        x, y = data(200)
        x[0, 3, 2] = np.nan
        kept.add(x, y, y)
    assert kept.stride > 1
    assert sum(part.nbytes for part in (*kept.inputs, *kept.targets, *kept.beside)) <= 40_000
    assert len(kept.inputs) == 50
    assert all(np.isfinite(part).all() for part in kept.inputs)
    fitted, bias = kept.solve(np.eye(6)[None], np.zeros((1, 6, 4)), (np.zeros((1, 6)), np.zeros((1, 4))))
    assert np.isfinite(fitted).all() and np.isfinite(bias).all()


@pytest.mark.parametrize("kind", ["conv", "depthwise", "residual", "matmul", "gemm"])
def test_refit_fits_what_the_activation_lets_through(kind, monkeypatch):
    """The second layer lost the use of one input; refits with and without the activation in mind are compared."""
    random = np.random.default_rng(1)
    rows = kind in ("matmul", "gemm")

    def build() -> onnxslim.Model:
        r = np.random.default_rng(2)
        if rows:
            weights = {"a": r.normal(size=(5, 8)), "b": r.normal(size=(8, 6)), "c": r.normal(size=6) + 0.5}
            nodes = [helper.make_node("MatMul", ["x", "a"], ["h"], "first"), helper.make_node("Relu", ["h"], ["g"])]
            if kind == "gemm":
                nodes.append(helper.make_node("Gemm", ["g", "b", "c"], ["s"], "second"))
            else:
                nodes.append(helper.make_node("MatMul", ["g", "b"], ["m"], "second"))
                nodes.append(helper.make_node("Add", ["m", "c"], ["s"]))
        else:
            groups = 8 if kind == "depthwise" else 1
            kernel = r.normal(size=(8, 8 // groups, 3, 3))
            weights = {"a": r.normal(size=(8, 3, 3, 3)), "b": kernel, "c": r.normal(size=8)}
            last = "m" if kind == "residual" else "s"
            nodes = [
                helper.make_node("Conv", ["x", "a"], ["h"], "first", pads=[1] * 4),
                helper.make_node("Relu", ["h"], ["g"]),
                helper.make_node("Conv", ["g", "b", "c"], [last], "second", pads=[1] * 4, group=groups),
            ]
            if kind == "residual":
                nodes.append(helper.make_node("Add", ["m", "h"], ["s"]))
        nodes.append(helper.make_node("Relu", ["s"], ["y"]))
        return model_of(nodes, ["N", 5] if rows else ["N", 3, 6, 6], **weights)

    x = random.normal(size=(64, 5) if rows else (64, 3, 6, 6)).astype(np.float32)
    feeds = list(open_dataset([{"x": x[i : i + 8]} for i in range(0, 64, 8)], Session(build()).specs))
    errors = {}
    for seen in (True, False):
        if not seen:
            monkeypatch.setattr("onnxslim.passes._least_squares.seen_range", lambda model, tensor: None)
        teacher, model = build(), build()
        first = next(node for node in model.graph.nodes if node.name == "first")
        noise = np.random.default_rng(3).normal(size=first.inputs[1].shape).astype(np.float32)
        first.inputs[1].values = first.inputs[1].values * (1 + noise / 2)
        refits = recover(
            model, teacher, lambda layer: None, {id(first)}, lambda: feeds, ridge=1e-4, per_sample=40, seed=0
        )
        assert [refit.node.name for refit in refits] == ["second"]
        assert refits[0].after < refits[0].before
        want, got = (Session(one).run({"x": x})["y"] for one in (teacher, model))
        errors[seen] = float(np.square(want - got).mean())
    assert errors[True] < 0.98 * errors[False]


def test_rounds_on_fewer_rows_than_inputs_do_no_harm(monkeypatch):
    """Correlated inputs of which few rows are kept: left alone, the rounds diverge."""
    monkeypatch.setattr("onnxslim.passes._one_sided._BYTES", 64 << 10)
    x = RNG.normal(size=(1, 4000, 24)) @ RNG.normal(size=(24, 200)) + 0.02 * RNG.normal(size=(1, 4000, 200))
    y = x @ RNG.normal(size=(200, 4)) + 20 * RNG.normal(size=(1, 4000, 4)) - 60
    mean_x, mean_y = x.mean(axis=1), y.mean(axis=1)
    left = np.einsum("grk,grl->gkl", x - mean_x[:, None], x - mean_x[:, None]) / 4000 + 1e-4 * np.eye(200)
    right = np.einsum("grk,gro->gko", x - mean_x[:, None], y - mean_y[:, None]) / 4000
    plain = np.linalg.solve(left, right).transpose(0, 2, 1)
    kept = Kept(0.0, np.inf, np.zeros(4))
    for part in range(4):
        kept.add(x[:, part * 1000 : part * 1000 + 1000], y[:, part * 1000 : part * 1000 + 1000], None)
    assert sum(part.shape[1] for part in kept.inputs) < 200
    fitted, bias = kept.solve(left, right, (mean_x, mean_y))
    before = kept.error(plain, mean_y - np.einsum("gok,gk->go", plain, mean_x))
    assert kept.error(fitted, bias) <= before * (1 + 1e-4)
