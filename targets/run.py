#!/usr/bin/env python3
"""Run a compiled model on the device.  Needs only: pip install numpy apache-tvm-ffi (or apache-tvm); see README.txt.

python run.py inputs.npz [outputs.npz] [--threads N] [--repeat N]

inputs.npz holds one array for each input, by its name in manifest.json.  Without it, random inputs are used.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import statistics
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).resolve().parent


class Model:
    """The compiled model: call it with a dict of arrays, get a dict of arrays."""

    def __init__(self, folder: Path = FOLDER, threads: int = 0) -> None:
        os.environ.setdefault("TVM_BIND_THREADS", "0")
        os.environ.setdefault("TVM_NUM_THREADS", str(len(os.sched_getaffinity(0))))
        os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "2000")  # idle workers sleep after a millisecond or two
        os.environ.setdefault("TVM_USE_RUNTIME_LIB", "1")
        import tvm_ffi

        runtime = folder / "libtvm_runtime.so"
        if runtime.exists():
            self._runtime = ctypes.CDLL(str(runtime), ctypes.RTLD_GLOBAL)
        else:
            import tvm  # noqa: F401
        self._tensor = tvm_ffi.from_dlpack
        self.manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        tvm_ffi.get_global_func("runtime.config_threadpool")(1, threads)
        library = tvm_ffi.load_module(str(folder / "model.so"))
        self._vm = library["vm_load_executable"]()
        cpu, first, pooled = 1, 0, 2
        self._vm["vm_initialization"](cpu, first, pooled)
        self._weights = [self._tensor(array) for array in map_weights(folder / "weights.npy")]

    def __call__(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once."""
        arguments = [self._tensor(aligned(feed[entry["name"]], entry["dtype"])) for entry in self.manifest["inputs"]]
        entry = self.manifest["entry"]
        self._vm["set_input"](entry, *arguments, *self._weights)
        self._vm["invoke_stateful"](entry)
        count = self._vm["get_output_arity"](entry)
        values = [self._vm["get_output"](entry, *([] if count < 0 else [index])) for index in range(abs(count))]
        names = [output["name"] for output in self.manifest["outputs"]]
        return {name: np.from_dlpack(value).copy() for name, value in zip(names, values, strict=True)}

    def invoke(self) -> None:
        """Run again on the same inputs."""
        self._vm["invoke_stateful"](self.manifest["entry"])


def aligned(array: np.ndarray, dtype: str) -> np.ndarray:
    """A copy that starts at a multiple of 64 bytes, as compiled code expects."""
    array = np.asarray(array, dtype=dtype)
    raw = np.empty(array.nbytes + 64, dtype=np.uint8)
    start = -raw.ctypes.data % 64
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def map_weights(path: Path) -> list[np.ndarray]:
    """The arrays of a file of NumPy records, each at a multiple of 64 bytes; mapped, so read only when used.

    Raises:
        ValueError: the file is not whole.
    """
    if not path.stat().st_size:
        return []
    content = np.memmap(path, np.uint8, "c")  # private, and never written to
    arrays = []
    with path.open("rb") as file:
        while file.tell() < content.size:
            try:
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            except ValueError as error:
                raise ValueError(f"{path}: is damaged ({error})") from None
            start = file.tell()
            end = file.seek(math.prod(shape) * dtype.itemsize, os.SEEK_CUR)
            if end > content.size:
                raise ValueError(f"{path}: is truncated")
            arrays.append(content[start:end].view(dtype).reshape(shape))
    return arrays


def random_feed(manifest: dict[str, Any]) -> dict[str, np.ndarray]:
    """Inputs that fit the manifest; axes left open are 1."""
    rng = np.random.default_rng(0)
    feed = {}
    for entry in manifest["inputs"]:
        shape = [size if isinstance(size, int) else 1 for size in entry["shape"]]
        kind = np.dtype(entry["dtype"])
        feed[entry["name"]] = rng.random(shape).astype(kind) if kind.kind == "f" else np.zeros(shape, kind)
    return feed


def save(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an .npz; np.savez would stumble over an output called "file"."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(array).reshape(array.shape))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="?")
    parser.add_argument("outputs", nargs="?")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=0)
    options = parser.parse_args()
    try:
        model = Model(threads=options.threads)
    except (OSError, ValueError) as error:
        parser.exit(1, f"run.py: {error}\n")
    feed = dict(np.load(options.inputs)) if options.inputs else random_feed(model.manifest)
    outputs = model(feed)
    if options.outputs:
        save(options.outputs, outputs)
    else:
        for name, value in outputs.items():
            print(name, value.dtype, value.shape, value.ravel()[:8])
    times = []
    for _ in range(options.repeat):
        start = time.perf_counter()
        model.invoke()
        times.append((time.perf_counter() - start) * 1e3)
    if times:
        print(f"median_ms {statistics.median(times):.6f}\nmin_ms {min(times):.6f}\nruns {len(times)}")


if __name__ == "__main__":
    main()
