"""A study's records, read and put in order for the table and the report."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bitlaw.allocation.additivity import Additivity
from bitlaw.report.recipes import Recipe, recipes_of
from bitlaw.scaling import Point, points_of_records
from bitlaw.scaling.cells import Line
from bitlaw.scaling.records import Record, StudyDirectory

FAMILY_LABELS = {
    "var": "VAR",
    "llamagen": "LlamaGen",
    "mar": "MAR",
    "dit": "DiT",
    "large-dit": "Large-DiT",
    "ddpm": "DDPM",
    "ldm": "LDM",
}


@dataclass(frozen=True)
class Metric:
    """A score as the report names it."""

    key: str
    label: str
    name: str


METRICS = (
    Metric("fd", "FD", "Fréchet distance to real images"),
    Metric("fid", "FID", "Fréchet inception distance"),
    Metric("fd_reconstruction", "FD rec.", "Fréchet distance to the family's own reconstructions of real images"),
    Metric("sfd", "sFD", "spatial Fréchet distance"),
    Metric("kid", "KID", "kernel distance"),
    Metric("is", "IS", "inception score"),
    Metric("precision", "P/R precision", "share of generated images that look real"),
    Metric("recall", "P/R recall", "share of real images that are covered"),
    Metric("loss", "loss", "validation loss"),
)
HEADLINE = ("fd", "fid")


@dataclass(frozen=True)
class Axis:
    """A way to count a budget. All are bits; `unit` says whether they are shown as bytes."""

    key: str
    label: str
    title: str
    unit: str
    note: str


AXES = (
    Axis(
        "model_bits",
        "Size as stored",
        "size as stored",
        "bytes",
        "All weights as they are on disk: codes, scales, zeros, and the layers left in 16 bits.",
    ),
    Axis(
        "model_code_bits",
        "Size without scales",
        "size without scales and zeros",
        "bytes",
        "Codes and the layers left in 16 bits, without the scales and zeros that quantization adds.",
    ),
    Axis(
        "compute_bits",
        "Compute",
        "compute, each weight once",
        "bit²",
        "Weight bits (scales included) times activation bits, summed over the weights, each counted once.",
    ),
    Axis(
        "compute_bits_used",
        "Compute per image",
        "compute per image",
        "bit²",
        "Weight bits times activation bits, each weight counted as often as one image uses it (tokens and steps).",
    ),
)


@dataclass(frozen=True)
class Results:
    """What a study has so far: finished records, failed ones, and how they are named and drawn."""

    directory: StudyDirectory
    study: dict[str, Any]
    done: list[Record]
    failed: list[Record]
    metrics: list[Metric]
    score: Metric
    axes: list[Axis]
    recipes: dict[str, Recipe]
    additivity: list[Additivity]

    @property
    def families(self) -> list[str]:
        """Families in the study's order."""
        return list(dict.fromkeys(record.family for record in self.done))

    @property
    def num_missing(self) -> int:
        """Cells of the grid that have not been run."""
        return len(self.study["cells"]) - len(self.done) - len(self.failed)

    @cached_property
    def points(self) -> list[Point]:
        """The headline score of every finished cell."""
        return [point for point in points_of_records(self.done) if point.metric == self.score.key]

    def recipe_key(self, source: Record | Line) -> str:
        """The recipe of a record or of a law's line."""
        which = source.cell if isinstance(source, Record) else source
        return next(
            key for key, r in self.recipes.items() if (r.precision, r.method) == (which.precision, which.method)
        )

    def groups(self) -> Iterator[list[Record]]:
        """Records with the headline score, those together that differ only in their seed."""
        grouped: dict[tuple[str, str], list[Record]] = {}
        for record in self.done:
            if self.score.key not in record.metrics:
                continue
            grouped.setdefault((record.cell.model, self.recipe_key(record)), []).append(record)
        yield from grouped.values()


def read_results(study_dir: Path | str) -> Results:
    """Read a study's results, and the checks of additivity beside them (`additivity/NAME/additivity.json`).

    Raises ValueError if there is no study, or no finished cell with a Fréchet distance.
    """
    directory = StudyDirectory(study_dir)
    study = directory.read_study()
    if study is None:
        raise ValueError(f"{study_dir}: no study here (study.json is missing)")
    records = list(directory.records())
    done = [record for record in records if record.error is None]
    if not done:
        raise ValueError(f"{study_dir}: no cell of this study is finished; run it first")
    metrics = [metric for metric in METRICS if any(metric.key in record.metrics for record in done)]
    score = next((metric for metric in metrics if metric.key in HEADLINE), None)
    if score is None:
        raise ValueError(f"{study_dir}: no cell has a Fréchet distance ({' or '.join(HEADLINE)})")
    axes = [axis for axis in AXES if all(axis.key in record.bits for record in done)]
    if not axes:
        raise ValueError(f"{study_dir}: the cells have no bits; expected {', '.join(axis.key for axis in AXES)}")
    failed = [record for record in records if record.error is not None]
    recipes = recipes_of(record.cell for record in done)
    additivity = [Additivity.read(path) for path in sorted(directory.path.glob("additivity/*/additivity.json"))]
    return Results(directory, study, done, failed, metrics, score, axes, recipes, additivity)


def family_label(family: str) -> str:
    """A family's name as people write it."""
    return FAMILY_LABELS.get(family, family)


def short_model(model: str) -> str:
    """A model's name without its collection: ladder/var-s -> var-s."""
    return model.rsplit("/", 1)[-1]
