"""Everything a card is written from: the run, what its author knows, and whether the two agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bkd.card.license import License, carried_over, teacher_license
from bkd.card.privacy import model_name
from bkd.data.shapes import EMBEDDED
from bkd.errors import BkdError, HubError
from bkd.models.folder import model_digest
from bkd.models.locate import HUB_ID, hub_commit, locate, locate_teacher
from bkd.recipe.schema import Recipe
from bkd.report.architecture import Architecture, architecture
from bkd.report.measurements import read_evaluation
from bkd.report.reports import Report
from bkd.report.speed_view import read_speed
from bkd.runs.folder import RunFolder, require_finished, run_of_student
from bkd.runs.measuring import WORLD, again, eval_command, speed_command


@dataclass(frozen=True)
class AuthorSays:
    """What no file says.

    Attributes:
        license: Of the student, where the teacher's files name none.
        base_model: Hub id of a teacher that was a folder.
        data: What the training data is; a Hub id is filed as such.
    """

    license: License | None = None
    base_model: str | None = None
    data: str | None = None


@dataclass(frozen=True)
class Subject:
    """A finished run with its student.

    Attributes:
        run: Its folder.
        student: The student's.
        recipe: As trained.
        digest: SHA-256 of the student.
        built: What it is made of beside its teacher.
        evaluations: Reports in which the last model is the student as it is now.
        speed: If it was measured.
        said: By the author.
        license: The student's.
        license_of_teacher: Whether that is its teacher's.
        from_hub: Whether the teacher came from the Hub.
    """

    run: RunFolder
    student: Path
    recipe: Recipe
    digest: str
    built: Architecture
    evaluations: tuple[Report, ...]
    speed: Report | None
    said: AuthorSays
    license: License
    license_of_teacher: bool
    from_hub: bool

    @property
    def name(self) -> str:
        return self.run.path.resolve().name

    @property
    def base_model(self) -> str | None:
        """The teacher's Hub id, where it has one."""
        return self.said.base_model or (self.recipe.teacher.id if self.from_hub else None)

    @property
    def teacher(self) -> str:
        """Its name."""
        return self.base_model or model_name(self.recipe.teacher.id, from_hub=self.from_hub)

    @property
    def distilled(self) -> bool:
        """Whether a teacher taught it, rather than the data alone."""
        return any(stage.method.name != "finetune" for stage in self.recipe.stages)

    @property
    def datasets(self) -> list[str]:
        """Hub ids of the training data."""
        return [self.said.data] if self.said.data and HUB_ID.fullmatch(self.said.data) else []

    @property
    def picture(self) -> Path | None:
        """Teacher and student on the same prompts: of an evaluation, or the last that training drew."""
        measured = [path.with_suffix(".png") for path in self.run.evaluations]
        drawn = sorted(self.run.samples.glob("*-final.png"))[-1:]
        return next((path for path in (*measured, *drawn) if path.is_file()), None)

    def open_questions(self) -> Iterator[str]:
        """What others will ask, and nobody has said yet."""
        if not self.evaluations and (measure := eval_command(self.run)):
            yield f"there are no figures, which bkd push wants: {measure}, then again with --overwrite"
        if self.speed is None and (measure := speed_command(self.run)):
            yield f"speed is not measured: {measure}, then again with --overwrite"
        if self.recipe.teacher.id != EMBEDDED and self.base_model is None:
            yield "the teacher was a folder; if it is on the Hub, say where: --base-model OWNER/NAME"
        if self.recipe.data.shards not in WORLD and self.said.data is None:
            yield "nobody says what the training data is: --data 'LAION-aesthetic 6.5+, 1M pairs', or a Hub id"


def subject_of(run: RunFolder, said: AuthorSays) -> Subject:
    """Gather it.

    Raises:
        BkdError: If the run is not finished, no licence is known, or a measurement is of other weights.
    """
    if said.base_model is not None and not HUB_ID.fullmatch(said.base_model):
        raise HubError(
            "not the name of a model on the Hub",
            where="--base-model",
            got=said.base_model,
            allowed="OWNER/NAME",
            remedy="look up where the teacher lies on the Hub, or leave it out",
        )
    require_finished(run)
    student, recipe = locate(run.path), run.recipe()
    digest, teacher = model_digest(student), _teacher_of(recipe)
    theirs = None if teacher is None else license_of(recipe.teacher.id, teacher)
    from_hub = run.facts().get("teacher_commit") is not None or (
        teacher is not None and hub_commit(teacher) is not None
    )
    license = carried_over(theirs, said.license, model_name(recipe.teacher.id, from_hub=from_hub))
    return Subject(
        run=run,
        student=student,
        recipe=recipe,
        digest=digest,
        built=architecture(run),
        evaluations=tuple(_evaluation(run, path, digest) for path in run.evaluations),
        speed=_speed(run, digest),
        said=said,
        license=license,
        license_of_teacher=theirs is not None and license.id == theirs.id,
        from_hub=from_hub,
    )


def license_of(name: str, teacher: Path) -> License | None:
    """What a teacher is under; of one that a run made, what that run's teacher is."""
    if (run := run_of_student(teacher)) is None:
        return teacher_license(name, teacher)
    recipe = run.recipe()
    before = _teacher_of(recipe)
    return None if before is None else license_of(recipe.teacher.id, before)


def _teacher_of(recipe: Recipe) -> Path | None:
    """Where it lies; None for one that is gone or cannot be reached: then its author is asked."""
    try:
        return locate_teacher(recipe.teacher, weights=False)
    except BkdError:
        return None


def _evaluation(run: RunFolder, path: Path, digest: str) -> Report:
    """A report whose last model is the student as it is now."""
    report = read_evaluation(run, path)
    _require_same_weights(path, report, digest, again(eval_command(run, path.stem)))
    return report


def _speed(run: RunFolder, digest: str) -> Report | None:
    """The same of a measurement of speed."""
    if (report := read_speed(run)) is not None:
        _require_same_weights(run.speed_file, report, digest, again(speed_command(run)))
    return report


def _require_same_weights(path: Path, report: Mapping[str, Any], digest: str, remedy: str | None) -> None:
    name = report["models"][-1]["name"]
    if (known := report.get("digests", {}).get(name)) != digest:
        raise HubError(
            "these figures are of other weights than the student's",
            where=path,
            got=f"{name}, SHA-256 {known or 'not known'}",
            allowed=digest,
            remedy=remedy,
        )
