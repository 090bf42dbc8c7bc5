"""What laws are fitted to: cells measured on one budget axis, by line (a method at a precision) and model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from bitlaw.scaling.points import Point

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

NORMAL_95 = 1.959964


@dataclass(frozen=True, order=True)
class Line:
    """One method at one precision in one family: the cells that differ only in model size."""

    family: str
    method: str
    precision: str

    @property
    def label(self) -> str:
        """Short name: "FP16", "GPTQ W4", "rtn W4A8"."""
        if self.method == "none":
            return "FP16" if self.precision == "W16A16" else self.precision
        return f"{self.method} {self.precision.removesuffix('A16')}"


@dataclass(frozen=True)
class Measured:
    """A cell of a study on one budget axis: seeds are averaged (in the log).

    low, high: the 95 % interval from evaluation noise, None where the source gives none
    log_sd: standard deviation of the log score from that noise, 0 where it is not known
    """

    line: Line
    model: str
    parameters: float
    bits: float
    score: float
    low: float | None
    high: float | None
    log_sd: float
    num_seeds: int


def measured_cells(points: Sequence[Point], axis: str) -> list[Measured]:
    """Cells from points of one metric: one for each model and line.

    Raises ValueError for a score or a budget that is not positive (a power law has none), and for points of one model
    and line that disagree on bits or repeat a seed.
    """
    groups: dict[tuple[Line, str], list[Point]] = {}
    for point in points:
        if not (math.isfinite(point.score) and point.score > 0):
            raise ValueError(f"{point.name}: score {point.score} must be more than 0 for a power law")
        groups.setdefault((Line(point.family, point.method, point.precision), point.model), []).append(point)
    cells = []
    for (line, model), group in groups.items():
        bits = {point.on_axis(axis) for point in group}
        if len(bits) > 1 or len({point.seed for point in group}) < len(group):
            what = f"different {axis}" if len(bits) > 1 else "the same seed twice"
            raise ValueError(
                f"{model} {line.label} ({line.family}): {len(group)} points with {what}; name models apart"
            )
        cells.append(_cell(line, model, bits.pop(), group))
    return cells


def _cell(line: Line, model: str, bits: float, group: Sequence[Point]) -> Measured:
    log_sd, known = _evaluation_noise(group)
    first = group[0]
    parameters = first.parameters
    if not parameters or parameters < 0:
        raise ValueError(f"{first.name}: has no number of parameters; laws need one")
    if len(group) == 1:
        return Measured(line, model, parameters, bits, first.score, first.score_low, first.score_high, log_sd, 1)
    score = math.exp(np.mean([math.log(point.score) for point in group]))
    spread = math.exp(NORMAL_95 * log_sd)
    low, high = (score / spread, score * spread) if known else (None, None)
    return Measured(line, model, parameters, bits, score, low, high, log_sd, len(group))


def _evaluation_noise(group: Sequence[Point]) -> tuple[float, bool]:
    """Standard deviation of the mean log score: the larger of what intervals and what the spread over seeds say."""
    variances = [
        ((math.log(p.score_high) - math.log(p.score_low)) / (2 * NORMAL_95)) ** 2
        for p in group
        if p.score_low is not None and p.score_high is not None and p.score_low > 0
    ]
    within = float(np.mean(variances)) if variances else 0.0
    between = float(np.var([math.log(p.score) for p in group], ddof=1)) if len(group) > 1 else 0.0
    return math.sqrt(max(within, between) / len(group)), bool(variances) or len(group) > 1


@dataclass(frozen=True)
class Table:
    """The cells of one family that a law is fitted to, as arrays."""

    cells: tuple[Measured, ...]

    @cached_property
    def lines(self) -> list[Line]:
        """Lines in the order of their first cell."""
        return list(dict.fromkeys(cell.line for cell in self.cells))

    @cached_property
    def models(self) -> list[str]:
        """Models by parameters."""
        return list(dict.fromkeys(c.model for c in sorted(self.cells, key=lambda c: c.parameters)))

    @cached_property
    def line_N(self) -> Indices:
        """Index of each cell's line."""
        return np.array([self.lines.index(c.line) for c in self.cells], dtype=np.int64)

    @cached_property
    def model_N(self) -> Indices:
        """Index of each cell's model."""
        return np.array([self.models.index(c.model) for c in self.cells], dtype=np.int64)

    @cached_property
    def log_bits_N(self) -> Array:
        """log x."""
        return np.log([c.bits for c in self.cells])

    @cached_property
    def log_per_parameter_N(self) -> Array:
        """log b, b = bits per parameter."""
        return self.log_bits_N - np.log([c.parameters for c in self.cells])

    @cached_property
    def log_score_N(self) -> Array:
        """log F."""
        return np.log([c.score for c in self.cells])

    @cached_property
    def log_sd_N(self) -> Array:
        """Evaluation noise of log F."""
        return np.array([c.log_sd for c in self.cells])

    def without(self, model: str) -> "Table":
        """The cells of the other models; lines left with fewer than two sizes go too."""
        return Table.of([c for c in self.cells if c.model != model])

    @classmethod
    def of(cls, cells: Sequence[Measured]) -> "Table":
        """The cells whose line has at least two sizes: a line needs two points."""
        sizes: dict[Line, set[float]] = {}
        for cell in cells:
            sizes.setdefault(cell.line, set()).add(cell.bits)
        return cls(tuple(cell for cell in cells if len(sizes[cell.line]) >= 2))

    def log_per_parameter_at(self, line: int, log_bits_G: Array) -> Array:
        """log b of a line at a budget: between its sizes by interpolation, beyond them that of the last.

        It varies within a line where scales or layers left in 16 bits weigh more in small models.
        """
        mine = np.flatnonzero(self.line_N == line)
        mine = mine[np.argsort(self.log_bits_N[mine])]
        return np.interp(log_bits_G, self.log_bits_N[mine], self.log_per_parameter_N[mine])
