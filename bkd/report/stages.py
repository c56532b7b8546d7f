"""What the page shows of a run's stages: each with its student, its newest picture and its curves."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bkd.report.curves import Curve, curve_svg
from bkd.run_folder import RunFolder
from bkd.surgery.plan import PLAN_FILE, load_plan
from bkd.training.tracking import read_metrics


@dataclass(frozen=True)
class StageView:
    """One stage.

    Attributes:
        title: What it does.
        student: Its folder inside the run; None before it is there.
        removed: Units that it took out of its teacher.
        seconds: Of training.
        picture: Teacher and student on the validation prompts, a data URL.
        curves: Name and SVG of each logged quantity.
    """

    title: str
    student: str | None
    removed: tuple[str, ...]
    seconds: float
    picture: str | None
    curves: tuple[tuple[str, str], ...]


def stage_views(run: RunFolder) -> tuple[StageView, ...]:
    """All stages of the run's recipe, those that have not begun included."""
    recipe, facts, metrics = run.recipe(), run.facts(), read_metrics(run.metrics)
    return tuple(
        StageView(
            title=stage.title,
            student=str(folder.relative_to(run.path)) if (folder / PLAN_FILE).is_file() else None,
            removed=load_plan(folder).removed if (folder / PLAN_FILE).is_file() else (),
            seconds=facts.get(f"stage_{number:02d}_seconds", 0.0),
            picture=_picture(run, number),
            curves=_curves([line for line in metrics if line["stage"] == number]),
        )
        for number, (stage, folder) in enumerate(zip(recipe.stages, run.students(recipe), strict=True))
    )


def data_url(path: Path) -> str:
    """A PNG file as the address of an image that needs no file."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _picture(run: RunFolder, number: int) -> str | None:
    """The newest: of a stage that is trained anew, the last picture of the earlier training may still lie there."""
    found = [*run.samples.glob(f"{number:02d}-step-*.png"), *run.samples.glob(f"{number:02d}-final.png")]
    newest = max(found, key=lambda path: (path.stat().st_mtime_ns, "final" in path.name, path.name), default=None)
    return data_url(newest) if newest else None


def _curves(lines: Sequence[dict[str, Any]]) -> tuple[tuple[str, str], ...]:
    """An SVG for each logged quantity worth a curve; losses on a logarithmic scale."""
    terms = [name for name in lines[0] if name.endswith("_loss") or name in ("total", "lr")] if lines else []
    return tuple((name, curve_svg(_curve(lines, name))) for name in terms)


def _curve(lines: Sequence[dict[str, Any]], name: str) -> Curve:
    is_loss = name != "lr"
    points = tuple((line["step"], line[name]) for line in lines if line.get(name) is not None)
    return Curve(points, logarithmic=is_loss, noisy=is_loss)
