"""Loading released files: the family, the tokenizer beside it, what is refused, and how much memory it takes."""

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitlaw
from bitlaw.models import FAMILIES
from bitlaw.models.loading import family_of
from bitlaw.models.official import WeightsFile, read_weights

DATA = Path(__file__).parents[1] / "data"
NETWORK, TOKENIZER = DATA / "var_d2.fp16.safetensors", DATA / "vae_small.fp16.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A download: the transformer under a wrapper, the tokenizer beside it under its usual name."""
    torch.save({"model": load_file(NETWORK)}, tmp_path / "var_d2.pth")
    torch.save(load_file(TOKENIZER), tmp_path / "vae_ch160v4096z32.pth")
    return tmp_path


def test_the_tokenizer_is_found_beside_the_network(folder):
    model = bitlaw.load(folder / "var_d2.pth")
    assert model.family == "var" and model.provenance == {"source": "var_d2.pth"}
    images = model.generate([3, -1], seed=1)
    named = bitlaw.load(NETWORK, tokenizer=TOKENIZER)
    assert torch.equal(images, named.generate([3, 10 - 11], seed=1))


def test_a_missing_tokenizer_is_said_with_its_name(folder):
    (folder / "vae_ch160v4096z32.pth").unlink()
    with pytest.raises(ValueError, match=r"var_d2\.pth: .*expected vae_ch160v4096z32\.pth .*tokenizer=PATH"):
        bitlaw.load(folder / "var_d2.pth")
    model = bitlaw.load(folder / "var_d2.pth", tokenizer="none")
    small = bitlaw.quantize(model, "W4A8")
    small.save(folder / "small")
    again = bitlaw.load(folder / "small")
    assert again.autoencoder is None
    with pytest.raises(ValueError, match="loaded without its tokenizer"):
        again.generate([1])


def test_a_wrong_tokenizer_is_refused(folder):
    tensors = load_file(TOKENIZER)
    tensors["quantize.embedding.weight"] = tensors["quantize.embedding.weight"][:100]
    torch.save(tensors, folder / "vae_ch160v4096z32.pth")
    with pytest.raises(ValueError, match=r"vocab_size 512 does not go with the tokenizer's 100"):
        bitlaw.load(folder / "var_d2.pth")
    with pytest.raises(ValueError, match=r"not an autoencoder that is known .*; 38 tensors"):
        bitlaw.load(folder / "var_d2.pth", tokenizer=folder / "var_d2.pth")
    with pytest.raises(ValueError, match="no such file"):
        bitlaw.load(folder / "var_d2.pth", tokenizer=folder / "nowhere.pth")


def test_missing_and_extra_keys_are_named(folder):
    tensors = load_file(NETWORK)
    tensors["blocks.0.ffn.fc9.weight"] = tensors.pop("blocks.0.ffn.fc2.weight")
    torch.save(tensors, folder / "var_d2.pth")
    with pytest.raises(ValueError) as error:
        bitlaw.load(folder / "var_d2.pth")
    assert "blocks.0.ffn.fc2.weight: missing" in str(error.value)
    assert "blocks.0.ffn.fc9.weight: unknown" in str(error.value)
    assert str(error.value).startswith("var_d2.pth: ")


def test_weights_with_nan_are_named(folder):
    tensors = load_file(NETWORK)
    tensors["head.bias"][3] = torch.nan
    torch.save(tensors, folder / "var_d2.pth")
    with pytest.raises(ValueError, match=r"head\.bias: NaN or Inf"):
        bitlaw.load(folder / "var_d2.pth")


def test_weights_of_no_family_say_what_was_found(folder):
    torch.save({"layer1.0.conv1.weight": torch.ones(4, 3, 3, 3), "fc.bias": torch.ones(2)}, folder / "resnet.pth")
    with pytest.raises(
        ValueError, match=r"no model that is known; it holds 2 tensors: layer1\.0\.conv1\.weight \(4, 3"
    ):
        bitlaw.load(folder / "resnet.pth")


def test_options_that_do_not_exist_or_do_not_apply_are_refused(folder):
    with pytest.raises(ValueError, match=r"unknown option of VAR 'head'; did you mean heads"):
        bitlaw.load(folder / "var_d2.pth", head=3)
    with pytest.raises(ValueError, match="a checkpoint of bitlaw says itself what heads would"):
        bitlaw.load("ladder/var-xs", heads=3)


def test_names_that_are_nothing(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"unknown model .* 'ladder/vra-s'; did you mean ladder/var-s"):
        bitlaw.load("ladder/vra-s")
    with pytest.raises(ValueError, match=r"no such file or directory.*var_d99\.pth"):
        bitlaw.load(tmp_path / "var_d99.pth")

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(
        ValueError, match=r"owner/model: no such file here, and not to be had from the hub \(no network"
    ):
        bitlaw.load("owner/model")


def test_a_hub_repository_loads_like_a_directory(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repository, file: str(folder / file))
    assert bitlaw.load("FoundationVision/var/var_d2.pth").generate([1]).shape == (1, 3, 96, 96)


def test_the_dtype_is_that_of_the_network_only(folder):
    model = bitlaw.load(folder / "var_d2.pth", dtype=torch.bfloat16)
    assert model.dtype == model.storage_dtype == torch.bfloat16
    assert {p.dtype for p in model.autoencoder.parameters()} == {torch.float32}
    assert model.generate([1]).shape == (1, 3, 96, 96)
    bitlaw.quantize(model, "W4A16").save(folder / "small")
    again = bitlaw.load(folder / "small", dtype=torch.bfloat16)
    assert torch.equal(again.generate([1, 2]), bitlaw.quantize(model, "W4A16").generate([1, 2]))


def test_class_names_stand_for_numbers(folder):
    with pytest.raises(ValueError, match="names of this model's classes are not known"):
        bitlaw.load(folder / "var_d2.pth").generate(["goldfish"])


def test_settings_of_a_recipe(folder):
    model = bitlaw.load(folder / "var_d2.pth")
    paper = model.with_sampling(guidance=1.0).with_sampling(recipe="paper")
    assert paper.recipe == "paper" and paper.sampling.guidance == 2.5
    changed = paper.with_sampling(guidance=2.0)
    assert changed.recipe == "" and changed.sampling.guidance == 2.0
    assert paper.with_sampling(guidance=None).recipe == "paper"
    with pytest.raises(ValueError, match="unknown recipe of var 'papre'; did you mean paper"):
        model.generate([1], recipe="papre")
    with pytest.raises(ValueError, match="unknown sampler setting of var 'guidence'; did you mean guidance"):
        model.generate([1], guidence=2.0)


PEAK = """
import re, sys
import bitlaw, bitlaw.models.loading
def kilobytes(name):  # ru_maxrss would be that of the parent as well
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
before = kilobytes("VmRSS")
model = bitlaw.load(sys.argv[1], tokenizer="none")
size = sum(p.numel() * p.element_size() for p in model.net.parameters())
print(1024 * (kilobytes("VmHWM") - before) / size)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("manifest", "name"), [("var", "var_d16"), ("dit", "DiT-XL/2@256")])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_peak_memory_of_loading(tmp_path, manifest, name, suffix):
    with gzip.open(DATA / f"{manifest}_manifest.json.gz") as file:
        shapes = json.load(file)[name]
    tensors = {
        key: torch.randn(shape) if "float" in dtype else torch.zeros(shape, dtype=torch.int64)
        for key, (shape, dtype) in shapes.items()
    }
    tensors = {key: tensor for key, tensor in tensors.items() if "zero_k_bias" not in key}
    path = tmp_path / f"weights{suffix}"
    torch.save(tensors, path) if suffix == ".pth" else save_file(tensors, path)
    del tensors
    out = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True)
    ratio = float(out.stdout)
    print(f"{name} {suffix}: peak {ratio:.3f} of the parameters' size")
    assert ratio < 1.15
    shutil.rmtree(tmp_path)


def test_families_do_not_take_each_other_s_files():
    for path, family in ((NETWORK, "var"), (DATA / "dit_a.safetensors", "dit")):
        file = read_weights(path)
        assert [name for name, kind in FAMILIES.items() if kind.recognizes(file)] == [family]
        assert family_of(file).family == family
    with pytest.raises(ValueError, match="no model that is known"):
        family_of(WeightsFile(Path("x.pt"), {"a": torch.ones(1)}))
