"""`bkd`: the verbs, and what happens to an error on its way to the user."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from bkd import __version__
from bkd.cli import evaluate, models, publish, ship, train
from bkd.cli.bench import bench
from bkd.cli.console import print_error
from bkd.cli.data import data
from bkd.environment import process_place
from bkd.errors import BkdError

app = typer.Typer(
    name="bkd",
    help="Take a Stable Diffusion model you trust and make a smaller, faster one that is yours.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for verb in (
    models.doctor,
    models.inspect,
    models.prune,
    models.remap,
    train.train,
    evaluate.sample,
    evaluate.edit,
    evaluate.eval_,
    ship.report,
    ship.export,
    publish.card,
    publish.push,
):
    app.command(verb.__name__.rstrip("_"))(verb)
app.add_typer(data, name="data")
app.add_typer(bench, name="bench")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"bkd {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options before a verb."""


def main() -> None:
    """Run a command; a user's error is printed without a traceback, and the exit code is 1."""
    try:
        app()
    except (BkdError, OSError) as error:  # a full disk or a forbidden folder is the user's to mend, too
        rank = process_place().rank  # others have mostly met what the first one says in full
        print_error(str(error) if rank == 0 else f"process {rank}: {str(error).splitlines()[0]}")
        sys.exit(1)
