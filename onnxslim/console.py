"""What the commands print: tables and progress for people; JSON is printed by the commands themselves."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from onnxslim.units import human_bytes

if TYPE_CHECKING:
    from onnxslim.bench import BenchEntry
    from onnxslim.compare import Comparison
    from onnxslim.inspection import Inspection
    from onnxslim.passes import Pass
    from onnxslim.record import GraphDifference, GraphPlace, Latency, Record, Score, Snapshot, TargetEntry

__all__ = [
    "print_bench",
    "print_comparison",
    "print_difference",
    "print_inspection",
    "print_passes",
    "print_record",
    "print_targets",
    "print_targets_of",
    "progress_bar",
]

_DIFFERENCES = 20
_NAMES = 3
_STATUS_STYLE = {
    "kept": "green",
    "no change": "dim",
    "rolled back": "yellow",
    "failed": "red",
    "verified": "green",
    "compiled, not run": "yellow",
    "unsupported": "red",
}


@contextlib.contextmanager
def progress_bar(console: Console, *, shown: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Yield a ``progress(what, done, total)`` that draws one bar on a terminal, and nothing elsewhere."""
    if not (shown and console.is_terminal):
        yield lambda what, done, total: None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def update(what: str, done: int, total: int) -> None:
            bar.update(task, description=escape(what), completed=done, total=total or None)

        yield update


def _table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    for number, column in enumerate(columns):
        # What a row is about is what must stay readable on a narrow terminal.
        width = 16 if number == 0 else None
        table.add_column(column, justify="right" if column in right else "left", overflow="fold", min_width=width)
    return table


def _optional_bytes(size: int | None) -> str:
    return "–" if size is None else human_bytes(size)


def _score(score: Score | None) -> str:
    if score is None:
        return "not measured"
    interval = f" [{score.interval.low:.4f}, {score.interval.high:.4f}]" if score.interval else ""
    return f"{score.value:.4f}{interval}"


def _latency(latency: Latency | None) -> str:
    return "not measured" if latency is None else f"{latency.median_ms:.3g} ms"


def print_record(console: Console, record: Record) -> None:
    """The end of ``optimize``: verdict, before and after, passes, targets."""
    style = {"met": "bold green", "not met": "bold red", "no goals": "bold"}[record.verdict]
    console.print(f"[{style}]Goals: {record.verdict}.[/] {escape(record.summary)}")
    for goal in record.goals:
        mark = "[green]✓[/]" if goal.met else "[red]✗[/]"
        console.print(f"  {mark} {escape(goal.name)}: {escape(goal.wanted)}; {escape(goal.achieved)}")
    _print_before_after(console, record.before, record.after)
    right = ("size", "nodes", "score", "seconds")
    table = _table("Passes", "pass", "status", "size", "nodes", "score", "seconds", right=right)
    for entry in record.passes:
        table.add_row(
            entry.name,
            f"[{_STATUS_STYLE[entry.status]}]{entry.status}[/]",
            f"{human_bytes(entry.size_before)} → {human_bytes(entry.size_after)}",
            f"{entry.nodes_before} → {entry.nodes_after}",
            "–" if entry.score_after is None else f"{entry.score_after.value:.4f}",
            "cached" if entry.cached else f"{entry.seconds:.1f}",
        )
    console.print(table)
    for entry in record.passes:
        console.print(f"  {entry.name}: {escape(entry.reason)}")
    if record.targets:
        print_targets_of(console, record.targets)
    for warning in record.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}")


def print_targets_of(console: Console, entries: list[TargetEntry]) -> None:
    """What became of each target: the end of ``compile`` and of ``optimize``."""
    right = ("TVM", "ONNX Runtime", "max error", "bundle")
    table = _table("Targets", "target", "status", "TVM", "ONNX Runtime", "max error", "bundle", right=right)
    for target in entries:
        table.add_row(
            target.name,
            f"[{_STATUS_STYLE.get(target.status, 'red')}]{target.status}[/]",
            _latency(target.latency) if target.latency else "–",
            _latency(target.reference_latency) if target.reference_latency else "–",
            "–" if target.max_abs_error is None else f"{target.max_abs_error:.3g}",
            _optional_bytes(target.bundle_bytes),
        )
    console.print(table)
    for target in entries:
        console.print(f"  {target.name}: {escape(target.reason)}")
        for note in target.notes:
            console.print(f"    note: {escape(note)}")


def _print_before_after(console: Console, before: Snapshot, after: Snapshot) -> None:
    table = _table("Before and after", "", "before", "after", right=("before", "after"))
    table.add_row("size on disk", human_bytes(before.size_bytes), human_bytes(after.size_bytes))
    table.add_row("parameters", f"{before.parameters:,}", f"{after.parameters:,}")
    if before.macs is not None and after.macs is not None:
        table.add_row("MACs (estimate)", f"{before.macs:,}", f"{after.macs:,}")
    table.add_row("nodes", str(before.nodes), str(after.nodes))
    metric = before.score.metric if before.score else "accuracy"
    table.add_row(escape(metric), _score(before.score), _score(after.score))
    threads = f", {before.latency.threads} thread(s)" if before.latency else ""
    table.add_row(f"ONNX Runtime{threads}", _latency(before.latency), _latency(after.latency))
    table.add_row("peak memory", _optional_bytes(before.peak_memory_bytes), _optional_bytes(after.peak_memory_bytes))
    console.print(table)


def print_bench(console: Console, entries: list[BenchEntry]) -> None:
    """The table of ``bench``."""
    threads = entries[0].latency.threads
    right = ("median", "p10", "p90", "ratio", "runs")
    title = f"Latency, {threads} thread(s), interleaved"
    table = _table(title, "what", "runtime", "median", "p10", "p90", "ratio", "runs", right=right)
    for entry in entries:
        latency = entry.latency
        table.add_row(
            escape(entry.path),
            latency.runtime,
            f"{latency.median_ms:.3g} ms",
            f"{latency.p10_ms:.3g} ms",
            f"{latency.p90_ms:.3g} ms",
            f"{latency.ratio:.2f}" if latency.ratio is not None else "–",
            str(len(latency.samples_ms)),
        )
    console.print(table)
    for entry in entries:
        if entry.profile is not None:
            from onnxslim.console_profile import print_profile

            print_profile(console, entry.path, entry.profile)


def print_comparison(console: Console, found: Comparison) -> None:
    """The tables of ``compare``."""
    if found.not_run:
        console.print(f"[yellow]The results were not compared[/]: {escape(found.not_run)}")
    else:
        console.print(f"Over {escape(found.feeds)}: the outputs are {'equal' if found.equal else 'different'}.")
    if found.not_compared:
        console.print(
            f"Not compared, as only one model has them or they differ in kind: {escape(', '.join(found.not_compared))}"
        )
    for title, errors in (("Outputs", found.outputs), ("Inner tensors, in graph order", found.layers)):
        if not errors:
            continue
        right = ("SQNR dB", "cosine", "max error")
        table = _table(title, "tensor", "op", "SQNR dB", "cosine", "max error", right=right)
        for entry in errors:
            table.add_row(
                escape(entry.tensor),
                escape(entry.op),
                "equal" if entry.sqnr_db is None else f"{entry.sqnr_db:.1f}",
                f"{entry.cosine:.6f}",
                f"{entry.max_abs_error:.3g}",
            )
        console.print(table)
    table = _table("Made of", "", "a", "b", right=("a", "b"))
    table.add_row("size on disk", human_bytes(found.a.size_bytes), human_bytes(found.b.size_bytes))
    table.add_row("nodes", str(found.a.nodes), str(found.b.nodes))
    table.add_row("parameters", f"{found.a.parameters:,}", f"{found.b.parameters:,}")
    for op in sorted(set(found.a.ops) | set(found.b.ops)):
        if found.a.ops.get(op, 0) != found.b.ops.get(op, 0):
            table.add_row(escape(op), str(found.a.ops.get(op, 0)), str(found.b.ops.get(op, 0)))
    console.print(table)
    print_difference(console, found.difference)


def print_difference(console: Console, found: GraphDifference) -> None:
    """Which nodes became which; long lists cut short."""
    console.print(f"[bold]Graphs[/]: {escape(found.sentence)}")
    for sentence in found.interface:
        console.print(f"  {escape(sentence)}", highlight=False)
    rows = [(entry.places, entry.sentence) for entry in found.rewritten]
    rows += [(entry.places, f"{entry.op}: {entry.what}") for entry in found.changed]
    for places, what in rows[:_DIFFERENCES]:
        console.print(f"  [bold]{len(places):,} ×[/] {escape(what)}", highlight=False)
        console.print(
            f"      [dim]{'at' if len(places) == 1 else 'first at'} {escape(_place(places[0]))}[/]", highlight=False
        )
    if len(rows) > _DIFFERENCES:
        console.print(f"  … {len(rows) - _DIFFERENCES:,} more; --json has all")
    if found.tensors:
        table = _table("Constants of 1 KiB or more", "constant", "status", "before", "after")
        for tensor in found.tensors[:_DIFFERENCES]:
            table.add_row(escape(tensor.name), tensor.status, tensor.before or "–", tensor.after or "–")
        console.print(table)
    if len(found.tensors) > _DIFFERENCES:
        console.print(f"… {len(found.tensors) - _DIFFERENCES:,} more; --json has all")


def _place(place: GraphPlace) -> str:
    sides = (
        ", ".join(names[:_NAMES]) + (", …" if len(names) > _NAMES else "") for names in (place.before, place.after)
    )
    before, after = (side or "nothing" for side in sides)
    return before if before == after else f"{before} → {after}"


def print_inspection(console: Console, found: Inspection) -> None:
    """The tables of ``inspect``."""
    model = found.model
    console.print(
        f"[bold]{escape(model.path)}[/] {human_bytes(model.size_bytes)}, opset {model.opset}, IR {model.ir_version}"
    )
    if found.producer:
        console.print(f"made by {escape(found.producer)}")
    for warning in found.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}")
    for name, spec in found.inputs.items():
        console.print(f"  input {escape(name)}: {escape(spec)}")
    console.print(f"  outputs: {escape(', '.join(found.outputs))}")
    macs = "unknown" if model.macs is None else f"{model.macs:,}"
    console.print(f"  {model.nodes} nodes, {model.parameters:,} parameters, {macs} MACs (estimate)")
    console.print("  " + escape(", ".join(f"{op} {count}" for op, count in model.ops.items())))
    table = _table("What each pass would do", "pass", "changes", "left alone, and why")
    for prospect in found.passes:
        changes = "\n".join(f"{rule}: {count}" for rule, count in prospect.changes.items()) or "none"
        reasons = [f"{count} × {why}" for why, count in list(prospect.refusals.items())[:5]]
        if len(prospect.refusals) > 5:
            reasons.append(f"… and {len(prospect.refusals) - 5} more reasons")
        table.add_row(prospect.name, escape(changes), escape(prospect.note or "\n".join(reasons) or "–"))
    console.print(table)
    for target in found.targets:
        if target.compiles:
            console.print(f"target {target.name}: TVM has every op")
        else:
            lacking = "; ".join(f"{op}: {', '.join(nodes)}" for op, nodes in target.unsupported_ops.items())
            console.print(f"target {target.name}: [red]cannot be compiled[/]: {escape(target.note or lacking)}")


def print_passes(console: Console, kinds: list[type[Pass]], *, whole: bool) -> None:
    """Passes with their options, defaults and what they mean; with the whole description where ``whole``."""
    for kind in kinds:
        text = inspect.cleandoc(kind.__doc__ or "")
        nature = "lossless" if kind.lossless else "lossy, needs calibration data" if kind.needs_calibration else "lossy"
        console.print(f"[bold]{kind.name}[/] ({nature}): {escape(text if whole else text.partition(chr(10))[0])}")
        for name, field in kind.model_fields.items():
            default = "" if field.is_required() else f" = {field.get_default(call_default_factory=True)!r}"
            console.print(f"    [cyan]{name}[/]{escape(default)}  {escape(field.description or '')}")


def print_targets(console: Console) -> None:
    """Every target."""
    from onnxslim.targets import TARGETS

    table = _table("Targets", "name", "description")
    for target in TARGETS.values():
        table.add_row(target.name, escape(target.description))
    console.print(table)
