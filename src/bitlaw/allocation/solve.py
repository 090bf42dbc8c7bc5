"""Rate-distortion curves and budgets -> a bit width for every curve. Nothing here knows of models.

A curve is what one tensor costs and distorts at each bit width it may have; the choice minimises the sum of distortions
under a budget for the sum of costs (paper 004, eq. 13: the multiple-choice knapsack). `lagrangian` is the paper's way,
which reaches only points of lower convex hulls. `exact` is the optimum, in three steps:

1. The curves' hulls, cut where the budget is reached, solve the linear relaxation. Its slope, lambda, gives every point
   of every curve a reduced cost r = (D + lambda C) - min(D + lambda C) >= 0, and a choice that leaves `slack` of the
   budget is worse than the relaxation by exactly sum(r) + lambda slack.
2. So points whose r alone is the gap between a known choice and the relaxation, or more, are in no better choice. With
   thousands of curves hardly any remain.
3. Of those, partial choices are listed curve by curve, nearest to the hull first; one that costs and distorts no less
   than another is dropped, and so is one whose sum of r has reached the gap, which shrinks as better choices are met
   (Pisinger 1995, "A minimal algorithm for the multiple-choice knapsack problem"). Costs stay integers all the way.

Curves of different budgets are different problems. Where curves count for several budgets at once, what step 2 leaves
goes to HiGHS.

N: curves; W: widths, shorter curves being padded; K: budgets; M: partial choices; S: steps along hulls.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array

from bitlaw.names import unknown_name

Integers = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float64]
Booleans = npt.NDArray[np.bool_]

MAX_LISTED = 2**24
"""Partial choices that `exact` lists in all, about ten seconds of them.

Thousands of curves like 4^-bits with noise need some ten thousand at a time, for a few dozen of the curves. Distortions
proportional to large costs without a common factor may need more; what is left out lowers the bound: the gap shows it.
"""

MAX_NODES = 100_000
"""Nodes that HiGHS may visit where curves count for several budgets; beyond, the gap says what is not proven."""

COST_SCALE = 2e-5
VALUE_SCALE = 1e4
"""What HiGHS sees for a unit of cost, and for the largest difference of values."""

MAX_PLANES, MAX_SLOPE = 100, 1e6
"""Of the search for several lambdas: steps, and the largest lambda in units of the whole."""

FIRST_POINTS = 1024
"""How many points off the relaxation HiGHS gets at first."""

SMALLEST = np.nextafter(0, 1)
"""What a slope is at least, should it underflow."""

MAX_TOTAL = 2**53
"""What costs may differ by in all: up to there float64 holds every integer."""


@dataclass(frozen=True)
class Curve:
    """What a tensor, or several that share a width, costs and distorts at each width that is allowed.

    names: of the tensors; each gets the chosen width
    widths: bits of a number, ascending; 0 drops the tensor
    costs: for each budget that it counts for, the exact cost at each width: an integer, 0 or more, in the budget's unit
    distortions: at each width, 0 or more; they need not fall as widths grow

    Raises ValueError naming the tensors and the width.
    """

    names: tuple[str, ...]
    widths: tuple[int, ...]
    costs: Mapping[str, tuple[int, ...]]
    distortions: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.names or not self.widths:
            raise ValueError(f"{self.label or 'a curve'}: a curve needs a name and a width, found {self.widths}")
        if self.widths[0] < 0 or any(a >= b for a, b in zip(self.widths, self.widths[1:], strict=False)):
            raise ValueError(f"{self.label}: widths must be 0 or more and ascend, found {self.widths}")
        for what, values in (("distortions", self.distortions), *self.costs.items()):
            if len(values) != len(self.widths):
                raise ValueError(f"{self.label}: {len(values)} {what} for {len(self.widths)} widths")
        for width, distortion in zip(self.widths, self.distortions, strict=True):
            if not 0 <= distortion < math.inf:
                raise ValueError(
                    f"{self.label}: distortion {distortion} at {width} bits, expected 0 or more and finite; "
                    "measure it again or leave the width out"
                )
        for budget, costs in self.costs.items():
            for width, cost in zip(self.widths, costs, strict=True):
                if not isinstance(cost, int | np.integer) or not 0 <= cost < 2**62:
                    raise ValueError(
                        f"{self.label}: {budget} of {cost} at {width} bits, expected an integer, 0 or more"
                    )

    @property
    def label(self) -> str:
        """The tensors, for messages."""
        return " + ".join(self.names)


def restrict(curve: Curve, widths: Collection[int]) -> Curve:
    """Only the widths that are in `widths`: a set that hardware has, or the one of a protected site.

    Raises ValueError, with the widths there are, if none is left.
    """
    kept = [index for index, width in enumerate(curve.widths) if width in widths]
    if not kept:
        wanted = ", ".join(map(str, sorted(widths))) or "none"
        raise ValueError(f"{curve.label}: none of its widths {curve.widths} is allowed ({wanted})")
    return Curve(
        curve.names,
        tuple(curve.widths[index] for index in kept),
        {budget: tuple(costs[index] for index in kept) for budget, costs in curve.costs.items()},
        tuple(curve.distortions[index] for index in kept),
    )


def at_least(curve: Curve, bits: int) -> Curve:
    """Only widths of `bits` or more. Raises ValueError if there is none."""
    if curve.widths[-1] < bits:
        raise ValueError(f"{curve.label}: none of its widths {curve.widths} is {bits} or more")
    return restrict(curve, [width for width in curve.widths if width >= bits])


def tie(curves: Sequence[Curve]) -> Curve:
    """One curve for tensors that must share a width: costs and distortions added over the widths that all have.

    Raises ValueError if they have no width in common.
    """
    common = set(curves[0].widths).intersection(*(curve.widths for curve in curves))
    if not common:
        found = "; ".join(f"{curve.label} {curve.widths}" for curve in curves)
        raise ValueError(f"tensors that must share a width have none in common: {found}")
    kept = [restrict(curve, common) for curve in curves]
    budgets = dict.fromkeys(budget for curve in kept for budget in curve.costs)
    return Curve(
        tuple(name for curve in kept for name in curve.names),
        kept[0].widths,
        {
            budget: tuple(map(sum, zip(*(curve.costs[budget] for curve in kept if budget in curve.costs), strict=True)))
            for budget in budgets
        },
        tuple(map(math.fsum, zip(*(curve.distortions for curve in kept), strict=True))),
    )


@dataclass(frozen=True)
class Allocation:
    """The width of every tensor.

    widths: by name
    costs: in all, for each budget that a curve counts for, with a limit or without
    distortion: the sum over the curves
    lower_bound: proven: no choice within the budgets distorts less than this (but for rounding)
    """

    widths: dict[str, int]
    costs: dict[str, int]
    distortion: float
    lower_bound: float

    @property
    def gap_percent(self) -> float:
        """How far above the lower bound the distortion is; infinite above a bound of 0."""
        return _percent_above(self.distortion, self.lower_bound)

    def percent_above(self, other: "Allocation") -> float:
        """How much more this distorts than another, in percent of the other: of `lagrangian` over `exact`, its loss."""
        return _percent_above(self.distortion, other.distortion)


def _percent_above(value: float, reference: float) -> float:
    if value == reference:
        return 0.0
    return 100 * (value - reference) / reference if reference else math.inf


def lagrangian(curves: Sequence[Curve], budgets: Mapping[str, float]) -> Allocation:
    """On each curve the point of least D + lambda C, with the least lambda whose choice is within the budget.

    Paper 004, Algorithm 2 (lambda is minus its slope). Instead of trying lambdas, the steps along all lower convex
    hulls are sorted by slope and taken until the first that exceeds the budget, which ends at the same choice. Where
    several steps have the slope lambda, the smallest are taken that fit: either end of them is of least D + lambda C.
    What is left of the budget stays unused.

    budgets: one limit, by name. Raises ValueError as `exact` does, and for several budgets.
    """
    if len(budgets) != 1:
        raise ValueError(f"the Lagrangian method takes one budget, not {len(budgets)}; use exact for several")
    problem = _Problem.of(curves, budgets)
    if not curves:
        return problem.allocation(np.zeros(0, np.int64), 0.0)
    relaxed = _relax(problem.cost_NWK[..., 0], problem.distortion_NW, int(problem.limit_K[0]))
    return problem.allocation(relaxed.choice_N, relaxed.slope * relaxed.slack)


def exact(curves: Sequence[Curve], budgets: Mapping[str, float]) -> Allocation:
    """The choice of least distortion within every budget, proven to float64 rounding of the sum.

    budgets: limits by name, in the unit of the curves' costs; a curve counts for those it has costs for. One above
        all that could be spent limits nothing, and every curve is then at its least distortion. Where curves count
        for several budgets that do limit, the proof is HiGHS's, to 1e-10 of the largest difference on a curve.

    Raises ValueError if a budget is less than the least possible, which is given, also if that is so only because of
    the other budgets; if there is none, or one that is not a number or that no curve counts for; and for a tensor
    with two curves.
    """
    problem = _Problem.of(curves, budgets)
    choice_N = np.zeros(len(curves), np.int64)
    shortfall = 0.0
    for part in problem.parts():
        cost_NWK = problem.cost_NWK[part.curves][..., part.budgets]
        distortion_NW, limit_K = problem.distortion_NW[part.curves], problem.limit_K[part.budgets]
        if len(limit_K) == 0:
            found = _Found(distortion_NW.argmin(1), 0.0)
        elif len(limit_K) == 1:
            found = _list_choices(cost_NWK[..., 0], distortion_NW, int(limit_K[0]))
        else:
            found = _branch_and_bound(cost_NWK, distortion_NW, limit_K) or problem.conflict(part)
        choice_N[part.curves] = found.choice_N
        shortfall += found.shortfall
    return problem.allocation(choice_N, shortfall)


class _Part(NamedTuple):
    """Curves that no budget connects with other curves."""

    curves: Integers
    budgets: Integers


class _Found(NamedTuple):
    """The index of a width for every curve; how much less than it another choice could at most distort."""

    choice_N: Integers
    shortfall: float


@dataclass(frozen=True)
class _Problem:
    """The curves as arrays, a padding point being at infinite distortion and no cost.

    Of every budget, costs and limits are what exceeds each curve's least cost, in the largest unit that keeps costs
    integers: sizes of tensors share large factors. `least_K` and `unit_K` lead back.
    """

    curves: Sequence[Curve]
    budgets: tuple[str, ...]
    cost_NWK: Integers
    distortion_NW: Reals
    limit_K: Integers
    least_K: tuple[int, ...]
    unit_K: tuple[int, ...]

    @classmethod
    def of(cls, curves: Sequence[Curve], budgets: Mapping[str, float]) -> "_Problem":
        """Raises ValueError for a budget that is less than the least possible or no number, and for unknown names."""
        if not budgets:
            raise ValueError("there is no budget: without one every tensor is best at the width of least distortion")
        names = [name for curve in curves for name in curve.names]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{twice}: has two curves; give one, and tie tensors that share a width")
        known = {budget for curve in curves for budget in curve.costs}
        if curves and (unknown := sorted(budgets.keys() - known)):
            raise unknown_name(unknown[0], known, "budget")
        most = max((len(curve.widths) for curve in curves), default=1)
        cost_NWK = np.zeros((len(curves), most, len(budgets)), np.int64)
        distortion_NW = np.full((len(curves), most), np.inf)
        for n, curve in enumerate(curves):
            distortion_NW[n, : len(curve.widths)] = curve.distortions
        limits, leasts, units = [], [], []
        for k, (budget, limit) in enumerate(budgets.items()):
            least = 0
            for n, curve in enumerate(curves):
                if costs := curve.costs.get(budget):
                    floor = int(min(costs))
                    cost_NWK[n, : len(costs), k] = [cost - floor for cost in costs]
                    least += floor
            if not limit >= least:
                raise ValueError(f"{budget}: the budget is {limit}, but the least possible is {least}")
            unit = int(np.gcd.reduce(cost_NWK[..., k], axis=None)) or 1
            cost_NWK[..., k] //= unit
            most_left = sum(cost_NWK[..., k].max(1).tolist())
            if most_left > MAX_TOTAL:
                raise ValueError(
                    f"{budget}: costs of up to {most_left * unit} are too many to count; use a larger unit"
                )
            limits.append(most_left if limit >= least + most_left * unit else (math.floor(limit) - least) // unit)
            leasts.append(least)
            units.append(unit)
        limit_K = np.array(limits, np.int64)
        return cls(curves, tuple(budgets), cost_NWK, distortion_NW, limit_K, tuple(leasts), tuple(units))

    def parts(self) -> list[_Part]:
        """The independent problems; a budget that no choice exceeds connects nothing."""
        dearest_NK = self.cost_NWK.max(1)
        counts_NK = (dearest_NK > 0) & (dearest_NK.sum(0) > self.limit_K)
        part_K = np.arange(len(self.budgets))
        for counts_K in np.unique(counts_NK, axis=0):
            if counts_K.any():
                part_K[np.isin(part_K, part_K[counts_K])] = part_K[counts_K].min()
        part_N = np.where(counts_NK.any(1), part_K[counts_NK.argmax(1)], -1)
        limits_K = counts_NK.any(0)
        return [
            _Part(np.flatnonzero(part_N == part), np.flatnonzero((part_K == part) & limits_K))
            for part in np.unique(part_N)
        ]

    def conflict(self, part: _Part) -> NoReturn:
        """Raise ValueError: the budgets of a part cannot be met together, and the least of one if the others are."""
        cost_NWK, distortion_NW = self.cost_NWK[part.curves], self.distortion_NW[part.curves]
        together = ", ".join(self.budgets[k] for k in part.budgets.tolist())
        for k in part.budgets.tolist():
            rest = part.budgets[part.budgets != k]
            found = _minimise(
                cost_NWK[..., k].astype(np.float64), np.isfinite(distortion_NW), cost_NWK[..., rest], self.limit_K[rest]
            )
            if found is not None:
                spent = int(cost_NWK[np.arange(len(cost_NWK)), found.choice_N, k].sum())
                least = self.least_K[k] + self.unit_K[k] * spent
                limit = self.least_K[k] + self.unit_K[k] * int(self.limit_K[k])
                others = " and ".join(self.budgets[other] for other in rest.tolist())
                raise ValueError(
                    f"{self.budgets[k]}: at most {limit}, but the least possible is {least} if {others} is met"
                )
        raise ValueError(f"{together}: no choice meets these budgets together")

    def allocation(self, choice_N: Integers, shortfall: float) -> Allocation:
        """What a choice of widths amounts to."""
        widths: dict[str, int] = {}
        costs = dict.fromkeys((budget for curve in self.curves for budget in curve.costs), 0)
        costs |= dict.fromkeys(self.budgets, 0)
        distortions = []
        for curve, index in zip(self.curves, choice_N.tolist(), strict=True):
            widths |= dict.fromkeys(curve.names, curve.widths[index])
            distortions.append(curve.distortions[index])
            for budget, of_widths in curve.costs.items():
                costs[budget] += int(of_widths[index])
        distortion = math.fsum(distortions)
        return Allocation(widths, costs, distortion, max(0.0, distortion - shortfall))


class _Relaxed(NamedTuple):
    """The last choice along the hulls that is within the limit, the slope of the step behind it, and what is left.

    A slope of 0: there is no step behind it, every curve is at its least distortion.
    """

    choice_N: Integers
    slope: float
    slack: int


def _relax(cost_NW: Integers, distortion_NW: Reals, limit: int) -> _Relaxed:
    """Take the steps along all lower convex hulls, steepest first, until one exceeds the limit.

    Every curve begins at its least cost, which is 0. All hulls grow at once, each by the point to which the slope from
    its end is steepest (the nearest, if several are in line; the lowest, if rounding leaves several points of a cost).
    """
    rows_N = np.arange(len(cost_NW))
    end_N = np.lexsort((distortion_NW, np.where(np.isfinite(distortion_NW), cost_NW, np.iinfo(np.int64).max)))[:, 0]
    choice_N, slope_N = end_N.copy(), np.full(len(rows_N), np.inf)
    taken: list[tuple[Reals, Integers, Integers, Integers]] = []
    while len(rows_N):
        extra_NW = cost_NW[rows_N] - cost_NW[rows_N, end_N][:, None]
        gain_NW = distortion_NW[rows_N, end_N][:, None] - distortion_NW[rows_N]
        ahead_NW = (extra_NW > 0) & (gain_NW > 0)
        slope_NW = np.where(ahead_NW, np.maximum(gain_NW / np.where(ahead_NW, extra_NW, 1), SMALLEST), 0.0)
        steepest_N = slope_NW.max(1)
        nearest_NW = np.where(slope_NW == steepest_N[:, None], extra_NW, np.iinfo(np.int64).max)
        next_N = np.lexsort((distortion_NW[rows_N], nearest_NW))[:, 0]
        on_N = steepest_N > 0
        # Neither rounding nor points in line may put a step before the one that it follows.
        slope_N = np.maximum(np.minimum(steepest_N, np.nextafter(slope_N, 0)), SMALLEST)
        rows_N, next_N, slope_N = rows_N[on_N], next_N[on_N], slope_N[on_N]
        taken.append((slope_N, rows_N, next_N, extra_NW[on_N, next_N]))
        end_N = next_N
    if not taken:
        return _Relaxed(choice_N, 0.0, limit)
    slope_S, row_S, next_S, extra_S = (np.concatenate(parts) for parts in zip(*taken, strict=True))
    order_S = np.lexsort((extra_S, -slope_S))
    spent_S = extra_S[order_S].cumsum()
    count = int(np.searchsorted(spent_S, limit, side="right"))
    within = order_S[:count]
    choice_N[row_S[within]] = next_S[within]  # of several steps of a curve the last one stays
    slope = float(slope_S[order_S[count]]) if count < len(order_S) else 0.0
    return _Relaxed(choice_N, slope, limit - (int(spent_S[count - 1]) if count else 0))


def _list_choices(cost_NW: Integers, distortion_NW: Reals, limit: int, max_listed: int = MAX_LISTED) -> _Found:
    """The optimum under one limit (steps 1 to 3 of the module's account).

    All is counted from the relaxation's choice: `cost` and `gain` are what a change costs and how much less it
    distorts. `best` is the gain of the best choice so far; another one can gain no more than lambda slack - sum(r).
    """
    choice_N, slope, slack = _relax(cost_NW, distortion_NW, limit)
    bound = slope * slack
    rows_N = np.arange(len(cost_NW))
    cost_NW = cost_NW - cost_NW[rows_N, choice_N][:, None]
    start_N = distortion_NW[rows_N, choice_N]
    gain_NW = start_N[:, None] - distortion_NW
    reduced_NW = slope * cost_NW - gain_NW  # >= 0 but for rounding
    rounding = 4 * np.finfo(np.float64).eps * math.fsum(start_N)

    best, changes = 0.0, dict[int, int]()
    single_NW = np.where(cost_NW <= slack, gain_NW, -np.inf)
    if single_NW.max() > best:
        at, column = divmod(int(single_NW.argmax()), single_NW.shape[1])
        best, changes = float(single_NW[at, column]), {at: column}

    reduced_NW[rows_N, choice_N] = np.inf  # from here on: of changes
    nearest_N = reduced_NW.min(1)
    order = np.argsort(nearest_N, kind="stable")
    order = order[nearest_N[order] < bound - best - rounding]
    dropped = np.inf  # the least sum of r of what was given up for want of room
    cost_M, gain_M = np.zeros(1, np.int64), np.zeros(1)
    history: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int16]]] = []
    cheapest = np.where(np.isfinite(distortion_NW), cost_NW, 0).min(1)[order]
    later = cheapest.sum() - cheapest.cumsum()  # the least that all later curves can cost
    for place, row in enumerate(order.tolist()):
        room = bound - best - rounding
        if nearest_N[row] >= room:
            break
        options = np.append(np.flatnonzero(reduced_NW[row] < room), choice_N[row])
        costs, gains = cost_NW[row, options], gain_NW[row, options]
        grown_M = np.add.outer(cost_M, costs).ravel()
        gained_M = np.add.outer(gain_M, gains).ravel()
        keep = (slope * grown_M - gained_M < room) & (grown_M + later[place] <= slack)
        index_M = np.flatnonzero(keep)
        index_M = index_M[np.lexsort((-gained_M[index_M], grown_M[index_M]))]
        if len(index_M) == 0:
            break
        gained = gained_M[index_M]
        better = np.ones(len(index_M), bool)
        better[1:] = gained[1:] > np.maximum.accumulate(gained)[:-1]
        index_M = index_M[better]
        share = max(max_listed // min(len(order) - place, 32), 1)
        if len(index_M) > share:
            # Kept are those that would lose least if no more was changed, and what they exceed given back at lambda.
            sum_M = slope * grown_M[index_M] - gained_M[index_M]
            loss_M = sum_M + slope * np.abs(slack - grown_M[index_M])
            nearest_M = np.argsort(loss_M, kind="stable")
            dropped = min(dropped, float(sum_M[nearest_M[share:]].min()))
            index_M = index_M[np.sort(nearest_M[:share])]
        max_listed -= len(index_M)
        cost_M, gain_M = grown_M[index_M], gained_M[index_M]
        parent_M, option_M = np.divmod(index_M, len(options))
        history.append((parent_M.astype(np.int32), options[option_M].astype(np.int16)))
        # Gains ascend with costs: the last one within the slack is the best.
        last = int(np.searchsorted(cost_M, slack, side="right")) - 1
        if last >= 0 and gain_M[last] > best:
            best, changes, at = float(gain_M[last]), {}, last
            for earlier in range(place, -1, -1):
                parents, chosen = history[earlier]
                changes[int(order[earlier])] = int(chosen[at])
                at = int(parents[at])
    choice_N = choice_N.copy()
    for row, column in changes.items():
        choice_N[row] = column
    shortfall = bound - best - dropped
    return _Found(choice_N, shortfall if shortfall > rounding else 0.0)


def _branch_and_bound(cost_NWK: Integers, distortion_NW: Reals, limit_K: Integers) -> _Found | None:
    """The optimum under several limits, None if they cannot be met together.

    Step 2 of the module's account, with a lambda for each limit. HiGHS gets the points of small reduced cost; if its
    choice is worse than the bound by more than the reduced cost of the points left out, it gets all that are below.
    """
    slope_K = _dual_slopes(cost_NWK, distortion_NW, limit_K)
    reduced_NW = distortion_NW + cost_NWK @ slope_K
    reduced_NW -= reduced_NW.min(1, keepdims=True)
    rows_N = np.arange(len(reduced_NW))
    real_NW = np.isfinite(distortion_NW)
    ascending = np.sort(reduced_NW[real_NW])
    count = len(rows_N) + FIRST_POINTS
    while True:
        threshold = float(ascending[count]) if count < len(ascending) else math.inf
        found = _minimise(distortion_NW, real_NW & (reduced_NW <= threshold), cost_NWK, limit_K)
        if found is None:
            if threshold == math.inf:
                return None
            count *= 2
            continue
        left_K = limit_K - cost_NWK[rows_N, found.choice_N].sum(0)
        excess = math.fsum(reduced_NW[rows_N, found.choice_N]) + float(left_K @ slope_K)
        if excess <= threshold or found.shortfall:
            return _Found(found.choice_N, max(found.shortfall, excess - threshold))
        count = int(np.searchsorted(ascending, excess, side="right"))


def _dual_slopes(cost_NWK: Integers, distortion_NW: Reals, limit_K: Integers) -> Reals:
    """A lambda >= 0 for every limit, near those of the greatest bound min(D + lambda C) - lambda limit.

    Cutting planes (Kelley): every choice met limits the bound, linearly in lambda; the next lambda is where the least
    of these is greatest. Any lambda gives a bound, so stopping early costs time later and nothing else.
    """
    rows_N = np.arange(len(cost_NWK))
    unit_K = cost_NWK.max(1).sum(0).astype(np.float64)
    unit = float(np.where(np.isfinite(distortion_NW), distortion_NW, 0).max(1).sum()) or 1.0
    scaled_K, best_K, best = np.zeros(len(limit_K)), np.zeros(len(limit_K)), -math.inf
    planes: list[list[float]] = []
    heights: list[float] = []
    for _ in range(MAX_PLANES):
        slope_K = scaled_K * unit / unit_K
        choice_N = (distortion_NW + cost_NWK @ slope_K).argmin(1)
        left_K = (limit_K - cost_NWK[rows_N, choice_N].sum(0)) / unit_K
        height = math.fsum(distortion_NW[rows_N, choice_N]) / unit
        if (bound := height - float(left_K @ scaled_K)) > best:
            best, best_K = bound, slope_K
        plane = [*left_K.tolist(), 1.0]
        if plane in planes:
            break
        planes.append(plane)
        heights.append(height)
        box = [(0.0, MAX_SLOPE)] * len(limit_K) + [(None, None)]
        above = linprog([0.0] * len(limit_K) + [-1.0], A_ub=planes, b_ub=heights, bounds=box)
        if above.x is None:
            break
        scaled_K = np.maximum(above.x[:-1], 0)
    return best_K


def _one_each(row: npt.NDArray[np.intp]) -> csr_array:
    """For points of the curves `row`, the matrix that counts the points chosen on every curve."""
    return csr_array((np.ones(len(row)), (np.unique(row, return_inverse=True)[1], np.arange(len(row)))))


def _minimise(value_NW: Reals, open_NW: Booleans, cost_NWK: Integers, limit_K: Integers) -> _Found | None:
    """Of the open points of every curve the choice of least value within the limits, by HiGHS; None if there is none.

    HiGHS works to tolerances. So half a unit, which is ten tolerances, is added to the limits: no choice of integer
    costs can tell it from the limits themselves. A choice that exceeds them all the same is cut off. Values are scaled
    to what they differ by, as to HiGHS a gap below 1e-6 is none, however small the distortions.
    """
    value_NW = value_NW - np.where(open_NW, value_NW, np.inf).min(1, keepdims=True)
    row, column = np.nonzero(open_NW)
    points = cost_NWK[row, column]
    unit = value_NW[row, column].max() or 1.0
    rules = [
        LinearConstraint(_one_each(row), 1, 1),
        LinearConstraint(csr_array(points.T * COST_SCALE), -np.inf, (limit_K + 0.5) * COST_SCALE),
    ]
    while True:
        solved = milp(
            value_NW[row, column] / unit * VALUE_SCALE,
            integrality=np.ones(len(row), np.int64),
            bounds=Bounds(0, 1),
            constraints=rules,
            options={"mip_rel_gap": 0, "node_limit": MAX_NODES},
        )
        if solved.status == 2:
            return None
        if solved.x is None:
            raise RuntimeError(f"HiGHS found no allocation: {solved.message}")
        chosen = np.flatnonzero(solved.x > 0.5)
        if (points[chosen].sum(0) <= limit_K).all():
            choice_N = np.zeros(len(value_NW), np.int64)
            choice_N[row[chosen]] = column[chosen]
            unproven = 0.0 if solved.status == 0 else (solved.fun - solved.mip_dual_bound) * unit / VALUE_SCALE
            return _Found(choice_N, unproven)
        cut = csr_array((np.ones(len(chosen)), (np.zeros(len(chosen), int), chosen)), (1, len(row)))
        rules.append(LinearConstraint(cut, -np.inf, len(chosen) - 1))
