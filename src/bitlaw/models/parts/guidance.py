"""Classifier-free guidance: uncond + w * (cond - uncond), so that w = 1 is the conditional model.

Legend: B images; further dimensions are free.
"""

import math

import torch
from torch import Tensor


def check_guidance(guidance: float, least: float = 0.0) -> None:
    """ValueError for a w that means nothing: below 0, which is the unconditional model, or no number."""
    if not (math.isfinite(guidance) and guidance >= least):
        raise ValueError(f"guidance {guidance:g}: must be {least:g} or more; 1 is the model as it is")


def guide(cond_B: Tensor, uncond_B: Tensor, guidance: float) -> Tensor:
    """Both halves combined; of the shape of one."""
    return torch.lerp(uncond_B, cond_B, guidance)


def guide_channels(cond_BCHW: Tensor, uncond_BCHW: Tensor, guidance: float, num_channels: int) -> Tensor:
    """Guidance on the first `num_channels` channels; the others are those of the conditional half.

    Official DiT guides 3 of its 4 noise channels, and leaves the variance channels as they are.
    """
    guided = guide(cond_BCHW[:, :num_channels], uncond_BCHW[:, :num_channels], guidance)
    return torch.cat([guided, cond_BCHW[:, num_channels:]], 1)


def ramp(guidance: float, step: int, num_steps: int) -> float:
    """VAR's guidance of one step: from 1 at the first to `guidance` at the last, linearly (its own t is w - 1)."""
    return 1 + (guidance - 1) * step / (num_steps - 1)
