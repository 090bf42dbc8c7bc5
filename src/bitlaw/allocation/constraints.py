"""What a plan must keep to beside budgets: allowed widths, protected sites, least bits, sites that share a width."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from bitlaw.models.generator import Site
from bitlaw.names import unknown_name
from bitlaw.precision import FULL_BITS, PROTECTION


def sites_of(sites: Sequence[Site], text: str) -> list[str]:
    """Names of the sites that a text means: a rule of PROTECTION, a kind, a site's name, or a pattern (`blocks.0.*`).

    Several with "+". Raises ValueError, with the nearest names, for one that means none.
    """
    found: list[str] = []
    for part in text.split("+"):
        rule = PROTECTION.get(part)
        matching = [
            site.name
            for site in sites
            if (rule(site) if rule else part in (site.name, site.kind) or fnmatchcase(site.name, part))
        ]
        if not matching and part not in PROTECTION:
            known = [*PROTECTION, *dict.fromkeys(site.kind for site in sites), *(site.name for site in sites)]
            raise unknown_name(part, known, "site, kind of site or rule")
        found += matching
    return list(dict.fromkeys(found))


TIES: dict[str, Callable[[Site], Any]] = {
    "kind": lambda site: site.kind,
    "block": lambda site: site.block,
    "kind-in-block": lambda site: None if site.block is None else (site.kind, site.block),
}
"""What sites that share a width have in common, by name of the rule; None is in common with nothing."""


@dataclass(frozen=True)
class Constraints:
    """What a plan must keep to, beside its budgets. Sites are named as `sites_of` says.

    widths: that are allowed, those of hardware; () for those of the curves. 16 leaves a tensor as it is
    protect: sites that stay as they are; they count in bytes and compute bits, and not in other bits and their means
    min_bits: least bits by sites, "*" for all, of their weights and inputs
    tie: sites that share a width, their weights one and their inputs in a step group another: rules of TIES, or texts
        that mean several sites
    """

    widths: tuple[int, ...] = ()
    protect: tuple[str, ...] = ()
    min_bits: Mapping[str, int] = field(default_factory=dict)
    tie: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for width in (*self.widths, *self.min_bits.values()):
            if not 0 <= width <= FULL_BITS:
                raise ValueError(f"a width of {width} bits: must be from 0 to {FULL_BITS}")

    def least_bits(self, sites: Sequence[Site], name: str) -> int:
        """The least bits of a site."""
        given = self.min_bits.items()
        return max((bits for text, bits in given if text == "*" or name in sites_of(sites, text)), default=0)

    def tied(self, sites: Sequence[Site]) -> "Sets":
        """The names of all sites, those that share a width in one set."""
        merged = Sets(site.name for site in sites)
        for text in self.tie:
            if text not in TIES:
                merged.join(sites_of(sites, text))
                continue
            shared: dict[Any, list[str]] = {}
            for site in sites:
                if (common := TIES[text](site)) is not None:
                    shared.setdefault(common, []).append(site.name)
            for names in shared.values():
                merged.join(names)
        return merged

    def to_json(self) -> dict[str, Any]:
        """The constraints in plain values."""
        return {
            "widths": list(self.widths),
            "protect": list(self.protect),
            "min_bits": dict(self.min_bits),
            "tie": list(self.tie),
        }


class Sets:
    """Names in sets that may be joined."""

    def __init__(self, names: Iterable[str]):
        self._above = {name: name for name in names}

    def of(self, name: str) -> str:
        """A name that stands for the set of this one."""
        while self._above[name] != name:
            name = self._above[name]
        return name

    def join(self, names: Sequence[str]) -> None:
        """One set of those that these are in."""
        for name in names[1:]:
            self._above[self.of(name)] = self.of(names[0])
