"""Compiling with TVM and running what comes out, against ONNX Runtime."""

import json
import shutil
import struct
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from onnxslim.errors import DataError, OutputError, TargetError
from onnxslim.targets import Bundle, compile, find_target, unsupported_ops, verify
from onnxslim.targets.runtime_libs import runtime_libraries
from onnxslim.targets.verify import emulator


def weights(rng, *shape):
    return (rng.standard_normal(shape) * 0.3).astype(np.float32)


def graph_model(nodes, inputs, outputs, initializers, opset=17, domains=()):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in inputs],
        [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in outputs],
        [
            value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(value, name)
            for name, value in initializers
        ],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8 if opset < 21 else 10)


FLOAT = TensorProto.FLOAT
ODD_INPUT, ODD_OUTPUT = "in put/ö:0", "out: é/0"


def conv_net(opset=17):
    """Convolutions with padding, stride and groups, BatchNormalization, a residual, odd names and odd sizes.

    The second convolution is followed by the padding of the third, which must not be lost in tiling.
    """
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", [ODD_INPUT, "w::/ä.1", "1b"], ["c/1"], name="Conv//ü", pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c/1", "scale", "shift", "mean", "var"], ["n"]),
        helper.make_node("Relu", ["n"], ["r"]),
        helper.make_node("Conv", ["r", "w2"], ["c2"]),
        helper.make_node("Relu", ["c2"], ["r2"]),
        helper.make_node("Conv", ["r2", "w3"], ["c3"], pads=[1, 1, 1, 1], strides=[2, 2], group=8),
        helper.make_node("MaxPool", ["r"], ["m"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c3", "m"], ["s"]),
        helper.make_node("GlobalAveragePool", ["s"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "g", "gb"], ["gemm"], transB=1),
        helper.make_node("Softmax", ["gemm"], [ODD_OUTPUT], axis=1),
    ]
    initializers = [("w::/ä.1", weights(rng, 8, 3, 3, 3)), ("1b", weights(rng, 8)), ("scale", weights(rng, 8))]
    initializers += [("shift", weights(rng, 8)), ("mean", weights(rng, 8)), ("var", np.abs(weights(rng, 8)) + 0.1)]
    initializers += [("w2", weights(rng, 8, 8, 1, 1)), ("w3", weights(rng, 8, 1, 3, 3))]
    initializers += [("g", weights(rng, 5, 8)), ("gb", weights(rng, 5))]
    inputs = [(ODD_INPUT, FLOAT, ["batch size/2", 3, 17, 33])]
    return graph_model(nodes, inputs, [(ODD_OUTPUT, FLOAT, ["batch size/2", 5])], initializers, opset)


def feeds(shape, count=2, name=ODD_INPUT):
    rng = np.random.default_rng(1)
    return [{name: rng.standard_normal(shape).astype(np.float32)} for _ in range(count)]


@pytest.fixture(scope="module")
def pinned(tmp_path_factory):
    """The convolutional net compiled for this machine with its batch pinned to 2."""
    output = tmp_path_factory.mktemp("bundles") / "net"
    return compile(conv_net(), shapes={ODD_INPUT: [2, 3, 17, 33]}, output=output)


def test_conv_net_with_odd_names_agrees_with_onnxruntime(pinned):
    found = verify(pinned, conv_net(), feeds((2, 3, 17, 33)))
    assert found.ok, found.detail
    assert (found.status, found.where) == ("verified", "this machine")
    assert found.max_abs_error < 1e-5
    assert [entry.name for entry in pinned.inputs] == [ODD_INPUT]
    assert [(entry.name, entry.shape) for entry in pinned.outputs] == [(ODD_OUTPUT, (2, 5))]
    assert pinned.compile_seconds > 0
    assert pinned.target.mcpu != "native"


def test_verification_can_fail(pinned):
    other = conv_net()
    changed = numpy_helper.to_array(other.graph.initializer[0]).copy()
    changed[0, 0, 0, 0] += 0.2
    other.graph.initializer[0].CopyFrom(numpy_helper.from_array(changed, other.graph.initializer[0].name))
    found = verify(pinned, other, feeds((2, 3, 17, 33)))
    assert not found.ok
    assert found.status == "failed"
    assert ODD_OUTPUT in found.detail
    with pytest.raises(DataError, match="at least one feed"):
        verify(pinned, conv_net(), [])


def test_prepared_call_runs_on_any_number_of_threads(pinned):
    feed = feeds((2, 3, 17, 33))[0]
    for threads in (1, 2, 0):
        call = Bundle.load(pinned.path, threads=threads).prepare(feed)
        assert call() is None
    with pytest.raises(DataError, match="shape"):
        pinned.prepare(feeds((1, 3, 17, 33))[0])


def test_bundle_runs_without_onnxslim_by_python_and_without_python(pinned, tmp_path):
    feed = feeds((2, 3, 17, 33))[0]
    expected = pinned.run(feed)[ODD_OUTPUT]
    device = tmp_path / "device"
    shutil.copytree(pinned.path, device)
    np.savez(tmp_path / "in.npz", **feed)
    command = [sys.executable, "-I", str(device / "run.py"), str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]
    done = subprocess.run([*command, "--threads", "1", "--repeat", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "median_ms" in done.stdout
    np.testing.assert_array_equal(np.load(tmp_path / "out.npz")[ODD_OUTPUT], expected)
    np.save(tmp_path / "in.npy", feed[ODD_INPUT])
    done = subprocess.run(
        [str(device / "run"), str(device), str(tmp_path), "--repeat", "2", str(tmp_path / "in.npy")],
        capture_output=True,
        text=True,
        env={},
    )
    assert done.returncode == 0, done.stderr
    assert "median_ms" in done.stdout
    np.testing.assert_array_equal(np.load(tmp_path / "0.npy"), expected)
    readme = (device / "README.txt").read_text()
    assert "apache-tvm-ffi==0.1.14.post1" in readme
    assert ODD_INPUT in readme


def test_native_runner_refuses_wrong_input(pinned, tmp_path):
    np.save(tmp_path / "in.npy", np.zeros((1, 3), np.float32))
    command = [str(pinned.path / "run"), str(pinned.path), str(tmp_path), str(tmp_path / "in.npy")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("run: ")


def test_open_batch_compiles_and_runs_at_several_sizes():
    bundle = compile(conv_net(opset=9))
    assert bundle.inputs[0].shape == ("batch_size_2", 3, 17, 33)
    for size in (1, 3):
        found = verify(bundle, conv_net(opset=9), feeds((size, 3, 17, 33), count=1))
        assert found.ok, found.detail


def test_open_axis_that_tvm_cannot_compile_asks_for_shapes():
    text = """<ir_version: 8, opset_import: ["" : 13]> g (float[N, 3] x, float[M, 3] z) => (int64[K, 2] y) {
        a = NonZero (x) b = Transpose (a) w = Concat <axis = 0> (x, z) s = Shape (w) d = ConstantOfShape (s)
        e = Tile (x, s) f = NonZero (e) y = Transpose (f)
    }"""
    with pytest.raises(TargetError, match=r"'x' axis 0; 'z' axis 0.*\[shapes\]  x = \[1, 3\]  z = \[1, 3\]"):
        compile(parser.parse_model(text))


def quantized_net():
    """QDQ as our quantizer writes it: uint8 activations, clipped codes, int8 weights per channel, int32 bias."""
    rng = np.random.default_rng(0)
    nodes, initializers = [], []

    def quantize(name, scale, zero):
        initializers.extend([(f"{name}_s", np.float32(scale)), (f"{name}_z", np.uint8(zero))])
        nodes.append(helper.make_node("QuantizeLinear", [name, f"{name}_s", f"{name}_z"], [f"{name}_q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", f"{name}_s", f"{name}_z"], [f"{name}_d"]))
        return f"{name}_d"

    weight = weights(rng, 16, 3, 3, 3)
    scale = (np.abs(weight).max((1, 2, 3)) / 127).astype(np.float32)
    x = quantize("x", 0.02, 128)
    initializers += [("w", np.round(weight / scale[:, None, None, None]).astype(np.int8)), ("ws", scale)]
    initializers += [("wz", np.zeros(16, np.int8)), ("b", rng.integers(-99, 99, 16).astype(np.int32))]
    initializers += [("bs", scale * np.float32(0.02)), ("bz", np.zeros(16, np.int32))]
    nodes.append(helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0))
    nodes.append(helper.make_node("DequantizeLinear", ["b", "bs", "bz"], ["bd"], axis=0))
    nodes.append(helper.make_node("Conv", [x, "wd", "bd"], ["c"], pads=[1, 1, 1, 1]))
    nodes.append(helper.make_node("Relu", ["c"], ["r"]))
    y = quantize("r", 0.012, 0)
    initializers += [("low", np.uint8(20)), ("high", np.uint8(90))]
    nodes.append(helper.make_node("Clip", ["r_q", "low", "high"], ["gate_q"]))
    nodes.append(helper.make_node("DequantizeLinear", ["gate_q", "r_s", "r_z"], ["gate"]))
    nodes.append(helper.make_node("Mul", [y, "gate"], ["gated"]))
    nodes.append(helper.make_node("GlobalAveragePool", ["gated"], ["y"]))
    inputs = [("x", FLOAT, ["N", 3, 16, 16])]
    return graph_model(nodes, inputs, [("y", FLOAT, ["N", 16, 1, 1])], initializers, 13)


def test_quantized_model_compiles_and_agrees_to_a_few_quanta():
    bundle = compile(quantized_net(), shapes={"x": [1, 3, 16, 16]})
    found = verify(bundle, quantized_net(), feeds((1, 3, 16, 16), 4, "x"))
    assert found.ok, found.detail
    assert found.sqnr_db is None or found.sqnr_db > 30
    other = quantized_net()
    bias = next(t for t in other.graph.initializer if t.name == "b")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 999, "b"))
    assert not verify(bundle, other, feeds((1, 3, 16, 16), 4, "x")).ok


def test_many_kinds_of_inputs_and_outputs():
    """A constant, a shape, an input and an If as outputs; scalars, bools and weights in Constant nodes."""
    text = """<ir_version: 8, opset_import: ["" : 13]>
    g (float[N, 4] x, int64 k, bool c) => (float[N, 2] y, float[2] same, int64[2] s, int64 j, bool n, float[N, 4] z) {
        w = Constant <value = float[4, 2] {1, 2, 3, 4, 5, 6, 7, 8}> ()
        same = Constant <value_floats = [1.0, 2.0]> ()
        h = MatMul (x, w)
        y = Add (h, same)
        s = Shape (x)
        j = Add (k, k)
        n = Not (c)
        z = If (c) <
            then_branch = t () => (float[M, 4] p) { two = Constant <value_floats = [2.0]> () p = Mul (x, two) },
            else_branch = e () => (float[M, 4] q) { q = Neg (x) }>
    }"""
    proto = parser.parse_model(text)
    bundle = compile(proto)
    rng = np.random.default_rng(0)
    wanted = [
        {"x": weights(rng, rows, 4), "k": np.array(5), "c": np.array(flag)} for rows, flag in ((3, True), (1, False))
    ]
    found = verify(bundle, proto, wanted)
    assert found.ok, found.detail


# ---------------------------------------------------------------------------------------------------------- refusals


def test_unsupported_ops_are_named_with_their_nodes_and_refused():
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("LSTM", ["x", "w", "r"], ["h"], hidden_size=4, clip=1.0, name="encoder/lstm"),
        helper.make_node("Gelu", ["h"], ["g"], domain="com.microsoft", name="act"),
        helper.make_node("Relu", ["g"], ["y"]),
    ]
    proto = graph_model(
        nodes,
        [("x", FLOAT, [2, 1, 3])],
        [("y", FLOAT, [2, 1, 1, 4])],
        [("w", weights(rng, 1, 16, 3)), ("r", weights(rng, 1, 16, 4))],
        domains=["com.microsoft"],
    )
    # The importer knows a Gelu, but not this one.
    assert unsupported_ops(proto) == {"LSTM (clip)": ["encoder/lstm"], "com.microsoft.Gelu": ["act"]}
    with pytest.raises(TargetError, match=r"TVM has no LSTM \(clip\): encoder/lstm; com\.microsoft\.Gelu: act"):
        compile(proto)


def test_unsupported_ops_are_found_in_bodies_and_unnamed_nodes():
    text = """<ir_version: 8, opset_import: ["" : 13]> g (bool c, float[2, 3] x) => (float[2, 3] y) {
        y = If (c) <
            then_branch = t () => (float[2, 3] p) { p = Bernoulli (x) },
            else_branch = e () => (float[2, 3] q) { q = Neg (x) }>
    }"""
    assert unsupported_ops(parser.parse_model(text)) == {"Bernoulli": ["(unnamed, makes 'p')"]}


def test_int4_that_is_no_constant_sequences_and_ignored_attributes_are_unsupported():
    zero = helper.make_tensor("z", TensorProto.INT4, (), [0])
    proto = graph_model(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="quant"),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], name="dequant"),
        ],
        [("x", FLOAT, [4])],
        [("y", FLOAT, [4])],
        [("s", np.float32(0.1)), ("z", zero)],
        opset=21,
    )
    assert unsupported_ops(proto) == {
        "QuantizeLinear (int4 input)": ["quant"],
        "DequantizeLinear (int4 input)": ["dequant"],
    }
    text = """<ir_version: 8, opset_import: ["" : 13]>
    g (float[4, 6] x) => (seq(float[4, 1]) s) { s = SplitToSequence <axis = 1> (x) }"""
    assert unsupported_ops(parser.parse_model(text)) == {"input or output of type sequence": ["s"]}
    resize = graph_model(
        [helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], name="up", axes=[2, 3])],
        [("x", FLOAT, [1, 1, 4, 4])],
        [("y", FLOAT, [1, 1, 8, 8])],
        [("sizes", np.array([8, 8]))],
        opset=18,
    )
    assert unsupported_ops(resize) == {"Resize (axes)": ["up"]}


def test_blockwise_int4_weights_compile_because_they_are_constants():
    indices = (np.arange(32) % 16 - 8).reshape(8, 4)
    rng = np.random.default_rng(0)
    proto = graph_model(
        [
            helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=0, block_size=4),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ],
        [("x", FLOAT, ["N", 8])],
        [("y", FLOAT, ["N", 4])],
        [
            ("q", helper.make_tensor("q", TensorProto.INT4, (8, 4), indices.ravel().tolist())),
            ("s", np.abs(weights(rng, 2, 4))),
        ],
        opset=21,
    )
    assert unsupported_ops(proto) == {}
    bundle = compile(proto)
    assert verify(bundle, proto, feeds((3, 8), 1, "x")).ok


def test_an_error_of_the_importer_names_op_and_node_in_one_line():
    text = """<ir_version: 8, opset_import: ["" : 13]> g (float[1, 6] x, int64[1] k) => (float[1, K] v) {
        v, i = TopK (x, k)
    }"""
    with pytest.raises(TargetError, match=r"^TVM cannot import TopK \(node \(unnamed, makes 'v'\)\): [^\n]+$"):
        compile(parser.parse_model(text))


# ------------------------------------------------------------------------------------------------------ other targets


def test_arm_library_is_an_aarch64_elf_with_the_entry_points(tmp_path):
    model = conv_net()
    bundle = compile(model, "raspberry-pi-4", shapes={ODD_INPUT: [1, 3, 17, 33]}, output=tmp_path / "pi")
    for name, kind in (("model.so", 3), ("run", None)):
        header = (tmp_path / "pi" / name).read_bytes()[:20]
        assert header[:6] == b"\x7fELF\x02\x01"
        file_type, machine = struct.unpack("<HH", header[16:20])
        assert machine == 183
        assert kind is None or file_type == kind
    library = (tmp_path / "pi" / "model.so").read_bytes()
    assert b"__tvm_ffi__library_bin" in library
    convolutions = [name for name, kernel in bundle.manifest.kernels.items() if "convolution" in kernel.op]
    assert convolutions and all(f"__tvm_ffi_{name}".encode() in library for name in convolutions)
    found = verify(bundle, model, feeds((1, 3, 17, 33), 1))
    if emulator(find_target("raspberry-pi-4")) and runtime_libraries("aarch64"):
        assert (found.status, found.where) == ("verified", "qemu-aarch64"), found.detail
    else:
        assert (found.status, found.ok, found.where) == ("compiled, not run", False, "")
        assert found.detail


def test_unknown_processor_is_refused():
    odd = find_target("x86-64-v3").model_copy(
        update={"tvm": {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "z80"}}
    )
    with pytest.raises(TargetError, match="LLVM knows no processor 'z80'"):
        compile(conv_net(), odd)


# -------------------------------------------------------------------------------------------------------------- files


def test_the_manifest_pins_what_the_device_needs_and_only_a_bundle_is_replaced(tmp_path):
    text = '<ir_version: 8, opset_import: ["" : 13]> g (float[2] x) => (float[2] y) { y = Relu (x) }'
    compile(parser.parse_model(text), output=tmp_path / "a")
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["requires"] == {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"}
    compile(parser.parse_model(text), output=tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    page = tmp_path / "page"
    page.mkdir()
    (page / "manifest.json").write_text('{"name": "a web page"}')
    for folder in (tmp_path / "a", page):
        with pytest.raises(OutputError, match="not a bundle"):
            compile(parser.parse_model(text), output=folder)
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"
    assert [file.name for file in page.iterdir()] == ["manifest.json"]
