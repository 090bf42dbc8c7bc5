"""Learned rounding: up or down."""

from dataclasses import replace

import pytest
import torch
from block_tasks import applied, error_of, rtn, task_of

from bitlaw.formats import FORMATS
from bitlaw.methods.clip import ClipSearch
from bitlaw.methods.learned_rounding import LearnedRounding, _Rounded, _RoundingLearner
from bitlaw.methods.method import BlockResult
from bitlaw.methods.reconstruction import Schedule, WorkingBlock, learn
from bitlaw.precision import BitPlan, Precision
from bitlaw.quantized import WeightSpec

SHORT = LearnedRounding(steps=60)


def note(result):
    return next(iter(result.notes.values()))


@pytest.mark.parametrize("precision", ["W2A16", "W3g4A16", "W4sA16", "W4A8", "W3A4KV6"])
@pytest.mark.parametrize("family", ["var", "dit", "ddpm"])
def test_blocks_lose_less_than_by_rounding_to_nearest(family, precision):
    task = task_of(family, precision, number=0 if family == "ddpm" else 1)  # a residual block of convolutions
    result = SHORT.quantize_block(task)
    module, clock = applied(task, result)
    plain, plain_clock = applied(task, rtn(task))
    assert error_of(module, clock, task.calls) < error_of(plain, plain_clock, task.calls)
    assert note(result)["block_error"] < note(result)["block_error_start"]
    assert not result.rescalings


def test_codes_are_those_below_or_above():
    """Of the range that ClipSearch finds, whose parameters stay; some are the farther ones."""
    task = task_of("dit", "W3g8A16")
    result = SHORT.quantize_block(task)
    for site in task.sites:
        weight = task.module.get_parameter(f"{task.inside(site)}.weight").detach()
        quantized = result.weights[site.name]
        start = ClipSearch().quantize(weight, task.stats[site.name], quantized.spec)
        assert all(torch.equal(quantized.params[name], start.params[name]) for name in start.params)
        scale = quantized.params["scale_G1"].float()
        exact = quantized.spec.groups(weight) / scale + quantized.params["zero_G1"]
        codes = quantized.spec.groups(quantized.codes.float())
        inside = (exact >= -4) & (exact <= 3)
        assert ((codes - exact).abs()[inside] < 1 + 1e-4).all()
        assert ((codes >= -4) & (codes <= 3)).all()
        moved = float((quantized.codes != start.codes).float().mean())
        assert result.notes[site.name]["moved"] == pytest.approx(moved) and 0 < moved < 0.5


@pytest.mark.parametrize("text", ["W3A16", "W3sA16", "W2g8A16", "W4tA16"])
def test_weights_in_the_middle_of_two_codes_begin_where_they_were_rounded_to(text):
    g = torch.Generator().manual_seed(0)
    spec = WeightSpec.of(Precision.parse(text).weight)
    exact = spec.quantize(torch.randn(32, 64, generator=g))
    scale = spec.join(
        exact.params["scale_G1"].float().expand(-1, exact.codes.numel() // len(exact.params["scale_G1"])), (32, 64)
    )
    weight = exact.decode() + scale / 2
    start = spec.quantize(weight)
    assert torch.equal(_Rounded.of(weight, start).hard().codes, start.codes)


@pytest.mark.parametrize(("family", "best"), [("dit", "search"), ("ddpm", "rtn")])
def test_without_steps_it_is_the_better_start(family, best):
    task = task_of(family, "W3A16")
    weights = {}
    for site in task.sites:
        weight = task.module.get_parameter(f"{task.inside(site)}.weight").detach()
        spec = WeightSpec.of(task.plan.weight(site.name))
        weights[site.name] = ClipSearch().quantize_layer(weight, task.stats[site.name], spec)
    starts = {"search": BlockResult(weights), "rtn": rtn(task)}
    assert best == min(starts, key=lambda name: error_of(*applied(task, starts[name]), task.held_out))
    result = LearnedRounding(steps=0).quantize_block(task)
    assert all(torch.equal(result.weights[n].codes, w.codes) for n, w in starts[best].weights.items())
    assert all(result.weights[n].shape == w.shape for n, w in starts[best].weights.items())


def test_it_gives_the_same_twice():
    task = task_of("var", "W3A6")
    one, two = (LearnedRounding(steps=8).quantize_block(task) for _ in range(2))
    assert one.notes == two.notes
    assert all(torch.equal(one.weights[n].codes, two.weights[n].codes) for n in one.weights)


def test_the_penalty_decides_what_the_loss_leaves_open():
    """At the end of learning hardly a weight lies between its codes with it, and many do without."""
    task, undecided = task_of("dit", "W3A16"), {}
    for penalty in (100.0, 0.0):
        block = WorkingBlock(task)
        learner = _RoundingLearner(block, LearnedRounding(penalty=penalty), ClipSearch())
        learn(block, learner, Schedule(150, 1))
        up = torch.cat([rounded.up_GN().detach().flatten() for rounded in learner.rounded.values()])
        undecided[penalty] = float(((up > 0.05) & (up < 0.95)).float().mean())
    assert undecided[100.0] < 0.3 < 0.5 < undecided[0.0]


@pytest.mark.parametrize("name", ["int3", "int4s"])
def test_learning_starts_at_the_weight_itself(name):
    """Codes between two stand for what the weight is, but where it is clipped."""
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    rounded = _Rounded.of(weight, WeightSpec(FORMATS[name], 8).quantize(weight))
    spec, params = rounded.start.spec, rounded.start.params
    ends = spec.format.nearest(torch.tensor([[-1e3, 1e3]]).expand(len(params["scale_G1"]), -1), params)
    expected = spec.groups(weight).clamp(ends[:, :1], ends[:, 1:])
    assert torch.allclose(spec.groups(rounded.soft()), expected, atol=1e-5)
    assert torch.equal(rounded.hard().codes, rounded.start.codes)


def test_weights_of_other_precisions_stay_what_they_are():
    """Dropped, and in 16 bits with a quantized input."""
    task = task_of("dit", "W3A16")
    other = {"blocks.1.mlp.fc1": "W0A16", "blocks.1.attn.proj": "W16A8"}
    sites = {name: (Precision.parse(other[name]),) if name in other else task.plan[name] for name in task.plan}
    result = LearnedRounding(steps=8).quantize_block(replace(task, plan=BitPlan(sites)))
    assert not result.weights["blocks.1.mlp.fc1"].decode().any()
    assert "blocks.1.attn.proj" not in result.weights
    assert len(result.weights) == len(task.sites) - 1


def test_what_has_no_next_integer_is_refused_before_the_work():
    layer = torch.nn.Linear(16, 16)
    for name in ("e2m1", "v2b3"):
        assert "use integers" in LearnedRounding().problem(layer, WeightSpec(FORMATS[name]))
    for name in ("int3", "int4s", "int0"):
        assert LearnedRounding().problem(layer, WeightSpec(FORMATS[name])) is None


@pytest.mark.parametrize("settings", [{"learning_rate": 0.0}, {"penalty": -1.0}, {"steps": -1}])
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match=r"must be above 0|too small"):
        LearnedRounding(**settings)
