"""`fit(points)`: all that a study says on one budget axis. `recommend(points, budget)`: what to use at a budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from bitlaw.names import lookup, unknown_name
from bitlaw.scaling.budget import parse_bits
from bitlaw.scaling.cells import Measured, measured_cells
from bitlaw.scaling.claims import (
    Best,
    Claim,
    Segment,
    best_at,
    best_by_budget,
    cell_json,
    line_json,
    pairwise_claims,
    pareto_front,
)
from bitlaw.scaling.family_law import FamilyLaw, fit_family
from bitlaw.scaling.laws import FORMS
from bitlaw.scaling.points import Point
from bitlaw.scaling.resampling import ResampledLaw

HEADLINE_METRICS = ("fd", "fid", "score")
HIGHER_IS_BETTER = ("is", "precision", "recall", "image_reward")


@dataclass(frozen=True)
class StudyFit:
    """The laws of a study's families over one budget axis, for one metric. `print` shows it; `to_json` holds it all.

    cells: what was measured, seeds averaged. laws: by family, without those that no law could be fitted to.
    messages: what a reader must know: lines that lack sizes, families without a law, floors at their bounds.
    """

    axis: str
    metric: str
    cells: list[Measured]
    laws: dict[str, FamilyLaw]
    messages: list[str]
    num_resamples: int

    @cached_property
    def pareto(self) -> dict[str, list[Measured]]:
        """The measured cells of each family that no other beats."""
        return {family: pareto_front(self._cells_of(family)) for family in self.families}

    @cached_property
    def claims(self) -> list[Claim]:
        """Pairs of lines of one family that the data tell apart, with the budgets for which they do."""
        return [claim for law in self.laws.values() for claim in pairwise_claims(law)]

    @cached_property
    def best_by_budget(self) -> dict[str, list[Segment]]:
        """For each family, which line is best in which range of budgets."""
        return {family: best_by_budget(law) for family, law in self.laws.items()}

    @property
    def families(self) -> list[str]:
        """Families in the order of the points."""
        return list(dict.fromkeys(cell.line.family for cell in self.cells))

    def best(self, family: str | None = None, **budget: float) -> Best:
        """The best at a budget: `fit(points).best(model_bits=300 * 8e6)`; of one family, or of all.

        The budget is named by its axis, which must be the one that was fitted; otherwise ValueError.
        """
        if list(budget) != [self.axis]:
            asked = ", ".join(budget) or "nothing"
            raise ValueError(f"these laws are over {self.axis}, not {asked}; fit(points, axis=...) gives others")
        return self.best_within(budget[self.axis], family)

    def best_within(self, bits: float, family: str | None = None) -> Best:
        """The best within a number of bits on the axis of this fit; of one family, or of all."""
        if not bits > 0:
            raise ValueError(f"{self.axis}: a budget must be more than 0, not {bits}")
        if family is not None and family not in self.families:
            raise unknown_name(family, self.families, "family")
        cells = self.cells if family is None else self._cells_of(family)
        laws = [law.resampled for name, law in self.laws.items() if family in (None, name)]
        return best_at(cells, laws, self.axis, bits)

    def curve(self, family: str, line_label: str, bits: Sequence[float]) -> list[tuple[float, float, float]]:
        """(score, low, high) of a line at budgets, for drawing: the law and its 95 % interval."""
        law = lookup(self.laws, family, "family with a law")
        labels = {line.label: i for i, line in enumerate(law.table.lines)}
        index = lookup(labels, line_label, f"line of {family}")
        point_G, drawn_RG = law.resampled.curve(index, np.log(np.asarray(bits, dtype=float)))
        low_G, high_G = np.exp(np.minimum(np.quantile(drawn_RG, [0.025, 0.975], axis=0), 700))
        return [(float(p), float(l), float(h)) for p, l, h in zip(np.exp(point_G), low_G, high_G, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {
            "axis": self.axis,
            "metric": self.metric,
            "num_resamples": self.num_resamples,
            "messages": self.messages,
            "cells": [cell_json(cell) for cell in self.cells],
            "laws": {family: _law_json(law) for family, law in self.laws.items()},
            "pareto": {family: [cell_json(cell) for cell in front] for family, front in self.pareto.items()},
            "best_by_budget": {f: [s.to_json() for s in segments] for f, segments in self.best_by_budget.items()},
            "claims": [claim.to_json() for claim in self.claims],
        }

    def __str__(self) -> str:
        from bitlaw.scaling.summary import describe_fit

        return describe_fit(self)

    def _cells_of(self, family: str) -> list[Measured]:
        return [cell for cell in self.cells if cell.line.family == family]


def fit(
    points: Sequence[Point],
    axis: str = "model_bits",
    metric: str | None = None,
    law: str | None = None,
    num_resamples: int = 500,
    seed: int = 0,
) -> StudyFit:
    """Fit the laws of `bitlaw.scaling.laws` to each family of a study.

    axis: the budget, a bits column of the points. metric: None takes "fd" or "fid", or the only one there is.
    law: a name in FORMS; None takes the law of least held-out error. A cell's seeds are averaged.
    Raises ValueError for no points, an unknown axis, metric or law, a metric of which more is better, and scores <= 0.
    """
    if not points:
        raise ValueError("no points to fit")
    if law is not None and law not in FORMS:
        raise unknown_name(law, FORMS, "law")
    if num_resamples < 40:
        raise ValueError(f"{num_resamples} resamples are too few for a 95 % interval; take 40 or more, 500 by default")
    metric = _metric(points, metric)
    cells = measured_cells([point for point in points if point.metric == metric], axis)
    laws: dict[str, FamilyLaw] = {}
    messages: list[str] = []
    for index, family in enumerate(dict.fromkeys(cell.line.family for cell in cells)):
        rng = np.random.default_rng([seed, index])
        mine = [cell for cell in cells if cell.line.family == family]
        fitted, notes = fit_family(family, mine, num_resamples, rng, law)
        messages += notes
        if fitted is not None:
            laws[family] = fitted
    return StudyFit(axis, metric, cells, laws, messages, num_resamples)


def recommend(
    points: Sequence[Point], budget: float | str, axis: str = "model_bits", family: str | None = None
) -> Best:
    """The best model and precision at a budget, in bits or as "300MB": measured, and from the laws with intervals."""
    bits = parse_bits(budget) if isinstance(budget, str) else budget
    return fit(points, axis).best_within(bits, family)


def _metric(points: Sequence[Point], metric: str | None) -> str:
    present = list(dict.fromkeys(point.metric for point in points))
    if metric is None:
        metric = present[0] if len(present) == 1 else next((m for m in HEADLINE_METRICS if m in present), None)
        if metric is None:
            raise ValueError(f"these points have several metrics, choose one: {', '.join(present)}")
    if metric not in present:
        raise unknown_name(metric, present, "metric")
    if metric in HIGHER_IS_BETTER:
        raise ValueError(f"metric '{metric}' rises as models get better; these laws are for scores that fall")
    return metric


def _law_json(law: FamilyLaw) -> dict[str, Any]:
    return {
        "law": law.chosen.law.form.name,
        "tried": [candidate.to_json() for candidate in law.tried],
        "parameters": _parameters_json(law.resampled),
        "plain": _parameters_json(law.plain) if law.plain is not None else None,
        "reference_bits": float(np.exp(law.chosen.law.basis.log_x0)),
        "reference_parameters": float(np.exp(law.chosen.law.basis.log_n0)),
        "reference_bits_per_parameter": float(np.exp(law.chosen.law.basis.log_b0)),
        "lines": [line_json(line) for line in law.table.lines],
        "largest_model": {
            "law": law.largest_form,
            "predictions": [
                {
                    **cell_json(prediction.cell),
                    "predicted": prediction.predicted,
                    "predicted_low": prediction.low,
                    "predicted_high": prediction.high,
                    "inside": prediction.inside,
                }
                for prediction in law.largest
            ],
        },
    }


def _parameters_json(law: ResampledLaw) -> dict[str, dict[str, float]]:
    return {name: {"value": v, "low": low, "high": high} for name, (v, low, high) in law.parameters().items()}
