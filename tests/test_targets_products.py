"""Kernels for convolutions, products and reductions: the numbers of ONNX Runtime, for odd sizes and open axes."""

from __future__ import annotations

import numpy as np
import pytest
from compiled_nets import Net, array, check

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
        arrays.append(array(batch, inputs, height, width))
        attributes = {"strides": [stride] * 2, "pads": pads, "dilations": [dilation] * 2, "group": groups}
        made = net.conv(source, array(channels, inputs // groups, *kernel), **attributes)
        outputs.append(net.add("Relu", made))
    check(net.model(*outputs), arrays)


def test_convolutions_of_open_sizes():
    net, outputs, channels_in = Net(), [], []
    for number, (inputs, channels, kernel, stride, pads, dilation, groups) in enumerate(CONVOLUTIONS[:9:2]):
        source = net.input(f"n{number}", inputs, f"h{number}", f"w{number}")
        channels_in.append(inputs)
        attributes = {"strides": [stride] * 2, "pads": pads, "dilations": [dilation] * 2, "group": groups}
        outputs.append(net.conv(source, array(channels, inputs // groups, *kernel), **attributes))
    feeds = [[array(*size[:1], inputs, *size[1:]) for inputs in channels_in] for size in [(1, 7, 7), (3, 9, 20)]]
    check(net.model(*outputs), *feeds)


@pytest.mark.parametrize("size", [(1, 14, 14), (2, 13, 17)], ids=str)
def test_small_windows_filtered_minimally(size):
    batch, height, width = size
    net = Net()
    source = net.input(batch, 16, height, width)
    first = net.add("Relu", net.conv(source, array(33, 16, 3, 3) / 12, pads=[1] * 4))
    second = net.add("Add", net.conv(first, array(33, 33, 3, 3) / 17, pads=[1] * 4), first)
    third = net.conv(second, array(16, 33, 3, 3) / 17)
    check(net.model(third), [array(batch, 16, height, width)])


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
        weight = net.constant(array(3, 5, *[kernel] * rank))
        outputs.append(net.add("Relu", net.add("ConvTranspose", net.input(*shape), weight, **attributes)))
        arrays.append(array(*shape))
    check(net.model(*outputs), arrays)


def test_long_rows_and_columns():
    net = Net()
    rows = net.conv(net.input(2, 5, 1000), array(20, 5, 5), pads=[2, 2], strides=[2])
    columns = net.conv(net.input(1, 16, 300, 1), array(24, 16, 5, 1))
    check(net.model(rows, columns), [array(2, 5, 1000), array(1, 16, 300, 1)])


LONG_WINDOWS = [
    # inputs, outputs, row, kernel, stride, pads, dilation, groups
    (1, 20, 1024, 512, 4, (254, 254), 1, 1),
    (16, 16, 128, 64, 1, (32, 31), 1, 1),
    (16, 16, 60, 64, 1, (32, 31), 1, 4),
    (3, 10, 5, 17, 1, (12, 12), 1, 1),
    (4, 9, 70, 31, 2, (45, 44), 3, 1),
    (33, 33, 90, 65, 1, (32, 32), 1, 33),
    (10, 10, 3, 33, 2, (16, 17), 1, 10),
]


def test_windows_too_long_to_be_written_out():
    net, outputs, arrays = Net(), [], []
    for inputs, channels, row, kernel, stride, pads, dilation, groups in LONG_WINDOWS:
        attributes = {"pads": pads, "strides": [stride], "dilations": [dilation], "group": groups}
        outputs.append(net.conv(net.input(2, inputs, row), array(channels, inputs // groups, kernel), **attributes))
        arrays.append(array(2, inputs, row))
    images = net.input(1, 24, 20, 30)
    outputs.append(net.conv(images, array(24, 1, 31, 31) / 31, pads=[15] * 4, group=24))
    outputs.append(net.conv(images, array(8, 24, 2, 41) / 41, pads=[0, 20, 0, 20]))
    check(net.model(*outputs), [*arrays, array(1, 24, 20, 30)])


@pytest.mark.parametrize("rows", [1, 5, 130])
def test_products(rows):
    net = Net()
    source = net.input(rows, 95)
    gemm = net.add("Gemm", source, net.constant(array(33, 95)), net.constant(array(33)), transB=1)
    by_constant = net.add("MatMul", net.input(2, rows, 17), net.constant(array(17, 130)))
    left, right = net.input(2, 3, rows, 17), net.input(1, 3, 17, 21)
    both = net.add("MatMul", left, right)
    turned = net.add("MatMul", left, net.add("Transpose", net.input(2, 3, 40, 17), perm=[0, 1, 3, 2]))
    shapes = [(rows, 95), (2, rows, 17), (2, 3, rows, 17), (1, 3, 17, 21), (2, 3, 40, 17)]
    check(net.model(gemm, by_constant, both, turned), [array(*shape) for shape in shapes])


def test_attention_of_open_length():
    net = Net()
    source = net.input("n", "s", 48)
    heads = net.constant(np.int64([0, 0, 4, 12]))

    def projected(perm):
        made = net.add("MatMul", source, net.constant(array(48, 48) / 7))
        return net.add("Transpose", net.add("Reshape", made, heads), perm=perm)

    scores = net.add("MatMul", projected([0, 2, 1, 3]), projected([0, 2, 3, 1]))
    weights = net.add("Softmax", scores, axis=-1)
    made = net.add("MatMul", weights, projected([0, 2, 1, 3]))
    check(net.model(net.add("Transpose", made, perm=[0, 2, 1, 3])), [array(1, 5, 48)], [array(3, 70, 48)])


def test_what_follows_a_convolution():
    net = Net()
    source = net.input(1, 16, 9, 9)
    made = net.conv(source, array(24, 16, 1, 1) / 4)
    depthwise = net.conv(made, array(24, 1, 3, 3), pads=[1] * 4, group=24)
    swish = net.add("Mul", depthwise, net.add("Sigmoid", depthwise))
    hard = net.add("HardSwish", made)
    clipped = net.add("Clip", made, net.constant(np.float32(0)), net.constant(np.float32(6)))
    gelu = net.add("Erf", net.add("Mul", made, net.constant(np.float32(0.7071))))
    # A gate of channels is spread over all pixels: it must not be fused into the product that makes it.
    pooled = net.add("GlobalAveragePool", swish)
    gate = net.add("HardSigmoid", net.conv(net.add("Relu", net.conv(pooled, array(8, 24, 1, 1))), array(24, 8, 1, 1)))
    gated = net.add("Add", net.add("Mul", swish, gate), hard)
    check(net.model(gated, clipped, gelu, made), [array(1, 16, 9, 9)])


def test_layouts_between_convolutions():
    net = Net()
    source = net.input(2, 8, 12, 10)
    x = net.add("Relu", net.conv(source, array(16, 8, 3, 3) / 8, pads=[1] * 4))
    scaled = net.add("Add", net.add("Mul", x, net.constant(array(16, 1, 1))), net.constant(array(10)))
    pooled = net.add("MaxPool", scaled, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 0, 0])
    mean = net.add("ReduceMean", scaled, axes=[2, 3], keepdims=0)
    padded = net.add("Pad", pooled, net.constant(np.int64([0, 0, 0, 1, 0, 0, 2, 0])))
    joined = net.add("Concat", padded, net.add("Neg", padded), axis=1)
    shuffled = net.add("Reshape", joined, net.constant(np.int64([2, 2, 16, 8, 6])))
    shuffled = net.add(
        "Reshape", net.add("Transpose", shuffled, perm=[0, 2, 1, 3, 4]), net.constant(np.int64([2, 32, 8, 6]))
    )
    y = net.conv(shuffled, array(8, 32, 1, 1) / 6)
    last = net.add("Transpose", y, perm=[0, 2, 3, 1])
    normed = net.add("LayerNormalization", last, net.constant(array(8)), net.constant(array(8)), axis=-1)
    back = net.add("Transpose", normed, perm=[0, 3, 1, 2])
    softmax = net.add("Softmax", net.conv(back, array(8, 8, 1, 1)), axis=1)
    flat = net.add("Flatten", softmax)
    sliced = net.add("Slice", y, *(net.constant(np.int64([v])) for v in (1, 7, 1)))
    check(net.model(flat, mean, sliced, last), [array(2, 8, 12, 10)])


def test_reductions_over_rows():
    net = Net()
    source = net.input(3, 7, 197)
    wide = net.input(1, 5, 6, 40)
    softmax = net.add("Softmax", source, axis=-1)
    norm = net.add("LayerNormalization", source, net.constant(array(197)), net.constant(array(197)), axis=-1)
    largest = net.add("ReduceMax", net.add("Mul", source, source), axes=[2], keepdims=0)
    middle = net.add("ReduceSum", source, net.constant(np.int64([1])))
    pooled = net.add("GlobalAveragePool", net.add("Transpose", wide, perm=[0, 3, 1, 2]))
    instance = net.add("InstanceNormalization", source, net.constant(array(7)), net.constant(array(7)))
    outputs = (softmax, norm, largest, middle, pooled, instance)
    check(net.model(*outputs), [array(3, 7, 197), array(1, 5, 6, 40)])
