"""Random numbers are a function of (seed, step, image)."""

import math

import torch

from bitlaw.models.generator import Noise


def test_an_image_meets_the_same_noise_in_any_batch() -> None:
    together = Noise(3, [0, 1, 2, 3]).normal(5, (4, 2))
    apart = torch.cat([Noise(3, [image]).normal(5, (4, 2)) for image in (2, 3)])
    assert torch.equal(together[2:], apart)


def test_seed_step_and_image_each_change_it() -> None:
    def first(seed: int, step: int, image: int) -> float:
        return Noise(seed, [image]).normal(step, (1,)).item()

    draws = {first(*key) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1)]}
    assert len(draws) == 7


def test_gumbel_numbers_have_their_mean_variance_and_draw_from_a_softmax() -> None:
    gumbel = Noise(0, range(4000)).gumbel(1, (8,))
    # Standard errors at 32 000 draws: 0.007 for the mean, about 0.02 for the variance; bounds are five of them.
    assert abs(gumbel.mean().item() - 0.5772) < 0.036
    assert abs(gumbel.var().item() - math.pi**2 / 6) < 0.1
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05, 1e-9, 1e-9, 1e-9, 1e-9]))
    shares = torch.bincount((logits + gumbel).argmax(1), minlength=8) / 4000
    assert (shares - logits.exp()).abs().max() < 0.04  # five standard errors of a share of one half


def test_normal_numbers_of_neighbours_are_uncorrelated() -> None:
    x = Noise(0, range(2000)).normal(0, (1,)).squeeze(1)
    assert abs(x.mean().item()) < 0.11
    assert abs((x[1:] * x[:-1]).mean().item()) < 0.11
