"""Quantized tensors, and modules that compute with them in floating point ("simulated", or fake, quantization).

Legend: O output channels, I input channels, G groups, N numbers in a group; B images, C channels, H height, W width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import ClassVar, Literal, Protocol, Self

import torch.nn.functional as F
from torch import Tensor, nn

from bitlaw.formats import Format, Params
from bitlaw.linear import linear
from bitlaw.precision import GroupSize, Precision, TensorPrecision, step_group


class Clock(Protocol):
    """Tells which step of the rollout is running (`models.generator.StepClock`)."""

    step: int


def all_finite(x: Tensor) -> bool:
    """No NaN and no Inf. They stay in a sum, which is cheaper than asking each number, but which may overflow."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


# ---- weights ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightSpec:
    """How a weight is to be stored: a format, and the inputs of an output channel that share its parameters.

    The inputs of a linear are its input channels; those of a convolution are the numbers of a window that an output
    channel weighs, in the order of its weight: (channel, row, column).

    group_size: None for a whole output channel, "tensor" for everything
    """

    format: Format
    group_size: GroupSize = None

    @classmethod
    def of(cls, precision: TensorPrecision) -> Self:
        """The spec that a precision means."""
        return cls(precision.format, precision.group_size)

    def problem(self, shape: Sequence[int]) -> str | None:
        """Why a weight of this shape cannot have these groups, and what to do; None if it can."""
        num_inputs = prod(shape[1:])
        if not isinstance(self.group_size, int) or num_inputs % self.group_size == 0:
            return None
        common = gcd(num_inputs, self.group_size)
        remedy = f"use {common}" if common >= 8 else "use one scale for each output channel (no g)"
        inputs = f"{num_inputs} input channels"
        if len(shape) == 4:
            inputs = f"{num_inputs} inputs ({shape[1]} channels x {shape[2]} x {shape[3]} kernel)"
        found = f"{inputs}, not a multiple of group size {self.group_size}"
        return f"{found}; {remedy} or protect this site"

    def num_groups(self, shape: Sequence[int]) -> int:
        """Groups of a weight of this shape."""
        return 1 if self.group_size == "tensor" else prod(shape) // (self.group_size or prod(shape[1:]))

    def groups(self, weight: Tensor) -> Tensor:
        """A view of `weight` (O, I), or of a convolution's (O, I, kh, kw), as (G, N); a row's groups are neighbours."""
        return weight.reshape(self.num_groups(weight.shape), -1)

    def fit(self, weight: Tensor, clip: float = 1.0, importance_I: Tensor | None = None) -> Params:
        """Parameters of each group as they will be stored, for a range `clip` times that of the weights."""
        importance_GN = None
        if importance_I is not None:
            importance_GN = self.groups(importance_I.expand(weight.shape[0], -1))
        return self.format.storable(self.format.fit(self.groups(weight.float() * clip), importance_GN))

    def quantize(
        self, weight: Tensor, clip: float = 1.0, importance_I: Tensor | None = None, name: str = "weight"
    ) -> "QuantizedTensor":
        """Each weight to the nearest code. ValueError, with `name`, for NaN, Inf or groups that do not divide."""
        if not all_finite(weight):
            raise ValueError(f"{name}: NaN or Inf in the weights; nothing can be quantized from them")
        if problem := self.problem(weight.shape):
            raise ValueError(f"{name}: {problem}")
        params = self.fit(weight, clip, importance_I)
        codes_GN = self.format.encode(self.groups(weight.float()), params)
        return QuantizedTensor(codes_GN.reshape(weight.shape[0], -1), params, self, tuple(weight.shape))


@dataclass(frozen=True)
class StoredBits:
    """Bits that a tensor takes as it is stored, padding to whole words included."""

    codes: int
    scales: int = 0
    zeros: int = 0
    other: int = 0
    """Further parameters of the format, such as codebooks."""

    @property
    def total(self) -> int:
        """All of them. The bytes that hold the shape count with the file's header."""
        return self.codes + self.scales + self.zeros + self.other

    def __add__(self, more: "StoredBits") -> "StoredBits":
        return StoredBits(
            self.codes + more.codes, self.scales + more.scales, self.zeros + more.zeros, self.other + more.other
        )


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A weight in few bits.

    codes: (O, codes in a row), as the format gives them
    params: the format's parameters, (G, 1) each, groups of a row being neighbours
    shape: that of the weight: (O, I), or a convolution's (O, I, kh, kw)
    """

    codes: Tensor
    params: Params
    spec: WeightSpec
    shape: tuple[int, ...]

    def decode(self) -> Tensor:
        """The weight, float32; the same bits whenever it is called."""
        codes_GN = self.codes.reshape(self.spec.num_groups(self.shape), -1)
        return self.spec.format.decode(codes_GN, self.params).reshape(self.shape)

    def bits(self) -> StoredBits:
        """Bits in the layout of `packing`, which asserts that its tensors have just so many."""
        rows, width = self.shape[0], self.spec.format.code_width
        params = {name: 8 * param.nbytes for name, param in self.params.items()}
        scales, zeros = params.pop("scale_G1", 0), params.pop("zero_G1", 0)
        if zeros and self.spec.group_size != "tensor":  # one column of zero points for each group of a row
            zeros = self.params["zero_G1"].numel() // rows * packed_bits(rows, width)
        return StoredBits(rows * packed_bits(self.codes.shape[1], width), scales, zeros, sum(params.values()))


def packed_bits(count: int, width: int) -> int:
    """Bits of `count` codes in whole words of 32; above 8 bits the low 8 and the rest are packed apart."""
    if width > 8:
        return packed_bits(count, 8) + packed_bits(count, width - 8)
    return -(-count * width // 32) * 32


# ---- activations --------------------------------------------------------------------------------------


RangeOf = Literal["token", "image", "tensor"]
"""What shares a range: the last dimension, the last three (C, H, W), or everything."""


@dataclass(frozen=True)
class ActivationSpec:
    """Dynamic quantization of activations: a range for each token, for each image or for the tensor at hand."""

    format: Format
    range_of: RangeOf = "token"

    @classmethod
    def of(cls, precision: TensorPrecision, range_of: RangeOf = "token") -> Self:
        """The spec that a precision means; `range_of` is what a layer of this kind does where it has no `t`."""
        return cls(precision.format, "tensor" if precision.group_size == "tensor" else range_of)

    def fake(self, x: Tensor) -> Tensor:
        """`x` rounded to what its codes can say, in the type of x; rounding passes no gradient.

        With a range for each token or image none sees another: a result does not depend on the batch.
        """
        shared = {"token": x.shape[-1:], "image": x.shape[-3:], "tensor": x.shape}[self.range_of]
        x_GN = x.detach().float().reshape(-1, prod(shared))
        return self.format.fake(x_GN).view(x.shape).to(x.dtype)


class FakeQuant(nn.Module):
    """Quantizes activations as the step group of the running step says; None leaves them as they are."""

    def __init__(self, specs: Sequence[ActivationSpec | None], step_groups: Sequence[int], clock: Clock):
        super().__init__()
        assert len(specs) == len(step_groups)
        self.specs, self.step_groups, self.clock = tuple(specs), tuple(step_groups), clock

    def forward(self, x: Tensor) -> Tensor:
        """x, of the same shape."""
        spec = self.specs[step_group(self.step_groups, self.clock.step)]
        return x if spec is None else spec.fake(x)

    def extra_repr(self) -> str:
        return f"{self.specs}, step_groups={self.step_groups}"


# ---- layers -------------------------------------------------------------------------------------------


class QuantLayer(nn.Module):
    """A layer that computes with the decoded weight and fake-quantized inputs; subclasses say what it computes.

    precisions: for each step group; all have the same weight precision
    quantized: the weight, or None where it stays as it is
    """

    range_of: ClassVar[RangeOf]
    """What has a range of its own in the layer's inputs."""
    quantized: QuantizedTensor | None
    weight: Tensor

    def __init__(
        self,
        layer: nn.Linear | nn.Conv2d,
        quantized: QuantizedTensor | None,
        precisions: Sequence[Precision],
        step_groups: Sequence[int],
        clock: Clock,
    ):
        super().__init__()
        self.precisions, self.quantized = tuple(precisions), quantized
        specs = [ActivationSpec.of(p.activation, self.range_of) if p.activation else None for p in precisions]
        self.input_quant = FakeQuant(specs, step_groups, clock)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        if quantized is None:
            self.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        else:
            assert quantized.shape == tuple(layer.weight.shape)
            # Not in the state dict: `packing` stores the codes.
            self.register_buffer("weight", quantized.decode().to(layer.weight), persistent=False)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, {', '.join(map(str, self.precisions))}"


class QuantLinear(QuantLayer):
    """nn.Linear with rounded operands; a range for each token."""

    range_of = "token"

    def __init__(
        self,
        linear: nn.Linear,
        quantized: QuantizedTensor | None,
        precisions: Sequence[Precision],
        step_groups: Sequence[int],
        clock: Clock,
    ):
        super().__init__(linear, quantized, precisions, step_groups, clock)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return linear(self.input_quant(x), self.weight, self.bias)


class QuantConv2d(QuantLayer):
    """nn.Conv2d with rounded operands; a range for each image. What pads the image are exact zeros."""

    range_of = "image"

    def __init__(
        self,
        conv: nn.Conv2d,
        quantized: QuantizedTensor | None,
        precisions: Sequence[Precision],
        step_groups: Sequence[int],
        clock: Clock,
    ):
        super().__init__(conv, quantized, precisions, step_groups, clock)
        assert conv.padding_mode == "zeros"  # `install.check_plan` has seen to it
        self.in_channels, self.out_channels, self.kernel_size = conv.in_channels, conv.out_channels, conv.kernel_size
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) -> (B, O, H', W')."""
        x = self.input_quant(x)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
