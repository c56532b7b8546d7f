"""FID, KID and IS from features, in float64.

Frechet distance: Heusel et al. 2017, arXiv:1706.08500, equation 6. Kernel distance: Binkowski et al. 2018,
arXiv:1801.01401. Inception score: Salimans et al. 2016, arXiv:1606.03498. Subsets and splits are torch-fidelity's, so
that its figures and these agree.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np
import torch
from torch import Tensor
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import poly_mmd

from bkd.errors import DataError
from bkd.eval.statistics import jackknife, mean_of_blocks, num_kept

SHUFFLE_SEED = 2020
"""torch-fidelity's."""
KID_SUBSETS, KID_SUBSET_SIZE, KID_BLOCKS, IS_SPLITS = 100, 1000, 10, 10


class TooFewImagesError(DataError):
    """A metric that says nothing of so few images."""


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """What the Frechet distance knows of a set of images.

    Attributes:
        mean: (D,), float64.
        covariance: (D, D), float64.
    """

    mean: Tensor
    covariance: Tensor

    @staticmethod
    def of(features: Tensor) -> FeatureStatistics:
        """Of features (N, D), N > 1; `covariance` divides by N - 1."""
        features = features.double()
        return FeatureStatistics(features.mean(0), torch.cov(features.T).reshape(2 * features.shape[1:]))

    @staticmethod
    def load(path: Path) -> FeatureStatistics:
        """From a file of pytorch-fid: `mu` and `sigma`.

        Raises:
            DataError: If the file is no such file.
        """
        try:
            mean, covariance = _mean_and_covariance(path)
            _check(mean, covariance)
        except Exception as error:  # damaged archives make numpy raise nearly anything
            raise DataError(
                "no reference statistics",
                where=path,
                got=str(error) or type(error).__name__,
                allowed="an .npz with mu (D,) and sigma (D, D), as pytorch-fid --save-stats writes it",
                remedy="save or download it again, or give a folder of images",
            ) from None
        return FeatureStatistics(mean, covariance)

    @property
    def num_features(self) -> int:
        return len(self.mean)

    @cached_property
    def root(self) -> Tensor:
        """The symmetric square root of the covariance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        return root


def _mean_and_covariance(path: Path) -> tuple[Tensor, Tensor]:
    if not is_zipfile(path):
        raise ValueError("another kind of file")
    with np.load(path, allow_pickle=False) as arrays:
        if not {"mu", "sigma"} <= set(arrays.files):
            raise ValueError(f"arrays {', '.join(arrays.files)}")
        mean, covariance = (torch.from_numpy(np.asarray(arrays[name], np.float64)) for name in ("mu", "sigma"))
    return mean, covariance


def _check(mean: Tensor, covariance: Tensor) -> None:
    if mean.dim() != 1 or covariance.shape != 2 * mean.shape:
        raise ValueError(f"mu {tuple(mean.shape)}, sigma {tuple(covariance.shape)}")
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise ValueError("numbers that are not finite")
    if not torch.allclose(covariance, covariance.T, atol=1e-6) or covariance.diagonal().min() < 0:
        raise ValueError("a sigma that is no covariance: not symmetric, or with negative variances")


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Squared Frechet distance of two Gaussians.

    The trace of the root of a product of covariances comes from the symmetric matrix with the same eigenvalues: exact,
    never complex, and on 2,048 features several times as fast as the product's own eigenvalues; `first.root` is
    computed once however many distances are asked for, as an interval does.

    Args:
        first: Of D features.
        second: Of D features.
    """
    product = first.root @ second.covariance @ first.root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    means = (first.mean - second.mean).square().sum()
    return max(0.0, float(means + first.covariance.trace() + second.covariance.trace() - 2 * cross))


def fid(features: Tensor, reference: FeatureStatistics, *, num_resamples: int) -> dict[str, Any]:
    """Frechet distance of images from a reference, with interval and bias.

    A finite sample lies too far from any reference, by an amount in proportion to 1 / N (Chong & Forsyth 2020,
    arXiv:1911.07023). The difference between half the images and all of them is therefore an estimate of the bias:
    figures of different N do not compare, nor do extrapolated ones with plain ones.

    Args:
        features: (N, D).
        reference: Of D features.
        num_resamples: For the interval.

    Raises:
        TooFewImagesError: If nine tenths of N are no more than D: covariances would be singular.
    """
    count, size = features.shape
    if num_kept(count) <= size:
        needed = next(number for number in range(size, 2 * size + 2) if num_kept(number) > size)
        raise TooFewImagesError(
            f"{count:,} images are too few for a covariance of {size:,} features: {needed:,} are needed"
        )
    features = features.double()

    def distance(chosen: np.ndarray[Any, np.dtype[np.int64]]) -> float:
        return frechet_distance(reference, FeatureStatistics.of(features[torch.from_numpy(chosen)]))

    estimate = jackknife(distance, count, num_resamples=num_resamples)
    return {**asdict(estimate), **_bias(features, reference, estimate.value)}


def _bias(features: Tensor, reference: FeatureStatistics, value: float) -> dict[str, Any]:
    if len(features) // 2 <= features.shape[1]:
        return {"bias": {"skipped": f"half of {len(features):,} images are too few for a covariance"}}
    order = torch.from_numpy(np.random.RandomState(SHUFFLE_SEED).permutation(len(features)))
    halves = [frechet_distance(reference, FeatureStatistics.of(features[half])) for half in order.chunk(2)]
    bias = sum(halves) / 2 - value
    return {"bias": bias, "extrapolated": value - bias}


def kernel_distance(features: Tensor, reference: Tensor, *, subsets: int, subset_size: int) -> tuple[float, float]:
    """Mean and standard deviation, over random subsets, of the squared MMD under the cubic kernel.

    Args:
        features: (N, D).
        reference: (M, D).
        subsets: How many.
        subset_size: At most N and M.
    """
    first, second, rng, found = features.double(), reference.double(), np.random.RandomState(SHUFFLE_SEED), []
    for _ in range(subsets):
        ours, theirs = (rng.choice(len(side), subset_size, replace=False) for side in (first, second))
        found.append(float(poly_mmd(first[ours], second[theirs])))
    return float(np.mean(found)), float(np.std(found))


def kid(features: Tensor, reference: Tensor) -> dict[str, Any]:
    """Kernel distance of images from reference images; its expectation does not depend on how many there are.

    The interval comes from ten separate blocks of both sides.

    Args:
        features: (N, D).
        reference: (M, D).

    Raises:
        TooFewImagesError: If there are fewer images than a subset has.
    """
    if min(len(features), len(reference)) < KID_SUBSET_SIZE:
        raise TooFewImagesError(
            f"{len(features):,} images and {len(reference):,} of the reference are too few: "
            f"subsets of {KID_SUBSET_SIZE:,} are compared"
        )
    value, deviation = kernel_distance(features, reference, subsets=KID_SUBSETS, subset_size=KID_SUBSET_SIZE)
    size = min(len(features), len(reference)) // KID_BLOCKS
    rng = np.random.RandomState(SHUFFLE_SEED)
    ours, theirs = (torch.from_numpy(rng.permutation(len(side))[: KID_BLOCKS * size]) for side in (features, reference))
    pairs = zip(torch.split(ours, size), torch.split(theirs, size), strict=True)
    blocks = [float(poly_mmd(features[x].double(), reference[y].double())) for x, y in pairs]
    return {**asdict(mean_of_blocks(value, blocks, len(features))), "deviation_over_subsets": deviation}


def split_inception_score(logits: Tensor, *, splits: int = IS_SPLITS) -> tuple[float, float]:
    """Mean and standard deviation over splits of the exponential of the mean KL divergence from their mean.

    Args:
        logits: (N, C) of InceptionV3, without the last layer's bias.
        splits: At most N.
    """
    order = np.random.RandomState(SHUFFLE_SEED).permutation(len(logits))
    shuffled, found = logits.double()[torch.from_numpy(order)], []
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # it shuffles once more, to no effect
        warnings.simplefilter("ignore")  # of memory, and of the deviation of one split, which is not used
        for number in range(splits):
            metric = InceptionScore(feature=torch.nn.Identity(), splits=1)
            metric.update(shuffled[number * len(logits) // splits : (number + 1) * len(logits) // splits])
            found.append(float(metric.compute()[0]))
    return float(np.mean(found)), float(np.std(found))


def inception_score(logits: Tensor, *, num_resamples: int) -> dict[str, Any]:
    """Inception score with interval.

    Args:
        logits: (N, C).
        num_resamples: For the interval.

    Raises:
        TooFewImagesError: If there are fewer images than two for each split.
    """
    if len(logits) < 2 * IS_SPLITS:
        raise TooFewImagesError(f"{len(logits):,} images are too few: {IS_SPLITS} splits need two each at least")
    deviation = split_inception_score(logits)[1]
    estimate = jackknife(
        lambda chosen: split_inception_score(logits[torch.from_numpy(chosen)])[0],
        len(logits),
        num_resamples=num_resamples,
    )
    return {**asdict(estimate), "deviation_over_splits": deviation}
