"""Streaming histograms and the ranges that follow from them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitlaw.calibration.histogram import Histogram, Histograms, static_range
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


def test_what_is_counted_together_is_counted_as_one_by_one() -> None:
    """In groups that take turns, and of more numbers than wait at a time."""
    made, g = Histograms(2), torch.Generator().manual_seed(0)
    parts = [torch.randn(7000, generator=g) * 2.0 ** (i % 5) for i in range(40)]
    groups = [i // 3 % 2 for i in range(40)]
    for x, group in zip(parts, groups, strict=True):
        made.add(x, group)
    wholes = [torch.cat([x for x, other in zip(parts, groups, strict=True) if other == group]) for group in (0, 1)]
    ends_S2 = torch.stack([torch.stack([whole.min(), whole.max()]) for whole in wholes])
    for group, histogram in enumerate(made.counted_S(ends_S2)):
        expected = of(*(x for x, other in zip(parts, groups, strict=True) if other == group))
        assert torch.equal(histogram.counts_K, expected.counts_K)
        assert (histogram.bound, histogram.low, histogram.high) == (expected.bound, expected.low, expected.high)


@pytest.mark.parametrize("shape", [(1024, 128), (700, 384), (16, 64, 32, 32)])
def test_of_large_tensors_every_channel_is_counted_alike(shape: tuple[int, ...]) -> None:
    """Sizes whose evenly spaced numbers would be those of a few channels, or always the same corner of an image."""
    axis = -1 if len(shape) == 2 else 1
    channels = torch.arange(shape[axis], dtype=torch.float32)
    made = Histograms(1)
    made.add(channels.view(-1, *[1] * (len(shape) - 2) if axis == 1 else ()).expand(shape).clone() + 0.5, 0)
    (histogram,) = made.counted_S(torch.tensor([[0.5, shape[axis] - 0.5]]))
    counts = histogram.counts_K.nonzero()[:, 0]
    assert len(counts) == shape[axis] and histogram.total < 2 * 8192
    of_each = histogram.counts_K[counts]
    assert of_each.max() - of_each.min() <= 1 + of_each.max() // 10


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
