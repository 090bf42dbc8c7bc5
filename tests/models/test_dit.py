"""DiT against the official one: forward, guidance, trajectories, posteriors, losses, gradients, keys at full size."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bitlaw.models.dit import DiT, DiTSampling, DiTState
from bitlaw.models.generator import Noise, replay
from bitlaw.models.networks.dit import DiTConfig, DiTTransformer
from bitlaw.models.parts.diffusion import Diffusion
from bitlaw.models.storage import load_tensors

DATA = Path(__file__).parents[1] / "data"


class NoImages:
    """Stands where no image is encoded or decoded."""

    downsampling, latent_channels = 8, 4

    def encode(self, images_BCHW):
        raise AssertionError("not used")

    decode = encode


class GivenNoise(Noise):
    """Noise of a recorded run: of the first n rows, those that are kept."""

    def __init__(self, start, steps):
        super().__init__(0, range(len(start)))
        self.numbers = [start, *steps[:, : len(start)]]

    def normal(self, step, shape):
        return self.numbers[step]


@pytest.fixture(scope="module")
def golden():
    arrays = np.load(DATA / "dit_a.npz")
    return {k: torch.from_numpy(v) if v.dtype.kind in "fi" else v for k, v in arrays.items()}


@pytest.fixture
def net():
    net = DiTTransformer(DiTConfig(2, 96, 4, 10, 8)).eval()
    load_tensors(net, load_file(DATA / "dit_a.safetensors"), "DiT")
    return net


def make(net, **sampling):
    return DiT(net.requires_grad_(False), NoImages(), Diffusion(), DiTSampling(**sampling))


def close(actual, expected, atol):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def test_forward(net, golden):
    with torch.no_grad():
        close(net.x_embedder(golden["fw_x"]), golden["fw_mid_patch"], 5e-5)
        close(net.t_embedder(golden["fw_t"]), golden["fw_mid_t_emb"], 5e-5)
        close(net(golden["fw_x"], golden["fw_t"], golden["fw_y"]), golden["fw_out"], 5e-5)


def test_position_table_of_a_fresh_network_is_the_official_one(net):
    fresh = DiTTransformer(DiTConfig(1, 96, 4, 10, 8))
    assert torch.equal(fresh.pos_embed, net.pos_embed)


@pytest.mark.parametrize("guidance", [4.0, 1.5])
def test_guidance_acts_on_three_channels(net, golden, guidance):
    for row in range(2):  # rows differ in timestep
        timestep = golden["cfg_t"][row].item()
        model = make(net, guidance=guidance, num_steps=1000)
        state = DiTState(golden["cfg_x"][row : row + 1], golden["cfg_y"][row : row + 1], Noise(0, [row]))
        features = replay(model, state, 999 - timestep).extracted.features
        close(features, golden[f"cfg_out_s{guidance}"][row : row + 1], 1e-4)


@pytest.mark.parametrize(
    ("run", "sampling"),
    [
        ("ddim5_eta0", {"num_steps": 5, "sampler": "ddim", "spacing": "stride", "guidance": 1.5}),
        ("spaced5_ddim_eta0", {"num_steps": 5, "sampler": "ddim", "guidance": 1.5}),
        ("ddim5_eta1", {"num_steps": 5, "sampler": "ddim", "spacing": "stride", "eta": 1.0, "guidance": 1.0}),
        ("ddpm8_cfg4", {"num_steps": 8, "guidance": 4.0}),
        ("ddpm6_nocfg", {"num_steps": 6, "guidance": 1.0}),
    ],
)
def test_trajectories(net, golden, run, sampling):
    model = make(net, **sampling)
    assert model.spaced.timesteps == golden[f"{run}_timesteps"].tolist()
    trajectory = golden[f"{run}_traj"][:, :2]
    atol = 2e-5 * trajectory.abs().max().item()
    state = model.start(golden[f"{run}_y"], GivenNoise(golden[f"{run}_z"], golden[f"{run}_noise"]))
    for step in range(model.num_steps):
        one_step = state._replace(x_BCHW=trajectory[step - 1]) if step else state
        close(replay(model, one_step, step).after.x_BCHW, trajectory[step], atol)
        state = replay(model, state, step).after
        close(state.x_BCHW, trajectory[step], atol)
    close(state.x_BCHW, golden[f"{run}_final"], atol)


def test_clipped_trajectory(net, golden):
    model = make(net, num_steps=6, guidance=1.5)
    x, noise = golden["ddpm6_clip_z"], golden["ddpm6_clip_noise"]
    for step in range(6):
        state = DiTState(x, golden["ddpm6_clip_y"], Noise(0, range(2)))
        output = replay(model, state, step).extracted.features
        posterior = model.spaced.posterior(x, output, 5 - step, clip=True)
        close(posterior.x0_BCHW, golden["ddpm6_clip_pred_xstart"][step, :2], 2e-3)
        x = model.spaced.ddpm_step(x, output, 5 - step, noise[step, :2], clip=True)
    close(x, golden["ddpm6_clip_final"], 2e-4)


def test_posteriors_of_the_250_step_process(net, golden):
    process = Diffusion(respacing="250")
    x, index = golden["pmv_x"], golden["pmv_index"]
    assert [process.timesteps[i] for i in index] == golden["pmv_model_t"].tolist()
    with torch.no_grad():
        output = net(x, golden["pmv_model_t"], golden["pmv_y"])
    posterior = process.posterior(x, output, index)
    close(posterior.mean_BCHW, golden["pmv_mean"], 1e-5)
    close(posterior.log_variance_BCHW, golden["pmv_log_variance"], 5e-5)
    torch.testing.assert_close(posterior.x0_BCHW, golden["pmv_pred_xstart"], rtol=1e-5, atol=1e-5 * 8e2)
    for i, k in enumerate(golden["ps_index"].tolist()):  # one ancestral step
        with torch.no_grad():
            output = net(x[i : i + 1], torch.tensor([process.timesteps[k]]), golden["pmv_y"][i : i + 1])
        stepped = process.ddpm_step(x[i : i + 1], output, k, golden["ps_noise"][i : i + 1])
        close(stepped, golden["ps_out"][i : i + 1], 1e-5)


def test_training_losses_and_gradients(net, golden):
    process = Diffusion()
    x_t = process.add_noise(golden["loss_x0"], golden["loss_t"], golden["loss_noise"])
    close(x_t, golden["loss_xt"], 1e-6)
    with torch.no_grad():
        output = net(x_t, golden["loss_t"], golden["loss_y"])
    losses = process.losses(output, golden["loss_x0"], golden["loss_t"], golden["loss_noise"])
    torch.testing.assert_close(losses.mse_B, golden["loss_mse"], rtol=1e-4, atol=0)
    torch.testing.assert_close(losses.vb_B, golden["loss_vb"], rtol=2e-2, atol=0)  # cancellation in the tails at t = 0

    x_t = process.add_noise(golden["lg_x0"], golden["lg_t"], golden["lg_noise"])
    losses = process.losses(
        net(x_t, golden["lg_t"], golden["lg_y"]), golden["lg_x0"], golden["lg_t"], golden["lg_noise"]
    )
    torch.testing.assert_close(losses.mse_B + losses.vb_B, golden["lg_loss"], rtol=1e-4, atol=0)
    (losses.mse_B + losses.vb_B).mean().backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    for name, norm in zip(golden["lg_grad_keys"], golden["lg_grad_l2"], strict=True):
        if name != "pos_embed":  # a constant
            assert gradients[name].norm().item() == pytest.approx(norm.item(), rel=1e-3), name


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DiT-XL/2@256", DiTConfig(28, 1152, 16)),
        ("DiT-XL/2@512", DiTConfig(28, 1152, 16, input_size=64)),
        ("DiT-L/4@256", DiTConfig(24, 1024, 16, patch_size=4)),
        ("DiT-B/8@256", DiTConfig(12, 768, 12, patch_size=8)),
        ("DiT-S/2@256", DiTConfig(12, 384, 6)),
    ],
)
def test_official_keys_and_shapes_at_full_size(name, config):
    with gzip.open(DATA / "dit_manifest.json.gz") as file:
        manifest = json.load(file)[name]
    with torch.device("meta"):
        ours = DiTTransformer(config).state_dict()
    expected = {key: shape for key, (shape, _) in manifest.items()}
    assert {key: list(tensor.shape) for key, tensor in ours.items()} == expected


def test_conditions_are_computed_once_for_each_class(net):
    labels = torch.tensor([4, 10, 4, 1, 10, 4])
    x = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        conditions = net.conditions(250, labels)
        assert len(conditions.vectors_KD) == 3
        close(net.run(x, conditions), net(x, torch.full((6,), 250), labels), 1e-5)


def test_a_fresh_network_gives_zero():
    net = DiTTransformer(DiTConfig(2, 32, 2, 3, 4))
    with torch.no_grad():
        assert not net(torch.randn(2, 4, 4, 4), torch.tensor([0, 999]), torch.tensor([0, 3])).any()


def test_loss_covers_the_schedule_and_does_not_depend_on_the_batch(net):
    class Pixels(NoImages):
        def encode(self, images_BCHW):
            return images_BCHW.repeat(1, 2, 1, 1)[:, :4]

    seen = []
    handle = net.t_embedder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model = DiT(net.requires_grad_(False), Pixels())
    images = torch.randint(256, (16, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(16) % 10
    whole = model.loss(images, labels, Noise(3, range(16)))
    halves = [model.loss(images[i : i + 8], labels[i : i + 8], Noise(3, range(i, i + 8))) for i in (0, 8)]
    close(torch.cat(halves), whole, 1e-5)
    handle.remove()
    assert torch.equal(torch.cat(seen[1:]), seen[0])
    assert (seen[0].sort().values.diff() < 150).all() and seen[0].min() < 100 and seen[0].max() > 900


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: DiTConfig(1, 30, 4), "width"),
        (lambda: DiTConfig(1, 32, 4, input_size=9), "patch_size"),
        (lambda: DiTSampling(sampler="euler"), "ddpm or ddim"),
        (lambda: DiTSampling(spacing="odd"), "even or stride"),
        (lambda: DiT(DiTTransformer(DiTConfig(1, 32, 4, learn_sigma=False)), NoImages()), "learn_sigma"),
    ],
)
def test_impossible_settings_are_refused(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it()
