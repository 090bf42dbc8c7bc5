"""Whether distortions add up: the sum of single tensors' distortions against that of quantizing them together.

Equation 5 of paper 004, on which every allocation from curves rests, holds to first order; its Figure 1 shows it for
plans at random. Here plans are drawn at random in several ranges of widths, so that it shows where it fails: at low
widths errors are large, and what one tensor distorts depends on what the others do.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from bitlaw.allocation.curves import CurveSettings, RateDistortion, TensorKey, plan_of_widths, reading
from bitlaw.allocation.paths import Paths, calibration_of, model_fingerprint
from bitlaw.calibration.collect import Progress
from bitlaw.files import write_json
from bitlaw.methods.quantize import quantize
from bitlaw.models.generator import ImageGenerator
from bitlaw.precision import BitPlan

ADDITIVITY_VERSION = 1

RANGES = ((6, 10), (4, 8), (3, 5), (2, 4), (1, 3), (0, 3))
"""Least and greatest width of the plans that are drawn."""

LEAST_CORRELATION = 0.95
SLOPES = (2 / 3, 3 / 2)
"""Of measured over predicted distortion, where predictions can be relied on."""

LEAST_DISTORTION = 1e-12
"""What a distortion counts as in logarithms, should it vanish."""


@dataclass(frozen=True)
class RangeCheck:
    """Plans with widths from `low` to `high`.

    average_bits: of each plan, mean over its tensors
    predicted: the sum of its tensors' distortions, each quantized alone
    measured: its distortion
    """

    low: int
    high: int
    average_bits: tuple[float, ...]
    predicted: tuple[float, ...]
    measured: tuple[float, ...]

    @property
    def correlation(self) -> float:
        """Pearson's, of predicted and measured; 0 where one of them does not vary."""
        return _pearson(np.array(self.predicted), np.array(self.measured))

    @property
    def log_correlation(self) -> float:
        """Pearson's, of their logarithms."""
        logs = (np.log(np.maximum(values, LEAST_DISTORTION)) for values in (self.predicted, self.measured))
        return _pearson(*logs)

    @property
    def slope(self) -> float:
        """Of the line through the origin with the least squared distance to what was measured; 1 is additivity."""
        predicted, measured = np.array(self.predicted), np.array(self.measured)
        return float(predicted @ measured / (predicted @ predicted)) if predicted.any() else 0.0

    @property
    def holds(self) -> bool:
        """Whether predictions can be relied on here."""
        return self.correlation >= LEAST_CORRELATION and SLOPES[0] <= self.slope <= SLOPES[1]

    def __str__(self) -> str:
        return (
            f"{self.low} to {self.high} bits: {len(self.measured)} plans, correlation {self.correlation:.3f} "
            f"({self.log_correlation:.3f} of logarithms), slope {self.slope:.2f}"
        )


@dataclass(frozen=True)
class Additivity:
    """The check of a model.

    tensors: those that are quantized together
    settings, mode: of the curves that predict; seed: of the plans
    model: its name; fingerprint: of its numbers and its sampler
    """

    ranges: tuple[RangeCheck, ...]
    tensors: tuple[TensorKey, ...]
    settings: CurveSettings
    mode: str
    seed: int
    model: str
    fingerprint: str

    def average_bits(self, plan: BitPlan) -> float:
        """Mean width of a plan's tensors; one that is left as it is counts as the widest that was measured."""
        widest = self.settings.widths[-1]
        bits = []
        for key in self.tensors:
            precision = plan[key.site][key.group] if key.site in plan.sites else None
            own = (
                widest
                if precision is None
                else precision.weight_bits
                if key.what == "weight"
                else precision.activation_bits
            )
            bits.append(min(own, widest))
        return sum(bits) / len(bits)

    def nearest(self, average_bits: float) -> RangeCheck:
        """The range whose plans have about so many bits."""
        return min(self.ranges, key=lambda r: abs(sum(r.average_bits) / len(r.average_bits) - average_bits))

    def warning_for(self, plan: BitPlan) -> str | None:
        """What to say of a plan whose predicted distortion cannot be relied on; None if it can.

        A plan is judged by random plans of about as many bits for a tensor.
        """
        average = self.average_bits(plan)
        near = self.nearest(average)
        lowest = min(min(r.average_bits) for r in self.ranges)
        beginning = f"the plan has {average:.2f} bits for a tensor"
        if average < lowest:
            return f"{beginning}, fewer than any that additivity was tested with ({lowest:.2f}); measure its distortion"
        if near.holds:
            return None
        if near.correlation >= LEAST_CORRELATION:
            failing = f"predicted distortions rank plans, but are {1 / near.slope:.2g} times too high"
        else:
            failing = "predicted distortions cannot be relied on, not even to rank plans"
        advice = "refine the plan by measured swaps, and measure its distortion"
        return f"{beginning}, where single distortions do not add up: {failing} ({near}); {advice}"

    def save(self, path: Path | str) -> None:
        """Write a JSON file, atomically."""
        ranges = [
            {
                "low": r.low,
                "high": r.high,
                "correlation": r.correlation,
                "log_correlation": r.log_correlation,
                "slope": r.slope,
                "average_bits": r.average_bits,
                "predicted": r.predicted,
                "measured": r.measured,
            }
            for r in self.ranges
        ]
        content = {
            "bitlaw_additivity": ADDITIVITY_VERSION,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "mode": self.mode,
            "seed": self.seed,
            "settings": self.settings.to_json(),
            "tensors": [str(key) for key in self.tensors],
            "ranges": ranges,
        }
        write_json(path, content)

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """What `save` wrote. ValueError, naming the file, for anything else."""
        with reading(path, "bitlaw_additivity", ADDITIVITY_VERSION, "a check of additivity") as value:
            ranges = tuple(
                RangeCheck(r["low"], r["high"], tuple(r["average_bits"]), tuple(r["predicted"]), tuple(r["measured"]))
                for r in value["ranges"]
            )
            tensors = tuple(map(TensorKey.parse, value["tensors"]))
            settings = CurveSettings.from_json(value["settings"])
            rest = (value[key] for key in ("mode", "seed", "model", "fingerprint"))
            return cls(ranges, tensors, settings, *rest)


def check_additivity(
    model: ImageGenerator[Any],
    curves: RateDistortion,
    *,
    ranges: Sequence[tuple[int, int]] = (),
    num_plans: int = 16,
    seed: int = 0,
    file: Path | str | None = None,
    progress: Progress | None = None,
) -> Additivity:
    """Draw plans at random in every range of widths, and measure them on the images that the curves were measured on.

    ranges: least and greatest width; () for those of RANGES of which the curves have two widths or more
    num_plans: of each range, 3 or more
    file: where the result is written as it grows; plans that it has of these curves' model and settings and this seed
        are not measured again
    Raises ValueError for curves of another model, a range in which the curves have fewer than two widths, or a file of
    something else, before anything is measured.
    """
    if num_plans < 3:
        raise ValueError(f"{num_plans} plans of a range have no correlation; give 3 or more")
    if model_fingerprint(model) != curves.fingerprint:
        raise ValueError(f"the curves are of another model ({curves.model}); measure those of this one")
    keys = curves.keys()
    if not ranges:
        widths = curves.settings.widths
        ranges = [(low, high) for low, high in RANGES if sum(low <= width <= high for width in widths) > 1]
    if not ranges:
        raise ValueError(f"curves at {widths} bits have no two widths near each other, so that no plans can be drawn")
    plans = {(low, high): draw_plans(curves, low, high, num_plans, seed) for low, high in ranges}
    known = _found(file, curves, seed)
    paths: Paths | None = None
    calibration = calibration_of(curves.settings)
    checked: dict[tuple[int, int], RangeCheck] = {}

    def result() -> Additivity:
        return Additivity(
            tuple(checked.values()), tuple(keys), curves.settings, curves.mode, seed, curves.model, curves.fingerprint
        )

    total, done = num_plans * len(plans), 0
    for bounds, drawn in plans.items():
        measured = known.get(bounds, [])[:num_plans]
        done += len(measured)
        for number in range(len(measured), num_plans):
            paths = paths or Paths(model, curves.settings, progress)
            plan = plan_of_widths(curves.settings, drawn[number])
            small = quantize(model, plan, curves.settings.method, calibration=calibration)
            measured.append(float(paths.distortion(small).mean()))
            done += 1
            if progress is not None:
                progress("measuring plans at random", done, total)
            checked[bounds] = _range_check(curves, bounds, drawn[: len(measured)], measured)
            if file is not None:
                result().save(file)
        checked[bounds] = _range_check(curves, bounds, drawn, measured)
    if file is not None:
        result().save(file)
    return result()


def predict(curves: RateDistortion, widths: Mapping[TensorKey, int]) -> float:
    """The distortion of tensors at these widths if distortions add up (equation 5)."""
    index = {width: i for i, width in enumerate(curves.settings.widths)}
    return sum(curves.distortions(key)[index[width]] for key, width in widths.items())


def draw_plans(
    curves: RateDistortion, low: int, high: int, num_plans: int, seed: int = 0
) -> list[dict[TensorKey, int]]:
    """Different widths of all tensors at random, `num_plans` times; the first of more are the same.

    A plan has bounds of its own, at random between `low` and `high`, and every tensor a width at random between those:
    plans differ in their average as well. ValueError if there are not as many plans.
    """
    widths = [width for width in curves.settings.widths if low <= width <= high]
    keys = curves.keys()
    if len(widths) < 2:
        raise ValueError(f"the curves have no two widths from {low} to {high}; they have {curves.settings.widths}")
    if len(widths) ** len(keys) < num_plans:
        raise ValueError(f"{len(keys)} tensors at {len(widths)} widths make fewer than {num_plans} plans")
    return _first(num_plans, _plans(keys, widths, random.Random(f"{seed} {low} {high}")))


def _plans(keys: Sequence[TensorKey], widths: Sequence[int], source: random.Random) -> Iterator[dict[TensorKey, int]]:
    while True:
        first, last = sorted(source.choices(range(len(widths)), k=2))
        yield {key: source.choice(widths[first : last + 1]) for key in keys}


def _first(count: int, plans: Iterator[dict[TensorKey, int]]) -> list[dict[TensorKey, int]]:
    """The first plans that differ."""
    found: dict[tuple[int, ...], dict[TensorKey, int]] = {}
    while len(found) < count:
        plan = next(plans)
        found.setdefault(tuple(plan.values()), plan)
    return list(found.values())


def _range_check(
    curves: RateDistortion, bounds: tuple[int, int], plans: Sequence[Mapping[TensorKey, int]], measured: Sequence[float]
) -> RangeCheck:
    averages = tuple(sum(plan.values()) / len(plan) for plan in plans)
    return RangeCheck(*bounds, averages, tuple(predict(curves, plan) for plan in plans), tuple(measured))


def _found(file: Path | str | None, curves: RateDistortion, seed: int) -> dict[tuple[int, int], list[float]]:
    """What a file has measured already. ValueError if it is of something else."""
    if file is None or not Path(file).exists():
        return {}
    before = Additivity.read(file)
    found = (before.fingerprint, before.settings, before.seed, before.tensors)
    if found != (curves.fingerprint, curves.settings, seed, tuple(curves.keys())):
        raise ValueError(f"{file}: of another model ({before.model}), other curves or another seed; give another file")
    return {(r.low, r.high): list(r.measured) for r in before.ranges}


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])
