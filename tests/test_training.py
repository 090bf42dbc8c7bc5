"""The training loop: a resumed run takes the same steps, and bad numbers stop it."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlaw.training import Recipe, Watch, batch_indices, of_loss, step_generator, train

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

    return train("net", net, RECIPE, of_loss(loss_at), work, quiet).weights


def test_a_resumed_run_is_an_undisturbed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitlaw.training.SECONDS_BETWEEN_SAVES", -1.0)  # save after every step
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
    loss = of_loss(lambda step: net(torch.ones(1, 4)).square().sum())
    weights = train("net", net, RECIPE, loss, tmp_path, quiet).weights
    assert not torch.equal(weights["weight"], net.weight)
    assert (weights["weight"] - net.weight).norm() < (before - net.weight).norm()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    net = nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match="net: loss is nan at step 0; lower the learning rate"):
        train("net", net, RECIPE, of_loss(lambda step: net(torch.ones(1, 1)).sum() * torch.nan), tmp_path, quiet)


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


def test_the_weights_of_the_least_error_are_kept(tmp_path: Path) -> None:
    """Errors that are told by step: the best one is in the middle, and patience ends the run two looks later."""
    torch.manual_seed(0)
    net = nn.Linear(4, 2)
    looks: list[Tensor] = []
    errors = [5.0, 4.0, 1.0, 2.0, 3.0, 9.0]

    def error() -> float:
        looks.append(net.weight.detach().clone())
        return errors[len(looks) - 1]

    loss = of_loss(lambda step: net(torch.ones(1, 4)).square().sum())
    trained = train("net", net, RECIPE, loss, tmp_path, quiet, watch=Watch(error, every=3, patience=2))
    assert trained.errors == {0: 5.0, 3: 4.0, 6: 1.0, 9: 2.0, 12: 3.0}
    assert trained.step == 6
    assert torch.equal(trained.weights["weight"], looks[2])  # the average, which the module held while it was looked at
    again = train("net", net, RECIPE, loss, tmp_path, quiet, watch=Watch(error, every=3, patience=2))
    assert again.errors == trained.errors and len(looks) == 5  # nothing is left to do
