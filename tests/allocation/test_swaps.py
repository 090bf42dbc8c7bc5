import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_curves import made_curves

from bitlaw.allocation.allocate import Problem
from bitlaw.allocation.constraints import Constraints
from bitlaw.allocation.curves import CurveSettings, TensorKey
from bitlaw.allocation.paths import Paths
from bitlaw.allocation.swaps import held_out_settings, measure_on, refine
from bitlaw.methods.quantize import quantize
from tiny_models import tiny_dit, tiny_var

MODEL = tiny_var()


def with_interaction(problem: Problem, weight: float, noise: float = 0.0):
    """A distortion that is that of the curves and, beside it, what pairs of neighbours in few bits do together.

    noise: what is measured wrong for a plan, about
    """
    keys = problem.keys

    def measure(plan) -> float:
        bits = {key: bits_of(plan, key) for key in keys}
        pairs = sum(4.0 ** -(bits[a] + bits[b]) for a, b in itertools.pairwise(keys))
        wrong = random.Random(str(list(bits.values()))).gauss(0, noise)
        return problem.distortion(bits) + weight * pairs + wrong

    return measure


def bits_of(plan, key: TensorKey) -> int:
    precision = plan[key.site][key.group]
    return round(precision.weight_bits if key.what == "weight" else precision.activation_bits)


@given(st.integers(0, 2**32), st.sampled_from(["bits_per_weight", "bytes", "compute_bits"]))
@settings(max_examples=12, deadline=None)
def test_swaps_keep_budgets_and_only_what_is_measured_better(seed: int, budget: str) -> None:
    problem = Problem(MODEL, made_curves(MODEL, seed), Constraints((0, 2, 4, 8)))
    least = problem.least()
    limit = {"bits_per_weight": 3, "bytes": least["bytes"] + 1500, "compute_bits": 1.2 * least["compute_bits"]}[budget]
    start = problem.allocate({budget: limit, "bits_per_activation": 4})
    measured = []
    interacting = with_interaction(problem, 0.1)

    def measure(plan) -> float:
        measured.append(interacting(plan))
        return measured[-1]

    held_out = with_interaction(problem, 0.2)
    found = refine(problem, start, measure, held_out, num_swaps=15, seed=seed)
    plan = found.allocated.plan
    assert all(found.allocated.costs[name] <= most for name, most in start.budgets.items())
    assert len(measured) == 1 + found.num_measured <= 16
    assert found.start == measured[0] and found.end == min(measured)
    assert {key: bits_of(plan, key) for key in problem.keys} == found.allocated.bits
    assert found.held_out_start == held_out(start.plan)
    if found.is_kept:
        assert found.end == interacting(plan) < found.start
        assert found.held_out_end == held_out(plan) < found.held_out_start
    else:
        assert plan == start.plan


def test_swaps_find_what_the_sum_does_not_know() -> None:
    """Interactions as large as the curves: within some dozens of swaps most of what can be gained is."""
    inside = [site.name for site in MODEL.sites() if site.block == 0 and site.kind != "adaln"]
    others = tuple(site.name for site in MODEL.sites() if site.name not in inside)
    gained = []
    for seed in range(4):
        problem = Problem(MODEL, made_curves(MODEL, seed, what="weights"), Constraints((0, 2, 3, 4, 8), others))
        start = problem.allocate({"bits_per_weight": 3})
        measure = with_interaction(problem, 1.0)
        found = refine(problem, start, measure, measure, num_swaps=60)
        allowed = []
        for widths in itertools.product(*(curve.widths for curve in problem.variables)):
            bits = dict(zip(problem.keys, widths, strict=True))
            taken = sum(problem.counts[key]["weight_bits"] * width for key, width in bits.items())
            if taken <= start.budgets["weight_bits"]:
                allowed.append(measure(problem.plan(bits)))
        best = min(allowed)
        assert best <= found.end <= found.start
        gained.append((found.start - found.end, found.start - best))
    assert sum(gain for gain, _ in gained) >= 0.8 * sum(possible for _, possible in gained) > 0


def test_luck_with_images_is_not_kept() -> None:
    """The start is the best there is; noise makes other plans seem better, which other images do not confirm."""
    problem = Problem(MODEL, made_curves(MODEL, what="weights"), Constraints((2, 4, 8)))
    start = problem.allocate({"bits_per_weight": 4})
    exact = with_interaction(problem, 0.0)
    noisy = with_interaction(problem, 0.0, noise=exact(start.plan))
    found = refine(problem, start, noisy, exact, num_swaps=30)
    assert found.num_better > 0 and found.end < found.start
    assert found.held_out_end >= found.held_out_start and not found.is_kept
    assert found.allocated == start


def test_tied_tensors_stay_tied() -> None:
    problem = Problem(MODEL, made_curves(MODEL, what="weights"), Constraints(tie=("kind",)))
    start = problem.allocate({"bits_per_weight": 3})
    measure = with_interaction(problem, 10.0)
    plan = refine(problem, start, measure, measure, num_swaps=20).allocated.plan
    for kind in ("qkv", "proj", "fc1", "fc2", "adaln"):
        names = [site.name for site in MODEL.sites() if site.kind == kind and site.phase == "blocks"]
        assert len({plan[name] for name in names}) == 1


def test_swaps_on_the_paths_of_a_model_are_judged_on_other_images_than_they_are_chosen_by() -> None:
    model = tiny_dit()
    curves = made_curves(model, what="weights", widths=(2, 3, 4, 8), num_images=2, batch_size=2)
    problem = Problem(model, curves)
    start = problem.allocate({"bits_per_weight": 4})
    held_out = held_out_settings(curves.settings)
    assert held_out == replace(curves.settings, seed=held_out.seed) and held_out.seed != CurveSettings().seed
    paths, others = Paths(model, curves.settings), Paths(model, held_out)
    measure, unseen = measure_on(paths, model, "rtn"), measure_on(others, model, "rtn")
    told = []
    found = refine(problem, start, measure, unseen, num_swaps=6, progress=lambda *step: told.append(step))
    assert found.end <= found.start == measure(start.plan)
    assert found.start != found.held_out_start == unseen(start.plan)
    assert found.held_out_end == unseen(found.allocated.plan) or not found.is_kept
    whole = Paths(model, held_out).distortion(quantize(model, start.plan)).mean()
    assert found.held_out_start == pytest.approx(float(whole), rel=1e-12)  # sums in another order
    assert told[-1] == ("measuring swaps", 6, 6) and found.num_measured == 6
    with pytest.raises(ValueError, match="num_swaps 0"):
        refine(problem, start, measure, unseen, num_swaps=0)
