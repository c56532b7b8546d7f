"""What a `train` command means for a folder: to start, to continue, or that there is nothing to do."""

from __future__ import annotations

import platform
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from bkd import __version__
from bkd.environment import PACKAGES, installed_version
from bkd.errors import OutputError
from bkd.files import write_atomically
from bkd.recipe.load import dump_recipe, result_keys
from bkd.recipe.schema import Recipe
from bkd.recipe.stages import numbered
from bkd.runs.folder import RunFolder, is_trained
from bkd.runs.lock import LOCK_FILE, require_not_held

State = Literal["new", "continue", "done"]


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
    finished = run.is_done and is_trained(run.student, recipe.last_train.max_steps)
    return run, "done" if finished else "continue"


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
