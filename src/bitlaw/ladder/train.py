"""`bitlaw ladder train`: rebuild the built-in models from nothing.

    features    the feature network of the ladder's metrics          |  side by side
    tokenizer   the autoencoder of both families                     |
    latents     a pool of training images, encoded once              after the tokenizer
    var-*, dit-*                                                     side by side, largest first
    reference   feature statistics of real and reconstructed images  after features and tokenizer
    card        full-precision scores of every model                 last

Every job is resumable and runs in one process with one thread; two run at a time.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitlaw.files import write_json, write_with
from bitlaw.ladder import data
from bitlaw.ladder.feature_training import feature_loss
from bitlaw.ladder.tokenizer_training import TokenizerTraining
from bitlaw.ladder.training import Recipe, Report, batch_indices, train, training_seconds
from bitlaw.metrics.features import LadderFeatureNet
from bitlaw.models.vq_tokenizer import VQTokenizer, VQTokenizerConfig

TOKENIZER = VQTokenizerConfig(
    vocab_size=512,
    latent_channels=8,
    ch=16,
    ch_mult=(1, 2, 4),
    num_res_blocks=1,
    patch_nums=(1, 2, 3, 4, 6),
    norm_groups=0,
    attention=False,
)
TOKENIZER_RECIPE = Recipe(steps=4000, lr=2e-3, warmup_steps=100, weight_decay=0.0)
FEATURES_RECIPE = Recipe(steps=3000, lr=3e-3, warmup_steps=100, weight_decay=0.02)


def train_features(out: Path, work: Path, report: Report) -> None:
    """The feature network, as `features.safetensors` in float16."""
    torch.manual_seed(0)
    net = LadderFeatureNet(num_factors=data.NUM_CONTINUOUS_FACTORS).to(memory_format=torch.channels_last)

    def loss_at(step: int) -> Tensor:
        return feature_loss(net, data.draw("features", step * FEATURES_RECIPE.batch_size, FEATURES_RECIPE.batch_size), step)

    weights = train("features", net, FEATURES_RECIPE, loss_at, work, report)
    net.load_state_dict(weights)
    _calibrate_norms(net)
    save_half(out / "features.safetensors", net.state_dict())


def _calibrate_norms(net: LadderFeatureNet, num_images: int = 8192) -> None:
    """Measure the BatchNorm statistics anew: those of training belong to the weights, not to their average."""
    norms = [m for m in net.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over batches
    net.train()
    with torch.no_grad():
        for batch in data.batches("features", num_images, first=10_000_000):
            net(data.to_float(batch.images_BCHW))
    net.eval()


def train_tokenizer(out: Path, work: Path, report: Report) -> None:
    """The autoencoder, as `tokenizer.safetensors` in float16."""
    torch.manual_seed(0)
    training = TokenizerTraining(VQTokenizer(TOKENIZER)).to(memory_format=torch.channels_last)

    def loss_at(step: int) -> Tensor:
        batch = data.draw("train", step * TOKENIZER_RECIPE.batch_size, TOKENIZER_RECIPE.batch_size)
        x = data.to_float(batch.images_BCHW).contiguous(memory_format=torch.channels_last)
        return training.loss(x, step)

    weights = train("tokenizer", training, TOKENIZER_RECIPE, loss_at, work, report)
    prefix = "tokenizer."
    save_half(out / "tokenizer.safetensors", {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})


def save_half(path: Path, tensors: dict[str, Tensor]) -> None:
    """Floating tensors as float16, contiguous, atomically."""
    half = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in tensors.items()}
    write_with(path, lambda temporary: save_file(half, temporary))
