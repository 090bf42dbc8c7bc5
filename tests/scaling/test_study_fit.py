import json
import math
from itertools import pairwise

import pytest

from bitlaw.scaling import Point, StudyFit, fit, fit_summary, pareto_front, read_points, recommend, recommend_summary
from bitlaw.scaling.study_fit import FORMS

PUBLISHED_AT_500_MB = {
    "FP16": "3.41",
    "GPTQ W8": "2.84",
    "GPTQ W4": "2.79",
    "GPTQ W3": "14.4",
    "forward-KL W4": "2.68",
    "TopKLD W4": "2.58",
    "TopKLD W3": "2.50",
}


def study(family="var", noise=0.0, methods=("rtn",)) -> list[Point]:
    """Four sizes at three precisions: W4 is better than W16 per bit, W2 has twice the score; seeded wiggles."""
    points = []
    for method in methods:
        for precision, b, factor in (("W16A16", 16, 1.0), ("W4A16", 4, 1.1), ("W2A16", 2, 2.5)):
            if b == 16 and method != methods[0]:
                continue
            for k, n in enumerate((1e5, 2e5, 4e5, 8e5)):
                score = 6 * factor * (n / 2e5) ** -0.3 * math.exp(noise * math.sin(7 * k + 3 * b + len(method)))
                bits = {"model_bits": n * b, "compute_bits": n * b * 16}
                name = "none" if b == 16 else method
                points.append(Point(f"{family}-{k}", family, precision, name, score, n, "fd", bits=bits))
    return points


@pytest.fixture(scope="module")
def small() -> StudyFit:
    return fit(study(noise=0.01) + study("dit", noise=0.01), num_resamples=100)


def test_published_known_answer_is_printed() -> None:
    text = fit_summary("published:var-weight-only")
    table = text[text.index("var: FID at 500 MB") :].split("\n\n")[0]
    header, *rows = [line for line in table.splitlines()[1:] if line.startswith("  ")]
    assert header.split()[0] == "log-log"
    printed = {row[2:].rsplit("[", 2)[0].rsplit(None, 1)[0].strip(): row.split("[")[0].split()[-1] for row in rows}
    assert len(printed) == 19
    assert {label: printed[label] for label in PUBLISHED_AT_500_MB} == PUBLISHED_AT_500_MB
    conclusion = text[text.index("At 500 MB") :]
    assert "by the plain log-log law: var TopKLD W3 is best, FID 2.50" in conclusion
    assert "by the law: var TopKLD W3 is best" in conclusion
    assert "TopKLD W3 better than GPTQ W3" in text


def test_plain_law_of_the_paper_says_that_topkld_w3_is_best() -> None:
    best = fit(read_points("published:var-weight-only"), law="per-precision").best(model_bits=500 * 8e6)
    assert best.law.line.label == "TopKLD W3"
    assert f"{best.law.score:.2f}" == "2.50"
    assert best.law.low < 2.50 < best.law.high
    assert (best.law.smaller, best.law.larger) == ("var-d24", "var-d30")
    assert best.law.parameters == pytest.approx(500 * 8e6 / 3)
    assert best.measured.line.label == "TopKLD W4"  # d24 fills the 500 MB exactly
    assert best.measured.model == "var-d24"
    full = next(choice for choice in best.compared if choice.line.label == "FP16")
    assert full.extrapolates
    assert full.larger == "var-d16"


def test_shares_of_the_compared_lines_add_up(small: StudyFit) -> None:
    best = small.best(model_bits=2e6)
    assert sum(choice.share_best for choice in best.compared) == pytest.approx(1)
    assert len(best.compared) == 6
    assert [c.score for c in best.compared] == sorted(c.score for c in best.compared)


def test_at_equal_bits_w4_beats_w16_and_w2_by_construction(small: StudyFit) -> None:
    claims = {(c.better.label, c.worse.label): c for c in small.claims if c.better.family == "var"}
    w4_w16 = claims["rtn W4", "FP16"]
    assert (w4_w16.low, w4_w16.high) == pytest.approx((1.6e6, 3.2e6))  # where both were measured
    assert w4_w16.measured
    assert w4_w16.confidence >= 0.95
    assert ("rtn W4", "rtn W2") in claims
    assert ("rtn W2", "rtn W4") not in claims
    gap = claims["FP16", "rtn W2"]  # W2 ends where FP16 begins
    assert gap.low == pytest.approx(1.6e6)


def test_lines_without_common_budgets_are_compared_across_the_gap() -> None:
    points = [p for p in study(noise=0.01) if p.precision != "W4A16"]
    points = [p for p in points if not (p.precision == "W2A16" and p.model == "var-3")]
    claim = next(c for c in fit(points, num_resamples=100).claims if c.better.label == "FP16")
    assert not claim.measured
    assert (claim.low, claim.high) == pytest.approx((8e5, 1.6e6))


def test_crossing_lines_give_two_claims() -> None:
    points = [
        Point(f"m{k}", "var", p, m, s, n, "fd", bits={"model_bits": n})
        for m, p, slope in (("a", "W4A16", -0.2), ("b", "W3A16", -0.6))
        for k, n in enumerate((1e5, 2e5, 4e5, 8e5))
        for s in [5 * (n / 2.8e5) ** slope * (1 + 0.001 * (-1) ** k)]
    ]
    claims = fit(points, law="per-precision", num_resamples=100).claims
    assert {(c.better.method, c.worse.method) for c in claims} == {("a", "b"), ("b", "a")}
    small, large = sorted(claims, key=lambda c: c.low)
    assert small.better.method == "a"
    assert small.high < 2.8e5 < large.low


def test_best_by_budget_covers_the_range_without_gaps(small: StudyFit) -> None:
    segments = small.best_by_budget["var"]
    assert segments[0].low == pytest.approx(2e5)
    assert segments[-1].high == pytest.approx(1.28e7)
    assert all(a.high == pytest.approx(b.low) for a, b in pairwise(segments))
    assert [s.line.label for s in segments] == ["rtn W2", "rtn W4", "FP16"]


def test_pareto_front_is_what_no_cell_beats(small: StudyFit) -> None:
    cells = [c for c in small.cells if c.line.family == "var"]

    def beaten(cell):
        return any(
            o.bits <= cell.bits and o.score <= cell.score and (o.bits, o.score) != (cell.bits, cell.score)
            for o in cells
        )

    assert pareto_front(cells) == sorted((c for c in cells if not beaten(c)), key=lambda c: c.bits)
    assert small.pareto["var"] == pareto_front(cells)
    assert 1 < len(pareto_front(cells)) < len(cells)


def test_budgets_outside_what_was_measured(small: StudyFit) -> None:
    tiny = small.best(model_bits=1e5)
    assert tiny.measured is None
    assert tiny.extrapolates
    assert tiny.extrapolated.extrapolates
    huge = small.best(model_bits=1e9)
    assert huge.measured.line.label == "FP16"
    assert huge.law is None
    assert huge.extrapolated.where.startswith("extrapolated: above")


def test_the_axis_of_a_budget_is_checked(small: StudyFit) -> None:
    with pytest.raises(ValueError, match="over model_bits, not compute_bits"):
        small.best(compute_bits=1e9)
    with pytest.raises(ValueError, match="did you mean dit"):
        small.best("ditt", model_bits=1e6)
    with pytest.raises(ValueError, match="more than 0"):
        small.best(model_bits=-1)
    compute = fit(study(noise=0.01), axis="compute_bits", num_resamples=100).best(compute_bits=32e6)
    assert compute.law.score == pytest.approx(small.best("var", model_bits=2e6).law.score, rel=0.01)


def test_the_largest_model_is_predicted_from_the_smaller_ones(small: StudyFit) -> None:
    """True laws: the intervals hold most of the cells of a model that no fit has seen. A broken one: they do not."""
    law = small.laws["var"]
    assert {p.cell.model for p in law.largest} == {"var-3"}
    assert sum(p.inside for p in law.largest) >= 2
    broken = [p if p.model != "var-3" else Point(**{**vars(p), "score": p.score * 2}) for p in study(noise=0.01)]
    assert not any(p.inside for p in fit(broken, num_resamples=100).laws["var"].largest)


def test_same_seed_same_intervals() -> None:
    first, again = (fit(study(noise=0.01), num_resamples=60, seed=4).to_json() for _ in range(2))
    assert first == again


def test_json_holds_everything_and_is_valid(small: StudyFit) -> None:
    content = json.loads(json.dumps(small.to_json(), allow_nan=False))
    assert content["laws"].keys() == {"var", "dit"}
    assert len(content["cells"]) == 24
    assert {t["law"] for t in content["laws"]["var"]["tried"]} == set(FORMS)
    best = json.loads(json.dumps(small.best(model_bits=2e6).to_json(), allow_nan=False))
    assert best["law"]["label"] == "rtn W4"


def test_text_of_a_study_names_families_laws_and_notes() -> None:
    text = str(fit(study(noise=0.01)[:-1], num_resamples=100))
    assert "var: laws tried" in text
    assert "var rtn W2: not measured for var-3" in text
    assert "Pareto front" in text


def test_recommendations(tmp_path) -> None:
    best = recommend(study(noise=0.01), "250kB")
    assert best.law.line.label == "rtn W4"
    assert best.budget == 2e6
    text = recommend_summary("published:full-precision", "3GB", metric="fid")
    assert "At 3 GB (model_bits):" in text
    assert "mar only" in text
    assert "extrapolated: above mar-943M" in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"law": "shared"}, "did you mean shared exponent"),
        ({"axis": "model_bit"}, "did you mean model_bits"),
        ({"metric": "fid"}, "unknown metric 'fid'"),
        ({"num_resamples": 5}, "too few"),
    ],
)
def test_unknown_settings_are_errors(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        fit(study(), **settings)


def test_metrics_that_laws_cannot_take_are_errors() -> None:
    with pytest.raises(ValueError, match="no points"):
        fit([])
    inception = [Point("m", "var", "W4A16", "rtn", 11.0, 1e5, "is", bits={"model_bits": 4e5})]
    with pytest.raises(ValueError, match="'is' rises as models get better"):
        fit(inception)
    with pytest.raises(ValueError, match="has no bits column"):
        fit(read_points("published:litevar"), metric="fid")
    both = [Point("m", "var", "W4A16", "rtn", 1.0, 1e5, metric, bits={"model_bits": 4e5}) for metric in ("loss", "kid")]
    with pytest.raises(ValueError, match="choose one: loss, kid"):
        fit(both)


def test_scores_of_a_curve_are_those_of_the_best(small: StudyFit) -> None:
    choice = small.best("var", model_bits=2e6).law
    score, low, high = small.curve("var", "rtn W4", [2e6])[0]
    assert (score, low, high) == pytest.approx((choice.score, choice.low, choice.high))
