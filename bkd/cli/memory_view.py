"""Memory of training as tables."""

from __future__ import annotations

from typing import Any

from bkd.cli.console import console, table


def show_memory(report: dict[str, Any]) -> None:
    """Print a table for each batch size: what is compared, by part, and against the first."""
    console.print(f"{report['how']}; {report['dtype']} forward passes, {report['optimizer']}")
    for batch, rows in report["batches"].items():
        found = {name: row for name, row in rows.items() if "skipped" not in row}
        parts = list(next(iter(found.values()), {}))
        first = next(iter(rows.values())).get("peak")
        lines = [
            (name, *(_mib(row[part]) for part in parts), f"{row['peak'] / first - 1:+.1%}" if first else "-")
            for name, row in found.items()
        ]
        images = f"{batch} image{'s' if batch > 1 else ''} a pass"
        console.print(table(f"MiB, {images}", ("training", *parts, "vs first"), lines))
        for name, row in rows.items():
            if "skipped" in row:
                console.print(f"{name} skipped: {row['skipped']}")


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}" if size >= 10 * 2**20 else f"{size / 2**20:.1f}"
