"""The study's scores as a table for the terminal."""

from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from bitlaw.report.results import Results, family_label, read_results, short_model
from bitlaw.scaling import Measured, pareto_front
from bitlaw.scaling.cells import measured_cells


def table(study_dir: Path | str) -> Group:
    """For each family a table of precisions by models: the score and half the width of its interval.

    Bold: on the Pareto front of size as stored, where no other cell of the family is as small and as good. Seeds are
    averaged as for the laws. Raises ValueError if there is no study or no finished cell.
    """
    results = read_results(study_dir)
    axis = results.axes[0]
    cells = measured_cells(results.points, axis.key)
    tables = [
        _family_table(results, family, [c for c in cells if c.line.family == family]) for family in results.families
    ]
    notes = [f"{results.score.label} ± half of its 95 % interval; bold: on the Pareto front of {axis.title}"]
    if results.failed:
        notes.append(f"failed: {len(results.failed)}")
    if results.num_missing:
        notes.append(f"not run yet: {results.num_missing}")
    return Group(*tables, Text(" · ".join(notes), style="dim"))


def _family_table(results: Results, family: str, cells: list[Measured]) -> Table:
    front = pareto_front(cells)
    found = {(cell.model, results.recipe_key(cell.line)): cell for cell in cells}
    # Sizes are few and precisions many: precisions as rows fit a terminal of 80 columns.
    models = list(dict.fromkeys(cell.model for cell in cells))
    shown = Table(title=family_label(family), title_justify="left", title_style="bold")
    shown.add_column("precision", no_wrap=True)
    for model in models:
        shown.add_column(short_model(model), justify="right", no_wrap=True)
    for recipe in results.recipes:
        entries = [found.get((model, recipe)) for model in models]
        if any(entries):
            shown.add_row(recipe, *(Text("–") if e is None else _score(e, e in front) for e in entries))
    return shown


def _score(cell: Measured, on_front: bool) -> Text:
    text = Text()
    text.append(f"{cell.score:.2f}", style="bold" if on_front else "")
    if cell.low is not None and cell.high is not None:
        text.append(f" ±{(cell.high - cell.low) / 2:.2f}", style="dim")
    return text
