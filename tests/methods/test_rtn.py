"""Round to nearest, against the reference recipe."""

import pytest
from recipes import recipe
from torch import Tensor

from bitlaw.calibration import InputStats
from bitlaw.formats import FORMATS
from bitlaw.methods import RTN
from bitlaw.quantized import WeightSpec

# Mean squared error of X (W - Wq)^T on the recipe below by the original GPTQ code's rounding to nearest, asymmetric.
REFERENCE = {
    ("int4", None): 0.9774539,
    ("int4", 32): 0.6265277,
    ("int3", None): 4.446069,
    ("int3", 32): 3.011594,
}


def output_error(weight: Tensor, approximation: Tensor, x: Tensor) -> float:
    return float((x @ (weight - approximation).T).square().mean())


@pytest.mark.parametrize(("name", "group_size"), REFERENCE)
def test_equals_the_reference(name: str, group_size: int | None) -> None:
    weight, x = recipe()
    expected = REFERENCE[name, group_size]
    # With float32 scales, as the reference keeps them: equal to the rounding of the matrix product.
    spec = WeightSpec(FORMATS[name], group_size)
    x_GN = spec.groups(weight)
    assert output_error(weight, spec.format.fake(x_GN).reshape(weight.shape), x) == pytest.approx(expected, rel=1e-5)
    # With scales as they are stored: float16 moves some weights to the neighbouring code.
    stored = RTN().quantize(weight, InputStats(), spec)
    assert output_error(weight, stored.decode(), x) == pytest.approx(expected, rel=5e-3)


def test_no_single_code_can_be_improved() -> None:
    """Nearest means nearest: moving any weight one code up or down brings no weight closer."""
    weight, _ = recipe()
    quantized = RTN().quantize(weight, InputStats(), WeightSpec(FORMATS["int4"], 32))
    error = (quantized.decode() - weight).abs()
    step = quantized.params["scale_G1"].float().reshape(48, 3).repeat_interleave(32, 1)
    # Codes at the ends cannot move outwards, but stored scales cover the range, so none would want to.
    assert (error <= step / 2 * (1 + 1e-5)).all()
