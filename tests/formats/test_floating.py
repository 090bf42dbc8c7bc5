"""Floats: against torch's and ml_dtypes' casts, value for value."""

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from bitlaw.formats import FORMATS, FloatFormat
from bitlaw.formats.format import Format

TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
ML_DTYPES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
LAYOUTS = [name for name, format in FORMATS.items() if isinstance(format, FloatFormat)]
UNIT = {"scale_G1": torch.ones(1, 1)}


def layout(name: str) -> FloatFormat:
    format = FORMATS[name]
    assert isinstance(format, FloatFormat)
    return format


def inputs(format: FloatFormat) -> Tensor:
    """Every number of the format, every midpoint with its float32 neighbours, random numbers; both signs. (1, N)."""
    values = format.values[: 2 ** (format.bits - 1)]
    values = values[values.isfinite()]
    ties = (values[1:] + values[:-1]) / 2
    generator = torch.Generator().manual_seed(0)
    below, above = (torch.nextafter(ties, torch.full_like(ties, end)) for end in (0.0, torch.inf))
    linear = torch.rand(4000, generator=generator) * format.largest
    # Uniform exponents too, from below the smallest number: a linear sample is almost all in the top two binades.
    low = max(float(values[1].log2()) - 4, -120)
    spread = 2 ** (low + torch.rand(4000, generator=generator) * (np.log2(format.largest) - low))
    x = torch.cat([values, ties, below, above, linear, spread.clamp_max(format.largest)])
    return torch.cat([x, -x])[None]


@pytest.mark.parametrize("name", TORCH)
def test_8_bit_layouts_equal_torch_casts(name: str) -> None:
    """Codes are torch's bit patterns, signs of zero included. 448 and 57344 are the largest, as in torch."""
    format = layout(name)
    x = inputs(format)
    cast = x.to(TORCH[name])
    codes = format.encode(x, UNIT)
    assert torch.equal(codes, cast.view(torch.uint8))
    assert torch.equal(format.decode(codes, UNIT), cast.float())
    assert format.largest == torch.finfo(TORCH[name]).max


@pytest.mark.parametrize("name", ML_DTYPES)
def test_layouts_equal_ml_dtypes_casts(name: str) -> None:
    format = layout(name)
    x = inputs(format)
    cast = torch.from_numpy(x.numpy().astype(ML_DTYPES[name]).astype(np.float32))
    assert torch.equal(format.decode(format.encode(x, UNIT), UNIT), cast)
    assert format.largest == float(ml_dtypes.finfo(ML_DTYPES[name]).max)


@pytest.mark.parametrize("name", LAYOUTS)
def test_rounding_is_to_the_nearest_number(name: str) -> None:
    """Every layout, also those without an outside oracle: no other number of the layout is nearer."""
    format = layout(name)
    x = inputs(format)
    values = format.values[format.values.isfinite()]
    codes = format.encode(x, UNIT)
    error = (format.decode(codes, UNIT) - x).abs()
    assert torch.equal(error, (x[..., None] - values).abs().amin(-1))
    assert torch.equal(format.values[codes.int()], format.decode(codes, UNIT))


def test_small_layouts_hold_the_numbers_of_their_definition() -> None:
    expected = {
        "e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6],
        "e1m1": [0, 1, 2, 3],
        "e2m0": [0, 1, 2, 4],
        "e1m0": [0, 2],
    }
    for name, magnitudes in expected.items():
        values = layout(name).values.tolist()
        assert values[: len(magnitudes)] == magnitudes
        assert values[len(magnitudes) :] == [-m for m in magnitudes]


@pytest.mark.parametrize("name", LAYOUTS)
def test_number_of_codes(name: str) -> None:
    """All patterns are numbers, but for the NaN of e4m3 and the Inf and NaN of e5m2, of either sign."""
    reserved = {"e4m3": 2, "e5m2": 8}.get(name, 0)
    assert int(layout(name).values.isnan().sum()) == reserved


@pytest.mark.parametrize("name", LAYOUTS)
def test_largest_input_maps_to_the_largest_magnitude(name: str) -> None:
    format = layout(name)
    x = torch.randn(8, 40, generator=torch.Generator().manual_seed(1))
    params = format.fit(x)
    at_one = format.decode(format.encode(x, params), UNIT)
    assert torch.equal(at_one.abs().amax(-1), torch.full((8,), format.largest))


@pytest.mark.parametrize("value", [0.1, -0.3, 5.0, -1e-6, 0.0])
@pytest.mark.parametrize("name", LAYOUTS)
def test_constant_groups_come_back_exactly(name: str, value: float) -> None:
    x = torch.full((2, 5), value)
    assert torch.equal(FORMATS[name].fake(x), x)


@pytest.mark.parametrize("name", LAYOUTS)
def test_beyond_the_range_saturates(name: str) -> None:
    format = layout(name)
    x = torch.tensor([[-1e38, -1.5 * format.largest, 1.5 * format.largest, 1e38]])
    assert format.decode(format.encode(x, UNIT), UNIT).tolist() == [[-format.largest] * 2 + [format.largest] * 2]


def test_fast_path_in_parts_equals_the_slow_one() -> None:
    """More numbers than are rounded at a time, in rows that do not divide them."""
    x = torch.randn(700, 413, generator=torch.Generator().manual_seed(2))
    assert torch.equal(FORMATS["e4m3"].fake(x), Format.fake(FORMATS["e4m3"], x))


@pytest.mark.parametrize(("exponent", "mantissa"), [(0, 3), (1, -1), (5, 3), (8, 0)])
def test_impossible_layouts_are_refused(exponent: int, mantissa: int) -> None:
    with pytest.raises(ValueError, match=f"e{exponent}m{mantissa}: float layouts have"):
        FloatFormat(exponent, mantissa)
