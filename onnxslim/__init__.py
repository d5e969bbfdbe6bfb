"""onnxslim: make trained ONNX models smaller and faster, on any hardware, and show what it cost."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

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

# What is public lies in these modules, which are imported when a name of theirs is first asked for.
_HOMES = {
    "errors": ("DataError", "ModelError", "OutputError", "RecipeError", "SlimError", "TargetError"),
    "model": ("Model", "load"),
    "optimize": ("Run", "optimize"),
    "recipe": ("Goals", "Recipe", "read_recipe"),
    "slim": ("slim",),
    "targets": ("Bundle", "compile"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


class _Package(ModuleType):
    """The package itself: ``slim`` and ``optimize`` are functions of it and submodules, and the functions win."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _HOME_OF:  # the import system binds what it has imported
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
