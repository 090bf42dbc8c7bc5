"""Learned clipping and learned equivalent transformations."""

from dataclasses import replace

import pytest
import torch
from block_tasks import applied, error_of, rtn, task_of, with_cache_of

from bitlaw.formats import FORMATS
from bitlaw.methods.clip import ClipSearch
from bitlaw.methods.omniquant import OmniQuant, _clipped, _fit, _OmniQuantLearner, _range
from bitlaw.methods.reconstruction import WorkingBlock
from bitlaw.precision import BitPlan, Precision
from bitlaw.quantized import WeightSpec

SHORT = OmniQuant(steps=100)


def note(result):
    return next(iter(result.notes.values()))


# ---- blocks -------------------------------------------------------------------------------------------


PRECISIONS = ["W2A16", "W3g8A16", "W4A16", "We2m1A16", "W3sA16", "W4A8", "W4A4KV6"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", ["var", "dit"])
def test_blocks_lose_less_than_by_rounding_to_nearest(family, precision):
    task = task_of(family, precision)
    result = SHORT.quantize_block(task)
    module, clock = applied(task, result)
    plain, plain_clock = applied(task, rtn(task))
    assert error_of(module, clock, with_cache_of(result, task)) < error_of(plain, plain_clock, task.calls)
    assert note(result)["block_error"] < note(result)["block_error_start"]
    assert result.weights.keys() == {site.name for site in task.sites}


@pytest.mark.parametrize("precision", ["W2A16", "W3g8A16", "W3sA16"])
def test_convolutions_lose_less_than_by_rounding_to_nearest(precision):
    task = task_of("ddpm", precision, number=0)
    result = SHORT.quantize_block(task)
    assert any(len(weight.shape) == 4 for weight in result.weights.values())
    module, clock = applied(task, result)
    plain, plain_clock = applied(task, rtn(task))
    assert error_of(module, clock, task.calls) < error_of(plain, plain_clock, task.calls)


def test_what_is_learned_is_what_the_installed_block_gives():
    """Behind rescalings of the block's own modulation, and through the values of its attention."""
    task = task_of("dit", "W4A5KV8")
    result = SHORT.quantize_block(task)
    assert {name.rpartition(".")[2] for name in result.rescalings} == {"qkv", "proj", "fc1"}
    module, clock = applied(task, result)
    held_out = replace(task, calls=task.held_out)
    measured = error_of(module, clock, with_cache_of(result, held_out)) / WorkingBlock(task).unit
    # A number next to a boundary between two codes may be rounded to the other one.
    assert note(result)["block_error"] == pytest.approx(measured, rel=1e-2)


def test_without_steps_it_is_the_best_of_its_starts():
    """RTN and searched ranges, behind no transformation or two."""
    task = task_of("dit", "W3A4")
    block = WorkingBlock(task)
    result = OmniQuant(steps=0).quantize_block(task)
    learner = _OmniQuantLearner(block, OmniQuant())
    errors = []
    for state in learner.starts():
        learner.load(state)
        errors.append(block.error(learner.hard(), task.held_out))
    assert len(errors) == 6 and len(set(errors)) == 6
    assert note(result)["block_error"] == min(errors)
    assert errors[0] == pytest.approx(block.error(rtn(task), task.held_out), rel=1e-5)  # (1 + b) - 1 is not b


def test_it_gives_the_same_twice():
    task = task_of("var", "W3A6")
    one, two = (OmniQuant(steps=8).quantize_block(task) for _ in range(2))
    assert one.notes == two.notes
    assert all(torch.equal(one.weights[n].codes, two.weights[n].codes) for n in one.weights)
    assert all(torch.equal(one.rescalings[n].scale_C, two.rescalings[n].scale_C) for n in one.rescalings)


# ---- transformation -----------------------------------------------------------------------------------


def test_sites_that_share_an_absorber_share_scales():
    task = task_of("llamagen", "W4A6")
    result = OmniQuant(steps=8).quantize_block(task)
    assert note(result)["learned_steps"]
    by_kind = {name.rpartition(".")[2]: rescaling for name, rescaling in result.rescalings.items()}
    assert by_kind.keys() == {"wqkv", "wo", "w1", "w3", "w2"}
    assert torch.equal(by_kind["w1"].scale_C, by_kind["w3"].scale_C)
    assert not torch.equal(by_kind["w1"].scale_C, by_kind["wqkv"].scale_C)
    assert all(rescaling.shift_C is None for rescaling in by_kind.values())  # its norms have no bias


def test_shifts_where_absorber_and_layer_take_them():
    """Not at VAR's qkv, whose keys have no bias, nor at fc2, which nothing can absorb for."""
    result = OmniQuant(steps=8).quantize_block(task_of("var", "W4A6"))
    shifted = {name.rpartition(".")[2]: r.shift_C is not None for name, r in result.rescalings.items()}
    assert shifted == {"mat_qkv": False, "proj": True, "fc1": True}


def test_channels_of_different_size_are_evened_out():
    task = task_of("dit", "W6A4", outliers=True)
    with_it, without = (replace(SHORT, transform=on).quantize_block(task) for on in (True, False))
    assert with_it.rescalings and not without.rescalings
    assert note(with_it)["block_error"] < 0.8 * note(without)["block_error"]
    assert with_it.notes["blocks.1.mlp.fc1"]["largest_scale"] > 2 * with_it.notes["blocks.1.mlp.fc1"]["smallest_scale"]


def test_nothing_is_rescaled_where_inputs_are_not_quantized():
    assert not OmniQuant(steps=4).quantize_block(task_of("dit", "W3A16")).rescalings


def test_static_ranges_are_not_rescaled_away():
    task = task_of("dit", "W4A8c")
    format = FORMATS["int8"]
    ranges = {}
    for site in task.sites:
        ends = torch.stack([task.stats[site.name].low_C.min(), task.stats[site.name].high_C.max()])
        ranges[site.name] = format.storable(format.fit(ends[None]))
    task = replace(task, ranges=ranges)
    result = SHORT.quantize_block(task)
    assert not result.rescalings
    module, clock = applied(task, result)
    measured = error_of(module, clock, task.held_out) / WorkingBlock(task).unit
    assert note(result)["block_error"] == pytest.approx(measured, rel=1e-2)
    assert note(result)["block_error"] < note(result)["block_error_start"]


def test_dead_channels_are_left_alone():
    """A channel of zeros, and one that no weight looks at: its scale stays 1, and nothing is NaN."""
    task = task_of("dit", "W4A6")
    task.module.get_parameter("attn.qkv.weight").data[:, 3] = 0
    stats = dict(task.stats)
    seen = stats["blocks.1.attn.qkv"]
    low_C, high_C = seen.low_C.clone(), seen.high_C.clone()
    low_C[5] = high_C[5] = 0
    stats["blocks.1.attn.qkv"] = replace(seen, low_C=low_C, high_C=high_C)
    task = replace(task, stats=stats)
    learner = _OmniQuantLearner(WorkingBlock(task), OmniQuant())
    qkv = next(t for t in learner.transformations if "blocks.1.attn.qkv" in t.names)
    for shifts in (False, True):
        qkv.reset(shifts)
        rescaling = qkv.rescaling(is_stored=True)
        assert rescaling.scale_C[3] == rescaling.scale_C[5] == 1
        assert rescaling.scale_C.isfinite().all()
    assert rescaling.shift_C is not None and rescaling.shift_C[5] == 0
    result = OmniQuant(steps=8).quantize_block(task)
    assert all(q.decode().isfinite().all() for q in result.weights.values())


def test_dropped_weights_stay_dropped():
    task = task_of("dit", "W3A16")
    plan = BitPlan({name: (Precision.parse("W0A16"),) if "fc1" in name else task.plan[name] for name in task.plan})
    result = OmniQuant(steps=8).quantize_block(replace(task, plan=plan))
    assert not result.weights["blocks.1.mlp.fc1"].decode().any()
    assert result.weights["blocks.1.mlp.fc2"].decode().any()


# ---- clipping -----------------------------------------------------------------------------------------


def weight_of(rows=6, columns=16):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(4))


SPECS = [
    WeightSpec(FORMATS["int3"]),
    WeightSpec(FORMATS["int2"], 8),
    WeightSpec(FORMATS["int4s"], 8),
    WeightSpec(FORMATS["e2m1"]),
    WeightSpec(FORMATS["int3"], "tensor"),
]


def logits_of(spec, weight, value=None):
    sides = 2 if "zero_G1" in spec.format.param_names else 1
    shape = (spec.num_groups(weight.shape), sides)
    if value is not None:
        return torch.full(shape, value).requires_grad_()
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(5))).requires_grad_()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_what_is_learned_by_is_what_is_stored(spec):
    """The differentiable weight has the values of the stored one, to rounding of the sums that make it."""
    weight = weight_of()
    logits = logits_of(spec, weight)
    params = _fit(spec.format, *_range(spec.groups(weight), logits))
    stored = spec.join(spec.format.nearest(spec.groups(weight), params), weight.shape)
    assert torch.allclose(_clipped(weight, spec, logits), stored, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_learning_starts_at_rtn_exactly(spec):
    weight = weight_of()
    params = _fit(spec.format, *_range(spec.groups(weight), logits_of(spec, weight, 4.0)))
    expected = spec.fit(weight)
    assert all(torch.equal(params[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ["int4s", "int8s", "e2m1", "e4m3", "int8"])
def test_gradients_are_those_of_a_homogeneous_function(name):
    """Twice the weight gives twice the result at the same factors, so that W times its gradient is the result (Euler).

    Stored scales are rounded to float16 and zero points to integers, which the gradient does not know of.
    """
    spec = WeightSpec(FORMATS[name], 8)
    weight = weight_of().requires_grad_()
    out = _clipped(weight, spec, logits_of(spec, weight))
    mixed = torch.randn(out.shape, generator=torch.Generator().manual_seed(6))
    (grad,) = torch.autograd.grad((out * mixed).sum(), weight)
    along, result = (grad * weight.detach()).sum(), (out.detach() * mixed).sum()
    assert float(along) == pytest.approx(float(result), abs=5e-3 * float((out.detach() * mixed).norm()))


def test_what_is_clipped_moves_with_the_range():
    """The largest number, far out: half with its own end, half with the width, to which both ends contribute."""
    spec = WeightSpec(FORMATS["int8"])
    weight = torch.cat([torch.linspace(-1, 1, 15), torch.tensor([4.0])])[None]
    logits = logits_of(spec, weight, 0.0)
    out = _clipped(weight, spec, logits)
    (grad,) = torch.autograd.grad(out[0, -1], logits)
    slope = 0.25 / float(torch.tensor(4.0).sigmoid())  # of the factor at 0
    low, high = slope * -1, slope * 4
    # The end is at 4/5 of the width, which grows by d high - d low.
    assert torch.allclose(grad, torch.tensor([[-0.5 * 0.8 * low, 0.5 * high + 0.5 * 0.8 * high]]), atol=1e-2)


def test_equal_numbers_and_zeros_come_back():
    weight = torch.zeros(2, 16)
    weight[1] = -0.75
    for name in ("int2", "int3s", "e2m1"):
        spec = WeightSpec(FORMATS[name])
        logits = logits_of(spec, weight, -2.0)
        out = _clipped(weight, spec, logits)
        assert torch.equal(out, weight)
        (grad,) = torch.autograd.grad(out.sum(), logits)
        assert grad.isfinite().all()


# ---- settings -----------------------------------------------------------------------------------------


def test_a_codebook_is_refused_before_the_work():
    layer = torch.nn.Linear(16, 16)
    assert "use gptvq" in OmniQuant().problem(layer, WeightSpec(FORMATS["v2b3"]))
    assert all(OmniQuant().problem(layer, WeightSpec(FORMATS[name])) is None for name in ("int3", "int4s", "e4m3"))


def test_sites_outside_of_blocks_have_their_ranges_searched():
    assert OmniQuant().outside == ClipSearch()
    assert OmniQuant().outside.needs <= OmniQuant().needs


@pytest.mark.parametrize("settings", [{"clip_rate": 0.0}, {"transform_rate": -1.0}, {"steps": -1}, {"batch_calls": 0}])
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match=r"must be above 0|too small"):
        OmniQuant(**settings)
