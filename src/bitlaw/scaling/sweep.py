"""Studies: a grid of cells, run by an engine, resumed where it was left.

A cell (model x precision x method x seed) is a pure function of its configuration: neither the number of processes, nor
the order of cells, nor an interruption changes an image or a score.
"""

import io
import resource
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitlaw.allocation import by_name
from bitlaw.calibration.settings import Calibration
from bitlaw.engine import Engine, LocalEngine
from bitlaw.ladder import data
from bitlaw.methods.quantize import quantize
from bitlaw.metrics.evaluation import (
    Reference,
    cyclic_labels,
    draw_features,
    feature_network,
    load_reference,
    mean_loss,
    protocol_of,
    score_features,
)
from bitlaw.metrics.features import FeatureNetwork
from bitlaw.metrics.protocol import score_json
from bitlaw.metrics.samples import image_grid
from bitlaw.models.generator import ImageGenerator
from bitlaw.models.loading import load
from bitlaw.names import check_keywords
from bitlaw.precision import Precision
from bitlaw.scaling.bits import count_bits
from bitlaw.scaling.records import SAMPLE_TILES, Cell, Record, StudyDirectory, as_pairs

LADDER_SIZES = ("xs", "s", "m", "l")


@dataclass(frozen=True)
class Study:
    """A grid of models, precisions, methods and seeds under one protocol. A full-precision model has no method.

    num_validation: images for the validation loss; they are the ladder's, so models of other images need 0
    sampling: settings of every model's sampler (`{"recipe": "paper"}`)
    options: what `load` is given beside each name (`{"device": "cuda", "dtype": "bfloat16"}`)
    methods: names with settings, chains (`smoothquant+gptq`), distillations (`distill:topkld,steps=300`), whose seed is
        the cell's, mixed precision (`mixed:then=gptq`), of which a precision is the average; rtn is not calibrated
    methods_at: other methods at some precisions (`{"W8A8": ("rtn", "smoothquant")}`)
    calibration: settings of `Calibration` (`{"num_images": 128}`)
    step_groups: how many groups of steps have static activation ranges of their own
    """

    name: str
    models: tuple[str, ...]
    precisions: tuple[str, ...]
    methods: tuple[str, ...] = ("rtn",)
    seeds: tuple[int, ...] = (0,)
    num_images: int = 2500
    num_validation: int = 512
    protect: str = "first-last"
    reference: str = "ladder"
    features: str = "ladder"
    description: str = ""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    methods_at: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    step_groups: int = 1

    def pairs(self) -> list[tuple[str, str]]:
        """Every precision with each of its methods."""
        return [(precision, m) for precision in self.precisions for m in self.methods_at.get(precision, self.methods)]

    def cells(self) -> list[Cell]:
        """Every cell of the grid."""
        cells: dict[Cell, None] = {}
        for model, (precision, method), seed in product(self.models, self.pairs(), self.seeds):
            parsed = Precision.parse(precision)
            cell = Cell(
                model,
                str(parsed),
                "none" if parsed.is_full else method,
                seed,
                self.num_images,
                self.num_validation,
                self.protect,
                self.reference,
                self.features,
                as_pairs(self.sampling),
                as_pairs(self.options),
                as_pairs(self.calibration),
                self.step_groups,
            )
            cells[cell] = None
        return list(cells)

    def check(self) -> None:
        """Raise one ValueError for everything that would fail: names, precisions, group sizes, too few images."""
        for _, method in self.pairs():
            by_name.parse(method)
        check_keywords(self.precisions, self.methods_at, "precision of the study")
        check_keywords(Calibration.__dataclass_fields__, self.calibration, "calibration setting")
        Calibration(**self.calibration)
        network = feature_network(self.features)
        reference = load_reference(self.reference, network)
        needed = reference.pooled.num_features + 1
        if self.num_images < needed:
            raise ValueError(
                f"study '{self.name}': {self.num_images} images are too few for a covariance of {needed - 1} features; "
                f"at least {needed} are needed, and many more for a stable distance"
            )
        problems = []
        for name in self.models:
            model = load(name, **self.options).with_sampling(**self.sampling)
            if self.num_validation and model.image_size != data.IMAGE_SIZE:
                problems.append(
                    f"{name}: draws {model.image_size} px, and the validation images are the ladder's of "
                    f"{data.IMAGE_SIZE} px; set num_validation=0"
                )
            if not model.num_classes:
                problems.append(f"{name}: draws from text, and a study draws from classes")
            for precision, method in self.pairs():
                if (parsed := Precision.parse(precision)).is_full:
                    continue
                try:
                    by_name.check(model, parsed, method, self.protect, self.step_groups)
                except ValueError as error:
                    problems.append(f"{name} at {precision} by {method}: {error}")
        if problems:
            raise ValueError("\n".join(problems))


LADDER_STUDY = Study(
    name="ladder",
    models=tuple(f"ladder/{family}-{size}" for family in ("var", "dit") for size in LADDER_SIZES),
    precisions=("W16A16", "W8A16", "W4A16", "W3A16", "W2A16", "W8A8", "W4A8", "W4A4", "We2m1A16"),
    description="Four VAR and four DiT models trained on procedural images, quantized by rounding to nearest.",
)


@dataclass(frozen=True)
class CellResult:
    """What running a cell gives: its record, and a picture of its first images."""

    record: Record
    samples_png: bytes


def run_cell(cell: Cell) -> CellResult:
    """Quantize, count bits, draw, score. A pure function of the cell's configuration."""
    started = time.perf_counter()
    network, reference = _scoring(cell.features, cell.reference)
    model = load(cell.model, **dict(cell.options)).with_sampling(**dict(cell.sampling))
    parameters = sum(p.numel() for p in model.net.parameters())
    if not (precision := Precision.parse(cell.precision)).is_full:
        model = by_name.apply(
            model,
            precision,
            cell.method,
            cell.protect,
            calibration=Calibration(**dict(cell.calibration)),
            step_groups=cell.step_groups,
            seed=cell.seed,
        )
    bits = count_bits(model)
    columns, rows = SAMPLE_TILES
    labels = cyclic_labels(cell.num_images, model.num_classes)
    features, first_images = draw_features(model, network, labels, cell.seed, num_kept=columns * rows)
    scores = score_features(features, reference, model.family)
    metrics = {name: score_json(value, interval) for name, (value, interval) in scores.items()}
    if cell.num_validation:
        metrics["loss"] = score_json(*mean_loss(model, *_validation(cell.num_validation)))
    record = Record(
        cell=cell,
        family=model.family,
        size=cell.model.rsplit("-", 1)[-1],
        parameters=parameters,
        metrics=metrics,
        bits=bits.to_json(),
        protocol=protocol_of(model, cell.num_images, cell.seed, network, reference).as_dict(),
        versions=versions(),
        seconds=time.perf_counter() - started,
    )
    buffer = io.BytesIO()
    image_grid(first_images, columns, gap=0).save(buffer, format="PNG")
    return CellResult(record, buffer.getvalue())


@lru_cache(maxsize=2)
def _scoring(features: str, reference: str) -> tuple[FeatureNetwork, Reference]:
    network = feature_network(features)
    return network, load_reference(reference, network)


@lru_cache(maxsize=1)
def _validation(count: int) -> tuple[Tensor, Tensor]:
    batch = data.draw("validation", 0, count)
    return batch.images_BCHW, batch.labels_B


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {name: version(name) for name in ("bitlaw", "torch", "numpy", "scipy")}


@dataclass(frozen=True)
class Estimate:
    """What a study will take: seconds of each cell on one core, and memory of one process in bytes."""

    cell_seconds: dict[Cell, float]
    process_bytes: int

    def wall_seconds(self, cells: list[Cell], workers: int) -> float:
        """Seconds until the cells are done."""
        seconds = [self.cell_seconds[cell] for cell in cells]
        return max(sum(seconds) / workers, max(seconds, default=0.0))


def estimate(cells: list[Cell], num_images: int = 16) -> Estimate:
    """Draw a few images with every model, in full precision and with quantized activations, and extrapolate.

    What methods cost is counted in images (`by_name.cost_in_images`), and rough.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model: ImageGenerator[Any] | None = None
        loaded = ""
        per_image: dict[tuple[str, bool], float] = {}
        seconds = {}
        for cell in sorted(cells, key=lambda cell: cell.model):  # one model in memory at a time
            if model is None or cell.model != loaded:
                loaded = cell.model
                model = load(cell.model, **dict(cell.options)).with_sampling(**dict(cell.sampling))
            precision = Precision.parse(cell.precision)
            key = (cell.model, _quantizes_activations(cell))
            if key not in per_image:
                drawn = quantize(model, precision, method="rtn", protect=cell.protect) if key[1] else model
                labels = cyclic_labels(num_images, model.num_classes)
                drawn.generate(labels[:2])
                started = time.process_time()
                drawn.generate(labels)
                per_image[key] = (time.process_time() - started) / num_images
            count = float(cell.num_images)
            if not precision.is_full:
                settings = Calibration(**dict(cell.calibration))
                count += by_name.cost_in_images(model, cell.method, settings, precision.is_static)
            seconds[cell] = 2 + per_image[key] * count
    finally:
        torch.set_num_threads(threads)
    return Estimate(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _quantizes_activations(cell: Cell) -> bool:
    precision = Precision.parse(cell.precision)
    return precision.activation is not None or precision.attention is not None


def open_study(study: Study, directory: Path) -> StudyDirectory:
    """The study's directory, made if need be. ValueError if it holds something else."""
    here = StudyDirectory(directory)
    content = {
        "name": study.name,
        "description": study.description,
        "cells": [cell.to_json() for cell in study.cells()],
        "versions": versions(),
    }
    there = here.read_study()
    if there is None:
        if directory.exists() and any(path for path in directory.iterdir() if not path.name.startswith(".")):
            raise ValueError(f"{directory} is not empty and holds no study; give another --out")
        here.write_study(content)
    elif there["cells"] != content["cells"]:
        raise ValueError(f"{directory} holds another study: {_difference(there, content)}. Give another --out")
    elif there["versions"] != content["versions"]:
        raise ValueError(
            f"{directory} was begun with other versions ({there['versions']}, now {content['versions']}); "
            "their numbers may differ. Give another --out, or install those"
        )
    return here


def _difference(there: dict[str, Any], here: dict[str, Any]) -> str:
    """In what two studies differ, in a few words."""
    if there["name"] != here["name"]:
        return f"it is '{there['name']}', not '{here['name']}'"
    parts = []
    for key in here["cells"][0]:
        old, new = ({repr(cell.get(key)) for cell in study["cells"]} for study in (there, here))
        if old != new:
            parts.append(f"{key} {', '.join(sorted(old))} there, {', '.join(sorted(new))} here")
    return "; ".join(parts) or "its cells are in another order"


@dataclass(frozen=True)
class Progress:
    """Told to the caller after each cell: its record, and the seconds left."""

    record: Record
    left_wall_seconds: float


def missing_cells(study: Study, directory: StudyDirectory) -> list[Cell]:
    """Cells without a record, and those that failed, in the study's order."""
    cells = []
    for cell in study.cells():
        record = directory.read(cell)
        if record is None or record.error is not None:
            cells.append(cell)
    return cells


def run_study(
    study: Study, directory: StudyDirectory, expected: Estimate, engine: Engine | None = None
) -> Iterator[Progress]:
    """Run what is missing, the longest cells first; each record is on disk before it is reported.

    A cell that fails is recorded with its error and the others go on; it is tried again when the study is.
    """
    engine = engine or LocalEngine()
    cells = sorted(missing_cells(study, directory), key=lambda cell: -expected.cell_seconds[cell])
    total, done, started = sum(expected.cell_seconds[cell] for cell in cells), 0.0, time.monotonic()
    for outcome in engine.run(run_cell, cells):
        if outcome.result is not None:
            record, picture = outcome.result.record, outcome.result.samples_png
        else:
            record, picture = Record(outcome.item, error=f"{type(outcome.error).__name__}: {outcome.error}"), None
        directory.write(record, picture)
        done += expected.cell_seconds[outcome.item]
        elapsed = time.monotonic() - started
        yield Progress(record, elapsed / done * (total - done))
