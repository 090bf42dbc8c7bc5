"""Rotary position embeddings on adjacent pairs of a head's dimensions (Su et al. 2021), as LLaMA has them.

Pair p of a head is its dimensions 2 p and 2 p + 1, turned by an angle that depends on the token's position; queries and
keys of equal angles keep their products. A table holds the cosine and sine of every angle.

Legend: L positions, d width of a head, P = d / 2 pairs, g side of a grid of tokens.
"""

import torch
from torch import Tensor


def rotate(x_d: Tensor, cos_sin_P2: Tensor) -> Tensor:
    """Every pair (a, b) as (a cos - b sin, b cos + a sin), computed in float32, in the type of `x_d`.

    x_d: (..., d), its last dimension contiguous
    cos_sin_P2: float32 (..., P, 2), whose leading dimensions broadcast against those of `x_d`, e.g. (L, 1, P, 2) for
    (B, L, H, d)
    """
    # A complex product is this rotation, in one pass over memory instead of seven.
    pairs_P = torch.view_as_complex(x_d.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs_P * torch.view_as_complex(cos_sin_P2)).flatten(-2).type_as(x_d)


def grid_table(side: int, head_width: int, num_before: int, base: float = 10000.0) -> Tensor:
    """Cosines and sines (num_before + g^2, P, 2), float32, for a g x g grid of tokens in row-major order.

    The first half of the pairs turn with the token's row, the others with its column, both by base^(-2 j / P) for their
    j-th pair. The `num_before` positions of condition tokens come first, and all their numbers are zero: not the
    identity, so that rotated queries and keys there vanish. LlamaGen was trained so.
    """
    if head_width % 4:
        raise ValueError(f"head width {head_width}: rotary positions in two dimensions need a multiple of 4")
    half = head_width // 2
    # In float32 and in this order, as the official code computes it.
    frequencies = 1.0 / base ** (torch.arange(0, half, 2, dtype=torch.float32) / half)
    angles = torch.outer(torch.arange(side, dtype=torch.float32), frequencies)
    rows, columns = angles[:, None].expand(-1, side, -1), angles[None].expand(side, -1, -1)
    angles_LP = torch.cat([rows, columns], -1).flatten(0, 1)
    table_LP2 = torch.stack([angles_LP.cos(), angles_LP.sin()], -1)
    return torch.cat([torch.zeros(num_before, half, 2), table_LP2])


def line_table(length: int, head_width: int, base: float = 10000.0) -> Tensor:
    """Cosines and sines (length, P, 2), float32, of positions 0, 1, ...: base^(-2 j / d) a step for the j-th pair.

    LLaMA's positions; Large-DiT has them over the tokens of an image, row by row.
    """
    if head_width % 2:
        raise ValueError(f"head width {head_width}: rotary positions need an even one")
    # In float32 and in this order, as the official code computes it.
    frequencies = 1.0 / base ** (torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
    angles_LP = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return torch.stack([angles_LP.cos(), angles_LP.sin()], -1)
