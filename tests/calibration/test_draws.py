"""Rows at random: in order, from everywhere, and the same whatever is drawn at a time."""

import pytest
import torch

from bitlaw.calibration import draws
from bitlaw.calibration.draws import RowDraws


@pytest.mark.parametrize(("count", "wanted"), [(1152, 72), (1000, 999), (7, 3), (5, 5), (10**6, 4096), (10**5, 9000)])
def test_rows_are_chosen_in_order_and_from_everywhere(count: int, wanted: int) -> None:
    rows = RowDraws(0).choose(count, wanted)
    if wanted == count:
        assert rows is None
        return
    assert rows is not None
    assert len(rows) == wanted and int(rows[0]) >= 0 and int(rows[-1]) < count
    assert (rows.diff() > 0).all()


def test_no_position_of_an_image_is_overlooked() -> None:
    """36 tokens an image, one row of 16: a spacing of 16 would meet 9 of them."""
    drawn = RowDraws(0)
    chosen = [drawn.choose(32 * 36, 72) for _ in range(20)]
    met = torch.bincount(torch.cat([rows % 36 for rows in chosen if rows is not None]), minlength=36)
    assert len(met) == 36 and met.min() > 0.4 * met.float().mean()


def test_drawing_ahead_changes_nothing(monkeypatch) -> None:
    """Each row is where the next number of the seed's generator says, counted in rows of its part."""
    generator = torch.Generator().manual_seed(7)
    calls = [(300, 40), (9, 2), (5000, 1700)] * 4
    for at_once in (1, 64, 4096):
        monkeypatch.setattr(draws, "_AT_ONCE", at_once)
        drawn, generator = RowDraws(7), generator.manual_seed(7)
        for count, wanted in calls:
            rows, place = drawn.choose(count, wanted), torch.rand(wanted, generator=generator, dtype=torch.float64)
            ends = torch.arange(wanted + 1) * count // wanted
            assert rows is not None and torch.equal(rows, ends[:-1] + (place * ends.diff()).long())
