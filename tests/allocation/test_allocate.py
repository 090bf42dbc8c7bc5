import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_curves import made_curves
from safetensors import safe_open
from torch import nn

import bitlaw
from bitlaw.allocation.allocate import Problem, allocate, input_numbers
from bitlaw.allocation.constraints import Constraints
from bitlaw.allocation.curves import RateDistortion, TensorKey
from bitlaw.precision import BitPlan
from bitlaw.scaling.bits import count_bits
from tiny_models import TINY, tiny_dit, tiny_llamagen, tiny_var

SUM_ROUNDING = 1e-12  # relative: a few additions of float64 in another order


def saved_bytes(model, plan: BitPlan, folder: Path, **quantizing) -> int:
    bitlaw.quantize(model, plan, **quantizing).save(folder)
    return (folder / "model.safetensors").stat().st_size


def all_choices(problem: Problem):
    """Every choice of widths there is."""
    for widths in itertools.product(*(curve.widths for curve in problem.variables)):
        bits = {}
        for curve, width in zip(problem.variables, widths, strict=True):
            bits |= {TensorKey.parse(name): width for name in curve.names}
        yield bits


# ---- bytes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TINY)
def test_a_budget_of_bytes_is_met_to_the_byte_of_the_saved_file(family: str, tmp_path: Path) -> None:
    model = TINY[family]()
    problem = Problem(model, made_curves(model, what="weights"))
    least = problem.least()["bytes"]
    for more in (0, 77, 1500):
        found = problem.allocate({"bytes": least + more})
        assert saved_bytes(model, found.plan, tmp_path / "small") == found.costs["bytes"] <= least + more
        assert found.lower_bound <= found.distortion * (1 + SUM_ROUNDING)
    with pytest.raises(ValueError, match=rf"bytes: the budget is .*, but the least possible is {least:,}$"):
        problem.allocate({"bytes": least - 1})


@pytest.mark.parametrize(
    "numbers",
    [
        {"numbers": "symmetric", "group_size": 8},
        {"numbers": "float", "widths": (0, 3, 4, 8)},
        {"numbers": "codebook", "widths": (0, 1, 2, 4)},
        {"numbers": "int", "group_size": "tensor", "widths": (0, 2, 8, 9, 10)},
        {"what": "both", "static_inputs": True, "step_groups": (0, 2)},
        {"what": "both", "static_inputs": True, "widths": (3, 8)},
        {"what": "both", "static_inputs": True, "widths": (4, 10), "step_groups": (0, 1)},
    ],
)
def test_bytes_are_right_for_all_kinds_of_numbers(numbers: dict, tmp_path: Path) -> None:
    model = tiny_dit()
    model.storage_dtype = torch.bfloat16
    model.net.bfloat16().float()  # which then rounds nothing
    problem = Problem(model, made_curves(model, **{"what": "weights", **numbers}), Constraints())
    limit = problem.least()["bytes"] + 900
    found = problem.allocate({"bytes": limit})
    few = bitlaw.Calibration(num_images=2)
    assert saved_bytes(model, found.plan, tmp_path / "small", calibration=few) == found.costs["bytes"] <= limit
    again = bitlaw.load(tmp_path / "small")
    assert torch.equal(again.generate([1]), bitlaw.quantize(model, found.plan, calibration=few).generate([1]))


MODEL = tiny_var()


@given(st.integers(0, 2**32), st.integers(0, 6000))
@settings(max_examples=25, deadline=None)
def test_bytes_are_never_above_a_budget_and_close_to_the_best_there_is(seed: int, more: int) -> None:
    problem = Problem(MODEL, made_curves(MODEL, seed, what="weights"))
    limit = problem.least()["bytes"] + more
    found = problem.allocate({"bytes": limit})
    assert found.costs["bytes"] <= limit
    assert found.exact_distortion <= found.lagrangian_distortion
    assert found.lower_bound <= found.distortion * (1 + SUM_ROUNDING)


@given(st.integers(0, 2**32), st.floats(0, 1))
@settings(max_examples=10, deadline=None)
def test_bounds_of_bytes_enclose_the_best_of_all_plans(seed: int, share: float) -> None:
    others = [site.name for site in MODEL.sites() if site.block != 0 or site.kind == "adaln"]
    problem = Problem(MODEL, made_curves(MODEL, seed, what="weights"), Constraints((0, 2, 4, 16), tuple(others)))
    choices = [(problem.costs(bits)["bytes"], problem.distortion(bits)) for bits in all_choices(problem)]
    sizes = [size for size, _ in choices]
    limit = min(sizes) + share * (max(sizes) - min(sizes))
    best = min(distortion for size, distortion in choices if size <= limit)
    found = problem.allocate({"bytes": limit})
    assert found.lower_bound <= best * (1 + SUM_ROUNDING) and best <= found.distortion * (1 + SUM_ROUNDING)
    # The header's digits are some bytes of thousands, so that a plan a little further down is rarely missed.
    nearly = [distortion for size, distortion in choices if size <= limit - 16 * len(problem.variables)]
    assert not nearly or found.distortion <= min(nearly) * (1 + SUM_ROUNDING)


def test_scales_out_of_the_range_of_float16_are_counted_as_they_are_stored(tmp_path: Path) -> None:
    model = tiny_var()
    with torch.no_grad():
        model.net.get_parameter("blocks.0.ffn.fc1.weight").mul_(1e-8)
    found = allocate(model, made_curves(model, what="weights"), {"bits_per_weight": 4}, constraints=Constraints((4,)))
    assert saved_bytes(model, found.plan, tmp_path / "small") == found.costs["bytes"]
    with safe_open(tmp_path / "small" / "model.safetensors", "pt") as file:
        assert file.get_tensor("blocks.0.ffn.fc1.weight_scale").dtype == torch.float32


# ---- other budgets -------------------------------------------------------------------------------------


def test_average_bits_limit_weights_and_inputs_apart() -> None:
    model = tiny_dit()
    curves = made_curves(model, step_groups=(0, 2))
    found = allocate(model, curves, {"bits_per_weight": 3, "bits_per_activation": 4})
    weights = {key: model.net.get_parameter(f"{key.site}.weight").numel() for key in curves.keys("weight")}
    assert sum(found.bits[key] * count for key, count in weights.items()) == found.costs["weight_bits"]
    assert found.costs["weight_bits"] <= 3 * sum(weights.values()) == found.budgets["weight_bits"]
    rows = {"blocks.0.adaLN_modulation.1": 1, "blocks.1.adaLN_modulation.1": 1}
    inputs = {
        key: rows.get(key.site, model.net.config.num_tokens) * model.net.get_submodule(key.site).in_features
        for key in curves.keys("input")
    }
    assert sum(found.bits[key] * count for key, count in inputs.items()) == found.costs["activation_bits"]
    assert found.costs["activation_bits"] <= 4 * sum(inputs.values()) == found.budgets["activation_bits"]
    for key, bits in found.bits.items():
        precision = found.plan[key.site][key.group]
        assert (precision.weight_bits if key.what == "weight" else precision.activation_bits) == bits
    assert found.lagrangian_gap_percent >= 0 and found.gap_percent < 1e-6


@pytest.mark.parametrize("family", TINY)
def test_numbers_that_enter_a_linear_in_all_are_its_inputs_times_its_uses(family: str) -> None:
    model = TINY[family]()
    numbers = input_numbers(model)
    for site in model.sites():
        layer = model.net.get_submodule(site.name)
        assert len(numbers[site.name]) == model.num_steps
        if isinstance(layer, nn.Linear):
            assert sum(numbers[site.name]) == layer.in_features * site.uses, site.name
        else:
            assert sum(numbers[site.name]) > 0


def test_inputs_are_counted_once_in_a_step_group_or_as_used() -> None:
    model = tiny_var()  # stages of 1, 4 and 16 tokens
    curves = made_curves(model, what="inputs", step_groups=(0, 1))
    found = allocate(model, curves, {"bits_per_activation": 8}, constraints=Constraints((8,)))
    inside = [site for site in model.sites() if site.phase == "blocks"]
    width = {site.name: model.net.get_submodule(site.name).in_features for site in inside}
    once = sum(width[s.name] * (1 if s.kind == "adaln" else 1 + 16) for s in inside)
    used = sum(width[s.name] * (1 if s.kind == "adaln" else 1 + 4 + 16) for s in inside)
    assert (found.costs["activation_bits"], found.costs["activation_bits_used"]) == (8 * once, 8 * used)


@pytest.mark.parametrize("budget", ["compute_bits", "compute_bits_used"])
def test_compute_bits_are_the_best_of_all_plans_and_those_of_the_quantized_model(budget: str) -> None:
    model = tiny_var()
    others = [site.name for site in model.sites() if site.name not in ("blocks.0.attn.proj", "blocks.1.ffn.fc2")]
    curves = made_curves(model, step_groups=(0, 1))
    problem = Problem(model, curves, Constraints((2, 4, 16), tuple(others)))
    choices = [(problem.costs(bits)[budget], problem.distortion(bits)) for bits in all_choices(problem)]
    costs = sorted(cost for cost, _ in choices)
    for limit in (costs[0], costs[len(costs) // 3], costs[len(costs) // 2]):
        found = problem.allocate({budget: limit})
        best = min(distortion for cost, distortion in choices if cost <= limit)
        assert found.costs[budget] <= limit and found.distortion == pytest.approx(best, rel=SUM_ROUNDING)
        counted = count_bits(bitlaw.quantize(model, found.plan))
        assert found.costs["compute_bits"] == counted.compute_code_bits
        assert found.costs["compute_bits_used"] == counted.compute_code_bits_used


def test_compute_bits_of_weights_alone_and_of_too_many_combinations() -> None:
    model = tiny_dit()
    limit = 0.5 * count_bits(model).compute_code_bits
    found = allocate(model, made_curves(model, what="weights"), {"compute_bits": limit})
    assert found.costs["compute_bits"] <= limit and found.lagrangian_distortion is not None
    many = made_curves(model, step_groups=(0, 1, 2, 3), widths=tuple(range(8)))
    with pytest.raises(ValueError, match=r"32768 combinations of the widths .* at most 4096"):
        allocate(model, many, {"compute_bits": limit})


def test_several_budgets_at_once(tmp_path: Path) -> None:
    model = tiny_llamagen()
    curves = made_curves(model)
    problem = Problem(model, curves, Constraints((2, 3, 4, 8)))
    least = problem.least()
    budgets = {"bytes": least["bytes"] + 1000, "bits_per_activation": 4, "compute_bits": 1.5 * least["compute_bits"]}
    found = problem.allocate(budgets)
    assert all(found.costs[name] <= limit for name, limit in found.budgets.items())
    assert saved_bytes(model, found.plan, tmp_path / "small") == found.costs["bytes"]
    assert found.lagrangian_distortion is None
    with pytest.raises(ValueError, match="lagrangian: a tensor counts for several"):
        problem.allocate(budgets, "lagrangian")
    lowest = {name: least[name] for name in ("weight_bits", "activation_bits", "compute_bits")}
    assert problem.allocate(lowest).costs["weight_bits"] == least["weight_bits"]


@pytest.mark.parametrize("more", [{}, {"compute_bits": 1e9}])
def test_budgets_that_exclude_each_other_are_refused(more: dict) -> None:
    model = tiny_llamagen()
    model.storage_dtype = torch.bfloat16
    # Of so few weights scales and names take more than 8 of 16 bits save: the file is smallest with 16.
    problem = Problem(model, made_curves(model, what="weights"), Constraints((8, 16)))
    least = problem.least()
    with pytest.raises(ValueError, match=r"least possible is .* if weight_bits is met|bytes and .* together"):
        problem.allocate({"bytes": least["bytes"], "weight_bits": least["weight_bits"], **more})


def test_the_lagrangian_is_within_the_budget_and_no_better() -> None:
    model = tiny_dit()
    for seed in range(5):
        curves = made_curves(model, seed)
        found = allocate(model, curves, {"bits_per_weight": 3.3, "bits_per_activation": 5}, "lagrangian")
        assert found.distortion == found.lagrangian_distortion >= found.exact_distortion >= found.lower_bound
        assert found.costs["weight_bits"] <= found.budgets["weight_bits"]


# ---- constraints ---------------------------------------------------------------------------------------


def test_constraints_are_kept() -> None:
    model = tiny_dit()
    curves = made_curves(model)
    constraints = Constraints(
        widths=(2, 4, 8, 16), protect=("fc2", "blocks.1.attn.*"), min_bits={"*": 4, "qkv": 8}, tie=("kind", "fc1+adaln")
    )
    found = allocate(model, curves, {"bits_per_weight": 7, "bits_per_activation": 9}, constraints=constraints)
    kept = {site.name for site in model.sites() if site.kind in ("fc2", "embed", "head")} | {
        site.name for site in model.sites() if site.name.startswith("blocks.1.attn.") or site.phase != "blocks"
    }
    for site in model.sites():
        (precision,) = found.plan[site.name]
        if site.name in kept:
            assert precision.is_full
        else:
            least = 8 if site.kind == "qkv" else 4
            assert {precision.weight_bits, precision.activation_bits} <= {2, 4, 8, 16} - set(range(least))
    tied = {found.plan[f"blocks.{i}.{name}"] for i in (0, 1) for name in ("mlp.fc1", "adaLN_modulation.1")}
    assert len(tied) == 1
    assert {key.site for key in found.bits}.isdisjoint(kept)


def test_ties_of_a_block_and_of_a_kind_in_it() -> None:
    model = tiny_llamagen()
    curves = made_curves(model, what="weights")
    for rule in ("block", "kind-in-block"):
        plan = allocate(model, curves, {"bits_per_weight": 3.1}, constraints=Constraints(tie=(rule,))).plan
        for block in (0, 1):
            inside = [site for site in model.sites() if site.block == block]
            names = [s.name for s in inside if rule == "block" or s.kind == "fc1"]
            assert len({plan.weight(name) for name in names}) == 1 < len(names)


def test_sixteen_bits_leave_a_tensor_as_it_is() -> None:
    model = tiny_var()
    found = allocate(model, made_curves(model), {"bytes": 1e9}, constraints=Constraints((4, 16)))
    assert found.distortion == found.lower_bound == 0
    assert all(precision.is_full for site in found.plan for precision in found.plan[site])


@pytest.mark.parametrize(
    ("budgets", "constraints", "message"),
    [
        ({"bits_per_weight": 1.9}, Constraints((2, 4)), r"least possible is .* \(2 a number\)"),
        ({}, Constraints(), "there is no budget"),
        ({"bits_per_wieght": 4}, Constraints(), "did you mean bits_per_weight"),
        ({"bits_per_weight": math.nan}, Constraints(), "bits_per_weight nan"),
        ({"bits_per_weight": 4, "weight_bits": 9}, Constraints(), "limited already"),
        ({"bits_per_activation": 4}, Constraints(), "no curves of inputs"),
        ({"bits_per_weight": 4}, Constraints((3, 5)), "widths 5: these curves are of"),
        ({"bits_per_weight": 4}, Constraints(protect=("fc3",)), "did you mean fc"),
        ({"bits_per_weight": 4}, Constraints(tie=("fc3",)), "did you mean fc"),
        ({"bits_per_weight": 4}, Constraints(min_bits={"fc2": 9}), "9 or more"),
        ({"bits_per_weight": 4}, Constraints(protect=("blocks.*",)), "nothing to allocate"),
    ],
)
def test_mistakes_are_said(budgets: dict, constraints: Constraints, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allocate(MODEL, made_curves(MODEL, what="weights"), budgets, constraints=constraints)


def test_widths_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="17 bits"):
        Constraints((4, 17))


def test_curves_of_another_model_are_refused_or_warned_of() -> None:
    with pytest.raises(ValueError, match=r"unknown site 'blocks.0.ada_lin.1'(.|\n)*curves are of made"):
        allocate(tiny_dit(), made_curves(MODEL), {"bits_per_weight": 4})
    other = tiny_var()
    with pytest.warns(UserWarning, match="measured on 'made' with other numbers"):
        allocate(other, made_curves(MODEL), {"bits_per_weight": 4})
    curves = made_curves(MODEL)
    short = RateDistortion(
        {key: tuple(steps[:-1] for steps in value) for key, value in curves.by_step.items()},
        curves.settings,
        curves.mode,
        curves.model,
        curves.fingerprint,
    )
    with pytest.raises(ValueError, match=r"5 widths and 3 steps"):
        allocate(MODEL, short, {"bits_per_weight": 4})
    small = bitlaw.quantize(MODEL, "W4A16")
    with pytest.raises(ValueError, match="quantized already"):
        allocate(small, curves, {"bits_per_weight": 4})


# ---- zero bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rtn", "gptq", "clip", "omniquant:steps=2", "adaround:steps=2", "smoothquant+rtn"])
def test_a_tensor_of_zero_bits_is_not_stored(method: str, tmp_path: Path) -> None:
    model = tiny_var()
    constraints = Constraints((0, 4), tie=("kind",))
    curves = made_curves(model, what="weights")
    dropped = {
        key: tuple((0.0,) * model.num_steps for _ in value) if "fc1" in key.site else value
        for key, value in curves.by_step.items()
    }
    curves = replace(curves, by_step=dropped)
    found = allocate(model, curves, {"bits_per_weight": 3}, constraints=constraints)
    assert found.plan["blocks.0.ffn.fc1"][0].weight_bits == 0
    small = bitlaw.quantize(model, found.plan, method, calibration=bitlaw.Calibration(num_images=2))
    small.save(tmp_path / "small")
    with safe_open(tmp_path / "small" / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith("blocks.0.ffn.fc1.weight")]  # noqa: SIM118
    assert names == ["blocks.0.ffn.fc1.weight_shape"]
    again = bitlaw.load(tmp_path / "small")
    assert not again.net.get_submodule("blocks.0.ffn.fc1").weight.any()
    assert torch.equal(again.generate([1, 2]), small.generate([1, 2]))


def test_inputs_of_zero_bits_are_zeros(tmp_path: Path) -> None:
    model = tiny_dit()
    found = allocate(model, made_curves(model), {"bits_per_activation": 0, "bits_per_weight": 4})
    small = bitlaw.quantize(model, found.plan, "gptq", calibration=bitlaw.Calibration(num_images=2))
    layer = small.net.get_submodule("blocks.0.mlp.fc2")
    assert torch.equal(layer(torch.randn(3, layer.in_features)), layer.bias.expand(3, -1))
    small.save(tmp_path / "small")
    assert torch.equal(bitlaw.load(tmp_path / "small").generate([1]), small.generate([1]))
