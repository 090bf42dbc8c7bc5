"""What every entry of FAMILIES promises. An entry without a tiny model here fails the first test."""

import re

import pytest
import torch
from torch import nn

from bitlaw.models import FAMILIES
from bitlaw.models.generator import Noise, replay, rollout
from bitlaw.models.storage import read_checkpoint, write_checkpoint
from tiny_models import TINY

# A transformer's, the blocks of MAR's head, a UNet's.
BLOCKS = (
    r"(?:(?:encoder|decoder)_)?(?:blocks|layers)\.\d+\.",
    r"diffloss\.net\.res_blocks\.\d+\.",
    r"unet\.(?:mid_block|\w+_blocks\.\d+)\.",
)
LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])


@pytest.fixture(params=TINY)
def model(request):
    torch.manual_seed(0)
    return TINY[request.param]()


def labels_of(model):
    """Labels of eight images; all 0 where there are no classes."""
    return LABELS % model.num_classes


def guided(model):
    """The model; skips the test if it has no unconditional half."""
    return model if model.null_label is not None else pytest.skip("no classes to be guided by")


def run(model, labels=None, seed=0):
    labels = labels_of(model) if labels is None else labels
    return list(rollout(model, labels, Noise(seed, range(len(labels)))))


def attention_output(model, block):
    """Name of the linear after a block's attention."""
    return next(site.name for site in model.sites() if site.kind == "proj" and site.block == block)


def tensors_of(state):
    return [value.clone() for value in state if isinstance(value, torch.Tensor)]


def test_every_family_is_tested_here():
    assert {make().family for make in TINY.values()} == set(FAMILIES)
    assert all(name == family.family for name, family in FAMILIES.items())


def test_extract_twice_gives_the_same_and_changes_nothing(model):
    steps = run(model)
    for step in [*steps, *reversed(steps)]:  # in any order, long after later states grew
        before = tensors_of(step.before)
        for _ in range(2):
            again = replay(model, step.before, step.index)
            assert torch.equal(again.extracted.features, step.extracted.features)
            assert all(torch.equal(a, b) for a, b in zip(tensors_of(again.after), tensors_of(step.after), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(step.before), strict=True))


def test_a_batch_of_eight_is_eight_batches_of_one(model):
    together = run(model)
    labels = labels_of(model)
    images = model.generate(labels, seed=0, batch_size=8)
    for i in range(8):
        alone = list(rollout(model, labels[i : i + 1], Noise(0, [i])))
        for one, many in zip(alone, together, strict=True):  # to the rounding of matrix products
            torch.testing.assert_close(one.extracted.features[0], many.extracted.features[i], atol=1e-4, rtol=1e-4)
    difference = (model.generate(labels, seed=0, batch_size=1).int() - images.int()).abs()
    assert difference.max() <= 1 and images.shape == (8, 3, model.image_size, model.image_size)


def test_the_same_seed_gives_the_same_images_and_another_one_others(model):
    labels = labels_of(model)
    images = model.generate(labels, seed=1)
    assert images.dtype == torch.uint8 and torch.equal(images, model.generate(labels, seed=1))
    assert not torch.equal(images, model.generate(labels, seed=2))
    assert torch.equal(images, model.generate(labels.flip(0), seed=1)) == (model.num_classes == 1)
    tail = model.generate(labels[4:], seed=1, first_image=4)
    assert (tail.int() - images[4:].int()).abs().max() <= 1  # a batch of another size rounds otherwise


def test_guidance_one_is_the_conditional_model(model):
    """w = 1 leaves the unconditional half out; with both halves at a w next to 1 the numbers are those."""
    model, rows = guided(model), []
    proj = model.net.get_submodule(attention_output(model, 0))
    handle = proj.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    one = run(model.with_sampling(guidance=1.0))
    assert set(rows) == {len(LABELS)}
    rows.clear()
    near = run(model.with_sampling(guidance=1.0 + 1e-6))
    assert set(rows) == {2 * len(LABELS)}
    handle.remove()
    for a, b in zip(one, near, strict=True):
        conditional = b.extracted.features[..., : a.extracted.features.shape[-1]]  # of MAR's features the first half
        torch.testing.assert_close(a.extracted.features, conditional, atol=1e-4, rtol=1e-4)
    far = run(model.with_sampling(guidance=3.0))
    last = far[-1].extracted.features[..., : one[-1].extracted.features.shape[-1]]
    assert not torch.allclose(one[-1].extracted.features, last, atol=1e-2)


def test_sites_are_all_linears_and_convolutions_and_their_uses_are_counted(model):
    """One image without guidance: the rows that reach a site are its `uses`."""
    sites, rows = {site.name: site for site in model.sites()}, {}
    layers = {n: module for n, module in model.net.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert set(sites) == set(layers) and len(sites) == len(model.sites())

    def count(name):
        def hook(module, inputs, output):
            rows[name] = rows.get(name, 0) + output.numel() // module.weight.shape[0]

        return hook

    handles = [module.register_forward_hook(count(name)) for name, module in layers.items()]
    run(model.with_sampling(guidance=1.0), labels_of(model)[:1])
    for handle in handles:
        handle.remove()
    assert rows == {name: site.uses for name, site in sites.items()}
    numbers = {}  # of the blocks, in the order in which they run
    for site in model.sites():
        block = re.match("|".join(BLOCKS), site.name)
        assert site.phase == ("blocks" if block else site.phase)
        assert site.block == (numbers.setdefault(block.group(), len(numbers)) if block else None)


def test_attention_operands_can_be_quantized(model):
    """`quant_q`, `quant_k` and `quant_v` see what attention computes with; cached keys and values went through them."""
    plain = run(model)[-1].extracted.features

    class Zero(nn.Module):
        def forward(self, x):
            assert x.shape[-1] == 8  # the last dimension is a head's
            return torch.zeros_like(x)

    for operand in ("quant_q", "quant_k", "quant_v"):
        changed = type(model).from_checkpoint(*model.to_checkpoint())
        for module in changed.net.modules():
            if hasattr(module, operand):
                setattr(module, operand, Zero())
        steps = run(changed)
        assert not torch.allclose(steps[-1].extracted.features, plain, atol=1e-3)
        again = replay(changed, steps[-1].before, steps[-1].index)
        assert torch.equal(again.extracted.features, steps[-1].extracted.features)


def test_the_clock_tells_the_step(model):
    seen = []
    linear = model.net.get_submodule(attention_output(model, 0))
    handle = linear.register_forward_pre_hook(lambda module, inputs: seen.append(model.clock.step))
    run(model)
    handle.remove()
    assert seen == list(range(model.num_steps))


def test_losses_of_images_do_not_depend_on_the_batch(model):
    images = torch.randint(256, (8, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = labels_of(model)
    losses = model.loss(images, labels, Noise(0, range(8)))
    assert losses.shape == (8,) and losses.isfinite().all()
    alone = torch.cat([model.loss(images[i : i + 1], labels[i : i + 1], Noise(0, [i])) for i in range(8)])
    torch.testing.assert_close(alone, losses, atol=1e-4, rtol=1e-4)
    flipped = model.loss(images, labels.flip(0), Noise(0, range(8)))
    assert torch.allclose(flipped, losses) == (model.num_classes == 1)


def test_checkpoint_round_trip(model, tmp_path):
    config, tensors = model.to_checkpoint()
    write_checkpoint(tmp_path / "model", config, tensors)
    stored = read_checkpoint(tmp_path / "model")
    again = FAMILIES[stored.config["family"]].from_checkpoint(stored.config, stored.tensors)
    assert type(again) is type(model) and again.sampling == model.sampling and again.image_size == model.image_size
    assert torch.equal(again.generate(labels_of(model)), model.generate(labels_of(model)))
    assert {k: v.tolist() for k, v in again.to_checkpoint()[1].items()} == {k: v.tolist() for k, v in tensors.items()}


def test_checkpoint_with_a_tensor_missing_names_it(model):
    config, tensors = model.to_checkpoint()
    name = attention_output(model, 1) + ".weight"
    with pytest.raises(ValueError, match=name.replace(".", r"\.") + ": missing"):
        type(model).from_checkpoint(config, {k: v for k, v in tensors.items() if k != name})


def test_wrong_labels_are_refused(model):
    above = model.num_classes
    with pytest.raises(ValueError, match=f"label {above} out of range: this model has classes 0 to {above - 1}"):
        model.generate([0, above])
    with pytest.raises(ValueError, match="no labels"):
        model.generate([])


def test_sampling_settings_replace_only_what_is_given(model):
    other = guided(model).with_sampling(guidance=3.0)
    assert other.sampling.guidance == 3.0 and other.net is model.net
    assert model.with_sampling(guidance=None).sampling == model.sampling
    assert torch.equal(model.generate([1], guidance=3.0), other.generate([1]))
