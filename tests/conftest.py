"""What several tests share: a small trained-like network, data for it, and the command line in this process."""

import sys

import numpy as np
import pytest
from onnx import numpy_helper, parser

from onnxslim import cli

SMALL_NET = """
<ir_version: 8, opset_import: ["" : 17]>
small (float[N, 3, 8, 8] image) => (float[N, 4] logits)
{
    c1 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (image, w1, b1)
    n1 = BatchNormalization (c1, scale, shift, mean, var)
    r1 = Relu (n1)
    same = Identity (r1)
    c2 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (same, w2, b2)
    r2 = Relu (c2)
    pooled = GlobalAveragePool (r2)
    flat = Flatten (pooled)
    logits = Gemm (flat, w3, b3)
}
"""


def small_net(seed=0):
    """Two convolutions, a BatchNormalization and a Gemm, with random weights; dynamic batch."""
    rng = np.random.default_rng(seed)
    proto = parser.parse_model(SMALL_NET)
    shapes = {"w1": (16, 3, 3, 3), "b1": (16,), "w2": (32, 16, 3, 3), "b2": (32,), "w3": (32, 4), "b3": (4,)}
    weights = {name: rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) or 1) for name, shape in shapes.items()}
    weights |= {"scale": rng.uniform(0.5, 1.5, 16), "shift": rng.standard_normal(16) * 0.1}
    weights |= {"mean": rng.standard_normal(16) * 0.1, "var": rng.uniform(0.5, 1.5, 16)}
    weights["w3"] *= 8
    for name, value in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    return proto


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A folder with ``model.onnx``, ``calib.npz`` and ``eval.npz``, labelled by the model itself."""
    import onnx
    import onnxruntime

    folder = tmp_path_factory.mktemp("small")
    proto = small_net()
    onnx.save(proto, folder / "model.onnx")
    rng = np.random.default_rng(1)
    images = rng.standard_normal((96, 3, 8, 8)).astype(np.float32)
    np.savez(folder / "calib.npz", image=images[:48])
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    labels = session.run(None, {"image": images[48:]})[0].argmax(1)
    np.savez(folder / "eval.npz", image=images[48:], labels=labels)
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    """Run ``onnxslim ARGS…`` in this process; return its exit code, standard output and standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["onnxslim", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as exit_:
            code = exit_.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
