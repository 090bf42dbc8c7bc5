"""Where groups of steps begin: boundaries chosen by what enters the layers in each step.

Steps of a group share bit widths of inputs and, where ranges are static, a range (paper 004, section 3, which splits
timesteps into equal groups; here steps are timesteps, stages or positions). A range that is r times a step's own leaves
that step log2(r) bits less. So the cost of a group is the bits that its steps lose in all to the range of the whole
group, mean over layers; contiguous groups of least total cost are found exactly, by dynamic programming.

Legend: N sites, S steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bitlaw.allocation.curves import CurveSettings
from bitlaw.calibration.cache import calibrate
from bitlaw.calibration.collect import Progress, as_calibrated
from bitlaw.calibration.settings import Calibration
from bitlaw.methods.quantize import Protect, equal_groups
from bitlaw.models.generator import ImageGenerator
from bitlaw.precision import FULL_BITS, unprotected

Reals = npt.NDArray[np.float64]

NOTHING = (np.inf, -np.inf)
"""The ends of what does not enter a site at all."""


@dataclass(frozen=True)
class StepGroups:
    """The best groups of steps for every number of them, and what they are chosen by.

    ends: of each site, the least and the greatest number that enters it in each step; inf and -inf where nothing does
    starts: the first step of each group, for 1, 2, ... groups
    bits_lost: with these groups, what a layer loses in a step to a range shared by the group; mean over both
    equal_bits_lost: the same with groups of equal length
    """

    ends: Mapping[str, tuple[tuple[float, float], ...]]
    starts: tuple[tuple[int, ...], ...]
    bits_lost: tuple[float, ...]
    equal_bits_lost: tuple[float, ...]

    @property
    def num_steps(self) -> int:
        """S."""
        return len(next(iter(self.ends.values())))


def choose_step_groups(
    model: ImageGenerator[Any],
    count: int,
    *,
    num_images: int = 16,
    seed: int = CurveSettings.seed,
    protect: Protect = "first-last",
    progress: Progress | None = None,
    **calibration: Any,
) -> tuple[int, ...]:
    """The first step of each of `count` groups of a full-precision model's steps.

    num_images, seed: of the rollouts in which inputs are observed; further keywords are settings of `Calibration`
    protect: sites that are not to be quantized and so do not count
    ValueError for more groups than steps, before anything is drawn.
    """
    settings = Calibration(num_images=num_images, seed=seed, **calibration)
    equal_groups(count, as_calibrated(model, settings).num_steps)
    return study_step_groups(model, count, settings, protect, progress).starts[count - 1]


def study_step_groups(
    model: ImageGenerator[Any],
    max_count: int,
    settings: Calibration | None = None,
    protect: Protect = "first-last",
    progress: Progress | None = None,
) -> StepGroups:
    """The best groups for 1 to `max_count` of them, or as many as there are steps, with what each number loses."""
    settings = settings or Calibration(num_images=16, seed=CurveSettings.seed)
    drawn = as_calibrated(model, settings)
    names = [site.name for site in unprotected(model.sites(), protect)]
    if not names:
        raise ValueError("all sites are protected, so no input could choose step groups")
    steps = tuple(range(drawn.num_steps))
    stats = calibrate(drawn, settings, names, frozenset({"ends_S2"}), steps, progress)
    ends = {}
    for name in names:
        ends_S2 = stats[name].ends_S2
        assert ends_S2 is not None
        ends[name] = tuple((low, high) for low, high in ends_S2.tolist())
    return groups_of_ends(ends, max_count)


def groups_of_ends(ends: Mapping[str, Sequence[tuple[float, float]]], max_count: int) -> StepGroups:
    """`study_step_groups` of ends that are known. ValueError naming the sites whose inputs are not finite."""
    ends_NS2 = np.array([list(steps) for steps in ends.values()], dtype=np.float64)
    finite_N = (np.isfinite(ends_NS2) | (ends_NS2 == NOTHING)).all((1, 2))
    if not finite_N.all():
        wrong = [name for name, finite in zip(ends, finite_N, strict=True) if not finite]
        raise ValueError("\n".join(f"{name}: NaN or Inf enters it, so that its ranges say nothing" for name in wrong))
    cost_SS = group_costs(ends_NS2)
    num_steps = len(cost_SS)
    best = cheapest_groups(cost_SS, min(max_count, num_steps))
    equal = [cost_of(cost_SS, equal_groups(count, num_steps)) for count in range(1, len(best) + 1)]
    return StepGroups(
        {name: tuple(steps) for name, steps in ends.items()},
        tuple(starts for _, starts in best),
        tuple(cost / num_steps for cost, _ in best),
        tuple(cost / num_steps for cost in equal),
    )


def group_costs(ends_NS2: Reals) -> Reals:
    """(S, S): at [i, j] the bits that steps i .. j lose in all to the range of their group, mean over sites; inf below.

    A step that does not reach a site (inf, -inf) loses nothing there. A step's own range counts as at least 2^-16 of
    the site's greatest: nobody needs more bits than that.
    """
    low_NS, high_NS = ends_NS2[..., 0], ends_NS2[..., 1]
    reached_NS = low_NS <= high_NS
    own_NS = np.where(reached_NS, high_NS, 0.0) - np.where(reached_NS, low_NS, 0.0)
    greatest_N1 = (high_NS.max(1) - low_NS.min(1))[:, None]
    least_N1 = np.where(greatest_N1 > 0, greatest_N1 * 2.0**-FULL_BITS, 1.0)
    own_NS = np.maximum(own_NS, least_N1)
    num_steps = own_NS.shape[1]
    cost_SS = np.full((num_steps, num_steps), np.inf)
    for first in range(num_steps):
        part = np.s_[:, first:]
        shared = np.maximum.accumulate(high_NS[part], 1) - np.minimum.accumulate(low_NS[part], 1)
        shared_bits = np.log2(np.maximum(shared, least_N1))
        own_bits = np.where(reached_NS[part], np.log2(own_NS[part]), 0.0)
        lost = shared_bits * reached_NS[part].cumsum(1) - own_bits.cumsum(1)
        cost_SS[first, first:] = np.maximum(lost, 0.0).mean(0)  # below 0 by rounding only
    return cost_SS


def cheapest_groups(cost_SS: Reals, max_count: int) -> list[tuple[float, tuple[int, ...]]]:
    """Total cost and first steps of the cheapest 1, 2, ... `max_count` groups that together are all steps.

    cost_SS: [i, j] is the cost of a group of steps i .. j, j >= i
    """
    num_steps = len(cost_SS)
    # At [j], of the steps before j in so many groups: the least cost, and where the last group begins.
    least = np.concatenate([[np.inf], cost_SS[0]])
    last: list[npt.NDArray[np.int64]] = [np.zeros(num_steps + 1, dtype=np.int64)]
    costs = [float(least[-1])]
    for _ in range(1, max_count):
        total = least[:-1, None] + np.where(np.tri(num_steps, k=-1, dtype=bool), np.inf, cost_SS)
        begin = total.argmin(0)
        least = np.concatenate([[np.inf], total[begin, np.arange(num_steps)]])
        last.append(np.concatenate([[0], begin]))
        costs.append(float(least[-1]))
    found = []
    for count, cost in enumerate(costs, start=1):
        starts, end = [], num_steps
        for begin in reversed(last[:count]):
            end = int(begin[end])
            starts.append(end)
        found.append((cost, tuple(reversed(starts))))
    return found


def cost_of(cost_SS: Reals, starts: Sequence[int]) -> float:
    """Total cost of the groups that begin at these steps."""
    ends = [*starts[1:], len(cost_SS)]
    return float(sum(cost_SS[start, end - 1] for start, end in zip(starts, ends, strict=True)))
