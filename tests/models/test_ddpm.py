"""DDPM: samplers against diffusers' schedulers, its files in both layouts, released sizes, sites, quantization."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

import bitlaw
from bitlaw.methods.quantize import quantize
from bitlaw.models.ddpm import DDPM, UNetSampling, UNetState, ddpm_settings
from bitlaw.models.generator import Extracted, Noise, replay, rollout
from bitlaw.models.keymaps import ddpm_unet, to_theirs
from bitlaw.models.official import WeightsFile
from bitlaw.models.parts.diffusion import Diffusion
from bitlaw.models.releases import RELEASES

SMALL = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (32, 64),
    "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
    "layers_per_block": 2,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "attention_head_dim": None,
}


def random_weights(module):
    """Every parameter at random, norms and biases too, so that none hides another's absence."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.2
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        if parameter.dim() == 1 and "norm" in name and name.endswith("weight"):
            parameter.data.add_(1)
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def unet():
    from diffusers import UNet2DModel

    return random_weights(UNet2DModel(**SMALL))


@pytest.fixture
def directory(unet, tmp_path):
    """As `google/ddpm-cifar10-32` is laid out: everything in the root, attention under its names of 2022."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in unet.state_dict().items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        tensors[name] = tensor
    torch.save(tensors, tmp_path / "diffusion_pytorch_model.bin")
    config = {"_class_name": "UNet2DModel", "_diffusers_version": "0.0.4", **SMALL}
    scheduler = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000}
    scheduler |= {"_class_name": "DDPMScheduler", "variance_type": "fixed_large", "clip_sample": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "scheduler_config.json").write_text(json.dumps(scheduler))
    return tmp_path


def original(unet):
    return to_theirs(unet.state_dict(), ddpm_unet(2, 2))


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


# ---- samplers ---------------------------------------------------------------------------------------


def follow(sampling, process, scheduler, **step):
    """Runs a sampler beside a scheduler of diffusers on the same outputs and noise; the largest relative difference."""
    outputs = torch.randn(1000, 2, 3, 4, 4, generator=torch.Generator().manual_seed(5))  # of every timestep
    model = object.__new__(DDPM)
    model.process, model.sampling = process, sampling
    noise = Noise(3, [4, 7])
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2
    timesteps = [int(t) for t in scheduler.timesteps]
    assert timesteps == model.spaced.timesteps[::-1]
    worst = 0.0
    for index, t in enumerate(timesteps):
        ours = model.reconstruct(UNetState(x, torch.zeros(2), noise), Extracted(outputs[t]), index).x_BCHW
        given = noise.normal(index + 1, x.shape[1:])
        theirs = step_of(scheduler, outputs[t], t, x, given, **step)
        worst = max(worst, ((ours - theirs).abs().max() / theirs.abs().max()).item())
        x = theirs
    return worst


def step_of(scheduler, output, t, x, noise, **step):
    """A step of diffusers on given noise: that which DDPM's scheduler would draw is put in its place."""
    if "eta" in step:
        more = {"variance_noise": noise} if step["eta"] > 0 else {}
        return scheduler.step(output, t, x, **step, **more).prev_sample
    from diffusers.schedulers import scheduling_ddpm

    drawn = scheduling_ddpm.randn_tensor
    try:
        scheduling_ddpm.randn_tensor = lambda *_, **__: noise
        return scheduler.step(output, t, x).prev_sample
    finally:
        scheduling_ddpm.randn_tensor = drawn


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("num_steps", [10, 50])
@pytest.mark.parametrize("clip", [False, True])
def test_ddim_of_the_ddim_repository(eta, num_steps, clip):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=clip)
    scheduler.set_timesteps(num_steps)
    sampling = UNetSampling(num_steps=num_steps, sampler="ddim", eta=eta, clip=clip)
    assert follow(sampling, Diffusion(variance="fixed_small"), scheduler, eta=eta) < 1e-5


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("end", [0.0195, 0.0155])
def test_ddim_of_latent_diffusion(eta, end):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        1000, 0.0015, end, "scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    scheduler.set_timesteps(20)
    process = Diffusion(schedule="scaled_linear", variance="fixed_small", beta_ends=(0.0015, end))
    sampling = UNetSampling(num_steps=20, sampler="ddim", eta=eta, clip=False, first_timestep=1, to_x0=False)
    assert follow(sampling, process, scheduler, eta=eta) < 1e-5
    wrong = UNetSampling(num_steps=20, sampler="ddim", eta=eta, clip=False, first_timestep=1)
    assert follow(wrong, process, scheduler, eta=eta) > 1e-4  # the last step tells them apart


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("num_steps", [1000, 100])
def test_ancestral_steps(variance, clip, num_steps):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(variance_type=variance, clip_sample=clip)
    scheduler.set_timesteps(num_steps)
    sampling = UNetSampling(num_steps=num_steps, clip=clip)
    process = Diffusion(variance=variance)
    assert follow(sampling, process, scheduler) < 1e-4  # its float32 tables lose digits in 1 - abar_t / abar_t-1
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    scheduler.alphas_cumprod, scheduler.one = (1 - betas).cumprod(0), torch.ones((), dtype=torch.float64)
    assert follow(sampling, process, scheduler) < 1e-5


def test_numbers_of_steps_that_do_not_divide_the_timesteps(unet):
    """The official samplers' stride: 1000 // 400 is 2, which makes 500 steps and not 400."""
    model = make(unet, num_steps=400, sampler="ddim", first_timestep=1)
    assert model.num_steps == 500 and model.spaced.timesteps[:2] == [1, 3] and model.spaced.timesteps[-1] == 999
    assert make(unet, num_steps=30, sampler="ddim").spaced.timesteps[-1] == 990


# ---- files ------------------------------------------------------------------------------------------


def make(unet, **sampling):
    from bitlaw.models.networks.unet import UNet, UNetConfig

    net = UNet(UNetConfig(SMALL))
    net.unet.load_state_dict(unet.state_dict())
    return DDPM(net.eval().requires_grad_(False), sampling=UNetSampling(**sampling))


def noisy():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def test_a_directory_of_the_hub(directory, unet):
    model = bitlaw.load(directory)
    assert model.family == "ddpm" and model.image_size == 8 and model.num_classes == 1 and model.autoencoder is None
    assert model.process.variance == "fixed_large" and model.num_steps == 1000 and model.sampling.clip
    with torch.no_grad():
        for t in (0, 500, 999):
            close(model.net(noisy(), t), unet(noisy(), t).sample, 2e-5)
    (directory / "scheduler_config.json").unlink()
    assert bitlaw.load(directory, variance="fixed_small").process.variance == "fixed_small"


@pytest.mark.parametrize("change", [{"absent": True}, {"attention_head_dim": 8}])
def test_heads_that_diffusers_would_suppose(directory, unet, change):
    """Without the key diffusers supposes heads of 8 channels; DDPM's attention has one head."""
    config = json.loads((directory / "config.json").read_text())
    del config["attention_head_dim"]
    config |= {} if change.pop("absent", False) else change
    (directory / "config.json").write_text(json.dumps(config))
    if change:
        with pytest.raises(ValueError, match=r"attention_head_dim 8.*null"):
            bitlaw.load(directory)
    else:
        with torch.no_grad():
            close(bitlaw.load(directory).net(noisy(), 7), unet(noisy(), 7).sample, 2e-5)


@pytest.mark.parametrize("wrap", ["bare", "averages", "image size"])
def test_original_files(unet, tmp_path, wrap):
    tensors = original(unet)
    assert "down.0.attn.0.q.weight" in tensors and tensors["mid.attn_1.q.weight"].shape == (64, 64, 1, 1)
    other = {f"module.{name}": torch.zeros_like(tensor) for name, tensor in tensors.items()}
    content = [other, {}, 1, {f"module.{name}": tensor for name, tensor in tensors.items()}]
    torch.save(tensors if wrap == "bare" else content, tmp_path / "model-790000.ckpt")
    model = bitlaw.load(tmp_path / "model-790000.ckpt", **({"image_size": 8} if wrap == "image size" else {}))
    assert model.image_size == (8 if wrap == "image size" else 16)  # of the level with attention
    assert model.process.variance == "fixed_large"
    with torch.no_grad():
        close(model.net(noisy(), 321), unet(noisy(), 321).sample, 2e-5)
    official = model.to_official()
    assert set(official) == set(tensors) and all(torch.equal(official[name], tensors[name]) for name in tensors)


def test_a_tensor_of_an_original_file_that_is_missing(unet, tmp_path):
    tensors = original(unet)
    del tensors["up.1.block.2.conv1.weight"]
    torch.save(tensors, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"model\.ckpt: DDPM.*\n.*up_blocks\.0\.resnets\.2\.conv1\.weight: missing"):
        bitlaw.load(tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"heads.*image_size"):
        bitlaw.load(tmp_path / "model.ckpt", heads=2)


@pytest.mark.parametrize(
    ("side", "widths", "attention"),
    [(32, (128, 256, 256, 256), 1), (256, (128, 128, 256, 256, 512, 512), 4)],
)
def test_released_sizes(side, widths, attention):
    """Sizes from the shapes of an original file: those of the release, and its numbers of parameters and layers."""
    from diffusers import UNet2DModel

    from bitlaw.models.networks.unet import UNet, UNetConfig

    down = ["DownBlock2D"] * len(widths)
    down[attention] = "AttnDownBlock2D"
    up = [kind.replace("Down", "Up") for kind in reversed(down)]
    expected = SMALL | {"sample_size": side, "block_out_channels": widths}
    expected |= {"down_block_types": tuple(down), "up_block_types": tuple(up)}
    with torch.device("meta"):
        tensors = to_theirs(UNet2DModel(**expected).state_dict(), ddpm_unet(len(widths), 2))
        file = WeightsFile(Path("model.ckpt"), tensors)
        assert DDPM.recognizes(file)
        config = DDPM.config_of(file, None)
        assert ddpm_settings(file, None) == expected | {"norm_num_groups": 32}
        net = UNet(UNetConfig(**config["net"]))
        model = DDPM(net, process=Diffusion(**config["process"]))
    release = next(r for r in RELEASES if r.family == "ddpm" and r.image_size == side)
    assert sum(p.numel() for p in net.parameters()) == release.parameters
    layers = [net.get_submodule(site.name) for site in model.sites()]
    assert sum(isinstance(layer, nn.Linear) for layer in layers) == release.num_linears
    assert sum(isinstance(layer, nn.Conv2d) for layer in layers) == release.num_convolutions
    assert model.process.variance == ("fixed_large" if side == 32 else "fixed_small")
    assert model.recipes["paper"] == UNetSampling(num_steps=1000, sampler="ddpm", clip=True)


def test_a_whole_rollout_is_that_of_diffusers(unet):
    """Network, timesteps, steps and pixels: 20 ancestral steps and 20 of DDIM beside its loop, on the same noise."""
    from diffusers import DDIMScheduler, DDPMScheduler

    noise = Noise(6, [0, 1])
    for scheduler, sampling, more in (
        (DDPMScheduler(variance_type="fixed_large"), {}, {}),
        (DDIMScheduler(clip_sample=False), {"sampler": "ddim", "clip": False, "eta": 0.3}, {"eta": 0.3}),
    ):
        scheduler.set_timesteps(20)
        x = noise.normal(0, (3, 8, 8))
        with torch.no_grad():
            for index, t in enumerate(scheduler.timesteps):
                x = step_of(scheduler, unet(x, t).sample, t, x, noise.normal(index + 1, (3, 8, 8)), **more)
        model = make(unet, num_steps=20, **sampling)
        steps = list(rollout(model, torch.zeros(2, dtype=torch.long), noise))
        torch.testing.assert_close(steps[-1].after.x_BCHW, x, atol=1e-4 * x.abs().max().item(), rtol=0)
        pixels = ((x / 2 + 0.5).clamp(0, 1) * 255).round()
        assert (model.generate([0, 0], seed=6).int() - pixels.int()).abs().max() <= 1


def test_samplers_have_names_of_their_own(unet):
    names = {
        make(unet, **s).sampler_name for s in ({}, {"clip": False}, {"sampler": "ddim"}, {"sampler": "ddim", "eta": 1})
    }
    names |= {
        make(unet, sampler="ddim", first_timestep=1).sampler_name,
        make(unet, sampler="ddim", to_x0=False).sampler_name,
    }
    assert len(names) == 6 and make(unet).sampler_name == "ddpm fixed_large clipped"


def test_schedulers_that_are_not_understood(directory):
    path = directory / "scheduler_config.json"
    scheduler = json.loads(path.read_text())
    for change, message in (
        ({"prediction_type": "sample"}, "prediction_type"),
        ({"trained_betas": [0.1]}, "trained_betas"),
    ):
        path.write_text(json.dumps(scheduler | change))
        with pytest.raises(ValueError, match=message):
            bitlaw.load(directory)
    path.write_text(json.dumps(scheduler | {"beta_end": 0.03, "prediction_type": "v_prediction"}))
    process = bitlaw.load(directory).process
    assert process.prediction == "v" and process.betas[-1].item() == pytest.approx(0.03)


# ---- one loop ---------------------------------------------------------------------------------------


def test_sites_in_order_of_execution(unet):
    model = make(unet, num_steps=4)
    called = {}
    for name, module in model.net.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):

            def count(module, inputs, output, name=name):
                positions = (
                    output[0, 0].numel() if isinstance(module, nn.Conv2d) else output.numel() // output.shape[-1]
                )
                called[name] = called.get(name, 0) + positions

            module.register_forward_hook(count)
    list(rollout(model, torch.zeros(1, dtype=torch.long), Noise(0, [0])))
    sites = model.sites()
    assert [site.name for site in sites] == list(called)
    assert {site.name: site.uses for site in sites} == called
    kinds = {site.kind for site in sites}
    assert kinds >= {"conv_in", "conv_out", "conv1", "conv2", "shortcut", "temb", "qkv", "kv", "proj", "down", "up"}


@pytest.mark.parametrize("precision", ["W4A8", "W4g32A8KV8"])
def test_quantized_round_trip(directory, tmp_path, precision):
    model = bitlaw.load(directory).with_sampling(num_steps=4)
    assert model.generate([0, 0], seed=1).shape == (2, 3, 8, 8)
    small = quantize(model, precision)
    images = small.generate([0, 0], seed=1)
    assert not torch.equal(images, model.generate([0, 0], seed=1))
    small.save(tmp_path / "small")
    again = bitlaw.load(tmp_path / "small")
    assert torch.equal(again.generate([0, 0], seed=1), images) and again.sampling == small.sampling


def test_bfloat16_is_near(directory):
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(4, dtype=torch.long)
    exact = bitlaw.load(directory)
    short = bitlaw.load(directory, dtype="bfloat16")
    step = next(rollout(short, labels, Noise(0, range(4))))
    assert step.extracted.features.dtype == step.after.x_BCHW.dtype == torch.float32
    near = replay(exact, step.before, 0).extracted.features
    assert 0 < (step.extracted.features - near).abs().max() < 0.1 * near.abs().max()
    a, b = exact.loss(images, labels, Noise(0, range(4))), short.loss(images, labels, Noise(0, range(4)))
    torch.testing.assert_close(a, b, rtol=0.05, atol=0)


def test_loss_is_the_error_of_the_noise(unet):
    model = make(unet)
    images = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    noise = Noise(2, [0, 1, 5])
    epsilon = noise.normal(0, (3, 8, 8))
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    for row, image in enumerate((0, 1, 5)):
        t = int((image * (math.sqrt(5) - 1) / 2 + 0.5) % 1 * 1000)
        abar = float((1 - betas)[: t + 1].prod())
        x = abar**0.5 * (images[row].float() / 127.5 - 1) + (1 - abar) ** 0.5 * epsilon[row]
        with torch.no_grad():
            error = (unet(x[None], t).sample - epsilon[row]).square().mean()
        close(model.loss(images, torch.zeros(3), noise)[row], error, 1e-4)


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: UNetSampling(sampler="euler"), "ddpm or ddim"),
        (lambda: UNetSampling(eta=2), "eta 2"),
        (lambda: UNetSampling(num_steps=0), "num_steps 0"),
        (lambda: UNetSampling(guidance=-1), "guidance -1"),
        (lambda: UNetSampling(first_timestep=5), "first_timestep 5"),
        (lambda: Diffusion(schedule="squaredcos_cap_v2", beta_ends=(0.1, 0.2)), "beta_ends"),
        (lambda: Diffusion(respacing="stride5+1000").timesteps, "starts after"),
    ],
)
def test_impossible_settings_are_refused(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it()


def test_guidance_and_classes_are_refused(unet):
    model = make(unet, num_steps=2)
    with pytest.raises(ValueError, match="guidance 2: this ddpm has no classes"):
        model.generate([0], guidance=2.0)
    with pytest.raises(ValueError, match="classes 0 to 0"):
        model.generate([1])
    assert asdict(model.sampling)["guidance"] == 1
