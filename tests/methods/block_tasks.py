"""Blocks of tiny models as tasks, with the calls of a few images behind full-precision blocks."""

import copy
from dataclasses import replace

import torch

from bitlaw.calibration.collect import Collector
from bitlaw.calibration.replay import BlockCall, Replay, record
from bitlaw.calibration.settings import Calibration
from bitlaw.install import SiteParts, install_site
from bitlaw.methods.method import BlockResult, BlockTask
from bitlaw.methods.rescale import rescale
from bitlaw.models.generator import ImageGenerator, StepClock
from bitlaw.models.parts.key_values import LayerKeyValues
from bitlaw.precision import BitPlan, Precision
from bitlaw.quantized import WeightSpec
from tiny_models import TINY

SETTINGS = Calibration(num_images=32, batch_size=8)
HELD_OUT = 5  # prime to the number of steps, so that all of them are among both
NEEDS = frozenset({"second_moment_I", "low_C", "high_C"})


def tiny(family: str) -> ImageGenerator:
    torch.manual_seed(0)
    return TINY[family]()


def task_of(
    model: ImageGenerator | str, precision: str, number: int = 1, *, outliers: bool = False, settings=SETTINGS
) -> BlockTask:
    """A block of a model, or of a tiny one of a family, with a fifth of its calls held out.

    With `outliers` channels of its weights differ in size by 50.
    """
    model = tiny(model) if isinstance(model, str) else model
    name = model.blocks[number]
    module = model.net.get_submodule(name)
    # VAR's modulations are computed before the blocks.
    sites = tuple(s for s in model.sites() if s.name.startswith(f"{name}.") and not s.name.endswith("ada_lin.1"))
    if outliers:
        spread(module)
    plan = BitPlan.uniform(Precision.parse(precision), sites, "none")
    collector = Collector(model, [site.name for site in sites], NEEDS, settings)
    calls = Replay(model, record(model, settings), settings).run(number, collector, keep=True)
    train = [call for index, call in enumerate(calls) if index % HELD_OUT]
    return BlockTask(name, module, sites, plan, collector.stats(), train, calls[::HELD_OUT])


def spread(module: torch.nn.Module) -> None:
    """Give the inputs of attention and MLP channels of very different sizes, by rows of an AdaLN modulation."""
    g = torch.Generator().manual_seed(1)
    adaln = module.get_submodule("adaLN_modulation.1")
    for parameter in adaln.parameters():
        sizes = torch.exp2(6 * torch.rand(len(parameter), generator=g) - 3)
        parameter.data.mul_(sizes.view(-1, *[1] * (parameter.dim() - 1)))


def applied(task: BlockTask, result: BlockResult) -> tuple[torch.nn.Module, StepClock]:
    """The block as the driver makes it: rescaled through absorbers, then with quantized layers.

    VAR's modulations, which absorb too, are given to the block: there its layers divide their inputs themselves.
    """
    net, clock = torch.nn.Module(), StepClock()
    parent = net
    *parents, last = task.name.split(".")
    for part in parents:
        parent.add_module(part, torch.nn.Module())
        parent = parent.get_submodule(part)
    parent.add_module(last, copy.deepcopy(task.module))
    given = [s for s in task.sites if s.absorber and s.absorber.parts[0].module.endswith("ada_lin.1")]
    sites = [replace(site, absorber=None) if site in given else site for site in task.sites]
    rescale(net, sites, result.rescalings)
    for site in task.sites:
        parts = SiteParts(result.weights.get(site.name), task.ranges.get(site.name, {}))
        install_site(net, task.plan, site.name, parts, clock)
    return net.get_submodule(task.name), clock


def with_cache_of(result: BlockResult, task: BlockTask) -> list[BlockCall]:
    """The calls with what the block as in `applied` would have left behind in earlier steps."""
    name = next((s.name for s in task.sites if s.kind == "proj"), "")
    if name not in result.rescalings:
        return list(task.calls)
    scale, shift = result.rescalings[name].scale_C, result.rescalings[name].shift_C

    def change(value):
        if not isinstance(value, LayerKeyValues):
            return value
        both = value.key_values.clone()
        shape = (both.shape[2], 1, both.shape[4])
        if shift is not None:
            both[1] -= shift.view(shape)
        both[1] /= scale.view(shape)
        return value._replace(key_values=both)

    return [
        replace(c, args=tuple(map(change, c.args)), kwargs={k: change(v) for k, v in c.kwargs.items()})
        for c in task.calls
    ]


def error_of(module: torch.nn.Module, clock: StepClock, calls: list[BlockCall]) -> float:
    """Mean square error of what a block gives."""
    squares, count = 0.0, 0
    with torch.no_grad():
        for call in calls:
            clock.step = call.step
            out = module(*call.args, **call.kwargs)
            squares += float(((out if isinstance(out, torch.Tensor) else out[0]) - call.target).square().sum())
            count += call.target.numel()
    return squares / count


def rtn(task: BlockTask) -> BlockResult:
    weights = {}
    for site in task.sites:
        precision = task.plan.weight(site.name)
        if precision is not None:
            weight = task.module.get_parameter(f"{task.inside(site)}.weight").detach()
            weights[site.name] = WeightSpec.of(precision).quantize(weight)
    return BlockResult(weights)


def in_doubled_steps(task: BlockTask, precision: str) -> BlockTask:
    """The task with another precision of activations from step 2 on."""
    later = Precision.parse(precision)
    sites = {name: (task.plan[name][0], replace(later, attention=None)) for name in task.plan}
    return replace(task, plan=BitPlan(sites, (0, 2)))
