"""The multi-scale residual VQ tokenizer of VAR: an image is a sequence of token maps of growing side.

A convolutional autoencoder in the manner of LDM, and between its halves a residual quantizer with one codebook: stage s
codes what the stages before it left over, at P_s x P_s positions. State-dict keys are those of the official
checkpoints (FoundationVision/VAR); a small configuration without normalisation and attention is the same class.

DiT uses the same autoencoder without the quantizer, on continuous latents.

Legend: B images, H x W pixels, Z latent channels, h x w latent positions, P x P positions and N = P^2 tokens of a
stage, L tokens of all stages, V vocabulary, D a number of vectors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlaw.models.autoencoders.autoencoder import Autoencoder
from bitlaw.models.official import WeightsFile
from bitlaw.models.parts.group_norm import GroupNorm
from bitlaw.models.storage import build

IGNORED = ("ema_vocab_hit_SV",)
"""Usage statistics in released files."""


@dataclass(frozen=True)
class VQTokenizerConfig:
    """Sizes of a tokenizer; the defaults are those of the official one (`vae_ch160v4096z32`).

    norm_groups: groups of the GroupNorms; 0 leaves normalisation out
    attention: attention blocks at the lowest resolution, in encoder and decoder
    num_phi: refinement convolutions that the stages share, at least 2
    """

    vocab_size: int = 4096
    latent_channels: int = 32
    ch: int = 160
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    num_phi: int = 4
    norm_groups: int = 32
    attention: bool = True
    image_channels: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
        object.__setattr__(self, "patch_nums", tuple(self.patch_nums))
        if self.norm_groups and self.ch % self.norm_groups:
            raise ValueError(f"tokenizer ch {self.ch} is not a multiple of norm_groups {self.norm_groups}")
        if list(self.patch_nums) != sorted(self.patch_nums) or len(self.patch_nums) < 2:
            raise ValueError(f"tokenizer patch_nums {self.patch_nums}: at least two sides, in ascending order")
        if self.num_phi < 2:
            raise ValueError(f"tokenizer num_phi {self.num_phi}: must be at least 2")

    @property
    def downsampling(self) -> int:
        """Pixels a side that one latent position stands for."""
        return int(2 ** (len(self.ch_mult) - 1))

    @property
    def image_size(self) -> int:
        """Side of the images whose latents have the last stage's side, in pixels."""
        return self.patch_nums[-1] * self.downsampling

    @property
    def num_tokens(self) -> int:
        """L, the tokens of one image."""
        return sum(side * side for side in self.patch_nums)


class Tokens(NamedTuple):
    """Tokenized images: int64 token maps (B, N) of every stage, and the latent (B, Z, h, w) accumulated up to each."""

    indices: list[Tensor]
    latents: list[Tensor]


class VQTokenizer(Autoencoder):
    """Images in [-1, 1] <-> latents <-> token maps. How the codebook is trained is not its concern."""

    kind = "multi-scale-vq"

    def __init__(self, config: VQTokenizerConfig):
        super().__init__()
        self.config = config
        z = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = MultiScaleQuantizer(config)
        self.quant_conv = nn.Conv2d(z, z, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(z, z, 3, padding=1)
        self.reset_tables()

    def reset_tables(self) -> None:
        """Kernels as channels last: a fifth faster on a CPU, and to rounding the same."""
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def latent_channels(self) -> int:
        """Z."""
        return self.config.latent_channels

    @property
    def downsampling(self) -> int:
        """Pixels a side that one latent position stands for."""
        return self.config.downsampling

    def to_config(self) -> dict[str, Any]:
        """The fields of its configuration."""
        return asdict(self.config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """A tokenizer of these sizes."""
        return cls(VQTokenizerConfig(**config))

    @classmethod
    def recognizes(cls, file: WeightsFile) -> bool:
        """Encoder and decoder with phi convolutions beside the codebook."""
        return "quantize.quant_resi.qresi_ls.0.weight" in file

    @classmethod
    def from_official(cls, file: WeightsFile, **sizes: Any) -> Self:
        """From the tokenizer's released file. Shapes do not tell `patch_nums`, which the transformer knows."""
        num_levels = file.count(r"encoder\.down\.(\d+)\.")
        ch, image_channels = file.shape("encoder.conv_in.weight")[:2]
        vocab_size, latent_channels = file.shape("quantize.embedding.weight")
        found = {
            "vocab_size": vocab_size,
            "latent_channels": latent_channels,
            "ch": ch,
            "ch_mult": tuple(
                file.shape(f"encoder.down.{level}.block.0.conv1.weight")[0] // ch for level in range(num_levels)
            ),
            "num_res_blocks": file.count(r"encoder\.down\.0\.block\.(\d+)\."),
            "num_phi": file.count(r"quantize\.quant_resi\.qresi_ls\.(\d+)\."),
            "attention": "encoder.mid.attn_1.qkv.weight" in file,
            "norm_groups": 32 if "encoder.norm_out.weight" in file else 0,
            "image_channels": image_channels,
        }
        return build(
            lambda: cls.from_config(found | sizes), file.tensors, f"{file.path.name}: tokenizer", ignore=IGNORED
        )

    def to_official(self) -> dict[str, Tensor]:
        """Its state dict, which has the official names."""
        return self.state_dict()

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """The continuous latent (B, Z, h, w) of images in [-1, 1]."""
        return self.quant_conv(self.encoder(images_BCHW))

    def encode_to_tokens(self, images_BCHW: Tensor) -> Tokens:
        """Token maps of images in [-1, 1]."""
        return self.latent_to_tokens(self.encode(images_BCHW))

    def latent_to_tokens(self, latent_BZhw: Tensor) -> Tokens:
        """Code a latent stage by stage: each stage quantizes what the sum of those before it leaves over."""
        rest_BZhw, sum_BZhw = latent_BZhw, torch.zeros_like(latent_BZhw)
        tokens = Tokens([], [])
        for stage, side in enumerate(self.config.patch_nums):
            map_BZPP = _resize_area(rest_BZhw, side)
            vectors_DZ = map_BZPP.permute(0, 2, 3, 1).reshape(-1, self.config.latent_channels)
            indices_BN = self.quantize.nearest(vectors_DZ).view(len(latent_BZhw), side * side)
            part_BZhw = self.refine(self.embed(indices_BN), stage)
            sum_BZhw, rest_BZhw = sum_BZhw + part_BZhw, rest_BZhw - part_BZhw
            tokens.indices.append(indices_BN)
            tokens.latents.append(sum_BZhw)
        return tokens

    def tokens_of(self, tokens_BL: Tensor) -> Tokens:
        """Token maps, with their latents, from all tokens of images in the order of the stages."""
        indices = list(tokens_BL.split([side * side for side in self.config.patch_nums], 1))
        parts = [self.refine(self.embed(indices_BN), stage) for stage, indices_BN in enumerate(indices)]
        return Tokens(indices, list(accumulate(parts)))

    def tokens_to_latent(self, indices: Sequence[Tensor]) -> Tensor:
        """The latent (B, Z, h, w) that token maps (B, N_s), one for each stage, stand for."""
        parts = [self.refine(self.embed(indices_BN), stage) for stage, indices_BN in enumerate(indices)]
        return torch.stack(parts).sum(0)

    def decode(self, latent_BZhw: Tensor, *, clamp: bool = True) -> Tensor:
        """Images (B, C, H, W) in [-1, 1]; without `clamp` as the decoder gives them, for losses."""
        images_BCHW = self.decoder(self.post_quant_conv(latent_BZhw))
        return images_BCHW.clamp(-1, 1) if clamp else images_BCHW

    def embed(self, indices_BN: Tensor) -> Tensor:
        """Codebook vectors of a square token map, (B, Z, P, P)."""
        side = round(indices_BN.shape[1] ** 0.5)
        vectors_BNZ = self.quantize.embedding(indices_BN)
        return vectors_BNZ.transpose(1, 2).reshape(len(indices_BN), self.config.latent_channels, side, side)

    def refine(self, map_BZPP: Tensor, stage: int) -> Tensor:
        """What a stage adds to the latent: its map, bicubically enlarged, through its phi."""
        side = self.config.patch_nums[-1]
        if stage < len(self.config.patch_nums) - 1:
            map_BZPP = F.interpolate(map_BZPP, size=(side, side), mode="bicubic")
        return self.phi_for_stage(stage)(map_BZPP)

    def phi_for_stage(self, stage: int) -> "Phi":
        """The refinement convolution that a stage uses."""
        phi = self.quantize.quant_resi.qresi_ls[phi_index(stage, len(self.config.patch_nums), self.config.num_phi)]
        assert isinstance(phi, Phi)
        return phi

    def next_input(self, latent_BZhw: Tensor, stage: int) -> Tensor:
        """What the transformer sees at `stage` >= 1, (B, N, Z): the latent accumulated before it, at its side."""
        return _resize_area(latent_BZhw, self.config.patch_nums[stage]).flatten(2).transpose(1, 2)

    def teacher_forcing(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """All tokens (B, L), and the transformer's inputs (B, L - 1, Z) for all stages but the first."""
        inputs = [self.next_input(latent, stage) for stage, latent in enumerate(tokens.latents[:-1], start=1)]
        return torch.cat(tokens.indices, 1), torch.cat(inputs, 1)


def phi_index(stage: int, num_stages: int, num_phi: int) -> int:
    """Which of `num_phi` convolutions a stage uses: that with the tick nearest to stage / (num_stages - 1).

    Some stages lie halfway between two ticks, and the rounding of float64 decides: stages 2 and 7 of 10 take the higher
    one. The released tokenizers were trained so; exact arithmetic gives another answer.
    """
    margin = 1 / (3 if num_phi == 4 else 2) / num_phi
    ticks = np.linspace(margin, 1 - margin, num_phi)
    return int(np.argmin(np.abs(ticks - stage / (num_stages - 1))))


def _resize_area(map_BZhw: Tensor, side: int) -> Tensor:
    """Mean over areas; the map itself where it has that side already."""
    return map_BZhw if map_BZhw.shape[-1] == side else F.interpolate(map_BZhw, size=(side, side), mode="area")


class MultiScaleQuantizer(nn.Module):
    """The codebook and the phi convolutions."""

    def __init__(self, config: VQTokenizerConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.latent_channels)
        self.quant_resi = PhiList(config.latent_channels, config.num_phi)

    def nearest(self, vectors_DZ: Tensor) -> Tensor:
        """Index (D,) of the codebook vector of least Euclidean distance; the first of equals."""
        codebook_VZ = self.embedding.weight.detach()
        vectors_DZ = vectors_DZ.detach().float()
        squares_DV = vectors_DZ.square().sum(1, keepdim=True) + codebook_VZ.square().sum(1)
        return torch.addmm(squares_DV, vectors_DZ, codebook_VZ.T, alpha=-2).argmin(1)


class PhiList(nn.Module):
    """The phi convolutions, under the key that the official checkpoints have."""

    def __init__(self, channels: int, num_phi: int):
        super().__init__()
        self.qresi_ls = nn.ModuleList(Phi(channels) for _ in range(num_phi))


class Phi(nn.Conv2d):
    """phi(h) = (h + conv(h)) / 2 with a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        """The refined map, of the same shape."""
        return 0.5 * input + 0.5 * super().forward(input)


class Encoder(nn.Module):
    """Images (B, C, H, W) -> (B, Z, h, w), halving the side after every level but the last."""

    def __init__(self, config: VQTokenizerConfig):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        lowest = len(widths) - 1
        self.conv_in = nn.Conv2d(config.image_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            width_in = widths[level - 1] if level else config.ch
            stack = Level(config, width_in, width, config.num_res_blocks, lowest=level == lowest)
            if level != lowest:
                stack.downsample = Downsample(width)
            self.down.append(stack)
        self.mid = Mid(config, widths[-1])
        self.norm_out = _norm(config, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """The latent before `quant_conv`."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents (B, Z, h, w) -> images (B, C, H, W). `up.i` is resolution level i, so the last is visited first."""

    def __init__(self, config: VQTokenizerConfig):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        lowest = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Mid(config, widths[-1])
        self.up = nn.ModuleList()
        for level, width in enumerate(widths):
            width_in = widths[min(level + 1, lowest)]
            stack = Level(config, width_in, width, config.num_res_blocks + 1, lowest=level == lowest)
            if level != 0:
                stack.upsample = Upsample(width)
            self.up.append(stack)
        self.norm_out = _norm(config, widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.image_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Images, not clamped."""
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class ResBlock(nn.Module):
    """Two 3x3 convolutions, each after normalisation and SiLU, beside a skip connection."""

    def __init__(self, config: VQTokenizerConfig, width_in: int, width: int):
        super().__init__()
        self.norm1 = _norm(config, width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = _norm(config, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, width, H, W)."""
        y = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class AttnBlock(nn.Module):
    """Self-attention of one head over all positions, beside a skip connection."""

    def __init__(self, config: VQTokenizerConfig, width: int):
        super().__init__()
        self.norm = _norm(config, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) -> the same shape."""
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)
        return x + self.proj_out(out.transpose(1, 2).reshape(x.shape))


class Mid(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, config: VQTokenizerConfig, width: int):
        super().__init__()
        self.block_1 = ResBlock(config, width, width)
        self.attn_1 = AttnBlock(config, width) if config.attention else nn.Identity()
        self.block_2 = ResBlock(config, width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, h, w) -> the same shape."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    """Half the side: 3x3 convolution of stride 2, zeros padded at right and bottom only."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) -> (B, width, H / 2, W / 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the side: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) -> (B, width, 2 H, 2 W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention at the lowest; then a change of resolution."""

    def __init__(self, config: VQTokenizerConfig, width_in: int, width: int, num_blocks: int, *, lowest: bool):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(config, width if i else width_in, width) for i in range(num_blocks))
        self.attn = nn.ModuleList(
            AttnBlock(config, width) if lowest and config.attention else nn.Identity() for _ in range(num_blocks)
        )
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, width, H, W), then down or up."""
        for block, attn in zip(self.block, self.attn, strict=True):
            x = attn(block(x))
        return self.upsample(self.downsample(x))


def _norm(config: VQTokenizerConfig, width: int) -> nn.Module:
    return GroupNorm(config.norm_groups, width, eps=1e-6) if config.norm_groups else nn.Identity()
