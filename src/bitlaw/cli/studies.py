"""Studies, and what follows from them: laws, recommendations, the report."""

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitlaw.cli.app import app, error_console, escape, minutes, out_console, progress
from bitlaw.cli.options import Out

if TYPE_CHECKING:
    from bitlaw.scaling.sweep import Progress as StudyProgress
    from bitlaw.scaling.sweep import Study


@app.command(epilog="Example: `bitlaw study --out study` · `bitlaw study experiments/formats.py --out formats`")
def study(
    file: Annotated[Path | None, typer.Argument(help="A Python file that defines `study = Study(...)`.")] = None,
    out: Out = Path("study"),
    workers: Annotated[int | None, typer.Option(help="Processes; default: one a core.")] = None,
    report_file: Annotated[bool, typer.Option("--report/--no-report", help="Write report.html at the end.")] = True,
) -> None:
    """Run a study (default: the built-in ladder), resume it, print the table, write the report."""
    from bitlaw.engine import LocalEngine
    from bitlaw.report import table, write_report
    from bitlaw.scaling.points import read_points, write_points
    from bitlaw.scaling.sweep import LADDER_STUDY, estimate, missing_cells, open_study, run_study

    chosen = LADDER_STUDY if file is None else _read_study(file)
    directory = open_study(chosen, out)
    cells = missing_cells(chosen, directory)
    engine = LocalEngine(workers)
    total = len(chosen.cells())
    if cells:
        chosen.check()
        expected = estimate(cells)
        out_console.print(
            f"study '{chosen.name}': {total} cells, {total - len(cells)} done already, {len(cells)} to run; about "
            f"{minutes(expected.wall_seconds(cells, engine.workers))} on {engine.workers} processes "
            f"of {expected.process_bytes / 1e9:.1f} GB each"
        )
        try:
            failed = _run_cells(run_study(chosen, directory, expected, engine), len(cells))
        except KeyboardInterrupt:
            error_console.print("interrupted; finished cells are kept, the same command goes on with the others")
            raise typer.Exit(130) from None
        if failed:
            error_console.print(f"{failed} cells failed; the same command tries them again")
    else:
        out_console.print(f"study '{chosen.name}': all {total} cells are done")
    write_points(out / "points.csv", read_points(out))
    out_console.print(table(out))
    if report_file and (cells or not (out / "report.html").exists()):
        write_report(out)
    if report_file:
        out_console.print(f"report: {out / 'report.html'}")


def _run_cells(steps: "Iterator[StudyProgress]", total: int) -> int:
    """Show the progress of a study to its end; the number of cells that failed."""
    failed = 0
    with progress("cells", total) as advance:
        for step in steps:
            name = f"{step.record.cell.model} {step.record.cell.precision}"
            if step.record.error is not None:
                failed += 1
                error_console.print(f"[red]{name} failed:[/red] {escape(step.record.error)}")
                advance(1, name)
            else:
                left = minutes(step.left_wall_seconds)
                advance(1, f"{name}: FD {step.record.metrics['fd']['value']:.2f}, {left} left")
    return failed


def _read_study(file: Path) -> "Study":
    from bitlaw.scaling.sweep import Study

    if not file.exists():
        raise ValueError(f"{file}: no such file")
    found = runpy.run_path(str(file)).get("study")
    if not isinstance(found, Study):
        raise ValueError(f"{file}: must define `study = Study(...)`, found {type(found).__name__}")
    return found


@app.command(epilog="Example: `bitlaw fit published:var-weight-only` · `bitlaw fit study`")
def fit(
    source: Annotated[str, typer.Argument(help="A points CSV, a study directory, or published:NAME.")],
    budget: Annotated[str | None, typer.Option(help="Where to compare precisions: 500MB, 300kB, 2e9bits.")] = None,
    axis: Annotated[str, typer.Option(help="Budget axis: a bits column of the points.")] = "model_bits",
) -> None:
    """Laws, Pareto front, claims with intervals."""
    from bitlaw.scaling import fit_summary

    out_console.print(fit_summary(source, budget=budget, axis=axis), markup=False, highlight=False)


@app.command(epilog="Example: `bitlaw recommend study --budget 300kB`")
def recommend(
    source: Annotated[str, typer.Argument(help="A study directory, points CSV, or published:NAME.")],
    budget: Annotated[str, typer.Option(help="300MB, 200kB, 2e9bits.")],
    axis: Annotated[str, typer.Option(help="Budget axis: a bits column of the points.")] = "model_bits",
) -> None:
    """Best model and precision at a budget, with interval; says when it extrapolates."""
    from bitlaw.scaling import recommend_summary

    out_console.print(recommend_summary(source, budget=budget, axis=axis), markup=False, highlight=False)


@app.command(epilog="Example: `bitlaw report study --out report.html`")
def report(
    directory: Annotated[Path, typer.Argument(help="A study directory.")],
    out: Annotated[Path | None, typer.Option(help="Default: report.html in the directory.")] = None,
) -> None:
    """One self-contained HTML file."""
    from bitlaw.report import write_report

    out_console.print(f"report: {write_report(directory, out)}")
