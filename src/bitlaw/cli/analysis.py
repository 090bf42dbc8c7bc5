"""What goes on inside a model when it is quantized."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitlaw.cli.app import app, out_console, stages, write_pictures
from bitlaw.cli.options import (
    Device,
    Dtype,
    Guidance,
    Model,
    Option,
    Sampling,
    Tokenizer,
    load_model,
    parse_protect,
    settings,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.table import Table

    from bitlaw.allocation.sensitivity import Level, Outcome, Sensitivity

COLUMNS = 4
"""Precisions of a table: as many as go on a terminal of 80 columns."""

analyze_app = typer.Typer(
    no_args_is_help=True,
    help="Measure what quantization does inside a model: numbers as JSON, and pictures.",
)
app.add_typer(analyze_app, name="analyze", epilog="Example: `bitlaw analyze ladder/var-s sensitivity --bits 2,3,4,8`")


@analyze_app.callback()
def analyze(context: typer.Context, model: Model) -> None:
    """Of a model; the analyses are the commands below."""
    context.obj = model


@analyze_app.command(
    epilog="Examples: `bitlaw analyze ladder/var-s sensitivity --bits 2,3,4,8 --out sensitivity` · "
    "`bitlaw analyze var_d16.pth sensitivity --precision W4A6 --levels kind,spared --fd 5000 --features inception.pt "
    "--reference VIRTUAL_imagenet256_labeled.npz`"
)
def sensitivity(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option(help="A folder for sensitivity.json, kinds.png and blocks.png; what is there goes on.")
    ] = Path("sensitivity"),
    bits: Annotated[str, typer.Option(help="Widths, with commas.")] = "2,3,4,8",
    what: Annotated[str, typer.Option(help="weights, inputs (each alone) or both (at once); with commas.")] = (
        "weights,inputs"
    ),
    precision: Annotated[
        list[str] | None, typer.Option(help="W4A6 ...; may be repeated. In the place of --bits and --what.")
    ] = None,
    levels: Annotated[
        str,
        typer.Option(
            help="What is quantized alone, with commas: kind, block, layer, cell (a kind in a block), all; spared is "
            "everything but a kind. Default: all of these."
        ),
    ] = "",
    method: Annotated[str, typer.Option(help="How the codes are chosen, as of `quantize`.")] = "rtn",
    protect: Annotated[
        str, typer.Option(help="Layers left out: first-last, none, or site names with commas.")
    ] = "none",
    images: Annotated[int, typer.Option(help="Images on whose rollouts distortion is measured.")] = 16,
    measure: Annotated[
        str, typer.Option(help="Of distortion: mse, mse+ssim, kl ... Default: what suits the model.")
    ] = "",
    fd: Annotated[int, typer.Option(help="Also the Fréchet distance of so many final images; 0 for none.")] = 0,
    fd_levels: Annotated[str, typer.Option(help="Of which levels, with commas.")] = "kind",
    reference: Annotated[str, typer.Option(help="'ladder', statistics or images (.npz), or a folder.")] = "ladder",
    features: Annotated[str, typer.Option(help="'ladder', or the Inception-v3 TorchScript file.")] = "ladder",
    prompts: Annotated[
        Path | None, typer.Option(help="For a text-conditional model: a text file, a prompt a line.")
    ] = None,
    guidance: Guidance = None,
    sampling: Sampling = None,
    tokenizer: Tokenizer = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    option: Option = None,
) -> None:
    """Which kind of layer, which block, which layer suffers most when it is quantized alone.

    What is interrupted goes on where it was when the same command is given again.
    """
    from bitlaw.allocation.pictures import sensitivity_bars, sensitivity_maps
    from bitlaw.allocation.sensitivity import SensitivitySettings, measure_sensitivity, precisions_of

    chosen_levels: Any = {"levels": tuple(levels.split(","))} if levels else {}
    parts: Any = what.split(",")
    rules = parse_protect(protect)
    chosen = SensitivitySettings(
        precisions=tuple(precision) if precision else precisions_of(_widths(bits), parts),
        method=method,
        protect=(rules,) if isinstance(rules, str) else tuple(rules),
        measure=measure,
        num_images=images,
        labels=tuple(prompts.read_text(encoding="utf-8").splitlines()) if prompts else (),
        guidance=guidance,
        sampling=settings(sampling, "sampling"),
        fd_images=fd,
        fd_levels=tuple(fd_levels.split(",")),  # type: ignore[arg-type]
        reference=reference,
        features=features,
        **chosen_levels,
    )
    name: str = context.obj
    model = load_model(name, tokenizer, dtype, device, option)
    with stages() as report:
        result = measure_sensitivity(model, chosen, file=out / "sensitivity.json", progress=report, name=name)
    _print(result)
    drawn = {}
    if result.of("kind"):
        drawn["kinds"] = sensitivity_bars(result)
    if result.of("cell"):
        drawn["blocks"] = sensitivity_maps(result)
    write_pictures(out, drawn, [out / "sensitivity.json"])


@analyze_app.command(
    epilog="Examples: `bitlaw allocate ladder/var-s --average-bits 4 --curves curves.json --out plan.json`, then "
    "`bitlaw analyze ladder/var-s additivity --curves curves.json` and, with what that says of plans, "
    "`bitlaw allocate ladder/var-s --average-bits 3 --curves curves.json --additivity additivity/additivity.json "
    "--out plan.json`"
)
def additivity(
    context: typer.Context,
    curves: Annotated[Path, typer.Option(help="File of curves, as `bitlaw allocate --curves` writes it.")],
    out: Annotated[
        Path, typer.Option(help="A folder for additivity.json and additivity.png; what is there goes on.")
    ] = Path("additivity"),
    plans: Annotated[int, typer.Option(help="Plans at random in each range of widths.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the plans.")] = 0,
    tokenizer: Tokenizer = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    option: Option = None,
) -> None:
    """Whether the distortion of a plan is the sum of its tensors' distortions, in which ranges of bits.

    Plans at random are measured on the images that the curves were measured on, and compared with what those predict.
    """
    from bitlaw.allocation.additivity import check_additivity
    from bitlaw.allocation.curves import RateDistortion
    from bitlaw.allocation.pictures import additivity_scatter

    known = RateDistortion.read(curves)
    model = load_model(context.obj, tokenizer, dtype, device, option)
    file = out / "additivity.json"
    with stages() as report:
        check = check_additivity(model, known, num_plans=plans, seed=seed, file=file, progress=report)
    for part in check.ranges:
        verdict = "sums hold" if part.holds else "sums do not hold"
        out_console.print(f"{part}: {verdict}", highlight=False)
    write_pictures(out, {"additivity": additivity_scatter(check)}, [file])


@analyze_app.command(
    epilog="Example: `bitlaw analyze ladder/dit-s step-groups --count 4`, then "
    "`bitlaw quantize ladder/dit-s --precision W4A8c --step-groups 0,4,8,16 --out dit-s-grouped`"
)
def step_groups(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="A folder for step-groups.json and step-groups.png.")] = Path("step-groups"),
    count: Annotated[int, typer.Option(help="Groups whose boundaries the picture has.")] = 4,
    max_count: Annotated[int, typer.Option(help="Up to how many groups are chosen.")] = 12,
    images: Annotated[int, typer.Option(help="Images in whose rollouts inputs are observed.")] = 16,
    protect: Annotated[
        str, typer.Option(help="Layers that do not count: first-last, none, or site names with commas.")
    ] = "first-last",
    guidance: Guidance = None,
    sampling: Sampling = None,
    tokenizer: Tokenizer = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    option: Option = None,
) -> None:
    """Which steps may share ranges of inputs: the best groups for every number of them, and what they lose."""
    from dataclasses import asdict

    from bitlaw import Calibration
    from bitlaw.allocation.curves import CurveSettings
    from bitlaw.allocation.pictures import group_boundaries
    from bitlaw.allocation.step_groups import study_step_groups
    from bitlaw.files import write_json
    from bitlaw.scaling.summary import text_table

    if count < 1 or max_count < count:
        raise ValueError(f"--count {count} of --max-count {max_count}: give at least 1, and no more than are chosen")
    settings_of_images = Calibration(
        num_images=images, seed=CurveSettings.seed, guidance=guidance, sampling=settings(sampling, "sampling")
    )
    model = load_model(context.obj, tokenizer, dtype, device, option)
    with stages() as report:
        found = study_step_groups(model, max_count, settings_of_images, parse_protect(protect), report)
    if count > len(found.starts):
        raise ValueError(f"--count {count}: the model has {found.num_steps} steps")
    rows = [
        [str(len(starts)), ", ".join(map(str, starts)), f"{lost:.3f}", f"{equal:.3f}"]
        for starts, lost, equal in zip(found.starts, found.bits_lost, found.equal_bits_lost, strict=True)
    ]
    table = text_table(["groups", "begin at step", "bits lost", "by equal groups"], rows)
    out_console.print(table, markup=False, highlight=False)
    file = out / "step-groups.json"
    write_json(file, {"model": context.obj, **asdict(found)})
    write_pictures(out, {"step-groups": group_boundaries(found, count)}, [file])


def _widths(text: str) -> "Sequence[int]":
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ValueError(f"--bits {text}: expected widths with commas (2,3,4,8)")
    return [int(part) for part in text.split(",")]


def _print(result: "Sensitivity") -> None:
    """Tables of kinds and blocks, and which suffers most."""
    titles: dict[Level, str] = {
        "kind": "a kind of layer alone",
        "spared": "everything but a kind",
        "block": "a block alone",
        "all": "everything",
    }
    precisions = result.settings.precisions
    for level, title in titles.items():
        if not result.of(level):
            continue
        for begin in range(0, len(precisions), COLUMNS):
            part = precisions[begin : begin + COLUMNS]
            out_console.print(_table(result, level, part, f"{title}: distortion ({result.measure})", _distortion))
            if result.full_fd is not None and level in result.settings.fd_levels:
                full = f"full precision {result.full_fd['value']:.2f}"
                heading = f"{title}: FD of {result.settings.fd_images} images, {full}"
                out_console.print(_table(result, level, part, heading, _fd))
    for precision in precisions if result.of("kind") else ():
        layer = f", layer {result.most_sensitive(precision, 'layer')}" if result.of("layer") else ""
        kind = result.most_sensitive(precision)
        out_console.print(f"{precision}: most sensitive kind {kind}{layer}", highlight=False)


def _distortion(outcome: "Outcome") -> tuple[float, str]:
    return outcome.distortion, f"{outcome.distortion:.2e}"


def _fd(outcome: "Outcome") -> tuple[float, str]:
    assert outcome.fd is not None
    return outcome.fd["value"], f"{outcome.fd['value']:.2f}"


def _table(
    result: "Sensitivity",
    level: "Level",
    precisions: "Sequence[str]",
    title: str,
    number: "Callable[[Outcome], tuple[float, str]]",
) -> "Table":
    """Subjects of a level by precision; bold is what suffers most, or what it helps most to spare."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    table.add_column("weights", justify="right", no_wrap=True)
    subjects = result.of(level)
    columns = []
    for precision in precisions:
        table.add_column(precision, justify="right", no_wrap=True)
        numbers = {name: number(outcome) for name, outcome in result.at(level, precision).items()}
        chosen = (min if level == "spared" else max)(value for value, _ in numbers.values())
        columns.append([f"[bold]{text}[/bold]" if value == chosen else text for value, text in numbers.values()])
    for subject, *cells in zip(subjects, *columns, strict=True):
        table.add_row(subject.name, f"{subject.weights:,}", *cells)
    return table
