"""Whose licence a student is under: its teacher's, found where its files or the Hub say it, and never guessed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bkd.data.shapes import EMBEDDED
from bkd.errors import HubError
from bkd.locate import HUB_ID

RESTRICTED = (
    "creativeml-openrail-m",
    "openrail",
    "openrail++",
    "bigscience-openrail-m",
    "bigcode-openrail-m",
    "bigscience-bloom-rail-1.0",
)
"""Licences of the OpenRAIL family, by the Hub's names: their restrictions of use must be passed on."""
NAMED_ELSEWHERE = "other"
"""The Hub's word for a licence that it has none for; the name and the address then stand beside it."""


@dataclass(frozen=True)
class License:
    """As the Hub's metadata names it.

    Attributes:
        id: Such as `apache-2.0`, or `other`.
        name: Of one that is `other`.
        link: To the text of one that is `other`.
    """

    id: str
    name: str | None = None
    link: str | None = None

    @property
    def restricts_use(self) -> bool:
        """Whether it says what the model must not be used for, and that others must be told."""
        return self.id in RESTRICTED

    def __str__(self) -> str:
        return f"{self.name} ({self.link})" if self.name else self.id

    @classmethod
    def of(cls, metadata: Any) -> License | None:
        """From a card's head; None where that names none."""
        wanted = {"id": "license", "name": "license_name", "link": "license_link"}
        found = {key: metadata.get(word) for key, word in wanted.items()}
        return cls(**{key: str(value) for key, value in found.items() if value}) if found["id"] else None


def carried_over(teacher: License | None, asked: License | None, name: str) -> License:
    """The student's licence.

    Args:
        teacher: Its teacher's, where that is known.
        asked: What its author says.
        name: Of the teacher.

    Raises:
        HubError: If nobody says which, or the teacher's does not allow another.
    """
    if teacher is None and asked is None:
        raise HubError(
            "no licence is known: the teacher's files name none",
            where=name,
            allowed="the Hub's names, such as creativeml-openrail-m, openrail++ or apache-2.0",
            remedy="look it up where the teacher comes from, and give --license ID",
        )
    if teacher is not None and asked is not None and teacher.restricts_use and asked.id != teacher.id:
        raise HubError(
            "the teacher's licence goes along with what is made of it",
            where=name,
            got=f"--license {asked.id}",
            allowed=teacher.id,
            remedy="leave --license out",
        )
    found = asked or teacher
    assert found is not None
    if found.id == NAMED_ELSEWHERE and not (found.name and found.link):
        raise HubError(
            "a licence called 'other' needs its name and where to read it",
            where=name,
            remedy="--license other --license-name NAME --license-link ADDRESS",
        )
    return found


def teacher_license(name: str, folder: Path) -> License | None:
    """What the teacher's own card says; that of a Hub repository is asked for where the Hub can be reached.

    Args:
        name: As the recipe names the teacher.
        folder: Where it lies.
    """
    from huggingface_hub import ModelCard, constants, metadata_load

    if (folder / "README.md").is_file():
        return License.of(metadata_load(folder / "README.md") or {})
    if not is_hub_id(name) or constants.HF_HUB_OFFLINE:
        return None
    try:
        return License.of(ModelCard.load(name, ignore_metadata_errors=True).data.to_dict())
    except Exception:  # no card, no network: then its author is asked
        return None


def is_hub_id(name: str) -> bool:
    """Whether a teacher is named by a repository rather than a place on this machine."""
    return name != EMBEDDED and bool(HUB_ID.fullmatch(name)) and not Path(name).expanduser().exists()
