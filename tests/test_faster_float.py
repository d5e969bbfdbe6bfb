"""Layers that are left in float because they run faster so: the division, what is written, and what a record keeps."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import again, kept
from test_quantize_static import Builder, decibels, fused, images, quantize, whys

from onnxslim import load
from onnxslim.graph.shapes import infer_shapes
from onnxslim.model import Model
from onnxslim.passes import _faster_float
from onnxslim.passes._faster_float import cheapest_division, faster_in_float
from onnxslim.passes._placement import Anchor, Placement
from onnxslim.runtime import Timing

_TO_CROSS = 6.0  # microseconds, of small tensors


def network(channels: int = 16, *, groups: int = 1) -> Any:
    """Three convolutions in a row behind activations, a residual Add around the second, and one that ends it."""
    b = Builder()
    b.node("Relu", [b.conv("x", "c1", 8, channels)], "r1")
    b.node("Relu", [b.conv("r1", "c2", channels, channels, groups=groups)], "r2")
    b.node("Add", ["r1", "r2"], "sum")
    b.conv("sum", "c3", channels, channels)
    b.conv("c3", "y", channels, 64)
    return b.model({"x": ["n", 8, 12, 12]}, {"y": ["n", 64, 12, 12]})


def placed(model: Model, sizes: int = 100) -> Placement:
    shapes = infer_shapes(model, {})
    anchors = {
        node.outputs[0].name: Anchor(node.outputs[0].name, node, 0, 4)
        for node in model.graph.nodes
        if node.op in ("Conv", "Gemm")
    }
    elements = {tensor.name: sizes for node in model.graph.nodes for tensor in (*node.inputs, *node.outputs)
                if not isinstance(tensor, gs.Constant)}  # fmt: skip
    return Placement(model.graph, shapes, elements, set(), anchors)


def times(of: dict[str, float]) -> dict[str, float]:
    """With a kernel that does nothing, so that nothing is taken off the others."""
    return of | {"nothing": 0.0}


def test_a_layer_stays_float_where_that_saves_more_than_it_costs_to_come_and_go():
    model = load(network())
    placement = placed(model)
    in_float = times(dict.fromkeys(("c1", "c2", "c3", "y", "sum"), 100.0))

    def slow(**in_int8: float) -> tuple[str, ...]:
        return cheapest_division(placement, in_float, dict.fromkeys(in_float, 50.0) | times({}) | in_int8)

    assert slow() == ()
    assert slow(c3=100.0) == slow(c3=108.0) == ()
    # Its input and its result cross over; behind the last layer nothing does, as the output is float in any case.
    assert slow(c3=100.0 + 2 * _TO_CROSS + 2) == ("c3",)
    assert slow(y=101.0 + _TO_CROSS) == ("y",)
    # Toll: a tensor that crosses over may cost more.
    assert cheapest_division(placement, in_float, dict.fromkeys(in_float, 50.0) | times({"c3": 114.0}), toll=2.0) == ()


def test_a_layer_whose_time_is_not_known_stays_in_int8():
    model = load(network())
    placement = placed(model)
    in_int8 = times(dict.fromkeys(("c1", "c2", "c3", "y", "sum"), 500.0))
    in_float = times(dict.fromkeys(("c1", "c2", "c3", "y", "sum"), 1.0))
    assert set(cheapest_division(placement, in_float, in_int8)) == {"c1", "c2", "c3", "y"}
    for known in (in_float, in_int8):
        lost = known.pop("c2")
        assert "c2" not in cheapest_division(placement, in_float, in_int8)
        known["c2"] = lost


def test_layers_may_be_called_like_the_sides():
    b = Builder()
    b.conv(b.conv(b.conv("x", "float", 4, 4), "int8", 4, 4), "y", 4, 4)
    placement = placed(load(b.model({"x": ["n", 4, 8, 8]}, {"y": ["n", 4, 8, 8]})))
    in_float = times(dict.fromkeys(("float", "int8", "y"), 100.0))
    assert cheapest_division(placement, in_float, in_float | {"float": 10.0, "int8": 10.0, "y": 200.0}) == ("y",)
    assert cheapest_division(placement, in_float, in_float | {"float": 200.0, "int8": 10.0, "y": 10.0}) == ("float",)


@st.composite
def diamonds(draw: st.DrawFn) -> tuple[Any, dict[str, float], dict[str, float], float]:
    """Convolutions that read any earlier result, some joined by an Add, with times of all."""
    b, made = Builder(), ["x"]
    for index in range(draw(st.integers(2, 6))):
        source = draw(st.sampled_from(made))
        if len(made) > 2 and draw(st.booleans()):
            other = draw(st.sampled_from([name for name in made if name != source]))
            made.append(b.node("Add", [source, other], f"a{index}"))
        else:
            made.append(b.conv(source, f"c{index}", 4, 4))
    b.conv(made[-1], "y", 4, 4)
    shape = ["n", 4, 8, 8]
    cost = st.integers(0, 60).map(float)
    in_float, in_int8 = ({name: draw(cost) for name in (*made[1:], "y")} for _ in range(2))
    return b.model({"x": shape}, {"y": shape}), times(in_float), times(in_int8), draw(st.sampled_from([0.5, 1.0, 3.0]))


@settings(max_examples=60, deadline=None)
@given(diamonds())
def test_no_other_division_is_cheaper(case: tuple[Any, dict[str, float], dict[str, float], float]):
    proto, in_float, in_int8, toll = case
    placement = placed(load(proto), sizes=1000)
    crossing = toll * (1000 * 0.35e-3 + _TO_CROSS)
    units = [*placement.anchors, *placement.propagators]

    def cost(on_codes: set[str]) -> float:
        total = sum(in_int8[name] if name in on_codes else in_float[name] for name in units)
        for name in ("x", *(node.outputs[0].name for node in placement.graph.nodes)):
            readers = {node.outputs[0].name in on_codes for node in placement.graph.nodes
                       if any(tensor.name == name for tensor in node.inputs)}  # fmt: skip
            readers |= {False} if name == "y" else set()
            total += crossing * bool(readers - {name in on_codes})
        return total

    least = min(cost(set(chosen)) for size in range(len(units) + 1) for chosen in itertools.combinations(units, size))
    slow = set(cheapest_division(placement, in_float, in_int8, toll))
    anchors = set(placement.anchors)
    free = list(placement.propagators)
    got = min(
        cost((anchors - slow) | set(chosen))
        for size in range(len(free) + 1)
        for chosen in itertools.combinations(free, size)
    )
    assert got == pytest.approx(least)


def make_up(monkeypatch: pytest.MonkeyPatch, *slow: str, pays: bool = True) -> None:
    """Times in which int8 takes half as long, but ten times as long for some layers, and the whole less without."""

    def latencies(model: Model, feed: object) -> dict[int, float]:
        def ratio(node: gs.Node) -> float:
            on_codes = any(tensor.inputs and tensor.inputs[0].op == "DequantizeLinear" for tensor in node.inputs)
            return 1.0 if not on_codes else 10.0 if node.name in slow else 0.5

        return {id(node): 100.0 * ratio(node) for node in model.graph.nodes}

    def interleaved(runs: dict[str, Any], **_: object) -> dict[str, Timing]:
        return {name: Timing([1.0 - (0.1 if pays else -0.1) * index]) for index, name in enumerate(runs)}

    monkeypatch.setattr("onnxslim.passes._faster_float.node_latencies", latencies)
    monkeypatch.setattr("onnxslim.passes._faster_float.interleaved_latency", interleaved)
    monkeypatch.setattr("onnxslim.passes.quantize_static._speed", lambda *_: 2.0)


@pytest.mark.parametrize("groups", [1, 16])
def test_what_is_faster_in_float_is_computed_so_and_the_reason_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: int
):
    make_up(monkeypatch, "c2")
    proto = network(groups=groups)
    model, outcome = quantize(proto, images(channels=8), only_if_faster=True)
    found = fused(model, tmp_path)
    assert found["QLinearConv"] == 3 and found["Conv"] + found["FusedConv"] == 1
    (why,) = (refusal.why for refusal in outcome.refusals if refusal.node == "c2")
    assert why == "Conv: it takes 100 µs here in float, 1000 in int8"
    assert outcome.numbers["layers faster in float"] == 1
    # Its weight is stored in int8 all the same.
    assert outcome.numbers["share of weights in int8"] > 0.98
    assert decibels(proto, model, images(channels=8, seed=7)) > 25


def test_weights_that_are_a_small_share_of_all_stay_precise(monkeypatch: pytest.MonkeyPatch):
    make_up(monkeypatch, "c1")
    b = Builder()
    b.node("Relu", [b.conv("x", "c1", 1, 64)], "r1")
    b.node("Relu", [b.conv("r1", "c2", 64, 256)], "r2")
    b.conv("r2", "y", 256, 64)
    proto = b.model({"x": ["n", 1, 12, 12]}, {"y": ["n", 64, 12, 12]})
    model, outcome = quantize(proto, images(channels=1), only_if_faster=True)
    stem = next(node for node in model.graph.nodes if node.name == "c1")
    assert isinstance(stem.inputs[1], gs.Constant) and stem.inputs[1].dtype == np.float32
    assert 0.99 < outcome.numbers["share of weights in int8"] < 1
    assert outcome.plan is not None and outcome.plan["graphs"][0]["slow"] == ["c1"]


@pytest.mark.parametrize(("spare", "at_a_time"), [(False, [4]), (True, [2, 2, 2])])
def test_two_models_are_timed_at_a_time_where_their_tensors_are_large(monkeypatch, spare, at_a_time):
    model = load(network())
    placement = placed(model)
    divisions = {0.25: ("c1",), 1.0: ("c2",), 2.0: ("c3",)}
    latency = {(): 1.0, ("c1",): 0.9, ("c2",): 0.7, ("c3",): 0.8}
    timed: list[int] = []

    def latencies(divided: list[tuple[str, ...]], feed: object) -> list[float]:
        timed.append(len(divided))
        return [latency[slow] for slow in divided]

    same = {id(node): 100.0 for node in model.graph.nodes}
    monkeypatch.setattr(_faster_float, "node_latencies", lambda *_: same)
    monkeypatch.setattr(_faster_float, "cheapest_division", lambda *given: divisions[given[-1]])
    monkeypatch.setattr(_faster_float, "median_latencies", latencies)
    found = faster_in_float(model, placement, lambda slow: (slow, placement), {}, spare=spare)
    assert (list(found), timed) == (["c2"], at_a_time)
    latency |= dict.fromkeys(divisions.values(), 0.98)  # less than counts against int8 throughout
    assert faster_in_float(model, placement, lambda slow: (slow, placement), {}, spare=spare) == {}


def test_all_is_in_int8_where_float_layers_do_not_make_it_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_up(monkeypatch, "c2", pays=False)
    model, outcome = quantize(network(), images(channels=8), only_if_faster=True)
    assert fused(model, tmp_path)["QLinearConv"] == 4
    assert "in float" not in whys(outcome)


def test_nothing_is_timed_for_other_runtimes_or_where_int8_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_up(monkeypatch, "c2")
    model, _ = quantize(network(), images(channels=8))
    assert fused(model, tmp_path)["QLinearConv"] == 4
    other, _ = quantize(network(), images(channels=8), only_if_faster=True, runtime="tensorrt")
    assert sum(node.op == "Conv" and not isinstance(node.inputs[1], gs.Constant) for node in other.graph.nodes) == 4


def test_what_was_faster_in_float_is_kept_with_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_up(monkeypatch, "c2")
    first, outcome = quantize(network(), images(channels=8), only_if_faster=True)
    plan = kept(tmp_path / "record.json", outcome)
    make_up(monkeypatch)  # what would be found now does not matter
    second, repeated = again(network(), plan, only_if_faster=True)
    assert second.to_bytes() == first.to_bytes()
    assert "it ran faster in float where the plan was made" in whys(repeated)
    other, _ = again(network(), plan, runtime="tensorrt", only_if_faster=True)
    layers = [node for node in other.graph.nodes if node.op == "Conv"]
    assert all(node.inputs[0].inputs[0].op == "DequantizeLinear" for node in layers)


def test_real_times_leave_a_model_that_is_right():
    """Whatever this machine finds."""
    proto = network(32)
    model, outcome = quantize(proto, images(channels=8), only_if_faster=True)
    assert outcome.modified and outcome.numbers["share of weights in int8"] > 0.99
    assert decibels(proto, model, images(channels=8, seed=7)) > 25
