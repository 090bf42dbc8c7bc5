"""Keys and values of the tokens before, kept once and shared by the states of a rollout.

Room is made once for a whole rollout. A state owns the first `length` tokens of it; the next state's tokens are written
behind them, which the older state does not see. A second branch from an older state finds that place taken, and gets a
copy.

Legend: R rows (images, twice with guidance), H heads, N new tokens, M tokens with those before, d width of a head.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class KeyValues:
    """Room for the keys and values of every layer.

    layers: (depth, 2, R, H, tokens there is room for, d), of which the first `filled` tokens are used
    """

    def __init__(self, layers: Tensor, filled: int = 0):
        self.layers, self.filled = layers, filled

    def writable(self, length: int) -> "KeyValues":
        """A store in which what follows the first `length` tokens is free: this one, or a copy if it is taken."""
        if self.filled == length:
            return self
        copied = torch.empty_like(self.layers)
        copied[..., :length, :] = self.layers[..., :length, :]
        return KeyValues(copied, length)


class LayerKeyValues(NamedTuple):
    """Keys and values of one layer, (2, R, H, tokens there is room for, d), of which `length` tokens are there.

    keeps: whether the next tokens are written behind them, for later steps
    """

    key_values: Tensor
    length: int
    keeps: bool

    def join(self, k_RHNd: Tensor, v_RHNd: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values seen so far, (R, H, M, d), the new ones last."""
        keys, values = self.key_values
        if not self.keeps:
            old = slice(0, self.length)
            return torch.cat([keys[:, :, old], k_RHNd], 2), torch.cat([values[:, :, old], v_RHNd], 2)
        end = self.length + k_RHNd.shape[2]
        keys[:, :, self.length : end], values[:, :, self.length : end] = k_RHNd, v_RHNd
        return keys[:, :, :end], values[:, :, :end]
