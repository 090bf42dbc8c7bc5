"""Released files: what is around the weights, what is wrong with them, and that nothing in them runs."""

import argparse
import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bitlaw.models import official
from bitlaw.models.official import hub_path, read_weights

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2, dtype=torch.float16)}


def check(file, wrapper=""):
    assert {name: tensor.tolist() for name, tensor in file.tensors.items()} == {
        name: tensor.tolist() for name, tensor in TENSORS.items()
    }
    assert file.wrapper == wrapper


def saved(tmp_path, content, name="model.pt", **how):
    torch.save(content, tmp_path / name, **how)
    return tmp_path / name


def test_a_bare_state_dict(tmp_path):
    for name in ("model.pt", "model.pth", "model.ckpt", "model.bin"):
        check(read_weights(saved(tmp_path, OrderedDict(TENSORS), name)))
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"heads": "4", "name": "tiny", "qk_norm": "True"})
    file = read_weights(tmp_path / "model.safetensors")
    check(file)
    assert file.metadata == {"heads": 4, "name": "tiny", "qk_norm": True}


def test_files_of_before_the_zip_format(tmp_path):
    check(read_weights(saved(tmp_path, TENSORS, _use_new_zipfile_serialization=False)))


@pytest.mark.parametrize("wrapper", ["model_ema", "ema", "model", "module", "state_dict"])
def test_wrappers(tmp_path, wrapper):
    check(read_weights(saved(tmp_path, {"epoch": 3, wrapper: TENSORS, "opt": {"lr": 0.1}})), wrapper)


def test_averaged_weights_go_before_raw_ones(tmp_path):
    raw = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    check(read_weights(saved(tmp_path, {"model": raw, "ema": TENSORS})), "ema")
    check(read_weights(saved(tmp_path, {"model": raw, "model_ema": TENSORS})), "model_ema")
    check(read_weights(saved(tmp_path, [raw, {"lr": 0.1}, 7, TENSORS])), "[3]")


def test_prefixes_of_ddp_and_compile_come_off(tmp_path):
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        check(read_weights(saved(tmp_path, {prefix + name: tensor for name, tensor in TENSORS.items()})))


def test_a_trainer_of_var_has_its_tokenizer_inside(tmp_path):
    trainer = {"config": {"lr": 1e-4}, "var_wo_ddp": TENSORS, "vae_local": {"q": torch.ones(1)}, "var_opt": {}}
    file = read_weights(saved(tmp_path, {"epoch": 1, "iter": 2, "trainer": trainer, "args": {"depth": 16}}))
    check(file, "trainer.var_wo_ddp")
    assert list(file.others) == ["vae_local"] and list(file.others["vae_local"]) == ["q"]
    assert file.metadata == {"depth": 16}


def test_arguments_of_a_training_run_come_along(tmp_path):
    args = argparse.Namespace(image_size=512, model="DiT-XL/2", vae="ema", callback=None)
    file = read_weights(saved(tmp_path, {"model": TENSORS, "ema": TENSORS, "opt": {}, "args": args}))
    assert file.metadata == {"image_size": 512, "model": "DiT-XL/2", "vae": "ema"}


def test_directories(tmp_path):
    folder = tmp_path / "pipeline" / "transformer"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": "Thing", "sample_size": 32}))
    with pytest.raises(ValueError, match=r"no weights in this directory; expected one of diffusion_pytorch_model\.saf"):
        read_weights(folder)
    saved(folder, TENSORS, "diffusion_pytorch_model.bin")
    for directory in (folder, tmp_path / "pipeline"):
        file = read_weights(directory)
        check(file)
        assert file.metadata == {"_class_name": "Thing", "sample_size": 32}
    save_file({"b": torch.ones(1)}, folder / "diffusion_pytorch_model.safetensors")
    assert list(read_weights(folder).tensors) == ["b"]  # before a pickle of the same weights

    large = tmp_path / "large"
    large.mkdir()
    saved(large, argparse.Namespace(model="DiT_Llama_3B_patch2", qk_norm=True), "model_args.pth")
    saved(large, {"raw": torch.ones(1)}, "consolidated.00-of-01.pth")
    saved(large, TENSORS, "consolidated_ema.00-of-01.pth")
    file = read_weights(large)
    check(file)
    assert file.metadata == {"model": "DiT_Llama_3B_patch2", "qk_norm": True}


def test_tensors_stay_mapped_from_their_file(tmp_path):
    weight = torch.randn(1 << 20)
    path = saved(tmp_path, {"model": {"w": weight}})
    tensor = read_weights(path).tensors["w"]
    assert torch.equal(tensor, weight)
    assert str(path) in Path("/proc/self/maps").read_text()


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["top", "beside", "args"])
def test_code_in_a_pickle_is_named_and_not_run(tmp_path, zipped, place):
    marker = tmp_path / "ran"
    evil = Evil(marker)
    content = {"top": evil, "beside": {"model": TENSORS, "hook": evil}, "args": {"model": TENSORS, "args": evil}}[place]
    path = saved(tmp_path, content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"model\.pt: holds more than weights \((os|posix)\.system\)"):
        read_weights(path)
    assert not marker.exists()


def test_bookkeeping_of_trainers_is_passed_over_without_importing_it(tmp_path):
    class ModelCheckpoint:
        def __init__(self):
            self.path = "x"

    ModelCheckpoint.__module__ = "pytorch_lightning.callbacks.model_checkpoint"
    ModelCheckpoint.__qualname__ = "ModelCheckpoint"
    import sys
    import types

    name = "pytorch_lightning.callbacks.model_checkpoint"
    modules = ["pytorch_lightning", "pytorch_lightning.callbacks", name]
    for module in modules:
        sys.modules[module] = types.ModuleType(module)
    sys.modules[name].ModelCheckpoint = ModelCheckpoint
    try:
        content = {"state_dict": TENSORS, "callbacks": {ModelCheckpoint: {"best": ModelCheckpoint()}}, "epoch": 3}
        path = saved(tmp_path, content)
    finally:
        for module in modules:
            del sys.modules[module]
    check(read_weights(path), "state_dict")
    assert not any(module in sys.modules for module in modules)


def test_other_objects_are_named(tmp_path):
    path = saved(tmp_path, {"model": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"holds more than weights \(.*torch\.nn\.modules\.linear\.Linear"):
        read_weights(path)


def test_truncated_and_damaged_files(tmp_path):
    path = saved(tmp_path, {"w": torch.randn(10_000)})
    whole = path.read_bytes()
    for length in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.pt: damaged or truncated"):
            read_weights(path)
    save_file(TENSORS, tmp_path / "m.safetensors")
    whole = (tmp_path / "m.safetensors").read_bytes()
    for length in (3, len(whole) - 3):
        (tmp_path / "m.safetensors").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"m\.safetensors: damaged or truncated"):
            read_weights(tmp_path / "m.safetensors")


def test_what_is_no_weights_file_is_said(tmp_path):
    path = tmp_path / "model.pt"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(ValueError, match="Git LFS pointer"):
        read_weights(path)
    path.write_text("\n<!DOCTYPE html><html></html>")
    with pytest.raises(ValueError, match="web page"):
        read_weights(path)
    with pytest.raises(ValueError, match="no such file"):
        read_weights(tmp_path / "nowhere.pt")
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"expected a file that ends in \.pt"):
        read_weights(tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="holds a int, expected a state dict"):
        read_weights(saved(tmp_path, 3))
    with pytest.raises(ValueError, match="no weights found; it holds epoch, optimizer"):
        read_weights(saved(tmp_path, {"epoch": 1, "optimizer": {"lr": 1}}))
    path.write_bytes(pickle.dumps({"a": 1}, protocol=2))
    with pytest.raises(ValueError, match=r"model\.pt"):
        read_weights(path)


def test_hub_names(tmp_path, monkeypatch):
    asked = []

    def download(repository, file):
        asked.append((repository, file))
        return str(tmp_path / file)

    def snapshot(repository, allow_patterns):
        asked.append((repository, None))
        if repository == "no/where":
            raise OSError("offline\nmore")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert hub_path("FoundationVision/var/var_d16.pth") == tmp_path / "var_d16.pth"
    assert hub_path("google/ddpm-cifar10-32") == tmp_path
    assert asked == [("FoundationVision/var", "var_d16.pth"), ("google/ddpm-cifar10-32", None)]
    assert hub_path("var-s") is None and hub_path("/a/b") is None and hub_path("../a") is None
    with pytest.raises(ValueError, match=r"no/where: no such file here, and not to be had from the hub \(offline\)"):
        hub_path("no/where")


def test_counting_and_describing(tmp_path):
    file = official.WeightsFile(tmp_path, {f"blocks.{i}.w": torch.ones(i + 1) for i in range(12)})
    assert file.count(r"blocks\.(\d+)\.") == 12 and file.shape("blocks.3.w") == (4,) and "blocks.3.w" in file
    with pytest.raises(ValueError, match="head is missing"):
        file.shape("head")
    assert file.describe(2) == "12 tensors: blocks.0.w (1,), blocks.1.w (2,) ..."
