"""The least and the greatest numbers that enter a layer, of each channel and in each step group.

Legend: C channels, S step groups.
"""

import torch
from torch import Tensor


class Extremes:
    """Running extremes. NaN is passed on.

    Steps come group by group, so what is seen of one group is kept by channel and taken into the sums when the next
    one begins: a call costs four operations and never waits for a device.
    """

    def __init__(self, num_groups: int):
        self.ends_S2 = torch.tensor([torch.inf, -torch.inf]).repeat(num_groups, 1)
        """Of all channels, for each step group; current only after `fold`."""
        self.low_C: Tensor | None = None
        """Of each channel, over all groups; current only after `fold`. The same holds for `high_C`."""
        self.high_C: Tensor | None = None
        self._group = 0
        self._here: tuple[Tensor, Tensor] | None = None  # of the group that is running, by channel

    @staticmethod
    def num_bytes(num_channels: int, num_groups: int) -> int:
        """Bytes that are held after `fold`."""
        return 4 * 2 * (num_channels + num_groups)

    def add(self, x: Tensor, group: int, over: tuple[int, ...]) -> None:
        """Take in numbers of any float type; `over` are their dimensions that are not channels."""
        if group != self._group:
            self.fold()
            self._group = group
        low_C, high_C = x.amin(over), x.amax(over)
        if self._here is not None:
            low_C, high_C = low_C.minimum(self._here[0]), high_C.maximum(self._here[1])
        self._here = low_C, high_C

    def fold(self) -> None:
        """Take the running group into the sums."""
        if self._here is None:
            return
        low_C, high_C = self._here[0].float(), self._here[1].float()
        self._here = None
        low, high = self.ends_S2[self._group]
        low_here, high_here = torch.stack([low_C.min(), high_C.max()]).cpu()
        self.ends_S2[self._group] = torch.stack([low.minimum(low_here), high.maximum(high_here)])
        self.low_C = low_C if self.low_C is None else self.low_C.minimum(low_C)
        self.high_C = high_C if self.high_C is None else self.high_C.maximum(high_C)
