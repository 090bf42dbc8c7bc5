"""The process: tables and respacing against the official ones, v against epsilon, DDIM against an exact model."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bitlaw.models.parts.diffusion import Diffusion, kept_timesteps

GOLDEN = dict(np.load(Path(__file__).parents[2] / "data" / "diffusion.npz"))
TABLES = {
    "betas": "betas",
    "alphas_cumprod": "abar",
    "alphas_cumprod_prev": "abar_previous",
    "posterior_variance": "posterior_variance",
    "posterior_log_variance_clipped": "posterior_log_variance",
    "posterior_mean_coef1": "posterior_x0_weight",
    "posterior_mean_coef2": "posterior_x_weight",
}


@pytest.mark.parametrize(
    ("prefix", "process"),
    [
        ("linear", Diffusion()),
        ("squaredcos_cap_v2", Diffusion(schedule="squaredcos_cap_v2")),
        ("linear_250", Diffusion(respacing="250")),
        ("linear_ddim50", Diffusion(respacing="ddim50")),
        ("squaredcos_cap_v2_100", Diffusion(schedule="squaredcos_cap_v2", respacing="100")),
    ],
)
def test_tables(prefix, process):
    found = {ours: GOLDEN[f"{prefix}_{theirs}"] for theirs, ours in TABLES.items() if f"{prefix}_{theirs}" in GOLDEN}
    assert len(found) >= 2
    for name, expected in found.items():
        np.testing.assert_allclose(getattr(process, name).numpy(), expected, rtol=1e-9, atol=1e-15, err_msg=name)
    if f"{prefix}_sqrt_recip_alphas_cumprod" in GOLDEN:  # the weights of x and of the noise in x_0
        signal, sigma = process.signal.numpy(), process.sigma.numpy()
        np.testing.assert_allclose(1 / signal, GOLDEN[f"{prefix}_sqrt_recip_alphas_cumprod"], rtol=1e-9)
        np.testing.assert_allclose(sigma / signal, GOLDEN[f"{prefix}_sqrt_recipm1_alphas_cumprod"], rtol=1e-9)


@pytest.mark.parametrize("spec", [name.removeprefix("map_") for name in GOLDEN if name.startswith("map_")])
def test_respacing(spec):
    assert kept_timesteps(1000, spec) == GOLDEN[f"map_{spec}"].tolist()


@pytest.mark.parametrize("spec", [*GOLDEN["raises_value_error"].tolist(), "0", "ddim0", "ten", "5,", "-3"])
def test_impossible_respacing(spec):
    with pytest.raises(ValueError, match=f"respacing '{spec}'"):
        kept_timesteps(1000, spec)


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_x0_comes_back_from_the_target(prediction, schedule):
    process = Diffusion(schedule=schedule, prediction=prediction, variance="fixed_small")
    x0, noise = numbers(5, 2, 3, 3), numbers(5, 2, 3, 3, seed=1)
    index = torch.tensor([0, 10, 300, 600, 900])
    x = process.add_noise(x0, index, noise)
    back = process.predict_x0(x, process.target(x0, index, noise), index)
    torch.testing.assert_close(back, x0, atol=1e-4, rtol=1e-4)  # epsilon divides by sqrt(abar), 0.03 at worst here


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_ddim_with_a_perfect_model_reaches_x0_from_any_number_of_steps(prediction):
    x0, noise = numbers(2, 2, 3, 3), numbers(2, 2, 3, 3, seed=1)
    for count in (2, 7, 20):
        process = Diffusion(prediction=prediction, variance="fixed_small").respaced(str(count))
        x = process.add_noise(x0, count - 1, noise)
        for index in reversed(range(count)):
            x = process.ddim_step(x, process.target(x0, index, noise), index)
            if index:
                torch.testing.assert_close(x, process.add_noise(x0, index - 1, noise), atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(x, x0, atol=2e-4, rtol=1e-4)


def test_v_and_epsilon_take_the_same_step():
    x, noise = numbers(2, 2, 3, 3), numbers(2, 2, 3, 3, seed=1)
    epsilon = Diffusion(variance="fixed_large").respaced("10")
    v = Diffusion(variance="fixed_large", prediction="v").respaced("10")
    for index in (1, 5, 8):
        abar = float(v.abar[index])
        x0 = epsilon.predict_x0(x, noise, index)
        output = abar**0.5 * noise - (1 - abar) ** 0.5 * x0
        for eta in (0.0, 0.7):
            expected = epsilon.ddim_step(x, noise, index, eta, noise)
            torch.testing.assert_close(v.ddim_step(x, output, index, eta, noise), expected, atol=1e-4, rtol=1e-4)
        expected = epsilon.ddpm_step(x, noise, index, noise)
        torch.testing.assert_close(v.ddpm_step(x, output, index, noise), expected, atol=1e-4, rtol=1e-4)


def test_ddim_at_eta_one_has_the_variance_of_the_posterior():
    process = Diffusion(variance="fixed_small").respaced("10")
    x = numbers(1, 2, 3, 3)
    for index in range(1, 10):
        zero, one = torch.zeros_like(x), torch.ones_like(x)
        spread = process.ddim_step(x, zero, index, 1.0, one) - process.ddim_step(x, zero, index, 1.0, zero)
        assert spread.square().mean().item() == pytest.approx(process.posterior_variance[index].item(), rel=1e-4)


def test_fixed_variances_are_the_bounds_of_the_learned_one():
    x, output = numbers(1, 2, 3, 3), numbers(1, 2, 3, 3, seed=1)
    learned = Diffusion(respacing="10")
    for variance, channel in (("fixed_small", -1.0), ("fixed_large", 1.0)):
        fixed = Diffusion(respacing="10", variance=variance).posterior(x, output, 4)
        ranged = learned.posterior(x, torch.cat([output, torch.full_like(output, channel)], 1), 4)
        torch.testing.assert_close(fixed.log_variance_BCHW, ranged.log_variance_BCHW)


def test_noise_must_be_given_where_it_is_used():
    x = numbers(1, 2, 3, 3)
    process = Diffusion(variance="fixed_small").respaced("10")
    with pytest.raises(ValueError, match="needs noise"):
        process.ddim_step(x, x, 5, eta=0.5)
    with pytest.raises(ValueError, match="needs noise"):
        process.ddpm_step(x, x, 5, None)


@pytest.mark.parametrize("field", ["schedule", "prediction", "variance"])
def test_unknown_settings_are_named(field):
    with pytest.raises(ValueError, match=f"diffusion {field} 'nothing'"):
        Diffusion(**{field: "nothing"})


def test_one_step_has_no_posterior_but_ddim_takes_it():
    process = Diffusion(variance="fixed_small").respaced("1")
    x = numbers(1, 2, 3, 3)
    assert process.ddim_step(x, x, 0).isfinite().all()
    with pytest.raises(ValueError, match="DDIM"):
        process.ddpm_step(x, x, 0, x)
