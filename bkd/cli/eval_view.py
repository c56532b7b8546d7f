"""A measurement as tables."""

from __future__ import annotations

from typing import Any

from bkd.cli.console import console, table
from bkd.eval.shown import SPLIT_TITLES, conditions, measured_against, own_samplers
from bkd.eval.tables import Table, half_width, prompts_table, shapes_table, skipped

ON_THE_PAGE = ("p", "one object", "two objects", "bias", "bias of FID")
"""Columns that a terminal has no room for."""


def show(report: dict[str, Any]) -> None:
    """Print what a report says."""
    models, how = report["models"], conditions(report)
    if report["settings"]["suite"] == "shapes":
        for split in report["settings"]["splits"]:
            _show(f"{SPLIT_TITLES.get(split, split)} ({split}): {how}", shapes_table(models, split, half_width))
            _show_skipped(skipped(models, split))
    else:
        against = measured_against(report)
        _show(f"{how}; {against}" if against else how, prompts_table(models, half_width))
        _show_skipped(skipped(models))
    if own := own_samplers(report):
        console.print(own)


def _show(title: str, found: Table) -> None:
    fitting = found.without(ON_THE_PAGE)
    console.print(table(title, fitting.columns, fitting.rows))


def _show_skipped(found: list[tuple[str, str]]) -> None:
    for what, reason in found:
        console.print(f"{what} skipped: {reason}")
