"""Mixed precision as a method of a study: a precision is an average."""

import pytest

import bitlaw
from bitlaw.allocation.allocate import input_numbers
from bitlaw.allocation.by_name import apply, check, parse, parse_mixed
from bitlaw.install import plan_of
from bitlaw.precision import Precision


def test_settings_come_first_and_what_carries_the_plan_out_last() -> None:
    mixed = parse_mixed("mixed:mode=sketch,num_images=4,then=distill:topkld,steps=3,start=gptq")
    assert mixed is not None
    assert (mixed.mode, mixed.num_images, mixed.then) == ("sketch", 4, "distill:topkld,steps=3,start=gptq")
    assert parse_mixed("gptq") is None
    parse("mixed")
    for wrong in ("mixed:mode=guess", "mixed:images=3", "mixed:then=nothing", "mixed:exact", "mixed:step_groups=-1"):
        with pytest.raises(ValueError):
            parse(wrong)


@pytest.mark.parametrize("name", ["ladder/var-xs", "ladder/dit-xs"])
def test_weights_and_inputs_have_the_average_bits(name: str) -> None:
    model = bitlaw.load(name)
    small = apply(model, Precision.parse("W3A5"), "mixed:num_images=2")
    plan = plan_of(small.net)
    assert plan is not None
    sites = [site.name for site in model.sites() if site.phase == "blocks"]
    weights = {name: model.net.get_parameter(f"{name}.weight") for name in sites}
    bits = sum(weights[name].numel() * plan[name][0].weight_bits for name in plan)
    total = sum(weight.numel() for weight in weights.values())
    assert 2.7 * total < bits <= 3 * total
    entering = {name: max(steps) for name, steps in input_numbers(model).items() if name in sites}
    assert sum(entering[name] * plan[name][0].activation_bits for name in plan) <= 5 * sum(entering.values())
    assert len({plan[name][0].weight_bits for name in plan}) > 1


def test_what_no_curve_describes_is_refused() -> None:
    model = bitlaw.load("ladder/var-xs")
    for precision in ("W4A8KV8", "W4tA16", "W4A8t"):
        with pytest.raises(ValueError, match="mixed precision"):
            check(model, Precision.parse(precision), "mixed")


def test_numbers_are_not_replaced_by_others() -> None:
    model = bitlaw.load("ladder/var-xs")
    for precision in ("We3m0A16", "Wv1b3A16", "W4Ae4m3", "W4A8s"):
        with pytest.raises(ValueError, match="mixed precision"):
            check(model, Precision.parse(precision), "mixed")
    for precision in ("We2m1A16", "W4sA16", "Wv2b3A16", "W4A8", "W4A8c", "W16A6"):
        check(model, Precision.parse(precision), "mixed")


def test_groups_of_steps_are_those_of_the_method_or_else_of_whoever_asks() -> None:
    model = bitlaw.load("ladder/dit-xs")
    precision = Precision.parse("W16A4c")
    calibration = bitlaw.Calibration(num_images=2)
    for method, asked, starts in (
        ("mixed:num_images=1", 2, (0, 10)),
        ("mixed:num_images=1,step_groups=4", 2, (0, 5, 10, 15)),
    ):
        check(model, precision, method, step_groups=asked)
        plan = plan_of(apply(model, precision, method, step_groups=asked, calibration=calibration).net)
        assert plan is not None
        assert plan.step_groups == starts
    with pytest.raises(ValueError, match="step_groups 21: must be from 1 to the model's 20 steps"):
        check(model, precision, "mixed:step_groups=21")
