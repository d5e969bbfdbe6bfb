"""Layers in front of an Add make up for the error of what is beside them: pruning, low rank, codebooks."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxslim.data import open_dataset
from onnxslim.model import Model, load
from onnxslim.passes import _least_squares, factorize_low_rank, share_weights
from onnxslim.passes._refit import by_input, residuals
from onnxslim.passes._statistics import linear_layer
from onnxslim.passes.base import Context
from onnxslim.passes.factorize_low_rank import FactorizeLowRank
from onnxslim.passes.prune_channels import PruneChannels
from onnxslim.passes.share_weights import ShareWeights
from onnxslim.runtime import Session

WIDTH, HIDDEN = 32, 48


def residual_mlp(op: str) -> Model:
    """Six blocks ``x + W2 relu(W1 x + b1) + b2`` behind a stem; as Gemm, or MatMul with the bias in an Add."""
    rng = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {}
    nodes = []

    def linear(x: str, y: str, inputs: int, outputs: int) -> str:
        weights[f"{y}.w"] = (rng.normal(size=(inputs, outputs)) / np.sqrt(inputs)).astype(np.float32)
        weights[f"{y}.b"] = rng.normal(size=outputs).astype(np.float32)
        if op == "Gemm":
            nodes.append(helper.make_node("Gemm", [x, f"{y}.w", f"{y}.b"], [y], y))
        else:
            nodes.append(helper.make_node("MatMul", [x, f"{y}.w"], [f"{y}.m"], y))
            nodes.append(helper.make_node("Add", [f"{y}.b", f"{y}.m"], [y], f"{y}.add"))
        return y

    x = linear("x", "stem", 24, WIDTH)
    for block in range(6):
        hidden = linear(x, f"up{block}", WIDTH, HIDDEN)
        nodes.append(helper.make_node("Relu", [hidden], [f"relu{block}"], f"relu{block}"))
        down = linear(f"relu{block}", f"down{block}", HIDDEN, WIDTH)
        nodes.append(helper.make_node("Add", [x, down], [f"sum{block}"], f"sum{block}"))
        x = f"sum{block}"
    linear(x, "y", WIDTH, 8)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 24])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def samples(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(9).normal(size=(16, 24))
    return (rng.normal(size=(count, 16)) @ mixing + 0.5 * rng.normal(size=(count, 24))).astype(np.float32)


def error(model: Model, changed: Model) -> float:
    feed = {"x": samples(500, 5)}
    want, got = (Session(each).run(feed)["y"] for each in (model, changed))
    return float(np.square(got - want).mean() / want.var())


@pytest.mark.parametrize("op", ["Gemm", "MatMul"])
@pytest.mark.parametrize(
    ("pass_", "module", "share"),
    [
        (PruneChannels(ratio=0.5, multiple_of=8), _least_squares, 0.98),
        (FactorizeLowRank(keep=0.25), factorize_low_rank, 0.98),
        (ShareWeights(bits=2, min_elements=512), share_weights, 0.8),
    ],
    ids=["prune", "low-rank", "codebook"],
)
def test_the_error_beside_a_layer_is_made_up_for(op, pass_, module, share, monkeypatch):
    model = residual_mlp(op)
    data = open_dataset({"x": samples(600, 1)}, Session(model).specs)

    def changed() -> Model:
        copy = model.copy()
        assert pass_.run(copy, Context(calibration=data)).changes
        return copy

    with_it = error(model, changed())
    if module is _least_squares:
        monkeypatch.setattr(module, "_share_errors", lambda *arguments: None)
    else:
        monkeypatch.setattr(module, "residuals", lambda *arguments: {})
    without = error(model, changed())
    assert with_it < share * without


def test_a_layer_waits_for_what_is_beside_it():
    """Of two layers that meet in an Add, the later one takes the error of the earlier; none waits for a later one."""
    model = residual_mlp("Gemm")
    layers = [layer for node in model.graph.nodes if (layer := linear_layer(node)) is not None]
    groups = list(by_input(layers))
    found = {node.name: residuals(model.graph, groups).get(id(node)) for node in model.graph.nodes}
    assert {name: tensor.name for name, tensor in found.items() if tensor is not None} == {
        "down0": "stem",
        **{f"down{block}": f"sum{block - 1}" for block in range(1, 6)},
    }
    # In another order, the layers whose neighbour is not fitted yet are left as they are.
    assert not residuals(model.graph, groups[::-1])
    # What is beside a layer is what it was where nothing in front of it is fitted.
    late = [group for group in groups if group[0].node.name in ("down0", "y")]
    assert not residuals(model.graph, late)
