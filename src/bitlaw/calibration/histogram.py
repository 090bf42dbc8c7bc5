"""A streaming histogram of numbers whose range is not known before, and the clipping ranges that follow from it.

Legend: N numbers, K bins.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bitlaw.formats import Format, Params

NUM_BINS = 4096
_MOST_COUNTED = 2**13  # numbers of one tensor; counting is slower than a product with a small matrix


@dataclass(frozen=True)
class Histogram:
    """How many numbers fell in each of K equal bins over [-bound, bound]; their extremes are exact.

    `bound` is a power of two, which doubles when a number lies outside: bins merge in pairs and no count is split, so
    that the order in which numbers come changes nothing.
    """

    counts_K: Tensor
    bound: float
    low: float
    high: float

    @classmethod
    def empty(cls) -> "Histogram":
        """Of no numbers."""
        return cls(torch.zeros(NUM_BINS, dtype=torch.int64), 2.0**-20, torch.inf, -torch.inf)

    @property
    def total(self) -> int:
        """Numbers counted."""
        return int(self.counts_K.sum())

    @property
    def centers_K(self) -> Tensor:
        """The middle of each bin, float32."""
        width = 2 * self.bound / len(self.counts_K)
        return (torch.arange(len(self.counts_K)) + 0.5) * width - self.bound

    def add(self, x: Tensor, ends: tuple[float, float] | None = None) -> "Histogram":
        """With the numbers of a tensor. Of a large one evenly spaced numbers are counted; the extremes are of all.

        ends: the least and the greatest number, where they are known
        """
        low, high = ends or (float(x.min()), float(x.max()))
        here = self._widened(max(high, -low))
        x_N = x.detach().flatten()
        x_N = x_N[:: max(1, len(x_N) // _MOST_COUNTED)]
        # Exact, the factor being a power of two: a wider histogram finds each number in the pair its bin merges into.
        half = len(self.counts_K) // 2
        bins = (x_N.float() * (half / here.bound)).floor_().to(torch.int64).add_(half).clamp_(0, 2 * half - 1)
        counts_K = here.counts_K + torch.bincount(bins, minlength=len(self.counts_K)).cpu()
        return Histogram(counts_K, here.bound, min(self.low, low), max(self.high, high))

    def _widened(self, magnitude: float) -> "Histogram":
        counts_K, bound = self.counts_K, self.bound
        while bound < magnitude:
            quarter = len(counts_K) // 4
            merged = counts_K.view(-1, 2).sum(1)
            counts_K = torch.zeros_like(counts_K)
            counts_K[quarter : 3 * quarter] = merged
            bound *= 2
        return Histogram(counts_K, bound, self.low, self.high)


def static_range(histogram: Histogram, format: Format, choice: "RangeChoice", percentile: float = 99.99) -> Params:
    """Parameters (1, 1) of a range that all numbers of a histogram share.

    choice: "minmax" takes all numbers in, "percentile" as many of them as it says at either end, "mse" is the share of
    the whole range whose rounded numbers have the least squared error, over the bins' centers
    """
    ends = torch.tensor([[histogram.low, histogram.high]])
    if choice == "minmax":
        return format.fit(ends)
    centers_K, counts_K = histogram.centers_K, histogram.counts_K.double()
    if choice == "percentile":
        below_K = counts_K.cumsum(0) / counts_K.sum()
        last = len(centers_K) - 1
        low = int(torch.searchsorted(below_K, 1 - percentile / 100).clamp(max=last))
        high = int(torch.searchsorted(below_K, percentile / 100).clamp(max=last))
        return format.fit(torch.stack([centers_K[low], centers_K[high]])[None].clamp(*ends[0].tolist()))
    used = counts_K > 0
    x_1N, weight_1N = centers_K[used][None].clamp(*ends[0].tolist()), counts_K[used][None]

    def error(params: Params) -> float:
        return float(((format.nearest(x_1N, params) - x_1N).double().square() * weight_1N).sum())

    return min((format.fit(ends * share) for share in _SHARES), key=error)


RangeChoice = Literal["minmax", "percentile", "mse"]
_SHARES = [1.0 - 0.02 * i for i in range(45)]
