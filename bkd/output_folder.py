"""Output folders: what others made is never written over. Light, so as to refuse before anything heavy loads."""

from __future__ import annotations

from pathlib import Path

from bkd.card.files import CARD_FILE, CARD_FOLDER, is_written_card
from bkd.errors import OutputError
from bkd.files import require_writable
from bkd.models.folder import parts_of
from bkd.runs.folder import RunFolder
from bkd.surgery.plan import PLAN_FILE


def require_free(folder: Path, *, overwrite: bool, marker: str) -> None:
    """Refuse to write over something.

    Args:
        folder: Where output is to go.
        overwrite: Whether an earlier output of the same kind may be replaced.
        marker: A file by which such an output is known; nothing else is ever replaced.

    Raises:
        OutputError: If the folder holds anything else, is a file, or cannot be written to.
    """
    require_writable(folder)
    replaceable = (folder / marker).is_file()
    if folder.is_dir() and any(folder.iterdir()) and not (overwrite and replaceable):
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:4])
        raise OutputError(
            f"the output folder holds {'an earlier output' if replaceable else 'something else'}",
            where=folder,
            got=held,
            remedy="choose another -o" + (", or add --overwrite" if replaceable else ""),
        )


def require_new_file(path: Path, suffix: str, *, overwrite: bool) -> None:
    """Refuse an output file that cannot be written.

    Args:
        path: The file.
        suffix: What its name must end in.
        overwrite: Whether an earlier file may be replaced.

    Raises:
        OutputError: If it has another suffix, is a folder, is there already, or cannot be written.
    """
    if path.suffix != suffix:
        raise OutputError(f"the output is a {suffix} file", where=path, remedy="choose another -o")
    if path.is_dir():
        raise OutputError("the output file is a folder", where=path, remedy="choose another -o")
    if path.exists() and not overwrite:
        raise OutputError("the output file exists", where=path, remedy="choose another -o, or add --overwrite")
    require_writable(path.parent)


def check_output(teacher: Path, output: Path, *, overwrite: bool) -> None:
    """Refuse a student's output folder that cannot be written, before any work is done.

    Args:
        teacher: Pipeline folder.
        output: Where the student is to go.
        overwrite: Whether an earlier student may be replaced.

    Raises:
        OutputError: If the folder is in use, belongs to a run, or has to do with the teacher's.
    """
    place, source = output.resolve(), teacher.resolve()
    if source.is_relative_to(place):
        raise OutputError("the output folder is or holds the teacher itself", where=output, remedy="choose another -o")
    if place.is_relative_to(source):
        raise OutputError("the output folder lies inside the teacher's", where=output, remedy="choose another -o")
    if run := next((folder for folder in place.parents if RunFolder(folder).facts_file.is_file()), None):
        raise OutputError("the output folder lies inside a run", where=output, got=run, remedy="choose another -o")
    require_free(output, overwrite=overwrite, marker=PLAN_FILE)
    if output.is_dir() and (foreign := _foreign(output)):
        raise OutputError(
            "the output folder holds more than an earlier student",
            where=output,
            got=", ".join(foreign),
            remedy="move that away, or choose another -o",
        )


def _foreign(student: Path) -> list[str]:
    """What somebody has put beside the files of a pruned student."""
    index = student / "model_index.json"
    ours = {index.name, *(parts_of(student) if index.is_file() else ())}
    if is_written_card(student / CARD_FILE):
        ours |= {CARD_FILE, CARD_FOLDER}
    return sorted(path.name for path in student.iterdir() if path.name not in ours and not path.name.startswith("bkd_"))
