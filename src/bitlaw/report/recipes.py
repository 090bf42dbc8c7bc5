"""How each precision is drawn.

Colour is weight bits (one sequence, blue to orange, lightness rising throughout so that it reads without hue), dash is
activation bits, marker is activation bits and the kind of number, or the method where a study compares methods. A new
precision finds its place without a table.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bitlaw.formats import format_name
from bitlaw.precision import FULL_BITS, Precision
from bitlaw.scaling.records import Cell

# From most to fewest weight bits; each at least 3:1 against its background.
LIGHT = ("#2a1f73", "#2757a3", "#0a807d", "#5f9018", "#c87f00")
DARK = ("#8288ee", "#59a6ee", "#45c6b4", "#a6d860", "#ffd470")

METHOD_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "star", "pentagon")


@dataclass(frozen=True)
class Recipe:
    """A precision, and a method where the study has several: one line in the plots."""

    label: str
    precision: str
    method: str
    light: str
    dark: str
    dash: str
    symbol: str
    full: bool

    def drawn(self) -> dict[str, Any]:
        """What the page's script needs of it."""
        names = ("label", "light", "dark", "dash", "symbol", "full")
        return {name: getattr(self, name) for name in names}


def recipes_of(cells: Iterable[Cell]) -> dict[str, Recipe]:
    """The recipes of a study by label: integer weight-only from 16 bits down, floats, then quantized activations."""
    found = sorted({(Precision.parse(cell.precision), cell.method) for cell in cells}, key=_order)
    methods = sorted({method for precision, method in found if not precision.is_full})
    weight_bits = sorted({precision.weight_bits for precision, _ in found}, reverse=True)
    recipes = {}
    for precision, method in found:
        named = len(methods) > 1 and not precision.is_full
        position = weight_bits.index(precision.weight_bits) / max(1, len(weight_bits) - 1)
        label = f"{precision} {method}" if named else str(precision)
        recipes[label] = Recipe(
            label=label,
            precision=str(precision),
            method=method,
            light=_blend(LIGHT, position),
            dark=_blend(DARK, position),
            dash=_dash(precision),
            symbol=METHOD_SYMBOLS[methods.index(method) % len(METHOD_SYMBOLS)] if named else _symbol(precision),
            full=precision.is_full,
        )
    return recipes


def _order(pair: tuple[Precision, str]) -> tuple[bool, bool, float, float, str, str]:
    precision, method = pair
    quantized = min(precision.activation_bits, precision.attention_bits) < FULL_BITS
    bits = (-precision.weight_bits, -precision.activation_bits)
    return (quantized, not _is_integer(precision), *bits, str(precision), method)


def _is_integer(precision: Precision) -> bool:
    return precision.weight is None or format_name(precision.weight.format).startswith("int")


def _dash(precision: Precision) -> str:
    bits = precision.activation_bits
    return "solid" if bits >= FULL_BITS else "dash" if bits >= 8 else "dot"


def _symbol(precision: Precision) -> str:
    if not _is_integer(precision):
        return "diamond"
    return {"solid": "circle", "dash": "square", "dot": "triangle-up"}[_dash(precision)]


def _blend(colors: tuple[str, ...], position: float) -> str:
    """The colour at a position 0 .. 1 along a sequence."""
    place = position * (len(colors) - 1)
    index = min(int(place), len(colors) - 2)
    share = place - index
    channels = [
        round(int(colors[index][i : i + 2], 16) * (1 - share) + int(colors[index + 1][i : i + 2], 16) * share)
        for i in (1, 3, 5)
    ]
    return "#" + "".join(f"{channel:02x}" for channel in channels)
