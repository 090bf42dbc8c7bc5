"""Running extremes against those of all numbers."""

import pytest
import torch

from bitlaw.calibration.extremes import Extremes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_extremes_are_exact(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    calls = [torch.randn(3, 5, 4, generator=g).to(dtype) * (i + 1) for i in range(7)]
    groups = [0, 0, 2, 2, 0, 2, 2]  # a second batch comes back to the first group
    extremes = Extremes(3)
    for x, group in zip(calls, groups, strict=True):
        extremes.add(x, group, (0, 1))
    extremes.fold()
    extremes.fold()
    everything = torch.stack(calls).float()
    assert extremes.low_C is not None and extremes.high_C is not None
    assert torch.equal(extremes.low_C, everything.amin((0, 1, 2)))
    assert torch.equal(extremes.high_C, everything.amax((0, 1, 2)))
    assert extremes.ends_S2[1].tolist() == [torch.inf, -torch.inf]
    for group in (0, 2):
        mine = everything[[i for i, other in enumerate(groups) if other == group]]
        assert extremes.ends_S2[group].tolist() == [float(mine.min()), float(mine.max())]
    held = sum(x.nbytes for x in (extremes.low_C, extremes.high_C, extremes.ends_S2))
    assert held == Extremes.num_bytes(4, 3)


def test_convolutions_have_their_channels_second() -> None:
    x_BCHW = torch.arange(24.0).view(2, 3, 2, 2)
    extremes = Extremes(1)
    extremes.add(x_BCHW, 0, (0, 2, 3))
    extremes.fold()
    assert extremes.low_C is not None and extremes.low_C.tolist() == [0, 4, 8]


def test_nan_is_passed_on() -> None:
    extremes = Extremes(1)
    for x in ([[1.0, torch.nan]], [[2.0, 3.0]]):
        extremes.add(torch.tensor(x), 0, (0,))
    extremes.fold()
    assert extremes.low_C is not None and extremes.low_C.isnan().tolist() == [False, True]
    assert extremes.ends_S2.isnan().all()
