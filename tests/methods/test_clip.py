"""The range of least weighted error."""

import pytest
import torch

from bitlaw.calibration import InputStats
from bitlaw.formats import FORMATS
from bitlaw.methods.clip import ClipSearch
from bitlaw.quantized import WeightSpec

SPECS = [
    WeightSpec(FORMATS["int2"]),
    WeightSpec(FORMATS["int3"], 16),
    WeightSpec(FORMATS["int4s"], 8),
    WeightSpec(FORMATS["e2m1"], 16),
    WeightSpec(FORMATS["int3"], "tensor"),
    WeightSpec(FORMATS["int0"]),
]


def layer():
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(12, 32, generator=g)
    weight[0, 5] = 9.0  # an outlier
    return weight, torch.rand(32, generator=g) * torch.logspace(-2, 2, 32)


def errors(quantized, weight, importance, spec):
    """Weighted squared error of each group."""
    difference = (quantized.decode() - weight).double().square() * importance
    return spec.groups(difference).sum(1)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_no_group_is_worse_than_at_any_ratio(spec):
    weight, importance = layer()
    chosen = ClipSearch().quantize(weight, InputStats(second_moment_I=importance), spec)
    found = errors(chosen, weight, importance, spec)
    for ratio in torch.linspace(1, 0.3, 29).tolist():
        at_ratio = errors(spec.quantize(weight, clip=ratio), weight, importance, spec)
        assert (found <= at_ratio * (1 + 1e-5) + 1e-9).all()  # sums in float32 against those in float64


def test_much_is_gained_where_an_outlier_sets_the_range():
    weight, importance = layer()
    importance = importance.clone()
    importance[5] = 1e-4  # which hardly matters
    spec = WeightSpec(FORMATS["int3"])
    chosen = ClipSearch().quantize(weight, InputStats(second_moment_I=importance), spec)
    at_once = spec.quantize(weight)
    assert errors(chosen, weight, importance, spec)[0] < 0.5 * errors(at_once, weight, importance, spec)[0]


def test_a_range_is_as_it_was_where_inputs_are_dead():
    weight, _ = layer()
    spec = WeightSpec(FORMATS["int3"], 8)
    chosen = ClipSearch().quantize(weight, InputStats(second_moment_I=torch.zeros(32)), spec)
    assert torch.equal(chosen.codes, spec.quantize(weight).codes)


def test_equal_numbers_and_zeros_come_back():
    weight = torch.zeros(2, 16)
    weight[1] = -0.75
    for name in ("int2", "int3s", "e2m1"):
        chosen = ClipSearch().quantize(weight, InputStats(second_moment_I=torch.ones(16)), WeightSpec(FORMATS[name]))
        assert torch.equal(chosen.decode(), weight)


@pytest.mark.parametrize("power", [0.5, 1, 3, 20])
def test_codebooks_are_the_better_of_weighted_and_not(power):
    """Weighted k-means does not always find what is better by its own weights."""
    weight, importance = layer()
    importance = importance**power
    spec = WeightSpec(FORMATS["v1b2"])
    both = [spec.quantize(weight), spec.quantize(weight, importance_I=importance)]
    plain, weighted = (errors(q, weight, importance, spec).sum() for q in both)
    chosen = ClipSearch().quantize(weight, InputStats(second_moment_I=importance), spec)
    assert errors(chosen, weight, importance, spec).sum() == min(plain, weighted)


def test_second_moments_of_nan_are_refused():
    weight, importance = layer()
    importance[3] = torch.nan
    with pytest.raises(ValueError, match="NaN or Inf in the second moments"):
        ClipSearch().quantize(weight, InputStats(second_moment_I=importance), SPECS[0])


@pytest.mark.parametrize("settings", [{"smallest": 0.0}, {"smallest": 1.0}, {"num_ratios": 1}])
def test_settings_that_make_no_grid_are_refused(settings):
    with pytest.raises(ValueError, match="take 2 or more"):
        ClipSearch(**settings)
