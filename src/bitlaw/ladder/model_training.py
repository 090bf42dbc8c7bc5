"""Train the VAR and DiT models of the ladder on latents of the ladder's tokenizer.

Legend: B images, C latent channels, h = w latent side, L tokens, V vocabulary.
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
from bitlaw.models.dit import DiT, DiTSampling
from bitlaw.models.networks.dit import DiTConfig, DiTTransformer
from bitlaw.models.networks.var import VARConfig, VARTransformer
from bitlaw.models.parts.diffusion import Diffusion
from bitlaw.models.var import VAR, VARSampling
from bitlaw.training import Recipe, Report, batch_indices, of_loss, step_generator, train

POOL_SIZE = 131_072
LABEL_DROPOUT = 0.1
SIZES = {"xs": (2, 48, 2), "s": (3, 64, 2), "m": (4, 96, 3), "l": (6, 128, 4)}  # depth, width, heads

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

# `choose_guidance` replaces the guidance; it is the same for all sizes and precisions of a family.
VAR_SAMPLING = VARSampling(guidance=1.5, top_k=0, top_p=0.0)
DIT_SAMPLING = DiTSampling(guidance=1.5, num_steps=20, sampler="ddim", guided_channels=None)
DIT_PROCESS = Diffusion(schedule="squaredcos_cap_v2", prediction="v", variance="fixed_small")


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
    """A DiT model: mean squared error of v on the continuous latents, timesteps stratified over the batch."""
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
        strata_B = (torch.arange(len(labels_B)) + torch.rand(len(labels_B), generator=generator)) / len(labels_B)
        t_B = (strata_B * DIT_PROCESS.num_timesteps).long()
        x0, epsilon = latents * scale, torch.randn(latents.shape, generator=generator)
        output = net(DIT_PROCESS.add_noise(x0, t_B, epsilon), t_B, labels_B)
        return DIT_PROCESS.losses(output, x0, t_B, epsilon).mse_B.mean()

    net.load_state_dict(train(name, net, recipe, of_loss(loss_at), work, report).weights)
    return DiT(net, tokenizer, DIT_PROCESS, DIT_SAMPLING, latent_scale=scale)
