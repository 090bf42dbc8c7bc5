"""Latent diffusion: original checkpoints against a UNet written down from their keys, hub directories, guidance."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitlaw
from bitlaw.methods.quantize import quantize
from bitlaw.models.autoencoders import VQAutoencoder
from bitlaw.models.generator import Noise, replay, rollout
from bitlaw.models.keymaps import join_qkv, split_qkv, to_theirs
from bitlaw.models.ldm import LDM
from bitlaw.models.official import WeightsFile, read_weights


class Plain:
    """A UNet of LDM written down from its state dict: an oracle that shares nothing with diffusers.

    GroupNorm of 32 groups (eps 1e-5, 1e-6 before a spatial transformer), SiLU, the timestep's cosines before its sines,
    q, k and v of a head side by side, zeros all around before a stride.
    """

    def __init__(self, tensors, heads_of, num_levels, num_blocks):
        self.tensors, self.heads_of = tensors, heads_of
        self.num_levels, self.num_blocks = num_levels, num_blocks

    def has(self, name):
        return f"{name}.weight" in self.tensors

    def linear(self, x, name):
        weight = self.tensors[f"{name}.weight"]
        return F.linear(x, weight.flatten(1), self.tensors.get(f"{name}.bias"))

    def conv(self, x, name, stride=1):
        weight = self.tensors[f"{name}.weight"]
        return F.conv2d(x, weight, self.tensors[f"{name}.bias"], stride, weight.shape[-1] // 2)

    def norm(self, x, name, eps=1e-5):
        return F.group_norm(x, 32, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], eps)

    def layer_norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def resnet(self, x, emb, name, change=None):
        h = F.silu(self.norm(x, f"{name}.in_layers.0"))
        if change is not None:
            h, x = change(h), change(x)
        h = self.conv(h, f"{name}.in_layers.2")
        emb = self.linear(F.silu(emb), f"{name}.emb_layers.1")[:, :, None, None]
        if emb.shape[1] == 2 * h.shape[1]:
            scale, shift = emb.chunk(2, 1)
            h = self.norm(h, f"{name}.out_layers.0") * (1 + scale) + shift
        else:
            h = self.norm(h + emb, f"{name}.out_layers.0")
        h = self.conv(F.silu(h), f"{name}.out_layers.3")
        return h + (self.conv(x, f"{name}.skip_connection") if self.has(f"{name}.skip_connection") else x)

    def attention(self, x, name):
        """One head after another, each with its rows of the fused projection."""
        heads = self.heads_of(x.shape[1])
        width = x.shape[1] // heads
        h = self.norm(x, f"{name}.norm").flatten(2).transpose(1, 2)
        fused = self.linear(h, f"{name}.qkv")
        outs = []
        for head in range(heads):
            q, k, v = fused[:, :, 3 * width * head : 3 * width * (head + 1)].split(width, 2)
            outs.append((q @ k.transpose(1, 2) / width**0.5).softmax(-1) @ v)
        return x + self.linear(torch.cat(outs, 2), f"{name}.proj_out").transpose(1, 2).view_as(x)

    def cross(self, x, context, name):
        q, k, v = (
            self.linear(x, f"{name}.to_q"),
            self.linear(context, f"{name}.to_k"),
            self.linear(context, f"{name}.to_v"),
        )
        return self.linear((q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v, f"{name}.to_out.0")

    def transformer(self, x, context, name):
        h = self.conv(self.norm(x, f"{name}.norm", 1e-6), f"{name}.proj_in").flatten(2).transpose(1, 2)
        block = f"{name}.transformer_blocks.0"
        n = self.layer_norm(h, f"{block}.norm1")
        h = h + self.cross(n, n, f"{block}.attn1")
        h = h + self.cross(self.layer_norm(h, f"{block}.norm2"), context, f"{block}.attn2")
        up, gate = self.linear(self.layer_norm(h, f"{block}.norm3"), f"{block}.ff.net.0.proj").chunk(2, -1)
        h = h + self.linear(up * F.gelu(gate), f"{block}.ff.net.2")
        return x + self.conv(h.transpose(1, 2).reshape(x.shape), f"{name}.proj_out")

    def mix(self, x, context, name):
        if self.has(f"{name}.qkv"):
            return self.attention(x, name)
        return self.transformer(x, context, name) if self.has(f"{name}.proj_in") else x

    def __call__(self, x, t, context=None):
        half = self.tensors["time_embed.0.weight"].shape[1] // 2
        angles = t * torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(half) / half)
        emb = torch.cat([angles.cos(), angles.sin()])[None]
        emb = self.linear(F.silu(self.linear(emb, "time_embed.0")), "time_embed.2").expand(len(x), -1)
        x = self.conv(x, "input_blocks.0.0")
        skips, number = [x], 1
        for level in range(self.num_levels):
            for _ in range(self.num_blocks):
                x = self.resnet(x, emb, f"input_blocks.{number}.0")
                x = self.mix(x, context, f"input_blocks.{number}.1")
                skips.append(x)
                number += 1
            if level < self.num_levels - 1:
                name = f"input_blocks.{number}.0"
                if self.has(f"{name}.op"):
                    x = self.conv(x, f"{name}.op", stride=2)
                else:
                    x = self.resnet(x, emb, name, lambda y: F.avg_pool2d(y, 2))
                skips.append(x)
                number += 1
        x = self.mix(self.resnet(x, emb, "middle_block.0"), context, "middle_block.1")
        x = self.resnet(x, emb, "middle_block.2")
        for number in range(self.num_levels * (self.num_blocks + 1)):
            x = self.resnet(torch.cat([x, skips.pop()], 1), emb, f"output_blocks.{number}.0")
            x = self.mix(x, context, f"output_blocks.{number}.1")
            for place in (1, 2):
                name = f"output_blocks.{number}.{place}"
                if self.has(f"{name}.conv"):
                    x = self.conv(F.interpolate(x, scale_factor=2.0), f"{name}.conv")
                elif self.has(f"{name}.in_layers.0"):
                    x = self.resnet(x, emb, name, lambda y: F.interpolate(y, scale_factor=2.0))
        return self.conv(F.silu(self.norm(x, "out.0")), "out.2")


# ---- small checkpoints ------------------------------------------------------------------------------


def randomly(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator)
        is_norm = len(shape) == 1 and name.endswith("weight")
        tensors[name] = 1 + 0.2 * x if is_norm else x * (x[0].numel() ** -0.5 if len(shape) > 1 else 0.2)
    return tensors


def unet_shapes(kind, widths=(32, 64), channels=3):
    """Keys and shapes as the training code has them, of two levels, the second without attention in "resnet"."""
    num_blocks, temb = 1, 4 * widths[0]
    by_resnet = kind == "resnet"
    shapes = {}

    def layer(name, *shape):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def resnet(name, inputs, outputs):
        layer(f"{name}.in_layers.0", inputs)
        layer(f"{name}.in_layers.2", outputs, inputs, 3, 3)
        layer(f"{name}.emb_layers.1", (2 if by_resnet else 1) * outputs, temb)
        layer(f"{name}.out_layers.0", outputs)
        layer(f"{name}.out_layers.3", outputs, outputs, 3, 3)
        if inputs != outputs:
            layer(f"{name}.skip_connection", outputs, inputs, 1, 1)

    def mixer(name, width):
        layer(f"{name}.norm", width)
        if kind != "classes":
            layer(f"{name}.qkv", 3 * width, width, 1)
            layer(f"{name}.proj_out", width, width, 1)
            return
        layer(f"{name}.proj_in", width, width, 1, 1)
        block = f"{name}.transformer_blocks.0"
        for attention, context in (("attn1", width), ("attn2", 16)):
            shapes[f"{block}.{attention}.to_q.weight"] = (width, width)
            shapes[f"{block}.{attention}.to_k.weight"] = shapes[f"{block}.{attention}.to_v.weight"] = (width, context)
            layer(f"{block}.{attention}.to_out.0", width, width)
        layer(f"{block}.ff.net.0.proj", 8 * width, width)
        layer(f"{block}.ff.net.2", width, 4 * width)
        for i in (1, 2, 3):
            layer(f"{block}.norm{i}", width)
        layer(f"{name}.proj_out", width, width, 1, 1)

    attention = (True, not by_resnet)
    layer("time_embed.0", temb, widths[0])
    layer("time_embed.2", temb, temb)
    layer("input_blocks.0.0", widths[0], channels, 3, 3)
    skips, width, number = [widths[0]], widths[0], 1
    for level, outputs in enumerate(widths):
        for _ in range(num_blocks):
            resnet(f"input_blocks.{number}.0", width, outputs)
            width = outputs
            if attention[level]:
                mixer(f"input_blocks.{number}.1", width)
            skips.append(width)
            number += 1
        if level == 0:
            if by_resnet:
                resnet(f"input_blocks.{number}.0", width, width)
            else:
                layer(f"input_blocks.{number}.0.op", width, width, 3, 3)
            skips.append(width)
            number += 1
    resnet("middle_block.0", width, width)
    mixer("middle_block.1", width)
    resnet("middle_block.2", width, width)
    number = 0
    for level in (1, 0):
        for block in range(num_blocks + 1):
            resnet(f"output_blocks.{number}.0", width + skips.pop(), widths[level])
            width = widths[level]
            if attention[level]:
                mixer(f"output_blocks.{number}.1", width)
            if level == 1 and block == num_blocks:
                place = f"output_blocks.{number}.{2 if attention[level] else 1}"
                if by_resnet:
                    resnet(place, width, width)
                else:
                    layer(f"{place}.conv", width, width, 3, 3)
            number += 1
    layer("out.0", width)
    layer("out.2", channels, width, 3, 3)
    return shapes


def first_stage(channels):
    """A small VQ-f4 (KL-f8 with 4 channels, here of one level) under the names of the training code."""
    from diffusers import AutoencoderKL, VQModel

    from bitlaw.models.keymaps import taming_autoencoder

    sizes = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (32, 32),
        "layers_per_block": 1,
        "latent_channels": channels,
    }
    with torch.device("meta"):
        more = {"num_vq_embeddings": 16, "vq_embed_dim": channels}
        network = AutoencoderKL(**sizes) if channels == 4 else VQModel(**sizes, **more)
    shapes = {k: tuple(v.shape) for k, v in to_theirs(network.state_dict(), taming_autoencoder(2, 1)).items()}
    return randomly(shapes, 9)


KINDS = ("convolutions", "resnet", "classes")


def lightning(kind, folder, heads=None):
    """A training checkpoint: averaged weights beside the raw ones, but not in the class-conditional release."""
    channels = 4 if kind == "resnet" else 3
    unet = randomly(unet_shapes(kind, channels=channels), 1)
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in unet.items()}
    if kind != "classes":
        averages = {f"model_ema.diffusion_model{name.replace('.', '')}": tensor for name, tensor in unet.items()}
        state = {name: torch.zeros_like(tensor) for name, tensor in state.items()} | averages
        state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    codec = first_stage(channels)
    state |= {f"first_stage_model.{name}": tensor for name, tensor in codec.items()}
    state |= {"first_stage_model.loss.logvar": torch.zeros(()), "betas": torch.zeros(1000)}
    if kind == "classes":
        state["cond_stage_model.embedding.weight"] = torch.randn(6, 16, generator=torch.Generator().manual_seed(3))
    if kind == "resnet":
        state["scale_factor"] = torch.tensor(0.75)
    path = folder / "model.ckpt"
    torch.save({"epoch": 3, "global_step": 9, "state_dict": state, "optimizer_states": [], "lr_schedulers": []}, path)
    return path, unet, state


def noisy(channels=3, seed=2):
    return torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(seed))


def close(actual, expected, atol=2e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [None, 2])
def test_original_checkpoints(kind, heads, tmp_path):
    path, unet, state = lightning(kind, tmp_path)
    model = bitlaw.load(path, side=8, **({"heads": heads} if heads and kind != "classes" else {}))
    assert model.family == "ldm" and model.image_size == 16
    channels = 4 if kind == "resnet" else 3
    usual = {"convolutions": lambda width: width // 32, "resnet": lambda width: 8}.get(kind)
    plain = Plain(unet, (lambda width: heads) if heads else usual, 2, 1)
    x = noisy(channels)
    labels, context = torch.tensor([4, 5]), None
    if kind == "classes":
        context = state["cond_stage_model.embedding.weight"][labels][:, None]
        assert model.num_classes == model.null_label == 5 and model.sampling.guidance == 3
    with torch.no_grad():
        for t in (1, 400, 951):
            close(model.net(x, t, labels), plain(x, t, context))
    official = model.to_official()
    expected = {f"model.diffusion_model.{name}": tensor for name, tensor in unet.items()}
    expected |= {k: state[k] for k in ("scale_factor", "cond_stage_model.embedding.weight") if k in state}
    assert set(official) == set(expected)
    assert all(torch.equal(official[name], expected[name]) for name in expected)
    assert model.latent_scale == (0.75 if kind == "resnet" else 1)
    assert model.process.beta_ends == (0.0015, 0.0155 if kind == "resnet" else 0.0195)


def test_averages_that_are_missing_are_named(tmp_path):
    path, _, state = lightning("convolutions", tmp_path)
    del state["model_ema.diffusion_modeltime_embed0bias"]
    torch.save({"state_dict": state}, path)
    with pytest.raises(ValueError, match=r"model_ema\.diffusion_modeltime_embed0bias"):
        read_weights(path)


def test_fused_attention_comes_apart_and_together():
    tensors = randomly({"input_blocks.1.1.qkv.weight": (96, 32, 1), "input_blocks.1.1.qkv.bias": (96,)}, 0)
    split = split_qkv(tensors, lambda width: 4)
    weight = tensors["input_blocks.1.1.qkv.weight"]
    assert torch.equal(split["input_blocks.1.1.k.weight"][8:16], weight[24 + 8 : 24 + 16])  # of the second head
    joined = join_qkv(split, lambda width: 4)
    assert set(joined) == set(tensors) and all(torch.equal(joined[name], tensors[name]) for name in tensors)
    with pytest.raises(ValueError, match="5 heads"):
        split_qkv(tensors, lambda width: 5)


# ---- sizes of the releases --------------------------------------------------------------------------

RELEASED = {
    "celebahq": (
        (224, 448, 672, 896),
        (False, True, True, True),
        False,
        274_056_163,
        (67, 24 + 16 * 4),
    ),  # 16 attentions
    "church": ((192, 384, 384, 768, 768), (True, True, True, True, False), True, 294_966_916, None),
    "imagenet": ((192, 384, 576, 960), (False, True, True, True), False, 400_920_579, (99, 184)),
}


@pytest.mark.parametrize("data_set", RELEASED)
def test_released_sizes(data_set):
    """From a network of that size on the meta device to its original names and back."""
    from bitlaw.models.networks.unet import UNet, UNetConfig

    widths, attention, by_resnet, parameters, layers = RELEASED[data_set]
    classes = data_set == "imagenet"
    kind = "CrossAttn{}Block2D" if classes else "Attn{}Block2D"
    plain = "Resnet{}sampleBlock2D" if by_resnet else "{}Block2D"
    types = [kind if here else plain for here in attention]
    channels = 4 if by_resnet else 3
    settings = {
        "sample_size": 32 if by_resnet else 64,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": widths,
        "down_block_types": tuple(name.format("Down") for name in types),
        "up_block_types": tuple(name.format("Up") for name in reversed(types)),
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }
    if classes:
        settings |= {"cross_attention_dim": 512, "attention_head_dim": 1}
    else:
        change = "resnet" if by_resnet else "conv"
        settings |= {
            "attention_head_dim": None if by_resnet else 32,
            "downsample_type": change,
            "upsample_type": change,
            "resnet_time_scale_shift": "scale_shift" if by_resnet else "default",
            "attn_norm_num_groups": 32,
        }
    config = UNetConfig(settings, heads=8 if by_resnet else None, num_classes=1000 if classes else 0)
    with torch.device("meta"):
        net = UNet(config)
        model = LDM(net, None, latent_scale=0.5 if by_resnet else 1.0, data_set=data_set)
        official = model.to_official()
    # The class vectors, 1001 x 512, are not part of the UNet that is counted.
    assert sum(p.numel() for p in net.unet.parameters()) == parameters
    tensors = {name.removeprefix("model.diffusion_model."): tensor for name, tensor in official.items()}
    tensors |= {"scale_factor": torch.tensor(0.5)} if by_resnet else {}
    file = WeightsFile(Path("models/ldm/celeba256/model.ckpt"), tensors)
    assert LDM.recognizes(file)
    found = LDM.config_of(file, None)
    assert UNetConfig(**found["net"]) == config and found["data_set"] == data_set
    ours = LDM.from_official_names(tensors)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in net.state_dict().items()}
    modules = [net.get_submodule(site.name) for site in model.sites()]
    every = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert len(set(modules)) == len(modules) == len(every)
    if layers:
        assert layers == tuple(sum(isinstance(m, one) for m in modules) for one in (nn.Conv2d, nn.Linear))
    paper = model.recipes["paper"]
    steps = {"celebahq": 200, "church": 400, "imagenet": 250}[data_set]
    assert (paper.num_steps, paper.eta, paper.clip, paper.to_x0) == (steps, 0, False, False)
    assert paper.guidance == (1.5 if classes else 1) and ("notebook" in model.recipes) == classes


@pytest.mark.parametrize(
    ("folder", "data_set", "eta"),
    [("celeba256", "celebahq", 0), ("ffhq256", "ffhq", 1), ("lsun_beds256", "bedroom", 1), ("mine", "", None)],
)
def test_the_data_set_is_in_the_name(folder, data_set, eta, tmp_path):
    (tmp_path / folder).mkdir()
    path, _, _ = lightning("convolutions", tmp_path / folder)
    model = bitlaw.load(path, side=8)
    assert model.data_set == data_set
    assert {recipe.eta for recipe in model.recipes.values()} == ({eta} if data_set else set())
    model = bitlaw.load(path, side=8, data_set="ffhq")
    assert model.recipes["paper"].eta == 1 and model.num_steps == 200 and model.sampling.rounding == "truncate"


# ---- the loop ---------------------------------------------------------------------------------------


def test_guidance_and_the_null_class(tmp_path):
    path, _, _ = lightning("classes", tmp_path)
    model = bitlaw.load(path, side=8).with_sampling(num_steps=4)
    labels = torch.tensor([1, 3])
    step = next(rollout(model, labels, Noise(0, range(2))))
    with torch.no_grad():
        cond = model.net(step.before.x_BCHW, 751, labels)
        uncond = model.net(step.before.x_BCHW, 751, torch.tensor([5, 5]))
    close(step.extracted.features, uncond + 3 * (cond - uncond), 1e-4)
    alone = replay(model.with_sampling(guidance=1.0), step.before, 0).extracted.features
    close(alone, cond)
    assert torch.equal(model.generate([-1], guidance=1.0), model.generate([-1], guidance=7.0))


def test_images_are_those_of_the_codes(tmp_path):
    path, _, _ = lightning("convolutions", tmp_path)
    model = bitlaw.load(path, side=8).with_sampling(num_steps=4, eta=1.0)
    assert isinstance(model.autoencoder, VQAutoencoder)
    state = list(rollout(model, torch.zeros(2, dtype=torch.long), Noise(1, range(2))))[-1].after
    with torch.no_grad():
        x = model.autoencoder.decode(state.x_BCHW)
        expected = ((x.clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8)
    images = model.generate([0, 0], seed=1)
    assert images.shape == (2, 3, 16, 16) and (images.int() - expected.int()).abs().max() <= 1
    assert (images != expected).float().mean() < 0.01
    with pytest.raises(ValueError, match="guidance 2: this ldm has no classes"):
        model.generate([0], guidance=2.0)
    with pytest.raises(ValueError, match="loaded without its autoencoder"):
        bitlaw.load(path, tokenizer="none", side=8).with_sampling(num_steps=2).generate([0])


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_round_trip(kind, tmp_path, fd_to_noise):
    path, _, _ = lightning(kind, tmp_path)
    model = bitlaw.load(path, side=8).with_sampling(num_steps=4)
    images = model.generate([0, 0], seed=1)
    small = quantize(model, "W4A8")
    small.save(tmp_path / "small")
    again = bitlaw.load(tmp_path / "small")
    assert torch.equal(again.generate([0, 0], seed=1), small.generate([0, 0], seed=1))
    assert not torch.equal(again.generate([0, 0], seed=1), images)
    assert again.latent_scale == model.latent_scale and again.recipes == model.recipes
    assert fd_to_noise(again).value > 0
    short = bitlaw.load(path, side=8, dtype="bfloat16").with_sampling(num_steps=4)
    features = [next(rollout(m, torch.zeros(1).long(), Noise(0, [0]))).extracted.features for m in (model, short)]
    assert 0 < (features[0] - features[1]).abs().max() < 0.1 * features[0].abs().max()


def test_a_directory_of_the_hub(tmp_path):
    """`CompVis/ldm-celebahq-256`: unet, vqvae without a scaling factor, a scheduler without what LDM's sampler has."""
    from diffusers import UNet2DModel, VQModel

    torch.manual_seed(0)
    sizes = {"block_out_channels": (32, 64), "attention_head_dim": 32, "sample_size": 8, "layers_per_block": 1}
    types = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = UNet2DModel(**sizes, **types).eval()
    vq = VQModel(block_out_channels=(32,), num_vq_embeddings=16).eval()
    root = tmp_path / "ldm-celebahq-256"
    unet.save_pretrained(root / "unet")
    vq.save_pretrained(root / "vqvae")
    (root / "scheduler").mkdir()
    scheduler = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear", "clip_sample": False}
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (root / "model_index.json").write_text(json.dumps({"_class_name": "LDMPipeline"}))
    model = bitlaw.load(root)
    assert model.family == "ldm" and model.data_set == "celebahq" and model.image_size == 8
    assert model.latent_scale == 1  # not the 0.18215 that the class supposes
    assert (model.sampling.first_timestep, model.sampling.to_x0) == (1, False)
    assert replace(model.process, respacing="").beta_ends == (0.0015, 0.0195)
    x = noisy()
    with torch.no_grad():
        close(model.net(x, 31), unet(x, 31).sample)
        close(model.autoencoder.decode(x), vq.decode(x).sample)
    assert bitlaw.load(root, beta_end=0.0155).process.beta_ends == (0.0015, 0.0155)
    # The same network under the names of the training code, and back.
    torch.save({"state_dict": model.to_official()}, tmp_path / "model.ckpt")
    again = bitlaw.load(tmp_path / "model.ckpt", tokenizer=root / "vqvae", side=8)
    assert "model.diffusion_model.input_blocks.3.1.qkv.weight" in model.to_official()
    ours, theirs = model.to_tensors(), again.to_tensors()
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    with torch.no_grad():
        close(again.net(x, 31), unet(x, 31).sample)
    with pytest.raises(ValueError, match=r"model\.ckpt: .*qkv.*5 heads"):
        bitlaw.load(tmp_path / "model.ckpt", tokenizer=root / "vqvae", heads=5)
