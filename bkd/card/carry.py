"""A card goes along with its student when that is exported."""

from __future__ import annotations

import shutil
from pathlib import Path

from bkd.card.files import CARD_FILE, CARD_FOLDER, DIGEST_KEY, is_written_card
from bkd.files import write_atomically
from bkd.models.folder import model_digest
from bkd.runs.folder import RunFolder

MEASURED = "\n## Measured\n"


def carry_card(run: Path, exported: Path, dtype: str) -> bool:
    """Copy a run's card to a folder that its student was exported to, as that of the exported weights.

    It says which weights its figures are of.

    Args:
        run: With or without a card.
        exported: Pipeline folder.
        dtype: Of the exported weights.

    Returns:
        Whether there was a card of the run's student.
    """
    card, student = run / CARD_FILE, RunFolder(run).student
    if not is_written_card(card) or not student.is_dir():
        return False
    text, before = card.read_text(encoding="utf-8", errors="replace"), model_digest(student)
    if f"{DIGEST_KEY}: {before}" not in text:
        return False
    text = text.replace(f"{DIGEST_KEY}: {before}", f"{DIGEST_KEY}: {model_digest(exported)}")
    note = f"These weights are {dtype}. All figures are of the float32 student, SHA-256 {before}.\n"
    text = text.replace(MEASURED, f"{MEASURED}\n{note}", 1) if MEASURED in text else f"{text}\n{note}"
    shutil.copytree(run / CARD_FOLDER, exported / CARD_FOLDER, dirs_exist_ok=True)
    write_atomically(exported / CARD_FILE, text)
    return True
