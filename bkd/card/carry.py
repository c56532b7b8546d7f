"""A card goes along with its student when that is exported."""

from __future__ import annotations

import shutil
from pathlib import Path

from bkd.card.files import CARD_FILE, CARD_FOLDER, DIGEST_KEY, is_written_card
from bkd.files import write_atomically
from bkd.model_folder import model_digest


def carry_card(run: Path, exported: Path) -> bool:
    """Copy a run's card to a folder that its student was exported to, as that of the exported weights.

    Args:
        run: With or without a card.
        exported: Pipeline folder.

    Returns:
        Whether there was a card of the run's student.
    """
    card = run / CARD_FILE
    if not is_written_card(card) or not (run / "student").is_dir():
        return False
    text, before = card.read_text(encoding="utf-8"), model_digest(run / "student")
    if f"{DIGEST_KEY}: {before}" not in text:
        return False
    shutil.copytree(run / CARD_FOLDER, exported / CARD_FOLDER, dirs_exist_ok=True)
    write_atomically(exported / CARD_FILE, text.replace(before, model_digest(exported)))
    return True
