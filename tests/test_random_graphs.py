"""Random graphs keep their outputs through the pass behind ``slim``, with no guard behind it.

Some hundred graphs in every run; ``ONNXSLIM_EXAMPLES=5000`` makes it thousands.
"""

import os

import onnx
from equivalence import difference, same_bits, simplified
from hypothesis import HealthCheck, given, settings
from random_builder import Graph, session_of
from random_graphs import graphs

_EXAMPLES = int(os.environ.get("ONNXSLIM_EXAMPLES", "300"))


@settings(
    max_examples=_EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)
@given(graphs())
def test_outputs_of_random_graphs_stay(graph):
    result, _ = simplified(graph.model)
    onnx.checker.check_model(result, full_check=True)
    assert _inputs(result) == _inputs(graph.model)
    assert list(result.graph.output) == list(graph.model.graph.output)
    fault = _fault(graph, result)
    assert not fault, f"{fault}\n{onnx.printer.to_text(graph.model)}\nbecame\n{onnx.printer.to_text(result)}"


def _inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs; before IR version 4 without the initializers, each of which must be one too."""
    constants = {tensor.name for tensor in model.graph.initializer} if model.ir_version < 4 else set()
    return [tensor for tensor in model.graph.input if tensor.name not in constants]


def _fault(graph: Graph, result: onnx.ModelProto) -> str:
    before, after = session_of(graph.model), session_of(result)
    names = [output.name for output in graph.model.graph.output]
    for index, feed in enumerate(graph.feeds):
        pairs = zip(names, before.run(None, feed), after.run(None, feed), graph.exact, strict=True)
        for name, expected, got, exact in pairs:
            fault = "" if graph.strange[index] and not exact else difference(expected, got, graph.largest[index])
            if not fault and exact and not same_bits(expected, got):
                fault = "the bits differ"
            if fault:
                return f"feed {index}, output {name}: {fault}"
    return ""
