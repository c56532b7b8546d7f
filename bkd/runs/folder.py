"""The run folder: what lies where, and what it says of itself.

recipe.yaml          resolved; training it again reproduces the run
run.json             versions, device, teacher digest, data fingerprint, stages
metrics.jsonl        one line per logged step
checkpoints/<stage>/<step>/   of the stage that trains; of the last stage when all is done, so that it may grow
stages/<nn-name>/student/     students of all stages but the last
student/             the final one, a stock pipeline folder
adapter.safetensors  what trained of it, where it trained through adapters
samples/  eval/  eval/speed/speed.json (of `bkd bench speed RUN -o RUN/eval/speed`)  report.html
run.lock             while a process works on it
"""

from __future__ import annotations

import json
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bkd.errors import ModelError, OutputError
from bkd.files import write_atomically
from bkd.recipe.load import load_recipe
from bkd.recipe.schema import Recipe
from bkd.runs.lock import require_not_held
from bkd.surgery.plan import PLAN_FILE

SUITES = ("shapes", "prompts", "coco30k")
"""What models can be measured by; each leaves a report of its name."""


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder, and the facts recorded there.

    Attributes:
        path: The folder.
        writes: Whether this process records facts: the first of those that train together.
    """

    path: Path
    writes: bool = True

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def facts_file(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def student(self) -> Path:
        return self.path / "student"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def eval(self) -> Path:
        return self.path / "eval"

    @property
    def speed_file(self) -> Path:
        """Where `bkd report` looks for a measurement of speed."""
        return self.eval / "speed" / "speed.json"

    @property
    def evaluations(self) -> list[Path]:
        """The reports of measurements that are there."""
        return [path for suite in SUITES if (path := self.eval / f"{suite}.json").is_file()]

    def students(self, recipe: Recipe) -> tuple[Path, ...]:
        """Where each stage's student goes: the last one's is the run's."""
        names = [f"{number:02d}-{stage.folder_name}" for number, stage in enumerate(recipe.stages)]
        return (*(self.path / "stages" / name / "student" for name in names[:-1]), self.student)

    def checkpoints(self, stage: int) -> Path:
        return self.path / "checkpoints" / f"{stage:02d}"

    def forget_checkpoints(self, stage: int) -> None:
        """Of a stage whose student is there and will not train again."""
        if self.writes:
            shutil.rmtree(self.checkpoints(stage), ignore_errors=True)

    def recipe(self) -> Recipe:
        """What the run trains.

        Raises:
            OutputError: If it is not there.
            RecipeError: If it has been changed and is none any more.
        """
        if not self.recipe_file.is_file():
            raise OutputError(
                "half of a run: run.json, and no recipe.yaml",
                where=self.path,
                remedy="train it anew, or name the folder of its student",
            )
        return load_recipe(str(self.recipe_file))

    def facts(self) -> dict[str, Any]:
        """What `run.json` says.

        Raises:
            OutputError: If it cannot be read.
        """
        remedy = "restore it, or use another folder"
        try:
            facts = json.loads(self.facts_file.read_text())
        except ValueError as error:
            raise OutputError("run.json cannot be read", where=self.path, got=error, remedy=remedy) from None
        if not isinstance(facts, dict):
            raise OutputError("run.json cannot be read", where=self.path, got=type(facts).__name__, remedy=remedy)
        return facts

    @property
    def is_done(self) -> bool:
        """Whether `run.json` says that training came to its end."""
        return bool(self.facts().get("status") == "done")

    def record(self, **facts: Any) -> None:
        """Add facts to run.json, replacing the file as a whole."""
        if not self.writes:
            return
        known = self.facts() if self.facts_file.is_file() else {}
        write_atomically(self.facts_file, json.dumps({**known, **facts}, indent=2) + "\n")

    def identity(self) -> str:
        """What no other run has, wherever its folder is moved; made up when first asked for."""
        if "id" not in self.facts():
            self.record(id=secrets.token_hex(4))
        return str(self.facts()["id"])

    def require_same(self, name: str, value: object, *, force: bool = False) -> None:
        """Record a fact, or refuse when an earlier part of this run had another.

        Args:
            name: Of the fact.
            value: As it is now.
            force: Whether another one may take its place.

        Raises:
            OutputError: Naming the fact.
        """
        known = self.facts().get(name) if self.writes else None
        if known is not None and known != value and not force:
            raise OutputError(
                f"this run was started with another {name.replace('_', ' ')}",
                where=self.path,
                got=value,
                allowed=known,
                remedy="give the original one or another -o; --overwrite starts again, --force continues all the same",
            )
        self.record(**{name: value})


STARTING_STUDENT = "starting_student_digest"
"""The fact that holds which weights `student.path` had when the run began."""


def seconds_key(stage: int) -> str:
    """The fact that holds how long a stage has trained, over all the calls it took."""
    return f"stage_{stage:02d}_seconds"


def run_of_student(model: Path) -> RunFolder | None:
    """The run that a path names, or whose student it names, the last or an earlier stage's; None for all else."""
    if RunFolder(model).facts_file.is_file():
        return RunFolder(model)
    above = (model if model.name == "student" else model / "student").absolute().parents
    run = RunFolder(above[2] if above[1].name == "stages" else above[0])
    return run if run.facts_file.is_file() and run.recipe_file.is_file() else None


def is_trained(student: Path, steps: int) -> bool:
    """Whether a stage's student has been written after so many steps; an earlier one gives way to it."""
    try:
        facts = json.loads((student / PLAN_FILE).read_text())
    except (OSError, ValueError):
        return False
    return facts.get("steps") == steps and any(student.glob("unet/*.safetensors"))


def require_finished(run: RunFolder) -> None:
    """Refuse a run whose student may change, or be half of something.

    Raises:
        BkdError: If it is no run, a process works on it, or it was stopped.
    """
    if not run.facts_file.is_file():
        raise ModelError("not a run: there is no run.json", where=run.path, remedy="give a folder of `bkd train`")
    require_not_held(run.path)
    if run.student.is_dir() and not run.is_done:
        facts = run.facts()
        raise ModelError(
            "this run is not finished",
            where=run.path,
            got=f"status: {facts.get('status')}",
            remedy=f"finish it: {facts.get('command', 'bkd train RECIPE -o RUN')}; or name the folder of its student",
        )


def finished_or_student(path: Path) -> RunFolder | None:
    """The finished run that a path names; None where it is a student's own folder.

    Raises:
        BkdError: If it is neither, or the run may still change.
    """
    run = RunFolder(path)
    if not run.facts_file.is_file():
        if (path / PLAN_FILE).is_file():
            return None
        raise ModelError(
            "neither a run nor a student",
            where=path,
            got=f"no run.json and no {PLAN_FILE}",
            remedy="give a folder of `bkd train`, or of a student that bkd made",
        )
    require_finished(run)
    return run
