import math
from itertools import product

import numpy as np
import pytest
from scipy.optimize import least_squares

from bitlaw.scaling.cells import Line, Measured, Table, measured_cells
from bitlaw.scaling.family_law import fit_family
from bitlaw.scaling.laws import (
    FORMS,
    HUBER,
    MAX_FLOOR,
    candidates,
    choose,
    fit_floors,
    fit_law,
    held_out_errors,
    huber_fit,
    log_score,
    predict_at,
)
from bitlaw.scaling.points import Point
from bitlaw.scaling.resampling import Scatter, resample

SIZES = (1e5, 2.2e5, 5e5, 1.1e6)
WEIGHT_BITS = {"W16A16": 16, "W8A16": 8, "W4A16": 4, "W3A16": 3}
LARGEST_AFTER_NOISE = 1e-6  # least_squares stops at relative steps of 1e-9; noiseless laws come back to about this


def made(score, noise=0.0, seed=0, sizes=SIZES, precisions=tuple(WEIGHT_BITS), log_sd=0.0) -> list[Measured]:
    """Cells whose score is score(parameters, weight bits), times exp(noise * normal)."""
    rng, cells = np.random.default_rng(seed), []
    for precision, n in product(precisions, sizes):
        b = WEIGHT_BITS[precision]
        line = Line("var", "none" if b == 16 else "rtn", precision)
        value = score(n, b) * math.exp(noise * rng.standard_normal())
        cells.append(Measured(line, f"var-{n:.0f}", n, n * b, value, None, None, log_sd, 1))
    return cells


def joint(floor):
    return lambda n, b: 5 * (n / 4e5) ** -0.35 * (b / 16) ** -0.2 + floor


def shared(floor):
    return lambda n, b: {16: 7, 8: 4, 4: 6, 3: 11}[b] * (n * b / 2e6) ** -0.3 + floor


def per_precision(floor):
    return lambda n, b: (20 / b) * (n * b / 2e6) ** -(0.2 + 0.02 * b) + floor


@pytest.mark.parametrize("floor", [0.0, 1.5])
@pytest.mark.parametrize(
    ("name", "truth", "exponents"),
    [
        ("joint", joint, {"alpha": 0.35, "beta[rtn]": 0.2}),
        ("shared exponent", shared, {"alpha": 0.3}),
        ("per-precision", per_precision, {"alpha[rtn W8]": 0.36, "alpha[rtn W3]": 0.26}),
    ],
)
def test_each_law_is_recovered_and_chosen_where_it_is_true(name, truth, exponents, floor) -> None:
    table = Table.of(made(truth(floor)))
    tried = candidates(table)
    law = choose(tried).law
    assert law.form.name == name + (" + floor" if floor else "")
    values = dict(zip(law.form.names(law.basis), law.theta_P, strict=True))
    for parameter, value in exponents.items():
        assert values[parameter] == pytest.approx(value, abs=1e3 * LARGEST_AFTER_NOISE)
    assert law.floor == pytest.approx(floor, abs=1e3 * LARGEST_AFTER_NOISE)
    assert law.r_squared > 1 - LARGEST_AFTER_NOISE
    assert law.leverage_N.sum() == pytest.approx(law.num_parameters, abs=1e-6)


def test_plain_law_is_the_straight_line_of_each_precision() -> None:
    table = Table.of(made(shared(0.5), noise=0.05))
    law = fit_law(FORMS["per-precision"], table)
    for index, line in enumerate(table.lines):
        cells = [c for c in table.cells if c.line == line]
        slope, at_zero = np.polyfit(np.log([c.bits for c in cells]), np.log([c.score for c in cells]), 1)
        predicted = law.design_at(index, np.log([3e6])) @ law.theta_P
        assert predicted[0] == pytest.approx(at_zero + slope * math.log(3e6), abs=1e-10)


def test_huber_fit_is_scipys_huber_fit() -> None:
    """All problems at once by reweighting, against one at a time by least_squares; some have outliers, some do not."""
    rng = np.random.default_rng(0)
    design = np.stack([np.ones(9), np.linspace(-1, 1, 9)], 1)
    y_RN = 1 + 2 * design[:, 1] + 0.05 * rng.standard_normal((6, 9))
    y_RN[2, 3] += 2
    y_RN[4, :2] -= 1
    found = huber_fit(design, y_RN)
    for theta, y_N in zip(found, y_RN, strict=True):
        residual = lambda z, y_N=y_N: design @ z - y_N  # noqa: E731
        oracle = least_squares(residual, np.zeros(2), loss="huber", f_scale=HUBER, xtol=1e-12, ftol=1e-14, gtol=1e-12)
        np.testing.assert_allclose(theta, oracle.x, atol=1e-4)  # both stop short of the optimum by about this
    assert np.abs(found[2] - [1, 2]).max() < 0.15 < np.abs(np.polyfit(design[:, 1], y_RN[2], 1)[::-1] - [1, 2]).max()


def test_floors_are_scipys_floors() -> None:
    """All resamples at once, against one at a time by least_squares within bounds; some end at a bound."""
    rng = np.random.default_rng(0)
    table = Table.of(made(shared(1.5)))
    law = fit_law(FORMS["shared exponent + floor"], table)
    y_RN = law.fitted_N + 0.15 * rng.standard_normal((12, len(law.fitted_N)))
    y_RN[3, 2] += 1.5  # an outlier
    lowest = math.exp(table.log_score_N.min())
    start_RP, share_R = np.tile(law.theta_P, (12, 1)), np.full(12, law.floor / lowest)
    cost_R, _, floor_R = fit_floors(law.design_NP, y_RN, start_RP, share_R, lowest)
    low, high = np.full(len(law.theta_P) + 1, -np.inf), np.full(len(law.theta_P) + 1, np.inf)
    low[-1], high[-1] = 0.0, MAX_FLOOR
    for cost, floor, y_N in zip(cost_R, floor_R, y_RN, strict=True):

        def residual(z, y_N=y_N):
            return log_score(law.design_NP @ z[:-1], float(z[-1]) * lowest) - y_N

        start = np.append(law.theta_P, law.floor / lowest)
        oracle = least_squares(
            residual, start, bounds=(low, high), loss="huber", f_scale=HUBER, xtol=1e-10, ftol=1e-10, max_nfev=400
        )
        assert cost <= 2 * oracle.cost * (1 + 1e-6)  # scipy halves the sum of losses
        assert cost >= 2 * oracle.cost * (1 - 1e-3)  # it may stop a little short of the optimum
        assert 0 <= floor <= MAX_FLOOR * lowest
    assert (floor_R < 1e-9).any() or (floor_R > 0.98 * lowest).any()


def test_held_out_error_is_of_models_never_seen() -> None:
    cells = made(shared(0), noise=0.05)
    errors = held_out_errors(FORMS["shared exponent"], Table.of(cells))
    by_hand = []
    for n in SIZES:
        rest = fit_law(FORMS["shared exponent"], Table.of([c for c in cells if c.parameters != n]))
        by_hand += [math.log(c.score) - predict_at(rest, c) for c in cells if c.parameters == n]
    np.testing.assert_allclose(errors, by_hand, atol=1e-12)


def test_bits_per_parameter_may_vary_within_a_line() -> None:
    """Overhead weighs more in small models: the joint law still meets its cells, and a budget between two sizes."""
    cells = [
        Measured(
            Line("var", m, p),
            str(n),
            n,
            n * b + 3e5,
            5 * (n / 4e5) ** -0.3 * ((b + 3e5 / n) / 19) ** -0.2,
            None,
            None,
            0,
            1,
        )
        for p, b, m in (("W16A16", 16, "rtn"), ("W4A16", 4, "rtn"), ("W2A16", 2, "rtn"))
        for n in SIZES
    ]
    law = fit_law(FORMS["joint"], Table.of(cells))
    assert np.abs(law.residual_N).max() < 1e-9
    middle = math.sqrt(cells[4].bits * cells[5].bits)
    between = math.exp((law.design_at(1, np.log([middle])) @ law.theta_P)[0])
    assert cells[5].score < between < cells[4].score


def test_a_law_with_too_few_cells_is_not_offered() -> None:
    two = Table.of(made(shared(0), sizes=SIZES[:2]))
    assert fit_law(FORMS["per-precision + floor"], two) is None
    assert fit_law(FORMS["per-precision"], two) is not None
    assert Table.of(made(shared(0), sizes=SIZES[:1])).cells == ()
    law, messages = fit_family("var", made(shared(0), sizes=SIZES[:1]), 100, np.random.default_rng(0))
    assert law is None
    assert any("no law" in message for message in messages)


def test_two_sizes_give_a_line_and_say_that_nothing_tells_its_scatter() -> None:
    law, messages = fit_family(
        "var", made(shared(0), sizes=SIZES[:2], precisions=("W4A16",)), 100, np.random.default_rng(0)
    )
    assert law.chosen.law.form.name == "per-precision"
    assert law.largest == []
    assert any("nothing tells its scatter" in message and "empty" in message for message in messages)
    assert any("too few sizes to hold one out" in message for message in messages)


def test_lines_with_missing_sizes_are_named() -> None:
    cells = [c for c in made(shared(0), noise=0.02) if not (c.line.precision == "W3A16" and c.parameters != SIZES[0])]
    cells = [c for c in cells if not (c.line.precision == "W8A16" and c.parameters == SIZES[-1])]
    law, messages = fit_family("var", cells, 100, np.random.default_rng(0))
    assert "var rtn W8: not measured for var-1100000" in messages
    assert any(message.startswith("var rtn W3: one size only") for message in messages)
    assert {line.precision for line in law.table.lines} == {"W16A16", "W8A16", "W4A16"}


def test_a_floor_that_the_data_do_not_tell_is_reported() -> None:
    table = Table.of(made(lambda n, b: 3 + 2 * (n < 2e5), precisions=("W4A16", "W8A16")))
    assert "at its bound" in fit_law(FORMS["shared exponent + floor"], table).note()
    falling = Table.of(made(lambda n, b: math.exp(-((math.log(n) - 10) ** 2) / 10)))  # ever steeper: no floor
    assert "F_inf is 0" in fit_law(FORMS["shared exponent + floor"], falling).note()


def test_constant_scores_have_no_exponent_and_no_variance_to_explain() -> None:
    law = fit_law(FORMS["per-precision"], Table.of(made(lambda n, b: 4.0, precisions=("W4A16",))))
    assert law.theta_P == pytest.approx([math.log(4), 0], abs=1e-12)
    assert law.r_squared == 0


@pytest.mark.parametrize(("noise", "log_sd"), [(0.04, 0.0), (0.04, 0.04)])
def test_intervals_cover_the_truth_as_often_as_they_say(noise, log_sd) -> None:
    """A 95 % interval from four sizes, at and beyond their range. Between 90 and 99.5 %: 60 studies of 4 lines, whose
    hits are not independent. An ordinary bootstrap of four points covers about 80 % here."""
    truth, hits = shared(0), []
    for seed in range(60):
        law = fit_law(FORMS["per-precision"], Table.of(made(truth, noise, seed, log_sd=log_sd)))
        resampled = resample(law, 200, np.random.default_rng(seed))
        for index, bits in enumerate(WEIGHT_BITS.values()):
            at = np.array([2.5e5, 2e6])
            _, drawn_RG = resampled.curve(index, np.log(at * bits))
            low_G, high_G = np.quantile(drawn_RG, [0.025, 0.975], axis=0)
            true_G = np.log(truth(at, bits))
            hits += list((low_G <= true_G) & (true_G <= high_G))
    assert 0.90 <= np.mean(hits) <= 0.995


def test_scatter_common_to_a_model_is_seen_as_common() -> None:
    shift = dict(zip(SIZES, (0.1, -0.08, -0.12, 0.1), strict=True))
    together = Table.of(made(lambda n, b: shared(0)(n, b) * math.exp(shift[n]), noise=0.01))
    apart = Table.of(made(shared(0), noise=0.1, seed=1))
    assert Scatter.of(fit_law(FORMS["per-precision"], together)).correlation > 0.9
    assert Scatter.of(fit_law(FORMS["per-precision"], apart)).correlation < 0.5


def test_evaluation_noise_alone_gives_its_own_width() -> None:
    """Two sizes: the line passes through both cells, and at each the interval is the evaluation's."""
    cells = made(shared(0), sizes=SIZES[:2], precisions=("W4A16",), log_sd=0.03)
    resampled = resample(fit_law(FORMS["per-precision"], Table.of(cells)), 4000, np.random.default_rng(0))
    spread = resampled.curve(0, np.log([c.bits for c in cells]))[1].std(0)
    np.testing.assert_allclose(spread, 0.03, rtol=0.05)  # standard error of a standard deviation of 4000: 1 %


def test_seeds_are_averaged_in_the_log_and_narrow_the_noise() -> None:
    def point(score, seed, low=None, high=None):
        return Point("m", "var", "W4A16", "rtn", score, 1e6, "fd", low, high, seed, {"model_bits": 4e6})

    one = measured_cells([point(4.0, 0, 3.8, 4.2)], "model_bits")[0]
    assert (one.score, one.low, one.high) == (4.0, 3.8, 4.2)
    two = measured_cells([point(4.0, 0, 3.8, 4.2), point(4.0, 1, 3.8, 4.2)], "model_bits")[0]
    assert two.log_sd == pytest.approx(one.log_sd / math.sqrt(2))
    apart = measured_cells([point(4.0, 0, 3.99, 4.01), point(9.0, 1, 8.99, 9.01)], "model_bits")[0]
    assert apart.score == pytest.approx(6.0)
    assert apart.log_sd == pytest.approx(abs(math.log(4 / 9)) / 2)  # the seeds disagree by more than their intervals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": 0.0}, "must be more than 0 for a power law"),
        ({"seed": 0}, "the same seed twice"),
        ({"bits": {"model_bits": 5e6}}, "different model_bits"),
        ({"bits": {"model_bits": 0.0}}, "must be more than 0"),
        ({"parameters": None}, "no number of parameters"),
        ({"bits": {}}, "no bits column"),
    ],
)
def test_points_that_no_law_can_take_are_named(change, message) -> None:
    settings = {"score": 4.0, "parameters": 1e6, "seed": 1, "bits": {"model_bits": 4e6}}
    first = Point("m", "var", "W4A16", "rtn", **(settings | {"seed": 0, "parameters": change.get("parameters", 1e6)}))
    with pytest.raises(ValueError, match=message):
        measured_cells([first, Point("m", "var", "W4A16", "rtn", **(settings | change))], "model_bits")
