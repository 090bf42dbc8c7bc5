"""What the name of a method means, be it post-training quantization or distillation: `smoothquant+gptq`,
`distill:topkld,steps=300`."""

from dataclasses import replace
from typing import Any

from bitlaw.calibration.settings import Calibration
from bitlaw.distill.settings import Distillation, is_distillation, parse_distillation
from bitlaw.distill.trainer import ModelT, check_distillable, distill
from bitlaw.methods.method import BlockMethod
from bitlaw.methods.quantize import Protect, as_chain, check_quantizable, quantize
from bitlaw.models.generator import ImageGenerator
from bitlaw.precision import Precision


def parse(method: str) -> Distillation | None:
    """The settings of a distillation; None for a post-training method. ValueError for what is neither."""
    if is_distillation(method):
        settings = parse_distillation(method)
        as_chain(settings.start)
        return settings
    as_chain(method)
    return None


def check(
    model: ImageGenerator[Any], precision: Precision, method: str, protect: Protect = "first-last", step_groups: int = 1
) -> None:
    """Raise the ValueError that `apply` would raise."""
    settings = parse(method)
    if settings is None:
        check_quantizable(model, precision, protect, method, step_groups)
    else:
        check_distillable(model, precision, settings, protect, step_groups)


def cost_in_images(model: ImageGenerator[Any], method: str, calibration: Calibration, is_static: bool = False) -> float:
    """What `apply` costs, as a number of images that the model could draw instead: roughly, for an estimate of time.

    A calibration draws its images once, and about twice more where blocks run again behind quantized ones. A step of
    training takes about four passes of the network for each image of its batch: two forward, one backward.
    """
    settings = parse(method)
    chain = as_chain(method if settings is None else settings.start)
    goes_by_blocks = isinstance(chain.final, BlockMethod) or getattr(chain.final, "sequential", False)
    images = calibration.num_images * (3 if goes_by_blocks else 1) if chain.needs_calibration or is_static else 0
    if settings is None:
        return images
    branches = 1 if model.sampling.guidance == 1 else 2
    # One pass has all of VAR's stages or LlamaGen's positions in it, and one timestep of a diffusion model.
    passes = branches if model.vocab_size is not None else branches * model.num_steps
    return images + 4 * settings.steps * settings.batch_size / passes


def apply(
    model: ModelT,
    precision: Precision,
    method: str,
    protect: Protect = "first-last",
    *,
    calibration: Calibration | None = None,
    step_groups: int = 1,
    seed: int = 0,
) -> ModelT:
    """A quantized copy of a model. `seed` is that of a training; post-training methods have none."""
    given: dict[str, Any] = {"protect": protect, "calibration": calibration, "step_groups": step_groups}
    settings = parse(method)
    if settings is None:
        return quantize(model, precision, method, **given)
    return distill(model, precision, replace(settings, seed=settings.seed + seed), **given)
