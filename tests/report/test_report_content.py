"""What the report and the terminal table say, without a browser."""

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from bitlaw.allocation.additivity import Additivity, RangeCheck
from bitlaw.allocation.curves import CurveSettings, TensorKey
from bitlaw.report import table, write_report
from bitlaw.report.content import _round_numbers
from bitlaw.report.recipes import recipes_of
from bitlaw.report.results import read_results
from bitlaw.report.tables import format_amount, format_score
from bitlaw.scaling import fit
from bitlaw.scaling.records import Cell


def content_of(report: Path) -> dict[str, Any]:
    """The JSON that the page's script draws."""
    found = re.search(
        r'<script type="application/json" id="content">(.*?)</script>', report.read_text(encoding="utf-8")
    )
    assert found is not None
    return json.loads(found[1])


def printed(renderable: RenderableType, width: int = 160, color: bool = False) -> str:
    console = Console(width=width, force_terminal=color, color_system="standard" if color else None)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_one_file_with_everything_inside(report: Path) -> None:
    html = report.read_text(encoding="utf-8")
    assert html.count("plotly.js v") == 1
    assert "{{" not in re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    assert re.search(r'<(script|link|img)[^>]+(src|href)="(?!data:|#)', html) is None


def test_measured_answers_are_the_best_that_fit(report: Path, study: Path) -> None:
    """Against a plain search over the records, at every budget of the slider on every axis."""
    content = content_of(report)
    records = read_results(study).done
    for axis, budgets in content["budgets"].items():
        for family in ("var", "dit"):
            for budget, answer in zip(budgets["values"], content["laws"][family][axis]["answers"], strict=True):
                fitting = [r for r in records if r.family == family and r.bits[axis] <= budget]
                if not fitting:
                    assert answer["cell"] is None
                    continue
                best = min(fitting, key=lambda record: record.metrics["fd"]["value"])
                cell = content["cells"][answer["cell"]]
                assert (f"ladder/{cell['model']}", cell["recipe"]) == (best.cell.model, best.cell.precision)


def test_law_answers_are_those_of_the_library(report: Path, study: Path) -> None:
    content = content_of(report)
    fitted = fit(read_results(study).points, "model_bits", "fd", num_resamples=40)
    index = content["budgets"]["model_bits"]["initial"]
    best = fitted.best_within(content["budgets"]["model_bits"]["values"][index], "dit")
    answer = content["laws"]["dit"]["model_bits"]["answers"][index]["law"]
    assert best.law is not None
    assert answer["recipe"] == best.law.line.precision
    assert answer["score"] == pytest.approx(best.law.score, rel=1e-3)
    assert answer["low"] == pytest.approx(best.law.low, rel=1e-3)


def test_only_extrapolated_answers_are_marked_so(report: Path) -> None:
    answers = content_of(report)["laws"]["var"]["model_bits"]["answers"]
    assert all(a["law"] is None or None not in (a["law"]["smaller"], a["law"]["larger"]) for a in answers)
    assert all(a["beyond"] is None or None in (a["beyond"]["smaller"], a["beyond"]["larger"]) for a in answers)
    assert answers[-1]["law"] is None and answers[-1]["beyond"]["larger"] is None


def test_errors_and_names_are_escaped(report: Path) -> None:
    html = report.read_text(encoding="utf-8")
    assert "NaN in &lt;weights&gt; &amp; more" in html and "NaN in <weights>" not in html
    assert "1 failed, 1 not run yet" in html


def test_text_in_a_study_cannot_end_the_script(make_study: Callable[..., Path]) -> None:
    path = make_study(sizes=("s",), precisions=("W16A16",))
    for file in (path / "cells").iterdir():
        record = json.loads(file.read_text())
        record["config"]["size"] = "</script><b>"
        file.write_text(json.dumps(record))
    study = json.loads((path / "study.json").read_text())
    (path / "study.json").write_text(json.dumps({**study, "description": "</script><b>"}))
    report = write_report(path, num_resamples=40)
    assert "</script><b>" not in report.read_text(encoding="utf-8")
    assert content_of(report)["cells"][0]["size"] == "</script><b>"


def test_protocol_gives_what_differs_between_families(report: Path) -> None:
    html = report.read_text(encoding="utf-8")
    assert "<dt>number of steps</dt><dd>VAR 5; DiT 20</dd>" in html
    assert "<dt>labels</dt><dd>cyclic</dd>" in html


def test_no_study_or_nothing_finished_is_an_error(tmp_path: Path, make_study: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"no study here"):
        write_report(tmp_path / "nowhere")
    stems = ("var-s--W16A16--none--s0", "dit-s--W16A16--none--s0")
    path = make_study(sizes=("s",), precisions=("W16A16",), failed=stems)
    with pytest.raises(ValueError, match="no cell of this study is finished"):
        write_report(path)
    with pytest.raises(ValueError, match="no cell of this study is finished"):
        table(path)
    assert not (path / "report.html").exists()


def test_terminal_table_has_scores_gaps_and_the_front_in_bold(study: Path) -> None:
    text = printed(table(study))
    assert "VAR" in text and "DiT" in text and "failed: 1" in text and "not run yet: 1" in text
    rows = [line for line in text.splitlines() if "W2A16" in line]  # one in each family; the largest of both is missing
    assert [row.count("±") for row in rows] == [3, 3]
    assert all("–" in row for row in rows)
    results = read_results(study)
    front = fit(results.points, "model_bits", "fd", num_resamples=40).pareto
    bold = re.findall(r"\x1b\[1m(\d+\.\d\d)", printed(table(study), color=True))
    assert sorted(bold) == sorted(f"{cell.score:.2f}" for cells in front.values() for cell in cells)


def test_terminal_table_averages_seeds(make_study: Callable[..., Path]) -> None:
    path = make_study(sizes=("s", "m"), precisions=("W16A16",), seeds=(0, 1, 2))
    scores = [r.metrics["fd"]["value"] for r in read_results(path).done if r.cell.model == "ladder/var-m"]
    mean = (scores[0] * scores[1] * scores[2]) ** (1 / 3)
    assert f"{mean:.2f} ±" in printed(table(path))


def test_recipes_order_colours_and_dashes() -> None:
    texts = ["W4A4", "W2A16", "W16A16", "We2m1A16", "W8A8", "W4A16"]
    recipes = recipes_of(Cell("m", text, "none" if text == "W16A16" else "rtn") for text in texts)
    assert list(recipes) == ["W16A16", "W4A16", "W2A16", "We2m1A16", "W8A8", "W4A4"]
    assert recipes["W4A16"].light == recipes["W4A4"].light == recipes["We2m1A16"].light
    assert len({r.light for r in recipes.values()}) == 4
    assert len({(r.light, r.dash, r.symbol) for r in recipes.values()}) == 6
    assert [r.dash for r in recipes.values()] == ["solid"] * 4 + ["dash", "dot"]


def test_methods_are_named_where_there_are_several() -> None:
    cells = [Cell("m", "W16A16", "none"), Cell("m", "W4A16", "rtn"), Cell("m", "W4A16", "gptq")]
    recipes = recipes_of(cells)
    assert list(recipes) == ["W16A16", "W4A16 gptq", "W4A16 rtn"]
    assert recipes["W4A16 gptq"].symbol != recipes["W4A16 rtn"].symbol


@pytest.mark.parametrize("low", [0.7, 3e4, 8.2e5])
def test_budgets_are_round_and_close(low: float) -> None:
    numbers = list(_round_numbers(low, 100 * low))
    steps = [b / a for a, b in pairwise(numbers)]
    assert numbers[0] <= low and numbers[-1] >= 100 * low
    assert min(steps) > 1.01 and max(steps) < 1.09
    assert all(len(f"{number:g}".replace(".", "").strip("0")) <= 3 or number >= 1e6 for number in numbers)
    assert any(number in (3, 3e5, 3e6, 3e7) for number in numbers)


def test_amounts_and_scores_in_words() -> None:
    assert format_amount(8e3 * 287.4, "bytes") == "287 kB"
    assert format_amount(8e3 * 999.7, "bytes") == "1 MB"
    assert format_amount(1.8e9, "bit²") == "1.8G bit²"
    assert [format_score(v) for v in (12.345, 0.04321, 1234.5, 0.0)] == ["12.3", "0.0432", "1234", "0"]


def test_checks_of_additivity_beside_a_study_are_in_its_report(make_study: Callable[..., Path]) -> None:
    study = make_study()
    assert "add up" not in write_report(study, num_resamples=40).read_text(encoding="utf-8")
    parts = (
        RangeCheck(6, 10, (7.0, 8.0, 9.0), (1.0, 2.0, 3.0), (1.1, 2.2, 3.3)),
        RangeCheck(1, 3, (1.0, 2.0, 3.0), (1.0, 2.0, 3.0), (3.0, 1.0, 2.0)),
    )
    check = Additivity(parts, (TensorKey("a", "weight"),), CurveSettings(), "exact", 0, "ladder/var-s", "0")
    (study / "additivity" / "var-s").mkdir(parents=True)
    check.save(study / "additivity" / "var-s" / "additivity.json")
    html = write_report(study, num_resamples=40).read_text(encoding="utf-8")
    assert "Do distortions add up?" in html
    rows = re.findall(r"<tr><th[^>]*>var-s</th>(.*?)</tr>", html.partition("Do distortions add up?")[2])
    texts = [re.sub(r"<[^>]+>", " ", row).split() for row in rows[:2]]
    assert texts == [["6–10", "3", "1.000", "1.000", "1.10", "yes"], ["1–3", "3", "-0.500", "-0.500", "0.79", "no"]]
