"""Sensitivity: what is quantized alone, against quantizing it by hand; going on; the rule of LiteVAR; the command."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import bitlaw
from bitlaw.allocation import sensitivity as module
from bitlaw.allocation.paths import Paths
from bitlaw.allocation.sensitivity import (
    Sensitivity,
    SensitivitySettings,
    measure_sensitivity,
    plan_sparing,
    precisions_of,
    subjects_of,
)
from bitlaw.cli import app
from bitlaw.methods.quantize import quantize
from bitlaw.metrics.evaluation import evaluate
from bitlaw.metrics.protocol import Interval
from bitlaw.precision import BitPlan, Precision
from tiny_models import TINY, tiny_dit, tiny_var

FEW = SensitivitySettings(precisions=("W2A16", "W16A3"), num_images=2)


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("BITLAW_CACHE", "")


def test_each_outcome_is_that_of_quantizing_the_sites_by_hand():
    model = tiny_var()
    result = measure_sensitivity(model, FEW)
    paths = Paths(model, FEW.curve_settings())
    for level, name, sites in [
        ("kind", "fc2", ["blocks.0.ffn.fc2", "blocks.1.ffn.fc2"]),
        ("layer", "head", ["head"]),
        ("cell", "1 qkv", ["blocks.1.attn.mat_qkv"]),
        ("block", "embed", ["word_embed"]),
        ("spared", "fc1", [s.name for s in model.sites() if s.kind != "fc1"]),
        ("all", "all", [s.name for s in model.sites()]),
    ]:
        for precision in FEW.precisions:
            plan = BitPlan({site: (Precision.parse(precision),) for site in sites})
            wanted = paths.distortion(quantize(model, plan))
            outcome = result.at(level, precision)[name]
            assert outcome.by_step == tuple(wanted.tolist())
            assert outcome.distortion == pytest.approx(float(wanted.mean()))
            assert outcome.fd is None


@pytest.mark.parametrize("name", ["var", "dit", "mar", "ddpm"])
def test_subjects_are_all_sites_at_every_level(name):
    model = TINY[name]()
    subjects = subjects_of(model, SensitivitySettings())
    every = sorted(site.name for site in model.sites())
    for level in ("all", "kind", "block", "layer", "cell"):
        assert sorted(site for s in subjects if s.level == level for site in s.sites) == every
    kinds = {s.name: set(s.sites) for s in subjects if s.level == "kind"}
    for spared in (s for s in subjects if s.level == "spared"):
        assert set(spared.sites) == set(every) - kinds[spared.name]
    one = next(s for s in subjects if s.level == "layer")
    assert one.weights == model.net.get_submodule(one.name).weight.numel()


def test_the_most_sensitive_kind_is_the_one_made_so():
    """fc2 gets a huge weight on an input that is always 0: nothing changes, but all other weights round to 0."""
    torch.manual_seed(0)
    model = tiny_dit()
    for block in model.net.blocks:
        block.mlp.fc1.weight[0], block.mlp.fc1.bias[0] = 0.0, 0.0
        block.mlp.fc2.weight[:, 0] = 1000.0
        block.attn.proj.weight.zero_()
    result = measure_sensitivity(model, replace(FEW, precisions=("W4A16",), levels=("kind", "layer")))
    assert result.most_sensitive("W4A16") == "fc2"
    assert result.most_sensitive("W4A16", "layer").endswith("mlp.fc2")
    assert result.at("kind", "W4A16")["proj"].distortion == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="level block was not measured"):
        result.most_sensitive("W4A16", "block")
    with pytest.raises(ValueError, match=r"unknown measured precision 'W3A16'.*W4A16"):
        result.at("kind", "W3A16")


def test_what_a_file_has_is_not_measured_again(tmp_path, monkeypatch):
    model, file, calls = tiny_var(), tmp_path / "s.json", []
    settings = replace(FEW, levels=("kind", "layer"))

    def counted(*arguments, **keywords):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(arguments[1])
        return quantize(*arguments, **keywords)

    monkeypatch.setattr(module, "quantize", counted)
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(model, settings, file=file)
    assert len(json.loads(file.read_text())["outcomes"]) == 5
    calls.clear()
    monkeypatch.setattr(module, "quantize", lambda *a, **k: calls.append(a[1]) or quantize(*a, **k))
    result = measure_sensitivity(model, settings, file=file, name="tiny")
    # Kinds that are one layer, the embedding and the head, share what is measured.
    assert len(calls) == 2 * (len(result.of("kind")) + len(result.of("layer")) - 2) - 5
    assert Sensitivity.read(file) == result
    assert result == measure_sensitivity(model, settings, name="tiny")
    calls.clear()
    again = measure_sensitivity(model, replace(settings, precisions=("W2A16",), levels=("layer",)), file=file)
    assert not calls
    assert again.at("layer", "W2A16") == result.at("layer", "W2A16")
    with pytest.raises(ValueError, match=r"s\.json: of another model \(.*\) or other settings"):
        measure_sensitivity(model, replace(settings, num_images=3), file=file)
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"s\.json: cannot be read as a model's sensitivity"):
        measure_sensitivity(model, settings, file=file)


def test_distances_of_images_join_what_is_measured(tmp_path, monkeypatch):
    model, file = tiny_var(), tmp_path / "s.json"
    settings = replace(FEW, precisions=("W2A16",), levels=("kind", "layer"))
    before = measure_sensitivity(model, settings, file=file)

    def scorer(settings):
        return (lambda model: {"value": float(len(model.provenance))}) if settings.fd_images else None

    monkeypatch.setattr(module, "_scorer", scorer)
    after = measure_sensitivity(model, replace(settings, fd_images=8), file=file)
    assert after.full_fd == {"value": float(len(model.provenance))}
    for name, outcome in after.at("kind", "W2A16").items():
        assert outcome.fd == {"value": float(len(quantize(model, "W2A16").provenance))}
        assert outcome.by_step == before.at("kind", "W2A16")[name].by_step
    assert after.at("layer", "W2A16")["blocks.0.ffn.fc1"].fd is None
    monkeypatch.setattr(module, "_scorer", lambda settings: lambda model: {"value": 5.0})
    other = measure_sensitivity(model, replace(settings, fd_images=9), file=file)
    assert {o.fd["value"] for o in other.at("kind", "W2A16").values()} == {5.0}


def test_litevars_rule_is_a_plan():
    model = tiny_var()
    plan = plan_sparing(model, "W4A8KV8")
    for site in model.sites():
        full = site.kind == "fc2" or site.phase != "blocks"
        expected = "W16A16" if full else "W4A8KV8" if site.kind == "qkv" else "W4A8"
        assert str(plan[site.name][0]) == expected
    assert quantize(model, plan).net is not model.net
    with pytest.raises(ValueError, match=r"unknown site, kind of site or rule 'fc3'; did you mean fc"):
        plan_sparing(model, "W4A8", ["fc3"])


def test_precisions_of_widths():
    assert precisions_of([2, 4]) == ("W2A16", "W4A16", "W16A2", "W16A4")
    assert precisions_of([3], ["both"]) == ("W3A3",)
    with pytest.raises(ValueError, match="16 bits: expected 0 to 15"):
        precisions_of([16])
    with pytest.raises(ValueError, match="unknown part to quantize 'weight'; did you mean weights"):
        precisions_of([3], ["weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precisions": ()}, "no precision"),
        ({"precisions": ("W16A16",)}, "nothing is quantized"),
        ({"precisions": ("W4B3",)}, "cannot read the precision"),
        ({"levels": ("kinds",)}, "unknown level 'kinds'; did you mean kind"),
        ({"fd_levels": ("kinds",)}, "unknown level"),
        ({"fd_images": -1}, "fd_images -1"),
        ({"method": "gptp"}, "gptq"),
        ({"num_images": 0}, "num_images 0"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        SensitivitySettings(**change)


def test_sites_that_cannot_be_quantized_so_are_named_before_work(monkeypatch):
    monkeypatch.setattr(module, "quantize", lambda *_, **__: pytest.fail("quantized"))
    monkeypatch.setattr(module, "Paths", lambda *_: pytest.fail("drawn"))
    with pytest.raises(ValueError, match=r"(?s)blocks\.0\.ffn\.fc1: 16 input channels, not a multiple of.*blocks\.1"):
        measure_sensitivity(tiny_var(), replace(FEW, precisions=("W4A16", "W3g6A16")))
    everything = tuple(site.name for site in tiny_var().sites())
    with pytest.raises(ValueError, match="all sites are protected"):
        measure_sensitivity(tiny_var(), replace(FEW, protect=everything))


def test_distances_are_those_of_evaluate(monkeypatch):
    monkeypatch.setattr("bitlaw.metrics.evaluation.frechet_interval", lambda *_: Interval(1.0, 2.0))  # seconds
    model = bitlaw.load("ladder/dit-xs")
    settings = SensitivitySettings(fd_images=66, fd_seed=3, guidance=1.0, sampling={"num_steps": 2})
    score = module._scorer(settings)(model)
    wanted = evaluate(model, "ladder", 66, seed=3, guidance=1.0, num_steps=2)["fd"]
    assert score == {"value": wanted.value, "low": 1.0, "high": 2.0}
    assert module._scorer(SensitivitySettings()) is None
    with pytest.raises(ValueError, match="8 samples are too few"):
        measure_sensitivity(model, replace(settings, fd_images=8))


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)  # pages are quicker than photographs of them
    monkeypatch.setattr(module, "_scorer", lambda settings: (lambda _: {"value": 5.25}) if settings.fd_images else None)
    out = tmp_path / "s"

    def run(*more):
        arguments = ["analyze", "ladder/var-xs", "sensitivity", "--out", str(out), "--images", "2", *more]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    said = run("--precision", "W3A4", "--levels", "kind,spared,cell")
    stored = Sensitivity.read(out / "sensitivity.json")
    assert stored.model == "ladder/var-xs"
    assert stored.settings.precisions == ("W3A4",)
    kind = stored.most_sensitive("W3A4")
    assert f"W3A4: most sensitive kind {kind}\n" in said
    assert f"{stored.at('kind', 'W3A4')[kind].distortion:.2e}" in said
    assert "everything but a kind: distortion (kl)" in said and "FD" not in said
    for name in ("kinds.html", "blocks.html"):
        assert "plotly" in (out / name).read_text()
    said = run("--bits", "3", "--what", "both", "--levels", "kind", "--fd", "80")
    assert "FD of 80 images, full precision 5.25" in said
    assert Sensitivity.read(out / "sensitivity.json").at("kind", "W3A3")[kind].fd == {"value": 5.25}
    for bad, message in (["--bits", "2;3"], "expected widths"), (["--levels", "kinds"], "unknown level"):
        with pytest.raises(ValueError, match=message):
            CliRunner().invoke(app, ["analyze", "ladder/var-xs", "sensitivity", *bad], catch_exceptions=False)
    assert "Example" in CliRunner().invoke(app, ["analyze", "--help"]).output
