"""Numbers read well and never lie by rounding."""

from __future__ import annotations

import pytest

from onnxslim.record import Interval
from onnxslim.reports import units


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_499, "999 kB"),
        (999_600, "1.00 MB"),
        (13_964_571, "14.0 MB"),
        (2.5e9, "2.50 GB"),
        (None, "–"),
    ],
)
def test_bytes(number: float | None, expected: str) -> None:
    assert units.as_bytes(number).replace("\u00a0", " ") == expected


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0.0123, "12.3 µs"),
        (0.9999, "1,000 µs"),
        (1, "1.00 ms"),
        (12.345, "12.3 ms"),
        (1500, "1.50 s"),
        (0, "0 ms"),
        (-0.213, "−213 µs"),
        (float("nan"), "–"),
    ],
)
def test_milliseconds(number: float, expected: str) -> None:
    assert units.milliseconds(number).replace("\u00a0", " ") == expected


@pytest.mark.parametrize(
    ("number", "expected"),
    [(0.02, "20.0 ms"), (48.2, "48.2 s"), (59.99, "60.0 s"), (75, "1 min 15 s"), (3725, "1 h 2 min"), (None, "–")],
)
def test_duration(number: float | None, expected: str) -> None:
    assert units.duration(number).replace("\u00a0", " ") == expected


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (100, 25, "−75.0 %"),
        (100, 100, "0 %"),
        (100_000, 99_999, "−< 0.1 %"),
        (1e6, 1, "−> 99.9 %"),
        (1e6, 0, "−100 %"),
        (10, 35, "+250 %"),
        (0, 5, "–"),
        (None, 5, "–"),
    ],
)
def test_percent_change(before: float | None, after: float | None, expected: str) -> None:
    assert units.percent_change(before, after).replace("\u00a0", " ") == expected


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (9.996, "10.0"),
        (99.96, "100"),
        (0.09996, "0.100"),
        (1234.5, "1,234"),
        (1e-9, "1.00e−9"),
        (3e20, "3.00e20"),
        (-0.5, "−0.500"),
        (float("inf"), "∞"),
    ],
)
def test_value(number: float, expected: str) -> None:
    assert units.value(number) == expected


@pytest.mark.parametrize(
    ("metric", "share"),
    [
        ("top1", True),
        ("top-5", True),
        ("Top_1 agreement", True),
        ("balanced accuracy", True),
        ("cosine", False),
        ("my_module:accuracy", False),
        ("top1@logits", True),
        ("topology", False),
    ],
)
def test_only_shares_are_shown_in_percent(metric: str, share: bool) -> None:
    assert units.is_fraction(metric) is share


def test_interval_and_ratio() -> None:
    bounds = Interval(low=0.701, high=0.734, method="Wilson")
    assert units.interval(bounds, "top1").replace("\u00a0", " ") == "95 % CI 70.10 to 73.40 % (Wilson)"
    assert units.interval(bounds, "cosine").replace("\u00a0", " ") == "95 % CI 0.7010 to 0.7340 (Wilson)"
    assert [units.ratio(number) for number in (0.4712, 12.34, 0.01234, None)] == ["0.47×", "12.3×", "0.0123×", "–"]


def test_shorten_keeps_what_tells_names_apart() -> None:
    assert units.shorten("a" * 50 + "/tail", 20, tail=True).endswith("aaa/tail")
    assert len(units.shorten("x" * 500, 40)) == 40
    assert units.shorten("two\n  lines") == "two lines"
    assert units.moment("yesterday") == "yesterday"
