"""Visual autoregressive models: how they draw images, and their checkpoints. A step is a stage.

Legend: B images, N tokens of a stage, L tokens of all stages, V vocabulary, Z latent channels, h x w latent positions.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from bitlaw.models.autoencoders.multi_scale_vq import VQTokenizer, VQTokenizerConfig
from bitlaw.models.generator import Extracted, ImageGenerator, Noise, Site, StepClock
from bitlaw.models.networks.var import IGNORED, Memory, VARConfig, VARTransformer, from_official, to_official
from bitlaw.models.parts.guidance import guide, ramp
from bitlaw.models.parts.pixels import Rounding, from_uint8, to_uint8
from bitlaw.models.parts.sampling import draw, filter_logits, soft_embedding
from bitlaw.models.storage import TOKENIZER_PREFIX, load_tensors, split_prefix, with_prefix


@dataclass(frozen=True)
class VARSampling:
    """Sampler settings; the defaults are those of the official evaluation, whose cfg=1.5 is guidance 2.5.

    guidance: w at the last stage, growing linearly from 1 at the first; 1 is off
    top_k, top_p: filters after guidance, 0 is off
    more_smooth: feed mixtures of codes instead of drawn ones, for prettier samples
    """

    guidance: float = 2.5
    top_k: int = 900
    top_p: float = 0.96
    more_smooth: bool = False
    rounding: Rounding = "nearest"


class VARState(NamedTuple):
    """The latent accumulated so far, the tokens drawn for it, and the network's memory (None at the start)."""

    labels_B: Tensor
    latent_BZhw: Tensor
    tokens: tuple[Tensor, ...]
    memory: Memory | None
    noise: Noise


class VAR(ImageGenerator[VARState]):
    """A visual autoregressive transformer with its tokenizer. A step is a stage."""

    family = "var"
    net: VARTransformer

    def __init__(self, net: VARTransformer, tokenizer: VQTokenizer, sampling: VARSampling | None = None):
        self.net, self.tokenizer = net, tokenizer
        self.sampling = sampling or VARSampling()
        self.num_classes = net.config.num_classes
        self.image_size = tokenizer.config.image_size
        self.clock = StepClock()
        for field in ("patch_nums", "vocab_size", "latent_channels"):
            ours, theirs = getattr(net.config, field), getattr(tokenizer.config, field)
            if ours != theirs:
                raise ValueError(f"VAR {field} {ours} does not go with the tokenizer's {theirs}")

    @property
    def num_steps(self) -> int:
        """Stages."""
        return len(self.net.config.patch_nums)

    @property
    def sampler_name(self) -> str:
        """Filters and smoothing."""
        smooth = " more_smooth" if self.sampling.more_smooth else ""
        return f"top_k={self.sampling.top_k} top_p={self.sampling.top_p:g}{smooth}"

    def sites(self) -> list[Site]:
        """Every linear, in the order of the network. Modulations are computed once for an image."""
        config = self.net.config
        length = config.num_tokens
        sites = [Site("word_embed", "embed", None, "embed", length - 1)]
        if config.shared_adaln:
            sites.append(Site("shared_ada_lin.1", "adaln", None, "blocks", 1))
        for i in range(config.depth):
            if not config.shared_adaln:
                sites.append(Site(f"blocks.{i}.ada_lin.1", "adaln", i, "blocks", 1))
            sites += [
                Site(f"blocks.{i}.attn.mat_qkv", "qkv", i, "blocks", length),
                Site(f"blocks.{i}.attn.proj", "proj", i, "blocks", length),
                Site(f"blocks.{i}.ffn.fc1", "fc1", i, "blocks", length),
                Site(f"blocks.{i}.ffn.fc2", "fc2", i, "blocks", length),
            ]
        return [
            *sites,
            Site("head_nm.ada_lin.1", "adaln", None, "head", 1),
            Site("head", "head", None, "head", length),
        ]

    def start(self, labels_B: Tensor, noise: Noise) -> VARState:
        """An empty latent."""
        side = self.net.config.patch_nums[-1]
        latent_BZhw = torch.zeros(len(labels_B), self.net.config.latent_channels, side, side, device=labels_B.device)
        return VARState(labels_B, latent_BZhw, (), None, noise)

    def extract(self, state: VARState, step: int) -> Extracted:
        """Guided logits (B, N, V) of a stage, before filters; the cache is the grown memory."""
        batch = len(state.labels_B)
        w = ramp(self.sampling.guidance, step, self.num_steps)
        memory = state.memory
        if memory is None:
            null_B = torch.full_like(state.labels_B, self.num_classes)
            memory = self.net.begin(
                state.labels_B if self.sampling.guidance == 1 else torch.cat([state.labels_B, null_B])
            )
        latents_BNZ = self.tokenizer.next_input(state.latent_BZhw, step) if step else None
        x_RNC, memory = self.net.run_stage(memory, step, latents_BNZ)
        head = memory.conditions.head
        if w == 1:  # at the first stage the unconditional half has no weight
            return Extracted(self.net.logits(x_RNC[:batch], tuple(part[:batch] for part in head)), memory)
        cond, uncond = self.net.logits(x_RNC, head).split(batch)
        return Extracted(guide(cond, uncond, w), memory)

    def reconstruct(self, state: VARState, extracted: Extracted, step: int) -> VARState:
        """Draw the stage's tokens, look their codes up, add them to the latent."""
        logits_BNV = filter_logits(extracted.features, self.sampling.top_k, self.sampling.top_p)
        gumbel_BNV = state.noise.gumbel(step + 1, logits_BNV.shape[1:])
        tokens_BN = draw(logits_BNV, gumbel_BNV)
        if self.sampling.more_smooth:
            codebook_VZ = self.tokenizer.quantize.embedding.weight
            mixed_BNZ = soft_embedding(logits_BNV, gumbel_BNV, codebook_VZ, step / (self.num_steps - 1))
            side = self.net.config.patch_nums[step]
            map_BZPP = mixed_BNZ.transpose(1, 2).unflatten(2, (side, side))
        else:
            map_BZPP = self.tokenizer.embed(tokens_BN)
        return VARState(
            state.labels_B,
            state.latent_BZhw + self.tokenizer.refine(map_BZPP, step),
            (*state.tokens, tokens_BN),
            extracted.cache,
            state.noise,
        )

    def decode(self, state: VARState) -> Tensor:
        """uint8 images (B, 3, H, W)."""
        return to_uint8(self.tokenizer.decode(state.latent_BZhw), self.sampling.rounding)

    def loss(self, images_BCHW: Tensor, labels_B: Tensor, noise: Noise) -> Tensor:
        """Cross entropy of the tokens of each uint8 image in nats, mean over positions, (B,). It needs no noise."""
        tokens = self.tokenizer.encode_to_tokens(from_uint8(images_BCHW))
        tokens_BL, latents_BLZ = self.tokenizer.teacher_forcing(tokens)
        logits_BLV = self.net(labels_B, latents_BLZ)
        return F.cross_entropy(logits_BLV.transpose(1, 2), tokens_BL, reduction="none").mean(1)

    def to_checkpoint(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Configuration and tensors (official keys; the tokenizer's under "tokenizer.")."""
        config = {
            "family": self.family,
            "net": asdict(self.net.config),
            "sampling": asdict(self.sampling),
            "tokenizer": asdict(self.tokenizer.config),
        }
        return config, to_official(self.net.state_dict()) | with_prefix(TOKENIZER_PREFIX, self.tokenizer.state_dict())

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The model that `to_checkpoint` gave. Raises ValueError naming each tensor that does not fit."""
        tokenizer = VQTokenizer(VQTokenizerConfig(**config["tokenizer"]))
        net = VARTransformer(VARConfig(**config["net"]))
        inside, own = split_prefix(TOKENIZER_PREFIX, tensors)
        load_tensors(tokenizer, inside, "tokenizer", ignore=IGNORED)
        load_tensors(net, from_official(own), "VAR")
        return cls(
            net.eval().requires_grad_(False),
            tokenizer.eval().requires_grad_(False),
            VARSampling(**config["sampling"]),
        )
