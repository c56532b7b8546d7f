"""The commands that measure a run, as errors, pages and cards name them."""

from __future__ import annotations

import shlex
from pathlib import Path

from bkd.data.shapes import EMBEDDED, THEME_SHARDS
from bkd.runs.folder import RunFolder

WORLD = (EMBEDDED, THEME_SHARDS)
"""Shards of the embedded world, whose images can be read back."""


def eval_command(run: RunFolder, suite: str | None = None) -> str | None:
    """What measures a run's student; None for one that encodes, which nothing draws with.

    Args:
        run: The run.
        suite: The one to measure by; that which fits its data when not given.
    """
    if not draws(run):
        return None
    shards = run.recipe().data.shards
    if suite is None:
        suite = "shapes" if shards in WORLD else "prompts"
    splits = " --split test --split theme-test" if shards == THEME_SHARDS else ""
    wish = {"shapes": splits, "prompts": " --suite prompts --prompts FILE"}.get(suite, f" --suite {suite}")
    return f"bkd eval {quoted(run.path)}{wish}"


def speed_command(run: RunFolder) -> str | None:
    """What measures the speed of a run's student; None for one that encodes."""
    return f"bkd bench speed {quoted(run.path)} -o {quoted(run.speed_file.parent)}" if draws(run) else None


def again(command: str | None) -> str | None:
    """The same where a measurement is there already."""
    return None if command is None else f"{command} --overwrite"


def draws(run: RunFolder) -> bool:
    """Whether the run's student draws, rather than encodes; it may not be there yet."""
    last = run.recipe().stages[-1].method
    return getattr(last, "direction", "generation") == "generation"


def quoted(path: Path) -> str:
    """For a shell."""
    return shlex.quote(str(path))
