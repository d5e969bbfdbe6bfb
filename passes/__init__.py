"""Rewrites of a model, one pass a file; each file is imported when a name of it is first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxslim.lazy import import_lazily

if TYPE_CHECKING:
    from onnxslim.passes.base import Change, Context, Outcome, Pass, Refusal
    from onnxslim.passes.convert_fp16 import ConvertFp16
    from onnxslim.passes.factorize_low_rank import FactorizeLowRank
    from onnxslim.passes.fold_constants import FoldConstants
    from onnxslim.passes.prune_channels import PruneChannels
    from onnxslim.passes.quantize_static import QuantizeStatic
    from onnxslim.passes.quantize_weights import QuantizeWeights
    from onnxslim.passes.registry import PASSES, find_pass, make_pass
    from onnxslim.passes.share_weights import ShareWeights
    from onnxslim.passes.simplify import Simplify

__all__ = [
    "PASSES",
    "Change",
    "Context",
    "ConvertFp16",
    "FactorizeLowRank",
    "FoldConstants",
    "Outcome",
    "Pass",
    "PruneChannels",
    "QuantizeStatic",
    "QuantizeWeights",
    "Refusal",
    "ShareWeights",
    "Simplify",
    "find_pass",
    "make_pass",
]

import_lazily(
    __name__,
    {
        "base": ("Change", "Context", "Outcome", "Pass", "Refusal"),
        "convert_fp16": ("ConvertFp16",),
        "factorize_low_rank": ("FactorizeLowRank",),
        "fold_constants": ("FoldConstants",),
        "prune_channels": ("PruneChannels",),
        "quantize_static": ("QuantizeStatic",),
        "quantize_weights": ("QuantizeWeights",),
        "registry": ("PASSES", "find_pass", "make_pass"),
        "share_weights": ("ShareWeights",),
        "simplify": ("Simplify",),
    },
)
