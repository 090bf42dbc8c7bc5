"""Integers of 1 to 16 bits with a scale, and with a zero point where they are asymmetric.

Legend: G groups, N numbers in a group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitlaw.formats.format import Format, Params, nonzero


@dataclass(frozen=True)
class IntegerFormat(Format):
    """scale * (q - z) with q in 0 .. 2^bits - 1 (asymmetric), or scale * q with |q| <= 2^(bits-1) - 1 (symmetric).

    Asymmetric (P0 eq. 4-6; as printed z is divided by the scale twice): s = (u - l) / (2^bits - 1), z = round(-l / s),
    q = clip(round(x / s) + z, 0, 2^bits - 1), where [l, u] is the range of the group with 0. Codes and zero points are
    kept less 2^(bits-1), in signed integers, which changes no q - z.
    Symmetric: s = max|x| / (2^(bits-1) - 1); it needs 2 bits or more.
    Symmetric with `full_range`, the convention of the original GPTQ code: s = max|x| / ((2^bits - 1) / 2) and q from
    -2^(bits-1) to 2^(bits-1) - 1. Its steps are finer by one part in 2^bits - 1, and the largest number of a range is
    clipped by half a step where it is positive. It has no name in FORMATS.

    A group whose numbers are all c has scale |c| and code +-1, so that c comes back exactly (to the rounding of a
    stored scale to float16), which s * (2^bits - 1) would not give. A group of zeros has scale 1. Scales below 1e-38
    cannot be divided by: such a group is zero.
    """

    bits: int
    symmetric: bool = False
    full_range: bool = False

    def __post_init__(self) -> None:
        if self.full_range and not self.symmetric:
            raise ValueError("full_range is for symmetric integers; asymmetric ones use all of their codes anyway")
        lowest = 2 if self.symmetric else 1
        if not lowest <= self.bits <= 16:
            kind = "symmetric" if self.symmetric else "asymmetric"
            raise ValueError(f"{kind} integers have {lowest} to 16 bits, not {self.bits}")

    @property
    def code_bits(self) -> float:
        return self.bits

    @property
    def param_names(self) -> tuple[str, ...]:
        return ("scale_G1",) if self.symmetric else ("scale_G1", "zero_G1")

    @property
    def lowest(self) -> int:
        """The smallest code."""
        return -self.highest if self.symmetric and not self.full_range else -(2 ** (self.bits - 1))

    @property
    def highest(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1

    def fit(self, x_GN: Tensor, importance_GN: Tensor | None = None) -> Params:
        scale_G1, bottom_G1 = self._range(x_GN)
        if bottom_G1 is None:
            return {"scale_G1": scale_G1}
        return {"scale_G1": scale_G1, "zero_G1": (self.lowest - bottom_G1).to(self.code_dtype)}

    def encode(self, x_GN: Tensor, params: Params) -> Tensor:
        q_GN = (x_GN / params["scale_G1"].to(torch.float32)).round_()
        if not self.symmetric:
            q_GN.add_(params["zero_G1"])
        return q_GN.clamp_(self.lowest, self.highest).to(self.code_dtype)

    def decode(self, codes_GN: Tensor, params: Params) -> Tensor:
        q_GN = codes_GN.to(torch.float32)
        if not self.symmetric:
            q_GN.sub_(params["zero_G1"])
        return q_GN.mul_(params["scale_G1"].to(torch.float32))

    def nearest(self, x_GN: Tensor, params: Params) -> Tensor:
        scale_G1 = params["scale_G1"].to(torch.float32)
        q_GN = (x_GN / scale_G1).round_()
        if self.symmetric:
            return q_GN.clamp_(self.lowest, self.highest).mul_(scale_G1)
        return q_GN.add_(params["zero_G1"]).clamp_(self.lowest, self.highest).sub_(params["zero_G1"]).mul_(scale_G1)

    def fake(self, x_GN: Tensor) -> Tensor:
        # Rounded numbers stay floats, and the zero point moves from the numbers to their bounds. Only the upper bound
        # can be passed, where -l/s and u/s are both rounded up. On a CPU `torch.aminmax` and `clamp` with tensor bounds
        # are 10 times slower than the calls used here. Fused multiply-adds could round by place in memory: none here.
        scale_G1, bottom_G1 = self._range(x_GN)
        q_GN = (x_GN / scale_G1).round_()
        if bottom_G1 is not None:
            torch.minimum(q_GN, bottom_G1.add_(self.highest - self.lowest), out=q_GN)
        elif self.full_range:
            q_GN.clamp_max_(self.highest)
        return q_GN.mul_(scale_G1)

    def _range(self, x_GN: Tensor) -> tuple[Tensor, Tensor | None]:
        """(scale, multiple of it at the bottom of the range), both float32; no bottom if symmetric."""
        low_G1, high_G1 = x_GN.amin(-1, keepdim=True), x_GN.amax(-1, keepdim=True)
        constant_G1 = low_G1 == high_G1
        if self.symmetric:
            width_G1 = torch.maximum(high_G1, -low_G1)
            largest = self.highest + 0.5 * self.full_range
            return nonzero(torch.where(constant_G1, width_G1, width_G1 / largest)), None
        low_G1 = low_G1.clamp_max_(0)
        width_G1 = high_G1.clamp_min_(0) - low_G1
        scale_G1 = nonzero(torch.where(constant_G1, width_G1, width_G1 / (2**self.bits - 1)))
        return scale_G1, (low_G1 / scale_G1).round_()
