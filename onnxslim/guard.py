"""Equality: whether a pass kept a promise, and where the result departs from the original.

A guard's checks, by name:

============  =====================================================================================================
``checker``   legal ONNX. What the original fails as well, or what only fails strict shape inference, is a warning.
``loads``     ONNX Runtime loads it.
``signature`` the inputs and outputs are declared as before: names, order, types, dimensions.
``feeds``     fails where no feed ran in the original. Nothing was compared then: ``outputs`` is missing, not passed.
``outputs``   the outputs are as before (:func:`check_lossless`) or sound (:func:`check_runs`).
============  =====================================================================================================
"""

from __future__ import annotations

import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxslim.data import SIZES, Dataset, random_feeds, resized_feeds
from onnxslim.errors import ModelError
from onnxslim.model import Model
from onnxslim.record import Check, LayerError
from onnxslim.runtime import Feed, Session, spill, too_large

__all__ = ["check_lossless", "check_runs", "layer_errors", "output_errors"]

# Of float outputs: relative to the value, and to the largest value of the tensor, where rounding errors add up.
_TOLERANCES = {
    "float64": (1e-4, 1e-5),  # computed in float32 as often as not
    "float32": (1e-4, 1e-5),
    "float16": (1e-2, 2e-3),
    "bfloat16": (5e-2, 1e-2),
}
_DATA_FEEDS = 4
_WANTED_FEEDS = 8
_ATTEMPTS = 160
_MAX_SECONDS = 60.0
# A rewrite may move a result by as much as ONNX Runtime's own rewrites of the original do, and a little more.
_NOISE_FACTOR = 2.0


# ---------------------------------------------------------------------------------------------------------- checks


def check_lossless(
    before: Model,
    after: Model,
    *,
    dataset: Dataset | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    threads: int = 0,
) -> list[Check]:
    """Check that ``after`` computes what ``before`` does.

    Outputs are compared on the first samples of the data, on those at other sizes of the dynamic axes, and on made-up
    inputs; what the original does not run on is left out. Floats may differ by rounding; where they differ by more,
    by at most twice what ONNX Runtime's own optimisations change in the original, which is what int8 rounding needs.
    Everything else, shapes, types and the places of NaN and infinity must agree. An output that the original itself
    does not repeat (it draws random numbers) is compared in shape and type only.

    Args:
        before: the model before the pass.
        after: the model after it.
        dataset: feeds for the model; labels are not used.
        shapes: input -> sizes that made-up inputs must have.
        seed: of made-up inputs.
        threads: of the sessions; 0: as many as there are cores.

    Raises:
        ModelError: ``before`` does not load in ONNX Runtime.
        DataError: ``shapes`` does not fit the inputs.
    """
    return _check(before, after, dataset, shapes, seed, threads, lossless=True)


def check_runs(
    after: Model,
    dataset: Dataset | None = None,
    *,
    before: Model,
    shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    threads: int = 0,
) -> list[Check]:
    """Check that ``after``, made by a lossy pass, is sound: it runs on what ``before`` runs on, with outputs of the
    same types and shapes, finite where the original's are. How good they are is for a metric to say.

    An axis that the original declares dynamic and that is no axis of an input may change its size: what it counts
    (detections, decoded steps) may depend on the values.

    Args:
        after: the model after the pass.
        dataset: feeds for the model; made-up inputs without.
        before: the model before the pass.
        shapes: input -> sizes that made-up inputs must have.
        seed: of made-up inputs.
        threads: of the sessions; 0: as many as there are cores.

    Raises:
        ModelError: ``before`` does not load in ONNX Runtime.
        DataError: ``shapes`` does not fit the inputs.
    """
    return _check(before, after, dataset, shapes, seed, threads, lossless=False)


def _check(
    before: Model,
    after: Model,
    dataset: Dataset | None,
    shapes: Mapping[str, Sequence[int]] | None,
    seed: int,
    threads: int,
    *,
    lossless: bool,
) -> list[Check]:
    original = Session(before, threads=threads)
    checks = [_check_onnx(before, after)]
    try:
        result = Session(after, threads=threads)
    except ModelError as error:
        return [*checks, Check(name="loads", ok=False, detail=str(error))]
    checks.append(Check(name="loads", ok=True, detail="loads in ONNX Runtime"))
    signature = _check_signature(before, after)
    checks.append(signature)
    if not signature.ok:
        return checks
    feeds = _Feeds(before, original, dataset, shapes or {}, seed)
    compared = _compare_lossless(before, original, result, feeds) if lossless else _compare_lossy(before, result, feeds)
    if not feeds.ran:
        why = f": {feeds.failure}" if feeds.failure else ""
        detail = f"nothing was compared, because no input could be found that the original runs on{why}"
        return [*checks, Check(name="feeds", ok=False, detail=f"{detail}; give data, or sizes under [shapes]")]
    return [*checks, compared]


def _check_onnx(before: Model, after: Model) -> Check:
    """Run onnx.checker; the original is asked only where it finds something."""
    fault = _checker_fault(after, full=False)
    if fault is not None:
        if _checker_fault(before, full=False) is not None:
            return Check(name="checker", ok=True, detail=f"warning: not legal ONNX, as the original: {fault}")
        return Check(name="checker", ok=False, detail=f"no longer legal ONNX: {fault}")
    fault = _checker_fault(after, full=True)
    if fault is not None:
        own = "" if _checker_fault(before, full=True) is None else ", as that of the original"
        return Check(name="checker", ok=True, detail=f"warning: strict shape inference fails{own}: {fault}")
    return Check(name="checker", ok=True, detail="legal ONNX")


def _checker_fault(model: Model, *, full: bool) -> str | None:
    """What onnx.checker says, in one line; None where it finds nothing."""
    try:
        if not too_large(model):
            onnx.checker.check_model(model.to_proto(), full_check=full)
            return None
        with tempfile.TemporaryDirectory(prefix="onnxslim-", ignore_cleanup_errors=True) as folder:
            onnx.checker.check_model(str(spill(model, Path(folder))), full_check=full)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        return " ".join(str(error).split())[:300]
    return None


def _check_signature(before: Model, after: Model) -> Check:
    for what in ("input", "output"):
        old, new = ([_declared(tensor) for tensor in getattr(model.graph, what + "s")] for model in (before, after))
        if old == new:
            continue
        for was, now in itertools.zip_longest(old, new, fillvalue="nothing"):
            if was != now:
                return Check(name="signature", ok=False, detail=f"{what} {was} became {now}")
    return Check(name="signature", ok=True, detail="inputs and outputs are declared as before")


def _declared(tensor: gs.Tensor) -> str:
    if tensor.dtype is None and "info" in tensor.__dict__:
        kind = " ".join(str(tensor.info.type).split())
        return f"{tensor.name!r} ({kind})"
    shape = "of any shape" if tensor.shape is None else list(tensor.shape)
    return f"{tensor.name!r} ({None if tensor.dtype is None else np.dtype(tensor.dtype)} {shape})"


# ----------------------------------------------------------------------------------------------------------- feeds


@dataclass
class _Feeds:
    """Feeds that the original runs on, with its outputs, from data and made up.

    Attributes:
        model: the original.
        session: the original in ONNX Runtime.
        dataset: where to take feeds from first.
        shapes: sizes for made-up feeds.
        seed: of made-up feeds.
        ran: how many feeds the original ran on.
        skipped: how many it did not run on.
        failure: why it did not run on the last of those.
        sizes: dynamic axis -> the sizes that were run.
    """

    model: Model
    session: Session
    dataset: Dataset | None
    shapes: Mapping[str, Sequence[int]]
    seed: int
    ran: int = 0
    skipped: int = 0
    failure: str = ""
    sizes: dict[str, set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._hints = _compared_with(self.model)
        self._unseen = {(name, value) for name, values in self._hints.items() for value in values}

    def __iter__(self) -> Iterator[tuple[Feed, Feed]]:
        """Yield feeds with the original's outputs, until there are enough or a minute has passed."""
        deadline = time.monotonic() + _MAX_SECONDS
        base: Feed | None = None
        for feed in self._real():
            for pair in self._try(feed):
                base = base or feed
                yield pair
        real, made_up = base is not None, 0
        for feed in self._made_up():
            if made_up >= _WANTED_FEEDS or time.monotonic() > deadline:
                break
            for pair in self._try(feed):
                # Small inputs may leave parts of a model without effect, so the largest is where to go on from.
                if base is None or (not real and _size(feed) > _size(base)):
                    base = feed
                made_up += 1
                yield pair
        # Where few sizes run, many are tried: the ones found by chance may be too small to reach all of the model.
        sizes = SIZES if self.skipped > self.ran else ()
        for feed in () if base is None else (base, *resized_feeds(base, self.session.specs, sizes)):
            for variant in (*([] if feed is base else [feed]), *self._branches(feed)):
                if time.monotonic() < deadline:
                    yield from self._try(variant)

    def _branches(self, feed: Feed) -> Iterator[Feed]:
        """The feed with each other value that a branch may depend on."""
        for name, values in self._hints.items():
            for value in dict.fromkeys(values):
                if name in feed and feed[name].size == 1 and feed[name].item() != value:
                    yield feed | {name: np.full_like(feed[name], value)}

    def _real(self) -> Iterator[Feed]:
        return iter(()) if self.dataset is None else itertools.islice(self.dataset, _DATA_FEEDS)

    def _made_up(self) -> Iterator[Feed]:
        specs = self.session.specs
        unfit = next((spec for spec in specs if spec.kind != "tensor" and not spec.optional), None)
        if unfit is not None:
            self.failure = f"input {unfit.name!r} is a {unfit.kind}"
            return
        yield from random_feeds(specs, fixed=self.shapes, seed=self.seed, count=_ATTEMPTS, hints=self._hints)

    def _try(self, feed: Feed) -> Iterator[tuple[Feed, Feed]]:
        try:
            outputs = self.session.run(feed)
        except ModelError as error:
            self.skipped += 1
            self.failure = str(error)
            return
        self.ran += 1
        self._unseen -= {
            (name, int(feed[name].item())) for name in self._hints if name in feed and feed[name].size == 1
        }
        for spec in self.session.specs:
            for axis, dim in enumerate(spec.shape or ()):
                if not isinstance(dim, int) and spec.name in feed:
                    name = dim if isinstance(dim, str) else f"{spec.name}[{axis}]"
                    self.sizes.setdefault(name, set()).add(feed[spec.name].shape[axis])
        yield feed, outputs

    def describe(self) -> str:
        """What was run, in words."""
        text = f"{self.ran} input{'' if self.ran == 1 else 's'}"
        if self.sizes:
            axes = (f"{name} {', '.join(str(size) for size in sorted(sizes))}" for name, sizes in self.sizes.items())
            text += f" ({'; '.join(axes)})"
        if self.skipped:
            text += f"; {self.skipped} more do not run in the original"
        if self._unseen:
            text += f"; never with {', '.join(f'{name} = {value}' for name, value in sorted(self._unseen))}"
        return text


def _size(feed: Feed) -> int:
    return sum(value.size for value in feed.values())


def _compared_with(model: Model) -> dict[str, list[int]]:
    """Integer input -> the constants that it is compared with: what chooses the branch of an If, as a sampling rate."""
    from onnxslim.graph.walk import constant_value

    found: dict[str, list[int]] = {}
    for tensor in model.graph.inputs:
        for node in tensor.outputs:
            if node.op not in ("Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual"):
                continue
            for other in node.inputs:
                value = None if other is tensor else constant_value(other)
                if value is not None and value.size == 1 and value.dtype.kind in "iu":
                    constant = int(value.reshape(-1)[0])
                    found.setdefault(tensor.name, []).extend((constant, constant + 1))
    return found


# ------------------------------------------------------------------------------------------------------ comparisons


def _compare_lossless(before: Model, original: Session, result: Session, feeds: _Feeds) -> Check:
    plain: Session | None = None
    random: set[str] = set()
    noisy: set[str] = set()
    for feed, expected in feeds:
        try:
            got = result.run(feed)
        except ModelError as error:
            return Check(name="outputs", ok=False, detail=f"{error} The original runs on this: {_shapes(feed)}.")
        for name, value in expected.items():
            other = got[name]
            fault = _form_fault(value, other)
            if fault is not None:
                kind_fault = _form_fault(value, other, frozenset(range(np.ndim(value))))
                if kind_fault is None and _varies(original, feed, name, value, _form_fault):
                    random.add(name)  # even its shape is drawn
                    continue
            elif name not in random:
                fault = _value_fault(value, other)
                if fault is not None and _varies(original, feed, name, value, _value_fault):
                    random.add(name)
                    fault = None
                elif fault is not None:
                    plain = plain or Session(before, threads=original.threads, optimize=False)
                    if _within_noise(value, plain.run(feed)[name], other):
                        noisy.add(name)
                        fault = None
            if fault is None:
                continue
            return Check(name="outputs", ok=False, detail=f"output {name!r} {fault} for inputs {_shapes(feed)}")
    detail = f"same outputs on {feeds.describe()}"
    if random:
        detail += f"; {', '.join(sorted(random))} draws random numbers in the original: only its type was compared"
    if noisy:
        detail += f"; {', '.join(sorted(noisy))} within what ONNX Runtime's own optimisations change in the original"
    if random and len(random) == len(original.output_names):
        detail = detail.replace("same outputs", "outputs of the same types", 1)
    return Check(name="outputs", ok=True, detail=detail)


def _compare_lossy(before: Model, result: Session, feeds: _Feeds) -> Check:
    free = _free_axes(before)
    for feed, expected in feeds:
        try:
            got = result.run(feed)
        except ModelError as error:
            return Check(name="outputs", ok=False, detail=f"{error} The original runs on this: {_shapes(feed)}.")
        for name, value in expected.items():
            fault = _form_fault(value, got[name], free.get(name, frozenset()))
            if fault is None:
                fault = _finite_fault(value, got[name])
            if fault is not None:
                return Check(name="outputs", ok=False, detail=f"output {name!r} {fault} for inputs {_shapes(feed)}")
    return Check(name="outputs", ok=True, detail=f"runs, with sound outputs, on {feeds.describe()}")


def _shapes(feed: Feed) -> str:
    return ", ".join(f"{name} {list(np.shape(value))}" for name, value in feed.items())


def _free_axes(model: Model) -> dict[str, frozenset[int]]:
    """Output -> axes that are declared dynamic and are no dimension of an input."""
    tied = {dim for tensor in model.graph.inputs for dim in (tensor.shape or ()) if isinstance(dim, str)}
    return {
        tensor.name: frozenset(
            axis for axis, dim in enumerate(tensor.shape or ()) if not isinstance(dim, int) and dim not in tied
        )
        for tensor in model.graph.outputs
    }


def _form_fault(expected: Any, got: Any, free: frozenset[int] = frozenset()) -> str | None:
    """How two outputs differ in kind, type or shape; axes in ``free`` may differ in size."""
    if isinstance(expected, list):
        if not isinstance(got, list) or len(expected) != len(got):
            return f"is a sequence of {len(expected)}, now {len(got) if isinstance(got, list) else _kind(got)}"
        return next(filter(None, map(_form_fault, expected, got)), None)
    if not isinstance(expected, np.ndarray):
        return None if type(expected) is type(got) else f"is {_kind(expected)}, now {_kind(got)}"
    if not isinstance(got, np.ndarray):
        return f"is {_kind(expected)}, now {_kind(got)}"
    if expected.dtype != got.dtype:
        return f"is {expected.dtype}, now {got.dtype}"
    sizes = zip(expected.shape, got.shape, strict=False)
    same = expected.ndim == got.ndim and all(a == b or axis in free for axis, (a, b) in enumerate(sizes))
    return None if same else f"has shape {list(expected.shape)}, now {list(got.shape)}"


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"a {value.dtype} tensor"
    return "empty" if value is None else f"a {type(value).__name__}"


def _value_fault(expected: Any, got: Any) -> str | None:
    """How the values of two outputs of the same form differ by more than rounding; None where they do not."""
    if isinstance(expected, list):
        return next(filter(None, map(_value_fault, expected, got)), None)
    if not isinstance(expected, np.ndarray):
        return None if expected == got else "has other values"
    if expected.dtype.name not in _TOLERANCES:
        wrong = expected != got
        if expected.dtype.kind in "cV":  # complex and 8-bit floats, where NaN is not itself
            wrong &= ~((expected != expected) & (got != got))
        count = int(np.count_nonzero(wrong))
        return f"differs in {count} of {expected.size} values" if count else None
    relative, scaled = _TOLERANCES[expected.dtype.name]
    a, b = expected.astype(np.float64), got.astype(np.float64)
    finite = np.isfinite(a)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(b[finite]).all():
        return "has NaN or infinity in other places"
    error = np.abs(a[finite] - b[finite])
    allowed = scaled * float(np.abs(a[finite]).max(initial=0.0)) + relative * np.abs(a[finite])
    worst = error - allowed
    if not error.size or worst.max() <= 0:
        return None
    at = int(worst.argmax())
    return f"is off by {error[at]:.3g} (allowed {allowed[at]:.3g}, value {a[finite][at]:.6g})"


def _varies(session: Session, feed: Feed, name: str, value: Any, fault: Callable[[Any, Any], str | None]) -> bool:
    """Whether the original gives something else when it is run again on the same feed."""
    for _ in range(3):
        again = session.run(feed)[name]
        if _form_fault(value, again) or fault(value, again):
            return True
    return False


def _within_noise(expected: Any, plain: Any, got: Any) -> bool:
    """Whether ``got`` departs no further than ONNX Runtime's unoptimised result of the original does."""
    if isinstance(expected, list):
        return isinstance(plain, list) and len(plain) == len(expected) and all(map(_within_noise, expected, plain, got))
    if not isinstance(expected, np.ndarray) or _form_fault(expected, plain):
        return False
    if expected.dtype.name not in _TOLERANCES:
        return _value_fault(plain, got) is None
    a, b, c = (value.astype(np.float64) for value in (expected, plain, got))
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)) or not np.array_equal(finite, np.isfinite(c)):
        return False
    noise = np.abs(a - b)[finite].max(initial=0.0)
    return bool(np.abs(a - c)[finite].max(initial=0.0) <= _NOISE_FACTOR * noise)


def _finite_fault(expected: Any, got: Any) -> str | None:
    """Where the result is NaN or infinite and the original is not."""
    if isinstance(expected, list):
        return next(filter(None, map(_finite_fault, expected, got)), None)
    if not isinstance(expected, np.ndarray) or expected.dtype.name not in _TOLERANCES:
        return None
    a, b = np.isfinite(expected.astype(np.float64)), np.isfinite(got.astype(np.float64))
    wrong = int((a & ~b).sum()) if a.shape == b.shape else int((~b).sum()) if a.all() else 0
    return f"has {wrong} NaN or infinite values where the original has none" if wrong else None


# ---------------------------------------------------------------------------------------------------------- errors


@dataclass
class _Error:
    """Sums over all feeds of how far one tensor is from the original."""

    signal: float = 0.0
    noise: float = 0.0
    product: float = 0.0
    power: float = 0.0
    largest: float = 0.0
    broken: bool = False
    seen: bool = False

    def add(self, expected: np.ndarray, got: np.ndarray) -> None:
        self.seen = True
        a, b = expected.astype(np.float64).reshape(-1), got.astype(np.float64).reshape(-1)
        finite = np.isfinite(a)
        if not finite.all():
            self.broken |= not np.array_equal(a[~finite], b[~finite], equal_nan=True)
            a, b = a[finite], b[finite]
        self.broken |= not np.isfinite(b).all()
        if self.broken:
            return
        difference = a - b
        self.signal += float(a @ a)
        self.noise += float(difference @ difference)
        self.product += float(a @ b)
        self.power += float(b @ b)
        self.largest = max(self.largest, float(np.abs(difference).max(initial=0.0)))

    def entry(self, tensor: str, node: str, op: str) -> LayerError:
        """The entry of a record. JSON has no infinity: what is broken gets -200 dB and the largest float32."""
        if self.broken:
            largest = float(np.finfo(np.float32).max)
            return LayerError(tensor=tensor, node=node, op=op, sqnr_db=-200.0, cosine=0.0, max_abs_error=largest)
        if self.noise == 0.0:
            return LayerError(tensor=tensor, node=node, op=op, sqnr_db=None, cosine=1.0, max_abs_error=self.largest)
        ratio = self.signal / self.noise
        norms = math.sqrt(self.signal) * math.sqrt(self.power)
        return LayerError(
            tensor=tensor,
            node=node,
            op=op,
            sqnr_db=max(-200.0, 10 * math.log10(ratio)) if ratio > 0 else -200.0,
            cosine=max(-1.0, min(1.0, self.product / norms)) if norms else 0.0,
            max_abs_error=self.largest,
        )


def output_errors(before: Session, after: Session, feeds: Iterable[Feed]) -> list[LayerError]:
    """How far the outputs of the same name and shape are apart, over all feeds; ``node`` and ``op`` are empty.

    Integers and truth values (labels, indices) are compared as numbers. Strings, sequences and maps are left out.

    Raises:
        ModelError: one of the two does not run on a feed.
    """
    errors = {name: _Error() for name in before.output_names if name in after.output_names}
    for feed in feeds:
        _add_errors(errors, before.run(feed), after.run(feed), kinds="fiub")
    return [error.entry(name, "", "") for name, error in errors.items() if error.seen]


def layer_errors(
    before: Model, after: Model, feeds: Iterable[Feed], *, max_bytes: int = 256 * 2**20, threads: int = 0
) -> list[LayerError]:
    """How far each inner float tensor of the result is from the tensor of the same name in the original.

    The models run without ONNX Runtime's own optimisations, once for each group of tensors, so that no more than about
    ``max_bytes`` of them are held at a time. Tensors of subgraphs, and those that changed in shape, are left out.

    Args:
        before: the original.
        after: the result.
        feeds: a few inferences; gone through several times.
        max_bytes: of tensors held at a time, from each model.
        threads: of the sessions; 0: as many as there are cores.

    Returns:
        One entry a tensor, in the order of the original's graph.

    Raises:
        ModelError: one of the two does not run on a feed.
    """
    feeds = list(feeds) if iter(feeds) is feeds else feeds
    there = {tensor.name for node in after.graph.nodes for tensor in node.outputs}
    nodes = {
        tensor.name: node
        for node in before.graph.nodes
        for tensor in node.outputs
        if tensor.name and tensor.name in there and node.op != "Constant"
    }
    names = list(nodes)
    errors: dict[str, _Error] = {name: _Error() for name in names}
    start, group, largest = 0, 4, 1
    while start < len(names):
        chosen = names[start : start + group]
        start += len(chosen)
        sessions = [Session(model, threads=threads, outputs=chosen, optimize=False) for model in (before, after)]
        for feed in feeds:
            expected, got = (session.run(feed) for session in sessions)
            _add_errors(errors, expected, got)
            largest = max(largest, *(getattr(value, "nbytes", 0) for value in (*expected.values(), *got.values())))
        # Tensors mostly shrink along a graph, so the largest so far bounds those to come well enough.
        group = max(1, min(512, max_bytes // largest))
    return [errors[name].entry(name, nodes[name].name, nodes[name].op) for name in names if errors[name].seen]


def _add_errors(errors: Mapping[str, _Error], before: Feed, after: Feed, kinds: str = "f") -> None:
    """Add one feed's results, of these kinds of numpy dtype."""
    for name, value in before.items():
        other = after.get(name)
        if name not in errors or not isinstance(value, np.ndarray) or not isinstance(other, np.ndarray):
            continue
        # float32 against float16 is a comparison worth making; inner integers (quanta, indices) are not.
        alike = value.dtype.kind == other.dtype.kind and value.dtype.kind in kinds
        if alike and value.shape == other.shape and value.size:
            errors[name].add(value, other)
