"""The network of Large-DiT (Gao et al. 2024, LLaMA2-Accessory): DiT with the blocks of LLaMA.

State-dict keys are those of the official checkpoints. Positions are rotary, in one dimension over the tokens row by
row; timesteps and classes have vectors of at most 1024 numbers.

Legend: B images, R rows (B, or 2 B with guidance), C channels and H = W side of the latent, T tokens, D width, H heads,
d = D / H, P = d / 2 pairs, F hidden width of the MLPs, K distinct conditions.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlaw.linear import Linear
from bitlaw.models.networks.dit import (
    DiffusionTransformer,
    FinalLayer,
    LabelEmbed,
    TimestepEmbed,
    TransformerConfig,
    modulations,
)
from bitlaw.models.parts.attention import attend
from bitlaw.models.parts.rotary import line_table, rotate

MAX_CONDITION_WIDTH = 1024


@dataclass(frozen=True)
class LargeDiTConfig(TransformerConfig):
    """Sizes of Large-DiT.

    hidden: F; 0 stands for two thirds of four widths, rounded up to a multiple of 256
    qk_norm: queries and keys are normalized, over all heads at once
    """

    hidden: int = 0
    qk_norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width // self.heads % 2:
            raise ValueError(f"Large-DiT width {self.width} with {self.heads} heads: rotary positions need even heads")
        if not self.hidden:
            object.__setattr__(self, "hidden", -(-(2 * 4 * self.width // 3) // 256) * 256)

    @property
    def condition_width(self) -> int:
        """Width of the vectors of timesteps and classes."""
        return min(self.width, MAX_CONDITION_WIDTH)


class LargeDiTTransformer(DiffusionTransformer):
    """The network of Large-DiT."""

    config: LargeDiTConfig
    rotary_TP2: Tensor

    def __init__(self, config: LargeDiTConfig):
        super().__init__()
        self.config = config
        self.x_embedder = Linear(config.in_channels * config.patch_size**2, config.width)
        self.t_embedder = TimestepEmbed(config.condition_width)
        self.y_embedder = LabelEmbed(config)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.register_buffer("rotary_TP2", torch.empty(0), persistent=False)
        self.reset_tables()
        self._initialize()

    def reset_tables(self) -> None:
        """Cosines and sines of all tokens' positions."""
        table = line_table(self.config.num_tokens, self.config.width // self.config.heads)
        self.rotary_TP2 = table.to(self.final_layer.linear.weight.device)

    def embed(self, x_BCHW: Tensor) -> Tensor:
        """Tokens (B, T, D) of latents; a patch's numbers are in the order (channel, row, column)."""
        p = self.config.patch_size
        patches = x_BCHW.unfold(2, p, p).unfold(3, p, p)  # (B, C, H / p, W / p, p, p)
        return self.x_embedder(patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2))

    def run_blocks(self, h_RTD: Tensor, silu_KD: Tensor, row_R: Tensor) -> Tensor:
        """(R, T, D) -> (R, T, D) through all blocks; `silu_KD` are SiLU of the distinct conditions."""
        rotary_T1P2 = self.rotary_TP2.unsqueeze(1)
        for layer in self.layers:
            h_RTD = layer(h_RTD, silu_KD, row_R, rotary_T1P2)
        return h_RTD

    def _initialize(self) -> None:
        """As the official training: Xavier for linears, ones for norms, zeros for modulations and the last layer."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or "adaLN_modulation" in name or name.startswith("final_layer"):
                nn.init.zeros_(parameter)
            elif name.startswith(("t_embedder", "y_embedder")):
                nn.init.normal_(parameter, std=0.02)
            elif parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)


class Attention(nn.Module):
    """Multi-head self-attention. `quant_q`, `quant_k`, `quant_v` see the operands, (R, H, T, d), q and k turned."""

    def __init__(self, config: LargeDiTConfig):
        super().__init__()
        width, self.heads = config.width, config.heads
        self.wq = Linear(width, width, bias=False)
        self.wk = Linear(width, width, bias=False)
        self.wv = Linear(width, width, bias=False)
        self.wo = Linear(width, width, bias=False)
        self.q_norm: nn.Module = nn.LayerNorm(width) if config.qk_norm else nn.Identity()
        self.k_norm: nn.Module = nn.LayerNorm(width) if config.qk_norm else nn.Identity()
        self.quant_q: nn.Module = nn.Identity()
        self.quant_k: nn.Module = nn.Identity()
        self.quant_v: nn.Module = nn.Identity()

    def forward(self, x_RTD: Tensor, rotary_T1P2: Tensor) -> Tensor:
        """(R, T, D) -> (R, T, D)."""
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in self._projections(x_RTD))
        q, k = rotate(q, rotary_T1P2), rotate(k, rotary_T1P2)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        q, k, v = self.quant_q(q), self.quant_k(k), self.quant_v(v)
        return self.wo(attend(q, k, v, q.shape[-1] ** -0.5))

    def _projections(self, x_RTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_norm(self.wq(x_RTD)), self.k_norm(self.wk(x_RTD)), self.wv(x_RTD)


class FeedForward(nn.Module):
    """Three linears: w2(silu(w1 x) * w3 x)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w1 = Linear(width, hidden, bias=False)
        self.w3 = Linear(width, hidden, bias=False)
        self.w2 = Linear(hidden, width, bias=False)

    def forward(self, x_RTD: Tensor) -> Tensor:
        """(R, T, D) -> (R, T, D)."""
        return self.w2(F.silu(self.w1(x_RTD)) * self.w3(x_RTD))


class Block(nn.Module):
    """Transformer block; shift, scale and gate of both branches come from the condition (adaLN-zero)."""

    def __init__(self, config: LargeDiTConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.feed_forward = FeedForward(config.width, config.hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(config.condition_width, 6 * config.width))

    def forward(self, h_RTD: Tensor, silu_KD: Tensor, row_R: Tensor, rotary_T1P2: Tensor) -> Tensor:
        """(R, T, D) -> (R, T, D); `silu_KD` are SiLU of the distinct conditions."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulations(self.adaLN_modulation[1](silu_KD), row_R, 6)
        normed_RTD = self.attention_norm(h_RTD.to(self.attention_norm.weight.dtype))  # another one under autocast
        attended = self.attention(torch.addcmul(shift1, normed_RTD, 1 + scale1), rotary_T1P2)
        h_RTD = torch.addcmul(h_RTD, gate1, attended)
        normed_RTD = self.ffn_norm(h_RTD.to(self.ffn_norm.weight.dtype))
        return torch.addcmul(h_RTD, gate2, self.feed_forward(torch.addcmul(shift2, normed_RTD, 1 + scale2)))
