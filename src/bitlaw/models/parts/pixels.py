"""Images as bytes and as numbers in [-1, 1].

Legend: B images, C channels, H height, W width.
"""

from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["nearest", "half-even", "truncate"]


def to_uint8(images_BCHW: Tensor, rounding: Rounding = "nearest") -> Tensor:
    """uint8 images from numbers in [-1, 1]; what lies outside is clamped.

    "nearest" rounds (x + 1) / 2 * 255 half up, as DiT does; "half-even" to the even neighbour of a half, as MAR does;
    "truncate" cuts the fraction off, as VAR's demo does.
    """
    if rounding == "half-even":
        return ((images_BCHW + 1) / 2 * 255).clamp_(0, 255).round_().to(torch.uint8)
    offset = {"nearest": 128.0, "truncate": 127.5}[rounding]
    return (images_BCHW * 127.5 + offset).clamp_(0, 255).to(torch.uint8)


def from_uint8(images_BCHW: Tensor) -> Tensor:
    """Numbers in [-1, 1], float32, from uint8 images: 2 x / 255 - 1."""
    return images_BCHW.float().mul_(2 / 255).sub_(1)
