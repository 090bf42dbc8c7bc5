"""Networks quantized layer by layer, for tests that have no model around them."""

from collections.abc import Mapping

from torch import nn

from bitlaw.calibration import InputStats
from bitlaw.install import SiteParts, check_plan, install
from bitlaw.methods import RTN, LayerMethod
from bitlaw.models.generator import StepClock
from bitlaw.precision import BitPlan
from bitlaw.quantized import Clock, WeightSpec


def quantized(
    net: nn.Module,
    plan: BitPlan,
    method: LayerMethod | None = None,
    *,
    clock: Clock | None = None,
    stats: Mapping[str, InputStats] | None = None,
) -> nn.Module:
    """A copy of `net` as `plan` says, codes by `method` (rounding to nearest) from `stats` of the sites."""
    check_plan(net, plan)
    parts = {}
    for name in plan:
        if (precision := plan.weight(name)) is not None:
            weight, seen = net.get_parameter(f"{name}.weight").detach(), (stats or {}).get(name, InputStats())
            parts[name] = SiteParts((method or RTN()).quantize_layer(weight, seen, WeightSpec.of(precision)))
    return install(net, plan, parts, clock or StepClock())
