"""Budgets in words: "300MB", "1.5GB", "2e9bits" <-> bits. MB = 10^6 bytes, MiB = 2^20."""

import math
import re

UNITS = {
    "bit": 1.0,
    "bits": 1.0,
    "kbit": 1e3,
    "Mbit": 1e6,
    "Gbit": 1e9,
    "Tbit": 1e12,
    "B": 8.0,
    "kB": 8e3,
    "KB": 8e3,
    "MB": 8e6,
    "GB": 8e9,
    "TB": 8e12,
    "KiB": 8 * 2.0**10,
    "MiB": 8 * 2.0**20,
    "GiB": 8 * 2.0**30,
}
_BUDGET = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([A-Za-z²]*)\s*")


def parse_bits(text: str) -> float:
    """The number of bits that a budget such as "300MB", "1.5 GB", "200kB" or "2e9bits" stands for.

    Bytes are B, kB, MB, GB, TB (powers of 1000) and KiB, MiB, GiB; bits are bit(s), kbit, Mbit, Gbit, Tbit. "bit²", the
    unit in which compute is printed, is accepted. Raises ValueError if there is no unit, an unknown one, or no
    positive number.
    """
    match = _BUDGET.fullmatch(text)
    if match is None:
        raise ValueError(f"budget '{text}': expected a number and a unit, such as 300MB, 1.5GB or 2e9bits")
    number, unit = float(match[1]), match[2].removesuffix("²")
    if not unit:
        raise ValueError(f"budget '{text}': a unit is missing; write {match[1]}MB or {match[1]}bits")
    if unit not in UNITS:
        meant = [known for known in UNITS if known.lower() == unit.lower()]
        hint = f"; did you mean {' or '.join(meant)}?" if meant else ""
        raise ValueError(f"budget '{text}': unknown unit '{unit}'{hint} Known: {', '.join(UNITS)}")
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"budget '{text}': must be more than 0 and finite")
    return number * UNITS[unit]


def format_bits(bits: float, axis: str = "model_bits", digits: int = 3) -> str:
    """A budget in words: bytes for sizes ("500 MB"), bits times bits for compute axes ("5.12e+11 bit²")."""
    if is_compute(axis):
        return f"{bits:.{digits}g} bit²"
    size = bits / 8
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor * (1 - 0.5 * 10.0**-digits):
            return f"{_plain(size / factor, digits)} {unit}"
    return f"{_plain(size, digits)} B"


def is_compute(axis: str) -> bool:
    """Whether an axis counts weight bits times activation bits rather than storage."""
    return axis.startswith("compute")


def round_budget(low: float, high: float, axis: str = "model_bits") -> float:
    """The round number (1, 2 or 5 times a power of ten, in bytes for sizes) nearest the geometric middle of a range."""
    unit = 1.0 if is_compute(axis) else 8.0
    middle = math.sqrt(low * high) / unit
    power = math.floor(math.log10(middle))
    rounds = [m * 10.0**power for m in (1, 2, 5, 10)]
    return unit * min(rounds, key=lambda value: abs(math.log(value / middle)))


def _plain(value: float, digits: int) -> str:
    """`digits` significant digits, without an exponent and without trailing zeros: 1.5, 300, 999."""
    decimals = max(0, digits - 1 - math.floor(math.log10(value))) if value > 0 else 0
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
