"""Compile a model for a target: ONNX in, a bundle out."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from onnx import ModelProto

from onnxslim.errors import TargetError
from onnxslim.model import Model
from onnxslim.model_files import file_sha256
from onnxslim.targets import bundle as bundles
from onnxslim.targets._tvm import PINS, resolve_target
from onnxslim.targets.bundle import LIBRARY, MANIFEST, WEIGHTS, Bundle, Manifest, TensorEntry
from onnxslim.targets.catalogue import Target, find_target
from onnxslim.targets.coverage import scan
from onnxslim.targets.link import build_executable
from onnxslim.targets.lower import build_library, import_model, lower, output_signature
from onnxslim.targets.prepare import Prepared, Tensor, as_proto, prepare
from onnxslim.targets.runtime_libs import runtime_libraries
from onnxslim.targets.tune import Tuning, check_tunable
from onnxslim.targets.tune import tune as run_tuning

__all__ = ["compile"]

_COPY_RUNTIME = "(first copy libtvm_runtime.so and libtvm_ffi.so out of these packages into this folder)\n  "


def compile(
    model: Model | ModelProto | str | Path,
    target: str | Target = "native",
    *,
    shapes: dict[str, list[int]] | None = None,
    output: str | Path | None = None,
    tune: float | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Bundle:
    """Compile ``model`` for ``target`` and write a bundle.

    Quantized models (QuantizeLinear and DequantizeLinear) compile, but compute in float: their weights become float
    constants of the library.

    Args:
        model: an ONNX file, or a model in memory; it is not changed.
        target: a name of :data:`~onnxslim.targets.TARGETS`, or a target of your own.
        shapes: sizes of dynamic inputs, by input name. What stays open costs speed, and not every op can have it.
        output: folder to write, whole or not at all; a bundle that is there is replaced. Without it the bundle lives in
            a temporary folder as long as the returned object.
        tune: seconds to spend on measuring other tiles for convolutions and matrix products on this machine. What is
            found is kept in the user's cache folder, from where the next tuning goes on; 0 takes what is there. None:
            nothing is measured, and nothing taken from there, so that the same model becomes the same library.
        progress: called while tuning as ``progress(what, seconds so far, seconds)``.

    Raises:
        ModelError: the model cannot be read.
        TargetError: the target is unknown, or cannot take this model: the message names ops and nodes; or it is to be
            tuned for and cannot run here.
        OutputError: ``output`` cannot be written.
    """
    target = resolve_target(find_target(target) if isinstance(target, str) else target)
    if tune is not None:
        check_tunable(target)
    digest = _model_sha256(model)
    owner = None
    if output is None:
        owner = tempfile.TemporaryDirectory(prefix="onnxslim-bundle-")
        output = Path(owner.name) / "bundle"
    output = Path(output)

    def tuned(module: Any) -> Tuning:
        return Tuning() if tune is None else run_tuning(module, target, tune, progress=progress)

    _build(model, target, shapes or {}, output, digest, tuned)
    bundle = Bundle.load(output)
    bundle._owner = owner
    return bundle


def _build(
    model: Model | ModelProto | str | Path,
    target: Target,
    shapes: dict[str, list[int]],
    output: Path,
    digest: str,
    tuned: Callable[[Any], Tuning],
) -> None:
    start = time.perf_counter()
    prepared = prepare(as_proto(model), shapes)
    _refuse(prepared, target)
    try:
        module = import_model(prepared, target)
        tuning = tuned(module)
        lowered = lower(module, target, tuning.tiles)
    except TargetError as error:
        raise TargetError(f"{error}{_open_axes(prepared)}") from None
    outputs = [
        TensorEntry(name=tensor.name, dtype=dtype, shape=shape)
        for tensor, (dtype, shape) in zip(prepared.outputs, output_signature(module), strict=True)
    ]
    with bundles.new_folder(output) as stage:
        build_library(lowered.executable, stage / LIBRARY, target.link)
        bundles.write_weights(stage / WEIGHTS, lowered.weights)
        seconds = time.perf_counter() - start
        notes = [*prepared.notes, *tuning.notes, *lowered.notes, *_add_runtime(stage, target)]
        manifest = Manifest(
            model_sha256=digest,
            target=target,
            shapes=shapes,
            inputs=[_entry(tensor) for tensor in prepared.inputs],
            outputs=outputs,
            requires=dict(PINS),
            compile_seconds=round(seconds, 3),
            notes=notes,
            kernels=lowered.kernels,
            files={},
        )
        (stage / "README.txt").write_text(
            _readme(manifest, has_runtime=(stage / "libtvm_runtime.so").is_file()), encoding="utf-8"
        )
        manifest = manifest.model_copy(update={"files": bundles.hash_files(stage)})
        (stage / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _refuse(prepared: Prepared, target: Target) -> None:
    """Raise TargetError for what is known not to work, before any compiling."""
    missing = scan(prepared)
    if missing:
        listed = "; ".join(f"{op}: {_few(nodes)}" for op, nodes in sorted(missing.items()))
        raise TargetError(f"target {target.name}: TVM has no {listed}. Run this model in ONNX Runtime.")
    for tensor in prepared.inputs:
        if tensor.shape is None:
            raise TargetError(
                f"input {tensor.name!r} has no shape, not even a number of axes. "
                f"Add to the recipe, with your sizes:  [shapes]  {_toml_key(tensor.name)} = [1, …]"
            )


def _few(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _open_axes(prepared: Prepared) -> str:
    """The recipe lines that pin what was left open; empty when nothing was."""
    lines, axes = [], []
    for tensor in prepared.inputs:
        shape = tensor.shape or ()
        open_axes = [axis for axis, size in enumerate(shape) if isinstance(size, str)]
        if open_axes:
            axes.append(f"{tensor.name!r} axis {', '.join(map(str, open_axes))}")
            lines.append(f"{_toml_key(tensor.name)} = {[1 if isinstance(size, str) else size for size in shape]}")
    if not lines:
        return ""
    return f" Sizes are open: {'; '.join(axes)}. Add to the recipe, with your sizes:  [shapes]  {'  '.join(lines)}"


def _toml_key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name, ensure_ascii=False)


def _entry(tensor: Tensor) -> TensorEntry:
    return TensorEntry(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape or ())


def _add_runtime(stage: Path, target: Target) -> list[str]:
    """Put everything beside the library that a bare device needs; returns notes."""
    files = resources.files("onnxslim.targets")
    for name in ("run.py", "run.c"):
        (stage / name).write_bytes(files.joinpath(name).read_bytes())
    include = Path(_ffi_include())
    build_executable(stage / "run.c", [include], stage / "run", target.link)
    libraries = runtime_libraries(target.machine)
    for library in libraries:
        shutil.copyfile(library, stage / library.name)
    if libraries:
        return []
    return [
        f"TVM's runtime for {target.machine} is not in the bundle: run `onnxslim targets --fetch {target.name}` before "
        "compiling, or on the device: pip install apache-tvm"
    ]


def _ffi_include() -> str:
    from tvm_ffi import libinfo

    return str(libinfo.find_include_path())


def _readme(manifest: Manifest, *, has_runtime: bool) -> str:
    pins = " ".join(f"{package}=={version}" for package, version in manifest.requires.items())
    ffi = f"apache-tvm-ffi=={manifest.requires['apache-tvm-ffi']}"
    inputs = "\n".join(f"  {entry.name}: {entry.dtype} {list(entry.shape)}" for entry in manifest.inputs)
    outputs = "\n".join(f"  {entry.name}: {entry.dtype} {list(entry.shape)}" for entry in manifest.outputs)
    template = resources.files("onnxslim.targets").joinpath("readme.txt").read_text(encoding="utf-8")
    return template.format(
        target=manifest.target.name,
        description=manifest.target.description,
        machine=manifest.target.machine,
        flags=" ".join(sorted(manifest.target.cpu_flags)) or "any",
        inputs=inputs or "  none",
        outputs=outputs,
        python=f"pip install numpy {ffi}" if has_runtime else f"pip install numpy {pins}",
        native="" if has_runtime else _COPY_RUNTIME,
    )


def _model_sha256(model: Model | ModelProto | str | Path) -> str:
    if isinstance(model, str | Path):
        path = Path(model)
        return file_sha256(path) if path.is_file() else ""
    proto = model.to_proto() if isinstance(model, Model) else model
    return hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()
