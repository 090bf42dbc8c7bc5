"""How sure a law is: refits to resampled scores.

With the usual four sizes a line has two or three degrees of freedom. Resampling its points with replacement would
mostly draw degenerate lines, and intervals far too narrow. Instead the law is refitted to scores drawn around it with

 (a) the evaluation noise of each cell, from its intervals and its seeds, and
 (b) the scatter of cells about their line, with a spread that is itself drawn (chi square), so that few points give
     the wide Student-t intervals they deserve. The spread of a line is averaged with that common to all lines, which
     counts for 3 degrees of freedom (as Smyth 2004 does for genes, "Linear models and empirical Bayes methods"); no
     more, since a line of few bits may well scatter more. What the lines of one model have in common stays in common.

Intervals are 95 %, for the law chosen: that another law might be the true one is not in them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import digamma

from bitlaw.scaling.cells import Array, Indices, Measured
from bitlaw.scaling.laws import Law, fit_floors, huber_fit, log_score

LEVEL = 0.95
COMMON_DOF = 3.0  # what the spread common to all lines counts for in the spread of one


@dataclass(frozen=True)
class Scatter:
    """Spread of cells about the law, evaluation noise included.

    variance_L: of each line, in the log score; dof_L: its degrees of freedom; correlation: between lines of one model
    """

    variance_L: Array
    dof_L: Array
    correlation: float

    @classmethod
    def of(cls, law: Law) -> "Scatter | None":
        """Moderated spreads of the lines; None if the law goes through every cell, so that nothing tells the spread."""
        residual_N, line_N = law.residual_N, law.table.line_N
        count = len(law.table.lines)
        dof_L = _sum_by(line_N, 1 - law.leverage_N, count)
        if dof_L.sum() < 0.5:
            return None
        squares_L = _sum_by(line_N, residual_N**2, count)
        common, correlation = _common_variance(squares_L, dof_L), _correlation(law, squares_L, dof_L)
        # What the other lines add is less where they move together.
        others = (dof_L.sum() - dof_L) / (1 + (count - 1) * correlation)
        common_dof_L = np.minimum(COMMON_DOF, others)
        total_L = dof_L + common_dof_L
        return cls((squares_L + common_dof_L * common) / total_L, total_L, correlation)


def _common_variance(squares_L: Array, dof_L: Array) -> float:
    """The variance that lines have in common: the mean of their log variances, each without its bias (chi square)."""
    pooled = max(float(squares_L.sum() / dof_L.sum()), 1e-20)
    used = dof_L > 0.5
    if not used.any():
        return pooled
    half_L = dof_L[used] / 2
    log_variance_L = np.log(np.maximum(squares_L[used] / dof_L[used], 0.01 * pooled))
    return math.exp(float(np.mean(log_variance_L - digamma(half_L) + np.log(half_L))))


def _correlation(law: Law, squares_L: Array, dof_L: Array) -> float:
    """Mean correlation of the residuals of two lines at one model, between 0 and 0.95."""
    table = law.table
    variance_L = squares_L / np.maximum(dof_L, 1e-9)
    unit_N = law.residual_N / np.sqrt(np.maximum(variance_L, 1e-30))[table.line_N]
    sums = _sum_by(table.model_N, unit_N, len(table.models))
    squares = _sum_by(table.model_N, unit_N**2, len(table.models))
    counts = np.bincount(table.model_N, minlength=len(table.models))
    pairs = float((counts * (counts - 1)).sum())
    if pairs == 0 or squares.sum() == 0:
        return 0.0
    covariance, variance = float((sums**2 - squares).sum()) / pairs, float(squares.sum() / counts.sum())
    return float(np.clip(covariance / variance, 0, 0.95))


def draw_noise(
    scatter: Scatter | None, line_N: Indices, model_N: Indices, log_sd_N: Array, count: int, rng: np.random.Generator
) -> Array:
    """(R, N) deviations of log scores from the law: scatter about the line and evaluation noise, as the module says."""
    noise_RN = log_sd_N * rng.standard_normal((count, len(line_N)))
    if scatter is None:
        return noise_RN
    lines = len(scatter.variance_L)
    evaluation_L = _sum_by(line_N, log_sd_N**2, lines) / np.maximum(np.bincount(line_N, minlength=lines), 1)
    drawn_RL = scatter.variance_L * scatter.dof_L / rng.chisquare(scatter.dof_L, (count, lines))
    sd_RN = np.sqrt(np.maximum(drawn_RL - evaluation_L, 0))[:, line_N]
    common_RN = rng.standard_normal((count, int(model_N.max()) + 1))[:, model_N]
    own_RN = rng.standard_normal((count, len(line_N)))
    rho = scatter.correlation
    return noise_RN + sd_RN * (math.sqrt(rho) * common_RN + math.sqrt(1 - rho) * own_RN)


@dataclass(frozen=True)
class ResampledLaw:
    """A law and R refits of it to resampled scores."""

    law: Law
    scatter: Scatter | None
    theta_RP: Array
    floor_R: Array

    def curve(self, line: int, log_bits_G: Array) -> tuple[Array, Array]:
        """log F of a line at budgets: the law's (G,), and the resamples' (R, G)."""
        design_GP = self.law.design_at(line, log_bits_G)
        point_G = log_score(design_GP @ self.law.theta_P, self.law.floor)
        return point_G, log_score(self.theta_RP @ design_GP.T, self.floor_R[:, None])

    def curve_at_cells(self, cells: Sequence[Measured]) -> Array:
        """(R, N) log F at cells, with their own bits per parameter."""
        line_N = self.law.basis.indices(cells)
        log_x_N = np.log([c.bits for c in cells])
        design = self.law.form.design(self.law.basis, line_N, log_x_N, log_x_N - np.log([c.parameters for c in cells]))
        return log_score(self.theta_RP @ design.T, self.floor_R[:, None])

    def parameters(self) -> dict[str, tuple[float, float, float]]:
        """Each parameter's value and 95 % interval: A and C as scores, exponents as they are, F_inf if it has one."""
        names = self.law.form.names(self.law.basis)
        result = {}
        for i, name in enumerate(names):
            low, high = interval(self.theta_RP[:, i])
            values = (float(self.law.theta_P[i]), low, high)
            result[name] = tuple(math.exp(min(v, 700.0)) for v in values) if name[0] in "AC" else values
        if self.law.form.floor:
            result["F_inf"] = (self.law.floor, *interval(self.floor_R))
        return {name: (v[0], v[1], v[2]) for name, v in result.items()}


def resample(law: Law, count: int, rng: np.random.Generator) -> ResampledLaw:
    """Refit a law to `count` sets of resampled scores (see the module)."""
    table = law.table
    scatter = Scatter.of(law)
    noise_RN = draw_noise(scatter, table.line_N, table.model_N, table.log_sd_N, count, rng)
    y_RN = law.fitted_N + noise_RN
    if not law.form.floor:
        return ResampledLaw(law, scatter, huber_fit(law.design_NP, y_RN), np.zeros(count))
    lowest = math.exp(table.log_score_N.min())
    start_RP, share_R = np.tile(law.theta_P, (count, 1)), np.full(count, law.floor / lowest)
    _, theta_RP, floor_R = fit_floors(law.design_NP, y_RN, start_RP, share_R, lowest)
    return ResampledLaw(law, scatter, theta_RP, floor_R)


def interval(values: Array) -> tuple[float, float]:
    """The 95 % interval of resampled values."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _sum_by(index_N: Indices, value_N: Array, count: int) -> Array:
    """Sums of the values of each index 0 .. count - 1."""
    return np.bincount(index_N, value_N, minlength=count).astype(np.float64)
