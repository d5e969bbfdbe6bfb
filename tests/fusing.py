"""What the tests of rules that make one node of several share: the rules alone, and the check of what they make."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import onnx
from rewriting import ops, run

from onnxslim.graph.walk import hoist_constants
from onnxslim.model import Model, load
from onnxslim.passes._rewriter import Rewriter
from onnxslim.passes._rules import Ledger, apply_rules
from onnxslim.passes._rules_fusion import FUSION_RULES
from onnxslim.passes.base import Context, Outcome, Pass

Array = np.ndarray


class Fusions(Pass):
    """The rules under test by themselves."""

    name: ClassVar[str] = "fusions"
    lossless: ClassVar[bool] = True

    def run(self, model: Model, context: Context) -> Outcome:
        outcome = Outcome()
        hoist_constants(model)
        rewriter, ledger = Rewriter(model), Ledger(outcome, context)
        apply_rules(rewriter, FUSION_RULES, ledger)
        ledger.close(rewriter)
        rewriter.finish()
        return outcome


def fuse(source: onnx.ModelProto, feeds: Sequence[Mapping[str, Array]], rtol: float = 1e-5, atol: float = 2e-6):
    """Apply the rules; check that what they make is legal, has the same interface and computes the same, and stays.

    NaN and infinities must be where they were.
    """
    model = load(source)
    outcome = Fusions().run(model, Context())
    after = model.to_proto()
    onnx.checker.check_model(after, full_check=True)
    assert list(after.graph.input) == list(source.graph.input)
    assert list(after.graph.output) == list(source.graph.output)
    for feed in feeds:
        for wanted, got in zip(run(source, feed), run(after, feed), strict=True):
            assert (wanted.dtype, wanted.shape) == (got.dtype, got.shape)
            if wanted.dtype.kind == "f":
                np.testing.assert_allclose(got, wanted, rtol=rtol, atol=atol)
            else:
                assert np.array_equal(wanted, got)
    assert not Fusions().run(model, Context()).changes
    return ops(model), outcome


def c(value: float) -> Array:
    return np.array(value, np.float32)


EDGES = np.array(
    [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e30, -1e30, -20, 20, 3, -3, 6, -6, 1e-40, -1e-40, 0.5, -0.5, 1, -1, 88, -88],
    np.float32,
)
