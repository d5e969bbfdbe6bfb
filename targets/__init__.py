"""Targets: a model in, a bundle that runs on a bare device out. Importing this loads neither TVM nor ONNX Runtime."""

from onnxslim.targets.bundle import Bundle, Manifest, TensorEntry
from onnxslim.targets.catalogue import TARGETS, Target, find_target, runs_here
from onnxslim.targets.compile import compile
from onnxslim.targets.coverage import unsupported_ops
from onnxslim.targets.runtime_libs import fetch_runtime
from onnxslim.targets.verify import Verification, verify

__all__ = [
    "TARGETS",
    "Bundle",
    "Manifest",
    "Target",
    "TensorEntry",
    "Verification",
    "compile",
    "fetch_runtime",
    "find_target",
    "runs_here",
    "unsupported_ops",
    "verify",
]
