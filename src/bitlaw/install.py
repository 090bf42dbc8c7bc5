"""Put quantized layers into a network where a plan says, and read the plan back from them."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeGuard

from torch import nn

from bitlaw.formats import Params
from bitlaw.names import unknown_name
from bitlaw.precision import BitPlan
from bitlaw.prepared import InputScaling, LowRankBranch, PreparedConv2d, PreparedLinear
from bitlaw.quantized import (
    ActivationSpec,
    Clock,
    FakeQuant,
    QuantConv2d,
    QuantizedTensor,
    QuantLayer,
    QuantLinear,
    WeightSpec,
    all_finite,
)

ATTENTION_OPERANDS = ("quant_q", "quant_k", "quant_v")
"""Attributes of an attention module that see its operands; identities in full precision."""


@dataclass(frozen=True)
class SiteParts:
    """What a quantized layer has beside its plan.

    weight: None where it stays as it is
    ranges: parameters of static activation ranges, (S, 1) each, one row for each step group
    scaling, branch: what stands before and beside the layer; None leaves what it has
    """

    weight: QuantizedTensor | None = None
    ranges: Params = field(default_factory=dict)
    scaling: InputScaling | None = None
    branch: LowRankBranch | None = None


def install(net: nn.Module, plan: BitPlan, parts: Mapping[str, SiteParts], clock: Clock) -> nn.Module:
    """A copy of `net` with quantized modules wherever `plan` is not 16 bits; `parts` are those of each such site."""
    replaced: dict[int, nn.Module] = {}
    for name in plan:
        if is_changed(plan, name):
            layer = net.get_submodule(name)
            replaced[id(layer)] = quantized_layer(layer, parts.get(name, SiteParts()), plan, name, clock)
    # deepcopy puts what its memo holds in the place of the original, uncopied.
    twin = copy.deepcopy(net, dict(replaced))
    for name in plan:
        _install_attention(twin, plan, name, clock)
    return twin


def install_site(net: nn.Module, plan: BitPlan, name: str, parts: SiteParts, clock: Clock) -> None:
    """Put the quantized modules of one site into `net` itself, if `plan` changes it."""
    if is_changed(plan, name):
        net.set_submodule(name, quantized_layer(net.get_submodule(name), parts, plan, name, clock))
        _install_attention(net, plan, name, clock)


def is_changed(plan: BitPlan, name: str) -> bool:
    """Whether a plan leaves anything of a site in less than 16 bits."""
    return not all(precision.is_full for precision in plan[name])


def _install_attention(net: nn.Module, plan: BitPlan, name: str, clock: Clock) -> None:
    if any(precision.attention for precision in plan[name]):
        attention = net.get_submodule(name.rpartition(".")[0])
        specs = [ActivationSpec.of(p.attention) if p.attention else None for p in plan[name]]
        for operand in ATTENTION_OPERANDS:
            setattr(attention, operand, FakeQuant(specs, plan.step_groups, clock))


def check_plan(net: nn.Module, plan: BitPlan) -> None:
    """Raise one ValueError naming every site of `plan` that cannot be quantized so, with the change to make."""
    modules = dict(net.named_modules())
    problems = []
    for name in plan:
        if name not in modules:
            problems.append(str(unknown_name(name, _quantizable_names(net), "site")))
            continue
        module = modules[name]
        if isinstance(module, QuantLayer):
            problems.append(f"{name}: quantized already; start from the full-precision model")
        elif not is_quantizable(module):
            problems.append(f"{name}: {_found(module)}, and only {QUANTIZABLE} can be quantized; protect this site")
        elif precision := plan.weight(name):
            if problem := WeightSpec.of(precision).problem(module.weight.shape):
                problems.append(f"{name}: {problem}")
            if not all_finite(module.weight):
                problems.append(f"{name}.weight: NaN or Inf in the weights; nothing can be quantized from them")
        parent = modules.get(name.rpartition(".")[0])
        if any(p.attention for p in plan[name]) and not all(hasattr(parent, operand) for operand in ATTENTION_OPERANDS):
            problems.append(f"{name}: not inside an attention module that shows its operands; drop KV at this site")
    if problems:
        raise ValueError("\n".join(problems))


def plan_of(net: nn.Module) -> BitPlan | None:
    """The plan of a network's quantized sites, read from its layers; None if it is in full precision."""
    layers = {name: module for name, module in net.named_modules() if isinstance(module, QuantLayer)}
    if not layers:
        return None
    step_groups = next(iter(layers.values())).input_quant.step_groups
    return BitPlan({name: layer.precisions for name, layer in layers.items()}, step_groups)


QUANTIZABLE = "a linear or a plain convolution (nn.Conv2d padded with zeros)"


def is_quantizable(module: nn.Module) -> TypeGuard[nn.Linear | nn.Conv2d]:
    """Whether a layer has a quantized twin.

    Subclasses of nn.Linear are taken for linears. Those of nn.Conv2d often add something to the convolution, which the
    twin would leave out: they must not have a `forward` of their own.
    """
    if not isinstance(module, nn.Conv2d):
        return isinstance(module, nn.Linear)
    if isinstance(module, PreparedConv2d):  # whose scaling the twin takes over
        return True
    own = type(module)
    is_plain = own.forward is nn.Conv2d.forward and own._conv_forward is nn.Conv2d._conv_forward
    return is_plain and module.padding_mode == "zeros"


def quantized_layer(layer: nn.Module, parts: SiteParts, plan: BitPlan, name: str, clock: Clock) -> QuantLayer:
    """The quantized twin of a layer, for a site of this name; the layer stays as it is."""
    assert is_quantizable(layer)  # `check_plan` has seen to it
    # Ranges are there for a whole site or not at all, whatever its step groups.
    rest = (parts.weight, plan[name], plan.step_groups, clock, parts.ranges or None)
    if isinstance(layer, nn.Conv2d):
        return QuantConv2d(PreparedConv2d.of(layer, parts.scaling) if parts.scaling else layer, *rest)
    if parts.scaling or parts.branch:
        layer = PreparedLinear.of(layer, parts.scaling, parts.branch)
    return QuantLinear(layer, *rest)


def _found(module: nn.Module) -> str:
    """What a layer is, for those who may not know why it cannot be quantized."""
    found = type(module).__name__
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return f"{found} with {module.padding_mode} padding"
    return found


def _quantizable_names(net: nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if is_quantizable(module)]
