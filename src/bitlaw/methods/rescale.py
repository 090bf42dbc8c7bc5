"""Rescaled inputs of sites: in what lies before them where that is exact, and as a scale of their own where not.

A network computes the same when the input of a layer becomes (x - shift) / scale and the layer's weight and bias undo
it: W x + b = (W scale) (x - shift) / scale + (W shift + b). What makes x can often do it for nothing (`Site.absorber`).

Legend: O output channels, I input channels of one group of a convolution, C input channels.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from bitlaw.methods.method import Rescaling
from bitlaw.models.generator import Absorber, AbsorberPart, Site
from bitlaw.prepared import InputScaling, PreparedConv2d, PreparedLinear, rounded


def rescale(net: nn.Module, sites: Sequence[Site], rescalings: Mapping[str, Rescaling]) -> set[str]:
    """Rescale the inputs of sites in place, by name, so that `net` computes the same; names of those that are folded.

    A rescaling is folded into the site's absorber if all sites that share it are given and are linears and
    convolutions without an input scale, and if the absorber can do it. The other layers become PreparedLinear and
    PreparedConv2d; their scales and shifts are rounded to what can be stored, and a scale that is there already is
    joined with the new one, which is of its outputs. Names in the state dict stay as they are.

    Arithmetic is in float64, and parameters are replaced, not written to: they may be mapped from a file.
    Raises one ValueError naming every site whose rescaling does not fit, before anything is changed.
    """
    users = absorber_users(sites)
    _check(net, sites, users, rescalings)
    folded: set[str] = set()
    for absorber, names in users.items():
        if all(name in rescalings for name in names) and _can_fold(net, absorber, names, rescalings[names[0]]):
            _absorb(net, absorber, rescalings[names[0]])
            folded.update(names)
    for name, rescaling in rescalings.items():
        layer = net.get_submodule(name)
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        if name in folded:
            _undo(layer, name, rescaling.scale_C.double(), rescaling.shift_C)
        else:
            net.set_submodule(name, _with_scaling(layer, name, rescaling))
    return folded


def absorber_users(sites: Iterable[Site]) -> dict[Absorber, list[str]]:
    """Names of the sites that share each absorber."""
    users: dict[Absorber, list[str]] = {}
    for site in sites:
        if site.absorber is not None:
            users.setdefault(site.absorber, []).append(site.name)
    return users


def can_fold(net: nn.Module, sites: Sequence[Site], name: str, shift: bool = False) -> bool:
    """Whether `rescale` would fold what is asked for this site, given that all sites that share its absorber get it."""
    for absorber, names in absorber_users(sites).items():
        if name in names:
            ones_C = torch.ones(input_channels(net.get_submodule(name)))
            return _can_fold(net, absorber, names, Rescaling(ones_C, ones_C if shift else None))
    return False


def shift_problem(layer: nn.Module) -> str | None:
    """Why the input of this layer cannot be shifted; None if it can."""
    if isinstance(layer, nn.Conv2d):
        return "a convolution, whose padding would not be shifted; scale it only"
    if getattr(layer, "bias", None) is None:
        return "no bias that could undo a shift of its input; scale it only"
    if hasattr(layer, "has_bias"):  # VAR's keys: official checkpoints have no place for what would be theirs
        return "no bias for its keys that could undo a shift of its input; scale it only"
    return None


def input_channels(layer: nn.Module) -> int:
    """C of a linear or convolution."""
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    return layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features


def weight_absmax(layer: nn.Module) -> Tensor:
    """max |w_C| over all that an input channel is multiplied with, float32."""
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    largest_OI = layer.weight.detach().abs().flatten(1).unflatten(1, (layer.weight.shape[1], -1)).amax(2)
    return largest_OI.unflatten(0, (groups, -1)).amax(1).flatten().float()


def of_weight(layer: nn.Module, per_channel_C: Tensor) -> Tensor:
    """Numbers of the input channels, in a shape to multiply the layer's weight with."""
    if not isinstance(layer, nn.Conv2d):
        return per_channel_C
    of_groups_GI = per_channel_C.view(layer.groups, -1)
    return of_groups_GI.repeat_interleave(layer.out_channels // layer.groups, 0)[:, :, None, None]


def _check(
    net: nn.Module, sites: Sequence[Site], users: Mapping[Absorber, list[str]], rescalings: Mapping[str, Rescaling]
) -> None:
    known = {site.name for site in sites}
    problems = []
    for name, rescaling in rescalings.items():
        layer = net.get_submodule(name) if name in known else None
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            problems.append(f"{name}: rescaling of what is no linear or convolution of the network in full precision")
            continue
        num_channels, scale_C, shift_C = input_channels(layer), rescaling.scale_C, rescaling.shift_C
        if scale_C.shape != (num_channels,) or (shift_C is not None and shift_C.shape != (num_channels,)):
            problems.append(f"{name}: scale or shift not of its {num_channels} input channels")
        elif not (bool((scale_C > 0).all()) and bool(scale_C.isfinite().all())):
            problems.append(f"{name}: scales have to be positive and finite")
        elif shift_C is not None and not bool(shift_C.isfinite().all()):
            problems.append(f"{name}: shifts have to be finite")
        elif shift_C is not None and (problem := shift_problem(layer)):
            problems.append(f"{name}: {problem}")
        if getattr(layer, "branch", None) is not None:
            problems.append(f"{name}: has a low-rank branch already; rescale before it is split off")
    for names in users.values():
        given = [rescalings[name] for name in names if name in rescalings]
        if len(given) == len(names) and not all(_equal(given[0], other) for other in given):
            problems.append(f"{', '.join(names)}: share what absorbs their scales, and so must have equal ones")
    if problems:
        raise ValueError("\n".join(problems))


def _equal(a: Rescaling, b: Rescaling) -> bool:
    if (a.shift_C is None) != (b.shift_C is None):
        return False
    return torch.equal(a.scale_C, b.scale_C) and (
        a.shift_C is None or b.shift_C is None or torch.equal(a.shift_C, b.shift_C)
    )


def _can_fold(net: nn.Module, absorber: Absorber, names: Sequence[str], rescaling: Rescaling) -> bool:
    """Whether absorber and sites are as they were declared: not quantized, with no scale or branch between them."""
    layers = [net.get_submodule(name) for name in names]
    makers = [net.get_submodule(part.module) for part in absorber.parts]
    return (
        (rescaling.shift_C is None or absorber.shifts)
        and all(isinstance(layer, nn.Linear | nn.Conv2d) for layer in layers)
        and all(getattr(layer, "scaling", None) is None for layer in layers)
        and all(isinstance(maker, nn.Linear) or part.role == "norm" for maker, part in _pairs(makers, absorber))
        and all(getattr(maker, "branch", None) is None for maker in makers)
    )


def _pairs(makers: Sequence[nn.Module], absorber: Absorber) -> Iterable[tuple[nn.Module, AbsorberPart]]:
    return zip(makers, absorber.parts, strict=True)


def _absorb(net: nn.Module, absorber: Absorber, rescaling: Rescaling) -> None:
    """Let what makes x make (x - shift) / scale."""
    for part in absorber.parts:
        maker = net.get_submodule(part.module)
        parameters = dict(maker.named_parameters())
        weight = parameters["weight"].detach().to(torch.float64, copy=True)
        bias = parameters["bias"].detach().to(torch.float64, copy=True) if "bias" in parameters else None
        first, end = part.rows or (0, len(weight))
        assert end - first == len(rescaling.scale_C), f"{part.module}: its part is not what enters the site"
        scale_C = rescaling.scale_C.to(weight)
        weight[first:end] /= scale_C if part.role == "norm" else scale_C[:, None]
        _replace(maker, "weight", weight, part.module)
        if part.role == "gain":
            assert bias is not None, f"{part.module}: a gain of 1 + r needs a bias"
            bias[first:end] = (1 + bias[first:end]) / scale_C - 1
        elif rescaling.shift_C is not None:
            assert bias is not None, f"{part.module}: has no bias to absorb a shift"
            bias[first:end] = (bias[first:end] - rescaling.shift_C.to(weight)) / scale_C
        elif bias is not None:
            bias[first:end] /= scale_C
        if bias is not None:
            _replace(maker, "bias", bias, part.module)


def _undo(layer: nn.Linear | nn.Conv2d, name: str, scale_C: Tensor, shift_C: Tensor | None) -> None:
    """Let a layer give for (x - shift) / scale what it gave for x."""
    weight = layer.weight.detach().double()
    if shift_C is not None:
        assert layer.bias is not None
        _replace(layer, "bias", layer.bias.detach().double() + weight @ shift_C.to(weight), name)
    _replace(layer, "weight", weight * of_weight(layer, scale_C.to(weight)), name)


def _with_scaling(layer: nn.Linear | nn.Conv2d, name: str, rescaling: Rescaling) -> PreparedLinear | PreparedConv2d:
    """The layer behind an input scale that makes up for it; one that it has already is joined with the new one."""
    scale_C, shift_C = rescaling.scale_C.to(layer.weight.device, torch.float64), rescaling.shift_C
    before = layer.scaling if isinstance(layer, PreparedLinear | PreparedConv2d) else None
    old_scale_C = torch.ones_like(scale_C) if before is None else before.scale_C.to(scale_C)
    old_shift_C = torch.zeros_like(scale_C)
    if before is not None and before.shift_C is not None:
        old_shift_C = before.shift_C.to(scale_C)
    # ((x - old shift) / old scale - shift) / scale, as one scale and one shift that can be stored ...
    together_C = rounded(old_scale_C * scale_C)
    moved_C = None
    if shift_C is not None:
        moved_C = rounded(old_shift_C + old_scale_C * shift_C.to(scale_C))
    elif bool(old_shift_C.any()):
        moved_C = old_shift_C.float()
    # ... and, once these are rounded, what the layer has to make up for.
    shift_C = None if shift_C is None or moved_C is None else (moved_C.double() - old_shift_C) / old_scale_C
    _undo(layer, name, together_C.double() / old_scale_C, shift_C)
    scaling = InputScaling(together_C, moved_C)
    return PreparedConv2d.of(layer, scaling) if isinstance(layer, nn.Conv2d) else PreparedLinear.of(layer, scaling)


def _replace(module: nn.Module, name: str, value: Tensor, path: str) -> None:
    old = module.get_parameter(name)
    new = value.to(old.dtype)
    if not bool(new.isfinite().all()):
        raise ValueError(f"{path}.{name}: rescaled, it does not fit {old.dtype}; use smaller scales, or a wider type")
    setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))
