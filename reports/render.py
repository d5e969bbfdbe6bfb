"""From a record to one HTML file that needs nothing else: no script, no font, no picture and no network."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path, PurePath
from typing import Any

import jinja2
import tomlkit
from markupsafe import Markup, escape

from onnxslim.errors import OutputError
from onnxslim.record import Latency, PassEntry, Record
from onnxslim.reports import charts, rows, tiles, units
from onnxslim.reports.svg import Chart

__all__ = ["render", "write"]

_HERE = Path(__file__).parent
_LONGEST_TEXT = 1000
_LONGEST_RECIPE = 20_000
_DRAWN_LAYERS = 20
_DRAWN_OPS = 16
_DRAWN_TARGETS = 8
_LISTED = 500
_LISTED_PASSES = 100
_LISTED_TENSORS = 100
_LISTED_NODES = 50
_LISTED_KERNELS = 25


def render(record: Record) -> str:
    """Write the report of a run as one self-contained HTML page.

    The same record gives the same text. Every string of the record is taken for hostile and escaped; what would make
    the page too long is cut, and the page says so.
    """
    return _environment().get_template("report.html").render(_view(record))


def write(record: Record, path: Path) -> None:
    """Render ``record`` to ``path``, which then holds the whole report or what it held before.

    Raises:
        OutputError: the file cannot be written there.
    """
    text = render(record)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8", newline="\n")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: the report cannot be written there ({error.strerror}).") from None


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.filters.update(
        bytes=units.as_bytes,
        signed_bytes=units.signed_bytes,
        count=units.count,
        signed_count=units.signed_count,
        estimate=units.estimate,
        ms=units.milliseconds,
        duration=units.duration,
        moment=units.moment,
        value=units.value,
        times=units.ratio,
        score=units.score,
        short=units.shorten,
        literal=_literal,
        runtime=tiles.runtime_name,
        threads=tiles.thread_count,
    )
    environment.globals.update(percent_change=units.percent_change, points=units.points, target_ratio=rows.target_ratio)
    return environment


def _finalize(value: Any) -> Any:
    """Make what a template prints fit to print: no None, no control characters, nothing of unbounded length."""
    if value is None:
        return units.NOTHING
    if isinstance(value, str) and not isinstance(value, Markup):
        text = units.clean(value)
        return text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + "…"
    return value


def _view(record: Record) -> dict[str, Any]:
    """Everything that the templates ask for."""
    layers = rows.layer_rows(record.before.layers, record.after.layers)
    ops = rows.op_rows(record.before.ops, record.after.ops)
    worst = rows.worst_errors(record.layer_errors)
    limit = rows.group_limit(record)
    size = (record.before.size_bytes, record.after.size_bytes)
    difference = record.difference
    pieces, more_pieces = rows.difference_groups(difference.rewritten if difference else [], limit)
    node_changes, more_node_changes = rows.difference_groups(difference.changed if difference else [], limit)
    return {
        "record": record,
        "css": Markup((_HERE / "report.css").read_text(encoding="utf-8")),
        "name": PurePath(record.before.path.replace("\\", "/")).name or "model",
        "summary": record.summary or tiles.headline(record),
        "goals_met": sum(goal.met is True for goal in record.goals),
        "tiles": tiles.tiles(record),
        "targets_without_tile": max(0, len(record.targets) - _DRAWN_TARGETS),
        "ledger": [_ledger_row(entry, limit) for entry in record.passes[:_LISTED_PASSES]],
        "pieces": pieces,
        "more_pieces": more_pieces,
        "node_changes": node_changes,
        "more_node_changes": more_node_changes,
        "tensors": difference.tensors[:_LISTED_TENSORS] if difference else [],
        "size_chart": charts.waterfall(record.passes, *size) if record.passes else None,
        "model_latency": _latency_rows("before", record.before.latency, "after", record.after.latency),
        "model_chart": _model_chart(record),
        "target_charts": _target_charts(record),
        "targets_without_chart": max(0, sum(_timed(t) for t in record.targets) - _DRAWN_TARGETS),
        "target_latency": [
            (target.name, _latency_rows("compiled", target.latency, "reference", target.reference_latency))
            for target in record.targets
        ],
        "layers": layers[:_LISTED],
        "layer_count": len(layers),
        "layer_chart": charts.layer_chart(layers[:_DRAWN_LAYERS], len(layers)) if layers else None,
        "errors": [(entry, any(entry is bad for bad in worst)) for entry in record.layer_errors[:_LISTED]],
        "worst": worst,
        "error_chart": charts.error_chart(record.layer_errors, worst) if record.layer_errors else None,
        "ops": ops[:_LISTED],
        "op_count": len(ops),
        "op_chart": charts.op_chart(ops[:_DRAWN_OPS], len(ops)) if ops else None,
        "missing": rows.missing_values(record),
        "recipe": _recipe(record),
        "reproduce": Markup(escape(units.clean(record.command))),
        "listed_nodes": _LISTED_NODES,
        "listed_kernels": _LISTED_KERNELS,
        "profiled_targets": _DRAWN_TARGETS,
    }


def _ledger_row(entry: PassEntry, limit: int) -> dict[str, Any]:
    changes, more_rules = rows.groups(entry.changes, "rule", ("node", "what"), limit)
    refusals, more_reasons = rows.groups(entry.refusals, "why", ("node", "rule"), limit)
    undone, _ = rows.groups([vars(item) for item in entry.undone], "rule", ("node", "why"), limit)
    return {
        "entry": entry,
        "undone": undone,
        "changes": changes,
        "more_rules": more_rules,
        "refusals": refusals,
        "more_reasons": more_reasons,
    }


def _latency_rows(label: str, one: Latency | None, other: str, two: Latency | None) -> list[tuple[str, Latency]]:
    return [(name, latency) for name, latency in ((label, one), (other, two)) if latency is not None]


def _model_chart(record: Record) -> Chart | None:
    series = [
        (f"{name}, {tiles.runtime_name(latency)}", latency, name == "after")
        for name, latency in _latency_rows("before", record.before.latency, "after", record.after.latency)
    ]
    return charts.latency_chart("timed", "Latency of the model, before and after", series) if series else None


def _timed(target: Any) -> bool:
    return target.latency is not None or target.reference_latency is not None


def _target_charts(record: Record) -> list[Chart]:
    drawn = []
    for place, target in enumerate([target for target in record.targets if _timed(target)][:_DRAWN_TARGETS]):
        pairs = _latency_rows("ONNX Runtime", target.reference_latency, "compiled", target.latency)
        series = [(tiles.runtime_name(latency), latency, label == "compiled") for label, latency in pairs]
        title = f"Latency on {units.shorten(target.name, 60)}"
        drawn.append(charts.latency_chart(f"target{place}", title, series))
    return drawn


def _recipe(record: Record) -> Markup:
    """Write the resolved recipe as TOML, the form that it is written in."""
    plain = record.model_dump(mode="json", include={"recipe"})["recipe"]
    text = units.clean(tomlkit.dumps(_without_none(plain)))
    if len(text) > _LONGEST_RECIPE:
        text = text[:_LONGEST_RECIPE] + "\n# … cut here; the whole recipe is in recipe.lock.toml and record.json"
    return Markup(escape(text))


def _without_none(value: Any) -> Any:
    """Drop what TOML has no word for."""
    if isinstance(value, Mapping):
        return {str(key): _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value if item is not None]
    return value


def _literal(value: Any) -> str:
    """Write the value of an option."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return units.shorten(text, 200)
