import pytest

from bitlaw.names import lookup


def test_an_unknown_name_gets_the_nearest_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown method 'gptx'; did you mean gptq\? Known: gptq, rtn"):
        lookup({"rtn": 1, "gptq": 2}, "gptx", "method")


def test_a_known_name_is_found() -> None:
    assert lookup({"rtn": 1}, "rtn", "method") == 1
