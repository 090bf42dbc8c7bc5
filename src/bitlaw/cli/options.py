"""Arguments that commands share, and what their texts mean."""

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from bitlaw.calibration.settings import Calibration
    from bitlaw.models.generator import ImageGenerator

MODEL_HELP = "A ladder name (ladder/var-s), a checkpoint directory, a released file, or a name on the hub."

Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
Out = Annotated[Path, typer.Option("--out", help="Where the result goes.")]
Seed = Annotated[int, typer.Option(help="Seed of the images: two models meet the same noise.")]
Guidance = Annotated[float | None, typer.Option(help="Classifier-free guidance, 1 = off. Default: the model's own.")]
Recipe = Annotated[str | None, typer.Option(help="A named set of sampler settings: 'paper', the published evaluation.")]
Sampling = Annotated[
    list[str] | None, typer.Option("--sampling", help="A sampler setting, name=value; may be repeated: top_k=600.")
]
Tokenizer = Annotated[
    str | None,
    typer.Option(help="Tokenizer or VAE of a released file, where it is not beside it; 'none' to do without."),
]
Dtype = Annotated[str, typer.Option(help="Type of the network's arithmetic: float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
Option = Annotated[
    list[str] | None,
    typer.Option("--option", help="What a released file does not tell, name=value; may be repeated: image_size=384."),
]

PrecisionText = Annotated[
    str | None, typer.Option("--precision", help="W4A16 (default), W4g32A8, We2m1Ae4m3 ...", show_default=False)
]
PlanPath = Annotated[
    Path | None, typer.Option("--plan", help="A plan file (bitlaw allocate) in place of one precision for all layers.")
]
ProtectText = Annotated[
    str, typer.Option("--protect", help="Layers that stay in 16 bits: first-last, none, or site names with commas.")
]
CalibrationImages = Annotated[int, typer.Option(help="Images that the model draws of itself to calibrate.")]
CalibrationSettings = Annotated[
    list[str] | None,
    typer.Option("--calibration", help="A setting of it, name=value; may be repeated: ranges=percentile, seed=7."),
]


def load_model(
    name: str,
    tokenizer: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    option: list[str] | None = None,
) -> "ImageGenerator[Any]":
    """The model that the options of a command name."""
    import bitlaw

    return bitlaw.load(name, tokenizer, dtype=dtype, device=device, **settings(option, "option"))


def calibration_of(
    num_images: int, guidance: float | None, sampling: list[str] | None, calibration: list[str] | None
) -> "Calibration":
    """The calibration that options mean. ValueError for a setting that does not exist."""
    import bitlaw
    from bitlaw.names import check_keywords

    given = {
        "num_images": num_images,
        "guidance": guidance,
        "sampling": settings(sampling, "sampling"),
        **settings(calibration, "calibration"),
    }
    check_keywords(bitlaw.Calibration.__dataclass_fields__, given, "calibration setting")
    return bitlaw.Calibration(**given)


def settings(given: list[str] | None, what: str) -> dict[str, Any]:
    """`["top_k=600", "more_smooth=true"]` as a dictionary. ValueError for a text that is no name=value."""
    values = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"--{what} {text}: expected name=value")
        values[name.strip().replace("-", "_")] = _value(value.strip())
    return values


def _value(text: str) -> Any:
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def parse_labels(text: str) -> list[int | str]:
    """`3,5-7,2x4,goldfish` -> 3, 5, 6, 7, 2, 2, 2, 2, "goldfish"."""
    labels: list[int | str] = []
    for part in map(str.strip, text.split(",")):
        if found := re.fullmatch(r"(\d+)-(\d+)", part):
            labels += range(int(found[1]), int(found[2]) + 1)
        elif found := re.fullmatch(r"(-?\d+)x(\d+)", part):
            labels += [int(found[1])] * int(found[2])
        elif re.fullmatch(r"-?\d+", part):
            labels.append(int(part))
        elif part:
            labels.append(part)
    if not labels:
        raise ValueError(f"labels '{text}': expected class numbers or names with commas, ranges (0-11), repeats (3x8)")
    return labels


def parse_protect(text: str) -> str | list[str]:
    """A rule's name, or site names with commas."""
    return text.split(",") if "," in text or "." in text else text


def refuse_existing(out: Path) -> None:
    """ValueError if something that is no checkpoint is in the way."""
    if out.exists() and not (out / "config.json").exists():
        raise ValueError(f"{out} exists and is not a checkpoint; give another --out")
