"""The law of one family: forms tried, the one chosen, its resamples, and the largest model as a test of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from bitlaw.scaling.cells import Line, Measured, Table
from bitlaw.scaling.laws import FORMS, PLAIN, Candidate, candidates, choose, fit_law, predict_at
from bitlaw.scaling.resampling import ResampledLaw, draw_noise, interval, resample


@dataclass(frozen=True)
class LargestPrediction:
    """A cell of the largest model, predicted from the smaller ones: the interval is for a new measurement."""

    cell: Measured
    predicted: float
    low: float
    high: float

    @property
    def inside(self) -> bool:
        """Whether the measured score lies in the interval."""
        return self.low <= self.cell.score <= self.high


@dataclass(frozen=True)
class FamilyLaw:
    """The laws tried on one family, the one chosen and its resamples.

    plain: the per-precision law without a floor, for comparison; None if the cells do not determine it
    largest: how the largest model's cells are predicted from the smaller models; largest_form: by which law
    """

    family: str
    tried: list[Candidate]
    chosen: Candidate
    resampled: ResampledLaw
    plain: ResampledLaw | None
    largest: list[LargestPrediction]
    largest_form: str | None
    messages: list[str] = field(default_factory=list)

    @property
    def table(self) -> Table:
        """The cells the law is fitted to."""
        return self.chosen.law.table


def fit_family(
    family: str, cells: Sequence[Measured], num_resamples: int, rng: np.random.Generator, form: str | None = None
) -> tuple[FamilyLaw | None, list[str]]:
    """The law of one family's cells and what a reader must know; no law (None) if no line has two sizes.

    form: a name in FORMS to use that law instead of the one with the least held-out error.
    """
    table = Table.of(cells)
    messages = _missing(family, cells, table)
    tried = candidates(table)
    picked = choose(tried)
    if picked is None:
        return None, [*messages, f"{family}: no law, no line has two sizes"]
    if form is not None:
        named = next((c for c in tried if c.law.form.name == form), None)
        if named is None:
            raise ValueError(f"{family}: the law '{form}' has more parameters than these cells determine")
        picked = named
    elif picked.held_out is None:
        messages.append(
            f"{family}: too few sizes to hold one out; the law '{picked.law.form.name}' is a choice, not a finding"
        )
    resampled = resample(picked.law, num_resamples, rng)
    if resampled.scatter is None:
        messages.append(
            f"{family}: the law goes through every cell, nothing tells its scatter: intervals hold evaluation noise"
            + ("" if table.log_sd_N.any() else "; none is given, so they are empty")
        )
    if note := picked.law.note():
        messages.append(f"{family}: {note}")
    plain_law = next((c.law for c in tried if c.law.form.name == PLAIN), None)
    plain = resampled if plain_law is picked.law else None
    if plain is None and plain_law is not None:
        plain = resample(plain_law, num_resamples, rng)
    largest, largest_form = _predict_largest(table, num_resamples, rng, form)
    if not largest:
        messages.append(f"{family}: too few sizes to predict the largest model from the smaller ones")
    law = FamilyLaw(family, tried, picked, resampled, plain, largest, largest_form, messages)
    return law, messages


def _missing(family: str, cells: Sequence[Measured], table: Table) -> list[str]:
    """Lines without a law, and lines that lack sizes which others have."""
    models: dict[Line, list[str]] = {}
    for cell in cells:
        models.setdefault(cell.line, []).append(cell.model)
    all_models = list(dict.fromkeys(cell.model for cell in cells))
    messages = []
    for line, present in models.items():
        absent = [model for model in all_models if model not in present]
        if line not in table.lines:
            messages.append(f"{family} {line.label}: one size only, so no law; its cell still counts as measured")
        elif absent:
            messages.append(f"{family} {line.label}: not measured for {', '.join(absent)}")
    return messages


def _predict_largest(
    table: Table, num_resamples: int, rng: np.random.Generator, form: str | None
) -> tuple[list[LargestPrediction], str | None]:
    """Predict the cells of the largest model; the form of law is chosen without it, too."""
    model = table.models[-1]
    rest = table.without(model)
    held = [c for c in table.cells if c.model == model and c.line in rest.lines]
    law = fit_law(FORMS[form], rest) if form else None
    if law is None and (picked := choose(candidates(rest))) is not None:
        law = picked.law
    if law is None or not held or len(rest.models) < 2:
        return [], None
    resampled = resample(law, num_resamples, rng)
    if resampled.scatter is None:
        return [], None
    line_N = law.basis.indices(held)
    log_sd_N = np.array([c.log_sd for c in held])
    noise_RN = draw_noise(resampled.scatter, line_N, np.zeros(len(held), dtype=np.int64), log_sd_N, num_resamples, rng)
    drawn_RN = resampled.curve_at_cells(held) + noise_RN
    predictions = []
    for i, cell in enumerate(held):
        low, high = interval(drawn_RN[:, i])
        predictions.append(LargestPrediction(cell, _exp(predict_at(law, cell)), _exp(low), _exp(high)))
    return predictions, law.form.name


def _exp(log_value: float) -> float:
    return math.exp(min(log_value, 700.0))
