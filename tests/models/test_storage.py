"""Checkpoints: written whole or not at all, and checked when read."""

import json

import pytest
import torch
from torch import nn

from bitlaw.models.storage import load_tensors, read_checkpoint, split_prefix, with_prefix, write_checkpoint

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b.c": torch.tensor([1, 2], dtype=torch.int32), "t": torch.ones(3, 2).t()}


@pytest.fixture
def checkpoint(tmp_path):
    write_checkpoint(tmp_path / "model", {"family": "var", "sizes": [1, 2]}, TENSORS, {"method": "rtn"})
    return tmp_path / "model"


def test_round_trip(checkpoint):
    config, tensors, quantization = read_checkpoint(checkpoint)
    assert config == {"family": "var", "sizes": [1, 2]} and quantization == {"method": "rtn"}
    assert set(tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype
    write_checkpoint(checkpoint, {}, {"z": torch.zeros(1)})
    assert list(read_checkpoint(checkpoint).tensors) == ["z"] and read_checkpoint(checkpoint).quantization is None


def test_a_write_that_fails_leaves_the_old_checkpoint(checkpoint):
    with pytest.raises(TypeError):
        write_checkpoint(checkpoint, {"not": object()}, {"z": torch.zeros(1)})
    assert set(read_checkpoint(checkpoint).tensors) == set(TENSORS)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("keep", [0, 5, 40, -4])
def test_truncated_tensors_are_named(checkpoint, keep):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged or truncated"):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize("text", ['{"family": ', "[1, 2]", "\x00"])
def test_damaged_configuration_is_named(checkpoint, text):
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: damaged"):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file_is_named(checkpoint, name):
    (checkpoint / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: missing"):
        read_checkpoint(checkpoint)


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        read_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_numbers_are_named(tmp_path, value):
    write_checkpoint(tmp_path / "model", {}, {"good": torch.ones(2), "bad": torch.tensor([1.0, value])})
    with pytest.raises(ValueError, match=r"model\.safetensors: NaN or Inf in bad$"):
        read_checkpoint(tmp_path / "model")


def test_every_tensor_that_does_not_fit_is_named():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    given = {"0.weight": torch.zeros(2, 3), "0.bias": torch.full((3,), torch.nan), "1.weight": torch.zeros(1, 3)}
    given["x"] = torch.zeros(1)
    with pytest.raises(ValueError) as caught:
        load_tensors(module, given, "the net")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("the net")
    assert sorted(line.strip() for line in lines[1:]) == [
        "0.bias: NaN or Inf",
        "0.weight: shape (2, 3), expected (3, 2)",
        "1.bias: missing",
        "x: unknown",
    ]


def test_half_precision_is_cast_and_ignored_names_are_passed_over():
    module = nn.Linear(2, 1)
    given = {"weight": torch.ones(1, 2).half(), "bias": torch.ones(1).half(), "old_mask": torch.ones(1)}
    load_tensors(module, given, "net", ignore=["mask"])
    assert module.weight.dtype == torch.float32 and module.weight.tolist() == [[1, 1]]


def test_prefixes():
    inside, outside = split_prefix("vae.", {**with_prefix("vae.", {"w": torch.ones(1)}), "w": torch.zeros(1)})
    assert inside["w"] == 1 and outside["w"] == 0


def test_configuration_is_readable_json(checkpoint):
    assert json.loads((checkpoint / "config.json").read_text())["family"] == "var"
