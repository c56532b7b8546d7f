"""Intervals and paired tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, norm, t

CONFIDENCE = 0.95
Z = float(norm.ppf(0.5 + CONFIDENCE / 2))
LEFT_OUT = 0.1
"""Share of the images that a resample of the jackknife does without."""


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
        low: Lower end; None for one image, which says nothing of others.
        high: Upper end.
        num_images: N.
        num_resamples: That the interval comes from.
    """

    value: float
    low: float | None
    high: float | None
    num_images: int
    num_resamples: int


def jackknife(
    statistic: Callable[[NDArray[np.int64]], float], num_images: int, *, num_resamples: int, seed: int = 0
) -> Estimate:
    """A statistic of a whole set of images, and how far it may be off because these and no others were drawn.

    Each resample leaves a tenth of the images out (delete-d jackknife: Shao & Wu 1989). A bootstrap, whose resamples
    repeat images, does not know covariances of few images: its intervals of FID are twice too wide and more.

    Args:
        statistic: Of the images with the given numbers, each once.
        num_images: N.
        num_resamples: More make the interval itself more certain.
        seed: Of the resamples.
    """
    rng, kept = np.random.default_rng(seed), num_kept(num_images)
    value = float(statistic(np.arange(num_images)))
    found = [statistic(np.sort(rng.permutation(num_images)[:kept])) for _ in range(num_resamples)]
    deviation = float(np.std(found, ddof=1)) * (kept / (num_images - kept)) ** 0.5
    return _around(value, Z * deviation, num_images, num_resamples)


def num_kept(num_images: int) -> int:
    """Of N images, how many a jackknife's resample has."""
    return num_images - max(1, round(LEFT_OUT * num_images))


def mean_of(values: Sequence[float], *, num_resamples: int = 1000, seed: int = 0) -> Estimate:
    """The mean of one number per image, with a bootstrap interval (Efron & Tibshirani 1993, chapter 13)."""
    array, rng = np.asarray(values, np.float64), np.random.default_rng(seed)
    if len(array) == 1:
        return Estimate(float(array[0]), None, None, 1, 0)
    found = [array[rng.integers(len(array), size=len(array))].mean() for _ in range(num_resamples)]
    return _around(float(array.mean()), Z * float(np.std(found, ddof=1)), len(array), num_resamples)


def mean_of_blocks(value: float, blocks: Sequence[float], num_images: int) -> Estimate:
    """A value, with the interval of the mean of what separate blocks of its images give (Student's t)."""
    half = float(t.ppf(0.5 + CONFIDENCE / 2, len(blocks) - 1) * np.std(blocks, ddof=1) / len(blocks) ** 0.5)
    return _around(value, half, num_images, len(blocks))


def _around(value: float, half: float, num_images: int, num_resamples: int) -> Estimate:
    return Estimate(value, value - half, value + half, num_images, num_resamples)
