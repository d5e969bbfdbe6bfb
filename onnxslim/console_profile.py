"""What ``bench --profile`` prints: where the time of a compiled model goes."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from onnxslim.record import KernelTime, Profile

__all__ = ["print_profile"]

_SHOWN = 15


def print_profile(console: Console, title: str, found: Profile) -> None:
    """The kernels that take longest, and the others in one row."""
    peak = found.peak_flops_per_second / 1e9
    table = Table(
        title=f"Where the time goes: {escape(title)}, {found.threads} thread(s), peak {peak:.0f} GFLOP/s",
        title_justify="left",
        header_style="bold",
    )
    table.add_column("kernel", min_width=16, overflow="fold")
    for column in ("calls", "ms", "share", "GFLOP/s", "of peak", "GB/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for kernel in found.kernels[:_SHOWN]:
        table.add_row(*_cells(kernel))
    rest = found.kernels[_SHOWN:]
    if rest:
        calls, ms, share = (sum(values) for values in zip(*((k.calls, k.ms, k.share) for k in rest), strict=True))
        table.add_row(f"{len(rest)} more; --json has all", str(calls), f"{ms:.3f}", f"{share:.1%}", "", "", "")
    table.add_section()
    table.add_row("all", str(sum(kernel.calls for kernel in found.kernels)), f"{found.ms:.3f}", "", "", "", "")
    console.print(table)


def _cells(kernel: KernelTime) -> list[str]:
    return [
        escape(" → ".join(filter(None, (kernel.op, "×".join(map(str, kernel.shape)))))),
        str(kernel.calls),
        f"{kernel.ms:.3f}",
        f"{kernel.share:.1%}",
        "–" if kernel.flops_per_second is None else f"{kernel.flops_per_second / 1e9:.1f}",
        "–" if kernel.peak_share is None else f"{kernel.peak_share:.0%}",
        "–" if kernel.bytes_per_second is None else f"{kernel.bytes_per_second / 1e9:.1f}",
    ]
