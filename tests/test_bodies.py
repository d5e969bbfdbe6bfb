"""Bodies of If, Loop and Scan as models of their own: what enters them, what they share, and that they come back."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxslim
from onnxslim.bodies import bodies
from onnxslim.data import open_dataset
from onnxslim.measure import snapshot
from onnxslim.passes.base import Context
from onnxslim.passes.factorize_low_rank import FactorizeLowRank
from onnxslim.passes.prune_channels import PruneChannels
from onnxslim.passes.quantize_static import QuantizeStatic
from onnxslim.runtime import Session

WIDE = 32


def tensor(name: str, *shape: int, seed: int) -> TensorProto:
    values = np.random.default_rng(seed).standard_normal(shape) / np.sqrt(max(np.prod(shape[1:]), 1))
    return numpy_helper.from_array(values.astype(np.float32), name)


def body(label: str, seed: int, *, nested: bool = False) -> onnx.GraphProto:
    """Three convolutions of the stem; the second bias and the third weight belong to the main graph."""
    p = f"{label}_"
    nodes = [
        helper.make_node("Conv", ["stem", p + "w1", p + "b1"], [p + "c1"], name=p + "c1", pads=[1] * 4),
        helper.make_node("Relu", [p + "c1"], [p + "r1"]),
        helper.make_node("Conv", [p + "r1", p + "w2", "bias"], [p + "c2"], name=p + "c2", pads=[1] * 4),
        helper.make_node("Relu", [p + "c2"], [p + "r2"]),
        helper.make_node("Conv", [p + "r2", "shared"], [p + "y"], name=p + "c3"),
    ]
    weights = [tensor(p + "w1", WIDE, 16, 3, 3, seed=seed), tensor(p + "b1", WIDE, seed=seed + 1)]
    weights += [tensor(p + "w2", WIDE, WIDE, 3, 3, seed=seed + 2)]
    output = helper.make_tensor_value_info(p + "y", TensorProto.FLOAT, [None] * 4)
    if not nested:
        return helper.make_graph(nodes, label, [], [output], weights)
    inner = [helper.make_graph(nodes, label + "_inner", [], [output], weights)]
    inner += [helper.make_graph([helper.make_node("Identity", ["late"], [p + "z"])], label + "_other", [], [])]
    inner[1].output.append(helper.make_tensor_value_info(p + "z", TensorProto.FLOAT, [None] * 4))
    deep = helper.make_node("If", ["always"], [p + "out"], name=p + "if", then_branch=inner[0], else_branch=inner[1])
    result = helper.make_tensor_value_info(p + "out", TensorProto.FLOAT, [None] * 4)
    return helper.make_graph([deep], label, [], [result])


def model(*, nested: bool = False) -> onnxslim.Model:
    nodes = [
        helper.make_node("Conv", ["x", "ws"], ["grid"], name="grid", pads=[1] * 4),
        # The sizes of what enters the If are computed in floats, where inference does not follow.
        helper.make_node("Shape", ["grid"], ["sizes"]),
        helper.make_node("Cast", ["sizes"], ["scaled"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["scaled"], ["given"], to=TensorProto.INT64),
        helper.make_node("Reshape", ["grid", "given"], ["stem"], name="stem"),
        helper.make_node("Conv", ["x", "wl"], ["late"], name="late"),
        helper.make_node("Greater", ["level", "zero"], ["high"]),
        helper.make_node(
            "If", ["high"], ["y"], name="choice", then_branch=body("a", 10, nested=nested), else_branch=body("b", 20)
        ),
    ]
    weights = [tensor("ws", 16, 3, 3, 3, seed=1), tensor("wl", 4, 3, 1, 1, seed=2), tensor("bias", WIDE, seed=3)]
    weights += [tensor("shared", 4, WIDE, 1, 1, seed=4), numpy_helper.from_array(np.float32(0), "zero")]
    weights += [numpy_helper.from_array(np.array(True), "always")]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])]
    inputs += [helper.make_tensor_value_info("level", TensorProto.FLOAT, [])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4)]
    graph = helper.make_graph(nodes, "net", inputs, outputs, weights)
    return onnxslim.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def feeds(levels: list[float], seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    found = []
    for level in levels:
        x = rng.standard_normal((4, 3, 8, 8))
        x = x + np.roll(x, 1, 2) + np.roll(x, 1, 3)
        found.append({"x": x.astype(np.float32), "level": np.array(level, np.float32)})
    return found


def dataset(net: onnxslim.Model, levels: list[float]):
    return open_dataset(feeds(levels), Session(net).specs)


@pytest.mark.parametrize("nested", [False, True])
def test_a_branch_is_a_model_that_gives_what_the_if_gives(nested):
    net = model(nested=nested)
    data, session = dataset(net, [1.0, -1.0, 1.0]), Session(net)
    expected = {level: [session.run(feed)["y"] for feed in data if feed["level"] == level] for level in (1.0, -1.0)}
    before = net.to_bytes()
    for body, level in zip(bodies(net, data), (1.0, -1.0), strict=True):
        assert body.calibration is not None
        alone = Session(body.model)
        found = [next(iter(alone.run(inside).values())) for inside in body.calibration]
        for mine, reference in zip(found, expected[level], strict=True):
            np.testing.assert_allclose(mine, reference, atol=1e-5)
    assert net.to_bytes() == before


def test_weights_of_other_graphs_are_inputs_and_their_vectors_change_for_one_branch_alone():
    net = model()
    bias = next(constant for constant in net.constants() if constant.name == "bias")
    kept = bias.values.copy()
    for body in bodies(net, None):
        assert {tensor.name for tensor in body.model.graph.inputs} == {"stem", "shared"}
        for node in body.model.graph.nodes:
            if node.name == "a_c2":
                node.inputs[2].values = node.inputs[2].values + 1
    used = {n.name: n.inputs[2] for graph in net.graphs() for n in graph.nodes if n.name in ("a_c2", "b_c2")}
    assert used["b_c2"] is bias
    np.testing.assert_array_equal(bias.values, kept)
    np.testing.assert_array_equal(used["a_c2"].values, kept + 1)
    feed = feeds([1.0])[0]
    onnx.checker.check_model(net.to_proto(), full_check=True)
    assert np.abs(Session(net).run(feed)["y"] - Session(model()).run(feed)["y"]).max() > 1e-3


def test_fresh_names_of_a_branch_are_fresh_in_the_model():
    net = model()
    for body in bodies(net, None):
        assert body.model.fresh_name("late") == "late_1"
        assert body.model.fresh_name("b_c1") == "b_c1_1"
        break
    assert net.fresh_name("late") == "late_2"


def test_a_branch_that_reads_a_tensor_of_unknown_type_stays():
    net = model()
    maker = next(node for node in net.graph.nodes if node.name == "stem")
    maker.domain = "unheard.of"
    told: list[tuple[str, str]] = []
    assert not list(bodies(net, None, lambda node, why: told.append((node, why))))
    assert told[0] == ("choice (then_branch)", "stays as it is: the type of 'stem', which it reads, is unknown")


# ------------------------------------------------------------------------------------------------- what uses them


@pytest.mark.parametrize("nested", [False, True])
def test_pruning_cuts_the_branches_that_the_data_takes(nested):
    net = model(nested=nested)
    original, test = Session(net.copy()), feeds([1.0, -1.0], seed=5)
    outcome = PruneChannels(ratio=0.25).run(net, Context(calibration=dataset(net, [1.0, -1.0] * 24)))
    onnx.checker.check_model(net.to_proto(), full_check=True)
    widths = {n.name: n.inputs[1].shape[0] for graph in net.graphs() for n in graph.nodes if n.op == "Conv"}
    assert widths["a_c1"] < WIDE and widths["b_c1"] < WIDE
    assert widths["a_c2"] == widths["b_c2"] == WIDE  # what reads them is a weight of both
    assert outcome.numbers["channels removed"] == 2 * WIDE - widths["a_c1"] - widths["b_c1"]
    assert 0 < outcome.numbers["share of MACs removed (estimate)"] < 0.5
    fitted = {change.node for change in outcome.changes if change.rule == "least-squares"}
    assert fitted == {"a_c2", "b_c2"}
    session = Session(net)
    for feed in test:
        reference = original.run(feed)["y"]
        error = np.square(session.run(feed)["y"] - reference).mean() / reference.var()
        assert error < 0.2


def test_pruning_leaves_a_branch_alone_that_the_data_never_takes():
    net = model()
    unseen = feeds([-1.0], seed=5)[0]
    reference = Session(net).run(unseen)["y"]
    outcome = PruneChannels(ratio=0.25).run(net, Context(calibration=dataset(net, [1.0] * 24)))
    assert any(change.node == "a_c1" for change in outcome.changes)
    assert ("choice (else_branch)", "stays as it is: the calibration data never enters it") in [
        (refusal.node, refusal.why) for refusal in outcome.refusals
    ]
    np.testing.assert_array_equal(Session(net).run(unseen)["y"], reference)


def test_low_rank_splits_layers_of_the_branches_that_the_data_takes():
    net = model()
    original, test = Session(net.copy()), feeds([1.0, -1.0], seed=5)
    outcome = FactorizeLowRank(keep=0.6).run(net, Context(calibration=dataset(net, [1.0] * 24)))
    onnx.checker.check_model(net.to_proto(), full_check=True)
    split = {change.node for change in outcome.changes if change.rule == "low-rank"}
    assert "a_c2" in split and not any(name.startswith("b_") for name in split)
    assert outcome.numbers["layers factorised"] == len(split)
    session = Session(net)
    taken, untaken = ((session.run(feed)["y"], original.run(feed)["y"]) for feed in test)
    np.testing.assert_array_equal(*untaken)
    assert 0 < np.square(taken[0] - taken[1]).mean() / taken[1].var() < 0.2


def test_layers_of_a_branch_cost_what_they_multiply_on_the_feed(tmp_path):
    net = model()
    net.save(tmp_path / "net.onnx")
    layers = {layer.name: layer.macs for layer in snapshot(tmp_path / "net.onnx", feeds([1.0])[0]).layers}
    assert layers["a_c1"] == 4 * 8 * 8 * WIDE * 16 * 9
    assert layers["a_c3"] == 4 * 8 * 8 * 4 * WIDE


def value(name: str, kind: int, shape: list | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


STEPS, STATE, HIDDEN = 5, 24, 64


def recurrent(op: str, *, limit: int | None = STEPS, axis: int = 1, backwards: int = 0, typed: bool = True):
    """A state that each step adds to, and a network on it whose results are collected.

    ``op`` is Loop, over the rows of an input of the outer graph until the state is large or the rows end; or Scan.
    """
    looping = op == "Loop"
    step = [
        helper.make_node("MatMul", ["h", "w"], ["hw"], name="state"),
        helper.make_node("Add", ["hw", "row"], ["sum"]),
        helper.make_node("Tanh", ["sum"], ["next"]),
        helper.make_node("Gemm", ["next", "w1", "b1"], ["g1"], name="hidden"),
        helper.make_node("Relu", ["g1"], ["r1"]),
        helper.make_node("MatMul", ["r1", "w2"], ["out"], name="result"),
    ]
    kind = TensorProto.FLOAT if typed else TensorProto.UNDEFINED
    inputs, outputs = [value("h", kind, [2, STATE])], [value("next", 1, [2, STATE]), value("out", 1, [2, 8])]
    if looping:
        step.insert(0, helper.make_node("Gather", ["rows", "i"], ["row"], axis=axis))
        step += [helper.make_node("ReduceMax", ["out"], ["most"], keepdims=0)]
        step += [helper.make_node("Less", ["most", "enough"], ["on"])]
        inputs = [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), *inputs]
        outputs = [value("on", TensorProto.BOOL, []), *outputs]
    else:
        inputs.append(value("row", 1, [2, STATE]))
    weights = [tensor("w", STATE, STATE, seed=1), tensor("w1", STATE, HIDDEN, seed=2), tensor("b1", HIDDEN, seed=3)]
    weights += [tensor("w2", HIDDEN, 8, seed=4)]
    body_ = helper.make_graph(step, "step", inputs, outputs, weights[1:])
    start = "" if limit is None else "limit"
    loop = helper.make_node("Loop", [start, "", "h0"], ["last", "y"], name="loop", body=body_)
    scan = helper.make_node(
        "Scan", ["h0", "rows"], ["last", "y"], name="loop", body=body_, num_scan_inputs=1,
        scan_input_axes=[axis], scan_input_directions=[backwards],
    )  # fmt: skip
    shape = [2, STATE]
    shape.insert(axis, "n")
    more = [numpy_helper.from_array(np.float32(3.7), "enough"), numpy_helper.from_array(np.array(limit or 0), "limit")]
    graph = helper.make_graph(
        [loop if looping else scan],
        "net",
        [value("h0", 1, [2, STATE]), value("rows", 1, shape)],
        [value("y", 1, [None] * 3), value("last", 1, [None] * 2)],
        [weights[0], *more],
    )
    return onnxslim.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def sequences(axis: int = 1, count: int = 32, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    feeds_ = [{"h0": rng.normal(size=(2, STATE)), "rows": rng.normal(size=(2, 7, STATE))} for _ in range(count)]
    return [
        {"h0": (feed["h0"] / 2).astype(np.float32), "rows": np.moveaxis(feed["rows"], 1, axis).astype(np.float32)}
        for feed in feeds_
    ]


@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("Loop", {}),
        ("Loop", {"axis": 0}),
        ("Scan", {}),
        ("Scan", {"axis": 2}),
        ("Scan", {"axis": 0, "backwards": 1}),
    ],
)
def test_a_body_of_a_loop_gets_what_each_iteration_gets(op: str, options: dict):
    net = recurrent(op, **options)
    before = net.to_bytes()
    data = open_dataset(sequences(options.get("axis", 1)), Session(net).specs)
    made = [Session(net).run(feed)["y"] for feed in data]
    assert {len(y) for y in made} == ({7} if op == "Scan" else set(range(1, STEPS + 1)))  # some loops end early
    (found,) = [(body, list(body.calibration or ()), Session(body.model)) for body in bodies(net, data)]
    assert found[0].carried == ("next",)
    outputs = [found[2].run(feed)["out"] for feed in found[1]]
    np.testing.assert_allclose(np.stack(outputs), np.concatenate(made), rtol=1e-5, atol=1e-6)
    assert net.to_bytes() == before


def test_a_body_is_entered_with_what_has_another_rank_at_first():
    """As PaddlePaddle writes what has no value before the first iteration: a number, where a matrix is declared."""
    proto = recurrent("Loop").to_proto()
    (loop,) = proto.graph.node
    step = loop.attribute[0].g
    loop.input.append("nothing")
    loop.output.insert(1, "held")
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(0), "nothing"))
    step.input.append(helper.make_tensor_value_info("before", TensorProto.FLOAT, [2, 8]))
    step.node.append(helper.make_node("Identity", ["out"], ["now"]))
    outputs = [*step.output]
    outputs.insert(2, helper.make_tensor_value_info("now", TensorProto.FLOAT, [2, 8]))
    del step.output[:]
    step.output.extend(outputs)
    net = onnxslim.load(proto)
    data = open_dataset(sequences(), Session(net).specs)
    told: list[str] = []
    (entered,) = [list(body.calibration or ()) for body in bodies(net, data, lambda node, why: told.append(why))]
    assert {feed["before"].ndim for feed in entered} == {0, 2}
    assert not told


def test_a_loop_that_is_never_entered_and_one_without_types_stay_with_a_reason():
    told: list[str] = []
    net = recurrent("Loop", limit=None)
    data = open_dataset(sequences(count=2), Session(net).specs)
    for body in net.graph.nodes[0].attrs["body"].inputs:
        body.dtype = None
    assert not list(bodies(net, data, lambda node, why: told.append(f"{node}: {why}")))
    assert told == ["loop (body): stays as it is: the type of 'i', which it reads, is unknown"]
    net = recurrent("Loop")
    net.graph.nodes[0].inputs[0].values = np.array(0)
    assert not list(bodies(net, data, lambda node, why: told.append(f"{node}: {why}")))
    assert told[1:] == ["loop (body): stays as it is: the calibration data never enters it"]


@pytest.mark.parametrize("op", ["Loop", "Scan"])
@pytest.mark.parametrize(
    "rewrite",
    [PruneChannels(ratio=0.25), FactorizeLowRank(keep=0.8), QuantizeStatic(only_if_faster=False)],
    ids=lambda rewrite: rewrite.name,
)
def test_passes_work_inside_of_loops(op: str, rewrite):
    net = recurrent(op)
    reference = net.copy()
    data = open_dataset(sequences(), Session(net).specs)
    outcome = rewrite.run(net, Context(calibration=data))
    named = {change.node for change in outcome.changes}
    assert {"hidden", "result"} & named
    if rewrite.name == "quantize-static":
        refused = {refusal.node: refusal.why for refusal in outcome.refusals}
        assert refused["state"] == "Gemm: its result goes on to the next iteration, where small errors add up"
        ops = [node.op for graph in net.graphs() for node in graph.nodes]
        assert ops.count("QuantizeLinear") == 2
    elif rewrite.name == "prune-channels":
        widths = {node.name: node.inputs[1].shape for graph in net.graphs() for node in graph.nodes if node.name}
        assert widths["hidden"][1] == widths["result"][0] == 48
    onnx.checker.check_model(net.to_proto())
    old, new = Session(reference), Session(net)
    noise = signal = 0.0
    for feed in sequences(seed=5):
        wanted, got = old.run(feed)["y"], new.run(feed)["y"]
        steps = min(len(wanted), len(got))
        noise += float(np.square(got[:steps] - wanted[:steps]).sum())
        signal += float(np.square(wanted[:steps]).sum())
    assert noise < (0.001 if rewrite.name == "quantize-static" else 0.1) * signal


MOVES = {
    "Reshape": {},
    "Transpose": {"perm": [0, 2, 1, 3]},
    "MaxPool": {"kernel_shape": [2, 2]},
    "Flatten": {},
    "Gather": {"axis": 1},
    "Identity": {},
}


@pytest.mark.parametrize("exclude", [(), ("move",)])
@pytest.mark.parametrize("op", MOVES)
def test_a_body_may_read_what_was_moved_behind_an_int8_layer(op: str, exclude: tuple[str, ...]):
    """ONNX Runtime aborts the process where it hands a DequantizeLinear on into a body."""
    extra = {"Reshape": ["sizes"], "Gather": ["picked"]}.get(op, [])
    branches_ = [
        helper.make_graph(
            [helper.make_node(kind, ["moved"], [kind])],
            kind,
            [],
            [helper.make_tensor_value_info(kind, TensorProto.FLOAT, None)],
        )
        for kind in ("Tanh", "Neg")
    ]
    nodes = [
        helper.make_node("Conv", ["x", "ws"], ["c"], name="conv", pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node(op, ["r", *extra], ["moved"], name="move", **MOVES[op]),
        helper.make_node("If", ["high"], ["y"], then_branch=branches_[0], else_branch=branches_[1]),
    ]
    weights = [tensor("ws", 16, 3, 3, 3, seed=1), numpy_helper.from_array(np.array([0, -1]), "sizes")]
    weights += [numpy_helper.from_array(np.array([3, 1]), "picked")]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])]
    inputs += [helper.make_tensor_value_info("high", TensorProto.BOOL, [])]
    graph = helper.make_graph(nodes, "net", inputs, [helper.make_tensor_value_info("y", 1, None)], weights)
    net = onnxslim.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    data = [{"x": feed["x"], "high": np.array(feed["level"] > 0)} for feed in feeds([1.0, -1.0] * 4)]
    expected = [Session(net).run(feed)["y"] for feed in data]
    QuantizeStatic(only_if_faster=False, exclude=exclude).run(
        net, Context(calibration=open_dataset(data, Session(net).specs))
    )
    session = Session(net)
    for feed, wanted in zip(data, expected, strict=True):
        got = session.run(feed)["y"]
        assert np.square(got - wanted).sum() < 0.01 * np.square(wanted).sum()
