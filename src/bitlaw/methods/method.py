"""How the numbers of a layer are chosen: the interface of methods that see one layer at a time.

Legend: O output channels, I input channels.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from bitlaw.calibration import InputStats
from bitlaw.quantized import QuantizedTensor, WeightSpec


class LayerMethod(ABC):
    """Quantizes the weight of one linear. Subclasses are frozen dataclasses of their settings."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Fields of InputStats that calibration must collect for it."""

    @abstractmethod
    def quantize(self, weight_OI: Tensor, stats: InputStats, spec: WeightSpec) -> QuantizedTensor:
        """`weight_OI` in the format and groups of `spec`."""
