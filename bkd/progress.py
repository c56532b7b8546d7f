"""How far a job is: what long work calls, and never prints itself."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with (done, total)."""
Phase = Callable[[str], None]
"""Called with a line when something new begins."""


def silent(done: int, total: int) -> None:
    """For those who do not want to know."""


def part_of(progress: Progress, before: int, total: int) -> Callable[[int], None]:
    """For a part of a job that others preceded: takes how much of the part is done."""
    return lambda done: progress(before + done, total)
