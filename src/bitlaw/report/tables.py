"""The report's tables as HTML, readable without JavaScript. Cells carry the number they sort by in data-value."""

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bitlaw.report.results import Axis, Results, family_label, short_model
from bitlaw.scaling import Claim, FamilyLaw, Line, Segment, StudyFit
from bitlaw.scaling.records import Record


@dataclass(frozen=True)
class Column:
    """A table's column: numbers are set right and sort as numbers."""

    title: str
    is_text: bool = False


@dataclass(frozen=True)
class Entry:
    """One table cell: HTML, and the number it sorts by (None: by its text)."""

    markup: str
    value: float | None = None
    wrap: bool = False


def escape(text: str) -> str:
    """Text as HTML."""
    return html.escape(text)


def format_score(value: float) -> str:
    """Three significant digits without an exponent, at most six decimals."""
    return f"{value:.{_decimals(value)}f}"


def _decimals(value: float) -> int:
    if value == 0 or not math.isfinite(value):
        return 0
    return max(0, min(6, 2 - math.floor(math.log10(abs(value)))))


def _spread(value: float, half_width: float) -> str:
    """Half the width of an interval, to the decimals of its value, or to its own first digit if that is finer."""
    own_first = 0 if half_width <= 0 else -math.floor(math.log10(half_width))
    return f"{half_width:.{max(_decimals(value), min(6, own_first))}f}"


def format_amount(bits: float, unit: str) -> str:
    """Bits as kB, MB ... (10^3, 10^6 bytes), or as bit operations."""
    value = bits / 8 if unit == "bytes" else bits
    power = 0
    while value >= 999.5 and power < 5:
        value, power = value / 1000, power + 1
    prefix = ("", "k", "M", "G", "T", "P")[power]
    return f"{value:.3g} {prefix}B" if unit == "bytes" else f"{value:.3g}{prefix} bit²"


def cells_table(results: Results, fitted: StudyFit) -> str:
    """Every finished cell with its bits and scores; the Pareto front of `fitted` is marked."""
    several_seeds = len({record.cell.seed for record in results.done}) > 1
    columns = [Column("Model", True), Column("Precision", True), Column("Method", True)]
    columns += [Column("Seed")] if several_seeds else []
    columns += [Column(metric.label) for metric in results.metrics]
    columns += [Column("Parameters"), *(Column(axis.label) for axis in results.axes), Column("Seconds")]
    front = {(cell.model, cell.line) for cells in fitted.pareto.values() for cell in cells}
    rows = []
    for record in results.done:
        line = Line(record.family, record.cell.method, record.cell.precision)
        mark = '<span class="front" title="on the Pareto front"></span>' if (record.cell.model, line) in front else ""
        row = [
            Entry(mark + escape(short_model(record.cell.model))),
            _precision_entry(results, record),
            Entry(escape(record.cell.method)),
        ]
        row += [Entry(str(record.cell.seed), record.cell.seed)] if several_seeds else []
        row += [_score_entry(record, metric.key) for metric in results.metrics]
        row += [Entry(f"{record.parameters:,}", record.parameters)]
        row += [Entry(format_amount(record.bits[a.key], a.unit), record.bits[a.key]) for a in results.axes]
        row += [Entry(f"{record.seconds:.1f}", record.seconds)]
        rows.append(row)
    return table(columns, rows)


def failed_section(results: Results) -> str:
    """The cells that failed, with their errors; nothing if none did."""
    if not results.failed:
        return ""
    rows = [
        [
            Entry(escape(short_model(record.cell.model))),
            Entry(escape(record.cell.precision)),
            Entry(escape(record.cell.method)),
            Entry(str(record.cell.seed), record.cell.seed),
            Entry(escape(record.error or ""), wrap=True),
        ]
        for record in results.failed
    ]
    columns = [
        Column("Model", True),
        Column("Precision", True),
        Column("Method", True),
        Column("Seed"),
        Column("Error", True),
    ]
    return (
        '<section aria-labelledby="failed-title"><h2 id="failed-title">Cells that failed</h2>'
        '<p class="note">They are missing from everything above and below. Run the study again to try them again.</p>'
        f"{table(columns, rows)}</section>"
    )


def additivity_section(results: Results) -> str:
    """Whether distortions of single tensors add up, by range of bits; nothing where that was not checked."""
    if not results.additivity:
        return ""
    rows = [
        [
            Entry(escape(short_model(check.model))),
            Entry(f"{part.low}–{part.high}", part.low),
            Entry(str(len(part.measured)), len(part.measured)),
            Entry(f"{part.correlation:.3f}", part.correlation),
            Entry(f"{part.log_correlation:.3f}", part.log_correlation),
            Entry(f"{part.slope:.2f}", part.slope),
            Entry("yes" if part.holds else "no"),
        ]
        for check in results.additivity
        for part in check.ranges
    ]
    columns = [
        Column("Model", True),
        Column("Bits"),
        Column("Plans"),
        Column("Correlation"),
        Column("Of logarithms"),
        Column("Slope"),
        Column("Can be relied on", True),
    ]
    return (
        '<section aria-labelledby="additivity-title"><h2 id="additivity-title">Do distortions add up?</h2>'
        '<p class="muted">Mixed precision takes the distortion of a plan for the sum of those of its tensors, each '
        "quantized alone. Here are plans at random with these bits, measured: correlation with that sum, and the slope "
        f"of what was measured over it.</p>{table(columns, rows)}</section>"
    )


def protocol_section(results: Results) -> str:
    """What the scores were measured with; what differs between families is given for each."""
    protocols = [(record.family, record.protocol) for record in results.done if record.protocol]
    fields = list(dict.fromkeys(key for _, protocol in protocols for key in protocol))
    entries: dict[str, str] = {}
    for name in fields:
        by_family: dict[str, list[str]] = {}
        for family, protocol in protocols:
            values = by_family.setdefault(family, [])
            if (text := _plain(protocol.get(name))) not in values:
                values.append(text)
        entries[name] = _by_family(by_family)
    for name, value in results.study.get("protocol", {}).items():
        if isinstance(value, dict) and set(value) <= set(results.families):
            entries.setdefault(name, _by_family({family: [_plain(v)] for family, v in value.items()}))
        else:
            entries.setdefault(name, _plain(value))
    for name in ("protect", "num_validation"):
        entries[name] = ", ".join(sorted({str(getattr(record.cell, name)) for record in results.done}))
    versions = {name: str(version) for name, version in results.study.get("versions", {}).items()}
    return _definitions({_words(k): v for k, v in entries.items()}) + (
        f"<h3>Versions</h3>{_definitions(versions)}" if versions else ""
    )


def for_each_axis(results: Results, fits: dict[str, StudyFit], part: Callable[[Axis, StudyFit], str]) -> str:
    """A part of the page for every axis; the script shows the one that is chosen, without it all are there."""
    return "".join(
        f'<div data-axis="{axis.key}"><h3 class="axis-name">By {escape(axis.title)}</h3>'
        f"{part(axis, fits[axis.key])}</div>"
        for axis in results.axes
    )


def laws_part(results: Results, fitted: StudyFit) -> str:
    """The forms of law that were tried and the parameters of the one chosen."""
    tried = [
        [
            Entry(family_label(law.family)),
            Entry(f"<strong>{escape(c.law.form.name)}</strong> ✓" if c is law.chosen else escape(c.law.form.name)),
            Entry(str(c.law.num_parameters), c.law.num_parameters),
            Entry(f"{c.law.r_squared:.4f}", c.law.r_squared),
            Entry("–") if c.held_out is None else Entry(f"{100 * c.held_out:.1f} %", c.held_out),
            Entry(format_score(c.law.floor), c.law.floor) if c.law.form.floor else Entry("–"),
        ]
        for law in fitted.laws.values()
        for c in law.tried
    ]
    tried_columns = [Column("Family", True), Column("Law", True), Column("Numbers fitted"), Column("R²")]
    tried_columns += [Column("Error on sizes held out"), Column("Floor")]
    notes = "".join(f"<li>{escape(message)}</li>" for message in fitted.messages)
    references = "; ".join(_reference(law, results) for law in fitted.laws.values())
    return (
        table(tried_columns, tried)
        + "<h4>Parameters of the laws chosen, with 95 % intervals</h4>"
        + f'<p class="muted small">{references}</p>'
        + _parameter_table(results, fitted)
        + (f'<ul class="muted small">{notes}</ul>' if notes else "")
    )


def largest_part(results: Results, axis: Axis, fitted: StudyFit) -> str:
    """Cells of the largest model beside what the smaller ones predict."""
    parts = []
    for law in fitted.laws.values():
        if not law.largest:
            parts.append(f"<p>{family_label(law.family)}: too few sizes to tell.</p>")
            continue
        inside = sum(prediction.inside for prediction in law.largest)
        parts.append(
            f"<p>{family_label(law.family)}: {inside} of {len(law.largest)} cells of "
            f"{escape(short_model(law.largest[0].cell.model))} lie in the interval predicted from the smaller sizes "
            f"({escape(law.largest_form or '')}).</p>"
        )
    rows = [
        [
            Entry(escape(f"{short_model(p.cell.model)} {results.recipe_key(p.cell.line)}")),
            Entry(format_amount(p.cell.bits, axis.unit), p.cell.bits),
            Entry(f"{format_score(p.predicted)} {_span(p.low, p.high)}", p.predicted),
            Entry(format_score(p.cell.score), p.cell.score),
            Entry(f"{100 * (p.cell.score / p.predicted - 1):+.1f} %", p.cell.score / p.predicted - 1),
            Entry(_verdict(p.inside)),
        ]
        for law in fitted.laws.values()
        for p in law.largest
    ]
    columns = [Column("Cell", True), Column(axis.label), Column(f"{results.score.label} predicted")]
    columns += [Column("Measured"), Column("Difference"), Column("Inside", True)]
    return "".join(parts) + (table(columns, rows) if rows else "")


def claims_part(results: Results, axis: Axis, fitted: StudyFit) -> str:
    """Which line is best where, and which pairs of lines the data tell apart."""
    segments = [
        [
            Entry(family_label(family)),
            Entry(escape(results.recipe_key(segment.line))),
            *_range_entries(segment, axis),
            Entry(f"{_percent(segment.share_low)} to {_percent(segment.share_high)}", segment.share_low),
        ]
        for family, found in fitted.best_by_budget.items()
        for segment in found
    ]
    claims = [
        [
            Entry(family_label(claim.better.family)),
            Entry(escape(results.recipe_key(claim.better))),
            Entry(escape(results.recipe_key(claim.worse))),
            *_range_entries(claim, axis),
            Entry(_percent(claim.confidence), claim.confidence),
            Entry("measured" if claim.measured else '<span class="badge">extrapolates</span>'),
        ]
        for claim in sorted(fitted.claims, key=lambda c: (not c.measured, -c.confidence))
    ]
    where = [Column("From"), Column("To")]
    best_columns = [Column("Family", True), Column("Best", True), *where, Column("Share of resamples")]
    columns = [Column("Family", True), Column("Better", True), Column("Worse", True), *where]
    columns += [Column("Confidence"), Column("Budgets", True)]
    return (
        "<h4>Best by budget, among precisions measured on both sides of it</h4>"
        + table(best_columns, segments)
        + "<h4>Pairs that the data tell apart</h4>"
        + '<p class="muted small">Confidence is the least share of resamples that agree over the range, for each pair '
        "alone. Pairs that are not listed are not told apart.</p>" + table(columns, claims)
    )


def table(columns: Sequence[Column], rows: Iterable[Sequence[Entry]]) -> str:
    """A table whose column titles sort it."""
    head = "".join(
        f'<th scope="col"{_classes("text" if c.is_text else "")}><button type="button">{escape(c.title)}</button></th>'
        for c in columns
    )
    body = "".join(f"<tr>{''.join(map(_cell, columns, row, range(len(columns))))}</tr>" for row in rows)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Table"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(column: Column, entry: Entry, index: int) -> str:
    tag = 'th scope="row"' if index == 0 else "td"
    classes = _classes("text" if column.is_text else "", "wrap" if entry.wrap else "")
    if entry.value is not None:
        value = f' data-value="{entry.value:.10g}"'
    else:
        value = "" if column.is_text else ' data-value=""'
    return f"<{tag}{classes}{value}>{entry.markup}</{tag.split()[0]}>"


def _classes(*names: str) -> str:
    found = " ".join(name for name in names if name)
    return f' class="{found}"' if found else ""


def _score_entry(record: Record, key: str) -> Entry:
    score = record.metrics.get(key)
    if score is None:
        return Entry("–")
    text = format_score(score["value"])
    if "low" in score:
        text += f' <span class="pm">± {_spread(score["value"], (score["high"] - score["low"]) / 2)}</span>'
    return Entry(text, score["value"])


def _precision_entry(results: Results, record: Record) -> Entry:
    recipe = results.recipes[results.recipe_key(record)]
    style = f"color: light-dark({recipe.light}, {recipe.dark})"
    return Entry(f'<span style="{style}" aria-hidden="true">■</span> {escape(recipe.precision)}')


def _parameter_table(results: Results, fitted: StudyFit) -> str:
    """Parameters of the chosen laws: a row for each precision (or method), a column for each kind of parameter."""
    rows: dict[tuple[str, str], dict[str, tuple[float, float, float]]] = {}
    for law in fitted.laws.values():
        recipes = {line.label: results.recipe_key(line) for line in law.table.lines}
        for name, values in law.resampled.parameters().items():
            symbol, _, rest = name.partition("[")
            owner = recipes.get(rest.removesuffix("]"), rest.removesuffix("]")) or "all"
            rows.setdefault((law.family, owner), {})[symbol] = values
    symbols = list(dict.fromkeys(symbol for parameters in rows.values() for symbol in parameters))
    entries = [
        [
            Entry(family_label(family)),
            Entry(escape(owner)),
            *(_interval_entry(parameters.get(symbol)) for symbol in symbols),
        ]
        for (family, owner), parameters in rows.items()
    ]
    return table([Column("Family", True), Column("Of", True), *map(Column, symbols)], entries)


def _interval_entry(values: tuple[float, float, float] | None) -> Entry:
    return Entry("–") if values is None else Entry(f"{format_score(values[0])} {_span(*values[1:])}", values[0])


def _reference(law: FamilyLaw, results: Results) -> str:
    """What the parameters refer to: x0, n0 and b0 of the law."""
    basis = law.chosen.law.basis
    names = law.chosen.law.form.names(basis)
    if "C" in names:
        where = f"n0 = {math.exp(basis.log_n0):.3g} parameters, b0 = {math.exp(basis.log_b0):.3g} bits a parameter"
        equation = f"{results.score.label} = C (n / n0)^-alpha (b / b0)^-beta"
    else:
        where = f"x0 = {math.exp(basis.log_x0):.3g} bits"
        equation = f"{results.score.label} = A (x / x0)^-alpha"
    floor = " + F_inf" if law.chosen.law.form.floor else ""
    return f"{family_label(law.family)}: {equation}{floor}, {where}"


def _range_entries(found: Segment | Claim, axis: Axis) -> list[Entry]:
    return [Entry(format_amount(bits, axis.unit), bits) for bits in (found.low, found.high)]


def _span(low: float, high: float) -> str:
    return f'<span class="pm">({format_score(low)}–{format_score(high)})</span>'


def _percent(share: float) -> str:
    """A share of resamples; never 100 %, which resampling cannot show."""
    return "> 99 %" if share > 0.99 else f"{100 * share:.0f} %"


def _verdict(inside: bool) -> str:
    return '<span class="verdict-yes">✓ yes</span>' if inside else '<span class="verdict-no">✗ no</span>'


def _definitions(entries: dict[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in entries.items()) + "</dl>"


def _by_family(values: dict[str, list[str]]) -> str:
    joined = {family: ", ".join(found) for family, found in values.items()}
    if len(set(joined.values())) == 1:
        return next(iter(joined.values()))
    return "; ".join(f"{family_label(family)} {text}" for family, text in joined.items())


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return "–" if value is None else str(value)


def _words(name: str) -> str:
    return name.replace("num_", "number of ").replace("_", " ")
