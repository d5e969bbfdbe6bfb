"""A model survives loading and saving, whatever legal ONNX holds."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import AttributeProto, TensorProto, helper, numpy_helper
from onnx.backend.test.loader import load_model_tests

import onnxslim.model
from onnxslim import ModelError, OutputError, load
from onnxslim.model_files import external_files, file_sha256, size_on_disk


def _backend_models():
    for kind in ("node", "simple", "pytorch-converted", "pytorch-operator"):
        for case in load_model_tests(kind=kind):
            if case.model is not None:
                yield case.name, case.model
            elif case.model_dir is not None:
                yield case.name, onnx.load(f"{case.model_dir}/model.onnx")


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
        if before.SerializeToString(deterministic=True) != after.SerializeToString(deterministic=True):
            different.append(name)
    assert count > 1500
    assert different == []


def test_backend_models_copy_identically():
    for name, proto in _backend_models():
        model = load(proto)
        assert model.copy().to_proto() == model.to_proto(), name


def _weight(name, *shape, seed=0):
    return numpy_helper.from_array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32), name)


def _rich_model():
    """A model with one of each thing that graphsurgeon would drop or choke on."""
    values = numpy_helper.from_array(np.array([1.5, -2.5], np.float32), "sparse")
    indices = numpy_helper.from_array(np.array([0, 3], np.int64), "sparse_indices")
    sparse = helper.make_sparse_tensor(values, indices, [4])
    add = helper.make_node("Add", ["x", "w"], ["sum"], name="add", doc_string="adds")
    add.metadata_props.add(key="origin", value="layer 1")
    odd = helper.make_node("Odd", ["sum", "sparse"], ["odd"], name="odd:1/ü", domain="custom.domain")
    odd.attribute.append(helper.make_attribute("empty", [], attr_type=AttributeProto.INTS))
    odd.attribute.append(AttributeProto(name="bytes", type=AttributeProto.STRING, s=b"\xff\xfe"))
    odd.attribute.append(helper.make_attribute("kind", helper.make_tensor_type_proto(TensorProto.FLOAT, [1])))
    odd.attribute.append(helper.make_attribute("tensors", [_weight("t0", 2), _weight("t1", 3)]))
    odd.attribute[0].doc_string = "nothing in it"
    text = helper.make_node("Constant", [], ["text"], value=helper.make_tensor("t", TensorProto.STRING, [1], [b"\xff"]))
    info = helper.make_tensor_value_info("sum", TensorProto.FLOAT, ["n", 4])
    info.metadata_props.add(key="scale", value="0.1")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4], doc_string="the input")
    x.type.denotation = "TENSOR"
    x.type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    graph = helper.make_graph(
        [add, odd, text],
        "rich",
        [x, helper.make_tensor_value_info("w", TensorProto.FLOAT, [4])],
        [
            helper.make_tensor_value_info("odd", TensorProto.FLOAT, None),
            helper.make_tensor_value_info("text", TensorProto.STRING, [1]),
        ],
        [_weight("w", 4), _weight("unused", 2)],
        doc_string="a graph",
        value_info=[info],
        sparse_initializer=[sparse],
    )
    note = graph.quantization_annotation.add(tensor_name="sum")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="w")
    graph.metadata_props.add(key="graph", value="meta")
    body = [helper.make_node("Mul", ["a", "a"], ["b"])]
    function = helper.make_function(
        "local", "Square", ["a"], ["b"], body, [helper.make_opsetid("", 18)], doc_string="f"
    )
    function.metadata_props.add(key="function", value="meta")
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("custom.domain", 3), helper.make_opsetid("local", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10, producer_name="p")
    model.domain, model.model_version, model.doc_string = "org.example", 7, "doc"
    helper.set_model_props(model, {"classes": "a,b", "empty": ""})
    return model


def test_nothing_that_graphsurgeon_lacks_is_lost():
    proto = _rich_model()
    assert _normal(load(proto).to_proto()) == _normal(proto)
    assert _normal(load(load(proto)).to_proto()) == _normal(proto)


def test_values_read_by_a_pass_are_written_back_unchanged():
    proto = _rich_model()
    model = load(proto)
    sums = [tensor.values.sum() for graph in model.graphs() for tensor in graph.initializers]
    assert len(sums) == 2
    assert _normal(model.to_proto()) == _normal(proto)


def test_values_are_read_only():
    constant = load(_rich_model()).graph.initializers[0]
    with pytest.raises(ValueError, match="read-only"):
        constant.values[0] = 1


def test_sparse_initializer_reads_dense():
    model = load(_rich_model())
    sparse = next(tensor for tensor in model.graph.initializers if tensor.name == "sparse")
    np.testing.assert_array_equal(sparse.values, np.array([1.5, 0, 0, -2.5], np.float32))


def _add_model(ir_version, opset):
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("w", "x")],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
        [_weight("w", 4)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def test_initializer_that_a_caller_may_override_is_not_constant():
    model = load(_add_model(8, 17))
    assert isinstance(model.graph.nodes[0].inputs[1], gs.Variable)
    assert [tensor.name for tensor in model.graph.inputs] == ["w", "x"]


def test_initializer_of_an_old_file_is_constant_and_stays_an_input():
    model = load(_add_model(3, 7))
    assert isinstance(model.graph.nodes[0].inputs[1], gs.Constant)
    model.graph.nodes[0].inputs[1] = gs.Constant("other", np.ones(4, np.float32))
    proto = model.to_proto()
    # IR version 3 demands that every initializer is an input, the new one too.
    assert [info.name for info in proto.graph.input] == ["x", "other"]
    onnx.checker.check_model(proto)


def _big_model(folder, size=300):
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "b"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", size])],
        [_weight("w", size, size), _weight("b", size)],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = folder / "model.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="weights.bin")
    return path, proto


def test_external_data_is_read_where_it_lies(tmp_path):
    path, proto = _big_model(tmp_path)
    onnx.load_external_data_for_model(proto, str(tmp_path))
    model = load(path)
    np.testing.assert_array_equal(
        model.graph.nodes[0].inputs[1].values, numpy_helper.to_array(proto.graph.initializer[0])
    )
    assert external_files(path) == [(tmp_path / "weights.bin").resolve()]
    assert size_on_disk(path) == path.stat().st_size + (tmp_path / "weights.bin").stat().st_size
    before = file_sha256(path)
    with (tmp_path / "weights.bin").open("r+b") as file:
        file.write(b"\x01")
    assert file_sha256(path) != before


def test_large_model_is_saved_with_its_weights_beside_it(tmp_path, monkeypatch):
    path, _ = _big_model(tmp_path)
    source = [path.read_bytes(), (tmp_path / "weights.bin").read_bytes()]
    monkeypatch.setattr(onnxslim.model, "_SINGLE_FILE_LIMIT", 1000)
    model = load(path)
    model.save(tmp_path / "out.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "model.onnx",
        "out.onnx",
        "out.onnx.data",
        "weights.bin",
    ]
    assert load(tmp_path / "out.onnx").to_proto() == model.to_proto()
    assert [path.read_bytes(), (tmp_path / "weights.bin").read_bytes()] == source


def test_save_never_replaces_the_weights_that_it_reads(tmp_path, monkeypatch):
    path, _ = _big_model(tmp_path)
    monkeypatch.setattr(onnxslim.model, "_SINGLE_FILE_LIMIT", 1000)
    load(path).save(tmp_path / "out.onnx")
    with pytest.raises(OutputError, match="holds the weights"):
        load(tmp_path / "out.onnx").save(tmp_path / "out.onnx")
    load(tmp_path / "out.onnx")


def test_save_into_a_missing_folder_is_one_clear_error(tmp_path):
    with pytest.raises(OutputError, match="cannot be written"):
        load(_rich_model()).save(tmp_path / "missing" / "out.onnx")


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname", "", "sub/../../weights.bin", "link.bin"])
def test_external_data_outside_the_folder_is_refused(tmp_path, location):
    folder = tmp_path / "model"
    folder.mkdir()
    path, _ = _big_model(folder)
    (tmp_path / "weights.bin").write_bytes((folder / "weights.bin").read_bytes())
    (folder / "link.bin").symlink_to(tmp_path / "weights.bin")
    proto = onnx.load(path, load_external_data=False)
    for entry in proto.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="outside the model's folder"):
        load(path)


def test_a_download_cache_of_links_is_read(tmp_path):
    """Model and weights are links into one folder of blobs, as hubs keep them."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    path, _ = _big_model(blobs)
    path.rename(blobs / "aaaa")
    (blobs / "weights.bin").rename(blobs / "bbbb")
    (snapshot / "model.onnx").symlink_to(blobs / "aaaa")
    (snapshot / "weights.bin").symlink_to(blobs / "bbbb")
    assert load(snapshot / "model.onnx").graph.nodes[0].inputs[1].values.shape == (300, 300)


def test_missing_and_truncated_external_data_are_named(tmp_path):
    path, _ = _big_model(tmp_path)
    weights = tmp_path / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(ModelError, match=r"tensor 'b'.*weights.bin' is too short"):
        load(path)
    weights.unlink()
    with pytest.raises(ModelError, match=r"tensor 'w'.*weights.bin' is missing"):
        load(path)


def test_external_data_needs_a_path(tmp_path):
    path, _ = _big_model(tmp_path)
    with pytest.raises(ModelError, match="pass the path"):
        load(path.read_bytes())


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x08", b"PK\x03\x04zip", bytes(range(256))])
def test_what_is_not_a_model_is_refused(tmp_path, content):
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="not an ONNX model"):
        load(path)


def test_truncated_missing_and_folder(tmp_path):
    path = tmp_path / "x.onnx"
    path.write_bytes(_rich_model().SerializeToString()[:-20])
    with pytest.raises(ModelError, match="truncated"):
        load(path)
    with pytest.raises(ModelError, match="No such file"):
        load(tmp_path / "missing.onnx")
    with pytest.raises(ModelError, match="directory"):
        load(tmp_path)


def test_fresh_names_are_new_everywhere():
    model = load(_rich_model())
    assert model.fresh_name("sum") == "sum_1"
    assert model.fresh_name("sum") == "sum_2"
    assert model.fresh_name("new") == "new"
    assert model.fresh_name("unused") == "unused_1"


def test_large_external_weights_stay_beside_the_model(tmp_path):
    """1 MB or more that were kept apart are kept apart; less, or what a pass made anew, goes into the file."""
    path, _ = _big_model(tmp_path, size=600)
    model = load(path)
    model.save(tmp_path / "apart.onnx")
    assert external_files(tmp_path / "apart.onnx") == [(tmp_path / "apart.onnx.data").resolve()]
    assert load(tmp_path / "apart.onnx").to_proto() == model.to_proto()
    for number, constant in enumerate(model.graph.initializers):
        constant.values = np.full(constant.shape, number, np.float32)
    model.save(tmp_path / "anew.onnx")
    small, _ = _big_model(tmp_path, size=300)
    load(small).save(tmp_path / "small.onnx")
    assert external_files(tmp_path / "anew.onnx") == external_files(tmp_path / "small.onnx") == []


def test_weights_that_went_missing_meanwhile_are_one_clear_error(tmp_path):
    path, _ = _big_model(tmp_path, size=600)
    model = load(path)
    (tmp_path / "weights.bin").write_bytes(b"short")
    with pytest.raises(ModelError, match=r"weights.bin: became shorter while the model was in use"):
        model.save(tmp_path / "out.onnx")
    assert not list(tmp_path.glob("*out.onnx*"))


def test_a_file_may_change_after_it_was_loaded(tmp_path):
    path = tmp_path / "m.onnx"
    proto = helper.make_model(helper.make_graph([], "g", [], [], [_weight("w", 400)]), ir_version=8)
    path.write_bytes(proto.SerializeToString())
    model = load(path)
    path.write_bytes(b"")
    assert model.to_proto() == proto


def test_a_proto_that_was_given_is_not_changed():
    proto = _rich_model()
    before = proto.SerializeToString()
    model = load(proto)
    for constant in model.constants():
        assert constant.values is not None
    copied = model.copy()
    copied.graph.nodes[0].outputs[0].name = "renamed"
    copied.graph.nodes.clear()
    copied.graph.functions.clear()
    copied.header.producer_name = "another"
    copied.to_proto()
    assert proto.SerializeToString() == before
    assert _normal(model.to_proto()) == _normal(proto)


def test_a_copy_shares_weights_and_nothing_else():
    body = helper.make_graph(
        [helper.make_node("Local", ["x"], ["b"], domain="local")], "b", [], [helper.make_empty_tensor_value_info("b")]
    )
    nodes = [helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)]
    inputs = [helper.make_tensor_value_info("x", 1, ["N"]), helper.make_tensor_value_info("c", 9, [])]
    outputs = [helper.make_tensor_value_info("y", 1, None)]
    function = helper.make_function(
        "local", "Local", ["a"], ["r"], [helper.make_node("Neg", ["a"], ["r"])], [helper.make_opsetid("", 17)]
    )
    proto = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs, [_weight("w", 400)]),
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("local", 1)],
        functions=[function],
    )
    model = load(proto.SerializeToString())
    copied = model.copy()
    originals = {id(item) for graph in model.graphs() for item in (graph, *graph.nodes, *graph.tensors().values())}
    for graph in copied.graphs():
        assert graph.functions is not model.graph.functions
        assert not originals & {id(item) for item in (graph, *graph.nodes, *graph.tensors().values())}
        for node in graph.nodes:  # links lead to the copy in both directions
            assert all(any(user is node for user in tensor.outputs) for tensor in node.inputs)
            assert all(any(maker is node for maker in tensor.inputs) for tensor in node.outputs)
    weights = [next(m.constants())._values for m in (model, copied)]
    assert weights[0] is weights[1]
    copied.graph.nodes[0].attrs["then_branch"].nodes[0].op = "Other"
    copied.graph.functions[0].nodes[0].op = "Abs"
    copied.graph.inputs[0].shape[0] = 7
    assert _normal(model.to_proto()) == _normal(proto)
