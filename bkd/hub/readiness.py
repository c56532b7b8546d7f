"""Whether a student may be shown: whole, with a card that is its own, a licence and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bkd.card.files import CARD_FILE, DIGEST_KEY
from bkd.errors import HubError
from bkd.model_folder import check_pipeline_folder, model_digest
from bkd.run_folder import RunFolder, require_finished

ANYWAY = "--force uploads all the same"


def student_folder(path: Path) -> Path:
    """The pipeline folder that a run or a folder stands for.

    Raises:
        BkdError: If the run is not finished, a process works on it, or the folder is no whole pipeline.
    """
    run = RunFolder(path)
    if run.facts_file.is_file():
        require_finished(run)
        path = run.student
    elif not path.is_dir():
        raise HubError("no such folder", where=path, allowed="a run, or a pipeline folder")
    check_pipeline_folder(path)
    return path


def shortcomings(folder: Path, make_card: str) -> list[HubError]:
    """What a card lacks, each as the error that it is.

    Args:
        folder: A whole pipeline folder.
        make_card: The command that writes the card.
    """
    card = folder / CARD_FILE
    if not card.is_file():
        return [HubError("there is no model card", where=card, remedy=f"{make_card}; {ANYWAY}")]
    known = read_card(card)
    found = []
    if not known.get("license"):
        found.append(
            HubError("the card names no licence", where=card, remedy=f"{make_card} --license ID --overwrite; {ANYWAY}")
        )
    if not known.get("model-index"):
        found.append(
            HubError(
                "the card holds no figures",
                where=card,
                remedy=f"measure it: bkd eval RUN, then {make_card} --overwrite; {ANYWAY}",
            )
        )
    if known.get(DIGEST_KEY) not in (None, model_digest(folder)):
        found.append(
            HubError("the card was written for other weights", where=card, remedy=f"{make_card} --overwrite; {ANYWAY}")
        )
    return found


def read_card(card: Path) -> dict[str, Any]:
    """The metadata at a card's head.

    Raises:
        HubError: If it cannot be read.
    """
    from huggingface_hub import metadata_load

    try:
        return metadata_load(card) or {}
    except Exception as error:  # of YAML, of the client, of the text's encoding
        raise HubError(
            "the head of the model card cannot be read", where=card, got=str(error).splitlines()[0]
        ) from error
