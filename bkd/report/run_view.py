"""What the page shows of one run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bkd.errors import OutputError
from bkd.eval.sheet import read_sheet
from bkd.eval.shown import MINUS, SUITE_TITLES, calls_of, large
from bkd.report.architecture import Architecture, architecture
from bkd.report.curves import Chart
from bkd.report.embedded import Embedded
from bkd.report.gallery import Gallery, Shot, evaluation_gallery, sample_gallery, sample_shots
from bkd.report.measurements import Measurement, headline, measurements, read_evaluation
from bkd.report.reports import Report
from bkd.report.speed_view import SpeedView, read_speed, view_speed
from bkd.report.training import Training, read_training, site_charts, term_charts
from bkd.runs.folder import RunFolder, seconds_key
from bkd.runs.measuring import eval_command, speed_command
from bkd.surgery.plan import PLAN_FILE, load_plan

SMALL_CHANGE = 0.005
"""Below this a count is shown, not its change."""


@dataclass(frozen=True)
class Stage:
    """A row of the table of stages.

    Attributes:
        title: What it does.
        student: Its folder inside the run; None before it is there.
        removed: Units that it took out of its teacher.
        steps: Of training, as planned.
        seconds: Of training.
    """

    title: str
    student: str | None
    removed: tuple[str, ...]
    steps: int
    seconds: float


@dataclass(frozen=True)
class KeyFigure:
    """A number to be seen first."""

    name: str
    value: str
    beside: str


@dataclass(frozen=True)
class Files:
    """What a run folder holds for the page, read and checked; its pictures are not decoded yet.

    Attributes:
        run: The folder.
        label: What the page calls it.
        facts: Of run.json.
        stages: All of the recipe, those that have not begun included.
        training: The logged steps.
        evaluations: By suite.
        speed: If it was measured.
        samples: Validation pictures.
        pictures: Of evaluations, by suite.
    """

    run: RunFolder
    label: str
    facts: dict[str, Any]
    stages: tuple[Stage, ...]
    training: Training
    evaluations: dict[str, Report]
    speed: Report | None
    samples: tuple[Shot, ...]
    pictures: dict[str, Shot]

    @property
    def num_pictures(self) -> int:
        return sum(shot.num_pictures for shot in (*self.samples, *self.pictures.values()))


@dataclass(frozen=True)
class RunView:
    """What the page shows of one run; beside each part that may be missing stands the command that makes it."""

    files: Files
    key_figures: tuple[KeyFigure, ...]
    galleries: tuple[Gallery, ...]
    measurements: tuple[Measurement, ...]
    terms: tuple[Chart, ...]
    sites: tuple[Chart, ...]
    architecture: Architecture
    speed: SpeedView | None
    recipe: str
    command: str
    origins: tuple[tuple[str, str], ...]

    @property
    def label(self) -> str:
        return self.files.label

    @property
    def state(self) -> str:
        """For people."""
        return "finished" if self.files.facts.get("status") == "done" else "not finished"

    @property
    def eval_command(self) -> str | None:
        """What measures it, if anything does."""
        return eval_command(self.files.run)

    @property
    def speed_command(self) -> str | None:
        """What measures its speed, if anything does."""
        return speed_command(self.files.run)


def read_files(path: Path, label: str, frames: int) -> Files:
    """Read a run folder.

    Args:
        path: The folder.
        label: What the page calls it.
        frames: How many validation pictures at most.

    Raises:
        BkdError: If it is no run, or a file in it is damaged.
    """
    run = RunFolder(path)
    if not run.facts_file.is_file():
        raise OutputError("not a run folder", where=path, got="no run.json", remedy="name a folder that bkd train made")
    facts = run.facts()
    stages = _stages(run, facts)
    titles = [stage.title for stage in stages]
    pictures = {
        suite: Shot(file, "", read_sheet(file))
        for suite in SUITE_TITLES
        if (file := run.eval / f"{suite}.png").is_file()
    }
    return Files(
        run=run,
        label=label,
        facts=facts,
        stages=stages,
        training=read_training(run, label, len(stages)),
        evaluations={file.stem: read_evaluation(run, file) for file in run.evaluations},
        speed=read_speed(run),
        samples=sample_shots(run, titles, frames),
        pictures=pictures,
    )


def view_run(files: Files, embedded: Embedded) -> RunView:
    """All that is shown of a run; its pictures go into the page's."""
    run = files.run
    samples = sample_gallery(files.samples, embedded, stages=len(files.stages))
    shown = [
        evaluation_gallery(SUITE_TITLES[suite], shot, embedded, _calls(files.evaluations.get(suite)))
        for suite, shot in files.pictures.items()
    ]
    known, reports = architecture(run), list(files.evaluations.values())
    return RunView(
        files=files,
        key_figures=tuple(_key_figures(known, reports)),
        galleries=tuple(gallery for gallery in (samples, *shown) if gallery),
        measurements=measurements(reports),
        terms=term_charts(files.training),
        sites=site_charts(files.training),
        architecture=known,
        speed=view_speed(files.speed) if files.speed else None,
        recipe=run.recipe_file.read_text(),
        command=str(files.facts.get("command", f"bkd train {run.recipe_file}")),
        origins=tuple(_origins(files.facts)),
    )


def _calls(report: Report | None) -> dict[str, str]:
    return {model["name"]: calls_of(model) for model in report["models"]} if report else {}


def _stages(run: RunFolder, facts: dict[str, Any]) -> tuple[Stage, ...]:
    recipe = run.recipe()
    return tuple(
        Stage(
            title=stage.title,
            student=str(folder.relative_to(run.path)) if (folder / PLAN_FILE).is_file() else None,
            removed=load_plan(folder).removed if (folder / PLAN_FILE).is_file() else (),
            steps=recipe.train_of(number).max_steps,
            seconds=float(facts.get(seconds_key(number), 0.0)),
        )
        for number, (stage, folder) in enumerate(zip(recipe.stages, run.students(recipe), strict=True))
    )


def _key_figures(known: Architecture, reports: Sequence[Report]) -> Iterator[KeyFigure]:
    teacher, student = known.teacher, known.student
    if teacher and student:
        yield _change("UNet parameters", teacher.parameters, student.parameters)
        if teacher.image_macs and student.image_macs:
            yield _change("UNet MACs an image", teacher.image_macs, student.image_macs)
            beside = f"{student.calls_text}; teacher: {teacher.calls} ({teacher.calls_text})"
            yield KeyFigure("UNet calls an image", str(student.calls), beside)
        else:
            yield _change("UNet MACs a pass", teacher.macs, student.macs)
    elif student:
        yield KeyFigure("UNet parameters", large(student.parameters), "teacher unknown")
        yield KeyFigure("UNet calls an image", student.calls_text, "teacher unknown")
    found = next((line for report in reports if (line := headline(report))), None)
    if found:
        yield KeyFigure(found.name, found.student, f"teacher: {found.teacher}")


def _change(name: str, before: int, after: int) -> KeyFigure:
    if abs(after / before - 1) < SMALL_CHANGE:
        return KeyFigure(name, large(after), f"teacher: {large(before)}")
    sign = MINUS if after < before else "+"
    return KeyFigure(name, f"{sign}{abs(1 - after / before):.1%}", f"{large(before)} → {large(after)}")


def _origins(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What the run depends on, by name."""
    versions = facts.get("versions", {})
    found = [
        ("teacher", facts.get("teacher")),
        ("teacher's digest", facts.get("teacher_digest")),
        ("data fingerprint", facts.get("data_fingerprint")),
        ("samples", f"{facts['num_samples']:,}" if isinstance(facts.get("num_samples"), int) else None),
        ("device", facts.get("device")),
        ("processes", facts.get("processes")),
        ("Python", facts.get("python")),
        ("bkd", facts.get("bkd")),
        *(versions.items() if isinstance(versions, dict) else ()),
    ]
    return [(name, str(value)) for name, value in found if value is not None]
