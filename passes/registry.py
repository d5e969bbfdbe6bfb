"""Every pass by name."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from onnxslim.errors import RecipeError
from onnxslim.passes.base import Pass
from onnxslim.passes.convert_fp16 import ConvertFp16
from onnxslim.passes.factorize_low_rank import FactorizeLowRank
from onnxslim.passes.fold_constants import FoldConstants
from onnxslim.passes.prune_channels import PruneChannels
from onnxslim.passes.quantize_static import QuantizeStatic
from onnxslim.passes.quantize_weights import QuantizeWeights
from onnxslim.passes.share_weights import ShareWeights
from onnxslim.passes.simplify import Simplify
from onnxslim.suggest import unknown_name

__all__ = ["PASSES", "find_pass", "make_pass"]

PASSES: dict[str, type[Pass]] = {
    kind.name: kind
    for kind in (
        FoldConstants,
        Simplify,
        PruneChannels,
        FactorizeLowRank,
        QuantizeStatic,
        QuantizeWeights,
        ConvertFp16,
        ShareWeights,
    )
}
"""Every pass by name, in the order in which they make sense."""


def find_pass(name: str) -> type[Pass]:
    """The pass of that name.

    Raises:
        RecipeError: there is none.
    """
    if name not in PASSES:
        raise RecipeError(unknown_name("pass", name, PASSES))
    return PASSES[name]


def make_pass(name: str, options: dict[str, Any]) -> Pass:
    """Build a pass from its name and options, as a recipe holds them.

    Raises:
        RecipeError: there is no such pass or option, or a value is of the wrong type or out of range.
    """
    kind = find_pass(name)
    try:
        return kind(**options)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]) if first["loc"] else "options"
        if first["type"] == "extra_forbidden":
            raise RecipeError(f"pass {name}: {unknown_name('option', option, kind.model_fields)}") from None
        raise RecipeError(f"pass {name}: {option} = {first['input']!r}: {first['msg']}.") from None
