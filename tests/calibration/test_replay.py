"""Blocks one at a time: what they are given and give is what they would be in the whole network."""

import pytest
import torch
from torch import Tensor, nn

from bitlaw.calibration.replay import Replay, record
from bitlaw.calibration.settings import Calibration
from bitlaw.models.generator import Noise, rollout
from tiny_models import TINY

SETTINGS = Calibration(num_images=4, batch_size=2, seed=3)


@pytest.fixture(params=TINY)
def model(request):
    torch.manual_seed(0)
    return TINY[request.param]()


def by_hooks(model):
    """First input and output of every call of every block over plain rollouts."""
    calls = {name: [] for name in model.blocks}

    def see(name):
        return lambda _, args, out: calls[name].append((args[0].clone(), out if isinstance(out, Tensor) else out[0]))

    hooks = [model.net.get_submodule(name).register_forward_hook(see(name)) for name in model.blocks]
    for begin in (0, 2):
        labels = torch.tensor([i % max(1, model.num_classes) for i in (begin, begin + 1)])
        for _ in rollout(model, labels, Noise(3, range(begin, begin + 2))):
            pass
    for hook in hooks:
        hook.remove()
    return calls


def test_every_block_sees_what_it_sees_in_a_rollout(model) -> None:
    expected = by_hooks(model)
    replay = Replay(model, record(model, SETTINGS), SETTINGS)
    for number, name in enumerate(model.blocks):
        calls = replay.run(number, keep=True)
        assert len(calls) == len(expected[name]), name
        for call, (given, out) in zip(calls, expected[name], strict=True):
            torch.testing.assert_close(call.args[0], given, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(call.target, out, rtol=1e-5, atol=1e-5)


def test_a_kept_call_can_be_made_again_and_differentiated(model) -> None:
    """Keys and values of earlier steps are there as they were; nothing is a tensor of inference mode."""
    replay = Replay(model, record(model, SETTINGS), SETTINGS)
    for number, name in enumerate(model.blocks):
        block = model.net.get_submodule(name)
        # Layers only: torch 2.13 crashes in the gradient of a channels-last norm whose input needs none.
        layers = [m for m in block.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        for layer in layers:
            layer.requires_grad_(True)
        for call in replay.run(number, keep=True)[-3:]:
            model.clock.step = call.step
            out = block(*call.args, **call.kwargs)
            out = out if isinstance(out, Tensor) else out[0]
            torch.testing.assert_close(out, call.target, rtol=1e-5, atol=1e-5)
            out.square().sum().backward()
        assert any(layer.weight.grad is not None for layer in layers)


def test_later_blocks_see_what_earlier_ones_have_become(model) -> None:
    """A block changed between two runs; as a chain and as a whole network the next one gets the same."""
    recording = record(model, SETTINGS)
    replay = Replay(model, recording, SETTINGS)
    replay.run(0)
    with torch.no_grad():
        for parameter in model.net.get_submodule(model.blocks[0]).parameters():
            parameter.mul_(0.9)
    chained = replay.run(1, keep=True)
    last = len(model.blocks) - 1
    chained_last = replay.run(last, keep=True)
    afresh = Replay(model, recording, SETTINGS)
    for number, calls in ((1, chained), (last, chained_last)):
        again = (
            afresh.run(number, keep=True) if number == 1 else Replay(model, recording, SETTINGS).run(last, keep=True)
        )
        assert len(again) == len(calls)
        for a, b in zip(calls, again, strict=True):
            torch.testing.assert_close(a.args[0], b.args[0], rtol=1e-5, atol=1e-5)


def test_the_network_is_left_as_it_was(model) -> None:
    labels = [i % max(1, model.num_classes) for i in range(3)]
    before = model.generate(labels)
    replay = Replay(model, record(model, SETTINGS), SETTINGS)
    replay.run(len(model.blocks) - 1)
    assert torch.equal(model.generate(labels), before)
    assert not any("forward" in vars(module) for module in model.net.modules())


def test_of_many_steps_some_are_kept_each_by_some_batch() -> None:
    torch.manual_seed(0)
    model = TINY["dit"]().with_sampling(num_steps=12)
    settings = Calibration(num_images=8, batch_size=2, max_calls=12)
    recording = record(model, settings)
    assert recording.num_calls == 12
    kept = [step.index for batch in recording.batches for step in batch]
    assert sorted(kept) == list(range(12))


def test_hidden_states_go_to_a_file_when_they_are_many() -> None:
    torch.manual_seed(0)
    model = TINY["dit"]()
    small = Calibration(num_images=4, batch_size=2, seed=3, memory_limit=1000)
    inside, outside = (Replay(model, record(model, SETTINGS), s) for s in (SETTINGS, small))
    for replay in (inside, outside):
        replay.run(0)
    for a, b in zip(inside.run(1, keep=True), outside.run(1, keep=True), strict=True):
        assert torch.equal(a.target, b.target)
    assert outside._stored.folder is not None and inside._stored.folder is None
