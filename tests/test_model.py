"""A model survives loading and saving, whatever legal ONNX holds."""

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, TensorProto, helper, numpy_helper, parser
from onnx.backend.test.loader import load_model_tests

from onnxslim import ModelError, OutputError, load


def _backend_models():
    for kind in ("node", "simple", "pytorch-converted", "pytorch-operator"):
        for case in load_model_tests(kind=kind):
            if case.model is not None:
                yield case.name, case.model
            elif case.model_dir is not None:
                yield case.name, onnx.load(f"{case.model_dir}/model.onnx")


def _tensor(proto):
    copy = onnx.TensorProto()
    copy.CopyFrom(proto)
    return copy.SerializeToString(deterministic=True)


def _normal(proto):
    """The same model with what has no meaning put in order: initializers, value infos, absent against empty domain."""
    model = onnx.ModelProto()
    model.CopyFrom(proto)

    def visit(graph):
        for field in (graph.initializer, graph.sparse_initializer, graph.value_info):
            items = sorted(field, key=lambda item: item.SerializeToString(deterministic=True))
            del field[:]
            field.extend(items)
        visit_nodes(graph.node)

    def visit_nodes(nodes):
        for node in nodes:
            if node.domain == "":
                node.ClearField("domain")
            if node.name == "":
                node.ClearField("name")
            for attribute in node.attribute:
                for graph in [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs:
                    visit(graph)

    visit(model.graph)
    for function in model.functions:
        infos = sorted(function.value_info, key=lambda item: item.name)
        del function.value_info[:]
        function.value_info.extend(infos)
        visit_nodes(function.node)
    return model


def test_backend_models_come_back_identical():
    """Every backend test model of onnx is the same message after load and export, but for order without meaning."""
    count, different = 0, []
    for name, proto in _backend_models():
        count += 1
        before, after = _normal(proto), _normal(load(proto).to_proto())
        # The one thing a graph name may be is empty, and an absent and an empty name are the same message.
        if before.SerializeToString(deterministic=True) != after.SerializeToString(deterministic=True):
            different.append(name)
    assert count > 1500
    assert different == []
