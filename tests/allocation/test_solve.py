import math
from collections.abc import Sequence
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from bitlaw.allocation import solve
from bitlaw.allocation.solve import Allocation, Curve, at_least, exact, lagrangian, restrict, tie

SUM_ROUNDING = 1e-12  # relative: a few additions of float64 in another order


def curve(name: str, costs: Sequence[int], distortions: Sequence[float], budget: str = "bits") -> Curve:
    """A curve with widths 0, 1, 2 ... under one budget."""
    return Curve((name,), tuple(range(len(costs))), {budget: tuple(costs)}, tuple(distortions))


# Ties, zeros and equal costs come up often; curves need not be monotone.
DISTORTIONS = st.one_of(st.integers(0, 4).map(float), st.floats(0, 1e3), st.floats(0, 1e-6))
COSTS = st.one_of(st.integers(0, 6), st.integers(0, 10**9))


@st.composite
def problems(draw: st.DrawFn, budgets: tuple[str, ...] = ("bits",), costs=COSTS, always: Sequence[int] = ()):
    """Up to 5 curves of up to 4 widths, beside those in `always`."""
    curves = []
    for name in range(draw(st.integers(1, 5))):
        widths = sorted({*always, *draw(st.sets(st.integers(0, 16), min_size=1, max_size=4))})
        counted = budgets[:1] if len(budgets) == 1 else draw(st.sets(st.sampled_from(budgets)))
        count = len(widths)
        curves.append(
            Curve(
                (f"site{name}",),
                tuple(widths),
                {b: tuple(draw(st.lists(costs, min_size=count, max_size=count))) for b in sorted(counted)},
                tuple(draw(st.lists(DISTORTIONS, min_size=count, max_size=count))),
            )
        )
    return curves


def choices(curves: Sequence[Curve], budget: str = "bits") -> list[tuple[int, float]]:
    """Cost and distortion of every choice there is."""
    indices = product(*(range(len(curve.widths)) for curve in curves))
    return [
        (
            sum(curve.costs[budget][i] for curve, i in zip(curves, index, strict=True) if budget in curve.costs),
            math.fsum(curve.distortions[i] for curve, i in zip(curves, index, strict=True)),
        )
        for index in indices
    ]


def enumerate_best(curves: Sequence[Curve], budgets: dict[str, int]) -> float:
    """The least distortion within the budgets, infinite if they cannot be met, by trying every choice."""
    costs = [choices(curves, budget) for budget in budgets]
    allowed = [
        points[0][1]
        for points in zip(*costs, strict=True)
        if all(cost <= limit for (cost, _), limit in zip(points, budgets.values(), strict=True))
    ]
    return min(allowed, default=math.inf)


def check(found: Allocation, curves: Sequence[Curve], budgets: dict[str, int]) -> None:
    """That an allocation is what it says, within the budgets."""
    spent, distortion = dict.fromkeys(budgets, 0), 0.0
    assert set(found.widths) == {name for curve in curves for name in curve.names}
    for item in curves:
        (width,) = {found.widths[name] for name in item.names}
        index = item.widths.index(width)
        distortion += item.distortions[index]
        for budget in item.costs:
            spent[budget] = spent.get(budget, 0) + item.costs[budget][index]
    assert found.costs == spent
    assert found.distortion == pytest.approx(distortion, rel=SUM_ROUNDING)
    assert all(spent[budget] <= limit for budget, limit in budgets.items())
    assert found.lower_bound <= found.distortion


@given(problems(), st.data())
def test_exact_is_brute_force_and_the_lagrangian_never_better(curves: list[Curve], data: st.DataObject) -> None:
    points = choices(curves)
    least, dearest = min(cost for cost, _ in points), max(cost for cost, _ in points)
    budgets = {"bits": data.draw(st.integers(least, dearest + 1))}
    best, relaxed = exact(curves, budgets), lagrangian(curves, budgets)
    check(best, curves, budgets)
    check(relaxed, curves, budgets)
    optimum = enumerate_best(curves, budgets)
    assert best.distortion == pytest.approx(optimum, rel=SUM_ROUNDING)
    assert best.gap_percent == 0
    assert relaxed.distortion >= best.distortion
    assert relaxed.lower_bound <= optimum * (1 + SUM_ROUNDING)
    assert relaxed.percent_above(best) >= 0
    assert relaxed.gap_percent >= relaxed.percent_above(best)


@given(problems(), st.data())
def test_the_lagrangian_chooses_as_algorithm_2_does(curves: list[Curve], data: st.DataObject) -> None:
    """Against bisection of lambda: never worse, and the same choice where no two slopes are near each other."""
    least = min(cost for cost, _ in choices(curves))
    budgets = {"bits": data.draw(st.integers(least, least + 20))}
    ours = lagrangian(curves, budgets)

    def at(slope: float) -> tuple[int, float]:
        cost, distortion = 0, 0.0
        for item in curves:
            points = zip(item.distortions, item.costs["bits"], strict=True)
            d, c = min(points, key=lambda point: (point[0] + slope * point[1], point[1]))
            cost, distortion = cost + c, distortion + d
        return cost, distortion

    low, high = 0.0, 2e3
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if at(middle)[0] <= budgets["bits"] else (middle, high)
    cost, distortion = at(high)
    assert cost <= budgets["bits"]
    # Bisection leaves all steps of one slope untaken where the sorted hulls take those that fit.
    assert ours.costs["bits"] >= cost
    assert ours.distortion <= distortion * (1 + SUM_ROUNDING)
    slopes = hull_slopes(curves)
    if all(a > 1e-9 for a in slopes) and all(a - b > 1e-6 * a for a, b in pairwise(slopes)):
        assert ours.costs["bits"] == cost
        assert ours.distortion == pytest.approx(distortion, rel=SUM_ROUNDING)


def hull(item: Curve) -> list[tuple[int, float]]:
    """The lower convex hull of a curve, from least cost on (Andrew's chain)."""
    points: list[tuple[int, float]] = []
    for cost, distortion in sorted(zip(item.costs["bits"], item.distortions, strict=True)):
        if points and distortion >= points[-1][1]:
            continue
        while len(points) > 1 and slope(points[-2], points[-1]) <= slope(points[-1], (cost, distortion)):
            points.pop()
        points.append((cost, distortion))
    return points


def slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (a[1] - b[1]) / (b[0] - a[0])


def hull_slopes(curves: Sequence[Curve]) -> list[float]:
    chains = [hull(item) for item in curves]
    steps = (slope(a, b) for chain in chains for a, b in pairwise(chain))
    return sorted(steps, reverse=True)


@given(problems())
@example([Curve(("site0",), (0, 1, 2, 3), {"bits": (0, 1, 1, 0)}, (1.0, 3.8e-283, 0.0, 1.0))])  # 1 - 3.8e-283 is 1
def test_at_break_points_of_the_hulls_the_lagrangian_is_exact(curves: list[Curve]) -> None:
    steps = []
    for item in curves:
        chain = hull(item)
        steps += [(slope(a, b), b[0] - a[0]) for a, b in pairwise(chain)]
    budget = sum(min(item.costs["bits"]) for item in curves)
    for _, extra in sorted(steps, key=lambda step: (-step[0], step[1])):
        budget += extra
        relaxed = lagrangian(curves, {"bits": budget})
        best = exact(curves, {"bits": budget})
        assert relaxed.distortion == pytest.approx(best.distortion, rel=SUM_ROUNDING, abs=1e-300)


TWO = ("bytes", "activation bits")


@pytest.mark.parametrize("first_points", [solve.FIRST_POINTS, 1])  # all at once, and by and by
@settings(max_examples=60)  # HiGHS takes milliseconds
@given(curves=problems(TWO, st.integers(0, 40)), data=st.data())
def test_several_budgets_are_brute_force(first_points: int, curves: list[Curve], data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solve, "FIRST_POINTS", first_points)
        check_several_budgets(curves, data)


def check_several_budgets(curves: list[Curve], data: st.DataObject) -> None:
    budgets = {}
    for budget in TWO:
        costs = [cost for cost, _ in choices(curves, budget)]
        if any(budget in item.costs for item in curves):
            budgets[budget] = data.draw(st.integers(min(costs), max(costs)))
    assume(budgets)
    optimum = enumerate_best(curves, budgets)
    if optimum == math.inf:
        with pytest.raises(ValueError, match="but the least possible is"):
            exact(curves, budgets)
        return
    best = exact(curves, budgets)
    check(best, curves, budgets)
    spread = max(max(item.distortions) for item in curves)
    assert best.distortion == pytest.approx(optimum, rel=SUM_ROUNDING, abs=1e-9 * spread)  # HiGHS's proof


@given(problems(), st.randoms(use_true_random=False))
def test_the_order_of_curves_changes_nothing(curves: list[Curve], random) -> None:
    points = choices(curves)
    budgets = {"bits": (min(points)[0] + max(points)[0]) // 2}
    mixed = random.sample(curves, len(curves))
    for method in (exact, lagrangian):
        assert method(mixed, budgets).distortion == pytest.approx(
            method(curves, budgets).distortion, rel=SUM_ROUNDING, abs=1e-300
        )
        assert method(curves, budgets) == method(curves, budgets)


def random_curves(rng: np.random.Generator, count: int, noise: float = 0.5) -> list[Curve]:
    """About 4^-bits, of tensors of many sizes, with noise."""
    numel = rng.integers(1, 10**6, count)
    distortions = np.exp(rng.normal(0, 2, (count, 1)) + rng.normal(0, noise, (count, 9))) * 4.0 ** -np.arange(9)
    return [
        curve(f"site{i}", (numel[i] * np.arange(9)).tolist(), distortions[i].tolist(), "bits") for i in range(count)
    ]


def test_the_list_and_highs_find_the_same_optimum() -> None:
    """Two solvers with nothing in common but the bound, on more curves than can be enumerated."""
    rng = np.random.default_rng(0)
    for count in (10, 40, 600):
        curves = random_curves(rng, count)
        total = sum(max(item.costs["bits"]) for item in curves)
        problem = solve._Problem.of(curves, {"bits": total // 3})
        by_highs = solve._branch_and_bound(problem.cost_NWK, problem.distortion_NW, problem.limit_K)
        assert by_highs is not None
        other = problem.allocation(by_highs.choice_N, by_highs.shortfall)
        best = exact(curves, {"bits": total // 3})
        assert best.distortion == pytest.approx(other.distortion, rel=1e-9)  # HiGHS's tolerances
        assert best.gap_percent == 0
        relaxed = lagrangian(curves, {"bits": total // 3})
        assert relaxed.lower_bound < best.distortion < relaxed.distortion


def best_of_every_cost(costs_NW: np.ndarray, distortions_NW: np.ndarray, limit: int) -> float:
    """The least distortion within a limit, by the textbook's dynamic program over every sum of costs."""
    best = np.zeros(limit + 1)
    for costs, distortions in zip(costs_NW, distortions_NW, strict=True):
        grown = np.full(limit + 1, np.inf)
        for cost, distortion in zip(costs, distortions, strict=True):
            if cost <= limit:
                grown[cost:] = np.minimum(grown[cost:], best[: limit + 1 - cost] + distortion)
        best = grown
    return float(best[limit])


@pytest.mark.parametrize("seed", range(40))
def test_exact_is_dynamic_programming_over_every_cost(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves too many to enumerate, in no shape, in the shape of measured ones, and all on one line."""
    rng = np.random.default_rng(seed)
    count, widths = int(rng.integers(8, 30)), int(rng.integers(2, 7))
    costs = rng.integers(0, int(rng.choice([30, 300])), (count, widths))
    distortions = rng.random((count, widths))
    if seed % 4 == 1:
        distortions = rng.integers(0, 5, (count, widths)).astype(float)
    if seed % 4 == 2:
        costs, distortions = np.sort(costs, 1), -np.sort(-distortions, 1)
    if seed % 4 == 3:
        distortions = (300.0 - costs) / 8  # exact in float64
    least, dearest = int(costs.min(1).sum()), int(costs.max(1).sum())
    limit = int(rng.integers(least, dearest))
    curves = [curve(f"site{i}", costs[i].tolist(), distortions[i].tolist()) for i in range(count)]
    optimum = best_of_every_cost(costs, distortions, limit)
    found = exact(curves, {"bits": limit})
    check(found, curves, {"bits": limit})
    assert found.distortion == pytest.approx(optimum, rel=SUM_ROUNDING) and found.gap_percent == 0
    # The same curves to HiGHS, first with hardly any point: those it then needs must be found by their reduced costs.
    monkeypatch.setattr(solve, "FIRST_POINTS", 1)
    doubled = [
        Curve(c.names, c.widths, c.costs | {"ops": tuple(2 * x for x in c.costs["bits"])}, c.distortions)
        for c in curves
    ]
    both = exact(doubled, {"bits": limit, "ops": 2 * limit + 1})
    assert both.distortion == pytest.approx(optimum, rel=1e-9)  # HiGHS's tolerances


def test_coupled_budgets_of_many_curves_are_met_and_near_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    curves = [
        Curve(item.names, item.widths, item.costs | {"ops": tuple(7 * b * b for b in item.widths)}, item.distortions)
        for item in random_curves(rng, 60)
    ]
    bits = sum(max(item.costs["bits"]) for item in curves) // 2
    alone = exact(curves, {"bits": bits})
    budgets = {"bits": bits, "ops": alone.costs["ops"] * 2 // 3}
    both = exact(curves, budgets)
    check(both, curves, budgets)
    assert both.gap_percent == 0
    assert both.distortion > alone.distortion
    # Of points so few that no choice of them is within the budgets the search has to go on.
    monkeypatch.setattr(solve, "FIRST_POINTS", -len(curves) + 2)
    assert exact(curves, budgets).distortion == pytest.approx(both.distortion, rel=1e-9)  # HiGHS's tolerances
    with pytest.raises(ValueError, match="takes one budget, not 2"):
        lagrangian(curves, budgets)


def test_a_list_that_is_full_says_what_it_does_not_prove() -> None:
    """Distortion proportional to cost: every choice is on the bound's line, and only sums of costs decide."""
    rng = np.random.default_rng(2)
    numel = rng.integers(10**6, 10**7, 30)
    costs = np.outer(numel, np.arange(4))
    distortions = 1e-6 * np.outer(numel, 3 - np.arange(4))
    limit = int(costs.max(1).sum()) // 2 + 1
    found = solve._list_choices(costs, distortions, limit, max_listed=2000)
    rows = np.arange(30)
    assert costs[rows, found.choice_N].sum() <= limit
    unused = (limit - costs[rows, found.choice_N].sum()) * 1e-6
    assert 0 < found.shortfall == pytest.approx(unused, rel=1e-6)
    better = solve._list_choices(costs, distortions, limit, max_listed=200_000)
    assert better.shortfall < found.shortfall


def test_budgets_of_different_curves_are_independent() -> None:
    weights = [curve("w0", (0, 5, 9), (9, 4, 1), "bytes"), curve("w1", (0, 5, 9), (8, 4, 2), "bytes")]
    activations = [curve("a0", (0, 1, 2), (3, 2, 0), "act"), curve("a1", (0, 1, 2), (3, 1, 0), "act")]
    together = exact([*weights, *activations], {"bytes": 10, "act": 3})
    apart = exact(weights, {"bytes": 10}).widths | exact(activations, {"act": 3}).widths
    assert together.widths == apart
    # What has no limit is still counted.
    assert exact([*weights, *activations], {"bytes": 10}).costs == {"bytes": 10, "act": 4}


def test_what_the_lagrangian_cannot_reach() -> None:
    """Width 1 lies above the hull's line from 0 to 2, so that lambda never takes it."""
    curves = [curve("fc1", (0, 10, 20), (10.0, 6.0, 0.0))]
    relaxed, best = lagrangian(curves, {"bits": 15}), exact(curves, {"bits": 15})
    assert relaxed.widths == {"fc1": 0} and best.widths == {"fc1": 1}
    assert relaxed.lower_bound == 5 and relaxed.gap_percent == 100  # of 15 no more than 10 can be spent
    assert relaxed.percent_above(best) == pytest.approx(100 * 4 / 6)


def test_equal_curves_do_not_wait_for_one_another() -> None:
    """With one lambda for all, bisection would leave every one of them at 0 bits."""
    curves = [curve(f"site{i}", (0, 4), (1.0, 0.0)) for i in range(5)]
    for method in (exact, lagrangian):
        found = method(curves, {"bits": 13})
        assert found.costs == {"bits": 12} and found.distortion == 2


def test_of_steps_of_one_slope_the_small_ones_fit() -> None:
    wide, narrow = curve("wide", (0, 10), (10.0, 0.0)), curve("narrow", (0, 1), (1.0, 0.0))
    for curves in ([wide, narrow], [narrow, wide]):
        assert lagrangian(curves, {"bits": 5}).widths == {"wide": 0, "narrow": 1}
    in_line = curve("in line", (0, 10, 20, 30), (3.0, 2.0, 1.0, 0.0))
    assert lagrangian([in_line], {"bits": 29}).widths == {"in line": 2}


def test_a_slope_too_small_for_float64_is_a_slope() -> None:
    tiny = curve("fc1", (0, 10**9, 2 * 10**9 + 1), (1e-322, 5e-324, 0.0))
    for method in (exact, lagrangian):
        assert method([tiny], {"bits": math.inf}).widths == {"fc1": 2}


def test_distortion_that_rises_with_bits() -> None:
    curves = [curve("fc1", (0, 1, 2, 3), (5, 1, 2, 1)), curve("fc2", (0, 1, 2, 3), (0, 0, 0, 0))]
    for method in (exact, lagrangian):
        found = method(curves, {"bits": 100})
        assert found.widths == {"fc1": 1, "fc2": 0} and found.lower_bound == 1


def test_a_budget_above_everything_is_each_least_distortion() -> None:
    curves = random_curves(np.random.default_rng(3), 20)
    for method in (exact, lagrangian):
        for budget in (1e18, math.inf):
            found = method(curves, {"bits": budget})
            assert found.distortion == pytest.approx(math.fsum(min(c.distortions) for c in curves), rel=SUM_ROUNDING)
            assert found.gap_percent == 0


def test_no_curves_and_one_curve_and_one_point() -> None:
    for method in (exact, lagrangian):
        assert method([], {"bits": 0}) == Allocation({}, {"bits": 0}, 0.0, 0.0)
        assert method([curve("head", (7,), (3.0,))], {"bits": 7}).widths == {"head": 0}
        assert method([curve("fc1", (0, 9), (0.0, 0.0))], {"bits": 0}).gap_percent == 0


def test_a_gap_over_a_bound_of_zero_is_infinite() -> None:
    relaxed = lagrangian([curve("fc1", (0, 10, 11), (1.0, 0.99, 0.0))], {"bits": 10})
    assert 0 < relaxed.gap_percent < math.inf
    assert Allocation({}, {}, 1.0, 0.0).gap_percent == math.inf


def test_tied_tensors_get_one_width() -> None:
    q = Curve(("q",), (0, 2, 4, 8), {"bits": (0, 20, 40, 80)}, (9.0, 4.0, 1.0, 0.0))
    k = Curve(("k",), (2, 3, 4), {"bits": (2, 3, 4), "act": (1, 1, 2)}, (0.5, 0.2, 0.1))
    both = tie([q, k])
    assert both == Curve(("q", "k"), (2, 4), {"bits": (22, 44), "act": (1, 2)}, (4.5, 1.1))
    found = exact([both], {"bits": 43})
    assert found.widths == {"q": 2, "k": 2} and found.costs == {"bits": 22, "act": 1}
    check(found, [both], {"bits": 43})
    assert tie([q]) == q
    with pytest.raises(ValueError, match=r"none in common: q \(0, 2, 4, 8\); v \(1, 3\)"):
        tie([q, Curve(("v",), (1, 3), {}, (1.0, 0.0))])


@given(problems(costs=st.integers(0, 20), always=(4,)))
def test_tying_is_brute_force_over_common_widths(curves: list[Curve]) -> None:
    common = sorted(set(curves[0].widths).intersection(*(item.widths for item in curves)))
    totals = []
    for width in common:
        points = [(item.costs["bits"], item.distortions, item.widths.index(width)) for item in curves]
        totals.append((sum(costs[i] for costs, _, i in points), math.fsum(d[i] for _, d, i in points)))
    budget = min(cost for cost, _ in totals) + 5
    found = exact([tie(curves)], {"bits": budget})
    assert len(set(found.widths.values())) == 1
    assert found.distortion == min(distortion for cost, distortion in totals if cost <= budget)


def test_restrictions() -> None:
    item = curve("fc1", range(9), [8.0 - b for b in range(9)])
    assert restrict(item, {2, 3, 4, 8}).widths == (2, 3, 4, 8)
    assert restrict(item, {2, 3, 4, 8}).costs == {"bits": (2, 3, 4, 8)}
    assert restrict(item, [8]).distortions == (0.0,)
    assert at_least(item, 3).widths == (3, 4, 5, 6, 7, 8)
    assert at_least(item, 0) == item
    with pytest.raises(ValueError, match=r"fc1: none of its widths .* is allowed \(9, 16\)"):
        restrict(item, {16, 9})
    with pytest.raises(ValueError, match=r"fc1: none of its widths .* is 9 or more"):
        at_least(item, 9)


@pytest.mark.parametrize("method", [exact, lagrangian])
def test_an_infeasible_budget_says_the_least_possible(method) -> None:
    curves = [curve("fc1", (3, 5), (1.0, 0.0), "file bits"), curve("fc2", (4, 8), (1.0, 0.0), "file bits")]
    assert method(curves, {"file bits": 7}).costs == {"file bits": 7}
    for limit in (6, 6.9, -1, math.nan):
        with pytest.raises(ValueError, match=f"file bits: the budget is {limit}, but the least possible is 7"):
            method(curves, {"file bits": limit})
    with pytest.raises(ValueError, match=r"unknown budget 'bits'.*file bits"):
        method(curves, {"bits": 10})
    with pytest.raises(ValueError, match="fc1: has two curves"):
        method([curves[0], curves[0]], {"file bits": 10})


def test_budgets_that_exclude_each_other_say_the_least_possible() -> None:
    item = Curve(("fc1",), (2, 4), {"bytes": (20, 43), "ops": (9, 3)}, (1.0, 0.0))
    other = Curve(("fc2",), (2, 4), {"bytes": (5, 10), "ops": (1, 1)}, (1.0, 0.0))
    with pytest.raises(ValueError, match="bytes: at most 40, but the least possible is 48 if ops is met"):
        exact([item, other], {"bytes": 40, "ops": 5})
    with pytest.raises(ValueError, match="no budget"):
        exact([item, other], {})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1e-9])
def test_bad_distortions_name_tensor_and_width(bad: float) -> None:
    with pytest.raises(ValueError, match=r"blocks\.3\.fc1: distortion .* at 2 bits"):
        curve("blocks.3.fc1", (1, 2, 3), (1.0, 0.5, bad))


@pytest.mark.parametrize(
    ("widths", "costs", "distortions", "message"),
    [
        ((), {}, (), "fc1: a curve needs a name and a width"),
        ((2, 2), {"bits": (1, 2)}, (1.0, 0.0), "fc1: widths must be 0 or more and ascend"),
        ((-1, 2), {"bits": (1, 2)}, (1.0, 0.0), "fc1: widths must be 0 or more and ascend"),
        ((1, 2), {"bits": (1,)}, (1.0, 0.0), "fc1: 1 bits for 2 widths"),
        ((1, 2), {"bits": (1, 2)}, (1.0,), "fc1: 1 distortions for 2 widths"),
        ((1, 2), {"bits": (1, -2)}, (1.0, 0.0), "fc1: bits of -2 at 2 bits, expected an integer"),
        ((1, 2), {"bits": (1, 2.5)}, (1.0, 0.0), "fc1: bits of 2.5 at 2 bits, expected an integer"),
    ],
)
def test_bad_curves(widths, costs, distortions, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Curve(("fc1",), widths, costs, distortions)


def test_costs_too_large_to_count_are_refused() -> None:
    item = curve("fc1", (0, 2**60, 2**60 + 1), (2.0, 1.0, 0.0))
    with pytest.raises(ValueError, match=r"bits: .* larger unit"):
        exact([item], {"bits": 2**60})
    # A common factor is no difficulty.
    assert exact([curve("fc1", (0, 2**60, 2**61), (2.0, 1.0, 0.0))], {"bits": 2**60}).distortion == 1
