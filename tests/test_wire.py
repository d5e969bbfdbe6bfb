"""What is cut out of a serialised model and put back gives the bytes that protobuf itself would have written."""

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from onnxslim import load
from onnxslim.wire import cut_index, mark, outline, splice


def weight(name, *shape, dtype=np.float32):
    return numpy_helper.from_array(np.arange(np.prod(shape)).reshape(shape).astype(dtype), name)


def nested():
    """Weights as initializers, in a Constant node, in the body of an If, in a local function."""
    outputs = [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)]
    body = helper.make_graph([helper.make_node("Add", ["x", "w2"], ["b"])], "body", [], outputs, [weight("w2", 40, 40)])
    nodes = [
        helper.make_node("Constant", [], ["c"], value=weight("", 300)),
        helper.make_node("If", ["flag"], ["y"], then_branch=body, else_branch=body),
        helper.make_node("Local", ["y"], ["z"], domain="local"),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)]
    inputs.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    graph = helper.make_graph(
        nodes, "g", inputs, [helper.make_tensor_value_info("z", 1, None)], [weight("w", 600), weight("s", 2)]
    )
    graph.initializer[0].doc_string = "after the weights"
    inner = [
        helper.make_node("Constant", [], ["k"], value=weight("", 17, 31)),
        helper.make_node("Mul", ["a", "k"], ["r"]),
    ]
    function = helper.make_function("local", "Local", ["a"], ["r"], inner, [helper.make_opsetid("", 17)])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=9)
    model.metadata_props.add(key="long", value="x" * 5000)
    return model


def tensors(model):
    """The tensors that outline looks for, in the order of the file."""
    found = []

    def visit(nodes):
        for node in nodes:
            for attribute in node.attribute:
                if attribute.type == AttributeProto.TENSOR:
                    found.append(attribute.t)
                elif attribute.type == AttributeProto.GRAPH:
                    visit_graph(attribute.g)

    def visit_graph(graph):
        visit(graph.node)
        found.extend(graph.initializer)

    visit_graph(model.graph)
    for function in model.functions:
        visit(function.node)
    return found


@pytest.mark.parametrize("smallest", [1, 9, 1024, 2100, 10**9])
def test_cutting_and_splicing_gives_back_the_file(smallest):
    model = nested()
    content = model.SerializeToString()
    skeleton, spans = outline(content, smallest)
    parsed = onnx.ModelProto.FromString(skeleton)
    whole = [tensor.raw_data for tensor in tensors(model) if len(tensor.raw_data) >= smallest]
    assert [content[offset : offset + size] for offset, size in spans] == whole
    assert sum(map(len, whole)) + len(skeleton) < len(content) + 120 * len(spans) + 1
    marked = [tensor for tensor in tensors(parsed) if tensor.external_data]
    assert [cut_index(tensor.external_data[0].value) for tensor in marked] == list(range(len(spans)))
    for index, tensor in enumerate(marked):
        del tensor.external_data[:]
        tensor.ClearField("data_location")
        tensor.raw_data = mark(index)
    pieces = splice(parsed.SerializeToString(), [size for _, size in spans])
    assert b"".join(piece if isinstance(piece, bytes) else whole[piece] for piece in pieces) == content


def test_a_saved_file_is_what_protobuf_would_have_written(tmp_path):
    for number, proto in enumerate((nested(), helper.make_model(helper.make_graph([], "empty", [], []), ir_version=8))):
        path = tmp_path / f"{number}.onnx"
        path.write_bytes(proto.SerializeToString())
        for source in (path, path.read_bytes(), proto):
            load(source).save(tmp_path / "out.onnx")
            assert (tmp_path / "out.onnx").read_bytes() == load(proto).to_proto().SerializeToString()
            assert onnx.load(tmp_path / "out.onnx").graph.initializer == proto.graph.initializer


def test_weights_that_are_external_or_typed_are_left_alone():
    model = nested()
    typed = helper.make_tensor("typed", TensorProto.FLOAT, [500], np.ones(500))
    outside = TensorProto(name="outside", data_type=1, dims=[500], data_location=TensorProto.EXTERNAL)
    outside.raw_data = bytes(2000)
    for tensors_left in ([typed], [outside], [typed, outside]):
        del model.graph.initializer[:], model.functions[:], model.graph.node[:]
        model.graph.initializer.extend(tensors_left)
        content = model.SerializeToString()
        assert outline(content, 1024) == (content, [])


def test_a_list_of_tensors_in_an_attribute_keeps_its_weights(tmp_path):
    model = nested()
    odd = helper.make_node("Odd", [], ["odd"], domain="local", ts=[weight("t", 700), weight("u", 900)])
    # a type that old files leave out: nobody makes a constant of its tensor
    untyped = AttributeProto(name="v", t=weight("v", 800))
    odd.attribute.append(untyped)
    model.graph.node.append(odd)
    path = tmp_path / "odd.onnx"
    path.write_bytes(model.SerializeToString())
    load(path).save(tmp_path / "out.onnx")
    assert onnx.load(tmp_path / "out.onnx").graph.node[-1].attribute == odd.attribute


@pytest.mark.parametrize("smallest", [1, 50])
def test_bytes_that_are_no_message_come_back_as_they_are(smallest):
    content = nested().SerializeToString()
    for end in range(0, len(content), 97):
        try:
            parsed = onnx.ModelProto.FromString(content[:end])
        except Exception:  # protobuf's own class for it differs between versions
            assert outline(content[:end], smallest) == (content[:end], [])
        else:
            skeleton, spans = outline(content[:end], smallest)
            assert len(tensors(onnx.ModelProto.FromString(skeleton))) == len(tensors(parsed))
            assert len(spans) <= len(tensors(parsed))
    assert outline(bytes(range(256)) * 9, smallest) == (bytes(range(256)) * 9, [])


def test_numbers_of_every_length_frame_messages():
    for size in (0, 1, 127, 128, 129, 16383, 16384, 70000, 2**21 + 3):
        tensor = TensorProto(name="w", data_type=TensorProto.UINT8, dims=[size], raw_data=mark(0))
        model = onnx.ModelProto(ir_version=8)
        model.graph.initializer.append(tensor)
        whole = bytes(size)
        pieces = splice(model.SerializeToString(), [size])
        spliced = b"".join(piece if isinstance(piece, bytes) else whole for piece in pieces)
        model.graph.initializer[0].raw_data = whole
        assert spliced == model.SerializeToString()
