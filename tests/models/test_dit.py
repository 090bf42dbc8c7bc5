"""DiT against the official one: forward, guidance, trajectories, posteriors, losses, gradients, keys at full size.

Then its files: training checkpoints, tables without a null class, and the layout of diffusers.
"""

import argparse
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import bitlaw
from bitlaw.models import FAMILIES
from bitlaw.models.dit import DiT, DiTSampling, DiTState
from bitlaw.models.generator import Noise, replay
from bitlaw.models.networks.dit import Classes, DiTConfig, DiTTransformer
from bitlaw.models.official import WeightsFile, read_weights
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
        close(net.y_embedder(golden["fw_y"]), golden["fw_mid_y_emb"], 0)
        seen = {}
        parts = {"final_tokens": net.final_layer}
        for i, block in enumerate(net.blocks):
            parts |= {f"block{i}": block, f"block{i}_attn": block.attn, f"block{i}_mlp": block.mlp}
        for name, part in parts.items():
            part.register_forward_hook(lambda module, inputs, out, name=name: seen.update({name: out}))
        close(net(golden["fw_x"], golden["fw_t"], golden["fw_y"]), golden["fw_out"], 5e-5)
        for name, out in seen.items():
            close(out, golden[f"fw_mid_{name}"], 5e-5)
        assert len(seen) == 7


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
        step_taken = replay(model, state, step)
        index, features = model.num_steps - 1 - step, step_taken.extracted.features
        x0 = model.spaced.predict_x0(state.x_BCHW, features, index)
        x0_expected = golden[f"{run}_pred_xstart"][step, :2]
        close(x0, x0_expected, 2e-5 * golden[f"{run}_pred_xstart"].abs().max().item())
        state = step_taken.after
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
        expected = golden["ddpm6_clip_traj"][step, :2]
        close(x, expected, 2e-5 * max(expected.abs().max().item(), 10))  # the first are as large as 200
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
    torch.testing.assert_close(posterior.log_variance_BCHW.exp(), golden["pmv_variance"], rtol=1e-4, atol=0)
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
    torch.testing.assert_close(losses.mse_B + losses.vb_B, golden["loss_loss"], rtol=2e-2, atol=0)

    x_t = process.add_noise(golden["lg_x0"], golden["lg_t"], golden["lg_noise"])
    losses = process.losses(
        net(x_t, golden["lg_t"], golden["lg_y"]), golden["lg_x0"], golden["lg_t"], golden["lg_noise"]
    )
    torch.testing.assert_close(losses.mse_B + losses.vb_B, golden["lg_loss"], rtol=1e-4, atol=0)
    torch.testing.assert_close(losses.mse_B, golden["lg_mse"], rtol=1e-4, atol=0)
    torch.testing.assert_close(losses.vb_B, golden["lg_vb"], rtol=1e-4, atol=0)
    (losses.mse_B + losses.vb_B).mean().backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    for name, norm in zip(golden["lg_grad_keys"], golden["lg_grad_l2"], strict=True):
        if name != "pos_embed":  # a constant
            assert gradients[name].norm().item() == pytest.approx(norm.item(), rel=1e-3), name


SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


@pytest.mark.parametrize("name", [*(f"DiT-{size}/{p}@256" for size in SIZES for p in (2, 4, 8)), "DiT-XL/2@512"])
def test_official_keys_and_shapes_at_full_size(name):
    with gzip.open(DATA / "dit_manifest.json.gz") as file:
        manifest = json.load(file)[name]
    size, patch, side = name[4:].replace("@", "/").split("/")
    config = DiTConfig(*SIZES[size], patch_size=int(patch), input_size=int(side) // 8)
    with torch.device("meta"):
        ours = DiTTransformer(config).state_dict()
        given = {key: torch.empty(shape) for key, (shape, _) in manifest.items()}
    expected = {key: shape for key, (shape, _) in manifest.items()}
    assert {key: list(tensor.shape) for key, tensor in ours.items()} == expected
    assert DiTConfig(**DiT.config_of(WeightsFile(Path("x.pt"), given), None)["net"]) == config


def test_conditions_are_computed_once_for_each_class(net):
    labels = torch.tensor([4, 10, 4, 1, 10, 4])
    x = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        conditions = net.conditions(250, labels)
        assert len(conditions.vectors_KD) == 3
        close(net.run(x, conditions), net(x, torch.full((6,), 250), labels), 1e-5)
        both = net.conditions(250, Classes.of(labels).with_null(10))  # latents are not repeated for the second half
        assert len(both.vectors_KD) == 4
        twice = net(torch.cat([x, x]), torch.full((12,), 250), torch.cat([labels, torch.full((6,), 10)]))
        close(net.run(x, both), twice, 1e-5)


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
        (lambda: DiTSampling(guidance=-1.0), "guidance -1"),
        (lambda: DiTSampling(guidance=float("nan")), "guidance nan"),
        (lambda: DiTSampling(eta=1.5), "eta 1.5: must be from 0"),
        (lambda: DiTSampling(num_steps=0), "num_steps 0: must be 1 or more"),
        (lambda: DiT(DiTTransformer(DiTConfig(1, 32, 4, learn_sigma=False)), NoImages()), "learn_sigma"),
    ],
)
def test_impossible_settings_are_refused(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it()


def test_guidance_on_all_channels_and_on_too_many(net, golden):
    x, labels = golden["cfg_x"][:1], golden["cfg_y"][:1]
    model = make(net, guidance=4.0, num_steps=4)
    state = model.start(labels, Noise(0, [0]))._replace(x_BCHW=x)
    three = replay(model, state, 1).extracted.features
    every = replay(model.with_sampling(guided_channels="all"), state, 1).extracted.features
    cond = replay(model.with_sampling(guidance=1.0), state, 1).extracted.features
    uncond = replay(model.with_sampling(guidance=0.0, guided_channels="all"), state, 1).extracted.features
    close(every[:, :4], uncond[:, :4] + 4 * (cond - uncond)[:, :4], 1e-4)
    close(three[:, :3], every[:, :3], 0)
    close(three[:, 3:], cond[:, 3:], 1e-5)
    assert (three[:, 3] - every[:, 3]).abs().max() > 0.1
    assert "guided_channels=all" in model.with_sampling(guided_channels="all").sampler_name
    for wrong in (0, 5, "some"):
        with pytest.raises(ValueError, match=f"guided_channels {wrong}: this model has 4 of noise"):
            model.with_sampling(guided_channels=wrong).generate([1])


def test_both_losses_are_at_hand(net):
    class Pixels(NoImages):
        def encode(self, images_BCHW):
            return images_BCHW.repeat(1, 2, 1, 1)[:, :4]

    model = DiT(net.requires_grad_(False), Pixels())
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels, noise = torch.arange(4), Noise(0, range(4))
    both = model.losses(images, labels, noise)
    assert torch.equal(model.loss(images, labels, noise), both.mse_B)
    assert both.vb_B.shape == (4,) and both.vb_B.isfinite().all()


# ---- files --------------------------------------------------------------------------------------------


def test_bfloat16_is_near(golden):
    short = bitlaw.load(DATA / "dit_a.safetensors", tokenizer="none", dtype=torch.bfloat16).with_sampling(num_steps=4)
    state = short.start(golden["fw_y"], Noise(0, range(3)))
    step = replay(short, state, 0)
    assert state.x_BCHW.dtype == step.extracted.features.dtype == step.after.x_BCHW.dtype == torch.float32
    with torch.no_grad():
        out = short.net(golden["fw_x"], golden["fw_t"], golden["fw_y"])
    close(out, golden["fw_out"], 0.05 * golden["fw_out"].abs().max().item())  # two blocks of 8-bit mantissas


def test_a_training_checkpoint(tmp_path, net, golden):
    """As train.py writes it: the averaged weights are taken, and the arguments are those of argparse."""
    tensors = load_file(DATA / "dit_a.safetensors")
    raw = {f"module.{name}": 0 * tensor for name, tensor in tensors.items()}
    args = argparse.Namespace(model="DiT-S/2", image_size=256, num_classes=10, vae="ema", results_dir="results")
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    torch.save({"model": raw, "ema": tensors, "opt": optimizer, "args": args}, tmp_path / "0050000.pt")
    model = bitlaw.load(tmp_path / "0050000.pt", tokenizer="none", heads=4)
    assert model.net.config == net.config and model.image_size == 64
    with torch.no_grad():
        close(model.net(golden["fw_x"], golden["fw_t"], golden["fw_y"]), golden["fw_out"], 5e-5)


def test_the_position_table_of_the_file_is_used(golden):
    tensors = load_file(DATA / "dit_a.safetensors")
    tensors["pos_embed"] = tensors["pos_embed"] * 0.5
    model = DiT.from_official(WeightsFile(Path("x.pt"), tensors), None, heads=4)
    with torch.no_grad():
        out = model.net(golden["fw_x"], golden["fw_t"], golden["fw_y"])
    assert torch.equal(model.net.pos_embed, tensors["pos_embed"]) and (out - golden["fw_out"]).abs().max() > 0.1


def test_a_table_without_a_null_class():
    tensors = load_file(DATA / "dit_a.safetensors")
    tensors["y_embedder.embedding_table.weight"] = tensors["y_embedder.embedding_table.weight"][:10]
    file = WeightsFile(Path("x.pt"), tensors, metadata={"num_classes": 10})
    assert (
        DiT.from_official(WeightsFile(Path("x.pt"), tensors), None, heads=4).num_classes == 9
    )  # nothing says otherwise
    for model in (
        DiT.from_official(file, None, heads=4),
        DiT.from_official(WeightsFile(Path("x.pt"), tensors), None, heads=4, num_classes=10),
        DiT.from_official(WeightsFile(Path("x.pt"), tensors), None, heads=4, null_class=False),
    ):
        assert model.num_classes == 10 and model.null_label is None
        assert model.sampling.guidance == 1.0 and model.recipes == {}
        with pytest.raises(ValueError, match=r"guidance 1\.5 needs an unconditional class"):
            model.generate([1], guidance=1.5)
        with pytest.raises(ValueError, match="label -1 out of range"):
            model.generate([-1])
        again = DiT.from_checkpoint(*model.to_checkpoint())
        assert again.null_label is None and again.net.config == model.net.config
    with pytest.raises(ValueError, match=r"x\.pt: its table has 10 classes, which are 9 .* num_classes 1000"):
        DiT.from_official(file, None, heads=4, num_classes=1000)


def test_a_wrong_option_and_a_head_of_another_model():
    tensors = load_file(DATA / "dit_a.safetensors")
    with pytest.raises(ValueError, match=r"x\.pt: unknown option of DiT 'num_heads'; did you mean"):
        DiT.from_official(WeightsFile(Path("x.pt"), tensors), None, num_heads=4)
    tensors["final_layer.linear.weight"] = tensors["final_layer.linear.weight"][:24]
    with pytest.raises(ValueError, match="6 output channels do not go with 4 input channels"):
        DiT.from_official(WeightsFile(Path("x.pt"), tensors), None, heads=4)


# ---- the layout of diffusers --------------------------------------------------------------------------


@pytest.fixture
def pipeline(tmp_path):
    """A download of the hub's layout: a transformer with random weights whose copies of the embedders are equal."""
    from diffusers import AutoencoderKL, DiTTransformer2DModel

    torch.manual_seed(0)
    theirs = DiTTransformer2DModel(2, 16, out_channels=8, num_layers=2, sample_size=8, num_embeds_ada_norm=10).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1)
    theirs.transformer_blocks[1].norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    theirs.save_pretrained(tmp_path / "transformer")
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(**levels, block_out_channels=(4, 4, 4, 4), norm_num_groups=2, layers_per_block=1)
    vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    return tmp_path, theirs


def test_a_pipeline_gives_the_official_numbers(pipeline):
    folder, theirs = pipeline
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t, y = torch.tensor([0, 250, 999]), torch.tensor([1, 9, 10])
    model = bitlaw.load(folder)
    assert model.family == "dit" and model.net.config == DiTConfig(2, 32, 2, 10, 8) and model.image_size == 64
    assert torch.equal(model.net.pos_embed, DiTTransformer(model.net.config).pos_embed)
    with torch.no_grad():
        ours, shipped = model.net(x, t, y), theirs(x, timestep=t, class_labels=y).sample
        # What makes their class compute as the official network does.
        for block in theirs.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
            block.norm3.eps = 1e-6
        corrected = theirs(x, timestep=t, class_labels=y).sample
    close(ours, corrected, 2e-6 * corrected.abs().max().item())
    assert (shipped - corrected).abs().max() > 0.05
    assert model.generate([1, -1], num_steps=3).shape == (2, 3, 64, 64)
    file = read_weights(folder)
    assert [name for name, family in FAMILIES.items() if family.recognizes(file)] == ["dit"]


def test_official_names_of_a_pipeline_load_again(pipeline, tmp_path):
    model = bitlaw.load(pipeline[0])
    torch.save(model.to_official(), tmp_path / "official.pt")
    again = bitlaw.load(tmp_path / "official.pt", heads=2)  # the autoencoder is beside it
    assert again.net.config == model.net.config
    assert torch.equal(again.generate([3], num_steps=2), model.generate([3], num_steps=2))


def test_the_transformer_s_file_alone_finds_its_configuration(pipeline):
    file = pipeline[0] / "transformer" / "diffusion_pytorch_model.safetensors"
    assert bitlaw.load(file).net.config.num_classes == 10  # and the autoencoder beside its folder
    (pipeline[0] / "transformer" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"without their config\.json"):
        bitlaw.load(file)


def test_copies_of_the_embedders_must_be_equal(pipeline):
    file = read_weights(pipeline[0])
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    wrong = WeightsFile(file.path, {**file.tensors, name: file.tensors[name] + 1}, metadata=file.metadata)
    with pytest.raises(ValueError, match=f"these copies differ from the first: {name}"):
        DiT.from_official(wrong, None)


def test_what_is_no_dit_of_diffusers_is_refused(pipeline):
    file = read_weights(pipeline[0])
    other = WeightsFile(file.path, file.tensors, metadata={**file.metadata, "activation_fn": "geglu"})
    with pytest.raises(ValueError, match=r"config\.json is not that of a DiT: activation_fn geglu, expected gelu-app"):
        DiT.from_official(other, None)
    parts = {name: tensor for name, tensor in file.tensors.items() if name != "transformer_blocks.1.attn1.to_k.bias"}
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.qkv\.bias: the part of k is missing"):
        DiT.from_official(WeightsFile(file.path, parts, metadata=file.metadata), None)
    more = {**file.tensors, "transformer_blocks.1.attn2.to_q.weight": torch.ones(2, 2)}
    with pytest.raises(ValueError, match=r"blocks\.1\.attn2\.to_q\.weight: unknown"):
        DiT.from_official(WeightsFile(file.path, more, metadata=file.metadata), None)


def test_from_a_released_file_to_a_quantized_copy(pipeline, tmp_path):
    loaded = bitlaw.load(DATA / "dit_a.safetensors", tokenizer=pipeline[0] / "vae").with_sampling(num_steps=3)
    images = loaded.generate([1, -1], seed=2)
    small = bitlaw.quantize(loaded, "W4A8", protect="none")  # the patch embedding, a convolution, as well
    drawn = small.generate([1, -1], seed=2)
    small.save(tmp_path / "small")
    assert torch.equal(bitlaw.load(tmp_path / "small").generate([1, -1], seed=2), drawn)
    assert not torch.equal(drawn, images)
