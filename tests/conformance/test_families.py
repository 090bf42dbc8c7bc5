"""What every entry of FAMILIES promises. An entry without a tiny model here fails the first test."""

import pytest
import torch
from torch import nn

from bitlaw.models import FAMILIES
from bitlaw.models.autoencoders.multi_scale_vq import VQTokenizer, VQTokenizerConfig
from bitlaw.models.dit import DiT, DiTSampling
from bitlaw.models.generator import Noise, replay, rollout
from bitlaw.models.networks.dit import DiTConfig, DiTTransformer
from bitlaw.models.networks.var import VARConfig, VARTransformer
from bitlaw.models.parts.diffusion import Diffusion
from bitlaw.models.storage import read_checkpoint, write_checkpoint
from bitlaw.models.var import VAR, VARSampling


def tokenizer():
    return VQTokenizer(VQTokenizerConfig(16, 4, 8, (1, 2), 1, (1, 2, 4), norm_groups=0, attention=False))


def awake(module):
    """Linears at random, so that no branch starts at zero; the key part of VAR's bias stays zero."""
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.normal_(linear.bias, std=0.1)
            if hasattr(linear, "has_bias"):
                linear.bias.data.mul_(linear.has_bias)
    return module.eval().requires_grad_(False)


def tiny_var():
    net = VARTransformer(VARConfig(2, 16, 2, 5, (1, 2, 4), 16, 4))
    return VAR(awake(net), awake(tokenizer()), VARSampling(guidance=2.0, top_k=0, top_p=0.0))


def tiny_dit():
    net = DiTTransformer(DiTConfig(2, 16, 2, 5, 4, 4, 2, learn_sigma=False))
    process = Diffusion(schedule="squaredcos_cap_v2", prediction="v", variance="fixed_small")
    sampling = DiTSampling(guidance=2.0, num_steps=4, sampler="ddim", eta=0.5, guided_channels=None)
    return DiT(awake(net), awake(tokenizer()), process, sampling, latent_scale=0.7)


def tiny_dit_learned_variance():
    net = DiTTransformer(DiTConfig(2, 16, 2, 5, 4, 4, 2))
    latents = awake(tokenizer())
    return DiT(awake(net), latents, Diffusion(), DiTSampling(num_steps=4), latent_scale=0.7)


TINY = {"var": tiny_var, "dit": tiny_dit, "dit-learned-variance": tiny_dit_learned_variance}
LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])


@pytest.fixture(params=TINY)
def model(request):
    torch.manual_seed(0)
    return TINY[request.param]()


def run(model, labels=LABELS, seed=0):
    return list(rollout(model, labels, Noise(seed, range(len(labels)))))


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
    images = model.generate(LABELS, seed=0, batch_size=8)
    for i in range(8):
        alone = list(rollout(model, LABELS[i : i + 1], Noise(0, [i])))
        for one, many in zip(alone, together, strict=True):  # to the rounding of matrix products
            torch.testing.assert_close(one.extracted.features[0], many.extracted.features[i], atol=1e-4, rtol=1e-4)
    difference = (model.generate(LABELS, seed=0, batch_size=1).int() - images.int()).abs()
    assert difference.max() <= 1 and images.shape == (8, 3, model.image_size, model.image_size)


def test_the_same_seed_gives_the_same_images_and_another_one_others(model):
    images = model.generate(LABELS, seed=1)
    assert images.dtype == torch.uint8 and torch.equal(images, model.generate(LABELS, seed=1))
    assert not torch.equal(images, model.generate(LABELS, seed=2))
    assert not torch.equal(images, model.generate(LABELS.flip(0), seed=1))
    tail = model.generate(LABELS[4:], seed=1, first_image=4)
    assert (tail.int() - images[4:].int()).abs().max() <= 1  # a batch of another size rounds otherwise


def test_guidance_one_is_the_conditional_model(model):
    """w = 1 leaves the unconditional half out; with both halves at a w next to 1 the numbers are those."""
    rows = []
    proj = model.net.blocks[0].attn.proj
    handle = proj.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    one = run(model.with_sampling(guidance=1.0))
    assert set(rows) == {len(LABELS)}
    rows.clear()
    near = run(model.with_sampling(guidance=1.0 + 1e-6))
    assert set(rows) == {2 * len(LABELS)}
    handle.remove()
    for a, b in zip(one, near, strict=True):
        torch.testing.assert_close(a.extracted.features, b.extracted.features, atol=1e-4, rtol=1e-4)
    far = run(model.with_sampling(guidance=3.0))
    assert not torch.allclose(one[-1].extracted.features, far[-1].extracted.features, atol=1e-2)


def test_sites_are_all_linears_and_their_uses_are_counted(model):
    """One image without guidance: the rows that reach a site are its `uses`."""
    sites, rows = {site.name: site for site in model.sites()}, {}
    linears = {name: module for name, module in model.net.named_modules() if isinstance(module, nn.Linear)}
    assert set(sites) == set(linears) and len(sites) == len(model.sites())

    def count(name):
        def hook(module, inputs):
            rows[name] = rows.get(name, 0) + inputs[0].numel() // module.in_features

        return hook

    handles = [module.register_forward_pre_hook(count(name)) for name, module in linears.items()]
    run(model.with_sampling(guidance=1.0), LABELS[:1])
    for handle in handles:
        handle.remove()
    assert rows == {name: site.uses for name, site in sites.items()}
    for name, site in sites.items():
        assert site.phase == ("blocks" if name.startswith("blocks.") else site.phase)
        assert site.block == (int(name.split(".")[1]) if name.startswith("blocks.") else None)


def test_attention_operands_can_be_quantized(model):
    """`quant_q`, `quant_k` and `quant_v` see what attention computes with; cached keys and values went through them."""
    plain = run(model)[-1].extracted.features

    class Zero(nn.Module):
        def forward(self, x):
            assert x.shape[-1] == 8  # the last dimension is a head's
            return torch.zeros_like(x)

    for operand in ("quant_q", "quant_k", "quant_v"):
        changed = type(model).from_checkpoint(*model.to_checkpoint())
        for name, module in changed.net.named_modules():
            if name.endswith(".attn"):
                setattr(module, operand, Zero())
        steps = run(changed)
        assert not torch.allclose(steps[-1].extracted.features, plain, atol=1e-3)
        again = replay(changed, steps[-1].before, steps[-1].index)
        assert torch.equal(again.extracted.features, steps[-1].extracted.features)


def test_the_clock_tells_the_step(model):
    seen = []
    linear = model.net.blocks[0].attn.proj
    handle = linear.register_forward_pre_hook(lambda module, inputs: seen.append(model.clock.step))
    run(model)
    handle.remove()
    assert seen == list(range(model.num_steps))


def test_losses_of_images_do_not_depend_on_the_batch(model):
    images = torch.randint(256, (8, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    losses = model.loss(images, LABELS, Noise(0, range(8)))
    assert losses.shape == (8,) and losses.isfinite().all()
    alone = torch.cat([model.loss(images[i : i + 1], LABELS[i : i + 1], Noise(0, [i])) for i in range(8)])
    torch.testing.assert_close(alone, losses, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model.loss(images, LABELS.flip(0), Noise(0, range(8))), losses)


def test_checkpoint_round_trip(model, tmp_path):
    config, tensors = model.to_checkpoint()
    write_checkpoint(tmp_path / "model", config, tensors)
    stored = read_checkpoint(tmp_path / "model")
    again = FAMILIES[stored.config["family"]].from_checkpoint(stored.config, stored.tensors)
    assert type(again) is type(model) and again.sampling == model.sampling and again.image_size == model.image_size
    assert torch.equal(again.generate(LABELS), model.generate(LABELS))
    assert {k: v.tolist() for k, v in again.to_checkpoint()[1].items()} == {k: v.tolist() for k, v in tensors.items()}


def test_checkpoint_with_a_tensor_missing_names_it(model):
    config, tensors = model.to_checkpoint()
    name = next(name for name in tensors if name.endswith("proj.weight") and "blocks.1" in name)
    with pytest.raises(ValueError, match=name.replace(".", r"\.") + ": missing"):
        type(model).from_checkpoint(config, {k: v for k, v in tensors.items() if k != name})


def test_wrong_labels_are_refused(model):
    with pytest.raises(ValueError, match="label 5 out of range: this model has classes 0 to 4"):
        model.generate([0, 5])
    with pytest.raises(ValueError, match="no labels"):
        model.generate([])


def test_sampling_settings_replace_only_what_is_given(model):
    other = model.with_sampling(guidance=3.0)
    assert other.sampling.guidance == 3.0 and other.net is model.net
    assert model.with_sampling(guidance=None).sampling == model.sampling
    assert torch.equal(model.generate([1], guidance=3.0), other.generate([1]))
