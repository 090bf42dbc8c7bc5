"""What every family says of its sites' absorbers: rescaling through them changes nothing that the network gives."""

import copy
from dataclasses import replace

import pytest
import torch
from test_families import LABELS, labels_of
from torch import nn

from bitlaw.methods.method import Rescaling
from bitlaw.methods.rescale import absorber_users, can_fold, input_channels, rescale, shift_problem
from bitlaw.models.generator import Noise, rollout
from bitlaw.models.networks.var import VARConfig, VARTransformer
from bitlaw.models.var import VAR, VARSampling
from bitlaw.prepared import PreparedConv2d, PreparedLinear
from tiny_models import TINY

EXACT = 1e-10
"""Relative to the largest number: what a rollout in float64 makes of its rounding."""


@pytest.fixture(params=TINY)
def model(request, monkeypatch):
    """A tiny model in float64; families that take norms and logits in float32 do that in float64, too."""
    torch.manual_seed(0)
    tiny = TINY[request.param]()
    g = torch.Generator().manual_seed(1)
    for module in tiny.net.modules():  # norms that are not the identity
        if "Norm" in type(module).__name__:
            for parameter in module.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=g))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    tiny.net.double()
    start = tiny.start
    tiny.start = lambda labels, noise: in_float64(start(labels, noise))
    return tiny


def in_float64(state):
    """The state with its numbers in float64."""
    is_float = {key: isinstance(x, torch.Tensor) and x.is_floating_point() for key, x in state._asdict().items()}
    return state._replace(**{key: getattr(state, key).double() for key in is_float if is_float[key]})


def random_rescalings(model, names, shifted=()):
    """Scales between 1/8 and 8 and shifts, equal where an absorber is shared."""
    g, drawn, out = torch.Generator().manual_seed(2), {}, {}
    absorbers = {site.name: site.absorber or site.name for site in model.sites()}
    for name in names:
        channels = input_channels(model.net.get_submodule(name))
        scale = torch.exp2(6 * torch.rand(channels, generator=g, dtype=torch.float64) - 3)
        shift = torch.randn(channels, generator=g, dtype=torch.float64)
        scale, shift = drawn.setdefault(absorbers[name], (scale, shift))
        out[name] = Rescaling(scale, shift if name in shifted else None)
    return out


def with_net(model, rescalings):
    twin = copy.copy(model)
    twin.net = copy.deepcopy(model.net)
    return twin, rescale(twin.net, model.sites(), rescalings)


def worst(model, twin, images=3):
    """Largest relative difference of what two networks give in a rollout with guidance."""
    labels, largest = labels_of(model)[:images], 0.0
    ours, theirs = (rollout(m, labels, Noise(0, range(images))) for m in (model, twin))
    for a, b in zip(ours, theirs, strict=True):
        x, y = a.extracted.features, b.extracted.features
        assert x.dtype == torch.float64
        largest = max(largest, float((x - y).abs().max() / x.abs().max()))
    return largest


def shifted_names(model, folded=True):
    """Sites whose input may be shifted, and those of them for which the absorber does it."""
    names = [site.name for site in model.sites() if shift_problem(model.net.get_submodule(site.name)) is None]
    return [name for name in names if can_fold(model.net, model.sites(), name, shift=True)] if folded else names


def test_absorbed_scales_change_nothing(model):
    names = [site.name for site in model.sites() if site.absorber is not None]
    twin, folded = with_net(model, random_rescalings(model, names))
    assert folded == set(names) and len(names) >= 4
    assert worst(model, twin) < EXACT
    assert not any(isinstance(module, PreparedLinear | PreparedConv2d) for module in twin.net.modules())
    before, after = model.net.state_dict(), twin.net.state_dict()
    assert list(before) == list(after)
    for name in names:
        assert not torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])


def test_absorbed_shifts_change_nothing(model):
    names = shifted_names(model)
    twin, folded = with_net(model, random_rescalings(model, names, names))
    assert folded == set(names)
    assert worst(model, twin) < EXACT


def test_explicit_scales_and_shifts_change_nothing(model):
    """Of every site at once, as if nothing could be absorbed."""
    blind = copy.copy(model)
    blind.sites = lambda: [replace(site, absorber=None) for site in model.sites()]
    names = [site.name for site in model.sites()]
    twin, folded = with_net(blind, random_rescalings(blind, names, shifted_names(blind, folded=False)))
    assert not folded and list(model.net.state_dict()) == list(twin.net.state_dict())
    assert all(isinstance(twin.net.get_submodule(name), PreparedLinear | PreparedConv2d) for name in names)
    assert worst(model, twin) < EXACT


def test_every_absorber_is_the_only_thing_that_its_scale_reaches(model):
    """One after the other: the input of each of its sites is that over the scale, and no other site's changes."""
    model = model if model.null_label is None else model.with_sampling(guidance=2.0)
    sites = model.sites()
    before = inputs_of(model)
    for absorber, names in absorber_users(sites).items():
        rescalings = random_rescalings(model, names)
        twin, _ = with_net(model, rescalings)
        after = inputs_of(twin)
        for site in sites:
            expected = before[site.name]
            if site.name in names:
                scale = rescalings[site.name].scale_C
                is_conv = isinstance(model.net.get_submodule(site.name), nn.Conv2d)
                expected = expected / (scale[:, None, None] if is_conv else scale)
            error = (after[site.name] - expected).abs().max() / expected.abs().max()
            assert error < EXACT, (absorber, site.name)


def inputs_of(model):
    """The first input of every site in a rollout."""
    seen, handles = {}, []

    def watch(name):
        def hook(module, inputs):
            seen.setdefault(name, inputs[0].clone())

        return hook

    for site in model.sites():
        layer = model.net.get_submodule(site.name)
        handles.append(layer.register_forward_pre_hook(watch(site.name)))
    list(rollout(model, labels_of(model)[:1], Noise(0, [0])))
    for handle in handles:
        handle.remove()
    return seen


def test_absorbers_do_not_overlap(model):
    """Each output of a linear, and each norm, is in one part of one absorber."""
    taken = {}
    for absorber in absorber_users(model.sites()):
        for part in absorber.parts:
            size = len(model.net.get_submodule(part.module).weight)
            first, end = part.rows or (0, size)
            assert 0 <= first < end <= size
            rows = set(range(first, end))
            assert not rows & taken.setdefault(part.module, set())
            taken[part.module] |= rows


def test_a_shared_modulation_of_var_absorbs_nothing(monkeypatch):
    """All blocks use it; the values of the attention are still there for the projection behind it."""
    torch.manual_seed(0)
    net = VARTransformer(VARConfig(2, 16, 2, 5, (1, 2, 4), 16, 4, shared_adaln=True)).eval().requires_grad_(False)
    model = VAR(net, None, VARSampling(guidance=2.0, top_k=0, top_p=0.0))
    kinds = {site.kind for site in model.sites() if site.absorber is not None}
    assert kinds == {"proj", "head"}


def test_labels_are_guided():
    """What is compared above has both halves of guidance wherever there are classes."""
    for make in TINY.values():
        model = make()
        assert model.null_label is None or model.sampling.guidance != 1
    assert len(LABELS) == 8
