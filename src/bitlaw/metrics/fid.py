"""Fréchet distance between two sets of features (FID, sFID, FD), and its interval.

Legend: N images, B images of a batch, D features, R rank of a covariance, K resamples.
"""

from pathlib import Path

import numpy as np
import torch
from scipy.linalg import eigh, lapack
from torch import Tensor

from bitlaw.metrics.protocol import Interval
from bitlaw.metrics.samples import read_npz, write_npz


class FeatureStatistics:
    """Mean and covariance of feature vectors, accumulated in float64 batch by batch.

    The result depends on the order and size of batches only through float64 rounding.
    """

    def __init__(self, num_features: int):
        self._count: int | None = 0
        self._mean_D = torch.zeros(num_features, dtype=torch.float64)
        self._scatter_DD = torch.zeros(num_features, num_features, dtype=torch.float64)  # sum of (x - mean)(x - mean)^T

    @classmethod
    def of(cls, features_ND: Tensor) -> "FeatureStatistics":
        """The statistics of features that are all in memory."""
        statistics = cls(features_ND.shape[-1])
        statistics.update(features_ND)
        return statistics

    @property
    def num_features(self) -> int:
        """D."""
        return len(self._mean_D)

    @property
    def count(self) -> int | None:
        """Images seen; None for statistics read from a file that does not say."""
        return self._count

    @property
    def mean_D(self) -> Tensor:
        """float64 (D,). ValueError before the first image."""
        self._require(1, "a mean")
        return self._mean_D

    @property
    def covariance_DD(self) -> Tensor:
        """float64 (D, D), divided by N - 1. ValueError with fewer than two images."""
        self._require(2, "a covariance")
        return self._scatter_DD if self._count is None else self._scatter_DD / (self._count - 1)

    @property
    def rank_bound(self) -> int:
        """No covariance of `count` images has a larger rank than this: min(D, N - 1)."""
        return self.num_features if self._count is None else min(self.num_features, max(self._count - 1, 0))

    def update(self, features_BD: Tensor) -> None:
        """Add a batch. ValueError for the wrong width, NaN or infinity."""
        if features_BD.ndim != 2 or features_BD.shape[1] != self.num_features:
            raise ValueError(f"features: expected (B, {self.num_features}), found {tuple(features_BD.shape)}")
        x_BD = features_BD.detach().to("cpu", torch.float64)
        if not x_BD.isfinite().all():
            raise ValueError("features: NaN or infinity; the images or the network's weights are damaged")
        if len(x_BD):
            mean_D = x_BD.mean(0)
            centered_BD = x_BD - mean_D
            self._add(len(x_BD), mean_D, centered_BD.T @ centered_BD)

    def merge(self, other: "FeatureStatistics") -> None:
        """Add the images of `other`, e.g. of another process. ValueError if a count is unknown or widths differ."""
        if other._count is None:
            raise ValueError("statistics of an unknown number of images cannot be merged")
        if other.num_features != self.num_features:
            raise ValueError(f"statistics of {other.num_features} features cannot be merged into {self.num_features}")
        if other._count:
            self._add(other._count, other._mean_D, other._scatter_DD)

    def arrays(self, suffix: str = "") -> dict[str, np.ndarray]:
        """The field's `mu` and `sigma` (float64), and `count`, each with `suffix`; a `.npz` may hold several."""
        arrays: dict[str, np.ndarray] = {}
        arrays[f"mu{suffix}"], arrays[f"sigma{suffix}"] = self.mean_D.numpy(), self.covariance_DD.numpy()
        if self._count is not None:
            arrays[f"count{suffix}"] = np.array(self._count)
        return arrays

    def save(self, path: Path | str) -> None:
        """Write `arrays()` as `.npz`, atomically."""
        write_npz(path, self.arrays())

    @classmethod
    def load(cls, path: Path | str, suffix: str = "") -> "FeatureStatistics":
        """Read `mu` and `sigma` of a `.npz`: ours, pytorch-fid's, or ADM's reference batches.

        `suffix` picks one of several in a file; ADM's have `_s` for sFID. ValueError names the file and
        the array that is missing or damaged.
        """
        mean_key, covariance_key, count_key = f"mu{suffix}", f"sigma{suffix}", f"count{suffix}"
        arrays = read_npz(path, required=(mean_key, covariance_key), optional=(count_key,))
        mean, covariance = (torch.from_numpy(arrays[key].astype(np.float64)) for key in (mean_key, covariance_key))
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"{path}: expected {mean_key} (D,) and {covariance_key} (D, D), "
                f"found {tuple(mean.shape)} and {tuple(covariance.shape)}"
            )
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError(f"{path}: {mean_key} or {covariance_key} holds NaN or infinity")
        statistics = cls(len(mean))
        statistics._mean_D = mean
        statistics._count = int(arrays[count_key]) if count_key in arrays else None
        statistics._scatter_DD = covariance if statistics._count is None else covariance * (statistics._count - 1)
        return statistics

    def _add(self, count: int, mean_D: Tensor, scatter_DD: Tensor) -> None:
        """Chan et al. 1979: the scatter of a union is the sum of scatters and a rank-one term between the means."""
        if self._count is None:
            raise ValueError("statistics of an unknown number of images cannot be added to")
        total = self._count + count
        shift_D = mean_D - self._mean_D
        self._scatter_DD = self._scatter_DD + scatter_DD + torch.outer(shift_D, shift_D) * (self._count * count / total)
        self._mean_D = self._mean_D + shift_D * (count / total)
        self._count = total

    def _require(self, count: int, what: str) -> None:
        if self._count is not None and self._count < count:
            raise ValueError(f"{what} needs {count} images or more; these statistics have {self._count}")


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics, *, allow_singular: bool = False) -> float:
    """|mu_a - mu_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2)) (Heusel et al. 2017 eq. 6; Dowson and Landau 1982).

    With S_a = L L^T, S_a S_b has the eigenvalues of the symmetric L^T S_b L, so that no square root of a
    nonsymmetric matrix is needed. The covariance of lower rank R is factored, and the problem is then R x R.

    ValueError if a covariance has fewer images than D + 1: its distance depends on N more than on the images.
    `allow_singular=True` computes it all the same.
    """
    if a.num_features != b.num_features:
        raise ValueError(f"statistics of different features: {a.num_features} and {b.num_features} wide")
    if not allow_singular:
        check_count(a)
        check_count(b)
    factored, other = (a, b) if a.rank_bound <= b.rank_bound else (b, a)
    trace = a.covariance_DD.trace() + b.covariance_DD.trace()
    fidelity = _roots_of_product(factored, other).sum()
    return float((a.mean_D - b.mean_D).square().sum() + trace - 2 * fidelity)


def frechet_interval(
    features_ND: Tensor,
    reference: FeatureStatistics,
    *,
    num_resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
    allow_singular: bool = False,
) -> Interval:
    """Where the Fréchet distance at this N would fall if the N images were drawn again: a bootstrap over images.

    Resampling repeats the bias of a finite N (about proportional to 1 / N), so the resampled distances lie above the
    measured one; their quantiles are moved back by the difference of means. The interval is thus of the distance *at
    N*, and says nothing about the bias at N or the noise of the reference. Deterministic in `seed`.
    """
    statistics = FeatureStatistics.of(features_ND)
    value = frechet_distance(statistics, reference, allow_singular=allow_singular)
    x_ND = features_ND.detach().to("cpu", torch.float64) - statistics.mean_D
    shift_D = reference.mean_D - statistics.mean_D
    factor_DR = covariance_factor(reference)
    projected_NR = x_ND @ factor_DR  # L^T S L is the covariance of the projected features
    unbiased = len(x_ND) / (len(x_ND) - 1)

    distances = []
    for weights_N in resampling_weights(len(x_ND), num_resamples, seed):
        mean_D, mean_R = weights_N @ x_ND, weights_N @ projected_NR
        second_RR = (weights_N[:, None] * projected_NR).T @ projected_NR
        fidelity = _roots_of_eigenvalues(unbiased * (second_RR - torch.outer(mean_R, mean_R))).sum()
        trace = unbiased * (weights_N @ x_ND.square().sum(1) - mean_D @ mean_D)
        distances.append((mean_D - shift_D).square().sum() + trace - 2 * fidelity)
    return Interval.around(value, torch.stack(distances) + reference.covariance_DD.trace(), level)


def check_count(statistics: FeatureStatistics) -> None:
    """ValueError with the number needed, if there are too few images for a covariance of full rank."""
    needed = statistics.num_features + 1
    if statistics.count is not None and statistics.count < needed:
        raise ValueError(
            f"{statistics.count} images are too few for a covariance of {statistics.num_features} features: "
            f"{needed} are needed (many more for a stable distance), or allow_singular=True"
        )


def covariance_factor(statistics: FeatureStatistics) -> Tensor:
    """L (D, R) with L L^T = covariance, R its numerical rank: Cholesky with pivoting (Higham 1990)."""
    packed_DD, pivots_D, rank, _ = lapack.dpstrf(statistics.covariance_DD.numpy(), lower=1)
    rank = min(rank, statistics.rank_bound)
    factor_DR = np.empty((statistics.num_features, rank))
    factor_DR[pivots_D - 1] = np.tril(packed_DD)[:, :rank]
    return torch.from_numpy(factor_DR)


def resampling_weights(num_images: int, num_resamples: int, seed: int) -> Tensor:
    """How often each image is in each bootstrap resample, divided by N: float64 (K, N), rows sum to 1."""
    counts = np.random.default_rng(seed).multinomial(num_images, np.full(num_images, 1 / num_images), num_resamples)
    return torch.from_numpy(counts / num_images)


def _roots_of_product(factored: FeatureStatistics, other: FeatureStatistics) -> Tensor:
    """The square roots of the eigenvalues of S_factored S_other."""
    if factored.rank_bound == factored.num_features:
        try:  # LAPACK's own form of the product, half the work of L^T S L; transposed, it is in Fortran's order
            covariances = other.covariance_DD.numpy().T, factored.covariance_DD.numpy().T
            eigenvalues_D = eigh(  # type: ignore[call-overload]  # the stubs forget driver="gv", the fastest here
                *covariances, type=2, driver="gv", eigvals_only=True, check_finite=False
            )
            return torch.from_numpy(eigenvalues_D).clamp_min(0).sqrt()
        except np.linalg.LinAlgError:
            pass  # a dead or repeated feature: singular although the images are enough
    factor_DR = covariance_factor(factored)
    return _roots_of_eigenvalues(factor_DR.T @ other.covariance_DD @ factor_DR)


def _roots_of_eigenvalues(matrix_RR: Tensor) -> Tensor:
    """The square roots of a symmetric matrix's eigenvalues; negative ones are rounding and count as 0."""
    return torch.linalg.eigvalsh(matrix_RR).clamp_min(0).sqrt()
