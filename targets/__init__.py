"""Targets: a model in, a bundle that runs on a bare device out. Importing this loads neither TVM nor ONNX Runtime,
nor the modules of this package before a name in them is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxslim.lazy import import_lazily

if TYPE_CHECKING:
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

import_lazily(
    __name__,
    {
        "bundle": ("Bundle", "Manifest", "TensorEntry"),
        "catalogue": ("TARGETS", "Target", "find_target", "runs_here"),
        "compile": ("compile",),
        "coverage": ("unsupported_ops",),
        "runtime_libs": ("fetch_runtime",),
        "verify": ("Verification", "verify"),
    },
)
