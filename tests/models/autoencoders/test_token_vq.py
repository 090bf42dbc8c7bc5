"""LlamaGen's tokenizers against the official ones: encode, quantize, decode, names and shapes."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from bitlaw.models.autoencoders import autoencoder_config, open_autoencoder, restore_autoencoder
from bitlaw.models.autoencoders.convolutional import sizes_of
from bitlaw.models.autoencoders.token_vq import USAGE, TokenVQ, modules_map
from bitlaw.models.keymaps import to_ours
from bitlaw.models.official import WeightsFile, read_weights
from bitlaw.models.parts.pixels import from_uint8, to_uint8

DATA = Path(__file__).parents[2] / "data"
FILE = DATA / "llamagen_vq_ch32_f4.fp16.safetensors"


@pytest.fixture(scope="module")
def golden():
    return {name: torch.from_numpy(array) for name, array in np.load(DATA / "llamagen_vq.npz").items()}


@pytest.fixture(scope="module")
def tokenizer():
    return open_autoencoder(read_weights(FILE))


def close(actual, expected, atol):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def test_encode(tokenizer, golden):
    x = from_uint8(golden["img_u8"])
    with torch.inference_mode():
        close(tokenizer.net.encoder(x), golden["enc_out"], 2e-4)  # of numbers up to 10
        close(tokenizer.encode(x), golden["z"], 5e-5)
        assert torch.equal(tokenizer.encode_to_tokens(x).flatten(), golden["indices"])
    assert golden["min_nn_gap"] > 1e-4  # so no token is a near tie


def test_codes_are_of_unit_length_where_they_are_used(tokenizer, golden):
    tokens = golden["indices"].view(2, 64)
    assert (tokenizer.net.quantize.embedding.weight.norm(dim=1) - 1).abs().max() > 0.1
    codes = tokenizer.embed(tokens)
    close(codes.norm(dim=1), torch.ones(2, 8, 8), 1e-6)
    close(codes, golden["codebook_entry"], 1e-6)
    close(codes, golden["quant"], 1e-6)
    # The losses of the tokenizer's training are those of unit vectors.
    z = F.normalize(golden["z"], dim=1)
    close(F.mse_loss(codes, z), golden["train_vq_loss"], 1e-6)
    close(0.25 * F.mse_loss(codes, z), golden["train_commit_loss"], 1e-6)


def test_codes_as_they_are_stored():
    plain = TokenVQ.from_official(read_weights(FILE))
    plain.unit_codes = False
    again = restore_autoencoder(autoencoder_config(plain), plain.state_dict())
    assert not again.unit_codes
    assert torch.equal(again.embed(torch.arange(4)[None])[0].flatten(1).T, again.net.quantize.embedding.weight[:4])
    latents = 3 * again.embed(torch.arange(4)[None])
    weight = again.net.quantize.embedding.weight
    nearest = torch.cdist(3 * weight[:4].double(), weight.double()).argmin(1)
    assert torch.equal(again.nearest(latents)[0], nearest)


def test_decode(tokenizer, golden):
    with torch.inference_mode():
        images = tokenizer.decode(tokenizer.embed(golden["indices"].view(2, 64)))
        close(images, golden["dec_from_code"], 1e-4)
        close(tokenizer.decode(golden["quant"]), golden["dec_from_quant"], 1e-4)
    assert images.abs().max() > 1  # nothing is clamped
    # Truncation makes a rounding of 1e-6 visible where a pixel is next to an integer, so a few may differ by one.
    assert (to_uint8(images).permute(0, 2, 3, 1).int() - golden["png_u8"].int()).abs().max() <= 1


def test_sizes_come_from_the_file(tokenizer):
    assert (tokenizer.downsampling, tokenizer.latent_channels, tokenizer.vocab_size) == (4, 8, 512)
    restored = restore_autoencoder(json.loads(json.dumps(autoencoder_config(tokenizer))), tokenizer.state_dict())
    tokens = torch.arange(64)[None]
    assert torch.equal(restored.decode(restored.embed(tokens)), tokenizer.decode(tokenizer.embed(tokens)))


def test_names_go_there_and_back(tokenizer):
    official, expected = tokenizer.to_official(), load_file(FILE)
    assert {name: tensor.shape for name, tensor in official.items()} == {k: v.shape for k, v in expected.items()}
    assert all(torch.equal(official[name], expected[name]) for name in expected if name != USAGE)


@pytest.mark.parametrize(("name", "num_tensors", "downsampling"), [("VQ-16", 343, 16), ("VQ-8", 299, 8)])
def test_official_keys_and_shapes_at_full_size(name, num_tensors, downsampling):
    with gzip.open(DATA / "llamagen_manifest.json.gz") as file:
        manifest = json.load(file)[name]
    with torch.device("meta"):
        official = {key: torch.empty(shape) for key, (shape, _) in manifest.items() if key != USAGE}
    assert len(official) == num_tensors and manifest[USAGE][0] == [65536]
    file = WeightsFile(Path(f"{name}.pt"), official)
    assert TokenVQ.recognizes(file)
    levels = file.count(r"encoder\.conv_blocks\.(\d+)\.")
    tensors = to_ours(official, modules_map(levels, 2))
    config = {**sizes_of(WeightsFile(file.path, tensors)), "num_vq_embeddings": 16384, "vq_embed_dim": 8}
    with torch.device("meta"):
        tokenizer = TokenVQ.from_config(config)
    assert {key: v.shape for key, v in tokenizer.net.state_dict().items()} == {k: v.shape for k, v in tensors.items()}
    assert tokenizer.downsampling == downsampling
    assert {key: list(v.shape) for key, v in tokenizer.to_official().items()} == {k: v[0] for k, v in manifest.items()}


def test_a_tensor_that_is_missing_or_too_much_is_named():
    tensors = load_file(FILE)
    tensors["decoder.conv_blocks.0.res.7.norm1.weight"] = tensors.pop("decoder.norm_out.weight")
    with pytest.raises(ValueError) as error:
        open_autoencoder(WeightsFile(FILE, tensors))
    assert "decoder.conv_norm_out.weight: missing" in str(error.value)
    assert "decoder.conv_blocks.0.res.7.norm1.weight: unknown" in str(error.value)
