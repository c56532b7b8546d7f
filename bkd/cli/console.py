"""Tables, bars and errors as the user sees them."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from bkd.training.journal import StepReport

WORTH_SHOWING = 3
"""Seconds after which a log says how far something is."""
LOG_WIDTH = 120
"""Columns for tables that go to a file or a pipe."""
console = Console(highlight=False, markup=False)
if not console.is_terminal and not os.environ.get("COLUMNS", "").isdigit():  # rich heeds COLUMNS itself
    console.width = LOG_WIDTH
_errors = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def print_error(text: str) -> None:
    """To the error stream, red where the terminal can."""
    _errors.print(f"error: {text}", style="red")


def prepare(*models: str | None) -> None:
    """Called first by every verb that loads models: a working environment, and only our own words on the screen.

    Args:
        models: MODEL arguments, for those that mean nothing to be refused before libraries are loaded.
    """
    from bkd.environment import require_working_environment
    from bkd.models.locate import refuse_unknown

    for model in models:
        if model is not None:
            refuse_unknown(model)
    require_working_environment()
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # diffusers imports it where it is installed
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,)) -> Table:
    """Numbers to the right; the columns of words, the first unless others are given, to the left."""
    made = Table(title=title, title_justify="left", header_style="bold")
    for index, name in enumerate(header):
        made.add_column(name, justify="left" if index in left else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def counted(number: int, thing: str) -> str:
    """`1 module`, `2 modules`."""
    return f"{number} {thing}" + "s" * (number != 1)


def short(number: int) -> str:
    """`859.5 M` for 859520964, `401.6 G` for 401573150720."""
    return f"{number / 1e9:,.1f} G" if number >= 1e10 else f"{number / 1e6:,.1f} M"


class ProgressView:
    """One bar at a time: what is being done, how far it is, how long it will take."""

    def __init__(self, progress: Progress, rate: str = "") -> None:
        self._progress, self._rate = progress, rate
        self._task: Any = None
        self._first: tuple[int, float] | None = None

    def _speed(self, done: int) -> str:
        """How fast it goes since the phase's first report, such as `120 samples/s`; empty without a unit."""
        if self._first is None:
            self._first = (done, time.monotonic())
        before, started = self._first
        seconds = time.monotonic() - started
        return f"{(done - before) / seconds:,.1f} {self._rate}" if self._rate and done > before else ""

    def phase(self, text: str) -> None:
        self.close()
        console.print(text)

    def update(self, done: int, total: int, text: str = "") -> None:
        text = text or self._speed(done)
        if self._task is None:
            self._task = self._progress.add_task(text, total=total, completed=0)
        self._progress.update(self._task, completed=done, total=total, description=text)

    def step(self, report: StepReport) -> None:
        if report.trouble:
            console.print(f"step {report.step} changed nothing: {report.trouble}")
        terms = "  ".join(f"{name.removesuffix('_loss')} {value:.3g}" for name, value in report.parts.items())
        self.update(report.step, report.max_steps, terms)

    def resumed(self, step: int) -> None:
        console.print(f"continuing after step {step}")

    def close(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
        self._first = None


@contextmanager
def progress_view(rate: str = "", *, quiet: bool = False, continues: bool = False) -> Iterator[ProgressView]:
    """A bar with counts and remaining time; plain lines where the output is no terminal.

    Args:
        rate: Unit of the speed to show, such as `samples/s`.
        quiet: Show nothing: for all processes but the first.
        continues: Whether the same command would go on where this one was interrupted, which is then said.
    """
    if quiet:
        yield SilentView(Progress(disable=True))
        return
    # Narrow enough for the three loss terms and the ETA to share 80 columns.
    columns = (TextColumn("{task.description}"), BarColumn(8), MofNCompleteColumn(), TextColumn("ETA"))
    bar = console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not bar) as progress:
        view = ProgressView(progress, rate) if bar else PlainView(progress, rate)
        try:
            yield view
        except KeyboardInterrupt:
            if not continues:
                raise
            console.print("stopped; run the same command to continue")
            raise typer.Exit(130) from None
        view.close()


class PlainView(ProgressView):
    """For logs: a line each tenth of the way instead of a bar; none for what takes a few seconds."""

    def __init__(self, progress: Progress, rate: str = "") -> None:
        super().__init__(progress, rate)
        self._shown = 0

    def update(self, done: int, total: int, text: str = "") -> None:
        """Print when a new tenth is reached; the rate is that since the phase's first report."""
        text = text or self._speed(done)
        if self._first is None:
            self._first = (done, time.monotonic())
        part = done * 10 // max(1, total)
        before, started = self._first
        if part != self._shown and time.monotonic() - started > WORTH_SHOWING:
            self._shown = part
            left = (time.monotonic() - started) / max(1, done - before) * (total - done)
            console.print(f"  {done}/{total}  ETA {timedelta(seconds=round(left))}  {text}")

    def close(self) -> None:
        self._shown, self._first = 0, None


class SilentView(ProgressView):
    """Shows nothing."""

    def phase(self, text: str) -> None:
        """Nothing."""

    def update(self, done: int, total: int, text: str = "") -> None:
        """Nothing."""

    def step(self, report: StepReport) -> None:
        """Nothing."""

    def resumed(self, step: int) -> None:
        """Nothing."""
