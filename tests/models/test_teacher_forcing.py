"""Teacher-forced passes: what every family's network can be trained and distilled with."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bitlaw.calibration.settings import Calibration
from bitlaw.methods.quantize import quantize
from bitlaw.models.generator import Noise, rollout
from bitlaw.models.llamagen import LlamaGen
from bitlaw.models.networks.llamagen import LlamaGenConfig, LlamaGenTransformer
from bitlaw.models.networks.unet import UNet, UNetConfig
from bitlaw.models.parts.diffusion import Diffusion
from bitlaw.models.text import TextCondition
from tiny_models import TINY, awake

IMAGES = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))

# What cannot change the output of a UNet: a bias of all keys, and, where a context is one token, which gets all of an
# attention's weight, what asks for it. Their gradients are zero to rounding.
IDLE = (
    "to_k.bias",
    *(
        f"transformer_blocks.0.{name}"
        for name in ("attn2.to_q.weight", "attn2.to_k.weight", "norm2.weight", "norm2.bias")
    ),
)


@pytest.fixture(params=TINY)
def model(request):
    torch.manual_seed(0)
    return TINY[request.param]()


def labels_of(model):
    """Labels of four images, the last of them the null label where there is one."""
    labels = torch.arange(4) % model.num_classes
    if model.null_label is not None:
        labels[3] = model.null_label
    return labels


def batch_of(model, rows=slice(0, 4), seed=0, first_image=0):
    encoded = model.encode_images(IMAGES[rows])
    return model.teacher_forced(encoded, labels_of(model)[rows], Noise(seed, range(first_image, first_image + 4)[rows]))


def twin_of(model):
    return type(model).from_checkpoint(*model.to_checkpoint())


def errors(a, b):
    """Mean squared error of each image (B,), by part of a prediction."""
    assert a.keys() == b.keys()
    return {name: (a[name] - b[name]).square().flatten(1).mean(1) for name in a}


def gradients(model, batch):
    model.net.zero_grad()
    model.training_loss(batch, model.predict(batch)).mean().backward()
    return {name: p.grad.clone() for name, p in model.net.named_parameters() if p.grad is not None}


def test_predictions_have_the_shapes_that_they_promise(model):
    encoded = model.encode_images(IMAGES)
    prediction = model.predict(model.teacher_forced(encoded, labels_of(model), Noise(0, range(4))))
    assert all(part.dtype == torch.float32 and part.isfinite().all() for part in prediction.values())
    if model.vocab_size is not None:
        assert encoded.dtype == torch.int64 and int(encoded.max()) < model.vocab_size
        assert {name: part.shape for name, part in prediction.items()} == {"logits": (*encoded.shape, model.vocab_size)}
        return
    assert encoded.dtype == torch.float32 and len(encoded) == 4
    if model.family == "mar":
        length, channels = model.net.config.num_tokens, model.net.config.token_channels
        shapes = {"conditions": (4, length, 16), "noise": (4, length, channels), "variance": (4, length, channels)}
    else:
        is_learned = model.process.variance == "learned_range"
        shapes = {name: encoded.shape for name in ("noise", "variance")[: 1 + is_learned]}
    assert {name: part.shape for name, part in prediction.items()} == shapes


def test_the_loss_is_the_training_loss_of_a_prediction(model):
    """But for DiT's, which is the squared error alone; MAR's scales of predictions round."""
    labels, noise = labels_of(model), Noise(0, range(4))
    loss = model.loss(IMAGES, labels, noise)
    batch = batch_of(model)
    composed = model.training_loss(batch, model.predict(batch))
    if model.family in ("dit", "large-dit"):
        both = model.losses(IMAGES, labels, noise)
        assert torch.equal(loss, both.mse_B)
        loss = both.mse_B if both.vb_B is None else both.mse_B + both.vb_B
        assert (both.vb_B is not None) == model.net.config.learn_sigma
    if model.family == "mar":
        torch.testing.assert_close(composed, loss, rtol=1e-5, atol=0)
    else:
        assert torch.equal(composed, loss)


def test_what_training_starts_from_can_be_drawn_by_the_model_itself(model):
    model = model.with_sampling(guidance=1.0)
    labels = labels_of(model)
    steps = list(rollout(model, labels, Noise(0, range(4))))
    drawn, encoded = model.encoded_of(steps[-1].after), model.encode_images(IMAGES)
    assert drawn.shape == encoded.shape and drawn.dtype == encoded.dtype
    assert not drawn.is_inference() and not encoded.is_inference() and not drawn.requires_grad
    batch = model.teacher_forced(drawn, labels, Noise(0, range(4)))
    prediction = model.predict(batch)
    if model.vocab_size is not None:  # one pass over all steps is the rollout that drew the tokens
        logits = torch.cat([step.extracted.features for step in steps], 1)
        torch.testing.assert_close(prediction["logits"], logits, atol=1e-4, rtol=1e-4)
    model.require_gradients()  # after a rollout, whose tables are of inference mode
    assert all(gradient.isfinite().all() for gradient in gradients(model, batch).values())


def test_a_gradient_reaches_every_parameter_that_is_trained(model):
    model.require_gradients()
    found = {name for name, gradient in gradients(model, batch_of(model)).items() if gradient.abs().max() > 1e-7}
    fixed = {name for name, parameter in model.net.named_parameters() if not parameter.requires_grad}
    assert fixed == ({"pos_embed"} if model.family == "dit" else set())  # a table of sines
    idle = {name for name, _ in model.net.named_parameters()} - found - fixed
    assert all(name.startswith("unet.") and name.endswith(IDLE) for name in idle)


def test_keys_of_var_have_no_bias_to_train():
    torch.manual_seed(0)
    model = TINY["var"]()
    model.require_gradients()
    gradient = gradients(model, batch_of(model))["blocks.0.attn.mat_qkv.bias"]
    assert gradient[16:32].abs().max() == 0 and gradient[:16].abs().max() > 0


def test_a_prediction_depends_on_the_batch_alone(model):
    batch = batch_of(model)
    first = model.predict(batch)
    list(rollout(model, labels_of(model), Noise(1, range(4))))  # which leaves the clock elsewhere
    again = model.predict(batch)
    assert all(torch.equal(again[name], first[name]) for name in first)
    model.net.train()  # drops nothing; in it diffusers' blocks lay some numbers out otherwise, and sums round otherwise
    training, exact = model.predict(batch), model.family not in ("ddpm", "ldm")
    for name in first:
        torch.testing.assert_close(training[name], first[name], atol=0 if exact else 1e-5, rtol=0)
    one, other = twin_of(model), twin_of(model)
    zero = errors(one.predict(batch), other.predict(batch))
    assert all(error.abs().max() == 0 for error in zero.values())
    if model.vocab_size is None:  # other noise is another question
        other = errors(model.predict(batch_of(model, seed=1)), first)
        assert all(error.min() > 0 for error in other.values())


def test_a_batch_of_four_is_two_of_two(model):
    whole = batch_of(model)
    together = model.predict(whole)
    losses = model.training_loss(whole, together)
    for rows in (slice(0, 2), slice(2, 4)):
        part = batch_of(model, rows)
        apart = model.predict(part)
        for name, value in apart.items():  # to the rounding of matrix products
            torch.testing.assert_close(value, together[name][rows], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.training_loss(part, apart), losses[rows], atol=1e-4, rtol=1e-4)


def test_training_follows_the_gradient(model):
    """A few steps on one batch lower its loss, and change the prediction."""
    model.require_gradients()
    batch = batch_of(model)
    first = model.training_loss(batch, model.predict(batch)).mean()
    optimizer = torch.optim.SGD((p for p in model.net.parameters()), lr=1e-2)
    for _ in range(5):
        gradients(model, batch)
        nn.utils.clip_grad_norm_(model.net.parameters(), 1.0)
        optimizer.step()
    assert model.training_loss(batch, model.predict(batch)).mean() < first


def test_autocast_is_near(model):
    model.require_gradients()
    batch = batch_of(model)
    exact, exact_gradients = model.predict(batch), gradients(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        short = model.predict(batch)
        loss = model.training_loss(batch, short)
    assert all(part.dtype == torch.float32 for part in short.values())
    for name, error in errors(short, exact).items():
        assert 0 < error.mean() < 0.05**2 * exact[name].square().mean(), name  # a few of bfloat16's roundings of 2^-9
    model.net.zero_grad()
    loss.mean().backward()
    ours = torch.cat([p.grad.flatten() for p in model.net.parameters() if p.grad is not None])
    theirs = torch.cat([gradient.flatten() for gradient in exact_gradients.values()])
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.95


@pytest.mark.parametrize("name", TINY)
def test_recomputed_blocks_give_the_same_gradients(name):
    torch.manual_seed(0)
    model = TINY[name]()
    model.require_gradients()
    batch = batch_of(model)
    plain = gradients(model, batch)
    calls = []
    for block in map(model.net.get_submodule, model.blocks):
        forward = block.forward

        def recomputed(*args, forward, **kwargs):
            calls.append(0)
            return forward(*args, **kwargs)

        block.forward = partial(checkpoint, partial(recomputed, forward=forward), use_reentrant=False)
    again = gradients(model, batch)
    assert len(calls) >= 2 * len(model.blocks) and plain.keys() == again.keys()
    assert all(torch.equal(again[key], plain[key]) for key in plain)


# ---- MAR: as many hidden tokens as there are --------------------------------------------------------


def test_an_image_of_mar_counts_by_its_hidden_tokens():
    torch.manual_seed(0)
    model = TINY["mar"]()
    twin = twin_of(model)
    with torch.no_grad():
        for parameter in twin.net.parameters():
            parameter.mul_(1.1)
    batch = batch_of(model)
    assert len(set(batch.counts)) > 1 and max(batch.counts) <= 16
    ours, theirs = model.predict(batch), twin.predict(batch)
    for i, count in enumerate(batch.counts):
        hidden = batch.orders_BL[i, :count]
        alone = batch._replace(**{k: v[i : i + 1] for k, v in batch._asdict().items()})
        class_BD = (net.class_vectors(alone.labels_B) for net in (model.net, twin.net))
        z, other = (
            net.run(alone.tokens_BLC, alone.orders_BL[:, count:], vector_BD, hidden[None])
            for net, vector_BD in zip((model.net, twin.net), class_BD, strict=True)
        )
        torch.testing.assert_close(errors(ours, theirs)["conditions"][i], (z - other).square().mean())
        unhidden = torch.ones(16, dtype=torch.bool).scatter(0, hidden, False)
        for part in ours.values():
            assert part[i, unhidden].eq(0).all() and part[i, hidden].ne(0).any(-1).all()
        scaled = z[0] * math.sqrt(16 / count)
        torch.testing.assert_close(ours["conditions"][i, hidden], scaled, atol=1e-5, rtol=1e-4)


# ---- texts ------------------------------------------------------------------------------------------


def test_a_model_of_texts_is_trained_with_features():
    torch.manual_seed(0)
    tokenizer = TINY["llamagen"]().autoencoder
    sizes = {"side": 4, "num_classes": 0, "vocab_size": 16, "hidden": 32, "text_tokens": 3, "text_width": 8}
    model = LlamaGen(awake(LlamaGenTransformer(LlamaGenConfig(2, 16, 2, **sizes))), tokenizer)
    mask = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1]], dtype=torch.bool)
    texts = TextCondition.of(torch.randn(4, 3, 8), mask)
    tokens = model.encode_images(IMAGES)
    model.require_gradients()
    batch = model.teacher_forced(tokens, texts, Noise(0, range(4)))
    assert model.predict(batch)["logits"].shape == (4, 16, 16)
    assert torch.equal(model.training_loss(batch, model.predict(batch)), model.loss(IMAGES, texts, Noise(0, range(4))))
    found = gradients(model, batch)
    assert all(found[name].abs().max() > 0 for name, _ in model.net.named_parameters())


# ---- steps ------------------------------------------------------------------------------------------


def test_timesteps_belong_to_the_nearest_step_of_a_rollout():
    spaced = Diffusion().respaced("4")
    assert spaced.timesteps == [0, 333, 666, 999]
    steps = spaced.nearest_steps(torch.tensor([0, 166, 167, 500, 832, 833, 999]))
    assert steps.tolist() == [3, 3, 2, 1, 1, 0, 0]
    assert all(spaced.nearest_steps(torch.tensor([t])).item() == 3 - i for i, t in enumerate(spaced.timesteps))


@pytest.mark.parametrize("name", ["dit", "ldm", "mar"])
def test_images_meet_the_activation_ranges_of_their_step(name):
    """Ranges of two groups of steps: a batch over both is its images, each alone with the clock where it belongs."""
    torch.manual_seed(0)
    model = TINY[name]()
    small = quantize(model, "W16A6c", step_groups=2, calibration=Calibration(num_images=4))
    assert {len(module.step_groups) for module in small.net.modules() if hasattr(module, "step_groups")} == {2}
    batch = batch_of(model, first_image=2)  # of these the first, third and fourth are noisier than the second
    together = small.predict(batch)
    alone = [small.predict(batch_of(model, slice(i, i + 1), first_image=2)) for i in range(4)]
    for part, value in together.items():
        torch.testing.assert_close(torch.cat([one[part] for one in alone]), value, atol=1e-4, rtol=1e-4)
    seen = []
    for layer in small.net.modules():
        if hasattr(layer, "step_groups"):
            layer.register_forward_pre_hook(lambda *_: seen.append(small.clock.step))
    again = small.predict(batch)
    assert all(torch.equal(again[part], together[part]) for part in together)
    if name == "mar":  # whose training hides most of the tokens, as its early steps do
        hidden = small.hidden_counts[:-1]
        nearest = {min(range(4), key=lambda step: (abs(hidden[step] - count), -step)) for count in batch.counts}
        assert set(seen) == nearest and len(nearest) > 1
    else:
        assert min(seen) < small.num_steps // 2 <= max(seen)


@pytest.mark.parametrize("name", ["var", "llamagen"])
def test_tokens_of_all_steps_together_meet_the_last_steps_ranges(name):
    torch.manual_seed(0)
    model = TINY[name]()
    seen = []
    model.net.get_submodule(model.sites()[-1].name).register_forward_pre_hook(lambda *_: seen.append(model.clock.step))
    model.predict(batch_of(model))
    assert seen == [model.num_steps - 1]


# ---- networks that are not ours ---------------------------------------------------------------------


def test_unets_drop_nothing_whatever_their_settings_say():
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 8}
    types = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    settings = {**sizes, **types, "in_channels": 3, "out_channels": 3, "dropout": 0.5}
    torch.manual_seed(0)
    net = UNet(UNetConfig(settings)).train()
    x = torch.randn(2, 3, 8, 8)
    assert net.config.settings["dropout"] == 0.5 and torch.equal(net(x, 3), net(x, 3))
