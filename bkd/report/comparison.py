"""What the page shows of several runs beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bkd.eval.shown import NONE, SUITE_TITLES, large
from bkd.eval.tables import Table
from bkd.report.architecture import Model
from bkd.report.curves import Chart
from bkd.report.embedded import Embedded
from bkd.report.gallery import Gallery, Shot, strip
from bkd.report.measurements import Measurement, measurements
from bkd.report.reports import merged
from bkd.report.run_view import Files, RunView
from bkd.report.speed_view import SpeedView, view_speed
from bkd.report.training import overlaid


@dataclass(frozen=True)
class Comparison:
    """Several runs.

    Attributes:
        costs: What each run's student costs.
        gallery: One strip of the prompts that they share.
        measurements: Evaluations of the same conditions, together.
        terms: Loss curves, each run a colour.
        speed: Those that were measured on the same device and alike, together.
    """

    costs: Table
    gallery: Gallery | None
    measurements: tuple[Measurement, ...]
    terms: tuple[Chart, ...]
    speed: tuple[SpeedView, ...]


def compare(views: Sequence[RunView], embedded: Embedded) -> Comparison:
    """Of at least two runs."""
    files = [view.files for view in views]
    return Comparison(
        costs=_costs(views),
        gallery=_gallery(files, embedded),
        measurements=measurements(merged((each.label, found) for each in files for found in each.evaluations.values())),
        terms=overlaid([each.training for each in files]),
        speed=tuple(map(view_speed, merged((each.label, each.speed) for each in files if each.speed))),
    )


def _costs(views: Sequence[RunView]) -> Table:
    columns = ("run", "UNet parameters", "MACs a pass", "UNet calls", "MACs an image", "training steps", "training")
    rows = [(label, *_cost(teacher), NONE, NONE) for label, teacher in _teachers(views)]
    for view in views:
        steps = sum(stage.steps for stage in view.files.stages)
        seconds = sum(stage.seconds for stage in view.files.stages)
        trained = f"{seconds:,.0f} s" if seconds else NONE
        rows.append((view.label, *_cost(view.architecture.student), f"{steps:,}", trained))
    return Table("Side by side", columns, tuple(rows))


def _teachers(views: Sequence[RunView]) -> list[tuple[str, Model]]:
    """Each that differs, by weights or by how it draws; named by its runs where there are several."""
    runs: dict[tuple[str, Model], list[str]] = {}
    for view in views:
        digest, teacher = str(view.files.facts.get("teacher_digest")), view.architecture.teacher
        if teacher is not None:
            runs.setdefault((digest, teacher), []).append(view.label)
    return [
        (f"teacher of {', '.join(labels)}" if len(runs) > 1 else "teacher", teacher)
        for (_, teacher), labels in runs.items()
    ]


def _cost(model: Model | None) -> tuple[str, str, str, str]:
    if model is None:
        return (NONE,) * 4
    image = large(model.image_macs) if model.image_macs else NONE
    return f"{model.parameters:,}", large(model.macs), model.calls_text, image


def _gallery(files: Sequence[Files], embedded: Embedded) -> Gallery | None:
    """Of the first suite that all were measured by on the same noise; else of their last validation pictures."""
    for suite in SUITE_TITLES:
        shots = [(each.label, each.pictures[suite]) for each in files if suite in each.pictures]
        drawn = [each.evaluations[suite]["settings"]["drawing"] for each in files if suite in each.evaluations]
        noise = {(how["seed"], how["rng"]) for how in drawn}
        if len(shots) == len(files) == len(drawn) and len(noise) == 1 and (found := strip(shots, embedded)):
            return found
    last: list[tuple[str, Shot]] = [(each.label, each.samples[-1]) for each in files if each.samples]
    return strip(last, embedded) if last else None
