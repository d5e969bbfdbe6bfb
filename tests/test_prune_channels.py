"""Pruning as a pass: widths, choice, recovery, what is said, and the statistics and stepwise runs that it stands on."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import onnxslim
from onnxslim.data import open_dataset
from onnxslim.graph.cost import layer_costs
from onnxslim.graph.coupling import couple
from onnxslim.passes._channel_scores import obs_removal, reader_moments, readers
from onnxslim.passes._least_squares import relative_error, solve
from onnxslim.passes._statistics import Moments, input_moments, linear_layer
from onnxslim.passes._trunk import Trunk
from onnxslim.passes.base import Context, Outcome, Pass
from onnxslim.passes.factorize_low_rank import FactorizeLowRank
from onnxslim.passes.prune_channels import PruneChannels, _last
from onnxslim.passes.share_weights import ShareWeights
from onnxslim.runtime import Session


def build(nodes, weights, inputs=(("x", ["N", 3, 8, 8]),), outputs=("y",), opset=17) -> onnxslim.Model:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
        [numpy_helper.from_array(np.asarray(v, np.float32), n) for n, v in weights.items()],
    )
    return onnxslim.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8))


def data(model: onnxslim.Model, samples: int = 96, seed: int = 3):
    rng = np.random.default_rng(seed)
    spec = Session(model).inputs
    # Smooth images: natural inputs are correlated, white noise is the one kind that no channel can make up for.
    arrays = {}
    for name, tensor in spec.items():
        raw = rng.standard_normal([samples, *[d if isinstance(d, int) else 5 for d in tensor.shape[1:]]])
        for axis in range(2, raw.ndim):
            raw = raw + np.roll(raw, 1, axis) + np.roll(raw, -1, axis)
        arrays[name] = raw.astype(np.float32)
    return open_dataset(arrays, list(spec.values()))


def run(model: onnxslim.Model, feed: dict) -> np.ndarray:
    return next(iter(Session(model).run(feed).values()))


def residual_net(batch_norm: bool = True, seed: int = 0) -> onnxslim.Model:
    """Stem, one residual block with BatchNorm nodes, depthwise convolution, pooling, classifier."""
    rng = np.random.default_rng(seed)
    nodes, weights = [], {}

    def w(name, *shape):
        weights[name] = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        return name

    def conv(x, y, cin, cout, group=1):
        inputs = [x, w(y + ".w", cout, cin // group, 3, 3), w(y + ".b", cout)]
        nodes.append(helper.make_node("Conv", inputs, [y], name=y, pads=[1] * 4, group=group))

    def norm(x, y, c):
        if not batch_norm:
            return nodes.append(helper.make_node("Identity", [x], [y], name=y))
        for part in "sbm":
            weights[y + part] = rng.standard_normal(c) * 0.3 + (part == "s")
        weights[y + "v"] = rng.uniform(0.5, 2, c)
        return nodes.append(helper.make_node("BatchNormalization", [x, *(y + p for p in "sbmv")], [y], name=y))

    conv("x", "stem", 3, 32)
    nodes.append(helper.make_node("Relu", ["stem"], ["r0"], name="r0"))
    conv("r0", "c1", 32, 48)
    norm("c1", "n1", 48)
    nodes.append(helper.make_node("Relu", ["n1"], ["r1"], name="r1"))
    conv("r1", "c2", 48, 32)
    norm("c2", "n2", 32)
    nodes.append(helper.make_node("Add", ["n2", "r0"], ["sum"], name="sum"))
    nodes.append(helper.make_node("Relu", ["sum"], ["r2"], name="r2"))
    conv("r2", "dw", 32, 32, group=32)
    nodes.append(helper.make_node("GlobalAveragePool", ["dw"], ["pool"], name="pool"))
    nodes.append(helper.make_node("Flatten", ["pool"], ["flat"], name="flat"))
    nodes.append(helper.make_node("Gemm", ["flat", w("fc.w", 6, 32), w("fc.b", 6)], ["y"], name="fc", transB=1))
    return build(nodes, weights)


# ------------------------------------------------------------------------------------------------------------- widths


def test_kept_widths_are_multiples_of_eight_in_the_model():
    model = residual_net()
    outcome = PruneChannels(ratio=0.4).run(model, Context())
    widths = {n.name: n.inputs[1].shape[0] for n in model.graph.nodes if n.op == "Conv"}
    assert outcome.modified
    assert all(width % 8 == 0 for width in widths.values())
    assert widths["stem"] == widths["c2"] == widths["dw"] < 32
    assert next(n for n in model.graph.nodes if n.name == "dw").attrs["group"] == widths["dw"]


# ----------------------------------------------------------------------------------------------------------- recovery


@pytest.mark.parametrize("criterion", ["norm", "obs"])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_recovery_brings_the_output_back(criterion, batch_norm):
    dense = residual_net(batch_norm)
    feed = next(data(dense, 64, seed=9).batches(64))
    errors = {}
    for recover in (False, True):
        model = residual_net(batch_norm)
        outcome = PruneChannels(ratio=0.3, criterion=criterion, recover=recover).run(
            model, Context(calibration=data(model, 256))
        )
        want, got = run(dense, feed), run(model, feed)
        errors[recover] = float(np.square(want - got).mean() / want.var(axis=0).mean())
        assert outcome.modified
        assert run(model, {"x": feed["x"][:1]}).shape == (1, 6)
    assert errors[True] < 0.25 * errors[False]
    assert errors[True] < 0.4


@pytest.mark.parametrize("kind", ["conv", "depthwise", "gemm", "matmul", "matmul without bias"])
def test_redundant_channels_go_without_a_trace(kind):
    """Each of 16 channels is a mix of 8: half can go, and the refit says how the others make up for them."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((16, 8)) / 3
    if kind in ("conv", "depthwise"):
        first = np.einsum("oi,ikhw->okhw", mix, rng.standard_normal((8, 3, 3, 3)))
        nodes = [helper.make_node("Conv", ["x", "w1", "b1"], ["h"], name="first", strides=[2, 2])]
        weights = {"w1": first, "b1": mix @ rng.standard_normal(8), "w2": rng.standard_normal((5, 16, 3, 3))}
        if kind == "depthwise":
            weights["wd"] = np.repeat(rng.standard_normal((1, 1, 1, 1)), 16, axis=0)
            nodes.append(helper.make_node("Conv", ["h", "wd"], ["d"], name="depthwise", group=16))
        last = helper.make_node(
            "Conv", ["d" if kind == "depthwise" else "h", "w2"], ["y"], name="last", dilations=[1, 1]
        )
        model = build([*nodes, last], weights)
    else:
        weights = {"w1": rng.standard_normal((20, 8)) @ mix.T, "w2": rng.standard_normal((16, 5))}
        op = "Gemm" if kind == "gemm" else "MatMul"
        nodes = [helper.make_node(op, ["x", "w1"], ["h"], name="first")]
        nodes.append(helper.make_node(op, ["h", "w2"], ["z" if kind == "matmul" else "y"], name="last"))
        if kind == "matmul":
            weights["b"] = rng.standard_normal(5)
            nodes.append(helper.make_node("Add", ["b", "z"], ["y"], name="bias"))
        model = build(nodes, weights, [("x", ["N", 20] if kind == "gemm" else ["N", "T", 20])])
    dense = model.copy()
    feed = next(data(model, 8, seed=5).batches(8))
    outcome = PruneChannels(ratio=0.5, ridge=1e-5).run(model, Context(calibration=data(model, 300)))
    assert outcome.numbers["channels removed"] == 8
    np.testing.assert_allclose(run(model, feed), want := run(dense, feed), atol=5e-3 * np.abs(want).max())


def test_same_seed_same_model():
    models = [residual_net(), residual_net()]
    for model in models:
        PruneChannels().run(model, Context(calibration=data(model), seed=4))
    first, second = (model.to_proto().SerializeToString() for model in models)
    assert first == second


def test_fixed_batch_model_is_pruned_and_runs():
    proto = residual_net().to_proto()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    model = onnxslim.load(proto)
    outcome = PruneChannels().run(model, Context(calibration=data(model, 64)))
    assert outcome.numbers["layers refitted"] >= 4
    assert run(model, {"x": np.zeros((2, 3, 8, 8), np.float32)}).shape == (2, 6)


def test_a_weight_of_two_layers_is_cut_but_not_refitted():
    rng = np.random.default_rng(0)
    weights = {"w0": rng.standard_normal((16, 3, 3, 3)), "w1": rng.standard_normal((16, 16, 1, 1)) / 4}
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["a"], name="a"),
        helper.make_node("Conv", ["a", "w1"], ["b"], name="b"),
        helper.make_node("Relu", ["b"], ["c"], name="c"),
        helper.make_node("Conv", ["c", "w1"], ["d"], name="d"),
        helper.make_node("ReduceMean", ["d"], ["y0"], name="mean", axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["y0", "w2"], ["y"], name="out"),
    ]
    weights["w2"] = rng.standard_normal((16, 3))
    model = build(nodes, weights)
    outcome = PruneChannels(ratio=0.5).run(model, Context(calibration=data(model)))
    assert [n.inputs[1].shape for n in model.graph.nodes if n.name in "bd"] == [(8, 8, 1, 1)] * 2
    assert any("serves other layers" in refusal.why for refusal in outcome.refusals)
    assert run(model, {"x": np.zeros((1, 3, 8, 8), np.float32)}).shape == (1, 3)


@pytest.mark.parametrize("cost", ["macs", "parameters"])
def test_the_budget_is_that_of_a_uniform_cut(cost, monkeypatch):
    """Early layers cost MACs and late ones parameters; with data the cut is not uniform, and costs no more."""
    monkeypatch.setattr(PruneChannels, "_best", lambda self, model, proposals, *_: proposals[0])
    rng = np.random.default_rng(0)
    nodes, weights, source, widths = [], {}, "x", [3, 32, 64, 64, 128]
    for index, (cin, cout) in enumerate(itertools.pairwise(widths)):
        weights |= {f"w{index}": rng.standard_normal((cout, cin, 3, 3)) / cin, f"b{index}": rng.standard_normal(cout)}
        stride = [1 + (index > 0)] * 2
        inputs = [source, f"w{index}", f"b{index}"]
        nodes.append(helper.make_node("Conv", inputs, [f"c{index}"], name=f"c{index}", pads=[1] * 4, strides=stride))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [source := f"r{index}"]))
    weights |= {"fc": rng.standard_normal((128, 5))}
    nodes += [helper.make_node("ReduceMean", [source], ["m"], axes=[2, 3], keepdims=0)]
    nodes += [helper.make_node("MatMul", ["m", "fc"], ["y"], name="fc")]
    shape = [("x", ["N", 3, 16, 16])]
    feeds = data(build(nodes, weights, shape), 64)
    costs, kept = {}, {}
    for context, criterion in ((Context(), "norm"), (Context(calibration=feeds), "obs")):
        model = build(nodes, weights, shape)
        outcome = PruneChannels(ratio=0.4, cost=cost, criterion=criterion).run(model, context)
        layers = layer_costs(model, {"x": [1, 3, 16, 16]})
        costs[criterion] = sum((layer.macs or 0) if cost == "macs" else layer.parameters for layer in layers)
        kept[criterion] = [node.inputs[1].shape[0] for node in model.graph.nodes if node.op == "Conv"]
        assert 0.1 < outcome.numbers["share of MACs removed (estimate)"] < 0.8
    assert kept["norm"] == [16, 40, 40, 80]
    assert kept["obs"] != kept["norm"]
    assert costs["obs"] <= costs["norm"] * 1.001


# -------------------------------------------------------------------------------------------------------- what it says


def test_without_data_it_prunes_by_norm_and_says_that_nothing_was_refitted():
    model = residual_net()
    outcome = PruneChannels(ratio=0.4).run(model, Context())
    assert outcome.modified
    assert any(r.rule == "least-squares" and "no calibration data" in r.why for r in outcome.refusals)


def test_changes_and_refusals_name_layers_and_widths():
    model = residual_net()
    outcome = PruneChannels(ratio=0.5, exclude=("c1",)).run(model, Context(calibration=data(model)))
    assert any(c.node == "stem" and "32 -> 16 channels: stem, c1, c2" in c.what for c in outcome.changes)
    why = {r.node: r.why for r in outcome.refusals}
    assert why["c1"] == "48 channels stay: 'c1' is excluded by 'c1'"
    assert why["fc"] == "6 channels stay: it is an axis of graph output 'y'"
    assert outcome.numbers["channels removed"] == 16
    assert 0 < outcome.numbers["share of parameters removed"] < 1


def test_narrow_groups_and_graphs_without_layers_get_a_reason():
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="narrow"),
        helper.make_node("GlobalMaxPool", ["a"], ["p"], name="p"),
        helper.make_node("Conv", ["p", "v"], ["y"], name="last"),
    ]
    model = build(nodes, {"w": np.ones((8, 3, 1, 1)), "v": np.ones((2, 8, 1, 1))})
    before = model.to_proto().SerializeToString()
    outcome = PruneChannels().run(model, Context())
    assert not outcome.modified
    assert model.to_proto().SerializeToString() == before
    assert {r.node: r.why for r in outcome.refusals}["narrow"].startswith(
        "8 channels stay: kept widths are multiples of 8"
    )
    empty = PruneChannels().run(build([helper.make_node("Relu", ["x"], ["y"])], {}), Context())
    assert not empty.modified
    assert len(empty.refusals) == 1


def test_weaker_ends():
    step, ratios = PruneChannels(ratio=0.5), []
    while step is not None:
        ratios.append(step.ratio)
        step = step.weaker(Outcome())
    assert ratios == [0.5, 0.375, 0.2812, 0.2109, 0.1582, 0.1187, 0.089, 0.0668, 0.0501]


# ---------------------------------------------------------------------------------------------------------- statistics


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_rows_of_a_convolution_give_its_output(draw):
    pick = draw.draw
    op = pick(st.sampled_from(["Conv", "ConvTranspose"]))
    rank, groups = pick(st.integers(1, 3)), pick(st.sampled_from([1, 2, 4]))
    cin, cout = groups * pick(st.integers(1, 2)), groups * pick(st.integers(1, 3))
    kernel = [pick(st.integers(1, 3)) for _ in range(rank)]
    attrs = {
        "group": groups,
        "strides": [pick(st.integers(1, 3)) for _ in range(rank)],
        "dilations": [pick(st.integers(1, 2)) for _ in range(rank)],
    }
    if op == "Conv" and pick(st.booleans()):
        attrs |= {"auto_pad": pick(st.sampled_from(["SAME_UPPER", "SAME_LOWER"])), "dilations": [1] * rank}
    elif op == "Conv" or pick(st.booleans()):
        attrs["pads"] = [pick(st.integers(0, 2)) for _ in range(2 * rank)]
    if op == "ConvTranspose" and pick(st.booleans()):
        attrs["output_padding"] = [pick(st.integers(0, stride - 1)) for stride in attrs["strides"]]
    shape = (cin, cout // groups, *kernel) if op == "ConvTranspose" else (cout, cin // groups, *kernel)
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal(shape), "b": rng.standard_normal(cout)}
    sizes = [7, 6, 5][:rank]
    model = build([helper.make_node(op, ["x", "w", "b"], ["y"], **attrs)], weights, [("x", ["N", cin, *sizes])])
    x = rng.standard_normal((3, cin, *sizes)).astype(np.float32)
    y = run(model, {"x": x})
    layer = linear_layer(model.graph.nodes[0])
    assert layer.output_shape(x.shape) == y.shape
    rows = layer.draw(y.shape, rng, per_sample=6)
    mine = np.einsum("gok,grk->gro", layer.matrices(), layer.input_rows(x, rows))
    bias = weights["b"].reshape(groups, 1, -1)
    np.testing.assert_allclose(mine + bias, layer.output_rows(y, rows), atol=1e-4)
    np.testing.assert_array_equal(layer.stored(layer.matrices()), layer.weight.values)


@pytest.mark.parametrize("attrs", [{"auto_pad": "SAME_UPPER"}, {"output_shape": [16, 16]}])
def test_transposed_convolution_whose_padding_depends_on_sizes_has_no_rows(attrs):
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2], **attrs)
    assert linear_layer(build([node], {"w": np.ones((3, 2, 3, 3))}).graph.nodes[0]) is None


def test_transposed_convolutions_are_refitted():
    """A decoder whose maps are redundant: half of the channels go, and those that are left make up for it."""
    rng = np.random.default_rng(2)
    mix = rng.standard_normal((4, 32))  # 32 channels of 4 patterns: half can be had from the other half
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["h"], "make", pads=[1, 1, 1, 1]),
        helper.make_node("ConvTranspose", ["h", "w2", "b2"], ["u"], "up", strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["u"], ["r"]),
        helper.make_node("ConvTranspose", ["r", "w3"], ["y"], "head", strides=[2, 2]),
    ]
    weights = {
        "w1": np.einsum("pc,pikl->cikl", mix, rng.standard_normal((4, 3, 3, 3))),
        "w2": rng.standard_normal((32, 16, 4, 4)),
        "b2": rng.standard_normal(16),
        "w3": rng.standard_normal((16, 1, 2, 2)),
    }
    model = build(nodes, weights)
    calibration, held = data(model, 64), data(model, 64, seed=9)
    feed = next(iter(held.batches(64)))
    original = run(model, feed)
    errors = {}
    for recover in (False, True):
        pruned = model.copy()
        outcome = PruneChannels(ratio=0.5, recover=recover, exclude=("up",)).run(
            pruned, Context(calibration=calibration)
        )
        errors[recover] = float(np.square(run(pruned, feed) - original).mean() / original.var())
    assert [change.node for change in outcome.changes if change.rule == "least-squares"] == ["up", "head"]
    assert outcome.numbers["channels removed"] == 16
    assert errors[True] < 1e-3 < 0.1 < errors[False]


@pytest.mark.parametrize("op, attrs", [("Gemm", {"transB": 1, "alpha": 0.5}), ("Gemm", {}), ("MatMul", {})])
def test_moments_of_a_matrix_product(op, attrs):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((4, 6) if attrs.get("transB") else (6, 4))
    rank = [("x", ["N", 6])] if op == "Gemm" else [("x", ["N", 5, 6])]
    model = build([helper.make_node(op, ["x", "w"], ["y"], **attrs)], {"w": w}, rank)
    batches = [rng.standard_normal((n, 6) if op == "Gemm" else (n, 5, 6)).astype(np.float32) for n in (3, 4)]
    node = model.graph.nodes[0]
    seen = input_moments(Trunk(model, lambda: [{"x": x} for x in batches]), [node])[id(node)]
    rows = np.concatenate([x.reshape(-1, 6) for x in batches])
    assert seen.count == len(rows)
    np.testing.assert_allclose(seen.mean[0], rows.mean(0), atol=1e-6)
    np.testing.assert_allclose(seen.covariance[0], np.cov(rows.T, bias=True), atol=1e-5)


def test_wide_layers_see_more_rows_of_few_samples():
    model = build(
        [helper.make_node("Conv", ["x", "w"], ["y"])], {"w": np.ones((2, 64, 3, 3))}, [("x", ["N", 64, 40, 40])]
    )
    layer = linear_layer(model.graph.nodes[0])
    assert [layer.rows_each(samples) for samples in (1000, 144, 20, 1)] == [40, 40, 288, 1024]
    assert layer.rows_each(144, at_least=60) == 60
    feeds = [{"x": np.random.default_rng(0).standard_normal((20, 64, 40, 40)).astype(np.float32)}]
    counts = [
        input_moments(Trunk(model, lambda: feeds), [layer.node], samples=samples)[id(layer.node)].count
        for samples in (None, 20)
    ]
    assert counts == [20 * 40, 20 * 288]


def test_gathered_rows_count_as_added_ones():
    rng = np.random.default_rng(0)
    for targets in (0, 3):
        added, gathered = (Moments.empty(2, 50, targets) for _ in range(2))
        for rows in (1, 20, 7, 40, 2):
            x = rng.standard_normal((2, rows, 50)) + 2
            y = rng.standard_normal((2, rows, targets)) if targets else None
            added.add(x, y)
            gathered.gather(x, y)
        assert gathered.count < added.count == 70  # some wait
        gathered.settle()
        gathered.settle()
        assert gathered.count == 70
        np.testing.assert_allclose(gathered.covariance, added.covariance, atol=1e-9)
        if targets:
            np.testing.assert_allclose(gathered.cross_covariance, added.cross_covariance, atol=1e-9)


def test_order_of_removal_makes_the_most_of_what_stays():
    """Losses are those of a least-squares fit on what is left, and below those of any other order that is tried."""
    rng = np.random.default_rng(1)
    nodes = [
        helper.make_node("Gemm", ["x", "a"], ["h"], name="first"),
        helper.make_node("Gemm", ["h", "b"], ["y"], name="second"),
    ]
    weights = {"a": rng.standard_normal((12, 9)), "b": rng.standard_normal((9, 5))}
    model = build(nodes, weights, [("x", ["N", 12])])
    coupling = couple(model)
    (index,) = (i for i, group in enumerate(coupling.groups) if group.frozen is None)
    second = model.graph.nodes[1]
    rows = rng.standard_normal((500, 12)).astype(np.float32)
    found = readers(coupling.groups[index])
    moments = reader_moments(model, found, lambda: [{"x": rows}], per_sample=1, seed=0)
    removal = obs_removal(coupling.groups[index], found, moments, damping=1e-9)
    assert sorted(removal.order.tolist()) == list(range(9))
    covariance, weight = moments[found[0]].covariance[0], linear_layer(second).matrices()[0]

    def loss(gone):
        kept = np.setdiff1d(np.arange(9), gone)
        fit = np.linalg.solve(covariance[np.ix_(kept, kept)], covariance[kept] @ weight.T).T
        rest = weight.copy()
        rest[:, kept] -= fit
        return np.einsum("ok,kl,ol->", rest, covariance, rest) / np.einsum("ok,kl,ol->", weight, covariance, weight)

    for count in range(1, 8):
        assert removal.losses[count] == pytest.approx(-np.log(1 - loss(removal.order[:count])), rel=1e-4)
    others = [loss(rng.permutation(9)[:4]) for _ in range(50)]
    assert removal.losses[4] <= -np.log(1 - min(others)) * 1.05


@pytest.mark.parametrize("flat", [False, True])
def test_a_wide_reader_tells_the_order_as_well(flat, monkeypatch):
    """A layer with too many inputs for their covariance: 4 of 12 channels repeat others, and are the first to go."""
    monkeypatch.setattr("onnxslim.passes._channel_scores._WIDEST", 32)
    rng = np.random.default_rng(2)
    first = rng.standard_normal((12, 3, 3, 3))
    first[8:] = first[:4] * rng.uniform(0.5, 2, (4, 1, 1, 1))
    nodes = [helper.make_node("Conv", ["x", "a"], ["h"], name="first", strides=[2, 2])]
    if flat:
        nodes += [
            helper.make_node("Flatten", ["h"], ["f"]),
            helper.make_node("Gemm", ["f", "b"], ["y"], name="second"),
        ]
    else:
        nodes += [helper.make_node("Conv", ["h", "b"], ["y"], name="second")]
    model = build(nodes, {"a": first, "b": rng.standard_normal((108, 5) if flat else (5, 12, 2, 2))})
    group = next(group for group in couple(model).groups if group.frozen is None)
    found = readers(group)
    assert [reader.wide for reader in found] == [True]
    moments = reader_moments(model, found, lambda: data(model, 200).batches(50), per_sample=4, seed=0)
    assert moments[found[0]].covariance.shape == (1, 12, 12)
    removal = obs_removal(group, found, moments, damping=1e-6)
    pairs = {frozenset((channel, channel + 8)) for channel in range(4)}
    assert all(len(pair & set(removal.order[:4].tolist())) == 1 for pair in pairs)
    assert removal.losses[4] < 1e-2 * removal.losses[6]


def test_a_proposal_is_taken_that_is_clearly_better_when_tried(monkeypatch):
    """Of two layers one repeats its channels: whichever proposal comes first, it is that one which is cut."""
    rng = np.random.default_rng(0)
    weights = {"a": rng.standard_normal((20, 8)) @ rng.standard_normal((8, 16)), "b": rng.standard_normal((16, 16))}
    weights["c"] = rng.standard_normal((16, 16))
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], name="a"),
        helper.make_node("MatMul", ["h", "b"], ["g"], name="b"),
        helper.make_node("Tanh", ["g"], ["t"], name="t"),
        helper.make_node("MatMul", ["t", "c"], ["y"], name="c"),
    ]
    model = build(nodes, weights, [("x", ["N", 20])])
    first, second = (i for i, group in enumerate(couple(model).groups) if group.frozen is None)
    good, bad = {first: 8, second: 16}, {first: 16, second: 8}
    for proposals in ([good, bad], [bad, good]):
        monkeypatch.setattr(PruneChannels, "_proposals", lambda self, *_, p=proposals, **__: p)
        pruned = model.copy()
        PruneChannels(ratio=0.5).run(pruned, Context(calibration=data(model, 300)))
        assert next(node.inputs[1].shape for node in pruned.graph.nodes if node.op == "MatMul") == (20, 8)


def test_solve_is_least_squares_and_keeps_dead_inputs():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 500, 7))
    x[..., 3] = 0
    truth = rng.standard_normal((1, 2, 7))
    moments = Moments.empty(1, 7, 2)
    moments.add(x, x @ truth.transpose(0, 2, 1) + 3)
    start = np.ones((1, 2, 7))
    fitted = solve(moments, start, 1e-9)
    np.testing.assert_allclose(np.delete(fitted, 3, 2), np.delete(truth, 3, 2), atol=1e-4)
    np.testing.assert_allclose(fitted[..., 3], 1)
    assert relative_error(moments, fitted) < 1e-6 < relative_error(moments, start)


@pytest.mark.parametrize(
    ("budget", "disk"), [(1 << 30, 1 << 30), (20_000, 1 << 30), (0, 1 << 30), (20_000, 30_000), (0, 0)]
)
def test_steps_of_a_trunk_see_new_weights_and_held_tensors(budget, disk, monkeypatch):
    """Holding all in memory, some on disk, all on disk, some nowhere, and going back to the inputs each time."""
    monkeypatch.setattr("onnxslim.passes._trunk._MOST_DISK", disk)
    model = residual_net()
    feeds = [{"x": x} for x in np.random.default_rng(0).standard_normal((3, 2, 3, 8, 8)).astype(np.float32)]
    trunk = Trunk(model, lambda feeds=feeds: feeds, budget)
    first = list(trunk.step(["r0"]))
    layer = next(n for n in model.graph.nodes if n.name == "c1")
    layer.inputs[1].values = layer.inputs[1].values * 2
    second, third = list(trunk.step(["r1", "r0"])), list(trunk.step(["y"]))
    back = list(trunk.step(["r0"]))  # what is no longer held
    session = Session(model, outputs=["r0", "r1", "y"])
    for feed, a, b, c, d in zip(feeds, first, second, third, back, strict=True):
        want = session.run(feed)
        np.testing.assert_allclose(d["r0"], want["r0"], atol=1e-5)
        np.testing.assert_allclose(a["r0"], want["r0"], atol=1e-5)
        np.testing.assert_allclose(b["r1"], want["r1"], atol=1e-5)
        np.testing.assert_allclose(b["r0"], want["r0"], atol=1e-5)
        np.testing.assert_allclose(c["y"], want["y"], atol=1e-5)


def test_a_trunk_runs_no_node_twice(monkeypatch):
    model, ran = residual_net(), []

    def session(part, **options):
        ran.extend(node.outputs[0].name for node in part.graph.nodes)
        return Session(part, **options)

    monkeypatch.setattr("onnxslim.passes._trunk.Session", session)
    feeds = [{"x": np.ones((2, 3, 8, 8), np.float32)}]
    trunk = Trunk(model, lambda: feeds)
    for wanted in ("r0", "r1", "y"):
        list(trunk.step([wanted]))
    assert sorted(ran) == sorted(node.outputs[0].name for node in model.graph.nodes)


def test_steps_of_a_trunk_give_constants_defaults_and_what_follows_a_sequence():
    weight, given = np.eye(4, dtype=np.float32), np.full((2, 4), 3, np.float32)
    nodes = [
        helper.make_node("Add", ["x", "d"], ["a"]),
        helper.make_node("SplitToSequence", ["a"], ["parts"], axis=1),
        helper.make_node("MatMul", ["c", "w"], ["e"]),
        helper.make_node("ConcatFromSequence", ["parts"], ["b"], axis=1),
        helper.make_node("Mul", ["b", "e"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4]) for name in ("x", "d")]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4])]
    weights = [numpy_helper.from_array(values, name) for name, values in (("w", weight), ("c", given), ("d", given))]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    model = onnxslim.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    trunk = Trunk(model, lambda: [{"x": x}, {"x": x, "d": x}])
    for wanted in (["a", "c", "d"], ["c", "b"], ["y"]):
        for found, d in zip(trunk.step(wanted), (given, x), strict=True):
            expected = {"a": x + d, "b": x + d, "c": given, "d": d, "y": 3 * (x + d)}
            for name in wanted:
                np.testing.assert_array_equal(found[name], expected[name])


def test_pruned_file_is_valid(tmp_path):
    model = residual_net()
    PruneChannels().run(model, Context(calibration=data(model)))
    model.graph.outputs[0].shape = ["N", 6]
    model.save(tmp_path / "pruned.onnx")
    onnx.checker.check_model(str(tmp_path / "pruned.onnx"), full_check=True)


def test_a_weight_that_is_data_elsewhere_is_cut_for_both_or_not_at_all():
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], "a"),
        helper.make_node("Conv", ["a", "w2"], ["b"], "b"),
        helper.make_node("Conv", ["w2", "w3"], ["c"], "c"),  # a map of eight samples with the channels of ``a``
        helper.make_node("ReduceSum", ["c"], ["s"], keepdims=0),
        helper.make_node("Add", ["b", "s"], ["y"]),
    ]
    weights = [weight("w1", 16, 3, 3), weight("w2", 8, 16, 3), weight("w3", 5, 16, 2)]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 12])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8, 8])]
    graph = helper.make_graph(nodes, "net", inputs, outputs, weights)
    model = onnxslim.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    outcome = PruneChannels(ratio=0.5, multiple_of=1, min_channels=1).run(model, Context())
    widths = {node.name: node.inputs[1].shape for node in model.graph.nodes if node.op == "Conv"}
    assert outcome.changes
    assert widths["a"][0] == widths["b"][1] == 8
    assert next(node for node in model.graph.nodes if node.name == "c").inputs[0].shape[1] == widths["c"][1]
    Session(model).run({"x": rng.normal(size=(2, 3, 12)).astype(np.float32)})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "step", [PruneChannels(ratio=0.35), FactorizeLowRank(keep=0.6, cost="parameters"), ShareWeights(bits=4)]
)
def test_a_gemm_whose_beta_is_zero_gets_a_bias_that_counts(step: Pass, bias: bool):
    """As converters of MatMul write it, without a bias too."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.normal(size=(32, 64)) / 6,
        "v": rng.normal(size=(64, 48)) / 8,
        "u": rng.normal(size=(48, 8)) / 7,
    }
    extra = ["c"] if bias else []
    if bias:
        weights["c"] = np.full(64, 100.0)  # which nothing adds
    nodes = [
        helper.make_node("Gemm", ["x", "w", *extra], ["h"], beta=0.0),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "v"], ["g"], beta=0.0),
        helper.make_node("Relu", ["g"], ["s"]),
        helper.make_node("MatMul", ["s", "u"], ["y"]),
    ]
    model = build(nodes, weights, inputs=(("x", ["N", 32]),))
    mixed = rng.normal(size=(12, 32))
    feeds = (rng.normal(size=(300, 12)) @ mixed).astype(np.float32)
    dense = model.copy()
    outcome = step.run(model, Context(calibration=open_dataset({"x": feeds[:200]}, list(Session(model).specs))))
    assert outcome.changes
    true, found = (run(each, {"x": feeds[200:]}) for each in (dense, model))
    assert np.square(found - true).sum() < 0.05 * np.square(true).sum()


def test_inputs_that_only_rounding_moves_count_as_constant():
    rng = np.random.default_rng(0)
    rows = np.full((1, 64, 6), 0.37, np.float32)
    rows[0, :, :2] = rng.normal(size=(64, 2))
    rows[0, :, 2] = np.nextafter(np.float32(0.37), np.float32(1), dtype=np.float32)
    rows[0, ::2, 2] = 0.37
    moments = Moments.empty(1, 6, 3)
    targets = rng.normal(size=(1, 64, 3)).astype(np.float32)
    moments.add(rows, targets)
    assert not moments.covariance[0, 2:].any() and not moments.covariance[0, :, 2:].any()
    start = rng.normal(size=(1, 3, 6))
    found = solve(moments, start, 1e-3)
    assert found[0, :, 2:] == pytest.approx(start[0, :, 2:])
    varied = rows[0, :, :2] - rows[0, :, :2].mean(0)
    assert found[0, :, :2] == pytest.approx(np.linalg.lstsq(varied, targets[0], rcond=None)[0].T, abs=0.01)


def recurrent_net(op: str, *, both: bool, last: bool, units: int = 24, **attributes: object) -> onnxslim.Model:
    """Two layers; the second gives all states, or only the last ones."""
    rng = np.random.default_rng(0)
    gates, ways = {"LSTM": 4, "GRU": 3, "RNN": 1}[op], 1 + both
    nodes, weights, inputs, source = [], {}, 12, "x"
    for index in range(2):
        for name, size in (("w", inputs), ("r", units)):
            weights[f"{name}{index}"] = rng.normal(size=(ways, gates * units, size)) / np.sqrt(size)
        weights[f"b{index}"] = rng.normal(size=(ways, 2 * gates * units)) / 4
        names = [f"{name}{index}" for name in "wrb"]
        outputs = ["", f"h{index}"] if last and index else [f"s{index}"]
        attributes |= {"hidden_size": units, "direction": "bidirectional" if both else "forward"}
        nodes.append(helper.make_node(op, [source, *names], outputs, name=f"layer{index}", **attributes))
        source = f"flat{index}"
        states = "h1" if last and index else f"s{index}"
        if last and index:
            nodes.append(helper.make_node("Transpose", [states], [f"t{index}"], perm=[1, 0, 2]))
        else:
            nodes.append(helper.make_node("Transpose", [states], [f"t{index}"], perm=[0, 2, 1, 3]))
        shape = [-1, ways * units] if last and index else [0, 0, -1]
        weights[f"shape{index}"] = np.array(shape)
        nodes.append(helper.make_node("Reshape", [f"t{index}", f"shape{index}"], [source]))
        inputs = ways * units
    weights["u"] = rng.normal(size=(inputs, 6)) / np.sqrt(inputs)
    nodes.append(helper.make_node("MatMul", [source, "u"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [10, "N", 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(value if value.dtype == np.int64 else value.astype(np.float32), name)
            for name, value in weights.items()
        ],
    )
    return onnxslim.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def sequences(count: int, seed: int) -> list[dict[str, np.ndarray]]:
    """Of numbers that go together, each on its own."""
    mixed = np.random.default_rng(5).normal(size=(4, 12))
    rng = np.random.default_rng(seed)
    return [{"x": (rng.normal(size=(10, 1, 4)) @ mixed).astype(np.float32)} for _ in range(count)]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize(
    "op, attributes", [("LSTM", {}), ("GRU", {"linear_before_reset": 1}), ("GRU", {}), ("RNN", {})]
)
def test_gates_of_recurrent_layers_make_up_for_units_that_went(op: str, attributes: dict, both: bool, last: bool):
    errors = {}
    test = {"x": np.concatenate([feed["x"] for feed in sequences(20, 9)], axis=1)}
    for recover in (True, False):
        model = recurrent_net(op, both=both, last=last, **attributes)
        true = run(model, test)
        feeds = open_dataset(iter(sequences(64, 1)), list(Session(model).specs))
        outcome = PruneChannels(ratio=0.3, multiple_of=1, recover=recover).run(model, Context(calibration=feeds))
        assert {node.attrs["hidden_size"] for node in model.graph.nodes if node.op == op} != {24}
        refitted = [change.node for change in outcome.changes if "of its gates" in change.what]
        assert bool(refitted) == recover
        refused = [refusal.node for refusal in outcome.refusals if "its last states only" in refusal.why]
        narrower = [node.name for node in model.graph.nodes if node.op == op and node.attrs["hidden_size"] < 24]
        assert refused == (["layer1"] if last and recover and "layer1" in narrower else [])
        errors[recover] = np.square(run(model, test) - true).sum() / np.square(true - true.mean()).sum()
    assert errors[True] < 0.5 * errors[False]


def packed_heads() -> onnxslim.Model:
    """Four heads of eight behind one product, and one more layer."""
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[N, 6, 16] x) => (float[N, 6, 16] y)
    <int64[5] split_shape = {0, 6, 3, 4, 8}, int64[3] merged = {0, 6, -1},
     int64 zero = {0}, int64 one = {1}, int64 two = {2}> {
        packed = MatMul(x, wide) split = Reshape(packed, split_shape) parts = Transpose<perm = [2, 0, 3, 1, 4]>(split)
        q = Gather(parts, zero) k = Gather(parts, one) v = Gather(parts, two)
        kt = Transpose<perm = [0, 1, 3, 2]>(k) scores = MatMul(q, kt) weights = Softmax(scores)
        seen = MatMul(weights, v) back = Transpose<perm = [0, 2, 1, 3]>(seen) heads = Reshape(back, merged)
        y = MatMul(heads, out)
    }"""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    loud = np.array([1, 0.05, 1, 0.05]).repeat(8)[:, None]  # two heads say next to nothing
    for name, value in {"wide": rng.standard_normal((16, 96)) / 4, "out": rng.standard_normal((32, 16)) * loud}.items():
        proto.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    return onnxslim.load(proto)


def test_heads_behind_one_product_are_pruned_below_eight():
    """A head has eight elements, so two heads are no narrower than 16 channels."""
    model, dense = packed_heads(), Session(packed_heads())
    rng = np.random.default_rng(1)
    feeds = [{"x": rng.standard_normal((1, 6, 16)).astype(np.float32)} for _ in range(64)]
    outcome = PruneChannels(ratio=0.5).run(model, Context(calibration=open_dataset(feeds, dense.specs)))
    assert [change.what.split(":")[0] for change in outcome.changes if change.rule == "prune-channels"] == [
        "4 -> 2 blocks of 8 channels"
    ]
    shapes = sorted(tuple(t.shape) for t in model.graph.tensors().values() if t.name in ("wide", "out"))
    assert shapes == [(16, 16), (16, 48)]
    pruned = Session(model)
    for feed in feeds[:3]:
        wanted = dense.run(feed)["y"]
        assert np.square(pruned.run(feed)["y"] - wanted).mean() < 0.02 * wanted.var()


def normalised_net() -> onnxslim.Model:
    """A residual stream that a norm spans, with nothing else that could be cut."""
    rng = np.random.default_rng(0)
    weights = {
        "first": rng.standard_normal((12, 32)) / 3,
        "scale": rng.uniform(0.5, 1.5, 32),
        "bias": rng.standard_normal(32),
        "out": rng.standard_normal((32, 6)) * np.array([1, 0.1]).repeat(16)[:, None],
    }
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["h"], "first"),
        helper.make_node("LayerNormalization", ["h", "scale", "bias"], ["n"], "norm", axis=-1),
        helper.make_node("MatMul", ["n", "out"], ["y"], "out"),
    ]
    return build(nodes, weights, inputs=(("x", ["N", 5, 12]),))


def test_what_a_norm_spans_is_cut_only_where_layers_are_refitted():
    model = normalised_net()
    outcome = PruneChannels(ratio=0.25).run(model, Context())
    assert not outcome.changes
    why = next(refusal.why for refusal in outcome.refusals if refusal.node == "first")
    assert (
        why == "32 channels stay: LayerNormalization 'norm' takes a mean over them, and nothing behind it is refitted"
    )
    dense = Session(model)
    outcome = PruneChannels(ratio=0.25).run(model, Context(calibration=data(model)))
    assert any(change.what.startswith("32 -> 24 channels: first, out") for change in outcome.changes)
    feed = {"x": next(iter(data(normalised_net(), seed=5)))["x"]}
    wanted = dense.run(feed)["y"]
    assert np.square(Session(model).run(feed)["y"] - wanted).mean() < 0.05 * wanted.var()


def test_channels_of_which_the_mean_is_an_output_stay():
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "w"),
        helper.make_node("ReduceMean", ["h"], ["y"], "mean", axes=[-1]),
    ]
    model = build(nodes, {"w": rng.standard_normal((12, 32))}, inputs=(("x", ["N", 12]),))
    outcome = PruneChannels(ratio=0.25).run(model, Context(calibration=data(model)))
    assert not outcome.changes
    assert "ReduceMean 'mean' takes a mean over them" in outcome.refusals[0].why


@pytest.mark.parametrize(("samples", "cut"), [(96, False), (256, True)])
def test_inputs_of_more_classes_than_rows_that_were_seen_stay(samples, cut):
    rng = np.random.default_rng(0)
    weights = {
        "a": rng.standard_normal((8, 32)),
        "b": rng.standard_normal((32, 32)),
        "c": rng.standard_normal((32, 200)),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], "a"),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "b"], ["k"], "b"),
        helper.make_node("Relu", ["k"], ["s"]),
        helper.make_node("MatMul", ["s", "c"], ["y"], "c"),
    ]
    model = build(nodes, weights, inputs=(("x", ["N", 8]),))
    outcome = PruneChannels(ratio=0.5).run(model, Context(calibration=data(model, samples)))
    why = {refusal.node: refusal.why for refusal in outcome.refusals}
    told = "32 channels stay: 'c' tells 200 outputs from them, and calibration shows it 96 rows"
    assert (why.get("b") == told) is not cut
    assert any(change.node == "a" for change in outcome.changes) or cut


def test_what_the_last_layers_read_is_known():
    rng = np.random.default_rng(0)
    sizes = {"a": (8, 16), "b": (16, 24), "c": (24, 4), "d": (24, 3)}
    products = [("x", "a", "h"), ("r", "b", "k"), ("s", "c", "y"), ("s", "d", "z")]
    nodes = [helper.make_node("MatMul", [x, w], [y], w) for x, w, y in products]
    nodes[1:1] = [helper.make_node("Relu", ["h"], ["r"])]
    nodes[3:3] = [helper.make_node("Relu", ["k"], ["s"])]
    weights = {name: rng.standard_normal(size) for name, size in sizes.items()}
    model = build(nodes, weights, inputs=(("x", ["N", 8]),), outputs=("y", "z"))
    coupling = couple(model)
    assert [coupling.groups[index].makers[0].name for index in _last(model, coupling)] == ["b"]
