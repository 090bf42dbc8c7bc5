"""Visual autoregressive models: how they draw images, and their checkpoints. A step is a stage.

Legend: B images, N tokens of a stage, L tokens of all stages, V vocabulary, Z latent channels, h x w latent positions.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from bitlaw.models.autoencoders import Autoencoder, VQTokenizer
from bitlaw.models.generator import Absorber, Extracted, ImageGenerator, Labels, Noise, Site, StepClock
from bitlaw.models.networks.var import Memory, VARConfig, VARTransformer, from_official, official_buffers, to_official
from bitlaw.models.official import WeightsFile
from bitlaw.models.parts.guidance import check_guidance, guide, ramp
from bitlaw.models.parts.pixels import Rounding, from_uint8, to_uint8
from bitlaw.models.parts.sampling import draw, filter_logits, soft_embedding
from bitlaw.models.storage import build
from bitlaw.names import unknown_name


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

    def __post_init__(self) -> None:
        check_guidance(self.guidance)
        if self.top_k < 0 or not 0 <= self.top_p <= 1:
            raise ValueError(f"top_k {self.top_k}, top_p {self.top_p:g}: top_k is at least 0, top_p from 0 to 1")


class Given(NamedTuple):
    """Pictures that are edited. For every stage: their tokens (B, N), and which of them are kept, bool (B, N)."""

    tokens: tuple[Tensor, ...]
    keeps: tuple[Tensor, ...]

    def of_images(self, image_ids_B: Sequence[int]) -> "Given":
        """Those of these images of a run. ValueError for an image that there is no picture for."""
        if beyond := [image for image in image_ids_B if not 0 <= image < len(self.tokens[0])]:
            raise ValueError(f"image {beyond[0]} of the run: there are {len(self.tokens[0])} pictures to edit")
        rows_B = torch.tensor(image_ids_B, device=self.tokens[0].device)
        return Given(*(tuple(of_stage[rows_B] for of_stage in part) for part in self))


class VARState(NamedTuple):
    """The latent accumulated so far, the tokens drawn for it, and the network's memory (None at the start).

    given: the pictures that are edited, None if images are drawn from nothing
    """

    labels_B: Tensor
    latent_BZhw: Tensor
    tokens: tuple[Tensor, ...]
    memory: Memory | None
    noise: Noise
    given: Given | None = None


class VARBatch(NamedTuple):
    """All tokens (B, L) of images, and the network's inputs (B, L - 1, Z) for all stages but the first."""

    labels_B: Tensor
    tokens_BL: Tensor
    latents_BLZ: Tensor


class VAR(ImageGenerator[VARState]):
    """A visual autoregressive transformer with its tokenizer. A step is a stage."""

    family = "var"
    autoencoder_names = ("vae_ch160v4096z32.pth", "vae_ch160v4096z32.safetensors")
    net: VARTransformer
    given: Given | None = None
    """What a model that `editing` gave edits: image i of a run is picture i."""

    def __init__(self, net: VARTransformer, tokenizer: VQTokenizer | None, sampling: VARSampling | None = None):
        self.net, self.autoencoder = net, tokenizer
        self.sampling = sampling or VARSampling()
        self.num_classes = net.config.num_classes
        self.image_size = (tokenizer.downsampling if tokenizer else 16) * net.config.patch_nums[-1]
        self.clock = StepClock()
        for field in ("patch_nums", "vocab_size", "latent_channels"):
            ours, theirs = getattr(net.config, field), getattr(tokenizer and tokenizer.config, field, None)
            if tokenizer and ours != theirs:
                raise ValueError(f"VAR {field} {ours} does not go with the tokenizer's {theirs}")

    @property
    def tokenizer(self) -> VQTokenizer:
        """Its autoencoder. ValueError if the model was loaded without."""
        if self.autoencoder is None:
            raise ValueError(
                f"this VAR was loaded without its tokenizer ({self.autoencoder_names[0]}), which this needs"
            )
        assert isinstance(self.autoencoder, VQTokenizer)
        return self.autoencoder

    @property
    def null_label(self) -> int:
        """The class after the last."""
        return self.num_classes

    @property
    def recipes(self) -> Mapping[str, VARSampling]:
        """The published evaluation: cfg 1.5, top-k 900, top-p 0.96."""
        return {"paper": VARSampling()}

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
        length, width = config.num_tokens, config.width

        def modulation(module: str, gain: int, shift: int) -> Absorber | None:
            return None if config.shared_adaln else Absorber.modulation(module, width, gain, shift)

        sites = [Site("word_embed", "embed", None, "embed", length - 1)]
        if config.shared_adaln:
            sites.append(Site("shared_ada_lin.1", "adaln", None, "blocks", 1))
        for i in range(config.depth):
            if not config.shared_adaln:
                sites.append(Site(f"blocks.{i}.ada_lin.1", "adaln", i, "blocks", 1))
            sites += [
                Site(f"blocks.{i}.attn.mat_qkv", "qkv", i, "blocks", length, modulation(f"blocks.{i}.ada_lin.1", 2, 4)),
                Site(
                    f"blocks.{i}.attn.proj",
                    "proj",
                    i,
                    "blocks",
                    length,
                    Absorber.rows(f"blocks.{i}.attn.mat_qkv", 2 * width, 3 * width, shifts=True),
                ),
                Site(f"blocks.{i}.ffn.fc1", "fc1", i, "blocks", length, modulation(f"blocks.{i}.ada_lin.1", 3, 5)),
                Site(f"blocks.{i}.ffn.fc2", "fc2", i, "blocks", length),
            ]
        return [
            *sites,
            Site("head_nm.ada_lin.1", "adaln", None, "head", 1),
            Site("head", "head", None, "head", length, Absorber.modulation("head_nm.ada_lin.1", width, 0, 1)),
        ]

    def start(self, labels_B: Tensor, noise: Noise) -> VARState:
        """An empty latent, and what is to be kept of the pictures that are edited."""
        side = self.net.config.patch_nums[-1]
        latent_BZhw = torch.zeros(len(labels_B), self.net.config.latent_channels, side, side, device=labels_B.device)
        given = self.given.of_images(noise.image_ids_B) if self.given else None
        return VARState(labels_B, latent_BZhw, (), None, noise, given)

    def with_cache(self, state: VARState, cache: Any) -> VARState:
        """`state` with another memory."""
        return state._replace(memory=cache)

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
        """Draw the stage's tokens, but for those that an edited picture keeps; add their codes to the latent."""
        logits_BNV = filter_logits(extracted.features, self.sampling.top_k, self.sampling.top_p)
        gumbel_BNV = state.noise.gumbel(step + 1, logits_BNV.shape[1:])
        tokens_BN = draw(logits_BNV, gumbel_BNV)
        if state.given:
            tokens_BN = torch.where(state.given.keeps[step], state.given.tokens[step], tokens_BN)
        if self.sampling.more_smooth:
            codebook_VZ = self.tokenizer.quantize.embedding.weight
            mixed_BNZ = soft_embedding(logits_BNV, gumbel_BNV, codebook_VZ, step / (self.num_steps - 1))
            if state.given:
                mixed_BNZ = torch.where(state.given.keeps[step].unsqueeze(2), codebook_VZ[tokens_BN], mixed_BNZ)
            side = self.net.config.patch_nums[step]
            map_BZPP = mixed_BNZ.transpose(1, 2).unflatten(2, (side, side))
        else:
            map_BZPP = self.tokenizer.embed(tokens_BN)
        return state._replace(
            latent_BZhw=state.latent_BZhw + self.tokenizer.refine(map_BZPP, step),
            tokens=(*state.tokens, tokens_BN),
            memory=extracted.cache,
        )

    def decode(self, state: VARState) -> Tensor:
        """uint8 images (B, 3, H, W)."""
        return to_uint8(self.tokenizer.decode(state.latent_BZhw), self.sampling.rounding)

    # ---- training --------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.net.config.vocab_size

    @torch.no_grad()
    def encode_images(self, images_BCHW: Tensor) -> Tensor:
        """Tokens (B, L), int64, in the order of the stages."""
        return torch.cat(self.tokenizer.encode_to_tokens(from_uint8(images_BCHW)).indices, 1)

    def encoded_of(self, state: VARState) -> Tensor:
        """The tokens that were drawn, (B, L); with `more_smooth` the picture is made of mixtures of their codes."""
        return torch.cat(state.tokens, 1)

    @torch.no_grad()
    def teacher_forced(self, encoded: Tensor, labels_B: Tensor, noise: Noise) -> VARBatch:
        """All stages at once; it needs no noise."""
        return VARBatch(labels_B, *self.tokenizer.teacher_forcing(self.tokenizer.tokens_of(encoded)))

    def predict(self, batch: VARBatch) -> dict[str, Tensor]:
        """As "logits" (B, L, V). Quantized layers take all stages for the last one, which has the most tokens."""
        self.clock.step = self.num_steps - 1
        return {"logits": self.net(batch.labels_B, batch.latents_BLZ)}

    def training_loss(self, batch: VARBatch, prediction: dict[str, Tensor]) -> Tensor:
        """Cross entropy of the tokens of each image in nats, mean over positions, (B,)."""
        logits_BVL = prediction["logits"].transpose(1, 2)
        return F.cross_entropy(logits_BVL, batch.tokens_BL, reduction="none").mean(1)

    def require_gradients(self) -> None:
        """All; but keys have no bias, so that its part of the fused one stays as it is."""
        super().require_gradients()
        width = self.net.config.width
        for name, module in self.net.named_modules():
            if name.endswith(".mat_qkv"):  # of whatever class: quantized ones know nothing of keys
                has_bias = torch.ones(3 * width, device=self.device)
                has_bias[width : 2 * width] = 0
                module.bias.register_hook(partial(torch.mul, has_bias))

    # ---- editing ---------------------------------------------------------------------------------

    def edit(
        self,
        images_BCHW: Tensor,
        keep: Tensor,
        labels: Labels | int = -1,
        seed: int = 0,
        *,
        batch_size: int = 64,
        progress: Callable[[int], Any] | None = None,
        **sampling: Any,
    ) -> Tensor:
        """Pictures with a part drawn anew, uint8 (B, 3, H, W): zero-shot in-painting and class-conditional editing.

        `images_BCHW` and `keep` are as for `editing`. Labels say what is drawn: one for all, or one for each picture;
        -1 fills in without a class. The other arguments are those of `generate`.
        """
        labels_B = [labels] * len(images_BCHW) if isinstance(labels, int) else labels
        if len(labels_B) != len(images_BCHW):
            raise ValueError(
                f"{len(labels_B)} labels for {len(images_BCHW)} pictures; give one for each, or one number"
            )
        model = self.editing(images_BCHW, keep, batch_size=batch_size)
        return model.generate(labels_B, seed, batch_size=batch_size, progress=progress, **sampling)

    def editing(self, images_BCHW: Tensor, keep: Tensor, *, batch_size: int = 64) -> Self:
        """The same model, whose rollouts draw parts of pictures anew: image i of a run is picture i.

        images_BCHW: uint8 pictures (B, 3, H, W) of the model's size
        keep: where pictures stay as they are, (H, W) for all or (B, H, W): True or 1 stays, False or 0 is drawn anew.
            It may also be given on the finest token map, as the official notebook has it; of a mask in pixels, a token
            stays if more than half of what it covers does.

        At every stage the tokens that stay are the picture's own: where the mask, resized to that stage, is above 1/2,
        and all of the first stage, so that even a picture of which nothing else stays gives its overall colour.
        Raises ValueError for another shape or type.
        """
        size, sides = self.image_size, self.net.config.patch_nums
        if images_BCHW.dtype != torch.uint8 or images_BCHW.ndim != 4 or images_BCHW.shape[1:] != (3, size, size):
            found = f"{tuple(images_BCHW.shape)} of {images_BCHW.dtype}"
            raise ValueError(f"pictures to edit: {found}, expected (B, 3, {size}, {size}) of torch.uint8; resize them")
        keep_Bhw = self._on_token_map(keep.to(self.device))
        if len(keep_Bhw) not in (1, len(images_BCHW)):
            raise ValueError(f"keep: {len(keep_Bhw)} masks for {len(images_BCHW)} pictures; give one for each, or one")
        keep_Bhw = keep_Bhw.expand(len(images_BCHW), -1, -1)
        batches = [images.to(self.device) for images in images_BCHW.split(batch_size)]
        with torch.inference_mode():
            encoded = [self.tokenizer.encode_to_tokens(from_uint8(images)).indices for images in batches]
        tokens = tuple(torch.cat(of_stage) for of_stage in zip(*encoded, strict=True))
        twin = copy.copy(self)
        twin.given = Given(tokens, tuple(_keep_at(keep_Bhw, side) for side in sides))
        return twin

    def _on_token_map(self, keep: Tensor) -> Tensor:
        """A mask on the finest token map, (1 or B, h, w), float32."""
        side, size = self.net.config.patch_nums[-1], self.image_size
        keep_BHW = keep.float() if keep.ndim == 3 else keep.float().unsqueeze(0)
        if keep_BHW.shape[1:] == (side, side):
            return keep_BHW
        if keep_BHW.shape[1:] == (size, size):
            return (F.avg_pool2d(keep_BHW, size // side) > 0.5).float()
        raise ValueError(
            f"keep: shape {tuple(keep.shape)}, expected ({size}, {size}) in pixels or ({side}, {side}) in tokens, "
            "for all pictures or one for each"
        )

    # ---- checkpoints -----------------------------------------------------------------------------

    @classmethod
    def recognizes(cls, file: WeightsFile) -> bool:
        """A position table over all stages, and a linear from latents."""
        return "pos_1LC" in file and "word_embed.weight" in file

    @classmethod
    def config_of(cls, file: WeightsFile, autoencoder: Autoencoder | None, **options: Any) -> dict[str, Any]:
        """Sizes from shapes.

        Options are `patch_nums` for a schedule that is not known, and `heads`, which files with legacy attention do not
        tell: heads of 64 channels are assumed. A training checkpoint says its schedule itself.
        """
        if unknown := options.keys() - {"patch_nums", "heads"}:
            raise unknown_name(min(unknown), ("patch_nums", "heads"), "option of VAR")
        width, latent_channels = file.shape("word_embed.weight")
        qk_norm = "blocks.0.attn.scale_mul_1H11" in file
        heads = file.shape("blocks.0.attn.scale_mul_1H11")[1] if qk_norm else options.get("heads", width // 64)
        if options.get("heads", heads) != heads:
            raise ValueError(f"heads={options['heads']}, but its scale_mul_1H11 has {heads}; leave the option out")
        config = VARConfig(
            depth=file.count(r"blocks\.(\d+)\."),
            width=width,
            heads=heads,
            num_classes=file.shape("class_emb.weight")[0] - 1,
            patch_nums=_patch_nums(file, options.get("patch_nums") or file.metadata.get("patch_nums")),
            vocab_size=file.shape("head.weight")[0],
            latent_channels=latent_channels,
            shared_adaln="shared_ada_lin.1.weight" in file,
            qk_norm=qk_norm,
            mlp_ratio=file.shape("blocks.0.ffn.fc1.weight")[0] / width,
        )
        return {"net": asdict(config), "sampling": asdict(VARSampling())}

    def to_config(self) -> dict[str, Any]:
        """Sizes of the network, sampler settings."""
        return {"net": asdict(self.net.config), "sampling": asdict(self.sampling)}

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        autoencoder: Autoencoder | None,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """The model; the tokenizer takes the stages of the transformer."""
        net_config = VARConfig(**config["net"])
        net = build(lambda: VARTransformer(net_config), from_official(tensors), "VAR", dtype=dtype)
        if autoencoder is not None:
            if not isinstance(autoencoder, VQTokenizer):
                raise ValueError(
                    f"VAR needs its multi-scale VQ tokenizer, and this is a {autoencoder.kind} autoencoder"
                )
            autoencoder.config = replace(autoencoder.config, patch_nums=net_config.patch_nums)
        return cls(net, autoencoder, VARSampling(**config["sampling"]))

    def to_tensors(self) -> dict[str, Tensor]:
        """Under official names, with q and v biases apart."""
        return to_official(self.net.state_dict())

    def to_official_names(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """With the buffers of the official class."""
        return {**tensors, **official_buffers(self.net)}


def _keep_at(keep_Bhw: Tensor, side: int) -> Tensor:
    """Which tokens of a stage stay, bool (B, N)."""
    keep_B1PP = F.interpolate(keep_Bhw.unsqueeze(1), size=(side, side), mode="bilinear", align_corners=False) > 0.5
    return keep_B1PP.flatten(1) | (side * side <= 3)


_SCHEDULES = (
    (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
)
"""Sides of the stages at 256, 512 and 1024 pixels."""


def _patch_nums(file: WeightsFile, given: Sequence[int] | None) -> tuple[int, ...]:
    """The stages' sides, those given or known. ValueError if none have the file's number of stages and of tokens."""
    num_stages, num_tokens = file.shape("lvl_embed.weight")[0], file.shape("pos_1LC")[1]
    for sides in (given,) if given else (*_SCHEDULES, tuple(range(1, num_stages + 1))):
        if len(sides) == num_stages and sum(side * side for side in sides) == num_tokens:
            return tuple(sides)
    found = f"{num_stages} stages of {num_tokens} tokens in all"
    if given:
        raise ValueError(f"patch_nums={tuple(given)} does not go with its tables, which are of {found}")
    raise ValueError(f"{found} are no schedule that is known; give patch_nums=(1, 2, ...)")
