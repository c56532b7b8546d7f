"""What a student costs beside its teacher, as rows and tables of Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bkd.card.tables import Markdown, table
from bkd.eval.shown import NONE, device_and_versions, speed_conditions
from bkd.report.architecture import Architecture
from bkd.report.reports import Report


@dataclass(frozen=True)
class SpeedTable:
    """A measurement of speed.

    Attributes:
        conditions: Device, versions, and what was timed.
        table: Median seconds, speed-up and peak memory of each kind of call.
    """

    conditions: str
    table: str


def summary(known: Architecture) -> str:
    """What is saved against the teacher, in a clause; empty where that is not known."""
    if known.teacher is None or known.student is None:
        return ""
    pairs = {
        "UNet parameters": (known.teacher.parameters, known.student.parameters),
        "multiply-accumulates an image": (known.teacher.image_macs, known.student.image_macs),
    }
    saved = {what: 1 - after / before for what, (before, after) in pairs.items() if before and after and after < before}
    return " and ".join(f"{share:.1%} fewer {what}" for what, share in saved.items())


def cost_table(known: Architecture, origin: str) -> Markdown:
    """Parameters, operations and evaluations of both models, and by how much they differ.

    Args:
        known: Of both.
        origin: What the first is called.
    """
    return table(("", origin, "this model", "change"), list(_costs(known)))


def _costs(known: Architecture) -> Iterator[tuple[str, str, str, str]]:
    theirs, ours = known.teacher, known.student
    figures = {
        "UNet parameters": (theirs and theirs.parameters, ours and ours.parameters),
        "MACs of one UNet evaluation": (theirs and theirs.macs, ours and ours.macs),
        "UNet evaluations an image": (theirs and theirs.calls, ours and ours.calls),
        "MACs an image": (theirs and theirs.image_macs, ours and ours.image_macs),
    }
    for title, (before, after) in figures.items():
        change = f"{after / before - 1:+.1%}" if before and after else NONE
        yield title, f"{before:,}" if before else NONE, f"{after:,}" if after else NONE, change


def speed_table(report: Report) -> SpeedTable:
    """Of a report of `bench_speed`; the speed-up is against its first model."""
    rows = [
        (
            f"{model['name']}: {name}",
            f"{case['median_s']:.4g}",
            f"{case['speed_up']:.2f}" if place else NONE,
            f"{peak / 2**20:,.0f} MiB" if (peak := case.get("memory", {}).get("peak_bytes")) else NONE,
        )
        for place, model in enumerate(report["models"])
        for name, case in model["cases"].items()
        if "median_s" in case
    ]
    conditions = f"{device_and_versions(report['device'], report['versions'])}; {speed_conditions(report)}"
    return SpeedTable(conditions, table(("model: call", "seconds", "speed-up", "peak memory"), rows))
