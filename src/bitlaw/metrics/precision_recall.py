"""Improved precision and recall: the share of images inside the other set's manifold of k-nearest-neighbour balls.

Legend: N images of the first set, M of the second, B of a block, D features, K = k + 1 neighbours.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class PrecisionRecall(NamedTuple):
    """precision: share of generated images on the real manifold; recall: share of real images on the generated one."""

    precision: float
    recall: float


def precision_recall(
    generated_ND: Tensor, real_MD: Tensor, num_neighbors: int = 3, block_size: int = 2048
) -> PrecisionRecall:
    """Kynkäänniemi et al. 2019 eq. 2 and 3. Memory is `block_size` x max(N, M) float64 numbers.

    ValueError unless both sets have more than `num_neighbors` images.
    """
    if generated_ND.ndim != 2 or generated_ND.shape[1:] != real_MD.shape[1:]:
        raise ValueError(f"features of different widths: {tuple(generated_ND.shape)} and {tuple(real_MD.shape)}")
    fewest = min(len(generated_ND), len(real_MD))
    if not 1 <= num_neighbors < fewest:
        raise ValueError(f"{num_neighbors} nearest neighbours of {fewest} images; each set needs more images than that")
    x_ND, y_MD = (features.detach().to("cpu", torch.float64) for features in (generated_ND, real_MD))
    center_D = y_MD.mean(0)
    x_ND, y_MD = x_ND - center_D, y_MD - center_D  # distances by matrix product lose digits far from the origin
    return PrecisionRecall(
        precision=_covered(x_ND, y_MD, _squared_radii(y_MD, num_neighbors, block_size), block_size),
        recall=_covered(y_MD, x_ND, _squared_radii(x_ND, num_neighbors, block_size), block_size),
    )


def _covered(x_ND: Tensor, centers_MD: Tensor, squared_radii_M: Tensor, block_size: int) -> float:
    """Share of x inside at least one ball, borders included."""
    blocks = _squared_distances(x_ND, centers_MD, block_size)
    return sum(int((squared_BM <= squared_radii_M).any(1).sum()) for squared_BM in blocks) / len(x_ND)


def _squared_radii(x_ND: Tensor, num_neighbors: int, block_size: int) -> Tensor:
    """Squared distance of each point to its k-th nearest other point: the k + 1 smallest include the point itself."""
    blocks = _squared_distances(x_ND, x_ND, block_size)
    nearest = (squared_BN.topk(num_neighbors + 1, largest=False).values for squared_BN in blocks)
    return torch.cat([squared_BK[:, -1] for squared_BK in nearest])


def _squared_distances(x_ND: Tensor, y_MD: Tensor, block_size: int) -> Iterator[Tensor]:
    """|x|^2 + |y|^2 - 2 x.y for a block of x at a time: (B, M)."""
    squared_M = y_MD.square().sum(1)
    for x_BD in x_ND.split(block_size):
        yield (x_BD.square().sum(1)[:, None] + squared_M).addmm_(x_BD, y_MD.T, alpha=-2).clamp_min_(0)
