"""Everything a card is written from: the run, what its author knows, and whether the two agree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bkd.card.license import License, carried_over, is_hub_id, teacher_license
from bkd.card.privacy import public_name
from bkd.data.shapes import EMBEDDED
from bkd.errors import BkdError, HubError
from bkd.locate import locate
from bkd.model_folder import model_digest
from bkd.recipe.schema import Recipe
from bkd.report.architecture import Architecture, architecture
from bkd.report.measurements import Report, read_evaluation
from bkd.report.speed_view import SpeedReport, read_speed
from bkd.run_folder import RunFolder, require_finished, run_of_student


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
    """

    run: RunFolder
    student: Path
    recipe: Recipe
    digest: str
    built: Architecture
    evaluations: tuple[Report, ...]
    speed: SpeedReport | None
    said: AuthorSays
    license: License
    license_of_teacher: bool

    @property
    def name(self) -> str:
        return self.run.path.resolve().name

    @property
    def base_model(self) -> str | None:
        """The teacher's Hub id, where it has one."""
        return self.said.base_model or (self.recipe.teacher.id if is_hub_id(self.recipe.teacher.id) else None)

    @property
    def datasets(self) -> list[str]:
        """Hub ids of the training data."""
        return [self.said.data] if self.said.data and is_hub_id(self.said.data) else []

    @property
    def picture(self) -> Path | None:
        """Teacher and student on the same prompts: of an evaluation, or the last that training drew."""
        measured = [path.with_suffix(".png") for path in self.run.evaluations]
        drawn = sorted(self.run.samples.glob("*-final.png"))[-1:]
        return next((path for path in (*measured, *drawn) if path.is_file()), None)

    def open_questions(self) -> Iterator[str]:
        """What others will ask, and nobody has said yet."""
        if not self.evaluations:
            yield f"there are no figures, which bkd push wants: bkd eval {self.run.path}, then again with --overwrite"
        if self.speed is None:
            yield f"speed is not measured: bkd bench speed {self.run.path} -o {self.run.speed_file.parent}"
        if self.recipe.teacher.id != EMBEDDED and self.base_model is None:
            yield "the teacher was a folder; if it is on the Hub, say where: --base-model OWNER/NAME"
        if self.recipe.data.shards != EMBEDDED and self.said.data is None:
            yield "nobody says what the training data is: --data 'LAION-aesthetic 6.5+, 1M pairs', or a Hub id"


def subject_of(run: RunFolder, said: AuthorSays) -> Subject:
    """Gather it.

    Raises:
        BkdError: If the run is not finished, no licence is known, or a measurement is of other weights.
    """
    require_finished(run)
    student, recipe = locate(run.path), run.recipe()
    digest = model_digest(student)
    theirs = license_of_teacher(recipe)
    license = carried_over(theirs, said.license, public_name(recipe.teacher.id))
    return Subject(
        run=run,
        student=student,
        recipe=recipe,
        digest=digest,
        built=architecture(run),
        evaluations=tuple(_evaluation(path, digest) for path in run.evaluations),
        speed=read_speed(run),
        said=said,
        license=license,
        license_of_teacher=theirs is not None and license.id == theirs.id,
    )


def license_of_teacher(recipe: Recipe) -> License | None:
    """What a recipe's teacher is under; of one that a run made, what that run's teacher is."""
    own = recipe.teacher
    try:
        folder = locate(own.id, revision=own.revision, config=own.config, weights=False)
    except BkdError:  # it is gone, or cannot be reached: its author is asked
        return None
    found = teacher_license(own.id, folder)
    if found is None and (run := run_of_student(folder)) is not None:
        return license_of_teacher(run.recipe())
    return found


def _evaluation(path: Path, digest: str) -> Report:
    """A report whose last model is the student as it is now."""
    report = read_evaluation(path)
    name = report["models"][-1]["name"]
    if report["digests"].get(name) != digest:
        raise HubError(
            "these figures are of other weights than the student's",
            where=path,
            got=f"{name}, SHA-256 {report['digests'].get(name)}",
            allowed=digest,
            remedy=f"measure anew: bkd eval {path.parent.parent} --suite {path.stem} --overwrite",
        )
    return report
