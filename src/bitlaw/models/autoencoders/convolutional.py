"""Autoencoders whose convolutions are a class of diffusers: what they share.

Legend: B images, Z latent channels, V vocabulary, h x w latent positions, H x W pixels.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor

from bitlaw.models.autoencoders.autoencoder import Autoencoder
from bitlaw.models.keymaps import present_names, taming_autoencoder, to_ours, to_theirs
from bitlaw.models.official import WeightsFile

_SIZES = (
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "latent_channels",
    "norm_num_groups",
    "mid_block_add_attention",
)


class ConvolutionalAutoencoder(Autoencoder):
    """Encoder and decoder by a class of diffusers, `net`.

    original_names: its file had the names of the original repositories, and `to_official` gives them back
    """

    size_names: ClassVar[tuple[str, ...]] = _SIZES
    """The settings of diffusers' class that a checkpoint keeps."""

    def __init__(self, net: Any, original_names: bool = False):
        super().__init__()
        self.net, self.original_names = net, original_names

    @property
    def latent_channels(self) -> int:
        """Z."""
        return int(self.net.config.latent_channels)

    @property
    def downsampling(self) -> int:
        """Pixels a side that one latent position stands for."""
        return int(2 ** (len(self.net.config.block_out_channels) - 1))

    def to_config(self) -> dict[str, Any]:
        """The sizes that diffusers' class takes."""
        return {"original_names": self.original_names, **{key: self.net.config[key] for key in self.size_names}}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """An autoencoder of these sizes."""
        return cls(cls._make(cls._sizes(config)), config.get("original_names", False))

    @classmethod
    def _make(cls, sizes: dict[str, Any]) -> Any:
        """The network of diffusers."""
        raise NotImplementedError

    @classmethod
    def _sizes(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Those of diffusers' class; JSON has lists for tuples."""
        return {key: tuple(v) if isinstance(v := config[key], list) else v for key in cls.size_names}

    def to_official(self) -> dict[str, Tensor]:
        """Under the names that its file had."""
        tensors: dict[str, Tensor] = self.net.state_dict()
        config = self.net.config
        modules = taming_autoencoder(len(config.block_out_channels), config.layers_per_block)
        return to_theirs(tensors, modules) if self.original_names else tensors


class CodebookAutoencoder(ConvolutionalAutoencoder):
    """`diffusers.VQModel`: there is a codebook between encoder and decoder."""

    size_names = (*_SIZES, "num_vq_embeddings", "vq_embed_dim")

    @property
    def latent_channels(self) -> int:
        """Z, the width of the codebook."""
        return int(self.net.config.vq_embed_dim)

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self.net.config.num_vq_embeddings)

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Latents (B, Z, h, w) before quantization."""
        latents_BZhw: Tensor = self.net.encode(images_BCHW).latents
        return latents_BZhw

    @classmethod
    def _make(cls, sizes: dict[str, Any]) -> Any:
        from diffusers import VQModel  # slow to import

        return VQModel(**sizes, scaling_factor=1.0)


def diffusers_names(file: WeightsFile) -> tuple[dict[str, Tensor], bool]:
    """The tensors of an autoencoder under the names of diffusers, and whether they had those of the originals."""
    if any(name.startswith("decoder.up_blocks.") for name in file.tensors):
        return present_names(file.tensors), False
    num_levels, num_blocks = file.count(r"encoder\.down\.(\d+)\."), file.count(r"encoder\.down\.0\.block\.(\d+)\.")
    return to_ours(file.tensors, taming_autoencoder(num_levels, num_blocks)), True


def sizes_of(file: WeightsFile) -> dict[str, Any]:
    """The sizes of an autoencoder under diffusers' names, from its tensors' shapes.

    Groups of the normalisations, which shapes do not tell, are those of its config.json, or 32 as in every release.
    """
    num_levels = file.count(r"encoder\.down_blocks\.(\d+)\.")

    def has_attention(half: str, level: int) -> bool:
        return any(name.startswith(f"{half}_blocks.{level}.attentions.") for name in file.tensors)

    widths = [file.shape(f"encoder.down_blocks.{i}.resnets.0.conv1.weight")[0] for i in range(num_levels)]
    sizes = {
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
    if "quantize.embedding.weight" in file:
        sizes["num_vq_embeddings"], sizes["vq_embed_dim"] = file.shape("quantize.embedding.weight")
    return sizes
