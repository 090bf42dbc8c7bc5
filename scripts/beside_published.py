"""A study's VARs beside a published table of Ding et al., as one picture: what a method costs at equal size.

    python scripts/beside_published.py study published:var-weight-only docs/images/ptq-beside-published.png

Both axes are relative to the largest model in full precision, as the scores are of other images and other networks.
"""

import argparse
from pathlib import Path

from plotly.subplots import make_subplots

from bitlaw.figures import write_figure
from bitlaw.precision import Precision
from bitlaw.report.recipes import LIGHT, METHOD_SYMBOLS
from bitlaw.scaling import read_points
from bitlaw.scaling.points import Point

METRICS = ("fid", "fd")
WEIGHT_BITS = (16, 8, 4, 3, 2)


def lines_of(source: str, family: str, precisions: set[str], methods: set[str]) -> dict[tuple[str, str], list[Point]]:
    """Points of each precision and method, by size. Names of methods are small, and without settings."""
    lines: dict[tuple[str, str], list[Point]] = {}
    for point in read_points(source):
        name = point.method.lower()
        name = (
            name.removeprefix("distill:").partition(",")[0] if name.startswith("distill:") else name.partition(":")[0]
        )
        is_drawn = point.family == family and point.metric in METRICS and (not methods or name in {"none", *methods})
        if is_drawn and (not precisions or point.precision in {"W16A16", *precisions}):
            lines.setdefault((point.precision, name), []).append(point)
    return {key: sorted(points, key=lambda p: p.parameters or 0) for key, points in lines.items()}


def main() -> None:
    """Draw by headless Chromium."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("study")
    parser.add_argument("published")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--precisions", default="", help="with commas; default: all that both have")
    parser.add_argument("--methods", default="", help="with commas; default: all")
    options = parser.parse_args()
    chosen, named_methods = (set(filter(None, text.split(","))) for text in (options.precisions, options.methods))
    panels = [lines_of(source, "var", chosen, named_methods) for source in (options.study, options.published)]
    both = {precision for precision, _ in panels[0]} & {precision for precision, _ in panels[1]}
    methods = sorted({method for lines in panels for _, method in lines if method != "none"}, key=str.lower)
    figure = make_subplots(cols=2, shared_yaxes=True, subplot_titles=("this ladder", options.published))
    named = set()
    for column, lines in enumerate(panels, start=1):
        largest = max(
            (points[-1] for (precision, _), points in lines.items() if precision == "W16A16"), key=lambda p: p.score
        )
        for (precision, method), points in lines.items():
            if precision not in both:
                continue
            bits = Precision.parse(precision).weight_bits
            colour = LIGHT[min(range(len(WEIGHT_BITS)), key=lambda i: abs(WEIGHT_BITS[i] - bits))]
            label = precision if method == "none" else f"{precision} {method}"
            figure.add_scatter(
                x=[p.on_axis("model_bits") / largest.on_axis("model_bits") for p in points],
                y=[p.score / largest.score for p in points],
                name=label,
                legendgroup=label,
                showlegend=label not in named,
                mode="lines+markers",
                line={"color": colour, "width": 1.5},
                marker={
                    "symbol": "circle-open"
                    if method == "none"
                    else METHOD_SYMBOLS[methods.index(method) % len(METHOD_SYMBOLS)],
                    "size": 9,
                },
                row=1,
                col=column,
            )
            named.add(label)
    figure.update_xaxes(type="log", title="bits, relative to the largest model in full precision")
    figure.update_yaxes(type="log", dtick="D2")
    figure.update_yaxes(title="score over that model's (lower is better)", col=1)
    figure.update_layout(template="plotly_white", width=1180, height=560, margin={"l": 60, "r": 20, "t": 40, "b": 50})
    write_figure(options.picture, figure)


if __name__ == "__main__":
    main()
