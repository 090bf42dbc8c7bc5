"""What the name of a method means, be it post-training quantization or distillation: `smoothquant+gptq`,
`distill:topkld,steps=300`."""

from dataclasses import replace
from typing import Any

from bitlaw.calibration.settings import Calibration
from bitlaw.distill.settings import Distillation, is_distillation, parse_distillation
from bitlaw.distill.trainer import ModelT, check_distillable, distill
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
