"""Diffusion transformer (Peebles & Xie 2023): noise in a latent image, removed step by step.

State-dict keys are those of the official checkpoints (facebookresearch/DiT). Two departures from the official sampler
leave its results as they are: the unconditional half exists inside the network call only, and what depends on
(timestep, class) alone is computed once for each distinct pair in a step.

Legend: B images, C channels and H = W side of the latent, O output channels, T tokens, D width, K distinct conditions.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlaw.models.attention import attend
from bitlaw.models.diffusion import Diffusion
from bitlaw.models.gelu import gelu_tanh
from bitlaw.models.generator import Extracted, ImageGenerator, Noise, Site, StepClock
from bitlaw.models.guidance import guide_channels
from bitlaw.models.pixels import Rounding, from_uint8, to_uint8
from bitlaw.models.storage import TOKENIZER_PREFIX, load_tensors, split_prefix, with_prefix
from bitlaw.models.vq_tokenizer import VQTokenizer, VQTokenizerConfig


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


class LatentCodec(Protocol):
    """What DiT needs of an autoencoder: images in [-1, 1] <-> latents of about unit variance."""

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Latents (B, C, H, W) of images."""

    def decode(self, latent_BCHW: Tensor) -> Tensor:
        """Images of latents, in [-1, 1]."""


class TokenizerLatents(nn.Module):
    """A VQ tokenizer used without its quantizer: its continuous latents, times `latent_scale`."""

    def __init__(self, tokenizer: VQTokenizer, latent_scale: float):
        super().__init__()
        self.tokenizer, self.latent_scale = tokenizer, latent_scale

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Latents (B, Z, h, w) of images in [-1, 1]."""
        return self.tokenizer.encode_to_latent(images_BCHW) * self.latent_scale

    def decode(self, latent_BCHW: Tensor) -> Tensor:
        """Images in [-1, 1]."""
        return self.tokenizer.decode(latent_BCHW / self.latent_scale)


@dataclass(frozen=True)
class DiTSampling:
    """Sampler settings; the defaults are those of the official evaluation.

    guidance: w, 1 is off
    num_steps, spacing: steps of the respaced process, "even" with both ends, or at an equal "stride" from 0 as DDIM's
    sampler, eta: "ddpm", or "ddim" with eta between 0 (deterministic) and 1
    guided_channels: channels of the noise that guidance acts on, None for all
    """

    guidance: float = 1.5
    num_steps: int = 250
    sampler: Literal["ddpm", "ddim"] = "ddpm"
    eta: float = 0.0
    spacing: Literal["even", "stride"] = "even"
    guided_channels: int | None = 3
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        if self.sampler not in ("ddpm", "ddim"):
            raise ValueError(f"sampler '{self.sampler}': must be ddpm or ddim")
        if self.spacing not in ("even", "stride"):
            raise ValueError(f"spacing '{self.spacing}': must be even or stride")


class DiTState(NamedTuple):
    """The latent between two steps, and what it was drawn for."""

    x_BCHW: Tensor
    labels_B: Tensor
    noise: Noise


class DiT(ImageGenerator[DiTState]):
    """A diffusion transformer with its process and autoencoder."""

    family = "dit"
    net: DiTTransformer

    def __init__(
        self,
        net: DiTTransformer,
        decoder: LatentCodec,
        process: Diffusion | None = None,
        sampling: DiTSampling | None = None,
        *,
        image_size: int | None = None,
    ):
        self.net, self.decoder = net, decoder
        self.process = process or Diffusion()
        self.sampling = sampling or DiTSampling()
        self.num_classes = net.config.num_classes
        self.image_size = image_size or 8 * net.config.input_size
        self.clock = StepClock()
        if (self.process.variance == "learned_range") != net.config.learn_sigma:
            raise ValueError(
                f"diffusion variance '{self.process.variance}' does not go with learn_sigma={net.config.learn_sigma}"
            )

    @property
    def num_steps(self) -> int:
        """Steps of a rollout."""
        return self.sampling.num_steps

    @property
    def sampler_name(self) -> str:
        """Sampler, its stochasticity, spacing of the steps, channels that are guided."""
        sampling = self.sampling
        eta = f" eta={sampling.eta:g}" if sampling.sampler == "ddim" else ""
        return f"{sampling.sampler}{eta} {sampling.spacing} guided_channels={sampling.guided_channels or 'all'}"

    @property
    def spaced(self) -> Diffusion:
        """The respaced process that a rollout follows."""
        prefix = "ddim" if self.sampling.spacing == "stride" else ""
        return self.process.respaced(f"{prefix}{self.sampling.num_steps}")

    def sites(self) -> list[Site]:
        """Every linear, in order of execution; the patch embedding, a convolution, is none of them."""
        per_step, per_token = self.num_steps, self.num_steps * self.net.config.num_tokens
        sites = [
            Site("t_embedder.mlp.0", "embed", None, "embed", per_step),
            Site("t_embedder.mlp.2", "embed", None, "embed", per_step),
        ]
        for i in range(self.net.config.depth):
            sites += [
                Site(f"blocks.{i}.adaLN_modulation.1", "adaln", i, "blocks", per_step),
                Site(f"blocks.{i}.attn.qkv", "qkv", i, "blocks", per_token),
                Site(f"blocks.{i}.attn.proj", "proj", i, "blocks", per_token),
                Site(f"blocks.{i}.mlp.fc1", "fc1", i, "blocks", per_token),
                Site(f"blocks.{i}.mlp.fc2", "fc2", i, "blocks", per_token),
            ]
        return [
            *sites,
            Site("final_layer.adaLN_modulation.1", "adaln", None, "head", per_step),
            Site("final_layer.linear", "head", None, "head", per_token),
        ]

    def start(self, labels_B: Tensor, noise: Noise) -> DiTState:
        """Noise."""
        config = self.net.config
        x_BCHW = noise.normal(0, (config.in_channels, config.input_size, config.input_size))
        return DiTState(x_BCHW, labels_B, noise)

    def extract(self, state: DiTState, step: int) -> Extracted:
        """The guided output of the network, (B, O, H, W)."""
        timestep = self.spaced.timesteps[self.num_steps - 1 - step]
        w, batch = self.sampling.guidance, len(state.labels_B)
        if w == 1:
            return Extracted(self.net.run(state.x_BCHW, self.net.conditions(timestep, state.labels_B)))
        labels_2B = torch.cat([state.labels_B, torch.full_like(state.labels_B, self.num_classes)])
        x_2BCHW = torch.cat([state.x_BCHW, state.x_BCHW])
        cond, uncond = self.net.run(x_2BCHW, self.net.conditions(timestep, labels_2B)).split(batch)
        channels = self.sampling.guided_channels
        return Extracted(guide_channels(cond, uncond, w, self.net.config.in_channels if channels is None else channels))

    def reconstruct(self, state: DiTState, extracted: Extracted, step: int) -> DiTState:
        """One step of the sampler."""
        index = self.num_steps - 1 - step
        x, output, sampling = state.x_BCHW, extracted.features, self.sampling
        random = index > 0 and (sampling.sampler == "ddpm" or sampling.eta > 0)
        noise = state.noise.normal(step + 1, x.shape[1:]) if random else None
        if sampling.sampler == "ddim":
            return state._replace(x_BCHW=self.spaced.ddim_step(x, output, index, sampling.eta, noise))
        return state._replace(x_BCHW=self.spaced.ddpm_step(x, output, index, noise))

    def decode(self, state: DiTState) -> Tensor:
        """uint8 images (B, 3, H, W)."""
        return to_uint8(self.decoder.decode(state.x_BCHW), self.sampling.rounding)

    def loss(self, images_BCHW: Tensor, labels_B: Tensor, noise: Noise) -> Tensor:
        """Mean squared error of each uint8 image (B,), at one timestep each.

        Timesteps follow the golden-ratio sequence over the images' indices, so that any run of images covers the
        schedule evenly and every model meets the same timesteps and noise.
        """
        x0_BCHW = self.decoder.encode(from_uint8(images_BCHW))
        fractions = [(image * (math.sqrt(5) - 1) / 2 + 0.5) % 1 for image in noise.image_ids_B]
        t_B = torch.tensor([int(f * self.process.num_timesteps) for f in fractions], device=x0_BCHW.device)
        epsilon_BCHW = noise.normal(0, x0_BCHW.shape[1:])
        output = self.net(self.process.add_noise(x0_BCHW, t_B, epsilon_BCHW), t_B, labels_B)
        return self.process.losses(output, x0_BCHW, t_B, epsilon_BCHW).mse_B

    def to_checkpoint(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Configuration and tensors (official keys; the tokenizer's under "tokenizer.")."""
        if not isinstance(self.decoder, TokenizerLatents):
            raise ValueError("only a DiT on a tokenizer's latents can be written; keep other autoencoders beside it")
        config = {
            "family": self.family,
            "net": asdict(self.net.config),
            "process": asdict(self.process),
            "sampling": asdict(self.sampling),
            "tokenizer": asdict(self.decoder.tokenizer.config),
            "latent_scale": self.decoder.latent_scale,
        }
        return config, self.net.state_dict() | with_prefix(TOKENIZER_PREFIX, self.decoder.tokenizer.state_dict())

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The model that `to_checkpoint` gave. Raises ValueError naming each tensor that does not fit."""
        tokenizer = VQTokenizer(VQTokenizerConfig(**config["tokenizer"]))
        net = DiTTransformer(DiTConfig(**config["net"]))
        inside, own = split_prefix(TOKENIZER_PREFIX, tensors)
        load_tensors(tokenizer, inside, "tokenizer")
        load_tensors(net, own, "DiT")
        return cls(
            net.eval().requires_grad_(False),
            TokenizerLatents(tokenizer.eval().requires_grad_(False), config["latent_scale"]),
            Diffusion(**config["process"]),
            DiTSampling(**config["sampling"]),
            image_size=tokenizer.config.image_size,
        )
