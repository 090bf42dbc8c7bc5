"""The command line: what it prints, and one-line errors for mistakes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from bitlaw.cli import app, main

DATA = Path(__file__).parent / "data"

COMMANDS = [
    "study",
    "allocate",
    "quantize",
    "distill",
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


def test_quantize_by_a_chain_with_static_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITLAW_CACHE", "")
    out = tmp_path / "small"
    options = ["--step-groups", "2", "--calibration-images", "8", "--calibration", "ranges=minmax"]
    chain = ["--method", "smoothquant:alpha=0.6+gptq"]
    said = run("quantize", "ladder/var-xs", "--precision", "W3A8c", *chain, *options, "--out", str(out))
    assert "smoothquant:alpha=0.6+gptq, calibrated with 8 images" in said
    stated = r"^calibration holds up to [\d.]+ MiB of extremes, sampled rows at \d+ layers$"
    assert re.search(stated, said, re.MULTILINE) and said.index("calibration holds") < said.index("calibrating [")
    assert "blocks.0.ffn.fc2" in said and "gptq" in said
    stored = json.loads((out / "bitlaw.json").read_text())
    assert stored["plan"]["step_groups"] == [0, 2]
    assert stored["provenance"]["calibration"]["ranges"] == "minmax"
    assert not (tmp_path / ".small.work").exists()
    assert run("info", str(out)).strip() in said
    for bad in (["--step-groups", "a"], ["--calibration", "rnages=mse"], ["--method", "gptq+smoothquant"]):
        with pytest.raises(ValueError, match=r"step-groups|ranges|comes before"):
            run("quantize", "ladder/var-xs", *bad, "--out", str(tmp_path / "bad"))


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


def test_edit_draws_a_part_of_a_picture_anew(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    mask = np.zeros((30, 40), dtype=np.uint8)
    mask[:, 20:] = 255
    Image.fromarray(mask).save(tmp_path / "keep.png")
    picture, out = str(tmp_path / "picture.png"), str(tmp_path / "edited.npz")
    run("edit", "ladder/var-xs", picture, "--box", "0,0,24,24", "--label", "star", "--count", "3", "--out", out)
    anew = np.load(out)["arr_0"]
    run("edit", "ladder/var-xs", picture, "--keep", str(tmp_path / "keep.png"), "--label", "star", "--out", out)
    half = np.load(out)["arr_0"]
    assert anew.shape == (3, 24, 24, 3) and half.shape == (4, 24, 24, 3)
    spread = half.astype(float).std(0).mean((0, 2))  # of the versions, for each column
    assert spread[18:].mean() < spread[:6].mean() and anew.astype(float).std(0).mean() > 1
    run("edit", "ladder/var-xs", picture, "--box", "0,0,9,9", "--out", str(tmp_path / "edited.png"))
    assert (tmp_path / "edited.png").stat().st_size > 500


def test_released_files_are_described_drawn_and_written_back(tmp_path: Path) -> None:
    network, tokenizer = str(DATA / "var_d2.fp16.safetensors"), str(DATA / "vae_small.fp16.safetensors")
    described = json.loads(run("info", network, "--json"))
    assert (described["family"], described["size"]) == ("var", None)
    assert json.loads(run("info", tokenizer, "--json"))["kind"] == "multi-scale-vq"
    out = str(tmp_path / "images.npz")
    arguments = ("--tokenizer", tokenizer, "--recipe", "paper", "--sampling", "top_k=1", "--out", out)
    run("generate", network, "--labels", "3,-1", *arguments)
    assert np.load(out)["arr_0"].shape == (2, 96, 96, 3)
    printed = run("export", network, "--out", str(tmp_path / "again.pth"))
    assert "bytes" in printed
    run("generate", str(tmp_path / "again.pth"), "--labels", "3,-1", *arguments[:-1], str(tmp_path / "b.npz"))
    assert np.array_equal(np.load(tmp_path / "b.npz")["arr_0"], np.load(out)["arr_0"])


def test_models_lists_every_family_with_files_that_are_not_cut() -> None:
    printed = run("models")
    for name in ("var_d30.pth", "c2i_3B_384.pt", "DiT-XL-2-512x512.pt", "google/ddpm-cifar10-32", "ladder/var-l"):
        assert name in printed
    assert "ladder/dit-l" not in run("models", "--family", "mar")


def test_distill_then_info_and_on_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITLAW_CACHE", "")
    out, further = tmp_path / "small", tmp_path / "further"
    few = ["--steps", "3", "--batch-size", "4", "--training", "num_examples=8", "--training", "num-held-out=4"]
    begin = ["--precision", "W3A16", "--loss", "topkld", "--top-k", "60", "--start", "rtn"]
    events = tmp_path / "events"
    said = run("distill", "ladder/var-xs", *begin, *few, "--tensorboard", str(events), "--out", str(out))
    assert "encoding images [12/12]" in said and "student: step 3/3" in said
    assert re.search(r"distilled +by topkld \(K = 60\), 3 steps of 4 images \(ladder\); held-out loss", said)
    assert list(events.glob("events.out.tfevents.*"))
    assert not (tmp_path / ".small.work").exists()
    assert run("info", str(out)).strip() in said
    more = run("distill", "ladder/var-xs", "--start", str(out), "--loss", "ce", *few, "--out", str(further))
    assert "by ce, 3 steps" in more
    precision = json.loads((further / "bitlaw.json").read_text())["provenance"]["precision"]
    assert precision == "W3A16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "ladder/var-x"], "did you mean ladder/var-xs"),
        (["quantize", "ladder/var-xs", "--precision", "W4B8", "--out", "o"], "W4B8"),
        (["quantize", "ladder/var-xs", "--method", "rtm", "--out", "o"], "did you mean rtn"),
        (["distill", "ladder/var-xs", "--loss", "topkl", "--out", "o"], "did you mean topkld"),
        (["distill", "ladder/var-xs", "--top-k", "513", "--out", "o"], "the vocabulary has 512 codes"),
        (["distill", "ladder/var-xs", "--training", "stepz=3", "--out", "o"], "did you mean steps"),
        (["generate", "ladder/var-xs", "--labels", "12"], "classes 0 to 11"),
        (["generate", "ladder/var-xs", "--labels", "a"], "unknown class 'a'"),
        (["generate", "ladder/var-xs", "--labels", ","], "expected class numbers"),
        (["generate", "ladder/var-xs", "--dtype", "float8"], "unknown type 'float8'"),
        (["generate", "ladder/var-xs", "--recipe", "papr"], "did you mean paper"),
        (["generate", "ladder/var-xs", "--sampling", "top_k"], "expected name=value"),
        (["generate", "ladder/var-xs", "--sampling", "topk=3"], "did you mean top_k"),
        (["generate", "ladder/var-xs", "--tokenizer", "x.pth"], "says itself what tokenizer would"),
        (["generate", "ladder/var-xs", "--guidance", "nan"], "guidance nan: must be 0 or more"),
        (["edit", "ladder/var-xs", "x.png", "--box", "0,0,25,2"], "not an image"),
        (["edit", "ladder/dit-xs", "x.png", "--box", "0,0,2,2"], "only a VAR edits"),
        (["export", "ladder/var-xs", "--to", "gguf", "--out", "x.pth"], "unknown format 'gguf'"),
        (["models", "--family", "vra"], "did you mean var"),
        (["evaluate", "ladder/var-xs", "--samples", "10"], "at least 65 are needed"),
        (["recommend", "published:var-weight-only", "--budget", "lots"], "lots"),
        (["report", "nowhere"], "nowhere"),
        (["study", "nowhere.py"], "no such file"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bitlaw", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr().err
    assert ended.value.code == 2, printed
    assert message in printed
    assert "Traceback" not in printed
    assert list(tmp_path.iterdir()) == []


def test_so_it_is_from_a_shell(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "bitlaw.cli", "generate", "ladder/var-x"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stderr
    assert "did you mean ladder/var-xs" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
