"""Step groups: the dynamic programme against brute force, its cost against its definition, and on models."""

import json
import re
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from bitlaw.allocation.step_groups import (
    NOTHING,
    cheapest_groups,
    choose_step_groups,
    cost_of,
    group_costs,
    groups_of_ends,
    study_step_groups,
)
from bitlaw.calibration.settings import Calibration
from bitlaw.cli import app
from bitlaw.methods.quantize import equal_groups, quantize
from bitlaw.models.generator import Noise, rollout
from bitlaw.models.loading import load
from tiny_models import TINY, tiny_dit, tiny_var

FEW = Calibration(num_images=3, batch_size=3)


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("BITLAW_CACHE", "")


@given(st.integers(1, 7), st.integers(0, 10**6))
def test_groups_are_the_cheapest_there_are(num_steps, seed):
    cost_SS = np.random.default_rng(seed).random((num_steps, num_steps))
    found = cheapest_groups(cost_SS, num_steps)
    assert len(found) == num_steps
    for count, (cost, starts) in enumerate(found, start=1):
        every = [(0, *rest) for rest in combinations(range(1, num_steps), count - 1)]
        least = min(cost_of(cost_SS, other) for other in every)
        assert starts in every
        assert cost == pytest.approx(least)
        assert cost_of(cost_SS, starts) == pytest.approx(least)


@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 10**6))
def test_cost_is_what_each_step_loses_to_the_range_of_all(num_steps, num_sites, seed):
    random = np.random.default_rng(seed)
    ends_NS2 = np.sort(random.normal(size=(num_sites, num_steps, 2)), axis=-1)
    ends_NS2[0, random.random(num_steps) < 0.3] = NOTHING
    cost_SS = group_costs(ends_NS2)
    for first in range(num_steps):
        for last in range(first, num_steps):
            lost = 0.0
            for steps in ends_NS2[:, first : last + 1]:
                there = [(low, high) for low, high in steps if low <= high]
                for low, high in there:
                    widest = max(h for _, h in there) - min(l for l, _ in there)
                    lost += np.log2(widest / (high - low)) / num_sites
            assert cost_SS[first, last] == pytest.approx(lost, abs=1e-9)


def test_ranges_that_jump_are_split_where_they_jump():
    # Of two sites one jumps after step 2, one after step 6; a third never changes.
    first = [(-1.0, 1.0)] * 2 + [(-8.0, 8.0)] * 8
    second = [(0.0, 2.0)] * 6 + [(0.0, 32.0)] * 4
    found = groups_of_ends({"a": first, "b": second, "c": [(-1.0, 1.0)] * 10}, 4)
    assert found.starts[2] == (0, 2, 6)
    assert found.bits_lost[2] == found.bits_lost[3] == 0
    # One group: 2 steps lose 3 bits and 6 lose 4, over 3 sites and 10 steps.
    assert found.bits_lost[0] == found.equal_bits_lost[0] == pytest.approx((6 + 24) / 30)
    assert found.equal_bits_lost[2] > found.bits_lost[2]


def test_a_range_that_moves_is_told_from_one_that_stays():
    found = groups_of_ends({"a": [(0.0, 1.0)] * 2 + [(9.0, 10.0)] * 2}, 2)
    assert found.starts[1] == (0, 2)
    assert found.bits_lost == (pytest.approx(np.log2(10)), 0)


def test_what_is_constant_loses_sixteen_bits_at_most():
    assert groups_of_ends({"a": [(5.0, 5.0), (5.0, 5.0)]}, 1).bits_lost == (0,)
    assert groups_of_ends({"a": [(5.0, 5.0), (0.0, 5.0)]}, 1).bits_lost == (8,)


def test_inputs_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match=r"^b: NaN or Inf enters it"):
        groups_of_ends({"a": [NOTHING, (0.0, 1.0)], "b": [(0.0, np.inf), (0.0, 1.0)]}, 1)
    with pytest.raises(ValueError, match=r"^a: NaN"):
        groups_of_ends({"a": [(np.nan, np.nan), (0.0, 1.0)]}, 1)


def test_ends_are_those_of_what_enters_in_each_step():
    model = tiny_dit()
    site = model.net.get_submodule("blocks.1.mlp.fc2")
    seen: dict[int, list[torch.Tensor]] = {}
    hook = site.register_forward_pre_hook(lambda _, args: seen.setdefault(model.clock.step, []).append(args[0]))
    for _ in rollout(model, torch.arange(3), Noise(FEW.seed, range(3))):
        pass
    hook.remove()
    found = study_step_groups(model, 9, FEW)
    assert found.num_steps == len(found.starts) == 4
    wanted = [(float(torch.cat(x).min()), float(torch.cat(x).max())) for x in seen.values()]
    assert found.ends["blocks.1.mlp.fc2"] == tuple(wanted)
    assert "final_layer.linear" not in found.ends
    assert found.bits_lost[-1] == 0
    assert list(found.bits_lost) == sorted(found.bits_lost, reverse=True)
    assert all(best <= equal + 1e-12 for best, equal in zip(found.bits_lost, found.equal_bits_lost, strict=True))


def test_a_site_that_some_steps_do_not_reach():
    """VAR embeds no tokens before its first stage."""
    ends = study_step_groups(tiny_var(), 1, FEW, protect="none").ends["word_embed"]
    assert ends[0] == NOTHING
    assert all(low <= high for low, high in ends[1:])


@pytest.mark.parametrize("name", TINY)
def test_every_family(name):
    model = TINY[name]()
    starts = choose_step_groups(model, 2, num_images=2)
    assert len(starts) == 2
    assert starts == choose_step_groups(model, 2, num_images=2)
    small = quantize(model, "W4A8c", calibration=FEW, step_groups=starts)
    assert small.provenance["precision"] == "W4A8c"


def test_mistakes_are_found_before_anything_is_drawn(monkeypatch):
    monkeypatch.setattr("bitlaw.allocation.step_groups.calibrate", lambda *_: pytest.fail("drawn"))
    with pytest.raises(ValueError, match="from 1 to the model's 4 steps"):
        choose_step_groups(tiny_dit(), 5)
    with pytest.raises(ValueError, match="all sites are protected"):
        choose_step_groups(tiny_dit(), 2, protect=[site.name for site in tiny_dit().sites()])
    with pytest.raises(ValueError, match="step_groups 0"):
        choose_step_groups(tiny_dit(), 0)


def test_equal_groups_of_equal_ranges_are_as_good():
    found = groups_of_ends({"a": [(-1.0, 1.0)] * 6}, 3)
    assert found.bits_lost == found.equal_bits_lost == (0, 0, 0)
    assert [len(starts) for starts in found.starts] == [1, 2, 3]
    assert len(equal_groups(3, 6)) == 3


def test_what_is_kept_gives_the_same_groups(tmp_path, monkeypatch):
    monkeypatch.setenv("BITLAW_CACHE", str(tmp_path))
    model = tiny_var()
    found = study_step_groups(model, 3, FEW, protect="none")
    monkeypatch.setattr("bitlaw.calibration.cache.collect", lambda *_: pytest.fail("drawn again"))
    assert study_step_groups(model, 3, FEW, protect="none") == found


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("BITLAW_CACHE", "")
    monkeypatch.setattr("shutil.which", lambda name: None)

    def run(*more):
        arguments = ["analyze", "ladder/dit-xs", "step-groups", "--images", "2", "--out", str(tmp_path / "g"), *more]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    said = run("--count", "3", "--max-count", "5")
    found = study_step_groups(load("ladder/dit-xs"), 5, Calibration(num_images=2, seed=2**21))
    for starts, lost in zip(found.starts, found.bits_lost, strict=True):
        assert re.search(rf"{len(starts)} +{', '.join(map(str, starts))} +{lost:.3f}", said)
    stored = json.loads((tmp_path / "g" / "step-groups.json").read_text())
    assert tuple(map(tuple, stored["starts"])) == found.starts
    assert "plotly" in (tmp_path / "g" / "step-groups.html").read_text()
    for bad in (["--count", "0"], ["--count", "5", "--max-count", "4"]):
        with pytest.raises(ValueError, match="--count"):
            run(*bad)
    assert (
        re.search(rf"1 +0 +{found.bits_lost[0]:.3f}", run("--count", "1", "--max-count", "1", "--protect", "none"))
        is None
    )
