"""Attention and MLP of the transformers that have timm's names for them (DiT, MAR).

Legend: R rows, T tokens, P tokens that are asked for, D width, H heads, d = D / H.
"""

from collections.abc import Callable

from torch import Tensor, nn

from bitlaw.linear import Linear
from bitlaw.models.parts.attention import attend


class SelfAttention(nn.Module):
    """Multi-head self-attention. `quant_q`, `quant_k`, `quant_v` see the operands, (R, H, T, d)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.quant_q: nn.Module = nn.Identity()
        self.quant_k: nn.Module = nn.Identity()
        self.quant_v: nn.Module = nn.Identity()

    def forward(self, x_RTD: Tensor, queries_RP: Tensor | None = None) -> Tensor:
        """(R, T, D) -> (R, T, D), or (R, P, D) for the tokens that `queries_RP` names."""
        rows, length, width = x_RTD.shape
        d = width // self.heads
        q, k, v = self.qkv(x_RTD).view(rows, length, 3, self.heads, d).permute(2, 0, 3, 1, 4)
        if queries_RP is not None:
            q = q.gather(2, queries_RP[:, None, :, None].expand(-1, self.heads, -1, d))
        q, k, v = self.quant_q(q), self.quant_k(k), self.quant_v(v)
        return self.proj(attend(q, k, v, d**-0.5))


class MLP(nn.Module):
    """Two linears with an activation between them."""

    def __init__(self, width: int, hidden: int, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)
        self.activation = activation

    def forward(self, x_RTD: Tensor) -> Tensor:
        """(R, T, D) -> (R, T, D)."""
        return self.fc2(self.activation(self.fc1(x_RTD)))
