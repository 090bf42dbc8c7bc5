"""The range of a group of weights by search: narrower than they are, where that costs less than coarse steps.

Legend: O output channels, I inputs of an output channel, G groups, N numbers in a group.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bitlaw.calibration import InputStats
from bitlaw.formats import Format
from bitlaw.methods.method import LayerMethod
from bitlaw.quantized import QuantizedTensor, WeightSpec


@dataclass(frozen=True)
class ClipSearch(LayerMethod):
    """For each group the range of least squared error weighted by E[x_I^2], out of a grid; every weight to its nearest.

    The weighted error is that of the output if inputs were uncorrelated. Ranges are `num_ratios` multiples of the whole
    one, from 1 down to `smallest`, so that no group is worse than RTN on it. A codebook has no range: it is the one
    fitted with these weights, or RTN's where that is better.
    """

    smallest: float = 0.3
    num_ratios: int = 29

    needs: ClassVar[frozenset[str]] = frozenset({"second_moment_I"})

    def __post_init__(self) -> None:
        if not (0 < self.smallest < 1 and self.num_ratios >= 2):
            raise ValueError(
                f"clip: {self.num_ratios} ratios from 1 down to {self.smallest:g}; take 2 or more, down to one between "
                "0 and 1"
            )

    def quantize(self, weight_OI: Tensor, stats: InputStats, spec: WeightSpec) -> QuantizedTensor:
        """ValueError for NaN or Inf in the weight or in E[x_I^2]."""
        spec.check(weight_OI)
        assert stats.second_moment_I is not None  # in `needs`
        importance_I = stats.second_moment_I.to(weight_OI.device)
        if spec.format.codebook_shape:
            fitted = spec.quantize(weight_OI, importance_I=importance_I), spec.quantize(weight_OI)
            return min(fitted, key=lambda q: float(((q.decode() - weight_OI).square() * importance_I).sum()))
        weight_GN = spec.groups(weight_OI.float())
        clipped_GN = weight_GN * self.best_ratios(weight_OI, importance_I, spec)
        params = spec.format.storable(spec.format.fit(clipped_GN))
        codes_GN = spec.format.encode(weight_GN, params)
        return QuantizedTensor(spec.join(codes_GN, weight_OI.shape), params, spec, tuple(weight_OI.shape))

    def best_ratios(self, weight_OI: Tensor, importance_I: Tensor, spec: WeightSpec) -> Tensor:
        """The best range of each group as a multiple of the whole one, (G, 1). ValueError for an importance of NaN."""
        if not bool(importance_I.isfinite().all()):
            raise ValueError("NaN or Inf in the second moments of a layer's inputs; look for them in the inputs")
        weight_GN = spec.groups(weight_OI.float())
        importance_GN = spec.groups(importance_I.to(weight_GN).expand(weight_OI.shape[0], -1))
        best_G1 = weight_GN.new_ones(len(weight_GN), 1)
        least_G1 = _error(weight_GN, importance_GN, best_G1, spec.format)
        for ratio in torch.linspace(1, self.smallest, self.num_ratios, device=best_G1.device)[1:]:
            error_G1 = _error(weight_GN, importance_GN, ratio, spec.format)
            is_less_G1 = error_G1 < least_G1
            best_G1, least_G1 = torch.where(is_less_G1, ratio, best_G1), torch.where(is_less_G1, error_G1, least_G1)
        return best_G1


def _error(weight_GN: Tensor, importance_GN: Tensor, ratio: Tensor, format: Format) -> Tensor:
    """Weighted squared error of each group, (G, 1), at ranges that are multiples of the whole one."""
    params = format.storable(format.fit(weight_GN * ratio))
    return (format.nearest(weight_GN, params) - weight_GN).square_().mul_(importance_GN).sum(-1, keepdim=True)
