"""Additivity: predictions and measurements against their definitions, plans at random, warnings, going on."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from bitlaw.allocation import additivity as module
from bitlaw.allocation.additivity import Additivity, RangeCheck, check_additivity, draw_plans, predict
from bitlaw.allocation.curves import CurveSettings, RateDistortion, TensorKey, plan_of_widths, tensor_keys
from bitlaw.allocation.exact import measure_curves
from bitlaw.allocation.paths import Paths
from bitlaw.methods.quantize import quantize
from bitlaw.precision import BitPlan, Precision
from tiny_models import tiny_dit, tiny_var

SETTINGS = CurveSettings(widths=(2, 3, 6, 8), num_images=2, protect=("none",))
RANGES = ((6, 8), (2, 3))


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("BITLAW_CACHE", "")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_var()


@pytest.fixture(scope="module")
def curves(model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITLAW_CACHE", "")
        return measure_curves(model, SETTINGS, name="tiny")


def made_up(settings=SETTINGS, sites=("a", "b"), distortion=lambda key, bits: 4.0**-bits):
    keys = tensor_keys(settings, sites)
    by_step = {
        key: tuple((distortion(key, bits), 3 * distortion(key, bits)) for bits in settings.widths) for key in keys
    }
    return RateDistortion(by_step, settings, "exact", "made up", "0")


def test_a_plan_of_widths():
    settings = replace(SETTINGS, step_groups=(0, 3))
    a, b = TensorKey("a", "weight"), TensorKey("b", "input", 1)
    plan = plan_of_widths(settings, {a: 2, b: 3})
    assert plan.step_groups == (0, 3)
    assert [str(p) for p in plan["a"]] == ["W2A16", "W2A16"]
    assert [str(p) for p in plan["b"]] == ["W16A16", "W16A3"]
    static = plan_of_widths(
        replace(settings, static_inputs=True, group_size=8), {a: 2, b: 3, TensorKey("b", "weight"): 0}
    )
    assert [str(p) for p in static["b"]] == ["W0A16", "W0A3c"]
    assert str(static["a"][0]) == "W2g8A16"


def test_predictions_are_sums_of_means_over_steps():
    curves = made_up()
    widths = {TensorKey("a", "weight"): 2, TensorKey("b", "input"): 3}
    assert predict(curves, widths) == pytest.approx(2 * (4.0**-2 + 4.0**-3))


def test_plans_are_at_random_within_bounds_differ_and_can_be_drawn_again():
    curves = made_up(replace(SETTINGS, widths=tuple(range(11))), sites=tuple("abcdef"))
    plans = draw_plans(curves, 3, 5, 40, seed=1)
    assert plans == draw_plans(curves, 3, 5, 40, seed=1)
    assert plans[:7] == draw_plans(curves, 3, 5, 7, seed=1)
    assert plans != draw_plans(curves, 3, 5, 40, seed=2)
    assert len({tuple(plan.values()) for plan in plans}) == 40
    assert all(list(plan) == curves.keys() for plan in plans)
    assert {width for plan in plans for width in plan.values()} == {3, 4, 5}
    averages = [sum(plan.values()) / len(plan) for plan in plans]
    assert min(averages) < 3.6 and max(averages) > 4.4  # not all around the middle
    few = made_up(replace(SETTINGS, what="weights"))
    assert len(draw_plans(few, 2, 3, 4)) == 4
    with pytest.raises(ValueError, match="2 tensors at 2 widths make fewer than 5 plans"):
        draw_plans(few, 2, 3, 5)
    with pytest.raises(ValueError, match=r"no two widths from 4 to 6; they have \(2, 3, 6, 8\)"):
        draw_plans(few, 4, 6, 3)


def test_statistics():
    part = RangeCheck(2, 4, (3.0, 3.0, 3.0), (1.0, 2.0, 4.0), (1.5, 2.0, 5.0))
    assert part.correlation == pytest.approx(np.corrcoef([1, 2, 4], [1.5, 2, 5])[0, 1])
    assert part.log_correlation == pytest.approx(np.corrcoef(np.log([1, 2, 4]), np.log([1.5, 2, 5]))[0, 1])
    assert part.slope == pytest.approx((1.5 + 4 + 20) / (1 + 4 + 16))
    assert part.holds
    assert not replace(part, measured=(3.0, 4.0, 10.0)).holds  # additive but for a factor 2
    assert not replace(part, measured=(4.0, 2.0, 1.0)).holds
    assert replace(part, measured=(1.0, 1.0, 1.0)).correlation == 0


def test_measured_is_what_quantizing_together_gives(model, curves):
    check = check_additivity(model, curves, ranges=RANGES, num_plans=3, seed=5)
    paths = Paths(model, SETTINGS)
    for part, (low, high) in zip(check.ranges, RANGES, strict=True):
        for index, widths in enumerate(draw_plans(curves, low, high, 3, seed=5)):
            bits = {
                s.name: tuple(widths[TensorKey(s.name, what)] for what in ("weight", "input")) for s in model.sites()
            }
            plan = BitPlan({name: (Precision.parse(f"W{own[0]}A{own[1]}"),) for name, own in bits.items()})
            assert part.measured[index] == float(paths.distortion(quantize(model, plan)).mean())
            assert part.predicted[index] == pytest.approx(predict(curves, widths))
            assert part.average_bits[index] == pytest.approx(sum(widths.values()) / len(widths))
            assert check.average_bits(plan) == pytest.approx(part.average_bits[index])


def test_at_high_widths_distortions_add_up_and_a_failure_is_warned_of(model, curves):
    check = check_additivity(model, curves, ranges=((6, 8),), num_plans=8)
    (part,) = check.ranges
    assert part.correlation > 0.95
    assert 0.8 < part.slope < 1.25
    assert check.warning_for(BitPlan.uniform(Precision.parse("W8A6"), model.sites(), "none")) is None
    low = BitPlan.uniform(Precision.parse("W2A2"), model.sites(), "none")
    assert "2.00 bits for a tensor, fewer than any that additivity was tested with" in check.warning_for(low)


def test_a_plan_is_judged_by_the_plans_nearest_to_it(model, curves):
    def part(low, high, average, factor):
        predicted = (1.0, 2.0, 3.0)
        measured = tuple(factor * p for p in predicted) if factor else (3.0, 1.0, 2.0)
        return RangeCheck(low, high, (average - 0.5, average, average + 0.5), predicted, measured)

    ranges = (part(6, 8, 7.0, 1.0), part(3, 5, 4.0, 0.5), part(1, 3, 2.0, 0.0))
    check = Additivity(ranges, tuple(curves.keys()), SETTINGS, "exact", 0, "tiny", "0")

    def warning(precision):
        return check.warning_for(BitPlan.uniform(Precision.parse(precision), model.sites(), "none"))

    assert warning("W8A6") is None
    assert warning("W16A16") is None  # counts as 8 bits, the widest measured
    assert "rank plans, but are 2 times too high (3 to 5 bits: 3 plans" in warning("W4A4")
    assert "not even to rank plans (1 to 3 bits" in warning("W2A2")
    assert "refine the plan by measured swaps" in warning("W2A2")


def test_what_a_file_has_is_not_measured_again(model, curves, tmp_path, monkeypatch):
    file, calls = tmp_path / "a.json", []

    def counted(*arguments, **keywords):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(arguments[1])
        return quantize(*arguments, **keywords)

    monkeypatch.setattr(module, "quantize", counted)
    with pytest.raises(KeyboardInterrupt):
        check_additivity(model, curves, ranges=RANGES, num_plans=3, file=file)
    assert [len(part["measured"]) for part in json.loads(file.read_text())["ranges"]] == [3, 1]
    calls.clear()
    monkeypatch.setattr(module, "quantize", lambda *a, **k: calls.append(a[1]) or quantize(*a, **k))
    check = check_additivity(model, curves, ranges=RANGES, num_plans=3, file=file)
    assert len(calls) == 2
    assert Additivity.read(file) == check == check_additivity(model, curves, ranges=RANGES, num_plans=3)
    calls.clear()
    assert check_additivity(model, curves, ranges=RANGES[:1], num_plans=3, file=file).ranges == check.ranges[:1]
    assert not calls
    with pytest.raises(ValueError, match=r"a\.json: of another model \(tiny\), other curves or another seed"):
        check_additivity(model, curves, ranges=RANGES, num_plans=3, file=file, seed=1)
    file.write_text('{"bitlaw_additivity": 1}')
    with pytest.raises(ValueError, match=r"a\.json: cannot be read as a check of additivity"):
        check_additivity(model, curves, ranges=RANGES, num_plans=3, file=file)


def test_mistakes_are_found_before_anything_is_measured(model, curves, monkeypatch):
    monkeypatch.setattr(module, "Paths", lambda *_: pytest.fail("drawn"))
    with pytest.raises(ValueError, match=r"of another model \(made up\)"):
        check_additivity(model, made_up())
    with pytest.raises(ValueError, match="2 plans of a range have no correlation"):
        check_additivity(model, curves, num_plans=2)
    with pytest.raises(ValueError, match="no two widths from 3 to 5"):
        check_additivity(model, curves, ranges=((6, 8), (3, 5)))


def test_step_groups_with_static_ranges():
    torch.manual_seed(0)
    model = tiny_dit()
    settings = replace(SETTINGS, widths=(4, 8), step_groups=(0, 2), what="inputs", static_inputs=True)
    check = check_additivity(model, measure_curves(model, settings), ranges=((4, 8),), num_plans=6)
    assert {key.group for key in check.tensors} == {0, 1}
    assert check.ranges[0].correlation > 0.8
    assert 0.5 < check.ranges[0].slope < 2
