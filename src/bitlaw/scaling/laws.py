"""The nested power laws of score over bits, fitted in log space, and the choice between them.

    N measured cells, L lines (a line = one method at one precision), P parameters of a law, R resamples, G budgets

With x the bits on the budget axis, n the parameters of the model, b = x / n the bits per parameter, F the score:

    per-precision     F = A_l * (x / x0)^-alpha_l                        a law for each line
    shared exponent   F = A_l * (x / x0)^-alpha                          parallel lines
    joint             F = C * (n / n0)^-alpha * (b / b0)^-beta_m         b0: full precision; beta for each method m

each also with "+ floor", an F_inf shared by the lines of a family. x0 and n0 are geometric means of what was measured,
so that A_l is a score within the data. On a compute axis b is weight bits times activation bits. In the joint law all
methods meet at full precision, where they are the same model; the sources write C * N^-alpha * b^-beta for one method.

The law is chosen by held-out error: each model (size) is left out in turn and its cells are predicted from the others.
The loss is Huber's in the log score: beyond 25 % a miss counts linearly, within it the fit is ordinary least squares.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from bitlaw.scaling.cells import Array, Indices, Line, Measured, Table

HUBER = 0.25  # log units
MAX_FLOOR = 0.99  # of the lowest score measured

# Forms. A design matrix gives log(F - F_inf) = design @ theta from the line, log x and log b of each row.


@dataclass(frozen=True)
class Basis:
    """What theta refers to: the lines, the quantization methods, x0, n0 and b0."""

    lines: tuple[Line, ...]
    methods: tuple[str, ...]
    log_x0: float
    log_n0: float
    log_b0: float

    @classmethod
    def of(cls, table: Table) -> "Basis":
        """The basis of a table: geometric means, and the most bits per parameter as b0."""
        log_b0 = float(table.log_per_parameter_N.max())
        varies = {
            c.line.method for c, b in zip(table.cells, table.log_per_parameter_N, strict=True) if b < log_b0 - 1e-9
        }
        return cls(
            tuple(table.lines),
            tuple(sorted(varies)),
            float(table.log_bits_N.mean()),
            float((table.log_bits_N - table.log_per_parameter_N).mean()),
            log_b0,
        )

    def indices(self, cells: Sequence[Measured]) -> Indices:
        """Index of each cell's line."""
        return np.array([self.lines.index(cell.line) for cell in cells], dtype=np.int64)


Design = Callable[[Basis, Indices, Array, Array], Array]


def _per_precision(basis: Basis, line_N: Indices, log_x_N: Array, log_b_N: Array) -> Array:
    one_NL = np.eye(len(basis.lines))[line_N]
    return np.concatenate([one_NL, -(log_x_N - basis.log_x0)[:, None] * one_NL], axis=1)


def _shared(basis: Basis, line_N: Indices, log_x_N: Array, log_b_N: Array) -> Array:
    one_NL = np.eye(len(basis.lines))[line_N]
    return np.concatenate([one_NL, -(log_x_N - basis.log_x0)[:, None]], axis=1)


def _joint(basis: Basis, line_N: Indices, log_x_N: Array, log_b_N: Array) -> Array:
    log_n_N = log_x_N - log_b_N - basis.log_n0
    method_L = np.array([basis.methods.index(l.method) if l.method in basis.methods else -1 for l in basis.lines])
    of_method_NM = method_L[line_N][:, None] == np.arange(len(basis.methods))
    columns = [np.ones((len(line_N), 1)), -log_n_N[:, None], -(log_b_N - basis.log_b0)[:, None] * of_method_NM]
    return np.concatenate(columns, axis=1)


def _names_per_precision(basis: Basis) -> list[str]:
    labels = [line.label for line in basis.lines]
    return [f"A[{label}]" for label in labels] + [f"alpha[{label}]" for label in labels]


def _names_shared(basis: Basis) -> list[str]:
    return [f"A[{line.label}]" for line in basis.lines] + ["alpha"]


def _names_joint(basis: Basis) -> list[str]:
    return ["C", "alpha"] + [f"beta[{method}]" for method in basis.methods]


@dataclass(frozen=True)
class Form:
    """A form of law: its design matrix, the names of its parameters, and whether it has a floor."""

    name: str
    design: Design
    names: Callable[[Basis], list[str]]
    floor: bool


FORMS = {
    form.name: form
    for form in (
        Form("per-precision", _per_precision, _names_per_precision, False),
        Form("per-precision + floor", _per_precision, _names_per_precision, True),
        Form("shared exponent", _shared, _names_shared, False),
        Form("shared exponent + floor", _shared, _names_shared, True),
        Form("joint", _joint, _names_joint, False),
        Form("joint + floor", _joint, _names_joint, True),
    )
}
PLAIN = "per-precision"


# Fitting


@dataclass(frozen=True)
class Law:
    """A fitted law of one family.

    theta_P: log A or log C, then the exponents; floor: F_inf, 0 without one
    """

    form: Form
    table: Table
    basis: Basis
    theta_P: Array
    floor: float

    @property
    def num_parameters(self) -> int:
        """Fitted numbers, the floor included."""
        return len(self.theta_P) + self.form.floor

    @cached_property
    def design_NP(self) -> Array:
        """The design matrix of the cells."""
        return self.form.design(self.basis, self.table.line_N, self.table.log_bits_N, self.table.log_per_parameter_N)

    @cached_property
    def fitted_N(self) -> Array:
        """log F that the law gives for the cells."""
        return log_score(self.design_NP @ self.theta_P, self.floor)

    @property
    def residual_N(self) -> Array:
        """Measured minus fitted log score."""
        return self.table.log_score_N - self.fitted_N

    @property
    def r_squared(self) -> float:
        """Share of the variance of log scores that the law explains. 0 if the scores are all the same."""
        deviation_N = self.table.log_score_N - self.table.log_score_N.mean()
        total = float(deviation_N @ deviation_N)
        return 1 - float(self.residual_N @ self.residual_N) / total if total > 0 else 0.0

    @cached_property
    def leverage_N(self) -> Array:
        """How much of each cell its own fitted value has taken: the diagonal of the hat matrix."""
        jacobian = _jacobian(self.design_NP, self.theta_P, self.floor)
        basis, sizes, _ = np.linalg.svd(jacobian if self.floor > 0 else self.design_NP, full_matrices=False)
        kept = basis[:, sizes > sizes[0] * 1e-10]
        return np.clip((kept**2).sum(1), 0, 1)

    def design_at(self, line: int, log_bits_G: Array) -> Array:
        """Rows of the design matrix for a line at budgets."""
        line_G = np.full(len(log_bits_G), line, dtype=np.int64)
        return self.form.design(self.basis, line_G, log_bits_G, self.table.log_per_parameter_at(line, log_bits_G))

    def note(self) -> str | None:
        """What a reader must know of a floor that ran into its bounds."""
        if not self.form.floor:
            return None
        lowest = math.exp(self.table.log_score_N.min())
        if self.floor < 1e-4 * lowest:
            return "F_inf is 0: the same as without a floor"
        if self.floor > 0.98 * lowest:
            return "F_inf is at its bound, the lowest score measured: these sizes do not tell the floor"
        return None


def fit_law(form: Form, table: Table) -> Law | None:
    """The law of a form, or None if the cells do not determine it (fewer cells than parameters, or rank)."""
    basis = Basis.of(table) if table.cells else None
    if basis is None:
        return None
    design = form.design(basis, table.line_N, table.log_bits_N, table.log_per_parameter_N)
    if design.shape[0] < design.shape[1] + form.floor or np.linalg.matrix_rank(design) < design.shape[1]:
        return None
    y_N = table.log_score_N
    if not form.floor:
        return Law(form, table, basis, huber_fit(design, y_N[None])[0], 0.0)
    lowest = math.exp(y_N.min())
    share_R = np.array([0.0, 0.3, 0.6, 0.9])
    start_RP = huber_fit(design, np.log(np.exp(y_N) - share_R[:, None] * lowest))
    cost_R, theta_RP, floor_R = fit_floors(design, np.tile(y_N, (len(share_R), 1)), start_RP, share_R, lowest)
    best = int(np.flatnonzero(cost_R <= cost_R.min() * (1 + 1e-9))[0])
    return Law(form, table, basis, theta_RP[best], float(floor_R[best]))


def huber_fit(design_NP: Array, y_RN: Array, num_iterations: int = 60) -> Array:
    """theta (R, P) of least Huber loss of y - design @ theta, by iteratively reweighted least squares.

    Where no residual exceeds HUBER this is ordinary least squares, and one step. All R problems are solved at once.
    """
    theta_RP = y_RN @ np.linalg.pinv(design_NP).T
    robust = np.flatnonzero((np.abs(y_RN - theta_RP @ design_NP.T) > HUBER).any(1))
    for _ in range(num_iterations if len(robust) else 0):
        residual_RN = np.abs(y_RN[robust] - theta_RP[robust] @ design_NP.T)
        weight_RN = HUBER / np.maximum(residual_RN, HUBER)
        gram_RPP = np.einsum("rn,np,nq->rpq", weight_RN, design_NP, design_NP, optimize=True)
        right_RP = (weight_RN * y_RN[robust]) @ design_NP
        new_RP = np.linalg.solve(gram_RPP, right_RP[..., None])[..., 0]
        moved = float(np.abs(new_RP - theta_RP[robust]).max())
        theta_RP[robust] = new_RP
        if moved < 1e-10:
            break
    return theta_RP


def fit_floors(
    design_NP: Array, y_RN: Array, theta_RP: Array, share_R: Array, lowest: float, num_iterations: int = 200
) -> tuple[Array, Array, Array]:
    """(cost (R,), theta (R, P), floor (R,)) of least Huber loss for R sets of scores from R starts, all at once.

    Levenberg-Marquardt on the iteratively reweighted problem, a few hundred times faster than one call of
    `scipy.optimize.least_squares` for each set, to which it is tested equal. The floor is sought as a share of `lowest`
    between 0 and MAX_FLOOR; one that is pushed out of its bounds stays there.
    """
    z_RQ = np.concatenate([theta_RP, np.clip(share_R, 1e-3, MAX_FLOOR - 1e-3)[:, None]], axis=1)
    damping_R = np.full(len(y_RN), 1e-3)
    active = np.arange(len(y_RN))
    residual_RN = _floor_residual(design_NP, z_RQ, y_RN, lowest)
    cost_R = _huber(residual_RN)
    for _ in range(num_iterations):
        z, residual = z_RQ[active], residual_RN[active]
        total = residual + y_RN[active]
        by_theta = np.exp(z[:, :-1] @ design_NP.T - total)[..., None] * design_NP
        jacobian = np.concatenate([by_theta, lowest * np.exp(-total)[..., None]], axis=2)
        weighted = jacobian * np.minimum(1, HUBER / np.maximum(np.abs(residual), 1e-12))[..., None]
        gram, gradient = weighted.transpose(0, 2, 1) @ jacobian, (weighted * residual[..., None]).sum(1)
        stuck = ((z[:, -1] <= 0) & (gradient[:, -1] > 0)) | ((z[:, -1] >= MAX_FLOOR) & (gradient[:, -1] < 0))
        gram[stuck, -1, :] = gram[stuck, :, -1] = 0
        gram[stuck, -1, -1], gradient[stuck, -1] = 1, 0
        diagonal = np.einsum("rqq->rq", gram)  # a view
        diagonal += damping_R[active, None] * diagonal + 1e-12
        moved = z - np.linalg.solve(gram, gradient[..., None])[..., 0]
        moved[:, -1] = np.clip(moved[:, -1], 0, MAX_FLOOR)
        moved_residual = _floor_residual(design_NP, moved, y_RN[active], lowest)
        moved_cost = _huber(moved_residual)
        better = moved_cost <= cost_R[active]
        gain = (cost_R[active] - moved_cost) / np.maximum(cost_R[active], 1e-30)
        won = active[better]
        z_RQ[won], residual_RN[won], cost_R[won] = moved[better], moved_residual[better], moved_cost[better]
        damping_R[active] = np.where(better, np.maximum(damping_R[active] / 5, 1e-9), damping_R[active] * 4)
        active = active[~((better & (gain < 1e-9)) | (damping_R[active] > 1e8))]
        if not len(active):
            break
    return cost_R, z_RQ[:, :-1], z_RQ[:, -1] * lowest


def _floor_residual(design_NP: Array, z_RQ: Array, y_RN: Array, lowest: float) -> Array:
    """(R, N) fitted minus given log scores; the last column of z is the floor as a share of `lowest`."""
    return log_score(z_RQ[:, :-1] @ design_NP.T, z_RQ[:, -1:] * lowest) - y_RN


def _huber(residual_RN: Array) -> Array:
    """(R,) sums of Huber's loss: squares within HUBER, linear beyond."""
    size = np.abs(residual_RN)
    return np.asarray(np.where(size <= HUBER, size**2, 2 * HUBER * size - HUBER**2).sum(1))


def log_score(log_power: Array, floor: float | Array) -> Array:
    """log(exp(log_power) + floor)."""
    floor = np.asarray(floor)
    return np.logaddexp(log_power, np.log(floor, where=floor > 0, out=np.full(floor.shape, -np.inf)))


def _jacobian(design_NP: Array, theta_P: Array, floor: float) -> Array:
    """Derivatives of the fitted log score by theta and by the floor, (N, P + 1)."""
    log_power = design_NP @ theta_P
    total = log_score(log_power, floor)
    return np.concatenate([np.exp(log_power - total)[:, None] * design_NP, np.exp(-total)[:, None]], axis=1)


# Selection


def held_out_errors(form: Form, table: Table) -> Array | None:
    """Log errors of cells predicted by the law fitted without their model, each model left out in turn.

    Cells whose line would be left with one size are not predicted. None if the law is not determined by some fold, or
    nothing can be left out.
    """
    errors: list[float] = []
    for model in table.models:
        rest = table.without(model)
        held = [c for c in table.cells if c.model == model and c.line in rest.lines]
        if not held:
            continue
        law = fit_law(form, rest)
        if law is None:
            return None
        errors += [math.log(c.score) - float(predict_at(law, c)) for c in held]
    return np.array(errors) if errors else None


def predict_at(law: Law, cell: Measured) -> float:
    """log F of a cell, measured or not, whose bits per parameter are known."""
    log_bits_1 = np.log([cell.bits])
    row = law.form.design(law.basis, law.basis.indices([cell]), log_bits_1, log_bits_1 - math.log(cell.parameters))
    return float(log_score(row @ law.theta_P, law.floor)[0])


@dataclass(frozen=True)
class Candidate:
    """A form of law that was tried: its fit and how it did on models left out."""

    law: Law
    held_out: float | None

    def to_json(self) -> dict[str, Any]:
        """Name, parameters, R^2, held-out error (root mean square of log errors)."""
        return {
            "law": self.law.form.name,
            "num_parameters": self.law.num_parameters,
            "r_squared": self.law.r_squared,
            "held_out_rms_log_error": self.held_out,
            "floor": self.law.floor,
            "note": self.law.note(),
        }


def candidates(table: Table) -> list[Candidate]:
    """Every form that the cells determine, from the fewest parameters to the most. One line has nothing to share."""
    found = []
    for form in FORMS.values():
        law = fit_law(form, table) if len(table.lines) > 1 or form.design is _per_precision else None
        if law is not None:
            errors = held_out_errors(form, table)
            found.append(Candidate(law, None if errors is None else float(np.sqrt(np.mean(errors**2)))))
    return sorted(found, key=lambda c: c.law.num_parameters)


def choose(tried: Sequence[Candidate]) -> Candidate | None:
    """The law of least held-out error, or a simpler one within 1 % of it; per-precision if none can be held out."""
    scored = [(c.held_out, c) for c in tried if c.held_out is not None]
    if scored:
        least = min(error for error, _ in scored)
        return next(c for error, c in scored if error <= 1.01 * least + 1e-6)
    return next((c for c in tried if c.law.form.name == PLAIN), tried[0] if tried else None)
