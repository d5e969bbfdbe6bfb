"""Whether the int8 kernels of ONNX Runtime add products in 16 bits here, which saturate."""

from __future__ import annotations

import functools

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from onnxslim.runtime import Session

__all__ = ["kernels_saturate"]


@functools.cache
def kernels_saturate() -> bool:
    """Multiply the largest codes as a quantized MatMul does and see whether the sum is right.

    x86 processors without VNNI multiply uint8 by int8 with ``vpmaddubsw``, which adds two products in 16 bits.
    """
    size = 64
    scalars = {"one": np.float32(1), "step": np.float32(size << 8), "zero": np.uint8(0), "middle": np.int8(0)}
    weights = {"w": np.full((size, size), 127, np.int8), **scalars}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "one", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "one", "middle"], ["wd"]),
        helper.make_node("MatMul", ["xd", "wd"], ["y"]),
        helper.make_node("QuantizeLinear", ["y", "step", "zero"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "step", "zero"], ["z"]),
    ]
    graph = helper.make_graph(
        nodes,
        "saturation",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, size])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, size])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    feed = {"x": np.full((1, size), 255, np.float32)}
    exact, fused = (Session(model, optimize=optimize).run(feed)["z"] for optimize in (False, True))
    return not np.array_equal(exact, fused)
