"""Errors for users: each names what is wrong, where, what was found, what is allowed, and what to do.

Anything else that escapes `bkd` is a bug of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection


class BkdError(Exception):
    """Base of every error that a user can cause and mend.

    Args:
        what: One clause that says what is wrong.
        where: File, folder, key or part concerned.
        got: What was found there.
        allowed: What would have been accepted.
        remedy: What to do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        got: object = None,
        allowed: object = None,
        remedy: str | None = None,
    ) -> None:
        self.what, self.where, self.got, self.allowed, self.remedy = what, where, got, allowed, remedy
        lines = [f"{where}: {what}" if where is not None else what]
        for label, value in (("got", got), ("allowed", allowed), ("try", remedy)):
            if value is not None:
                lines.append(f"  {label}: {value}")
        super().__init__("\n".join(lines))


class RecipeError(BkdError):
    """A recipe, or an override of one, that cannot be used."""


class ModelError(BkdError):
    """A model folder or Hub repository that is missing, incomplete or of an unsupported kind."""


class SurgeryError(BkdError):
    """A removal that no stock diffusers configuration can express."""


class DataError(BkdError):
    """Shards, samples or captions that cannot be used."""


class OutputError(BkdError):
    """An output folder that is in use or holds something else."""


class TrainingError(BkdError):
    """A training run that cannot go on."""


class HubError(BkdError):
    """The Hub, or the way to it, refused something; or a model is not ready to be shown there."""


class EnvironmentProblem(BkdError):
    """Installed packages that do not fit together."""


class ShapeMismatch(BkdError):
    """Tensors that should have had the same shape."""


def suggest(word: str, known: Collection[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest known word, or an empty string when none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def one_of(word: str, known: Collection[str], *, kind: str, error: type[BkdError] = BkdError) -> str:
    """Return `word` if it is one of `known`.

    Raises:
        BkdError: (of type `error`) naming the nearest known word and all of them.
    """
    if word in known:
        return word
    raise error(f"unknown {kind} '{word}'{suggest(word, known)}", allowed=", ".join(sorted(known)))
