"""Pictures of what this folder measures and chooses.

`bits_by_layer` is Figure 9 of paper 004, `additivity_scatter` its Figure 1, `distortion_by_step` its Figure 3;
`sensitivity_bars` is Figure 5 of paper 002. All are plotly figures, which `figures.write_figure` writes.
"""

import math
from collections.abc import Sequence
from typing import Literal

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from bitlaw.allocation.additivity import Additivity
from bitlaw.allocation.curves import RateDistortion, TensorKey
from bitlaw.allocation.sensitivity import Sensitivity
from bitlaw.allocation.step_groups import StepGroups
from bitlaw.figures import COLOURS, SYMBOLS, WIDTH, styled
from bitlaw.models.generator import Site
from bitlaw.precision import BitPlan, step_group

LEAST_DRAWN = 1e-9
"""Distortions below are drawn there: logarithmic axes have no 0."""

_LOG = {"type": "log", "exponentformat": "power", "dtick": 1, "minor": {"ticks": "outside", "dtick": "D1"}}


def bits_by_layer(plan: BitPlan, sites: Sequence[Site]) -> go.Figure:
    """Bits of weights and of inputs along the depth of a network; of inputs a line for each step group.

    sites: those of the model, in order of execution; a site that the plan leaves out has 16 bits
    """
    names = [site.name for site in sites]
    figure = go.Figure()

    def add(label: str, bits: list[float], colour: str, symbol: str) -> None:
        line = {"color": colour, "width": 1.5, "shape": "hvh"}
        marker = {"symbol": symbol, "size": 7}
        figure.add_scatter(x=names, y=bits, name=label, mode="lines+markers", line=line, marker=marker)

    def precision(name: str, group: int) -> tuple[float, float]:
        own = plan[name][group] if name in plan.sites else None
        return (16, 16) if own is None else (own.weight_bits, own.activation_bits)

    add("weights", [precision(name, 0)[0] for name in names], COLOURS[0], SYMBOLS[0])
    for group, start in enumerate(plan.step_groups):
        label = "inputs" if len(plan.step_groups) == 1 else f"inputs from step {start}"
        bits = [precision(name, group)[1] for name in names]
        add(label, bits, COLOURS[1 + group % (len(COLOURS) - 1)], SYMBOLS[1 + group % (len(SYMBOLS) - 1)])
    figure.update_yaxes(rangemode="tozero", dtick=2)
    figure.update_xaxes(type="category", tickangle=-60, tickfont={"size": 10})
    return styled(figure, "layer, in order of execution", "bits", width=max(WIDTH, 160 + 16 * len(names)), height=520)


def rate_distortion(curves: RateDistortion, sites: Sequence[Site]) -> go.Figure:
    """The curves: distortion over bits, weights beside inputs, a line for each tensor in the colour of its kind."""
    parts: dict[str, list[TensorKey]] = {"weights": curves.keys("weight"), "inputs": curves.keys("input")}
    titles = [title for title, keys in parts.items() if keys]
    figure = make_subplots(cols=len(titles), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.03)
    kind_of = {site.name: site.kind for site in sites}
    kinds = dict.fromkeys(kind_of[key.site] for keys in parts.values() for key in keys)
    colours = {kind: COLOURS[index % len(COLOURS)] for index, kind in enumerate(kinds)}
    named = set()
    for column, title in enumerate(titles, start=1):
        for key in parts[title]:
            kind = kind_of[key.site]
            figure.add_scatter(
                x=curves.settings.widths,
                y=[max(d, LEAST_DRAWN) for d in curves.distortions(key)],
                name=kind,
                legendgroup=kind,
                showlegend=kind not in named,
                hovertext=str(key),
                mode="lines",
                line={"color": colours[kind], "width": 1.2},
                opacity=0.8,
                row=1,
                col=column,
            )
            named.add(kind)
    figure.update_yaxes(**_LOG)
    figure.update_xaxes(dtick=1)
    styled(figure, "bits", "", width=1000, height=460)
    return figure.update_yaxes(title_text="distortion of the output", col=1)


def distortion_by_step(curves: RateDistortion, bits: int, what: Literal["weight", "input"] = "input") -> go.Figure:
    """Distortion of each step when a tensor is quantized to so many bits alone: a box over tensors for each step.

    An input counts in the steps of its own group. ValueError for a width or a kind of tensor without curves.
    """
    if bits not in curves.settings.widths:
        raise ValueError(f"no curve has {bits} bits; measured: {curves.settings.widths}")
    keys = curves.keys(what)
    if not keys:
        raise ValueError(f"the curves have no {what}; they are of {curves.settings.what}")
    index = curves.settings.widths.index(bits)
    groups = curves.settings.step_groups
    num_steps = len(curves.by_step[keys[0]][index])
    figure = go.Figure()
    for step in range(num_steps):
        own = [key for key in keys if what == "weight" or key.group == step_group(groups, step)]
        values = [max(curves.by_step[key][index][step], LEAST_DRAWN) for key in own]
        figure.add_box(
            y=values,
            name=str(step),
            text=[str(key) for key in own],
            marker={"color": COLOURS[0], "size": 4},
            line={"width": 1.2},
            showlegend=False,
        )
    figure.update_yaxes(**_LOG)
    figure.update_xaxes(type="category", nticks=40)
    return styled(figure, "step", f"distortion, one {what} at {bits} bits", width=max(WIDTH, 12 * num_steps))


def additivity_scatter(check: Additivity) -> go.Figure:
    """Measured distortion of plans at random over the sum of their tensors' distortions; the line is additivity."""
    figure = go.Figure()
    drawn = []
    for index, part in enumerate(check.ranges):
        predicted, measured = ([max(d, LEAST_DRAWN) for d in values] for values in (part.predicted, part.measured))
        drawn += [*predicted, *measured]
        figure.add_scatter(
            x=predicted,
            y=measured,
            name=f"{part.low}-{part.high} bits: r = {part.correlation:.3f}, slope {part.slope:.2f}",
            mode="markers",
            marker={"color": COLOURS[index % len(COLOURS)], "symbol": SYMBOLS[index % len(SYMBOLS)], "size": 7},
        )
    ends = [min(drawn), max(drawn)]
    line = {"color": "#999999", "dash": "dash", "width": 1}
    figure.add_scatter(x=ends, y=ends, name="additive", mode="lines", line=line)
    figure.update_xaxes(**_LOG)
    figure.update_yaxes(**_LOG)
    return styled(figure, "sum of the distortions of single tensors", "distortion of all together")


def group_boundaries(groups: StepGroups, count: int) -> go.Figure:
    """Width of the range of every site's inputs over steps with the boundaries of groups, and what is lost by count.

    ValueError for a number of groups that was not studied.
    """
    if not 1 <= count <= len(groups.starts):
        raise ValueError(f"{count} groups were not studied; 1 to {len(groups.starts)} were")
    figure = make_subplots(
        cols=2,
        column_widths=[0.68, 0.32],
        horizontal_spacing=0.1,
        subplot_titles=(f"inputs of each layer, and {count} groups", "what a shared range costs"),
    )
    for name, ends in groups.ends.items():
        widths = [high - low if low <= high else math.nan for low, high in ends]
        reached = [width for width in widths if width > 0]
        if not reached:
            continue
        figure.add_scatter(
            # Beside its own geometric mean, so that layers can be compared.
            y=[math.log2(w) - sum(map(math.log2, reached)) / len(reached) if w > 0 else None for w in widths],
            x=list(range(len(widths))),
            hovertext=name,
            mode="lines",
            line={"color": COLOURS[0], "width": 1},
            opacity=0.35,
            showlegend=False,
            row=1,
            col=1,
        )
    for start in groups.starts[count - 1][1:]:
        figure.add_vline(x=start - 0.5, line={"color": COLOURS[1], "width": 2}, row=1, col=1)
    counts = list(range(1, len(groups.starts) + 1))
    for label, lost, colour, symbol in (
        ("equal groups", groups.equal_bits_lost, COLOURS[6], SYMBOLS[1]),
        ("best groups", groups.bits_lost, COLOURS[1], SYMBOLS[0]),
    ):
        marker, line = {"symbol": symbol, "size": 7}, {"color": colour, "width": 1.5}
        figure.add_scatter(
            x=counts, y=list(lost), name=label, mode="lines+markers", line=line, marker=marker, row=1, col=2
        )
    figure.update_xaxes(title_text="step", row=1, col=1)
    figure.update_yaxes(title_text="log2 of range, over the layer's mean", row=1, col=1)
    figure.update_xaxes(title_text="groups", dtick=max(1, len(counts) // 10), row=1, col=2)
    figure.update_yaxes(title_text="bits lost, mean over layers and steps", rangemode="tozero", row=1, col=2)
    figure.update_layout(legend={"x": 0.99, "xanchor": "right", "y": 0.98})
    return styled(figure, "", "", width=1000, height=440)


def sensitivity_bars(result: Sensitivity) -> go.Figure:
    """Distortion when a kind of layer is quantized alone, at each precision, and all of them at once."""
    figure = go.Figure()
    for index, precision in enumerate(result.settings.precisions):
        outcomes = {**result.at("kind", precision), **result.at("all", precision)}
        figure.add_bar(
            x=list(outcomes),
            y=[max(o.distortion, LEAST_DRAWN) for o in outcomes.values()],
            name=precision,
            marker={"color": COLOURS[index % len(COLOURS)]},
        )
    figure.update_yaxes(**_LOG)
    return styled(figure, "kind of layer that is quantized alone", f"distortion ({result.measure})", width=1000)


def sensitivity_maps(result: Sensitivity, columns: int = 4) -> go.Figure:
    """Blocks x kinds: log10 of the distortion when the kind is quantized in this block alone; a map a precision."""
    cells = [subject.name.split(" ", 1) for subject in result.of("cell")]
    blocks = list(dict.fromkeys(block for block, _ in cells))
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    precisions = result.settings.precisions
    columns = min(columns, len(precisions))
    rows = math.ceil(len(precisions) / columns)
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=precisions,
        shared_yaxes=True,
        shared_xaxes=True,
        horizontal_spacing=0.02,
        vertical_spacing=0.25 / rows,
    )
    for index, precision in enumerate(precisions):
        outcomes = result.at("cell", precision)
        values = [[outcomes.get(f"{block} {kind}") for kind in kinds] for block in blocks]
        logs = [[None if o is None else math.log10(max(o.distortion, LEAST_DRAWN)) for o in row] for row in values]
        row, column = divmod(index, columns)
        figure.add_heatmap(x=kinds, y=blocks, z=logs, coloraxis="coloraxis", row=row + 1, col=column + 1)
    figure.update_yaxes(type="category", autorange="reversed")
    figure.update_layout(coloraxis={"colorscale": "Viridis", "colorbar": {"title": "log10 of<br>distortion"}})
    return styled(figure, "", "", width=1000, height=90 + rows * (90 + 22 * len(blocks)))
