"""Floating-point numbers of 2 to 8 bits with a scale.

Legend: G groups, N numbers in a group.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from bitlaw.formats.format import Format, Params, nonzero

# Magnitudes at the top of two 8-bit layouts that are no numbers: the NaN of e4m3 ("fn") and the Inf and NaN of e5m2.
# Every other layout uses all of its bit patterns.
_RESERVED = {(4, 3): 1, (5, 2): 4}


# Numbers rounded at a time: what lies between stays in the cache, and small buffers are not handed back to the system.
_PART = 2**17


@dataclass(frozen=True)
class FloatFormat(Format):
    """scale * ExMy: a sign bit, x exponent bits with bias 2^(x-1) - 1, y mantissa bits, subnormals, no Inf or NaN.

    The scale maps max|x| to the largest magnitude. Rounding is to the nearest, ties to the even multiple of the step
    at x, which is the even mantissa (without a mantissa: the greater magnitude, or 0). A code is the bit pattern.

    A group whose numbers are all c has scale |c| / 2^k with 2^k the largest power of two in the layout, so that c comes
    back exactly (to the rounding of a stored scale to float16). A group of zeros has scale 1.
    """

    exponent_bits: int
    mantissa_bits: int

    def __post_init__(self) -> None:
        bits = 1 + self.exponent_bits + self.mantissa_bits
        if self.exponent_bits < 1 or self.mantissa_bits < 0 or not 2 <= bits <= 8:
            raise ValueError(
                f"e{self.exponent_bits}m{self.mantissa_bits}: float layouts have a sign bit, 1 or more exponent bits "
                "and at most 8 bits in all"
            )

    @property
    def bits(self) -> int:
        """Bits of a number, its sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def code_bits(self) -> float:
        return self.bits

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.uint8

    @property
    def largest(self) -> float:
        """The largest magnitude at scale 1: 448 for e4m3, 6 for e2m1."""
        return _magnitudes(self.exponent_bits, self.mantissa_bits)[-1]

    @property
    def values(self) -> Tensor:
        """The number of each bit pattern at scale 1, float32 (2^bits,); NaN where a pattern is reserved."""
        magnitudes = torch.full((2 ** (self.bits - 1),), torch.nan)
        known = _magnitudes(self.exponent_bits, self.mantissa_bits)
        magnitudes[: len(known)] = torch.tensor(known)
        return torch.cat([magnitudes, -magnitudes])

    def fit(self, x_GN: Tensor, importance_GN: Tensor | None = None) -> Params:
        low_G1, high_G1 = x_GN.amin(-1, keepdim=True), x_GN.amax(-1, keepdim=True)
        largest_power = 2.0 ** (math.frexp(self.largest)[1] - 1)
        width_G1 = torch.maximum(high_G1, -low_G1)
        return {"scale_G1": nonzero(width_G1 / torch.where(low_G1 == high_G1, largest_power, self.largest))}

    def encode(self, x_GN: Tensor, params: Params) -> Tensor:
        y_GN = (x_GN / params["scale_G1"].to(torch.float32)).clamp_(-self.largest, self.largest)
        # The code of a magnitude on the grid is its own exponent and mantissa fields with another bias; below the first
        # normal number it is the multiple of the subnormal step.
        bits_GN = self._round(y_GN).abs().view(torch.int32)
        normal_GN = (bits_GN >> (23 - self.mantissa_bits)) - ((self._smallest_exponent + 126) << self.mantissa_bits)
        step = 2.0 ** (self._smallest_exponent - self.mantissa_bits)
        subnormal_GN = (bits_GN.view(torch.float32) / step).to(torch.int32)
        codes_GN = torch.where(bits_GN.view(torch.float32) < 2.0**self._smallest_exponent, subnormal_GN, normal_GN)
        return codes_GN.add_(x_GN.signbit().to(torch.int32) << (self.bits - 1)).to(torch.uint8)

    def decode(self, codes_GN: Tensor, params: Params) -> Tensor:
        return self.values.to(codes_GN.device)[codes_GN.to(torch.int32)].mul_(params["scale_G1"].to(torch.float32))

    def nearest(self, x_GN: Tensor, params: Params) -> Tensor:
        scale_G1 = params["scale_G1"].to(torch.float32)
        return self._round((x_GN / scale_G1).clamp_(-self.largest, self.largest)).mul_(scale_G1)

    def fake(self, x_GN: Tensor) -> Tensor:
        scale_G1 = self.fit(x_GN)["scale_G1"]
        return self._round(x_GN / scale_G1).mul_(scale_G1)

    @property
    def _smallest_exponent(self) -> int:
        """Exponent of the first normal number."""
        return 2 - 2 ** (self.exponent_bits - 1)

    def _round(self, y_GN: Tensor) -> Tensor:
        """`y_GN` rounded to the grid at scale 1, in place. The caller keeps |y| below the largest magnitude.

        Adding 1.5 * 2^(23+k) to a float32 and taking it away again leaves the nearest multiple of 2^k, ties to even.
        Here 2^k is the grid's step at y, 2^(max(exponent of y, smallest exponent) - mantissa bits).
        """
        smallest_bits = (self._smallest_exponent + 127) << 23
        to_shift = ((23 - self.mantissa_bits) << 23) + 0x400000
        for part_gN in y_GN.split(max(1, _PART // y_GN.shape[1])):
            shift_gN = (part_gN.view(torch.int32) & 0x7F800000).clamp_min_(smallest_bits).add_(to_shift)
            part_gN.add_(shift_gN.view(torch.float32)).sub_(shift_gN.view(torch.float32))
        return y_GN


@lru_cache
def _magnitudes(exponent_bits: int, mantissa_bits: int) -> tuple[float, ...]:
    """Every non-negative number of a layout, ascending: the number of code 0, 1, 2 ..."""
    smallest = 2 - 2 ** (exponent_bits - 1)
    magnitudes = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            significand = mantissa / 2**mantissa_bits + (exponent > 0)
            magnitudes.append(significand * 2.0 ** (smallest + max(exponent - 1, 0)))
    return tuple(magnitudes[: len(magnitudes) - _RESERVED.get((exponent_bits, mantissa_bits), 0)])
