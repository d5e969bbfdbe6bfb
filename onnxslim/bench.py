"""Fair timing of models and bundles beside each other: interleaved, one process, medians and ratios."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from onnxslim.data import open_dataset, random_feeds
from onnxslim.errors import DataError, TargetError
from onnxslim.measure import shapes_of
from onnxslim.model import load
from onnxslim.record import Latency, Profile
from onnxslim.runtime import Feed, Session, TensorSpec, interleaved_latency
from onnxslim.targets import Bundle

__all__ = ["BenchEntry", "bench", "is_bundle"]


class BenchEntry(BaseModel):
    """One subject of a benchmark."""

    path: str
    latency: Latency
    profile: Profile | None = None


def is_bundle(path: Path) -> bool:
    """Whether a path is a compiled bundle rather than a model file."""
    return (path / "manifest.json").is_file()


def bench(
    paths: list[Path],
    *,
    data: Path | None = None,
    shapes: dict[str, list[int]] | None = None,
    threads: int = 1,
    max_seconds: float = 20.0,
    profile: bool = False,
) -> list[BenchEntry]:
    """Time model files (in ONNX Runtime) and bundles (in TVM), interleaved; ratios are to the first.

    Args:
        paths: ``.onnx`` files and bundle folders, with the same inputs.
        data: the first sample of this data is timed; without it, made-up inputs.
        shapes: sizes for dynamic inputs of the made-up ones.
        threads: threads for each.
        max_seconds: stop after about this long.
        profile: also time each kernel of the bundles.

    Raises:
        SlimError: a subject cannot be loaded, or does not take the same inputs as the first.
        TargetError: ``profile`` without a bundle.
    """
    if profile and not any(map(is_bundle, paths)):
        raise TargetError(f"{paths[0]}: is no bundle, and kernels of bundles only are timed. Run `onnxslim compile`.")
    runners: dict[str, Callable[[], object]] = {}
    sessions = {path: _open(path, threads) for path in paths}
    feed = _feed(paths[0], sessions, data, shapes or {})
    for path, subject in sessions.items():
        if isinstance(subject, Bundle):
            runners[str(path)] = subject.prepare(feed)
        else:
            runners[str(path)] = partial(subject.run, feed)
            subject.run(feed)  # a feed that does not fit must fail here, with the file's name
    timings = interleaved_latency(runners, max_seconds=max_seconds)
    first = timings[str(paths[0])]
    return [
        BenchEntry(
            path=str(path),
            latency=timings[str(path)].latency(
                runtime="tvm" if isinstance(subject, Bundle) else "onnxruntime",
                threads=threads,
                input_shapes=shapes_of(feed),
                baseline=first,
                baseline_name=str(paths[0]),
            ),
            profile=_profile(subject, feed) if profile and isinstance(subject, Bundle) else None,
        )
        for path, subject in sessions.items()
    ]


def _profile(bundle: Bundle, feed: Feed) -> Profile:
    from onnxslim.targets.profile import profile

    return profile(bundle, feed)


def _open(path: Path, threads: int) -> Session | Bundle:
    if is_bundle(path):
        return Bundle.load(path, threads=threads)
    load(path)  # says what is wrong with a file better than ONNX Runtime does
    return Session(path, threads=threads)


def _feed(first: Path, sessions: dict[Path, Session | Bundle], data: Path | None, shapes: dict[str, list[int]]) -> Feed:
    """A feed that every subject takes: bundles are the narrowest, so their fixed sizes decide."""
    specs = _specs(sessions[first])
    fixed = dict(shapes)
    for subject in sessions.values():
        if isinstance(subject, Bundle):
            for spec in _specs(subject):
                sizes = [size for size in spec.shape or [] if isinstance(size, int)]
                if len(sizes) == len(spec.shape or []):
                    fixed.setdefault(spec.name, sizes)
    if data is not None:
        return next(iter(open_dataset(data, specs, role="bench")))
    feed = next(iter(random_feeds(specs, fixed=fixed, seed=0, count=1)), None)
    if feed is None:
        raise DataError(f"{first}: no inputs can be made up for it; give --data.")
    return feed


def _specs(subject: Session | Bundle) -> list[TensorSpec]:
    if isinstance(subject, Session):
        return list(subject.inputs.values())
    return [TensorSpec(entry.name, np.dtype(entry.dtype), list(entry.shape)) for entry in subject.manifest.inputs]
