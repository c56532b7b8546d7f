"""The head of a model card, as the Hub reads it: YAML between two lines of dashes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bkd.card.files import read_card
from bkd.errors import HubError


def read_head(card: Path) -> dict[str, Any]:
    """A card's metadata; empty where it has none.

    Raises:
        HubError: If it cannot be read.
    """
    from huggingface_hub import metadata_load

    read_card(card)  # so that other letters are not taken for wrong YAML
    try:
        found = metadata_load(card)
    except Exception as error:  # of YAML, of the client
        raise HubError(
            "the head of this model card cannot be read",
            where=card,
            got=str(error).splitlines()[0],
            remedy="mend the YAML between its first two lines of dashes",
        ) from error
    return found or {}
