"""Pixel diffusion with UNets: DDPM (Ho et al. 2020) and its sampler DDIM (Song et al. 2021).

Legend: B images, C channels and H = W side of what is denoised.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from bitlaw.models.autoencoders import Autoencoder
from bitlaw.models.denoiser import Denoiser
from bitlaw.models.generator import Extracted, Noise, Site, StepClock
from bitlaw.models.keymaps import Modules, ddpm_unet, present_names, to_ours, to_theirs
from bitlaw.models.official import AUTOENCODER_PARTS, WeightsFile
from bitlaw.models.parts.diffusion import Diffusion
from bitlaw.models.parts.guidance import guide
from bitlaw.models.parts.pixels import Rounding, from_uint8, to_uint8
from bitlaw.models.storage import build, with_prefix
from bitlaw.names import lookup, unknown_name

if TYPE_CHECKING:
    from bitlaw.models.networks.unet import UNet


@dataclass(frozen=True)
class UNetSampling:
    """Sampler settings; the defaults are those of DDPM's evaluation.

    guidance: w, 1 is off, which is all that a model without classes can do
    num_steps: the stride between timesteps is their number divided by this, rounded down. Where it does not divide
    them, the official samplers take more steps than they are asked for (400 gives 500), and so does this one
    sampler, eta: "ddpm", or "ddim" with eta between 0 (deterministic) and 1
    clip: limit each prediction of x_0 to [-1, 1]
    first_timestep: of DDIM, the least noisy timestep that is used: 0, or 1 in LDM's (diffusers' `steps_offset`)
    to_x0: DDIM's last step gives x_0; LDM's stops at the noise of timestep 0 (diffusers' `set_alpha_to_one=False`)
    """

    guidance: float = 1.0
    num_steps: int = 1000
    sampler: Literal["ddpm", "ddim"] = "ddpm"
    eta: float = 0.0
    clip: bool = True
    first_timestep: int = 0
    to_x0: bool = True
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        if self.sampler not in ("ddpm", "ddim"):
            raise ValueError(f"sampler '{self.sampler}': must be ddpm or ddim")
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise ValueError(f"guidance {self.guidance}: must be 0 (no class) or more; 1 is the model as it is")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta {self.eta}: must be from 0 (deterministic) to 1")
        if self.first_timestep not in (0, 1):
            raise ValueError(f"first_timestep {self.first_timestep}: must be 0 or 1")
        if self.num_steps < 1:
            raise ValueError(f"num_steps {self.num_steps}: must be 1 or more")


class UNetState(NamedTuple):
    """Images or latents between two steps, float32, and what they were drawn for."""

    x_BCHW: Tensor
    labels_B: Tensor
    noise: Noise


_MODULE = re.compile(r"unet\.\w+_block(s\.\d+)?\.(resnets|attentions|downsamplers|upsamplers)\.\d+")


class DDPM(Denoiser[UNetState]):
    """A UNet that denoises pixels. It has no classes: the only label is 0, "whatever it draws".

    Samplers are those of the papers, which the scheduler settings on the hub are not in every point: the DDIM sampler
    does not clip x_0 (theirs says `clip_sample=True`, which is another sampler), and the variance is the large one for
    CIFAR-10 and the small one at 256 px.
    """

    family = "ddpm"
    net: "UNet"

    def __init__(
        self,
        net: "UNet",
        autoencoder: Autoencoder | None = None,
        process: Diffusion | None = None,
        sampling: UNetSampling | None = None,
    ):
        self.net, self.autoencoder = net, autoencoder
        self.process = process or Diffusion(variance="fixed_large")
        self.sampling = sampling or UNetSampling()
        self.num_classes = net.config.num_classes or 1
        self.image_size = net.config.side * (autoencoder.downsampling if autoencoder else 1)
        self.clock = StepClock()
        if self.process.variance == "learned_range":
            raise ValueError(f"diffusion variance 'learned_range' does not go with {self.family}: use a fixed one")

    @property
    def null_label(self) -> int | None:
        """The class after the last; None for a model without classes."""
        return self.net.config.num_classes or None

    @property
    def recipes(self) -> Mapping[str, UNetSampling]:
        """The published evaluation, 1000 ancestral steps with clipping; and "ddim", 100 steps of the DDIM paper."""
        return {"paper": UNetSampling(), "ddim": UNetSampling(num_steps=100, sampler="ddim", clip=False)}

    @property
    def spaced(self) -> Diffusion:
        """The process that a rollout follows."""
        stride = max(1, self.process.num_timesteps // self.sampling.num_steps)
        return self.process.respaced(f"stride{stride}+{self.sampling.first_timestep if self._by_ddim else 0}")

    @property
    def _by_ddim(self) -> bool:
        return self.sampling.sampler == "ddim"

    blocks_are_chained = False

    @property
    def blocks(self) -> list[str]:
        """Residual blocks, transformers and convolutions that change the side, in order of execution."""
        found = (_MODULE.match(site.name) for site in self.sites())
        return list(dict.fromkeys(match.group() for match in found if match))

    @property
    def num_steps(self) -> int:
        """Steps of a rollout; see `UNetSampling`."""
        return self.spaced.num_steps

    @property
    def sampler_name(self) -> str:
        """Sampler, its stochasticity or variance, and how it ends."""
        sampling = self.sampling
        clipped = " clipped" * sampling.clip
        if not self._by_ddim:
            return f"ddpm {self.process.variance}{clipped}"
        end = "x_0" if sampling.to_x0 else "timestep 0"
        return f"ddim eta={sampling.eta:g} from timestep {sampling.first_timestep} to {end}{clipped}"

    def sites(self) -> list[Site]:
        """Every linear and convolution of the UNet, in order of execution."""
        return [replace(site, uses=site.uses * self.num_steps) for site in self.net.sites()]

    def start(self, labels_B: Tensor, noise: Noise) -> UNetState:
        """Noise. ValueError for guidance where there are no classes."""
        if self.sampling.guidance != 1 and self.null_label is None:
            raise ValueError(
                f"guidance {self.sampling.guidance:g}: this {self.family} has no classes to be guided by; leave it at 1"
            )
        config = self.net.config
        return UNetState(noise.normal(0, (config.in_channels, config.side, config.side)), labels_B, noise)

    def extract(self, state: UNetState, step: int) -> Extracted:
        """The guided output of the network, (B, C, H, W)."""
        timestep = self.spaced.timesteps[self.num_steps - 1 - step]
        w, labels_B = self.sampling.guidance, state.labels_B
        if w == 1 or self.null_label is None:
            return Extracted(self.net(state.x_BCHW, timestep, labels_B))
        labels_2B = torch.cat([labels_B, torch.full_like(labels_B, self.null_label)])
        both_2BCHW = self.net(torch.cat([state.x_BCHW, state.x_BCHW]), timestep, labels_2B)
        cond, uncond = both_2BCHW.chunk(2)
        return Extracted(guide(cond, uncond, w))

    def reconstruct(self, state: UNetState, extracted: Extracted, step: int) -> UNetState:
        """One step of the sampler."""
        x, output, sampling, spaced = state.x_BCHW, extracted.features, self.sampling, self.spaced
        index = spaced.num_steps - 1 - step
        ends = index == 0 and (sampling.to_x0 or not self._by_ddim)
        draws = not ends and (sampling.eta > 0 or not self._by_ddim)
        noise = state.noise.normal(step + 1, x.shape[1:]) if draws else None
        if self._by_ddim:
            x = spaced.ddim_step(x, output, index, sampling.eta, noise, clip=sampling.clip, to_x0=sampling.to_x0)
        else:
            x = spaced.ddpm_step(x, output, index, noise, clip=sampling.clip)
        return state._replace(x_BCHW=x)

    def decode(self, state: UNetState) -> Tensor:
        """uint8 images (B, 3, H, W)."""
        return to_uint8(self.to_pixels(state.x_BCHW), self.sampling.rounding)

    # ---- training --------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_images(self, images_BCHW: Tensor) -> Tensor:
        """What is denoised, (B, C, H, W)."""
        return self.from_pixels(from_uint8(images_BCHW))

    def to_pixels(self, x_BCHW: Tensor) -> Tensor:
        """Images, about in [-1, 1], of what is denoised."""
        return x_BCHW

    def from_pixels(self, images_BCHW: Tensor) -> Tensor:
        """What is denoised, of images in [-1, 1]."""
        return images_BCHW

    # ---- checkpoints -----------------------------------------------------------------------------

    @classmethod
    def recognizes(cls, file: WeightsFile) -> bool:
        """A UNet of the DDPM and DDIM repositories, or one of diffusers without an autoencoder beside it."""
        if is_diffusers(file):
            return autoencoder_folder(file) is None and "class_embedding.weight" not in file
        return "temb.dense.0.weight" in file and "down.0.block.0.conv1.weight" in file

    @classmethod
    def config_of(cls, file: WeightsFile, autoencoder: Autoencoder | None, **options: Any) -> dict[str, Any]:
        """Sizes from shapes, and from config.json and scheduler_config.json where there are such.

        Options: image_size (otherwise that which puts the attention at 16 px, as in every release), variance of the
        ancestral steps (fixed_large up to 64 px, fixed_small above). ValueError for more than one head of attention
        in a network of DDPM's: diffusers supposes that of a config.json without `attention_head_dim`, and files that
        were written so draw noise.
        """
        if unknown := options.keys() - {"image_size", "variance"}:
            raise unknown_name(min(unknown), ("image_size", "variance"), "option of DDPM")
        schedule = scheduler_config(file)
        if is_diffusers(file):
            from bitlaw.models.networks.unet import class_settings  # slow to import

            settings = {"attention_head_dim": None, **class_settings(file.metadata)}
            is_original = settings.get("freq_shift") == 1 and not settings.get("flip_sin_to_cos")
            if is_original and settings["attention_head_dim"] is not None:
                raise ValueError(
                    f"config.json says attention_head_dim {settings['attention_head_dim']}, but DDPM's attention has "
                    "one head of the whole width; set it to null there"
                )
            settings["sample_size"] = options.get("image_size") or settings.get("sample_size")
        else:
            settings = ddpm_settings(file, options.get("image_size"))
        variance: Any = options.get("variance") or schedule.get("variance_type")
        if variance is None:
            variance = "fixed_large" if settings["sample_size"] <= 64 else "fixed_small"
        process = replace(process_of(schedule, Diffusion()), variance=variance)
        return {
            "net": {"settings": settings},
            "process": asdict(process),
            "sampling": asdict(UNetSampling(num_steps=process.num_timesteps)),
        }

    def to_config(self) -> dict[str, Any]:
        """Settings of the network, the process and the sampler."""
        return {
            "net": asdict(self.net.config),
            "process": asdict(self.process),
            "sampling": asdict(self.sampling),
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
        from bitlaw.models.networks.unet import UNet, UNetConfig  # slow to import

        return cls(
            build(lambda: UNet(UNetConfig(**config["net"])), tensors, cls.family.upper(), dtype=dtype),
            autoencoder,
            Diffusion(**config["process"]),
            UNetSampling(**config["sampling"]),
        )

    @classmethod
    def from_official_names(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the names of diffusers, today's and those of 2022, or of the DDIM repository."""
        if "time_embedding.linear_1.weight" in tensors:
            return with_prefix("unet.", present_names(tensors))
        file = WeightsFile(Path(), tensors)
        return with_prefix("unet.", to_ours(tensors, original_modules(file)))

    def to_official_names(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """To those of the DDIM repository. ValueError for a network that it cannot hold."""
        settings = self.net.config.settings
        if settings.get("attention_head_dim") is not None or settings.get("freq_shift") != 1:
            raise ValueError("the official layout holds networks of DDPM only, and this is another UNet of diffusers")
        modules = ddpm_unet(len(settings["block_out_channels"]), settings.get("layers_per_block", 2))
        return to_theirs({name.removeprefix("unet."): tensor for name, tensor in tensors.items()}, modules)


def is_diffusers(file: WeightsFile) -> bool:
    """Whether a file is a `UNet2DModel` in the layout of diffusers, with its config.json."""
    return file.metadata.get("_class_name") == "UNet2DModel" and "time_embedding.linear_1.weight" in file


def autoencoder_folder(file: WeightsFile) -> str | None:
    """Name of the autoencoder's folder beside the UNet's folder of a pipeline; None if there is none."""
    if file.path.parent.name != "unet":
        return None
    beside = file.path.parent.parent
    return next((part for part in AUTOENCODER_PARTS if (beside / part).is_dir()), None)


def scheduler_config(file: WeightsFile) -> dict[str, Any]:
    """The settings of the scheduler of a directory in diffusers' layout; {} if there are none."""
    folder = file.path.parent
    for path in (folder / "scheduler_config.json", folder.parent / "scheduler" / "scheduler_config.json"):
        if is_diffusers(file) and path.is_file():
            return dict(json.loads(path.read_text(encoding="utf-8")))
    return {}


def process_of(schedule: Mapping[str, Any], default: Diffusion) -> Diffusion:
    """The process that a scheduler's settings describe, where they do; its sampler's settings are passed over.

    ValueError for a process that `Diffusion` is not.
    """
    if schedule.get("trained_betas") is not None:
        raise ValueError("scheduler_config.json has betas of its own (trained_betas), which are not supported")
    prediction = schedule.get("prediction_type", "epsilon")
    predictions: dict[str, Literal["epsilon", "v"]] = {"epsilon": "epsilon", "v_prediction": "v"}
    ends = default.beta_ends
    if "beta_start" in schedule and "beta_end" in schedule:
        ends = (schedule["beta_start"], schedule["beta_end"])
    kind = schedule.get("beta_schedule", default.schedule)
    return replace(
        default,
        num_timesteps=schedule.get("num_train_timesteps", default.num_timesteps),
        schedule=kind,
        prediction=lookup(predictions, prediction, "prediction_type of the scheduler"),
        beta_ends=None if kind == "squaredcos_cap_v2" else ends,
    )


def original_modules(file: WeightsFile) -> Modules:
    """The map of a UNet of the DDIM repository."""
    return ddpm_unet(file.count(r"down\.(\d+)\."), file.count(r"down\.0\.block\.(\d+)\."))


def ddpm_settings(file: WeightsFile, image_size: int | None) -> dict[str, Any]:
    """diffusers' settings for a UNet of the DDIM repository; see `DDPM.config_of`."""
    num_levels = file.count(r"down\.(\d+)\.")
    attention = [f"down.{level}.attn.0.norm.weight" in file for level in range(num_levels)]
    if image_size is None:
        if True not in attention:
            raise ValueError("no level has attention, which would tell the size of images; give image_size=")
        image_size = 16 * 2 ** attention.index(True)
    widths = [file.shape(f"down.{level}.block.0.conv1.weight")[0] for level in range(num_levels)]
    return {
        "sample_size": image_size,
        "in_channels": file.shape("conv_in.weight")[1],
        "out_channels": file.shape("conv_out.weight")[0],
        "block_out_channels": tuple(widths),
        "down_block_types": tuple("AttnDownBlock2D" if here else "DownBlock2D" for here in attention),
        "up_block_types": tuple("AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attention)),
        "layers_per_block": file.count(r"down\.0\.block\.(\d+)\."),
        "norm_num_groups": min(32, *widths),
        "norm_eps": 1e-6,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "attention_head_dim": None,
    }
