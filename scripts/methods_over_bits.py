"""Fréchet distance of a model over the bits of a precision, a line for each method, from studies of it.

    python scripts/methods_over_bits.py docs/images/ddpm-mixed.png ddpm ddpm-groups

The left picture has weights alone, the right one weights and inputs; the dashed line is full precision.
"""

import argparse
from collections import defaultdict
from pathlib import Path

from plotly.subplots import make_subplots

from bitlaw.figures import COLOURS, SYMBOLS, styled, write_figure
from bitlaw.precision import Precision
from bitlaw.scaling.records import StudyDirectory

TITLES = ("weights", "weights and inputs")


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("studies", type=Path, nargs="+")
    options = parser.parse_args()
    lines: dict[tuple[int, str], list[tuple[float, float]]] = defaultdict(list)
    full = None
    for record in (record for study in options.studies for record in StudyDirectory(study).records()):
        precision, score = Precision.parse(record.cell.precision), record.metrics["fd"]["value"]
        if precision.is_full:
            full = score
            continue
        groups = f", {record.cell.step_groups} step groups" if record.cell.step_groups > 1 else ""
        column = 1 if precision.activation is None else 2
        lines[column, record.cell.method + groups].append((precision.weight_bits, score))
    methods = list(dict.fromkeys(method for _, method in lines))
    figure = make_subplots(cols=2, shared_yaxes=True, subplot_titles=TITLES, horizontal_spacing=0.03)
    for (column, method), points in lines.items():
        index = methods.index(method)
        bits, scores = zip(*sorted(points), strict=True)
        marker = {"symbol": SYMBOLS[index % len(SYMBOLS)], "size": 8, "color": COLOURS[index % len(COLOURS)]}
        is_first = column == min(c for c, of in lines if of == method)
        figure.add_scatter(x=bits, y=scores, name=method, marker=marker, showlegend=is_first, row=1, col=column)
    if full is not None:
        figure.add_hline(y=full, line={"dash": "dash", "color": "#999999", "width": 1})
    figure.update_yaxes(type="log", tickvals=[5, 7, 10, 15, 20, 30, 50, 70])
    figure.update_xaxes(dtick=1)
    styled(figure, "bits in the mean", "", width=1100, height=440)
    write_figure(options.out, figure.update_yaxes(title_text="Fréchet distance", col=1))


if __name__ == "__main__":
    main()
