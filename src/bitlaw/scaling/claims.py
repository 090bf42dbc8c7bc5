"""What may be said from laws and measured cells: Pareto fronts, the best at a budget, one precision against another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitlaw.scaling.cells import Line, Measured
from bitlaw.scaling.family_law import FamilyLaw
from bitlaw.scaling.resampling import ResampledLaw, interval

CONFIDENCE = 0.95
GRID = 81  # budgets at which curves are compared


def pareto_front(cells: Sequence[Measured]) -> list[Measured]:
    """The cells that no other beats: none has a score as low for fewer bits, or a lower one for as many. By bits."""
    front: list[Measured] = []
    for cell in sorted(cells, key=lambda c: (c.bits, c.score)):
        if not front or cell.score < front[-1].score:
            front.append(cell)
    return front


@dataclass(frozen=True)
class LawChoice:
    """A line at a budget, as its law has it.

    low, high: 95 % interval of the law
    parameters: of a model that has this line's bits per parameter and fills the budget
    smaller, larger: the measured models of the line on either side of the budget, None where there is none
    share_best: share of resamples in which the line has the lowest score of those compared
    """

    line: Line
    budget: float
    score: float
    low: float
    high: float
    parameters: float
    smaller: str | None
    larger: str | None
    share_best: float

    @property
    def extrapolates(self) -> bool:
        """Whether the budget is outside what was measured on this line."""
        return self.smaller is None or self.larger is None

    @property
    def where(self) -> str:
        """Between which models the budget lies, or that it lies beyond them all."""
        if self.smaller is None:
            return f"extrapolated: below {self.larger}"
        if self.larger is None:
            return f"extrapolated: above {self.smaller}"
        return f"is {self.smaller}" if self.smaller == self.larger else f"between {self.smaller} and {self.larger}"

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {
            **line_json(self.line),
            "budget": self.budget,
            "score": self.score,
            "low": self.low,
            "high": self.high,
            "parameters": self.parameters,
            "smaller": self.smaller,
            "larger": self.larger,
            "extrapolates": self.extrapolates,
            "share_best": self.share_best,
        }


def line_json(line: Line) -> dict[str, str]:
    """A line as JSON."""
    return {"family": line.family, "method": line.method, "precision": line.precision, "label": line.label}


def cell_json(cell: Measured) -> dict[str, Any]:
    """A measured cell as JSON."""
    return {
        **line_json(cell.line),
        "model": cell.model,
        "parameters": cell.parameters,
        "bits": cell.bits,
        "score": cell.score,
        "low": cell.low,
        "high": cell.high,
        "num_seeds": cell.num_seeds,
    }


def choices_at(laws: Sequence[ResampledLaw], budget: float) -> list[LawChoice]:
    """Every line of the laws at a budget, the lowest score first; those whose law must extrapolate are compared too."""
    log_budget = np.log([budget])
    curves = [(law, i, *law.curve(i, log_budget)) for law in laws for i in range(len(law.law.table.lines))]
    if not curves:
        return []
    drawn_RL = np.concatenate([drawn for *_, drawn in curves], axis=1)
    share_L = np.bincount(drawn_RL.argmin(1), minlength=len(curves)) / len(drawn_RL)
    choices = []
    for (law, i, point_1, drawn), share in zip(curves, share_L, strict=True):
        table = law.law.table
        line = table.lines[i]
        cells = sorted((c for c in table.cells if c.line == line), key=lambda c: c.bits)
        slack = 1e-9 * budget
        below = [c for c in cells if c.bits <= budget + slack]
        above = [c for c in cells if c.bits >= budget - slack]
        low, high = interval(np.exp(np.minimum(drawn[:, 0], 700)))
        choices.append(
            LawChoice(
                line,
                budget,
                math.exp(min(float(point_1[0]), 700.0)),
                low,
                high,
                budget / math.exp(float(table.log_per_parameter_at(i, log_budget)[0])),
                below[-1].model if below else None,
                above[0].model if above else None,
                float(share),
            )
        )
    return sorted(choices, key=lambda c: c.score)


@dataclass(frozen=True)
class Best:
    """The best at a budget, three ways.

    measured: the cell of lowest score whose bits fit the budget; None if none fits
    law: the line of lowest score at exactly this budget among those measured on both sides of it; None if there is none
    extrapolated: a line with a lower score still, but only by extrapolating its law; None if there is none
    compared: every line at the budget, the lowest score first
    """

    axis: str
    budget: float
    measured: Measured | None
    law: LawChoice | None
    extrapolated: LawChoice | None
    compared: list[LawChoice]

    @property
    def extrapolates(self) -> bool:
        """Whether all that the laws have for this budget is extrapolation."""
        return self.law is None

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "axis": self.axis,
            "budget": self.budget,
            "measured": cell_json(self.measured) if self.measured else None,
            "law": self.law.to_json() if self.law else None,
            "extrapolated": self.extrapolated.to_json() if self.extrapolated else None,
            "compared": [choice.to_json() for choice in self.compared],
        }


def best_at(cells: Sequence[Measured], laws: Sequence[ResampledLaw], axis: str, budget: float) -> Best:
    """The best cell within a budget, and the best line at it."""
    fitting = [cell for cell in cells if cell.bits <= budget * (1 + 1e-9)]
    compared = choices_at(laws, budget)
    inside = next((choice for choice in compared if not choice.extrapolates), None)
    lowest = compared[0] if compared else None
    return Best(
        axis=axis,
        budget=budget,
        measured=min(fitting, key=lambda c: (c.score, c.bits)) if fitting else None,
        law=inside,
        extrapolated=lowest if lowest is not None and lowest.extrapolates else None,
        compared=compared,
    )


@dataclass(frozen=True)
class Claim:
    """At equal bits `better` has a lower score than `worse`, for budgets from low to high.

    confidence: the least share of resamples that agree, over that range; for this pair alone, not for all pairs at once
    measured: both lines were measured on both sides of every budget of the range; otherwise the range is the gap
        between the two, and one law or both extrapolate
    """

    better: Line
    worse: Line
    low: float
    high: float
    confidence: float
    measured: bool

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "better": line_json(self.better),
            "worse": line_json(self.worse),
            "low": self.low,
            "high": self.high,
            "confidence": self.confidence,
            "measured": self.measured,
        }


def pairwise_claims(law: FamilyLaw, confidence: float = CONFIDENCE) -> list[Claim]:
    """What resamples agree on about each pair of lines of a family, wherever at least `confidence` of them do.

    A pair is compared where both were measured; two that share no budgets, in the gap between them. Each claim is for
    one unbroken range: lines that cross give two. Pairs without a claim are those that the data do not tell apart.
    """
    table, claims = law.table, []
    spans = [_span(table.cells, line) for line in table.lines]
    for i, first in enumerate(table.lines):
        for j in range(i + 1, len(table.lines)):
            low, high = max(spans[i][0], spans[j][0]), min(spans[i][1], spans[j][1])
            grid_G = np.linspace(math.log(min(low, high)), math.log(max(low, high)), GRID)
            first_RG, second_RG = (law.resampled.curve(k, grid_G)[1] for k in (i, j))
            share_G = (first_RG < second_RG).mean(0)
            for better, worse, agree_G in ((first, table.lines[j], share_G), (table.lines[j], first, 1 - share_G)):
                for start, stop in _runs(agree_G >= confidence):
                    span = math.exp(grid_G[start]), math.exp(grid_G[stop - 1])
                    claims.append(Claim(better, worse, *span, float(agree_G[start:stop].min()), low <= high))
    return claims


@dataclass(frozen=True)
class Segment:
    """A range of budgets in which one line has the lowest score, in share_low to share_high of the resamples."""

    line: Line
    low: float
    high: float
    share_low: float
    share_high: float

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {
            **line_json(self.line),
            "low": self.low,
            "high": self.high,
            "share_low": self.share_low,
            "share_high": self.share_high,
        }


def best_by_budget(law: FamilyLaw) -> list[Segment]:
    """Which line of a family is best within each budget, without extrapolating.

    A budget is an upper limit: beyond its largest model a line stays where it is, below its smallest it has nothing.
    """
    table = law.table
    spans_L2 = np.log([_span(table.cells, line) for line in table.lines])
    grid_G = np.linspace(spans_L2[:, 0].min(), spans_L2[:, 1].max(), 4 * GRID)
    curves = [law.resampled.curve(i, np.minimum(grid_G, spans_L2[i, 1])) for i in range(len(table.lines))]
    point_LG, drawn_LRG = (np.stack(kind) for kind in zip(*curves, strict=True))
    too_small_LG = grid_G < spans_L2[:, :1] - 1e-9
    point_LG[too_small_LG] = np.inf
    drawn_LRG[np.broadcast_to(too_small_LG[:, None], drawn_LRG.shape)] = np.inf
    winner_G = point_LG.argmin(0)
    share_G = (drawn_LRG.argmin(0) == winner_G).mean(0)
    segments = []
    for i, line in enumerate(table.lines):
        for start, stop in _runs(winner_G == i):
            share = share_G[start:stop]
            low, high = math.exp(grid_G[start]), math.exp(grid_G[min(stop, len(grid_G) - 1)])  # up to the next one
            segments.append(Segment(line, low, high, float(share.min()), float(share.max())))
    return sorted(segments, key=lambda segment: segment.low)


def _span(cells: Sequence[Measured], line: Line) -> tuple[float, float]:
    bits = [cell.bits for cell in cells if cell.line == line]
    return min(bits), max(bits)


def _runs(holds_G: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Unbroken runs of True as (start, stop)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], holds_G, [False]]).astype(int)))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]
