"""Putting quantized modules into a network, and models through it."""

from dataclasses import dataclass
from typing import ClassVar, TypeVar

import pytest
import torch
from torch import Tensor, nn

from bitlaw.calibration import InputStats
from bitlaw.formats import FORMATS
from bitlaw.install import check_plan, install, is_quantizable, plan_of
from bitlaw.methods import RTN, LayerMethod
from bitlaw.methods.quantize import check_quantizable, quantize
from bitlaw.models.autoencoders.multi_scale_vq import Phi, VQTokenizer, VQTokenizerConfig
from bitlaw.models.dit import DiT, DiTSampling
from bitlaw.models.networks.dit import DiTConfig, DiTTransformer
from bitlaw.models.networks.var import QKVLinear, VARConfig, VARTransformer
from bitlaw.models.parts.diffusion import Diffusion
from bitlaw.models.var import VAR, VARSampling
from bitlaw.packing import pack_network, unpack_network
from bitlaw.precision import BitPlan, Precision
from bitlaw.quantized import FakeQuant, QuantConv2d, QuantizedTensor, QuantLayer, QuantLinear, WeightSpec
from quantized_networks import quantized

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass
class Clock:
    step: int = 0


class Attention(nn.Module):
    """One head, enough to see what becomes of its operands."""

    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.quant_q: nn.Module = nn.Identity()
        self.quant_k: nn.Module = nn.Identity()
        self.quant_v: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = self.quant_q(q), self.quant_k(k), self.quant_v(v)
        return self.proj((q @ k.transpose(-1, -2)).softmax(-1) @ v)


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm, self.attn, self.fc = nn.LayerNorm(width), Attention(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x + self.attn(self.norm(x)))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(16), Block(16))


def plan(text: str, *sites: str) -> BitPlan:
    return BitPlan({site: (Precision.parse(text),) for site in sites})


X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


def test_only_planned_sites_change_and_only_in_the_copy(net: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    small = quantized(net, plan("W4A8", "0.fc", "1.attn.proj"))
    changed = {name for name, module in small.named_modules() if isinstance(module, QuantLinear)}
    assert changed == {"0.fc", "1.attn.proj"}
    assert not any(isinstance(module, QuantLinear) for module in net.modules())
    for parameter in small.parameters():
        parameter.data.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_sites_at_16_bits_stay_linear(net: nn.Module) -> None:
    small = quantized(net, plan("W16A16", "0.fc"))
    assert isinstance(small.get_submodule("0.fc"), nn.Linear)
    assert torch.equal(small(X), net(X))
    assert plan_of(small) is None


def test_weights_are_what_the_method_chose(net: nn.Module) -> None:
    small = quantized(net, plan("W3g8A16", "0.fc"))
    layer = small.get_submodule("0.fc")
    expected = WeightSpec(FORMATS["int3"], 8).quantize(net.get_parameter("0.fc.weight").detach())
    assert torch.equal(layer.get_buffer("weight"), expected.decode())


def test_attention_operands_are_quantized_where_the_plan_says(net: nn.Module) -> None:
    small = quantized(net, plan("W16A16KV4", "1.attn.qkv"))
    attention = small.get_submodule("1.attn")
    for operand in (attention.quant_q, attention.quant_k, attention.quant_v):
        assert isinstance(operand, FakeQuant)
    assert isinstance(small.get_submodule("0.attn").quant_q, nn.Identity)
    assert torch.equal(small.get_submodule("0")(X), net.get_submodule("0")(X))
    assert not torch.equal(small(X), net(X))


def test_activations_change_with_the_step_group(net: nn.Module) -> None:
    clock = Clock()
    precisions = (Precision.parse("W8A2KV2"), Precision.parse("W8A16"))
    grouped = quantized(net, BitPlan({"0.attn.qkv": precisions}, step_groups=(0, 2)), clock=clock)
    early, late = (quantized(net, BitPlan({"0.attn.qkv": (precision,)})) for precision in precisions)
    for clock.step in range(4):
        assert torch.equal(grouped(X), (early if clock.step < 2 else late)(X))


def test_every_site_that_cannot_be_is_named_before_any_work(net: nn.Module) -> None:
    net.get_parameter("1.fc.weight").data[3, 4] = torch.nan
    bad = BitPlan(
        {
            "0.fcc": (Precision.parse("W4"),),
            "0.norm": (Precision.parse("W4"),),
            "0.attn.proj": (Precision.parse("W4g12"),),
            "0.attn.qkv": (Precision.parse("W4g8"),),
            "0.fc": (Precision.parse("W4KV8"),),
            "1.fc": (Precision.parse("W4"),),
        }
    )
    with pytest.raises(ValueError) as caught:
        check_plan(net, bad)
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("unknown site '0.fcc'; did you mean 0.fc")
    assert lines[1].startswith("0.norm: LayerNorm, and only a linear or a plain convolution")
    assert lines[1].endswith("can be quantized; protect this site")
    assert lines[2].startswith("0.attn.proj: 16 input channels, not a multiple of group size 12")
    assert lines[3] == "0.fc: not inside an attention module that shows its operands; drop KV at this site"
    assert lines[4].startswith("1.fc.weight: NaN or Inf")


def test_a_quantized_network_is_not_quantized_again(net: nn.Module) -> None:
    small = quantized(net, plan("W4", "0.fc"))
    with pytest.raises(ValueError, match=r"0\.fc: quantized already"):
        check_plan(small, plan("W3", "0.fc"))


@dataclass(frozen=True)
class ClipSearch(LayerMethod):
    """A method as a newcomer would write it: the range of least error, weighted by E[x_I^2]."""

    ratios: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7)
    needs: ClassVar[frozenset[str]] = frozenset({"second_moment_I"})

    def quantize(self, weight_OI: Tensor, stats: InputStats, spec: WeightSpec) -> QuantizedTensor:
        assert stats.second_moment_I is not None

        def error(q: QuantizedTensor) -> float:
            return float(((q.decode() - weight_OI).square() * stats.second_moment_I).sum())

        return min((spec.quantize(weight_OI, clip=ratio) for ratio in self.ratios), key=error)


def test_methods_get_what_they_need(net: nn.Module) -> None:
    sites = plan("W2A16", "0.fc", "1.fc")
    stats = {site: InputStats(torch.linspace(0.1, 3, 16)) for site in sites}
    searched, rtn = (quantized(net, sites, m, stats=stats) for m in (ClipSearch(), RTN()))

    def error(small: nn.Module) -> float:
        difference = small.get_submodule("0.fc").get_buffer("weight") - net.get_parameter("0.fc.weight")
        return float((difference.detach().square() * stats["0.fc"].second_moment_I).sum())

    assert error(searched) < error(rtn)


# ---- convolutions -------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """What a UNet is made of: convolutions, a linear for the timestep, attention over positions."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.conv2 = nn.Conv2d(2 * width, width, 3, padding=1, groups=2)
        self.shortcut = nn.Conv2d(width, width, 1, bias=False)
        self.down = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.attn = Attention(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shortcut(x) + self.conv2(self.conv1(x).relu())
        tokens = self.attn(self.down(x).flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2).unflatten(2, (x.shape[2] // 2, -1))


IMAGES = torch.randn(3, 8, 6, 6, generator=torch.Generator().manual_seed(2))
CONVOLUTIONS = ("conv1", "conv2", "shortcut", "down")


@pytest.fixture
def unet() -> nn.Module:
    torch.manual_seed(0)
    return ResidualBlock(8).eval().requires_grad_(False)


@pytest.mark.parametrize("text", ["W4A8", "W3g8A8", "W8tA8t", "W12sAe4m3", "We2m1", "W16A6", "W0A0"])
def test_convolutions_survive_packing_bit_for_bit(unet: nn.Module, text: str) -> None:
    sites = plan(text, *CONVOLUTIONS, "attn.qkv", "attn.proj")
    small = quantized(unet, sites)
    assert {name for name, m in small.named_modules() if isinstance(m, QuantConv2d)} == set(CONVOLUTIONS)
    assert {name for name, m in small.named_modules() if isinstance(m, QuantLinear)} == {"attn.qkv", "attn.proj"}
    assert not torch.equal(small(IMAGES), unet(IMAGES))

    saved_plan = plan_of(small)
    assert saved_plan is not None and saved_plan.sites == sites.sites
    parts, rest = unpack_network(small.state_dict() | pack_network(small), saved_plan)
    again = ResidualBlock(8)
    again.load_state_dict(rest)
    assert torch.equal(install(again, saved_plan, parts, Clock())(IMAGES), small(IMAGES))


def test_every_convolution_takes_the_bits_it_says(unet: nn.Module) -> None:
    small = quantized(unet, plan("W3g8A8", *CONVOLUTIONS))
    stored = pack_network(small)
    for name in CONVOLUTIONS:
        layer = small.get_submodule(name)
        assert isinstance(layer, QuantLayer) and layer.quantized is not None
        parts = {key: t for key, t in stored.items() if key.startswith(f"{name}.") and not key.endswith("_shape")}
        assert 8 * sum(t.nbytes for t in parts.values()) == layer.quantized.bits().total
        # 3 bits, and for every 8 weights 16 of scale and 3 of zero point; less than a word is added to a row.
        expected = 3 + 19 / 8
        padding = 32 / unet.get_parameter(f"{name}.weight")[0].numel()
        assert expected <= layer.quantized.bits().total / layer.weight.numel() < expected + padding


def test_nearly_exact_convolutions_are_nearly_the_original(unet: nn.Module) -> None:
    """In 12 bits the error is that of rounding, 2^-12 of a range for each number, however they are placed."""
    small = quantized(unet, plan("W12A12", *CONVOLUTIONS))
    torch.testing.assert_close(small(IMAGES), unet(IMAGES), rtol=0, atol=2e-3)


def test_halves_of_a_network_stay_halves(unet: nn.Module) -> None:
    exact = quantized(unet, plan("W4A8", *CONVOLUTIONS))(IMAGES)
    half = quantized(unet.to(torch.bfloat16), plan("W4A8", *CONVOLUTIONS))
    out = half(IMAGES.to(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0, atol=0.05 * float(exact.abs().max()))


def test_methods_see_a_convolution_as_a_linear(unet: nn.Module) -> None:
    """The weight flattened in the order of F.unfold, and statistics of its rows."""
    seen = {}

    @dataclass(frozen=True)
    class Spy(LayerMethod):
        def quantize(self, weight_OI: Tensor, stats: InputStats, spec: WeightSpec) -> QuantizedTensor:
            seen[len(seen)] = weight_OI
            return spec.quantize(weight_OI)

    small = quantized(unet, plan("W4A16", *CONVOLUTIONS), Spy())
    assert [tuple(weight.shape) for weight in seen.values()] == [(16, 72), (8, 72), (8, 8), (8, 72)]
    rows = nn.functional.unfold(IMAGES, 3, padding=1).transpose(1, 2)
    unfolded = (rows @ seen[0].T + unet.get_parameter("conv1.bias")).transpose(1, 2).unflatten(2, (6, 6))
    torch.testing.assert_close(unfolded, unet.get_submodule("conv1")(IMAGES), rtol=1e-5, atol=1e-5)
    assert small.get_buffer("conv1.weight").shape == (16, 8, 3, 3)


def test_convolutions_that_cannot_be_are_named_before_any_work(unet: nn.Module) -> None:
    net = nn.ModuleDict(
        {
            "unet": unet,
            "phi": Phi(8),
            "tiled": nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
            "up": nn.ConvTranspose2d(8, 8, 3),
            "line": nn.Conv1d(8, 8, 3),
        }
    )
    unet.get_parameter("down.weight").data[0, 0, 0, 0] = torch.inf
    names = ["unet.conv1", "unet.conv2", "unet.shortcut", "unet.down", "phi", "tiled", "up", "line", "unet.conv3"]
    with pytest.raises(ValueError) as caught:
        check_plan(net, plan("W4g16A8", *names))
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        "unet.conv1: 72 inputs (8 channels x 3 x 3 kernel), not a multiple of group size 16; use 8 or protect this site"
    )
    assert [line.split(":")[0] for line in lines[1:4]] == ["unet.conv2", "unet.shortcut", "unet.down"]
    assert lines[4].startswith("unet.down.weight: NaN or Inf")
    allowed = "and only a linear or a plain convolution (nn.Conv2d padded with zeros) can be quantized"
    for line, found in zip(
        lines[5:9],
        ["phi: Phi", "tiled: Conv2d with circular padding", "up: ConvTranspose2d", "line: Conv1d"],
        strict=True,
    ):
        assert line == f"{found}, {allowed}; protect this site"
    assert lines[9].startswith("unknown site 'unet.conv3'; did you mean unet.conv")


def test_subclasses_count_as_what_they_compute() -> None:
    class Named(nn.Conv2d):
        """Adds nothing to the computation."""

    class Tilted(nn.Conv2d):
        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(input, weight, bias) + 1

    assert is_quantizable(Named(4, 4, 3)) and is_quantizable(QKVLinear(8))
    assert not is_quantizable(Tilted(4, 4, 3)) and not is_quantizable(Phi(4))


def test_a_quantized_convolution_is_not_quantized_again(unet: nn.Module) -> None:
    small = quantized(unet, plan("W4", "conv1"))
    with pytest.raises(ValueError, match="conv1: quantized already"):
        check_plan(small, plan("W3", "conv1"))


# ---- whole models -------------------------------------------------------------------------------------


def awake(module: ModuleT) -> ModuleT:
    """Linears at random, so that no branch starts at zero."""
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            if hasattr(linear, "has_bias"):
                linear.bias.data.mul_(linear.has_bias)
    return module.eval().requires_grad_(False)


def tiny_var() -> VAR:
    tokenizer = VQTokenizer(VQTokenizerConfig(16, 4, 8, (1, 2), 1, (1, 2, 4), norm_groups=0, attention=False))
    net = VARTransformer(VARConfig(2, 16, 2, 5, (1, 2, 4), 16, 4))
    return VAR(awake(net), awake(tokenizer), VARSampling(guidance=2.0))


def tiny_dit() -> DiT:
    tokenizer = VQTokenizer(VQTokenizerConfig(16, 4, 8, (1, 2), 1, (1, 2, 4), norm_groups=0, attention=False))
    net = DiTTransformer(DiTConfig(2, 16, 2, 5, 4, 4, 2))
    latents = awake(tokenizer)
    return DiT(awake(net), latents, Diffusion(), DiTSampling(num_steps=4), latent_scale=0.7)


@pytest.fixture(params=[tiny_var, tiny_dit])
def model(request: pytest.FixtureRequest) -> VAR | DiT:
    torch.manual_seed(0)
    return request.param()


LABELS = [0, 3, 4]


def test_no_site_goes_round_its_quantizer(model: VAR | DiT) -> None:
    """Every site, and every attention operand, is called while an image is drawn."""
    small = quantize(model, "W8A8KV8", protect="none")
    called: set[str] = set()
    expected = {site.name for site in model.sites()}
    for name, module in small.net.named_modules():
        if isinstance(module, QuantLayer) or name.rpartition(".")[2] in ("quant_q", "quant_k", "quant_v"):
            module.register_forward_hook(lambda *_, name=name: called.add(name))
    expected |= {f"blocks.{i}.attn.quant_{operand}" for i in range(2) for operand in "qkv"}
    small.generate(LABELS)
    assert called == expected


def test_the_original_is_left_alone_and_so_is_its_clock(model: VAR | DiT) -> None:
    before = model.generate(LABELS)
    small = quantize(model, "W2A4")
    small.generate(LABELS)
    assert small.clock is not model.clock and model.clock.step == model.num_steps - 1
    assert all(m.clock is small.clock for m in small.net.modules() if isinstance(m, FakeQuant))
    assert torch.equal(model.generate(LABELS), before)
    assert not torch.equal(small.generate(LABELS), before)


def test_saved_models_draw_the_same_images_bit_for_bit(model: VAR | DiT) -> None:
    """Codes and the rest of the state dict rebuild the network; the plan is read back from its layers."""
    small = quantize(model, "W3g8A8KV8", protect=["first-last", "blocks.0.attn.proj"])
    config, tensors = small.to_checkpoint()
    stored = tensors | pack_network(small.net)
    saved_plan = plan_of(small.net)
    assert saved_plan is not None and "blocks.0.attn.proj" not in saved_plan
    assert "blocks.1.attn.proj.weight" not in stored

    parts, rest = unpack_network(stored, BitPlan.from_json(saved_plan.to_json()))
    again = type(model).from_checkpoint(config, rest)
    again.net = install(again.net, saved_plan, parts, again.clock)
    assert torch.equal(again.generate(LABELS, seed=5), small.generate(LABELS, seed=5))


def test_check_quantizable_is_the_error_of_quantize(model: VAR | DiT) -> None:
    check_quantizable(model, "W4g8A8")
    with pytest.raises(ValueError) as checked:
        check_quantizable(model, "W4g12A8")
    with pytest.raises(ValueError) as quantized:
        quantize(model, "W4g12A8")
    assert str(checked.value) == str(quantized.value)
    assert len(str(checked.value).splitlines()) == sum(site.phase == "blocks" for site in model.sites())
