"""Kernels that reduce: softmax, norms, sums and pools against NumPy, for odd and for open sizes."""

import itertools

import numpy as np
import onnx
import onnxruntime
import pytest
import tvm
from compiled_nets import Net
from tvm import relax, tirx

from onnxslim.targets import compile as compile_model
from onnxslim.targets._tvm import resolve_target
from onnxslim.targets.catalogue import find_target
from onnxslim.targets.lower import lower

op = relax.op


@pytest.fixture(scope="module")
def native():
    return resolve_target(find_target("native"))


def run(native, build, *inputs, open_axes=(), again=()):
    """Results of Relax expressions, every kernel of which has been written by us.

    Args:
        native: the target.
        build: from variables of Relax to a list of results.
        inputs: arrays.
        open_axes: pairs of an input and an axis whose size is only known when running; equal sizes are one.
        again: further inputs for the same code.
    """
    builder = relax.BlockBuilder()
    sizes: dict[int, tirx.Var] = {}

    def size(position, axis, length):
        is_open = (position, axis) in open_axes
        return sizes.setdefault(length, tirx.Var(f"n{length}", "int64")) if is_open else length

    variables = [
        relax.Var(
            f"x{position}", relax.TensorType([size(position, *each) for each in enumerate(x.shape)], str(x.dtype))
        )
        for position, x in enumerate(inputs)
    ]
    with builder.function("main", variables):
        with builder.dataflow():
            results = builder.emit_output(relax.Tuple([builder.normalize(each) for each in build(*variables)]))
        builder.emit_func_output(results)
    lowered = lower(builder.get(), native)
    assert [name for name, kernel in lowered.kernels.items() if kernel.writer != "onnxslim"] == []
    machine_code = relax.VirtualMachine(lowered.executable, tvm.cpu())
    weights = [tvm.runtime.tensor(weight) for weight in lowered.weights]
    found = [
        [each.numpy() for each in machine_code["main"](*map(tvm.runtime.tensor, feed), *weights)]
        for feed in (inputs, *again)
    ]
    return found if again else found[0]


def normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def softmax(x, axis=-1):
    powers = np.exp(x - x.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def normalised(x, axes):
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)


def close(found, *wanted):
    for each, array in zip(found, wanted, strict=True):
        np.testing.assert_allclose(each, array, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("width", [8, 17, 49, 95, 128, 300])
def test_rows(native, width):
    x, scale, shift = normal(2, 7, width), normal(width), normal(width)

    def build(x, scale, shift):
        root = op.sqrt(op.add(op.mean(op.square(x), [-1], keepdims=True), relax.const(1e-5)))
        return [
            op.nn.softmax(x, -1),
            op.nn.log_softmax(op.add(x, shift), -1),
            op.nn.layer_norm(x, scale, shift, [-1]),
            op.multiply(op.divide(x, root), scale),
            op.max(op.abs(x), [2]),
            op.min(x, [2], keepdims=True),
            op.variance(x, [2]),
        ]

    root = np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    close(
        run(native, build, x, scale, shift),
        softmax(x),
        np.log(softmax(x + shift)),
        normalised(x, 2) * scale + shift,
        x / root * scale,
        np.abs(x).max(2),
        x.min(2, keepdims=True),
        x.var(2),
    )


def test_extreme_rows(native):
    x = np.float32([[1e4] * 20, [-1e4] * 20, [0] * 10 + [3e38] * 10, [-np.inf] * 19 + [1]])
    expected = softmax(np.maximum(x, np.finfo(np.float32).min).astype(np.float64))
    close(run(native, lambda x: [op.nn.softmax(x, -1)], x), expected)


@pytest.mark.parametrize("channels", [3, 24, 95])
def test_channels_that_lie_last(native, channels):
    x = normal(2, 9, 7, channels)

    def build(x):
        return [
            op.mean(op.nn.relu(x), [1, 2], keepdims=True),
            op.max(x, [1, 2]),
            op.sum(x, [1]),
            op.nn.softmax(x, 1),
            op.sum(op.square(x), [0, 1, 2]),
        ]

    mean = np.maximum(x, 0).mean((1, 2), keepdims=True)
    close(
        run(native, build, x), mean, x.max((1, 2)), x.sum(1), softmax(x, 1), (x.astype(np.float64) ** 2).sum((0, 1, 2))
    )


def test_images_whose_channels_lie_first(native):
    x, scale = normal(2, 5, 11, 13), normal(5, 1, 1)

    def build(x, scale):
        return [
            op.mean(x, [2, 3]),
            op.multiply(op.variance(x, [2, 3], keepdims=True), scale),
            op.nn.layer_norm(
                x, relax.const(np.ones((11, 13), np.float32)), relax.const(np.zeros((11, 13), np.float32)), [2, 3]
            ),
            op.sum(x),
        ]

    close(
        run(native, build, x, scale),
        x.mean((2, 3)),
        x.var((2, 3), keepdims=True) * scale,
        normalised(x, (2, 3)),
        x.sum(dtype=np.float64),
    )


def test_whole_numbers(native):
    x = np.random.default_rng(0).integers(-9, 9, (6, 5, 33))
    found = run(native, lambda x: [op.sum(x, [2]), op.max(x, [1]), op.prod(op.clip(x, 1, 2), [2])], x)
    for each, wanted in zip(found, [x.sum(2), x.max(1), x.clip(1, 2).prod(2)], strict=True):
        np.testing.assert_array_equal(each, wanted)


def test_rows_of_open_length(native):
    def feeds(batch, length):
        return normal(batch, 3, length, length), normal(batch, length, 48), normal(48)

    def build(scores, x, scale):
        return [
            op.nn.softmax(scores, -1),
            op.nn.layer_norm(x, scale, scale, [-1]),
            op.mean(x, [1]),
            op.max(scores, [3]),
        ]

    open_axes = [(0, 0), (0, 2), (0, 3), (1, 0), (1, 1)]
    all_feeds = [feeds(2, 5), feeds(1, 1), feeds(3, 47), feeds(0, 4), feeds(1, 130)]
    first, *again = all_feeds
    for (scores, x, scale), found in zip(
        all_feeds, run(native, build, *first, open_axes=open_axes, again=again), strict=True
    ):
        close(found, softmax(scores), normalised(x, 2) * scale + scale, x.mean(1), scores.max(3))


POOLS = [
    # window, strides, padding (top, left, bottom, right), dilation
    ((3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
    ((3, 2), (1, 2), (0, 1, 2, 0), (1, 1)),
    ((2, 2), (2, 2), (0, 0, 0, 0), (1, 1)),
    ((5, 1), (1, 1), (2, 0, 2, 0), (1, 1)),
    ((2, 3), (2, 1), (1, 2, 1, 2), (2, 2)),
]


def windows(x, pool, fill):
    """All that windows see of images whose channels lie last, along a new last axis."""
    (height, width), (down, right), (top, left, bottom, behind), (dilated_down, dilated_right) = pool
    padded = np.pad(x, ((0, 0), (top, bottom), (left, behind), (0, 0)), constant_values=fill)
    reach = ((height - 1) * dilated_down + 1, (width - 1) * dilated_right + 1)
    seen = np.lib.stride_tricks.sliding_window_view(padded, reach, (1, 2))[:, ::down, ::right]
    seen = seen[..., ::dilated_down, ::dilated_right]
    return seen.reshape(*seen.shape[:4], -1)


@pytest.mark.parametrize("channels", [3, 24, 95])
def test_pools(native, channels):
    x = normal(2, 9, 7, channels)

    def build(x):
        results = []
        for window, strides, padding, dilation in POOLS:
            where = (window, strides, padding, dilation)
            results += [
                op.nn.relu(op.nn.max_pool2d(x, *where, layout="NHWC")),
                op.nn.avg_pool2d(x, *where, layout="NHWC", count_include_pad=True),
                op.nn.avg_pool2d(x, *where, layout="NHWC"),
            ]
        return results

    expected = []
    for pool in POOLS:
        inside = windows(np.ones_like(x), pool, 0).sum(-1)
        expected.append(np.maximum(windows(x, pool, -np.inf).max(-1), 0))
        expected += [windows(x, pool, 0).mean(-1), windows(x, pool, 0).sum(-1) / inside]
    close(run(native, build, x), *expected)


def test_pools_of_open_size(native):
    feeds = [(normal(batch, height, width, 17),) for batch, height, width in [(2, 6, 5), (1, 1, 1), (3, 13, 8)]]

    def build(x):
        return [op.nn.max_pool2d(x, *POOLS[0], layout="NHWC"), op.mean(x, [1, 2])]

    first, *again = feeds
    for (x,), found in zip(
        feeds, run(native, build, *first, open_axes=[(0, 0), (0, 1), (0, 2)], again=again), strict=True
    ):
        close(found, windows(x, POOLS[0], -np.inf).max(-1), x.mean((1, 2)))


def test_windows_that_round_up_reach_over_the_edge(native):
    x = normal(1, 6, 8, 24)
    found = run(native, lambda x: [op.nn.max_pool2d(x, (3, 3), (2, 2), ceil_mode=True, layout="NHWC")], x)
    close(found, windows(x, ((3, 3), (2, 2), (0, 0, 1, 1), (1, 1)), -np.inf).max(-1))


def test_long_sums_keep_their_digits(native):
    """Where a running sum in float32 would be off by more than 1e-5; ONNX Runtime is by 8e-6 and less."""
    row, image = 3 + normal(3, 70001), 3 + normal(2, 150, 301, 3)

    def centred(x):
        distance = op.subtract(x, op.mean(x, [-1], keepdims=True))
        return op.divide(distance, op.sqrt(op.mean(op.square(distance), [-1], keepdims=True)))

    def build(row, image):
        return [
            op.nn.softmax(row, -1),
            op.nn.softmax(row, 0),
            centred(row),
            op.sum(row),
            op.mean(image, keepdims=True),
            op.mean(image, [0, 1, 2]),
            op.sum(image, [1, 3]),
            op.nn.softmax(op.permute_dims(row), 0),
        ]

    r, i = row.astype(np.float64), image.astype(np.float64)
    expected = [
        softmax(r),
        softmax(r, 0),
        (r - r.mean(-1, keepdims=True)) / r.std(-1, keepdims=True),
        r.sum(),
        i.mean(keepdims=True),
        i.mean((0, 1, 2)),
        i.sum((1, 3)),
        softmax(r.T, 0),
    ]
    found = run(native, build, row, image)
    of_open_size = run(native, build, row, image, open_axes=[(0, 1), (1, 1), (1, 2)])
    for each, again, wanted in zip(found, of_open_size, expected, strict=True):
        assert np.abs(each - wanted).max() <= 1e-6 * np.abs(wanted).max()
        assert np.abs(again - wanted).max() <= 3e-6 * np.abs(wanted).max()


@pytest.mark.parametrize("width", [1, 3, 7])
def test_rows_shorter_than_a_vector(native, width):
    x = normal(50, 4, width)
    found = run(native, lambda x: [op.sum(x, [2]), op.nn.softmax(x, -1), op.max(x, [0, 2]), op.min(x)], x)
    close(found, x.sum(2), softmax(x), x.max((0, 2)), x.min())


REDUCTIONS = ["Sum", "Prod", "Mean", "Max", "Min", "L1", "L2", "LogSum", "LogSumExp", "SumSquare"]


def of_each_size(model, kind, sizes):
    """What a model, compiled for sizes that are open, and ONNX Runtime make of each: pairs of arrays."""
    bundle = compile_model(model)
    assert {kernel.writer for kernel in bundle.manifest.kernels.values()} == {"onnxslim"}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    pairs = []
    for size in sizes:
        feed = {"x0": np.random.default_rng(0).integers(-3, 4, size).astype(kind)}
        (wanted,) = session.run(None, feed)
        (found,) = bundle.run(feed).values()
        assert found.shape == wanted.shape
        pairs.append((found, wanted))
    return pairs


@pytest.mark.parametrize("axes", [[1], [0, 1], [0, 1, 2]])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_nothing_to_reduce(name, axes):
    sizes = [(2, 0, 3), (0, 2, 3), (0, 0, 3), (4, 9, 3)]
    net = Net(opset=18)
    x = net.input("rows", "columns", 3)
    if name.startswith("Log"):
        x = net.add("Abs", x)
    model = net.model(net.add(f"Reduce{name}", x, net.constant(np.int64(axes)), keepdims=0))
    for found, wanted in of_each_size(model, np.float32, sizes):
        np.testing.assert_allclose(found, wanted, rtol=2e-6)


@pytest.mark.parametrize("kind", [np.float64, np.int32, np.int64])
@pytest.mark.parametrize("name", REDUCTIONS[:5])
def test_nothing_to_reduce_of_other_types(name, kind):
    net = Net(opset=18)
    x = net.input("rows", "columns", kind=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind)))
    model = net.model(net.add(f"Reduce{name}", x, keepdims=0))
    for found, wanted in of_each_size(model, kind, [(2, 0), (0, 0), (3, 40)]):
        np.testing.assert_allclose(found, wanted, rtol=1e-12)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int32, np.int64])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_running_sums(axis, kind):
    tensor_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    for shape in [("a", "b", "c"), (3, 9, 77), (2, 3, 1100)]:
        net = Net(opset=14)
        x = net.input(*shape, kind=tensor_type)
        sums = [
            net.add("CumSum", x, net.constant(np.int64(axis)), exclusive=exclusive, reverse=reverse)
            for exclusive, reverse in itertools.product((0, 1), (0, 1))
        ]
        model = net.model(net.add("Concat", *sums, axis=0))
        sizes = [(2, 3, 4), (0, 3, 4), (2, 0, 4), (2, 3, 0), (5, 7, 67), (2, 3, 699)] if "a" in shape else [shape]
        for found, wanted in of_each_size(model, kind, sizes):
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int32, np.uint8])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("name", ["ArgMax", "ArgMin"])
def test_places_of_extremes(name, axis, kind):
    """Of several that are equal the first one is meant; integers of a few values make many of them."""
    net = Net(opset=13)
    x = net.input("a", "b", "c", kind=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind)))
    model = net.model(net.add(name, net.add("Abs", x), axis=axis, keepdims=0))
    for found, wanted in of_each_size(model, kind, [(2, 3, 4), (5, 41, 17), (1, 1, 1), (3, 130, 9)]):
        np.testing.assert_array_equal(found, wanted)


def test_places_where_no_number_is_larger(native):
    x = np.full((3, 20), -np.inf, np.float32)
    x[1, 7], x[2, 19] = 0, np.nan
    (found,) = run(native, lambda x: [op.argmax(x, 1)], x)
    assert found[:2].tolist() == [0, 7]
    assert 0 <= found[2] < 20
