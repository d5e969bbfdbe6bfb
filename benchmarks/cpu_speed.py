"""Compile models for a CPU and time the bundles beside ONNX Runtime, in one run: no tuning, batch 1, the same threads.

Each model is simplified once; ONNX Runtime with all of its optimisations and the bundle then run the same file on the
same inputs, in turns, in one process that is pinned to as many cores as it may use threads. Each number of threads has
a process of its own, and so have the two runtimes where their peak memory is read. The error is the largest difference
of any output, relative to the largest magnitude of that output.

Run as ``python benchmarks/cpu_speed.py MODEL_OR_FOLDER …``; with ``--export FOLDER`` eight well-known architectures are
written there with random weights and measured too. With ``--targets x86-64-v2 cortex-a72`` the models are compiled for
these instead, checked against ONNX Runtime (under QEMU where this machine is another), and the instructions of one
inference are counted; QEMU 7 or 8 and a C compiler are needed for that, and the column is empty without.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Nothing heavy is imported up here: processes whose memory is read start from this file too.

_SEQUENCE, _IMAGE = 128, 224
# What a model is used with, where its axes are open: a part of its file name -> sizes of its inputs.
_SHAPES = {
    "PP-OCRv4_det": {"x": [1, 3, 640, 640]},
    "PP-OCRv4_rec": {"x": [1, 3, 48, 320]},
    "mobile_v2.0_cls": {"x": [1, 3, 48, 192]},
    "silero_vad.": {"input": [1, 512], "state": [2, 1, 128]},
    "g2p": {"graphemes": [8, 1]},
}
_SAMPLING_RATE = 16000  # the one input of the zoo that has a meaning and no axes
_SLICE_SECONDS = 0.08
_PAUSE_SECONDS = 0.02
_EMULATION_SECONDS = 1800.0


# --------------------------------------------------------------------------------------- what runs in other processes


def _slim(model: str, output: str, shapes: dict[str, list[int]], feed: str) -> dict[str, Any]:
    """Simplify a model, decide on sizes for its inputs and make up values for them."""
    import numpy as np

    import onnxslim
    from onnxslim.runtime import Session

    onnxslim.slim(model, output)
    preset = next((sizes for part, sizes in _SHAPES.items() if part in Path(model).name), {})
    chosen: dict[str, list[int]] = {}
    arrays = {}
    rng = np.random.default_rng(0)
    for name, spec in Session(output).inputs.items():
        sizes = shapes.get(name) or preset.get(name) or _sizes(spec)
        if any(not isinstance(size, int) for size in spec.shape or []):
            chosen[name] = sizes
        arrays[name] = _values(name, spec, sizes, rng)
    np.savez(feed, **{f"feed:{name}": array for name, array in arrays.items()})
    return {"shapes": chosen, "inputs": {name: list(array.shape) for name, array in arrays.items()}}


def _sizes(spec: Any) -> list[int]:
    image = len(spec.shape) == 4
    return [
        size if isinstance(size, int) else 1 if axis == 0 else _IMAGE if image else _SEQUENCE
        for axis, size in enumerate(spec.shape)
    ]


def _values(name: str, spec: Any, sizes: list[int], rng: Any) -> Any:
    import numpy as np

    if spec.dtype.kind == "f":
        return rng.standard_normal(sizes).astype(spec.dtype)
    if not sizes:
        return np.asarray(_SAMPLING_RATE, spec.dtype)
    if "mask" in name or "type" in name:
        return np.full(sizes, "mask" in name).astype(spec.dtype)
    return rng.integers(0, 2 if spec.dtype.kind == "b" else 28, sizes).astype(spec.dtype)


def _load_feed(feed: str) -> dict[str, Any]:
    import numpy as np

    with np.load(feed) as arrays:
        return {name.removeprefix("feed:"): arrays[name] for name in arrays.files}


def _compile(model: str, target: str, shapes: dict[str, list[int]], output: str) -> dict[str, Any]:
    from onnxslim.targets import compile as compile_model

    start = time.perf_counter()
    bundle = compile_model(model, target, shapes=shapes, output=output)
    return {"seconds": time.perf_counter() - start, "notes": bundle.notes}


def _session(model: str, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _time(model: str, bundle: str, feed: str, threads: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of both, in slices that take turns: workers of a runtime spin for a while after its last run."""
    from onnxslim.targets import Bundle

    inputs = _load_feed(feed)
    session = _session(model, threads)
    compiled = Bundle.load(bundle, threads=threads)
    names = [output.name for output in session.get_outputs()]
    expected = dict(zip(names, session.run(None, inputs), strict=True))
    taken = {entry.name: inputs[entry.name] for entry in compiled.inputs}
    error = _error(expected, compiled.run(taken))
    calls: dict[str, Callable[[], object]] = {
        "bundle": compiled.prepare(taken),
        "onnxruntime": lambda: session.run(None, inputs),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in sorted(calls, reverse=bool(number % 2)):
            times[name].append(_slice(calls[name]))
    ratio = statistics.median(ours / theirs for ours, theirs in zip(times["bundle"], times["onnxruntime"], strict=True))
    medians = {f"{name}_ms": statistics.median(values) for name, values in times.items()}
    return {**medians, "ratio": ratio, "error": error}


def _slice(call: Callable[[], object]) -> float:
    """The lower quartile, in milliseconds, of the calls that fit into a slice of time; three at least."""
    time.sleep(_PAUSE_SECONDS)
    call()
    times: list[float] = []
    end = time.perf_counter() + _SLICE_SECONDS
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return sorted(times)[len(times) // 4]


def _error(expected: dict[str, Any], found: dict[str, Any]) -> float:
    """The largest difference relative to the largest magnitude; infinite where integers or what is finite differ."""
    import numpy as np

    worst = 0.0
    for name, reference in expected.items():
        result = found[name]
        if reference.shape != result.shape or reference.dtype != result.dtype:
            return math.inf
        if reference.dtype.kind != "f":
            worst = max(worst, 0.0 if np.array_equal(reference, result) else math.inf)
            continue
        finite = np.isfinite(reference)
        if not np.array_equal(finite, np.isfinite(result)):
            return math.inf
        scale = float(np.abs(reference[finite]).max(initial=0.0)) or 1.0
        worst = max(worst, float(np.abs(reference[finite] - result[finite]).max(initial=0.0)) / scale)
    return worst


def _memory_onnxruntime(model: str, feed: str, threads: int) -> dict[str, Any]:
    session, inputs = _session(model, threads), _load_feed(feed)
    for _ in range(3):
        session.run(None, inputs)
    return {"peak_bytes": _peak_bytes()}


def _memory_bundle(bundle: str, feed: str, threads: int) -> dict[str, Any]:
    """Of the bundle's own ``run.py``, which loads TVM's runtime and nothing else of it."""
    import runpy

    model = runpy.run_path(str(Path(bundle) / "run.py"))["Model"](Path(bundle), threads)
    inputs = _load_feed(feed)
    for _ in range(3):
        model({entry["name"]: inputs[entry["name"]] for entry in model.manifest["inputs"]})
    return {"peak_bytes": _peak_bytes()}


def _peak_bytes() -> int:
    with Path("/proc/self/status").open(encoding="utf-8") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def _check(model: str, bundle: str, feed: str) -> dict[str, Any]:
    from instructions import per_inference

    from onnxslim.targets import Bundle, verify

    compiled = Bundle.load(bundle)
    inputs = _load_feed(feed)
    taken = {entry.name: inputs[entry.name] for entry in compiled.inputs}
    found = verify(compiled, model, [taken])
    count = per_inference(compiled, compiled.check(taken), _EMULATION_SECONDS)
    return {"status": found.status, "where": found.where, "detail": found.detail, "instructions": count}


_STEPS: dict[str, Callable[..., dict[str, Any]]] = {
    "slim": _slim,
    "compile": _compile,
    "time": _time,
    "memory_onnxruntime": _memory_onnxruntime,
    "memory_bundle": _memory_bundle,
    "check": _check,
}


def _child(step: str, threads: int = 0, **arguments: Any) -> dict[str, Any]:
    """Run a step in a process of its own, pinned to ``threads`` cores unless 0; a failure is returned as such."""
    environment = {**os.environ, "TVM_BIND_THREADS": "0"}
    if threads:
        environment["TVM_NUM_THREADS"] = environment["OMP_NUM_THREADS"] = str(threads)
        arguments["threads"] = threads
    command = [sys.executable, __file__, "--step", step, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines()
        return {"failure": f"{step}: {said[-1] if said else f'exit status {done.returncode}'}"}
    return dict(json.loads(lines[-1]))


def _run_step(step: str, text: str) -> None:
    arguments = json.loads(text)
    if "threads" in arguments:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments["threads"]])
    from onnxslim.errors import SlimError

    try:
        print(json.dumps(_STEPS[step](**arguments)))
    except SlimError as error:
        sys.exit(str(error))


# ------------------------------------------------------------------------------------------------------ measure, print


def measure(label: str, source: Path, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """All rows of one model."""
    slimmed, feed = str(folder / f"{label}.onnx"), str(folder / f"{label}.npz")
    prepared = _child("slim", model=str(source), output=slimmed, shapes=options.shapes, feed=feed)
    if "failure" in prepared:
        return [{"model": label, **prepared}]
    rows = []
    for target in options.targets or ["native"]:
        bundle = str(folder / f"{label}.{target}")
        common = {"model": label, "inputs": prepared["inputs"], "target": target}
        made = _child("compile", model=slimmed, target=target, shapes=prepared["shapes"], output=bundle)
        if "failure" in made:
            rows.append({**common, **made})
            continue
        common["compile_seconds"] = made["seconds"]
        if options.targets:
            rows.append({**common, **_child("check", model=slimmed, bundle=bundle, feed=feed)})
            continue
        for threads in options.threads:
            row = _child("time", threads, model=slimmed, bundle=bundle, feed=feed, rounds=options.rounds)
            for name, given in (("bundle", {"bundle": bundle}), ("onnxruntime", {"model": slimmed})):
                row[f"{name}_peak_bytes"] = _child(f"memory_{name}", threads, feed=feed, **given).get("peak_bytes")
            rows.append({**common, "threads": threads, **row})
    return rows


def _print(rows: Sequence[dict[str, Any]], targets: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    timed = ("threads", "bundle ms", "ORT ms", "ratio", "compile s", "bundle MB", "ORT MB", "error")
    checked = ("target", "compile s", "status", "where", "instructions")
    table = Table("model", *(checked if targets else timed), box=None)
    for row in rows:
        if "failure" in row:
            table.add_row(row["model"], *([row["target"]] if targets and "target" in row else []), "failed")
        elif targets:
            count = row["instructions"]
            cells = (row["target"], f"{row['compile_seconds']:.1f}", row["status"], row["where"])
            table.add_row(row["model"], *cells, "–" if count is None else f"{count:,}")
        else:
            memory = (row[f"{name}_peak_bytes"] for name in ("bundle", "onnxruntime"))
            table.add_row(
                row["model"],
                str(row["threads"]),
                f"{row['bundle_ms']:.3f}",
                f"{row['onnxruntime_ms']:.3f}",
                f"{row['ratio']:.2f}",
                f"{row['compile_seconds']:.1f}",
                *("–" if peak is None else f"{peak / 1e6:.0f}" for peak in memory),
                f"{row['error']:.1e}",
            )
    console.print(table)
    for row in rows:
        if "failure" in row or row.get("status") == "failed":
            console.print(f"{row['model']}: {row.get('failure') or row['detail']}", markup=False, highlight=False)
    for threads in sorted({row["threads"] for row in rows if "ratio" in row}):
        ratios = {row["model"]: row["ratio"] for row in rows if row.get("threads") == threads and "ratio" in row}
        worst = max(ratios, key=lambda model: ratios[model])
        mean = statistics.geometric_mean(ratios.values())
        console.print(
            f"{threads} thread(s): geometric mean {mean:.3f}, worst {worst} {ratios[worst]:.2f}", markup=False
        )


def _models(paths: Sequence[Path]) -> dict[str, Path]:
    """Label the models by their file names, with the folder's where these repeat or say nothing."""
    files = [file for path in paths for file in (sorted(path.rglob("*.onnx")) if path.is_dir() else [path])]
    labels: dict[str, Path] = {}
    for file in dict.fromkeys(each.resolve() for each in files):
        label = file.stem if file.stem != "model" and file.stem not in labels else f"{file.parent.name}-{file.stem}"
        labels[label] = file
    return labels


def main() -> None:
    """Parse, measure, print."""
    if sys.argv[1:2] == ["--step"]:
        _run_step(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, help="ONNX files, or folders of them")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=11, help="how often the two take turns")
    parser.add_argument("--shape", action="append", default=[], metavar="NAME=1,3,48,320", help="sizes of an input")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write well-known architectures here")
    parser.add_argument("--targets", nargs="+", default=[], help="compile for these, check, and count instructions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here too")
    options = parser.parse_args()
    options.shapes = {}
    for text in options.shape:
        name, _, sizes = text.rpartition("=")
        options.shapes[name] = [int(size) for size in sizes.split(",")]
    if options.export:
        from study_models import export

        options.models += export(options.export)
    if not options.models:
        parser.error("name models or folders of them, or --export FOLDER")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="onnxslim-") as folder:
        for label, source in _models(options.models).items():
            print(label, file=sys.stderr, flush=True)
            rows += measure(label, source, options, Path(folder))
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    _print(rows, bool(options.targets))


if __name__ == "__main__":
    main()
