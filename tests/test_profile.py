"""Where the time of a compiled model goes: what is known of kernels, and their times."""

import json

import numpy as np
import pytest

from onnxslim.targets import compile
from onnxslim.targets.profile import RUNTIME_ROW, profile

CONVOLUTIONS = 2 * 2 * 8 * 8 * (16 * 3 * 9 + 32 * 16 * 9)
PRODUCT = 2 * 2 * 32 * 4
ELEMENTS = 2 * 8 * 8 * (16 + 32)


@pytest.fixture(scope="module")
def compiled(small, tmp_path_factory):
    """The small network for batches of 2."""
    output = tmp_path_factory.mktemp("bundles") / "small"
    return compile(small / "model.onnx", shapes={"image": [2, 3, 8, 8]}, output=output)


def images(batch):
    return {"image": np.random.default_rng(0).standard_normal((batch, 3, 8, 8)).astype(np.float32)}


def test_operations_are_counted_as_the_layers_have_them(compiled):
    kernels = compiled.manifest.kernels
    counted = sum(kernel.flops for kernel in kernels.values())
    # Bias, Relu, the BatchNormalization that follows the first Relu, and a mean: a few operations on each element.
    assert CONVOLUTIONS + PRODUCT + 2 * ELEMENTS < counted < CONVOLUTIONS + PRODUCT + 5 * ELEMENTS
    convolutions = [kernel for kernel in kernels.values() if "convolution" in kernel.op]
    assert sorted(kernel.shape[-1] for kernel in convolutions) == [16, 32]
    assert all("add" in kernel.op and kernel.writer == "onnxslim" for kernel in convolutions)
    first = next(kernel for kernel in convolutions if kernel.shape[-1] == 16)
    assert first.bytes >= 4 * (2 * 8 * 8 * (3 + 16) + 16 * 27 + 16)


def test_every_kernel_is_timed_and_the_results_stay(compiled):
    before = compiled.run(images(2))
    found = profile(compiled, images(2), threads=1, max_seconds=0.05)
    np.testing.assert_array_equal(compiled.run(images(2))["logits"], before["logits"])
    kernels = {row.name: row for row in found.kernels if row.name != RUNTIME_ROW}
    assert kernels and kernels.keys() <= compiled.manifest.kernels.keys()
    assert {name for name, kernel in compiled.manifest.kernels.items() if "convolution" in kernel.op} <= kernels.keys()
    assert all(row.calls == 1 for row in kernels.values())
    assert sum(row.share for row in found.kernels) == pytest.approx(1)
    assert [row.ms for row in found.kernels] == sorted((row.ms for row in found.kernels), reverse=True)
    assert found.threads == 1
    for name, row in kernels.items():
        if row.ms and compiled.manifest.kernels[name].flops:
            assert row.flops_per_second * row.ms / 1e3 == pytest.approx(compiled.manifest.kernels[name].flops)
            assert row.peak_share == pytest.approx(row.flops_per_second / found.peak_flops_per_second)


def test_open_sizes_are_timed_without_counts(small):
    bundle = compile(small / "model.onnx")
    convolutions = [kernel for kernel in bundle.manifest.kernels.values() if "convolution" in kernel.op]
    assert convolutions and all(kernel.flops is None and kernel.bytes is None for kernel in convolutions)
    rows = {row.op: row for row in profile(bundle, images(3), threads=1, max_seconds=0.05).kernels}
    assert any("convolution" in op and row.peak_share is None and row.ms > 0 for op, row in rows.items())


def test_bench_prints_where_the_time_goes(command, compiled, small):
    code, text, _ = command("bench", compiled.path, "--profile", "--seconds", "0.2")
    assert code == 0
    assert "Where the time goes" in text and "convolution" in text
    code, text, _ = command("bench", small / "model.onnx", compiled.path, "--profile", "--seconds", "0.2", "--json")
    assert code == 0
    model, bundle = json.loads(text)
    assert model["profile"] is None
    assert bundle["profile"]["kernels"]


def test_profiling_takes_a_bundle(command, small):
    code, _, said = command("bench", small / "model.onnx", "--profile")
    assert code == 2
    assert "onnxslim compile" in said
