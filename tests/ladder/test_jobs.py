"""Jobs that train the ladder: the tokenizer learns, and names that no job has are refused."""

from pathlib import Path

import pytest
import torch

from bitlaw.ladder import data
from bitlaw.ladder.tokenizer_training import TokenizerTraining, reconstruction_loss
from bitlaw.ladder.train import PHASES, train_ladder
from bitlaw.models.autoencoders.multi_scale_vq import VQTokenizer, VQTokenizerConfig


def test_the_tokenizer_learns_and_revives_dead_codes() -> None:
    torch.manual_seed(0)
    config = VQTokenizerConfig(
        vocab_size=64,
        latent_channels=4,
        ch=8,
        ch_mult=(1, 2, 2),
        num_res_blocks=1,
        patch_nums=(1, 3, 6),
        norm_groups=0,
        attention=False,
    )
    training = TokenizerTraining(VQTokenizer(config))
    optimizer = torch.optim.AdamW([p for p in training.parameters() if p.requires_grad], lr=3e-3)
    x = data.to_float(data.draw("train", 0, 32).images_BCHW)
    first = training.loss(x, 0).item()
    for step in range(1, 40):
        loss = training.loss(x, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.7 * first
    training.eval()
    tokens = training.tokenizer.encode_to_tokens(x)
    assert len(torch.cat(tokens.indices, 1).unique()) > 16  # a collapsed codebook uses a handful


def test_reconstruction_loss_is_zero_only_at_equality() -> None:
    x = torch.rand(2, 3, 6, 6)
    assert reconstruction_loss(x, x).item() == 0
    assert reconstruction_loss(x + 0.1, x).item() == pytest.approx(0.11, rel=1e-4)  # no gradient term for a constant


def test_unknown_jobs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown ladder job 'train:var-x'; did you mean train:var-xs"):
        train_ladder(tmp_path, only=["train:var-x"])
    assert not list(tmp_path.iterdir())
    assert len({file for phase in PHASES for file in phase.values()}) == sum(map(len, PHASES))
