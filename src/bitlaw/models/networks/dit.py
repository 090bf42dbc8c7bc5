"""The network of DiT (Peebles & Xie 2023): predicts the noise in a latent image.

State-dict keys are those of the official checkpoints (facebookresearch/DiT). Two departures from the official sampler
leave its results as they are: the unconditional half exists inside the network call only, and what depends on
(timestep, class) alone is computed once for each distinct pair in a step.

Legend: B images, C channels and H = W side of the latent, O output channels, T tokens, D width, K distinct conditions.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlaw.models.parts.attention import attend
from bitlaw.models.parts.gelu import gelu_tanh


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of a network. input_size: side of the latent; learn_sigma: twice the channels come out."""

    depth: int
    width: int
    heads: int
    num_classes: int = 1000
    input_size: int = 32
    in_channels: int = 4
    patch_size: int = 2
    learn_sigma: bool = True
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"DiT width {self.width} must be a multiple of its {self.heads} heads and of 4")
        if self.input_size % self.patch_size:
            raise ValueError(f"DiT input_size {self.input_size} is not a multiple of patch_size {self.patch_size}")

    @property
    def num_tokens(self) -> int:
        """T, the tokens of one latent."""
        return int((self.input_size // self.patch_size) ** 2)

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.in_channels * (2 if self.learn_sigma else 1)


class Conditions(NamedTuple):
    """The distinct (timestep, class) pairs of a batch as vectors, and which of them each row has."""

    vectors_KD: Tensor
    row_B: Tensor


class DiTTransformer(nn.Module):
    """The network: (noisy latent, timestep, class) -> noise or v, and the variance's channels.

    Class num_classes is the null class.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbed(config.width)
        self.y_embedder = LabelEmbed(config.num_classes + 1, config.width)
        self.pos_embed = nn.Parameter(
            sincos_positions(config.width, config.input_size // config.patch_size)[None], requires_grad=False
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self._initialize()

    def forward(self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor:
        """Output (B, O, H, W) for original timesteps and classes of each row."""
        vectors_BD = self.t_embedder(t_B) + self.y_embedder(y_B)
        return self.run(x_BCHW, Conditions(vectors_BD, torch.arange(len(y_B), device=y_B.device)))

    def conditions(self, timestep: int, y_B: Tensor) -> Conditions:
        """Conditions of rows that share a timestep: one vector for each distinct class."""
        y_K, row_B = y_B.unique(return_inverse=True)
        timestep_1 = torch.tensor([timestep], device=y_B.device)
        return Conditions(self.t_embedder(timestep_1) + self.y_embedder(y_K), row_B)

    def run(self, x_BCHW: Tensor, conditions: Conditions) -> Tensor:
        """Output (B, O, H, W) under given conditions."""
        h_BTD = self.x_embedder(x_BCHW) + self.pos_embed
        silu_KD = F.silu(conditions.vectors_KD)
        for block in self.blocks:
            h_BTD = block(h_BTD, silu_KD, conditions.row_B)
        return self.unpatchify(self.final_layer(h_BTD, silu_KD, conditions.row_B))

    def unpatchify(self, tokens_BTO: Tensor) -> Tensor:
        """Tokens, features ordered (row, column, channel) in the patch -> (B, O, H, W)."""
        config = self.config
        side, p = config.input_size // config.patch_size, config.patch_size
        x = tokens_BTO.view(-1, side, side, p, p, config.out_channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(-1, config.out_channels, config.input_size, config.input_size)

    def _initialize(self) -> None:
        """As the official training: Xavier for linears, zeros for biases, modulations and the last layer."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or "adaLN_modulation" in name or name.startswith("final_layer"):
                nn.init.zeros_(parameter)
            elif name.startswith(("t_embedder", "y_embedder")):
                nn.init.normal_(parameter, std=0.02)
            elif name != "pos_embed":
                nn.init.xavier_uniform_(parameter.data.flatten(1))


class PatchEmbed(nn.Module):
    """Patches to tokens, row by row. A convolution, for the sake of the official key and shape."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.width, config.patch_size, stride=config.patch_size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, T, D)."""
        return self.proj(x_BCHW).flatten(2).transpose(1, 2)


class TimestepEmbed(nn.Module):
    """Sinusoids of the timestep (cosines first), and two linears."""

    num_frequencies = 128

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * self.num_frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_B: Tensor) -> Tensor:
        """(B,) -> (B, D)."""
        steps = torch.arange(self.num_frequencies, dtype=torch.float32, device=t_B.device) / self.num_frequencies
        angles = t_B[:, None].float() * torch.exp(-math.log(10000) * steps)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))


class LabelEmbed(nn.Module):
    """A table of class vectors; the last row is the null class."""

    def __init__(self, num_rows: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_rows, width)

    def forward(self, y_B: Tensor) -> Tensor:
        """(B,) -> (B, D)."""
        return self.embedding_table(y_B)


class Attention(nn.Module):
    """Multi-head self-attention. `quant_q`, `quant_k`, `quant_v` see the operands, (B, heads, T, D / heads)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.quant_q: nn.Module = nn.Identity()
        self.quant_k: nn.Module = nn.Identity()
        self.quant_v: nn.Module = nn.Identity()

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        batch, tokens, width = x_BTD.shape
        q, k, v = self.qkv(x_BTD).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = self.quant_q(q), self.quant_k(k), self.quant_v(v)
        return self.proj(attend(q, k, v, (width // self.heads) ** -0.5))


class MLP(nn.Module):
    """Two linears with the tanh approximation of GELU between them."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.fc2(gelu_tanh(self.fc1(x_BTD)))


class Block(nn.Module):
    """Transformer block; shift, scale and gate of both branches come from the condition (adaLN-zero)."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.attn = Attention(config.width, config.heads)
        self.mlp = MLP(config.width, int(config.width * config.mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))

    def forward(self, h_BTD: Tensor, silu_KD: Tensor, row_B: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D); `silu_KD` are SiLU of the distinct conditions."""
        shift1, scale1, gate1, shift2, scale2, gate2 = _modulations(self.adaLN_modulation[1](silu_KD), row_B, 6)
        h_BTD = torch.addcmul(h_BTD, gate1, self.attn(_modulated_norm(h_BTD, shift1, scale1)))
        return torch.addcmul(h_BTD, gate2, self.mlp(_modulated_norm(h_BTD, shift2, scale2)))


class FinalLayer(nn.Module):
    """Modulated normalisation and the linear to patches."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.linear = nn.Linear(config.width, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 2 * config.width))

    def forward(self, h_BTD: Tensor, silu_KD: Tensor, row_B: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, patch^2 O)."""
        shift, scale = _modulations(self.adaLN_modulation[1](silu_KD), row_B, 2)
        return self.linear(_modulated_norm(h_BTD, shift, scale))


def _modulations(out_KX: Tensor, row_B: Tensor, num_parts: int) -> tuple[Tensor, ...]:
    """The parts (B, 1, D) of a modulation, for each row."""
    return out_KX[row_B].unsqueeze(1).chunk(num_parts, dim=-1)


def _modulated_norm(h_BTD: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(h_BTD, h_BTD.shape[-1:], eps=1e-6), 1 + scale)


def sincos_positions(width: int, side: int) -> Tensor:
    """Position table (side^2, width): sines and cosines of the column, then of the row."""
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    rows, columns = torch.meshgrid(
        torch.arange(side, dtype=torch.float64), torch.arange(side, dtype=torch.float64), indexing="ij"
    )
    angles = [grid.flatten()[:, None] * omega for grid in (columns, rows)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1).float()
