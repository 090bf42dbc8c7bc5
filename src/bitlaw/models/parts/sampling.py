"""Filters on token logits, and the draw.

Legend: B images, N tokens of a step, V vocabulary, Z latent channels.
"""

import torch
from torch import Tensor


def filter_logits(logits_BNV: Tensor, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """Logits with the improbable ones at -inf: first top-k (equals of the k-th are kept), then top-p of what is left.

    Top-p removes the least probable tokens whose summed mass is at most 1 - p, never the most probable one.
    0 switches a filter off.
    """
    if 0 < top_k < logits_BNV.shape[-1]:
        threshold_BN1 = logits_BNV.topk(top_k).values[..., -1:]
        logits_BNV = logits_BNV.masked_fill(logits_BNV < threshold_BN1, -torch.inf)
    if 0 < top_p < 1:
        ascending_BNV, order_BNV = logits_BNV.sort(dim=-1)
        removed_BNV = ascending_BNV.softmax(-1).cumsum(-1) <= 1 - top_p
        removed_BNV[..., -1] = False
        removed_BNV = torch.empty_like(removed_BNV).scatter_(-1, order_BNV, removed_BNV)
        logits_BNV = logits_BNV.masked_fill(removed_BNV, -torch.inf)
    return logits_BNV


def draw(logits_BNV: Tensor, gumbel_BNV: Tensor) -> Tensor:
    """Tokens (B, N) drawn from softmax(logits) by the Gumbel-max trick."""
    return (logits_BNV + gumbel_BNV).argmax(-1)


def soft_embedding(logits_BNV: Tensor, gumbel_BNV: Tensor, codebook_VZ: Tensor, progress: float) -> Tensor:
    """VAR's `more_smooth`: Gumbel-softmax mixtures (B, N, Z) of codebook vectors.

    They grow sharper as `progress` goes from 0 at the first stage to 1 at the last.
    """
    temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
    return ((logits_BNV * (1 + progress) + gumbel_BNV) / temperature).softmax(-1) @ codebook_VZ
