"""Where the card and what it shows lie: in the run's folder, in an exported student's, and in the repository."""

from __future__ import annotations

from pathlib import Path

from bkd.errors import HubError
from bkd.runs.folder import SUITES

CARD_FILE = "README.md"
CARD_FOLDER = "card"
"""Pictures, measurements and the recipe that the card speaks of."""
REPO_PLACEHOLDER = "NAMESPACE/NAME"
"""Stands in the card's example for the repository, until `bkd push` knows it."""
SHOWN = ("samples.png", "removed.png", "recipe.yaml", "speed.json", *(f"{suite}.json" for suite in SUITES))
"""What may lie in that folder."""
DIGEST_KEY = "bkd_student_sha256"
"""In the card's head: of the weights that it was written for."""


def is_written_card(path: Path) -> bool:
    """Whether a card was written from a run, rather than by hand from the start."""
    return path.is_file() and f"{DIGEST_KEY}: " in path.read_text(encoding="utf-8", errors="replace")


def read_card(path: Path) -> str:
    """A card's text, line ends as they are: what did not change must not go up again.

    Raises:
        HubError: If it is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise HubError("this model card is not UTF-8", where=path, got=error, remedy="save it as UTF-8") from None
