"""The two budgets of a model (P0 section 3): total model bits, and total compute bits.

Sizes are computed from the tensors as they are stored, never from a configuration. "Code bits" are nominal: codes only;
the others count scales, zero points and padding to whole words as well. The autoencoder, which stays in full precision
and is shared by all sizes, is not counted.
"""

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from bitlaw.models.generator import ImageGenerator, Site
from bitlaw.packing import companion_bits, parts_of
from bitlaw.precision import step_group
from bitlaw.quantized import QuantConv2d, QuantLayer

SCALE_BITS = 16  # of a dynamic activation range: a float16 scale, and with it a zero point of the codes' width


@dataclass(frozen=True)
class BitCount:
    """Both budgets of a network, each with and without overhead.

    model_bits, model_code_bits: every tensor of the network
    quantized_bits, quantized_code_bits: weights of quantized layers only
    compute_bits, compute_code_bits: sum over sites of weights x bits of a weight x bits of an activation (CT)
    compute_bits_used, compute_code_bits_used: the same, each layer times the rows that pass it per generated image
    parameters: numbers in the network
    """

    model_bits: float
    model_code_bits: float
    quantized_bits: float
    quantized_code_bits: float
    compute_bits: float
    compute_code_bits: float
    compute_bits_used: float
    compute_code_bits_used: float
    parameters: int

    @property
    def bits_per_value(self) -> float:
        """Real bits of a number of the network."""
        return self.model_bits / self.parameters

    def to_json(self) -> dict[str, float]:
        """For a record: the budget axes by name."""
        return {name: value for name, value in asdict(self).items() if name != "parameters"}


@dataclass(frozen=True)
class SiteBits:
    """Bits of one site: per weight and per activation, as coded and as stored."""

    site: Site
    num_weights: int
    weight_code_bits: float
    weight_bits: float
    activation_code_bits: float
    activation_bits: float
    precision: str
    branch_numbers: int = 0
    """Numbers of a branch of low rank, which computes in full precision."""

    def compute_bits(self, full: int) -> float:
        """Weights x bits of a weight x bits of an activation; `full` are those of what is not quantized."""
        return self.num_weights * self.weight_bits * self.activation_bits + self.branch_numbers * full * full

    def compute_code_bits(self, full: int) -> float:
        """The same with codes only."""
        return self.num_weights * self.weight_code_bits * self.activation_code_bits + self.branch_numbers * full * full


def site_bits(model: ImageGenerator[Any]) -> list[SiteBits]:
    """The bits of every site of a model; activations as the mean over its steps."""
    full = _storage_bits(model)
    counted = []
    for site in model.sites():
        layer = model.net.get_submodule(site.name)
        assert isinstance(layer, nn.Linear | nn.Conv2d | QuantLayer)
        num_weights = layer.weight.numel()
        weight_code_bits = weight_bits = activation_code_bits = activation_bits = float(full)
        precision, branch_numbers = "W16A16", 0
        if isinstance(layer, QuantLayer):
            if layer.branch is not None:
                branch_numbers = layer.branch.down_RI.numel() + layer.branch.up_OR.numel()
            precision = " ".join(dict.fromkeys(map(str, layer.precisions)))
            if layer.quantized is not None:
                weight_code_bits = layer.quantized.spec.format.code_bits
                weight_bits = layer.quantized.bits().total / num_weights
            steps = [
                layer.precisions[step_group(layer.input_quant.step_groups, step)] for step in range(model.num_steps)
            ]
            activation_code_bits = sum(p.activation_bits for p in steps) / len(steps)
            # Dynamic ranges come with the activations, static ones are part of the model.
            is_dynamic = [p.activation is not None and not p.is_static for p in steps]
            overhead = [p.activation_bits + SCALE_BITS for p, dynamic in zip(steps, is_dynamic, strict=True) if dynamic]
            size = _range_size(layer, site, model.num_steps)
            activation_bits = activation_code_bits + sum(overhead) / len(steps) / size
        counted.append(
            SiteBits(
                site,
                num_weights,
                weight_code_bits,
                weight_bits,
                activation_code_bits,
                activation_bits,
                precision,
                branch_numbers,
            )
        )
    return counted


def _range_size(layer: QuantLayer, site: Site, num_steps: int) -> float:
    """Inputs of a layer that share a range: a token's, or an image's. One for the tensor (`t`) counts as for each."""
    if not isinstance(layer, QuantConv2d):
        return layer.weight.shape[1]
    # A convolution runs once a step, and its input has `stride` positions for each of its output.
    return layer.in_channels * prod(layer.stride) * site.uses / num_steps


def count_bits(model: ImageGenerator[Any]) -> BitCount:
    """Both budgets of a model, from its tensors."""
    full = _storage_bits(model)
    kept = sum(tensor.numel() for tensor in model.to_tensors().values())
    layers = [m for m in model.net.modules() if isinstance(m, QuantLayer)]
    stored = codes = weights = beside = 0.0
    for layer in layers:
        beside += companion_bits(parts_of(layer))
        if layer.quantized is None:
            continue
        numel = layer.weight.numel()
        stored += layer.quantized.bits().total
        codes += numel * layer.quantized.spec.format.code_bits
        weights += numel
    sites = site_bits(model)
    return BitCount(
        model_bits=stored + beside + kept * full,
        model_code_bits=codes + (kept + sum(s.branch_numbers for s in sites)) * full,
        quantized_bits=stored,
        quantized_code_bits=codes,
        compute_bits=sum(s.compute_bits(full) for s in sites),
        compute_code_bits=sum(s.compute_code_bits(full) for s in sites),
        compute_bits_used=sum(s.site.uses * s.compute_bits(full) for s in sites),
        compute_code_bits_used=sum(s.site.uses * s.compute_code_bits(full) for s in sites),
        parameters=int(kept + weights),
    )


def describe_bits(model: ImageGenerator[Any], bits: BitCount) -> str:
    """A table of the sites and a line for each budget."""
    sites = site_bits(model)
    width = max([34, *(len(s.site.name) + 2 for s in sites)])
    lines = [f"{'site':{width}}{'precision':16}{'weights':>11}{'code bits':>11}{'real bits':>11}"]
    for s in sites:
        counted = f"{s.num_weights:>11,}{s.weight_code_bits:>11.2f}{s.weight_bits:>11.2f}"
        lines.append(f"{s.site.name:{width}}{s.precision:16}{counted}")
    size = f"{bits.model_bits / 8e3:,.1f} kB" if bits.model_bits < 8e6 else f"{bits.model_bits / 8e6:,.1f} MB"
    lines += [
        f"parameters    {bits.parameters:,}",
        f"model bits    {bits.model_bits:,.0f} ({size}, {bits.bits_per_value:.2f} a number); "
        f"codes only {bits.model_code_bits:,.0f}",
        f"compute bits  {bits.compute_bits:.3e} each weight once, {bits.compute_bits_used:.3e} as used for an image",
    ]
    return "\n".join(lines)


def _storage_bits(model: ImageGenerator[Any]) -> int:
    """Bits of a number that is not quantized."""
    return torch.finfo(model.storage_dtype).bits
