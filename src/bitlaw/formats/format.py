"""What a number may be: the interface of number formats.

Legend: G groups, N numbers in a group. A group shares its parameters (a scale, a zero point). Whether a group is a
tensor, an output channel, 128 input channels or a token is not a format's concern.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

Params = dict[str, Tensor]
"""Parameters of all groups. "scale_G1" and "zero_G1" are one number a group, "codebook_GKD" (int8) is K vectors of D
numbers a group; other names are the format's own."""

SMALLEST_FLOAT16_SCALE = 2.0**-20
"""Below this float16 has fewer than 5 significant bits."""

_BEYOND = 1e30  # outside of every range


class Format(ABC):
    """A set of numbers, and how a group of real numbers is mapped to it. Subclasses are frozen dataclasses."""

    @property
    def param_names(self) -> tuple[str, ...]:
        """Names of what `fit` gives."""
        return ("scale_G1",)

    @property
    def values_per_code(self) -> int:
        """Numbers that one code stands for: 1, or the dimension where a code is the index of a vector."""
        return 1

    @property
    def codebook_shape(self) -> tuple[int, ...]:
        """(K, D) of a group's codebook; () without one. A group that has one is large: a rectangle of many rows."""
        return ()

    @property
    @abstractmethod
    def code_bits(self) -> float:
        """Nominal bits of a number, without scales, zero points and codebooks."""

    @property
    def code_width(self) -> int:
        """Bits of a stored code."""
        return round(self.code_bits * self.values_per_code)

    @property
    def code_dtype(self) -> torch.dtype:
        """Type of codes in memory: signed integers of `code_width` bits in int8 or int16, or bit patterns in uint8."""
        return torch.int8 if self.code_width <= 8 else torch.int16

    @abstractmethod
    def fit(self, x_GN: Tensor, importance_GN: Tensor | None = None) -> Params:
        """Parameters for each group, float32. `importance_GN` weights squared errors where a format minimises them.

        A group's parameters depend on that group only. fit(a * x) decodes to a * fit(x), so that a range is clipped by
        fitting to a smaller x.
        """

    @abstractmethod
    def encode(self, x_GN: Tensor, params: Params) -> Tensor:
        """The code of the nearest representable number; what lies outside the range saturates."""

    @abstractmethod
    def decode(self, codes_GN: Tensor, params: Params) -> Tensor:
        """The numbers that codes stand for, float32."""

    def nearest(self, x_GN: Tensor, params: Params) -> Tensor:
        """`decode(encode(x))`, float32: the nearest representable numbers. Formats replace it with a faster equal."""
        return self.decode(self.encode(x_GN, params), params)

    def fake(self, x_GN: Tensor) -> Tensor:
        """`decode(encode(x))` with parameters fitted to x, float32. Formats replace it with a faster equal."""
        params = self.fit(x_GN)
        return self.decode(self.encode(x_GN, params), params)

    def ends(self, params: Params) -> Tensor:
        """The least and the greatest number of each group (G, 2): what lies beyond them is rounded to them."""
        scale_G1 = params["scale_G1"]
        beyond_G2 = torch.tensor([[-_BEYOND, _BEYOND]], device=scale_G1.device).expand(len(scale_G1), -1)
        return self.nearest(beyond_G2, params)

    def within(self, x_GN: Tensor, params: Params) -> Tensor:
        """Which numbers, bool (G, N), lie in the range: what `nearest` does to others is not rounding but clipping."""
        low_G1, high_G1 = self.ends(params).split(1, dim=1)
        return (x_GN >= low_G1) & (x_GN <= high_G1)

    def storable(self, params: Params) -> Params:
        """`params` as a checkpoint holds them, exactly: scales in float16. Encode with these, not with `fit`'s."""
        return params | {"scale_G1": round_scale(params["scale_G1"])} if "scale_G1" in params else params


def round_scale(scale_G1: Tensor) -> Tensor:
    """Positive scales rounded up to float16.

    Up, because a scale that is a little too small clips the ends of its range, which costs more than a step that is a
    little too wide (5 dB at 16 bits, where a step wider by 2^-10 costs 0.01 dB). Where a scale of the tensor lies
    outside [2^-20, 65504] all of them stay in float32, and count as 32 bits: they never become 0 or infinite.
    """
    if scale_G1.min() < SMALLEST_FLOAT16_SCALE or scale_G1.max() > torch.finfo(torch.float16).max:
        return scale_G1
    nearest_G1 = scale_G1.to(torch.float16)
    above_G1 = torch.nextafter(nearest_G1, torch.full_like(nearest_G1, torch.inf))
    return torch.where(nearest_G1.to(torch.float32) < scale_G1, above_G1, nearest_G1)


def nonzero(scale_G1: Tensor) -> Tensor:
    """Scales with 1 in place of those too small to divide by (of zeros, or of float32 subnormals), in place."""
    return scale_G1.masked_fill_(scale_G1 < torch.finfo(torch.float32).tiny, 1.0)
