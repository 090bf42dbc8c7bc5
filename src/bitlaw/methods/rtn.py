"""Round to nearest, the "standard PTQ" of the papers."""

from dataclasses import dataclass

from torch import Tensor

from bitlaw.calibration import InputStats
from bitlaw.methods.method import LayerMethod
from bitlaw.quantized import QuantizedTensor, WeightSpec


@dataclass(frozen=True)
class RTN(LayerMethod):
    """Min-max ranges, every weight to the nearest code (P0 eq. 4-6). Needs no calibration."""

    def quantize(self, weight_OI: Tensor, stats: InputStats, spec: WeightSpec) -> QuantizedTensor:
        return spec.quantize(weight_OI)
