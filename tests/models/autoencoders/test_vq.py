"""LDM's VQ autoencoder: both layouts, re-quantization, and telling it from the other tokenizers."""

from pathlib import Path

import pytest
import torch
from torch import nn

from bitlaw.models.autoencoders import (
    AUTOENCODERS,
    VQAutoencoder,
    autoencoder_config,
    open_autoencoder,
    restore_autoencoder,
)
from bitlaw.models.keymaps import taming_autoencoder, to_theirs
from bitlaw.models.official import WeightsFile, read_weights

DATA = Path(__file__).parents[2] / "data"


@pytest.fixture(scope="module")
def vq():
    from diffusers import VQModel

    torch.manual_seed(0)
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    model = VQModel(**levels, block_out_channels=(32, 32, 64), layers_per_block=2, num_vq_embeddings=64)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.5)
    return model.eval()


@pytest.fixture
def original(vq):
    return to_theirs(vq.state_dict(), taming_autoencoder(3, 2))


@pytest.fixture
def latents():
    return torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def test_the_first_stage_of_a_checkpoint(vq, original, latents):
    """Under LDM's names, with what training keeps beside it; decoding quantizes as diffusers does by default."""
    extra = {"loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1, 4, 1, 1)}
    autoencoder = open_autoencoder(WeightsFile(Path("model.ckpt"), original | extra, "first_stage_model"))
    assert isinstance(autoencoder, VQAutoencoder)
    assert (autoencoder.latent_channels, autoencoder.downsampling) == (3, 4)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(autoencoder.encode(images), vq.encode(images).latents)
        torch.testing.assert_close(autoencoder.decode(latents), vq.decode(latents).sample, atol=1e-5, rtol=1e-5)
    official = autoencoder.to_official()
    assert set(official) == set(original) and all(torch.equal(official[name], original[name]) for name in original)


def test_decoding_moves_latents_to_the_nearest_codes(vq, original, latents):
    autoencoder = open_autoencoder(WeightsFile(Path("model.ckpt"), original))
    codebook = original["quantize.embedding.weight"]
    vectors = latents.permute(0, 2, 3, 1).reshape(-1, 3)
    nearest = codebook[(vectors[:, None] - codebook).square().sum(-1).argmin(1)]
    quantized = nearest.view(3, 4, 4, 3).permute(0, 3, 1, 2)
    with torch.no_grad():
        images = autoencoder.decode(latents)
        torch.testing.assert_close(images, autoencoder.decode(quantized), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(images[1:2], autoencoder.decode(latents[1:2]), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(images, vq.decode(latents, force_not_quantize=True).sample, atol=1e-2)


def test_a_directory_of_diffusers(vq, latents, tmp_path):
    vq.save_pretrained(tmp_path / "vqvae")
    autoencoder = open_autoencoder(read_weights(tmp_path / "vqvae"))
    assert isinstance(autoencoder, VQAutoencoder) and set(autoencoder.to_official()) == set(vq.state_dict())
    again = restore_autoencoder(autoencoder_config(autoencoder), autoencoder.state_dict())
    with torch.no_grad():
        assert torch.equal(again.decode(latents), autoencoder.decode(latents))


def test_each_file_is_of_one_kind(original):
    files = {
        "vq": WeightsFile(Path("model.ckpt"), original),
        "multi-scale-vq": read_weights(DATA / "vae_small.fp16.safetensors"),
        "token-vq": read_weights(DATA / "llamagen_vq_ch32_f4.fp16.safetensors"),
    }
    for kind, file in files.items():
        assert [name for name, autoencoder in AUTOENCODERS.items() if autoencoder.recognizes(file)] == [kind]


def test_a_missing_tensor_is_named(original):
    del original["decoder.up.2.block.0.conv1.bias"]
    with pytest.raises(
        ValueError, match=r"model\.ckpt: VQ.*\n.*decoder\.up_blocks\.0\.resnets\.0\.conv1\.bias: missing"
    ):
        open_autoencoder(WeightsFile(Path("model.ckpt"), original))
