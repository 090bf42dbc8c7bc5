"""OmniQuant and learned rounding on the ladder's blocks: what a block gives is nearer to full precision than by RTN."""

from dataclasses import replace

import pytest
import torch

import bitlaw
from bitlaw.calibration.collect import Collector
from bitlaw.calibration.replay import Replay, record
from bitlaw.install import SiteParts, install_site
from bitlaw.methods import METHODS
from bitlaw.methods.method import BlockCall, BlockMethod, BlockTask
from bitlaw.precision import BitPlan, Precision
from bitlaw.quantized import WeightSpec

SETTINGS = bitlaw.Calibration(num_images=8, batch_size=4)


def task_of(name: str, precision: str, number: int) -> BlockTask:
    """A block behind full-precision blocks, with the calls of a few images."""
    model = bitlaw.load(name)
    block = model.blocks[number]
    plan = BitPlan.uniform(Precision.parse(precision), model.sites(), "none")
    called = [s for s in model.sites() if s.name.startswith(f"{block}.") and "ada" not in s.name.lower()]
    needs = frozenset({"second_moment_I", "low_C", "high_C"})
    collector = Collector(model, [s.name for s in called], needs, SETTINGS)
    calls = Replay(model, record(model, SETTINGS), SETTINGS).run(number, collector, keep=True)
    given = [BlockCall(c.args, c.kwargs, c.output, c.step) for c in calls]
    plan = BitPlan({s.name: plan[s.name] for s in called})
    module = model.net.get_submodule(block)
    return BlockTask(block, module, tuple(called), plan, collector.stats(), given, given[::4])


def block_error(task: BlockTask, weights) -> float:
    """Squared error of the block's output with these weights in place of its own, over all calls."""
    from copy import deepcopy

    from bitlaw.models.generator import StepClock

    module, clock = deepcopy(task.module), StepClock()
    inside = BitPlan({task.inside(name): task.plan[name] for name in task.plan})
    for name, weight in weights.items():
        install_site(module, inside, task.inside(name), SiteParts(weight), clock)
    total = 0.0
    with torch.no_grad():
        for call in task.calls:
            clock.step = call.step
            total += float((module(*call.args, **call.kwargs) - call.target).square().sum())
    return total


@pytest.mark.parametrize("name", ["ladder/var-xs", "ladder/dit-xs"])
@pytest.mark.parametrize("method", ["omniquant", "adaround"])
@pytest.mark.parametrize("number", [0, 1])
def test_blocks_lose_less_than_by_rounding_to_nearest(name: str, method: str, number: int) -> None:
    task = task_of(name, "W2A16", number)
    rtn = {
        s.name: WeightSpec.of(task.plan.weight(s.name)).quantize(task.module.get_parameter(f"{task.inside(s)}.weight"))
        for s in task.sites
    }
    chosen = METHODS[method]
    assert isinstance(chosen, BlockMethod)
    short = replace(chosen, steps=40)
    result = short.quantize_block(task)
    assert result.weights.keys() == rtn.keys() and not result.rescalings
    assert block_error(task, result.weights) < block_error(task, rtn)
    again = short.quantize_block(task)
    assert all(torch.equal(again.weights[n].codes, w.codes) for n, w in result.weights.items())
