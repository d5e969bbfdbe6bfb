"""Packages whose names are imported when they are first asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

__all__ = ["import_lazily"]


def import_lazily(package: str, homes: Mapping[str, Sequence[str]]) -> None:
    """Let a package that is being imported find its public names in its submodules when they are first asked for.

    Args:
        package: its ``__name__``.
        homes: submodule -> the names that come from it. One may be the submodule's own name: it then stands for what
            is in the submodule, as it does after ``from package.name import name``.
    """
    module = sys.modules[package]
    module.__dict__["_home_of"] = {name: home for home, names in homes.items() for name in names}
    module.__class__ = _LazyPackage


class _LazyPackage(ModuleType):
    _home_of: dict[str, str]

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and self._home_of.get(name) == name:  # the import system binds submodules
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in self._home_of:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{self.__name__}.{self._home_of[name]}"), name)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *self._home_of})
