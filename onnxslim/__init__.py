"""onnxslim: make trained ONNX models smaller and faster, on any hardware, and show what it cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxslim.lazy import import_lazily

if TYPE_CHECKING:
    from onnxslim.errors import DataError, ModelError, OutputError, RecipeError, SlimError, TargetError
    from onnxslim.model import Model, load
    from onnxslim.optimize import Run, optimize
    from onnxslim.recipe import Goals, Recipe, read_recipe
    from onnxslim.slim import slim
    from onnxslim.targets import Bundle, compile

__version__ = "0.1.0"

__all__ = [
    "Bundle",
    "DataError",
    "Goals",
    "Model",
    "ModelError",
    "OutputError",
    "Recipe",
    "RecipeError",
    "Run",
    "SlimError",
    "TargetError",
    "compile",
    "load",
    "optimize",
    "read_recipe",
    "slim",
]

import_lazily(
    __name__,
    {
        "errors": ("DataError", "ModelError", "OutputError", "RecipeError", "SlimError", "TargetError"),
        "model": ("Model", "load"),
        "optimize": ("Run", "optimize"),
        "recipe": ("Goals", "Recipe", "read_recipe"),
        "slim": ("slim",),
        "targets": ("Bundle", "compile"),
    },
)
