"""What every entry of METHODS promises."""

from dataclasses import is_dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlaw.calibration import InputStats
from bitlaw.formats import FORMATS
from bitlaw.methods import METHODS, RTN, LayerMethod
from bitlaw.packing import pack, unpack
from bitlaw.precision import BitPlan, Precision, TensorPrecision
from bitlaw.quantized import QuantizedTensor, WeightSpec
from quantized_networks import quantized

SPECS = [
    WeightSpec(FORMATS["int4"]),
    WeightSpec(FORMATS["int3"], 16),
    WeightSpec(FORMATS["int4s"], 16),
    WeightSpec(FORMATS["int2"], "tensor"),
    WeightSpec(FORMATS["e2m1"], 16),
]


LAYER_METHODS = {name: method for name, method in METHODS.items() if isinstance(method, LayerMethod)}


@pytest.fixture(params=LAYER_METHODS)
def method(request: pytest.FixtureRequest) -> LayerMethod:
    return LAYER_METHODS[request.param]


def stats_of(x: Tensor) -> InputStats:
    """What calibration would have seen of these rows."""
    return InputStats(
        second_moment_I=x.square().mean(0),
        hessian_II=x.T @ x / len(x),
        low_C=x.amin(0),
        high_C=x.amax(0),
        rows_RI=x,
        num_rows=len(x),
    )


def supported(method: LayerMethod, spec: WeightSpec, layer: nn.Module) -> WeightSpec:
    """What the method means by a spec; skips the test if it says that it cannot do it."""
    if method.problem(layer, spec):
        pytest.skip("the method says that it cannot")
    return WeightSpec.of(method.precision(TensorPrecision(spec.format, spec.group_size)))


def layer() -> tuple[Tensor, Tensor]:
    """A weight (24, 32) and inputs (256, 32) whose channels differ in size and are correlated."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 32, generator=g)
    mixing = torch.randn(32, 32, generator=g) * torch.linspace(0.2, 2, 32)
    return weight, torch.randn(256, 32, generator=g) @ mixing


def run(method: LayerMethod, spec: WeightSpec) -> QuantizedTensor:
    weight, x = layer()
    return method.quantize(weight, stats_of(x), spec)


@pytest.mark.parametrize("name", METHODS)
def test_needs_are_things_that_calibration_has(name: str) -> None:
    assert METHODS[name].needs <= set(InputStats.__dataclass_fields__)


@pytest.mark.parametrize("name", METHODS)
def test_settings_are_plain_values(name: str) -> None:
    """So that they can be written after its name."""
    assert is_dataclass(METHODS[name])
    assert all(isinstance(value, bool | int | float | str | None) for value in vars(METHODS[name]).values())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_no_worse_than_rtn_on_the_output(method: LayerMethod, spec: WeightSpec) -> None:
    """Over 16 rows or more; a single row may be. Rounding of the comparison itself: 1e-6.

    Methods that see no correlations are held to what they see, squared errors weighted by E[x_I^2].
    """
    weight, x = layer()

    def error(quantized: QuantizedTensor) -> float:
        lost = quantized.decode() - weight
        if "hessian_II" not in method.needs and method.needs:
            return float((lost.square() * x.square().mean(0)).sum())
        return float((x @ lost.T).square().sum())

    spec = supported(method, spec, nn.Linear(32, 24))
    assert error(run(method, spec)) <= error(RTN().quantize(weight, InputStats(), spec)) * (1 + 1e-6)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_result_is_what_was_asked_for(method: LayerMethod, spec: WeightSpec) -> None:
    """The spec, the shape, parameters that can be stored, and the same result twice."""
    weight, _ = layer()
    spec = supported(method, spec, nn.Linear(32, 24))
    quantized = run(method, spec)
    assert quantized.spec == spec and quantized.shape == tuple(weight.shape)
    again = unpack("a", pack("a", quantized), spec)
    assert torch.equal(again.decode(), quantized.decode())
    assert torch.equal(run(method, spec).decode(), quantized.decode())


def test_weight_is_left_as_it_was(method: LayerMethod) -> None:
    weight, x = layer()
    method.quantize(weight, stats_of(x), supported(method, SPECS[0], nn.Linear(32, 24)))
    assert torch.equal(weight, layer()[0])


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_convolutions_are_quantized_like_linears(method: LayerMethod, spec: WeightSpec) -> None:
    """Told the statistics of its unfolded inputs, no worse than RTN on what the convolution gives."""
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1, bias=False))
    conv = net[0]
    assert isinstance(conv, nn.Conv2d)
    conv.weight.data.normal_(generator=g)
    images = torch.randn(8, 16, 6, 6, generator=g) * torch.linspace(0.2, 2, 16).view(16, 1, 1)
    rows = F.unfold(images, 3, padding=1).transpose(1, 2).flatten(0, 1)
    stats = {"0": stats_of(rows)}
    spec = supported(method, spec, conv)
    plan = BitPlan({"0": (Precision(TensorPrecision(spec.format, spec.group_size)),)})

    def error(method: LayerMethod) -> float:
        small = quantized(net, plan, method, stats=stats)
        assert small.get_buffer("0.weight").shape == (24, 16, 3, 3)
        with torch.no_grad():
            return float((small(images) - net(images)).square().sum())

    assert error(method) <= error(RTN()) * (1 + 1e-6)
