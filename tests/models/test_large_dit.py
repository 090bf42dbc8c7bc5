"""Large-DiT against the official one: forward, guidance, trajectory, keys at full size; its folders, in and out."""

import argparse
import gzip
import json
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import bitlaw
from bitlaw.models import FAMILIES
from bitlaw.models.dit import DiT, DiTState
from bitlaw.models.generator import Noise, replay
from bitlaw.models.large_dit import LargeDiT
from bitlaw.models.networks.large_dit import LargeDiTConfig, LargeDiTTransformer
from bitlaw.models.official import WeightsFile, read_weights

DATA = Path(__file__).parents[1] / "data"
FILE = DATA / "large_dit.safetensors"


class GivenNoise(Noise):
    """Noise of a recorded run: of the first n rows, those that are kept."""

    def __init__(self, start, steps):
        super().__init__(0, range(len(start)))
        self.numbers = [start, *steps[:, : len(start)]]

    def normal(self, step, shape):
        return self.numbers[step]


@pytest.fixture(scope="module")
def golden():
    return {name: torch.from_numpy(array) for name, array in np.load(DATA / "large_dit.npz").items()}


@pytest.fixture(scope="module")
def model():
    return bitlaw.load(FILE, tokenizer="none")


def close(actual, expected, atol):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def test_the_golden_file_is_recognised(model):
    assert type(model) is LargeDiT and model.family == "large-dit"
    assert model.net.config == LargeDiTConfig(2, 96, 4, 10, 8, hidden=256)
    assert model.image_size == 64 and model.num_classes == model.null_label == 10
    assert model.sampling.guidance == 4.0 and model.num_steps == 250  # of the official script
    file = read_weights(FILE)
    assert [family.family for family in FAMILIES.values() if family.recognizes(file)] == ["large-dit"]
    assert not LargeDiT.recognizes(read_weights(DATA / "dit_a.safetensors"))


def test_forward_and_what_is_inside(model, golden):
    seen = {}
    handles = [model.net.x_embedder.register_forward_hook(lambda m, i, out: seen.update(patch=out))]
    for i, layer in enumerate(model.net.layers):
        for name, part in (
            (f"layer{i}", layer),
            (f"layer{i}_attn", layer.attention),
            (f"layer{i}_ff", layer.feed_forward),
        ):
            handles.append(part.register_forward_hook(lambda m, inputs, out, name=name: seen.update({name: out})))
    with torch.no_grad():
        out = model.net(golden["fw_x"], golden["fw_t"], golden["fw_y"])
    for handle in handles:
        handle.remove()
    inside = {name.removeprefix("fw_mid_"): array for name, array in golden.items() if name.startswith("fw_mid_")}
    assert seen.keys() == inside.keys()
    for name, expected in inside.items():
        close(seen[name], expected, 5e-5)
    close(out, golden["fw_out"], 5e-5)


def test_guidance_acts_on_three_channels(model, golden):
    expected = golden["cfg_out_s4.0"]
    for row in range(2):  # rows differ in timestep
        timestep = golden["cfg_t"][row].item()
        every_step = model.with_sampling(guidance=4.0, num_steps=1000)
        state = DiTState(golden["cfg_x"][row : row + 1], golden["cfg_y"][row : row + 1], Noise(0, [row]))
        features = replay(every_step, state, 999 - timestep).extracted.features
        close(features, expected[row : row + 1], 1e-4)


def test_trajectory(model, golden):
    run = model.with_sampling(guidance=4.0, num_steps=6)
    assert run.spaced.timesteps == golden["ddpm6_cfg4_timesteps"].tolist()
    trajectory = golden["ddpm6_cfg4_traj"][:, :2]
    atol = 2e-5 * trajectory.abs().max().item()
    state = run.start(golden["ddpm6_cfg4_y"], GivenNoise(golden["ddpm6_cfg4_z"], golden["ddpm6_cfg4_noise"]))
    for step in range(6):
        one_step = state._replace(x_BCHW=trajectory[step - 1]) if step else state
        close(replay(run, one_step, step).after.x_BCHW, trajectory[step], atol)
        state = replay(run, state, step).after
    close(state.x_BCHW, golden["ddpm6_cfg4_final"], atol)


@pytest.mark.parametrize(
    ("size", "width", "depth", "hidden"), [("600M", 1536, 16, 4096), ("3B", 3072, 32, 8192), ("7B", 4096, 32, 11008)]
)
def test_official_keys_and_shapes_at_full_size(size, width, depth, hidden):
    with gzip.open(DATA / "dit_manifest.json.gz") as file:
        manifest = json.load(file)[f"DiT_Llama_{size}_patch2"]
    config = LargeDiTConfig(depth, width, 32)
    assert config.hidden == hidden
    with torch.device("meta"):
        ours = LargeDiTTransformer(config).state_dict()
        given = {key: torch.empty(shape) for key, (shape, _) in manifest.items()}
    assert {key: list(tensor.shape) for key, tensor in ours.items()} == {
        key: shape for key, (shape, _) in manifest.items()
    }
    assert LargeDiTConfig(**LargeDiT.config_of(WeightsFile(Path("x.pth"), given), None)["net"]) == config


def released(tmp_path, **arguments):
    """A folder as it is downloaded: averaged and raw weights, arguments, an autoencoder beside the folder."""
    from diffusers import AutoencoderKL

    folder = tmp_path / "240218_3b_bs256_step1350k"
    folder.mkdir()
    tensors = load_file(FILE)
    torch.save(tensors, folder / "consolidated_ema.00-of-01.pth")
    torch.save({name: 0 * tensor for name, tensor in tensors.items()}, folder / "consolidated.00-of-01.pth")
    torch.save(
        argparse.Namespace(num_classes=10, qk_norm=True, model_parallel_size=1, **arguments), folder / "model_args.pth"
    )
    torch.manual_seed(0)
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(**levels, block_out_channels=(4, 4, 4, 4), norm_num_groups=2, layers_per_block=1)
    vae.save_pretrained(tmp_path / "sd-vae-ft-ema")
    return folder


def test_a_folder_from_loading_to_a_quantized_copy(tmp_path, model):
    folder = released(tmp_path, image_size=32)
    loaded = bitlaw.load(folder, heads=4)
    assert loaded.image_size == 32 and loaded.net.config.num_tokens == 4
    assert torch.equal(loaded.net.layers[0].attention.wq.weight, model.net.layers[0].attention.wq.weight)
    alone = bitlaw.load(folder / "consolidated_ema.00-of-01.pth", heads=4)  # finds its arguments all the same
    assert alone.net.config == loaded.net.config
    assert bitlaw.load(folder, heads=4, image_size=64).image_size == 64

    loaded = loaded.with_sampling(num_steps=3)
    images = loaded.generate([1, -1], seed=2)
    assert images.shape == (2, 3, 32, 32)
    small = bitlaw.quantize(loaded, "W4A8KV8")
    drawn = small.generate([1, -1], seed=2)
    small.save(tmp_path / "small")
    again = bitlaw.load(tmp_path / "small")
    assert type(again) is LargeDiT and torch.equal(again.generate([1, -1], seed=2), drawn)
    assert not torch.equal(drawn, images)


def test_sizes_that_do_not_fit(tmp_path):
    tensors = load_file(FILE)
    file = WeightsFile(Path("consolidated_ema.00-of-01.pth"), tensors)
    with pytest.raises(ValueError, match="96 with 32 heads: rotary positions need even heads"):
        LargeDiT.config_of(file, None)
    with pytest.raises(ValueError, match="image_size 250 is not a multiple of the 16 pixels"):
        LargeDiT.config_of(file, None, heads=4, image_size=250)
    with pytest.raises(ValueError, match="unknown option of LargeDiT 'head'; did you mean heads"):
        LargeDiT.config_of(file, None, head=4)
    with pytest.raises(ValueError, match="one of 2 parts of a model"):
        LargeDiT.config_of(WeightsFile(Path("consolidated_ema.00-of-02.pth"), tensors), None)
    assert LargeDiT.config_of(file, None, heads=4)["net"]["input_size"] == 32  # 256 pixels if nothing else is said


def weights(tag, shapes):
    """Weights by the rule of the official runs, whose names seed them; with it other sizes need no file."""
    tensors = {}
    for name, shape in shapes.items():
        z = np.random.RandomState(crc32(f"{tag}/{name}".encode())).standard_normal(shape)
        if name.endswith(".bias"):
            z *= 0.1
        elif len(shape) == 1:
            z = 1 + 0.2 * z
        else:
            z *= 0.5 if name.endswith("embedding_table.weight") else np.prod(shape[1:]) ** -0.5
        small = name.startswith("x_embedder.") or name.endswith(("attention.wo.weight", "feed_forward.w2.weight"))
        tensors[name] = torch.from_numpy(z.astype(np.float32)) * (0.05 if small else 1)
    return tensors


def test_the_rule_gives_the_golden_weights():
    expected = load_file(FILE)
    given = weights("ldit_c", {name: tensor.shape for name, tensor in expected.items()})
    assert all(torch.equal(given[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("tag", "config", "numbers", "guided"),
    [
        (
            "ldit_d",
            LargeDiTConfig(2, 64, 4, 10, 8, hidden=256, qk_norm=False),
            [0.594534, 1.360808, -0.622406, 0.302550, 1.392111, -0.828565, 0.203712, 2.330199],
            [6.238401, 0.814836, -0.644033, -0.394961, 1.391674, -0.293889, 1.201204, -0.774392, 2.658237],
        ),
        (
            "ldit_wide",
            LargeDiTConfig(1, 1152, 12, 10, 8, hidden=3072),
            [-1.450598, -1.890651, 0.101481, 2.455173, 0.142410, -0.958598, -1.152950, -0.237582],
            [-0.239236, -1.299265, 1.720090, 0.350900, -1.265271, -0.049482, -0.173788, 0.246253, -1.894397],
        ),
    ],
    ids=["queries not normalized", "condition narrower than the blocks"],
)
def test_other_sizes(tag, config, numbers, guided):
    """Some numbers of the official class's output in float32 (LLaMA2-Accessory 3777c43, Large-DiT-ImageNet)."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LargeDiTTransformer(config).state_dict().items()}
    file = WeightsFile(Path("weights.pth"), weights(tag, shapes))
    model = LargeDiT.from_official(file, None, heads=config.heads, image_size=64)
    assert model.net.config == config and config.condition_width == min(config.width, 1024)
    x = torch.from_numpy(np.random.RandomState(0).standard_normal((3, 4, 8, 8)).astype(np.float32))
    with torch.no_grad():
        out = model.net(x, torch.tensor([0, 250, 999]), torch.tensor([3, 9, 10]))
    close(out.flatten()[::199], torch.tensor(numbers), 5e-5)
    every_step = model.with_sampling(guidance=4.0, num_steps=1000)
    features = replay(every_step, DiTState(x[:1], torch.tensor([3]), Noise(0, [0])), 999 - 250).extracted.features
    close(features.flatten()[::61], torch.tensor(guided), 1e-4)


def test_a_fresh_network_gives_zero():
    fresh = LargeDiTTransformer(LargeDiTConfig(1, 1032, 2, 3, 4, hidden=8))
    with torch.no_grad():
        assert not fresh(torch.randn(2, 4, 4, 4), torch.tensor([0, 9]), torch.tensor([0, 3])).any()


def test_positions_turn_queries_with_the_place_of_a_token(model, golden):
    """Patches of another order give another image, not the same one in that order."""
    x, t, y = golden["fw_x"][:1], golden["fw_t"][1:2], golden["fw_y"][:1]
    with torch.no_grad():
        moved = model.net(x.roll(2, 3), t, y)
    assert (moved - golden["fw_out"][:1].roll(2, 3)).abs().max() > 0.1


def test_bfloat16_is_near(golden):
    short = bitlaw.load(FILE, tokenizer="none", dtype=torch.bfloat16)
    state = short.start(golden["fw_y"], Noise(0, range(3)))
    assert state.x_BCHW.dtype == torch.float32
    step = replay(short, state, 249)
    assert step.extracted.features.dtype == step.after.x_BCHW.dtype == torch.float32
    with torch.no_grad():
        out = short.net(golden["fw_x"], golden["fw_t"], golden["fw_y"])
    close(out, golden["fw_out"], 0.05 * golden["fw_out"].abs().max().item())  # two layers of 8-bit mantissas


def test_the_recipe_is_dit_s(model):
    assert model.recipes == {"paper": DiT.default_sampling}
    assert model.with_sampling(recipe="paper").sampling.guidance == 1.5
