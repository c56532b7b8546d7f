"""`bkd card`, `bkd push`: tell others what a student is, and put it where they find it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from bkd.cli.console import console, counted

if TYPE_CHECKING:
    from bkd.hub.contents import RepoFile

NAMED = 8
"""Names of files that are listed one by one."""


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
    """Upload a student with its card, as one commit; a second time only what changed.

    The token is the Hub's own: `hf auth login`, or HF_TOKEN.
    """
    from bkd.hub.contents import left_behind, repo_files
    from bkd.hub.push import Push, Target, find_token
    from bkd.hub.readiness import shortcomings, student_folder

    target = Target(repo, private, revision, pr)
    folder = student_folder(model)
    if not dry_run:
        find_token()
    lacking = shortcomings(folder, f"bkd card {shlex.quote(str(model))}")
    if lacking and not (force or dry_run):
        raise lacking[0]
    files = repo_files(folder, repo)
    _show(files, left_behind(folder, files))
    for shortcoming in lacking:
        console.print(f"note: {shortcoming}")
    if dry_run:
        console.print(f"nothing was sent; without --dry-run it goes to {repo}")
        return
    pushed = Push(target, files, message or f"Upload {folder.name} with bkd", console.print).run()
    console.print(
        f"{counted(len(pushed.changed), 'file')} sent, {pushed.unchanged} unchanged, {len(pushed.removed)} removed"
    )
    console.print(f"done: {pushed.url}")


def _show(files: list[RepoFile], left: list[str]) -> None:
    """What goes up, the largest first, and what does not."""
    for file in sorted(files, key=lambda file: -file.size)[:NAMED]:
        console.print(f"  {file.size / 2**20:10,.2f} MiB  {file.name}")
    if len(files) > NAMED:
        console.print(f"  and {counted(len(files) - NAMED, 'smaller file')}")
    console.print(f"{counted(len(files), 'file')}, {sum(file.size for file in files) / 2**20:,.1f} MiB")
    if left:
        console.print(f"stays here: {', '.join(left[:NAMED])}" + (" …" if len(left) > NAMED else ""))
