"""Joint refinement of a plan by measured swaps, because distortions of single tensors do not quite add up.

One tensor gets more bits, others fewer, so that every budget is kept; the model is quantized so and its distortion
measured on the paths of the full-precision model. What is measured better is kept. Swaps are tried in the order of what
the curves predict, each second one drawn at random, the likelier the better it is predicted: near an optimum of the sum
all swaps are predicted to lose, by about as little as the sum is wrong.

What is best of many on some images is partly luck with them. So start and end are measured once more on images of
another seed, that no swap has seen, and if the end is no better there the start stays. (To keep only swaps that are
better by one or two standard errors of the images' differences gained less on these other images, too.)
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from bitlaw.allocation.allocate import Allocated, Bits, Problem
from bitlaw.allocation.curves import CurveSettings, TensorKey
from bitlaw.allocation.paths import Paths
from bitlaw.calibration.collect import Progress
from bitlaw.calibration.settings import Calibration
from bitlaw.methods.quantize import quantize
from bitlaw.models.generator import ImageGenerator
from bitlaw.precision import BitPlan

HELD_OUT_SEED = 2**22
"""What is added to the seed of the curves' images for those that start and end are measured on once more."""

MAX_PARTNERS = 32
"""Tensors that one is swapped with, and that take part in a swap of several."""

Measure = Callable[[BitPlan], float]
"""The distortion of the model's output under a plan, mean over images and steps."""


@dataclass(frozen=True)
class Refined:
    """What swaps have made of an allocation.

    allocated: the plan, with what it costs; predicted figures are the curves'
    start, end: measured distortions on the images that swaps are judged by, mean over them
    held_out_start, held_out_end: on other images; if the end is no better on these, the plan is that of the start
    num_measured, num_better: swaps that were tried, and found better
    """

    allocated: Allocated
    start: float
    end: float
    held_out_start: float
    held_out_end: float
    num_measured: int
    num_better: int

    @property
    def is_kept(self) -> bool:
        """Whether the plan is that of the end."""
        return self.held_out_end < self.held_out_start

    def to_json(self) -> dict[str, float]:
        """The figures."""
        return {
            "num_measured": self.num_measured,
            "num_better": self.num_better,
            "start": self.start,
            "end": self.end,
            "held_out_start": self.held_out_start,
            "held_out_end": self.held_out_end,
        }


class _Swap(NamedTuple):
    """A change of widths, by the index of the variable, and how much more distortion the curves predict for it."""

    predicted: float
    widths: tuple[tuple[int, int], ...]


def refine(
    problem: Problem,
    start: Allocated,
    measure: Measure,
    held_out: Measure,
    *,
    num_swaps: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
) -> Refined:
    """An allocation improved by at most `num_swaps` measured swaps within its budgets.

    measure: judges swaps; held_out: measures start and end on images that `measure` does not see
    seed: of the swaps that are drawn at random

    Raises ValueError for less than one swap.
    """
    if num_swaps < 1:
        raise ValueError(f"num_swaps {num_swaps}: must be 1 or more")
    generator = random.Random(seed)
    bits = dict(start.bits)
    first = best = measure(start.plan)
    seen = {_signature(bits)}
    num_measured = num_better = 0
    candidates = _candidates(problem, bits, start.budgets)
    while candidates and num_measured < num_swaps:
        index = 0
        if num_measured % 2:
            # The r-th of n with a probability in proportion to 1 / r.
            index = generator.choices(range(len(candidates)), [1 / (rank + 1) for rank in range(len(candidates))])[0]
        swapped = _apply(problem, bits, candidates.pop(index))
        if _signature(swapped) in seen or not _fits(problem, swapped, start.budgets):
            continue
        seen.add(_signature(swapped))
        distortion = measure(problem.plan(swapped))
        num_measured += 1
        if distortion < best:
            best, bits, num_better = distortion, swapped, num_better + 1
            candidates = _candidates(problem, bits, start.budgets)
        if progress is not None:
            progress("measuring swaps", num_measured, num_swaps)
    end = replace(
        start, plan=problem.plan(bits), bits=bits, distortion=problem.distortion(bits), costs=problem.costs(bits)
    )
    before = held_out(start.plan)
    after = held_out(end.plan) if num_better else before
    return Refined(end if after < before else start, first, best, before, after, num_measured, num_better)


def _signature(bits: Mapping[TensorKey, int]) -> tuple[int, ...]:
    return tuple(bits.values())


def _fits(problem: Problem, bits: Bits, budgets: Mapping[str, float]) -> bool:
    costs = problem.costs(bits)
    return all(costs[budget] <= limit for budget, limit in budgets.items())


def _apply(problem: Problem, bits: Bits, swap: _Swap) -> Bits:
    changed = dict(bits)
    for index, width in swap.widths:
        changed |= dict.fromkeys(map(TensorKey.parse, problem.variables[index].names), width)
    return changed


def _candidates(problem: Problem, bits: Bits, budgets: Mapping[str, float]) -> list[_Swap]:
    """Swaps from a choice, best predicted first.

    A tensor gets its next width above: alone if there is room; with another tensor that makes room, by as small a step
    as does; and with several, those that lose least for what they free. Or a tensor gets its next width below, and what
    that frees goes to those that gain most for it.
    """
    costs = problem.costs(bits)
    steps = _Steps(problem, bits, budgets, {budget: limit - costs[budget] for budget, limit in budgets.items()})
    swaps: list[_Swap] = []
    for step in steps.above:
        swaps += _raising(steps, step)
    for step in steps.below:
        swaps += _lowering(steps, step)
    unique = {swap.widths: swap for swap in swaps}
    return sorted(unique.values())


class _Step(NamedTuple):
    """One variable's change to another width, what the curves predict for it, and what it costs more."""

    variable: int
    width: int
    predicted: float
    costs: Mapping[str, float]


class _Steps:
    """The steps from a choice of widths.

    left: of every budget
    above, below: of every variable the step to its next width, those first that gain most, or lose least, for their
        cost in parts of the budgets
    lower: all steps to lower widths, those first that lose least
    """

    def __init__(self, problem: Problem, bits: Bits, budgets: Mapping[str, float], left: Mapping[str, float]):
        self.left = left
        self.above: list[_Step] = []
        self.below: list[_Step] = []
        self.lower: list[_Step] = []
        for index, costs in enumerate(problem.changes(bits, budgets)):
            curve = problem.variables[index]
            now = curve.widths.index(bits[TensorKey.parse(curve.names[0])])
            steps = [
                _Step(index, width, distortion - curve.distortions[now], costs[width])
                for width, distortion in zip(curve.widths, curve.distortions, strict=True)
            ]
            self.above += steps[now + 1 : now + 2]
            self.below += steps[now - 1 : now] if now else []
            self.lower += steps[:now]

        def for_its_cost(step: _Step) -> float:
            share = sum(abs(step.costs[budget]) / (1 + limit) for budget, limit in budgets.items())
            return step.predicted / share if share else -math.inf

        self.above.sort(key=for_its_cost)
        self.below.sort(key=for_its_cost)
        self.lower.sort(key=lambda step: step.predicted)

    def fit(self, steps: Sequence[_Step]) -> bool:
        """Whether steps together keep the budgets."""
        return all(sum(step.costs[budget] for step in steps) <= left for budget, left in self.left.items())


def _raising(steps: _Steps, first: _Step) -> Iterator[_Swap]:
    """Swaps that give a tensor more."""
    if steps.fit([first]):
        yield _swap([first])
        return
    partners: set[int] = {first.variable}
    for step in steps.lower:
        if step.variable not in partners and steps.fit([first, step]):
            partners.add(step.variable)
            yield _swap([first, step])
            if len(partners) > MAX_PARTNERS:
                break
    short = [budget for budget, left in steps.left.items() if first.costs[budget] > left]
    several = [first]
    for step in steps.below:
        if step.variable != first.variable and any(step.costs[budget] < 0 for budget in short):
            several.append(step)
            if steps.fit(several):
                yield _swap(several)
                break
            if len(several) > MAX_PARTNERS:
                break


def _lowering(steps: _Steps, first: _Step) -> Iterator[_Swap]:
    """The swap that takes from a tensor, for those that gain most."""
    several = [first]
    for step in steps.above[: 2 * MAX_PARTNERS]:
        if step.variable != first.variable and steps.fit([*several, step]):
            several.append(step)
    if len(several) > 1:
        yield _swap(several)


def _swap(steps: Sequence[_Step]) -> _Swap:
    return _Swap(sum(step.predicted for step in steps), tuple(sorted((step.variable, step.width) for step in steps)))


# ---- measuring -----------------------------------------------------------------------------------------


def measure_on(
    paths: Paths, model: ImageGenerator[Any], method: str, calibration: Calibration | None = None
) -> Measure:
    """The measured distortion of a model quantized by a plan and a method, on the images of paths."""
    return lambda plan: float(paths.distortion(quantize(model, plan, method, calibration=calibration)).mean())


def held_out_settings(settings: CurveSettings) -> CurveSettings:
    """The same with images that no curve and no swap has seen."""
    return replace(settings, seed=settings.seed + HELD_OUT_SEED)
