"""LDM's VQ-f4 and its like, by diffusers' class: an autoencoder whose decoder first moves latents to the nearest codes.

Files in the layout of diffusers and of LDM's training code are read; sizes come from the tensors' shapes.

Legend: B images, Z latent channels, h x w latent positions, H x W pixels.
"""

from typing import Any, Self

import torch
from torch import Tensor

from bitlaw.models.autoencoders.convolutional import CodebookAutoencoder, diffusers_names, sizes_of
from bitlaw.models.official import WeightsFile
from bitlaw.models.storage import build


class VQAutoencoder(CodebookAutoencoder):
    """`diffusers.VQModel`. The latents of a diffusion model are what `encode` gives, not quantized and not scaled."""

    kind = "vq"

    def decode(self, latents_BZhw: Tensor) -> Tensor:
        """Images (B, 3, H, W) of the codes that are nearest to latents."""
        # One image at a time: its distances to all codes are many numbers.
        codes_BZhw = torch.cat([self.net.quantize(latents_1Zhw)[0] for latents_1Zhw in latents_BZhw.split(1)])
        images: Tensor = self.net.decode(codes_BZhw, force_not_quantize=True).sample
        return images

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
        own = {name: tensor for name, tensor in file.tensors.items() if name.startswith(known)}
        tensors, original = diffusers_names(WeightsFile(file.path, own))
        found = sizes_of(WeightsFile(file.path, tensors, metadata=file.metadata))
        config = {"original_names": original, **found, **sizes}
        inside = {f"net.{name}": tensor for name, tensor in tensors.items()}
        return build(lambda: cls.from_config(config), inside, f"{file.path.name}: VQ autoencoder")
