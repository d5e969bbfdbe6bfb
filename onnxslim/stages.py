"""Stages of a run, kept by content hash: an interrupted run resumes, a finished one is free."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

import onnxslim
from onnxslim.errors import OutputError

__all__ = ["StageCache", "content_key", "tool_fingerprint"]

_Entry = TypeVar("_Entry", bound=BaseModel)
_VERSIONED = ("numpy", "onnx", "onnxruntime", "onnx-graphsurgeon", "apache-tvm", "apache-tvm-ffi")


@cache
def tool_fingerprint() -> dict[str, str]:
    """Versions of what computes, and a hash of our own source: a stage made by other code is not taken."""
    versions = {"onnxslim": onnxslim.__version__}
    for package in _VERSIONED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    digest = hashlib.sha256()
    from onnxslim import passes, targets

    for package_module in (onnxslim, passes, targets):
        folder = Path(str(package_module.__file__)).parent
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return versions | {"source": digest.hexdigest()[:16]}


def content_key(**parts: Any) -> str:
    """A hash of everything that a result depends on, the tool included."""
    text = json.dumps(parts | {"tool": tool_fingerprint()}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class StageCache:
    """A folder of results by key. Each is a folder with ``entry.json`` and what belongs to it, written whole or not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str, kind: type[_Entry]) -> tuple[_Entry, Path] | None:
        """Return the entry of a key and its folder; None where there is none that can be read."""
        folder = self.folder / key
        try:
            return kind.model_validate_json((folder / "entry.json").read_bytes()), folder
        except (OSError, ValidationError):
            return None

    @contextlib.contextmanager
    def workspace(self) -> Iterator[Path]:
        """Yield a folder to work in; :meth:`put` moves it into place, else it is removed."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix="tmp-", dir=self.folder))
        except OSError as error:
            raise OutputError(f"{self.folder}: cannot be written ({error.strerror}).") from None
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def put(self, key: str, entry: BaseModel, workspace: Path) -> Path:
        """Keep a workspace with its entry under a key; return where it lies now."""
        (workspace / "entry.json").write_text(entry.model_dump_json(indent=1), encoding="utf-8")
        folder = self.folder / key
        if folder.exists():
            shutil.rmtree(folder)
        workspace.replace(folder)
        return folder
