"""Layers in training: they compute what will be stored, and gradients go where they should."""

import copy

import pytest
import torch
from torch import nn

import bitlaw
from bitlaw.distill.qat import SCALE, FakeWeight, freeze, parameter_groups, quantized_layers, student_of
from bitlaw.formats import FORMATS
from bitlaw.formats.codebook import Codebook
from bitlaw.formats.integer import IntegerFormat
from bitlaw.precision import Precision
from bitlaw.quantized import WeightSpec
from tiny_models import TINY

SCALED = {name: format for name, format in FORMATS.items() if not format.codebook_shape and format.param_names}


def fake(format, weight, scales="learned", group_size=None, clip=1.0):
    spec = WeightSpec(format, group_size)
    return FakeWeight(spec, spec.fit(weight, clip), scales)


@pytest.mark.parametrize("scales", ["learned", "recomputed"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_latent_weight_is_simulated_as_it_will_be_stored(name, scales):
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    layer = fake(FORMATS[name], weight, scales)
    if layer.log_factor_G1 is not None:
        layer.log_factor_G1.data.uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(layer(weight), layer.quantized(weight).decode())


@pytest.mark.parametrize("name", FORMATS)
def test_at_the_start_it_is_the_weight_as_quantized(name):
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    spec = WeightSpec(FORMATS[name])
    quantized = spec.quantize(weight)
    layer = FakeWeight(spec, quantized.params, "learned")
    assert torch.equal(layer(quantized.decode()), quantized.decode())


@pytest.mark.parametrize("name", SCALED)
def test_gradients_are_those_of_lsq(name):
    """Finite differences of the scale where nothing is rounded anew; the latent weight's go straight through."""
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    layer = fake(SCALED[name], weight, clip=0.5)  # so that some are clipped
    latent = weight.clone().requires_grad_()
    out = layer(latent)
    push = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    (out * push).sum().backward()
    within = SCALED[name].within(layer.spec.groups(weight), layer.params(weight)).view_as(weight)
    assert not within.all()
    assert torch.equal(latent.grad, push * within)
    # d out / d log s = out - w inside, which is what codes times a growing scale add to a weight that grows with it.
    expected = (push * torch.where(within, out.detach() - weight, out.detach())).sum(1, keepdim=True)
    torch.testing.assert_close(layer.log_factor_G1.grad, expected)


def test_a_clipped_number_moves_with_its_scale():
    weight = torch.tensor([[-8.0, 0.2, 0.4, 8.0]])
    layer = fake(IntegerFormat(4, symmetric=True), weight / 10)
    weight.requires_grad_()
    out = layer(weight)
    out[0, 3].backward()
    step = 1e-2
    layer.log_factor_G1.data += step
    moved = float((layer(weight) - out)[0, 3].detach())
    assert float(layer.log_factor_G1.grad) == pytest.approx(moved / step, rel=2e-2)
    assert float(weight.grad[0, 3]) == 0


def test_codebooks_keep_their_scale():
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    layer = fake(Codebook(2, 2), weight)
    assert layer.log_factor_G1 is None
    latent = weight.clone().requires_grad_()
    layer(latent).sum().backward()
    assert torch.equal(latent.grad, torch.ones_like(weight))


QUICK = bitlaw.Calibration(num_images=4, batch_size=4)


@pytest.mark.parametrize("family", TINY)
def test_a_student_computes_what_it_starts_from_and_freezes_to_it(family):
    teacher = TINY[family]()
    start = bitlaw.quantize(teacher, "W3A8", protect="none")
    student = student_of(start, teacher)
    labels, noise = [0, 0], {"seed": 3}
    expected = start.generate(labels, **noise)
    assert torch.equal(student.generate(labels, **noise), expected)
    frozen = freeze(student, teacher)
    assert torch.equal(frozen.generate(labels, **noise), expected)
    assert all(layer.quantized is not None for _, layer in quantized_layers(frozen.net))
    names = dict(start.net.state_dict()).keys()
    assert frozen.net.state_dict().keys() == names


@pytest.mark.parametrize("method", ["rtn", "gptq", "smoothquant+rtn", "gptvq:dim=2", "svdquant:rank=2+rtn"])
def test_any_method_can_be_the_start(method, tmp_path):
    teacher = TINY["var"]()
    start = bitlaw.quantize(teacher, "W2A16", method=method, protect="none", calibration=QUICK)
    student = student_of(start, teacher)
    expected = start.generate([0, 1], seed=1)
    assert torch.equal(student.generate([0, 1], seed=1), expected)
    for _, layer in quantized_layers(student.net):
        layer.parametrizations.weight.original.data += 0.05
    moved = student.generate([0, 1], seed=1)
    frozen = freeze(student, teacher)
    assert torch.equal(frozen.generate([0, 1], seed=1), moved)
    frozen.save(tmp_path / "small")
    assert torch.equal(bitlaw.load(tmp_path / "small").generate([0, 1], seed=1), moved)


def test_latent_weights_are_the_teachers_where_these_round_to_the_codes():
    teacher = TINY["var"]()
    start = bitlaw.quantize(teacher, "W3A16", method="gptq", protect="none", calibration=QUICK)
    kept = []
    for name, layer in quantized_layers(student_of(start, teacher).net):
        latent, original = layer.parametrizations.weight.original, teacher.net.get_submodule(name).weight
        own = start.net.get_submodule(name).weight
        assert torch.equal(layer.weight, own)
        is_own, is_original = latent == own, latent == original
        assert (is_own | is_original).all()
        kept.append(is_original.float().mean())
    assert 0.3 < sum(kept) / len(kept) < 1  # gptq moves some weights to other codes, and not most


def test_what_is_trained():
    teacher = TINY["dit"]()
    start = bitlaw.quantize(teacher, "W4A16")
    everything = {n: p for n, p in student_of(start, teacher).net.named_parameters() if p.requires_grad}
    assert "pos_embed" not in everything and "x_embedder.proj.weight" in everything
    student = student_of(start, teacher, trainable="scales")
    some = {name: p for name, p in student.net.named_parameters() if p.requires_grad}
    assert all(name.endswith(SCALE) or p.numel() == max(p.shape) for name, p in some.items())
    assert sum(name.endswith(SCALE) for name in some) == sum(
        layer.quantized is not None for _, layer in quantized_layers(student.net)
    )
    groups = parameter_groups(student.net, scale_lr_ratio=2.0, weight_decay=0.1)
    assert sorted(name for group in groups for name in group.parameters) == sorted(some)
    assert [group.lr_ratio for group in groups if group.parameters] == [1.0, 2.0]


def test_the_keys_of_var_keep_no_bias():
    teacher = TINY["var"]()
    student = student_of(bitlaw.quantize(teacher, "W4A16"), teacher)
    for name, module in student.net.named_modules():
        if name.endswith("mat_qkv"):
            module.bias.grad = None
            module(torch.ones(1, 1, module.in_features)).square().sum().backward()
            width = module.in_features
            assert not module.bias.grad[width : 2 * width].any() and module.bias.grad[:width].any()


def test_a_model_in_full_precision_is_refused():
    teacher = TINY["dit"]()
    with pytest.raises(ValueError, match="nothing in this model is quantized"):
        student_of(copy.copy(teacher), teacher)


def test_only_activations_quantized():
    teacher = TINY["dit"]()
    start = bitlaw.quantize(teacher, Precision.parse("W16A8"), protect="none")
    student = student_of(start, teacher)
    layer = next(layer for _, layer in quantized_layers(student.net))
    assert isinstance(layer.weight, nn.Parameter) and layer.weight.requires_grad
    frozen = freeze(student, teacher)
    assert torch.equal(frozen.generate([0], seed=0), start.generate([0], seed=0))
