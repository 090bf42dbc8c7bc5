"""Number formats, by name."""

from bitlaw.formats.codebook import Codebook
from bitlaw.formats.dropped import Dropped
from bitlaw.formats.floating import FloatFormat
from bitlaw.formats.format import Format, Params
from bitlaw.formats.integer import IntegerFormat

FORMATS: dict[str, Format] = {
    "int0": Dropped(),
    **{f"int{bits}": IntegerFormat(bits) for bits in range(1, 17)},
    **{f"int{bits}s": IntegerFormat(bits, symmetric=True) for bits in range(2, 17)},
    **{f"e{x}m{bits - 1 - x}": FloatFormat(x, bits - 1 - x) for bits in range(2, 9) for x in range(1, bits)},
    **{f"v{dim}b{bits}": Codebook(dim, bits) for dim, most in ((1, 8), (2, 6), (4, 3)) for bits in range(1, most + 1)},
}


def format_name(format: Format) -> str:
    """The name of a format in FORMATS; ValueError if it is not there."""
    for name, known in FORMATS.items():
        if known == format:
            return name
    raise ValueError(f"{format} is not in FORMATS; add it there to use it in a precision or a checkpoint")


__all__ = ["FORMATS", "Codebook", "Dropped", "FloatFormat", "Format", "IntegerFormat", "Params", "format_name"]
