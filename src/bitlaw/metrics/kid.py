"""Kernel inception distance: the squared maximum mean discrepancy with a cubic kernel, unbiased at any N.

Legend: N, M images of the two sets, D features.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class KID(NamedTuple):
    """The mean over disjoint blocks, and the standard error of that mean."""

    value: float
    standard_error: float


def kernel_distance(features_ND: Tensor, reference_MD: Tensor, num_blocks: int = 10, seed: int = 0) -> KID:
    """Unbiased MMD^2 with k(x, y) = (x.y / D + 1)^3 (Binkowski et al. 2018 section 4); near 0, it may be negative.

    Both sets are shuffled by `seed` and cut into `num_blocks` disjoint blocks. The original draws 100 overlapping
    subsets of 1000; disjoint blocks are independent, so their spread gives a true standard error.
    ValueError if a block would have fewer than two images of either set.
    """
    if features_ND.shape[1:] != reference_MD.shape[1:] or features_ND.ndim != 2:
        raise ValueError(f"features of different widths: {tuple(features_ND.shape)} and {tuple(reference_MD.shape)}")
    fewest = min(len(features_ND), len(reference_MD))
    if num_blocks < 2 or fewest < 2 * num_blocks:
        raise ValueError(
            f"KID: {num_blocks} blocks of {fewest} images; needs 2 blocks or more, and 2 images or more in each"
        )
    generator = torch.Generator().manual_seed(seed)
    blocks = zip(_blocks(features_ND, num_blocks, generator), _blocks(reference_MD, num_blocks, generator), strict=True)
    values = torch.stack([squared_discrepancy(x_ND, y_MD) for x_ND, y_MD in blocks])
    return KID(float(values.mean()), float(values.std()) / num_blocks**0.5)


def squared_discrepancy(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    """Unbiased MMD^2 of all of x against all of y: E k(x, x') + E k(y, y') - 2 E k(x, y), without the pairs x = x'."""
    return _mean_of_pairs(x_ND) + _mean_of_pairs(y_MD) - 2 * _kernel(x_ND, y_MD).mean()


def _mean_of_pairs(x_ND: Tensor) -> Tensor:
    kernel_NN = _kernel(x_ND, x_ND)
    return (kernel_NN.sum() - kernel_NN.trace()) / (len(x_ND) * (len(x_ND) - 1))


def _kernel(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    return (x_ND @ y_MD.T / x_ND.shape[1] + 1) ** 3


def _blocks(features_ND: Tensor, num_blocks: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    order_N = torch.randperm(len(features_ND), generator=generator)
    return features_ND.detach().to("cpu", torch.float64)[order_N].tensor_split(num_blocks)
