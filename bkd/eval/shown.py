"""How figures of an evaluation are written, in the terminal's tables and on the page alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NONE = "\N{EN DASH}"
"""In a cell of a table that has nothing to say."""
SPLIT_TITLES = {"test": "unseen captions", "novel": "unseen combinations", "theme-test": "the theme"}
"""Of the embedded world's splits that are measured."""


def own_samplers(report: Mapping[str, Any]) -> str | None:
    """Which models of an evaluation were not drawn as the others were."""
    own = [model["name"] for model in report["models"] if "few_steps" in model.get("sampler", {})]
    return f"with the steps and the sampler that they were trained for: {', '.join(own)}" if own else None


def share(proportion: Mapping[str, Any] | None) -> str:
    """What is right of all there is."""
    return f"{proportion['successes'] / proportion['total']:.1%}" if proportion else NONE


def relative(accuracy: float | None) -> str:
    """A share of the first model's accuracy; a factor where that one can next to nothing."""
    if accuracy is None:
        return NONE
    return f"{accuracy:.1%}" if accuracy < 10 else f"{accuracy:,.0f} x"
