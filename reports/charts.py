"""The pictures of the report: drawn by Matplotlib, shown as inline SVG, each with its numbers beside it in a table."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from onnxslim.record import Latency, LayerError, PassEntry
from onnxslim.reports import units
from onnxslim.reports.rows import LayerRow, OpRow
from onnxslim.reports.svg import AFTER, BAD, BEFORE, GRID, INK, MUTED, SURFACE, Chart, drawing, inline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["error_chart", "latency_chart", "layer_chart", "op_chart", "waterfall"]

WIDTH = 880
_LABELS = 210
_VALUES = 140
_ROW = 26
_MOST_PASSES = 40
_MOST_DOTS = 200
_MOST_TENSORS = 1000


def waterfall(passes: Sequence[PassEntry], before: int, after: int) -> Chart:
    """Size on disk over the passes: kept passes move it, passes that were taken back are drawn hollow."""
    shown = list(passes[:_MOST_PASSES])
    left_out = len(passes) - len(shown)
    with drawing():
        figure, axes = _rows(len(shown) + 2)
        tips = {"first": f"original: {units.as_bytes(before)}", "last": f"result: {units.as_bytes(after)}"}
        axes.barh(0, before, height=0.62, color=BEFORE)[0].set_gid("first")
        _value(axes, before, 0, units.as_bytes(before))
        for row, entry in enumerate(shown, start=1):
            _step(axes, row, entry, tips)
        last = len(shown) + 1
        axes.barh(last, after, height=0.62, color=AFTER)[0].set_gid("last")
        _value(axes, after, last, f"{units.as_bytes(after)} ({units.percent_change(before, after)})")
        names = ["original", *(entry.name for entry in shown), "result"]
        widest = max(before, after, *(max(entry.size_before, entry.size_after) for entry in shown), 1)
        _finish_rows(axes, names, widest, units.as_bytes)
        title = "Size on disk after each pass"
        described = f"From {units.as_bytes(before)} to {units.as_bytes(after)} over {len(passes)} passes."
        note = f"The first {_MOST_PASSES} passes are drawn; {left_out} more are in the table." if left_out else ""
        return Chart(title, inline(figure, "size-chart", title, described, tips), note)


def latency_chart(key: str, title: str, series: Sequence[tuple[str, Latency, bool]]) -> Chart:
    """Every timed run of each series as a dot, the middle half as a box, the median as a line, p10 to p90 as whiskers.

    Args:
        key: unique on the page.
        title: what was timed.
        series: label, times, and whether it is the newer of what is compared.
    """
    with drawing():
        figure, axes = _rows(len(series), row=44)
        limit = max(_reach(latency) for _, latency, _ in series) * 1.08 or 1.0
        beyond = 0
        for row, (_, latency, new) in enumerate(series):
            times = [time for time in latency.samples_ms if math.isfinite(time)]
            beyond += sum(time > limit for time in times)
            _strip(axes, row, latency, [time for time in times if time <= limit], AFTER if new else BEFORE)
            _value(axes, limit, row, units.milliseconds(latency.median_ms))
        _finish_rows(axes, [label for label, _, _ in series], limit, units.milliseconds, pad=1.0)
        described = "; ".join(
            f"{label}: median {units.milliseconds(latency.median_ms)}, p10 {units.milliseconds(latency.p10_ms)}, "
            f"p90 {units.milliseconds(latency.p90_ms)}, {len(latency.samples_ms)} runs"
            for label, latency, _ in series
        )
        notes = []
        if beyond:
            slowest = max(max(latency.samples_ms, default=0.0) for _, latency, _ in series)
            notes.append(
                f"{beyond} slow run{'s lie' if beyond > 1 else ' lies'} beyond the right edge, "
                f"the slowest at {units.milliseconds(slowest)}."
            )
        if any(len(latency.samples_ms) > _MOST_DOTS for _, latency, _ in series):
            notes.append(f"At most {_MOST_DOTS} runs of each are drawn, evenly by rank; all are in record.json.")
        return Chart(title, inline(figure, f"{key}-chart", title, described), " ".join(notes))


def layer_chart(rows: Sequence[LayerRow], total: int) -> Chart:
    """Bytes of the largest layers: before as a wide pale bar, after as a narrow one on it."""
    title = f"The {len(rows)} largest layers, before and after" if total > len(rows) else "Layers, before and after"
    with drawing():
        figure, axes = _rows(len(rows), row=22)
        tips = {}
        for place, row in enumerate(rows):
            old, new = row.bytes_before or 0, row.bytes_after or 0
            axes.barh(place, old, height=0.78, color=BEFORE, alpha=0.45)[0].set_gid(f"old{place}")
            axes.barh(place, new, height=0.36, color=AFTER)[0].set_gid(f"new{place}")
            tips[f"old{place}"] = f"{units.shorten(row.name)}: {units.as_bytes(row.bytes_before)} before"
            tips[f"new{place}"] = f"{units.shorten(row.name)}: {units.as_bytes(row.bytes_after)} after"
            text = f"{units.as_bytes(row.bytes_before)} → {units.as_bytes(row.bytes_after)}"
            _value(axes, max(old, new), place, text if old != new else units.as_bytes(new))
        widest = max((max(row.bytes_before or 0, row.bytes_after or 0) for row in rows), default=1)
        _finish_rows(axes, [row.name for row in rows], widest, units.as_bytes)
        note = f"{len(rows)} of {total:,} layers are drawn." if total > len(rows) else ""
        return Chart(
            title, inline(figure, "layers-chart", title, "The table below holds the same numbers.", tips), note
        )


def error_chart(errors: Sequence[LayerError], worst: Sequence[LayerError]) -> Chart:
    """Signal to noise of each tensor in the order of the graph; the worst are numbered as in the table."""
    from matplotlib.ticker import MaxNLocator

    title = "Signal to quantization noise of each tensor, in graph order"
    shown = list(errors[:_MOST_TENSORS])
    places = {id(entry): place for place, entry in enumerate(shown)}
    measured = [
        (place, entry.sqnr_db)
        for place, entry in enumerate(shown)
        if entry.sqnr_db is not None and math.isfinite(entry.sqnr_db)
    ]
    equal = [place for place, entry in enumerate(shown) if entry.sqnr_db is None]
    with drawing():
        figure, axes = _figure(230, left=54, right=20, bottom=40, top=22)
        axes.grid(axis="y")
        axes.grid(visible=False, axis="x")
        levels = [level for _, level in measured] or [0.0]
        low, high = min(*levels, 0.0), max(*levels, 10.0) * 1.12
        axes.plot(*zip(*measured, strict=True), color=AFTER, linewidth=1.0, alpha=0.5) if measured else None
        _dots(axes, measured, AFTER, 4.5)
        _dots(axes, [(place, high) for place in equal], BEFORE, 4.5)
        for rank, entry in enumerate(worst, start=1):
            if id(entry) not in places or entry.sqnr_db is None or not math.isfinite(entry.sqnr_db):
                continue
            point = (places[id(entry)], entry.sqnr_db)
            _dots(axes, [point], BAD, 8.0)
            axes.annotate(
                str(rank), point, xytext=(0, 7), textcoords="offset points", ha="center", color=BAD, weight="bold"
            )
        axes.set_xlim(-0.02 * len(shown) - 0.5, len(shown) * 1.02)
        axes.set_ylim(low, high + 0.04 * (high - low))
        axes.set_ylabel("SQNR in dB")
        axes.set_xlabel("tensor, in graph order")
        axes.tick_params(labelcolor=MUTED)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        described = f"{len(errors)} tensors, {len(equal)} of them equal to the original. Higher is better."
        notes = [f"{len(equal)} equal to the original, drawn at the top edge."] if equal else []
        if len(errors) > len(shown):
            notes.append(f"The first {len(shown):,} of {len(errors):,} tensors are drawn.")
        return Chart(title, inline(figure, "errors-chart", title, described), " ".join(notes))


def op_chart(rows: Sequence[OpRow], total: int) -> Chart:
    """How many nodes of each op there are, before and after."""
    from matplotlib.ticker import MaxNLocator

    title = "Nodes of each op, before and after"
    with drawing():
        figure, axes = _rows(len(rows), row=24)
        for place, row in enumerate(rows):
            axes.barh(place - 0.18, row.before, height=0.34, color=BEFORE)
            axes.barh(place + 0.18, row.after, height=0.34, color=AFTER)
            text = f"{row.before:,} → {row.after:,}" if row.before != row.after else f"{row.after:,}"
            _value(axes, max(row.before, row.after), place, text)
        widest = max((max(row.before, row.after) for row in rows), default=1)
        _finish_rows(axes, [row.op for row in rows], widest, units.count)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        note = f"The {len(rows)} most frequent of {total:,} ops are drawn." if total > len(rows) else ""
        return Chart(title, inline(figure, "ops-chart", title, "The table below holds the same numbers."), note)


def _step(axes: Axes, row: int, entry: PassEntry, tips: dict[str, str]) -> None:
    left, width = min(entry.size_before, entry.size_after), abs(entry.size_after - entry.size_before)
    gid = f"step{row}"
    text = units.signed_bytes(entry.size_after - entry.size_before)
    tips[gid] = f"{units.shorten(entry.name)}, {entry.status}: {text}"
    if entry.status == "kept":
        color = AFTER if entry.size_after <= entry.size_before else BAD
        axes.barh(row, width, left=left, height=0.62, color=color)[0].set_gid(gid)
    elif width:
        bar = axes.barh(row, width, left=left, height=0.62, facecolor="none", edgecolor=MUTED, linestyle=(0, (3, 2)))
        bar[0].set_gid(gid)
    settled = entry.size_after if entry.status == "kept" else entry.size_before
    axes.plot([settled, settled], [row - 0.31, row + 1.31], color=MUTED, linewidth=1.0, alpha=0.7)
    if row == 1:
        axes.plot([entry.size_before] * 2, [-0.31, 1.31], color=MUTED, linewidth=1.0, alpha=0.7)
    _value(axes, left + width, row, text if entry.status == "kept" else entry.status)


def _strip(axes: Axes, row: int, latency: Latency, times: list[float], color: str) -> None:
    ordered = sorted(times)
    if len(ordered) > _MOST_DOTS:
        ordered = [ordered[round(step * (len(ordered) - 1) / (_MOST_DOTS - 1))] for step in range(_MOST_DOTS)]
    # The golden ratio spreads the dots evenly over the height, the same way every time.
    _dots(axes, [(t, row + 0.62 * ((i * 0.618034) % 1 - 0.5)) for i, t in enumerate(ordered)], color, 3.2, alpha=0.55)
    axes.plot([latency.p10_ms, latency.p90_ms], [row, row], color=INK, linewidth=1.2)
    if len(times) >= 4:
        whole = sorted(times)
        low, high = whole[len(whole) // 4], whole[(3 * len(whole)) // 4]
        axes.barh(row, high - low, left=low, height=0.5, facecolor=SURFACE, edgecolor=INK, linewidth=1.2, zorder=2.5)
    axes.plot([latency.median_ms] * 2, [row - 0.32, row + 0.32], color=INK, linewidth=2.4, zorder=3)


def _reach(latency: Latency) -> float:
    """How far right a strip must be shown: to the slowest run, or where runs are strays by Tukey's outer fence."""
    times = sorted(time for time in latency.samples_ms if math.isfinite(time))
    reach = max(latency.p90_ms, latency.median_ms)
    if not times:
        return reach
    low, high = times[len(times) // 4], times[(3 * len(times)) // 4]
    return max(reach, min(times[-1], high + 3 * (high - low)))


def _dots(
    axes: Axes, points: Sequence[tuple[float, float]], color: str, size: float, alpha: float | None = None
) -> None:
    """Draw all points as one path of very short, round-ended strokes: a tenth of the bytes of a marker each."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    if not points:
        return
    corners = [corner for x, y in points for corner in ((x, y), (x, y))]
    codes = [Path.MOVETO, Path.LINETO] * len(points)
    patch = PathPatch(
        Path(corners, codes),
        edgecolor=color,
        facecolor="none",
        linewidth=size,
        capstyle="round",
        alpha=alpha,
        zorder=2.2,
    )
    axes.add_patch(patch)


def _rows(rows: int, row: int = _ROW) -> tuple[Figure, Axes]:
    return _figure(rows * row + 30, left=_LABELS, right=_VALUES, bottom=26, top=4)


def _figure(height: int, *, left: int, right: int, bottom: int, top: int) -> tuple[Figure, Axes]:
    """Make a figure of ``WIDTH`` by ``height`` CSS pixels with margins in the same unit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
    axes = figure.add_axes(
        (left / WIDTH, bottom / height, (WIDTH - left - right) / WIDTH, (height - top - bottom) / height)
    )
    return figure, axes


def _finish_rows(
    axes: Axes, labels: Sequence[str], widest: float, write: Callable[[float], str], pad: float = 1.02
) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlim(0, widest * pad)
    axes.set_ylim(len(labels) - 0.45, -0.55)
    axes.set_yticks(range(len(labels)), [units.shorten(label, 32, tail=True) for label in labels])
    axes.xaxis.set_major_locator(MaxNLocator(5, min_n_ticks=2))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: _tick(write, number)))
    axes.axvline(0, color=GRID, linewidth=1.5)


def _value(axes: Axes, x: float, row: int, text: str) -> None:
    axes.annotate(text, (x, row), xytext=(6, 0), textcoords="offset points", va="center", color=MUTED, size=10.5)


def _tick(write: Callable[[float], str], number: float) -> str:
    """Write a round number without the zeros that a measured one needs."""
    return re.sub(r"(\.\d*?)0+(?!\d)", lambda match: match[1].rstrip("."), write(float(f"{number:.6g}")))
