"""What the tests of the lossless passes share: models as ONNX text, and the check that a pass changed no number."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx.parser
import onnxruntime

from onnxslim.model import Model, load
from onnxslim.passes.base import Context, Outcome, Pass

Array = np.ndarray


def parse(text: str, opset: int = 17, functions: str = "", domains: str = "", **arrays: Array) -> onnx.ModelProto:
    """Parse a graph in ONNX text and add initializers."""
    imports = f'"" : {opset}{domains}'
    model = onnx.parser.parse_model(f"<ir_version: 8, opset_import: [{imports}]> {text} {functions}")
    for name, array in arrays.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return model


def run(model: onnx.ModelProto, feed: Mapping[str, Array]) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, dict(feed))


def ops(model: Model | onnx.ModelProto) -> Counter[str]:
    """How many nodes of each operator, bodies and functions included."""
    model = model if isinstance(model, Model) else load(model)
    return Counter(node.op for graph in model.graphs() for node in graph.nodes)


def rewrite(
    source: onnx.ModelProto, *passes: Pass, feeds: Sequence[Mapping[str, Array]] = (), rtol: float = 0.0
) -> tuple[Model, list[Outcome]]:
    """Run passes; check that the result is legal, computes the same, keeps its interface, and that they are done.

    With ``rtol`` 0 the outputs must be the same bits, signs of zeros included.
    """
    before = onnx.ModelProto()
    before.CopyFrom(source)
    model = load(source)
    outcomes = [each.run(model, Context()) for each in passes]
    after = model.to_proto()
    onnx.checker.check_model(after, full_check=True)
    assert list(after.graph.input) == list(before.graph.input)
    assert list(after.graph.output) == list(before.graph.output)
    for feed in feeds:
        for wanted, got in zip(run(before, feed), run(after, feed), strict=True):
            assert_same(wanted, got, rtol)
    for each in reversed(passes):
        again = each.run(model, Context())
        assert not again.changes, again.changes
        assert again.refusals
    return model, outcomes


def assert_same(wanted: Array, got: Array, rtol: float) -> None:
    if isinstance(wanted, list):
        assert len(wanted) == len(got)
        for first, second in zip(wanted, got, strict=True):
            assert_same(first, second, rtol)
        return
    assert wanted.dtype == got.dtype
    assert wanted.shape == got.shape
    if rtol and wanted.dtype.kind == "f":
        scale = max(1.0, float(np.abs(wanted).max(initial=0)))
        np.testing.assert_allclose(got, wanted, rtol=rtol, atol=rtol * scale)
    elif wanted.dtype == object:
        assert wanted.tolist() == got.tolist()
    else:
        assert np.array_equal(wanted, got, equal_nan=wanted.dtype.kind == "f")
        if wanted.dtype.kind == "f":
            numbers = ~np.isnan(wanted)  # the sign of NaN means nothing
            assert np.array_equal(np.signbit(wanted[numbers]), np.signbit(got[numbers]))


def normal(*shape: int, seed: int = 0, dtype: type = np.float32) -> Array:
    """Random numbers with both zeros, an infinity and NaN among them."""
    array = np.random.default_rng(seed).standard_normal(shape).astype(dtype)
    specials = [0.0, -0.0, np.inf, -np.inf, np.nan]
    flat = array.reshape(-1)
    flat[: len(specials)] = np.array(specials[: flat.size], dtype)
    return array


def plain(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
