"""The training loop: a resumed run takes the same steps, bad numbers stop it, and the jobs know their order."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlaw.ladder import data
from bitlaw.ladder.tokenizer_training import TokenizerTraining, reconstruction_loss
from bitlaw.ladder.train import PHASES, train_ladder
from bitlaw.ladder.training import Recipe, batch_indices, step_generator, train
from bitlaw.models.autoencoders.multi_scale_vq import VQTokenizer, VQTokenizerConfig

RECIPE = Recipe(steps=30, lr=1e-2, batch_size=8, warmup_steps=5)


class Killed(Exception):
    """Stands for a kill between two steps."""


def quiet(text: str) -> None:
    """Progress nobody reads."""


def fit(work: Path, stop_at: int | None = None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    net = nn.Linear(4, 2)

    def loss_at(step: int) -> Tensor:
        if step == stop_at:
            raise Killed
        x = torch.randn(8, 4, generator=step_generator(step))
        return F.mse_loss(net(x), x[:, :2])

    return train("net", net, RECIPE, loss_at, work, quiet)


def test_a_resumed_run_is_an_undisturbed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitlaw.ladder.training.SECONDS_BETWEEN_SAVES", -1.0)  # save after every step
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    undisturbed = fit(tmp_path / "a")
    with pytest.raises(Killed):
        fit(tmp_path / "b", stop_at=17)
    resumed = fit(tmp_path / "b")
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in undisturbed)


def test_the_average_follows_the_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 2)
    before = net.weight.detach().clone()
    weights = train("net", net, RECIPE, lambda step: net(torch.ones(1, 4)).square().sum(), tmp_path, quiet)
    assert not torch.equal(weights["weight"], net.weight)
    assert (weights["weight"] - net.weight).norm() < (before - net.weight).norm()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    net = nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match="net: loss is nan at step 0; lower the learning rate"):
        train("net", net, RECIPE, lambda step: net(torch.ones(1, 1)).sum() * torch.nan, tmp_path, quiet)


def test_the_learning_rate_warms_up_and_falls() -> None:
    recipe = Recipe(steps=1000, lr=1.0)
    assert recipe.lr_at(0) == pytest.approx(0.01)
    assert recipe.lr_at(99) == pytest.approx(1.0)
    assert recipe.lr_at(999) == pytest.approx(recipe.final_lr_ratio, abs=1e-4)
    assert all(recipe.lr_at(s) >= recipe.lr_at(s + 1) for s in range(100, 999))


def test_every_row_is_met_once_an_epoch() -> None:
    seen = torch.cat([batch_indices(step, 8, 64) for step in range(8)])
    assert sorted(seen.tolist()) == list(range(64))
    assert not torch.equal(batch_indices(0, 8, 64), batch_indices(8, 8, 64))


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
