from itertools import permutations, product

import pytest
import torch

from bitlaw.metrics.kid import kernel_distance, squared_discrepancy


def draw(num_images: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(num_images, 5, generator=torch.Generator().manual_seed(seed)).double() + shift


def test_formula() -> None:
    """Against the sums over pairs written out; sets of different sizes."""
    x_ND, y_MD = draw(7, seed=0), draw(4, seed=1, shift=0.5)

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a @ b / 5 + 1) ** 3)

    within_x = sum(kernel(a, b) for a, b in permutations(x_ND, 2)) / (7 * 6)
    within_y = sum(kernel(a, b) for a, b in permutations(y_MD, 2)) / (4 * 3)
    between = sum(kernel(a, b) for a, b in product(x_ND, y_MD)) / (7 * 4)
    assert float(squared_discrepancy(x_ND, y_MD)) == pytest.approx(within_x + within_y - 2 * between)


def test_unbiased_at_small_n() -> None:
    """Equal distributions: 0 within its standard error, although there are 10 images a block."""
    value, standard_error = kernel_distance(draw(4000, seed=2), draw(4000, seed=3), num_blocks=400)
    assert abs(value) < 4 * standard_error
    assert standard_error > 0


def test_standard_error_is_that_of_new_draws() -> None:
    scores = [kernel_distance(draw(200, seed, shift=0.3), draw(200, seed + 1000)) for seed in range(150)]
    scatter = float(torch.tensor([score.value for score in scores]).std())
    promised = float(torch.tensor([score.standard_error for score in scores]).mean())
    assert promised == pytest.approx(scatter, rel=0.2)  # a deviation of 150 values is good to 6 %


def test_order_of_images_does_not_matter_to_the_blocks() -> None:
    """A set sorted by its first feature is shuffled: blocks in order would differ wildly."""
    x_ND, y_MD = draw(1000, seed=4), draw(1000, seed=5)
    shuffled, in_order = kernel_distance(x_ND, y_MD), kernel_distance(x_ND[x_ND[:, 0].argsort()], y_MD)
    assert in_order.standard_error < 3 * shuffled.standard_error
    assert kernel_distance(x_ND, y_MD) == shuffled


def test_errors() -> None:
    with pytest.raises(ValueError, match="10 blocks of 19 images"):
        kernel_distance(draw(19, seed=6), draw(50, seed=7))
    with pytest.raises(ValueError, match="different widths"):
        kernel_distance(draw(50, seed=6), torch.zeros(50, 4))
