"""What every entry of FORMATS promises."""

import pytest
import torch
from torch import Tensor

from bitlaw.formats import FORMATS, Format, format_name
from bitlaw.formats.format import round_scale
from bitlaw.packing import pack, unpack
from bitlaw.precision import GroupSize
from bitlaw.quantized import WeightSpec

ROWS, INPUTS = 6, 32


def weights(seed: int = 0) -> Tensor:
    return torch.randn(ROWS, INPUTS, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=FORMATS)
def format(request: pytest.FixtureRequest) -> Format:
    return FORMATS[request.param]


def test_name_leads_back_to_the_format(format: Format) -> None:
    assert FORMATS[format_name(format)] == format


@pytest.mark.parametrize("group_size", [None, 8, "tensor"])
def test_encoding_what_was_decoded_changes_nothing(format: Format, group_size: GroupSize) -> None:
    quantized = WeightSpec(format, group_size).quantize(weights())
    again = format.encode(quantized.spec.groups(quantized.decode()), quantized.params)
    assert torch.equal(again.reshape(quantized.codes.shape), quantized.codes)
    assert quantized.codes.dtype == format.code_dtype


def test_zeros_are_exact(format: Format) -> None:
    x = weights()
    x[:, ::3] = 0
    x[2] = 0
    decoded = WeightSpec(format, 16).quantize(x).decode()
    if format.codebook_shape:  # need not hold a zero, but for a group of nothing else
        whole = torch.zeros(ROWS, INPUTS)
        assert (WeightSpec(format).quantize(whole).decode() == 0).all()
    else:
        assert (decoded[x == 0] == 0).all()
    assert (format.fake(torch.zeros(3, 4)) == 0).all()


def test_groups_do_not_see_each_other(format: Format) -> None:
    """A row quantized alone is the row quantized among others: dynamic activations do not depend on the batch."""
    x = torch.cat([weights(), 100 * weights(1), torch.zeros(1, INPUTS)])
    alone = torch.cat([format.fake(row[None]) for row in x])
    assert torch.equal(format.fake(x), alone)


def test_fast_path_equals_the_slow_one(format: Format) -> None:
    shifted = weights() + torch.linspace(-4, 4, ROWS)[:, None]
    for x in (weights(), shifted, shifted.abs(), torch.full((2, 5), -0.7), torch.randn(4, 1)):
        if x.shape[1] % format.values_per_code:
            continue
        assert torch.equal(format.fake(x), Format.fake(format, x))


@pytest.mark.parametrize("stored", [False, True])
def test_nearest_equals_decoding_codes(format: Format, stored: bool) -> None:
    """With numbers beyond the range, parameters as `fit` gives them and as they are stored, and transposed layouts."""
    params = format.fit(weights())
    if stored:
        params = format.storable(params)
    shifted = weights() + torch.linspace(-4, 4, ROWS)[:, None]
    for x in (weights(), shifted, 1e30 * weights(), torch.zeros(ROWS, INPUTS), weights().T.contiguous().T):
        before = x.clone()
        nearest = format.nearest(x, params)
        assert nearest.dtype == torch.float32 and torch.equal(nearest, Format.nearest(format, x, params))
        assert torch.equal(x, before)


def test_scaling_the_input_scales_the_output(format: Format) -> None:
    """By a power of two, so that no rounding differs."""
    assert torch.equal(format.fake(8 * weights()), 8 * format.fake(weights()))


def test_stored_parameters_are_those_of_fit_rounded(format: Format) -> None:
    params = format.fit(weights())
    assert tuple(params) == format.param_names
    stored = format.storable(params)
    assert all(torch.equal(format.storable(stored)[name], value) for name, value in stored.items())
    if "scale_G1" in params:
        assert torch.equal(stored["scale_G1"], round_scale(params["scale_G1"]))


@pytest.mark.parametrize("group_size", [None, 8, "tensor"])
def test_sizes_add_up_and_packing_loses_nothing(format: Format, group_size: GroupSize) -> None:
    quantized = WeightSpec(format, group_size).quantize(weights())
    tensors = pack("site", quantized)
    stored = sum(8 * tensor.nbytes for name, tensor in tensors.items() if name != "site.weight_shape")
    assert quantized.bits().total == stored
    assert quantized.bits().codes == ROWS * INPUTS * format.code_bits  # 32 inputs fill whole words at any width
    again = unpack("site", tensors, quantized.spec)
    assert torch.equal(again.codes, quantized.codes)
    assert torch.equal(again.decode().view(torch.int32), quantized.decode().view(torch.int32))
