"""`bkd report`: show a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from bkd.cli.console import console


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    output: Annotated[
        Optional[Path], typer.Option("-o", "--output", help="HTML file; default RUN/report.html.")
    ] = None,
) -> None:
    """Write one page: pictures, loss curves, tables and commands."""
    from bkd.report.page import write_report

    written = write_report(runs, output or runs[0] / "report.html")
    console.print(f"report: {written}")
