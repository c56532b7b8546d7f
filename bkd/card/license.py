"""Whose licence a student is under: its teacher's, found where its files or the Hub say it, and never guessed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bkd.card.files import CARD_FILE
from bkd.card.head import read_head
from bkd.errors import HubError
from bkd.models.locate import hub_commit

RESTRICTED = (
    "creativeml-openrail-m",
    "openrail",
    "openrail++",
    "bigscience-openrail-m",
    "bigcode-openrail-m",
    "bigscience-bloom-rail-1.0",
)
"""Licences of the OpenRAIL family, by the Hub's names: their restrictions of use must be passed on."""
PERMISSIVE = ("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "cc0-1.0", "unlicense", "cc-by-4.0")
"""Licences that let what is made of a model be under another."""
LINKS = {
    "creativeml-openrail-m": "https://huggingface.co/spaces/CompVis/stable-diffusion-license",
    "openrail++": "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/blob/main/LICENSE.md",
}
"""Where to read those that Stable Diffusion is under."""
_OPENRAIL = (
    "in any way that violates the law",
    "to exploit or harm minors",
    "to spread verifiably false information in order to harm others",
    "to make or spread personal information that can harm somebody",
    "to defame, disparage or harass others",
    "for fully automated decisions that touch somebody's legal rights or bind them",
    "to discriminate against people or groups, or harm them, for their behaviour or what they are",
    "to exploit what makes a group vulnerable in order to distort its behaviour and harm it",
    "to give medical advice or interpret medical results",
    "for the administration of justice, law enforcement, immigration or asylum",
)
RESTRICTIONS = {"creativeml-openrail-m": _OPENRAIL, "openrail++": _OPENRAIL}
"""What the licences of Stable Diffusion forbid (their attachment A), in short."""
NAMES = "the Hub's names, such as creativeml-openrail-m, openrail++ or apache-2.0"
ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
NAMED_ELSEWHERE = "other"
"""The Hub's word for a licence that it has none for; the name and the address then stand beside it."""
OTHER_LICENSE = "--license other --license-name NAME --license-link ADDRESS"


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
        """From a card's head; None where that names none, or several of which none binds all that is made of it."""
        named = metadata.get("license")
        ids = [str(each) for each in (named if isinstance(named, list) else [named]) if each]
        binding = [each for each in ids if each in RESTRICTED]
        if not ids or (len(ids) > 1 and not binding):
            return None
        more = {"name": metadata.get("license_name"), "link": metadata.get("license_link")}
        return cls((binding or ids)[0], **{key: str(value) for key, value in more.items() if value})

    @property
    def address(self) -> str | None:
        """Where to read it."""
        return self.link or LINKS.get(self.id)


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
            allowed=NAMES,
            remedy="look it up where the teacher comes from, and give --license ID",
        )
    if asked is not None and not ID.fullmatch(asked.id):
        raise HubError(
            "not the name of a licence", where="--license", got=asked.id, allowed=NAMES, remedy=OTHER_LICENSE
        )
    if teacher is not None and asked is not None and teacher.id not in (*PERMISSIVE, asked.id):
        raise HubError(
            "the teacher's licence goes along with what is made of it",
            where=name,
            got=f"--license {asked.id}",
            allowed=str(teacher),
            remedy="leave --license out",
        )
    found = asked or teacher
    assert found is not None
    if found.id == NAMED_ELSEWHERE and not (found.name and found.link):
        raise HubError(
            "a licence called 'other' needs its name and where to read it",
            where=name,
            remedy=OTHER_LICENSE,
        )
    return found


def teacher_license(name: str, folder: Path) -> License | None:
    """What the teacher's own card says; that of a Hub repository is asked for where the Hub can be reached.

    Args:
        name: As the recipe names the teacher.
        folder: Where it lies.
    """
    from huggingface_hub import ModelCard, constants

    if (folder / CARD_FILE).is_file():
        return License.of(read_head(folder / CARD_FILE))
    if hub_commit(folder) is None or constants.HF_HUB_OFFLINE:
        return None
    try:
        return License.of(ModelCard.load(name, ignore_metadata_errors=True).data.to_dict())
    except Exception:  # no card, no network: then its author is asked
        return None
