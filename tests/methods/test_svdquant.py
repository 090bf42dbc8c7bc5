"""SVDQuant: an equivalent network, and less error where a few channels are far larger than the others."""

from copy import deepcopy

import pytest
import torch
from torch import nn

import bitlaw
from bitlaw.calibration import InputStats
from bitlaw.methods.method import Transform
from bitlaw.methods.quantize import quantize
from bitlaw.methods.smoothquant import SmoothQuant
from bitlaw.methods.svdquant import SVDQuant
from bitlaw.models.generator import Site
from bitlaw.precision import BitPlan, Precision
from bitlaw.quantized import QuantLayer
from bitlaw.scaling.bits import count_bits
from quantized_networks import quantized
from tiny_models import TINY

FEW = bitlaw.Calibration(num_images=4, batch_size=2, seed=5)


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITLAW_CACHE", "")


def test_outliers_go_to_the_branch() -> None:
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 48)).requires_grad_(False)
    net[0].weight.normal_(generator=g)
    x = torch.randn(512, 64, generator=g)
    x[:, :4] *= 30
    plan = BitPlan({"0": (Precision.parse("W4A4"),)})
    stats = {"0": InputStats(low_C=x.amin(0), high_C=x.amax(0))}
    exact = net(x)

    def error(method: Transform | None) -> float:
        twin = deepcopy(net)
        if method is not None:
            method.apply(twin, [Site("0", "fc1", 0, "blocks", 1)], plan, stats)
            torch.testing.assert_close(twin(x), exact, rtol=1e-3, atol=1e-3)
        return float((quantized(twin, plan)(x) - exact).square().sum())

    assert error(SVDQuant(rank=8)) < 0.9 * error(SmoothQuant()) < 0.9 * error(None)


def test_a_branch_is_saved_and_counted(tmp_path) -> None:
    torch.manual_seed(0)
    model = TINY["dit"]()
    small, plain = (quantize(model, "W4A8", m, calibration=FEW) for m in ("svdquant:rank=2+gptq", "smoothquant+gptq"))
    layers = {n: m for n, m in small.net.named_modules() if isinstance(m, QuantLayer)}
    assert all(m.branch is not None for m in layers.values())
    small.save(tmp_path / "small")
    assert torch.equal(bitlaw.load(tmp_path / "small").generate([0, 1], seed=2), small.generate([0, 1], seed=2))
    numbers = sum(2 * sum(m.weight.shape) for m in layers.values())
    assert count_bits(small).model_bits - count_bits(plain).model_bits == 16 * numbers


def test_what_has_no_branch_is_said_before_any_work() -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="a branch of rank 16 is all of a weight"):
        quantize(TINY["dit"](), "W4A4", "svdquant", calibration=FEW)
    with pytest.raises(ValueError, match="branches for linears only"):
        quantize(TINY["ddpm"](), "W4A4", "svdquant:rank=2", calibration=FEW)


def test_a_second_branch_is_refused() -> None:
    """Also where only weights are quantized, and nothing is rescaled that would notice the first one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8)).requires_grad_(False)
    plan, site = BitPlan({"0": (Precision.parse("W4A16"),)}), Site("0", "fc1", 0, "blocks", 1)
    SVDQuant(rank=2).apply(net, [site], plan, {})
    with pytest.raises(ValueError, match="0: has a low-rank branch already"):
        SVDQuant(rank=2).apply(net, [site], plan, {})
