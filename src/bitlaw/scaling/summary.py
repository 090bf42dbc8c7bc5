"""Fits and recommendations as text for a terminal."""

from collections.abc import Sequence
from pathlib import Path

from bitlaw.scaling.budget import format_bits, parse_bits, round_budget
from bitlaw.scaling.cells import Measured
from bitlaw.scaling.claims import Best, Claim, LawChoice, best_at, choices_at
from bitlaw.scaling.family_law import FamilyLaw
from bitlaw.scaling.points import read_points
from bitlaw.scaling.published import PREFIX, published_source
from bitlaw.scaling.study_fit import StudyFit, fit

SHOWN_CLAIMS = 12


def fit_summary(
    source: Path | str, budget: float | str | None = None, axis: str = "model_bits", metric: str | None = None
) -> str:
    """What `bitlaw fit SOURCE` prints: laws, scores at a budget, the best by budget, the Pareto front, claims.

    source: a points CSV, a study directory or published:NAME. budget: "500MB" or bits; None takes a round one near the
    middle of what was measured.
    """
    fitted = fit(read_points(source), axis, metric)
    parts = [published_source(str(source))] if str(source).startswith(PREFIX) else []
    return "\n\n".join([*parts, describe_fit(fitted, None if budget is None else _bits(budget))])


def recommend_summary(
    source: Path | str, budget: float | str, axis: str = "model_bits", metric: str | None = None
) -> str:
    """What `bitlaw recommend SOURCE --budget 300MB` prints: the best over all families, then each family."""
    bits = _bits(budget)
    fitted = fit(read_points(source), axis, metric)
    parts = [describe_best(fitted.best_within(bits), fitted.metric)]
    if len(fitted.families) > 1:
        for family in fitted.families:
            parts.append(f"{family} only\n" + describe_best(fitted.best_within(bits, family), fitted.metric, rows=5))
    return "\n\n".join(parts)


def describe_fit(fitted: StudyFit, budget: float | None = None) -> str:
    """A study's fit as text; scores are compared at `budget` bits."""
    bits = [cell.bits for cell in fitted.cells]
    budget = budget or round_budget(min(bits), max(bits), fitted.axis)
    score = metric_label(fitted.metric)
    title = (
        f"{score} over {fitted.axis}: {len(fitted.cells)} cells, intervals 95 % from {fitted.num_resamples} resamples"
    )
    parts = [title]
    for family in fitted.families:
        if family in fitted.laws:
            parts += _family_parts(fitted.laws[family], fitted, budget, score)
        front = fitted.pareto[family]
        rows = [[format_bits(c.bits, fitted.axis), number(c.score), f"{c.model} {c.line.label}"] for c in front]
        parts.append(f"{family}: Pareto front of the measured cells\n" + text_table([fitted.axis, score, ""], rows))
    parts.append(describe_best(fitted.best_within(budget), fitted.metric, rows=0) + _plain_best(fitted, budget))
    if fitted.messages:
        parts.append("Notes\n" + "\n".join(f"  {message}" for message in fitted.messages))
    return "\n\n".join(parts)


def _plain_best(fitted: StudyFit, budget: float) -> str:
    """The best by the plain per-precision law, where another law was chosen: the two may differ."""
    if all(law.plain is law.resampled for law in fitted.laws.values()):
        return ""
    plain = best_at(fitted.cells, [law.plain for law in fitted.laws.values() if law.plain], fitted.axis, budget)
    return f"\n  by the plain log-log law: {_choice_text(plain.law, metric_label(fitted.metric))}" if plain.law else ""


def _family_parts(law: FamilyLaw, fitted: StudyFit, budget: float, score: str) -> list[str]:
    chosen, family, axis = law.chosen.law, law.family, fitted.axis
    tried = [
        [
            ("* " if candidate is law.chosen else "  ") + candidate.law.form.name,
            str(candidate.law.num_parameters),
            f"{candidate.law.r_squared:.3f}",
            "-" if candidate.held_out is None else f"{100 * candidate.held_out:.1f} %",
            number(candidate.law.floor) if candidate.law.form.floor else "-",
        ]
        for candidate in law.tried
    ]
    header = ["law", "parameters", "R^2", "held-out error", "F_inf"]
    parts = [f"{family}: laws tried (* least error on models held out)\n" + text_table(header, tried)]

    exponents = {n: v for n, v in law.resampled.parameters().items() if n.startswith(("alpha", "beta", "F_inf", "C"))}
    rows = [[name, *map(number, values)] for name, values in exponents.items()]
    parts.append(f"{family}: {chosen.form.name}\n" + text_table(["", "value", "low", "high"], rows))

    parts.append(_score_table(law, axis, budget, score))
    if len(law.table.lines) > 1:
        parts.append(_segments_text(law, fitted))
    if law.largest:
        parts.append(_largest_text(law, score))
    if claims := [c for c in fitted.claims if c.better.family == family]:
        parts.append(_claims_text(claims, law, axis, budget))
    return parts


def _segments_text(law: FamilyLaw, fitted: StudyFit) -> str:
    rows = [
        [
            f"{format_bits(s.low, fitted.axis)} - {format_bits(s.high, fitted.axis)}",
            s.line.label,
            f"{100 * s.share_low:.0f} - {100 * s.share_high:.0f} %",
        ]
        for s in fitted.best_by_budget[law.family]
    ]
    title = f"{law.family}: best within a budget, without extrapolating"
    return f"{title}\n{text_table(['budget', 'best', 'resamples'], rows)}"


def _score_table(law: FamilyLaw, axis: str, budget: float, score: str) -> str:
    """Scores at one budget from the chosen law, and from the plain per-precision one where it is another."""
    choices = choices_at([law.resampled], budget)
    plain = law.plain if law.plain is not law.resampled else None
    plainly = {c.line: c for c in choices_at([plain], budget)} if plain is not None else {}
    header = ["", score, "95 % interval", "best in", "parameters", ""]
    if plainly:
        header[1:3] = ["log-log", "95 % interval", law.chosen.law.form.name, "95 % interval"]
    rows = []
    for choice in choices:
        values = [number(choice.score), span(choice.low, choice.high)]
        if plainly:
            other = plainly[choice.line]
            values = [number(other.score), span(other.low, other.high), *values]
        share = f"{100 * choice.share_best:.0f} %"
        rows.append([choice.line.label, *values, share, size(choice.parameters), choice.where])
    note = "\nlog-log: a plain power law for each line, without a floor" if plainly else ""
    return f"{law.family}: {score} at {format_bits(budget, axis)}\n{text_table(header, rows)}{note}"


def _largest_text(law: FamilyLaw, score: str) -> str:
    inside = sum(prediction.inside for prediction in law.largest)
    rows = [
        [p.cell.line.label, number(p.predicted), span(p.low, p.high), number(p.cell.score), "yes" if p.inside else "NO"]
        for p in law.largest
    ]
    title = (
        f"{law.family}: {law.largest[0].cell.model} predicted from the smaller models ({law.largest_form}): "
        f"{inside} of {len(rows)} inside"
    )
    return title + "\n" + text_table(["", f"{score} predicted", "95 % interval", "measured", "inside"], rows)


def _claims_text(claims: Sequence[Claim], law: FamilyLaw, axis: str, budget: float) -> str:
    """Claims that involve the line which is best at the budget come first; the rest are counted."""
    choices = choices_at([law.resampled], budget)
    best = next((c for c in choices if not c.extrapolates), choices[0]).line
    ordered = sorted(claims, key=lambda c: (best not in (c.better, c.worse), not c.measured, -c.confidence))
    rows = [
        [
            f"{c.better.label} better than {c.worse.label}",
            f"{format_bits(c.low, axis)} - {format_bits(c.high, axis)}",
            f"{100 * c.confidence:.0f} %",
            "" if c.measured else "extrapolated: no common budgets",
        ]
        for c in ordered[:SHOWN_CLAIMS]
    ]
    more = len(ordered) - len(rows)
    text = f"{law.family}: claims at equal bits, with the budgets in which they hold\n"
    text += text_table(["claim", "budgets", "confidence", ""], rows)
    return text + (f"\n  and {more} more in the JSON" if more else "")


def describe_best(best: Best, metric: str, rows: int = 8) -> str:
    """The best at a budget as sentences, and the first lines compared as a table."""
    score, budget = metric_label(metric), format_bits(best.budget, best.axis)
    lines = [f"At {budget} ({best.axis}):"]
    if best.measured is None:
        lines.append("  measured: no cell is as small as that")
    else:
        lines.append(f"  measured: {_cell_text(best.measured, best.axis, score)}")
    if best.law is not None:
        lines.append(f"  by the law: {_choice_text(best.law, score)}")
    elif best.compared:
        lines.append("  by the law: no line was measured on both sides of this budget")
    if best.extrapolated is not None:
        lines.append(f"  if the law holds beyond what was measured: {_choice_text(best.extrapolated, score)}")
    if rows and best.compared:
        table = []
        for c in best.compared[:rows]:
            values = [number(c.score), span(c.low, c.high), f"{100 * c.share_best:.0f} %", size(c.parameters), c.where]
            table.append([c.line.family, c.line.label, *values])
        lines.append(text_table(["family", "", score, "95 % interval", "best in", "parameters", ""], table))
    return "\n".join(lines)


def _cell_text(cell: Measured, axis: str, score: str) -> str:
    known = f" {span(cell.low, cell.high)}" if cell.low is not None and cell.high is not None else ""
    return (
        f"{cell.model} {cell.line.label} is best, {score} {number(cell.score)}{known}, {format_bits(cell.bits, axis)}"
    )


def _choice_text(choice: LawChoice, score: str) -> str:
    value = f"{score} {number(choice.score)} {span(choice.low, choice.high)}"
    return (
        f"{choice.line.family} {choice.line.label} is best, {value}, "
        f"lowest in {100 * choice.share_best:.0f} % of resamples; {size(choice.parameters)} parameters, {choice.where}"
    )


def _bits(budget: float | str) -> float:
    return parse_bits(budget) if isinstance(budget, str) else budget


def metric_label(metric: str) -> str:
    """A metric as it is printed: FID, FD, loss."""
    return metric.upper() if metric in ("fd", "fid", "kid", "sfid", "sfd") else metric


def number(value: float) -> str:
    """Three significant digits: 2.50, 14.4, 0.0123."""
    return f"{value:#.3g}".rstrip(".")


def size(parameters: float) -> str:
    """A number of parameters: 310M, 1.33B."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if parameters >= 0.9995 * factor:
            return f"{parameters / factor:.3g}{unit}"
    return f"{parameters:.0f}"


def span(low: float, high: float) -> str:
    """An interval."""
    return f"[{number(low)}, {number(high)}]"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their width; the first is left-aligned, those that hold numbers right-aligned."""
    columns = list(zip(header, *rows, strict=True))
    padded = []
    for index, column in enumerate(columns):
        width = max(map(len, column))
        numeric = index > 0 and all(cell[:1].isdigit() or cell[:1] in "-[" for cell in column[1:])
        padded.append([cell.rjust(width) if numeric else cell.ljust(width) for cell in column])
    return "\n".join("  " + "  ".join(row).rstrip() for row in zip(*padded, strict=True))
