"""Masked autoregressive models: tokens of a latent image in random order, each drawn by diffusion.

A step of a rollout reveals a few tokens: `extract` runs the transformer for their conditions, `reconstruct` the head's
own diffusion for their values.

Legend: B images, R rows (B, or 2 B with guidance: conditional, then unconditional), L tokens of an image, P tokens of a
step, C channels of a token, D width of the transformer, M = B P rows of the head, S its steps; c x h x w a latent.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from statistics import NormalDist
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from bitlaw.models.autoencoders import Autoencoder
from bitlaw.models.generator import Absorber, Extracted, ImageGenerator, Noise, Site, StepClock
from bitlaw.models.networks.mar import MARConfig, MARTransformer, visible_positions
from bitlaw.models.official import WeightsFile
from bitlaw.models.parts.diffusion import Diffusion, Losses
from bitlaw.models.parts.guidance import check_guidance, guide_channels
from bitlaw.models.parts.pixels import Rounding, from_uint8, to_uint8
from bitlaw.models.storage import build
from bitlaw.names import unknown_name

KL16_LATENT_SCALE = 0.2325
"""Of MAR's autoencoder: latents times this have about unit variance."""

PROCESS = Diffusion(schedule="squaredcos_cap_v2")
"""The head's diffusion process, on all its steps."""

# What the releases have and shapes do not tell, by width: B, L, H.
_HEADS = {768: 12, 1024: 16, 1280: 16}
_GUIDANCE = {768: 2.9, 1024: 3.0, 1280: 3.2}
_OPTIONS = ("heads", "patch_size")


@dataclass(frozen=True)
class MARSampling:
    """Sampler settings; the defaults are those of the official evaluation of MAR-B.

    guidance: w, 1 is off; "linear" is 1 + (w - 1) times the share of tokens that are revealed after the step,
              "constant" is w in every step
    num_steps: steps in which the tokens are revealed, the official num_iter; at most their number
    head_steps: steps of the head's diffusion as a respacing string (`parts.diffusion.kept_timesteps`)
    temperature: factor of the noise in these steps; not of the noise that they begin with
    """

    guidance: float = 2.9
    schedule: Literal["linear", "constant"] = "linear"
    num_steps: int = 256
    head_steps: str = "100"
    temperature: float = 1.0
    rounding: Rounding = "half-even"

    def __post_init__(self) -> None:
        object.__setattr__(self, "head_steps", str(self.head_steps))
        check_guidance(self.guidance)
        if self.schedule not in ("linear", "constant"):
            raise ValueError(f"guidance schedule '{self.schedule}': must be linear or constant")
        if self.num_steps < 1:
            raise ValueError(f"num_steps {self.num_steps}: at least one step")
        if self.temperature < 0:
            raise ValueError(f"temperature {self.temperature}: must not be negative")
        if PROCESS.respaced(self.head_steps).num_steps < 2:
            raise ValueError(f"head_steps '{self.head_steps}': at least two steps")


class MARState(NamedTuple):
    """The tokens drawn so far, which are hidden yet, and the order in which they are revealed: from its end."""

    tokens_BLC: Tensor
    hidden_BL: Tensor
    orders_BL: Tensor
    labels_B: Tensor
    noise: Noise


class MARBatch(NamedTuple):
    """Tokens of images, which of them are hidden, and the timestep and noise that the head is asked about each at.

    orders_BL, counts: of image i the tokens at the first counts[i] of its positions are hidden, M in all
    """

    labels_B: Tensor
    tokens_BLC: Tensor
    orders_BL: Tensor
    counts: tuple[int, ...]
    t_BL: Tensor
    noise_BLC: Tensor

    @property
    def hidden_rows(self) -> tuple[Tensor, Tensor]:
        """Where among all B L tokens the hidden ones are (M,), image after image; and how many its image has (M, 1)."""
        length, device = self.orders_BL.shape[1], self.orders_BL.device
        rows = [self.orders_BL[i, :count] + i * length for i, count in enumerate(self.counts)]
        counts_B = torch.tensor(self.counts, device=device)
        return torch.cat(rows), counts_B.repeat_interleave(counts_B)[:, None]


class MAR(ImageGenerator[MARState]):
    """A masked autoregressive transformer with its diffusion head and autoencoder. A step reveals a few tokens."""

    family = "mar"
    autoencoder_names = ("kl16.ckpt", "../../vae/kl16.ckpt")
    official_wrapper = "model_ema"
    net: MARTransformer

    def __init__(
        self,
        net: MARTransformer,
        autoencoder: Autoencoder | None,
        sampling: MARSampling | None = None,
        *,
        latent_scale: float = KL16_LATENT_SCALE,
    ):
        config = net.config
        self.net, self.autoencoder, self.latent_scale = net, autoencoder, latent_scale
        self.sampling = sampling or published_sampling(config)
        self.num_classes = config.num_classes
        self.image_size = (autoencoder.downsampling if autoencoder else 16) * config.side * config.patch_size
        self.clock = StepClock()
        if autoencoder is not None and autoencoder.latent_channels != config.latent_channels:
            raise ValueError(
                f"mar takes {config.latent_channels} latent channels, its autoencoder has {autoencoder.latent_channels}"
            )

    @property
    def null_label(self) -> int:
        """The class after the last, which the network has a vector of its own for."""
        return self.num_classes

    @property
    def recipes(self) -> Mapping[str, MARSampling]:
        """The published evaluation of a model of this size, see `published_sampling`."""
        return {"paper": published_sampling(self.net.config)}

    @property
    def num_steps(self) -> int:
        """Steps of a rollout."""
        return self.sampling.num_steps

    @property
    def sampler_name(self) -> str:
        """Schedule of guidance, steps and temperature of the head."""
        sampling = self.sampling
        return f"{sampling.schedule} head_steps={sampling.head_steps} temperature={sampling.temperature:g}"

    @property
    def spaced(self) -> Diffusion:
        """The respaced process that the head follows."""
        return PROCESS.respaced(self.sampling.head_steps)

    @property
    def hidden_counts(self) -> tuple[int, ...]:
        """How many tokens are hidden before each step, and after the last. ValueError for too many steps."""
        return hidden_counts(self.net.config.num_tokens, self.num_steps)

    def guidance_at(self, step: int) -> float:
        """w of one step. The last one reveals all, but counts a token as hidden still, as the official sampler does."""
        if self.sampling.schedule == "constant":
            return self.sampling.guidance
        length = self.net.config.num_tokens
        revealed = length - max(1, self.hidden_counts[step + 1])
        return 1 + (self.sampling.guidance - 1) * revealed / length

    def sites(self) -> list[Site]:
        """Every linear, in order of execution. Timesteps are embedded once a step, conditions once a token.

        The head's blocks are numbered after those of the transformer: they, too, are quantized where nothing is said.
        """
        config, head = self.net.config, "diffloss.net"
        length, buffer, steps = config.num_tokens, config.buffer_size, self.num_steps
        visible = sum(length - hidden for hidden in self.hidden_counts[:-1])
        encoded, decoded = visible + steps * buffer, steps * (length + buffer)
        timesteps, denoised = steps * self.spaced.num_steps, length * self.spaced.num_steps

        def modulation(module: str) -> Absorber:
            return Absorber.modulation(module, config.head_width, gain=1, shift=0)

        def block(prefix: str, index: int, rows: int, rows_after_attention: int) -> list[Site]:
            width, norm = config.width, Absorber.norm
            values = Absorber.rows(f"{prefix}.attn.qkv", 2 * width, 3 * width, shifts=True)
            return [
                Site(f"{prefix}.attn.qkv", "qkv", index, "blocks", rows, norm(f"{prefix}.norm1")),
                Site(f"{prefix}.attn.proj", "proj", index, "blocks", rows_after_attention, values),
                Site(f"{prefix}.mlp.fc1", "fc1", index, "blocks", rows_after_attention, norm(f"{prefix}.norm2")),
                Site(f"{prefix}.mlp.fc2", "fc2", index, "blocks", rows_after_attention),
            ]

        sites = [Site("z_proj", "embed", None, "embed", visible)]
        for i in range(config.encoder_depth):
            sites += block(f"encoder_blocks.{i}", i, encoded, encoded)
        sites.append(Site("decoder_embed", "embed", None, "embed", encoded, Absorber.norm("encoder_norm")))
        for i in range(config.decoder_depth):
            rows = length if i == config.decoder_depth - 1 else decoded
            sites += block(f"decoder_blocks.{i}", config.encoder_depth + i, decoded, rows)
        sites += [
            Site(f"{head}.cond_embed", "embed", None, "head", length),
            Site(f"{head}.time_embed.mlp.0", "embed", None, "head", timesteps),
            Site(f"{head}.time_embed.mlp.2", "embed", None, "head", timesteps),
            Site(f"{head}.input_proj", "embed", None, "head", denoised),
        ]
        for i in range(config.head_depth):
            index = config.encoder_depth + config.decoder_depth + i
            adaln = f"{head}.res_blocks.{i}.adaLN_modulation.1"
            sites += [
                Site(adaln, "adaln", index, "blocks", denoised),
                Site(f"{head}.res_blocks.{i}.mlp.0", "fc1", index, "blocks", denoised, modulation(adaln)),
                Site(f"{head}.res_blocks.{i}.mlp.2", "fc2", index, "blocks", denoised),
            ]
        adaln = f"{head}.final_layer.adaLN_modulation.1"
        return [
            *sites,
            Site(adaln, "adaln", None, "head", denoised),
            Site(f"{head}.final_layer.linear", "head", None, "head", denoised, modulation(adaln)),
        ]

    def start(self, labels_B: Tensor, noise: Noise) -> MARState:
        """Nothing revealed, an order for each image. ValueError for more steps than tokens."""
        assert self.hidden_counts  # checks the number of steps
        config = self.net.config
        orders_BL = noise.permutation(0, config.num_tokens)
        tokens_BLC = torch.zeros(*orders_BL.shape, config.token_channels, device=orders_BL.device)
        return MARState(tokens_BLC, torch.ones_like(orders_BL, dtype=torch.bool), orders_BL, labels_B, noise)

    def positions(self, state: MARState, step: int) -> Tensor:
        """Positions (B, P) that a step reveals, ascending."""
        before, after = self.hidden_counts[step : step + 2]
        return state.orders_BL[:, after:before].sort(1).values

    def extract(self, state: MARState, step: int) -> Extracted:
        """Conditions of the tokens to be revealed, (B, P, D); with guidance (B, P, 2 D), the unconditional last."""
        class_RD = self.net.class_vectors(state.labels_B)
        guided = self.sampling.guidance != 1
        if guided:
            class_RD = torch.cat([class_RD, self.net.fake_latent.expand_as(class_RD)])
        visible_BN = visible_positions(state.hidden_BL, self.net.config.num_tokens - self.hidden_counts[step])
        z_RPD = self.net.run(state.tokens_BLC, visible_BN, class_RD, self.positions(state, step)).float()
        return Extracted(torch.cat(z_RPD.chunk(2), -1) if guided else z_RPD)

    def reconstruct(self, state: MARState, extracted: Extracted, step: int) -> MARState:
        """Draw the tokens by the head's diffusion.

        All its noise is of step number step + 1 of `Noise`, (S, P, C) for an image: the first of the S is what the
        diffusion begins with, the others are of its steps in turn. The last step has none.
        """
        positions_BP = self.positions(state, step)
        shape = (self.spaced.num_steps, positions_BP.shape[1], self.net.config.token_channels)
        noise_SMC = state.noise.normal(step + 1, shape).transpose(0, 1).flatten(1, 2)
        halves = 1 if self.sampling.guidance == 1 else 2
        z_RD = torch.cat([z_BPD.flatten(0, 1) for z_BPD in extracted.features.chunk(halves, -1)])
        x_MC = self.draw_tokens(z_RD, noise_SMC, self.guidance_at(step))
        index_BPC = positions_BP[:, :, None].expand(-1, -1, x_MC.shape[-1])
        return state._replace(
            tokens_BLC=state.tokens_BLC.scatter(1, index_BPC, x_MC.view(index_BPC.shape)),
            hidden_BL=state.hidden_BL.scatter(1, positions_BP, False),
        )

    def draw_tokens(self, z_RD: Tensor, noise_SMC: Tensor, guidance: float = 1.0) -> Tensor:
        """Tokens (M, C) under their conditions, float32; with guidance R = 2 M, the unconditional conditions last."""
        process, head = self.spaced, self.net.head
        x_MC = noise_SMC[0]
        guided = len(z_RD) != len(x_MC)
        modulations = head.modulations_of_steps(z_RD, process.timesteps[::-1])
        for done, modulation in enumerate(modulations, start=1):
            output = head.run(x_MC, modulation)
            if guided:
                cond, uncond = output.chunk(2)
                output = guide_channels(cond, uncond, guidance, x_MC.shape[-1])
            index = process.num_steps - done
            noise_MC = noise_SMC[done] if index else None
            x_MC = process.ddpm_step(x_MC, output, index, noise_MC, temperature=self.sampling.temperature)
        return x_MC

    def decode(self, state: MARState) -> Tensor:
        """uint8 images (B, 3, H, W)."""
        latent_Bchw = self.net.unpatchify(state.tokens_BLC) / self.latent_scale
        return to_uint8(self.latent_codec.decode(latent_Bchw), self.sampling.rounding)

    # ---- training --------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_images(self, images_BCHW: Tensor) -> Tensor:
        """Scaled latents (B, c, h, w): the means of their distributions, unlike in the official training."""
        return self.latent_codec.encode(from_uint8(images_BCHW)) * self.latent_scale

    def encoded_of(self, state: MARState) -> Tensor:
        """The latents that were drawn."""
        return self.net.unpatchify(state.tokens_BLC.clone())

    @torch.no_grad()
    def teacher_forced(self, encoded: Tensor, labels_B: Tensor, noise: Noise) -> MARBatch:
        """Tokens hidden in each image, and a timestep and noise for each of them.

        The share that is hidden is drawn as in training, but for each image instead of a batch; and each token is
        tried once, where the official training tries it four times.
        """
        tokens_BLC = self.net.patchify(encoded)
        length = tokens_BLC.shape[1]
        orders_BL = noise.permutation(0, length)
        counts = tuple(math.ceil(length * mask_ratio(u)) for u in noise.uniform(1, (1,)).flatten().tolist())
        t_BL = (noise.uniform(2, (length,)) * PROCESS.num_timesteps).long()
        return MARBatch(labels_B, tokens_BLC, orders_BL, counts, t_BL, noise.normal(3, tokens_BLC.shape[1:]))

    def predict(self, batch: MARBatch) -> dict[str, Tensor]:
        """The tokens' "conditions" (B, L, D), and what the head gives under them as "noise" and "variance" (B, L, C).

        What is not hidden is zero, and the rest times sqrt(L / number of hidden tokens), so that the mean of a square
        over an image is that over its hidden tokens. Images are in the step group of that step of a rollout which has
        about as many tokens to draw.
        """
        z_MD, output_MO = self._outputs(batch)
        rows_M, count_M1 = batch.hidden_rows
        length = batch.tokens_BLC.shape[1]

        def spread(x_MX: Tensor) -> Tensor:
            scaled_MX = x_MX * (length / count_M1).sqrt()
            out = scaled_MX.new_zeros(batch.tokens_BLC[..., 0].numel(), scaled_MX.shape[1])
            return out.index_copy(0, rows_M, scaled_MX).unflatten(0, (-1, length))

        parts = PROCESS.named(output_MO, batch.tokens_BLC.shape[2])
        return {"conditions": spread(z_MD.float())} | {name: spread(part) for name, part in parts.items()}

    def training_loss(self, batch: MARBatch, prediction: dict[str, Tensor]) -> Tensor:
        """Squared error and bound of the head, mean over an image's hidden tokens, (B,)."""
        rows_M, count_M1 = batch.hidden_rows
        output_BLO = torch.cat([prediction["noise"], prediction["variance"]], -1)
        scale_M1 = (count_M1 / output_BLO.shape[1]).sqrt()
        return self._losses(batch, output_BLO.flatten(0, 1)[rows_M] * scale_M1)

    def loss(self, images_BCHW: Tensor, labels_B: Tensor, noise: Noise) -> Tensor:
        """The training loss of each uint8 image (B,): mean over its hidden tokens of squared error and bound.

        It is `training_loss` without the rounding of the scales there.
        """
        batch = self.teacher_forced(self.encode_images(images_BCHW), labels_B, noise)
        return self._losses(batch, self._outputs(batch)[1])

    def _outputs(self, batch: MARBatch) -> tuple[Tensor, Tensor]:
        """Conditions (M, D) and what the head gives under them (M, 2 C) of hidden tokens, in the order of the batch."""
        conditions: dict[int, Tensor] = {}
        outputs: dict[int, Tensor] = {}
        for count in sorted(set(batch.counts)):  # images with as many hidden tokens go through the network together
            of_count = [i for i, other in enumerate(batch.counts) if other == count]
            images = torch.tensor(of_count, device=batch.tokens_BLC.device)
            hidden_BP, visible_BN = batch.orders_BL[images].tensor_split((count,), 1)
            self.clock.step = self._step_hiding(count)
            class_BD = self.net.class_vectors(batch.labels_B[images])
            z_BPD = self.net.run(batch.tokens_BLC[images], visible_BN, class_BD, hidden_BP)
            rows = images[:, None], hidden_BP
            asked = (part[rows].flatten(0, 1) for part in (batch.tokens_BLC, batch.t_BL, batch.noise_BLC))
            output_MO = self._denoise(z_BPD.flatten(0, 1), *asked)
            conditions |= zip(of_count, z_BPD, strict=True)
            outputs |= zip(of_count, output_MO.unflatten(0, (-1, count)), strict=True)
        order = range(len(batch.counts))
        return torch.cat([conditions[i] for i in order]), torch.cat([outputs[i] for i in order])

    def _losses(self, batch: MARBatch, output_MO: Tensor) -> Tensor:
        rows_M, _ = batch.hidden_rows
        x0_MC, t_M, noise_MC = (part.flatten(0, 1)[rows_M] for part in (batch.tokens_BLC, batch.t_BL, batch.noise_BLC))
        loss_M = PROCESS.losses(output_MO, x0_MC, t_M, noise_MC).total_B
        return torch.stack([loss_P.mean() for loss_P in loss_M.split(batch.counts)])

    def _denoise(self, z_MD: Tensor, x0_MC: Tensor, t_M: Tensor, noise_MC: Tensor) -> Tensor:
        """What the head gives (M, 2 C) for tokens with noise, under given conditions."""
        return self.net.head(PROCESS.add_noise(x0_MC, t_M, noise_MC), t_M, z_MD)

    def token_losses(self, z_MD: Tensor, x0_MC: Tensor, t_M: Tensor, noise_MC: Tensor) -> Losses:
        """The head's training losses of each token (M,), under given conditions; gradients reach both networks."""
        return PROCESS.losses(self._denoise(z_MD, x0_MC, t_M, noise_MC), x0_MC, t_M, noise_MC)

    def _step_hiding(self, count: int) -> int:
        """The step of a rollout before which about so many tokens are hidden; see `hidden_counts`."""
        share = math.acos(count / self.net.config.num_tokens) / (math.pi / 2)
        return min(round(share * self.num_steps), self.num_steps - 1)

    # ---- checkpoints -----------------------------------------------------------------------------

    @classmethod
    def recognizes(cls, file: WeightsFile) -> bool:
        """Learned positions of a masked encoder, and a diffusion head."""
        return "encoder_pos_embed_learned" in file and "diffloss.net.input_proj.weight" in file

    @classmethod
    def config_of(cls, file: WeightsFile, autoencoder: Autoencoder | None, **options: Any) -> dict[str, Any]:
        """Sizes from shapes, the head's included. Options, which go before a training run's arguments: heads (of the
        transformer, those of the releases if it has their width), patch_size (follows from the autoencoder, if given).
        """
        if unknown := options.keys() - set(_OPTIONS):
            raise unknown_name(min(unknown), _OPTIONS, "option of MAR")
        width, token_channels = file.shape("z_proj.weight")
        heads = options.get("heads") or file.metadata.get("encoder_num_heads") or _HEADS.get(width)
        if heads is None:
            raise ValueError(f"width {width} is of no release, and shapes do not tell its attention heads; give heads=")
        patch_size = _patch_size(token_channels, autoencoder, options.get("patch_size"), file.metadata)
        length = file.shape("diffusion_pos_embed_learned")[1]
        side = math.isqrt(length)
        if side * side != length:
            raise ValueError(f"diffusion_pos_embed_learned: {length} positions, expected a square number")
        config = MARConfig(
            width=width,
            encoder_depth=file.count(r"encoder_blocks\.(\d+)\."),
            decoder_depth=file.count(r"decoder_blocks\.(\d+)\."),
            heads=heads,
            head_depth=file.count(r"diffloss\.net\.res_blocks\.(\d+)\."),
            head_width=file.shape("diffloss.net.input_proj.weight")[0],
            num_classes=file.shape("class_emb.weight")[0],
            side=side,
            latent_channels=token_channels // patch_size**2,
            patch_size=patch_size,
            buffer_size=file.shape("encoder_pos_embed_learned")[1] - length,
            mlp_ratio=file.shape("encoder_blocks.0.mlp.fc1.weight")[0] / width,
        )
        sampling = asdict(published_sampling(config))
        if "num_sampling_steps" in file.metadata:
            sampling["head_steps"] = str(file.metadata["num_sampling_steps"])
        return {"net": asdict(config), "sampling": sampling, "latent_scale": KL16_LATENT_SCALE}

    def to_config(self) -> dict[str, Any]:
        """Sizes of the networks, sampler settings and the scale of latents."""
        return {
            "net": asdict(self.net.config),
            "sampling": asdict(self.sampling),
            "latent_scale": self.latent_scale,
        }

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        autoencoder: Autoencoder | None,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """The model."""
        return cls(
            build(lambda: MARTransformer(MARConfig(**config["net"])), tensors, "MAR", dtype=dtype),
            autoencoder,
            MARSampling(**config["sampling"]),
            latent_scale=config["latent_scale"],
        )


def published_sampling(config: MARConfig) -> MARSampling:
    """The settings of the published evaluation: 256 steps, linear guidance of 2.9 (B), 3.0 (L) or 3.2 (H).

    A size that was not published has the guidance of B, and no more steps than tokens.
    """
    return MARSampling(guidance=_GUIDANCE.get(config.width, 2.9), num_steps=min(256, config.num_tokens))


@lru_cache(maxsize=64)
def hidden_counts(num_tokens: int, num_steps: int) -> tuple[int, ...]:
    """Tokens that are hidden before each step, and 0 after the last: a cosine, rounded down, that falls in every step.

    ValueError if there are more steps than tokens.
    """
    if not 1 <= num_steps <= num_tokens:
        raise ValueError(f"num_steps {num_steps}: an image of {num_tokens} tokens has at most so many steps")
    counts = [num_tokens]
    for step in range(1, num_steps):
        cosine = math.floor(num_tokens * math.cos(math.pi / 2 * step / num_steps))
        counts.append(max(1, min(counts[-1] - 1, cosine)))
    assert all(before > after for before, after in pairwise(counts))
    return (*counts, 0)


def mask_ratio(uniform: float) -> float:
    """The share of hidden tokens in training: normal around 1 with deviation 0.25, cut to [0.7, 1].

    `uniform` from [0, 1) is its quantile.
    """
    normal = NormalDist(mu=1.0, sigma=0.25)
    lowest = normal.cdf(0.7)
    return min(max(normal.inv_cdf(lowest + uniform * (0.5 - lowest)), 0.7), 1.0)


def _patch_size(
    token_channels: int, autoencoder: Autoencoder | None, given: int | None, metadata: Mapping[str, Any]
) -> int:
    """Positions a side that one token covers. ValueError if a token's channels do not come out."""
    if autoencoder is None:
        patch_size = int(given or metadata.get("patch_size", 1))
        if token_channels % patch_size**2:
            raise ValueError(f"patch_size {patch_size} does not go with tokens of {token_channels} channels")
        return patch_size
    channels = autoencoder.latent_channels
    patch_size = int(given or math.isqrt(max(1, token_channels // channels)))
    if channels * patch_size**2 != token_channels:
        asked = f"patch_size {patch_size}" if given else "any patch"
        raise ValueError(
            f"tokens of {token_channels} channels do not go with an autoencoder of {channels} channels and {asked}"
        )
    return patch_size
