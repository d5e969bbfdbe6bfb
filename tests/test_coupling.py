"""Coupled channels: what is cut together, what is frozen and why, and that surgery removes and changes nothing else."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import onnxslim
from onnxslim.graph.coupling import Coupling, couple, cut
from onnxslim.graph.walk import hoist_constants
from onnxslim.runtime import Session


class Net:
    """A few lines of ONNX with random weights."""

    def __init__(self, *inputs: tuple[str, list], opset: int = 17, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs]
        self.opset, self.nodes, self.weights = opset, [], {}

    def const(self, value, name: str | None = None) -> str:
        name = name or f"c{len(self.weights)}"
        self.weights[name] = np.asarray(value)
        return name

    def w(self, *shape: int, name: str | None = None) -> str:
        scale = 1 / np.sqrt(max(1, np.prod(shape[1:])))
        return self.const((self.rng.standard_normal(shape) * scale).astype(np.float32), name)

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attrs):
        made = [f"t{len(self.nodes)}_{k}" for k in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, made, name=f"{kind.lower()}{len(self.nodes)}", **attrs))
        return made[0] if outputs == 1 else made

    def conv(self, x: str, cin: int, cout: int, k: int = 3, bias: bool = True, **attrs) -> str:
        group = attrs.get("group", 1)
        extra = [self.w(cout)] if bias else []
        attrs.setdefault("pads", [k // 2] * 4)
        return self.op("Conv", x, self.w(cout, cin // group, k, k), *extra, **attrs)

    def bn(self, x: str, c: int) -> str:
        var = self.const(self.rng.uniform(0.5, 2, c).astype(np.float32))
        return self.op("BatchNormalization", x, self.w(c), self.w(c), self.w(c), var)

    def head(self, x: str, c: int, classes: int = 5) -> str:
        pooled = self.op("Flatten", self.op("GlobalAveragePool", x))
        return self.op("Gemm", pooled, self.w(classes, c), self.w(classes), transB=1)

    def proto(self, *outputs: str) -> onnx.ModelProto:
        outs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        inits = [numpy_helper.from_array(v, n) for n, v in self.weights.items()]
        graph = helper.make_graph(self.nodes, "net", self.inputs, outs, inits)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)

    def model(self, *outputs: str) -> onnxslim.Model:
        return onnxslim.load(self.proto(*outputs))


IMAGE = ("x", ["N", 3, 8, 8])


def feeds(model: onnxslim.Model, batch: int, seed: int = 1, other: int = 6) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    made = {}
    for tensor in model.graph.inputs:
        sizes = [d if isinstance(d, int) else (batch, other)[min(axis, 1)] for axis, d in enumerate(tensor.shape)]
        made[tensor.name] = rng.standard_normal(sizes).astype(np.float32)
    return made


def silence(model: onnxslim.Model, coupling: Coupling, gone: dict, *, makers_only: bool) -> None:
    """Zero what the cut removes: slices of all layers, or all that makes the channels but nothing that reads them."""
    made = {use.axis for use in coupling.uses if use.makes}
    read = {use.axis for use in coupling.uses if not use.makes}
    for axis, mask in gone.items():
        place = coupling.places[axis]
        if not isinstance(place.tensor, gs.Constant) or place.tensor.dtype != np.float32:
            continue
        if (axis in read and makers_only) or (not makers_only and axis not in made | read):
            continue
        index = [slice(None)] * len(place.tensor.shape)
        index[place.axis] = mask
        values = np.array(place.tensor.values)
        values[tuple(index)] = 0
        users = [place.user] if place.user is not None else list(place.tensor.outputs)
        fresh = gs.Constant(model.fresh_name(place.tensor.name), values)
        if place.user is None:
            place.tensor.values = values
            continue
        for user in users:
            for slot, tensor in enumerate(user.inputs):
                if tensor is place.tensor:
                    user.inputs[slot] = fresh


def check_surgery(model: onnxslim.Model, seed: int = 0, *, makers_only: bool = False) -> Coupling:
    """Cut a random part of every free group, and compare with the dense model in which the same is zero."""
    hoist_constants(model)
    dense = model.copy()
    coupling, twin = couple(model), couple(dense)
    rng = np.random.default_rng(seed)
    removed = {
        k: rng.permutation(g.channels)[: int(rng.integers(1, g.channels))]
        for k, g in enumerate(coupling.groups)
        if g.frozen is None and g.spanned is None and g.channels > 1
    }
    if not removed:
        return coupling
    silence(dense, twin, twin.plan(removed).gone, makers_only=makers_only)
    cut(model, coupling, removed)
    proto = model.to_proto()
    assert not [v for v in proto.graph.value_info if v.type.tensor_type.HasField("shape")]
    if all(node.op != "GroupNormalization" for node in model.graph.nodes):  # of which ONNX infers nothing
        onnx.checker.check_model(onnx.shape_inference.infer_shapes(proto, strict_mode=True))
    pruned, masked = Session(model), Session(dense)
    for batch in (1, 3):
        feed = feeds(model, batch)
        ours, theirs = pruned.run(feed), masked.run(feed)
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, atol=1e-5, rtol=1e-4)
    return coupling


def free(coupling: Coupling) -> list[int]:
    return [group.channels for group in coupling.groups if group.frozen is None]


def reasons(coupling: Coupling) -> str:
    return " | ".join(group.frozen or "" for group in coupling.groups)


# ------------------------------------------------------------------------------------------------- graphs of one kind


def plain() -> Net:
    net = Net(IMAGE)
    y = net.op("Relu", net.bn(net.conv("x", 3, 16, bias=False), 16))
    y = net.op("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2])
    y = net.op("LeakyRelu", net.conv(y, 16, 24), alpha=0.1)
    net.out = net.head(y, 24)
    return net


def residual() -> Net:
    net = Net(IMAGE)
    y = net.op("Relu", net.conv("x", 3, 16))
    for _ in range(2):
        z = net.op("Relu", net.bn(net.conv(y, 16, 12), 12))
        z = net.bn(net.conv(z, 12, 16, bias=False), 16)
        y = net.op("Relu", net.op("Add", z, y))
    down = net.conv(y, 16, 20, 1, strides=[2, 2])
    y = net.op("Relu", net.op("Add", net.conv(y, 16, 20, strides=[2, 2]), down))
    net.out = net.head(y, 20)
    return net


def mobile() -> Net:
    net = Net(IMAGE)
    six = net.const(np.float32(6)), net.const(np.float32(0))
    y = net.conv("x", 3, 8)
    z = net.op("Clip", net.conv(y, 8, 24, 1), six[1], six[0])
    z = net.op("Clip", net.conv(z, 24, 24, group=24), six[1], six[0])
    y = net.op("Add", y, net.conv(z, 24, 8, 1))
    net.out = net.head(net.op("Relu", y), 8)
    return net


def depth_multiplier() -> Net:
    net = Net(IMAGE)
    y = net.op("Relu", net.conv("x", 3, 8))
    y = net.op("Relu", net.conv(y, 8, 16, group=8))
    net.out = net.head(net.conv(y, 16, 10), 10)
    return net


def grouped() -> Net:
    net = Net(IMAGE)
    y = net.op("Relu", net.conv("x", 3, 16))
    y = net.op("Relu", net.conv(y, 16, 24, group=4))
    net.out = net.head(net.conv(y, 24, 8), 8)
    return net


def concat() -> Net:
    net = Net(IMAGE)
    a = net.op("Relu", net.conv("x", 3, 8))
    b = net.op("Relu", net.conv("x", 3, 12))
    both = net.op("Concat", a, b, a, axis=1)
    y = net.op("Add", net.op("Relu", net.bn(both, 28)), net.conv(both, 28, 28))
    net.out = net.head(y, 28)
    return net


def flatten() -> Net:
    net = Net(IMAGE)
    y = net.op("Relu", net.conv("x", 3, 8, strides=[2, 2]))
    y = net.op("Relu", net.op("Gemm", net.op("Flatten", y), net.w(20, 128), net.w(20), transB=1))
    net.out = net.op("Gemm", y, net.w(20, 5), transB=0, alpha=0.5)
    return net


def ffn() -> Net:
    net = Net(("x", ["N", "T", 16]))
    y = net.op("Add", net.op("MatMul", "x", net.w(16, 32)), net.w(32))
    half = net.op("Mul", y, net.const(np.float32(0.5)))
    y = net.op("Mul", half, net.op("Erf", y))
    y = net.op("Add", net.w(16), net.op("MatMul", y, net.w(32, 16)))
    net.out = net.op("Add", "x", y)
    return net


def gated() -> Net:
    net = Net(("x", ["N", "T", 16]))
    up, gate = net.op("Split", net.op("MatMul", "x", net.w(16, 48)), axis=-1, outputs=2)
    y = net.op("Mul", net.op("Sigmoid", gate), up)
    net.out = net.op("MatMul", y, net.w(24, 16))
    return net


def attention() -> Net:
    """Four heads of eight, reshaped by a shape that is put together at run time."""
    net = Net(("x", ["N", "T", 32]))
    axes = net.const(np.array([0]))
    size = net.op("Shape", "x")
    n = net.op("Unsqueeze", net.op("Gather", size, net.const(np.array(0)), axis=0), axes)
    t = net.op("Unsqueeze", net.op("Gather", size, net.const(np.array(1)), axis=0), axes)
    heads = net.op("Concat", n, t, net.const(np.array([4])), net.const(np.array([8])), axis=0)

    def project(perm: list[int]) -> str:
        y = net.op("Add", net.op("MatMul", "x", net.w(32, 32)), net.w(32))
        return net.op("Transpose", net.op("Reshape", y, heads), perm=perm)

    q, k, v = project([0, 2, 1, 3]), project([0, 2, 3, 1]), project([0, 2, 1, 3])
    scores = net.op("Softmax", net.op("Div", net.op("MatMul", q, k), net.const(np.float32(8**0.5))), axis=-1)
    y = net.op("Transpose", net.op("MatMul", scores, v), perm=[0, 2, 1, 3])
    y = net.op("Reshape", y, net.op("Concat", n, t, net.const(np.array([32])), axis=0))
    net.out = net.op("MatMul", y, net.w(32, 32))
    return net


def decoder() -> Net:
    """A Gemm whose output becomes a feature map, transposed convolutions, resizing and padding."""
    net = Net(("x", ["N", 10]))
    y = net.op("Gemm", "x", net.w(10, 16 * 9), net.w(16 * 9))
    y = net.op("Relu", net.op("Reshape", y, net.const(np.array([-1, 16, 3, 3]))))
    y = net.op("ConvTranspose", y, net.w(16, 12, 2, 2), net.w(12), strides=[2, 2])
    y = net.op("PRelu", y, net.w(12, 1, 1))
    y = net.op("InstanceNormalization", y, net.w(12), net.w(12))
    scales = net.const(np.array([1, 1, 2, 2], np.float32))
    y = net.op("Resize", y, "", scales, mode="nearest")
    y = net.op("Pad", y, net.const(np.array([0, 0, 1, 1, 0, 0, 1, 1])))
    y = net.op("ConvTranspose", y, net.w(12, 1, 3, 3), group=12)
    net.out = net.conv(y, 12, 3)
    return net


def channels_last() -> Net:
    net = Net(IMAGE)
    y = net.op("Transpose", net.op("Relu", net.conv("x", 3, 12)), perm=[0, 2, 3, 1])
    y = net.op("Add", net.op("MatMul", y, net.w(12, 20)), net.w(20))
    y = net.op("Mul", y, net.op("Sigmoid", net.op("MatMul", y, net.w(20, 20))))
    y = net.op("ReduceMean", y, axes=[1, 2], keepdims=0)
    net.out = net.op("MatMul", y, net.w(20, 4))
    return net


def pieces() -> Net:
    """Slices of one axis, one of them past its end, and a gather that reorders channels."""
    net = Net(IMAGE)
    y = net.op("Relu", net.conv("x", 3, 24))

    def part(start: int, end: int) -> str:
        return net.op("Slice", y, *(net.const(np.array([n])) for n in (start, end, 1)))

    a, b = net.conv(part(0, 10), 10, 8), net.conv(part(10, 10_000), 14, 8)
    shuffled = net.op("Gather", net.op("Add", a, b), net.const(np.array([3, 1, 0, 2, 7, 6, 5, 4])), axis=1)
    net.out = net.head(shuffled, 8)
    return net


def squeeze_excite() -> Net:
    net = Net(IMAGE)
    y = net.op("HardSwish", net.conv("x", 3, 16))
    s = net.op("GlobalAveragePool", y)
    s = net.op("HardSigmoid", net.conv(net.op("Relu", net.conv(s, 16, 8, 1)), 8, 16, 1))
    y = net.op("Mul", y, s)
    y = net.op("Reshape", net.op("GlobalMaxPool", y), net.const(np.array([0, 16])))
    net.out = net.op("Gemm", y, net.w(16, 4))
    return net


def lstm() -> Net:
    """A convolution over time, two layers of which the first runs both ways, with peepholes and constant states."""
    net = Net(("x", ["N", 6, 10]))
    y = net.op("Relu", net.op("Conv", "x", net.w(12, 6, 3), net.w(12), pads=[1, 1]))
    y = net.op("Transpose", y, perm=[2, 0, 1])
    weights = net.w(2, 32, 12), net.w(2, 32, 8), net.w(2, 64)
    y = net.op("LSTM", y, *weights, "", "", "", net.w(2, 24), hidden_size=8, direction="bidirectional")
    y = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3]), net.const(np.array([0, 0, -1])))
    weights = net.w(1, 40, 16), net.w(1, 40, 10), net.w(1, 80)
    spelled_out = ["Sigmoid", "Tanh", "Tanh"]
    _, last, cell = net.op("LSTM", y, *weights, outputs=3, hidden_size=10, activations=spelled_out)
    both = net.op("Squeeze", net.op("Concat", last, cell, axis=2), net.const(np.array([0])))
    net.out = net.op("Gemm", both, net.w(5, 20), net.w(5), transB=1)
    return net


def gru() -> Net:
    net = Net(("x", [7, "N", 6]))
    y = net.op("Relu", net.op("MatMul", "x", net.w(6, 12)))
    weights = net.w(1, 30, 12), net.w(1, 30, 10), net.w(1, 60)
    y, last = net.op("GRU", y, *weights, outputs=2, hidden_size=10, linear_before_reset=1)
    axis = net.const(np.array([1]))
    y = net.op("Add", net.op("Squeeze", y, axis), last)  # the last state on every step
    y = net.op("RNN", y, net.w(1, 9, 10), net.w(1, 9, 9), hidden_size=9)
    net.out = net.op("MatMul", net.op("Squeeze", y, axis), net.w(9, 4))
    return net


def packed_attention() -> Net:
    """Query, key and value from one product, taken apart by position: how vision transformers are exported."""
    net = Net(("x", ["N", 6, 16]))
    y = net.op("Add", net.op("MatMul", "x", net.w(16, 3 * 4 * 8)), net.w(3 * 4 * 8))
    y = net.op("Reshape", y, net.const(np.array([0, 6, 3, 4, 8])))
    y = net.op("Transpose", y, perm=[2, 0, 3, 1, 4])
    query, key = (net.op("Gather", y, net.const(np.array(n)), axis=0) for n in range(2))
    ends = (net.const(np.array([n])) for n in (2, 3, 0))
    value = net.op("Squeeze", net.op("Slice", y, *ends), net.const(np.array([0])))
    scores = net.op("MatMul", query, net.op("Transpose", key, perm=[0, 1, 3, 2]))
    y = net.op("MatMul", net.op("Softmax", scores, axis=-1), value)
    y = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3]), net.const(np.array([0, 6, 32])))
    net.out = net.op("MatMul", y, net.w(32, 16))
    return net


def masked_attention() -> Net:
    """A mask that is broadcast to a shape put together at run time, and heads merged by a shape that ends in -1."""
    net = Net(("x", ["N", "L", 16]), ("mask", ["N", "L"]))
    lengths = net.op("Shape", "x")
    batch, length = (net.op("Slice", lengths, net.const(np.array([n])), net.const(np.array([n + 1]))) for n in (0, 1))
    rest = net.const(np.array([-1]))
    wanted = net.op("Concat", batch, rest, length, length, axis=0)
    ones = net.const(np.ones(4, np.int64))
    wanted = net.op("Where", net.const(np.array([False, True, False, False])), ones, wanted)
    mask = net.op("Unsqueeze", "mask", net.const(np.array([1, 2])))
    ones_of_batch = net.op("ConstantOfShape", batch, value=numpy_helper.from_array(np.ones(1, np.float32)))
    rows = net.op("NonZero", ones_of_batch)  # indices whose number inference cannot tell
    mask = net.op("Gather", mask, net.op("Squeeze", rows, net.const(np.array([0]))), axis=0)
    mask = net.op("Expand", mask, wanted)
    heads = net.op("Concat", batch, length, net.const(np.array([4, 8])), axis=0)
    query, key, value = (
        net.op("Transpose", net.op("Reshape", net.op("MatMul", "x", net.w(16, 32)), heads), perm=[0, 2, 1, 3])
        for _ in range(3)
    )
    scores = net.op("Add", net.op("MatMul", query, net.op("Transpose", key, perm=[0, 1, 3, 2])), mask)
    scores = net.op("Add", scores, net.op("Expand", net.w(1, 4, 1, 1), wanted))  # as positions are told by T5 and MPNet
    y = net.op("Transpose", net.op("MatMul", net.op("Softmax", scores, axis=-1), value), perm=[0, 2, 1, 3])
    y = net.op("Reshape", y, net.op("Concat", batch, length, rest, axis=0))
    net.out = net.op("MatMul", y, net.w(32, 16))
    return net


def attention_operator(shared: int = 1, merged: bool = True) -> Net:
    """The operator of opset 23, after a rotary embedding; ``shared`` heads of the query to one of key and value."""
    net = Net(("x", ["N", 6, 16]), opset=23)
    angles = [net.w(6, 4) for _ in range(2)]
    few, many = 4, 4 * shared
    projected = [net.op("MatMul", "x", net.w(16, 8 * heads)) for heads in (many, few, few)]
    turned = []
    for y, heads in zip(projected, (many, few, few), strict=True):
        attrs = {"num_heads": heads} if merged else {}
        if not merged:
            y = net.op("Reshape", y, net.const(np.array([0, 6, heads, 8])))
            y = net.op("Transpose", y, perm=[0, 2, 1, 3])
        if len(turned) < 2:
            indices = net.op("Expand", net.const(np.arange(6)[None]), net.op("Shape", "x", end=2))
            y = net.op("RotaryEmbedding", y, *angles, indices, **attrs)
        turned.append(y)
    attrs = {"q_num_heads": many, "kv_num_heads": few} if merged else {}
    bias = net.w(1, many, 6, 6)
    y = net.op("Attention", *turned, bias, **attrs)
    if not merged:
        y = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3]), net.const(np.array([0, 6, -1])))
    net.out = net.op("MatMul", y, net.w(8 * many, 16))
    return net


def attention_operator_of_heads() -> Net:
    return attention_operator(merged=False)


def grouped_query_attention_operator() -> Net:
    return attention_operator(shared=2)


def grouped_query_attention_operator_of_heads() -> Net:
    return attention_operator(shared=2, merged=False)


def selective_kernel() -> Net:
    """Two branches weighed by a softmax across them, whose weights one layer makes for both."""
    net = Net(IMAGE)
    y = net.op("Relu", net.conv("x", 3, 12))
    axis = net.const(np.array([1]))
    branches = [net.op("Unsqueeze", net.op("Relu", net.conv(y, 12, 16)), axis) for _ in range(2)]
    both = net.op("Concat", *branches, axis=1)
    s = net.conv(net.op("GlobalAveragePool", y), 12, 32, 1)
    s = net.op("Softmax", net.op("Reshape", s, net.const(np.array([0, 2, 16, 1, 1]))), axis=1)
    net.out = net.head(net.op("ReduceSum", net.op("Mul", both, s), axis, keepdims=0), 16)
    return net


def pixel_shuffle(mode: str = "CRD") -> Net:
    net = Net(IMAGE)
    y = net.op("SpaceToDepth", net.op("Relu", net.conv("x", 3, 6)), blocksize=2)
    y = net.op("Relu", net.conv(y, 24, 40))
    y = net.op("DepthToSpace", y, blocksize=2, mode=mode)
    net.out = net.conv(y, 10, 3)
    return net


def pixel_shuffle_by_depth() -> Net:
    return pixel_shuffle("DCR")


def patches() -> Net:
    """A map cut into rows of patches and put together again: channels and rows become one axis in between."""
    net = Net(("x", [1, 3, 8, 8]))
    y = net.op("Relu", net.conv("x", 3, 12))
    y = net.op("Reshape", y, net.const(np.array([12 * 4, 2, 4, 2])))
    y = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3]), net.const(np.array([1, 12, 16, 4])))
    y = net.op("MatMul", net.op("Transpose", y, perm=[0, 3, 2, 1]), net.w(12, 20))
    net.out = net.op("MatMul", y, net.w(20, 4))
    return net


def sampled() -> Net:
    """Channels that are sampled elsewhere, repeated and added up along other axes."""
    net = Net(("x", ["N", 3, 8, 8]), ("grid", ["N", 5, 5, 2]))
    y = net.op("GridSample", net.op("Relu", net.conv("x", 3, 16)), "grid")
    y = net.op("Tile", y, net.const(np.array([1, 1, 2, 1])))
    net.out = net.head(net.op("CumSum", y, net.const(np.array(2))), 16)
    return net


def group_norm(opset: int = 21) -> Net:
    """Groups of a norm go whole: the parameters are one of each channel, one of each group before opset 21."""
    net = Net(IMAGE, opset=opset)
    y = net.conv("x", 3, 16)
    size = 16 if opset > 20 else 4
    y = net.op("Relu", net.op("GroupNormalization", y, net.w(size), net.w(size), num_groups=4))
    net.out = net.head(net.conv(y, 16, 12), 12)
    return net


def group_norm_of_older_opsets() -> Net:
    return group_norm(18)


KINDS = {
    f.__name__: f
    for f in (
        plain, residual, mobile, depth_multiplier, grouped, concat, flatten, ffn, gated, attention, decoder,
        channels_last, pieces, squeeze_excite, lstm, gru, packed_attention, masked_attention, attention_operator,
        attention_operator_of_heads, grouped_query_attention_operator, grouped_query_attention_operator_of_heads,
        selective_kernel, pixel_shuffle, pixel_shuffle_by_depth, patches, sampled, group_norm,
        group_norm_of_older_opsets,
    )
}  # fmt: skip

WIDTHS = {
    "plain": [16, 24],
    "residual": [16, 12, 12, 20],
    "mobile": [8, 24],
    "depth_multiplier": [8, 10],
    "grouped": [4, 6, 8],
    "flatten": [8, 20],
    "ffn": [32],
    "gated": [24],
    "decoder": [16, 12],
    "channels_last": [12, 20],
    "pieces": [10, 14, 8],
    "squeeze_excite": [16, 8],
    "lstm": [12, 8, 10],
    "gru": [12, 10, 9],
    "packed_attention": [4],
    "masked_attention": [4],
    "attention_operator": [4],
    "attention_operator_of_heads": [4],
    "grouped_query_attention_operator": [4],
    "grouped_query_attention_operator_of_heads": [4],
    "selective_kernel": [12, 16],
    "pixel_shuffle": [6, 10],
    "pixel_shuffle_by_depth": [6, 10],
    "patches": [12, 20],
    "sampled": [16],
    "group_norm": [4, 12],
    "group_norm_of_older_opsets": [4, 12],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_cut_model_equals_the_dense_one_with_the_same_channels_silent(kind, seed):
    net = KINDS[kind]()
    coupling = check_surgery(net.model(net.out), seed)
    assert sorted(free(coupling)) == sorted(WIDTHS.get(kind, free(coupling)))
    assert free(coupling), reasons(coupling)


@pytest.mark.parametrize(
    "kind", ["plain", "residual", "mobile", "flatten", "ffn", "grouped", "depth_multiplier", "lstm", "gru"]
)
def test_silent_makers_alone_are_the_same_as_a_cut(kind):
    """Channels that are zero, bias and BatchNorm included, can go without a change in what reads them."""
    net = KINDS[kind]()
    check_surgery(net.model(net.out), 2, makers_only=True)


def test_concat_keeps_its_parts_apart():
    net = concat()
    coupling = couple(net.model(net.out))
    # a (used twice) and b, each with its share of the residual sum behind the concat.
    assert sorted(free(coupling)) == [8, 12]
    twice = next(g for g in coupling.groups if g.channels == 8)
    assert max(member.positions.shape[1] for member in twice.members) == 2


def test_heads_of_attention_go_whole():
    net = attention()
    coupling = couple(net.model(net.out))
    assert free(coupling) == [4]
    group = next(g for g in coupling.groups if g.frozen is None)
    assert sorted(member.positions.shape[1] for member in group.weights) == [8, 8, 8, 8]


# ----------------------------------------------------------------------------------------- what a norm takes a mean of


def normalised(norm: str, kept: np.ndarray, axis: int = -1) -> Net:
    """Two projections added up, a norm over their channels, and a product: as it is with ``kept`` channels only."""
    net = Net(("x", ["N", 6, 16]), opset=23 if norm == "RMSNormalization" else 17, seed=3)
    weights = [net.rng.standard_normal(size).astype(np.float32) for size in ((16, 24), (16, 24), 24, 24, (24, 5))]
    first, second, scale, bias = (net.const(weight[..., kept]) for weight in weights[:4])
    y = net.op("Add", net.op("MatMul", "x", first), net.op("MatMul", "x", second))
    if norm == "spelled out":
        y = net.op("Sub", y, net.op("ReduceMean", y, axes=[axis]))
        variance = net.op("ReduceMean", net.op("Mul", y, y), axes=[axis])
        y = net.op("Div", y, net.op("Sqrt", net.op("Add", variance, net.const(np.float32(1e-5)))))
        y = net.op("Add", net.op("Mul", y, scale), bias)
    else:
        y = net.op(norm, y, scale, *([bias] if norm == "LayerNormalization" else []), axis=axis)
    net.out = net.op("MatMul", y, net.const(weights[4][kept]))
    return net


@pytest.mark.parametrize("norm", ["LayerNormalization", "RMSNormalization", "spelled out"])
def test_a_norm_over_what_is_left_equals_one_that_was_built_so(norm):
    whole, kept = np.arange(24), np.array([0, 1, 3, 4, 9, 10, 11, 20, 22])
    net = normalised(norm, whole)
    model = net.model(net.out)
    coupling = couple(model)
    (index,) = (k for k, group in enumerate(coupling.groups) if group.frozen is None)
    assert coupling.groups[index].channels == 24
    assert coupling.groups[index].spanned
    cut(model, coupling, {index: np.setdiff1d(whole, kept)})
    narrow = normalised(norm, kept)
    feed = feeds(model, 2)
    wanted = Session(narrow.model(narrow.out)).run(feed)[narrow.out]
    np.testing.assert_allclose(Session(model).run(feed)[net.out], wanted, atol=1e-5, rtol=1e-4)


def test_a_norm_over_several_axes_freezes_them():
    net = normalised("LayerNormalization", np.arange(24), axis=-2)
    scale = next(node.input[1] for node in net.nodes if node.op_type == "LayerNormalization")
    for name in (scale, next(node.input[2] for node in net.nodes if node.op_type == "LayerNormalization")):
        net.weights[name] = np.ones((6, 24), np.float32)
    assert "normalises over it" in frozen_by(net, net.out)


# --------------------------------------------------------------------------------------------------- what is frozen


def frozen_by(net: Net, out: str, *others: str) -> str:
    model = net.model(out, *others)
    coupling = check_surgery(model)
    assert not free(coupling)
    return reasons(coupling)


def test_outputs_and_reduced_axes_stay():
    net = Net(IMAGE)
    assert "graph output" in frozen_by(net, net.conv("x", 3, 16))
    net = Net(IMAGE)
    assert "Softmax 'softmax1' normalises over it" in frozen_by(net, net.op("Softmax", net.conv("x", 3, 16), axis=1))
    net = Net(IMAGE)
    y = net.op("ReduceMax", net.conv("x", 3, 16), axes=[1])
    assert "ReduceMax 'reducemax1' reduces over it" in frozen_by(net, y)


def test_older_softmax_takes_all_axes_from_its_own():
    net = Net(IMAGE, opset=11)
    y = net.op("Softmax", net.conv("x", 3, 16), axis=0)
    assert "normalises over it" in frozen_by(net, y)


def test_unknown_operator_freezes():
    net = Net(IMAGE)
    y = net.op("LpNormalization", net.conv("x", 3, 16), axis=2)
    assert "LpNormalization 'lpnormalization1' is an operator without a channel rule" in frozen_by(net, y)


def test_length_of_an_axis_used_as_a_number_freezes():
    net = Net(IMAGE)
    y = net.conv("x", 3, 16)
    c = net.op("Gather", net.op("Shape", y), net.const(np.array(1)), axis=0)
    y = net.op("Mul", y, net.op("Cast", c, to=TensorProto.FLOAT))
    assert "its length is used by Mul" in frozen_by(net, net.head(y, 16))


def test_quantized_weights_freeze_with_a_reason():
    net = Net(IMAGE)
    w = net.const(np.random.default_rng(0).integers(-9, 9, (16, 3, 3, 3)).astype(np.int8))
    scale, zero = net.const(np.full(16, 0.1, np.float32)), net.const(np.zeros(16, np.int8))
    y = net.op("Conv", "x", net.op("DequantizeLinear", w, scale, zero, axis=0), pads=[1] * 4)
    assert "prune before quantizing" in frozen_by(net, net.head(net.op("Relu", y), 16))


def test_graph_input_added_to_channels_freezes():
    net = Net(IMAGE, ("z", ["N", 16, 8, 8]))
    y = net.op("Add", net.conv("x", 3, 16), "z")
    assert "graph input 'z'" in frozen_by(net, net.head(y, 16))


def test_unknown_channel_count_freezes():
    net = Net(IMAGE, ("z", ["N", "C", 8, 8]))
    y = net.op("Add", net.conv("x", 3, 16), "z")
    assert "unknown length" in frozen_by(net, net.head(y, 16))


def test_subgraph_reading_channels_freezes():
    net = Net(IMAGE)
    y = net.op("Relu", net.conv("x", 3, 16))
    flag = net.const(np.array(True))

    def body(kind: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(f"{kind}_out", TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(kind, [y], [f"{kind}_out"])], kind, [], [out])

    net.nodes.append(
        helper.make_node("If", [flag], ["z"], name="if", then_branch=body("Relu"), else_branch=body("Neg"))
    )
    assert "inside a subgraph" in frozen_by(net, net.head(y, 16), "z")


# --------------------------------------------------------------------------------------------------- shared constants


def test_a_weight_of_two_layers_is_cut_for_both():
    net = Net(IMAGE)
    y = net.op("Relu", net.conv("x", 3, 16))
    shared = net.w(16, 16, 3, 3)
    for _ in range(2):
        y = net.op("Relu", net.op("Conv", y, shared, net.w(16), pads=[1] * 4))
    coupling = check_surgery(net.model(net.head(y, 16)))
    assert free(coupling) == [16]


def test_a_bias_of_two_layers_couples_nothing():
    net = Net(IMAGE)
    bias = net.w(16)
    y = net.op("Relu", net.op("Conv", "x", net.w(16, 3, 3, 3), bias, pads=[1] * 4))
    y = net.op("Relu", net.op("Conv", y, net.w(16, 16, 3, 3), bias, pads=[1] * 4))
    coupling = check_surgery(net.model(net.head(y, 16)))
    assert free(coupling) == [16, 16]


def test_weights_in_constant_nodes():
    net = plain()
    proto = net.proto(net.out)
    nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in proto.graph.initializer]
    del proto.graph.initializer[:]
    for node in reversed(nodes):
        proto.graph.node.insert(0, node)
    assert free(check_surgery(onnxslim.load(proto))) == [16, 24]


def test_cutting_a_frozen_or_whole_group_is_refused():
    net = plain()
    model = net.model(net.out)
    coupling = couple(model)
    with pytest.raises(ValueError, match="no channel would be left"):
        cut(model, coupling, {0: np.arange(16)})
    with pytest.raises(ValueError, match="graph output"):
        cut(model, coupling, {2: np.arange(1)})


def test_every_layer_is_in_a_group_or_has_a_reason():
    net = residual()
    model = net.model(net.out)
    known = {id(node) for group in couple(model).groups for node in group.makers}
    assert known == {id(node) for node in model.graph.nodes if node.op in ("Conv", "Gemm")}


# ------------------------------------------------------------------------------------------------------ random graphs


STEPS = ["conv", "dw", "group", "bn", "act", "add", "mul", "concat", "split", "slice", "se", "shuffle", "pool"]


@st.composite
def random_net(draw) -> Net:
    net = Net(IMAGE, seed=draw(st.integers(0, 99)))
    live = [(net.op("Relu", net.conv("x", 3, 8)), 8)]
    width = st.sampled_from([4, 6, 8])
    for _ in range(draw(st.integers(2, 9))):
        x, c = draw(st.sampled_from(live))
        kind = draw(st.sampled_from(STEPS))
        if kind == "conv":
            out = draw(width)
            live.append((net.conv(x, c, out, draw(st.sampled_from([1, 3]))), out))
        elif kind == "dw":
            live.append((net.conv(x, c, c, group=c), c))
        elif kind == "group" and c % 2 == 0:
            live.append((net.conv(x, c, 8, group=2), 8))
        elif kind == "bn":
            live.append((net.bn(x, c), c))
        elif kind == "act":
            live.append((net.op(draw(st.sampled_from(["Relu", "Sigmoid", "HardSwish"])), x), c))
        elif kind in ("add", "mul"):
            y = draw(st.sampled_from([t for t, n in live if n == c]))
            live.append((net.op(kind.title(), x, y), c))
        elif kind == "concat":
            y, n = draw(st.sampled_from(live))
            if c + n <= 24:
                live.append((net.op("Concat", x, y, axis=1), c + n))
        elif kind == "split" and c % 2 == 0:
            a, b = net.op("Split", x, axis=1, outputs=2)
            live += [(a, c // 2), (b, c // 2)]
        elif kind == "slice" and c > 4:
            live.append((net.op("Slice", x, *(net.const(np.array([n])) for n in (1, c - 1, 1))), c - 2))
        elif kind == "se":
            s = net.op("Sigmoid", net.conv(net.op("GlobalAveragePool", x), c, c, 1))
            live.append((net.op("Mul", x, s), c))
        elif kind == "shuffle":
            live.append((net.op("Gather", x, net.const(net.rng.permutation(c)), axis=1), c))
        elif kind == "pool":
            live.append((net.op("AveragePool", x, kernel_shape=[3, 3], pads=[1] * 4), c))
    x, c = live[-1]
    y, n = draw(st.sampled_from(live))
    if draw(st.booleans()):
        flat = net.op("Flatten", x)
        net.out = net.op("Gemm", flat, net.w(c * 64, 4), net.w(4))
    else:
        net.out = net.op("Add", net.head(x, c, 4), net.head(y, n, 4))
    return net


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(random_net(), st.integers(0, 9))
def test_surgery_on_random_graphs(net, seed):
    check_surgery(net.model(net.out), seed)
