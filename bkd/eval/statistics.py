"""Intervals and paired tests for counted outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import binomtest


@dataclass(frozen=True)
class Proportion:
    """A share of successes with its 95 % Wilson interval (Wilson 1927)."""

    successes: int
    total: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.successes / self.total

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


def proportion(outcomes: Sequence[bool]) -> Proportion:
    """Share of true outcomes. `outcomes` must not be empty."""
    successes, total = sum(outcomes), len(outcomes)
    interval = binomtest(successes, total).proportion_ci(0.95, method="wilson")
    return Proportion(successes, total, float(interval.low), float(interval.high))


def mcnemar_p(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided exact McNemar test: how likely is a difference this large between two equally good models?

    Args:
        first: Outcomes of one model on N prompts.
        second: Outcomes of the other on the same prompts.
    """
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    discordant = only_first + only_second
    return float(binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0
