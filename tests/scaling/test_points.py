from pathlib import Path

import pytest

from bitlaw.files import write_json
from bitlaw.scaling.points import Point, read_points, write_points
from bitlaw.scaling.published import published_names, published_source
from bitlaw.scaling.records import Cell, Record, StudyDirectory


def test_points_round_trip_through_csv(tmp_path: Path) -> None:
    points = [
        Point(
            "a,b",
            "var",
            "W4A16",
            "rtn",
            0.1 + 0.2,
            1e9,
            "fd",
            0.25,
            0.35,
            3,
            {"model_bits": 4e9, "compute_bits": 6.4e10},
        ),
        Point("c", "dit", "W16A16", "none", -1.5, None, "image_reward", None, None, 0, {"model_bits": 1e-3 + 1e9}),
        Point("d", "dit", "W16A16", "none", 2.0),
    ]
    write_points(tmp_path / "points.csv", points)
    assert read_points(tmp_path / "points.csv") == points


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("model,family,precision,method\n", "no column score"),
        ("model,family,precision,method,score,parameter\n", "did you mean parameters"),
        ("model,family,precision,method,score,score\n", "more than once"),
        ("model,family,precision,method,score\nm,var,W4A16,rtn,high\n", "line 2: score 'high' is no number"),
        ("# note\n\nmodel,family,precision,method,score\nm,var,W4A16,rtn,\n", "line 4: the score is missing"),
        ("model,family,precision,method,score\nm,var,W4A16,rtn,nan\n", "line 2: score is nan"),
        ("model,family,precision,method,score\nm,var,W4A16,3\n", "line 2: as many values as columns"),
        ("model,family,precision,method,score,score_low\nm,var,W4A16,rtn,3,2\n", "must both be given"),
        ("model,family,precision,method,score,model_bits\nm,var,W4A16,rtn,3,4k\n", "model_bits '4k' is no number"),
    ],
)
def test_bad_csv_names_the_place(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "points.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_points(file)


def test_missing_file_and_table_are_named() -> None:
    with pytest.raises(ValueError, match="no such file"):
        read_points("nowhere.csv")
    with pytest.raises(ValueError, match="did you mean published:var-weight-only"):
        read_points("published:var-weights-only")


def test_a_study_gives_a_point_for_each_metric_of_each_finished_cell(tmp_path: Path) -> None:
    study, cells = StudyDirectory(tmp_path), [Cell("ladder/var-s", "W4A16"), Cell("ladder/var-m", "W4A16")]
    write_json(tmp_path / "study.json", {"cells": [cell.to_json() for cell in cells]})
    metrics = {"fd": {"value": 7.0, "low": 6.8, "high": 7.3}, "is": {"value": 11.0}}
    study.write(Record(cells[0], "var", "s", 1000, metrics, {"model_bits": 4000.0, "compute_bits": 64000.0}), None)
    study.write(Record(cells[1], error="MemoryError: gone"), None)
    points = read_points(tmp_path)
    assert [(p.metric, p.score, p.score_low, p.score_high) for p in points] == [
        ("fd", 7, 6.8, 7.3),
        ("is", 11, None, None),
    ]
    assert points[0].on_axis("compute_bits") == 64000
    with pytest.raises(ValueError, match="unknown budget axis 'model_bit'; did you mean model_bits"):
        points[0].on_axis("model_bit")


@pytest.mark.parametrize("name", published_names())
def test_published_tables_say_their_source_and_count_bits_as_the_paper_does(name: str) -> None:
    assert "Source: " in published_source(name)
    assert "Table" in published_source(name)
    points = read_points(name)
    assert points
    for point in points:
        weight, activation = (int(part) for part in point.precision[1:].split("KV")[0].split("A"))
        if point.parameters is None:
            assert not point.bits
        else:
            assert point.on_axis("model_bits") == point.parameters * weight
            assert point.on_axis("compute_bits") == point.parameters * weight * activation


def test_tables_of_one_paper_agree_where_they_repeat_each_other() -> None:
    """Table 2's rows of the three KL losses are in Table 5 too; K = 600 of Table 4 is Table 2's TopKLD."""
    weight_only = {(p.model, p.precision, p.method): p.score for p in read_points("published:var-weight-only")}
    losses = {(p.model, p.precision, p.method): p.score for p in read_points("published:var-distillation-loss")}
    shared = weight_only.keys() & losses.keys()
    assert len(shared) == 4 * (1 + 3 * 3)
    assert all(weight_only[key] == losses[key] for key in shared)
    for point in read_points("published:var-topkld-k"):
        if point.method == "TopKLD-K600":
            assert point.score == weight_only[point.model, "W3A16", "TopKLD"]
