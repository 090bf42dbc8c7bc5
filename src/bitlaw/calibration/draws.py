"""Rows at random, without a tensor operation for each step of it: calibration draws some for each layer and step."""

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_AT_ONCE = 4096  # numbers of one call of the generator, which has its price


class RowDraws:
    """Draws of a seed. What is drawn depends on the order of calls alone."""

    def __init__(self, seed: int):
        self._generator = torch.Generator().manual_seed(seed)
        self._numbers = np.empty(0)

    def choose(self, count: int, wanted: int) -> Tensor | None:
        """`wanted` of `count` rows in order, int64: one at random of each of as many equal parts; None for all.

        Not every so many: rows come image by image, and a spacing that shares a factor with the tokens of an image
        would see some of its positions only.
        """
        if wanted >= count:
            return None
        begins, sizes, lasts = _parts(count, wanted)
        within = (self._uniform(wanted) * sizes).astype(np.int64)
        return torch.from_numpy(np.minimum(within, lasts, out=within) + begins)

    def _uniform(self, count: int) -> NDArray[np.float64]:
        """The next numbers of the generator, in [0, 1): the same ones however many are drawn at a time."""
        if len(self._numbers) < count:
            more = torch.rand(max(count, _AT_ONCE), generator=self._generator, dtype=torch.float64).numpy()
            self._numbers = np.concatenate([self._numbers, more])
        taken, self._numbers = self._numbers[:count], self._numbers[count:]
        return taken


@lru_cache(maxsize=256)
def _parts(count: int, wanted: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """`wanted` equal parts of `count` rows: where each begins, how many rows it has, and the last of them."""
    ends = np.arange(wanted + 1) * count // wanted
    sizes = np.diff(ends)
    return ends[:-1], sizes, sizes - 1
