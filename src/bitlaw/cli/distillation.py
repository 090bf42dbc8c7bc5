"""The command that trains quantized models."""

import os
import shutil
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitlaw.cli.allocation import check_size, noted, precision_or_plan
from bitlaw.cli.app import app, out_console, stages
from bitlaw.cli.checkpoints import describe
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
    from bitlaw.training import Events


@app.command(
    epilog="Examples: `bitlaw distill ladder/var-s --precision W3A16 --loss topkld --out var-s-w3` · "
    "`bitlaw distill ladder/dit-s --precision W4A8 --start smoothquant+gptq --steps 800 --out dit-s-w4a8` · "
    "`bitlaw distill var_d16.pth --precision W3g128A16 --loss topkld --top-k 600 --data imagenet/train --steps 5000 "
    "--training autocast=bfloat16 --training checkpointing=true --device cuda --tensorboard runs/d16 --out d16-w3` · "
    "`accelerate launch --num_processes 4 -m bitlaw.cli distill ...` on several GPUs"
)
def distill(
    model: Model,
    out: Out,
    precision: PrecisionText = None,
    plan: PlanPath = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help="ce (no teacher), mse, js, forward-kl, reverse-kl, topkld (default) or topkld-printed; of models that "
            "predict no categories mse (default), or task (no teacher)."
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="K of topkld. Default: the sampler's, or a quarter of the vocabulary.")
    ] = None,
    start: Annotated[
        str, typer.Option(help="What is trained: a post-training method, or the directory of a quantized checkpoint.")
    ] = "rtn",
    data: Annotated[
        str | None,
        typer.Option(
            help="'ladder', a folder of images (a folder for each class), or 'generated', drawn by the teacher. "
            "Default: ladder where the model has its images, else generated."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of training.")] = 400,
    batch_size: Annotated[int, typer.Option(help="Images of a step, over all processes.")] = 64,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of the order of examples and their noise.")] = 0,
    training: Annotated[
        list[str] | None,
        typer.Option("--training", help="Another setting, name=value; may be repeated: trainable=scales, patience=3."),
    ] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="A folder for TensorBoard's events.")] = None,
    protect: ProtectText = "first-last",
    calibration_images: CalibrationImages = 64,
    guidance: Guidance = None,
    sampling: Sampling = None,
    calibration: CalibrationSettings = None,
    tokenizer: Tokenizer = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    option: Option = None,
) -> None:
    """Quantize a model, then train it to give what the full-precision model gives, and save it.

    What is interrupted goes on where it was when the same command is given again.
    """
    import bitlaw
    from bitlaw.allocation.plan_file import PlanFile, check_plan_for
    from bitlaw.distill import Distillation, distill_from
    from bitlaw.distill import distill as train
    from bitlaw.models.loading import is_checkpoint
    from bitlaw.names import check_keywords

    refuse_existing(out)
    rest = settings(training, "training")
    check_keywords([field.name for field in fields(Distillation)], rest, "training setting")
    begin = Path(start)
    from_checkpoint = begin.is_dir() and is_checkpoint(begin)
    if from_checkpoint and plan is not None:
        raise ValueError(f"--start {start} is quantized as it is; leave --plan out, or start from a method")
    wanted = precision_or_plan(precision, plan, {"--protect": protect != "first-last"})
    given: dict[str, Any] = {
        "start": "rtn" if from_checkpoint else start,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
    }
    chosen = Distillation(loss=loss, top_k=top_k, data=data, steps=steps, **given, **rest)
    teacher = load_model(model, tokenizer, dtype, device, option)
    is_first = os.environ.get("RANK", "0") == "0"
    work = out.with_name(f".{out.name}.work")
    events = _events(tensorboard) if is_first else None

    def report(text: str) -> None:
        out_console.print(text, highlight=False)

    with stages() if is_first else nullcontext() as progress:
        if from_checkpoint:
            quantized = bitlaw.load(begin, tokenizer, device=device)
            small = distill_from(quantized, teacher, chosen, work=work, progress=progress, report=report, events=events)
        else:
            small = train(
                teacher,
                check_plan_for(teacher, wanted) if isinstance(wanted, PlanFile) else wanted,
                chosen,
                protect=parse_protect(protect),
                calibration=calibration_of(calibration_images, guidance, sampling, calibration),
                work=work,
                progress=progress,
                report=report,
                events=events,
            )
    if is_first:
        if isinstance(wanted, PlanFile) and plan is not None:
            noted(small, wanted, plan)
        small.save(out)
        shutil.rmtree(work, ignore_errors=True)
        out_console.print(describe(bitlaw.load(out), str(out)))
        if isinstance(wanted, PlanFile) and (line := check_size(wanted, out)):
            out_console.print(line, highlight=False)


def _events(folder: Path | None) -> "Events | None":
    """A writer of TensorBoard's events."""
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("--tensorboard needs tensorboard: pip install 'bitlaw[train]'") from error
    writer: Events = SummaryWriter(folder)
    return writer
