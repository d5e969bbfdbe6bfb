"""Which rules to leave out, by our names or by those of the PyPI package ``onnxslim`` for the same rewrites."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from onnxslim.errors import RecipeError
from onnxslim.passes import Simplify
from onnxslim.suggest import unknown_name

__all__ = ["rules_to_skip"]

_FUSIONS = (
    "fuse-*",
    "fold-affine*",
    "fold-batchnorm*",
    "fold-pad",
    "fold-transpose-*",
    "lift-*",
    "move-*",
    "combine-*",
)

# Its name -> ours, as patterns. What has no rule here is never done, so there is nothing to leave out.
_THEIRS: Mapping[str, tuple[str, ...]] = {
    "constant_folding": ("fold-constants", "static-*", "fuse-shape", "cast-like", "inline-*"),
    "graph_fusion": _FUSIONS,
    "dead_node_elimination": ("dead-node", "drop-*"),
    "subexpression_elimination": ("merge-nodes", "merge-equal-*"),
    "weight_tying": ("merge-initializers",),
    "EliminationConcat": ("fuse-concats",),
    "EliminationReshape": ("fuse-reshapes",),
    "EliminationReshapeAs": ("static-reshape", "drop-reshape"),
    "EliminationSlice": ("fuse-slices",),
    "EliminationTranspose": ("fuse-transposes",),
    "EliminationTransposeViewTranspose": ("move-transpose*",),
    "EliminationTransposeAsReshape": ("transpose-*",),
    "EliminationUnsqueeze": ("fuse-unsqueezes", "fuse-squeeze*"),
    "FusionConcatReshape": ("static-reshape",),
    "FusionConvAdd": ("fold-affine*",),
    "FusionConvBN": ("fold-batchnorm*",),
    "FusionConvMul": ("fold-affine*",),
    "FusionConvTransposeAdd": ("fold-affine*",),
    "FusionConvTransposeBN": ("fold-batchnorm*",),
    "FusionConvTransposeMul": ("fold-affine*",),
    "FusionGemm": ("fuse-gemm", "lift-gemm"),
    "FusionGemmAdd": ("fuse-gemm-add",),
    "FusionGemmMul": ("fold-affine*",),
    "FusionPadConv": ("fold-pad",),
    "FusionReduce": ("fuse-reduce*",),
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
        patterns = _THEIRS.get(name, (name,))
        matching = [rule for rule in rules if any(fnmatchcase(rule, pattern) for pattern in patterns)]
        if name not in _THEIRS and name not in rules:
            raise RecipeError(unknown_name("rule", name, rules))
        found.update(matching)
    return frozenset(found)
