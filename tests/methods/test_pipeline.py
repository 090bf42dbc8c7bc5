"""Whole models through chains of methods: calibration, static ranges, blocks, provenance, interruption."""

import json
import re

import pytest
import torch
from torch import nn

import bitlaw
from bitlaw.calibration import cache
from bitlaw.calibration.collect import collect
from bitlaw.methods import METHODS, pipeline
from bitlaw.methods.gptq import GPTQ
from bitlaw.methods.method import BlockMethod, LayerMethod
from bitlaw.methods.quantize import check_quantizable, quantize
from bitlaw.packing import static_format
from bitlaw.precision import BitPlan, Precision
from bitlaw.quantized import QuantLayer, WeightSpec
from tiny_models import TINY

FEW = bitlaw.Calibration(num_images=4, batch_size=2, seed=5)


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITLAW_CACHE", "")


def tiny(name: str):
    torch.manual_seed(0)
    return TINY[name]()


def labels_of(model):
    return [i % max(1, model.num_classes) for i in range(3)]


@pytest.mark.parametrize("family", TINY)
def test_gptq_with_static_ranges_survives_saving(family, tmp_path) -> None:
    """Every family, every site of it, two step groups: the same images after loading, bit for bit."""
    model = tiny(family)
    small = quantize(model, "W2A4c", "gptq", protect="none", calibration=FEW, step_groups=2)
    layers = {name: m for name, m in small.net.named_modules() if isinstance(m, QuantLayer)}
    assert set(layers) == {site.name for site in model.sites()}
    assert all(layer.input_quant.ranges["scale_G1"].shape == (2, 1) for layer in layers.values())
    images = small.generate(labels_of(model), seed=1)
    assert not torch.equal(images, model.generate(labels_of(model), seed=1))
    small.save(tmp_path / "small")
    again = bitlaw.load(tmp_path / "small")
    assert torch.equal(again.generate(labels_of(model), seed=1), images)
    assert again.provenance["sites"].keys() == layers.keys()


def test_sequential_statistics_are_behind_quantized_blocks() -> None:
    """At 2 bits what enters the second block is another thing; only there do the two ways differ."""
    model = tiny("dit")
    behind, at_once = (
        quantize(model, "W2A16", GPTQ(sequential=sequential), calibration=FEW) for sequential in (True, False)
    )

    def codes(small, name):
        layer = small.net.get_submodule(name)
        return layer.quantized.codes

    assert torch.equal(codes(behind, "blocks.0.attn.qkv"), codes(at_once, "blocks.0.attn.qkv"))
    assert not torch.equal(codes(behind, "blocks.1.attn.qkv"), codes(at_once, "blocks.1.attn.qkv"))


def test_static_ranges_of_more_groups_are_no_worse() -> None:
    """Each group's range minimises the squared error over its own steps."""
    model = tiny("dit")
    name = "blocks.0.mlp.fc2"
    inputs = []
    hook = model.net.get_submodule(name).register_forward_pre_hook(
        lambda _, args: inputs.append((model.clock.step, args[0].clone()))
    )
    model.generate([0, 1, 2, 3], seed=5)
    hook.remove()

    def error(step_groups):
        small = quantize(model, "W16A4c", calibration=FEW, step_groups=step_groups)
        layer, total = small.net.get_submodule(name), 0.0
        for small.clock.step, x in inputs:
            total += float((layer.input_quant(x) - x).square().sum())
        return total

    assert error(4) < error(1)


def test_provenance_says_what_became_of_every_site(tmp_path) -> None:
    model = tiny("var")
    small = quantize(model, "W3A16", "gptq", calibration=FEW)
    notes = small.provenance["sites"]
    assert set(notes) == {site.name for site in model.sites() if site.phase == "blocks"}
    for note in notes.values():
        assert 0 < note["gptq"]["error"] < 1.2 * note["before"]["error"] and note["gptq"]["seconds"] >= 0
    assert sum(n["gptq"]["error"] < n["before"]["error"] for n in notes.values()) >= 0.8 * len(notes)
    small.save(tmp_path / "small")
    stored = json.loads((tmp_path / "small" / "bitlaw.json").read_text())["provenance"]
    assert stored["sites"] == notes and stored["calibration"]["num_images"] == 4
    assert "sites" not in quantize(model, "W3A16").provenance  # rounding to nearest looks at no activation


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if isinstance(m, LayerMethod | BlockMethod)])
def test_an_interrupted_run_goes_on_where_it_was(method, tmp_path, monkeypatch) -> None:
    model = tiny("dit")
    method = f"{method}:steps=20" if isinstance(METHODS[method], BlockMethod) else method
    whole = quantize(model, "W3A8", method, calibration=FEW)
    written = pipeline.Pipeline._write
    units = []

    def stop_after_the_first(self, unit, result):
        written(self, unit, result)
        units.append(unit)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.Pipeline, "_write", stop_after_the_first)
    runs = 0
    while runs < 10:
        runs += 1
        try:
            small = quantize(model, "W3A8", method, calibration=FEW, work=tmp_path)
            break
        except KeyboardInterrupt:
            continue
    assert len(units) == len(set(units)) == runs - 1 >= 1  # nothing is done twice
    state, expected = small.net.state_dict(), whole.net.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert torch.equal(small.generate([0, 1]), whole.generate([0, 1]))


def test_work_of_another_run_is_not_taken(tmp_path) -> None:
    model = tiny("dit")
    first = quantize(model, "W3A16", "gptq", calibration=FEW, work=tmp_path)
    other = quantize(model, "W3A16", "gptq:damping=0.5", calibration=FEW, work=tmp_path)
    alone = quantize(model, "W3A16", "gptq:damping=0.5", calibration=FEW)
    assert torch.equal(other.generate([0]), alone.generate([0]))
    assert not torch.equal(other.generate([0]), first.generate([0]))


def test_one_image_is_enough_to_run() -> None:
    for family in ("var", "dit"):
        model = tiny(family)
        small = quantize(model, "W3A8c", "gptq", calibration=bitlaw.Calibration(num_images=1))
        assert all(p.isfinite().all() for p in small.net.parameters())
        small.generate([0])


def test_the_original_is_left_alone() -> None:
    model = tiny("var")
    before = model.generate([0, 1])
    tensors = {name: t.clone() for name, t in model.net.state_dict().items()}
    quantize(model, "W2A8c", "gptq", calibration=FEW)
    assert torch.equal(model.generate([0, 1]), before)
    assert all(torch.equal(t, tensors[name]) for name, t in model.net.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.net.modules())


def test_calibration_is_reused(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("BITLAW_CACHE", str(tmp_path))
    model, ran = tiny("dit"), []
    collect = cache.collect
    monkeypatch.setattr(cache, "collect", lambda *args: ran.append(1) or collect(*args))
    one_shot = GPTQ(sequential=False)
    first = quantize(model, "W4A8c", one_shot, calibration=FEW)
    assert len(ran) == 1  # ranges and Hessians in one pass
    again = quantize(model, "W4A8c", one_shot, calibration=FEW)
    assert len(ran) == 1
    assert torch.equal(again.generate([0, 1]), first.generate([0, 1]))
    quantize(model, "W3A16", one_shot, calibration=FEW)
    quantize(model, "W4A8", one_shot, calibration=FEW)
    assert len(ran) == 2
    quantize(model, "W3A16", one_shot, calibration=bitlaw.Calibration(num_images=4, batch_size=2, seed=6))
    quantize(model.with_sampling(guidance=1.0), "W3A16", one_shot, calibration=FEW)
    with torch.no_grad():
        model.net.get_parameter("blocks.0.attn.qkv.weight").mul_(1.01)
    quantize(model, "W3A16", one_shot, calibration=FEW)
    assert len(ran) == 5
    for entry in tmp_path.rglob("*.safetensors"):
        entry.write_bytes(entry.read_bytes()[:100])
    damaged = quantize(model, "W3A16", one_shot, calibration=FEW)
    assert len(ran) == 6 and damaged.generate([0]).shape[0] == 1


def test_what_cannot_be_quantized_is_said_before_any_work(monkeypatch) -> None:
    model = tiny("ddpm")
    monkeypatch.setattr(pipeline.Pipeline, "run", lambda self: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match="step_groups 9: must be from 1 to the model's 4 steps"):
        quantize(model, "W4A8c", step_groups=9)
    with pytest.raises(ValueError, match="unknown sampler setting of ddpm 'temperature'"):
        quantize(model, "W4", "gptq", calibration=bitlaw.Calibration(sampling={"temperature": 2}))
    grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
    name = next(site.name for site in model.sites() if site.kind == "conv1")
    model.net.set_submodule(name, grouped)
    with pytest.raises(ValueError, match=f"{name}: a convolution of 2 groups, which GPTQ is not defined for"):
        quantize(model, "W4", "gptq", protect="none")
    assert check_quantizable(model, "W4", "none", "rtn").weight(name) is not None


def test_a_plan_may_be_static_in_some_step_groups() -> None:
    model = tiny("dit")
    mixed = (Precision.parse("W4A8c"), Precision.parse("W4A16"))
    plan = BitPlan({"blocks.0.attn.qkv": mixed}, (0, 2))
    small = quantize(model, plan, calibration=FEW)
    layer = small.net.get_submodule("blocks.0.attn.qkv")
    x = torch.randn(2, 4, 16)
    small.clock.step = 3
    assert torch.equal(layer.input_quant(x), x)
    small.clock.step = 0
    assert not torch.equal(layer.input_quant(x), x)
    assert static_format(plan, "blocks.0.attn.qkv") is not None


def output_error(layer, rows, weight) -> float:
    """|Q(x) Wq - x W|^2 / |x W|^2 of an installed layer."""
    exact = rows.double() @ weight.double().T
    lost = layer.input_quant(rows).double() @ layer.weight.double().T - exact
    return float(lost.square().sum() / exact.square().sum())


@pytest.mark.parametrize("method", ["rtn", "gptq:sequential=false"])
def test_the_error_in_a_note_is_behind_the_range_of_a_group_that_has_one(method) -> None:
    model, name = tiny("dit"), "blocks.0.attn.qkv"
    later = BitPlan({name: (Precision.parse("W4A16"), Precision.parse("W4A4c"))}, (0, 2))
    small = quantize(model, later, method, calibration=FEW)
    needs = METHODS[method.partition(":")[0]].needs | {"rows_RI", "histograms_S"}
    rows = collect(model, FEW, [name], needs, (0, 2))[name].rows_RI
    small.clock.step = 2
    expected = output_error(small.net.get_submodule(name), rows, model.net.get_parameter(f"{name}.weight"))
    note = small.provenance["sites"][name][method.partition(":")[0]]
    assert note["error"] == pytest.approx(expected, rel=1e-5)


def test_the_error_behind_a_learned_rescaling_is_that_of_what_enters_then() -> None:
    """A modulation absorbs it. From what entered before and enters now follows the scale, and from that the weight."""
    model, name = tiny("dit"), "blocks.0.attn.qkv"
    plan = BitPlan({name: (Precision.parse("W3A4"),)})
    small = quantize(model, plan, "omniquant:steps=10", calibration=FEW)
    method = METHODS["omniquant"]
    needs = method.needs | method.outside.needs | {"rows_RI"}
    before, now = (collect(m, FEW, [name], needs)[name].rows_RI for m in (model, small))
    scale = before.std(0) / now.std(0)
    assert (scale - 1).abs().max() > 0.1
    weight = model.net.get_parameter(f"{name}.weight") * scale
    note = small.provenance["sites"][name]
    expected = output_error(small.net.get_submodule(name), now, weight)
    # Rounding of the inputs turns a 4-bit code here and there.
    assert note["omniquant"]["error"] == pytest.approx(expected, rel=5e-3)
    nearest = WeightSpec.of(plan.weight(name)).quantize(model.net.get_parameter(f"{name}.weight"))
    rounded = quantize(model, plan, calibration=FEW).net.get_submodule(name)
    assert torch.equal(rounded.weight, nearest.decode())
    expected = output_error(rounded, before, model.net.get_parameter(f"{name}.weight"))
    assert note["before"]["error"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["ddpm", "ldm-of-classes", "mar"])
@pytest.mark.parametrize("method", ["omniquant", "adaround"])
def test_block_methods_on_unets_and_on_the_head_of_mar(family, method, tmp_path) -> None:
    """Where blocks are no chain, and are called more than once in a step."""
    model = tiny(family)
    two = bitlaw.Calibration(num_images=2, batch_size=2, seed=5)
    small = quantize(model, "W3A8", f"{method}:steps=2", protect="none", calibration=two)
    stage = {"omniquant": "omniquant", "adaround": "learnedrounding"}[method]
    notes = small.provenance["sites"]
    assert set(notes) == {site.name for site in model.sites()}
    in_blocks = {name: note[stage] for name, note in notes.items() if stage in note}
    inside = [site for site in model.sites() if any(site.name.startswith(f"{block}.") for block in model.blocks)]
    # The modulations of MAR's head are computed before its blocks.
    assert {site.name for site in inside if not (family == "mar" and site.kind == "adaln")} == set(in_blocks)
    deep = {"mar": "diffloss.net.res_blocks", "ddpm": "mid_block", "ldm-of-classes": "transformer_blocks"}
    assert any(deep[family] in name for name in in_blocks)
    for name, note in in_blocks.items():
        assert 0 <= note["block_error"] <= note["block_error_start"], name
        assert 0 < note["error"] < 1 and 0 < notes[name]["before"]["error"] < 1, name
    images = small.generate(labels_of(model), seed=1)
    assert not torch.equal(images, model.generate(labels_of(model), seed=1))
    small.save(tmp_path / "small")
    again = bitlaw.load(tmp_path / "small")
    assert torch.equal(again.generate(labels_of(model), seed=1), images)
    assert again.provenance["sites"] == notes


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("gptq:sequential=false", r"[\d.]+ MiB of Hessians, sampled rows at 10 layers$"),
        ("gptq", r"[\d.]+ MiB of Hessians, sampled rows at 5 layers of a block, and up to 4\.0 GiB of hidden states"),
        ("omniquant:steps=1", "what enters and leaves the block, and up to 8.0 GiB of hidden states"),
    ],
)
def test_memory_is_stated_before_calibration_begins(method, said) -> None:
    told = []
    quantize(tiny("dit"), "W4", method, calibration=FEW, progress=lambda *report: told.append(report))
    stated = [report for report in told if not report[2]]
    assert len(stated) == 1 and re.search(f"^calibration holds up to .*{said}", stated[0][0])
    work = ("calibrating", "recording", "quantizing")
    assert told.index(stated[0]) < next(i for i, report in enumerate(told) if report[0].startswith(work))
