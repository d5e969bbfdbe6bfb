"""Numbers as people read them: decimal bytes, ms, percent and points, with a no-break space before the unit."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from datetime import datetime

from onnxslim.record import Interval, Score

__all__ = [
    "as_bytes",
    "clean",
    "count",
    "duration",
    "estimate",
    "interval",
    "is_fraction",
    "milliseconds",
    "moment",
    "percent_change",
    "points",
    "ratio",
    "score",
    "shorten",
    "signed_bytes",
    "signed_count",
    "value",
]

NOTHING = "–"
_SPACE = "\u00a0"
_MINUS = "\u2212"
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
_FRACTION_WORDS = ("accuracy", "agreement")


def value(number: float | None, digits: int = 3) -> str:
    """Round to ``digits`` significant digits, never to an exponent between 1e-4 and 1e15; a dash for None and NaN."""
    if number is None or math.isnan(number):
        return NOTHING
    if math.isinf(number):
        return "∞" if number > 0 else f"{_MINUS}∞"
    if number == 0:
        return "0"
    size = abs(number)
    sign = _MINUS if number < 0 else ""
    if size < 1e-4 or size >= 1e15:
        mantissa, exponent = f"{size:.{digits - 1}e}".split("e")
        return f"{sign}{mantissa}e{_minus(str(int(exponent)))}"
    decimals = max(0, digits - 1 - math.floor(math.log10(size)))
    text = f"{size:,.{decimals}f}"
    # Rounding up may have won a digit (9.996 -> 10.00): drop the surplus one.
    if decimals and math.floor(math.log10(float(text.replace(",", "")))) > math.floor(math.log10(size)):
        text = f"{size:,.{decimals - 1}f}"
    return sign + text


def count(number: float | None) -> str:
    """Write a whole number with thousands separators."""
    if number is None or not math.isfinite(number):
        return value(number)
    return _minus(f"{number:,.0f}") if number == int(number) else value(number)


def estimate(number: float | None) -> str:
    """Write a large count in thousands, millions or billions: ``1.23 G``."""
    return _scaled(number, ("", "k", "M", "G", "T", "P"))


def as_bytes(number: float | None) -> str:
    """Write bytes in decimal units: ``512 B``, ``1.23 MB``."""
    return _scaled(number, ("B", "kB", "MB", "GB", "TB", "PB"))


def signed_bytes(number: float | None) -> str:
    """Write a difference of bytes, with its sign."""
    return _signed(number, as_bytes)


def signed_count(number: float | None) -> str:
    """Write a difference of whole numbers, with its sign."""
    return _signed(number, count)


def milliseconds(number: float | None) -> str:
    """Write milliseconds as µs, ms or s, whichever reads best."""
    if number is None or not math.isfinite(number):
        return value(number)
    if number != 0 and abs(number) < 1:
        return f"{value(number * 1000)}{_SPACE}µs"
    if abs(number) >= 1000:
        return f"{value(number / 1000)}{_SPACE}s"
    return f"{value(number)}{_SPACE}ms"


def duration(seconds: float | None) -> str:
    """Write seconds as ms, s, min or h."""
    if seconds is None or not math.isfinite(seconds):
        return value(seconds)
    if seconds < 60:
        return milliseconds(seconds * 1000)
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{_SPACE}min {rest}{_SPACE}s"
    return f"{minutes // 60}{_SPACE}h {minutes % 60}{_SPACE}min"


def moment(text: str) -> str:
    """Write an ISO 8601 time for people; what is no such time stays as it is."""
    try:
        when = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return text
    zone = when.tzname()
    return f"{when:%Y-%m-%d %H:%M}{_SPACE}{zone}" if zone else f"{when:%Y-%m-%d %H:%M}"


def percent_change(before: float | None, after: float | None) -> str:
    """Write the relative change from ``before`` to ``after``; a dash where there is none to speak of."""
    if before is None or after is None or not before or not math.isfinite(before) or not math.isfinite(after):
        return NOTHING
    change = 100 * (after - before) / abs(before)
    if change == 0:
        return f"0{_SPACE}%"
    if abs(change) < 0.05:
        return f"{'+' if change > 0 else _MINUS}<{_SPACE}0.1{_SPACE}%"
    shown = f"{abs(change):,.1f}" if abs(change) < 100 else f"{abs(change):,.0f}"
    # Something that is still there must not read as gone.
    if change > -100 and shown in ("100.0", "100"):
        shown = ">" + _SPACE + "99.9"
    return f"{'+' if change > 0 else _MINUS}{shown}{_SPACE}%"


def ratio(number: float | None) -> str:
    """Write a ratio of times: ``0.43×``."""
    if number is None or not math.isfinite(number):
        return value(number)
    return f"{number:.2f}×" if 0.1 <= abs(number) < 10 else f"{value(number)}×"


def is_fraction(metric: str) -> bool:
    """Whether a metric is known to be a share of samples, which reads best in percent.

    Other metrics (a cosine, an error, a function of the user's own) are shown as the numbers that they are.
    """
    name = metric.partition("@")[0].casefold().replace("-", "").replace("_", "").replace(" ", "")
    if ":" in name:
        return False
    return (name.startswith("top") and name[3:4].isdigit()) or any(word in name for word in _FRACTION_WORDS)


def score(entry: Score | None) -> str:
    """Write an accuracy in percent where its metric is a share, else as a plain number."""
    if entry is None:
        return NOTHING
    return _score_number(entry.value, entry.metric)


def points(before: Score | None, after: Score | None) -> str:
    """Write the change of an accuracy: percentage points where the metric is a share, else a plain difference."""
    if before is None or after is None or before.metric != after.metric:
        return NOTHING
    change = after.value - before.value
    if not math.isfinite(change):
        return NOTHING
    if is_fraction(after.metric):
        change *= 100
        if 0 < abs(change) < 0.005:
            return f"{'+' if change > 0 else _MINUS}<{_SPACE}0.01{_SPACE}points"
        text = f"{abs(change):.2f}"
        sign = "±" if change == 0 else "+" if change > 0 else _MINUS
        return f"{sign}{'0' if change == 0 else text}{_SPACE}points"
    return ("±" if change == 0 else "+" if change > 0 else "") + value(change) + _decibels(after.metric)


def interval(bounds: Interval | None, metric: str) -> str:
    """Write a confidence interval: ``95 % CI 70.1 to 73.4 % (Wilson)``."""
    if bounds is None:
        return ""
    low, high = _score_number(bounds.low, metric), _score_number(bounds.high, metric)
    if is_fraction(metric):
        low = low.removesuffix(f"{_SPACE}%")
    return f"{bounds.level * 100:g}{_SPACE}% CI {low} to {high} ({bounds.method})"


def clean(text: object) -> str:
    """Make a string from outside fit to print.

    Control characters, lone surrogates, noncharacters (none of them legal in SVG) and marks that turn the writing
    direction of what follows become U+FFFD.
    """
    return _UNPRINTABLE.sub("\ufffd", str(text))


def shorten(text: object, length: int = 120, tail: bool = False) -> str:
    """Cut a long name in its middle, or at its start where ``tail`` says that the end is what tells names apart."""
    whole = " ".join(clean(text).split())
    if len(whole) <= length:
        return whole
    if tail:
        return "…" + whole[len(whole) - length + 1 :]
    head = (length - 1) * 2 // 3
    return whole[:head] + "…" + whole[len(whole) - (length - 1 - head) :]


def _score_number(number: float, metric: str) -> str:
    if not math.isfinite(number):
        return NOTHING
    if is_fraction(metric):
        return _minus(f"{number * 100:.2f}") + f"{_SPACE}%"
    return value(number, 4) + _decibels(metric)


def _decibels(metric: str) -> str:
    return f"{_SPACE}dB" if metric.partition("@")[0] == "sqnr" else ""


def _scaled(number: float | None, units: tuple[str, ...]) -> str:
    if number is None or not math.isfinite(number):
        return value(number)
    size, step = abs(number), 0
    # 999.5 would round to 1,000 of the smaller unit.
    while size >= 999.5 and step < len(units) - 1:
        size, step = size / 1000, step + 1
    text = value(size) if step or size != int(size) else f"{size:.0f}"
    unit = units[step]
    return (_MINUS if number < 0 else "") + text + (_SPACE + unit if unit else "")


def _signed(number: float | None, write: Callable[[float], str]) -> str:
    if number is None:
        return NOTHING
    if number == 0:
        return "±0"
    return ("+" if number > 0 else "") + write(number)


def _minus(text: str) -> str:
    return text.replace("-", _MINUS)
