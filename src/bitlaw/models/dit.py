"""Diffusion transformers: noise in a latent image, removed step by step.

Legend: B images, C channels and H = W side of the latent, O output channels.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from bitlaw.models.autoencoders import Autoencoder
from bitlaw.models.generator import Extracted, ImageGenerator, Noise, Site, StepClock
from bitlaw.models.networks.dit import DiTConfig, DiTTransformer
from bitlaw.models.official import WeightsFile
from bitlaw.models.parts.diffusion import Diffusion
from bitlaw.models.parts.guidance import guide_channels
from bitlaw.models.parts.pixels import Rounding, from_uint8, to_uint8
from bitlaw.models.storage import build
from bitlaw.names import unknown_name

SD_LATENT_SCALE = 0.18215
"""Of Stable Diffusion's autoencoder: latents times this have about unit variance."""


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
    autoencoder_names = ("sd-vae-ft-ema", "sd-vae-ft-mse", "vae")
    net: DiTTransformer

    def __init__(
        self,
        net: DiTTransformer,
        autoencoder: Autoencoder | None,
        process: Diffusion | None = None,
        sampling: DiTSampling | None = None,
        *,
        latent_scale: float = SD_LATENT_SCALE,
    ):
        self.net, self.autoencoder, self.latent_scale = net, autoencoder, latent_scale
        self.process = process or Diffusion()
        self.sampling = sampling or DiTSampling()
        self.num_classes = net.config.num_classes
        self.image_size = (autoencoder.downsampling if autoencoder else 8) * net.config.input_size
        self.clock = StepClock()
        if (self.process.variance == "learned_range") != net.config.learn_sigma:
            raise ValueError(
                f"diffusion variance '{self.process.variance}' does not go with learn_sigma={net.config.learn_sigma}"
            )
        if autoencoder is not None and autoencoder.latent_channels != net.config.in_channels:
            raise ValueError(
                f"{self.family} takes {net.config.in_channels} latent channels, its autoencoder has "
                f"{autoencoder.latent_channels}"
            )

    @property
    def null_label(self) -> int:
        """The class after the last."""
        return self.num_classes

    @property
    def recipes(self) -> Mapping[str, DiTSampling]:
        """The published evaluation: guidance 1.5 on three channels, 250 ancestral steps."""
        return {"paper": DiTSampling()}

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
        return to_uint8(self.latent_codec.decode(state.x_BCHW / self.latent_scale), self.sampling.rounding)

    def loss(self, images_BCHW: Tensor, labels_B: Tensor, noise: Noise) -> Tensor:
        """Mean squared error of each uint8 image (B,), at one timestep each.

        Timesteps follow the golden-ratio sequence over the images' indices, so that any run of images covers the
        schedule evenly and every model meets the same timesteps and noise.
        """
        x0_BCHW = self.latent_codec.encode(from_uint8(images_BCHW)) * self.latent_scale
        fractions = [(image * (math.sqrt(5) - 1) / 2 + 0.5) % 1 for image in noise.image_ids_B]
        t_B = torch.tensor([int(f * self.process.num_timesteps) for f in fractions], device=x0_BCHW.device)
        epsilon_BCHW = noise.normal(0, x0_BCHW.shape[1:])
        output = self.net(self.process.add_noise(x0_BCHW, t_B, epsilon_BCHW), t_B, labels_B)
        return self.process.losses(output, x0_BCHW, t_B, epsilon_BCHW).mse_B

    @property
    def latent_codec(self) -> Autoencoder:
        """Its autoencoder. ValueError if the model was loaded without."""
        if self.autoencoder is None:
            wanted = self.autoencoder_names[0]
            raise ValueError(f"this {self.family} was loaded without its autoencoder ({wanted}), which this needs")
        return self.autoencoder

    # ---- checkpoints -----------------------------------------------------------------------------

    @classmethod
    def recognizes(cls, file: WeightsFile) -> bool:
        """A patch embedding and adaLN blocks with fused attention."""
        return "x_embedder.proj.weight" in file and "blocks.0.attn.qkv.weight" in file

    @classmethod
    def config_of(cls, file: WeightsFile, autoencoder: Autoencoder | None, **options: Any) -> dict[str, Any]:
        """Sizes from shapes. Option: heads, which shapes do not tell (taken to be 64 wide, 72 in XL)."""
        if unknown := options.keys() - {"heads"}:
            raise unknown_name(min(unknown), ("heads",), "option of DiT")
        width, in_channels, patch_size = file.shape("x_embedder.proj.weight")[:3]
        out_channels = file.shape("final_layer.linear.weight")[0] // patch_size**2
        if out_channels not in (in_channels, 2 * in_channels):
            raise ValueError(f"{out_channels} output channels do not go with {in_channels} input channels")
        heads = options.get("heads") or file.metadata.get("num_heads") or width // (72 if width == 1152 else 64)
        config = DiTConfig(
            depth=file.count(r"blocks\.(\d+)\."),
            width=width,
            heads=heads,
            num_classes=file.shape("y_embedder.embedding_table.weight")[0] - 1,
            input_size=round(file.shape("pos_embed")[1] ** 0.5) * patch_size,
            in_channels=in_channels,
            patch_size=patch_size,
            learn_sigma=out_channels == 2 * in_channels,
            mlp_ratio=file.shape("blocks.0.mlp.fc1.weight")[0] / width,
        )
        process = Diffusion(variance="learned_range" if config.learn_sigma else "fixed_large")
        return {
            "net": asdict(config),
            "process": asdict(process),
            "sampling": asdict(DiTSampling()),
            "latent_scale": SD_LATENT_SCALE,
        }

    def to_config(self) -> dict[str, Any]:
        """Sizes of the network, the process, sampler settings and the scale of latents."""
        return {
            "net": asdict(self.net.config),
            "process": asdict(self.process),
            "sampling": asdict(self.sampling),
            "latent_scale": self.latent_scale,
        }

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        autoencoder: Autoencoder | None,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """The model."""
        return cls(
            build(lambda: DiTTransformer(DiTConfig(**config["net"])), tensors, "DiT", dtype=dtype),
            autoencoder,
            Diffusion(**config["process"]),
            DiTSampling(**config["sampling"]),
            latent_scale=config["latent_scale"],
        )
