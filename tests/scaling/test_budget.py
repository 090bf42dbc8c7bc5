import pytest

from bitlaw.scaling.budget import format_bits, parse_bits, round_budget


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("300MB", 2.4e9),
        ("1.5GB", 1.2e10),
        (" 1.5 GB ", 1.2e10),
        ("2e9bits", 2e9),
        ("200kB", 1.6e6),
        ("1KiB", 8192),
        ("1e6 bit²", 1e6),
        (".5Mbit", 5e5),
        ("7B", 56),
    ],
)
def test_budgets_are_read(text: str, bits: float) -> None:
    assert parse_bits(text) == pytest.approx(bits, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("300", "write 300MB"),
        ("MB", "expected a number and a unit"),
        ("", "expected a number and a unit"),
        ("300 mb", "did you mean MB"),
        ("300 parsecs", "unknown unit 'parsecs'"),
        ("-1MB", "more than 0"),
        ("0MB", "more than 0"),
        ("1e999GB", "more than 0 and finite"),
        ("1.2.3MB", "expected a number"),
    ],
)
def test_bad_budgets_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_bits(text)


@pytest.mark.parametrize("text", ["500 MB", "1.5 GB", "38.8 kB", "999 kB", "1 MB", "12 B"])
def test_printed_sizes_are_read_back(text: str) -> None:
    assert format_bits(parse_bits(text)) == text


def test_compute_is_not_printed_in_bytes() -> None:
    assert format_bits(5.12e11, "compute_bits_used") == "5.12e+11 bit²"
    assert parse_bits(format_bits(5.12e11, "compute_bits")) == pytest.approx(5.12e11)


def test_rounding_up_to_the_next_unit() -> None:
    assert format_bits(8 * 999_900) == "1 MB"


def test_round_budget_is_round_and_near_the_middle() -> None:
    assert round_budget(8 * 116e6, 8 * 4e9) == 8 * 500e6
    assert round_budget(1e10, 1e14, "compute_bits") == 1e12
