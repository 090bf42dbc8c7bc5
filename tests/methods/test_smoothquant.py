"""SmoothQuant on whole models, and on a layer with outliers."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitlaw
from bitlaw.calibration import InputStats
from bitlaw.methods.quantize import quantize
from bitlaw.methods.smoothquant import GRID, SmoothQuant, smoothing_scale
from bitlaw.models.generator import Noise, Site, rollout
from bitlaw.precision import BitPlan, Precision
from bitlaw.quantized import QuantLayer
from quantized_networks import quantized
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
        twin = deepcopy(net)
        if smooth:
            SmoothQuant().apply(twin, [site], plan, stats)
        return float((quantized(twin, plan)(x) - exact).square().sum())

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


def test_scales_are_those_of_the_paper_but_for_a_common_factor() -> None:
    """Channels that are always 0, and extreme ones, stay within what can be stored."""
    g = torch.Generator().manual_seed(0)
    x_C, w_C = torch.rand(64, generator=g) + 0.1, torch.rand(64, generator=g) + 0.1
    ratio_C = smoothing_scale(x_C, w_C, 0.7) / (x_C**0.7 / w_C**0.3)
    torch.testing.assert_close(ratio_C, ratio_C.mean().expand(64), rtol=1e-3, atol=0)  # rounded to float16
    x_C[:3] = torch.tensor([0.0, 1e-30, 1e30])
    scale_C = smoothing_scale(x_C, w_C, 0.7)
    assert scale_C[0] == 1 and scale_C.min() > 1e-4 and scale_C.max() < 1e4
    assert torch.equal(smoothing_scale(torch.zeros(4), torch.ones(4), 0.5), torch.ones(4))


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_the_search_finds_the_best_alpha_of_its_grid(kind: str) -> None:
    """By the error of the quantized layer itself, for the rows that the search has seen."""
    g = torch.Generator().manual_seed(0)
    sizes = torch.exp2(3 * torch.randn(16, generator=g))
    if kind == "linear":
        net = nn.Sequential(nn.Linear(16, 24)).requires_grad_(False)
        x = torch.randn(128, 16, generator=g) * sizes
        rows, low, high = x, x.amin(0), x.amax(0)
    else:  # windows that do not overlap: an image's range is that of all its rows
        net = nn.Sequential(nn.Conv2d(16, 24, 2, stride=2)).requires_grad_(False)
        x = torch.randn(1, 16, 16, 16, generator=g) * sizes[:, None, None]
        rows, low, high = F.unfold(x, 2, stride=2)[0].T, x.amin((0, 2, 3)), x.amax((0, 2, 3))
    site, plan = Site("0", "fc1", 0, "blocks", 1), BitPlan({"0": (Precision.parse("W4A6"),)})
    stats = {"0": InputStats(low_C=low, high_C=high, rows_RI=rows)}
    exact, notes = net(x), {}

    def error(alpha: float | None) -> float:
        twin = deepcopy(net)
        notes.update(SmoothQuant(alpha).apply(twin, [site], plan, stats))
        return float((quantized(twin, plan)(x) - exact).square().sum())

    errors = {alpha: error(alpha) for alpha in GRID}
    best = min(errors, key=errors.__getitem__)
    assert error(None) == errors[best] and notes["0"]["alpha"] == best
    assert 0 < best < 1


def test_the_search_leaves_alone_what_no_scale_helps() -> None:
    """Where all channels are alike every alpha gives a scale of 1, which is not better than none."""
    net = nn.Sequential(nn.Linear(8, 8)).requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (3, 8, 8), generator=g) * 2.0 - 1
    net[0].weight.copy_(signs[0])
    stats = {"0": InputStats(low_C=-torch.ones(8), high_C=torch.ones(8), rows_RI=signs[1])}
    plan = BitPlan({"0": (Precision.parse("W4A4"),)})
    notes = SmoothQuant(alpha=None).apply(net, [Site("0", "fc1", 0, "blocks", 1)], plan, stats)
    assert "no alpha" in notes["0"]["skipped"] and type(net[0]) is nn.Linear


@pytest.mark.parametrize("family", ["large-dit", "ddpm"])
def test_alpha_is_searched_on_whole_models(family) -> None:
    torch.manual_seed(0)
    small = quantize(TINY[family](), "W4A8", "smoothquant:alpha=none", calibration=FEW)
    notes = [note["smoothquant"] for note in small.provenance["sites"].values()]
    assert len({note.get("alpha") for note in notes}) > 1
    assert all(note.get("alpha", 0) in GRID for note in notes)


def test_a_scale_that_other_sites_would_get_too_is_not_absorbed() -> None:
    """Large-DiT's keys and values stay in 16 bits here, and share their input with the queries."""
    torch.manual_seed(0)
    model = TINY["large-dit"]()
    names = {site.name for site in model.sites()}
    plan = BitPlan({n: (Precision.parse("W4A8" if n == "layers.0.attention.wq" else "W16"),) for n in names})
    for explicit in (True, False):
        method = SmoothQuant(explicit=explicit)
        small = quantize(model, plan, method, calibration=FEW)
        layer = small.net.get_submodule("layers.0.attention.wq")
        assert isinstance(layer, QuantLayer) and (layer.scaling is not None) == explicit
        keys = "layers.0.attention.wk.weight"
        assert torch.equal(small.net.get_parameter(keys), model.net.get_parameter(keys))
