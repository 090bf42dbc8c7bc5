"""Diffusion transformers: noise in a latent image, removed step by step.

Legend: B images, C channels and H = W side of the latent, O output channels.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from bitlaw.models.autoencoders.multi_scale_vq import VQTokenizer, VQTokenizerConfig
from bitlaw.models.generator import Extracted, ImageGenerator, Noise, Site, StepClock
from bitlaw.models.networks.dit import DiTConfig, DiTTransformer
from bitlaw.models.parts.diffusion import Diffusion
from bitlaw.models.parts.guidance import guide_channels
from bitlaw.models.parts.pixels import Rounding, from_uint8, to_uint8
from bitlaw.models.storage import TOKENIZER_PREFIX, load_tensors, split_prefix, with_prefix


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
