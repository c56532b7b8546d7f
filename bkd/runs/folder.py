"""The run folder: what lies where, and whether a command starts, continues or has nothing to do.

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
import platform
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bkd import __version__
from bkd.environment import PACKAGES, installed_version
from bkd.errors import ModelError, OutputError
from bkd.files import write_atomically
from bkd.recipe.load import dump_recipe, load_recipe, result_keys
from bkd.recipe.schema import Recipe
from bkd.recipe.stages import numbered
from bkd.runs.lock import LOCK_FILE, require_not_held
from bkd.surgery.plan import PLAN_FILE

State = Literal["new", "continue", "done"]
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
        try:
            facts: dict[str, Any] = json.loads(self.facts_file.read_text())
        except ValueError as error:
            raise OutputError(
                "run.json cannot be read", where=self.path, got=error, remedy="restore it, or use another folder"
            ) from None
        return facts

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


def seconds_key(stage: int) -> str:
    """The fact that holds how long a stage has trained, over all the calls it took."""
    return f"stage_{stage:02d}_seconds"


def open_run(path: Path, recipe: Recipe, *, overwrite: bool = False, force: bool = False) -> tuple[RunFolder, State]:
    """Decide what a `train` command means for this folder; makes it when it is new.

    Args:
        path: The run folder.
        recipe: As validated.
        overwrite: Whether an earlier run in it is deleted.
        force: Whether a run of other settings is continued with these.

    Raises:
        OutputError: If the folder holds something else, a run of other settings, or one that another process works on.
    """
    run = RunFolder(path)
    if path.is_file():
        raise OutputError("the run folder is a file", where=path, remedy="choose another -o")
    if path.is_dir():
        require_not_held(path)
    if overwrite and run.facts_file.is_file():
        _refuse_own_teacher(run, recipe)
        shutil.rmtree(path)
    ours = (run.recipe_file.name, LOCK_FILE)
    held = [p for p in path.iterdir() if p.name not in ours] if path.is_dir() else []
    if not held:  # a recipe alone is what a crash at the very start leaves
        _start(run, recipe)
        return run, "new"
    if not run.facts_file.is_file() or not run.recipe_file.is_file():
        names = ", ".join(sorted(p.name for p in held)[:4])
        raise OutputError("the run folder holds something else", where=path, got=names, remedy="choose another -o")
    if not any((path / name).exists() for name in ("checkpoints", "stages", "student")):
        _start(run, recipe)  # stopped before the first checkpoint: nothing to continue, nothing to lose
        return run, "new"
    _require_same_recipe(run, recipe, force=force)
    finished = run.facts().get("status") == "done" and is_trained(run.student, recipe.last_train.max_steps)
    return run, "done" if finished else "continue"


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
    facts = run.facts()
    if run.student.is_dir() and facts.get("status") != "done":
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
    if not run.facts_file.is_file() and (path / PLAN_FILE).is_file():
        return None
    require_finished(run)
    return run


def _refuse_own_teacher(run: RunFolder, recipe: Recipe) -> None:
    """Starting a run again must not delete the model it is to learn from."""
    teacher = Path(recipe.teacher.id).expanduser().resolve()
    if run.path.resolve() in (teacher, *teacher.parents):
        raise OutputError(
            "the teacher lies inside the run that --overwrite would delete", where=run.path, remedy="choose another -o"
        )


def _start(run: RunFolder, recipe: Recipe) -> None:
    run.path.mkdir(parents=True, exist_ok=True)
    write_atomically(run.recipe_file, dump_recipe(recipe))
    run.facts_file.unlink(missing_ok=True)
    versions = {name: installed_version(name) for name in PACKAGES}
    run.record(status="running", bkd=__version__, python=platform.python_version(), versions=versions)


def _require_same_recipe(run: RunFolder, recipe: Recipe, *, force: bool) -> None:
    written = run.recipe()
    before, now = result_keys(written), result_keys(recipe)
    *earlier, last = _steps(recipe)
    *earlier_written, last_written = _steps(written)
    grows = last > last_written and earlier == earlier_written
    constant = recipe.last_train.lr_schedule == "constant"
    if grows and constant:  # more of the same; other schedules depend on the end
        for key in ("train.max_steps", f"stages.{len(earlier)}.train.max_steps"):
            before.pop(key, None), now.pop(key, None)
    changed = _differences(before, now, single=len(recipe.stages) == 1)
    finished = is_trained(run.student, written.last_train.max_steps)
    why = "; only runs with a constant schedule may grow" if grows and not constant else ""
    if changed and finished:
        raise OutputError(
            "this folder holds a finished run with other settings",
            where=run.path,
            got="; ".join(changed),
            remedy=f"choose another -o, or add --overwrite to start again{why}",
        )
    if changed and not force:
        raise OutputError(
            "this folder holds a run with other settings",
            where=run.path,
            got="; ".join(changed),
            remedy="choose another -o; --overwrite starts again, --force continues with the new settings",
        )
    write_atomically(run.recipe_file, dump_recipe(recipe))


def _steps(recipe: Recipe) -> list[int]:
    """Of each stage."""
    return [recipe.train_of(number).max_steps for number in range(len(recipe.stages))]


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], *, single: bool) -> list[str]:
    """A line for each, with the stages that it is true of where there are several."""
    found: dict[str, list[int]] = {}
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            stage = None if single else re.fullmatch(r"stages\.(\d+)\.(.+)", key)
            said = f"{stage[2] if stage else key} is {before.get(key)!r} there and {now.get(key)!r} here"
            found.setdefault(said, []).extend([int(stage[1])] if stage else [])
    return [f"{numbered(stages)}: {said}" if stages else said for said, stages in found.items()]
