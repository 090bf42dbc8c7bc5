"""The loop that learns by what a block gives."""

import math
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import torch
from block_tasks import applied, error_of, in_doubled_steps, rtn, task_of, with_cache_of

from bitlaw.formats import FORMATS
from bitlaw.methods.method import BlockResult, Rescaling
from bitlaw.methods.reconstruction import (
    LayerTensors,
    LearnedFakeQuant,
    Learner,
    ParameterGroup,
    Schedule,
    WorkingBlock,
    _batches,
    learn,
    width_of,
)
from bitlaw.methods.rescale import input_channels, shift_problem
from bitlaw.models.generator import StepClock
from bitlaw.models.parts.key_values import LayerKeyValues
from bitlaw.precision import Precision
from bitlaw.quantized import ActivationSpec, FakeQuant, WeightSpec
from tiny_models import TINY


def random_rescalings(task):
    g, out = torch.Generator().manual_seed(2), {}
    for names in WorkingBlock(task).users.values():
        absorber = next(site.absorber for site in task.sites if site.name == names[0])
        layers = [task.module.get_submodule(task.inside(name)) for name in names]
        if not all(isinstance(layer, torch.nn.Linear) for layer in layers):
            continue
        channels = input_channels(layers[0])
        scale = torch.exp2(2 * torch.rand(channels, generator=g) - 1).half().float()
        shifts = absorber.shifts and not any(map(shift_problem, layers))
        shift = torch.randn(channels, generator=g).half().float() if shifts else None
        out |= {name: Rescaling(scale, shift) for name in names}
    return out


# ---- the working copy ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TINY)
def test_nothing_quantized_gives_the_target(family):
    """Behind full-precision blocks; what is left is rounding in float32."""
    task = task_of(family, "W16A16", 1)
    assert WorkingBlock(task).error(BlockResult({}), task.calls) < 1e-10


@pytest.mark.parametrize("family", ["var", "dit", "llamagen", "mar", "large-dit"])
def test_rescaling_alone_changes_nothing(family):
    task = task_of(family, "W16A16", 1)
    rescalings = random_rescalings(task)
    assert rescalings
    assert WorkingBlock(task).error(BlockResult({}, rescalings), task.calls) < 1e-10


@pytest.mark.parametrize("precision", ["W3A16", "W2g4A4", "W4e2m1A8KV6", "W16A5", "W3sA4KV4"])
@pytest.mark.parametrize("family", ["var", "dit", "llamagen", "ddpm", "ldm-of-classes"])
def test_errors_are_those_of_the_installed_block(family, precision):
    """As rescaled and installed by the driver, with two step groups; both compute in float32 in another order."""
    if "e2m1" in precision:
        precision = precision.replace("W4e2m1", "We2m1")
    task = task_of(family, precision, 1)
    if "A16" not in precision:
        task = in_doubled_steps(task, str(Precision.parse(precision)).split("A")[0] + "A6")
    for result in (rtn(task), rescaled_rtn(task)):
        module, clock = applied(task, result)
        block = WorkingBlock(task)
        # A number next to a boundary between two codes may be rounded to the other one.
        assert block.error(result, task.calls) * block.unit == pytest.approx(
            error_of(module, clock, with_cache_of(result, task)), rel=1e-3
        )


def rescaled_rtn(task):
    """Each weight to nearest behind random rescalings."""
    rescalings = random_rescalings(task)
    tensors = WorkingBlock(task).rescaled(rescalings)
    weights = {}
    for site in task.sites:
        if precision := task.plan.weight(site.name):
            weights[site.name] = WeightSpec.of(precision).quantize(tensors[site.name].weight)
    return BlockResult(weights, rescalings)


def test_the_task_is_left_as_it_was():
    task = task_of("var", "W2A4KV4", 1)
    caches = [call.kwargs["memory"] for call in task.calls]
    assert all(isinstance(cache, LayerKeyValues) for cache in caches) and any(cache.length for cache in caches)
    before = [cache.key_values.clone() for cache in caches]
    state = {name: tensor.clone() for name, tensor in task.module.state_dict().items()}
    learn(WorkingBlock(task), Halves(task), Schedule(3, 2))
    assert all(torch.equal(a, cache.key_values) for a, cache in zip(before, caches, strict=True))
    assert all(torch.equal(tensor, state[name]) for name, tensor in task.module.state_dict().items())
    assert {type(module) for module in task.module.modules()} == {
        type(module) for module in task_of("var", "W2A4KV4", 1).module.modules()
    }


def test_half_precision_is_learned_in_float32():
    task = task_of("dit", "W3A16", 1)
    calls = [replace(c, args=tuple(a.half() if a.is_floating_point() else a for a in c.args)) for c in task.calls]
    halved = replace(task, module=task.module.half(), calls=calls, held_out=calls[:2])
    block = WorkingBlock(halved)
    assert all(p.dtype == torch.float32 for p in block.module.parameters())
    assert block.error(BlockResult({}), calls) < 1e-4


@pytest.mark.parametrize("name", ["int4", "int4s", "e2m1"])
@pytest.mark.parametrize("range_of", ["token", "image", "tensor"])
def test_gradients_of_dynamic_ranges_are_those_of_a_homogeneous_function(name, range_of):
    """Twice the numbers give twice the result, so that x times the gradient is the result itself (Euler)."""
    quant = LearnedFakeQuant([ActivationSpec(FORMATS[name], range_of)], (0,), StepClock())
    plain = FakeQuant(quant.specs, (0,), quant.clock)
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    out = quant(x)
    assert torch.allclose(out, plain(x.detach()), atol=1e-6)  # one addition more
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (grad,) = torch.autograd.grad((out * weights).sum(), x)
    along, result = (grad * x.detach()).sum(), (out.detach() * weights).sum()
    assert float(along) == pytest.approx(float(result), rel=1e-4, abs=1e-4)
    assert not torch.equal(grad, weights)  # which would be straight through


def test_width_is_what_scales_grow_with():
    low, high = torch.tensor([-1.0, 0.5]), torch.tensor([3.0, 2.0])
    assert width_of(FORMATS["int4"], low, high).tolist() == [4.0, 2.0]
    assert width_of(FORMATS["e2m1"], low, high).tolist() == [3.0, 2.0]


# ---- the loop -----------------------------------------------------------------------------------------


class Halves(Learner):
    """Learns one factor of all weights, and stores each weight to nearest, as often as it is asked."""

    def __init__(self, task, rate=0.05, start=0.5):
        self.task, self.block = task, WorkingBlock(task)
        self.factor = torch.tensor(start, requires_grad=True)
        self.groups = [ParameterGroup([self.factor], rate)]
        self.num_hard, self.progress = 0, []

    def soft(self):
        full = {name: layer.full for name, layer in self.block.layers.items()}
        return {name: tensors._replace(weight=tensors.weight * self.factor) for name, tensors in full.items()}

    @torch.no_grad()
    def hard(self):
        self.num_hard += 1
        weights = {}
        for name, tensors in self.soft().items():
            precision = self.task.plan.weight(name)
            weights[name] = WeightSpec.of(precision).quantize(tensors.weight)
        return BlockResult(weights, notes={name: {"factor": float(self.factor)} for name in weights})

    def penalty(self, progress):
        self.progress.append(progress)
        return None


@pytest.fixture(scope="module")
def task():
    return task_of("dit", "W8A16", 1)


def run(task, learner, schedule, starts=()):
    return learn(WorkingBlock(task), learner, schedule, starts)


def note(result):
    return next(iter(result.notes.values()))


def test_it_finds_what_reconstructs_the_block(task):
    learner = Halves(task)
    result = run(task, learner, Schedule(60, 2))
    assert float(learner.factor.detach()) == pytest.approx(1, abs=0.02)
    assert note(result)["block_error"] < 0.01 * note(result)["block_error_start"]
    assert note(result)["factor"] == pytest.approx(1, abs=0.02)  # what the learner notes is kept
    assert learner.progress == [step / 60 for step in range(60)]


def test_the_error_noted_is_that_of_the_result_on_the_calls_held_out(task):
    result = run(task, Halves(task), Schedule(20, 2))
    module, clock = applied(task, result)
    measured = error_of(module, clock, task.held_out) / WorkingBlock(task).unit
    assert note(result)["block_error"] == pytest.approx(measured, rel=1e-4)


def test_it_gives_the_same_twice_and_depends_on_the_seed(task):
    first, again, other = (run(t, Halves(t), Schedule(15, 1)) for t in (task, task, replace(task, seed=1)))
    assert note(first) == note(again)
    assert all(torch.equal(first.weights[n].codes, again.weights[n].codes) for n in first.weights)
    assert note(first) != note(other)


def test_without_steps_it_is_the_best_start(task):
    states = [[torch.tensor(value)] for value in (0.2, 0.9, 1.7)]
    learner = Halves(task)
    result = run(task, learner, Schedule(0, 1), states)
    assert note(result)["factor"] == pytest.approx(0.9)
    assert note(result)["learned_steps"] == 0
    assert note(result)["block_error"] == note(result)["block_error_start"]


def test_it_is_never_worse_than_its_start(task):
    """Steps far too wide: the start is what comes out."""
    result = run(task, Halves(task, rate=1e3, start=1.0), Schedule(10, 1))
    assert note(result)["factor"] == 1
    assert note(result)["learned_steps"] == 0


def test_what_is_better_on_the_calls_held_out_alone_is_not_taken(task):
    """Calls to learn from that want the start, calls held out that want something else."""
    block = WorkingBlock(task)
    half = {name: layer.full._replace(weight=layer.full.weight * 0.5) for name, layer in block.layers.items()}
    block.use(half)
    with torch.no_grad():
        wanted = [replace(call, target=block.module(*call.args, **call.kwargs)) for call in task.held_out]
    torn = replace(task, held_out=wanted)

    class Drifts(Halves):
        def penalty(self, progress):
            return 1e6 * self.factor  # down to the half, whatever the loss says

    result = run(torn, Drifts(torn, start=1.0, rate=0.1), Schedule(8, 1, evaluations=8))
    assert note(result)["factor"] == 1
    same = replace(torn, calls=wanted)
    assert note(run(same, Drifts(same, start=1.0, rate=0.1), Schedule(8, 1, evaluations=8)))["factor"] < 0.9


def test_it_stops_when_nothing_is_gained(task):
    class Stuck(Halves):
        @torch.no_grad()
        def hard(self):
            self.num_hard += 1
            return rtn(self.task)

    patient, hasty = Stuck(task), Stuck(task)
    run(task, patient, Schedule(20, 1, evaluations=10))
    run(task, hasty, Schedule(20, 1, evaluations=10, patience=3))
    assert (patient.num_hard, hasty.num_hard) == (1 + 10, 1 + 3)
    assert len(hasty.progress) == 6


def test_the_last_step_is_always_measured(task):
    learner = Halves(task)
    run(task, learner, Schedule(7, 1, evaluations=2))  # after 3, 6 and 7 steps
    assert learner.num_hard == 1 + 3


def test_the_gradient_is_that_of_all_calls_together(task):
    """One call after the other, through tensors whose own graph is run once."""
    seen = {}

    class Keeps(Halves):
        def penalty(self, progress):
            seen["grad"] = self.factor.grad.clone()
            return None

    pair = replace(task, calls=task.calls[:2])
    learner = Keeps(pair)
    run(pair, learner, Schedule(1, 2))
    learner.load([torch.tensor(0.5)])
    block = learner.block
    start = block.error(learner.hard(), pair.calls)
    block.use(learner.soft())
    count = sum(call.target.numel() for call in pair.calls)
    loss = sum(block.square_error(call) for call in pair.calls) / (count * block.unit * start)
    (grad,) = torch.autograd.grad(loss, learner.factor)
    assert float(seen["grad"]) == pytest.approx(float(grad), rel=1e-4)


def test_a_loss_of_nan_names_block_and_step(task):
    class Breaks(Halves):
        def soft(self):
            if len(self.progress) == 2 and torch.is_grad_enabled():
                self.factor = self.factor * math.nan
            return super().soft()

    with pytest.raises(ValueError, match=r"blocks\.1: the block's error is nan in learning step 3; use a smaller"):
        run(task, Breaks(task), Schedule(9, 1, evaluations=1))


def test_calls_of_nan_are_found_before_learning(task):
    broken = replace(task, calls=[replace(task.calls[0], target=task.calls[0].target * math.nan)])
    with pytest.raises(ValueError, match=r"blocks\.1: .* nan before learning; look at its inputs"):
        run(broken, Halves(task), Schedule(9, 1))


def test_a_task_without_calls_is_refused(task):
    with pytest.raises(ValueError, match=r"blocks\.1: no calls of the block"):
        run(replace(task, calls=[]), Halves(task), Schedule(9, 1))


def test_calls_to_learn_from_stand_in_for_those_held_out(task):
    single = replace(task, calls=task.calls[:1], held_out=[])
    result = run(single, Halves(single), Schedule(40, 4))
    assert note(result)["block_error"] < note(result)["block_error_start"]


@pytest.mark.parametrize(("num_calls", "size"), [(5, 2), (3, 3), (2, 5), (1, 1)])
def test_every_call_comes_as_often_as_the_others(num_calls, size):
    batches = list(islice(_batches(num_calls, size, seed=0), 2 * num_calls))
    assert {len(batch) for batch in batches} == {min(size, num_calls)}
    counts = Counter(index for batch in batches for index in batch)
    assert set(counts) == set(range(num_calls)) and max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("settings", [{"steps": -1}, {"batch_calls": 0}, {"evaluations": 0}, {"patience": -1}])
def test_schedules_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}=.*: too small"):
        Schedule(**{"steps": 1, "batch_calls": 1, **settings})


def test_tensors_as_leaves_keep_who_learns():
    learned = torch.ones(2, requires_grad=True) * 2
    leaves = LayerTensors(learned, torch.zeros(2), None).as_leaves()
    assert leaves.weight.is_leaf and leaves.weight.requires_grad and leaves.bias is not None
    assert not leaves.bias.requires_grad and leaves.scale_C is None
