"""Filters on token logits, and the draw.

Legend: B images, N tokens of a step, V vocabulary, Z latent channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def filter_logits(logits_BNV: Tensor, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """Logits with the improbable ones at -inf: first top-k (equals of the k-th are kept), then top-p of what is left.

    Top-p removes the least probable tokens whose summed mass is at most 1 - p, never the most probable one.
    0 switches a filter off.
    """
    if 0 < top_k < logits_BNV.shape[-1] and 0 < top_p < 1 and logits_BNV.device.type == "cpu":
        cut_BN1 = _cut(logits_BNV, top_k, top_p)
        if cut_BN1 is not None:
            return logits_BNV.masked_fill(logits_BNV < cut_BN1, -torch.inf)
    logits_BNV = keep_top_k(logits_BNV, top_k)
    if 0 < top_p < 1:
        ascending_BNV, order_BNV = logits_BNV.sort(dim=-1)
        removed_BNV = ascending_BNV.softmax(-1).cumsum(-1) <= 1 - top_p
        removed_BNV[..., -1] = False
        removed_BNV = torch.empty_like(removed_BNV).scatter_(-1, order_BNV, removed_BNV)
        logits_BNV = logits_BNV.masked_fill(removed_BNV, -torch.inf)
    return logits_BNV


def _cut(logits_BNV: Tensor, top_k: int, top_p: float) -> Tensor | None:
    """The least logit (B, N, 1) that both filters keep, without sorting the whole vocabulary: 2.5 times as fast.

    None if equals lie on a filter's edge, so that a value cannot tell which are kept.
    """
    ascending_BNK = logits_BNV.topk(top_k).values.flip(-1)
    removed_BNK = ascending_BNK.softmax(-1).cumsum(-1) <= 1 - top_p
    removed_BNK[..., -1] = False
    num_removed_BN1 = removed_BNK.sum(-1, keepdim=True)
    cut_BN1 = ascending_BNK.gather(-1, num_removed_BN1)
    last_removed_BN1 = ascending_BNK.gather(-1, (num_removed_BN1 - 1).clamp_min(0))
    is_torn = ((num_removed_BN1 > 0) & (last_removed_BN1 == cut_BN1)).any()
    num_survivors = (logits_BNV >= ascending_BNK[..., :1]).sum()
    return None if is_torn or num_survivors != num_removed_BN1.numel() * top_k else cut_BN1


def keep_top_k(logits_BNV: Tensor, top_k: int) -> Tensor:
    """Logits with those below the k-th largest at -inf; its equals are kept. 0 is off."""
    if not 0 < top_k < logits_BNV.shape[-1]:
        return logits_BNV
    threshold_BN1 = logits_BNV.topk(top_k, sorted=False).values.amin(-1, keepdim=True)
    return logits_BNV.masked_fill(logits_BNV < threshold_BN1, -torch.inf)


def filter_nucleus(logits_BNV: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits with the improbable ones at -inf: first top-k as in `filter_logits`, then top-p as LlamaGen has it.

    Top-p (Holtzman et al. 2020) removes a token if those before it, from the most probable on, hold more than p. Which
    of several equals are kept where they lie on both sides of the cut is left to torch's sort, as in the official code.
    Switched off by top_k 0 and top_p 1.
    """
    logits_BNV = keep_top_k(logits_BNV, top_k)
    if top_p >= 1:
        return logits_BNV
    if 0 < top_k < logits_BNV.shape[-1] // 4 and logits_BNV.device.type == "cpu":
        # Sorting the survivors alone is much faster. How many there are (equals of the k-th included), and whether the
        # cut lies between equals, is asked of the numbers, for which another device would have to wait.
        count = int((logits_BNV > -torch.inf).sum(-1).amax())
        descending_BNK = logits_BNV.topk(count).values
        last_BN1 = (_mass_before(descending_BNK) <= top_p).sum(-1, keepdim=True) - 1
        least_BN1 = descending_BNK.gather(-1, last_BN1)
        next_BN1 = F.pad(descending_BNK, (0, 1), value=-torch.inf).gather(-1, last_BN1 + 1)
        if not (least_BN1 == next_BN1).any():
            return logits_BNV.masked_fill(logits_BNV < least_BN1, -torch.inf)
    descending_BNV, order_BNV = logits_BNV.sort(dim=-1, descending=True)
    removed_BNV = _mass_before(descending_BNV) > top_p
    removed_BNV = torch.empty_like(removed_BNV).scatter_(-1, order_BNV, removed_BNV)
    return logits_BNV.masked_fill(removed_BNV, -torch.inf)


def _mass_before(descending_BNV: Tensor) -> Tensor:
    """The probability of all tokens before each."""
    return F.pad(descending_BNV.softmax(-1).cumsum(-1)[..., :-1], (1, 0))


def draw(logits_BNV: Tensor, gumbel_BNV: Tensor) -> Tensor:
    """Tokens (B, N) drawn from softmax(logits) by the Gumbel-max trick."""
    return (logits_BNV + gumbel_BNV).argmax(-1)


def soft_embedding(logits_BNV: Tensor, gumbel_BNV: Tensor, codebook_VZ: Tensor, progress: float) -> Tensor:
    """VAR's `more_smooth`: Gumbel-softmax mixtures (B, N, Z) of codebook vectors.

    They grow sharper as `progress` goes from 0 at the first stage to 1 at the last.
    """
    temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
    return ((logits_BNV * (1 + progress) + gumbel_BNV) / temperature).softmax(-1) @ codebook_VZ
