"""The network of DiT (Peebles & Xie 2023): predicts the noise in a latent image.

State-dict keys are those of the official checkpoints (facebookresearch/DiT). Two departures from the official sampler
leave its results as they are: the unconditional half exists inside the network only, and what depends on
(timestep, class) alone is computed once for each distinct pair in a step. Modulations of several steps in one product
would save 2 % of DiT-XL/2's time at one image on a CPU, and quantized layers could not be told their step.

Legend: B images, R rows (B, or 2 B with guidance: conditional, then unconditional), C channels and H = W side of the
latent, O output channels, T tokens, D width, K distinct conditions.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlaw.linear import Linear
from bitlaw.models.official import WeightsFile
from bitlaw.models.parts.gelu import gelu_tanh
from bitlaw.models.parts.transformer import MLP, SelfAttention


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes that the networks of DiT and Large-DiT have in common.

    input_size: side of the latent
    learn_sigma: twice the channels come out
    null_class: the class after the last is the unconditional one; without it there is no guidance
    """

    depth: int
    width: int
    heads: int
    num_classes: int = 1000
    input_size: int = 32
    in_channels: int = 4
    patch_size: int = 2
    learn_sigma: bool = True
    null_class: bool = True

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

    @property
    def condition_width(self) -> int:
        """Width of the vectors of timesteps and classes."""
        return self.width


@dataclass(frozen=True)
class DiTConfig(TransformerConfig):
    """Sizes of DiT. mlp_ratio: hidden width of the MLPs in widths."""

    mlp_ratio: float = 4.0


class Classes(NamedTuple):
    """The distinct classes of a batch, and which of them each row has."""

    distinct_K: Tensor
    row_R: Tensor

    @classmethod
    def of(cls, y_R: Tensor) -> Self:
        """Those of rows."""
        return cls(*y_R.unique(return_inverse=True))

    def with_null(self, null: int) -> Self:
        """For twice as many rows, of which the second half has the class `null`."""
        count = len(self.distinct_K)
        nothing_K = self.distinct_K.new_full((1,), null)
        return type(self)(
            torch.cat([self.distinct_K, nothing_K]), torch.cat([self.row_R, torch.full_like(self.row_R, count)])
        )


class Conditions(NamedTuple):
    """The distinct (timestep, class) pairs of a batch as vectors, and which of them each row has."""

    vectors_KD: Tensor
    row_R: Tensor


class DiffusionTransformer(nn.Module, ABC):
    """What DiT and Large-DiT share: (noisy latent, timestep, class) -> noise or v, and the variance's channels.

    Class num_classes is the null class. Arithmetic is in the type of the weights, inputs and outputs are float32.
    """

    config: TransformerConfig
    t_embedder: "TimestepEmbed"
    y_embedder: "LabelEmbed"
    final_layer: "FinalLayer"

    @abstractmethod
    def embed(self, x_BCHW: Tensor) -> Tensor:
        """Tokens (B, T, D) of latents, with their positions where the network adds them."""

    @abstractmethod
    def run_blocks(self, h_RTD: Tensor, silu_KD: Tensor, row_R: Tensor) -> Tensor:
        """(R, T, D) -> (R, T, D) through all blocks; `silu_KD` are SiLU of the distinct conditions."""

    def forward(self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor:
        """Output (B, O, H, W) for original timesteps and classes of each row."""
        vectors_BD = self.t_embedder(t_B) + self.y_embedder(y_B)
        return self.run(x_BCHW, Conditions(vectors_BD, torch.arange(len(y_B), device=y_B.device)))

    def conditions(self, timestep: int, classes: Classes | Tensor) -> Conditions:
        """Conditions of rows that share a timestep: one vector for each distinct class."""
        if isinstance(classes, Tensor):
            classes = Classes.of(classes)
        timestep_1 = torch.full((1,), timestep, device=classes.distinct_K.device)
        return Conditions(self.t_embedder(timestep_1) + self.y_embedder(classes.distinct_K), classes.row_R)

    def run(self, x_BCHW: Tensor, conditions: Conditions) -> Tensor:
        """Output (R, O, H, W) under given conditions; each latent is that of one row, or of one in every half."""
        h_BTD = self.embed(x_BCHW.to(conditions.vectors_KD.dtype))
        h_RTD = h_BTD.repeat(len(conditions.row_R) // len(h_BTD), 1, 1)
        silu_KD = F.silu(conditions.vectors_KD)
        h_RTD = self.run_blocks(h_RTD, silu_KD, conditions.row_R)
        return self.unpatchify(self.final_layer(h_RTD, silu_KD, conditions.row_R)).float()

    def unpatchify(self, tokens_RTO: Tensor) -> Tensor:
        """Tokens, features ordered (row, column, channel) in the patch -> (R, O, H, W)."""
        config = self.config
        side, p = config.input_size // config.patch_size, config.patch_size
        x = tokens_RTO.view(-1, side, side, p, p, config.out_channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(-1, config.out_channels, config.input_size, config.input_size)


class DiTTransformer(DiffusionTransformer):
    """The network of DiT."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbed(config.condition_width)
        self.y_embedder = LabelEmbed(config)
        self.pos_embed = nn.Parameter(
            sincos_positions(config.width, config.input_size // config.patch_size)[None], requires_grad=False
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self._initialize()

    def embed(self, x_BCHW: Tensor) -> Tensor:
        """Tokens (B, T, D) of latents with their positions."""
        return self.x_embedder(x_BCHW) + self.pos_embed

    def run_blocks(self, h_RTD: Tensor, silu_KD: Tensor, row_R: Tensor) -> Tensor:
        """(R, T, D) -> (R, T, D) through all blocks; `silu_KD` are SiLU of the distinct conditions."""
        for block in self.blocks:
            h_RTD = block(h_RTD, silu_KD, row_R)
        return h_RTD

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
        self.mlp = nn.Sequential(Linear(2 * self.num_frequencies, width), nn.SiLU(), Linear(width, width))

    def forward(self, t_B: Tensor) -> Tensor:
        """(B,) -> (B, D)."""
        steps = torch.arange(self.num_frequencies, dtype=torch.float32, device=t_B.device) / self.num_frequencies
        angles = t_B[:, None].float() * torch.exp(-math.log(10000) * steps)
        sinusoids = torch.cat([angles.cos(), angles.sin()], -1)
        return self.mlp(sinusoids.to(next(self.mlp.parameters()).dtype))


class LabelEmbed(nn.Module):
    """A table of class vectors; the last row is the null class, if there is one."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + config.null_class, config.condition_width)

    def forward(self, y_B: Tensor) -> Tensor:
        """(B,) -> (B, D)."""
        return self.embedding_table(y_B)


class Block(nn.Module):
    """Transformer block; shift, scale and gate of both branches come from the condition (adaLN-zero)."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.attn = SelfAttention(config.width, config.heads)
        self.mlp = MLP(config.width, int(config.width * config.mlp_ratio), gelu_tanh)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(config.width, 6 * config.width))

    def forward(self, h_RTD: Tensor, silu_KD: Tensor, row_R: Tensor) -> Tensor:
        """(R, T, D) -> (R, T, D); `silu_KD` are SiLU of the distinct conditions."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulations(self.adaLN_modulation[1](silu_KD), row_R, 6)
        h_RTD = torch.addcmul(h_RTD, gate1, self.attn(_modulated_norm(h_RTD, shift1, scale1)))
        return torch.addcmul(h_RTD, gate2, self.mlp(_modulated_norm(h_RTD, shift2, scale2)))


class FinalLayer(nn.Module):
    """Modulated normalisation and the linear to patches."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.linear = Linear(config.width, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(config.condition_width, 2 * config.width))

    def forward(self, h_RTD: Tensor, silu_KD: Tensor, row_R: Tensor) -> Tensor:
        """(R, T, D) -> (R, T, patch^2 O)."""
        shift, scale = modulations(self.adaLN_modulation[1](silu_KD), row_R, 2)
        return self.linear(_modulated_norm(h_RTD, shift, scale))


def modulations(out_KX: Tensor, row_R: Tensor, num_parts: int) -> tuple[Tensor, ...]:
    """The parts (R, 1, D) of a modulation, for each row."""
    return out_KX[row_R].unsqueeze(1).chunk(num_parts, dim=-1)


def _modulated_norm(h_RTD: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(h_RTD, h_RTD.shape[-1:], eps=1e-6), 1 + scale)


def sincos_positions(width: int, side: int) -> Tensor:
    """Position table (side^2, width): sines and cosines of the column, then of the row."""
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    rows, columns = torch.meshgrid(
        torch.arange(side, dtype=torch.float64), torch.arange(side, dtype=torch.float64), indexing="ij"
    )
    angles = [grid.flatten()[:, None] * omega for grid in (columns, rows)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1).float()


# ---- the layout of diffusers ------------------------------------------------------------------------


def is_diffusers(file: WeightsFile) -> bool:
    """Whether a file is that of diffusers' `DiTTransformer2DModel`, as in facebook/DiT-XL-2-256 on the hub."""
    return "pos_embed.proj.weight" in file and "transformer_blocks.0.norm1.linear.weight" in file


def from_diffusers(file: WeightsFile) -> WeightsFile:
    """The same weights under official names.

    diffusers' class has the timestep's and the class's embedding once in every block, which must all be equal, and no
    position table, which is computed again. What the class computes with them differs from the official network, which
    this project has: its timesteps' frequencies go by 127 instead of 128, and its second norm's eps is 1e-5 instead of
    1e-6; the weights were trained with the official numbers. Raises ValueError for a configuration that is not DiT's.
    """
    width, patch_size = file.shape("pos_embed.proj.weight")[0], file.shape("pos_embed.proj.weight")[-1]
    config = file.metadata
    heads, sample_size = config.get("num_attention_heads"), config.get("sample_size")
    if not heads or not sample_size:
        raise ValueError(
            f"{file.path.name}: weights in the layout of diffusers without their config.json, which has "
            "num_attention_heads and sample_size; load the directory that holds both"
        )
    expected = {
        "attention_head_dim": width // heads,
        "norm_type": "ada_norm_zero",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "norm_elementwise_affine": False,
    }
    if wrong := [
        f"{key} {config[key]}, expected {value}" for key, value in expected.items() if config.get(key, value) != value
    ]:
        raise ValueError(f"{file.path.name}: config.json is not that of a DiT: {'; '.join(wrong)}")
    tensors = _official_names(file)
    tensors["pos_embed"] = sincos_positions(width, sample_size // patch_size)[None].to(
        tensors["x_embedder.proj.weight"]
    )
    metadata = {"num_heads": heads, "num_classes": config.get("num_embeds_ada_norm")}
    return WeightsFile(file.path, tensors, file.wrapper, metadata, file.others)


# Modules outside the blocks, those that every block has once more, and those of a block.
_OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
_COPIED = {
    "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table",
}
_IN_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}


def _official_names(file: WeightsFile) -> dict[str, Tensor]:
    """Names that are known translated; others stay, for the network to refuse them."""
    ours: dict[str, Tensor] = {}
    unequal: list[str] = []
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in file.tensors.items():
        module, _, kind = name.rpartition(".")
        head, _, inside = module.partition(".")[2].partition(".")
        if not module.startswith("transformer_blocks."):
            if name != "pos_embed.pos_embed":  # a buffer that some versions of diffusers store
                ours[f"{_OUTSIDE.get(module, module)}.{kind}"] = tensor
        elif inside in _COPIED:
            first = ours.setdefault(f"{_COPIED[inside]}.{kind}", tensor)
            if first is not tensor and not torch.equal(first, tensor):
                unequal.append(name)
        elif inside in ("attn1.to_q", "attn1.to_k", "attn1.to_v"):
            parts.setdefault(f"blocks.{head}.attn.qkv.{kind}", {})[inside[-1]] = tensor
        else:
            ours[f"blocks.{head}.{_IN_BLOCK.get(inside, inside)}.{kind}"] = tensor
    if unequal:
        raise ValueError(
            f"{file.path.name}: every block has the embedders of a DiT once more, and these copies differ from the "
            f"first: {', '.join(unequal[:4])}"
        )
    for name, qkv in parts.items():
        if missing := [letter for letter in "qkv" if letter not in qkv]:
            raise ValueError(f"{file.path.name}: {name}: the part of {', '.join(missing)} is missing")
        ours[name] = torch.cat([qkv[letter] for letter in "qkv"])
    return ours
