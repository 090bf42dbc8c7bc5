"""Quantized tensors, and modules that compute with them in floating point ("simulated", or fake, quantization).

Legend: O output channels, I input channels, G groups, N numbers in a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import Protocol, Self

import torch.nn.functional as F
from torch import Tensor, nn

from bitlaw.formats import Format, Params
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
    """How a weight is to be stored: a format, and the input channels that share its parameters.

    group_size: None for a whole output channel, "tensor" for everything
    """

    format: Format
    group_size: GroupSize = None

    @classmethod
    def of(cls, precision: TensorPrecision) -> Self:
        """The spec that a precision means."""
        return cls(precision.format, precision.group_size)

    def problem(self, num_inputs: int) -> str | None:
        """Why a weight with so many input channels cannot have these groups, and what to do; None if it can."""
        if not isinstance(self.group_size, int) or num_inputs % self.group_size == 0:
            return None
        common = gcd(num_inputs, self.group_size)
        remedy = f"use {common}" if common >= 8 else "use one scale for each output channel (no g)"
        found = f"{num_inputs} input channels, not a multiple of group size {self.group_size}"
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
        if problem := self.problem(weight[0].numel()):
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
        """All of them. The 16 bytes that hold the shape count with the file's header."""
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


@dataclass(frozen=True)
class ActivationSpec:
    """Dynamic quantization of activations: a range for each token (the last dimension), or for the tensor at hand."""

    format: Format
    per_tensor: bool = False

    @classmethod
    def of(cls, precision: TensorPrecision) -> Self:
        """The spec that a precision means."""
        return cls(precision.format, precision.group_size == "tensor")

    def fake(self, x: Tensor) -> Tensor:
        """`x` rounded to what its codes can say, in the type of x; rounding passes no gradient.

        With a range for each token no token sees another: a result does not depend on the batch.
        """
        x_GN = x.detach().float().reshape((1, -1) if self.per_tensor else (-1, x.shape[-1]))
        return self.format.fake(x_GN).view(x.shape).to(x.dtype)


class FakeQuant(nn.Module):
    """Quantizes activations as the step group of the running step says; None leaves them as they are."""

    def __init__(self, specs: Sequence[ActivationSpec | None], step_groups: Sequence[int], clock: Clock):
        super().__init__()
        assert len(specs) == len(step_groups)
        self.specs, self.step_groups, self.clock = tuple(specs), tuple(step_groups), clock

    def forward(self, x: Tensor) -> Tensor:
        """(..., N) -> (..., N)."""
        spec = self.specs[step_group(self.step_groups, self.clock.step)]
        return x if spec is None else spec.fake(x)

    def extra_repr(self) -> str:
        return f"{self.specs}, step_groups={self.step_groups}"


class QuantLinear(nn.Module):
    """A linear layer that computes with the decoded weight and fake-quantized inputs.

    precisions: for each step group; all have the same weight precision
    quantized: the weight, or None where it stays as it is
    """

    quantized: QuantizedTensor | None
    weight: Tensor

    def __init__(
        self,
        linear: nn.Linear,
        quantized: QuantizedTensor | None,
        precisions: Sequence[Precision],
        step_groups: Sequence[int],
        clock: Clock,
    ):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.precisions, self.quantized = tuple(precisions), quantized
        specs = [ActivationSpec.of(p.activation) if p.activation else None for p in precisions]
        self.input_quant = FakeQuant(specs, step_groups, clock)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        if quantized is None:
            self.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
        else:
            assert quantized.shape == tuple(linear.weight.shape)
            # Not in the state dict: `packing` stores the codes.
            self.register_buffer("weight", quantized.decode().to(linear.weight), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return F.linear(self.input_quant(x), self.weight, self.bias)

    def extra_repr(self) -> str:
        precisions = ", ".join(map(str, self.precisions))
        return f"{self.in_features}, {self.out_features}, {precisions}"
