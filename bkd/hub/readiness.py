"""Whether a student may be shown: whole, with a card that is its own, a licence and figures."""

from __future__ import annotations

from pathlib import Path

from bkd.card.files import CARD_FILE, DIGEST_KEY
from bkd.card.head import read_head
from bkd.diffusion.guidance import StudentKind
from bkd.errors import HubError
from bkd.models.folder import check_pipeline_folder, model_digest
from bkd.models.locate import locate
from bkd.runs.folder import RunFolder, require_finished, run_of_student
from bkd.runs.measuring import eval_command, quoted


def student_and_home(path: Path) -> tuple[Path, Path]:
    """The pipeline folder that a run or a folder stands for, and the folder of its card.

    Raises:
        BkdError: If the run is not finished, a process works on it, or the folder is no whole pipeline.
    """
    if not path.is_dir():
        raise HubError("no such folder", where=path, allowed="a run, or a pipeline folder", remedy="check its name")
    if (run := run_of_student(path)) is not None:
        require_finished(run)  # its student may change, also where that is what was named
    student = locate(path) if RunFolder(path).facts_file.is_file() else path
    check_pipeline_folder(student)
    return student, path


def shortcomings(student: Path, home: Path) -> list[HubError]:
    """What a card lacks, each as the error that it is.

    Args:
        student: A whole pipeline folder.
        home: Of its card.
    """
    card, is_run = home / CARD_FILE, student != home
    command = f"bkd card {quoted(home)}"

    def lacking(what: str, of_run: str, of_folder: str) -> HubError:
        return HubError(what, where=card, remedy=f"{of_run if is_run else of_folder}; --force uploads all the same")

    if not card.is_file():
        return [lacking("there is no model card", command, "write one there, with the Hub's metadata at its head")]
    try:
        known, found = read_head(card), []
    except HubError as unreadable:
        return [unreadable]
    if not known.get("license"):
        found.append(
            lacking("the card names no licence", f"{command} --license ID --overwrite", "license: at its head")
        )
    if not known.get("model-index") and not StudentKind.of(student).encodes:
        measure = f"{eval_command(RunFolder(home)) if is_run else ''}, then {command} --overwrite"
        found.append(lacking("the card holds no figures", measure, "model-index: at its head"))
    if known.get(DIGEST_KEY) not in (None, model_digest(student)):
        found.append(
            lacking("the card was written for other weights", f"{command} --overwrite", "export the run once more")
        )
    return found
