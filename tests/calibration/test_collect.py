"""What calibration sees, against tensors recorded by hand."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitlaw
from bitlaw.calibration.collect import Collector, collect
from bitlaw.calibration.histogram import Histograms
from bitlaw.calibration.settings import Calibration
from bitlaw.models.generator import Noise, rollout
from tiny_models import TINY

SETTINGS = Calibration(num_images=5, batch_size=2, seed=3, rows_per_input=10**6, sample_rows=7)
ALL = frozenset({"second_moment_I", "hessian_II", "low_C", "high_C", "rows_RI", "histograms_S"})


@pytest.fixture(params=["var", "dit", "ddpm", "mar"])
def model(request):
    torch.manual_seed(0)
    return TINY[request.param]()


def inputs_of(model, name):
    """Rows of all that enters a site, recorded by a hook of its own."""
    layer, rows = model.net.get_submodule(name), []

    def see(module, args):
        x = args[0].float().clone()
        if isinstance(module, nn.Conv2d):
            x = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).transpose(1, 2)
        rows.append(x.flatten(0, -2))

    hook = layer.register_forward_pre_hook(see)
    for begin in range(0, 5, 2):
        ids = range(begin, min(begin + 2, 5))
        labels = torch.tensor([i % max(1, model.num_classes) for i in ids])
        for _ in rollout(model, labels, Noise(3, ids)):
            pass
    hook.remove()
    return torch.cat(rows).double()


def test_statistics_are_those_of_all_rows(model) -> None:
    names = [site.name for site in model.sites()]
    stats = collect(model, SETTINGS, names, ALL)
    for name in names[:: max(1, len(names) // 6)]:
        x = inputs_of(model, name)
        seen = stats[name]
        # float32 products, float64 sums
        torch.testing.assert_close(seen.hessian_II.double(), x.T @ x / len(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(seen.second_moment_I.double(), x.square().mean(0), rtol=1e-5, atol=1e-6)
        assert seen.num_rows == len(x)
        if not isinstance(model.net.get_submodule(name), nn.Conv2d):
            assert torch.equal(seen.low_C.double(), x.amin(0)) and torch.equal(seen.high_C.double(), x.amax(0))
            assert (seen.histograms_S[0].low, seen.histograms_S[0].high) == (float(x.min()), float(x.max()))
            assert seen.histograms_S[0].total == x.numel()
        # Each sampled row is one of those that entered.
        assert all((x - row).abs().amax(1).min() < 1e-6 for row in seen.rows_RI.double())


def test_both_branches_of_guidance_count() -> None:
    torch.manual_seed(0)
    model = TINY["dit"]()
    name = "blocks.0.attn.qkv"
    both, one = (
        collect(model.with_sampling(guidance=w), SETTINGS, [name], frozenset({"second_moment_I"}))[name].num_rows
        for w in (2.0, 1.0)
    )
    assert both == 2 * one
    guided = Calibration(num_images=5, batch_size=2, guidance=1.0, rows_per_input=10**6)
    assert collect(model, guided, [name], frozenset({"second_moment_I"}))[name].num_rows == one


def test_balanced_steps_weigh_the_same() -> None:
    """VAR's first stage has one token, its last 16; balanced, each has a third of the weight."""
    torch.manual_seed(0)
    model, name = TINY["var"](), "blocks.0.attn.mat_qkv"
    settings = Calibration(num_images=2, batch_size=2, seed=3, balanced_steps=True)
    seen = collect(model, settings, [name], frozenset({"second_moment_I"}))[name]
    per_step = []
    layer = model.net.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda _, args: per_step.append(args[0].flatten(0, -2).square().mean(0)))
    for _ in rollout(model, torch.tensor([0, 1]), Noise(3, range(2))):
        pass
    hook.remove()
    assert len(per_step) == 3
    torch.testing.assert_close(seen.second_moment_I, torch.stack(per_step).mean(0), rtol=1e-5, atol=1e-6)


def test_rows_are_sampled_where_they_are_many() -> None:
    torch.manual_seed(0)
    model, name = TINY["dit"](), "blocks.0.mlp.fc1"
    exact = collect(model, SETTINGS, [name], ALL)[name]
    few = collect(model, Calibration(num_images=5, batch_size=2, seed=3, rows_per_input=4), [name], ALL)[name]
    assert 0.9 * 64 <= few.num_rows <= 64 < exact.num_rows
    # An unbiased sample of 64 rows of 160: within a few standard errors.
    ratio = few.second_moment_I.mean() / exact.second_moment_I.mean()
    assert 0.7 < float(ratio) < 1.4


def test_sites_that_nothing_reaches_are_named() -> None:
    torch.manual_seed(0)
    model = TINY["dit"]()
    model.net.spare = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="spare: no calibration sample reached it; draw other labels, or protect"):
        collect(model, SETTINGS, ["blocks.0.attn.qkv", "spare"], frozenset({"low_C"}))


def test_histograms_are_of_their_step_group() -> None:
    torch.manual_seed(0)
    model, name = TINY["dit"](), "blocks.0.attn.qkv"
    whole = collect(model, SETTINGS, [name], ALL)[name].histograms_S
    parts = collect(model, SETTINGS, [name], ALL, step_groups=(0, 1, 3))[name].histograms_S
    assert len(whole) == 1 and len(parts) == 3
    assert [p.total * 4 / whole[0].total for p in parts] == [1, 2, 1]
    assert min(p.low for p in parts) == whole[0].low and max(p.high for p in parts) == whole[0].high


@pytest.mark.parametrize("needs", [ALL, ALL - {"hessian_II"}, frozenset({"hessian_II"}), frozenset({"histograms_S"})])
def test_memory_stated_beforehand_is_what_is_held(needs) -> None:
    torch.manual_seed(0)
    model = TINY["dit"]()
    names = [site.name for site in model.sites()]
    few_rows = replace(SETTINGS, sample_rows=1)  # each layer gives so many
    collector = Collector(model, names, needs, few_rows, step_groups=(0, 2))
    stated = collector.num_bytes()
    with collector.watching():
        model.generate([0, 1])
    held = sum(part.nbytes for seen in collector.seen.values() for part in tensors_of(seen))
    held += sum(part.nbytes for entry in collector.stats().values() for part in made_by(entry))
    # Numbers that wait to be counted are stated as if as many as can be did.
    waiting = len(names) * Histograms.num_bytes(0) if "histograms_S" in needs else 0
    assert held + waiting == stated


def tensors_of(seen):
    """What a collector holds of a layer."""
    moments = [seen.moments._sum, seen.moments._buffer_RI] if seen.moments else []
    ends, counts = [], []
    if seen.extremes:
        seen.extremes.fold()
        ends = [seen.extremes.low_C, seen.extremes.high_C, seen.extremes.ends_S2]
    if seen.histograms:
        counts = [histogram.counts_K for histogram in seen.histograms.counted_S(seen.extremes.ends_S2)]
    return [x for x in (*moments, *ends, *seen.rows, *counts) if x is not None]


def made_by(stats):
    """What `stats` makes beside it."""
    return [x for x in (stats.second_moment_I, stats.hessian_II) if x is not None]


def test_extremes_are_of_their_step_group(model) -> None:
    """And only what is asked for is told."""
    names = [site.name for site in model.sites()]
    ends = collect(model, SETTINGS, names, frozenset({"ends_S2"}), step_groups=(0, 2))
    whole = collect(model, SETTINGS, names, frozenset({"low_C"}))
    for name in names:
        low_S, high_S = ends[name].ends_S2.T
        assert (low_S.min(), high_S.max()) == (whole[name].low_C.min(), whole[name].high_C.max())
        assert ends[name].low_C is None and whole[name].ends_S2 is None
    assert any(len(stats.ends_S2.unique()) == 4 for stats in ends.values())


def test_watching_ends() -> None:
    torch.manual_seed(0)
    model = TINY["dit"]()
    collector = Collector(model, ["blocks.0.attn.qkv"], frozenset({"low_C"}), SETTINGS)
    with collector.watching():
        pass
    model.generate([0])
    assert collector.seen["blocks.0.attn.qkv"].calls == 0


@pytest.mark.parametrize(
    ("bad", "said"),
    [({"num_images": 0}, "num_images 0"), ({"ranges": "best"}, "'best'"), ({"percentile": 3.0}, "percentile 3")],
)
def test_settings_that_cannot_be(bad, said) -> None:
    with pytest.raises(ValueError, match=said):
        Calibration(**bad)


def test_moments_of_few_rows_are_about_those_of_all() -> None:
    """Within what independent rows allow: relative error of E[x x^T] about sqrt(effective inputs / rows)."""
    model = bitlaw.load("ladder/var-xs")
    name, needs = "blocks.1.attn.mat_qkv", frozenset({"hessian_II"})
    some, all_ = (
        collect(model, Calibration(num_images=32, rows_per_input=n), [name], needs)[name].hessian_II
        for n in (16, 10**6)
    )
    assert some is not None and all_ is not None
    assert float((some - all_).norm() / all_.norm()) < 0.2
