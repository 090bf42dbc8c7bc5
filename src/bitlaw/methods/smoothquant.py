"""SmoothQuant: what makes activations hard to quantize goes to the weights (Xiao et al. 2023).

Legend: C input channels, I inputs of an output channel, O output channels, R rows of a sample.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bitlaw.calibration import InputStats
from bitlaw.methods.method import Note, Rescaling, Transform
from bitlaw.methods.rescale import absorber_users, can_fold, of_weight, rescale, weight_absmax
from bitlaw.models.generator import Site
from bitlaw.precision import BitPlan
from bitlaw.prepared import rounded
from bitlaw.quantized import ActivationSpec, WeightSpec

GRID = tuple(i / 10 for i in range(11))
"""Alphas that are tried where it is searched, beside no scale at all."""


@dataclass(frozen=True)
class SmoothQuant(Transform):
    """x_C -> x_C / s_C and W -> W s with s_C = max|x_C|^alpha / max|w_C|^(1 - alpha), at sites with quantized inputs.

    Sites that share what absorbs their scale share s; their max|w_C| is over all of them. Scales are divided by their
    geometric mean, which changes no result but keeps numbers as large as they were. Channels in which nothing enters,
    or which have no weight, keep their scale. Where only weights are quantized there is nothing to do.

    alpha: None searches GRID for each s: the least squared error that the sites which share it make with calibration's
           sample of rows, weights and inputs rounded to nearest as the plan says. Sites that no alpha helps stay as
           they are.
    explicit: whether sites without absorber get a scale at their input, which costs a product when the model runs
    """

    alpha: float | None = 0.5
    explicit: bool = True

    # The rows are for the search; every chain keeps them anyway.
    needs: ClassVar[frozenset[str]] = frozenset({"low_C", "high_C", "rows_RI"})

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"smoothquant: alpha {self.alpha:g} must be from 0 to 1, or none to search it")

    def problem(self, layer: nn.Module, spec: WeightSpec) -> str | None:
        """Convolutions of several groups, where alpha is searched."""
        if self.alpha is None and isinstance(layer, nn.Conv2d) and layer.groups > 1:
            return f"a convolution of {layer.groups} groups, for which alpha is not searched; give one"
        return None

    def apply(
        self, net: nn.Module, sites: Sequence[Site], plan: BitPlan, stats: Mapping[str, InputStats]
    ) -> dict[str, Note]:
        """Rescale the inputs of the sites in place. All scales are found before the first is applied."""
        wanted = [s.name for s in sites if plan.weight(s.name) and any(p.activation for p in plan[s.name])]
        rescalings: dict[str, Rescaling] = {}
        notes: dict[str, Note] = {}
        users = list(absorber_users(sites).values())
        for names in _together(users, wanted):
            is_whole = names in users
            if not self.explicit and not (is_whole and can_fold(net, sites, names[0])):
                notes |= {name: {"skipped": "nothing before it absorbs a scale"} for name in names}
                continue
            alpha, scale_C = self._choose(net, names, plan, stats)
            if alpha is None:
                notes |= {name: {"skipped": "no alpha makes its error smaller"} for name in names}
                continue
            scales = f"{float(scale_C.min()):.3g} to {float(scale_C.max()):.3g}"
            rescalings |= {name: Rescaling(scale_C) for name in names}
            notes |= {name: {"alpha": alpha, "scales": scales} for name in names}
        folded = rescale(net, sites, rescalings)
        for name in rescalings:
            notes[name]["folded"] = name in folded
        return notes

    def _choose(
        self, net: nn.Module, names: Sequence[str], plan: BitPlan, stats: Mapping[str, InputStats]
    ) -> tuple[float | None, Tensor]:
        """Alpha and scale of sites that share one; None where none helps."""
        x_C = stats[names[0]].absmax_C
        assert x_C is not None  # in `needs`
        x_C = x_C.double()
        w_C = torch.stack([weight_absmax(net.get_submodule(name)) for name in names]).amax(0).to(x_C)
        if self.alpha is not None:
            return self.alpha, smoothing_scale(x_C, w_C, self.alpha)

        def error(scale_C: Tensor) -> float:
            return sum(_error(net.get_submodule(name), stats[name], plan, name, scale_C) for name in names)

        best: tuple[float | None, Tensor] = (None, torch.ones_like(x_C, dtype=torch.float32))
        least = error(best[1])
        for alpha in GRID:
            scale_C = smoothing_scale(x_C, w_C, alpha)
            if (its_error := error(scale_C)) < least:
                best, least = (alpha, scale_C), its_error
        return best


def smoothing_scale(x_C: Tensor, w_C: Tensor, alpha: float) -> Tensor:
    """s_C from max|x_C| and max|w_C|, float32 numbers that float16 holds, with a geometric mean of 1."""
    alive_C = (x_C > 0) & (w_C > 0)
    log_C = alpha * x_C.double().log() - (1 - alpha) * w_C.double().log()
    mean = log_C[alive_C].mean() if alive_C.any() else 0.0
    # Within what float16 holds with all its digits, also where the scale is explicit.
    return rounded(torch.where(alive_C, (log_C - mean).clamp(-7, 7).exp(), 1.0).float())


def _error(layer: nn.Module, stats: InputStats, plan: BitPlan, name: str, scale_C: Tensor) -> float:
    """|Q(x / s) Q(W s) - x W|^2 over the sampled rows, in the mean over the ways in which step groups round inputs.

    A range for each token is taken for each row; other ranges, an image's and a static one's, from all rows.
    """
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    x_RI, precision = stats.rows_RI, plan.weight(name)
    assert x_RI is not None and precision is not None
    weight = layer.weight.detach().float()
    x_RI = x_RI.to(weight)
    exact_RO = x_RI @ weight.flatten(1).T
    scale_C = scale_C.to(weight)
    scaled = WeightSpec.of(precision).quantize(weight * of_weight(layer, scale_C)).decode().flatten(1)
    scaled_RI = x_RI / scale_C.repeat_interleave(x_RI.shape[1] // len(scale_C))
    errors = []
    for activation in {p.activation: None for p in plan[name] if p.activation}:
        is_by_row = isinstance(layer, nn.Linear) and ActivationSpec.of(activation).range_of == "token"
        x_GN = scaled_RI if is_by_row else scaled_RI.reshape(1, -1)
        rounded_RI = activation.format.fake(x_GN).view(x_RI.shape)
        errors.append(float((rounded_RI @ scaled.T - exact_RO).double().square().sum()))
    return sum(errors) / len(errors)


def _together(users: Sequence[list[str]], wanted: Sequence[str]) -> list[list[str]]:
    """The wanted sites in groups that share a scale; those whose absorber has other users stand alone."""
    groups: list[list[str]] = []
    shared: set[str] = set()
    for names in users:
        if all(name in wanted for name in names):
            groups.append(names)
            shared.update(names)
    return groups + [[name] for name in wanted if name not in shared]
