"""Distilling whole models: what it costs to interrupt, split and configure a run, and what stops it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bitlaw
from bitlaw.distill import Distillation, distill, distill_from
from bitlaw.distill.qat import quantized_layers
from bitlaw.distill.settings import is_distillation, parse_distillation
from bitlaw.distill.trainer import loss_of
from tiny_models import TINY

SHORT = Distillation(
    start="rtn", data="generated", num_examples=32, num_held_out=8, steps=6, batch_size=8, warmup_steps=2, evaluations=2
)


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("BITLAW_CACHE", "")


def weights(model):
    """All numbers that a checkpoint holds."""
    decoded = {f"{name}.weight": layer.weight for name, layer in quantized_layers(model.net)}
    return {**model.net.state_dict(), **decoded}


def largest_difference(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("family", TINY)
def test_every_family_learns_and_is_saved(family, tmp_path):
    teacher = TINY[family]()
    lines = []
    small = distill(
        teacher, "W2A16", replace(SHORT, steps=16, lr=3e-3, evaluations=4), protect="none", report=lines.append
    )
    done = small.provenance["distillation"]
    errors = done["held_out_loss"]
    assert errors[str(done["kept_step"])] < errors["0"], errors
    assert done["loss"] == ("mse" if teacher.vocab_size is None else "topkld")
    assert "step 16/16" in lines[-1]
    small.save(tmp_path / "small")
    again = bitlaw.load(tmp_path / "small")
    assert torch.equal(again.generate([0, 0], seed=1), small.generate([0, 0], seed=1))
    assert again.provenance["distillation"] == json.loads(json.dumps(done))


@pytest.mark.parametrize("loss", ["ce", "mse", "js", "forward-kl", "reverse-kl", "topkld"])
def test_every_loss_of_categories_falls(loss):
    small = distill(TINY["llamagen"](), "W2A16", replace(SHORT, loss=loss, steps=16, lr=3e-3), protect="none")
    errors = small.provenance["distillation"]["held_out_loss"]
    assert errors["16"] < errors["0"]


def test_a_continuous_model_learns_its_own_task():
    small = distill(TINY["dit"](), "W2A16", replace(SHORT, loss="task", steps=16, lr=3e-3), protect="none")
    errors = small.provenance["distillation"]["held_out_loss"]
    assert errors[str(small.provenance["distillation"]["kept_step"])] < errors["0"]


class Killed(Exception):
    """Stands for a kill between two steps."""


@pytest.mark.parametrize("family", ["var", "dit"])
def test_a_resumed_run_is_an_undisturbed_one(family, tmp_path, monkeypatch):
    monkeypatch.setattr("bitlaw.training.SECONDS_BETWEEN_SAVES", -1.0)  # after every step
    teacher = TINY[family]()
    undisturbed = distill(teacher, "W3A8", SHORT, work=tmp_path / "a")
    steps = []

    def stop(tag, value, step):
        if tag == "learning_rate":
            steps.append(step)
            if step == 4:
                raise Killed

    events = type("Events", (), {"add_scalar": staticmethod(stop)})()
    with pytest.raises(Killed):
        distill(teacher, "W3A8", SHORT, work=tmp_path / "b", events=events)
    resumed = distill(teacher, "W3A8", SHORT, work=tmp_path / "b", events=events if steps.append(None) else None)
    assert largest_difference(undisturbed, resumed) == 0
    assert {k: v for k, v in resumed.provenance["distillation"].items() if k != "seconds"} == {
        k: v for k, v in undisturbed.provenance["distillation"].items() if k != "seconds"
    }


def test_other_settings_do_not_resume(tmp_path):
    teacher, lines = TINY["var"](), []
    distill(teacher, "W3A16", SHORT, work=tmp_path)
    distill(teacher, "W3A16", replace(SHORT, seed=1), work=tmp_path, report=lines.append)
    assert not any("resumed" in line for line in lines)
    distill(teacher, "W3A16", SHORT, work=tmp_path, report=lines.append)
    assert any("resumed at step 6 of 6" in line for line in lines)


@pytest.mark.parametrize("change", [{"accumulate": 4}, {"checkpointing": True}])
@pytest.mark.parametrize("family", ["var", "dit"])
def test_ways_of_computing_the_same(family, change):
    teacher = TINY[family]()
    plain = distill(teacher, "W3A16", SHORT, protect="none")
    other = distill(teacher, "W3A16", replace(SHORT, **change), protect="none")
    # A number at a rounding boundary may fall to the other side: the rest agrees to float32's rounding through Adam.
    a, b = weights(plain), weights(other)
    apart = torch.cat([(a[name] - b[name]).abs().flatten() for name in a])
    assert float((apart > 1e-4).float().mean()) < 0.01


@pytest.mark.parametrize(
    "change",
    [
        {"autocast": "bfloat16"},
        {"optimizer": "adafactor"},
        {"scales": "recomputed"},
        {"trainable": "scales", "lr": 1e-2},
        {"ema_half_life": 0.0},
        {"temperature": 2.0},
        {"label_dropout": 0.0},
    ],
)
def test_settings_that_change_what_is_learned(change):
    teacher = TINY["var"]()
    plain = distill(teacher, "W2A16", replace(SHORT, steps=16, lr=3e-3), protect="none")
    other = distill(teacher, "W2A16", replace(SHORT, **{"steps": 16, "lr": 3e-3, **change}), protect="none")
    errors = other.provenance["distillation"]["held_out_loss"]
    assert min(errors.values()) < errors["0"]
    assert largest_difference(plain, other) > 0


def test_cached_logits_are_those_of_the_moment(tmp_path):
    teacher = TINY["var"]()
    given = replace(SHORT, label_dropout=0.0)
    now = distill(teacher, "W3A16", given, protect="none")
    cached = distill(teacher, "W3A16", replace(given, cache_teacher=True), protect="none", work=tmp_path)
    assert largest_difference(now, cached) < 1e-5


def test_it_stops_when_nothing_is_gained():
    small = distill(
        TINY["var"](), "W8A16", replace(SHORT, steps=40, lr=1.0, evaluations=40, patience=2), protect="none"
    )
    done = small.provenance["distillation"]
    assert max(map(int, done["held_out_loss"])) < 40
    assert done["held_out_loss"][str(done["kept_step"])] == min(done["held_out_loss"].values())


def test_a_loss_that_is_not_finite_names_step_and_layer_and_keeps_the_last_state(tmp_path, monkeypatch):
    monkeypatch.setattr("bitlaw.training.SECONDS_BETWEEN_SAVES", -1.0)
    teacher = TINY["var"]()
    forward = torch.nn.functional.linear

    def broken(x, weight, bias=None):
        out = forward(x, weight, bias)
        spoils = list(tmp_path.rglob("student.pt")) and out.shape[-1] == 64
        return out * torch.nan if spoils else out

    monkeypatch.setattr("bitlaw.linear.F.linear", broken)
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 1; the first layer .* blocks\.0\.ffn\.fc1"):
        distill(teacher, "W3A16", SHORT, protect="none", work=tmp_path)
    (state,) = tmp_path.rglob("student.pt")
    assert torch.load(state, weights_only=True)["step"] == 1


# ---- processes that are killed, and several at once -----------------------------------------------

PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from tiny_models import TINY
import bitlaw.training
from bitlaw.distill import Distillation, distill
torch.set_num_threads(1)
torch.manual_seed(0)
settings = Distillation(start="gptq", data="generated", num_examples=32, num_held_out=8, steps=5, batch_size=8,
                        accumulate=int(sys.argv[4]), warmup_steps=2, evaluations=2)
bitlaw.training.SECONDS_BETWEEN_SAVES = -1.0
small = distill(TINY[sys.argv[3]](), "W3A16", settings, protect="none", work=Path(sys.argv[2]) / "work", report=print)
small.save(Path(sys.argv[2]) / f"rank{sys.argv[5]}")
"""


def start(folder: Path, family: str, accumulate: int = 1, rank: int = 0, **environment: str) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "BITLAW_CACHE": "", **environment}
    arguments = [str(Path(__file__).parents[1]), str(folder), family, str(accumulate), str(rank)]
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], env=env)


def test_a_run_that_is_killed_goes_on(tmp_path):
    assert start(tmp_path / "a", "var").wait(timeout=120) == 0
    running = start(tmp_path / "b", "var")
    while not list(tmp_path.glob("b/work/*/student.pt")):
        assert running.poll() is None
        time.sleep(0.005)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    assert not (tmp_path / "b" / "rank0").exists()
    assert start(tmp_path / "b", "var").wait(timeout=120) == 0
    a, b = (bitlaw.load(tmp_path / name / "rank0") for name in "ab")
    assert largest_difference(a, b) == 0


def launch(folder: Path, family: str, world: int, accumulate: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(world):
        together = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
        }
        running.append(start(folder, family, accumulate, rank, **(together if world > 1 else {})))
    assert [process.wait(timeout=120) for process in running] == [0] * world


@pytest.mark.parametrize(("family", "accumulate"), [("var", 2), pytest.param("dit", 1, marks=pytest.mark.slow)])
def test_two_processes_are_one(family, accumulate, tmp_path):
    launch(tmp_path / "one", family, 1, accumulate)
    launch(tmp_path / "two", family, 2, accumulate)
    one, first, second = (bitlaw.load(tmp_path / name) for name in ("one/rank0", "two/rank0", "two/rank1"))
    assert largest_difference(first, second) == 0
    a, b = weights(one), weights(first)
    apart = torch.cat([(a[name] - b[name]).abs().flatten() for name in a])
    assert float((apart > 1e-4).float().mean()) < 0.01


# ---- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "precision", "change", "message"),
    [
        ("var", "W3A16", {"top_k": 17}, "17.*16"),
        ("var", "W3A16", {"loss": "klx"}, "unknown loss 'klx'"),
        ("var", "W3A16", {"loss": "js", "top_k": 3}, "top_k"),
        ("dit", "W3A16", {"loss": "topkld"}, "dit predicts no categories; use mse or task"),
        ("dit", "W3A16", {"top_k": 3}, "categories"),
        ("dit", "W16A16", {}, "nothing is quantized"),
        ("dit", "W3A16", {"start": "gptx"}, "unknown method 'gptx'"),
        ("dit", "W3A16", {"data": "/nowhere/at/all"}, "/nowhere/at/all"),
        ("dit", "W3A16", {"data": "ladder"}, "pixels"),
        ("dit", "W3A16", {"cache_teacher": True}, "noise"),
        ("var", "W3A16", {"cache_teacher": True, "loss": "ce"}, "ce has no teacher"),
    ],
)
def test_what_cannot_be_is_refused_before_work(family, precision, change, message):
    told = []
    with pytest.raises(ValueError, match=message):
        distill(TINY[family](), precision, replace(SHORT, **change), progress=lambda *what: told.append(what))
    assert not told


@pytest.mark.parametrize(
    "change",
    [{"steps": -1}, {"lr": 0.0}, {"batch_size": 64}, {"accumulate": 3}, {"autocast": "fp8"}, {"trainable": "some"}],
)
def test_settings_that_cannot_be(change):
    with pytest.raises(ValueError, match=next(iter(change)).replace("batch_size", "num_examples")):
        replace(SHORT, **change)


def test_student_and_teacher_must_be_alike():
    teacher = TINY["var"]()
    start = bitlaw.quantize(teacher, "W3A16")
    with pytest.raises(ValueError, match="student is a var and the teacher a dit"):
        distill_from(start, TINY["dit"](), SHORT)
    other = TINY["var"]()
    next(other.autoencoder.parameters()).add_(1)
    with pytest.raises(ValueError, match="different tokenizers"):
        distill_from(start, other, SHORT)
    with pytest.raises(ValueError, match="teacher is quantized itself"):
        distill_from(start, start, SHORT)


def test_step_groups_are_for_models_that_are_trained_step_by_step():
    quick = bitlaw.Calibration(num_images=4, batch_size=4)
    with pytest.raises(ValueError, match="2 step groups: a var is trained on all of its steps in one pass"):
        distill(TINY["var"](), "W3A8c", SHORT, step_groups=2, calibration=quick)
    teacher = TINY["dit"]()
    plain = distill(teacher, "W3A8c", SHORT, step_groups=2, calibration=quick, protect="none")
    anew = replace(SHORT, checkpointing=True)
    assert (
        largest_difference(plain, distill(teacher, "W3A8c", anew, step_groups=2, calibration=quick, protect="none"))
        == 0
    )


def test_methods_in_words():
    assert parse_distillation(
        "distill:topkld,steps=300,start=smoothquant:alpha=0.6+gptq:act_order=true,damping=0.1"
    ) == (Distillation(loss="topkld", steps=300, start="smoothquant:alpha=0.6+gptq:act_order=true,damping=0.1"))
    assert parse_distillation("distill") == Distillation()
    assert parse_distillation("distill:top-k=5,lr=1e-2") == Distillation(top_k=5, lr=1e-2)
    assert not is_distillation("gptq") and not is_distillation("distilled")
    for text, message in [
        ("distill:kl,step=3", "did you mean steps"),
        ("distill:kl,3", "name=value"),
        ("distill:kl,steps=x", "steps: x is not a number"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_distillation(text)


def test_k_is_the_samplers_own():
    model = TINY["var"]()
    assert loss_of(model.with_sampling(top_k=5), Distillation()).top_k == 5
    assert loss_of(model, Distillation()).top_k == 4  # a quarter of 16, as nothing is left out in sampling
    assert loss_of(model, Distillation(top_k=7)).top_k == 7
