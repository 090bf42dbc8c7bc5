"""Official files written back."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import bitlaw
from bitlaw.models.export import export_official

DATA = Path(__file__).parents[1] / "data"


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("name", ["ladder/var-xs", "ladder/dit-xs"])
def test_what_is_exported_loads_again_and_is_the_same(tmp_path, name, suffix):
    model = bitlaw.load(name)
    lost = export_official(model, tmp_path / f"weights{suffix}")
    assert len(lost) == 1 and "autoencoder" in lost[0]
    options = {"patch_nums": (1, 2, 3, 4, 6), "heads": 2} if model.family == "var" else {"heads": 2}
    again = bitlaw.load(tmp_path / f"weights{suffix}", tokenizer="none", **options)
    ours, theirs = model.net.state_dict(), again.net.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_quantized_weights_are_exported_as_the_numbers_they_stand_for(tmp_path):
    model = bitlaw.load("ladder/dit-xs")
    small = bitlaw.quantize(model, "W3A8")
    lost = export_official(small, tmp_path / "weights.pt")
    assert len(lost) == 3
    again = bitlaw.load(tmp_path / "weights.pt", tokenizer="none", heads=2)
    layer = small.net.get_submodule("blocks.1.mlp.fc1")
    exported = again.net.get_submodule("blocks.1.mlp.fc1").weight
    assert torch.equal(exported, layer.quantized.decode())
    assert not torch.equal(exported, model.net.get_submodule("blocks.1.mlp.fc1").weight)
    assert exported[0].unique().numel() <= 8


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the official format is \.pt, \.pth, \.ckpt or \.safetensors"):
        export_official(bitlaw.load("ladder/dit-xs"), tmp_path / "weights.onnx")
    assert list(tmp_path.iterdir()) == []


def test_names_are_the_official_ones(tmp_path):
    export_official(bitlaw.load("ladder/var-xs"), tmp_path / "weights.safetensors")
    names = set(load_file(tmp_path / "weights.safetensors"))
    assert {"blocks.0.attn.q_bias", "blocks.0.attn.v_bias", "blocks.0.attn.mat_qkv.weight", "pos_1LC"} <= names
    assert "blocks.0.attn.mat_qkv.bias" not in names


def test_a_var_is_exported_with_the_buffers_that_official_loading_asks_for(tmp_path):
    model = bitlaw.load(DATA / "var_d2.fp16.safetensors", tokenizer="none")
    export_official(model, tmp_path / "weights.pth")
    released, exported = load_file(DATA / "var_d2.fp16.safetensors"), torch.load(tmp_path / "weights.pth")
    assert set(exported) == set(released)
    for name, tensor in released.items():
        assert torch.equal(exported[name], tensor.to(exported[name].dtype)), name
