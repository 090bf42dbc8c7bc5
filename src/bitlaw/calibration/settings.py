"""What is drawn to calibrate a model, and what is kept of it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from bitlaw.calibration.histogram import RangeChoice


@dataclass(frozen=True)
class Calibration:
    """Images that a model draws of itself, over every step, while its layers' inputs are observed.

    num_images: images drawn; each class in turn, or `labels` (of a model of texts: prompts) in turn
    seed: of their noise; another one than evaluations use
    guidance, sampling: settings that replace those of the model's sampler; calibrate as you will sample
    balanced_steps: whether each step weighs the same in moments, and not each row; VAR's late stages have most rows
    ranges, percentile: how static activation ranges are chosen (`histogram.static_range`)
    rows_per_input: rows aimed at for the moments of a layer, for each of its inputs; what comes beyond is sampled
    sample_rows: rows of a layer that are kept as they are
    max_calls: calls of the network that methods which go block by block work on; of more steps some are drawn
    memory_limit: bytes of hidden states held in memory; more of them go to a temporary file
    """

    num_images: int = 64
    seed: int = 2**20
    batch_size: int = 16
    labels: tuple[int | str, ...] = ()
    guidance: float | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    balanced_steps: bool = False
    ranges: RangeChoice = "mse"
    percentile: float = 99.99
    rows_per_input: int = 8
    sample_rows: int = 256
    max_calls: int = 128
    memory_limit: int = 2**31

    def __post_init__(self) -> None:
        for name in ("num_images", "batch_size", "rows_per_input", "sample_rows", "max_calls"):
            if getattr(self, name) < 1:
                raise ValueError(f"calibration: {name} {getattr(self, name)} must be 1 or more")
        if self.ranges not in ("minmax", "percentile", "mse"):
            raise ValueError(f"calibration: ranges '{self.ranges}' must be minmax, percentile or mse")
        if not 50 < self.percentile <= 100:
            raise ValueError(f"calibration: percentile {self.percentile:g} must be above 50 and at most 100")

    def to_json(self) -> dict[str, Any]:
        """The settings in plain values."""
        return asdict(self)
