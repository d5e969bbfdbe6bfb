"""What tuning has measured on this machine so far, in one file of the user's cache folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import onnxslim
from onnxslim.errors import OutputError
from onnxslim.model import atomic_write
from onnxslim.targets._tvm import PINS, load_tvm
from onnxslim.targets.catalogue import Target
from onnxslim.targets.runtime_libs import user_cache
from onnxslim.targets.tiling import Tile

__all__ = ["Database", "Verdict"]

_Rows = Annotated[int, Field(ge=1, le=64)]
_Vectors = Annotated[int, Field(ge=1, le=64)]
_Tile = tuple[_Rows, _Vectors]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Verdict(_Entry):
    """What is known of one workload.

    Attributes:
        best: the fastest tile, as rows and vectors; None: the one that is taken without tuning.
        tried: the tiles that were measured and need not be again.
    """

    best: _Tile | None = None
    tried: list[_Tile] = Field(default_factory=list)

    @property
    def tile(self) -> Tile | None:
        """The fastest tile; None: the one that is taken without tuning."""
        return None if self.best is None else Tile(*self.best)


class _File(_Entry):
    format: Literal[1] = 1
    processors: dict[str, dict[str, Verdict]] = Field(default_factory=dict)


class Database:
    """The verdicts for one target on this machine, kept by every :meth:`keep`.

    Attributes:
        path: the file, which holds those for other targets too.
        verdicts: by workload.
        notes: what the user should know: the file was damaged, or cannot be written.
    """

    def __init__(self, target: Target, path: Path | None = None) -> None:
        """Read the file; one that is missing or damaged holds nothing.

        Args:
            target: a resolved target.
            path: the file; default: ``tuning.json`` in the user's cache folder.
        """
        self.path = path or user_cache() / "tuning.json"
        self.notes: list[str] = []
        self._processor = _processor_key(target)
        self.verdicts = self._read().processors.get(self._processor, {})

    def keep(self, workload: str, verdict: Verdict) -> None:
        """Note a verdict and write the file, whole or not at all; what others wrote meanwhile stays in it."""
        self.verdicts[workload] = verdict
        stored = self._read()
        stored.processors.setdefault(self._processor, {})[workload] = verdict
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.path) as temporary:
                temporary.write_text(stored.model_dump_json(indent=1) + "\n", encoding="utf-8")
        except (OSError, OutputError):
            self._note(f"{self.path}: cannot be written, so what tuning found is used now and then forgotten")

    def _read(self) -> _File:
        try:
            return _File.model_validate_json(self.path.read_bytes())
        except FileNotFoundError:
            return _File()
        except (OSError, ValidationError):
            self._note(f"{self.path}: is damaged or of another version; tuning starts anew")
            return _File()

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _processor_key(target: Target) -> str:
    """A hash of what a measurement holds for: this processor, the code that is made for it, and who makes it."""
    about: dict[str, Any] = {
        "processor": str(load_tvm().get_global_func("target.llvm_get_system_cpu")()),
        "target": target.model_dump(mode="json", exclude={"name", "description", "runner", "link"}),
        "versions": {"onnxslim": onnxslim.__version__, **PINS},
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
