"""One HTML file that works offline: the template filled with what `content.py` computed."""

import json
import re
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from bitlaw.files import write_text
from bitlaw.report import tables
from bitlaw.report.content import drawn_content, fit_axes
from bitlaw.report.results import Results, read_results
from bitlaw.report.tables import escape

TEMPLATE = files("bitlaw.report") / "template"


def write_report(study_dir: Path | str, out: Path | str | None = None, num_resamples: int = 500) -> Path:
    """Write the report of a study and return its path (default: report.html in the study's directory).

    The file needs no network: plotly.js is embedded once, pictures are data URIs. num_resamples: refits behind the
    intervals of the laws, as in `bitlaw.scaling.fit`. Raises ValueError if the directory holds no study, or no
    finished cell.
    """
    path = Path(out) if out is not None else Path(study_dir) / "report.html"
    write_text(path, render(read_results(study_dir), num_resamples))
    return path


def render(results: Results, num_resamples: int = 500) -> str:
    """The HTML of a study's results."""
    fits = fit_axes(results, num_resamples)
    parts = {
        "title": escape(str(results.study["name"])),
        "lead": escape(str(results.study.get("description", ""))),
        "facts": escape(_facts(results)),
        "score": escape(results.score.label),
        "score_name": escape(results.score.name),
        "first_axis": escape(results.axes[0].title),
        "failed": tables.failed_section(results),
        "cells": tables.cells_table(results, fits[results.axes[0].key]),
        "fits": tables.for_each_axis(results, fits, lambda _, fitted: tables.laws_part(results, fitted)),
        "largest": tables.for_each_axis(results, fits, partial(tables.largest_part, results)),
        "claims": tables.for_each_axis(results, fits, partial(tables.claims_part, results)),
        "additivity": tables.additivity_section(results),
        "protocol": tables.protocol_section(results),
        "style": _read("style.css"),
        "script": _read("report.js"),
        "plotly": get_plotlyjs(),
        "content": _embed_json(drawn_content(results, fits)),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _read("page.html"))


def _facts(results: Results) -> str:
    """The study's extent in a line."""
    counts = " or ".join(f"{count:,}" for count in sorted({record.cell.num_images for record in results.done}))
    cells = f"{len(results.done)} cells"
    if results.failed:
        cells += f", {len(results.failed)} failed"
    if results.num_missing:
        cells += f", {results.num_missing} not run yet"
    models = {record.cell.model for record in results.done}
    return f"{len(models)} models at {len(results.recipes)} precisions · {cells} · {counts} images each"


def _read(name: str) -> str:
    return (TEMPLATE / name).read_text(encoding="utf-8").strip()


def _embed_json(value: Any) -> str:
    """JSON that no text inside can end early: `</script>` and `<!--` cannot occur."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
