"""Quantize a model: choose codes with a method, and put the quantized modules where a plan says."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from bitlaw.calibration import InputStats
from bitlaw.install import check_plan, install
from bitlaw.methods import METHODS
from bitlaw.methods.method import LayerMethod
from bitlaw.models.generator import ImageGenerator
from bitlaw.names import lookup
from bitlaw.precision import BitPlan, Precision
from bitlaw.quantized import Clock, WeightSpec

ModelT = TypeVar("ModelT", bound=ImageGenerator[Any])
Protect = str | Sequence[str]


def quantize(
    model: ModelT,
    precision: Precision | str | BitPlan,
    method: LayerMethod | str = "rtn",
    protect: Protect = "first-last",
) -> ModelT:
    """A quantized copy of a model. `precision` is one for all sites but those that `protect` names, or a plan.

    The decoder is shared with the original, the network is not. Raises one ValueError naming every site that cannot be
    quantized so, before any is.
    """
    plan = plan_for(model, precision, protect)
    twin = copy.copy(model)
    twin.clock = copy.copy(model.clock)
    twin.net = quantize_network(model.net, plan, method, twin.clock)
    twin.provenance = {
        **model.provenance,
        "precision": "plan" if isinstance(precision, BitPlan) else str(Precision.parse(str(precision))),
        "method": method if isinstance(method, str) else repr(method),
        "protect": protect if isinstance(protect, str) else list(protect),
    }
    return twin


def plan_for(
    model: ImageGenerator[Any], precision: Precision | str | BitPlan, protect: Protect = "first-last"
) -> BitPlan:
    """The plan that a precision means for a model; a plan is returned as it is."""
    if isinstance(precision, BitPlan):
        return precision
    if isinstance(precision, str):
        precision = Precision.parse(precision)
    return BitPlan.uniform(precision, model.sites(), protect)


def check_quantizable(
    model: ImageGenerator[Any], precision: Precision | str | BitPlan, protect: Protect = "first-last"
) -> None:
    """Raise the ValueError that `quantize` would raise."""
    check_plan(model.net, plan_for(model, precision, protect))


def quantize_network(
    net: nn.Module,
    plan: BitPlan,
    method: LayerMethod | str,
    clock: Clock,
    stats: Mapping[str, InputStats] | None = None,
) -> nn.Module:
    """A copy of `net` whose sites are quantized as `plan` says; `stats` is what calibration has seen at each site.

    Raises one ValueError naming every site that cannot be, before any is.
    """
    method = lookup(METHODS, method, "method") if isinstance(method, str) else method
    check_plan(net, plan)
    stats = stats or {}
    weights = [name for name in plan if plan.weight(name)]
    missing = [
        f"{name}: {type(method).__name__} needs {need} of its inputs; calibrate first"
        for name in weights
        for need in sorted(method.needs)
        if getattr(stats.get(name), need, None) is None
    ]
    if missing:
        raise ValueError("\n".join(missing))
    quantized = {}
    for name in weights:
        precision = plan.weight(name)
        assert precision is not None
        weight = net.get_parameter(f"{name}.weight").detach()
        chosen = method.quantize(weight.flatten(1), stats.get(name, InputStats()), WeightSpec.of(precision))
        quantized[name] = replace(chosen, shape=tuple(weight.shape))
    return install(net, plan, quantized, clock)
