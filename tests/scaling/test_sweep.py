"""Studies: resumable, refused where they do not belong, and the same numbers however they are run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bitlaw
from bitlaw.engine import LocalEngine
from bitlaw.models.export import export_official
from bitlaw.scaling.points import read_points, write_points
from bitlaw.scaling.records import Cell, Record, StudyDirectory
from bitlaw.scaling.sweep import Study, estimate, missing_cells, open_study, run_cell, run_study

DATA = Path(__file__).parents[1] / "data"
VAR_FILE, TOKENIZER_FILE = str(DATA / "var_d2.fp16.safetensors"), str(DATA / "vae_small.fp16.safetensors")

SMALL = Study(
    name="small",
    models=("ladder/var-xs", "ladder/dit-xs"),
    precisions=("W16A16", "W3A8"),
    num_images=80,
    num_validation=16,
)


def numbers(directory: Path) -> dict[str, Any]:
    """What must not depend on how a study was run: every score and bit count, and the pictures."""
    found: dict[str, Any] = {}
    for path in sorted((directory / "cells").glob("*.json")):
        record = json.loads(path.read_text())
        found[path.name] = (record["config"], record["metrics"], record["bits"], record["error"])
        found[path.stem] = (directory / "samples" / f"{path.stem}.png").read_bytes()
    return found


def run(study: Study, directory: Path, workers: int = 2) -> list[Record]:
    here = open_study(study, directory)
    cells = missing_cells(study, here)
    return [p.record for p in run_study(study, here, estimate(cells, num_images=2), LocalEngine(workers))]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small study, run in one go on two processes."""
    directory = tmp_path_factory.mktemp("study") / "undisturbed"
    records = run(SMALL, directory)
    assert [record.error for record in records] == [None] * 4
    return directory


def test_every_cell_has_its_scores_bits_and_picture(undisturbed: Path) -> None:
    records = list(StudyDirectory(undisturbed).records())
    assert len(records) == 4
    for record in records:
        assert record.metrics.keys() >= {"fd", "fd_reconstruction", "is", "kid", "precision", "recall", "loss"}
        fd = record.metrics["fd"]
        assert fd["low"] < fd["value"] < fd["high"]
        assert record.bits["model_bits"] > 0
        assert StudyDirectory(undisturbed).samples(record.cell).exists()


def test_its_points_are_the_same_from_a_csv(undisturbed: Path, tmp_path: Path) -> None:
    points = read_points(undisturbed)
    write_points(tmp_path / "points.csv", points)
    again = read_points(tmp_path / "points.csv")
    assert [(p.model, p.precision, p.parameters, p.bits, p.score) for p in again] == [
        (p.model, p.precision, p.parameters, p.bits, p.score) for p in points
    ]


def test_a_second_run_has_nothing_to_do(undisturbed: Path) -> None:
    assert missing_cells(SMALL, open_study(SMALL, undisturbed)) == []


def test_one_process_gives_the_same_numbers(undisturbed: Path, tmp_path: Path) -> None:
    run(SMALL, tmp_path / "one", workers=1)
    assert numbers(tmp_path / "one") == numbers(undisturbed)


def test_a_cell_alone_gives_the_same_numbers(undisturbed: Path) -> None:
    record = next(StudyDirectory(undisturbed).records())
    again = run_cell(record.cell).record
    assert again.metrics == record.metrics
    assert again.bits == record.bits


def test_killed_at_a_random_moment_it_finishes_with_the_same_numbers(undisturbed: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "small.py", tmp_path / "killed"
    file.write_text(f"from bitlaw import Study\n\nstudy = {SMALL!r}\n")
    command = [sys.executable, "-m", "bitlaw.cli", "study", str(file), "--out", str(out), "--no-report"]
    seed = random.SystemRandom().randrange(1000)
    delay = 4 + random.Random(seed).random() * 8
    print(f"killed after {delay:.1f} s")
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert numbers(out) == numbers(undisturbed)


def test_a_failed_cell_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    study = replace(SMALL, models=("ladder/var-xs",))
    here = open_study(study, tmp_path / "study")
    good, bad = study.cells()
    broken = replace(bad, sampling=(("num_steps", 3),))  # VAR has no such setting
    expected = estimate([good], num_images=2)
    expected.cell_seconds[broken] = 0.0

    class Grid(Study):
        def cells(self) -> list[Cell]:
            return [good, broken]

    grid = Grid(**{name: getattr(study, name) for name in study.__dataclass_fields__})
    records = {p.record.cell: p.record for p in run_study(grid, here, expected, LocalEngine(1))}
    assert records[good].error is None
    assert "num_steps" in str(records[broken].error)
    assert records[broken].metrics == {}
    assert missing_cells(grid, here) == [broken]


def test_another_study_is_refused(undisturbed: Path) -> None:
    with pytest.raises(ValueError, match=r"holds another study: num_images 80 there, 90 here"):
        open_study(replace(SMALL, num_images=90), undisturbed)


def test_a_directory_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="not empty and holds no study"):
        open_study(SMALL, tmp_path)


def test_mistakes_are_found_before_the_work() -> None:
    with pytest.raises(ValueError, match="40 images are too few for a covariance of 64 features; at least 65"):
        replace(SMALL, num_images=40).check()
    with pytest.raises(ValueError, match=r"ladder/var-xs at W4g40A16[\s\S]*blocks\.0\.attn\.proj[\s\S]*ladder/dit-xs"):
        replace(SMALL, precisions=("W4g40A16",)).check()
    with pytest.raises(ValueError, match="unknown method 'rtm'; did you mean rtn"):
        replace(SMALL, methods=("rtm",)).check()


def test_a_damaged_record_is_named(undisturbed: Path, tmp_path: Path) -> None:
    here = StudyDirectory(tmp_path)
    cell = SMALL.cells()[0]
    path = tmp_path / "cells" / f"{cell.stem}.json"
    path.parent.mkdir()
    path.write_text((undisturbed / "cells" / path.name).read_text()[:100])
    with pytest.raises(ValueError, match=f"{cell.stem}.json: damaged"):
        here.read(cell)


def test_a_full_disk_loses_nothing(undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = next(StudyDirectory(undisturbed).records())
    here = StudyDirectory(tmp_path)
    here.write(record, b"picture")

    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        here.write(replace(record, seconds=1.0), b"other")
    monkeypatch.undo()
    assert here.read(record.cell) == record
    assert here.samples(record.cell).read_bytes() == b"picture"
    files = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert files == [f"{record.cell.stem}.json", f"{record.cell.stem}.png"]


def test_a_study_of_released_files_under_a_recipe(tmp_path: Path) -> None:
    """A ladder model as an official file: the same images and scores, but for the name."""
    model = bitlaw.load("ladder/var-xs")
    export_official(model, tmp_path / "var-xs.pth")
    torch.save(model.tokenizer.to_official(), tmp_path / "tokenizer.pth")
    shared = {
        "precisions": ("W16A16", "W4A16"),
        "num_images": 80,
        "num_validation": 16,
        "sampling": {"recipe": "paper"},
    }
    options = {"tokenizer": str(tmp_path / "tokenizer.pth"), "patch_nums": [1, 2, 3, 4, 6]}
    released = Study(name="released", models=(str(tmp_path / "var-xs.pth"),), options=options, **shared)
    builtin = Study(name="builtin", models=("ladder/var-xs",), **shared)
    released.check()
    scores = []
    for study in (released, builtin):
        directory = open_study(study, tmp_path / study.name)
        for cell in study.cells():
            result = run_cell(cell)
            directory.write(result.record, result.samples_png)
        assert not missing_cells(study, directory)  # records are found again by their settings
        assert {record.protocol["recipe"] for record in directory.records()} == {"paper"}
        scores.append([record.metrics for record in directory.records()])
    assert scores[0] == scores[1]


def test_validation_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="draws 96 px, and the validation images are the ladder's of 24 px"):
        Study(name="x", models=(VAR_FILE,), precisions=("W16A16",), options={"tokenizer": TOKENIZER_FILE}).check()


def test_methods_that_calibrate_or_train_are_expected_to_take_longer() -> None:
    methods = ("rtn", "gptq", "distill:ce,steps=100")
    study = Study(name="costs", models=("ladder/var-xs",), precisions=("W3A16",), methods=methods, num_images=80)
    expected = estimate(study.cells(), num_images=2)
    rtn, gptq, distilled = (expected.cell_seconds[cell] for cell in study.cells())
    assert rtn < gptq < distilled
