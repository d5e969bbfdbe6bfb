"""Times of nodes that ONNX Runtime fuses and renames, and widths that are chosen by them."""

from __future__ import annotations

import numpy as np
import onnx
from test_quantize_static import Builder, images

import onnxslim
from onnxslim import load
from onnxslim.data import open_dataset
from onnxslim.node_latency import node_latencies
from onnxslim.passes.base import Context
from onnxslim.passes.factorize_low_rank import FactorizeLowRank
from onnxslim.passes.prune_channels import PruneChannels
from onnxslim.runtime import Session

_KERNEL = 10.0  # microseconds that any kernel takes where times are made up


def network() -> onnx.ModelProto:
    b = Builder()
    b.node("Relu", [b.conv("x", "small", 3, 16)], "r1")
    b.node("Relu", [b.conv("r1", "large", 16, 256)], "r2")
    b.node("Add", [b.conv("r2", "added", 256, 16, kernel=1), "r1"], "sum")
    b.node("GlobalAveragePool", ["sum"], "pool")
    b.node("Flatten", ["pool"], "flat")
    b.node("MatMul", ["flat", b.weight("fc", 16, 10)], "product")
    b.node("Add", ["product", b.weight("bias", 10)], "logits")
    b.node("Relu", ["logits"], "y")
    return b.model({"x": ["n", 3, 32, 32]}, {"y": ["n", 10]})


def test_the_time_of_a_fused_kernel_is_that_of_the_layer_in_it():
    model = load(network())
    before = model.to_bytes()
    feed = images(size=32)[0]
    found = node_latencies(model, feed)
    assert model.to_bytes() == before
    times = {node.name: found[id(node)] for node in model.graph.nodes if id(node) in found}
    assert {"small", "large", "added", "product"} <= times.keys()
    assert not {"r1", "r2"} & times.keys()  # fused into the convolutions
    assert times["large"] == max(times.values())
    assert all(time >= 0 for time in times.values())


def test_nodes_in_bodies_and_outputs_in_the_middle_do_no_harm():
    b = Builder()
    b.conv("x", "c", 3, 8)
    b.node("Relu", ["c"], "seen")
    b.conv("seen", "y", 8, 4)
    proto = b.model({"x": ["n", 3, 12, 12]}, {"seen": ["n", 8, 12, 12], "y": ["n", 4, 12, 12]})
    model = load(proto)
    found = node_latencies(model, images()[0])
    assert {"c", "y"} <= {node.name for node in model.graph.nodes if id(node) in found}


def pruned(monkeypatch, slow: str, cost: str = "latency") -> dict[str, int]:
    """Widths by convolution, where one of them takes all the time."""
    b = Builder(seed=4)
    for index in range(4):
        source = "x" if not index else f"r{index - 1}"
        b.node("Relu", [b.conv(source, f"c{index}", 16, 16)], f"r{index}")
    b.conv("r3", "y", 16, 16)
    model = load(b.model({"x": ["n", 16, 12, 12]}, {"y": ["n", 16, 12, 12]}))
    monkeypatch.setattr(
        "onnxslim.passes.prune_channels.node_latencies",
        lambda model, feed: {id(node): 1000.0 if node.name == slow else 1.0 for node in model.graph.nodes},
    )
    data = open_dataset(images(32, channels=16), Session(model).specs)
    options = {"cost": cost, "multiple_of": 1, "min_channels": 1, "ratio": 0.25}
    outcome = PruneChannels(**options).run(model, Context(calibration=data))
    assert outcome.changes
    onnxslim.slim(model.to_proto())
    return {node.name: node.inputs[1].shape[0] for node in model.graph.nodes if node.op == "Conv"}


def test_a_latency_budget_is_spent_where_the_time_goes(monkeypatch):
    late, early = pruned(monkeypatch, "y"), pruned(monkeypatch, "c1")
    # What the slow layer reads, or makes, is all that saves time.
    assert late["c3"] == min(width for name, width in late.items()) < 16
    assert min(early["c0"], early["c1"]) < 16
    assert early["c3"] == 16
    assert pruned(monkeypatch, "y", "macs") == pruned(monkeypatch, "c1", "macs")


def test_without_data_macs_are_counted_and_the_reason_is_given():
    models = [load(network()) for _ in range(2)]
    outcomes = [
        PruneChannels(cost=cost).run(model, Context()) for cost, model in zip(("latency", "macs"), models, strict=True)
    ]
    assert any("no time can be measured without calibration data" in refusal.why for refusal in outcomes[0].refusals)
    assert outcomes[0].changes == outcomes[1].changes
    assert models[0].to_bytes() == models[1].to_bytes()


def test_outputs_whose_names_start_alike_are_told_apart():
    b = Builder()
    b.conv("x", "y", 3, 4)
    b.conv("x", "y1", 3, 256)
    shape = ["n", 4, 32, 32]
    model = load(b.model({"x": ["n", 3, 32, 32]}, {"y": shape, "y1": ["n", 256, 32, 32]}))
    found = node_latencies(model, images(size=32)[0])
    small, large = (found[id(node)] for node in model.graph.nodes)
    assert 0 < 3 * small < large


def test_factors_are_run_where_they_would_be():
    rng = np.random.default_rng(1)
    b = Builder(seed=6)
    narrow = rng.normal(size=(1024, 16)) @ rng.normal(size=(16, 1024)) / 64
    b.node("Gemm", ["x", b.constant("w0", narrow.astype("f4"))], "wide")
    b.node("Relu", ["wide"], "r")
    b.node("Gemm", ["r", b.weight("w1", 10, 1024)], "y", transB=1)
    model = load(b.model({"x": ["n", 1024]}, {"y": ["n", 10]}))
    feeds = [{"x": rng.normal(size=(8, 1024)).astype(np.float32)} for _ in range(32)]
    data = open_dataset(feeds, Session(model).specs)
    outcome = FactorizeLowRank(cost="latency", keep=0.5).run(model, Context(calibration=data))
    assert {change.node for change in outcome.changes if change.rule == "low-rank"} == {"wide"}
    after, before = (outcome.numbers[f"latency of candidates {when}"] for when in ("after", "before"))
    assert 0 < after <= 0.5 * before
    assert [tensor.name for tensor in model.graph.outputs] == ["y"] and len(model.graph.nodes) == 4


def test_ranks_are_shared_out_by_time_and_what_it_costs_to_run_a_second_node(monkeypatch):
    rng = np.random.default_rng(0)
    b = Builder(seed=5)
    for index in range(3):
        narrow = rng.normal(size=(96, 24)) @ rng.normal(size=(24, 96)) / 48 + rng.normal(size=(96, 96)) / 60
        b.node(
            "MatMul", ["x" if not index else f"r{index - 1}", b.constant(f"w{index}", narrow.astype("f4"))], f"m{index}"
        )
        b.node("Relu", [f"m{index}"], f"r{index}")
    proto = b.model({"x": ["n", 96]}, {"r2": ["n", 96]})
    feeds = [{"x": rng.normal(size=(16, 96)).astype(np.float32)} for _ in range(16)]

    def split(times: dict[str, float]) -> set[str]:
        model = load(proto)
        monkeypatch.setattr(
            "onnxslim.passes.factorize_low_rank.node_latencies",
            lambda model, feed: {
                id(node): _KERNEL + times[node.name[:2]] * node.inputs[1].values.size / 96**2
                for node in model.graph.nodes
                if node.op == "MatMul"
            },
        )
        data = open_dataset(feeds, Session(model).specs)
        outcome = FactorizeLowRank(cost="latency", keep=0.7).run(model, Context(calibration=data))
        return {change.node for change in outcome.changes if change.rule == "low-rank"}

    assert split({"m0": 10.0, "m1": 1000.0, "m2": 10.0}) == {"m1"}
    assert not split({"m0": 10.0, "m1": 10.0, "m2": 10.0})  # no more than a second kernel takes
