import json
from pathlib import Path

import pytest
import torch
from made_curves import made_curves

import bitlaw
from bitlaw.allocation.allocate import Problem
from bitlaw.allocation.constraints import Constraints
from bitlaw.allocation.plan_file import (
    PlanFile,
    check_plan_for,
    model_provenance,
    plan_provenance,
    preset_plan,
    read_plan,
    write_plan,
)
from bitlaw.distill import Distillation, distill
from bitlaw.models.networks.var import VARConfig, VARTransformer
from bitlaw.models.var import VAR
from bitlaw.precision import BitPlan, Precision
from bitlaw.quantized import QuantLayer
from tiny_models import tiny_ddpm, tiny_dit, tiny_llamagen, tiny_var

FEW = bitlaw.Calibration(num_images=2)
SHORT = {"steps": 2, "batch_size": 2, "num_examples": 4, "num_held_out": 2, "data": "generated"}


def test_a_plan_is_carried_out_by_gptq_and_distillation_with_the_bits_it_says(tmp_path: Path) -> None:
    model = tiny_var()
    problem = Problem(model, made_curves(model), Constraints((0, 2, 4, 8, 16)))
    found = problem.allocate({"bits_per_weight": 3.5, "bits_per_activation": 6})
    # A weight that is dropped, whatever the curves say, goes through everything as well.
    bits = {**found.bits, **{key: 0 for key in problem.keys if key.site == "blocks.1.ffn.fc1" and key.what == "weight"}}
    write_plan(tmp_path / "plan.json", problem.plan(bits), plan_provenance(problem, found, "tiny"))
    file = read_plan(tmp_path / "plan.json")
    plan = check_plan_for(model, file)
    assert plan == problem.plan(bits)
    assert file.provenance["model"] == "tiny" and file.provenance["costs"] == found.costs
    assert file.provenance["curves"]["settings"]["widths"] == [0, 2, 3, 4, 8]
    students = {
        "gptq": bitlaw.quantize(model, plan, "gptq", calibration=FEW),
        "distilled": distill(model, plan, Distillation(start="gptq", **SHORT), calibration=FEW),
    }
    for name, small in students.items():
        small.save(tmp_path / name)
        again = bitlaw.load(tmp_path / name)
        assert torch.equal(again.generate([0, 3]), small.generate([0, 3]))
        stored = json.loads((tmp_path / name / "bitlaw.json").read_text())["plan"]
        for site in model.sites():
            layer = again.net.get_submodule(site.name)
            if all(precision.is_full for precision in plan[site.name]):
                assert not isinstance(layer, QuantLayer)
                continue
            assert stored["sites"][site.name] == [str(precision) for precision in plan[site.name]]
            weight = plan.weight(site.name)
            assert layer.quantized is None if weight is None else layer.quantized.spec.format == weight.format
            assert weight is None or len(layer.weight.flatten(1)[0].unique()) <= 2**weight.format.code_width
        assert not again.net.get_submodule("blocks.1.ffn.fc1").weight.any()


def test_a_plan_written_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(
        '{"step_groups": [0, 2], "sites": {"blocks.0.attn.qkv": "W4A8", "blocks.1.mlp.fc1": ["W3A8", "W3A4"]}}'
    )
    file = read_plan(path)
    model = tiny_dit()
    plan = check_plan_for(model, file)
    assert file.provenance == {} and plan.step_groups == (0, 2)
    assert [str(p) for p in plan["blocks.0.attn.qkv"]] == ["W4A8", "W4A8"]
    small = bitlaw.quantize(model, plan)
    changed = [name for name, module in small.net.named_modules() if isinstance(module, QuantLayer)]
    assert changed == list(plan)
    path.write_text('{"sites": {"blocks.0.attn.qkv": "W4A8"}}')
    assert read_plan(path).plan == BitPlan({"blocks.0.attn.qkv": (Precision.parse("W4A8"),)})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "not JSON"),
        ("[]", "not a bit plan: an object"),
        ('{"step_groups": [0]}', "not a bit plan: sites missing"),
        ('{"sites": {"a": ["W17A8"]}}', r"a: cannot read the precision 'W17A8'(.|\n)*0 to 16 bits"),
        ('{"sites": {"a": [4]}}', r"a: \[4\] is not a precision for each step group"),
        ('{"sites": {"a": ["W4A8", "W4A8"]}}', "a: 2 precisions for 1 step groups"),
        ('{"step_groups": [0, 2], "sites": {"a": ["W4A8", "W3A8"]}}', "weight precision differs between step groups"),
        ('{"step_groups": [2, 0], "sites": {"a": "W4A8"}}', "begin at 0 and ascend"),
        ('{"step_groups": ["0"], "sites": {"a": "W4A8"}}', "the first step of each group was expected"),
        ('{"step_groups": [], "sites": {"a": "W4A8"}}', "begin at 0"),
        ('{"bitlaw_plan": 2, "sites": {}}', "a plan of version 2, this bitlaw reads version 1"),
        ('{"sites": {}, "provenance": 3}', "provenance: an object"),
    ],
)
def test_files_that_are_no_plan_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"plan\.json: .*{message}"):
        read_plan(path)
    with pytest.raises(ValueError, match="no such file"):
        read_plan(tmp_path / "nothing.json")


def test_plans_that_a_model_cannot_have_are_refused_with_every_reason() -> None:
    model = tiny_var()
    plan = BitPlan({site.name: (Precision.parse("W4A8"),) for site in model.sites()})
    mine = PlanFile(plan, model_provenance(model, "mine"))
    assert check_plan_for(model, mine) == plan
    with pytest.raises(ValueError, match="this plan is for mine of family var, and the model is a dit"):
        check_plan_for(tiny_dit(), mine)
    larger = VAR(VARTransformer(VARConfig(3, 16, 2, 5, (1, 2, 4), 16, 4)), model.autoencoder, model.sampling)
    with pytest.raises(ValueError, match=r"this plan is for mine of other sites\nunknown site 'blocks.1"):
        one_block = VAR(VARTransformer(VARConfig(1, 16, 2, 5, (1, 2, 4), 16, 4)), model.autoencoder, model.sampling)
        check_plan_for(one_block, mine)
    wider = VAR(VARTransformer(VARConfig(2, 32, 2, 5, (1, 2, 4), 16, 4)), model.autoencoder, model.sampling)
    with pytest.raises(ValueError, match=r"head: a weight of shape \[16, 32\], and \[16, 16\] in the plan's model"):
        check_plan_for(wider, mine)
    assert check_plan_for(larger, plan) == plan  # without provenance, sites that are left out stay as they are
    with pytest.raises(ValueError, match=r"unknown site 'blocks.0.ffn.fc3'; did you mean blocks.0.ffn.fc"):
        check_plan_for(model, BitPlan({"blocks.0.ffn.fc3": (Precision.parse("W4A8"),)}))
    with pytest.raises(ValueError, match="a step group from step 3: this model has 3 steps"):
        check_plan_for(model, BitPlan({"head": (Precision.parse("W4A8"),) * 2}, (0, 3)))
    with pytest.raises(ValueError, match="head: 16 input channels, not a multiple of group size 5"):
        check_plan_for(model, BitPlan({"head": (Precision.parse("W4g5A8"),)}))
    with pytest.raises(ValueError, match="quantized already"):
        check_plan_for(bitlaw.quantize(model, "W4A8"), plan)


def test_the_rule_of_litevar_protects_a_kind() -> None:
    model = tiny_llamagen()
    plan = preset_plan(model, "litevar", "W4A8")
    for site in model.sites():
        assert plan[site.name][0].is_full == (site.kind == "fc2" or site.phase != "blocks")
    with pytest.raises(ValueError, match="did you mean litevar"):
        preset_plan(model, "litevr", "W4A8")
    with pytest.raises(ValueError, match="unknown site, kind of site or rule 'fc2'"):
        preset_plan(tiny_ddpm(), "litevar", "W4A8")


def test_step_groups_of_different_widths_have_static_ranges_of_their_own(tmp_path: Path) -> None:
    model = tiny_dit()
    plans = [
        BitPlan({"blocks.0.mlp.fc1": tuple(map(Precision.parse, texts))}, (0, 2))
        for texts in (("W16A3c", "W16A12c"), ("W16A3c", "W16A3c"), ("W16A12c", "W16A12c"))
    ]
    mixed, narrow, wide = (bitlaw.quantize(model, plan, calibration=FEW) for plan in plans)
    ranges = [small.net.get_submodule("blocks.0.mlp.fc1").input_quant.ranges for small in (mixed, narrow, wide)]
    for param in ("scale_G1", "zero_G1"):
        assert ranges[0][param][0] == ranges[1][param][0] and ranges[0][param][1] == ranges[2][param][1]
    assert ranges[0]["scale_G1"][0] > 16 * ranges[0]["scale_G1"][1]
    mixed.save(tmp_path / "mixed")
    assert torch.equal(bitlaw.load(tmp_path / "mixed").generate([1]), mixed.generate([1]))
