"""Draw images, change them, score them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitlaw.cli.app import app, out_console, progress
from bitlaw.cli.options import (
    Device,
    Dtype,
    Guidance,
    Model,
    Option,
    Out,
    Recipe,
    Sampling,
    Seed,
    Tokenizer,
    load_model,
    parse_labels,
    settings,
)

if TYPE_CHECKING:
    from torch import Tensor

    from bitlaw.models.generator import ImageGenerator

DEMO_LABELS = (207, 360, 387, 974, 88, 979, 417, 279)  # of ImageNet, as the official demonstrations have them
NUM_IMAGES = 12  # where nothing is said

Columns = Annotated[int, typer.Option(help="Images in a row of the picture.")]
Zoom = Annotated[int, typer.Option(help="Pixels of the picture for one of an image.")]
Batch = Annotated[int, typer.Option(help="Images drawn at a time; less takes less memory.")]


@app.command(
    epilog="Examples: `bitlaw generate ladder/dit-l --labels 0,1,2,3 --seed 7` · "
    "`bitlaw generate var_d16.pth --labels 'golden retriever,207,88x4' --recipe paper --out grid.png` · "
    "`bitlaw generate t2i_XL_stage1_256.pt --option text_encoder=flan-t5-xl --prompt 'a red fox'`"
)
def generate(
    model: Model,
    out: Out = Path("grid.png"),
    labels: Annotated[
        str,
        typer.Option(help="Class numbers or names with commas; 0-11 is a range; 3x8 is eight times 3; -1 is no class."),
    ] = "",
    prompt: Annotated[list[str] | None, typer.Option(help="For a text-conditional model; may be repeated.")] = None,
    seed: Seed = 0,
    guidance: Guidance = None,
    recipe: Recipe = None,
    sampling: Sampling = None,
    columns: Columns = NUM_IMAGES,
    zoom: Zoom = 1,
    batch_size: Batch = 64,
    tokenizer: Tokenizer = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    option: Option = None,
) -> None:
    """Draw images: a PNG grid, or all of them as ADM .npz if --out ends in .npz."""
    loaded = load_model(model, tokenizer, dtype, device, option)
    chosen: Any = prompt or (parse_labels(labels) if labels else _default_labels(loaded))
    checked = loaded.check_labels(chosen)
    loaded = loaded.with_sampling(recipe=recipe, guidance=guidance, **settings(sampling, "sampling"))
    with progress("images", len(checked)) as advance:
        # Prompts have gone through their encoder already.
        images = loaded.generate(checked if prompt else chosen, seed, batch_size=batch_size, progress=advance)
    _write(out, images, None if prompt else checked, columns, zoom)


def _default_labels(model: "ImageGenerator[Any]") -> Sequence[int]:
    if model.num_classes == 1000:
        return DEMO_LABELS
    return range(model.num_classes) if model.num_classes > 1 else [0] * NUM_IMAGES


def _write(out: Path, images: "Tensor", labels: "Tensor | None", columns: int, zoom: int = 1) -> None:
    from bitlaw.metrics.samples import write_grid, write_samples

    if out.suffix == ".npz":
        write_samples(out, images, labels)
    else:
        write_grid(out, images, columns, zoom=zoom)
    out_console.print(f"{len(images)} images of {images.shape[-1]} px: {out}")


@app.command(
    epilog="Examples: `bitlaw edit var_d16.pth photo.png --keep left.png --label 'golden retriever'` · "
    "`bitlaw edit var_d16.pth photo.png --box 64,64,192,192`"
)
def edit(
    model: Model,
    image: Annotated[Path, typer.Argument(help="The picture; its middle square is scaled to the model's size.")],
    out: Out = Path("edited.png"),
    keep: Annotated[
        Path | None, typer.Option(help="A picture of the same shape: what is bright is kept, the rest drawn anew.")
    ] = None,
    box: Annotated[
        str,
        typer.Option(help="Or left,top,right,bottom in pixels of the scaled picture, to draw the inside anew."),
    ] = "",
    label: Annotated[str, typer.Option(help="Class number or name of what to draw; -1 fills in without one.")] = "-1",
    count: Annotated[int, typer.Option(help="How many versions.")] = 4,
    seed: Seed = 0,
    guidance: Guidance = None,
    sampling: Sampling = None,
    tokenizer: Tokenizer = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    option: Option = None,
) -> None:
    """Draw a part of a picture anew, with VAR (zero-shot in-painting and class-conditional editing)."""
    from bitlaw.metrics.samples import read_mask, read_square
    from bitlaw.models.var import VAR

    loaded = load_model(model, tokenizer, dtype, device, option)
    if not isinstance(loaded, VAR):
        raise ValueError(f"{model}: a {loaded.family}; only a VAR edits pictures")
    size = loaded.image_size
    picture_CHW = read_square(image, size)
    keep_HW = _box(box, size) if keep is None else read_mask(keep, size)
    images = picture_CHW.expand(count, *picture_CHW.shape)
    drawn = loaded.edit(
        images, keep_HW, parse_labels(label) * count, seed, guidance=guidance, **settings(sampling, "sampling")
    )
    _write(out, drawn, None, count)


def _box(text: str, size: int) -> "Tensor":
    """A mask (H, W), False inside the box."""
    import torch

    try:
        left, top, right, bottom = (int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"box '{text}': expected left,top,right,bottom, or give --keep") from None
    if not (0 <= left < right <= size and 0 <= top < bottom <= size):
        raise ValueError(f"box '{text}': not inside a picture of {size} x {size} pixels")
    keep_HW = torch.ones(size, size, dtype=torch.bool)
    keep_HW[top:bottom, left:right] = False
    return keep_HW


@app.command(
    epilog="Examples: `bitlaw evaluate ladder/var-m --samples 5000 --out scores.json` · `bitlaw evaluate var_d16.pth "
    "--recipe paper --samples 50000 --features inception.pt --reference VIRTUAL_imagenet256_labeled.npz`"
)
def evaluate(
    model: Annotated[str, typer.Argument(help="A model, or images: a folder, or an ADM .npz.")],
    reference: Annotated[str, typer.Option(help="'ladder', statistics or images (.npz), or a folder.")] = "ladder",
    samples: Annotated[int, typer.Option(help="Images to draw.")] = 5000,
    features: Annotated[str, typer.Option(help="'ladder', or the Inception-v3 TorchScript file.")] = "ladder",
    seed: Seed = 0,
    guidance: Guidance = None,
    recipe: Recipe = None,
    sampling: Sampling = None,
    prompts: Annotated[
        Path | None, typer.Option(help="For a text-conditional model: a text file, a prompt a line.")
    ] = None,
    batch_size: Batch = 64,
    tokenizer: Tokenizer = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    option: Option = None,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON here.")] = None,
) -> None:
    """FID, sFID, IS, KID, precision and recall as JSON, with the protocol they were measured under."""
    import bitlaw
    from bitlaw.files import write_text
    from bitlaw.metrics.protocol import score_json

    path = Path(model)
    if path.suffix == ".npz" or _is_image_folder(path):
        result = _score_files(path, reference, features)
    else:
        loaded = load_model(model, tokenizer, dtype, device, option)
        with progress("images", samples) as advance:
            scored = bitlaw.evaluate(
                loaded,
                reference,
                samples,
                seed=seed,
                features=features,
                batch_size=batch_size,
                prompts=prompts.read_text(encoding="utf-8").splitlines() if prompts else None,
                progress=advance,
                recipe=recipe,
                guidance=guidance,
                **settings(sampling, "sampling"),
            )
        result = {name: score_json(score.value, score.interval) for name, score in scored.items()}
        result["protocol"] = next(iter(scored.values())).protocol.as_dict()
    text = json.dumps(result, indent=2)
    if out is not None:
        write_text(out, text + "\n")
    print(text)


def _is_image_folder(path: Path) -> bool:
    from bitlaw.metrics.samples import IMAGE_SUFFIXES

    return path.is_dir() and any(file.suffix.lower() in IMAGE_SUFFIXES for file in path.iterdir())


def _score_files(path: Path, reference: str, features: str) -> dict[str, Any]:
    """Scores of images that are there already."""
    from bitlaw.metrics.evaluation import feature_network, load_reference, score_images
    from bitlaw.metrics.protocol import score_json
    from bitlaw.metrics.samples import read_samples

    network = feature_network(features)
    target = load_reference(reference, network)
    images = read_samples(path)
    scores = score_images(images, network, target)
    result: dict[str, Any] = {name: score_json(value, interval) for name, (value, interval) in scores.items()}
    result["protocol"] = {
        "images": path.name,
        "num_images": len(images),
        "features": network.name,
        "features_fingerprint": network.fingerprint,
        "reference": target.name,
        "num_reference": target.pooled.count,
    }
    return result
