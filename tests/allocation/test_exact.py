"""Exact curves are those of full runs, bit for bit, and an interrupted measurement goes on."""

import importlib

import pytest
import torch

from bitlaw.allocation.curves import CurveSettings, RateDistortion, TensorKey, plan_of_widths
from bitlaw.allocation.exact import measure_curves
from bitlaw.allocation.paths import Paths
from bitlaw.allocation.tape import Tape
from bitlaw.methods.quantize import quantize
from tiny_models import TINY

UNET = "unet.down_blocks.0"
SITES = {
    # A modulation that only the first stage calls, one of no block, a layer that only later stages call, the head.
    "var": ("word_embed", "blocks.0.ada_lin.1", "blocks.1.ada_lin.1", "blocks.1.attn.mat_qkv", "blocks.0.attn.proj",
            "blocks.1.ffn.fc2", "head_nm.ada_lin.1", "head"),
    "dit": ("x_embedder.proj", "t_embedder.mlp.2", "blocks.0.adaLN_modulation.1", "blocks.1.attn.qkv",
            "blocks.1.mlp.fc1", "final_layer.linear"),
    "llamagen": ("layers.0.attention.wqkv", "layers.1.feed_forward.w3", "output"),
    # Blocks that run while tokens are drawn, many times a step; a layer that the first step does not call.
    "mar": ("z_proj", "encoder_blocks.1.mlp.fc1", "decoder_blocks.0.attn.qkv", "diffloss.net.time_embed.mlp.2",
            "diffloss.net.res_blocks.1.adaLN_modulation.1", "diffloss.net.res_blocks.1.mlp.2"),
    "ddpm": ("unet.time_embedding.linear_1", f"{UNET}.resnets.0.conv2", f"{UNET}.resnets.0.time_emb_proj",
             f"{UNET}.attentions.0.to_k", "unet.up_blocks.1.resnets.1.conv_shortcut", "unet.conv_out"),
    "ldm-of-classes": (f"{UNET}.attentions.0.transformer_blocks.0.attn2.to_v",
                       "unet.up_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("BITLAW_CACHE", "")


def make(name):
    torch.manual_seed(0)
    return TINY[name]()


def settings_for(model, sites, **given):
    """Settings whose curves are of these sites."""
    others = tuple(site.name for site in model.sites() if site.name not in sites)
    assert len(others) + len(sites) == len(model.sites())
    usual = {"widths": (0, 3), "num_images": 3, "batch_size": 2, "step_groups": (0, 1), "protect": others or ("none",)}
    return CurveSettings(**usual | given)


def by_full_runs(model, settings, tensors):
    paths = Paths(model, settings)
    return {
        tensor: tuple(
            tuple(paths.distortion(quantize(model, plan_of_widths(settings, {tensor: bits}), settings.method)).tolist())
            for bits in settings.widths
        )
        for tensor in tensors
    }


@pytest.mark.parametrize("name", SITES)
def test_every_point_is_that_of_full_runs(name):
    model = make(name)
    settings = settings_for(model, SITES[name])
    before = {key: value.clone() for key, value in model.net.state_dict().items()}
    curves = measure_curves(model, settings, name=name)
    assert len(curves.by_step) == 3 * len(SITES[name])
    assert curves.by_step == by_full_runs(model, settings, curves.by_step)
    assert (curves.mode, curves.model, curves.settings) == ("exact", name, settings)
    assert all(torch.equal(before[key], value) for key, value in model.net.state_dict().items())
    assert not any("forward" in vars(module) for module in model.net.modules())


@pytest.mark.parametrize("given", [{"static_inputs": True}, {"numbers": "symmetric", "group_size": 8}])
@pytest.mark.parametrize("name", ["var", "dit"])
def test_so_it_is_with_static_ranges_and_groups(name, given):
    model = make(name)
    sites = [site for site in SITES[name] if site.startswith("blocks")]
    settings = settings_for(model, sites, **given)
    curves = measure_curves(model, settings)
    assert curves.by_step == by_full_runs(model, settings, curves.by_step)


def test_so_it_is_with_a_method_that_changes_other_layers():
    model = make("dit")
    settings = settings_for(model, ["blocks.1.mlp.fc1"], method="smoothquant")
    curves = measure_curves(model, settings)
    assert curves.by_step == by_full_runs(model, settings, curves.by_step)


def test_codes_of_a_calibrated_method_are_those_of_a_plan_of_all_sites():
    model = make("dit")
    settings = settings_for(model, SITES["dit"], widths=(3,), method="gptq:sequential=false", what="weights")
    curves = measure_curves(model, settings)
    tensor = TensorKey("blocks.1.mlp.fc1", "weight")
    plan = plan_of_widths(settings, dict.fromkeys(curves.by_step, 3))
    together = quantize(model, plan, settings.method).net.get_submodule(tensor.site)
    alone = quantize(model, plan_of_widths(settings, {tensor: 3}))
    alone.net.get_submodule(tensor.site).hold(together.quantized, together.weight)
    assert curves.by_step[tensor] == (tuple(Paths(model, settings).distortion(alone).tolist()),)


def test_steps_outside_of_an_inputs_group_do_not_feel_it_without_a_cache():
    model = make("dit")
    curves = measure_curves(model, settings_for(model, ["blocks.0.mlp.fc1"], step_groups=(0, 1, 3)))
    felt = {key.group: [d > 0 for d in curves.by_step[key][1]] for key in curves.keys("input")}
    assert felt == {0: [True, False, False, False], 1: [False, True, True, False], 2: [False, False, False, True]}


def test_with_a_cache_later_steps_feel_it_and_earlier_ones_do_not():
    model = make("var")
    settings = settings_for(model, ["blocks.0.attn.mat_qkv"], step_groups=(0, 1, 2))
    curves = measure_curves(model, settings)
    felt = {key.group: [d > 0 for d in curves.by_step[key][1]] for key in curves.keys("input")}
    assert felt == {0: [True, True, True], 1: [False, True, True], 2: [False, False, True]}


def test_weights_or_inputs_only():
    model = make("dit")
    for what, expected in (("weights", {"weight"}), ("inputs", {"input"})):
        curves = measure_curves(model, settings_for(model, ["blocks.0.mlp.fc1"], what=what))
        assert {key.what for key in curves.by_step} == expected


def count_calls(monkeypatch, what):
    """A dictionary of how often each of these functions, "module.name", is called from now on."""
    counts = dict.fromkeys(what, 0)

    def counting(name, run):
        def counted(*args, **kwargs):
            counts[name] += 1
            return run(*args, **kwargs)

        return counted

    for name in what:
        module, _, attribute = name.rpartition(".")
        monkeypatch.setattr(name, counting(name, getattr(importlib.import_module(module), attribute)))
    return counts


@pytest.mark.parametrize(
    ("site", "num_attends", "num_layers"),
    [
        ("blocks.1.mlp.fc2", 0, 2),  # the final layer and its modulation remain, and fc2 is not a Linear any more
        ("blocks.1.attn.proj", 0, 4),  # attention ends with it
        ("blocks.1.attn.qkv", 1, 5),
        ("blocks.0.attn.qkv", 2, 10),
    ],
)
def test_what_lies_before_the_tensor_is_not_computed(site, num_attends, num_layers, monkeypatch):
    model = make("dit")
    attend, layer = "bitlaw.models.parts.transformer.attend", "bitlaw.linear.linear"
    settings = settings_for(model, [site], widths=(2, 3, 4), num_images=2, what="weights")
    counts = count_calls(monkeypatch, [attend, layer])
    Paths(model, settings)
    a_rollout = dict(counts)
    measure_curves(model, settings)
    left = {name: counts[name] - 2 * a_rollout[name] for name in counts}  # the images are drawn once more
    # A step is recorded as far as the block: two Linears before the blocks, five in each.
    recorded = {attend: 1 if "blocks.0" in site else 2, layer: 2 + (5 if "blocks.0" in site else 10)}
    expected = {attend: 3 * num_attends, layer: 3 * num_layers}
    assert left == {name: 4 * (expected[name] + recorded[name]) for name in counts}


def test_an_output_that_is_written_to_is_noticed():
    class Careless(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

        def forward(self, x):
            return self.second(self.first(x).mul_(2))

    net = Careless()
    tape = Tape(net, ["first"], (), {"second": None})
    with torch.no_grad(), tape.patched():
        with tape.recording(0):
            net(torch.ones(1, 2))
        with pytest.raises(AssertionError, match="first: its input or output has been written to"):
            for _ in range(2):
                with tape.replaying(0, "second", lambda x: x):
                    net(torch.ones(1, 2))


# ---- interrupted, and done before -------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def stopping_after(limit):
    """Progress that raises when so many points have been measured; and what it was told."""
    told = []

    def progress(what, done, total):
        if what == "measuring curves":
            told.append((done, total))
            if len(told) > limit:
                raise Interrupted

    return progress, told


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_an_interrupted_measurement_goes_on(tmp_path, method):
    model = make("dit")
    settings = settings_for(model, SITES["dit"], method=method)
    uninterrupted = measure_curves(model, settings)
    progress, told = stopping_after(40)
    with pytest.raises(Interrupted):
        measure_curves(model, settings, work=tmp_path, progress=progress)
    assert not any("forward" in vars(module) for module in model.net.modules())
    finished = len(list(tmp_path.glob("*/*.json")))
    assert 0 < finished < 3  # the sites outside of blocks, and two blocks
    progress, told = stopping_after(10**6)
    assert measure_curves(model, settings, work=tmp_path, progress=progress) == uninterrupted
    total = 18 * 2 * 2  # tensors, widths, batches
    assert told[0][0] > 1 and told[-1] == (total, total)


def test_a_damaged_block_is_measured_again(tmp_path):
    model = make("dit")
    settings = settings_for(model, SITES["dit"])
    first = measure_curves(model, settings, work=tmp_path)
    paths = sorted(tmp_path.glob("*/*.json"))
    paths[0].write_text("{")
    paths[1].write_text(paths[2].read_text())
    assert measure_curves(model, settings, work=tmp_path) == first


def test_curves_are_not_measured_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("BITLAW_CACHE", str(tmp_path))
    model = make("dit")
    settings = settings_for(model, ["blocks.1.mlp.fc1"])
    first = measure_curves(model, settings, name="tiny")
    (path,) = (tmp_path / "curves").iterdir()  # and no finished blocks beside it
    assert RateDistortion.read(path) == first
    progress, told = stopping_after(0)
    assert measure_curves(model, settings, name="other", progress=progress).by_step == first.by_step
    assert told == []
    model.net.blocks[1].mlp.fc1.weight.data[0, 0] += 1
    with pytest.raises(Interrupted):
        measure_curves(model, settings, progress=progress)


# ---- mistakes -----------------------------------------------------------------------------------------------


def test_all_sites_that_cannot_be_quantized_are_named_before_anything_is_measured():
    model = make("dit")
    settings = settings_for(model, ["blocks.0.mlp.fc1", "blocks.1.mlp.fc2"], group_size=24)
    told = []
    with pytest.raises(ValueError, match=r"(?s)blocks\.0\.mlp\.fc1: .*24.*blocks\.1\.mlp\.fc2: .*24"):
        measure_curves(model, settings, progress=lambda *what: told.append(what))
    assert told == []
    with pytest.raises(ValueError, match="nothing to measure"):
        measure_curves(model, CurveSettings(protect=tuple(site.name for site in model.sites())))
    with pytest.raises(ValueError, match="full-precision"):
        measure_curves(quantize(model, "W4A16"), CurveSettings())


def test_a_point_whose_output_is_not_finite_is_named(monkeypatch):
    model = make("dit")
    settings = settings_for(model, ["blocks.1.mlp.fc1"], what="weights")
    monkeypatch.setattr("bitlaw.quantized.linear", lambda x, weight, bias: x.new_full((*x.shape[:-1], 64), torch.nan))
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.fc1\.weight at 0 bits: step 0: .*NaN"):
        measure_curves(model, settings)
