"""The tokenizer against the official one: latents, tokens, reconstructions, keys at full size."""

import copy
import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bitlaw.models.autoencoders.multi_scale_vq import VQTokenizer, VQTokenizerConfig, phi_index
from bitlaw.models.official import WeightsFile
from bitlaw.models.parts.group_norm import GroupNorm
from bitlaw.models.storage import load_tensors

DATA = Path(__file__).parents[2] / "data"
TINY = VQTokenizerConfig(16, 4, 8, (1, 2), 1, (1, 2, 4), norm_groups=0, attention=False)


@pytest.fixture(scope="module")
def golden():
    return {name: torch.from_numpy(array) for name, array in np.load(DATA / "vae_6s.npz").items()}


@pytest.fixture(scope="module")
def official():
    config = VQTokenizerConfig(512, 32, 32, (1, 1, 1, 2, 2), 2, (1, 2, 3, 4, 5, 6))
    tokenizer = VQTokenizer(config).eval().requires_grad_(False)
    load_tensors(tokenizer, load_file(DATA / "vae_small.fp16.safetensors"), "tokenizer", ignore=("ema_vocab_hit_SV",))
    return tokenizer


def close(actual, expected, atol):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def test_encoding_is_the_official_one(official, golden):
    images = golden["img_u8"].float() * 2 / 255 - 1
    close(official.encoder(images), golden["enc_out"], 5e-5)
    latent = official.encode(images)
    close(latent, golden["f"], 5e-5)
    tokens = official.latent_to_tokens(latent)
    for stage in range(6):
        assert torch.equal(tokens.indices[stage], golden[f"idx_{stage}"])
        close(tokens.latents[stage], golden[f"fhat_{stage}"], 1e-5)
        close(official.phi_for_stage(stage)(golden["phi_in"]), golden["phi_out"][stage], 1e-5)
    close(official.teacher_forcing(tokens)[1], golden["var_input"], 1e-5)


def test_decoding_is_the_official_one(official, golden):
    latent = official.tokens_to_latent([golden[f"idx_{stage}"] for stage in range(6)])
    close(latent, golden["fhat_5"], 1e-5)
    close(official.decode(latent, clamp=False), golden["dec_preclamp"], 1e-4)
    assert official.decode(100 * latent).abs().max() <= 1 < official.decode(100 * latent, clamp=False).abs().max()


def test_tokens_are_told_apart_by_more_than_rounding(official, golden):
    """The golden's least distance between the nearest code and the next, and where it is."""
    tokens = official.latent_to_tokens(golden["f"])
    rest, gaps = golden["f"], []
    for stage, side in enumerate(official.config.patch_nums):
        vectors = (
            torch.nn.functional.interpolate(rest, size=(side, side), mode="area").permute(0, 2, 3, 1).flatten(0, 2)
        )
        distances = (vectors.double()[:, None] - official.quantize.embedding.weight.double()).square().sum(-1)
        nearest = distances.topk(2, largest=False)
        assert torch.equal(nearest.indices[:, 0], tokens.indices[stage].flatten())
        gaps.append((nearest.values[:, 1] - nearest.values[:, 0]).min().item())
        rest = golden["f"] - tokens.latents[stage]
    assert min(gaps) == pytest.approx(golden["min_nn_gap"].item(), rel=1e-3)


def test_group_norm_of_channels_last_maps_is_as_exact_as_of_others():
    """Torch's own loses four digits here, and with them tokens at 256 pixels."""
    torch.manual_seed(0)
    norm = GroupNorm(4, 8, eps=1e-6)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        x = torch.randn(2, 8, 128, 128) + 5 * torch.randn(1, 8, 1, 1) + 5
        expected = torch.nn.functional.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), 1e-6)
        for layout in (torch.channels_last, torch.contiguous_format):
            out = norm(x.contiguous(memory_format=layout))
            torch.testing.assert_close(out.double(), expected, atol=5e-6, rtol=0)  # of numbers up to 5
            assert out.is_contiguous(memory_format=layout)
    trained = norm(x.contiguous(memory_format=torch.channels_last))
    trained.square().sum().backward()
    assert norm.weight.grad is not None and norm.weight.grad.all()


def test_large_images_are_encoded_as_exactly_as_small_ones(official):
    """Against float64. The official tokenizer in float32 is 3e-6 off at 256 pixels, with deviations of 0.5."""
    images = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1
    exact = copy.deepcopy(official).double()
    with torch.inference_mode():
        close(official.encode(images).double(), exact.encode(images.double()), 3e-5)
        latent = torch.randn(1, 32, 16, 16, generator=torch.Generator().manual_seed(1)) * 0.5
        close(official.decode(latent).double(), exact.decode(latent.double()), 3e-5)


def test_sizes_are_read_from_the_file(official):
    tensors = load_file(DATA / "vae_small.fp16.safetensors")
    loaded = VQTokenizer.from_official(WeightsFile(Path("vae.pth"), tensors))
    assert loaded.config == replace(official.config, patch_nums=VQTokenizerConfig().patch_nums)  # no shape tells these
    assert loaded.to_official().keys() == tensors.keys() - {"quantize.ema_vocab_hit_SV"}
    fewer = {name: tensor for name, tensor in tensors.items() if "qresi_ls.3" not in name}
    assert VQTokenizer.from_official(WeightsFile(Path("vae.pth"), fewer)).config.num_phi == 3


@pytest.mark.parametrize(
    ("num_stages", "expected"),
    [
        (10, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),
        (14, [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]),
        (7, [0, 0, 1, 2, 2, 3, 3]),
        (6, [0, 0, 1, 2, 3, 3]),
        (4, [0, 1, 2, 3]),
    ],
)
def test_phi_of_every_stage(num_stages, expected):
    assert [phi_index(stage, num_stages, 4) for stage in range(num_stages)] == expected


def test_official_keys_and_shapes_at_full_size():
    with gzip.open(DATA / "var_manifest.json.gz") as file:
        manifest = json.load(file)["vae_ch160v4096z32"]
    with torch.device("meta"):
        ours = VQTokenizer(VQTokenizerConfig()).state_dict()
    expected = {name: shape for name, (shape, _) in manifest.items() if not name.endswith("ema_vocab_hit_SV")}
    assert {name: list(tensor.shape) for name, tensor in ours.items()} == expected


def test_small_configuration_has_neither_norms_nor_attention():
    tokenizer = VQTokenizer(TINY)
    assert not [name for name in tokenizer.state_dict() if "norm" in name or "attn" in name]
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    tokens = tokenizer.encode_to_tokens(images)
    assert [tuple(t.shape) for t in tokens.indices] == [(2, 1), (2, 4), (2, 16)]
    torch.testing.assert_close(tokenizer.tokens_to_latent(tokens.indices), tokens.latents[-1])
    assert tokenizer.decode(tokens.latents[-1]).shape == images.shape


def test_every_parameter_but_the_codebook_is_trained_by_reconstruction():
    tokenizer = VQTokenizer(TINY)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    latent = tokenizer.encode(images)
    quantized = tokenizer.latent_to_tokens(latent).latents[-1]
    tokenizer.decode(latent + quantized - latent.detach(), clamp=False).square().mean().backward()
    without = [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()]
    unused_phi = {f"quantize.quant_resi.qresi_ls.{j}" for j in range(4)} - {
        f"quantize.quant_resi.qresi_ls.{phi_index(s, 3, 4)}" for s in range(3)
    }
    assert {name.rsplit(".", 1)[0] for name in without} <= unused_phi


def test_nearest_takes_the_first_of_equals():
    tokenizer = VQTokenizer(TINY)
    with torch.no_grad():
        tokenizer.quantize.embedding.weight.zero_()[5:] = 1.0
    assert tokenizer.quantize.nearest(torch.tensor([[0.0] * 4, [1.0] * 4])).tolist() == [0, 5]


@pytest.mark.parametrize("wrong", [{"ch": 20}, {"patch_nums": (2, 1)}, {"patch_nums": (4,)}, {"num_phi": 1}])
def test_impossible_configurations_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        VQTokenizerConfig(**wrong)
