"""LDM's VQ-f4 and its like, by diffusers' class: an autoencoder whose decoder first moves latents to the nearest codes.

Files in the layout of diffusers and of LDM's training code are read; sizes come from the tensors' shapes.

Legend: B images, Z latent channels, h x w latent positions, H x W pixels.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from bitlaw.models.autoencoders.autoencoder import Autoencoder
from bitlaw.models.autoencoders.kl import diffusers_names, sizes_of
from bitlaw.models.keymaps import present_names, taming_autoencoder, to_theirs
from bitlaw.models.official import WeightsFile
from bitlaw.models.storage import build

if TYPE_CHECKING:
    from diffusers import VQModel


class VQAutoencoder(Autoencoder):
    """`diffusers.VQModel`. The latents of a diffusion model are what `encode` gives, not quantized and not scaled.

    original_names: its file had the names of LDM's training code, and `to_official` gives them back
    """

    kind = "vq"

    def __init__(self, vq: "VQModel", original_names: bool = False):
        super().__init__()
        self.vq, self.original_names = vq, original_names

    @property
    def latent_channels(self) -> int:
        """Z, the width of the codebook."""
        return int(self.vq.config.vq_embed_dim)

    @property
    def downsampling(self) -> int:
        """Pixels a side that one latent position stands for."""
        return int(2 ** (len(self.vq.config.block_out_channels) - 1))

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Latents (B, Z, h, w), not quantized."""
        latents: Tensor = self.vq.encode(images_BCHW).latents
        return latents

    def decode(self, latents_BZhw: Tensor) -> Tensor:
        """Images (B, 3, H, W) of the codes that are nearest to latents."""
        # One image at a time: its distances to all codes are many numbers.
        codes_BZhw = torch.cat([self.vq.quantize(latents_1Zhw)[0] for latents_1Zhw in latents_BZhw.split(1)])
        images: Tensor = self.vq.decode(codes_BZhw, force_not_quantize=True).sample
        return images

    def to_config(self) -> dict[str, Any]:
        """The sizes that diffusers' class takes."""
        return {"original_names": self.original_names, **{key: self.vq.config[key] for key in _SIZES}}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """An autoencoder of these sizes."""
        from diffusers import VQModel  # slow to import

        sizes = {key: tuple(v) if isinstance(v := config[key], list) else v for key in _SIZES}
        return cls(VQModel(**sizes, scaling_factor=1.0), config.get("original_names", False))

    @classmethod
    def recognizes(cls, file: WeightsFile) -> bool:
        """LDM's encoder and decoder with one codebook; LlamaGen's blocks and VAR's quantizer have other names."""
        known_decoder = any(name.startswith(("decoder.up.", "decoder.up_blocks.")) for name in file.tensors)
        has_stages = any(name.startswith("quantize.quant_resi") for name in file.tensors)
        return "quantize.embedding.weight" in file and known_decoder and not has_stages

    @classmethod
    def from_official(cls, file: WeightsFile, **sizes: Any) -> Self:
        """From a directory of diffusers or the first stage of a checkpoint of LDM; its training loss is passed over."""
        known = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.embedding.")
        tensors = {name: tensor for name, tensor in file.tensors.items() if name.startswith(known)}
        own = WeightsFile(file.path, tensors, metadata=file.metadata)
        original = not any(name.startswith("decoder.up_blocks.") for name in tensors)
        tensors = diffusers_names(own) if original else present_names(tensors)
        vocab_size, latent_channels = file.shape("quantize.embedding.weight")
        config = {
            "original_names": original,
            **sizes_of(WeightsFile(file.path, tensors, metadata=file.metadata)),
            "num_vq_embeddings": vocab_size,
            "vq_embed_dim": latent_channels,
            **sizes,
        }
        inside = {f"vq.{name}": tensor for name, tensor in tensors.items()}
        return build(lambda: cls.from_config(config), inside, f"{file.path.name}: VQ autoencoder")

    def to_official(self) -> dict[str, Tensor]:
        """Under the names that its file had."""
        tensors: dict[str, Tensor] = self.vq.state_dict()
        config = self.vq.config
        modules = taming_autoencoder(len(config.block_out_channels), config.layers_per_block)
        return to_theirs(tensors, modules) if self.original_names else tensors


# The settings of diffusers' class that a checkpoint keeps.
_SIZES = (
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "latent_channels",
    "norm_num_groups",
    "mid_block_add_attention",
    "num_vq_embeddings",
    "vq_embed_dim",
)
