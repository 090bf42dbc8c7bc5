"""Fréchet distance against closed forms, singular values of the data, and scipy's matrix square root."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from bitlaw.metrics.fid import FeatureStatistics, covariance_factor, frechet_distance, frechet_interval
from bitlaw.metrics.samples import write_npz


def random_features(num_images: int, num_features: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(num_features, num_features, generator=generator, dtype=torch.float64)
    return torch.randn(num_images, num_features, generator=generator, dtype=torch.float64) @ mixing + seed


def gaussian(path: Path, mean: list[float], variance: list[float]) -> FeatureStatistics:
    np.savez(path, mu=np.array(mean), sigma=np.diag(variance))
    return FeatureStatistics.load(path)


def by_singular_values(a_ND: Tensor, b_MD: Tensor) -> float:
    """tr((S_a S_b)^(1/2)) is the sum of singular values of A B^T / sqrt((N - 1) (M - 1)), for centred A and B."""
    centered_a, centered_b = a_ND - a_ND.mean(0), b_MD - b_MD.mean(0)
    root = torch.linalg.svdvals(centered_a @ centered_b.T).sum() / ((len(a_ND) - 1) * (len(b_MD) - 1)) ** 0.5
    trace = centered_a.square().sum() / (len(a_ND) - 1) + centered_b.square().sum() / (len(b_MD) - 1)
    return float((a_ND.mean(0) - b_MD.mean(0)).square().sum() + trace - 2 * root)


def test_known_gaussians(tmp_path: Path) -> None:
    """Diagonal covariances commute: |mu|^2 + sum (sigma_a - sigma_b)^2."""
    a = gaussian(tmp_path / "a.npz", [0.0, 1.0], [4.0, 9.0])
    b = gaussian(tmp_path / "b.npz", [3.0, 5.0], [1.0, 16.0])
    assert frechet_distance(a, b) == pytest.approx(9 + 16 + 1 + 1, rel=1e-12)


@pytest.mark.parametrize(("num_a", "num_b"), [(90, 70), (90, 20), (12, 70), (12, 20), (20, 20), (2, 70)])
def test_any_rank(num_a: int, num_b: int) -> None:
    a_ND, b_MD = random_features(num_a, 40, seed=1), random_features(num_b, 40, seed=2)
    a, b = FeatureStatistics.of(a_ND), FeatureStatistics.of(b_MD)
    # null eigenvalues come out as about 1e-16 of the largest, and their roots as 1e-8
    assert frechet_distance(a, b, allow_singular=True) == pytest.approx(by_singular_values(a_ND, b_MD), rel=1e-7)
    assert frechet_distance(b, a, allow_singular=True) == pytest.approx(by_singular_values(a_ND, b_MD), rel=1e-7)


@pytest.mark.parametrize("num_images", [300, 60])
def test_equals_sqrtm(num_images: int) -> None:
    a_ND, b_MD = random_features(num_images, 120, seed=3), random_features(400, 120, seed=4)
    a, b = FeatureStatistics.of(a_ND), FeatureStatistics.of(b_MD)
    cov_a, cov_b = np.cov(a_ND.numpy(), rowvar=False), np.cov(b_MD.numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    difference = (a_ND.mean(0) - b_MD.mean(0)).numpy()
    expected = difference @ difference + np.trace(cov_a + cov_b) - 2 * np.trace(root).real
    assert frechet_distance(a, b, allow_singular=True) == pytest.approx(expected, rel=1e-6)


def test_distance_to_itself_is_zero() -> None:
    statistics = FeatureStatistics.of(random_features(200, 16, seed=5))
    assert abs(frechet_distance(statistics, statistics)) < 1e-10 * float(statistics.covariance_DD.trace())


def test_identical_images_have_no_covariance() -> None:
    """A model broken by its precision draws one image again and again: the distance is finite and says so."""
    constant, real = FeatureStatistics.of(torch.ones(50, 8)), FeatureStatistics.of(random_features(50, 8, seed=6))
    expected = (real.mean_D - 1).square().sum() + real.covariance_DD.trace()
    assert frechet_distance(constant, real) == pytest.approx(float(expected), rel=1e-12)
    assert frechet_distance(constant, constant) == 0


def test_dead_feature() -> None:
    a_ND, b_MD = random_features(80, 8, seed=7), random_features(90, 8, seed=8)
    a_ND[:, 3] = b_MD[:, 3] = 2.0
    a, b = FeatureStatistics.of(a_ND), FeatureStatistics.of(b_MD)
    assert frechet_distance(a, b) == pytest.approx(by_singular_values(a_ND, b_MD), rel=1e-7)


@pytest.mark.parametrize(("num_images", "rank"), [(60, 30), (12, 11)])
def test_covariance_factor(num_images: int, rank: int) -> None:
    statistics = FeatureStatistics.of(random_features(num_images, 30, seed=9))
    factor_DR = covariance_factor(statistics)
    assert factor_DR.shape == (30, rank)
    torch.testing.assert_close(factor_DR @ factor_DR.T, statistics.covariance_DD, rtol=1e-10, atol=1e-10)


def test_streaming_equals_one_pass_far_from_the_origin() -> None:
    """Sums of squares would lose the covariance here; the batches are as uneven as batches get."""
    features_ND = random_features(157, 6, seed=10) + 1e7
    streamed, first, second = FeatureStatistics(6), FeatureStatistics(6), FeatureStatistics(6)
    for batch in features_ND.split([1, 100, 0, 56]):
        streamed.update(batch)
    first.update(features_ND[:40])
    second.update(features_ND[40:])
    first.merge(second)
    for statistics in (streamed, first):
        assert statistics.count == 157
        np.testing.assert_allclose(statistics.mean_D, features_ND.mean(0), rtol=1e-14)
        np.testing.assert_allclose(statistics.covariance_DD, np.cov(features_ND.numpy(), rowvar=False), rtol=1e-8)


def test_merging_with_nothing_changes_nothing() -> None:
    statistics = FeatureStatistics.of(random_features(30, 4, seed=11))
    before = statistics.covariance_DD.clone()
    statistics.merge(FeatureStatistics(4))
    empty = FeatureStatistics(4)
    empty.merge(statistics)
    assert torch.equal(statistics.covariance_DD, before)
    torch.testing.assert_close(empty.covariance_DD, before)


def test_save_and_load(tmp_path: Path) -> None:
    statistics, other = (FeatureStatistics.of(random_features(50, 8, seed)) for seed in (12, 13))
    statistics.save(tmp_path / "reference.npz")
    loaded = FeatureStatistics.load(tmp_path / "reference.npz")
    assert loaded.count == 50
    assert torch.equal(loaded.mean_D, statistics.mean_D)
    assert frechet_distance(loaded, other) == pytest.approx(frechet_distance(statistics, other), rel=1e-12)
    loaded.update(random_features(5, 8, seed=14))
    assert loaded.count == 55


def test_several_statistics_in_one_file(tmp_path: Path) -> None:
    pooled, spatial = (FeatureStatistics.of(random_features(num, 3, seed=num)) for num in (10, 20))
    write_npz(tmp_path / "reference.npz", pooled.arrays() | spatial.arrays("_s"))
    loaded = FeatureStatistics.load(tmp_path / "reference.npz", suffix="_s")
    assert loaded.count == 20
    assert torch.equal(loaded.mean_D, spatial.mean_D)


def test_reference_batch_of_adm(tmp_path: Path) -> None:
    """`mu_s` and `sigma_s` are the spatial statistics; their count is not in the file."""
    path = tmp_path / "reference.npz"
    np.savez(path, arr_0=np.zeros((1, 2, 2, 3), np.uint8), mu=[0.0], sigma=[[1.0]], mu_s=[5.0, 6.0], sigma_s=np.eye(2))
    spatial = FeatureStatistics.load(path, suffix="_s")
    assert spatial.count is None
    assert spatial.mean_D.tolist() == [5, 6]
    assert FeatureStatistics.load(path).num_features == 1
    with pytest.raises(ValueError, match="unknown number of images"):
        spatial.update(torch.zeros(1, 2))


def test_unusable_statistics_name_the_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "no_sigma.npz", mu=[0.0])
    np.savez(tmp_path / "shape.npz", mu=[0.0, 1.0], sigma=[[1.0]])
    np.savez(tmp_path / "nan.npz", mu=[0.0], sigma=[[np.nan]])
    complaints = {"no_sigma": "no array sigma", "shape": r"\(D, D\)", "nan": "NaN", "absent": "no such"}
    for name, complaint in complaints.items():
        with pytest.raises(ValueError, match=rf"{name}\.npz: .*{complaint}"):
            FeatureStatistics.load(tmp_path / f"{name}.npz")


def test_too_few_images_says_how_many_are_needed() -> None:
    few, many = (FeatureStatistics.of(random_features(num, 8, seed=num)) for num in (8, 9))
    with pytest.raises(ValueError, match="8 images are too few for a covariance of 8 features: 9 are needed"):
        frechet_distance(many, few)
    with pytest.raises(ValueError, match="9 are needed"):
        frechet_interval(random_features(8, 8, seed=15), many)
    assert frechet_distance(many, few, allow_singular=True) > 0
    with pytest.raises(ValueError, match="covariance needs 2 images"):
        frechet_distance(FeatureStatistics.of(torch.zeros(1, 8)), many, allow_singular=True)


def test_wrong_features_are_refused() -> None:
    statistics = FeatureStatistics(4)
    with pytest.raises(ValueError, match=r"expected \(B, 4\), found \(2, 5\)"):
        statistics.update(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="NaN"):
        statistics.update(torch.full((2, 4), torch.nan))
    with pytest.raises(ValueError, match="4 and 5 wide"):
        frechet_distance(statistics, FeatureStatistics(5))
    with pytest.raises(ValueError, match="5 features cannot be merged into 4"):
        statistics.merge(FeatureStatistics(5))


def test_interval_is_the_bootstrap() -> None:
    """The fast form gives the distances of resamples drawn and measured one by one."""
    features_ND, reference = random_features(60, 5, seed=17), FeatureStatistics.of(random_features(500, 5, seed=18))
    interval = frechet_interval(features_ND, reference, num_resamples=40, seed=3, level=0.9)
    counts = np.random.default_rng(3).multinomial(60, np.full(60, 1 / 60), 40)
    samples = [features_ND.repeat_interleave(torch.from_numpy(count), dim=0) for count in counts]
    distances = np.array([frechet_distance(FeatureStatistics.of(sample), reference) for sample in samples])
    value = frechet_distance(FeatureStatistics.of(features_ND), reference)
    expected = value + np.quantile(distances - distances.mean(), [0.05, 0.95])
    np.testing.assert_allclose(interval, expected, rtol=1e-9)
    assert interval == frechet_interval(features_ND, reference, num_resamples=40, seed=3, level=0.9)


def test_interval_is_as_wide_as_new_draws_scatter() -> None:
    """What the interval promises, checked by drawing the images again 300 times."""
    generator = torch.Generator().manual_seed(19)
    reference = FeatureStatistics.of(torch.randn(20_000, 4, generator=generator))
    draws = [torch.randn(400, 4, generator=generator) * 1.2 + 0.1 for _ in range(300)]
    values = torch.tensor([frechet_distance(FeatureStatistics.of(draw), reference) for draw in draws])
    widths = torch.tensor([high - low for low, high in (frechet_interval(draw, reference) for draw in draws[:5])])
    drawn_width = float(values.quantile(0.975) - values.quantile(0.025))
    # the quantiles of 300 draws and of 200 resamples are each good to about 10 %
    assert float(widths.mean()) == pytest.approx(drawn_width, rel=0.25)


def test_interval_survives_identical_images() -> None:
    real = FeatureStatistics.of(random_features(50, 4, seed=20))
    low, high = frechet_interval(torch.ones(50, 4), real, num_resamples=5)
    assert low == pytest.approx(high) == pytest.approx(frechet_distance(FeatureStatistics.of(torch.ones(50, 4)), real))
    assert all(np.isfinite(frechet_interval(random_features(50, 4, seed=21), FeatureStatistics.of(torch.ones(50, 4)))))
