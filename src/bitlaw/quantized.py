"""Quantized tensors, and modules that compute with them in floating point ("simulated", or fake, quantization).

Legend: O output channels, I input channels, G groups, N numbers in a group; B images, C channels, H height, W width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd, prod
from typing import ClassVar, Literal, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlaw.formats import Format, Params
from bitlaw.linear import linear
from bitlaw.precision import GroupSize, Precision, TensorPrecision, step_group
from bitlaw.prepared import InputScaling, LowRankBranch


class Clock(Protocol):
    """Tells which step of the rollout is running (`models.generator.StepClock`)."""

    step: int


def all_finite(x: Tensor) -> bool:
    """No NaN and no Inf. They stay in a sum, which is cheaper than asking each number, but which may overflow."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


# ---- weights ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightSpec:
    """How a weight is to be stored: a format, and the weights that share its parameters.

    The inputs of a linear are its input channels; those of a convolution are the numbers of a window that an output
    channel weighs, in the order of its weight: (channel, row, column).

    group_size: inputs of an output channel; None for all of them, "tensor" for the whole weight

    A codebook is shared by more: its groups are rectangles of many rows by at most 256 inputs, the largest number of
    inputs that divides. There `group_size` counts all weights of the rectangle. None is for the smallest rectangle in
    which the codebook costs at most 1/8 bit a weight, or the whole weight where that is smaller.
    """

    format: Format
    group_size: GroupSize = None

    @classmethod
    def of(cls, precision: TensorPrecision) -> Self:
        """The spec that a precision means."""
        return cls(precision.format, precision.group_size)

    def problem(self, shape: Sequence[int]) -> str | None:
        """Why a weight of this shape cannot have these groups, and what to do; None if it can."""
        num_inputs, dim = prod(shape[1:]), self.format.values_per_code
        inputs = f"{num_inputs} input channels"
        if len(shape) == 4:
            inputs = f"{num_inputs} inputs ({shape[1]} channels x {shape[2]} x {shape[3]} kernel)"
        if num_inputs % dim:
            return f"{inputs}, not a multiple of the {dim} that share a code; use fewer dimensions or protect this site"
        size = self.group_size
        if not isinstance(size, int):
            return None
        if self.format.codebook_shape:
            sizes = {rows * columns for rows, columns in _rectangles(shape[0], num_inputs, dim)}
            if size in sizes:
                return None
            closest = min(sizes, key=lambda other: (max(other, size) / min(other, size), other))
            found = f"no rectangle of {size} weights divides {shape[0]} rows of {inputs}"
            return f"{found}; use g{closest}, no g, or protect this site"
        if num_inputs % size == 0:
            return None
        common = gcd(num_inputs, size)
        remedy = f"use {common}" if common >= 8 else "use one scale for each output channel (no g)"
        found = f"{inputs}, not a multiple of group size {size}"
        return f"{found}; {remedy} or protect this site"

    def rectangle(self, shape: Sequence[int]) -> tuple[int, int]:
        """Output channels and inputs of a group of a weight of this shape, in which there is no `problem`."""
        num_rows, num_inputs, dim = shape[0], prod(shape[1:]), self.format.values_per_code
        if self.group_size == "tensor":
            return num_rows, num_inputs
        assert self.group_size != "static"  # which `Precision` does not take for a weight
        if not self.format.codebook_shape:
            return 1, self.group_size or num_inputs
        choices = _rectangles(num_rows, num_inputs, dim)
        if self.group_size is not None:
            return next(choice for choice in choices if prod(choice) == self.group_size)
        least = 8 * 8 * prod(self.format.codebook_shape)  # entries have 8 bits, each weight bears 1/8
        widest = choices[0][1]
        taller = sorted(choice for choice in choices if choice[1] == widest)
        # Where 256 inputs or a divisor below have not enough rows.
        wider = sorted(_rectangles(num_rows, num_inputs, dim, widest=num_inputs), key=prod)
        return next((choice for choice in [*taller, *wider] if prod(choice) >= least), (num_rows, num_inputs))

    def num_groups(self, shape: Sequence[int]) -> int:
        """Groups of a weight of this shape."""
        return prod(shape) // prod(self.rectangle(shape))

    def groups(self, weight: Tensor) -> Tensor:
        """`weight` (O, I), or a convolution's (O, I, kh, kw), as (G, N): a view where groups lie in a row.

        Groups of the same rows are neighbours, and so are the inputs of a row inside a group.
        """
        return self.split(weight.flatten(1), weight.shape)

    def split(self, x_OM: Tensor, shape: Sequence[int]) -> Tensor:
        """Weights, or their codes, of a weight of this shape as (G, N)."""
        rows, columns = self.rectangle(shape)
        across = prod(shape[1:]) // columns
        return x_OM.reshape(shape[0] // rows, rows, across, -1).transpose(1, 2).reshape(self.num_groups(shape), -1)

    def join(self, x_GN: Tensor, shape: Sequence[int]) -> Tensor:
        """What `split` was given."""
        rows, columns = self.rectangle(shape)
        across = prod(shape[1:]) // columns
        return x_GN.reshape(shape[0] // rows, across, rows, -1).transpose(1, 2).reshape(shape[0], -1)

    def fit(self, weight: Tensor, clip: float = 1.0, importance_I: Tensor | None = None) -> Params:
        """Parameters of each group as they will be stored, for a range `clip` times that of the weights."""
        importance_GN = None
        if importance_I is not None:
            importance_GN = self.groups(importance_I.expand(weight.shape[0], -1))
        return self.format.storable(self.format.fit(self.groups(weight.float() * clip), importance_GN))

    def check(self, weight: Tensor, name: str = "weight") -> None:
        """Raise the ValueError of `quantize`."""
        if not all_finite(weight):
            raise ValueError(f"{name}: NaN or Inf in the weights; nothing can be quantized from them")
        if problem := self.problem(weight.shape):
            raise ValueError(f"{name}: {problem}")

    def quantize(
        self, weight: Tensor, clip: float = 1.0, importance_I: Tensor | None = None, name: str = "weight"
    ) -> "QuantizedTensor":
        """Each weight to the nearest code. ValueError, with `name`, for NaN, Inf or groups that do not divide."""
        self.check(weight, name)
        params = self.fit(weight, clip, importance_I)
        codes_GN = self.format.encode(self.groups(weight.float()), params)
        return QuantizedTensor(self.join(codes_GN, weight.shape), params, self, tuple(weight.shape))


def _rectangles(num_rows: int, num_inputs: int, dim: int, widest: int = 256) -> list[tuple[int, int]]:
    """Rectangles of at most `widest` inputs that divide a weight and hold whole vectors, the widest first."""
    columns = [columns for columns in _divisors(num_inputs) if columns <= widest and columns % dim == 0]
    return [(rows, c) for c in reversed(columns) for rows in _divisors(num_rows)]


@lru_cache
def _divisors(n: int) -> tuple[int, ...]:
    """Ascending."""
    return tuple(k for k in range(1, n + 1) if n % k == 0)


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
    params: the format's parameters, (G, ...) each, groups of the same rows being neighbours
    shape: that of the weight: (O, I), or a convolution's (O, I, kh, kw)
    """

    codes: Tensor
    params: Params
    spec: WeightSpec
    shape: tuple[int, ...]

    def decode(self) -> Tensor:
        """The weight, float32; the same bits whenever it is called."""
        weight_GN = self.spec.format.decode(self.spec.split(self.codes, self.shape), self.params)
        return self.spec.join(weight_GN, self.shape).reshape(self.shape)

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


RangeOf = Literal["token", "image", "tensor", "static"]
"""What shares a range: the last dimension, the last three (C, H, W), everything, or all that calibration has seen."""


@dataclass(frozen=True)
class ActivationSpec:
    """Quantization of activations: a range for each token, each image or the tensor at hand, or one known before."""

    format: Format
    range_of: RangeOf = "token"

    @classmethod
    def of(cls, precision: TensorPrecision, range_of: RangeOf = "token") -> Self:
        """The spec that a precision means; `range_of` is what a layer of this kind does where it says nothing."""
        own = precision.group_size
        return cls(precision.format, own if own == "tensor" or own == "static" else range_of)

    def fake(self, x: Tensor, params: Params | None = None) -> Tensor:
        """`x` rounded to what its codes can say, in the type of x. `params` (1, 1) are those of a static range.

        With a range for each token or image none sees another: a result does not depend on the batch. Gradients pass
        as if nothing were rounded, but for numbers outside of a static range, which pass none.
        """
        if self.range_of == "static":
            assert params is not None
            out = self.format.nearest(x.detach().float().reshape(1, -1), params)
        else:
            shared = {"token": x.shape[-1:], "image": x.shape[-3:], "tensor": x.shape}[self.range_of]
            out = self.format.fake(x.detach().float().reshape(-1, prod(shared)))
        out = out.view(x.shape).to(x.dtype)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return out
        passing = x
        if params is not None:
            low, high = self.format.ends(params)[0].to(x.dtype)
            passing = x.clamp(low, high)
        return passing + (out - passing).detach()


class FakeQuant(nn.Module):
    """Quantizes activations as the step group of the running step says; None leaves them as they are.

    ranges: parameters of static ranges, (S, 1) each, one row for each step group
    """

    def __init__(
        self,
        specs: Sequence[ActivationSpec | None],
        step_groups: Sequence[int],
        clock: Clock,
        ranges: Params | None = None,
    ):
        super().__init__()
        assert len(specs) == len(step_groups)
        self.specs, self.step_groups, self.clock = tuple(specs), tuple(step_groups), clock
        is_static = any(spec is not None and spec.range_of == "static" for spec in specs)
        assert is_static == bool(ranges), "static ranges without their parameters, or parameters without static ranges"
        self.param_names = tuple(ranges or ())
        for name, value in (ranges or {}).items():
            assert value.shape == (len(specs), 1)
            self.register_buffer(name, value, persistent=False)  # `packing` stores them

    @property
    def ranges(self) -> Params:
        """Parameters of static ranges, (S, 1); none where ranges are dynamic."""
        return {name: self.get_buffer(name) for name in self.param_names}

    def forward(self, x: Tensor) -> Tensor:
        """x, of the same shape."""
        group = step_group(self.step_groups, self.clock.step)
        spec = self.specs[group]
        if spec is None:
            return x
        if spec.range_of != "static":
            return spec.fake(x)
        return spec.fake(x, {name: value[group : group + 1] for name, value in self.ranges.items()})

    def extra_repr(self) -> str:
        return f"{self.specs}, step_groups={self.step_groups}"


# ---- layers -------------------------------------------------------------------------------------------


class QuantLayer(nn.Module):
    """A layer that computes with the decoded weight and fake-quantized inputs; subclasses say what it computes.

    precisions: for each step group; all have the same weight precision
    quantized: the weight, or None where it stays as it is
    scaling, branch: what a method put before and beside the layer, taken over from it (`prepared`)
    """

    range_of: ClassVar[RangeOf]
    """What has a range of its own in the layer's inputs."""
    quantized: QuantizedTensor | None
    scaling: InputScaling | None
    branch: LowRankBranch | None
    weight: Tensor

    def __init__(
        self,
        layer: nn.Linear | nn.Conv2d,
        quantized: QuantizedTensor | None,
        precisions: Sequence[Precision],
        step_groups: Sequence[int],
        clock: Clock,
        ranges: Params | None = None,
    ):
        super().__init__()
        self.precisions, self.quantized = tuple(precisions), quantized
        self.scaling, self.branch = getattr(layer, "scaling", None), getattr(layer, "branch", None)
        specs = [ActivationSpec.of(p.activation, self.range_of) if p.activation else None for p in precisions]
        self.input_quant = FakeQuant(specs, step_groups, clock, ranges)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        if quantized is None:
            self.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        else:
            self.hold(quantized, layer.weight)

    def hold(self, quantized: QuantizedTensor, like: Tensor) -> None:
        """Compute with this weight, in the type and on the device of `like`, which has its shape."""
        assert quantized.shape == tuple(like.shape)
        self.quantized = quantized
        # Not in the state dict: `packing` stores the codes.
        self.register_buffer("weight", quantized.decode().to(like), persistent=False)

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
        ranges: Params | None = None,
    ):
        super().__init__(linear, quantized, precisions, step_groups, clock, ranges)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        if self.scaling is not None:
            x = self.scaling(x)
        out = linear(self.input_quant(x), self.weight, self.bias)
        return out if self.branch is None else out + self.branch(x)


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
        ranges: Params | None = None,
    ):
        super().__init__(conv, quantized, precisions, step_groups, clock, ranges)
        assert conv.padding_mode == "zeros"  # `install.check_plan` has seen to it
        self.in_channels, self.out_channels, self.kernel_size = conv.in_channels, conv.out_channels, conv.kernel_size
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) -> (B, O, H', W')."""
        x = self.input_quant(x if self.scaling is None else self.scaling.of_images(x))
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
