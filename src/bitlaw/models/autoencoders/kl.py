"""KL autoencoders: those of Stable Diffusion (DiT, Large-DiT), MAR's KL-16 and LDM's KL-f8, all by diffusers' class.

Files in the layout of diffusers and of the original repositories are read; sizes come from the tensors' shapes.

Legend: B images, Z latent channels, h x w latent positions, H x W pixels.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from bitlaw.models.autoencoders.autoencoder import Autoencoder
from bitlaw.models.keymaps import present_names, taming_autoencoder, to_ours, to_theirs
from bitlaw.models.official import WeightsFile
from bitlaw.models.storage import build

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class KLAutoencoder(Autoencoder):
    """`diffusers.AutoencoderKL`. `encode` gives the mean of the latents' distribution.

    original_names: its file had the names of the original repositories, and `to_official` gives them back
    """

    kind = "kl"

    def __init__(self, vae: "AutoencoderKL", original_names: bool = False):
        super().__init__()
        self.vae, self.original_names = vae, original_names

    @property
    def latent_channels(self) -> int:
        """Z."""
        return int(self.vae.config.latent_channels)

    @property
    def downsampling(self) -> int:
        """Pixels a side that one latent position stands for."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """The mean of the latents' distribution, (B, Z, h, w)."""
        return self.distribution(images_BCHW)[0]

    def distribution(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents, (B, Z, h, w) each."""
        latents = self.vae.encode(images_BCHW).latent_dist
        return latents.mean, latents.logvar

    def decode(self, latents_BZhw: Tensor) -> Tensor:
        """Images (B, 3, H, W)."""
        images: Tensor = self.vae.decode(latents_BZhw).sample
        return images

    def to_config(self) -> dict[str, Any]:
        """The sizes that diffusers' class takes."""
        return {"original_names": self.original_names, **{key: self.vae.config[key] for key in _SIZES}}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """An autoencoder of these sizes."""
        from diffusers import AutoencoderKL  # slow to import

        sizes = {key: tuple(v) if isinstance(v := config[key], list) else v for key in _SIZES}
        return cls(AutoencoderKL(**sizes), config.get("original_names", False))

    @classmethod
    def recognizes(cls, file: WeightsFile) -> bool:
        """Convolutional encoder and decoder with `post_quant_conv`, and no codebook."""
        return (
            "post_quant_conv.weight" in file
            and "quantize.embedding.weight" not in file
            and "decoder.conv_in.weight" in file
        )

    @classmethod
    def from_official(cls, file: WeightsFile, **sizes: Any) -> Self:
        """From a file of Stable Diffusion's or MAR's autoencoder."""
        original = not any(name.startswith("decoder.mid_block") for name in file.tensors)
        tensors = diffusers_names(file) if original else present_names(file.tensors)
        found = sizes_of(WeightsFile(file.path, tensors, metadata=file.metadata))
        config = {"original_names": original, **found, **sizes}
        known = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
        inside = {f"vae.{name}": tensor for name, tensor in tensors.items() if name.startswith(known)}
        return build(lambda: cls.from_config(config), inside, f"{file.path.name}: KL autoencoder")

    def to_official(self) -> dict[str, Tensor]:
        """Under the names that its file had."""
        tensors: dict[str, Tensor] = self.vae.state_dict()
        return to_theirs(tensors, self._modules_map()) if self.original_names else tensors

    def _modules_map(self) -> dict[str, str]:
        config = self.vae.config
        return taming_autoencoder(len(config.block_out_channels), config.layers_per_block)


# The settings of diffusers' class that a checkpoint keeps.
_SIZES = (
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "latent_channels",
    "norm_num_groups",
    "mid_block_add_attention",
)


def diffusers_names(file: WeightsFile) -> dict[str, Tensor]:
    """The tensors of an autoencoder of an original repository under the names of diffusers."""
    num_levels, num_blocks = file.count(r"encoder\.down\.(\d+)\."), file.count(r"encoder\.down\.0\.block\.(\d+)\.")
    return to_ours(file.tensors, taming_autoencoder(num_levels, num_blocks))


def sizes_of(file: WeightsFile) -> dict[str, Any]:
    """The sizes of an autoencoder under diffusers' names, from its tensors' shapes.

    Groups of the normalisations, which shapes do not tell, are those of its config.json, or 32 as in every release.
    """
    num_levels = file.count(r"encoder\.down_blocks\.(\d+)\.")

    def has_attention(half: str, level: int) -> bool:
        return any(name.startswith(f"{half}_blocks.{level}.attentions.") for name in file.tensors)

    widths = [file.shape(f"encoder.down_blocks.{i}.resnets.0.conv1.weight")[0] for i in range(num_levels)]
    return {
        "down_block_types": tuple(
            f"{'Attn' if has_attention('encoder.down', i) else ''}DownEncoderBlock2D" for i in range(num_levels)
        ),
        "up_block_types": tuple(
            f"{'Attn' if has_attention('decoder.up', i) else ''}UpDecoderBlock2D" for i in range(num_levels)
        ),
        "block_out_channels": tuple(widths),
        "layers_per_block": file.count(r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "latent_channels": file.shape("decoder.conv_in.weight")[1],
        "norm_num_groups": file.metadata.get("norm_num_groups", min(32, *widths)),
        "mid_block_add_attention": any("mid_block.attentions" in name for name in file.tensors),
    }
