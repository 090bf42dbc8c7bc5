"""Exact allocation of 500 tensors x 11 bit widths x 10 step groups, against scipy's milp on the whole problem.

Curves are about 4^-bits over tensors of many sizes: convex, with noise, and with noise under two budgets at once, for
both of which every curve counts. Both contenders get the same curves; milp gets every point, with `mip_rel_gap=0`.
"""

import sys

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from bitlaw.allocation.solve import Allocation, Curve, exact, lagrangian
from harness import arguments, compare, finish, one_thread

NUM_TENSORS, NUM_WIDTHS, NUM_GROUPS = 500, 11, 10
LIMIT_S = 10.0
TOLERANCE = 1e-12  # sums of distortions, added in another order


def make_curves(noise: float, coupled: bool) -> list[Curve]:
    """A curve for every tensor and group; its bits are those of the numbers, and 24 for each row of 64."""
    rng = np.random.default_rng(0)
    widths = np.arange(NUM_WIDTHS)
    curves = []
    for tensor in range(NUM_TENSORS):
        numel = 64 * int(rng.integers(1, 2**14))
        for group in range(NUM_GROUPS):
            size = np.where(widths > 0, numel * widths + 24 * numel // 64, 0)
            level = np.exp(rng.normal(0, 2) + noise * rng.standard_normal(NUM_WIDTHS))
            costs = {"bits": tuple(size.tolist())}
            if coupled:
                costs["ops"] = tuple((numel * widths * int(rng.integers(1, 17))).tolist())
            curves.append(Curve((f"{tensor}.{group}",), tuple(widths.tolist()), costs, tuple(level * 4.0**-widths)))
    return curves


def by_milp(curves: list[Curve], budgets: dict[str, float]) -> float:
    """The total distortion that scipy's milp finds."""
    distortions = np.array([curve.distortions for curve in curves])
    row = np.repeat(np.arange(len(curves)), NUM_WIDTHS)
    one_each = csr_array((np.ones(len(row)), (row, np.arange(len(row)))))
    costs = np.array([[curve.costs[budget] for curve in curves] for budget in budgets], np.float64)
    solved = milp(
        distortions.ravel(),
        integrality=np.ones(len(row), np.int64),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(costs.reshape(len(budgets), -1), -np.inf, list(budgets.values())),
        ],
        options={"mip_rel_gap": 0},
    )
    return float(distortions.ravel()[solved.x > 0.5].sum())


def main() -> int:
    """Run the three comparisons."""
    one_thread()
    options = arguments(__doc__, "allocation", rounds=5)
    comparisons, requirements = [], {}
    for title, noise, coupled in (("convex", 0.0, False), ("with noise", 0.5, False), ("two budgets", 0.5, True)):
        curves = make_curves(noise, coupled)
        budgets = {
            budget: float(sum(curve.costs[budget][-1] for curve in curves) * share // 100)
            for budget, share in (("bits", 34), ("ops", 30))
            if coupled or budget == "bits"
        }
        contenders = {
            "scipy milp": lambda curves=curves, budgets=budgets: by_milp(curves, budgets),
            "exact": lambda curves=curves, budgets=budgets: exact(curves, budgets),
        }
        if not coupled:
            contenders["lagrangian"] = lambda curves=curves, budgets=budgets: lagrangian(curves, budgets)
        comparison = compare(f"{len(curves)} curves, {title}", contenders, baseline="scipy milp", rounds=options.rounds)
        comparisons.append(comparison)
        ours, theirs = comparison.results["exact"], comparison.results["scipy milp"]
        assert isinstance(ours, Allocation)
        met = all(ours.costs[budget] <= limit for budget, limit in budgets.items())
        seconds = max(comparison.seconds["exact"])
        requirements[f"{title}: {seconds:.2f} s (at most {LIMIT_S:.0f})"] = seconds < LIMIT_S
        requirements[f"{title}: within budget, {ours.distortion / theirs:.12f} times milp's distortion, proven"] = (
            met and ours.gap_percent == 0 and ours.distortion <= theirs * (1 + TOLERANCE)
        )
        if not coupled:
            percent = comparison.results["lagrangian"].percent_above(ours)
            print(f"  the Lagrangian's distortion is {percent:.4f} % above the exact one's")
    return finish(options.out, comparisons, requirements)


if __name__ == "__main__":
    sys.exit(main())
