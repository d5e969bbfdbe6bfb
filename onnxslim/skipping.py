"""Which rules to leave out, by our names or by those of the PyPI package ``onnxslim`` for the same rewrites."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from onnxslim.errors import RecipeError
from onnxslim.passes import Simplify
from onnxslim.suggest import unknown_name

__all__ = ["rules_to_skip"]

# What belongs to none of these four is a fusion; the rest only tidies up.
_OPTIMIZATIONS: Mapping[str, tuple[str, ...]] = {
    "constant_folding": ("cast-like", "fold-constants", "fuse-shape", "inline-if", "static-*"),
    "dead_node_elimination": ("dead-node", "drop-*"),
    "subexpression_elimination": ("merge-equal-sizes", "merge-nodes"),
    "weight_tying": ("merge-initializers",),
}
_TIDYING = frozenset({"drop-unused", "hoist-constants"})

# Where there is no rule of ours for the same, there is nothing to leave out.
_PATTERNS: Mapping[str, tuple[str, ...]] = {
    "EliminationConcat": ("fuse-concats",),
    "EliminationReshape": ("fuse-reshapes", "fuse-views"),
    "EliminationReshapeAs": ("drop-reshape", "static-reshape"),
    "EliminationSlice": ("fuse-slices",),
    "EliminationTranspose": ("fuse-transposes",),
    "EliminationTransposeAsReshape": ("fuse-views",),
    "EliminationTransposeViewTranspose": ("fuse-views", "move-view"),
    "EliminationUnsqueeze": ("fuse-axes",),
    "FusionConcatReshape": ("static-reshape",),
    "FusionConvAdd": ("fold-affine", "fold-affine-forward"),
    "FusionConvBN": ("fold-batchnorm", "fold-batchnorm-forward"),
    "FusionConvMul": ("fold-affine", "fold-affine-forward"),
    "FusionConvTransposeAdd": ("fold-affine", "fold-affine-forward"),
    "FusionConvTransposeBN": ("fold-batchnorm", "fold-batchnorm-forward"),
    "FusionConvTransposeMul": ("fold-affine", "fold-affine-forward"),
    "FusionGemm": ("fuse-gemm", "lift-gemm"),
    "FusionGemmAdd": ("fuse-gemm-add",),
    "FusionGemmMul": ("fold-affine", "fold-affine-forward"),
    "FusionPadConv": ("fold-pad",),
    "FusionReduce": (),
}


def rules_to_skip(names: Iterable[str]) -> frozenset[str]:
    """The rules that names stand for.

    Args:
        names: rules of the pass ``simplify``; optimizations or fusion patterns of the PyPI package.

    Raises:
        RecipeError: a name is none of these; the message lists our rules.
    """
    rules = Simplify().rules()
    found: set[str] = set()
    for name in names:
        if name in rules:
            found.add(name)
        elif name in _OPTIMIZATIONS or name == "graph_fusion":
            found.update(rule for rule in rules if _optimization(rule) == name)
        elif name in _PATTERNS:
            found.update(_PATTERNS[name])
        else:
            raise RecipeError(unknown_name("rule", name, rules))
    return frozenset(found)


def _optimization(rule: str) -> str | None:
    """The optimization of the PyPI package that a rule of ours belongs to; None for one that only tidies up."""
    if rule in _TIDYING:
        return None
    matching = (name for name, patterns in _OPTIMIZATIONS.items() if any(fnmatchcase(rule, p) for p in patterns))
    return next(matching, "graph_fusion")
