"""KL autoencoders: the keys of MAR's KL-16, original and diffusers' layouts, and what is refused."""

import gzip
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitlaw.models.autoencoders import KLAutoencoder, autoencoder_config, open_autoencoder, restore_autoencoder
from bitlaw.models.autoencoders.convolutional import diffusers_names, sizes_of
from bitlaw.models.official import WeightsFile, read_weights

DATA = Path(__file__).parents[2] / "data"


class Plain:
    """A KL autoencoder written down from its state dict, step by step: an oracle that shares nothing with diffusers.

    As in the specification of KL-16: GroupNorm of 32 groups and eps 1e-6, x sigmoid(x), shortcuts of 1 x 1, zeros
    padded at right and bottom before a stride, attention of one head where the file has it.
    """

    def __init__(self, tensors):
        self.tensors = tensors

    def has(self, name):
        return f"{name}.weight" in self.tensors

    def conv(self, x, name, **how):
        weight = self.tensors[f"{name}.weight"]
        return F.conv2d(x, weight, self.tensors[f"{name}.bias"], **({"padding": weight.shape[-1] // 2} | how))

    def norm(self, x, name):
        return F.group_norm(x, 32, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], eps=1e-6)

    def swish_conv(self, x, norm, conv):
        x = self.norm(x, norm)
        return self.conv(x * torch.sigmoid(x), conv)

    def resnet(self, x, name):
        y = self.swish_conv(x, f"{name}.norm1", f"{name}.conv1")
        y = self.swish_conv(y, f"{name}.norm2", f"{name}.conv2")
        return (self.conv(x, f"{name}.nin_shortcut") if self.has(f"{name}.nin_shortcut") else x) + y

    def attention(self, x, name):
        if not self.has(f"{name}.q"):
            return x
        h = self.norm(x, f"{name}.norm")
        q, k, v = (self.conv(h, f"{name}.{part}").flatten(2) for part in "qkv")
        weights = (q.transpose(1, 2) @ k * x.shape[1] ** -0.5).softmax(-1)
        return x + self.conv((v @ weights.transpose(1, 2)).view_as(x), f"{name}.proj_out")

    def middle(self, x, half):
        x = self.attention(self.resnet(x, f"{half}.mid.block_1"), f"{half}.mid.attn_1")
        return self.resnet(x, f"{half}.mid.block_2")

    def moments(self, x, num_levels, num_blocks):
        x = self.conv(x, "encoder.conv_in")
        for level in range(num_levels):
            for block in range(num_blocks):
                x = self.resnet(x, f"encoder.down.{level}.block.{block}")
                x = self.attention(x, f"encoder.down.{level}.attn.{block}")
            if level < num_levels - 1:
                x = self.conv(F.pad(x, (0, 1, 0, 1)), f"encoder.down.{level}.downsample.conv", stride=2, padding=0)
        x = self.swish_conv(self.middle(x, "encoder"), "encoder.norm_out", "encoder.conv_out")
        return self.conv(x, "quant_conv")

    def decode(self, z, num_levels, num_blocks):
        x = self.middle(self.conv(self.conv(z, "post_quant_conv"), "decoder.conv_in"), "decoder")
        for level in reversed(range(num_levels)):
            for block in range(num_blocks + 1):
                x = self.resnet(x, f"decoder.up.{level}.block.{block}")
                x = self.attention(x, f"decoder.up.{level}.attn.{block}")
            if level:
                x = self.conv(F.interpolate(x, scale_factor=2.0), f"decoder.up.{level}.upsample.conv")
        return self.swish_conv(x, "decoder.norm_out", "decoder.conv_out")


def manifest():
    with gzip.open(DATA / "mar_manifest.json.gz") as file:
        return {key: tuple(shape) for key, (shape, _) in json.load(file)["kl16"].items()}


def small_kl16():
    """Random weights under KL-16's keys, of 32, 64 and 96 channels instead of 128, 256 and 512."""
    widths = {128: 32, 256: 64, 512: 96}
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in manifest().items():
        x = torch.randn([widths.get(size, size) for size in shape], generator=generator)
        scale = 0.1 if name.endswith("bias") else x[0].numel() ** -0.5
        tensors[name] = x * scale if len(shape) > 1 or name.endswith("bias") else 1 + 0.2 * x
    return tensors


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def close(actual, expected, atol=5e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def test_keys_and_sizes_of_kl16():
    shapes = manifest()
    file = WeightsFile(Path("kl16.ckpt"), {name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    assert KLAutoencoder.recognizes(file)
    assert sizes_of(WeightsFile(file.path, diffusers_names(file)[0])) == {
        "down_block_types": ("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",) * 5,  # attention in the decoder's middle only
        "block_out_channels": (128, 128, 256, 256, 512),
        "layers_per_block": 2,
        "latent_channels": 16,
        "norm_num_groups": 32,
        "mid_block_add_attention": True,
    }
    with torch.device("meta"):
        autoencoder = KLAutoencoder.from_config(
            {"original_names": True, **sizes_of(WeightsFile(file.path, diffusers_names(file)[0]))}
        )
    assert {name: tuple(tensor.shape) for name, tensor in autoencoder.to_official().items()} == shapes
    assert sum(p.numel() for p in autoencoder.parameters()) == 66_456_019
    assert (autoencoder.latent_channels, autoencoder.downsampling) == (16, 16)


def test_kl16_from_its_file(images, tmp_path):
    """Under the key that its release has, with a tensor of the training loss, which is passed over."""
    tensors = small_kl16()
    torch.save({"model": tensors | {"loss.logvar": torch.zeros(())}}, tmp_path / "kl16.ckpt")
    autoencoder = open_autoencoder(read_weights(tmp_path / "kl16.ckpt"))
    plain = Plain(tensors)
    latent = torch.randn(2, 16, 2, 2, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        mean, log_variance = plain.moments(images, 5, 2).chunk(2, 1)
        close(torch.cat(autoencoder.distribution(images), 1), torch.cat([mean, log_variance.clamp(-30, 20)], 1))
        close(autoencoder.encode(images), mean)
        decoded = autoencoder.decode(latent)
        close(decoded, plain.decode(latent, 5, 2))
    assert decoded.shape == (2, 3, 32, 32)
    official = autoencoder.to_official()
    assert set(official) == set(tensors) and all(torch.equal(official[name], tensors[name]) for name in tensors)
    again = restore_autoencoder(autoencoder_config(autoencoder), autoencoder.state_dict())
    with torch.no_grad():
        assert torch.equal(again.decode(latent), decoded)


def test_a_missing_tensor_is_named(tmp_path):
    tensors = small_kl16()
    del tensors["decoder.up.3.block.1.conv2.bias"]
    torch.save({"model": tensors}, tmp_path / "kl16.ckpt")
    with pytest.raises(
        ValueError, match=r"kl16\.ckpt: KL autoencoder.*\n.*decoder\.up_blocks\.1\.resnets\.1\.conv2\.bias"
    ):
        open_autoencoder(read_weights(tmp_path / "kl16.ckpt"))


@pytest.fixture
def stable_diffusion(tmp_path):
    """An autoencoder of Stable Diffusion's kind, as diffusers saves it; normalisations in groups of another number."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=4,
    )
    for parameter in vae.parameters():
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.5)
    vae.save_pretrained(tmp_path / "vae")
    return vae.eval(), tmp_path / "vae"


def test_a_directory_of_diffusers(stable_diffusion, images):
    vae, folder = stable_diffusion
    autoencoder = open_autoencoder(read_weights(folder))
    assert (autoencoder.latent_channels, autoencoder.downsampling) == (4, 8)
    with torch.no_grad():
        latent = vae.encode(images).latent_dist
        assert torch.equal(autoencoder.encode(images), latent.mean)
        assert torch.equal(autoencoder.decode(latent.mean), vae.decode(latent.mean).sample)
    assert set(autoencoder.to_official()) == set(vae.state_dict())


def test_names_of_attention_in_old_directories(stable_diffusion, images):
    """The releases of 2022, sd-vae-ft-ema among them, say query, key, value and proj_attn."""
    vae, folder = stable_diffusion
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in vae.state_dict().items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        tensors[name] = tensor
    assert sum("proj_attn" in name for name in tensors) == 4
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(tensors, folder / "diffusion_pytorch_model.bin")
    with torch.no_grad():
        close(open_autoencoder(read_weights(folder)).encode(images), vae.encode(images).latent_dist.mean, 0)
