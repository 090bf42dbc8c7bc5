"""Everything the page's script needs, as JSON: it looks answers up and draws them, it fits and chooses nothing."""

import base64
import math
from collections.abc import Iterator
from typing import Any

from bitlaw.report.answers import draw_family
from bitlaw.report.results import Results, family_label, short_model
from bitlaw.scaling import StudyFit, fit
from bitlaw.scaling.cells import Line, Measured
from bitlaw.scaling.records import SAMPLE_TILES, Record

STEPS_PER_DECADE = 48
LARGEST_BUDGET = 3.0  # times the largest model


def fit_axes(results: Results, num_resamples: int) -> dict[str, StudyFit]:
    """The laws of the headline score on every axis."""
    return {
        axis.key: fit(results.points, axis.key, results.score.key, num_resamples=num_resamples) for axis in results.axes
    }


def drawn_content(results: Results, fits: dict[str, StudyFit]) -> dict[str, Any]:
    """The JSON of the page."""
    groups = list(results.groups())
    ids = {(group[0].cell.model, _line(group[0])): index for index, group in enumerate(groups)}
    budgets = {axis.key: _budgets([c.bits for c in fits[axis.key].cells], axis.unit) for axis in results.axes}
    measured = {(cell.model, cell.line): cell for cell in fits[results.axes[0].key].cells}
    return {
        "score": {"key": results.score.key, "label": results.score.label},
        "metrics": [{"key": metric.key, "label": metric.label} for metric in results.metrics],
        "axes": {a.key: {"label": a.label, "title": a.title, "unit": a.unit, "note": a.note} for a in results.axes},
        "budgets": budgets,
        "families": [{"key": family, "label": family_label(family)} for family in results.families],
        "recipes": {key: recipe.drawn() for key, recipe in results.recipes.items()},
        "cells": [_cell(results, group, measured[group[0].cell.model, _line(group[0])]) for group in groups],
        "laws": {
            family: {
                axis: draw_family(results, fitted, family, budgets[axis]["values"], ids)
                for axis, fitted in fits.items()
            }
            for family in results.families
        },
        "samples": _sample_shape(results),
    }


def _line(record: Record) -> Line:
    return Line(record.family, record.cell.method, record.cell.precision)


def _cell(results: Results, group: list[Record], measured: Measured) -> dict[str, Any]:
    """A measured cell; over several seeds the headline score is the law's average and the others are means."""
    first = group[0]
    metrics: dict[str, dict[str, float]] = dict(first.metrics)
    if len(group) > 1:
        metrics = {
            key: {"value": sum(record.metrics[key]["value"] for record in group) / len(group)}
            for key in first.metrics
            if all(key in record.metrics for record in group)
        }
        metrics[results.score.key] = {"value": measured.score}
        if measured.low is not None and measured.high is not None:
            metrics[results.score.key] |= {"low": measured.low, "high": measured.high}
    picture = results.directory.samples(first.cell)
    encoded = base64.b64encode(picture.read_bytes()).decode() if picture.exists() else None
    return {
        "model": short_model(first.cell.model),
        "family": first.family,
        "size": first.size,
        "recipe": results.recipe_key(first),
        "method": first.cell.method,
        "seeds": [record.cell.seed for record in group],
        "parameters": first.parameters,
        "metrics": metrics,
        "bits": {axis.key: first.bits[axis.key] for axis in results.axes},
        "seconds": sum(record.seconds for record in group),
        "picture": encoded and f"data:image/png;base64,{encoded}",
    }


def _sample_shape(results: Results) -> dict[str, int]:
    """Tiles of a sample picture, and the side of one in pixels, read from the first picture there is."""
    columns, rows = SAMPLE_TILES
    side = 24
    for path in (results.directory.samples(record.cell) for record in results.done):
        if path.exists():
            with path.open("rb") as file:
                header = file.read(24)  # PNG: signature, length, "IHDR", width, height
            side = int.from_bytes(header[16:20], "big") // columns
            break
    return {"columns": columns, "rows": rows, "side": side}


def _budgets(bits: list[float], unit: str) -> dict[str, Any]:
    """The slider's budgets in bits, 5 % apart and round in `unit`, from below the smallest model to beyond the largest.

    initial: the index of the middle of what was measured
    """
    per_unit = 8 if unit == "bytes" else 1
    values = [per_unit * n for n in _round_numbers(min(bits) / per_unit / 1.2, LARGEST_BUDGET * max(bits) / per_unit)]
    middle = math.log(min(bits) * max(bits)) / 2
    return {"values": values, "initial": min(range(len(values)), key=lambda i: abs(math.log(values[i]) - middle))}


def _round_numbers(low: float, high: float) -> Iterator[float]:
    """Numbers with steps of about 5 %, written with two or three digits: 1, 1.05, 1.1, 1.15, 1.2, 1.25, 1.35 ..."""
    first = math.floor(STEPS_PER_DECADE * math.log10(low))
    for index in range(first, math.ceil(STEPS_PER_DECADE * math.log10(high)) + 1):
        power, part = divmod(index, STEPS_PER_DECADE)
        mantissa = 10 ** (part / STEPS_PER_DECADE)
        step = 0.05 if mantissa < 3 else 0.1
        yield float(f"{round(mantissa / step) * step:.2f}e{power}")
