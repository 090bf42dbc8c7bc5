"""Integers: the equations, bits against error, constants, speed path against slow path."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitlaw.formats import FORMATS, IntegerFormat
from bitlaw.formats.format import Format, round_scale


def sqnr_db(x: torch.Tensor, approximation: torch.Tensor) -> float:
    error = (approximation.double() - x.double()).square().mean()
    return float(10 * torch.log10(x.double().square().mean() / error))


def test_asymmetric_follows_the_equations() -> None:
    """s = (u-l)/(2^b-1), z = round(-l/s), q = clip(round(x/s) + z), worked by hand for 2 bits."""
    x = torch.tensor([[-1.0, 0.1, 0.6, 2.0]])  # s = 1, z = 1, q = 0 1 2 3
    params = IntegerFormat(2).fit(x)
    codes = IntegerFormat(2).encode(x, params)
    assert params["scale_G1"].item() == 1
    assert (codes.int() + 2).tolist() == [[0, 1, 2, 3]]  # codes are kept less 2^(bits-1)
    assert params["zero_G1"].item() + 2 == 1
    assert IntegerFormat(2).decode(codes, params).tolist() == [[-1.0, 0.0, 1.0, 2.0]]


def test_symmetric_uses_the_codes_around_zero() -> None:
    x = torch.tensor([[-3.0, 1.4, 1.6, 0.2]])
    params = IntegerFormat(3, symmetric=True).fit(x)
    assert params["scale_G1"].item() == 1
    assert IntegerFormat(3, symmetric=True).encode(x, params).tolist() == [[-3, 1, 2, 0]]


def test_full_range_is_the_original_gptq_convention() -> None:
    """s = max|x| / ((2^b - 1) / 2), codes from -2^(b-1), the largest number clipped where it is positive."""
    format = IntegerFormat(3, symmetric=True, full_range=True)
    x = torch.tensor([[3.5, -3.5, 1.4, 0.0]])
    params = format.fit(x)
    assert params["scale_G1"].item() == 1
    assert format.encode(x, params).tolist() == [[3, -4, 1, 0]]
    x = torch.randn(32, 50, generator=torch.Generator().manual_seed(0))
    for wide in (x, x.abs(), torch.full((2, 5), -0.3)):
        assert torch.equal(format.fake(wide), Format.fake(format, wide))
        params = format.fit(wide)
        assert torch.equal(format.nearest(wide, params), Format.nearest(format, wide, params))
    with pytest.raises(ValueError, match="full_range is for symmetric"):
        IntegerFormat(3, full_range=True)


@pytest.mark.parametrize("offset", [3.0, -3.0])
def test_range_is_widened_to_hold_zero(offset: float) -> None:
    """Numbers of one sign, none near zero: a range that did not hold 0 could not give back a 0 exactly."""
    x = torch.rand(1, 64, generator=torch.Generator().manual_seed(0)) + offset
    params = IntegerFormat(4).fit(x)
    zero = torch.zeros(1, 1)
    assert IntegerFormat(4).decode(IntegerFormat(4).encode(zero, params), params).item() == 0
    assert torch.isclose(params["scale_G1"].abs() * 15, x.abs().max())


@pytest.mark.parametrize("symmetric", [False, True])
def test_sqnr_grows_by_6_db_a_bit(symmetric: bool) -> None:
    """Uniform numbers: the error is a twelfth of a squared step, and the range has one step fewer than codes."""
    x = torch.rand(16, 4096, generator=torch.Generator().manual_seed(0)) * 2 - 1
    widths = range(4, 17)
    db = torch.tensor([sqnr_db(x, IntegerFormat(bits, symmetric).fake(x)) for bits in widths])
    steps = torch.tensor([2.0 ** (bits - 1) - 1 if symmetric else 2.0**bits - 1 for bits in widths])
    # 65536 errors: their mean square is known to 0.4 % (0.02 dB); at 4 bits they are not quite uniform within a step.
    assert (db - 20 * steps.log10()).diff().abs().max() < 0.1
    assert abs(float(db.diff()[4:].mean()) - 6.02) < 0.03


def test_stored_scales_lose_nothing_at_high_widths() -> None:
    """A float16 scale rounded to the nearest clips the ends of some ranges: at 16 bits that costs decibels."""
    x = torch.rand(16, 4096, generator=torch.Generator().manual_seed(0)) * 2 - 1
    format = IntegerFormat(16)
    exact = format.fit(x)
    stored, nearest = format.storable(exact), exact | {"scale_G1": exact["scale_G1"].half()}
    assert stored["scale_G1"].dtype == torch.float16
    db = [sqnr_db(x, format.decode(format.encode(x, params), params)) for params in (exact, stored, nearest)]
    assert db[0] - db[1] < 0.03  # a step wider by at most 2^-10 is 0.0085 dB; 0.02 for sampling
    assert db[0] - db[2] > 3


@pytest.mark.parametrize("value", [0.1, -0.1, 1.0, -3e-4, 7e4, -1e-12, 0.0])
@pytest.mark.parametrize("name", ["int1", "int2", "int4", "int8", "int16", "int2s", "int8s"])
def test_constant_groups_come_back_exactly(name: str, value: float) -> None:
    x = torch.full((3, 7), value)
    assert torch.equal(FORMATS[name].fake(x), x)


def test_activations_that_round_past_the_top_saturate() -> None:
    """-l/s = 1.5 and u/s = 13.5 are both rounded up (to even): the fast path must clip as `encode` does."""
    x = torch.tensor([[-1.5, 13.5, 13.0, 0.0]])
    format = IntegerFormat(4)
    params = format.fit(x)
    assert params["scale_G1"].item() == 1
    assert format.fake(x).tolist() == [[-2.0, 13.0, 13.0, 0.0]]
    assert torch.equal(format.fake(x), Format.fake(format, x))


@settings(deadline=None, max_examples=150)
@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=12),
    bits=st.integers(1, 16),
    symmetric=st.booleans(),
)
def test_error_is_at_most_half_a_step(values: list[float], bits: int, symmetric: bool) -> None:
    """Any finite numbers: the fast path equals the slow one, and no number moves by more than half a step."""
    format = IntegerFormat(max(bits, 2), True) if symmetric else IntegerFormat(bits)
    x = torch.tensor([values], dtype=torch.float32)
    params = format.fit(x)
    decoded = format.decode(format.encode(x, params), params)
    assert torch.equal(format.fake(x), decoded)
    # 2^-6: at 16 bits a quotient x/s near 2^16 has only 7 bits left behind the point. 1e-37: scales that underflow.
    limit = params["scale_G1"].double() * (0.5 + 2**-6) + 1e-37
    assert ((decoded.double() - x.double()).abs() <= limit).all()


def test_scales_out_of_float16_range_stay_float32() -> None:
    inside = torch.tensor([[0.1], [65504.0], [2.0**-20]])
    rounded = round_scale(inside)
    assert rounded.dtype == torch.float16 and (rounded.float() >= inside).all()
    assert ((rounded.float() - inside) / inside).max() < 1 / 16
    for wild in (1e5, 1e-7):
        scales = torch.tensor([[0.1], [wild]])
        assert round_scale(scales) is scales


@pytest.mark.parametrize(("bits", "symmetric"), [(0, False), (17, False), (1, True), (17, True)])
def test_impossible_widths_are_refused(bits: int, symmetric: bool) -> None:
    with pytest.raises(ValueError, match=r"integers have [12] to 16 bits"):
        IntegerFormat(bits, symmetric)
