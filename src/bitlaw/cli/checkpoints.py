"""Quantize models, and say what checkpoints hold."""

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitlaw.cli.allocation import check_size, noted, precision_or_plan, tell_of_plan
from bitlaw.cli.app import app, out_console, stages
from bitlaw.cli.options import (
    CalibrationImages,
    CalibrationSettings,
    Device,
    Dtype,
    Guidance,
    Model,
    Option,
    Out,
    PlanPath,
    PrecisionText,
    ProtectText,
    Sampling,
    Tokenizer,
    calibration_of,
    load_model,
    parse_protect,
    refuse_existing,
    settings,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table

    from bitlaw.models.generator import ImageGenerator


@app.command(
    epilog="Examples: `bitlaw quantize ladder/var-s --precision W4A8 --out var-s-w4a8` · "
    "`bitlaw quantize ladder/dit-s --precision W4A8c --method smoothquant+gptq --step-groups 4 --out dit-s-w4a8` · "
    "`bitlaw quantize DiT-XL-2-256x256.pt --tokenizer sd-vae-ft-ema --precision W4g128A8 --method gptq:act_order=true "
    "--calibration-images 32 --out dit-w4a8`"
)
def quantize(
    model: Model,
    out: Out,
    precision: PrecisionText = None,
    plan: PlanPath = None,
    method: Annotated[
        str,
        typer.Option(
            help="How the codes are chosen: rtn, clip, gptq, gptvq, omniquant or adaround, after a colon its settings; "
            "before it, joined by +, what prepares the network: smoothquant, svdquant."
        ),
    ] = "rtn",
    protect: ProtectText = "first-last",
    step_groups: Annotated[
        str, typer.Option(help="Groups of steps with activation ranges of their own (A8c): how many, or first steps.")
    ] = "1",
    calibration_images: CalibrationImages = 64,
    guidance: Guidance = None,
    sampling: Sampling = None,
    calibration: CalibrationSettings = None,
    tokenizer: Tokenizer = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    option: Option = None,
) -> None:
    """Quantize a model and save it, as small as its bits say.

    What is interrupted goes on where it was when the same command is given again.
    """
    import bitlaw
    from bitlaw.allocation.plan_file import PlanFile, check_plan_for
    from bitlaw.methods.quantize import as_chain

    refuse_existing(out)
    options = {"--protect": protect != "first-last", "--step-groups": step_groups != "1"}
    wanted = precision_or_plan(precision, plan, options)
    as_chain(method)
    calibrated = calibration_of(calibration_images, guidance, sampling, calibration)
    groups = [int(part) for part in step_groups.split(",")] if re.fullmatch(r"\d+(,\d+)*", step_groups) else []
    if not groups:
        raise ValueError(f"--step-groups {step_groups}: expected a number, or first steps with commas (0,4,8)")
    loaded = load_model(model, tokenizer, dtype, device, option)
    work = out.with_name(f".{out.name}.work")
    with stages() as report:
        small = bitlaw.quantize(
            loaded,
            check_plan_for(loaded, wanted) if isinstance(wanted, PlanFile) else wanted,
            method=method,
            protect=parse_protect(protect),
            calibration=calibrated,
            step_groups=groups[0] if len(groups) == 1 else groups,
            work=work,
            progress=report,
        )
    if isinstance(wanted, PlanFile) and plan is not None:
        noted(small, wanted, plan)
    small.save(out)
    shutil.rmtree(work, ignore_errors=True)
    out_console.print(describe(bitlaw.load(out), str(out)))
    if isinstance(wanted, PlanFile) and (line := check_size(wanted, out)):
        out_console.print(line, highlight=False)


@app.command(
    epilog="Examples: `bitlaw info var-s-w4a8` · `bitlaw info var_d16.pth` · `bitlaw info vae_ch160v4096z32.pth` · "
    "`bitlaw info plan.json`"
)
def info(
    path: Model,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    option: Option = None,
) -> None:
    """What a file, checkpoint or plan holds: bits of every layer, both bit counts, provenance."""
    import bitlaw
    from bitlaw.allocation.plan_file import read_plan
    from bitlaw.models.autoencoders import AUTOENCODERS, open_autoencoder
    from bitlaw.models.loading import is_checkpoint, load_official, resolve
    from bitlaw.models.official import read_weights

    if path.endswith(".json") and Path(path).is_file():
        if as_json:
            read_plan(path)
            out_console.print(Path(path).read_text(encoding="utf-8"), markup=False, highlight=False)
        else:
            tell_of_plan(Path(path))
        return
    found, _ = resolve(path)
    if is_checkpoint(found):
        text = describe(bitlaw.load(path), path, as_json=as_json)
    else:
        file = read_weights(found)
        if any(kind.recognizes(file) for kind in AUTOENCODERS.values()):
            autoencoder = open_autoencoder(file)
            count = sum(parameter.numel() for parameter in autoencoder.parameters())
            content = {"name": path, "kind": autoencoder.kind, "parameters": count, "sizes": autoencoder.to_config()}
            plain = f"{path}: {autoencoder.kind} autoencoder, {count:,} parameters\n{autoencoder.to_config()}"
            text = json.dumps(content, indent=2) if as_json else plain
        else:
            model = load_official(file, "none", **settings(option, "option"))
            text = describe(model, path, as_json=as_json)
    out_console.print(text, markup=False, highlight=False)


@app.command(epilog="Examples: `bitlaw models` · `bitlaw models --family mar`")
def models(
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
) -> None:
    """Families, sizes, the files they load, and their published scores."""
    from torch.nn import Conv2d

    import bitlaw
    from bitlaw.models import FAMILIES
    from bitlaw.models.loading import ladder_names
    from bitlaw.models.releases import RELEASES
    from bitlaw.names import lookup

    if family is not None:
        lookup(FAMILIES, family, "family")
    for name in FAMILIES if family is None else (family,):
        table = _models_table(f"[bold]{name}[/bold]: {(FAMILIES[name].__doc__ or '').partition(chr(10))[0]}")
        for builtin in ladder_names():
            model = bitlaw.load(builtin)
            if model.family == name:
                parameters = sum(p.numel() for p in model.net.parameters())
                convolutions = sum(isinstance(model.net.get_submodule(s.name), Conv2d) for s in model.sites())
                table.add_row(
                    builtin.rpartition("-")[2],
                    _millions(parameters),
                    _layers(len(model.sites()) - convolutions, convolutions),
                    str(model.image_size),
                    "",
                    "",
                    builtin,
                )
        for release in RELEASES:
            if release.family == name:
                table.add_row(
                    release.size,
                    _millions(release.parameters),
                    _layers(release.num_linears, release.num_convolutions),
                    str(release.image_size),
                    "" if release.fid is None else f"{release.fid:.2f}",
                    "" if release.inception_score is None else f"{release.inception_score:.1f}",
                    "\n".join(release.files),
                )
        out_console.print(table)
    out_console.print(
        "layers: linear + convolution, that may be quantized. Scores: published, full precision, 50,000 images, "
        "recipe 'paper'.",
        highlight=False,
    )


def _models_table(title: str) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    # Narrow, so that names are whole on a terminal of 80 columns.
    table = Table(title=title, title_justify="left", title_style="", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("size")
    for column in ("params", "layers", "px", "FID", "IS"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("file, or name", overflow="fold")
    return table


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:,.{0 if parameters > 1e7 else 2}f} M"


def _layers(num_linears: int, num_convolutions: int) -> str:
    """Layers that may be quantized: linears, and convolutions where there are some."""
    return f"{num_linears}+{num_convolutions}" if num_convolutions else str(num_linears)


@app.command(epilog="Example: `bitlaw export var-d16-w4 --to official --out var_d16_w4.pth` writes dequantized weights")
def export(
    model: Model,
    out: Out,
    to: Annotated[str, typer.Option(help="official: names and wrapper of the released files.")] = "official",
    tokenizer: Tokenizer = "none",
    dtype: Dtype = "float32",
    option: Option = None,
) -> None:
    """Write a model in another format, and say what that format cannot hold."""
    from bitlaw.models.export import EXPORTS
    from bitlaw.models.loading import is_checkpoint, resolve
    from bitlaw.names import lookup

    write = lookup(EXPORTS, to, "format")
    given = None if is_checkpoint(resolve(model)[0]) else tokenizer
    lost = write(load_model(model, given, dtype, option=option), out)
    out_console.print(f"{out}: {out.stat().st_size:,} bytes")
    for what in lost:
        out_console.print(f"not in it: {what}", highlight=False)


def describe(model: "ImageGenerator[Any]", name: str, as_json: bool = False) -> str:
    """What a model holds, in lines or as JSON."""
    from bitlaw.models.releases import release_of
    from bitlaw.scaling.bits import count_bits, describe_bits

    bits = count_bits(model)
    release = release_of(model.family, bits.parameters, model.image_size)
    if as_json:
        content = {
            "name": name,
            "family": model.family,
            "size": release.size if release else None,
            "parameters": bits.parameters,
            "bits": bits.to_json(),
            "provenance": dict(model.provenance),
        }
        return json.dumps(content, indent=2)
    size = f" {release.size} ({', '.join(release.files)})" if release else ""
    classes = f"{model.num_classes} classes, " if model.num_classes > 1 else ""
    method = describe_method(model.provenance)
    return f"{name}: {model.family}{size}, {classes}{model.image_size} px\n{describe_bits(model, bits)}{method}"


def describe_method(provenance: "Mapping[str, Any]") -> str:
    """What was done to each site of a model that was calibrated: its output error after each stage, relative."""
    lines = [""]
    if trained := provenance.get("distillation"):
        lines.append(f"distilled     {_training(trained)}")
    notes = provenance.get("sites")
    if not notes:
        return "\n".join(lines) if trained else ""
    lines += [f"method        {provenance.get('method')}, calibrated with {_images(provenance)}"]
    width = max(34, *(len(name) + 2 for name in notes))
    for name, of_site in notes.items():
        shown = [f"{stage} {_stage(note)}" for stage, note in of_site.items()]
        lines.append(f"{name:{width}}{' -> '.join(shown)}")
    return "\n".join(lines)


def _images(provenance: "Mapping[str, Any]") -> str:
    calibration = provenance.get("calibration", {})
    return f"{calibration.get('num_images')} images, seed {calibration.get('seed')}"


def _training(trained: "Mapping[str, Any]") -> str:
    """What a distillation did, in a line."""
    k = f" (K = {trained['top_k']})" if trained.get("top_k") is not None else ""
    errors = trained["held_out_loss"]
    kept = str(trained["kept_step"])
    return (
        f"by {trained['loss']}{k}, {trained['steps']} steps of {trained['batch_size']} images ({trained['data']}); "
        f"held-out loss {errors['0']:.4g} at the start, {errors[kept]:.4g} at step {kept}, which is kept"
    )


def _stage(note: "Mapping[str, Any]") -> str:
    """A stage's note in a few words: the error first."""
    parts = [f"{note['error']:.2%}"] if "error" in note else []
    parts += [f"{key} {_short(value)}" for key, value in note.items() if key not in ("error", "seconds")]
    parts += [f"{note['seconds']:.2f} s"] if "seconds" in note else []
    return ", ".join(parts)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
