"""Which nodes of one graph became which of another: told alike whatever the names are."""

import json

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

import onnxslim
from onnxslim.graph.difference import graph_difference

NET = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 3, 8, 8] x, bool flag) => (float[N, 4, 8, 8] y)
{
    c1 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w1)
    r1 = Relu (c1)
    c2 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r1, w2)
    s = Sigmoid (c2)
    m = Mul (s, r1)
    y = If (flag) <
        then_branch = t () => (float[N, 4, 8, 8] u) { e = Exp (m) u = Add (e, s) },
        else_branch = e () => (float[N, 4, 8, 8] v) { a = Abs (m) v = Mul (a, s) }
    >
}
"""


def _net(text=NET):
    proto = parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in (("w1", (4, 3, 3, 3)), ("w2", (4, 4, 3, 3))):
        if any(name in node.input for node in proto.graph.node):
            proto.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    return proto


def _renamed(proto):
    """The model with every tensor and node under another name."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    names = {"": ""}

    def new(name):
        return names.setdefault(name, f"other{len(names)}")

    def rename(graph):
        for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
            value.name = new(value.name)
        for node in graph.node:
            node.name = new(node.name) if node.name else "node" + new(node.output[0])
            node.input[:] = map(new, node.input)
            node.output[:] = map(new, node.output)
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    rename(attribute.g)

    rename(copy.graph)
    return copy


def _difference(a, b):
    return graph_difference(onnxslim.load(a), onnxslim.load(b))


def _told(found):
    return [(len(entry.places), entry.sentence) for entry in found.rewritten]


@pytest.fixture(params=[False, True], ids=["same names", "other names"])
def named(request):
    """Leave the second model as it is, or give all of it other names: what is told must not depend on it."""
    return _renamed if request.param else lambda proto: proto


def test_a_model_is_the_same_as_itself(named):
    net = _net()
    found = _difference(net, named(net))
    assert found.same and not found.rewritten and not found.changed and not found.tensors
    assert (found.nodes_before, found.nodes_after, found.matched) == (10, 10, 10)
    assert found.renamed == (0 if named(net) == net else 10)
    assert found.sentence.startswith("The same graph")


def test_names_of_inputs_and_outputs_are_told_and_are_no_difference():
    net = _net()
    found = _difference(net, _renamed(net))
    assert found.same
    assert [line.split(" is called ")[0] for line in found.interface] == [
        "input 0: 'x'",
        "input 1: 'flag'",
        "output 0: 'y'",
    ]


def test_one_changed_weight_is_one_change(named):
    net, other = _net(), _net()
    weight = numpy_helper.to_array(other.graph.initializer[1]) * 2
    other.graph.initializer[1].CopyFrom(numpy_helper.from_array(weight, "w2"))
    found = _difference(net, named(other))
    assert not found.same and not found.rewritten
    assert [(entry.op, entry.what) for entry in found.changed] == [("Conv", "input 1: other values")]
    assert found.matched == 10
    assert [(entry.status, entry.bytes_after) for entry in found.tensors] == []
    assert (found.constants_removed, found.constants_added) == (1, 1)
    assert found.bytes_added == weight.nbytes


def test_large_constants_are_told_with_their_bytes(small):
    net = onnx.load(small / "model.onnx")
    other = onnx.load(small / "model.onnx")
    weight = next(tensor for tensor in other.graph.initializer if tensor.name == "w2")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float16), "w2"))
    found = _difference(net, other)
    (entry,) = found.tensors
    assert (entry.status, entry.name) == ("changed", "w2")
    assert (entry.before, entry.after) == ("float32 [32, 16, 3, 3]", "float16 [32, 16, 3, 3]")
    assert entry.bytes_before == 2 * entry.bytes_after


def test_a_changed_attribute_is_told(named):
    other = _net(
        NET.replace("c2 = Conv <kernel_shape = [3, 3], pads", "c2 = Conv <kernel_shape = [3, 3], group = 1, pads")
    )
    assert _difference(_net(), named(other)).same, "an attribute at its default is no difference"
    text = NET.replace("pads = [1, 1, 1, 1]> (r1", "pads = [0, 2, 2, 0]> (r1")
    found = _difference(_net(), named(_net(text)))
    assert [(entry.op, entry.what) for entry in found.changed] == [
        ("Conv", "attribute pads: [1, 1, 1, 1] → [0, 2, 2, 0]")
    ]
    assert not found.rewritten


def test_an_inserted_node_is_one_piece(named):
    text = NET.replace("s = Sigmoid (c2)", "n = Neg (c2) s = Sigmoid (n)")
    found = _difference(_net(), named(_net(text)))
    assert _told(found) == [(1, "nothing became Neg")]
    assert found.matched == 10 and not found.changed
    back = _difference(named(_net(text)), _net())
    assert _told(back) == [(1, "Neg became nothing")]


def test_what_is_in_bodies_is_told(named):
    text = NET.replace("e = Exp (m)", "e = Sqrt (m)")
    found = _difference(_net(), named(_net(text)))
    assert _told(found) == [(1, "Exp became Sqrt")]
    assert found.matched == 9


def test_swapped_operands_matter_only_where_order_does():
    assert not _difference(_net(), _net(NET.replace("Mul (s, r1)", "Mul (r1, s)"))).changed
    text = NET.replace("m = Mul (s, r1)", "m = Sub (s, r1)")
    assert _difference(_net(text), _net(text.replace("Sub (s, r1)", "Sub (r1, s)"))).changed


def test_an_edge_that_leads_elsewhere_is_told():
    found = _difference(_net(), _net(NET.replace("Mul (a, s)", "Mul (a, c2)")))
    assert [(entry.op, entry.what) for entry in found.changed] == [("Mul", "input 1 reads something else")]


def test_constants_in_nodes_and_initializers_are_the_same():
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[N] x) => (float[N] y) {{ {} y = Mul (x, c) }}'
    node = parser.parse_model(text.format("c = Constant <value_floats = [2.0]> ()"))
    stored = parser.parse_model(text.format(""))
    stored.graph.initializer.append(numpy_helper.from_array(np.array([2], np.float32), "c"))
    assert _difference(node, stored).same


def test_a_model_against_its_slimmed_self(small, named):
    net = onnx.load(small / "model.onnx")
    found = _difference(net, named(onnxslim.slim(net)))
    assert sorted(_told(found)) == [(1, "Conv + BatchNormalization became Conv"), (1, "Identity became nothing")]
    conv = next(entry for entry in found.rewritten if "Conv" in entry.before)
    assert len(conv.places[0].before) == 2 and len(conv.places[0].after) == 1
    assert not found.changed


def test_what_was_computed_and_is_stored_now_is_called_constant():
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[2, 3] x) => (float[A, B] y) {{ {} y = Reshape (x, t) }}'
    before = parser.parse_model(text.format("s = Shape (x) i = Constant <value_ints = [1, 0]> () t = Gather (s, i)"))
    after = parser.parse_model(text.format("t = Constant <value_ints = [3, 2]> ()"))
    assert _told(_difference(before, after)) == [(1, "Shape + Gather became constant")]


def test_alike_pieces_are_counted_together():
    body = " ".join(f"i{k} = Identity ({'x' if k == 0 else f'r{k - 1}'}) r{k} = Relu (i{k})" for k in range(5))
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[N] x) => (float[N] r4) {{ {} }}'
    plain = " ".join(f"r{k} = Relu ({'x' if k == 0 else f'r{k - 1}'})" for k in range(5))
    found = _difference(parser.parse_model(text.format(body)), parser.parse_model(text.format(plain)))
    assert _told(found) == [(5, "Identity became nothing")]


def test_other_shapes_and_more_inputs_are_told():
    other = _net(NET.replace("float[N, 3, 8, 8] x", "float[2, 3, 8, 8] x, float z"))
    found = _difference(_net(), other)
    assert any(line.startswith("inputs: 2 (x, flag) → 3") for line in found.interface)
    assert not found.same
    found = _difference(_net(), _net(NET.replace("float[N, 3, 8, 8] x", "float[2, 3, 8, 8] x")))
    assert found.interface == ["input 'x': float32 [N, 3, 8, 8] → float32 [2, 3, 8, 8]"]


def test_functions_are_gone_through():
    text = """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
    g (float[N] x) => (float[N] y) {{ a = local.f (x) y = Neg (a) }}
    <domain: "local", opset_import: ["" : 17]> f (p) => (q) {{ t = {} (p) q = Abs (t) }}"""
    models = [parser.parse_model(text.format(op)) for op in ("Exp", "Sqrt")]
    assert _difference(models[0], models[0]).same
    assert _told(_difference(*models)) == [(1, "Exp became Sqrt")]


def test_a_graph_and_nothing_in_common():
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[N] x) => (float[N] y) { a = Exp (x) y = Neg (a) }'
    found = _difference(_net(), parser.parse_model(text))
    assert found.matched == 0
    assert sum(sum(entry.before.values()) for entry in found.rewritten) == 10


def test_the_same_two_models_give_the_same_text(small):
    net = onnx.load(small / "model.onnx")
    slimmed = onnxslim.slim(net)
    texts = {_difference(net, slimmed).model_dump_json() for _ in range(3)}
    assert len(texts) == 1


def test_compare_tells_graphs_apart_and_results_of_other_names(small, tmp_path, command):
    net = onnx.load(small / "model.onnx")
    onnx.save(_renamed(onnxslim.slim(net)), tmp_path / "other.onnx")
    code, out, err = command("compare", small / "model.onnx", tmp_path / "other.onnx")
    assert (code, err) == (0, "")
    assert "1 × Conv + BatchNormalization became Conv" in out
    _, out, _ = command("compare", small / "model.onnx", tmp_path / "other.onnx", "--json")
    found = json.loads(out)
    assert [entry["tensor"] for entry in found["outputs"]] == ["logits"]
    assert found["outputs"][0]["max_abs_error"] < 1e-4
    assert found["difference"]["matched"] == 7


def test_compare_needs_no_model_that_runs(tmp_path, command):
    head = '<ir_version: 8, opset_import: ["" : 17, "my" : 1]>'
    text = head + "g (float[N] x) => (float[N] y) {{ a = {} (x) y = my.Op (a) }}"
    for name, op in (("a", "Exp"), ("b", "Neg")):
        onnx.save(parser.parse_model(text.format(op)), tmp_path / f"{name}.onnx")
    code, out, _ = command("compare", tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert code == 0
    assert "not compared" in out and "Exp became Neg" in out
