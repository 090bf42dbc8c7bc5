"""Distortions by hand, at equality, and where they do not belong."""

import math

import pytest
import torch

from bitlaw.allocation.distortion import MEASURES, default_measure, forward_kl, measure_for, relative_mse, ssim
from tiny_models import TINY


def outputs(name, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn((3, 2, 8, 8) if MEASURES[name].of == "images" else (3, 4, 6), generator=g)


@pytest.mark.parametrize("name", MEASURES)
def test_equal_outputs_have_none_and_others_some(name):
    exact, other = outputs(name, 0), outputs(name, 1)
    assert MEASURES[name](exact, exact.clone()).tolist() == [0, 0, 0]
    assert (MEASURES[name](exact, other) > 0).all() and MEASURES[name](exact, other).dtype == torch.float64


@pytest.mark.parametrize("name", MEASURES)
def test_images_do_not_see_each_other(name):
    exact, other = outputs(name, 0), outputs(name, 1)
    alone = [MEASURES[name](exact[i : i + 1], other[i : i + 1]).item() for i in range(3)]
    assert MEASURES[name](exact, other).tolist() == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize("name", MEASURES)
def test_an_output_of_zeros_is_a_finite_distance_away(name):
    exact = outputs(name, 0)
    assert MEASURES[name](exact, torch.zeros_like(exact)).isfinite().all()


def test_mse_has_no_unit_and_is_1_for_zeros():
    exact, other = outputs("mse", 0), outputs("mse", 1)
    by_hand = ((exact - other) ** 2).double().sum((1, 2)) / (exact**2).double().sum((1, 2))
    assert MEASURES["mse"](exact, other).tolist() == pytest.approx(by_hand.tolist(), rel=1e-6)
    assert MEASURES["mse"](8 * exact, 8 * other).tolist() == MEASURES["mse"](exact, other).tolist()
    assert MEASURES["mse"](exact, torch.zeros_like(exact)).tolist() == [1, 1, 1]


def test_mse_against_zeros_is_an_error_and_no_nan():
    with pytest.raises(ValueError, match="all zeros"):
        relative_mse(torch.zeros(1, 4).double())


def test_ssim_of_one_window_by_hand():
    exact = torch.tensor([[[[0.0, 1.0], [2.0, 5.0]]]], dtype=torch.float64)
    other = torch.tensor([[[[1.0, 1.0], [1.0, 3.0]]]], dtype=torch.float64)
    # means 2 and 1.5, variances 3.5 and 0.75, covariance (0*1 + 1*1 + 2*1 + 5*3) / 4 - 2 * 1.5 = 1.5, range 5
    c1, c2 = (0.01 * 5) ** 2, (0.03 * 5) ** 2
    by_hand = (2 * 2 * 1.5 + c1) / (4 + 2.25 + c1) * (2 * 1.5 + c2) / (3.5 + 0.75 + c2)
    assert ssim(exact)(other).item() == pytest.approx(by_hand, rel=1e-12)


def test_ssim_is_the_mean_over_channels_and_windows():
    exact, other = (torch.randn(1, 2, 8, 9, generator=torch.Generator().manual_seed(i)).double() for i in range(2))
    exact[:, :, 0, 0], exact[:, :, 0, 1] = -9.0, 9.0  # both channels have the image's range
    parts = []
    c1, c2 = (0.01 * 18) ** 2, (0.03 * 18) ** 2
    for channel in range(2):
        for row in range(2):
            for column in range(3):
                a, b = (x[0, channel, row : row + 7, column : column + 7].flatten() for x in (exact, other))
                covariance = ((a - a.mean()) * (b - b.mean())).mean()
                luminance = (2 * a.mean() * b.mean() + c1) / (a.mean() ** 2 + b.mean() ** 2 + c1)
                structure = (2 * covariance + c2) / (a.var(correction=0) + b.var(correction=0) + c2)
                parts.append((luminance * structure).item())
    assert ssim(exact)(other).item() == pytest.approx(sum(parts) / len(parts), rel=1e-9)


def test_ssim_sees_structure_that_mse_does_not():
    exact, noise = (torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(i)).double() for i in range(2))
    exact, noise = exact + 5, noise / noise.square().mean().sqrt()
    shifted, noisy = exact + 0.5, exact + 0.5 * noise
    assert relative_mse(exact)(shifted).item() == pytest.approx(relative_mse(exact)(noisy).item(), rel=1e-9)
    assert ssim(exact)(shifted) > ssim(exact)(noisy) + 0.05


def test_kl_by_hand_ignores_a_constant_of_all_logits():
    exact = torch.tensor([[[0.0, math.log(3)], [0.0, 0.0]]], dtype=torch.float64)  # 1/4 3/4, and 1/2 1/2
    other = torch.tensor([[[0.0, 0.0], [7.0, 7.0]]], dtype=torch.float64)
    by_hand = (0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)) / 2
    assert forward_kl(exact)(other).item() == pytest.approx(by_hand, rel=1e-12)
    assert MEASURES["mse-probabilities"](exact, exact + 3).item() == pytest.approx(0, abs=1e-15)
    assert MEASURES["mse-logits"](exact, exact + 3).item() > 1


def test_outputs_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="shapes"):
        MEASURES["mse"](torch.ones(2, 3), torch.ones(2, 1))


@pytest.mark.parametrize(
    ("family", "usual", "wrong"), [("var", "kl", "mse+ssim"), ("dit", "mse+ssim", "kl"), ("mar", "mse", "mse+ssim")]
)
def test_a_family_has_its_measure_and_refuses_others(family, usual, wrong):
    model = TINY[family]()
    assert default_measure(model) == usual == measure_for(model)[0]
    assert measure_for(model, "mse")[0] == "mse"
    with pytest.raises(ValueError, match=f"'{wrong.replace('+', '.')}' is for .*use .*{usual.replace('+', '.')}"):
        measure_for(model, wrong)
    with pytest.raises(ValueError, match="measure of distortion"):
        measure_for(model, "ssim+mse")
