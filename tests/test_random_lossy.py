"""Random graphs through the lossy passes, with no guard behind: legal, runnable on every feed, of the same shapes.

Some hundred graphs in every run; ``ONNXSLIM_EXAMPLES=5000`` makes it thousands. What accuracy is lost is measured on
networks elsewhere: numbers of random graphs are as large and as strange as they come.
"""

import os

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from random_builder import Graph, session_of
from random_graphs import graphs
from random_layers import convolution

from onnxslim import load
from onnxslim.data import Dataset, open_dataset
from onnxslim.errors import DataError, ModelError
from onnxslim.graph.walk import remove_dead_nodes
from onnxslim.passes import _quantizer
from onnxslim.passes._runtimes import RUNTIMES
from onnxslim.passes._weight_only import quantize_stored_weights
from onnxslim.passes.base import Context, Outcome, Pass
from onnxslim.passes.factorize_low_rank import FactorizeLowRank
from onnxslim.passes.prune_channels import PruneChannels
from onnxslim.passes.quantize_static import QuantizeStatic
from onnxslim.passes.share_weights import ShareWeights
from onnxslim.runtime import Session

_EXAMPLES = int(os.environ.get("ONNXSLIM_EXAMPLES", "300"))


_SETTINGS = settings(
    max_examples=_EXAMPLES, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
_NARROW = {"ratio": 0.5, "multiple_of": 1, "min_channels": 1}
_STEPS = (PruneChannels(**_NARROW), FactorizeLowRank(keep=0.5), ShareWeights(bits=3))


@_SETTINGS
@given(graphs(more=(convolution,) * 40), st.sampled_from(list(RUNTIMES)), st.booleans())
def test_random_graphs_run_in_int8(graph: Graph, runtime: str, float_kept: bool):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_quantizer, "_TINY_WEIGHT", 0)
        _check(graph, _quantized(graph, runtime, float_kept))


@_SETTINGS
@given(graphs(more=(convolution,) * 40), st.sampled_from(_STEPS), st.booleans())
def test_random_graphs_run_when_they_are_smaller(graph: Graph, step: Pass, calibrated: bool):
    model = load(graph.model)
    step.run(model, Context(calibration=_data(graph) if calibrated else None))
    _check(graph, model.to_proto())


def _check(graph: Graph, result: onnx.ModelProto) -> None:
    onnx.checker.check_model(result, full_check=True)
    before, after = session_of(graph.model), Session(result, optimize=False)
    for feed in graph.feeds:
        got = after.run(feed)
        for output, wanted in zip(graph.model.graph.output, before.run(None, feed), strict=True):
            if isinstance(wanted, np.ndarray):
                assert (got[output.name].dtype, got[output.name].shape) == (wanted.dtype, wanted.shape)


def _data(graph: Graph) -> Dataset:
    usual = [feed for feed, strange in zip(graph.feeds, graph.strange, strict=True) if not strange]
    try:
        return open_dataset(usual, Session(load(graph.model)).specs)
    except (DataError, ModelError):  # sequences, say, and what ONNX Runtime optimises to something illegal
        assume(False)
        raise


def _quantized(graph: Graph, runtime: str, float_kept: bool) -> onnx.ModelProto:
    """What the pass writes, whether it is smaller or not."""
    model, data = load(graph.model), _data(graph)
    step = QuantizeStatic(only_if_faster=False, runtime=runtime, keep_float="auto" if float_kept else 0)
    outcome = Outcome()
    step._quantize(model, data, None, Context(), outcome)
    quantize_stored_weights(model, lambda node: False, outcome)
    remove_dead_nodes(model)
    return model.to_proto()
