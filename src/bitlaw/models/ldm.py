"""Latent diffusion with UNets (Rombach et al. 2022): unconditional models, and the class-conditional one of ImageNet.

Legend: B images, C channels and H = W side of the latent.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from bitlaw.models.autoencoders import Autoencoder
from bitlaw.models.ddpm import (
    DDPM,
    UNetSampling,
    autoencoder_folder,
    is_diffusers,
    process_of,
    scheduler_config,
)
from bitlaw.models.keymaps import join_qkv, openai_unet, openai_unet_of, present_names, split_qkv, to_ours, to_theirs
from bitlaw.models.official import WeightsFile
from bitlaw.models.parts.diffusion import Diffusion
from bitlaw.names import lookup, unknown_name

if TYPE_CHECKING:
    from bitlaw.models.networks.unet import UNet

CLASS_VECTORS = "cond_stage_model.embedding.weight"

# LDM's scripts: DDIM from timestep 1 to the noise of timestep 0, no clipping, fractions of a byte cut off.
_DDIM = UNetSampling(sampler="ddim", num_steps=200, clip=False, first_timestep=1, to_x0=False, rounding="truncate")
_EVALUATIONS = {
    "celebahq": _DDIM,
    "ffhq": replace(_DDIM, eta=1.0),
    "bedroom": replace(_DDIM, eta=1.0),
    "church": replace(_DDIM, num_steps=400),
    "imagenet": replace(_DDIM, num_steps=250, guidance=1.5),
}
_NOTEBOOK = replace(_DDIM, num_steps=20, guidance=3.0)
_NAMES = {"celeb": "celebahq", "ffhq": "ffhq", "bedroom": "bedroom", "lsun_beds": "bedroom", "church": "church"}
"""What the paths of released files have in them."""


class LDM(DDPM):
    """A UNet in the latent space of an autoencoder, VQ-f4 or KL-f8.

    Where the hub's directories and diffusers' pipeline depart from the official sampler, this follows the official one:
    its first timestep is 1 and its last step stops at the noise of timestep 0 (their scheduler has neither, which costs
    half a percent of an image), and latents of a VQ autoencoder are not scaled (their pipeline divides by 0.18215).

    latent_scale: latents of the autoencoder times this are what the UNet denoises
    data_set: celebahq, ffhq, bedroom, church or imagenet, which decide the settings of the paper; "" if not known
    """

    family = "ldm"
    autoencoder_names = ("vqvae", "vae")
    official_wrapper = "state_dict"

    def __init__(
        self,
        net: "UNet",
        autoencoder: Autoencoder | None,
        process: Diffusion | None = None,
        sampling: UNetSampling | None = None,
        *,
        latent_scale: float = 1.0,
        data_set: str = "",
    ):
        process = process or ldm_process(0.0195)
        super().__init__(net, autoencoder, process, sampling or _DDIM)
        self.latent_scale, self.data_set = latent_scale, data_set
        if autoencoder is None:
            self.image_size = net.config.side * (8 if data_set == "church" else 4)
        elif autoencoder.latent_channels != net.config.in_channels:
            raise ValueError(
                f"ldm takes {net.config.in_channels} latent channels, its autoencoder has {autoencoder.latent_channels}"
            )

    @property
    def recipes(self) -> Mapping[str, UNetSampling]:
        """The published evaluation, by what the model was trained on; none where that is not known.

        Of the class-conditional model (FID 3.60 with guidance 1.5 and 250 steps), also "notebook", the 20 steps with
        guidance 3 that its authors' notebook draws samples with.
        """
        recipes = {"paper": _EVALUATIONS[self.data_set]} if self.data_set in _EVALUATIONS else {}
        return {**recipes, "notebook": _NOTEBOOK} if self.null_label is not None else recipes

    def to_pixels(self, x_BCHW: Tensor) -> Tensor:
        """Images, about in [-1, 1], of latents; a VQ autoencoder quantizes them first."""
        return self.latent_codec.decode(x_BCHW / self.latent_scale)

    def from_pixels(self, images_BCHW: Tensor) -> Tensor:
        """Latents of images in [-1, 1]: not quantized, and the mean where the autoencoder gives a distribution."""
        return self.latent_codec.encode(images_BCHW) * self.latent_scale

    # ---- checkpoints -----------------------------------------------------------------------------

    @classmethod
    def recognizes(cls, file: WeightsFile) -> bool:
        """A UNet of LDM's training code, without conditions or with one vector a class; or one of diffusers with an
        autoencoder's folder beside its own.
        """
        if is_diffusers(file):
            return autoencoder_folder(file) is not None
        conditions = {name for name in file.tensors if name.startswith(("cond_stage_model.", "label_emb."))}
        return "input_blocks.0.0.weight" in file and conditions <= {CLASS_VECTORS}

    @classmethod
    def config_of(cls, file: WeightsFile, autoencoder: Autoencoder | None, **options: Any) -> dict[str, Any]:
        """Sizes from shapes, and from config.json where there is one.

        Options: heads of every attention (otherwise one 32 channels wide; 8 where sides change by residual blocks, as
        in the model of churches; 1 in the class-conditional one), side of the latent (64; 32 with KL-f8), latent_scale
        (otherwise the file's scale_factor), data_set, beta_end of the schedule (0.0195; 0.0155 of the model of
        churches).
        """
        known = ("heads", "side", "latent_scale", "data_set", "beta_end")
        if unknown := options.keys() - set(known):
            raise unknown_name(min(unknown), known, "option of LDM")
        data_set = options.get("data_set")
        if data_set is None:
            data_set = data_set_of(file)
        elif data_set:
            lookup(_EVALUATIONS, data_set, "data set of LDM")
        is_church = data_set == "church"
        process = ldm_process(options.get("beta_end") or (0.0155 if is_church else 0.0195))
        num_classes = file.shape(CLASS_VECTORS)[0] - 1 if CLASS_VECTORS in file else 0
        if is_diffusers(file):
            from bitlaw.models.networks.unet import class_settings  # slow to import

            net = {"settings": class_settings(file.metadata), "heads": options.get("heads")}
            told = scheduler_config(file)
            if "beta_end" in options:
                told.pop("beta_end", None)
            process = process_of(told, process)
        else:
            net = {
                **ldm_settings(file, autoencoder, options.get("side"), options.get("heads")),
                "num_classes": num_classes,
            }
        sampling = _NOTEBOOK if num_classes else _EVALUATIONS.get(data_set, _DDIM)
        return {
            "net": net,
            "process": asdict(process),
            "sampling": asdict(sampling),
            "latent_scale": options.get("latent_scale") or latent_scale_of(file, autoencoder),
            "data_set": data_set,
        }

    def to_config(self) -> dict[str, Any]:
        """Settings of the network, the process and the sampler, the scale of latents and the data set."""
        return {**super().to_config(), "latent_scale": self.latent_scale, "data_set": self.data_set}

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        autoencoder: Autoencoder | None,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """The model."""
        model = super().from_config(config, tensors, autoencoder, dtype)
        return cls(
            model.net,
            autoencoder,
            model.process,
            model.sampling,
            latent_scale=config["latent_scale"],
            data_set=config["data_set"],
        )

    @classmethod
    def rearranged(cls, file: WeightsFile, options: Mapping[str, Any]) -> WeightsFile:
        """With q, k and v apart; how they are fused in the file is what the option `heads` also says."""
        return replace(file, tensors=split_qkv(file.tensors, heads_rule(file.tensors, options.get("heads"))))

    @classmethod
    def from_official_names(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the names of diffusers or of LDM's training code."""
        if "time_embedding.linear_1.weight" in tensors:
            return {f"unet.{name}": tensor for name, tensor in present_names(tensors).items()}
        unet = {name: tensor for name, tensor in tensors.items() if name not in (CLASS_VECTORS, "scale_factor")}
        split = split_qkv(unet, heads_rule(unet))
        ours = {f"unet.{name}": tensor for name, tensor in to_ours(split, openai_unet_of(unet)).items()}
        return ours | ({"class_embedding.weight": tensors[CLASS_VECTORS]} if CLASS_VECTORS in tensors else {})

    def to_official_names(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """To those of LDM's training code, with the scale of latents where there is one."""
        config = self.net.config
        unet = {name.removeprefix("unet."): tensor for name, tensor in tensors.items() if name.startswith("unet.")}
        settings = config.settings
        types = settings["down_block_types"]
        modules = openai_unet(
            ["Attn" in kind for kind in types],
            settings.get("layers_per_block", 2),
            resnet_resampling=settings.get("downsample_type") == "resnet",
            spatial=bool(config.num_classes),
        )
        official = to_theirs(unet, modules, kernel_dims=1)
        if not config.num_classes:
            width = settings.get("attention_head_dim") or 1

            def heads_of(channels: int) -> int:
                return config.heads or channels // width

            official = join_qkv(official, heads_of)
        official = {f"model.diffusion_model.{name}": tensor for name, tensor in official.items()}
        if config.num_classes:
            official[CLASS_VECTORS] = tensors["class_embedding.weight"]
        if self.latent_scale != 1:
            official["scale_factor"] = torch.tensor(self.latent_scale)
        return official


def ldm_process(beta_end: float) -> Diffusion:
    """LDM's process. Its schedule is called "linear" there, and is linear in the square roots of the betas."""
    return Diffusion(schedule="scaled_linear", variance="fixed_small", beta_ends=(0.0015, beta_end))


def data_set_of(file: WeightsFile) -> str:
    """What a released file was trained on: by its shapes, else by its folders' names; "" if they do not tell."""
    if CLASS_VECTORS in file:
        return "imagenet" if file.shape(CLASS_VECTORS)[0] == 1001 else ""
    if resamples_by_resnets(file.tensors) and file.shape("input_blocks.0.0.weight")[1] == 4:
        return "church"
    for part in reversed(file.path.parts[-6:]):
        for name, data_set in _NAMES.items():
            if name in part.lower():
                return data_set
    return ""


def latent_scale_of(file: WeightsFile, autoencoder: Autoencoder | None) -> float:
    """The scale of latents: the file's own; without one, 1 for a VQ autoencoder. ValueError for a KL one."""
    if "scale_factor" in file:
        return float(file.tensors["scale_factor"])
    if autoencoder is not None and autoencoder.kind == "kl":
        raise ValueError("no scale_factor in it, which latents of a KL autoencoder are scaled by; give latent_scale=")
    return 1.0


def resamples_by_resnets(tensors: Mapping[str, Tensor]) -> bool:
    """Whether sides change by residual blocks, as in the model of churches."""
    return any(re.match(r"output_blocks\.\d+\.[12]\.in_layers\.", name) for name in tensors)


def heads_rule(tensors: Mapping[str, Tensor], heads: int | None = None) -> Callable[[int], int]:
    """Heads of attention of a width: as given, or as the releases have them; see `LDM.config_of`."""
    if heads is None and resamples_by_resnets(tensors):
        heads = 8
    return lambda width: heads or max(1, width // 32)


def ldm_settings(
    file: WeightsFile, autoencoder: Autoencoder | None, side: int | None, heads: int | None
) -> dict[str, Any]:
    """The configuration of a UNet of LDM's training code without its classes; see `LDM.config_of`."""
    modules = {ours: official for official, ours in openai_unet_of(file.tensors).items()}

    def shape(ours: str) -> tuple[int, ...]:
        return file.shape(f"{modules[ours]}.weight")

    levels = range(sum(name.endswith(".resnets.0.conv1") and name.startswith("down_blocks.") for name in modules))
    widths = tuple(shape(f"down_blocks.{level}.resnets.0.conv1")[0] for level in levels)
    in_channels, groups = shape("conv_in")[1], min(32, *widths)
    if side is None:
        downsampling = autoencoder.downsampling if autoencoder else 8 if in_channels == 4 else 4
        side = 256 // downsampling
    by_resnet = resamples_by_resnets(file.tensors)
    attention = [any(name.startswith(f"down_blocks.{level}.attentions.") for name in modules) for level in levels]
    context = next((file.shape(name)[1] for name in file.tensors if name.endswith("attn2.to_k.weight")), 0)
    if context and by_resnet:
        raise ValueError("spatial transformers and resampling by residual blocks in one UNet: no release is like that")
    kinds = {True: "CrossAttn{}Block2D" if context else "Attn{}Block2D"}
    kinds[False] = "Resnet{}sampleBlock2D" if by_resnet else "{}Block2D"
    settings: dict[str, Any] = {
        "sample_size": side,
        "in_channels": in_channels,
        "out_channels": shape("conv_out")[0],
        "block_out_channels": widths,
        "down_block_types": tuple(kinds[here].format("Down") for here in attention),
        "up_block_types": tuple(kinds[here].format("Up") for here in reversed(attention)),
        "layers_per_block": sum(
            re.fullmatch(r"down_blocks\.0\.resnets\.\d+\.conv1", name) is not None for name in modules
        ),
        "norm_num_groups": groups,
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }
    if context:  # diffusers calls the number of heads `attention_head_dim` there
        return {"settings": {**settings, "cross_attention_dim": context, "attention_head_dim": heads or 1}}
    heads = 8 if heads is None and by_resnet else heads
    resampling = "resnet" if by_resnet else "conv"
    width = shape("down_blocks.0.resnets.0.conv1")[0]
    scale_shift = shape("down_blocks.0.resnets.0.time_emb_proj")[0] == 2 * width
    settings |= {
        "attention_head_dim": 32 if heads is None else None,
        "downsample_type": resampling,
        "upsample_type": resampling,
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
        "attn_norm_num_groups": groups,
    }
    return {"settings": settings, "heads": heads}
