"""Train the models of the ladder: VAR and DiT on latents of its tokenizer, DDPM on pixels.

Legend: B images, C channels and H = W side of pixels or latents (h = w of latents alone), L tokens, V vocabulary.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitlaw.files import write_with
from bitlaw.ladder import data
from bitlaw.models.autoencoders.multi_scale_vq import VQTokenizer
from bitlaw.models.ddpm import DDPM, UNetSampling
from bitlaw.models.dit import DiT, DiTSampling
from bitlaw.models.networks.dit import DiTConfig, DiTTransformer
from bitlaw.models.networks.unet import UNet, UNetConfig
from bitlaw.models.networks.var import VARConfig, VARTransformer
from bitlaw.models.parts.diffusion import Diffusion
from bitlaw.models.var import VAR, VARSampling
from bitlaw.training import Recipe, Report, batch_indices, of_loss, step_generator, train

POOL_SIZE = 131_072
LABEL_DROPOUT = 0.1
SIZES = {"xs": (2, 48, 2), "s": (3, 64, 2), "m": (4, 96, 3), "l": (6, 128, 4)}  # depth, width, heads
DDPM_SIZES = {"s": (16, 32, 64)}  # widths at 24, 12 and 6 px

# Learning rates were chosen on the s size and checked on l (experiments/LOG.md).
VAR_RECIPES = {
    "xs": Recipe(steps=2400, lr=1e-2),
    "s": Recipe(steps=2400, lr=1e-2),
    "m": Recipe(steps=2200, lr=8e-3),
    "l": Recipe(steps=4000, lr=6e-3),
}
DIT_RECIPES = {
    "xs": Recipe(steps=6000, lr=1e-2),
    "s": Recipe(steps=6000, lr=1e-2),
    "m": Recipe(steps=7000, lr=8e-3),
    "l": Recipe(steps=8000, lr=6e-3),
}
DDPM_RECIPES = {"s": Recipe(steps=8_000, lr=4e-3)}

# `choose_guidance` replaces the guidance; it is the same for all sizes and precisions of a family.
VAR_SAMPLING = VARSampling(guidance=1.5, top_k=0, top_p=0.0)
DIT_SAMPLING = DiTSampling(guidance=1.5, num_steps=20, sampler="ddim", guided_channels=None)
DIT_PROCESS = Diffusion(schedule="squaredcos_cap_v2", prediction="v", variance="fixed_small")
DDPM_SAMPLING = UNetSampling(num_steps=20, sampler="ddim", clip=True)
DDPM_PROCESS = Diffusion(variance="fixed_large")  # the paper's linear schedule, which the network gives the noise of


class LatentPool:
    """Continuous latents (B, C, h, w) and labels (B,) of the first training images, encoded once."""

    def __init__(self, work: Path):
        self.latents = np.load(work / "latents.npy", mmap_mode="r")
        self.labels_B = torch.from_numpy(np.load(work / "labels.npy"))
        self.std = float(np.asarray(self.latents[:8192], dtype=np.float32).std())

    def batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
        """The latents and labels of a training step."""
        rows_B = batch_indices(step, batch_size, len(self.labels_B), seed)
        return torch.from_numpy(self.latents[rows_B.numpy()]).float(), self.labels_B[rows_B]


@torch.inference_mode()
def write_latents(tokenizer: VQTokenizer, work: Path, report: Report) -> None:
    """Encode the training pool; `latents.npy` in float16 and `labels.npy`."""
    config = tokenizer.config
    shape = (POOL_SIZE, config.latent_channels, config.patch_nums[-1], config.patch_nums[-1])
    latents, labels = np.empty(shape, dtype=np.float16), np.empty(POOL_SIZE, dtype=np.int64)
    begin = 0
    for batch in data.batches("train", POOL_SIZE, 256):
        end = begin + len(batch.labels_B)
        latents[begin:end] = tokenizer.encode(data.to_float(batch.images_BCHW)).half().numpy()
        labels[begin:end] = batch.labels_B.numpy()
        begin = end
        if begin % 16384 == 0:
            report(f"latents: {begin}/{POOL_SIZE}")

    def save(array: np.ndarray) -> Callable[[Path], None]:
        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.save(file, array)

        return write

    write_with(work / "labels.npy", save(labels))
    write_with(work / "latents.npy", save(latents))


def drop_labels(labels_B: Tensor, null: int, generator: torch.Generator) -> Tensor:
    """A tenth of the labels become the null class."""
    return torch.where(torch.rand(labels_B.shape, generator=generator) < LABEL_DROPOUT, null, labels_B)


def denoising_loss(
    net: Callable[[Tensor, Tensor], Tensor], process: Diffusion, x0_BCHW: Tensor, generator: torch.Generator
) -> Tensor:
    """Mean squared error of what a network of (x_BCHW, t_B) gives, timesteps stratified over the batch."""
    strata_B = (torch.arange(len(x0_BCHW)) + torch.rand(len(x0_BCHW), generator=generator)) / len(x0_BCHW)
    t_B = (strata_B * process.num_timesteps).long()
    noise_BCHW = torch.randn(x0_BCHW.shape, generator=generator)
    output_BCHW = net(process.add_noise(x0_BCHW, t_B, noise_BCHW), t_B)
    return process.losses(output_BCHW, x0_BCHW, t_B, noise_BCHW).mse_B.mean()


def train_var(name: str, recipe: Recipe, tokenizer: VQTokenizer, work: Path, report: Report, seed: int = 0) -> VAR:
    """A VAR model: cross entropy of all tokens of all stages in one teacher-forced pass."""
    torch.manual_seed(seed)
    depth, width, heads = SIZES[name.split("-")[1]]
    tokens = tokenizer.config
    config = VARConfig(
        depth=depth,
        width=width,
        heads=heads,
        num_classes=data.NUM_CLASSES,
        patch_nums=tokens.patch_nums,
        vocab_size=tokens.vocab_size,
        latent_channels=tokens.latent_channels,
    )
    net, pool = VARTransformer(config), LatentPool(work)

    def loss_at(step: int) -> Tensor:
        latents, labels_B = pool.batch(step, recipe.batch_size, seed)
        with torch.no_grad():
            tokens_BL, inputs = tokenizer.teacher_forcing(tokenizer.latent_to_tokens(latents))
        labels_B = drop_labels(labels_B, data.NUM_CLASSES, step_generator(step, seed))
        logits_BLV = net(labels_B, inputs)
        return F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL.flatten())

    net.load_state_dict(train(name, net, recipe, of_loss(loss_at), work, report).weights)
    return VAR(net, tokenizer, VAR_SAMPLING)


def train_dit(name: str, recipe: Recipe, tokenizer: VQTokenizer, work: Path, report: Report, seed: int = 0) -> DiT:
    """A DiT model: mean squared error of v on the continuous latents."""
    torch.manual_seed(seed)
    depth, width, heads = SIZES[name.split("-")[1]]
    config = DiTConfig(
        depth=depth,
        width=width,
        heads=heads,
        num_classes=data.NUM_CLASSES,
        input_size=tokenizer.config.patch_nums[-1],
        in_channels=tokenizer.config.latent_channels,
        patch_size=2,
        learn_sigma=False,
    )
    net, pool = DiTTransformer(config), LatentPool(work)
    scale = 1 / pool.std

    def loss_at(step: int) -> Tensor:
        generator = step_generator(step, seed)
        latents, labels_B = pool.batch(step, recipe.batch_size, seed)
        labels_B = drop_labels(labels_B, data.NUM_CLASSES, generator)
        return denoising_loss(lambda x, t_B: net(x, t_B, labels_B), DIT_PROCESS, latents * scale, generator)

    net.load_state_dict(train(name, net, recipe, of_loss(loss_at), work, report).weights)
    return DiT(net, tokenizer, DIT_PROCESS, DIT_SAMPLING, latent_scale=scale)


def ddpm_config(size: str) -> UNetConfig:
    """The network of DDPM (Ho et al. 2020) at 24 px: one residual block a level, attention at 6 px."""
    widths = DDPM_SIZES[size]
    plain = len(widths) - 1
    return UNetConfig(
        {
            "sample_size": data.IMAGE_SIZE,
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": widths,
            "down_block_types": ("DownBlock2D",) * plain + ("AttnDownBlock2D",),
            "up_block_types": ("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "norm_eps": 1e-6,
            "downsample_padding": 0,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "attention_head_dim": None,
        }
    )


def train_ddpm(name: str, recipe: Recipe, work: Path, report: Report, seed: int = 0) -> DDPM:
    """A DDPM: mean squared error of the noise in pixels, every image drawn once. It has no classes.

    Convolutions are in bfloat16, which takes two thirds of the time.
    """
    torch.manual_seed(seed)
    net = UNet(ddpm_config(name.split("-")[1]))

    def output(x_BCHW: Tensor, t_B: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return net(x_BCHW, t_B).float()

    def loss_at(step: int) -> Tensor:
        images = data.draw("train", step * recipe.batch_size, recipe.batch_size).images_BCHW
        return denoising_loss(output, DDPM_PROCESS, data.to_float(images), step_generator(step, seed))

    net.load_state_dict(train(name, net, recipe, of_loss(loss_at), work, report).weights)
    return DDPM(net, None, DDPM_PROCESS, DDPM_SAMPLING)
