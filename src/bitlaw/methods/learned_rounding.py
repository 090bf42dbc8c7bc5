"""Learned rounding: each weight up or down, whichever serves the block's output (AdaRound, BRECQ).

Legend: O output channels, I inputs of an output channel, G groups, N numbers in a group.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bitlaw.formats import IntegerFormat
from bitlaw.methods.clip import ClipSearch
from bitlaw.methods.method import BlockMethod, BlockResult, BlockTask, LayerMethod
from bitlaw.methods.reconstruction import LayerTensors, Learner, ParameterGroup, Schedule, WorkingBlock, learn
from bitlaw.methods.rtn import RTN
from bitlaw.quantized import QuantizedTensor, WeightSpec

_STRETCH = 1.1, -0.1
"""zeta and gamma of the rectified sigmoid (Louizos et al. 2018)."""


@dataclass(frozen=True)
class LearnedRounding(BlockMethod):
    """Codes floor(w / s) + h(V) with h in [0, 1] learned, and pushed to 0 or 1 (Nagel et al. 2020, eq. 21-24).

    h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1). The loss is that of the block's output (Li et al. 2021, BRECQ), relative to
    that of the start, plus `penalty` times the mean of 1 - |2 h - 1|^beta; that begins after a fifth of the steps, and
    beta falls from 20 to 2. The start is ClipSearch or rounding to nearest, by the block's error on calls held out; its
    ranges stay.

    steps, batch_calls: of Adam, and calls of the block in each
    learning_rate: of V, 200 times that of the original, which takes 20 times the steps. Outside of (-2.4, 2.4) V stays
                   where it is, and at 0.6 most are there after a few steps
    penalty: weight of what pushes h to its ends
    """

    steps: int = 500
    batch_calls: int = 4
    learning_rate: float = 0.2
    penalty: float = 100.0

    needs: ClassVar[frozenset[str]] = frozenset({"second_moment_I"})

    def __post_init__(self) -> None:
        self._schedule()
        if not (self.learning_rate > 0 and self.penalty >= 0):
            raise ValueError(
                f"adaround: learning_rate {self.learning_rate:g} must be above 0, penalty {self.penalty:g} 0 or more"
            )

    def _schedule(self) -> Schedule:
        return Schedule(self.steps, self.batch_calls)  # rounding is decided late, so that it must not stop early

    def problem(self, layer: nn.Module, spec: WeightSpec) -> str | None:
        """Up and down are the next codes of integers only."""
        if not isinstance(spec.format, IntegerFormat) and spec.format.code_bits:
            return "adaround rounds to the integer below or above; use integers, or another method for this format"
        return None

    @property
    def outside(self) -> LayerMethod:
        """Ranges by search."""
        return ClipSearch()

    def quantize_block(self, task: BlockTask) -> BlockResult:
        """The block's weights. ValueError as for `reconstruction.learn`."""
        block = WorkingBlock(task)
        learners = [_RoundingLearner(block, self, start) for start in (ClipSearch(), RTN())]
        best = min(learners, key=lambda learner: block.error(learner.hard(), task.held_out or task.calls))
        return learn(block, best, self._schedule())


@dataclass(frozen=True)
class _Rounded:
    """A weight between two codes each: `below_GN` with zero points in it, ends of the codes, and what is learned."""

    start: QuantizedTensor
    below_GN: Tensor
    lowest: int
    highest: int
    logits_GN: Tensor

    @classmethod
    def of(cls, weight: Tensor, start: QuantizedTensor) -> "_Rounded":
        format = start.spec.format
        assert isinstance(format, IntegerFormat)
        scaled_GN = start.spec.groups(weight) / start.params["scale_G1"].float()
        below_GN = scaled_GN.floor()
        up_GN = scaled_GN - below_GN
        if "zero_G1" in start.params:
            below_GN = below_GN + start.params["zero_G1"]
        # What lies in the middle, to rounding, begins on the side where it was rounded to.
        is_up_GN = start.spec.groups(start.codes.float()) > below_GN
        up_GN = torch.where((up_GN - 0.5).abs() < 1e-5, torch.where(is_up_GN, 0.50001, 0.49999), up_GN)
        high, low = _STRETCH
        share_GN = (up_GN - low) / (high - low)
        return cls(start, below_GN, format.lowest, format.highest, share_GN.logit().requires_grad_())

    def up_GN(self) -> Tensor:
        """h(V)."""
        high, low = _STRETCH
        return (self.logits_GN.sigmoid() * (high - low) + low).clamp(0, 1)

    def soft(self) -> Tensor:
        """The weight with codes that may lie between two."""
        params, spec = self.start.params, self.start.spec
        codes_GN = (self.below_GN + self.up_GN()).clamp(self.lowest, self.highest)
        if "zero_G1" in params:
            codes_GN = codes_GN - params["zero_G1"]
        return spec.join(codes_GN * params["scale_G1"].float(), self.start.shape).reshape(self.start.shape)

    def hard(self) -> QuantizedTensor:
        """The weight with each code at the end that is nearer."""
        spec = self.start.spec
        codes_GN = (self.below_GN + (self.up_GN() >= 0.5)).clamp(self.lowest, self.highest)
        codes = spec.join(codes_GN.to(spec.format.code_dtype), self.start.shape)
        return QuantizedTensor(codes, self.start.params, spec, self.start.shape)


class _RoundingLearner(Learner):
    """Logits of every weight that has integer codes."""

    def __init__(self, block: WorkingBlock, settings: LearnedRounding, method: LayerMethod):
        self.block, self.settings, task = block, settings, block.task
        self.fixed: dict[str, QuantizedTensor] = {}
        self.rounded: dict[str, _Rounded] = {}
        for name, layer in block.layers.items():
            precision, weight = task.plan.weight(name), layer.full.weight
            if precision is None:
                continue
            start = method.quantize_layer(weight, task.stats[name], WeightSpec.of(precision))
            if precision.format.code_bits:
                self.rounded[name] = _Rounded.of(weight, start)
            else:
                self.fixed[name] = start
        logits = [rounded.logits_GN for rounded in self.rounded.values()]
        self.groups = [ParameterGroup(logits, settings.learning_rate)]

    def soft(self) -> dict[str, LayerTensors]:
        tensors = {name: layer.full for name, layer in self.block.layers.items()}
        for name, start in self.fixed.items():
            tensors[name] = tensors[name]._replace(weight=start.decode())
        for name, rounded in self.rounded.items():
            tensors[name] = tensors[name]._replace(weight=rounded.soft())
        return tensors

    @torch.no_grad()
    def hard(self) -> BlockResult:
        weights = {name: rounded.hard() for name, rounded in self.rounded.items()}
        notes = {
            name: {"moved": float((weights[name].codes != rounded.start.codes).float().mean())}
            for name, rounded in self.rounded.items()
        }
        return BlockResult(weights | self.fixed, notes=notes)

    def penalty(self, progress: float) -> Tensor | None:
        warm_up = 0.2
        if progress < warm_up or not self.rounded:
            return None
        beta = 20 - 18 * (progress - warm_up) / (1 - warm_up)
        undecided = [(1 - (2 * r.up_GN() - 1).abs().pow(beta)).sum() for r in self.rounded.values()]
        count = sum(r.below_GN.numel() for r in self.rounded.values())
        return self.settings.penalty * torch.stack(undecided).sum() / count
