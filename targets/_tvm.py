"""The one door to TVM: imported when first needed, and only in the pair of versions that works together."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onnxslim.errors import TargetError
from onnxslim.runtime import usable_cores
from onnxslim.targets.catalogue import NATIVE_CPU, Target, host_cpu_flags

__all__ = [
    "PINS",
    "check_versions",
    "config_threads",
    "installed_runtime",
    "load_tvm",
    "resolve_target",
    "tvm_target",
]

PINS = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"}
"""TVM asks for any newer apache-tvm-ffi, but from 0.1.15 on it segfaults in ``Schedule.tensorize`` and JSON export."""

# How often an idle worker looks for work before it sleeps: for one or two milliseconds, longer than a kernel's gap.
_SPIN_COUNT = "2000"

# What LLVM takes for granted of a processor by its name, but a hypervisor may hide: LLVM's name -> the kernel's.
_HIDEABLE = {
    "amx-bf16": "amx_bf16",
    "amx-int8": "amx_int8",
    "amx-tile": "amx_tile",
    "avx": "avx",
    "avx2": "avx2",
    "avx512bf16": "avx512_bf16",
    "avx512bitalg": "avx512_bitalg",
    "avx512bw": "avx512bw",
    "avx512cd": "avx512cd",
    "avx512dq": "avx512dq",
    "avx512f": "avx512f",
    "avx512fp16": "avx512_fp16",
    "avx512ifma": "avx512ifma",
    "avx512vbmi": "avx512vbmi",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vl": "avx512vl",
    "avx512vnni": "avx512_vnni",
    "avx512vp2intersect": "avx512_vp2intersect",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avxvnni": "avx_vnni",
    "bmi": "bmi1",
    "bmi2": "bmi2",
    "f16c": "f16c",
    "fma": "fma",
    "fma4": "fma4",
    "gfni": "gfni",
    "vaes": "vaes",
    "vpclmulqdq": "vpclmulqdq",
    "xop": "xop",
}


def check_versions() -> None:
    """Check that the pinned pair of TVM packages is installed.

    Raises:
        TargetError: it is not; the message says the pip line that mends it.
    """
    wrong = []
    for package, wanted in PINS.items():
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found = "not installed"
        if found != wanted:
            wrong.append(f"{package} {wanted} ({found})")
    if wrong:
        pins = " ".join(f'"{package}=={version}"' for package, version in PINS.items())
        raise TargetError(f"compiling needs {' and '.join(wrong)}. Run: pip install {pins}")


@functools.cache
def load_tvm() -> Any:
    """Import TVM and return the module.

    Raises:
        TargetError: the versions do not fit, or it cannot be loaded.
    """
    if "tvm" not in sys.modules:
        check_versions()
        # TVM would pin the calling thread to few cores, which every thread that anyone starts later would inherit; it
        # would count half of the processors only; and its workers would keep a core busy for a quarter of a second
        # after each inference, from which whatever runs next suffers. All are read when its pool of threads starts.
        os.environ.setdefault("TVM_BIND_THREADS", "0")
        os.environ.setdefault("TVM_NUM_THREADS", str(usable_cores()))
        os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", _SPIN_COUNT)
    try:
        return importlib.import_module("tvm")
    except (ImportError, OSError, RuntimeError) as error:
        raise TargetError(
            f"TVM cannot be loaded ({_first_line(error)}). Is this Linux with glibc 2.28 or newer?"
        ) from None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@functools.cache
def _pool_configuration() -> Callable[..., None]:
    return load_tvm().get_global_func("runtime.config_threadpool")  # type: ignore[no-any-return]


def config_threads(threads: int) -> None:
    """Let the kernels that this thread calls from now on use ``threads`` threads; 0: every processor."""
    big_cores = 1
    _pool_configuration()(big_cores, threads)


def installed_runtime() -> list[Path]:
    """The small runtime libraries of the installed TVM: ``libtvm_ffi.so`` and ``libtvm_runtime.so`` (6 MB)."""
    load_tvm()
    tvm_ffi_info = importlib.import_module("tvm_ffi.libinfo")
    tvm_info = importlib.import_module("tvm.libinfo")
    return [Path(tvm_ffi_info.find_libtvm_ffi()), Path(tvm_info.find_libtvm_runtime())]


def resolve_target(target: Target) -> Target:
    """The target with this machine's processor and its CPU features filled in, if it is the native one.

    Raises:
        TargetError: TVM cannot be loaded, or this is not Linux.
    """
    if target.mcpu != NATIVE_CPU:
        return target
    if not sys.platform.startswith("linux"):
        raise TargetError(f"target {target.name!r}: compiling for {sys.platform} is not supported; Linux targets are.")
    tvm = load_tvm()
    codegen = importlib.import_module("tvm.target.codegen")
    options = {**target.tvm, "mcpu": str(tvm.get_global_func("target.llvm_get_system_cpu")())}
    expected = {str(feature) for feature in codegen.llvm_get_cpu_features(tvm.target.Target(options))}
    shown = host_cpu_flags()
    if target.machine != "x86_64" or not shown:
        return target.model_copy(update={"tvm": options})
    used = {name: flag for name, flag in _HIDEABLE.items() if name in expected}
    hidden = [f"-{name}" for name, flag in sorted(used.items()) if flag not in shown]
    if hidden:
        options["mattr"] = [*options.get("mattr", []), *hidden]
    return target.model_copy(update={"tvm": options, "cpu_flags": frozenset(used.values()) & shown})


def tvm_target(target: Target) -> Any:
    """The TVM target of a resolved target.

    Raises:
        TargetError: TVM or LLVM does not know it.
    """
    tvm = load_tvm()
    codegen = importlib.import_module("tvm.target.codegen")
    triple = target.tvm.get("mtriple")
    if "mcpu" in target.tvm and triple and not codegen.llvm_is_valid_cpu(target.mcpu, triple):
        raise TargetError(f"target {target.name!r}: LLVM knows no processor {target.mcpu!r} of {triple}.")
    try:
        return tvm.target.Target(dict(target.tvm))
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise TargetError(f"target {target.name!r}: TVM does not take {target.tvm} ({_first_line(error)}).") from None
