"""Padding in front of a layer and constants behind it become its own, and copies go: on codes nothing fuses them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from onnxslim.passes._rewriter import Rewriter
from onnxslim.passes._rules import Ledger, apply_rules
from onnxslim.passes._rules_activation import hard_swish_as_product
from onnxslim.passes._rules_affine import fold_affine
from onnxslim.passes._rules_batchnorm import batchnorm_as_conv
from onnxslim.passes._rules_gemm import product_as_gemm
from onnxslim.passes._rules_noop import COPY_RULES
from onnxslim.passes._rules_pad import PAD_RULES
from onnxslim.passes._rules_pool import mean_as_pool
from onnxslim.passes.base import Context, Outcome

if TYPE_CHECKING:
    from onnxslim.model import Model

__all__ = ["absorb"]


def absorb(model: Model, excluded: Callable[[gs.Node], bool], *, carries: bool) -> None:
    """Merge Pad nodes, factors and biases into layers, drop copies, and give what has int8 kernels their form.

    Args:
        model: rewritten in place.
        excluded: whether a node is to be left alone by its name or operator, so that it must keep them.
        carries: whether what runs the model fuses what is written on codes, as ONNX Runtime does: it has kernels for
            the parts of a HardSwish, not for the whole, and makes a Gemm of a product whose sizes are all known.
    """
    rewriter = Rewriter(model)
    as_gemm = product_as_gemm(excluded, any_rank=carries)
    rules = [*COPY_RULES, *PAD_RULES, as_gemm, fold_affine, batchnorm_as_conv, mean_as_pool]
    if carries and not any(node.op == "HardSwish" and excluded(node) for node in model.graph.nodes):
        rules.append(hard_swish_as_product)
    apply_rules(rewriter, rules, Ledger(Outcome(), Context()))
    rewriter.finish()
