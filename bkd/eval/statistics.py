"""Intervals and paired tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, norm

CONFIDENCE = 0.95


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
    interval = binomtest(successes, total).proportion_ci(CONFIDENCE, method="wilson")
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


@dataclass(frozen=True)
class Estimate:
    """A statistic of N images with its 95 % interval.

    Attributes:
        value: Of all images.
        low: Lower end.
        high: Upper end.
        num_images: N.
        num_resamples: Of the bootstrap that the interval comes from.
    """

    value: float
    low: float
    high: float
    num_images: int
    num_resamples: int

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], float], num_images: int, *, num_resamples: int = 1000, seed: int = 0
) -> Estimate:
    """A statistic of images and how far it may be off because these and no others were drawn.

    The interval is the value and 1.96 standard deviations of the statistic over resamples of the images (Efron &
    Tibshirani 1993, chapter 13). Quantiles would not do: a resample has repeated images, and its FID lies far above
    that of the images themselves.

    Args:
        statistic: Of the images with the given numbers, (N,), which may repeat.
        num_images: N.
        num_resamples: More make the interval itself more certain.
        seed: Of the resamples.
    """
    rng = np.random.default_rng(seed)
    value = statistic(np.arange(num_images))
    found = [statistic(rng.integers(num_images, size=num_images)) for _ in range(num_resamples)]
    half = float(norm.ppf(0.5 + CONFIDENCE / 2) * np.std(found, ddof=1))
    return Estimate(float(value), float(value) - half, float(value) + half, num_images, num_resamples)


def mean_of(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """The mean of one number per image."""
    array = np.asarray(values, np.float64)
    return bootstrap(lambda chosen: float(array[chosen].mean()), len(array), seed=seed)
