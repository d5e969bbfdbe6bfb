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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxslim.data import Dataset
from onnxslim.differences import finite_fault, form_fault, value_fault, within_noise
from onnxslim.errors import ModelError
from onnxslim.model import Model
from onnxslim.record import Check, LayerError
from onnxslim.runtime import Feed, Session
from onnxslim.staging import Staged
from onnxslim.trial_feeds import TrialFeeds

__all__ = ["check_lossless", "check_runs", "layer_errors", "output_errors"]

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
    inputs (:class:`~onnxslim.trial_feeds.TrialFeeds`); what the original does not run on is left out. Both graphs run
    as they stand: ONNX Runtime's own optimisations, which would turn them into the same or bring in other rounding,
    are off, but for a model that does not load without them. So a fault of those optimisations that only the result
    brings out is not seen. Weights are shared with ONNX Runtime, not copied.

    Floats may differ by rounding; where they differ by more, by at most eight times what ONNX Runtime's own
    optimisations change in the original, which is what int8 rounding and deep networks need. Everything else, shapes,
    types and the places of NaN and infinity must agree. An output that the original itself does not repeat (it draws
    random numbers) is compared in shape and type only.

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
    original = _load_plainly(before, before, threads)
    checks: list[Check] = []
    try:
        staged = Staged(after)
        checks.append(_check_onnx(before, staged))
        if lossless:
            original, result = _load_alike(before, original, staged, threads)
        else:
            result = Session(after, threads=threads)
    except ModelError as error:
        return [*checks, Check(name="loads", ok=False, detail=str(error))]
    checks.append(Check(name="loads", ok=True, detail="loads in ONNX Runtime"))
    signature = _check_signature(before, after)
    checks.append(signature)
    if not signature.ok:
        return checks
    feeds = TrialFeeds(before, original, dataset, shapes, seed)
    compared = _compare_lossless(before, original, result, feeds) if lossless else _compare_lossy(before, result, feeds)
    if not feeds.ran:
        why = f": {feeds.failure}" if feeds.failure else ""
        detail = f"nothing was compared, because no input could be found that the original runs on{why}"
        return [*checks, Check(name="feeds", ok=False, detail=f"{detail}; give data, or sizes under [shapes]")]
    return [*checks, compared]


def _load_plainly(model: Model, source: Model | Staged, threads: int) -> Session:
    """A session without ONNX Runtime's optimisations; with them where the model needs some to load."""
    try:
        return Session(source, threads=threads, optimize=False)
    except ModelError:
        return Session(model, threads=threads)


def _load_alike(before: Model, original: Session, after: Staged, threads: int) -> tuple[Session, Session]:
    """Sessions of both models, with optimisations in both or in neither: so their graphs are what is compared."""
    result = (
        _load_plainly(after.model, after, threads) if not original.optimize else Session(after.model, threads=threads)
    )
    if result.optimize and not original.optimize:
        original = Session(before, threads=threads)
    return original, result


def _check_onnx(before: Model, after: Staged) -> Check:
    """Run onnx.checker; the original is asked only where it finds something."""
    strict = _checker_fault(after, full=True)
    if strict is None:
        return Check(name="checker", ok=True, detail="legal ONNX")
    original = Staged(before)
    fault = _checker_fault(after, full=False)
    if fault is None:
        own = "" if _checker_fault(original, full=True) is None else ", as that of the original"
        return Check(name="checker", ok=True, detail=f"warning: strict shape inference fails{own}: {strict}")
    if _checker_fault(original, full=False) is not None:
        return Check(name="checker", ok=True, detail=f"warning: not legal ONNX, as the original: {fault}")
    return Check(name="checker", ok=False, detail=f"no longer legal ONNX: {fault}")


def _checker_fault(model: Staged, *, full: bool) -> str | None:
    """What onnx.checker says, in one line; None where it finds nothing. It looks at no values of large tensors."""
    try:
        onnx.checker.check_model(str(model.path), full_check=full)
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


# ------------------------------------------------------------------------------------------------------ comparisons


def _compare_lossless(before: Model, original: Session, result: Session, feeds: TrialFeeds) -> Check:
    noise: Session | None = None
    random: set[str] = set()
    noisy: set[str] = set()
    for feed, expected in feeds:
        try:
            got = result.run(feed)
        except ModelError as error:
            return Check(name="outputs", ok=False, detail=f"{error} The original runs on this: {_shapes(feed)}.")
        for name, value in expected.items():
            other = got[name]
            fault = form_fault(value, other)
            if fault is not None:
                kind_fault = form_fault(value, other, frozenset(range(np.ndim(value))))
                if kind_fault is None and _varies(original, feed, name, value, form_fault):
                    random.add(name)  # even its shape is drawn
                    continue
            elif name not in random:
                fault = value_fault(value, other)
                if fault is not None and _varies(original, feed, name, value, value_fault):
                    random.add(name)
                    fault = None
                elif fault is not None:
                    noise = noise or Session(before, threads=original.threads, optimize=not original.optimize)
                    if within_noise(value, noise.run(feed)[name], other):
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


def _compare_lossy(before: Model, result: Session, feeds: TrialFeeds) -> Check:
    free = _free_axes(before)
    for feed, expected in feeds:
        try:
            got = result.run(feed)
        except ModelError as error:
            return Check(name="outputs", ok=False, detail=f"{error} The original runs on this: {_shapes(feed)}.")
        for name, value in expected.items():
            fault = form_fault(value, got[name], free.get(name, frozenset()))
            if fault is None:
                fault = finite_fault(value, got[name])
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


def _varies(session: Session, feed: Feed, name: str, value: Any, fault: Callable[[Any, Any], str | None]) -> bool:
    """Whether the original gives something else when it is run again on the same feed."""
    for _ in range(3):
        again = session.run(feed)[name]
        if form_fault(value, again) or fault(value, again):
            return True
    return False


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
