"""The inputs that two models are compared on: few where a run is dear, and never too few to see a difference."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from onnxslim.data import SIZES, Dataset, dynamic_axes, edge_feed, random_feeds, resized_feed, resized_feeds
from onnxslim.errors import ModelError
from onnxslim.model import Model
from onnxslim.runtime import Feed, Session

__all__ = ["TrialFeeds", "compared_with"]

_DATA_FEEDS = 4
_WANTED_FEEDS = 8
_ATTEMPTS = 160
# Tried first: the cost of a run grows with the sizes, by their square where there is attention.
_SMALL_SIZES = (16, 32, 7, 64, 3, 48, 10, 96)
# What is not needed is left out after this much processor time, which a small model never takes.
_ENOUGH_CPU_SECONDS = 0.15
_MAX_SECONDS = 60.0
_EDGE_INDEX = 1  # of the first made-up feed with edge values


class TrialFeeds:
    """Feeds that the original runs on, with its outputs, from data and made up.

    Needed are, as far as the original runs on them: one ordinary feed, edge values, size 1 and another size of every
    dynamic axis, and each value that an input chooses a branch by. There are more while they are cheap.

    Attributes:
        session: the original in ONNX Runtime.
        ran: how many feeds the original ran on.
        skipped: how many it did not run on.
        failure: why it did not run on the last of those.
        sizes: dynamic axis -> the sizes that were run.
    """

    def __init__(
        self,
        model: Model,
        session: Session,
        dataset: Dataset | None = None,
        shapes: Mapping[str, Sequence[int]] | None = None,
        seed: int = 0,
    ) -> None:
        """Prepare feeds.

        Args:
            model: the original.
            session: the original in ONNX Runtime.
            dataset: where to take feeds from first.
            shapes: sizes for made-up feeds.
            seed: of made-up feeds.
        """
        self.session = session
        self.ran = 0
        self.skipped = 0
        self.failure = ""
        self.sizes: dict[str, set[int]] = {}
        self._dataset = dataset
        self._shapes = shapes or {}
        self._seed = seed
        self._hints = compared_with(model)
        self._unseen = {(name, value) for name, values in self._hints.items() for value in values}
        self._base: Feed | None = None
        self._edges_ran = False

    def __iter__(self) -> Iterator[tuple[Feed, Feed]]:
        """Yield feeds with the original's outputs, until there are enough or a minute has passed."""
        self._cpu_start, self._deadline = time.process_time(), time.monotonic() + _MAX_SECONDS
        yield from self._given()
        yield from self._made_up()
        if self._base is not None:
            yield from self._needed(self._base)
            yield from self._more(self._base)

    def _is_enough(self) -> bool:
        return time.process_time() - self._cpu_start > _ENOUGH_CPU_SECONDS or self._is_late()

    def _is_late(self) -> bool:
        return time.monotonic() > self._deadline

    def _given(self) -> Iterator[tuple[Feed, Feed]]:
        for feed in () if self._dataset is None else itertools.islice(self._dataset, _DATA_FEEDS):
            if self._base is not None and self._is_enough():
                return
            for pair in self._try(feed):
                self._base = self._base or feed
                yield pair

    def _made_up(self) -> Iterator[tuple[Feed, Feed]]:
        specs = self.session.specs
        unfit = next((spec for spec in specs if spec.kind != "tensor" and not spec.optional), None)
        if unfit is not None:
            self.failure = f"input {unfit.name!r} is a {unfit.kind}"
            return
        real, made_up = self._base is not None, 0
        options: dict[str, Any] = {"fixed": self._shapes, "seed": self._seed, "hints": self._hints}
        small = random_feeds(specs, count=len(_SMALL_SIZES), sizes=_SMALL_SIZES, **options)
        feeds = itertools.chain(small, random_feeds(specs, count=_ATTEMPTS, **options))
        for index, feed in enumerate(feeds):
            for pair in self._try(feed):
                made_up += 1
                self._edges_ran |= index == _EDGE_INDEX
                # Small inputs may leave parts of a model without effect, so the largest is where to go on from.
                if self._base is None or (not real and _size(feed) > _size(self._base)):
                    self._base = feed
                yield pair
            if made_up >= _WANTED_FEEDS or (self._base is not None and self._is_enough()) or self._is_late():
                return

    def _needed(self, base: Feed) -> Iterator[tuple[Feed, Feed]]:
        """What chance has left out of what is needed, in as few feeds as can be."""
        for name, places in dynamic_axes(base, self.session.specs).items():
            old = base[places[0][0]].shape[places[0][1]]
            seen = self.sizes.setdefault(name, set())
            for size in (1, old + 1, old * 2, old // 2):
                if self._is_late():
                    return
                feed = resized_feed(base, places, size) if size and size not in seen else None
                if feed is not None and (size == 1 or len(seen) < 2):
                    yield from self._with_edges(feed)
        if not self._edges_ran:
            yield from self._with_edges(base)
        yield from itertools.chain.from_iterable(self._try(feed) for feed in self._branches(base, self._unseen.copy()))

    def _with_edges(self, feed: Feed) -> Iterator[tuple[Feed, Feed]]:
        """Try a feed, with edge values unless such a feed has run before."""
        edged = None if self._edges_ran else edge_feed(feed, self._seed)
        for pair in self._try(edged or feed):
            self._edges_ran |= edged is not None
            yield pair

    def _more(self, base: Feed) -> Iterator[tuple[Feed, Feed]]:
        # Where few sizes run, many are tried: the ones found by chance may be too small to reach all of the model.
        sizes = SIZES if self.skipped > self.ran else ()
        every = {(name, value) for name, values in self._hints.items() for value in values}
        for feed in (base, *resized_feeds(base, self.session.specs, sizes)):
            for variant in (*([] if feed is base else [feed]), *self._branches(feed, every)):
                if self._is_enough():
                    return
                yield from self._try(variant)

    def _branches(self, feed: Feed, values: set[tuple[str, int]]) -> Iterator[Feed]:
        """The feed with each other of these values that a branch may depend on."""
        for name, value in sorted(values):
            if name in feed and feed[name].size == 1 and feed[name].item() != value:
                yield feed | {name: np.full_like(feed[name], value)}

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
        for name, places in dynamic_axes(feed, self.session.specs).items():
            self.sizes.setdefault(name, set()).update(feed[other].shape[axis] for other, axis in places)
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


def compared_with(model: Model) -> dict[str, list[int]]:
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
