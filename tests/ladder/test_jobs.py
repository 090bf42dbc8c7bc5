"""Jobs that train the ladder: the tokenizer learns, and names that no job has are refused."""

from pathlib import Path

import pytest
import torch

from bitlaw.ladder import data
from bitlaw.ladder.model_training import DDPM_PROCESS, DIT_PROCESS, denoising_loss, train_ddpm
from bitlaw.ladder.tokenizer_training import TokenizerTraining, reconstruction_loss
from bitlaw.ladder.train import PHASES, train_ladder
from bitlaw.metrics.evaluation import mean_loss
from bitlaw.models.autoencoders.multi_scale_vq import VQTokenizer, VQTokenizerConfig
from bitlaw.models.loading import load
from bitlaw.models.parts.diffusion import Diffusion
from bitlaw.training import Recipe


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


@pytest.mark.parametrize("process", [DDPM_PROCESS, DIT_PROCESS], ids=["noise", "v"])
def test_denoising_loss_is_zero_for_a_network_that_knows_the_image(process: Diffusion) -> None:
    x0 = torch.randn(8, 3, 4, 4)
    seen: list[torch.Tensor] = []

    def oracle(x: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        seen.append(t_B)
        signal, sigma = (table[t_B][:, None, None, None] for table in (process.signal, process.sigma))
        return process.target(x0, t_B, (x - signal * x0) / sigma)

    generator = torch.Generator().manual_seed(0)
    assert denoising_loss(oracle, process, x0, generator).item() < 1e-9
    assert (seen[0] // (process.num_timesteps // 8)).tolist() == list(range(8))  # one timestep in each eighth
    assert denoising_loss(lambda x, t_B: oracle(x, t_B) + 0.1, process, x0, generator).item() == pytest.approx(0.01)


def test_a_pixel_model_learns_and_is_saved_whole(tmp_path: Path) -> None:
    """A few steps: the noise is told from the image better than by saying nothing, whose error is 1."""
    said: list[str] = []
    recipe = Recipe(steps=12, lr=3e-3, batch_size=8, warmup_steps=2)
    model = train_ddpm("ddpm-s", recipe, tmp_path, said.append)
    assert "step 12/12" in said[-1]
    batch = data.draw("validation", 0, 32)
    loss, _ = mean_loss(model, batch.images_BCHW, batch.labels_B)
    assert 0 < loss < 0.9
    model.save(tmp_path / "model")
    again = load(tmp_path / "model")
    assert mean_loss(again, batch.images_BCHW, batch.labels_B)[0] == pytest.approx(loss, rel=1e-5)
    assert (again.family, again.image_size, again.num_classes, again.null_label) == ("ddpm", data.IMAGE_SIZE, 1, None)


def test_unknown_jobs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown ladder job 'train:var-x'; did you mean train:var-xs"):
        train_ladder(tmp_path, only=["train:var-x"])
    assert not list(tmp_path.iterdir())
    assert len({file for phase in PHASES for file in phase.values()}) == sum(map(len, PHASES))
