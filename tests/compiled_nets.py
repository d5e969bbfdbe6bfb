"""Models built node by node for the tests of compiled code, and their numbers against ONNX Runtime's."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from onnxslim.targets import compile as compile_model

RNG = np.random.default_rng(0)
START = RNG.bit_generator.state


def array(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


class Net:
    """A model in the making; each call adds a node and returns the name of its output."""

    def __init__(self, opset=17):
        self.nodes, self.weights, self.inputs = [], [], []
        self.opset = opset
        # A test's numbers do not depend on the tests before it.
        RNG.bit_generator.state = START

    def input(self, *shape, kind=TensorProto.FLOAT):
        name = f"x{len(self.inputs)}"
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def constant(self, value):
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(self, op, *names, **attributes):
        output = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(names), [output], **attributes))
        return output

    def split(self, source, *sizes, axis):
        outputs = [f"Split_{len(self.nodes)}_{part}" for part in range(len(sizes))]
        self.nodes.append(helper.make_node("Split", [source, self.constant(np.int64(sizes))], outputs, axis=axis))
        return outputs

    def conv(self, source, weight, **attributes):
        return self.add("Conv", source, self.constant(weight), self.constant(array(weight.shape[0])), **attributes)

    def model(self, *outputs):
        values = [helper.make_empty_tensor_value_info(name) for name in outputs]
        graph = helper.make_graph(self.nodes, "net", self.inputs, values, self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=9)
        return onnx.shape_inference.infer_shapes(model)


def check(model, *feeds, limit=2e-5):
    """Compile a model and compare every output, for every feed, with ONNX Runtime's without its optimisations.

    Args:
        model: what to compile, for this machine.
        feeds: arrays for all inputs, in their order.
        limit: the largest error, as a share of the largest number of an output.

    Returns:
        The bundle.
    """
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    bundle = compile_model(model)
    # Where a pass of ours fails, TVM compiles the model by itself: right, and many times slower.
    assert not [note for note in bundle.notes if "loops" in note]
    assert any(kernel.writer == "onnxslim" for kernel in bundle.manifest.kernels.values())
    names = [value.name for value in model.graph.input]
    for arrays in feeds:
        feed = dict(zip(names, arrays, strict=True))
        found = bundle.run(feed)
        for output, wanted in zip(session.get_outputs(), session.run(None, feed), strict=True):
            got = found[output.name]
            assert got.shape == wanted.shape, output.name
            if wanted.size:
                assert np.isfinite(wanted).all(), f"{output.name}: the test itself overflows"
                assert np.abs(got - wanted).max() <= limit * np.abs(wanted).max(), output.name
    return bundle
