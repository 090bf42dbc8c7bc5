"""Large-DiT: DiT's process, guidance and sampler around another network."""

import re
from collections.abc import Mapping
from typing import Any

from bitlaw.models.autoencoders import Autoencoder
from bitlaw.models.dit import DiT, DiTSampling, classes_of, learns_sigma
from bitlaw.models.generator import Absorber, Site
from bitlaw.models.networks.dit import DiffusionTransformer, TransformerConfig
from bitlaw.models.networks.large_dit import LargeDiTConfig, LargeDiTTransformer
from bitlaw.models.official import WeightsFile

LATENT_CHANNELS = 4
"""Of Stable Diffusion's autoencoder."""
HEADS = 32
"""Of every official size."""
IMAGE_SIZE = 256
"""Of both releases, in pixels."""


class LargeDiT(DiT):
    """A Large-DiT with its process and autoencoder. Its defaults are those of the official sampling script.

    In 16 bits the official script rounds the latent after every step; here it stays in float32, and only the network's
    input is rounded.
    """

    family = "large-dit"
    options = (*DiT.options, "image_size")
    default_sampling = DiTSampling(guidance=4.0)

    @property
    def recipes(self) -> Mapping[str, DiTSampling]:
        """The published evaluation, as far as it is known: 250 ancestral steps.

        Neither the guidance of the published scores nor the channels it acted on are. Here they are those of DiT's
        evaluation, which the authors compare with: 1.5 on three channels, as their code has it.
        """
        return super().recipes

    @classmethod
    def recognizes(cls, file: WeightsFile) -> bool:
        """A linear for patches, and LLaMA's blocks with a modulation."""
        return "x_embedder.weight" in file and "layers.0.adaLN_modulation.1.weight" in file

    def _patch_site(self, per_token: int) -> Site:
        return Site("x_embedder", "embed", None, "embed", per_token)

    def _block_sites(self, index: int, per_step: int, per_token: int) -> list[Site]:
        config, adaln = self.net.config, f"layers.{index}.adaLN_modulation.1"
        assert isinstance(config, LargeDiTConfig)
        before_attention = Absorber.modulation(adaln, config.width, gain=1, shift=0)
        values = Absorber.rows(f"layers.{index}.attention.wv", 0, config.width, shifts=False)
        before_mlp = Absorber.modulation(adaln, config.width, gain=4, shift=3)
        gated = Absorber.rows(f"layers.{index}.feed_forward.w3", 0, config.hidden, shifts=False)
        return [
            Site(adaln, "adaln", index, "blocks", per_step),
            Site(f"layers.{index}.attention.wq", "qkv", index, "blocks", per_token, before_attention),
            Site(f"layers.{index}.attention.wk", "kv", index, "blocks", per_token, before_attention),
            Site(f"layers.{index}.attention.wv", "kv", index, "blocks", per_token, before_attention),
            Site(f"layers.{index}.attention.wo", "proj", index, "blocks", per_token, values),
            Site(f"layers.{index}.feed_forward.w1", "fc1", index, "blocks", per_token, before_mlp),
            Site(f"layers.{index}.feed_forward.w3", "fc1", index, "blocks", per_token, before_mlp),
            Site(f"layers.{index}.feed_forward.w2", "fc2", index, "blocks", per_token, gated),
        ]

    @classmethod
    def config_of(cls, file: WeightsFile, autoencoder: Autoencoder | None, **options: Any) -> dict[str, Any]:
        """Sizes from shapes. What they do not tell:

        image_size: in pixels, for there is no position table; else that of `model_args.pth` beside the weights, or 256
        heads: 32 if not given
        null_class, num_classes: as for DiT
        """
        return super().config_of(file, autoencoder, **options)

    @classmethod
    def _sizes_of(
        cls, file: WeightsFile, autoencoder: Autoencoder | None, options: Mapping[str, Any]
    ) -> TransformerConfig:
        if (part := re.search(r"\.\d+-of-(\d+)\.pth$", file.path.name)) and int(part.group(1)) > 1:
            raise ValueError(f"one of {int(part.group(1))} parts of a model; put them together first")
        width, patch_numbers = file.shape("x_embedder.weight")
        in_channels = file.metadata.get("in_channels", LATENT_CHANNELS)
        patch_size = round((patch_numbers / in_channels) ** 0.5)
        if in_channels * patch_size**2 != patch_numbers:
            raise ValueError(f"patches of {patch_numbers} numbers are no squares of {in_channels} latent channels")
        downsampling = autoencoder.downsampling if autoencoder else 8
        stated = file.metadata.get("image_size") or file.metadata.get("input_size", 0) * downsampling
        image_size, pixels = int(options.get("image_size") or stated or IMAGE_SIZE), downsampling * patch_size
        if image_size < pixels or image_size % pixels:
            raise ValueError(f"image_size {image_size} is not a multiple of the {pixels} pixels a side of a token")
        return LargeDiTConfig(
            depth=file.count(r"layers\.(\d+)\."),
            width=width,
            heads=options.get("heads") or file.metadata.get("n_heads") or HEADS,
            input_size=image_size // pixels * patch_size,
            in_channels=in_channels,
            patch_size=patch_size,
            learn_sigma=learns_sigma(file, in_channels, patch_size),
            hidden=file.shape("layers.0.feed_forward.w1.weight")[0],
            qk_norm="layers.0.attention.q_norm.weight" in file,
            **classes_of(file, options),
        )

    @classmethod
    def _network(cls, sizes: Mapping[str, Any]) -> DiffusionTransformer:
        return LargeDiTTransformer(LargeDiTConfig(**sizes))
