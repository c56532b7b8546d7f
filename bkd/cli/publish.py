"""`bkd card`, `bkd push`: tell others what a student is, and put it where they find it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from bkd.cli.console import console, counted

if TYPE_CHECKING:
    from bkd.errors import BkdError
    from bkd.hub.contents import RepoFile
    from bkd.hub.push import Pushed

NAMED = 8
"""Names of files that are listed one by one."""


def card(
    run: Annotated[Path, typer.Argument(help="A finished run.")],
    license: Annotated[
        Optional[str], typer.Option(help="By the Hub's name for it; needed where the teacher's files say none.")
    ] = None,
    license_name: Annotated[Optional[str], typer.Option(help="Of a licence that the Hub calls 'other'.")] = None,
    license_link: Annotated[Optional[str], typer.Option(help="Where to read it.")] = None,
    base_model: Annotated[Optional[str], typer.Option(help="Hub id of a teacher that was a folder.")] = None,
    data: Annotated[Optional[str], typer.Option(help="What the training data is: a sentence, or a Hub id.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier card.")] = False,
) -> None:
    """Write a run's model card: what its student is and can."""
    from bkd.card.license import NAMED_ELSEWHERE, OTHER_LICENSE, License
    from bkd.card.subject import AuthorSays, subject_of
    from bkd.card.write import write_card
    from bkd.errors import HubError
    from bkd.runs.folder import RunFolder

    if (license_name or license_link) and license != NAMED_ELSEWHERE:
        raise HubError(
            "a name and a link are for a licence called 'other'", where="--license", got=license, remedy=OTHER_LICENSE
        )
    own = License(license, license_name, license_link) if license else None
    subject = subject_of(RunFolder(run), AuthorSays(own, base_model, data))
    written = write_card(subject, overwrite=overwrite)
    for question in subject.open_questions():
        console.print(f"note: {question}")
    console.print(f"done: {written}; read it, then: bkd push {shlex.quote(str(run))} --repo NAMESPACE/NAME")


def push(
    model: Annotated[Path, typer.Argument(help="A finished run, or a pipeline folder.")],
    repo: Annotated[str, typer.Option(help="NAMESPACE/NAME on the Hub; made when missing.")],
    private: Annotated[bool, typer.Option("--private", help="Hide a new repository from others.")] = False,
    revision: Annotated[Optional[str], typer.Option(help="Branch; made when missing.")] = None,
    pr: Annotated[bool, typer.Option("--pr", help="Open a pull request rather than commit.")] = False,
    message: Annotated[Optional[str], typer.Option(help="Of the commit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go up, and ask the Hub nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Upload without card, licence or figures.")] = False,
) -> None:
    """Upload a student with its card, as one commit.

    A second time only what changed goes up.

    The token is the Hub's own: `hf auth login`, or HF_TOKEN.
    """
    from bkd.hub.contents import left_behind, repo_files
    from bkd.hub.push import Push, Target
    from bkd.hub.readiness import shortcomings, student_and_home

    target = Target(repo, private, revision, pr)
    student, home = student_and_home(model)
    upload = None if dry_run else Push(target, console.print)  # it lacks a token before anything is read
    lacking = shortcomings(student, home)
    if lacking and not (force or dry_run):
        raise lacking[0]
    files = repo_files(student, home, repo)
    _show_files(files, left_behind(student, files), lacking)
    if upload is None:
        console.print(f"nothing was sent; without --dry-run it goes to {repo}")
    else:
        _show_pushed(upload.run(files, message or f"Upload {home.resolve().name} with bkd"))


def _show_pushed(pushed: Pushed) -> None:
    if pushed.removed:
        console.print(f"removed, of an earlier student: {', '.join(pushed.removed)}")
    console.print(
        f"{counted(len(pushed.changed), 'file')} sent, {pushed.unchanged} unchanged, {len(pushed.removed)} removed"
    )
    console.print(f"done: {pushed.url}")


def _show_files(files: list[RepoFile], left: list[str], lacking: Sequence[BkdError]) -> None:
    """What goes up, the largest first, what does not, and what a reader would miss."""
    for file in sorted(files, key=lambda file: -file.size)[:NAMED]:
        console.print(f"  {file.size / 2**20:10,.2f} MiB  {file.name}")
    if len(files) > NAMED:
        console.print(f"  and {counted(len(files) - NAMED, 'smaller file')}")
    console.print(f"{counted(len(files), 'file')}, {sum(file.size for file in files) / 2**20:,.1f} MiB")
    if left:
        console.print(f"stays here: {', '.join(left[:NAMED])}" + (" …" if len(left) > NAMED else ""))
    for shortcoming in lacking:
        console.print(f"note: {shortcoming}")
