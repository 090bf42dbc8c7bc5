"""Layers that compute what they did before, but are easier to quantize: rescaled inputs, and a branch of low rank.

A method that finds an equivalent network (SmoothQuant, OmniQuant, SVDQuant) puts these in the place of linears and
convolutions, where what it does to their inputs cannot be folded into the layer before. Quantized layers keep
both parts.

Legend: O output channels, I input channels, C input channels of a linear or convolution, R rank.
"""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlaw.linear import linear

STORED = torch.float16
"""Type in which the parts are stored. They are rounded to it when they are made, so that nothing changes on saving."""


class InputScaling(nn.Module):
    """x -> (x - shift) / scale for each channel: the last dimension, or the second of images.

    scale_C, shift_C: float32 numbers that float16 holds; `rounded` makes them so. shift None is 0.
    """

    scale_C: Tensor
    shift_C: Tensor | None

    def __init__(self, scale_C: Tensor, shift_C: Tensor | None = None):
        super().__init__()
        for given in (scale_C, shift_C):
            assert given is None or torch.equal(given, given.to(STORED).float())
        self.register_buffer("scale_C", scale_C, persistent=False)
        self.register_buffer("shift_C", shift_C, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self._apply_to(x, (-1,))

    def of_images(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self._apply_to(x_BCHW, (-1, 1, 1))

    def _apply_to(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        if self.shift_C is not None:
            x = x - self.shift_C.view(shape).to(x.dtype)
        return x / self.scale_C.view(shape).to(x.dtype)


def rounded(scale_C: Tensor) -> Tensor:
    """Scales or shifts as they will be stored, in float32. Scales stay above 0."""
    largest = torch.finfo(STORED).max
    out_C = scale_C.float().clamp(-largest, largest).to(STORED).float()
    smallest = 2.0**-14  # the first normal number
    return torch.where((scale_C > 0) & (out_C < smallest), smallest, out_C)


class LowRankBranch(nn.Module):
    """x -> up down x, added to what the quantized layer gives; it computes in 16 bits (SVDQuant, Li et al. 2024).

    down_RI, up_OR: numbers that float16 holds
    """

    down_RI: Tensor
    up_OR: Tensor

    def __init__(self, down_RI: Tensor, up_OR: Tensor):
        super().__init__()
        assert len(down_RI) == up_OR.shape[1]
        self.register_buffer("down_RI", down_RI, persistent=False)
        self.register_buffer("up_OR", up_OR, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return linear(linear(x, self.down_RI.to(x.dtype)), self.up_OR.to(x.dtype))


class PreparedLinear(nn.Linear):
    """A linear of rescaled inputs, with a branch beside it; `weight` is that for the rescaled inputs."""

    scaling: InputScaling | None
    branch: LowRankBranch | None

    @classmethod
    def of(cls, layer: nn.Linear, scaling: InputScaling | None = None, branch: LowRankBranch | None = None) -> Self:
        """A layer with the weight and bias of another (which are not copied), and these parts or those it has."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.in_features, made.out_features = layer.in_features, layer.out_features
        made.weight, made.bias = layer.weight, layer.bias
        made.scaling = scaling or getattr(layer, "scaling", None)
        made.branch = branch or getattr(layer, "branch", None)
        return made.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        x = input if self.scaling is None else self.scaling(input)
        out = linear(x, self.weight, self.bias)
        return out if self.branch is None else out + self.branch(x)


class PreparedConv2d(nn.Conv2d):
    """A convolution of rescaled inputs; `weight` is that for the rescaled inputs.

    What pads the image is zero after the scaling, so that a shift has to be 0.
    """

    scaling: InputScaling | None
    branch: None = None

    @classmethod
    def of(cls, layer: nn.Conv2d, scaling: InputScaling | None = None) -> Self:
        """A layer with the weight and bias of another (which are not copied), and this scaling or the one it has."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        for name in (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "transposed",
            "output_padding",
            "groups",
            "padding_mode",
            "_reversed_padding_repeated_twice",
        ):
            setattr(made, name, getattr(layer, name))
        made.weight, made.bias = layer.weight, layer.bias
        made.scaling = scaling or getattr(layer, "scaling", None)
        assert made.scaling is None or made.scaling.shift_C is None
        return made.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        """(B, I, H, W) -> (B, O, H', W')."""
        x = input if self.scaling is None else self.scaling.of_images(input)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
