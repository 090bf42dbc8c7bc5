"""GPTVQ: vectors beat scalars at equal index bits, each choice is the best there is, and nothing breaks it."""

import logging

import pytest
import torch
from recipes import recipe
from torch import Tensor, nn

from bitlaw.calibration import InputStats
from bitlaw.formats import FORMATS, Codebook
from bitlaw.methods.gptq import GPTQ
from bitlaw.methods.gptvq import GPTVQ
from bitlaw.precision import TensorPrecision
from bitlaw.quantized import QuantizedTensor, WeightSpec


def error(quantized: QuantizedTensor) -> float:
    weight, x = recipe(128, 256, 1024)
    return float((x @ (weight - quantized.decode()).T).square().mean())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_two_dimensions_beat_one_and_one_beats_integers(bits: int) -> None:
    weight, x = recipe(128, 256, 1024)
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

    for asked in (
        TensorPrecision(FORMATS["int8"]),
        TensorPrecision(FORMATS["int4s"]),
        TensorPrecision(FORMATS["int3"], 8),
    ):
        assert method.precision(asked) == asked  # which has a problem


# ---- what it computes ---------------------------------------------------------------------------------


def correlated(rows: int, num_inputs: int, seed: int = 0) -> Tensor:
    """E[x x^T] of correlated inputs whose channels differ in size."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(num_inputs, num_inputs, generator=g) / num_inputs**0.5
    x = torch.randn(rows, num_inputs, generator=g) @ mixing * torch.linspace(0.3, 3, num_inputs)
    return x.T @ x / rows


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(("name", "group"), [("v1b2", 64), ("v2b1", "tensor"), ("v2b2", 512), ("v4b1", 1024)])
def test_each_vector_is_the_best_that_free_weights_behind_it_allow(name: str, group: int | str) -> None:
    """By enumeration in float64: with the errors before it, and the least error that weights behind it could reach.

    That least is e S e^T with S the inverse of the leading block of H^-1. Groups are of several rows and columns.
    """
    weight, hessian, damping = randn(8, 512), correlated(2000, 512), 0.02
    spec = WeightSpec(FORMATS[name], group)
    quantized = GPTVQ(damping=damping)._choose(weight, hessian, spec)
    format = spec.format
    assert isinstance(format, Codebook)
    rows, columns = spec.rectangle(weight.shape)
    table = format.vectors(quantized.params).double().unflatten(0, (8 // rows, 512 // columns))
    chosen = spec.join(format.indices(spec.split(quantized.codes, quantized.shape)), quantized.shape)
    damped = hessian.double() + damping * hessian.diagonal().double().mean() * torch.eye(512)
    inverse = damped.inverse()
    lost = weight.double() - quantized.decode().double()
    wrong = 0
    for j in range(0, 512, 60):  # some of the vectors, at any place in a block
        end = j + format.dim
        cost = inverse[:end, :end].inverse()
        for row in range(8):
            entries = table[row // rows, j // columns]
            errors = lost[row, :end].repeat(len(entries), 1)
            errors[:, j:] = weight[row, j:end].double() - entries
            costs = ((errors @ cost) * errors).sum(1)
            # Of choices equal to float32 rounding either will do.
            wrong += int(costs[chosen[row, j // format.dim]] > costs.min() * (1 + 1e-4))
    assert wrong == 0


@pytest.mark.parametrize("name", ["v1b3", "v2b2", "v4b1"])
def test_a_hessian_of_one_is_rounding_to_nearest(name: str) -> None:
    weight, spec = randn(16, 512), WeightSpec(FORMATS[name])
    assert torch.equal(GPTVQ()._choose(weight, 3 * torch.eye(512), spec).decode(), spec.quantize(weight).decode())


def test_codebooks_end_at_the_least_error_for_their_choices() -> None:
    """Against the normal equations in float64; 8-bit entries and steps that end at 1e-4 cost under 0.5 %."""
    weight, hessian = randn(16, 64), correlated(500, 64)
    spec = WeightSpec(FORMATS["v2b2"], 512)
    before = GPTVQ(codebook_steps=0).quantize(weight, InputStats(hessian_II=hessian), spec)
    after = GPTVQ().quantize(weight, InputStats(hessian_II=hessian), spec)
    assert torch.equal(before.codes, after.codes)
    format = spec.format
    assert isinstance(format, Codebook)
    index = format.indices(spec.split(before.codes, before.shape))  # (2 groups of 8 rows, 256 vectors)
    units = torch.eye(32).view(32, 16, 2)  # one number of a codebook is 1
    columns = [spec.join(unit[index].flatten(1), before.shape) for unit in units]
    root = torch.linalg.cholesky(hessian.double() + 1e-9 * torch.eye(64))
    least = 0.0
    for rows in (slice(0, 8), slice(8, 16)):  # bands do not see each other
        design = torch.stack([(column[rows].double() @ root).flatten() for column in columns], 1)
        design = design[:, design.abs().sum(0) > 0]
        target = (weight[rows].double() @ root).flatten()
        least += float((target - design @ torch.linalg.lstsq(design, target).solution).square().sum())
    errors = [float((((weight - q.decode()).double() @ root).square()).sum()) for q in (before, after)]
    assert least <= errors[1] < 1.005 * least
    assert errors[1] < 0.98 * errors[0]


# ---- what it is given ---------------------------------------------------------------------------------


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


def test_one_image_and_no_damping_still_factorize(caplog: pytest.LogCaptureFixture) -> None:
    weight, spec = randn(16, 32), WeightSpec(FORMATS["v2b2"])
    with caplog.at_level(logging.WARNING):
        chosen = GPTVQ(damping=0.0).quantize(weight, InputStats(hessian_II=correlated(1, 32)), spec)
    assert "cannot be factorized with damping 0" in caplog.text
    assert chosen.decode().isfinite().all()


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_constant_weights_come_back(value: float) -> None:
    """0.25 is a scale that float16 holds."""
    weight = torch.full((8, 32), value)
    chosen = GPTVQ().quantize(weight, InputStats(hessian_II=correlated(64, 32)), WeightSpec(FORMATS["v2b2"]))
    assert torch.equal(chosen.decode(), weight)


def test_an_input_that_is_always_zero_is_rounded_to_what_is_near() -> None:
    """Whatever the calibration has not seen should not be thrown away."""
    weight, hessian = randn(32, 64), correlated(500, 64)
    hessian[10], hessian[:, 10] = 0, 0
    chosen = GPTVQ().quantize(weight, InputStats(hessian_II=hessian), WeightSpec(FORMATS["v2b3"]))
    # No importance, so far from centroids at worst: but of 8 values a dimension some is on the right side.
    assert float((chosen.decode()[:, 10] - weight[:, 10]).square().mean()) < 0.3


def test_what_it_cannot_use_is_an_error() -> None:
    weight, spec = randn(8, 32), WeightSpec(FORMATS["v2b2"])
    with pytest.raises(ValueError, match="GPTVQ needs hessian_II"):
        GPTVQ().quantize(weight, InputStats(), spec)
    with pytest.raises(ValueError, match="NaN or Inf in the Hessian"):
        GPTVQ().quantize(weight, InputStats(hessian_II=torch.full((32, 32), torch.nan)), spec)
    with pytest.raises(ValueError, match=r"Hessian of shape \(16, 16\) for 32 inputs"):
        GPTVQ().quantize(weight, InputStats(hessian_II=torch.eye(16)), spec)
    with pytest.raises(ValueError, match="NaN or Inf in the weights"):
        GPTVQ().quantize(weight * torch.nan, InputStats(hessian_II=torch.eye(32)), spec)


@pytest.mark.parametrize(
    "settings",
    [{"dim": 3}, {"damping": -1.0}, {"damping": torch.nan}, {"kmeans_iterations": 0}, {"codebook_steps": -1}],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))} .* is not"):
        GPTVQ(**settings)
