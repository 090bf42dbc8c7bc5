"""SmoothQuant: what makes activations hard to quantize goes to the weights (Xiao et al. 2023).

Legend: C input channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bitlaw.calibration import InputStats
from bitlaw.methods.method import Note, Rescaling, Transform
from bitlaw.methods.rescale import absorber_users, can_fold, rescale, weight_absmax
from bitlaw.models.generator import Site
from bitlaw.precision import BitPlan
from bitlaw.prepared import rounded


@dataclass(frozen=True)
class SmoothQuant(Transform):
    """x_C -> x_C / s_C and W -> W s with s_C = max|x_C|^alpha / max|w_C|^(1 - alpha), at sites with quantized inputs.

    Sites that share what absorbs their scale share s; their max|w_C| is over all of them. Scales are divided by their
    geometric mean, which changes no result but keeps numbers as large as they were. Channels in which nothing enters,
    or which have no weight, keep their scale. Where only weights are quantized there is nothing to do.

    explicit: whether sites without absorber get a scale at their input, which costs a product when the model runs
    """

    alpha: float = 0.5
    explicit: bool = True

    needs: ClassVar[frozenset[str]] = frozenset({"low_C", "high_C"})

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"smoothquant: alpha {self.alpha:g} must be from 0 to 1")

    def apply(
        self, net: nn.Module, sites: Sequence[Site], plan: BitPlan, stats: Mapping[str, InputStats]
    ) -> dict[str, Note]:
        """Rescale the inputs of the sites in place."""
        wanted = [s.name for s in sites if plan.weight(s.name) and any(p.activation for p in plan[s.name])]
        rescalings: dict[str, Rescaling] = {}
        for names in _together(sites, wanted):
            if not self.explicit and not can_fold(net, sites, names[0]):
                continue
            scale_C = self._scale(net, names, stats)
            rescalings |= {name: Rescaling(scale_C) for name in names}
        folded = rescale(net, sites, rescalings)
        return {
            name: {
                "alpha": self.alpha,
                "folded": name in folded,
                "scales": f"{float(r.scale_C.min()):.3g} to {float(r.scale_C.max()):.3g}",
            }
            for name, r in rescalings.items()
        }

    def _scale(self, net: nn.Module, names: Sequence[str], stats: Mapping[str, InputStats]) -> Tensor:
        x_C = stats[names[0]].absmax_C
        assert x_C is not None  # in `needs`
        x_C = x_C.double()
        w_C = torch.stack([weight_absmax(net.get_submodule(name)) for name in names]).amax(0).double()
        alive_C = (x_C > 0) & (w_C > 0)
        log_C = self.alpha * x_C.clamp_min(1e-30).log() - (1 - self.alpha) * w_C.clamp_min(1e-30).log()
        log_C = log_C.where(alive_C, torch.zeros(())) - log_C[alive_C].mean() if alive_C.any() else log_C * 0
        # Within what float16 holds with all its digits, also where the scale is explicit.
        scale_C = log_C.where(alive_C, torch.zeros(())).clamp(-7, 7).exp()
        return rounded(scale_C.float())


def _together(sites: Sequence[Site], wanted: Sequence[str]) -> list[list[str]]:
    """The sites in groups that share a scale; those whose absorber has other users stand alone."""
    groups: list[list[str]] = []
    shared: set[str] = set()
    for names in absorber_users(sites).values():
        if all(name in wanted for name in names):
            groups.append(names)
            shared.update(names)
    return groups + [[name] for name in wanted if name not in shared]
