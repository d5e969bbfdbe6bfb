"""Kernels for convolutions, products and reductions: the numbers of ONNX Runtime, for odd sizes and open axes."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxslim.targets import compile as compile_model

RNG = np.random.default_rng(0)


def _array(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


class Net:
    """A model in the making; each call adds a node and returns the name of its output."""

    def __init__(self):
        self.nodes, self.weights, self.inputs, self.outputs = [], [], [], []

    def input(self, *shape):
        name = f"x{len(self.inputs)}"
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def constant(self, array):
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def add(self, op, *names, **attributes):
        output = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(names), [output], **attributes))
        return output

    def conv(self, source, weight, **attributes):
        return self.add("Conv", source, self.constant(weight), self.constant(_array(weight.shape[0])), **attributes)

    def model(self, *outputs):
        values = [helper.make_empty_tensor_value_info(name) for name in outputs]
        graph = helper.make_graph(self.nodes, "net", self.inputs, values, self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        return onnx.shape_inference.infer_shapes(model)


def _check(model, *feeds, limit=2e-5):
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    bundle = compile_model(model)
    names = [value.name for value in model.graph.input]
    for arrays in feeds:
        feed = dict(zip(names, arrays, strict=True))
        found = bundle.run(feed)
        for output, wanted in zip(session.get_outputs(), session.run(None, feed), strict=True):
            got = found[output.name]
            assert got.shape == wanted.shape, output.name
            if wanted.size:
                assert np.abs(got - wanted).max() <= limit * np.abs(wanted).max(), output.name


CONVOLUTIONS = [
    # inputs, outputs, kernel, stride, pads, dilation, groups
    (3, 17, (3, 3), 1, (1, 1, 1, 1), 1, 1),
    (17, 95, (3, 3), 2, (1, 0, 1, 2), 1, 1),
    (95, 3, (1, 1), 1, (0, 0, 0, 0), 1, 1),
    (8, 24, (5, 5), 1, (2, 2, 2, 2), 1, 1),
    (3, 16, (7, 7), 2, (3, 3, 3, 3), 1, 1),
    (6, 10, (3, 3), 1, (2, 2, 2, 2), 2, 2),
    (12, 24, (3, 1), 1, (1, 0, 1, 0), 1, 4),
    (17, 17, (3, 3), 1, (1, 1, 1, 1), 1, 17),
    (95, 95, (5, 5), 2, (2, 2, 2, 2), 1, 95),
    (24, 24, (3, 3), 1, (2, 2, 2, 2), 2, 24),
    (6, 12, (3, 3), 1, (1, 1, 1, 1), 1, 6),
    (16, 8, (1, 1), 2, (0, 0, 0, 0), 1, 1),
]


@pytest.mark.parametrize("shape", [(1, 7, 7), (2, 13, 9), (1, 1, 1)], ids=str)
def test_convolutions_of_fixed_sizes(shape):
    batch, height, width = shape
    net, outputs, arrays = Net(), [], []
    for inputs, channels, kernel, stride, pads, dilation, groups in CONVOLUTIONS:
        reach = [(size - 1) * dilation + 1 for size in kernel]
        if height + pads[0] + pads[2] < reach[0] or width + pads[1] + pads[3] < reach[1]:
            continue
        source = net.input(batch, inputs, height, width)
        arrays.append(_array(batch, inputs, height, width))
        attributes = {"strides": [stride] * 2, "pads": pads, "dilations": [dilation] * 2, "group": groups}
        made = net.conv(source, _array(channels, inputs // groups, *kernel), **attributes)
        outputs.append(net.add("Relu", made))
    _check(net.model(*outputs), arrays)


def test_convolutions_of_open_sizes():
    net, outputs, channels_in = Net(), [], []
    for number, (inputs, channels, kernel, stride, pads, dilation, groups) in enumerate(CONVOLUTIONS[:9:2]):
        source = net.input(f"n{number}", inputs, f"h{number}", f"w{number}")
        channels_in.append(inputs)
        attributes = {"strides": [stride] * 2, "pads": pads, "dilations": [dilation] * 2, "group": groups}
        outputs.append(net.conv(source, _array(channels, inputs // groups, *kernel), **attributes))
    feeds = [[_array(*size[:1], inputs, *size[1:]) for inputs in channels_in] for size in [(1, 7, 7), (3, 9, 20)]]
    _check(net.model(*outputs), *feeds)


@pytest.mark.parametrize("size", [(1, 14, 14), (2, 13, 17)], ids=str)
def test_small_windows_filtered_minimally(size):
    batch, height, width = size
    net = Net()
    source = net.input(batch, 16, height, width)
    first = net.add("Relu", net.conv(source, _array(33, 16, 3, 3) / 12, pads=[1] * 4))
    second = net.add("Add", net.conv(first, _array(33, 33, 3, 3) / 17, pads=[1] * 4), first)
    third = net.conv(second, _array(16, 33, 3, 3) / 17)
    _check(net.model(third), [_array(batch, 16, height, width)])


@pytest.mark.parametrize("rank", [1, 2])
def test_transposed_convolutions(rank):
    net, outputs, arrays = Net(), [], []
    for kernel, stride, pad, extra in [
        (2, 2, 0, 0),
        (3, 2, 1, 1),
        (4, 2, 1, 0),
        (3, 1, 1, 0),
        (2, 3, 0, 0),
        (5, 2, 2, 1),
    ]:
        shape = (2, 3, 5, 4)[: rank + 2]
        attributes = {"strides": [stride] * rank, "pads": [pad] * 2 * rank, "output_padding": [extra] * rank}
        weight = net.constant(_array(3, 5, *[kernel] * rank))
        outputs.append(net.add("Relu", net.add("ConvTranspose", net.input(*shape), weight, **attributes)))
        arrays.append(_array(*shape))
    _check(net.model(*outputs), arrays)


def test_long_rows_and_columns():
    net = Net()
    rows = net.conv(net.input(2, 5, 1000), _array(20, 5, 5), pads=[2, 2], strides=[2])
    columns = net.conv(net.input(1, 16, 300, 1), _array(24, 16, 5, 1))
    _check(net.model(rows, columns), [_array(2, 5, 1000), _array(1, 16, 300, 1)])


@pytest.mark.parametrize("rows", [1, 5, 130])
def test_products(rows):
    net = Net()
    source = net.input(rows, 95)
    gemm = net.add("Gemm", source, net.constant(_array(33, 95)), net.constant(_array(33)), transB=1)
    by_constant = net.add("MatMul", net.input(2, rows, 17), net.constant(_array(17, 130)))
    left, right = net.input(2, 3, rows, 17), net.input(1, 3, 17, 21)
    both = net.add("MatMul", left, right)
    turned = net.add("MatMul", left, net.add("Transpose", net.input(2, 3, 40, 17), perm=[0, 1, 3, 2]))
    shapes = [(rows, 95), (2, rows, 17), (2, 3, rows, 17), (1, 3, 17, 21), (2, 3, 40, 17)]
    _check(net.model(gemm, by_constant, both, turned), [_array(*shape) for shape in shapes])


def test_attention_of_open_length():
    net = Net()
    source = net.input("n", "s", 48)
    heads = net.constant(np.int64([0, 0, 4, 12]))

    def projected(perm):
        made = net.add("MatMul", source, net.constant(_array(48, 48) / 7))
        return net.add("Transpose", net.add("Reshape", made, heads), perm=perm)

    scores = net.add("MatMul", projected([0, 2, 1, 3]), projected([0, 2, 3, 1]))
    weights = net.add("Softmax", scores, axis=-1)
    made = net.add("MatMul", weights, projected([0, 2, 1, 3]))
    _check(net.model(net.add("Transpose", made, perm=[0, 2, 1, 3])), [_array(1, 5, 48)], [_array(3, 70, 48)])


def test_what_follows_a_convolution():
    net = Net()
    source = net.input(1, 16, 9, 9)
    made = net.conv(source, _array(24, 16, 1, 1) / 4)
    depthwise = net.conv(made, _array(24, 1, 3, 3), pads=[1] * 4, group=24)
    swish = net.add("Mul", depthwise, net.add("Sigmoid", depthwise))
    hard = net.add("HardSwish", made)
    clipped = net.add("Clip", made, net.constant(np.float32(0)), net.constant(np.float32(6)))
    gelu = net.add("Erf", net.add("Mul", made, net.constant(np.float32(0.7071))))
    # A gate of channels is spread over all pixels: it must not be fused into the product that makes it.
    pooled = net.add("GlobalAveragePool", swish)
    gate = net.add("HardSigmoid", net.conv(net.add("Relu", net.conv(pooled, _array(8, 24, 1, 1))), _array(24, 8, 1, 1)))
    gated = net.add("Add", net.add("Mul", swish, gate), hard)
    _check(net.model(gated, clipped, gelu, made), [_array(1, 16, 9, 9)])


def test_layouts_between_convolutions():
    net = Net()
    source = net.input(2, 8, 12, 10)
    x = net.add("Relu", net.conv(source, _array(16, 8, 3, 3) / 8, pads=[1] * 4))
    scaled = net.add("Add", net.add("Mul", x, net.constant(_array(16, 1, 1))), net.constant(_array(10)))
    pooled = net.add("MaxPool", scaled, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 0, 0])
    mean = net.add("ReduceMean", scaled, axes=[2, 3], keepdims=0)
    padded = net.add("Pad", pooled, net.constant(np.int64([0, 0, 0, 1, 0, 0, 2, 0])))
    joined = net.add("Concat", padded, net.add("Neg", padded), axis=1)
    shuffled = net.add("Reshape", joined, net.constant(np.int64([2, 2, 16, 8, 6])))
    shuffled = net.add(
        "Reshape", net.add("Transpose", shuffled, perm=[0, 2, 1, 3, 4]), net.constant(np.int64([2, 32, 8, 6]))
    )
    y = net.conv(shuffled, _array(8, 32, 1, 1) / 6)
    last = net.add("Transpose", y, perm=[0, 2, 3, 1])
    normed = net.add("LayerNormalization", last, net.constant(_array(8)), net.constant(_array(8)), axis=-1)
    back = net.add("Transpose", normed, perm=[0, 3, 1, 2])
    softmax = net.add("Softmax", net.conv(back, _array(8, 8, 1, 1)), axis=1)
    flat = net.add("Flatten", softmax)
    sliced = net.add("Slice", y, *(net.constant(np.int64([v])) for v in (1, 7, 1)))
    _check(net.model(flat, mean, sliced, last), [_array(2, 8, 12, 10)])


def test_reductions_over_rows():
    net = Net()
    source = net.input(3, 7, 197)
    wide = net.input(1, 5, 6, 40)
    softmax = net.add("Softmax", source, axis=-1)
    norm = net.add("LayerNormalization", source, net.constant(_array(197)), net.constant(_array(197)), axis=-1)
    largest = net.add("ReduceMax", net.add("Mul", source, source), axes=[2], keepdims=0)
    middle = net.add("ReduceSum", source, net.constant(np.int64([1])))
    pooled = net.add("GlobalAveragePool", net.add("Transpose", wide, perm=[0, 3, 1, 2]))
    instance = net.add("InstanceNormalization", source, net.constant(_array(7)), net.constant(_array(7)))
    outputs = (softmax, norm, largest, middle, pooled, instance)
    _check(net.model(*outputs), [_array(3, 7, 197), _array(1, 5, 6, 40)])
