"""Rate-distortion curves of a model's tensors: what each costs the output at each bit width, alone.

D_i(b) of paper 004 (section 3): only tensor i is quantized, to b bits; its distortion is that of the model's output on
the paths of the full-precision rollout. A tensor is the weight of a site, stored once, or what enters a site in one
group of steps.

Legend: W widths, S steps.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from bitlaw.files import write_json
from bitlaw.formats import FORMATS, Format
from bitlaw.names import lookup
from bitlaw.precision import FULL_BITS, BitPlan, GroupSize, Precision, TensorPrecision

CURVES_VERSION = 1

FLOATS = {3: "e2m0", 4: "e2m1", 5: "e2m2", 6: "e2m3", 7: "e3m3", 8: "e4m3"}


def _named(pattern: str) -> Callable[[int], Format]:
    return lambda bits: lookup(FORMATS, pattern.format(bits), "number format")


NUMBERS: dict[str, Callable[[int], Format]] = {
    "int": _named("int{}"),
    "symmetric": _named("int{}s"),
    "float": lambda bits: FORMATS[lookup({str(width): name for width, name in FLOATS.items()}, str(bits), "float")],
    "codebook": _named("v2b{}"),
}
"""The format of a width, 1 bit or more, by the name of its kind. ValueError for a width that it has not."""


class TensorKey(NamedTuple):
    """A tensor that gets a width of its own: a site's weight, or its input in a group of steps.

    group: index of the step group of an input; 0 of a weight, which all steps share
    """

    site: str
    what: Literal["weight", "input"]
    group: int = 0

    def __str__(self) -> str:
        return f"{self.site}.weight" if self.what == "weight" else f"{self.site}.input@{self.group}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """What `str` gave. ValueError for anything else."""
        site, _, rest = text.rpartition(".")
        if rest == "weight" and site:
            return cls(site, "weight")
        what, _, group = rest.partition("@")
        if what == "input" and group.isdecimal() and site:
            return cls(site, "input", int(group))
        raise ValueError(f"'{text}' names no tensor: expected SITE.weight or SITE.input@GROUP")


@dataclass(frozen=True)
class CurveSettings:
    """What is measured, and on which images.

    widths: bits tried, ascending; 0 drops the tensor. 16, as the checkpoint is, distorts nothing and is not measured
    numbers: kind of number, a name of NUMBERS, for weights; inputs are integers whatever it is
    group_size: of weights, as in `precision.TensorPrecision`
    static_inputs: inputs have one calibrated range for each step group, and not one for each token
    what: "weights", "inputs" or "both"
    method: how codes of weights are chosen, a name of METHODS with settings
    protect: sites that stay as they are, see `BitPlan.uniform`
    step_groups: the first step of each group of steps whose inputs share a width
    measure: of distortion, a name of `distortion.MEASURES`; "" for what suits the family
    num_images, seed, batch_size: of the full-precision rollouts; the seed is neither calibration's nor evaluation's
    labels: of the images, in turn; () for each class in turn
    guidance, sampling: settings that replace those of the model's sampler
    """

    widths: tuple[int, ...] = tuple(range(11))
    numbers: str = "int"
    group_size: GroupSize = None
    static_inputs: bool = False
    what: Literal["weights", "inputs", "both"] = "both"
    method: str = "rtn"
    protect: tuple[str, ...] = ("first-last",)
    step_groups: tuple[int, ...] = (0,)
    measure: str = ""
    num_images: int = 16
    seed: int = 2**21
    batch_size: int = 16
    labels: tuple[int | str, ...] = ()
    guidance: float | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.widths or any(a >= b for a, b in zip(self.widths, self.widths[1:], strict=False)):
            raise ValueError(f"widths must ascend, found {self.widths}")
        if self.widths[0] < 0 or self.widths[-1] >= FULL_BITS:
            raise ValueError(f"widths {self.widths}: from 0 to {FULL_BITS - 1} bits can be measured")
        lookup(NUMBERS, self.numbers, "kind of number")
        if self.what not in ("weights", "inputs", "both"):
            raise ValueError(f"what '{self.what}': must be weights, inputs or both")
        for name in ("num_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be 1 or more")
        for bits in self.widths:
            self.weight_precision(bits)
            self.input_precision(bits)

    def weight_precision(self, bits: int) -> TensorPrecision | None:
        """Precision of a weight at a width. ValueError for a width that the numbers have not."""
        if bits == FULL_BITS:
            return None
        if bits == 0:
            return TensorPrecision(FORMATS["int0"])
        return TensorPrecision(NUMBERS[self.numbers](bits), self.group_size)

    def input_precision(self, bits: int) -> TensorPrecision | None:
        """Precision of an input at a width."""
        if bits == FULL_BITS:
            return None
        if bits == 0:
            return TensorPrecision(FORMATS["int0"])
        return TensorPrecision(NUMBERS["int"](bits), "static" if self.static_inputs else None)

    def precision(self, what: Literal["weight", "input"], bits: int) -> Precision:
        """Precision of a site of which only this is quantized."""
        if what == "weight":
            return Precision(weight=self.weight_precision(bits))
        return Precision(activation=self.input_precision(bits))

    def to_json(self) -> dict[str, Any]:
        """The settings in plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The settings that `to_json` gave."""
        return cls(**with_tuples(value))

    @classmethod
    def at_all_widths(cls, **given: Any) -> Self:
        """Settings at all widths up to 10 bits that the numbers have. ValueError for what else is wrong."""
        cls(**given, widths=(0, 4))  # mistakes in other settings are named as what they are
        possible = []
        for width in cls.widths:
            with suppress(ValueError):
                cls(**given, widths=(width,))
                possible.append(width)
        return cls(**given, widths=tuple(possible))


@dataclass(frozen=True)
class RateDistortion:
    """The curves of a model.

    by_step: of every tensor (W, S): distortion of the output of each step at each width, mean over images
    settings: how they were measured
    mode: "exact", every point measured, or "sketch", estimated to first order
    model: name of the model; fingerprint: of its numbers and its sampler
    """

    by_step: Mapping[TensorKey, tuple[tuple[float, ...], ...]]
    settings: CurveSettings
    mode: Literal["exact", "sketch"]
    model: str
    fingerprint: str

    def distortions(self, key: TensorKey) -> tuple[float, ...]:
        """(W,): mean over the steps."""
        return tuple(sum(steps) / len(steps) for steps in self.by_step[key])

    def keys(self, what: Literal["weight", "input"] | None = None) -> list[TensorKey]:
        """The tensors, or only weights, or only inputs."""
        return [key for key in self.by_step if what is None or key.what == what]

    def save(self, path: Path | str) -> None:
        """Write a JSON file, atomically."""
        write_json(
            Path(path),
            {
                "bitlaw_curves": CURVES_VERSION,
                "model": self.model,
                "fingerprint": self.fingerprint,
                "mode": self.mode,
                "settings": self.settings.to_json(),
                "by_step": {str(key): value for key, value in self.by_step.items()},
            },
        )

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """What `save` wrote. ValueError, naming the file, for anything else."""
        with reading(path, "bitlaw_curves", CURVES_VERSION, "rate-distortion curves") as value:
            by_step = {
                TensorKey.parse(key): tuple(tuple(map(float, steps)) for steps in widths)
                for key, widths in value["by_step"].items()
            }
            settings = CurveSettings.from_json(value["settings"])
            return cls(by_step, settings, value["mode"], value["model"], value["fingerprint"])


@contextmanager
def reading(path: Path | str, mark: str, version: int, what: str) -> Iterator[dict[str, Any]]:
    """The object in a JSON file that bears `mark: version`.

    Raises one ValueError, naming the file and what it was taken for, for another file and for all that the body cannot
    make of it.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if value.pop(mark, None) != version:
            raise ValueError(f"it has no {mark} of version {version}")
        yield value
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as {what}: {error}") from error


def with_tuples(value: Mapping[str, Any]) -> dict[str, Any]:
    """What a dataclass was, of what JSON has made of it: tuples for lists."""
    return {key: tuple(entry) if isinstance(entry, list) else entry for key, entry in value.items()}


def tensor_keys(settings: CurveSettings, sites: Iterable[str]) -> list[TensorKey]:
    """The tensors of the given sites that get curves, site by site: its weight, then its input in each step group."""
    keys = []
    for site in sites:
        if settings.what != "inputs":
            keys.append(TensorKey(site, "weight"))
        if settings.what != "weights":
            keys += [TensorKey(site, "input", group) for group in range(len(settings.step_groups))]
    return keys


def plan_of_widths(settings: CurveSettings, widths: Mapping[TensorKey, int], sites: Iterable[str] = ()) -> BitPlan:
    """The plan of these tensors at these widths; others of the same sites, and other sites, stay in 16 bits.

    sites: that the plan is to name, before those of the tensors. Where no input has a width all steps are one group.
    """
    step_groups = settings.step_groups if any(key.what == "input" for key in widths) else (0,)

    def precision(site: str, group: int) -> Precision:
        return Precision(
            settings.weight_precision(widths.get(TensorKey(site, "weight"), FULL_BITS)),
            settings.input_precision(widths.get(TensorKey(site, "input", group), FULL_BITS)),
        )

    groups = range(len(step_groups))
    named = dict.fromkeys([*sites, *(key.site for key in widths)])
    return BitPlan({site: tuple(precision(site, group) for group in groups) for site in named}, step_groups)
