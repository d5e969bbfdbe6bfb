"""Rewrites of a model, one pass a file; each file is imported when a name of it is first asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxslim.passes.base import Change, Context, Outcome, Pass, Refusal
    from onnxslim.passes.factorize_low_rank import FactorizeLowRank
    from onnxslim.passes.fold_constants import FoldConstants
    from onnxslim.passes.prune_channels import PruneChannels
    from onnxslim.passes.quantize_static import QuantizeStatic
    from onnxslim.passes.registry import PASSES, find_pass, make_pass
    from onnxslim.passes.share_weights import ShareWeights
    from onnxslim.passes.simplify import Simplify

__all__ = [
    "PASSES",
    "Change",
    "Context",
    "FactorizeLowRank",
    "FoldConstants",
    "Outcome",
    "Pass",
    "PruneChannels",
    "QuantizeStatic",
    "Refusal",
    "ShareWeights",
    "Simplify",
    "find_pass",
    "make_pass",
]

_HOMES = {
    "base": ("Change", "Context", "Outcome", "Pass", "Refusal"),
    "factorize_low_rank": ("FactorizeLowRank",),
    "fold_constants": ("FoldConstants",),
    "prune_channels": ("PruneChannels",),
    "quantize_static": ("QuantizeStatic",),
    "registry": ("PASSES", "find_pass", "make_pass"),
    "share_weights": ("ShareWeights",),
    "simplify": ("Simplify",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
