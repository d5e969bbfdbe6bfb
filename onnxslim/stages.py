"""Stages of a run, kept by content hash: an interrupted run resumes, within a long pass too; a finished one is free."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError

import onnxslim
from onnxslim.errors import OutputError

__all__ = ["Draft", "StageCache", "content_key", "tool_fingerprint"]

logger = logging.getLogger(__name__)

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


@dataclass(frozen=True)
class Draft:
    """What a pass has found so far: a file of arrays to go on from after an interruption, or when tried weaker."""

    path: Path

    def load(self) -> dict[str, np.ndarray]:
        """The arrays as they were saved last; none where there is nothing that can be read."""
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return {}

    def save(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Replace what was saved, whole or not at all; where it cannot be written, the pass goes on without it."""
        written = self.path.with_suffix(".tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with written.open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
            written.replace(self.path)
        except OSError as error:
            logger.info("%s cannot be written (%s): an interrupted pass starts again", self.path, error.strerror)
            with contextlib.suppress(OSError):
                written.unlink()


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

    def drafts(self, key: str) -> Path:
        """Where drafts of what will be kept under a key may lie; :meth:`forget` removes them."""
        return self.folder / f"drafts-{key}"

    def forget(self, drafts: Path) -> None:
        """Remove drafts: what they were for is done."""
        shutil.rmtree(drafts, ignore_errors=True)

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
