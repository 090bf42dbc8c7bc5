"""Points: one score of one model at one precision, with its budgets. What laws are fitted to."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bitlaw.files import write_text
from bitlaw.names import unknown_name
from bitlaw.scaling.published import PREFIX, published_text
from bitlaw.scaling.records import Record, StudyDirectory

NEEDED = ("model", "family", "precision", "method", "score")
OPTIONAL = ("parameters", "metric", "score_low", "score_high", "seed")


@dataclass(frozen=True)
class Point:
    """One measured score.

    parameters: of the model, None where a source does not say
    method: "none" for the full-precision model
    score, score_low, score_high: the value of `metric` and its 95 % interval from evaluation noise, None if not known
    bits: axis name -> bits, e.g. model_bits, model_code_bits, compute_bits, compute_bits_used
    """

    model: str
    family: str
    precision: str
    method: str
    score: float
    parameters: float | None = None
    metric: str = "score"
    score_low: float | None = None
    score_high: float | None = None
    seed: int = 0
    bits: dict[str, float] = field(default_factory=dict, hash=False)

    def on_axis(self, axis: str) -> float:
        """Bits on a budget axis. ValueError, with the axes there are, if there is no such column or it is not > 0."""
        if axis not in self.bits:
            if not self.bits:
                raise ValueError(f"{self.name}: has no bits column; laws need one, such as model_bits")
            raise unknown_name(axis, self.bits, "budget axis")
        if not (math.isfinite(self.bits[axis]) and self.bits[axis] > 0):
            raise ValueError(f"{self.name}: {axis} is {self.bits[axis]}, must be more than 0")
        return self.bits[axis]

    @property
    def name(self) -> str:
        """Words that identify the point in an error."""
        return f"{self.model} {self.precision} {self.method} ({self.metric}, seed {self.seed})"


def read_points(source: Path | str) -> list[Point]:
    """The points of a CSV file, of a study directory (every metric of every finished cell), or of "published:NAME".

    A failed cell of a study has no score and gives no point; `fit` says which lines lack sizes.

    CSV columns: model, family, precision, method, score; optionally parameters, metric, score_low, score_high, seed;
    and every budget axis, a column whose name contains "bits". Lines that begin with # are comments. ValueError for a
    missing or unknown column, and for a value that is no number, with its line.
    """
    if str(source).startswith(PREFIX):
        return _parse_csv(published_text(str(source)), str(source))
    path = Path(source)
    if path.is_dir():
        points = points_of_records(StudyDirectory(path).records())
        if not points:
            raise ValueError(f"{path}: no cell of this study is finished; run it first")
        return points
    if not path.exists():
        raise ValueError(f"{path}: no such file or directory; published tables are written {PREFIX}NAME")
    return _parse_csv(path.read_text(encoding="utf-8"), str(path))


def points_of_records(records: Iterable[Record]) -> list[Point]:
    """Points of finished study cells, one for each metric."""
    return [
        Point(
            model=record.cell.model,
            family=record.family,
            precision=record.cell.precision,
            method=record.cell.method,
            score=score["value"],
            parameters=record.parameters,
            metric=metric,
            score_low=score.get("low"),
            score_high=score.get("high"),
            seed=record.cell.seed,
            bits=dict(record.bits),
        )
        for record in records
        if record.error is None
        for metric, score in record.metrics.items()
    ]


def write_points(path: Path | str, points: Sequence[Point]) -> None:
    """Write points as CSV, atomically; `read_points` gives the same points back."""
    axes = list(dict.fromkeys(axis for point in points for axis in point.bits))
    columns = [*NEEDED, *OPTIONAL]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns + axes)
    for point in points:
        values = [getattr(point, column) for column in columns] + [point.bits.get(axis) for axis in axes]
        writer.writerow(["" if value is None else value for value in values])
    write_text(path, buffer.getvalue())


def _parse_csv(text: str, source: str) -> list[Point]:
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip() and line[0] != "#"]
    rows = list(csv.reader(line for _, line in lines))
    if not rows:
        raise ValueError(f"{source}: empty; expected a header with the columns {', '.join(NEEDED)}")
    header = rows[0]
    if missing := [column for column in NEEDED if column not in header]:
        raise ValueError(f"{source}: no column {', '.join(missing)}; found {', '.join(header)}")
    if repeated := {column for column in header if header.count(column) > 1}:
        raise ValueError(f"{source}: column {', '.join(sorted(repeated))} is there more than once")
    for column in header:
        if column not in NEEDED + OPTIONAL and "bits" not in column:
            raise ValueError(
                f"{source}: {unknown_name(column, NEEDED + OPTIONAL, 'column')}; axes have 'bits' in the name"
            )
    return [
        _parse_row(dict(zip(header, row, strict=False)), len(row) == len(header), f"{source}, line {number}")
        for (number, _), row in zip(lines[1:], rows[1:], strict=True)
    ]


def _parse_row(row: dict[str, str], complete: bool, where: str) -> Point:
    if not complete:
        raise ValueError(f"{where}: as many values as columns are needed")

    def number(column: str) -> float | None:
        text = row.get(column, "").strip()
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"{where}: {column} '{text}' is no number") from None
        if not math.isfinite(value):
            raise ValueError(f"{where}: {column} is {text}")
        return value

    score, low, high = number("score"), number("score_low"), number("score_high")
    if score is None:
        raise ValueError(f"{where}: the score is missing")
    if (low is None) != (high is None) or (low is not None and high is not None and low > high):
        raise ValueError(f"{where}: score_low and score_high must both be given, low first")
    bits = {column: number(column) for column in row if "bits" in column}
    return Point(
        model=row["model"].strip(),
        family=row["family"].strip(),
        precision=row["precision"].strip(),
        method=row["method"].strip() or "none",
        score=score,
        parameters=number("parameters"),
        metric=row.get("metric", "").strip() or "score",
        score_low=low,
        score_high=high,
        seed=int(number("seed") or 0),
        bits={axis: value for axis, value in bits.items() if value is not None},
    )
