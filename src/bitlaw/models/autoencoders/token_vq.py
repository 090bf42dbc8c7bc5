"""LlamaGen's tokenizers VQ-16 and VQ-8: an image is one map of tokens from a codebook of unit vectors.

The convolutions are diffusers' `VQModel`; the quantizer is here, because codebook rows and latents are normalised where
they are used (the rows in the files are not of unit length).

Legend: B images, Z latent channels, h x w latent positions, N = h w tokens, V vocabulary, H x W pixels.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from bitlaw.models.autoencoders.convolutional import CodebookAutoencoder, sizes_of
from bitlaw.models.keymaps import Modules, attention, resnet, to_ours, to_theirs
from bitlaw.models.official import WeightsFile
from bitlaw.models.storage import build

USAGE = "quantize.codebook_used"
"""A buffer of official files: which codes training has met lately."""


class TokenVQ(CodebookAutoencoder):
    """Images in [-1, 1] <-> latents <-> one token map, in row-major order.

    unit_codes: latents and codebook rows are scaled to unit length, as in all releases
    """

    kind = "token-vq"

    def __init__(self, net: Any, unit_codes: bool = True):
        super().__init__(net, original_names=True)
        self.unit_codes = unit_codes

    @property
    def codebook_VZ(self) -> Tensor:
        """The codebook's rows as they are used."""
        weight_VZ: Tensor = self.net.quantize.embedding.weight
        return F.normalize(weight_VZ, dim=-1) if self.unit_codes else weight_VZ

    def nearest(self, latents_BZhw: Tensor) -> Tensor:
        """Tokens (B, N), int64: the codebook row of least distance to each latent, the first of equals."""
        vectors_BNZ = latents_BZhw.flatten(2).transpose(1, 2)
        if self.unit_codes:
            vectors_BNZ = F.normalize(vectors_BNZ, dim=-1)
        codebook_VZ = self.codebook_VZ
        squares_V = codebook_VZ.square().sum(-1)

        def of_image(vectors_NZ: Tensor) -> Tensor:  # one at a time: V numbers for each position are many
            squares_NV = vectors_NZ.square().sum(-1, keepdim=True) + squares_V
            return torch.addmm(squares_NV, vectors_NZ, codebook_VZ.T, alpha=-2).argmin(-1)

        return torch.stack([of_image(vectors_NZ) for vectors_NZ in vectors_BNZ])

    def encode_to_tokens(self, images_BCHW: Tensor) -> Tensor:
        """Tokens (B, N), int64, of images in [-1, 1]."""
        return self.nearest(self.encode(images_BCHW))

    def embed(self, tokens_BN: Tensor) -> Tensor:
        """Codebook rows (B, Z, h, w) of square token maps."""
        side = round(tokens_BN.shape[1] ** 0.5)
        return self.codebook_VZ[tokens_BN].transpose(1, 2).unflatten(2, (side, side))

    def decode(self, latents_BZhw: Tensor) -> Tensor:
        """Images (B, 3, H, W) of quantized latents, not clamped."""
        images_BCHW: Tensor = self.net.decode(latents_BZhw, force_not_quantize=True).sample
        return images_BCHW

    def to_config(self) -> dict[str, Any]:
        """The sizes that diffusers' class takes, and how codes are used."""
        return {"unit_codes": self.unit_codes, **{key: self.net.config[key] for key in self.size_names}}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """A tokenizer of these sizes."""
        return cls(cls._make(cls._sizes(config)), config.get("unit_codes", True))

    @classmethod
    def recognizes(cls, file: WeightsFile) -> bool:
        """Encoder and decoder of numbered blocks beside a codebook."""
        return "quantize.embedding.weight" in file and "decoder.conv_blocks.0.res.0.conv1.weight" in file

    @classmethod
    def from_official(cls, file: WeightsFile, **sizes: Any) -> Self:
        """From the tokenizer's released file; what a training run keeps beside it is passed over."""
        num_levels = file.count(r"encoder\.conv_blocks\.(\d+)\.")
        num_blocks = file.count(r"encoder\.conv_blocks\.0\.res\.(\d+)\.")
        tensors = to_ours({k: v for k, v in file.tensors.items() if k != USAGE}, modules_map(num_levels, num_blocks))
        config = {**sizes_of(WeightsFile(file.path, tensors)), **sizes}
        inside = {f"net.{name}": tensor for name, tensor in tensors.items()}
        return build(lambda: cls.from_config(config), inside, f"{file.path.name}: tokenizer")

    def to_official(self) -> dict[str, Tensor]:
        """Under official names, with the usage buffer, without which the official code refuses a file."""
        config = self.net.config
        names = modules_map(len(config.block_out_channels), config.layers_per_block)
        return {**to_theirs(self.net.state_dict(), names), USAGE: torch.zeros(65536)}


def modules_map(num_levels: int, num_blocks: int) -> Modules:
    """Official modules to those of diffusers; both count the decoder's blocks in order of execution."""
    modules = {name: name for name in ("quant_conv", "post_quant_conv", "quantize.embedding")}
    halves = (("encoder", "down", num_blocks), ("decoder", "up", num_blocks + 1))
    for half, direction, blocks in halves:
        modules |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        modules |= {f"{half}.norm_out": f"{half}.conv_norm_out"}
        modules |= resnet(f"{half}.mid.0", f"{half}.mid_block.resnets.0")
        modules |= attention(f"{half}.mid.1", f"{half}.mid_block.attentions.0")
        modules |= resnet(f"{half}.mid.2", f"{half}.mid_block.resnets.1")
        for level in range(num_levels):
            theirs, ours = f"{half}.conv_blocks.{level}", f"{half}.{direction}_blocks.{level}"
            for block in range(blocks):
                modules |= resnet(f"{theirs}.res.{block}", f"{ours}.resnets.{block}")
                modules |= attention(f"{theirs}.attn.{block}", f"{ours}.attentions.{block}")
            modules[f"{theirs}.{direction}sample.conv"] = f"{ours}.{direction}samplers.0.conv"
    return modules
