"""Paths: full-precision rollouts on which other models are compared."""

import pytest
import torch

from bitlaw.allocation.curves import CurveSettings
from bitlaw.allocation.paths import Paths, curve_sites, model_fingerprint
from bitlaw.methods.quantize import quantize
from bitlaw.models.generator import Noise, rollout
from tiny_models import TINY

FAMILIES = ("var", "dit", "llamagen", "mar")
FEW = CurveSettings(num_images=3, batch_size=2)


@pytest.fixture
def model(request):
    torch.manual_seed(0)
    return TINY[request.param]()


def everything(model):
    return pytest.mark.parametrize("model", model, indirect=True)


@everything(FAMILIES)
def test_the_model_itself_has_no_distortion(model):
    assert Paths(model, FEW).distortion(model).tolist() == [0] * model.num_steps


@everything(FAMILIES)
def test_states_and_outputs_are_those_of_rollouts(model):
    paths = Paths(model, FEW)
    assert [len(batch.noise) for batch in paths.batches] == [2, 1]
    labels = model.check_labels([2])
    reference = list(rollout(model, labels, Noise(FEW.seed, [2])))
    steps = paths.batches[1].steps
    assert [step.index for step in steps] == list(range(model.num_steps))
    for step, expected in zip(steps, reference, strict=True):
        output = expected.extracted.features
        if paths.output_is_drawn:
            output = model.encoded_of(expected.after) - model.encoded_of(expected.before)
        assert torch.equal(step.output, output)
        assert not step.output.is_inference()


def test_only_mar_runs_its_network_while_it_draws():
    assert {name for name in FAMILIES if Paths(TINY[name](), FEW).output_is_drawn} == {"mar"}
    assert {name for name in FAMILIES if Paths(TINY[name](), FEW).has_cache} == {"var", "llamagen"}


@everything(("mar",))
def test_what_mars_head_does_is_seen(model):
    twin = quantize(model, "W2A16", protect=[s.name for s in model.sites() if "res_blocks" not in s.name])
    assert (Paths(model, FEW).distortion(twin) > 0).all()


@everything(("var", "dit"))
def test_distortion_is_the_mean_over_images_and_grows_with_fewer_bits(model):
    paths = Paths(model, FEW)
    twins = [quantize(model, precision) for precision in ("W8A8", "W4A4", "W2A16")]
    per_image_SN = paths.distortion_of_images(twins[1])
    assert per_image_SN.shape == (model.num_steps, 3)
    assert torch.equal(paths.distortion(twins[1]), per_image_SN.mean(1))
    means = [paths.distortion(twin).mean().item() for twin in twins]
    assert 0 < means[0] < means[1] and means[0] < means[2]


@everything(("var",))
def test_a_twin_carries_a_cache_of_its_own(model):
    # Keys of the first stages as the twin made them: with those of the full-precision model the last stage differs.
    paths = Paths(model, FEW)
    twin = paths.as_drawn(quantize(model, "W3A16"))
    batch = paths.batches[0]
    with torch.no_grad():
        cache = own = None
        for step in batch.steps:
            last, own = paths.run(twin, step, own)
            mixed = paths.run(twin, step, cache).features
            cache = paths.run(model, step, cache).cache
    free = paths.distortion_of_images(twin)[-1, :2]
    assert torch.equal(paths.comparison(batch.steps[-1])(last), free)
    assert not torch.equal(paths.comparison(batch.steps[-1])(mixed), free)


@everything(("dit",))
def test_the_settings_sampler_is_that_of_both(model):
    settings = CurveSettings(num_images=2, guidance=1.0, sampling={"num_steps": 2})
    paths = Paths(model, settings)
    assert paths.num_steps == 2 and paths.model.sampling.guidance == 1
    assert len(paths.distortion(quantize(model, "W4A4"))) == 2
    assert model.num_steps == 4


@everything(("dit",))
def test_what_does_not_go_with_the_model_is_refused(model):
    with pytest.raises(ValueError, match="has 4 steps"):
        Paths(model, CurveSettings(step_groups=(0, 4)))
    with pytest.raises(ValueError, match="begin at 0 and ascend"):
        Paths(model, CurveSettings(step_groups=(0, 2, 2)))
    with pytest.raises(ValueError, match="cannot be compared"):
        Paths(model, FEW).distortion(TINY["var"]())


@everything(("dit",))
def test_an_output_that_is_not_finite_is_an_error(model):
    twin = quantize(model, "W8A16")
    twin.net.final_layer.linear.bias.data.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"step 0: .*NaN or Inf"):
        Paths(model, FEW).distortion(twin)


@everything(("dit",))
def test_curves_are_of_sites_that_are_not_protected(model):
    names = {site.name for site in model.sites()}
    inner = {site.name for site in curve_sites(model, FEW)}
    assert inner == {name for name in names if name.startswith("blocks.")}
    assert {site.name for site in curve_sites(model, CurveSettings(protect=("none",)))} == names


@everything(("dit",))
def test_a_fingerprint_knows_numbers_and_sampler(model):
    before = model_fingerprint(model)
    assert before == model_fingerprint(model) != model_fingerprint(model.with_sampling(num_steps=3))
    model.net.blocks[0].mlp.fc1.weight.data[0, 0] += 1
    assert model_fingerprint(model) != before
