"""What the name of a method means in a study, mixed precision included: `mixed:then=gptq` beside `gptq` and
`distill:topkld,steps=300`.

With it a precision, W4A8, is an average: the numbers of all weights that are not protected have 4 bits in the mean, and
those of all inputs 8.
"""

from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from bitlaw.allocation.allocate import allocate
from bitlaw.allocation.curves import FLOATS, NUMBERS, CurveSettings
from bitlaw.allocation.exact import measure_curves
from bitlaw.allocation.sketch import sketch_curves
from bitlaw.calibration.settings import Calibration
from bitlaw.distill import by_name, distill
from bitlaw.distill.trainer import ModelT
from bitlaw.formats import Format, format_name
from bitlaw.methods.chain import settings_of
from bitlaw.methods.quantize import Protect, equal_groups, quantize
from bitlaw.models.generator import ImageGenerator
from bitlaw.precision import BitPlan, Precision

PREFIX = "mixed"
"""What a method begins with whose precision is an average."""

COST_OF_IMAGE = 40
"""Roughly how many images could be drawn instead of measuring the curves on one, or sketching them."""


@dataclass(frozen=True)
class MixedPrecision:
    """How widths are found, and what then quantizes with them.

    mode: of the curves, exact or sketch
    measure: of distortion, "" for what suits the family
    num_images: that curves are measured on
    step_groups: equal groups of steps in each of which inputs have widths and ranges of their own; 0 for as many as
        whoever asks has for ranges
    curves: the method whose codes curves are measured with
    then: a post-training method or a distillation, which carries out the plan
    """

    mode: Literal["exact", "sketch"] = "exact"
    measure: str = ""
    num_images: int = 16
    step_groups: int = 0
    curves: str = "rtn"
    then: str = "rtn"

    def __post_init__(self) -> None:
        if self.mode not in ("exact", "sketch"):
            raise ValueError(f"mixed: mode '{self.mode}' must be exact or sketch")
        if self.step_groups < 0:
            raise ValueError(f"mixed: step_groups {self.step_groups} must be 0 or more")
        by_name.parse(self.then)


def parse_mixed(method: str) -> MixedPrecision | None:
    """The settings of `mixed:mode=sketch,then=gptq`; None for another method. `then` comes last and takes the rest.

    ValueError for a setting that does not exist or a value that it cannot have.
    """
    name, _, rest = method.partition(":")
    if name != PREFIX:
        return None
    rest, _, then = rest.partition("then=")
    given: dict[str, Any] = {"then": then} if then else {}
    known = {field.name: field.default for field in fields(MixedPrecision)}
    return MixedPrecision(**(given | settings_of(rest.split(","), known, PREFIX, method)))


def parse(method: str) -> None:
    """Raise ValueError for what is no method."""
    if parse_mixed(method) is None:
        by_name.parse(method)


def check(
    model: ImageGenerator[Any], precision: Precision, method: str, protect: Protect = "first-last", step_groups: int = 1
) -> None:
    """Raise the ValueError that `apply` would raise before work."""
    mixed = parse_mixed(method)
    if mixed is not None:
        curve_settings(model, precision, mixed, protect, step_groups)
        method, step_groups = mixed.then, mixed.step_groups or step_groups
    by_name.check(model, precision, method, protect, step_groups)


def cost_in_images(model: ImageGenerator[Any], method: str, calibration: Calibration, is_static: bool = False) -> float:
    """What `apply` costs, as a number of images that the model could draw instead: roughly, for an estimate of time."""
    mixed = parse_mixed(method)
    if mixed is None:
        return by_name.cost_in_images(model, method, calibration, is_static)
    then = by_name.cost_in_images(model, mixed.then, calibration, is_static)
    return then + COST_OF_IMAGE * mixed.num_images


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
    """A quantized copy of a model. `seed` is that of a training; nothing else has one."""
    mixed = parse_mixed(method)
    if mixed is None:
        return by_name.apply(
            model, precision, method, protect, calibration=calibration, step_groups=step_groups, seed=seed
        )
    plan = plan_of_average(model, precision, mixed, protect, step_groups)
    settings = by_name.parse(mixed.then)
    if settings is None:
        return quantize(model, plan, mixed.then, calibration=calibration)
    return distill(model, plan, replace(settings, seed=settings.seed + seed), calibration=calibration)


def curve_settings(
    model: ImageGenerator[Any], precision: Precision, mixed: MixedPrecision, protect: Protect, step_groups: int
) -> CurveSettings:
    """What has to be measured for an average precision. ValueError for one that curves do not describe."""
    if precision.attention is not None:
        raise ValueError(f"precision {precision}: mixed precision is of weights and inputs; leave KV out")
    for tensor in (precision.weight, precision.activation):
        if tensor is not None and tensor.group_size == "tensor":
            raise ValueError(f"precision {precision}: mixed precision has no t; leave it out, or use c for inputs")
    what = {(True, True): "both", (True, False): "weights", (False, True): "inputs"}
    numbers = "int" if precision.weight is None else _numbers_of(precision.weight.format)
    if precision.activation is not None and _numbers_of(precision.activation.format) != "int":
        raise ValueError(f"precision {precision}: mixed precision of inputs is of integers with a zero point; use A8")
    return CurveSettings.at_all_widths(
        numbers=numbers,
        group_size=precision.weight.group_size if precision.weight else None,
        static_inputs=precision.is_static,
        what=what[precision.weight is not None, precision.activation is not None],
        method=mixed.curves,
        protect=(protect,) if isinstance(protect, str) else tuple(protect),
        step_groups=equal_groups(mixed.step_groups or step_groups, model.num_steps),
        measure=mixed.measure,
        num_images=mixed.num_images,
    )


def _numbers_of(format: Format) -> str:
    """The kind of number whose format at this width it is. ValueError where there is none: it would get another."""
    for kind, at in NUMBERS.items():
        with suppress(ValueError):
            if at(int(format.code_bits)) == format:
                return kind
    raise ValueError(
        f"{format_name(format)} is not among the formats that mixed precision chooses from: integers, symmetric ones, "
        f"floats {', '.join(FLOATS.values())} and codebooks v2b*"
    )


def plan_of_average(
    model: ImageGenerator[Any], precision: Precision, mixed: MixedPrecision, protect: Protect, step_groups: int
) -> BitPlan:
    """The plan of least distortion whose weights and inputs have these many bits in the mean, or fewer.

    Inputs are counted as paper 004 does, see `allocate.BUDGETS`.
    """
    settings = curve_settings(model, precision, mixed, protect, step_groups)
    curves = (measure_curves if mixed.mode == "exact" else sketch_curves)(model, settings)
    budgets = {}
    if precision.weight is not None:
        budgets["bits_per_weight"] = precision.weight_bits
    if precision.activation is not None:
        budgets["bits_per_activation"] = precision.activation_bits
    return allocate(model, curves, budgets).plan
