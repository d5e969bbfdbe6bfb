"""A bundle: one folder with a compiled model and all that a bare device needs to run it."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onnxslim.errors import DataError, OutputError, TargetError
from onnxslim.targets._tvm import config_threads, load_tvm
from onnxslim.targets.catalogue import Target, runs_here
from onnxslim.targets.run import map_weights

__all__ = [
    "LIBRARY",
    "MANIFEST",
    "WEIGHTS",
    "Bundle",
    "FileEntry",
    "KernelEntry",
    "Manifest",
    "TensorEntry",
    "hash_files",
    "new_folder",
    "write_weights",
]

MANIFEST = "manifest.json"
LIBRARY = "model.so"
WEIGHTS = "weights.npy"

_ALIGNMENT = 64  # what compiled code expects of the address of a tensor

_FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
_Size = Annotated[int, Field(ge=0)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorEntry(_Entry):
    """One input or output, by its name in the ONNX file; a string among the sizes is an axis of any size."""

    name: str
    dtype: str
    shape: tuple[_Size | str, ...]


class FileEntry(_Entry):
    """One file of the bundle."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: _Size


class KernelEntry(_Entry):
    """One function of the library, by the name under which it is called."""

    op: str = Field(description="its steps, such as 'convolution add relu'")
    shape: tuple[_Size | str, ...] = Field(description="of its result")
    flops: _Size | None = Field(description="floating-point operations of one call; None where sizes are open")
    bytes: _Size | None = Field(description="of all its arguments, the result included; None where sizes are open")
    writer: Literal["onnxslim", "tvm"] = Field(description="who wrote its loops")


class Manifest(_Entry):
    """What a bundle holds: ``manifest.json``."""

    format: Literal[1] = 1
    entry: str = "main"
    model_sha256: str
    target: Target
    shapes: dict[str, list[int]] = Field(default_factory=dict, description="sizes that were pinned")
    inputs: list[TensorEntry]
    outputs: list[TensorEntry]
    requires: dict[str, str] = Field(description="packages for the device, with versions")
    compile_seconds: float
    notes: list[str] = Field(default_factory=list)
    kernels: dict[str, KernelEntry] = Field(default_factory=dict)
    files: dict[_FileName, FileEntry]


class Bundle:
    """A compiled model on disk.

    Attributes:
        path: the folder.
        manifest: what is in it.
        threads: how many threads one inference may use; 0: every processor.
    """

    def __init__(self, path: Path, manifest: Manifest, *, threads: int = 0) -> None:
        self.path = path
        self.manifest = manifest
        self.threads = threads
        self._vm: Any = None
        self._weights: list[Any] = []
        self._owner: tempfile.TemporaryDirectory[str] | None = None

    @classmethod
    def load(cls, path: str | Path, *, threads: int = 0) -> Bundle:
        """Read a bundle and check every file of it against its hash.

        The hashes tell a damaged or mixed-up bundle, not a malicious one: its library is code that runs.

        Raises:
            TargetError: the folder is no bundle, is damaged, or names a file outside of itself.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        for name in (LIBRARY, WEIGHTS):
            if name not in manifest.files:
                raise TargetError(f"{path / MANIFEST}: lists no {name}. Compile the model again.")
        for name, entry in manifest.files.items():
            file = path / name
            if file.is_symlink() or not file.is_file():
                raise TargetError(f"{file}: is missing or not a plain file. Compile the model again.")
            if file.stat().st_size != entry.bytes or _sha256(file) != entry.sha256:
                raise TargetError(
                    f"{file}: is not the file that was compiled: its hash differs. Compile the model again."
                )
        return cls(path, manifest, threads=threads)

    @property
    def target(self) -> Target:
        """What it was compiled for."""
        return self.manifest.target

    @property
    def inputs(self) -> list[TensorEntry]:
        """What a feed must hold, in order."""
        return self.manifest.inputs

    @property
    def outputs(self) -> list[TensorEntry]:
        """What :meth:`run` returns, in order."""
        return self.manifest.outputs

    @property
    def notes(self) -> list[str]:
        """What its user should know about it."""
        return self.manifest.notes

    @property
    def size_bytes(self) -> int:
        """Bytes of all its files."""
        return (self.path / MANIFEST).stat().st_size + sum(entry.bytes for entry in self.manifest.files.values())

    @property
    def library_bytes(self) -> int:
        """Bytes of the compiled library and of its weights."""
        return self.manifest.files[LIBRARY].bytes + self.manifest.files[WEIGHTS].bytes

    @property
    def compile_seconds(self) -> float:
        """How long compiling took."""
        return self.manifest.compile_seconds

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the model once.

        Args:
            feed: one array for each input, by its ONNX name, of exactly its dtype and shape.

        Returns:
            The outputs by their ONNX names.

        Raises:
            DataError: the feed does not fit.
            TargetError: this machine cannot run it, or it fails.
        """
        arguments = self._arguments(feed)
        config_threads(self.threads)
        with _one_sentence(self.path):
            result = self._function()(*arguments, *self._weights)
        values = [result] if len(self.manifest.outputs) == 1 else list(result)
        names = [entry.name for entry in self.manifest.outputs]
        return {name: _to_numpy(value) for name, value in zip(names, values, strict=True)}

    def prepare(self, feed: Mapping[str, np.ndarray], *, threads: int | None = None) -> Callable[[], None]:
        """Return a function that runs the model on ``feed`` and drops the outputs: what to put between two clocks.

        Checks, copies and loading are done here, once. Several prepared functions may be called in turn.

        Args:
            feed: as of :meth:`run`.
            threads: instead of those of the bundle.

        Raises:
            DataError: the feed does not fit.
            TargetError: this machine cannot run it, or it fails.
        """
        arguments = self._arguments(feed)
        count = self.threads if threads is None else threads
        function = self._function()

        def call() -> None:
            config_threads(count)
            function(*arguments, *self._weights)

        with _one_sentence(self.path):
            call()
        return call

    def watch(self, observer: Callable[[str, bool], None]) -> None:
        """From now on, call ``observer(name, before)`` around every call that an inference makes.

        Names are those of kernels, and ``vm.builtin.…`` for what the runtime does: memory, shapes, checks.

        Raises:
            TargetError: this machine cannot run it.
        """

        def instrument(_function: Any, name: str, before: bool, *_: Any) -> int:
            observer(name, before)
            return 0  # do not skip the call

        self._virtual_machine().set_instrument(instrument)

    def check(self, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The arrays of a feed in the order of the inputs, contiguous.

        Raises:
            DataError: the feed does not fit.
        """
        return _check_feed(self.manifest.inputs, feed)

    def _function(self) -> Any:
        return self._virtual_machine()[self.manifest.entry]

    def _virtual_machine(self) -> Any:
        if self._vm is None:
            self._vm = self._open()
        return self._vm

    def _open(self) -> Any:
        if not runs_here(self.target):
            missing = ", ".join(sorted(self.target.cpu_flags)) or "none in particular"
            raise TargetError(
                f"{self.path}: compiled for {self.target.name} ({self.target.machine} Linux; CPU features: {missing}), "
                "which this machine is not. Copy it to the device and follow its README.txt."
            )
        tvm = load_tvm()
        import tvm_ffi
        from tvm import relax

        self._weights = [tvm_ffi.from_dlpack(array) for array in map_weights(self.path / WEIGHTS)]
        with _one_sentence(self.path):
            return relax.VirtualMachine(tvm.runtime.load_module(str(self.path / LIBRARY)), tvm.cpu())

    def _arguments(self, feed: Mapping[str, np.ndarray]) -> list[Any]:
        arrays = self.check(feed)
        tensor = load_tvm().runtime.tensor
        return [tensor(array) for array in arrays]


def _to_numpy(value: Any) -> np.ndarray:
    # A shape that is an output comes as TVM's own kind of tuple.
    return value.numpy() if hasattr(value, "numpy") else np.asarray(list(value), dtype=np.int64)


def _check_feed(entries: list[TensorEntry], feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    names = [entry.name for entry in entries]
    unknown = [name for name in feed if name not in names]
    missing = [name for name in names if name not in feed]
    if unknown or missing:
        said = [f"lacks {', '.join(map(repr, missing))}"] if missing else []
        said += [f"holds {', '.join(map(repr, unknown))}, which is no input"] if unknown else []
        raise DataError(f"the feed {' and '.join(said)}; the inputs are: {', '.join(names) or 'none'}.")
    symbols: dict[str, int] = {}
    arrays = []
    for entry in entries:
        array = np.asarray(feed[entry.name])
        if str(array.dtype) != entry.dtype:
            raise DataError(f"input {entry.name!r}: dtype {array.dtype}, but the model takes {entry.dtype}.")
        sizes = [symbols.get(size, size) if isinstance(size, str) else size for size in entry.shape]
        fits = array.ndim == len(sizes) and all(
            isinstance(size, str) or size == got for size, got in zip(sizes, array.shape, strict=True)
        )
        if not fits:
            raise DataError(f"input {entry.name!r}: shape {list(array.shape)}, but the model takes {sizes}.")
        symbols.update({s: n for s, n in zip(entry.shape, array.shape, strict=True) if isinstance(s, str)})
        arrays.append(np.ascontiguousarray(array).reshape(array.shape))
    return arrays


@contextmanager
def _one_sentence(path: Path) -> Iterator[None]:
    """TVM raises errors of every type, with many lines; make one sentence of them."""
    try:
        yield
    except TargetError:
        raise
    except Exception as error:
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        raise TargetError(f"{path}: the compiled model fails: {lines[-1] if lines else type(error).__name__}") from None


# ---------------------------------------------------------------------------------------------------------- on disk


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    try:
        return Manifest.model_validate_json(file.read_bytes())
    except OSError as error:
        raise TargetError(f"{path}: is no bundle: {MANIFEST} cannot be read ({error.strerror}).") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise TargetError(f"{file}: is no manifest of this version of onnxslim ({where}: {first['msg']}).") from None


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_files(folder: Path) -> dict[str, FileEntry]:
    """Every file of a folder with its hash, for the manifest."""
    files = sorted(file for file in folder.iterdir() if file.name != MANIFEST)
    return {file.name: FileEntry(sha256=_sha256(file), bytes=file.stat().st_size) for file in files}


def write_weights(path: Path, weights: Sequence[np.ndarray]) -> None:
    """Write arrays one after the other, as ``numpy.save`` does into an open file, each aligned for compiled code.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("wb") as file:
        for array in weights:
            fields = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
            header = repr(fields).encode()
            start = file.tell() + len(np.lib.format.magic(1, 0)) + 2  # two bytes hold the header's length
            header += b" " * (-(start + len(header) + 1) % _ALIGNMENT) + b"\n"
            file.write(np.lib.format.magic(1, 0) + len(header).to_bytes(2, "little") + header)
            file.write(np.ascontiguousarray(array).data)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``output`` when the block ends well, whole or not at all.

    A bundle or an empty folder that is there already is replaced.

    Raises:
        OutputError: something else is there, or it cannot be written.
    """
    if output.exists() and not _replaceable(output):
        raise OutputError(f"{output}: is there already and is not a bundle; choose another output.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise OutputError(f"{output}: cannot be written ({error.strerror}).") from None
    try:
        yield stage
        mask = os.umask(0)
        os.umask(mask)
        stage.chmod(0o777 & ~mask)
        _swap(stage, output)
    except OSError as error:
        raise OutputError(f"{output}: cannot be written ({error.strerror}).") from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _replaceable(output: Path) -> bool:
    """Whether a folder is empty, or a bundle and nothing else: a web page has a manifest.json too."""
    if output.is_symlink() or not output.is_dir():
        return False
    names = {file.name for file in output.iterdir()}
    try:
        return not names or names <= {MANIFEST, *_read_manifest(output).files}
    except TargetError:
        return False


def _swap(stage: Path, output: Path) -> None:
    if not output.exists():
        stage.rename(output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old.", dir=output.parent))
    try:
        output.rename(old / "bundle")
        try:
            stage.rename(output)
        except OSError:
            (old / "bundle").rename(output)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
