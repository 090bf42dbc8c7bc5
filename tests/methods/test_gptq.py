"""GPTQ against the original's figures, against plain OBQ in float64, and at the edges of what a Hessian can be."""

import logging
from dataclasses import replace

import pytest
import torch
from recipes import recipe
from torch import Tensor, nn

from bitlaw.calibration import InputStats
from bitlaw.formats import FORMATS, Codebook, IntegerFormat
from bitlaw.methods.gptq import GPTQ, _clearly_loses_more, _Columns, factorize
from bitlaw.packing import pack, unpack
from bitlaw.quantized import QuantizedTensor, WeightSpec

# Mean squared error of X (W - Wq)^T on the recipe below by the original code (damping 0.01, block 128) and by its
# rounding to nearest: bits, symmetric, group size.
ORIGINAL = {
    (4, True, None): (5.872878e-01, 1.215627),
    (4, False, None): (4.793994e-01, 0.9774539),
    (4, False, 32): (3.201553e-01, 0.6265277),
    (3, True, None): (2.732790, 5.534487),
    (3, False, None): (2.208186, 4.446069),
    (3, False, 32): (1.571643, 3.011594),
}

GROUPED = [
    WeightSpec(FORMATS[name], group_size)
    for name in ("int4", "int3", "int2", "int4s", "e2m1")
    for group_size in (None, 16, "tensor")
]


def hessian_of(x: Tensor) -> Tensor:
    return (x.double().T @ x.double() / len(x)).float()


def output_error(weight: Tensor, quantized: QuantizedTensor, x: Tensor) -> float:
    return float((x.double() @ (weight - quantized.decode()).double().T).square().mean())


def assert_same(a: QuantizedTensor, b: QuantizedTensor) -> None:
    assert torch.equal(a.codes, b.codes)
    assert a.params.keys() == b.params.keys()
    for name, value in a.params.items():
        assert value.dtype == b.params[name].dtype and torch.equal(value, b.params[name])


# ---- the original -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "symmetric", "group_size"), ORIGINAL)
def test_errors_of_the_original(bits: int, symmetric: bool, group_size: int | None) -> None:
    """Its symmetric scale is `full_range`. 1 %: its scales are float32, ours are stored in float16."""
    weight, x = recipe()
    gptq, rtn = ORIGINAL[bits, symmetric, group_size]
    spec = WeightSpec(IntegerFormat(bits, symmetric, full_range=symmetric), group_size)
    solution = GPTQ(fit_by_block=True).solve(weight, hessian_of(x), spec)
    assert solution.damping == 0.01 and not solution.is_rtn
    assert output_error(weight, solution.quantized, x) == pytest.approx(gptq, rel=1e-2)

    x_GN = spec.groups(weight)
    nearest = spec.format.nearest(x_GN, spec.format.fit(x_GN)).reshape(weight.shape)
    assert float((x @ (weight - nearest).T).square().mean()) == pytest.approx(rtn, rel=1e-5)  # of the product
    assert torch.equal(nearest, spec.format.fake(x_GN).reshape(weight.shape))


@pytest.mark.parametrize(("bits", "symmetric", "group_size"), ORIGINAL)
def test_only_stored_scales_part_it_from_the_original(
    bits: int, symmetric: bool, group_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With scales kept in float32, as the original keeps them. 1e-3: its factor is of an inverse in float32."""
    monkeypatch.setattr(IntegerFormat, "storable", lambda self, params: params)
    weight, x = recipe()
    spec = WeightSpec(IntegerFormat(bits, symmetric, full_range=symmetric), group_size)
    quantized = GPTQ(fit_by_block=True).solve(weight, hessian_of(x), spec).quantized
    assert output_error(weight, quantized, x) == pytest.approx(ORIGINAL[bits, symmetric, group_size][0], rel=1e-3)


@pytest.mark.parametrize("bits", [3, 4])
def test_fitting_groups_as_they_begin_loses_less(bits: int) -> None:
    weight, x = recipe()
    spec = WeightSpec(FORMATS[f"int{bits}"], 32)
    quantized = GPTQ().solve(weight, hessian_of(x), spec).quantized
    assert output_error(weight, quantized, x) < ORIGINAL[bits, False, 32][0]


# ---- theory -------------------------------------------------------------------------------------------


def obq(weight_OI: Tensor, hessian_II: Tensor, spec: WeightSpec) -> Tensor:
    """Plain OBQ in order, float64: quantize a column, move all that are free by the inverse Hessian, eliminate."""
    w, num_inputs = weight_OI.double().clone(), weight_OI.shape[1]
    hessian = hessian_II.double() + 0.01 * hessian_II.double().diagonal().mean() * torch.eye(num_inputs)
    inverse = hessian.inverse()
    size = spec.group_size if isinstance(spec.group_size, int) else num_inputs
    params, out = spec.fit(weight_OI), torch.zeros_like(w)
    for column in range(num_inputs):
        if size < num_inputs and column % size == 0:
            params = WeightSpec(spec.format).fit(w[:, column : column + size].float())
        x_G1 = w[:, column : column + 1].float()
        out[:, column] = spec.format.decode(spec.format.encode(x_G1, params), params).squeeze(1)
        error = (w[:, column] - out[:, column]) / inverse[column, column]
        w -= error[:, None] * inverse[column]
        inverse -= inverse[:, column : column + 1] * inverse[column] / inverse[column, column]
    return out.float()


@pytest.mark.parametrize("spec", GROUPED, ids=str)
def test_equals_plain_obq(spec: WeightSpec) -> None:
    """But for numbers that float32 puts on the other side of a tie, and what follows from them in their rows."""
    weight, x = recipe()
    hessian = hessian_of(x)
    quantized = GPTQ().quantize(weight, InputStats(hessian_II=hessian), spec)
    is_equal_O = (quantized.decode() == obq(weight, hessian, spec)).all(1)
    assert is_equal_O.float().mean() >= 0.9


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("name", ["int0", "int1", "int4", "int8s", "int12", "e2m1", "e4m3"])
def test_identity_gives_rtn(name: str, factor: float, act_order: bool) -> None:
    weight, _ = recipe()
    weight[3], weight[4, :16] = 0, -0.5
    for group_size in (None, 8, 48, "tensor") if name != "int0" else (None,):
        for scale in (1.0, 1e-9):  # the second has scales that float16 cannot hold
            spec = WeightSpec(FORMATS[name], group_size)
            quantized = GPTQ(act_order=act_order).solve(scale * weight, factor * torch.eye(96), spec).quantized
            assert_same(quantized, spec.quantize(scale * weight))


@pytest.mark.parametrize("spec", GROUPED, ids=str)
@pytest.mark.parametrize("act_order", [False, True])
def test_improves_on_rtn(spec: WeightSpec, act_order: bool) -> None:
    weight, x = recipe()
    quantized = GPTQ(act_order=act_order).quantize(weight, InputStats(hessian_II=hessian_of(x)), spec)
    assert output_error(weight, quantized, x) < 0.8 * output_error(weight, spec.quantize(weight), x)
    again = unpack("a", pack("a", quantized), spec)
    assert torch.equal(again.decode(), quantized.decode())


def test_any_factor_before_the_hessian() -> None:
    weight, x = recipe()
    spec = WeightSpec(FORMATS["int3"], 32)
    a, b = (GPTQ().solve(weight, factor * hessian_of(x), spec).quantized for factor in (1, 2.0**70))
    assert_same(a, b)


def test_activation_order_is_a_permutation_of_the_columns() -> None:
    """With parameters of its own for each row, the order is all that changes."""
    weight, x = recipe()
    x = x * torch.linspace(0.2, 3, 96)[torch.randperm(96, generator=torch.Generator().manual_seed(0))]
    hessian, spec = hessian_of(x), WeightSpec(FORMATS["int3"])
    order = hessian.diagonal().argsort(descending=True)
    permuted = GPTQ().solve(weight[:, order], hessian[order][:, order], spec).quantized
    ordered = GPTQ(act_order=True).solve(weight, hessian, spec).quantized
    assert torch.equal(ordered.decode()[:, order], permuted.decode())
    assert not torch.equal(ordered.codes, GPTQ().solve(weight, hessian, spec).quantized.codes)


def test_activation_order_keeps_groups_and_their_parameters() -> None:
    weight, x = recipe()
    x = x * torch.linspace(3, 0.2, 96)
    spec = WeightSpec(FORMATS["int4"], 16)
    fitted = spec.fit(weight)
    quantized = GPTQ(act_order=True).solve(weight, hessian_of(x.flip(1)), spec).quantized
    assert all(torch.equal(quantized.params[name], value) for name, value in fitted.items())
    steps = fitted["scale_G1"].float().view(48, 6).repeat_interleave(16, 1)
    assert float(((quantized.decode() - weight).abs() / steps).median()) < 1  # each column by its own group's scale


def test_blocks_change_nothing_but_rounding() -> None:
    """Sizes that do and do not divide, across blocks of the factorization."""
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(12, 600, generator=g), torch.randn(900, 600, generator=g)
    x[:, 1:] += x[:, :-1]
    hessian = hessian_of(x)
    for group_size in (None, 40, 100, 300):
        spec = WeightSpec(FORMATS["int4"], group_size)
        results = [GPTQ(column_block=block).solve(weight, hessian, spec).quantized for block in (128, 1, 7, 600)]
        for other in results[1:]:
            assert (other.codes == results[0].codes).all(1).float().mean() > 0.7  # rows without a tie
            assert output_error(weight, other, x) == pytest.approx(output_error(weight, results[0], x), rel=1e-2)


def test_factor_is_that_of_the_damped_hessian() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1500, 700, generator=g) * torch.linspace(0.1, 4, 700)
    hessian = hessian_of(x)
    factor, damping = factorize(hessian, 0.01)
    assert damping == 0.01 and torch.equal(factor, factor.triu())
    expected = hessian.double() / hessian.double().diagonal().mean() + 0.01 * torch.eye(700)
    # Sums of 700 products in float32.
    assert (factor.double() @ factor.double().T - expected).abs().max() < 1e-5 * expected.max()


# ---- edges --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [None, 16, "tensor"])
@pytest.mark.parametrize("num_rows", [1, 16, 40])
def test_singular_hessians(num_rows: int, group_size: int | None, act_order: bool) -> None:
    """One image, fewer rows than inputs, dead inputs and rows of zeros; no worse than RTN from 16 rows on."""
    weight, x = recipe()
    weight[7] = 0
    x = x[:num_rows].clone()
    x[:, [0, 50, 95]] = 0
    spec = WeightSpec(FORMATS["int3"], group_size)
    for damping in (0.01, 0.0):
        solution = GPTQ(damping=damping, act_order=act_order).solve(weight, hessian_of(x), spec)
        decoded = solution.quantized.decode()
        assert decoded.isfinite().all() and (decoded[7] == 0).all()
        rtn = spec.quantize(weight)
        # The objective is known to float32, relative to the damped one.
        assert output_error(weight, solution.quantized, x) <= output_error(weight, rtn, x) * (1 + 1e-4)


def test_dead_inputs_are_rounded_to_nearest_and_touch_nothing() -> None:
    weight, x = recipe()
    spec = WeightSpec(FORMATS["int4"])
    x[:, [0, 50]] = 0
    alive = [i for i in range(96) if i not in (0, 50)]
    weight[:, [0, 50]] *= 0.5  # so that they take no part in the range of a row
    quantized = GPTQ().solve(weight, hessian_of(x), spec).quantized
    assert torch.equal(quantized.codes[:, [0, 50]], spec.quantize(weight).codes[:, [0, 50]])
    without = GPTQ().solve(weight[:, alive], hessian_of(x)[alive][:, alive], spec).quantized
    assert torch.equal(quantized.decode()[:, alive], without.decode())


def test_inputs_that_are_all_dead() -> None:
    weight, _ = recipe()
    spec = WeightSpec(FORMATS["int4"], 32)
    assert_same(GPTQ().solve(weight, torch.zeros(96, 96), spec).quantized, spec.quantize(weight))


def test_damping_grows_until_it_can_be_factorized(caplog: pytest.LogCaptureFixture) -> None:
    weight, x = recipe()
    hessian = hessian_of(x)
    hessian -= 0.3 * hessian.diagonal().mean() * torch.eye(96)  # no longer positive
    assert torch.linalg.eigvalsh(hessian).min() < 0
    with caplog.at_level(logging.WARNING, "bitlaw.methods.gptq"):
        solution = GPTQ().solve(weight, hessian, WeightSpec(FORMATS["int4"]))
    assert solution.damping in (pytest.approx(0.1), pytest.approx(1), pytest.approx(10))
    assert "cannot be factorized with damping 0.01; going on with 0.1" in caplog.text
    assert solution.quantized.decode().isfinite().all()


def test_falls_back_to_rtn_where_that_is_better() -> None:
    """At 1 bit what is passed on often leaves the range, where it is lost."""
    found = 0
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)
        weight, x = torch.randn(1, 4, generator=g), torch.randn(16, 4, generator=g) @ torch.randn(4, 4, generator=g)
        spec, before = WeightSpec(FORMATS["int1"]), weight.clone()
        solution = GPTQ().solve(weight, hessian_of(x), spec)
        ours, rtn = output_error(weight, solution.quantized, x), output_error(weight, spec.quantize(weight), x)
        assert ours <= rtn * (1 + 1e-4) and torch.equal(weight, before)
        if solution.is_rtn:
            assert_same(solution.quantized, spec.quantize(weight))
            plain = obq(weight, hessian_of(x), spec)
            found += float((x @ (weight - plain).T).square().mean()) > rtn
    assert found > 3


@pytest.mark.parametrize("directions", [1, 3, 96])
@pytest.mark.parametrize("act_order", [False, True])
def test_error_of_rounding_is_estimated_only_where_that_is_clear(directions: int, act_order: bool) -> None:
    """The fewer directions inputs have, the less is known from probes: then the error itself has to be computed."""
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        weight = torch.randn(600, 96, generator=g)
        x = torch.randn(512, directions, generator=g) @ torch.randn(directions, 96, generator=g)
        hessian, spec = hessian_of(x), WeightSpec(FORMATS["int3"], 32)
        order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else None
        ordered = hessian if order is None else hessian[order][:, order]
        factor, damping = factorize(ordered, 0.01)
        columns = _Columns(spec, weight, factor, order)
        loss = 600 * output_error(weight, spec.quantize(weight), x) / float(hessian.diagonal().mean())
        assert not _clearly_loses_more(columns, damping, loss)
        assert _clearly_loses_more(columns, damping, 0.5 * loss) or directions < 96


def test_float16_weights_and_hessians_of_float64() -> None:
    weight, x = recipe()
    weight, spec = weight.half(), WeightSpec(FORMATS["int4"], 32)
    a = GPTQ().solve(weight, hessian_of(x).double(), spec).quantized
    assert_same(a, GPTQ().solve(weight.float(), hessian_of(x), spec).quantized)


def test_users_mistakes_are_named() -> None:
    weight, x = recipe()
    hessian, spec = hessian_of(x), WeightSpec(FORMATS["int4"])
    with pytest.raises(ValueError, match="GPTQ needs hessian_II of the layer's inputs; calibrate first"):
        GPTQ().quantize(weight, InputStats(), spec)
    for bad in (torch.nan, torch.inf):
        broken = hessian.clone()
        broken[3, 5] = bad
        with pytest.raises(ValueError, match="NaN or Inf in the Hessian"):
            GPTQ().solve(weight, broken, spec)
    with pytest.raises(ValueError, match=r"Hessian of shape \(95, 95\) for 96 inputs"):
        GPTQ().solve(weight, hessian[1:, 1:], spec)
    with pytest.raises(ValueError, match="diagonal holds negative numbers"):
        GPTQ().solve(weight, -hessian, spec)
    with pytest.raises(ValueError, match="not a multiple of group size 20"):
        GPTQ().solve(weight, hessian, replace(spec, group_size=20))
    with pytest.raises(ValueError, match="damping -1"):
        GPTQ(damping=-1)
    with pytest.raises(ValueError, match="column_block 0"):
        GPTQ(column_block=0)


def test_codebooks_are_for_another_method() -> None:
    layer = nn.Linear(96, 48)
    for format in (Codebook(1, 4), Codebook(2, 2)):
        problem = GPTQ().problem(layer, WeightSpec(format))
        assert problem is not None and problem.endswith("use gptvq")
    assert GPTQ().problem(layer, WeightSpec(FORMATS["e2m1"], 16)) is None
