"""KL autoencoders: those of Stable Diffusion (DiT, Large-DiT), MAR's KL-16 and LDM's KL-f8, all by diffusers' class.

Files in the layout of diffusers and of the original repositories are read; sizes come from the tensors' shapes.

Legend: B images, Z latent channels, h x w latent positions, H x W pixels.
"""

from typing import Any, Self

from torch import Tensor

from bitlaw.models.autoencoders.convolutional import ConvolutionalAutoencoder, diffusers_names, sizes_of
from bitlaw.models.official import WeightsFile
from bitlaw.models.storage import build


class KLAutoencoder(ConvolutionalAutoencoder):
    """`diffusers.AutoencoderKL`. `encode` gives the mean of the latents' distribution."""

    kind = "kl"

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """The mean of the latents' distribution, (B, Z, h, w)."""
        return self.distribution(images_BCHW)[0]

    def distribution(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents, (B, Z, h, w) each."""
        latents = self.net.encode(images_BCHW).latent_dist
        return latents.mean, latents.logvar

    def decode(self, latents_BZhw: Tensor) -> Tensor:
        """Images (B, 3, H, W)."""
        images: Tensor = self.net.decode(latents_BZhw).sample
        return images

    @classmethod
    def _make(cls, sizes: dict[str, Any]) -> Any:
        from diffusers import AutoencoderKL  # slow to import

        return AutoencoderKL(**sizes)

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
        """From a file of Stable Diffusion's, MAR's or LDM's autoencoder."""
        tensors, original = diffusers_names(file)
        found = sizes_of(WeightsFile(file.path, tensors, metadata=file.metadata))
        config = {"original_names": original, **found, **sizes}
        known = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
        inside = {f"net.{name}": tensor for name, tensor in tensors.items() if name.startswith(known)}
        return build(lambda: cls.from_config(config), inside, f"{file.path.name}: KL autoencoder")
