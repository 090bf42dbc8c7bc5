"""SmoothQuant on whole models, and on a layer with outliers."""

import pytest
import torch
from torch import nn

import bitlaw
from bitlaw.calibration import InputStats
from bitlaw.methods.quantize import quantize
from bitlaw.methods.smoothquant import SmoothQuant
from bitlaw.models.generator import Noise, Site, rollout
from bitlaw.precision import BitPlan, Precision
from bitlaw.quantized import QuantLayer
from tiny_models import TINY

FEW = bitlaw.Calibration(num_images=4, batch_size=2, seed=5)


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITLAW_CACHE", "")


def features(model) -> torch.Tensor:
    labels = torch.tensor([i % max(1, model.num_classes) for i in range(3)])
    return next(iter(rollout(model, labels, Noise(1, range(3))))).extracted.features


@pytest.mark.parametrize("family", TINY)
def test_full_precision_is_left_as_it_was(family) -> None:
    """With guidance where there is one. 1e-10 in float64 is in the conformance tests of absorbers; this is float32."""
    torch.manual_seed(0)
    model = TINY[family]()
    before = features(model)
    plan = BitPlan.uniform(Precision.parse("W4A4"), model.sites(), "none")
    g = torch.Generator().manual_seed(1)
    stats = {}
    for site in model.sites():
        layer = model.net.get_submodule(site.name)
        channels = layer.weight.shape[1]
        high = torch.rand(channels, generator=g) * 10 ** (2 * torch.rand(channels, generator=g))
        high[0] = 0
        stats[site.name] = InputStats(low_C=-high, high_C=high)
    notes = SmoothQuant().apply(model.net, model.sites(), plan, stats)
    assert set(notes) == {site.name for site in model.sites()}
    torch.testing.assert_close(features(model), before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))


def test_outlier_channels_hurt_less() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 24, bias=False)).requires_grad_(False)
    x = torch.randn(256, 32)
    x[:, :3] *= 40
    site = Site("0", "fc1", 0, "blocks", 1)
    stats = {"0": InputStats(low_C=x.amin(0), high_C=x.amax(0))}
    plan = BitPlan({"0": (Precision.parse("W8A8"),)})
    exact = net(x)

    def error(smooth: bool) -> float:
        from copy import deepcopy

        from bitlaw.methods.quantize import quantize_network
        from bitlaw.models.generator import StepClock

        twin = deepcopy(net)
        if smooth:
            SmoothQuant().apply(twin, [site], plan, stats)
        return float((quantize_network(twin, plan, "rtn", StepClock())(x) - exact).square().sum())

    assert error(True) < 0.5 * error(False)


def test_weight_only_precisions_are_left_alone() -> None:
    torch.manual_seed(0)
    model = TINY["dit"]()
    smooth, plain = (quantize(model, "W3A16", method, calibration=FEW) for method in ("smoothquant", "rtn"))
    assert torch.equal(smooth.generate([0, 1]), plain.generate([0, 1]))


@pytest.mark.parametrize("family", ["var", "dit", "ldm-of-classes" if "ldm-of-classes" in TINY else "ldm"])
def test_a_smoothed_model_is_saved_with_its_scales(family, tmp_path) -> None:
    torch.manual_seed(0)
    model = TINY[family]()
    small = quantize(model, "W4A8", "smoothquant+gptq", calibration=FEW)
    layers = {n: m for n, m in small.net.named_modules() if isinstance(m, QuantLayer)}
    notes = small.provenance["sites"]
    assert {n for n, m in layers.items() if m.scaling is None} == {
        n for n in layers if notes[n]["smoothquant"]["folded"]
    }
    assert any(m.scaling is not None for m in layers.values())
    small.save(tmp_path / "small")
    assert torch.equal(bitlaw.load(tmp_path / "small").generate([0], seed=2), small.generate([0], seed=2))


def test_without_explicit_scales_only_absorbers_take_them() -> None:
    torch.manual_seed(0)
    model = TINY["dit"]()
    small = quantize(model, "W4A8", "smoothquant:explicit=false", calibration=FEW)
    assert all(m.scaling is None for m in small.net.modules() if isinstance(m, QuantLayer))


def test_alpha_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"alpha 1\.5"):
        SmoothQuant(alpha=1.5)
