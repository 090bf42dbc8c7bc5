"""What goes on inside a model when it is quantized."""

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitlaw.cli.app import app, out_console, stages
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
    from bitlaw.figures import write_figure

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
    # Without Chromium there are pages, which show the same.
    suffix = ".png" if shutil.which("chromium") else ".html"
    written = [out / "sensitivity.json"]
    if result.of("kind"):
        written.append(out / f"kinds{suffix}")
        write_figure(written[-1], sensitivity_bars(result))
    if result.of("cell"):
        written.append(out / f"blocks{suffix}")
        write_figure(written[-1], sensitivity_maps(result))
    out_console.print("written: " + ", ".join(map(str, written)), highlight=False)


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
