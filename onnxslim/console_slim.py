"""What ``onnxslim slim`` prints: what the model was made of and is now, and the ledger of rules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from onnxslim.ledger import Figures, RuleLines, grouped
from onnxslim.slim import SlimRun
from onnxslim.units import human_bytes

__all__ = ["explain", "print_figures", "print_slim"]

_OPS = 20
_PLACES = 8
_TEXT = 300


def print_slim(console: Console, before: Figures, after: Figures, run: SlimRun) -> None:
    """The end of ``slim``: what the model was made of and is now, how it was checked and what was undone."""
    _print_figures(console, ("before", "after"), (before, after), changed_only=True)
    rules = ", ".join(f"{lines.rule} {len(lines.places):,}" for lines in grouped(run.outcome.changes))
    if not run.outcome.changes:
        console.print("Nothing to do: no rule applies.")
    elif run.kept:
        console.print(f"Rules applied: {escape(rules)}.")
    else:
        console.print("[bold red]Nothing was kept[/]: the output is what went in.")
    for check in run.checks:
        if not check.ok:
            console.print(f"[red]✗[/] {escape(check.name)}: {escape(check.detail)}")
        elif check.name == "outputs":
            console.print(f"Checked: {escape(check.detail)}.")
        elif check.detail.startswith("warning"):
            console.print(f"[yellow]{escape(check.detail)}[/]")
    for entry in run.undone:
        console.print(f"[yellow]undone[/]: {escape(entry.rule)} at {escape(entry.node)}, because {escape(entry.why)}")


def explain(console: Console, run: SlimRun) -> None:
    """Every rule that was applied or that declined: how often, where and why; long lists cut short."""
    _print_lines(console, "Applied", grouped(run.outcome.changes))
    _print_lines(console, "Declined", grouped(run.outcome.refusals))


def _print_lines(console: Console, title: str, groups: Iterable[RuleLines]) -> None:
    for group in groups:
        console.print(f"{title}: [bold]{escape(group.rule)}[/] {len(group.places):,}")
        for node, why in group.places[:_PLACES]:
            console.print(f"  [cyan]{escape(node)}[/]: {escape(why[:_TEXT])}", highlight=False)
        if len(group.places) > _PLACES:
            console.print(f"  … {len(group.places) - _PLACES:,} more")


def print_figures(console: Console, names: Sequence[str], columns: Sequence[Figures]) -> None:
    """What several models are made of, side by side."""
    _print_figures(console, names, columns, changed_only=False)


def _print_figures(console: Console, names: Sequence[str], columns: Sequence[Figures], *, changed_only: bool) -> None:
    table = Table(header_style="bold")
    table.add_column("", overflow="fold", min_width=16)
    for name in names:
        table.add_column(escape(name), justify="right", overflow="fold")
    if all(column.size_bytes is not None for column in columns):
        table.add_row("size on disk", *(human_bytes(column.size_bytes or 0) for column in columns))
    table.add_row("parameters", *(f"{column.parameters:,}" for column in columns))
    if all(column.macs is not None for column in columns):
        table.add_row("MACs (estimate)", *(f"{column.macs:,}" for column in columns))
    table.add_row("nodes without Constant", *(f"{column.nodes:,}" for column in columns), end_section=True)
    ops = sorted({op for column in columns for op in column.ops})
    counts = {op: [column.ops.get(op, 0) for column in columns] for op in ops}
    if changed_only:
        shown = [op for op in ops if len(set(counts[op])) > 1]
        shown.sort(key=lambda op: -(max(counts[op]) - min(counts[op])))
    else:
        shown = sorted(ops, key=lambda op: -max(counts[op]))
    for op in shown[:_OPS]:
        table.add_row(escape(op), *(f"{count:,}" for count in counts[op]))
    more = shown[_OPS:]
    if more:
        table.add_row(f"{len(more)} more ops", *_sums(more, counts, len(columns)))
    rest = [op for op in ops if op not in shown]
    if rest:
        table.add_row(f"{len(rest)} ops, unchanged", *_sums(rest, counts, len(columns)))
    console.print(table)


def _sums(ops: Sequence[str], counts: dict[str, list[int]], columns: int) -> list[str]:
    return [f"{sum(counts[op][column] for op in ops):,}" for column in range(columns)]
