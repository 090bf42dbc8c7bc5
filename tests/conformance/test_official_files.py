"""Every family from its released file on: load, draw, quantize, save, load again, score."""

import pytest
import torch
from test_families import labels_of

import bitlaw
from bitlaw.models.export import export_official
from tiny_models import TINY

# What shapes do not tell of models this small.
OPTIONS = {
    "var": {"patch_nums": (1, 2, 4)},
    "dit": {"heads": 2},
    "dit-learned-variance": {"heads": 2},
    "large-dit": {"heads": 2, "image_size": 8},
    "llamagen": {"heads": 2, "image_size": 8},
    "mar": {"heads": 2},
    "ddpm": {"image_size": 8},
}
STEPS = {"num_steps": 4}
FEWER_STEPS = {"var": {}, "llamagen": {}, "mar": {**STEPS, "head_steps": "ddim4"}}


@pytest.mark.parametrize("name", TINY)
def test_from_the_released_file_to_a_score(name, tmp_path, fd_to_noise):
    torch.manual_seed(0)
    model = TINY[name]()
    if name.startswith("ldm"):
        pytest.skip("its first stage is inside its file: tests/models/test_ldm.py")
    path = tmp_path / "weights.pth"
    if name == "ddpm":  # no network of the original repository is this small, so it is as the hub has it
        path = tmp_path / "ddpm"
        model.net.unet.save_pretrained(path)
    else:
        export_official(model, path)
    tokenizer = None
    if model.autoencoder is not None:
        tokenizer = tmp_path / "autoencoder.pth"
        torch.save({"state_dict": model.autoencoder.to_official()}, tokenizer)
    loaded = bitlaw.load(path, tokenizer, **OPTIONS.get(name, {}))
    assert loaded.family == model.family and loaded.image_size == model.image_size
    ours, theirs = model.net.state_dict(), loaded.net.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)

    loaded = loaded.with_sampling(**FEWER_STEPS.get(model.family, STEPS))
    labels = labels_of(model)
    images = loaded.generate(labels, seed=1)
    assert images.shape == (8, 3, model.image_size, model.image_size)
    small = bitlaw.quantize(loaded, "W4A8")
    drawn = small.generate(labels, seed=1)
    assert not torch.equal(drawn, images)
    small.save(tmp_path / "small")
    again = bitlaw.load(tmp_path / "small")
    assert torch.equal(again.generate(labels, seed=1), drawn)

    score = fd_to_noise(again)
    assert score.value > 0 and score.protocol.num_images == 12 and score.protocol.sampler == again.sampler_name
    assert score.protocol.recipe == ""
    if name == "var":  # the others' take hundreds of steps
        paper = fd_to_noise(again, recipe="paper").protocol
        assert (paper.recipe, paper.guidance, paper.sampler) == ("paper", 2.5, "top_k=900 top_p=0.96")
