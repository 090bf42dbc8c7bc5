"""What a score was measured with, and the refusal to compare scores that were measured differently."""

from collections.abc import Collection
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, NamedTuple, Self

from torch import Tensor

# What two families differ in by design: scores of a VAR and a DiT may be compared although these fields differ.
ACROSS_FAMILIES = ("guidance", "num_steps", "sampler", "recipe")


class Interval(NamedTuple):
    """An interval of a score, of the level that its maker was given (95 % unless told)."""

    low: float
    high: float

    @classmethod
    def around(cls, value: float, resampled_K: Tensor, level: float) -> "Interval":
        """`value` plus the quantiles of resampled scores about their own mean, so that their bias cancels.

        ValueError if `level` is not between 0 and 1.
        """
        if not 0 < level < 1:
            raise ValueError(f"interval level {level} is not between 0 and 1")
        tail = (1 - level) / 2
        deviation_K = (resampled_K - resampled_K.mean()).double()
        return cls(*(value + float(deviation_K.quantile(q)) for q in (tail, 1 - tail)))


def score_json(value: float, interval: Interval | None) -> dict[str, float]:
    """A score for JSON: value, and low and high where it has an interval."""
    return {"value": value} | ({"low": interval.low, "high": interval.high} if interval else {})


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Everything besides the model that a score depends on.

    num_images, seed: how many images were drawn, from which seed
    labels: how their labels were chosen ("cyclic": 0, 1, ..., C - 1, 0, 1, ...)
    guidance, num_steps, sampler: the sampler's settings
    recipe: name of the recipe that they are; "" for settings of one's own
    rounding: how images became uint8 ("half up", "truncate")
    features, features_fingerprint: name and weights of the feature network
    reference, num_reference: what the images are compared with, and how many images that is (None: not known)
    """

    num_images: int
    seed: int
    labels: str
    guidance: float
    num_steps: int
    sampler: str
    rounding: str
    features: str
    features_fingerprint: str
    reference: str
    num_reference: int | None
    recipe: str = ""

    def differing(self, other: "Protocol") -> list[str]:
        """Names of the fields that differ."""
        return [field.name for field in fields(self) if getattr(self, field.name) != getattr(other, field.name)]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Self:
        """ValueError names the fields that are missing or unknown."""
        names = {field.name for field in fields(cls)}
        optional = {field.name for field in fields(cls) if field.default is not MISSING}
        if wrong := sorted((names ^ set(record)) - (optional - set(record))):
            raise ValueError(f"protocol record: missing or unknown {', '.join(wrong)}")
        return cls(**record)


@dataclass(frozen=True)
class Score:
    """One metric's value for one model, with its interval (None where it has none) and its protocol."""

    metric: str
    value: float
    interval: Interval | None
    protocol: Protocol

    def check_comparable(self, other: "Score", may_differ: Collection[str] = ()) -> None:
        """ValueError naming every field in which the protocols differ, unless it is in `may_differ`."""
        if self.metric != other.metric:
            raise ValueError(f"{self.metric} and {other.metric} are different metrics")
        differing = [name for name in self.protocol.differing(other.protocol) if name not in may_differ]
        if differing:
            found = "; ".join(
                f"{name}: {getattr(self.protocol, name)!r} and {getattr(other.protocol, name)!r}" for name in differing
            )
            raise ValueError(f"{self.metric} scores of different protocols cannot be compared ({found})")

    def minus(self, other: "Score", may_differ: Collection[str] = ()) -> float:
        """How much larger this value is; refuses as `check_comparable` does."""
        self.check_comparable(other, may_differ)
        return self.value - other.value

    def __lt__(self, other: "Score") -> bool:
        """By value, so that `min`, `max` and `sorted` work; refuses as `check_comparable` does."""
        return self.minus(other) < 0
