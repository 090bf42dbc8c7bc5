"""The local pool: every item gives an outcome, whatever happens to its process."""

import os
import time
from pathlib import Path

import pytest
import torch

from bitlaw.engine import LocalEngine


def _work(item: str) -> str:
    if item == "fail":
        raise ValueError("this cell fails")
    if item == "die":
        os._exit(9)
    if item.startswith("slow:"):
        Path(item.removeprefix("slow:")).write_text(str(os.getpid()))
        time.sleep(60)
    return f"{item} on {torch.get_num_threads()} thread"


def test_results_failures_and_deaths_are_all_reported() -> None:
    outcomes = {o.item: o for o in LocalEngine(2).run(_work, ["a", "fail", "die", "b", "c"])}
    assert outcomes.keys() == {"a", "fail", "die", "b", "c"}
    assert {outcomes[key].result for key in "abc"} == {f"{key} on 1 thread" for key in "abc"}
    assert isinstance(outcomes["fail"].error, ValueError)
    assert "died" in str(outcomes["die"].error)


def test_leaving_the_loop_kills_what_runs(tmp_path: Path) -> None:
    marker = tmp_path / "pid"
    run = LocalEngine(2).run(_work, ["a", f"slow:{marker}"])
    next(run)
    deadline = time.monotonic() + 30
    while not (marker.exists() and marker.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    run.close()  # type: ignore[attr-defined]
    pid = int(marker.read_text())
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the worker still runs")
