"""Weights of a bundle: in a file of their own that every runner maps, stored once, and missed when it is damaged."""

import shutil
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
from onnx import numpy_helper, parser

from onnxslim.errors import TargetError
from onnxslim.targets import Bundle, compile
from onnxslim.targets.bundle import write_weights
from onnxslim.targets.run import map_weights

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((64, 64)).astype(np.float32) / 8
TABLE = RNG.integers(-9, 9, (40, 64)).astype(np.int32)
FEED = {"x": RNG.standard_normal((3, 64)).astype(np.float32), "at": np.array([3, 0, 39])}
ARRAYS = [
    np.zeros((3, 5), np.int8),
    np.array(2.5),
    np.arange(7, dtype=np.float16),
    np.array([[True], [False]]),
    np.zeros((0, 4), np.float32),
    np.arange(12, dtype=np.int64).reshape(3, 4).T,
]


def net():
    """Two equal weights under two names, an integer table, and a small constant."""
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[3, 64] x, int64[3] at) => (float[3, 64] y, int32[3, 64] t)
        <float[1] half = {0.5}> {
            a = MatMul (x, w1) b = Relu (a) c = MatMul (b, w2) y = Mul (c, half) t = Gather (table, at)
        }"""
    )
    values = {"w1": WEIGHT, "w2": WEIGHT, "table": TABLE}
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    return model


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return compile(net(), output=tmp_path_factory.mktemp("bundles") / "net")


def program(bundle, folder, kind):
    """The command line of a runner, which leaves its outputs in ``folder``."""
    if kind == "run.py":
        np.savez(folder / "in.npz", **FEED)
        return [sys.executable, "-I", bundle / "run.py", folder / "in.npz", folder / "out.npz"]
    for name, array in FEED.items():
        np.save(folder / f"{name}.npy", array)
    return [bundle / "run", bundle, folder, *(folder / f"{name}.npy" for name in FEED)]


def test_equal_weights_are_stored_once_and_outside_of_the_library(bundle):
    dtypes = [str(array.dtype) for array in map_weights(bundle.path / "weights.npy")]
    assert sorted(dtypes) == ["float32", "int32"]
    assert (bundle.path / "weights.npy").stat().st_size < 2 * WEIGHT.nbytes + TABLE.nbytes
    assert bundle.library_bytes == sum((bundle.path / name).stat().st_size for name in ("model.so", "weights.npy"))


@pytest.mark.parametrize("kind", ["run", "run.py"])
def test_every_runner_maps_the_weights(bundle, tmp_path, kind):
    expected = onnxruntime.InferenceSession(net().SerializeToString()).run(None, FEED)
    for found in bundle.run(FEED), Bundle.load(bundle.path).run(FEED):
        np.testing.assert_allclose(found["y"], expected[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(found["t"], expected[1])
    subprocess.run(program(bundle.path, tmp_path, kind), check=True, capture_output=True)
    if kind == "run":
        y, t = (np.load(tmp_path / f"{index}.npy") for index in range(2))
    else:
        y, t = (np.load(tmp_path / "out.npz")[name] for name in "yt")
    np.testing.assert_array_equal(y, found["y"])
    np.testing.assert_array_equal(t, found["t"])


@pytest.mark.parametrize("left", [None, 5, 200, -1], ids=["missing", "in the magic", "in an array", "but one byte"])
@pytest.mark.parametrize("kind", ["run", "run.py"])
def test_damaged_weights_are_one_line_and_nothing_is_written(bundle, tmp_path, kind, left):
    device = tmp_path / "device"
    shutil.copytree(bundle.path, device)
    (device / "weights.npy").unlink()
    if left is not None:
        (device / "weights.npy").write_bytes((bundle.path / "weights.npy").read_bytes()[:left])
    done = subprocess.run(program(device, tmp_path, kind), capture_output=True, text=True)
    assert done.returncode == 1
    assert "weights.npy" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.glob("out.npz")) + list(tmp_path.glob("[0-9].npy"))


def test_damaged_weights_are_refused_when_a_bundle_is_loaded(tmp_path):
    bundle = compile(net(), output=tmp_path / "net")
    file = bundle.path / "weights.npy"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(TargetError, match=r"weights\.npy.*hash differs"):
        Bundle.load(bundle.path)


def test_written_arrays_are_read_by_numpy_and_mapped_at_multiples_of_64_bytes(tmp_path):
    path = tmp_path / "weights.npy"
    write_weights(path, ARRAYS)
    with path.open("rb") as file:
        loaded = [np.load(file) for _ in ARRAYS]
        assert not file.read()
    for array, *found in zip(ARRAYS, loaded, map_weights(path), strict=True):
        for each in found:
            assert each.dtype == array.dtype
            np.testing.assert_array_equal(each, array)
        assert found[1].ctypes.data % 64 == 0
    write_weights(path, [])
    assert map_weights(path) == []
