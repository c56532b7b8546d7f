"""What the suites have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from bkd.eval.candidates import Named
from bkd.eval.fidelity import TooFewImagesError
from bkd.eval.images import ImageFolder, Saving
from bkd.progress import Phase


class Scorer(Protocol):
    """Measures drawn images."""

    def score(self, drawn: Sequence[ImageFolder], phase: Phase) -> list[dict[str, Any]]:
        """What goes into each model's row of the report.

        Args:
            drawn: Of each model, the reference first.
            phase: Told what begins.
        """


class Suite(Protocol):
    """Prompts, and how their images are measured."""

    @property
    def name(self) -> str:
        """As on the command line, and of the report."""

    @property
    def saving(self) -> Saving:
        """What becomes of an image before it is measured."""

    def prompts(self) -> list[str]:
        """In the order in which images are numbered."""

    def settings(self) -> dict[str, Any]:
        """Everything that figures depend on besides models and drawing."""

    def scorer(self, candidates: Sequence[Named]) -> Scorer:
        """Load what measuring needs, before anything is drawn.

        Raises:
            BkdError: If something is missing or does not fit the models.
        """


def or_skipped(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A metric, or why these images have none."""
    try:
        return measure()
    except TooFewImagesError as error:
        return skipped(error.what)


def skipped(reason: str) -> dict[str, Any]:
    """In place of a metric that could not run."""
    return {"skipped": reason}
