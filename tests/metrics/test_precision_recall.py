import pytest
import torch

from bitlaw.metrics.precision_recall import precision_recall


def draw(num_images: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(num_images, 4, generator=torch.Generator().manual_seed(seed))


def test_by_hand() -> None:
    """On a line with k = 1: balls of radius 1 about 0, 1 and of radius 4 about 5."""
    real = torch.tensor([[0.0], [1.0], [5.0]])
    generated = torch.tensor([[-1.0], [-1.1], [8.9], [9.1]])
    found = precision_recall(generated, real, num_neighbors=1)
    assert found.precision == 2 / 4  # -1 is on the border, 8.9 inside
    assert found.recall == 0  # the generated balls have radii .1, .1, .2, .2


def test_the_same_set_covers_itself_far_from_the_origin() -> None:
    assert precision_recall(draw(100, 0) + 1000, draw(100, 0) + 1000) == (1, 1)


def test_narrow_and_wide() -> None:
    """A generator that shows little is precise and misses much, and the other way about."""
    narrow, wide = draw(400, seed=1, scale=0.2), draw(400, seed=2)
    precision, recall = precision_recall(narrow, wide)
    assert precision > 0.95
    assert recall < 0.2
    assert precision_recall(wide, narrow) == (recall, precision)


def test_against_cdist_in_any_block_size() -> None:
    generated, real = draw(90, seed=3, scale=1.3).double() + 0.8, draw(70, seed=4).double()

    def covered(x: torch.Tensor, centers: torch.Tensor) -> float:
        radii = torch.cdist(centers, centers).sort(dim=1).values[:, 3]
        return float((torch.cdist(x, centers) <= radii).any(1).double().mean())

    expected = (covered(generated, real), covered(real, generated))
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1
    for block_size in (1, 32, 1000):
        assert precision_recall(generated, real, block_size=block_size) == pytest.approx(expected)


def test_errors() -> None:
    with pytest.raises(ValueError, match="3 nearest neighbours of 3 images"):
        precision_recall(draw(3, 0), draw(50, 1))
    with pytest.raises(ValueError, match="different widths"):
        precision_recall(draw(50, 0), torch.zeros(50, 3))
