"""The networks of MAR (Li et al. 2024): a masked autoencoder over continuous tokens, and the head that draws a token.

State-dict keys are those of the official checkpoints (LTH14/mar). The transformer makes a condition vector for every
hidden position; the head, a small MLP, removes the noise from one token at a time under its condition. Departures from
the official code leave its results as they are: only visible tokens are embedded; the last decoder block computes
queries' outputs at the positions asked for; both halves of guidance share their tokens; what the head makes of
conditions and timesteps, which does not depend on the tokens, is computed for several steps in one product.

Legend: B images, R rows (B, or 2 B with guidance: conditional, then unconditional), L tokens of an image, F buffer
slots, N visible tokens, T tokens of any kind, P positions asked for, D width, H heads, d = D / H; c x h x w a latent;
in the head M rows (tokens), C channels of a token, W width, S steps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlaw.linear import Linear
from bitlaw.models.networks.dit import TimestepEmbed
from bitlaw.models.parts.transformer import MLP, SelfAttention

NORM_EPS = 1e-6

# Rows of the head whose modulations are computed together. One row at a time is bound by reading the weights; from
# some hundred rows on it no longer is, and more would only take memory (62 MB in MAR-H).
_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class MARConfig:
    """Sizes of the networks.

    side: tokens a side of the image, L = side^2
    latent_channels, patch_size: a token is patch_size^2 positions of the latent
    buffer_size: slots before the tokens that hold the class
    head_depth, head_width: of the MLP that removes the noise
    """

    width: int
    encoder_depth: int
    decoder_depth: int
    heads: int
    head_depth: int
    head_width: int
    num_classes: int = 1000
    side: int = 16
    latent_channels: int = 16
    patch_size: int = 1
    buffer_size: int = 64
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"MAR width {self.width} is not a multiple of its {self.heads} heads")
        if min(self.encoder_depth, self.decoder_depth, self.head_depth) < 1:
            raise ValueError("MAR needs a block or more in encoder, decoder and head")

    @property
    def num_tokens(self) -> int:
        """L, the tokens of one image."""
        return self.side**2

    @property
    def token_channels(self) -> int:
        """C, the numbers of one token."""
        return self.latent_channels * self.patch_size**2


class MARTransformer(nn.Module):
    """Both networks: `run` is the transformer, `head` the MLP.

    Class num_classes is the unconditional one, which has a vector of its own, `fake_latent`.
    """

    def __init__(self, config: MARConfig):
        super().__init__()
        self.config = config
        width, length = config.width, config.buffer_size + config.num_tokens
        self.class_emb = nn.Embedding(config.num_classes, width)
        self.fake_latent = nn.Parameter(torch.empty(1, width))
        self.z_proj = Linear(config.token_channels, width)
        self.z_proj_ln = nn.LayerNorm(width, eps=NORM_EPS)
        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, length, width))
        self.encoder_blocks = nn.ModuleList(Block(config) for _ in range(config.encoder_depth))
        self.encoder_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.decoder_embed = Linear(width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, length, width))
        self.decoder_blocks = nn.ModuleList(Block(config) for _ in range(config.decoder_depth))
        self.decoder_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.empty(1, config.num_tokens, width))
        self.diffloss = nn.ModuleDict({"net": DenoisingMLP(config)})
        self._initialize()

    @property
    def head(self) -> "DenoisingMLP":
        """The MLP that removes the noise from tokens."""
        return cast(DenoisingMLP, self.diffloss["net"])

    def forward(self, tokens_BLC: Tensor, hidden_BL: Tensor, class_BD: Tensor) -> Tensor:
        """Conditions (B, L, D) of all positions; `hidden_BL` is true (or 1) where a token is hidden.

        As many tokens have to be hidden in every image. Gradients flow; nothing is dropped at random.
        """
        visible_BN = visible_positions(hidden_BL, int((hidden_BL[0] == 0).sum()))
        return self.run(tokens_BLC, visible_BN, class_BD)

    def run(
        self, tokens_BLC: Tensor, visible_BN: Tensor, class_RD: Tensor, positions_BP: Tensor | None = None
    ) -> Tensor:
        """Conditions (R, P, D) of the positions asked for, of all if None, where `visible_BN` are not hidden."""
        encoded = self.encode(tokens_BLC, visible_BN, class_RD)
        return self.decode(encoded, visible_BN, positions_BP)

    def class_vectors(self, labels_B: Tensor) -> Tensor:
        """Vectors (B, D) of classes; that of num_classes is `fake_latent`."""
        known_BD = self.class_emb(labels_B.clamp(max=self.config.num_classes - 1))
        return torch.where((labels_B == self.config.num_classes)[:, None], self.fake_latent, known_BD)

    def embed(self, tokens_BLC: Tensor, visible_BN: Tensor, class_RD: Tensor) -> Tensor:
        """The encoder's input (R, F + N, D): buffer slots with the class, then the visible tokens, normalized."""
        buffer, positions_TD = self.config.buffer_size, self.encoder_pos_embed_learned[0]
        x_RFD = self.z_proj_ln(class_RD[:, None] + positions_TD[:buffer])
        if visible_BN.shape[1] == 0:
            return x_RFD
        x_BND = self.z_proj(take(tokens_BLC, visible_BN).to(class_RD.dtype))
        x_BND = self.z_proj_ln(x_BND + positions_TD[buffer + visible_BN])
        return torch.cat([x_RFD, for_both_halves(x_BND, len(class_RD))], 1)

    def encode(self, tokens_BLC: Tensor, visible_BN: Tensor, class_RD: Tensor) -> Tensor:
        """Buffer slots and visible tokens after the encoder, (R, F + N, D)."""
        x = self.embed(tokens_BLC, visible_BN, class_RD)
        for block in self.encoder_blocks:
            x = block(x)
        return self.encoder_norm(x)

    def decode(self, encoded: Tensor, visible_BN: Tensor, positions_BP: Tensor | None = None) -> Tensor:
        """Conditions (R, P, D) of the positions asked for, of all if None, from what the encoder gave."""
        buffer, rows = self.config.buffer_size, len(encoded)
        v = self.decoder_embed(encoded)
        visible_RN1 = for_both_halves(visible_BN, rows)[:, :, None]
        x_RLD = self.mask_token.to(v.dtype).expand(rows, self.config.num_tokens, -1)
        x_RLD = x_RLD.scatter(1, visible_RN1.expand(-1, -1, v.shape[-1]), v[:, buffer:])
        x = torch.cat([v[:, :buffer], x_RLD], 1) + self.decoder_pos_embed_learned
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        if positions_BP is None:
            x_RLD = self.decoder_norm(self.decoder_blocks[-1](x)[:, buffer:])
            return x_RLD + self.diffusion_pos_embed_learned
        positions_RP = for_both_halves(positions_BP, rows)
        x_RPD = self.decoder_norm(self.decoder_blocks[-1](x, buffer + positions_RP))
        return x_RPD + self.diffusion_pos_embed_learned[0, positions_RP]

    def patchify(self, latent_Bchw: Tensor) -> Tensor:
        """Latents to tokens (B, L, C), row by row; features in the order channel, row, column of the patch."""
        side, p = self.config.side, self.config.patch_size
        x = latent_Bchw.reshape(len(latent_Bchw), -1, side, p, side, p).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(len(latent_Bchw), side * side, -1)

    def unpatchify(self, tokens_BLC: Tensor) -> Tensor:
        """The inverse: latents (B, c, h, w)."""
        side, p = self.config.side, self.config.patch_size
        x = tokens_BLC.reshape(len(tokens_BLC), side, side, -1, p, p).permute(0, 3, 1, 4, 2, 5)
        return x.reshape(len(tokens_BLC), -1, side * p, side * p)

    def _initialize(self) -> None:
        """As the official training: Xavier for linears, zeros for biases, the head's modulations and last layer."""
        for name, parameter in self.named_parameters():
            zero_in_head = "adaLN_modulation" in name or "final_layer" in name
            if name.endswith("bias") or zero_in_head:
                nn.init.zeros_(parameter)
            elif "norm" in name or name.endswith("_ln.weight"):
                nn.init.ones_(parameter)
            elif name.endswith(("_learned", "mask_token", "fake_latent", "class_emb.weight")) or "time_embed" in name:
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.xavier_uniform_(parameter)


def visible_positions(hidden_BL: Tensor, count: int) -> Tensor:
    """Positions (B, count) of the tokens that are not hidden, ascending; every image has `count` of them."""
    return hidden_BL.to(torch.uint8).argsort(dim=1, stable=True)[:, :count]


def take(x_RTD: Tensor, positions_RP: Tensor) -> Tensor:
    """The vectors (R, P, D) at positions of each row."""
    return x_RTD.gather(1, positions_RP[:, :, None].expand(-1, -1, x_RTD.shape[-1]))


def for_both_halves(x_B: Tensor, rows: int) -> Tensor:
    """(R, ...): `x_B` itself, or twice where the rows have an unconditional half."""
    return x_B if len(x_B) == rows else torch.cat([x_B, x_B])


class Block(nn.Module):
    """Transformer block with normalisation before each branch."""

    def __init__(self, config: MARConfig):
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = SelfAttention(width, config.heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = MLP(width, round(width * config.mlp_ratio), F.gelu)

    def forward(self, x_RTD: Tensor, queries_RP: Tensor | None = None) -> Tensor:
        """(R, T, D) -> (R, T, D), or (R, P, D) for the tokens that `queries_RP` names."""
        attended = self.attn(self.norm1(x_RTD), queries_RP)
        x = (x_RTD if queries_RP is None else take(x_RTD, queries_RP)) + attended
        return x + self.mlp(self.norm2(x))


# ---- head -------------------------------------------------------------------------------------------


class Modulations(NamedTuple):
    """What conditions and timesteps make of the head: (..., 3 W) for each block, (..., 2 W) for the final layer."""

    blocks: tuple[Tensor, ...]
    final: Tensor

    def of_step(self, step: int) -> "Modulations":
        """Those of one of several steps."""
        return Modulations(tuple(block[step] for block in self.blocks), self.final[step])


class DenoisingMLP(nn.Module):
    """(noisy token, timestep, condition) -> noise and variance channels; the condition modulates every block."""

    def __init__(self, config: MARConfig):
        super().__init__()
        width = config.head_width
        self.time_embed = TimestepEmbed(width)
        self.cond_embed = Linear(config.width, width)
        self.input_proj = Linear(config.token_channels, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(config.head_depth))
        self.final_layer = FinalLayer(width, 2 * config.token_channels)

    def forward(self, x_MC: Tensor, t_M: Tensor, z_MD: Tensor) -> Tensor:
        """Output (M, 2 C), float32, for original timesteps and conditions of each row."""
        return self.run(x_MC, self._modulations(self.time_embed(t_M) + self._embedded(z_MD)))

    def modulations_of_steps(self, z_MD: Tensor, timesteps: Sequence[int]) -> Iterator[Modulations]:
        """Modulations of all rows, for one timestep after the other; `run` takes them."""
        c_MW = self._embedded(z_MD)
        t_SW = self.time_embed(torch.tensor(timesteps, device=z_MD.device))
        num_steps = max(1, _ROWS_AT_ONCE // len(z_MD))
        for t_sW in t_SW.split(num_steps):
            together = self._modulations(t_sW[:, None] + c_MW)
            for i in range(len(t_sW)):
                yield together.of_step(i)

    def run(self, x_MC: Tensor, modulations: Modulations) -> Tensor:
        """Output (M, 2 C), float32, under given modulations; both halves of guidance share the tokens `x_MC`."""
        h = self.input_proj(x_MC.to(modulations.final.dtype))
        h = for_both_halves(h, len(modulations.final))
        for block, modulation in zip(self.res_blocks, modulations.blocks, strict=True):
            h = block(h, modulation)
        return self.final_layer(h, modulations.final).float()

    def _embedded(self, z_MD: Tensor) -> Tensor:
        return self.cond_embed(z_MD.to(self.cond_embed.weight.dtype))

    def _modulations(self, y: Tensor) -> Modulations:
        silu = F.silu(y)
        layers = (*self.res_blocks, self.final_layer)
        *blocks, final = (cast(ResBlock | FinalLayer, layer).adaLN_modulation[1](silu) for layer in layers)
        return Modulations(tuple(blocks), final)


class ResBlock(nn.Module):
    """Residual MLP; shift, scale and gate come from the condition."""

    def __init__(self, width: int):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = nn.Sequential(Linear(width, width), nn.SiLU(), Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 3 * width))

    def forward(self, h_MW: Tensor, modulation: Tensor) -> Tensor:
        """(M, W) -> (M, W)."""
        shift, scale, gate = modulation.chunk(3, dim=-1)
        return torch.addcmul(h_MW, gate, self.mlp(torch.addcmul(shift, self.in_ln(h_MW), 1 + scale)))


class FinalLayer(nn.Module):
    """Modulated normalisation and the linear to the output's channels."""

    def __init__(self, width: int, out_channels: int):
        super().__init__()
        self.linear = Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 2 * width))

    def forward(self, h_MW: Tensor, modulation: Tensor) -> Tensor:
        """(M, W) -> (M, 2 C)."""
        shift, scale = modulation.chunk(2, dim=-1)
        return self.linear(torch.addcmul(shift, F.layer_norm(h_MW, h_MW.shape[-1:], eps=NORM_EPS), 1 + scale))
