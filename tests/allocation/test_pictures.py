"""Pictures: they draw the numbers that they are given; files are whole."""

import math
from pathlib import Path

import pytest
from PIL import Image

from bitlaw.allocation.additivity import Additivity, RangeCheck
from bitlaw.allocation.curves import CurveSettings, RateDistortion, TensorKey, tensor_keys
from bitlaw.allocation.pictures import (
    LEAST_DRAWN,
    additivity_scatter,
    bits_by_layer,
    distortion_by_step,
    group_boundaries,
    rate_distortion,
    sensitivity_bars,
    sensitivity_maps,
)
from bitlaw.allocation.sensitivity import Outcome, Sensitivity, SensitivitySettings, subjects_of
from bitlaw.allocation.step_groups import NOTHING, groups_of_ends
from bitlaw.figures import write_figure
from bitlaw.precision import BitPlan, Precision
from tiny_models import tiny_var

SETTINGS = CurveSettings(widths=(0, 4, 8), step_groups=(0, 2))


@pytest.fixture(scope="module")
def sites():
    return tiny_var().sites()


@pytest.fixture(scope="module")
def curves(sites):
    keys = tensor_keys(SETTINGS, [site.name for site in sites])
    by_step = {
        key: tuple((4.0**-bits * (1 + n), 4.0**-bits, 0.0) for bits in SETTINGS.widths) for n, key in enumerate(keys)
    }
    return RateDistortion(by_step, SETTINGS, "exact", "tiny", "0")


@pytest.fixture(scope="module")
def result():
    model = tiny_var()
    settings = SensitivitySettings(precisions=("W2A16", "W3A4", "W4A16"))
    subjects = tuple(subjects_of(model, settings))
    outcomes = {
        (s.sites, p): Outcome((0.1 * len(s.sites) / (1 + i),))
        for s in subjects
        for i, p in enumerate(settings.precisions)
    }
    return Sensitivity(subjects, outcomes, settings, "tiny", "0", "kl")


def test_bits_by_layer(sites):
    inside = [site.name for site in sites if site.phase == "blocks" and site.name != "blocks.0.ffn.fc1"]
    two = BitPlan(dict.fromkeys(inside, (Precision.parse("W4A8"), Precision.parse("W4A3"))), (0, 2))
    figure = bits_by_layer(two, sites)
    assert [trace.name for trace in figure.data] == ["weights", "inputs from step 0", "inputs from step 2"]
    bits = dict(zip(figure.data[2].x, figure.data[2].y, strict=True))
    assert list(bits) == [site.name for site in sites]
    assert bits["blocks.1.ffn.fc1"] == 3
    assert bits["blocks.0.ffn.fc1"] == bits["head"] == 16
    assert dict(zip(figure.data[0].x, figure.data[0].y, strict=True))["blocks.1.ffn.fc1"] == 4


def test_rate_distortion(curves, sites):
    figure = rate_distortion(curves, sites)
    assert len(figure.data) == len(curves.by_step)
    shown = {trace.hovertext: trace for trace in figure.data}
    for key in curves.by_step:
        assert shown[str(key)].y == tuple(curves.distortions(key))
        assert shown[str(key)].xaxis == ("x" if key.what == "weight" else "x2")
    named = [trace.name for trace in figure.data if trace.showlegend]
    assert sorted(named) == sorted({site.kind for site in sites})


def test_distortion_by_step(curves, sites):
    figure = distortion_by_step(curves, 4)
    assert [trace.name for trace in figure.data] == ["0", "1", "2"]
    for step, trace in enumerate(figure.data):
        # The input of the group that the step is in, of every site.
        keys = [TensorKey(site.name, "input", int(step >= 2)) for site in sites]
        assert list(trace.text) == [str(key) for key in keys]
        assert trace.y == tuple(max(curves.by_step[key][1][step], LEAST_DRAWN) for key in keys)
    assert len(distortion_by_step(curves, 8, "weight").data[0].y) == len(sites)
    with pytest.raises(ValueError, match=r"no curve has 5 bits; measured: \(0, 4, 8\)"):
        distortion_by_step(curves, 5)
    weights = CurveSettings(what="weights")
    only = RateDistortion({TensorKey("a", "weight"): ((1.0,),) * 11}, weights, "exact", "a", "0")
    with pytest.raises(ValueError, match="the curves have no input"):
        distortion_by_step(only, 4)


def test_additivity_scatter():
    part = RangeCheck(2, 4, (3.0, 3.0, 3.0), (0.0, 2.0, 4.0), (1.5, 2.0, 8.0))
    figure = additivity_scatter(Additivity((part,), (), SETTINGS, "exact", 0, "tiny", "0"))
    points, line = figure.data
    assert points.x == (LEAST_DRAWN, 2.0, 4.0)
    assert points.y == part.measured
    assert points.name == f"2-4 bits: r = {part.correlation:.3f}, slope {part.slope:.2f}"
    assert line.x == line.y == (LEAST_DRAWN, 8.0)


def test_group_boundaries():
    ends = {"a": [(0.0, 1.0)] * 2 + [(0.0, 16.0)] * 2, "b": [NOTHING] + [(0.0, 1.0)] * 3, "c": [(1.0, 1.0)] * 4}
    groups = groups_of_ends(ends, 4)
    figure = group_boundaries(groups, 2)
    lines = {trace.hovertext: trace for trace in figure.data if trace.hovertext}
    assert lines["a"].y == (-2, -2, 2, 2)
    assert lines["b"].y == (None, 0, 0, 0)
    assert "c" not in lines
    assert [shape.x0 for shape in figure.layout.shapes] == [1.5]
    lost = {trace.name: trace.y for trace in figure.data if trace.name}
    assert lost == {"equal groups": groups.equal_bits_lost, "best groups": groups.bits_lost}
    with pytest.raises(ValueError, match="5 groups were not studied; 1 to 4 were"):
        group_boundaries(groups, 5)


def test_sensitivity_bars(result):
    figure = sensitivity_bars(result)
    assert [trace.name for trace in figure.data] == ["W2A16", "W3A4", "W4A16"]
    shown = dict(zip(figure.data[1].x, figure.data[1].y, strict=True))
    assert shown.keys() == {"embed", "adaln", "qkv", "proj", "fc1", "fc2", "head", "all"}
    assert shown["fc2"] == pytest.approx(0.1 * 2 / 2)


def test_sensitivity_maps(result):
    figure = sensitivity_maps(result, columns=2)
    assert len(figure.data) == 3
    one = figure.data[2]
    assert list(one.y) == ["embed", "0", "1", "head"]
    assert one.z[1][list(one.x).index("fc2")] == pytest.approx(math.log10(0.1 / 3))
    assert one.z[0][list(one.x).index("fc2")] is None


def test_pages_need_no_network_and_files_are_whole(tmp_path, result, monkeypatch):
    write_figure(tmp_path / "a.html", sensitivity_bars(result))
    page = (tmp_path / "a.html").read_text()
    assert "Plotly.newPlot" in page and "<script src" not in page
    with pytest.raises(ValueError, match=r"pictures are \.png or \.html, not '\.jpg'"):
        write_figure(tmp_path / "a.jpg", sensitivity_bars(result))
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match="a PNG needs chromium on PATH"):
        write_figure(tmp_path / "a.png", sensitivity_bars(result))
    monkeypatch.setattr("shutil.which", lambda name: "/bin/false")
    with pytest.raises(OSError, match="chromium drew nothing"):
        write_figure(tmp_path / "a.png", sensitivity_bars(result))
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


@pytest.mark.browser
def test_a_png_is_the_figure(tmp_path: Path, result):
    path = tmp_path / "a.png"
    write_figure(path, sensitivity_bars(result).update_layout(width=500, height=300, paper_bgcolor="#ff0000"))
    with Image.open(path) as image:
        assert image.size == (500, 300)
        colours = image.convert("RGB").getcolors(2**20)
        corners = [image.convert("RGB").getpixel((x, y)) for x in (0, 499) for y in (0, 299)]
    assert corners == [(255, 0, 0)] * 4
    assert len(colours) > 10
