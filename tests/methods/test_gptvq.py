"""GPTVQ: vectors beat scalars at equal index bits, and nothing breaks it."""

import pytest
import torch
from torch import Tensor, nn

from bitlaw.calibration import InputStats
from bitlaw.formats import FORMATS
from bitlaw.methods.gptq import GPTQ
from bitlaw.methods.gptvq import GPTVQ
from bitlaw.precision import TensorPrecision
from bitlaw.quantized import QuantizedTensor, WeightSpec


def recipe() -> tuple[Tensor, Tensor]:
    """W (128, 256) and X (1024, 256) with correlated columns, drawn in this order."""
    g = torch.Generator().manual_seed(1234)
    weight = torch.randn(128, 256, generator=g)
    mixing = torch.randn(256, 256, generator=g) / 256**0.5
    return weight, torch.randn(1024, 256, generator=g) @ mixing


def error(quantized: QuantizedTensor) -> float:
    weight, x = recipe()
    return float((x @ (weight - quantized.decode()).T).square().mean())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_two_dimensions_beat_one_and_one_beats_integers(bits: int) -> None:
    weight, x = recipe()
    stats = InputStats(hessian_II=x.T @ x / len(x))
    integers = error(GPTQ().quantize(weight, stats, WeightSpec(FORMATS[f"int{bits}"])))
    one, two = (error(GPTVQ(dim).quantize(weight, stats, WeightSpec(FORMATS[f"v{dim}b{bits}"]))) for dim in (1, 2))
    assert two < one < integers


def test_integers_stand_for_codebooks_of_as_many_bits() -> None:
    layer = nn.Linear(32, 16)
    method = GPTVQ()
    assert method.precision(TensorPrecision(FORMATS["int3"])) == TensorPrecision(FORMATS["v2b3"])
    assert method.precision(TensorPrecision(FORMATS["v4b2"], 512)) == TensorPrecision(FORMATS["v4b2"], 512)
    for name, group in (("int8", None), ("int4s", None), ("e2m1", None), ("int4", 16)):
        assert method.problem(layer, WeightSpec(FORMATS[name], group))
    for name in ("int4", "v2b3", "int0"):
        assert method.problem(layer, WeightSpec(FORMATS[name])) is None


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_singular_hessians_dead_channels_and_zero_rows(rows: int) -> None:
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(16, 32, generator=g), torch.randn(rows, 32, generator=g)
    weight[3], x[:, 5] = 0, 0
    spec = WeightSpec(FORMATS["v2b2"])
    stats = InputStats(hessian_II=x.T @ x / rows)
    chosen = GPTVQ().quantize(weight, stats, spec)
    assert chosen.decode().isfinite().all()
    plain = spec.quantize(weight)
    lost, of_plain = ((x @ (q.decode() - weight).T).square().sum() for q in (chosen, plain))
    assert lost <= of_plain * (1 + 1e-4)
