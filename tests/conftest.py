"""What tests of several folders use."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bitlaw.metrics.evaluation import Reference, evaluate
from bitlaw.metrics.features import Features
from bitlaw.metrics.fid import FeatureStatistics
from bitlaw.metrics.protocol import Score
from bitlaw.models.generator import ImageGenerator


class MeanColours:
    """A feature network of four numbers, so that a dozen images of any size make a score."""

    name, fingerprint = "mean colours", "0" * 16

    def __call__(self, images_BCHW: torch.Tensor) -> Features:
        x = images_BCHW.float().flatten(2) / 255
        return Features(torch.cat([x.mean(2), x.std((1, 2))[:, None]], 1))


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Random weights of a test are its own, whatever ran before it: parallel runs differ in order."""
    torch.manual_seed(0)


@pytest.fixture
def fd_to_noise() -> Callable[..., Score]:
    """Evaluates a model on a dozen images: its Fréchet distance to noise in `MeanColours`."""

    def score(model: ImageGenerator[Any], **sampling: Any) -> Score:
        generator = torch.Generator().manual_seed(0)
        size = (32, 3, model.image_size, model.image_size)
        noise = torch.randint(256, size, dtype=torch.uint8, generator=generator)
        reference = Reference("noise", FeatureStatistics.of(MeanColours()(noise).pooled_BD))
        return evaluate(model, reference, num_samples=12, seed=1, features=MeanColours(), **sampling)["fd"]

    return score
