"""Streaming histograms and the ranges that follow from them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitlaw.calibration.histogram import Histogram, static_range
from bitlaw.formats import FORMATS


def numbers(count: int = 8000) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(count, generator=g) * torch.rand(count, generator=g).exp()


def of(*tensors: torch.Tensor) -> Histogram:
    histogram = Histogram.empty()
    for x in tensors:
        histogram = histogram.add(x)
    return histogram


@given(st.permutations(range(4)), st.integers(-12, 12))
def test_order_and_parts_change_nothing(order: list[int], exponent: int) -> None:
    parts = [numbers(2000)[500 * i : 500 * (i + 1)] * 2.0 ** (exponent * (i % 2)) for i in range(4)]
    whole, shuffled = of(torch.cat(parts)), of(*(parts[i] for i in order))
    assert torch.equal(whole.counts_K, shuffled.counts_K)
    assert (whole.bound, whole.low, whole.high) == (shuffled.bound, shuffled.low, shuffled.high)
    assert whole.total == 2000


def test_extremes_are_exact_and_bins_hold_their_numbers() -> None:
    x = numbers()
    histogram = of(x)
    assert (histogram.low, histogram.high) == (float(x.min()), float(x.max()))
    mean = (histogram.counts_K * histogram.centers_K).sum() / histogram.total
    width = 2 * histogram.bound / len(histogram.counts_K)
    assert abs(float(mean - x.mean())) < width / 2


def test_minmax_takes_everything_in() -> None:
    x = numbers()
    params = static_range(of(x), FORMATS["int8"], "minmax")
    expected = FORMATS["int8"].fit(x[None])
    assert torch.equal(params["scale_G1"], expected["scale_G1"])
    assert torch.equal(params["zero_G1"], expected["zero_G1"])


@pytest.mark.parametrize("name", ["int3", "int4", "int4s", "e2m1"])
def test_mse_is_no_worse_than_minmax_and_clips_outliers(name: str) -> None:
    x = numbers()
    x[0] = 60.0
    format = FORMATS[name]

    def error(choice: str) -> float:
        params = static_range(of(x), format, choice)
        return float((format.nearest(x[None], params) - x).square().sum())

    # Centers stand for their bins, which are 2^-12 of the range wide.
    assert error("mse") <= error("minmax") * 1.01
    assert error("mse") < 0.5 * error("minmax")


def test_percentile_leaves_out_as_many_as_it_says() -> None:
    x = numbers()
    params = static_range(of(x), FORMATS["int8"], "percentile", 99.0)
    kept = FORMATS["int8"].nearest(torch.tensor([[-1e30, 1e30]]), params)[0]
    inside = ((x >= kept[0]) & (x <= kept[1])).double().mean()
    assert abs(float(inside) - 0.98) < 0.005
