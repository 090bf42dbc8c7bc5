"""The procedural images: a function of (split, index), every class drawn, factors in their ranges."""

import numpy as np
import pytest
import torch

from bitlaw.ladder import data


def test_an_image_is_the_same_in_any_range() -> None:
    whole = data.draw("train", 100, 24)
    part = data.draw("train", 110, 5)
    assert torch.equal(whole.images_BCHW[10:15], part.images_BCHW)
    assert torch.equal(whole.labels_B[10:15], part.labels_B)


def test_splits_differ() -> None:
    images = [data.draw(split, 0, 4).images_BCHW for split in data.SPLITS]
    for i, first in enumerate(images):
        for second in images[i + 1 :]:
            assert not torch.equal(first, second)


def test_batches_are_the_images_in_order() -> None:
    joined = torch.cat([batch.images_BCHW for batch in data.batches("test", 40, batch_size=16)])
    assert torch.equal(joined, data.draw("test", 0, 40).images_BCHW)


def test_factors_are_in_range_and_classes_balanced() -> None:
    factors = data.draw_factors(1, 0, 6000)
    assert factors.radius.min() >= 0.58 and factors.radius.max() <= 0.82
    assert factors.light.min() >= -2.4 and factors.light.max() <= -0.75
    counts = np.bincount(factors.shape.numpy(), minlength=data.NUM_CLASSES)
    assert len(counts) == data.NUM_CLASSES
    assert abs(counts - 500).max() < 110  # five standard deviations of a binomial
    continuous = factors.continuous_BF()
    assert continuous.shape == (6000, data.NUM_CONTINUOUS_FACTORS)
    assert continuous.abs().max() <= 1.001


@pytest.mark.parametrize("label", range(data.NUM_CLASSES))
def test_every_shape_covers_its_share_of_the_square(label: int) -> None:
    """A signed distance: inside somewhere, outside at the corners, and never steeper than 1."""
    shape = list(data.SHAPES.values())[label]
    grid = torch.linspace(-1.3, 1.3, 131)
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    distance = shape(x, y)
    inside = (distance < 0).float().mean().item()
    assert 0.08 < inside < 0.6
    assert distance[0, 0] > 0 and distance[-1, -1] > 0
    slope = torch.hypot(distance.diff(dim=0)[:, 1:], distance.diff(dim=1)[1:]) / (2.6 / 130)
    assert slope.quantile(0.99) < 1.6


def test_hsv_corners() -> None:
    ones = torch.ones(4)
    rgb = data._hsv(torch.tensor([0.0, 1 / 3, 2 / 3, 1.0]), ones, ones)
    expected = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]])
    assert torch.allclose(rgb, expected, atol=1e-5)
