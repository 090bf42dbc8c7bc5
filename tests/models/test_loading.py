"""Saved and loaded again, a model draws the same images bit for bit; damaged directories are named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitlaw.methods.quantize import quantize
from bitlaw.models.autoencoders.multi_scale_vq import VQTokenizer, VQTokenizerConfig
from bitlaw.models.dit import DiT, DiTSampling
from bitlaw.models.generator import ImageGenerator
from bitlaw.models.loading import load
from bitlaw.models.networks.dit import DiTConfig, DiTTransformer
from bitlaw.models.networks.var import VARConfig, VARTransformer
from bitlaw.models.parts.diffusion import Diffusion
from bitlaw.models.var import VAR, VARSampling
from bitlaw.scaling.bits import count_bits

TOKENIZER = VQTokenizerConfig(
    vocab_size=32,
    latent_channels=4,
    ch=8,
    ch_mult=(1, 2),
    num_res_blocks=1,
    patch_nums=(1, 2, 4),
    norm_groups=0,
    attention=False,
)
PRECISIONS = ("W4A8", "W3g8A16", "W2sA16", "We2m1Ae4m3", "W8tA8t", "W12A16", "W0A16", "W16A8", "W5A8KV8", "W1A16")


def tiny_model(family: str) -> ImageGenerator[Any]:
    """A small model of a family with random weights that fit float16."""
    torch.manual_seed(0)
    tokenizer = VQTokenizer(TOKENIZER)
    model: ImageGenerator[Any]
    if family == "var":
        config = VARConfig(2, 24, 2, 5, TOKENIZER.patch_nums, 32, 4)
        model = VAR(VARTransformer(config), tokenizer, VARSampling(guidance=2.0, top_k=0, top_p=0.0))
    else:
        net = DiTTransformer(DiTConfig(2, 24, 2, 5, 4, 4, learn_sigma=False))
        process = Diffusion(prediction="v", variance="fixed_small")
        model = DiT(net, tokenizer, process, DiTSampling(num_steps=4, sampler="ddim"), latent_scale=1.5)
    with torch.no_grad():
        for tensor in [*model.net.parameters(), *tokenizer.parameters()]:
            if tensor.numel() and not tensor.any():
                tensor.normal_(std=0.1)
            tensor.copy_(tensor.half().float())
        for name, bias in model.net.named_parameters():
            if name.endswith("mat_qkv.bias"):
                bias[24:48] = 0  # keys have no bias
    model.net.eval().requires_grad_(False)
    tokenizer.eval().requires_grad_(False)
    model.storage_dtype = torch.float16
    return model


@pytest.mark.parametrize("family", ["var", "dit"])
@pytest.mark.parametrize("precision", [None, *PRECISIONS])
def test_saved_and_loaded_it_draws_the_same_images(family: str, precision: str | None, tmp_path: Path) -> None:
    model = tiny_model(family)
    if precision is not None:
        model = quantize(model, precision)
    model.save(tmp_path / "model")
    again = load(tmp_path / "model")
    images = model.generate([0, 1, 4], seed=3)
    assert torch.equal(again.generate([0, 1, 4], seed=3), images)
    assert count_bits(again) == count_bits(model)
    again.save(tmp_path / "twice")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "twice"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", ["var", "dit"])
@pytest.mark.parametrize("precision", [None, *PRECISIONS])
def test_the_file_is_as_small_as_its_bits_say(family: str, precision: str | None, tmp_path: Path) -> None:
    model = tiny_model(family)
    if precision is not None:
        model = quantize(model, precision)
    model.save(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    shapes = 16 * sum(name.endswith(".weight_shape") for name in load_file(path))
    assert 8 * (path.stat().st_size - header - shapes) == count_bits(model).model_bits


def test_the_quantized_keys_are_those_of_compressed_tensors(tmp_path: Path) -> None:
    quantize(tiny_model("var"), "W4g8A16").save(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    site = "blocks.0.attn.mat_qkv"
    assert tensors[f"{site}.weight_packed"].shape == (72, 3)
    assert tensors[f"{site}.weight_packed"].dtype == torch.int32
    assert tensors[f"{site}.weight_scale"].shape == (72, 3)
    assert tensors[f"{site}.weight_shape"].tolist() == [72, 24]
    assert f"{site}.weight" not in tensors
    assert "blocks.0.attn.q_bias" in tensors  # what is not quantized keeps its official key


def damaged(tmp_path: Path, change: Any) -> str:
    """The error of loading a quantized model after `change(directory)`."""
    directory = tmp_path / "model"
    quantize(tiny_model("var"), "W4A8").save(directory)
    change(directory)
    with pytest.raises(ValueError) as caught:
        load(directory)
    return str(caught.value)


def edit_tensors(change: Any) -> Any:
    def apply(directory: Path) -> None:
        path = directory / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return apply


SITE = "blocks.1.ffn.fc1"


def test_damaged_tensors_are_named(tmp_path: Path) -> None:
    def negative(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{SITE}.weight_scale"][3] = -1

    def infinite(tensors: dict[str, torch.Tensor]) -> None:
        tensors["head.weight"][0, 0] = torch.inf

    def missing(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{SITE}.weight_packed"]

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{SITE}.weight_packed"] = tensors[f"{SITE}.weight_packed"][:, :1].contiguous()

    assert f"{SITE}.weight_scale" in damaged(tmp_path, edit_tensors(negative))
    assert "head.weight" in damaged(tmp_path, edit_tensors(infinite))
    assert f"{SITE}.weight_packed: missing" in damaged(tmp_path, edit_tensors(missing))
    assert f"{SITE}.weight_packed: shape" in damaged(tmp_path, edit_tensors(cut))


def test_truncated_files_are_named(tmp_path: Path) -> None:
    def truncate(name: str) -> Any:
        def apply(directory: Path) -> None:
            path = directory / name
            path.write_bytes(path.read_bytes()[:-100])

        return apply

    for name in ("model.safetensors", "tokenizer.safetensors", "bitlaw.json", "config.json"):
        assert name in damaged(tmp_path, truncate(name))


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    def newer(directory: Path) -> None:
        path = directory / "bitlaw.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))

    assert "format version 99" in damaged(tmp_path, newer)


def test_an_unknown_name_gets_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown model"):
        load("ladder/vra-s")
    with pytest.raises(ValueError, match="names no family"):
        directory = tmp_path / "other"
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        save_file({"a": torch.zeros(1)}, directory / "model.safetensors")
        load(directory)
