"""Diffusion transformers: noise in a latent image, removed step by step.

Legend: B images, C channels and H = W side of the latent, O output channels.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from bitlaw.models.autoencoders import Autoencoder
from bitlaw.models.denoiser import Denoiser
from bitlaw.models.generator import Absorber, Extracted, Noise, Site, StepClock
from bitlaw.models.networks.dit import (
    Classes,
    DiffusionTransformer,
    DiTConfig,
    DiTTransformer,
    TransformerConfig,
    from_diffusers,
    is_diffusers,
)
from bitlaw.models.official import WeightsFile
from bitlaw.models.parts.diffusion import Diffusion, Losses
from bitlaw.models.parts.guidance import check_guidance, guide_channels
from bitlaw.models.parts.pixels import Rounding, from_uint8, to_uint8
from bitlaw.models.storage import build
from bitlaw.names import unknown_name

SD_LATENT_SCALE = 0.18215
"""Of Stable Diffusion's autoencoder: latents times this have about unit variance."""


@dataclass(frozen=True)
class DiTSampling:
    """Sampler settings; the defaults are those of the official evaluation.

    guidance: w, 0 or more, 1 is off
    num_steps, spacing: steps of the respaced process, "even" with both ends, or at an equal "stride" from 0 as DDIM's
    sampler, eta: "ddpm", or "ddim" with eta between 0 (deterministic) and 1
    guided_channels: channels of the noise that guidance acts on, "all" (kept as None) for all of them
    """

    guidance: float = 1.5
    num_steps: int = 250
    sampler: Literal["ddpm", "ddim"] = "ddpm"
    eta: float = 0.0
    spacing: Literal["even", "stride"] = "even"
    guided_channels: int | Literal["all"] | None = 3
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        if self.sampler not in ("ddpm", "ddim"):
            raise ValueError(f"sampler '{self.sampler}': must be ddpm or ddim")
        if self.spacing not in ("even", "stride"):
            raise ValueError(f"spacing '{self.spacing}': must be even or stride")
        check_guidance(self.guidance)
        if self.guided_channels == "all":
            object.__setattr__(self, "guided_channels", None)
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta {self.eta}: must be from 0 (deterministic) to 1")
        if self.num_steps < 1:
            raise ValueError(f"num_steps {self.num_steps}: must be 1 or more")


class DiTState(NamedTuple):
    """The latent between two steps, float32 whatever the network computes in, and what it was drawn for.

    classes: the labels sorted out, which is done once; None stands for that
    """

    x_BCHW: Tensor
    labels_B: Tensor
    noise: Noise
    classes: Classes | None = None


class DiT(Denoiser[DiTState]):
    """A diffusion transformer with its process and autoencoder."""

    family = "dit"
    autoencoder_names = ("sd-vae-ft-ema", "sd-vae-ft-mse", "vae")
    options: ClassVar[tuple[str, ...]] = ("heads", "num_classes", "null_class")
    """What `config_of` may be told."""
    default_sampling: ClassVar[DiTSampling] = DiTSampling()
    """Settings of a released model; without a null class, guidance is off."""
    net: DiffusionTransformer

    def __init__(
        self,
        net: DiffusionTransformer,
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
    def null_label(self) -> int | None:
        """The class after the last, where there is one."""
        return self.num_classes if self.net.config.null_class else None

    @property
    def recipes(self) -> Mapping[str, DiTSampling]:
        """The published evaluation: guidance 1.5 on three channels, 250 ancestral steps."""
        return {"paper": DiTSampling()} if self.net.config.null_class else {}

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
        """Every linear and the patch embedding, in order of execution."""
        per_step, per_token = self.num_steps, self.num_steps * self.net.config.num_tokens
        return [
            self._patch_site(per_token),
            Site("t_embedder.mlp.0", "embed", None, "embed", per_step),
            Site("t_embedder.mlp.2", "embed", None, "embed", per_step),
            *(site for i in range(self.net.config.depth) for site in self._block_sites(i, per_step, per_token)),
            Site("final_layer.adaLN_modulation.1", "adaln", None, "head", per_step),
            Site(
                "final_layer.linear",
                "head",
                None,
                "head",
                per_token,
                Absorber.modulation("final_layer.adaLN_modulation.1", self.net.config.width, gain=1, shift=0),
            ),
        ]

    def _patch_site(self, per_token: int) -> Site:
        return Site("x_embedder.proj", "embed", None, "embed", per_token)

    def _block_sites(self, index: int, per_step: int, per_token: int) -> list[Site]:
        width, adaln = self.net.config.width, f"blocks.{index}.adaLN_modulation.1"
        before_attention = Absorber.modulation(adaln, width, gain=1, shift=0)
        values = Absorber.rows(f"blocks.{index}.attn.qkv", 2 * width, 3 * width, shifts=True)
        before_mlp = Absorber.modulation(adaln, width, gain=4, shift=3)
        return [
            Site(adaln, "adaln", index, "blocks", per_step),
            Site(f"blocks.{index}.attn.qkv", "qkv", index, "blocks", per_token, before_attention),
            Site(f"blocks.{index}.attn.proj", "proj", index, "blocks", per_token, values),
            Site(f"blocks.{index}.mlp.fc1", "fc1", index, "blocks", per_token, before_mlp),
            Site(f"blocks.{index}.mlp.fc2", "fc2", index, "blocks", per_token),
        ]

    def _guided_channels(self) -> int:
        """How many channels guidance acts on. ValueError if the model has not as many."""
        channels, own = self.sampling.guided_channels, self.net.config.in_channels
        if channels is None:
            return own
        if not isinstance(channels, int) or not 1 <= channels <= own:
            raise ValueError(f"guided_channels {channels}: this model has {own} of noise; use 1 to {own}, or 'all'")
        return channels

    def start(self, labels_B: Tensor, noise: Noise) -> DiTState:
        """Noise. ValueError for settings that the model cannot sample with."""
        config, sampling = self.net.config, self.sampling
        if sampling.guidance != 1 and not config.null_class:
            raise ValueError(
                f"guidance {sampling.guidance:g} needs an unconditional class, and this model was trained without one; "
                "use guidance=1"
            )
        self._guided_channels()
        x_BCHW = noise.normal(0, (config.in_channels, config.input_size, config.input_size))
        return DiTState(x_BCHW, labels_B, noise, Classes.of(labels_B))

    def extract(self, state: DiTState, step: int) -> Extracted:
        """The guided output of the network, (B, O, H, W)."""
        timestep = self.spaced.timesteps[self.num_steps - 1 - step]
        w, classes = self.sampling.guidance, state.classes or Classes.of(state.labels_B)
        if w == 1:
            return Extracted(self.net.run(state.x_BCHW, self.net.conditions(timestep, classes)))
        both = self.net.conditions(timestep, classes.with_null(self.num_classes))
        cond, uncond = self.net.run(state.x_BCHW, both).chunk(2)
        return Extracted(guide_channels(cond, uncond, w, self._guided_channels()))

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

    # ---- training --------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_images(self, images_BCHW: Tensor) -> Tensor:
        """Scaled latents (B, C, H, W): the mean of the autoencoder's distribution, not a sample of it."""
        return self.latent_codec.encode(from_uint8(images_BCHW)) * self.latent_scale

    def loss(self, images_BCHW: Tensor, labels_B: Tensor, noise: Noise) -> Tensor:
        """Mean squared error of each uint8 image (B,), at one timestep each; see `losses`."""
        return self.losses(images_BCHW, labels_B, noise).mse_B

    def losses(self, images_BCHW: Tensor, labels_B: Tensor, noise: Noise) -> Losses:
        """Both terms of the training loss of each uint8 image; their sum is what DiT was trained with.

        Any run of images covers the schedule evenly, and every model meets the same timesteps and noise.
        """
        batch = self.teacher_forced(self.encode_images(images_BCHW), labels_B, noise)
        return self.process.losses_of(batch, self.predict(batch))

    def require_gradients(self) -> None:
        """All but DiT's table of positions, which is fixed."""
        super().require_gradients()
        if "pos_embed" in dict(self.net.named_parameters(recurse=False)):
            self.net.get_parameter("pos_embed").requires_grad_(False)

    # ---- checkpoints -----------------------------------------------------------------------------

    @classmethod
    def recognizes(cls, file: WeightsFile) -> bool:
        """A convolution for patches and blocks with fused attention; or the layout of diffusers."""
        return is_diffusers(file) or ("x_embedder.proj.weight" in file and "blocks.0.attn.qkv.weight" in file)

    @classmethod
    def rearranged(cls, file: WeightsFile, options: Mapping[str, Any]) -> WeightsFile:
        """A file of facebookresearch/DiT as it is; the layout of diffusers (facebook/DiT-XL-2-256) brought to it.

        The latter has the same weights, and gives the official numbers here; those of diffusers' own class differ, see
        `networks.dit.from_diffusers`.
        """
        return from_diffusers(file) if is_diffusers(file) else file

    @classmethod
    def config_of(cls, file: WeightsFile, autoencoder: Autoencoder | None, **options: Any) -> dict[str, Any]:
        """Sizes from shapes. What they do not tell:

        heads: 64 wide if not given, 72 in XL
        null_class: False for a class table without a row for no class (trained with class_dropout_prob 0)
        num_classes: tells the same by the number of classes; else that of a training run's arguments
        """
        if unknown := options.keys() - set(cls.options):
            raise unknown_name(min(unknown), cls.options, f"option of {cls.__name__}")
        return cls._described(cls._sizes_of(file, autoencoder, options))

    @classmethod
    def _sizes_of(
        cls, file: WeightsFile, autoencoder: Autoencoder | None, options: Mapping[str, Any]
    ) -> TransformerConfig:
        width, in_channels, patch_size = file.shape("x_embedder.proj.weight")[:3]
        return DiTConfig(
            depth=file.count(r"blocks\.(\d+)\."),
            width=width,
            heads=options.get("heads") or file.metadata.get("num_heads") or width // (72 if width == 1152 else 64) or 1,
            input_size=round(file.shape("pos_embed")[1] ** 0.5) * patch_size,
            in_channels=in_channels,
            patch_size=patch_size,
            learn_sigma=learns_sigma(file, in_channels, patch_size),
            mlp_ratio=file.shape("blocks.0.mlp.fc1.weight")[0] / width,
            **classes_of(file, options),
        )

    @classmethod
    def _described(cls, config: TransformerConfig) -> dict[str, Any]:
        """Configuration of a released model."""
        sampling = cls.default_sampling if config.null_class else replace(cls.default_sampling, guidance=1.0)
        return {
            "net": asdict(config),
            "process": asdict(Diffusion(variance="learned_range" if config.learn_sigma else "fixed_large")),
            "sampling": asdict(sampling),
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
            build(lambda: cls._network(config["net"]), tensors, cls.__name__, dtype=dtype),
            autoencoder,
            Diffusion(**config["process"]),
            DiTSampling(**config["sampling"]),
            latent_scale=config["latent_scale"],
        )

    @classmethod
    def _network(cls, sizes: Mapping[str, Any]) -> DiffusionTransformer:
        return DiTTransformer(DiTConfig(**sizes))


def learns_sigma(file: WeightsFile, in_channels: int, patch_size: int) -> bool:
    """Whether the channels of a variance come out. ValueError for a number of channels that is neither."""
    out_channels = file.shape("final_layer.linear.weight")[0] / patch_size**2
    if out_channels not in (in_channels, 2 * in_channels):
        raise ValueError(f"{out_channels:g} output channels do not go with {in_channels} input channels")
    return out_channels == 2 * in_channels


def classes_of(file: WeightsFile, options: Mapping[str, Any]) -> dict[str, Any]:
    """num_classes and null_class from the class table and what is stated beside it. ValueError if they do not fit."""
    rows, stated = file.shape("y_embedder.embedding_table.weight")[0], file.metadata.get("num_classes")
    stated = options.get("num_classes", stated)
    null_class = bool(options.get("null_class", stated is None or rows != stated))
    if stated is not None and rows - null_class != stated:
        raise ValueError(
            f"its table has {rows} classes, which are {rows - 1} and the one for no class, or {rows} without that one "
            f"(null_class=False); it does not go with num_classes {stated}"
        )
    return {"num_classes": rows - null_class, "null_class": null_class}
