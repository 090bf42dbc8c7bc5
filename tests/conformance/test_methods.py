"""What every entry of METHODS promises."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlaw.calibration import InputStats
from bitlaw.formats import FORMATS
from bitlaw.methods import METHODS, RTN, LayerMethod
from bitlaw.methods.quantize import quantize_network
from bitlaw.models.generator import StepClock
from bitlaw.packing import pack, unpack
from bitlaw.precision import BitPlan, Precision, TensorPrecision
from bitlaw.quantized import QuantizedTensor, WeightSpec

SPECS = [
    WeightSpec(FORMATS["int4"]),
    WeightSpec(FORMATS["int3"], 16),
    WeightSpec(FORMATS["int4s"], 16),
    WeightSpec(FORMATS["int2"], "tensor"),
    WeightSpec(FORMATS["e2m1"], 16),
]


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> LayerMethod:
    return METHODS[request.param]


def layer() -> tuple[Tensor, Tensor]:
    """A weight (24, 32) and inputs (256, 32) whose channels differ in size and are correlated."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 32, generator=g)
    mixing = torch.randn(32, 32, generator=g) * torch.linspace(0.2, 2, 32)
    return weight, torch.randn(256, 32, generator=g) @ mixing


def run(method: LayerMethod, spec: WeightSpec) -> QuantizedTensor:
    weight, x = layer()
    return method.quantize(weight, InputStats(second_moment_I=x.square().mean(0)), spec)


def test_needs_are_things_that_calibration_has(method: LayerMethod) -> None:
    assert method.needs <= set(InputStats.__dataclass_fields__)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_no_worse_than_rtn_on_the_output(method: LayerMethod, spec: WeightSpec) -> None:
    """Over 16 rows or more; a single row may be. Rounding of the comparison itself: 1e-6."""
    weight, x = layer()

    def error(quantized: QuantizedTensor) -> float:
        return float((x @ (quantized.decode() - weight).T).square().sum())

    assert error(run(method, spec)) <= error(RTN().quantize(weight, InputStats(), spec)) * (1 + 1e-6)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_result_is_what_was_asked_for(method: LayerMethod, spec: WeightSpec) -> None:
    """The spec, the shape, parameters that can be stored, and the same result twice."""
    weight, _ = layer()
    quantized = run(method, spec)
    assert quantized.spec == spec and quantized.shape == tuple(weight.shape)
    again = unpack("a", pack("a", quantized), spec)
    assert torch.equal(again.decode(), quantized.decode())
    assert torch.equal(run(method, spec).decode(), quantized.decode())


def test_weight_is_left_as_it_was(method: LayerMethod) -> None:
    weight, x = layer()
    method.quantize(weight, InputStats(second_moment_I=x.square().mean(0)), SPECS[0])
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
    stats = {"0": InputStats(second_moment_I=rows.square().mean(0))}
    plan = BitPlan({"0": (Precision(TensorPrecision(spec.format, spec.group_size)),)})

    def error(method: LayerMethod) -> float:
        small = quantize_network(net, plan, method, StepClock(), stats)
        assert small.get_buffer("0.weight").shape == (24, 16, 3, 3)
        with torch.no_grad():
            return float((small(images) - net(images)).square().sum())

    assert error(method) <= error(RTN()) * (1 + 1e-6)
