"""Curves from backward passes: directions against the measures, sketches against measured curves."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from bitlaw.allocation import sketch as sketch_module
from bitlaw.allocation.curves import CurveSettings, RateDistortion, TensorKey
from bitlaw.allocation.distortion import MEASURES
from bitlaw.allocation.exact import measure_curves
from bitlaw.allocation.paths import Paths
from bitlaw.allocation.sketch import ALL_STEPS, ALONG, Comparison, check_sketch, compare, sketch_curves
from tiny_models import TINY

MANY, TOLERANCE = 200, 0.35
"""Directions of each of 4 images: standard errors are 5 % where all count alike, and 10 % where a few of them do."""

FAMILIES = ("var", "dit", "large-dit", "llamagen", "mar", "ddpm", "ldm-of-classes")


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("BITLAW_CACHE", "")


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return {name: TINY[name]() for name in (*FAMILIES,)}


def settings_for(model, **given):
    """A site of each kind and its inputs in each half of the steps."""
    last = {site.kind: site.name for site in model.sites() if site.phase == "blocks"}
    rest = [site.name for site in model.sites() if site.name not in last.values()]
    usual = {"num_images": 4, "widths": (8,), "step_groups": (0, model.num_steps // 2), "protect": tuple(rest)}
    return CurveSettings(**usual | given)


# ---- directions -------------------------------------------------------------------------------------------


def all_signs(count):
    """Every choice of so many signs, (2^count, count)."""
    return 1.0 - 2 * ((torch.arange(2**count)[:, None] >> torch.arange(count)) & 1).double()


@pytest.mark.parametrize("name", MEASURES)
def test_the_mean_over_all_signs_is_the_measure_to_second_order(name):
    g = torch.Generator().manual_seed(1)
    shape = (1, 2, 2) if name == "mse+ssim" else (2, 3)
    output, change = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
    num_signs = {"mse+ssim": 4 + 4 + 1 + 1}.get(name, 6)
    remaining = all_signs(num_signs).split([4, 4, 1, 1] if name == "mse+ssim" else [6], 1)
    draws = iter(remaining)

    def signs(shape):
        return next(draws).reshape(-1, *shape)

    output_B = output.expand(2**num_signs, *shape).clone().requires_grad_()
    ALONG[name](output_B, signs).sum().backward()
    squares_B = (output_B.grad * change).flatten(1).sum(1).square()
    eps = 1e-4  # what is of third order is 1e-4 of what is of second
    measured = MEASURES[name](output[None], (output + eps * change)[None]).item() / eps**2
    assert squares_B.mean().item() == pytest.approx(measured, rel=2e-3)
    assert next(draws, None) is None


def test_every_measure_has_directions():
    assert ALONG.keys() == MEASURES.keys()


# ---- sketches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_at_8_bits_a_sketch_of_many_directions_is_the_measured_curve(name, models):
    model = models[name]
    settings = settings_for(model)
    exact = measure_curves(model, settings)
    sketch = sketch_curves(model, settings, num_directions=MANY)
    assert list(sketch.by_step) == list(exact.by_step)
    assert (sketch.mode, sketch.fingerprint) == ("sketch", exact.fingerprint)
    for key in exact.by_step:
        # MAR's head runs several times a step, and rounds inputs that its own errors have moved.
        rel = 1.0 if key.site.startswith("diffloss") and key.what == "input" else TOLERANCE
        # A layer before a softmax over one key does nothing, to rounding.
        assert sketch.distortions(key) == pytest.approx(exact.distortions(key), rel=rel, abs=1e-12), key


@pytest.mark.parametrize("name", ["var", "dit", "llamagen"])
def test_each_step_and_only_the_steps_that_feel_a_tensor(name, models):
    model = models[name]
    settings = settings_for(model)
    exact, sketch = measure_curves(model, settings), sketch_curves(model, settings, num_directions=MANY)
    for key in exact.by_step:
        ((measured_S,), (estimated_S,)) = exact.by_step[key], sketch.by_step[key]
        assert [x > 0 for x in estimated_S] == [x > 0 for x in measured_S], key
    sums = [torch.tensor(list(curves.by_step.values())).sum((0, 1)) for curves in (sketch, exact)]
    # A step of LlamaGen has 1 / 16 of the directions, and the errors of all tensors share them.
    torch.testing.assert_close(*sums, rtol=0.8 if name == "llamagen" else TOLERANCE, atol=0)


@pytest.mark.parametrize("name", ["var", "dit", "llamagen", "mar", "ldm-of-classes"])
def test_an_image_does_not_depend_on_its_batch(name, models):
    settings = settings_for(models[name], num_images=6, widths=(0, 8))  # of five classes
    whole = sketch_curves(models[name], settings, num_directions=3)
    one_by_one = sketch_curves(models[name], replace(settings, batch_size=1), num_directions=3)
    for key in whole.by_step:
        # An input's last bit depends on the batch, and with it, here and there, the code that it is rounded to.
        widths = slice(0, 1 if key.what == "input" else 2)
        for together, alone in zip(whole.by_step[key][widths], one_by_one.by_step[key][widths], strict=True):
            assert together == pytest.approx(alone, rel=1e-2, abs=1e-12), key


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("var", {}),
        ("var", {"guidance": 1.0}),
        ("var", {"sampling": {"more_smooth": True}}),
        ("llamagen", {}),
        ("llamagen", {"guidance": 1.0}),
        ("llamagen", {"sampling": {"guidance_interval": 5}}),
    ],
)
def test_a_pass_over_all_steps_gives_the_outputs_of_the_rollout(name, given, models):
    model = models[name]
    paths = Paths(model, settings_for(model, **given))
    (batch,) = paths.batches
    (graph,) = ALL_STEPS[type(model)](paths, batch)
    for step, output in zip(batch.steps, graph.run(), strict=True):
        torch.testing.assert_close(output, step.output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("given", [{"static_inputs": True}, {"method": "gptq"}, {"numbers": "symmetric"}])
def test_ranges_and_codes_are_those_of_exact_mode(given, models):
    model = models["dit"]
    settings = settings_for(model, **given)
    exact, sketch = measure_curves(model, settings), sketch_curves(model, settings, num_directions=MANY)
    assert max(compare(sketch, exact).relative_errors) < TOLERANCE


def test_what_has_no_row_of_an_image_is_estimated_from_sums(models):
    model = models["dit"]
    site = "t_embedder.mlp.2"
    others = tuple(other.name for other in model.sites() if other.name != site)
    settings = settings_for(model, protect=others, batch_size=2, step_groups=(0,))
    exact, sketch = measure_curves(model, settings), sketch_curves(model, settings, num_directions=MANY)
    for key in (TensorKey(site, "weight"), TensorKey(site, "input")):
        assert sketch.distortions(key) == pytest.approx(exact.distortions(key), rel=TOLERANCE)  # 2 sums, 7 %


def test_dropped_tensors_and_widths_share_directions(models):
    model = models["var"]
    wide = sketch_curves(model, settings_for(model, widths=(0, 2, 8)))
    narrow = sketch_curves(model, settings_for(model))
    for key in narrow.by_step:
        assert wide.by_step[key][2] == pytest.approx(narrow.by_step[key][0], rel=1e-4, abs=1e-15)
        if narrow.distortions(key) != (0,):
            assert wide.distortions(key)[0] > 100 * wide.distortions(key)[2]


def test_only_weights_or_only_inputs(models):
    model = models["dit"]
    both = sketch_curves(model, settings_for(model))
    for what, other in (("weights", "weight"), ("inputs", "input")):
        part = sketch_curves(model, settings_for(model, what=what))
        assert list(part.by_step) == both.keys(other)
        for key in part.by_step:
            assert part.by_step[key][0] == pytest.approx(both.by_step[key][0], rel=1e-4, abs=1e-15)


def test_the_model_is_left_as_it_was(models):
    model = copy.deepcopy(models["dit"])
    model.net.requires_grad_(True)
    before = copy.deepcopy(model.net.state_dict())
    sketch_curves(model, settings_for(model))
    assert all(p.requires_grad and p.grad is None for p in model.net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.net.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.net.state_dict().items())


def test_seeds_give_other_directions_and_progress_is_told(models):
    settings = settings_for(models["dit"], batch_size=2)
    told = []
    first = sketch_curves(models["dit"], settings, progress=lambda *args: told.append(args))
    assert first == sketch_curves(models["dit"], settings)
    assert first != sketch_curves(models["dit"], settings, seed=1)
    assert [done for text, done, total in told if text == "sketching curves"] == list(range(1, 9))
    assert told[-1] == ("sketching curves", 8, 8)


def test_an_interrupted_sketch_goes_on_and_a_finished_one_is_kept(models, tmp_path, monkeypatch):
    model, settings = models["dit"], settings_for(models["dit"], batch_size=1)
    whole = sketch_curves(model, settings)
    monkeypatch.setenv("BITLAW_CACHE", str(tmp_path))

    def interrupt(text, done, total):
        if text == "sketching curves" and done == 9:  # in the third batch of four steps
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sketch_curves(model, settings, progress=interrupt)
    told = []
    resumed = sketch_curves(model, settings, progress=lambda *args: told.append(args))
    assert resumed == whole
    assert [done for text, done, _ in told if text == "sketching curves"] == list(range(9, 17))
    monkeypatch.setattr(sketch_module, "Paths", None)
    assert sketch_curves(model, settings, name="again") == replace(whole, model="again")
    assert [path.suffix for path in (tmp_path / "curves").iterdir()] == [".json"]
    for other in ({"seed": 1}, {"num_directions": 5}):
        with pytest.raises(TypeError):  # not found, and nothing can be drawn
            sketch_curves(model, settings, **other)


# ---- errors and comparisons -------------------------------------------------------------------------------


def test_what_cannot_be_sketched_is_refused_before_work_starts(models, monkeypatch):
    monkeypatch.setattr(sketch_module, "Paths", None)  # nothing is drawn
    model = models["var"]
    with pytest.raises(ValueError, match=r"smoothquant.*measure exactly, or sketch with rtn or gptq"):
        sketch_curves(model, settings_for(model, method="smoothquant+rtn"))
    with pytest.raises(ValueError, match="num_directions 0"):
        sketch_curves(model, settings_for(model), num_directions=0)
    monkeypatch.setattr(sketch_module, "ALL_STEPS", {})
    with pytest.raises(ValueError, match=r"var keeps something from step to step.*measure exactly"):
        sketch_curves(model, settings_for(model))


def test_a_sketch_is_checked_at_random_points(models):
    model = models["dit"]
    settings = settings_for(model, widths=(2, 4, 6, 8, 10))
    sketch = sketch_curves(model, settings, num_directions=40, name="tiny")
    checked = check_sketch(model, sketch, num_points=20)
    against = compare(sketch, measure_curves(model, settings))
    whole = dict(zip(against.points, zip(against.sketched, against.exact, strict=True), strict=True))
    assert len(set(checked.points)) == 20 and {bits for _, bits in checked.points} <= {2, 4, 6, 8}
    for point, sketched, exact in zip(checked.points, checked.sketched, checked.exact, strict=True):
        assert (sketched, exact) == (whole[point][0], pytest.approx(whole[point][1], rel=1e-9))
    assert checked.spearman > 0.9 and against.spearman > 0.9
    assert {bits for _, bits in against.at(4).points} == {4}
    with pytest.raises(ValueError, match=r"another model.*tiny"):
        check_sketch(models["large-dit"], sketch)
    with pytest.raises(ValueError, match="3 or more"):
        check_sketch(model, sketch, num_points=2)
    with pytest.raises(ValueError, match="different models or settings"):
        compare(sketch, sketch_curves(model, replace(settings, num_images=2)))


def test_relative_errors():
    key = TensorKey("fc", "weight")
    compared = Comparison(((key, 2), (key, 3), (key, 4)), (3.0, 0.0, 1.0), (2.0, 0.0, 0.0))
    assert compared.relative_errors == (0.5, 0.0, math.inf)
    assert compared.median_relative_error == 0.5


def test_a_sketch_is_saved_and_read(models, tmp_path):
    sketch = sketch_curves(models["dit"], settings_for(models["dit"]))
    sketch.save(tmp_path / "curves.json")
    assert RateDistortion.read(tmp_path / "curves.json") == sketch
