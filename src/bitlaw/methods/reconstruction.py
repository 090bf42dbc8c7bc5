"""Learning what a block's quantized layers compute with, by what the block gives: a loop that methods share.

A working copy of the block computes in float32 with layers whose tensors are put in from outside: differentiable ones
to learn by, and those of a result as it will be stored to measure with. Between the two lies what a `Learner` knows.

Legend: O output channels, I input channels, C input channels of a linear or convolution, S step groups; R rows,
H heads, M tokens of earlier steps, d width of a head.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlaw.calibration.replay import BlockCall, map_leaves
from bitlaw.formats import Format, Params
from bitlaw.install import ATTENTION_OPERANDS, is_quantizable
from bitlaw.linear import linear
from bitlaw.methods.method import BlockResult, BlockTask, Rescaling
from bitlaw.methods.rescale import absorber_users, of_weight
from bitlaw.models.generator import AbsorberPart, Site, StepClock
from bitlaw.models.parts.key_values import LayerKeyValues
from bitlaw.precision import Precision, step_group
from bitlaw.quantized import ActivationSpec, FakeQuant, QuantConv2d, QuantLinear, WeightSpec

# ---- the working copy of a block ----------------------------------------------------------------------


class LayerTensors(NamedTuple):
    """What a simulated layer computes with.

    scale_C, shift_C: of its input; None where the layer before has them
    cached_scale_C, cached_shift_C: of values of an attention that earlier steps have left for this layer, where those
        of this step come from a layer that has the scale and shift
    """

    weight: Tensor
    bias: Tensor | None
    scale_C: Tensor | None = None
    shift_C: Tensor | None = None
    cached_scale_C: Tensor | None = None
    cached_shift_C: Tensor | None = None

    def as_leaves(self) -> Self:
        """The same numbers, whose gradients stop here."""

        def leaf(x: Tensor) -> Tensor:
            return x.detach().requires_grad_(x.requires_grad)

        return type(self)(leaf(self.weight), *(None if x is None else leaf(x) for x in self[1:]))


class LearnedFakeQuant(FakeQuant):
    """Fake quantization whose ranges pass gradients: errors grow in proportion to the range that they come from.

    x + width * e with e = (rounded x - x) / width held fixed; what makes a range narrower makes all of its errors
    smaller. Static ranges are fixed, and pass what `ActivationSpec.fake` passes.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x, of the same shape."""
        out = super().forward(x)
        spec = self.specs[step_group(self.step_groups, self.clock.step)]
        if spec is None or spec.range_of == "static" or not (torch.is_grad_enabled() and x.requires_grad):
            return out
        dims = {"token": (-1,), "image": (-3, -2, -1), "tensor": tuple(range(-x.dim(), 0))}[spec.range_of]
        low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
        width = width_of(spec.format, low, high)
        smallest = torch.finfo(x.dtype).tiny
        return x + (out - x).detach() / width.detach().clamp_min(smallest) * width


def width_of(format: Format, low: Tensor, high: Tensor) -> Tensor:
    """What a format's scale is proportional to, of numbers between low and high."""
    if "zero_G1" in format.param_names:
        return high.clamp_min(0) - low.clamp_max(0)
    return torch.maximum(high, -low)


class SimulatedLayer(nn.Module):
    """A linear or convolution that computes with `tensors`, its input quantized as the plan says for the call's step.

    full: its own tensors, in full precision. An input scale and a low-rank branch that it has stay.
    """

    full: LayerTensors
    tensors: LayerTensors

    def __init__(
        self,
        layer: nn.Linear | nn.Conv2d,
        precisions: Sequence[Precision],
        step_groups: Sequence[int],
        clock: StepClock,
        ranges: Params | None,
    ):
        super().__init__()
        own = QuantConv2d.range_of if isinstance(layer, nn.Conv2d) else QuantLinear.range_of
        specs = [ActivationSpec.of(p.activation, own) if p.activation else None for p in precisions]
        self.input_quant = LearnedFakeQuant(specs, step_groups, clock, ranges)
        self.layer = layer
        self.full = LayerTensors(layer.weight.detach(), None if layer.bias is None else layer.bias.detach())
        self.tensors = self.full

    @property
    def is_plain(self) -> bool:
        """A linear with nothing before and beside it, so that its input can be rescaled by what makes it."""
        parts = getattr(self.layer, "scaling", None), getattr(self.layer, "branch", None)
        return isinstance(self.layer, nn.Linear) and parts == (None, None)

    def forward(self, x: Tensor) -> Tensor:
        """Rows (..., C) -> (..., O), or images (B, C, H, W) -> (B, O, H', W')."""
        weight, bias, scale_C, shift_C = self.tensors[:4]
        scaling, branch = getattr(self.layer, "scaling", None), getattr(self.layer, "branch", None)
        if isinstance(self.layer, nn.Conv2d):
            conv = self.layer
            x = self.input_quant(x if scaling is None else scaling.of_images(x))
            return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        x = x if scaling is None else scaling(x)
        x = x if shift_C is None else x - shift_C
        x = x if scale_C is None else x / scale_C
        out = linear(self.input_quant(x), weight, bias)
        return out if branch is None else out + branch(x)


class WorkingBlock:
    """A float32 copy of a task's block to learn with; the task's own stays as it is.

    layers: what stands for each of its sites
    unit: mean square of the targets of the calls to learn from, which errors are relative to
    """

    def __init__(self, task: BlockTask):
        self.task, self.clock = task, StepClock()
        self.module = copy.deepcopy(task.module).float().requires_grad_(False)
        self.layers = {site.name: self._simulate(site) for site in task.sites}
        self.users = absorber_users(task.sites)
        self.after_attention = {site.name for site in task.sites if site.kind == "proj"}
        squares, count = _sums((call.target.double().square().sum(), call.target.numel()) for call in task.calls)
        self.unit = squares / max(count, 1) or 1.0

    def _simulate(self, site: Site) -> SimulatedLayer:
        name, plan = self.task.inside(site), self.task.plan
        layer = self.module.get_submodule(name)
        assert is_quantizable(layer)  # `install.check_plan` has seen to it
        precisions = plan[site.name]
        made = SimulatedLayer(layer, precisions, plan.step_groups, self.clock, self.task.ranges.get(site.name) or None)
        self.module.set_submodule(name, made)
        if any(precision.attention for precision in precisions):
            attention = self.module.get_submodule(name.rpartition(".")[0])
            specs = [ActivationSpec.of(p.attention) if p.attention else None for p in precisions]
            for operand in ATTENTION_OPERANDS:
                setattr(attention, operand, LearnedFakeQuant(specs, plan.step_groups, self.clock))
        return made

    def rescaled(self, rescalings: Mapping[str, Rescaling]) -> dict[str, LayerTensors]:
        """The tensors of all layers in full precision behind rescalings, as `rescale` makes them; differentiable.

        Where the layer that absorbs a rescaling is no site of the block, its user divides its input itself: the same
        numbers to rounding.
        """
        tensors = {name: layer.full for name, layer in self.layers.items()}
        for absorber, names in self.users.items():
            if names[0] not in rescalings:
                continue
            shared = rescalings[names[0]]
            if all(part.module in tensors for part in absorber.parts):
                for part in absorber.parts:
                    tensors[part.module] = _absorbed(tensors[part.module], part, shared)
                if self.after_attention.issuperset(names):
                    for name in names:
                        tensors[name] = tensors[name]._replace(
                            cached_scale_C=shared.scale_C, cached_shift_C=shared.shift_C
                        )
            else:
                for name in names:
                    tensors[name] = tensors[name]._replace(scale_C=shared.scale_C, shift_C=shared.shift_C)
        for name, rescaling in rescalings.items():
            weight, bias = tensors[name].weight, tensors[name].bias
            if rescaling.shift_C is not None:
                assert bias is not None  # `shift_problem` has seen to it
                bias = bias + weight @ rescaling.shift_C
            layer = self.layers[name].layer
            tensors[name] = tensors[name]._replace(weight=weight * of_weight(layer, rescaling.scale_C), bias=bias)
        return tensors

    def nearest(self) -> BlockResult:
        """Every weight rounded to nearest."""
        precisions = {name: self.task.plan.weight(name) for name in self.layers}
        return BlockResult(
            {n: WeightSpec.of(p).quantize(self.layers[n].full.weight) for n, p in precisions.items() if p is not None}
        )

    def as_stored(self, result: BlockResult) -> dict[str, LayerTensors]:
        """The tensors of all layers as a result makes them."""
        tensors = self.rescaled(result.rescalings)
        for name, quantized in result.weights.items():
            tensors[name] = tensors[name]._replace(weight=quantized.decode().to(tensors[name].weight.device))
        return tensors

    def use(self, tensors: Mapping[str, LayerTensors]) -> None:
        """Compute with these."""
        for name, given in tensors.items():
            self.layers[name].tensors = given

    def square_error(self, call: BlockCall) -> Tensor:
        """Sum of squares of what the block gives less the target."""
        self.clock.step = call.step
        args, kwargs = map_leaves((call.args, call.kwargs), self._given)
        out = self.module(*args, **kwargs)
        out = out if isinstance(out, Tensor) else out[0]
        difference: Tensor = out - call.target.to(out)
        return difference.square().sum()

    def _given(self, value: Any) -> Any:
        """What a call is given, on this device, in float32; what earlier steps have left is as this block leaves it."""
        if isinstance(value, Tensor):
            return value.to(self.device, torch.float32 if value.is_floating_point() else value.dtype)
        if isinstance(value, LayerKeyValues):
            keys, values = self._given(value.key_values[..., : value.length, :])
            return LayerKeyValues(torch.stack([keys, self._rescaled_values(values)]), value.length, keeps=False)
        return value

    def _rescaled_values(self, values_RHMd: Tensor) -> Tensor:
        shape = (values_RHMd.shape[1], 1, values_RHMd.shape[3])
        for tensors in (layer.tensors for layer in self.layers.values()):
            if tensors.cached_shift_C is not None:
                values_RHMd = values_RHMd - tensors.cached_shift_C.view(shape)
            if tensors.cached_scale_C is not None:
                values_RHMd = values_RHMd / tensors.cached_scale_C.view(shape)
        return values_RHMd

    @property
    def device(self) -> torch.device:
        """Where it computes; calls may be elsewhere."""
        return next(self.module.parameters()).device

    @torch.no_grad()
    def error(self, result: BlockResult, calls: Sequence[BlockCall]) -> float:
        """Mean square error of the block as a result makes it, relative to the mean square of its targets."""
        self.use(self.as_stored(result))
        squares, count = _sums((self.square_error(call), call.target.numel()) for call in calls)
        return squares / max(count, 1) / self.unit


def _absorbed(tensors: LayerTensors, part: AbsorberPart, rescaling: Rescaling) -> LayerTensors:
    """Those of a linear some of whose outputs are, or go into, what is rescaled."""
    weight, bias = tensors.weight, tensors.bias
    first, end = part.rows or (0, len(weight))
    rows = torch.arange(first, end, device=weight.device)
    weight = weight.index_copy(0, rows, weight[first:end] / rescaling.scale_C[:, None])
    if bias is not None:
        given = bias[first:end]
        if part.role == "gain":
            changed = (1 + given) / rescaling.scale_C - 1
        else:
            changed = (given if rescaling.shift_C is None else given - rescaling.shift_C) / rescaling.scale_C
        bias = bias.index_copy(0, rows, changed)
    return tensors._replace(weight=weight, bias=bias)


def _sums(pairs: Iterable[tuple[Tensor, int]]) -> tuple[float, int]:
    total, count = 0.0, 0
    for squares, numel in pairs:
        total, count = total + float(squares), count + numel
    return total, count


# ---- the loop -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParameterGroup:
    """Leaf tensors that are learned, at a common learning rate (of Adam)."""

    parameters: list[Tensor]
    learning_rate: float


class Learner(ABC):
    """What a method learns of a block: parameters, and what they make of it."""

    groups: Sequence[ParameterGroup]

    @abstractmethod
    def soft(self) -> dict[str, LayerTensors]:
        """The layers' tensors, differentiable in the parameters."""

    @abstractmethod
    def hard(self) -> BlockResult:
        """What would be stored."""

    def penalty(self, progress: float) -> Tensor | None:
        """Added to the loss, which is about 1 at the start; `progress` goes from 0 to 1. None for nothing."""
        return None

    @property
    def parameters(self) -> list[Tensor]:
        """Those of all groups."""
        return [parameter for group in self.groups for parameter in group.parameters]

    def state(self) -> list[Tensor]:
        """A copy of the parameters."""
        return [parameter.detach().clone() for parameter in self.parameters]

    def load(self, state: Sequence[Tensor]) -> None:
        """Set the parameters."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state, strict=True):
                parameter.copy_(value)


@dataclass(frozen=True)
class Schedule:
    """How long to learn.

    steps: of Adam, whose learning rates fall to 0 along a cosine; 0 gives the start
    batch_calls: calls of the block in a step. They go through the block one after the other, so that the intermediate
                 results of more than one are never held
    evaluations: how often the held-out error is measured
    patience: stop after so many evaluations without a new least error; 0 never stops
    """

    steps: int
    batch_calls: int
    evaluations: int = 10
    patience: int = 0

    def __post_init__(self) -> None:
        wrong = {
            "steps": self.steps < 0,
            "batch_calls": self.batch_calls < 1,
            "evaluations": self.evaluations < 1,
            "patience": self.patience < 0,
        }
        if names := [name for name, is_wrong in wrong.items() if is_wrong]:
            raise ValueError(f"{', '.join(f'{name}={getattr(self, name)}' for name in names)}: too small")


def learn(
    block: WorkingBlock, learner: Learner, schedule: Schedule, starts: Sequence[Sequence[Tensor]] = ()
) -> BlockResult:
    """The result of least held-out error that was met, with what was measured in every site's note.

    Learning begins at the best of `starts`, states of the parameters (by default the one that they are in). Every error
    is of what would be stored. That of the result is not above that of any start on the calls held out, nor, on the
    calls to learn from, above that of the best start. The same task gives the same result.

    Raises ValueError, naming block and step, for an error that is not finite, and for a task without calls.
    """
    task = block.task
    if not task.calls:
        raise ValueError(f"{task.name}: no calls of the block to learn from; calibrate with an image or more")
    held_out = task.held_out or task.calls
    candidates = []
    for state in starts or [learner.state()]:
        learner.load(state)
        result = learner.hard()
        candidates.append((block.error(result, held_out), learner.state(), result))
    start_error, state, start = min(candidates, key=lambda candidate: candidate[0])
    _check_finite(task, start_error, 0)
    learner.load(state)
    start_train_error = block.error(start, task.calls)
    _check_finite(task, start_train_error, 0)
    best_error, best, step, best_step = start_error, start, 0, 0
    if schedule.steps and learner.parameters and start_train_error > 0:
        interval = max(1, schedule.steps // schedule.evaluations)
        waited = 0
        for step in _descend(block, learner, schedule, start_train_error):
            if step % interval and step != schedule.steps:
                continue
            result = learner.hard()
            error = block.error(result, held_out)
            _check_finite(task, error, step)
            waited += 1
            if error < best_error:
                best_error, best, best_step, waited = error, result, step, 0
            if waited == schedule.patience > 0:
                break
    if best is not start and block.error(best, task.calls) > start_train_error:
        best_error, best, best_step = start_error, start, 0
    measured = {
        "block_error_rtn": block.error(block.nearest(), held_out),
        "block_error_start": start_error,
        "block_error": best_error,
        "learned_steps": best_step,
    }
    notes = {site.name: {**best.notes.get(site.name, {}), **measured} for site in task.sites}
    return replace(best, notes=notes)


def _descend(block: WorkingBlock, learner: Learner, schedule: Schedule, unit_error: float) -> Iterator[int]:
    """Take the steps; the number of those taken after each."""
    task = block.task
    groups = [{"params": group.parameters, "lr": group.learning_rate} for group in learner.groups if group.parameters]
    optimizer = torch.optim.Adam(groups)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, schedule.steps)
    batches = _batches(len(task.calls), schedule.batch_calls, task.seed)
    unit = block.unit * unit_error
    for step in range(schedule.steps):
        optimizer.zero_grad()
        calls = [task.calls[index] for index in next(batches)]
        count = sum(call.target.numel() for call in calls)
        loss = 0.0
        with torch.enable_grad():
            # The tensors' own graph is gone through once, whatever the number of calls.
            soft = learner.soft()
            leaves = {name: tensors.as_leaves() for name, tensors in soft.items()}
            block.use(leaves)
            for call in calls:
                of_call = block.square_error(call) / (count * unit)
                of_call.backward()
                loss += float(of_call.detach())
            pairs = [pair for name, tensors in soft.items() for pair in zip(tensors, leaves[name], strict=True)]
            made = [(tensor, leaf.grad) for tensor, leaf in pairs if tensor is not None and leaf is not None]
            learned = [(tensor, grad) for tensor, grad in made if tensor.requires_grad and grad is not None]
            if learned:
                torch.autograd.backward([tensor for tensor, _ in learned], [grad for _, grad in learned])
            penalty = learner.penalty(step / schedule.steps)
            if penalty is not None:
                penalty.backward()
        _check_finite(task, loss, step + 1)
        optimizer.step()
        rates.step()
        yield step + 1


def _batches(num_calls: int, size: int, seed: int) -> Iterator[list[int]]:
    """Indices of calls, each as often as the others, in random order."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < min(size, num_calls):
            waiting += torch.randperm(num_calls, generator=generator).tolist()
        yield waiting[:size]
        waiting = waiting[size:]


def _check_finite(task: BlockTask, error: float, step: int) -> None:
    if not math.isfinite(error):
        where = (
            f"in learning step {step}; use a smaller learning rate" if step else "before learning; look at its inputs"
        )
        raise ValueError(f"{task.name}: the block's error is {error} {where}")
