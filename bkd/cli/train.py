"""`bkd train`: from a recipe to a student."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from bkd.cli.console import ProgressView, console, prepare, progress_view
from bkd.environment import process_place

if TYPE_CHECKING:
    from bkd.recipe.schema import Recipe
    from bkd.runs.folder import RunFolder
    from bkd.runs.run import Inputs
    from bkd.training.stop import StopSignal

STOPPED = 75
"""Exit code after a granted request to stop; EX_TEMPFAIL of sysexits.h: try the same again later."""


def train(
    recipe: Annotated[str, typer.Argument(help="Packaged name such as shapes/sd-small, or a .yaml file.")],
    overrides: Annotated[Optional[list[str]], typer.Argument(help="key=value …, such as train.lr=1e-4.")] = None,
    teacher: Annotated[Optional[str], typer.Option(help="Model to distil from, instead of the recipe's.")] = None,
    output: Annotated[Optional[Path], typer.Option("-o", "--output", help="Run folder; default runs/RECIPE.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Start again where a run already is.")] = False,
    force: Annotated[
        bool,
        typer.Option(help="Continue though settings, teacher, data or plan are not those of the run's checkpoints."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option(help="Show the resolved recipe, memory, steps and disk; train nothing.")
    ] = False,
) -> None:
    """Distil a student as a recipe says.

    The same command again continues, or finds that it is done.
    """
    from bkd.recipe.load import load_recipe

    parsed = load_recipe(recipe, [*(overrides or ()), *([f"teacher.id={teacher}"] if teacher else ())])
    folder = output or Path("runs") / (Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe)
    if dry_run:
        _show(recipe, parsed)
    elif not overwrite and _already_done(folder, parsed):
        console.print(f"already done: {folder / 'student'}")
    else:
        _train(recipe, folder, parsed, overwrite, force)


def _show(name: str, recipe: Recipe) -> None:
    prepare()
    from bkd.cli.cost_view import show_plan
    from bkd.recipe.load import dump_recipe
    from bkd.runs.run import check_inputs

    inputs = check_inputs(recipe)
    console.print(dump_recipe(recipe))
    show_plan(name, recipe, inputs)


def _already_done(folder: Path, recipe: Recipe) -> bool:
    """Answered without loading torch, for a finished run; such a one is never forced."""
    from bkd.runs.folder import RunFolder
    from bkd.runs.opening import open_run

    run = RunFolder(folder)
    finished = run.facts_file.is_file() and run.is_done and run.student.exists()
    return finished and open_run(folder, recipe)[1] == "done"


def _train(name: str, folder: Path, recipe: Recipe, overwrite: bool, force: bool) -> None:
    with progress_view(quiet=process_place().rank > 0) as view:
        view.phase("loading …")
        prepare()
        from bkd.training.stop import Interrupted, StopSignal

        try:
            with StopSignal() as stop:
                student = _train_in(folder, name, recipe, overwrite, force, view, stop)
        except Interrupted as error:
            saved = "stopped, everything is saved; the same command continues"
            view.phase(saved if error.__cause__ is None else "stopped; the same command continues where it was saved")
            raise typer.Exit(STOPPED) from None
        except KeyboardInterrupt:
            view.phase("stopped; the same command continues from the last checkpoint")
            raise typer.Exit(130) from None
        view.phase(f"done: {student} is a stock diffusers pipeline folder")


def _train_in(
    folder: Path, name: str, recipe: Recipe, overwrite: bool, force: bool, view: ProgressView, stop: StopSignal
) -> Path:
    from bkd.cli.cost_view import estimated, show_advice
    from bkd.runs.folder import RunFolder
    from bkd.runs.run import check_inputs, run_recipe
    from bkd.runs.stage import Listener
    from bkd.training.tracking import log_in

    main = process_place().rank == 0
    if main:
        log_in(recipe.train.trackers)
    view.phase(f"checking {recipe.origin} and shards")
    inputs = check_inputs(recipe, view.update)
    listener = Listener(phase=view.phase, progress=view.update, step=view.step, resumed=view.resumed)
    if main:
        show_advice(name, inputs.stages, [estimated(planned) for planned in inputs.stages])
    with (
        _held(folder, recipe, inputs, overwrite, force) if main else nullcontext(RunFolder(folder, writes=False)) as run
    ):
        run_recipe(recipe, run, inputs, listener, stop, force=force)
    return run.student


@contextmanager
def _held(folder: Path, recipe: Recipe, inputs: Inputs, overwrite: bool, force: bool) -> Iterator[RunFolder]:
    """The run's folder, opened for this process and closed to others."""
    from bkd.data.remote import shown
    from bkd.runs.lock import hold_run
    from bkd.runs.opening import open_run
    from bkd.runs.run import check_forced

    if force and not overwrite:
        check_forced(folder, inputs)
    run, _ = open_run(folder, recipe, overwrite=overwrite, force=force)
    with hold_run(folder):
        run.record(command=shlex.join(["bkd", *map(shown, sys.argv[1:])]))
        yield run
