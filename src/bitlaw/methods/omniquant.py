"""OmniQuant: clipping of weights and equivalent transformations, learned block by block (Shao et al. 2023).

Legend: O output channels, I input channels, C input channels of a linear, G groups, N numbers in a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bitlaw.formats import Format, Params
from bitlaw.methods.clip import ClipSearch
from bitlaw.methods.method import BlockMethod, BlockResult, BlockTask, LayerMethod, Rescaling
from bitlaw.methods.reconstruction import (
    LayerTensors,
    Learner,
    ParameterGroup,
    Schedule,
    WorkingBlock,
    learn,
    width_of,
)
from bitlaw.methods.rescale import shift_problem, weight_absmax
from bitlaw.prepared import rounded
from bitlaw.quantized import QuantizedTensor, WeightSpec

_NO_CLIP = 4.0
"""The logit at which a range is the whole one. The original begins here as well, with a factor of sigmoid(4) = 0.98."""


@dataclass(frozen=True)
class OmniQuant(BlockMethod):
    """Ranges of weights, and scales and shifts of inputs, by gradient descent on the block's output (P0 eq. 8-11).

    Clipping (eq. 8-9): the range of a group is [beta min W, gamma max W], each factor sigmoid(p) / sigmoid(4) with p
    learned. Formats with one scale and no zero point have one factor.
    Transformation (eq. 10-11): X -> (X - delta) / s, W -> s W, B -> B + W delta (printed without the delta), at sites
    whose input is quantized with dynamic ranges and whose absorber makes up for it, so that running the model costs
    nothing more. Shifts where absorber and layer take them. The original also scales queries against keys, which
    has no effect on keys that are normalised, and is not done here.

    Learning begins at the best, by the block's error, of: RTN; ranges as ClipSearch finds them; either behind scales
    as in SmoothQuant, s_j = max|X_j|^1/2 / max|W_j|^1/2, with the middle of each channel as its shift or without.

    steps, batch_calls: of Adam, and calls of the block in each
    clip_rate, transform_rate: learning rates of p, and of log s and the shift in units of the channel's half width
    patience: evaluations (there are 10) without progress on held-out calls after which it stops; 0 for never
    transform: whether scales and shifts are learned
    """

    steps: int = 400
    batch_calls: int = 1
    clip_rate: float = 0.05
    transform_rate: float = 0.01
    patience: int = 6
    transform: bool = True

    needs: ClassVar[frozenset[str]] = frozenset({"second_moment_I", "low_C", "high_C"})

    def __post_init__(self) -> None:
        self._schedule()
        if not (self.clip_rate > 0 and self.transform_rate > 0):
            raise ValueError(f"omniquant: learning rates {self.clip_rate:g}, {self.transform_rate:g} must be above 0")

    def _schedule(self) -> Schedule:
        return Schedule(self.steps, self.batch_calls, patience=self.patience)

    def problem(self, layer: nn.Module, spec: WeightSpec) -> str | None:
        """A codebook has no range."""
        if spec.format.codebook_shape:
            return "omniquant learns the ranges of integers and floats, and a codebook has none; use gptvq"
        return None

    @property
    def outside(self) -> LayerMethod:
        """Ranges by search."""
        return ClipSearch()

    def quantize_block(self, task: BlockTask) -> BlockResult:
        """The block's weights, and its rescalings. ValueError as for `reconstruction.learn`."""
        block = WorkingBlock(task)
        learner = _OmniQuantLearner(block, self)
        return learn(block, learner, self._schedule(), learner.starts())


class _OmniQuantLearner(Learner):
    """Logits of clipping factors for each site, and a transformation for each absorber."""

    def __init__(self, block: WorkingBlock, settings: OmniQuant):
        self.block, task = block, block.task
        precisions = {name: task.plan.weight(name) for name in block.layers}
        self.specs = {name: WeightSpec.of(precision) for name, precision in precisions.items() if precision}
        self.logits: dict[str, Tensor] = {}
        for name, spec in self.specs.items():
            if "scale_G1" in spec.format.param_names:
                weight = block.layers[name].full.weight
                sides = 2 if "zero_G1" in spec.format.param_names else 1
                start = torch.full((spec.num_groups(weight.shape), sides), _NO_CLIP, device=weight.device)
                self.logits[name] = start.requires_grad_()
        found = [_Transformation.of(block, names) for names in block.users.values()] if settings.transform else []
        self.transformations = [transformation for transformation in found if transformation]
        self.groups = [
            ParameterGroup(list(self.logits.values()), settings.clip_rate),
            ParameterGroup([p for t in self.transformations for p in t.parameters], settings.transform_rate),
        ]

    def starts(self) -> list[list[Tensor]]:
        """States of the parameters: see `OmniQuant`."""
        starts = []
        for shifts in (None, False, True) if self.transformations else (None,):
            for transformation in self.transformations:
                transformation.reset(shifts)
            for is_searched in (False, True):
                self._reset_logits(is_searched)
                starts.append(self.state())
        return starts

    @torch.no_grad()
    def _reset_logits(self, is_searched: bool) -> None:
        rescalings = self._rescalings()
        tensors = self.block.rescaled(rescalings)
        for name, logits in self.logits.items():
            importance_I = self.block.task.stats[name].second_moment_I
            assert importance_I is not None  # in `needs`
            if not is_searched:
                logits.fill_(_NO_CLIP)
                continue
            if name in rescalings:
                scale_C = rescalings[name].scale_C
                importance_I = importance_I.to(scale_C.device) / scale_C.square()
            ratio_G1 = ClipSearch().best_ratios(tensors[name].weight.flatten(1), importance_I, self.specs[name])
            searched_G1 = (ratio_G1 * torch.tensor(_NO_CLIP, device=ratio_G1.device).sigmoid()).logit()
            logits.copy_(torch.where(ratio_G1 == 1, _NO_CLIP, searched_G1))

    def _rescalings(self, is_stored: bool = False) -> dict[str, Rescaling]:
        return {name: t.rescaling(is_stored) for t in self.transformations for name in t.names}

    def soft(self) -> dict[str, LayerTensors]:
        tensors = self.block.rescaled(self._rescalings())
        for name, spec in self.specs.items():
            weight = tensors[name].weight
            if name in self.logits:
                clipped = _clipped(weight, spec, self.logits[name])
            else:
                clipped = spec.quantize(weight.detach()).decode()
            tensors[name] = tensors[name]._replace(weight=clipped)
        return tensors

    @torch.no_grad()
    def hard(self) -> BlockResult:
        rescalings = self._rescalings(is_stored=True)
        tensors = self.block.rescaled(rescalings)
        weights: dict[str, QuantizedTensor] = {}
        notes: dict[str, dict[str, float]] = {name: {} for name in self.block.layers}
        for name, spec in self.specs.items():
            weight = tensors[name].weight
            if name not in self.logits:
                weights[name] = spec.quantize(weight)
                continue
            weight_GN = spec.groups(weight)
            params = _fit(spec.format, *_range(weight_GN, self.logits[name]))
            codes_GN = spec.format.encode(weight_GN, params)
            codes = spec.join(codes_GN, weight.shape)
            weights[name] = QuantizedTensor(codes, params, spec, tuple(weight.shape))
            notes[name]["mean_clip"] = float(_factor(self.logits[name]).mean())
        for name, rescaling in rescalings.items():
            notes[name] |= {
                "smallest_scale": float(rescaling.scale_C.min()),
                "largest_scale": float(rescaling.scale_C.max()),
            }
        return BlockResult(weights, rescalings, notes)


# ---- clipping -----------------------------------------------------------------------------------------


def _factor(logits: Tensor) -> Tensor:
    """The share of the range that is kept; exactly 1 at the start."""
    return logits.sigmoid() / torch.tensor(_NO_CLIP, device=logits.device).sigmoid()


def _range(weight_GN: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Clipped low and high of each group, (G, 1); `logits` are (G, 2), of low and high, or (G, 1), of both.

    A group of equal numbers is not clipped, so that it still comes back exactly.
    """
    low_G1, high_G1 = weight_GN.amin(-1, keepdim=True), weight_GN.amax(-1, keepdim=True)
    is_constant_G1 = low_G1 == high_G1
    factor_GX = torch.where(is_constant_G1, 1.0, _factor(logits))
    if logits.shape[1] == 2:
        return low_G1 * factor_GX[:, :1], high_G1 * factor_GX[:, 1:]
    width_G1 = torch.maximum(high_G1, -low_G1) * factor_GX
    return torch.where(is_constant_G1, low_G1, -width_G1), torch.where(is_constant_G1, high_G1, width_G1)


def _fit(format: Format, low_G1: Tensor, high_G1: Tensor) -> Params:
    """Parameters as stored, for ranges: a format sees the ends of its groups only."""
    return format.storable(format.fit(torch.cat([low_G1, high_G1], 1).detach()))


def _clipped(weight: Tensor, spec: WeightSpec, logits: Tensor) -> Tensor:
    """The quantized weight, differentiable in the weight and in the logits.

    clip(W, a, b) + width * e with errors e, in units of the range's width, held fixed: rounding passes gradients
    straight through, and what it loses grows with the width. The ends a and b are those of what is stored. With the
    zero point where it is they are multiples of the width; with one that is not rounded they are those of the range.
    The gradient is the mean of both: the first alone, which is the original's, hardly tells low from high, and the
    second alone does not see that a zero point of 2 bits mostly stays where it is.
    """
    weight_GN, format = spec.groups(weight), spec.format
    low_G1, high_G1 = _range(weight_GN, logits)
    params = _fit(format, low_G1, high_G1)
    width_G1 = width_of(format, low_G1, high_G1)
    with torch.no_grad():
        unit_G1 = torch.where(width_G1 > 0, width_G1, 1.0)
        ends_G2 = format.ends(params)
        clipped_GN = torch.minimum(torch.maximum(weight_GN, ends_G2[:, :1]), ends_G2[:, 1:])
        errors_GN = (format.nearest(weight_GN, params) - clipped_GN) / unit_G1
    moved_G2 = (torch.cat([low_G1, high_G1], 1) + ends_G2 / unit_G1 * width_G1) / 2
    moved_G2 = ends_G2 + moved_G2 - moved_G2.detach()
    clipped_GN = torch.minimum(torch.maximum(weight_GN, moved_G2[:, :1]), moved_G2[:, 1:])
    return spec.join(clipped_GN + errors_GN * width_G1, weight.shape).reshape(weight.shape)


# ---- transformation -----------------------------------------------------------------------------------


class _Transformation:
    """Scale, and shift where it can be, of the input that some sites share.

    log_scale_C: natural logarithm of the scale
    shift_C: in units of `half_width_C`; None where there is none
    """

    def __init__(self, names: Sequence[str], absmax_C: Tensor, low_C: Tensor, high_C: Tensor, shifts: bool):
        self.names, self.weight_absmax_C, self.low_C, self.high_C = names, absmax_C, low_C, high_C
        self.half_width_C = (high_C - low_C) / 2
        self.log_scale_C = torch.zeros_like(low_C, requires_grad=True)
        self.shift_C = torch.zeros_like(low_C, requires_grad=True) if shifts else None

    @classmethod
    def of(cls, block: WorkingBlock, names: Sequence[str]) -> "_Transformation | None":
        """That of sites that share an absorber; None where there is nothing to gain, or none can be."""
        task = block.task
        layers = [block.layers[name] for name in names]
        absorber = next(site.absorber for site in task.sites if site.name == names[0])
        assert absorber is not None
        is_quantized = any(precision.activation for name in names for precision in task.plan[name])
        makers = [block.layers[part.module] for part in absorber.parts if part.module in block.layers]
        # Static ranges are those of the input as it was.
        is_static = any(task.ranges.get(name) for name in names)
        if not is_quantized or is_static or not all(layer.is_plain for layer in [*layers, *makers]):
            return None
        shifts = absorber.shifts and all(shift_problem(layer.layer) is None for layer in layers)
        absmax_C = torch.stack([weight_absmax(layer.layer) for layer in layers]).amax(0)
        lows, highs = zip(*(_ends(task, name) for name in names), strict=True)
        low_C, high_C = torch.stack(lows).amin(0).to(absmax_C), torch.stack(highs).amax(0).to(absmax_C)
        return cls(names, absmax_C, low_C, high_C, shifts)

    @property
    def parameters(self) -> list[Tensor]:
        return [self.log_scale_C] if self.shift_C is None else [self.log_scale_C, self.shift_C]

    @torch.no_grad()
    def reset(self, shifts: bool | None) -> None:
        """No transformation (None), or scales as in SmoothQuant, with shifts to the channels' middles or without."""
        self.log_scale_C.zero_()
        if self.shift_C is not None:
            self.shift_C.zero_()
        if shifts is None:
            return
        absmax_C = torch.maximum(self.high_C, -self.low_C)
        if shifts and self.shift_C is not None:
            self.shift_C.copy_(torch.nan_to_num((self.low_C + self.high_C) / 2 / self.half_width_C, 0, 0, 0))
            absmax_C = torch.where(self.half_width_C > 0, self.half_width_C, absmax_C)
        ratio_C = absmax_C / self.weight_absmax_C
        is_alive_C = (absmax_C > 0) & (self.weight_absmax_C > 0) & ratio_C.isfinite()
        self.log_scale_C.copy_(torch.where(is_alive_C, ratio_C, 1.0).log() / 2)

    def rescaling(self, is_stored: bool) -> Rescaling:
        """As learned, or in numbers that float16 holds, which an input scale of its own would need."""
        scale_C = self.log_scale_C.exp()
        shift_C = None if self.shift_C is None else self.shift_C * self.half_width_C
        if not is_stored:
            return Rescaling(scale_C, shift_C)
        return Rescaling(rounded(scale_C), None if shift_C is None else rounded(shift_C))


def _ends(task: BlockTask, name: str) -> tuple[Tensor, Tensor]:
    stats = task.stats[name]
    assert stats.low_C is not None and stats.high_C is not None  # in `needs`
    return stats.low_C.float(), stats.high_C.float()
