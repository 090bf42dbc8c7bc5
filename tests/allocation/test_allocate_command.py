import json
from pathlib import Path

import pytest
from made_curves import made_curves
from typer.testing import CliRunner

import bitlaw
from bitlaw.allocation.additivity import Additivity
from bitlaw.allocation.allocate import Problem
from bitlaw.allocation.curves import RateDistortion
from bitlaw.allocation.plan_file import read_plan
from bitlaw.cli import app

MODEL = "ladder/var-xs"


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITLAW_CACHE", "")


@pytest.fixture
def curves(tmp_path: Path) -> str:
    path = tmp_path / "curves.json"
    made_curves(bitlaw.load(MODEL), num_images=2, batch_size=2).save(path)
    return str(path)


def test_allocate_then_quantize_and_distill_and_info(tmp_path: Path, curves: str) -> None:
    path = str(tmp_path / "plan.json")
    options = ["--widths", "0,2,4,8,16", "--tie", "kind-in-block", "--min-bits", "2", "--min-bits", "qkv=4"]
    budgets = ["--average-bits", "3.5", "--activation-bits", "6", "--size", "110kB"]
    said = run("allocate", MODEL, *budgets, *options, "--curves", curves, "--swaps", "2", "--out", path)
    content = json.loads(Path(path).read_text())
    costs, stored = content["provenance"]["costs"], content["provenance"]["budgets"]
    assert costs["bytes"] <= stored["bytes"] == 110_000
    assert costs["weight_bits"] <= stored["weight_bits"] == 3.5 * content["provenance"]["numbers"]["weight_bits"]
    assert costs["activation_bits"] <= stored["activation_bits"]
    assert content["provenance"]["model"] == MODEL and content["provenance"]["swaps"]["num_measured"] == 2
    for line in ("block", "least possible", "predicted distortion", "measured distortion", "110,000"):
        assert line in said
    assert run("info", path).strip() in said
    assert json.loads(run("info", path, "--json")) == content

    small, trained = tmp_path / "small", tmp_path / "trained"
    run("quantize", MODEL, "--plan", path, "--method", "gptq", "--calibration-images", "2", "--out", str(small))
    few = ["--steps", "2", "--batch-size", "4", "--training", "num_examples=8", "--training", "num-held-out=4"]
    run("distill", MODEL, "--plan", path, *few, "--out", str(trained))
    for folder in (small, trained):
        kept = json.loads((folder / "bitlaw.json").read_text())
        changed = {name: texts for name, texts in content["sites"].items() if set(texts) != {"W16A16"}}
        assert kept["plan"]["sites"] == changed
        assert kept["provenance"]["plan"]["file"] == "plan.json"
        assert (folder / "model.safetensors").stat().st_size == costs["bytes"]
    run("generate", str(small), "--labels", "0-2", "--out", str(tmp_path / "a.png"))


def test_curves_are_measured_once_and_kept(tmp_path: Path) -> None:
    path, curves = str(tmp_path / "plan.json"), tmp_path / "curves.json"
    short = ["--images", "1", "--protect", "first-last,adaln,blocks.1.*", "--widths", "3,8", "--curves", str(curves)]
    run("allocate", MODEL, "--average-bits", "5", "--what", "both", "--step-groups", "0,3", *short, "--out", path)
    known = RateDistortion.read(curves)
    assert {key.site for key in known.by_step} == {
        f"blocks.0.{name}" for name in ("attn.mat_qkv", "attn.proj", "ffn.fc1", "ffn.fc2")
    }
    assert known.settings.step_groups == (0, 3) and known.settings.widths == (3, 8)
    before = curves.read_bytes()
    again = ["--step-groups", "0,3", *short, "--method", "lagrangian", "--out", path]
    said = run("allocate", MODEL, "--activation-bits", "5", *again)
    assert "by lagrangian" in said and "step groups from 0, 3" in said
    assert curves.read_bytes() == before


def test_a_sketch_serves_as_curves(tmp_path: Path) -> None:
    path = str(tmp_path / "plan.json")
    options = ["--mode", "sketch", "--images", "2", "--widths", "2,4"]
    assert "curves: sketch, 2 images" in run("allocate", MODEL, "--average-bits", "3", *options, "--out", path)


def test_the_rule_of_litevar(tmp_path: Path) -> None:
    path = str(tmp_path / "plan.json")
    said = run("allocate", MODEL, "--preset", "litevar", "--precision", "W4A8", "--out", path)
    assert "by the rule litevar" in said and "16/16" in said
    assert run("info", path).strip() == said.strip()


def test_a_plan_by_hand_is_described(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text('{"sites": {"blocks.0.ffn.fc1": "W3A8"}}')
    assert "blocks.0.ffn.fc1  W3A8" in run("info", str(path))


def test_additivity_is_checked_and_a_plan_warned_of(
    tmp_path: Path, curves: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The curves are made up, so that sums predict nothing: the command says so, and so does a plan."""
    monkeypatch.setattr("shutil.which", lambda name: None)  # pages are quicker than photographs of them
    out, path, drawn = tmp_path / "additivity", str(tmp_path / "plan.json"), tmp_path / "pictures"
    said = run("analyze", MODEL, "additivity", "--curves", curves, "--plans", "3", "--out", str(out))
    check = Additivity.read(out / "additivity.json")
    assert [(part.low, part.high) for part in check.ranges] == [(4, 8), (3, 5), (2, 4), (1, 3), (0, 3)]
    assert said.count("sums do not hold") == 5 and str(check.ranges[0]) in said
    assert "plotly" in (out / "additivity.html").read_text()
    checked = ["--additivity", str(out / "additivity.json")]
    shown = ["--pictures", str(drawn)]
    said = run("allocate", MODEL, "--average-bits", "4", "--curves", curves, *checked, *shown, "--out", path)
    warning = check.warning_for(read_plan(Path(path)).plan)
    assert warning is not None and f"warning: {warning}" in said and f"warning: {warning}" in run("info", path)
    assert sorted(file.name for file in drawn.iterdir()) == ["bits.html", "curves.html", "steps.html"]
    with pytest.raises(ValueError, match="additivity of another model"):
        other = ["ladder/var-s", "--average-bits", "4", "--images", "1", "--widths", "2,4"]
        run("allocate", *other, *checked, "--out", path)


def test_a_checkpoint_above_the_budget_of_its_plan_is_said(tmp_path: Path, curves: str) -> None:
    path, out = str(tmp_path / "plan.json"), str(tmp_path / "small")
    problem = Problem(bitlaw.load(MODEL), RateDistortion.read(curves))
    size = f"{problem.least()['bytes'] + 30_000:.0f}B"
    run("allocate", MODEL, "--size", size, "--curves", curves, "--widths", "2,4,8", "--out", path)
    method = ["--method", "svdquant:rank=4", "--calibration-images", "2"]
    assert "above the plan's budget" in " ".join(run("quantize", MODEL, "--plan", path, *method, "--out", out).split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--average-bits", "1", "--widths", "2,4"], r"least possible is .* \(2 a number\)"),
        (["--size", "10kB"], "bytes: the budget is 10,000, but the least possible is"),
        ([], "give a budget"),
        (["--average-bits", "4", "--widths", "2;4"], "--widths 2;4: expected numbers"),
        (["--average-bits", "4", "--widths", "2,5"], "widths 5: these curves are of"),
        (["--average-bits", "4", "--min-bits", "fc2"], "--min-bits fc2: expected"),
        (["--average-bits", "4", "--tie", "kinds"], "unknown site, kind of site or rule 'kinds'"),
        (["--average-bits", "4", "--method", "greedy"], "unknown method of allocation 'greedy'"),
        (["--average-bits", "4", "--numbers", "float"], "numbers is 'int', not 'float'"),
        (["--average-bits", "4", "--step-groups", "2"], r"step groups begin at \(0,\), not 2"),
        (["--average-bits", "4", "--protect", "none"], "no curves of word_embed, head_nm.ada_lin.1, head"),
        (["--average-bits", "4", "--precision", "W4"], "--precision is for --preset"),
        (["--average-bits", "4", "--swaps", "-1"], "--swaps -1"),
        (["--preset", "litevar"], "needs --precision"),
        (["--preset", "litevr", "--precision", "W4"], "did you mean litevar"),
    ],
)
def test_mistakes_are_said_and_nothing_is_written(
    arguments: list[str], message: str, tmp_path: Path, curves: str
) -> None:
    given = [] if "--preset" in arguments else ["--curves", curves]
    with pytest.raises(ValueError, match=message):
        run("allocate", MODEL, *arguments, *given, "--out", str(tmp_path / "plan.json"))
    assert not (tmp_path / "plan.json").exists()


def test_a_plan_and_what_it_says_are_not_given_both(tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", str(tmp_path / "small")
    plan.write_text('{"sites": {"blocks.0.ffn.fc1": "W3A8"}}')
    for command, more, message in (
        ("quantize", ["--precision", "W4A16"], "leave --precision out, or --plan"),
        ("quantize", ["--protect", "none", "--step-groups", "2"], "leave --protect and --step-groups out"),
        ("distill", ["--precision", "W4A16"], "leave --precision out, or --plan"),
    ):
        with pytest.raises(ValueError, match=message):
            run(command, MODEL, "--plan", str(plan), *more, "--out", out)
    with pytest.raises(ValueError, match=r"unknown site 'blocks\.0\.ffn\.fc1'"):
        run("quantize", "ladder/dit-xs", "--plan", str(plan), "--out", out)
    plan.write_text("{}")
    with pytest.raises(ValueError, match="sites missing"):
        run("distill", MODEL, "--plan", str(plan), "--out", out)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes.txt exists and is not a plan"):
        run("allocate", MODEL, "--average-bits", "4", "--out", str(tmp_path / "notes.txt"))
    assert (tmp_path / "notes.txt").read_text() == "mine"
