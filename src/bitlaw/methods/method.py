"""How the numbers of a layer are chosen: the interface of methods that see one layer at a time.

Legend: O output channels, I inputs of an output channel: the input channels of a linear; of a convolution the numbers
in a window that one output channel weighs, channel by channel and row by row, as F.unfold lists them.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from bitlaw.calibration import InputStats
from bitlaw.quantized import QuantizedTensor, WeightSpec


class LayerMethod(ABC):
    """Quantizes the weight of one layer. Subclasses are frozen dataclasses of their settings.

    A convolution is a linear to them: its weight (O, channels, kh, kw) arrives as (O, I), `stats` are those of windows
    of its input (of each group of channels, where it has several), and the caller gives the result the weight's shape.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    """Fields of InputStats that calibration must collect for it."""

    @abstractmethod
    def quantize(self, weight_OI: Tensor, stats: InputStats, spec: WeightSpec) -> QuantizedTensor:
        """`weight_OI` in the format and groups of `spec`."""
