"""The command line. Each command checks its input, calls the library, and prints what came of it."""

import json
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from bitlaw.models.generator import ImageGenerator
    from bitlaw.scaling.sweep import Progress as StudyProgress
    from bitlaw.scaling.sweep import Study

app = typer.Typer(
    name="bitlaw",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Quantize vision generative models and find which size at which bit width gives the best images.",
)
ladder_app = typer.Typer(no_args_is_help=True, help="The built-in models.")
app.add_typer(ladder_app, name="ladder")

out_console, error_console = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)

Model = Annotated[str, typer.Argument(help="A ladder name (ladder/var-s), or a checkpoint directory.")]
Out = Annotated[Path, typer.Option("--out", help="Where the result goes.")]
Seed = Annotated[int, typer.Option(help="Seed of the images: two models meet the same noise.")]
Guidance = Annotated[float | None, typer.Option(help="Classifier-free guidance, 1 = off. Default: the model's own.")]
Method = Annotated[str, typer.Option(help="How the codes are chosen: rtn.")]
PrecisionOption = Annotated[str, typer.Option("--precision", help="W4A16, W4g32A8, We2m1Ae4m3 ...")]
Protect = Annotated[str, typer.Option(help="Layers that stay in 16 bits: first-last, none, or site names with commas.")]


def main() -> None:
    """Run the command line; a user's mistake is one line, not a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        error_console.print(f"[red]error:[/red] {_escape(str(error))}")
        sys.exit(2)


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
            f"{_minutes(expected.wall_seconds(cells, engine.workers))} on {engine.workers} processes "
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
    with _progress("cells", total) as advance:
        for step in steps:
            name = f"{step.record.cell.model} {step.record.cell.precision}"
            if step.record.error is not None:
                failed += 1
                error_console.print(f"[red]{name} failed:[/red] {_escape(step.record.error)}")
                advance(1, name)
            else:
                left = _minutes(step.left_wall_seconds)
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


@app.command(epilog="Example: `bitlaw quantize ladder/var-s --precision W4A8 --out var-s-w4a8`")
def quantize(
    model: Model,
    out: Out,
    precision: PrecisionOption = "W4A16",
    method: Method = "rtn",
    protect: Protect = "first-last",
) -> None:
    """Quantize a model and save it, as small as its bits say."""
    import bitlaw

    _refuse_existing(out)
    bitlaw.Precision.parse(precision)
    loaded = bitlaw.load(model)
    small = bitlaw.quantize(loaded, precision, method=method, protect=_protect(protect))
    small.save(out)
    out_console.print(_describe(bitlaw.load(out), str(out)))


@app.command(epilog="Example: `bitlaw generate ladder/dit-l --labels 0,1,2,3 --seed 7 --out grid.png`")
def generate(
    model: Model,
    out: Out = Path("grid.png"),
    labels: Annotated[str, typer.Option(help="Class numbers with commas; 0-11 is a range; 3x8 is eight times 3.")] = "",
    seed: Seed = 0,
    guidance: Guidance = None,
    columns: Annotated[int, typer.Option(help="Images in a row of the picture.")] = 12,
    zoom: Annotated[int, typer.Option(help="Pixels of the picture for one of an image.")] = 1,
) -> None:
    """Draw images: a PNG grid, or all of them as ADM .npz if --out ends in .npz."""
    import bitlaw
    from bitlaw.metrics.samples import write_grid, write_samples

    loaded = bitlaw.load(model)
    chosen = loaded.check_labels(_labels(labels) if labels else list(range(loaded.num_classes)))
    with _progress("images", len(chosen)) as advance:
        images = loaded.generate(chosen, seed, guidance=guidance, progress=advance)
    if out.suffix == ".npz":
        write_samples(out, images, chosen)
    else:
        write_grid(out, images, columns, zoom=zoom)
    out_console.print(f"{len(images)} images of {loaded.image_size} px: {out}")


@app.command(epilog="Example: `bitlaw evaluate ladder/var-m --samples 5000 --out scores.json`")
def evaluate(
    model: Annotated[str, typer.Argument(help="A model, or images: a folder, or an ADM .npz.")],
    reference: Annotated[str, typer.Option(help="'ladder', statistics or images (.npz), or a folder.")] = "ladder",
    samples: Annotated[int, typer.Option(help="Images to draw.")] = 5000,
    features: Annotated[str, typer.Option(help="'ladder', or the Inception-v3 TorchScript file.")] = "ladder",
    seed: Seed = 0,
    guidance: Guidance = None,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON here.")] = None,
) -> None:
    """FID, sFID, IS, KID, precision and recall as JSON, with the protocol they were measured under."""
    import bitlaw
    from bitlaw.files import write_text
    from bitlaw.metrics.evaluation import feature_network, load_reference, score_images
    from bitlaw.metrics.protocol import score_json
    from bitlaw.metrics.samples import read_samples

    path = Path(model)
    result: dict[str, Any]
    if path.suffix == ".npz" or (path.is_dir() and not (path / "config.json").exists()):
        network = feature_network(features)
        target = load_reference(reference, network)
        images = read_samples(path)
        scores = score_images(images, network, target)
        result = {name: score_json(value, interval) for name, (value, interval) in scores.items()}
        result["protocol"] = {
            "images": path.name,
            "num_images": len(images),
            "features": network.name,
            "features_fingerprint": network.fingerprint,
            "reference": target.name,
            "num_reference": target.pooled.count,
        }
    else:
        loaded = bitlaw.load(model)
        with _progress("images", samples) as advance:
            scored = bitlaw.evaluate(
                loaded, reference, samples, seed=seed, features=features, guidance=guidance, progress=advance
            )
        result = {name: score_json(score.value, score.interval) for name, score in scored.items()}
        result["protocol"] = next(iter(scored.values())).protocol.as_dict()
    text = json.dumps(result, indent=2)
    if out is not None:
        write_text(out, text + "\n")
    print(text)


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


@app.command(epilog="Example: `bitlaw info var-s-w4a8`")
def info(
    path: Model,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """What a checkpoint holds: bits of every layer, both bit counts, provenance."""
    import bitlaw

    out_console.print(_describe(bitlaw.load(path), path, as_json=as_json), markup=False, highlight=False)


@app.command()
def models() -> None:
    """Families, sizes, and the names they load under."""
    from rich.table import Table

    import bitlaw
    from bitlaw.models.loading import ladder_names

    table = Table("name", "family", "parameters", "linear layers", "steps", "image")
    for name in ladder_names():
        model = bitlaw.load(name)
        parameters = sum(p.numel() for p in model.net.parameters())
        table.add_row(
            name,
            model.family,
            f"{parameters:,}",
            str(len(model.sites())),
            str(model.num_steps),
            f"{model.image_size} px",
        )
    out_console.print(table)


@ladder_app.command("train", epilog="Example: `bitlaw ladder train --out ladder`")
def ladder_train(
    out: Out = Path("ladder"),
    workers: Annotated[int | None, typer.Option(help="Processes; default: one a core.")] = None,
    only: Annotated[str, typer.Option(help="Jobs to run, with commas; default: all.")] = "",
) -> None:
    """Rebuild the built-in models from nothing; resumable, under two hours on two cores."""
    from bitlaw.ladder.train import train_ladder

    train_ladder(out, workers=workers, only=[name for name in only.split(",") if name])


# ---- helpers ----------------------------------------------------------------------------------------


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar with the time left on a terminal; elsewhere a plain line whenever there is something to say."""
    if not out_console.is_terminal:
        done = 0

        def plain(count: int, text: str = "") -> None:
            nonlocal done
            done += count
            if text:
                print(f"[{done}/{total}] {text}", flush=True)

        yield plain
        return
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=out_console) as bar:
        task = bar.add_task("", total=total)
        yield lambda count, text="": bar.update(task, advance=count, description=text)


def _describe(model: "ImageGenerator[Any]", name: str, as_json: bool = False) -> str:
    from bitlaw.scaling.bits import count_bits, describe_bits

    bits = count_bits(model)
    if as_json:
        content = {
            "name": name,
            "family": model.family,
            "parameters": bits.parameters,
            "bits": bits.to_json(),
            "provenance": dict(model.provenance),
        }
        return json.dumps(content, indent=2)
    return f"{name}: {model.family}, {model.num_classes} classes, {model.image_size} px\n{describe_bits(model, bits)}"


def _labels(text: str) -> list[int]:
    """`3,5-7,2x4` -> 3, 5, 6, 7, 2, 2, 2, 2."""
    labels: list[int] = []
    try:
        for part in text.split(","):
            if "x" in part:
                label, times = part.split("x")
                labels += [int(label)] * int(times)
            elif "-" in part:
                first, last = part.split("-")
                labels += range(int(first), int(last) + 1)
            else:
                labels.append(int(part))
    except ValueError:
        raise ValueError(f"labels '{text}': expected numbers with commas, ranges (0-11) or repeats (3x8)") from None
    return labels


def _protect(text: str) -> str | list[str]:
    return text.split(",") if "," in text or "." in text else text


def _refuse_existing(out: Path) -> None:
    if out.exists() and not (out / "config.json").exists():
        raise ValueError(f"{out} exists and is not a checkpoint; give another --out")


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


if __name__ == "__main__":
    main()
