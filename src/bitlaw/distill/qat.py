"""Quantization-aware training: layers whose weights are learned through what a checkpoint would hold of them.

Legend: O output channels, I inputs of an output channel; G groups, N numbers in a group.
"""

import copy
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize

from bitlaw.formats import Format, Params
from bitlaw.models.generator import ImageGenerator
from bitlaw.quantized import QuantizedTensor, QuantLayer, WeightSpec
from bitlaw.training import ParameterGroup

ModelT = TypeVar("ModelT", bound=ImageGenerator[Any])

Trainable = Literal["all", "scales"]
Scales = Literal["learned", "recomputed"]

SCALE = "log_factor_G1"
"""What names of learned scales end in."""


class FakeWeight(nn.Module):
    """A latent weight to the numbers that are stored for it; gradients pass straight through (Bengio et al. 2013).

    learned: scales are factors of those given, whose logarithms are trained; zero points stay, and codebooks. A number
        inside its range passes a gradient to the latent weight, one that is clipped does not (Esser et al. 2020, LSQ,
        eq. 2 and 3: d/ds is w_q / s - w / s inside and w_q / s where it is clipped. The logarithm keeps scales
        positive, and makes a step of Adam relative to the scale, which is what LSQ's gradient scale is for).
    recomputed: the format is fitted to the latent weight anew in every step, and gradients pass for all numbers
    """

    def __init__(self, spec: WeightSpec, params: Params, scales: Scales):
        super().__init__()
        self.spec, self.scales = spec, scales
        self.param_names = tuple(params)
        for name, value in params.items():
            self.register_buffer(name, value.clone())
        self.log_factor_G1 = None
        if scales == "learned" and "scale_G1" in params and not spec.format.codebook_shape:
            self.log_factor_G1 = nn.Parameter(torch.zeros_like(params["scale_G1"], dtype=torch.float32))

    @torch.no_grad()
    def params(self, weight: Tensor) -> Params:
        """Parameters of the groups as they would be stored."""
        format = self.spec.format
        if self.scales == "recomputed":
            return self.spec.fit(weight)
        given = {name: self.get_buffer(name) for name in self.param_names}
        if self.log_factor_G1 is None:
            return given
        return format.storable(given | {"scale_G1": given["scale_G1"].float() * self.log_factor_G1.exp()})

    def forward(self, weight: Tensor) -> Tensor:
        """(O, I), or a convolution's (O, I, kh, kw): what the codes stand for, in the type of `weight`."""
        weight_GN = self.spec.groups(weight.float())
        out_GN = _Nearest.apply(weight_GN, self.log_factor_G1, self.spec.format, self.params(weight.detach()))
        return self.spec.join(out_GN, weight.shape).reshape(weight.shape).to(weight.dtype)

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> QuantizedTensor:
        """What is stored."""
        params = self.params(weight)
        codes_GN = self.spec.format.encode(self.spec.groups(weight.float()), params)
        return QuantizedTensor(self.spec.join(codes_GN, weight.shape), params, self.spec, tuple(weight.shape))


class _Nearest(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_GN: Tensor, log_factor_G1: Tensor | None, format: Format, params: Params) -> Tensor:
        out_GN = format.nearest(weight_GN, params)
        if log_factor_G1 is not None:
            within_GN = format.within(weight_GN, params)
            # d out / d log scale: what rounding adds, and the whole number where it is clipped.
            ctx.save_for_backward(within_GN, out_GN - weight_GN * within_GN)
        return out_GN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_GN: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if not saved:
            return grad_GN, None, None, None
        within_GN, slope_GN = saved
        return grad_GN * within_GN, (grad_GN * slope_GN).sum(1, keepdim=True), None, None


def student_of(
    quantized: ModelT, teacher: ModelT, *, trainable: Trainable = "all", scales: Scales = "learned"
) -> ModelT:
    """A copy of a quantized model, in float32, whose weights can be trained; it computes what the model computes.

    trainable: every number of the network, or only scales and what has one dimension (norms, biases)

    A latent weight is the teacher's where that rounds to the code it has, and elsewhere (a method has chosen another
    code, or rescaled the layer) the number of the code itself. ValueError if nothing in the network is quantized.
    """
    student = copy.copy(quantized)
    student.clock = copy.copy(quantized.clock)
    # Quantized layers share the model's clock, and go on sharing it.
    student.net = copy.deepcopy(quantized.net, {id(quantized.clock): student.clock}).float()
    originals = dict(teacher.net.named_modules())
    layers = dict(quantized_layers(student.net))
    if not layers:
        raise ValueError("nothing in this model is quantized, so there is nothing to train; give a precision below 16")
    for name, layer in layers.items():
        if layer.quantized is None:
            continue
        original = getattr(originals.get(name), "weight", None)
        latent = _latent(layer.quantized, original).to(layer.weight.device)
        params = {key: value.to(latent.device) for key, value in layer.quantized.params.items()}
        spec = layer.quantized.spec
        del layer.weight
        layer.weight = nn.Parameter(latent)
        parametrize.register_parametrization(layer, "weight", FakeWeight(spec, params, scales))
    student.require_gradients()
    if trainable == "scales":
        for name, parameter in student.net.named_parameters():
            is_scale = name.endswith(SCALE) or parameter.numel() == max(parameter.shape, default=1)
            parameter.requires_grad_(parameter.requires_grad and is_scale)
    return student


def _latent(quantized: QuantizedTensor, original: Tensor | None) -> Tensor:
    decoded = quantized.decode()
    if original is None or original.shape != decoded.shape:
        return decoded
    spec = quantized.spec
    original = original.detach().to(decoded)
    rounded_GN = spec.format.nearest(spec.groups(original), quantized.params)
    keeps = spec.join(rounded_GN, original.shape).reshape(original.shape) == decoded
    return torch.where(keeps, original, decoded)


@torch.no_grad()
def freeze(student: ModelT, like: ModelT) -> ModelT:
    """The model that a checkpoint holds of a student, in the type of `like`: the same numbers, to rounding.

    The student is used up.
    """
    for _, layer in quantized_layers(student.net):
        if parametrize.is_parametrized(layer, "weight"):
            fake = layer.parametrizations.weight[0]  # type: ignore[union-attr, index]
            assert isinstance(fake, FakeWeight)
            latent = layer.parametrizations.weight.original  # type: ignore[union-attr]
            assert isinstance(latent, Tensor)
            quantized = fake.quantized(latent)
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
            del layer.weight
            layer.hold(quantized, latent)
    for parameter in student.net.parameters():
        parameter.requires_grad_(False)
        parameter.copy_(parameter.to(student.storage_dtype))
    student.net.to(like.dtype).eval()
    return student


def quantized_layers(net: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    """Quantized layers by name, in the order of the network."""
    return ((name, layer) for name, layer in net.named_modules() if isinstance(layer, QuantLayer))


def parameter_groups(net: nn.Module, *, scale_lr_ratio: float, weight_decay: float) -> list[ParameterGroup]:
    """What is trained of a student's network: matrices, which decay; norms and biases; logarithms of scales."""
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    factors = {name: p for name, p in trained.items() if name.endswith(SCALE)}
    rest = {name: p for name, p in trained.items() if name not in factors}
    return [
        ParameterGroup({name: p for name, p in rest.items() if p.ndim >= 2}, weight_decay=weight_decay),
        ParameterGroup({name: p for name, p in rest.items() if p.ndim < 2}),
        ParameterGroup(factors, lr_ratio=scale_lr_ratio),
    ]
