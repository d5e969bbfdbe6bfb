"""What the runtimes for which int8 can be written take as int8, and fuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

__all__ = ["RUNTIMES", "Runtime", "RuntimeName"]

RuntimeName = Literal["onnxruntime", "onnxruntime-arm", "openvino", "tensorrt"]


@dataclass(frozen=True)
class Runtime:
    """How QuantizeLinear and DequantizeLinear are placed.

    Attributes:
        signed: activations are int8, not uint8.
        symmetric: the zero point of activations is 0.
        carries: results are quantized where they are made, and ops between layers run on codes; otherwise codes are
            only what layers with weights read, and the runtime moves them through the graph by itself.
        integer_bias: biases are int32 with a scale of their own, not float.
        moves_codes: a float layer that reads codes, and whose result becomes codes, has its weight rounded and is
            computed in int8 all the same; a float MaxPool whose result becomes codes is computed on codes.
        saturates: on x86 without VNNI its kernels add products in 16 bits, as ONNX Runtime's do there.
    """

    signed: bool
    symmetric: bool
    carries: bool
    integer_bias: bool
    moves_codes: bool = False
    saturates: bool = False

    @property
    def dtype(self) -> type[np.integer]:
        """Of activations."""
        return np.int8 if self.signed else np.uint8


RUNTIMES: dict[RuntimeName, Runtime] = {
    # A kernel is fused only if its result is quantized too. On x64 the kernels for uint8 are the fast ones.
    "onnxruntime": Runtime(
        signed=False,
        symmetric=False,
        carries=True,
        integer_bias=True,
        moves_codes=True,
        saturates=True,
    ),
    "onnxruntime-arm": Runtime(signed=True, symmetric=False, carries=True, integer_bias=True, moves_codes=True),
    # Every input of a layer is quantized; what follows it is fused without being told.
    "openvino": Runtime(signed=False, symmetric=False, carries=False, integer_bias=False, saturates=True),
    "tensorrt": Runtime(signed=True, symmetric=True, carries=False, integer_bias=False),
}
