"""How many bits for what: the notation `W4g128A8KV8`, and plans that give every site its precision.

    precision = W number [groups] [A number [t | c]] [KV number]
    number    = 16 | 0 to 15 | integer bits with s: symmetric | the name of another format: e2m1, v2b3
    groups    = g and a number: input channels that share a scale | t: one scale for the tensor

16 means as the checkpoint is, and is what A and KV are if they are not given. Without `groups` each output channel of a
weight has its scale; activations (dynamic ranges) have one for each token, with `t` one for the tensor, which makes an
image depend on its batch, and with `c` it is calibrated: one for each step group, found before and stored;
attention operands have one for each token and head. 0 drops a tensor: it is zero. Of a
convolution, `g` counts the numbers a window covers (channels x kernel), and inputs have a scale for each image.

v2b3 are codebooks: vectors of 2 weights, 3 bits of index for each, 64 entries. They are for weights only. Of them `g`
counts all weights that share a codebook, over rows and inputs, and `t` is one codebook for the tensor; without either
it is shared so widely that it costs at most 1/8 bit a weight (`quantized.WeightSpec`).
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, Protocol, Self, TypeVar

from bitlaw.formats import FORMATS, Format, format_name
from bitlaw.names import unknown_name

GroupSize = int | Literal["tensor", "static"] | None
"""Inputs that share a scale; None for a whole output channel (a weight), token or image (an activation).

"static" is for activations: everything that enters the layer in a step group shares a range found by calibration.
"""

FULL_BITS = 16
"""Nominal bits of what is left as the checkpoint is."""


@dataclass(frozen=True)
class TensorPrecision:
    """A number format, and how many numbers share its parameters."""

    format: Format
    group_size: GroupSize = None

    def __post_init__(self) -> None:
        if self.format.code_bits >= FULL_BITS:
            raise ValueError("16 bits means as the checkpoint is: write None for it")
        if self.format.code_bits == 0 and self.group_size is not None:
            raise ValueError("0 bits have no scale that a group could share")
        if isinstance(self.group_size, int) and self.group_size < 1:
            raise ValueError(f"group size {self.group_size} is not 1 or more")

    def __str__(self) -> str:
        letters = {None: "", "tensor": "t", "static": "c"}
        groups = f"g{self.group_size}" if isinstance(self.group_size, int) else letters[self.group_size]
        return format_name(self.format).removeprefix("int") + groups


@dataclass(frozen=True)
class Precision:
    """Precision of a site's weight, of its input and of the attention operands (q, k, v) behind it. None is 16 bits."""

    weight: TensorPrecision | None = None
    activation: TensorPrecision | None = None
    attention: TensorPrecision | None = None

    def __post_init__(self) -> None:
        if self.weight and self.weight.group_size == "static":
            raise ValueError("weights have no range to calibrate; c is for activations")
        if self.activation and isinstance(self.activation.group_size, int):
            raise ValueError("activations have a scale for each token or for the tensor, no groups")
        for what, tensor in (("activations", self.activation), ("attention operands", self.attention)):
            if tensor and tensor.format.codebook_shape:
                raise ValueError(f"{tensor} is a codebook, which only weights can have; give {what} integers or floats")
        if self.attention and self.attention.group_size is not None:
            raise ValueError("attention operands have a scale for each token and head, nothing else")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the notation. Raises ValueError that shows where it went wrong and what was expected there."""
        reader = _Reader(text)
        reader.letters("W", "W and the bits of the weights")
        weight = reader.tensor(groups=True, whole=True)
        activation = reader.tensor(whole=True, static=True) if reader.accept("A") else None
        attention = reader.tensor() if reader.accept("KV") else None
        if not reader.at_end:
            reader.expected.append("the end")
            raise reader.error()
        return cls(weight, activation, attention)

    def __str__(self) -> str:
        """The canonical form: KV only if it is not 16."""
        attention = f"KV{self.attention}" if self.attention else ""
        return f"W{self.weight or FULL_BITS}A{self.activation or FULL_BITS}{attention}"

    @property
    def is_full(self) -> bool:
        """Nothing is quantized."""
        return self == Precision()

    @property
    def is_static(self) -> bool:
        """Whether inputs have a range that calibration found."""
        return self.activation is not None and self.activation.group_size == "static"

    @property
    def weight_bits(self) -> float:
        """Nominal bits of a weight."""
        return self.weight.format.code_bits if self.weight else FULL_BITS

    @property
    def activation_bits(self) -> float:
        """Nominal bits of an input activation."""
        return self.activation.format.code_bits if self.activation else FULL_BITS

    @property
    def attention_bits(self) -> float:
        """Nominal bits of q, k and v."""
        return self.attention.format.code_bits if self.attention else FULL_BITS


class _Reader:
    """Reads a precision from left to right, and remembers what would have been accepted where it stands."""

    def __init__(self, text: str):
        self.text, self.position = text, 0
        self.expected: list[str] = []

    @property
    def at_end(self) -> bool:
        return self.position == len(self.text)

    def match(self, pattern: str, what: str) -> str | None:
        """Consume what matches, or note that it was expected here."""
        found = re.compile(pattern).match(self.text, self.position)
        if found is None:
            self.expected.append(what)
            return None
        self.position = found.end()
        self.expected.clear()
        return found.group()

    def accept(self, letters: str) -> bool:
        return self.match(letters, letters) is not None

    def letters(self, letters: str, what: str) -> None:
        if self.match(letters, what) is None:
            raise self.error()

    def tensor(self, groups: bool = False, whole: bool = False, static: bool = False) -> TensorPrecision | None:
        """A number and its groups; None for 16. `groups`, `whole` and `static` say if g<N>, t and c may follow."""
        format = self.format()
        if format is None:
            return None
        if format.code_bits == 0:  # nothing is stored that could be shared
            return TensorPrecision(format)
        if groups and self.accept("g"):
            start = self.position
            size = self.match(r"[0-9]+", "a group size")
            if size is None:
                raise self.error()
            if size.startswith("0"):
                raise self.error("a group size of 1 or more", start)
            return TensorPrecision(format, int(size))
        if whole and self.accept("t"):
            return TensorPrecision(format, "tensor")
        return TensorPrecision(format, "static" if static and self.accept("c") else None)

    def format(self) -> Format | None:
        start = self.position
        if bits := self.match(r"[0-9]+", "bits"):
            if bits == str(FULL_BITS):
                return None
            if f"int{bits}" not in FORMATS:
                raise self.error("0 to 16 bits", start)
            symmetric = FORMATS.get(f"int{bits}s")
            return symmetric if symmetric and self.match("s", "s") else FORMATS[f"int{bits}"]
        names = sorted((name for name in FORMATS if not name.startswith("int")), key=len, reverse=True)
        for name in names:
            if self.match(re.escape(name) + "(?![0-9])", name):
                return FORMATS[name]
        if unknown := re.compile(r"e[0-9]+m[0-9]+|[a-z][a-z0-9]*").match(self.text, start):
            raise ValueError(f"{self._show(start)}\n{unknown_name(unknown.group(), names, 'number format')}")
        raise self.error("0 to 16 bits, a float layout such as e2m1 or a codebook such as v2b3")

    def error(self, expected: str | None = None, position: int | None = None) -> ValueError:
        """What was expected at a position (by default what has just been tried where the reader stands)."""
        wanted = expected or " or ".join(self.expected)
        return ValueError(f"{self._show(self.position if position is None else position)} expected {wanted}")

    def _show(self, position: int) -> str:
        return f"cannot read the precision '{self.text}'\n  {self.text}\n  {' ' * position}^"


class PlannedSite(Protocol):
    """What a plan has to know of a site (`models.generator.Site`)."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def phase(self) -> str: ...


PROTECTION: dict[str, Callable[[PlannedSite], bool]] = {
    "first-last": lambda site: site.phase in ("embed", "head"),
    "none": lambda site: False,
}
"""Which sites stay in 16 bits, by name of the rule."""


SiteT = TypeVar("SiteT", bound=PlannedSite)


def unprotected(sites: Iterable[SiteT], protect: str | Sequence[str] = "first-last") -> list[SiteT]:
    """The sites that are not protected, in their order.

    `protect` is a rule of PROTECTION, a site's name, or several of them; ValueError for a name that is neither.
    """
    sites = list(sites)
    names = [protect] if isinstance(protect, str) else protect
    known = {site.name for site in sites}
    for name in names:
        if name not in PROTECTION and name not in known:
            raise unknown_name(name, [*PROTECTION, *known], "protection rule or site")
    rules = [PROTECTION[name] for name in names if name in PROTECTION]
    return [site for site in sites if site.name not in names and not any(rule(site) for rule in rules)]


def check_step_groups(starts: Sequence[int], num_steps: int | None = None) -> None:
    """Raise ValueError for first steps of groups that do not begin at 0, ascend and, if it is known, end before S."""
    if tuple(starts[:1]) != (0,) or any(a >= b for a, b in pairwise(starts)):
        raise ValueError(f"step groups begin at 0 and ascend, not {tuple(starts)}")
    if num_steps is not None and starts[-1] >= num_steps:
        raise ValueError(f"a step group from step {starts[-1]}: this model has {num_steps} steps, 0 and up")


@dataclass(frozen=True)
class BitPlan:
    """A Precision for every site and step group.

    sites: for each site its precision in each step group; its weight is stored once and so has one precision
    step_groups: the first step of each group, from 0 upwards
    Raises ValueError naming every site that does not fit.
    """

    sites: Mapping[str, tuple[Precision, ...]]
    step_groups: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        groups = self.step_groups
        check_step_groups(groups)
        problems = []
        for name, precisions in self.sites.items():
            if len(precisions) != len(groups):
                problems.append(f"{name}: {len(precisions)} precisions for {len(groups)} step groups")
            elif len({precision.weight for precision in precisions}) > 1:
                problems.append(f"{name}: weight precision differs between step groups, but weights are stored once")
        if problems:
            raise ValueError("\n".join(problems))

    @classmethod
    def uniform(
        cls, precision: Precision, sites: Iterable[PlannedSite], protect: str | Sequence[str] = "first-last"
    ) -> Self:
        """One precision for all sites but the protected ones, which stay in 16 bits.

        `protect` is as of `unprotected`. The precision of the attention operands goes to the sites of kind qkv, which
        make them.
        """
        sites = list(sites)
        chosen = {site.name for site in unprotected(sites, protect)}

        def choose(site: PlannedSite) -> Precision:
            if site.name not in chosen:
                return Precision()
            return precision if site.kind == "qkv" else replace(precision, attention=None)

        return cls({site.name: (choose(site),) for site in sites})

    def __getitem__(self, site: str) -> tuple[Precision, ...]:
        return self.sites[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def weight(self, site: str) -> TensorPrecision | None:
        """Precision of a site's weight."""
        return self.sites[site][0].weight

    def at(self, site: str, step: int) -> Precision:
        """Precision of a site in a step."""
        return self.sites[site][step_group(self.step_groups, step)]

    def to_json(self) -> dict[str, Any]:
        """The plan in plain values."""
        sites = {name: [str(precision) for precision in precisions] for name, precisions in self.sites.items()}
        return {"step_groups": list(self.step_groups), "sites": sites}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The plan that `to_json` gave. Raises ValueError naming what is missing or the site that cannot be read."""
        if missing := {"step_groups", "sites"} - value.keys():
            raise ValueError(f"not a bit plan: {' and '.join(sorted(missing))} missing")
        sites = {}
        for name, precisions in value["sites"].items():
            try:
                sites[name] = tuple(Precision.parse(text) for text in precisions)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return cls(sites, tuple(value["step_groups"]))


def step_group(step_groups: Sequence[int], step: int) -> int:
    """Index of the group that a step is in."""
    return bisect_right(step_groups, step) - 1
