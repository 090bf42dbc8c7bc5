"""Weights and activations in few bits: groups, errors, modules."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlaw.formats import FORMATS
from bitlaw.precision import GroupSize, Precision
from bitlaw.quantized import (
    ActivationSpec,
    FakeQuant,
    QuantConv2d,
    QuantLinear,
    StoredBits,
    WeightSpec,
    packed_bits,
)


@dataclass
class Clock:
    step: int = 0


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("group_size", "views"),
    [
        (None, lambda w: list(w)),
        ("tensor", lambda w: [w.flatten()]),
        (4, lambda w: [w[o, i : i + 4] for o in range(3) for i in (0, 4, 8)]),
    ],
)
def test_groups_are_channels_runs_of_inputs_or_the_tensor(group_size: GroupSize, views) -> None:
    weight = randn(3, 12)
    spec = WeightSpec(FORMATS["int4"], group_size)
    x_GN = spec.groups(weight)
    assert len(x_GN) == spec.num_groups(weight.shape) == len(views(weight))
    assert all(torch.equal(row, view) for row, view in zip(x_GN, views(weight), strict=True))


def test_smaller_groups_are_more_accurate() -> None:
    weight = randn(16, 64)
    error = [
        float((WeightSpec(FORMATS["int3"], size).quantize(weight).decode() - weight).square().mean())
        for size in ("tensor", None, 16)
    ]
    assert error[0] > error[1] > error[2]


def test_convolutions_keep_their_shape_and_scale_by_output_channel() -> None:
    weight = randn(5, 4, 3, 3)
    quantized = WeightSpec(FORMATS["int8"]).quantize(weight)
    flat = WeightSpec(FORMATS["int8"]).quantize(weight.reshape(5, 36))
    assert quantized.decode().shape == weight.shape
    assert torch.equal(quantized.decode().reshape(5, 36), flat.decode())


def test_groups_of_a_convolution_run_along_channel_row_and_column() -> None:
    weight = randn(5, 4, 3, 3)
    spec = WeightSpec(FORMATS["int4"], 12)  # more than a channel's 9
    assert torch.equal(spec.groups(weight)[4], weight[1].flatten()[12:24])
    quantized, flat = spec.quantize(weight), spec.quantize(weight.flatten(1))
    assert torch.equal(quantized.decode().flatten(1), flat.decode())
    assert quantized.bits() == flat.bits()
    whole = WeightSpec(FORMATS["int4"], "tensor").quantize(weight)
    assert whole.params["scale_G1"].shape == (1, 1)


def test_clip_narrows_the_range() -> None:
    weight = randn(4, 256)
    full, clipped = (WeightSpec(FORMATS["int4s"]).quantize(weight, clip=clip) for clip in (1.0, 0.5))
    # Both scales are rounded to float16, 2^-10 apart at most.
    assert torch.allclose(clipped.decode().abs().amax(-1), weight.abs().amax(-1) / 2, rtol=2**-10)
    assert torch.allclose(clipped.params["scale_G1"].float() * 2, full.params["scale_G1"].float(), rtol=2**-9)


def test_halves_are_quantized_as_floats() -> None:
    weight = randn(4, 32).to(torch.bfloat16)
    spec = WeightSpec(FORMATS["int4"])
    assert torch.equal(spec.quantize(weight).decode(), spec.quantize(weight.float()).decode())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers_are_refused_by_name(bad: float) -> None:
    weight = randn(4, 8)
    weight[2, 3] = bad
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.fc1\.weight: NaN or Inf"):
        WeightSpec(FORMATS["int4"]).quantize(weight, name="blocks.0.mlp.fc1.weight")


def test_group_size_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match="fc1: 12 input channels, not a multiple of group size 8; use one scale"):
        WeightSpec(FORMATS["int4"], 8).quantize(randn(4, 12), name="fc1")
    assert WeightSpec(FORMATS["int4"], 256).problem((1, 1152)) == (
        "1152 input channels, not a multiple of group size 256; use 128 or protect this site"
    )
    assert WeightSpec(FORMATS["int4"], 128).problem((1, 1152)) is None
    assert WeightSpec(FORMATS["int4"], 64).problem((5, 32, 3, 3)) == (
        "288 inputs (32 channels x 3 x 3 kernel), not a multiple of group size 64; use 32 or protect this site"
    )
    assert WeightSpec(FORMATS["int4"], 96).problem((5, 32, 3, 3)) is None
    with pytest.raises(ValueError, match=r"conv_in: 27 inputs \(3 channels x 3 x 3 kernel\).* use one scale"):
        WeightSpec(FORMATS["int4"], 8).quantize(randn(4, 3, 3, 3), name="conv_in")


def test_bits_count_scales_zeros_and_padding() -> None:
    """W4g128: 4 bits, 16 of scale and 4 of zero point for 128 weights. Rows of 10 inputs are padded to a word of 8."""
    bits = WeightSpec(FORMATS["int4"], 128).quantize(randn(64, 256)).bits()
    assert bits == StoredBits(codes=4 * 64 * 256, scales=16 * 128, zeros=4 * 128)
    assert bits.total / (64 * 256) == 4 + 20 / 128
    assert WeightSpec(FORMATS["int4"]).quantize(randn(8, 10)).bits() == StoredBits(codes=8 * 64, scales=128, zeros=32)
    assert WeightSpec(FORMATS["int4s"]).quantize(randn(8, 8)).bits() == StoredBits(codes=8 * 32, scales=128)
    assert WeightSpec(FORMATS["int0"]).quantize(randn(8, 8)).bits() == StoredBits(codes=0)
    assert bits + bits == StoredBits(2 * bits.codes, 2 * bits.scales, 2 * bits.zeros)


def test_packed_bits_are_whole_words() -> None:
    assert [packed_bits(32, width) for width in range(17)] == [32 * width for width in range(17)]
    assert packed_bits(33, 3) == 128
    assert packed_bits(5, 12) == 64 + 32  # 40 bits and 20 bits


@pytest.mark.parametrize("name", ["int4", "int8s", "e4m3", "e2m1"])
def test_tokens_do_not_see_each_other(name: str) -> None:
    """A token alone gives the same bits as among others, at any place and in any memory layout."""
    spec = ActivationSpec(FORMATS[name])
    x = randn(5, 37, 24)
    out = spec.fake(x)
    assert torch.equal(spec.fake(x[3:4, 11:12]), out[3:4, 11:12])
    assert torch.equal(spec.fake(x.flip(0)), out.flip(0))
    assert torch.equal(spec.fake(x.transpose(0, 1)), out.transpose(0, 1))
    assert torch.equal(x, randn(5, 37, 24))  # and the input is left as it was


@pytest.mark.parametrize("name", ["int4", "int8s", "e4m3", "e2m1"])
def test_images_do_not_see_each_other(name: str) -> None:
    """Every image has the range of all its channels and positions, in any memory layout."""
    spec = ActivationSpec(FORMATS[name], "image")
    x = randn(5, 3, 6, 7) * torch.tensor([1.0, 30, 0.01, 1, 5]).view(5, 1, 1, 1)
    out = spec.fake(x)
    assert torch.equal(out, FORMATS[name].fake(x.flatten(1)).view_as(x))
    assert torch.equal(spec.fake(x[1:2]), out[1:2]) and torch.equal(spec.fake(x[1]), out[1])
    assert torch.equal(spec.fake(x.contiguous(memory_format=torch.channels_last)), out)
    assert not torch.equal(ActivationSpec(FORMATS[name], "tensor").fake(x)[0], out[0])
    assert not torch.equal(ActivationSpec(FORMATS[name]).fake(x), out)


def test_one_scale_for_the_tensor() -> None:
    x = randn(3, 5, 8)
    out = ActivationSpec(FORMATS["int4"], "tensor").fake(x)
    assert torch.equal(out, FORMATS["int4"].fake(x.reshape(1, -1)).reshape(x.shape))
    assert len(out.unique()) <= 16


def test_activations_keep_their_type() -> None:
    x = randn(4, 16).to(torch.bfloat16)
    out = ActivationSpec(FORMATS["int8"]).fake(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, ActivationSpec(FORMATS["int8"]).fake(x.float()).to(torch.bfloat16))


def test_gradients_pass_as_if_nothing_were_rounded() -> None:
    for name in ("int4", "int4s", "e4m3"):
        x = randn(4, 16).requires_grad_()
        out = ActivationSpec(FORMATS[name]).fake(x)
        weights = randn(4, 16)
        (out * weights).sum().backward()
        torch.testing.assert_close(out.detach(), ActivationSpec(FORMATS[name]).fake(x.detach()))
        assert x.grad is not None and torch.equal(x.grad, weights)


def test_static_ranges_clip_and_pass_no_gradient_outside() -> None:
    format = FORMATS["int4"]
    spec, params = ActivationSpec(format, "static"), format.fit(torch.tensor([[-1.0, 2.0]]))
    x = torch.tensor([-5.0, -1.0, 0.25, 1.9, 7.0], requires_grad=True)
    out = spec.fake(x, params)
    torch.testing.assert_close(out, torch.tensor([-1.0, -1.0, 0.2, 2.0, 2.0]), rtol=0, atol=1e-6)
    out.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 1, 0]


def test_static_ranges_follow_the_clock() -> None:
    clock, format = Clock(), FORMATS["int8"]
    rows = [format.fit(torch.tensor([[-high, high]])) for high in (1.0, 4.0)]
    ranges = {name: torch.cat([row[name] for row in rows]) for name in format.param_names}
    module = FakeQuant([ActivationSpec(format, "static")] * 2, (0, 3), clock, ranges)
    seen = []
    for clock.step in range(5):
        seen.append(round(float(module(torch.tensor([3.0]))), 1))
    assert seen == [1.0, 1.0, 1.0, 3.0, 3.0]


def test_fake_quant_follows_the_clock() -> None:
    clock = Clock()
    module = FakeQuant([ActivationSpec(FORMATS["int2"]), None], step_groups=(0, 3), clock=clock)
    x = randn(4, 16)
    seen = []
    for clock.step in range(5):
        seen.append(torch.equal(module(x), x))
    assert seen == [False, False, False, True, True]


def quant_linear(linear: nn.Linear, text: str, clock: Clock | None = None) -> QuantLinear:
    precision = Precision.parse(text)
    quantized = WeightSpec.of(precision.weight).quantize(linear.weight.detach()) if precision.weight else None
    return QuantLinear(linear, quantized, [precision], (0,), clock or Clock())


@pytest.mark.parametrize("bias", [True, False])
def test_quant_linear_is_a_linear_of_rounded_operands(bias: bool) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(24, 10, bias=bias), randn(6, 7, 24)
    module = quant_linear(linear, "W4g8Ae4m3")
    weight = WeightSpec(FORMATS["int4"], 8).quantize(linear.weight.detach()).decode()
    expected = F.linear(ActivationSpec(FORMATS["e4m3"]).fake(x), weight, linear.bias)
    assert torch.equal(module(x), expected)
    assert not torch.equal(module(x), linear(x))


def test_weights_may_stay_as_they_are() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(24, 10), randn(6, 24)
    module = quant_linear(linear, "W16A8")
    assert torch.equal(module(x), F.linear(ActivationSpec(FORMATS["int8"]).fake(x), linear.weight, linear.bias))
    assert set(module.state_dict()) == {"weight", "bias"}
    assert module.weight is not linear.weight


def test_decoded_weights_are_not_in_the_state_dict() -> None:
    torch.manual_seed(0)
    module = quant_linear(nn.Linear(24, 10), "W4A16")
    assert set(module.state_dict()) == {"bias"}
    assert not any(p.requires_grad for p in module.parameters())


def test_dropped_weights_and_inputs_are_zero() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(24, 10), randn(6, 24)
    for text in ("W0A16", "W16A0"):
        assert torch.equal(quant_linear(linear, text)(x), linear.bias.expand(6, 10))


# ---- convolutions -------------------------------------------------------------------------------------


def quant_conv(conv: nn.Conv2d, text: str) -> QuantConv2d:
    precision = Precision.parse(text)
    quantized = WeightSpec.of(precision.weight).quantize(conv.weight.detach()) if precision.weight else None
    return QuantConv2d(conv, quantized, [precision], (0,), Clock())


def rounded_by_hand(x: Tensor) -> Tensor:
    """Asymmetric 8 bits (P0 eq. 4-6) with one range for all of x."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = (high - low) / 255
    zero = round(-low / scale)
    return scale * (((x / scale).round() + zero).clamp(0, 255) - zero)


CONVOLUTIONS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "1x1": {"kernel_size": 1, "bias": False},
    "downsampling": {"kernel_size": 3, "stride": 2, "padding": 1},
    "patches": {"kernel_size": 2, "stride": 2},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "oblong": {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 1)},
    "same": {"kernel_size": (3, 5), "padding": "same"},
    "grouped": {"kernel_size": 3, "groups": 2, "padding": 1},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": 1},
}


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_quant_conv_is_a_convolution_of_rounded_operands(options) -> None:
    """Images are rounded one by one, then padded with zeros as nn.Conv2d does."""
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 8, **options), randn(3, 4, 6, 6)
    module = quant_conv(conv, "W4A8")
    assert module.quantized is not None
    weight = module.quantized.decode()
    assert weight.shape == conv.weight.shape and not torch.equal(weight, conv.weight)
    rounded = torch.stack([rounded_by_hand(image) for image in x])
    expected = F.conv2d(rounded, weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    # The range by hand is in float64: scales differ in their last bit.
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)
    assert module(x).shape == conv(x).shape
    assert not torch.allclose(module(x), conv(x), atol=1e-3)


def test_padding_is_zero_whatever_the_range() -> None:
    """All inputs are 5 and all weights 1: a corner sees 4 of them, an edge 6, and nothing else."""
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    nn.init.ones_(conv.weight)
    out = quant_conv(conv, "W8A8")(torch.full((1, 1, 3, 3), 5.0))
    expected = torch.tensor([[20.0, 30, 20], [30, 45, 30], [20, 30, 20]])
    torch.testing.assert_close(out[0, 0], expected, rtol=2**-10, atol=0)  # the weight's scale is float16


@pytest.mark.parametrize("text", ["W4A8", "W16Ae4m3", "W4g12A4s"])
def test_images_of_a_batch_are_convolved_as_alone(text: str) -> None:
    torch.manual_seed(0)
    module, x = quant_conv(nn.Conv2d(4, 8, 3, padding=1), text), randn(3, 4, 6, 6)
    x[2] *= 100
    alone = torch.cat([module(image[None]) for image in x])
    # The sums of a larger batch are ordered otherwise. A shared range would be off by 100 steps.
    torch.testing.assert_close(alone, module(x), rtol=1e-5, atol=1e-5)


def test_one_range_for_a_batch_of_images() -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 8, 3, padding=1), randn(3, 4, 6, 6)
    expected = F.conv2d(FORMATS["int8"].fake(x.view(1, -1)).view_as(x), conv.weight, conv.bias, padding=1)
    assert torch.equal(quant_conv(conv, "W16A8t")(x), expected)


def test_halves_are_convolved_as_halves() -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 8, 3, padding=1), randn(3, 4, 6, 6)
    exact = quant_conv(conv, "W4A8")(x)
    half = quant_conv(conv.to(torch.bfloat16), "W4A8")(x.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert float((half - exact).abs().mean()) < 0.02 * float(exact.abs().mean())  # 8 bits of mantissa


def test_state_dict_of_a_convolution_has_no_decoded_weight() -> None:
    assert set(quant_conv(nn.Conv2d(4, 8, 3), "W4A8").state_dict()) == {"bias"}
    assert set(quant_conv(nn.Conv2d(4, 8, 3), "W16A8").state_dict()) == {"weight", "bias"}
    assert set(quant_conv(nn.Conv2d(4, 8, 3, bias=False), "W4A8").state_dict()) == set()
