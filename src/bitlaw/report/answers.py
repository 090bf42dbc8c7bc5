"""One family on one budget axis, ready to draw: curves, Pareto front, and the answer at every budget of the slider.

G budgets or places on a curve
"""

from typing import Any

import numpy as np

from bitlaw.report.results import Results
from bitlaw.scaling import Best, LawChoice, Measured, StudyFit

CURVE_POINTS = 40
REACH = 1.5  # curves go on this far beyond the cells they are fitted to
MAX_TIES = 3


def draw_family(results: Results, fitted: StudyFit, family: str, budgets: list[float], cell_ids: dict[Any, int]) -> Any:
    """What the page's script draws of a family.

    cell_ids: (model, line) -> index in the page's list of cells
    """
    cells = [cell for cell in fitted.cells if cell.line.family == family]
    smallest = min(cells, key=lambda cell: cell.bits)
    answers = []
    for budget in budgets:
        best = fitted.best_within(budget, family)
        answers.append(
            {
                "cell": best.measured and cell_ids[best.measured.model, best.measured.line],
                "ties": [cell_ids[cell.model, cell.line] for cell in _ties(best, cells)],
                "law": best.law and _choice(results, best.law),
                "beyond": best.extrapolated and _choice(results, best.extrapolated),
            }
        )
    curves = _curves(results, fitted, family)
    return {
        "smallest": cell_ids[smallest.model, smallest.line],
        "front": [cell_ids[cell.model, cell.line] for cell in fitted.pareto[family]],
        "curves": curves,
        "answers": answers,
        "view": _view(cells),
    }


def _ties(best: Best, cells: list[Measured]) -> list[Measured]:
    """Other cells within the budget whose intervals overlap that of the best, the lowest score first."""
    chosen = best.measured
    if chosen is None or chosen.high is None:
        return []
    overlapping = [
        cell
        for cell in cells
        if cell is not chosen and cell.bits <= best.budget and cell.low is not None and cell.low <= chosen.high
    ]
    return sorted(overlapping, key=lambda cell: cell.score)[:MAX_TIES]


def _choice(results: Results, choice: LawChoice) -> dict[str, Any]:
    return {
        "recipe": results.recipe_key(choice.line),
        "score": _short(choice.score),
        "low": _short(choice.low),
        "high": _short(choice.high),
        "parameters": _short(choice.parameters),
        "smaller": choice.smaller and choice.smaller.rsplit("/", 1)[-1],
        "larger": choice.larger and choice.larger.rsplit("/", 1)[-1],
        "share": round(choice.share_best, 3),
    }


def _curves(results: Results, fitted: StudyFit, family: str) -> dict[str, dict[str, list[float]]]:
    """For each line with a law: the law and its band, a little beyond its cells on both sides."""
    curves: dict[str, dict[str, list[float]]] = {}
    if family not in fitted.laws:
        return curves
    table = fitted.laws[family].table
    for line in table.lines:
        bits = [cell.bits for cell in table.cells if cell.line == line]
        x_G = np.geomspace(min(bits) / REACH, max(bits) * REACH, CURVE_POINTS).tolist()
        values = fitted.curve(family, line.label, x_G)
        score, low, high = ([_short(v) for v in column] for column in zip(*values, strict=True))
        curves[results.recipe_key(line)] = {"x": [_short(x) for x in x_G], "y": score, "low": low, "high": high}
    return curves


def _view(cells: list[Measured]) -> dict[str, list[float]]:
    """Ranges of the plot: all cells and their intervals, with a margin."""
    bits = [cell.bits for cell in cells]
    low = min(cell.low or cell.score for cell in cells)
    high = max(cell.high or cell.score for cell in cells)
    return {"x": [min(bits) / 1.5, max(bits) * 1.5], "y": [low / 1.08, high * 1.08]}


def _short(value: float) -> float:
    """Four significant digits: enough to draw and to print."""
    return float(f"{value:.4g}")
