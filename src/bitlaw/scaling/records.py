"""Study cells and what came of them: one JSON file a cell, each a pure function of its configuration.

DIR/study.json                the grid, the protocol and the versions it is run with
DIR/cells/<stem>.json         one record, written atomically when the cell is done
DIR/samples/<stem>.png        the cell's first images
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from bitlaw.files import write_json, write_with

SAMPLE_TILES = (12, 2)  # columns, rows of a cell's sample picture


_PAIRS = ("sampling", "options", "calibration")


@dataclass(frozen=True)
class Cell:
    """One cell of a study: which model at which precision by which method, and the protocol of its evaluation.

    sampling: settings that replace those of the model's own sampler (guidance, num_steps, recipe ...)
    options: what `load` is given beside the name (tokenizer, dtype, device ...)
    calibration: settings of `Calibration` for methods and ranges that need it
    step_groups: how many groups of steps have static activation ranges of their own
    """

    model: str
    precision: str
    method: str = "rtn"
    seed: int = 0
    num_images: int = 2500
    num_validation: int = 512
    protect: str = "first-last"
    reference: str = "ladder"
    features: str = "ladder"
    sampling: tuple[tuple[str, Any], ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    calibration: tuple[tuple[str, Any], ...] = ()
    step_groups: int = 1

    @property
    def stem(self) -> str:
        """The name of the cell's files."""
        method = re.sub(r"[^\w.+-]", "-", self.method)
        return "--".join([self.model.rsplit("/", 1)[-1], self.precision, method, f"s{self.seed}"])

    def to_json(self) -> dict[str, Any]:
        """The configuration as JSON."""
        return {**asdict(self), **{name: dict(getattr(self, name)) for name in _PAIRS}}

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Self:
        """The cell of a configuration; keys that are results, not settings, are left out."""
        known = {f.name for f in fields(cls)}
        settings = {k: v for k, v in config.items() if k in known}
        pairs = {key: as_pairs(settings.get(key, {})) for key in _PAIRS}
        return cls(**{**settings, **pairs})


def as_pairs(settings: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Settings as a cell has them: in order, and with tuples for lists, so that they can be compared and hashed."""
    return tuple((name, tuple(v) if isinstance(v, list) else v) for name, v in sorted(settings.items()))


@dataclass
class Record:
    """A finished cell: its scores with intervals, its bits, or the error that ended it."""

    cell: Cell
    family: str = ""
    size: str = ""
    parameters: int = 0
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    bits: dict[str, float] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The record as one JSON object."""
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("cell", "family", "size")}
        return {"config": {**self.cell.to_json(), "family": self.family, "size": self.size}, **content}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """The record of a JSON object."""
        config = content["config"]
        rest = {k: v for k, v in content.items() if k != "config"}
        return cls(cell=Cell.from_json(config), family=config["family"], size=config["size"], **rest)


class StudyDirectory:
    """The files of a study."""

    def __init__(self, path: Path | str):
        self.path = Path(path)

    def read_study(self) -> dict[str, Any] | None:
        """study.json, or None where there is none yet. Raises ValueError if it is damaged."""
        return _read_json(self.path / "study.json")

    def write_study(self, content: Mapping[str, Any]) -> None:
        """Write study.json."""
        write_json(self.path / "study.json", dict(content))

    def read(self, cell: Cell) -> Record | None:
        """The record of a cell, or None if it has not been run under this configuration."""
        content = _read_json(self.path / "cells" / f"{cell.stem}.json")
        if content is None:
            return None
        record = Record.from_json(content)
        return record if record.cell == cell else None

    def write(self, record: Record, samples_png: bytes | None) -> None:
        """Write a record; the picture first, so that a record on disk is always complete."""
        if samples_png is not None:
            picture = samples_png
            write_with(self.samples(record.cell), lambda temporary: temporary.write_bytes(picture))
        write_json(self.path / "cells" / f"{record.cell.stem}.json", record.to_json())

    def samples(self, cell: Cell) -> Path:
        """Where the picture of a cell's first images is."""
        return self.path / "samples" / f"{cell.stem}.png"

    def records(self) -> Iterator[Record]:
        """Every record in the study's own grid, in its order; cells not yet run are left out."""
        study = self.read_study()
        if study is None:
            raise ValueError(f"{self.path}: no study here (study.json is missing)")
        for config in study["cells"]:
            record = self.read(Cell.from_json(config))
            if record is not None:
                yield record


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: damaged ({error}); remove it to have it made again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: damaged (not a JSON object); remove it to have it made again")
    return content
