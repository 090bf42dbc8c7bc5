"""SVDQuant: a branch of low rank in 16 bits takes what is hard to quantize off the weight (Li et al. 2024).

Legend: O output channels, I input channels, R rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from bitlaw.calibration import InputStats
from bitlaw.methods.method import Note, Transform
from bitlaw.methods.smoothquant import SmoothQuant
from bitlaw.models.generator import Site
from bitlaw.precision import BitPlan
from bitlaw.prepared import STORED, LowRankBranch, PreparedLinear
from bitlaw.quantized import WeightSpec


@dataclass(frozen=True)
class SVDQuant(Transform):
    """W x = up down x + (W - up down) x: the first singular vectors in float16, the rest for what follows.

    Inputs are smoothed before, as by SmoothQuant, where they are quantized: outliers go to the weight, and from there
    to the branch, whose input is in full precision. The branch is counted with the bits of the model. Linears only.

    alpha: of the smoothing; None searches it as SmoothQuant does, which does not know of the branch
    """

    rank: int = 16
    alpha: float | None = 0.5

    needs: ClassVar[frozenset[str]] = SmoothQuant.needs

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"svdquant: rank {self.rank} must be 1 or more")
        SmoothQuant(self.alpha)

    def problem(self, layer: nn.Module, spec: WeightSpec) -> str | None:
        """Convolutions, and layers that the branch would replace."""
        if not isinstance(layer, nn.Linear):
            return "svdquant has branches for linears only; use smoothquant or protect this site"
        if self.rank >= min(layer.weight.shape):
            sides = f"{layer.out_features} x {layer.in_features}"
            return f"a branch of rank {self.rank} is all of a weight of {sides}; lower the rank or protect this site"
        return None

    def apply(
        self, net: nn.Module, sites: Sequence[Site], plan: BitPlan, stats: Mapping[str, InputStats]
    ) -> dict[str, Note]:
        """Smooth the inputs, and split the weights of the sites in place. ValueError for sites with a branch."""
        chosen = [site.name for site in sites if plan.weight(site.name)]
        if split := [name for name in chosen if getattr(net.get_submodule(name), "branch", None) is not None]:
            raise ValueError("\n".join(f"{name}: has a low-rank branch already; use svdquant once" for name in split))
        notes = SmoothQuant(self.alpha).apply(net, sites, plan, stats)
        for name in chosen:
            layer = net.get_submodule(name)
            assert isinstance(layer, nn.Linear)  # `problem` has seen to it
            weight_OI = layer.weight.detach().double()
            u_OR, s_R, v_RI = torch.linalg.svd(weight_OI, full_matrices=False)
            share = float(s_R[: self.rank].square().sum() / s_R.square().sum().clamp_min(1e-300))
            root_R = s_R[: self.rank].sqrt()
            up_OR = (u_OR[:, : self.rank] * root_R).to(STORED)
            down_RI = (root_R[:, None] * v_RI[: self.rank]).to(STORED)
            prepared = PreparedLinear.of(layer, branch=LowRankBranch(down_RI.float(), up_OR.float()))
            # What rounding to float16 takes from the branch stays in the residual.
            residual_OI = weight_OI - up_OR.double() @ down_RI.double()
            prepared.weight = nn.Parameter(residual_OI.to(layer.weight.dtype), requires_grad=False)
            net.set_submodule(name, prepared)
            notes[name] = {**notes.get(name, {}), "rank": self.rank, "share": share}
        return notes
