"""The command line: what it prints, and one-line errors for mistakes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bitlaw.cli import app

COMMANDS = [
    "study",
    "quantize",
    "generate",
    "edit",
    "evaluate",
    "fit",
    "recommend",
    "report",
    "info",
    "models",
    "export",
    "ladder",
]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str) -> None:
    output = run(command, "--help")
    assert "Usage:" in output
    assert command == "ladder" or "Example" in output


def test_quantize_then_load_generate_and_info(tmp_path: Path) -> None:
    small = tmp_path / "small"
    assert "W4A8" in run("quantize", "ladder/var-xs", "--precision", "W4A8", "--out", str(small)) or small.exists()
    run("generate", str(small), "--labels", "0-2,5x2", "--seed", "3", "--out", str(tmp_path / "grid.png"))
    run("generate", str(small), "--labels", "0-2,5x2", "--seed", "3", "--out", str(tmp_path / "a.npz"))
    images = np.load(tmp_path / "a.npz")
    assert images["arr_0"].shape == (5, 24, 24, 3)
    assert images["arr_1"].tolist() == [0, 1, 2, 5, 5]
    assert (tmp_path / "grid.png").stat().st_size > 500
    described = json.loads(run("info", str(small), "--json"))
    assert described["family"] == "var"
    assert described["provenance"]["precision"] == "W4A8"
    # Twice the same command writes the same file, byte for byte.
    run("generate", str(small), "--labels", "0-2,5x2", "--seed", "3", "--out", str(tmp_path / "b.npz"))
    assert np.array_equal(np.load(tmp_path / "b.npz")["arr_0"], images["arr_0"])


def test_evaluate_images_and_a_model(tmp_path: Path) -> None:
    run("generate", "ladder/dit-xs", "--labels", "0x40,1x40", "--out", str(tmp_path / "images.npz"))
    scores = json.loads(run("evaluate", str(tmp_path / "images.npz")))
    assert scores["fd"]["value"] > scores["fd"]["low"] > 0
    assert scores["protocol"]["num_images"] == 80
    scores = json.loads(run("evaluate", "ladder/dit-xs", "--samples", "80"))
    assert scores["protocol"]["guidance"] >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "ladder/var-x"], "did you mean ladder/var-xs"),
        (["quantize", "ladder/var-xs", "--precision", "W4B8", "--out", "o"], "W4B8"),
        (["quantize", "ladder/var-xs", "--method", "rtm", "--out", "o"], "did you mean rtn"),
        (["generate", "ladder/var-xs", "--labels", "12"], "classes 0 to 11"),
        (["generate", "ladder/var-xs", "--labels", "a"], "unknown class 'a'"),
        (["generate", "ladder/var-xs", "--labels", ","], "expected class numbers"),
        (["generate", "ladder/var-xs", "--dtype", "float8"], "unknown type 'float8'"),
        (["generate", "ladder/var-xs", "--recipe", "papr"], "did you mean paper"),
        (["generate", "ladder/var-xs", "--sampling", "top_k"], "expected name=value"),
        (["generate", "ladder/var-xs", "--sampling", "topk=3"], "did you mean top_k"),
        (["generate", "ladder/var-xs", "--tokenizer", "x.pth"], "says itself what tokenizer would"),
        (["edit", "ladder/dit-xs", "x.png", "--box", "0,0,2,2"], "only a VAR edits"),
        (["export", "ladder/var-xs", "--to", "gguf", "--out", "x.pth"], "unknown format 'gguf'"),
        (["models", "--family", "vra"], "did you mean var"),
        (["evaluate", "ladder/var-xs", "--samples", "10"], "at least 65 are needed"),
        (["recommend", "published:var-weight-only", "--budget", "lots"], "lots"),
        (["report", "nowhere"], "nowhere"),
        (["study", "nowhere.py"], "no such file"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bitlaw.cli", *arguments], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
