"""Atomic writes: what was there stays until what replaces it is complete."""

import json
from pathlib import Path

import pytest

from bitlaw.files import replacing, replacing_directory, write_json, write_text


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    target = tmp_path / "value.json"
    write_json(target, {"a": 1})
    with pytest.raises(OSError, match="disk full"), replacing(target) as temporary:
        temporary.write_text('{"a": ')
        raise OSError("disk full")
    assert json.loads(target.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [target]


def test_a_directory_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with replacing_directory(target) as temporary:
        (temporary / "old").write_text("old")
    with pytest.raises(RuntimeError), replacing_directory(target) as temporary:
        (temporary / "new").write_text("half")
        raise RuntimeError("killed")
    assert [p.name for p in target.iterdir()] == ["old"]
    with replacing_directory(target) as temporary:
        (temporary / "new").write_text("new")
    assert [p.name for p in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


def test_json_with_nan_is_refused_before_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "x.json", {"fd": float("nan")})
    assert not (tmp_path / "x.json").exists()


def test_missing_parents_are_made(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "c.txt", "text")
    assert (tmp_path / "a" / "b" / "c.txt").read_text() == "text"
