"""Bits of linears and convolutions, counted by hand."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from bitlaw.models.generator import Site
from bitlaw.packing import pack_network
from bitlaw.precision import BitPlan, Precision
from bitlaw.scaling.bits import count_bits, describe_bits, site_bits
from quantized_networks import quantized

NUM_STEPS = 5


@dataclass
class Model:
    """What counting needs of a generator: a UNet of images of 8 x 8."""

    net: nn.Module
    num_steps: int = NUM_STEPS
    storage_dtype: torch.dtype = torch.float16
    shapes: dict[str, int] = field(
        default_factory=lambda: {"conv": 64, "down": 16, "down_blocks.0.attentions.0.transformer_blocks.to_out": 16}
    )

    def sites(self) -> list[Site]:
        return [Site(name, "conv", None, "blocks", rows * NUM_STEPS) for name, rows in self.shapes.items()]

    def to_tensors(self) -> dict[str, Tensor]:
        return self.net.state_dict()


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2)
        self.down_blocks = nn.ModuleList([nn.Module()])
        self.down_blocks[0].attentions = nn.ModuleList([nn.Module()])
        self.down_blocks[0].attentions[0].transformer_blocks = nn.Module()
        self.down_blocks[0].attentions[0].transformer_blocks.to_out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.down(self.conv(x)).flatten(2).transpose(1, 2)
        return self.down_blocks[0].attentions[0].transformer_blocks.to_out(rows)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model(UNet().eval().requires_grad_(False))


def small_model(model: Model, text: str) -> Model:
    plan = BitPlan({site.name: (Precision.parse(text),) for site in model.sites()})
    return Model(quantized(model.net, plan))


def test_weights_of_a_convolution_are_all_its_numbers(model: Model) -> None:
    assert [s.num_weights for s in site_bits(model)] == [8 * 4 * 9, 8 * 4 * 9, 64]
    bits = count_bits(model)
    assert bits.parameters == sum(p.numel() for p in model.net.parameters())
    assert bits.model_bits == 16 * bits.parameters
    assert bits.compute_bits == 16 * 16 * (288 + 288 + 64)
    assert bits.compute_bits_used == 16 * 16 * NUM_STEPS * (64 * 288 + 16 * 288 + 16 * 64)


def test_uses_times_weights_are_the_multiplications(model: Model) -> None:
    """Counted by the convolution itself: with ones as inputs and weights it adds up their number, exactly."""
    for name, inputs in (("conv", 4), ("down", 8)):
        conv = model.net.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        nn.init.ones_(conv.weight)
        conv.bias = None
        conv.padding = (0, 0)
        side = {"conv": 10, "down": 9}[name]  # an image of 8 x 8 with its padding; stride 2 leaves a row over
        multiplications = float(conv(torch.ones(1, inputs, side, side)).sum())
        site = next(s for s in site_bits(model) if s.site.name == name)
        assert multiplications * NUM_STEPS == site.num_weights * site.site.uses


def test_sizes_of_a_quantized_unet_are_those_of_its_tensors(model: Model) -> None:
    small = small_model(model, "W4A8")
    bits = count_bits(small)
    packed = sum(8 * t.nbytes for key, t in pack_network(small.net).items() if not key.endswith("_shape"))
    assert bits.quantized_bits == packed
    assert bits.quantized_code_bits == 4 * 640
    assert bits.model_bits == packed + 16 * (8 + 8 + 8)  # the biases
    assert bits.parameters == count_bits(model).parameters


def test_the_range_of_an_image_costs_less_than_those_of_tokens(model: Model) -> None:
    """16 bits of scale and 8 of zero point for the 4 x 8 x 8 inputs, the 8 x 8 x 8 ones, and each token's 8."""
    small = small_model(model, "W4A8")
    conv, down, linear = site_bits(small)
    assert conv.activation_bits == 8 + 24 / (4 * 8 * 8)
    assert down.activation_bits == 8 + 24 / (8 * 8 * 8)
    assert linear.activation_bits == 8 + 24 / 8
    assert {s.activation_code_bits for s in (conv, down, linear)} == {8}
    assert count_bits(small).compute_code_bits == 4 * 8 * 640
    assert count_bits(small).compute_code_bits_used == 4 * 8 * NUM_STEPS * (64 * 288 + 16 * 288 + 16 * 64)


def test_every_site_has_its_line(model: Model) -> None:
    small = small_model(model, "W4A8")
    lines = describe_bits(small, count_bits(small)).splitlines()  # names of any length
    assert lines[1].split() == ["conv", "W4A8", "288", "4.00", "5.00"]
    assert lines[3].split() == ["down_blocks.0.attentions.0.transformer_blocks.to_out", "W4A8", "64", "4.00", "6.50"]
    assert len({len(line) for line in lines[:4]}) == 1
