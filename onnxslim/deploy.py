"""One target of a run: compile the result, verify it against ONNX Runtime, time it beside it, say what happened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from onnxslim.data import random_feeds
from onnxslim.errors import ModelError, TargetError
from onnxslim.measure import shapes_of
from onnxslim.model import load
from onnxslim.record import Latency, Score, TargetEntry
from onnxslim.runtime import Feed, Session, Timing, interleaved_latency
from onnxslim.targets import Bundle, Target, compile, find_target, runs_here, unsupported_ops, verify
from onnxslim.targets.profile import profile

__all__ = ["Scorer", "deploy", "deploy_file", "time_bundle"]

_MADE_UP_FEEDS = 3

Scorer = Callable[[Bundle, float], tuple[Score | None, list[str]]]
"""Takes a bundle and its milliseconds for one inference; returns its score, or why there is none."""

Progress = Callable[[str, int, int], None]

_LATENCY_SECONDS = 15.0


def deploy(
    model_path: Path,
    target: Target,
    *,
    shapes: dict[str, list[int]],
    output: Path,
    feeds: Sequence[Feed],
    threads: int,
    scorer: Scorer | None = None,
    tune: float | None = None,
    progress: Progress | None = None,
) -> TargetEntry:
    """Compile a model file into ``output`` and measure what can be measured here.

    Args:
        model_path: the file to compile; ONNX Runtime runs the same file as the reference.
        target: what to compile for.
        shapes: sizes for dynamic inputs.
        output: folder of the bundle; replaced.
        feeds: samples to verify on; the first one is timed.
        threads: threads for both runtimes.
        scorer: scores a bundle that runs here.
        tune: seconds for tuning, as of :func:`~onnxslim.targets.compile`.
        progress: called as ``progress(what, done, total)`` while tuning.

    Raises:
        TargetError: TVM cannot compile the model, for a reason other than an op that it lacks.
    """
    lacking = unsupported_ops(model_path, shapes)
    if lacking:
        names = ", ".join(f"{op} ({len(nodes)})" for op, nodes in lacking.items())
        return TargetEntry(
            name=target.name,
            description=target.description,
            status="unsupported",
            reason=f"TVM cannot import: {names}",
            unsupported_ops=lacking,
        )
    bundle = compile(model_path, target, shapes=shapes, output=output, tune=tune, progress=progress)
    entry = TargetEntry(
        name=target.name,
        description=target.description,
        status="compiled, not run",
        reason="this machine cannot run code for it",
        bundle=str(output),
        bundle_bytes=bundle.size_bytes,
        library_bytes=bundle.library_bytes,
        compile_seconds=bundle.compile_seconds,
        notes=[*bundle.manifest.notes, *_open_axes(bundle)],
    )
    # An input with a default of its own is compiled in; both runtimes then take the default.
    taken = {spec.name for spec in bundle.manifest.inputs}
    fitting = [{name: feed[name] for name in feed if name in taken} for feed in feeds if _fits(feed, bundle)]
    if not fitting:
        return entry.model_copy(update={"reason": "there is no sample of the sizes that it was compiled for"})
    check = verify(bundle, model_path, fitting)
    found: dict[str, Any] = {
        "status": check.status,
        "reason": check.detail,
        "max_abs_error": check.max_abs_error,
        "sqnr_db": check.sqnr_db,
        "where": check.where,
    }
    if check.ok and runs_here(target):
        # What an emulator takes says nothing about the device, so only what runs natively is timed.
        found["latency"], found["reference_latency"] = time_bundle(bundle, model_path, fitting[0], threads)
        found["profile"] = profile(bundle, fitting[0], threads=threads)
        if scorer is not None:
            found["score"], why = scorer(bundle, found["latency"].median_ms)
            entry.notes.extend(why)
    return entry.model_copy(update=found)


def deploy_file(
    model_path: Path,
    target_name: str,
    *,
    shapes: dict[str, list[int]],
    output: Path,
    threads: int,
    progress: Progress,
    tune: float | None = None,
) -> TargetEntry:
    """Compile one model file outside of a run, and verify and time it on made-up inputs.

    Raises:
        ModelError: the model cannot be read or run.
        TargetError: the target is unknown or cannot take the model; the message names ops and nodes.
        OutputError: ``output`` cannot be written.
    """
    target = find_target(target_name)
    load(model_path)  # says what is wrong with a file better than ONNX Runtime does
    session = Session(model_path)
    feeds = []
    for feed in random_feeds(list(session.inputs.values()), fixed=shapes, seed=0, count=_MADE_UP_FEEDS):
        try:
            session.run(feed)
        except ModelError:
            continue
        feeds.append(feed)
    progress(f"compiling for {target_name}", 0, 0)
    entry = deploy(
        model_path,
        target,
        shapes=shapes,
        output=output,
        feeds=feeds,
        threads=threads,
        tune=tune,
        progress=progress,
    )
    if entry.status == "unsupported":
        nodes = "; ".join(f"{op}: {', '.join(names)}" for op, names in entry.unsupported_ops.items())
        raise TargetError(f"{model_path}: {entry.reason}. Nodes: {nodes}.")
    return entry


def _open_axes(bundle: Bundle) -> list[str]:
    """What to say of inputs that keep an axis of any size: correct for every size, and far slower."""
    notes = []
    for entry in bundle.manifest.inputs:
        if any(isinstance(size, str) for size in entry.shape):
            sizes = ", ".join(map(str, entry.shape))
            notes.append(
                f"input {entry.name} [{sizes}] is open: any size runs, several times slower than one that is given "
                "(--shape, or [shapes] in a recipe)"
            )
    return notes


def _fits(feed: Feed, bundle: Bundle) -> bool:
    """Whether a feed has the sizes that a bundle was compiled for."""
    for entry in bundle.manifest.inputs:
        actual = feed[entry.name].shape if entry.name in feed else ()
        if len(actual) != len(entry.shape):
            return False
        if any(isinstance(size, int) and size != got for size, got in zip(entry.shape, actual, strict=True)):
            return False
    return True


def time_bundle(bundle: Bundle, model_path: Path, feed: Feed, threads: int) -> tuple[Latency, Latency]:
    """Time a bundle and ONNX Runtime on the file that it was compiled from, interleaved, on the same threads."""
    session = Session(model_path, threads=threads)
    timings = interleaved_latency(
        {"onnxruntime": lambda: session.run(feed), "tvm": bundle.prepare(feed, threads=threads)},
        max_seconds=_LATENCY_SECONDS,
    )
    entry = partial(Timing.latency, threads=threads, input_shapes=shapes_of(feed))
    baseline = timings["onnxruntime"]
    reference = entry(baseline, runtime="onnxruntime")
    latency = entry(timings["tvm"], runtime="tvm", baseline=baseline, baseline_name="the same file in ONNX Runtime")
    return latency, reference
