"""Editing pictures with VAR: what is kept is the picture's, what is not is drawn, and the loop is the usual one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import bitlaw
from bitlaw.models.generator import Noise, rollout
from bitlaw.models.official import WeightsFile
from bitlaw.models.parts.pixels import from_uint8, to_uint8
from bitlaw.models.var import Given, _keep_at

DATA = Path(__file__).parents[1] / "data"
SIDES = (1, 2, 3, 4, 5, 6)


@pytest.fixture(scope="module")
def model():
    loaded = bitlaw.load(DATA / "var_d2.fp16.safetensors", tokenizer=DATA / "vae_small.fp16.safetensors")
    return loaded.with_sampling(top_k=100, top_p=0.9)


@pytest.fixture(scope="module")
def golden():
    return {name: torch.from_numpy(array) for name, array in np.load(DATA / "vae_6s.npz").items()}


@pytest.fixture(scope="module")
def images(golden):
    return golden["img_u8"]


def centre(size):
    """A mask that keeps all but the middle."""
    keep = torch.ones(size, size, dtype=torch.bool)
    keep[size // 3 : 2 * size // 3, size // 3 : 2 * size // 3] = False
    return keep


def last(model, labels, seed=0):
    *_, step = rollout(model, model.check_labels(labels), Noise(seed, range(len(labels))))
    return step.after


@pytest.mark.parametrize("more_smooth", [False, True])
def test_everything_kept_is_the_tokenizers_reconstruction(model, images, more_smooth):
    with torch.inference_mode():
        latent = model.tokenizer.encode_to_tokens(from_uint8(images)).latents[-1]
        expected = to_uint8(model.tokenizer.decode(latent))
    keep = torch.ones(96, 96, dtype=torch.bool)
    assert torch.equal(model.edit(images, keep, [3, -1], seed=5, more_smooth=more_smooth), expected)


def test_nothing_kept_of_a_picture_with_the_same_first_token_is_generate(model):
    """The first stage, of one token, always stays: here it is that which is drawn without a picture."""
    drawn = last(model, [3, 7], seed=2)
    tokens = (drawn.tokens[0], *(torch.zeros_like(of_stage) for of_stage in drawn.tokens[1:]))
    twin = model.with_sampling()
    twin.given = Given(tokens, tuple(_keep_at(torch.zeros(2, 6, 6), side) for side in SIDES))
    assert torch.equal(twin.generate([3, 7], seed=2), model.generate([3, 7], seed=2))
    assert model.given is None


def test_kept_tokens_are_the_pictures_and_others_are_drawn(model, images, golden):
    state = last(model.editing(images, centre(96)), [3, -1])
    num_drawn = 0
    for stage, side in enumerate(SIDES):
        keep = _keep_at(centre(6).float()[None], side)[0]
        given, tokens = golden[f"idx_{stage}"], state.tokens[stage]
        assert torch.equal(tokens[:, keep], given[:, keep]) and keep.any()
        num_drawn += (tokens[:, ~keep] != given[:, ~keep]).sum().item()
    assert num_drawn > 15  # of about 24; equal ones are chance
    torch.testing.assert_close(state.latent_BZhw, model.tokenizer.tokens_to_latent(state.tokens), atol=1e-5, rtol=0)


def test_masks_of_all_stages():
    """By hand: bilinear, above a half, and the first stage whole; side 2 of 4 averages the middle of each quarter."""
    keep = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]).float()[None]
    assert _keep_at(keep, 1).tolist() == [[True]]
    assert _keep_at(torch.zeros(1, 4, 4), 1).tolist() == [[True]]
    assert _keep_at(keep, 2).tolist() == [[True, False, False, False]]  # a half is not above a half
    assert torch.equal(_keep_at(keep, 4), keep.flatten(1).bool())
    # side 3: centres at 1/6, 1/2, 5/6, that is between positions 0 and 1 (weights 5/6, 1/6), 1 and 2, 2 and 3
    assert _keep_at(keep, 3).tolist() == [[True, False, False, True, False, False, True, False, False]]


def test_a_mask_in_pixels_is_one_on_tokens(model, images):
    on_tokens = model.editing(images, centre(6)).given
    in_pixels = model.editing(images, centre(6).repeat_interleave(16, 0).repeat_interleave(16, 1)).given
    ragged = centre(6).repeat_interleave(16, 0).repeat_interleave(16, 1)
    ragged[32:64, 24:32] = False  # half of two tokens: more than half has to stay
    assert all(map(torch.equal, on_tokens.keeps, in_pixels.keeps))
    difference = model.editing(images, ragged).given.keeps[-1] != on_tokens.keeps[-1]
    assert difference[0].view(6, 6).nonzero().tolist() == [[2, 1], [3, 1]]


def test_pictures_and_masks_belong_to_images_of_a_run(model, images):
    keeps = torch.stack([centre(96), torch.ones(96, 96, dtype=torch.bool)])
    together = model.edit(images, keeps, [3, 7], seed=4)
    in_parts = model.edit(images, keeps, [3, 7], seed=4, batch_size=1)
    assert (together.int() - in_parts.int()).abs().max() <= 1
    twin = model.editing(images, keeps)
    second = twin.generate([7], seed=4, first_image=1)
    assert (second.int() - together[1:].int()).abs().max() <= 1
    with pytest.raises(ValueError, match="image 2 of the run: there are 2 pictures to edit"):
        twin.generate([7], first_image=2)


def test_a_class_and_no_class_differ_and_one_number_is_for_all(model, images):
    inpainted = model.edit(images, centre(96), seed=1)
    assert torch.equal(inpainted, model.edit(images, centre(96), [-1, -1], seed=1))
    assert not torch.equal(inpainted, model.edit(images, centre(96), 3, seed=1))
    assert torch.equal(model.edit(images, centre(96), [3, 3], seed=1), model.edit(images, centre(96), 3, seed=1))


def test_quantized_models_edit(model, images, golden):
    small = bitlaw.quantize(model, "W4A8")
    state = last(small.editing(images, centre(96)), [3, -1])
    keep = _keep_at(centre(6).float()[None], 6)[0]
    assert torch.equal(state.tokens[-1][:, keep], golden["idx_5"][:, keep])
    assert not torch.equal(small.edit(images, centre(96), 3), model.edit(images, centre(96), 3))


def test_what_does_not_fit_is_refused(model, images):
    with pytest.raises(ValueError, match=r"pictures to edit: \(2, 3, 64, 64\) .*expected \(B, 3, 96, 96\)"):
        model.edit(images[:, :, :64, :64], centre(96))
    with pytest.raises(ValueError, match=r"pictures to edit: .*torch\.float32, expected .*torch\.uint8"):
        model.edit(images.float(), centre(96))
    with pytest.raises(ValueError, match=r"keep: shape \(64, 64\), expected \(96, 96\) in pixels or \(6, 6\)"):
        model.edit(images, centre(64))
    with pytest.raises(ValueError, match="keep: 3 masks for 2 pictures"):
        model.edit(images, centre(96).expand(3, -1, -1))
    with pytest.raises(ValueError, match="3 labels for 2 pictures"):
        model.edit(images, centre(96), [1, 2, 3])
    with pytest.raises(ValueError, match="out of range"):
        model.edit(images, centre(96), 11)
    network = WeightsFile(DATA / "var_d2.fp16.safetensors", load_file(DATA / "var_d2.fp16.safetensors"))
    with pytest.raises(ValueError, match="loaded without its tokenizer"):
        type(model).from_official(network, None).edit(images, centre(96))
