"""Second moments against float64, however the rows arrive."""

import numpy as np
import pytest
import torch
from torch import Tensor

from bitlaw.calibration import moments as module
from bitlaw.calibration.moments import Moments


def rows(num_rows: int, num_inputs: int, seed: int = 0) -> Tensor:
    """Correlated, and far from centred, as what follows a GELU."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, num_inputs, generator=g).cumsum(1) / 4 + 1


def expected(x: Tensor, weights: np.ndarray | None = None) -> np.ndarray:
    numbers = x.double().numpy()
    weights = np.ones(len(numbers)) if weights is None else weights
    return np.asarray((numbers * weights[:, None]).T @ numbers / weights.sum())


# Products and their sums over up to 1024 rows are float32: 1e-6 relative, and the sizes of what cancels.
TOLERANCE = 2e-6


def assert_close(found: Tensor, exact: np.ndarray) -> None:
    assert found.dtype == torch.float32
    assert np.abs(found.double().numpy() - exact).max() <= TOLERANCE * np.abs(exact).max()


@pytest.mark.parametrize("num_inputs", [1, 7, 256, 300])
@pytest.mark.parametrize("num_rows", [1, 40, 1024, 2600])
def test_equal_float64(num_inputs: int, num_rows: int) -> None:
    x = rows(num_rows, num_inputs)
    both, alone = Moments(num_inputs, hessian=True), Moments(num_inputs, hessian=False)
    both.add(x)
    alone.add(x)
    exact = expected(x)
    assert_close(both.hessian_II, exact)
    assert_close(both.second_moment_I, exact.diagonal())
    assert_close(alone.second_moment_I, exact.diagonal())
    assert both.num_rows == alone.num_rows == num_rows
    assert torch.equal(both.hessian_II, both.hessian_II.T)
    assert torch.equal(both.hessian_II.diagonal(), both.second_moment_I)


def test_pieces_and_order_change_nothing_but_rounding() -> None:
    x = rows(3000, 24)
    for sizes in ([3000], [1] * 50 + [2950], [1023, 1, 1, 1975], [0, 1500, 1500]):
        for order in (x, x.flip(0)):
            moments = Moments(24, hessian=True)
            for piece in order.split(sizes):
                moments.add(piece)
            assert_close(moments.hessian_II, expected(x))


def test_reading_between_does_not_disturb() -> None:
    x = rows(100, 24)
    moments = Moments(24, hessian=True)
    for piece in x.split(30):
        moments.add(piece)
        assert moments.hessian_II.isfinite().all()
    assert_close(moments.hessian_II, expected(x))
    assert_close(moments.hessian_II, expected(x))


def test_weights_count_rows() -> None:
    """Steps of very different numbers of rows, weighted so that each counts the same."""
    steps = [rows(1, 24, 1), rows(250, 24, 2), rows(2000, 24, 3)]
    moments, alone = Moments(24, hessian=True), Moments(24, hessian=False)
    for step in steps:
        moments.add(step, weight=1 / len(step))
        alone.add(step, weight=1 / len(step))
    exact = np.mean([expected(step) for step in steps], axis=0)
    assert_close(moments.hessian_II, exact)
    assert_close(alone.second_moment_I, exact.diagonal())
    assert moments.num_rows == 2251


def test_other_types_and_layouts() -> None:
    x = rows(90, 24)
    for given in (x.bfloat16(), x.half(), x.double(), x.T.contiguous().T, x.repeat(1, 2)[:, :24]):
        moments = Moments(24, hessian=True)
        moments.add(given.requires_grad_())
        assert_close(moments.hessian_II, expected(given.detach()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chosen_rows_are_those_that_count(dtype: torch.dtype) -> None:
    x = rows(3000, 24).to(dtype)
    chosen = torch.arange(0, 3000, 2)  # more than a buffer holds
    moments, given = Moments(24, hessian=True), Moments(24, hessian=True)
    moments.add(x, 2.0, chosen)
    given.add(x[::2], 2.0)
    assert moments.num_rows == 1500
    assert torch.equal(moments.hessian_II, given.hessian_II)


def test_float64_sums_keep_what_float32_would_lose() -> None:
    """After 1024 rows of 4096, each buffer of 0.5 is below half a bit of a float32 sum; together they are 5 bits."""
    moments = Moments(2, hessian=True)
    moments.add(torch.full((1024, 2), 4096.0))
    for _ in range(5):
        moments.add(torch.full((8192, 2), 0.5))
    exact = (1024 * 2**24 + 40960 / 4) / 41984
    assert float(moments.hessian_II[1, 0]) == pytest.approx(exact, rel=1e-7)  # of the result in float32


def test_memory_is_what_is_stated() -> None:
    moments = Moments(512, hessian=True)
    moments.add(rows(3000, 512))
    held = sum(value.nbytes for value in vars(moments).values() if isinstance(value, Tensor))
    assert held == Moments.num_bytes(512, hessian=True)
    assert Moments.num_bytes(4096, hessian=True) == 8 * 4096**2 + 4 * 4096 * module._BUFFER_ROWS


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="0 inputs"):
        Moments(0, hessian=False)
    moments = Moments(4, hessian=True)
    for read in (lambda: moments.hessian_II, lambda: moments.second_moment_I):
        with pytest.raises(ValueError, match="no rows were added"):
            read()
    with pytest.raises(ValueError, match=r"rows of shape \(3, 5\), expected \(rows, 4\)"):
        moments.add(torch.zeros(3, 5))
    for weight in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="rows of weight"):
            moments.add(torch.zeros(3, 4), weight)
    moments.add(torch.tensor([[0.0, 1.0, torch.nan, 2.0]]))
    with pytest.raises(ValueError, match="NaN, Inf"):
        _ = moments.hessian_II
