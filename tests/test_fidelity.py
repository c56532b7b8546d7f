"""FID, KID and IS against closed forms and against the tools that papers used."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance

from bkd.errors import DataError
from bkd.eval.fidelity import (
    FeatureStatistics,
    TooFewImagesError,
    fid,
    frechet_distance,
    inception_score,
    kernel_distance,
    kid,
    split_inception_score,
)
from bkd.eval.statistics import jackknife, mean_of, num_kept

torch.manual_seed(0)
OURS = torch.randn(1500, 32, dtype=torch.float64) @ torch.randn(32, 32, dtype=torch.float64)
REAL = torch.randn(1800, 32, dtype=torch.float64) @ torch.randn(32, 32, dtype=torch.float64) + 0.5


def gaussian(mean, deviations):
    return FeatureStatistics(
        torch.tensor(mean, dtype=torch.float64), torch.tensor(deviations, dtype=torch.float64).square().diag()
    )


def test_two_gaussians_of_commuting_covariances_have_a_closed_form():
    """The distance is |m1 - m2|^2 + sum (s1 - s2)^2."""
    first, second = gaussian([0, 1, 2], [1, 2, 3]), gaussian([1, 1, 0], [2, 2, 0.5])
    assert frechet_distance(first, second) == pytest.approx(1 + 4 + 1 + 0 + 2.5**2, rel=1e-12)


def test_a_rotation_of_both_changes_nothing():
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    plain = gaussian([0, 1, 2], [1, 2, 3]), gaussian([1, 1, 0], [2, 2, 0.5])
    turned = [FeatureStatistics(rotation @ s.mean, rotation @ s.covariance @ rotation.T) for s in plain]
    assert frechet_distance(*turned) == pytest.approx(frechet_distance(*plain), rel=1e-10)


def test_nothing_is_nearer_than_itself():
    statistics = FeatureStatistics.of(OURS)
    assert 0 <= frechet_distance(statistics, statistics) < 1e-9


def test_fid_is_that_of_torch_fidelity_and_torchmetrics():
    theirs = fid_statistics_to_metric(fid_features_to_statistics(OURS), fid_features_to_statistics(REAL), False)
    metric = FrechetInceptionDistance(feature=Features(32))
    metric.update(OURS, real=False)
    metric.update(REAL, real=True)
    found = frechet_distance(FeatureStatistics.of(REAL), FeatureStatistics.of(OURS))
    assert found == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)
    assert found == pytest.approx(float(metric.compute()), rel=1e-9)


class Features(torch.nn.Identity):
    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features


def test_kid_is_that_of_torch_fidelity():
    theirs = kid_features_to_metric(OURS, REAL, kid_subsets=7, kid_subset_size=300, verbose=False)
    found = kernel_distance(OURS, REAL, subsets=7, subset_size=300)
    assert found[0] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert found[1] == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9)


def test_the_inception_score_is_that_of_torch_fidelity():
    logits = torch.randn(1234, 50) * 3
    theirs = isc_features_to_metric(logits)
    found = split_inception_score(logits)
    assert found[0] == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert found[1] == pytest.approx(theirs["inception_score_std"], rel=1e-9)


def test_the_inception_score_of_certain_answers_is_a_number():
    """In float32 the probabilities of other classes are zero, and their logarithms make it NaN."""
    logits = 200 * torch.nn.functional.one_hot(torch.arange(400) % 10, 20).float()
    theirs = isc_features_to_metric(logits)["inception_score_mean"]
    assert 8 < theirs < 10 and split_inception_score(logits)[0] == pytest.approx(theirs, rel=1e-9)


def test_measuring_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    inception_score(torch.randn(40, 5, generator=torch.Generator().manual_seed(0)), num_resamples=2)
    assert torch.equal(before, torch.get_rng_state())


def test_published_statistics_give_the_same_fid_as_images(tmp_path):
    statistics = FeatureStatistics.of(REAL)
    np.savez(tmp_path / "real.npz", mu=statistics.mean.numpy(), sigma=statistics.covariance.numpy())
    published = FeatureStatistics.load(tmp_path / "real.npz")
    assert fid(OURS, published, num_resamples=2) == fid(OURS, statistics, num_resamples=2)


def test_the_interval_covers_what_more_images_say():
    """Of two halves of one distribution, whose distance is zero, all that is found is bias."""
    torch.manual_seed(1)
    reference = FeatureStatistics(torch.zeros(8).double(), torch.eye(8).double())
    found = fid(torch.randn(2000, 8), reference, num_resamples=50)
    assert found["low"] < found["value"] < found["high"]
    assert found["bias"] == pytest.approx(found["value"], rel=0.8) and abs(found["extrapolated"]) < found["value"]


def test_a_bootstrap_of_a_mean_has_the_error_of_the_mean():
    values = np.random.default_rng(0).normal(5, 2, size=400)
    found = mean_of(values)
    expected = 1.96 * values.std(ddof=1) / 20
    assert found.value == pytest.approx(values.mean()) and found.num_images == 400
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.1)


def test_one_image_has_a_value_and_no_interval():
    found = mean_of([0.25])
    assert (found.value, found.low, found.high, found.num_images) == (0.25, None, None, 1)


def test_a_jackknife_of_a_mean_has_the_error_of_the_mean():
    values = np.random.default_rng(0).normal(5, 2, size=400)
    found = jackknife(lambda chosen: float(values[chosen].mean()), 400, num_resamples=500)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * values.std(ddof=1) / 20, rel=0.15)
    assert num_kept(400) == 360 and num_kept(3) == 2


def test_the_intervals_of_fid_and_kid_are_as_wide_as_figures_vary():
    """Of 60 sets of images from one distribution; a bootstrap of FID would be wider by half."""
    rng, size, count = torch.Generator().manual_seed(0), 16, 1000
    reference = FeatureStatistics(torch.zeros(size).double(), torch.eye(size).double())
    real = torch.randn(count, size, generator=rng)
    sets = [1.3 * torch.randn(count, size, generator=rng) + 0.3 for _ in range(60)]
    fids = [frechet_distance(reference, FeatureStatistics.of(features)) for features in sets]
    widths = [fid(features, reference, num_resamples=60) for features in sets[:5]]
    assert np.mean([w["high"] - w["low"] for w in widths]) == pytest.approx(2 * 1.96 * np.std(fids), rel=0.3)
    kids = [kernel_distance(features, real, subsets=1, subset_size=count)[0] for features in sets]
    blocks = [kid(features, real) for features in sets[:5]]
    assert 1 < np.mean([b["high"] - b["low"] for b in blocks]) / (2 * 1.96 * np.std(kids)) < 2.5


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda: fid(OURS[:32], FeatureStatistics.of(REAL), num_resamples=2), "32 images are too few.*: 37 are needed"),
        (lambda: kid(OURS[:900], REAL), "subsets of 1,000"),
        (lambda: kid(OURS, REAL[:900]), "900 of the reference"),
        (lambda: inception_score(OURS[:19], num_resamples=2), "10 splits need two each"),
    ],
)
def test_too_few_images_are_refused(metric, message):
    with pytest.raises(TooFewImagesError, match=message):
        metric()


@pytest.mark.parametrize(
    ("arrays", "got"),
    [
        ({"mu": np.zeros(3)}, "arrays mu"),
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, r"mu \(3,\), sigma \(2, 2\)"),
        ({"mu": [np.nan], "sigma": [[1.0]]}, "not finite"),
        ({"mu": np.zeros(2), "sigma": [[1.0, 0.5], [0.0, 1.0]]}, "not symmetric"),
        ({"mu": np.zeros(2), "sigma": -np.eye(2)}, "negative variances"),
    ],
)
def test_other_files_are_no_statistics(tmp_path, arrays, got):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=rf"no reference statistics(?s:.*)got: .*{got}"):
        FeatureStatistics.load(tmp_path / "x.npz")


def test_statistics_never_run_code(tmp_path):
    np.savez(tmp_path / "x.npz", mu=np.array([object()]), sigma=np.zeros((1, 1)))
    with pytest.raises(DataError, match="no reference statistics"):
        FeatureStatistics.load(tmp_path / "x.npz")
    (tmp_path / "y.npz").write_bytes(b"not an archive")
    with pytest.raises(DataError, match=r"no reference statistics(?s:.*)got: another kind of file"):
        FeatureStatistics.load(tmp_path / "y.npz")
