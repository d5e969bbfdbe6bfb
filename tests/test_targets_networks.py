"""Compiled networks: layouts carried through them, what is fused where, open sizes, and code for other processors."""

from __future__ import annotations

import numpy as np
import pytest
from compiled_nets import Net, array, check
from onnx import TensorProto, helper, numpy_helper, parser

from onnxslim.targets import compile as compile_model
from onnxslim.targets import find_target, verify
from onnxslim.targets.runtime_libs import runtime_libraries
from onnxslim.targets.verify import emulator

# -------------------------------------------------------------------------------------------------- what is fused


def weight(outputs, inputs, *window):
    """Weights that keep the size of what they are multiplied by."""
    return array(outputs, inputs, *window) / np.float32(np.sqrt(inputs * max(1, np.prod(window))))


def gelu(net, x):
    half = net.add("Mul", x, net.constant(np.float32(0.5)))
    erf = net.add("Erf", net.add("Div", x, net.constant(np.float32(2**0.5))))
    return net.add("Mul", half, net.add("Add", erf, net.constant(np.float32(1))))


def gelu_by_tanh(net, x):
    cube = net.add("Mul", net.add("Pow", x, net.constant(np.float32(3))), net.constant(np.float32(0.044715)))
    inner = net.add("Mul", net.add("Add", x, cube), net.constant(np.float32((2 / np.pi) ** 0.5)))
    grown = net.add("Add", net.add("Tanh", inner), net.constant(np.float32(1)))
    return net.add("Mul", net.add("Mul", x, net.constant(np.float32(0.5))), grown)


ACTIVATIONS = {
    "relu": lambda net, x: net.add("Relu", x),
    "relu6": lambda net, x: net.add("Clip", x, net.constant(np.float32(0)), net.constant(np.float32(6))),
    "leaky": lambda net, x: net.add("LeakyRelu", x, alpha=0.1),
    "hard swish": lambda net, x: net.add("HardSwish", x),
    "sigmoid": lambda net, x: net.add("Sigmoid", x),
    "silu": lambda net, x: net.add("Mul", x, net.add("Sigmoid", x)),
    "gelu": gelu,
    "gelu by tanh": gelu_by_tanh,
    "mish": lambda net, x: net.add("Mul", x, net.add("Tanh", net.add("Softplus", x))),
}


@pytest.mark.parametrize("kind", ["convolution", "depthwise", "product"])
def test_activations_after_products(kind):
    net, shape = Net(), (2, 7, 40) if kind == "product" else (1, 24, 7, 9)
    x = net.input(*shape)
    if kind == "product":
        made = net.add("Add", net.add("MatMul", x, net.constant(weight(40, 33))), net.constant(array(33)))
    else:
        groups = 24 if kind == "depthwise" else 1
        made = net.conv(x, weight(24, 24 // groups, 3, 3), pads=[1] * 4, group=groups)
    outputs = [activation(net, made) for activation in ACTIVATIONS.values()]
    check(net.model(*outputs, made), [array(*shape)])


def test_residuals_of_every_form():
    """Added before and after an activation, twice the same, broadcast, and by a result that is an output too."""
    net = Net()
    x = net.input(2, 24, 9, 7)
    first = net.conv(x, weight(24, 24, 1, 1))
    before = net.add("Relu", net.add("Add", net.conv(first, weight(24, 24, 3, 3), pads=[1] * 4), x))
    after = net.add("Add", net.add("Sigmoid", net.conv(before, weight(24, 1, 5, 5), pads=[2] * 4, group=24)), before)
    made = net.conv(after, weight(24, 24, 1, 1))
    twice = net.add("Add", made, made)
    by_pixel = net.add("Add", net.conv(twice, weight(24, 24, 1, 1)), net.input(2, 1, 9, 7))
    by_channel = net.add("Mul", net.conv(by_pixel, weight(24, 24, 1, 1)), net.input(2, 24, 1, 1))
    by_image = net.add("Sub", net.input(2, 1, 1, 1), net.conv(by_channel, weight(24, 24, 1, 1)))
    shapes = [(2, 24, 9, 7), (2, 1, 9, 7), (2, 24, 1, 1), (2, 1, 1, 1)]
    check(net.model(before, after, by_image, by_channel), [array(*shape) for shape in shapes])


def test_a_product_spread_over_pixels_is_not_fused_into_them():
    """Channel gates, and the pixel-wise gate that is their opposite, both made by convolutions."""
    net = Net()
    x = net.input(2, 20, 11, 6)
    pooled = net.add("GlobalAveragePool", x)
    gate = net.add("Sigmoid", net.conv(net.add("Relu", net.conv(pooled, weight(5, 20, 1, 1))), weight(20, 5, 1, 1)))
    gated = net.add("Mul", x, gate)
    mask = net.add("Sigmoid", net.conv(gated, weight(1, 20, 1, 1)))
    seen = net.add("Mul", net.conv(gated, weight(20, 20, 1, 1)), mask)
    by_gemm = net.add("Gemm", net.add("Flatten", pooled), net.constant(weight(20, 20)), transB=1)
    spread = net.add("Reshape", by_gemm, net.constant(np.int64([0, 20, 1, 1])))
    check(net.model(net.add("Add", seen, spread), gate), [array(2, 20, 11, 6)])


# ------------------------------------------------------------------------------------------------------- layouts


def test_one_dimension():
    net = Net()
    x = net.input(2, 17, 50)
    y = net.add("Relu", net.conv(x, weight(24, 17, 3), pads=[1, 1]))
    y = net.add("Add", net.conv(y, weight(24, 1, 7), pads=[6, 6], dilations=[2], group=24), y)
    y = net.add("MaxPool", y, kernel_shape=[3], strides=[2], pads=[1, 0])
    y = net.add("BatchNormalization", y, *(net.constant(np.abs(array(24)) + 0.5) for _ in range(4)))
    y = net.conv(net.add("Concat", y, y, axis=1), weight(96, 12, 2), group=4, auto_pad="SAME_LOWER")
    rows = net.add("Transpose", y, perm=[0, 2, 1])
    made = net.add("MatMul", rows, net.constant(array(96, 8) / 10))
    check(net.model(net.add("Softmax", made, axis=1), y), [array(2, 17, 50)], limit=1e-4)


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_automatic_padding(auto_pad):
    net = Net()
    x = net.input(1, 6, 13, 9)
    strided = net.conv(x, weight(12, 6, 3, 3), strides=[2, 2], auto_pad=auto_pad)
    even = net.conv(x, weight(12, 6, 2, 4), auto_pad=auto_pad)
    depthwise = net.conv(x, weight(6, 1, 5, 5), strides=[2, 3], group=6, auto_pad=auto_pad)
    pools = [
        net.add(op, depthwise, kernel_shape=[2, 2], strides=strides, auto_pad=auto_pad)
        for op in ("MaxPool", "AveragePool")
        for strides in ([2, 2], [1, 1])
    ]
    check(net.model(strided, even, depthwise, *pools), [array(1, 6, 13, 9)])


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER"])
def test_automatic_padding_of_pools_of_open_size(auto_pad):
    net = Net()
    x = net.input(1, 6, "h", "w")
    pools = [net.add(op, x, kernel_shape=[2, 3], auto_pad=auto_pad) for op in ("MaxPool", "AveragePool")]
    check(net.model(*pools), [array(1, 6, 7, 4)], [array(1, 6, 1, 9)])


def test_every_axis_of_an_image_between_convolutions():
    """Concat, Split, Slice, Pad, reductions, squeezing and softmax along each axis in turn."""
    net, outputs, sizes = Net(), [], (2, 12, 6, 8)
    image = net.conv(net.input(*sizes), weight(12, 12, 1, 1))
    for axis, size in enumerate(sizes):
        halves = net.split(image, size // 2, size - size // 2, axis=axis)
        joined = net.add("Concat", halves[1], net.add("Neg", halves[0]), axis=axis)
        outputs.append(net.conv(joined, weight(9, 12, 1, 1)))
        ends = [net.constant(np.int64([value])) for value in (-1, -size - 1, axis, -1)]
        turned = net.add("Slice", image, *ends)
        outputs.append(net.conv(turned, weight(9, 12, 3, 3)))
        total = net.add("ReduceSum", image, net.constant(np.int64([axis])), keepdims=0)
        back = net.add("Unsqueeze", total, net.constant(np.int64([axis])))
        outputs.append(net.conv(net.add("Mul", image, back), weight(9, 12, 1, 1)))
        outputs.append(net.add("Softmax", net.conv(image, weight(12, 12, 1, 1)), axis=axis))
        if axis != 1:
            pads = np.zeros(8, np.int64)
            pads[[axis, axis + 4]] = 1, 2
            grown = net.add("Pad", image, net.constant(pads), net.constant(np.float32(0.5)))
            outputs.append(net.conv(grown, weight(9, 12, 1, 1)))
    check(net.model(*outputs), [array(*sizes)])


SPREAD = [(), (1,), (8,), (8, 1), (8, 8), (8, 1, 1), (8, 8, 1), (8, 1, 8), (1, 8, 1, 1), (2, 1, 1, 8), (3, 1, 1, 1, 8)]


def test_constants_that_are_spread():
    """A constant's axes are counted from the last, which is where the layout moves channels to."""
    net, outputs = Net(), []
    image = net.conv(net.input(2, 8, 8, 8), weight(8, 8, 1, 1))
    for shape in [
        (),
        (1,),
        (8,),
        (8, 1),
        (8, 8),
        (8, 1, 1),
        (8, 8, 1),
        (8, 1, 8),
        (1, 8, 1, 1),
        (2, 1, 1, 8),
        (3, 1, 1, 1, 8),
    ]:
        constant = net.constant(array(*shape))
        outputs.append(net.add("Sub", constant, net.add("Relu", net.add("Mul", image, constant))))
    outputs.append(net.add("PRelu", image, net.constant(array(8, 1, 1))))
    outputs.append(net.add("PRelu", image, net.constant(array(8))))
    outputs.append(net.add("PRelu", image, net.constant(array(1, 8, 1))))
    check(net.model(*outputs), [array(2, 8, 8, 8)])


def test_norms_and_resizing_between_convolutions():
    net = Net(18)
    x = net.conv(net.input(2, 12, 10, 14), weight(24, 12, 3, 3), pads=[1] * 4)
    x = net.add("InstanceNormalization", x, net.constant(array(24)), net.constant(array(24)))
    grouped = net.add("Reshape", net.conv(x, weight(24, 24, 1, 1)), net.constant(np.int64([0, 4, -1])))
    grouped = net.add("InstanceNormalization", grouped, net.constant(np.ones(4, np.float32)), net.constant(array(4)))
    x = net.add(
        "Mul", net.add("Reshape", grouped, net.constant(np.int64([0, 24, 10, 14]))), net.constant(array(24, 1, 1))
    )
    outputs = []
    for attributes in (
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
        {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
    ):
        scales = net.constant(np.float32([1, 1, 2, 2]))
        resized = net.add("Resize", x, "", scales, **attributes)
        outputs.append(net.add("Add", net.conv(resized, weight(7, 24, 1, 1)), net.constant(array(7, 1, 1))))
    x = net.add("BatchNormalization", outputs[0], *(net.constant(np.abs(array(7)) + 0.5) for _ in range(4)))
    pooled = net.add("AveragePool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    flat = net.add("Flatten", net.conv(pooled, weight(8, 7, 1, 1)))
    made = net.add("Gemm", flat, net.constant(weight(5, 8 * 10 * 14)), transB=1)
    check(net.model(made, *outputs), [array(2, 12, 10, 14)], limit=1e-4)


def test_channels_last_in_the_model_itself():
    """As converters from TensorFlow write it: every convolution between two transposes."""
    net = Net()
    x, residual = net.input(1, 9, 7, 12), None
    for number in range(3):
        first = net.add("Transpose", x, perm=[0, 3, 1, 2])
        x = net.add("Transpose", net.conv(first, weight(12, 12, 3, 3), pads=[1] * 4), perm=[0, 2, 3, 1])
        x = net.add("Relu", net.add("Add", x, net.constant(array(12))))
        x = x if residual is None else net.add("Add", x, residual)
        residual = x
        if number == 1:
            x = net.add("Mul", x, net.add("ReduceMean", x, axes=[1, 2], keepdims=1))
    odd = net.add("Transpose", x, perm=[3, 0, 2, 1])
    check(net.model(x, odd), [array(1, 9, 7, 12)], limit=1e-4)


def test_branches_that_hold_convolutions():
    net = Net()
    x, flag = net.input(1, 8, 6, 6), net.input(kind=TensorProto.BOOL)
    image = net.conv(x, weight(8, 8, 3, 3), pads=[1] * 4)
    kernel = net.constant(weight(8, 8, 1, 1))

    def branch(name, node):
        value = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, (1, 8, 6, 6))
        return helper.make_graph([node], name, [], [value])

    chosen = net.add(
        "If",
        flag,
        then_branch=branch("then", helper.make_node("Conv", [image, kernel], ["taken"])),
        else_branch=branch("else", helper.make_node("Neg", [image], ["left"])),
    )
    after = net.conv(chosen, weight(8, 8, 1, 1))
    data = array(1, 8, 6, 6)
    check(net.model(after, image), [data, np.array(True)], [data, np.array(False)])


def test_only_the_branch_that_is_taken_is_computed():
    """Nested branches that share what comes before them."""
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (bool c, bool d, float[4, 16] x) => (float[4, 16] y, float[4, 16] s) {
            r = Relu (x)
            s = Sigmoid (r)
            y = If (c) <
                then_branch = a () => (float[4, 16] t) {
                    m = MatMul (r, w)
                    n = Exp (s)
                    t = If (d) <
                        then_branch = aa () => (float[4, 16] p) { p0 = Add (m, n) p = Tanh (p0) },
                        else_branch = ab () => (float[4, 16] q) { q0 = MatMul (n, v) q = Sub (q0, x) }>
                },
                else_branch = b () => (float[4, 16] e) {
                    e0 = MatMul (s, v) e1 = Add (e0, r) e = Cos (e1)
                }>
        }"""
    )
    model.graph.initializer.extend(numpy_helper.from_array(weight(16, 16), name) for name in "wv")
    choices = ((True, True), (True, False), (False, True))
    feeds = [[np.array(c), np.array(d), array(4, 16)] for c, d in choices]
    bundle = check(model, *feeds)
    kernels, called = bundle.manifest.kernels, []
    bundle.watch(lambda name, before: called.append(kernels[name].op) if name in kernels else None)
    for arrays, inside, outside in zip(feeds, ("tanh", "subtract", "cos"), ("subtract", "cos", "tanh"), strict=True):
        called.clear()
        bundle.run(dict(zip("cdx", arrays, strict=True)))
        assert any(inside in op for op in called)
        assert not any(outside in op for op in called)


# --------------------------------------------------------------------------------------------------- random networks


class RandomNet:
    """Blocks on top of each other, with several outputs; only some fit images of open size."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.open = ("none", "batch", "all")[seed % 3]
        self.size = (int(self.rng.integers(1, 3)), *(int(each) for each in self.rng.integers(8, 17, 2)))
        self.channels = self.inputs = int(self.rng.choice([3, 8, 17]))
        self.net = Net()
        names = {"none": self.size, "batch": ("n", *self.size[1:]), "all": ("n", "h", "w")}[self.open]
        self.x = self.net.input(names[0], self.inputs, *names[1:])
        self.kept = []

    def act(self):
        self.x = ACTIVATIONS[str(self.rng.choice(list(ACTIVATIONS)))](self.net, self.x)

    def conv(self):
        outputs, window = int(self.rng.choice([4, 12, 17, 32])), int(self.rng.choice([1, 1, 3, 5]))
        self.x = self.net.conv(self.x, weight(outputs, self.channels, window, window), pads=[window // 2] * 4)
        self.channels = outputs
        self.act()

    def depthwise(self):
        window, dilation = int(self.rng.choice([3, 5])), int(self.rng.choice([1, 2]))
        self.x = self.net.conv(
            self.x,
            weight(self.channels, 1, window, window),
            pads=[window // 2 * dilation] * 4,
            dilations=[dilation] * 2,
            group=self.channels,
        )
        self.act()

    def residual(self):
        inside = self.net.conv(self.x, weight(self.channels, self.channels, 1, 1))
        self.x = self.net.add("Relu", self.net.add("Add", self.x, inside))

    def gate(self):
        pooled = self.net.add("GlobalAveragePool", self.x)
        gate = self.net.add("Sigmoid", self.net.conv(pooled, weight(self.channels, self.channels, 1, 1)))
        self.x = self.net.add("Mul", gate, self.x)

    def shuffle(self):
        outputs = 6
        made = self.net.conv(self.x, weight(outputs, self.channels, 1, 1))
        parts = self.net.add("Reshape", made, self.net.constant(np.int64([0, 2, 3, *self.size[1:]])))
        turned = self.net.add("Transpose", parts, perm=[0, 2, 1, 3, 4])
        self.x = self.net.add("Reshape", turned, self.net.constant(np.int64([0, outputs, *self.size[1:]])))
        self.channels = outputs

    def split(self):
        first, second = self.net.split(self.x, 1, self.channels - 1, axis=1)
        first = self.net.conv(first, weight(5, 1, 3, 3), pads=[1] * 4)
        self.x = self.net.add("Concat", second, first, axis=1)
        self.channels += 4

    def norm(self):
        last = self.net.add("Transpose", self.x, perm=[0, 2, 3, 1])
        scales = [self.net.constant(array(self.channels)) for _ in range(2)]
        normal = self.net.add("LayerNormalization", last, *scales, axis=-1)
        self.x = self.net.add("Transpose", normal, perm=[0, 3, 1, 2])

    def attention(self):
        rows = self.net.add("Reshape", self.x, self.net.constant(np.int64([0, 0, -1])))
        rows = self.net.add("Transpose", rows, perm=[0, 2, 1])
        queries, keys = (self.net.add("MatMul", rows, self.net.constant(weight(self.channels, 8))) for _ in range(2))
        scores = self.net.add("MatMul", queries, self.net.add("Transpose", keys, perm=[0, 2, 1]))
        seen = self.net.add("MatMul", self.net.add("Softmax", scores, axis=-1), rows)
        self.kept.append(seen)

    def scaled(self):
        x = self.net.add("Mul", self.x, self.net.constant(array(self.channels, 1, 1)))
        self.x = self.net.add("Add", x, self.net.constant(array(1, self.channels, 1, 1)))

    def pooled(self):
        self.x = self.net.add("MaxPool", self.x, kernel_shape=[3, 3], pads=[1] * 4)

    def grow(self, blocks):
        """Stack blocks drawn by chance; return the model."""
        ways = [self.conv, self.depthwise, self.residual, self.gate, self.split, self.norm, self.scaled, self.pooled]
        ways += [self.attention] + ([] if self.open == "all" else [self.shuffle])
        self.conv()
        for _ in range(blocks):
            ways[int(self.rng.integers(len(ways)))]()
            if self.rng.random() < 0.25:
                self.kept.append(self.x)
        return self.net.model(*dict.fromkeys([*self.kept, self.x]))

    def feeds(self):
        batch, height, width = self.size
        others = {"none": [], "batch": [(batch + 2, height, width)], "all": [(1, 1, 1), (3, width + 3, height)]}
        return [[array(size, self.inputs, *rest)] for size, *rest in [(batch, height, width), *others[self.open]]]


@pytest.mark.parametrize("seed", range(9))
def test_random_networks(seed):
    network = RandomNet(seed)
    check(network.grow(7), *network.feeds(), limit=1e-4)


# ------------------------------------------------------------------------------------------- whole networks, targets


def small_network():
    """A few blocks of a CNN, one of a transformer on its pixels, and a classifier."""
    net = Net()
    x = net.input(1, 3, 17, 19)
    y = net.add("Relu", net.conv(x, weight(24, 3, 3, 3), strides=[2, 2], pads=[1] * 4))
    y = net.add("HardSwish", net.conv(y, weight(24, 1, 3, 3), pads=[1] * 4, group=24))
    y = net.add("Add", net.conv(net.conv(y, weight(17, 24, 1, 1)), weight(24, 17, 3, 3), pads=[1] * 4), y)
    rows = net.add("Transpose", net.add("Reshape", y, net.constant(np.int64([0, 24, 90]))), perm=[0, 2, 1])
    scales = [net.constant(array(24)) for _ in range(2)]
    normal = net.add("LayerNormalization", rows, *scales, axis=-1)
    queries, keys, values = (net.add("MatMul", normal, net.constant(weight(24, 24))) for _ in range(3))
    scores = net.add("MatMul", queries, net.add("Transpose", keys, perm=[0, 2, 1]))
    seen = net.add("MatMul", net.add("Softmax", scores, axis=-1), values)
    mean = net.add("ReduceMean", gelu(net, net.add("Add", seen, rows)), axes=[1], keepdims=0)
    classes = net.add("Gemm", mean, net.constant(weight(5, 24)), net.constant(array(5)), transB=1)
    return net.model(net.add("Softmax", classes, axis=-1))


def products(bundle):
    kinds = ("convolution", "product", "matmul", "depthwise", "contraction")
    return {name: each for name, each in bundle.manifest.kernels.items() if any(kind in each.op for kind in kinds)}


def gated_network():
    """Convolutions of which one is spread over pixels, and one follows a part of a split."""
    net = Net()
    x = net.conv(net.input(1, 17, 9, 8), weight(20, 17, 3, 3), pads=[1] * 4)
    gate = net.add("Sigmoid", net.conv(net.add("GlobalAveragePool", x), weight(20, 20, 1, 1)))
    first, second = net.split(net.add("Mul", x, gate), 8, 12, axis=1)
    second = net.add("Relu", net.conv(second, weight(12, 1, 3, 3), pads=[1] * 4, group=12))
    return net.model(net.conv(net.add("Concat", second, first, axis=1), weight(95, 20, 1, 1)))


@pytest.mark.parametrize(("network", "count"), [(small_network, 8), (gated_network, 4)])
def test_every_product_has_a_kernel_made_for_products(network, count, monkeypatch):
    """Not TVM's loops, nor those that we have for reductions of any kind, which are right as well, and slow."""
    from onnxslim.targets import kernel_contraction, kernel_depthwise, kernel_product, kernel_winograd, schedule

    writers = (
        kernel_product.write_product,
        kernel_winograd.write_winograd,
        kernel_depthwise.write_depthwise,
        kernel_contraction.write_contraction,
    )
    monkeypatch.setattr(schedule, "_WRITERS", writers)
    model = network()
    sizes = [size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim]
    bundle = check(model, [array(*sizes)])
    found = products(bundle)
    # Kernels, not nodes: queries, keys and values are made by one.
    assert len(found) == count, list(found)
    assert [name for name, kernel in found.items() if kernel.writer != "onnxslim"] == []


@pytest.mark.parametrize("name", ["x86-64-v2", "x86-64-v3", "cortex-a72"])
def test_other_processors_compute_the_same(name, tmp_path):
    target, model = find_target(name), small_network()
    bundle = compile_model(model, name, output=tmp_path / "bundle")
    assert [kernel.op for kernel in products(bundle).values() if kernel.writer != "onnxslim"] == []
    found = verify(bundle, model, [{"x0": array(1, 3, 17, 19)}])
    if found.status == "compiled, not run":
        assert not (emulator(target) and runtime_libraries(target.machine))
        pytest.skip(found.detail)
    assert found.ok, found.detail


def test_a_failure_of_our_loops_is_told(monkeypatch):
    """TVM's own loops are many times slower, so nobody should take them for ours."""
    from onnxslim.targets import layout

    def fail():
        raise ValueError("no such layout")

    monkeypatch.setattr(layout, "channels_last", fail)
    bundle = compile_model(small_network())
    assert [note for note in bundle.notes if "TVM's own loops" in note and "no such layout" in note]
    assert all(kernel.writer == "tvm" for kernel in bundle.manifest.kernels.values())
