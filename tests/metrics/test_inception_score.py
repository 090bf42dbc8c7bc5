import math

import numpy as np
import pytest
import torch

from bitlaw.metrics.inception_score import inception_score, inception_score_interval


def sure(num_images: int, num_classes: int) -> torch.Tensor:
    """One-hot predictions, classes in turn."""
    one_hot = torch.eye(num_classes).repeat(num_images // num_classes, 1)
    return one_hot.log()


def test_bounds() -> None:
    """Sure and even gives C; always the same answer gives 1."""
    assert inception_score(sure(600, 12), num_splits=1).mean == pytest.approx(12)
    same = torch.tensor([[0.7, 0.2, 0.1]]).log().expand(50, 3)
    mean, deviation = inception_score(same)
    assert mean == pytest.approx(1)
    assert deviation == pytest.approx(0, abs=1e-6)


def test_formula() -> None:
    """Against exp(mean KL) written out, and a mixture known by hand."""
    generator = torch.Generator().manual_seed(0)
    logprobs_NC = torch.randn(40, 6, generator=generator).log_softmax(-1).double()
    probs = logprobs_NC.exp().numpy()
    divergences = (probs * np.log(probs / probs.mean(0))).sum(1)
    assert inception_score(logprobs_NC, num_splits=1).mean == pytest.approx(np.exp(divergences.mean()))
    two = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
    by_hand = math.exp(0.9 * math.log(1.8) + 0.1 * math.log(0.2))
    assert inception_score(two, num_splits=1).mean == pytest.approx(by_hand)


def test_splits_do_not_see_the_order_of_labels() -> None:
    """Sorted by class, splits taken in order would each see one class and score 1."""
    sorted_by_class = torch.eye(12).repeat_interleave(100, dim=0).log()
    assert inception_score(sorted_by_class, num_splits=12).mean > 11
    assert inception_score(sure(1200, 12), num_splits=12).mean > 11
    assert inception_score(sure(1200, 12)).deviation > 0


def test_interval_is_as_wide_as_new_draws_scatter() -> None:
    generator = torch.Generator().manual_seed(1)
    draws = [(3 * torch.randn(300, 4, generator=generator)).log_softmax(-1) for _ in range(200)]
    values = torch.tensor([inception_score(draw, num_splits=1).mean for draw in draws])
    low, high = inception_score_interval(draws[0])
    assert low < values[0] < high
    drawn_width = float(values.quantile(0.975) - values.quantile(0.025))
    assert high - low == pytest.approx(drawn_width, rel=0.35)  # quantiles of 200 are good to 10 %, one draw to 15 %


def test_errors() -> None:
    with pytest.raises(ValueError, match="summing to 1"):
        inception_score(torch.zeros(20, 3))
    with pytest.raises(ValueError, match="10 splits of 4 images"):
        inception_score(torch.full((4, 2), 0.5).log())
