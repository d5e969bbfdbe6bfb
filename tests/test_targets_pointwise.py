"""Kernels without sums: vector mathematics against float64, and moves of numbers against NumPy."""

import math

import numpy as np
import onnx
import pytest
import tvm
from compiled_nets import Net, array, check
from tvm import relax, tirx

from onnxslim.targets import find_target
from onnxslim.targets._tvm import resolve_target, tvm_target
from onnxslim.targets.emit import function, index, load_of, loop, store, vector
from onnxslim.targets.fused import read_kernel
from onnxslim.targets.kernel_pointwise import write_pointwise
from onnxslim.targets.machine import Machine
from onnxslim.targets.vector_math import vectorisable_math

LEAST_NORMAL = np.float32(2.0**-126)


@pytest.fixture(scope="module")
def native():
    return tvm_target(resolve_target(find_target("native")))


def numbers():
    """Every kind of float32: dense where functions bend, all exponents, and what is no number."""
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3.4e38, -3.4e38, 88.72, 88.73, -87.33, -103.0, 128.0]
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, dtype=np.uint64).astype(np.uint32)
    lines = [np.linspace(-12, 12, 1 << 16), np.linspace(-105, 90, 1 << 16), np.exp(np.linspace(-87, 88, 1 << 15))]
    values = np.concatenate([special, *lines]).astype(np.float32)
    values = np.concatenate([values, bits.view(np.float32)])
    return np.resize(values, len(values) // 8 * 8)


def computed(native, operation, values):
    """``operation`` by a kernel of vectors, as every kernel is compiled."""
    source, target = (tirx.decl_buffer((index(len(values)),), "float32", name) for name in ("source", "target"))
    body = loop(
        "i",
        len(values) // 8,
        lambda i: vector(8, lambda lane: store(target, operation(load_of(source, i * 8 + lane)), i * 8 + lane)),
    )
    written = vectorisable_math(function([source, target], body))
    kernel = tvm.compile(tvm.IRModule({"k": written.with_attr("global_symbol", "k")}), target=native)["k"]
    out = tvm.runtime.tensor(np.empty_like(values))
    kernel(tvm.runtime.tensor(values), out)
    return out.numpy()


def power(exponent):
    return lambda x: tirx.power(x, tirx.const(exponent, "float32"))


@pytest.mark.parametrize(
    ("operation", "expected", "tolerance"),
    [
        (tirx.exp, np.exp, 1.5e-7),
        (tirx.log, np.log, 1.5e-7),
        (tirx.sigmoid, lambda x: 1 / (1 + np.exp(-x)), 2e-7),
        (tirx.tanh, np.tanh, 4e-7),
        (tirx.erf, np.vectorize(math.erf), 4e-7),
        (power(2.0), lambda x: x**2, 2e-7),
        (power(3.0), lambda x: x**3, 2e-7),
        (power(4.0), lambda x: x**4, 3e-7),
        (power(-1.0), lambda x: 1 / x, 1e-7),
    ],
    ids=["exp", "log", "sigmoid", "tanh", "erf", "power 2", "power 3", "power 4", "power -1"],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_vector_math_is_accurate_for_every_kind_of_number(native, operation, expected, tolerance):
    values = numbers()
    found, wanted = computed(native, operation, values), expected(values.astype(np.float64))
    rounded = wanted.astype(np.float32)
    normal = np.isfinite(rounded) & (np.abs(rounded) >= LEAST_NORMAL)
    np.testing.assert_allclose(found[normal], wanted[normal], rtol=tolerance)
    small = np.abs(rounded) < LEAST_NORMAL
    assert (np.abs(found[small]) <= LEAST_NORMAL).all()
    np.testing.assert_array_equal(found[~normal & ~small], rounded[~normal & ~small])


def test_functions_bounded_by_one_never_round_beyond(native):
    for operation in (tirx.tanh, tirx.erf):
        found = computed(native, operation, numbers())
        assert np.nanmax(np.abs(found)) == 1.0


def test_math_that_is_not_of_float32_stays():
    x = tirx.decl_buffer((index(1),), "float64", "x")
    kernel = function([x], store(x, tirx.exp(load_of(x, 0)) + tirx.power(load_of(x, 0), load_of(x, 0)), 0))
    assert vectorisable_math(kernel).same_as(kernel)


# ------------------------------------------------------------------------------------------------------------- kernels


def run(native, build, *inputs, open_axes=()):
    """The result of a Relax expression whose kernels have all been written by ``write_pointwise``.

    Args:
        native: the target.
        build: from variables of Relax to the result.
        inputs: arrays.
        open_axes: pairs of an input and an axis whose size is only known when running.
    """
    machine = Machine.of(resolve_target(find_target("native")))
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
            result = builder.emit_output(builder.normalize(build(*variables)))
        builder.emit_func_output(result)
    step = relax.transform
    with native:
        fuse = [
            step.LegalizeOps(),
            step.AnnotateTIROpPattern(),
            step.FuseOps(),
            step.FuseTIR(),
            step.DeadCodeElimination(),
        ]
        module = tvm.transform.Sequential(fuse)(builder.get())
        kernels = [(name, each) for name, each in module.functions_items() if isinstance(each, tirx.PrimFunc)]
        assert kernels
        for name, each in kernels:
            written = write_pointwise(read_kernel(each), machine)
            assert written is not None, name
            module[name] = vectorisable_math(written)
        executable = tvm.compile(module, native)
    machine_code = relax.VirtualMachine(executable, tvm.cpu())
    return machine_code["main"](*map(tvm.runtime.tensor, inputs)).numpy()


def normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


op = relax.op


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 17), (5, 1, 95), (2, 300, 64), (0, 4)])
def test_chains_compute_what_is_used_twice_once_and_right(native, shape):
    x, y = normal(*shape), normal(*shape[-1:])

    def swish(x):
        return op.multiply(x, op.sigmoid(x))

    def expected(x):
        return x / (1 + np.exp(-x))

    found = run(native, lambda x, y: swish(swish(swish(op.add(x, y)))), x, y)
    np.testing.assert_allclose(found, expected(expected(expected(x + y))), rtol=1e-5, atol=1e-6)
    found = run(native, lambda x: op.multiply(op.add(x, x), op.clip(op.add(x, x), -1, 1)), x)
    np.testing.assert_array_equal(found, 2 * x * np.clip(2 * x, -1, 1))


@pytest.mark.parametrize(
    ("left", "right"),
    [((3, 1, 17), (1, 5, 1)), ((2, 7, 7, 24), (2, 1, 1, 24)), ((4, 9), ()), ((1, 33), (6, 1)), ((0, 3), (1, 3))],
)
def test_operands_are_broadcast(native, left, right):
    x, y = normal(*left), normal(*right)
    np.testing.assert_array_equal(run(native, op.subtract, x, y), x - y)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((1, 3, 20, 17), (0, 2, 3, 1)),
        ((1, 9, 8, 16), (0, 3, 1, 2)),
        ((5, 3), (1, 0)),
        ((2, 3, 19, 32), (0, 1, 3, 2)),
        ((2, 3, 19, 32), (0, 2, 1, 3)),
        ((64, 71), (1, 0)),
        ((0, 2), (1, 0)),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "int64", "uint8", "bool"])
def test_axes_are_permuted(native, shape, axes, dtype):
    x = (normal(*shape) * 50).astype(np.int64).astype(dtype)
    np.testing.assert_array_equal(run(native, lambda x: op.permute_dims(x, axes), x), x.transpose(axes))


def test_windows_of_pixels_are_taken_apart_shifted_and_put_together(native):
    x = normal(1, 14, 21, 10)

    def build(x):
        rolled = op.concat([op.strided_slice(x, [1], [3], [14]), op.strided_slice(x, [1], [0], [3])], 1)
        return op.reshape(op.permute_dims(op.reshape(rolled, (1, 2, 7, 3, 7, 10)), (0, 1, 3, 2, 4, 5)), (6, 49, 10))

    rolled = np.roll(x, -3, axis=1)
    expected = rolled.reshape(1, 2, 7, 3, 7, 10).transpose(0, 1, 3, 2, 4, 5).reshape(6, 49, 10)
    np.testing.assert_array_equal(run(native, build, x), expected)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_pieces_are_joined_and_read_with_steps(native, axis):
    pieces = [
        normal(*[size + (extra if axis == at else 0) for at, size in enumerate((3, 5, 17))]) for extra in (0, 1, 9)
    ]
    joined = np.concatenate(pieces, axis)
    found = run(native, lambda *pieces: op.nn.relu(op.concat(list(pieces), axis)), *pieces)
    np.testing.assert_array_equal(found, np.maximum(joined, 0))
    stepped = run(native, lambda x: op.strided_slice(x, [axis], [1], [joined.shape[axis]], [2]), joined)
    np.testing.assert_array_equal(stepped, np.take(joined, range(1, joined.shape[axis], 2), axis))
    turned = run(native, lambda x: op.flip(x, axis), joined)
    np.testing.assert_array_equal(turned, np.flip(joined, axis))


@pytest.mark.parametrize("width", [(0, 0, 1, 2, 3, 1, 0, 0), (0, 0, 0, 0, 0, 0, 5, 9), (1, 1, 1, 1, 1, 1, 1, 1)])
def test_tensors_are_padded(native, width):
    x = normal(1, 6, 5, 11)
    found = run(native, lambda x: op.nn.pad(op.exp(x), list(width), "constant", 2.0), x)
    pairs = list(zip(width[::2], width[1::2], strict=True))
    np.testing.assert_allclose(found, np.pad(np.exp(x), pairs, constant_values=2.0), rtol=3e-7)


def test_rows_are_looked_up(native):
    table, places = normal(20, 33), np.array([[3, 19, 0], [7, 7, 1]], np.int64)
    found = run(native, lambda table, places: op.take(table, places, axis=0, mode="wrap"), table, places)
    np.testing.assert_array_equal(found, table[places])
    columns = run(native, lambda table, places: op.take(table, places, axis=1, mode="wrap"), table, places)
    np.testing.assert_array_equal(columns, table[:, places])


@pytest.mark.parametrize("method", ["nearest_neighbor", "linear"])
def test_images_are_resized(native, method):
    x = normal(1, 5, 7, 12)
    mode = "asymmetric" if method == "nearest_neighbor" else "half_pixel"

    def build(x):
        return op.image.resize2d(
            x, (10, 14), layout="NHWC", method=method, coordinate_transformation_mode=mode, rounding_method="floor"
        )

    found = run(native, build, x)
    if method == "nearest_neighbor":
        np.testing.assert_array_equal(found, x.repeat(2, 1).repeat(2, 2))
        return
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = np.stack([0.25 * padded[:, :-2] + 0.75 * padded[:, 1:-1], 0.75 * padded[:, 1:-1] + 0.25 * padded[:, 2:]], 2)
    rows = rows.reshape(1, 10, 9, 12)
    columns = np.stack(
        [0.25 * rows[:, :, :-2] + 0.75 * rows[:, :, 1:-1], 0.75 * rows[:, :, 1:-1] + 0.25 * rows[:, :, 2:]], 3
    )
    np.testing.assert_allclose(found, columns.reshape(1, 10, 14, 12), rtol=1e-5, atol=1e-6)


def test_conditions_integers_and_casts(native):
    x, y = normal(4, 37), normal(4, 37)
    found = run(native, lambda x, y: op.where(op.greater(x, y), op.exp(x), op.negative(y)), x, y)
    np.testing.assert_allclose(found, np.where(x > y, np.exp(x), -y), rtol=3e-7)
    np.testing.assert_array_equal(run(native, op.less, x, y), x < y)
    whole = (x * 50).astype(np.int32)
    found = run(native, lambda x: op.astype(op.multiply(x, x), "uint8"), whole)
    np.testing.assert_array_equal(found, (whole * whole).astype(np.uint8))
    found = run(native, lambda x: op.astype(op.clip(x, 0, 1), "int64"), x)
    np.testing.assert_array_equal(found, x.clip(0, 1).astype(np.int64))


@pytest.mark.parametrize("length", [1, 8, 29])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_sizes_may_be_known_only_when_running(native, axis, length):
    shape = [3, 5, 16]
    shape[axis] = length
    x, y = normal(*shape), normal(*shape)
    open_axes = [(0, axis), (1, axis)]
    found = run(native, lambda x, y: op.tanh(op.add(x, y)), x, y, open_axes=open_axes)
    np.testing.assert_allclose(found, np.tanh(x + y), rtol=1e-6, atol=1e-7)
    moved = run(native, lambda x, y: op.permute_dims(op.add(x, y), (2, 0, 1)), x, y, open_axes=open_axes)
    np.testing.assert_array_equal(moved, (x + y).transpose(2, 0, 1))
    joined = run(native, lambda x, y: op.concat([x, y], axis), x, y, open_axes=open_axes)
    np.testing.assert_array_equal(joined, np.concatenate([x, y], axis))


TRANSPOSED = [
    # declared shape, sizes to run with, order of axes
    ((2, 17, 9, 24), [], [0, 3, 1, 2]),
    ((1, 40, 7, 9), [], [0, 2, 3, 1]),
    ((16, 3, 33), [], [2, 1, 0]),
    (("a", "b"), [(33, 41), (3, 100), (100, 3), (8, 8), (0, 9), (9, 0), (9, 9)], [1, 0]),
    ((1, "h", "w", 20), [(1, 5, 7, 20), (1, 1, 1, 20), (1, 2, 4, 20), (1, 3, 3, 20)], [0, 3, 1, 2]),
]


@pytest.mark.parametrize("kind", [np.float32, np.int32, np.int64])
@pytest.mark.parametrize(("shape", "sizes", "order"), TRANSPOSED)
def test_axes_in_another_order(shape, sizes, order, kind):
    net = Net()
    x = net.input(*shape, kind=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind)))
    model = net.model(net.add("Transpose", x, perm=order))
    feeds = [(np.arange(math.prod(size), dtype=kind).reshape(size),) for size in sizes or [shape]]
    check(model, *feeds, limit=0)


def test_arithmetic_across_the_order_of_what_is_read():
    net = Net()
    x, y, z = net.input(40, 30), net.input(30, 41), net.input(41, 30)
    turned = net.add("Slice", net.add("Transpose", x, perm=[1, 0]), *map(net.constant, np.int64([[0], [29], [0]])))
    both = net.add("Mul", net.add("Relu", y), net.add("Transpose", z, perm=[1, 0]))
    check(net.model(net.add("Exp", turned), net.add("Sub", both, y)), (array(40, 30), array(30, 41), array(41, 30)))
