"""A streaming histogram of numbers whose range is not known before, and the clipping ranges that follow from it.

Legend: N numbers, K bins.
"""

from dataclasses import dataclass, replace
from math import gcd, isfinite
from typing import Literal

import torch
from torch import Tensor

from bitlaw.formats import Format, Params

NUM_BINS = 4096
_MOST_COUNTED = 2**13  # numbers of one tensor; counting is slower than a product with a small matrix
_MOST_WAITING = 2**16  # numbers, and what is above of the last tensor; they are counted together


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

    def add(self, x: Tensor) -> "Histogram":
        """With the numbers of a tensor."""
        here = self.reaching(float(x.min()), float(x.max()))
        x_N = x.detach().flatten()
        # Exact, the factor being a power of two: a wider histogram finds each number in the pair its bin merges into.
        half = len(self.counts_K) // 2
        bins = (x_N.float() * (half / here.bound)).floor_().to(torch.int32).add_(half).clamp_(0, 2 * half - 1)
        counts_K = here.counts_K + torch.bincount(bins, minlength=len(self.counts_K)).cpu()
        return replace(here, counts_K=counts_K)

    def reaching(self, low: float, high: float) -> "Histogram":
        """The same counts in bins that go as far as these numbers, which are its extremes if they are beyond them."""
        counts_K, bound = self.counts_K, self.bound
        while bound < max(high, -low):
            bound *= 2
            if isfinite(self.low):  # there is something to merge
                quarter = len(counts_K) // 4
                merged = counts_K.view(-1, 2).sum(1)
                counts_K = torch.zeros_like(counts_K)
                counts_K[quarter : 3 * quarter] = merged
        return Histogram(counts_K, bound, min(self.low, low), max(self.high, high))


class Histograms:
    """Histograms that are made of many tensors, of whose numbers few are counted, and many at a time.

    Of a large tensor evenly spaced numbers are counted, every channel alike. `Extremes` are kept elsewhere, of all.
    """

    def __init__(self, count: int):
        self._counted_S = [Histogram.empty() for _ in range(count)]
        self._waiting: list[Tensor] = []
        self._num_waiting, self._group = 0, 0

    @staticmethod
    def num_bytes(count: int) -> int:
        """Bytes that are held while tensors are added."""
        return 8 * NUM_BINS * count + 4 * (_MOST_WAITING + 2 * _MOST_COUNTED)

    def add(self, x: Tensor, group: int) -> None:
        """Take a tensor in for histogram number `group`."""
        if group != self._group:
            self._count()
            self._group = group
        x_N = x.detach().flatten()
        counted_N = x_N[:: _step(len(x_N))]
        self._waiting.append(counted_N.to(torch.float32, copy=True))
        self._num_waiting += len(counted_N)
        if self._num_waiting >= _MOST_WAITING:
            self._count()

    def counted_S(self, ends_S2: Tensor) -> tuple[Histogram, ...]:
        """The histograms of all that was added; `ends_S2` are the least and the greatest number of each."""
        self._count()
        ends = ((float(low), float(high)) for low, high in ends_S2)
        return tuple(h.reaching(low, high) for h, (low, high) in zip(self._counted_S, ends, strict=True))

    def _count(self) -> None:
        if self._waiting:
            self._counted_S[self._group] = self._counted_S[self._group].add(torch.cat(self._waiting))
            self._waiting, self._num_waiting = [], 0


def _step(size: int) -> int:
    """From one counted number to the next: prime to `size`, so that each channel is met as often as the others."""
    step = max(1, size // _MOST_COUNTED)
    while gcd(step, size) > 1:
        step += 1
    return step


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
