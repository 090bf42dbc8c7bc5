"""Rotary positions against their formulas."""

import pytest
import torch

from bitlaw.models.parts.rotary import grid_table, rotate


def test_pairs_are_turned_by_their_angles():
    angles = torch.tensor([[0.3, -1.2], [2.0, 0.0], [0.7, 5.0]])  # three positions, two pairs
    table = torch.stack([angles.cos(), angles.sin()], -1)
    x = torch.randn(2, 3, 5, 4)
    rotated = rotate(x, table[:, None])
    for pair in range(2):
        a, b = x[..., 2 * pair], x[..., 2 * pair + 1]
        cos, sin = (part[:, None] for part in table[:, pair].unbind(-1))
        torch.testing.assert_close(rotated[..., 2 * pair], a * cos - b * sin)
        torch.testing.assert_close(rotated[..., 2 * pair + 1], b * cos + a * sin)


def test_short_types_are_turned_in_float32():
    table = grid_table(3, 8, 1)
    x = torch.randn(2, 10, 8).bfloat16()
    assert torch.equal(rotate(x, table), rotate(x.float(), table).bfloat16())


def test_a_grid_turns_half_the_pairs_by_row_and_half_by_column():
    side, width = 5, 20  # five frequencies an axis
    table = grid_table(side, width, 2, base=100.0)
    assert table.shape == (2 + side**2, width // 2, 2) and table.dtype == torch.float32
    assert not table[:2].any()  # not the identity, which has a cosine of one
    theta = 100.0 ** (-2 * torch.arange(5.0) / 10)
    for row, column in ((0, 0), (1, 3), (4, 2)):
        found = table[2 + row * side + column]
        torch.testing.assert_close(found[:5, 0], (row * theta).cos())
        torch.testing.assert_close(found[5:, 1], (column * theta).sin())


def test_head_widths_that_cannot_be_split_are_refused():
    with pytest.raises(ValueError, match=r"head width 6: .* a multiple of 4"):
        grid_table(4, 6, 1)
