"""MAR against the official one: pieces, head, losses, gradients, whole generations, keys at full size; loading."""

import gzip
import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import bitlaw
from bitlaw.models.generator import Noise, replay, rollout
from bitlaw.models.mar import MAR, PROCESS, MARSampling, hidden_counts, mask_ratio
from bitlaw.models.networks.mar import MARConfig, MARTransformer, take, visible_positions
from bitlaw.models.official import WeightsFile, read_weights
from bitlaw.models.parts.pixels import to_uint8

DATA = Path(__file__).parents[1] / "data"
CONFIG = MARConfig(48, 2, 2, 4, 2, 56, num_classes=10, side=4, buffer_size=5)
RUNS = {
    "g_lin": {"num_steps": 4, "guidance": 3.0},
    "g_const": {"num_steps": 3, "guidance": 2.0, "schedule": "constant", "temperature": 0.9},
    "g_nocfg": {"num_steps": 5, "guidance": 1.0, "temperature": 0.95},
    "g_uncond": {"num_steps": 3, "guidance": 1.0},
}


class Latents:
    """Stands for an autoencoder that leaves images, of 16 channels, as they are."""

    downsampling, latent_channels = 16, 16

    def encode(self, images_BCHW):
        return images_BCHW

    def decode(self, latent_Bchw):
        return latent_Bchw


class GivenNoise(Noise):
    """Orders and noise of a recorded run; of each step's rows the first are kept, which are the conditional ones."""

    def __init__(self, golden, run):
        self.orders, self.golden, self.run = golden[f"{run}_orders"], golden, run
        super().__init__(0, range(len(self.orders)))

    def permutation(self, step, length):
        assert step == 0
        return self.orders

    def normal(self, step, shape):
        num_steps, tokens, channels = shape
        start, steps = (self.golden[f"{self.run}_s{step - 1}_{name}_noise"] for name in ("init", "step"))
        rows = len(self) * tokens
        recorded = torch.cat([start[None, :rows], steps[: num_steps - 1, :rows]])
        return recorded.view(num_steps, len(self), tokens, channels).transpose(0, 1)


@pytest.fixture(scope="module")
def golden():
    arrays = np.load(DATA / "mar_a.npz")
    return {k: torch.from_numpy(v) if v.dtype.kind in "fi" else v for k, v in arrays.items()}


@pytest.fixture
def model():
    return bitlaw.load(DATA / "mar_a.safetensors", tokenizer="none")


def close(actual, expected, atol):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def close_to_max(actual, expected, rtol):
    close(actual, expected, rtol * expected.abs().max().item())


# ---- parity -----------------------------------------------------------------------------------------


def test_latents_and_tokens(model, golden):
    assert torch.equal(model.net.patchify(golden["pc_latent"]), golden["pc_tokens"])
    assert torch.equal(model.net.unpatchify(golden["pc_tokens"]), golden["pc_latent"])


def test_features_of_a_patch_are_ordered_channel_row_column():
    net = MARTransformer(MARConfig(8, 1, 1, 1, 1, 8, side=2, latent_channels=2, patch_size=2))
    latent = torch.arange(32.0).view(1, 2, 4, 4)
    tokens = net.patchify(latent)
    assert tokens[0, 1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]  # the upper right patch of both channels
    assert torch.equal(net.unpatchify(tokens), latent)


def test_the_transformer_piece_by_piece(model, golden):
    net, seen = model.net, {}
    pieces = {f"enc_block{i}": block for i, block in enumerate(net.encoder_blocks)}
    pieces |= {f"dec_block{i}": block for i, block in enumerate(net.decoder_blocks)} | {"dec_embed": net.decoder_embed}
    pieces["enc_out"] = net.encoder_norm
    for name, module in pieces.items():
        module.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: output}))
    mask = golden["pc_mask"]
    expected_mask = torch.zeros_like(mask).scatter(1, golden["pc_orders"][:, : golden["pc_num_masked"]], 1.0)
    assert torch.equal(mask, expected_mask)
    with torch.no_grad():
        class_BD = net.class_vectors(model.check_labels(golden["pc_class"]))
        assert torch.equal(class_BD, golden["pc_class_embedding"])
        everything = torch.arange(16).expand(3, -1)
        close(net.embed(golden["pc_tokens"], everything, class_BD), golden["pc_mid_enc_in_ln"], 5e-5)
        z = net(golden["pc_tokens"], mask, class_BD)
        for name, output in seen.items():
            close(output, golden["pc_enc_out" if name == "enc_out" else f"pc_mid_{name}"], 5e-5)
        close(z, golden["pc_z"], 5e-5)
        asked = torch.tensor([[3, 0], [7, 15], [2, 9]])  # the last block at two positions only
        visible = visible_positions(mask, 16 - int(golden["pc_num_masked"]))
        close(net.run(golden["pc_tokens"], visible, class_BD, asked), take(golden["pc_z"], asked), 5e-5)


def test_hidden_tokens_do_not_matter(model, golden):
    with torch.no_grad():
        class_BD = golden["pc_class_embedding"]
        other = torch.where(golden["pc_mask"][:, :, None] == 1, 1e3, golden["pc_tokens"])
        close(model.net(other, golden["pc_mask"], class_BD), golden["pc_z"], 5e-5)


def test_head(model, golden):
    with torch.no_grad():
        close(model.net.head(golden["head_x"], golden["head_t"], golden["head_c"]), golden["head_out"], 5e-5)


def test_guided_head(model, golden):
    """The unconditional half has no tokens of its own; its variance is not used."""
    head, rows = model.net.head, 3
    for row in range(rows):
        timestep = golden["headcfg_t"][row].item()
        z = golden["headcfg_c"][[row, rows + row]]
        with torch.no_grad():
            (modulation,) = head.modulations_of_steps(z, [timestep])
            cond, uncond = head.run(golden["headcfg_x"][row : row + 1], modulation).chunk(2)
        expected = golden["headcfg_out_s3.0"]
        noise = uncond[:, :16] + 3 * (cond[:, :16] - uncond[:, :16])
        close(noise, expected[row : row + 1, :16], 1e-4)
        close(cond[:, 16:], expected[row : row + 1, 16:], 1e-4)
        close(uncond[:, 16:], expected[rows + row : rows + row + 1, 16:], 1e-4)


@pytest.mark.parametrize(
    ("run", "guidance", "temperature"), [("hs_nocfg", 1, 1), ("hs_temp095", 1, 0.95), ("hs_cfg2.5", 2.5, 1)]
)
def test_sampling_with_the_head(model, golden, run, guidance, temperature):
    assert model.spaced.timesteps == golden["gen_timesteps"].tolist()
    start, steps, out = (golden[f"{run}_{name}"] for name in ("init_noise", "step_noise", "out"))
    noise = torch.cat([start[None], steps[:-1, : len(start)]])
    with torch.no_grad():
        tokens = model.with_sampling(temperature=temperature).draw_tokens(golden[f"{run}_c"], noise, guidance)
    close_to_max(tokens, out[: len(start)], 2e-5)


def test_sampling_with_the_head_on_evenly_spaced_steps(model, golden):
    model = model.with_sampling(head_steps="8")
    assert model.spaced.timesteps == golden["hs8_timesteps"].tolist()
    noise = torch.cat([golden["hs8_cfg2.5_init_noise"][None], golden["hs8_cfg2.5_step_noise"][:-1, :2]])
    with torch.no_grad():
        tokens = model.draw_tokens(golden["hs8_cfg2.5_c"], noise, 2.5)
    close_to_max(tokens, golden["hs8_cfg2.5_out"][:2], 2e-5)


def test_modulations_do_not_depend_on_how_many_are_computed_together(model, golden, monkeypatch):
    noise = torch.cat([golden["hs_cfg2.5_init_noise"][None], golden["hs_cfg2.5_step_noise"][:-1, :2]])
    monkeypatch.setattr("bitlaw.models.networks.mar._ROWS_AT_ONCE", 12)  # 4 rows: three steps, three, three, one
    sizes = []
    model.net.head.final_layer.adaLN_modulation[1].register_forward_pre_hook(
        lambda module, inputs: sizes.append(len(inputs[0]))
    )
    with torch.no_grad():
        tokens = model.draw_tokens(golden["hs_cfg2.5_c"], noise, 2.5)
    assert sizes == [3, 3, 3, 1]
    close_to_max(tokens, golden["hs_cfg2.5_out"][:2], 2e-5)


def test_single_steps_of_the_hundred_step_process(model, golden):
    process = PROCESS.respaced("100")
    assert process.timesteps == golden["ps_timesteps"].tolist()
    x, c, noise, index = (golden[f"ps_{name}"] for name in ("x", "c", "noise", "index"))
    with torch.no_grad():
        output = model.net.head(x, golden["ps_timesteps"][index], c)
    posterior = process.posterior(x, output, index)
    rows = range(len(index))

    def rows_close(actual, name):
        for row in rows:  # rows differ by their step's amplification, up to 2e4
            close_to_max(actual[row], golden[name][row], 1e-5)

    rows_close(posterior.mean_BCHW, "ps_mean")
    rows_close(posterior.log_variance_BCHW, "ps_log_variance")
    rows_close(posterior.x0_BCHW, "ps_pred_xstart")
    for temperature in (1.0, 0.9):
        steps = [
            process.ddpm_step(x[i : i + 1], output[i : i + 1], k, noise[i : i + 1], temperature=temperature)
            for i, k in enumerate(index.tolist())
        ]
        rows_close(torch.cat(steps), f"ps_out_t{temperature}")


def test_losses_of_the_head(model, golden):
    z, x0 = (golden[name].flatten(0, 1).repeat(2, 1) for name in ("pc_z", "pc_tokens"))
    mask = golden["pc_mask"].flatten().repeat(2)
    with torch.no_grad():
        losses = model.token_losses(z, x0, golden["loss_t"], golden["loss_noise"])
    torch.testing.assert_close(losses.mse_B, golden["loss_per_token_mse"], rtol=1e-4, atol=0)
    later = golden["loss_t"] > 1  # at the first two timesteps the bound is a difference in the tails
    torch.testing.assert_close(losses.vb_B[later], golden["loss_per_token_vb"][later], rtol=1e-3, atol=0)
    torch.testing.assert_close(losses.vb_B, golden["loss_per_token_vb"], rtol=2e-2, atol=0)
    total = losses.mse_B + losses.vb_B
    torch.testing.assert_close(total[later], golden["loss_per_token_loss"][later], rtol=1e-3, atol=0)
    torch.testing.assert_close((total * mask).sum() / mask.sum(), golden["loss_total"], rtol=1e-4, atol=0)


def test_gradients_of_a_training_step(model, golden):
    net = model.net.requires_grad_(True)
    z = net(golden["pc_tokens"], golden["pc_mask"], net.class_vectors(model.check_labels(golden["pc_class"])))
    x0 = golden["pc_tokens"].flatten(0, 1).repeat(2, 1)
    losses = model.token_losses(z.flatten(0, 1).repeat(2, 1), x0, golden["lg_t"], golden["loss_noise"])
    mask = golden["pc_mask"].flatten().repeat(2)
    total = ((losses.mse_B + losses.vb_B) * mask).sum() / mask.sum()
    torch.testing.assert_close(total, golden["lg_total"], rtol=1e-4, atol=0)
    total.backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    assert set(gradients) == set(golden["lg_grad_keys"])
    for name, norm in zip(golden["lg_grad_keys"], golden["lg_grad_l2"], strict=True):
        assert gradients[name].norm().item() == pytest.approx(norm.item(), rel=1e-3), name


@pytest.mark.parametrize("run", RUNS)
def test_generations(model, golden, run):
    model = model.with_sampling(**RUNS[run])
    halves = 1 if model.sampling.guidance == 1 else 2
    labels = model.check_labels(golden[f"{run}_labels"])
    for step in rollout(model, labels, GivenNoise(golden, run)):
        k = step.index
        assert torch.equal(step.before.hidden_BL.float(), golden[f"{run}_mask_before"][k])
        num_tokens = step.extracted.features.shape[:2].numel()
        assert num_tokens == halves * golden[f"{run}_num_pred"][k]  # the file has half of a guided batch's
        assert model.guidance_at(k) == pytest.approx(golden[f"{run}_cfg_iter"][k].item(), rel=1e-6)
        z = torch.cat([half.flatten(0, 1) for half in step.extracted.features.chunk(halves, -1)])
        close(z, golden[f"{run}_s{k}_z"], 5e-5)
        drawn = take(step.after.tokens_BLC, model.positions(step.before, k)).flatten(0, 1)
        close_to_max(drawn, golden[f"{run}_s{k}_tokens"][: len(drawn)], 5e-5)
    assert not step.after.hidden_BL.any()
    close_to_max(model.net.unpatchify(step.after.tokens_BLC), golden[f"{run}_latent"], 5e-5)


# ---- schedule, noise, losses --------------------------------------------------------------------------


def test_hidden_counts_of_the_published_evaluation():
    assert hidden_counts(256, 256) == tuple(range(256, -1, -1))  # one token a step
    counts = hidden_counts(256, 64)
    assert counts[:14] == tuple(range(256, 242, -1))  # the cosine would leave more than all but one
    assert {a - b for a, b in pairwise(counts[13:])} <= set(range(1, 8))
    assert counts[-2:] == (math.floor(256 * math.cos(math.pi / 2 * 63 / 64)), 0)
    assert hidden_counts(256, 1) == (256, 0)


@pytest.mark.parametrize("num_steps", [0, 17])
def test_more_steps_than_tokens_are_refused(model, num_steps):
    with pytest.raises(ValueError, match=f"num_steps {num_steps}"):
        model.with_sampling(num_steps=num_steps).start(torch.tensor([0]), Noise(0, [0]))


def test_orders_are_of_each_image_and_revealed_from_their_end(model):
    model = model.with_sampling(num_steps=4)
    state = model.start(torch.tensor([1, 2]), Noise(3, [5, 6]))
    assert state.orders_BL.sort(1).values.tolist() == [list(range(16))] * 2
    assert not torch.equal(*state.orders_BL)
    assert torch.equal(model.start(torch.tensor([2]), Noise(3, [6])).orders_BL[0], state.orders_BL[1])
    revealed = torch.cat([model.positions(state, step).flip(1) for step in range(4)], 1)
    for before, after in pairwise(model.hidden_counts):
        step = revealed[:, 16 - before : 16 - after]
        assert torch.equal(step.sort(1).values, state.orders_BL[:, after:before].sort(1).values)


def test_unconditional_images_are_those_of_the_vector_for_no_class(model):
    model = model.with_sampling(num_steps=2)
    with torch.no_grad():
        vectors = model.net.class_vectors(model.check_labels([3, -1]))
    assert torch.equal(vectors[1], model.net.fake_latent[0])
    assert torch.equal(vectors[0], model.net.class_emb.weight[3])
    state = model.start(model.check_labels([-1]), Noise(0, [0]))
    z_cond, z_uncond = replay(model.with_sampling(guidance=3.0), state, 0).extracted.features.chunk(2, -1)
    assert torch.equal(z_cond, z_uncond)


def test_the_unconditional_half_sees_no_tokens_of_its_own(model):
    """One embedding of the visible tokens, and one of the noisy ones, serve both halves."""
    rows = {"z_proj": [], "input_proj": []}
    for name, module in (("z_proj", model.net.z_proj), ("input_proj", model.net.head.input_proj)):
        module.register_forward_pre_hook(lambda module, inputs, name=name: rows[name].append(inputs[0][..., 0].numel()))
    list(rollout(model.with_sampling(num_steps=3, guidance=2.0), torch.tensor([1, 2]), Noise(0, [0, 1])))
    assert rows["z_proj"] == [2 * 3, 2 * 8]  # nothing is visible at first
    assert rows["input_proj"] == [2 * 3] * 10 + [2 * 5] * 10 + [2 * 8] * 10


def test_loss_is_the_training_loss_of_a_deterministic_mask():
    file = read_weights(DATA / "mar_a.safetensors")
    model = MAR.from_official(file, Latents())
    images = torch.randint(256, (12, 16, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels, hidden = model.check_labels([0, 9, -1, 3] * 3), []
    model.net.decoder_embed.register_forward_pre_hook(lambda module, inputs: hidden.append(21 - inputs[0].shape[1]))
    with torch.no_grad():
        losses = model.loss(images, labels, Noise(1, range(12)))
        first = model.loss(images[:3], labels[:3], Noise(1, range(3)))
        other = model.loss(images, labels, Noise(2, range(12)))
    assert losses.shape == (12,) and not torch.allclose(losses, other)
    torch.testing.assert_close(first, losses[:3], rtol=1e-4, atol=0)
    assert set(hidden) <= set(range(math.ceil(0.7 * 16), 17)) and len(set(hidden)) > 2

    # The first image by hand.
    noise = Noise(1, [0])
    count = math.ceil(16 * mask_ratio(noise.uniform(1, (1,)).item()))
    mask = torch.zeros(1, 16).scatter(1, noise.permutation(0, 16)[:, :count], 1.0)
    tokens = model.net.patchify((images[:1] / 127.5 - 1) * 0.2325)
    with torch.no_grad():
        z = model.net(tokens, mask, model.net.class_vectors(labels[:1]))
        t = (noise.uniform(2, (16,)) * 1000).long().flatten()
        by_token = model.token_losses(z[0], tokens[0], t, noise.normal(3, (16, 16))[0])
    expected = ((by_token.mse_B + by_token.vb_B) * mask[0]).sum() / mask.sum()
    torch.testing.assert_close(losses[0], expected, rtol=1e-4, atol=0)


def test_mask_ratios_follow_the_truncated_normal():
    from scipy.stats import kstest, truncnorm

    ratios = [mask_ratio(u) for u in np.linspace(0, 1, 2001)[:-1]]
    assert ratios[0] == 0.7 and max(ratios) <= 1.0
    assert kstest(ratios, truncnorm(-1.2, 0, loc=1.0, scale=0.25).cdf).statistic < 1e-3


def test_images_are_rounded_half_to_even():
    halves = torch.tensor([0.5, 1.5, 2.5, 253.5, 254.5, -3.0, 300.0])
    expected = np.round(np.clip(((halves / 127.5 - 1 + 1) / 2 * 255).numpy(), 0, 255))
    assert torch.equal(to_uint8(halves / 127.5 - 1, "half-even"), torch.from_numpy(expected).to(torch.uint8))
    exact = torch.tensor([-1 + 1 / 255, 0.0, 1.0])  # 0.5, 127.5 and 255 out of 255
    assert to_uint8(exact, "half-even").tolist()[1:] == [128, 255]
    assert to_uint8(torch.tensor([1 / 255]), "half-even").item() == 128  # 128.0


# ---- checkpoints --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sizes", "num_linears", "guidance"),
    [
        ("mar_base", (768, 12, 12, 12, 6, 1024), 122, 2.9),
        ("mar_large", (1024, 16, 16, 16, 8, 1280), 160, 3.0),
        ("mar_huge", (1280, 20, 20, 16, 12, 1536), 204, 3.2),
    ],
)
def test_official_keys_and_shapes_at_full_size(name, sizes, num_linears, guidance):
    with gzip.open(DATA / "mar_manifest.json.gz") as file:
        manifest = {key: shape for key, (shape, _) in json.load(file)[name].items()}
    released = WeightsFile(Path("x.pth"), {key: torch.empty(shape, device="meta") for key, shape in manifest.items()})
    assert MAR.recognizes(released)
    config = MAR.config_of(released, None)
    assert MARConfig(**config["net"]) == MARConfig(*sizes)
    with torch.device("meta"):
        net = MARTransformer(MARConfig(*sizes))
    assert {key: list(tensor.shape) for key, tensor in net.state_dict().items()} == manifest
    model = MAR(net, None)
    assert model.recipes["paper"] == model.sampling == MARSampling(guidance, "linear", 256, "100", 1.0)
    assert model.image_size == 256 and len(model.sites()) == num_linears


def test_uses_are_counted_over_the_schedule():
    """MAR-B at the published settings: the multiplications that the specification counts, less what is saved."""
    with torch.device("meta"):
        model = MAR(MARTransformer(MARConfig(768, 12, 12, 12, 6, 1024)), None)
    uses = {site.name: site.uses for site in model.sites()}
    visible = sum(range(256))
    assert uses["z_proj"] == visible
    assert uses["encoder_blocks.3.attn.qkv"] == uses["decoder_embed"] == visible + 256 * 64
    assert uses["decoder_blocks.11.attn.qkv"] == uses["decoder_blocks.10.mlp.fc1"] == 256 * 320
    assert uses["decoder_blocks.11.attn.proj"] == uses["decoder_blocks.11.mlp.fc2"] == 256
    assert uses["diffloss.net.cond_embed"] == 256
    assert uses["diffloss.net.time_embed.mlp.0"] == 256 * 100
    assert uses["diffloss.net.res_blocks.5.mlp.2"] == uses["diffloss.net.final_layer.linear"] == 256 * 100


def test_options_metadata_and_releases_give_what_shapes_do_not(tmp_path):
    tensors = load_file(DATA / "mar_a.safetensors")

    def heads_of(metadata, **options):
        return MAR.config_of(WeightsFile(Path("x.pth"), tensors, metadata=metadata), None, **options)["net"]["heads"]

    assert heads_of({"encoder_num_heads": 4}) == 4
    assert heads_of({"encoder_num_heads": 4}, heads=6) == heads_of({}, heads=6) == 6
    with pytest.raises(ValueError, match=r"width 48 is of no release.*give heads="):
        heads_of({})
    with pytest.raises(ValueError, match="option of MAR"):
        heads_of({}, depth=3)


def test_patch_size_follows_from_the_autoencoder_or_is_given():
    tensors = load_file(DATA / "mar_a.safetensors")

    class KL8(Latents):
        downsampling, latent_channels = 8, 4

    def of(autoencoder, metadata=None, **options):
        file = WeightsFile(Path("x.pth"), tensors, metadata=metadata or {})
        config = MAR.config_of(file, autoencoder, heads=4, **options)["net"]
        return config["patch_size"], config["latent_channels"]

    assert of(None) == of(Latents()) == (1, 16)
    assert of(KL8()) == of(None, patch_size=2) == of(None, {"patch_size": 2}) == (2, 4)
    model = MAR.from_official(WeightsFile(Path("x.pth"), tensors), KL8(), heads=4)
    assert model.image_size == 64
    assert model.net.unpatchify(torch.zeros(1, 16, 16)).shape == (1, 4, 8, 8)
    with pytest.raises(ValueError, match="16 channels do not go with an autoencoder of 16 channels and patch_size 2"):
        of(Latents(), patch_size=2)
    with pytest.raises(ValueError, match="patch_size 3 does not go"):
        of(None, patch_size=3)


def test_an_autoencoder_of_other_channels_is_refused():
    class Three(Latents):
        latent_channels = 3

    file = read_weights(DATA / "mar_a.safetensors")
    with pytest.raises(ValueError, match=r"mar_a\.safetensors: tokens of 16 .* an autoencoder of 3"):
        MAR.from_official(file, Three())
    with pytest.raises(ValueError, match="mar takes 16 latent channels, its autoencoder has 3"):
        MAR(MARTransformer(CONFIG), Three())


def test_averaged_weights_are_loaded_from_a_training_checkpoint(tmp_path):
    tensors = load_file(DATA / "mar_a.safetensors")
    raw = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    content = {"model": raw, "model_ema": tensors, "epoch": 3, "optimizer": {"lr": 0.1}}
    torch.save(content, tmp_path / "checkpoint-last.pth")
    model = bitlaw.load(tmp_path / "checkpoint-last.pth", tokenizer="none", heads=4)
    assert model.net.config == CONFIG and model.sampling.num_steps == 16
    for name, tensor in model.to_official().items():
        assert torch.equal(tensor, tensors[name]), name


def test_a_missing_autoencoder_is_said_with_its_name(tmp_path):
    with pytest.raises(ValueError, match=r"expected kl16\.ckpt or .* beside it"):
        bitlaw.load(DATA / "mar_a.safetensors")
    model = bitlaw.load(DATA / "mar_a.safetensors", tokenizer="none", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"loaded without its autoencoder \(kl16\.ckpt\)"):
        model.generate([1])


def test_a_bfloat16_model_is_near_the_float32_one(model, golden):
    half = bitlaw.load(DATA / "mar_a.safetensors", tokenizer="none", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    run = "g_lin"
    labels = model.check_labels(golden[f"{run}_labels"])
    for step in rollout(half.with_sampling(**RUNS[run]), labels, GivenNoise(golden, run)):
        exact = replay(model.with_sampling(**RUNS[run]), step.before, step.index)
        assert step.extracted.features.dtype == step.after.tokens_BLC.dtype == torch.float32
        # bfloat16 rounds to 1 in 256; blocks add such errors up
        close_to_max(step.extracted.features, exact.extracted.features, 0.05)
        close_to_max(step.after.tokens_BLC, exact.after.tokens_BLC, 0.2)


def test_load_generate_quantize_save_load_generate(tmp_path):
    """A random checkpoint under official keys and wrappers, its autoencoder beside it."""
    from diffusers import AutoencoderKL

    from bitlaw.models.autoencoders import KLAutoencoder

    torch.manual_seed(0)
    net = MARTransformer(MARConfig(32, 2, 2, 4, 2, 24, num_classes=5, side=2, latent_channels=4, buffer_size=3))
    tensors = {name: torch.randn(p.shape) * p[:1].numel() ** -0.5 for name, p in net.state_dict().items()}
    torch.save({"model": {}, "model_ema": tensors, "epoch": 1}, tmp_path / "mar.pth")
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
    )
    torch.save({"model": KLAutoencoder(vae, original_names=True).to_official()}, tmp_path / "kl16.ckpt")
    model = bitlaw.load(tmp_path / "mar.pth", heads=4).with_sampling(head_steps="ddim4")
    images = model.generate([0, 4, -1], seed=1)
    assert images.shape == (3, 3, 4, 4) and len(images.unique()) > 3
    quantized = bitlaw.quantize(model, "W4A8", protect="none")
    expected = quantized.generate([0, 4, -1], seed=1)
    quantized.save(tmp_path / "small")
    again = bitlaw.load(tmp_path / "small")
    assert again.sampling == model.sampling
    assert torch.equal(again.generate([0, 4, -1], seed=1), expected)
    decoded = again.to_official()
    assert set(decoded) == set(tensors)
    assert not torch.equal(decoded["decoder_embed.weight"], tensors["decoder_embed.weight"])


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: MARConfig(30, 1, 1, 4, 1, 8), "width"),
        (lambda: MARConfig(32, 1, 0, 4, 1, 8), "a block or more"),
        (lambda: MARSampling(schedule="cosine"), "linear or constant"),
        (lambda: MARSampling(temperature=-1.0), "temperature"),
        (lambda: MARSampling(num_steps=0), "num_steps"),
        (lambda: MARSampling(head_steps="fast"), "respacing 'fast'"),
        (lambda: MARSampling(head_steps="1"), "at least two steps"),
    ],
)
def test_impossible_settings_are_refused(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it()


def test_head_steps_may_be_a_number():
    assert MARSampling(head_steps=50).head_steps == "50"
    assert MARSampling(head_steps="").head_steps == ""  # all of them
